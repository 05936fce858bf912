"""A stage: one model trained by one step, kept as a folder that says what made it.

`fit` is every stage of the paper. What the frozen models say of the training rows is computed
once (teacher.py), and so are responses that the target writes.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import storage
from data import Example, digest, prompts_alone, read_examples, write_examples
from distillspec import OnPolicy, ResponseWriter
from history import History, Validation
from models import load_model, scratch_model, short_head_tensors
from ranks import check_stop, from_rank_0, gather_objects, progress, rank, say, world_size
from settings import Method
from storage import Model, fingerprint
from teacher import Frozen, ReferenceLoss, TokenCache, shard_layers
from train import TRAINING_VERSION, train

BATCH_WITH_DRAFT = 4  # responses that the target writes at a time where a draft speeds it up


@dataclass
class Plan:
    """How a stage is trained."""

    name: str  # of its folder
    init: Model | dict  # what it starts from: a model, or the sizes of a new one
    examples: Sequence[Example]
    lr: float
    epochs: int
    batch_size: int
    seed: int
    decay: str = "constant"
    max_steps: int | None = None
    method: Method | None = None  # of a draft
    on_policy: OnPolicy | None = None


def fit(
    cell, plan: Plan, step: Callable, target: Model | None = None, reference: Model | None = None
) -> Model:
    """Train a stage by `step`, or find it finished.

    Its folder is under the plan's seed, which differs from the cell's only for a target that is
    shared by all seeds.
    """
    settings = stage_settings(cell, plan, target, reference)
    folder = cell.folder.with_name(f"seed{plan.seed}") / plan.name
    folder = storage.stage_folder(folder, settings)
    finished = storage.finished_stage(folder, settings)
    if finished:
        return finished
    step_inputs = []
    teacher, reference_loss = None, None
    validation = Validation(cell.validation, cell.rows_at_once)
    if target:
        teacher = open_target(cell, plan, target, validation)
        if teacher and teacher.cache and teacher.head.token_ids is not None:
            keep_outside(cell, plan, target, teacher)
        step_inputs.append(teacher)
    if reference:
        reference_loss = open_reference(cell, plan, teacher, target, reference)
        step_inputs.append(reference_loss)
    if plan.method:
        step_inputs.append(plan.method)
    model = initial_model(cell, plan)
    options = training_options(cell, plan, folder, settings, validation)
    summary = train(model, plan.examples, step, step_inputs, **options)
    summary["target_forwards"] = target_forwards(cell, plan, teacher, reference_loss, summary)
    summary["cache_seconds"] = cache_seconds(teacher, reference_loss)
    summary |= short_head_summary(teacher)
    history = options["history"]
    return storage.save_stage(folder, settings, summary, model, cell.tokenizer, history)


def initial_model(cell, plan: Plan):
    if isinstance(plan.init, dict):
        return scratch_model(plan.init, cell.tokenizer, plan.seed).to(cell.device)
    return load_model(plan.init.path, torch.float32, cell.device)


def training_options(
    cell, plan: Plan, folder: Path, settings: dict, validation: Validation | None = None
) -> dict:
    """The keyword arguments of `train` for the stage in `folder`."""
    checkpoints = storage.checkpoint_folder(folder)
    log_dir = None
    if cell.settings.log_dir:
        log_dir = Path(cell.settings.log_dir) / folder.relative_to(cell.settings.out)
    return {
        "vocab_size": len(cell.tokenizer),
        "lr": plan.lr,
        "epochs": plan.epochs,
        "batch_size": plan.batch_size,
        "micro_batch": cell.settings.micro_batch,
        "decay": plan.decay,
        "dtype": cell.settings.dtype,
        "seed": plan.seed,
        "max_steps": settings["max_steps"],
        "name": f"{cell.task} {plan.name}",
        "checkpoints": storage.Checkpoints(checkpoints, fingerprint(settings)),
        "save_minutes": cell.settings.save_minutes,
        "on_policy": plan.on_policy,
        "history": History(checkpoints / storage.HISTORY, validation, log_dir),
    }


def stage_settings(cell, plan: Plan, target: Model | None, reference: Model | None) -> dict:
    """All that a stage's result hangs on; its fingerprint stands for it."""
    limits = [steps for steps in (cell.settings.max_steps, plan.max_steps) if steps]
    settings = {
        "version": TRAINING_VERSION,
        "stage": plan.name,
        "init": plan.init if isinstance(plan.init, dict) else plan.init.fingerprint,
        "data": digest(plan.examples),
        "lr": plan.lr,
        "decay": plan.decay,
        "epochs": plan.epochs,
        "batch_size": plan.batch_size,
        "max_steps": min(limits, default=None),
        "seed": plan.seed,
        "dtype": cell.settings.dtype,
    }
    if target:
        settings |= {"target": target.fingerprint, "divergence": plan.method.divergence}
        settings["source"] = response_source(cell, plan)
    if reference:
        method = plan.method
        settings |= {"reference": reference.fingerprint, "gap": method.gap, "select": method.select}
        settings |= {"k": method.k, "k_end": method.k_end}
        if cell.settings.micro_batch:  # the filter is over what the ranks process together
            settings |= {"micro_batch": cell.settings.micro_batch, "ranks": world_size()}
    return settings


def response_source(cell, plan: Plan) -> list:
    """Who writes the responses, for the fingerprint."""
    method = plan.method
    if not plan.on_policy:
        return [method.data]
    run = cell.settings
    return [
        method.data, method.share, method.refresh,
        run.max_new_tokens, run.max_length, run.eval_batch, world_size(),
    ]  # fmt: skip


# Frozen models


def open_target(
    cell, plan: Plan, target: Model, validation: Validation | None = None
) -> Frozen | None:
    """The target, its hidden states in a cache where rows are fixed and it fits; None where the
    losses do without it. It is asked about the validation rows while it has its trunk."""
    losses = {plan.method.divergence}
    if plan.method.name == "adaspec":
        losses.add(plan.method.gap)
    if losses == {"ce"}:
        return None
    network = load_model(target.path, cell.dtype, cell.device)
    token_ids = short_head_ids(plan)
    teacher = Frozen(network, len(cell.tokenizer), token_ids)
    if cell.settings.shard_target:
        shard_layers(teacher.model)
    if validation:
        validation.ask(teacher)
    if not plan.on_policy:
        width = teacher.head.linear.weight.shape[1]
        cache = token_cache(cell, "target", target.fingerprint, plan.examples, width, cell.dtype)
        if cache:
            teacher.use(cache, f"{cell.task} target cache")
    return teacher


def short_head_ids(plan: Plan) -> torch.Tensor | None:
    """The tokens that the draft's short head is of."""
    if isinstance(plan.init, Model):
        return short_head_tensors(plan.init.path).get("token_ids")
    token_ids = plan.init.get("token_ids")
    return None if token_ids is None else torch.tensor(token_ids)


def keep_outside(cell, plan: Plan, target: Model, teacher: Frozen) -> None:
    """Give the target of a draft with a short head a cache of its odds of the other tokens; says
    what probability is left for the draft's."""
    models = target.fingerprint + fingerprint({"token_ids": teacher.head.token_ids.tolist()})
    cache = token_cache(cell, "odds", models, plan.examples, 1, torch.float32)
    if not cache:
        return
    teacher.use_outside(cache, cell.device, f"{cell.task} short head")
    say_coverage(cell, teacher)


def say_coverage(cell, teacher: Frozen) -> None:
    say(
        f"  short head: {teacher.head.size} of {len(cell.tokenizer)} tokens, with "
        f"{teacher.coverage:.4f} of the target's probability, a bound on alpha at T = 1"
    )


def short_head_summary(teacher: Frozen | None) -> dict:
    """What a stage's summary says of the draft's short head; nothing of a whole one."""
    if not teacher or teacher.head.token_ids is None:
        return {}
    return {"draft_vocab": teacher.head.size, "coverage": teacher.coverage}


def open_reference(cell, plan: Plan, teacher, target: Model, reference: Model) -> ReferenceLoss:
    """The reference's loss per token, in a cache under the same conditions."""
    frozen = Frozen(load_model(reference.path, cell.dtype, cell.device), len(cell.tokenizer))
    losses = ReferenceLoss(frozen, teacher, plan.method.gap)
    if not plan.on_policy:
        models = target.fingerprint + reference.fingerprint + plan.method.gap
        cache = token_cache(cell, "reference", models, plan.examples, 1, torch.float32)
        if cache:
            losses.use(cache, cell.device, f"{cell.task} reference cache")
    return losses


def token_cache(cell, kind: str, models: str, examples, width: int, dtype) -> TokenCache | None:
    """A cache of what the models say of the examples, yet to be filled; None where it would not
    fit."""
    identity = {"of": models, "data": digest(examples), "dtype": cell.settings.dtype}
    identity["batch"] = cell.rows_at_once
    folder = cell.cache_folder / kind
    cache = TokenCache(folder, fingerprint(identity), examples, width, dtype, cell.rows_at_once)
    there = sum(path.stat().st_size for path in folder.glob(f"{cache.fingerprint}*.bin"))
    cell.folder.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(cell.folder).free + there
    fits = from_rank_0(cache.bytes <= min(cell.settings.cache_gb * 2**30, room))
    note = "" if fits else ", too large: computed anew in every step"
    say(f"  {kind} cache: {cache.bytes / 2**30:.3f} GiB{note}")
    return cache if fits else None


# Responses that models write


def response_writer(cell) -> ResponseWriter:
    return ResponseWriter(
        ends=cell.ends,
        vocab_size=len(cell.tokenizer),
        max_new_tokens=cell.settings.max_new_tokens,
        max_length=cell.settings.max_length,
        batch_size=4 * cell.settings.eval_batch,
    )


def on_policy(cell, method: Method, examples: Sequence[Example]) -> OnPolicy | None:
    """Who writes the draft's responses as it learns; None where they are fixed."""
    if not method.on_policy:
        return None
    return OnPolicy(
        writer=response_writer(cell),
        examples=examples,
        share=1.0 if method.data == "on-policy" else method.share,
        refresh=method.refresh,
        seed=cell.seed,
        rank=rank(),
        ranks=world_size(),
    )


def written_by_target(
    cell, target: Model, draft: Model | None, examples: Sequence[Example]
) -> list[Example]:
    """The examples with responses that the target writes, in blocks that are kept as they are
    written, each rank its share: a stopped run goes on with the next block. Pairs share them, and
    where the target is taken as it is, so do seeds."""
    writer = response_writer(cell)
    if cell.settings.write_with_draft:
        writer.batch_size = BATCH_WITH_DRAFT
    seed = cell.seed if cell.recipe.epochs[0] else 0
    temperatures = cell.settings.write_temperature
    settings = {"target": target.fingerprint, "prompts": digest(prompts_alone(examples))}
    settings |= {"seed": seed, "dtype": cell.settings.dtype, "writer": vars(writer)}
    settings |= {"temperatures": temperatures, "with_draft": cell.settings.write_with_draft}
    prefix = Path(cell.settings.out, "written", fingerprint(settings))
    blocks = response_blocks(examples, temperatures, writer.batch_size)
    paths = [prefix.with_name(f"{prefix.name}-{n:05d}.tokens") for n in range(len(blocks))]
    own = range(rank(), len(blocks), world_size())
    missing = [number for number in own if not storage.is_whole(paths[number])]
    if missing:
        count = sum(len(blocks[number][1]) for number in missing)
        say(f"  the target writes {count} responses, kept in batches of {writer.batch_size}")
        model = load_model(target.path, cell.dtype, cell.device)
        helper = None
        if cell.settings.write_with_draft:
            helper = load_model(draft.path, cell.dtype, cell.device)
        bar = progress(count, f"{cell.task} responses of the target", "response")
        for number in missing:
            temperature, rows = blocks[number]
            prompts = [examples[row] for row in rows]
            block_seed = seed * 1_000_003 + number
            written = writer.write(model, prompts, block_seed, temperature, helper)
            write_examples(paths[number], written)
            bar.update(len(rows))
            check_stop()
        bar.close()
    gather_objects(None)  # wait for all
    by_row = {}
    for (_, rows), path in zip(blocks, paths, strict=True):
        by_row |= zip(rows, read_examples(path)[0], strict=True)
    return [by_row[row] for row in range(len(examples))]


def response_blocks(
    examples: Sequence[Example], temperatures: Sequence[float], size: int
) -> list[tuple[float, list[int]]]:
    """(temperature, rows) of every batch that is written: rows take the temperatures in turn, and
    a batch holds prompts of similar lengths."""
    blocks = []
    for i, temperature in enumerate(temperatures):
        rows = range(i, len(examples), len(temperatures))
        order = sorted(rows, key=lambda row: examples[row].prompt_length)
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        blocks += [(temperature, part) for part in parts]
    return blocks


# What training costs


def target_forwards(
    cell, plan: Plan, teacher: Frozen | None, reference_loss: ReferenceLoss | None, summary: dict
) -> dict[str, int]:
    """Rows that the target was run on for this stage, by what they can be shared with: a cache, and
    responses that the target wrote (a call a token then)."""
    rows = {}
    if teacher and teacher.cache:
        rows[f"cache {teacher.cache.fingerprint}"] = len(plan.examples)
    elif teacher:
        rows[f"steps of {plan.name}"] = summary["rows"]
        if reference_loss and reference_loss.cache and reference_loss.name != "ce":
            rows[f"cache {reference_loss.cache.fingerprint}"] = len(plan.examples)
    if plan.method and (plan.method.data == "target" or cell.is_written):
        rows[f"written {digest(plan.examples)}"] = len(plan.examples)
    return rows


def cache_seconds(teacher: Frozen | None, reference_loss: ReferenceLoss | None) -> dict[str, float]:
    """Seconds that filling the stage's caches took, by cache: other stages share them."""
    caches = [teacher.cache, teacher.outside_cache] if teacher else []
    if reference_loss:
        caches.append(reference_loss.cache)
    return {cache.fingerprint: round(cache.seconds, 1) for cache in caches if cache}


def training_cost(cell, stages: Sequence[Model]) -> dict:
    """What a draft's training took, its reference's included: passes over the data, optimiser
    steps, tokens that bore loss, seconds, those of filling the caches (responses that the target
    writes are in neither), and rows that the target was run on; and the draft's learning rate, and
    of a short head the number of its tokens and their coverage."""
    records = [storage.read_json(Path(stage.path, "stage.json")) for stage in stages]
    summaries = [record["summary"] for record in records]
    keys = ("rows", "steps", "loss_tokens", "seconds")
    cost = {key: sum(summary[key] for summary in summaries) for key in keys}
    forwards, filling = {}, {}
    for summary in summaries:
        forwards |= summary["target_forwards"]
        filling |= summary["cache_seconds"]
    cost["epochs"] = cost["rows"] / len(cell.examples)
    cost["target_forwards"] = sum(forwards.values())
    cost["cache_seconds"] = sum(filling.values())
    cost["lr"] = records[-1]["settings"]["lr"]
    short_head = {"draft_vocab", "coverage"} & summaries[-1].keys()
    return cost | {key: summaries[-1][key] for key in sorted(short_head)}
