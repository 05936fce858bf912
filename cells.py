"""A cell: the rows, models and settings of one pair, task and seed, and the plans of its stages."""

import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cli import printable
from data import (
    TASKS,
    Example,
    all_tokens,
    as_chats,
    encode,
    encode_once,
    load_rows,
    train_tokenizer,
)
from head import Head
from models import (
    check_model,
    end_tokens,
    keep_layers,
    load_model,
    model_identity,
    resolve_model,
    scratch_model,
    training_tokenizer,
)
from ranks import check_stop, from_rank_0, rank, say, world_size
from settings import PAIRS, Method, Pair, Recipe, Settings, recipe
from short_head import frequent_tokens, shorten_head
from speculative import Lane
from stages import Plan, fit, on_policy, written_by_target
from storage import Model, fingerprint, finished_stage, save_stage, stage_folder
from train import DTYPES, fine_tuning_step, fraction_kept

SCRATCH_VOCABULARY = 512  # of a pair that is given by sizes
SCRATCH_LR, SCRATCH_EPOCHS, SCRATCH_BATCH = 2e-3, 2, 16  # its pretraining, on whole train rows


@dataclass
class Cell:
    """One pair, task and seed of a run."""

    name: str  # of the pair, in folders and tables
    task: str
    seed: int
    settings: Settings
    pair: Pair
    recipe: Recipe
    device: torch.device
    folder: Path
    tokenizer: object
    ends: list[int]  # the tokens that end a response
    examples: list[Example]  # training rows
    test: list[Example]  # held-out rows
    sample: str | list[dict]  # the shortest of their prompts, a text or a chat
    validation: list[Example]  # a few others, to watch drafts learn
    dropped: tuple[int, int]  # rows of both without a response within max_length
    model_names: list[str]  # target, draft; a pair with another kind of draft has the target alone
    models: list[torch.nn.Module]  # likewise, without weights
    is_written: bool  # whether the target has written responses that rows lacked

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.settings.dtype]

    @property
    def target_seed(self) -> int:
        shared = self.settings.target_seed
        return self.seed if shared is None else shared

    @property
    def cache_folder(self) -> Path:
        """Where is kept what the frozen models say. A target that is taken as it is says the same
        to all seeds: run_all.py removes its cache after the last, others after each cell."""
        shared = Path(self.settings.out, "frozen-cache")
        return self.folder / "cache" if self.recipe.epochs[0] else shared

    @property
    def prompts_only(self) -> bool:
        """Whether the training rows have no responses (yet): the target writes them."""
        return not any(example.has_response for example in self.examples)

    @property
    def rows_at_once(self) -> int:
        return self.settings.micro_batch or self.recipe.batch_size

    @property
    def header(self) -> str:
        return f"\n{self.name} / {self.task} / seed {self.seed}: {self.sizes}"

    @property
    def sizes(self) -> str:
        return (
            f"{len(self.examples)} train rows, {len(self.test)} {self.settings.split} prompts "
            f"({self.dropped[0]} and {self.dropped[1]} rows dropped: no response within "
            f"{self.settings.max_length} tokens)"
        )

    @property
    def announcement(self) -> str:
        """The line that announces the cell, all its seeds together."""
        seeds = ", ".join(map(str, self.settings.seeds))
        epochs = ", ".join(map(str, self.recipe.epochs))
        text = (
            f"{self.name} / {self.task} / seed {seeds}: {self.sizes}; "
            f"epochs of target, reference, draft: {epochs}"
        )
        if self.settings.max_steps:
            text += f", at most {self.settings.max_steps} steps each"
        return text


# Making and checking a cell


def prepare_cell(
    pair_name: str,
    task: str,
    seed: int,
    settings: Settings,
    device,
    pairs: dict = PAIRS,
    texts: list[str] | None = None,
) -> Cell:
    """Load and tokenise the cell's rows and look at its models, without weights. The tokenizer of
    a pair from scratch is trained on `texts`, or else on the cell's own training rows.

    Raises ValueError where rows, models or tokenizers are missing or do not fit.
    """
    check_stop()
    own_pair = Pair(settings.target, settings.draft or settings.draft_layers)
    pair = own_pair if pair_name == "custom" else pairs[pair_name]
    load = partial(load_rows, task, data_dir=settings.data_dir, dataset=settings.dataset)
    rows = load("train", limit=settings.limit)
    test_rows = load(settings.split, limit=settings.eval_prompts)
    watched = validation_rows(load, settings.validation_rows)
    if isinstance(pair.target, dict):
        if settings.chat:
            raise ValueError(f"--chat: the pair {pair_name} is from scratch, without a template")
        names = [f"{pair_name}'s target", f"{pair_name}'s draft"]
        tokenizer = train_tokenizer(texts or row_texts(task, rows), SCRATCH_VOCABULARY)
        with torch.device("meta"):
            models = [scratch_model(sizes, tokenizer, seed) for sizes in pair.models]
    else:
        names, models = pretrained_models(pair, settings)
        tokenizer = training_tokenizer(names[0], names[len(pair.models) - 1])
    form = task
    if settings.chat:
        form = "custom"
        parts = (rows, test_rows, watched)
        rows, test_rows, watched = (
            as_chats(task, part, tokenizer, settings.max_length) for part in parts
        )
    examples, dropped = encode_rows(form, rows, tokenizer, settings)
    test, test_dropped = encode_rows(form, test_rows, tokenizer, settings)
    prompts = [TASKS[form].prompt(row) for row in test_rows]
    name = own_name(names, pair, settings) if pair_name == "custom" else pair_name
    return Cell(
        name=name,
        task=task,
        seed=seed,
        settings=settings,
        pair=pair,
        recipe=recipe(task, pair_name, pair, settings),
        device=device,
        folder=Path(settings.out, name, task, f"seed{seed}"),
        tokenizer=tokenizer,
        ends=response_ends(models[0], form, [*rows, *test_rows], tokenizer),
        examples=examples,
        test=test,
        sample=min(filter(None, prompts), key=lambda prompt: len(str(prompt))),
        validation=encode(form, watched, tokenizer, settings.max_length)[0],
        dropped=(dropped, test_dropped),
        model_names=names[: len(models)],
        models=models,
        is_written=False,
    )


def validation_rows(load: Callable, count: int) -> list:
    """The first validation rows; none, which is said, where there are none to read: that only costs
    the watching."""
    try:
        return load("validation", limit=count) if count else []
    except ValueError as error:
        say(f"  alpha is not watched in training: {error}")
        return []


def pretrained_models(pair: Pair, settings: Settings) -> tuple[list[str], list[torch.nn.Module]]:
    """Folders or Hub ids of a pair's models, and the models without weights."""
    names = [resolve_model(name, settings.models_dir) for name in pair.models]
    models = [check_model(name) for name in names]
    if isinstance(pair.draft, int):
        names.append(f"{names[0]}'s draft")  # it is yet to be made
        models.append(keep_layers(check_model(names[0]), range(pair.draft)))
    return names, models


def own_name(names: list[str], pair: Pair, settings: Settings) -> str:
    """The name of the pair custom, by what its models are: two folders may have one name."""
    short_names = [short_name(name) for name in names]
    identities = [model_identity(name, Path(settings.out)) for name in names[: len(pair.models)]]
    if isinstance(pair.draft, int):
        short_names[1] = f"{pair.draft}-layer"
        identities.append(pair.draft)
    return f"custom-{'-'.join(short_names)}-{fingerprint({'models': identities})[:8]}"


def short_name(name: str) -> str:
    """The last part of a folder or Hub id, and the one before where that is a mere role."""
    path = Path(name)
    if path.is_dir():
        path = Path(os.path.abspath(path))
    is_role = path.name.lower() in ("target", "draft", "model", "checkpoint")
    return "-".join(path.parts[-2:]) if is_role and path.parent.name else path.name


def row_texts(task: str, rows) -> list[str]:
    """The rows as texts. Raises ValueError for a chat, which needs a tokenizer with a template."""
    texts = []
    for row in rows:
        prompt, response = TASKS[task].prompt(row), TASKS[task].response(row)
        if not isinstance(prompt, str):
            raise ValueError(f"{row.source}: a chat, and a pair from scratch has no chat template")
        texts.append(prompt + (response or ""))
    return texts


def response_ends(target, task: str, rows, tokenizer) -> list[int]:
    """The tokens that end a response: the target's (`models.end_tokens`), and the tokenizer's end
    token, which ends the rows."""
    is_chat = any(not isinstance(TASKS[task].prompt(row), str) for row in rows)
    ends = end_tokens(target, tokenizer, is_chat)
    return sorted({tokenizer.eos_token_id, *ends})


def encode_rows(task: str, rows, tokenizer, settings: Settings) -> tuple[list[Example], int]:
    """The examples, and how many rows were dropped. Rank 0 tokenises first, and the others then
    read what it has written. Raises ValueError where no rows are left."""
    folder = Path(settings.out, "tokenised")
    if rank() > 0:
        from_rank_0()
    examples, dropped = encode_once(folder, task, rows, tokenizer, settings.max_length)
    if rank() == 0:
        from_rank_0()
    if not examples and not any(has_text(task, row) for row in rows):
        raise ValueError(f"{task}: the prompt or the response of every row is empty")
    if not examples:
        raise ValueError(
            f"{task}: no rows are left within {settings.max_length} tokens; raise --max-length"
        )
    return examples, dropped


def has_text(task: str, row) -> bool:
    prompt, response = TASKS[task].prompt(row), TASKS[task].response(row)
    return bool(prompt) and (response is None or bool(response.strip()))


def check_cell(cell: Cell, methods: list[Method]) -> None:
    """What training and evaluation will ask of the cell. Raises ValueError for what would fail
    days later."""
    settings = cell.settings
    longest = max(example.prompt_length for example in cell.test) + settings.max_new_tokens
    for name, model in zip(cell.model_names, cell.models, strict=True):
        context = getattr(model.config, "max_position_embeddings", sys.maxsize)
        if context < max(longest, settings.max_length):
            raise ValueError(
                f"{printable(name)} has a context of {context} tokens; --max-length is "
                f"{settings.max_length}, and the longest prompt with --max-new-tokens "
                f"{settings.max_new_tokens} takes {longest}"
            )
        Head(model, len(cell.tokenizer))
        Lane(model, torch.zeros(2, 1, dtype=torch.long))  # can it be decoded, in a batch?
        for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(model.config, key, None) not in (None, 1):  # Head.check finds others
                raise ValueError(
                    f"{printable(name)} changes its logits after the output head ({key}); "
                    "the loss here would miss that"
                )
    if cell.prompts_only and cell.recipe.epochs[0]:
        raise ValueError(
            f"{cell.task}: the rows have no responses to fine-tune the target on; take it as it "
            "is: --epochs 0,3,3"
        )
    check_short_heads(cell, methods)
    if methods or cell.recipe.epochs[0]:
        check_training(cell, methods)


def check_training(cell: Cell, methods: list[Method]) -> None:
    """Raises ValueError where batches do not feed the ranks, or the cache does not fit the disk."""
    settings = cell.settings
    sizes = [cell.recipe.batch_size, *(method.batch for method in methods if method.batch)]
    rows = min(*sizes, len(cell.examples))
    if rows < world_size():
        raise ValueError(
            f"{cell.task}: batches of {rows} rows do not feed {world_size()} ranks; raise --batch"
        )
    tokens = sum(int(example.bears_loss.sum()) for example in cell.examples)
    if cell.prompts_only:
        tokens = settings.max_new_tokens * len(cell.examples)
    width = cell.models[0].get_output_embeddings().weight.shape[1]
    cache = tokens * width * cell.dtype.itemsize / 2**30
    cached = sum(path.stat().st_size for path in cell.cache_folder.glob("*/*.bin")) / 2**30
    free = shutil.disk_usage(settings.out).free / 2**30
    if free + cached < cache <= settings.cache_gb:
        raise ValueError(
            f"{cell.task}: the target's cached states take {cache:.3f} GiB, and --out "
            f"{settings.out} has {free:.3f} free; make room, or lower --cache-gb"
        )


def check_short_heads(cell: Cell, methods: list[Method]) -> None:
    """Raises ValueError where there is a short head (short_head.py) and cannot be one."""
    size = cell.settings.draft_vocab
    is_short = [hasattr(model.get_output_embeddings(), "token_ids") for model in cell.models]
    if is_short[0]:
        raise ValueError(
            f"{printable(cell.model_names[0])} has a short output head (draft_vocab_size): "
            "a draft's, not a target's"
        )
    if size and is_short[-1]:
        name = printable(cell.model_names[-1])
        raise ValueError(f"--draft-vocab: {name} has a short head already; leave the flag out")
    if size and size > len(cell.tokenizer):
        raise ValueError(f"--draft-vocab {size} is more than the {len(cell.tokenizer)} tokens")
    losses = {loss for method in methods for loss in (method.divergence, method.gap)}
    losses |= {method.reference for method in methods}
    if (size or any(is_short)) and "ce" in losses:
        raise ValueError(
            "the loss ce asks for tokens that a short output head lacks; take another, or the "
            "whole head"
        )


# The plans of the stages


def write_missing_responses(cell: Cell, target: Model, draft: Model | None) -> None:
    """Rows that have no response get one of the target's."""
    cell.is_written = cell.prompts_only
    cell.examples = with_responses(cell, target, draft, cell.examples)
    cell.validation = with_responses(cell, target, draft, cell.validation)


def with_responses(
    cell: Cell, target: Model, draft: Model | None, examples: list[Example]
) -> list[Example]:
    if all(example.has_response for example in examples):
        return examples
    return written_by_target(cell, target, draft, examples)


def base_models(cell: Cell) -> tuple[Model, Model | None]:
    """Target and draft before any stage: pretrained elsewhere or here, or the target's layers."""
    if isinstance(cell.pair.target, dict):
        target = pretrained(cell, "base-target", cell.pair.target, cell.target_seed)
        draft = cell.pair.draft and pretrained(cell, "base-draft", cell.pair.draft, cell.seed)
        return target, draft
    out = Path(cell.settings.out)
    names = cell.model_names[: len(cell.pair.models)]
    models = [Model(name, model_identity(name, out)) for name in names]
    if isinstance(cell.pair.draft, int):
        models.append(first_layers(cell, models[0]))
    return models[0], models[1] if cell.pair.draft else None


def first_layers(cell: Cell, target: Model) -> Model:
    """A draft of the target's first layers, untrained: one for all tasks and seeds of the pair."""
    folder = Path(cell.settings.out, cell.name, "base-draft")
    settings = {"target": target.fingerprint, "first layers": cell.pair.draft}
    finished = finished_stage(folder, settings)
    if finished:
        return finished
    say(f"  {folder.name}: made of the target's first layers, {cell.pair.draft} in all")
    draft = None
    if rank() == 0:
        draft = keep_layers(load_model(target.path, "auto"), range(cell.pair.draft))
    return save_stage(folder, settings, {}, draft, cell.tokenizer)


def with_short_head(cell: Cell, draft: Model, target: Model, methods: list[Method]) -> Model:
    """The draft with an output head of the tokens alone that the responses use most: the data
    set's, or those of the target where a method trains on these."""
    size = cell.settings.draft_vocab
    examples = cell.examples
    if any(method.data == "target" for method in methods):
        examples = written_by_target(cell, target, draft, examples)
    token_ids = frequent_tokens(examples, size, cell.ends)
    settings = {"draft": draft.fingerprint, "token_ids": token_ids.tolist()}
    folder = stage_folder(cell.folder / f"draft-vocab-{size}", settings)
    finished = finished_stage(folder, settings)
    if finished:
        return finished
    network = shorten_head(load_model(draft.path), token_ids) if rank() == 0 else None
    return save_stage(folder, settings, {}, network, cell.tokenizer)


def pretrained(cell: Cell, name: str, sizes: dict, seed: int) -> Model:
    """A small language model from scratch, on whole rows, prompts too."""
    plan = Plan(
        name=name,
        init=sizes,
        examples=all_tokens(cell.examples),
        lr=SCRATCH_LR,
        epochs=SCRATCH_EPOCHS,
        batch_size=SCRATCH_BATCH,
        seed=seed,
    )
    return fit(cell, plan, fine_tuning_step)


def target_plan(cell: Cell, base: Model) -> Plan:
    return Plan(
        name="target",
        init=base,
        examples=cell.examples,
        lr=cell.pair.target_lr,
        epochs=cell.recipe.epochs[0],
        batch_size=cell.recipe.batch_size,
        seed=cell.target_seed,
    )


def reference_method(cell: Cell, method: Method) -> Method:
    """How AdaSPEC's reference is trained: as a DistillSpec draft of the reference's epochs."""
    return Method(
        "distillspec",
        divergence=method.reference,
        data="target" if method.data == "target" else "ground-truth",
        epochs=method.reference_epochs or cell.recipe.epochs[1],
    )


def draft_plan(
    cell: Cell, method: Method, start: Model, target: Model, examples: list | None = None
) -> Plan:
    """How a draft is trained from `start` by a method, on the cell's rows if no others are
    given."""
    _, reference_epochs, draft_epochs = cell.recipe.epochs
    if method.name == "best":
        draft_epochs += reference_epochs
    epochs = method.epochs or draft_epochs
    name = stage_name(method, epochs)
    examples = examples or cell.examples
    if method.data == "target":
        examples = written_by_target(cell, target, start, examples)
    epochs, batch_size, max_steps = matching(cell, method, epochs, len(examples))
    return Plan(
        name=name,
        init=start,
        examples=examples,
        lr=method.lr or cell.recipe.lr,
        epochs=epochs,
        batch_size=batch_size,
        seed=cell.seed,
        decay=method.decay,
        max_steps=max_steps,
        method=method,
        on_policy=on_policy(cell, method, examples),
    )


def matching(cell: Cell, method: Method, epochs: int, rows: int) -> tuple[int, int, int | None]:
    """Epochs, batch size and bound on the steps of a draft, see `Method.match`."""
    batch_size = method.batch or cell.recipe.batch_size
    if method.name != "adaspec" or method.match == "steps":
        return epochs, batch_size, None
    k = fraction_kept(method, 0.5)  # in the mean
    batch_size = round(batch_size / k)
    if method.match == "epochs":
        return epochs, batch_size, None
    batches = -(-rows // batch_size)  # of a pass, which bears the loss of k * rows in all
    steps = math.ceil(epochs * batches / k - 1e-6)
    return -(-steps // batches), batch_size, steps


def stage_name(method: Method, epochs: int) -> str:
    """The folder of a draft, by what is not usual in its training."""
    names = {
        "distillspec": f"distilled-{epochs}-epochs",
        "best": f"best-{epochs}-epochs",
        "adaspec": "adaspec",
    }
    changes = method.changed()
    if method.name != "adaspec":
        changes.pop("epochs", None)  # in the name
    return "-".join([names[method.name], *(f"{key}-{changes[key]}" for key in changes)])
