"""The training loop: one function for every stage (pretraining, fine-tuning, distillation), on CPU, one GPU or many.

Launched by torchrun it shards every batch over the ranks without overlap. What a stage minimises is an `objective`, a function

    objective(hidden [N, d], head, batch) -> (sum of losses, number of tokens in that sum)

of the last hidden state at the N response positions of a micro-batch and the output head that turns it into logits. The loop
adds sums and counts over micro-batches and ranks and divides once, so that accumulation and data parallelism give the gradient
of the whole batch, whatever the share of tokens that bear loss.

Three things keep distillation cheap, and none of them approximates anything. Logits exist for response tokens only, `CHUNK` of
them at a time, with the gradient of the output head formed on the way (`Head.loss`). The frozen target and reference are run
over the data once: `TokenCache` keeps the target's last hidden state, whose product with the output head is the logits, and
the reference's KL. And right-padded batches need no attention mask, since causal attention never looks right.
"""

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import Example, batches, collate, write_file, writing

__all__ = ["Batch", "Frozen", "Head", "NonFiniteError", "Stopped", "TokenCache", "gather_ragged", "setup", "train"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DECAYS = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 2 * (1 - progress),
}  # of the learning rate, about 1 in the mean
CHUNK = 256  # response tokens whose logits exist at one time


class NonFiniteError(RuntimeError):
    """A loss or gradient became infinite or NaN."""


# Stopping and going on


class Stopped(Exception):
    """A signal has asked the run to stop, and what was done so far is on the disk."""


asked_to_stop: signal.Signals | None = None


def stop_on_signals() -> None:
    """Let SIGTERM and Ctrl-C end loops at a point where they can save their state and raise `Stopped`; a second one kills."""

    def notice(number, frame):
        global asked_to_stop
        asked_to_stop = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, notice)


def check_stop() -> None:
    if asked_to_stop:
        raise Stopped(asked_to_stop.name)


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoints:
    """The state of an unfinished stage, in `folder`: the last two generations, each a file of `torch.save` named by its step
    and the stage's `fingerprint`, and a note of its checksum. Rank 0 reads and writes; the disk is one that all ranks see."""

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.fingerprint = Path(folder), fingerprint

    def save(self, step: int, state: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{step:09d}-{self.fingerprint}.pt"
        write_file(path, lambda file: torch.save(state, file))
        write_file(path.with_suffix(".sha256"), lambda file: file.write(checksum(path).encode()))
        for old in sorted(self.folder.glob("*.pt"))[:-2]:
            old.with_suffix(".sha256").unlink(missing_ok=True)
            old.unlink()

    def newest(self) -> Path | None:
        """The newest generation that is whole; says so where it has to pass one over.

        Removes what other settings have left, which would push new generations out, and files that were cut short.
        """
        for path in [*self.folder.glob("*.pt*"), *self.folder.glob("*.sha256*")]:
            if f"-{self.fingerprint}." not in path.name or path.suffix == ".partial":
                path.unlink()
        for path in sorted(self.folder.glob("*.pt"), reverse=True):
            note = path.with_suffix(".sha256")
            if note.is_file() and note.read_bytes() == checksum(path).encode():
                return path
            tqdm.write(f"  {path} is damaged or was cut short: going back to the state before it")
        return None


# Ranks


def setup() -> torch.device:
    """Join torchrun's process group, if there is one (NCCL on GPUs, gloo on CPU); returns this rank's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # who waits in vain for others is not to outlive torchrun
        store, own, world = next(dist.rendezvous("env://"))
        # after a restart, torchrun's store still holds the addresses of the ranks that are gone
        store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        # hours, not NCCL's ten minutes: the other ranks wait while rank 0 measures speed-ups or downloads
        dist.init_process_group(backend, store=store, rank=own, world_size=world, timeout=timedelta(hours=3))
        signal.signal(signal.SIGTERM, handler)
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def agreed(value):
    """Rank 0's value on every rank, and a barrier: what is read from a disk that ranks write to is decided once."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value) -> list:
    """Every rank's value, on every rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


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


# Batches


class Batch(NamedTuple):
    """A micro-batch: `input_ids` [B, T], the flat position of each response token's predictor [N], that token's id [N],
    the examples' numbers [B], and how much of the stage's training is over (0 at its first step, below 1 at its last)."""

    input_ids: Tensor
    index: Tensor
    labels: Tensor
    rows: list[int]
    progress: float = 0.0


def make_batch(examples: Sequence[Example], rows: list[int], device: torch.device) -> Batch:
    input_ids, labels = collate([examples[row] for row in rows])
    next_labels = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # position t predicts the token at t + 1
    index = (next_labels != -100).nonzero().squeeze(-1)
    return Batch(*(t.to(device, non_blocking=True) for t in (input_ids, index, next_labels[index])), rows)


def micro_batches(rows: list[int], micro_batch: int | None) -> list[list[int]]:
    """This rank's share of a batch, in micro-batches of at most `micro_batch` rows: the same number of them on every rank.

    (One row more where the batch does not divide evenly: no rank may be left with an empty micro-batch.)
    """
    world = world_size()
    count = max(1, min(math.ceil(len(rows) / (world * (micro_batch or len(rows)))), len(rows) // world))
    return [rows[slot :: world * count] for slot in range(rank(), world * count, world)]


# Models: trunk, head, and the loss on the product of both


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """The trunk's output (after the final norm) where it predicts a response token, [N, d]; a model that reads more than tokens
    has `response_states(batch)` to give it (eagle.py)."""
    if hasattr(model, "response_states"):
        return model.response_states(batch)
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.index)  # (boolean indexing has a serial backward on CPU)


class Head:
    """A causal LM's output head, cut to `vocab_size` rows = len(tokenizer): heads are padded, each in its own way.

    Raises ValueError where the head has fewer rows; `check` does where the head is not all that lies between the trunk and
    the logits (softcapped or scaled logits, for one).
    """

    def __init__(self, model: nn.Module, vocab_size: int):
        self.linear, self.vocab_size = model.get_output_embeddings(), vocab_size
        if len(self.linear.weight) < vocab_size:
            raise ValueError(
                f"{type(model).__name__}: the output head has {len(self.linear.weight)} rows, the tokenizer {vocab_size} tokens"
            )

    def check(self, model: nn.Module) -> None:
        if hasattr(model, "response_states"):  # its head is its target's, which is checked with the target
            return
        weight, mode = self.linear.weight, model.training
        index = torch.arange(8, device=weight.device)
        ids = index[None] % self.vocab_size
        model.eval()
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            ours = self(hidden_states(model, Batch(ids, index, index, [0])))
            theirs = model(input_ids=ids).logits[0, :, : self.vocab_size]
        model.train(mode)
        tolerance = 1e-3 if weight.dtype == torch.float32 else 3e-2  # two shapes of one product, rounded
        if not (ours - theirs).abs().max() <= tolerance * theirs.abs().max():
            raise ValueError(f"{type(model).__name__} changes its logits after the output head; the loss here would miss that")

    def weights(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.linear.weight, getattr(self.linear, "bias", None)
        if len(weight) == self.vocab_size:  # a slice would cost its backward a copy of the gradient
            return weight, bias
        return weight[: self.vocab_size], None if bias is None else bias[: self.vocab_size]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocab_size] of hidden states [n, d]."""
        return _logits(hidden, *self.weights())[: len(hidden)]

    @torch.no_grad()
    def per_token(self, hidden: Tensor, wanted: Callable[[Tensor], Tensor], loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """loss(wanted, logits) of every row of `hidden`, [N], without gradient.

        `wanted(rows)` gives what the logits of these rows are held against, [n, V] target logits or [n] labels; `loss` maps
        some rows of both to one number a row, such as `token_kl`.
        """
        dtype, block = _compute_dtype(hidden), _block(hidden)
        hidden, weights = hidden.to(dtype), [None if t is None else t.to(dtype) for t in self.weights()]
        found = []
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in torch.arange(len(hidden), device=hidden.device).split(CHUNK):
                logits = _logits(hidden[rows], *weights)[: len(rows)]
                found += map(loss, wanted(rows).split(block), logits.split(block))
        return torch.cat(found)

    def loss(self, hidden: Tensor, wanted, loss, rows: Tensor | None = None) -> Tensor:
        """The sum of `per_token` over `rows` (all of them by default), a scalar with gradient.

        The same as summing the loss on the logits of all rows, without ever holding more than CHUNK rows of logits.
        """
        rows = torch.arange(len(hidden), device=hidden.device) if rows is None else rows
        return _ChunkedLoss.apply(hidden, *self.weights(), rows, wanted, loss)


def _block(hidden: Tensor) -> int:
    """Rows that a loss sees at one time: on a CPU few enough for its float32 copies of the logits to stay in the cache."""
    return 16 if hidden.device.type == "cpu" else 128


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden @ weight.T + bias, with rows added up to a multiple of 64, for each new number compiles a kernel on CPU."""
    return F.linear(F.pad(hidden, (0, 0, 0, -len(hidden) % 64)), weight, bias)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The autocast type, but float32 for float16: the gradients here are formed before GradScaler's scale is known."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return torch.float32 if dtype == torch.float16 else dtype


class _ChunkedLoss(torch.autograd.Function):
    """Forms the gradients of hidden states and output head chunk by chunk in the forward pass; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, wanted, loss):
        dtype, block = _compute_dtype(hidden), _block(hidden)
        head = weight.to(dtype), None if bias is None else bias.to(dtype)
        needed = True, *ctx.needs_input_grad[1:3]  # not of a head that is frozen: an EAGLE head's is the target's
        grads = [torch.zeros_like(t) if need else None for t, need in zip((hidden, weight, bias), needed, strict=True)]
        total = torch.zeros((), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in rows.split(CHUNK):
                states = hidden[part].to(dtype)
                logits = _logits(states, *head)
                for some, their in zip(wanted(part).split(block), logits[: len(part)].split(block), strict=True):
                    leaf = their.detach().requires_grad_()
                    with torch.enable_grad():
                        summed = loss(some, leaf).sum()
                    their.copy_(torch.autograd.grad(summed, leaf)[0])  # the gradient takes the logits' place
                    total += summed.detach()
                logits[len(part) :] = 0
                grads[0].index_copy_(0, part, (logits @ head[0])[: len(part)].to(hidden.dtype))
                if grads[1] is not None:
                    grads[1] += logits.t() @ F.pad(states, (0, 0, 0, len(logits) - len(part)))
                if grads[2] is not None:
                    grads[2] += logits.sum(0, dtype=bias.dtype)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        return *(None if grad is None else grad.mul_(grad_output) for grad in ctx.saved_tensors), None, None, None


class _Student(nn.Module):
    """What DistributedDataParallel wraps: the model and its loss in one forward, so that all gradients pass through it."""

    def __init__(self, model: nn.Module, vocab_size: int, objective):
        super().__init__()
        self.model, self.head, self.objective = model, Head(model, vocab_size), objective
        self.head.check(model)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | int]:
        return self.objective(hidden_states(self.model, batch), self.head, batch)


# The frozen teacher and its cache


class TokenCache:
    """Values of every response token of a data set, [tokens, width], in memory-mapped files: one a rank, read by all ranks.

    `folder` must be on a disk that all ranks see. Beside each file lies a note of how many rows are in it, and their checksum:
    an unfinished one is gone on with, a finished one is checked before use, and one that is damaged or carries another
    `fingerprint` (which stands for the frozen model, the tokenised rows and the dtype) is made anew.
    """

    def __init__(self, folder: Path, fingerprint: str, examples: Sequence[Example], width: int, dtype: torch.dtype):
        self.folder, self.fingerprint, self.examples, self.width, self.dtype = Path(folder), fingerprint, examples, width, dtype
        # an example whose first token bears loss has no predictor for it
        self.counts = [len(e.input_ids) - max(e.prompt_length, 1) for e in examples]
        self.bytes = sum(self.counts) * width * dtype.itemsize
        self.shards: list[Tensor] = []

    def fill(self, compute, device: torch.device, rows_at_once: int, name: str, save_minutes: float = 10) -> None:
        """Make the files, each rank its share of the examples, with compute(batch) -> [N, width], or open those there are."""
        files = len(list(self.folder.glob("*.bin")))
        notes = [self._note(shard, files) for shard in range(files)]
        whole = files and all(note and note["rows"] == len(self._order(r, files)) for r, note in enumerate(notes))
        world = agreed(files if whole else 0)
        if world and not all(gather_objects(all(self._sound(r, world) for r in range(rank(), world, world_size())))):
            world = 0
        if not world:
            world = world_size()
            self._write(compute, device, rows_at_once, name, save_minutes)
            gather_objects(None)  # wait for all
        self.starts, self.shards = self._starts(world), [self._map(r, world) for r in range(world)]

    def _write(self, compute, device, rows_at_once, name, save_minutes):
        world, path = world_size(), self.folder / f"{rank()}.bin"
        own, starts = self._order(rank(), world), self._starts(world)
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            for other in self.folder.glob("*.bin"):
                if int(other.stem) >= world:  # made by more ranks than there are now
                    other.unlink()
        note = self._note(rank(), world)
        if not (note and self._sound(rank(), world)):
            note = {"rows": 0}
            path.unlink(missing_ok=True)
            with open(path, "wb") as file:
                if hasattr(os, "posix_fallocate") and own:  # a full disk is an error here, and would be a crash (SIGBUS) later
                    with writing(path):
                        os.posix_fallocate(file.fileno(), 0, self._size(rank(), world))
        first = min(gather_objects(note["rows"] // rows_at_once))
        values, sha, saved = self._map(rank(), world, write=True), hashlib.sha256(), time.monotonic()
        for row in own[: first * rows_at_once]:
            sha.update(self._bytes(values, starts, row))
        rounds = -(-len(self.examples) // (world * rows_at_once))  # as many on every rank: a sharded model needs all
        bar = tqdm(total=rounds, initial=first, desc=name, unit="batch", delay=2, disable=rank() != 0, dynamic_ncols=True)
        for i in range(first, rounds):
            rows = own[i * rows_at_once :][:rows_at_once]
            new = compute(make_batch(self.examples, rows or own[:1], device)).reshape(-1, self.width).to("cpu", self.dtype)
            for row, part in zip(rows, new.split([self.counts[row] for row in rows]) if rows else [], strict=True):
                values[starts[row] : starts[row] + len(part)] = part
                sha.update(self._bytes(values, starts, row))
            bar.update()
            if asked_to_stop or i == rounds - 1 or time.monotonic() - saved > 60 * save_minutes:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                done = min((i + 1) * rows_at_once, len(own))
                note = {"fingerprint": self.fingerprint, "ranks": world, "rows": done, "sha256": sha.hexdigest()}
                write_file(path.with_suffix(".json"), lambda file, note=note: file.write(json.dumps(note).encode()))
                saved = time.monotonic()
                if i < rounds - 1:
                    check_stop()
        bar.close()

    def _note(self, shard: int, world: int) -> dict | None:
        """What the note beside a file says, if it is of this cache and of so many ranks."""
        try:
            note = json.loads((self.folder / f"{shard}.json").read_text())
            same = note["fingerprint"] == self.fingerprint and note["ranks"] == world
            return note if same and 0 <= note["rows"] <= len(self._order(shard, world)) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _sound(self, shard: int, world: int) -> bool:
        """Whether a file holds what its note says; says so where it does not."""
        path, note = self.folder / f"{shard}.bin", self._note(shard, world)
        if path.is_file() and path.stat().st_size == self._size(shard, world):
            starts, values, sha = self._starts(world), self._map(shard, world), hashlib.sha256()
            for row in self._order(shard, world)[: note["rows"]]:
                sha.update(self._bytes(values, starts, row))
            if sha.hexdigest() == note["sha256"]:
                return True
        tqdm.write(f"  {path} is damaged: computing it anew")
        return False

    def _size(self, shard: int, world: int) -> int:
        return sum(self.counts[shard::world]) * self.width * self.dtype.itemsize

    def _bytes(self, shard: Tensor, starts: list[int], row: int):
        return shard[starts[row] : starts[row] + self.counts[row]].view(torch.uint8).numpy()

    def _order(self, shard: int, world: int) -> list[int]:
        """The examples of a shard in the order they are computed: long ones first, so that batches waste no padding."""
        return sorted(range(shard, len(self.examples), world), key=lambda row: -len(self.examples[row].input_ids))

    def _starts(self, world: int) -> list[int]:
        """Where each example's tokens begin in its shard; shard r holds the examples r, r + world, ..."""
        ends, starts = [0] * world, []
        for row, count in enumerate(self.counts):
            starts.append(ends[row % world])
            ends[row % world] += count
        return starts

    def _map(self, shard: int, world: int, write: bool = False) -> Tensor:
        path, tokens = self.folder / f"{shard}.bin", sum(self.counts[shard::world])
        return torch.from_file(str(path), shared=write, size=tokens * self.width, dtype=self.dtype).view(tokens, self.width)

    def read(self, batch: Batch) -> Tensor:
        """The batch's values [N, width] on its device, in the order of `batch.index`."""
        world = len(self.shards)
        parts = [self.shards[row % world][self.starts[row] :][: self.counts[row]] for row in batch.rows]
        return torch.cat(parts).to(batch.input_ids.device, non_blocking=True)


class Frozen:
    """A model that is only asked: its hidden states [N, D] at response positions, from a cache if it has one, and its head."""

    def __init__(self, model: nn.Module, vocab_size: int):
        self.model, self.head, self.cache = model.eval().requires_grad_(False), Head(model, vocab_size), None
        self.head.check(model)

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        if self.cache:
            return self.cache.read(batch)
        with torch.autocast(batch.input_ids.device.type, enabled=False):  # its weights have the training dtype already
            return hidden_states(self.model, batch)

    def use(self, cache: TokenCache, *fill) -> None:
        """Answer from `cache` from now on, making it first where need be (`TokenCache.fill`); the trunk is let go."""
        cache.fill(self.hidden, self.model.device, *fill)
        self.cache, self.model = cache, None


def shard_layers(model: nn.Module) -> None:
    """Spread a frozen model's decoder layers over all ranks (PyTorch's fully_shard); embeddings and head stay whole."""
    from torch.distributed.fsdp import fully_shard

    layers = max((m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)), key=len)
    for layer in layers:
        fully_shard(layer, reshard_after_forward=True)  # each is its own root, and roots would stay whole after a forward


# The loop


def random_state(device: torch.device) -> dict:
    """The state of the generators that a step draws from: dropout alone, the order of the rows hangs on seed and epoch."""
    return {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def train(
    model: nn.Module,
    examples: Sequence[Example],
    objective: Callable[[Tensor, Head, Batch], tuple[Tensor, Tensor | int]],
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
    checkpoints: Checkpoints | None = None,
    save_minutes: float = 10,
    rewrite: Callable[[nn.Module, list[int], int], list[Example]] | None = None,
    refresh: int = 50,
) -> dict:
    """Train `model` (float32 weights, in place) with AdamW; returns a summary (steps, tokens, loss, ...).

    The learning rate is `lr`, as in the paper, or with `decay` "linear" goes down from twice that towards nothing.
    `batch_size` counts the rows of an optimiser step over all ranks, `micro_batch` those of one forward on one rank. `dtype`
    is the autocast type: float32, bfloat16, or float16 (with a GradScaler; steps it skips are counted). Matrices decay, biases
    and norms do not. With `checkpoints` the state is saved every `save_minutes` and when a signal asks to stop, and training
    goes on from the newest state there is, to the very weights that it would have reached undisturbed. On-policy data:
    `rewrite(model, rows, step)` gives other examples for the rows of the next `refresh` steps.
    Raises NonFiniteError naming stage, step and rows; Stopped after a signal; ValueError where ranks outnumber a batch's rows.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    if decay not in DECAYS:
        raise ValueError(f"unknown decay {decay!r}, expected one of {', '.join(DECAYS)}")
    lengths = [len(e.input_ids) for e in examples]
    if not lengths or min(map(len, batches(lengths, batch_size, seed, 0, world_size()))) < world_size():
        raise ValueError(f"{name}: {len(lengths)} rows in batches of {batch_size} do not feed {world_size()} ranks")
    device = next(model.parameters()).device
    torch.manual_seed(seed + rank())  # dropout only; rows and their order depend on `seed` alone
    model.train()
    student = _Student(model, vocab_size, objective)
    if world_size() > 1:
        student = DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None)
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in weights if p.ndim >= 2], "weight_decay": weight_decay}]
    groups += [{"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")

    order = [(epoch, rows) for epoch in range(epochs) for rows in batches(lengths, batch_size, seed, epoch, world_size())]
    order = order[:max_steps]
    summary = {"steps": 0, "skipped_steps": 0, "rows": 0, "tokens": 0, "loss_tokens": 0, "loss": math.nan, "seconds": 0.0}
    found = agreed(checkpoints.newest() if checkpoints and rank() == 0 else None)
    if found:
        state = torch.load(found, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        summary = state["summary"]
        if len(state["random"]) == world_size():  # on another number of ranks, dropout goes on from the seed
            set_random_state(state["random"][rank()], device)
        if rank() == 0:
            tqdm.write(f"  {name}: going on after step {summary['steps']}")
    started, saved = time.perf_counter() - summary["seconds"], time.monotonic()

    def save():
        random_states = gather_objects(random_state(device))
        if rank() == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            summary["seconds"] = time.perf_counter() - started
            checkpoints.save(summary["steps"], state | {"random": random_states, "summary": summary})

    bar = tqdm(
        total=len(order), initial=summary["steps"], desc=name, unit="step", delay=2, disable=rank() != 0, dynamic_ncols=True
    )
    current, in_a_row = list(examples), 0
    for step, (epoch, rows) in enumerate(order[summary["steps"] :], summary["steps"]):
        if rewrite and step % refresh == 0:
            coming = sorted({row for _, rows in order[step : step + refresh] for row in rows})[rank() :: world_size()]
            model.eval()
            parts = gather_objects(list(zip(coming, rewrite(model, coming, step), strict=True)))
            model.train()
            written = dict(pair for part in parts for pair in part)
            current = [written.get(row, example) for row, example in enumerate(examples)]
        # one constant for all ranks keeps the summed loss small enough for float16; the exact count divides below
        scale = 1.0 / sum(lengths[i] for i in rows)
        sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, its tokens; ranks that want to save, and to stop
        parts = micro_batches(rows, micro_batch)
        for i, part in enumerate(parts):
            batch = make_batch(current, part, device)._replace(progress=step / len(order))
            last = i == len(parts) - 1 or world_size() == 1
            with nullcontext() if last else student.no_sync():
                with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32"):
                    loss, count = student(batch)
                scaler.scale(loss * scale).backward()
            sums[:2] += torch.stack([loss.detach().double(), torch.as_tensor(count, device=device).double()])
        due = rank() == 0 and time.monotonic() - saved > 60 * save_minutes
        sums[2:] = torch.tensor([due, bool(asked_to_stop)])
        if world_size() > 1:
            dist.all_reduce(sums)
        scaler.unscale_(optimizer)
        factor = (world_size() / (scale * sums[1].clamp_min(1))).float()  # DDP has averaged over ranks: undo that
        for weight in weights:
            if weight.grad is not None:
                weight.grad.mul_(factor)
        norm = nn.utils.clip_grad_norm_(weights, clip)
        total, count, due, stop, norm = torch.stack([*sums, norm.double()]).tolist()  # the step's wait for the device
        if not math.isfinite(total) or not (math.isfinite(norm) or scaler.is_enabled()):
            what = "loss" if not math.isfinite(total) else "gradient norm"
            where = f"step {step + 1} (epoch {epoch + 1}, rows {sorted(rows)} of those kept)"
            raise NonFiniteError(f"{name}: {what} is not finite in {where}")
        for group in optimizer.param_groups:
            group["lr"] = DECAYS[decay](step / len(order)) * lr
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        summary["steps"] += 1
        summary["skipped_steps"] += scaler.get_scale() < before
        in_a_row = in_a_row + 1 if scaler.get_scale() < before else 0
        if in_a_row == 20:  # the scale has gone down a million times: it is not the scale
            raise NonFiniteError(f"{name}: no finite gradient in {in_a_row} steps in a row, up to step {step + 1}")
        summary["rows"] += len(rows)
        summary["tokens"] += sum(lengths[i] for i in rows)
        summary["loss_tokens"] += int(count)
        summary["loss"] = total / max(count, 1)
        rate = summary["tokens"] / (time.perf_counter() - started)
        bar.set_postfix_str(f"loss {summary['loss']:.4f}, {rate:,.0f} tok/s", refresh=False)
        bar.update()
        # with on-policy data only where it is written anew, from the weights that are saved
        if (due or stop) and step + 1 < len(order) and not (rewrite and (step + 1) % refresh):
            if checkpoints:
                save()
                saved = time.monotonic()
            if stop:
                raise Stopped((asked_to_stop or signal.SIGTERM).name)
    bar.close()
    if not all(torch.stack([p.detach().isfinite().all() for p in weights]).tolist()):
        raise NonFiniteError(f"{name}: weights are not finite after the last step; lower the learning rate")
    model.eval()
    return summary | {"seconds": round(time.perf_counter() - started, 1)}
