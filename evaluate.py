"""Acceptance of drafts on held-out prompts: measured, expected, for any gamma; and speed-ups.

alpha and tau are counted by decoding (`speculative.Stats`), with intervals over prompts. Expected
acceptance, argmax agreement and tau by gamma are exact, from one pass over the text that the
target alone writes. Speed-ups are against the target alone, prompt by prompt in turn.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

from data import Example, collate, prompt_ids
from ranks import check_stop, gather_objects, progress, rank, world_size
from speculative import (
    Lane,
    Stats,
    autoregressive_generate,
    expected_acceptance,
    inference,
    left_pad,
    simulate_rounds,
    speculative_generate,
    until_end,
)

GAMMAS = range(1, 11)  # what tau is simulated for


# Acceptance


def evaluate(
    target,
    drafts: dict,
    examples,
    tokenizer,
    settings,
    seed: int,
    name: str,
    ends: list[int] | None = None,
) -> list[dict]:
    """A row of the table for every draft {label: model} and temperature of the settings. `ends`:
    the tokens that end a response (default: the tokenizer's end token).

    Prompts are decoded in batches, which are dealt to the ranks; the speed-up is measured on the
    first `timed_prompts` one by one, on rank 0, and only its rows have it.
    """
    prompts = [prompt_ids(example) for example in examples]
    size = settings.eval_batch
    groups = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    timed = [prompt.to(target.device)[None] for prompt in prompts[: settings.timed_prompts]]
    decoding = {
        "max_new_tokens": settings.max_new_tokens,
        "eos_token_id": ends or [tokenizer.eos_token_id],
        "vocab_size": len(tokenizer),
    }
    turns = len(settings.temperatures) * (len(groups) + len(timed))
    bar = progress(turns, name, "batch")
    rows = []
    for temperature in settings.temperatures:
        sampling = decoding | {"temperature": temperature}
        records = {}  # this rank's: group of prompts -> label -> a Record a prompt
        for number, group in enumerate(groups):
            check_stop()
            bar.update()
            if number % world_size() != rank():
                continue
            group_seed = seed * 1_000_003 + number
            records[number] = decode_group(
                target, drafts, group, settings.gamma, sampling, group_seed
            )
        for other in gather_objects(records):
            records |= other
        speeds, costs = {}, {}
        if rank() == 0:
            speeds, costs = timings(target, drafts, timed, settings.gamma, sampling, seed, bar)
        for label, draft in drafts.items():
            all_records = [record for n in sorted(records) for record in records[n][label]]
            row = {"temperature": temperature, "draft": label}
            row |= acceptance_row(all_records)
            if not hasattr(draft, "lanes"):  # an EAGLE head's later drafts hang on its own guesses
                row["tau_by_gamma"] = simulated_tau(all_records, settings.max_new_tokens)
            row |= speeds.get(label, {})
            row["cost_ratio"] = costs.get(label)
            row["scoring_ratio"] = {str(gamma): costs.get(gamma) for gamma in GAMMAS}
            rows.append(row)
    bar.close()
    return rows


class Record(NamedTuple):
    """What one prompt says of a draft: counts of decoding, and for each token of the text that the
    target writes (`length` of them) speculative.Acceptance."""

    stats: Stats
    length: int
    overlap: list[float]
    agree: list[bool]
    ratio: list[float]


def decode_group(
    target, drafts: dict, prompts: list[Tensor], gamma: int, sampling: dict, seed: int
) -> dict[str, list[Record]]:
    """Decode a batch of prompts with every draft; each draws from the same seed, whatever other
    drafts there are."""
    generator = torch.Generator(target.device)
    sampling = sampling | {"generator": generator}
    ends, vocab_size = sampling["eos_token_id"], sampling["vocab_size"]
    input_ids, mask = left_pad(prompts, target.device)
    generator.manual_seed(seed)
    sequences = autoregressive_generate(target, input_ids, mask, **sampling).cpu()
    written = []
    for prompt, tokens in zip(prompts, sequences[:, input_ids.shape[1] :], strict=True):
        whole_text = torch.cat([prompt, until_end(tokens, ends)])
        written.append(Example(whole_text.int().numpy(), len(prompt)))
    lengths = [len(example.input_ids) - example.prompt_length for example in written]
    text, labels = (tensor.to(target.device) for tensor in collate(written))
    records = {}
    for label, draft in drafts.items():
        exact = expected_acceptance(
            target, draft, text, labels, sampling["temperature"], vocab_size=vocab_size
        )
        by_prompt = [[part.tolist() for part in values.split(lengths)] for values in exact]
        generator.manual_seed(seed)
        output = speculative_generate(target, draft, input_ids, mask, gamma=gamma, **sampling)
        columns = zip(output.row_stats, lengths, *by_prompt, strict=True)
        records[label] = [Record(*column) for column in columns]
    return records


def acceptance_row(records: list[Record]) -> dict:
    """alpha with its interval over prompts, tau, expected acceptance, agreement, counts, which are
    pooled over prompts, and acceptance by draft position."""
    stats = sum((record.stats for record in records), Stats())
    accepted = [record.stats.accepted for record in records]
    judged = [record.stats.accepted + record.stats.rejected for record in records]
    overlap = [value for record in records for value in record.overlap]
    agree = [value for record in records for value in record.agree]
    return {
        "alpha": stats.alpha,
        "alpha_interval": bootstrap_interval(accepted, judged),
        "tau": stats.tau,
        "expected_acceptance": sum(overlap) / len(overlap),
        "agreement": sum(agree) / len(agree),
        "counts": asdict(stats),
        **acceptance_by_position(stats),
    }


def acceptance_by_position(stats: Stats) -> dict[str, list[float]]:
    """The acceptance of a round's first draft, its second and so on: of those that were judged, for
    which all drafts before had to pass (conditional), and of all rounds (unconditional)."""
    pairs = list(zip(*stats.per_position, strict=True))
    return {
        "conditional_acceptance": [accepted / judged for accepted, judged in pairs],
        "unconditional_acceptance": [accepted / stats.rounds for accepted, _ in pairs],
    }


def simulated_tau(records: list[Record], max_new_tokens: int) -> dict[str, float]:
    """tau for every gamma of GAMMAS, exact, without decoding again."""
    ratio = torch.tensor([value for record in records for value in record.ratio])
    lengths = [record.length for record in records]
    return {
        str(gamma): simulate_rounds(ratio, lengths, gamma, max_new_tokens).tau for gamma in GAMMAS
    }


def bootstrap_interval(
    numerators: Sequence, denominators: Sequence, level=0.95
) -> tuple[float, float]:
    """(low, high) by percentile bootstrap over prompts, for a ratio of sums such as
    alpha = sum accepted / sum judged.

    NaN where no resample has a denominator. With a single prompt there is nothing to resample:
    low = high.
    """
    pairs = torch.tensor([list(numerators), list(denominators)], dtype=torch.float64)
    numerator, denominator = pairs[:, resamples(pairs.shape[1])].sum(-1)
    return percentiles(numerator / denominator, level)


def median_interval(values: Sequence[float], level=0.95) -> tuple[float, float]:
    """(low, high) of the median by percentile bootstrap over prompts, one value each."""
    values = torch.tensor(values, dtype=torch.float64)
    medians = values[resamples(len(values))].quantile(0.5, dim=1)
    return percentiles(medians, level)


def resamples(count: int) -> Tensor:
    """The bootstrap's draws from `count` values, [1000, count] numbers of theirs."""
    return torch.randint(count, (1000, count), generator=torch.Generator().manual_seed(0))


def percentiles(values: Tensor, level: float) -> tuple[float, float]:
    """The middle `level` of the values of resamples; those that are NaN do not count."""
    quantiles = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = values.nanquantile(quantiles)
    return low.item(), high.item()


# Speed


def timings(
    target, drafts: dict, prompts: list[Tensor], gamma: int, sampling: dict, seed: int, bar
) -> tuple[dict, dict]:
    """Speeds {label: figures} and costs of the drafts, measured in turn, as medians over prompts
    [1, T] (other work on the machine spoils a sum).

    Figures: speed-up over the target alone (tokens per second over tokens per second) and its 95%
    interval over prompts, tokens per second, seconds per response. Costs, in target steps: a step
    of each draft {label: ratio} (not of EAGLE heads, which take no step alone) and the target's
    scoring of gamma + 1 positions {gamma: ratio}.
    """
    generator = torch.Generator(target.device)
    seconds, rates = defaultdict(list), defaultdict(list)  # by label; None: the target alone
    steps = {label: draft for label, draft in drafts.items() if not hasattr(draft, "lanes")}
    turns = [(target, 1 + n) for n in (0, *GAMMAS)] + [(draft, 1) for draft in steps.values()]
    step_costs = []
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first run is the warm-up
        check_stop()
        for label, draft in [(None, None), *drafts.items()]:
            generator.manual_seed(seed + number)
            start = clock(target.device)
            output = speculative_generate(
                target, draft, prompt, gamma=gamma, generator=generator, **sampling
            )
            duration = clock(target.device) - start
            if number:
                seconds[label].append(duration)
                rates[label].append(output.stats.generated / duration)
        if number:
            step_costs.append(step_seconds(turns, prompt))
            bar.update()
    speeds = {}
    for label in drafts:
        ratios = [rate / alone for rate, alone in zip(rates[label], rates[None], strict=True)]
        speeds[label] = {
            "speedup": statistics.median(ratios),
            "speedup_interval": median_interval(ratios),
            "tokens_per_second": statistics.median(rates[label]),
            "target_tokens_per_second": statistics.median(rates[None]),
            "seconds_per_response": statistics.median(seconds[label]),
        }
    costs = {}
    for i, key in enumerate((*GAMMAS, *steps), start=1):
        costs[key] = statistics.median(cost[i] / cost[0] for cost in step_costs)
    return speeds, costs


def step_seconds(turns: list[tuple], prompt: Tensor, repeats: int = 3) -> list[float]:
    """Seconds of a forward of n tokens with about the prompt [1, T] in the cache, for each
    (model, n): the fastest of several, taken in turn."""
    seconds = [[] for _ in turns]
    length = max(1, prompt.shape[1] - len(GAMMAS))  # no position beyond those of decoding
    models = {model for model, _ in turns}
    with inference(*models):
        lanes = {model: Lane(model, prompt, None, model.config.vocab_size, 0) for model in models}
        for lane in lanes.values():
            lane.forward(prompt[:, :length])
        for _ in range(repeats):
            for i, (model, n) in enumerate(turns):
                tokens = prompt[:, :1].expand(1, n)  # which tokens they are costs nothing
                start = clock(prompt.device)
                lanes[model].forward(tokens, keep=n)
                seconds[i].append(clock(prompt.device) - start)
                lanes[model].rollback([length])
    return [min(times) for times in seconds]


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
