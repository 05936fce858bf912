"""Benchmarks, a subcommand each: ratios against a named baseline, measured interleaved in one process.

    python bench.py drop-layers --target DIR --out DIR --first 3 --last 3   # a draft made of the target's own layers
    python bench.py decode --target DIR --draft DIR --data-dir DIR --json decode.json

Contestants of a comparison take turns, in an order that rotates, so that whatever else slows the machine slows all; a ratio is
formed within each round of turns, and reported as the median over rounds with the smallest and the largest.
"""

import argparse
import functools
import json
import os
import platform
import shlex
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F

import data
import speculative
from run_all import clock, versions
from speculative import Stats, autoregressive_generate, expected_acceptance, simulate_rounds, speculative_generate

GAMMAS = range(1, 11)  # what the recommendation chooses from
ALLOWED = 0.10  # how far the predicted speed-up may be from the measured one


# What the subcommands share


def machine() -> dict:
    """What a timing depends on: processor, threads, versions."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line] if info.is_file() else []
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cpu = names[0] if names else platform.processor()
    return {"cpu": cpu, "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu, **versions()}


def spread(values) -> dict:
    """Median, smallest and largest of what was measured in each round."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "rounds": list(values)}


def show(name: str, ratio: dict) -> None:
    print(f"{name:<62} {ratio['median']:6.3f}x  ({ratio['low']:.3f} to {ratio['high']:.3f})", flush=True)


def take_turns(contestants: dict, device, turn: int) -> tuple[dict, dict]:
    """Call every contestant once, beginning with number `turn`; name -> seconds, name -> result."""
    seconds, results, names = {}, {}, list(contestants)
    first = turn % len(names)
    for name in names[first:] + names[:first]:
        start = clock(device)
        results[name] = contestants[name]()
        seconds[name] = clock(device) - start
    return seconds, results


class Forwards:
    """How often a model's forward ran and how long that took, while `counted(...)` is open."""

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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, out = Path(args.target), Path(args.out)
    if not source.is_dir():
        raise ValueError(f"no such folder: {source}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: --out must be a new or empty folder")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    before = model.config.num_hidden_layers, model.num_parameters()
    drop_layers(model, args.first, args.last).save_pretrained(out)
    if any((source / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")):
        AutoTokenizer.from_pretrained(source).save_pretrained(out)
    print(f"{out}: {model.config.num_hidden_layers} of {before[0]} layers, {model.num_parameters() / before[1]:.0%} of the parameters")


# decode


def predicted_speedup(tau: float, gamma: float, c: float, v: float, o: float) -> float:
    """tau / (gamma c + v + o): tokens a round over its cost, in units of what a token of the target alone costs.

    tau: tokens a round; gamma: drafts a round; c: a draft step; v: the target scoring gamma + 1 positions; o: all else.
    """
    return tau / (gamma * c + v + o)


def recommend(predictions: dict[int, float]) -> int:
    """The gamma of the largest predicted speed-up; of equals the smallest."""
    return max(sorted(predictions), key=predictions.get)


class Marks:
    """on_tokens that notes when a round ended and how many tokens there were: [(seconds, tokens), ...]."""

    def __init__(self, device):
        self.device, self.marks = device, []

    def __call__(self, row, tokens, accepted):
        self.marks.append((clock(self.device), (self.marks[-1][1] if self.marks else 0) + len(tokens)))

    def steady(self, limit: int, gamma: int) -> tuple[float, int, int]:
        """(seconds, tokens, rounds) of the rounds after the first, which has the prompt in it, that could use gamma drafts."""
        full = [i for i in range(1, len(self.marks)) if self.marks[i - 1][1] + gamma + 1 <= limit]
        if not full:
            return 0.0, 0, 0
        (start, before), (end, after) = self.marks[0], self.marks[full[-1]]
        return end - start, after - before, len(full)


def decode_prompts(args, tokenizer) -> tuple[list[str], str]:
    """The prompts and, in words, where they come from."""
    if args.prompts:
        texts = speculative._read_prompts(SimpleNamespace(prompt=None, prompts=args.prompts))
        return texts[: args.batch], f"{args.prompts}, the first {args.batch}"
    task = "gsm8k" if args.data_dir else "arithmetic"
    rows = data.load_rows(task, "test", args.data_dir, args.batch)
    return [data.TASKS[task].prompt(row) for row in rows], f"{task} test, the first {args.batch} rows"


def step_seconds(target, draft, tokens, gammas, repeats: int) -> tuple[list, list, dict]:
    """Forwards timed one at a time, with `tokens` [1, L] in the caches: lists of seconds.

    Returns (target steps, draft steps, {gamma: target scoring gamma + 1 positions}); the draft steps come in fives, as in decoding.
    """
    lanes = [speculative._Lane(model, tokens, None, model.config.vocab_size, 0) for model in (target, draft)]
    target_lane, draft_lane = lanes
    length = tokens.shape[1]
    steps, draft_steps, scores = [], [], {gamma: [] for gamma in gammas}

    def timed(lane, forwards, n, into):
        before = forwards.seconds
        lane.forward(tokens[:, :n] if n <= length else tokens[:, :1].expand(1, n), keep=n)
        into.append(forwards.seconds - before)

    with speculative._inference(target, draft), counted(target, draft) as (on_target, on_draft):
        for lane in lanes:
            lane.forward(tokens)
        for _ in range(repeats):
            for gamma in scores:
                timed(target_lane, on_target, gamma + 1, scores[gamma])
                target_lane.rollback([length])
            for _ in range(5):
                timed(target_lane, on_target, 1, steps)
                timed(draft_lane, on_draft, 1, draft_steps)
            for lane in lanes:
                lane.rollback([length])
    return steps, draft_steps, scores


def decode_command(args) -> None:
    result = decode(args)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


def decode(args) -> dict:
    """Speculative decoding against transformers' and against the target alone, its overhead, and the cost model."""
    import transformers
    from transformers import GenerationConfig

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    speculative._check_arguments(gamma=args.gamma, max_new_tokens=args.max_new_tokens)
    for flag in ("batch", "rounds"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (target, tokenizer), (draft, other) = (speculative._load(name, torch.float32, device) for name in (args.target, args.draft))
    speculative.check_tokenizers(tokenizer, other)
    texts, source = decode_prompts(args, tokenizer)
    prompts = [torch.tensor([tokenizer(text).input_ids], dtype=torch.long, device=device) for text in texts]
    for ids in prompts:
        speculative._check_prompt((target, draft), ids, None, args.max_new_tokens)
    width = max(ids.shape[1] for ids in prompts)
    padded = torch.cat([F.pad(ids, (width - ids.shape[1], 0)) for ids in prompts])
    mask = torch.cat([F.pad(torch.ones_like(ids), (width - ids.shape[1], 0)) for ids in prompts])
    end = target.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    pad = end[0] if isinstance(end, list) else end or 0
    limit, gamma = args.max_new_tokens, args.gamma
    ours = {"max_new_tokens": limit, "eos_token_id": end, "pad_token_id": pad}

    # transformers: plain greedy, and gamma drafts a round whatever happens
    target.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    draft.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=pad, num_assistant_tokens=gamma, num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )  # fmt: skip

    def theirs(ids, attention_mask, assistant=None):
        return target.generate(
            ids, attention_mask=attention_mask, assistant_model=assistant, max_new_tokens=limit, do_sample=False
        )

    def alone(ids):
        return {
            "speculative": lambda: speculative_generate(target, draft, ids, gamma=gamma, on_tokens=marks["speculative"], **ours),
            "assisted": lambda: theirs(ids, torch.ones_like(ids), draft),
            "autoregressive": lambda: autoregressive_generate(target, ids, on_tokens=marks["autoregressive"], **ours),
            "generate": lambda: theirs(ids, torch.ones_like(ids)),
        }

    together = {
        "speculative batch": lambda: speculative_generate(target, draft, padded, mask, gamma=gamma, **ours),
        "autoregressive batch": lambda: autoregressive_generate(target, padded, mask, **ours),
        "generate batch": lambda: theirs(padded, mask),
    }

    def tokens(output, start: int) -> list[int]:
        """The new tokens of one row, up to the first end token."""
        row = output[start:].tolist()
        ends = [i for i, token in enumerate(row) if token in (end if isinstance(end, list) else [end])]
        return row[: ends[0] + 1] if ends else row

    seconds, steady, stats, written, texts_of = [], {"speculative": [], "autoregressive": []}, [], [], None
    measured_steps = [], [], {n: [] for n in sorted({*GAMMAS, gamma})}
    lengths = [ids.shape[1] for ids in prompts]
    context = min(getattr(model.config, "max_position_embeddings", 2**20) for model in (target, draft))
    for number in range(args.rounds + 1):  # the first is the warm-up, in which the tokens are compared
        total, found = dict.fromkeys([*alone(prompts[0]), *together], 0.0), {name: [0.0, 0, 0] for name in steady}
        texts_of = {name: [] for name in total}
        for turn, ids in enumerate(prompts):
            marks = {name: Marks(device) for name in steady}
            spent, outputs = take_turns(alone(ids), device, number + turn)
            for name, output in outputs.items():
                total[name] += spent[name]
                texts_of[name].append(tokens(getattr(output, "sequences", output)[0], ids.shape[1]))
            stats += [outputs["speculative"].stats] if number == 0 else []
            for name, drafts in (("speculative", gamma), ("autoregressive", 0)):
                found[name] = [a + b for a, b in zip(found[name], marks[name].steady(limit, drafts), strict=True)]
        spent, outputs = take_turns(together, device, number)
        total |= spent
        for name, output in outputs.items():
            texts_of[name] = [tokens(row, width) for row in getattr(output, "sequences", output)]
        for name, texts in texts_of.items():
            if texts != texts_of["autoregressive"]:
                row = next(i for i, pair in enumerate(zip(texts, texts_of["autoregressive"], strict=True)) if pair[0] != pair[1])
                raise ValueError(f"{name}: other tokens than the target alone for prompt {row}: nothing to compare")
        written = texts_of["autoregressive"]
        if number:
            seconds.append(total)
            for name, values in found.items():
                steady[name].append(values)
            middle = min(statistics.mean(lengths) + statistics.mean(map(len, written)) / 2, context - max(measured_steps[2]) - 6)
            row = max(range(len(prompts)), key=lambda i: lengths[i] + len(written[i]))
            history = torch.cat([prompts[row], torch.tensor([written[row]], device=device)], 1)[:, : max(1, int(middle))]
            new = step_seconds(target, draft, history, measured_steps[2], args.repeats)
            measured_steps[0].extend(new[0])
            measured_steps[1].extend(new[1])
            for n, values in new[2].items():
                measured_steps[2][n].extend(values)

    stats = sum(stats, Stats())
    generated = sum(map(len, written))
    names = {
        "speculative_vs_assisted": ("assisted", "speculative", "speculative, one by one / transformers' assisted generation"),
        "batch_vs_assisted": ("assisted", "speculative batch", f"speculative, batch {len(prompts)} / transformers' assisted in turn"),
        "autoregressive_vs_generate": ("generate", "autoregressive", "autoregressive_generate / transformers' generate"),
        "autoregressive_batch_vs_generate": ("generate batch", "autoregressive batch", f"the same, batch {len(prompts)}"),
        "speculative_vs_autoregressive": ("autoregressive", "speculative", "speculative / the target alone, one by one"),
        "batch_vs_autoregressive_batch": ("autoregressive batch", "speculative batch", f"the same, batch {len(prompts)}"),
    }
    ratios = {name: spread([s[top] / s[bottom] for s in seconds]) for name, (top, bottom, _) in names.items()}

    # Once more with clocks around the forwards: what the loops themselves cost, and how many drafts transformers makes.
    overhead, forwards = {}, {}
    for name in [*alone(prompts[0]), *together]:
        with counted(target, draft) as both:
            wall = clock(device)
            for ids in prompts[: 1 if name in together else None]:
                marks = dict.fromkeys(steady)
                (together if name in together else alone(ids))[name]()
            wall = clock(device) - wall
        inside = sum(each.seconds for each in both)
        calls = {"target_calls": both[0].calls, "draft_calls": both[1].calls}
        forwards[name] = calls | {"outside_forwards": wall - inside, "seconds": wall}
        overhead[name] = 1 - inside / wall
    mine, other = forwards["speculative"], forwards["assisted"]
    fewest = mine["draft_calls"] - gamma * len(prompts)  # transformers stops drafting at an end token
    if other["target_calls"] != mine["target_calls"] or not fewest <= other["draft_calls"] <= mine["draft_calls"]:
        raise ValueError(f"transformers does not draft {gamma} tokens a round: {other} against {mine}")

    # The cost model, in units of a token of the target alone: its forward and its share of the loop.
    step, draft_step, score = (statistics.median(measured_steps[0]), statistics.median(measured_steps[1]),
                               {n: statistics.median(values) for n, values in measured_steps[2].items()})  # fmt: skip
    unit = step + forwards["autoregressive"]["outside_forwards"] / forwards["autoregressive"]["target_calls"]
    c, v = draft_step / unit, {n: value / unit for n, value in score.items()}
    o = mine["outside_forwards"] / mine["target_calls"] / unit
    model = {"unit_seconds": unit, "target_step_seconds": step, "c": c, "v": v[gamma], "o": o}
    rounds_measured = sum(values[2] for values in steady["speculative"])
    if rounds_measured and all(values[1] for values in steady["autoregressive"]):
        tau = sum(values[1] for values in steady["speculative"]) / rounds_measured
        pairs = zip(steady["speculative"], steady["autoregressive"], strict=True)
        measured = spread([(spec[1] / spec[0]) / (auto[1] / auto[0]) for spec, auto in pairs])
        predicted = predicted_speedup(tau, gamma, c, v[gamma], o)
        model |= {"tau": tau, "predicted": predicted, "measured": measured, "error": predicted / measured["median"] - 1}

    # Acceptance at every token of the target's own text, in one pass, gives tau for any gamma.
    ratio = []
    for ids, new in zip(prompts, written, strict=True):
        text = torch.cat([ids, torch.tensor([new], device=device)], 1)
        labels = text.clone()
        labels[:, : ids.shape[1]] = -100
        ratio.append(expected_acceptance(target, draft, text, labels, temperature=0.0).ratio)
    sweep = {}
    for n in GAMMAS:
        simulated = simulate_rounds(torch.cat(ratio), [len(new) for new in written], n, limit)
        drafts = simulated.stats.drafted / simulated.stats.target_calls  # n, less what the limit cuts off at the end
        sweep[n] = {"tau": simulated.tau, "drafts": drafts, "v": v[n]}
        sweep[n]["predicted"] = predicted_speedup(simulated.tau, drafts, c, v[n], o)
    best = recommend({n: row["predicted"] for n, row in sweep.items()})

    print(f"{len(prompts)} prompts, {generated} tokens, gamma {gamma}: alpha {stats.alpha:.3f}, tau {stats.tau:.2f}; the same tokens from all")
    for name, (_, _, label) in names.items():
        show(label, ratios[name])
    for name in ("speculative", "speculative batch", "autoregressive", "assisted"):
        print(f"outside model forwards, {name + ':':<38} {overhead[name]:6.1%} of the time")
    print(f"cost model: c {c:.3f}, v {v[gamma]:.3f}, o {o:.4f}; a token of the target alone takes {unit * 1e3:.2f} ms")
    if "predicted" in model:
        print(
            f"speed-up once the prompt is read: predicted {predicted:.3f}, measured {measured['median']:.3f} "
            f"({measured['low']:.3f} to {measured['high']:.3f}); error {model['error']:+.1%}, allowed {ALLOWED:.0%}"
        )
    else:
        print("speed-up once the prompt is read: no round is long enough to measure; raise --max-new-tokens")
    print("gamma      " + "".join(f"{n:>7}" for n in sweep))
    print("tau        " + "".join(f"{row['tau']:7.2f}" for row in sweep.values()))
    print("speed-up   " + "".join(f"{row['predicted']:7.2f}" for row in sweep.values()))
    print(f"recommended gamma: {best}" + ("" if sweep[best]["predicted"] > 1 else " (but the target alone is faster)"))
    return {
        "command": shlex.join(["python", "bench.py", *(args.argv or [])]),
        "protocol": {
            "prompts": source, "prompt_tokens": lengths, "new_tokens": [len(new) for new in written], "max_new_tokens": limit,
            "gamma": gamma, "temperature": 0, "dtype": "float32", "rounds": args.rounds, "device": str(device),
        },
        "machine": machine(),
        "alpha": stats.alpha,
        "tau": stats.tau,
        "ratios": ratios,
        "overhead": overhead,
        "forwards": forwards,
        "cost_model": model,
        "sweep": sweep,
        "recommended_gamma": best,
        "tokens_per_second": {name: statistics.median(generated / s[name] for s in seconds) for name in seconds[0]},
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; 0, or 2 after one line on stderr for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)

    add = commands.add_parser("drop-layers", help="make a draft of the target's first and last layers").add_argument
    add("--target", required=True, help="folder of the target")
    add("--out", required=True, help="folder to make: an ordinary from_pretrained folder with the target's tokenizer")
    add("--first", type=int, required=True, help="how many of the first layers to keep")
    add("--last", type=int, required=True, help="how many of the last layers to keep")

    add = commands.add_parser("decode", help="decoding against transformers', and the cost model").add_argument
    add("--target", required=True, help="folder or Hub id")
    add("--draft", required=True, help="folder or Hub id")
    add("--prompts", help='JSON lines with a "prompt" each (default: rows of the offline task)')
    add("--data-dir", help="take the prompts from <data-dir>/gsm8k/test.jsonl")
    add("--gamma", type=int, default=5, help="tokens drafted a round")
    add("--max-new-tokens", type=int, default=64)
    add("--batch", type=int, default=8, help="prompts: decoded one by one, and all at once")
    add("--rounds", type=int, default=5, help="rounds of turns that ratios are formed in")
    add("--repeats", type=int, default=3, help="times each forward is timed for the cost model in a round")
    add("--json", help="write all figures to this file")

    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    try:
        {"drop-layers": drop_layers_command, "decode": decode_command}[args.benchmark](args)
    except (ValueError, OSError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
