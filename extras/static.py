"""Static caches and compiled forwards, for a GPU, where decoding is bound by launches.

In eager mode the CPU launches every kernel of a forward on its own, which takes longer than a small
model's kernels run: a draft of one layer then costs nearly what its target costs. A CUDA graph
launches a whole forward at once, but only one of fixed shapes at fixed addresses. So keys and
values get all their slots beforehand, and torch.compile(mode="reduce-overhead") records a graph for
each of the few shapes that decoding has. (gpt-fast does so; transformers not in assisted
generation, huggingface/transformers#32946.)

    target, draft = StaticModel(target, length=2048), StaticModel(draft, length=2048)
    out = speculative_generate(target, draft, input_ids, max_new_tokens=128)

    python -m extras.static --target DIR_OR_HUB_ID --draft DIR_OR_HUB_ID  # with and without

The first calls compile, which takes minutes: keep the two objects. Reading the prompt, sampling and
the rule of acceptance run as ever, and so the output is what it is without.
"""

import math
from functools import partial

import torch
from transformers.cache_utils import Cache, StaticLayer

import models
from cli import Parser, run_command
from extras import measure
from extras.tree import check_takes_masks
from speculative import Lane, check_prompt, speculative_generate

# The cache and what is compiled


class SlotLayer(StaticLayer):
    """Keys and values [rows, heads, slots, d] of a layer. The token at position s of a row is
    written into slot s, whatever was there: to roll back is to count anew. What stands nowhere,
    padding and drafts of no use, goes to the slot after the last, which no token sees."""

    def __init__(self, length: int, starts: torch.Tensor):
        """starts [rows, 1]: where each row's next tokens stand; shared by all layers."""
        super().__init__(length + 8 - length % 8)  # masks of 8 n columns are the fast ones
        self.length = length
        self.starts = starts

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        positions = positions_after(self.starts, key_states.shape[2])
        valid = (positions >= 0) & (positions < self.length)
        slots = torch.where(valid, positions, self.length)[:, None, :, None]
        for cached, states in ((self.keys, key_states), (self.values, value_states)):
            cached.scatter_(2, slots.expand_as(states), states)
        return self.keys, self.values


def positions_after(starts: torch.Tensor, n: int) -> torch.Tensor:
    """[rows, n]: where n tokens a row stand."""
    return starts + torch.arange(n, device=starts.device)


def scores(model, cache: Cache, starts: torch.Tensor, tokens: torch.Tensor, keep: int):
    """Logits [rows, keep, V] at the last `keep` of tokens [rows, n], which stand from starts on,
    [rows, 1]. What is compiled."""
    layer = cache.layers[0]
    positions = positions_after(starts, tokens.shape[1]).clamp(0, layer.length - 1)
    visible = torch.arange(layer.max_cache_len, device=tokens.device) <= positions[..., None]
    mask = torch.zeros(visible.shape, dtype=model.dtype, device=tokens.device)
    mask = mask.masked_fill(~visible, -math.inf)[:, None]
    inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    return model(tokens, use_cache=True, logits_to_keep=keep, **inputs).logits


# Models and lanes


class StaticModel:
    """A causal language model with static caches, to be given to the sampler as target or draft. In
    all else it is the model itself.

    Args:
        model: with full attention, eager or sdpa, that takes position_ids.
        length: tokens that a prompt and its continuation can have together. Every step reads all
            slots of the cache, so not many more than needed.
        rows: of the largest batch; each step computes so many.
        backend: of torch.compile; None runs all in eager mode.

    Raises:
        ValueError: a model of another kind; a length beyond its context.
    """

    def __init__(self, model, length: int, rows: int = 1, backend: str | None = "inductor"):
        check_takes_masks(model, "static caches need")
        context = getattr(model.config, "max_position_embeddings", math.inf)
        if not 1 <= length <= context:
            name = type(model).__name__
            raise ValueError(
                f"length must be from 1 to {name}'s context of {context}, got {length}"
            )
        self.model = model
        self.length = length
        self.rows = rows
        self.starts = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        torch._dynamo.mark_static_address(self.starts)
        layers = [SlotLayer(length, self.starts) for _ in range(model.config.num_hidden_layers)]
        self.cache = Cache(layers)
        self.decode = scores
        if backend is not None:
            mode = "reduce-overhead" if backend == "inductor" else None
            # models share the compiled function's code: isolated, each has a limit of its own
            self.decode = torch.compile(
                scores, fullgraph=True, dynamic=False, backend=backend, mode=mode,
                isolate_recompiles=True,
            )  # fmt: skip

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def lane(self, *prompt) -> "StaticLane":
        return StaticLane(self, *prompt)


class StaticLane(Lane):
    """The lane of a StaticModel. Slots are positions: nothing is cropped, and rows have no holes.

    All forwards have the same rows, those of finished rows and others in between with tokens of no
    use, and after the prompt's n tokens are filled up to a power of two.
    """

    def __init__(self, static: StaticModel, input_ids, *prompt):
        super().__init__(static.model, input_ids, *prompt)
        if len(input_ids) > static.rows:
            raise ValueError(
                f"a batch of {len(input_ids)} rows, but the static caches have {static.rows}"
            )
        if self.last_position >= static.length:
            raise ValueError(
                f"prompt and new tokens are up to {self.last_position + 1}, but the static caches "
                f"have room for {static.length}: give StaticModel a larger length"
            )
        self.static = static
        self.cache = static.cache
        self.rows = torch.arange(len(input_ids), device=self.device)  # of the cache, of each row
        self.has_prompt = False

    def forward(self, tokens, keep=1):
        n = tokens.shape[1]
        if self.has_prompt:
            width, decode = 1 << (n - 1).bit_length(), self.static.decode
        else:  # of any length: in eager mode
            width, decode = n, scores
        self.has_prompt = True
        fed = tokens.new_zeros(self.static.rows, width)
        fed[self.rows, :n] = tokens
        starts = torch.tensor(self.lengths, device=self.device)[:, None]
        # the caches outlive this decoding, and so must be no tensors of inference mode
        with torch.inference_mode(False), torch.no_grad():
            self.static.starts[self.rows] = starts
            torch.compiler.cudagraph_mark_step_begin()
            logits = decode(self.model, self.cache, self.static.starts, fed, keep + width - n)
            # a copy: the next run of a graph overwrites what this one gave out
            logits = logits[self.rows, :keep, : self.vocab_size]
        self.lengths = [length + n for length in self.lengths]
        return logits

    def rollback(self, lengths, rows=None):
        if rows is not None and len(rows) < len(self.lengths):
            self.rows = self.rows[torch.tensor(rows, device=self.device)]
        self.lengths = lengths


# Measured


def compare(target, draft, prompts, gamma: int, rounds: int, **settings) -> dict:
    """Seconds by round of decoding the prompts [1, T] in turn: the target alone and the pair, plain
    and static. Raises ValueError where these write different tokens."""
    length = max(ids.shape[1] for ids in prompts) + settings["max_new_tokens"]
    static_target, static_draft = StaticModel(target, length), StaticModel(draft, length)
    ways = {
        "alone": (target, None),
        "static alone": (static_target, None),
        "pair": (target, draft),
        "static pair": (static_target, static_draft),
    }
    texts = {}

    def decode(name):
        outputs = [
            speculative_generate(*ways[name], ids, gamma=gamma, **settings) for ids in prompts
        ]
        texts[name] = [output.sequences.tolist() for output in outputs]

    calls = {name: partial(decode, name) for name in ways}
    seconds = measure.interleaved(calls, rounds, target.device)
    for name, text in texts.items():
        if text != texts["alone"]:
            raise ValueError(f"{name} and alone write different tokens: nothing to compare")
    return seconds


def main(argv: list[str] | None = None) -> None:
    """Greedy decoding, with and without. Raises ValueError or OSError for what a user can mend."""
    parser = Parser(prog="extras.static", description="Decoding with static caches and without.")
    parser.add_argument("--draft", required=True, help="folder or Hub id of the draft")
    measure.add_decoding_flags(parser)
    measure.add_device_flag(parser)
    measure.add_result_flags(parser, rounds=5)
    args = measure.parse(parser, argv)
    pair = models.load_pair(args.target, args.draft, torch.float32, args.device)
    target, draft, tokenizer = pair
    prompts, source = measure.load_prompts(args, tokenizer, args.device)
    settings = {"gamma": args.gamma, "max_new_tokens": args.max_new_tokens}
    for ids in prompts:
        check_prompt((target, draft), ids, None, args.max_new_tokens)
    ends = models.end_tokens(target, tokenizer, args.chat)
    seconds = compare(target, draft, prompts, rounds=args.rounds, eos_token_id=ends, **settings)
    ratios = {
        name: measure.ratios(seconds[name], seconds[f"static {name}"]) for name in ("alone", "pair")
    }
    print(f"{len(prompts)} prompts ({source}), gamma {args.gamma}, float32, {args.device}")
    print("static / plain, tokens per second: median of the rounds (low to high)")
    for name, ratio in ratios.items():
        print(f"  {name:<6} {measure.brief(ratio)}")
    protocol = {"prompts": source, "batch": len(prompts), "device": str(args.device), **settings}
    measure.save(args, {"protocol": protocol, "seconds": seconds, "ratios": ratios})


if __name__ == "__main__":
    run_command(main, "extras.static")
