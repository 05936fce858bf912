"""tree.py: losslessness at temperature 0 (token for token) and above (chi-square), counts, caches, edge cases, command line.

Statistical tests use fixed seeds, so they pass or fail for good; the stated false-alarm rate is the chance that an unlucky
seed would have failed a correct sampler.
"""

import json
import math

import pytest
import torch
from test_speculative import ARCHITECTURES, CONTEXT, biased, build, chi_square, enumerate_texts, noised, same_counts
from transformers import AutoModelForCausalLM, BloomConfig, MistralConfig

import tree
from speculative import Stats, autoregressive_generate, speculative_generate
from tree import tree_generate

PROMPT = torch.tensor([[5, 0, 39, 7, 0]])


@pytest.fixture(scope="module")
def pairs():
    """A target, a half-agreeing and an unrelated draft of every architecture."""
    targets = {name: build(name, seed=5) for name in ARCHITECTURES}
    return {name: (model, noised(model), build(name, seed=77)) for name, model in targets.items()}


@pytest.fixture(scope="module")
def small():
    """A target and drafts over five tokens, so that all continuations can be enumerated."""
    target = build("llama", vocab=5, hidden=16, initializer_range=0.25)
    return target, noised(target, 0.6), build("llama", vocab=5, seed=9, hidden=16, initializer_range=0.25)


def slow_tree(target, draft, prompt, max_new_tokens, branching, ends=(), draft_logits=None):
    """Greedy tree drafting re-stated without trees, masks or caches: (tokens, counts).

    Only the node on the target's path matters: there the draft's b likeliest tokens hold the target's choice or do not.
    `draft_logits(text, drafts)`: those of a draft that can only begin after a first, plain target call (an EAGLE head).
    """

    def logits(model, tokens):
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0, -1]

    text, stats, depths = [], Stats(), len(branching)
    if draft_logits:
        text, stats.target_calls = [int(logits(target, prompt).argmax())], 1
    guesses = draft_logits or (lambda text, drafts: logits(draft, text + drafts))
    accepted_at, judged_at = [0] * depths, [0] * depths
    while len(text) < max_new_tokens and not (text and text[-1] in ends):
        usable, start, accepted, ended = min(depths, max_new_tokens - len(text) - 1), prompt + text, 0, False
        stats.target_calls += 1
        stats.rounds += usable > 0
        while True:
            own = int(logits(target, prompt + text).argmax())
            guess = accepted < usable and guesses(start, text[len(start) - len(prompt) :])
            hit = accepted < usable and own in guess.topk(branching[accepted]).indices
            if accepted < usable:
                judged_at[accepted] += 1
                accepted_at[accepted] += hit
            text.append(own)
            accepted += hit
            ended = hit and own in ends
            if not hit or ended:
                break
        stats.cut += ended
        stats.drafted += accepted if ended else usable
        stats.rejected += not ended and accepted < usable
        stats.never_judged += 0 if ended else max(0, usable - accepted - 1)
        stats.accepted += accepted
    stats.generated = len(text)
    return text, stats + Stats(per_position=(accepted_at, judged_at))


# --- temperature 0: token for token the target's own output ------------------------------------------------------------


@pytest.mark.parametrize("branching", [(1,), (1, 1, 1), (3, 2), (4, 2, 2, 1)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_the_targets_own(pairs, name, branching):
    """And the counts are those of a sampler without masks or caches, so the draft's own tree is right too."""
    target, half, unrelated = pairs[name]
    expected = autoregressive_generate(target, PROMPT, max_new_tokens=30)
    for draft in (target, half, unrelated):
        out = tree_generate(target, draft, PROMPT, branching=branching, max_new_tokens=30)
        assert torch.equal(out.sequences, expected)
        assert out.row_stats == [out.stats]
        counts = slow_tree(target, draft, PROMPT[0].tolist(), 30, branching)[1]
        assert same_counts(out.stats, counts, len(branching))
        if draft is target:
            assert out.stats.alpha == 1 and out.stats.target_calls == math.ceil(30 / (len(branching) + 1))


@pytest.mark.parametrize("name", ["neox", "llama", "phi"])
def test_eager_and_sdpa_take_the_mask(name):
    for attention in ("eager", "sdpa"):
        target = build(name, seed=5)
        target.set_attn_implementation(attention)
        expected = autoregressive_generate(target, PROMPT, max_new_tokens=20)
        assert torch.equal(tree_generate(target, noised(target), PROMPT, max_new_tokens=20).sequences, expected)


@pytest.mark.parametrize("depth", [1, 3, 5])
@pytest.mark.parametrize("name", ["llama", "codegen"])
def test_branching_of_ones_counts_as_the_chain_does(pairs, name, depth):
    target, half, _ = pairs[name]
    text = autoregressive_generate(target, PROMPT, max_new_tokens=30)[0, 5:].tolist()
    for ends, n in ((None, 30), (None, 2), ([text[9], text[13]], 30)):
        chain = speculative_generate(target, half, PROMPT, gamma=depth, max_new_tokens=n, eos_token_id=ends)
        out = tree_generate(target, half, PROMPT, branching=[1] * depth, max_new_tokens=n, eos_token_id=ends)
        assert out.stats == chain.stats and torch.equal(out.sequences, chain.sequences)


def test_a_wider_tree_accepts_more(pairs):
    target, half, _ = pairs["neox"]
    calls = [tree_generate(target, half, PROMPT, branching=(b,) * 3, max_new_tokens=40).stats.target_calls for b in (1, 2, 4)]
    assert calls[0] > calls[1] > calls[2]


def test_branching_beyond_the_vocabulary(small):
    """All tokens are children: the path never breaks off."""
    for temperature in (0.0, 1.0):
        generator = torch.Generator().manual_seed(0)
        out = tree_generate(small[0], small[2], torch.tensor([[1, 0, 3]]), branching=(9, 5), max_new_tokens=30,
                            temperature=temperature, generator=generator)  # fmt: skip
        assert out.stats.rejected == 0 and out.stats.tau == 3


@pytest.mark.parametrize("max_new_tokens", range(1, 10))
def test_limit_inside_a_path(pairs, max_new_tokens):
    target, half, _ = pairs["neox"]
    expected = autoregressive_generate(target, PROMPT, max_new_tokens=max_new_tokens)
    for draft in (target, half):
        out = tree_generate(target, draft, PROMPT, branching=(2, 2, 1), max_new_tokens=max_new_tokens)
        assert torch.equal(out.sequences, expected)
        counts = slow_tree(target, draft, PROMPT[0].tolist(), max_new_tokens, (2, 2, 1))[1]
        assert same_counts(out.stats, counts, 3)


def test_end_token_inside_an_accepted_path(pairs):
    target, half, _ = pairs["llama"]
    text = autoregressive_generate(target, PROMPT, max_new_tokens=30)[0, 5:].tolist()
    n = next(i for i in range(1, 4) if text[i] not in text[:i]) + 1  # inside the first round of a draft that agrees
    out = tree_generate(target, target, PROMPT, branching=(2, 1, 2, 1), max_new_tokens=30, eos_token_id=text[n - 1])
    assert out.sequences[0, 5:].tolist() == text[:n]
    assert out.stats == Stats(
        rounds=1, drafted=n, accepted=n, target_calls=1, generated=n, cut=1, per_position=([1] * n, [1] * n)
    )
    cuts = set()
    for end in set(text):  # wherever it falls: on a draft, on the target's own token, as an int or in a list
        expected, counts = slow_tree(target, half, PROMPT[0].tolist(), 30, (3, 2, 1), (end,))
        for ends in (end, [end, 40]):
            out = tree_generate(target, half, PROMPT, branching=(3, 2, 1), max_new_tokens=30, eos_token_id=ends)
            assert out.sequences[0, 5:].tolist() == expected and same_counts(out.stats, counts, 3)
        cuts.add(out.stats.cut)
    assert cuts == {0, 1}


def test_token_zero_is_an_ordinary_token_and_a_legal_end(pairs):
    target, half, _ = pairs["phi"]
    bias = [3.0] + [0.0] * 39  # token 0 comes often
    target, draft = biased(target, bias), biased(half, bias)
    text = autoregressive_generate(target, PROMPT, max_new_tokens=30)
    assert (text[0, 5:] == 0).any() and (text[0, 5:] != 0).any()
    assert torch.equal(tree_generate(target, draft, PROMPT, max_new_tokens=30).sequences, text)
    ended = tree_generate(target, draft, PROMPT, max_new_tokens=30, eos_token_id=0).sequences[0, 5:].tolist()
    assert ended == text[0, 5:].tolist()[: ended.index(0) + 1] and ended[-1] == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_position_of_the_context_is_reached(pairs, name):
    target, half, _ = pairs[name]
    out = tree_generate(target, half, PROMPT, max_new_tokens=CONTEXT - 5)
    assert torch.equal(out.sequences, autoregressive_generate(target, PROMPT, max_new_tokens=CONTEXT - 5))


def test_models_of_different_architectures_and_heads_can_be_paired(pairs):
    """The draft's head is 11 rows longer, all of them loud: no such token ever comes."""
    target = pairs["neox"][0]
    draft = biased(build("phi", vocab=51, seed=3), [0.0] * 40 + [9.0] * 11)
    for vocab_size in (None, 30):
        expected = autoregressive_generate(target, PROMPT, max_new_tokens=20, vocab_size=vocab_size)
        out = tree_generate(target, draft, PROMPT, max_new_tokens=20, vocab_size=vocab_size)
        assert torch.equal(out.sequences, expected)


# --- calls and caches --------------------------------------------------------------------------------------------------


def test_one_target_call_a_round(pairs):
    target, half, _ = pairs["llama"]
    calls = {"target": [], "draft": []}
    hooks = [
        model.register_forward_hook(lambda _, args, __, name=name: calls[name].append(args[0].shape[1]))
        for name, model in (("target", target), ("draft", half))
    ]
    stats = tree_generate(target, half, PROMPT, branching=(3, 2, 1), max_new_tokens=30).stats
    for hook in hooks:
        hook.remove()
    assert len(calls["target"]) == stats.target_calls and len(calls["draft"]) <= 3 * stats.rounds
    assert calls["target"][:2] == [5 + 3 + 6 + 6, 1 + 3 + 6 + 6] and calls["draft"][:3] == [5, 3, 6]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_caches_hold_a_prefix_of_the_text(pairs, monkeypatch, name, temperature):
    target, half, _ = pairs[name]
    kept, rollback = [], tree._TreeLane.rollback

    def spy(lane, n, path):
        rollback(lane, n, path)
        kept.append((lane.model, len(path), [(layer.keys.clone(), layer.values.clone()) for layer in lane.cache.layers]))

    monkeypatch.setattr(tree._TreeLane, "rollback", spy)
    generator = torch.Generator().manual_seed(0)
    text = tree_generate(target, half, PROMPT, branching=(3, 2, 1), max_new_tokens=40, temperature=temperature,
                         generator=generator).sequences  # fmt: skip
    assert max(accepted for _, accepted, _ in kept) >= 2  # slots were moved, not only dropped
    for model, _, layers in kept:
        slots = layers[0][0].shape[2]
        assert slots >= 5
        with torch.no_grad():
            fresh = model(text[:, :slots]).past_key_values
        for (keys, values), layer in zip(layers, fresh.layers, strict=True):
            torch.testing.assert_close(keys, layer.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(values, layer.values, atol=1e-4, rtol=1e-4)


def test_training_mode_is_put_back_and_the_generator_never_reseeded(pairs):
    model = build("neox", attention_dropout=0.5, hidden_dropout=0.5)
    expected = autoregressive_generate(model, PROMPT, max_new_tokens=20)
    model.train()
    assert torch.equal(tree_generate(model, model, PROMPT, max_new_tokens=20).sequences, expected) and model.training
    target, half, _ = pairs["llama"]
    state, generator = torch.get_rng_state(), torch.Generator().manual_seed(7)
    settings = {"max_new_tokens": 20, "temperature": 1.0}
    first, second = (tree_generate(target, half, PROMPT, generator=generator, **settings).sequences for _ in range(2))
    again = tree_generate(target, half, PROMPT, generator=torch.Generator().manual_seed(7), **settings).sequences
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


# --- temperature > 0: the target's distribution ------------------------------------------------------------------------


def tree_counts(target, draft, prompt, n, vocab, samples, **kwargs):
    """How often each continuation came out, decoded one by one with one generator throughout; and the counts' sum."""
    counts, stats, generator = torch.zeros(vocab**n, dtype=torch.float64), Stats(), torch.Generator().manual_seed(0)
    for _ in range(samples):
        out = tree_generate(target, draft, prompt, max_new_tokens=n, generator=generator, **kwargs)
        new = out.sequences[0, prompt.shape[1] :]
        counts[int((new * vocab ** torch.arange(n - 1, -1, -1)).sum())] += 1
        stats += out.stats
    return counts, stats


SETTINGS = {  # branching, sampling
    "wide": ((3, 2), {}),
    "chain": ((1, 1), {"temperature": 1.4}),
    "top-k": ((4, 3), {"top_k": 2}),  # q has fewer tokens than the tree has children
    "top-p": ((3, 1), {"top_p": 0.8}),
    "whole vocabulary": ((5, 2), {"temperature": 0.8}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_sampling_is_lossless(small, setting):
    """Every continuation of 3 tokens against its exact probability; false alarms 1e-4 for each of 5 cases."""
    target, draft, unrelated = small
    branching, sampling = SETTINGS[setting]
    sampling, prompt = {"temperature": 1.0} | sampling, torch.tensor([[1, 0, 3]])
    exact = enumerate_texts(target, prompt, 3, 5, **sampling)
    draft = unrelated if setting in ("wide", "whole vocabulary") else draft
    counts, stats = tree_counts(target, draft, prompt, 3, 5, 800, branching=branching, **sampling)
    statistic, critical = chi_square(counts, exact * 800)
    assert statistic < critical
    assert stats.rejected > 40 and stats.accepted > 400


def test_sampling_is_lossless_when_the_draft_never_agrees():
    """Disjoint supports: nothing is accepted, and the output is still the target's; false alarms 1e-4."""
    base = build("phi", vocab=6, hidden=16)
    target, draft = biased(base, [-1e4] * 2 + [0.0] * 4), biased(base, [0.0] * 2 + [-1e4] * 4)
    prompt = torch.tensor([[1, 4]])
    exact = enumerate_texts(target, prompt, 2, 6)
    counts, stats = tree_counts(target, draft, prompt, 2, 6, 800, branching=(3, 2), temperature=1.0)
    statistic, critical = chi_square(counts, exact * 800)
    assert statistic < critical
    assert stats.accepted == 0 and stats.tau == 1


def test_sampling_from_the_target_itself_accepts_all(small):
    out = tree_generate(small[0], small[0], torch.tensor([[1, 0, 3]]), branching=(2, 2), max_new_tokens=60, temperature=1.0,
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert out.stats.alpha > 0.95 and out.stats.tau > 2.8  # but for float rounding


@pytest.mark.parametrize("children", [1, 2, 3, 5, 8])
def test_one_node_is_lossless(children):
    """The rule alone, 8,000 times: its token is distributed as p; false alarms 1e-4 for each of 5 cases.

    p and q are far apart and each lacks a token of the other's; 8 children of a q that has 4 tokens.
    """
    logits = torch.tensor([1.0, -math.inf, 0.5, 2.0, -0.5])
    q = torch.tensor([0.55, 0.25, 0.15, 0.05, 0.0])
    generator, counts, accepted = torch.Generator().manual_seed(1), torch.zeros(5, dtype=torch.float64), 0
    for _ in range(8000):
        drafts, exist = tree._children(q[None], children, generator)
        child, token = tree._judge(logits, q, drafts[exist].tolist(), (1.0, 0, 1.0), generator)
        assert child is None or drafts[0, child] == token
        accepted += child is not None
        counts[token] += 1
    statistic, critical = chi_square(counts, logits.double().softmax(-1) * 8000)
    assert statistic < critical
    p = logits.softmax(-1)
    once = torch.minimum(p, q).sum().item()  # one child is accepted with this probability, more raise it
    assert abs(accepted / 8000 - once) < 4 * math.sqrt(0.25 / 8000) if children == 1 else accepted / 8000 > once + 0.05
    assert accepted / 8000 < 1 - p[4] + 0.03  # what q cannot draw is never accepted


def test_children_are_drawn_in_order_without_replacement():
    """Every ordered pair against q(x) q(y) / (1 - q(x)); false alarms 1e-4. And no more children than q has tokens."""
    q, generator = torch.tensor([0.6, 0.0, 0.3, 0.1]), torch.Generator().manual_seed(0)
    drafts, exist = tree._children(q.repeat(20_000, 1), 2, generator)
    exact = (q[:, None] * q / (1 - q[:, None])).double().fill_diagonal_(0).flatten()
    counts = torch.bincount(drafts @ torch.tensor([4, 1]), minlength=16).double()
    statistic, critical = chi_square(counts, exact * 20_000)
    assert exist.all() and statistic < critical
    drafts, exist = tree._children(torch.stack([q, torch.tensor([0.0, 1.0, 0.0, 0.0])]), 6, generator)
    assert exist.tolist() == [[True] * 3 + [False] * 3, [True] + [False] * 5]
    assert sorted(drafts[0, :3].tolist()) == [0, 2, 3] and drafts[1, 0] == 1 and drafts.max() < 4


def test_no_residual_falls_back_to_the_target(monkeypatch):
    """p == q and yet a rejection (rounding can do that): the token comes from p, not from 0 / 0."""
    logits = torch.log(torch.tensor([0.5, 0.0, 0.5]))
    monkeypatch.setattr(torch, "rand", lambda n, **kwargs: torch.tensor([1.0 + 1e-6] * (n - 1) + [0.9], dtype=torch.float64))
    assert tree._judge(logits, logits.exp(), [0], (1.0, 0, 1.0), None) == (None, 2)


# --- refusals and the command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_ids": PROMPT.repeat(2, 1)}, "one row at a time, got 2"),
        ({"input_ids": PROMPT[:, :0]}, "empty prompt"),
        ({"branching": ()}, "branching must be"),
        ({"branching": (2, 0)}, "branching must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": CONTEXT}, "context of 64"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"vocab_size": 41}, "vocab_size is 41"),
    ],
)
def test_settings_without_a_meaning_are_refused(pairs, settings, message):
    arguments = {"input_ids": PROMPT, "max_new_tokens": 5} | settings
    with pytest.raises(ValueError, match=message):
        tree_generate(*pairs["llama"][:2], **arguments)


def test_models_that_take_no_tree_mask_are_refused(pairs, monkeypatch):
    good = pairs["llama"][0]
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1}
    sliding = MistralConfig(**sizes, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=4)
    alibi = BloomConfig(**sizes, n_head=4)
    for config, message in ((sliding, "full attention"), (alibi, "takes position_ids")):
        bad = AutoModelForCausalLM.from_config(config).eval()
        for models in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match=message):
                tree_generate(*models, PROMPT, max_new_tokens=5)
    monkeypatch.setattr(good.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="eager or sdpa, LlamaForCausalLM has flash_attention_2"):
        tree_generate(good, good, PROMPT, max_new_tokens=5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A saved target and draft with the offline task's tokenizer."""
    root, target = tmp_path_factory.mktemp("models"), build("neox", vocab=len(tokenizer))
    target.config.max_position_embeddings = 512
    for name, model in (("target", target), ("draft", noised(target, 0.1))):
        model.generation_config.eos_token_id = None
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def test_command_line_compares(folders, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Anna has 3"}\n{"prompt": "Ben"}\n')
    models = ["--target", str(folders / "target"), "--draft", str(folders / "draft"), "--max-new-tokens", "12"]
    for extra in (["--prompts", str(file), "--temperature", "1"], ["--limit", "2"]):
        assert tree.main([*models, *extra, "--branching", "3,2", "--json"]) == 0
        ways = json.loads(capsys.readouterr().out)["ways"]
        assert list(ways) == ["target alone", "chain 2", "tree 3,2"]
        assert [way["positions"] for way in ways.values()] == [1, 3, 10]
        assert all(way["tau"] == way["generated"] / way["target_calls"] for way in ways.values())
        assert ways["target alone"]["tau"] == 1 and all(way["seconds_per_token"] > 0 for way in ways.values())
    assert ways["tree 3,2"]["generated"] == ways["chain 2"]["generated"] and ways["tree 3,2"]["tau"] >= ways["chain 2"]["tau"]
    assert tree.main([*models, "--limit", "2", "--gamma", "5"]) == 0
    out = capsys.readouterr().out
    assert "chain 5" in out and "tree 4,2,2,1" in out and "45 positions" in out
    for extra, message in (
        (["--branching", "2,0"], "branching must be"),
        (["--branching", "a"], "branching must be"),
        (["--limit", "0"], "limit must be"),
        (["--gamma", "0"], "gamma must be"),
        (["--max-new-tokens", "600"], "context of 512"),
        (["--prompts", "/no/such/file"], "No such file"),
        (["--target", "/no/such/folder"], "no such folder"),
    ):
        assert tree.main([*models, *extra]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("tree.py: error: ") and message in err
