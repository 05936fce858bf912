"""What result rows say: tables recomputed by hand, studies and the README, figures, tau by gamma, the picture."""

import copy
import json
import re
import sys
from collections import Counter

import pytest
import torch

import report
import run_all
from adaspec import token_kl
from speculative import speculative_generate

CELL = {
    "pair": "tiny", "split": "test", "prompts": 100, "gamma": 5, "max_new_tokens": 64, "dtype": "float32", "regime": "3-epoch",
}  # fmt: skip
ALPHAS = {  # draft -> task -> alpha by seed: AdaSPEC gains 0.00, 0.01, 0.02 on gsm8k, 0.02, 0.03, 0.04 on mbpp
    "DistillSpec": {"gsm8k": [0.50, 0.60, 0.70], "mbpp": [0.30, 0.30, 0.30]},
    "AdaSPEC": {"gsm8k": [0.50, 0.61, 0.72], "mbpp": [0.32, 0.33, 0.34]},
}


def make_rows(alphas=ALPHAS, temperatures=(0.0, 1.0)):
    """Rows as run_all.py writes them; at temperature 1 every alpha is 0.1 more."""
    took = {"epochs": 3.0, "rows": 6000, "steps": 375, "loss_tokens": 1000, "target_forwards": 2000, "seconds": 1.5}
    counts = {"accepted": 60, "rejected": 40, "per_position": [[40, 20], [60, 40]]}
    speeds = {
        "speedup": 1.2,
        "speedup_by_gamma": {"5": 1.2},
        "cost_ratio": 0.25,
        "scoring_ratio": {str(n): 1.1 for n in range(1, 11)},
    }
    return [
        CELL | {"task": task, "seed": seed, "temperature": temperature, "draft": draft, "alpha": alpha + temperature / 10}
        | {"alpha_interval": [alpha - 0.01, alpha + 0.2], "tau": 2.4, "counts": counts, **speeds}
        | {"tau_by_gamma": {str(n): 2 + n / 10 for n in range(1, 11)}}
        | (took | {"loss_tokens": 1000 + 100 * seed} if draft != "base" else {})
        for temperature in temperatures for draft, by_task in alphas.items()
        for task, by_seed in by_task.items() for seed, alpha in enumerate(by_seed)
    ]  # fmt: skip


def make_study(rows, **keys):
    about = {
        "study": "made-up",
        "title": "A title",
        "note": "A note.",
        "commands": ["python run_all.py"],
        "machine": "1 x abacus",
    }
    return about | keys | {"rows": rows}


def test_a_studys_table_against_a_hand_computation():
    """Gains by seed, over tasks: 0.01, 0.02, 0.03, so 0.02 +- 4.303 x 0.01 / sqrt(3); alpha 0.45 and 0.47."""
    text = "\n".join(report.compact(make_study(make_rows(), baseline="DistillSpec")))
    assert "| draft | alpha, T = 0 | over DistillSpec | alpha, T = 1 | over DistillSpec | passes | steps |" in text
    assert "| DistillSpec | 0.450 |  | 0.550 |  | 3.0 | 375 | 1,100 | 2,000 |" in text
    gain = "+0.020 (-0.005 to +0.045)"
    assert f"| AdaSPEC | 0.470 | {gain} | 0.570 | {gain} | 3.0 | 375 | 1,100 | 2,000 |" in text
    assert "Alpha by task, with the gain over DistillSpec:" in text and "| draft | T | gsm8k | mbpp |" in text
    first = re.escape("| AdaSPEC | 1 | 0.710 +0.010 (-0.0") + r"\d+ to \+0.\d+\) \| 0.430 \+0.030 \("
    assert re.search(first, text) and "| DistillSpec | 1 | 0.700 | 0.400 |" in text
    text = "\n".join(report.compact(make_study(make_rows(), baseline="AdaSPEC,DistillSpec")))
    assert f"| AdaSPEC | 0.470 |  | {gain} | 0.570 |  | {gain} |" in text, "two baselines"
    text = "\n".join(report.compact(make_study(make_rows())))
    assert "| DistillSpec | 0.450 | -0.020 (-0.045 to +0.005) |" in text, "the baseline is AdaSPEC where there is one"


def test_one_seed_has_no_interval_and_pairs_have_lines_of_their_own():
    alphas = {"base": {"gsm8k": [0.2]}, "DistillSpec": {"gsm8k": [0.5]}}
    rows = make_rows(alphas, [1.0])
    text = report.compact(make_study(rows + [row | {"pair": "big", "alpha": row["alpha"] + 0.1} for row in rows]))
    assert text[2:] == [
        "| tiny: base | 0.300 | -0.300 |  |  |  |  |",
        "| tiny: DistillSpec | 0.600 |  | 3.0 | 375 | 1,000 | 2,000 |",
        "| big: base | 0.400 | -0.300 |  |  |  |  |",
        "| big: DistillSpec | 0.700 |  | 3.0 | 375 | 1,000 | 2,000 |",
    ]


def test_protocol_says_the_conditions():
    rows = make_rows()
    rows[0]["prompts"] = 90
    assert report.protocol(make_study(rows)) == (
        "tiny: gsm8k, mbpp; 90 to 100 test prompts a task; 2000 training rows; gamma 5; max_new_tokens 64; float32; "
        "seeds 0, 1, 2; 1 x abacus."
    )


def test_the_readme_is_what_the_studies_say():
    assert report.main(["--check"]) == 0


@pytest.fixture
def project(tmp_path):
    """A folder with a README, no study yet, and a run's results."""
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(f"# Name\n\n{report.MARKS[0]}\n{report.MARKS[1]}\n\nEnd.\n")
    run = {"commands": ["python /home/me/run_all.py --data-dir /home/me/data --out=/tmp/x"], "torch": "2", "rows": make_rows()}
    (tmp_path / "run.json").write_text(json.dumps(run | {"machine": "1 x abacus"}))
    (tmp_path / "results" / "train.json").write_text("{}")  # no study
    return tmp_path


def add(project, name="one", *more, results="run.json"):
    return report.main(["add", name, str(project / results), "--title", "T", "--note", "N", *more], project)


def test_from_a_run_to_the_readme(project, capsys):
    assert report.main([], project) == 0 and "No study yet" in (project / "README.md").read_text()
    assert report.main(["--check"], project) == 0
    assert add(project) == add(project, "two", "--order", "1", "--baseline", "DistillSpec") == 0
    assert capsys.readouterr().out.count(".json: 24 rows, ") == 2 and report.main(["--check"], project) == 1
    assert report.main([], project) == report.main(["--check"], project) == 0
    text = (project / "README.md").read_text()
    assert text.startswith("# Name\n\n<!--") and text.endswith("-->\n\nEnd.\n") and "train.json" not in text
    assert (
        text.index("results/two.json") < text.index("results/one.json") and "python run_all.py --data-dir data --out=x" in text
    )
    lines = (project / "results" / "one.json").read_text().splitlines()
    rows = [json.loads(line.rstrip(",")) for line in lines if line.startswith("  {")]
    assert len(rows) == 24 and rows[13]["alpha"] == 0.7 and "/home" not in str(lines)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: run.pop("machine"), "does not say its machine; give --machine"),
        (lambda run: run.pop("rows"), "has no rows: give the results.json of a run"),
        (lambda run: run["rows"].clear(), "study one has no rows"),
        (lambda run: run["rows"][3].pop("dtype"), "a row has no dtype"),
        (lambda run: run["rows"][3].update(gamma=7), "rows of gamma 5 and 7; a study has one gamma"),
        (lambda run: run["rows"].pop(1), "DistillSpec of tiny has 0 rows for gsm8k, seed 1, temperature 0"),
        (lambda run: run["rows"].append(run["rows"][0]), "DistillSpec of tiny has 2 rows for gsm8k, seed 0"),
        (lambda run: [row.update(draft="other") for row in run["rows"]], "no draft DistillSpec of tiny to compare with"),
        (lambda run: run["rows"].extend(run["rows"][0] | {"seed": 3 + n} for n in range(9)), "has 0 rows for gsm8k, seed 3"),
    ],
)
def test_what_makes_no_study(project, capsys, change, words):
    run = json.loads((project / "run.json").read_text())
    change(run)
    (project / "run.json").write_text(json.dumps(run))
    assert add(project) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and not (project / "results" / "one.json").exists()


def test_bad_names_files_and_marks(project, capsys):
    assert add(project, "../one") == add(project, results="README.md") == add(project, results="none.json") == 2
    (project / "README.md").write_text(f"{report.MARKS[1]}\n{report.MARKS[0]}\n")
    assert report.main([], project) == 2
    messages = capsys.readouterr().err.splitlines()
    for message, words in zip(messages, ["a study's name", "cannot read", "No such file", "must have the lines"], strict=True):
        assert words in message


def test_figures_of_all_kinds(tmp_path):
    pytest.importorskip("matplotlib")
    alphas = ALPHAS | {f"AdaSPEC {swept}": ALPHAS["AdaSPEC"] for swept in ("k=0.2", "k=0.6", "epochs=1", "epochs=2")}
    record = {"pair": "tiny", "task": "gsm8k", "seed": 0, "split": "test", "draft": "AdaSPEC", "gamma": 5, "k": 0.4}
    record |= {
        "tokens": ["a $x", "\n", " b"],
        "origins": list(report.ORIGINS),
        "selected": [True, False, True],
        "gap": [1, 0, 2],
    }
    made = report.figures(make_rows(alphas), tmp_path / "figures", [record])
    names = ["tiny-alpha", "tiny-k", "tiny-epochs", "tiny-tau", "tiny-speedup", "tiny-positions", "tiny-gsm8k-seed0-picture"]
    assert [path.stem for path in made] == names and min(path.stat().st_size for path in made) > 5000
    old = [{key: row[key] for key in row if key not in ("tau_by_gamma", "cost_ratio")} for row in make_rows(temperatures=[0.0])]
    made = report.figures(old, tmp_path / "old")
    assert [path.stem for path in made] == ["tiny-alpha", "tiny-positions"], "rows of before"


@pytest.fixture
def pair(make_model):
    """A small target and a draft, its copy with noise: some drafts are accepted, some are not."""
    target = make_model(seed=1, initializer_range=0.3)
    draft = copy.deepcopy(target)
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in draft.parameters():
            weights += 0.05 * torch.randn_like(weights)
    return target, draft


@pytest.fixture
def args():
    return run_all.parse(
        "--preset tiny --max-new-tokens 24 --eval-batch 4 --timed-prompts 1 --gamma 4 --timed-gammas 2".split()
    )


def test_tau_by_gamma_is_that_of_decoding(pair, examples, tokenizer, args):
    target, draft = pair
    rows = run_all.evaluate(target, {"noisy": draft}, examples[:6], tokenizer, args, 0, "test")
    greedy, sampled = rows
    assert 0.2 < greedy["alpha"] < 0.98
    assert list(greedy["tau_by_gamma"]) == [str(n) for n in range(1, 11)]
    for gamma, tau in greedy["tau_by_gamma"].items():
        how = {"max_new_tokens": 24, "eos_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer), "gamma": int(gamma)}
        prompts = [run_all.prompt_ids(example)[None] for example in examples[:6]]
        stats = [speculative_generate(target, draft, prompt, **how).stats for prompt in prompts]
        assert tau == pytest.approx(sum(s.generated for s in stats) / sum(s.target_calls for s in stats), rel=1e-12)
    assert sampled["tau_by_gamma"]["4"] == pytest.approx(sampled["tau"], rel=0.25)
    assert list(greedy["speedup_by_gamma"]) == ["2", "4"] and greedy["speedup_by_gamma"]["4"] == greedy["speedup"] > 0
    assert 0.2 < greedy["cost_ratio"] < 5, "one size, about one cost"
    assert list(greedy["scoring_ratio"]) == list(greedy["tau_by_gamma"]) and min(greedy["scoring_ratio"].values()) > 0.2


def test_the_picture_is_what_decoding_did(pair, make_model, examples, tokenizer, args):
    target, draft = pair
    base, reference, prompt = make_model(seed=3), make_model(seed=4), run_all.prompt_ids(examples[0])
    record = run_all.picture(target, base, reference, draft, prompt, tokenizer, args, 0.25)
    how = {"max_new_tokens": 24, "eos_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer), "gamma": 4}
    out = speculative_generate(target, draft, prompt[None], **how)
    counts, stats = Counter(record["origins"]), out.stats
    assert 0 < stats.accepted == counts["accepted"] and 0 < stats.rejected == counts["corrected"]
    assert counts["bonus"] == stats.target_calls - stats.cut - stats.rejected
    assert record["tokens"] == [tokenizer.decode([token]) for token in out.sequences[0, len(prompt) :].tolist()]
    with torch.no_grad():
        p, q, r = (m(out.sequences).logits[0, len(prompt) - 1 : -1, : len(tokenizer)] for m in (target, base, reference))
    assert record["gap"] == pytest.approx((token_kl(p, q) - token_kl(p, r)).tolist(), abs=1e-5)
    assert sum(record["selected"]) == pytest.approx(len(record["gap"]) / 4, abs=1)
    chosen = [gap for gap, selected in zip(record["gap"], record["selected"], strict=True) if selected]
    assert min(chosen) >= max(gap for gap in record["gap"] if gap not in chosen)


@pytest.mark.parametrize("flags", [["--timed-gammas", "0"], ["--timed-gammas", "x"]])
def test_bad_gammas(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        run_all.parse(flags)
    assert ended.value.code == 2 and "--timed-gammas" in capsys.readouterr().err


def test_figures_ask_for_matplotlib(project, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.main(["figures", str(project / "run.json"), str(project / "figures")], project) == 2
    assert capsys.readouterr().err == "report.py: error: figures need matplotlib: pip install matplotlib\n"
