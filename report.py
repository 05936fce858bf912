"""What result rows say, as text and pictures: the driver's tables, the README's results section, the figures."""

import statistics

# The paper's Table 1, alpha in percent of DistillSpec and AdaSPEC: 3-epoch pythia and codegen, then optimal pythia and codegen
PAPER_ALPHA = {
    "gsm8k": ((57.58, 62.63), (79.49, 82.79), (66.19, 68.28), (81.49, 83.48)),
    "alpaca": ((44.34, 47.25), (56.48, 58.80), (65.41, 65.79), (58.05, 60.36)),
    "mbpp": ((46.88, 47.73), (87.36, 88.76), (49.88, 65.12), (86.60, 87.70)),
    "cnn_dailymail": ((73.05, 74.22), (79.33, 80.63), (80.15, 80.89), (85.01, 86.29)),
    "xsum": ((47.24, 49.11), (58.88, 59.93), (56.11, 57.80), (66.78, 68.19)),
}


def table(rows: list[dict]) -> str:
    """The results as Markdown: acceptance (beside the paper's, where it has the cell), the protocol, and what training took."""
    columns = "task | pair | seed | T | draft | alpha (95% interval) | tau | expected acceptance | argmax agreement | speed-up"
    columns += " | paper's alpha"
    lines = [f"| {columns} |", "|" + " --- |" * (columns.count("|") + 1)]
    for row in rows:
        low, high = row["alpha_interval"]
        lines.append(
            "| {task} | {pair} | {seed} | {temperature:g} | {draft} | {alpha:.3f} ({low:.3f}-{high:.3f}) | {tau:.2f} "
            "| {expected_acceptance:.3f} | {agreement:.3f} | {speedup:.2f}x | {paper} |".format(
                **row, low=low, high=high, paper=paper_alpha(row)
            )
        )
    if not any(paper_alpha(row) for row in rows):
        lines = [line[: line.rstrip("|").rindex("|") + 1] for line in lines]
    protocol = (
        "{task}: first {prompts} {split} prompts (speed-up: {timed_prompts}, one by one), gamma {gamma}, max_new_tokens "
        "{max_new_tokens}, {dtype}, {ranks} x {device}, torch {torch}"
    )
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    lines += ["", *dict.fromkeys(f"Protocol of {protocol.format(**row)}, seed {seeds}." for row in rows)]
    lines += [
        "alpha = accepted / judged, interval by bootstrap over prompts; tau = tokens per target call; expected acceptance"
    ]
    lines += ["and argmax agreement on the target's own text; speed-up over the target alone, median over prompts."]
    columns = "task | pair | seed | draft | epochs | steps | loss-bearing tokens | target forwards | seconds"
    lines += ["", "What training took, the reference's included (target forwards: rows, cached ones once):", ""]
    lines += [f"| {columns} |", "|" + " --- |" * (columns.count("|") + 1)]
    cells = (
        "| {task} | {pair} | {seed} | {draft} | {epochs:.1f} | {steps} | {loss_tokens} | {target_forwards} | {seconds:.0f} |"
    )
    lines += dict.fromkeys(cells.format(**row) for row in rows if "steps" in row)
    return "\n".join(lines)


T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's, 97.5%, for 2 to 10 seeds


def interval(values: list[float]) -> str:
    """Mean of one value a seed, with the 95% interval of the mean (Student's t; of 2 to 10 seeds)."""
    mean, half = statistics.mean(values), T_QUANTILE[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def over_seeds(rows: list[dict]) -> str:
    """Means over seeds of every draft's alpha and expected acceptance, and of what is gained over DistillSpec, seed by seed;
    "" for fewer than 2 seeds or more than 10."""
    found = {}
    for row in rows:
        found.setdefault((row["task"], row["pair"], row["temperature"], row["draft"]), {})[row["seed"]] = row
    columns = "task | pair | T | draft | alpha | over DistillSpec | expected acceptance | over DistillSpec"
    lines = [f"| {columns} |", "|" + " --- |" * (columns.count("|") + 1)]
    for (*cell, draft), by_seed in found.items():
        if not 2 <= len(by_seed) <= 10:
            return ""
        uniform = found.get((*cell, "DistillSpec"), {})
        texts = []
        for key in ("alpha", "expected_acceptance"):
            texts.append(interval([row[key] for row in by_seed.values()]).replace("+", ""))
            gains = [row[key] - uniform[seed][key] for seed, row in by_seed.items() if seed in uniform]
            texts.append(interval(gains) if len(gains) > 1 and draft != "DistillSpec" else "")
        lines.append(f"| {' | '.join(map(str, cell))} | {draft} | {' | '.join(texts)} |")
    seeds = len({row["seed"] for row in rows})
    return "\n".join([f"\nMeans over {seeds} seeds (95% interval of the mean over seeds, Student's t):\n", *lines])


def paper_alpha(row: dict) -> str:
    """The paper's alpha of a row's cell, "" where it has none: it has DistillSpec and AdaSPEC, and names no temperature."""
    pairs, drafts = ["pythia", "codegen"], ["DistillSpec", "AdaSPEC"]
    if row["task"] not in PAPER_ALPHA or row["pair"] not in pairs or row["draft"] not in drafts:
        return ""
    cell = PAPER_ALPHA[row["task"]][2 * (row["regime"] == "optimal") + pairs.index(row["pair"])]
    return f"{cell[drafts.index(row['draft'])] / 100:.3f}"
