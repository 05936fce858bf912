"""What makes a model faster on this machine: a draft, an EAGLE head, or transformers' own ways.

    python -m extras.rivals --target T --draft D --head H --prompts FILE --chat --dtype bfloat16

Each prompt is decoded alone, by each contestant in turn: "alone" (the target, by
autoregressive_generate), "draft" and "head" (speculative_generate with --draft and with --head),
and of transformers "generate" (the target), "lookup" (prompt lookup, which needs no draft: it
copies up to gamma tokens from where the last ones stood before) and "assisted" (assisted generation
with --draft, where that has a whole output head). Speeds are in tokens per second of "alone" at the
same prompt: the median over prompts and its 95% interval. At temperature 0 all write the target's
greedy text, in bfloat16 up to near-ties.
"""

import math
import statistics
from functools import partial

import torch

import models
from cli import Parser, decimal, one_of, run_command
from evaluate import clock, median_interval
from extras import measure
from extras.eagle import Eagle
from speculative import (
    autoregressive_generate,
    check_prompt,
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
    return target, draft, head, tokenizer


def contestants(args, target, draft, head, ends: list[int]) -> dict:
    """name -> function of a prompt [1, T] that returns sequences. Models have their weights
    packed."""
    generator = torch.Generator(target.device).manual_seed(0)
    options = {"max_new_tokens": args.max_new_tokens, "eos_token_id": ends}
    options |= {"temperature": args.temperature, "generator": generator}

    def speculative(drafting, ids):
        return speculative_generate(target, drafting, ids, gamma=args.gamma, **options).sequences

    calls = {"alone": lambda ids: autoregressive_generate(target, ids, **options)}
    if draft is not None:
        calls["draft"] = partial(speculative, draft)
    if head is not None:
        calls["head"] = partial(speculative, head)
    for model in filter(None, (target, draft, head)):
        pack_weights(model)
    drafts = [draft] if draft is not None and is_whole(draft) else []
    measure.make_greedy(target, drafts, ends, args.max_new_tokens, args.gamma)
    sampling = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0}
    calls["generate"] = partial(target.generate, **sampling)
    calls["lookup"] = partial(calls["generate"], prompt_lookup_num_tokens=args.gamma)
    if drafts:
        calls["assisted"] = partial(calls["generate"], assistant_model=draft)
    return calls


def is_whole(draft) -> bool:
    """Whether transformers can decode with it: not with a short output head."""
    return not hasattr(draft.get_output_embeddings(), "token_ids")


def compare(calls: dict, prompts: list, ends: list[int], device) -> dict:
    """Each contestant's tokens per second by prompt, in turns; the first prompt is decoded once
    more before, to warm up."""
    rates = {name: [] for name in calls}
    for number, ids in enumerate([prompts[0], *prompts]):
        for name in measure.rotated(calls, number):
            started = clock(device)
            sequences = calls[name](ids)
            seconds = clock(device) - started
            tokens = until_end(sequences[0, ids.shape[1] :].tolist(), ends)
            if number:
                rates[name].append(len(tokens) / seconds)
    return rates


def speeds(rates: dict) -> dict:
    """By contestant: tokens per second over those of "alone", the median over prompts with its
    interval, and milliseconds a token, likewise a median."""
    results = {}
    for name, own in rates.items():
        ratios = [rate / alone for rate, alone in zip(own, rates["alone"], strict=True)]
        milliseconds = 1000 / statistics.median(own)
        results[name] = {"speedup": statistics.median(ratios), "interval": median_interval(ratios)}
        results[name]["ms_per_token"] = milliseconds
    return results


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="extras.rivals", description=__doc__)
    add = parser.add_argument
    add("--target", required=True, help="folder or Hub id of the target")
    add("--draft", help="folder or Hub id of a draft")
    add("--head", help="folder of an EAGLE head of the target")
    add("--dtype", type=one_of(DTYPES), default="float32", help="of all models")
    add("--temperature", type=decimal(0, math.inf), default=0.0, help="0: greedy")
    measure.add_decoding_flags(parser)
    measure.add_device_flag(parser)
    parser.add_argument("--json", help="write all figures to this file")
    args = measure.parse(parser, argv)
    target, draft, head, tokenizer = load(args)
    prompts, source = measure.load_prompts(args, tokenizer, args.device)
    ends = models.end_tokens(target, tokenizer, args.chat)
    for ids in prompts:
        check_prompt((target,), ids, None, args.max_new_tokens)
    calls = contestants(args, target, draft, head, ends)
    results = speeds(compare(calls, prompts, ends, args.device))
    print(
        f"{len(prompts)} prompts ({source}), gamma {args.gamma}, temperature {args.temperature:g}"
    )
    print("tokens per second over those of the target alone: median over prompts (95% interval)")
    for name, result in results.items():
        low, high = result["interval"]
        speed = f"{result['speedup']:.2f} ({low:.2f} to {high:.2f})"
        print(f"  {name:<9} {speed}, {result['ms_per_token']:.1f} ms a token")
    protocol = {"prompts": source, "count": len(prompts), "max_new_tokens": args.max_new_tokens}
    protocol |= {"gamma": args.gamma, "temperature": args.temperature, "dtype": args.dtype}
    measure.save(args, {"protocol": protocol | {"device": str(args.device)}, "speeds": results})


if __name__ == "__main__":
    run_command(main, "extras.rivals")
