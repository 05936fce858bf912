"""The filter and the loss of adaspec.py against the paper's equations in float64, written out here as plain loops."""

import ast
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import adaspec
from adaspec import adaspec_loss, select_tokens, token_kl
from distillspec import distill_loss


def log_softmax64(logits):
    top = max(logits)
    total = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]


def kl64(target, draft):
    """KL(p || q) of one token from two lists of float64 logits; a token without probability in p adds nothing."""
    pairs = zip(log_softmax64(target), log_softmax64(draft), strict=True)
    return sum(math.exp(a) * (a - b) for a, b in pairs if a > -math.inf)


def loss64(draft, target, reference, labels, k, chosen=None):
    """(loss, selected positions): every (b, t) whose next label counts; `chosen` holds the selection fixed."""
    draft, target, reference = (x.double().tolist() for x in (draft, target, reference))
    where = [(b, t) for b, row in enumerate(labels.tolist()) for t in range(len(row) - 1) if row[t + 1] != -100]
    kl = {(b, t): kl64(target[b][t], draft[b][t]) for b, t in where}
    if chosen is None:
        gap = {(b, t): kl[b, t] - kl64(target[b][t], reference[b][t]) for b, t in where}
        order, rank = sorted(gap.values()), (1 - Fraction(str(k))) * (len(gap) - 1)
        low, high = order[math.floor(rank)], order[math.ceil(rank)]
        chosen = [at for at in where if gap[at] >= low + float(rank - math.floor(rank)) * (high - low)]
    return sum(kl[at] for at in chosen) / len(chosen), chosen


def batch(seed=0, rows=4, length=9, vocab=7, scale=2.0):
    """draft, target, reference [B, T, V] and labels with a prompt and some padding of random lengths in every row."""
    g = torch.Generator().manual_seed(seed)
    logits = [scale * torch.randn(rows, length, vocab, generator=g) for _ in range(3)]
    labels = torch.randint(vocab, (rows, length), generator=g)
    for row in labels:
        row[: torch.randint(1, length // 2, (), generator=g)] = -100
        row[length - torch.randint(0, length // 2, (), generator=g) :] = -100
    return *logits, labels


def with_grad(loss, draft, *rest):
    draft = draft.clone().requires_grad_()
    value = loss(draft, *rest)
    value.backward()
    return value.detach(), draft.grad


@pytest.mark.parametrize(("scale", "dtype"), [(1, torch.float32), (30, torch.float32), (1, torch.float64), (1, torch.bfloat16)])
def test_token_kl(scale, dtype):
    draft, target = (x.flatten(0, 1).to(dtype) for x in batch(scale=scale)[:2])
    want = [kl64(t, d) for t, d in zip(target.double().tolist(), draft.double().tolist(), strict=True)]
    got = token_kl(target.view(4, 9, 7), draft.view(4, 9, 7))
    assert got.dtype == torch.float32 and got.shape == (4, 9)
    np.testing.assert_allclose(got.flatten().numpy(), want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("k", [0.01, 0.1, 0.2, 0.25, 0.3, 1 / 3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99, 1.0])
def test_selection_is_numpys_quantile(k):
    rng = np.random.default_rng(0)
    for n in [*range(1, 60), 61, 99, 100, 101, 301, 1000, 1001, 10001]:  # (1 - k)(N - 1) is an integer in many of them
        gap = rng.permutation(n) - n / 2
        want = gap >= np.quantile(gap, 1 - k) - 1e-9  # gaps are >= 1 apart: this absorbs the rounding of 1 - k
        assert select_tokens(torch.tensor(gap, dtype=torch.float32), k).tolist() == want.tolist(), n


def test_selection_edges():
    def select(*gap, k):
        return select_tokens(torch.tensor(gap), k).tolist()

    assert select(0.0, 1.0, 1.0, 2.0, 1.0, k=0.4) == [False, True, True, True, True]  # ties with the threshold are kept
    assert select(-1.0, -3.0, -2.0, k=1.0) == [True] * 3
    assert select(0.0, 5.0, -5.0, 4.999, k=1e-12) == [False, True, False, False]  # k -> 0: the largest gap alone
    for k in (1e-12, 0.4, 1.0):
        assert select(-7.0, k=k) == [True] and select(k=k) == [] and select(*[3.0] * 5, k=k) == [True] * 5
    assert select_tokens(torch.arange(2**24 + 6), 0.4).sum() == 6710889  # more values than torch.quantile takes
    for k in (0, -0.1, 1.0001, math.nan):
        with pytest.raises(ValueError, match="k is"):
            adaspec_loss(*batch(), k=k)


@pytest.mark.parametrize("k", [1e-9, 0.1, 0.25, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(1, 5, 2), (4, 9, 7), (3, 40, 50)])
def test_loss_equals_the_float64_version(shape, k):
    for seed in range(3):
        data = batch(seed, *shape)
        got = adaspec_loss(*data, k=k)
        assert got.dtype == torch.float32 and got.shape == ()
        assert got.item() == pytest.approx(loss64(*data, k)[0], rel=1e-6, abs=1e-8)
    assert adaspec_loss(*data).item() == adaspec_loss(*data, k=0.4).item()  # the paper's k is the default


def test_k_one_is_plain_distillation():
    draft, target, reference, labels = batch()
    got = with_grad(lambda d: adaspec_loss(d, target, reference, labels, k=1.0), draft)
    want = with_grad(lambda d: distill_loss(d, target, labels, "fkl"), draft)
    assert got[0] == want[0] > 0 and torch.equal(got[1], want[1])


@pytest.mark.parametrize("k", [1e-9, 0.4, 1.0])
def test_gradient(k):
    """Through the draft alone, from the selected tokens alone, and equal to finite differences on every coordinate."""
    draft, target, reference, labels = batch(rows=2, length=7, vocab=5)
    chosen = loss64(draft, target, reference, labels, k)[1]
    for x in (target, reference):
        x.requires_grad_()
    _, grad = with_grad(lambda d: adaspec_loss(d, target, reference, labels, k=k), draft)
    assert target.grad is None and reference.grad is None
    assert {(b, t) for b, t, _ in grad.nonzero().tolist()} == set(chosen)
    numeric, h = torch.zeros_like(grad, dtype=torch.float64), 1e-5
    for at in np.ndindex(*draft.shape):
        step = torch.zeros_like(numeric)
        step[at] = h
        up, down = (loss64(draft.double() + s, target, reference, labels, k, chosen)[0] for s in (step, -step))
        numeric[at] = (up - down) / (2 * h)
    torch.testing.assert_close(grad.double(), numeric, rtol=1e-5, atol=1e-6)


def pad(x, columns, rows=0, value=math.nan):
    return torch.nn.functional.pad(x, (*[0] * (2 * x.dim() - 4), 0, columns, 0, rows), value=value)


CHANGES = {  # of (draft, target, reference, labels), free = True where the next token carries no loss
    "padding on the right, more rows": lambda *x, free: (*(pad(i, 2, 1) for i in x[:3]), pad(x[3], 2, 1, -100)),
    "prompt content": lambda *x, free: (*(i.masked_fill(free, 9.9) + free * torch.arange(7) for i in x[:3]), x[3]),
    "target logits on the prompt": lambda *x, free: (x[0], x[1].masked_fill(free, math.nan), *x[2:]),
    "order of the rows": lambda *x, free: tuple(i[[2, 0, 3, 1]] for i in x),
    "names of the labelled tokens": lambda *x, free: (*x[:3], x[3].clamp_max(0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_invariance(change):
    data = batch()
    free = pad(data[3][:, 1:], 1, value=-100)[..., None] == -100
    changed = CHANGES[change](*data, free=free)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(data, changed, strict=True))
    assert adaspec_loss(*changed).item() == pytest.approx(adaspec_loss(*data).item(), rel=1e-6)


@pytest.mark.parametrize("first", [-100, 3])  # no logits predict the first token, so its label never counts
def test_no_response_token_is_a_loss_of_zero(first):
    *logits, labels = batch()
    labels[:] = -100
    labels[:, 0] = first
    loss, grad = with_grad(adaspec_loss, *logits, labels)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(grad))


def test_vocabulary_slice():
    *logits, labels = batch()
    heads = [torch.nn.functional.pad(x, (0, more), value=math.nan) for x, more in zip(logits, (3, 1, 2), strict=True)]
    loss, grad = with_grad(lambda d: adaspec_loss(d[..., :7], heads[1][..., :7], heads[2][..., :7], labels), heads[0])
    want, want_grad = with_grad(adaspec_loss, *logits, labels)
    assert loss == want and torch.equal(grad[..., :7], want_grad) and not grad[..., 7:].any()


@pytest.mark.parametrize("narrow", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 6])  # 1 would broadcast
def test_different_vocabularies_raise(narrow, size):
    *logits, labels = batch()
    logits[narrow] = logits[narrow][..., :size]
    with pytest.raises(ValueError) as error:
        adaspec_loss(*logits, labels)
    assert "7)" in str(error.value) and f"{size})" in str(error.value)
    with pytest.raises(ValueError, match=r"\(4, 9, 7\).*\(4, 8\)"):
        adaspec_loss(*batch()[:3], labels[:, :8])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_upcast(dtype):
    *logits, labels = batch(rows=8, vocab=50)
    logits = [x.to(dtype) for x in logits]
    loss, grad = with_grad(adaspec_loss, *logits, labels)
    want, want_grad = with_grad(adaspec_loss, *(x.float() for x in logits), labels)
    assert loss.dtype == torch.float32 and loss == want and torch.equal(grad, want_grad.to(dtype))


@pytest.mark.parametrize(
    ("scale", "masked"), [(1e4, ()), (2, (0, 1, 2)), (1e4, (0, 1, 2)), (2, (1,)), (2, (0,)), (2, (0, 2)), (1e4, (0,))]
)
def test_extreme_logits(scale, masked):
    """Two tokens are masked with -inf in some of draft (0), target (1) and reference (2)."""
    *logits, labels = batch(scale=scale)
    for i in masked:
        logits[i][..., 2:4] = -math.inf
    loss, grad = with_grad(adaspec_loss, *logits, labels)
    assert grad.isfinite().all() and grad.any()
    if 0 in masked and 1 not in masked:  # the true KL is infinite: it must come out large, yet finite
        assert 1e6 < loss < math.inf
    else:
        assert loss.item() == pytest.approx(loss64(*logits, labels, 0.4)[0], rel=1e-6)
    if len(masked) == 3:
        assert loss.item() == pytest.approx(adaspec_loss(*(x[..., [0, 1, 4, 5, 6]] for x in logits), labels).item(), rel=1e-6)


@pytest.mark.parametrize("k", [1e-9, 0.4, 1.0])
@pytest.mark.parametrize("model", [0, 1, 2])
def test_nan_is_not_filtered_away(model, k):
    *logits, labels = batch()
    b, t = loss64(*logits, labels, 1.0)[1][5]
    logits[model][b, t, 1] = math.nan
    assert adaspec_loss(*logits, labels, k=k).isnan()


def test_the_file_can_be_pasted():
    source = Path(adaspec.__file__).read_text()
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} == {"torch", "math"}
    assert len(source.splitlines()) <= 115
    namespace = {}
    exec(compile(source, "pasted", "exec"), namespace)
    assert namespace["adaspec_loss"](*batch()) == adaspec_loss(*batch())
