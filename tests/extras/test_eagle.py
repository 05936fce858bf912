"""EAGLE heads: decoding against a sampler without caches, losslessness, the losses written out,
files, resume, and the command.

Statistical tests use fixed seeds, so they pass or fail for good; the false-alarm rate that each
states is the chance that an unlucky seed would have failed a correct sampler.
"""

import copy
import json
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BloomConfig, OPTConfig

import adaspec
import models
import ranks
import speculative
import stages
import storage
from adaspec import select_tokens, token_kl
from cells import prepare_cell
from data import all_tokens, collate, make_batch
from extras import eagle
from extras.eagle import (
    Eagle,
    EagleSettings,
    HeadValidation,
    TargetStates,
    eagle_adaspec_step,
    eagle_loss,
    eagle_step,
    given_head,
    run_heads,
    training_accuracy,
)
from extras.tree import tree_generate
from head import Head
from settings import Method, Pair
from speculative import Stats, autoregressive_generate, expected_acceptance, speculative_generate
from storage import Checkpoints, Model
from teacher import Frozen, ReferenceLoss, TokenCache, token_loss
from tests.sampling import ARCHITECTURES, build, chi_square, enumerate_texts, same_counts
from train import Student, train

CPU = torch.device("cpu")
PROMPT = torch.tensor([[5, 0, 39, 7, 0]])


# A slow sampler to hold decoding against


@torch.no_grad()
def slow_logits(target, head, text, drafts):
    """The head's logits after text and drafts, without a cache: true states before all of the text,
    its guesses after that."""
    true = target.base_model(torch.tensor([text])).last_hidden_state[0]
    states = [torch.zeros_like(true[0]), *true[:-1]]
    for i in range(len(drafts) + 1):
        tokens = torch.tensor([text + drafts[:i]])
        out = head(tokens, torch.stack(states)[None], use_cache=False)
        states.append(out.hidden_states[0][0, -1])
    return out.logits[0, -1]


def slow_eagle(target, head, prompt, max_new_tokens, branching, ends=()):
    """Greedy decoding re-stated without caches, batches, trees or shared code: (tokens, counts).

    Only the node on the target's path matters: there the head's b likeliest tokens hold the
    target's choice or do not. The first target call is a plain one.
    """

    def best(tokens):
        with torch.no_grad():
            return int(target(torch.tensor([tokens])).logits[0, -1].argmax())

    text = [best(prompt)]
    stats = Stats(target_calls=1)
    accepted_at, judged_at = [0] * len(branching), [0] * len(branching)
    while len(text) < max_new_tokens and text[-1] not in ends:
        usable = min(len(branching), max_new_tokens - len(text) - 1)
        start, drafts, ended = prompt + text, [], False
        stats.target_calls += 1
        stats.rounds += usable > 0
        while True:
            own = best(start + drafts)
            text.append(own)
            depth = len(drafts)
            if depth == usable:
                break
            likeliest = slow_logits(target, head, start, drafts).topk(branching[depth]).indices
            judged_at[depth] += 1
            if own not in likeliest:
                break
            accepted_at[depth] += 1
            drafts.append(own)
            ended = own in ends
            if ended:
                break
        accepted = len(drafts)
        stats.cut += ended
        stats.accepted += accepted
        stats.drafted += accepted if ended else usable
        if not ended:
            stats.rejected += accepted < usable
            stats.never_judged += max(0, usable - accepted - 1)
    stats.generated = len(text)
    return text, stats + Stats(per_position=(accepted_at, judged_at))


def head_on(target, steps=80, seed=0, token_ids=None):
    """A head that has learned a little of the target's own text, so that it agrees now and then."""
    torch.manual_seed(seed)
    head, vocab = Eagle(target, token_ids=token_ids), target.config.vocab_size
    prompts = torch.randint(vocab, (48, 2))
    text = autoregressive_generate(target, prompts, max_new_tokens=20, temperature=1.0)
    states = target.base_model(text, use_cache=False).last_hidden_state.detach()
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(steps):
        logits = head(text, F.pad(states, (0, 0, 1, -1)), use_cache=False).logits
        target_logits = target.get_output_embeddings()(states)
        if token_ids is not None:
            target_logits, logits = target_logits[..., token_ids], logits[..., token_ids]
        optimizer.zero_grad()
        token_kl(target_logits, logits).mean().backward()
        optimizer.step()
    return head.eval()


@pytest.fixture(scope="module")
def heads():
    """A target of every architecture and a head on it."""
    targets = {name: build(name, seed=5) for name in ARCHITECTURES}
    return {name: (target, head_on(target)) for name, target in targets.items()}


@pytest.fixture(scope="module")
def short():
    """A target and a head on it that has a short output head."""
    target = build("llama", seed=5)
    return target, head_on(target, token_ids=torch.arange(30))


@pytest.fixture(scope="module", params=["whole", "short"])
def small(request):
    """A target over five tokens, so that all continuations can be enumerated, and a head on it;
    also one that has a short output head."""
    target = build("llama", vocab=5, hidden=16, initializer_range=0.25)
    token_ids = torch.tensor([0, 2, 4]) if request.param == "short" else None
    return target, head_on(target, steps=15, token_ids=token_ids)


# Decoding


@pytest.mark.parametrize(
    ("name", "branching"),
    [("neox", (1,)), *((name, b) for name in ARCHITECTURES for b in ((1, 1, 1, 1), (3, 2, 1)))],
)
def test_greedy_is_the_targets_own_with_the_counts_of_a_slow_sampler(heads, name, branching):
    target, head = heads[name]
    expected = autoregressive_generate(target, PROMPT, max_new_tokens=24)
    text, counts = slow_eagle(target, head, PROMPT[0].tolist(), 24, branching)
    out = tree_generate(target, head, PROMPT, branching=branching, max_new_tokens=24)
    assert torch.equal(out.sequences, expected) and out.sequences[0, 5:].tolist() == text
    assert same_counts(out.stats, counts, len(branching)) and 0.1 < out.stats.alpha < 0.98
    if max(branching) == 1:
        gamma = len(branching)
        chain = speculative_generate(target, head, PROMPT, gamma=gamma, max_new_tokens=24)
        assert torch.equal(chain.sequences, expected) and same_counts(chain.stats, counts, gamma)


def test_greedy_with_a_short_head_is_the_targets_own(short):
    """It drafts its own tokens alone, and as a slow sampler does."""
    target, head = short
    expected = autoregressive_generate(target, PROMPT, max_new_tokens=24)
    for branching in ((1, 1, 1), (3, 2)):
        counts = slow_eagle(target, head, PROMPT[0].tolist(), 24, branching)[1]
        out = tree_generate(target, head, PROMPT, branching=branching, max_new_tokens=24)
        assert torch.equal(out.sequences, expected)
        assert same_counts(out.stats, counts, len(branching)) and out.stats.accepted > 0
    chain = speculative_generate(target, head, PROMPT, gamma=3, max_new_tokens=24)
    assert torch.equal(chain.sequences, expected)
    states = torch.zeros(1, 5, target.config.hidden_size)
    logits = head(PROMPT, states, use_cache=False).logits
    assert logits[..., head.token_ids].isfinite().all()
    assert logits.isfinite().sum() == 5 * len(head.token_ids)


def test_a_short_output_head_goes_where_the_head_goes(short):
    """It is a copy, and no submodule; the target's embedding is neither copied nor touched."""
    target, head = copy.deepcopy(short)
    head.to(torch.float64)
    assert head.frozen[1].weight.dtype == head.dtype == torch.float64
    assert head.frozen[0] is target.get_input_embeddings()
    assert head.frozen[0].weight.dtype == torch.float32


@pytest.mark.skipif(not speculative.PACKED_PRODUCTS, reason="CPUs with AVX-512 only")
def test_a_heads_output_head_is_packed_too(short, tmp_path):
    """It is no module of the head's own."""
    target = copy.deepcopy(short[0]).bfloat16()
    short[1].save_pretrained(tmp_path)
    head = Eagle.from_pretrained(tmp_path, target)
    plain = speculative_generate(target, head, PROMPT, gamma=3, max_new_tokens=24)
    speculative.pack_weights(head)
    layers = [head.fuse, head.get_output_embeddings()]
    assert all(hasattr(layer, "packed_weight") for layer in layers)
    assert not hasattr(target.get_output_embeddings(), "packed_weight")
    output = speculative_generate(target, head, PROMPT, gamma=3, max_new_tokens=24)
    assert torch.equal(output.sequences, plain.sequences) and output.stats == plain.stats


@pytest.mark.parametrize("is_short", [False, True])
def test_a_heads_products_are_thin_too(heads, short, is_short, monkeypatch):
    """Those of its output head, also where that is its target's; and all is put back."""
    target, head = short if is_short else heads["llama"]
    plain = speculative_generate(target, head, PROMPT, gamma=3, max_new_tokens=24)
    layers = set()
    thin = speculative.thin_linear
    monkeypatch.setattr(speculative, "has_thin_products", lambda layer: True)
    monkeypatch.setattr(speculative, "FEWEST_THIN_ROWS", 1)
    monkeypatch.setattr(speculative, "thin_linear", lambda m, x: layers.add(m) or thin(m, x))
    output = speculative_generate(target, head, PROMPT, gamma=3, max_new_tokens=24)
    assert {head.fuse, head.get_output_embeddings()} <= layers
    assert not any({"forward", "kept_logits"} & vars(layer).keys() for layer in layers)
    assert torch.equal(output.sequences, plain.sequences) and output.stats == plain.stats


@pytest.mark.parametrize(("name", "beam"), [("neox", False), ("llama", False), ("llama", True)])
def test_every_node_of_a_tree_is_drafted_from_its_parents_guess(heads, monkeypatch, name, beam):
    target, head = heads[name]
    calls, forward = [], eagle.HeadTreeLane.forward

    def spy(lane, tokens, visible, keep):
        calls.append((tokens, visible[-keep:], forward(lane, tokens, visible, keep)))
        return calls[-1][2]

    monkeypatch.setattr(eagle.HeadTreeLane, "forward", spy)
    out = tree_generate(target, head, PROMPT, branching=(3, 2, 1), beam=beam, max_new_tokens=8)
    text = out.sequences[0].tolist()
    for tokens, visible, logits in calls:
        if isinstance(tokens, list):  # a round begins: the text so far
            n, nodes = visible.shape[1], []
        else:
            nodes += tokens.tolist()
        for slots, row in zip(visible[:, n:].tolist(), logits, strict=True):
            path = [token for token, seen in zip(nodes, slots, strict=True) if seen]
            expected = slow_logits(target, head, text[:n], path)
            torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)
    assert len(calls) > 6


@pytest.mark.parametrize(("name", "gamma"), [("neox", 1), *((name, 4) for name in ARCHITECTURES)])
def test_batched_rows_are_what_they_would_be_alone(heads, name, gamma):
    """Left-padded prompts of 9, 6, 2 and 1 tokens; rows end at different times and accept different
    numbers."""
    target, head = heads[name]
    ids = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(9) >= torch.tensor([[0], [3], [7], [8]])).long()
    ends = [autoregressive_generate(target, ids[:1], max_new_tokens=12)[0, -1].item(), 3]
    settings = {"max_new_tokens": 30, "eos_token_id": ends, "pad_token_id": 33}
    out = speculative_generate(target, head, ids, mask, gamma=gamma, **settings)
    assert torch.equal(out.sequences, autoregressive_generate(target, ids, mask, **settings))
    lengths = set()
    for row in range(4):
        prompt = ids[row, mask[row].bool()].tolist()
        tokens, counts = slow_eagle(target, head, prompt, 30, (1,) * gamma, ends)
        assert out.sequences[row, 9:].tolist()[: len(tokens)] == tokens
        assert same_counts(out.row_stats[row], counts, gamma)
        lengths.add(len(tokens))
    assert len(lengths) > 1


@pytest.mark.parametrize("max_new_tokens", range(1, 8))
def test_limit_inside_a_block(heads, max_new_tokens):
    target, head = heads["neox"]
    expected = autoregressive_generate(target, PROMPT, max_new_tokens=max_new_tokens)
    counts = slow_eagle(target, head, PROMPT[0].tolist(), max_new_tokens, (1, 1, 1))[1]
    limit = {"max_new_tokens": max_new_tokens}
    for out in (
        speculative_generate(target, head, PROMPT, gamma=3, **limit),
        tree_generate(target, head, PROMPT, branching=(1, 1, 1), **limit),
    ):
        assert torch.equal(out.sequences, expected) and same_counts(out.stats, counts, 3)


@pytest.mark.parametrize("padded", [False, True])
def test_sampling_is_lossless(small, padded):
    """Every continuation of 4 tokens against its exact probability, rows decoded together; false
    alarms 1e-4 each."""
    target, head = small
    device = target.device
    prompts = torch.tensor([[1, 0, 3], [4, 4, 2]], device=device)
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]], device=device)
    rows = 2 if padded else 1
    generator = torch.Generator(device).manual_seed(0)
    out = speculative_generate(
        target,
        head,
        prompts[:rows].repeat(6000, 1),
        mask.repeat(6000, 1) if padded else None,
        max_new_tokens=4,
        gamma=3,
        temperature=1.0,
        generator=generator,
    )
    own = out.sequences[rows - 1 :: rows, 3:].cpu()
    code = (own * torch.tensor([125, 25, 5, 1])).sum(1)
    counts = torch.bincount(code, minlength=625).double()
    prompt = prompts[1:, 2:] if padded else prompts[:1]
    expected = enumerate_texts(target, prompt, 4, 5) * counts.sum()
    statistic, critical = chi_square(counts, expected)
    assert statistic < critical
    assert 0.3 < out.stats.alpha < 0.99


def test_tree_sampling_is_lossless(small):
    """One by one, with one generator throughout; the two tokens that a tree of depth 2 judges after
    the first; false alarms 1e-4."""
    target, head = small
    counts, stats = torch.zeros(25, dtype=torch.float64), Stats()
    prompt = torch.tensor([[1, 0, 3]])
    settings = {"branching": (2, 2), "max_new_tokens": 4, "temperature": 1.0}
    settings["generator"] = torch.Generator().manual_seed(0)
    for _ in range(300):
        out = tree_generate(target, head, prompt, **settings)
        counts[int(5 * out.sequences[0, 4] + out.sequences[0, 5])] += 1
        stats += out.stats
    texts = enumerate_texts(target, prompt, 4, 5).view(5, 25, 5)
    statistic, critical = chi_square(counts, texts.sum((0, 2)) * 300)
    assert statistic < critical
    assert stats.rejected > 20 and stats.accepted > 200 and stats.per_position[0][1] > 20


def test_the_evaluator_sees_what_a_rounds_first_draft_is_made_from(heads):
    """At every token of the target's own text, and in a batch padded on the right."""
    target, head = heads["llama"]
    text = autoregressive_generate(target, PROMPT, max_new_tokens=40)[0].tolist()
    guesses = [int(slow_logits(target, head, text[:n], []).argmax()) for n in range(5, 45)]
    input_ids = torch.tensor([text, text[:30] + [0] * 15])
    labels = torch.tensor([[-100] * 5 + text[5:], [-100] * 5 + text[5:30] + [-100] * 15])
    agree = [guess == token for guess, token in zip(guesses, text[5:], strict=True)]
    for temperature in (0.0, 1.0):
        exact = expected_acceptance(target, head, input_ids, labels, temperature)
        assert exact.agree.tolist() == agree + agree[:25]
    assert 3 < sum(agree) < 40


def test_nothing_of_the_target_is_changed(heads):
    target, head = heads["neox"]
    before = speculative_generate(target, None, PROMPT, max_new_tokens=8).sequences
    head.train()
    after = speculative_generate(target, head, PROMPT, max_new_tokens=8).sequences
    assert torch.equal(after, before) and head.training
    head.eval()
    assert not target.base_model._forward_hooks
    for name, weight in target.named_parameters():
        used = name.split(".")[-2] in ("embed_in", "lm_head", "embed_out")
        assert weight.requires_grad != used, "only what the head uses is frozen"


# The head


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_head_is_one_layer_of_the_targets_kind_without_norms_at_either_end(heads, name):
    target, head = heads[name]
    stacks = [m for m in target.base_model.modules() if isinstance(m, torch.nn.ModuleList)]
    layer = max(stacks, key=len)[0]
    norms = ("input_layernorm", "ln_1")
    expected = {key for key, _ in layer.named_parameters() if not key.startswith(norms)}
    keys = [key.split(".", 3) for key, _ in head.named_parameters()]
    assert {key[3] for key in keys if key[0] == "trunk"} == expected
    assert {key[2] for key in keys if key[0] == "trunk"} == {"0"}
    assert [".".join(key) for key in keys if key[0] != "trunk"] == ["fuse.weight", "fuse.bias"]


def test_noise_is_for_training_alone_and_of_its_width(make_head, examples):
    """On the target's states, and not on the guesses that take their place deeper down."""
    _, states, head = make_head()
    batch = make_batch(examples, [0], CPU)
    true = eagle.previous_states(states.all_states(batch))
    inputs = []
    head.fuse.register_forward_hook(lambda module, args, output: inputs.append(args[0][..., 32:]))
    head.depth = 2
    head.train().response_states(batch)
    head.eval().response_states(batch)
    noise = inputs[0] - true
    assert 0.08 < noise.abs().max() <= 0.1 + 1e-6 and noise.min() < -0.08
    assert len(inputs) == 3 and torch.equal(inputs[2], true)
    head.train().noise = 0.0
    inputs.clear()
    head.response_states(batch)
    guesses = head.unroll(batch.input_ids, true, 1)
    assert torch.equal(inputs[0], true)
    assert torch.allclose(inputs[1], eagle.previous_states(guesses[0]), atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_unrolled_guesses_are_those_of_drafting(heads, name):
    """At every token and level, against the slow sampler."""
    target, head = heads[name]
    text = autoregressive_generate(target, PROMPT, max_new_tokens=5)[0].tolist()
    states = target.base_model(torch.tensor([text])).last_hidden_state
    with torch.no_grad():
        guesses = head.unroll(torch.tensor([text]), eagle.previous_states(states), 3)
        logits = [head.frozen[1](each)[0] for each in guesses]
    for level in range(3):
        for end in range(level + 1, len(text) + 1):
            start = end - level
            expected = slow_logits(target, head, text[:start], text[start:end])
            assert torch.allclose(logits[level][end - 1], expected, atol=1e-4)


# Training


@pytest.fixture
def make_head(make_model, examples):
    """make_head(architecture, noise, seed, token_ids): a target, its states over 24 rows, and a
    head that learns from them."""

    def make(architecture="neox", noise=0.1, seed=3, token_ids=None):
        target = make_model(architecture, seed=1, initializer_range=0.2)
        states = TargetStates(Frozen(target, 400, token_ids), examples[:24])
        torch.manual_seed(seed)
        head = Eagle(target, noise, token_ids).to(target.device)
        head.teacher = states
        return target, states, head

    return make


def train_head(head, examples, step=eagle_step, **settings):
    settings = {"vocab_size": 400, "lr": 3e-3, "epochs": 1, "batch_size": 8} | settings
    return train(head, examples, step, [head.teacher], **settings)


def plain_loss(target, head, reference, examples, k):
    """The losses written out, row by row and without padding: mean over the selected tokens."""
    kl, distance, gap = [], [], []
    for ids, prompt, _ in examples:
        ids = torch.from_numpy(ids).long()[None]
        with torch.no_grad():
            true = target.base_model(ids).last_hidden_state
            p = target(ids).logits[0, prompt - 1 : -1, :400]
        states = torch.cat([torch.zeros_like(true[:, :1]), true[:, :-1]], 1)
        out, reference_out = (model(ids, states, use_cache=False) for model in (head, reference))
        kl.append(token_kl(p, out.logits[0, prompt - 1 : -1, :400]))
        guess = out.hidden_states[0][0, prompt - 1 : -1]
        difference = (guess - true[0, prompt - 1 : -1]).abs()
        smooth = torch.where(difference < 1, difference**2 / 2, difference - 0.5)
        distance.append(smooth.mean(1))
        reference_kl = token_kl(p, reference_out.logits[0, prompt - 1 : -1, :400])
        gap.append((kl[-1] - reference_kl).detach())
    selected = select_tokens(torch.cat(gap), k)
    loss = torch.cat(distance) + 0.1 * torch.cat(kl)
    return loss[selected].mean(), int(selected.sum())


def test_a_step_is_the_mean_over_depths(make_head, examples):
    """Losses and gradient of the guesses that drafting makes, on all tokens and on the selected
    ones of the first draft."""
    _, states, head = make_head("llama", noise=0)
    batch = make_batch(examples, list(range(6)), CPU)
    student = Student(head, 400)
    rows = torch.arange(len(batch.index))
    inputs = eagle.previous_states(states.all_states(batch))
    parts = [
        guesses.flatten(0, 1)[batch.index] for guesses in head.unroll(batch.input_ids, inputs, 3)
    ]
    expected = sum(eagle_loss(student, part, batch, states, rows) for part in parts) / 3
    expected.backward()
    expected_gradient = head.fuse.weight.grad.clone()
    head.zero_grad()
    head.depth = 3
    loss, count = eagle_step(student, batch, states)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and count == len(rows)
    assert torch.allclose(head.fuse.weight.grad, expected_gradient, rtol=1e-4, atol=1e-6)
    gap = torch.linspace(0, 1, len(rows))
    kl = student.head.token_losses(parts[0].detach(), *token_loss("fkl", states, batch))
    method = Method("adaspec", k=0.3)
    loss, count = eagle_adaspec_step(student, batch, states, Losses(kl - gap), method)
    chosen = select_tokens(gap, 0.3).nonzero().squeeze(1)
    expected = sum(eagle_loss(student, part, batch, states, chosen) for part in parts) / 3
    assert count == len(chosen) and loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_states_loss_has_its_weight(make_head, examples):
    """In both steps; at 0 a head learns from the distributions alone."""
    _, states, head = make_head("llama", noise=0)
    batch = make_batch(examples, list(range(6)), CPU)
    student, rows = Student(head, 400), torch.arange(len(batch.index))
    hidden = student.hidden(batch)
    divergence = 0.1 * student.head.loss(hidden, *token_loss("fkl", states, batch))
    distance = eagle_loss(student, hidden, batch, states, rows) - divergence
    reference = Losses(torch.zeros(len(rows)))
    for weight in (0, 2.5):
        expected = (divergence + weight * distance).item()
        loss, _ = eagle_step(student, batch, states, weight)
        assert distance > 0 and loss.item() == pytest.approx(expected, rel=1e-5)
        inputs = (reference, Method("adaspec", k=1.0), weight)
        loss, _ = eagle_adaspec_step(student, batch, states, *inputs)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("k", [None, 0.4])
@pytest.mark.parametrize("architecture", ["neox", "llama"])
def test_steps_are_the_losses_written_out(make_head, examples, architecture, k):
    """Value, tokens and every gradient, uniform and on selected tokens."""
    target, states, head = make_head(architecture, noise=0)
    _, _, reference = make_head(architecture, noise=0, seed=9)
    batch = make_batch(examples, list(range(6)), CPU)
    student = Student(head, 400)
    if k:
        losses = ReferenceLoss(Frozen(reference, 400), states, "fkl")
        loss, count = eagle_adaspec_step(student, batch, states, losses, Method("adaspec", k=k))
    else:
        loss, count = eagle_step(student, batch, states)
    (loss / count).backward()
    gradient = torch.cat([p.grad.flatten() for p in head.parameters()])
    head.zero_grad()
    expected, tokens = plain_loss(target, head, reference, examples[:6], k or 1.0)
    expected.backward()
    expected_gradient = torch.cat([p.grad.flatten() for p in head.parameters()])
    assert (loss / count).item() == pytest.approx(expected.item(), rel=1e-5) and count == tokens
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
    assert all(p.grad is None for p in target.parameters())


class Losses:
    """A reference whose losses are given."""

    def __init__(self, values):
        self.values = values

    def losses(self, batch):
        return self.values


def test_the_filter_is_adaspecs_and_over_all_ranks(make_head, examples, monkeypatch):
    """Another rank's larger gaps take the places of this one's; a NaN gap is a NaN loss."""
    assert eagle.select_tokens is adaspec.select_tokens
    assert eagle.gather_gaps is adaspec.gather_gaps
    _, states, head = make_head(noise=0)
    batch = make_batch(examples, [0, 1], CPU)
    n = len(batch.index)
    student, method = Student(head, 400), Method("adaspec", k=0.5)
    losses = Losses(torch.zeros(n))
    assert eagle_adaspec_step(student, batch, states, losses, method)[1] == -(-n // 2)

    def gather_gaps(gap):
        others = torch.full((n,), 1e9)
        return torch.cat([others[: n // 2], gap]), slice(n // 2, None)

    monkeypatch.setattr(eagle, "gather_gaps", gather_gaps)
    loss, count = eagle_adaspec_step(student, batch, states, losses, method)
    assert loss.isfinite() and count == -(-(n + n // 2) // 2) - n // 2
    losses.values = torch.full((n,), torch.nan)
    assert eagle_adaspec_step(student, batch, states, losses, method)[0].isnan()


def test_training_lowers_the_loss_and_raises_the_accuracy(make_head, examples, tmp_path):
    """From the cache, which changes nothing but rounding; the accuracy is the evaluator's
    agreement."""
    curves = []
    for cached in (False, True):
        target, states, head = make_head()
        first = training_accuracy(head.eval(), examples[:24], 400)
        if cached:
            cache = TokenCache(tmp_path, "a", all_tokens(examples[:24]), 32, torch.float32, 5)
            states.teacher.use(cache, "target")
        losses = []

        def record(*inputs, losses=losses):
            loss, count = eagle_step(*inputs)
            losses.append(loss.item() / count)
            return loss, count

        train_head(head, examples[:24], record, epochs=4)
        curves.append(losses)
        last = training_accuracy(head, examples[:24], 400, rows_at_once=7)
        assert losses[-1] < 0.8 * losses[0] and last > first
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    input_ids, labels = collate(examples[:24])
    agree = expected_acceptance(target, head, input_ids, labels, vocab_size=400).agree
    assert agree.float().mean() == pytest.approx(last)


@pytest.mark.parametrize("token_ids", [None, torch.arange(1, 400, 3)])
def test_alpha_is_watched_as_the_evaluator_sees_it(make_head, examples, token_ids):
    """On held-out rows, of which the head in training reads the target's states too."""
    target, states, head = make_head(token_ids=token_ids)
    validation = HeadValidation(examples[24:32], rows_at_once=3)
    rows = []
    hook = target.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    validation.ask(states.teacher)
    hook.remove()
    assert sum(rows) == 8, "the target is asked about each row once"
    alpha = validation.alpha(head.train(), Head(head, 400), torch.float32)
    exact = expected_acceptance(target, head.eval(), *collate(examples[24:32]), vocab_size=400)
    assert alpha == pytest.approx(exact.overlap.mean().item(), abs=1e-5)
    assert head.teacher is states


def test_accuracy_is_over_all_ranks_with_equal_forwards(make_head, examples, monkeypatch):
    """Of 7 rows, 3 at once, rank 0 has 4 and rank 1 has 3: two forwards of the target on each."""
    _, states, head = make_head(noise=0)
    expected = training_accuracy(head.eval(), examples[:7], 400)
    hidden, batches, parts = states.teacher.hidden, [], []
    monkeypatch.setattr(
        states.teacher, "hidden", lambda batch: batches.append(batch) or hidden(batch)
    )
    monkeypatch.setattr(eagle, "world_size", lambda: 2)
    monkeypatch.setattr(eagle, "gather_objects", lambda part: parts.append(part) or parts)
    for rank in (0, 1):
        monkeypatch.setattr(eagle, "rank", lambda rank=rank: rank)
        value = training_accuracy(head, examples[:7], 400, rows_at_once=3)
    assert value == pytest.approx(expected)
    assert [len(batch.rows) for batch in batches] == [3, 1, 3, 1]
    assert sum(tokens for _, tokens in parts) == len(make_batch(examples, range(7), CPU).index)


def test_bfloat16_follows_float32(make_head, make_model, examples):
    """As on a GPU: float32 weights under autocast, the target's states and head in bfloat16."""
    _, _, exact = make_head(noise=0)
    _, _, head = make_head(noise=0)
    half = make_model(seed=1, initializer_range=0.2).to(torch.bfloat16)
    head.teacher = TargetStates(Frozen(half, 400), examples[:24])
    exact_loss = train_head(exact, examples[:24])["loss"]
    loss = train_head(head, examples[:24], dtype="bfloat16")["loss"]
    assert loss == pytest.approx(exact_loss, rel=0.05)
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    accuracies = [training_accuracy(model, examples[:24], 400) for model in (exact, head)]
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.05)


def test_resume_is_bit_for_bit(make_head, examples, tmp_path):
    """Noise and all: the states of the generators are in the checkpoint, the target's weights are
    not."""
    undisturbed = make_head()[2]
    train_head(undisturbed, examples[:24], epochs=2)
    head, calls = make_head()[2], []

    def stopping(*inputs):
        calls.append(1)
        if len(calls) == 4:
            ranks.stop_signal = signal.SIGTERM
        return eagle_step(*inputs)

    checkpoints = Checkpoints(tmp_path, "a")
    with pytest.raises(ranks.Stopped):
        train_head(head, examples[:24], stopping, epochs=2, checkpoints=checkpoints)
    ranks.stop_signal = None
    resumed = make_head(seed=99)[2]
    state = torch.load(checkpoints.newest(), weights_only=True)["model"]
    assert set(state) == set(resumed.state_dict())
    assert len(state) == len(list(resumed.parameters()))
    train_head(resumed, examples[:24], epochs=2, checkpoints=checkpoints)
    for weight, expected in zip(resumed.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(weight, expected)


# Files and refusals


def test_files_hold_a_short_head(short, tmp_path):
    target, head = short
    head.save_pretrained(tmp_path)
    again = Eagle.from_pretrained(tmp_path, target)
    assert torch.equal(again.token_ids, head.token_ids)
    outs = [speculative_generate(target, m, PROMPT, max_new_tokens=20) for m in (head, again)]
    assert torch.equal(outs[0].sequences, outs[1].sequences) and outs[0].stats == outs[1].stats


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_files_hold_the_head_alone(heads, tmp_path, name, monkeypatch):
    target, head = heads[name]
    monkeypatch.setattr(head, "noise", 0.25)
    head.save_pretrained(tmp_path / "head")
    files = sorted(path.name for path in (tmp_path / "head").iterdir())
    assert files == ["eagle.json", "eagle.safetensors"]
    again = Eagle.from_pretrained(tmp_path / "head", target)
    assert again.state_dict().keys() == head.state_dict().keys()
    assert not again.training and again.noise == 0.25
    embedding = target.get_input_embeddings().weight
    assert not any(value.shape == embedding.shape for value in head.state_dict().values())
    outs = [speculative_generate(target, m, PROMPT, max_new_tokens=20) for m in (head, again)]
    assert torch.equal(outs[0].sequences, outs[1].sequences) and outs[0].stats == outs[1].stats
    half = Eagle.from_pretrained(tmp_path / "head", copy.deepcopy(target).to(torch.bfloat16))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_wrong_folders_and_targets_are_refused(heads, tmp_path):
    target, head = heads["llama"]
    head.save_pretrained(tmp_path)
    for other in (heads["neox"][0], build("llama", vocab=41), build("llama", hidden=48)):
        with pytest.raises(ValueError, match="was made for a target with"):
            Eagle.from_pretrained(tmp_path, other)
    with pytest.raises(ValueError, match="does not fit LlamaForCausalLM"):
        Eagle.from_pretrained(tmp_path, build("llama", attention_bias=True))
    record = json.loads((tmp_path / "eagle.json").read_text())
    for broken in ("{", "[]", json.dumps(record).replace("hidden", "x")):
        (tmp_path / "eagle.json").write_text(broken)
        with pytest.raises(ValueError, match="holds no EAGLE head"):
            Eagle.from_pretrained(tmp_path, target)
    (tmp_path / "eagle.json").write_text(json.dumps(record))
    weights = tmp_path / "eagle.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="holds no EAGLE head"):
            Eagle.from_pretrained(folder, target)


def test_targets_that_give_no_positions_or_states_are_refused():
    sizes = {"vocab_size": 40, "hidden_size": 32, "pad_token_id": 1}
    bloom = AutoModelForCausalLM.from_config(BloomConfig(n_layer=1, n_head=4, **sizes))
    with pytest.raises(ValueError, match="BloomForCausalLM takes no position_ids"):
        Eagle(bloom)
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"word_embed_proj_dim": 32, "ffn_dim": 64}
    opt = AutoModelForCausalLM.from_config(OPTConfig(**sizes)).eval()
    with pytest.raises(ValueError, match="OPTForCausalLM does not call its base_model"):
        speculative_generate(opt, Eagle(opt), PROMPT, max_new_tokens=5)
    assert not opt.base_model._forward_hooks


# The stages and the command


@pytest.fixture
def target_folder(make_model, tokenizer, tmp_path):
    """A target with tied embeddings and a padded head."""
    folder = tmp_path / "models" / "SmolLM2-135M-Instruct"
    for part in (make_model("llama", initializer_range=0.3), tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("cache_gb", [100.0, 0.0])
def test_stages_of_a_cell(target_folder, tmp_path, monkeypatch, cache_gb):
    """The reference is EAGLE's own head where the epochs agree; the target's rows are counted as
    they are run: once for a cache, else in every step and for the accuracy."""
    target_rows = []

    def load_model(path, dtype, device):
        model = models.load_model(path, dtype, device)

        def note(module, args, kwargs):
            if kwargs["input_ids"].shape[1] > 8:  # Head.check's are 8 long
                target_rows.append(len(kwargs["input_ids"]))

        model.base_model.register_forward_pre_hook(note, with_kwargs=True)
        return model

    starts = []

    def train_spy(head, *inputs, **options):
        starts.append(head.fuse.weight.detach().clone())
        return train(head, *inputs, **options)

    monkeypatch.setattr(stages, "load_model", load_model)
    monkeypatch.setattr(eagle, "train", train_spy)
    results = []
    monkeypatch.setattr(eagle, "evaluate_drafts", lambda *evaluation: results.append(evaluation))
    settings = replace(
        EagleSettings(), limit=24, max_length=128, max_new_tokens=6, eval_prompts=2, batch=8,
        epochs=(0, 1, 2), dtype="float32", cache_gb=cache_gb, out=str(tmp_path / "out"),
        validation_rows=0,
    )  # fmt: skip
    pairs = {"toy": Pair(str(target_folder), None)}
    cell = prepare_cell("toy", "arithmetic", 0, settings, CPU, pairs)
    methods = [
        Method("distillspec", epochs=1),
        Method("adaspec"),
        Method("adaspec", k=0.2, reference_epochs=2),
        Method("distillspec"),
    ]
    run_heads(cell, methods)
    _, target, heads, costs, load = results[0]
    labels = ["EAGLE epochs=1", "EAGLE + AdaSPEC", "EAGLE + AdaSPEC k=0.2 reference_epochs=2"]
    assert list(heads) == [*labels, "EAGLE"]
    assert sorted(path.name for path in cell.folder.iterdir()) == [
        "eagle-adaspec",
        "eagle-adaspec-k-0.2-reference_epochs-2",
        "eagle-distilled-1-epochs",
        "eagle-distilled-2-epochs",
    ]
    records = {
        label: json.loads(Path(head.path, "stage.json").read_text())
        for label, head in heads.items()
    }
    reference = heads["EAGLE epochs=1"].fingerprint
    assert records["EAGLE + AdaSPEC"]["settings"]["reference"] == reference
    assert records["EAGLE + AdaSPEC"]["settings"]["k"] == 0.4
    assert {record["settings"]["target"] for record in records.values()} == {target.fingerprint}
    assert len(starts) == 4 and all(torch.equal(start, starts[0]) for start in starts)
    tokens = {label: record["summary"]["loss_tokens"] for label, record in records.items()}
    for label, k in ((labels[1], 0.4), (labels[2], 0.2)):
        assert tokens[label] == pytest.approx(k * tokens["EAGLE"], rel=0.05)
    forwards = {}
    for record in records.values():
        forwards |= record["summary"]["target_forwards"]
    # in steps: 1, 2, 2 and 2 epochs of the four heads
    assert sum(forwards.values()) == sum(target_rows) == (24 if cache_gb else 24 * (7 + 4))
    assert costs["EAGLE + AdaSPEC"]["epochs"] == 3 and costs["EAGLE"]["epochs"] == 2
    for label, head in heads.items():
        network = load(head.path, torch.float32, CPU)
        assert isinstance(network, Eagle) and not network.training
        assert costs[label]["accuracy"] == records[label]["summary"]["accuracy"]
        states = TargetStates(Frozen(load(target.path, torch.float32, CPU), 400), cell.examples)
        network.teacher = states
        accuracy = training_accuracy(network, cell.examples, 400)
        assert costs[label]["accuracy"] == pytest.approx(accuracy, abs=2e-3)


def test_heads_of_another_depth_or_weight_are_others(target_folder, tmp_path, monkeypatch):
    """In one folder: trained so, under a name of their own, and said to be so."""
    trained, results = [], []

    def train_spy(head, examples, step, step_inputs, **options):
        trained.append((head.depth, step_inputs[-1]))
        return train(head, examples, step, step_inputs, **options)

    monkeypatch.setattr(eagle, "train", train_spy)
    monkeypatch.setattr(eagle, "evaluate_drafts", lambda *evaluation: results.append(evaluation))
    settings = replace(
        EagleSettings(), limit=8, max_length=128, eval_prompts=2, batch=8, epochs=(0, 1, 1),
        dtype="float32", out=str(tmp_path / "out"), validation_rows=0,
    )  # fmt: skip
    pairs = {"toy": Pair(str(target_folder), None)}
    for depth, weight in ((1, 1.0), (3, 1.0), (3, 0.0)):
        other = replace(settings, depth=depth, state_weight=weight)
        cell = prepare_cell("toy", "arithmetic", 0, other, CPU, pairs)
        run_heads(cell, [Method("adaspec")])
    assert trained == [(1, 1.0)] * 2 + [(3, 1.0)] * 2 + [(3, 0.0)] * 2
    heads = [next(iter(heads.items())) for _, _, heads, _, _ in results]
    costs = [next(iter(costs.values())) for _, _, _, costs, _ in results]
    changes = ["", " depth=3", " depth=3 state-weight=0"]
    assert [label for label, _ in heads] == [f"EAGLE + AdaSPEC{change}" for change in changes]
    suffixes = ["", "-depth-3", "-depth-3-state-weight-0"]
    assert [Path(head.path).name for _, head in heads] == [f"eagle-adaspec{x}" for x in suffixes]
    assert len({head.fingerprint for _, head in heads}) == 3
    record = storage.read_json(Path(heads[0][1].path, "stage.json"))["settings"]
    assert record["init"] == {"kind": "EAGLE head", "weights of losses": [1.0, 0.1]}
    settings_of_rows = [(cost["depth"], cost["state_weight"]) for cost in costs]
    assert settings_of_rows == [(1, 1.0), (3, 1.0), (3, 0.0)]


@pytest.mark.parametrize(("target", "is_said"), [("a", False), ("b", True)])
def test_a_head_of_another_target_is_said_to_be_so(tmp_path, capsys, target, is_said):
    """Its shapes may fit all the same."""
    storage.write_json(tmp_path / "stage.json", {"settings": {"target": "a"}})
    (tmp_path / "eagle.safetensors").write_bytes(b"weights")
    settings = EagleSettings(head=str(tmp_path), out=str(tmp_path))
    head = given_head(SimpleNamespace(settings=settings), Model("folder", target))
    assert ("was trained for another target" in capsys.readouterr().out) is is_said
    assert head.path == str(tmp_path)


SHORT = (
    "--preset tiny --limit 24 --batch 8 --max-steps 2 --eval-prompts 2 --timed-prompts 1 "
    "--max-new-tokens 8"
).split()


@pytest.mark.slow
def test_command_ends_in_the_table_and_uses_heads_again(
    target_folder, tmp_path, monkeypatch, capsys
):
    """A target from scratch that two seeds share, and one of the user's own, with short output
    heads; again, nothing runs. A head is then measured as it is."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setitem(eagle.PAIRS, "tiny-eagle", Pair(sizes, None, target_lr=1e-3, lr=2e-3))
    flags = {
        "tiny-eagle": ["--seeds", "0,1", "--target-seed", "0"],  # the preset's pair
        "own": ["--target", str(target_folder), "--draft-vocab", "100"],
    }
    for name, more in flags.items():
        command = [*SHORT, "--out", str(tmp_path / name), *more]
        eagle.main(command)
        out = capsys.readouterr().out
        rows = json.loads((tmp_path / name / "results.json").read_text())["rows"]
        pair = rows[0]["pair"]
        assert {row["draft"] for row in rows} == {"EAGLE", "EAGLE + AdaSPEC"}
        for row in rows:
            assert row["speedup"] > 0 and row["seconds_per_response"] > 0
            assert 0 <= row["accuracy"] <= 1 and "tau_by_gamma" not in row
        assert f"| arithmetic | {pair} | 0.0 | over EAGLE | " in out
        assert "training accuracy" in out
        folder = tmp_path / name / pair / "arithmetic" / "seed0"
        assert not (folder / "cache").exists()
        target = folder / "target" if name == "tiny-eagle" else target_folder
        target = AutoModelForCausalLM.from_pretrained(target)
        head = Eagle.from_pretrained(folder / "eagle-adaspec", target)
        assert head.config.num_hidden_layers == 1
        assert name == "tiny-eagle" or len(head.token_ids) == rows[0]["draft_vocab"] == 100
        assert ("coverage" in rows[0]) == ("short head: 100 of " in out) == (name == "own")
    eagle.main(command)
    out = capsys.readouterr().out
    assert "last loss" not in out and "eagle-adaspec: done before" in out
    assert f"| arithmetic | {pair} | 0.0 | over EAGLE | " in out
    assert not (tmp_path / "tiny-eagle" / "tiny-eagle" / "arithmetic" / "seed1" / "target").exists()
    measured = ["--target", str(target_folder), "--head", str(folder / "eagle-adaspec")]
    eagle.main([*SHORT, "--out", str(tmp_path / "measured"), *measured])
    rows_again = json.loads((tmp_path / "measured" / "results.json").read_text())["rows"]
    expected = [row["alpha"] for row in rows if row["draft"] == "EAGLE + AdaSPEC"]
    assert [row["alpha"] for row in rows_again] == expected
    assert {row["draft"] for row in rows_again} == {"base"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--methods none", "unknown name 'none', expected one of distillspec, adaspec, best"),
        ("--pairs pythia", "unknown name 'pythia', expected one of tiny-eagle, custom"),
        ("--head tests", "--head is measured as it is: give --target, no --pairs"),
        ("--head tests --target x --draft-vocab 9", "no --pairs, --draft-vocab, --depth or"),
        ("--head tests --target x --depth 2", "no --pairs, --draft-vocab, --depth or"),
        ("--head tests --target x --state-weight 0", "--draft-vocab, --depth or --state-weight"),
        ("--state-weight -1", "argument --state-weight: must be a number at least 0"),
        ("--pairs custom", "the pair custom needs --target\n"),
        ("--data target", "unrecognized arguments: --data target"),
        ("--divergence tvd", "unrecognized arguments: --divergence tvd"),
        ("--draft x", "unrecognized arguments: --draft x"),
        ("--k 0", "argument --k: must be a number above 0 and at most 1"),
        ("--match rows", "argument --match: unknown name 'rows', expected one of steps, epochs, "),
        ("--max-new-tokens 2", "must be a whole number of at least 3"),
    ],
)
def test_what_a_head_cannot_do_is_refused_in_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        eagle.main(flags.split())
    message = capsys.readouterr().err
    assert end.value.code == 2 and words in message and message.count("\n") == 1


def test_flags_and_methods(tmp_path):
    settings, methods = eagle.parse_arguments(["--k", "0.2", "--methods", "AdaSPEC"])
    assert methods == [Method("adaspec", k=0.2)] and settings.split == "test"
    assert settings.pairs == ("tiny-eagle",)
    _, methods = eagle.parse_arguments(["--match", "tokens"])
    assert methods == [Method("distillspec"), Method("adaspec", match="tokens")]
    assert eagle.parse_arguments(["--preset", "tiny"])[0].pairs == ("tiny-eagle",)
    flags = ["--preset", "tiny", "--target", "x"]
    assert eagle.parse_arguments(flags)[0].pairs == ("custom",)
    settings, methods = eagle.parse_arguments(["--target", "x", "--head", str(tmp_path)])
    assert settings.head == str(tmp_path) and settings.methods == ("none",) and not methods
    with pytest.raises(ValueError, match="holds no EAGLE head"):
        eagle.prepare_head("custom", "gsm8k", 0, settings, CPU)
    assert [method.label for method in eagle.parse_arguments([])[1]] == ["DistillSpec", "AdaSPEC"]


# On a GPU, as in tests/test_gpu.py


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
def test_sampling_is_lossless_on_a_gpu(small, device, padded):
    target, head = copy.deepcopy(small)
    test_sampling_is_lossless((target.to(device), head.to(device)), padded)


@pytest.mark.gpu
def test_bfloat16_follows_float32_on_a_gpu(make_head, make_model, examples, device):
    def make_head_there(**settings):
        target, states, head = make_head(**settings)
        target.to(device)
        return target, states, head.to(device)

    def make_model_there(**sizes):
        return make_model(**sizes).to(device)

    test_bfloat16_follows_float32(make_head_there, make_model_there, examples)
