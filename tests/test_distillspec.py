"""Every divergence of distillspec.py against its definition in float64, written out here as plain loops."""

import math
from functools import partial

import pytest
import torch

from distillspec import DIVERGENCES, distill_loss, jensen_shannon


def kl64(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def jsd64(p, q, beta=0.5):
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl64(p, m) + (1 - beta) * kl64(q, m)


def overlap64(p, q):
    return sum(min(a, b) for a, b in zip(p, q, strict=True))


def hybrid64(p, q, lam=None):
    lam = math.exp(-3 * overlap64(p, q)) if lam is None else lam
    return lam * kl64(p, q) + (1 - lam) * sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


FORMULAS = {
    "fkl": (DIVERGENCES["fkl"], kl64),
    "rkl": (DIVERGENCES["rkl"], lambda p, q: kl64(q, p)),
    "jsd": (DIVERGENCES["jsd"], jsd64),
    "jsd 0.1": (partial(jensen_shannon, beta=0.1), partial(jsd64, beta=0.1)),
    "jsd 0": (partial(jensen_shannon, beta=0), kl64),
    "jsd 1": (partial(jensen_shannon, beta=1), lambda p, q: kl64(q, p)),
    "tvd": (DIVERGENCES["tvd"], lambda p, q: 1 - overlap64(p, q)),
    "lk": (DIVERGENCES["lk"], lambda p, q: -math.log(overlap64(p, q))),
    "lk_hybrid": (DIVERGENCES["lk_hybrid"], hybrid64),
}
all_formulas = pytest.mark.parametrize("name", FORMULAS)
all_names = pytest.mark.parametrize("name", DIVERGENCES)


def softmax64(logits):
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def values64(formula, target, draft, **held):
    """The formula for every token of two [N, V] tensors of logits."""
    pairs = zip(target.double().tolist(), draft.double().tolist(), strict=True)
    each = [formula(softmax64(t), softmax64(d), **{x: held[x][i] for x in held}) for i, (t, d) in enumerate(pairs)]
    return torch.tensor(each, dtype=torch.float64)


def tokens(n=6, vocab=7, scale=2.0, seed=0):
    return scale * torch.randn(2, n, vocab, generator=torch.Generator().manual_seed(seed))


@all_formulas
@pytest.mark.parametrize("scale", [0.3, 2, 10])
def test_values(name, scale):
    target, draft = tokens(40, 20, scale)
    got = FORMULAS[name][0](target, draft)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), values64(FORMULAS[name][1], target, draft), rtol=1e-5, atol=1e-6)


@all_formulas
def test_gradient_is_that_of_finite_differences(name):
    """In lk_hybrid with lam held: it is a weight, not a thing to minimise."""
    (f, formula), (target, draft), h = FORMULAS[name], tokens(4, 5), 1e-5
    held = {}
    if name == "lk_hybrid":
        held["lam"] = (-3 * values64(overlap64, target, draft)).exp()
    draft.requires_grad_()
    (grad,) = torch.autograd.grad(f(target, draft).sum(), draft)
    numeric = torch.zeros(4, 5, dtype=torch.float64)
    for x in range(5):
        step = h * torch.eye(5, dtype=torch.float64)[x]
        up, down = (values64(formula, target, draft.double() + s, **held) for s in (step, -step))
        numeric[:, x] = (up - down) / (2 * h)
    torch.testing.assert_close(grad.double(), numeric, rtol=1e-4, atol=1e-6)


@all_names
def test_zero_exactly_where_the_models_agree(name):
    target, draft = tokens()
    f = DIVERGENCES[name]
    shift = torch.arange(6.0)[:, None]  # a constant added to all logits of a token is the same distribution
    torch.testing.assert_close(f(target, target + shift), torch.zeros(6), rtol=0, atol=1e-6)
    assert (f(target, draft) > 0.01).all()


def test_jensen_shannon_is_symmetric_bounded_and_checks_beta():
    target, draft = tokens(scale=100)
    jsd = DIVERGENCES["jsd"]
    torch.testing.assert_close(jsd(target, draft), jsd(draft, target))
    assert 0.69 < jsd(target, draft).max() <= math.log(2) + 1e-6
    for beta in (-0.1, 1.1):
        with pytest.raises(ValueError, match="beta"):
            jensen_shannon(target, draft, beta=beta)


def test_lk_of_disjoint_distributions():
    """sum min(p, q) is 0 in float32, its logarithm is not; the way out of it is a gradient towards the target's token."""
    target, draft = torch.tensor([[200.0, 0, 0, 0]]), torch.tensor([[0.0, 0, 190, 3]], requires_grad=True)
    loss = DIVERGENCES["lk"](target, draft)
    assert torch.minimum(target.softmax(-1), draft.softmax(-1)).sum() == 0
    assert loss.item() == pytest.approx(values64(FORMULAS["lk"][1], target, draft).item(), rel=1e-6)
    loss.sum().backward()
    torch.testing.assert_close(draft.grad, torch.tensor([[-1.0, 0, 1, 0]]), rtol=0, atol=1e-3)


@all_names
@pytest.mark.parametrize("masked", ["", "both", "draft", "target"])
@pytest.mark.parametrize("scale", [1, 1e4])
def test_extreme_logits(name, masked, scale):
    target, draft = tokens(20, scale=scale)
    for who, logits in (("target", target), ("draft", draft)):
        if masked in (who, "both"):
            logits[:, 2:4] = -math.inf
    draft.requires_grad_()
    loss = distill_loss(draft[None], target[None], torch.zeros(1, 20, dtype=torch.long), name)
    loss.backward()
    assert loss.isfinite() and loss > 0 and draft.grad.isfinite().all()
    if masked == "both":
        rest = [0, 1, 4, 5, 6]
        torch.testing.assert_close(DIVERGENCES[name](target, draft), DIVERGENCES[name](target[:, rest], draft[:, rest]))


@all_names
def test_distill_loss(name):
    """The mean over the response tokens, shifted by one; the draft alone gets a gradient; no response token gives 0."""
    target, draft = (x.view(2, 5, 7).clone().requires_grad_() for x in tokens(10))
    labels = torch.tensor([[-100, -100, 4, 0, 6], [-100, 5, 6, -100, -100]])
    where = ([0, 0, 0, 1, 1], [1, 2, 3, 0, 1])
    loss = distill_loss(draft, target, labels, name)
    loss.backward()
    want = values64(FORMULAS[name][1], target[where], draft[where])
    assert loss.item() == pytest.approx(want.mean().item(), rel=1e-5)
    assert target.grad is None
    assert {(b, t) for b, t, _ in draft.grad.nonzero().tolist()} == set(zip(*where, strict=True))
    draft.grad = None
    loss = distill_loss(draft, target, torch.full((2, 5), -100), name)
    loss.backward()
    assert loss == 0 and torch.equal(draft.grad, torch.zeros_like(draft))


def test_forward_kl_is_the_default_and_unknown_names_raise():
    target, draft = tokens()[:, None]
    labels = torch.zeros(1, 6, dtype=torch.long)
    assert distill_loss(draft, target, labels) == distill_loss(draft, target, labels, "fkl")
    with pytest.raises(ValueError) as error:
        distill_loss(draft, target, labels, "kld")
    assert all(name in str(error.value) for name in ("kld", *DIVERGENCES))


@all_names
@pytest.mark.parametrize("size", [1, 6])  # 1 would broadcast
def test_different_vocabularies_raise(name, size):
    target, draft = tokens()[:, None]
    with pytest.raises(ValueError, match=rf"target \(5, {size}\).*student \(5, 7\)"):
        distill_loss(draft, target[..., :size], torch.zeros(1, 6, dtype=torch.long), name)
