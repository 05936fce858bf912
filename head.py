"""Trunk and head of a causal LM, and losses on the product of both without all logits at once.

Logits are what distillation costs: response tokens x vocabulary, for target, reference and draft.
They exist here for response tokens only, `CHUNK` of them at a time, with the gradient of the
output head formed on the way (`Head.loss`). Nothing is approximated.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import Batch

CHUNK = 256  # response tokens whose logits exist at one time
# On a GPU, where launching the kernels for so few takes longer than running them: as many as make
# so many logits (256 MB in float32), if that is more
GPU_LOGITS = 2**26


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """The trunk's output (after the final norm) where it predicts a response token, [N, d].

    A model that reads more than tokens gives it as `response_states(batch)` (extras/eagle.py: in
    training there can be several guesses a token, [depth N, d]).
    """
    if hasattr(model, "response_states"):
        return model.response_states(batch)
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.index)


class Head:
    """A causal LM's output head, cut to `vocab_size` rows = len(tokenizer): heads are padded, each
    in its own way. Or cut to the rows `token_ids` [V'], those that a draft's short head has
    (short_head.py); then V' stands for the vocabulary in all shapes below.

    Raises ValueError where the head has fewer rows; `check` does where the head is not all that
    lies between the trunk and the logits (softcapped or scaled logits, for one).
    """

    def __init__(self, model: nn.Module, vocab_size: int, token_ids: Tensor | None = None):
        self.linear = model.get_output_embeddings()
        self.vocab_size = vocab_size
        self.is_short = hasattr(self.linear, "token_ids")
        self.token_ids = self.linear.token_ids if self.is_short else token_ids
        self.selected = None  # the rows `token_ids` of a longer head, once they have been asked for
        if len(self.linear.weight) < vocab_size and not self.is_short:
            raise ValueError(
                f"{type(model).__name__}: the output head has {len(self.linear.weight)} rows, "
                f"the tokenizer {vocab_size} tokens"
            )

    def check(self, model: nn.Module) -> None:
        if hasattr(model, "response_states"):  # its head is its target's, checked with the target
            return
        weight = self.linear.weight
        index = torch.arange(8, device=weight.device)
        ids = index[None] % self.vocab_size
        training = model.training
        model.eval()
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            logits = self(hidden_states(model, Batch(ids, index, index, [0])))
            expected = model(input_ids=ids).logits[0, :, : self.vocab_size]
            if self.token_ids is not None:
                expected = expected[:, self.token_ids]
        model.train(training)
        # two shapes of one product, rounded
        tolerance = 1e-3 if weight.dtype == torch.float32 else 3e-2
        if not (logits - expected).abs().max() <= tolerance * expected.abs().max():
            raise ValueError(
                f"{type(model).__name__} changes its logits after the output head; "
                "the loss here would miss that"
            )

    @property
    def size(self) -> int:
        """How many tokens it gives logits for."""
        return self.vocab_size if self.token_ids is None else len(self.token_ids)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        weight = self.linear.weight
        bias = getattr(self.linear, "bias", None)
        if self.is_short or len(weight) == self.vocab_size == self.size:
            return weight, bias  # a slice would cost its backward a copy
        if self.token_ids is not None:
            if self.selected is None:
                rows = self.token_ids
                self.selected = weight[rows], None if bias is None else bias[rows]
            return self.selected
        return weight[: self.vocab_size], None if bias is None else bias[: self.vocab_size]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocab_size] of hidden states [n, d]."""
        return padded_linear(hidden, *self.weights())[: len(hidden)]

    @torch.no_grad()
    def token_losses(self, hidden: Tensor, signal: Callable, loss: Callable) -> Tensor:
        """loss(signal, logits) of every row of `hidden` [N, d] -> [N], without gradient; signal and
        loss as `token_loss` gives them."""
        dtype = compute_dtype(hidden)
        hidden = hidden.to(dtype)
        weights = [None if t is None else t.to(dtype) for t in self.weights()]
        losses = []
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in chunks(torch.arange(len(hidden), device=hidden.device), self.size):
                logits = padded_linear(hidden[rows], *weights)[: len(rows)]
                losses += map(loss, loss_blocks(signal(rows)), loss_blocks(logits))
        return torch.cat(losses)

    def loss(
        self, hidden: Tensor, signal: Callable, loss: Callable, rows: Tensor | None = None
    ) -> Tensor:
        """The sum of `token_losses` over `rows` (all of them by default), a scalar with gradient.

        The same as summing the loss on the logits of all rows, without ever holding more than CHUNK
        rows of logits.
        """
        if rows is None:
            rows = torch.arange(len(hidden), device=hidden.device)
        return ChunkedLoss.apply(hidden, *self.weights(), rows, signal, loss)


def chunks(rows: Tensor, vocab_size: int) -> tuple[Tensor, ...]:
    """Rows in parts whose logits exist at one time."""
    if rows.device.type == "cpu":
        return rows.split(CHUNK)
    return rows.split(max(CHUNK, GPU_LOGITS // vocab_size))


def loss_blocks(rows: Tensor) -> tuple[Tensor, ...]:
    """Rows in the pieces that a loss sees at one time: on a CPU few enough for its float32 copies
    of the logits to stay in the cache."""
    return rows.split(16) if rows.device.type == "cpu" else (rows,)


def padded_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden @ weight.T + bias, with rows added up to a multiple of 64: on a CPU each new number of
    rows compiles a kernel."""
    return F.linear(F.pad(hidden, (0, 0, 0, -len(hidden) % 64)), weight, bias)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The autocast type, but float32 for float16: the gradients of ChunkedLoss are formed before
    GradScaler's scale is known."""
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return torch.float32 if dtype == torch.float16 else dtype


class ChunkedLoss(torch.autograd.Function):
    """Forms the gradients of hidden states and output head chunk by chunk in the forward pass;
    backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, signal, loss):
        dtype = compute_dtype(hidden)
        head = weight.to(dtype), None if bias is None else bias.to(dtype)
        hidden_grad = torch.zeros_like(hidden)
        # a frozen head needs no gradient: an EAGLE head's is the target's
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        bias_grad = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        total = torch.zeros((), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in chunks(rows, len(weight)):
                states = hidden[part].to(dtype)
                logits = padded_linear(states, *head)
                total += loss_and_gradient(signal(part), logits[: len(part)], loss)
                logits[len(part) :] = 0  # from here on the gradient of the logits
                part_grad = (logits @ head[0])[: len(part)]
                hidden_grad.index_copy_(0, part, part_grad.to(hidden.dtype))
                if weight_grad is not None:
                    padding = len(logits) - len(part)
                    weight_grad += logits.t() @ F.pad(states, (0, 0, 0, padding))
                if bias_grad is not None:
                    bias_grad += logits.sum(0, dtype=bias.dtype)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        scaled = [None if grad is None else grad.mul_(grad_output) for grad in ctx.saved_tensors]
        return *scaled, None, None, None


def loss_and_gradient(signal: Tensor, logits: Tensor, loss: Callable) -> Tensor:
    """The summed loss of logits [n, V], a scalar; its gradient takes the logits' place."""
    total = torch.zeros((), device=logits.device)
    for signal_block, logits_block in zip(loss_blocks(signal), loss_blocks(logits), strict=True):
        leaf = logits_block.detach().requires_grad_()
        with torch.enable_grad():
            block_loss = loss(signal_block, leaf).sum()
        logits_block.copy_(torch.autograd.grad(block_loss, leaf)[0])
        total += block_loss.detach()
    return total
