"""Studies (several runs made into one table), docs/results.md, and figures of a run.

    python -m extras.report                                    # docs/results.md from results/*.json
    python -m extras.report --check                            # exit code 1 if it is not up to date
    python -m extras.report add NAME RUNS/results.json ... --title TEXT --note TEXT
    python -m extras.report figures RUNS/results.json FOLDER   # needs matplotlib
    python -m extras.report history RUNS FOLDER                # likewise: loss and alpha by step
    python -m extras.report show RUNS                          # a run's tables once more

A study is a file of results/ with the key "study": the rows of one comparison, from one run or
more, and what to say about them.
"""

import json
import re
import statistics
import sys
from pathlib import Path

from cli import Parser, run_command
from extras.ceiling import moment_table
from extras.figures import distinct, figures, histories
from extras.measure import portable
from extras.selection_map import note, opening
from extras.studies import (
    PROTOCOL,
    VERSIONS,
    baselines,
    check_portable,
    check_study,
    gains,
    load_json,
    load_run,
    recorded,
    rows_by_draft,
    today,
)
from tables import (
    grid,
    in_order,
    interval,
    markdown,
    speed_table,
    table_order,
    terminal_text,
    told_apart,
)

ROOT = Path(__file__).parents[1]
PAGE = Path("docs", "results.md")
INTRODUCTION = """\
# Results

This page holds every measured comparison of the project: what was compared, under which
conditions, what came out, and the command that does it again. It is generated: each study below
is a file of `results/`, `python -m extras.report` writes the page from those files, and a test
keeps the two together. The findings in short are in the [README](../README.md)."""
READING = """\
## All studies

**How to add a study.** Run the comparison with several seeds, tasks or methods
([experiments](experiments.md) says how), then

```bash
python -m extras.report add NAME RUNS/results.json --title "..." --note "what it shows"
python -m extras.report                                      # writes this page
python -m extras.report figures RUNS/results.json FOLDER     # pip install matplotlib
```

A study is refused unless it is the whole of one comparison: every draft has a row for every task
and seed, all rows have one protocol and all the numbers that a table prints, commit and versions
are known, and the drafts are as many as the recorded commands train.

**How to read the tables.** Alpha is the acceptance rate, accepted / judged draft tokens: here its
mean over tasks and seeds. T is the temperature. A gain ("over AdaSPEC") is paired by task and
seed, with the 95% interval over seeds (Student's t) where there are several. What training took
is a mean over cells, with the reference of an AdaSPEC draft included: passes over the training
rows, optimiser steps, loss-bearing tokens, rows that the target was run on, seconds of training
and, besides, of filling the caches (older studies did not record these; machines were shared with
other work, so that seconds compare within a study at best). The rank correlations
are over the tokens of held-out rows: of the gap, or of the loss alone, before stage 2 with how
far the draft's loss then falls.

**Figures.** Alpha by task, with intervals over seeds; alpha by k on mbpp; and the response to a
test question of gsm8k, decoded with the AdaSPEC draft of the first study (seed 0):

![alpha by task](../results/figures/tiny-alpha.png)
![alpha by k](../results/figures/tiny-k.png)
![accepted and selected tokens](../results/figures/tiny-gsm8k-seed0-picture.png)"""

COLUMNS = {  # of a study's table, after alpha: key of a row -> heading, number format
    "epochs": ("passes", ",.1f"),
    "steps": ("steps", ",.0f"),
    "loss_tokens": ("loss-bearing tokens", ",.0f"),
    "target_forwards": ("target forwards", ",.0f"),
    "seconds": ("seconds", ",.0f"),
    "cache_seconds": ("of caches", ",.0f"),
    "gap_correlation": ("gap correlation", ".3f"),
    "loss_correlation": ("loss correlation", ".3f"),
}
FEWEST_TIMED = 10  # prompts, of a speed-up that is shown
EAGLE_COLUMNS = {  # of EAGLE's table: key of a row -> heading, digits after the point
    "accuracy": ("training accuracy", 3),
    "alpha": ("alpha", 3),
    "tau": ("tau", 3),
}
EAGLE_SPEEDS = {  # its further columns, where enough prompts were timed
    "tokens_per_second": ("tokens per second", 0),
    "speedup": ("speed-up", 3),
    "seconds_per_response": ("seconds per response", 3),
}


# Tables of a study


def mean_of(key: str, rows: list[dict]) -> float:
    return statistics.mean(row[key] for row in rows)


def summary_table(study: dict) -> list[str]:
    """A line a draft: alpha over all tasks and seeds, the gains over the baselines, what training
    took."""
    groups = rows_by_draft(study["rows"])
    several = len(distinct(study["rows"], "pair")) > 1
    temperatures = distinct(study["rows"], "temperature")
    headings = ["draft"]
    for temperature in temperatures:
        headings.append(f"alpha, T = {temperature:g}")
        headings += [f"over {name}" for name in baselines(study)]
    keys = [key for key in COLUMNS if distinct(study["rows"], key)]
    headings += [COLUMNS[key][0] for key in keys]
    lines = []
    for (pair, draft), by_temperature in groups.items():
        cells = [f"{pair}: {draft}" if several else draft]
        for temperature in temperatures:
            rows = by_temperature[temperature]
            cells.append(f"{mean_of('alpha', rows):.3f}")
            for name in baselines(study):
                gain = interval(gains(rows, groups[pair, name][temperature]))
                cells.append("" if name == draft else gain)
        for key in keys:
            rows = [row for row in by_temperature[temperatures[0]] if key in row]
            cells.append(f"{mean_of(key, rows):{COLUMNS[key][1]}}" if rows else "")
        lines.append(" | ".join(cells))
    return grid(" | ".join(headings), lines)


def task_table(study: dict) -> list[str]:
    """A line a draft and temperature: each task's alpha, with the gain over the first baseline."""
    groups = rows_by_draft(study["rows"])
    several = len(distinct(study["rows"], "pair")) > 1
    tasks = distinct(study["rows"], "task")
    baseline = baselines(study)[0]
    lines = []
    for (pair, draft), by_temperature in groups.items():
        for temperature, rows in sorted(by_temperature.items()):
            cells = [f"{pair}: {draft}" if several else draft, f"{temperature:g}"]
            for task in tasks:
                own = [row for row in rows if row["task"] == task]
                others = groups[pair, baseline][temperature]
                gain = "" if draft == baseline else f" {interval(gains(own, others))}"
                cells.append(f"{mean_of('alpha', own):.3f}{gain}")
            lines.append(" | ".join(cells))
    return grid(" | ".join(["draft", "T", *tasks]), lines)


def eagle_table(rows: list[dict]) -> str:
    """EAGLE against EAGLE + AdaSPEC: means over seeds, and what is gained seed by seed. "" where
    no row is of an EAGLE head."""
    cells = {}  # (task, pair, temperature) -> draft -> seed -> row
    for row in rows:
        if "accuracy" in row:
            drafts = cells.setdefault((row["task"], row["pair"], row["temperature"]), {})
            drafts.setdefault(row["draft"], {})[row["seed"]] = row
    if not cells:
        return ""
    timed = min(row.get("timed_prompts", 0) for row in rows) >= FEWEST_TIMED
    columns = EAGLE_COLUMNS | EAGLE_SPEEDS if timed else EAGLE_COLUMNS
    lines = []
    for cell, drafts in cells.items():
        for draft, by_seed in drafts.items():
            means = eagle_means(list(by_seed.values()), columns)
            means = [mean.replace("+", "") for mean in means]
            lines.append(" | ".join([*map(str, cell), draft, *means]))
            plain = plain_head(draft)
            baseline = drafts.get(plain, {})
            seeds = [seed for seed in by_seed if seed in baseline]
            if draft != plain and seeds:
                gained = [
                    {key: by_seed[seed][key] - baseline[seed][key] for key in columns}
                    for seed in seeds
                ]
                gains_of_cell = eagle_means(gained, columns)
                lines.append(" | ".join([*map(str, cell), f"over {plain}", *gains_of_cell]))
    headings = ["task", "pair", "T", "draft", *(heading for heading, _ in columns.values())]
    note = (
        f"\nMeans over {len(distinct(rows, 'seed'))} seeds (95% interval of the mean over seeds, "
        "Student's t); training accuracy:\nthe share of the training rows' response tokens where "
        "head and target, teacher-forced, have the same argmax.\n"
    )
    return "\n".join([note, *grid(" | ".join(headings), lines)])


def plain_head(draft: str) -> str:
    """The label of the plain EAGLE head with a head's own settings."""
    own = [word for word in draft.split() if word.startswith(("depth=", "state-weight="))]
    return " ".join(["EAGLE", *own])


def eagle_means(rows: list[dict], columns: dict) -> list[str]:
    means = []
    for key, (_, digits) in columns.items():
        means.append(interval([row[key] for row in rows], digits))
    return means


# docs/results.md


def protocol(study: dict) -> str:
    """The conditions of a study's rows, in one sentence."""
    rows = study["rows"]
    split, gamma, max_new_tokens, dtype, _ = (rows[0][key] for key in PROTOCOL)
    training_rows = [round(row["rows"] / row["epochs"]) for row in rows if row.get("epochs")]
    seeds = distinct(rows, "seed")
    parts = [
        f"{', '.join(distinct(rows, 'pair'))}: {', '.join(distinct(rows, 'task'))}",
        f"{span(distinct(rows, 'prompts'))} {split} prompts a task",
        *([f"{span(training_rows)} training rows"] if training_rows else []),
        f"gamma {gamma}",
        f"max_new_tokens {max_new_tokens}",
        dtype,
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
        study["machine"],
    ]
    return "; ".join(parts) + "."


def span(values) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def command_text(record: dict) -> str:
    """The commands to run today and, where these have changed since, those that were run."""
    text = "\n".join(["```bash", *today(record), "```"])
    if today(record) != recorded(record):
        text += "\n\nRecorded with the command line of its time:\n\n"
        text += "\n".join(["```bash", *recorded(record), "```"])
    return text


def study_text(path: Path, study: dict) -> str:
    tables = eagle_table(study["rows"]).strip() or "\n".join(summary_table(study))
    parts = [f"## {study['title']}", note(path, study), f"Protocol: {protocol(study)}", tables]
    if len(distinct(study["rows"], "task")) > 1:
        title = f"Alpha by task, with the gain over {baselines(study)[0]}:"
        parts += [title, "\n".join(task_table(study))]
    timed = [row for row in study["rows"] if row.get("timed_prompts", 0) >= FEWEST_TIMED]
    if timed and not distinct(timed, "accuracy"):  # EAGLE's table has its speed-ups
        speeds = speed_table(timed)
        parts += [speeds.title, "\n".join(markdown(speeds))]
    for draft, reason in study.get("left_out", {}).items():
        parts.append(f"Not shown: {draft}, {reason}.")
    versions = "commit {git}, Python {python}, torch {torch}, transformers {transformers}"
    rows = f"Rows: [`results/{path.name}`](../results/{path.name})"
    parts += [command_text(study), f"{rows}, recorded at {versions.format(**study)}."]
    return "\n\n".join(parts)


def ceiling_text(path: Path, record: dict) -> str:
    """The study of extras.ceiling; "note", what it shows, was written into its file."""
    check_portable(record)
    parts = ["## The ceiling of any selector", note(path, record)]
    parts += ["\n".join(moment_table(record["moments"])), command_text(record)]
    versions = "commit {git}, Python {python}, torch {torch}, transformers {transformers}"
    versions = versions.format(git=record["git"], **record["machine"])
    file = f"[`results/{path.name}`](../results/{path.name})"
    return "\n\n".join([*parts, f"Figures of every seed, real steps too: {file}, {versions}."])


def benchmark_text(benchmarks: dict[Path, dict]) -> str:
    """What else is in results/, with its commands."""
    pages = "[training cost](training-cost.md), [decoding](decoding.md), [serving](serving.md)"
    parts = ["## Benchmarks", f"Single measurements; their tables are in {pages}."]
    for path, record in benchmarks.items():
        check_portable(record)
        parts += [f"[`results/{path.name}`](../results/{path.name}):", command_text(record)]
    return "\n\n".join(parts)


def results_page(folder: Path) -> str:
    """docs/results.md, from the files of results/. Raises ValueError for a study that does not
    hold."""
    records = {path: load_json(path) for path in sorted(folder.glob("*.json"))}
    studies = [(path, record) for path, record in records.items() if "study" in record]
    studies.sort(key=lambda item: (item[1].get("order", sys.maxsize), item[1]["study"]))
    ceilings = {path: record for path, record in records.items() if "moments" in record}
    benchmarks = {path: record for path, record in records.items() if "command" in record}
    for _, study in studies:
        check_study(study)
    for path, record in ceilings.items():
        if "note" not in record:
            raise ValueError(f'{path}: write what it shows into it, as "note"')
    parts = [INTRODUCTION, *opening(folder), READING]
    parts += [study_text(path, study) for path, study in studies]
    parts += [ceiling_text(path, benchmarks.pop(path)) for path in ceilings]
    if benchmarks:
        parts.append(benchmark_text(benchmarks))
    return "\n\n".join(parts) + "\n"


# Making a study


def add(args, folder: Path) -> None:
    """Write the study `args.name`, of the rows of some results.json. Raises ValueError for what
    makes no study."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", args.name):
        characters = "lower-case letters, digits, dots and dashes"
        raise ValueError(f"a study's name is {characters}, got {args.name!r}")
    runs = [load_run(path) for path in args.results]
    study = {"study": args.name, "title": args.title, "note": args.note}
    study |= {"baseline": args.baseline, "order": args.order}
    commands = [command for run in runs for command in run.get("commands", ())]
    commands = [portable(as_module(command)) for command in commands]
    study["commands"] = list(dict.fromkeys(commands))
    study["machine"] = args.machine or joined(run.get("machine") for run in runs)
    for key in VERSIONS:
        study[key] = joined(run.get(key) for run in runs)
    study = {key: value for key, value in study.items() if value is not None}
    rows = sorted((row for run in runs for row in run["rows"]), key=table_order)
    study["rows"] = [rounded({key: row[key] for key in row if key not in VERSIONS}) for row in rows]
    check_study(study)
    path = folder / f"{args.name}.json"
    write_study(study, path)
    size = path.stat().st_size / 1000
    print(f"{path}: {len(rows)} rows, {size:.1f} kB; now python -m extras.report")


def show(path: Path) -> str:
    """The tables of a run, given as its folder or its results.json, for a terminal."""
    run = load_run(path / "results.json" if path.is_dir() else path)
    if not run["rows"]:
        raise ValueError(f"{path} has no rows yet: no cell of the run is finished")
    # a study has the versions once, for all of its rows
    rows = [{"torch": run.get("torch"), **row} for row in run["rows"]]
    return terminal_text(in_order(told_apart(rows)), run.get("machine", "its machine"))


def as_module(command: str) -> str:
    """The command as it was typed: a run knows `python -m extras.NAME` by the script's path."""
    return re.sub(r"(?<=\s)\S*\bextras/(\w+)\.py\b", r"-m extras.\1", command)


def joined(values) -> str:
    """Each value once; "" where one is missing."""
    values = list(values)
    return ", ".join(dict.fromkeys(values)) if all(values) else ""


def rounded(value):
    """Floats to 5 digits, in lists and dicts too."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write_study(study: dict, path: Path) -> None:
    """As JSON, a line a row."""
    head = json.dumps({key: study[key] for key in study if key != "rows"}, indent=1)
    lines = ",\n".join("  " + json.dumps(row) for row in study["rows"])
    path.write_text(head.removesuffix("\n}") + f',\n "rows": [\n{lines}\n ]\n}}\n')


# The command line


def parse_arguments(argv):
    parser = Parser(prog="extras.report", description=__doc__)
    check = "change nothing; exit code 1 if docs/results.md is not up to date"
    parser.add_argument("--check", action="store_true", help=check)
    commands = parser.add_subparsers(dest="command")
    flag = commands.add_parser("add", help="make a study of runs").add_argument
    flag("name", help="it becomes results/NAME.json")
    flag("results", nargs="+", help="results.json of each run")
    flag("--title", required=True, help="its heading in docs/results.md")
    flag("--note", required=True, help="what it shows: a paragraph, printed as it is")
    flag("--baseline", help="the draft, or drafts with commas between, that gains are over")
    flag("--order", type=int, help="its place among the studies; without it last, by name")
    flag("--machine", help="the machine in words, where the results do not say it")
    flag = commands.add_parser("figures", help="draw a run's results").add_argument
    flag("results", help="results.json of the run")
    flag("folder", help="where the PNG files go")
    flag("--picture", action="append", default=[], help="a file of extras.analysis picture")
    flag = commands.add_parser("history", help="draw how the drafts of a run learned").add_argument
    flag("runs", help="the --out folder of the run, also while it trains")
    flag("folder", help="where the PNG files go")
    flag = commands.add_parser("show", help="print the tables of a run").add_argument
    flag("run", type=Path, help="the run's folder (--out), or its results.json")
    return parser.parse_args(argv)


def main(argv=None, root: Path = ROOT) -> int:
    """Returns the exit code."""
    args = parse_arguments(argv)
    if args.command == "add":
        add(args, root / "results")
        return 0
    if args.command == "figures":
        pictures = [load_json(path) for path in args.picture]
        print(*figures(load_run(args.results)["rows"], args.folder, pictures), sep="\n")
        return 0
    if args.command == "history":
        print(*histories(args.runs, args.folder), sep="\n")
        return 0
    if args.command == "show":
        print(show(args.run))
        return 0
    page = results_page(root / "results")
    path = root / PAGE
    if path.is_file() and path.read_text() == page:
        return 0
    if args.check:
        print(f"{PAGE} is not what results/ says: run python -m extras.report", file=sys.stderr)
        return 1
    path.write_text(page)
    print(path)
    return 0


if __name__ == "__main__":
    run_command(main, "extras.report")
