"""Tables of a run's rows, as Markdown: acceptance beside the paper's, cost, means over seeds."""

import statistics
from collections import defaultdict

from settings import PAPER_ALPHA


def grid(columns: str, lines) -> list[str]:
    """A table of a heading and lines whose cells have " | " between them."""
    rule = " | ".join(["---"] * (columns.count("|") + 1))
    return [f"| {line} |" for line in (columns, rule, *lines)]


def table(rows: list[dict]) -> str:
    """Acceptance (beside the paper's, where it has the cell), the protocol, what training took."""
    lines = []
    with_paper = any(paper_alpha(row) for row in rows)
    columns = (
        "task | pair | seed | T | draft | alpha (95% interval) | tau | expected | agree | speed-up"
    )
    cells = (
        "{task} | {pair} | {seed} | {temperature:g} | {draft} | {alpha:.3f} "
        "({alpha_interval[0]:.3f}-{alpha_interval[1]:.3f}) | {tau:.2f} | "
        "{expected_acceptance:.3f} | {agreement:.3f} | {speedup:.2f}x"
    )
    if with_paper:
        columns += " | paper's alpha"
        cells += " | {paper}"
    for row in rows:
        lines.append(cells.format(**row, paper=paper_alpha(row)))
    protocols = dict.fromkeys(protocol(row, rows) for row in rows)
    parts = [*grid(columns, lines), "", *protocols]
    parts += [
        "alpha = accepted / judged, interval by bootstrap over prompts; tau = tokens per target",
        "call; expected acceptance and argmax agreement on the target's own text; speed-up over",
        "the target alone, median over prompts.",
    ]
    trained = [row for row in rows if "steps" in row]
    return "\n".join([*parts, *(training_table(trained) if trained else [])])


def training_table(rows: list[dict]) -> list[str]:
    columns = (
        "task | pair | seed | draft | epochs | steps | loss-bearing tokens | "
        "target forwards | seconds"
    )
    cells = (
        "{task} | {pair} | {seed} | {draft} | {epochs:.1f} | {steps} | {loss_tokens} | "
        "{target_forwards} | {seconds:.0f}"
    )
    title = (
        "What training took, the reference's included (target forwards: rows, cached ones once):"
    )
    return ["", title, "", *grid(columns, dict.fromkeys(cells.format(**row) for row in rows))]


def protocol(row: dict, rows: list[dict]) -> str:
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    return (
        "Protocol of {task}: first {prompts} {split} prompts (speed-up: {timed_prompts}, one by "
        "one), gamma {gamma},\nmax_new_tokens {max_new_tokens}, {dtype}, {ranks} x {device}, torch "
        "{torch}, seed {seeds}.".format(**row, seeds=seeds)
    )


def paper_alpha(row: dict) -> str:
    """The paper's alpha of a row's cell, "" where it has none: it has DistillSpec and AdaSPEC, and
    names no temperature."""
    pairs, drafts = ["pythia", "codegen"], ["DistillSpec", "AdaSPEC"]
    if row["task"] not in PAPER_ALPHA or row["pair"] not in pairs or row["draft"] not in drafts:
        return ""
    cell = PAPER_ALPHA[row["task"]][2 * (row["regime"] == "optimal") + pairs.index(row["pair"])]
    return f"{cell[drafts.index(row['draft'])] / 100:.3f}"


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


def over_seeds(rows: list[dict]) -> str:
    """Means over seeds of every draft's alpha and expected acceptance, and the gain over
    DistillSpec, seed by seed; "" for fewer than 2 seeds or more than 10."""
    drafts = defaultdict(dict)  # (cell, draft) -> its row by seed
    for row in rows:
        cell = (row["task"], row["pair"], row["temperature"])
        drafts[cell, row["draft"]][row["seed"]] = row
    lines = []
    for (cell, draft), by_seed in drafts.items():
        if not 2 <= len(by_seed) <= 10:
            return ""
        uniform = drafts.get((cell, "DistillSpec"), {})
        texts = []
        for key in ("alpha", "expected_acceptance"):
            gains = [row[key] - uniform[s][key] for s, row in by_seed.items() if s in uniform]
            texts.append(interval([row[key] for row in by_seed.values()]).replace("+", ""))
            texts.append(interval(gains) if len(gains) > 1 and draft != "DistillSpec" else "")
        lines.append(" | ".join([*map(str, cell), draft, *texts]))
    columns = (
        "task | pair | T | draft | alpha | over DistillSpec | "
        "expected acceptance | over DistillSpec"
    )
    seeds = len({row["seed"] for row in rows})
    title = f"\nMeans over {seeds} seeds (95% interval of the mean over seeds, Student's t):\n"
    return "\n".join([title, *grid(columns, lines)])
