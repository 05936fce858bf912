"""What the target's scoring of a few tokens costs, in steps of one token, with and without
`speculative.thin_linear`, whatever the sampler would do on this CPU.

    python -m extras.bench_scoring --target DIR --json scoring.json

Float32, random tokens, 200 of them in the cache; with and without take turns.
"""

import statistics
import time
from contextlib import AbstractContextManager
from unittest.mock import patch

import torch

import models
import speculative
from cli import Parser, run_command
from extras import measure

CONTEXT = 200  # tokens in the cache
TOKENS = range(1, 9)  # of a forward
REPEATS = 4  # the fastest of so many counts


def scoring_seconds(model, ids: torch.Tensor, mode: AbstractContextManager) -> dict[int, float]:
    """Seconds of a forward of n tokens after the context, by n, in an inference mode."""
    seconds = {}
    with mode:
        lane = speculative.Lane(model, ids, None, model.config.vocab_size, 0)
        lane.forward(ids)
        for n in TOKENS:
            times = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                lane.forward(ids[:, :n], keep=n)
                times.append(time.perf_counter() - start)
                lane.rollback([CONTEXT])
            seconds[n] = min(times)
    return seconds


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="extras.bench_scoring", description=__doc__)
    parser.add_argument("--target", required=True, help="folder or Hub id of the target")
    measure.add_result_flags(parser, rounds=5)
    args = measure.parse(parser, argv)
    models.check_model(args.target)
    model = models.load_model(args.target)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, CONTEXT), generator=generator)
    ratios = {"plain": {n: [] for n in TOKENS}, "thin": {n: [] for n in TOKENS}}
    for _ in range(args.rounds):
        plain = scoring_seconds(model, ids, torch.inference_mode())
        with patch.object(speculative, "THIN_PRODUCTS", True):
            thin = scoring_seconds(model, ids, speculative.inference(model))
        for n in TOKENS:
            ratios["plain"][n].append(plain[n] / plain[1])
            ratios["thin"][n].append(thin[n] / plain[1])
    print("a forward of n tokens, in forwards of one: median of the rounds (low to high)")
    for n in TOKENS:
        cells = []
        for kind, by_tokens in ratios.items():
            values = sorted(by_tokens[n])
            median = statistics.median(values)
            cells.append(f"{kind} {median:.2f} ({values[0]:.2f} to {values[-1]:.2f})")
        print(f"  {n}  {'   '.join(cells)}")
    protocol = {"context": CONTEXT, "dtype": "float32", "rounds": args.rounds}
    measure.save(args, {"protocol": protocol, "ratios": ratios})


if __name__ == "__main__":
    run_command(main, "extras.bench_scoring")
