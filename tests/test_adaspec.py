"""The filter and the loss of adaspec.py against the paper's equations in float64, written out here
as plain loops."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import adaspec
from adaspec import (
    adaspec_loss,
    gather_gaps,
    response_positions,
    response_tokens,
    select_tokens,
    selected_count,
    token_kl,
)
from distillspec import distill_loss


def log_softmax64(logits):
    top = max(logits)
    total = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]


def kl64(target, draft):
    """KL(p || q) of one token from two lists of float64 logits; a token without probability in p
    adds nothing."""
    pairs = zip(log_softmax64(target), log_softmax64(draft), strict=True)
    return sum(math.exp(a) * (a - b) for a, b in pairs if a > -math.inf)


def quantile64(values, fraction):
    """The quantile with linear interpolation, by its definition."""
    order = sorted(values)
    rank = fraction * (len(order) - 1)
    low, high = order[math.floor(rank)], order[math.ceil(rank)]
    return low + float(rank - math.floor(rank)) * (high - low)


def loss64(draft, target, reference, labels, k, selected=None):
    """(loss, selected positions) over every (b, t) whose next label counts; `selected` holds the
    selection fixed."""
    draft, target, reference = (x.double().tolist() for x in (draft, target, reference))
    positions = [
        (b, t)
        for b, row in enumerate(labels.tolist())
        for t in range(len(row) - 1)
        if row[t + 1] != -100
    ]
    kl = {(b, t): kl64(target[b][t], draft[b][t]) for b, t in positions}
    if selected is None:
        gap = {(b, t): kl[b, t] - kl64(target[b][t], reference[b][t]) for b, t in positions}
        threshold = quantile64(gap.values(), 1 - Fraction(str(k)))
        selected = [position for position in positions if gap[position] >= threshold]
    return sum(kl[position] for position in selected) / len(selected), selected


def batch(seed=0, rows=4, length=9, vocab=7, scale=2.0):
    """draft, target, reference [B, T, V] and labels with a prompt and padding of random lengths in
    every row."""
    generator = torch.Generator().manual_seed(seed)
    logits = [scale * torch.randn(rows, length, vocab, generator=generator) for _ in range(3)]
    labels = torch.randint(vocab, (rows, length), generator=generator)
    for row in labels:
        row[: torch.randint(1, length // 2, (), generator=generator)] = -100
        row[length - torch.randint(0, length // 2, (), generator=generator) :] = -100
    return *logits, labels


def with_grad(loss, draft, *others):
    draft = draft.clone().requires_grad_()
    value = loss(draft, *others)
    value.backward()
    return value.detach(), draft.grad


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1, torch.float32), (30, torch.float32), (1, torch.float64), (1, torch.bfloat16)],
)
def test_token_kl(scale, dtype):
    draft, target = (x.flatten(0, 1).to(dtype) for x in batch(scale=scale)[:2])
    pairs = zip(target.double().tolist(), draft.double().tolist(), strict=True)
    expected = [kl64(t, d) for t, d in pairs]
    kl = token_kl(target.view(4, 9, 7), draft.view(4, 9, 7))
    assert kl.dtype == torch.float32 and kl.shape == (4, 9)
    np.testing.assert_allclose(kl.flatten().numpy(), expected, rtol=2e-6, atol=1e-6)


# The filter


@pytest.mark.parametrize(
    "k", [0.01, 0.1, 0.2, 0.25, 0.3, 1 / 3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99, 1.0]
)
def test_selection_is_numpys_quantile(k):
    rng = np.random.default_rng(0)
    # (1 - k)(N - 1) is a whole number for many of them
    for n in [*range(1, 60), 61, 99, 100, 101, 301, 1000, 1001, 10001]:
        gap = rng.permutation(n) - n / 2
        # gaps are at least 1 apart, so that 1e-9 absorbs the rounding of 1 - k
        expected = gap >= np.quantile(gap, 1 - k) - 1e-9
        selected = select_tokens(torch.tensor(gap, dtype=torch.float32), k)
        assert selected.tolist() == expected.tolist(), n


def test_selection_with_ties_is_numpys_quantile():
    rng = np.random.default_rng(1)
    for _ in range(300):
        gap = rng.integers(0, 4, rng.integers(1, 30)).astype(np.float64)
        k = rng.choice([0.1, 0.25, 0.4, 0.5, 0.8, 1.0])
        expected = gap >= np.quantile(gap, 1 - k) - 1e-9
        assert select_tokens(torch.tensor(gap), k).tolist() == expected.tolist(), (gap, k)


def test_selection_edges():
    def select(*gap, k):
        return select_tokens(torch.tensor(gap), k).tolist()

    # ties with the threshold are all selected
    assert select(0.0, 1.0, 1.0, 2.0, 1.0, k=0.4) == [False, True, True, True, True]
    assert select(-1.0, -3.0, -2.0, k=1.0) == [True] * 3
    # k -> 0: the largest gap alone
    assert select(0.0, 5.0, -5.0, 4.999, k=1e-12) == [False, True, False, False]
    for k in (1e-12, 0.4, 1.0):
        assert select(-7.0, k=k) == [True]
        assert select(k=k) == []
        assert select(*[3.0] * 5, k=k) == [True] * 5
    assert select(1.0, math.nan, 0.0, 2.0, k=0.25)[1], "a NaN reaches the loss"
    # more values than torch.quantile takes
    assert select_tokens(torch.arange(2**24 + 6), 0.4).sum() == 6710889
    for k in (0, -0.1, 1.0001, math.nan):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
            adaspec_loss(*batch(), k=k)


@pytest.mark.parametrize("k", [1e-9, 0.1, 1 / 3, 0.4, 0.9, 1.0])
def test_the_count_is_known_before_the_gaps(k):
    assert selected_count(0, k) == 0
    for tokens in range(1, 60):
        gap = torch.randperm(tokens).float()
        assert selected_count(tokens, k) == select_tokens(gap, k).sum()
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], got 0"):
        selected_count(5, 0)


def test_gaps_of_one_process_are_its_own():
    """(Those of several: test_two_ranks, test_a_step_of_two_ranks_is_that_of_our_loop.)"""
    gap = torch.tensor([3.0, 1.0, 2.0])
    all_gaps, own = gather_gaps(gap)
    assert torch.equal(all_gaps, gap) and own == slice(0, 3)


# Which tokens count


def test_responses_are_predicted_one_position_earlier():
    labels = torch.tensor([[7, -100, 5, 6], [-100, -100, -100, 9]])
    index, tokens = response_positions(labels)
    assert index.tolist() == [1, 2, 6] and tokens.tolist() == [5, 6, 9]
    logits = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    assert torch.equal(response_tokens(logits, labels), logits.flatten(0, 1)[[1, 2, 6]])
    with pytest.raises(ValueError, match=r"\(2, 4, 3\) do not fit labels \(2, 3\)"):
        response_tokens(logits, labels[:, :3])


# The loss


@pytest.mark.parametrize("k", [1e-9, 0.1, 0.25, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(1, 5, 2), (4, 9, 7), (3, 40, 50)])
def test_loss_equals_the_float64_version(shape, k):
    for seed in range(3):
        inputs = batch(seed, *shape)
        loss = adaspec_loss(*inputs, k=k)
        assert loss.dtype == torch.float32 and loss.shape == ()
        assert loss.item() == pytest.approx(loss64(*inputs, k)[0], rel=1e-6, abs=1e-8)
    assert adaspec_loss(*inputs).item() == adaspec_loss(*inputs, k=0.4).item(), "the paper's k"


def test_k_one_is_plain_distillation():
    draft, target, reference, labels = batch()
    loss, grad = with_grad(lambda d: adaspec_loss(d, target, reference, labels, k=1.0), draft)
    plain, plain_grad = with_grad(lambda d: distill_loss(d, target, labels, "fkl"), draft)
    assert loss == plain > 0 and torch.equal(grad, plain_grad)


@pytest.mark.parametrize("k", [0.25, 1.0])
def test_sum_and_count_make_the_mean(k):
    inputs = batch()
    total, tokens = adaspec_loss(*inputs, k=k, reduction="sum")
    assert tokens == len(loss64(*inputs, k)[1]) > 1
    assert total / tokens == adaspec_loss(*inputs, k=k)
    assert adaspec_loss(*inputs, k=k, reduction="sum", over_ranks=True) == (total, tokens)
    draft, target, _, labels = inputs
    total, tokens = distill_loss(draft, target, labels, "tvd", reduction="sum")
    assert tokens == (labels[:, 1:] != -100).sum()
    assert total / tokens == distill_loss(draft, target, labels, "tvd")
    no_labels = torch.full_like(labels, -100)
    assert adaspec_loss(*inputs[:3], no_labels, reduction="sum") == (0, 0)
    with pytest.raises(ValueError, match="'mean' or 'sum', got 'none'"):
        adaspec_loss(*inputs, reduction="none")
    with pytest.raises(ValueError, match="'mean' or 'sum', got 'none'"):
        distill_loss(draft, target, labels, reduction="none")


@pytest.mark.parametrize("k", [1e-9, 0.4, 1.0])
def test_gradient(k):
    """Through the draft alone, from the selected tokens alone, and equal to finite differences on
    every coordinate."""
    draft, target, reference, labels = batch(rows=2, length=7, vocab=5)
    selected = loss64(draft, target, reference, labels, k)[1]
    for frozen in (target, reference):
        frozen.requires_grad_()
    _, grad = with_grad(lambda d: adaspec_loss(d, target, reference, labels, k=k), draft)
    assert target.grad is None and reference.grad is None
    assert {(b, t) for b, t, _ in grad.nonzero().tolist()} == set(selected)
    numeric = torch.zeros_like(grad, dtype=torch.float64)
    h = 1e-5
    for coordinate in np.ndindex(*draft.shape):
        step = torch.zeros_like(numeric)
        step[coordinate] = h
        up = loss64(draft.double() + step, target, reference, labels, k, selected)[0]
        down = loss64(draft.double() - step, target, reference, labels, k, selected)[0]
        numeric[coordinate] = (up - down) / (2 * h)
    torch.testing.assert_close(grad.double(), numeric, rtol=1e-5, atol=1e-6)


def pad(x, columns, rows=0, value=math.nan):
    return F.pad(x, (*[0] * (2 * x.dim() - 4), 0, columns, 0, rows), value=value)


def pad_all(draft, target, reference, labels, free):
    return *(pad(x, 2, 1) for x in (draft, target, reference)), pad(labels, 2, 1, -100)


def other_prompts(draft, target, reference, labels, free):
    other = [x.masked_fill(free, 9.9) + free * torch.arange(7) for x in (draft, target, reference)]
    return *other, labels


CHANGES = {  # of draft, target, reference, labels; free: where the next token carries no loss
    "padding on the right, more rows": pad_all,
    "prompt content": other_prompts,
    "target logits on the prompt": lambda draft, target, reference, labels, free: (
        draft, target.masked_fill(free, math.nan), reference, labels,
    ),
    "order of the rows": lambda *inputs, free: tuple(x[[2, 0, 3, 1]] for x in inputs),
    "names of the labelled tokens": lambda *inputs, free: (*inputs[:3], inputs[3].clamp_max(0)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_invariance(change):
    inputs = batch()
    free = pad(inputs[3][:, 1:], 1, value=-100)[..., None] == -100
    changed = CHANGES[change](*inputs, free=free)
    pairs = zip(inputs, changed, strict=True)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)
    assert adaspec_loss(*changed).item() == pytest.approx(adaspec_loss(*inputs).item(), rel=1e-6)


@pytest.mark.parametrize("first", [-100, 3])  # no logits predict the first token
def test_no_response_token_is_a_loss_of_zero(first):
    *logits, labels = batch()
    labels[:] = -100
    labels[:, 0] = first
    loss, grad = with_grad(adaspec_loss, *logits, labels)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(grad))


def test_vocabulary_slice():
    *logits, labels = batch()
    heads = [F.pad(x, (0, more), value=math.nan) for x, more in zip(logits, (3, 1, 2), strict=True)]
    target, reference = heads[1][..., :7], heads[2][..., :7]
    loss, grad = with_grad(lambda d: adaspec_loss(d[..., :7], target, reference, labels), heads[0])
    expected, expected_grad = with_grad(adaspec_loss, *logits, labels)
    assert loss == expected and torch.equal(grad[..., :7], expected_grad)
    assert not grad[..., 7:].any()


@pytest.mark.parametrize("narrow", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 6])  # 1 would broadcast
def test_different_vocabularies_raise(narrow, size):
    *logits, labels = batch()
    logits[narrow] = logits[narrow][..., :size]
    with pytest.raises(ValueError) as error:
        adaspec_loss(*logits, labels)
    assert "7)" in str(error.value) and f"{size})" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_upcast(dtype):
    *logits, labels = batch(rows=8, vocab=50)
    logits = [x.to(dtype) for x in logits]
    loss, grad = with_grad(adaspec_loss, *logits, labels)
    expected, expected_grad = with_grad(adaspec_loss, *(x.float() for x in logits), labels)
    assert loss.dtype == torch.float32 and loss == expected
    assert torch.equal(grad, expected_grad.to(dtype))


@pytest.mark.parametrize(
    ("scale", "masked"),
    [(1e4, ()), (2, (0, 1, 2)), (1e4, (0, 1, 2)), (2, (1,)), (2, (0,)), (2, (0, 2)), (1e4, (0,))],
)
def test_extreme_logits(scale, masked):
    """Two tokens are masked with -inf in any of draft (0), target (1) and reference (2)."""
    *logits, labels = batch(scale=scale)
    for i in masked:
        logits[i][..., 2:4] = -math.inf
    loss, grad = with_grad(adaspec_loss, *logits, labels)
    assert grad.isfinite().all() and grad.any()
    if 0 in masked and 1 not in masked:  # the true KL is infinite: large, and yet finite
        assert 1e6 < loss < math.inf
    else:
        assert loss.item() == pytest.approx(loss64(*logits, labels, 0.4)[0], rel=1e-6)
    if len(masked) == 3:
        others = (x[..., [0, 1, 4, 5, 6]] for x in logits)
        assert loss.item() == pytest.approx(adaspec_loss(*others, labels).item(), rel=1e-6)


@pytest.mark.parametrize("k", [1e-9, 0.4, 1.0])
@pytest.mark.parametrize("model", [0, 1, 2])
def test_nan_is_not_filtered_away(model, k):
    *logits, labels = batch()
    b, t = loss64(*logits, labels, 1.0)[1][5]
    logits[model][b, t, 1] = math.nan
    assert adaspec_loss(*logits, labels, k=k).isnan()


def test_the_file_can_be_pasted():
    source = Path(adaspec.__file__).read_text()
    namespace = {}
    exec(compile(source, "pasted", "exec"), namespace)
    assert namespace["adaspec_loss"](*batch()) == adaspec_loss(*batch())
    assert namespace["adaspec_loss"] is not adaspec_loss
