"""Speculative sampling for any two Hugging Face causal language models that share a tokenizer.

A small draft model proposes `gamma` tokens, the target scores them all in one call, and a rejection
rule accepts only as many as leave the output distributed as the target's own (Leviathan et al.
2023, Algorithm 1; Chen et al. 2023). p is always the target's distribution, q the draft's. Works on
batches, counts what it does, needs torch and transformers' cache class: copy this file.

    out = speculative_generate(target, draft, input_ids, max_new_tokens=128, gamma=5)
    print(out.stats.alpha, out.stats.tau)  # acceptance rate, tokens per target call

    python speculative.py --target DIR_OR_HUB_ID --draft DIR_OR_HUB_ID --prompt "..."
"""

from __future__ import annotations

if __name__ == "__main__":
    import interrupt  # noqa: F401 -- Ctrl-C during the imports below is one line

import inspect
import json
import math
import os
import platform
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

# Lossy acceptance: a draft is tested with f(p, epsilon) in place of p (DistillSpec, section 5.3)
LENIENCE = {
    "lin": lambda p, epsilon: p / epsilon,
    "sq": lambda p, epsilon: p / epsilon**2,
    "exp": lambda p, epsilon: p**epsilon,
}
MIN_TEMPERATURE = 1e-30  # below it, logits / temperature overflow float32
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
# Where `pack_weights` gains: measured on an Intel and on an AMD CPU
PACKED_PRODUCTS = HAS_AVX512 and torch.backends.mkldnn.is_available()
LOGITS_PER_PASS = 2**26  # of one model, in expected_acceptance: 256 MB in float32, or one row's

# What decoding counts and returns


@dataclass
class Stats:
    """Counts of decoding, per row and summed: a target call that serves three unfinished rows
    counts three. Tokens after an end token count nowhere."""

    rounds: int = 0  # target calls that judged drafts; a row's last token may need a plain one
    drafted: int = 0  # drafts a row could use: at most gamma, and one less than its tokens to go
    accepted: int = 0
    rejected: int = 0  # at most one a round, the first that fails
    never_judged: int = 0  # the drafts after it
    target_calls: int = 0  # the prompt is scored in the same call as the first drafts
    generated: int = 0
    cut: int = 0  # target calls that ended on an accepted end token, without a token of their own
    per_position: tuple[list, list] = field(default_factory=lambda: ([], []))  # accepted, judged

    @property
    def alpha(self) -> float:
        """Acceptance rate, accepted / judged (AdaSPEC Eq. 3)."""
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
        """(1 - alpha^(gamma+1)) / (1 - alpha), AdaSPEC Eq. 4, which takes acceptance as i.i.d.:
        for comparison only."""
        if self.alpha == 1:
            return gamma + 1.0
        return (1 - self.alpha ** (gamma + 1)) / (1 - self.alpha)

    def record(self, usable: int, accepted: int, new: list[int]) -> None:
        """Count a round: `accepted` of `usable` drafts passed; `new` tokens, none after an end
        token, came out."""
        if len(new) <= accepted:  # an accepted draft was the end token
            usable = accepted = len(new)
            self.cut += 1
        rejected = int(accepted < usable)
        self.rounds += int(usable > 0)
        self.drafted += usable
        self.accepted += accepted
        self.rejected += rejected
        self.never_judged += max(0, usable - accepted - 1)
        self.target_calls += 1
        self.generated += len(new)
        if usable:  # else nothing, at every token that a model writes alone
            by_position = ([1] * accepted + [0] * rejected, [1] * (accepted + rejected))
            self.per_position = _add_lists(self.per_position, by_position)

    def check(self) -> None:
        """Raises AssertionError unless the counts, each of them counted on its own, add up."""
        judged = self.accepted + self.rejected
        own_tokens = self.target_calls - self.cut
        assert math.isclose(judged + self.never_judged, self.drafted, abs_tol=1e-6), self
        assert math.isclose(self.accepted + own_tokens, self.generated, abs_tol=1e-6), self
        for total, by_position in zip((self.accepted, judged), self.per_position, strict=True):
            assert math.isclose(total, sum(by_position), abs_tol=1e-6), self

    def __add__(self, other: Stats) -> Stats:
        names = [f.name for f in fields(self) if f.name != "per_position"]
        totals = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Stats(**totals, per_position=_add_lists(self.per_position, other.per_position))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _add_lists(a: tuple[list, list], b: tuple[list, list]) -> tuple[list, list]:
    pairs = [zip_longest(x, y, fillvalue=0) for x, y in zip(a, b, strict=True)]
    return tuple([x + y for x, y in pair] for pair in pairs)


class SpeculativeOutput(NamedTuple):
    sequences: torch.Tensor  # [B, <= T + max_new_tokens]: input_ids, new tokens, right padding
    stats: Stats  # summed over rows
    row_stats: list[Stats]


# Distributions and the rule of acceptance


def distribution(logits, temperature: float, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Logits [..., V] to float32 probabilities: temperature, then top-k (0 = off), then top-p
    (1 = off), in transformers' order."""
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if top_p < 1:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False  # the likeliest token stays, whatever top_p is
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)
    return logits.softmax(-1)


def draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Tokens [B, 1] from weights [B, V] of any positive sum and uniforms [B, 1] in [0, 1), where
    the cumulative sum passes them. On a CPU 20 times faster than torch.multinomial at V = 50,000.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    # right=True: a token of weight 0 is never drawn
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The argmax [...] of logits [..., V], the first of equals: by `max`, which is several times as
    fast in bfloat16 on a CPU."""
    return logits.max(-1).indices


def verify(p, q, drafts, usable, uniforms, relax=None):
    """How many drafts each row accepts, [B], and the target's own token after them, [B, 1].

    p [B, g+1, V]; q, a list of g distributions [B, V]; drafts [B, g], each drawn from its q;
    usable [B]: how many of them a row can use; uniforms [B, g+1]; relax: f of lossy acceptance, or
    None.
    """
    g = drafts.shape[1]
    if g == 0:
        return usable, draw(p[:, 0], uniforms)
    q = torch.stack(q, 1)
    p_draft = p[:, :g].gather(2, drafts[..., None])[..., 0]
    q_draft = q.gather(2, drafts[..., None])[..., 0]
    if relax is not None:
        p_draft = relax(p_draft)
    passed = uniforms[:, :g] * q_draft < p_draft  # u < p / q without a division
    accepted = torch.minimum(passed.cumprod(1).sum(1), usable)
    # The own token comes from norm(max(p - q, 0)) after a rejection, else from p.
    row = torch.arange(len(drafts), device=drafts.device)
    p = p[row, accepted]
    q = q[row, accepted.clamp(max=g - 1)] * (accepted < usable)[:, None]
    residual = (p - q).clamp_(min=0)
    # p == q to the last bit leaves no residual, and yet rounding may have rejected
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
    return accepted, draw(residual, uniforms[:, g:])


def verify_greedy(logits, drafts, usable, relax=None):
    """`verify` at temperature 0, from the target's logits [B, g+1, V]: a draft passes if it is the
    target's argmax, or by lossy acceptance."""
    g = drafts.shape[1]
    greedy = likeliest(logits)
    if g == 0:
        return usable, greedy
    passed = drafts == greedy[:, :g]
    if relax is not None:
        p = logits[:, :g].float().softmax(-1)
        passed |= relax(p.gather(2, drafts[..., None])[..., 0]) > p.amax(-1)
    accepted = torch.minimum(passed.cumprod(1).sum(1), usable)
    return accepted, greedy.gather(1, accepted[:, None])


# Models and their caches


class Lane:
    """A model and its cache, whose valid slots hold, for every row, a prefix of its text in order.

    `forward` appends the same number of slots to every row, `rollback` takes from every row its own
    number of tokens. What all rows give up is cropped. What only some give up stays behind as
    holes, slots that the attention mask hides for good; positions count valid slots, so that a hole
    shifts nothing. When slots exceed twice the longest row, the cache is compacted by a gather,
    which costs about as much as the torch.cat that DynamicCache does at every forward. One row
    alone has no holes: no mask, no position_ids, no gather.

    A draft that is no causal language model, such as an EAGLE head (extras/eagle.py), has

        lanes(target, input_ids, mask, vocab_size, last_position) -> (the target's lane, its own)
        tree_lanes(target, input_ids, vocab_size)  # the same, for extras/tree.py
        extra_inputs(target, input_ids) -> dict  # its forward's further arguments, of a whole text
        get_output_embeddings()  # as transformers' models have

    Its lanes are subclasses of Lane that hand on hidden states in `call` and `advance`, and are not
    `ready` as long as the draft must wait for a first, plain target call.
    """

    ready = True  # whether it can draft

    def __init__(self, model, input_ids, mask=None, vocab_size=None, last_position=None):
        """input_ids [B, T]: the prompts. mask [B, T], bool: False on left padding; None = none is.
        vocab_size: logits are cut to it. last_position: the last one that a row's text can reach.
        Raises ValueError for a model that cannot be rolled back, or not in a batch."""
        from transformers import DynamicCache  # all that the sampler needs of transformers

        name = type(model).__name__
        self.cache = DynamicCache(config=model.config)
        if any(self.cache.is_sliding) or not self.cache.is_croppable:
            raise ValueError(f"{name}: every layer must have full attention, to be rolled back")
        if (len(input_ids) > 1 or mask is not None) and not takes_positions(model):
            raise ValueError(f"{name} takes no position_ids: decode single prompts, unpadded")
        self.model = model
        self.device = input_ids.device
        self.vocab_size = vocab_size
        self.last_position = last_position
        self.mask = mask  # [B, slots], None while all slots of all rows are valid
        self.lengths = [0] * len(input_ids)  # valid tokens of each row
        if mask is not None:  # minus the padding, which `forward` counts with the prompt
            self.lengths = (mask.sum(1) - input_ids.shape[1]).tolist()

    def forward(self, tokens: torch.Tensor, keep: int = 1) -> torch.Tensor:
        """Feed each row its next n tokens, [B, n]; logits [B, keep, V] at the last `keep`."""
        n = tokens.shape[1]
        self.lengths = [length + n for length in self.lengths]
        inputs = {}
        if self.mask is not None:
            slots = self.cache.get_seq_length() + n
            self.mask = F.pad(self.mask, (0, slots - self.mask.shape[1]), value=True)
            positions = self.mask.cumsum(1)[:, -n:] - 1
            # Clamped, since a row near its end is fed drafts that only other rows can use
            positions.clamp_(0, self.last_position)
            inputs = {"attention_mask": self.mask, "position_ids": positions}
        return self.call(tokens, keep, **inputs)[:, -keep:, : self.vocab_size]

    def call(self, tokens: torch.Tensor, keep: int, **inputs) -> torch.Tensor:
        """The model's logits [B, >= keep, >= V]."""
        inputs |= {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": keep}
        return self.model(tokens, **inputs).logits

    def advance(self, texts: list[list[int]], lag: int, rows: list[int]) -> torch.Tensor:
        """After a round: `rows` go on, with these texts. Keeps all but the last `lag` tokens of
        each, and returns those, [B, lag], to be fed next."""
        self.rollback([len(text) - lag for text in texts], rows)
        return torch.tensor([text[-lag:] for text in texts], device=self.device)

    def rollback(self, lengths: list[int], rows: list[int] | None = None) -> None:
        """Keep `rows` only (None: all), and of each its first lengths[b] tokens."""
        if rows is not None and len(rows) < len(self.lengths):
            index = torch.tensor(rows, device=self.device)
            self.cache.batch_select_indices(index)
            self.mask = None if self.mask is None else self.mask[index]
            self.lengths = [self.lengths[row] for row in rows]
        excess = [old - new for old, new in zip(self.lengths, lengths, strict=True)]
        self.lengths = lengths
        common = min(excess)
        if common > 0:
            self.cache.crop(-common)
            self.mask = None if self.mask is None else self.mask[:, :-common]
        slots = self.cache.get_seq_length()
        if max(excess) > common:  # some rows give up more than others: holes
            ends = slots + common - torch.tensor(excess, device=self.device)[:, None]
            valid = torch.arange(slots, device=self.device) < ends
            self.mask = valid if self.mask is None else self.mask & valid
        if self.mask is not None and slots > max(lengths) * (1 if len(lengths) == 1 else 2):
            self._compact()

    def _compact(self) -> None:
        """Move every row's valid slots to the end, and drop the slots that no row needs."""
        longest = max(self.lengths)
        order = self.mask.int().argsort(dim=1, stable=True)[:, -longest:]
        for layer in self.cache.layers:
            layer.keys = layer.keys.take_along_dim(order[:, None, :, None], 2)
            layer.values = layer.values.take_along_dim(order[:, None, :, None], 2)
        all_valid = min(self.lengths) == longest
        self.mask = None if all_valid else self.mask.take_along_dim(order, 1)


def takes_positions(model) -> bool:
    """Whether position_ids decide where a token stands. ALiBi counts cache slots instead."""
    has_argument = "position_ids" in inspect.signature(model.forward).parameters
    return has_argument and not getattr(model.config, "alibi", False)


def make_lanes(target, draft, *prompt) -> tuple[Lane, Lane | None]:
    """The lanes of target and draft; `prompt` is what a Lane takes beside its model."""
    if hasattr(draft, "lanes"):
        return draft.lanes(target, *prompt)
    return make_lane(target, *prompt), None if draft is None else make_lane(draft, *prompt)


def make_lane(model, *prompt) -> Lane:
    """A model's own kind of lane, where it has one (extras/static.py)."""
    return model.lane(*prompt) if hasattr(model, "lane") else Lane(model, *prompt)


@contextmanager
def inference(*models):
    """Inference mode (a tenth faster than no_grad on small models) and evaluation mode, and thin
    products where they are faster; all is put back.

    Tensors made inside must not leave as they are: autograd refuses them later. The rotary tables
    that a model grows inside may stay, since training only reads them.
    """
    modules = {module for model in models for module in model.modules()}
    training = [module for module in modules if module.training]
    # a set, since an EAGLE head shares its target's output head
    products = {product for model in models for product in linear_products(model)}
    thin = [(layer, method) for layer, method in products if has_thin_products(layer)]
    for module in training:
        module.training = False
    for layer, method in thin:
        # a method, no partial: torch.compile knows it again at the next decoding
        setattr(layer, method, MethodType(thin_linear, layer))
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
        for layer, method in thin:
            delattr(layer, method)


@contextmanager
def grouped_attention(input_ids):
    """For one row on a CPU: attention reads keys that heads share where they are. transformers
    copies them for every head where there is a mask, and so for every block of drafts. (In batches
    steps of one token would take longer.) The switch is the process's: with threads that decode at
    once it may be on or off for all of them, which changes rounding and speed alone."""
    variable = "TRANSFORMERS_SDPA_FORCE_GQA"  # a user's own setting stays
    gains = len(input_ids) == 1 and input_ids.device.type == "cpu" and variable not in os.environ
    if gains:
        os.environ[variable] = "1"
    try:
        yield
    finally:
        if gains:
            os.environ.pop(variable, None)


def linear_products(model) -> list[tuple[torch.nn.Module, str]]:
    """Where a causal LM forms hidden @ weight.T: the layer, and its method that does this alone.
    Not where a hook, `pack_weights` or a surrounding `inference` has replaced the method."""
    products = []
    for module in {*model.modules(), model.get_output_embeddings()}:
        # a short head's forward does more than the product
        method = "forward" if type(module) is torch.nn.Linear else "kept_logits"
        if hasattr(module, method) and method not in vars(module):
            products.append((module, method))
    return products


def on_amd_cpu() -> bool:
    try:
        description = Path("/proc/cpuinfo").read_text()
    except OSError:  # not on Linux
        description = platform.processor()
    return "AuthenticAMD" in description


# Where `thin_linear` gains: measured on two AMD CPUs, with AVX2 and with AVX-512; on an Intel one
# it takes twice as long as the layer itself (docs/decoding.md)
THIN_PRODUCTS = on_amd_cpu() and torch.backends.mkl.is_available()
FEWEST_THIN_ROWS = 1 if HAS_AVX512 else 2
MOST_THIN_ROWS = 8


def has_thin_products(layer) -> bool:
    """Whether `thin_linear` is faster than the layer: a large matrix in float32 on a CPU that
    gains."""
    weight = layer.weight
    kind = (weight.device.type, weight.dtype)
    return THIN_PRODUCTS and kind == ("cpu", torch.float32) and weight.numel() > 2**17


def thin_linear(layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """hidden @ weight.T + bias of a layer, where hidden [..., d] has few rows as W @ x.T: so MKL on
    an AMD CPU reads the weights once, where x @ W.T takes up to twice as long for 2 to 8 rows.

    Three and seven rows get a row of zeros, since four and eight go faster; so does one row where
    there is AVX-512."""
    rows = hidden.numel() // hidden.shape[-1]
    if not FEWEST_THIN_ROWS <= rows <= MOST_THIN_ROWS:
        return F.linear(hidden, layer.weight, layer.bias)
    added = 1 if rows in (1, 3, 7) else 0
    states = F.pad(hidden.reshape(rows, -1), (0, 0, 0, added))
    output = (layer.weight @ states.t()).t()[:rows].contiguous()
    if layer.bias is not None:
        output += layer.bias
    return output.view(*hidden.shape[:-1], -1)


def pack_weights(model: torch.nn.Module) -> None:
    """Give the linear layers of a causal LM a second copy of their weights, in the order in which
    oneDNN reads them; without it PyTorch reorders them at every call. Only in bfloat16 on a CPU
    with AVX-512, where decoding is faster for it.

    From here on the layers use these copies: the model is there to decode with, not to be trained,
    changed, moved, copied or compiled. The two operators are those that torch.compile uses for
    frozen weights; they are not public.
    """
    if not PACKED_PRODUCTS:
        return
    for layer, method in linear_products(model):
        weight = layer.weight.detach()
        if (weight.device.type, weight.dtype) == ("cpu", torch.bfloat16):
            layer.packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
            setattr(layer, method, MethodType(packed_linear, layer))


def packed_linear(layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """hidden @ weight.T + bias, of a layer that `pack_weights` has given its second copy."""
    product = torch.ops.mkldnn._linear_pointwise
    return product(hidden, layer.packed_weight, layer.bias, "none", [], "")


# Arguments


def check_sampling(
    *, gamma=1, max_new_tokens=1, temperature=0.0, top_k=0, top_p=1.0, lenience=1.0,
    lenience_fn="exp", seed=0,
) -> None:  # fmt: skip
    """Raises ValueError, in one line, for a setting that has no meaning."""
    safe = temperature == 0 or temperature >= MIN_TEMPERATURE
    for name, value, valid, expected in (
        ("gamma", gamma, gamma >= 1, "at least 1"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "finite and at least 0"),
        ("temperature", temperature, safe, f"0 (greedy) or at least {MIN_TEMPERATURE}"),
        ("top_k", top_k, 0 <= top_k < math.inf, "finite and at least 0"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
        ("lenience", lenience, 0 < lenience <= 1, "in (0, 1]"),
        ("lenience_fn", lenience_fn, lenience_fn in LENIENCE, f"one of {', '.join(LENIENCE)}"),
        ("seed", seed, 0 <= seed < 2**63, "at least 0 and below 2**63"),
    ):
        if not valid:
            raise ValueError(f"{name} must be {expected}, got {value!r}")


def row_limits(max_new_tokens: int | list[int], rows: int) -> list[int]:
    """max_new_tokens of each row. Raises ValueError for a list of another length."""
    if not isinstance(max_new_tokens, list):
        return [max_new_tokens] * rows
    if len(max_new_tokens) != rows:
        raise ValueError(f"max_new_tokens has {len(max_new_tokens)} limits for {rows} rows")
    return max_new_tokens


def check_prompt(models, input_ids, attention_mask, max_new_tokens) -> torch.Tensor | None:
    """The mask as bool [B, T], or None when nothing is padded. Raises ValueError for no tokens,
    padding elsewhere than on the left, a row too long for the models' context."""
    if input_ids.ndim != 2 or not input_ids.numel():
        shape = list(input_ids.shape)
        raise ValueError(f"empty prompt: input_ids must be [B, T] with B, T > 0, got {shape}")
    mask = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
    if mask.shape != input_ids.shape or not mask[:, -1].all() or (mask[:, :-1] > mask[:, 1:]).any():
        allowed = "left padding only: no holes, no right padding"
        raise ValueError(f"attention_mask must be [B, T] and mark {allowed}")
    context = min(getattr(model.config, "max_position_embeddings", math.inf) for model in models)
    limits = row_limits(max_new_tokens, len(input_ids))
    for length, limit in zip(mask.sum(1).tolist(), limits, strict=True):
        if length + limit > context:
            row = f"prompt of {length} tokens + max_new_tokens {limit}"
            raise ValueError(f"{row} > context of {context} tokens")
    return None if mask.all() else mask


def shared_vocabulary(models, vocab_size: int | None) -> int:
    """How many logits all heads have (they are padded beyond the tokenizer by different amounts),
    or vocab_size. Raises ValueError where the smallest head has fewer."""
    smallest = min(model.config.vocab_size for model in models)
    if vocab_size is not None and not 1 <= vocab_size <= smallest:
        raise ValueError(f"vocab_size is {vocab_size}, but the smallest head has {smallest} rows")
    return vocab_size or smallest


def end_token_list(eos_token_id: int | list[int] | None) -> list[int]:
    """The end tokens as a list; empty = never stop early."""
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def left_pad(prompts: list[torch.Tensor], device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts, token ids [T_b] each, as a batch: input_ids and attention_mask, both [B, T]."""
    masks = [torch.ones_like(prompt) for prompt in prompts]
    ids, mask = (pad_sequence(rows, True, padding_side="left") for rows in (prompts, masks))
    return ids.to(device), mask.to(device)


def until_end(tokens, ends: list[int]):
    """The tokens, a list or a 1-D tensor, up to and with the first end token."""
    for i, token in enumerate(tokens.tolist() if torch.is_tensor(tokens) else tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens


# Decoding


@dataclass
class Row:
    """A row of the batch while it is decoded."""

    number: int
    prompt_length: int
    limit: int  # tokens that its text may have
    text: list[int]  # the prompt without padding, then what was generated
    stats: Stats = field(default_factory=Stats)
    finished: bool = False

    def extend(self, usable: int, accepted: int, tokens: list[int], ends: list[int]) -> list[int]:
        """Add the tokens of a round up to an end token, and count them; returns what was added."""
        new = until_end(tokens, ends)
        self.text += new
        self.stats.record(usable, accepted, new)
        self.finished = new[-1] in ends or len(self.text) == self.limit
        return new


def make_rows(input_ids, mask, limits: list[int]) -> list[Row]:
    """The rows of a batch before decoding."""
    lengths = [input_ids.shape[1]] * len(input_ids) if mask is None else mask.sum(1).tolist()
    rows = []
    for ids, length, limit in zip(input_ids.tolist(), lengths, limits, strict=True):
        rows.append(Row(len(rows), length, length + limit, ids[-length:]))
    return rows


def draft_tokens(lane, tokens, g: int, uniforms, sampling):
    """Draft g tokens [B, g], one after the other: `tokens` are fed first, what the lane's cache
    lacks. Returns also the g distributions q [B, V] that they were drawn from; none when greedy."""
    drafts = torch.empty(len(uniforms), 0, dtype=torch.long, device=uniforms.device)
    q = []
    for i in range(g):
        logits = lane.forward(tokens)[:, -1]
        if sampling[0] > 0:
            q.append(distribution(logits, *sampling))
            tokens = draw(q[-1], uniforms[:, i : i + 1])
        else:
            tokens = likeliest(logits)[:, None]
        drafts = torch.cat([drafts, tokens], 1)
    return drafts, q


def speculative_generate(
    target, draft, input_ids, attention_mask=None, *, max_new_tokens, gamma=5, temperature=0.0,
    top_k=0, top_p=1.0, lenience=1.0, lenience_fn="exp", eos_token_id=None, generator=None,
    vocab_size=None, pad_token_id=None, on_tokens=None,
) -> SpeculativeOutput:  # fmt: skip
    """Decode as the target would, several tokens a target call (Leviathan et al., Algorithm 1).

    Temperature 0 gives the target's greedy output token for token (in float32; in bfloat16 a
    near-tie may fall either way, since a block rounds differently from single steps). Above 0 the
    output has the target's distribution, whatever the draft is. Rows advance at their own pace,
    finished rows leave the batch, and each row's result is what it would be alone (above 0: in
    distribution).

    Args:
        target, draft: models with full attention and rotary or learned positions, on one device,
            with one tokenizer; run in evaluation mode and left as they were. draft=None: the
            target alone, one token a call. For other kinds of drafts see `Lane`.
        input_ids: [B, T]. attention_mask: [B, T], 0 on left padding.
        max_new_tokens: of every row, the end token included; or a list with one limit a row.
        gamma: tokens drafted a round.
        temperature, top_k, top_p: 0 = greedy, 0 = off, 1 = off; in that order, of both models.
        lenience: epsilon in (0, 1], 1 = lossless. Below 1 a draft d passes with probability
            min(1, f(p(d)) / q(d)), or at temperature 0 if it is the argmax or f(p(d)) > max p,
            with p at temperature 1.
        lenience_fn: f, "lin" p / epsilon, "sq" p / epsilon^2 or "exp" p^epsilon (DistillSpec, 5.3).
        eos_token_id: int, list, or None = never stop early.
        generator: torch.Generator on the models' device, drawn from throughout. None: torch's own.
        vocab_size: logits of both models are cut to it; give len(tokenizer) where heads are
            padded. Default: the smaller head.
        pad_token_id: fills up rows that end early. Default: the first end token, else 0.
        on_tokens: called as on_tokens(row, tokens, accepted) after a row's round; the first
            `accepted` of the tokens were drafted.

    Raises:
        ValueError: a setting out of range, padding elsewhere than on the left, a prompt too long
            for the context, a model with sliding-window or recurrent layers.
    """
    models = (target,) if draft is None else (target, draft)
    limits = row_limits(max_new_tokens, len(input_ids))
    mask = check_prompt(models, input_ids, attention_mask, limits)
    check_sampling(
        gamma=gamma, max_new_tokens=min(limits), temperature=temperature, top_k=top_k, top_p=top_p,
        lenience=lenience, lenience_fn=lenience_fn,
    )  # fmt: skip
    vocab_size = shared_vocabulary(models, vocab_size)
    ends = end_token_list(eos_token_id)
    relax = None if lenience == 1 else partial(LENIENCE[lenience_fn], epsilon=lenience)
    sampling = (temperature, top_k, top_p)
    device = input_ids.device

    rows = make_rows(input_ids, mask, limits)
    active = rows  # the unfinished ones; every tensor below is [len(active), ...]
    last_position = max(row.limit for row in rows) - 1
    target_lane, draft_lane = make_lanes(target, draft, input_ids, mask, vocab_size, last_position)
    target_next = draft_next = input_ids  # what a cache lacks of the texts: at first the prompts
    with inference(*models), grouped_attention(input_ids):
        while active:
            # A row's last token is always the target's own: with r to go it can use r - 1 drafts.
            usable = [min(gamma, row.limit - len(row.text) - 1) for row in active]
            if draft is None or not draft_lane.ready:
                usable = [0] * len(active)
            g = max(usable)
            # Copied now: to a GPU that is busy, the copy would wait
            usable_drafts = torch.tensor(usable, device=device)
            # The round's draws: g drafts, g tests, 1 token of the target's own; none when greedy.
            draws = (len(active), 2 * g + 1 if temperature > 0 else 0)
            uniforms = torch.rand(draws, generator=generator, device=device, dtype=torch.float64)

            # Draft: x_1, ..., x_g, each from its q
            drafts, q = draft_tokens(draft_lane, draft_next, g, uniforms, sampling)

            # Score: p at every draft and after the last, in one target call
            logits = target_lane.forward(torch.cat([target_next, drafts], 1), keep=g + 1)

            # Verify: accept drafts up to the first that fails, and add a token of the target's own
            if temperature > 0:
                p = distribution(logits, *sampling)
                accepted, own_token = verify(p, q, drafts, usable_drafts, uniforms[:, g:], relax)
            else:
                accepted, own_token = verify_greedy(logits, drafts, usable_drafts, relax)
            # the round's one wait for the device (in a forward with a mask, transformers waits too)
            results = torch.cat([accepted[:, None], own_token, drafts], 1).tolist()
            for i, row in enumerate(active):
                count, last, *drafted = results[i]
                new = row.extend(usable[i], count, [*drafted[:count], last], ends)
                if on_tokens is not None:
                    on_tokens(row.number, new, min(count, len(new)))

            # Roll back: the caches keep what unfinished rows accepted, and nothing else
            survivors = [i for i, row in enumerate(active) if not row.finished]
            # The draft never read its own last token. Where that was accepted, its cache lacks two
            # tokens of the text; since all rows are fed alike, the others then give up one more.
            lag = 2 if any(results[i][0] == g for i in survivors) else 1
            active = [active[i] for i in survivors]
            texts = [row.text for row in active]
            if active:
                target_next = target_lane.advance(texts, 1, survivors)
            if active and draft is not None:
                draft_next = draft_lane.advance(texts, lag, survivors)

    if pad_token_id is None:
        pad_token_id = ends[0] if ends else 0
    return collect(rows, input_ids, pad_token_id)


def collect(rows: list[Row], input_ids, pad: int) -> SpeculativeOutput:
    """The finished rows as one output, padded on the right."""
    new = [torch.tensor(row.text[row.prompt_length :]) for row in rows]
    padded = pad_sequence(new, batch_first=True, padding_value=pad)
    stats = [row.stats for row in rows]
    for row_stats in stats:
        row_stats.check()
    sequences = torch.cat([input_ids, padded.to(input_ids)], 1)
    return SpeculativeOutput(sequences, sum(stats, Stats()), stats)


def autoregressive_generate(
    target, input_ids, attention_mask=None, *, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0,
    eos_token_id=None, generator=None, vocab_size=None, pad_token_id=None, on_tokens=None,
) -> torch.Tensor:  # fmt: skip
    """The same loop without a draft, one token a call: the baseline of every speed-up. Arguments
    and errors as above. Returns the sequences, [B, <= T + max_new_tokens]."""
    return speculative_generate(
        target, None, input_ids, attention_mask, max_new_tokens=max_new_tokens,
        temperature=temperature, top_k=top_k, top_p=top_p, eos_token_id=eos_token_id,
        generator=generator, vocab_size=vocab_size, pad_token_id=pad_token_id, on_tokens=on_tokens,
    ).sequences  # fmt: skip


# Acceptance without decoding


class Acceptance(NamedTuple):
    overlap: torch.Tensor  # [N] float32: sum_x min(p, q), the chance that a draft is accepted here
    agree: torch.Tensor  # [N] bool: p and q have the same argmax
    ratio: torch.Tensor  # [N] float32: min(1, q(x) / p(x)), that chance given the text's token x


def expected_acceptance(
    target, draft, input_ids, labels, temperature=1.0, *, top_k=0, top_p=1.0, vocab_size=None
) -> Acceptance:
    """Acceptance at every response token of a text, exactly, in one pass a model (Leviathan et al.
    2023, Theorem 3.5).

    input_ids [B, T], padded on the right (causal attention never looks there, so no mask); labels
    [B, T], -100 on prompt and padding. The token at t is predicted at t - 1: the shift is inside,
    and a label in column 0 does not count. The N response tokens come in row order. Temperature 0:
    overlap is agree, and ratio says whether the draft's argmax is the text's token. Raises
    ValueError for a setting out of range.
    """
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    vocab_size = shared_vocabulary((target, draft), vocab_size)
    responses = labels[:, 1:] != -100
    group = max(1, LOGITS_PER_PASS // (input_ids.shape[1] * vocab_size))  # rows a pass
    nothing = torch.empty(0, device=input_ids.device)
    parts = [Acceptance(nothing, nothing.bool(), nothing)]
    with inference(target, draft):
        for ids, response in zip(input_ids.split(group), responses.split(group), strict=True):
            columns = response.any(0).nonzero()[:, 0]  # where the heads must run
            if not len(columns):
                continue
            context = ids[:, : columns[-1] + 1]
            extra = draft.extra_inputs(target, context) if hasattr(draft, "extra_inputs") else {}
            p_logits = target(context, use_cache=False, logits_to_keep=columns).logits
            q_logits = draft(context, use_cache=False, logits_to_keep=columns, **extra).logits
            rows, places = response[:, columns].nonzero(as_tuple=True)
            for row, place in zip(rows.split(512), places.split(512), strict=True):
                logits = [each[row, place, :vocab_size] for each in (p_logits, q_logits)]
                tokens = ids[row, columns[place] + 1]
                parts.append(token_acceptance(*logits, tokens, temperature, top_k, top_p))
    return Acceptance(*(torch.cat(values) for values in zip(*parts, strict=True)))


def token_acceptance(p_logits, q_logits, tokens, temperature, top_k, top_p) -> Acceptance:
    """Acceptance where the models' logits [n, V] predict the tokens [n]."""
    greedy_draft = likeliest(q_logits)
    agree = greedy_draft == likeliest(p_logits)
    if temperature == 0:
        return Acceptance(agree.float(), agree, (greedy_draft == tokens).float())
    p = distribution(p_logits, temperature, top_k, top_p)
    q = distribution(q_logits, temperature, top_k, top_p)
    overlap = torch.minimum(p, q).sum(-1)
    p_token = p.gather(1, tokens[:, None])[:, 0]
    q_token = q.gather(1, tokens[:, None])[:, 0]
    ratio = torch.where(q_token < p_token, q_token / p_token, (q_token > 0).float())
    return Acceptance(overlap, agree, ratio)


class Simulated(NamedTuple):
    tau: float
    alpha: float
    stats: Stats  # expected counts, summed over rows
    row_stats: list[Stats]


def simulate_rounds(
    ratio, row_lengths: list[int], gamma: int, max_new_tokens: int | None = None
) -> Simulated:
    """The expected counts of speculative decoding along target-written texts, for any gamma.

    A token x comes out of a position with chance p(x), and as an accepted draft with chance
    min(p(x), q(x)); so given the text, each judged position accepts with chance min(1, q(x) / p(x))
    whatever happened before, and the sum over where rounds may start is exact. (overlap is that
    chance averaged over x: right for one position, wrong for a round, since which x came out also
    shapes what follows.) The mean over texts drawn from the target is the mean of decoding; at
    temperature 0 the counts are decoding's own.

    Args:
        ratio: [N] from `expected_acceptance`, on texts that the target wrote with the same
            temperature, top_k and top_p.
        row_lengths: response tokens a row, end token included; their sum is N.
        max_new_tokens: the limit the texts were written under. None: each ended on an end token.

    Raises:
        ValueError: gamma < 1, lengths that do not add up to N or exceed max_new_tokens.
    """
    check_sampling(gamma=gamma)
    lengths = torch.tensor(row_lengths, dtype=torch.long)
    limit = math.inf if max_new_tokens is None else max_new_tokens
    width = max(row_lengths, default=0)
    if sum(row_lengths) != len(ratio) or width > limit:
        raise ValueError("row_lengths must add up to len(ratio), none may exceed max_new_tokens")
    chance = torch.zeros(len(lengths), width + gamma + 1, dtype=torch.float64)
    chance[torch.arange(width + gamma + 1) < lengths[:, None]] = ratio.double().cpu()
    start = torch.zeros_like(chance)  # start[row, t]: the chance that a round starts at token t
    start[lengths > 0, 0] = 1
    rounds, never_judged, target_calls, cut = torch.zeros(4, len(lengths), dtype=torch.float64)
    accepted, judged = torch.zeros(2, gamma, len(lengths), dtype=torch.float64)
    for t in range(width):
        reached = start[:, t]
        usable = int(min(gamma, limit - t - 1))
        target_calls += reached
        rounds += reached * (usable > 0)
        for i in range(usable):
            # reached: the chance that the round judges its draft i, for the token t + i
            passed = reached * chance[:, t + i]
            judged[i] += reached
            accepted[i] += passed
            never_judged += (reached - passed) * (usable - i - 1)
            more = t + i + 1 < lengths
            start[:, t + i + 1] += (reached - passed) * more
            cut += passed * ~more
            reached = passed * more
        # all passed: token t + usable was the target's own
        start[:, t + usable + 1] += reached * (t + usable + 1 < lengths)
    counts = {"rounds": rounds, "never_judged": never_judged, "target_calls": target_calls}
    counts |= {"accepted": accepted.sum(0), "rejected": (judged - accepted).sum(0), "cut": cut}
    counts |= {"drafted": judged.sum(0) + never_judged, "generated": lengths}
    row_stats = []
    for row in range(len(lengths)):
        by_position = (accepted[:, row].tolist(), judged[:, row].tolist())
        row_counts = {name: count[row].item() for name, count in counts.items()}
        row_stats.append(Stats(**row_counts, per_position=by_position))
    stats = sum(row_stats, Stats())
    stats.check()
    return Simulated(stats.tau, stats.alpha, stats, row_stats)


# The command line


def parse_arguments(argv: list[str] | None):
    from cli import Parser, one_of

    parser = Parser(prog="speculative.py", description="Speculative decoding, with its statistics.")
    add = parser.add_argument
    add("--target", required=True, help="folder or Hub id of the target")
    add("--draft", required=True, help="folder or Hub id of the draft")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="the text to go on with")
    prompts.add_argument("--prompts", help='JSON lines with a "prompt" or "messages" each')
    add("--chat", action="store_true", help="put texts through the target's chat template")
    add("--gamma", type=int, default=5, help="tokens drafted a round")
    add("--max-new-tokens", type=int, default=128, help="tokens written at most, for each prompt")
    add("--temperature", type=float, default=0.0, help="0 = greedy")
    add("--top-k", type=int, default=0, help="draw from the likeliest k tokens, 0 = from all")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest that reach p, 1 = all")
    add("--lenience", type=float, default=1.0, help="epsilon of lossy acceptance, 1 = lossless")
    add("--lenience-fn", type=one_of(LENIENCE), default="exp", help=f"of {', '.join(LENIENCE)}")
    add("--seed", type=int, default=0, help="of the draws, the same for each prompt")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", type=one_of(dtypes), default="float32", help=f"of {', '.join(dtypes)}")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    return parser.parse_args(argv)


def timed(generate, *inputs, **settings):
    """What `generate` returns, and the seconds it took."""
    start = time.perf_counter()
    output = generate(*inputs, **settings)
    return output, time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    """Decode prompts: prints each text, then alpha, tau and the speed-up over the target alone.
    Raises ValueError or OSError, in one line, for what a user can mend."""
    args = parse_arguments(argv)
    import transformers

    from cli import printable
    from data import read_prompts
    from models import end_tokens, ignored_settings, load_pair
    from own_rows import prompt_tokens

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    sampling = {name: getattr(args, name) for name in names}
    drafting = {name: getattr(args, name) for name in ("gamma", "lenience", "lenience_fn")}
    check_sampling(seed=args.seed, **sampling, **drafting)
    prompts = read_prompts(args.prompts) if args.prompt is None else [args.prompt]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    target, draft, tokenizer = load_pair(args.target, args.draft, dtype, device)
    pack_weights(target)
    pack_weights(draft)
    is_chat = args.chat or any(isinstance(prompt, list) for prompt in prompts)
    tokens = [prompt_tokens(prompt, tokenizer, args.chat) for prompt in prompts]
    inputs = [torch.tensor([ids], device=device).long() for ids in tokens]
    for ids in inputs:
        check_prompt((target, draft), ids, None, args.max_new_tokens)
    ignored = ignored_settings(args.target, args.draft)
    if ignored and not args.json:
        print(f"{ignored} (--temperature, --top-k and --top-p decide)\n")
    ends = end_tokens(target, tokenizer, is_chat)
    sampling |= {"eos_token_id": ends, "vocab_size": len(tokenizer)}

    short = sampling | {"max_new_tokens": min(8, args.max_new_tokens)}
    speculative_generate(target, draft, inputs[0], **short, **drafting)  # warms both models up
    stats = Stats()
    responses = []
    seconds = target_seconds = target_tokens = 0
    for ids in inputs:
        sampling["generator"] = torch.Generator(device).manual_seed(args.seed)
        output, duration = timed(speculative_generate, target, draft, ids, **sampling, **drafting)
        stats += output.stats
        seconds += duration
        sampling["generator"].manual_seed(args.seed)
        sequences, duration = timed(autoregressive_generate, target, ids, **sampling)
        target_tokens += sequences.shape[1] - ids.shape[1]
        target_seconds += duration
        response = output.sequences[0, ids.shape[1] :]
        responses.append(tokenizer.decode(response, skip_special_tokens=True))
        if not args.json:
            text = response if is_chat else output.sequences[0]
            print(printable(tokenizer.decode(text, skip_special_tokens=True)) + "\n")

    rate = stats.generated / seconds
    target_rate = target_tokens / target_seconds
    speedup = rate / target_rate
    if args.json:
        rates = {"alpha": stats.alpha, "tau": stats.tau, "draft_acceptance": stats.draft_acceptance}
        rates = {name: None if math.isnan(value) else value for name, value in rates.items()}
        rates |= {"tokens_per_second": rate, "target_tokens_per_second": target_rate}
        result = {**vars(args), "device": str(device), **asdict(stats), **rates}
        result["ignored_settings"] = ignored
        print(json.dumps({**result, "speedup": speedup, "texts": responses}))
    else:
        speeds = f"{rate:.1f} tokens/s, the target alone {target_rate:.1f}: speed-up {speedup:.2f}"
        print(f"alpha {stats.alpha:.3f}, tau {stats.tau:.2f}, {stats.generated} tokens\n{speeds}")


if __name__ == "__main__":
    from cli import run_command

    run_command(main, "speculative.py")
