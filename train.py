"""The training loop: one function for every stage (pretraining, fine-tuning, distillation), on CPU, one GPU or many.

Launched by torchrun it shards every batch over the ranks without overlap. What a stage minimises is an `objective`, a function

    objective(logits [N, V], batch) -> (sum of losses, number of tokens in that sum)

over the N response tokens of a micro-batch. The loop adds sums and counts over micro-batches and ranks and divides once, so
that accumulation and data parallelism give the gradient of the whole batch, whatever the share of tokens that bear loss.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import Example, batches, collate

__all__ = ["Batch", "NonFiniteError", "ResponseLogits", "gather_ragged", "setup", "train"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NonFiniteError(RuntimeError):
    """A loss or gradient became infinite or NaN."""


class Batch(NamedTuple):
    """A micro-batch: `input_ids` [B, T], the flat position of each response token's predictor [N], that token's id [N]."""

    input_ids: Tensor
    index: Tensor
    labels: Tensor


class ResponseLogits(nn.Module):
    """A causal LM's logits where they bear loss: the trunk runs on all positions, the output head on response positions only.

    forward(input_ids [B, T], index [N] into B * T) -> [N, vocab_size]. Heads padded beyond the shared tokenizer are cut to
    `vocab_size` = len(tokenizer) here, for every model alike.
    """

    def __init__(self, model: nn.Module, vocab_size: int):
        super().__init__()
        self.model, self.vocab_size = model, vocab_size

    def forward(self, input_ids: Tensor, index: Tensor) -> Tensor:
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, index))
        return logits[..., : self.vocab_size]

    def check(self) -> None:
        """Raise ValueError where trunk and head alone are not the model's logits (softcapped or scaled logits, for one)."""
        index = torch.arange(8, device=next(self.model.parameters()).device)
        ids, mode = index[None] % self.vocab_size, self.model.training
        self.model.eval()
        with torch.no_grad():
            expected = self.model(input_ids=ids).logits[0, :, : self.vocab_size]
            same = torch.allclose(self(ids, index), expected, rtol=1e-3, atol=1e-3)
        self.model.train(mode)
        if not same:
            raise ValueError(
                f"{type(self.model).__name__} changes its logits after the output head; ResponseLogits does not reproduce that"
            )


def setup() -> torch.device:
    """Join torchrun's process group, if there is one (NCCL on GPUs, gloo on CPU); returns this rank's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_ragged(values: Tensor) -> tuple[Tensor, slice]:
    """Concatenate 1-D tensors of different lengths over all ranks; returns (all values, where this rank's own lie)."""
    if world_size() == 1:
        return values, slice(0, len(values))
    sizes = [torch.zeros(1, dtype=torch.long, device=values.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(values)], device=values.device))
    lengths = [int(size) for size in sizes]
    padded = values.new_zeros(max(lengths))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    start = sum(lengths[: rank()])
    return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]), slice(start, start + len(values))


def make_batch(examples: Sequence[Example], device: torch.device) -> Batch:
    input_ids, labels = collate(examples)
    next_labels = torch.full_like(labels, -100)
    next_labels[:, :-1] = labels[:, 1:]  # position t predicts the token at t + 1
    index = (next_labels != -100).flatten().nonzero().squeeze(-1)
    batch = Batch(input_ids, index, next_labels.flatten()[index])
    return Batch(*(t.to(device, non_blocking=True) for t in batch))


def micro_batches(rows: list[int], micro_batch: int | None) -> list[list[int]]:
    """This rank's share of a batch, in micro-batches of at most `micro_batch` rows: the same number of them on every rank.

    (One row more where the batch does not divide evenly: no rank may be left with an empty micro-batch.)
    """
    world = world_size()
    count = max(1, min(math.ceil(len(rows) / (world * (micro_batch or len(rows)))), len(rows) // world))
    return [rows[slot :: world * count] for slot in range(rank(), world * count, world)]


def train(
    model: nn.Module,
    examples: Sequence[Example],
    objective: Callable[[Tensor, Batch], tuple[Tensor, Tensor | int]],
    *,
    vocab_size: int,
    lr: float,
    epochs: int,
    batch_size: int,
    micro_batch: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    max_steps: int | None = None,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    name: str = "train",
) -> dict:
    """Train `model` (float32 weights, in place) with AdamW at a constant rate; returns a summary (steps, tokens, loss, ...).

    `batch_size` counts the rows of an optimiser step over all ranks, `micro_batch` those of one forward on one rank. `dtype` is
    the autocast type: float32, bfloat16, or float16 (with a GradScaler; steps it skips are counted). Matrices decay, biases and
    norms do not. Raises NonFiniteError naming stage, step and rows; ValueError where ranks outnumber a batch's rows.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    lengths = [len(e.input_ids) for e in examples]
    if not lengths or len(batches(lengths, batch_size, seed, 0)[-1]) < world_size():
        raise ValueError(f"{name}: {len(lengths)} rows in batches of {batch_size} do not feed {world_size()} ranks")
    device = next(model.parameters()).device
    torch.manual_seed(seed + rank())  # dropout only; rows and their order depend on `seed` alone
    model.train()
    logits_of = ResponseLogits(model, vocab_size)
    logits_of.check()
    if world_size() > 1:
        logits_of = DistributedDataParallel(logits_of, device_ids=[device.index] if device.type == "cuda" else None)
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in weights if p.ndim >= 2], "weight_decay": weight_decay}]
    groups += [{"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")

    order = [(epoch, rows) for epoch in range(epochs) for rows in batches(lengths, batch_size, seed, epoch)][:max_steps]
    summary = {"steps": 0, "skipped_steps": 0, "tokens": 0, "loss_tokens": 0, "loss": math.nan}
    started = time.perf_counter()
    bar = tqdm(total=len(order), desc=name, unit="step", delay=2, disable=rank() != 0, dynamic_ncols=True)
    for step, (epoch, rows) in enumerate(order):
        # one constant for all ranks keeps the summed loss small enough for float16; the exact count divides below
        scale = 1.0 / sum(lengths[i] for i in rows)
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, loss-bearing tokens
        parts = micro_batches(rows, micro_batch)
        for i, part in enumerate(parts):
            batch = make_batch([examples[j] for j in part], device)
            last = i == len(parts) - 1 or world_size() == 1
            with nullcontext() if last else logits_of.no_sync():
                with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32"):
                    logits = logits_of(batch.input_ids, batch.index)
                loss, count = objective(logits, batch)
                scaler.scale(loss * scale).backward()
            sums += torch.stack([loss.detach().double(), torch.as_tensor(count, device=device).double()])
        if world_size() > 1:
            dist.all_reduce(sums)
        scaler.unscale_(optimizer)
        factor = (world_size() / (scale * sums[1].clamp_min(1))).float()  # DDP has averaged over ranks: undo that
        for weight in weights:
            if weight.grad is not None:
                weight.grad.mul_(factor)
        norm = nn.utils.clip_grad_norm_(weights, clip)
        total, count, norm = torch.stack([*sums, norm.double()]).tolist()  # the step's one wait for the device
        if not math.isfinite(total) or not (math.isfinite(norm) or scaler.is_enabled()):
            what = "loss" if not math.isfinite(total) else "gradient norm"
            raise NonFiniteError(f"{name}: {what} is not finite in step {step + 1} (epoch {epoch + 1}, rows {sorted(rows)})")
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        summary["steps"] += 1
        summary["skipped_steps"] += scaler.get_scale() < before
        summary["tokens"] += sum(lengths[i] for i in rows)
        summary["loss_tokens"] += int(count)
        summary["loss"] = total / max(count, 1)
        rate = summary["tokens"] / (time.perf_counter() - started)
        bar.set_postfix_str(f"loss {summary['loss']:.4f}, {rate:,.0f} tok/s", refresh=False)
        bar.update()
    bar.close()
    model.eval()
    return summary | {"seconds": round(time.perf_counter() - started, 1)}
