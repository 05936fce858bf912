"""speculative.py: losslessness, every trap of DESIGN.md, batches, counts, offline acceptance and the command line.

Statistical tests use fixed seeds, so they pass or fail for good; the stated false-alarm rate is the chance that an unlucky
seed would have failed a correct sampler.
"""

import copy
import itertools
import json
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CodeGenConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

import speculative
from speculative import (
    Stats,
    autoregressive_generate,
    bootstrap_interval,
    expected_acceptance,
    simulate_rounds,
    speculative_generate,
)

ARCHITECTURES = ["neox", "llama", "phi", "codegen"]
CONTEXT = 64


def build(architecture="llama", vocab=40, seed=0, hidden=32, **extra):
    """A random model whose next-token distributions are far from uniform and differ from prefix to prefix."""
    common = {"vocab_size": vocab, "initializer_range": 0.4, "bos_token_id": None, "eos_token_id": None} | extra
    sizes = {"hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * hidden}
    sizes["max_position_embeddings"] = CONTEXT
    config = {
        "neox": lambda: GPTNeoXConfig(**sizes, **common),
        "llama": lambda: LlamaConfig(**sizes, num_key_value_heads=2, **common),
        "phi": lambda: PhiConfig(**sizes, **common),
        "codegen": lambda: CodeGenConfig(
            n_embd=hidden, n_layer=2, n_head=4, n_ctx=CONTEXT, n_positions=CONTEXT, rotary_dim=4, **common
        ),
    }[architecture]()
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def noised(model, scale=0.15, seed=1):
    """A draft that agrees with the model now and then."""
    torch.manual_seed(seed)
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.ndim > 1:
                parameter += scale * parameter.std() * torch.randn_like(parameter)
    return draft


def biased(model, bias):
    """A Phi model with the output bias given."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.as_tensor(bias, dtype=torch.float32))
    return model


@pytest.fixture(scope="module")
def pairs():
    """A target and a half-agreeing draft of every architecture."""
    targets = {name: build(name, seed=5) for name in ARCHITECTURES}
    return {name: (target, noised(target)) for name, target in targets.items()}


@pytest.fixture(scope="module")
def small():
    """A target and drafts over five tokens, so that all continuations can be enumerated."""
    target = build("llama", vocab=5, hidden=16, initializer_range=0.25)
    return target, noised(target, 0.6), build("llama", vocab=5, seed=9, hidden=16, initializer_range=0.25)


@pytest.fixture(scope="module")
def prompts():
    """Four left-padded prompts of 10, 7, 3 and 1 tokens, among them the token 0."""
    ids = torch.randint(0, 40, (4, 10), generator=torch.Generator().manual_seed(3))
    ids[:, -1] = torch.tensor([4, 0, 7, 0])
    mask = (torch.arange(10) >= torch.tensor([[0], [3], [7], [9]])).long()
    return ids, mask


def transformers_greedy(model, ids, n):
    # the mask must be given: without one, generate takes a pad token (here id 0) inside the prompt for padding
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0)


def slow_greedy(target, draft, prompt, max_new_tokens, gamma, ends=()):
    """Greedy speculative decoding re-stated without caches, batches or shared code: (tokens, counts)."""

    def best(model, tokens):
        with torch.no_grad():
            return int(model(torch.tensor([tokens])).logits[0, -1].argmax())

    text, counts = [], dict.fromkeys(("rounds", "drafted", "accepted", "rejected", "target_calls", "generated", "cut"), 0)
    counts["never_judged"] = 0
    accepted_at, judged_at = [0] * gamma, [0] * gamma
    while len(text) < max_new_tokens and not (text and text[-1] in ends):
        usable = min(gamma, max_new_tokens - len(text) - 1)
        drafts = []
        while len(drafts) < usable:
            drafts.append(best(draft, prompt + text + drafts))
        counts["target_calls"] += 1
        counts["rounds"] += usable > 0
        status = []
        for i, token in enumerate(drafts):
            if "rejected" in status:
                status.append("never_judged")
                continue
            judged_at[i] += 1
            truth = best(target, prompt + text)
            text.append(truth)
            status.append("accepted" if token == truth else "rejected")
            accepted_at[i] += token == truth
            if truth in ends and token == truth:
                counts["cut"] += 1
                break
        else:
            if "rejected" not in status:
                text.append(best(target, prompt + text))
        for name in status:
            counts[name] += 1
        counts["drafted"] += len(status)
    counts["generated"] = len(text)
    return text, Stats(**counts, per_position=(accepted_at, judged_at))


def same_counts(a, b, gamma):
    """Equal counts; lists of positions may differ by zeros at the end."""
    pad = Stats(per_position=([0] * gamma, [0] * gamma))
    return a + pad == b + pad


# --- temperature 0: token for token the target's own output -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["itself", "half-agreeing", "unrelated"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_the_targets_own(pairs, prompts, name, kind):
    target, half = pairs[name]
    draft = {"itself": target, "half-agreeing": half, "unrelated": build(name, seed=77)}[kind]
    ids, mask = prompts
    for row, gamma in ((0, 1), (1, 4), (2, 6)):
        prompt = ids[row : row + 1, mask[row].bool()]
        expected = transformers_greedy(target, prompt, 40)
        out = speculative_generate(target, draft, prompt, max_new_tokens=40, gamma=gamma)
        assert torch.equal(out.sequences, expected)
        assert torch.equal(autoregressive_generate(target, prompt, max_new_tokens=40), expected)
        if kind == "itself":  # also: the draft's cache is right after a round that was accepted as a whole
            assert out.stats.alpha == 1 and out.stats.target_calls == math.ceil(40 / (gamma + 1))
        if kind == "half-agreeing":
            assert 0.1 < out.stats.alpha < 0.95
        if kind == "unrelated":
            assert out.stats.alpha < 0.5


def test_models_of_different_architectures_can_be_paired(pairs, prompts):
    ids = prompts[0][:1]
    expected = transformers_greedy(pairs["phi"][0], ids, 30)
    assert torch.equal(speculative_generate(pairs["phi"][0], pairs["codegen"][0], ids, max_new_tokens=30).sequences, expected)


@pytest.mark.parametrize("max_new_tokens", range(1, 10))
def test_limit_inside_a_block(pairs, prompts, max_new_tokens):
    target, half = pairs["neox"]
    ids = prompts[0][:1]
    expected = transformers_greedy(target, ids, max_new_tokens)
    for draft in (target, half):
        out = speculative_generate(target, draft, ids, max_new_tokens=max_new_tokens, gamma=4)
        assert torch.equal(out.sequences, expected)
        assert same_counts(out.stats, slow_greedy(target, draft, ids[0].tolist(), max_new_tokens, 4)[1], 4)


def test_end_token_inside_an_accepted_block(pairs, prompts):
    target, _ = pairs["llama"]
    ids = prompts[0][:1]
    text = transformers_greedy(target, ids, 20)[0, 10:].tolist()
    place = next(i for i in range(1, 5) if text[i] not in text[:i])  # inside the first block of six drafts
    out = speculative_generate(target, target, ids, max_new_tokens=20, gamma=6, eos_token_id=text[place])
    assert out.sequences[0, 10:].tolist() == text[: place + 1]
    n = place + 1
    assert out.stats == Stats(
        rounds=1, drafted=n, accepted=n, target_calls=1, generated=n, cut=1, per_position=([1] * n, [1] * n)
    )
    as_list = speculative_generate(target, target, ids, max_new_tokens=20, gamma=6, eos_token_id=[39, text[place]])
    never = speculative_generate(target, target, ids, max_new_tokens=20, gamma=6, eos_token_id=None)
    assert torch.equal(as_list.sequences, out.sequences) and never.sequences[0, 10:].tolist() == text
    plain = autoregressive_generate(target, ids, max_new_tokens=20, eos_token_id=text[place])
    assert torch.equal(plain, out.sequences)


def test_token_zero_is_an_ordinary_token_and_a_legal_end(pairs):
    target, half = pairs["phi"]
    bias = [3.0] + [0.0] * 39  # token 0 comes often
    target, draft = biased(target, bias), biased(half, bias)
    prompt = torch.tensor([[0, 11, 0]])
    text = transformers_greedy(target, prompt, 30)
    assert (text[0, 3:] == 0).any() and (text[0, 3:] != 0).any()
    out = speculative_generate(target, draft, prompt, max_new_tokens=30)
    assert torch.equal(out.sequences, text)
    ended = speculative_generate(target, draft, prompt, max_new_tokens=30, eos_token_id=0).sequences[0, 3:].tolist()
    assert ended == text[0, 3:].tolist()[: ended.index(0) + 1] and ended[-1] == 0


def test_models_in_training_mode_are_run_in_evaluation_mode_and_put_back(prompts):
    model = build("neox", attention_dropout=0.5, hidden_dropout=0.5)
    ids = prompts[0][:1]
    expected = autoregressive_generate(model, ids, max_new_tokens=20)
    model.train()
    model.gpt_neox.layers[1].eval()
    before = [module.training for module in model.modules()]
    out = speculative_generate(model, model, ids, max_new_tokens=20)
    assert torch.equal(out.sequences, expected) and out.stats.alpha == 1
    assert [module.training for module in model.modules()] == before
    model(out.sequences, labels=out.sequences).loss.backward()  # what was generated can be trained on


# --- batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1, 5])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_batched_rows_are_what_they_would_be_alone(pairs, prompts, name, gamma):
    target, draft = pairs[name]
    ids, mask = prompts
    n = 40
    text = transformers_greedy(target, ids[:1], n)[0, 10:].tolist()
    ends = [text[12], 3]
    out = speculative_generate(target, draft, ids, mask, max_new_tokens=n, gamma=gamma, eos_token_id=ends, pad_token_id=33)
    assert torch.equal(out.sequences[:, :10], ids)
    lengths = set()
    for row in range(4):
        prompt = ids[row : row + 1, mask[row].bool()]
        alone = speculative_generate(target, draft, prompt, max_new_tokens=n, gamma=gamma, eos_token_id=ends)
        new = alone.sequences[0, prompt.shape[1] :].tolist()
        lengths.add(len(new))
        assert out.sequences[row, 10:].tolist() == new + [33] * (out.sequences.shape[1] - 10 - len(new))
        assert out.row_stats[row] == alone.stats
        tokens, counts = slow_greedy(target, draft, prompt[0].tolist(), n, gamma, ends)
        assert tokens == new and same_counts(counts, alone.stats, gamma)
    assert len(lengths) > 1  # rows really ended at different times
    assert out.stats == sum(out.row_stats, Stats())
    plain = autoregressive_generate(target, ids, mask, max_new_tokens=n, eos_token_id=ends, pad_token_id=33)
    assert torch.equal(plain, out.sequences)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_reach_the_last_position_together(pairs, name):
    """A row near the end is fed drafts it cannot use: they must not be looked up beyond the model's positions."""
    target, draft = pairs[name]
    ids = torch.randint(0, 40, (8, 4), generator=torch.Generator().manual_seed(0))
    out = speculative_generate(target, draft, ids, max_new_tokens=CONTEXT - 4, gamma=8)
    assert torch.equal(out.sequences, autoregressive_generate(target, ids, max_new_tokens=CONTEXT - 4))
    assert len({stats.target_calls for stats in out.row_stats}) > 1


def test_batch_without_padding_and_without_a_mask_gives_the_same(pairs, prompts):
    target, draft = pairs["llama"]
    ids = prompts[0]
    out = speculative_generate(target, draft, ids, max_new_tokens=30)
    assert torch.equal(out.sequences, speculative_generate(target, draft, ids, torch.ones_like(ids), max_new_tokens=30)[0])
    assert torch.equal(out.sequences, torch.cat([transformers_greedy(target, ids[i : i + 1], 30) for i in range(4)]))


def test_memory_stays_within_twice_the_longest_row(pairs, prompts, monkeypatch):
    """Rows that accept different numbers leave holes; compaction bounds them and changes nothing."""
    target, draft = pairs["neox"]
    slots, compactions, rollback = [], 0, speculative._Lane.rollback

    def spy(lane, keep, rows=None):
        nonlocal compactions
        before, have = lane.cache.get_seq_length(), lane.length if rows is None else [lane.length[row] for row in rows]
        rollback(lane, keep, rows)
        after = lane.cache.get_seq_length()
        slots.append(after / max(keep))
        compactions += after < before - min(a - b for a, b in zip(have, keep, strict=True))
        assert lane.length == list(keep)
        assert lane.mask is None or lane.mask.sum(1).tolist() == list(keep)

    monkeypatch.setattr(speculative._Lane, "rollback", spy)
    ids = torch.randint(0, 40, (12, 3), generator=torch.Generator().manual_seed(0))
    out = speculative_generate(target, draft, ids, max_new_tokens=50, gamma=8)
    assert max(slots) <= 2 and compactions > 1
    assert torch.equal(out.sequences, autoregressive_generate(target, ids, max_new_tokens=50))


def test_a_single_row_needs_neither_mask_nor_positions(pairs, prompts):
    target, draft = pairs["llama"]
    seen = []
    hook = target.register_forward_pre_hook(lambda _, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    speculative_generate(target, draft, prompts[0][:1], max_new_tokens=20)
    hook.remove()
    assert not any({"attention_mask", "position_ids"} & names for names in seen)


# --- temperature > 0: the target's distribution --------------------------------------------------------------------------

LOW_ALARM = 3.719  # the normal quantile of 1 - 1e-4


def chi_square(counts, expected):
    """(statistic, its 1 - 1e-4 quantile by Wilson and Hilferty); cells expected fewer than 8 times are pooled."""
    rare = expected < 8
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    used = expected > 0
    assert counts[~used].sum() == 0  # what cannot happen did not happen
    df = int(used.sum()) - 1
    critical = df * (1 - 2 / (9 * df) + LOW_ALARM * math.sqrt(2 / (9 * df))) ** 3
    return (((counts - expected) ** 2)[used] / expected[used]).sum().item(), critical


def reference_distribution(logits, temperature=1.0, top_k=0, top_p=1.0):
    """One token's distribution in float64, written out with plain loops."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()
    if top_k:
        order = order[:top_k]
    total = sum(p[i] for i in order)
    kept, mass = [], 0.0
    for i in order:  # the shortest list of likeliest tokens that reaches top_p
        if kept and mass >= top_p:
            break
        kept.append(i)
        mass += float(p[i] / total)
    out = torch.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


def enumerate_texts(model, prompt, n, vocab, **sampling):
    """Exact probabilities [vocab ** n] of all continuations, in float64."""
    double = copy.deepcopy(model).double()
    probabilities, texts = torch.ones(1, dtype=torch.float64), torch.empty(1, 0, dtype=torch.long)
    for _ in range(n):
        with torch.no_grad():
            logits = double(torch.cat([prompt.expand(len(texts), -1), texts], 1)).logits[:, -1, :vocab]
        p = torch.stack([reference_distribution(row, **sampling) for row in logits])
        probabilities = (probabilities[:, None] * p).flatten()
        texts = torch.cat([texts.repeat_interleave(vocab, 0), torch.arange(vocab).repeat(len(texts))[:, None]], 1)
    return probabilities


def sample_counts(target, draft, prompt, n, vocab, samples, *, seed=0, mask=None, rows=slice(None), **kwargs):
    """How often each continuation came out of `samples` rows decoded together."""
    ids = prompt.repeat(samples // len(prompt), 1)
    mask = None if mask is None else mask.repeat(samples // len(prompt), 1)
    generator = torch.Generator().manual_seed(seed)
    out = speculative_generate(target, draft, ids, mask, max_new_tokens=n, generator=generator, **kwargs)
    new = out.sequences[rows, ids.shape[1] :]
    code = (new * vocab ** torch.arange(n - 1, -1, -1)).sum(1)
    return torch.bincount(code, minlength=vocab**n).double(), out.stats


SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.8},
    "all": {"temperature": 1.4, "top_k": 4, "top_p": 0.9},
}


@pytest.mark.parametrize("gamma", [1, 5])
@pytest.mark.parametrize("setting", SETTINGS)
def test_sampling_is_lossless(small, setting, gamma):
    """Every continuation of 4 tokens against its exact probability; false alarms 1e-4 for each of 10 cases."""
    target, draft, _ = small
    sampling = {"temperature": 1.0} | SETTINGS[setting]
    prompt = torch.tensor([[1, 0, 3]])
    exact = enumerate_texts(target, prompt, 4, 5, **sampling)
    counts, stats = sample_counts(target, draft, prompt, 4, 5, 10_000, gamma=gamma, **sampling)
    statistic, critical = chi_square(counts, exact * 10_000)
    assert statistic < critical
    assert 0.3 < stats.alpha < 0.99


@pytest.mark.parametrize("which", ["itself", "unrelated"])
def test_sampling_is_lossless_with_other_drafts(small, which):
    """Draft equal to the target (p == q: no residual) and unrelated to it; false alarms 1e-4 each."""
    target, _, unrelated = small
    prompt = torch.tensor([[2, 2]])
    exact = enumerate_texts(target, prompt, 4, 5)
    draft = target if which == "itself" else unrelated
    counts, stats = sample_counts(target, draft, prompt, 4, 5, 10_000, gamma=3, temperature=1.0)
    statistic, critical = chi_square(counts, exact * 10_000)
    assert statistic < critical
    assert stats.alpha > 0.9999 if which == "itself" else stats.alpha < 0.9


def test_sampling_is_lossless_when_the_draft_never_agrees():
    """Disjoint supports: nothing is accepted, and the output is still the target's; false alarms 1e-4."""
    base = build("phi", vocab=6, hidden=16)
    target, draft = biased(base, [-1e4] * 2 + [0.0] * 4), biased(base, [0.0] * 2 + [-1e4] * 4)
    prompt = torch.tensor([[1, 4]])
    exact = enumerate_texts(target, prompt, 3, 6)
    counts, stats = sample_counts(target, draft, prompt, 3, 6, 10_000, gamma=3, temperature=1.0)
    statistic, critical = chi_square(counts, exact * 10_000)
    assert statistic < critical
    assert stats.accepted == 0 and stats.tau == 1


def test_sampling_is_lossless_for_rows_of_different_prompts(small):
    """Left-padded rows decoded together, each against its own exact probabilities; false alarms 1e-4 for each of 3."""
    target, draft, _ = small
    prompts = torch.tensor([[1, 0, 3, 2], [4, 4, 0, 1], [4, 4, 4, 3]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
    for row in range(3):
        exact = enumerate_texts(target, prompts[row : row + 1, mask[row].bool()], 3, 5)
        counts, _ = sample_counts(target, draft, prompts, 3, 5, 12_000, mask=mask, rows=slice(row, None, 3), gamma=2,
                                  temperature=1.0)  # fmt: skip
        statistic, critical = chi_square(counts, exact * 4_000)
        assert statistic < critical


def test_sampling_is_lossless_one_row_at_a_time(small):
    """The unmasked path of a single row, with one generator through all calls; false alarms 1e-4."""
    target, draft, _ = small
    prompt, generator = torch.tensor([[1, 0, 3]]), torch.Generator().manual_seed(0)
    exact = enumerate_texts(target, prompt, 3, 5)
    counts = torch.zeros(125, dtype=torch.float64)
    for _ in range(1000):
        new = speculative_generate(
            target, draft, prompt, max_new_tokens=3, gamma=2, temperature=1.0, generator=generator
        ).sequences[0, 3:].tolist()  # fmt: skip
        counts[new[0] * 25 + new[1] * 5 + new[2]] += 1
    statistic, critical = chi_square(counts, exact * 1000)
    assert statistic < critical


def test_autoregressive_sampling_has_the_targets_distribution(small):
    """The baseline is judged like the sampler; false alarms 1e-4."""
    target, prompt = small[0], torch.tensor([[1, 0, 3]])
    sampling = {"temperature": 0.8, "top_k": 4}
    ids = prompt.repeat(20_000, 1)
    new = autoregressive_generate(target, ids, max_new_tokens=4, generator=torch.Generator().manual_seed(0), **sampling)
    counts = torch.bincount((new[:, 3:] * 5 ** torch.arange(3, -1, -1)).sum(1), minlength=625).double()
    statistic, critical = chi_square(counts, enumerate_texts(target, prompt, 4, 5, **sampling) * 20_000)
    assert statistic < critical


def test_heads_of_different_padding_share_a_vocabulary():
    """Heads of 8 and 11 rows, the rows beyond the 5 tokens loud: no such token ever comes; false alarms 1e-4."""
    base = build("phi", vocab=11, hidden=16, initializer_range=0.25)
    short = build("phi", vocab=8, hidden=16, initializer_range=0.25)
    target, draft = biased(base, [0.0] * 5 + [4.0] * 6), biased(short, [0.0] * 5 + [5.0] * 3)
    prompt = torch.tensor([[1, 0, 3]])
    for first, second in ((target, draft), (draft, target)):
        exact = enumerate_texts(first, prompt, 3, 5)
        counts, _ = sample_counts(first, second, prompt, 3, 5, 10_000, gamma=2, temperature=1.0, vocab_size=5)
        statistic, critical = chi_square(counts, exact * 10_000)
        assert statistic < critical
        greedy = speculative_generate(first, second, prompt, max_new_tokens=20).sequences
        assert greedy.max() < 8  # by default the smaller head
        assert speculative_generate(first, second, prompt, max_new_tokens=20, vocab_size=5).sequences.max() < 5


def test_generator_is_drawn_from_and_never_reseeded(small):
    target, draft, _ = small
    ids = torch.tensor([[1, 0, 3]]).repeat(4, 1)
    settings = {"max_new_tokens": 30, "temperature": 1.0}
    generator = torch.Generator().manual_seed(7)
    first = speculative_generate(target, draft, ids, generator=generator, **settings).sequences
    second = speculative_generate(target, draft, ids, generator=generator, **settings).sequences
    again = speculative_generate(target, draft, ids, generator=torch.Generator().manual_seed(7), **settings).sequences
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert len({tuple(row) for row in first.tolist()}) == 4
    state = torch.get_rng_state()
    speculative_generate(target, draft, ids, generator=generator, **settings)
    assert torch.equal(state, torch.get_rng_state())  # torch's own generator is left alone


def test_no_residual_falls_back_to_the_target():
    """p == q and yet a rejection (rounding can do that): the token comes from p, not from 0 / 0."""
    logits = torch.log(torch.tensor([[[0.5, 0.0, 0.5], [0.1, 0.9, 0.0]]])).repeat(1000, 1, 1)
    q, uniforms = [logits[:, 0].exp()], torch.rand(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drafts, limits = torch.zeros(1000, 1, dtype=torch.long), torch.ones(1000, dtype=torch.long)
    count, own = speculative._verify(logits, drafts, q, limits, uniforms, (1.0, 0, 1.0), lambda p: p * 0)
    assert count.sum() == 0 and set(own.flatten().tolist()) == {0, 2}
    count, _ = speculative._verify(logits, drafts, q, limits, uniforms * 0 + 1 - 2**-53, (1.0, 0, 1.0), None)
    assert count.sum() == 1000  # and without rounding p == q is accepted whatever the draw


def test_a_token_of_no_weight_is_never_drawn():
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    for uniform, token in ((0.0, 1), (0.29, 1), (0.31, 3), (1 - 2**-53, 3)):
        assert speculative._draw(weights, torch.tensor([[uniform]], dtype=torch.float64)).item() == token


# --- lossy decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fn", ["lin", "sq", "exp"])
def test_lenience_of_one_is_lossless_to_the_bit(small, fn, temperature):
    target, draft, _ = small
    ids = torch.tensor([[1, 0, 3], [2, 4, 1]])
    outs = [
        speculative_generate(target, draft, ids, max_new_tokens=40, temperature=temperature,
                             generator=torch.Generator().manual_seed(0), **lossy)
        for lossy in ({}, {"lenience": 1.0, "lenience_fn": fn}, {"lenience": 0.2, "lenience_fn": fn})
    ]  # fmt: skip
    assert torch.equal(outs[0].sequences, outs[1].sequences) and outs[0].row_stats == outs[1].row_stats
    assert outs[2].stats.alpha > outs[0].stats.alpha


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fn", ["lin", "sq", "exp"])
def test_acceptance_grows_as_lenience_falls(fn, temperature):
    """On the same logits, drafts and draws a smaller epsilon accepts at least as much in every row."""
    generator = torch.Generator().manual_seed(0)
    p, q = (2 * torch.randn(300, n, 8, generator=generator) for n in (5, 4))
    q = list(q.softmax(-1).unbind(1))
    drafts = torch.cat([probs.multinomial(1, generator=generator) for probs in q], 1)
    uniforms, limits = torch.rand(300, 5, generator=generator, dtype=torch.float64), torch.full((300,), 4)
    counts = [
        speculative._verify(p, drafts, q, limits, uniforms, (temperature, 0, 1.0),
                            lambda x, eps=eps: speculative.LENIENCE[fn](x, eps))[0]
        for eps in (1.0, 0.7, 0.4, 0.1, 0.01)
    ]  # fmt: skip
    assert all((after >= before).all() for before, after in itertools.pairwise(counts))
    assert counts[-1].sum() > counts[0].sum()


@pytest.mark.parametrize("fn", ["lin", "sq", "exp"])
def test_lossy_distribution_is_the_stated_one(small, fn):
    """The first token has probability min(q, f(p)) + rest * norm(max(p - q, 0)); false alarms 1e-4 for each of 3."""
    target, _, draft = small
    prompt, eps = torch.tensor([[1, 0, 3]]), 0.8
    p, q = (enumerate_texts(model, prompt, 1, 5) for model in (target, draft))
    kept = torch.minimum(q, {"lin": p / eps, "sq": p / eps**2, "exp": p**eps}[fn])
    assert kept.sum() < 0.9  # so that rejections are common enough to be seen
    residual = (p - q).clamp(min=0)
    exact = kept + (1 - kept.sum()) * residual / residual.sum()
    lossy = {"lenience": eps, "lenience_fn": fn, "generator": torch.Generator().manual_seed(1)}
    ids = prompt.repeat(20_000, 1)
    out = speculative_generate(target, draft, ids, max_new_tokens=2, gamma=1, temperature=1.0, **lossy)
    counts = torch.bincount(out.sequences[:, 3], minlength=5).double()
    statistic, critical = chi_square(counts, exact * 20_000)
    assert statistic < critical
    assert abs(out.stats.alpha - kept.sum()) < 4 * math.sqrt(0.25 / 20_000)


def test_greedy_lenience_is_the_stated_rule(pairs):
    target, draft = pairs["llama"]
    for seed in range(20):
        prompt = torch.randint(0, 40, (1, 5), generator=torch.Generator().manual_seed(seed))
        p = target(prompt).logits[0, -1].double().softmax(-1)
        token = draft(prompt).logits[0, -1].argmax()
        for eps in (0.3, 0.6):
            out = speculative_generate(target, draft, prompt, max_new_tokens=2, gamma=1, lenience=eps, lenience_fn="lin")
            passes = bool(token == p.argmax() or p[token] / eps > p.max())
            assert out.stats.accepted == passes
            assert out.sequences[0, 5] == (token if passes else p.argmax())


# --- counts --------------------------------------------------------------------------------------------------------------


def test_stats_by_hand():
    stats = Stats(rounds=3, drafted=12, accepted=6, rejected=2, never_judged=4, target_calls=3, generated=8, cut=1,
                  per_position=([3, 2, 1], [3, 3, 2]))  # fmt: skip
    stats.check()
    assert stats.alpha == 6 / 8 and stats.draft_acceptance == 0.5 and stats.tau == 8 / 3
    assert stats.predicted_tau(2) == pytest.approx(1 + 0.75 + 0.75**2)
    assert Stats(accepted=4).predicted_tau(5) == 6
    double = stats + stats + Stats()
    assert double.accepted == 12 and double.per_position == ([6, 4, 2], [6, 6, 4]) and double.alpha == stats.alpha
    empty = Stats()
    assert all(math.isnan(x) for x in (empty.alpha, empty.tau, empty.draft_acceptance, empty.predicted_tau(3)))
    for wrong in ({"never_judged": 3}, {"generated": 9}, {"per_position": ([3, 2, 2], [3, 3, 2])}):
        with pytest.raises(AssertionError):
            Stats(**{**vars(stats), **wrong}).check()


def test_counts_add_up_when_sampling(small):
    target, draft, _ = small
    ids = torch.tensor([[1, 0, 3], [2, 4, 1], [0, 0, 0]]).repeat(20, 1)
    out = speculative_generate(target, draft, ids, max_new_tokens=23, gamma=4, temperature=1.0, eos_token_id=2,
                               generator=torch.Generator().manual_seed(0), pad_token_id=2)  # fmt: skip
    for row, stats in zip(out.sequences[:, 3:].tolist(), out.row_stats, strict=True):
        stats.check()
        length = row.index(2) + 1 if 2 in row else len(row)
        assert stats.generated == length and set(row[length:]) <= {2}
        assert stats.target_calls - stats.rounds in (0, 1) and stats.rejected <= stats.rounds
        assert stats.cut in (0, 1) and sum(stats.per_position[1][:1]) == stats.rounds  # a round judges its first draft
    assert {stats.cut for stats in out.row_stats} == {0, 1}


def test_on_tokens_sees_everything_that_comes_out(pairs, prompts):
    target, draft = pairs["phi"]
    ids, mask = prompts
    seen, accepted = [[] for _ in range(4)], 0

    def on_tokens(row, tokens, count):
        nonlocal accepted
        assert count in (len(tokens), len(tokens) - 1)
        seen[row] += tokens
        accepted += count

    out = speculative_generate(target, draft, ids, mask, max_new_tokens=25, on_tokens=on_tokens)
    assert seen == out.sequences[:, 10:].tolist() and accepted == out.stats.accepted


# --- acceptance without decoding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [2**26, 1])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}])
def test_expected_acceptance_against_float64(pairs, monkeypatch, sampling, group):
    monkeypatch.setattr(speculative, "LOGITS_A_PASS", group)
    target, draft = pairs["codegen"]
    ids = torch.randint(0, 37, (3, 14), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    labels[0, :5] = ids[0, :5]  # column 0 cannot be predicted
    labels[2, 3:9] = ids[2, 3:9]
    labels[2, 11] = ids[2, 11]
    result = expected_acceptance(target, draft, ids, labels, vocab_size=37, **sampling)
    wide = [copy.deepcopy(model).double() for model in (target, draft)]
    overlap, agree, ratio = [], [], []
    for row, t in [(0, 1), (0, 2), (0, 3), (0, 4), *((2, t) for t in range(3, 9)), (2, 11)]:
        with torch.no_grad():
            p, q = (model(ids[row : row + 1, :t]).logits[0, -1, :37] for model in wide)
        agree.append(bool(p.argmax() == q.argmax()))
        if sampling.get("temperature") == 0:
            overlap.append(float(agree[-1]))
            ratio.append(float(q.argmax() == ids[row, t]))
            continue
        p, q = (reference_distribution(logits, **sampling) for logits in (p, q))
        overlap.append(torch.minimum(p, q).sum().item())
        p, q = p[ids[row, t]].item(), q[ids[row, t]].item()
        ratio.append(min(1.0, q / p) if p else float(q > 0))
    assert result.agree.tolist() == agree and result.agree.dtype == torch.bool
    assert result.overlap.dtype == result.ratio.dtype == torch.float32
    assert result.overlap.tolist() == pytest.approx(overlap, abs=2e-5)
    assert result.ratio.tolist() == pytest.approx(ratio, abs=2e-5)
    nothing = expected_acceptance(target, draft, ids, torch.full_like(ids, -100))
    assert nothing.overlap.shape == nothing.agree.shape == nothing.ratio.shape == (0,)


def acceptance_of_output(target, draft, sequences, prompt_length, row_lengths, **sampling):
    labels = sequences.clone()
    labels[:, :prompt_length] = -100
    for row, length in enumerate(row_lengths):
        labels[row, prompt_length + length :] = -100
    return expected_acceptance(target, draft, sequences, labels, **sampling)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_simulated_rounds_are_decoding_itself_at_temperature_0(pairs, name):
    """All counts of all rows, for every gamma, from one pass a model; end tokens and limits included."""
    target, draft = pairs[name]
    ids = torch.randint(0, 40, (12, 6), generator=torch.Generator().manual_seed(2))
    new = autoregressive_generate(target, ids, max_new_tokens=21)[:, 6:].tolist()
    ends = sorted(token for token in range(40) if 0 < sum(token in row for row in new) < 6)[:2]  # ends some rows only
    kwargs = {"max_new_tokens": 21, "eos_token_id": ends}
    sequences = autoregressive_generate(target, ids, **kwargs)
    for gamma in (1, 2, 3, 5, 8, 30):
        out = speculative_generate(target, draft, ids, gamma=gamma, **kwargs)
        assert torch.equal(out.sequences, sequences)
        lengths = [stats.generated for stats in out.row_stats]
        assert min(lengths) < 21 and max(lengths) == 21
        chances = acceptance_of_output(target, draft, sequences, 6, lengths, temperature=0.0)
        simulated = simulate_rounds(chances.ratio, lengths, gamma, max_new_tokens=21)
        for expected, real in zip(simulated.row_stats, out.row_stats, strict=True):
            assert same_counts(expected, real, gamma)
        assert simulated.tau == out.stats.tau and simulated.alpha == out.stats.alpha


def exact_counts(target, draft, prompt, n, gamma, end):
    """E[accepted], E[judged], E[target calls] of the algorithm itself, by recursion over everything that can happen."""
    double = [copy.deepcopy(model).double() for model in (target, draft)]
    known = {}

    def dists(text):
        if text not in known:
            with torch.no_grad():
                known[text] = [model(torch.tensor([[*prompt, *text]])).logits[0, -1].softmax(-1) for model in double]
        return known[text]

    def go(text, position, usable):
        """Expected counts from here on; `position` of the round's `usable` drafts were accepted so far."""
        if len(text) == n or (text and text[-1] == end):
            return torch.zeros(3, dtype=torch.float64)
        p, q = dists(text)
        if position is None:
            return torch.tensor([0, 0, 1.0], dtype=torch.float64) + go(text, 0, min(gamma, n - len(text) - 1))
        total = torch.zeros(3, dtype=torch.float64)
        both = torch.minimum(p, q)
        if position == usable:
            return sum(p[x] * go((*text, x), None, 0) for x in range(5))
        total[0] += both.sum()
        total[1] += 1
        for x in range(5):
            total += both[x] * go((*text, x), position + 1, usable) + (p - q).clamp(min=0)[x] * go((*text, x), None, 0)
        return total

    return go((), None, 0)


@pytest.mark.parametrize("gamma", [1, 2, 4])
def test_simulated_rounds_are_exact_in_the_mean_over_target_written_text(small, gamma):
    """Weighted over all texts the simulated counts equal the algorithm's expected counts: no Monte Carlo in it."""
    target, _, draft = small
    prompt, n, end = torch.tensor([[1, 0, 3]]), 4, 2
    probabilities = enumerate_texts(target, prompt, n, 5)
    texts, weights = {}, {}
    for index, probability in enumerate(probabilities.tolist()):
        text = [index // 125, index // 25 % 5, index // 5 % 5, index % 5]
        text = tuple(text[: text.index(end) + 1] if end in text else text)
        texts[text] = torch.tensor([1, 0, 3, *text, *[0] * (n - len(text))])
        weights[text] = weights.get(text, 0.0) + probability
    lengths = [len(text) for text in texts]
    chances = acceptance_of_output(target, draft, torch.stack(list(texts.values())), 3, lengths)
    rows = simulate_rounds(chances.ratio, lengths, gamma, max_new_tokens=n).row_stats
    weight = torch.tensor(list(weights.values()), dtype=torch.float64)
    counts = torch.tensor([[s.accepted, s.accepted + s.rejected, s.target_calls] for s in rows], dtype=torch.float64)
    expected = exact_counts(target, draft, (1, 0, 3), n, gamma, end)
    torch.testing.assert_close((weight[:, None] * counts).sum(0), expected, rtol=2e-5, atol=0)
    if gamma > 1:  # overlap in its place is measurably wrong, so this test can tell
        wrong = simulate_rounds(chances.overlap, lengths, gamma, max_new_tokens=n).row_stats
        calls = sum(w * s.target_calls for w, s in zip(weight.tolist(), wrong, strict=True))
        assert abs(calls / expected[2] - 1) > 1e-3


def test_simulated_rounds_agree_with_decoding_at_temperature_1(small):
    """tau and alpha of 3000 decoded rows within 4.5 standard errors of those of 3000 other texts; false alarms 1.4e-5."""
    target, draft, _ = small
    ids, gamma = torch.tensor([[1, 0, 3]]).repeat(3000, 1), 3
    kwargs = {"max_new_tokens": 12, "temperature": 1.0, "eos_token_id": 2}
    out = speculative_generate(target, draft, ids, gamma=gamma, generator=torch.Generator().manual_seed(0), **kwargs)
    texts = autoregressive_generate(target, ids, generator=torch.Generator().manual_seed(1), **kwargs)
    lengths = [row.index(2) + 1 if 2 in row else len(row) for row in texts[:, 3:].tolist()]
    chances = acceptance_of_output(target, draft, texts, 3, lengths)
    simulated = simulate_rounds(chances.ratio, lengths, gamma, max_new_tokens=12)
    for top, bottom in (("generated", "target_calls"), ("accepted", "judged")):
        estimates = []
        for rows in (out.row_stats, simulated.row_stats):
            a, b = (
                torch.tensor([s.accepted + s.rejected if name == "judged" else getattr(s, name) for s in rows]).double()
                for name in (top, bottom)
            )
            ratio = a.sum() / b.sum()
            estimates.append((ratio, ((a - ratio * b).std() / b.mean()) ** 2 / len(rows)))  # the delta method's variance
        (x, vx), (y, vy) = estimates
        assert abs(x - y) < 4.5 * math.sqrt(vx + vy)


def test_simulate_rounds_refuses_lengths_that_do_not_fit():
    with pytest.raises(ValueError, match="row_lengths"):
        simulate_rounds(torch.ones(5), [2, 2], 3)
    with pytest.raises(ValueError, match="max_new_tokens"):
        simulate_rounds(torch.ones(5), [3, 2], 3, max_new_tokens=2)
    assert math.isnan(simulate_rounds(torch.ones(0), [], 3).tau)
    assert simulate_rounds(torch.ones(12), [12], 5, max_new_tokens=12).tau == 6


def test_bootstrap_interval():
    generator = torch.Generator().manual_seed(0)
    judged = torch.randint(20, 60, (200,), generator=generator).double()
    accepted = (judged * torch.rand(200, generator=generator) * (judged < 40)).floor()  # long prompts accept less
    low, high = bootstrap_interval(accepted, judged)
    ratio = accepted.sum() / judged.sum()
    error = ((accepted - ratio * judged).std() / judged.mean() / math.sqrt(200)).item()  # the delta method's
    assert (
        low < ratio < high
        and (low + high) / 2 == pytest.approx(ratio.item(), abs=error)
        and (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)
    )
    assert (low, high) == bootstrap_interval(accepted.tolist(), judged.tolist())
    assert bootstrap_interval([3], [4]) == (0.75, 0.75)
    assert all(map(math.isnan, bootstrap_interval([0, 0], [0, 0])))


# --- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gamma": 0}, "gamma"), ({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"), ({"top_k": -1}, "top_k"), ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"), ({"lenience": 0.0}, "lenience"), ({"lenience": 1.5}, "lenience"),
        ({"lenience_fn": "cube"}, "lenience_fn"), ({"vocab_size": 41}, "vocab_size"), ({"max_new_tokens": 61}, "context"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "left padding"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "left padding"),
        ({"attention_mask": torch.tensor([[0, 0, 0, 0]])}, "left padding"),
        ({"attention_mask": torch.tensor([[1, 1]])}, "left padding"),
        ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, "empty"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(pairs, wrong, message):
    arguments = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "max_new_tokens": 5} | wrong
    with pytest.raises(ValueError, match=message) as caught:
        speculative_generate(*pairs["llama"], **arguments)
    assert "\n" not in str(caught.value)


def test_layers_that_cannot_go_back_are_refused(prompts):
    config = MistralConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                           intermediate_size=64, sliding_window=4)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="full attention"):
        speculative_generate(model, model, prompts[0], max_new_tokens=5)


# --- the command line ----------------------------------------------------------------------------------------------------


def save_tokenizer(folder, corpus, vocab_size):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved target and draft with one byte-level tokenizer, a draft with another, and a T5."""
    root = tmp_path_factory.mktemp("models")
    target = build("neox", vocab=300, seed=1)
    for name, model, corpus in (
        ("target", target, ["the cat sat on the mat, the hat"]),
        ("draft", noised(target, 0.1), ["the cat sat on the mat, the hat"]),
        ("other", target, ["zebras zip zigzag"]),
    ):
        model.generation_config.eos_token_id = None
        model.save_pretrained(root / name)
        save_tokenizer(root / name, corpus, 270)
    T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=300).save_pretrained(root / "t5")
    (root / "empty").mkdir()
    return root


def run(folders, capsys, *extra, target="target", draft="draft", prompt=("--prompt", "the cat")):
    arguments = ["--target", str(folders / target), "--draft", str(folders / draft), *prompt, "--max-new-tokens", "20", *extra]
    code = speculative.main(arguments)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_command_line_prints_text_and_rates(folders, capsys):
    code, out, err = run(folders, capsys)
    assert code == 0 and not err
    tokenizer = AutoTokenizer.from_pretrained(folders / "target")
    model = AutoModelForCausalLM.from_pretrained(folders / "target")
    prompt = tokenizer("the cat", return_tensors="pt").input_ids
    text = autoregressive_generate(model, prompt, max_new_tokens=20, eos_token_id=0, vocab_size=len(tokenizer))
    assert out.startswith(tokenizer.decode(text[0], skip_special_tokens=True))
    assert "alpha 0." in out and "tau " in out and "speed-up" in out and "\033" not in out


def test_command_line_marks_accepted_drafts_on_a_terminal(folders, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    _, out, _ = run(folders, capsys, draft="target")
    assert "\033[32m" in out and out.count("\033[32m") == out.count("\033[0m")


def test_command_line_json(folders, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "the cat"}\n\n{"prompt": "on the mat"}\n')
    code, out, _ = run(
        folders, capsys, "--json", "--temperature", "1", "--gamma", "3", "--seed", "4", prompt=("--prompts", str(file))
    )
    result = json.loads(out)
    assert code == 0 and len(result["texts"]) == 2 and result["gamma"] == 3 and result["seed"] == 4
    assert result["alpha"] == pytest.approx(result["accepted"] / (result["accepted"] + result["rejected"]))
    assert result["alpha_interval"][0] <= result["alpha"] <= result["alpha_interval"][1]
    assert result["speedup"] == pytest.approx(result["tokens_per_second"] / result["target_tokens_per_second"])
    again = json.loads(run(folders, capsys, "--json", "--temperature", "1", "--gamma", "3", "--seed", "4",
                           prompt=("--prompts", str(file)))[1])  # fmt: skip
    assert again["texts"] == result["texts"] and again["per_position"] == result["per_position"]
    one = json.loads(run(folders, capsys, "--json", "--max-new-tokens", "1")[1])
    assert one["alpha"] is None and one["tau"] == 1  # nothing drafted, nothing judged


@pytest.mark.parametrize(
    ("kwargs", "extra", "message"),
    [
        ({"target": "missing"}, (), "no such folder"),
        ({"draft": "empty"}, (), "cannot load a causal language model"),
        ({"target": "t5"}, (), "cannot load a causal language model"),
        ({"draft": "other"}, (), "tokenizers differ: token 257 is"),
        ({"prompt": ("--prompt", "the cat sat " * 30)}, (), "context of 64"),
        ({"prompt": ("--prompt", "")}, (), "empty prompt"),
        ({"prompt": ("--prompts", "/no/such/file.jsonl")}, (), "No such file"),
        ({}, ("--gamma", "0"), "gamma must be at least 1"),
        ({}, ("--temperature", "-1"), "temperature must be"),
        ({}, ("--lenience", "0"), "lenience must be in (0, 1]"),
        ({}, ("--lenience", "1.1"), "lenience must be in (0, 1]"),
        ({}, ("--top-p", "0"), "top_p must be in (0, 1]"),
        ({}, ("--max-new-tokens", "0"), "max_new_tokens must be at least 1"),
    ],
)
def test_command_line_errors_are_one_line(folders, capsys, kwargs, extra, message):
    code, out, err = run(folders, capsys, *extra, **kwargs)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert message in err and err.startswith("speculative.py: error: ")


def test_command_line_names_the_line_of_a_bad_prompt_file(folders, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    for content, message in (('{"prompt": "a"}\n{"text": 1}\n', "line 2"), ("\n", "no prompts"), ("{", "line 1")):
        file.write_text(content)
        code, _, err = run(folders, capsys, prompt=("--prompts", str(file)))
        assert code == 2 and message in err and err.count("\n") == 1


def test_models_without_position_ids_decode_single_rows_only():
    """ALiBi counts cache slots, so holes or padding would shift it: one row is right, more are refused."""
    from transformers import AutoModelForCausalLM, BloomConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)).eval()
    ids = torch.randint(50, (2, 6))
    out = speculative_generate(model, model, ids[:1], max_new_tokens=12, gamma=3)
    expected = model.generate(ids[:1], attention_mask=torch.ones(1, 6), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(out.sequences, expected)
    with pytest.raises(ValueError, match=r"Bloom.* takes no position_ids"):
        speculative_generate(model, model, ids, max_new_tokens=12)
