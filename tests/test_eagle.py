"""eagle.py: decoding against a sampler without caches, losslessness, the loss against a plain one, files, resume, the driver.

Statistical tests use fixed seeds, so they pass or fail for good; the stated false-alarm rate is the chance that an unlucky
seed would have failed a correct sampler.
"""

import copy
import json
import signal

import pytest
import torch
from test_speculative import ARCHITECTURES, build, chi_square, enumerate_texts, same_counts, sample_counts
from test_tree import slow_tree
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BloomConfig, OPTConfig

import data
import eagle
import run_all
import train
from adaspec import select_tokens, token_kl
from eagle import Eagle, TargetStates, eagle_objective, everything, training_accuracy
from speculative import Stats, autoregressive_generate, expected_acceptance, speculative_generate
from tree import tree_generate

CPU = torch.device("cpu")
PROMPT = torch.tensor([[5, 0, 39, 7, 0]])


def head_on(target, steps=60, seed=0):
    """A head that has learned a little of the target's own text, so that it agrees now and then."""
    torch.manual_seed(seed)
    head, vocab = Eagle(target), target.config.vocab_size
    text = autoregressive_generate(target, torch.randint(vocab, (48, 2)), max_new_tokens=20, temperature=1.0)
    states = target.base_model(text, use_cache=False).last_hidden_state.detach()
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(steps):
        logits = head(text, F.pad(states, (0, 0, 1, -1)), use_cache=False).logits
        optimizer.zero_grad()
        token_kl(target.get_output_embeddings()(states), logits).mean().backward()
        optimizer.step()
    return head.eval()


@pytest.fixture(scope="module")
def heads():
    """A target of every architecture and a head on it."""
    targets = {name: build(name, seed=5) for name in ARCHITECTURES}
    return {name: (target, head_on(target)) for name, target in targets.items()}


@pytest.fixture(scope="module")
def small():
    target = build("llama", vocab=5, hidden=16, initializer_range=0.25)
    return target, head_on(target, steps=15)


@torch.no_grad()
def slow_logits(target, head, text, drafts):
    """The head's logits after text and drafts, without a cache: true states before all of the text, its guesses after that."""
    true = target.base_model(torch.tensor([text])).last_hidden_state[0]
    states = [torch.zeros_like(true[0]), *true[:-1]]
    for i in range(len(drafts) + 1):
        tokens = torch.tensor([text + drafts[:i]])
        out = head(tokens, torch.stack(states)[None], use_cache=False)
        states.append(out.hidden_states[0][0, -1])
    return out.logits[0, -1]


def slow_eagle(target, head, *rest):
    """Greedy decoding re-stated without caches, batches, trees or shared code, see `slow_tree`: (tokens, counts)."""
    return slow_tree(target, head, *rest, draft_logits=lambda text, drafts: slow_logits(target, head, text, drafts))


# --- decoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branching", [(1,), (1, 1, 1, 1), (3, 2, 1)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_the_targets_own_and_counts_are_those_of_a_sampler_without_caches(heads, name, branching):
    target, head = heads[name]
    expected = autoregressive_generate(target, PROMPT, max_new_tokens=30)
    text, counts = slow_eagle(target, head, PROMPT[0].tolist(), 30, branching)
    out = tree_generate(target, head, PROMPT, branching=branching, max_new_tokens=30)
    assert torch.equal(out.sequences, expected) and out.sequences[0, 5:].tolist() == text
    assert same_counts(out.stats, counts, len(branching)) and 0.1 < out.stats.alpha < 0.98
    if max(branching) == 1:
        chain = speculative_generate(target, head, PROMPT, gamma=len(branching), max_new_tokens=30)
        assert torch.equal(chain.sequences, expected) and same_counts(chain.stats, counts, len(branching))


@pytest.mark.parametrize("name", ["neox", "llama"])
def test_every_node_of_a_tree_is_drafted_from_its_own_parents_guess(heads, monkeypatch, name):
    target, head = heads[name]
    fed, forward = [], eagle._HeadTreeLane.forward

    def spy(lane, tokens, seen, keep):
        fed.append((tokens, seen[-keep:], forward(lane, tokens, seen, keep)))
        return fed[-1][2]

    monkeypatch.setattr(eagle._HeadTreeLane, "forward", spy)
    text = tree_generate(target, head, PROMPT, branching=(3, 2, 1), max_new_tokens=12).sequences[0].tolist()
    for tokens, seen, logits in fed:
        if isinstance(tokens, list):  # a round begins: the text so far
            n, nodes = seen.shape[1], []
        else:
            nodes += tokens.tolist()
        for slots, row in zip(seen[:, n:].tolist(), logits, strict=True):
            path = [token for token, visible in zip(nodes, slots, strict=True) if visible]
            torch.testing.assert_close(row, slow_logits(target, head, text[:n], path), atol=1e-4, rtol=1e-4)
    assert len(fed) > 6


@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_batched_rows_are_what_they_would_be_alone(heads, name, gamma):
    """Left-padded prompts of 9, 6, 2 and 1 tokens; rows end at different times and accept different numbers."""
    target, head = heads[name]
    ids = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(9) >= torch.tensor([[0], [3], [7], [8]])).long()
    ends = [autoregressive_generate(target, ids[:1], max_new_tokens=12)[0, -1].item(), 3]
    how = {"max_new_tokens": 40, "gamma": gamma, "eos_token_id": ends, "pad_token_id": 33}
    out = speculative_generate(target, head, ids, mask, **how)
    assert torch.equal(out.sequences, autoregressive_generate(target, ids, mask, **{k: how[k] for k in how if k != "gamma"}))
    lengths = set()
    for row in range(4):
        prompt = ids[row, mask[row].bool()].tolist()
        tokens, counts = slow_eagle(target, head, prompt, 40, (1,) * gamma, ends)
        assert out.sequences[row, 9:].tolist()[: len(tokens)] == tokens
        assert same_counts(out.row_stats[row], counts, gamma)
        lengths.add(len(tokens))
    assert len(lengths) > 1


@pytest.mark.parametrize("max_new_tokens", range(1, 8))
def test_limit_inside_a_block(heads, max_new_tokens):
    target, head = heads["neox"]
    expected = autoregressive_generate(target, PROMPT, max_new_tokens=max_new_tokens)
    counts = slow_eagle(target, head, PROMPT[0].tolist(), max_new_tokens, (1, 1, 1))[1]
    for out in (
        speculative_generate(target, head, PROMPT, gamma=3, max_new_tokens=max_new_tokens),
        tree_generate(target, head, PROMPT, branching=(1, 1, 1), max_new_tokens=max_new_tokens),
    ):
        assert torch.equal(out.sequences, expected) and same_counts(out.stats, counts, 3)


@pytest.mark.parametrize("padded", [False, True])
def test_sampling_is_lossless(small, padded):
    """Every continuation of 4 tokens against its exact probability, rows decoded together; false alarms 1e-4 each."""
    target, head = small
    prompts, mask = torch.tensor([[1, 0, 3], [4, 4, 2]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    counts, stats = sample_counts(target, head, prompts if padded else prompts[:1], 4, 5, 8_000, gamma=3, temperature=1.0,
                                  mask=mask if padded else None, rows=slice(1 if padded else 0, None, 1 + padded))  # fmt: skip
    prompt = prompts[1:, 2:] if padded else prompts[:1]
    statistic, critical = chi_square(counts, enumerate_texts(target, prompt, 4, 5) * counts.sum())
    assert statistic < critical
    assert 0.3 < stats.alpha < 0.99


def test_tree_sampling_is_lossless(small):
    """One by one, with one generator throughout; false alarms 1e-4."""
    target, head = small
    counts, stats, prompt = torch.zeros(125, dtype=torch.float64), Stats(), torch.tensor([[1, 0, 3]])
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        out = tree_generate(target, head, prompt, branching=(2, 2), max_new_tokens=3, temperature=1.0, generator=generator)
        counts[int((out.sequences[0, 3:] * torch.tensor([25, 5, 1])).sum())] += 1
        stats += out.stats
    statistic, critical = chi_square(counts, enumerate_texts(target, prompt, 3, 5) * 500)
    assert statistic < critical
    assert stats.rejected > 20 and stats.accepted > 200


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
    assert torch.equal(speculative_generate(target, head, PROMPT, max_new_tokens=8).sequences, before) and head.training
    head.eval()
    assert not target.base_model._forward_hooks
    assert [p.requires_grad for p in target.parameters()] == [
        name.split(".")[-2] not in ("embed_in", "lm_head", "embed_out") for name, _ in target.named_parameters()
    ], "only what the head uses is frozen"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_head_is_one_layer_of_the_targets_own_kind_without_norms_at_either_end(heads, name):
    target, head = heads[name]
    layer = max((m for m in target.base_model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)[0]
    theirs = {key for key, _ in layer.named_parameters() if not key.startswith(("input_layernorm", "ln_1"))}
    ours = [key.split(".", 3) for key, _ in head.named_parameters()]
    assert {key[3] for key in ours if key[0] == "trunk"} == theirs
    assert [".".join(key) for key in ours if key[0] != "trunk"] == ["fuse.weight", "fuse.bias"]
    assert {key[2] for key in ours if key[0] == "trunk"} == {"0"}


def test_noise_is_for_training_alone_and_of_its_width(heads):
    head = copy.deepcopy(heads["neox"][1])
    seen, ids, states = [], torch.tensor([[1, 2, 3]]), torch.randn(1, 3, 32)
    head.fuse.register_forward_hook(lambda module, args, out: seen.append(args[0][..., 32:] - states))
    for mode in (True, False):
        head.train(mode)(ids, states)
    assert 0.08 < seen[0].abs().max() <= 0.1 + 1e-6 and seen[0].min() < -0.08 and not seen[1].any()


# --- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def setting(make_model, examples):
    """A target's states over 24 rows, and a head that learns from them."""

    def make(architecture="neox", noise=0.1, seed=3):
        target = make_model(architecture, seed=1, initializer_range=0.2)
        states = TargetStates(train.Frozen(target, 400), examples[:24])
        torch.manual_seed(seed)
        head = Eagle(target, noise)
        head.teacher = states
        return target, states, head

    return make


def run(head, examples, objective, **settings):
    settings = {"vocab_size": 400, "lr": 3e-3, "epochs": 1, "batch_size": 8} | settings
    return train.train(head, examples, objective, **settings)


def plain_loss(target, head, reference, examples, k):
    """The losses written out, row by row and without padding: mean over the response tokens that are kept."""
    kl, distance, gap = [], [], []
    for ids, prompt in examples:
        ids = torch.from_numpy(ids).long()[None]
        with torch.no_grad():
            true = target.base_model(ids).last_hidden_state
            p = target(ids).logits[0, prompt - 1 : -1, :400]
        states = torch.cat([torch.zeros_like(true[:, :1]), true[:, :-1]], 1)

        def both(model, ids=ids, states=states, p=p, prompt=prompt):
            out = model(ids, states, use_cache=False)
            return token_kl(p, out.logits[0, prompt - 1 : -1, :400]), out.hidden_states[0][0, prompt - 1 : -1]

        own, guess = both(head)
        kl.append(own)
        distance.append(F.smooth_l1_loss(guess, true[0, prompt - 1 : -1], reduction="none").mean(1))
        gap.append(own.detach() - both(reference)[0].detach())
    kept = select_tokens(torch.cat(gap), k)
    return (torch.cat(distance) + 0.1 * torch.cat(kl))[kept].mean(), int(kept.sum())


@pytest.mark.parametrize("k", [None, 0.4])
@pytest.mark.parametrize("architecture", ["neox", "llama"])
def test_objective_is_the_loss_written_out(setting, examples, architecture, k):
    """Value, tokens and every gradient, uniform and on selected tokens; the reference's KL from a head in a cache or not."""
    target, states, head = setting(architecture, noise=0)
    _, _, reference = setting(architecture, noise=0, seed=9)
    frozen, objective = train.Frozen(reference, 400), eagle_objective(states)
    if k:

        def reference_kl(batch):
            p = states.hidden(batch)
            return frozen.head.per_token(frozen.hidden(batch), lambda rows: states.head(p[rows]), token_kl)

        objective = eagle_objective(states, reference_kl, k)
    batch = train.make_batch(examples, list(range(6)), CPU)
    loss, count = objective(train.hidden_states(head, batch), train.Head(head, 400), batch)
    (loss / count).backward()
    ours = torch.cat([p.grad.flatten() for p in head.parameters()])
    head.zero_grad()
    plain, tokens = plain_loss(target, head, reference, examples[:6], k or 1.0)
    plain.backward()
    theirs = torch.cat([p.grad.flatten() for p in head.parameters()])
    assert (loss / count).item() == pytest.approx(plain.item(), rel=1e-5) and count == tokens
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert all(p.grad is None for p in target.parameters())


def test_training_lowers_the_loss_and_raises_the_accuracy(setting, examples, tmp_path):
    """From the cache, which changes nothing but rounding; and the accuracy is the evaluator's agreement."""
    outcome = []
    for cached in (False, True):
        _, states, head = setting()
        first = training_accuracy(head.eval(), examples[:24], 400)
        if cached:
            cache = train.TokenCache(tmp_path, "a", everything(examples[:24]), 32, torch.float32)
            states.teacher.use(cache, 5, "target")
        losses, objective = [], eagle_objective(states)

        def record(hidden, output, batch, objective=objective, losses=losses):
            loss, count = objective(hidden, output, batch)
            losses.append(loss.item() / count)
            return loss, count

        run(head, examples[:24], record, epochs=6)
        outcome.append(losses)
        last = training_accuracy(head, examples[:24], 400, rows_at_once=7)
        assert losses[-1] < 0.8 * losses[0] and last > first
    assert outcome[0] == pytest.approx(outcome[1], rel=1e-3)
    input_ids, labels = data.collate(examples[:24])
    assert expected_acceptance(setting()[0], head, input_ids, labels, vocab_size=400).agree.float().mean() == pytest.approx(
        last
    )


def test_bfloat16_follows_float32(setting, make_model, examples):
    """As on a GPU: float32 weights under autocast, the states and the target's head in bfloat16."""
    _, _, exact = setting(noise=0)
    _, _, head = setting(noise=0)
    head.teacher = TargetStates(train.Frozen(make_model(seed=1, initializer_range=0.2).to(torch.bfloat16), 400), examples[:24])
    losses = [
        run(model, examples[:24], eagle_objective(model.teacher), dtype=dtype)["loss"]
        for model, dtype in ((exact, "float32"), (head, "bfloat16"))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and {p.dtype for p in head.parameters()} == {torch.float32}
    accuracies = [training_accuracy(model, examples[:24], 400) for model in (exact, head)]
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.05)


def test_resume_is_bit_for_bit(setting, examples, tmp_path, monkeypatch):
    """Noise and all: the states of the generators are in the checkpoint, the target's weights are not."""
    monkeypatch.setattr(train, "asked_to_stop", None)
    undisturbed = setting()[2]
    run(undisturbed, examples[:24], eagle_objective(undisturbed.teacher), epochs=2)
    head, calls = setting()[2], []

    def stopping(hidden, output, batch):
        calls.append(1)
        if len(calls) == 4:
            train.asked_to_stop = signal.SIGTERM
        return eagle_objective(head.teacher)(hidden, output, batch)

    with pytest.raises(train.Stopped):
        run(head, examples[:24], stopping, epochs=2, checkpoints=train.Checkpoints(tmp_path, "a"))
    monkeypatch.setattr(train, "asked_to_stop", None)
    resumed = setting(seed=99)[2]
    state = torch.load(train.Checkpoints(tmp_path, "a").newest(), weights_only=True)
    assert set(state["model"]) == set(resumed.state_dict()) and len(state["model"]) == len(list(resumed.parameters()))
    run(resumed, examples[:24], eagle_objective(resumed.teacher), epochs=2, checkpoints=train.Checkpoints(tmp_path, "a"))
    for ours, theirs in zip(resumed.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# --- files and refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_files_hold_the_head_alone(heads, tmp_path, name):
    target, head = heads[name]
    head.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eagle.json", "eagle.safetensors"]
    again = Eagle.from_pretrained(tmp_path, target)
    assert again.state_dict().keys() == head.state_dict().keys() and not again.training and again.noise == head.noise
    assert not any(value.shape == target.get_input_embeddings().weight.shape for value in head.state_dict().values())
    outs = [speculative_generate(target, model, PROMPT, max_new_tokens=20) for model in (head, again)]
    assert torch.equal(outs[0].sequences, outs[1].sequences) and outs[0].stats == outs[1].stats
    half = Eagle.from_pretrained(tmp_path, copy.deepcopy(target).to(torch.bfloat16))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_wrong_folders_and_targets_are_refused(heads, tmp_path):
    target, head = heads["llama"]
    head.save_pretrained(tmp_path)
    for other in (heads["neox"][0], build("llama", vocab=41), build("llama", hidden=48)):
        with pytest.raises(ValueError, match="was made for a target with"):
            Eagle.from_pretrained(tmp_path, other)
    with pytest.raises(ValueError, match="does not fit LlamaForCausalLM"):
        Eagle.from_pretrained(tmp_path, build("llama", attention_bias=True))
    about = json.loads((tmp_path / "eagle.json").read_text())
    for broken in ("{", "[]", json.dumps(about).replace("hidden", "x")):
        (tmp_path / "eagle.json").write_text(broken)
        with pytest.raises(ValueError, match="holds no EAGLE head"):
            Eagle.from_pretrained(tmp_path, target)
    (tmp_path / "eagle.json").write_text(json.dumps(about))
    (tmp_path / "eagle.safetensors").write_bytes((tmp_path / "eagle.safetensors").read_bytes()[:-9])
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="holds no EAGLE head"):
            Eagle.from_pretrained(folder, target)


def test_targets_that_give_no_positions_or_states_are_refused():
    sizes = {"vocab_size": 40, "hidden_size": 32, "pad_token_id": 1}
    with pytest.raises(ValueError, match="BloomForCausalLM takes no position_ids"):
        Eagle(AutoModelForCausalLM.from_config(BloomConfig(n_layer=1, n_head=4, **sizes)))
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "word_embed_proj_dim": 32, "ffn_dim": 64}
    opt = AutoModelForCausalLM.from_config(OPTConfig(**sizes)).eval()
    with pytest.raises(ValueError, match="OPTForCausalLM does not call its base_model"):
        speculative_generate(opt, Eagle(opt), PROMPT, max_new_tokens=5)
    assert not opt.base_model._forward_hooks


# --- the driver --------------------------------------------------------------------------------------------------------

SHORT = "--preset tiny --limit 48 --max-steps 2 --eval-prompts 4 --eval-batch 2 --timed-prompts 1 --max-new-tokens 8".split()


def test_driver_ends_in_the_table_and_uses_heads_again(tmp_path, tokenizer, make_model, capsys):
    """A target from scratch, over two seeds, and one from a folder (tied embeddings, a padded head); again, nothing runs."""
    model = make_model("llama", vocab_size=len(tokenizer) + 16)
    for save in (model, tokenizer):
        save.save_pretrained(tmp_path / "models" / "SmolLM2-135M-Instruct")
    for pair, more in (("tiny-eagle", ["--seeds", "0,1"]), ("smollm2-eagle", ["--models-dir", str(tmp_path / "models")])):
        command = [*SHORT, "--pairs", pair, "--out", str(tmp_path / pair), *more]
        run_all.main(command)
        out = capsys.readouterr().out
        rows = json.loads((tmp_path / pair / "results.json").read_text())["rows"]
        assert {row["draft"] for row in rows} == {"EAGLE", "EAGLE + AdaSPEC"}
        assert all(row["speedup"] > 0 and row["seconds_per_response"] > 0 and "tau_by_gamma" not in row for row in rows)
        assert f"| arithmetic | {pair} | 0.0 | over EAGLE | " in out and "training accuracy" in out
        folder = tmp_path / pair / pair / "arithmetic" / "seed0"
        settings = json.loads((folder / "eagle-adaspec" / "stage.json").read_text())["settings"]
        assert settings["k"] == 0.4 and not (folder / "cache-target").exists()
        target = AutoModelForCausalLM.from_pretrained(folder / "target")
        assert Eagle.from_pretrained(folder / "eagle-adaspec", target).config.num_hidden_layers == 1
        run_all.main(command)
        assert "last loss" not in capsys.readouterr().out
    for method in ("distillspec:data=target", "best"):
        with pytest.raises(ValueError, match=r"tiny-eagle: an EAGLE head is trained by .* not by .*(target|best)"):
            run_all.main([*SHORT, "--pairs", "tiny-eagle", "--out", str(tmp_path / "no"), "--methods", method])
