"""What can be chosen: model pairs, the paper's recipes, how a draft is trained, and the flags.

`Settings` is a run and `Method` is the training of one draft; each field says what it is for, and
those that are flags of `run_all.py` carry their help. What studies compare are lists of `Method`
(extras/ablations.py).
"""

import math
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from typing import NamedTuple

from cli import Parser, decimal, decimals, flag, folder, numbers, one_of, some_of, whole
from data import TASKS
from distillspec import DIVERGENCES
from train import DECAYS, DTYPES, SELECTIONS

# Pairs and the paper's recipes


@dataclass(frozen=True)
class Pair:
    """A target and a draft: names of pretrained models (Hub ids or folders), or GPT-NeoX sizes to
    train from scratch. A draft can also be a number: as many of the target's first layers."""

    target: str | dict
    draft: str | dict | int | None  # None: a draft of another kind, such as an EAGLE head
    target_lr: float = 1e-5  # as in the official scripts
    lr: float = 3e-4  # of reference and draft, for a pair that the paper does not have

    @property
    def models(self) -> list:
        """Names or sizes, without that of a draft that is made of the target's layers."""
        given = [self.target] if isinstance(self.draft, int) else [self.target, self.draft]
        return [model for model in given if model]


TINY_TARGET = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
TINY_DRAFT = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
NARROW_DRAFT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
PAIRS = {
    "pythia": Pair("EleutherAI/pythia-1.4b", "EleutherAI/pythia-31m"),
    "codegen": Pair("microsoft/phi-2", "Salesforce/codegen-350M-mono"),
    "tiny": Pair(TINY_TARGET, TINY_DRAFT, target_lr=1e-3, lr=2e-3),
    # the same target and a quarter of the draft: a wider capacity gap
    "tiny-wide": Pair(TINY_TARGET, NARROW_DRAFT, target_lr=1e-3, lr=2e-3),
}

# The paper's hyper-parameters: batch, then for each pair the learning rate of reference and draft,
# and the epochs of target, reference and draft in the optimal regime. The 3-epoch regime has 3
# epochs everywhere, and the same learning rates.
RECIPES = {
    "gsm8k": (16, {"pythia": (3e-4, (6, 15, 30)), "codegen": (3e-4, (3, 30, 30))}),
    "alpaca": (16, {"pythia": (3e-4, (1, 15, 30)), "codegen": (3e-4, (1, 20, 15))}),
    "mbpp": (8, {"pythia": (1e-5, (1, 30, 6)), "codegen": (1e-4, (1, 10, 6))}),
    "cnn_dailymail": (16, {"pythia": (1e-4, (1, 10, 10)), "codegen": (1e-4, (1, 10, 10))}),
    "xsum": (16, {"pythia": (3e-4, (1, 10, 10)), "codegen": (1e-4, (1, 10, 10))}),
}

# The paper's Table 1, alpha in percent, DistillSpec and AdaSPEC: 3-epoch pythia and codegen, then
# optimal pythia and codegen
PAPER_ALPHA = {
    "gsm8k": ((57.58, 62.63), (79.49, 82.79), (66.19, 68.28), (81.49, 83.48)),
    "alpaca": ((44.34, 47.25), (56.48, 58.80), (65.41, 65.79), (58.05, 60.36)),
    "mbpp": ((46.88, 47.73), (87.36, 88.76), (49.88, 65.12), (86.60, 87.70)),
    "cnn_dailymail": ((73.05, 74.22), (79.33, 80.63), (80.15, 80.89), (85.01, 86.29)),
    "xsum": ((47.24, 49.11), (58.88, 59.93), (56.11, 57.80), (66.78, 68.19)),
}


class Recipe(NamedTuple):
    """A cell's hyper-parameters; epochs of target, reference and draft."""

    batch_size: int
    lr: float
    epochs: tuple[int, int, int]


def recipe(task: str, pair_name: str, pair: Pair, settings: "Settings") -> Recipe:
    """The paper's recipe, unless given by flags."""
    batch_size, by_pair = RECIPES.get(task, (16, {}))
    lr, epochs = by_pair.get(pair_name, (pair.lr, (3, 3, 3)))
    if settings.regime == "3-epoch":
        epochs = (3, 3, 3)
    if pair_name == "custom":
        epochs = (0, 3, 3)  # a target that is served stays as it is
    return Recipe(settings.batch or batch_size, settings.lr or lr, settings.epochs or epochs)


# The settings

LOSSES = ("ce", *DIVERGENCES)  # ce: cross-entropy of the data's tokens, fine-tuning
SOURCES = ("ground-truth", "target", "on-policy", "mixed")
MATCHES = ("steps", "epochs", "tokens")  # see Method.match
LABELS = {"distillspec": "DistillSpec", "adaspec": "AdaSPEC", "best": "best"}


@dataclass(frozen=True)
class Method:
    """How a draft is trained. Fields that are no flags are for studies (extras/ablations.py)."""

    name: str  # distillspec: on all tokens; adaspec: on the selected ones; best: see METHODS
    divergence: str = flag(
        "fkl", one_of(LOSSES), f"loss of the draft, that of best too: {', '.join(LOSSES)}"
    )
    data: str = flag(
        "ground-truth",
        one_of(SOURCES),
        "who writes the responses: ground-truth, the target (once), on-policy (the draft as it "
        "learns) or mixed (the draft half of them)",
    )
    k: float = flag(0.4, decimal(0, 1, above=True), "AdaSPEC's fraction of tokens selected")
    k_end: float | None = None  # the fraction goes from k to this, on a straight line
    gap: str = "fkl"  # the loss whose gap to the reference selects
    select: str = "top"  # or another of train.SELECTIONS: as many other tokens
    # What AdaSPEC has in common with a DistillSpec draft of the same epochs. steps: batch and
    # steps, and so passes over the data. epochs: passes, in batches 1/k as large, so that a step
    # bears the loss of as many tokens. tokens: loss-bearing tokens in all, in those larger batches
    # (the official practice: 1/k the passes).
    match: str = "steps"
    reference: str = "fkl"  # the loss that the reference is trained on
    share: float = 0.5  # of the rows that the draft writes, of mixed data
    refresh: int = 50  # optimiser steps until the draft writes anew
    batch: int | None = None  # None here and below: the recipe's
    lr: float | None = None
    decay: str = "constant"  # of the learning rate; linear: from 2 lr to nothing
    epochs: int | None = None
    reference_epochs: int | None = None

    def __post_init__(self):
        choices = {"name": LABELS, "divergence": LOSSES, "gap": LOSSES, "reference": LOSSES}
        choices |= {"data": SOURCES, "select": SELECTIONS, "decay": DECAYS}
        choices |= {"match": MATCHES}
        for key, valid in choices.items():
            if getattr(self, key) not in valid:
                raise ValueError(f"{key} {getattr(self, key)!r} is none of {', '.join(valid)}")

    def changed(self) -> dict:
        """The settings that are not those of the method's name alone."""
        usual = vars(METHODS[self.name])
        return {key: value for key, value in vars(self).items() if value != usual[key]}

    @property
    def label(self) -> str:
        """What tables call the draft."""
        changes = [f"{key}={value}" for key, value in self.changed().items()]
        return " ".join([LABELS[self.name], *changes])

    @property
    def on_policy(self) -> bool:
        """Whether the draft writes responses as it learns."""
        return self.data in ("on-policy", "mixed")


METHODS = {
    "distillspec": Method("distillspec"),
    "adaspec": Method("adaspec"),
    # Ours, chosen on validation rows: the acceptance itself as the loss (1 - TVD), on all tokens,
    # in small batches, with a rate that decays; no reference, whose epochs go to the draft.
    "best": Method("best", divergence="tvd", decay="linear", batch=4),
}
PRESETS = {
    "tiny": {
        "tasks": ("arithmetic",),
        "pairs": ("tiny",),
        "limit": 2000,
        "max_length": 128,
        "max_new_tokens": 64,
        "eval_prompts": 100,
    }
}
# How drafts are evaluated elsewhere; counts are pooled over prompts, there as here
PROTOCOLS = {"paper": {"gamma": 4, "temperatures": (0.0,), "max_new_tokens": 512}}


@dataclass(frozen=True)
class Settings:
    """A run: every task, pair and seed is a cell. Fields that are no flags are for studies."""

    preset: str | None = flag(
        None, one_of(PRESETS), "tiny: the offline task and pair, minutes on two cores", "grid"
    )
    tasks: tuple[str, ...] = flag(
        tuple(RECIPES), some_of(TASKS), f"comma-separated, of {', '.join(TASKS)}", "grid"
    )
    pairs: tuple[str, ...] = flag(
        ("pythia", "codegen"),
        some_of([*PAIRS, "custom"]),
        f"comma-separated, of {', '.join(PAIRS)}, custom; with a target given, custom",
        "grid",
    )
    target: str | None = flag(None, str, "pair custom: Hub id or folder of your target", "grid")
    draft: str | None = flag(None, str, "pair custom: Hub id or folder of your draft", "grid")
    draft_layers: int | None = flag(
        None,
        whole(),
        "pair custom: make the draft, of so many of the target's first layers",
        "grid",
    )
    draft_vocab: int | None = flag(
        None,
        whole(2),
        "give drafts a short output head, of so many tokens that responses use most",
        "grid",
    )
    heads: bool = False  # drafts are heads on the target (extras/eagle.py)
    methods: tuple = flag(
        ("distillspec", "adaspec"),
        some_of([*METHODS, "none"]),
        f"comma-separated, of {', '.join(METHODS)}; or none: measure the draft as it is",
        "grid",
    )
    regime: str = flag(
        "3-epoch", one_of(["3-epoch", "optimal"]), "the paper's epochs: 3-epoch or optimal", "grid"
    )
    seeds: tuple[int, ...] = flag((0,), numbers, "comma-separated", "grid")
    target_seed: int | None = None  # one target, trained with this seed, for all seeds

    data_dir: str | None = flag(
        None, folder, "rows from <data-dir>/<task>/<split>.jsonl; without it from the Hub", "rows"
    )
    dataset: str | None = flag(
        None, str, "task custom: NAME or NAME:CONFIGURATION that load_dataset opens", "rows"
    )
    chat: bool = flag(
        False,
        None,
        "put text prompts through the target's chat template, as the user's turn",
        "rows",
    )
    models_dir: str | None = flag(
        None, folder, "folder that holds the pretrained models by name; without it the Hub", "rows"
    )
    write_temperature: tuple[float, ...] = flag(
        (1.0,),
        decimals(0, math.inf),
        "of responses that the target writes; rows take several in turn",
        "rows",
    )
    write_with_draft: bool = flag(
        False,
        None,
        "the target writes by speculative decoding with the draft at hand, a few responses at a "
        "time: for a draft that is good already",
        "rows",
    )
    limit: int | None = flag(None, whole(), "train on the first rows only", "rows")
    max_length: int = flag(512, whole(2), "tokens of a training row", "rows")

    batch: int | None = flag(
        None, whole(), "rows of an optimiser step, over all ranks; without it the recipe's"
    )
    micro_batch: int | None = flag(
        None, whole(), "rows of one forward on one rank, which bounds memory; without it all"
    )
    lr: float | None = flag(
        None, decimal(0, math.inf, above=True), "of reference and draft; without it the recipe's"
    )
    epochs: tuple[int, int, int] | None = flag(
        None,
        numbers,
        "target,reference,draft; target 0: taken as it is. Without it those of the regime, and for "
        "the pair custom 0,3,3",
    )
    max_steps: int | None = flag(None, whole(), "cut every stage short")
    dtype: str | None = flag(
        None, one_of(DTYPES), "autocast type; without it bfloat16 on a GPU, float32 on a CPU"
    )

    protocol: str | None = flag(
        None,
        one_of(PROTOCOLS),
        "paper: gamma 4, greedy alone, 512 new tokens, unless their own flags say otherwise",
        "evaluation",
    )
    temperatures: tuple[float, ...] = flag(
        (0.0, 1.0), decimals(0, math.inf), "that drafts are measured at", "evaluation"
    )
    gamma: int = flag(5, whole(), "tokens drafted a round", "evaluation")
    max_new_tokens: int = flag(
        128,
        whole(2),
        "tokens of a response, of those too that models write to train on",
        "evaluation",
    )
    split: str = "test"  # choose on validation rows
    validation_rows: int = 16  # that alpha is watched on as drafts learn
    eval_prompts: int = flag(200, whole(), "prompts that acceptance is counted on", "evaluation")
    eval_batch: int = 20  # of them at a time
    timed_prompts: int = flag(
        20, whole(), "prompts that the speed-up is measured on, one by one", "evaluation"
    )

    out: str = flag("runs", str, "where stages and results go", "machine")
    cache_gb: float = flag(
        100.0, decimal(0, math.inf), "bound on the cached states of the target; 0: none", "machine"
    )
    save_minutes: float = flag(
        10.0, decimal(0, math.inf), "how often the state of a stage is saved", "machine"
    )
    log_dir: str | None = flag(
        None, str, "write TensorBoard events here (pip install tensorboard)", "machine"
    )
    shard_target: bool = flag(
        False, None, "spread the frozen target's layers over the ranks (FSDP)", "machine"
    )


def parse_settings(parser: Parser, argv, settings_class=Settings) -> tuple[Settings, list[Method]]:
    """The settings and methods that a command line asks for; exits with one line where it cannot
    be right."""
    chosen = parser.parse_known_args(argv)[0]
    parser.set_defaults(**PRESETS.get(chosen.preset, {}))
    parser.set_defaults(**PROTOCOLS.get(chosen.protocol, {}))
    if getattr(chosen, "target", None):  # no flag of every command
        parser.set_defaults(pairs=("custom",))
    parser.set_defaults(divergence=None)  # where no flag says otherwise each method has its own
    arguments = vars(parser.parse_args(argv))
    names = {setting.name for setting in fields(settings_class)}
    settings = settings_class(**{key: arguments[key] for key in names & arguments.keys()})
    error = contradiction(settings)
    if error:
        parser.error(error)
    if settings.methods == ("none",):
        return settings, []
    methods = []
    for name in settings.methods:
        flags = {"data": arguments["data"]}
        if arguments["divergence"]:
            flags["divergence"] = arguments["divergence"]
        elif name == "best" and settings.draft_layers:
            flags["divergence"] = "lk_hybrid"  # such a draft agrees with nothing at first
        if name == "best" and settings.batch:
            flags["batch"] = settings.batch
        if name == "adaspec":
            flags |= {key: arguments[key] for key in ("k", "match") if key in arguments}
        methods.append(replace(METHODS[name], **flags))
    return settings, methods


def contradiction(settings: Settings) -> str | None:
    """What is wrong with the settings as a whole."""
    if not settings.out:
        return "--out is empty; give a folder"
    if len(set(settings.seeds)) < len(settings.seeds):
        return f"--seeds must be different numbers, got {','.join(map(str, settings.seeds))}"
    if settings.epochs and (len(settings.epochs) != 3 or min(settings.epochs[1:]) < 1):
        return "--epochs takes three numbers: target (0 or more), reference and draft (1 or more)"
    if settings.dataset and "custom" not in settings.tasks:
        return "--dataset holds the rows of the task custom: add --tasks custom"
    if settings.log_dir and not find_spec("tensorboard"):
        return "--log-dir needs tensorboard: pip install tensorboard"
    drafts = [draft for draft in (settings.draft, settings.draft_layers) if draft]
    if not settings.target and (drafts or "custom" in settings.pairs):
        more = "" if settings.heads else ", and --draft or --draft-layers"
        return f"the pair custom needs --target{more}"
    if settings.target and "custom" not in settings.pairs:
        return "--target is the pair custom: add it to --pairs, or leave --pairs out"
    if settings.target and not settings.heads and len(drafts) != 1:
        return "--target needs a draft: either --draft or --draft-layers"
    makes_draft = settings.draft_layers or settings.draft_vocab
    if "none" in settings.methods and (len(settings.methods) > 1 or makes_draft):
        return (
            "--methods none measures a draft as it is: leave out other methods, --draft-layers "
            "and --draft-vocab"
        )
    return None
