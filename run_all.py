"""The driver: every task and model pair from the base models to the table, resumable stage by stage.

    python run_all.py --preset tiny                           # offline, CPU, minutes
    torchrun --nproc_per_node 8 run_all.py                    # the paper's grid, 3-epoch regime
    torchrun --nproc_per_node 8 run_all.py --regime optimal --tasks gsm8k --pairs pythia --seeds 0,1,2

Each cell (pair, task, seed) is a folder of stages: target fine-tuned, reference distilled (stage 1), DistillSpec draft, AdaSPEC
draft (stage 2), evaluation. A stage is a Hugging Face folder plus `stage.json`, which says what made it; a finished one is
used again, and a changed setting re-runs what depends on it. AdaSPEC's quantile is taken over all response tokens of a micro-batch
of all ranks together (the official code takes it on each GPU alone); without `--micro-batch` that is the whole batch.
"""

import argparse
import hashlib
import json
import platform
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

import data
import train
from adaspec import select_tokens, token_kl
from distillspec import DIVERGENCES
from speculative import Stats, autoregressive_generate, expected_acceptance, speculative_generate


@dataclass(frozen=True)
class Pair:
    """A target and a draft: names of pretrained models (Hub ids or folders), or GPT-NeoX sizes trained from scratch."""

    target: str | dict
    draft: str | dict
    target_lr: float = 1e-5  # as in the official scripts


PAIRS = {
    "pythia": Pair("EleutherAI/pythia-1.4b", "EleutherAI/pythia-31m"),
    "codegen": Pair("microsoft/phi-2", "Salesforce/codegen-350M-mono"),
    "tiny": Pair(
        {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4},
        {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        target_lr=1e-3,
    ),
}
SCRATCH = {"vocab_size": 512, "epochs": 2, "lr": 2e-3, "batch_size": 16}  # pretraining of the pairs given by sizes

# The paper's hyper-parameters: batch, then for each pair the learning rate of reference and draft, and the epochs of target,
# reference and draft in the optimal regime. The 3-epoch regime has 3 epochs everywhere, and the same learning rates.
RECIPES = {
    "gsm8k": (16, {"pythia": (3e-4, (6, 15, 30)), "codegen": (3e-4, (3, 30, 30))}),
    "alpaca": (16, {"pythia": (3e-4, (1, 15, 30)), "codegen": (3e-4, (1, 20, 15))}),
    "mbpp": (8, {"pythia": (1e-5, (1, 30, 6)), "codegen": (1e-4, (1, 10, 6))}),
    "cnn_dailymail": (16, {"pythia": (1e-4, (1, 10, 10)), "codegen": (1e-4, (1, 10, 10))}),
    "xsum": (16, {"pythia": (3e-4, (1, 10, 10)), "codegen": (1e-4, (1, 10, 10))}),
}
OTHER_LR = {"tiny": 2e-3, "other": 3e-4}  # pairs that the paper does not have: batch 16, 3 epochs

PRESETS = {
    "tiny": {
        "tasks": "arithmetic",
        "pairs": "tiny",
        "limit": 2000,
        "max_length": 128,
        "max_new_tokens": 64,
        "eval_prompts": 100,
    },
}


def recipe(task: str, pair: str, args) -> dict:
    """Batch size, learning rate and epochs (target, reference, draft) of a cell: the paper's, unless given by flags."""
    batch, by_pair = RECIPES.get(task, (16, {}))
    lr, epochs = by_pair.get(pair, (OTHER_LR.get(pair, OTHER_LR["other"]), (3, 3, 3)))
    if args.regime == "3-epoch":
        epochs = (3, 3, 3)
    return {"batch_size": args.batch or batch, "lr": args.lr or lr, "epochs": args.epochs or epochs}


# ---------------------------------------------------------------------------------------------------------------- objectives


def cross_entropy(logits, batch):
    """Next-token cross-entropy on the response: pretraining, and the target's fine-tuning (stage 0)."""
    return F.cross_entropy(logits.float(), batch.labels, reduction="sum"), len(batch.labels)


def distillation(target, divergence: str = "fkl"):
    """Stage 1 and DistillSpec: a divergence from the frozen target on every response token."""

    def objective(logits, batch):
        with torch.no_grad():
            target_logits = target(batch.input_ids, batch.index)
        return DIVERGENCES[divergence](target_logits, logits).sum(), len(logits)

    return objective


def selective_distillation(target, reference, k: float):
    """Stage 2, AdaSPEC: forward KL on the top k of the tokens by their gap to the reference, over all ranks."""

    def objective(logits, batch):
        with torch.no_grad():
            target_logits = target(batch.input_ids, batch.index)
            reference_kl = token_kl(target_logits, reference(batch.input_ids, batch.index))
        draft_kl = token_kl(target_logits, logits)
        gaps, own = train.gather_ragged(draft_kl.detach() - reference_kl)
        selected = select_tokens(gaps, k)[own]
        return torch.where(selected, draft_kl, 0.0).sum(), selected.sum()

    return objective


# -------------------------------------------------------------------------------------------------------------------- stages


def fingerprint(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def agreed(value):
    """Rank 0's value on every rank: what one rank reads from a disk that others write to must be decided once."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def stage(folder: Path, settings: dict, work, tokenizer) -> tuple[Path, str]:
    """Run `work() -> (model, summary)` and save its model in `folder`, unless the folder holds that of equal settings.

    Returns the folder and the settings' fingerprint, which the stages that build on this one put among theirs.
    """
    mark, note = fingerprint(settings), folder / "stage.json"
    if agreed(note.is_file() and json.loads(note.read_text())["fingerprint"] == mark):
        return folder, mark
    model, summary = work()
    if train.rank() == 0:
        partial = folder.with_name(folder.name + ".partial")
        for old in (partial, folder):
            shutil.rmtree(old, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        made_by = {"fingerprint": mark, "settings": settings, "summary": summary, "versions": versions()}
        (partial / "stage.json").write_text(json.dumps(made_by, indent=1))
        partial.rename(folder)  # only a whole folder ever carries the name
    agreed(None)
    return folder, mark


def versions() -> dict:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def resolve(name: str, models_dir: str | None) -> str:
    """A model's folder under --models-dir (by its whole name or the part after the slash), a local folder, or a Hub id."""
    candidates = [Path(models_dir, name), Path(models_dir, name.split("/")[-1])] if models_dir else []
    found = next((path for path in [*candidates, Path(name)] if path.is_dir()), None)
    if found is None and models_dir:
        raise ValueError(f"model {name} is not in {models_dir} (looked for {candidates[0]} and {candidates[1]})")
    return str(found or name)


def identity(name: str) -> str:
    """What identifies a pretrained model in a fingerprint: its name and, for a local folder, its weights' sizes and times."""
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(Path(name).glob("*.safetensors"))]
    return f"{name} {stats}" if stats else name


def shared_tokenizer(target: str, draft: str):
    """The pair's tokenizer. Raises ValueError where the two disagree, naming the first token that differs."""
    tokenizers = [AutoTokenizer.from_pretrained(name) for name in (target, draft)]
    names = [{index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in tokenizers]
    for index in range(max(len(name) for name in names)):
        tokens = [name.get(index) for name in names]
        if tokens[0] != tokens[1]:
            raise ValueError(f"the tokenizers of {target} and {draft} differ: token {index} is {tokens[0]!r} and {tokens[1]!r}")
    return tokenizers[0]


def load_model(name: str, device, vocab_size: int, dtype=torch.float32):
    """A causal LM in eval mode. Raises ValueError where its output head has fewer rows than the tokenizer has tokens."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise ValueError(f"{name}: the output head has {rows} rows, the shared tokenizer {vocab_size} tokens")
    return model


def scratch_model(sizes: dict, tokenizer, seed: int):
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    extra = {"intermediate_size": 4 * sizes["hidden_size"], "max_position_embeddings": 1024}
    return AutoModelForCausalLM.from_config(
        GPTNeoXConfig(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **extra, **sizes)
    )


def say(text: str) -> None:
    if train.rank() == 0:
        tqdm.write(text)


# ---------------------------------------------------------------------------------------------------------------------- cell


def run_cell(task: str, pair_name: str, seed: int, args, device) -> list[dict]:
    """All stages of one cell; returns its rows of the table."""
    folder = Path(args.out, pair_name, task, f"seed{seed}")
    pair = Pair(args.target, args.draft) if pair_name == "custom" else PAIRS[pair_name]
    plan = recipe(task, pair_name, args)
    rows = data.load_rows(task, "train", args.data_dir, args.limit)
    spec = data.TASKS[task]
    scratch = isinstance(pair.target, dict)
    if scratch:
        tokenizer = data.train_tokenizer([spec.prompt(r) + spec.response(r) for r in rows], SCRATCH["vocab_size"])
    else:
        names = [resolve(name, args.models_dir) for name in (pair.target, pair.draft)]
        tokenizer = shared_tokenizer(*names)
    vocab_size = len(tokenizer)
    examples, dropped = data.encode(task, rows, tokenizer, args.max_length)
    test_rows = data.load_rows(task, "test", args.data_dir, args.eval_prompts)
    test, test_dropped = data.encode(task, test_rows, tokenizer, args.max_length)
    say(
        f"\n{pair_name} / {task} / seed {seed}: {len(examples)} train rows, {len(test)} test prompts"
        f" (dropped for want of a response within {args.max_length} tokens: {dropped} and {test_dropped})"
    )
    if not examples or not test:
        raise ValueError(f"{task}: no rows are left within {args.max_length} tokens; raise --max-length")
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.input_ids.tobytes() + example.prompt_length.to_bytes(4, "little"))
    common = {"data": digest.hexdigest()[:16], "seed": seed, "dtype": args.dtype, "max_steps": args.max_steps}
    frozen_dtype = train.DTYPES[args.dtype]

    def fit(name, make_model, objective, init, lr, epochs, batch_size=plan["batch_size"], on=examples, **extra):
        settings = {
            "stage": name,
            "init": init,
            "lr": lr,
            "epochs": epochs,
            "batch_size": batch_size,
            **common,
            **extra,
        }

        def work():
            model = make_model().to(device)
            summary = train.train(
                model,
                on,
                objective(),
                vocab_size=vocab_size,
                lr=lr,
                epochs=epochs,
                batch_size=batch_size,
                micro_batch=args.micro_batch,
                dtype=args.dtype,
                seed=seed,
                max_steps=args.max_steps,
                name=f"{task} {name}",
            )
            return model, summary

        return stage(folder / name, settings, work, tokenizer)

    def frozen(path):
        return train.ResponseLogits(load_model(path, device, vocab_size, frozen_dtype), vocab_size)

    if scratch:
        everything = [example._replace(prompt_length=0) for example in examples]
        recipe_of_base = {key: SCRATCH[key] for key in ("lr", "epochs", "batch_size")}
        (base_target, target_mark), (base_draft, draft_mark) = (
            fit(
                f"base-{role}",
                lambda sizes=sizes: scratch_model(sizes, tokenizer, seed),
                lambda: cross_entropy,
                sizes,
                on=everything,
                **recipe_of_base,
            )
            for role, sizes in (("target", pair.target), ("draft", pair.draft))
        )
    else:
        base_target, base_draft = names
        target_mark, draft_mark = identity(base_target), identity(base_draft)

    target_epochs, reference_epochs, draft_epochs = plan["epochs"]
    target = base_target
    if target_epochs:
        target, target_mark = fit(
            "target",
            lambda: load_model(base_target, device, vocab_size),
            lambda: cross_entropy,
            target_mark,
            args.target_lr or pair.target_lr,
            target_epochs,
        )

    def distil(epochs):  # reference and DistillSpec draft are one recipe: trained once where their epochs are equal
        return fit(
            f"distilled-{epochs}-epochs",
            lambda: load_model(base_draft, device, vocab_size),
            lambda: distillation(frozen(target)),
            draft_mark,
            plan["lr"],
            epochs,
            target=target_mark,
        )

    drafts = {"base": (base_draft, draft_mark)}
    if "distillspec" in args.methods:
        drafts["DistillSpec"] = distil(draft_epochs)
    if "adaspec" in args.methods:
        reference, reference_mark = distil(reference_epochs)
        drafts["AdaSPEC"] = fit(
            "adaspec",
            lambda: load_model(base_draft, device, vocab_size),
            lambda: selective_distillation(frozen(target), frozen(reference), args.k),
            draft_mark,
            plan["lr"],
            draft_epochs,
            target=target_mark,
            reference=reference_mark,
            k=args.k,
            micro_batch=args.micro_batch,
        )

    protocol = {
        "task": task,
        "pair": pair_name,
        "seed": seed,
        "split": "test",
        "prompts": len(test),
        "gamma": args.gamma,
        "max_new_tokens": args.max_new_tokens,
        "dtype": args.dtype,
        "timed_prompts": min(args.timed_prompts, len(test)),
    }
    marks = {"target": target_mark, **{name: mark for name, (_, mark) in drafts.items()}}
    mark, result = fingerprint(protocol | marks), folder / "evaluation.json"
    saved = agreed(json.loads(result.read_text()) if result.is_file() else None)
    if saved and saved["fingerprint"] == mark:
        return saved["rows"]
    models = {name: load_model(path, device, vocab_size, frozen_dtype) for name, (path, _) in drafts.items()}
    target_model = load_model(target, device, vocab_size, frozen_dtype)
    rows = [protocol | row for row in evaluate(target_model, models, test, tokenizer, args, seed, f"{task} evaluation")]
    if train.rank() == 0:
        result.write_text(json.dumps({"fingerprint": mark, "versions": versions(), "rows": rows}, indent=1))
    return rows


# ---------------------------------------------------------------------------------------------------------------- evaluation


def evaluate(target, drafts: dict, examples, tokenizer, args, seed: int, name: str) -> list[dict]:
    """Acceptance of every draft on held-out prompts at temperature 0 and 1, and the speed-up over the target alone.

    Counts (alpha, tau) come from decoding all prompts in batches, which are spread over the ranks; expected acceptance and
    argmax agreement from one pass over the text that the target alone writes for the same prompts; the speed-up from decoding
    the first `timed_prompts` one by one on rank 0, the target alone and each draft in turn for every prompt.
    """
    device, end, vocab_size = target.device, tokenizer.eos_token_id, len(tokenizer)
    common = {"max_new_tokens": args.max_new_tokens, "eos_token_id": end, "vocab_size": vocab_size}
    prompts = [torch.from_numpy(e.input_ids[: e.prompt_length]).long() for e in examples]
    groups = [range(i, min(i + args.eval_batch, len(prompts))) for i in range(0, len(prompts), args.eval_batch)]
    timed = range(min(args.timed_prompts, len(prompts)))
    rows = []
    bar = tqdm(total=2 * (len(groups) + len(timed)), desc=name, unit="batch", delay=2, disable=train.rank() != 0)
    for temperature in (0.0, 1.0):
        totals = {draft: [Stats(), 0.0, 0, 0] for draft in drafts}  # counts, overlap, agreements, target-written tokens
        for number, group in enumerate(groups):
            if number % train.world_size() == train.rank():
                ids, mask = left_padded([prompts[i] for i in group], device)
                random = torch.Generator(device).manual_seed(seed * 1_000_003 + number)
                text = autoregressive_generate(target, ids, mask, temperature=temperature, generator=random, **common)
                written = [response(text[row, ids.shape[1] :], prompts[i], end) for row, i in enumerate(group)]
                text_ids, labels = (t.to(device) for t in data.collate(written))
                for draft, model in drafts.items():
                    exact = expected_acceptance(target, model, text_ids, labels, temperature, vocab_size=vocab_size)
                    out = speculative_generate(
                        target, model, ids, mask, gamma=args.gamma, temperature=temperature, generator=random, **common
                    )
                    sums = (out.stats, exact.overlap.sum().item(), exact.agree.sum().item(), len(exact.agree))
                    totals[draft] = [a + b for a, b in zip(totals[draft], sums, strict=True)]
            bar.update()
        if dist.is_initialized():
            parts = [None] * train.world_size()
            dist.all_gather_object(parts, totals)
            totals = {d: [sum(x[1:], x[0]) for x in zip(*(p[d] for p in parts), strict=True)] for d in drafts}
        speed = timings(target, drafts, [prompts[i].to(device) for i in timed], temperature, args, seed, common, bar)
        for draft, (stats, overlap, agree, count) in totals.items():
            rows.append(
                {
                    "temperature": temperature,
                    "draft": draft,
                    "alpha": stats.alpha,
                    "tau": stats.tau,
                    "expected_acceptance": overlap / count,
                    "agreement": agree / count,
                    "speedup": speed.get(draft),
                    "rounds": stats.rounds,
                    "drafted": stats.drafted,
                    "accepted": stats.accepted,
                    "rejected": stats.rejected,
                    "target_calls": stats.target_calls,
                    "generated": stats.generated,
                }
            )
    bar.close()
    return rows


def left_padded(prompts, device):
    width = max(len(p) for p in prompts)
    ids = torch.stack([F.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([F.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts])
    return ids.to(device), mask.to(device)


def response(tokens, prompt, end: int) -> data.Example:
    """Prompt and generated tokens up to the end token (what follows it is padding) as an example."""
    tokens = tokens.cpu()
    ends = (tokens == end).nonzero()
    tokens = tokens[: int(ends[0]) + 1] if len(ends) else tokens
    return data.Example(torch.cat([prompt, tokens]).int().numpy(), len(prompt))


def timings(target, drafts, prompts, temperature, args, seed, common, bar) -> dict:
    """Speed-up of each draft over the target alone, tokens per second over tokens per second, on rank 0 ({} elsewhere)."""
    if train.rank() != 0:
        return {}
    seconds, tokens = dict.fromkeys(["alone", *drafts], 0.0), dict.fromkeys(["alone", *drafts], 0)
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first one twice: its first run is the warm-up
        for draft in seconds:
            sampling = {
                "temperature": temperature,
                "generator": torch.Generator(target.device).manual_seed(seed + number),
            }
            if target.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            if draft == "alone":
                sequences = autoregressive_generate(target, prompt[None], **sampling, **common)
            else:
                sequences = speculative_generate(
                    target, drafts[draft], prompt[None], gamma=args.gamma, **sampling, **common
                ).sequences
            if target.device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[draft] += time.perf_counter() - start
                tokens[draft] += sequences.shape[1] - len(prompt)
        bar.update(1 if number else 0)
    return {d: tokens[d] / seconds[d] / (tokens["alone"] / seconds["alone"]) for d in drafts}


def table(rows: list[dict]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| task | pair | seed | T | draft | alpha | tau | expected acceptance | argmax agreement | speed-up |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        lines.append(
            f"| {r['task']} | {r['pair']} | {r['seed']} | {r['temperature']:g} | {r['draft']} | {r['alpha']:.3f} | {r['tau']:.2f} "
            f"| {r['expected_acceptance']:.3f} | {r['agreement']:.3f} | {r['speedup']:.2f}x |"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------- main


def parse(argv=None):
    names = lambda text: text.split(",")  # noqa: E731
    numbers = lambda text: tuple(int(x) for x in text.split(","))  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="tiny: the offline task and pair, minutes on two cores")
    add("--tasks", default=",".join(RECIPES), help=f"comma-separated, of {', '.join(data.TASKS)}")
    add(
        "--pairs",
        default="pythia,codegen",
        help=f"comma-separated, of {', '.join(PAIRS)}; or custom with --target, --draft",
    )
    add("--target", help="Hub id or folder of your own target (with --pairs custom)")
    add("--draft", help="Hub id or folder of your own draft (with --pairs custom)")
    add("--methods", type=names, default=["distillspec", "adaspec"], help="distillspec,adaspec")
    add("--regime", choices=["3-epoch", "optimal"], default="3-epoch", help="the paper's epochs")
    add("--seeds", type=numbers, default=(0,), help="comma-separated")
    add("--data-dir", help="local rows <task>/<split>.jsonl instead of the Hub's")
    add("--models-dir", help="folder that holds the pretrained models by name")
    add("--out", default="runs", help="where stages and results go")
    add("--limit", type=int, help="train on the first rows only")
    add("--k", type=float, default=0.4, help="AdaSPEC's fraction of tokens kept")
    add("--batch", type=int, help="rows of an optimiser step, over all ranks")
    add(
        "--micro-batch",
        type=int,
        help="rows of one forward on one rank (AdaSPEC's quantile is then over micro-batches)",
    )
    add("--lr", type=float, help="of reference and draft")
    add("--target-lr", type=float)
    add("--epochs", type=numbers, help="target,reference,draft; 0 for the target takes it as it is")
    add("--max-steps", type=int, help="cut every stage short")
    add("--max-length", type=int, default=512, help="tokens of a training row")
    add("--dtype", choices=train.DTYPES, help="autocast and frozen models; default bfloat16 on GPU, float32 on CPU")
    add("--gamma", type=int, default=5, help="drafted tokens a round")
    add("--max-new-tokens", type=int, default=128)
    add("--eval-prompts", type=int, default=200, help="test prompts that acceptance is counted on")
    add("--eval-batch", type=int, default=20)
    add("--timed-prompts", type=int, default=20, help="test prompts, one by one, that the speed-up is measured on")
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    args = parser.parse_args(argv)
    args.tasks, args.pairs = args.tasks.split(","), args.pairs.split(",")
    for what, given, valid in (
        ("task", args.tasks, data.TASKS),
        ("pair", args.pairs, [*PAIRS, "custom"]),
        ("method", args.methods, ["distillspec", "adaspec"]),
    ):
        for name in given:
            if name not in valid:
                parser.error(f"unknown {what} {name!r}, expected one of {', '.join(valid)}")
    for flag in (
        "limit",
        "batch",
        "micro_batch",
        "max_steps",
        "gamma",
        "max_new_tokens",
        "eval_prompts",
        "eval_batch",
        "timed_prompts",
    ):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1")
    if not 0 < args.k <= 1:
        parser.error(f"--k must be in (0, 1], got {args.k}")
    if args.epochs and (len(args.epochs) != 3 or args.epochs[0] < 0 or min(args.epochs[1:]) < 1):
        parser.error("--epochs takes three numbers: target (0 or more), reference and draft (1 or more)")
    if "custom" in args.pairs and not (args.target and args.draft):
        parser.error("--pairs custom needs --target and --draft")
    return args


def main(argv=None) -> None:
    args = parse(argv)
    device = train.setup()
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    data.datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    if train.rank() != 0:
        transformers.logging.set_verbosity_error()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    started, rows = time.time(), []
    for pair in args.pairs:
        for task in args.tasks:
            for seed in args.seeds:
                rows += run_cell(task, pair, seed, args, device)
    protocol = (
        f"Protocol: first {args.eval_prompts} test prompts (speed-up: first {args.timed_prompts}, one by one), gamma {args.gamma}, "
        f"max_new_tokens {args.max_new_tokens}, {args.dtype}, {train.world_size()} x {device.type}, torch {torch.__version__}; "
        f"alpha = accepted / judged; expected acceptance and agreement on the target's own text."
    )
    if train.rank() == 0:
        results = {
            "command": shlex.join(sys.argv),
            "protocol": protocol,
            "versions": versions(),
            "seconds": round(time.time() - started),
            "rows": rows,
        }
        Path(args.out, "results.json").write_text(json.dumps(results, indent=1))
    say(f"\n{table(rows)}\n\n{protocol}\nWritten to {Path(args.out, 'results.json')}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
