"""DistillSpec: knowledge distillation of the draft on every response token (arXiv 2310.08461), AdaSPEC's baseline.

`DIVERGENCES` maps a name to a per-token loss f(target_logits, draft_logits), [..., V], [..., V] -> [...] float32, with p the
target's and q the draft's distribution; `distill_loss` averages one of them over the response tokens. All of them raise
ValueError where the two shapes differ. They detach nothing: `distill_loss` keeps gradients out of the target.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from adaspec import log_probs, response_tokens, token_kl

__all__ = ["DIVERGENCES", "distill_loss"]


def reverse_kl(target_logits: Tensor, draft_logits: Tensor) -> Tensor:
    """KL(q || p), in nats: mode-seeking."""
    log_p, log_q = log_probs(target_logits, draft_logits)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jensen_shannon(target_logits: Tensor, draft_logits: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised JSD_beta = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    The formula itself is 0 at both ends; there, as in the paper, beta = 0 means FKL and beta = 1 means RKL (its limits after
    division by beta and by 1 - beta). Raises ValueError for beta outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    if beta in (0, 1):
        return token_kl(target_logits, draft_logits) if beta == 0 else reverse_kl(target_logits, draft_logits)
    log_p, log_q = log_probs(target_logits, draft_logits)
    p, q = log_p.exp(), log_q.exp()
    log_m = (beta * p + (1 - beta) * q).clamp_min(torch.finfo(torch.float32).tiny).log()
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


def total_variation(target_logits: Tensor, draft_logits: Tensor) -> Tensor:
    """TVD = 1/2 sum |p - q| = 1 - expected acceptance, the probability of rejecting a token."""
    log_p, log_q = log_probs(target_logits, draft_logits)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def negative_log_acceptance(target_logits: Tensor, draft_logits: Tensor) -> Tensor:
    """-log alpha with alpha = sum_x min(p, q) (the LK family, arXiv 2602.23881).

    Computed in log space, log alpha = logsumexp_x min(log p, log q), so that disjoint distributions keep a finite loss
    and a gradient.
    """
    return -torch.minimum(*log_probs(target_logits, draft_logits)).logsumexp(-1)


def lk_hybrid(target_logits: Tensor, draft_logits: Tensor, eta: float = 3.0) -> Tensor:
    """lam KL(p || q) + (1 - lam) TVD, lam = exp(-eta stop_grad(alpha)) (LK family): KL while far off, TVD once close."""
    log_p, log_q = log_probs(target_logits, draft_logits)
    p = log_p.exp()
    kl, tvd = (p * (log_p - log_q)).sum(-1), 0.5 * (p - log_q.exp()).abs().sum(-1)
    lam = torch.exp(-eta * (1 - tvd.detach()))
    return lam * kl + (1 - lam) * tvd


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fkl": token_kl,
    "rkl": reverse_kl,
    "jsd": partial(jensen_shannon, beta=0.5),
    "tvd": total_variation,
    "lk": negative_log_acceptance,
    "lk_hybrid": lk_hybrid,
}


def distill_loss(draft_logits: Tensor, target_logits: Tensor, labels: Tensor, divergence: str = "fkl") -> Tensor:
    """Mean divergence over all response tokens, a float32 scalar; no response token at all gives 0.

    Logits [B, T, V] as the models return them, labels [B, T] with -100 on prompt and padding (shifted by one inside).
    Raises ValueError for an unknown divergence or mismatched shapes.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"unknown divergence {divergence!r}, expected one of {', '.join(DIVERGENCES)}")
    target = response_tokens(target_logits, labels).detach()
    loss = DIVERGENCES[divergence](target, response_tokens(draft_logits, labels))
    return loss.sum() / max(loss.numel(), 1)
