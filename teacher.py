"""Frozen models, and what they say kept on the disk.

Target and reference are frozen, in evaluation mode, and see the same tokens every epoch. So the
target's last hidden state at the response tokens, whose product with its output head is the
logits, is computed once and read ever after, and so is the reference's loss per token, one float.
Both are exact: this replaces every later forward of the target and approximates nothing.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import Batch, Example, make_batch, to_device
from distillspec import DIVERGENCES
from head import Head, hidden_states
from ranks import check_stop, from_rank_0, gather_objects, progress, rank, world_size
from short_head import coverage, outside_log_odds, with_outside
from storage import is_whole, read_json, write_checked, write_json

BATCHES_A_BLOCK = 8  # forwards between two writes of a cache: what a kill can cost


class Frozen:
    """A model that only answers: its last hidden states at response positions and its head; for a
    draft with a short head the rows `token_ids` [V'] alone, and the probability outside of them.

    Raises ValueError where its head is not all that lies between hidden states and logits.
    """

    def __init__(self, model: nn.Module, vocab_size: int, token_ids: Tensor | None = None):
        self.model = model.eval().requires_grad_(False)
        self.whole_head = Head(model, vocab_size)
        self.whole_head.check(model)
        self.head = self.whole_head
        if token_ids is not None:
            self.head = Head(model, vocab_size, token_ids.to(model.device))
        self.outside_cache: TokenCache | None = None
        self.coverage: float | None = None  # its mean probability of `token_ids`, once it is known
        self.cache: TokenCache | None = None
        self.last_batch: Batch | None = None
        self.last_hidden: Tensor | None = None

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """[N, d], once a batch: from the cache if there is one, else computed."""
        if self.last_batch is not batch:  # gap and loss ask for the same batch
            self.last_hidden = self._read_or_compute(batch)
            self.last_batch = batch
        return self.last_hidden

    def _read_or_compute(self, batch: Batch) -> Tensor:
        if self.cache:
            return self.cache.read(batch)
        # no autocast: the weights have the training dtype already
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            return hidden_states(self.model, batch)

    def outside(self, batch: Batch) -> Tensor:
        """The log odds of all tokens but `token_ids`, [N] float32."""
        if self.outside_cache:
            return self.outside_cache.read(batch).squeeze(1)
        return outside_log_odds(self.whole_head, self.head.token_ids, self.hidden(batch))

    def use(self, cache: "TokenCache", name: str) -> None:
        """Answer from `cache` from now on, filled first where need be; the trunk is let go."""
        cache.fill(self.hidden, self.model.device, name)
        self.cache = cache
        self.model = self.last_batch = self.last_hidden = None

    def use_outside(self, cache: "TokenCache", device: torch.device, name: str) -> None:
        """Likewise for `outside`; then its coverage of the rows is known."""
        cache.fill(self.outside, device, name)
        self.outside_cache = cache
        self.coverage = coverage(torch.cat(cache.values))


class ReferenceLoss:
    """The reference's loss (`name`, as in `token_loss`) at each response token, [N] a batch."""

    def __init__(self, reference: Frozen, target: Frozen | None, name: str):
        self.reference = reference
        self.target = target
        self.name = name
        self.cache: TokenCache | None = None

    def losses(self, batch: Batch) -> Tensor:
        """[N], float32."""
        if self.cache:
            return self.cache.read(batch).squeeze(1)
        signal, loss = token_loss(self.name, self.target, batch)
        return self.reference.head.token_losses(self.reference.hidden(batch), signal, loss)

    def use(self, cache: "TokenCache", device: torch.device, name: str) -> None:
        """Answer from `cache` from now on, filled first where need be; the models are let go."""
        cache.fill(self.losses, device, name)
        self.cache = cache
        self.reference = self.target = None


# Losses against them


def token_loss(name: str, target, batch: Batch) -> tuple[Callable, Callable]:
    """(signal, loss) of a loss by its name: "ce" or one of DIVERGENCES.

    `signal(rows)` is what the logits of these response rows [n] are held against, the target's
    logits [n, V] or, for "ce", the labels [n]; `loss(signal, logits)` gives one number a row.
    """
    if name == "ce":
        return (lambda rows: batch.labels[rows]), token_cross_entropy
    hidden = target.hidden(batch)
    divergence = DIVERGENCES[name]
    if target.head.token_ids is None or name not in WITH_OUTSIDE:
        return (lambda rows: target.head(hidden[rows])), divergence
    # a short head: q is 0 outside, where p is known as one number
    outside = target.outside(batch)

    def signal(rows):
        return with_outside(target.head(hidden[rows]), outside[rows])

    def loss(p_logits, q_logits):
        return divergence(p_logits, F.pad(q_logits, (0, 1), value=-math.inf))

    return signal, loss


# Of a draft with a short head these see p as it is. The others see p renormalised on the kept
# tokens: KL(p || q) would be infinite, and to KL(q || p) it is a constant a token
WITH_OUTSIDE = ("jsd", "tvd", "lk")


def token_cross_entropy(labels: Tensor, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")


# The cache


class TokenCache:
    """Values of every response token of a data set, [tokens, width], in memory-mapped files.

    The rows are taken in the order of their lengths, `rows_at_once` to a forward and a few forwards
    to a block, which is a checked file: one that is there and whole is not computed again. Ranks
    share the blocks out, and all of them read all, so `folder` must be on a disk that all see. What
    the values are of (models, rows, dtype) is the `fingerprint`, part of every file's name.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        examples: Sequence[Example],
        width: int,
        dtype: torch.dtype,
        rows_at_once: int,
    ):
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        self.examples = examples
        self.width = width
        self.dtype = dtype
        self.rows_at_once = rows_at_once
        # an example whose first token bears loss has no predictor for it
        self.counts = [int(example.bears_loss[1:].sum()) for example in examples]
        self.bytes = sum(self.counts) * width * dtype.itemsize
        order = sorted(range(len(examples)), key=lambda row: -len(examples[row].input_ids))
        size = rows_at_once * BATCHES_A_BLOCK
        self.blocks = [order[start : start + size] for start in range(0, len(order), size)]
        self.values: list[Tensor] = []  # by block, [tokens, width]
        self.places: dict[int, tuple[int, int]] = {}  # row -> its block, its first token there
        self.record = self.folder / f"{fingerprint}.json"  # the seconds, so far
        self.seconds = 0.0  # that filling it took, runs that were stopped included

    def fill(self, compute: Callable[[Batch], Tensor], device: torch.device, name: str) -> None:
        """Make the blocks that are missing or damaged with compute(batch) -> [N, width], each rank
        its share, and open them all. Raises OSError where the disk is full."""
        if rank() == 0:
            for path in self.folder.glob("*.partial"):
                path.unlink()
            self.seconds = read_json(self.record).get("seconds", 0.0)
        self.seconds = from_rank_0(self.seconds)
        own = [n for n in range(rank(), len(self.blocks), world_size()) if is_whole(self.path(n))]
        whole = {block for blocks in gather_objects(own) for block in blocks}
        missing = [n for n in range(len(self.blocks)) if n not in whole]
        rounds = -(-len(missing) // world_size())
        bar = progress(rounds * BATCHES_A_BLOCK, name, "batch")
        for start in range(0, len(missing), world_size()):
            turn = missing[start : start + world_size()]
            started = time.perf_counter()
            # as many forwards on every rank: with its layers spread over ranks a model needs all
            number = turn[rank()] if rank() < len(turn) else None
            rows = self.blocks[turn[0] if number is None else number]
            values = self._compute(rows, compute, device, bar)
            if number is not None:
                content = values.view(torch.uint8).numpy()
                write_checked(self.path(number), lambda file, content=content: file.write(content))
            self.seconds += time.perf_counter() - started
            if rank() == 0:
                write_json(self.record, {"seconds": self.seconds})
            check_stop()
        bar.close()
        gather_objects(None)  # wait for all
        self.seconds = from_rank_0(self.seconds)
        self._open()

    def path(self, number: int) -> Path:
        return self.folder / f"{self.fingerprint}-{number:05d}.bin"

    def _compute(self, rows: list[int], compute: Callable, device: torch.device, bar) -> Tensor:
        """The values of a block's rows, [tokens, width]."""
        parts = []
        for i in range(BATCHES_A_BLOCK):
            batch_rows = rows[i * self.rows_at_once : (i + 1) * self.rows_at_once]
            batch = make_batch(self.examples, batch_rows or rows[:1], device)
            if batch_rows or world_size() > 1:
                values = compute(batch)
            if batch_rows:
                parts.append(values.reshape(-1, self.width).to("cpu", self.dtype))
            bar.update()
        return torch.cat(parts)

    def _open(self) -> None:
        for number, rows in enumerate(self.blocks):
            start = 0
            for row in rows:
                self.places[row] = (number, start)
                start += self.counts[row]
            path = str(self.path(number))
            values = torch.from_file(path, size=start * self.width, dtype=self.dtype)
            self.values.append(values.view(start, self.width))

    def read(self, batch: Batch) -> Tensor:
        """The batch's values [N, width] on its device, in the order of `batch.index`."""
        parts = []
        for row in batch.rows:
            number, start = self.places[row]
            parts.append(self.values[number][start : start + self.counts[row]])
        return to_device(torch.cat(parts), batch.input_ids.device)


def shard_layers(model: nn.Module) -> None:
    """Spread a frozen model's decoder layers over all ranks (PyTorch's fully_shard); embeddings and
    head stay whole."""
    from torch.distributed.fsdp import fully_shard

    stacks = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    for layer in max(stacks, key=len):
        # each layer is a root of its own, and roots would stay whole after a forward
        fully_shard(layer, reshard_after_forward=True)
