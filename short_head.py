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
from head import CHUNK, Head


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
        short = F.linear(hidden, self.weight, self.bias)
        logits = short.new_full((*short.shape[:-1], self.vocab_size), -math.inf)
        return logits.index_copy_(-1, self.token_ids, short)


def shorten_head(model: nn.Module, token_ids: Tensor) -> nn.Module:
    """Give a causal LM a short head of the rows `token_ids` of its own head, in place; returns it.
    Its config then says `draft_vocab_size`, and the head is tied to the embeddings no more."""
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    weight = head.weight.detach()[token_ids].clone()
    bias = None if bias is None else bias.detach()[token_ids].clone()
    model.set_output_embeddings(ShortHead(weight, bias, token_ids, len(head.weight)))
    model.config.tie_word_embeddings = False
    model.config.draft_vocab_size = len(token_ids)
    return model


def frequent_tokens(examples: Sequence[Example], count: int, ends: Sequence[int]) -> Tensor:
    """The `count` tokens that bear loss most often in the examples, ascending [count]. Equally
    frequent ones by their number, which for BPE is the order of merging; `ends` are always in."""
    loss_tokens = [torch.from_numpy(e.input_ids[e.bears_loss]).long() for e in examples]
    ids, counts = torch.cat(loss_tokens).unique(return_counts=True)
    frequency = torch.zeros(max(int(ids.max()), *ends, count) + 1, dtype=torch.long)
    frequency[ids] = counts
    frequency[list(ends)] = frequency.sum() + 1
    ranked = frequency.argsort(descending=True, stable=True)
    return ranked[:count].sort().values


# What the target says of the tokens outside


@torch.no_grad()
def outside_log_mass(head: Head, token_ids: Tensor, hidden: Tensor) -> Tensor:
    """The log of the target's probability of all tokens but `token_ids`, for hidden states [N, d]
    -> [N] float32."""
    parts = []
    for states in hidden.split(CHUNK):
        logits = head(states).float()
        total = logits.logsumexp(-1)
        parts.append(logits.index_fill(-1, token_ids, -math.inf).logsumexp(-1) - total)
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def with_outside(logits: Tensor, log_mass: Tensor) -> Tensor:
    """The target's logits on the kept tokens [n, V'] with one more for all others together, from
    the log of their probability [n]: [n, V' + 1], whose softmax is p itself."""
    log_mass = log_mass.clamp(max=-1e-6)  # some mass is kept, to a millionth
    odds = log_mass - torch.log(-torch.expm1(log_mass))
    outside = logits.float().logsumexp(-1) + odds
    return torch.cat([logits.float(), outside[:, None]], 1)
