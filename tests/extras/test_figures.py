"""Figures of all kinds are drawn, of rows that have what they need, and say what they lack."""

import json
import sys

import pytest

from extras import figures, report

CELL = {"pair": "tiny", "gamma": 5, "speedup": 1.2, "alpha_interval": [0.4, 0.7], "tau": 2.4}
COSTS = {
    "tau_by_gamma": {str(n): 2 + n / 10 for n in range(1, 11)},
    "speedup_by_gamma": {"5": 1.2},
    "cost_ratio": 0.25,
    "scoring_ratio": {str(n): 1.1 for n in range(1, 11)},
}
PICTURE = {
    "pair": "tiny",
    "task": "gsm8k",
    "seed": 0,
    "split": "test",
    "prompt": 1,
    "draft": "adaspec",
    "gamma": 5,
    "k": 0.4,
    "tokens": ["a $x", "\n", " b"],
    "origins": list(figures.ORIGINS),
    "selected": [True, False, True],
    "gap": [1, 0, 2],
}


def make_rows(drafts, seeds=3, temperatures=(0.0, 1.0), **more):
    counts = {"accepted": 60, "rejected": 40, "per_position": [[40, 20], [60, 40]]}
    return [
        CELL
        | {"draft": draft, "task": task, "seed": seed, "temperature": temperature}
        | {"alpha": 0.5 + 0.01 * seed + temperature / 10, "counts": counts, **more}
        for draft in drafts
        for task in ("gsm8k", "mbpp")
        for seed in range(seeds)
        for temperature in temperatures
    ]


def test_figures_of_all_kinds(tmp_path):
    pytest.importorskip("matplotlib")
    swept = [f"AdaSPEC {setting}" for setting in ("k=0.2", "k=0.6", "epochs=1", "epochs=2")]
    rows = make_rows(["DistillSpec", "AdaSPEC", *swept], seeds=2, **COSTS)
    files = figures.figures(rows, tmp_path / "figures", [PICTURE])
    names = ["alpha", "k", "epochs", "tau", "speedup", "positions", "gsm8k-seed0-picture"]
    assert [path.stem for path in files] == [f"tiny-{name}" for name in names]
    assert min(path.stat().st_size for path in files) > 5000
    files = figures.figures(make_rows(["AdaSPEC"], temperatures=[0.0]), tmp_path / "plain")
    assert [path.stem for path in files] == ["tiny-alpha", "tiny-positions"], "no costs, no sweep"


def test_an_interval_is_over_seeds_or_of_one_row_over_prompts():
    rows = make_rows(["AdaSPEC"], temperatures=[0.0])
    mean, low, high = figures.alpha_interval(rows)
    half = 4.303 * 0.01 / 3**0.5
    assert [mean, low, high] == pytest.approx([0.51, 0.51 - half, 0.51 + half])
    assert figures.alpha_interval(rows[:1]) == (0.5, 0.4, 0.7)
    one_seed = [row for row in rows if row["seed"] == 0]
    assert figures.alpha_interval(one_seed) == (0.5, 0.5, 0.5)


def test_counts_by_position_add_up():
    totals = [5]
    figures.add_to(totals, [1, 2])
    figures.add_to(totals, [1])
    assert totals == [7, 2]


def test_figures_ask_for_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "run.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="figures need matplotlib: pip install matplotlib"):
        report.main(["figures", str(tmp_path / "run.json"), str(tmp_path / "figures")])
    with pytest.raises(ValueError, match="figures need matplotlib: pip install matplotlib"):
        report.main(["history", str(tmp_path), str(tmp_path / "figures")])


def write_history(folder, alphas, **more):
    folder.mkdir(parents=True)
    lines = [{"step": 0, "alpha": alphas[0]}] if alphas else []
    for step in range(1, 5):
        lines.append({"step": step, "loss": 2 / step, **more})
        if alphas:
            lines[-1]["alpha"] = alphas[step]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_histories_of_a_run(tmp_path, capsys):
    """A figure a pair and task, a line a seed; stages that are still trained are there too."""
    pytest.importorskip("matplotlib")
    for seed in ("seed0", "seed1"):
        cell = tmp_path / "runs" / "tiny" / "gsm8k" / seed
        write_history(cell / "target", [])
        write_history(cell / "distilled-3-epochs", [0.3, 0.4, 0.5, 0.6, 0.7], selected=1.0)
        write_history(cell / "adaspec.checkpoints", [0.3, 0.3, 0.4, 0.4, 0.5], selected=0.4)
    write_history(tmp_path / "runs" / "toy" / "mbpp" / "seed0" / "adaspec", [], selected=0.4)
    assert report.main(["history", str(tmp_path / "runs"), str(tmp_path / "figures")]) == 0
    files = sorted((tmp_path / "figures").iterdir())
    assert [path.stem for path in files] == ["tiny-gsm8k-history", "toy-mbpp-history"]
    assert min(path.stat().st_size for path in files) > 5000
    assert capsys.readouterr().out.split() == [str(path) for path in files]
    with pytest.raises(ValueError, match=r"has no .*/history.jsonl; give the --out folder"):
        report.main(["history", str(tmp_path / "figures"), str(tmp_path / "none")])


def test_steps_and_values_of_a_history():
    lines = [{"step": 0, "alpha": 0.3}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert figures.series(lines, "loss") == ([1, 2], [2.0, 1.0])
    assert figures.series(lines, "alpha") == ([0], [0.3])
