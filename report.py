"""What result rows say: the driver's tables, the README's results section, and figures (these with matplotlib, an extra).

    python report.py [--check]                                    # write the README's results section from results/*.json
    python report.py add NAME RUNS/results.json ... --title TEXT --note TEXT    # make results/NAME.json, a study
    python report.py figures RUNS/results.json FOLDER             # draw a run, as run_all.py does at its end

A study is a file of results/ with the key "study": rows of `run_all.py`, made smaller, and what to print about them.
"""

import argparse
import json
import operator
import os
import platform
import re
import shlex
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

from speculative import Parser, Stats

HERE = Path(__file__).parent
MARKS = "<!-- results: made by python report.py -->", "<!-- end of results -->"

# The paper's Table 1, alpha in percent of DistillSpec and AdaSPEC: 3-epoch pythia and codegen, then optimal pythia and codegen
PAPER_ALPHA = {
    "gsm8k": ((57.58, 62.63), (79.49, 82.79), (66.19, 68.28), (81.49, 83.48)),
    "alpaca": ((44.34, 47.25), (56.48, 58.80), (65.41, 65.79), (58.05, 60.36)),
    "mbpp": ((46.88, 47.73), (87.36, 88.76), (49.88, 65.12), (86.60, 87.70)),
    "cnn_dailymail": ((73.05, 74.22), (79.33, 80.63), (80.15, 80.89), (85.01, 86.29)),
    "xsum": ((47.24, 49.11), (58.88, 59.93), (56.11, 57.80), (66.78, 68.19)),
}


# Tables of a run


def grid(columns: str, lines: list[str]) -> list[str]:
    """A Markdown table of a heading and lines whose cells have " | " between them."""
    return [f"| {line} |" for line in (columns, " | ".join(["---"] * (columns.count("|") + 1)), *lines)]


def table(rows: list[dict]) -> str:
    """The results as Markdown: acceptance (beside the paper's, where it has the cell), the protocol, and what training took."""
    columns = "task | pair | seed | T | draft | alpha (95% interval) | tau | expected acceptance | argmax agreement | speed-up"
    cells = (
        "{task} | {pair} | {seed} | {temperature:g} | {draft} | {alpha:.3f} ({alpha_interval[0]:.3f}-{alpha_interval[1]:.3f})"
    )
    cells += " | {tau:.2f} | {expected_acceptance:.3f} | {agreement:.3f} | {speedup:.2f}x"
    if any(paper_alpha(row) for row in rows):
        columns, cells = columns + " | paper's alpha", cells + " | {paper}"
    lines = grid(columns, [cells.format(**row, paper=paper_alpha(row)) for row in rows])
    protocol = (
        "{task}: first {prompts} {split} prompts (speed-up: {timed_prompts}, one by one), gamma {gamma}, max_new_tokens "
        "{max_new_tokens}, {dtype}, {ranks} x {device}, torch {torch}"
    )
    seeds = ", ".join(map(str, distinct(rows, "seed")))
    lines += ["", *dict.fromkeys(f"Protocol of {protocol.format(**row)}, seed {seeds}." for row in rows)]
    lines += [
        "alpha = accepted / judged, interval by bootstrap over prompts; tau = tokens per target call; expected acceptance"
    ]
    lines += ["and argmax agreement on the target's own text; speed-up over the target alone, median over prompts."]
    lines += ["", "What training took, the reference's included (target forwards: rows, cached ones once):", ""]
    columns = "task | pair | seed | draft | epochs | steps | loss-bearing tokens | target forwards | seconds"
    cells = "{task} | {pair} | {seed} | {draft} | {epochs:.1f} | {steps} | {loss_tokens} | {target_forwards} | {seconds:.0f}"
    return "\n".join([*lines, *grid(columns, dict.fromkeys(cells.format(**row) for row in rows if "steps" in row))])


T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's, 97.5%, for 2 to 10 seeds


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of one value a seed, low and high of its 95% interval (Student's t; of 2 to 10 seeds)."""
    mean, half = statistics.mean(values), T_QUANTILE[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def interval(values: list[float], digits: int = 3) -> str:
    """`mean_interval` in words; of one value or more than ten, their mean alone."""
    if not 2 <= len(values) <= len(T_QUANTILE) + 1:
        return f"{statistics.mean(values):+.{digits}f}"
    mean, low, high = mean_interval(values)
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def over_seeds(rows: list[dict]) -> str:
    """Means over seeds of every draft's alpha and expected acceptance, and of what is gained over DistillSpec, seed by seed;
    "" for fewer than 2 seeds or more than 10."""
    found, lines = {}, []
    for row in rows:
        found.setdefault((row["task"], row["pair"], row["temperature"], row["draft"]), {})[row["seed"]] = row
    for (*cell, draft), by_seed in found.items():
        if not 2 <= len(by_seed) <= 10:
            return ""
        uniform = found.get((*cell, "DistillSpec"), {})
        texts = []
        for key in ("alpha", "expected_acceptance"):
            texts.append(interval([row[key] for row in by_seed.values()]).replace("+", ""))
            gains = [row[key] - uniform[seed][key] for seed, row in by_seed.items() if seed in uniform]
            texts.append(interval(gains) if len(gains) > 1 and draft != "DistillSpec" else "")
        lines.append(" | ".join([*map(str, cell), draft, *texts]))
    columns = "task | pair | T | draft | alpha | over DistillSpec | expected acceptance | over DistillSpec"
    seeds = len(distinct(rows, "seed"))
    head = f"\nMeans over {seeds} seeds (95% interval of the mean over seeds, Student's t):\n"
    return "\n".join([head, *grid(columns, lines)])


def eagle_table(rows: list[dict]) -> str:
    """EAGLE against EAGLE + AdaSPEC, means over seeds and what is gained seed by seed; "" where there is no EAGLE head."""
    keys = "accuracy", "alpha", "tau", "tokens_per_second", "speedup", "seconds_per_response"
    columns = "task | pair | T | draft | training accuracy | alpha | tau | tokens per second | speed-up | seconds per response"
    found = {}
    for row in rows:
        if "accuracy" in row:
            found.setdefault((row["task"], row["pair"], row["temperature"]), {}).setdefault(row["draft"], {})[row["seed"]] = row
    if not found:
        return ""

    def cells(values):
        return [interval(one, 0 if key == "tokens_per_second" else 3) for key, one in zip(keys, values, strict=True)]

    lines = []
    for cell, drafts in found.items():
        for draft, by_seed in drafts.items():
            texts = [text.replace("+", "") for text in cells([row[key] for row in by_seed.values()] for key in keys)]
            lines.append(" | ".join([*map(str, cell), draft, *texts]))
            both = [seed for seed in by_seed if draft != "EAGLE" and seed in drafts.get("EAGLE", {})]
            if both:
                texts = cells([by_seed[seed][key] - drafts["EAGLE"][seed][key] for seed in both] for key in keys)
                lines.append(" | ".join([*map(str, cell), "over EAGLE", *texts]))
    seeds = len({row["seed"] for row in rows})
    title = f"\nMeans over {seeds} seeds (95% interval of the mean over seeds, Student's t); training accuracy:"
    what = "the share of the training rows' response tokens where head and target, teacher-forced, have the same argmax.\n"
    return "\n".join([title, what, *grid(columns, lines)])


def paper_alpha(row: dict) -> str:
    """The paper's alpha of a row's cell, "" where it has none: it has DistillSpec and AdaSPEC, and names no temperature."""
    pairs, drafts = ["pythia", "codegen"], ["DistillSpec", "AdaSPEC"]
    if row["task"] not in PAPER_ALPHA or row["pair"] not in pairs or row["draft"] not in drafts:
        return ""
    cell = PAPER_ALPHA[row["task"]][2 * (row["regime"] == "optimal") + pairs.index(row["pair"])]
    return f"{cell[drafts.index(row['draft'])] / 100:.3f}"


# Studies and the README


# What a row must say to be part of a study: which cell, which draft and under which protocol
NEEDED = "pair task seed split prompts gamma max_new_tokens dtype temperature draft alpha".split()
ONE = "split gamma max_new_tokens dtype regime".split()  # what all rows of a study share: a mean over them says something
TOOK = {"epochs": "passes", "steps": "steps", "loss_tokens": "loss-bearing tokens", "target_forwards": "target forwards"}
# further columns, where a study's rows have them; see run_all.py
MORE = {"gap_correlation": "gap foretells", "loss_correlation": "loss foretells"}


KEY = """alpha: mean over tasks and seeds; gains: paired by task and seed, with the 95% interval over seeds (Student's t) where
there are several; what training took: mean over cells, the reference's included; gap (loss) foretells: rank correlation, over
the tokens of held-out rows, of the gap (of the loss alone) before stage 2 with how far the draft's loss then falls."""


def machine() -> str:
    """The machine that runs this, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return f"{os.cpu_count()} x {found[1] if found else platform.processor() or platform.machine()}"


def distinct(rows: list[dict], key: str) -> list:
    """The values of a key, each once; in order."""
    return sorted({row[key] for row in rows if row.get(key) is not None})


def check_study(study: dict) -> None:
    """Raises ValueError, in one line, where the rows of a study are not the whole of one comparison."""
    name, rows, cells = f"study {study['study']}", study["rows"], {}
    if missing := [key for key in ("title", "note", "commands", "machine") if not study.get(key)]:
        raise ValueError(f"{name} has no {missing[0]}")
    if not rows:
        raise ValueError(f"{name} has no rows: give results.json of runs that have finished a cell")
    for row in rows:
        if missing := [key for key in NEEDED if row.get(key) is None]:
            raise ValueError(f"{name}: a row has no {', '.join(missing)}; run its cell again with this run_all.py")
        cells.setdefault((row["pair"], row["draft"]), []).append((row["temperature"], row["task"], row["seed"]))
    if 0 < sum("accuracy" in row for row in rows) < len(rows):
        raise ValueError(f"{name} has EAGLE heads and other drafts; make a study of each")
    for key in ONE:
        if len(values := distinct(rows, key)) > 1:
            raise ValueError(f"{name} has rows of {key} {' and '.join(map(str, values))}; a study has one {key}")
    for (pair, draft), found in cells.items():
        if missing := [baseline for baseline in baselines(study) if (pair, baseline) not in cells]:
            raise ValueError(f"{name}: no draft {missing[0]} of {pair} to compare with; --baseline is one of its drafts")
        for temperature, task, seed in sorted(set().union(*cells.values())):
            if (count := found.count((temperature, task, seed))) != 1:
                where = f"{draft} of {pair} has {count} rows for {task}, seed {seed}, temperature {temperature:g}"
                raise ValueError(f"{name}: {where}; each draft needs one for every task and seed of the study")
    if len(seeds := distinct(rows, "seed")) > len(T_QUANTILE) + 1:
        raise ValueError(f"{name} has {len(seeds)} seeds; intervals are made for {len(T_QUANTILE) + 1} at most")


def mean_of(key: str, rows: list[dict]) -> float:
    return statistics.mean(row[key] for row in rows)


def baselines(study: dict) -> list[str]:
    """The drafts that gains are over."""
    drafts = {row["draft"] for row in study["rows"]}
    found = next((name for name in ("AdaSPEC", "DistillSpec", "EAGLE") if name in drafts), "DistillSpec")
    return study.get("baseline", found).split(",")


def gains(rows: list[dict], baseline: list[dict]) -> list[float]:
    """What a draft's alpha has over the baseline's, one value a seed: the mean over the tasks, paired by task and seed."""
    pairs = {(row["task"], row["seed"]): row["alpha"] for row in baseline}
    by_seed = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append(row["alpha"] - pairs[row["task"], row["seed"]])
    return [statistics.mean(values) for values in by_seed.values()]


def gained(rows: list[dict], baseline: list[dict]) -> str:
    return interval(gains(rows, baseline))


def compact(study: dict) -> list[str]:
    """A study's rows as Markdown, a line a draft (and pair, of several): alpha over all tasks and seeds, the gains over the
    baselines, what training took; then alpha and the gain over the first baseline by task."""
    rows, over, found = study["rows"], baselines(study), {}
    pairs, temperatures, tasks = (distinct(rows, key) for key in ("pair", "temperature", "task"))
    for row in rows:
        found.setdefault((row["pair"], row["draft"]), {}).setdefault(row["temperature"], []).append(row)
    columns = [text for t in temperatures for text in (f"alpha, T = {t:g}", *(f"over {draft}" for draft in over))]
    more = {key: title for key, title in MORE.items() if any(key in row for row in rows)}
    lines, by_task = [], []
    for (pair, draft), own in found.items():
        name = draft if len(pairs) == 1 else f"{pair}: {draft}"
        line = [name]
        for t in temperatures:
            line += [f"{mean_of('alpha', own[t]):.3f}"]
            line += [gained(own[t], found[pair, other][t]) if other != draft else "" for other in over]
            cells = []
            for task in tasks:
                ours, theirs = ([row for row in some if row["task"] == task] for some in (own[t], found[pair, over[0]][t]))
                cells.append(
                    " ".join([f"{mean_of('alpha', ours):.3f}", gained(ours, theirs) if draft != over[0] else ""]).strip()
                )
            by_task.append(" | ".join([name, f"{t:g}", *cells]))
        first = own[temperatures[0]]
        trained, known = [row for row in first if "steps" in row], {key: [row for row in first if key in row] for key in more}
        line += [f"{mean_of(key, trained):,.{int(key == 'epochs')}f}" if trained else "" for key in TOOK]
        line += [f"{mean_of(key, found):.3f}" if found else "" for key, found in known.items()]
        lines.append(" | ".join(line))
    text = grid(" | ".join(["draft", *columns, *TOOK.values(), *more.values()]), lines)
    if len(tasks) > 1:
        text += ["", f"Alpha by task, with the gain over {over[0]}:", "", *grid(" | ".join(["draft", "T", *tasks]), by_task)]
    return text


def protocol(study: dict) -> str:
    """The conditions of a study's rows, in one sentence."""
    rows = study["rows"]
    trained = {round(row["rows"] / row["epochs"]) for row in rows if row.get("epochs")}

    def span(values):
        return f"{min(values):g}" if len(set(values)) == 1 else f"{min(values):g} to {max(values):g}"

    (split, gamma, tokens, dtype), seeds = (distinct(rows, key)[0] for key in ONE[:4]), distinct(rows, "seed")
    parts = [f"{', '.join(distinct(rows, 'pair'))}: {', '.join(distinct(rows, 'task'))}"]
    parts += [f"{span([row['prompts'] for row in rows])} {split} prompts a task"]
    parts += [f"{span(trained)} training rows"] if trained else []
    parts += [f"gamma {gamma}", f"max_new_tokens {tokens}", dtype]
    parts += [f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}", study["machine"]]
    return "; ".join(parts) + "."


def section(folder: Path) -> str:
    """The README's results section, from the studies in a folder."""
    files = [(path, load_json(path)) for path in sorted(folder.glob("*.json"))]
    studies = [(study.get("order", sys.maxsize), study["study"], path, study) for path, study in files if "study" in study]
    parts = []
    for *_, path, study in sorted(studies, key=lambda each: each[:2]):
        check_study(study)
        head = [f"### {study['title']}", study["note"], f"Protocol: {protocol(study)}"]
        commands = "\n".join(["```bash", *study["commands"], "```"])
        parts += [
            *head,
            eagle_table(study["rows"]).strip() or "\n".join(compact(study)),
            commands,
            f"Rows: [`results/{path.name}`](results/{path.name}).",
        ]
    return "\n\n".join([KEY, *parts] if parts else ["No study yet: `python report.py add` makes one of a run's results."])


def inserted(text: str, content: str) -> str:
    """The text with `content` between the two marker lines. Raises ValueError where it does not have each once, in order."""
    between = re.compile(f"^{MARKS[0]}\n.*^{MARKS[1]}\n", re.DOTALL | re.MULTILINE)
    if any(text.count(mark) != 1 for mark in MARKS) or not between.search(text):
        raise ValueError(f"README.md must have the lines {MARKS[0]} and {MARKS[1]} once, in this order")
    return between.sub(lambda found: f"{MARKS[0]}\n{content}\n{MARKS[1]}\n", text)


def smaller(value):
    """Floats to 5 digits, in lists and dicts too."""
    if isinstance(value, dict):
        return {key: smaller(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [smaller(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def portable(command: str) -> str:
    """A command without the folders of the machine it ran on."""
    return shlex.join(re.sub("^(--[a-z-]+=)?/(.*/)?", r"\1", word.rstrip("/")) for word in shlex.split(command))


def load_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def load_results(path) -> dict:
    """A run's results.json. Raises ValueError where it is none."""
    results = load_json(path)
    if not isinstance(results, dict) or not isinstance(results.get("rows"), list):
        raise ValueError(f"{path} has no rows: give the results.json of a run")
    return results


def add(args, folder: Path) -> Path:
    """Write the study `args.name` of the rows of some results.json. Raises ValueError for what makes no study."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", args.name):
        raise ValueError(f"a study's name is lower-case letters, digits, dots and dashes, got {args.name!r}")
    runs = [load_results(path) for path in args.results]
    study = {"study": args.name, "title": args.title, "note": args.note}
    study |= {key: getattr(args, key) for key in ("baseline", "order") if getattr(args, key) is not None}
    for path, run in zip(args.results, runs, strict=True):
        if missing := [key for key in ("commands", "machine") if not run.get(key) and not getattr(args, key, None)]:
            raise ValueError(f"{path} does not say its {missing[0]}" + "; give --machine" * (missing[0] == "machine"))
    study["commands"] = list(dict.fromkeys(portable(command) for run in runs for command in run["commands"]))
    study["machine"] = args.machine or ", ".join(dict.fromkeys(run["machine"] for run in runs))
    known = "git", "python", "torch", "transformers"
    study |= {key: ", ".join(dict.fromkeys(run[key] for run in runs if key in run)) for key in known}
    study["rows"] = [smaller({key: row[key] for key in row if key not in known}) for run in runs for row in run["rows"]]
    check_study(study)
    path, rows = folder / f"{args.name}.json", study.pop("rows")
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(json.dumps(study, indent=1).removesuffix("\n}") + f',\n "rows": [\n{lines}\n ]\n}}\n')
    print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1000:.1f} kB; now python report.py")
    return path


# Figures


# Okabe and Ito's palette: told apart by the colour-blind too
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #B8A000".split()
MARKERS = "osD^vPX*"
SWEPT = re.compile(r" (k|epochs)=([\d.]+)")  # what of a draft's label is a figure's axis
ORIGINS = {
    "accepted": ("#BFE0F2", "accepted draft"),
    "corrected": ("#F6C98E", "target's, after a rejected draft"),
    "bonus": ("#E4E4E4", "target's, after accepted drafts only"),
}


def figures(rows: list[dict], folder, pictures=()) -> list[Path]:
    """Draw what the rows can give, for each pair, into PNG files of a folder: alpha by task, by k and by epochs, tau and
    speed-up by gamma, acceptance by draft position; and the pictures (records of `run_all.picture`). Returns the files.

    Raises ValueError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("figures need matplotlib: pip install matplotlib") from None
    Path(folder).mkdir(parents=True, exist_ok=True)
    made = []

    def save(figure, name):
        labels = {}
        for panel in figure.axes:
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
                labels.setdefault(label, handle)
        columns = max(1, min(4, 130 // (8 + max(map(len, labels)))))  # as many as there is room for
        figure.legend(labels.values(), labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        made.append(Path(folder, f"{name}.png"))
        figure.savefig(made[-1], dpi=150)

    for pair in distinct(rows, "pair"):
        for name, (those, draw, x, y) in FIGURES.items():
            some = those([row for row in rows if row["pair"] == pair])
            temperatures, drafts = distinct(some, "temperature"), list(dict.fromkeys(row["draft"] for row in some))
            styles = {
                draft: {"color": COLOURS[i % 8], "marker": MARKERS[(i + i // 8) % 8], "label": draft}
                for i, draft in enumerate(drafts)
            }
            figure = Figure(figsize=(9, 4), layout="constrained")
            for i, temperature in enumerate(temperatures):
                panel = figure.add_subplot(1, len(temperatures), i + 1, sharey=figure.axes[0] if i else None)
                panel.set(title=f"{pair}, temperature {temperature:g}", xlabel=x, ylabel="" if i else y)
                panel.spines[["top", "right"]].set_visible(False)
                panel.grid(axis="y", color="#DDDDDD")
                own = {draft: [r for r in some if (r["draft"], r["temperature"]) == (draft, temperature)] for draft in drafts}
                draw(panel, {draft: found for draft, found in own.items() if found}, styles)
            if temperatures:
                save(figure, f"{pair}-{name}")
    for record in pictures:
        figure = Figure(layout="constrained")
        draw_picture(figure, record)
        save(figure, "{pair}-{task}-seed{seed}-picture".format(**record))
    return made


def estimate(rows: list[dict]) -> tuple[float, float, float]:
    """A draft's alpha at one temperature, with the ends of its 95% interval: over seeds, or of a single row over prompts."""
    by_seed = [mean_of("alpha", [row for row in rows if row["seed"] == seed]) for seed in distinct(rows, "seed")]
    if 2 <= len(by_seed) <= len(T_QUANTILE) + 1:
        return mean_interval(by_seed)
    return (by_seed[0], *(rows[0]["alpha_interval"] if len(rows) == 1 else [by_seed[0]] * 2))


def draw_points(panel, xs, found, style, **line) -> None:
    """Estimates (mean, low, high) at xs, with error bars."""
    means, lows, highs = zip(*found, strict=True)
    sides = [[abs(a - b) for a, b in zip(means, ends, strict=True)] for ends in (lows, highs)]
    panel.errorbar(xs, means, sides, markersize=5, capsize=2, elinewidth=1, **({"linestyle": ""} | style | line))


def draw_alpha(panel, drafts, styles) -> None:
    tasks = distinct([row for own in drafts.values() for row in own], "task")
    panel.set_xticks(range(len(tasks)), tasks, fontsize=8)
    panel.set_xlim(-0.6, len(tasks) - 0.4)
    for i, (draft, own) in enumerate(drafts.items()):
        by_task = {task: [row for row in own if row["task"] == task] for task in tasks}
        some = [j for j, task in enumerate(tasks) if by_task[task]]
        xs = [j + (i + 0.5 - len(drafts) / 2) * min(0.15, 0.7 / len(drafts)) for j in some]
        draw_points(panel, xs, [estimate(by_task[tasks[j]]) for j in some], styles[draft])


def draw_sweep(key, panel, drafts, styles) -> None:
    """Alpha against a number of the draft's label (AdaSPEC without a k: the usual one), and DistillSpec's, level."""
    lines = {}
    for draft, own in drafts.items():
        value = re.search(f" {key}=([0-9.]+)", draft) or ["", 0.4]
        if draft == "DistillSpec":
            panel.axhline(estimate(own)[0], color="#555555", linestyle="--", linewidth=1, label=draft)
        else:
            lines.setdefault(draft.replace(value[0], ""), []).append((float(value[1]), estimate(own)))
    for style, (label, points) in zip(styles.values(), lines.items(), strict=False):
        xs, found = zip(*sorted(points), strict=True)
        draw_points(panel, xs, found, style | {"label": label}, linestyle="-")
    panel.set_xticks(sorted({x for points in lines.values() for x, _ in points}))


def draw_tau(panel, drafts, styles) -> None:
    legend(panel, "simulated", "i.i.d. formula")
    for draft, own in drafts.items():
        colour, gammas = styles[draft]["color"], [int(n) for n in own[0]["tau_by_gamma"]]
        counts = [Stats(accepted=row["counts"]["accepted"], rejected=row["counts"]["rejected"]) for row in own]
        panel.plot(gammas, [statistics.mean(row["tau_by_gamma"][str(n)] for row in own) for n in gammas], color=colour)
        formula = [statistics.mean(each.predicted_tau(n) for each in counts) for n in gammas]
        panel.plot(gammas, formula, color=colour, linestyle=":")
        panel.plot(own[0]["gamma"], mean_of("tau", own), **measured(styles[draft]))


def draw_speedup(panel, drafts, styles) -> None:
    """Measured, and predicted by costs in units of a target step: c of a draft step, v of scoring gamma + 1 positions; the
    loop's own time is not in it."""
    panel.axhline(1, color="#888888", linewidth=0.8)
    legend(panel, "predicted: tau / (gamma c + v)")
    for draft, own in drafts.items():
        gammas, timed = [int(n) for n in own[0]["tau_by_gamma"]], [int(n) for n in own[0]["speedup_by_gamma"]]
        costs = {n: [n * row["cost_ratio"] + row["scoring_ratio"][str(n)] for row in own] for n in gammas}
        taus = {n: [row["tau_by_gamma"][str(n)] for row in own] for n in gammas}
        predicted = [statistics.mean(map(operator.truediv, taus[n], costs[n])) for n in gammas]
        panel.plot(gammas, predicted, color=styles[draft]["color"])
        found = [statistics.mean(row["speedup_by_gamma"][str(n)] for row in own) for n in timed]
        panel.plot(timed, found, **measured(styles[draft]))


def legend(panel, *lines: str) -> None:
    """Say once for all drafts what the solid line and the dotted one are."""
    for label, style in zip(lines, "-:", strict=False):
        panel.plot([], [], color="#555555", linestyle=style, label=label)


def measured(style: dict) -> dict:
    return style | {"label": f"{style['label']}, measured", "linestyle": ""}


def draw_positions(panel, drafts, styles) -> None:
    for draft, own in drafts.items():
        accepted, judged = (
            [sum(n) for n in zip(*some, strict=False)]
            for some in zip(*(row["counts"]["per_position"] for row in own), strict=True)
        )
        xs = range(1, len(judged) + 1)
        panel.plot(xs, [a / b for a, b in zip(accepted, judged, strict=True)], **styles[draft])
        panel.set_xticks(xs)


def draw_picture(figure, record: dict, width: int = 100) -> None:
    """Tokens as boxes, coloured by origin, underlined where selected; `width` characters a line."""
    panel, x, y = figure.subplots(), 0.0, 0
    underline = {"color": "black", "linewidth": 1.8, "solid_capstyle": "butt"}
    for colour, label in ORIGINS.values():
        panel.fill([], [], color=colour, label=label)
    panel.plot([], [], label=f"selected by AdaSPEC's filter, k = {record['k']:g}", **underline)
    for text, origin, selected in zip(record["tokens"], record["origins"], record["selected"], strict=True):
        shown = "".join(c if c.isprintable() else "\u00b7" for c in text.replace("\n", "\u21b5"))
        size = len(shown) + 0.8
        if x + size > width:
            x, y = 0.0, y + 1
        ends = x, x + size - 0.25
        panel.fill_between(ends, y + 0.1, y + 0.8, color=ORIGINS[origin][0], linewidth=0)
        panel.text(sum(ends) / 2, y + 0.45, shown, family="monospace", fontsize=9.5, ha="center", va="center", parse_math=False)
        if selected:
            panel.plot(ends, [y + 0.87] * 2, **underline)
        x, y = (0.0, y + 1) if "\n" in text else (x + size, y)
    figure.set_size_inches(10, 0.3 * (y + 1) + 0.9)
    panel.set(xlim=(0, width), ylim=(y + 1, 0))
    panel.axis("off")
    count = record["origins"].count("accepted")
    what = "{task}, {split} prompt 1, decoded with the draft {draft}, gamma {gamma}, temperature 0: ".format(**record)
    panel.set_title(f"{what}{count} of {len(record['tokens'])} tokens are accepted drafts", fontsize=10)


def plain(rows: list[dict]) -> list[dict]:
    return [row for row in rows if not SWEPT.search(row["draft"])]


def swept(key: str, rows: list[dict]) -> list[dict]:
    """Those whose label has this number and, where there are any with a k, what they are drawn beside."""
    found = [row for row in rows if f" {key}=" in row["draft"]]
    beside = ("DistillSpec", "AdaSPEC") if found and key == "k" else ()
    return found + [row for row in rows if row["draft"] in beside]


def of_gamma(rows: list[dict]) -> list[dict]:
    return [row for row in plain(rows) if "tau_by_gamma" in row and row["cost_ratio"]]


ALPHA, GAMMA = "acceptance rate alpha", "gamma, tokens drafted a round"
FIGURES = {  # name -> which rows, how a panel is drawn, its axes' labels
    "alpha": (plain, draw_alpha, "task", ALPHA),
    "k": (partial(swept, "k"), partial(draw_sweep, "k"), "k, the fraction of tokens kept", ALPHA),
    "epochs": (partial(swept, "epochs"), partial(draw_sweep, "epochs"), "epochs of the draft", ALPHA),
    "tau": (of_gamma, draw_tau, GAMMA, "tau, tokens per target call"),
    "speedup": (of_gamma, draw_speedup, GAMMA, "speed-up over the target alone"),
    "positions": (plain, draw_positions, "position in the round's drafts", "accepted / judged"),
}


def main(argv=None, here: Path = HERE) -> int:
    """Returns the exit code: 1 where --check finds another README, 2 after an error, said in one line."""
    parser = Parser(prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the README is not up to date")
    commands = parser.add_subparsers(dest="command")
    flag = commands.add_parser("add", help="make a study of runs").add_argument
    flag("name", help="it becomes results/NAME.json")
    flag("results", nargs="+", help="results.json of each run")
    flag("--title", required=True)
    flag("--note", required=True, help="a paragraph, printed as it is")
    flag("--baseline", help="the draft, or drafts with commas between, that gains are over; default AdaSPEC, else DistillSpec")
    flag("--order", type=int, help="place among the studies; default: last, by name")
    flag("--machine", help="default: what the results say")
    drawing = commands.add_parser("figures", help="draw a run's results")
    drawing.add_argument("results")
    drawing.add_argument("out", help="folder")
    args = parser.parse_args(argv)
    try:
        if args.command == "add":
            add(args, here / "results")
        elif args.command == "figures":
            results = load_results(args.results)
            print(*figures(results["rows"], args.out, results.get("pictures", ())), sep="\n")
        else:
            text = (here / "README.md").read_text()
            made = inserted(text, section(here / "results"))
            if args.check and made != text:
                print("README.md is not what results/ says: run python report.py", file=sys.stderr)
                return 1
            if made != text:
                (here / "README.md").write_text(made)
    except (ValueError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
