"""Tables of a run's rows against computations by hand."""

import pytest

import tables

ROW = {
    "task": "gsm8k", "pair": "tiny", "seed": 0, "temperature": 1.0, "draft": "AdaSPEC",
    "alpha": 0.61234, "alpha_interval": [0.5, 0.7], "tau": 2.345, "expected_acceptance": 0.6,
    "agreement": 0.55, "speedup": 1.239, "regime": "3-epoch", "prompts": 6, "split": "test",
    "timed_prompts": 1, "gamma": 5, "max_new_tokens": 12, "dtype": "float32", "ranks": 1,
    "device": "cpu", "torch": "2.0", "epochs": 2.0, "steps": 6, "loss_tokens": 3504,
    "target_forwards": 48, "seconds": 1.4,
}  # fmt: skip
TRAINING = ("epochs", "steps", "loss_tokens", "target_forwards", "seconds")


def base_row(**changes):
    row = {key: value for key, value in ROW.items() if key not in TRAINING}
    return row | {"draft": "base"} | changes


def test_the_table_of_a_run():
    rows = [base_row(temperature=0.0), ROW]
    cells, protocol, title, training = tables.table(rows).split("\n\n")
    assert cells.splitlines() == [
        "| task | pair | seed | T | draft | alpha (95% interval) | tau | expected | agree "
        "| speed-up |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| gsm8k | tiny | 0 | 0 | base | 0.612 (0.500-0.700) | 2.35 | 0.600 | 0.550 | 1.24x |",
        "| gsm8k | tiny | 0 | 1 | AdaSPEC | 0.612 (0.500-0.700) | 2.35 | 0.600 | 0.550 | 1.24x |",
    ]
    assert protocol.startswith(
        "Protocol of gsm8k: first 6 test prompts (speed-up: 1, one by one), gamma 5,\n"
        "max_new_tokens 12, float32, 1 x cpu, torch 2.0, seed 0.\nalpha = accepted / judged"
    )
    assert title.startswith("What training took, the reference's included")
    assert training.splitlines() == [
        "| task | pair | seed | draft | epochs | steps | loss-bearing tokens | target forwards "
        "| seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| gsm8k | tiny | 0 | AdaSPEC | 2.0 | 6 | 3504 | 48 | 1 |",
    ]


def test_a_draft_has_one_line_of_what_its_training_took():
    text = tables.table([ROW, ROW | {"temperature": 0.0}, ROW | {"seed": 1}])
    assert text.count("| 3504 |") == 2
    assert "What training took" not in tables.table([base_row()])


def test_each_protocol_is_said_once_with_all_its_seeds():
    rows = [ROW, ROW | {"seed": 2}, ROW | {"task": "mbpp", "gamma": 3}]
    text = tables.table(rows)
    assert text.count("Protocol of gsm8k") == text.count("Protocol of mbpp") == 1
    assert "gamma 3,\n" in text and "seed 0, 2." in text


def test_the_papers_numbers_are_beside_ours():
    row = {"task": "mbpp", "pair": "pythia", "draft": "AdaSPEC", "regime": "optimal"}
    assert tables.paper_alpha(row) == "0.651"
    assert tables.paper_alpha(row | {"draft": "DistillSpec"}) == "0.499"
    assert tables.paper_alpha(row | {"pair": "codegen"}) == "0.877"
    codegen = row | {"regime": "3-epoch", "pair": "codegen"}
    assert tables.paper_alpha(codegen | {"draft": "DistillSpec"}) == "0.874"
    assert tables.paper_alpha(row | {"regime": "3-epoch", "task": "gsm8k"}) == "0.626"
    for other in ({"pair": "tiny"}, {"draft": "base"}, {"task": "arithmetic"}):
        assert tables.paper_alpha(row | other) == ""


def test_the_papers_column_is_there_where_the_paper_has_the_cell():
    rows = [ROW | {"pair": "pythia"}, base_row(pair="pythia")]
    lines = tables.table(rows).splitlines()
    assert lines[0].endswith("| speed-up | paper's alpha |")
    assert lines[2].endswith("| 1.24x | 0.626 |") and lines[3].endswith("| 1.24x |  |")
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "paper" not in tables.table([ROW])


def test_lines_fit_a_terminal_of_120_columns():
    """Issue 14.13: the table of ten columns wrapped."""
    row = ROW | {"task": "cnn_dailymail", "pair": "tiny-wide", "draft": "DistillSpec", "seed": 10}
    row |= {"tau": 11.0, "speedup": 10.0, "steps": 100_000, "loss_tokens": 10**9}
    rows = [row, row | {"seed": 11}]
    text = f"{tables.table(rows)}\n{tables.over_seeds(rows)}"
    assert max(map(len, text.splitlines())) <= 120


# Means over seeds


def test_means_over_seeds_are_paired_by_seed():
    """Gains of 0.01, 0.02, 0.03 have mean 0.02 and half width 4.303 x 0.01 / sqrt(3) = 0.025."""
    rows = []
    for seed, (uniform, selected) in enumerate([(0.50, 0.51), (0.60, 0.62), (0.70, 0.73)]):
        for draft, alpha in (("DistillSpec", uniform), ("AdaSPEC", selected)):
            values = {"draft": draft, "alpha": alpha, "expected_acceptance": alpha / 2}
            rows.append(ROW | values | {"seed": seed})
    text = tables.over_seeds(rows[::-1])
    assert "| gsm8k | tiny | 1.0 | DistillSpec | 0.600 (0.352 to 0.848) |  |" in text
    assert "| AdaSPEC | 0.620 (0.347 to 0.893) | +0.020 (-0.005 to +0.045) |" in text
    assert "| 0.310 (0.173 to 0.447) | +0.010 (-0.002 to +0.022) |" in text
    assert text.startswith("\nMeans over 3 seeds")
    assert len({line.count("|") for line in text.splitlines() if "|" in line}) == 1


def test_means_need_2_to_10_seeds():
    assert tables.over_seeds([ROW]) == ""
    assert tables.over_seeds([ROW | {"seed": seed} for seed in range(11)]) == ""
    assert tables.over_seeds([ROW | {"seed": seed} for seed in range(10)]) != ""


def test_a_gain_is_over_distillspec_of_the_same_cell():
    drafts = {"DistillSpec": 0.5, "AdaSPEC": 0.7}
    rows = [
        ROW | {"task": task, "seed": seed, "draft": draft, "alpha": alpha + 0.1 * seed}
        for task, labels in (("gsm8k", drafts), ("mbpp", ["AdaSPEC"]))
        for draft, alpha in drafts.items()
        if draft in labels
        for seed in (0, 1)
    ]
    lines = tables.over_seeds(rows).splitlines()[5:]
    assert [line.split(" | ")[5] for line in lines] == ["", "+0.200 (+0.200 to +0.200)", ""]


def test_students_t():
    """Of 1, 2, 3, 4: mean 2.5, deviation 1.291, half width 3.182 x 1.291 / 2."""
    assert tables.mean_interval([1, 2, 3, 4]) == pytest.approx((2.5, 0.446, 4.554), abs=1e-3)
    assert tables.mean_interval([1, 3]) == pytest.approx((2, -10.706, 14.706), abs=1e-3)
    half = 2.262 * 3.02765 / 10**0.5
    mean, low, high = tables.mean_interval(list(range(10)))
    assert (mean, high - mean, mean - low) == pytest.approx((4.5, half, half), abs=1e-4)
    assert tables.interval([0.1, 0.3]) == "+0.200 (-1.071 to +1.471)"
    assert tables.interval([0.1, 0.3], digits=1) == "+0.2 (-1.1 to +1.5)"
    assert tables.interval([0.25]) == "+0.250" and tables.interval([1.0] * 11) == "+1.000"


def test_a_grid_is_markdown():
    assert tables.grid("a | b", ["1 | 2"]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
