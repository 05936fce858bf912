"""Gap correlations, the token picture and cost by gamma against plain recomputations."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

import data
from adaspec import token_kl
from costs import predicted_speedups
from distillspec import DIVERGENCES
from evaluate import evaluate
from extras import analysis
from settings import Settings
from speculative import speculative_generate
from tests.sampling import noisy


@pytest.fixture
def pair(make_model):
    """A small target and a draft, its copy with noise: some drafts are accepted, some are not."""
    target = make_model(seed=1, initializer_range=0.3)
    return target, noisy(target, 0.05, seed=0)


@pytest.fixture
def decoding(tokenizer):
    end = {"eos_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}
    return {"max_new_tokens": 24, **end}


# Gap correlations


def test_rank_correlation_against_the_formula():
    """1 - 6 sum d^2 / (n (n^2 - 1)), of ranks 0 1 2 3 and 1 0 2 3."""
    a, b = np.array([0.1, 0.5, 2.0, 9.0]), np.array([3.0, -1.0, 4.0, 5.0])
    assert analysis.rank_correlation(a, b) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert analysis.rank_correlation(a, -a) == pytest.approx(-1)


def test_held_out_losses_are_kl_at_response_tokens(pair, examples, tokenizer):
    target, draft = pair
    vocab_size = len(tokenizer)
    losses = analysis.held_out_losses(draft, target, examples[:5], 2, vocab_size)
    expected = []
    for ids, start, _ in examples[:5]:
        ids = torch.from_numpy(ids).long()[None]
        with torch.no_grad():
            p, q = (model(ids).logits[0, start - 1 : -1, :vocab_size] for model in pair)
        expected.append(DIVERGENCES["fkl"](p, q))
    torch.testing.assert_close(torch.from_numpy(losses), torch.cat(expected), atol=1e-4, rtol=1e-3)


def test_gap_correlations():
    """The loss falls by 4, 3, 2; the gap ranks the tokens the other way round."""
    base, reference, draft = np.array([5.0, 4.0, 3.0]), np.array([4.9, 2.0, 0.0]), np.ones(3)
    correlations = analysis.gap_correlations(base, reference, draft)
    assert correlations == pytest.approx({"gap_correlation": -1, "loss_correlation": 1})


# A finished cell


@pytest.fixture
def cell(tmp_path, pair, tokenizer):
    """A cell of the offline task as run_all.py leaves it, its target in another seed's folder."""
    target, draft = pair
    models = {
        "seed0/target": (target, {"init": "x"}),
        "seed1/base-draft": (noisy(target, 0.2, seed=1), {"init": {"hidden_size": 32}}),
        "seed1/distilled-3-epochs": (noisy(target, 0.1, seed=2), {"init": "f-base-draft"}),
        "seed1/adaspec": (draft, {"init": "f-base-draft", "reference": "f-distilled-3-epochs"}),
    }
    task = tmp_path / "tiny" / "arithmetic"
    for name, (model, settings) in models.items():
        folder = task / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings |= {"target": "f-target", "k": 0.25, "dtype": "float32"}
        record = {"fingerprint": f"f-{folder.name}", "settings": settings}
        (folder / "stage.json").write_text(json.dumps(record))
    return task / "seed1"


def test_gap_command_finds_the_cells_models(cell, pair, tokenizer, capsys):
    analysis.main(["gap", str(cell), "--prompts", "4", "--max-length", "128", "--batch", "3"])
    lines = capsys.readouterr().out.splitlines()
    finished = analysis.FinishedCell(cell)
    examples = finished.held_out(tokenizer, "test", 4, max_length=128)
    target, draft = pair
    base, reference = (finished.load(cell / name) for name in ("base-draft", "distilled-3-epochs"))
    losses = [
        analysis.held_out_losses(model, target, examples, 4, len(tokenizer))
        for model in (base, reference, draft)
    ]
    gap, loss = analysis.gap_correlations(*losses).values()
    assert lines[-1] == f"| adaspec | {gap:.3f} | {loss:.3f} |"
    assert 0.1 < abs(gap) < 1


def test_pretrained_models_are_named_by_flags(cell):
    finished = analysis.FinishedCell(cell)
    (draft,) = finished.drafts()
    finished.stages[draft]["settings"]["init"] = "a pretrained model"
    with pytest.raises(ValueError, match=r"the base of .*adaspec is no stage of the run: .*--base"):
        finished.find("base", draft)
    assert finished.find("reference", draft) == str(cell / "distilled-3-epochs")
    finished.pretrained["base"] = "pythia"
    assert finished.find("base", draft) == "pythia"


def test_a_folder_that_is_no_cell(cell):
    with pytest.raises(ValueError, match="has no AdaSPEC draft: give runs/<pair>/<task>/seed<n>"):
        analysis.FinishedCell(cell.parent)
    with pytest.raises(ValueError, match="has no AdaSPEC draft best; it has adaspec"):
        analysis.main(["picture", str(cell), "--draft", "best", "--json", "x"])


# Token pictures


def test_the_picture_is_what_decoding_did(cell, pair, tokenizer, decoding, tmp_path, capsys):
    target, draft = pair
    path = tmp_path / "picture.json"
    words = ["--gamma", "4", "--max-new-tokens", "24", "--max-length", "128", "--prompt", "2"]
    analysis.main(["picture", str(cell), "--json", str(path), *words])
    record = json.loads(path.read_text())
    finished = analysis.FinishedCell(cell)
    prompt = data.prompt_ids(finished.held_out(tokenizer, "test", 2, max_length=128)[-1])
    out = speculative_generate(target, draft, prompt[None], gamma=4, **decoding)
    counts, stats = Counter(record["origins"]), out.stats
    assert 0 < stats.accepted == counts["accepted"] and 0 < stats.rejected == counts["corrected"]
    assert counts["bonus"] == stats.target_calls - stats.cut - stats.rejected
    new = out.sequences[0, len(prompt) :].tolist()
    assert record["tokens"] == [tokenizer.decode([token]) for token in new]
    base, reference = (finished.load(cell / name) for name in ("base-draft", "distilled-3-epochs"))
    with torch.no_grad():
        p, q, r = (
            model(out.sequences).logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
            for model in (target, base, reference)
        )
    gap = token_kl(p, q) - token_kl(p, r)
    assert record["gap"] == pytest.approx(gap.tolist(), abs=1e-5)
    assert record["k"] == 0.25 and record["prompt"] == 2 and record["seed"] == 1
    assert sum(record["selected"]) == pytest.approx(len(gap) / 4, abs=1)
    pairs = list(zip(record["gap"], record["selected"], strict=True))
    chosen = [value for value, selected in pairs if selected]
    assert min(chosen) >= max(value for value, selected in pairs if not selected)
    assert f"{stats.accepted} of {len(new)} tokens are accepted drafts" in capsys.readouterr().out


# Cost by gamma


def test_tau_by_gamma_is_that_of_decoding(pair, examples, tokenizer, decoding):
    target, draft = pair
    settings = Settings(max_new_tokens=24, eval_batch=4, timed_prompts=1, gamma=4)
    rows = evaluate(target, {"noisy": draft}, examples[:4], tokenizer, settings, 0, "test")
    greedy, sampled = rows
    assert 0.2 < greedy["alpha"] < 0.98
    assert list(greedy["tau_by_gamma"]) == [str(n) for n in range(1, 11)]
    prompts = [data.prompt_ids(example)[None] for example in examples[:4]]
    for gamma in (1, 4, 10):
        generated = calls = 0
        for prompt in prompts:
            out = speculative_generate(target, draft, prompt, gamma=gamma, **decoding)
            generated += out.stats.generated
            calls += out.stats.target_calls
        assert greedy["tau_by_gamma"][str(gamma)] == pytest.approx(generated / calls, rel=1e-12)
    assert sampled["tau_by_gamma"]["4"] == pytest.approx(sampled["tau"], rel=0.3)
    assert greedy["speedup"] > 0
    assert 0.2 < greedy["cost_ratio"] < 5, "one size, about one cost"
    assert list(greedy["scoring_ratio"]) == list(greedy["tau_by_gamma"])
    assert min(greedy["scoring_ratio"].values()) > 0.2


def test_cost_table_against_a_hand_computation(tmp_path, capsys):
    row = {"task": "gsm8k", "pair": "tiny", "seed": 0, "temperature": 0.0, "draft": "AdaSPEC"}
    row |= {"tau_by_gamma": {"1": 1.8, "2": 2.4, "3": 2.7}, "cost_ratio": 0.25}
    row["scoring_ratio"] = {"1": 1.0, "2": 1.1, "3": 1.25}
    expected = {1: 1.8 / 1.25, 2: 2.4 / 1.6, 3: 2.7 / 2.0}
    assert predicted_speedups(row) == pytest.approx(expected)
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"rows": [row, {"draft": "EAGLE", "cost_ratio": None}]}))
    analysis.main(["cost", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "| gsm8k | tiny | 0 | 0 | AdaSPEC | 0.250 | 1.44 | 1.50 | 1.35 | 2 |"
    assert len(lines) == 3
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="no row has tau_by_gamma and costs"):
        analysis.main(["cost", str(path)])
