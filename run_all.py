"""The driver: every task and model pair, from the base models to the table.

    python run_all.py --preset tiny                    # offline, CPU, minutes
    torchrun --nproc_per_node 8 run_all.py             # the paper's grid, 3-epoch regime
    torchrun --nproc_per_node 8 run_all.py --regime optimal --tasks gsm8k --pairs pythia

A cell is a pair, a task and a seed, and has a folder of stages (stages.py): the target fine-tuned,
the reference distilled, the drafts. Start the same command again and what is finished is used
again, what was stopped goes on, and a changed setting trains what depends on it, beside the other.
"""

import interrupt  # noqa: F401 -- first: it makes Ctrl-C during the other imports one line

# isort: split

import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path

import datasets
import torch.distributed as dist
import transformers

import storage
from cells import (
    Cell,
    base_models,
    check_cell,
    draft_plan,
    prepare_cell,
    reference_method,
    target_plan,
    with_short_head,
    write_missing_responses,
)
from cli import Parser, add_flags, run_command
from costs import predicted_speedups, recommend
from data import digest
from evaluate import evaluate
from models import ignored_settings, load_model
from ranks import from_rank_0, leave, rank, say, setup, world_size
from settings import Method, Settings, parse_settings
from speculative import pack_weights
from stages import fit, training_cost
from storage import Model
from tables import in_order, markdown_text, terminal_text, told_apart
from train import adaspec_step, distillation_step, fine_tuning_step


def run_cell(cell, methods: Sequence[Method], evaluation: Callable | None = None) -> list[dict]:
    """The paper's stages, those that are not done yet, and the evaluation of the drafts; returns
    the cell's rows of the table. (Studies have an evaluation of their own.)"""
    say(cell.header)
    target, base_draft = base_models(cell)
    if cell.recipe.epochs[0]:
        target = fit(cell, target_plan(cell, target), fine_tuning_step)  # stage 0
    if methods:  # to train on
        write_missing_responses(cell, target, base_draft)
    if cell.settings.draft_vocab:
        base_draft = with_short_head(cell, base_draft, target, methods)
    drafts = {"base": base_draft}
    costs = {}
    for method in methods:
        plan = draft_plan(cell, method, base_draft, target)
        if method.name == "adaspec":
            uniform = draft_plan(cell, reference_method(cell, method), base_draft, target)
            reference = fit(cell, uniform, distillation_step, target)  # stage 1
            draft = fit(cell, plan, adaspec_step, target, reference)  # stage 2, from the base draft
            stages = [reference, draft]
        else:
            draft = fit(cell, plan, distillation_step, target)  # DistillSpec's draft, or best
            stages = [draft]
        drafts[method.label] = draft
        costs[method.label] = training_cost(cell, stages)
    if rank() == 0:
        storage.remove_folder(cell.folder / "cache")
    return (evaluation or evaluate_drafts)(cell, target, drafts, costs)


# The evaluation, the last stage


def evaluate_drafts(
    cell, target: Model, drafts: dict, costs: dict, load: Callable = load_model
) -> list[dict]:
    """The drafts' rows of the table. The rows of each draft are a file, named by its label, the
    protocol and what the models are: used again, and replaced if prompts, temperatures or end
    tokens are others."""
    protocol = evaluation_protocol(cell)
    subject = {"prompts": digest(cell.test), "temperatures": list(cell.settings.temperatures)}
    subject["ends"] = cell.ends
    rows, paths = {}, {}
    for label, draft in drafts.items():
        paths[label] = evaluation_path(cell, label, target, draft)
        record = from_rank_0(storage.read_json(paths[label]) if rank() == 0 else None)
        if record.get("subject") == subject:
            rows[label] = record["rows"]
    missing = {label: draft for label, draft in drafts.items() if label not in rows}
    if missing:
        measured = measure_drafts(cell, target, missing, load)
        for label, draft in missing.items():
            folders = {"folder": Path(draft.path).name, "target": Path(target.path).name}
            more = costs.get(label, {}) | folders
            rows[label] = [protocol | row | more for row in measured if row["draft"] == label]
            if rank() == 0:
                record = {"subject": subject, "rows": rows[label]}
                record |= {"command": storage.command_line(), "git": storage.git_commit()}
                storage.write_json(paths[label], record)
    by_temperature = zip(*(rows[label] for label in drafts), strict=True)
    return [row for temperature in by_temperature for row in temperature]


def measure_drafts(cell, target: Model, drafts: dict, load: Callable) -> list[dict]:
    """Load the models and evaluate them on the held-out rows."""
    network, networks = load_to_decode(cell, target, drafts, load)
    name = f"{cell.task} evaluation"
    rows = evaluate(
        network, networks, cell.test, cell.tokenizer, cell.settings, cell.seed, name, cell.ends
    )
    return from_rank_0(rows)  # rank 0's have the timings


def load_to_decode(cell, target: Model, drafts: dict, load: Callable = load_model):
    """The target's network and those of the drafts {label: network}, made ready to decode with."""
    network = load(target.path, cell.dtype, cell.device)
    networks = {label: load(draft.path, cell.dtype, cell.device) for label, draft in drafts.items()}
    for model in (network, *networks.values()):
        pack_weights(model)
    return network, networks


def evaluation_path(cell, label: str, target: Model, draft: Model) -> Path:
    """The file of a draft's rows."""
    subject = {"draft": label, "models": [target.fingerprint, draft.fingerprint]}
    name = storage.fingerprint(evaluation_protocol(cell) | subject)
    return cell.folder / "evaluations" / f"{name}.json"


def evaluation_protocol(cell) -> dict:
    """What every row of the table says of how it was measured."""
    names = "split regime gamma max_new_tokens max_length dtype eval_batch".split()
    protocol = {"pair": cell.name, "task": cell.task, "seed": cell.seed}
    protocol |= {name: getattr(cell.settings, name) for name in names}
    protocol |= {"train_rows": len(cell.examples), "prompts": len(cell.test)}
    protocol["timed_prompts"] = min(cell.settings.timed_prompts, len(cell.test))
    return protocol | {"device": cell.device.type, "ranks": world_size()} | storage.versions()


def write_results(out: str, started: float) -> None:
    """Put the rows of all cells under `out`, not only this command's, into results.json, and their
    tables into results.md."""
    paths = sorted(Path(out).glob("*/*/seed*/evaluations/*.json"))
    records = [record for record in map(storage.read_json, paths) if record]
    results = {
        "commands": list(dict.fromkeys(record["command"] for record in records)),
        "seconds": round(time.time() - started),
        "git": storage.git_commit(),
        **storage.versions(),
        "machine": storage.machine(),
        "rows": [row for record in records for row in record["rows"]],
    }
    storage.write_json(Path(out, "results.json"), results)
    page = markdown_text(in_order(told_apart(results["rows"])), results["machine"])
    storage.write_file(Path(out, "results.md"), lambda file: file.write(page.encode()))


# From the command line to the cells


def main(argv=None) -> None:
    """Run the grid that the command line asks for. Raises ValueError, in one line, for what cannot
    work, before anything is trained."""
    parser = Parser(prog="run_all.py", description=__doc__)
    add_flags(parser, Settings)
    add_flags(parser, Method)
    settings, methods = parse_settings(parser, argv)
    rows = []
    samples = {}  # of a pair of one's own, by task: `sample_command` of the best seed
    for cell in checked_cells(settings, methods):
        cell_rows = run_cell(cell, methods)
        rows += cell_rows
        if cell.name.startswith("custom"):
            sample = sample_command(cell, cell_rows)
            samples[cell.task] = max(sample, samples.get(cell.task, sample))
    print_tables(rows, settings.out)
    if samples:
        say("To serve the pair: docs/serving.md. To try it:\n")
        say("\n\n".join(command for _, command in samples.values()))
    leave()


def checked_cells(
    settings: Settings, methods: Sequence[Method], prepare: Callable = prepare_cell
) -> Iterator[Cell]:
    """Join the ranks, check every cell of the grid, then give one after the other to be run; after
    each of them results.json is written. (Studies prepare cells of their own.)"""
    started = time.time()
    device = setup()
    default_dtype = "bfloat16" if device.type == "cuda" else "float32"
    settings = replace(settings, dtype=settings.dtype or default_dtype)
    quiet_libraries()
    if settings.shard_target and not dist.is_initialized():
        raise ValueError("--shard-target spreads the target over ranks: start with torchrun")
    with storage.lock(Path(settings.out)) if rank() == 0 else nullcontext():
        from_rank_0()  # the folder is there
        say("Plan")
        for pair, task in product(settings.pairs, settings.tasks):
            # seeds differ in nothing that is checked
            cell = prepare(pair, task, settings.seeds[0], settings, device)
            check_cell(cell, methods)
            say(cell.announcement)
            if task == settings.tasks[0]:
                say_ignored_settings(cell)
        for pair, task, seed in product(settings.pairs, settings.tasks, settings.seeds):
            cell = prepare(pair, task, seed, settings, device)
            yield cell
            if rank() == 0:
                write_results(settings.out, started)
                if methods and seed == settings.seeds[-1]:
                    storage.remove_folder(cell.cache_folder)


def say_ignored_settings(cell: Cell) -> None:
    """What a pretrained pair would generate with elsewhere, and does not here."""
    if not isinstance(cell.pair.target, dict):
        ignored = ignored_settings(*cell.model_names[: len(cell.pair.models)])
        if ignored:
            say(ignored)


def print_tables(rows: list[dict], out: str) -> None:
    say(f"\n{terminal_text(rows)}\n")
    say(f"Results: {out}/results.json and results.md; models: {out}/<pair>/<task>/seed<n>/")


def sample_command(cell, rows: list[dict]) -> tuple[float, str]:
    """The largest speed-up of a draft that the cost model predicts, and the command that decodes a
    held-out prompt with this draft: a trained one, or where none was trained the one given."""
    trained = [row for row in rows if row["draft"] != "base"]
    best = max(trained or rows, key=lambda row: max(predicted_speedups(row).values(), default=0.0))
    predictions = predicted_speedups(best) or {cell.settings.gamma: 0.0}
    gamma = recommend(predictions)
    draft = cell.folder / best["folder"] if trained else cell.model_names[1]
    target = cell.folder / best["target"] if cell.recipe.epochs[0] else cell.model_names[0]
    arguments = ["--target", str(target), "--draft", str(draft), "--gamma", str(gamma)]
    arguments += ["--temperature", f"{best['temperature']:g}"]
    arguments += prompt_arguments(cell)
    return predictions[gamma], f"python speculative.py {shlex.join(arguments)}"


def prompt_arguments(cell) -> list[str]:
    """The arguments of speculative.py that give it the cell's sample; a chat of several turns is
    written to a file."""
    prompt = cell.sample
    if isinstance(prompt, str):
        return ["--prompt", prompt]
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return ["--chat", "--prompt", prompt[0]["content"]]
    path = cell.folder / "sample.jsonl"
    line = json.dumps({"messages": prompt}) + "\n"
    storage.write_file(path, lambda file: file.write(line.encode()))
    return ["--prompts", str(path)]


def quiet_libraries() -> None:
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    if rank() != 0:
        transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    run_command(main, "run_all.py", resumes=True)
