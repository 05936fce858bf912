"""Training: what a step minimises, and the loop that every stage runs, on CPU, one GPU or many.

A stage is `train(model, examples, step, step_inputs)`. A step is a plain function

    step(student, batch, *step_inputs) -> (sum of losses, number of tokens in that sum)

The loop adds sums and counts over micro-batches and ranks and divides once, so that accumulation
and data parallelism give the gradient of the whole batch, whatever the share of tokens that bear
loss.

Right-padded batches need no attention mask, since causal attention never looks right.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from signal import SIGTERM
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ranks
from adaspec import gather_gaps, log_probs, select_tokens
from data import Batch, Example, batches, make_batch
from head import Head, hidden_states
from history import History
from ranks import rank, say, world_size
from teacher import token_loss

TRAINING_VERSION = 2  # part of every stage's fingerprint: raise it when a change alters results
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NonFiniteError(ArithmeticError):
    """A loss, gradient or weight became infinite or NaN."""


# The steps: what each stage minimises


def fine_tuning_step(student, batch: Batch):
    """Stage 0, and pretraining: next-token cross-entropy on the response."""
    hidden = student.hidden(batch)
    return student.head.loss(hidden, *token_loss("ce", None, batch)), len(hidden)


def distillation_step(student, batch: Batch, target, method):
    """Stage 1 and DistillSpec: a divergence from the frozen target on every response token."""
    hidden = student.hidden(batch)
    return student.head.loss(hidden, *token_loss(method.divergence, target, batch)), len(hidden)


def adaspec_step(student, batch: Batch, target, reference, method):
    """Stage 2, AdaSPEC (paper, section 3.2): a divergence on the top k of the tokens by their gap
    to the reference, over all ranks.

    First the gap of all tokens without gradient, then forward and backward on the selected ones.
    """
    hidden = student.hidden(batch)  # [N, d], response positions only
    draft_losses = student.head.token_losses(hidden, *token_loss(method.gap, target, batch))
    gap = draft_losses - reference.losses(batch)

    def measure(divergence):
        signal, _ = token_loss("fkl", target, batch)  # the target's logits
        return student.head.token_losses(hidden, signal, divergence)

    candidates = Candidates(gap, draft_losses, measure)
    all_scores, own = gather_gaps(SELECTIONS[method.select](candidates))
    selected = select_tokens(all_scores, fraction_kept(method, batch.progress))[own]
    rows = selected.nonzero().squeeze(-1)
    loss = student.head.loss(hidden, *token_loss(method.divergence, target, batch), rows)
    return loss + 0 * gap.sum(), len(rows)  # 0 * NaN: a NaN gap is a NaN loss


class Candidates(NamedTuple):
    """A batch's response tokens, of which some are selected."""

    gap: Tensor  # [N]
    draft_losses: Tensor  # [N]
    measure: Callable  # measure(f) -> [N], with f(target_logits, draft_logits)


def target_entropy(target_logits: Tensor, draft_logits: Tensor) -> Tensor:
    """The entropy of p, [n], in nats."""
    log_p, _ = log_probs(target_logits, draft_logits)
    return -(log_p.exp() * log_p).sum(-1)


def disagreement(target_logits: Tensor, draft_logits: Tensor) -> Tensor:
    """1 to 2 where p and q have another argmax, else 0 to 1: at random, so that none are equal."""
    differs = target_logits.argmax(-1) != draft_logits.argmax(-1)
    return differs + torch.rand(len(differs), device=differs.device)


SELECTIONS = {  # what is ranked, the largest selected; all but "top" are controls
    "top": lambda tokens: tokens.gap,
    "bottom": lambda tokens: -tokens.gap,
    "random": lambda tokens: torch.rand_like(tokens.gap),
    "loss": lambda tokens: tokens.draft_losses,  # no reference
    "flat": lambda tokens: tokens.measure(target_entropy),
    "peaked": lambda tokens: -tokens.measure(target_entropy),
    "disagree": lambda tokens: tokens.measure(disagreement),
    "agree": lambda tokens: -tokens.measure(disagreement),
}


def fraction_kept(method, progress: float) -> float:
    """k; or the adaptive filter's, on a straight line from k at the first step to k_end."""
    if method.k_end is None:
        return method.k
    return method.k + (method.k_end - method.k) * progress


# Batches and the model


def micro_batches(rows: list[int], micro_batch: int | None) -> list[list[int]]:
    """This rank's share of a batch, in micro-batches of at most `micro_batch` rows: the same number
    of them on every rank.

    (One row more where the batch does not divide evenly: no rank may be left with an empty one.)
    """
    world = world_size()
    count = math.ceil(len(rows) / (world * (micro_batch or len(rows))))
    count = max(1, min(count, len(rows) // world))
    return [rows[slot :: world * count] for slot in range(rank(), world * count, world)]


class Student:
    """The model in training, as a step sees it: `hidden(batch)` [N, d] at response positions, and
    the `head` on which losses are formed. Wrapped in DDP where there are several ranks."""

    def __init__(self, model: nn.Module, vocab_size: int):
        self.head = Head(model, vocab_size)
        self.head.check(model)
        self.hidden = Trunk(model)
        if world_size() > 1:
            device = next(model.parameters()).device
            ids = [device.index] if device.type == "cuda" else None
            self.hidden = DistributedDataParallel(self.hidden, device_ids=ids)

    def without_sync(self):
        """A context in which gradients stay on their rank: all micro-batches but the last."""
        return self.hidden.no_sync() if world_size() > 1 else nullcontext()


class Trunk(nn.Module):
    """What DDP wraps: it holds the whole model, so that the head's gradients are averaged too."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return hidden_states(self.model, batch)


# The loop


def train(
    model: nn.Module,
    examples: Sequence[Example],
    step: Callable,
    step_inputs: Sequence = (),
    *,
    vocab_size: int,
    lr: float,
    epochs: int,
    batch_size: int,
    micro_batch: int | None = None,
    decay: str = "constant",
    dtype: str = "float32",
    seed: int = 0,
    max_steps: int | None = None,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    name: str = "train",
    checkpoints=None,
    save_minutes: float = 10,
    on_policy=None,
    history: History | None = None,
) -> dict:
    """Train `model` (float32 weights, in place) with AdamW; returns a summary (steps, loss, ...).

    batch_size: rows of an optimiser step over all ranks. micro_batch: rows of one forward on one
        rank. epochs, max_steps: passes over the examples, cut short.
    lr, decay: the rate, constant as in the paper or "linear", from 2 lr down towards nothing.
    dtype: the autocast type; float16 has a GradScaler, and the steps it skips are counted.
    checkpoints: a storage.Checkpoints. The state is saved every `save_minutes` and when a signal
        asks to stop, and training goes on from it to the very weights of an undisturbed run.
    on_policy: a distillspec.OnPolicy, which writes the responses of the coming steps anew.
    history: what is told of every step.

    Raises NonFiniteError naming stage, step and rows; ranks.Stopped after a signal; ValueError
    where ranks outnumber the rows of a batch.
    """
    # setup: model, optimiser, the order of the rows
    lengths = [len(example.input_ids) for example in examples]
    schedule = make_schedule(lengths, batch_size, seed, epochs, max_steps, name)
    device = next(model.parameters()).device
    torch.manual_seed(seed + rank())  # dropout; rows and their order depend on `seed` alone
    model.train()
    student = Student(model, vocab_size)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(weights, lr, weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    history = history or History()
    state = State(model, optimizer, scaler, history, examples, checkpoints, device)
    state.load(name)
    summary = state.summary
    history.begin(summary["steps"], len(schedule), model, student.head, DTYPES[dtype])
    started = time.perf_counter() - summary["seconds"]
    saved = time.monotonic()
    skipped_in_a_row = 0
    bar = ranks.progress(len(schedule), name, "step", initial=summary["steps"])

    for number in range(summary["steps"], len(schedule)):
        epoch, rows = schedule[number]
        progress = number / len(schedule)

        # on-policy data: the draft writes the responses of the coming steps
        if on_policy and number % on_policy.refresh == 0:
            coming = [rows for _, rows in schedule[number : number + on_policy.refresh]]
            state.use_written(write_coming(on_policy, model, coming, number))

        # forward and backward, one micro-batch after the other
        parts = micro_batches(rows, micro_batch)
        micro = [make_batch(state.examples, part, device, progress) for part in parts]
        # the same constant on all ranks keeps the summed loss small enough for float16
        scale = 1.0 / sum(lengths[row] for row in rows)
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        for i, batch in enumerate(micro):
            last = i == len(micro) - 1  # which averages the gradients over ranks
            with nullcontext() if last else student.without_sync():
                with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32"):
                    loss, count = step(student, batch, *step_inputs)
                scaler.scale(loss * scale).backward()
            sums[0] += loss.detach()
            sums[1] += count

        # over all ranks: summed loss, its tokens, who wants to save, who wants to stop
        # (added: to assign a number to one element of a GPU's tensor is a copy that is waited for)
        sums[2] += rank() == 0 and time.monotonic() - saved > 60 * save_minutes
        sums[3] += bool(ranks.stop_requested())
        if world_size() > 1:
            dist.all_reduce(sums)

        # the gradient of the mean: divided by the exact count (and DDP has averaged), clipped
        scaler.unscale_(optimizer)
        factor = (world_size() / (scale * sums[1].clamp_min(1))).float()
        for weight in weights:
            if weight.grad is not None:
                weight.grad.mul_(factor)
        norm = nn.utils.clip_grad_norm_(weights, clip)
        # the loop's one wait for the device. Not the only one: adaspec_step waits for the number of
        # selected tokens, and in each forward transformers looks whether rows are packed
        total, count, due, stop, norm = torch.stack([*sums, norm.double()]).tolist()
        location = f"step {number + 1} (epoch {epoch + 1}, rows {sorted(rows)} of those kept)"
        if not math.isfinite(total):
            raise NonFiniteError(f"{name}: loss is not finite in {location}")
        if not (math.isfinite(norm) or scaler.is_enabled()):
            raise NonFiniteError(f"{name}: gradient norm is not finite in {location}")

        # the optimiser's step
        step_lr = DECAYS[decay](progress) * lr
        for group in optimizer.param_groups:
            group["lr"] = step_lr
        skipped = scaled_step(optimizer, scaler)
        skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
        if skipped_in_a_row == 20:  # the scale is a millionth by now: it is not the scale
            raise NonFiniteError(
                f"{name}: no finite gradient in 20 steps in a row, up to step {number + 1}"
            )

        # what it did
        summary["seconds"] = time.perf_counter() - started
        tokens = sum(len(state.examples[row].input_ids) for row in rows)
        state.record(rows, tokens, total, int(count), skipped)
        counts = {"loss": total, "loss_tokens": int(count), "tokens": tokens}
        counts["response_tokens"] = state.response_tokens(rows)
        history.record(summary, epoch + 1, step_lr, **counts)
        started = time.perf_counter() - summary["seconds"]  # watching alpha is no training
        speed = summary["tokens"] / summary["seconds"]
        bar.set_postfix_str(f"loss {summary['loss']:.4f}, {speed:,.0f} tok/s", refresh=False)
        bar.update()

        # save when it is time, or when a signal has come
        if (due or stop) and number + 1 < len(schedule):
            state.save()
            saved = time.monotonic()
            if stop:
                raise ranks.Stopped((ranks.stop_requested() or SIGTERM).name)

    bar.close()
    history.end()
    if not all(torch.stack([p.detach().isfinite().all() for p in weights]).tolist()):
        raise NonFiniteError(
            f"{name}: weights are not finite after the last step; lower the learning rate"
        )
    model.eval()
    return summary | {"seconds": round(time.perf_counter() - started, 1)}


DECAYS = {  # of the learning rate, as training goes on; about 1 in the mean
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 2 * (1 - progress),
}


def make_schedule(
    lengths: list[int], batch_size: int, seed: int, epochs: int, max_steps: int | None, name: str
) -> list[tuple[int, list[int]]]:
    """(epoch, row numbers) of every optimiser step. Raises ValueError where a batch has fewer rows
    than there are ranks."""
    schedule = []
    for epoch in range(epochs if lengths else 0):
        for rows in batches(lengths, batch_size, seed, epoch, world_size()):
            schedule.append((epoch, rows))
    if not schedule or min(len(rows) for _, rows in schedule) < world_size():
        raise ValueError(
            f"{name}: {len(lengths)} rows in batches of {batch_size} do not feed "
            f"{world_size()} ranks"
        )
    return schedule[:max_steps]


def make_optimizer(weights: list[Tensor], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; matrices decay, biases and norms do not."""
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def scaled_step(optimizer, scaler) -> bool:
    """The optimiser's step; whether GradScaler has skipped it, because a gradient overflowed.
    (With float16 it waits for the device, to read the scale before and after.)"""
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return scaler.get_scale() < scale


def write_coming(on_policy, model: nn.Module, coming: list[list[int]], number: int) -> dict:
    """The examples {row: example} that the model writes for the batches of the coming steps, each
    rank its share."""
    rows = sorted({row for batch in coming for row in batch})
    model.eval()
    written = on_policy.write(model, rows[rank() :: world_size()], number)
    model.train()
    parts = ranks.gather_objects(written)
    return {row: example for part in parts for row, example in part.items()}


class State:
    """All that an unfinished stage goes on from: weights, optimiser, loss scale, the summary and
    history so far, the generators of dropout, and the responses that the draft has written."""

    def __init__(
        self, model, optimizer, scaler, history, examples, checkpoints, device: torch.device
    ):
        self.parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "history": history}
        self.checkpoints = checkpoints
        self.device = device
        self.given = self.examples = examples
        self.written: dict[int, Example] = {}
        self.summary = dict.fromkeys(("steps", "skipped_steps", "rows", "tokens", "loss_tokens"), 0)
        self.summary |= {"loss": math.nan, "seconds": 0.0}

    def record(self, rows: list[int], tokens: int, loss: float, count: int, skipped: bool) -> None:
        """Count a step: its rows and tokens, its summed loss and the tokens in that."""
        self.summary["steps"] += 1
        self.summary["skipped_steps"] += skipped
        self.summary["rows"] += len(rows)
        self.summary["tokens"] += tokens
        self.summary["loss_tokens"] += count
        self.summary["loss"] = loss / max(count, 1)

    def response_tokens(self, rows: list[int]) -> int:
        """How many tokens of the rows can bear loss."""
        # a first token has no predictor
        return sum(int(self.examples[row].bears_loss[1:].sum()) for row in rows)

    def use_written(self, written: dict[int, Example]) -> None:
        """Train on the rows that the draft has written, and on the others as they were given."""
        self.written = written
        self.examples = [written.get(row, example) for row, example in enumerate(self.given)]

    def save(self) -> None:
        if not self.checkpoints:
            return
        random_states = ranks.gather_objects(random_state(self.device))
        if rank() == 0:
            written = {
                row: (torch.from_numpy(example.input_ids), example.prompt_length, example.turns)
                for row, example in self.written.items()
            }
            content = {key: part.state_dict() for key, part in self.parts.items()}
            content |= {"random": random_states, "summary": self.summary, "written": written}
            self.checkpoints.save(self.summary["steps"], content)

    def load(self, name: str) -> None:
        """Go on from the newest checkpoint, if there is one."""
        newest = self.checkpoints.newest() if self.checkpoints and rank() == 0 else None
        path = ranks.from_rank_0(newest)
        if path is None:
            return
        content = torch.load(path, map_location="cpu", weights_only=True)
        for key, part in self.parts.items():
            part.load_state_dict(content[key])
        self.summary.update(content["summary"])
        if content["written"]:
            rows = content["written"].items()
            self.use_written({row: Example(ids.numpy(), *rest) for row, (ids, *rest) in rows})
        if len(content["random"]) == world_size():  # else dropout goes on from the seed
            set_random_state(content["random"][rank()], self.device)
        say(f"  {name}: going on after step {self.summary['steps']}")


def random_state(device: torch.device) -> dict:
    """The state of the generators that a step draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
