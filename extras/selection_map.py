"""The map of a study of passes (the comparison "passes" of extras.ablations): what AdaSPEC's
selection gains over DistillSpec as training goes on, for drafts of several sizes.

    python -m extras.selection_map results/passes-tiny*.json results/figures/selection-map.png

AdaSPEC with a draft of n passes, and a reference of n besides, is compared with DistillSpec twice:
at equal passes of the draft (n), and at equal passes in all (2 n). docs/results.md opens with it.
"""

import re
import statistics
from pathlib import Path
from typing import NamedTuple

from cli import Parser, run_command
from extras.ceiling import variant_table
from extras.figures import COLOURS, MARKERS, distinct, draw_points, new_figure, save_figure
from extras.studies import gains, load_json, load_run, rows_by_draft
from tables import grid, interval, mean_interval

COMPARED = {"equal passes of the draft": 1, "equal passes in all": 2}


CONTROLS = {  # labels of the comparison "controls", in words
    "DistillSpec": "all tokens",
    "AdaSPEC": "top 40% by the gap (AdaSPEC)",
    "AdaSPEC select=random": "random 40%",
    "AdaSPEC select=loss": "top 40% by the draft's loss alone",
    "AdaSPEC select=disagree": "40%, argmaxes that differ first",
    "AdaSPEC select=agree": "40%, argmaxes that agree first",
    "AdaSPEC select=bottom": "bottom 40% by the gap",
    "AdaSPEC select=flat": "40% of the largest target entropy",
    "AdaSPEC select=peaked": "40% of the smallest target entropy",
}


LEGEND = """\
## Where selection wins: the map

AdaSPEC learns from the 40% of the tokens with the largest gap between its loss and that of a
reference, DistillSpec from all of them. Each number below is what the first has over the second (or
over another choice of tokens) in acceptance, alpha; positive: selection wins. Brackets: 95%
intervals over seeds, paired. One small target, trained from scratch on gsm8k, and drafts of one
layer: the paper's pairs were not run, and the map says nothing of what lies beyond its edges."""
MAP = """\
### Across passes and capacity

![AdaSPEC's gain over DistillSpec](../results/figures/selection-map.png)"""


class Point(NamedTuple):
    """AdaSPEC's gain over DistillSpec in alpha."""

    passes: int  # of AdaSPEC's draft
    gains: list[float]  # one value a seed


def selection_map(rows: list[dict]) -> dict[tuple, list[Point]]:
    """(pair, temperature, comparison of COMPARED) -> its points, by passes."""
    groups = rows_by_draft(rows)
    lines = {}
    for (pair, draft), by_temperature in groups.items():
        match = re.fullmatch(r"AdaSPEC epochs=(\d+) reference_epochs=\1", draft)
        if not match:
            continue
        passes = int(match[1])
        for compared, times in COMPARED.items():
            baseline = groups.get((pair, f"DistillSpec epochs={times * passes}"))
            for temperature, own_rows in by_temperature.items():
                if baseline:
                    point = Point(passes, gains(own_rows, baseline[temperature]))
                    lines.setdefault((pair, temperature, compared), []).append(point)
    order = list(COMPARED)
    keys = sorted(lines, key=lambda key: (width(key[0]), *key[:2], order.index(key[2])))
    return {key: sorted(lines[key]) for key in keys}


def width(pair: str) -> int:
    """The draft's, of a pair such as tiny-16, or a custom one of a folder tiny-16. Raises
    ValueError for others."""
    match = re.search(r"tiny-(\d+)", pair)
    if not match:
        raise ValueError(f"pair {pair}: the map is of drafts named tiny-<width>")
    return int(match[1])


def map_table(rows: list[dict]) -> list[str]:
    """The map as lines of Markdown: a line a draft and comparison, a column a number of passes."""
    lines = selection_map(rows)
    passes = sorted({point.passes for points in lines.values() for point in points})
    cells = []
    for (pair, temperature, compared), points in lines.items():
        by_passes = {point.passes: interval(point.gains) for point in points}
        values = [by_passes.get(n, "") for n in passes]
        cells.append(" | ".join([f"{width(pair)} wide", f"{temperature:g}", compared, *values]))
    return grid(" | ".join(["draft", "T", "at", *(f"{n} passes" for n in passes)]), cells)


def controls_table(rows: list[dict]) -> list[str]:
    """A line a size and control: alpha, and its gains over DistillSpec (all tokens) and over random
    tokens, paired by seed."""
    groups = rows_by_draft(rows)
    temperatures = distinct(rows, "temperature")
    headings = "draft | selected"
    for temperature in temperatures:
        headings += f" | alpha, T = {temperature:g} | over all tokens | over random"
    trained = [key for key in groups if key[1] != "base"]
    order = list(CONTROLS)
    lines = []
    for pair, draft in sorted(trained, key=lambda key: (width(key[0]), order.index(key[1]))):
        cells = [f"{width(pair)} wide", CONTROLS[draft]]
        for temperature in temperatures:
            own = groups[pair, draft][temperature]
            cells.append(f"{statistics.mean(row['alpha'] for row in own):.3f}")
            for baseline in ("DistillSpec", "AdaSPEC select=random"):
                gain = gains(own, groups[pair, baseline][temperature])
                cells.append("" if draft == baseline else interval(gain))
        lines.append(" | ".join(cells))
    return grid(headings, lines)


OPENING = (  # files of results/, heading, table of their rows
    ("passes-tiny*.json", MAP, lambda studies: map_table(all_rows(studies))),
    ("controls-tiny.json", "### The controls", lambda studies: controls_table(all_rows(studies))),
    ("ceiling-tiny.json", "### The ceiling", lambda studies: variant_table(studies[0]["variants"])),
)


def all_rows(studies: list[dict]) -> list[dict]:
    return [row for study in studies for row in study["rows"]]


def opening(folder: Path) -> list[str]:
    """The parts of docs/results.md that come first: the map, the controls, the ceiling, as far as
    `folder` has their files. What they show is each file's note."""
    parts = []
    for pattern, heading, table in OPENING:
        paths = sorted(folder.glob(pattern), key=lambda path: path.stem)
        studies = [load_json(path) for path in paths]
        if studies:
            notes = [study["note"] for study in studies]
            parts += [heading, *notes, "\n".join(table(studies))]
    return [LEGEND, *parts] if parts else []


def note(path: Path, study: dict) -> str:
    """What the study shows, or where it is said."""
    if any(path.match(pattern) for pattern, _, _ in OPENING):
        return "What it shows: [above](#where-selection-wins-the-map)."
    return study["note"]


def draw_map(rows: list[dict], path: Path) -> None:
    """A panel a temperature and comparison, a line a draft, and the zero line. Raises ValueError
    for one seed, which has no interval."""
    if len(distinct(rows, "seed")) < 2:
        raise ValueError("the map has intervals over seeds: give a study of two or more")
    temperatures = distinct(rows, "temperature")
    figure = new_figure(figsize=(9, 7))
    options = {"sharex": True, "sharey": True, "squeeze": False}
    panels = figure.subplots(len(temperatures), len(COMPARED), **options)
    lines = selection_map(rows)
    pairs = list(dict.fromkeys(pair for pair, _, _ in lines))
    for (pair, temperature, compared), points in lines.items():
        panel = panels[temperatures.index(temperature), list(COMPARED).index(compared)]
        panel.set_title(f"T = {temperature:g}, {compared}")
        place = pairs.index(pair)
        style = {"color": COLOURS[place], "marker": MARKERS[place]}
        style["label"] = f"draft {width(pair)} wide"
        values = [(point.passes, *mean_interval(point.gains)) for point in points]
        draw_points(panel, values, style, linestyle="-")
    ticks = sorted({point.passes for points in lines.values() for point in points})
    for panel in panels.flat:
        panel.set_xscale("log")
        panel.set_xticks(ticks, ticks)
        panel.minorticks_off()
        panel.axhline(0, color="#555555", linewidth=1)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("AdaSPEC's alpha - DistillSpec's")
    for panel in panels[-1]:
        panel.set_xlabel("passes of AdaSPEC's draft over the rows")
    save_figure(figure, path)


def main(argv=None) -> None:
    parser = Parser(prog="extras.selection_map", description=__doc__)
    parser.add_argument("studies", nargs="+", help="results/NAME.json, or results.json of runs")
    parser.add_argument("figure", type=Path, help="the PNG file to write")
    args = parser.parse_args(argv)
    draw_map(all_rows([load_run(path) for path in args.studies]), args.figure)


if __name__ == "__main__":
    run_command(main, "extras.selection_map")
