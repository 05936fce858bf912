"""Benchmarks, a subcommand each: ratios against a named baseline, measured interleaved in one process.

    python bench.py drop-layers --target DIR --out DIR --first 3 --last 3   # a draft made of the target's own layers
    python bench.py decode --target DIR --draft DIR --data-dir DIR --json decode.json
    python bench.py train --data-dir DIR --json train.json                  # our training step against the official one
    python bench.py faults --kills 20                                       # killed runs end in the files of untouched ones
    python bench.py scale --json scale.json                                 # its growth with tokens, vocabulary, chunk, ranks
    python bench.py engines --target DIR --draft DIR DIR --vllm-python P --openvino-python P   # our counts against engines'

Contestants of a comparison take turns, in an order that rotates, so that whatever else slows the machine slows all; a ratio is
formed within each round of turns, and reported as the median over rounds with the smallest and the largest.
"""

import argparse
import copy
import ctypes
import functools
import gc
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPTNeoXConfig
from transformers.loss.loss_utils import ForCausalLMLoss

import data
import engines
import run_all
import speculative
import train
from adaspec import token_kl
from run_all import clock, versions
from speculative import Stats, autoregressive_generate, expected_acceptance, simulate_rounds, speculative_generate

GAMMAS = range(1, 11)  # what the recommendation chooses from
RATIOS = {  # name -> the contestants, whose seconds are divided, and what the ratio says
    "speculative_vs_assisted": ("assisted", "speculative", "speculative / transformers' assisted generation, one by one"),
    "batch_vs_assisted": ("assisted", "speculative batch", "speculative, as a batch / assisted generation, one by one"),
    "autoregressive_vs_generate": ("generate", "autoregressive", "autoregressive / transformers' generate, one by one"),
    "batch_autoregressive_vs_generate": ("generate batch", "autoregressive batch", "the same, as a batch"),
    "speculative_vs_autoregressive": ("autoregressive", "speculative", "speculative / autoregressive, one by one"),
    "batch_speculative_vs_autoregressive": ("autoregressive batch", "speculative batch", "the same, as a batch"),
}


# What the subcommands share


def machine() -> dict:
    """What a timing depends on: processor, threads, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu, **versions()}


def save(args, result: dict) -> None:
    """Write the result, with the command and the machine, to --json."""
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["python", "bench.py", *args.argv])
        made_by = {"command": command, "machine": machine(), "git": run_all.git_commit()}
        Path(args.json).write_text(json.dumps(made_by | result, indent=1) + "\n")


def spread(values) -> dict:
    """Median, smallest and largest of what was measured in each round."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "rounds": list(values)}


class Forwards:
    """How often a model's forward ran, and the seconds it took."""

    def __init__(self):
        self.calls, self.seconds = 0, 0.0


@contextmanager
def counted(*models):
    """Put a clock around the forward of each model; gives a `Forwards` each. (On a GPU it waits for every forward.)"""
    found = [Forwards() for _ in models]
    for model, forwards in zip(models, found, strict=True):

        def timed(*args, _forward=model.forward, _found=forwards, _device=model.device, **kwargs):
            start = clock(_device)
            output = _forward(*args, **kwargs)
            _found.seconds += clock(_device) - start
            _found.calls += 1
            return output

        model.forward = functools.wraps(model.forward)(timed)  # wraps: transformers looks at its signature
    try:
        yield found
    finally:
        for model in models:
            del model.forward


# drop-layers


def drop_layers(model, first: int, last: int):
    """Keep only the first and the last decoder layers of a model, in place, and the rest of it as it is; returns it.

    Raises ValueError where that leaves no layer or asks for more than there are.
    """
    config, base = model.config, model.base_model
    count = config.num_hidden_layers  # of CodeGen too: an alias of its n_layer
    if first < 0 or last < 0 or not 1 <= first + last <= count:
        raise ValueError(f"first {first} + last {last} layers: must be at least 1 and at most the model's {count}")
    kept = [*range(first), *range(count - last, count)]
    found = [(name, m) for name, m in base.named_children() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__}: expected one list of {count} decoder layers, found {len(found)}")
    name, layers = found[0]
    setattr(base, name, torch.nn.ModuleList(layers[i] for i in kept))
    for index, layer in enumerate(getattr(base, name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # its place in a cache
    for setting, value in list(vars(config).items()):
        if "layer" in setting and isinstance(value, (list, tuple)) and len(value) == count:  # such as layer_types
            vars(config)[setting] = [value[i] for i in kept]
    config.num_hidden_layers = len(kept)
    return model


def drop_layers_command(args) -> None:
    source, out = Path(args.target), Path(args.out)
    if not source.is_dir():
        raise ValueError(f"no such folder: {source}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: --out must be a new or empty folder")
    speculative.check_model(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
    before = model.config.num_hidden_layers, model.num_parameters()
    drop_layers(model, args.first, args.last).save_pretrained(out)
    if any((source / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")):
        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(out)
    share = model.num_parameters() / before[1]
    print(f"{out}: {model.config.num_hidden_layers} of {before[0]} layers, {share:.0%} of the parameters")


# decode


def predicted_speedup(tau: float, gamma: float, c: float, v: float, o: float) -> float:
    """tau / (gamma c + v + o): tokens a round over its cost, in units of what a token of the target alone costs.

    tau: tokens a round; gamma: drafts a round; c: a draft step; v: the target scoring gamma + 1 positions; o: all else.
    """
    return tau / (gamma * c + v + o)


def break_even(tau: float, gamma: float, v: float, o: float) -> float:
    """The c at which `predicted_speedup` is 1. Below 0: not even a draft that costs nothing would gain."""
    return (tau - v - o) / gamma


def recommend(predictions: dict[int, float]) -> int:
    """The gamma of the largest predicted speed-up; of equals the smallest."""
    return max(sorted(predictions), key=predictions.get)


class Turn:
    """One contestant's turn: decode, with clocks around the forwards where `watched`. Turns of several prompts add up.

    Notes when each round ended (as on_tokens), to tell the steady state from the first round, which has the prompt in it.
    """

    def __init__(self, contestant, pair, device, watched: bool, limit: int, gamma: int):
        with counted(*pair) if watched else nullcontext([Forwards(), Forwards()]) as self.forwards:
            self.device, self.marks = device, []
            start = clock(device)
            output = contestant(self.note)
            self.seconds = clock(device) - start
        self.output, self.stats = getattr(output, "sequences", output), getattr(output, "stats", None)
        self.calls = [each.calls for each in self.forwards]
        self.inside = sum(each.seconds for each in self.forwards)
        # The steady state: rounds after the first that could use all gamma drafts.
        self.steady, full = dict.fromkeys(("seconds", "inside", "tokens", "rounds"), 0), 0
        for number in range(1, len(self.marks)):
            full = number if self.marks[number - 1]["tokens"] + gamma + 1 <= limit else full
        if full:
            self.steady = {key: value - self.marks[0][key] for key, value in self.marks[full].items()}

    def note(self, row, tokens, accepted):
        last = self.marks[-1] if self.marks else {"tokens": 0, "rounds": 0}
        mark = {"seconds": clock(self.device), "inside": sum(each.seconds for each in self.forwards)}
        self.marks.append(mark | {"tokens": last["tokens"] + len(tokens), "rounds": last["rounds"] + 1})


def total(turns: list[Turn]) -> dict:
    """The turns of one contestant in one round, summed."""
    summed = {"seconds": sum(turn.seconds for turn in turns), "inside": sum(turn.inside for turn in turns)}
    summed["target_calls"], summed["draft_calls"] = (sum(turn.calls[i] for turn in turns) for i in range(2))
    return summed | {"steady": {key: sum(turn.steady[key] for turn in turns) for key in turns[0].steady}}


def decode_prompts(args, tokenizer, device) -> tuple[list, str]:
    """The first --batch prompts, token ids [1, T] each, and where they come from, in words."""
    if args.prompts:
        texts, source = speculative._read_prompts(SimpleNamespace(prompt=None, prompts=args.prompts)), args.prompts
    else:
        task = "gsm8k" if args.data_dir else "arithmetic"
        texts = [data.TASKS[task].prompt(row) for row in data.load_rows(task, "test", args.data_dir, args.batch)]
        source = f"{task} test"
    if args.chat:
        if not tokenizer.chat_template:
            raise ValueError(f"--chat: the tokenizer of {args.target} has no chat template")
        texts = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(text, add_generation_prompt=True, tokenize=False) for text in texts]
        source += ", chat template"
    tokens = [tokenizer(text, add_special_tokens=not args.chat).input_ids for text in texts[: args.batch]]
    return [torch.tensor([ids], dtype=torch.long, device=device) for ids in tokens], source


class Steps:
    """Seconds of single forwards: target steps, draft steps, and the target scoring gamma + 1 positions, by gamma."""

    def __init__(self):
        self.target, self.draft, self.scoring = [], [], {}

    def measure(self, pair, text, length: int, gammas, repeats: int) -> None:
        """Add measurements with about `length` of the tokens text [1, T] in the caches."""
        context = min(getattr(model.config, "max_position_embeddings", math.inf) for model in pair)
        length = max(1, min(length, text.shape[1], context - max(gammas) - 1))
        target, draft = (speculative._Lane(model, text, None, model.config.vocab_size, 0) for model in pair)
        block = text[:, :1].expand(1, max(gammas) + 1)  # which tokens they are costs nothing
        with speculative._inference(*pair), counted(*pair) as (target.clock, draft.clock):
            for lane in (target, draft):
                lane.length = [0]
                lane.forward(text[:, :length])

            def seconds(lane, n):
                before = lane.clock.seconds
                lane.forward(block[:, :n], keep=n)
                spent = lane.clock.seconds - before
                lane.rollback([length])
                return spent

            for _ in range(repeats):
                for gamma in gammas:
                    self.scoring.setdefault(gamma, []).append(seconds(target, gamma + 1))
                    self.draft.append(seconds(draft, 1))
                    self.target.append(seconds(target, 1))


def decode_command(args) -> None:
    result = decode(args)
    report(result)
    save(args, result)


def response(row, ends: list[int]) -> list[int]:
    """New tokens up to the first end token."""
    row = row.tolist()
    return row[: min([i + 1 for i, token in enumerate(row) if token in ends], default=len(row))]


def end_tokens(target, tokenizer) -> list[int]:
    end = target.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    return [] if end is None else end if isinstance(end, list) else [end]


def make_greedy(target, drafts, ends: list[int], limit: int, gamma: int) -> None:
    """Have transformers decode plainly and greedily, with gamma drafts a round whatever happens."""
    plain = {"eos_token_id": ends or None, "pad_token_id": ends[0] if ends else 0, "max_new_tokens": limit, "do_sample": False}
    fixed = {"num_assistant_tokens": gamma, "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    target.generation_config = GenerationConfig(**plain)
    for draft in drafts:
        draft.generation_config = GenerationConfig(**plain, **fixed)


def decode(args) -> dict:
    """Speculative decoding against transformers' and against the target alone, its overhead, and the cost model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target, draft, tokenizer = speculative.load_pair(args.target, args.draft, torch.float32, device)
    pair, limit, gamma = (target, draft), args.max_new_tokens, args.gamma
    prompts, source = decode_prompts(args, tokenizer, device)
    for ids in prompts:
        speculative._check_prompt(pair, ids, None, limit)
    width = max(ids.shape[1] for ids in prompts)
    padded = torch.cat([F.pad(ids, (width - ids.shape[1], 0)) for ids in prompts])
    mask = torch.cat([F.pad(torch.ones_like(ids), (width - ids.shape[1], 0)) for ids in prompts])
    ends = end_tokens(target, tokenizer)
    ours = {"max_new_tokens": limit, "eos_token_id": ends}
    make_greedy(target, [draft], ends, limit, gamma)

    def contestants(ids, mask):
        """Name -> f(on_tokens): all four ways to decode one prompt, or the three that can decode a batch."""
        called = {
            "speculative": lambda note: speculative_generate(target, draft, ids, mask, gamma=gamma, on_tokens=note, **ours),
            "assisted": lambda note: target.generate(ids, attention_mask=mask, assistant_model=draft),
            "autoregressive": lambda note: autoregressive_generate(target, ids, mask, on_tokens=note, **ours),
            "generate": lambda note: target.generate(ids, attention_mask=mask),
        }
        return called if len(ids) == 1 else {f"{name} batch": f for name, f in called.items() if name != "assisted"}

    def take_turns(ids, mask, number, watched):
        """Every contestant once, beginning with another one each time: name -> its turn. All must write the same tokens."""
        called = list(contestants(ids, mask).items())
        first = number % len(called)
        turns = {
            name: Turn(f, pair, device, watched, limit, gamma if "speculative" in name else 0)
            for name, f in called[first:] + called[:first]
        }
        texts = {name: [response(row[ids.shape[1] :], ends) for row in turn.output] for name, turn in turns.items()}
        for name, text in texts.items():
            if text != texts[called[-1][0]]:
                raise ValueError(f"{name} and {called[-1][0]} write different tokens: nothing to compare")
        return turns, texts[called[-1][0]]

    def one_round(number, watched):
        """Every prompt alone, then all at once: name -> the contestant's turns; and what was written, by prompt."""
        alone = [take_turns(ids, torch.ones_like(ids), number + i, watched) for i, ids in enumerate(prompts)]
        found = {name: [turns[name] for turns, _ in alone] for name in alone[0][0]}
        written = [text for _, texts in alone for text in texts]
        if len(prompts) > 1:
            turns, texts = take_turns(padded, mask, number, watched)
            found |= {name: [turn] for name, turn in turns.items()}
            if texts != written:
                raise ValueError("a batch and its prompts alone give different tokens: nothing to compare")
        return found, written

    take_turns(prompts[0], torch.ones_like(prompts[0]), 0, False)  # warm up
    on_gpu = device.type == "cuda"  # there the clocks get a round of their own, since they slow decoding down
    rounds, steps, written = [], Steps(), None
    for number in range(args.rounds + on_gpu):
        watched = not on_gpu or number == args.rounds
        found, written = one_round(number, watched)
        rounds.append({name: total(turns) for name, turns in found.items()})
        stats = sum((turn.stats for turn in found["speculative"]), Stats())
        if watched:
            text = [torch.cat([ids[0], ids.new_tensor(new)]) for ids, new in zip(prompts, written, strict=True)]
            steps.measure(pair, max(text, key=len)[None], sum(map(len, text)) // len(text), {*GAMMAS, gamma}, args.repeats)
    clocked, timed = rounds[-1:] if on_gpu else rounds, rounds[: args.rounds]

    mine, theirs = clocked[0]["speculative"], clocked[0]["assisted"]
    fewest = mine["draft_calls"] - gamma * len(prompts)  # transformers' draft stops at an end token
    if theirs["target_calls"] != mine["target_calls"] or not fewest <= theirs["draft_calls"] <= mine["draft_calls"]:
        raise ValueError(f"transformers does not draft {gamma} tokens a round: {theirs} against {mine}")

    lengths = [len(new) for new in written]
    ratios = {
        name: spread([each[top]["seconds"] / each[bottom]["seconds"] for each in timed])
        for name, (top, bottom, _) in RATIOS.items()
        if bottom in timed[0]
    }
    cost = cost_model(steps, timed, clocked, gamma)
    ratio = [acceptance(pair, ids, new) for ids, new in zip(prompts, written, strict=True)]
    sweep = {}
    for n in GAMMAS:
        simulated = simulate_rounds(torch.cat(ratio), lengths, n, limit)
        drafts = simulated.stats.drafted / simulated.stats.target_calls  # n, less what the limit cuts off at the end
        prediction = predicted_speedup(simulated.tau, drafts, cost["c"], cost["v"][n], cost["o"])
        sweep[n] = {"tau": simulated.tau, "drafts": drafts, "predicted": prediction}
    return {
        "protocol": {
            "prompts": source, "prompt_tokens": [ids.shape[1] for ids in prompts], "new_tokens": lengths,
            "max_new_tokens": limit, "gamma": gamma, "temperature": 0, "dtype": "float32",
            "rounds": args.rounds, "device": str(device),
        },
        "alpha": stats.alpha,
        "tau": stats.tau,
        "ratios": ratios,
        "overhead": {
            name: spread([1 - each[name]["inside"] / each[name]["seconds"] for each in clocked]) for name in clocked[0]
        },
        "calls": {name: {key: mine[key] for key in ("target_calls", "draft_calls")} for name, mine in clocked[0].items()},
        "tokens_per_second": {name: spread([sum(lengths) / each[name]["seconds"] for each in timed]) for name in timed[0]},
        "cost_model": cost,
        "sweep": sweep,
        "recommended_gamma": recommend({n: row["predicted"] for n, row in sweep.items()}),
    }  # fmt: skip


def acceptance(pair, ids, new: list[int]) -> torch.Tensor:
    """Where the draft's argmax is the target's own next token, along what the target wrote after the prompt `ids` [1, T]."""
    text = torch.cat([ids, ids.new_tensor([new])], 1)
    labels = text.clone()
    labels[:, : ids.shape[1]] = -100
    return expected_acceptance(*pair, text, labels, temperature=0.0).ratio


def cost_model(steps, timed, clocked, gamma: int) -> dict:
    """c, v by gamma and o, in units of what a token of the target alone costs; the speed-up they predict, and the measured one.

    Both are of the steady state: without the round that reads the prompt and the rounds that the limit cuts short.
    """
    alone, ours = ([each[name]["steady"] for each in clocked] for name in ("autoregressive", "speculative"))

    def per_round(each, key):
        return each[key] / max(1, each["rounds"])

    def outside(rounds):  # median, since a single hiccup of the machine is as long as many loops
        return statistics.median(per_round(each, "seconds") - per_round(each, "inside") for each in rounds)

    target_step, draft_step = statistics.median(steps.target), statistics.median(steps.draft)
    unit = target_step + outside(alone)
    cost = {"unit_seconds": unit, "target_step_seconds": target_step, "c": draft_step / unit}
    cost["v"] = {n: statistics.median(seconds) / unit for n, seconds in sorted(steps.scoring.items())}
    cost["o"] = outside(ours) / unit
    alone, ours = ([each[name]["steady"] for each in timed] for name in ("autoregressive", "speculative"))
    if all(each["rounds"] for each in alone + ours):
        rate = [b["tokens"] / b["seconds"] / (a["tokens"] / a["seconds"]) for a, b in zip(alone, ours, strict=True)]
        cost |= {"tau": per_round(ours[0], "tokens"), "measured": spread(rate)}
        cost["predicted"] = predicted_speedup(cost["tau"], gamma, cost["c"], cost["v"][gamma], cost["o"])
        cost["error"] = cost["predicted"] / cost["measured"]["median"] - 1
    return cost


def report(result: dict) -> None:
    """The figures of `decode`, for a person."""
    protocol, cost, sweep = result["protocol"], result["cost_model"], result["sweep"]
    gamma, best = protocol["gamma"], result["recommended_gamma"]
    new = protocol["new_tokens"]
    print(f"{len(new)} prompts ({protocol['prompts']}), {sum(new)} new tokens, the same from all")
    print(f"gamma {gamma}, alpha {result['alpha']:.3f}, tau {result['tau']:.2f}")
    print("ratios of tokens per second: median of the rounds (low to high)")
    for name, ratio in result["ratios"].items():
        print(f"  {RATIOS[name][2]:<66} {ratio['median']:6.3f}  ({ratio['low']:.3f} to {ratio['high']:.3f})")
    print("time outside of model forwards")
    for name, share in result["overhead"].items():
        print(f"  {name:<66} {share['median']:6.1%}  ({share['low']:.1%} to {share['high']:.1%})")
    print(f"cost model, in tokens of the target alone ({cost['unit_seconds'] * 1e3:.2f} ms): c {cost['c']:.3f}, "
          f"v {cost['v'][gamma]:.3f}, o {cost['o']:.4f}")  # fmt: skip
    if "measured" in cost:
        measured = cost["measured"]
        print(f"  speed-up after the first round: predicted {cost['predicted']:.3f}, measured {measured['median']:.3f} "
              f"({measured['low']:.3f} to {measured['high']:.3f}), error {cost['error']:+.1%}")  # fmt: skip
    else:
        print("  no speed-up measured: no full round after the first; raise --max-new-tokens")
    for name, values in (
        ("gamma", [f"{n:7}" for n in sweep]),
        ("tau", [f"{row['tau']:7.2f}" for row in sweep.values()]),
        ("speed-up", [f"{row['predicted']:7.2f}" for row in sweep.values()]),
    ):
        print(f"  {name:<10}" + "".join(values))
    print(f"recommended gamma: {best}" + ("" if sweep[best]["predicted"] > 1 else " (but the target alone is faster)"))


# engines


# How an engine comes to count otherwise than we do. Applied one after the other to a replay of the text: without any the
# counts must be ours, with all the engine's own, to the token.
RULES = {
    "prompt": "reads the prompt in a target call of its own, without drafts",
    "limit": "drafts gamma tokens also where max_new_tokens leaves room for fewer",
    "stop": "the draft stops at an end token",
    "end": "counts what lies beyond the end of the text",
    "own": "takes the last token for the target's own, drafted or not",
    "last": "leaves the last target call out of its counts",
}
ENGINES = {
    "ours": [],
    "transformers": ["stop", "own"],
    "vllm": ["prompt", "limit", "end"],
    "openvino": ["prompt", "stop", "last"],
}
COUNTS = ("target_calls", "drafted", "accepted")  # and then the accepted by draft position, where an engine has them


def replay(text: list[int], new: int, propose, limit: int, gamma: int, ends: list[int], rules) -> list[int]:
    """The counts of decoding the first `new` tokens of `text` by `rules`, without an engine.

    text: the target's own, gamma tokens or more beyond `new`; propose(start): the gamma tokens [gamma] that the draft writes
    after text[:start].
    """
    calls, drafted, by_position, start = 0, 0, [0] * gamma, 0
    if "prompt" in rules:
        calls = start = 1
    while start < new:
        drafts = propose(start)[: gamma if "limit" in rules else min(gamma, limit - start - 1)]
        drafts = response(drafts, ends if "stop" in rules else [])
        kept = next((i for i, token in enumerate(drafts) if token != text[start + i]), len(drafts))
        left, start = new - start, start + kept + 1
        if kept >= left and "end" not in rules:  # the text ended on an accepted draft
            drafts, kept = drafts[:left], left - ("own" in rules)
        calls += 1
        if start < new or "last" not in rules:
            drafted += len(drafts)
            by_position[:kept] = [count + 1 for count in by_position[:kept]]
    # OpenVINO, with no drafts counted because the last target call was the only one, reckons accepted as tokens less calls
    accepted = new - calls if "last" in rules and not drafted else sum(by_position)
    return [calls, drafted, accepted, *by_position]


def local_server(engine: str, target, draft, ends: list[int], limit: int, gamma: int):
    """What a worker of engines.py is, as a function: our sampler or transformers, in this process."""
    options = {"max_new_tokens": limit, "eos_token_id": ends, "gamma": gamma}

    def answer(prompt):
        ids = torch.tensor([prompt], device=target.device)
        with counted(*filter(None, (target, draft))) as (calls, *steps):
            start = clock(target.device)
            if engine == "ours":
                output = speculative_generate(target, draft, ids, **options)
            else:
                output = target.generate(ids, attention_mask=torch.ones_like(ids), assistant_model=draft)
            found = {"seconds": clock(target.device) - start}
        found["tokens"] = getattr(output, "sequences", output)[0, len(prompt) :].tolist()
        if draft:
            found["drafting"] = steps[0].calls, steps[0].seconds
            # transformers has no counts: every target call gives one token of the target's own, the others were drafted
            found["counts"] = [calls.calls, steps[0].calls, len(found["tokens"]) - calls.calls]
        if draft and engine == "ours":
            accepted = output.stats.per_position[0]
            found["counts"] = [*(getattr(output.stats, name) for name in COUNTS), *accepted, *[0] * (gamma - len(accepted))]
        return found

    return lambda prompts: [answer(prompt) for prompt in prompts]


def start_worker(engine: str, python: str, settings: dict, log: Path, stack: ExitStack):
    """The version of an engine, and serve(prompts) by a process of its own, which ends with `stack`."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    openmp = Path(python).parents[1] / "lib" / "libiomp5.so"
    if engine == "vllm" and openmp.is_file():  # it asks for it, or drafting is slow
        environment["LD_PRELOAD"] = str(openmp)
    command, pipes = (
        [python, engines.__file__, engine, json.dumps(settings)],
        dict.fromkeys(("stdin", "stdout"), subprocess.PIPE),
    )
    with log.open("w") as errors:
        process = stack.enter_context(subprocess.Popen(command, env=environment, text=True, stderr=errors, **pipes))
    stack.callback(process.kill)

    def answer():
        if line := process.stdout.readline():
            return json.loads(line)
        lines = log.read_text(errors="replace").strip().splitlines() or ["without a word"]
        raise ValueError(f"{engine} stopped: " + next((line for line in reversed(lines) if "Error" in line), lines[-1]).strip())

    def serve(prompts):
        print(json.dumps(prompts), file=process.stdin, flush=True)
        return answer()

    return answer()["version"], serve


def export_openvino(path: str, out: Path, python: str) -> str:
    command = engines.export_command(path, str(out), str(Path(python).with_name("optimum-cli")))
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"cannot export {path} to OpenVINO: {done.stderr.strip().splitlines()[-1]}")
    return str(out)


def engines_command(args) -> None:
    """A target with each draft in each engine: tokens that must be ours, counts explained to the token, speed-ups."""
    pythons = {engine: path for engine, path in (("vllm", args.vllm_python), ("openvino", args.openvino_python)) if path}
    for engine, python in pythons.items():
        if not Path(python).is_file():
            raise ValueError(f'--{engine}-python: no such file: {python} (the README\'s "Serve it" makes one)')
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save(args, compare_engines(args, pythons, folder, stack))


def compare_engines(args, pythons: dict[str, str], folder: Path, stack: ExitStack) -> dict:
    device, limit, gamma = torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.max_new_tokens, args.gamma
    paths = [args.target, *args.draft]
    loaded = [speculative.load_pair(args.target, path, torch.float32, device) for path in args.draft]
    (target, _, tokenizer), drafts = loaded[0], [draft for _, draft, _ in loaded]
    if len({model.config.vocab_size for model in (target, *drafts)}) > 1:
        paths = [engines.cut_vocabulary(path, str(folder / f"cut{i}")) for i, path in enumerate(paths)]
        target, *drafts = (speculative._load(path, torch.float32, device) for path in paths)
    names = [Path(path).name for path in args.draft]
    names = names if len({*names}) == len(names) else args.draft
    models, prompts, source = dict(zip(names, drafts, strict=True)), *decode_prompts(args, tokenizer, device)
    ends = end_tokens(target, tokenizer)
    if not ends:
        raise ValueError(f"{args.target}: no end token; set eos_token_id in its generation_config.json")
    for ids in prompts:
        speculative._check_prompt((target, *drafts), ids, None, limit + gamma + 1)

    make_greedy(target, drafts, ends, limit, gamma)
    settings = {"gamma": gamma, "max_new_tokens": limit, "ends": ends}
    servers, versions = {}, {"transformers": transformers.__version__}
    for name in (None, *names):
        servers |= {(e, name): local_server(e, target, models.get(name), ends, limit, gamma) for e in ("ours", "transformers")}
    for engine, python in pythons.items():
        folders = paths
        if engine == "openvino":
            folders = [export_openvino(path, folder / f"openvino{i}", python) for i, path in enumerate(paths)]
        for name, path in zip([None, *names], [None, *folders[1:]], strict=True):
            why = name and engines.unservable(engine, [model.config.model_type for model in (target, models[name])])
            if why:
                print(f"{engine} cannot serve {name}: {why}")
                continue
            pair = {"target": folders[0], "draft": path} | settings
            versions[engine], servers[engine, name] = start_worker(engine, python, pair, folder / f"{len(servers)}.log", stack)

    beyond = [autoregressive_generate(target, ids, max_new_tokens=limit + gamma + 1)[0, ids.shape[1] :] for ids in prompts]
    texts, token_ids = [response(row[:limit], ends) for row in beyond], [ids[0].tolist() for ids in prompts]
    found, new = {name: {} for name in names}, sum(map(len, texts))
    for (engine, name), serve in servers.items():  # this also warms up
        answers = serve(token_ids)
        for number, (text, answer) in enumerate(zip(texts, answers, strict=True), 1):
            if answer["tokens"] != text:
                raise ValueError(f"{engine}, {name}: prompt {number} gives {answer['tokens']}, the target alone {text}")
        if name:
            counts = [each["counts"] for each in answers]
            found[name][engine] = explain(engine, name, counts, models[name], prompts, beyond, texts, limit, gamma, ends)

    turns, order = {key: [] for key in servers}, list(servers)
    for number in range(args.rounds):
        for key in order[number % len(order) :] + order[: number % len(order)]:
            answers = servers[key](token_ids)
            turns[key].append(np.sum([(each["seconds"], *each.get("drafting", (0, 0))) for each in answers], 0).tolist())
    for (engine, name), taken in turns.items():
        if name:
            found[name][engine] |= speed(turns[engine, None], taken, new, found[name][engine]["counts"]["target_calls"])
    for name, by_engine in found.items():
        report_engines(name, by_engine, len(texts))
    protocol = {"prompts": source, "new_tokens": [*map(len, texts)], "max_new_tokens": limit, "gamma": gamma, "temperature": 0}
    protocol |= {"dtype": "float32", "rounds": args.rounds, "versions": versions}
    return {"protocol": protocol, "drafts": found}


def explain(engine, name, counted_by_it, draft, prompts, beyond, texts, limit, gamma, ends) -> dict:
    """An engine's counts, ours, and what each of its rules adds to ours, summed over prompts.

    Raises ValueError for a prompt whose counts are not those of the replay with all the engine's rules.
    """
    rules, replayed = ENGINES[engine], []
    for number, (counts, ids, row, text) in enumerate(zip(counted_by_it, prompts, beyond, texts, strict=True), 1):
        whole, width = torch.cat([ids[0], row])[None], ids.shape[1]

        @functools.cache
        def propose(start, whole=whole, width=width):
            return autoregressive_generate(draft, whole[:, : width + start], max_new_tokens=gamma)[0, width + start :]

        steps = [replay(row.tolist(), len(text), propose, limit, gamma, ends, rules[:n]) for n in range(len(rules) + 1)]
        if counts != steps[-1][: len(counts)]:
            raise ValueError(f"{engine}, {name}, prompt {number}: counts {counts}, and its rules give {steps[-1]}")
        replayed.append(steps)
    totals = np.sum(replayed, 0)  # [1 + rules, counts]

    def named(counts):
        return dict(zip(COUNTS, counts, strict=False)) | {"accepted_by_position": counts[len(COUNTS) :]}

    return {
        "identical_prompts": len(texts),
        "counts": named(np.sum(counted_by_it, 0).tolist()),
        "ours": named(totals[0].tolist()),
        "added_to_ours": {RULES[rule]: named(more) for rule, more in zip(rules, np.diff(totals, axis=0).tolist(), strict=True)},
    }


def speed(alone, taken, new: int, calls: int) -> dict:
    """The speed-up over the target alone in the same engine, and the terms of its cost model, prompts included.

    alone, taken: by round, (seconds, draft steps, seconds in them); new: tokens written; calls: target calls.
    """
    unit = statistics.median(seconds for seconds, _, _ in alone) / new
    steps, c = taken[0][1] / calls, statistics.median(spent / steps for _, steps, spent in taken) / unit
    rest = statistics.median(seconds for seconds, _, _ in taken) / calls / unit - steps * c
    cost = {"unit_seconds": unit, "tau": new / calls, "drafts": steps, "c": c, "v+o": rest}
    cost["break_even_c"] = break_even(cost["tau"], steps, rest, 0)
    return {"speedup": spread([a[0] / b[0] for a, b in zip(alone, taken, strict=True)]), "cost_model": cost}


def report_engines(name: str, by_engine: dict, prompts: int) -> None:
    """What `engines` found about one draft, for a person."""
    for engine, found in by_engine.items():
        cost, speedup = found["cost_model"], found["speedup"]
        print(f"{name} in {engine}: the target's own tokens for {prompts} of {prompts} prompts")
        for key in COUNTS:
            terms = [f" {more[key]:+d} ({rule})" for rule, more in found["added_to_ours"].items() if more[key]]
            ours = f" = ours {found['ours'][key]}{''.join(terms)}" if engine != "ours" else ""
            print(f"  {key} {found['counts'][key]}{ours}")
        print(
            "  speed-up {median:.2f} ({low:.2f} to {high:.2f})".format(**speedup)
            + ", tau {tau:.2f}, {drafts:.1f} drafts a call at c {c:.3f}, v + o {v+o:.2f}".format(**cost)
        )
        if speedup["median"] <= 1:
            free = cost["break_even_c"] <= 0
            print("  no gain" + (", even if drafts were free" if free else f": that takes c below {cost['break_even_c']:.3f}"))


# train


# The paper's shapes: a batch of 8 x 256 tokens, 45% of them responses; the pythia pair's vocabulary and widths
PAPER = {"vocab_size": 50304, "target_width": 2048, "draft_width": 256, "rows": 8, "length": 256, "prompt": 141}


def timed(call, device) -> float:
    start = clock(device)
    call()
    return clock(device) - start


def peak_memory(call, device) -> int:
    """Bytes that `call` needs at its peak, beyond what is there before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def status(field):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier work has freed would hide what this call takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def interleaved(calls: dict, rounds: int, device, repeat: dict | None = None) -> dict:
    """Seconds of each call, `rounds` times in turn after one warm-up round; a turn has `repeat[name]` calls (1) in a row."""
    for call in calls.values():
        call()
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times = (repeat or {}).get(name, 1)
            seconds[name].append(sum(timed(call, device) for _ in range(times)) / times)
    return seconds


def official_loss(target_logits, reference_logits, draft_logits, labels, k):
    """The loss of CustomTrainer in the authors' utils.py (github.com/yuezhouhu/adaspec), restated: shifted copies, masked
    selects, three float32 softmaxes, KLDivLoss twice, quantile."""
    keep = (labels[:, 1:] != -100).flatten()[:, None]
    target_logits, reference_logits, draft_logits = (
        logits[:, :-1].flatten(0, 1).masked_select(keep).view(-1, logits.shape[-1]).float()
        for logits in (target_logits, reference_logits, draft_logits)
    )
    p, divergence = F.softmax(target_logits, dim=-1), nn.KLDivLoss(reduction="none")
    draft_kl = divergence(F.log_softmax(draft_logits, dim=-1), p).sum(-1)
    reference_kl = divergence(F.log_softmax(reference_logits, dim=-1), p).sum(-1)
    gap = draft_kl - reference_kl
    return draft_kl.masked_select(gap >= torch.quantile(gap, 1 - k)).mean()


def official_step(target, reference, draft, input_ids, labels, k, dtype):
    """The official training step up to the gradients: three full forwards, logits at all positions, an attention mask.

    Its forwards are given the labels, as there: each model so computes a cross-entropy in float32 that nobody asks for.
    """
    mask = torch.arange(input_ids.shape[1], device=input_ids.device) <= (labels != -100).cumsum(1).argmax(1)[:, None]
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "use_cache": False}
    with torch.autocast(input_ids.device.type, dtype, enabled=dtype != torch.float32):
        outputs = draft(**inputs)
    with torch.no_grad():
        frozen = [model(**inputs) for model in (target, reference)]
    official_loss(*(output.logits for output in frozen), outputs.logits, labels, k).backward()


def loss_step_calls(shape, dtype, device, k=0.4):
    """The loss step alone, from hidden states to the gradients of hidden states and output head: official and ours."""
    torch.manual_seed(0)
    vocabulary = shape["vocab_size"]

    def head(width, dtype):
        return nn.Linear(width, vocabulary, bias=False, device=device, dtype=dtype)

    def hidden(width, dtype):
        return torch.randn(shape["rows"], shape["length"], width, device=device, dtype=dtype)

    heads = [head(shape["target_width"], dtype), head(shape["draft_width"], dtype), head(shape["draft_width"], torch.float32)]
    states = [
        hidden(shape["target_width"], dtype),
        hidden(shape["draft_width"], dtype),
        hidden(shape["draft_width"], torch.float32),
    ]
    states[2].requires_grad_()
    labels = torch.randint(vocabulary, (shape["rows"], shape["length"]), device=device)
    labels[:, : shape["prompt"]] = -100
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def official():
        states[2].grad = heads[2].weight.grad = None
        with amp:
            logits = heads[2](states[2])
        kept = ForCausalLMLoss(logits, labels, vocabulary)  # what a model that is given labels computes, and its graph
        with torch.no_grad():
            frozen = [head(state) for head, state in zip(heads[:2], states[:2], strict=True)]
            for each in frozen:
                ForCausalLMLoss(each, labels, vocabulary)
        official_loss(*frozen, logits, labels, k).backward()
        del kept

    index = (F.pad(labels[:, 1:], (0, 1), value=-100) != -100).flatten().nonzero().squeeze(-1)
    target_head, reference_head, draft_head = (
        train.Head(SimpleNamespace(get_output_embeddings=lambda head=head: head), vocabulary) for head in heads
    )
    cached = states[0].flatten(0, 1)[index]
    frozen = SimpleNamespace(hidden=lambda batch: cached, head=target_head)
    reference_kl = reference_head.per_token(states[1].flatten(0, 1)[index], run_all.target_logits(frozen, None), token_kl)
    objective = run_all.selective_distillation(frozen, lambda batch: reference_kl, k)

    def ours():
        states[2].grad = heads[2].weight.grad = None
        with amp:
            loss, count = objective(states[2].flatten(0, 1).index_select(0, index), draft_head, SimpleNamespace(progress=0))
        (loss / count).backward()

    return {"official": official, "ours": ours}, (states[2], heads[2].weight)


def neox(vocab_size, width, layers, heads, device, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = GPTNeoXConfig(vocab_size=vocab_size, max_position_embeddings=2048, **sizes)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def whole_step_calls(dtype, device, folder, k=0.4):
    """A whole training step at the paper's shapes, random weights: three models, clipping and AdamW included."""
    vocabulary = PAPER["vocab_size"]
    target = neox(vocabulary, 2048, 24, 16, device, dtype).eval()
    reference, draft = neox(vocabulary, 256, 6, 8, device, dtype, 1).eval(), neox(vocabulary, 256, 6, 8, device, seed=2)
    rng = np.random.default_rng(0)
    examples = [
        data.Example(rng.integers(0, vocabulary, PAPER["length"], dtype=np.int32), PAPER["prompt"])
        for _ in range(PAPER["rows"])
    ]
    input_ids, labels = (t.to(device) for t in data.collate(examples))
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-5, weight_decay=0.1, fused=True)

    def finish():
        nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def official():
        official_step(target, reference, draft, input_ids, labels, k, dtype)
        finish()

    frozen, asked = train.Frozen(target, vocabulary), train.Frozen(reference, vocabulary)
    hidden = train.TokenCache(folder / "hidden", "bench", examples, 2048, dtype)
    kl = train.TokenCache(folder / "kl", "bench", examples, 1, torch.float32)
    first_epoch = timed(lambda: hidden.fill(frozen.hidden, device, PAPER["rows"], "target"), device)
    frozen.cache = hidden
    kl.fill(lambda b: asked.head.per_token(asked.hidden(b), run_all.target_logits(frozen, b), token_kl), device, 8, "reference")
    student = train._Student(draft, vocabulary, run_all.selective_distillation(frozen, lambda b: kl.read(b).squeeze(1), k))
    draft.train()

    def ours():
        batch = train.make_batch(examples, list(range(len(examples))), device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss, count = student(batch)
        (loss / count).backward()
        finish()

    return {"official": official, "ours": ours}, first_epoch


def epoch_calls(rows, limit, device, folder, k=0.4):
    """An epoch of stage 2 on the tiny pair, float32, batch 16: official steps, and the loop of train.py."""
    task = "gsm8k" if rows else "arithmetic"
    rows = rows or data.load_rows("arithmetic", "train", limit=limit)
    spec, pair = data.TASKS[task], run_all.PAIRS["tiny"]
    tokenizer = data.train_tokenizer([spec.prompt(r) + spec.response(r) for r in rows], run_all.SCRATCH_VOCABULARY)
    examples, _ = data.encode(task, rows, tokenizer)
    vocabulary, lengths = len(tokenizer), [len(e.input_ids) for e in examples]
    target = run_all.scratch_model(pair.target, tokenizer, 0).to(device).eval()
    reference, draft = (run_all.scratch_model(pair.draft, tokenizer, seed).to(device) for seed in (1, 2))
    hyper = {"lr": 1e-3, "epochs": 1, "batch_size": 16, "vocab_size": vocabulary}

    def official():
        model = copy.deepcopy(draft).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        for group in data.batches(lengths, 16, 0, 0):
            input_ids, labels = (t.to(device) for t in data.collate([examples[i] for i in group]))
            official_step(target, reference, model, input_ids, labels, k, torch.float32)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    frozen, asked = train.Frozen(target, vocabulary), train.Frozen(reference, vocabulary)
    hidden = train.TokenCache(folder / "hidden", "epoch", examples, pair.target["hidden_size"], torch.float32)
    kl = train.TokenCache(folder / "kl", "epoch", examples, 1, torch.float32)
    hidden.fill(frozen.hidden, device, 16, "target")
    frozen.cache = hidden
    kl.fill(
        lambda b: asked.head.per_token(asked.hidden(b), run_all.target_logits(frozen, b), token_kl), device, 16, "reference"
    )
    objective = run_all.selective_distillation(frozen, lambda b: kl.read(b).squeeze(1), k)
    return {"official": official, "ours": lambda: train.train(copy.deepcopy(draft), examples, objective, **hyper)}


def loss_step_flops(shape, k=0.4) -> float:
    """Operations of our loss step: both heads over all response rows, then forward and backward for the selected."""
    rows = shape["rows"] * (shape["length"] - shape["prompt"])
    target, draft = (2 * shape["vocab_size"] * shape[name] for name in ("target_width", "draft_width"))
    return rows * (target + draft) + k * rows * (target + 3 * draft)


def product_rate(dtype, device) -> float:
    """The machine's rate of matrix products, operations a second, at the shape of a chunk times the target's head."""
    a, b = (torch.randn(n, PAPER["target_width"], dtype=dtype, device=device) for n in (train.CHUNK, PAPER["vocab_size"]))
    best = min(timed(lambda: F.linear(a, b), device) for _ in range(10))
    return 2 * a.shape[0] * a.shape[1] * b.shape[0] / best


def times_faster(seconds: dict) -> dict:
    return spread([a / b for a, b in zip(seconds["official"], seconds["ours"], strict=True)])


def train_command(args) -> None:
    """Ours against the official step: the loss step, an epoch of the tiny pair, the whole step at the paper's shapes."""
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), train.DTYPES[args.dtype]
    rows = data.load_rows("gsm8k", "train", args.data_dir, args.limit) if args.data_dir else None
    found, parts = {}, args.parts
    with tempfile.TemporaryDirectory() as folder:
        if "loss" in parts:
            calls, _ = loss_step_calls(PAPER, dtype, device)
            seconds, peaks = (
                interleaved(calls, args.rounds, device),
                {n: peak_memory(call, device) for n, call in calls.items()},
            )
            rate = loss_step_flops(PAPER) / min(seconds["ours"]) / product_rate(dtype, device)
            found["loss step, times faster"] = times_faster(seconds)
            found["loss step, times less peak memory"] = peaks["official"] / max(peaks["ours"], 1)
            found["loss step, share of the machine's matrix-product rate"] = rate
            del calls
        if "epoch" in parts:
            seconds = interleaved(epoch_calls(rows, args.limit, device, Path(folder, "epoch")), args.rounds, device)
            found["stage 2 epoch of the tiny pair, times faster"] = times_faster(seconds)
        if "step" in parts:
            calls, first = whole_step_calls(dtype, device, Path(folder, "step"))
            seconds = interleaved(calls, args.rounds, device, {"ours": 8})  # a training step comes after others of its kind
            found["whole step after the first epoch, times faster"] = times_faster(seconds)
            found["the pass that fills the cache, in official steps"] = first / statistics.median(seconds["official"])
    for name, value in found.items():
        print(
            f"{name}: " + ("{median:.2f} ({low:.2f}-{high:.2f})".format(**value) if isinstance(value, dict) else f"{value:.2f}")
        )
    save(args, {"dtype": args.dtype, "rounds": args.rounds, "data": "gsm8k" if rows else "arithmetic"} | found)


# scale


def scale_command(args) -> None:
    """How time and memory of our loss step grow with tokens, vocabulary and chunk, and what a second rank brings."""
    if args.worker:
        return scale_worker(args)
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), train.DTYPES[args.dtype]
    small = PAPER | {"rows": 8, "vocab_size": 12576}
    sweeps = {  # what is swept -> (its value, shape, chunk)
        "response tokens": [(115 * rows, small | {"rows": rows}, 256) for rows in (4, 8, 16, 32)],
        "vocabulary": [(size, small | {"vocab_size": size}, 256) for size in (6288, 12576, 25152, 50304)],
        "chunk": [(chunk, small, chunk) for chunk in (64, 128, 256, 512)],
    }
    found = {}
    for name, points in sweeps.items():
        calls = {value: chunked_call(shape, dtype, device, chunk) for value, shape, chunk in points}
        seconds = interleaved(calls, args.rounds, device, dict.fromkeys(calls, 5))
        least = points[0][0]
        found[name] = []
        for value, call in calls.items():
            time = spread([a / b for a, b in zip(seconds[value], seconds[least], strict=True)])
            found[name].append({"value": value, "time": time, "peak_MiB": round(peak_memory(call, device) / 2**20)})
            print(f"{name} {value}: time x {time['median']:.2f} ({time['low']:.2f}-{time['high']:.2f}), "
                  f"peak memory {found[name][-1]['peak_MiB']} MiB", flush=True)  # fmt: skip
    efficiency = []
    for _ in range(args.rounds):
        one, two = (ranks_seconds(ranks, args.dtype) for ranks in (1, 2))
        efficiency.append(one / (2 * two))
    found["parallel efficiency of 2 ranks"] = spread(efficiency)
    print(
        "2 gloo ranks against one, one thread each: efficiency {median:.2f} ({low:.2f}-{high:.2f})".format(**spread(efficiency))
    )
    save(args, {"dtype": args.dtype, "rounds": args.rounds} | found)


def chunked_call(shape, dtype, device, chunk):
    ours = loss_step_calls(shape, dtype, device)[0]["ours"]

    def call():
        before, train.CHUNK = train.CHUNK, chunk
        ours()
        train.CHUNK = before

    return call


def ranks_seconds(ranks: int, dtype: str) -> float:
    """Seconds that `scale_worker` takes on so many gloo processes with one thread each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*launcher, __file__, "scale", "--worker", "--dtype", dtype]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return float(subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def scale_worker(args) -> None:
    """Print the seconds of three steps of stage 2 with the paper's draft, 16 rows each, on the ranks torchrun has started."""
    device, dtype = train.setup(), train.DTYPES[args.dtype]
    vocabulary, rows, width = 12576, 16, PAPER["target_width"]
    draft = neox(vocabulary, PAPER["draft_width"], 6, 8, device, seed=2)
    rng = np.random.default_rng(0)
    examples = [data.Example(rng.integers(0, vocabulary, 256, dtype=np.int32), PAPER["prompt"]) for _ in range(rows)]
    head = nn.Linear(width, vocabulary, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(rows * PAPER["length"], width, device=device, dtype=dtype)
    target_head = train.Head(SimpleNamespace(get_output_embeddings=lambda: head), vocabulary)
    frozen = SimpleNamespace(hidden=lambda batch: hidden[: len(batch.index)], head=target_head)
    objective = run_all.selective_distillation(frozen, lambda batch: torch.zeros(len(batch.index), device=device), 0.4)
    hyper = {"lr": 1e-5, "batch_size": rows, "vocab_size": vocabulary, "dtype": args.dtype}
    train.train(draft, examples, objective, epochs=1, **hyper)
    seconds = train.train(draft, examples, objective, epochs=3, **hyper)["seconds"]
    if train.rank() == 0:
        print(seconds)
    if dist.is_initialized():
        dist.destroy_process_group()


# faults


FAULTY_RUN = "--preset tiny --limit 64 --max-steps 8 --epochs 2,2,2 --eval-prompts 8 --eval-batch 2 --timed-prompts 1".split()


def difference(ours: Path, theirs: Path) -> str | None:
    """What differs between two finished runs, times aside: a model's file, or a row of the results. None: nothing does."""
    models = [{path.relative_to(out): path for path in Path(out).rglob("*.safetensors")} for out in (ours, theirs)]
    if models[0].keys() != models[1].keys():
        return f"models: {sorted(map(str, models[0].keys() ^ models[1].keys()))}"
    for name, path in models[0].items():
        if path.read_bytes() != models[1][name].read_bytes():
            return str(name)
    results = [json.loads(Path(out, "results.json").read_text()) for out in (ours, theirs)]
    times = dict.fromkeys(
        "speedup speedup_by_gamma tokens_per_second seconds_per_response cost_ratio scoring_ratio seconds".split()
    )
    rows = [[row | times for row in result["rows"]] for result in results]
    return None if rows[0] == rows[1] else "results.json"


def faults_command(args) -> None:
    """Kill runs of the tiny pair (SIGKILL) at random moments, start them again, compare with one that was never touched."""
    environment, draw = {**os.environ, "OMP_NUM_THREADS": "1"}, np.random.default_rng(args.seed)

    def begin(out):
        command = [sys.executable, run_all.__file__, *FAULTY_RUN, "--save-minutes", "0.001", "--out", str(out)]
        process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        while "train rows" not in (line := process.stdout.readline()):
            if not line:
                raise ValueError(f"the run ended before its first stage: {shlex.join(command)}")
        return process, time.monotonic()

    def left(process):
        """What the run prints from now on, to its end."""
        printed = process.communicate()[0].splitlines()
        return [line.split(":")[0].strip() for line in printed if line.startswith("  ")]

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(args.out or folder)
        if (folder / "whole").exists():
            raise ValueError(f"{folder} holds runs already: --out must be a new folder")
        process, start = begin(folder / "whole")
        left(process)
        length, found = time.monotonic() - start, []
        for number in range(args.kills):
            out = folder / f"killed-{number}"
            process, start = begin(out)
            time.sleep(draw.uniform(0, length))
            process.kill()
            after = (left(process) or ["nothing"])[-1]
            after = "its end" if process.returncode == 0 else after
            process, _ = begin(out)
            left(process)
            if process.returncode:
                raise ValueError(f"the run that was killed after {after} does not end when started again (see {out})")
            found.append({"killed_after": after, "difference": difference(folder / "whole", out)})
            print(f"kill {number + 1}, after {after}: {found[-1]['difference'] or 'the same files'}", flush=True)
        same = sum(each["difference"] is None for each in found)
        print(f"{same} of {args.kills} killed runs ended in the same files")
        save(args, {"run": FAULTY_RUN, "seed": args.seed, "same": same, "kills": found})
        if same < args.kills:
            raise ValueError("a killed run ended in other files: exact resume is broken")


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; 0, or 2 after one line on stderr for what the user can mend."""
    parser = speculative.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)

    add = commands.add_parser("drop-layers", help="make a draft of the target's first and last layers").add_argument
    add("--target", required=True, help="folder of the target")
    add("--out", required=True, help="folder to make: an ordinary from_pretrained folder with the target's tokenizer")
    add("--first", type=int, required=True, help="how many of the first layers to keep")
    add("--last", type=int, required=True, help="how many of the last layers to keep")

    decode = commands.add_parser("decode", help="decoding against transformers', and the cost model")
    decode.add_argument("--draft", required=True, help="folder or Hub id")
    decode.add_argument("--repeats", type=int, default=3, help="times each forward is timed for the cost model in a round")
    served = commands.add_parser("engines", help="tokens, counts and speed-ups in the engines people serve with")
    served.add_argument("--draft", required=True, nargs="+", help="folders")
    served.add_argument("--vllm-python", help="python of an environment with vLLM")
    served.add_argument("--openvino-python", help="python of one with OpenVINO GenAI and optimum-intel")
    for add in (decode.add_argument, served.add_argument):
        add("--target", required=True, help="folder or Hub id")
        add("--prompts", help='JSON lines with a "prompt" each (default: rows of the offline task)')
        add("--chat", action="store_true", help="put the prompts into the tokenizer's chat template")
        add("--data-dir", help="take the prompts from <data-dir>/gsm8k/test.jsonl")
        add("--gamma", type=int, default=5, help="tokens drafted a round")
        add("--max-new-tokens", type=int, default=64)
        add("--batch", type=int, default=8, help="prompts: decoded one by one (by decode also all at once)")
        add("--rounds", type=int, default=5, help="rounds of turns that ratios are formed in")
        add("--json", help="write all figures to this file")

    add = commands.add_parser("train", help="training against the official step").add_argument
    add(
        "--parts",
        type=run_all.some_of(["loss", "epoch", "step"]),
        default="loss,epoch,step",
        help="step: the whole step with a random 1.4B target, minutes on a CPU",
    )
    add("--data-dir", help="epoch over rows of <data-dir>/gsm8k/train.jsonl (default: the offline task)")
    add("--limit", type=int, default=300, help="rows of that epoch")
    add("--dtype", choices=train.DTYPES, default="bfloat16", help="of the loss step and the whole step; the epoch is float32")
    add("--rounds", type=int, default=3)
    add("--json", help="write all figures to this file")

    add = commands.add_parser("scale", help="how a step grows with tokens, vocabulary, chunk and ranks").add_argument
    add("--dtype", choices=train.DTYPES, default="bfloat16")
    add("--rounds", type=int, default=3)
    add("--json", help="write all figures to this file")
    add("--worker", action="store_true", help=argparse.SUPPRESS)

    add = commands.add_parser("faults", help="kill runs at random moments and see that they end in the same files").add_argument
    add("--kills", type=int, default=20)
    add("--seed", type=int, default=0)
    add("--out", help="keep the runs here (default: a temporary folder)")
    add("--json", help="write what was found to this file")

    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.argv = sys.argv[1:] if argv is None else argv
    try:
        for flag in ("gamma", "max_new_tokens", "batch", "rounds", "repeats", "limit", "kills"):
            if getattr(args, flag, 1) < 1:
                raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
        if getattr(args, "json", None):  # not after an hour of measuring
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            open(args.json, "a").close()
        commands = {
            "drop-layers": drop_layers_command,
            "decode": decode_command,
            "engines": engines_command,
            "train": train_command,
            "scale": scale_command,
            "faults": faults_command,
        }
        commands[args.benchmark](args)
    except (ValueError, OSError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
