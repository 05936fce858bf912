"""A draft's short output head: only the rows of the tokens that responses use most
(frequency-ranked draft vocabularies, FR-Spec, arXiv 2502.14856).

The draft gives every other token the probability 0. Speculative decoding stays lossless, whatever q
is; but no token outside can be accepted, so the target's mass on the kept tokens, the coverage,
bounds alpha. A short head is what makes a draft of one layer cheap: its head is most of its work.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import Example
from head import Head, chunks


class ShortHead(nn.Module):
    """An output head with rows for `token_ids` [V'] (ascending) alone: `weight` [V', d]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, token_ids: Tensor, vocab_size: int):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("token_ids", token_ids)
        self.vocab_size = vocab_size

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size] of hidden states [..., d]: -inf for all other tokens."""
        short_logits = self.kept_logits(hidden)
        logits = short_logits.new_full((*short_logits.shape[:-1], self.vocab_size), -math.inf)
        return logits.index_copy_(-1, self.token_ids, short_logits)

    def kept_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V'] of `token_ids` alone. speculative.py may replace this on a CPU."""
        return F.linear(hidden, self.weight, self.bias)


def shorten_head(model: nn.Module, token_ids: Tensor) -> nn.Module:
    """Give a causal LM a short head of the rows `token_ids` of its own head, in place; returns it.
    Its config then says `draft_vocab_size`, and the head is tied to the embeddings no more."""
    model.set_output_embeddings(shortened(model.get_output_embeddings(), token_ids))
    model.config.tie_word_embeddings = False
    model.config.draft_vocab_size = len(token_ids)
    return model


def shortened(head: nn.Module, token_ids: Tensor) -> ShortHead:
    """A short head with copies of the rows `token_ids` of an output head."""
    bias = getattr(head, "bias", None)
    token_ids = token_ids.to(head.weight.device)
    weight = head.weight.detach()[token_ids].clone()
    bias = None if bias is None else bias.detach()[token_ids].clone()
    return ShortHead(weight, bias, token_ids, len(head.weight))


def frequent_tokens(examples: Sequence[Example], count: int, ends: Sequence[int]) -> Tensor:
    """The `count` tokens that bear loss most often in the examples, ascending [count]; `ends` are
    always among them. Of equally frequent ones, and of those that never occur, the ones with lower
    numbers, which for BPE are the ones merged earlier."""
    loss_tokens = [torch.from_numpy(e.input_ids[e.bears_loss]).long() for e in examples]
    frequency = torch.cat(loss_tokens).bincount(minlength=max(count, *ends) + 1)
    frequency[list(ends)] = frequency.sum() + 1
    ranked = frequency.argsort(descending=True, stable=True)
    return ranked[:count].sort().values


# What the target says of the other tokens, one number for all of them


@torch.no_grad()
def outside_log_odds(head: Head, token_ids: Tensor, hidden: Tensor) -> Tensor:
    """log (the target's probability of all other tokens / that of `token_ids`) for hidden states
    [N, d] -> [N] float32. (Log odds are exact where either probability is tiny.)"""
    parts = [hidden.new_zeros(0, dtype=torch.float32)]
    for states in chunks(hidden, head.size):
        logits = head(states).float()
        inside = logits.index_select(-1, token_ids).logsumexp(-1)
        outside = logits.index_fill_(-1, token_ids, -math.inf).logsumexp(-1)
        parts.append(outside - inside)
    return torch.cat(parts)


def with_outside(logits: Tensor, log_odds: Tensor) -> Tensor:
    """The target's logits of the kept tokens [n, V'] and one more for all others together, from
    `outside_log_odds` [n]: [n, V' + 1], whose softmax is p itself."""
    logits = logits.float()
    outside = logits.logsumexp(-1) + log_odds
    return torch.cat([logits, outside[:, None]], 1)


def coverage(log_odds: Tensor) -> float:
    """The target's mean probability of the kept tokens, from `outside_log_odds` [N]."""
    return (-log_odds).sigmoid().mean().item()
