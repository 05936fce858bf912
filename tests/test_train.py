"""The loop: its gradient is the whole batch's, however it is split; what is not finite stops it; autocast types work."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import train
from adaspec import adaspec_loss, token_kl
from data import batches, collate
from distillspec import DIVERGENCES
from run_all import cross_entropy, distillation, selective_distillation, target_logits

ROOT = Path(train.__file__).parent


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(model, examples, objective=cross_entropy, **settings):
    model = copy.deepcopy(model)
    settings = {"vocab_size": 400, "lr": 1e-3, "epochs": 1, "batch_size": 12} | settings
    return model, train.train(model, examples, objective, **settings)


ARCHITECTURES = pytest.mark.parametrize("architecture", ["neox", "llama", "phi", "codegen"])
CPU = torch.device("cpu")


@ARCHITECTURES
def test_trunk_and_head_give_the_models_own_logits(make_model, examples, architecture):
    model = make_model(architecture)
    input_ids, labels = collate(examples[:5])
    batch = train.make_batch(examples, list(range(5)), CPU)
    head = train.Head(model, 400)
    head.check(model)
    with torch.no_grad():
        expected = model(input_ids).logits[:, :-1, :400][labels[:, 1:] != -100]
        torch.testing.assert_close(head(train.hidden_states(model, batch)), expected, rtol=1e-5, atol=1e-6)
    assert batch.labels.tolist() == labels[:, 1:][labels[:, 1:] != -100].tolist()


def test_heads_that_do_not_fit_are_refused(make_model):
    from transformers import AutoModelForCausalLM, GraniteConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(GraniteConfig(vocab_size=99, logits_scaling=8.0, **sizes))
    with pytest.raises(ValueError, match=r"Granite.* changes its logits"):
        train.Head(model, 99).check(model)
    with pytest.raises(ValueError, match="399 rows, the tokenizer 400 tokens"):
        train.Head(make_model(vocab_size=399), 400)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [(a, "fkl") for a in ("neox", "llama", "phi", "codegen")] + [("neox", n) for n in ("rkl", "jsd", "tvd", "lk", "lk_hybrid")],
)
@pytest.mark.parametrize("selected", [False, True])
def test_chunked_loss_equals_the_plain_one(make_model, examples, monkeypatch, architecture, name, selected):
    """Loss and every parameter's gradient, 1e-6 relative, against autograd on the whole logits; chunks do not divide N."""
    monkeypatch.setattr(train, "CHUNK", 50)
    target, draft = make_model(architecture, seed=1), make_model(architecture, seed=2)
    batch = train.make_batch(examples, list(range(6)), CPU)
    rows = torch.arange(0, len(batch.index), 3) if selected else None
    with torch.no_grad():
        target_hidden = train.hidden_states(target, batch)
    target_head = train.Head(target, 400)

    def gradients(loss):
        draft.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in draft.parameters()])

    def wanted(rows):
        return target_head(target_hidden[rows])

    loss = DIVERGENCES[name]
    head = train.Head(draft, 400)
    chunked = head.loss(train.hidden_states(draft, batch), wanted, loss, rows)
    every = torch.arange(len(batch.index)) if rows is None else rows
    plain = loss(wanted(every), draft(batch.input_ids).logits.flatten(0, 1)[batch.index[every], :400]).sum()
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0)
    ours, theirs = gradients(3 * chunked), gradients(3 * plain)
    assert (ours - theirs).norm() < 1e-6 * theirs.norm()
    per_token = head.per_token(train.hidden_states(draft, batch), wanted, loss)
    torch.testing.assert_close(per_token[every].sum(), plain, rtol=1e-6, atol=0)


def test_equals_a_plain_loop_written_here(make_model, examples):
    """AdamW with decay on matrices only, mean cross-entropy over the batch's response tokens, clipping at 1."""
    model, other = make_model(), make_model()
    _, summary = trained = run(model, examples, epochs=2, seed=5)
    matrices = [p for p in other.parameters() if p.ndim >= 2]
    vectors = [p for p in other.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    steps = 0
    for epoch in range(2):
        for rows in batches([len(e.input_ids) for e in examples], 12, 5, epoch):
            input_ids, labels = collate([examples[i] for i in rows])
            logits = other(input_ids).logits[:, :-1, :400]
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            optimizer.step()
            steps += 1
    assert summary["steps"] == steps == 10
    assert summary["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert summary["loss_tokens"] == 2 * sum(len(e.input_ids) - e.prompt_length for e in examples)
    torch.testing.assert_close(weights(trained[0]), weights(other), rtol=0, atol=5e-6)
    assert (weights(other) - weights(make_model())).abs().max() > 5e-3


def reference_kl(reference, target):
    return lambda batch: reference.head.per_token(reference.hidden(batch), target_logits(target, batch), token_kl)


def objectives(make_model, dtype=torch.float32):
    target = train.Frozen(make_model(seed=1, hidden_size=48).to(dtype), 400)
    reference = train.Frozen(make_model(seed=2).to(dtype), 400)
    return {
        "cross_entropy": cross_entropy,
        "distillation": distillation(target),
        "selective": selective_distillation(target, reference_kl(reference, target), 0.4),
    }


@pytest.mark.parametrize("micro_batch", [1, 5, 6])
def test_accumulation_gives_the_large_batch(make_model, examples, micro_batch):
    """Micro-batches hold different numbers of response tokens: averaging their means would be visibly wrong."""
    objective = objectives(make_model)["distillation"]
    whole, _ = run(make_model(), examples, objective, max_steps=2)
    split, _ = run(make_model(), examples, objective, max_steps=2, micro_batch=micro_batch)
    torch.testing.assert_close(weights(split), weights(whole), rtol=0, atol=2e-6)


def test_selective_step_is_adaspec_loss(make_model, examples):
    """One optimiser step of the driver's stage 2 equals one on the loss that users copy."""
    target, reference, draft = make_model(seed=1, hidden_size=48), make_model(seed=2), make_model(seed=3)
    frozen = [train.Frozen(copy.deepcopy(model), 400) for model in (target, reference)]
    objective = selective_distillation(frozen[0], reference_kl(frozen[1], frozen[0]), 0.4)
    ours, summary = run(draft, examples, objective, max_steps=1)
    rows = batches([len(e.input_ids) for e in examples], 12, 0, 0)[0]
    input_ids, labels = collate([examples[i] for i in rows])
    with torch.no_grad():
        frozen = [model(input_ids).logits[..., :400] for model in (target, reference)]
    loss = adaspec_loss(draft(input_ids).logits[..., :400], *frozen, labels, 0.4)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
    groups = [[p for p in draft.parameters() if p.ndim >= 2], [p for p in draft.parameters() if p.ndim < 2]]
    torch.optim.AdamW([{"params": g, "weight_decay": d} for g, d in zip(groups, (0.1, 0.0), strict=True)], lr=1e-3).step()
    assert summary["loss"] == pytest.approx(loss.item(), rel=1e-5)
    tokens = int((labels[:, 1:] != -100).sum())
    assert summary["loss_tokens"] == pytest.approx(0.4 * tokens, abs=1)
    torch.testing.assert_close(weights(ours), weights(draft), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["cross_entropy", "distillation", "selective"])
def test_autocast_types_follow_float32(make_model, examples, dtype, name):
    full, exact = run(make_model(), examples, objectives(make_model)[name])
    low, summary = run(make_model(), examples, objectives(make_model, train.DTYPES[dtype])[name], dtype=dtype)
    assert {p.dtype for p in low.parameters()} == {torch.float32}
    assert summary["loss"] == pytest.approx(exact["loss"], rel=0.05)
    if not summary["skipped_steps"]:
        assert (weights(low) - weights(full)).norm() < 0.2 * (weights(full) - weights(make_model())).norm()


def summed(loss):
    """An objective from loss(logits) of one token each."""
    return lambda hidden, head, batch: (head.loss(hidden, lambda rows: rows, lambda rows, logits: loss(logits)), len(hidden))


def test_float16_skips_overflowing_steps_and_counts_them(make_model, examples):
    explosive = summed(lambda logits: logits.float().pow(2).sum(-1) * 1e6)
    _, summary = run(make_model(), examples, explosive, dtype="float16")
    assert 0 < summary["skipped_steps"] <= summary["steps"] == 5


def test_non_finite_loss_or_gradient_names_stage_step_and_rows(make_model, examples):
    calls = []

    def poisoned(hidden, head, batch):
        calls.append(1)
        return hidden.sum() * (float("nan") if len(calls) == 3 else 1.0), len(hidden)

    rows = sorted(batches([len(e.input_ids) for e in examples], 12, 0, 0)[2])
    with pytest.raises(train.NonFiniteError, match=r"toy: loss is not finite in step 3 \(epoch 1, rows") as error:
        run(make_model(), examples, poisoned, name="toy")
    assert str(rows) in str(error.value)
    with pytest.raises(train.NonFiniteError, match="gradient norm is not finite in step 1"):
        run(make_model(), examples, summed(lambda logits: (logits - logits.detach()).sqrt().sum(-1)))


def test_nan_from_the_reference_is_noticed(make_model, examples):
    target = train.Frozen(make_model(seed=1), 400)
    broken = selective_distillation(target, lambda batch: torch.full((len(batch.index),), float("nan")), 0.4)
    with pytest.raises(train.NonFiniteError, match="loss is not finite"):
        run(make_model(), examples, broken)


def caches(folder, examples, width, dtype=torch.float32, fingerprint="a"):
    return (
        train.TokenCache(folder / "hidden", fingerprint, examples, width, dtype),
        train.TokenCache(folder / "kl", fingerprint, examples, 1, torch.float32),
    )


@ARCHITECTURES
def test_cache_changes_nothing(make_model, examples, tmp_path, architecture):
    """Stage 2 from the cached hidden states and KL: the loss of every step within 1e-5 of recomputing them."""
    losses = []
    for cached in (False, True):
        target, reference = (train.Frozen(make_model(architecture, seed=seed), 400) for seed in (1, 2))
        kl, steps = reference_kl(reference, target), []
        if cached:
            hidden, by_token = caches(tmp_path, examples, 32)
            target.use(hidden, 7, "target")
            by_token.fill(kl, CPU, 5, "reference")
            assert target.model is None and hidden.bytes == (tmp_path / "hidden" / "0.bin").stat().st_size
            kl = lambda batch, made=by_token: made.read(batch).squeeze(1)  # noqa: E731
        stage_2 = selective_distillation(target, kl, 0.4)

        def record(hidden, head, batch, stage_2=stage_2, steps=steps):
            loss, count = stage_2(hidden, head, batch)
            steps.append(loss.item() / count)
            return loss, count

        run(make_model(architecture, seed=3), examples, record, epochs=2)
        losses.append(steps)
    assert len(losses[0]) == 10
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cache_is_the_target_bit_for_bit_on_equal_batches(make_model, examples, tmp_path, dtype):
    target = train.Frozen(make_model().to(train.DTYPES[dtype]), 400)
    hidden, _ = caches(tmp_path, examples, 32, train.DTYPES[dtype])
    by_length = sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids))
    parts = [train.make_batch(examples, by_length[i : i + 8], CPU) for i in range(0, len(examples), 8)]
    computed = [target.hidden(batch) for batch in parts]
    target.use(hidden, 8, "target")
    assert all(torch.equal(target.hidden(batch), values) for batch, values in zip(parts, computed, strict=True))
    mixed = train.make_batch(examples, [3, 59, 0], CPU)
    assert target.hidden(mixed).shape == (len(mixed.index), 32)


def test_cache_is_reused_only_if_whole_and_of_the_same_making(examples, tmp_path):
    calls = []

    def compute(batch):
        calls.append(len(batch.rows))
        if sum(calls) > limit:
            raise KeyboardInterrupt
        return batch.labels.float()

    def fill(fingerprint):
        calls.clear()
        made = caches(tmp_path, examples, 1, fingerprint=fingerprint)[1]
        made.fill(compute, CPU, 8, "kl")
        batch = train.make_batch(examples, [5, 2], CPU)
        assert made.read(batch).squeeze(1).tolist() == batch.labels.tolist()
        return sum(calls)

    limit = 10**9
    assert [fill("a"), fill("a"), fill("b"), fill("b")] == [60, 0, 60, 0]
    limit = 30
    with pytest.raises(KeyboardInterrupt):
        fill("c")
    limit = 10**9
    assert [fill("c"), fill("b")] == [60, 60], "an interrupted cache is not trusted, and leaves none of the one before"


def test_two_ranks_share_one_cache_and_a_sharded_target_gives_the_same(make_model, tmp_path):
    make_model(num_hidden_layers=6).save_pretrained(tmp_path / "model")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(ROOT / "tests" / "ranks.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=path)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, sharded = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "sharded"))
    assert torch.equal(whole, sharded) and len(whole) > 500 and whole.abs().sum(1).min() > 0
    assert [path.name for path in sorted((tmp_path / "whole").iterdir())] == ["0.bin", "0.json", "1.bin", "1.json"]


def test_seed_decides_everything(make_model, examples):
    runs = [weights(run(make_model(), examples, seed=seed)[0]) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_bad_settings_are_named(make_model, examples):
    with pytest.raises(ValueError, match="unknown dtype 'fp8'"):
        run(make_model(), examples, dtype="fp8")
    with pytest.raises(ValueError, match="0 rows"):
        run(make_model(), [])


def test_micro_batches_of_all_ranks_cover_the_batch_once(monkeypatch):
    for rows, world, micro in [(16, 2, 4), (15, 2, 4), (9, 2, 1), (16, 8, None), (7, 3, 2), (5, 5, 1)]:
        shares = []
        for rank in range(world):
            monkeypatch.setattr(train, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(train, "world_size", lambda world=world: world)
            shares.append(train.micro_batches(list(range(rows)), micro))
        assert len({len(share) for share in shares}) == 1, "a rank with fewer forwards would hang the others"
        flat = [row for share in shares for part in share for row in part]
        assert sorted(flat) == list(range(rows)) and all(part for share in shares for part in share)
        assert micro is None or max(len(part) for share in shares for part in share) <= micro + 1


def test_on_policy_rows_are_asked_for_when_they_come_up(make_model, examples):
    """Every `refresh` steps the rows of the coming steps, from the weights of that time; steps train on what was written."""
    asked, seen = [], []

    def rewrite(model, rows, step):
        assert not model.training
        asked.append((step, rows, weights(model).sum().item()))
        return [examples[row]._replace(input_ids=np.full(examples[row].prompt_length + 3, step + 7, np.int32)) for row in rows]

    def objective(hidden, head, batch):
        seen.append((batch.rows, batch.labels.unique().tolist()))
        return cross_entropy(hidden, head, batch)

    run(make_model(), examples, objective, rewrite=rewrite, refresh=2, max_steps=5)
    order = batches([len(e.input_ids) for e in examples], 12, 0, 0)
    assert [(step, rows) for step, rows, _ in asked] == [
        (step, sorted(row for rows in order[step : step + 2] for row in rows)) for step in (0, 2, 4)
    ]
    assert len({total for _, _, total in asked}) == 3
    assert seen == [(order[step], [step // 2 * 2 + 7]) for step in range(5)]
