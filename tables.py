"""Tables of a run's rows: acceptance beside the paper's, speed-up and break-even, acceptance by
draft position, what training took, means over seeds. Aligned for a terminal, or as Markdown.
"""

import statistics
import textwrap
from collections import defaultdict
from collections.abc import Sequence
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
    lines: list[dict[str, str]]  # heading -> cell, the same headings in all


# Forms


def grid(columns: str, lines) -> list[str]:
    """A Markdown table of a heading and lines whose cells have " | " between them."""
    rule = " | ".join(["---"] * (columns.count("|") + 1))
    return [f"| {line} |" for line in (columns, rule, *lines)]


def markdown(table: Table) -> list[str]:
    lines = [" | ".join(line.values()) for line in table.lines]
    return grid(" | ".join(table.lines[0]), lines)


def align(table: Table, width: int = WIDTH) -> list[str]:
    """The table for a terminal: numbers to the right, two spaces between columns. Where it is wider
    than `width`, the cells of its widest column of words go over several lines."""
    texts = [list(table.lines[0]), *(line.values() for line in table.lines)]
    columns = list(zip(*texts, strict=True))
    widths = [max(map(len, cells)) for cells in columns]
    words = [i for i, cells in enumerate(columns) if not are_numbers(cells[1:])]
    excess = sum(widths) + 2 * (len(widths) - 1) - width
    if words and excess > 0:
        widest = max(words, key=lambda i: widths[i])
        widths[widest] = max(8, widths[widest] - excess)
    lines = []
    for line in texts:
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
        shared = [key for key in ("task", "pair", "seed") if len(grouped(own, key)) == 1]
        paragraphs = [heading(own[0], shared), *protocols(own)]
        parts.append("\n".join(map(fill, paragraphs)))
        for table in tables_of(own):
            lines = align(Table(table.title, [without(line, shared) for line in table.lines]))
            parts.append("\n".join([fill(table.title), *lines]))
        parts.append("\n".join(map(fill, verdicts(own, machine))))
    return "\n\n".join(parts)


def markdown_text(rows: list[dict], machine: str) -> str:
    """`terminal_text` as a page of Markdown."""
    parts = ["# Results", LEGEND]
    for own in comparable(rows):
        parts += [f"## {heading(own[0], ['pair'])}", *protocols(own)]
        for table in tables_of(own):
            parts += [table.title, "\n".join(markdown(table))]
        parts.append("\n".join(f"- {verdict}" for verdict in verdicts(own, machine)))
    return "\n\n".join(parts) + "\n"


def comparable(rows: list[dict]) -> list[list[dict]]:
    """The rows, apart by pair and by how they were decoded."""
    return list(grouped(rows, "pair", "gamma", "max_new_tokens", "dtype").values())


def grouped(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """The rows by their values of these keys."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return groups


def told_apart(rows: list[dict]) -> list[dict]:
    """The rows; drafts of one cell and label that were trained by other settings, or for another
    target, are named by their folders as well."""
    named = list(map(dict, rows))
    for own in grouped(named, "pair", "task", "seed", "draft").values():
        variants = [f"{row.get('folder')} of {row.get('target')}" for row in own]
        if len(set(variants)) > 1:
            for row, variant in zip(own, variants, strict=True):
                row["draft"] += f" ({variant})"
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


def heading(row: dict, shared: list[str]) -> str:
    names = [f"seed {row[key]}" if key == "seed" else row[key] for key in shared]
    limits = "gamma {gamma}, at most {max_new_tokens} new tokens, {dtype}".format(**row)
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


def without(line: dict[str, str], headings: Sequence[str]) -> dict[str, str]:
    return {heading: cell for heading, cell in line.items() if heading not in headings}


def fill(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


# Tables


def row_keys(row: dict) -> dict[str, str]:
    """The first columns of a row, by their headings."""
    keys = {key: str(row[key]) for key in ("task", "pair", "seed")}
    return keys | {"T": f"{row['temperature']:g}", "draft": row["draft"]}


def acceptance_table(rows: list[dict]) -> Table:
    lines = []
    for row in rows:
        low, high = row["alpha_interval"]
        cells = {
            "alpha (95% interval)": f"{row['alpha']:.3f} ({low:.3f}-{high:.3f})",
            "tau": f"{row['tau']:.2f}",
            "expected": f"{row['expected_acceptance']:.3f}",
            "agree": f"{row['agreement']:.3f}",
            "speed-up": f"{row['speedup']:.2f}x",
            "paper": paper_alpha(row),
        }
        lines.append(row_keys(row) | cells)
    if any(line["paper"] for line in lines):
        return Table("Acceptance, beside the paper's alpha:", lines)
    return Table("Acceptance:", [without(line, ["paper"]) for line in lines])


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
    lines = []
    for row in rows:
        measured = f"{row['speedup']:.2f}x"
        if row.get("speedup_interval"):
            low, high = row["speedup_interval"]
            measured += f" ({low:.2f}-{high:.2f})"
        predictions = predicted_speedups(row)
        rate = row.get("tokens_per_second")
        cells = {
            "speed-up": measured,
            "ms/token": f"{1000 / rate:.1f}" if rate else "",
            "c": f"{row['cost_ratio']:.3f}" if row.get("cost_ratio") else "",
            "gamma": str(recommend(predictions)) if predictions else "",
            "predicted": f"{max(predictions.values()):.2f}x" if predictions else "",
            "break-even": break_even([row]),
            "train s": f"{training_seconds(row):.0f}" if "seconds" in row else "",
        }
        lines.append(row_keys(row) | cells)
    title = (
        "Speed-up, measured, and predicted at the gamma that is best; milliseconds a token took "
        "with the draft; seconds that its training took, caches included:"
    )
    return Table(title, lines)


def training_seconds(row: dict) -> float:
    """Of the draft and its reference, and of filling the caches that they read (which older
    records lack)."""
    return row["seconds"] + row.get("cache_seconds", 0.0)


def position_table(rows: list[dict]) -> Table:
    """Two lines a draft: acceptance by draft position, conditional and unconditional, of all its
    seeds together."""
    drafts = list(grouped(rows, "task", "pair", "temperature", "draft").values())
    counts = [sum((Stats(**row["counts"]) for row in own), Stats()) for own in drafts]
    positions = range(min(POSITIONS, max(len(stats.per_position[0]) for stats in counts)))
    lines = []
    for own, stats in zip(drafts, counts, strict=True):
        shares = acceptance_by_position(stats)
        for name, values in zip(("judged", "rounds"), shares.values(), strict=True):
            cells = {str(i + 1): f"{values[i]:.2f}" if i < len(values) else "" for i in positions}
            lines.append(without(row_keys(own[0]), ["seed"]) | {"of": name} | cells)
    title = "Acceptance by draft position, of those judged (conditional) and of all rounds:"
    return Table(title, lines)


def training_table(rows: list[dict]) -> Table:
    """A line a draft, whatever the temperature of its evaluation."""
    lines = []
    for row in rows:
        cells = {
            "epochs": f"{row['epochs']:.1f}",
            "steps": f"{row['steps']}",
            "loss tokens": f"{row['loss_tokens']}",
            "forwards": f"{row['target_forwards']}",
            "seconds": f"{row['seconds']:.0f}",
            "caches": f"{row['cache_seconds']:.0f}" if "cache_seconds" in row else "",
        }
        line = without(row_keys(row), ["T"]) | cells
        if line not in lines:
            lines.append(line)
    title = (
        "What training took, the reference's included (loss tokens: that bore a loss; forwards: "
        "rows that the target was run on, cached ones once; caches: seconds that filling them took "
        "besides):"
    )
    return Table(title, lines)


# Verdicts


def verdicts(rows: list[dict], machine: str) -> list[str]:
    """A line a task and draft: does it pay, by how much, from which acceptance on? As measured, or
    "may", where only the cost model says so, of another gamma; in the mean over seeds."""
    groups = grouped(rows, "task", "draft")
    several = len({task for task, _ in groups}) > 1
    lines = []
    for (task, draft), own in groups.items():
        name = f"{task}: {draft}" if several else draft
        lines.append(f"{name} {verdict(own, machine)}")
    return lines


def verdict(rows: list[dict], machine: str) -> str:
    """What `verdicts` says of a draft's rows, of any temperatures and seeds."""
    run_gamma = rows[0]["gamma"]
    measured, predicted, parts, best = {}, {}, [], []
    for (temperature,), own in grouped(rows, "temperature").items():
        name = f"T = {temperature:g}"
        measured[name] = statistics.mean(row["speedup"] for row in own)
        part = f"{measured[name]:.2f}x at {name}"
        predictions = mean_predictions(own)
        if run_gamma in predictions:
            part += f" (predicted {predictions[run_gamma]:.2f}x)"
        parts.append(part)
        if predictions:
            gamma = recommend(predictions)
            predicted[name] = predictions[gamma]
            best.append(f"{predicted[name]:.2f}x at {name} (gamma {gamma})")
    answer = does_it_pay(measured, predicted, machine)
    text = f"{answer}: {', '.join(parts)}, measured at gamma {run_gamma}"
    acceptance = break_even(rows)
    if not acceptance:
        return f"{text}; the costs of other gammas are not known."
    where = "at no acceptance"
    if acceptance != "never":
        where = f"from an acceptance of {acceptance} on"
    return f"{text}. Best predicted: {', '.join(best)}; such a draft pays {where}."


def does_it_pay(measured: dict[str, float], predicted: dict[str, float], machine: str) -> str:
    """Whether a draft pays, by its speed-ups, {temperature: ratio}."""
    for answer, speedups in (("pays", measured), ("may pay", predicted)):
        gaining = [name for name, speedup in speedups.items() if speedup > 1]
        if len(gaining) == len(measured):
            return f"{answer} on {machine}"
        if gaining:
            return f"{answer} on {machine} at {', '.join(gaining)} alone"
    return f"does not pay on {machine}"


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
    drafts = {}  # (cell, draft) -> its row by seed
    for key, own in grouped(rows, "task", "pair", "temperature", "draft").items():
        drafts[key] = {row["seed"]: row for row in own}
    if not all(2 <= len(by_seed) <= len(T_QUANTILE) + 1 for by_seed in drafts.values()):
        return []
    count = len(grouped(rows, "seed"))
    tables = []
    for name, key in (("alpha", "alpha"), ("expected acceptance", "expected_acceptance")):
        lines = []
        for (*cell, draft), by_seed in drafts.items():
            uniform = drafts.get((*cell, "DistillSpec"), {})
            gains = [row[key] - uniform[s][key] for s, row in by_seed.items() if s in uniform]
            line = without(row_keys(next(iter(by_seed.values()))), ["seed"])
            line["mean"] = interval([row[key] for row in by_seed.values()]).replace("+", "")
            is_gain = len(gains) > 1 and draft != "DistillSpec"
            line["over DistillSpec"] = interval(gains) if is_gain else ""
            lines.append(line)
        if not any(line["over DistillSpec"] for line in lines):
            lines = [without(line, ["over DistillSpec"]) for line in lines]
        title = f"Means over {count} seeds, {name} (95% interval of the mean, Student's t):"
        tables.append(Table(title, lines))
    return tables
