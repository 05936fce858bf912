"""Studies, files of results/ with the key "study": reading them, what they must hold, gains.

`check_study` holds a study to what its table prints (extras/report.py).
"""

import json
import re
import shlex
import statistics
from dataclasses import replace
from pathlib import Path

from extras.ablations import COMPARISONS
from extras.figures import MOST_SEEDS, distinct
from settings import METHODS

# What a study and each of its rows must say
VERSIONS = ("git", "python", "torch", "transformers")
STUDY_FIELDS = ("title", "note", "commands", "machine", *VERSIONS)
PROTOCOL = ("split", "gamma", "max_new_tokens", "dtype", "regime")  # the same in all rows
FIGURES = ("alpha", "tau", "expected_acceptance", "counts", "speedup")
ROW_FIELDS = ("pair", "task", "seed", "temperature", "draft", "prompts", *PROTOCOL, *FIGURES)
COSTS = ("rows", "epochs", "steps", "loss_tokens", "target_forwards", "seconds")  # trained drafts

# Reading


def load_json(path) -> dict:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def load_run(path) -> dict:
    """A run's results.json. Raises ValueError where it is none."""
    run = load_json(path)
    if not isinstance(run, dict) or not isinstance(run.get("rows"), list):
        raise ValueError(f"{path} has no rows: give the results.json of a run")
    return run


# Checks: each raises ValueError where something is missing


def check_study(study: dict) -> None:
    """Raises ValueError, in one line, where a study is not the whole of one comparison, or lacks
    what its table prints."""
    try:
        check_fields(study)
        check_protocol(study["rows"])
        check_cells(study)
        check_commands(study)
    except ValueError as error:
        raise ValueError(f"study {study['study']}: {error}") from None


def check_fields(study: dict) -> None:
    missing = [key for key in STUDY_FIELDS if not study.get(key)]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    if not study["rows"]:
        raise ValueError("it has no rows; give results.json of runs that have finished a cell")
    correlated = {}  # draft -> whether its rows have the correlation
    for row in study["rows"]:
        draft = row.get("draft")
        needed = ROW_FIELDS if draft == "base" else ROW_FIELDS + COSTS
        missing = [key for key in needed if row.get(key) is None]
        if missing:
            raise ValueError(f"a row of {draft} has no {', '.join(missing)}; run its cell again")
        has_correlation = "gap_correlation" in row
        if correlated.setdefault(draft, has_correlation) != has_correlation:
            raise ValueError(f"some rows of {draft} have a gap_correlation, and some do not")


def check_protocol(rows: list[dict]) -> None:
    for key in PROTOCOL:
        values = distinct(rows, key)
        if len(values) > 1:
            raise ValueError(f"rows of {key} {' and '.join(map(str, values))}; it needs one {key}")
    if len({"accuracy" in row for row in rows}) > 1:
        raise ValueError("it has EAGLE heads and other drafts; make a study of each")
    seeds = len(distinct(rows, "seed"))
    if seeds > MOST_SEEDS:
        raise ValueError(f"{seeds} seeds; intervals are made for {MOST_SEEDS} at most")


def check_cells(study: dict) -> None:
    """Every draft of a pair has one row for every task, seed and temperature of the study."""
    cells = {}
    for row in study["rows"]:
        cell = (row["temperature"], row["task"], row["seed"])
        cells.setdefault((row["pair"], row["draft"]), []).append(cell)
    for (pair, draft), own_cells in cells.items():
        for name in baselines(study):
            if (pair, name) not in cells:
                raise ValueError(f"no draft {name} of {pair} to compare with; see --baseline")
        for temperature, task, seed in sorted(set().union(*cells.values())):
            count = own_cells.count((temperature, task, seed))
            if count != 1:
                cell = f"{task}, seed {seed}, temperature {temperature:g}"
                raise ValueError(f"{draft} of {pair} has {count} rows for {cell}; it needs one")


def check_commands(study: dict) -> None:
    """The commands train as many drafts as the rows have; "left_out" of a study says which of
    them it does not show, and why."""
    check_portable(study)
    drafts = {row["draft"] for row in study["rows"]} - {"base"}
    count = count_methods(today(study)) - len(study.get("left_out", ()))
    if len(drafts) != count:
        raise ValueError(f"it has {len(drafts)} trained drafts, and its commands train {count}")


def check_portable(record: dict) -> None:
    """Raises ValueError where a recorded command names a folder of the machine it ran on."""
    for command in recorded(record) + today(record):
        if re.search(r"(^|[\s='\"])/", command):
            raise ValueError(f"its command names a folder of one machine: {command}")


def count_methods(commands: list[str]) -> int:
    """How many different drafts the commands train: by --methods of run_all.py or extras.eagle,
    or by a comparison of extras.ablations."""
    methods = []
    for command in commands:
        words = shlex.split(command)
        if "extras.ablations" in words:
            name = words[words.index("extras.ablations") + 1]
            if name not in COMPARISONS:
                raise ValueError(f"extras.ablations has no comparison {name}: {command}")
            methods += COMPARISONS[name]
        elif "run_all.py" in words or "extras.eagle" in words:
            names = "distillspec,adaspec"
            if "--methods" in words:
                names = words[words.index("--methods") + 1]
            if "--head" in words:  # measured as it is
                names = "none"
            match = words[words.index("--match") + 1] if "--match" in words else "steps"
            by_name = METHODS | {"adaspec": replace(METHODS["adaspec"], match=match)}
            methods += [by_name.get(name, name) for name in names.lower().split(",")]
    return len(set(methods) - {"none"})


def baselines(study: dict) -> list[str]:
    """The drafts that gains are over: the study's, else the first of the usual ones."""
    if "baseline" in study:
        return study["baseline"].split(",")
    drafts = distinct(study["rows"], "draft")
    usual = [name for name in ("AdaSPEC", "DistillSpec", "EAGLE") if name in drafts]
    return usual[:1] or ["DistillSpec"]


def recorded(record: dict) -> list[str]:
    """The commands of a study, or of a benchmark's file, as they were run."""
    return record["commands"] if "commands" in record else [record["command"]]


def today(record: dict) -> list[str]:
    """The commands that do the same now, where command lines have changed since."""
    return record.get("commands_today", recorded(record))


# Gains


def gains(rows: list[dict], baseline: list[dict]) -> list[float]:
    """What a draft's alpha has over the baseline's, one value a seed: the mean over the tasks,
    paired by task and seed."""
    alphas = {(row["task"], row["seed"]): row["alpha"] for row in baseline}
    by_seed = {}
    for row in rows:
        gain = row["alpha"] - alphas[row["task"], row["seed"]]
        by_seed.setdefault(row["seed"], []).append(gain)
    return [statistics.mean(values) for values in by_seed.values()]


def rows_by_draft(rows: list[dict]) -> dict:
    """(pair, draft) -> temperature -> rows."""
    groups = {}
    for row in rows:
        by_temperature = groups.setdefault((row["pair"], row["draft"]), {})
        by_temperature.setdefault(row["temperature"], []).append(row)
    return groups
