"""The processes of a run: torchrun's ranks, what they agree on, and how signals stop them."""

import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm


def setup() -> torch.device:
    """Join torchrun's process group, if there is one (NCCL on GPUs, gloo on CPU); returns this
    rank's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        # a rank that waits in vain for others must not outlive torchrun
        handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        store, own_rank, world = next(dist.rendezvous("env://"))
        # after a restart, torchrun's store still holds the addresses of the ranks that are gone
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"restart-{restarts}", store)
        # hours, not NCCL's ten minutes: the other ranks wait while rank 0 measures or downloads
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=own_rank,
            world_size=world,
            timeout=timedelta(hours=3),
        )
        signal.signal(signal.SIGTERM, handler)
    return device


def leave() -> None:
    """Wait for all ranks, and end the process group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def from_rank_0(value=None):
    """Rank 0's value on every rank, and a barrier: what is read from a disk that ranks write to
    is decided once."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value) -> list:
    """Every rank's value, on every rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


# What is said: by rank 0, once


def say(text: str) -> None:
    if rank() == 0:
        tqdm.write(text)


def progress(total: int, name: str, unit: str, initial: int = 0) -> tqdm:
    """A progress bar of rank 0; a line a minute where stderr is no terminal."""
    return tqdm(
        total=total,
        initial=initial,
        desc=name,
        unit=unit,
        delay=2,
        disable=rank() != 0,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 60,
        maxinterval=10 if sys.stderr.isatty() else 120,
    )


# Stopping


class Stopped(Exception):
    """A signal has asked the run to stop, and what can be gone on from is on the disk."""


stop_signal: signal.Signals | None = None


def stop_on_signals() -> None:
    """Let SIGTERM and Ctrl-C end loops where they can save their state; a second one kills."""

    def remember(number, frame):
        global stop_signal
        stop_signal = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, remember)
    signal.signal(signal.SIGINT, remember)


def stop_requested() -> signal.Signals | None:
    """The signal that has asked this process to stop, if one has."""
    return stop_signal


def check_stop() -> None:
    """Raises Stopped if a signal has asked to stop. Call it where little would be lost."""
    if stop_signal:
        raise Stopped(stop_signal.name)
