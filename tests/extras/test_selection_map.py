"""The map of gains, recomputed by hand."""

import json

import pytest

from extras import selection_map

# draft -> alpha by seed, of a pair whose draft is 16 wide; at temperature 1 0.1 more
ALPHAS = {
    "base": [0.1, 0.1, 0.1],
    "DistillSpec epochs=3": [0.50, 0.60, 0.70],
    "AdaSPEC epochs=3 reference_epochs=3": [0.51, 0.62, 0.73],
    "DistillSpec epochs=6": [0.55, 0.65, 0.75],
    "AdaSPEC epochs=6 reference_epochs=6": [0.54, 0.64, 0.74],
}


def make_rows(alphas, pair="custom-target-tiny-16-0a1b2c3d"):
    rows = []
    for draft, by_seed in alphas.items():
        for seed, alpha in enumerate(by_seed):
            for temperature in (0.0, 1.0):
                row = {"pair": pair, "task": "gsm8k", "seed": seed, "temperature": temperature}
                rows.append(row | {"draft": draft, "alpha": alpha + 0.1 * temperature})
    return rows


def test_gains_at_equal_passes_of_the_draft_and_in_all():
    shuffled = dict(sorted(ALPHAS.items(), reverse=True))
    lines = selection_map.selection_map(make_rows(shuffled))
    draft, total = selection_map.COMPARED
    pair = make_rows(ALPHAS)[0]["pair"]
    assert list(lines) == [(pair, t, each) for t in (0, 1) for each in (draft, total)]
    assert [point.passes for point in lines[pair, 0, draft]] == [3, 6]
    assert lines[pair, 0, draft][0].gains == pytest.approx([0.01, 0.02, 0.03])
    assert lines[pair, 1, draft][1].gains == pytest.approx([-0.01] * 3)
    (only,) = lines[pair, 1, total]  # there is no DistillSpec of 12 passes
    assert only.gains == pytest.approx([-0.04, -0.03, -0.02])
    table = selection_map.map_table(make_rows(ALPHAS))
    assert table[0] == "| draft | T | at | 3 passes | 6 passes |"
    assert table[2] == (
        f"| 16 wide | 0 | {draft} | +0.020 (-0.005 to +0.045) | -0.010 (-0.010 to -0.010) |"
    )


def test_controls_stand_beside_all_tokens_and_random_ones():
    alphas = {"base": [0.1, 0.1], "DistillSpec": [0.6, 0.7], "AdaSPEC": [0.62, 0.70]}
    rows = make_rows(alphas | {"AdaSPEC select=random": [0.61, 0.71]})
    lines = selection_map.controls_table(rows)
    assert len(lines) == 5 and "all tokens" in lines[2]
    cells = lines[3].strip("| ").split(" | ")
    assert cells[:3] == ["16 wide", "top 40% by the gap (AdaSPEC)", "0.660"]
    assert cells[3].startswith("+0.010 (") and cells[4].startswith("+0.000 (")


def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = make_rows(ALPHAS) + make_rows(ALPHAS, pair="custom-target-tiny-64-0a1b2c3d")
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    selection_map.main([str(tmp_path / "results.json"), str(tmp_path / "map.png")])
    assert (tmp_path / "map.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="give a study of two or more"):
        selection_map.draw_map([row for row in rows if row["seed"] == 0], tmp_path / "one.png")


def test_other_pairs_are_refused():
    with pytest.raises(ValueError, match="pair tiny: the map is of drafts named tiny-<width>"):
        selection_map.map_table(make_rows(ALPHAS, pair="tiny"))
