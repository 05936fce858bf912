"""What the target's scoring of a few tokens costs, in steps of one token, with PyTorch's own
products and with faster ones: in float32 `speculative.thin_linear`, whatever the sampler would do
on this CPU; in bfloat16 `speculative.pack_weights`, on a CPU that it gains on.

    python -m extras.bench_scoring --target DIR --dtype bfloat16 --json scoring.json

Random tokens, 200 of them in the cache; with and without take turns.
"""

import statistics
import time
from contextlib import AbstractContextManager
from unittest.mock import patch

import torch

import models
import speculative
from cli import Parser, one_of, run_command
from extras import measure

CONTEXT = 200  # tokens in the cache
TOKENS = range(1, 9)  # of a forward
FASTER = {"float32": "thin", "bfloat16": "packed"}  # the faster products of a dtype
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
    add = parser.add_argument
    names = ", ".join(FASTER)
    add("--target", required=True, help="folder or Hub id of the target")
    add("--dtype", type=one_of(FASTER), default="float32", help=f"of {names}")
    measure.add_result_flags(parser, rounds=5)
    args = measure.parse(parser, argv)
    if args.dtype == "bfloat16" and not speculative.PACKED_PRODUCTS:
        raise ValueError("--dtype bfloat16: weights are packed on CPUs with AVX-512 only")
    models.check_model(args.target)
    dtype = getattr(torch, args.dtype)
    model = models.load_model(args.target, dtype)
    fast_model = model
    if dtype == torch.bfloat16:
        fast_model = models.load_model(args.target, dtype)
        speculative.pack_weights(fast_model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, CONTEXT), generator=generator)
    kind = FASTER[args.dtype]
    ratios = {name: {n: [] for n in TOKENS} for name in ("plain", kind)}
    for _ in range(args.rounds):
        plain = scoring_seconds(model, ids, torch.inference_mode())
        with patch.object(speculative, "THIN_PRODUCTS", True):
            fast = scoring_seconds(fast_model, ids, speculative.inference(fast_model))
        for n in TOKENS:
            ratios["plain"][n].append(plain[n] / plain[1])
            ratios[kind][n].append(fast[n] / plain[1])
    print("a forward of n tokens, in PyTorch's own of one: median of the rounds (low to high)")
    for n in TOKENS:
        cells = []
        for name, by_tokens in ratios.items():
            values = sorted(by_tokens[n])
            median = statistics.median(values)
            cells.append(f"{name} {median:.2f} ({values[0]:.2f} to {values[-1]:.2f})")
        print(f"  {n}  {'   '.join(cells)}")
    protocol = {"context": CONTEXT, "dtype": args.dtype, "rounds": args.rounds}
    measure.save(args, {"protocol": protocol, "ratios": ratios})


if __name__ == "__main__":
    run_command(main, "extras.bench_scoring")
