"""Stages: what a fingerprint hangs on, the target's rows counted as they are run, and responses of
the target that survive a stop."""

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import models
import ranks
import stages
from cells import base_models, draft_plan, prepare_cell, reference_method
from data import digest
from settings import Method, Pair, Settings
from stages import fit
from storage import HISTORY, Model, read_json
from tests.damage import truncate
from train import adaspec_step, distillation_step

ROWS = 24
CPU = torch.device("cpu")


@pytest.fixture
def make_cell(make_model, tokenizer, tmp_path):
    """make_cell(**settings): a cell of two random models, an epoch of each stage."""
    paths = [str(tmp_path / name) for name in ("target-model", "draft-model")]
    for seed, path in enumerate(paths):
        make_model(seed=seed, num_hidden_layers=1, initializer_range=0.5).save_pretrained(path)
        tokenizer.save_pretrained(path)

    def make(**settings):
        flags = {
            "limit": ROWS, "max_length": 128, "max_new_tokens": 6, "eval_prompts": 2, "batch": 8,
            "eval_batch": 2, "epochs": (0, 1, 2), "dtype": "float32", "validation_rows": 0,
            "out": str(tmp_path / "out"),
        }  # fmt: skip
        settings = replace(Settings(), **flags | settings)
        return prepare_cell("toy", "arithmetic", 0, settings, CPU, {"toy": Pair(*paths)})

    return make


@pytest.fixture
def target_rows(monkeypatch, tmp_path):
    """The rows of each forward of the target over a batch of training rows."""
    rows = []

    def note(module, args, kwargs):
        input_ids = kwargs.get("input_ids")
        if kwargs.get("use_cache") is False and input_ids.shape[1] > 8:  # Head.check's are 8 long
            rows.append(len(input_ids))

    def load_model(path, dtype, device):
        model = models.load_model(path, dtype, device)
        if path == str(tmp_path / "target-model"):
            model.base_model.register_forward_pre_hook(note, with_kwargs=True)
        return model

    monkeypatch.setattr(stages, "load_model", load_model)
    return rows


def train_draft(cell, method):
    """A draft's stages, as run_cell has them, and what they cost."""
    target, draft = base_models(cell)
    plan = draft_plan(cell, method, draft, target)
    trained = []
    step, frozen = distillation_step, [target]
    if method.name == "adaspec":
        uniform = draft_plan(cell, reference_method(cell, method), draft, target)
        trained.append(fit(cell, uniform, distillation_step, target))
        step, frozen = adaspec_step, [target, trained[0]]
    trained.append(fit(cell, plan, step, *frozen))
    return trained, stages.training_cost(cell, trained)


# The target's rows


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, ROWS),  # the cache is filled once, for both stages
        ({"cache_gb": 0}, 3 * ROWS),
        ({"cache_gb": 0, "micro_batch": 3}, 3 * ROWS),
        ({"cache_gb": 2e-5}, 3 * ROWS + ROWS),  # room for the reference's alone: a pass of its own
    ],
)
def test_target_forwards_are_as_many_as_are_run(make_cell, target_rows, settings, rows):
    """Once a row and step, for gap, reference and loss, where no cache holds them."""
    _, cost = train_draft(make_cell(**settings), Method("adaspec"))
    assert cost["target_forwards"] == sum(target_rows) == rows
    assert cost["epochs"] == 3 and cost["rows"] == 3 * ROWS and cost["steps"] == 9
    _, again = train_draft(make_cell(cache_gb=0), Method("adaspec"))
    assert again == cost or "micro_batch" in settings, "it is of the training, not of today's flags"


def test_on_policy_forwards_are_as_many_as_are_run(make_cell, target_rows):
    """The reference's are cached: its rows are the data set's."""
    _, cost = train_draft(make_cell(), Method("adaspec", data="mixed", refresh=2))
    assert cost["target_forwards"] == sum(target_rows) == ROWS + 2 * ROWS


def test_a_cache_for_each_data_set_is_counted_once(make_cell, target_rows):
    methods = [
        Method("distillspec"),
        Method("distillspec", data="target"),
        Method("adaspec"),
        Method("adaspec", data="target"),
    ]
    drafts = [train_draft(make_cell(), method) for method in methods]
    counts = [cost["target_forwards"] for _, cost in drafts]
    assert counts == [ROWS, 2 * ROWS, ROWS, 2 * ROWS], "a pass, and the target's own text"
    assert sum(target_rows) == 2 * ROWS
    forwards = {}
    for trained, _ in drafts:
        for stage in trained:
            forwards |= read_json(Path(stage.path, "stage.json"))["summary"]["target_forwards"]
    assert len(forwards) == 3 and sum(forwards.values()) == 3 * ROWS


def test_seconds_of_filling_a_cache_count_once_a_draft(make_cell, target_rows):
    """A later stage that reads it says as many, those of a reference's are added, and a cache that
    is there already takes none."""
    (reference, draft), cost = train_draft(make_cell(), Method("adaspec"))
    first, second = (
        read_json(Path(stage.path, "stage.json"))["summary"]["cache_seconds"]
        for stage in (reference, draft)
    )
    assert len(first) == 1 and len(second) == 2 and first.items() <= second.items()
    assert cost["cache_seconds"] == sum(second.values())
    (folder,) = Path(make_cell().cache_folder).glob("target")
    (record,) = folder.glob("*.json")
    seconds = read_json(record)["seconds"]
    train_draft(make_cell(), Method("distillspec", epochs=2))
    assert read_json(record)["seconds"] == seconds > 0


def test_no_target_is_run_where_no_loss_asks_for_one(make_cell, target_rows):
    _, cost = train_draft(make_cell(), Method("distillspec", divergence="ce"))
    assert cost["target_forwards"] == sum(target_rows) == 0
    _, cost = train_draft(make_cell(), Method("adaspec", divergence="ce", gap="ce", reference="ce"))
    assert cost["target_forwards"] == sum(target_rows) == 0
    _, cost = train_draft(make_cell(), Method("adaspec", divergence="ce", gap="tvd"))
    assert cost["target_forwards"] == sum(target_rows) == ROWS


# The record


def test_the_record_is_in_the_stages_folder_and_its_end_is_said(make_cell, target_rows, capsys):
    """What AdaSPEC's loss is over, and what can be compared; damage to it costs no stage."""
    cell = make_cell(validation_rows=4, micro_batch=3)
    trained, cost = train_draft(cell, Method("adaspec"))
    _, distilled, *_, drafted = capsys.readouterr().out.splitlines()
    records = {}
    for stage in trained:
        folder = Path(stage.path)
        lines = [json.loads(line) for line in (folder / HISTORY).read_text().splitlines()]
        records[folder.name] = lines
        assert [line["step"] for line in lines] == list(range(len(lines)))
        assert not folder.with_name(folder.name + ".checkpoints").exists()
        (folder / HISTORY).write_text("damage")
    alphas = {name: lines[-1]["alpha"] for name, lines in records.items()}
    alpha = alphas["distilled-1-epochs"]
    words = r"  distilled-1-epochs: 3 steps, last loss \S+, "
    assert re.match(words + f"alpha {alpha:.3f} on 4 validation rows, ", distilled)
    words = r"  adaspec: 6 steps, last loss \S+ \(over the 4\d% of tokens selected\), "
    assert re.match(words + f"alpha {alphas['adaspec']:.3f} on 4 validation rows, ", drafted)
    assert sum(target_rows) == cost["target_forwards"] + 2 * 4, "watching is no training"
    assert records["adaspec"][0]["alpha"] == records["distilled-1-epochs"][0]["alpha"]
    train_draft(cell, Method("adaspec"))
    printed = capsys.readouterr().out
    assert printed.count("done before") == 2 and "damaged" not in printed


def test_watching_changes_no_stage(make_cell, tmp_path):
    weights = []
    for rows in (0, 4):
        cell = make_cell(validation_rows=rows, max_steps=2, out=str(tmp_path / f"out-{rows}"))
        trained, cost = train_draft(cell, Method("adaspec", data="mixed", refresh=2))
        content = Path(trained[1].path, "model.safetensors").read_bytes()
        weights.append((trained[1].fingerprint, content, cost["target_forwards"]))
    assert weights[0] == weights[1]


def test_no_loss_asks_for_a_target_and_none_is_loaded_to_watch_alpha(make_cell, target_rows):
    trained, _ = train_draft(make_cell(validation_rows=4), Method("distillspec", divergence="ce"))
    assert "alpha" not in Path(trained[0].path, HISTORY).read_text() and not target_rows


# Caches and fingerprints


def test_a_cache_that_does_not_fit_is_none(make_cell, monkeypatch, capsys):
    cell = make_cell()
    Usage = type(stages.shutil.disk_usage("/"))

    def cache(**settings):
        cell = make_cell(**settings)
        return stages.token_cache(cell, "target", "models", cell.examples, 32, torch.float32)

    filled = cache()
    size = filled.bytes
    assert cache(cache_gb=(size + 1) / 2**30) and not cache(cache_gb=(size - 1) / 2**30)
    assert capsys.readouterr().out.endswith("GiB, too large: computed anew in every step\n")
    monkeypatch.setattr(stages.shutil, "disk_usage", lambda path: Usage(0, 0, size - 1))
    assert not cache()
    filled.fill(lambda batch: torch.zeros(len(batch.index), 32), CPU, "toy")
    monkeypatch.setattr(stages.shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    assert cache(), "what is there already takes no more room"
    others = [
        stages.token_cache(cell, "target", "other", cell.examples, 32, torch.float32),
        stages.token_cache(cell, "target", "models", cell.examples[1:], 32, torch.float32),
        cache(dtype="bfloat16"),
        cache(batch=4),
    ]
    assert others == [None] * 4, "but this is another"


def stage_fingerprint(cell, method, start="draft", target="target", reference="reference"):
    models = [Model(name, name) for name in (start, target, reference)]
    plan = draft_plan(cell, method, models[0], models[1])
    settings = stages.stage_settings(cell, plan, models[1], models[2])
    return stages.fingerprint(settings)


def test_a_stages_fingerprint_is_of_all_that_its_result_hangs_on(make_cell, monkeypatch):
    method = Method("adaspec")
    mixed = Method("adaspec", data="mixed")
    cell = make_cell()

    def changed(**settings):
        return replace(cell, settings=replace(cell.settings, **settings))

    usual = stage_fingerprint(cell, method)
    changes = [
        {"divergence": "tvd"}, {"k": 0.3}, {"k_end": 0.8}, {"gap": "tvd"}, {"select": "bottom"},
        {"match": "tokens"}, {"data": "on-policy"}, {"data": "mixed"}, {"batch": 4}, {"lr": 1e-2},
        {"decay": "linear"}, {"epochs": 9},
    ]  # fmt: skip
    others = [stage_fingerprint(cell, replace(method, **change)) for change in changes]
    others += [
        stage_fingerprint(cell, replace(mixed, share=0.25)),
        stage_fingerprint(cell, replace(mixed, refresh=7)),
        stage_fingerprint(changed(max_new_tokens=9), mixed),
        stage_fingerprint(changed(max_length=100), mixed),
        stage_fingerprint(changed(eval_batch=3), mixed),
        stage_fingerprint(changed(max_steps=2), method),
        stage_fingerprint(changed(dtype="bfloat16"), method),
        stage_fingerprint(changed(micro_batch=2), method),
        stage_fingerprint(replace(cell, seed=1), method),
        stage_fingerprint(replace(cell, examples=cell.examples[1:]), method),
        stage_fingerprint(cell, method, start="other"),
        stage_fingerprint(cell, method, target="other"),
        stage_fingerprint(cell, method, reference="other"),
    ]
    for setting in (
        {"cache_gb": 0},
        {"save_minutes": 1.0},
        {"gamma": 3},
        {"eval_batch": 9},
        {"log_dir": "x"},
    ):
        assert stage_fingerprint(changed(**setting), method) == usual, setting
    monkeypatch.setattr(stages, "TRAINING_VERSION", stages.TRAINING_VERSION + 1)
    others.append(stage_fingerprint(cell, method))
    assert len({usual, *others}) == 1 + len(others)


@pytest.mark.parametrize("data", ["on-policy", "ground-truth"])
def test_ranks_are_part_of_what_they_change(make_cell, monkeypatch, data):
    """Drafts that write each their share are another training with each number of ranks; and so
    is the filter over micro-batches, but not the filter over whole batches."""
    cell = make_cell()
    micro = replace(cell, settings=replace(cell.settings, micro_batch=2))
    method = Method("adaspec", data=data)
    fingerprints = [stage_fingerprint(cell, method), stage_fingerprint(micro, method)]
    monkeypatch.setattr(stages, "world_size", lambda: 2)
    doubled = [stage_fingerprint(cell, method), stage_fingerprint(micro, method)]
    assert (fingerprints[0] == doubled[0]) == (data == "ground-truth")
    assert fingerprints[1] != doubled[1]


def test_code_of_another_version_trains_anew(make_cell, monkeypatch, capsys):
    train_draft(make_cell(), Method("distillspec"))
    train_draft(make_cell(), Method("distillspec"))
    assert "  distilled-2-epochs: done before\n" in capsys.readouterr().out
    monkeypatch.setattr(stages, "TRAINING_VERSION", stages.TRAINING_VERSION + 1)
    train_draft(make_cell(), Method("distillspec"))
    assert "done before" not in capsys.readouterr().out


# Responses that the target writes


def test_what_the_target_has_written_is_kept_and_gone_on_with(make_cell, monkeypatch, tmp_path):
    """A signal ends the writing after the block at hand; damage costs a block; and the end is as
    if nothing had been."""
    cell = make_cell()
    target, draft = base_models(cell)
    whole = stages.written_by_target(
        make_cell(out=str(tmp_path / "undisturbed")), target, draft, cell.examples
    )
    blocks = []
    write = stages.ResponseWriter.write

    def stopping_write(writer, model, examples, *seed_and_temperature):
        blocks.append(len(examples))
        if len(blocks) == 2:
            ranks.stop_signal = signal.SIGTERM
        return write(writer, model, examples, *seed_and_temperature)

    monkeypatch.setattr(stages.ResponseWriter, "write", stopping_write)
    with pytest.raises(ranks.Stopped, match="SIGTERM"):
        stages.written_by_target(cell, target, draft, cell.examples)
    ranks.stop_signal = None
    files = sorted(path.name for path in Path(cell.settings.out).glob("written/*.tokens"))
    assert blocks == [8, 8] and [name[-12:] for name in files] == ["00000.tokens", "00001.tokens"]
    truncate(Path(cell.settings.out, "written", files[0]))
    for _ in range(2):
        written = stages.written_by_target(cell, target, draft, cell.examples)
        assert blocks == [8, 8, 8, 8] and digest(written) == digest(whole)
    for given, example in zip(cell.examples, written, strict=True):
        length = given.prompt_length
        assert example.prompt_length == length
        assert (example.input_ids[:length] == given.input_ids[:length]).all()
        assert length < len(example.input_ids) <= length + 6
    other = stages.written_by_target(make_cell(max_new_tokens=5), target, draft, cell.examples)
    assert len(blocks) == 7 and digest(other) != digest(whole)


def test_rows_take_the_temperatures_in_turn(make_cell):
    """Half of the rows are written greedily, and come out alike whatever the seed."""
    cell = make_cell(write_temperature=(0.0, 1.0))
    blocks = stages.response_blocks(cell.examples, (0.0, 1.0), 8)
    rows = {0.0: [], 1.0: []}
    for temperature, block in blocks:
        rows[temperature] += block
        lengths = [cell.examples[row].prompt_length for row in block]
        assert len(block) <= 8 and lengths == sorted(lengths)
    assert sorted(rows[0.0]) == list(range(0, 24, 2)) and len(rows[1.0]) == 12
    mixed, greedy = (
        stages.written_by_target(cell, *base_models(cell), cell.examples)
        for cell in (cell, make_cell(write_temperature=(0.0,)))
    )
    same = [digest([a]) == digest([b]) for a, b in zip(mixed, greedy, strict=True)]
    assert all(same[::2]) and not any(same[1::2])


def test_the_target_may_write_with_the_drafts_help(make_cell, monkeypatch):
    """Greedily the draft changes nothing; its help is another set of responses."""
    models = []
    write = stages.ResponseWriter.write

    def noting_write(writer, model, examples, seed, temperature, draft):
        models.append(draft)
        return write(writer, model, examples, seed, temperature, draft)

    monkeypatch.setattr(stages.ResponseWriter, "write", noting_write)
    responses = []
    for helped in (False, True):
        cell = make_cell(write_temperature=(0.0,), write_with_draft=helped)
        responses.append(stages.written_by_target(cell, *base_models(cell), cell.examples))
    assert digest(responses[0]) == digest(responses[1])
    assert [draft is None for draft in models] == [True] * 3 + [False] * 6, "smaller batches"
