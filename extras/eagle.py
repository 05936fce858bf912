"""EAGLE-1 heads (Li et al. 2024, arXiv 2401.15077) on any Hugging Face decoder, with and without
AdaSPEC's filter.

    python -m extras.eagle --pairs tiny-eagle --tasks gsm8k --data-dir DIR --seeds 0,1,2
    python -m extras.eagle --target T --tasks custom --data-dir DIR --methods best
    python -m extras.eagle --target T --head HEAD --tasks custom --data-dir DIR

The first trains a head on all response tokens (method distillspec, "EAGLE") and one on AdaSPEC's
(method adaspec, "EAGLE + AdaSPEC"), whose reference is a head of the first kind, and compares them;
best is EAGLE in small batches, with a rate that decays and the reference's epochs too. The second
does so for a model of one's own, the third measures a head that is there. With --depth 2 heads also
learn what a round's second draft is made from, their own guess; --state-weight 0 drops the loss
that pulls guesses to the target's states (give --depth 2 with it).

The draft is a head on the target: token x_s and the state h_{s-1} that the target predicted it from
go through one linear layer and one decoder layer of the target's own kind, which guesses h_s; the
target's output head turns the guess into the distribution of x_{s+1}. Next round's guesses start
from the target's true states again.

    head = Eagle.from_pretrained("runs/tiny-eagle/gsm8k/seed0/eagle-adaspec", target)
    out = speculative_generate(target, head, input_ids, max_new_tokens=128)
    # or extras.tree.tree_generate, speculative.expected_acceptance

As in the official code, the layer has no norm at its input, no norm follows it, the states are
those after the target's final norm, and noise is added to them in training. Unlike there, a state
is placed beside the token it predicted and the first token, which has none before it, gets zeros
instead of no place: so the head's positions and cache are those of any draft.
"""

import interrupt  # noqa: F401 -- first: it makes Ctrl-C during the other imports one line

# isort: split

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

import storage
from adaspec import gather_gaps, select_tokens
from cells import (
    Cell,
    base_models,
    draft_plan,
    prepare_cell,
    reference_method,
    target_plan,
    write_missing_responses,
)
from cli import Parser, add_flags, decimal, flag, one_of, run_command, some_of, whole
from data import Batch, Example, all_tokens, make_batch
from extras.ablations import StudySettings
from extras.report import eagle_table
from extras.tree import TreeLane
from head import Head
from history import Validation
from models import load_model, model_identity
from ranks import gather_objects, leave, rank, say, world_size
from run_all import checked_cells, evaluate_drafts, print_tables
from settings import MATCHES, PRESETS, Method, Settings, parse_settings
from settings import PAIRS as MODEL_PAIRS
from short_head import coverage, frequent_tokens, outside_log_odds, shortened
from speculative import Lane, takes_positions
from stages import (
    Plan,
    cache_seconds,
    fit,
    open_target,
    say_coverage,
    short_head_ids,
    short_head_summary,
    stage_settings,
    target_forwards,
    token_cache,
    training_cost,
    training_options,
)
from storage import Model
from teacher import Frozen, ReferenceLoss
from train import fine_tuning_step, token_loss, train

# of the two losses: the official code's; the first is the default of --state-weight
STATE_WEIGHT, TOKEN_WEIGHT = 1.0, 0.1
NOISE = 0.1  # half the width of the uniform noise on the states in training: the official code's
COVERAGE_ROWS = 64  # that a short head's coverage is measured on
INPUT_NORMS = ("input_layernorm", "ln_1")  # architectures' names of the norm at a layer's input
# what a head and its target must have in common
SHARED = ("model_type", "hidden_size", "vocab_size", "num_attention_heads")


# The head


def previous_states(states: Tensor) -> Tensor:
    """The target's states [B, T, d] at every token, moved to the token after it: zeros, then
    states[:, :-1]."""
    return F.pad(states, (0, 0, 1, -1))


class Eagle(nn.Module):
    """The head. Its own are the fusing linear layer and the decoder layer; the target's embedding
    and output head are used, frozen from here on, and neither trained nor saved with it. Of the
    output head `token_ids` [V'] are the rows used, where they are given (short_head.py).

    Raises ValueError for a target that takes no position_ids.
    """

    def __init__(self, target: nn.Module, noise: float = NOISE, token_ids: Tensor | None = None):
        super().__init__()
        if not takes_positions(target):
            name = type(target).__name__
            raise ValueError(
                f"{name} takes no position_ids; an EAGLE head needs a target that does"
            )
        self.noise = noise
        self.depth = 1  # in training: drafts in a row that it makes, see `unroll`
        self.teacher: TargetStates | None = None  # in training: whose states it reads
        self.config = copy.deepcopy(target.config)
        self.config.num_hidden_layers = 1
        if getattr(self.config, "layer_types", None):
            self.config.layer_types = self.config.layer_types[-1:]
        # in a tuple they are no submodules
        output_head = target.get_output_embeddings()
        if token_ids is not None:
            output_head = shortened(output_head, token_ids)
        self.frozen = (target.get_input_embeddings(), output_head)
        for module in self.frozen:
            module.requires_grad_(False)
        width = self.config.hidden_size
        self.fuse = nn.Linear(self.frozen[0].embedding_dim + width, width)
        self.trunk = type(target.base_model)(self.config)  # brings positions and masks with it
        self.trunk.set_input_embeddings(None)
        remove_norms(self.trunk)

    def get_output_embeddings(self) -> nn.Module:
        return self.frozen[1]

    def _apply(self, *args, **kwargs):
        """Moves and casts a short output head too, which is not the target's own."""
        if self.token_ids is not None:
            self.frozen[1]._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    @property
    def token_ids(self) -> Tensor | None:
        """[V'], those that a short output head is of."""
        return getattr(self.frozen[1], "token_ids", None)

    @property
    def dtype(self) -> torch.dtype:
        return self.fuse.weight.dtype

    def hidden(self, input_ids: Tensor, states: Tensor, **inputs) -> Tensor:
        """The guesses [B, T, d] of the target's state at tokens [B, T], from its states before them
        [B, T, d]."""
        tokens = self.frozen[0](input_ids)
        fused = self.fuse(torch.cat([tokens, states.to(tokens)], -1))
        return self.trunk(inputs_embeds=fused, **inputs).last_hidden_state

    def forward(self, input_ids, states, *, position_ids=None, logits_to_keep=0, **inputs):
        """Logits of the next tokens as a causal LM gives them, and in `hidden_states` the guesses
        they were made from."""
        hidden = self.hidden(input_ids, states, position_ids=position_ids, **inputs)
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, slice(-logits_to_keep, None)]
        else:
            hidden = hidden[:, logits_to_keep]
        return CausalLMOutputWithPast(logits=self.frozen[1](hidden), hidden_states=(hidden,))

    def response_states(self, batch: Batch) -> Tensor:
        """For training (head.py): the guesses [N, d] where they predict response tokens; in
        training `depth` times as many, one depth after the other."""
        states = previous_states(self.teacher.all_states(batch))
        if self.training and self.noise:
            states = states + self.noise * (2 * torch.rand_like(states) - 1)
        guesses = self.unroll(batch.input_ids, states, self.depth if self.training else 1)
        return torch.cat([each.flatten(0, 1).index_select(0, batch.index) for each in guesses])

    def unroll(self, input_ids: Tensor, states: Tensor, depth: int) -> list[Tensor]:
        """`depth` guesses [B, T, d]: from the target's states, from that guess, and so on. At every
        token at once they are what the 1st, 2nd, ... draft of a round is made from (HASS, arXiv
        2408.15766; the training-time test of EAGLE-3, arXiv 2503.01840)."""
        if depth == 1:
            return [self.hidden(input_ids, states, use_cache=False)]
        n = input_ids.shape[1]
        positions = torch.arange(n, device=input_ids.device)[None]
        cache = DynamicCache()
        guesses = []
        for level in range(depth):
            mask = unrolled_mask(n, level, states)
            inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            guesses.append(self.hidden(input_ids, states, use_cache=True, **inputs))
            states = previous_states(guesses[-1])
        return guesses

    # Decoding and evaluation: how a draft that is no language model takes part (speculative.Lane)

    def extra_inputs(self, target: nn.Module, input_ids: Tensor) -> dict:
        states = target.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return {"states": previous_states(states)}

    def lanes(self, target, input_ids, mask, *limits) -> tuple[Lane, Lane]:
        target_lane = TargetLane(target, input_ids, mask, *limits)
        return target_lane, HeadLane(self, target_lane, input_ids, None, *limits)

    def tree_lanes(self, target, input_ids, vocab_size) -> tuple[TreeLane, TreeLane]:
        target_lane = TargetTreeLane(target, input_ids, vocab_size)
        return target_lane, HeadTreeLane(self, target_lane, input_ids, vocab_size)

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write eagle.safetensors and eagle.json into a folder, and make it where there is none."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        if self.token_ids is not None:
            weights["token_ids"] = self.token_ids
        save_file(weights, Path(folder, "eagle.safetensors"))
        record = {"noise": self.noise, **{name: getattr(self.config, name) for name in SHARED}}
        Path(folder, "eagle.json").write_text(json.dumps(record, indent=1))

    @classmethod
    def from_pretrained(cls, folder: str | Path, target: nn.Module) -> "Eagle":
        """The head that `save_pretrained` wrote, on this target, in its dtype and on its device, in
        evaluation mode.

        Raises ValueError where the folder holds no head, a damaged one or one of another kind of
        target.
        """
        try:
            record = json.loads(Path(folder, "eagle.json").read_text())
            weights = load_file(Path(folder, "eagle.safetensors"))
            kind = {name: record[name] for name in SHARED}
            noise = record["noise"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(
                f"{folder} holds no EAGLE head ({error}); give one that Eagle.save_pretrained wrote"
            ) from error
        own_kind = {name: getattr(target.config, name) for name in SHARED}
        if own_kind != kind:
            raise ValueError(
                f"the EAGLE head in {folder} was made for a target with {kind}, "
                f"this one has {own_kind}"
            )
        head = cls(target, noise, weights.pop("token_ids", None))
        try:
            head.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"the EAGLE head in {folder} does not fit {type(target).__name__}: {error}"
            ) from error
        weight = head.frozen[0].weight
        return head.to(device=weight.device, dtype=weight.dtype).eval()


def unrolled_mask(n: int, level: int, like: Tensor) -> Tensor:
    """Additive mask [1, 1, n, (level + 1) n] of n tokens at a level from 0, in the dtype of `like`:
    what a draft sees. The keys come level by level. A token t sees itself; of a level above 0
    between, the token level - that before it; of level 0 all tokens up to t - level."""
    tokens = torch.arange(n, device=like.device)
    distance = tokens[:, None] - tokens
    visible = [distance >= level]
    visible += [distance == level - earlier for earlier in range(1, level + 1)]
    mask = like.new_zeros(n, n * (level + 1)).masked_fill(~torch.cat(visible, 1), -math.inf)
    return mask[None, None]


def remove_norms(trunk: nn.Module) -> None:
    """Take the norm at the input of the trunk's layer and those after it away, in place."""
    lists = [module for module in trunk.modules() if isinstance(module, nn.ModuleList)]
    layer = lists[0][0]
    stack = next(m for m in trunk.modules() if any(child is lists[0] for child in m.children()))
    for name in INPUT_NORMS:
        if hasattr(layer, name):
            setattr(layer, name, nn.Identity())
    for name, child in list(stack.named_children()):
        if "norm" in type(child).__name__.lower():
            setattr(stack, name, nn.Identity())


# Training: in train.py's loop, from the teacher's cache


class TargetStates:
    """A frozen target's states at all tokens of a batch's rows, prompts included, since the head
    reads those too; `hidden`, `head` and `outside` are those of `teacher.Frozen`.

    If `teacher` has a cache, it is of `all_tokens(examples)`.
    """

    def __init__(self, teacher: Frozen, examples: Sequence[Example]):
        self.teacher = teacher
        self.head = teacher.head
        self.examples = all_tokens(examples)
        self.last_batch: Batch | None = None
        self.last_states: Tensor | None = None

    def all_states(self, batch: Batch) -> Tensor:
        """[B, T, d]; zeros at a row's last token, which predicts nothing, and on padding."""
        if self.last_batch is not batch:  # head and losses ask for the same one
            all_positions = make_batch(self.examples, batch.rows, batch.input_ids.device)
            states = self.teacher.hidden(all_positions)
            flat = states.new_zeros(batch.input_ids.numel(), states.shape[1])
            flat.index_copy_(0, all_positions.index, states)
            self.last_states = flat.view(*batch.input_ids.shape, -1)
            self.last_batch = batch
        return self.last_states

    def hidden(self, batch: Batch) -> Tensor:
        """[N, d], where response tokens are predicted."""
        return self.all_states(batch).flatten(0, 1).index_select(0, batch.index)

    def outside(self, batch: Batch) -> Tensor:
        """As `teacher.Frozen.outside`, of a head with a short output head."""
        return outside_log_odds(self.teacher.whole_head, self.head.token_ids, self.hidden(batch))


class RememberedStates(TargetStates):
    """The same for a few batches, computed once each."""

    def __init__(self, *inputs):
        super().__init__(*inputs)
        self.by_batch: dict[int, Tensor] = {}

    def all_states(self, batch: Batch) -> Tensor:
        if id(batch) not in self.by_batch:
            self.by_batch[id(batch)] = super().all_states(batch)
        return self.by_batch[id(batch)]


class HeadValidation(Validation):
    """history.Validation of a head: it reads the target's states on the held-out rows too."""

    def ask(self, target: Frozen) -> None:
        self.states = RememberedStates(target, self.examples)
        super().ask(self.states)

    def alpha(self, model: Eagle, head: Head, dtype: torch.dtype) -> float | None:
        training_states = model.teacher
        model.teacher = self.states
        alpha = super().alpha(model, head, dtype)
        model.teacher = training_states
        return alpha


def eagle_step(student, batch: Batch, target: TargetStates, state_weight=STATE_WEIGHT):
    """EAGLE: `eagle_loss` on every response token."""
    hidden = student.hidden(batch)
    rows = torch.arange(len(batch.index), device=hidden.device)
    return eagle_loss(student, hidden, batch, target, rows, state_weight), len(rows)


def eagle_adaspec_step(
    student, batch: Batch, target: TargetStates, reference, method, state_weight=STATE_WEIGHT
):
    """EAGLE + AdaSPEC: `eagle_loss` on the top k of the tokens by KL(p || q) - KL(p || q_ref), over
    all ranks; the same filter as in `train.adaspec_step`."""
    hidden = student.hidden(batch)
    first_draft = hidden[: len(batch.index)]
    draft_losses = student.head.token_losses(first_draft, *token_loss("fkl", target, batch))
    gap = draft_losses - reference.losses(batch)
    all_gaps, own = gather_gaps(gap)
    selected = select_tokens(all_gaps, method.k)[own]
    rows = selected.nonzero().squeeze(-1)
    loss = eagle_loss(student, hidden, batch, target, rows, state_weight)
    return loss + 0 * gap.sum(), len(rows)  # 0 * NaN: a NaN gap is a NaN loss


def eagle_loss(
    student, hidden: Tensor, batch: Batch, target: TargetStates, rows: Tensor,
    state_weight: float = STATE_WEIGHT,
) -> Tensor:  # fmt: skip
    """Summed over `rows`: smooth L1 to the target's state, times its weight, and 0.1 KL(p || q) to
    its distribution; the mean over the depths of `hidden` [depth N, d].

    (The official code has cross-entropy to p in KL's place: the same gradient.)
    """
    states = target.hidden(batch)
    signal = token_loss("fkl", target, batch)
    losses = []
    for guesses in hidden.split(len(states)):
        loss = TOKEN_WEIGHT * student.head.loss(guesses, *signal, rows)
        if state_weight:
            guess, state = guesses[rows].float(), states[rows].float()
            distances = F.smooth_l1_loss(guess, state, reduction="none").mean(-1)
            loss = loss + state_weight * distances.sum()
        losses.append(loss)
    return sum(losses) / len(losses)


@torch.no_grad()
def training_accuracy(
    head: Eagle, examples: Sequence[Example], vocab_size: int, rows_at_once: int = 16
) -> float:
    """The share of response tokens where the head's likeliest next token is the target's, over all
    ranks.

    Teacher-forced, without noise: how the official code's training accuracy is counted, but with
    the weights of the end.
    """
    output = Head(head, vocab_size)
    device = head.fuse.weight.device
    own = range(rank(), len(examples), world_size())
    own = sorted(own, key=lambda row: len(examples[row].input_ids))
    agree, tokens = 0.0, 0
    # as many forwards on every rank: with its layers spread over ranks a target needs all
    for i in range(-(-len(examples) // (world_size() * rows_at_once))):
        rows = own[i * rows_at_once : (i + 1) * rows_at_once]
        batch = make_batch(examples, rows or own[:1], device)
        signal, _ = token_loss("fkl", head.teacher, batch)
        matches = output.token_losses(head.response_states(batch), signal, same_argmax)
        if rows:
            agree += matches.sum().item()
            tokens += len(matches)
    agree, tokens = map(sum, zip(*gather_objects((agree, tokens)), strict=True))
    return agree / max(tokens, 1)


def mean_coverage(states: TargetStates, examples: Sequence[Example], device) -> float:
    """The target's mean probability of a short head's tokens, in the first COVERAGE_ROWS rows."""
    rows = range(min(COVERAGE_ROWS, len(examples)))
    log_odds = [states.outside(make_batch(examples, [row], device)) for row in rows]
    return coverage(torch.cat(log_odds))


def same_argmax(target_logits: Tensor, draft_logits: Tensor) -> Tensor:
    return (target_logits.argmax(-1) == draft_logits.argmax(-1)).float()


# Decoding: lanes as in speculative.py; `states` are of the tokens fed last


class TargetLane(Lane):
    """The target's lane, which hands out its last hidden states [B, n, d]. The logits stay the
    model's own.

    Raises ValueError for a model whose forward passes its base_model by (OPT).
    """

    def call(self, tokens, keep, **inputs):
        self.states = None
        hook = self.model.base_model.register_forward_hook(self.note_states)
        try:
            logits = super().call(tokens, keep, **inputs)
        finally:
            hook.remove()
        if self.states is None:
            name = type(self.model).__name__
            raise ValueError(
                f"{name} does not call its base_model: an EAGLE head cannot read its states"
            )
        return logits

    def note_states(self, module, args, output) -> None:
        self.states = output.last_hidden_state


class HeadLane(Lane):
    """The head's lane. Between rounds its cache holds only what was made from the target's states,
    never from guesses.

    It can draft once the target has read the prompt: the first target call is a plain one.
    """

    def __init__(self, head, target_lane, input_ids, *prompt):
        super().__init__(head, input_ids, *prompt)
        self.ready = False
        self.target = target_lane
        self.true_lengths = [0] * len(input_ids)  # tokens of each row that the cache keeps
        self.starts = target_lane.lengths  # where in its row the next target call begins

    def call(self, tokens, keep, **inputs):
        inputs |= {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": keep}
        output = self.model(tokens, self.states, **inputs)
        self.states = output.hidden_states[0]  # the next draft's
        return output.logits

    def advance(self, texts, lag, rows):
        """Feed next all that has a true state by now: unlike numbers of tokens, and so padded on
        the left as prompts are."""
        true_lengths = [self.true_lengths[row] for row in rows]
        starts = self.column(self.starts[row] for row in rows)
        self.rollback(true_lengths, rows)
        missing = [len(text) - length for text, length in zip(texts, true_lengths, strict=True)]
        n = max(missing)
        positions = torch.arange(-n, 0, device=self.device) + self.column(map(len, texts))
        padding = positions < self.column(true_lengths)
        # beside a token stands the state before it, which the target's last call has computed
        index = (positions - 1 - starts).clamp(min=0)
        states = self.target.states[rows].take_along_dim(index[..., None], 1)
        no_state = padding | (positions == 0)  # the first token of all has none
        self.states = states.masked_fill(no_state[..., None], 0)
        if min(missing) < n:
            self.hide(padding)
        self.true_lengths = [len(text) for text in texts]
        self.starts = self.target.lengths
        self.ready = True
        tokens = []
        for text, count in zip(texts, missing, strict=True):
            tokens.append([0] * (n - count) + text[-count:])
        return torch.tensor(tokens, device=self.device)

    def hide(self, padding: Tensor) -> None:
        """The tokens fed next are padded on the left, [B, n] bool."""
        if self.mask is None:
            slots = self.cache.get_seq_length()
            self.mask = torch.ones(len(padding), slots, dtype=torch.bool, device=self.device)
        self.mask = torch.cat([self.mask, ~padding], 1)
        # minus the padding, which `forward` counts with the tokens
        counts = padding.sum(1).tolist()
        self.lengths = [length - n for length, n in zip(self.lengths, counts, strict=True)]

    def column(self, numbers) -> Tensor:
        """One number a row, as [B, 1]."""
        return torch.tensor(list(numbers), device=self.device)[:, None]


class TargetTreeLane(TargetLane, TreeLane):
    """The target's lane under a tree."""


class HeadTreeLane(HeadLane, TreeLane):
    """The head's lane in a tree, whose nodes are drafted from their parents' guesses."""

    def descend(self, parents):
        self.states = self.states[:, parents]

    def rollback(self, length, path):
        """As HeadLane.advance: the path was made from guesses, and is fed anew with the target's
        states."""
        true_length, start = self.true_lengths[0], self.starts[0]
        slots = torch.tensor([*range(true_length - 1, length), *path], device=self.device)
        states = self.target.states[:, (slots - start).clamp(min=0)]
        self.states = states.masked_fill((slots < 0)[:, None], 0)
        if true_length:
            super().rollback(true_length, [])
        self.true_lengths = [length + len(path) + 1]
        self.starts = [self.target.cache.get_seq_length()]
        self.ready = True


# The stages of a cell


def run_heads(cell: Cell, methods: Sequence[Method]) -> list[dict]:
    """As run_all.run_cell: the stages that are not done yet, or the head that is given, and the
    evaluation of the heads."""
    say(cell.header)
    target, _ = base_models(cell)
    if cell.recipe.epochs[0]:
        target = fit(cell, target_plan(cell, target), fine_tuning_step)
    heads, costs = {}, {}
    if cell.settings.head:
        heads["base"] = given_head(cell, target)
    if methods:  # to train on
        write_missing_responses(cell, target, None)
    for method in methods:
        stages = train_head(cell, method, target)
        label = head_label(method, cell.settings)
        heads[label] = stages[-1]
        summary = storage.read_json(Path(stages[-1].path, "stage.json"))["summary"]
        of_head = {"depth": cell.settings.depth, "state_weight": cell.settings.state_weight}
        of_head["accuracy"] = summary["accuracy"]
        costs[label] = training_cost(cell, stages) | of_head
    if rank() == 0:
        storage.remove_folder(cell.folder / "cache")

    def load(path, dtype, device):
        network = load_model(target.path, dtype, device)
        return network if path == target.path else Eagle.from_pretrained(path, network)

    return evaluate_drafts(cell, target, heads, costs, load)


def given_head(cell: Cell, target: Model) -> Model:
    """That of --head; says so where it was trained for another target."""
    path = cell.settings.head
    made_for = storage.read_json(Path(path, "stage.json")).get("settings", {}).get("target")
    if made_for not in (None, target.fingerprint):
        say(f"  {path} was trained for another target, or for this one in another folder")
    return Model(path, model_identity(path, cell.settings.out))


def train_head(cell: Cell, method: Method, target: Model) -> list[Model]:
    """The stages of a head; the last one is the head."""
    plan = head_plan(cell, method, target)
    if method.name != "adaspec":
        return [fit_head(cell, plan, target)]
    uniform = head_plan(cell, reference_method(cell, method), target)
    reference = fit_head(cell, uniform, target)
    return [reference, fit_head(cell, plan, target, reference)]


def head_label(method: Method, settings: "EagleSettings") -> str:
    """What tables call the head."""
    names = {"DistillSpec": "EAGLE", "AdaSPEC": "EAGLE + AdaSPEC", "best": "EAGLE, best"}
    name, *changes = method.label.split(" ")
    if settings.depth > 1:
        changes.append(f"depth={settings.depth}")
    if settings.state_weight != STATE_WEIGHT:
        changes.append(f"state-weight={settings.state_weight:g}")
    return " ".join([names[name], *changes])


def head_plan(cell: Cell, method: Method, target: Model) -> Plan:
    plan = draft_plan(cell, method, target, target)
    depth, state_weight = cell.settings.depth, cell.settings.state_weight
    init = {"kind": "EAGLE head", "weights of losses": [state_weight, TOKEN_WEIGHT]}
    name = f"eagle-{plan.name}"
    if depth > 1:
        init["depth"] = depth
        name += f"-depth-{depth}"
    if state_weight != STATE_WEIGHT:
        name += f"-state-weight-{state_weight:g}"
    if cell.settings.draft_vocab:
        token_ids = frequent_tokens(plan.examples, cell.settings.draft_vocab, cell.ends)
        init["token_ids"] = token_ids.tolist()
    method = replace(method, divergence="fkl")  # in EAGLE's losses, those of best too
    return replace(plan, name=name, init=init, method=method)


def fit_head(cell: Cell, plan: Plan, target: Model, reference: Model | None = None) -> Model:
    """As stages.fit: train the stage of a head, or find it finished."""
    settings = stage_settings(cell, plan, target, reference)
    folder = storage.stage_folder(cell.folder / plan.name, settings)
    finished = storage.finished_stage(folder, settings)
    if finished:
        return finished
    head = new_head(cell, plan, target)
    all_positions = replace(plan, examples=all_tokens(plan.examples))
    validation = HeadValidation(cell.validation, cell.rows_at_once)
    teacher = open_target(cell, all_positions, target, validation)
    head.teacher = TargetStates(teacher, plan.examples)
    if head.token_ids is not None:
        teacher.coverage = mean_coverage(head.teacher, plan.examples, cell.device)
        say_coverage(cell, teacher)
    step = eagle_step
    step_inputs = [head.teacher]
    reference_loss = None
    if reference:
        step = eagle_adaspec_step
        reference_loss = open_reference(cell, plan, head.teacher, target, reference)
        step_inputs += [reference_loss, plan.method]
    step_inputs.append(cell.settings.state_weight)
    options = training_options(cell, plan, folder, settings, validation)
    summary = train(head, plan.examples, step, step_inputs, **options)
    summary["accuracy"] = training_accuracy(
        head, plan.examples, len(cell.tokenizer), cell.rows_at_once
    )
    forwards = target_forwards(cell, plan, teacher, reference_loss, summary)
    if not teacher.cache:
        forwards[f"accuracy of {plan.name}"] = len(plan.examples)
        if head.token_ids is not None:
            forwards[f"coverage of {plan.name}"] = min(COVERAGE_ROWS, len(plan.examples))
    summary["target_forwards"] = forwards
    summary["cache_seconds"] = cache_seconds(teacher, reference_loss)
    summary |= short_head_summary(teacher)
    history = options["history"]
    return storage.save_stage(folder, settings, summary, head, cell.tokenizer, history)


def new_head(cell: Cell, plan: Plan, target: Model) -> Eagle:
    """A head to be trained. Raises ValueError for a target that can have none."""
    torch.manual_seed(plan.seed)
    network = load_model(target.path, torch.float32, cell.device)
    token = torch.zeros(1, 1, dtype=torch.long, device=cell.device)
    with torch.no_grad():
        TargetLane(network, token).forward(token)  # can its states be read?
    head = Eagle(network, token_ids=short_head_ids(plan)).to(cell.device)
    head.depth = cell.settings.depth
    return head


def open_reference(
    cell: Cell, plan: Plan, states: TargetStates, target: Model, reference: Model
) -> ReferenceLoss:
    """As stages.open_reference, of a head."""
    network = load_model(target.path, cell.dtype, cell.device)
    head = Eagle.from_pretrained(reference.path, network)
    head.teacher = states
    losses = ReferenceLoss(Frozen(head, len(cell.tokenizer)), states, "fkl")
    models = target.fingerprint + reference.fingerprint
    cache = token_cache(cell, "reference", models, plan.examples, 1, torch.float32)
    if cache:
        losses.use(cache, cell.device, f"{cell.task} reference cache")
    return losses


# The command line

PAIRS = {"tiny-eagle": replace(MODEL_PAIRS["tiny"], draft=None)}


@dataclass(frozen=True)
class EagleSettings(StudySettings):
    pairs: tuple[str, ...] = flag(
        tuple(PAIRS), some_of([*PAIRS, "custom"]), "tiny-eagle; with a target given, custom", "grid"
    )
    heads: bool = True
    head: str | None = flag(
        None, str, "measure the head in this folder on --target as it is: trains none", "grid"
    )
    depth: int = flag(
        1,
        whole(),
        "drafts in a row that a head is trained to make: from the second on from its own guesses",
    )
    state_weight: float = flag(
        STATE_WEIGHT,
        decimal(0, math.inf),
        "of the loss that pulls guesses to the target's states; 0: none, give --depth 2 with it",
    )
    draft: str | None = None
    draft_layers: int | None = None
    write_with_draft: bool = False
    methods: tuple = flag(
        ("distillspec", "adaspec"),
        some_of(["distillspec", "adaspec", "best"]),
        "comma-separated, of distillspec (EAGLE), adaspec (EAGLE + AdaSPEC) and best",
        "grid",
    )
    max_new_tokens: int = flag(
        128, whole(3), "tokens of a response; the first target call is without drafts", "evaluation"
    )


def prepare_head(pair: str, task: str, seed: int, settings: Settings, device) -> Cell:
    """As cells.prepare_cell; heads that are given have cells of their own. Raises ValueError where
    a folder that is given holds none."""
    if settings.head and not Path(settings.head, "eagle.json").is_file():
        raise ValueError(f"--head {settings.head} holds no EAGLE head: there is no eagle.json")
    cell = prepare_cell(pair, task, seed, settings, device, PAIRS)
    if not settings.head:
        return cell
    identity = model_identity(settings.head, settings.out)
    name = f"{cell.name}-{Path(settings.head).name}-{storage.fingerprint({'head': identity})[:8]}"
    return replace(cell, name=name, folder=Path(settings.out, name, task, f"seed{seed}"))


def parse_arguments(argv) -> tuple[EagleSettings, list[Method]]:
    parser = Parser(prog="python -m extras.eagle", description=__doc__, allow_abbrev=False)
    add_flags(parser, EagleSettings)
    parser.add_argument(
        "--k", type=decimal(0, 1, above=True), default=0.4, help="AdaSPEC's fraction of tokens"
    )
    parser.add_argument(
        "--match",
        type=one_of(MATCHES),
        default="steps",
        help="what AdaSPEC has in common with EAGLE of as many epochs: steps, epochs (in batches "
        "1/k as large) or tokens (that bear loss, in such batches; 1/k the epochs)",
    )
    parser.set_defaults(data="ground-truth")  # a head has no others
    settings, methods = parse_settings(parser, argv, EagleSettings)
    if settings.head:
        trained_otherwise = settings.depth > 1 or settings.state_weight != STATE_WEIGHT
        if settings.pairs != ("custom",) or settings.draft_vocab or trained_otherwise:
            parser.error(
                "--head is measured as it is: give --target, no --pairs, --draft-vocab, --depth "
                "or --state-weight"
            )
        return replace(settings, methods=("none",), validation_rows=0), []
    if settings.pairs == PRESETS["tiny"]["pairs"]:
        settings = replace(settings, pairs=("tiny-eagle",))
    return settings, methods


def main(argv=None) -> None:
    settings, methods = parse_arguments(argv)
    rows = []
    for cell in checked_cells(settings, methods, prepare_head):
        rows += run_heads(cell, methods)
    print_tables(rows, settings.out)
    say(eagle_table(rows))
    leave()


if __name__ == "__main__":
    run_command(main, "extras.eagle", resumes=True)
