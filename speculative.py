"""Lossless speculative sampling for any two Hugging Face causal language models that share a tokenizer.

A small draft model proposes `gamma` tokens, the target scores them all in one call, and a rejection rule keeps just
those that leave the output distributed as the target's own (Leviathan et al. 2023, Algorithm 1; Chen et al. 2023).
Batched, and with counts that can be trusted. p is always the target's distribution, q the draft's. Copy this file.

    out = speculative_generate(target, draft, input_ids, max_new_tokens=128, gamma=5)
    print(out.stats.alpha, out.stats.tau)  # acceptance rate, tokens per target call

    python speculative.py --target DIR_OR_HUB_ID --draft DIR_OR_HUB_ID --prompt "..."
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import itertools
import json
import math
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Lossy acceptance (DistillSpec, section 5.3): the accept test reads f(p, epsilon) >= p in place of p.
LENIENCE = {"lin": lambda p, eps: p / eps, "sq": lambda p, eps: p / eps**2, "exp": lambda p, eps: p**eps}
LOGITS_A_PASS = 2**26  # logits of one model that expected_acceptance holds at a time: 256 MB in float32, or one row's


@dataclass
class Stats:
    """What decoding did, counted per row and summed: one target call that serves three unfinished rows counts three.

    Tokens after an end token count nowhere: not as drafted, not as accepted, not as generated.
    """

    rounds: int = 0  # target calls that judged drafts; a row with one token to go gets a plain target step instead
    drafted: int = 0  # drafts the row could use: at most gamma, and one less than the tokens it may still write
    accepted: int = 0
    rejected: int = 0  # at most one a round, the first that fails
    never_judged: int = 0  # the drafts after it
    target_calls: int = 0  # the prompt is scored together with the first drafts: there is no extra call for it
    generated: int = 0
    cut: int = 0  # target calls that ended on an accepted end token and so gave no token of the target's own
    per_position: tuple[list, list] = field(default_factory=lambda: ([], []))  # accepted, judged: by draft position

    @property
    def alpha(self) -> float:
        """Acceptance rate, accepted / judged (AdaSPEC Eq. 3): drafts after a round's first rejection are not judged."""
        return _ratio(self.accepted, self.accepted + self.rejected)

    @property
    def draft_acceptance(self) -> float:
        """accepted / drafted, the rate vLLM reports; never above alpha."""
        return _ratio(self.accepted, self.drafted)

    @property
    def tau(self) -> float:
        """Block efficiency: tokens generated per target call, measured."""
        return _ratio(self.generated, self.target_calls)

    def predicted_tau(self, gamma: int) -> float:
        """(1 - alpha^(gamma+1)) / (1 - alpha): AdaSPEC Eq. 4, which takes acceptance as i.i.d. For comparison only."""
        return gamma + 1.0 if self.alpha == 1 else (1 - self.alpha ** (gamma + 1)) / (1 - self.alpha)

    def check(self) -> None:
        """Raise AssertionError unless the counts, each of them counted on its own, add up."""
        judged = self.accepted + self.rejected
        assert math.isclose(judged + self.never_judged, self.drafted, abs_tol=1e-6), self
        assert math.isclose(self.accepted + self.target_calls - self.cut, self.generated, abs_tol=1e-6), self
        for total, by_position in zip((self.accepted, judged), self.per_position, strict=True):
            assert math.isclose(total, sum(by_position), abs_tol=1e-6), self

    def __add__(self, other: Stats) -> Stats:
        counts = [f.name for f in fields(self) if f.name != "per_position"]
        totals = {name: getattr(self, name) + getattr(other, name) for name in counts}
        return Stats(**totals, per_position=_add_lists(self.per_position, other.per_position))

    def _record(self, limit: int, accepted: int, new: list[int]) -> None:
        """Count a round: `accepted` of `limit` usable drafts were kept, and `new`, up to an end token, came out."""
        if len(new) <= accepted:  # an accepted draft was the end token
            limit = accepted = len(new)
            self.cut += 1
        rejected = int(accepted < limit)
        self.rounds += int(limit > 0)
        self.drafted += limit
        self.accepted += accepted
        self.rejected += rejected
        self.never_judged += len(range(accepted + 1, limit))
        self.target_calls += 1
        self.generated += len(new)
        self.per_position = _add_lists(self.per_position, ([1] * accepted + [0] * rejected, [1] * (accepted + rejected)))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")


def _add_lists(a: tuple[list, list], b: tuple[list, list]) -> tuple[list, list]:
    return tuple([x + y for x, y in itertools.zip_longest(*pair, fillvalue=0)] for pair in zip(a, b, strict=True))


class SpeculativeOutput(NamedTuple):
    sequences: torch.Tensor  # [B, <= T + max_new_tokens]: the input as given, then the new tokens, padded on the right
    stats: Stats  # summed over rows
    row_stats: list[Stats]


def _takes_positions(model) -> bool:
    """Whether position_ids decide where a token stands: ALiBi counts cache slots instead."""
    return "position_ids" in inspect.signature(model.forward).parameters and not getattr(model.config, "alibi", False)


class _Lane:
    """A model and its cache. Invariant: the valid slots of a row hold, in order, a prefix of that row's sequence.

    `forward` appends the same number of slots to every row; `rollback` takes from every row its own number of tokens.
    What all rows give up is cropped. What only some give up stays behind as holes, slots that the attention mask hides
    for good; positions count valid slots only, so a hole shifts nothing. When slots exceed twice the longest row, the
    cache is compacted by a gather, which costs about what a `torch.cat` of the cache does, and DynamicCache pays that
    at every forward: memory stays within twice the longest row plus a round. One row alone has no holes: no mask, no
    position_ids, no gather.
    """

    ready = True  # whether it can draft before the target has read the prompt

    def __init__(self, model, input_ids, prompt_mask, vocab_size, last_position):
        from transformers import DynamicCache  # the one thing the library part needs of transformers

        self.cache = DynamicCache(config=model.config)
        if any(self.cache.is_sliding) or not self.cache.is_croppable:
            raise ValueError(f"{type(model).__name__}: every layer must have full attention, or a cache cannot go back")
        rows_differ = len(input_ids) > 1 or prompt_mask is not None
        if rows_differ and not _takes_positions(model):
            raise ValueError(f"{type(model).__name__} takes no position_ids: decode its prompts one by one, without padding")
        self.model, self.device, self.vocab_size = model, input_ids.device, vocab_size
        self.last_position = last_position
        self.mask = prompt_mask  # [B, slots] bool, or None while all slots of all rows are valid
        self.length = [0] * len(input_ids)  # valid tokens a row
        if prompt_mask is not None:  # minus the padding: it will have been added when the padded prompt is fed
            self.length = (prompt_mask.sum(1) - input_ids.shape[1]).tolist()

    def forward(self, tokens: torch.Tensor, keep: int = 1) -> torch.Tensor:
        """Feed each row its next n tokens, [B, n]; logits [B, keep, vocab_size] at the last `keep` of them."""
        n, masked = tokens.shape[1], {}
        self.length = [length + n for length in self.length]
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, self.cache.get_seq_length() + n - self.mask.shape[1]), value=True)
            positions = self.mask.cumsum(1)[:, -n:] - 1
            # Clamped, since a row near its end is fed drafts it cannot use, perhaps beyond the model's last position.
            masked = {"attention_mask": self.mask, "position_ids": positions.clamp_(0, self.last_position)}
        return self.call(tokens, keep, **masked)[:, -keep:, : self.vocab_size]

    def call(self, tokens: torch.Tensor, keep: int, **inputs) -> torch.Tensor:
        """The model's logits; eagle.py's lanes also take or pass on hidden states here."""
        output = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=keep, **inputs)
        return output.logits

    def advance(self, texts: list[list[int]], lag: int, rows: list[int] | None) -> torch.Tensor:
        """After a round: keep all but the last `lag` tokens of the rows that go on; returns those, to be fed next, [B, lag]."""
        self.rollback([len(text) - lag for text in texts], rows)
        return torch.tensor([text[-lag:] for text in texts], device=self.device)

    def rollback(self, keep: list[int], rows: list[int] | None = None) -> None:
        """Drop all rows but `rows` (None: none), then the newest tokens of each until row b holds keep[b] of them."""
        if rows is not None:
            index = torch.tensor(rows, device=self.device)
            self.cache.batch_select_indices(index)
            self.mask = None if self.mask is None else self.mask[index]
            self.length = [self.length[row] for row in rows]
        drop = [length - kept for length, kept in zip(self.length, keep, strict=True)]
        self.length, longest, common = keep, max(keep), min(drop)
        if common:
            self.cache.crop(-common)
            self.mask = None if self.mask is None else self.mask[:, :-common]
        slots = self.cache.get_seq_length()
        if max(drop) > common:
            ends = torch.tensor(drop, device=self.device)[:, None].neg() + slots + common
            valid = torch.arange(slots, device=self.device) < ends
            self.mask = valid if self.mask is None else self.mask & valid
        if self.mask is not None and slots > longest * (1 if len(keep) == 1 else 2):
            order = self.mask.int().argsort(dim=1, stable=True)[:, -longest:]  # holes first, then the tokens in order
            for layer in self.cache.layers:
                layer.keys = layer.keys.take_along_dim(order[:, None, :, None], 2)
                layer.values = layer.values.take_along_dim(order[:, None, :, None], 2)
            self.mask = None if min(keep) == longest else self.mask.take_along_dim(order, 1)


def _distribution(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Logits [..., V] to float32 probabilities: temperature, then top-k, then top-p, in transformers' order."""
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if top_p < 1:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False  # the likeliest token stays, whatever top_p is
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)
    return logits.softmax(-1)


def _draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Weights [B, V] of any positive sum and uniforms [B, 1] in [0, 1) to tokens [B, 1], by the inverse of their sum.

    20 times faster on a CPU than torch.multinomial at V = 50,000. right=True: a token of weight 0 is never drawn.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)


def _verify(logits, drafts, q, limits, uniforms, sampling, lenient):
    """The rule: how many drafts each row keeps, [B], and the token of the target's own that follows them, [B, 1].

    logits [B, g+1, V] of the target; drafts [B, g]; q: the g distributions [B, V] they were drawn from; limits [B]: how
    many drafts a row may use; uniforms [B, g+1]; lenient: f(p) or None. Temperature 0 needs neither q nor uniforms.
    """
    g, temperature = drafts.shape[1], sampling[0]
    if temperature == 0:  # the target's argmax or nothing
        greedy = logits.argmax(-1)
        if g == 0:
            return limits, greedy
        accept = drafts == greedy[:, :g]
        if lenient:
            p = logits[:, :g].float().softmax(-1)
            accept |= lenient(p.gather(2, drafts[..., None])[..., 0]) > p.amax(-1)
        count = torch.minimum(accept.cumprod(1).sum(1), limits)
        return count, greedy.gather(1, count[:, None])

    p = _distribution(logits, *sampling)
    if g == 0:
        return limits, _draw(p[:, 0], uniforms)
    q, row = torch.stack(q, 1), torch.arange(len(limits), device=limits.device)
    p_draft, q_draft = (probs[:, :g].gather(2, drafts[..., None])[..., 0] for probs in (p, q))
    accept = uniforms[:, :g] * q_draft < (lenient(p_draft) if lenient else p_draft)  # u < p / q without a division
    count = torch.minimum(accept.cumprod(1).sum(1), limits)
    # The token after a rejection comes from norm(max(p - q, 0)); after the last usable draft (the bonus token) from p.
    p, q = p[row, count], q[row, count.clamp(max=g - 1)] * (count < limits)[:, None]
    residual = (p - q).clamp_(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)  # p == q to the last bit leaves none
    return count, _draw(residual, uniforms[:, g:])


@contextmanager
def _inference(*models):
    """Inference mode (a tenth faster than no_grad on small models) and evaluation mode; each module's own is put back.

    Tensors made inside must not leave as they are: autograd refuses them later. What a model keeps of its own accord
    (rotary tables, moved or grown) is only read and indexed in training, which is allowed.
    """
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def _check_arguments(
    *, gamma=1, max_new_tokens=1, temperature=0.0, top_k=0, top_p=1.0, lenience=1.0, lenience_fn="exp", seed=0
):
    """ValueError, in one line, for a setting without a meaning."""
    for name, value in (("gamma", gamma), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, value in (("temperature", temperature), ("top_k", top_k)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    for name, value in (("top_p", top_p), ("lenience", lenience)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {value}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be at least 0 and below 2**63, got {seed}")
    if lenience_fn not in LENIENCE:
        raise ValueError(f"lenience_fn must be one of {', '.join(LENIENCE)}, got {lenience_fn!r}")


def _check_prompt(models, input_ids, attention_mask, max_new_tokens):
    """ValueError for input that cannot be decoded; else the mask [B, T] bool, or None when nothing is padded."""
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"empty prompt: input_ids must be [B, T] with B, T > 0, got {list(input_ids.shape)}")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if mask.shape != input_ids.shape or not mask[:, -1].all() or (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("attention_mask must be [B, T] and mark left padding only: no holes, no right padding")
    longest = int(mask.sum(1).max())
    context = min(getattr(model.config, "max_position_embeddings", math.inf) for model in models)
    if longest + max_new_tokens > context:
        raise ValueError(f"prompt of {longest} tokens + max_new_tokens {max_new_tokens} > context of {context} tokens")
    return None if mask.all() else mask


def _shared_vocabulary(models, vocab_size):
    """How many logits all heads have: they are padded beyond the tokenizer's vocabulary by different amounts."""
    smallest = min(model.config.vocab_size for model in models)
    if vocab_size is not None and not 1 <= vocab_size <= smallest:
        raise ValueError(f"vocab_size is {vocab_size}, but the smallest output head has {smallest} rows")
    return vocab_size or smallest


def speculative_generate(
    target, draft, input_ids, attention_mask=None, *, max_new_tokens, gamma=5, temperature=0.0, top_k=0, top_p=1.0,
    lenience=1.0, lenience_fn="exp", eos_token_id=None, generator=None, vocab_size=None, pad_token_id=None,
    on_tokens=None,
) -> SpeculativeOutput:  # fmt: skip
    """Decode as the target would, several tokens a target call (Leviathan et al. 2023, Algorithm 1).

    Temperature 0 gives the target's greedy output token for token (in float32; in bfloat16 a near-tie may fall either
    way, since scoring a block rounds differently from single steps). Above 0 the output has the target's distribution
    whatever the draft is. Rows advance at their own pace, finished rows leave the batch, and each row's result is what
    it would be alone (above 0: in distribution).

    Args:
        target, draft: models with full attention and rotary or learned positions, on one device, with one tokenizer;
            run in evaluation mode and left as they were. draft=None: the target alone, one token a call. A draft that
            has `lanes` of its own, such as an EAGLE head (eagle.py), is driven by those.
        input_ids: [B, T]. attention_mask: [B, T], 0 on left padding.
        max_new_tokens: per row, the end token included. gamma: tokens drafted a round.
        temperature, top_k, top_p: 0 = greedy, 0 = off, 1 = off; applied in that order to both models.
        lenience: epsilon in (0, 1], 1 = lossless. Below 1 a draft d passes with probability min(1, f(p(d)) / q(d)), or
            at temperature 0 if it is the argmax or f(p(d)) > max p, with p at temperature 1.
        lenience_fn: f, "lin" p / epsilon, "sq" p / epsilon^2 or "exp" p^epsilon (DistillSpec, section 5.3).
        eos_token_id: int, list, or None = never stop early. pad_token_id: default the first end token, else 0.
        generator: torch.Generator on the models' device, drawn from throughout. None: torch's own.
        vocab_size: logits of both models are cut to it; len(tokenizer) if heads are padded. Default: the smaller head.
        on_tokens: called as on_tokens(row, tokens, accepted) after a row's round; the first `accepted` were drafted.

    Raises:
        ValueError: a setting out of range, padding elsewhere than on the left, a prompt too long for the context, a
            model with sliding-window or recurrent layers.
    """
    _check_arguments(gamma=gamma, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                     lenience=lenience, lenience_fn=lenience_fn)  # fmt: skip
    models = (target,) if draft is None else (target, draft)
    mask = _check_prompt(models, input_ids, attention_mask, max_new_tokens)
    vocab_size = _shared_vocabulary(models, vocab_size)
    ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    lenient = None if lenience == 1 else lambda p: LENIENCE[lenience_fn](p, lenience)
    gamma = 0 if draft is None else gamma
    device, width, sampling = input_ids.device, input_ids.shape[1], (temperature, top_k, top_p)
    prompt = input_ids, mask, vocab_size, width + max_new_tokens - 1
    lanes = draft.lanes(target, *prompt) if hasattr(draft, "lanes") else [_Lane(model, *prompt) for model in models]
    target_lane, draft_lane = lanes[0], lanes[-1]

    starts = [width] * len(input_ids) if mask is None else mask.sum(1).tolist()
    text = [ids[-start:] for ids, start in zip(input_ids.tolist(), starts, strict=True)]  # without padding; it grows
    stats = [Stats() for _ in text]
    rows = list(range(len(text)))  # the unfinished ones; every tensor below is [len(rows), ...]
    target_next = draft_next = input_ids  # what a cache lacks: first the prompt, scored together with the first drafts
    with _inference(*models):
        while rows:
            # A row's last token is always the target's own, so with r to go it can use r - 1 drafts at most.
            most = gamma if draft_lane.ready else 0
            limits = [min(most, starts[row] + max_new_tokens - len(text[row]) - 1) for row in rows]
            g = max(limits)
            # The round's draws all at once: g drafts, g accept tests, 1 token of the target's own (greedy needs none).
            uniforms = torch.empty(len(rows), 2 * g + 1 if temperature > 0 else 0, device=device, dtype=torch.float64)
            uniforms.uniform_(generator=generator)
            drafts, q = [], []
            for i in range(g):
                logits = draft_lane.forward(drafts[-1] if drafts else draft_next)[:, -1]
                if temperature > 0:
                    q.append(_distribution(logits, *sampling))
                    drafts.append(_draw(q[-1], uniforms[:, i : i + 1]))
                else:
                    drafts.append(logits.argmax(-1, keepdim=True))
            scored = torch.cat([target_next, *drafts], 1)
            logits = target_lane.forward(scored, keep=g + 1)
            limit = torch.tensor(limits, device=device)
            count, own = _verify(logits, scored[:, scored.shape[1] - g :], q, limit, uniforms[:, g:], sampling, lenient)
            results = torch.cat([count[:, None], own, *drafts], 1).tolist()  # the round's one wait for the device

            alive, lag = [], 1
            for i, (row, (accepted, last, *drafted)) in enumerate(zip(rows, results, strict=True)):
                new = [*drafted[:accepted], last]
                end = next((j for j, token in enumerate(new) if token in ends), None)
                new = new if end is None else new[: end + 1]
                text[row] += new
                stats[row]._record(limits[i], accepted, new)
                if on_tokens is not None:
                    on_tokens(row, new, min(accepted, len(new)))
                if end is None and len(text[row]) < starts[row] + max_new_tokens:
                    alive.append(i)
                    if accepted == g:  # the draft was never fed its own last token, so it lacks two
                        lag = 2
            survivors = None if len(alive) == len(rows) else alive
            rows = [rows[i] for i in alive]
            if rows:
                unfinished = [text[row] for row in rows]
                target_next = target_lane.advance(unfinished, 1, survivors)
                if gamma:  # all rows are fed alike: if one lacks two tokens, the others give up one more
                    draft_next = draft_lane.advance(unfinished, lag, survivors)

    for row_stats in stats:
        row_stats.check()
    pad = pad_token_id if pad_token_id is not None else ends[0] if ends else 0
    new = [tokens[start:] for tokens, start in zip(text, starts, strict=True)]
    longest = max(map(len, new))
    new = torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens in new]).to(input_ids)
    return SpeculativeOutput(torch.cat([input_ids, new], 1), sum(stats, Stats()), stats)


def autoregressive_generate(
    target, input_ids, attention_mask=None, *, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, eos_token_id=None,
    generator=None, vocab_size=None, pad_token_id=None, on_tokens=None,
) -> torch.Tensor:  # fmt: skip
    """The same loop without a draft, one token a call: the baseline of every speed-up. Arguments and errors as above.

    Returns the sequences, [B, <= T + max_new_tokens].
    """
    return speculative_generate(
        target, None, input_ids, attention_mask, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, eos_token_id=eos_token_id, generator=generator, vocab_size=vocab_size, pad_token_id=pad_token_id,
        on_tokens=on_tokens,
    ).sequences  # fmt: skip


class Acceptance(NamedTuple):
    overlap: torch.Tensor  # [N] float32: sum_x min(p, q), the chance that a draft is accepted here
    agree: torch.Tensor  # [N] bool: p and q have the same argmax
    ratio: torch.Tensor  # [N] float32: min(1, q(x) / p(x)) for the text's token x, that chance given that x comes out


def expected_acceptance(
    target, draft, input_ids, labels, temperature=1.0, *, top_k=0, top_p=1.0, vocab_size=None
) -> Acceptance:
    """Acceptance at every response token of a text, exactly, in one pass a model (Leviathan et al. 2023, Theorem 3.5).

    input_ids [B, T], padded on the right (causal attention never looks there, so no mask); labels [B, T], -100 on
    prompt and padding. The shift is inside: the token at t is predicted at t - 1, so a label in column 0 does not
    count. The N response tokens come in row order. At temperature 0, p and q are all on their argmax: overlap is agree,
    and ratio says whether the draft's argmax is the text's token.

    Raises:
        ValueError: a setting out of range.
    """
    _check_arguments(temperature=temperature, top_k=top_k, top_p=top_p)
    vocab_size = _shared_vocabulary((target, draft), vocab_size)
    found = [[torch.empty(0, device=input_ids.device, dtype=dtype)] for dtype in (torch.float, torch.bool, torch.float)]
    group = max(1, LOGITS_A_PASS // (input_ids.shape[1] * vocab_size))  # rows a pass
    with _inference(target, draft):
        for ids, wanted in zip(input_ids.split(group), (labels[:, 1:] != -100).split(group), strict=True):
            columns = wanted.any(0).nonzero()[:, 0]  # the head runs only where some row of the group has a response
            if not len(columns):
                continue
            context = ids[:, : columns[-1] + 1]
            given = draft.given(target, context) if hasattr(draft, "given") else {}  # a head reads the target's states too
            both = [
                model(context, use_cache=False, logits_to_keep=columns, **more).logits
                for model, more in ((target, {}), (draft, given))
            ]
            where = wanted[:, columns].nonzero(as_tuple=True)
            for row, column in zip(*(index.split(512) for index in where), strict=True):
                p, q = (logits[row, column, :vocab_size] for logits in both)
                token = ids[row, columns[column] + 1]
                agree = p.argmax(-1) == q.argmax(-1)
                if temperature == 0:
                    overlap, ratio = agree.float(), (q.argmax(-1) == token).float()
                else:
                    p, q = (_distribution(logits, temperature, top_k, top_p) for logits in (p, q))
                    overlap = torch.minimum(p, q).sum(-1)
                    p, q = (probs.gather(1, token[:, None])[:, 0] for probs in (p, q))
                    ratio = torch.where(q < p, q / p, (q > 0).float())
                for values, chunk in zip(found, (overlap, agree, ratio), strict=True):
                    values.append(chunk)
    return Acceptance(*map(torch.cat, found))


class Simulated(NamedTuple):
    tau: float
    alpha: float
    stats: Stats  # expected counts, summed over rows
    row_stats: list[Stats]


def simulate_rounds(ratio, row_lengths: list[int], gamma: int, max_new_tokens: int | None = None) -> Simulated:
    """The expected counts of speculative decoding along target-written texts, for any gamma, without decoding again.

    A token x comes out of a position with chance p(x), and as an accepted draft with chance min(p(x), q(x)); so given
    the text, each judged position accepts with chance min(1, q(x) / p(x)) whatever happened before, and the sum over
    where rounds may start is exact. (overlap is that chance averaged over x: right for one position, wrong for a round,
    since which x came out also shapes what follows.) The mean over texts drawn from the target is the mean of decoding;
    at temperature 0 the counts are decoding's own.

    Args:
        ratio: [N] from `expected_acceptance`, on texts the target wrote with the same temperature, top_k and top_p.
        row_lengths: response tokens a row, end token included; their sum is N.
        max_new_tokens: the limit the texts were written under. None: each ended on an end token, far from any limit.

    Raises:
        ValueError: gamma < 1, lengths that do not add up to N or exceed max_new_tokens.
    """
    _check_arguments(gamma=gamma)
    lengths = torch.tensor(row_lengths, dtype=torch.long)
    limit = math.inf if max_new_tokens is None else max_new_tokens
    width = max(row_lengths, default=0)
    if sum(row_lengths) != len(ratio) or width > limit:
        raise ValueError("row_lengths must add up to len(ratio), and none may exceed max_new_tokens")
    chance, start = (torch.zeros(len(lengths), width + gamma + 1, dtype=torch.float64) for _ in range(2))
    chance[torch.arange(width + gamma + 1) < lengths[:, None]] = ratio.double().cpu()
    start[lengths > 0, 0] = 1  # start[row, t]: the chance that a round starts at token t
    rounds, never_judged, target_calls, cut = torch.zeros(4, len(lengths), dtype=torch.float64)
    accepted, judged = torch.zeros(2, gamma, len(lengths), dtype=torch.float64)
    for t in range(width):
        here, usable = start[:, t], int(min(gamma, limit - t - 1))
        target_calls += here
        rounds += here * (usable > 0)
        for i in range(usable):  # here: the chance that the round judges its draft i, for token t + i
            passed = here * chance[:, t + i]
            judged[i] += here
            accepted[i] += passed
            never_judged += (here - passed) * (usable - i - 1)
            more = t + i + 1 < lengths
            start[:, t + i + 1] += (here - passed) * more
            cut += passed * ~more
            here = passed * more
        start[:, t + usable + 1] += here * (t + usable + 1 < lengths)  # all passed: token t + usable was the bonus
    counts = {"rounds": rounds, "never_judged": never_judged, "target_calls": target_calls, "cut": cut}
    counts |= {"accepted": accepted.sum(0), "rejected": (judged - accepted).sum(0), "generated": lengths}
    counts["drafted"] = judged.sum(0) + never_judged
    row_stats = []
    for row in range(len(lengths)):
        by_position = (accepted[:, row].tolist(), judged[:, row].tolist())
        row_stats.append(Stats(**{name: c[row].item() for name, c in counts.items()}, per_position=by_position))
    stats = sum(row_stats, Stats())
    stats.check()
    return Simulated(stats.tau, stats.alpha, stats, row_stats)


def bootstrap_interval(numerators, denominators, level=0.95, samples=1000, seed=0) -> tuple[float, float]:
    """(low, high) by percentile bootstrap over prompts, for a ratio of sums such as alpha = sum accepted / sum judged.

    NaN where no resample has a denominator. With a single prompt there is nothing to resample: low = high.
    """
    pairs = torch.tensor([list(numerators), list(denominators)], dtype=torch.float64)
    index = torch.randint(pairs.shape[1], (samples, pairs.shape[1]), generator=torch.Generator().manual_seed(seed))
    top, bottom = pairs[:, index].sum(-1)
    low, high = (top / bottom).nanquantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return low.item(), high.item()


class _Stream:
    """on_tokens for a person: prints text as it comes, accepted drafts in green on a terminal, and clocks itself."""

    def __init__(self, tokenizer, prompt: list[int], show: bool):
        self.tokenizer, self.ids, self.show, self.shown, self.seconds = tokenizer, list(prompt), show, 0, 0.0
        self._print("", last=True)

    def _print(self, colour, last=False):
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True) if self.show else ""
        if last or not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may need the bytes of the next token
            colour = colour if sys.stdout.isatty() else ""
            print(colour + text[self.shown :] + ("\033[0m" if colour else ""), end="", flush=True)
            self.shown = len(text)

    def __call__(self, row, tokens, accepted):
        start = time.perf_counter()
        for part, colour in ((tokens[:accepted], "\033[32m"), (tokens[accepted:], "")):
            if self.show and part:
                self.ids += part
                self._print(colour)
        self.seconds += time.perf_counter() - start


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def one_of(valid):
    """The type of an argument that is one of these names; where it is none, the nearest is named."""

    def name(text):
        text = text.strip().lower()
        if text not in valid:
            near = [f"did you mean {match!r}? " for match in difflib.get_close_matches(text, valid, 1)]
            raise argparse.ArgumentTypeError(f"unknown name {text!r}, {''.join(near)}expected one of {', '.join(valid)}")
        return text

    return name


@contextmanager
def _loading(what, name):
    """Whatever transformers and the Hub raise becomes a ValueError of one line."""
    try:
        yield
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        cause = "it needs code of its own, which is never run" if "trust_remote_code" in cause else cause
        raise ValueError(f"cannot load {what} from {name}: {cause:.300}") from error


def check_model(name):
    """A causal language model on the meta device, after all checks that need no weights in memory: only their headers are read.

    Raises ValueError, in one line: no such folder, an unreadable configuration or one that is no causal LM's, code of the
    model's own, weight files that are missing, cut short or outside of the folder, weights missing or of another shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_utils import load_state_dict

    if Path(name).is_file():
        raise ValueError(f"{name} is a file; give the folder that holds config.json and the weights")
    if not Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)):
        raise ValueError(f"no such folder: {name}")
    with _loading("a causal language model", name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        kinds = ", ".join(config.architectures or ["LMHeadModel"])
        if not re.search("ForCausalLM|LMHeadModel|ForConditionalGeneration", kinds):
            raise ValueError(f"config.json says {kinds}, which is none")  # BERT would load, and see the future
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        stored = {}
        for file in _weight_files(name):
            with _loading("weights", Path(file).name):
                stored |= load_state_dict(file, map_location="meta")
        missing, prefix = dict(model.named_parameters()), f"{model.base_model_prefix}."
        for key in list(stored):  # a base model's file has no prefix
            match = next((k for k in (key, prefix + key, key.removeprefix(prefix)) if k in missing), None)
            if match and missing[match].shape != stored[key].shape:
                raise ValueError(f"{key} is {list(stored[key].shape)}, by config.json {list(missing[match].shape)}")
            if match:
                del stored[key], missing[match]
        # what is stored under another name may be what is missing: transformers renames some, and ties some
        if sum(t.numel() for t in missing.values()) > sum(t.numel() for t in stored.values() if t.is_floating_point()):
            raise ValueError(f"{len(missing)} weights are missing, the first is {next(iter(missing))}")
    return model


def _weight_files(name) -> list[str]:
    """The files that from_pretrained will read the weights from, downloaded where `name` is a Hub id.

    pytorch_model.bin, a pickle, only where there is no safetensors (Salesforce/codegen-350M-mono has none on its main branch):
    transformers reads it by torch.load(weights_only=True), which builds tensors and runs nothing.
    """
    from transformers.utils import cached_file

    for file in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        if path and file.endswith(".json"):
            shards = sorted(set(json.loads(Path(path).read_text())["weight_map"].values()))
            if outside := [shard for shard in shards if Path(shard).name != shard]:
                raise ValueError(f"{file} names a file outside of the folder, {outside[0]}")
            return [cached_file(name, shard) for shard in shards]
        if path:
            return [path]
    raise ValueError("there is no model.safetensors")


def load_tokenizer(name):
    """The tokenizer of a folder or Hub id. Raises ValueError, in one line, where there is none."""
    from transformers import AutoTokenizer

    with _loading("a tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if not set(tokenizer("Hello, world").input_ids) - set(tokenizer.all_special_ids):  # made of nothing by transformers
            raise ValueError("it has no tokens; is tokenizer.json missing?")
    return tokenizer


def _load(name, dtype, device):
    """A causal language model, its weights read once `check_model` has found nothing wrong."""
    from transformers import AutoModelForCausalLM

    with _loading("a causal language model", name):
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False).to(device).eval()


def load_pair(target, draft, dtype, device):
    """Target, draft and their tokenizer, all checked before the first is loaded. Raises ValueError, in one line."""
    for name in (target, draft):
        check_model(name)
    tokenizer = load_tokenizer(target)
    check_tokenizers(tokenizer, load_tokenizer(draft))
    return _load(target, dtype, device), _load(draft, dtype, device), tokenizer


def check_tokenizers(target_tokenizer, draft_tokenizer) -> None:
    """ValueError naming the first token that differs: a draft's token ids must mean the same to the target."""
    both = [each.convert_ids_to_tokens(list(range(len(each)))) for each in (target_tokenizer, draft_tokenizer)]
    for index, (a, b) in enumerate(itertools.zip_longest(*both)):
        if a != b:
            raise ValueError(f"the tokenizers differ: token {index} is {a!r} in the target's, {b!r} in the draft's")


def _read_prompts(args):
    if args.prompt is not None:
        return [args.prompt]
    prompts = []
    for number, line in enumerate(Path(args.prompts).read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                prompts.append(json.loads(line.decode("utf-8-sig"))["prompt"])
                prompts[-1].encode()  # text, and such as a tokenizer takes
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f'{args.prompts}, line {number}: not a JSON object with a text as "prompt"') from error
    if not prompts:
        raise ValueError(f"{args.prompts}: no prompts")
    return prompts


def _decode_prompts(args):
    """The command line's work: a dictionary of the settings, the counts and the rates."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    lossy = {"lenience": args.lenience, "lenience_fn": args.lenience_fn, "gamma": args.gamma}
    _check_arguments(max_new_tokens=args.max_new_tokens, seed=args.seed, **sampling, **lossy)
    prompts = _read_prompts(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    target, draft, tokenizer = load_pair(args.target, args.draft, dtype, device)
    inputs = [torch.tensor([tokenizer(prompt).input_ids], dtype=torch.long, device=device) for prompt in prompts]
    for ids in inputs:
        _check_prompt((target, draft), ids, None, args.max_new_tokens)

    eos = target.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    common = {"eos_token_id": eos, "vocab_size": len(tokenizer), **sampling}
    speculative_generate(target, draft, inputs[0], max_new_tokens=8, **common, **lossy)  # warm up
    autoregressive_generate(target, inputs[0], max_new_tokens=8, **common)
    per_prompt, texts, seconds, baseline_tokens, baseline_seconds = [], [], 0.0, 0, 0.0
    for ids in inputs:
        generator = torch.Generator(device).manual_seed(args.seed)
        stream = _Stream(tokenizer, ids[0].tolist(), show=not args.json)
        start = time.perf_counter()
        out = speculative_generate(target, draft, ids, max_new_tokens=args.max_new_tokens, generator=generator,
                                   on_tokens=stream, **common, **lossy)  # fmt: skip
        seconds += time.perf_counter() - start - stream.seconds
        stream._print("", last=True)
        print(end="" if args.json else "\n\n")
        generator.manual_seed(args.seed)
        start = time.perf_counter()
        plain = autoregressive_generate(target, ids, max_new_tokens=args.max_new_tokens, generator=generator, **common)
        baseline_seconds += time.perf_counter() - start
        baseline_tokens += plain.shape[1] - ids.shape[1]
        per_prompt.append(out.stats)
        texts.append(tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True))
    stats = sum(per_prompt, Stats())
    rate, baseline = stats.generated / seconds, baseline_tokens / baseline_seconds
    interval = bootstrap_interval([s.accepted for s in per_prompt], [s.accepted + s.rejected for s in per_prompt])
    rates = {name: getattr(stats, name) for name in ("alpha", "tau", "draft_acceptance")}
    rates |= {"tokens_per_second": rate, "target_tokens_per_second": baseline, "speedup": rate / baseline}
    return {**vars(args), "device": str(device), **asdict(stats), "alpha_interval": interval, **rates, "texts": texts}


def main(argv: list[str] | None = None) -> int:
    """Decode prompts from the command line; 0, or 2 after one line on stderr for what the user can mend."""
    parser = Parser(prog="speculative.py", description="Speculative decoding, with its statistics.")
    parser.add_argument("--target", required=True, help="folder or Hub id of the target")
    parser.add_argument("--draft", required=True, help="folder or Hub id of the draft")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt")
    source.add_argument("--prompts", help='JSON lines with a "prompt" each')
    parser.add_argument("--gamma", type=int, default=5, help="tokens drafted a round (default 5)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, help="0 = off")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 = off")
    parser.add_argument("--lenience", type=float, default=1.0, help="epsilon in (0, 1]; 1 = lossless (default)")
    parser.add_argument("--lenience-fn", type=one_of(LENIENCE), default="exp", help=f"one of {', '.join(LENIENCE)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", type=one_of(("float32", "bfloat16", "float16")), default="float32")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)
    try:
        result = _decode_prompts(args)
    except (ValueError, OSError) as error:
        print(f"speculative.py: error: {error}", file=sys.stderr)
        return 2
    if args.json:  # JSON has no NaN
        finite = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in result.items()}
        print(json.dumps(finite))
        return 0
    interval = ""
    if len(result["texts"]) > 1:
        interval = " (95% interval over prompts {:.3f} to {:.3f})".format(*result["alpha_interval"])
    print("alpha {alpha:.3f}{interval}, tau {tau:.2f}, {generated} tokens".format(interval=interval, **result))
    print("{tokens_per_second:.1f} tokens/s, the target alone {target_tokens_per_second:.1f}: speed-up {speedup:.2f}".format(
        **result))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
