"""Short heads of drafts: losses against dense ones, exact decoding, files, and whole runs."""

import copy
import json
import math
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import data
import models
import ranks
import run_all
import train
from cells import base_models, check_cell, prepare_cell, with_short_head
from distillspec import DIVERGENCES
from head import Head
from history import Validation
from settings import PAIRS, Method, Pair, Settings
from short_head import coverage, frequent_tokens, outside_log_odds, shorten_head, with_outside
from speculative import autoregressive_generate, expected_acceptance, speculative_generate
from storage import read_json
from teacher import Frozen, ReferenceLoss, TokenCache
from tests.sampling import (
    build,
    chi_square,
    enumerate_texts,
    five_token_models,
    noised,
    sample_counts,
)
from train import Student, adaspec_step, token_loss

CPU = torch.device("cpu")
KEPT = torch.tensor([0, 3, 4, 17, 80, 81, 200, 399])


def short(model, token_ids=KEPT):
    return shorten_head(copy.deepcopy(model), token_ids)


def test_logits_are_the_kept_rows_and_minus_infinity(make_model):
    for architecture in ("neox", "llama", "phi", "codegen"):
        model = make_model(architecture, vocab_size=400)
        draft = short(model)
        ids = torch.arange(6)[None]
        logits, whole = draft(ids).logits, model(ids).logits
        torch.testing.assert_close(logits[..., KEPT], whole[..., KEPT])
        others = [token for token in range(400) if token not in KEPT]
        assert (logits[..., others] == -math.inf).all()
        assert draft.config.draft_vocab_size == len(KEPT) and not hasattr(
            model.config, "draft_vocab_size"
        )


# Losses


def test_the_odds_outside_give_p_itself(make_model, examples):
    target = make_model(seed=1)
    batch = data.make_batch(examples, [0, 1, 2], CPU)
    teacher = Frozen(target, 400, KEPT)
    hidden = teacher.hidden(batch)
    p = Head(target, 400)(hidden).softmax(-1)
    log_odds = outside_log_odds(teacher.whole_head, KEPT, hidden)
    extended = with_outside(teacher.head(hidden), log_odds).softmax(-1)
    torch.testing.assert_close(extended[:, :-1], p[:, KEPT])
    torch.testing.assert_close(extended[:, -1], 1 - p[:, KEPT].sum(-1))
    assert coverage(log_odds) == pytest.approx(p[:, KEPT].sum(-1).mean().item())
    all_tokens = torch.arange(400)
    assert coverage(outside_log_odds(teacher.whole_head, all_tokens, hidden)) == 1


@pytest.mark.parametrize("cached", [False, True], ids=["computed", "cached"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_losses_are_the_dense_ones(make_model, examples, tmp_path, name, cached):
    """Value and gradient, in chunks, against the formula on whole logits: jsd, tvd and lk with
    q = 0 outside, the KLs with p renormalised on the kept tokens."""
    target, draft = make_model(seed=1), short(make_model(seed=2))
    batch = data.make_batch(examples, list(range(12)), CPU)
    teacher = Frozen(target, 400, KEPT)
    if cached:
        files = {"fingerprint": "a", "examples": examples, "rows_at_once": 4}
        states = TokenCache(tmp_path / "h", width=32, dtype=torch.float32, **files)
        teacher.use(states, "target")
        mass = TokenCache(tmp_path / "o", width=1, dtype=torch.float32, **files)
        teacher.use_outside(mass, CPU, "mass")
    student = Student(draft, 400)
    hidden = student.hidden(batch)
    loss = student.head.loss(hidden, *token_loss(name, teacher, batch))
    loss.backward()

    whole = copy.deepcopy(draft)
    whole.zero_grad()
    p_logits = target(batch.input_ids).logits[..., :400].flatten(0, 1)[batch.index].detach()
    q_logits = whole(batch.input_ids).logits[..., :400].flatten(0, 1)[batch.index]
    if name not in ("jsd", "tvd", "lk"):
        p_logits, q_logits = p_logits[:, KEPT], q_logits[:, KEPT]
    dense = DIVERGENCES[name](p_logits, q_logits).sum()
    dense.backward()
    assert loss.item() == pytest.approx(dense.item(), rel=1e-4)
    if name == "tvd":
        p, q = p_logits.softmax(-1), q_logits.softmax(-1)
        assert loss.item() == pytest.approx((1 - torch.minimum(p, q).sum(-1)).sum().item())
    for mine, other in zip(draft.parameters(), whole.parameters(), strict=True):
        assert mine.grad.isfinite().all()
        torch.testing.assert_close(mine.grad, other.grad, rtol=2e-3, atol=1e-5)


def test_the_gap_is_on_the_kept_tokens(make_model, examples):
    """AdaSPEC with a reference whose head is as short: the loss of the selected tokens."""
    target = Frozen(make_model(seed=1), 400, KEPT)
    reference_model, draft = short(make_model(seed=2)), short(make_model(seed=3))
    reference = ReferenceLoss(Frozen(reference_model, 400), target, "fkl")
    batch = data.make_batch(examples, [0, 1], CPU)
    student = Student(draft, 400)
    loss, count = adaspec_step(student, batch, target, reference, Method("adaspec", k=0.3))
    logits = [
        model(batch.input_ids).logits.flatten(0, 1)[batch.index][:, KEPT]
        for model in (target.model, draft, reference_model)
    ]
    draft_kl, reference_kl = (DIVERGENCES["fkl"](logits[0], q) for q in logits[1:])
    gap = draft_kl - reference_kl
    top = gap.topk(count).indices
    assert count == pytest.approx(0.3 * len(gap), abs=1)
    assert loss.item() == pytest.approx(draft_kl[top].sum().item(), rel=1e-4)


def test_it_learns(make_model, examples):
    target, draft = Frozen(make_model(seed=1), 400, KEPT), short(make_model(seed=2))
    settings = {"vocab_size": 400, "lr": 1e-2, "epochs": 3, "batch_size": 8}
    inputs = (target, Method("best", divergence="tvd"))
    before = draft.get_output_embeddings().weight.clone()
    summary = train.train(draft, examples[:24], train.distillation_step, inputs, **settings)
    assert summary["steps"] == 9 and (draft.get_output_embeddings().weight != before).any()


def test_alpha_is_watched_with_all_of_p(make_model, examples):
    target, draft = make_model(seed=1), short(make_model(seed=2))
    watched = Validation(examples[:5], 2)
    watched.ask(Frozen(target, 400, KEPT))
    alpha = watched.alpha(draft, Student(draft, 400).head, torch.float32)
    ids, labels = data.collate(examples[:5])
    exact = expected_acceptance(target, draft, ids, labels, vocab_size=400)
    assert alpha == pytest.approx(exact.overlap.mean().item(), rel=1e-5)


# Decoding

SMALL = torch.tensor([0, 2, 3])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_distribution_is_the_targets(temperature):
    """All 125 continuations of three tokens; false alarms: 1e-4."""
    target, draft, _ = five_token_models()
    prompt = torch.tensor([[1, 2]])
    exact = enumerate_texts(target, prompt, 3, 5, temperature=temperature)
    settings = {"gamma": 2, "temperature": temperature}
    counts, stats = sample_counts(target, short(draft, SMALL), prompt, 3, 5, 4000, **settings)
    statistic, critical = chi_square(counts, exact * 4000)
    assert statistic < critical and 0.2 < stats.alpha < 0.95


@pytest.mark.parametrize("top_k", [0, 4])
def test_greedy_is_the_targets_in_a_batch(top_k):
    target = build("llama", 40)
    draft = short(noised(target, 0.1), torch.arange(0, 40, 2))
    ids = torch.randint(0, 40, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    settings = {"max_new_tokens": 24, "top_k": top_k}
    out = speculative_generate(target, draft, ids, mask, **settings)
    assert torch.equal(out.sequences, autoregressive_generate(target, ids, mask, **settings))
    assert out.stats.accepted > 0
    sampled = speculative_generate(target, draft, ids, mask, temperature=1.0, **settings)
    assert sampled.stats.accepted > 0 and len(sampled.row_stats) == 3


def test_expected_acceptance_is_bounded_by_the_coverage():
    target = build("llama", 40)
    kept = torch.arange(0, 40, 2)
    ids = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    exact = expected_acceptance(target, short(target, kept), ids, ids)
    p = target(ids).logits[:, :-1].softmax(-1).flatten(0, 1)
    coverage = p[:, kept].sum(-1)
    torch.testing.assert_close(exact.overlap, coverage)  # p renormalised covers all of it
    outside = ~torch.isin(ids[:, 1:].flatten(), kept)
    assert outside.any() and (exact.ratio[outside] == 0).all()


# Files


@pytest.mark.parametrize("architecture", ["neox", "llama", "phi", "codegen"])
def test_a_folder_holds_it(make_model, tokenizer, tmp_path, architecture):
    draft = short(make_model(architecture))
    draft.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = models.load_model(tmp_path)
    for name, value in draft.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert torch.equal(models.short_head_tensors(tmp_path)["token_ids"], KEPT)
    ids = torch.arange(6)[None]
    assert torch.equal(loaded(ids).logits, draft(ids).logits)
    checked = models.check_model(tmp_path)
    assert len(checked.get_output_embeddings().weight) == len(KEPT)
    assert models.load_model(tmp_path, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):  # others do not take it for a model with a whole head
        AutoModelForCausalLM.from_pretrained(tmp_path)
    make_model(architecture).save_pretrained(tmp_path / "whole")
    assert models.short_head_tensors(tmp_path / "whole") == {}


def drop_tokens(folder, tensors):
    del tensors["lm_head.token_ids"]


def other_size(folder, tensors):
    config = json.loads((folder / "config.json").read_text()) | {"draft_vocab_size": 7}
    (folder / "config.json").write_text(json.dumps(config))


def swap_tokens(folder, tensors):
    tensors["lm_head.token_ids"] = tensors["lm_head.token_ids"].flip(0)


def high_token(folder, tensors):
    tensors["lm_head.token_ids"][-1] = 10_000


def other_shape(folder, tensors):
    tensors["model.norm.weight"] = torch.ones(48)


@pytest.mark.parametrize(
    ("damage", "message", "noticed_by_check"),
    [
        (drop_tokens, "draft_vocab_size 8, and its files hold no output head of 8 rows", True),
        (other_size, "draft_vocab_size 7, and its files hold no output head of 7 rows", True),
        (swap_tokens, "its token_ids must be ascending numbers from 0 to 4", False),
        (high_token, "its token_ids must be ascending numbers from 0 to 4", False),
        (other_shape, "1 weights do not fit, the first is model.norm.weight", False),
    ],
)
def test_what_config_says_and_the_files_lack_is_said(
    make_model, tmp_path, damage, message, noticed_by_check
):
    short(make_model("llama")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tmp_path, tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        models.load_model(tmp_path)
    if noticed_by_check:
        with pytest.raises(ValueError, match=message):
            models.check_model(tmp_path)


def test_frequent_tokens():
    rows = []
    for ids, prompt_length in (([9, 9, 9, 5, 5, 7], 1), ([9, 3, 7, 7], 2)):
        rows.append(data.Example(torch.tensor(ids).int().numpy(), prompt_length))
    # without the prompts 7 is there three times, 5 and 9 twice; 2 is the end token
    assert frequent_tokens(rows, 2, [2]).tolist() == [2, 7]
    assert frequent_tokens(rows, 3, [2]).tolist() == [2, 5, 7]
    assert frequent_tokens(rows, 4, [2]).tolist() == [2, 5, 7, 9]
    assert frequent_tokens(rows, 6, [2]).tolist() == [0, 1, 2, 5, 7, 9], "filled up by number"


# Cells and runs


@pytest.fixture
def make_cell(make_model, tokenizer, tmp_path):
    """make_cell(short_ones, **settings): a cell of two random models, some with short heads."""

    def make(short_ones=(), **settings):
        paths = [tmp_path / f"{role}{len(short_ones)}" for role in ("target", "draft")]
        for seed, path in enumerate(paths):
            model = make_model(seed=seed, num_hidden_layers=1, vocab_size=400)
            model = short(model) if path.name[:-1] in short_ones else model
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        flags = {"limit": 16, "max_length": 128, "max_new_tokens": 6, "eval_prompts": 2}
        flags |= {"epochs": (0, 1, 1), "batch": 8, "dtype": "float32", "out": str(tmp_path / "out")}
        pairs = {"toy": Pair(*map(str, paths))}
        return prepare_cell("toy", "arithmetic", 0, Settings(**flags | settings), CPU, pairs)

    return make


def test_short_heads_that_cannot_be_are_refused(make_cell):
    best = Method("best", divergence="tvd")
    with pytest.raises(ValueError, match="--draft-vocab 401 is more than the 400 tokens"):
        check_cell(make_cell(draft_vocab=401), [best])
    check_cell(make_cell(draft_vocab=400), [best])
    for method in (Method("distillspec", divergence="ce"), Method("adaspec", reference="ce")):
        with pytest.raises(ValueError, match="the loss ce asks for tokens that a short output"):
            check_cell(make_cell(draft_vocab=8), [best, method])
    cell = make_cell(short_ones=("draft",), draft_vocab=8)
    with pytest.raises(ValueError, match=r"--draft-vocab: .*draft1 has a short head already"):
        check_cell(cell, [best])
    cell = make_cell(short_ones=("draft",))
    check_cell(cell, [best])
    with pytest.raises(ValueError, match="the loss ce asks"):
        check_cell(cell, [Method("distillspec", divergence="ce")])
    with pytest.raises(ValueError, match=r"target2 has a short output head .* not a target's"):
        check_cell(make_cell(short_ones=("target", "draft")), [best])


def test_the_tokens_are_those_of_the_responses_that_are_trained_on(make_cell, monkeypatch):
    """The data set's, or the target's own, which here are all of one token."""
    cell = make_cell(draft_vocab=8)
    target, draft = base_models(cell)
    own = with_short_head(cell, draft, target, [Method("distillspec")])
    assert with_short_head(cell, draft, target, [Method("distillspec")]) == own, "found again"
    written = [
        example._replace(input_ids=torch.full_like(torch.from_numpy(example.input_ids), 7).numpy())
        for example in cell.examples
    ]
    monkeypatch.setattr("cells.written_by_target", lambda *arguments: written)
    other = with_short_head(cell, draft, target, [Method("best"), Method("best", data="target")])
    tokens = [models.short_head_tensors(model.path)["token_ids"].tolist() for model in (own, other)]
    end = cell.tokenizer.eos_token_id
    assert tokens[0] == frequent_tokens(cell.examples, 8, [end]).tolist()
    assert tokens[1] == sorted({7, end, *range(8)})[:8] and 7 in tokens[1] and end in tokens[1]
    assert own.fingerprint != other.fingerprint and own.path != other.path


def test_a_run(tmp_path, short_flags, capsys, monkeypatch):
    """From base models to the table; trained anew and evaluated, and found again."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(PAIRS, "tiny", Pair(sizes | {"num_hidden_layers": 2}, sizes, lr=2e-3))
    flags = [*short_flags, "--methods", "best,adaspec", "--draft-vocab", "40"]
    flags += ["--out", str(tmp_path)]
    run_all.main(flags)
    printed = capsys.readouterr().out
    assert "short head: 40 of 512 tokens, with 0." in printed
    cell = tmp_path / "tiny" / "arithmetic" / "seed0"
    sizes = {
        path.parent.name: len(models.load_model(path.parent).get_output_embeddings().weight)
        for path in cell.glob("*/stage.json")
    }
    drafts = ("adaspec", "best-6-epochs", "distilled-3-epochs", "draft-vocab-40")
    whole = dict.fromkeys(("target", "base-target", "base-draft"), 512)
    assert sizes == dict.fromkeys(drafts, 40) | whole
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    trained = [row for row in rows if row["draft"] != "base"]
    assert len(rows) == 6 and len(trained) == 4
    assert {row["draft_vocab"] for row in trained} == {40}
    assert len({row["coverage"] for row in trained}) == 1 and 0 < trained[0]["coverage"] < 1
    run_all.main(flags)
    assert capsys.readouterr().out.count(": done before") == 7


@pytest.fixture
def stop_in_step(monkeypatch):
    """stop_in_step(n): a signal comes in the nth step from now, None: never."""

    def stop(number):
        steps = []

        def step(*inputs):
            steps.append(1)
            if len(steps) == number:
                ranks.stop_signal = signal.SIGTERM
            return train.distillation_step(*inputs)

        ranks.stop_signal = None
        monkeypatch.setattr(run_all, "distillation_step", step)

    return stop


def test_a_stopped_run_goes_on_to_the_same_bits(make_cell, stop_in_step, tmp_path):
    """A draft that has a short head from the start, with a cache; and without one it learns the
    same."""
    method = Method("best", divergence="tvd", batch=4)
    weights, summaries = [], []
    for out, stop, cache_gb in (("whole", None, 1.0), ("stopped", 2, 1.0), ("uncached", None, 0.0)):
        cell = make_cell(short_ones=("draft",), out=str(tmp_path / out), cache_gb=cache_gb)
        stop_in_step(stop)
        if stop:
            with pytest.raises(ranks.Stopped):
                run_all.run_cell(cell, [method])
            stop_in_step(None)
        drafts = run_all.run_cell(cell, [method], lambda cell, target, drafts, costs: drafts)
        folder = Path(drafts[method.label].path)
        weights.append(load_file(folder / "model.safetensors"))
        summaries.append(read_json(folder / "stage.json")["summary"])
    whole, stopped, uncached = weights
    for name, tensor in whole.items():
        assert torch.equal(stopped[name], tensor)
        torch.testing.assert_close(uncached[name], tensor)
    assert [summary["steps"] for summary in summaries] == [8, 8, 8]
    assert [summary["draft_vocab"] for summary in summaries] == [8, 8, 8]
    assert summaries[0]["coverage"] > 0 and summaries[2]["coverage"] is None
