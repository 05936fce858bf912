"""The driver: every task and model pair, from the base models to the table.

    python run_all.py --preset tiny                                        # offline, CPU, minutes
    torchrun --nproc_per_node 8 run_all.py                                 # the paper's grid, 3-epoch regime
    torchrun --nproc_per_node 8 run_all.py --regime optimal --tasks gsm8k --pairs pythia --seeds 0,1,2

Each cell (pair, task, seed) is a folder of stages: target fine-tuned, reference distilled (stage 1), DistillSpec draft, AdaSPEC
draft (stage 2), evaluation. A stage is a Hugging Face folder plus `stage.json`, which says what made it; a finished one is
used again, and a changed setting re-runs what depends on it. AdaSPEC's quantile is taken over the response tokens of all ranks
together (the official code takes it on each GPU alone), so that the number of GPUs changes nothing (but for what is drawn at
random on each: responses that models write, an EAGLE head's noise); with `--micro-batch` it is taken over the micro-batches
that all ranks process at the same time.
"""

import argparse
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig

import data
import engines
import report
import train
from adaspec import select_tokens, token_kl
from distillspec import DIVERGENCES
from eagle import STATE_WEIGHT, TOKEN_WEIGHT, Eagle, TargetStates, eagle_objective, everything, training_accuracy
from speculative import (
    Parser,
    Stats,
    _inference,
    _Lane,
    autoregressive_generate,
    bootstrap_interval,
    check_model,
    check_tokenizers,
    expected_acceptance,
    load_tokenizer,
    one_of,
    simulate_rounds,
    speculative_generate,
)


@dataclass(frozen=True)
class Pair:
    """A target and a draft: names of pretrained models (Hub ids or folders), or GPT-NeoX sizes to train from scratch; EAGLE in
    the draft's place is a head on the target."""

    target: str | dict
    draft: str | dict
    target_lr: float = 1e-5  # as in the official scripts


EAGLE = "EAGLE head"
PAIRS = {
    "pythia": Pair("EleutherAI/pythia-1.4b", "EleutherAI/pythia-31m"),
    "codegen": Pair("microsoft/phi-2", "Salesforce/codegen-350M-mono"),
    "tiny": Pair(
        {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4},
        {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        target_lr=1e-3,
    ),
    "tiny-wide": Pair(  # the same target with a draft of a quarter the size: a wider capacity gap
        {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4},
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1},
        target_lr=1e-3,
    ),
    "smollm2-eagle": Pair("HuggingFaceTB/SmolLM2-135M-Instruct", EAGLE),
}
PAIRS["tiny-eagle"] = replace(PAIRS["tiny"], draft=EAGLE)
SCRATCH = {"lr": 2e-3, "epochs": 2, "batch_size": 16}  # pretraining of a pair that is given by sizes, on whole train rows
SCRATCH_VOCABULARY = 512

# The paper's hyper-parameters: batch, then for each pair the learning rate of reference and draft, and the epochs of target,
# reference and draft in the optimal regime. The 3-epoch regime has 3 epochs everywhere, and the same learning rates.
RECIPES = {
    "gsm8k": (16, {"pythia": (3e-4, (6, 15, 30)), "codegen": (3e-4, (3, 30, 30))}),
    "alpaca": (16, {"pythia": (3e-4, (1, 15, 30)), "codegen": (3e-4, (1, 20, 15))}),
    "mbpp": (8, {"pythia": (1e-5, (1, 30, 6)), "codegen": (1e-4, (1, 10, 6))}),
    "cnn_dailymail": (16, {"pythia": (1e-4, (1, 10, 10)), "codegen": (1e-4, (1, 10, 10))}),
    "xsum": (16, {"pythia": (3e-4, (1, 10, 10)), "codegen": (1e-4, (1, 10, 10))}),
}
# pairs that the paper does not have: 3 epochs, batch 16 for other tasks too
OTHER_LR = {"tiny": 2e-3, "tiny-wide": 2e-3, "tiny-eagle": 2e-3, "custom": 3e-4}

PRESETS = {
    "tiny": {
        "tasks": "arithmetic",
        "pairs": "tiny",
        "limit": 2000,
        "max_length": 128,
        "max_new_tokens": 64,
        "eval_prompts": 100,
    }
}


LOSSES = ("ce", *DIVERGENCES)  # ce: cross-entropy of the data's own tokens, fine-tuning instead of distillation
SELECTIONS = ("top", "bottom", "random")
MATCHES = ("steps", "epochs", "tokens")
REWRITTEN = ("on-policy", "mixed")
SOURCES = ("ground-truth", "target", *REWRITTEN)
ROWS = ("all", "first", "in-turn")
LABELS = {"distillspec": "DistillSpec", "adaspec": "AdaSPEC", "best": "best"}
# Ours, found on validation rows (see the README): no selection and no reference, whose epochs go to the draft instead
BEST = {"divergence": "tvd", "decay": "linear", "batch": 4}


@dataclass(frozen=True)
class Method:
    """A way to train a draft, written NAME[:KEY=VALUE]... on the command line, such as adaspec:k=0.2:select=bottom.

    `divergence` is the loss, `gap` the one whose gap to the reference selects, `reference` what the reference was trained on.
    With `k_end`, the fraction kept goes from `k` to `k_end` as training goes on (`fraction_kept`).

    `match` says what AdaSPEC has in common with a DistillSpec draft of the same epochs: "steps": batch and steps (and so passes
    over the data); "epochs": passes over the data, in batches 1/k as large, so that a step bears the loss of as many tokens;
    "tokens": steps in those larger batches, so that as many tokens bear loss in all (the official practice, 1/k the passes).

    `data` says who writes the responses: "ground-truth": the data set; "target": the target, once; "on-policy": the draft
    itself, anew every `refresh` steps; "mixed": the draft those of a `share` of the rows, the data set the others.

    `rows`, of a mixed task such as gsm8k+mbpp: "all" of them, shuffled together; those of the "first" task alone; "in-turn"
    those of the first, and then, from the draft that this gave, those of the next.
    """

    name: str
    divergence: str = "fkl"
    k: float = 0.4
    k_end: float | None = None
    gap: str = "fkl"
    select: str = "top"
    match: str = "steps"
    reference: str = "fkl"
    data: str = "ground-truth"
    share: float = 0.5
    refresh: int = 50
    rows: str = "all"
    batch: int | None = None
    lr: float | None = None
    decay: str = "constant"
    epochs: int | None = None
    reference_epochs: int | None = None

    def __post_init__(self):
        for key, value in self.settings().items():
            self.check_key(key)
            choices = {"divergence": LOSSES, "gap": LOSSES, "reference": LOSSES, "select": SELECTIONS, "match": MATCHES}
            choices |= {"data": SOURCES, "rows": ROWS, "decay": train.DECAYS}
            if key in choices and value not in choices[key]:
                raise ValueError(f"{key} {value!r} is none of {', '.join(choices[key])}")
        for key in ("k", "k_end"):
            if getattr(self, key) is not None and not 0 < getattr(self, key) <= 1:
                raise ValueError(f"{key} must be in (0, 1], got {getattr(self, key)}")
        if not 0 <= self.share <= 1 or self.refresh < 1:
            raise ValueError(f"share must be in [0, 1] and refresh at least 1, got {self.share} and {self.refresh}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be above 0 and finite, got {self.lr}")
        if any(count is not None and count < 1 for count in (self.batch, self.epochs, self.reference_epochs)):
            raise ValueError("batch and epochs must be at least 1")

    @classmethod
    def usual(cls, name: str) -> dict:
        """The settings of a method that is given by its name alone."""
        return {f.name: f.default for f in fields(cls) if f.name != "name"} | (BEST if name == "best" else {})

    def check_key(self, key: str) -> None:
        uniform = "divergence", "data", "share", "refresh", "rows", "batch", "lr", "decay", "epochs"
        if self.name != "adaspec" and key not in uniform:
            raise ValueError(f"{self.name} has no {key}; it has {', '.join(uniform)}")

    def settings(self) -> dict:
        """What is not as usual."""
        return {key: getattr(self, key) for key, value in self.usual(self.name).items() if getattr(self, key) != value}

    def __str__(self) -> str:
        return " ".join([LABELS[self.name], *(f"{key}={value}" for key, value in self.settings().items())])

    @classmethod
    def parse(cls, text: str, **flags):
        """The method written as `text`; `flags` are settings for what it does not name and has.

        Raises ValueError or ArgumentTypeError, in one line, for what is no method.
        """
        name, *settings = text.split(":")
        one_of(LABELS)(name)
        kinds = {f.name: str(f.type) for f in fields(cls) if f.name != "name"}
        if name != "adaspec":
            flags = {key: flags[key] for key in ("divergence", "data") if name == "distillspec" and key in flags}
        chosen, named = dict(flags), set()
        for setting in settings:
            key, _, value = setting.partition("=")
            one_of(kinds)(key)
            if key in named:
                raise ValueError(f"{key} is there twice")
            named.add(key)
            chosen[key] = float(value) if "float" in kinds[key] else int(value) if "int" in kinds[key] else value
            cls(name).check_key(key)
        return cls(name, **cls.usual(name) | chosen)


ABLATIONS = {  # --ablation NAME: a comparison of the paper, as methods
    "selection": [f"adaspec:select={select}" for select in SELECTIONS],
    "k": [f"adaspec:k={tenths / 10}" for tenths in range(1, 11)],
    "divergence": [f"distillspec:divergence={d}" for d in ("fkl", "rkl", "tvd", "jsd")]
    + [f"adaspec:divergence={d}:gap={d}" for d in ("fkl", "rkl", "tvd", "jsd")],
    "fine-tuning": [
        "distillspec:divergence=ce",
        "distillspec",
        "adaspec:divergence=ce:gap=ce:reference=ce",
        "adaspec:reference=ce",
        "adaspec",
    ],
    "reference": [f"adaspec:reference_epochs={epochs}" for epochs in range(1, 6)],
    "epochs": [f"{name}:epochs={epochs}" for name in ("distillspec", "adaspec") for epochs in (1, 2, 3, 6, 12)],
    "match": ["distillspec", *(f"adaspec:match={match}" for match in MATCHES)],
    "adaptive": [
        "adaspec",
        "adaspec:k=0.1:k_end=0.7",
        "adaspec:k=0.7:k_end=0.1",
        "adaspec:k_end=1.0",
        "adaspec:k=1.0:k_end=0.4",
    ],
    "data": [f"{name}:data={source}" for name in ("distillspec", "adaspec") for source in SOURCES],
    "best": [  # every variant that best was chosen from
        *("adaspec" + more for more in ("", ":match=tokens", ":lr=4e-3", ":decay=linear", ":batch=4:decay=linear")),
        "adaspec:divergence=tvd:gap=tvd:decay=linear",
        "adaspec:divergence=tvd:gap=tvd:k_end=1.0:batch=4:decay=linear",
        *("distillspec:epochs=6" + more for more in ("", ":decay=linear", ":decay=linear:batch=4")),
        *(
            f"distillspec:epochs=6:decay=linear:divergence={divergence}{batch}"
            for divergence in ("tvd", "lk", "lk_hybrid")
            for batch in ("", ":batch=8", ":batch=4")
        ),
        *(f"distillspec:decay=linear:divergence=tvd:{more}" for more in ("epochs=6:lr=4e-3", "epochs=9:batch=4")),
        *(f"distillspec:epochs=6:decay=linear:divergence=tvd:data=target{batch}" for batch in ("", ":batch=4")),
    ],
    "mixed": [f"{name}:rows={rows}" for rows in ("first", "in-turn", "all") for name in ("distillspec", "adaspec")],
}


def recipe(task: str, pair: str, args) -> dict:
    """Batch size, learning rate and epochs (target, reference, draft) of a cell: the paper's (of a mixed task, its first
    task's), unless given by flags."""
    batch_size, by_pair = RECIPES.get(task.split("+")[0], (16, {}))
    lr, epochs = by_pair.get(pair) or (OTHER_LR.get(pair, 3e-4), (3, 3, 3))
    epochs = args.epochs or (epochs if args.regime == "optimal" else (3, 3, 3))
    return {"batch_size": args.batch or batch_size, "lr": lr if args.lr is None else args.lr, "epochs": epochs}


# What the stages minimise: objective(hidden states [N, d], head, batch) -> (sum of losses, tokens in it), see train.py


def cross_entropy(hidden, head, batch):
    """Next-token cross-entropy on the response: pretraining, and the target's fine-tuning (stage 0)."""
    return head.loss(hidden, *loss_of("ce", None, batch)), len(hidden)


def token_cross_entropy(labels, logits):
    return F.cross_entropy(logits.float(), labels, reduction="none")


def target_logits(target, batch):
    """The target's logits at some of the batch's response positions, as a function of their rows."""
    hidden = target.hidden(batch)
    return lambda rows: target.head(hidden[rows])


def loss_of(name: str, target, batch):
    """What a loss of `LOSSES` holds the draft's logits against, and the loss itself: two arguments of `train.Head.loss`."""
    if name == "ce":
        return (lambda rows: batch.labels[rows]), token_cross_entropy
    return target_logits(target, batch), DIVERGENCES[name]


def distillation(target, divergence: str = "fkl"):
    """Stage 1 and DistillSpec: a divergence from the frozen target on every response token."""

    def objective(hidden, head, batch):
        return head.loss(hidden, *loss_of(divergence, target, batch)), len(hidden)

    return objective


def fraction_kept(k: float, k_end: float | None, progress: float) -> float:
    """The adaptive filter: from k at the first step (progress 0) in a straight line to k_end (at 1); None: k throughout."""
    return k if k_end is None else k + (k_end - k) * progress


def selective_distillation(target, reference_loss, k: float, k_end=None, divergence="fkl", gap="fkl", select="top"):
    """Stage 2, AdaSPEC: a divergence on the top k of the tokens by their gap to the reference, over all ranks.

    First the gap of all tokens without gradient, then forward and backward on the selected ones alone. `reference_loss(batch)`
    is KL(p || q_ref) [N], or another loss, the one named by `gap`. `select`: "bottom" and "random" take as many others.
    """
    order = {"top": lambda gap: gap, "bottom": torch.neg, "random": lambda gap: gap * 0 + torch.rand_like(gap)}[select]

    def objective(hidden, head, batch):
        gaps = head.per_token(hidden, *loss_of(gap, target, batch)) - reference_loss(batch)
        every, own = train.gather_ragged(order(gaps))
        rows = select_tokens(every, fraction_kept(k, k_end, batch.progress))[own].nonzero().squeeze(-1)
        loss = head.loss(hidden, *loss_of(divergence, target, batch), rows)
        return loss + 0 * gaps.sum(), len(rows)  # 0 * NaN: a NaN gap is a NaN loss

    return objective


# Stages and models


def say(text: str) -> None:
    if train.rank() == 0:
        tqdm.write(text)


def versions() -> dict:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def git_commit() -> str:
    """The commit of this code, with "-dirty" where it was changed since; "unknown" outside a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command_line() -> str:
    ranks = f"torchrun --nproc_per_node {train.world_size()}" if "RANK" in os.environ else "python"
    return f"{ranks} {shlex.join(sys.argv)}"


def fingerprint(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def stage(folder: Path, settings: dict, tokenizer, work) -> tuple[Path, str]:
    """Run `work(fingerprint of settings) -> (model, summary)` and save its model in `folder`, unless that holds it already.

    A folder is used again if its `stage.json` names equal settings and its files are what was written then. Returns the folder
    and the settings' fingerprint, which stages that build on this one put among their own settings.
    """
    mark = fingerprint(settings)
    if train.agreed(train.rank() == 0 and finished(folder, mark)):
        say(f"  {folder.name}: done before")
        return folder, mark
    model, summary = work(mark)
    if train.rank() == 0:
        partial = folder.with_name(folder.name + ".partial")
        for old in (partial, folder):
            old.unlink() if old.is_symlink() else shutil.rmtree(old, ignore_errors=True)
        with data.writing(partial):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        files = sorted(path for path in partial.iterdir() if path.is_file())
        for path in files:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        made_by = {"fingerprint": mark, "settings": settings, "summary": summary, "versions": versions(), "git": git_commit()}
        write(partial / "stage.json", made_by | {"files": {path.name: train.checksum(path) for path in files}})
        partial.rename(folder)  # only a whole folder ever carries the name
        shutil.rmtree(checkpoint_folder(folder), ignore_errors=True)
    say(f"  {folder.name}: {summary['steps']} steps, last loss {summary['loss']:.4f}, {summary['seconds']} s")
    return train.agreed((folder, mark))


def checkpoint_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".checkpoints")


def finished(folder: Path, mark: str) -> bool:
    """Whether the folder holds a stage of this fingerprint, whole; says so where it is damaged."""
    made_by = read(folder / "stage.json")
    if made_by.get("fingerprint") != mark:
        return False
    for name, sha in made_by["files"].items():
        if not (folder / name).is_file() or train.checksum(folder / name) != sha:
            say(f"  {folder / name} is damaged: training the stage anew")
            return False
    return True


def resolve(name: str, models_dir: str | None) -> str:
    """A model's folder under --models-dir (by its whole name or the part after the slash), a local folder, or a Hub id.

    Raises ValueError where --models-dir has no such folder, and for a name that leads out of it.
    """
    if models_dir and (Path(name).is_absolute() or ".." in Path(name).parts):
        raise ValueError(
            f"model {name} is outside of --models-dir {models_dir}; name a folder in it, or leave --models-dir out"
        )
    candidates = [Path(models_dir, name), Path(models_dir, name.split("/")[-1])] if models_dir else []
    found = next((path for path in [*candidates, Path(name)] if path.is_dir()), None)
    if found is None and models_dir:
        raise ValueError(f"model {name} is not in {models_dir} (looked for {candidates[0]} and {candidates[1]})")
    return str(found or name)


def identity(name: str) -> str:
    """What stands for a pretrained model in a fingerprint: its name and, of a local folder, its files' sizes and times."""
    files = [path for path in sorted(Path(name).glob("*")) if path.suffix in (".safetensors", ".bin", ".json")]
    return f"{name} {[(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]}"


def write(path: Path, content: dict) -> None:
    """Write JSON with its checksum, so that the file is either the old one or the whole new one."""
    content = {"sha256": content_checksum(content)} | content
    data.write_file(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read(path: Path) -> dict:
    """What `write` wrote; {} where there is no such file or, said aloud, a damaged one."""
    try:
        content = json.loads(path.read_text())
        if content.pop("sha256") == content_checksum(content):
            return content
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, KeyError):
        pass
    say(f"  {path} is damaged: not used")
    return {}


def content_checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def shared_tokenizer(target: str, draft: str):
    """The pair's tokenizer. Raises ValueError where the two disagree, naming the first token that differs."""
    tokenizer = load_tokenizer(target)
    check_tokenizers(tokenizer, load_tokenizer(draft))
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {target} needs an end token (eos_token) and a tokenizer.json")
    return tokenizer


def scratch_model(sizes: dict, tokenizer, seed: int):
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    sizes = {"intermediate_size": 4 * sizes["hidden_size"], "max_position_embeddings": 1024, **sizes}
    config = GPTNeoXConfig(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **sizes)
    return AutoModelForCausalLM.from_config(config)


def serving(target, draft, gamma: int, folder: Path) -> str:
    """The commands that serve a finished pair in each engine that can. Heads of unequal size are cut for it, into `folder`."""
    paths = [str(target), str(draft)]
    configs = [AutoConfig.from_pretrained(path, trust_remote_code=False) for path in paths]
    if configs[0].vocab_size != configs[1].vocab_size:
        cut, note, of = [str(folder / role) for role in ("target", "draft")], folder / "cut.json", list(map(identity, paths))
        if read(note).get("of") != of:
            for path, out in zip(paths, cut, strict=True):
                engines.cut_vocabulary(path, out)
            write(note, {"of": of})
        paths = cut
    lines = ["\nTo serve the last of them (environments: README):"]
    for engine, command in engines.commands(*paths, gamma).items():
        why = engines.unservable(engine, [config.model_type for config in configs])
        lines.append(f"# {engine}: cannot serve it, {why}" if why else f"# {engine}\n{command}")
    return "\n".join(lines)


def folder_name(kind: str, method: Method, part: str, base, draft) -> str:
    """The folder of what was trained on all rows, or on those of the task `part` of a mixed one, from `base` or the `draft`."""
    after = f"after-{base[1]}" if base != draft else ""
    return "-".join([kind, *filter(None, [part, after]), *(f"{key}-{value}" for key, value in method.settings().items())])


class Cell:
    """A pair, a task and a seed: their rows, and the stages that end in their part of the table."""

    def __init__(self, pair_name: str, task: str, seed: int, args, device):
        train.check_stop()
        self.pair_name, self.task, self.seed, self.args, self.device = pair_name, task, seed, args, device
        self.pair = Pair(args.target, args.draft) if pair_name == "custom" else PAIRS[pair_name]
        own = f"custom-{Path(args.target).name}-{Path(args.draft).name}" if pair_name == "custom" else pair_name
        self.own_name, self.folder = own, Path(args.out, own, task, f"seed{seed}")
        self.target_seed = seed if args.target_seed is None else args.target_seed
        self.plan, self.dtype = recipe(task, pair_name, args), train.DTYPES[args.dtype]
        rows = {one: data.load_rows(one, "train", args.data_dir, args.limit) for one in task.split("+")}
        self.scratch = isinstance(self.pair.target, dict)
        if self.scratch:
            texts = [data.TASKS[one].prompt(row) + data.TASKS[one].response(row) for one in rows for row in rows[one]]
            self.tokenizer = data.train_tokenizer(texts, SCRATCH_VOCABULARY)
            self.names, sizes = [f"{pair_name}'s target", f"{pair_name}'s draft"], [self.pair.target, self.pair.draft]
            with torch.device("meta"):
                self.models = [scratch_model(size, self.tokenizer, seed) for size in sizes if size != EAGLE]
        else:
            self.names = [resolve(name, args.models_dir) for name in (self.pair.target, self.pair.draft) if name != EAGLE]
            self.models = [check_model(name) for name in self.names]  # without weights
            self.tokenizer = shared_tokenizer(self.names[0], self.names[-1])
        if self.pair.draft == EAGLE:
            with torch.device("meta"):
                self.names, self.models = [self.names[0], f"{pair_name}'s head"], [self.models[0], Eagle(self.models[0])]
        test_rows = {one: data.load_rows(one, args.split, args.data_dir, args.eval_prompts) for one in rows}
        for turn in (0, 1):  # rank 0 tokenises, the others read what it has written
            if turn == (train.rank() > 0):
                (self.parts, dropped), (self.test, test_dropped) = map(self.encode, (rows, test_rows))
            train.agreed(None)
        if not all([*self.parts.values(), *self.test.values()]):
            raise ValueError(f"{task}: no rows are left within {args.max_length} tokens; raise --max-length")
        self.examples = [example for part in self.parts.values() for example in part]
        every_test = [example for part in self.test.values() for example in part]
        self.header = (
            f"\n{pair_name} / {task} / seed {seed}: {len(self.examples)} train rows, {len(every_test)} {args.split} prompts "
            f"({dropped} and {test_dropped} rows dropped: no response within {args.max_length} tokens)"
        )
        longest = max(example.prompt_length for example in every_test) + args.max_new_tokens
        for name, model in zip(self.names, self.models, strict=True):
            context = getattr(model.config, "max_position_embeddings", sys.maxsize)
            if context < max(longest, args.max_length):
                raise ValueError(
                    f"{name} has a context of {context} tokens; --max-length is {args.max_length}, and the longest test prompt "
                    f"with --max-new-tokens {args.max_new_tokens} takes {longest}"
                )
        self.cached = everything(self.examples) if self.pair.draft == EAGLE else self.examples  # a head reads prompts too
        self.folder.mkdir(parents=True, exist_ok=True)
        self.serve = ""  # the commands that serve its last draft, once that is there
        self.sizes = {}  # rows of each data set that a stage was trained on, by digest

    def encode(self, rows: dict) -> tuple[dict, int]:
        """The examples of each task's rows, and how many rows of all were dropped."""
        folder = Path(self.args.out, "tokenised")
        found = {one: data.encode_once(folder, one, rows[one], self.tokenizer, self.args.max_length) for one in rows}
        return {one: examples for one, (examples, _) in found.items()}, sum(dropped for _, dropped in found.values())

    def fit(
        self, name, init, make_model, objective, lr, epochs, examples,
        batch_size=None, decay="constant", max_steps=None, rewrite=None, refresh=1, seed=None, **made_of,
    ):  # fmt: skip
        """The stage that trains make_model() on objective(); `init` and `made_of` stand for both in its fingerprint.

        It lies in the folder of its `seed`, which is the cell's but for a target that all seeds have in common."""
        args, seed = self.args, self.seed if seed is None else seed
        folder = self.folder.with_name(f"seed{seed}") / name
        hyper = {"lr": lr, "decay": decay, "epochs": epochs, "batch_size": batch_size or self.plan["batch_size"], "seed": seed}
        hyper |= {"dtype": args.dtype, "max_steps": min(filter(None, (args.max_steps, max_steps)), default=None)}

        def work(mark):
            model = make_model().to(self.device)
            how = {"vocab_size": len(self.tokenizer), "micro_batch": args.micro_batch, "name": f"{self.task} {name}"}
            checkpoints = train.Checkpoints(checkpoint_folder(folder), mark)
            how |= {"checkpoints": checkpoints, "save_minutes": args.save_minutes, "rewrite": rewrite, "refresh": refresh}
            summary = train.train(model, examples, objective(), **hyper, **how)
            return model, summary | self.measured(model)

        settings = {"stage": name, "init": init, "data": data.digest(examples), **hyper, **made_of}
        self.sizes[settings["data"]] = len(examples)
        return stage(folder, settings, self.tokenizer, work)

    def measured(self, model) -> dict:
        """What a stage's summary is to say of the trained model beside what the loop does."""
        return {}

    def load(self, path, dtype=torch.float32):
        # where there is no safetensors file, transformers reads the pickle by torch.load(weights_only=True)
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False).to(self.device).eval()

    def frozen(self, path):
        return train.Frozen(self.load(path, self.dtype), len(self.tokenizer))

    def cache(self, kind: str, examples, of: str, width: int, dtype):
        """A cache of the model(s) `of` over the examples, yet to be filled; None where it would not fit."""
        mark = fingerprint({"of": of, "data": data.digest(examples), "dtype": self.args.dtype})
        made = train.TokenCache(self.folder / f"cache-{kind}", mark, examples, width, dtype)
        room = shutil.disk_usage(self.folder).free + sum(path.stat().st_size for path in made.folder.glob("*.bin"))
        fits = train.agreed(made.bytes <= min(self.args.cache_gb * 2**30, room))
        say(f"  {kind} cache: {made.bytes / 2**30:.3f} GiB" + ("" if fits else ", too large: computed anew in every step"))
        return made if fits else None

    def teacher(self, target, examples, *losses: str):
        """The target (path, fingerprint), run over the examples once if its hidden states fit into a cache; `examples` is None
        where they change as training goes on. None where all of the losses do without it."""
        if set(losses) == {"ce"}:
            return None
        path, mark = target
        teacher = self.frozen(path)
        if self.args.shard_target:
            train.shard_layers(teacher.model)
        cache = examples and self.cache("target", examples, mark, teacher.head.linear.weight.shape[1], self.dtype)
        if cache:
            teacher.use(cache, self.rows_at_once(), f"{self.task} target cache", self.args.save_minutes)
        return teacher

    def selection(self, target, reference, examples, method: Method):
        """Stage 2's objective, with the reference's loss per token in a cache too."""
        teacher, asked = self.teacher(target, examples, method.divergence, method.gap), self.frozen(reference[0])
        how = {key: getattr(method, key) for key in ("k", "k_end", "divergence", "gap", "select")}

        def reference_loss(batch):
            return asked.head.per_token(asked.hidden(batch), *loss_of(method.gap, teacher, batch))

        kept = self.kept(reference_loss, target[1] + reference[1] + method.gap, examples)
        return selective_distillation(teacher, kept, **how)

    def kept(self, reference_loss, of: str, examples):
        """The reference's loss by batch, from a cache too where it is of fixed examples and fits."""
        cache = examples and self.cache("reference", examples, of, 1, torch.float32)
        if not cache:
            return reference_loss
        cache.fill(reference_loss, self.device, self.rows_at_once(), f"{self.task} reference cache", self.args.save_minutes)
        return lambda batch: cache.read(batch).squeeze(1)

    def quantile_over(self) -> dict:
        """For the fingerprint of a stage that selects: with --micro-batch, over what the ranks process together."""
        return {"micro_batch": self.args.micro_batch, "ranks": train.world_size()} if self.args.micro_batch else {}

    def responses(self, model, examples, rows: list[int], seed: int) -> list[data.Example]:
        """These rows of the examples with responses that `model` writes, sampled at temperature 1."""
        found, order = {}, sorted(rows, key=lambda row: examples[row].prompt_length)
        generator, end = torch.Generator(self.device).manual_seed(seed), self.tokenizer.eos_token_id
        for group in (order[i : i + 4 * self.args.eval_batch] for i in range(0, len(order), 4 * self.args.eval_batch)):
            train.check_stop()
            prompts = [prompt_ids(examples[row]) for row in group]
            ids, mask = left_padded(prompts, self.device)
            limit = min(self.args.max_new_tokens, self.args.max_length - ids.shape[1])
            sampling = {"max_new_tokens": limit, "temperature": 1.0, "eos_token_id": end, "generator": generator}
            text = autoregressive_generate(model, ids, mask, vocab_size=len(self.tokenizer), **sampling).cpu()
            for row, prompt, tokens in zip(group, prompts, text[:, ids.shape[1] :], strict=True):
                found[row] = response(tokens, prompt, end)
        return [found[row] for row in rows]

    def written_by_target(self, target, examples) -> list[data.Example]:
        """The examples with the target's responses, written once (each rank its share) and kept."""
        path, mark = target
        settings = [mark, data.digest(examples), self.args.max_new_tokens, self.args.eval_batch, self.seed, train.world_size()]
        file = self.folder / f"target-written-{fingerprint({'settings': settings})}.tokens"
        if not train.agreed(train.rank() == 0 and data.read_examples(file) is not None):
            own = list(range(train.rank(), len(examples), train.world_size()))
            model = self.load(path, self.dtype)
            parts = train.gather_objects(self.responses(model, examples, own, self.seed + train.rank()))
            if train.rank() == 0:
                data.write_examples(file, [parts[row % len(parts)][row // len(parts)] for row in range(len(examples))])
            train.agreed(None)
        return data.read_examples(file)[0]

    def source(self, method: Method, target, examples) -> dict:
        """What `fit` is to be told of the method's data: its `examples`, how they are rewritten as training goes on, and in
        `source` what stands for that in a fingerprint."""
        if method.data == "ground-truth":
            return {"examples": examples, "source": ["ground-truth"]}
        if method.data == "target":
            return {"examples": self.written_by_target(target, examples), "source": ["target"]}

        def rewrite(model, rows, step):
            drawn = np.random.default_rng([self.seed, step]).random(len(examples))
            own = [row for row in rows if method.data == "on-policy" or drawn[row] < method.share]
            fresh = dict(zip(own, self.responses(model, examples, own, self.seed * 1_000_003 + step), strict=True))
            return [fresh.get(row, examples[row]) for row in rows]

        flags = self.args.max_new_tokens, self.args.max_length, self.args.eval_batch, train.world_size()
        source = [method.data, method.share, method.refresh, *flags]
        return {"examples": examples, "rewrite": rewrite, "refresh": method.refresh, "source": source}

    def rows_at_once(self) -> int:
        return self.args.micro_batch or self.plan["batch_size"]

    def bases(self):
        """Target and draft before any stage, each as (path, fingerprint): pretrained ones, or made here."""
        if not self.scratch:
            return [(name, identity(name)) for name in self.names]
        whole = everything(self.examples)  # loss on prompts too: a language model
        made = []
        for role, sizes, seed in (("target", self.pair.target, self.target_seed), ("draft", self.pair.draft, self.seed)):
            if sizes == EAGLE:
                continue
            make, how = functools.partial(scratch_model, sizes, self.tokenizer, seed), SCRATCH | {"seed": seed}
            made.append(self.fit(f"base-{role}", sizes, make, lambda: cross_entropy, **how, examples=whole))
        return made

    def tuned(self, base):
        """Stage 0: the target fine-tuned on the task, unless it is to be taken as it is."""
        epochs, rate = self.plan["epochs"][0], self.pair.target_lr if self.args.target_lr is None else self.args.target_lr
        if not epochs:
            return base
        how = {"lr": rate, "epochs": epochs, "seed": self.target_seed, "examples": self.examples}
        return self.fit("target", base[1], functools.partial(self.load, base[0]), lambda: cross_entropy, **how)

    def run(self) -> list[dict]:
        """All stages that are not done yet, and the evaluation; returns the cell's rows of the table."""
        say(self.header)
        args, lr, (_, reference_epochs, draft_epochs) = self.args, self.plan["lr"], self.plan["epochs"]
        base, draft = self.bases()
        target = self.tuned(base)

        @functools.cache  # reference and DistillSpec draft have one recipe, and are one model where all else is equal
        def distil(method, base, part):
            source = self.source(method, target, self.part(part))
            made_of = {"target": target[1], "divergence": method.divergence}
            kind = "best" if method.name == "best" else "distilled"
            name = folder_name(f"{kind}-{method.epochs}-epochs", replace(method, epochs=None), part, base, draft)
            fixed = None if "rewrite" in source else source["examples"]

            def objective():
                return distillation(self.teacher(target, fixed, method.divergence), method.divergence)

            how = {"lr": method.lr or lr, "decay": method.decay, "epochs": method.epochs, "batch_size": method.batch}
            how |= source | made_of
            return self.fit(name, base[1], functools.partial(self.load, base[0]), objective, **how)

        def trained(method, base, part):
            """The stages of a draft that starts as `base`: the last one is the draft."""
            epochs = method.epochs or draft_epochs + (reference_epochs if method.name == "best" else 0)
            if method.name != "adaspec":
                return [distil(replace(method, epochs=epochs, rows="all"), base, part)]
            fixed = method.data if method.data == "target" else "ground-truth"
            recipe = {"divergence": method.reference, "data": fixed, "epochs": method.reference_epochs or reference_epochs}
            reference = distil(Method("distillspec", **recipe), base, part)
            source = self.source(method, target, self.part(part))
            made_of = {"target": target[1], "reference": reference[1]}
            made_of |= {key: getattr(method, key) for key in ("k", "k_end", "divergence", "gap", "select")}
            made_of |= self.quantile_over()
            made_of |= self.matching(method, epochs, len(source["examples"]))
            made_of |= {"lr": method.lr or lr, "decay": method.decay} | source
            fixed = None if "rewrite" in source else source["examples"]
            objective = functools.partial(self.selection, target, reference, fixed, method)
            name = folder_name("adaspec", replace(method, rows="all"), part, base, draft)
            return [reference, self.fit(name, base[1], functools.partial(self.load, base[0]), objective, **made_of)]

        drafts, stages = {"base": draft}, {}
        for method in args.methods:
            made = [draft]
            for part in {"all": [""], "first": [*self.parts][:1], "in-turn": self.parts}[method.rows]:
                made += trained(method, made[-1], part)
            drafts[str(method)], stages[str(method)] = made[-1], made[1:]
        took = {label: self.took(made) for label, made in stages.items()}
        rows = self.evaluation(target, drafts, stages, took)
        if train.rank() == 0:
            self.serve = serving(target[0], [*drafts.values()][-1][0], args.gamma, self.folder / "serve")
        self.drop_caches()
        return rows

    def drop_caches(self) -> None:
        for kind in ("target", "reference") if train.rank() == 0 else ():
            shutil.rmtree(self.folder / f"cache-{kind}", ignore_errors=True)

    def part(self, task: str) -> list[data.Example]:
        """The training rows of one of a mixed task's tasks; "": of all."""
        return self.parts[task] if task else self.examples

    def matching(self, method: Method, epochs: int, rows: int) -> dict:
        """Batch size, epochs and bound on the steps of stage 2, see `Method`."""
        batch_size = method.batch or self.plan["batch_size"]
        if method.match == "steps":
            return {"epochs": epochs, "batch_size": batch_size}
        larger = round(batch_size / fraction_kept(method.k, method.k_end, 0.5))
        if method.match == "epochs":
            return {"epochs": epochs, "batch_size": larger}
        steps = epochs * -(-rows // batch_size)
        return {"epochs": -(-steps // -(-rows // larger)), "batch_size": larger, "max_steps": steps}

    def took(self, stages: list[tuple[Path, str]]) -> dict:
        """What a draft's training took, its reference's included: passes over the data, optimiser steps, tokens that bore
        loss, seconds (without those of caches and of responses that the target writes), and rows that the target was run on:
        cached ones once, and once more where it wrote the response (a call a token then)."""
        made_by = [read(folder / "stage.json") for folder, _ in stages]
        took = {key: sum(made["summary"][key] for made in made_by) for key in ("rows", "steps", "loss_tokens", "seconds")}
        once, forwards, fits = {}, 0, self.cache_bytes() > 0  # once: rows by data set
        for made in made_by:
            settings, cached = made["settings"], fits and made["settings"]["source"][0] not in REWRITTEN
            if {settings.get("divergence"), settings.get("gap", "ce")} == {"ce"}:
                continue  # fine-tuning
            if cached:
                once[settings["data"]] = self.sizes[settings["data"]] * (1 + (settings["source"][0] == "target"))
            else:
                forwards += made["summary"]["rows"]
        return took | {"epochs": took["rows"] / len(self.examples), "target_forwards": forwards + sum(once.values())}

    def cache_bytes(self) -> int:
        """The size of the cache of the target's hidden states; 0 where --cache-gb has no room for it."""
        width = self.models[0].get_output_embeddings().weight.shape[1]
        size = train.TokenCache(self.folder, "", self.cached, width, self.dtype).bytes
        return size if size <= self.args.cache_gb * 2**30 else 0

    def evaluation(self, target, drafts: dict, stages: dict, took: dict) -> list[dict]:
        """The last stage: the drafts' rows of the table, from `evaluation.json` where nothing has changed."""
        flags = ("split", "regime", "gamma", "timed_gammas", "max_new_tokens", "max_length", "dtype", "eval_batch")
        protocol = {"pair": self.own_name, "seed": self.seed, "train_rows": len(self.examples)}
        protocol |= {flag: getattr(self.args, flag) for flag in flags} | {"device": self.device.type} | versions()
        marks = {"target": target[1], **{name: mark for name, (_, mark) in drafts.items()}}
        marks |= {"timed_prompts": self.args.timed_prompts, **{one: data.digest(test) for one, test in self.test.items()}}
        mark, note = fingerprint(protocol | marks), self.folder / "evaluation.json"
        saved = train.agreed(read(note) if train.rank() == 0 else {})
        if saved.get("fingerprint") == mark:
            return saved["rows"]
        models = {name: self.load(path, self.dtype) for name, (path, _) in drafts.items()}
        asked, started, rows, pictures = self.load(target[0], self.dtype), time.time(), [], []
        plain = (
            str(method) for method in self.args.methods if not set(method.settings()) - {"k", "epochs", "reference_epochs"}
        )
        drawn = next((label for label in plain if label.startswith(LABELS["adaspec"]) and "base" in drafts), None)
        for one, test in self.test.items():
            where = {"task": one if one == self.task else f"{one} of {self.task}", "prompts": len(test)}
            where |= protocol | {"timed_prompts": min(self.args.timed_prompts, len(test)), "ranks": train.world_size()}
            found = evaluate(asked, models, test, self.tokenizer, self.args, self.seed, f"{one} evaluation")
            foresight = self.foresight(asked, drafts, stages, test)
            rows += [where | row | took.get(row["draft"], {}) | foresight.get(row["draft"], {}) for row in found]
            if drawn and train.rank() == 0:
                few = models["base"], self.load(stages[drawn][0][0], self.dtype), models[drawn]
                k = read(stages[drawn][-1][0] / "stage.json")["settings"]["k"]
                made = picture(asked, *few, prompt_ids(test[0]), self.tokenizer, self.args, k)
                pictures.append({key: where[key] for key in ("pair", "task", "seed", "split")} | {"draft": drawn} | made)
        rows = train.agreed(rows)  # rank 0's have the timings
        if train.rank() == 0:
            made = {"fingerprint": mark, "command": command_line(), "git": git_commit()}
            made |= {"seconds": round(time.time() - started)}
            write(note, made | {"rows": rows, "pictures": pictures})
        return rows

    def foresight(self, target, drafts: dict, stages: dict, examples) -> dict:
        """How well AdaSPEC's gap, before stage 2, foretells which tokens its draft goes on to learn.

        Spearman's rank correlation with the fall of KL(p || q) from the base to the trained draft, over the response tokens of
        held-out rows: of the KL's gap, and, since both contain it, of the base's KL alone; by the draft's label.
        """
        teacher = train.Frozen(target, len(self.tokenizer))

        @functools.cache
        def losses(path):
            model, found = self.frozen(path), []
            for i in range(0, len(examples), self.rows_at_once()):
                rows = range(i, min(i + self.rows_at_once(), len(examples)))
                batch = train.make_batch(examples, list(rows), self.device)
                found.append(model.head.per_token(model.hidden(batch), *loss_of("fkl", teacher, batch)).cpu())
            return torch.cat(found).numpy()

        found = {}
        for label, made in stages.items():
            if len(made) == 2 and label.startswith(LABELS["adaspec"]):
                base, reference, draft = (losses(path) for path in (drafts["base"][0], made[0][0], made[1][0]))
                by_gap, by_loss = (rank_correlation(values, base - draft) for values in (base - reference, base))
                found[label] = {"gap_correlation": by_gap, "loss_correlation": by_loss}
        return found


class EagleCell(Cell):
    """A cell whose drafts are EAGLE heads (eagle.py): trained on all response tokens for the method distillspec, and on
    AdaSPEC's for the method adaspec, with a head of the first kind as the reference."""

    def __init__(self, pair_name, *rest):
        super().__init__(pair_name, *rest)
        for method in self.args.methods:
            if method.name == "best" or set(method.settings()) - {"k", "lr", "epochs", "reference_epochs"}:
                raise ValueError(
                    f"{pair_name}: an EAGLE head is trained by distillspec or adaspec with k, lr, epochs or reference_epochs, "
                    f"not by {method}"
                )
        if self.args.max_new_tokens < 3:  # its first target call is without drafts
            raise ValueError(f"{pair_name}: --max-new-tokens must be at least 3, or no draft of an EAGLE head is ever judged")

    def run(self) -> list[dict]:
        say(self.header)
        args, lr, (_, reference_epochs, draft_epochs) = self.args, self.plan["lr"], self.plan["epochs"]
        self.target = self.tuned(self.bases()[0])
        stages = {}
        uniform = functools.cache(lambda lr, epochs: self.head(f"eagle-{epochs}-epochs-lr-{lr}", lr, epochs))
        for method in args.methods:
            own_lr, epochs, settings = method.lr or lr, method.epochs or draft_epochs, method.settings()
            label = " ".join(["EAGLE", *(f"{key}={value}" for key, value in settings.items())])
            if method.name == "distillspec":
                stages[label] = [uniform(own_lr, epochs)]
                continue
            reference = uniform(lr, method.reference_epochs or reference_epochs)
            name = "-".join(["eagle-adaspec", *(f"{key}-{value}" for key, value in settings.items())])
            made = self.head(name, own_lr, epochs, reference, method.k)
            stages[label.replace("EAGLE", "EAGLE + AdaSPEC")] = [reference, made]
        drafts = {label: made[-1] for label, made in stages.items()}
        took = {label: self.took(made) for label, made in stages.items()}
        for label, (folder, _) in drafts.items():
            took[label]["accuracy"] = read(folder / "stage.json")["summary"]["accuracy"]
        rows = self.evaluation(self.target, drafts, stages, took)
        self.drop_caches()
        return rows

    def head(self, name, lr, epochs, reference=None, k=1.0):
        """The stage of one head, with a reference on the top k of the tokens."""
        states = functools.cache(lambda: TargetStates(self.teacher(self.target, self.cached), self.examples))

        def make():
            torch.manual_seed(self.seed)
            head = Eagle(self.load(self.target[0]))
            head.teacher = states()
            return head

        def objective():
            if reference is None:
                return eagle_objective(states())
            asked = self.frozen(reference[0])
            asked.model.teacher = states()

            def reference_kl(batch):
                return asked.head.per_token(asked.hidden(batch), target_logits(states(), batch), token_kl)

            return eagle_objective(states(), self.kept(reference_kl, self.target[1] + reference[1], self.examples), k)

        made_of = {"target": self.target[1], "source": ["ground-truth"], "weights": [STATE_WEIGHT, TOKEN_WEIGHT]}
        if reference:
            made_of |= {"reference": reference[1], "k": k} | self.quantile_over()
        return self.fit(name, EAGLE, make, objective, lr, epochs, self.examples, **made_of)

    def measured(self, model) -> dict:
        if not isinstance(model, Eagle):
            return {}
        return {"accuracy": training_accuracy(model, self.examples, len(self.tokenizer), self.rows_at_once())}

    def load(self, path, dtype=torch.float32):
        if Path(path, "eagle.json").is_file():
            return Eagle.from_pretrained(path, super().load(self.target[0], dtype))
        return super().load(path, dtype)


def make_cell(pair: str, *rest) -> Cell:
    return (EagleCell if pair in PAIRS and PAIRS[pair].draft == EAGLE else Cell)(pair, *rest)


# Evaluation


GAMMAS = range(1, 11)  # what tau is simulated for


def evaluate(target, drafts: dict, examples, tokenizer, args, seed: int, name: str) -> list[dict]:
    """Acceptance of every draft on held-out prompts at temperature 0 and 1, and the speed-up over the target alone.

    Counts (alpha, tau) come from decoding all prompts in batches, which are dealt to the ranks; expected acceptance, argmax
    agreement and tau by gamma (simulated, exact) from one pass over the text that the target alone writes for the same prompts;
    speed-ups and the cost ratio from decoding the first `timed_prompts` one by one on rank 0, see `timings`.
    """
    device, end = target.device, tokenizer.eos_token_id
    common = {"max_new_tokens": args.max_new_tokens, "eos_token_id": end, "vocab_size": len(tokenizer)}
    prompts = [prompt_ids(example) for example in examples]
    groups = [prompts[i : i + args.eval_batch] for i in range(0, len(prompts), args.eval_batch)]
    timed, rows = [prompt.to(device)[None] for prompt in prompts[: args.timed_prompts]], []
    total = 2 * (len(groups) + len(timed))
    bar = tqdm(total=total, desc=name, unit="batch", delay=2, disable=train.rank() != 0)
    for temperature in (0.0, 1.0):
        found = {draft: ([], [], [], [], []) for draft in drafts}  # of this rank: Stats, lengths by prompt; the rest by token
        for number, group in enumerate(groups):
            train.check_stop()
            bar.update()
            if number % train.world_size() != train.rank():
                continue
            sampling = {"temperature": temperature, "generator": torch.Generator(device), **common}
            ids, mask = left_padded(group, device)
            sampling["generator"].manual_seed(seed * 1_000_003 + number)
            text = autoregressive_generate(target, ids, mask, **sampling).cpu()
            written = [response(row[ids.shape[1] :], prompt, end) for row, prompt in zip(text, group, strict=True)]
            text, labels = (tensor.to(device) for tensor in data.collate(written))
            for draft, model in drafts.items():
                exact = expected_acceptance(target, model, text, labels, temperature, vocab_size=len(tokenizer))
                sampling["generator"].manual_seed(seed * 1_000_003 + number)  # a draft's numbers do not hang on the others
                out = speculative_generate(target, model, ids, mask, gamma=args.gamma, **sampling)
                lengths = [len(example.input_ids) - example.prompt_length for example in written]
                for values, new in zip(found[draft], (out.row_stats, lengths, *exact), strict=True):
                    values += new if isinstance(new, list) else new.tolist()
        parts = train.gather_objects(found)
        gammas = sorted({args.gamma, *args.timed_gammas})
        speeds, costs = timings(target, drafts, timed, temperature, gammas, seed, common, bar)
        for draft in drafts:
            every = ([value for part in parts for value in part[draft][i]] for i in range(5))
            by_prompt, lengths, overlap, agree, ratio = every
            stats = sum(by_prompt, Stats())
            interval = bootstrap_interval([s.accepted for s in by_prompt], [s.accepted + s.rejected for s in by_prompt])
            row = {"temperature": temperature, "draft": draft, "alpha": stats.alpha, "alpha_interval": interval}
            row |= {"tau": stats.tau, "expected_acceptance": sum(overlap) / len(overlap)}
            row |= {"agreement": sum(agree) / len(agree), **speeds.get((draft, args.gamma), {})}
            row |= {
                "speedup_by_gamma": {str(n): speeds[draft, n]["speedup"] for n in gammas if speeds}
            }  # keys as JSON has them
            if not hasattr(drafts[draft], "lanes"):  # an EAGLE head's later drafts are made from its own guesses
                simulated = {str(n): simulate_rounds(torch.tensor(ratio), lengths, n, args.max_new_tokens) for n in GAMMAS}
                row |= {"tau_by_gamma": {n: each.tau for n, each in simulated.items()}}
            row |= {"cost_ratio": costs.get(draft), "scoring_ratio": {str(n): costs.get(n) for n in GAMMAS}}
            rows.append(row | {"counts": asdict(stats)})
    bar.close()
    return rows


def prompt_ids(example):
    return torch.from_numpy(example.input_ids[: example.prompt_length]).long()


def left_padded(prompts, device):
    """Prompts [T_i] as input_ids and attention_mask [B, T]."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.stack([F.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones_like(prompt), (width - len(prompt), 0)) for prompt in prompts])
    return ids.to(device), mask.to(device)


def response(tokens, prompt, end: int) -> data.Example:
    """Prompt and generated tokens, up to the end token (what follows it is padding), as an example."""
    ends = (tokens == end).nonzero()
    tokens = tokens[: int(ends[0]) + 1] if len(ends) else tokens
    return data.Example(torch.cat([prompt, tokens]).int().numpy(), len(prompt))


def timings(target, drafts, prompts, temperature, gammas, seed, common, bar) -> tuple[dict, dict]:
    """(draft, gamma) -> its speed-up over the target alone (tokens per second over tokens per second), tokens per second and
    seconds per response; and what a step of each draft, and the target's scoring of gamma + 1 positions, cost in units of a
    target step: draft or gamma -> ratio of seconds (not of EAGLE heads, which take no step alone).
    Medians over prompts (other work on the machine spoils a sum), measured in turn on rank 0 ({} elsewhere)."""
    if train.rank() != 0:
        return {}, {}
    alone, device = (object(), 0), target.device
    taken, tokens = ({turn: [] for turn in (alone, *itertools.product(drafts, gammas))} for _ in range(2))
    steps, costs = {draft: model for draft, model in drafts.items() if not hasattr(model, "lanes")}, []
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first one twice: its first run is the warm-up
        train.check_stop()
        for (draft, gamma), found in taken.items():
            sampling = {"temperature": temperature, "generator": torch.Generator(device).manual_seed(seed + number), **common}
            start = clock(device)
            if gamma:
                sequences = speculative_generate(target, drafts[draft], prompt, gamma=gamma, **sampling).sequences
            else:
                sequences = autoregressive_generate(target, prompt, **sampling)
            if number:
                found.append(clock(device) - start)
                tokens[draft, gamma].append(sequences.shape[1] - prompt.shape[1])
        if number:
            costs.append(
                step_seconds([(target, 1 + n) for n in (0, *GAMMAS)] + [(model, 1) for model in steps.values()], prompt)
            )
        bar.update(bool(number))
    rates = {turn: [n / seconds for n, seconds in zip(tokens[turn], taken[turn], strict=True)] for turn in taken}
    speeds = {
        turn: {
            "speedup": statistics.median(ours / theirs for ours, theirs in zip(rates[turn], rates[alone], strict=True)),
            "tokens_per_second": statistics.median(rates[turn]),
            "seconds_per_response": statistics.median(taken[turn]),
        }
        for turn in taken
    }
    ratios = [statistics.median(seconds[i] / seconds[0] for seconds in costs) for i in range(1, len(costs[0]))]
    return speeds, dict(zip((*GAMMAS, *steps), ratios, strict=True))


def step_seconds(turns, prompt, repeats: int = 3) -> list[float]:
    """Seconds of a forward of n tokens with about the prompt [1, T] in the cache, for each (model, n): the fastest of several,
    taken in turn."""
    found, length = [[] for _ in turns], max(1, prompt.shape[1] - len(GAMMAS))  # no position beyond those of decoding
    with _inference(*(model for model, _ in turns)):
        lanes = {model: _Lane(model, prompt, None, model.config.vocab_size, 0) for model, _ in turns}
        for lane in lanes.values():
            lane.forward(prompt[:, :length])
        for _ in range(repeats):
            for (model, n), seconds in zip(turns, found, strict=True):
                start = clock(prompt.device)
                lanes[model].forward(prompt[:, :1].expand(1, n), keep=n)  # which tokens they are costs nothing
                seconds.append(clock(prompt.device) - start)
                lanes[model].rollback([length])
    return [min(seconds) for seconds in found]


def picture(target, base, reference, draft, prompt, tokenizer, args, k: float) -> dict:
    """A response as speculative decoding at temperature 0 writes it after `prompt` [T], token by token: where each came from
    ("accepted": a draft; "corrected": the target's, after a rejection; "bonus": the target's, after drafts that were all
    accepted), its gap KL(p || q_base) - KL(p || q_ref), which stage 2 starts from, and whether that is in the top k."""
    origins, end, prompt = [], tokenizer.eos_token_id, prompt.to(target.device)[None]

    def note(row, tokens, accepted):
        usable = min(args.gamma, args.max_new_tokens - len(origins) - 1)
        own = "corrected" if accepted < usable else "bonus"
        origins.extend(["accepted"] * accepted + [own] * (len(tokens) - accepted))

    how = {"max_new_tokens": args.max_new_tokens, "eos_token_id": end, "vocab_size": len(tokenizer), "on_tokens": note}
    text = speculative_generate(target, draft, prompt, gamma=args.gamma, **how).sequences
    length = prompt.shape[1]
    with _inference(target, base, reference):
        p, q, r = (model(text).logits[0, length - 1 : -1, : len(tokenizer)] for model in (target, base, reference))
        gap = token_kl(p, q) - token_kl(p, r)
        selected = select_tokens(gap, k)
    tokens = [tokenizer.decode([token]) for token in text[0, length:].tolist()]
    found = {"tokens": tokens, "origins": origins, "gap": gap.tolist(), "selected": selected.tolist()}
    return {"gamma": args.gamma, "k": k, **found}


def clock(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rank_correlation(a, b) -> float:
    """Spearman's, of two arrays [N] of values that are nearly all different (ties are ranked by place)."""
    ranks = [np.argsort(np.argsort(values, kind="stable")) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def some_of(valid, mixed: bool = False):
    """The type of an argument that is some of these names, each once, with commas between; `mixed`: or a+b, two and more."""

    def names(text):
        found = text.split(",")
        for name in found:
            parts = [one_of(valid)(part) for part in (name.split("+") if mixed else [name])]
            if len(set(parts)) < len(parts):
                raise argparse.ArgumentTypeError(f"{name!r} has a part twice")
        if twice := [name for name in found if found.count(name) > 1]:
            raise argparse.ArgumentTypeError(f"{twice[0]!r} is there twice")
        return found

    return names


def rank_0_first() -> None:
    """Let rank 0 speak first, upon whose end torchrun ends the others: what is wrong on every rank is said once."""
    if int(os.environ.get("RANK", 0)):
        for _ in range(50):
            if train.asked_to_stop:
                os._exit(128 + train.asked_to_stop)
            time.sleep(0.1)


def parse(argv=None):
    def numbers(text):
        if not all(number.strip().removeprefix("-").isdecimal() for number in text.split(",")):
            raise argparse.ArgumentTypeError(f"must be whole numbers with commas between, got {text!r}")
        return tuple(int(number) for number in text.split(","))

    class OneParser(Parser):
        def error(self, message):
            rank_0_first()
            super().error(message)

    parser = OneParser(prog="run_all.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", type=one_of(PRESETS), help="tiny: the offline task and pair, minutes on two cores")
    add(
        "--tasks",
        type=some_of(data.TASKS, mixed=True),
        default=",".join(RECIPES),
        help=f"comma-separated, of {', '.join(data.TASKS)}, or mixed: gsm8k+mbpp",
    )
    pairs = [*PAIRS, "custom"]
    add("--pairs", type=some_of(pairs), default="pythia,codegen", help=f"comma-separated, of {', '.join(pairs)}")
    add("--target", help="with --pairs custom: Hub id or folder of your target")
    add("--draft", help="with --pairs custom: Hub id or folder of your draft")
    add("--methods", help="default distillspec,adaspec; comma-separated, each NAME[:KEY=VALUE]..., see Method in the source")
    add("--ablation", type=one_of(ABLATIONS), help=f"--methods of a comparison: {', '.join(ABLATIONS)}")
    for key in ("divergence", "gap"):
        add(f"--{key}", type=one_of(LOSSES), default="fkl", help="of methods that name none (gap: of adaspec)")
    add("--data", type=one_of(SOURCES), default="ground-truth", help="who writes the responses, of methods that name nobody")
    add("--match", type=one_of(MATCHES), default="steps", help="what AdaSPEC has in common with DistillSpec, see Method")
    add("--split", type=one_of(["validation", "test"]), default="test", help="rows to evaluate on: choose on validation")
    add("--regime", type=one_of(["3-epoch", "optimal"]), default="3-epoch", help="the paper's epochs: 3-epoch or optimal")
    add("--seeds", type=numbers, default="0", help="comma-separated")
    add("--target-seed", type=int, help="train one target, with this seed, for all --seeds; default: one for each")
    add("--data-dir", help="rows from <data-dir>/<task>/<split>.jsonl instead of the Hub")
    add("--models-dir", help="folder that holds the pretrained models by name")
    add("--out", default="runs", help="where stages and results go")
    add("--limit", type=int, help="train on the first rows only")
    add("--k", type=float, default=0.4, help="AdaSPEC's fraction of tokens kept")
    add("--batch", type=int, help="rows of an optimiser step, over all ranks")
    add("--micro-batch", type=int, help="rows of one forward on one rank")
    add("--lr", type=float, help="of reference and draft")
    add("--target-lr", type=float)
    add("--epochs", type=numbers, help="target,reference,draft; target 0: it is fine-tuned already")
    add("--max-steps", type=int, help="cut every stage short")
    add("--max-length", type=int, default=512, help="tokens of a training row")
    add("--cache-gb", type=float, default=100.0, help="bound on the target's cached hidden states; 0: no cache")
    add("--save-minutes", type=float, default=10.0, help="how often the state of a running stage is saved")
    add("--shard-target", action="store_true", help="spread the frozen target's layers over the ranks (FSDP)")
    add("--dtype", type=one_of(train.DTYPES), help="default bfloat16 on GPU, float32 on CPU")
    add("--gamma", type=int, default=5, help="tokens drafted a round")
    add("--timed-gammas", type=numbers, default=(), help="comma-separated: measure the speed-up for these too")
    add("--max-new-tokens", type=int, default=128)
    add("--eval-prompts", type=int, default=200, help="test prompts that acceptance is counted on")
    add("--eval-batch", type=int, default=20)
    add("--timed-prompts", type=int, default=20, help="test prompts that the speed-up is measured on, one by one")
    parser.set_defaults(**PRESETS.get(parser.parse_known_args(argv)[0].preset, {}))
    args = parser.parse_args(argv)
    for flag, value in vars(args).items():
        if type(value) is int and value < (0 if flag == "target_seed" else 1):
            parser.error(f"--{flag.replace('_', '-')} must be at least 1, got {value}")
        if value == "":
            parser.error(f"--{flag.replace('_', '-')} is empty; leave it out or give it a value")
    if args.max_new_tokens < 2:
        parser.error("--max-new-tokens must be at least 2, or no draft is ever judged")
    for flag in ("lr", "target_lr", "cache_gb", "save_minutes"):
        if getattr(args, flag) is not None and not 0 <= getattr(args, flag) < float("inf"):
            parser.error(f"--{flag.replace('_', '-')} must be finite and at least 0, got {getattr(args, flag)}")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0 or max(args.seeds) >= 2**32:
        parser.error(f"--seeds must be different numbers of at least 0 and below 2**32, got {','.join(map(str, args.seeds))}")
    if min(args.timed_gammas, default=1) < 1:
        parser.error(f"--timed-gammas must be at least 1, got {min(args.timed_gammas)}")
    if not 0 < args.k <= 1:
        parser.error(f"--k must be in (0, 1], got {args.k}")
    if args.ablation and args.methods:
        parser.error("--ablation is a list of methods: leave --methods out")
    texts = ABLATIONS[args.ablation] if args.ablation else (args.methods or "distillspec,adaspec").split(",")
    args.methods, flags = [], {key: getattr(args, key) for key in ("divergence", "data", "gap", "k", "match")}
    for text in texts:
        try:
            args.methods.append(Method.parse(text, **flags))
        except (ValueError, argparse.ArgumentTypeError) as error:
            parser.error(f"--methods: {text!r}: {error}")
    if twice := [str(method) for method in args.methods if args.methods.count(method) > 1]:
        parser.error(f"--methods: {twice[0]} is there twice")
    if (single := [task for task in args.tasks if "+" not in task]) and (some := [m for m in args.methods if m.rows != "all"]):
        parser.error(f"--methods: {some[0]} is for a mixed task such as gsm8k+mbpp, and {single[0]} is none")
    if args.epochs and (len(args.epochs) != 3 or args.epochs[0] < 0 or min(args.epochs[1:]) < 1):
        parser.error("--epochs takes three numbers: target (0 or more), reference and draft (1 or more)")
    if "custom" in args.pairs and not (args.target and args.draft):
        parser.error("--pairs custom needs --target and --draft")
    if "custom" not in args.pairs and (args.target or args.draft):
        parser.error("--target and --draft are the pair custom: add --pairs custom")
    for flag in ("data_dir", "models_dir"):
        if getattr(args, flag) and not Path(getattr(args, flag)).is_dir():
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: no such folder")
    return args


def writable(out: Path) -> None:
    """Raises ValueError where the folder `out` cannot be made or written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out {out} is no folder to write to ({error.strerror}); give another") from error


def check_usable(cell: Cell) -> None:
    """What stages and evaluation will ask of the cell's models. Raises ValueError for one that cannot give it."""
    for name, model in zip(cell.names, cell.models, strict=True):
        train.Head(model, len(cell.tokenizer))
        _Lane(model, torch.zeros(2, 1), None, None, None)  # what decoding a batch asks of a model
        for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):  # the common ones; Head.check finds others
            if getattr(model.config, key, None) not in (None, 1):
                raise ValueError(f"{name} changes its logits after the output head ({key}); the loss here would miss that")


def preflight(args, device) -> None:
    """Go through every cell of the grid before any training, and print what will be done and about what it takes.

    Estimates, in bytes: a stage in training has float32 weights, gradients and two moments (16 a parameter), its saved
    generations, three while one is written, weights and moments (36 a parameter). Activations are not counted.
    Raises ValueError for what would fail later.
    """
    world, gib, item = train.world_size(), 2**30, train.DTYPES[args.dtype].itemsize
    lines, kept, passing, memory = [], 0, 0, 0
    for pair in args.pairs:
        for task in args.tasks:
            cell = make_cell(pair, task, args.seeds[0], args, device)  # seeds differ in nothing that is checked here
            (target_epochs, *epochs), batch = cell.plan["epochs"], cell.plan["batch_size"]
            check_usable(cell)
            sizes = {batch, *(method.batch for method in args.methods if method.batch)}
            sizes |= {SCRATCH["batch_size"]} if cell.scratch else set()
            if (least := min(*sizes, *map(len, cell.parts.values()))) < world:
                raise ValueError(
                    f"{task}: batches of {least} rows do not feed {world} ranks; raise --batch, or a method's batch"
                )
            target, draft = (sum(p.numel() for p in model.parameters()) for model in cell.models)
            drafts = cell.scratch  # and a reference for each of AdaSPEC's: at most
            for method in args.methods:
                drafts += (1 + (method.name == "adaspec")) * (len(cell.parts) if method.rows == "in-turn" else 1)
            trained = bool(target_epochs) + cell.scratch
            weights = 4 * (target * trained + draft * drafts)
            state = max(36 * target if trained else 0, 36 * draft + cell.cache_bytes())
            for folder in (cell.folder.with_name(f"seed{seed}") for seed in args.seeds):
                if not (folder / "evaluation.json").is_file():  # what an unfinished cell has on the disk is not needed again
                    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                    kept += max(0, weights - there)
                    passing = max(passing, state - max(0, there - weights))
            frozen = item * (target / (world if args.shard_target else 1) + draft)
            memory = max(memory, 16 * target if trained else 0, frozen + 16 * draft)
            steps = [min(n * -(-len(cell.examples) // batch), args.max_steps or sys.maxsize) for n in (target_epochs, *epochs)]
            what, rest = cell.header.strip().split(": ", 1)
            seeds = "".join(f", {seed}" for seed in args.seeds[1:])
            lines.append(f"{what}{seeds}: {rest}; steps of target, reference, draft: {', '.join(map(str, steps))}")
    free = shutil.disk_usage(args.out).free
    if device.type == "cuda":
        machine = torch.cuda.get_device_properties(device).total_memory
    else:  # shared by this machine's ranks
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    need = f"{(kept + passing) / gib:.3f} GiB of disk ({kept / gib:.3f} to stay) of {free / gib:.3f} free"
    lines.append(f"About {need}, {memory / gib:.3f} GiB of memory without activations of {machine / gib:.3f}")
    say("\n".join(["Plan", *lines]))
    if kept + passing > free:
        raise ValueError(f"the disk of --out {args.out} is too small: {need}; make room, or lower --cache-gb")
    if memory > machine:
        say("Warning: the largest stage needs more memory than there is (--shard-target spreads the target over ranks)")


@contextmanager
def locked(out: Path):
    """Hold the folder `out` for this run alone. Raises ValueError where another run holds it."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
        except BlockingIOError:
            raise ValueError(f"another run is using {out}: wait for it, or give another --out") from None
        yield


def write_results(args, started: float) -> Path:
    """Put the rows of every cell there is under --out, not only this command's, into results.json."""
    path, cells = Path(args.out, "results.json"), [read(note) for note in sorted(Path(args.out).rglob("evaluation.json"))]
    made_by = {"commands": list(dict.fromkeys(cell["command"] for cell in cells if cell))}
    made_by |= {"seconds": round(time.time() - started), "git": git_commit(), **versions()}
    read(path)  # for the word it says where the one there is damaged
    found = {key: [each for cell in cells for each in cell.get(key, [])] for key in ("rows", "pictures")}
    write(path, made_by | {"machine": report.machine()} | found)
    return path


def main(argv=None) -> None:
    args, started = parse(argv), time.time()
    device = train.setup()
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    data.datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    if train.rank() != 0:
        transformers.logging.set_verbosity_error()
    if args.shard_target and not dist.is_initialized():
        raise ValueError("--shard-target spreads the target over ranks: start with torchrun")
    writable(Path(args.out))
    rows, path = [], None
    with locked(Path(args.out)) if train.rank() == 0 else nullcontext():
        preflight(args, device)
        for pair in args.pairs:
            for task in args.tasks:
                for seed in args.seeds:
                    cell = make_cell(pair, task, seed, args, device)
                    rows += cell.run()
                    path = write_results(args, started) if train.rank() == 0 else None
    where = f"Results: {path}; models: {Path(args.out)}/<pair>/<task>/seed<n>/"
    say("\n".join(["", report.table(rows), report.over_seeds(rows), report.eagle_table(rows), where]))
    if train.rank() == 0 and importlib.util.find_spec("matplotlib"):
        results, folder = read(path), Path(args.out, "figures")
        report.figures(results["rows"], folder, results["pictures"])
        say(f"Figures: {folder}/")
    if cell.serve:
        say(cell.serve)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def command() -> None:
    """`main`, with what can go wrong said in one line: exit code 130 after Ctrl-C, 143 after SIGTERM, 1 after an error."""
    who = f"run_all.py (rank {os.environ['RANK']})" if "RANK" in os.environ else "run_all.py"
    train.stop_on_signals()
    code, message, patience = 0, None, 0
    try:
        main()
    except (train.Stopped, KeyboardInterrupt) as stopped:
        name = str(stopped) or "SIGINT"
        code, message = 128 + signal.Signals[name], f"stopped by {name}; the same command goes on from the saved state"
    except (ValueError, OSError, train.NonFiniteError) as error:
        code, message = 1, f"error: {error}"
        rank_0_first()
    except RuntimeError as error:
        if not ("RANK" in os.environ and (isinstance(error, dist.DistError) or "gloo" in str(error))):
            raise
        code, message = 1, "another rank is gone, torchrun names it; the same command goes on from the last saved state"
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        patience = 10  # seconds for torchrun to find the dead rank before this one ends too, and to end this one
    if message:
        print(f"{who}: {message}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    time.sleep(patience)
    os._exit(code)  # no waiting for ranks that are gone, and no destructors that would


if __name__ == "__main__":
    command()
