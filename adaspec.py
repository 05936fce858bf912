"""AdaSPEC: selective knowledge distillation for the draft model of speculative decoding
(arXiv 2510.19779).

Copy this file into your own trainer: it needs torch only. One training step of the draft reads

    loss = adaspec_loss(draft(x).logits, target(x).logits, reference(x).logits, labels, k=0.4)
    loss.backward()

`target` (the paper's M_p) is the large model whose tokens the draft must guess, `draft` (M_q) the
small one being trained, `reference` (M_ref) a copy of the small one that was first distilled on
all tokens (`distillspec.py`). Target and reference are frozen: no gradient reaches them. A token
is worth the draft's scarce capacity where the draft is still far behind what a model of its own
size can learn: where gap = KL(p || q_draft) - KL(p || q_ref) is large.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

LOG_ZERO = -1e30  # finite, so that 0 * log 0 is 0, and small enough to be summed over many tokens


def log_probs(target_logits: Tensor, draft_logits: Tensor) -> tuple[Tensor, Tensor]:
    """(log p, log q) in float32, with masked tokens (logits of -inf) at -1e30.

    Raises ValueError where the shapes differ: slice both vocabularies to the tokenizer's length,
    never pad logits.
    """
    if target_logits.shape != draft_logits.shape:
        raise ValueError(
            f"logits of the target {tuple(target_logits.shape)} and the draft "
            f"{tuple(draft_logits.shape)} differ in shape; slice both vocabularies to the shared "
            "tokenizer's length: logits[..., :len(tokenizer)]"
        )
    log_p = F.log_softmax(target_logits.float(), dim=-1).clamp_min(LOG_ZERO)
    log_q = F.log_softmax(draft_logits.float(), dim=-1).clamp_min(LOG_ZERO)
    return log_p, log_q


def token_kl(target_logits: Tensor, draft_logits: Tensor) -> Tensor:
    """Forward KL(p || q) of every token, the distillation loss of both stages, in nats.

    Shapes [..., V], [..., V] -> [...], float32 whatever the inputs are. Raises ValueError where
    the shapes differ.
    """
    log_p, log_q = log_probs(target_logits, draft_logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def selected_count(tokens: int, k: float) -> int:
    """How many of `tokens` gaps `select_tokens` keeps where no two are equal: known before there
    is any gap. Raises ValueError unless 0 < k <= 1."""
    if not 0 < k <= 1:
        raise ValueError(f"k is the fraction of tokens to keep and must be in (0, 1], got {k}")
    # The quantile lies at (1 - k)(tokens - 1) in sorted order, counted from 0; 1e-6 absorbs the
    # rounding of 1 - k.
    return tokens - max(math.ceil((1 - k) * (tokens - 1) - 1e-6), 0)


def select_tokens(gap: Tensor, k: float) -> Tensor:
    """The filter of stage 2: True where gap >= quantile(gap, 1 - k), that is on the top fraction k.

    gap [N] in any float type -> bool [N]; ties are all kept. A NaN gap is kept, so that it reaches
    the loss and is noticed there instead of being filtered away. Raises ValueError unless
    0 < k <= 1.
    """
    count = selected_count(gap.numel(), k)
    if gap.numel() == 0:
        return torch.ones_like(gap, dtype=torch.bool)
    # The quantile interpolates between two neighbours in sorted order; what is >= it is what is >=
    # the upper one. That one needs no torch.quantile, which is limited to 2**24 values.
    threshold = gap.kthvalue(gap.numel() - count + 1).values
    return ~(gap < threshold)


def gather_gaps(gap: Tensor) -> tuple[Tensor, slice]:
    """The gaps of all ranks [sum of N], and where this rank's own [N] lie among them.

    The filter over all ranks is `select_tokens(all_gaps, k)[own]`, so that the number of GPUs does
    not change which tokens are selected. (The official code filters on each GPU alone.)
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return gap, slice(0, len(gap))
    sizes = [
        torch.zeros(1, dtype=torch.long, device=gap.device) for _ in range(dist.get_world_size())
    ]
    dist.all_gather(sizes, torch.tensor([len(gap)], device=gap.device))
    lengths = [int(size) for size in sizes]
    padded = F.pad(gap, (0, max(lengths) - len(gap)))
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    all_gaps = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
    start = sum(lengths[: dist.get_rank()])
    return all_gaps, slice(start, start + len(gap))


def response_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where response tokens are predicted, and the tokens: labels [B, T] (-100 = no loss) ->
    (index [N] into the flattened [B * T], tokens [N]), in row order.

    The logits at position t predict the token at t + 1: this is the one place that shifts labels.
    """
    next_labels = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    index = (next_labels != -100).nonzero().squeeze(-1)
    return index, next_labels[index]


def response_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits that predict response tokens: [B, T, V], labels [B, T] -> [N, V] in row order."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}: "
            "need [B, T, V] and [B, T]"
        )
    index, _ = response_positions(labels)
    return logits.flatten(0, 1).index_select(0, index)  # boolean indexing has a serial backward


def reduced(total: Tensor, tokens: int, reduction: str) -> Tensor | tuple[Tensor, int]:
    """A summed loss over `tokens` tokens as its "mean", or as the pair (sum, tokens) for "sum"."""
    if reduction == "mean":
        return total / max(tokens, 1)
    if reduction == "sum":
        return total, tokens
    raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")


def adaspec_loss(
    draft_logits: Tensor,
    target_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    k: float = 0.4,
    *,
    reduction: str = "mean",
    over_ranks: bool = False,
) -> Tensor | tuple[Tensor, int]:
    """Mean KL(p || q_draft) over the selected response tokens (stage 2 of the paper), a float32
    scalar; with reduction "sum" (summed KL, number of tokens in it).

    Logits [B, T, V] as the models return them, labels [B, T] with -100 on prompt and padding. With
    padding on the left all three models need attention_mask and position_ids, or they read it as
    text, and each row's first token needs -100, or padding predicts it. The quantile is taken over
    the response tokens given, with `over_ranks` over those of all ranks (the loss is this rank's).
    The gradient of several micro-batches or ranks is that of their sums, divided once by the tokens
    in all of them, not that of their means: docs/trainer.md.
    Gradient flows through draft_logits only. No response token at all: loss 0.
    Raises ValueError for mismatched shapes, k outside (0, 1] or an unknown reduction.
    """
    draft = response_tokens(draft_logits, labels)
    with torch.no_grad():
        target = response_tokens(target_logits, labels)
        reference_kl = token_kl(target, response_tokens(reference_logits, labels))
    draft_kl = token_kl(target, draft)
    gap = draft_kl.detach() - reference_kl
    all_gaps, own = gather_gaps(gap) if over_ranks else (gap, slice(None))
    selected = select_tokens(all_gaps, k)[own]
    draft_kl = torch.where(gap.isnan(), gap, draft_kl)  # a NaN gap must not pass for a selection
    total = torch.where(selected, draft_kl, 0.0).sum()
    return reduced(total, int(selected.sum()), reduction)
