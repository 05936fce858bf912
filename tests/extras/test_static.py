"""static.py: the sampler's output on static caches is what it is without; compiled, no shape is
compiled twice."""

import copy

import pytest
import torch

import speculative
from extras.static import StaticModel
from short_head import shorten_head
from speculative import autoregressive_generate, has_thin_products, speculative_generate
from tests.sampling import (
    CONTEXT,
    build,
    chi_square,
    enumerate_texts,
    five_token_models,
    half_agreeing_pairs,
    noised,
    sample_counts,
)


@pytest.fixture(scope="module")
def pairs():
    return half_agreeing_pairs()


@pytest.fixture(scope="module")
def prompts():
    """Four left-padded prompts of 10, 7, 3 and 1 tokens, among them the token 0."""
    ids = torch.randint(0, 40, (4, 10), generator=torch.Generator().manual_seed(3))
    ids[:, -1] = torch.tensor([4, 0, 7, 0])
    mask = (torch.arange(10) >= torch.tensor([[0], [3], [7], [9]])).long()
    return ids, mask


def static(models, length=CONTEXT, rows=1):
    return [StaticModel(model, length, rows, backend=None) for model in models]


def assert_same(output, expected):
    assert torch.equal(output.sequences, expected.sequences)
    assert output.row_stats == expected.row_stats


@pytest.mark.parametrize("name", ["neox", "llama"])
def test_greedy_is_the_targets_own(pairs, prompts, name):
    """Over many roll-backs; the caches of one decoding serve the next, with whatever is in them."""
    target, draft = pairs[name]
    models = static((target, draft))
    for row, gamma in enumerate([1, 2, 3, 4, 5]):
        settings = {"max_new_tokens": 20, "gamma": gamma}
        ids = prompts[0][row % 4 : row % 4 + 1, row:]
        expected = speculative_generate(target, draft, ids, **settings)
        assert 0 < expected.stats.alpha < 1
        assert_same(speculative_generate(*models, ids, **settings), expected)
    alone = autoregressive_generate(models[0], ids, max_new_tokens=20)
    assert torch.equal(alone, expected.sequences)


@pytest.mark.parametrize("name", ["neox", "llama", "phi", "codegen", "gpt2"])
def test_the_last_position_of_the_context_is_reached(prompts, name):
    """Also by rows fed more drafts than they can use; and where one of the models is static."""
    target = build(name, seed=5, context=32)
    draft = noised(target)
    ids = prompts[0][:2]
    settings = {"max_new_tokens": 22, "gamma": 8}
    expected = speculative_generate(target, draft, ids, **settings)
    assert expected.stats.rejected > 2 and 0 < expected.stats.alpha < 1
    models = static((target, draft), 32, rows=3)
    for pair in (models, (target, models[1]), (models[0], draft)):
        assert_same(speculative_generate(*pair, ids, **settings), expected)


@pytest.mark.parametrize("name", ["neox", "llama"])
def test_rows_of_a_batch_end_when_they_would_alone(pairs, prompts, name):
    """In caches of more rows than the batch has, whose rows end one by one."""
    target, draft = pairs[name]
    ids, mask = prompts
    text = autoregressive_generate(target, ids[:1], max_new_tokens=20)[0, 10:].tolist()
    limits = [24, 9, CONTEXT - 3, 12]
    models = static((target, draft), rows=6)
    for gamma, ends in ((1, [text[9], 3]), (5, None)):
        settings = {"max_new_tokens": limits, "eos_token_id": ends}
        expected = speculative_generate(target, draft, ids, mask, gamma=gamma, **settings)
        assert len({stats.target_calls for stats in expected.row_stats}) >= 3
        output = speculative_generate(*models, ids, mask, gamma=gamma, **settings)
        assert_same(output, expected)
        alone = autoregressive_generate(models[0], ids, mask, **settings)
        assert torch.equal(alone, expected.sequences)


def test_end_token_inside_an_accepted_block(pairs, prompts):
    target = pairs["llama"][0]
    ids = prompts[0][:1]
    text = autoregressive_generate(target, ids, max_new_tokens=20)[0, 10:].tolist()
    place = next(i for i in range(2, 20) if text[i] not in text[:i] and i % 6 in (1, 2, 3))
    settings = {"max_new_tokens": 20, "gamma": 5, "eos_token_id": text[place]}
    expected = speculative_generate(target, target, ids, **settings)
    assert expected.stats.cut == 1
    assert_same(speculative_generate(*static((target, target)), ids, **settings), expected)


@pytest.mark.parametrize("gamma", [1, 3])
def test_sampling_is_lossless(gamma):
    """False alarms: 1e-4 a case."""
    target, draft, _ = five_token_models()
    prompt = torch.tensor([[1, 3, 0, 2]])
    samples, n = 4000, 3
    models = static((target, draft), length=8, rows=samples)
    counts, stats = sample_counts(*models, prompt, n, 5, samples, gamma=gamma, temperature=1.0)
    assert 0.2 < stats.alpha < 0.95
    expected = samples * enumerate_texts(target, prompt, n, 5, temperature=1.0)
    statistic, critical = chi_square(counts, expected)
    assert statistic < critical


def test_the_same_draws_give_the_same_tokens(pairs, prompts):
    """At temperature 1, top-k and top-p, with a draft of a short head."""
    target, draft = pairs["llama"]
    draft = shorten_head(copy.deepcopy(draft), torch.arange(0, 40, 2))
    settings = {"max_new_tokens": 30, "temperature": 1.0, "top_k": 30, "top_p": 0.9}
    outputs = [
        speculative_generate(
            *pair, prompts[0][:1], generator=torch.Generator().manual_seed(0), **settings
        )
        for pair in ((target, draft), static((target, draft)))
    ]
    assert 0 < outputs[0].stats.alpha < 1
    assert_same(*outputs)


def test_what_does_not_fit_is_refused(pairs, prompts):
    target, draft = pairs["llama"]
    ids, mask = prompts
    models = static((target, draft), length=32, rows=2)
    for pair in (models, (target, models[1]), (models[0], None)):
        with pytest.raises(ValueError, match="up to 33, but the static caches have room for 32"):
            speculative_generate(*pair, ids[:1], max_new_tokens=23)
    with pytest.raises(ValueError, match="a batch of 4 rows, but the static caches have 2"):
        speculative_generate(*models, ids, mask, max_new_tokens=4)
    with pytest.raises(ValueError, match="length must be from 1 to LlamaForCausalLM's context of"):
        static((target,), length=CONTEXT + 1)
    target.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="need attn_implementation eager or sdpa"):
        static((target,))
    target.config._attn_implementation = "eager"
    expected = speculative_generate(target, draft, ids[:1], max_new_tokens=22)
    assert_same(speculative_generate(*models, ids[:1], max_new_tokens=22), expected)
    target.config._attn_implementation = "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend", "gammas"),
    # 6 drafts make 8 tokens as 5 do; the last rounds have 1, 2 or 4
    [("llama", "eager", (1, 1)), ("neox", "inductor", (5, 5, 6))],
)
def test_compiled_once_for_each_shape(prompts, name, backend, gammas, monkeypatch):
    """And whole, without graph breaks, `thin_linear` included."""
    monkeypatch.setattr(speculative, "THIN_PRODUCTS", True)
    target = build(name, seed=5, vocab=600, hidden=256)
    draft = noised(target)
    assert has_thin_products(target.get_output_embeddings())
    models = [StaticModel(model, CONTEXT, backend=backend) for model in (target, draft)]
    for number, gamma in enumerate(gammas):
        ids = prompts[0][:1, number:]
        settings = {"max_new_tokens": CONTEXT - 10, "gamma": gamma}
        expected = speculative_generate(target, draft, ids, **settings)
        assert 0 < expected.stats.alpha < 1
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            output = speculative_generate(*models, ids, **settings)
        assert_same(output, expected)
