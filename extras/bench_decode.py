"""Decoding against transformers' own, and the cost model that says which gamma pays here.

    python -m extras.bench_decode --target DIR --draft DIR --json decode.json
    python -m extras.bench_decode --shapes pythia --device cuda --json decode.json

The second has models with random weights in the sizes of a pair, and random prompts: what decoding
costs where no models are at hand. Such a draft is as good as never right, so that the seconds of
forwards (c, v and o) say more than the ratios do.

Greedy, float32. Five contestants decode each prompt alone: "speculative" (speculative_generate),
"assisted" (transformers' assisted generation, as many drafts a round), "lookup" (transformers'
prompt lookup, which needs no draft: it copies up to as many tokens from where the last ones stood
before), "autoregressive" and "generate" (transformers'). All but "assisted" and "lookup" also
decode all prompts as a batch. All must write the same tokens.
"""

import statistics
from collections import defaultdict
from contextlib import nullcontext
from functools import partial

import torch

import models
from cli import Parser, one_of, run_command
from costs import predicted_speedup, recommend
from evaluate import GAMMAS, clock, step_seconds
from extras import measure
from speculative import (
    Stats,
    autoregressive_generate,
    check_prompt,
    expected_acceptance,
    left_pad,
    simulate_rounds,
    speculative_generate,
    until_end,
)

RATIOS = {  # of tokens per second: name -> contestant, baseline
    "speculative_vs_assisted": ("speculative", "assisted"),
    "speculative_vs_lookup": ("speculative", "lookup"),
    "lookup_vs_generate": ("lookup", "generate"),
    "batch_vs_assisted": ("speculative batch", "assisted"),
    "autoregressive_vs_generate": ("autoregressive", "generate"),
    "batch_autoregressive_vs_generate": ("autoregressive batch", "generate batch"),
    "speculative_vs_autoregressive": ("speculative", "autoregressive"),
    "batch_speculative_vs_autoregressive": ("speculative batch", "autoregressive batch"),
}
TOGETHER = ("speculative", "autoregressive", "generate")  # of a prompt and of a batch
ALONE = ("assisted", "lookup")  # of a prompt


# The cost model


def cost_model(steps: dict, timed: list[dict], clocked: list[dict], gamma: int) -> dict:
    """c, v by gamma and o, in units of what a token of the target alone costs; the speed-up that
    they predict, and the measured one. Both are of the steady state, see `Turn`.

    steps: seconds of single forwards by round, as `Contest.steps` names them; timed: rounds of
    turns {contestant: `total`}; clocked: those with clocks around the forwards.
    """

    def outside(name: str) -> float:  # seconds a round; median: a hiccup is as long as many rounds
        steady = [turns[name]["steady"] for turns in clocked]
        return statistics.median(
            (turn["seconds"] - turn["inside"]) / max(1, turn["rounds"]) for turn in steady
        )

    step = {name: statistics.median(seconds) for name, seconds in steps.items()}
    unit = step["target"] + outside("autoregressive")
    v = {n: seconds / unit for n, seconds in step.items() if n not in ("target", "draft")}
    cost = {"unit_seconds": unit, "target_step_seconds": step["target"]}
    cost |= {"c": step["draft"] / unit, "v": v, "o": outside("speculative") / unit}
    alone = [turns["autoregressive"]["steady"] for turns in timed]
    pair = [turns["speculative"]["steady"] for turns in timed]
    if all(turn["rounds"] for turn in alone + pair):
        tau = pair[0]["tokens"] / pair[0]["rounds"]
        rates = [[turn["tokens"] / turn["seconds"] for turn in turns] for turns in (pair, alone)]
        measured = measure.ratios(*rates)
        predicted = predicted_speedup(tau, gamma, cost["c"], v[gamma], cost["o"])
        cost |= {"tau": tau, "measured": measured, "predicted": predicted}
        cost["error"] = predicted / measured["median"] - 1
    return cost


# Turns


class Contest:
    """A pair and its prompts, [1, T] each, decoded up to `limit` new tokens."""

    def __init__(self, target, draft, prompts, ends: list[int], limit: int, gamma: int):
        self.target = target
        self.draft = draft
        self.prompts = prompts
        self.ends = ends
        self.limit = limit
        self.gamma = gamma
        measure.make_greedy(target, [draft], ends, limit, gamma)

    def decode(self, contestant: str, ids, mask, note):
        """Decode a prompt or a batch; our own contestants call `note` as on_tokens."""
        options = {"max_new_tokens": self.limit, "eos_token_id": self.ends, "on_tokens": note}
        if contestant == "speculative":
            options["gamma"] = self.gamma
            return speculative_generate(self.target, self.draft, ids, mask, **options)
        if contestant == "autoregressive":
            return autoregressive_generate(self.target, ids, mask, **options)
        drafting = {
            "assisted": {"assistant_model": self.draft},
            "lookup": {"prompt_lookup_num_tokens": self.gamma},
        }
        return self.target.generate(ids, attention_mask=mask, **drafting.get(contestant, {}))

    def take_turns(self, prompts: list, number: int, watched: bool) -> tuple[dict, list]:
        """Every contestant's `Turn` at the prompts together, and what all of them write after each
        prompt. Raises ValueError where they differ."""
        ids, mask = left_pad([prompt[0] for prompt in prompts], self.target.device)
        # transformers drafts for one prompt at a time
        contestants = [*TOGETHER, *ALONE] if len(prompts) == 1 else TOGETHER
        turns = {}
        texts = {}
        for name in measure.rotated(contestants, number):
            turns[name] = Turn(self, name, ids, mask, watched)
            rows = turns[name].sequences[:, ids.shape[1] :].tolist()
            texts[name] = [until_end(row, self.ends) for row in rows]
        for name, text in texts.items():
            if text != texts["generate"]:
                raise ValueError(f"{name} and generate write different tokens: nothing to compare")
        return turns, texts["generate"]

    def round(self, number: int, watched: bool) -> tuple[dict, list]:
        """Every prompt alone, then all at once: each contestant's turns, and what is written."""
        turns = defaultdict(list)
        texts = []
        for i, prompt in enumerate(self.prompts):
            alone, text = self.take_turns([prompt], number + i, watched)
            texts += text
            for name, turn in alone.items():
                turns[name].append(turn)
        if len(self.prompts) > 1:
            together, batch_texts = self.take_turns(self.prompts, number, watched)
            if batch_texts != texts:
                raise ValueError("a batch and its prompts alone give different tokens")
            for name, turn in together.items():
                turns[f"{name} batch"].append(turn)
        return turns, texts

    def step_seconds(self, texts: list) -> dict:
        """Seconds of single forwards with about a text's mean length in the cache: "target",
        "draft" and, by gamma, the target scoring gamma + 1 positions."""
        whole = [join(prompt, text) for prompt, text in zip(self.prompts, texts, strict=True)]
        longest = max(whole, key=lambda text: text.shape[1])
        length = sum(text.shape[1] for text in whole) // len(whole)
        gammas = sorted({*GAMMAS, self.gamma})
        steps = [(self.target, 1), (self.draft, 1), *((self.target, 1 + n) for n in gammas)]
        seconds = step_seconds(steps, longest[:, :length])
        return dict(zip(("target", "draft", *gammas), seconds, strict=True))

    def peaks(self) -> dict[str, float]:
        """MiB that decoding the first prompt takes at its peak, the models themselves apart."""
        peaks = {}
        for name in (*TOGETHER, *ALONE):
            call = partial(self.decode, name, self.prompts[0], None, None)
            peaks[name] = measure.peak_memory(call, self.target.device) / 2**20
        return peaks

    def sweep(self, texts: list, cost: dict) -> dict:
        """gamma -> tau, drafts a round and predicted speed-up, simulated along the texts."""
        agreement = []
        for prompt, text in zip(self.prompts, texts, strict=True):
            ids = join(prompt, text)
            labels = ids.clone()
            labels[:, : prompt.shape[1]] = -100
            exact = expected_acceptance(self.target, self.draft, ids, labels, temperature=0.0)
            agreement.append(exact.ratio)
        lengths = [len(text) for text in texts]
        rows = {}
        for n in GAMMAS:
            tau, _, stats, _ = simulate_rounds(torch.cat(agreement), lengths, n, self.limit)
            drafts = (
                stats.drafted / stats.target_calls
            )  # n, less what the limit cuts off at the end
            speedup = predicted_speedup(tau, drafts, cost["c"], cost["v"][n], cost["o"])
            rows[n] = {"tau": tau, "drafts": drafts, "predicted": speedup}
        return rows


def join(prompt: torch.Tensor, text: list[int]) -> torch.Tensor:
    return torch.cat([prompt, prompt.new_tensor([text])], 1)


class Turn:
    """A contestant decodes a prompt or a batch, with clocks around forwards where `watched`.

    `steady` is what the rounds after the first, which reads the prompt, took, as far as they could
    use all drafts: seconds, those of them inside of forwards, tokens, rounds.
    """

    def __init__(self, contest: Contest, contestant: str, ids, mask, watched: bool):
        pair = (contest.target, contest.draft)
        self.device = contest.target.device
        self.marks = []  # the same four, up to the end of each round
        unwatched = nullcontext([measure.Forwards(), measure.Forwards()])
        with measure.counted(*pair) if watched else unwatched as self.forwards:
            start = clock(self.device)
            output = contest.decode(contestant, ids, mask, self.note)
            self.seconds = clock(self.device) - start
        self.sequences = getattr(output, "sequences", output)
        self.stats = getattr(output, "stats", None)
        self.inside = sum(each.seconds for each in self.forwards)
        self.target_calls, self.draft_calls = (each.calls for each in self.forwards)
        gamma = contest.gamma if contestant == "speculative" else 0
        self.steady = dict.fromkeys(("seconds", "inside", "tokens", "rounds"), 0)
        for before, mark in zip(self.marks, self.marks[1:], strict=False):
            if before["tokens"] + gamma + 1 <= contest.limit:
                self.steady = {key: mark[key] - self.marks[0][key] for key in self.steady}

    def note(self, row, tokens, accepted) -> None:
        inside = sum(each.seconds for each in self.forwards)
        count = len(tokens) + (self.marks[-1]["tokens"] if self.marks else 0)
        mark = {"seconds": clock(self.device), "inside": inside, "tokens": count}
        self.marks.append(mark | {"rounds": len(self.marks) + 1})


def total(turns: list[Turn]) -> dict:
    """One contestant's turns of one round, summed."""
    keys = ("seconds", "inside", "target_calls", "draft_calls")
    sums = {key: sum(getattr(turn, key) for turn in turns) for key in keys}
    sums["steady"] = {key: sum(turn.steady[key] for turn in turns) for key in turns[0].steady}
    return sums


# The benchmark


def check_drafting(calls: dict, gamma: int, prompts: int) -> None:
    """Raises ValueError unless transformers drafted as many tokens a round as we did."""
    pair, assisted = calls["speculative"], calls["assisted"]
    fewest = pair["draft_calls"] - gamma * prompts  # transformers' draft stops at an end token
    enough = fewest <= assisted["draft_calls"] <= pair["draft_calls"]
    if not enough or assisted["target_calls"] != pair["target_calls"]:
        raise ValueError(f"transformers does not draft {gamma} a round: {assisted} against {pair}")


def make_contest(args) -> tuple[Contest, str]:
    """What --target and --draft or --shapes name, and where the prompts come from, in words. Raises
    ValueError where neither is given, or both."""
    given = [bool(name) for name in (args.target, args.draft, args.shapes)]
    if given not in ([True, True, False], [False, False, True]):
        raise ValueError("give --target and --draft, or --shapes instead of both")
    if args.shapes:
        target, draft = measure.random_pair(args.shapes, args.device)
        prompts = measure.random_prompts(args, target)
        source, ends = f"random, for random {args.shapes} models", []
    else:
        pair = models.load_pair(args.target, args.draft, torch.float32, args.device)
        target, draft, tokenizer = pair
        prompts, source = measure.load_prompts(args, tokenizer, args.device)
        ends = models.end_tokens(target, tokenizer, args.chat)
    for ids in prompts:
        check_prompt((target, draft), ids, None, args.max_new_tokens)
    return Contest(target, draft, prompts, ends, args.max_new_tokens, args.gamma), source


def decode(args) -> dict:
    """All figures: ratios, time outside of forwards, the cost model, and what it says by gamma."""
    contest, source = make_contest(args)
    prompts = contest.prompts
    for together in (prompts[:1], prompts):  # warm up
        contest.take_turns(together, 0, watched=False)

    # on a GPU the clocks get a round of their own, since they slow decoding down
    rounds, steps = [], defaultdict(list)
    own_round = args.device.type == "cuda"
    for number in range(args.rounds + own_round):
        watched = not own_round or number == args.rounds
        turns, texts = contest.round(number, watched)
        rounds.append({name: total(each) for name, each in turns.items()})
        for name, seconds in contest.step_seconds(texts).items() if watched else ():
            steps[name].append(seconds)
    timed = rounds[: args.rounds]
    clocked = rounds[args.rounds :] if own_round else rounds

    calls, overhead, seconds = {}, {}, {}
    for name, sums in clocked[0].items():
        calls[name] = {key: sums[key] for key in ("target_calls", "draft_calls")}
        shares = (1 - each[name]["inside"] / each[name]["seconds"] for each in clocked)
        overhead[name] = measure.spread(shares)
        seconds[name] = [each[name]["seconds"] for each in timed]
    check_drafting(calls, args.gamma, len(prompts))
    lengths = [len(text) for text in texts]
    stats = sum((turn.stats for turn in turns["speculative"]), Stats())
    cost = cost_model(steps, timed, clocked, args.gamma)
    sweep = contest.sweep(texts, cost)
    protocol = {"prompts": source, "prompt_tokens": [ids.shape[1] for ids in prompts]}
    protocol |= {"new_tokens": lengths, "max_new_tokens": args.max_new_tokens}
    protocol |= {"gamma": args.gamma, "temperature": 0, "dtype": "float32"}
    return {
        "protocol": protocol | {"rounds": args.rounds, "device": str(args.device)},
        "alpha": stats.alpha,
        "tau": stats.tau,
        "lookup_tau": sum(lengths) / calls["lookup"]["target_calls"],
        "ratios": {
            name: measure.ratios(seconds[baseline], seconds[contestant])
            for name, (contestant, baseline) in RATIOS.items()
            if contestant in seconds
        },
        "overhead": overhead,
        "calls": calls,
        "peak_MiB": contest.peaks(),
        "tokens_per_second": {
            name: measure.spread(sum(lengths) / each for each in by_round)
            for name, by_round in seconds.items()
        },
        "cost_model": cost,
        "sweep": sweep,
        "recommended_gamma": recommend({n: row["predicted"] for n, row in sweep.items()}),
    }


def report(result: dict) -> None:
    """The figures, for a person."""
    protocol, cost, sweep = result["protocol"], result["cost_model"], result["sweep"]
    lengths, gamma = protocol["new_tokens"], protocol["gamma"]
    count = sum(lengths)
    print(f"{len(lengths)} prompts ({protocol['prompts']}), {count} new tokens, the same from all")
    print(f"gamma {gamma}, alpha {result['alpha']:.3f}, tau {result['tau']:.2f}")
    print(f"without a draft, by prompt lookup: tau {result['lookup_tau']:.2f}")
    print("ratios of tokens per second: median of the rounds (low to high)")
    for name, ratio in result["ratios"].items():
        print(f"  {' / '.join(RATIOS[name]):<44} {measure.brief(ratio, '.3f')}")
    print("peak memory of one prompt, beyond the models: MiB")
    for name, peak in result["peak_MiB"].items():
        print(f"  {name:<44} {peak:.1f}")
    print("time outside of model forwards")
    for name, share in result["overhead"].items():
        print(f"  {name:<44} {measure.brief(share, '.1%')}")
    terms = f"c {cost['c']:.3f}, v {cost['v'][gamma]:.3f}, o {cost['o']:.4f}"
    unit = cost["unit_seconds"] * 1e3
    print(f"cost model, in tokens of the target alone ({unit:.2f} ms): {terms}")
    if "measured" in cost:
        measured = f"measured {measure.brief(cost['measured'], '.3f')}, error {cost['error']:+.1%}"
        print(f"  speed-up after the first round: predicted {cost['predicted']:.3f}, {measured}")
    else:
        print("  no speed-up measured: no full round after the first; raise --max-new-tokens")
    print("  gamma     " + "".join(f"{n:7}" for n in sweep))
    print("  tau       " + "".join(f"{row['tau']:7.2f}" for row in sweep.values()))
    print("  speed-up  " + "".join(f"{row['predicted']:7.2f}" for row in sweep.values()))
    best = result["recommended_gamma"]
    slower = "" if sweep[best]["predicted"] > 1 else " (but the target alone is faster)"
    print(f"recommended gamma: {best}{slower}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="extras.bench_decode", description=__doc__)
    add = parser.add_argument
    add("--target", help="folder or Hub id of the target")
    add("--draft", help="folder or Hub id of the draft")
    words = "a pair with random weights in these sizes, instead of --target and --draft"
    add("--shapes", type=one_of(measure.SHAPES), help=words)
    measure.add_decoding_flags(parser)
    measure.add_device_flag(parser)
    measure.add_result_flags(parser, rounds=5)
    args = measure.parse(parser, argv)
    result = decode(args)
    report(result)
    measure.save(args, result)


if __name__ == "__main__":
    run_command(main, "extras.bench_decode")
