"""Tables of a run's rows against computations by hand."""

import pytest

import tables

ROW = {
    "task": "gsm8k", "pair": "tiny", "seed": 0, "temperature": 1.0, "draft": "AdaSPEC",
    "alpha": 0.61234, "alpha_interval": [0.5, 0.7], "tau": 2.345, "expected_acceptance": 0.6,
    "agreement": 0.55, "speedup": 1.239, "tokens_per_second": 40.0,
    "regime": "3-epoch", "prompts": 6, "split": "test",
    "timed_prompts": 1, "gamma": 5, "max_new_tokens": 12, "dtype": "float32", "ranks": 1,
    "device": "cpu", "torch": "2.0", "epochs": 2.0, "steps": 6, "loss_tokens": 3504,
    "target_forwards": 48, "seconds": 1.4, "cache_seconds": 0.3, "cost_ratio": 0.25,
    "counts": {"rounds": 60, "accepted": 60, "rejected": 40, "per_position": [[40, 20], [60, 40]]},
    "tau_by_gamma": {"1": 1.8, "2": 2.4, "3": 2.7},
    "scoring_ratio": {"1": 1.0, "2": 1.1, "3": 1.25},
}  # fmt: skip
TRAINING = ("epochs", "steps", "loss_tokens", "target_forwards", "seconds", "cache_seconds")


def base_row(**changes):
    row = {key: value for key, value in ROW.items() if key not in TRAINING}
    return row | {"draft": "base"} | changes


def cells(table) -> list[list[str]]:
    return [list(line.values()) for line in table.lines]


def test_the_tables_of_a_run():
    rows = [base_row(temperature=0.0), ROW]
    training, positions, acceptance, speed = tables.tables_of(rows)
    assert tables.markdown(acceptance) == [
        "| task | pair | seed | T | draft | alpha (95% interval) | tau | expected | agree "
        "| speed-up |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| gsm8k | tiny | 0 | 0 | base | 0.612 (0.500-0.700) | 2.35 | 0.600 | 0.550 | 1.24x |",
        "| gsm8k | tiny | 0 | 1 | AdaSPEC | 0.612 (0.500-0.700) | 2.35 | 0.600 | 0.550 | 1.24x |",
    ]
    assert training.title.startswith("What training took, the reference's included")
    columns = ["epochs", "steps", "loss tokens", "forwards", "seconds", "caches"]
    assert list(training.lines[0]) == ["task", "pair", "seed", "draft", *columns]
    assert cells(training) == [
        ["gsm8k", "tiny", "0", "AdaSPEC", "2.0", "6", "3504", "48", "1", "0"]
    ]
    # accepted 40, 20 of judged 60, 40; 60 rounds
    assert list(positions.lines[0])[-3:] == ["of", "1", "2"]
    assert [line[-3:] for line in cells(positions)[:2]] == [
        ["judged", "0.67", "0.50"],
        ["rounds", "0.67", "0.33"],
    ]
    # 1.8 / 1.25, 2.4 / 1.6, 2.7 / 2
    assert list(speed.lines[0])[5:] == [
        "speed-up", "ms/token", "c", "gamma", "predicted", "break-even", "train s",
    ]  # fmt: skip
    assert cells(speed)[1][5:10] == ["1.24x", "25.0", "0.250", "2", "1.50x"]


def test_the_page_of_a_run():
    rows = [base_row(temperature=0.0), ROW, ROW | {"gamma": 4}]
    text = tables.markdown_text(rows, "an abacus")
    assert text.startswith(f"# Results\n\n{tables.LEGEND}\n\n## tiny, gamma 5, at most 12 new tok")
    assert text.count("## tiny, gamma") == 2, "what is not decoded alike is not in one table"
    assert (
        "Protocol of gsm8k: first 6 test prompts (speed-up: 1, one by one), gamma 5, "
        "max_new_tokens 12, float32, 1 x cpu, torch 2.0, seed 0.\n" in text
    )
    assert "\n- AdaSPEC pays on an abacus: 1.24x at T = 1, measured at gamma 5. Best p" in text


def test_positions_of_all_seeds_are_counted_together():
    other = {"rounds": 40, "accepted": 3, "rejected": 37, "per_position": [[3], [40]]}
    table = tables.position_table([ROW, ROW | {"seed": 1, "counts": other}])
    assert "seed" not in table.lines[0]
    assert [line[-2:] for line in cells(table)] == [["0.43", "0.50"], ["0.43", "0.20"]]


def test_a_draft_has_one_line_of_what_its_training_took():
    training = tables.tables_of([ROW, ROW | {"temperature": 0.0}, ROW | {"seed": 1}])[0]
    assert [line["seed"] for line in training.lines] == ["0", "1"]
    assert "What training took" not in tables.terminal_text([base_row()])


def test_each_protocol_is_said_once_with_all_its_seeds():
    rows = [ROW, ROW | {"seed": 2}, ROW | {"task": "mbpp"}]
    text = tables.terminal_text(rows)
    assert text.count("Protocol of gsm8k") == text.count("Protocol of mbpp") == 1
    assert text.count("seed 0, 2.") == 2


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
    table = tables.acceptance_table(rows)
    assert list(table.lines[0])[-2:] == ["speed-up", "paper"]
    assert [line["paper"] for line in table.lines] == ["0.626", ""]
    assert list(tables.acceptance_table([ROW]).lines[0])[-1] == "speed-up"


# A terminal


def test_a_table_for_a_terminal():
    lines = [{"draft": "a b", "n": "9", "share": "never"}, {"draft": "c", "n": "10", "share": ""}]
    table = tables.Table("title", lines)
    assert tables.align(table) == ["draft   n  share", "a b     9  never", "c      10"]
    drafts = [{"draft": "AdaSPEC k=0.2 gap=tvd", "n": "1"}, {"draft": "base", "n": "2"}]
    lines = tables.align(tables.Table("", drafts), 17)
    assert lines == ["draft           n", "AdaSPEC k=0.2   1", "gap=tvd", "base            2"]


def test_what_all_rows_share_is_in_the_heading():
    text = tables.terminal_text([ROW, base_row(temperature=0.0)])
    assert "\ngsm8k, tiny, seed 0, gamma 5, at most 12 new tokens, float32\n" in text
    assert "\nT  draft    alpha (95% interval)   tau" in text
    text = tables.terminal_text([ROW, ROW | {"seed": 1}])
    assert "\ngsm8k, tiny, gamma 5, at most" in text and "\nseed  T  draft    alpha (95" in text


def test_dtypes_have_tables_of_their_own():
    """Else a verdict took the mean of their speed-ups, as if they were seeds."""
    rows = [base_row(), base_row() | {"dtype": "bfloat16", "speedup": 9.0}]
    text = tables.terminal_text(rows)
    assert "12 new tokens, float32\n" in text and "12 new tokens, bfloat16\n" in text
    assert text.count("\nbase ") == 2


def test_lines_fit_a_terminal_of_100_columns():
    """Issue 14.13: the table of ten columns wrapped."""
    row = ROW | {"task": "cnn_dailymail", "pair": "tiny-wide", "draft": "DistillSpec", "seed": 10}
    row |= {"tau": 11.0, "speedup": 10.0, "steps": 100_000, "loss_tokens": 10**9}
    counts = {"rounds": 9, "per_position": [[1] * 12, [9] * 12], "accepted": 12, "rejected": 96}
    rows = [row | {"counts": counts}, row | {"seed": 11}, row | {"pair": "pythia"}]
    rows += [row | {"task": "xsum", "draft": "AdaSPEC k=0.2 gap=tvd select=bottom epochs=4"}]
    text = tables.terminal_text(rows)
    assert max(map(len, text.splitlines())) <= 100
    assert "DistillSpec  judged" in text


# Verdicts


def test_verdicts():
    (line,) = tables.verdicts([ROW], "this machine")
    assert line.startswith(
        "AdaSPEC pays on this machine: 1.24x at T = 1, measured at gamma 5. Best predicted: 1.50x "
        "at T = 1 (gamma 2); such a draft pays from an acceptance of 0."
    )
    slow = ROW | {"temperature": 0.0, "tau_by_gamma": {"1": 1.1, "2": 1.1, "3": 1.0}, "gamma": 2}
    slow["speedup"] = 0.7
    (line,) = tables.verdicts([slow, ROW | {"gamma": 2}], "M")
    assert line.startswith(
        "AdaSPEC pays on M at T = 1 alone: 0.70x at T = 0 (predicted 0.69x), 1.24x at T = 1 "
        "(predicted 1.50x), measured at gamma 2. Best predicted: 0.88x at T = 0 (gamma 1), 1.50x at"
    )
    (line,) = tables.verdicts([slow | {"cost_ratio": 3.0}], "M")
    assert line.startswith("AdaSPEC does not pay on M: 0.70x at T = 0 (predicted 0.15x), measured")
    assert line.endswith("0.28x at T = 0 (gamma 1); such a draft pays at no acceptance.")


def test_what_is_measured_counts_for_more_than_what_is_predicted():
    """A prediction leaves the loop out: what gained by it alone was said to pay."""
    (line,) = tables.verdicts([ROW | {"speedup": 0.9}], "M")
    assert line.startswith(
        "AdaSPEC may pay on M: 0.90x at T = 1, measured at gamma 5. Best predicted: 1.50x at T = 1 "
        "(gamma 2);"
    )
    slow = {"temperature": 0.0, "tau_by_gamma": {"1": 1.1, "2": 1.1, "3": 1.0}, "speedup": 1.1}
    (line,) = tables.verdicts([ROW | slow, ROW | {"speedup": 0.9}], "M")
    assert line.startswith("AdaSPEC pays on M at T = 0 alone: 1.10x at T = 0, 0.90x at T = 1, meas")


def test_a_verdict_is_of_the_mean_over_seeds_and_of_each_task():
    other = ROW | {"seed": 1, "tau_by_gamma": {"1": 1.8, "2": 2.0, "3": 2.7}, "speedup": 1.0}
    lines = tables.verdicts([ROW, other, ROW | {"task": "mbpp"}], "M")
    # means 1.44, (1.5 + 1.25) / 2, 1.35
    assert lines[0].startswith("gsm8k: AdaSPEC pays on M: 1.12x at T = 1, measured at gamma 5.")
    assert "Best predicted: 1.44x at T = 1 (gamma 1)" in lines[0]
    assert lines[1].startswith("mbpp: AdaSPEC pays on M: 1.24x")


def test_a_head_without_costs_has_the_measured_verdict():
    head = ROW | {"draft": "EAGLE", "cost_ratio": None, "speedup": 0.9}
    del head["tau_by_gamma"]
    (line,) = tables.verdicts([head], "M")
    assert line == (
        "EAGLE does not pay on M: 0.90x at T = 1, measured at gamma 5; the costs of other gammas "
        "are not known."
    )
    assert not any(table.title.startswith("Speed-up") for table in tables.tables_of([head]))


# Means over seeds


def test_means_over_seeds_are_paired_by_seed():
    """Gains of 0.01, 0.02, 0.03 have mean 0.02 and half width 4.303 x 0.01 / sqrt(3) = 0.025."""
    rows = []
    for seed, (uniform, selected) in enumerate([(0.50, 0.51), (0.60, 0.62), (0.70, 0.73)]):
        for draft, alpha in (("DistillSpec", uniform), ("AdaSPEC", selected)):
            values = {"draft": draft, "alpha": alpha, "expected_acceptance": alpha / 2}
            rows.append(ROW | values | {"seed": seed})
    alpha, expected = tables.over_seeds(rows[::-1])
    uniform = ["gsm8k", "tiny", "1", "DistillSpec", "0.600 (0.352 to 0.848)", ""]
    assert uniform in cells(alpha)
    assert cells(alpha)[0][3:] == ["AdaSPEC", "0.620 (0.347 to 0.893)", "+0.020 (-0.005 to +0.045)"]
    assert cells(expected)[0][4:] == ["0.310 (0.173 to 0.447)", "+0.010 (-0.002 to +0.022)"]
    assert alpha.title.startswith("Means over 3 seeds, alpha")
    alone = tables.over_seeds([ROW, ROW | {"seed": 1}])[0]
    assert list(alone.lines[0])[-1] == "mean", "no gains without DistillSpec"


def test_means_need_2_to_10_seeds():
    assert tables.over_seeds([ROW]) == []
    assert tables.over_seeds([ROW | {"seed": seed} for seed in range(11)]) == []
    assert len(tables.over_seeds([ROW | {"seed": seed} for seed in range(10)])) == 2


def test_a_gain_is_over_distillspec_of_the_same_cell():
    drafts = {"DistillSpec": 0.5, "AdaSPEC": 0.7}
    rows = [
        ROW | {"task": task, "seed": seed, "draft": draft, "alpha": alpha + 0.1 * seed}
        for task, labels in (("gsm8k", drafts), ("mbpp", ["AdaSPEC"]))
        for draft, alpha in drafts.items()
        if draft in labels
        for seed in (0, 1)
    ]
    lines = tables.over_seeds(rows)[0].lines
    assert [line["over DistillSpec"] for line in lines] == ["", "+0.200 (+0.200 to +0.200)", ""]


def test_drafts_of_one_label_are_told_apart():
    """Those of other settings have other folders; seeds, and rows of studies, are as they were."""
    names = {"folder": "adaspec", "target": "T"}
    usual = [ROW | names | {"seed": seed, "temperature": t} for seed in (0, 1) for t in (0.0, 1.0)]
    assert tables.told_apart(usual) == usual and tables.told_apart([ROW, ROW]) == [ROW, ROW]
    beside = [ROW | names | {"folder": "adaspec-0a"}, base_row(**names), base_row(target="T2")]
    assert [row["draft"] for row in tables.told_apart([*usual, *beside])] == [
        "AdaSPEC (adaspec of T)", "AdaSPEC (adaspec of T)", "AdaSPEC", "AdaSPEC",
        "AdaSPEC (adaspec-0a of T)", "base (adaspec of T)", "base (None of T2)",
    ]  # fmt: skip


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
