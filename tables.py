"""Tables of a run's rows: acceptance beside the paper's, speed-up and break-even, acceptance by
draft position, what training took, means over seeds. Aligned for a terminal, or as Markdown.
"""

import statistics
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import NamedTuple

from costs import break_even_acceptance, predicted_speedups, recommend
from evaluate import acceptance_by_position
from settings import PAPER_ALPHA
from speculative import Stats

WIDTH = 100  # columns of a terminal
POSITIONS = 8  # of a round's drafts that fit it
LEGEND = (
    "Drafts are a chain, drawn from the draft's distribution at T (at T = 0 its argmax); what a "
    "checkpoint's generation_config sets is applied to neither model. Counts are pooled over "
    "prompts: alpha = accepted / judged, interval by bootstrap over prompts; tau = tokens per "
    "target call. Expected acceptance and argmax agreement are those on the target's own text. "
    "Speed-up: tokens per second over those of the target alone, median over prompts, at the "
    "run's gamma. Predicted: tau / (gamma c + v) at the best gamma; c, a draft step, and v, the "
    "target's scoring of gamma + 1 positions, in target steps. Break-even: the acceptance from "
    "which some gamma is predicted to gain."
)


class Table(NamedTuple):
    title: str
    columns: list[str]
    lines: list[list[str]]  # a cell a column


# Forms


def grid(columns: str, lines) -> list[str]:
    """A Markdown table of a heading and lines whose cells have " | " between them."""
    rule = " | ".join(["---"] * (columns.count("|") + 1))
    return [f"| {line} |" for line in (columns, rule, *lines)]


def markdown(table: Table) -> list[str]:
    return grid(" | ".join(table.columns), map(" | ".join, table.lines))


def align(table: Table, width: int = WIDTH) -> list[str]:
    """The table for a terminal: numbers to the right, two spaces between columns. Where it is wider
    than `width`, the cells of its widest column of words go over several lines."""
    columns = list(zip(table.columns, *table.lines, strict=True))
    widths = [max(map(len, cells)) for cells in columns]
    words = [i for i, cells in enumerate(columns) if not are_numbers(cells[1:])]
    excess = sum(widths) + 2 * (len(widths) - 1) - width
    if words and excess > 0:
        widest = max(words, key=lambda i: widths[i])
        widths[widest] = max(8, widths[widest] - excess)
    lines = []
    for line in (table.columns, *table.lines):
        parts = [textwrap.wrap(cell, size) for cell, size in zip(line, widths, strict=True)]
        for row in zip_longest(*parts, fillvalue=""):
            cells = []
            for i, (cell, size) in enumerate(zip(row, widths, strict=True)):
                cells.append(cell.ljust(size) if i in words else cell.rjust(size))
            lines.append("  ".join(cells).rstrip())
    return lines


def are_numbers(cells: Sequence[str]) -> bool:
    return any(cell[:1] in tuple("+-0123456789") for cell in cells)


# The whole of a run


def terminal_text(rows: list[dict], machine: str = "this machine") -> str:
    """All tables of a run, for a terminal of 100 columns. What is the same in all rows (task, pair,
    seed) is in the heading alone. `machine`: the one that it ran on, in words."""
    parts = [fill(LEGEND)] if rows else []
    for own in comparable(rows):
        shared = {key: row_keys(own[0])[key] for key in ("task", "pair", "seed")}
        for row in own:
            keys = row_keys(row)
            shared = {key: value for key, value in shared.items() if keys[key] == value}
        paragraphs = [heading(own[0], shared), *protocols(own)]
        parts.append("\n".join(map(fill, paragraphs)))
        for table in tables_of(own):
            parts.append("\n".join([fill(table.title), *align(without(table, shared))]))
        parts.append("\n".join(map(fill, verdicts(own, machine))))
    return "\n\n".join(parts)


def markdown_text(rows: list[dict], machine: str) -> str:
    """`terminal_text` as a page of Markdown."""
    parts = ["# Results", LEGEND]
    for own in comparable(rows):
        parts += [f"## {heading(own[0], {'pair': own[0]['pair']})}", *protocols(own)]
        for table in tables_of(own):
            parts += [table.title, "\n".join(markdown(table))]
        parts.append("\n".join(f"- {verdict}" for verdict in verdicts(own, machine)))
    return "\n\n".join(parts) + "\n"


def comparable(rows: list[dict]) -> list[list[dict]]:
    """The rows, apart by pair and by how they were decoded."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["pair"], row["gamma"], row["max_new_tokens"]].append(row)
    return list(groups.values())


def told_apart(rows: list[dict]) -> list[dict]:
    """The rows; drafts of one cell and label that were trained by other settings, or for another
    target, are named by their folders as well."""
    variants = defaultdict(set)  # (cell, label) -> folders of target and draft
    for row in rows:
        label = tuple(row[key] for key in ("pair", "task", "seed", "draft"))
        variants[label].add((row.get("folder"), row.get("target")))
    named = []
    for row in rows:
        label = tuple(row[key] for key in ("pair", "task", "seed", "draft"))
        if len(variants[label]) > 1:
            folders = f"{row.get('folder')} of {row.get('target')}"
            row = row | {"draft": f"{row['draft']} ({folders})"}
        named.append(row)
    return named


def in_order(rows: list[dict]) -> list[dict]:
    """Cell by cell, by temperature, the drafts as `table_order` has them."""
    keys = ("pair", "task", "seed", "temperature")
    return sorted(rows, key=lambda row: (*(row[key] for key in keys), *table_order(row)))


def table_order(row: dict) -> tuple:
    """The base first, then drafts by method."""
    names = ("base", "DistillSpec", "AdaSPEC", "best", "EAGLE")
    method = row.get("draft", "").split(" ")[0]
    return names.index(method) if method in names else len(names), row.get("draft", "")


def heading(row: dict, shared: dict) -> str:
    names = [f"seed {value}" if key == "seed" else value for key, value in shared.items()]
    limits = "gamma {gamma}, at most {max_new_tokens} new tokens".format(**row)
    return ", ".join([*names, limits])


def protocols(rows: list[dict]) -> list[str]:
    """How each task was evaluated, once for all its rows that have it in common."""
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    text = (
        "Protocol of {task}: first {prompts} {split} prompts (speed-up: {timed_prompts}, one by "
        "one), gamma {gamma}, max_new_tokens {max_new_tokens}, {dtype}, {ranks} x {device}, torch "
        "{torch}, seed {seeds}."
    )
    return list(dict.fromkeys(text.format(**row, seeds=seeds) for row in rows))


def tables_of(rows: list[dict]) -> list[Table]:
    trained = [row for row in rows if "steps" in row]
    tables = [training_table(trained)] if trained else []
    tables += [position_table(rows), *over_seeds(rows), acceptance_table(rows)]
    if any(map(predicted_speedups, rows)):
        tables.append(speed_table(rows))
    return tables


def without(table: Table, columns) -> Table:
    """The table less these columns."""
    places = [i for i, column in enumerate(table.columns) if column not in columns]
    lines = [[line[i] for i in places] for line in table.lines]
    return Table(table.title, [table.columns[i] for i in places], lines)


def fill(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


# Tables


def row_keys(row: dict) -> dict[str, str]:
    """The first columns of a row, by their headings."""
    keys = {key: str(row[key]) for key in ("task", "pair", "seed")}
    return keys | {"T": f"{row['temperature']:g}", "draft": row["draft"]}


def make_table(title: str, rows: list[dict], columns: dict[str, Callable]) -> Table:
    """A line a row: its keys, then `columns`, heading -> the cell of a row."""
    lines = []
    for row in rows:
        lines.append([*row_keys(row).values(), *(cell(row) for cell in columns.values())])
    return Table(title, [*row_keys(rows[0]), *columns], lines)


def acceptance_table(rows: list[dict]) -> Table:
    columns = {
        "alpha (95% interval)": (
            "{alpha:.3f} ({alpha_interval[0]:.3f}-{alpha_interval[1]:.3f})".format_map
        ),
        "tau": "{tau:.2f}".format_map,
        "expected": "{expected_acceptance:.3f}".format_map,
        "agree": "{agreement:.3f}".format_map,
        "speed-up": "{speedup:.2f}x".format_map,
    }
    title = "Acceptance:"
    if any(paper_alpha(row) for row in rows):
        columns["paper"] = paper_alpha
        title = "Acceptance, beside the paper's alpha:"
    return make_table(title, rows, columns)


def paper_alpha(row: dict) -> str:
    """The paper's alpha of a row's cell, "" where it has none: it has DistillSpec and AdaSPEC, and
    names no temperature."""
    pairs, drafts = ["pythia", "codegen"], ["DistillSpec", "AdaSPEC"]
    if row["task"] not in PAPER_ALPHA or row["pair"] not in pairs or row["draft"] not in drafts:
        return ""
    cell = PAPER_ALPHA[row["task"]][2 * (row["regime"] == "optimal") + pairs.index(row["pair"])]
    return f"{cell[drafts.index(row['draft'])] / 100:.3f}"


def speed_table(rows: list[dict]) -> Table:
    """Cells of what was not measured are empty: an EAGLE head takes no step alone."""

    def best_gamma(row: dict) -> str:
        speedups = predicted_speedups(row)
        return str(recommend(speedups)) if speedups else ""

    def predicted(row: dict) -> str:
        speedups = predicted_speedups(row)
        return f"{max(speedups.values()):.2f}x" if speedups else ""

    def measured(row: dict) -> str:
        text = f"{row['speedup']:.2f}x"
        if row.get("speedup_interval"):
            low, high = row["speedup_interval"]
            text += f" ({low:.2f}-{high:.2f})"
        return text

    columns = {
        "alpha": "{alpha:.3f}".format_map,
        "speed-up": measured,
        "c": lambda row: f"{row['cost_ratio']:.3f}" if row.get("cost_ratio") else "",
        "best gamma": best_gamma,
        "predicted": predicted,
        "break-even": lambda row: break_even([row]),
    }
    return make_table("Speed-up, measured, and predicted at the best gamma:", rows, columns)


def position_table(rows: list[dict]) -> Table:
    """Two lines a draft: acceptance by draft position, conditional and unconditional, of all its
    seeds together."""
    groups = defaultdict(Stats)
    for row in rows:
        keys = row_keys(row) | {"seed": ""}
        groups[tuple(keys.values())] += Stats(**row["counts"])
    count = min(POSITIONS, max(len(stats.per_position[0]) for stats in groups.values()))
    lines = []
    for keys, stats in groups.items():
        shares = acceptance_by_position(stats)
        for name, values in zip(("judged", "rounds"), shares.values(), strict=True):
            cells = [f"{value:.2f}" for value in values[:count]]
            cells += [""] * (count - len(cells))
            lines.append([*keys, name, *cells])
    title = "Acceptance by draft position, of those judged (conditional) and of all rounds:"
    columns = [*row_keys(rows[0]), "of", *map(str, range(1, count + 1))]
    return without(Table(title, columns, lines), ["seed"])


def training_table(rows: list[dict]) -> Table:
    columns = {
        "epochs": "{epochs:.1f}".format_map,
        "steps": "{steps}".format_map,
        "loss tokens": "{loss_tokens}".format_map,
        "forwards": "{target_forwards}".format_map,
        "seconds": "{seconds:.0f}".format_map,
    }
    title = (
        "What training took, the reference's included (loss tokens: that bore a loss; forwards: "
        "rows that the target was run on, cached ones once):"
    )
    table = without(make_table(title, rows, columns), ["T"])
    return table._replace(lines=list(map(list, dict.fromkeys(map(tuple, table.lines)))))


# Verdicts


def verdicts(rows: list[dict], machine: str) -> list[str]:
    """A line a task and draft: does it pay, by how much, from which acceptance on? By the cost
    model, in the mean over seeds, with what was measured beside it."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["task"], row["draft"]].append(row)
    several = len({task for task, _ in groups}) > 1
    lines = []
    for (task, draft), own in groups.items():
        name = f"{task}: {draft}" if several else draft
        lines.append(f"{name} {verdict(own, machine)}")
    return lines


def verdict(rows: list[dict], machine: str) -> str:
    """What `verdicts` says of a draft's rows, of any temperatures and seeds."""
    by_temperature = defaultdict(list)
    for row in rows:
        by_temperature[f"T = {row['temperature']:g}"].append(row)
    run_gamma = rows[0]["gamma"]
    speedups, parts, checks = {}, [], []
    for name, own in by_temperature.items():
        measured = statistics.mean(row["speedup"] for row in own)
        predictions = mean_predictions(own) or {run_gamma: measured}
        gamma = recommend(predictions)
        speedups[name] = predictions[gamma]
        parts.append(f"{speedups[name]:.2f}x at {name} (gamma {gamma})")
        check = f"{measured:.2f}x"
        if run_gamma in predictions:
            check += f" (predicted {predictions[run_gamma]:.2f}x)"
        checks.append(check)
    gaining = [name for name, speedup in speedups.items() if speedup > 1]
    answer = f"pays on {machine}" if gaining else f"does not pay on {machine}"
    if 0 < len(gaining) < len(speedups):
        answer += f" at {', '.join(gaining)} alone"
    text = f"{answer}: {', '.join(parts)}"
    acceptance = break_even(rows)
    if not acceptance:
        return f"{text}, as measured; the costs of other gammas are not known."
    where = "at no acceptance"
    if acceptance != "never":
        where = f"from an acceptance of {acceptance} on"
    return f"{text}; it would {where}. Measured at gamma {run_gamma}: {', '.join(checks)}."


def mean_predictions(rows: list[dict]) -> dict[int, float]:
    """`predicted_speedups`, the mean over rows; {} where one has none."""
    predictions = [predicted_speedups(row) for row in rows]
    if not all(predictions):
        return {}
    return {gamma: statistics.mean(row[gamma] for row in predictions) for gamma in predictions[0]}


def break_even(rows: list[dict]) -> str:
    """`break_even_acceptance` at the rows' mean costs; "" where one has none."""
    if not mean_predictions(rows):
        return ""
    c = statistics.mean(row["cost_ratio"] for row in rows)
    scoring = {}
    for gamma in rows[0]["scoring_ratio"]:
        scoring[gamma] = statistics.mean(row["scoring_ratio"][gamma] for row in rows)
    acceptance = break_even_acceptance(c, scoring)
    return "never" if acceptance is None else f"{acceptance:.2f}"


# Means over seeds

# Student's t, 97.5%, for 2 to 10 seeds
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of one value a seed, low and high of its 95% interval (Student's t; 2 to 10 seeds)."""
    mean = statistics.mean(values)
    half = T_QUANTILE[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def interval(values: list[float], digits: int = 3) -> str:
    """`mean_interval` in words; of one value or more than ten, their mean alone."""
    if not 2 <= len(values) <= len(T_QUANTILE) + 1:
        return f"{statistics.mean(values):+.{digits}f}"
    mean, low, high = mean_interval(values)
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def over_seeds(rows: list[dict]) -> list[Table]:
    """Means over seeds of every draft's alpha and expected acceptance, and the gain over
    DistillSpec, seed by seed; [] for fewer than 2 seeds or more than 10."""
    drafts = defaultdict(dict)  # (cell, draft) -> its row by seed
    for row in rows:
        cell = (row["task"], row["pair"], row["temperature"])
        drafts[cell, row["draft"]][row["seed"]] = row
    if not all(2 <= len(by_seed) <= len(T_QUANTILE) + 1 for by_seed in drafts.values()):
        return []
    count = len({row["seed"] for row in rows})
    tables = []
    for name, key in (("alpha", "alpha"), ("expected acceptance", "expected_acceptance")):
        lines = []
        for (cell, draft), by_seed in drafts.items():
            uniform = drafts.get((cell, "DistillSpec"), {})
            gains = [row[key] - uniform[s][key] for s, row in by_seed.items() if s in uniform]
            mean = interval([row[key] for row in by_seed.values()]).replace("+", "")
            gain = interval(gains) if len(gains) > 1 and draft != "DistillSpec" else ""
            task, pair, temperature = cell
            lines.append([task, pair, f"{temperature:g}", draft, mean, gain])
        title = f"Means over {count} seeds, {name} (95% interval of the mean, Student's t):"
        columns = ["task", "pair", "T", "draft", "mean", "over DistillSpec"]
        gained = any(line[-1] for line in lines)
        tables.append(without(Table(title, columns, lines), [] if gained else columns[-1:]))
    return tables
