"""The loop: its gradient is the whole batch's, however it is split; what is not finite stops it; autocast types work."""

import copy

import pytest
import torch
from torch.nn import functional as F

import train
from adaspec import adaspec_loss
from data import batches, collate
from run_all import cross_entropy, distillation, selective_distillation


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(model, examples, objective=cross_entropy, **settings):
    model = copy.deepcopy(model)
    settings = {"vocab_size": 400, "lr": 1e-3, "epochs": 1, "batch_size": 12} | settings
    return model, train.train(model, examples, objective, **settings)


@pytest.mark.parametrize("architecture", ["neox", "llama", "phi", "codegen"])
def test_response_logits_are_the_models_own(make_model, examples, architecture):
    model = make_model(architecture)
    input_ids, labels = collate(examples[:5])
    batch = train.make_batch(examples[:5], torch.device("cpu"))
    ours = train.ResponseLogits(model, 400)
    ours.check()
    with torch.no_grad():
        expected = model(input_ids).logits[:, :-1, :400][labels[:, 1:] != -100]
        torch.testing.assert_close(ours(batch.input_ids, batch.index), expected, rtol=1e-5, atol=1e-6)
    assert batch.labels.tolist() == labels[:, 1:][labels[:, 1:] != -100].tolist()


def test_a_head_that_does_more_than_multiply_is_refused():
    from transformers import AutoModelForCausalLM, GraniteConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(GraniteConfig(vocab_size=99, logits_scaling=8.0, **sizes))
    with pytest.raises(ValueError, match="Granite.* changes its logits"):
        train.ResponseLogits(model, 99).check()


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


def objectives(make_model):
    target = train.ResponseLogits(make_model(seed=1, hidden_size=48), 400)
    reference = train.ResponseLogits(make_model(seed=2), 400)
    return {
        "cross_entropy": cross_entropy,
        "distillation": distillation(target),
        "selective": selective_distillation(target, reference, 0.4),
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
    ours, summary = run(draft, examples, selective_distillation(*(train.ResponseLogits(m, 400) for m in (target, reference)), 0.4), max_steps=1)
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
    objective = objectives(make_model)[name]
    full, exact = run(make_model(), examples, objective)
    low, summary = run(make_model(), examples, objective, dtype=dtype)
    assert {p.dtype for p in low.parameters()} == {torch.float32}
    assert summary["loss"] == pytest.approx(exact["loss"], rel=0.05)
    if not summary["skipped_steps"]:
        assert (weights(low) - weights(full)).norm() < 0.2 * (weights(full) - weights(make_model())).norm()


def test_float16_skips_overflowing_steps_and_counts_them(make_model, examples):
    def explosive(logits, batch):
        return logits.float().pow(2).sum() * 1e4, len(logits)

    _, summary = run(make_model(), examples, explosive, dtype="float16")
    assert 0 < summary["skipped_steps"] <= summary["steps"] == 5


def test_non_finite_loss_or_gradient_names_stage_step_and_rows(make_model, examples):
    calls = []

    def poisoned(logits, batch):
        calls.append(1)
        return logits.sum() * (float("nan") if len(calls) == 3 else 1.0), len(logits)

    rows = sorted(batches([len(e.input_ids) for e in examples], 12, 0, 0)[2])
    with pytest.raises(train.NonFiniteError, match=r"toy: loss is not finite in step 3 \(epoch 1, rows") as error:
        run(make_model(), examples, poisoned, name="toy")
    assert str(rows) in str(error.value)
    with pytest.raises(train.NonFiniteError, match="gradient norm is not finite in step 1"):
        run(make_model(), examples, lambda logits, batch: ((logits - logits.detach()).sqrt().sum(), len(logits)))


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
