"""Every divergence of distillspec.py against its definition in float64, written out here as plain
loops; and who writes the responses."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from data import Example, prompt_ids
from distillspec import (
    DIVERGENCES,
    OnPolicy,
    ResponseWriter,
    distill_loss,
    jensen_shannon,
    write_responses,
)


def kl64(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def jsd64(p, q, beta=0.5):
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl64(p, m) + (1 - beta) * kl64(q, m)


def overlap64(p, q):
    return sum(min(a, b) for a, b in zip(p, q, strict=True))


def hybrid64(p, q, lam=None):
    lam = math.exp(-3 * overlap64(p, q)) if lam is None else lam
    distance = sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
    return lam * kl64(p, q) + (1 - lam) * distance


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


def values64(formula, target, draft, **fixed):
    """The formula for every token of two [N, V] tensors of logits; `fixed`: its further arguments,
    one a token."""
    values = []
    for i, (p_logits, q_logits) in enumerate(zip(target.double(), draft.double(), strict=True)):
        arguments = {name: tensor[i] for name, tensor in fixed.items()}
        p, q = softmax64(p_logits.tolist()), softmax64(q_logits.tolist())
        values.append(formula(p, q, **arguments))
    return torch.tensor(values, dtype=torch.float64)


def tokens(n=6, vocab=7, scale=2.0, seed=0):
    return scale * torch.randn(2, n, vocab, generator=torch.Generator().manual_seed(seed))


@all_formulas
@pytest.mark.parametrize("scale", [0.3, 2, 10])
def test_values(name, scale):
    target, draft = tokens(40, 20, scale)
    function, formula = FORMULAS[name]
    values = function(target, draft)
    assert values.dtype == torch.float32
    expected = values64(formula, target, draft)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)


@all_formulas
def test_gradient_is_that_of_finite_differences(name):
    """In lk_hybrid with lam fixed: it is a weight, not a thing to minimise."""
    function, formula = FORMULAS[name]
    target, draft = tokens(4, 5)
    h = 1e-5
    fixed = {}
    if name == "lk_hybrid":
        fixed["lam"] = (-3 * values64(overlap64, target, draft)).exp()
    draft.requires_grad_()
    (grad,) = torch.autograd.grad(function(target, draft).sum(), draft)
    numeric = torch.zeros(4, 5, dtype=torch.float64)
    for x in range(5):
        step = h * torch.eye(5, dtype=torch.float64)[x]
        up = values64(formula, target, draft.detach().double() + step, **fixed)
        down = values64(formula, target, draft.detach().double() - step, **fixed)
        numeric[:, x] = (up - down) / (2 * h)
    torch.testing.assert_close(grad.double(), numeric, rtol=1e-4, atol=1e-6)


@all_names
def test_zero_exactly_where_the_models_agree(name):
    target, draft = tokens()
    divergence = DIVERGENCES[name]
    shift = torch.arange(6.0)[:, None]  # a constant on all logits of a token changes nothing
    equal = divergence(target, target + shift)
    torch.testing.assert_close(equal, torch.zeros(6), rtol=0, atol=1e-6)
    assert (divergence(target, draft) > 0.01).all()


def test_jensen_shannon_is_symmetric_bounded_and_checks_beta():
    target, draft = tokens(scale=100)
    jsd = DIVERGENCES["jsd"]
    torch.testing.assert_close(jsd(target, draft), jsd(draft, target))
    assert 0.69 < jsd(target, draft).max() <= math.log(2) + 1e-6
    for beta in (-0.1, 1.1):
        with pytest.raises(ValueError, match="beta"):
            jensen_shannon(target, draft, beta=beta)


def test_lk_of_disjoint_distributions():
    """sum min(p, q) is 0 in float32, its logarithm is not; the way out of it is a gradient towards
    the target's token."""
    target = torch.tensor([[200.0, 0, 0, 0]])
    draft = torch.tensor([[0.0, 0, 190, 3]], requires_grad=True)
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
    for owner, logits in (("target", target), ("draft", draft)):
        if masked in (owner, "both"):
            logits[:, 2:4] = -math.inf
    draft.requires_grad_()
    loss = distill_loss(draft[None], target[None], torch.zeros(1, 20, dtype=torch.long), name)
    loss.backward()
    assert loss.isfinite() and loss > 0 and draft.grad.isfinite().all()
    if masked == "both":
        others = [0, 1, 4, 5, 6]
        values = DIVERGENCES[name](target, draft)
        torch.testing.assert_close(values, DIVERGENCES[name](target[:, others], draft[:, others]))


@all_names
def test_distill_loss(name):
    """The mean over the response tokens, shifted by one; the draft alone gets a gradient; no
    response token gives 0."""
    target, draft = (x.view(2, 5, 7).clone().requires_grad_() for x in tokens(10))
    labels = torch.tensor([[-100, -100, 4, 0, 6], [-100, 5, 6, -100, -100]])
    positions = ([0, 0, 0, 1, 1], [1, 2, 3, 0, 1])
    loss = distill_loss(draft, target, labels, name)
    loss.backward()
    expected = values64(FORMULAS[name][1], target[positions], draft[positions])
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert target.grad is None
    nonzero = {(b, t) for b, t, _ in draft.grad.nonzero().tolist()}
    assert nonzero == set(zip(*positions, strict=True))
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
    with pytest.raises(ValueError, match=rf"target \(5, {size}\).*draft \(5, 7\)"):
        distill_loss(draft, target[..., :size], torch.zeros(1, 6, dtype=torch.long), name)


# Who writes the responses

END = 0
VOCABULARY = 400


def prompts_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.integers(1, VOCABULARY, length)) for length in lengths]


def rows_of(*lengths, seed=0):
    """Rows with a prompt of each length and a response of one token."""
    prompts = prompts_of(*lengths, seed=seed)
    return [Example(np.append(p.numpy(), END).astype(np.int32), len(p)) for p in prompts]


@pytest.fixture
def writer():
    return ResponseWriter([END], VOCABULARY, max_new_tokens=64, max_length=128, batch_size=80)


@pytest.fixture
def never_ending(make_model):
    """A model that hardly ever draws the end token, one of 400 about equally likely ones."""
    return make_model("codegen", seed=3)


def test_each_row_writes_as_much_as_its_own_prompt_leaves_room_for(never_ending, writer):
    """Issue 13.1: with one prompt of 123 tokens beside them, all wrote 5 tokens."""
    writer.ends = [VOCABULARY]  # no end token: all write up to their limit
    lengths = [20, 20, 123, 20, 64, 100, 20, 127]
    rows = rows_of(*lengths)
    written = writer.write(never_ending, rows, seed=0)
    responses = [len(example.input_ids) - example.prompt_length for example in written]
    assert responses == [min(64, 128 - length) for length in lengths]
    for row, example in zip(rows, written, strict=True):
        assert example.prompt_length == row.prompt_length
        assert torch.equal(prompt_ids(example), prompt_ids(row)), "the order of the rows"


def test_neighbours_change_no_rows_limit(make_model):
    """A row beside longer prompts has the limit that it has alone, and the context is respected."""
    model = make_model("codegen", seed=3, n_positions=48, n_ctx=48)
    prompts = prompts_of(20, 42, 30)
    limits = [28, 6, 12]  # 48 positions is the model's context
    generator = torch.Generator().manual_seed(0)
    together = write_responses(model, prompts, limits, generator, [VOCABULARY], VOCABULARY)
    alone = [
        write_responses(model, [prompt], [limit], generator, [VOCABULARY], VOCABULARY)[0]
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    assert [len(r) for r in together] == [len(r) for r in alone] == limits
    with pytest.raises(ValueError, match="context of 48"):
        write_responses(model, prompts, [28, 7, 12], generator, [VOCABULARY], VOCABULARY)


def test_a_response_ends_with_the_end_token(make_model, writer):
    """The first end token is the last token, and a response that is cut has none."""
    model = make_model(seed=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # every token is as likely as the others
    writer.vocab_size = writer.max_new_tokens = 20
    written = writer.write(model, rows_of(*[10] * 40), seed=1)
    responses = [example.input_ids[example.prompt_length :].tolist() for example in written]
    assert len(responses[0]) and all(END not in response[:-1] for response in responses)
    ended = [response for response in responses if response[-1] == END]
    assert 15 < len(ended) < 36, "of 40, 14 are expected to write 20 tokens without an end token"
    assert all(len(response) == 20 for response in responses if response[-1] != END)
    assert max(max(response) for response in responses) == 19, "vocab_size cuts the padded head"


def test_responses_hang_on_the_seed_and_are_drawn_at_temperature_1(make_model, writer):
    model = make_model(seed=1, initializer_range=0.5)
    rows = rows_of(8, 8)
    texts = [
        [example.input_ids.tolist() for example in writer.write(model, rows, seed)]
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    # the first token's distribution is the model's own
    writer.max_new_tokens, writer.batch_size = 1, 2000
    written = writer.write(model, rows[:1] * 2000, seed=5)
    first = torch.tensor([example.input_ids[-1] for example in written])
    with torch.no_grad():
        logits = model(prompt_ids(rows[0])[None]).logits[0, -1, :VOCABULARY]
    p = logits.softmax(-1)
    frequency = first.bincount(minlength=VOCABULARY) / 2000
    # the mean distance of n draws from their distribution: sum sqrt(2 p (1 - p) / (pi n)) / 2
    expected = (2 * p * (1 - p) / (math.pi * 2000)).sqrt().sum() / 2
    assert 0.5 * (p - frequency).abs().sum() < 1.2 * expected < 0.2


def test_the_draft_writes_its_share_of_the_rows(never_ending, writer):
    writer.max_new_tokens = 8
    rows = rows_of(*range(5, 45))
    everything = OnPolicy(writer, rows, share=1.0, refresh=2, seed=3)
    written = everything.write(never_ending, [4, 0, 7], step=6)
    assert list(written) == [4, 0, 7]
    for row, example in written.items():
        assert torch.equal(prompt_ids(example), prompt_ids(rows[row]))
        assert len(example.input_ids) > len(rows[row].input_ids)
    assert OnPolicy(writer, rows, 0.0, 2, seed=3).write(never_ending, range(40), 6) == {}
    half = OnPolicy(writer, rows, 0.5, 2, seed=3)
    steps = [set(half.write(never_ending, range(40), step)) for step in (0, 0, 2)]
    assert steps[0] == steps[1] != steps[2]
    assert 10 < len(steps[0]) < 30
    # which rows are written does not hang on the rows that a rank has
    assert set(half.write(never_ending, range(0, 40, 2), 0)) == steps[0] & set(range(0, 40, 2))


def test_each_rank_step_and_seed_draws_anew(never_ending, writer):
    """Issue 13.10: ranks shared one seed."""
    writer.max_new_tokens = 8
    rows = rows_of(9)

    def text(**settings):
        step = settings.pop("step", 0)
        policy = OnPolicy(writer, rows, 1.0, 2, **{"seed": 0, "ranks": 2} | settings)
        return tuple(policy.write(never_ending, [0], step)[0].input_ids.tolist())

    texts = [text(), text(rank=1), text(step=2), text(step=2, rank=1), text(seed=1)]
    assert len(set(texts)) == 5 and text() == texts[0]
