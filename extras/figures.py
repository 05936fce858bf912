"""Figures of a run, with matplotlib: what `python -m extras.report figures` and `history` draw.

Alpha by task, by k and by epochs; tau and speed-up by gamma; acceptance by draft position; token
pictures (records of `extras.analysis.picture`); and loss and alpha by step, as drafts learn.
"""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from costs import predicted_speedups
from speculative import Stats
from storage import HISTORY
from tables import T_QUANTILE, mean_interval, told_apart

# Okabe and Ito's palette: told apart by the colour-blind too
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #B8A000".split()
MARKERS = "osD^vPX*"
SWEPT = re.compile(r" (k|epochs)=([\d.]+)")  # what of a draft's label is a figure's axis
ALPHA = "acceptance rate alpha"
GAMMA = "gamma, tokens drafted a round"
MOST_SEEDS = len(T_QUANTILE) + 1


def figures(rows: list[dict], folder, pictures=()) -> list[Path]:
    """Draw what the rows of a results.json can give, for each pair, and the pictures, into PNG
    files of a folder; returns the files.

    Raises ValueError where matplotlib is not installed.
    """
    new_figure()
    rows = told_apart(rows)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for pair in distinct(rows, "pair"):
        for name, kind in KINDS.items():
            chosen = kind.select([row for row in rows if row["pair"] == pair])
            if chosen:
                files.append(folder / f"{pair}-{name}.png")
                draw_rows(chosen, kind, files[-1])
    for record in pictures:
        files.append(folder / "{pair}-{task}-seed{seed}-picture.png".format(**record))
        draw_picture(record, files[-1])
    return files


def new_figure(**settings):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("figures need matplotlib: pip install matplotlib") from None
    return Figure(layout="constrained", **settings)


def save_figure(figure, path: Path) -> None:
    """With one legend of all panels below them, in as many columns as there is room for."""
    handles = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = max(1, min(4, 130 // (8 + max(map(len, handles)))))
    where = {"loc": "outside lower center", "frameon": False, "fontsize": 9}
    figure.legend(handles.values(), handles, ncols=columns, **where)
    figure.savefig(path, dpi=150)


def draw_rows(rows: list[dict], kind: "Kind", path: Path) -> None:
    """A panel a temperature, a colour and marker a draft."""
    drafts = list(dict.fromkeys(row["draft"] for row in rows))
    styles = {}
    for i, draft in enumerate(drafts):
        marker = MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]
        styles[draft] = {"color": COLOURS[i % len(COLOURS)], "marker": marker, "label": draft}
    figure = new_figure(figsize=(9, 4))
    temperatures = distinct(rows, "temperature")
    for i, temperature in enumerate(temperatures):
        first = figure.axes[0] if i else None
        panel = figure.add_subplot(1, len(temperatures), i + 1, sharey=first)
        panel.set(title=f"{rows[0]['pair']}, temperature {temperature:g}", xlabel=kind.x_label)
        if i == 0:
            panel.set_ylabel(kind.y_label)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#DDDDDD")
        by_draft = {}
        for row in rows:
            if row["temperature"] == temperature:
                by_draft.setdefault(row["draft"], []).append(row)
        kind.draw(panel, by_draft, styles)
    save_figure(figure, path)


# Panels: draw(panel, draft -> its rows at one temperature, draft -> line style)


def draw_alpha(panel, by_draft, styles) -> None:
    """Alpha by task, the drafts side by side, with error bars."""
    tasks = distinct([row for rows in by_draft.values() for row in rows], "task")
    panel.set_xticks(range(len(tasks)), tasks, fontsize=8)
    panel.set_xlim(-0.6, len(tasks) - 0.4)
    step = min(0.15, 0.7 / len(by_draft))
    for i, (draft, rows) in enumerate(by_draft.items()):
        points = []
        for x, task in enumerate(tasks):
            own = [row for row in rows if row["task"] == task]
            if own:
                points.append((x + (i + 0.5 - len(by_draft) / 2) * step, *alpha_interval(own)))
        draw_points(panel, points, styles[draft])


def draw_k(panel, by_draft, styles) -> None:
    draw_sweep("k", panel, by_draft, styles)


def draw_epochs(panel, by_draft, styles) -> None:
    draw_sweep("epochs", panel, by_draft, styles)


def draw_sweep(key: str, panel, by_draft, styles) -> None:
    """Alpha against a number of the draft's label (AdaSPEC without a k: the usual 0.4), and
    DistillSpec's alpha as a level."""
    lines = {}
    for draft, rows in by_draft.items():
        if draft == "DistillSpec":
            level = alpha_interval(rows)[0]
            panel.axhline(level, color="#555555", linestyle="--", linewidth=1, label=draft)
            continue
        setting = re.search(f" {key}=([0-9.]+)", draft)
        value = float(setting[1]) if setting else 0.4
        label = draft.replace(setting[0], "") if setting else draft
        lines.setdefault(label, []).append((value, *alpha_interval(rows)))
    for style, (label, points) in zip(styles.values(), lines.items(), strict=False):
        draw_points(panel, sorted(points), style | {"label": label}, linestyle="-")
    panel.set_xticks(sorted({point[0] for points in lines.values() for point in points}))


def draw_tau(panel, by_draft, styles) -> None:
    """Tokens per target call by gamma: simulated, by the paper's formula (Eq. 4), measured."""
    panel.plot([], [], color="#555555", linestyle="-", label="simulated")
    panel.plot([], [], color="#555555", linestyle=":", label="i.i.d. formula")
    for draft, rows in by_draft.items():
        colour = styles[draft]["color"]
        gammas = [int(gamma) for gamma in rows[0]["tau_by_gamma"]]
        simulated, formula = [], []
        for gamma in gammas:
            simulated.append(statistics.mean(row["tau_by_gamma"][str(gamma)] for row in rows))
            formula.append(statistics.mean(stats_of(row).predicted_tau(gamma) for row in rows))
        panel.plot(gammas, simulated, color=colour)
        panel.plot(gammas, formula, color=colour, linestyle=":")
        tau = statistics.mean(row["tau"] for row in rows)
        panel.plot(rows[0]["gamma"], tau, **measured(styles[draft]))


def draw_speedup(panel, by_draft, styles) -> None:
    """Speed-up over the target alone by gamma: predicted by costs, and measured."""
    panel.axhline(1, color="#888888", linewidth=0.8)
    panel.plot([], [], color="#555555", label="predicted: tau / (gamma c + v)")
    for draft, rows in by_draft.items():
        predictions = [predicted_speedups(row) for row in rows]
        gammas = list(predictions[0])
        means = [statistics.mean(each[gamma] for each in predictions) for gamma in gammas]
        panel.plot(gammas, means, color=styles[draft]["color"])
        timed = [row.get("speedup_by_gamma", {row["gamma"]: row["speedup"]}) for row in rows]
        means = [statistics.mean(each[gamma] for each in timed) for gamma in timed[0]]
        panel.plot([int(gamma) for gamma in timed[0]], means, **measured(styles[draft]))


def draw_positions(panel, by_draft, styles) -> None:
    """The share of judged drafts that was accepted, by their place in the round."""
    for draft, rows in by_draft.items():
        accepted, judged = [], []
        for row in rows:
            add_to(accepted, row["counts"]["per_position"][0])
            add_to(judged, row["counts"]["per_position"][1])
        positions = range(1, len(judged) + 1)
        shares = [a / b for a, b in zip(accepted, judged, strict=True)]
        panel.plot(positions, shares, **styles[draft])
        panel.set_xticks(positions)


def add_to(totals: list[int], counts: list[int]) -> None:
    """Add counts by place to totals, which grow as needed."""
    totals.extend([0] * (len(counts) - len(totals)))
    for i, count in enumerate(counts):
        totals[i] += count


def stats_of(row: dict) -> Stats:
    return Stats(accepted=row["counts"]["accepted"], rejected=row["counts"]["rejected"])


def measured(style: dict) -> dict:
    return style | {"label": f"{style['label']}, measured", "linestyle": ""}


def alpha_interval(rows: list[dict]) -> tuple[float, float, float]:
    """Alpha (a mean over tasks and seeds) and the ends of its 95% interval: over seeds, or of a
    single row over prompts."""
    alphas = []
    for seed in distinct(rows, "seed"):
        alphas.append(statistics.mean(row["alpha"] for row in rows if row["seed"] == seed))
    if 2 <= len(alphas) <= MOST_SEEDS:
        return mean_interval(alphas)
    low, high = rows[0]["alpha_interval"] if len(rows) == 1 else (alphas[0], alphas[0])
    return alphas[0], low, high


def draw_points(panel, points, style, linestyle="") -> None:
    """Points (x, mean, low, high) with error bars."""
    xs, means, lows, highs = zip(*points, strict=True)
    below = [mean - low for mean, low in zip(means, lows, strict=True)]
    above = [high - mean for mean, high in zip(means, highs, strict=True)]
    bars = {"markersize": 5, "capsize": 2, "elinewidth": 1, "linestyle": linestyle}
    panel.errorbar(xs, means, [below, above], **style, **bars)


# Which rows a figure is of


def distinct(rows: list[dict], key: str) -> list:
    """The values of a key, each once, in order."""
    return sorted({row[key] for row in rows if row.get(key) is not None})


def plain(rows: list[dict]) -> list[dict]:
    return [row for row in rows if not SWEPT.search(row["draft"])]


def k_sweep(rows: list[dict]) -> list[dict]:
    """Drafts with a k in their label and, where there are any, what they are compared with."""
    swept = [row for row in rows if " k=" in row["draft"]]
    usual = [row for row in rows if row["draft"] in ("DistillSpec", "AdaSPEC")]
    return swept + usual if swept else []


def epochs_sweep(rows: list[dict]) -> list[dict]:
    return [row for row in rows if " epochs=" in row["draft"]]


def with_costs(rows: list[dict]) -> list[dict]:
    return [row for row in plain(rows) if predicted_speedups(row)]


class Kind(NamedTuple):
    select: Callable
    draw: Callable
    x_label: str
    y_label: str


KINDS = {
    "alpha": Kind(plain, draw_alpha, "task", ALPHA),
    "k": Kind(k_sweep, draw_k, "k, the fraction of tokens kept", ALPHA),
    "epochs": Kind(epochs_sweep, draw_epochs, "epochs of the draft", ALPHA),
    "tau": Kind(with_costs, draw_tau, GAMMA, "tau, tokens per target call"),
    "speedup": Kind(with_costs, draw_speedup, GAMMA, "speed-up over the target alone"),
    "positions": Kind(plain, draw_positions, "position in the round's drafts", "accepted / judged"),
}


# Token pictures

ORIGINS = {
    "accepted": ("#BFE0F2", "accepted draft"),
    "corrected": ("#F6C98E", "target's, after a rejected draft"),
    "bonus": ("#E4E4E4", "target's, after accepted drafts only"),
}


def draw_picture(record: dict, path: Path, width: int = 100) -> None:
    """Tokens as boxes, coloured by origin, underlined where selected; `width` characters a line."""
    figure = new_figure()
    panel = figure.subplots()
    underline = {"color": "black", "linewidth": 1.8, "solid_capstyle": "butt"}
    for colour, label in ORIGINS.values():
        panel.fill([], [], color=colour, label=label)
    panel.plot([], [], label=f"selected by AdaSPEC's filter, k = {record['k']:g}", **underline)
    tokens = record["tokens"]
    x, y = 0.0, 0
    for text, origin, selected in zip(tokens, record["origins"], record["selected"], strict=True):
        shown = text.replace("\n", "\u21b5")
        shown = "".join(c if c.isprintable() else "\u00b7" for c in shown)
        size = len(shown) + 0.8
        if x + size > width:
            x, y = 0.0, y + 1
        ends = (x, x + size - 0.25)
        panel.fill_between(ends, y + 0.1, y + 0.8, color=ORIGINS[origin][0], linewidth=0)
        font = {"family": "monospace", "fontsize": 9.5, "ha": "center", "va": "center"}
        panel.text(sum(ends) / 2, y + 0.45, shown, parse_math=False, **font)
        if selected:
            panel.plot(ends, [y + 0.87] * 2, **underline)
        x, y = (0.0, y + 1) if "\n" in text else (x + size, y)
    figure.set_size_inches(10, 0.3 * (y + 1) + 0.9)
    panel.set(xlim=(0, width), ylim=(y + 1, 0))
    panel.axis("off")
    accepted = record["origins"].count("accepted")
    title = (
        "{task}, {split} prompt {prompt}, decoded with the draft {draft}, gamma {gamma}, "
        "temperature 0: ".format(**record)
    )
    title += f"{accepted} of {len(tokens)} tokens are accepted drafts"
    panel.set_title(title, fontsize=10)
    save_figure(figure, path)


# Histories of training


def histories(runs, folder) -> list[Path]:
    """Draw loss and validation alpha by step into PNG files of a folder, one for each pair and task
    under `runs` (the --out of a run, finished or not); returns the files.

    Raises ValueError where there is no history, or no matplotlib.
    """
    new_figure()
    by_task = {}  # (pair, task) -> stage -> the lines of each seed
    for path in sorted(Path(runs).glob(f"*/*/seed*/*/{HISTORY}")):
        pair, task = path.parts[-5:-3]
        stage = path.parent.name.removesuffix(".checkpoints")  # where it is while it is trained
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        by_task.setdefault((pair, task), {}).setdefault(stage, []).append(lines)
    if not by_task:
        raise ValueError(
            f"{runs} has no <pair>/<task>/seed<n>/<stage>/{HISTORY}; give the --out folder of a run"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for (pair, task), stages in by_task.items():
        files.append(folder / f"{pair}-{task}-history.png")
        draw_history(f"{pair}, {task}", stages, files[-1])
    return files


def draw_history(title: str, stages: dict[str, list], path: Path) -> None:
    """Two panels; a colour a draft (a stage, where alpha was watched of none), a line a seed."""
    drafts = {name: seeds for name, seeds in stages.items() if series(seeds[0], "alpha")[0]}
    figure = new_figure(figsize=(9, 4))
    losses, alphas = figure.subplots(1, 2)
    losses.set(title=title, xlabel="step", ylabel="training loss", yscale="log")
    alphas.set(title="validation rows", xlabel="step", ylabel="expected acceptance alpha")
    for i, (name, seeds) in enumerate((drafts or stages).items()):
        selected = any(line.get("selected", 1) < 1 for line in seeds[0])
        label = f"{name} (its loss: of selected tokens)" if selected else name
        style = {"color": COLOURS[i % len(COLOURS)], "label": label}
        for lines in seeds:
            losses.plot(*series(lines, "loss"), **style, linewidth=1)
            alphas.plot(*series(lines, "alpha"), **style, marker=".")
    for panel in (losses, alphas):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#DDDDDD")
    save_figure(figure, path)


def series(lines: list[dict], key: str) -> tuple[list, list]:
    """Steps, and the values of a key at those lines of a history that have it."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in points], [value for _, value in points]
