"""DistillSpec: knowledge distillation of the draft on every response token (arXiv 2310.08461),
AdaSPEC's baseline.

`DIVERGENCES` maps a name to a per-token loss f(target_logits, draft_logits),
[..., V], [..., V] -> [...] float32, with p the target's and q the draft's distribution;
`distill_loss` averages one of them over the response tokens. All of them raise ValueError where
the two shapes differ. They detach nothing: `distill_loss` keeps gradients out of the target.

Who writes the responses is DistillSpec's other question: the data set, the target
(`write_responses`, once), or the draft itself as it learns (`OnPolicy`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaspec import log_probs, reduced, response_tokens, token_kl
from speculative import left_pad, speculative_generate, until_end


def reverse_kl(target_logits: Tensor, draft_logits: Tensor) -> Tensor:
    """KL(q || p), in nats: mode-seeking."""
    log_p, log_q = log_probs(target_logits, draft_logits)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jensen_shannon(target_logits: Tensor, draft_logits: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised JSD_beta = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    The formula itself is 0 at both ends; there, as in the paper, beta = 0 means FKL and beta = 1
    means RKL (its limits after division by beta and by 1 - beta). Raises ValueError for beta
    outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    if beta == 0:
        return token_kl(target_logits, draft_logits)
    if beta == 1:
        return reverse_kl(target_logits, draft_logits)
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

    Computed in log space, log alpha = logsumexp_x min(log p, log q), so that disjoint distributions
    keep a finite loss and a gradient.
    """
    log_p, log_q = log_probs(target_logits, draft_logits)
    return -torch.minimum(log_p, log_q).logsumexp(-1)


def lk_hybrid(target_logits: Tensor, draft_logits: Tensor, eta: float = 3.0) -> Tensor:
    """lam KL(p || q) + (1 - lam) TVD, lam = exp(-eta stop_grad(alpha)) (LK family): KL while far
    off, TVD once close."""
    log_p, log_q = log_probs(target_logits, draft_logits)
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1)
    tvd = 0.5 * (p - log_q.exp()).abs().sum(-1)
    lam = torch.exp(-eta * (1 - tvd.detach()))
    return lam * kl + (1 - lam) * tvd


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fkl": token_kl,
    "rkl": reverse_kl,
    "jsd": jensen_shannon,
    "tvd": total_variation,
    "lk": negative_log_acceptance,
    "lk_hybrid": lk_hybrid,
}


def distill_loss(
    draft_logits: Tensor,
    target_logits: Tensor,
    labels: Tensor,
    divergence: str = "fkl",
    *,
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, int]:
    """Mean divergence over all response tokens, a float32 scalar; with reduction "sum" (summed
    divergence, number of tokens in it). No response token at all gives 0.

    Logits [B, T, V] as the models return them, labels [B, T] with -100 on prompt and padding
    (shifted by one inside; left padding as for `adaspec_loss`). Raises ValueError for an unknown
    divergence or reduction and for mismatched shapes.
    """
    if divergence not in DIVERGENCES:
        names = ", ".join(DIVERGENCES)
        raise ValueError(f"unknown divergence {divergence!r}, expected one of {names}")
    target = response_tokens(target_logits, labels).detach()
    loss = DIVERGENCES[divergence](target, response_tokens(draft_logits, labels))
    return reduced(loss.sum(), loss.numel(), reduction)


# Who writes the responses


def write_responses(
    model,
    prompts: Sequence[Tensor],
    limits: Sequence[int],
    generator,
    ends: list[int],
    vocab_size: int,
    temperature: float = 1.0,
    draft=None,
) -> list[Tensor]:
    """A response for each prompt [T_i], sampled from `model` in one batch; a `draft` may speed it
    up and leaves the distribution as it is.

    limits: the most tokens of each response, an end token included. Raises ValueError for a prompt
    that with its limit exceeds the model's context.
    """
    input_ids, attention_mask = left_pad(list(prompts), model.device)
    output = speculative_generate(
        model,
        draft,
        input_ids,
        attention_mask,
        max_new_tokens=list(limits),
        temperature=temperature,
        eos_token_id=ends,
        generator=generator,
        vocab_size=vocab_size,
    )
    responses = output.sequences[:, input_ids.shape[1] :].cpu()
    return [
        until_end(tokens[:limit], ends) for tokens, limit in zip(responses, limits, strict=True)
    ]


@dataclass
class ResponseWriter:
    """Rewrites examples with responses that a model samples."""

    ends: list[int]  # the tokens that end a response
    vocab_size: int
    max_new_tokens: int
    max_length: int  # of prompt and response together
    batch_size: int

    def write(
        self, model, examples: Sequence, seed: int, temperature: float = 1.0, draft=None
    ) -> list:
        """The examples (data.Example) with the model's responses, in the same order; each batch
        holds prompts of similar lengths, and every row has the room that its own prompt leaves."""
        generator = torch.Generator(model.device).manual_seed(seed)
        order = sorted(range(len(examples)), key=lambda row: examples[row].prompt_length)
        written = {}
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            lengths = [examples[row].prompt_length for row in rows]
            prompts = [
                torch.from_numpy(examples[row].input_ids[:length]).long()
                for row, length in zip(rows, lengths, strict=True)
            ]
            limits = [min(self.max_new_tokens, self.max_length - length) for length in lengths]
            responses = write_responses(
                model, prompts, limits, generator, self.ends, self.vocab_size, temperature, draft
            )
            for row, prompt, response in zip(rows, prompts, responses, strict=True):
                input_ids = torch.cat([prompt, response]).int().numpy()
                written[row] = examples[row]._replace(input_ids=input_ids)
        return [written[row] for row in range(len(examples))]


@dataclass
class OnPolicy:
    """Responses that the draft writes as it learns, anew every `refresh` steps, for a `share` of
    the rows (1.0: all of them, DistillSpec's on-policy data; below: mixed with the data set's)."""

    writer: ResponseWriter
    examples: Sequence
    share: float
    refresh: int
    seed: int  # of the cell; with step and rank it gives each draw its own
    rank: int = 0
    ranks: int = 1

    def write(self, model, rows: Sequence[int], step: int) -> dict:
        """{row: example} for those of the rows that the draft is to write at this step."""
        draws = np.random.default_rng([self.seed, step]).random(len(self.examples))
        rows = [row for row in rows if self.share >= 1 or draws[row] < self.share]
        seed = (self.seed * 1_000_003 + step) * self.ranks + self.rank
        examples = self.writer.write(model, [self.examples[row] for row in rows], seed)
        return dict(zip(rows, examples, strict=True))
