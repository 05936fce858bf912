"""Kill runs of the tiny pair (SIGKILL) at random moments, start them again, and compare with a run
that was never touched: the same weights, bit for bit, and the same results.

    python -m extras.bench_faults --kills 20 --json faults.json
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cli import Parser, run_command, whole
from extras import measure

ROOT = Path(__file__).parents[1]
RUN = "--preset tiny --limit 64 --max-steps 8 --epochs 2,2,2 --eval-prompts 8 --timed-prompts 1"
TIMES = {  # of a row of results.json
    "speedup", "speedup_interval", "speedup_by_gamma", "tokens_per_second",
    "target_tokens_per_second", "seconds_per_response", "cost_ratio", "scoring_ratio", "seconds",
    "cache_seconds",
}  # fmt: skip


def difference(out: Path, other: Path) -> str | None:
    """What differs between two finished runs, times aside: a model's file, or a row of the results.
    None: nothing does."""
    weights = {path.relative_to(out) for path in out.rglob("*.safetensors")}
    other_weights = {path.relative_to(other) for path in other.rglob("*.safetensors")}
    if weights != other_weights:
        return f"models: {sorted(map(str, weights ^ other_weights))}"
    for path in sorted(weights):
        if (out / path).read_bytes() != (other / path).read_bytes():
            return str(path)
    return None if rows_without_times(out) == rows_without_times(other) else "results.json"


def rows_without_times(out: Path) -> list[dict]:
    rows = json.loads((out / "results.json").read_text())["rows"]
    return [{key: row[key] for key in row.keys() - TIMES} for row in rows]


def start(out: Path) -> subprocess.Popen:
    """A run, at the moment when its first stage begins."""
    command = [sys.executable, str(ROOT / "run_all.py"), *RUN.split(), "--save-minutes", "0.001"]
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    for line in process.stdout:
        if "train rows" in line:
            return process
    raise ValueError(f"the run ended before its first stage; try python run_all.py {RUN}")


def wait(process: subprocess.Popen) -> str:
    """Wait for a run's end: the name of the last stage that it finished."""
    printed = process.communicate()[0].splitlines()
    stages = [line.split(":")[0].strip() for line in printed if line.startswith("  ")]
    return stages[-1] if stages else "nothing"


def kill_one(out: Path, whole_run: Path, delay: float) -> dict:
    """Kill a run after `delay` seconds and start it again: when it was killed, what differs."""
    process = start(out)
    time.sleep(delay)
    process.kill()
    stage = wait(process)
    if process.returncode == 0:
        stage = "its end"
    process = start(out)
    wait(process)
    if process.returncode:
        raise ValueError(f"the run killed after {stage} does not end when started again: see {out}")
    return {"killed_after": stage, "difference": difference(whole_run, out)}


def kill_runs(folder: Path, count: int, seed: int) -> list[dict]:
    whole_run = folder / "whole"
    if whole_run.exists():
        raise ValueError(f"{folder} holds runs already: --out must be a new folder")
    process = start(whole_run)
    begin = time.monotonic()
    wait(process)
    seconds = time.monotonic() - begin
    rng = np.random.default_rng(seed)
    kills = []
    for number in range(count):
        kill = kill_one(folder / f"killed-{number}", whole_run, rng.uniform(0, seconds))
        result = kill["difference"] or "the same files"
        print(f"kill {number + 1}, after {kill['killed_after']}: {result}", flush=True)
        kills.append(kill)
    return kills


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="extras.bench_faults", description=__doc__)
    add = parser.add_argument
    add("--kills", type=whole(), default=20, help="how many runs to kill")
    add("--seed", type=whole(0), default=0, help="of the moments")
    add("--out", help="keep the runs here; without it a temporary folder")
    add("--json", help="write what was killed, and what differed, to this file")
    args = measure.parse(parser, argv)
    with tempfile.TemporaryDirectory() as folder:
        kills = kill_runs(Path(args.out or folder), args.kills, args.seed)
    same = sum(kill["difference"] is None for kill in kills)
    print(f"{same} of {args.kills} killed runs ended in the same files")
    measure.save(args, {"run": RUN.split(), "seed": args.seed, "same": same, "kills": kills})
    if same < args.kills:
        raise ValueError("a killed run ended in other files: exact resume is broken")


if __name__ == "__main__":
    run_command(main, "extras.bench_faults")
