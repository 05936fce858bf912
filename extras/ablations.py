"""Comparisons of ways to train a draft, each a list of methods.

    python -m extras.ablations k --pairs tiny --tasks mbpp --data-dir DIR --seeds 0,1,2
    python -m extras.ablations mixed --pairs tiny --tasks gsm8k+mbpp --data-dir DIR

Every variant is trained in stages that they share (one target, one reference where they agree) and
evaluated, on validation rows unless told otherwise, in one table. The flags are those of
run_all.py, without what chooses methods, and a few of studies.
"""

import interrupt  # noqa: F401 -- first: it makes Ctrl-C during the other imports one line

# isort: split

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import storage
from cells import (
    Cell,
    base_models,
    draft_plan,
    prepare_cell,
    reference_method,
    row_texts,
    target_plan,
)
from cli import Parser, add_flags, flag, numbers, one_of, run_command, some_of, whole
from data import TASKS, load_rows, prompt_ids
from evaluate import timings
from extras.analysis import FinishedCell, cell_correlations
from ranks import from_rank_0, leave, progress, rank, say
from run_all import (
    checked_cells,
    evaluate_drafts,
    evaluation_path,
    load_to_decode,
    print_tables,
    run_cell,
)
from settings import METHODS, PAIRS, SOURCES, TINY_DRAFT, Method, Settings, parse_settings
from stages import Plan, fit, training_cost
from storage import Model
from train import DECAYS, SELECTIONS, adaspec_step, distillation_step, fine_tuning_step

# The comparisons


@dataclass(frozen=True)
class MixedMethod(Method):
    """A method on the rows of a task that mixes others."""

    # first: on the first task alone; in-turn: on the first, then, from the draft that this gave, on
    # the next; all: on the rows of all tasks, shuffled together
    rows: str = "all"

    def changed(self) -> dict:
        usual = MixedMethod(self.name)
        names = [f.name for f in fields(self) if getattr(self, f.name) != getattr(usual, f.name)]
        return {name: getattr(self, name) for name in names}


BOTH = ("distillspec", "adaspec")
PAPER_DIVERGENCES = ("fkl", "rkl", "tvd", "jsd")
LONG = Method("distillspec", epochs=6)  # the epochs of AdaSPEC's draft and reference together
LINEAR = replace(LONG, decay="linear")


def of_lengths(*lengths: int) -> list[Method]:
    """DistillSpec and AdaSPEC, its reference too, of so many epochs."""
    methods = []
    for epochs in lengths:
        methods.append(Method("distillspec", epochs=epochs))
        methods.append(Method("adaspec", epochs=epochs, reference_epochs=epochs))
    return methods


COMPARISONS: dict[str, list[Method]] = {
    "selection": [Method("adaspec", select=select) for select in ("top", "bottom", "random")],
    "controls": [
        Method("distillspec"),
        *[Method("adaspec", select=select) for select in SELECTIONS],
    ],
    "k": [Method("adaspec", k=tenths / 10) for tenths in range(1, 11)],
    "divergence": [
        *[Method("distillspec", divergence=loss) for loss in PAPER_DIVERGENCES],
        *[Method("adaspec", divergence=loss, gap=loss) for loss in PAPER_DIVERGENCES],
    ],
    "fine-tuning": [
        Method("distillspec", divergence="ce"),
        Method("distillspec"),
        Method("adaspec", divergence="ce", gap="ce", reference="ce"),
        Method("adaspec", reference="ce"),
        Method("adaspec"),
    ],
    "reference": [Method("adaspec", reference_epochs=epochs) for epochs in range(1, 6)],
    "epochs": [Method(name, epochs=epochs) for name in BOTH for epochs in (1, 2, 3, 6, 12)],
    # each length is twice the one before: where the passes of AdaSPEC's reference count too, it
    # stands beside the DistillSpec of the next line
    "passes": [*of_lengths(3, 6, 12, 24), Method("distillspec", epochs=48)],
    "long-passes": [
        *of_lengths(48),
        Method("adaspec", epochs=48, reference_epochs=48, select="random"),
        Method("distillspec", epochs=96),
    ],
    "rows": [Method("distillspec"), Method("adaspec"), LONG],
    "rates": [
        Method(name, lr=lr, decay=decay)
        for lr in (1e-5, 3e-4, 2e-3, 8e-3)
        for decay in DECAYS
        for name in BOTH
    ],
    "losses": [
        Method("distillspec", divergence=divergence, lr=lr)
        for lr in (1e-5, 3e-4, 2e-3)
        for divergence in ("fkl", "tvd", "lk", "lk_hybrid")
    ],
    "paper-mbpp": [  # the paper's cell of 6 epochs beside a reference of 30, and what it lacks
        *[Method("distillspec", epochs=epochs) for epochs in (6, 30, 36)],
        Method("adaspec", epochs=6, reference_epochs=30),
    ],
    "paper-gsm8k": [  # the paper's cell of 30 epochs beside a reference of 15, and both together
        *[Method("distillspec", epochs=epochs) for epochs in (30, 45)],
        Method("adaspec", epochs=30, reference_epochs=15),
    ],
    "seconds": [  # ways to make best as quick as AdaSPEC
        Method("adaspec"),
        LONG,
        METHODS["best"],
        *[replace(METHODS["best"], epochs=epochs) for epochs in (4, 5)],
        *[
            replace(METHODS["best"], batch=batch, lr=lr)
            for batch, lr in ((8, None), (8, 3e-3), (16, None), (16, 4e-3))
        ],
    ],
    "match": [
        Method("distillspec"),
        *[Method("adaspec", match=match) for match in ("steps", "epochs", "tokens")],
    ],
    "adaptive": [
        Method("adaspec"),
        Method("adaspec", k=0.1, k_end=0.7),
        Method("adaspec", k=0.7, k_end=0.1),
        Method("adaspec", k_end=1.0),
        Method("adaspec", k=1.0, k_end=0.4),
    ],
    "data": [
        *[Method(name, data=source) for name in BOTH for source in SOURCES],
        METHODS["best"],
        replace(METHODS["best"], data="target"),
    ],
    "best": [  # every variant that best was chosen from
        Method("adaspec"),
        Method("adaspec", match="tokens"),
        Method("adaspec", lr=4e-3),
        Method("adaspec", decay="linear"),
        Method("adaspec", decay="linear", batch=4),
        Method("adaspec", divergence="tvd", gap="tvd", decay="linear"),
        Method("adaspec", divergence="tvd", gap="tvd", k_end=1.0, decay="linear", batch=4),
        LONG,
        LINEAR,
        replace(LINEAR, batch=4),
        *[
            replace(LINEAR, divergence=divergence, batch=batch)
            for divergence in ("tvd", "lk", "lk_hybrid")
            for batch in (None, 8, 4)
        ],
        replace(LINEAR, divergence="tvd", lr=4e-3),
        replace(LINEAR, divergence="tvd", epochs=9, batch=4),
        replace(LINEAR, divergence="tvd", data="target"),
        replace(LINEAR, divergence="tvd", data="target", batch=4),
    ],
    "mixed": [
        MixedMethod(name, rows=rows) for rows in ("first", "in-turn", "all") for name in BOTH
    ],
    "grid": [  # the drafts of results/grid-tiny.json
        Method("distillspec"),
        Method("adaspec"),
        Method("adaspec", match="epochs"),
        Method("adaspec", match="tokens"),
        LONG,
        METHODS["best"],
        replace(METHODS["best"], epochs=9),
    ],
}


# The tiny target with drafts of other sizes, by their width
CAPACITIES = {
    f"tiny-{width}": replace(PAIRS["tiny"], draft=TINY_DRAFT | {"hidden_size": width})
    for width in (16, 32, 64, 128)
}

# Flags


def task_names(text: str) -> tuple[str, ...]:
    """The type of --tasks: tasks with commas between, or a mixed one, a+b."""
    names = tuple("+".join(some_of(TASKS)(name.replace("+", ","))) for name in text.split(","))
    for name in names:
        if names.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{name!r} is there twice")
    return names


def gamma_list(text: str) -> tuple[int, ...]:
    """The type of numbers of at least 1 with commas between."""
    values = numbers(text)
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text!r}")
    return values


@dataclass(frozen=True)
class StudySettings(Settings):
    """A run of a study: settings of run_all.py that have no flag there have one here."""

    split: str = flag(
        "test", one_of(["validation", "test"]), "rows that drafts are evaluated on", "evaluation"
    )
    eval_batch: int = flag(20, whole(), "prompts decoded together", "evaluation")
    target_seed: int | None = flag(
        None, whole(0), "one target, trained with this seed, for all --seeds", "grid"
    )


@dataclass(frozen=True)
class AblationSettings(StudySettings):
    comparison: str = ""
    methods: tuple = ()  # the comparison says which
    pairs: tuple[str, ...] = flag(
        ("tiny",),
        some_of([*PAIRS, *CAPACITIES, "custom"]),
        f"comma-separated, of {', '.join([*PAIRS, *CAPACITIES])}, custom",
        "grid",
    )
    tasks: tuple[str, ...] = flag(
        Settings.tasks, task_names, f"comma-separated, of {', '.join(TASKS)}, or a+b", "grid"
    )
    split: str = flag(
        "validation",
        one_of(["validation", "test"]),
        "rows that drafts are evaluated on: choose on validation",
        "evaluation",
    )
    timed_gammas: tuple[int, ...] | None = flag(
        None, gamma_list, "comma-separated: measure the speed-up for these too", "evaluation"
    )


# The evaluation, with the columns that studies add


def evaluate_variants(cell: Cell, target: Model, drafts: dict, costs: dict) -> list[dict]:
    """The drafts' rows of the table, with gap correlations (comparison "reference") and speed-ups
    by gamma (--timed-gammas)."""
    rows = evaluate_drafts(cell, target, drafts, costs)
    if rank() == 0 and cell.settings.comparison == "reference":
        add_correlations(cell, target, drafts, rows)
    if rank() == 0 and cell.settings.timed_gammas:
        add_speedups(cell, target, drafts, rows)
    return from_rank_0(rows)


def add_correlations(cell: Cell, target: Model, drafts: dict, rows: list[dict]) -> None:
    """How well the gap before stage 2 foretells what AdaSPEC's drafts learn (extras/analysis.py),
    unless the rows say so already."""
    if all("gap_correlation" in row for row in rows if row["draft"].startswith("AdaSPEC")):
        return
    finished = FinishedCell(cell.folder, target.path, drafts["base"].path)
    by_folder = cell_correlations(finished, cell.test, len(cell.tokenizer), cell.rows_at_once)
    for row in rows:
        row.update(by_folder.get(Path(drafts[row["draft"]].path), {}))
    store(cell, target, drafts, rows)


def add_speedups(cell: Cell, target: Model, drafts: dict, rows: list[dict]) -> None:
    """`speedup_by_gamma`: that of --gamma, and those of --timed-gammas measured, unless the rows
    say so already."""
    settings = cell.settings
    gammas = sorted({settings.gamma, *settings.timed_gammas})
    if all(list(row.get("speedup_by_gamma", {})) == list(map(str, gammas)) for row in rows):
        return
    prompts = [prompt_ids(e).to(cell.device)[None] for e in cell.test[: settings.timed_prompts]]
    network, networks = load_to_decode(cell, target, drafts)
    sampling = {"eos_token_id": cell.ends, "vocab_size": len(cell.tokenizer)}
    sampling["max_new_tokens"] = settings.max_new_tokens
    turns = len(settings.temperatures) * (len(gammas) - 1) * len(prompts)
    bar = progress(turns, f"{cell.task} speed-ups", "prompt")
    for temperature in settings.temperatures:
        sampling["temperature"] = temperature
        own_rows = {row["draft"]: row for row in rows if row["temperature"] == temperature}
        speedups = {label: {} for label in drafts}
        for gamma in gammas:
            speeds = own_rows
            if gamma != settings.gamma:
                speeds, _ = timings(network, networks, prompts, gamma, sampling, cell.seed, bar)
            for label in drafts:
                speedups[label][str(gamma)] = speeds[label]["speedup"]
        for label, row in own_rows.items():
            row["speedup_by_gamma"] = speedups[label]
    bar.close()
    store(cell, target, drafts, rows)


def store(cell: Cell, target: Model, drafts: dict, rows: list[dict]) -> None:
    """Put the rows, with their new columns, in the place of those in the cell's files."""
    for label, draft in drafts.items():
        path = evaluation_path(cell, label, target, draft)
        own_rows = [row for row in rows if row["draft"] == label]
        storage.write_json(path, storage.read_json(path) | {"rows": own_rows})


# Mixed tasks


@dataclass
class MixedCell(Cell):
    """A cell whose rows are those of several tasks."""

    parts: dict[str, Cell]  # by task


def prepare_mixed(
    pair_name: str, task: str, seed: int, settings: Settings, device, pairs: dict = PAIRS
) -> MixedCell:
    """A cell for each task of a+b, with one tokenizer, and the cell of all of them; the recipe is
    the first one's."""
    names = task.split("+")
    texts = []
    for name in names:
        texts += row_texts(name, load_rows(name, "train", settings.data_dir, settings.limit))
    parts = {
        name: prepare_cell(pair_name, name, seed, settings, device, pairs, texts) for name in names
    }
    if any(part.prompts_only for part in parts.values()):
        raise ValueError("mixed: rows without responses cannot be mixed; give them responses")
    first = parts[names[0]]
    merged = vars(first) | {
        "task": task,
        "folder": Path(settings.out, first.name, task, f"seed{seed}"),
        "examples": [example for part in parts.values() for example in part.examples],
        "test": [example for part in parts.values() for example in part.test],
        "validation": [example for part in parts.values() for example in part.validation],
        "dropped": tuple(map(sum, zip(*(part.dropped for part in parts.values()), strict=True))),
    }
    return MixedCell(**merged, parts=parts)


def run_mixed(cell: MixedCell, methods: Sequence[MixedMethod]) -> list[dict]:
    """As run_all.run_cell, with drafts that are trained on one task after the other, and evaluated
    on each."""
    say(cell.header)
    target, base_draft = base_models(cell)
    if cell.recipe.epochs[0]:
        target = fit(cell, target_plan(cell, target), fine_tuning_step)
    drafts, costs = {"base": base_draft}, {}
    for method in methods:
        stages = train_in_turn(cell, method, base_draft, target)
        drafts[method.label] = stages[-1]
        costs[method.label] = training_cost(cell, stages)
    if rank() == 0:
        storage.remove_folder(cell.folder / "cache")
    rows = []
    for name, part in cell.parts.items():
        held_out = replace(cell, task=f"{name} of {cell.task}", test=part.test)
        rows += evaluate_variants(held_out, target, drafts, costs)
    return rows


def train_in_turn(
    cell: MixedCell, method: MixedMethod, base_draft: Model, target: Model
) -> list[Model]:
    """The stages of a draft; the last one is the draft."""
    names = list(cell.parts)
    turns = {"all": [None], "first": names[:1], "in-turn": names}[method.rows]
    plain = METHODS[method.name]
    stages = []
    for name in turns:
        start = stages[-1] if stages else base_draft
        examples = cell.parts[name].examples if name else cell.examples
        suffix = f"-{name}" if name else ""
        if stages:
            suffix += f"-after-{start.fingerprint}"
        plan = renamed(draft_plan(cell, plain, start, target, examples), suffix)
        if method.name == "adaspec":
            uniform = draft_plan(cell, reference_method(cell, plain), start, target, examples)
            reference = fit(cell, renamed(uniform, suffix), distillation_step, target)
            stages += [reference, fit(cell, plan, adaspec_step, target, reference)]
        else:
            stages.append(fit(cell, plan, distillation_step, target))
    return stages


def renamed(plan: Plan, suffix: str) -> Plan:
    return replace(plan, name=plan.name + suffix)


# The command line


def parse_arguments(argv) -> tuple[AblationSettings, list[Method]]:
    parser = Parser(prog="python -m extras.ablations", description=__doc__, allow_abbrev=False)
    names = ", ".join(COMPARISONS)
    parser.add_argument("comparison", type=one_of(COMPARISONS), help=f"of {names}")
    add_flags(parser, AblationSettings)
    settings, _ = parse_settings(parser, argv, AblationSettings)
    for task in settings.tasks:
        if settings.comparison == "mixed" and "+" not in task:
            parser.error(f"mixed compares on tasks such as gsm8k+mbpp, and {task} is none")
        if settings.comparison != "mixed" and "+" in task:
            parser.error(f"--tasks {task} is for the comparison mixed")
    return settings, COMPARISONS[settings.comparison]


def main(argv=None) -> None:
    settings, methods = parse_arguments(argv)
    rows = []
    if settings.comparison == "mixed":
        prepare = partial(prepare_mixed, pairs=PAIRS | CAPACITIES)
        for cell in checked_cells(settings, methods, prepare):
            rows += run_mixed(cell, methods)
    else:
        prepare = partial(prepare_cell, pairs=PAIRS | CAPACITIES)
        for cell in checked_cells(settings, methods, prepare):
            rows += run_cell(cell, methods, evaluate_variants)
    print_tables(rows, settings.out)
    leave()


if __name__ == "__main__":
    run_command(main, "extras.ablations", resumes=True)
