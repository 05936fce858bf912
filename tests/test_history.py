"""The record of a training: complete and the same after a kill, alpha as the sampler's file counts
it, and nothing of the training changed by it."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import history
import train
from data import collate
from history import History, Validation
from settings import Method
from speculative import expected_acceptance
from storage import HISTORY, Checkpoints
from teacher import Frozen, ReferenceLoss, TokenCache
from train import adaspec_step, distillation_step, fine_tuning_step

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(examples):
    """(thirty rows to train on, five batches of six; seven others of different lengths)."""
    return examples[:30], examples[30:37]


def train_copy(model, examples, step, step_inputs=(), **settings):
    model = copy.deepcopy(model)
    settings = {"vocab_size": 400, "lr": 1e-3, "epochs": 2, "batch_size": 6} | settings
    return model, train.train(model, examples, step, step_inputs, **settings)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(lines):
    times = ("seconds", "tokens_per_second")
    return [{key: line[key] for key in line if key not in times} for line in lines]


def validated(make_model, rows, **more):
    """(target, a history that watches alpha)."""
    target = Frozen(make_model(seed=1, hidden_size=48, initializer_range=0.3), 400)
    validation = Validation(rows, rows_at_once=3)
    validation.ask(target)
    return target, History(validation=validation, **more)


# Lines


def test_a_line_is_the_mean_since_the_line_before(make_model, rows, monkeypatch):
    """Ten steps, lines after 4, 8 and the last, each over the tokens that bore loss."""
    examples, _ = rows
    monkeypatch.setattr(history, "LINES", 3)
    monkeypatch.setattr(history, "ALPHAS", 2)
    target = Frozen(make_model(seed=1), 400)
    reference = ReferenceLoss(Frozen(make_model(seed=2), 400), target, "fkl")
    steps = []

    def step(student, batch, *inputs):
        loss, count = adaspec_step(student, batch, *inputs)
        tokens = sum(len(examples[row].input_ids) for row in batch.rows)
        steps.append((loss.item(), count, len(batch.index), tokens))
        return loss, count

    record = History()
    inputs = (target, reference, Method("adaspec", k=0.3))
    settings = {"decay": "linear", "history": record}
    _, summary = train_copy(make_model(), examples, step, inputs, **settings)
    assert [(line["step"], line["epoch"]) for line in record.lines] == [
        (4, 1), (5, 1), (8, 2), (10, 2)
    ]  # fmt: skip
    start, before = 0, 0.0
    for line in record.lines:
        loss, count, responses, tokens = map(sum, zip(*steps[start : line["step"]], strict=True))
        assert line["loss"] == pytest.approx(loss / count, rel=1e-5)
        assert line["selected"] == pytest.approx(count / responses, rel=1e-5)
        assert line["selected"] == pytest.approx(0.3, abs=0.01)
        assert line["lr"] == pytest.approx(2e-3 * (1 - (line["step"] - 1) / 10))
        seconds = line["seconds"] - before
        assert line["tokens_per_second"] == pytest.approx(tokens / seconds, rel=1e-3)
        assert "alpha" not in line
        start, before = line["step"], line["seconds"]
    assert summary["seconds"] >= round(before, 1) > 0


def test_lines_are_few_and_the_last_step_is_among_them():
    record = History()
    for steps in (1, 7, 199, 200, 201, 5000):
        record.steps = steps
        for most in (history.LINES, history.ALPHAS):
            due = [step for step in range(1, steps + 1) if record.is_due(step, most)]
            assert due[-1] == steps and min(steps, most) / 2 <= len(due) <= most + 1


# Stopping and going on


def failing_at(step):
    """A step with dropout of its own, in which the process dies when it is the `step`th."""
    calls = []

    def dying_step(student, batch, target, method):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        hidden = F.dropout(student.hidden(batch), 0.1)
        losses = train.token_loss("fkl", target, batch)
        return student.head.loss(hidden, *losses), len(hidden)

    return dying_step


def test_killed_training_ends_in_the_same_history(make_model, rows, tmp_path, monkeypatch):
    """Killed between a saved state and the next: the lines since are made again, once."""
    examples, held_out = rows
    monkeypatch.setattr(history, "LINES", 5)
    monkeypatch.setattr(history, "ALPHAS", 3)
    target, whole = validated(make_model, held_out)
    inputs = (target, Method("distillspec"))
    expected, _ = train_copy(make_model(), examples, failing_at(None), inputs, history=whole)

    saved = []
    save = train.State.save
    path = tmp_path / HISTORY
    settings = {"checkpoints": Checkpoints(tmp_path, "fingerprint"), "save_minutes": 0}

    def saving_three_times(state):
        saved.append(1)
        if len(saved) <= 3:
            save(state)

    monkeypatch.setattr(train.State, "save", saving_three_times)
    _, killed = validated(make_model, held_out, path=path)
    with pytest.raises(KeyboardInterrupt):
        train_copy(make_model(), examples, failing_at(7), inputs, history=killed, **settings)
    assert [line["step"] for line in read(path)] == [0, 2, 4, 6], "the newest state is step 3's"
    _, resumed = validated(make_model, held_out, path=path)
    trained, _ = train_copy(
        make_model(seed=9), examples, failing_at(None), inputs, history=resumed, **settings
    )
    assert torch.equal(weights(trained), weights(expected))
    assert [line["step"] for line in whole.lines] == [0, 2, 4, 6, 8, 10]
    assert without_times(resumed.lines) == without_times(whole.lines)
    assert read(path) == resumed.lines
    seconds = [line["seconds"] for line in resumed.lines]
    assert seconds == sorted(seconds)


# Alpha


def acceptance(target, draft, rows):
    input_ids, labels = collate(rows)
    overlap = expected_acceptance(target, draft, input_ids, labels, 1.0, vocab_size=400).overlap
    return overlap.mean().item()


@pytest.mark.parametrize("architecture", ["neox", "llama"])
def test_alpha_is_the_expected_acceptance_on_the_validation_rows(
    make_model, rows, architecture, tmp_path
):
    """Also where the target answers from a cache and its trunk is gone."""
    examples, held_out = rows
    target_model = make_model(seed=1, hidden_size=48, initializer_range=0.3)
    target, record = validated(make_model, held_out)
    target.use(TokenCache(tmp_path, "toy", examples, 48, torch.float32, 6), "toy")
    draft = make_model(architecture, seed=2, initializer_range=0.1)
    inputs = (target, Method("distillspec"))
    trained, _ = train_copy(draft, examples, distillation_step, inputs, lr=1e-2, history=record)
    first, *_, last = record.lines
    assert first == {"step": 0, "epoch": 0, "seconds": 0.0, "alpha": first["alpha"]}
    assert first["alpha"] == pytest.approx(acceptance(target_model, draft, held_out), abs=2e-6)
    assert last["alpha"] == pytest.approx(acceptance(target_model, trained, held_out), abs=2e-6)
    assert last["alpha"] > first["alpha"] + 0.05 and last["step"] == 10
    assert all("alpha" in line for line in record.lines), "ten steps are few"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_watching_changes_nothing(make_model, rows, dtype):
    """The generators of dropout, training mode, weights: to the bit."""
    examples, held_out = rows
    target, record = validated(make_model, held_out)
    inputs = (target, Method("distillspec"))
    draft = make_model("phi", resid_pdrop=0.1)
    settings = {"dtype": dtype, "max_steps": 4}
    watched, _ = train_copy(draft, examples, distillation_step, inputs, history=record, **settings)
    unwatched, _ = train_copy(draft, examples, distillation_step, inputs, **settings)
    assert torch.equal(weights(watched), weights(unwatched))
    assert not torch.equal(weights(watched), weights(draft)) or dtype == "float16"
    assert all(0 < line["alpha"] < 1 for line in record.lines) and len(record.lines) == 5


def test_watching_takes_no_time_of_the_training(make_model, rows, monkeypatch):
    """Each alpha takes an hour of this clock, each step a second."""
    examples, held_out = rows
    _, record = validated(make_model, held_out)
    now = [0.0]
    monkeypatch.setattr(
        train, "time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=float)
    )
    alpha = record.validation.alpha

    def slow_alpha(*inputs):
        now[0] += 3600
        return alpha(*inputs)

    monkeypatch.setattr(record.validation, "alpha", slow_alpha)

    def step(student, batch):
        now[0] += 1
        return fine_tuning_step(student, batch)

    _, summary = train_copy(make_model(), examples, step, history=record)
    assert [line["seconds"] for line in record.lines] == list(range(11))
    assert summary["seconds"] == 10 and now[0] == 10 + 11 * 3600


def test_no_alpha_without_target_or_rows(make_model, rows):
    examples, held_out = rows
    target = Frozen(make_model(seed=1), 400)
    none = Validation([], 3)
    none.ask(target)
    for validation in (None, none, Validation(held_out, 3)):
        record = History(validation=validation)
        train_copy(make_model(), examples, fine_tuning_step, history=record, max_steps=2)
        assert [line["step"] for line in record.lines] == [1, 2]
        assert not any("alpha" in line for line in record.lines)
        assert {line["selected"] for line in record.lines} == {1.0} and record.remarks() == ""


# TensorBoard


def test_events_of_a_killed_training_are_complete(make_model, rows, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    examples, held_out = rows
    settings = {"checkpoints": Checkpoints(tmp_path / "saved", "fingerprint"), "save_minutes": 0}
    for step in (4, None):
        target, record = validated(make_model, held_out, log_dir=tmp_path / "events")
        inputs = (target, Method("distillspec"))
        try:
            train_copy(make_model(), examples, failing_at(step), inputs, history=record, **settings)
        except KeyboardInterrupt:
            assert record.lines[-1]["step"] == 3
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for key in ("loss", "alpha", "selected", "lr", "tokens_per_second", "seconds", "epoch"):
        points = [(event.step, event.value) for event in events.Scalars(key)]
        expected = [(line["step"], line[key]) for line in record.lines if key in line]
        assert points == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
