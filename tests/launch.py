"""Starting a script on ranks, as torchrun does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_on_ranks(script: str, *arguments, count: int = 2, device: str = "cpu") -> str:
    """What a script of the project prints; it must end well. On the CPU also where there are GPUs,
    unless `device` is "cuda"."""
    launcher = f"torch.distributed.run --standalone --nproc_per_node {count}".split()
    command = [sys.executable, "-m", *launcher, str(ROOT / script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
