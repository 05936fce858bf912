"""Our training steps against the official one and Liger-Kernel's, and how they grow.

    python -m extras.bench_train --data-dir DIR --json train.json
    python -m extras.bench_train --parts liger --dtype float32 --json liger.json
    python -m extras.bench_train --scale --json scale.json

The first compares stage 2 with the official step: the loss step (output heads, loss, gradients), an
epoch of the tiny pair, and a whole step; and the loss step of distillation on all tokens, by JSD,
with Liger-Kernel's chunked loss, where that is installed. Models have random weights in the sizes
of a pair (--shapes). What the target and the reference say is at hand, as it is in every epoch but
the first. --scale varies the loss step's tokens, vocabulary and chunk, and adds a second rank.
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import data
import head
import models
import ranks
from cells import SCRATCH_VOCABULARY
from cli import Parser, one_of, run_command, some_of, whole
from extras import measure
from extras.peers import liger_losses, official_step
from settings import METHODS, PAIRS, Method
from teacher import Frozen, ReferenceLoss, TokenCache
from train import DTYPES, Student, adaspec_step, distillation_step, train

BATCH = {"rows": 8, "length": 256, "prompt": 141}  # 45% of its tokens are responses
SMALL = measure.SHAPES["pythia"] | BATCH | {"vocab_size": 12576}  # of --scale
METHOD = METHODS["adaspec"]
JSD = Method("distillspec", divergence="jsd")
ROOT = Path(__file__).parents[1]


# The steps


def random_examples(shape: dict) -> list[data.Example]:
    rng = np.random.default_rng(0)
    size = (shape["rows"], shape["length"])
    ids = rng.integers(0, shape["vocab_size"], size, dtype=np.int32)
    return [data.Example(row, shape["prompt"]) for row in ids]


class Trio:
    """Random target, reference and draft of a shape, and a batch of random tokens.

    Without `layers` they have none: a step goes from hidden states to the gradients of the draft's
    output head and of the norm below it.
    """

    def __init__(self, shape: dict, dtype, device, layers: bool):
        def model(role: str, seed: int, dtype):
            sizes = shape[role] if layers else shape[role] | {"num_hidden_layers": 0}
            return measure.random_model(shape["vocab_size"], sizes, dtype, device, seed)

        self.target = model("target", 0, dtype)
        self.reference = model("draft", 1, dtype)
        self.draft = model("draft", 2, torch.float32).train()
        self.draft.get_input_embeddings().requires_grad_(layers)
        examples = random_examples(shape)
        self.batch = data.make_batch(examples, list(range(len(examples))), device)
        self.labels = data.collate(examples)[1].to(device)
        self.teacher = Frozen(self.target, shape["vocab_size"])
        self.student = Student(self.draft, shape["vocab_size"])


def step_calls(shape: dict, dtype, device, whole_step: bool) -> tuple[dict, nn.Module, float]:
    """One training step of stage 2, official and ours as calls; the draft; and the seconds of the
    target's forward, which the cache saves in all later epochs.

    A whole step has the models' layers, clipping and AdamW; the other is the loss step.
    """
    trio = Trio(shape, dtype, device, layers=whole_step)
    draft, batch, teacher = trio.draft, trio.batch, trio.teacher
    seconds = measure.timed(lambda: teacher.hidden(batch), device)  # at hand from here on
    reference = Frozen(trio.reference, shape["vocab_size"])
    reference_kl = ReferenceLoss(reference, teacher, METHOD.gap).losses(batch)
    cached = SimpleNamespace(losses=lambda batch: reference_kl)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-5, weight_decay=0.1, fused=True)

    def update():
        if whole_step:
            nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
            optimizer.step()

    def official():
        draft.zero_grad()
        frozen = trio.target, trio.reference
        official_step(*frozen, draft, batch.input_ids, trio.labels, METHOD.k, dtype)
        update()

    def ours():
        draft.zero_grad()
        with measure.autocast(device, dtype):
            loss, count = adaspec_step(trio.student, batch, teacher, cached, METHOD)
        (loss / count).backward()
        update()

    return {"official": official, "ours": ours}, draft, seconds


def liger_calls(shape: dict, dtype, device) -> tuple[dict, nn.Module]:
    """The loss step of distillation by JSD on all response tokens, and no others, as calls that
    give the loss: ours, and one with each of Liger-Kernel's losses; and the draft."""
    trio = Trio(shape, dtype, device, layers=False)
    draft, batch = trio.draft, trio.batch
    heads = [model.get_output_embeddings().weight for model in (draft, trio.target)]

    def step(loss_and_count: Callable):
        def call():
            draft.zero_grad()
            with measure.autocast(device, dtype):
                loss, count = loss_and_count()
            (loss / count).backward()
            return loss.item() / count

        return call

    def with_liger(loss: nn.Module):
        def loss_and_count():
            states = trio.student.hidden(batch), trio.teacher.hidden(batch)
            return loss(states[0], heads[0], states[1], heads[1], batch.labels), 1

        return loss_and_count

    calls = {"ours": step(lambda: distillation_step(trio.student, batch, trio.teacher, JSD))}
    return calls | {name: step(with_liger(loss)) for name, loss in liger_losses().items()}, draft


def difference(calls: dict, draft: nn.Module) -> float:
    """How far the losses and gradients of the calls are from those of the first, relative to these;
    the largest."""
    results = []
    for call in calls.values():
        loss = torch.tensor([call()])
        gradient = [p.grad.flatten() for p in draft.parameters() if p.grad is not None]
        results.append((loss, torch.cat(gradient)))
    pairs = [pair for result in results for pair in zip(result, results[0], strict=True)]
    return max(float((own - first).norm() / first.norm()) for own, first in pairs)


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
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
        for group in data.batches(lengths, 16, 0, 0):
            batch = data.collate([examples[row] for row in group])
            input_ids, labels = (tensor.to(device) for tensor in batch)
            official_step(target, reference, model, input_ids, labels, METHOD.k, torch.float32)
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


def product_share(seconds: float, shape: dict, dtype, device) -> float:
    """How fast our loss step is as a share of the machine's rate of matrix products, which is taken
    at the shape of a chunk times the target's head."""
    vocab_size, rows = shape["vocab_size"], shape["rows"] * (shape["length"] - shape["prompt"])
    a = torch.randn(head.CHUNK, shape["target"]["hidden_size"], dtype=dtype, device=device)
    b = torch.randn(vocab_size, a.shape[1], dtype=dtype, device=device)
    best = min(measure.timed(lambda: F.linear(a, b), device) for _ in range(10))
    # both heads over all response rows, then forward and backward for the selected
    target, draft = (2 * vocab_size * shape[role]["hidden_size"] for role in ("target", "draft"))
    operations = rows * (target + draft) + METHOD.k * rows * (target + 3 * draft)
    return operations / seconds / (2 * a.numel() * vocab_size / best)


class Comparison:
    """Ours against another's: `results` by name, printed as they come."""

    def __init__(self, rounds: int, device):
        self.rounds = rounds
        self.device = device
        self.results = {}

    def note(self, name: str, value) -> None:
        self.results[name] = value
        print(f"{name}: {measure.brief(value) if isinstance(value, dict) else f'{value:.3g}'}")
        sys.stdout.flush()

    def times(self, names: dict, calls: dict, repeats: dict | None = None) -> dict:
        """Time the calls against "ours"; names: call -> what it is called in the results."""
        seconds = measure.interleaved(calls, self.rounds, self.device, repeats)
        for call, name in names.items():
            self.note(f"{name}, times faster", measure.ratios(seconds[call], seconds["ours"]))
        return seconds

    def memory(self, names: dict, calls: dict, draft: nn.Module) -> None:
        """Likewise their peak memory, the draft's gradients included."""
        peaks = {}
        for name, call in calls.items():
            draft.zero_grad()  # those that the last call has left
            peaks[name] = measure.peak_memory(call, self.device)
        for call, name in names.items():
            self.note(f"{name}, times less peak memory", peaks[call] / max(peaks["ours"], 1))


def compare(args, dtype) -> dict:
    """Ours against the official step and Liger-Kernel's, in the --parts."""
    device = args.device
    shape = measure.SHAPES[args.shapes] | BATCH
    shape["vocab_size"] = args.vocab_size or shape["vocab_size"]
    comparison = Comparison(args.rounds, device)
    if "loss" in args.parts:
        names = {"official": "loss step"}
        calls, draft, _ = step_calls(shape, dtype, device, whole_step=False)
        seconds = comparison.times(names, calls)
        comparison.memory(names, calls, draft)
        share = product_share(min(seconds["ours"]), shape, dtype, device)
        comparison.note("loss step, share of the machine's matrix-product rate", share)
        del calls, draft
    if "liger" in args.parts:
        compare_liger(comparison, shape, dtype)
    if "epoch" in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            calls = epoch_calls(args.data_dir, args.limit, device, Path(folder))
            comparison.times({"official": "stage 2 epoch of the tiny pair"}, calls)
    if "step" in args.parts:
        names = {"official": "whole step after the first epoch"}
        calls, draft, filling = step_calls(shape, dtype, device, whole_step=True)
        # a training step comes after others of its kind
        seconds = comparison.times(names, calls, {"ours": 8})
        comparison.memory(names, calls, draft)
        steps = filling / statistics.median(seconds["official"])
        comparison.note("the pass that fills the cache, in official steps", steps)
    return {"data": "gsm8k" if args.data_dir else "arithmetic"} | comparison.results


def compare_liger(comparison: Comparison, shape: dict, dtype) -> None:
    """Our loss step of JSD against Liger-Kernel's. Raises ValueError where the two differ in
    float32. (In bfloat16 they may: on a CPU, Liger's forms the loss in it, ours in float32.)"""
    calls, draft = liger_calls(shape, torch.float32, comparison.device)
    if list(calls) == ["ours"]:
        print("liger: not installed: skipped (pip install --no-deps liger-kernel)")
        return
    worst = difference(calls, draft)
    if not worst < 1e-4:
        raise ValueError(f"Liger-Kernel's loss or gradient is another, by {worst:.1e} of ours")
    if dtype != torch.float32:
        calls, draft = liger_calls(shape, dtype, comparison.device)
    comparison.results["Liger-Kernel"] = version("liger-kernel")
    comparison.note("JSD loss step, relative difference to Liger-Kernel's", worst)
    names = {name: f"JSD loss step against Liger-Kernel {name}" for name in list(calls)[1:]}
    comparison.times(names, calls)
    comparison.memory(names, calls, draft)


# Scale


def scale(args, dtype) -> dict:
    """How time and memory of our loss step grow, and what a second rank brings."""
    device = args.device
    vocabularies = (6288, 12576, 25152, 50304)
    sweeps = {  # what is swept -> its value: shape, chunk
        "response tokens": {115 * n: (SMALL | {"rows": n}, head.CHUNK) for n in (4, 8, 16, 32)},
        "vocabulary": {n: (SMALL | {"vocab_size": n}, head.CHUNK) for n in vocabularies},
        "chunk": {n: (SMALL, n) for n in (64, 128, 256, 512, 1024)},
    }
    results = {}
    for name, points in sweeps.items():
        calls = {n: ChunkedStep(*point, dtype, device) for n, point in points.items()}
        seconds = measure.interleaved(calls, args.rounds, device, dict.fromkeys(calls, 5))
        results[name] = []
        for value, call in calls.items():
            time = measure.ratios(seconds[value], seconds[min(points)])
            call.draft.zero_grad()  # the gradients that the last call has left
            peak = round(measure.peak_memory(call, device) / 2**20)
            results[name].append({"value": value, "time": time, "peak_MiB": peak})
            words = f"time x {measure.brief(time)}, peak memory {peak} MiB"
            print(f"{name} {value}: {words}", flush=True)
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        print("2 ranks against one: skipped, there is one GPU")
        return results
    pairs = [[seconds_on(n, args.dtype, device) for n in (1, 2)] for _ in range(args.rounds)]
    efficiency = measure.spread(one / (2 * two) for one, two in pairs)
    print(f"2 ranks against one, one thread each: efficiency {measure.brief(efficiency)}")
    return results | {"parallel efficiency of 2 ranks": efficiency}


class ChunkedStep:
    """Our loss step with so many rows of logits at a time."""

    def __init__(self, shape: dict, chunk: int, dtype, device):
        calls, self.draft, _ = step_calls(shape, dtype, device, whole_step=False)
        self.step = calls["ours"]
        self.chunk = chunk

    def __call__(self) -> None:
        defaults = head.CHUNK, head.GPU_LOGITS
        head.CHUNK, head.GPU_LOGITS = self.chunk, 0
        try:
            self.step()
        finally:
            head.CHUNK, head.GPU_LOGITS = defaults


def seconds_on(count: int, dtype: str, device) -> float:
    """Seconds that `scale_worker` takes on so many ranks with one thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    worker = ["-m", "extras.bench_train", "--worker", "--dtype", dtype]
    process = subprocess.run(
        [sys.executable, *launcher, *worker],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(process.stdout.split()[-1])


def scale_worker(dtype: str) -> None:
    """Print the seconds of three steps of stage 2 with the paper's draft, 16 rows each, on the
    ranks that torchrun has started."""
    device = ranks.setup()
    shape = SMALL | {"rows": 16}
    vocab_size, head_alone = shape["vocab_size"], shape["target"] | {"num_hidden_layers": 0}
    target = measure.random_model(vocab_size, head_alone, DTYPES[dtype], device, seed=0)
    draft = measure.random_model(vocab_size, shape["draft"], torch.float32, device, seed=2)
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
    parts = ["loss", "liger", "epoch", "step"]
    words = "what to compare; step: with all layers of the target, minutes on a CPU"
    add("--parts", type=some_of(parts), default=",".join(parts), help=words)
    add("--data-dir", help="epoch over rows of <data-dir>/gsm8k/train.jsonl, not the offline task")
    add("--limit", type=whole(), default=300, help="rows of that epoch")
    words = "of the loss step and the whole step; the epoch is float32"
    add("--dtype", type=one_of(DTYPES), default="bfloat16", help=words)
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    words = "sizes of the random models of the loss steps and the whole step"
    add("--shapes", type=one_of(measure.SHAPES), default="pythia", help=words)
    add("--vocab-size", type=whole(), help="their vocabulary, instead of the one of these sizes")
    measure.add_device_flag(parser)
    measure.add_result_flags(parser, rounds=3)
    args = measure.parse(parser, argv)
    if args.worker:
        scale_worker(args.dtype)
        return
    run = scale if args.scale else compare
    settings = {"dtype": args.dtype, "rounds": args.rounds, "device": args.device.type}
    measure.save(args, settings | run(args, DTYPES[args.dtype]))


if __name__ == "__main__":
    run_command(main, "extras.bench_train")
