"""What makes a model faster on this machine: a draft, an EAGLE head, or transformers' own ways.

    python -m extras.bench_drafts --target T --draft D --head H --prompts FILE --dtype bfloat16

(bench_decode measures where the time of one draft's decoding goes; this one compares.) Each prompt
is decoded alone, by each contestant in turn: "alone" (the target), "draft" and "head"
(speculative_generate with --draft and with --head), trees of both (extras.tree: "head tree 3,1"
with --branching 3,1, "head beam 3,2" with --beam 3,2), and of transformers "generate" (the target),
"lookup" (prompt lookup, which needs no draft: it copies up to gamma tokens from where the last ones
stood before) and "assisted" (assisted generation with --draft, where its output head is as large as
the target's). All run with packed weights and thin products, where these are faster.

Speeds are in tokens per second over those of "alone" at the same prompt: the median over prompts
and its 95% interval. At temperature 0 all should write the same text; how many do is counted, since
in bfloat16 a near-tie may fall either way. Above 0 each writes texts of its own.
"""

import math
import statistics
from functools import partial
from typing import NamedTuple

import torch

import models
from cli import Parser, decimal, one_of, run_command
from evaluate import clock, median_interval
from extras import measure
from extras.eagle import Eagle
from extras.tree import node_counts, tree_generate, tree_name
from speculative import (
    Stats,
    check_prompt,
    inference,
    pack_weights,
    speculative_generate,
    until_end,
)
from train import DTYPES


def load(args) -> tuple:
    """Target, draft and head (None where none is given) and the tokenizer. Raises ValueError for
    what is missing or does not fit."""
    dtype = DTYPES[args.dtype]
    draft = None
    if args.draft:
        target, draft, tokenizer = models.load_pair(args.target, args.draft, dtype, args.device)
    else:
        models.check_model(args.target)
        target = models.load_model(args.target, dtype, args.device)
        tokenizer = models.load_tokenizer(args.target)
    head = Eagle.from_pretrained(args.head, target) if args.head else None
    for model in (target, draft, head):
        if model is not None:
            pack_weights(model)
    return target, draft, head, tokenizer


def contestants(args, target, draft, head, ends: list[int], vocab_size: int) -> dict:
    """name -> function of a prompt [1, T], whose result has `sequences`, and `stats` where it is
    ours."""
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    options |= {"eos_token_id": ends, "vocab_size": vocab_size}
    shapes = [{"branching": branching, "beam": False} for branching in args.branching or []]
    shapes += [{"branching": branching, "beam": True} for branching in args.beam or []]
    calls = {"alone": partial(speculative_generate, target, None, **options)}
    for name, model in (("draft", draft), ("head", head)):
        if model is None:
            continue
        calls[name] = partial(speculative_generate, target, model, gamma=args.gamma, **options)
        for shape in shapes:
            label = f"{name} {tree_name(**shape)}"
            calls[label] = partial(tree_generate, target, model, **shape, **options)
    return calls if args.own else calls | transformers_ways(args, target, draft, ends)


def transformers_ways(args, target, draft, ends: list[int]) -> dict:
    """transformers' own contestants. Sets the models' generation_config."""
    drafts = [draft] if fits_transformers(target, draft) else []
    measure.make_greedy(target, drafts, ends, args.max_new_tokens, args.gamma)
    sampling = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0}

    def generate(ids, **drafting):
        with inference(target, *drafts):
            return target.generate(ids, return_dict_in_generate=True, **sampling, **drafting)

    ways = {"generate": generate, "lookup": partial(generate, prompt_lookup_num_tokens=args.gamma)}
    if drafts:
        ways["assisted"] = partial(generate, assistant_model=draft)
    return ways


def fits_transformers(target, draft) -> bool:
    """Whether assisted generation takes the draft: output heads must have equal sizes."""
    if draft is None or hasattr(draft.get_output_embeddings(), "token_ids"):
        return False
    return draft.config.vocab_size == target.config.vocab_size


class Turn(NamedTuple):
    """A prompt, decoded by a contestant."""

    seconds: float
    tokens: list[int]  # the new ones
    stats: Stats | None = None  # of our own contestants


def decode_in_turn(calls: dict, prompts: list, ends: list[int], device) -> dict[str, list[Turn]]:
    """By contestant. The first prompt is decoded once more before, to warm up."""
    turns = {name: [] for name in calls}
    for number, ids in enumerate([prompts[0], *prompts]):
        for name in measure.rotated(calls, number):
            torch.manual_seed(number)
            started = clock(device)
            output = calls[name](ids)
            seconds = clock(device) - started
            if number:
                tokens = until_end(output.sequences[0, ids.shape[1] :].tolist(), ends)
                turns[name].append(Turn(seconds, tokens, getattr(output, "stats", None)))
    return turns


def summary(turns: dict[str, list[Turn]]) -> dict:
    """By contestant: the speed-up over "alone" with its interval, milliseconds a token (a median
    too), of our own ways tau (tokens per target call) and alpha (of a tree: the share of judged
    levels that go on), the share of prompts where the text is that of "alone", and tokens per
    second by prompt."""
    rates = {name: [len(turn.tokens) / turn.seconds for turn in own] for name, own in turns.items()}
    results = {}
    for name, own_rates in rates.items():
        ratios = [rate / alone for rate, alone in zip(own_rates, rates["alone"], strict=True)]
        pairs = zip(turns[name], turns["alone"], strict=True)
        same = [turn.tokens == alone.tokens for turn, alone in pairs]
        stats = sum((turn.stats for turn in turns[name] if turn.stats), Stats())
        results[name] = {
            "speedup": statistics.median(ratios),
            "interval": median_interval(ratios),
            "ms_per_token": 1000 / statistics.median(own_rates),
            "tau": stats.tau if stats.target_calls else None,
            "alpha": stats.alpha if stats.rounds else None,
            "same_text": statistics.mean(same),
            "tokens_per_second": [float(f"{rate:.5g}") for rate in own_rates],
        }
    return results


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="extras.bench_drafts", description=__doc__)
    add = parser.add_argument
    add("--target", required=True, help="folder or Hub id of the target")
    add("--draft", help="folder or Hub id of a draft")
    add("--head", help="folder of an EAGLE head of the target")
    add("--dtype", type=one_of(DTYPES), default="float32", help="of all models")
    add("--temperature", type=decimal(0, math.inf), default=0.0, help="0: greedy")
    shapes = {"type": node_counts, "action": "append"}
    add("--branching", **shapes, help="a tree: children of a node, as in 3,1; again for another")
    add("--beam", **shapes, help="a tree with so many nodes a level, as in 3,2; again for another")
    add("--own", action="store_true", help="without transformers' own ways")
    measure.add_decoding_flags(parser)
    measure.add_device_flag(parser)
    add("--json", help="write all figures to this file")
    args = measure.parse(parser, argv)
    target, draft, head, tokenizer = load(args)
    prompts, source = measure.load_prompts(args, tokenizer, args.device)
    ends = models.end_tokens(target, tokenizer, args.chat)
    for ids in prompts:
        check_prompt([m for m in (target, draft) if m is not None], ids, None, args.max_new_tokens)
    calls = contestants(args, target, draft, head, ends, len(tokenizer))
    results = summary(decode_in_turn(calls, prompts, ends, args.device))
    print(
        f"{len(prompts)} prompts ({source}), gamma {args.gamma}, temperature {args.temperature:g}"
    )
    print("tokens per second over those of the target alone: median over prompts (95% interval)")
    width = max(map(len, results))
    for name, result in results.items():
        low, high = result["interval"]
        speed = f"{result['speedup']:.2f} ({low:.2f} to {high:.2f})"
        line = f"  {name:<{width}} {speed}, {result['ms_per_token']:.1f} ms a token"
        if result["tau"]:
            line += f", tau {result['tau']:.2f}"
        if result["alpha"] is not None:
            line += f", alpha {result['alpha']:.3f}"
        if args.temperature == 0:
            line += f", same text {result['same_text']:.0%}"
        print(line)
    protocol = {"prompts": source, "count": len(prompts), "max_new_tokens": args.max_new_tokens}
    protocol |= {"gamma": args.gamma, "temperature": args.temperature, "dtype": args.dtype}
    measure.save(args, {"protocol": protocol | {"device": str(args.device)}, "speeds": results})


if __name__ == "__main__":
    run_command(main, "extras.bench_drafts")
