"""extras/tree.py: losslessness at temperature 0 (token for token) and above, counts, caches, edge
cases and the command line. Statistical tests: see tests/sampling.py."""

import copy
import json
import math
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MistralConfig

from extras import tree
from extras.tree import tree_generate
from short_head import shorten_head
from speculative import Stats, autoregressive_generate, speculative_generate
from tests.sampling import (
    ARCHITECTURES,
    CONTEXT,
    biased,
    build,
    chi_square,
    enumerate_texts,
    five_token_models,
    half_agreeing_pairs,
    martingales,
    noised,
    same_counts,
    slow_tree,
)

PROMPT = torch.tensor([[5, 0, 39, 7, 0]])


@pytest.fixture(scope="module")
def pairs():
    return half_agreeing_pairs()


@pytest.fixture(scope="module")
def small():
    return five_token_models()


# Temperature 0: token for token the target's own output


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_the_targets_own(pairs, name):
    """And the counts are those of a sampler without masks or caches, so the draft's own tree is
    right too."""
    target, half = pairs[name]
    unrelated = build(name, seed=77)
    expected = autoregressive_generate(target, PROMPT, max_new_tokens=24)
    for branching in ((3, 2), (4, 2, 2, 1)):
        for draft in (target, half, unrelated):
            out = tree_generate(target, draft, PROMPT, branching=branching, max_new_tokens=24)
            assert torch.equal(out.sequences, expected)
            assert out.row_stats == [out.stats]
            if draft is target:
                assert out.stats.alpha == 1
                assert out.stats.target_calls == math.ceil(24 / (len(branching) + 1))
            if branching == (4, 2, 2, 1):
                counts = slow_tree(target, draft, PROMPT[0].tolist(), 24, branching)[1]
                assert same_counts(out.stats, counts, len(branching))


@pytest.mark.parametrize("name", ["neox", "llama", "phi"])
def test_eager_and_sdpa_take_the_mask(name):
    for attention in ("eager", "sdpa"):
        target = build(name, seed=5)
        target.set_attn_implementation(attention)
        expected = autoregressive_generate(target, PROMPT, max_new_tokens=20)
        assert torch.equal(
            tree_generate(target, noised(target), PROMPT, max_new_tokens=20).sequences, expected
        )


def test_shared_keys_are_read_where_they_are(pairs, monkeypatch):
    """As in tests/test_inference_mode.py."""
    variable = "TRANSFORMERS_SDPA_FORCE_GQA"
    monkeypatch.delenv(variable, raising=False)
    target, half = copy.deepcopy(pairs["llama"])
    settings = []
    target.register_forward_hook(lambda *_: settings.append(os.environ.get(variable)))
    tree_generate(target, half, PROMPT, max_new_tokens=5)
    assert set(settings) == {"1"} and variable not in os.environ


@pytest.mark.parametrize(("name", "depth"), [("llama", 4), ("codegen", 1)])
def test_branching_of_ones_counts_as_the_chain_does(pairs, name, depth):
    target, half = pairs[name]
    text = autoregressive_generate(target, PROMPT, max_new_tokens=30)[0, 5:].tolist()
    for ends, n in ((None, 30), (None, 2), ([text[9], text[13]], 30)):
        chain = speculative_generate(
            target, half, PROMPT, gamma=depth, max_new_tokens=n, eos_token_id=ends
        )
        out = tree_generate(
            target, half, PROMPT, branching=[1] * depth, max_new_tokens=n, eos_token_id=ends
        )
        assert out.stats == chain.stats and torch.equal(out.sequences, chain.sequences)


def test_a_wider_tree_accepts_more(pairs):
    target, half = pairs["neox"]
    calls = []
    for b in (1, 2, 4):
        out = tree_generate(target, half, PROMPT, branching=(b,) * 3, max_new_tokens=40)
        calls.append(out.stats.target_calls)
    assert calls[0] > calls[1] > calls[2]


def test_branching_beyond_the_vocabulary(small):
    """All tokens are children: the path never breaks off."""
    prompt = torch.tensor([[1, 0, 3]])
    for temperature in (0.0, 1.0):
        settings = {"max_new_tokens": 30, "temperature": temperature}
        settings["generator"] = torch.Generator().manual_seed(0)
        out = tree_generate(small[0], small[2], prompt, branching=(9, 5), **settings)
        assert out.stats.rejected == 0 and out.stats.tau == 3


def slow_beam(draft, text, widths, temperature):
    """The drafts [d] of all nodes of a tree with `beam`, level by level, the likeliest first,
    without trees, masks or caches."""
    levels, nodes = [], [([], 0.0)]
    for width in widths:
        children = []
        for drafts, log_q in nodes:
            with torch.no_grad():
                logits = draft(torch.tensor([text + drafts])).logits[0, -1]
            log_p = (logits / (temperature or 1)).log_softmax(-1).tolist()
            children += [([*drafts, token], log_q + value) for token, value in enumerate(log_p)]
        nodes = sorted(children, key=lambda child: -child[1])[:width]
        levels.append([drafts for drafts, _ in nodes])
    return levels


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_beam_is_the_likeliest_nodes_of_every_level(pairs, name, temperature):
    _, half = pairs[name]
    for text in ([5, 0, 39, 7, 0], [3]):
        lane = tree.TreeLane(half, torch.tensor([text]), 40)
        sampling = (temperature, 0, 1.0)
        with torch.inference_mode():
            drafted = tree.draft_tree(lane, text, (4, 3, 5), sampling, None, beam=True)
        drafts = {0: []}
        for node, children in enumerate(drafted.children):
            drafts |= {child: [*drafts[node], drafted.tokens[child]] for child in children}
        nodes = [drafts[node] for node in range(1, len(drafts))]
        assert [nodes[:4], nodes[4:7], nodes[7:]] == slow_beam(half, text, (4, 3, 5), temperature)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_with_a_beam_is_the_targets_own(pairs, name):
    """With one node a level the counts are the chain's."""
    target, half = pairs[name]
    expected = autoregressive_generate(target, PROMPT, max_new_tokens=30)
    settings = {"max_new_tokens": 30, "beam": True}
    for draft in (build(name, seed=77), half):
        for branching in ((3, 2), (2, 4, 3)):
            out = tree_generate(target, draft, PROMPT, branching=branching, **settings)
            assert torch.equal(out.sequences, expected)
        chain = speculative_generate(target, draft, PROMPT, gamma=3, max_new_tokens=30)
        out = tree_generate(target, draft, PROMPT, branching=(1, 1, 1), **settings)
        assert out.stats == chain.stats
    wide = tree_generate(target, half, PROMPT, branching=(4, 4, 4), **settings)
    assert wide.stats.tau > chain.stats.tau


@pytest.mark.parametrize("max_new_tokens", range(1, 10))
def test_limit_inside_a_path(pairs, max_new_tokens):
    target, half = pairs["neox"]
    expected = autoregressive_generate(target, PROMPT, max_new_tokens=max_new_tokens)
    for draft in (target, half):
        out = tree_generate(
            target, draft, PROMPT, branching=(2, 2, 1), max_new_tokens=max_new_tokens
        )
        assert torch.equal(out.sequences, expected)
        counts = slow_tree(target, draft, PROMPT[0].tolist(), max_new_tokens, (2, 2, 1))[1]
        assert same_counts(out.stats, counts, 3)


def test_end_token_inside_an_accepted_path(pairs):
    target, half = pairs["llama"]
    text = autoregressive_generate(target, PROMPT, max_new_tokens=24)[0, 5:].tolist()
    # inside the first round of a draft that agrees
    n = next(i for i in range(1, 4) if text[i] not in text[:i]) + 1
    settings = {"branching": (2, 1, 2, 1), "max_new_tokens": 24, "eos_token_id": text[n - 1]}
    out = tree_generate(target, target, PROMPT, **settings)
    assert out.sequences[0, 5:].tolist() == text[:n]
    counts = {"rounds": 1, "drafted": n, "accepted": n, "target_calls": 1, "generated": n}
    assert out.stats == Stats(**counts, cut=1, per_position=([1] * n, [1] * n))
    cuts = set()
    settings["branching"] = (3, 2, 1)
    for i, end in enumerate(sorted(set(text))):  # on a draft or on the target's own token
        expected, counts = slow_tree(target, half, PROMPT[0].tolist(), 24, (3, 2, 1), (end,))
        settings["eos_token_id"] = end if i % 2 else [end, 40]
        out = tree_generate(target, half, PROMPT, **settings)
        assert out.sequences[0, 5:].tolist() == expected and same_counts(out.stats, counts, 3)
        cuts.add(out.stats.cut)
    assert cuts == {0, 1}


def test_token_zero_is_an_ordinary_token_and_a_legal_end(pairs):
    target, half = pairs["phi"]
    bias = [3.0] + [0.0] * 39  # token 0 comes often
    target, draft = biased(target, bias), biased(half, bias)
    text = autoregressive_generate(target, PROMPT, max_new_tokens=30)
    assert (text[0, 5:] == 0).any() and (text[0, 5:] != 0).any()
    assert torch.equal(tree_generate(target, draft, PROMPT, max_new_tokens=30).sequences, text)
    ended = (
        tree_generate(target, draft, PROMPT, max_new_tokens=30, eos_token_id=0)
        .sequences[0, 5:]
        .tolist()
    )
    assert ended == text[0, 5:].tolist()[: ended.index(0) + 1] and ended[-1] == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_position_of_the_context_is_reached(pairs, name):
    target, half = pairs[name]
    out = tree_generate(target, half, PROMPT, max_new_tokens=CONTEXT - 5)
    assert torch.equal(
        out.sequences, autoregressive_generate(target, PROMPT, max_new_tokens=CONTEXT - 5)
    )


def test_models_of_different_architectures_and_heads_can_be_paired(pairs):
    """The draft's head is 11 rows longer, all of them loud: no such token ever comes."""
    target = pairs["neox"][0]
    draft = biased(build("phi", vocab=51, seed=3), [0.0] * 40 + [9.0] * 11)
    for vocab_size in (None, 30):
        expected = autoregressive_generate(target, PROMPT, max_new_tokens=20, vocab_size=vocab_size)
        out = tree_generate(target, draft, PROMPT, max_new_tokens=20, vocab_size=vocab_size)
        assert torch.equal(out.sequences, expected)


# Calls and caches


def test_one_target_call_a_round(pairs):
    target, half = pairs["llama"]
    calls = {"target": [], "draft": []}
    hooks = [
        model.register_forward_hook(
            lambda _, args, __, name=name: calls[name].append(args[0].shape[1])
        )
        for name, model in (("target", target), ("draft", half))
    ]
    stats = tree_generate(target, half, PROMPT, branching=(3, 2, 1), max_new_tokens=30).stats
    for hook in hooks:
        hook.remove()
    assert len(calls["target"]) == stats.target_calls and len(calls["draft"]) <= 3 * stats.rounds
    assert calls["target"][:2] == [5 + 3 + 6 + 6, 1 + 3 + 6 + 6] and calls["draft"][:3] == [5, 3, 6]


def test_a_beam_counts_the_nodes_of_a_level(pairs):
    target, half = pairs["llama"]
    calls = []
    hook = target.register_forward_hook(lambda _, args, __: calls.append(args[0].shape[1]))
    tree_generate(target, half, PROMPT, branching=(3, 2, 4), beam=True, max_new_tokens=30)
    hook.remove()
    assert calls[:2] == [5 + 3 + 2 + 4, 1 + 3 + 2 + 4]


@pytest.mark.parametrize(("temperature", "beam"), [(0.0, False), (1.0, False), (1.0, True)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_caches_hold_a_prefix_of_the_text(pairs, monkeypatch, name, temperature, beam):
    target, half = pairs[name]
    states, rollback = [], tree.TreeLane.rollback

    def spy(lane, length, path):
        rollback(lane, length, path)
        layers = [(layer.keys.clone(), layer.values.clone()) for layer in lane.cache.layers]
        states.append((lane.model, len(path), layers))

    monkeypatch.setattr(tree.TreeLane, "rollback", spy)
    settings = {"branching": (3, 2, 1), "max_new_tokens": 40, "temperature": temperature}
    settings["beam"] = beam
    settings["generator"] = torch.Generator().manual_seed(0)
    text = tree_generate(target, half, PROMPT, **settings).sequences
    assert max(accepted for _, accepted, _ in states) >= 2  # slots were moved, not only dropped
    for model, _, layers in states:
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
    out = tree_generate(model, model, PROMPT, max_new_tokens=20)
    assert torch.equal(out.sequences, expected) and model.training
    target, half = pairs["llama"]
    state = torch.get_rng_state()
    settings = {"max_new_tokens": 20, "temperature": 1.0}
    settings["generator"] = torch.Generator().manual_seed(7)
    first = tree_generate(target, half, PROMPT, **settings).sequences
    second = tree_generate(target, half, PROMPT, **settings).sequences
    settings["generator"] = torch.Generator().manual_seed(7)
    again = tree_generate(target, half, PROMPT, **settings).sequences
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


# Temperature > 0: the target's distribution


def decode_texts(target, draft, prompt, n, texts, **settings):
    """Texts decoded one by one with one generator throughout, and the sum of their counts."""
    stats, sequences = Stats(), []
    settings["generator"] = torch.Generator().manual_seed(0)
    for _ in range(texts):
        out = tree_generate(target, draft, prompt, max_new_tokens=n, **settings)
        sequences += out.sequences.tolist()
        stats += out.stats
    return sequences, stats


@pytest.mark.parametrize(
    ("branching", "beam", "sampling", "tokens"),
    [
        ((4,), False, {"top_k": 2}, 5),  # q has fewer tokens than the tree has children
        ((3, 1), False, {"top_p": 0.8}, 5),
        ((3, 1), False, {}, 2),  # a short head
        ((2, 3), True, {}, 5),
        ((2, 3), True, {"top_k": 3}, 5),
        ((3, 1), True, {}, 2),  # the third node is one that the draft cannot have
    ],
)
def test_sampling_is_lossless(small, branching, beam, sampling, tokens):
    """Every continuation of 2 tokens (of 3, where a beam has a second level) against its exact
    probability; false alarms 1e-4 for each of 6 cases."""
    target, draft, _ = small
    if tokens < 5:
        draft = shorten_head(copy.deepcopy(draft), torch.tensor([1, 4]))
    prompt = torch.tensor([[1, 0, 3]])
    sampling = {"temperature": 1.0, **sampling}
    n = 3 if beam else 2
    shape = {"branching": branching, "beam": beam}
    texts, stats = decode_texts(target, draft, prompt, n, 300, **shape, **sampling)
    codes = torch.tensor([text[3:] for text in texts]) @ 5 ** torch.arange(n - 1, -1, -1)
    exact = enumerate_texts(target, prompt, n, 5, **sampling)
    statistic, critical = chi_square(torch.bincount(codes, minlength=5**n).double(), exact * 300)
    assert statistic < critical
    assert stats.rejected > 10 and stats.accepted > 50


@pytest.mark.parametrize(
    ("branching", "temperature", "beam"),
    [((3, 2, 1), 1.0, False), ((1, 1), 1.4, False), ((5, 2), 0.8, False), ((2, 3, 1), 1.0, True)],
)
def test_long_runs_stay_the_targets(small, branching, temperature, beam):
    """Two martingales over 8 texts of 50 tokens within 4.5 standard deviations; false alarms
    1.4e-5 for each of 4 cases. (5, 2): the first children are the whole vocabulary."""
    target, _, unrelated = small
    prompt = torch.tensor([[1, 0, 3]])
    settings = {"branching": branching, "temperature": temperature, "beam": beam}
    texts, stats = decode_texts(target, unrelated, prompt, 50, 8, **settings)
    assert stats.accepted > 100 and stats.rejected > 20
    assert max(map(abs, martingales(target, unrelated, texts, [3] * 8, temperature))) < 4.5


def test_sampling_is_lossless_when_the_draft_never_agrees():
    """Disjoint supports: nothing is accepted, and the output is still the target's; false alarms
    1e-4."""
    base = build("phi", vocab=6, hidden=16)
    target = biased(base, [-1e4] * 2 + [0.0] * 4)
    draft = biased(base, [0.0] * 2 + [-1e4] * 4)
    prompt = torch.tensor([[1, 4]])
    texts, stats = decode_texts(target, draft, prompt, 2, 200, branching=(3, 2), temperature=1.0)
    codes = torch.tensor([6 * text[2] + text[3] for text in texts])
    exact = enumerate_texts(target, prompt, 2, 6)
    statistic, critical = chi_square(torch.bincount(codes, minlength=36).double(), exact * 200)
    assert statistic < critical
    assert stats.accepted == 0 and stats.tau == 1


def test_sampling_from_the_target_itself_accepts_all(small):
    settings = {"branching": (2, 2), "max_new_tokens": 60, "temperature": 1.0}
    settings["generator"] = torch.Generator().manual_seed(0)
    out = tree_generate(small[0], small[0], torch.tensor([[1, 0, 3]]), **settings)
    assert out.stats.alpha > 0.95 and out.stats.tau > 2.8  # but for float rounding


@pytest.mark.parametrize("children", [1, 3, 8])
def test_one_node_is_lossless(children):
    """The rule alone, 2,500 times: its token is distributed as p; false alarms 1e-4 for each of 3
    cases.

    p and q are far apart and each lacks a token of the other's; 8 children of a q of 4 tokens.
    """
    logits = torch.tensor([1.0, -math.inf, 0.5, 2.0, -0.5])
    q = torch.tensor([0.55, 0.25, 0.15, 0.05, 0.0])
    generator = torch.Generator().manual_seed(1)
    counts, accepted = torch.zeros(5, dtype=torch.float64), 0
    for _ in range(2500):
        drafts, exist = tree.draw_children(q[None], children, generator)
        child, token = tree.judge(logits, q, drafts[exist].tolist(), (1.0, 0, 1.0), generator)
        assert child is None or drafts[0, child] == token
        accepted += child is not None
        counts[token] += 1
    statistic, critical = chi_square(counts, logits.double().softmax(-1) * 2500)
    assert statistic < critical
    p = logits.softmax(-1)
    once = torch.minimum(p, q).sum().item()  # with this chance one child is accepted
    if children == 1:
        assert abs(accepted / 2500 - once) < 4 * math.sqrt(0.25 / 2500)
    else:
        assert accepted / 2500 > once + 0.05
    assert accepted / 2500 < 1 - p[4] + 0.03  # what q cannot draw is never accepted


def test_children_are_drawn_in_order_without_replacement():
    """Every ordered pair against q(x) q(y) / (1 - q(x)); false alarms 1e-4. And no more children
    than q has tokens."""
    q, generator = torch.tensor([0.6, 0.0, 0.3, 0.1]), torch.Generator().manual_seed(0)
    drafts, exist = tree.draw_children(q.repeat(20_000, 1), 2, generator)
    exact = (q[:, None] * q / (1 - q[:, None])).double().fill_diagonal_(0).flatten()
    counts = torch.bincount(drafts @ torch.tensor([4, 1]), minlength=16).double()
    statistic, critical = chi_square(counts, exact * 20_000)
    assert exist.all() and statistic < critical
    drafts, exist = tree.draw_children(
        torch.stack([q, torch.tensor([0.0, 1.0, 0.0, 0.0])]), 6, generator
    )
    assert exist.tolist() == [[True] * 3 + [False] * 3, [True] + [False] * 5]
    assert sorted(drafts[0, :3].tolist()) == [0, 2, 3] and drafts[1, 0] == 1 and drafts.max() < 4


def test_no_residual_falls_back_to_the_target(monkeypatch):
    """p == q and yet a rejection (rounding can do that): the token comes from p, not from 0 / 0."""
    logits = torch.log(torch.tensor([0.5, 0.0, 0.5]))
    monkeypatch.setattr(
        torch,
        "rand",
        lambda n, **kwargs: torch.tensor([1.0 + 1e-6] * (n - 1) + [0.9], dtype=torch.float64),
    )
    assert tree.judge(logits, logits.exp(), [0], (1.0, 0, 1.0), None) == (None, 2)


# Refusals and the command line


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
        tree_generate(*pairs["llama"], **arguments)


def test_models_that_take_no_tree_mask_are_refused(pairs, monkeypatch):
    good = pairs["llama"][0]
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1}
    sliding = MistralConfig(
        **sizes,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
    )
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


def test_command_line_compares(folders, capsys, tmp_path, monkeypatch):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Anna has 3"}\n{"prompt": "Ben"}\n')
    models = ["--target", str(folders / "target"), "--draft", str(folders / "draft")]
    models += ["--max-new-tokens", "12"]
    for extra in (["--prompts", str(file), "--temperature", "1"], ["--limit", "2"]):
        tree.main([*models, *extra, "--branching", "3,2", "--json"])
        ways = json.loads(capsys.readouterr().out)["ways"]
        assert list(ways) == ["target alone", "chain 2", "tree 3,2"]
        assert [way["positions"] for way in ways.values()] == [1, 3, 10]
        for way in ways.values():
            assert way["tau"] == way["generated"] / way["target_calls"]
            assert way["seconds_per_token"] > 0
        assert ways["target alone"]["tau"] == 1
    assert ways["tree 3,2"]["generated"] == ways["chain 2"]["generated"]
    assert ways["tree 3,2"]["tau"] >= ways["chain 2"]["tau"]
    shapes = []

    def spy(*models, branching, beam, **settings):
        shapes.append((branching, beam))
        return tree_generate(*models, branching=branching, beam=beam, **settings)

    monkeypatch.setattr(tree, "tree_generate", spy)
    tree.main([*models, "--limit", "2", "--beam", "3,2", "--json"])
    beam = json.loads(capsys.readouterr().out)["ways"]["beam 3,2"]
    assert beam["positions"] == 6 and beam["tau"] > 1 and shapes == [([3, 2], True)] * 3
    tree.main([*models, "--limit", "2", "--gamma", "5"])
    out = capsys.readouterr().out
    assert "chain 5" in out and "tree 4,2,2,1" in out and "45 positions" in out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--max-new-tokens", "600"], "context of 512"),
        (["--prompts", "/no/such/file"], "No such file"),
        (["--target", "/no/such/folder"], "no such folder"),
        (["--temperature", "inf"], "temperature must be finite"),
        (["--seed", "-1"], "seed must be at least 0"),
    ],
)
def test_command_line_errors_are_one_line(folders, extra, message):
    models = ["--target", str(folders / "target"), "--draft", str(folders / "draft")]
    with pytest.raises((ValueError, OSError), match=message) as caught:
        tree.main([*models, *extra])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "extra", ["--branching 2,0", "--branching a", "--branching=", "--limit 0", "--gamma 0"]
)
def test_command_line_that_cannot_be_read(capsys, extra):
    flag, value = extra.replace("=", " ").split(" ")
    with pytest.raises(SystemExit) as caught:
        tree.main(["--target", "t", "--draft", "d", *extra.split(" ")])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1
    value = value.split(",")[-1]
    message = f"argument {flag}: must be a whole number of at least 1, got {value!r}"
    assert err == f"extras.tree: error: {message}\n"
