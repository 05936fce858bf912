"""AdaSPEC: selective knowledge distillation for the draft model of speculative decoding (arXiv 2510.19779).

Copy this file into your own trainer: it needs torch only. One training step of the draft reads

    loss = adaspec_loss(draft(x).logits, target(x).logits, reference(x).logits, labels, k=0.4)
    loss.backward()

`target` (the paper's M_p) is the large model whose tokens the draft must guess, `draft` (M_q) the small one being
trained, `reference` (M_ref) a copy of the small one that was first distilled on all tokens (`distillspec.py`). Target and
reference are frozen: no gradient reaches them. A token is worth the draft's scarce capacity where the draft is still
far behind what a model of its own size can learn: where gap = KL(p || q_draft) - KL(p || q_ref) is large.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["adaspec_loss", "response_tokens", "select_tokens", "token_kl"]

_LOWEST = -1e30  # stands for log 0: finite, so that 0 * log 0 is 0, and small enough to be summed over many tokens


def log_probs(target_logits: Tensor, draft_logits: Tensor) -> tuple[Tensor, Tensor]:
    """(log p, log q) in float32, with masked tokens (logits of -inf) at -1e30.

    Raises ValueError where the shapes differ: slice both vocabularies to the tokenizer's length, never pad logits.
    """
    if target_logits.shape != draft_logits.shape:
        raise ValueError(
            f"logits of the target {tuple(target_logits.shape)} and its student {tuple(draft_logits.shape)} differ in shape; "
            "slice both vocabularies to the shared tokenizer's length: logits[..., :len(tokenizer)]"
        )
    log_p, log_q = (F.log_softmax(logits.float(), dim=-1).clamp_min(_LOWEST) for logits in (target_logits, draft_logits))
    return log_p, log_q


def token_kl(target_logits: Tensor, draft_logits: Tensor) -> Tensor:
    """Forward KL(p || q) of every token, the distillation loss of both stages, in nats.

    Shapes [..., V], [..., V] -> [...], float32 whatever the inputs are. Raises ValueError where the shapes differ.
    """
    log_p, log_q = log_probs(target_logits, draft_logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def select_tokens(gap: Tensor, k: float) -> Tensor:
    """The filter of stage 2: True where gap >= quantile(gap, 1 - k), that is on the top fraction k; ties are all kept.

    gap [N] in any float type -> bool [N]. Raises ValueError unless 0 < k <= 1. A NaN gap is kept, so that it reaches
    the loss and is noticed there instead of being filtered away.
    """
    if not 0 < k <= 1:
        raise ValueError(f"k is the fraction of tokens to keep and must be in (0, 1], got {k}")
    if gap.numel() == 0:
        return torch.ones_like(gap, dtype=torch.bool)
    # The quantile interpolates between two neighbours in sorted order; what is >= it is what is >= the upper one.
    # That one is found without torch.quantile's limit of 2**24 values; 1e-6 absorbs the rounding of 1 - k.
    rank = math.ceil((1 - k) * (gap.numel() - 1) - 1e-6)
    return ~(gap < gap.kthvalue(max(rank, 0) + 1).values)


def response_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits that predict response tokens: [B, T, V], labels [B, T] (-100 = no loss) -> [N, V] in row order.

    The logits at position t predict the token at t + 1, so labels are shifted by one here and nowhere else.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}: need [B, T, V] and [B, T]")
    next_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    # index_select: the backward of boolean indexing is serial on CPU
    return logits.flatten(0, 1).index_select(0, (next_labels != -100).flatten().nonzero().squeeze(-1))


def adaspec_loss(
    draft_logits: Tensor, target_logits: Tensor, reference_logits: Tensor, labels: Tensor, k: float = 0.4
) -> Tensor:
    """Mean KL(p || q_draft) over the selected response tokens (stage 2 of the paper), a float32 scalar.

    Logits [B, T, V] as the models return them, labels [B, T] with -100 on prompt and padding. The quantile is taken over
    all response tokens given: under data or micro-batch splits that is the local part, unless the gaps are gathered first
    (`run_all.py` gathers them over ranks). Gradient flows through draft_logits only. No response token at all: loss 0.
    Raises ValueError for mismatched shapes or k outside (0, 1].
    """
    draft = response_tokens(draft_logits, labels)
    with torch.no_grad():
        target = response_tokens(target_logits, labels)
        reference_kl = token_kl(target, response_tokens(reference_logits, labels))
    draft_kl = token_kl(target, draft)
    gap = draft_kl.detach() - reference_kl
    selected = select_tokens(gap, k)
    draft_kl = torch.where(gap.isnan(), gap, draft_kl)  # a reference that gives NaN must not pass for a selection
    return torch.where(selected, draft_kl, 0.0).sum() / selected.sum().clamp_min(1)
