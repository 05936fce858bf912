"""The loop: its gradient is the whole batch's however that is split, what is not finite stops it,
and stopped training goes on to the same bits."""

import copy
import resource
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import ranks
import train
from adaspec import adaspec_loss
from data import batches, collate, make_batch
from distillspec import DIVERGENCES, OnPolicy, ResponseWriter
from settings import Method
from storage import Checkpoints
from teacher import Frozen, ReferenceLoss
from tests.damage import drop_checksum, flip, truncate
from train import Student, adaspec_step, disagreement, distillation_step, fine_tuning_step

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def examples(examples):
    """Thirty rows: five batches of six."""
    return examples[:30]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train_copy(model, examples, step=fine_tuning_step, step_inputs=(), **settings):
    """(trained copy of the model, summary)."""
    model = copy.deepcopy(model)
    settings = {"vocab_size": 400, "lr": 1e-3, "epochs": 1, "batch_size": 6} | settings
    return model, train.train(model, examples, step, step_inputs, **settings)


def lengths(examples):
    return [len(example.input_ids) for example in examples]


def teachers(make_model, dtype=torch.float32):
    target = Frozen(make_model(seed=1, hidden_size=48).to(dtype), 400)
    reference = Frozen(make_model(seed=2).to(dtype), 400)
    return target, ReferenceLoss(reference, target, "fkl")


def step_and_inputs(name, make_model, dtype=torch.float32):
    """A stage's step and what it needs, by the stage's name."""
    target, reference = teachers(make_model, dtype)
    return {
        "fine-tuning": (fine_tuning_step, ()),
        "distillation": (distillation_step, (target, Method("distillspec"))),
        "adaspec": (adaspec_step, (target, reference, Method("adaspec"))),
    }[name]


# What a step minimises


def plain_adamw(model, lr=1e-3):
    """AdamW with decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


@pytest.mark.parametrize("decay", ["constant", "linear"])
def test_equals_a_plain_loop_written_here(make_model, examples, decay):
    """AdamW on the mean cross-entropy of the batch's response tokens, clipped at 1; a linear rate
    goes from twice the rate to nothing."""
    other = make_model()
    trained, summary = train_copy(make_model(), examples, epochs=2, seed=5, decay=decay)
    optimizer = plain_adamw(other)
    steps = 0
    for epoch in range(2):
        for rows in batches(lengths(examples), 6, 5, epoch):
            input_ids, labels = collate([examples[row] for row in rows])
            logits = other(input_ids).logits[:, :-1, :400]
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            if decay == "linear":
                for group in optimizer.param_groups:
                    group["lr"] = 2e-3 * (1 - steps / 10)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    torch.testing.assert_close(weights(trained), weights(other), rtol=0, atol=5e-6)
    assert (weights(other) - weights(make_model())).abs().max() > 5e-3
    assert summary["steps"] == steps == 10 and summary["skipped_steps"] == 0
    assert summary["loss"] == pytest.approx(loss.item(), rel=1e-4)
    responses = sum(len(example.input_ids) - example.prompt_length for example in examples)
    assert summary["loss_tokens"] == 2 * responses
    assert summary["tokens"] == 2 * sum(lengths(examples)) and summary["rows"] == 60
    assert not trained.training


def test_adaspec_step_is_adaspec_loss(make_model, examples):
    """A step of stage 2 equals one on the loss that people copy."""
    models = [make_model(seed=1, hidden_size=48), make_model(seed=2), make_model(seed=3)]
    target, reference, draft = models
    frozen = Frozen(copy.deepcopy(target), 400)
    losses = ReferenceLoss(Frozen(copy.deepcopy(reference), 400), frozen, "fkl")
    inputs = (frozen, losses, Method("adaspec", k=0.4))
    trained, summary = train_copy(draft, examples, adaspec_step, inputs, max_steps=1)
    rows = batches(lengths(examples), 6, 0, 0)[0]
    input_ids, labels = collate([examples[row] for row in rows])
    with torch.no_grad():
        logits = [model(input_ids).logits[..., :400] for model in (target, reference)]
    loss = adaspec_loss(draft(input_ids).logits[..., :400], *logits, labels, 0.4)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
    plain_adamw(draft).step()
    torch.testing.assert_close(weights(trained), weights(draft), rtol=0, atol=5e-6)
    assert summary["loss"] == pytest.approx(loss.item(), rel=1e-5)
    tokens = int((labels[:, 1:] != -100).sum())
    assert summary["loss_tokens"] == pytest.approx(0.4 * tokens, abs=1)


@pytest.fixture
def one_batch(make_model, examples):
    """(student, batch, target, the draft's token losses by name) of eight rows."""
    target = Frozen(make_model(seed=1), 400)
    student = Student(make_model(seed=2), 400)
    batch = make_batch(examples, list(range(8)), CPU)
    hidden = student.hidden(batch)
    names = ("ce", *DIVERGENCES)
    token_losses = {
        name: student.head.token_losses(hidden, *train.token_loss(name, target, batch))
        for name in names
    }
    return student, batch, target, token_losses


def no_reference(batch):
    return torch.zeros(len(batch.index))


def step_loss(one_batch, **method):
    """(loss, tokens) of an AdaSPEC step whose reference knows all."""
    student, batch, target, _ = one_batch
    reference = SimpleNamespace(losses=no_reference)
    loss, count = adaspec_step(student, batch, target, reference, Method("adaspec", **method))
    return loss.item(), count


def test_selection_takes_top_bottom_or_any(one_batch):
    *_, losses = one_batch
    gap, kl = losses["tvd"], losses["fkl"]
    order = gap.argsort(descending=True)
    top, count = step_loss(one_batch, gap="tvd", k=0.25)
    assert abs(count - len(gap) / 4) <= 1
    assert top == pytest.approx(kl[order[:count]].sum().item(), rel=1e-5)
    bottom = step_loss(one_batch, gap="tvd", k=0.25, select="bottom")
    assert bottom == (pytest.approx(kl[order[-count:]].sum().item(), rel=1e-5), count)
    by_tvd = step_loss(one_batch, gap="tvd", k=0.25, divergence="tvd")
    assert by_tvd == (pytest.approx(gap[order[:count]].sum().item(), rel=1e-5), count)
    torch.manual_seed(0)
    draws = [step_loss(one_batch, gap="tvd", k=0.25, select="random") for _ in range(2)]
    assert draws[0] != draws[1] and {tokens for _, tokens in draws} == {count}
    assert bottom[0] < min(loss for loss, _ in draws) and max(loss for loss, _ in draws) < top


def test_controls_rank_by_loss_and_by_entropy(one_batch):
    _, batch, target, losses = one_batch
    log_p = target.head(target.hidden(batch)).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    for select, score in {"loss": losses["tvd"], "flat": entropy, "peaked": -entropy}.items():
        loss, count = step_loss(one_batch, gap="tvd", k=0.25, select=select)
        chosen = score.argsort(descending=True)[:count]
        assert loss == pytest.approx(losses["fkl"][chosen].sum().item(), rel=1e-5), select


def test_disagreement_comes_first_and_then_chance():
    logits = torch.eye(8)
    others = logits.roll(1, 0)
    others[:3] = logits[:3]
    ranks = torch.stack([disagreement(logits, others) for _ in range(2)])
    assert (ranks[:, :3] < 1).all() and (ranks[:, 3:] >= 1).all()
    assert (ranks[0] != ranks[1]).all()


def test_cross_entropy_as_gap_and_loss(one_batch):
    """Fine-tuning on selected tokens: log_softmax at the data's own tokens."""
    student, batch, target, losses = one_batch
    logits = student.head(student.hidden(batch).detach())
    by_hand = -logits.log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]
    torch.testing.assert_close(losses["ce"], by_hand.detach(), rtol=1e-5, atol=1e-6)
    loss, count = step_loss(one_batch, gap="ce", divergence="ce", k=0.25)
    assert loss == pytest.approx(by_hand.topk(count).values.sum().item(), rel=1e-5)
    loss, count = distillation_step(student, batch, target, Method("distillspec", divergence="ce"))
    assert (loss.item(), count) == (pytest.approx(by_hand.sum().item(), rel=1e-5), len(by_hand))
    loss, count = distillation_step(student, batch, target, Method("distillspec", divergence="lk"))
    assert (loss.item(), count) == (pytest.approx(losses["lk"].sum().item(), rel=1e-5), count)


def test_the_fraction_kept_changes_as_training_goes_on(make_model, examples):
    target = Frozen(make_model(seed=1), 400)
    reference = SimpleNamespace(losses=no_reference)
    fractions = []

    def step(student, batch, *inputs):
        loss, count = adaspec_step(student, batch, *inputs)
        fractions.append(count / len(batch.index))
        return loss, count

    for method in (Method("adaspec", k=0.1, k_end=0.9), Method("adaspec", k=0.2)):
        inputs = (target, reference, method)
        train_copy(make_model(seed=2), examples[:8], step, inputs, epochs=4, batch_size=8)
    assert fractions == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.2, 0.2, 0.2, 0.2], abs=0.01)


# Micro-batches, types


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_accumulation_gives_the_large_batch(make_model, examples, micro_batch):
    """Micro-batches hold different numbers of response tokens: averaging their means would be
    visibly wrong."""
    step, inputs = step_and_inputs("distillation", make_model)
    whole, _ = train_copy(make_model(), examples, step, inputs, max_steps=2)
    split, _ = train_copy(
        make_model(), examples, step, inputs, max_steps=2, micro_batch=micro_batch
    )
    torch.testing.assert_close(weights(split), weights(whole), rtol=0, atol=2e-6)


def test_micro_batches_of_all_ranks_cover_the_batch_once(monkeypatch):
    cases = [(16, 2, 4), (15, 2, 4), (9, 2, 1), (16, 8, None), (7, 3, 2), (5, 5, 1)]
    for rows, world, micro_batch in cases:
        shares = []
        for number in range(world):
            monkeypatch.setattr(train, "rank", lambda number=number: number)
            monkeypatch.setattr(train, "world_size", lambda world=world: world)
            shares.append(train.micro_batches(list(range(rows)), micro_batch))
        assert len({len(share) for share in shares}) == 1, "fewer forwards would hang the others"
        parts = [part for share in shares for part in share]
        assert sorted(row for part in parts for row in part) == list(range(rows)) and all(parts)
        assert micro_batch is None or max(map(len, parts)) <= micro_batch + 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["fine-tuning", "distillation", "adaspec"])
def test_autocast_types_follow_float32(make_model, examples, dtype, name):
    full, exact = train_copy(make_model(), examples, *step_and_inputs(name, make_model))
    stage = step_and_inputs(name, make_model, train.DTYPES[dtype])
    low, summary = train_copy(make_model(), examples, *stage, dtype=dtype)
    assert {p.dtype for p in low.parameters()} == {torch.float32}
    assert summary["loss"] == pytest.approx(exact["loss"], rel=0.05)
    assert not torch.equal(weights(low), weights(full))
    if not summary["skipped_steps"]:
        change = (weights(full) - weights(make_model())).norm()
        assert (weights(low) - weights(full)).norm() < 0.2 * change


def test_seed_decides_everything(make_model, examples):
    trained = [weights(train_copy(make_model(), examples, seed=seed)[0]) for seed in (1, 1, 2)]
    assert torch.equal(trained[0], trained[1]) and not torch.equal(trained[0], trained[2])


def test_dropout_is_the_seeds_and_the_ranks_own(make_model, examples, monkeypatch):
    """torch's generator, which dropout draws from; the order of the rows is the same on all
    ranks."""

    def rows_and_draws(seed, number):
        monkeypatch.setattr(train, "rank", lambda: number)
        monkeypatch.setattr(ranks, "rank", lambda: number)
        orders, draws = [], []

        def step(student, batch):
            orders.append(batch.rows)
            draws.append(torch.rand(()).item())
            return fine_tuning_step(student, batch)

        train_copy(make_model(), examples, step, max_steps=2, seed=seed)
        return orders, draws

    monkeypatch.setattr(train, "micro_batches", lambda rows, size: [rows])
    first, other_rank, other_seed = (rows_and_draws(*key) for key in ((0, 0), (0, 1), (5, 0)))
    assert first[0] == other_rank[0] != other_seed[0]
    assert len({str(draws) for _, draws in (first, other_rank, other_seed)}) == 3


# What is not finite, what cannot be


def summed(loss):
    """A step on loss(logits) of one token each."""

    def step(student, batch):
        hidden = student.hidden(batch)
        value = student.head.loss(hidden, lambda rows: rows, lambda rows, logits: loss(logits))
        return value, len(hidden)

    return step


def test_float16_skips_overflowing_steps_and_counts_them(make_model, examples):
    explosive = summed(lambda logits: logits.float().pow(2).sum(-1) * 1e6)
    _, summary = train_copy(make_model(), examples, explosive, dtype="float16")
    assert 0 < summary["skipped_steps"] <= summary["steps"] == 5


def nan_gradient_step(student, batch):
    hidden = student.hidden(batch)
    return (hidden - hidden.detach()).sum().sqrt(), len(hidden)


def test_float16_gives_up_where_no_step_is_finite(make_model, examples):
    with pytest.raises(train.NonFiniteError, match=r"no finite gradient in 20 steps .* step 20$"):
        train_copy(make_model(), examples, nan_gradient_step, dtype="float16", epochs=5)


def test_skipped_steps_in_a_row_start_anew_after_a_finite_one(make_model, examples):
    calls = []

    def step(student, batch):
        calls.append(1)
        return (fine_tuning_step if len(calls) % 10 == 0 else nan_gradient_step)(student, batch)

    _, summary = train_copy(make_model(), examples, step, dtype="float16", epochs=6)
    assert (summary["steps"], summary["skipped_steps"]) == (30, 27)


def test_non_finite_loss_or_gradient_names_stage_step_and_rows(make_model, examples):
    calls = []

    def poisoned(student, batch):
        calls.append(1)
        hidden = student.hidden(batch)
        return hidden.sum() * (float("nan") if len(calls) == 8 else 1.0), len(hidden)

    rows = sorted(batches(lengths(examples), 6, 0, 1)[2])
    message = r"toy: loss is not finite in step 8 \(epoch 2, rows"
    with pytest.raises(train.NonFiniteError, match=message) as error:
        train_copy(make_model(), examples, poisoned, name="toy", epochs=2)
    assert str(rows) in str(error.value)
    with pytest.raises(train.NonFiniteError, match="gradient norm is not finite in step 1"):
        train_copy(make_model(), examples, nan_gradient_step)


def test_nan_from_the_reference_is_noticed(make_model, examples):
    target = Frozen(make_model(seed=1), 400)

    def losses(batch):
        values = no_reference(batch)
        values[0] = float("nan")
        return values

    inputs = (target, SimpleNamespace(losses=losses), Method("adaspec"))
    with pytest.raises(train.NonFiniteError, match="loss is not finite"):
        train_copy(make_model(), examples, adaspec_step, inputs)


def test_ruined_weights_are_no_finished_stage(make_model, examples):
    """All of them, or some: the output head, which this step leaves alone, stays finite."""

    def step(student, batch):
        hidden = student.hidden(batch)
        return hidden.square().sum(), len(hidden)

    message = "weights are not finite after the last step"
    with pytest.raises(train.NonFiniteError, match=message):
        train_copy(make_model(), examples, step, lr=1e39, weight_decay=0.0, max_steps=1)
    with pytest.raises(train.NonFiniteError, match="weights are not finite after the last step"):
        train_copy(make_model(), examples, lr=1e38, max_steps=1)


def test_rows_that_do_not_feed_the_ranks_are_refused(make_model, examples, monkeypatch):
    with pytest.raises(ValueError, match="toy: 0 rows"):
        train_copy(make_model(), [], name="toy")
    monkeypatch.setattr(train, "world_size", lambda: 8)
    with pytest.raises(ValueError, match="30 rows in batches of 4 do not feed 8 ranks"):
        train_copy(make_model(), examples, batch_size=4)


# On-policy data


class Written:
    """Stands for distillspec.OnPolicy: responses of three tokens that tell the step."""

    def __init__(self, examples, refresh):
        self.examples = examples
        self.refresh = refresh
        self.calls = []

    def write(self, model, rows, step):
        assert not model.training
        self.calls.append((step, rows, weights(model).sum().item()))
        written = {}
        for row in rows:
            if row % 5:  # the others keep the data set's response, as in mixed data
                size = self.examples[row].prompt_length + 3
                input_ids = np.full(size, step + 7, np.int32)
                written[row] = self.examples[row]._replace(input_ids=input_ids)
        return written


def test_responses_are_written_when_their_rows_come_up(make_model, examples):
    """Every `refresh` steps those of the coming steps, from the weights of that time; steps train
    on what was written, and on the data set's responses where nothing was."""
    batches_seen = []

    def step(student, batch):
        assert student.hidden.model.training
        batches_seen.append((batch.rows, batch.labels.tolist()))
        return fine_tuning_step(student, batch)

    on_policy = Written(examples, refresh=2)
    _, summary = train_copy(make_model(), examples, step, on_policy=on_policy, max_steps=5)
    order = batches(lengths(examples), 6, 0, 0)
    assert [(step, rows) for step, rows, _ in on_policy.calls] == [
        (step, sorted(row for rows in order[step : step + 2] for row in rows)) for step in (0, 2, 4)
    ]
    assert len({total for _, _, total in on_policy.calls}) == 3
    tokens = 0
    for number, (rows, labels) in enumerate(batches_seen):
        assert rows == order[number]
        for row in rows:
            tokens += examples[row].prompt_length + 3 if row % 5 else len(examples[row].input_ids)
        expected = []
        for row in rows:
            ids, length, _ = examples[row]
            expected += [number // 2 * 2 + 7] * 3 if row % 5 else ids[length:].tolist()
        assert labels == expected
    assert summary["tokens"] == tokens, "of what was trained on"


def test_ranks_share_the_writing_out(make_model, examples, monkeypatch):
    on_policy = Written(examples, refresh=2)
    monkeypatch.setattr(train, "world_size", lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr(train, "rank", lambda number=number: number)
        train.write_coming(on_policy, make_model(), [[7, 2, 9], [4, 1]], 6)
    assert [(step, rows) for step, rows, _ in on_policy.calls] == [(6, [1, 4, 9]), (6, [2, 7])]


@pytest.fixture
def draft_writes(examples):
    """on_policy(refresh, share): the draft's own samples."""
    writer = ResponseWriter(
        ends=[0], vocab_size=400, max_new_tokens=6, max_length=128, batch_size=6
    )

    def on_policy(refresh, share=1.0, **ranks):
        return OnPolicy(writer, examples, share, refresh, seed=3, **ranks)

    return on_policy


def test_ranks_and_steps_draw_their_own_responses(make_model, examples, draft_writes):
    model = make_model()
    rows = list(range(6))
    single = draft_writes(refresh=5)
    first, second = draft_writes(5, rank=0, ranks=2), draft_writes(5, rank=1, ranks=2)

    def texts(on_policy, step):
        written = on_policy.write(model, rows, step)
        assert list(written) == rows
        return [written[row].input_ids.tolist() for row in rows]

    assert texts(first, 0) != texts(second, 0)
    assert texts(first, 5) != texts(first, 0) == texts(draft_writes(5, rank=0, ranks=2), 0)
    drawn = {str(texts(writer, step)) for writer in (first, second) for step in range(4)}
    assert len(drawn) == 8, "no rank may repeat at a step what another wrote at another"
    assert texts(single, 0) != texts(single, 1)


# Stopping and going on


def stopping_at(step):
    """A step with dropout of its own, which asks the run to stop when it is the `step`th."""
    calls = []

    def stopping_step(student, batch, *inputs):
        calls.append(1)
        if len(calls) == step:
            ranks.stop_signal = signal.SIGTERM
        hidden = F.dropout(student.hidden(batch), 0.1)
        return student.head.loss(hidden, *train.token_loss("ce", None, batch)), len(hidden)

    return stopping_step


def run(model, examples, folder=None, step=None, **settings):
    checkpoints = Checkpoints(folder, "fingerprint") if folder else None
    settings = {"epochs": 2, "checkpoints": checkpoints} | settings
    trained, summary = train_copy(model, examples, step or stopping_at(None), **settings)
    return weights(trained), summary


def stop_in(step, make_model, examples, folder, **settings):
    with pytest.raises(ranks.Stopped, match="SIGTERM"):
        run(make_model(), examples, folder, stopping_at(step), **settings)
    ranks.stop_signal = None


def saved_steps(folder):
    return [int(path.name.split("-")[0]) for path in sorted(folder.glob("*.pt"))]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_stopped_training_goes_on_to_the_same_bits(make_model, examples, tmp_path, dtype, capsys):
    """Weights, moments, loss scale and the generator of dropout: twice stopped and never stopped
    are bit for bit the same."""
    expected, undisturbed = run(make_model(), examples, dtype=dtype)
    assert undisturbed["steps"] == 10
    stop_in(3, make_model, examples, tmp_path, dtype=dtype)
    stop_in(4, make_model, examples, tmp_path, dtype=dtype)
    assert saved_steps(tmp_path) == [3, 7]
    trained, summary = run(make_model(seed=9), examples, tmp_path, dtype=dtype, name="toy")
    assert torch.equal(trained, expected)
    assert summary | {"seconds": 0} == undisturbed | {"seconds": 0}
    assert "  toy: going on after step 7\n" in capsys.readouterr().out


@pytest.mark.parametrize(("refresh", "share"), [(3, 1.0), (1000, 0.5)])
def test_on_policy_training_stops_at_once_and_goes_on_to_the_same_bits(
    make_model, examples, draft_writes, tmp_path, refresh, share
):
    """What the draft has written is part of the state: nothing waits until it writes anew."""
    expected, undisturbed = run(
        make_model(), examples, on_policy=draft_writes(refresh, share), name="toy"
    )
    assert not torch.equal(run(make_model(), examples)[0], expected)
    stop_in(4, make_model, examples, tmp_path, on_policy=draft_writes(refresh, share))
    assert saved_steps(tmp_path) == [4]
    stop_in(2, make_model, examples, tmp_path, on_policy=draft_writes(refresh, share))
    assert saved_steps(tmp_path) == [4, 6]
    on_policy = draft_writes(refresh, share)
    steps = []
    write = on_policy.write
    on_policy.write = lambda model, rows, step: steps.append(step) or write(model, rows, step)
    trained, summary = run(make_model(seed=9), examples, tmp_path, on_policy=on_policy)
    assert torch.equal(trained, expected)
    assert summary | {"seconds": 0} == undisturbed | {"seconds": 0}
    assert steps == ([6, 9] if refresh == 3 else [])


def test_saves_by_the_clock_and_keeps_two_generations(make_model, examples, tmp_path):
    run(make_model(), examples, tmp_path, save_minutes=0)
    assert saved_steps(tmp_path) == [8, 9]
    assert len(list(tmp_path.iterdir())) == 4, "each with its checksum, and nothing else"
    run(make_model(), examples, tmp_path / "rarely", save_minutes=10)
    assert not list(tmp_path.glob("rarely/*"))


def test_the_clock_starts_anew_with_each_save(make_model, examples, tmp_path, monkeypatch):
    """Steps of 25 seconds, saved every minute: after every third step."""
    steps = []
    monkeypatch.setattr(train.time, "monotonic", lambda: 25.0 * len(steps))

    def step(student, batch):
        steps.append(1)
        return fine_tuning_step(student, batch)

    saved = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, state: saved.append(step))
    run(make_model(), examples, tmp_path, step, save_minutes=1)
    assert saved == [3, 6, 9]


def test_the_loss_scale_goes_on_too(make_model, examples, tmp_path):
    """A scale that began anew would skip steps once more."""
    explosive = summed(lambda logits: 10 * logits.float().pow(2).sum(-1))
    steps = []

    def step(student, batch):
        steps.append(1)
        if len(steps) == 10 + 7:  # the undisturbed run has ten
            ranks.stop_signal = signal.SIGTERM
        return explosive(student, batch)

    expected, undisturbed = run(make_model(), examples, None, step, dtype="float16")
    with pytest.raises(ranks.Stopped):
        run(make_model(), examples, tmp_path, step, dtype="float16")
    ranks.stop_signal = None
    trained, summary = run(make_model(), examples, tmp_path, step, dtype="float16")
    assert 2 < undisturbed["skipped_steps"] == summary["skipped_steps"] < 7
    assert torch.equal(trained, expected)


def test_a_stop_in_the_last_step_ends_the_stage(make_model, examples, tmp_path):
    """What is left of it is to save its model, which is sooner done than to train anew."""
    _, summary = run(make_model(), examples, tmp_path, stopping_at(10))
    assert summary["steps"] == 10 and not list(tmp_path.iterdir())


def test_stopping_without_checkpoints_saves_nothing(make_model, examples):
    with pytest.raises(ranks.Stopped, match="SIGTERM"):
        run(make_model(), examples, None, stopping_at(2))


@pytest.mark.parametrize("damage", [truncate, flip, drop_checksum])
def test_damaged_checkpoint_is_named_and_the_one_before_used(
    make_model, examples, tmp_path, damage, capsys
):
    expected, _ = run(make_model(), examples)
    stop_in(3, make_model, examples, tmp_path)
    stop_in(4, make_model, examples, tmp_path)
    (newest,) = tmp_path.glob("000000007*.pt")
    damage(newest)
    stop_in(1, make_model, examples, tmp_path)
    printed = capsys.readouterr().out
    assert f"{newest.name} is damaged" in printed and "going on after step 3" in printed
    assert saved_steps(tmp_path) == [3, 4]
    trained, _ = run(make_model(), examples, tmp_path)
    assert torch.equal(trained, expected)


def test_two_damaged_generations_do_not_cost_the_state_that_a_signal_saves(
    make_model, examples, tmp_path
):
    """They have the highest numbers, and used to push out what was saved after them."""
    expected, _ = run(make_model(), examples)
    checkpoints = Checkpoints(tmp_path, "fingerprint")
    for step in (61, 62):
        checkpoints.save(step, {})
    for path in tmp_path.glob("*.pt"):
        truncate(path)
    stop_in(3, make_model, examples, tmp_path)
    assert saved_steps(tmp_path) == [3]
    stop_in(2, make_model, examples, tmp_path)
    assert saved_steps(tmp_path) == [3, 5]
    trained, _ = run(make_model(), examples, tmp_path)
    assert torch.equal(trained, expected)


def test_full_disk_leaves_the_checkpoint_before(make_model, examples, tmp_path):
    """RLIMIT_FSIZE makes writes fail half way through, as a full disk does."""
    stop_in(3, make_model, examples, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*000000004-.*\.partial.*MiB free"):
            run(make_model(), examples, tmp_path, save_minutes=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved_steps(tmp_path) == [3] and len(list(tmp_path.iterdir())) == 2
    trained, _ = run(make_model(), examples, tmp_path)
    assert torch.equal(trained, run(make_model(), examples)[0])
