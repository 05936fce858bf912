"""Our training step of stage 2 against the official one, and how it grows.

    python -m extras.bench_train --data-dir DIR --json train.json
    python -m extras.bench_train --scale --json scale.json

The first compares the loss step (output heads, loss, gradients), an epoch of the tiny pair, and a
whole step at the paper's shapes. What the target and the reference say is at hand, as it is in
every epoch but the first. --scale varies the loss step's tokens, vocabulary and chunk, and adds a
second rank.
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPTNeoXConfig

import data
import head
import models
import ranks
from cells import SCRATCH_VOCABULARY
from cli import Parser, one_of, run_command, some_of, whole
from extras import measure
from settings import METHODS, PAIRS
from teacher import Frozen, ReferenceLoss, TokenCache
from train import DTYPES, Student, adaspec_step, train

# a batch of 8 x 256 tokens, 45% of them responses; the pythia pair's vocabulary and widths
SHAPE = {"vocab_size": 50304, "target_width": 2048, "draft_width": 256}
SHAPE |= {"rows": 8, "length": 256, "prompt": 141}
METHOD = METHODS["adaspec"]
ROOT = Path(__file__).parents[1]


# The official step and ours


def official_loss(target_logits, reference_logits, draft_logits, labels, k):
    """The loss of CustomTrainer in the authors' utils.py (github.com/yuezhouhu/adaspec), restated:
    shifted copies, masked selects, three float32 softmaxes, KLDivLoss twice, quantile."""
    keep = (labels[:, 1:] != -100).flatten()[:, None]
    target_logits, reference_logits, draft_logits = (
        logits[:, :-1].flatten(0, 1).masked_select(keep).view(-1, logits.shape[-1]).float()
        for logits in (target_logits, reference_logits, draft_logits)
    )
    p = F.softmax(target_logits, dim=-1)
    divergence = nn.KLDivLoss(reduction="none")
    draft_kl = divergence(F.log_softmax(draft_logits, dim=-1), p).sum(-1)
    reference_kl = divergence(F.log_softmax(reference_logits, dim=-1), p).sum(-1)
    gap = draft_kl - reference_kl
    return draft_kl.masked_select(gap >= torch.quantile(gap, 1 - k)).mean()


def official_step(target, reference, draft, input_ids, labels, dtype) -> None:
    """The official step up to the gradients: three full forwards, logits at all positions, an
    attention mask.

    The forwards are given the labels, as there: each model so computes a cross-entropy in float32
    that nobody needs.
    """
    last = (labels != -100).cumsum(1).argmax(1)[:, None]
    mask = torch.arange(input_ids.shape[1], device=input_ids.device) <= last
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "use_cache": False}
    with autocast(input_ids.device, dtype):
        output = draft(**inputs)
    with torch.no_grad():
        frozen = [model(**inputs).logits for model in (target, reference)]
    official_loss(*frozen, output.logits, labels, METHOD.k).backward()


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def neox(vocab_size: int, width: int, layers: int, device, dtype, seed: int):
    """A GPT-NeoX model with random weights, heads as Pythia has them."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 8 if width < 1024 else 16, "max_position_embeddings": 2048}
    with torch.device(device):
        config = GPTNeoXConfig(vocab_size=vocab_size, **sizes)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def random_examples(shape: dict) -> list[data.Example]:
    rng = np.random.default_rng(0)
    size = (shape["rows"], shape["length"])
    ids = rng.integers(0, shape["vocab_size"], size, dtype=np.int32)
    return [data.Example(row, shape["prompt"]) for row in ids]


def step_calls(shape: dict, dtype, device, whole_step: bool) -> tuple[dict, nn.Module, float]:
    """One training step on random weights and tokens, official and ours as calls; the draft; and
    the seconds of the target's forward, which the cache saves in all later epochs.

    A whole step has Pythia's layers, clipping and AdamW. The other, the loss step, has models
    without layers: from hidden states to the gradients of the output head and of a norm below it.
    """
    vocab_size, width = shape["vocab_size"], shape["draft_width"]
    layers = (24, 6) if whole_step else (0, 0)
    target = neox(vocab_size, shape["target_width"], layers[0], device, dtype, seed=0)
    reference = neox(vocab_size, width, layers[1], device, dtype, seed=1)
    draft = neox(vocab_size, width, layers[1], device, torch.float32, seed=2).train()
    draft.get_input_embeddings().requires_grad_(whole_step)
    examples = random_examples(shape)
    batch = data.make_batch(examples, list(range(len(examples))), device)
    labels = data.collate(examples)[1].to(device)
    teacher = Frozen(target, vocab_size)
    seconds = measure.timed(lambda: teacher.hidden(batch), device)  # at hand from here on
    reference_kl = ReferenceLoss(Frozen(reference, vocab_size), teacher, METHOD.gap).losses(batch)
    cached = SimpleNamespace(losses=lambda batch: reference_kl)
    student = Student(draft, vocab_size)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-5, weight_decay=0.1, fused=True)

    def update():
        if whole_step:
            nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
            optimizer.step()

    def official():
        draft.zero_grad()
        official_step(target, reference, draft, batch.input_ids, labels, dtype)
        update()

    def ours():
        draft.zero_grad()
        with autocast(device, dtype):
            loss, count = adaspec_step(student, batch, teacher, cached, METHOD)
        (loss / count).backward()
        update()

    return {"official": official, "ours": ours}, draft, seconds


def epoch_calls(data_dir: str | None, limit: int, device, folder: Path) -> dict:
    """An epoch of stage 2 on the tiny pair, float32, batch 16: official steps, and `train`."""
    task = "gsm8k" if data_dir else "arithmetic"
    rows = data.load_rows(task, "train", data_dir, limit)
    spec, pair = data.TASKS[task], PAIRS["tiny"]
    texts = [spec.prompt(row) + spec.response(row) for row in rows]
    tokenizer = data.train_tokenizer(texts, SCRATCH_VOCABULARY)
    examples, _ = data.encode(task, rows, tokenizer)
    target = models.scratch_model(pair.target, tokenizer, 0).to(device).eval()
    reference = models.scratch_model(pair.draft, tokenizer, 1).to(device).eval()
    draft = models.scratch_model(pair.draft, tokenizer, 2).to(device)
    lengths = [len(example.input_ids) for example in examples]

    def official():
        model = copy.deepcopy(draft).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        for group in data.batches(lengths, 16, 0, 0):
            batch = data.collate([examples[row] for row in group])
            input_ids, labels = (tensor.to(device) for tensor in batch)
            official_step(target, reference, model, input_ids, labels, torch.float32)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    states = TokenCache(folder / "states", "bench", examples, 128, torch.float32, 16)
    teacher = Frozen(target, len(tokenizer))
    teacher.use(states, "target cache")
    losses = ReferenceLoss(Frozen(reference, len(tokenizer)), teacher, METHOD.gap)
    losses.use(TokenCache(folder / "kl", "bench", examples, 1, torch.float32, 16), device, "cache")
    inputs = (teacher, losses, METHOD)
    options = {"vocab_size": len(tokenizer), "lr": 1e-3, "epochs": 1, "batch_size": 16}

    def ours():
        train(copy.deepcopy(draft), examples, adaspec_step, inputs, **options)

    return {"official": official, "ours": ours}


def product_share(seconds: float, dtype, device) -> float:
    """How fast our loss step is as a share of the machine's rate of matrix products, which is taken
    at the shape of a chunk times the target's head."""
    width, vocab_size = SHAPE["target_width"], SHAPE["vocab_size"]
    a = torch.randn(head.CHUNK, width, dtype=dtype, device=device)
    b = torch.randn(vocab_size, width, dtype=dtype, device=device)
    best = min(measure.timed(lambda: F.linear(a, b), device) for _ in range(10))
    # both heads over all response rows, then forward and backward for the selected
    rows = SHAPE["rows"] * (SHAPE["length"] - SHAPE["prompt"])
    target, draft = (2 * vocab_size * SHAPE[name] for name in ("target_width", "draft_width"))
    operations = rows * (target + draft) + METHOD.k * rows * (target + 3 * draft)
    return operations / seconds / (2 * a.numel() * vocab_size / best)


def compare(args, device, dtype) -> dict:
    """Ours against the official step, in the --parts."""
    results = {}

    def times_faster(name: str, calls: dict, repeats: dict | None = None) -> dict:
        seconds = measure.interleaved(calls, args.rounds, device, repeats)
        ratio = measure.ratios(seconds["official"], seconds["ours"])
        results[f"{name}, times faster"] = ratio
        print(f"{name}: {measure.brief(ratio)} times faster", flush=True)
        return seconds

    def single(name: str, value: float) -> None:
        results[name] = value
        print(f"{name}: {value:.2f}", flush=True)

    if "loss" in args.parts:
        calls, _, _ = step_calls(SHAPE, dtype, device, whole_step=False)
        seconds = times_faster("loss step", calls)
        peaks = {name: measure.peak_memory(call, device) for name, call in calls.items()}
        single("loss step, times less peak memory", peaks["official"] / max(peaks["ours"], 1))
        share = product_share(min(seconds["ours"]), dtype, device)
        single("loss step, share of the machine's matrix-product rate", share)
        del calls
    if "epoch" in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            calls = epoch_calls(args.data_dir, args.limit, device, Path(folder))
            times_faster("stage 2 epoch of the tiny pair", calls)
    if "step" in args.parts:
        calls, _, filling = step_calls(SHAPE, dtype, device, whole_step=True)
        # a training step comes after others of its kind
        seconds = times_faster("whole step after the first epoch", calls, {"ours": 8})
        steps = filling / statistics.median(seconds["official"])
        single("the pass that fills the cache, in official steps", steps)
    return {"data": "gsm8k" if args.data_dir else "arithmetic"} | results


# Scale


def scale(args, device, dtype) -> dict:
    """How time and memory of our loss step grow, and what a second rank brings."""
    small = SHAPE | {"vocab_size": 12576}
    vocabularies = (6288, 12576, 25152, 50304)
    sweeps = {  # what is swept -> its value: shape, chunk
        "response tokens": {115 * n: (small | {"rows": n}, head.CHUNK) for n in (4, 8, 16, 32)},
        "vocabulary": {n: (small | {"vocab_size": n}, head.CHUNK) for n in vocabularies},
        "chunk": {n: (small, n) for n in (64, 128, 256, 512)},
    }
    results = {}
    for name, points in sweeps.items():
        calls = {n: chunked_call(*point, dtype, device) for n, point in points.items()}
        seconds = measure.interleaved(calls, args.rounds, device, dict.fromkeys(calls, 5))
        results[name] = []
        for value, call in calls.items():
            time = measure.ratios(seconds[value], seconds[min(points)])
            peak = round(measure.peak_memory(call, device) / 2**20)
            results[name].append({"value": value, "time": time, "peak_MiB": peak})
            words = f"time x {measure.brief(time)}, peak memory {peak} MiB"
            print(f"{name} {value}: {words}", flush=True)
    pairs = [(seconds_on(1, args.dtype), seconds_on(2, args.dtype)) for _ in range(args.rounds)]
    efficiency = measure.spread(one / (2 * two) for one, two in pairs)
    print(f"2 ranks against one, one thread each: efficiency {measure.brief(efficiency)}")
    return results | {"parallel efficiency of 2 ranks": efficiency}


def chunked_call(shape: dict, chunk: int, dtype, device):
    """Our loss step, as a call, with so many rows of logits at a time."""
    calls, _, _ = step_calls(shape, dtype, device, whole_step=False)

    def call():
        usual = head.CHUNK
        head.CHUNK = chunk
        calls["ours"]()
        head.CHUNK = usual

    return call


def seconds_on(count: int, dtype: str) -> float:
    """Seconds that `scale_worker` takes on so many ranks with one thread each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    worker = ["-m", "extras.bench_train", "--worker", "--dtype", dtype]
    process = subprocess.run(
        [sys.executable, *launcher, *worker],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(process.stdout.split()[-1])


def scale_worker(dtype: str) -> None:
    """Print the seconds of three steps of stage 2 with the paper's draft, 16 rows each, on the
    ranks that torchrun has started."""
    device = ranks.setup()
    shape = SHAPE | {"vocab_size": 12576, "rows": 16}
    vocab_size = shape["vocab_size"]
    target = neox(vocab_size, shape["target_width"], 0, device, DTYPES[dtype], seed=0)
    draft = neox(vocab_size, shape["draft_width"], 6, device, torch.float32, seed=2)
    reference = SimpleNamespace(losses=lambda batch: torch.zeros(len(batch.index), device=device))
    inputs = (Frozen(target, vocab_size), reference, METHOD)
    options = {"vocab_size": vocab_size, "lr": 1e-5, "batch_size": 16, "dtype": dtype}
    examples = random_examples(shape)
    train(draft, examples, adaspec_step, inputs, epochs=1, **options)
    summary = train(draft, examples, adaspec_step, inputs, epochs=3, **options)
    ranks.say(str(summary["seconds"]))
    if dist.is_initialized():
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="extras.bench_train", description=__doc__)
    add = parser.add_argument
    add("--scale", action="store_true", help="measure how the loss step grows instead")
    parts = ["loss", "epoch", "step"]
    words = "what to compare; step: with a random 1.4B target, minutes on a CPU"
    add("--parts", type=some_of(parts), default=",".join(parts), help=words)
    add("--data-dir", help="epoch over rows of <data-dir>/gsm8k/train.jsonl, not the offline task")
    add("--limit", type=whole(), default=300, help="rows of that epoch")
    words = "of the loss step and the whole step; the epoch is float32"
    add("--dtype", type=one_of(DTYPES), default="bfloat16", help=words)
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    measure.add_result_flags(parser, rounds=3)
    args = measure.parse(parser, argv)
    if args.worker:
        scale_worker(args.dtype)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = scale if args.scale else compare
    settings = {"dtype": args.dtype, "rounds": args.rounds}
    measure.save(args, settings | run(args, device, DTYPES[args.dtype]))


if __name__ == "__main__":
    run_command(main, "extras.bench_train")
