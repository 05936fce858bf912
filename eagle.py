"""EAGLE-1 (Li et al. 2024, arXiv 2401.15077) for any Hugging Face decoder, trained uniformly or on AdaSPEC's selected tokens.

The draft is a head on the target: token x_s and the state h_{s-1} that the target predicted it from go through one linear
layer and one decoder layer of the target's own kind, which guesses h_s; the target's output head turns the guess into the
distribution of x_{s+1}. Next round's guesses start from the target's true states again.

    head = Eagle.from_pretrained("runs/tiny-eagle/gsm8k/seed0/eagle-adaspec", target)
    out = speculative_generate(target, head, input_ids, max_new_tokens=128)       # or tree_generate, expected_acceptance

As in the official code, the layer has no norm at its input, no norm follows it, the states are those after the target's final
norm, and noise is added to them in training. Unlike there, a state is placed beside the token it predicted and the first token,
which has none before it, gets zeros instead of no place: so the head's positions and cache are those of any draft.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

import train
from adaspec import select_tokens, token_kl
from data import Example
from speculative import _Lane, _takes_positions
from tree import _TreeLane

__all__ = ["Eagle", "TargetStates", "eagle_objective", "training_accuracy"]

STATE_WEIGHT, TOKEN_WEIGHT = 1.0, 0.1  # of the two losses: the official code's
INPUT_NORMS = "input_layernorm", "ln_1"  # what architectures call the norm at a layer's input
FITS = "model_type", "hidden_size", "vocab_size", "num_attention_heads"  # what a head and its target must have in common


def before(states: Tensor) -> Tensor:
    """The target's states [B, T, d] at every token, moved to the token after it: zeros, then states[:, :-1]."""
    return F.pad(states, (0, 0, 1, -1))


class Eagle(nn.Module):
    """The head. Its own are the fusing linear layer and the decoder layer; the target's embedding and output head are used,
    frozen from here on, and neither trained nor saved with it.

    `noise` is half the width of the uniform noise on the states in training. Raises ValueError for a target that takes no
    position_ids.
    """

    def __init__(self, target: nn.Module, noise: float = 0.1):
        super().__init__()
        if not _takes_positions(target):
            raise ValueError(f"{type(target).__name__} takes no position_ids; an EAGLE head needs a target that does")
        self.config, self.noise, self.teacher = copy.deepcopy(target.config), noise, None
        self.config.num_hidden_layers = 1
        if getattr(self.config, "layer_types", None):
            self.config.layer_types = self.config.layer_types[-1:]
        self.frozen = target.get_input_embeddings(), target.get_output_embeddings()  # in a tuple they are no submodules
        for module in self.frozen:
            module.requires_grad_(False)
        width = self.config.hidden_size
        self.fuse = nn.Linear(self.frozen[0].embedding_dim + width, width)
        self.trunk = type(target.base_model)(self.config)  # brings positions and masks with it
        self.trunk.set_input_embeddings(None)
        stack = next(m for m in self.trunk.modules() if any(isinstance(child, nn.ModuleList) for child in m.children()))
        layer = next(child for child in stack.children() if isinstance(child, nn.ModuleList))[0]
        ends = [(stack, name) for name, child in stack.named_children() if "norm" in type(child).__name__.lower()]
        for module, name in [*ends, *((layer, name) for name in INPUT_NORMS if hasattr(layer, name))]:
            setattr(module, name, nn.Identity())

    def get_output_embeddings(self) -> nn.Module:
        return self.frozen[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.fuse.weight.dtype

    def hidden(self, input_ids: Tensor, states: Tensor, **inputs) -> Tensor:
        """The guesses [B, T, d] of the target's state at tokens [B, T], from its states before them [B, T, d]."""
        if self.training and self.noise:
            states = states + self.noise * (2 * torch.rand_like(states) - 1)
        tokens = self.frozen[0](input_ids)
        return self.trunk(inputs_embeds=self.fuse(torch.cat([tokens, states.to(tokens)], -1)), **inputs).last_hidden_state

    def forward(self, input_ids, states, *, position_ids=None, logits_to_keep=0, **inputs) -> CausalLMOutputWithPast:
        """Logits of the next tokens as a causal LM gives them, and in `hidden_states` the guesses they were made from."""
        hidden = self.hidden(input_ids, states, position_ids=position_ids, **inputs)
        hidden = hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        return CausalLMOutputWithPast(logits=self.frozen[1](hidden), hidden_states=(hidden,))

    # Training and evaluation

    def response_states(self, batch: train.Batch) -> Tensor:
        """What train.py asks for: the guesses [N, d] where they predict response tokens, from the states of `self.teacher`."""
        hidden = self.hidden(batch.input_ids, before(self.teacher.whole(batch)), use_cache=False)
        return hidden.flatten(0, 1).index_select(0, batch.index)

    def given(self, target: nn.Module, input_ids: Tensor) -> dict:
        """What `expected_acceptance` is to pass along with the tokens."""
        return {"states": before(target.base_model(input_ids=input_ids, use_cache=False).last_hidden_state)}

    # Decoding, see speculative.py and tree.py

    def lanes(self, target, input_ids, mask, vocab_size, last_position) -> tuple[_Lane, _Lane]:
        target_lane = _TargetLane(target, input_ids, mask, vocab_size, last_position)
        return target_lane, _HeadLane(self, target_lane, input_ids, None, vocab_size, last_position)

    def tree_lanes(self, target, input_ids, vocab_size) -> tuple[_TreeLane, _TreeLane]:
        target_lane = _TargetTreeLane(target, input_ids, vocab_size)
        return target_lane, _HeadTreeLane(self, target_lane, input_ids, vocab_size)

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write eagle.safetensors and eagle.json into a folder, which is made where there is none."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, Path(folder, "eagle.safetensors"))
        about = {"noise": self.noise, **{name: getattr(self.config, name) for name in FITS}}
        Path(folder, "eagle.json").write_text(json.dumps(about, indent=1))

    @classmethod
    def from_pretrained(cls, folder: str | Path, target: nn.Module) -> "Eagle":
        """The head that `save_pretrained` wrote, on this target, in its dtype and on its device, in evaluation mode.

        Raises ValueError where the folder holds no head, a damaged one or one of another kind of target.
        """
        own = {name: getattr(target.config, name) for name in FITS}
        try:
            about, weights = json.loads(Path(folder, "eagle.json").read_text()), load_file(Path(folder, "eagle.safetensors"))
            kind, noise = {name: about[name] for name in FITS}, about["noise"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no EAGLE head ({error}); give one that Eagle.save_pretrained wrote") from error
        if own != kind:
            raise ValueError(f"the EAGLE head in {folder} was made for a target with {kind}, this one has {own}")
        head = cls(target, noise)
        try:
            head.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"the EAGLE head in {folder} does not fit {type(target).__name__}: {error}") from error
        weight = head.frozen[0].weight
        return head.to(device=weight.device, dtype=weight.dtype).eval()


# Training: in train.py's loop, from the teacher cache


class TargetStates:
    """A frozen target's states at all tokens of a batch's rows, prompts included; asked as `train.Frozen` is.

    `teacher` is a `train.Frozen` whose cache, if it has one, is of `self.examples`: the same rows, all of whose tokens count
    as response, since the head reads the states of the prompt too.
    """

    def __init__(self, teacher: train.Frozen, examples: Sequence[Example]):
        self.teacher, self.head, self.examples, self.last = teacher, teacher.head, everything(examples), (None, None)

    def whole(self, batch: train.Batch) -> Tensor:
        """[B, T, d]; zeros at a row's last token, which predicts nothing, and on padding."""
        if self.last[0] is not batch:  # head and objective ask for the same one
            rows = train.make_batch(self.examples, batch.rows, batch.input_ids.device)
            states = self.teacher.hidden(rows)
            dense = states.new_zeros(batch.input_ids.numel(), states.shape[1]).index_copy_(0, rows.index, states)
            self.last = batch, dense.view(*batch.input_ids.shape, -1)
        return self.last[1]

    def hidden(self, batch: train.Batch) -> Tensor:
        """[N, d], where response tokens are predicted."""
        return self.whole(batch).flatten(0, 1).index_select(0, batch.index)


def everything(examples: Sequence[Example]) -> list[Example]:
    """The same rows with all tokens as response: what the cache behind `TargetStates` holds."""
    return [example._replace(prompt_length=0) for example in examples]


def eagle_objective(target: TargetStates, reference_kl=None, k: float = 0.4):
    """EAGLE's loss, smooth L1 to the target's state and 0.1 KL(p || q) to its distribution, per token; for `train.train`.

    (The official code has cross-entropy to p in KL's place: the same gradient.) On every response token or, given
    `reference_kl(batch)`, the KL(p || q_ref) [N] of a head trained before, on AdaSPEC's: both losses on the top k of the tokens
    by KL(p || q) - KL(p || q_ref), over all ranks.
    """

    def objective(hidden, head, batch):
        states, rows, guard = target.hidden(batch), torch.arange(len(hidden), device=hidden.device), 0.0

        def wanted(rows):
            return target.head(states[rows])

        if reference_kl:
            gaps = head.per_token(hidden, wanted, token_kl) - reference_kl(batch)
            every, own = train.gather_ragged(gaps)
            rows, guard = select_tokens(every, k)[own].nonzero().squeeze(-1), 0 * gaps.sum()  # a NaN gap is a NaN loss
        distance = F.smooth_l1_loss(hidden[rows].float(), states[rows].float(), reduction="none").mean(-1).sum()
        return STATE_WEIGHT * distance + TOKEN_WEIGHT * head.loss(hidden, wanted, token_kl, rows) + guard, len(rows)

    return objective


@torch.no_grad()
def training_accuracy(head: Eagle, examples: Sequence[Example], vocab_size: int, rows_at_once: int = 16) -> float:
    """The share of response tokens where the head's likeliest next token is the target's, over all ranks.

    Teacher-forced, without noise: how the official code's training accuracy is counted, but with the weights of the end.
    """
    output, device = train.Head(head, vocab_size), head.fuse.weight.device
    own = sorted(range(train.rank(), len(examples), train.world_size()), key=lambda row: len(examples[row].input_ids))
    agree, tokens = 0.0, 0
    for i in range(
        -(-len(examples) // (train.world_size() * rows_at_once))
    ):  # as many on every rank: a sharded target needs all
        rows = own[i * rows_at_once :][:rows_at_once]
        batch = train.make_batch(examples, rows or own[:1], device)
        states = head.teacher.hidden(batch)
        found = output.per_token(
            head.response_states(batch),
            lambda rows, states=states: head.teacher.head(states[rows]),
            lambda p, q: (p.argmax(-1) == q.argmax(-1)).float(),
        )
        if rows:
            agree, tokens = agree + found.sum().item(), tokens + len(found)
    parts = train.gather_objects((agree, tokens))
    return sum(part[0] for part in parts) / max(sum(part[1] for part in parts), 1)


# Decoding: lanes as in speculative.py; `states` are of the tokens fed last


class _TargetLane(_Lane):
    """The target's lane, which hands out its last hidden states [B, n, d]. The logits stay the model's own.

    Raises ValueError for a model whose forward passes its base_model by (OPT).
    """

    def call(self, tokens, keep, **inputs):
        def note(module, args, output):
            self.states = output.last_hidden_state

        self.states, handle = None, self.model.base_model.register_forward_hook(note)
        try:
            logits = super().call(tokens, keep, **inputs)
        finally:
            handle.remove()
        if self.states is None:
            raise ValueError(f"{type(self.model).__name__} does not call its base_model: an EAGLE head cannot read its states")
        return logits


class _HeadLane(_Lane):
    """The head's lane. Between rounds its cache holds only what was made from the target's states, never from guesses.

    It can draft once the target has read the prompt: the first target call is a plain one.
    """

    ready = False

    def __init__(self, head, target_lane, input_ids, *more):
        super().__init__(head, input_ids, *more)
        self.target = target_lane
        self.true = [0] * len(input_ids)  # tokens a row that the cache keeps
        self.starts = target_lane.length  # where in its row the next token stands that the target is fed

    def call(self, tokens, keep, **inputs):
        output = self.model(tokens, self.states, past_key_values=self.cache, use_cache=True, logits_to_keep=keep, **inputs)
        self.states = output.hidden_states[0]  # the next draft's
        return output.logits

    def advance(self, texts, lag, rows):
        """Feed next all that has a true state by now: unlike numbers of tokens, and so padded on the left as prompts are."""
        alive = range(len(self.true)) if rows is None else rows
        have, starts = [self.true[row] for row in alive], [self.starts[row] for row in alive]
        states = self.target.states if rows is None else self.target.states[rows]
        self.rollback(have, rows)
        lacks = [len(text) - kept for text, kept in zip(texts, have, strict=True)]
        n, ends = max(lacks), [len(text) for text in texts]
        ends, have, starts = (torch.tensor(counts, device=self.device)[:, None] for counts in (ends, have, starts))
        place = torch.arange(-n, 0, device=self.device) + ends
        index = (place - 1 - starts).clamp_(min=0)
        none = (place < have) | (place == 0)  # padding; the first token of all
        self.states = states.take_along_dim(index[..., None], 1).masked_fill(none[..., None], 0)
        if min(lacks) < n:
            slots = self.cache.get_seq_length()
            mask = torch.ones(len(texts), slots, dtype=torch.bool, device=self.device) if self.mask is None else self.mask
            self.mask = torch.cat([mask, place >= have], 1)
            self.length = [length - n + lack for length, lack in zip(self.length, lacks, strict=True)]
        self.true, self.starts, self.ready = [len(text) for text in texts], self.target.length, True
        fed = [[0] * (n - lack) + text[-lack:] for text, lack in zip(texts, lacks, strict=True)]
        return torch.tensor(fed, device=self.device)


class _TargetTreeLane(_TargetLane, _TreeLane):
    pass


class _HeadTreeLane(_HeadLane, _TreeLane):
    def descend(self, parents):
        self.states = self.states[:, parents]

    def rollback(self, n, path):
        """As above: the path was made from guesses, and is fed anew with the target's states."""
        have, started = self.true[0], self.starts[0]
        slots = torch.tensor([*range(have - 1, n), *path], device=self.device)
        states = self.target.states[:, (slots - started).clamp(min=0)]
        self.states = states.masked_fill((slots < 0)[:, None], 0)
        if have:
            super().rollback(have, [])
        self.true, self.starts, self.ready = [n + len(path) + 1], [self.target.cache.get_seq_length()], True
