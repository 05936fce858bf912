"""speculative.py: losslessness, every trap of DESIGN.md, batches, counts, offline acceptance and
the command line. Statistical tests: see tests/sampling.py."""

import copy
import itertools
import json
import math
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GenerationConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

import speculative
from cli import printable
from speculative import (
    Stats,
    autoregressive_generate,
    expected_acceptance,
    left_pad,
    simulate_rounds,
    speculative_generate,
    until_end,
)
from tests.sampling import (
    ARCHITECTURES,
    biased,
    build,
    chi_square,
    enumerate_texts,
    five_token_models,
    half_agreeing_pairs,
    martingales,
    noised,
    reference_distribution,
    same_counts,
    sample_counts,
)


@pytest.fixture(scope="module")
def pairs():
    return half_agreeing_pairs()


@pytest.fixture(scope="module")
def small():
    return five_token_models()


@pytest.fixture(scope="module")
def prompts():
    return ragged_prompts()


def ragged_prompts():
    """Four left-padded prompts of 10, 7, 3 and 1 tokens, among them the token 0: ids and mask."""
    ids = torch.randint(0, 40, (4, 10), generator=torch.Generator().manual_seed(3))
    ids[:, -1] = torch.tensor([4, 0, 7, 0])
    mask = (torch.arange(10) >= torch.tensor([[0], [3], [7], [9]])).long()
    return ids, mask


def transformers_greedy(model, ids, n):
    # without a mask, generate takes a pad token (here id 0) inside the prompt for padding
    mask = torch.ones_like(ids)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0
    )


def slow_greedy(target, draft, prompt, max_new_tokens, gamma, ends=()):
    """Greedy speculative decoding re-stated without caches, batches or shared code: tokens and
    counts."""

    def best(model, tokens):
        with torch.no_grad():
            return int(model(torch.tensor([tokens], device=model.device)).logits[0, -1].argmax())

    names = "rounds drafted accepted rejected never_judged target_calls generated cut".split()
    text, counts = [], dict.fromkeys(names, 0)
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


# Temperature 0: token for token the target's own output


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_the_targets_own(pairs, prompts, name):
    target, half = pairs[name]
    unrelated = build(name, seed=77).to(target.device)
    ids, mask = prompts
    for row, gamma in ((0, 1), (1, 4), (2, 6)):
        prompt = ids[row : row + 1, mask[row].bool()]
        expected = transformers_greedy(target, prompt, 24)
        assert torch.equal(autoregressive_generate(target, prompt, max_new_tokens=24), expected)
        for draft in (target, half, unrelated):
            out = speculative_generate(target, draft, prompt, max_new_tokens=24, gamma=gamma)
            assert torch.equal(out.sequences, expected)
            if draft is target:  # also: its cache is right after a round that was all accepted
                assert out.stats.alpha == 1
                assert out.stats.target_calls == math.ceil(24 / (gamma + 1))
            if draft is half:
                assert 0.1 < out.stats.alpha < 0.95
            if draft is unrelated:
                assert out.stats.alpha < 0.5


def test_models_of_different_architectures_can_be_paired(pairs, prompts):
    ids = prompts[0][:1]
    target, draft = pairs["phi"][0], pairs["codegen"][0]
    out = speculative_generate(target, draft, ids, max_new_tokens=30)
    assert torch.equal(out.sequences, transformers_greedy(target, ids, 30))


@pytest.mark.parametrize("max_new_tokens", range(1, 10))
def test_limit_inside_a_block(pairs, prompts, max_new_tokens):
    target, half = pairs["neox"]
    ids = prompts[0][:1]
    expected = transformers_greedy(target, ids, max_new_tokens)
    for draft in (target, half):
        out = speculative_generate(target, draft, ids, max_new_tokens=max_new_tokens, gamma=4)
        assert torch.equal(out.sequences, expected)
        counts = slow_greedy(target, draft, ids[0].tolist(), max_new_tokens, 4)[1]
        assert same_counts(out.stats, counts, 4)


def test_end_token_inside_an_accepted_block(pairs, prompts):
    target, _ = pairs["llama"]
    ids = prompts[0][:1]
    text = transformers_greedy(target, ids, 20)[0, 10:].tolist()
    # inside the first block of six drafts
    place = next(i for i in range(1, 5) if text[i] not in text[:i])
    settings = {"max_new_tokens": 20, "gamma": 6}
    out = speculative_generate(target, target, ids, eos_token_id=text[place], **settings)
    assert out.sequences[0, 10:].tolist() == text[: place + 1]
    n = place + 1
    counts = {"rounds": 1, "drafted": n, "accepted": n, "target_calls": 1, "generated": n}
    assert out.stats == Stats(**counts, cut=1, per_position=([1] * n, [1] * n))
    as_list = speculative_generate(target, target, ids, eos_token_id=[39, text[place]], **settings)
    never = speculative_generate(target, target, ids, eos_token_id=None, **settings)
    assert torch.equal(as_list.sequences, out.sequences)
    assert never.sequences[0, 10:].tolist() == text
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
    out = speculative_generate(target, draft, prompt, max_new_tokens=30, eos_token_id=0)
    ended = out.sequences[0, 3:].tolist()
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
    # what was generated can be trained on
    model(out.sequences, labels=out.sequences).loss.backward()


# Batches


@pytest.mark.parametrize(("name", "gamma"), [(name, 5) for name in ARCHITECTURES] + [("llama", 1)])
def test_batched_rows_are_what_they_would_be_alone(pairs, prompts, name, gamma):
    target, draft = pairs[name]
    ids, mask = prompts
    n = 20
    text = transformers_greedy(target, ids[:1], n)[0, 10:].tolist()
    settings = {"max_new_tokens": n, "gamma": gamma, "eos_token_id": [text[9], 3]}
    out = speculative_generate(target, draft, ids, mask, pad_token_id=33, **settings)
    assert torch.equal(out.sequences[:, :10], ids)
    lengths = set()
    for row in range(4):
        prompt = ids[row : row + 1, mask[row].bool()]
        alone = speculative_generate(target, draft, prompt, **settings)
        new = alone.sequences[0, prompt.shape[1] :].tolist()
        lengths.add(len(new))
        padding = [33] * (out.sequences.shape[1] - 10 - len(new))
        assert out.sequences[row, 10:].tolist() == new + padding
        assert out.row_stats[row] == alone.stats
        ends = settings["eos_token_id"]
        tokens, counts = slow_greedy(target, draft, prompt[0].tolist(), n, gamma, ends)
        assert tokens == new and same_counts(counts, alone.stats, gamma)
    assert len(lengths) > 1  # rows really ended at different times
    assert out.stats == sum(out.row_stats, Stats())
    del settings["gamma"]
    plain = autoregressive_generate(target, ids, mask, pad_token_id=33, **settings)
    assert torch.equal(plain, out.sequences)


@pytest.mark.parametrize("name", ["llama", "codegen", "gpt2"])
def test_rows_reach_the_last_position_together(name):
    """A row near the end is fed drafts it cannot use: they must not be looked up beyond the model's
    positions. Nor where all rows are padded on the left: padding takes no positions."""
    target = build(name, seed=5, context=32)
    draft = noised(target)
    ids = torch.randint(0, 40, (8, 4), generator=torch.Generator().manual_seed(0))
    expected = autoregressive_generate(target, ids, max_new_tokens=28)
    out = speculative_generate(target, draft, ids, max_new_tokens=28, gamma=8)
    assert torch.equal(out.sequences, expected)
    assert len({stats.target_calls for stats in out.row_stats}) > 1
    padded = torch.cat([torch.zeros(8, 9, dtype=torch.long), ids], 1)
    mask = (torch.arange(13) >= 9).long().expand(8, -1)
    out = speculative_generate(target, draft, padded, mask, max_new_tokens=28, gamma=8)
    assert torch.equal(out.sequences[:, 9:], expected)


@pytest.mark.parametrize("name", ["llama", "codegen"])
def test_each_row_can_have_a_limit_of_its_own(prompts, name):
    """Also one that another row's prompt leaves no room for: 10 + 22 and 1 + 31 tokens of 32."""
    target = build(name, seed=5, context=32)
    draft = noised(target)
    ids, mask = prompts
    limits = [22, 1, 7, 31]
    out = speculative_generate(target, draft, ids, mask, max_new_tokens=limits, gamma=4)
    plain = autoregressive_generate(target, ids, mask, max_new_tokens=limits)
    assert torch.equal(plain, out.sequences)
    assert [stats.generated for stats in out.row_stats] == limits
    for row, limit in enumerate(limits):
        prompt = ids[row : row + 1, mask[row].bool()]
        alone = speculative_generate(target, draft, prompt, max_new_tokens=limit, gamma=4)
        assert out.row_stats[row] == alone.stats
        new = out.sequences[row, 10 : 10 + limit]
        assert torch.equal(new, alone.sequences[0, prompt.shape[1] :])
    for wrong, message in (
        ([22, 1, 7], "3 limits for 4 rows"),
        ([22, 0, 7, 31], "max_new_tokens must be at least 1, got 0"),
        ([22, 26, 7, 31], "prompt of 7 tokens .* 26 > context of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            speculative_generate(target, draft, ids, mask, max_new_tokens=wrong)


def test_batch_without_padding_and_without_a_mask_gives_the_same(pairs, prompts):
    target, draft = pairs["llama"]
    ids = prompts[0]
    out = speculative_generate(target, draft, ids, max_new_tokens=30)
    masked = speculative_generate(target, draft, ids, torch.ones_like(ids), max_new_tokens=30)
    assert torch.equal(out.sequences, masked.sequences)
    alone = [transformers_greedy(target, ids[i : i + 1], 30) for i in range(4)]
    assert torch.equal(out.sequences, torch.cat(alone))


def test_memory_stays_within_twice_the_longest_row(pairs, monkeypatch):
    """Rows that accept different numbers leave holes; compaction bounds them, and no more."""
    target, draft = pairs["neox"]
    slots, compactions, rollback = [], 0, speculative.Lane.rollback

    def spy(lane, lengths, rows=None):
        nonlocal compactions
        before = lane.cache.get_seq_length()
        had = lane.lengths if rows is None else [lane.lengths[row] for row in rows]
        rollback(lane, lengths, rows)
        after = lane.cache.get_seq_length()
        slots.append(after / max(lengths))
        cropped = min(a - b for a, b in zip(had, lengths, strict=True))
        compactions += after < before - cropped
        assert lane.lengths == list(lengths)
        assert lane.mask is None or lane.mask.sum(1).tolist() == list(lengths)

    monkeypatch.setattr(speculative.Lane, "rollback", spy)
    ids = torch.randint(0, 40, (12, 3), generator=torch.Generator().manual_seed(0))
    out = speculative_generate(target, draft, ids, max_new_tokens=50, gamma=8)
    assert max(slots) <= 2 and compactions > 1
    assert torch.equal(out.sequences, autoregressive_generate(target, ids, max_new_tokens=50))


def test_a_single_row_needs_neither_mask_nor_positions(pairs, prompts):
    target, draft = pairs["llama"]
    names = set()
    hook = target.register_forward_pre_hook(
        lambda module, args, kwargs: names.update(kwargs), with_kwargs=True
    )
    speculative_generate(target, draft, prompts[0][:1], max_new_tokens=20)
    hook.remove()
    assert names and not {"attention_mask", "position_ids"} & names


def test_prompts_are_padded_on_the_left():
    ids, mask = left_pad([torch.tensor([7, 0]), torch.tensor([1, 2, 3])])
    assert ids.tolist() == [[0, 7, 0], [1, 2, 3]] and mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_until_the_first_end_token():
    assert until_end([4, 0, 5, 0], [9, 0]) == [4, 0] and until_end([4, 5], [0]) == [4, 5]
    assert until_end(torch.tensor([4, 0, 5]), [5, 0]).tolist() == [4, 0]
    assert until_end(torch.tensor([4, 0, 5]), []).tolist() == [4, 0, 5]


# Temperature > 0: the target's distribution


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
    """Every continuation of 3 tokens against its exact probability; false alarms 1e-4 for each of
    10 cases."""
    target, draft, _ = small
    sampling = {"temperature": 1.0} | SETTINGS[setting]
    prompt = torch.tensor([[1, 0, 3]], device=target.device)
    exact = enumerate_texts(target, prompt, 3, 5, **sampling)
    counts, stats = sample_counts(target, draft, prompt, 3, 5, 4000, gamma=gamma, **sampling)
    statistic, critical = chi_square(counts, exact * 4000)
    assert statistic < critical
    assert 0.3 < stats.alpha < 0.99


@pytest.mark.parametrize("kind", ["itself", "unrelated"])
def test_sampling_is_lossless_with_other_drafts(small, kind):
    """Draft equal to the target (p == q: no residual) and unrelated to it; false alarms 1e-4
    each."""
    target, _, unrelated = small
    prompt = torch.tensor([[2, 2]])
    exact = enumerate_texts(target, prompt, 4, 5)
    draft = target if kind == "itself" else unrelated
    counts, stats = sample_counts(target, draft, prompt, 4, 5, 4000, gamma=3, temperature=1.0)
    statistic, critical = chi_square(counts, exact * 4000)
    assert statistic < critical
    assert stats.alpha > 0.9999 if kind == "itself" else stats.alpha < 0.9


def test_sampling_is_lossless_when_the_draft_never_agrees():
    """Disjoint supports: nothing is accepted, and the output is still the target's; false alarms
    1e-4."""
    base = build("phi", vocab=6, hidden=16)
    target = biased(base, [-1e4] * 2 + [0.0] * 4)
    draft = biased(base, [0.0] * 2 + [-1e4] * 4)
    prompt = torch.tensor([[1, 4]])
    exact = enumerate_texts(target, prompt, 3, 6)
    counts, stats = sample_counts(target, draft, prompt, 3, 6, 4000, gamma=3, temperature=1.0)
    statistic, critical = chi_square(counts, exact * 4000)
    assert statistic < critical
    assert stats.accepted == 0 and stats.tau == 1


def test_sampling_is_lossless_for_ragged_rows_with_end_tokens(small):
    """Left-padded prompts of three lengths decoded together, each until one of two end tokens or
    its own limit: every text against its exact probability; false alarms 1e-4 for each of 3."""
    target, draft, _ = small
    device = target.device
    rows = [torch.tensor(row) for row in ([1, 0, 3, 2], [0, 1], [3])]
    ids, mask = left_pad(rows, device)
    ends, limits, samples = [2, 4], [4, 3, 4], 3000
    settings = {"max_new_tokens": limits * samples, "eos_token_id": ends, "temperature": 1.0}
    settings |= {"gamma": 3, "generator": torch.Generator(device).manual_seed(0)}
    batch = (ids.repeat(samples, 1), mask.repeat(samples, 1))
    out = speculative_generate(target, draft, *batch, **settings)
    for row, limit in enumerate(limits):
        prompt = ids[row : row + 1, mask[row].bool()]
        exact, counts = {}, {}
        for code, probability in enumerate(enumerate_texts(target, prompt, limit, 5).tolist()):
            text = [code // 5**i % 5 for i in reversed(range(limit))]
            text = tuple(until_end(text, ends))
            exact[text] = exact.get(text, 0.0) + probability
        for tokens in out.sequences[row::3, 4 : 4 + limit].tolist():
            text = tuple(until_end(tokens, ends))
            counts[text] = counts.get(text, 0) + 1
            assert set(tokens[len(text) :]) <= {2}  # padded with the first end token
        assert set(counts) <= set(exact)
        observed = torch.tensor([counts.get(text, 0) for text in exact]).double()
        expected = samples * torch.tensor(list(exact.values()), dtype=torch.float64)
        statistic, critical = chi_square(observed, expected)
        assert statistic < critical


@pytest.mark.parametrize("name", ["llama", "codegen"])
def test_long_runs_stay_the_targets(name):
    """Ragged rows of 110 tokens, many holes and compactions later: two martingales within 4.5
    standard deviations; false alarms 1.4e-5 for each of 2 cases."""
    target = build(name, seed=5, context=128)
    draft = noised(target, 0.3)
    prompts = [torch.arange(length) + 1 for length in (9, 2, 5, 1, 7, 7)]
    settings = {"max_new_tokens": 110, "temperature": 1.2, "gamma": 5}
    settings["generator"] = torch.Generator().manual_seed(0)
    out = speculative_generate(target, draft, *left_pad(prompts), **settings)
    assert 0.2 < out.stats.alpha < 0.8
    lengths = [len(prompt) for prompt in prompts]
    rows = zip(out.sequences.tolist(), lengths, strict=True)
    texts = [row[9 - length :] for row, length in rows]  # without padding
    assert max(map(abs, martingales(target, draft, texts, lengths, 1.2))) < 4.5
    # the same texts are not those of another temperature
    assert max(map(abs, martingales(target, draft, texts, lengths, 1.0))) > 4.5


def test_sampling_is_lossless_one_row_at_a_time(small):
    """The unmasked path of a single row, with one generator through all calls: two martingales over
    40 texts of 20 tokens within 4.5 standard deviations; false alarms 1.4e-5."""
    target, draft, _ = small
    prompt, generator = torch.tensor([[1, 0, 3]]), torch.Generator().manual_seed(0)
    settings = {"max_new_tokens": 20, "gamma": 2, "temperature": 1.0, "generator": generator}
    texts = []
    for _ in range(40):
        texts += speculative_generate(target, draft, prompt, **settings).sequences.tolist()
    assert max(map(abs, martingales(target, draft, texts, [3] * 40, 1.0))) < 4.5


def test_autoregressive_sampling_has_the_targets_distribution(small):
    """The baseline is judged like the sampler; false alarms 1e-4."""
    target, prompt = small[0], torch.tensor([[1, 0, 3]])
    sampling = {"temperature": 0.8, "top_k": 4}
    counts, _ = sample_counts(target, None, prompt, 4, 5, 8000, **sampling)
    exact = enumerate_texts(target, prompt, 4, 5, **sampling)
    statistic, critical = chi_square(counts, exact * 8000)
    assert statistic < critical
    ids = prompt.repeat(50, 1)
    rows = [
        generate(ids, max_new_tokens=9, generator=torch.Generator().manual_seed(0), **sampling)
        for generate in (
            lambda *args, **kwargs: autoregressive_generate(target, *args, **kwargs),
            lambda *args, **kwargs: speculative_generate(target, None, *args, **kwargs).sequences,
        )
    ]
    assert torch.equal(*rows)


def test_heads_of_different_padding_share_a_vocabulary():
    """Heads of 8 and 11 rows, the rows beyond the 5 tokens loud: no such token ever comes; false
    alarms 1e-4 for each of 2."""
    base = build("phi", vocab=11, hidden=16, initializer_range=0.25)
    short = build("phi", vocab=8, hidden=16, initializer_range=0.25)
    target = biased(base, [0.0] * 5 + [4.0] * 6)
    draft = biased(short, [0.0] * 5 + [5.0] * 3)
    prompt = torch.tensor([[1, 0, 3]])
    for first, second in ((target, draft), (draft, target)):
        exact = enumerate_texts(first, prompt, 3, 5)
        settings = {"gamma": 2, "temperature": 1.0, "vocab_size": 5}
        counts, _ = sample_counts(first, second, prompt, 3, 5, 5000, **settings)
        statistic, critical = chi_square(counts, exact * 5000)
        assert statistic < critical
        greedy = speculative_generate(first, second, prompt, max_new_tokens=20)
        assert greedy.sequences.max() < 8  # by default the smaller head
        greedy = speculative_generate(first, second, prompt, max_new_tokens=20, vocab_size=5)
        assert greedy.sequences.max() < 5


def test_generator_is_drawn_from_and_never_reseeded(small):
    target, draft, _ = small
    ids = torch.tensor([[1, 0, 3]]).repeat(4, 1)
    settings = {"max_new_tokens": 30, "temperature": 1.0}
    settings["generator"] = torch.Generator().manual_seed(7)
    first = speculative_generate(target, draft, ids, **settings).sequences
    second = speculative_generate(target, draft, ids, **settings).sequences
    settings["generator"] = torch.Generator().manual_seed(7)
    again = speculative_generate(target, draft, ids, **settings).sequences
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert len({tuple(row) for row in first.tolist()}) == 4
    state = torch.get_rng_state()
    speculative_generate(target, draft, ids, **settings)
    assert torch.equal(state, torch.get_rng_state())  # torch's own generator is left alone


def test_no_residual_falls_back_to_the_target():
    """p == q and yet a rejection (rounding can do that): the token comes from p, not from 0 / 0."""
    p = torch.tensor([[[0.5, 0.0, 0.5], [0.1, 0.9, 0.0]]]).repeat(1000, 1, 1)
    uniforms = torch.rand(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drafts = torch.zeros(1000, 1, dtype=torch.long)
    usable = torch.ones(1000, dtype=torch.long)
    arguments = (p, [p[:, 0]], drafts, usable)
    accepted, own = speculative.verify(*arguments, uniforms, lambda p: p * 0)
    assert accepted.sum() == 0 and set(own.flatten().tolist()) == {0, 2}
    accepted, _ = speculative.verify(*arguments, uniforms * 0 + 1 - 2**-53)
    assert accepted.sum() == 1000  # and without rounding p == q is accepted whatever the draw


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_first_of_equal_logits_is_the_likeliest(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 30, (4, 3, 5000), generator=generator).to(dtype)
    logits[..., 7::6] = -math.inf
    assert torch.equal(speculative.likeliest(logits), logits.argmax(-1))
    assert torch.equal(speculative.likeliest(logits[0, 0]), logits[0, 0].argmax())


def test_a_token_of_no_weight_is_never_drawn():
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    for uniform, token in ((0.0, 1), (0.29, 1), (0.31, 3), (1 - 2**-53, 3)):
        drawn = speculative.draw(weights, torch.tensor([[uniform]], dtype=torch.float64))
        assert drawn.item() == token


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-31])
def test_temperatures_that_overflow_are_refused(small, temperature):
    """Logits divided by them would be infinite, and probabilities NaN."""
    ids = torch.tensor([[1, 0, 3]])
    with pytest.raises(ValueError, match=r"temperature must be 0 \(greedy\) or at least 1e-30"):
        speculative_generate(*small[:2], ids, max_new_tokens=4, temperature=temperature)


def test_the_smallest_temperature_is_greedy(small):
    ids = torch.tensor([[1, 0, 3], [2, 4, 1]])
    greedy = speculative_generate(*small[:2], ids, max_new_tokens=12)
    cold = speculative_generate(*small[:2], ids, max_new_tokens=12, temperature=1e-30)
    assert torch.equal(greedy.sequences, cold.sequences) and greedy.stats == cold.stats


# Lossy decoding


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fn", ["lin", "sq", "exp"])
def test_lenience_of_one_is_lossless_to_the_bit(small, fn, temperature):
    target, draft, _ = small
    ids = torch.tensor([[1, 0, 3], [2, 4, 1]])
    outs = []
    for lossy in ({}, {"lenience": 1.0, "lenience_fn": fn}, {"lenience": 0.2, "lenience_fn": fn}):
        settings = {"temperature": temperature, "generator": torch.Generator().manual_seed(0)}
        settings |= lossy
        outs.append(speculative_generate(target, draft, ids, max_new_tokens=12, **settings))
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert outs[0].row_stats == outs[1].row_stats
    assert outs[2].stats.alpha > outs[0].stats.alpha


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fn", ["lin", "sq", "exp"])
def test_acceptance_grows_as_lenience_falls(fn, temperature):
    """On the same logits, drafts and draws a smaller epsilon accepts at least as much in every
    row."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(300, 5, 8, generator=generator)
    q = (2 * torch.randn(300, 4, 8, generator=generator)).softmax(-1).unbind(1)
    drafts = torch.cat([probs.multinomial(1, generator=generator) for probs in q], 1)
    uniforms = torch.rand(300, 5, generator=generator, dtype=torch.float64)
    usable = torch.full((300,), 4)
    counts = []
    for epsilon in (1.0, 0.7, 0.4, 0.1, 0.01):

        def relax(p, epsilon=epsilon):
            return speculative.LENIENCE[fn](p, epsilon)

        if temperature == 0:
            accepted, _ = speculative.verify_greedy(logits, drafts, usable, relax)
        else:
            p = logits.softmax(-1)
            accepted, _ = speculative.verify(p, q, drafts, usable, uniforms, relax)
        counts.append(accepted)
    assert all((after >= before).all() for before, after in itertools.pairwise(counts))
    assert counts[-1].sum() > counts[0].sum()


@pytest.mark.parametrize("fn", ["lin", "sq", "exp"])
def test_lossy_distribution_is_the_stated_one(small, fn):
    """The first token has probability min(q, f(p)) + rest * norm(max(p - q, 0)); false alarms 1e-4
    for each of 3."""
    target, _, draft = small
    prompt, eps = torch.tensor([[1, 0, 3]]), 0.8
    p, q = (enumerate_texts(model, prompt, 1, 5) for model in (target, draft))
    passing = torch.minimum(q, {"lin": p / eps, "sq": p / eps**2, "exp": p**eps}[fn])
    assert passing.sum() < 0.9  # so that rejections are common enough to be seen
    residual = (p - q).clamp(min=0)
    exact = passing + (1 - passing.sum()) * residual / residual.sum()
    settings = {"gamma": 1, "temperature": 1.0, "lenience": eps, "lenience_fn": fn}
    settings["generator"] = torch.Generator().manual_seed(1)
    ids = prompt.repeat(8000, 1)
    out = speculative_generate(target, draft, ids, max_new_tokens=2, **settings)
    counts = torch.bincount(out.sequences[:, 3], minlength=5).double()
    statistic, critical = chi_square(counts, exact * 8000)
    assert statistic < critical
    assert abs(out.stats.alpha - passing.sum()) < 4 * math.sqrt(0.25 / 8000)


def test_greedy_lenience_is_the_stated_rule(pairs):
    target, draft = pairs["llama"]
    for seed in range(20):
        prompt = torch.randint(0, 40, (1, 5), generator=torch.Generator().manual_seed(seed))
        p = target(prompt).logits[0, -1].double().softmax(-1)
        token = draft(prompt).logits[0, -1].argmax()
        for eps in (0.3, 0.6):
            settings = {"gamma": 1, "lenience": eps, "lenience_fn": "lin"}
            out = speculative_generate(target, draft, prompt, max_new_tokens=2, **settings)
            passes = bool(token == p.argmax() or p[token] / eps > p.max())
            assert out.stats.accepted == passes
            assert out.sequences[0, 5] == (token if passes else p.argmax())


# Counts


def test_stats_by_hand():
    counts = {"rounds": 3, "drafted": 12, "accepted": 6, "rejected": 2, "never_judged": 4}
    counts |= {"target_calls": 3, "generated": 8, "cut": 1}
    counts["per_position"] = ([3, 2, 1], [3, 3, 2])
    stats = Stats(**counts)
    stats.check()
    assert stats.alpha == 6 / 8 and stats.draft_acceptance == 0.5 and stats.tau == 8 / 3
    assert stats.predicted_tau(2) == pytest.approx(1 + 0.75 + 0.75**2)
    assert Stats(accepted=4).predicted_tau(5) == 6
    double = stats + stats + Stats()
    assert double.accepted == 12 and double.per_position == ([6, 4, 2], [6, 6, 4])
    assert double.alpha == stats.alpha
    empty = Stats()
    rates = (empty.alpha, empty.tau, empty.draft_acceptance, empty.predicted_tau(3))
    assert all(map(math.isnan, rates))
    wrong_counts = ({"never_judged": 3}, {"generated": 9}, {"per_position": ([3, 2, 2], [3, 3, 2])})
    for wrong in wrong_counts:
        with pytest.raises(AssertionError):
            Stats(**{**counts, **wrong}).check()


def test_counts_add_up_when_sampling(small):
    target, draft, _ = small
    ids = torch.tensor([[1, 0, 3], [2, 4, 1], [0, 0, 0]]).repeat(20, 1)
    settings = {"max_new_tokens": 23, "gamma": 4, "temperature": 1.0, "eos_token_id": 2}
    settings["generator"] = torch.Generator().manual_seed(0)
    out = speculative_generate(target, draft, ids, pad_token_id=2, **settings)
    for row, stats in zip(out.sequences[:, 3:].tolist(), out.row_stats, strict=True):
        stats.check()
        length = row.index(2) + 1 if 2 in row else len(row)
        assert stats.generated == length and set(row[length:]) <= {2}
        assert stats.target_calls - stats.rounds in (0, 1) and stats.rejected <= stats.rounds
        assert stats.cut in (0, 1)
        assert sum(stats.per_position[1][:1]) == stats.rounds  # a round judges its first draft
    assert {stats.cut for stats in out.row_stats} == {0, 1}


def test_on_tokens_sees_everything_that_comes_out(pairs, prompts):
    target, draft = pairs["phi"]
    ids, mask = prompts
    calls = []
    settings = {"max_new_tokens": 25, "on_tokens": lambda *call: calls.append(call)}
    out = speculative_generate(target, draft, ids, mask, **settings)
    texts = [[], [], [], []]
    for row, tokens, accepted in calls:
        assert accepted in (len(tokens), len(tokens) - 1)
        texts[row] += tokens
    assert texts == out.sequences[:, 10:].tolist()
    assert sum(accepted for _, _, accepted in calls) == out.stats.accepted


# Acceptance without decoding


@pytest.mark.parametrize("group", [2**26, 1])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}]
)
def test_expected_acceptance_against_float64(pairs, monkeypatch, sampling, group):
    monkeypatch.setattr(speculative, "LOGITS_PER_PASS", group)
    target, draft = pairs["codegen"]
    ids = torch.randint(0, 37, (3, 14), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    labels[0, :5] = ids[0, :5]  # column 0 cannot be predicted
    labels[2, 3:9] = ids[2, 3:9]
    labels[2, 11] = ids[2, 11]
    result = expected_acceptance(target, draft, ids, labels, vocab_size=37, **sampling)
    wide = [copy.deepcopy(model).double() for model in (target, draft)]
    overlap, agree, ratio = [], [], []
    places = [(0, 1), (0, 2), (0, 3), (0, 4), *((2, t) for t in range(3, 9)), (2, 11)]
    for row, t in places:
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
    assert nothing.agree.dtype == torch.bool


def acceptance_of_output(target, draft, sequences, prompt_length, row_lengths, **sampling):
    labels = sequences.clone()
    labels[:, :prompt_length] = -100
    for row, length in enumerate(row_lengths):
        labels[row, prompt_length + length :] = -100
    return expected_acceptance(target, draft, sequences, labels, **sampling)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_simulated_rounds_are_decoding_itself_at_temperature_0(pairs, name):
    """All counts of all rows, for every gamma, from one pass a model; end tokens and limits
    included."""
    target, draft = pairs[name]
    ids = torch.randint(0, 40, (12, 6), generator=torch.Generator().manual_seed(2))
    new = autoregressive_generate(target, ids, max_new_tokens=21)[:, 6:].tolist()
    often = [sum(token in row for row in new) for token in range(40)]
    ends = [token for token in range(40) if 0 < often[token] < 6][:2]  # ends some rows only
    settings = {"max_new_tokens": 21, "eos_token_id": ends}
    sequences = autoregressive_generate(target, ids, **settings)
    for gamma in (1, 4, 30):
        out = speculative_generate(target, draft, ids, gamma=gamma, **settings)
        assert torch.equal(out.sequences, sequences)
        lengths = [stats.generated for stats in out.row_stats]
        assert min(lengths) < 21 and max(lengths) == 21
        ratio = acceptance_of_output(target, draft, sequences, 6, lengths, temperature=0.0).ratio
        simulated = simulate_rounds(ratio, lengths, gamma, max_new_tokens=21)
        for expected, real in zip(simulated.row_stats, out.row_stats, strict=True):
            assert same_counts(expected, real, gamma)
        assert simulated.tau == out.stats.tau and simulated.alpha == out.stats.alpha


def exact_counts(target, draft, prompt, n, gamma, end):
    """E[accepted], E[judged], E[target calls] of the algorithm itself, by recursion over everything
    that can happen."""
    double = [copy.deepcopy(model).double() for model in (target, draft)]
    known = {}

    def distributions(text):
        if text not in known:
            ids = torch.tensor([[*prompt, *text]])
            with torch.no_grad():
                known[text] = [model(ids).logits[0, -1].softmax(-1) for model in double]
        return known[text]

    def expect(text, position, usable):
        """Expected counts from here on; `position` of the round's `usable` drafts were accepted."""
        if len(text) == n or (text and text[-1] == end):
            return torch.zeros(3, dtype=torch.float64)
        p, q = distributions(text)
        if position is None:
            call = torch.tensor([0, 0, 1.0], dtype=torch.float64)
            return call + expect(text, 0, min(gamma, n - len(text) - 1))
        total = torch.zeros(3, dtype=torch.float64)
        both = torch.minimum(p, q)
        if position == usable:
            return sum(p[x] * expect((*text, x), None, 0) for x in range(5))
        total[0] += both.sum()
        total[1] += 1
        residual = (p - q).clamp(min=0)
        for x in range(5):
            total += both[x] * expect((*text, x), position + 1, usable)
            total += residual[x] * expect((*text, x), None, 0)
        return total

    return expect((), None, 0)


@pytest.mark.parametrize("gamma", [1, 2, 4])
def test_simulated_rounds_are_exact_in_the_mean_over_target_written_text(small, gamma):
    """Weighted over all texts the simulated counts equal the algorithm's expected counts: no Monte
    Carlo in it."""
    target, _, draft = small
    prompt, n, end = torch.tensor([[1, 0, 3]]), 4, 2
    texts, weights = {}, {}
    for index, probability in enumerate(enumerate_texts(target, prompt, n, 5).tolist()):
        text = [index // 125, index // 25 % 5, index // 5 % 5, index % 5]
        text = tuple(until_end(text, [end]))
        texts[text] = torch.tensor([1, 0, 3, *text, *[0] * (n - len(text))])
        weights[text] = weights.get(text, 0.0) + probability
    lengths = [len(text) for text in texts]
    chances = acceptance_of_output(target, draft, torch.stack(list(texts.values())), 3, lengths)
    rows = simulate_rounds(chances.ratio, lengths, gamma, max_new_tokens=n).row_stats
    weight = torch.tensor(list(weights.values()), dtype=torch.float64)
    counts = [[s.accepted, s.accepted + s.rejected, s.target_calls] for s in rows]
    mean = (weight[:, None] * torch.tensor(counts, dtype=torch.float64)).sum(0)
    expected = exact_counts(target, draft, (1, 0, 3), n, gamma, end)
    torch.testing.assert_close(mean, expected, rtol=2e-5, atol=0)
    if gamma > 1:  # overlap in its place is measurably wrong, so this test can tell
        wrong = simulate_rounds(chances.overlap, lengths, gamma, max_new_tokens=n).row_stats
        calls = sum(w * s.target_calls for w, s in zip(weight.tolist(), wrong, strict=True))
        assert abs(calls / expected[2] - 1) > 1e-3


def test_simulated_rounds_agree_with_decoding_at_temperature_1(small):
    """tau and alpha of 2000 decoded rows within 4.5 standard errors of those of 2000 other texts;
    false alarms 1.4e-5."""
    target, draft, _ = small
    ids, gamma = torch.tensor([[1, 0, 3]]).repeat(2000, 1), 3
    settings = {"max_new_tokens": 12, "temperature": 1.0, "eos_token_id": 2}
    generator = torch.Generator().manual_seed(0)
    out = speculative_generate(target, draft, ids, gamma=gamma, generator=generator, **settings)
    texts = autoregressive_generate(target, ids, generator=generator, **settings)
    lengths = [len(until_end(row, [2])) for row in texts[:, 3:].tolist()]
    chances = acceptance_of_output(target, draft, texts, 3, lengths)
    simulated = simulate_rounds(chances.ratio, lengths, gamma, max_new_tokens=12)

    def estimate(rows, numerator, denominator):
        """A ratio of sums over rows, and its variance by the delta method."""
        a = torch.tensor([numerator(stats) for stats in rows]).double()
        b = torch.tensor([denominator(stats) for stats in rows]).double()
        ratio = a.sum() / b.sum()
        return ratio, ((a - ratio * b).std() / b.mean()) ** 2 / len(rows)

    for counts in (
        (lambda s: s.generated, lambda s: s.target_calls),
        (lambda s: s.accepted, lambda s: s.accepted + s.rejected),
    ):
        x, x_variance = estimate(out.row_stats, *counts)
        y, y_variance = estimate(simulated.row_stats, *counts)
        assert abs(x - y) < 4.5 * math.sqrt(x_variance + y_variance)


def test_simulate_rounds_refuses_lengths_that_do_not_fit():
    with pytest.raises(ValueError, match="row_lengths"):
        simulate_rounds(torch.ones(5), [2, 2], 3)
    with pytest.raises(ValueError, match="max_new_tokens"):
        simulate_rounds(torch.ones(5), [3, 2], 3, max_new_tokens=2)
    assert math.isnan(simulate_rounds(torch.ones(0), [], 3).tau)
    assert simulate_rounds(torch.ones(12), [12], 5, max_new_tokens=12).tau == 6


# What is refused


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gamma": 0}, "gamma"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"lenience": 0.0}, "lenience"),
        ({"lenience": 1.5}, "lenience"),
        ({"lenience_fn": "cube"}, "lenience_fn"),
        ({"vocab_size": 41}, "vocab_size"),
        ({"max_new_tokens": 61}, "context"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "left padding"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "left padding"),
        ({"attention_mask": torch.tensor([[0, 0, 0, 0]])}, "left padding"),
        ({"attention_mask": torch.tensor([[1, 1]])}, "left padding"),
        ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, "empty"),
    ],
)
def test_bad_arguments_are_refused(pairs, wrong, message):
    arguments = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "max_new_tokens": 5} | wrong
    with pytest.raises(ValueError, match=message) as caught:
        speculative_generate(*pairs["llama"], **arguments)
    assert "\n" not in str(caught.value)


def test_layers_that_cannot_go_back_are_refused(prompts):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 40}
    model = AutoModelForCausalLM.from_config(MistralConfig(**sizes, sliding_window=4)).eval()
    with pytest.raises(ValueError, match="full attention"):
        speculative_generate(model, model, prompts[0], max_new_tokens=5)


def test_models_without_position_ids_decode_single_rows_only():
    """ALiBi counts cache slots, so holes or padding would shift it: one row is right, more are
    refused."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(50, (2, 6))
    out = speculative_generate(model, model, ids[:1], max_new_tokens=12, gamma=3)
    assert torch.equal(out.sequences, transformers_greedy(model, ids[:1], 12))
    with pytest.raises(ValueError, match=r"Bloom.* takes no position_ids"):
        speculative_generate(model, model, ids, max_new_tokens=12)


# The command line


def save_tokenizer(folder, corpus, vocab_size):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([corpus], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved target and draft with one byte-level tokenizer, a draft with another, and a T5."""
    root = tmp_path_factory.mktemp("models")
    target = build("neox", vocab=300, seed=1)
    corpus = "the cat sat on the mat, the hat"
    for name, model, text in (
        ("target", target, corpus),
        ("draft", noised(target, 0.1), corpus),
        ("other", target, "zebras zip zigzag"),
    ):
        model.generation_config.eos_token_id = None
        model.save_pretrained(root / name)
        save_tokenizer(root / name, text, 270)
    sizes = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "vocab_size": 300}
    T5Config(**sizes).save_pretrained(root / "t5")
    (root / "empty").mkdir()
    return root


def command(folders, *extra, target="target", draft="draft", prompt=("--prompt", "the cat")):
    models = ["--target", str(folders / target), "--draft", str(folders / draft)]
    speculative.main([*models, *prompt, "--max-new-tokens", "20", *extra])


def test_command_line_prints_text_and_rates(folders, capsys):
    command(folders)
    out, err = capsys.readouterr()
    assert not err
    tokenizer = AutoTokenizer.from_pretrained(folders / "target")
    model = AutoModelForCausalLM.from_pretrained(folders / "target")
    prompt = tokenizer("the cat", return_tensors="pt").input_ids
    settings = {"eos_token_id": 0, "vocab_size": len(tokenizer)}
    text = autoregressive_generate(model, prompt, max_new_tokens=20, **settings)[0]
    text = tokenizer.decode(text, skip_special_tokens=True)
    assert out.startswith(printable(text))
    assert "alpha 0." in out and "tau " in out and "speed-up" in out


def test_command_line_says_which_generation_settings_it_ignores(folders, capsys, tmp_path):
    """A draft with a repetition penalty of its own writes what it writes without."""
    shutil.copytree(folders, tmp_path, dirs_exist_ok=True)
    GenerationConfig(repetition_penalty=5.0).save_pretrained(tmp_path / "draft")
    command(folders, "--json")
    command(tmp_path, "--json")
    plain, own = map(json.loads, capsys.readouterr().out.splitlines())
    assert own["per_position"] == plain["per_position"] and plain["ignored_settings"] == ""
    assert own["ignored_settings"].endswith("settings: the draft's repetition_penalty 5.0")
    command(tmp_path)
    assert capsys.readouterr().out.startswith(own["ignored_settings"] + " (--temperature, ")


def test_command_line_escapes_control_characters(folders, capsys):
    command(folders, prompt=("--prompt", "the \x1b[31mcat\x07"))
    out = capsys.readouterr().out
    assert out.startswith(r"the \x1b[31mcat\x07") and out.replace("\n", "").isprintable()


def test_command_line_json(folders, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "the cat"}\n\n{"prompt": "on the mat"}\n')
    arguments = ("--json", "--temperature", "1", "--gamma", "3", "--seed", "4")
    results = []
    for _ in range(2):
        command(folders, *arguments, "--lenience-fn", "LIN", prompt=("--prompts", str(file)))
        results.append(json.loads(capsys.readouterr().out))
    first, second = results
    assert len(first["texts"]) == 2 and first["gamma"] == 3 and first["seed"] == 4
    assert first["lenience_fn"] == "lin"
    assert first["alpha"] == pytest.approx(
        first["accepted"] / (first["accepted"] + first["rejected"])
    )
    rate, target_rate = first["tokens_per_second"], first["target_tokens_per_second"]
    assert first["speedup"] == pytest.approx(rate / target_rate)
    assert second["texts"] == first["texts"] and second["per_position"] == first["per_position"]


def test_command_line_json_without_drafts(folders, capsys):
    """Nothing drafted, nothing judged: null, since JSON has no NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    command(folders, "--json", "--max-new-tokens", "1")
    result = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert result["alpha"] is None and result["draft_acceptance"] is None and result["tau"] == 1


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
        ({}, ("--temperature", "1e-38"), "temperature must be"),
        ({}, ("--lenience", "0"), "lenience must be in"),
        ({}, ("--lenience", "1.1"), "lenience must be in"),
        ({}, ("--top-p", "0"), "top_p must be in"),
        ({}, ("--max-new-tokens", "0"), "max_new_tokens must be at least 1"),
        ({}, ("--seed", "-1"), "seed must be at least 0"),
    ],
)
def test_command_line_errors_are_one_line(folders, capsys, kwargs, extra, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        command(folders, *extra, **kwargs)
    assert "\n" not in str(caught.value) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--gama", "3"], "unrecognized arguments: --gama"),
        (["--temperature", "hot"], "invalid float value: 'hot'"),
        (["--lenience-fn", "linear"], "did you mean 'lin'?"),
        (["--dtype", "half"], "unknown name 'half'"),
    ],
)
def test_command_line_that_cannot_be_read(capsys, extra, message):
    with pytest.raises(SystemExit) as caught:
        speculative.main(["--target", "t", "--draft", "d", "--prompt", "a", *extra])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and message in err and err.count("\n") == 1
    assert err.startswith("speculative.py: error: ")


def test_help_has_a_word_and_the_default_for_every_flag(capsys):
    with pytest.raises(SystemExit):
        speculative.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag, default in {
        "--gamma": 5, "--max-new-tokens": 128, "--temperature": 0.0, "--top-k": 0, "--top-p": 1.0,
        "--lenience": 1.0, "--lenience-fn": "exp", "--seed": 0, "--dtype": "float32",
    }.items():  # fmt: skip
        entry = text.split(f" {flag} ")[-1].split(" --")[0]
        assert f"(default: {default})" in entry and len(entry.split("(default")[0].split()) > 2


def test_command_line_takes_chats(folders, capsys, tmp_path):
    """--chat puts a text through the target's template; a file may hold chats; the text that is
    printed is the answer alone."""
    shutil.copytree(folders, tmp_path / "models")
    target = tmp_path / "models" / "target"
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ' sat' if m.role == 'assistant' }}{{ m.content }}{% endfor %}"
        "{{ ' sat' if add_generation_prompt }}"
    )
    tokenizer.save_pretrained(target)
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "the cat"}]}\n')
    texts = []
    for prompt in (["--prompt", "the cat", "--chat"], ["--prompts", str(file)]):
        command(tmp_path / "models", "--json", prompt=prompt)
        texts += json.loads(capsys.readouterr().out)["texts"]
    command(folders, "--json", prompt=["--prompt", "the cat sat"])
    texts += json.loads(capsys.readouterr().out)["texts"]
    assert texts[0] == texts[1] == texts[2]
    command(tmp_path / "models", "--chat")
    assert capsys.readouterr().out.startswith(printable(texts[0]))
    with pytest.raises(ValueError, match="the prompt: a chat, but the tokenizer has no chat temp"):
        command(folders, "--chat")
