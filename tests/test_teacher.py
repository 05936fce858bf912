"""Frozen models and their caches: nothing approximated, nothing computed twice, damage noticed."""

import copy
import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ranks
import train
from adaspec import token_kl
from data import make_batch, write_examples
from history import History, Validation
from settings import Method
from storage import read_json
from teacher import BATCHES_A_BLOCK, Frozen, ReferenceLoss, TokenCache
from tests.damage import DAMAGES
from tests.launch import run_on_ranks
from train import adaspec_step, distillation_step

CPU = torch.device("cpu")


def batch_of(examples, *rows, device=CPU):
    return make_batch(examples, list(rows), device)


def rows_seen(model):
    """A list to which the model's trunk adds the number of rows of each of its forwards."""
    seen = []

    def note(module, args, kwargs):
        seen.append(len(kwargs["input_ids"]))

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


# Without a cache


def test_a_frozen_model_is_run_once_a_batch(make_model, examples):
    model = make_model("phi", resid_pdrop=0.5).train()
    frozen = Frozen(model, 400)
    expected = model.base_model(batch_of(examples, 1).input_ids)[0][0, batch_of(examples, 1).index]
    seen = rows_seen(model)
    first, second = batch_of(examples, 1), batch_of(examples, 2, 3)
    hidden = frozen.hidden(first)
    assert torch.equal(hidden, expected) and not hidden.requires_grad
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert frozen.hidden(first) is hidden
    assert len(frozen.hidden(second)) == len(second.index) and seen == [1, 2]
    assert torch.equal(frozen.hidden(batch_of(examples, 1)), hidden) and seen == [1, 2, 1]


def test_a_frozen_model_keeps_its_own_type(make_model, examples):
    """Its weights have the training's type already, and autocast would round once more."""
    frozen = Frozen(make_model(), 400)
    batch = batch_of(examples, 0, 1)
    expected = frozen.hidden(batch)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = frozen.hidden(batch_of(examples, 0, 1))
    assert torch.equal(hidden, expected)


def test_heads_that_change_logits_are_refused(make_model):
    model = make_model()
    forward = model.forward

    def softcapped(**inputs):
        output = forward(**inputs)
        output.logits = torch.tanh(output.logits)
        return output

    model.forward = softcapped
    with pytest.raises(ValueError, match="changes its logits"):
        Frozen(model, 400)


@pytest.mark.parametrize("name", ["fkl", "tvd", "ce"])
def test_the_references_loss_is_by_its_own_logits(make_model, examples, name):
    target, reference = make_model(seed=1), make_model(seed=2)
    batch = batch_of(examples, 4, 5, 6)
    logits = [
        model(batch.input_ids).logits.flatten(0, 1)[batch.index, :400]
        for model in (target, reference)
    ]
    expected = {
        "fkl": token_kl(*logits),
        "tvd": (logits[0].softmax(-1) - logits[1].softmax(-1)).abs().sum(-1) / 2,
        "ce": torch.nn.functional.cross_entropy(logits[1], batch.labels, reduction="none"),
    }[name]
    frozen = Frozen(target, 400)
    seen = rows_seen(target)
    losses = ReferenceLoss(Frozen(reference, 400), frozen, name).losses(batch)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-4, atol=1e-6)
    assert seen == ([] if name == "ce" else [3])


def test_a_step_runs_the_target_once(make_model, examples):
    """For gap, reference and loss together, in every micro-batch."""
    models = make_model(seed=1), make_model(seed=2)
    target, reference = (Frozen(model, 400) for model in models)
    inputs = target, ReferenceLoss(reference, target, "fkl"), Method("adaspec", gap="tvd")
    seen, reference_seen = map(rows_seen, models)
    settings = {"vocab_size": 400, "lr": 1e-3, "epochs": 2, "batch_size": 12, "micro_batch": 5}
    summary = train.train(make_model(), examples[:24], adaspec_step, inputs, **settings)
    assert seen == reference_seen == [4] * 12
    assert sum(seen) == summary["rows"] == 48


# The cache


def small_cache(folder, examples, fingerprint="fingerprint"):
    """Three numbers a token, blocks of eight forwards of three rows."""
    return TokenCache(folder, fingerprint, examples, 3, torch.float32, rows_at_once=3)


def token_values(rows, stop_after=None):
    """Values that tell example, position and token. Adds the examples asked for to `rows`; asks the
    run to stop when there are so many."""

    def compute(batch):
        rows.extend(batch.rows)
        if len(rows) == stop_after:
            ranks.stop_signal = signal.SIGINT
        length = batch.input_ids.shape[1]
        numbers = torch.tensor(batch.rows)[batch.index // length]
        return torch.stack([numbers, batch.index % length, batch.labels], -1).float()

    return compute


def check_content(cache, examples):
    for row in range(len(examples)):
        batch = batch_of(examples, row)
        assert torch.equal(cache.read(batch), token_values([])(batch)), row


def test_a_cache_gives_each_token_its_values(examples, tmp_path):
    cache = small_cache(tmp_path, examples)
    rows = []
    cache.fill(token_values(rows), CPU, "toy")
    assert sorted(rows) == list(range(60)), "an example was run twice or never"
    lengths = [len(examples[row].input_ids) for row in rows]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) == 13
    check_content(cache, examples)
    batch = batch_of(examples, 59, 3, 0)
    parts = [cache.read(batch_of(examples, row)) for row in (59, 3, 0)]
    assert torch.equal(cache.read(batch), torch.cat(parts)) and len(cache.read(batch)) == len(
        batch.index
    )
    files = sorted(path.name for path in tmp_path.glob("*.bin*"))
    blocks = [f"fingerprint-{number:05d}.bin" for number in range(3)]
    assert files == sorted(blocks + [f"{name}.sha256" for name in blocks])
    assert cache.bytes == sum((tmp_path / name).stat().st_size for name in blocks)
    tokens = sum(len(example.input_ids) - example.prompt_length for example in examples)
    assert cache.bytes == tokens * 3 * 4


def test_rows_that_are_all_response_lack_a_predictor_for_their_first_token(examples, tmp_path):
    whole = [example._replace(prompt_length=0) for example in examples[:7]]
    cache = small_cache(tmp_path, whole)
    cache.fill(token_values([]), CPU, "toy")
    check_content(cache, whole)


def test_a_cache_is_filled_once(examples, tmp_path):
    def rows_computed(fingerprint):
        rows = []
        cache = small_cache(tmp_path, examples, fingerprint)
        cache.fill(token_values(rows), CPU, "toy")
        check_content(cache, examples)
        return len(rows)

    assert [rows_computed(name) for name in ("a", "a", "b", "a", "b")] == [60, 0, 60, 0, 0]


def test_a_stopped_cache_goes_on_with_the_next_block(examples, tmp_path):
    whole, stopped = (small_cache(tmp_path / name, examples) for name in ("whole", "stopped"))
    whole.fill(token_values([]), CPU, "toy")
    rows = []
    with pytest.raises(ranks.Stopped, match="SIGINT"):
        stopped.fill(token_values(rows, stop_after=12), CPU, "toy")
    assert len(rows) == 3 * BATCHES_A_BLOCK, "the block is finished, and no other begun"
    seconds = read_json(stopped.record)["seconds"]
    ranks.stop_signal = None
    (stopped.folder / "fingerprint-00007.bin.partial").touch()  # as a kill leaves it
    small_cache(tmp_path / "stopped", examples).fill(token_values(rows), CPU, "toy")
    assert sorted(rows) == list(range(60)), "an example was run twice or never"
    for path in whole.folder.glob("*.bin*"):
        assert path.read_bytes() == (stopped.folder / path.name).read_bytes()
    assert len(list(stopped.folder.glob("*.bin*"))) == 6
    assert read_json(stopped.record)["seconds"] > seconds > 0, "those of both runs"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_block_is_named_and_made_anew(examples, tmp_path, capsys, damage):
    small_cache(tmp_path, examples).fill(token_values([]), CPU, "toy")
    path = tmp_path / "fingerprint-00001.bin"
    content = path.read_bytes()
    damage(path)
    rows = []
    cache = small_cache(tmp_path, examples)
    cache.fill(token_values(rows), CPU, "toy")
    assert f"{path.name} is damaged" in capsys.readouterr().out
    assert sorted(rows) == sorted(cache.blocks[1]) and path.read_bytes() == content
    check_content(cache, examples)


def test_a_full_disk_says_so(examples, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*-00000\.bin\.partial.*MiB free"):
            small_cache(tmp_path, examples).fill(token_values([]), CPU, "toy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cache_is_the_target_bit_for_bit_on_equal_batches(make_model, examples, tmp_path, dtype):
    model = make_model().to(train.DTYPES[dtype])
    frozen = Frozen(model, 400)
    order = sorted(range(60), key=lambda row: -len(examples[row].input_ids))
    rows = [order[start : start + 8] for start in range(0, 60, 8)]
    batches = [batch_of(examples, *part, device=model.device) for part in rows]
    expected = [frozen.hidden(batch) for batch in batches]
    cache = TokenCache(tmp_path, "fingerprint", examples, 32, train.DTYPES[dtype], 8)
    seen = rows_seen(model)
    frozen.use(cache, "target")
    assert sum(seen) == 60 and frozen.model is None and frozen.last_hidden is None
    for batch, values in zip(batches, expected, strict=True):
        assert torch.equal(frozen.hidden(batch), values)
    assert sum(seen) == 60
    assert frozen.head(frozen.hidden(batches[0])).shape == (len(batches[0].index), 400)


@pytest.mark.parametrize("architecture", ["neox", "llama", "phi", "codegen"])
def test_caches_change_nothing(make_model, examples, tmp_path, architecture, tolerance=1e-5):
    """Stage 2 from both caches: the loss of every step within 1e-5 of computing them anew."""
    losses = {False: [], True: []}
    for cached in losses:
        models = [make_model(architecture, seed=seed) for seed in (1, 2)]
        target, reference = (Frozen(model, 400) for model in models)
        reference_loss = ReferenceLoss(reference, target, "fkl")
        if cached:
            hidden = TokenCache(tmp_path / "target", "a", examples[:24], 32, torch.float32, 7)
            target.use(hidden, "target")
            kl = TokenCache(tmp_path / "reference", "b", examples[:24], 1, torch.float32, 5)
            seen = rows_seen(models[1])
            reference_loss.use(kl, models[1].device, "reference")

        def step(*inputs, step_losses=losses[cached]):
            loss, count = adaspec_step(*inputs)
            step_losses.append(loss.item() / count)
            return loss, count

        settings = {"vocab_size": 400, "lr": 1e-3, "epochs": 2, "batch_size": 8}
        inputs = target, reference_loss, Method("adaspec")
        train.train(make_model(architecture, seed=3), examples[:24], step, inputs, **settings)
    assert len(losses[True]) == 6 and sum(seen) == 24
    assert losses[True] == pytest.approx(losses[False], rel=tolerance)


# Two ranks

ROOT = Path(train.__file__).parent


def flat(weights):
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.slow
def test_two_ranks(make_model, examples, tmp_path, count=2, tolerance=1e-5, device="cpu"):
    """One cache for all, with the target whole and with its layers spread over them; training to
    the weights of one process; and a signal to one of them stops all."""
    examples = examples[:21]
    write_examples(tmp_path / "examples", examples)
    models = {
        "target": make_model(seed=1, num_hidden_layers=6),
        "reference": make_model(seed=2),
        "draft": make_model(seed=3),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    run_on_ranks("tests/two_ranks.py", tmp_path, count=count, device=device)
    results = {path.stem: load_file(path) for path in tmp_path.glob("*.safetensors")}

    target = Frozen(models["target"], 400)
    device = models["target"].device
    batches = [batch_of(examples, row, device=device) for row in range(21)]
    values = torch.cat([target.hidden(batch) for batch in batches]).cpu()
    whole, sharded = results["whole"]["values"], results["sharded-21"]["values"]
    torch.testing.assert_close(whole, values, rtol=tolerance, atol=tolerance)
    assert torch.equal(sharded, whole)
    first_rows = results["sharded-13"]["values"]
    assert torch.equal(first_rows, whole[: len(first_rows)])
    blocks = sorted(path.name for path in (tmp_path / "whole").glob("*.bin"))
    assert blocks == [f"whole-{number:05d}.bin" for number in range(3)]

    reference = ReferenceLoss(Frozen(models["reference"], 400), target, "fkl")
    settings = {"vocab_size": 400, "lr": 1e-3, "epochs": 2, "batch_size": 7}
    steps = {
        "adaspec": (adaspec_step, (target, reference, Method("adaspec"))),
        "distilled": (distillation_step, (target, Method("distillspec"))),
    }
    summaries, histories = {}, {}
    for name, (step, inputs) in steps.items():
        draft = copy.deepcopy(models["draft"])
        validation = Validation(examples[:5], rows_at_once=5)
        validation.ask(target)
        histories[name] = History(validation=validation)
        summaries[name] = train.train(
            draft, examples, step, inputs, history=histories[name], **settings
        )
        weights, expected = flat(results[name]), flat(draft.state_dict()).cpu()
        # not weight by weight: Adam's first steps are +-lr for a gradient that is but rounding
        assert (weights - expected).norm() < tolerance * expected.norm(), name
    for key, value in results["summary"].items():
        assert value.item() == pytest.approx(summaries["adaspec"][key], rel=10 * tolerance), key
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    for line, expected in zip(lines, histories["adaspec"].lines, strict=True):
        for key in expected.keys() - {"seconds", "tokens_per_second"}:
            assert line[key] == pytest.approx(expected[key], rel=10 * tolerance), key
