"""Files that survive: atomic writes, checksums, finished stages, checkpoints, the lock of a run.

Whatever a run goes on from is written whole before it takes its name (`write_file`), and carries
a checksum beside it (`write_checked`), so that a file cut short or damaged is noticed, named and
made again. Rank 0 writes; the disk is one that all ranks see.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

from ranks import from_rank_0, rank, say, world_size

HISTORY = "history.jsonl"  # of a stage, in its folder; while it is trained, with its checkpoints

# Files


def checksum(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, write: Callable) -> None:
    """write(file) into a new file, which takes the name `path` once it is whole and on the disk.

    Raises OSError where that fails, as on a full disk; what was at `path` is then still there.
    """
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(partial):
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Whatever writing the file or folder `path` fails with becomes an OSError that says so, and
    what was written of it is removed."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have theirs
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(f"cannot write {path}: {error} ({free:,.0f} MiB free there)") from error


def checksum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def write_checked(path: Path, write: Callable) -> None:
    """`write_file`, with the checksum in a file beside it (as `sha256sum -c` reads it)."""
    write_file(path, write)
    line = f"{checksum(path)}  {path.name}\n"
    write_file(checksum_file(path), lambda file: file.write(line.encode()))


def is_whole(path: Path) -> bool:
    """Whether `path` holds what `write_checked` wrote. One that does not is named and removed."""
    if not path.is_file():
        return False
    try:
        if checksum_file(path).read_text().split()[0] == checksum(path):
            return True
    except (OSError, ValueError, IndexError):
        pass
    tqdm.write(f"  {path} is damaged or was cut short: not used")  # whichever rank has noticed
    remove_checked(path)
    return False


def remove_checked(path: Path) -> None:
    path.unlink(missing_ok=True)
    checksum_file(path).unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    write_checked(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read_json(path: Path) -> dict:
    """What `write_json` wrote; {} where there is no such file or a damaged one, which is named."""
    if not is_whole(path):
        return {}
    content = json.loads(path.read_text())
    return content if isinstance(content, dict) else {}


def fingerprint(settings: dict) -> str:
    """What stands for settings (anything JSON can hold): 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def make_folder(folder: Path) -> None:
    """Raises ValueError where the folder cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise ValueError(
            f"--out {folder} is no folder to write to ({error.strerror}); give another"
        ) from error


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder for this run alone, and make it where there is none.

    Raises ValueError where another run holds it or it cannot be written to.
    """
    make_folder(folder)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process
        except BlockingIOError:
            raise ValueError(
                f"another run is using {folder}: wait for it, or give another --out"
            ) from None
        yield


# Stages: a folder with a trained model, and stage.json, which says what made it


class Model(NamedTuple):
    """A model on the disk: its folder or Hub id, and the fingerprint of all that it came from."""

    path: str
    fingerprint: str


def stage_folder(folder: Path, settings: dict) -> Path:
    """Where a stage of these settings goes: `folder` or, where that has a stage of other settings,
    finished or not, the folder that has their fingerprint after its name. So nothing trained is
    replaced. The same answer on every rank."""
    wanted = fingerprint(settings)
    own = folder.with_name(f"{folder.name}-{wanted[:8]}")
    choice = folder
    if rank() == 0 and (own.exists() or checkpoint_folder(own).exists()):
        choice = own
    elif rank() == 0 and _is_taken(folder, wanted):
        say(f"  {folder.name}: other settings than in {folder}; goes to {own.name}")
        choice = own
    return from_rank_0(choice)


def _is_taken(folder: Path, wanted: str) -> bool:
    finished = read_json(folder / "stage.json").get("fingerprint")
    if finished:
        return finished != wanted
    return any(wanted not in path.name for path in checkpoint_folder(folder).glob("*.pt"))


def finished_stage(folder: Path, settings: dict) -> Model | None:
    """The stage in `folder` if it was made by equal settings and its files are whole, else None;
    says so where it is damaged. The same answer on every rank. Raises ValueError where a file
    other than weights was changed: training anew would replace the change."""
    stage = Model(str(folder), fingerprint(settings))
    whole = rank() == 0 and _is_finished(folder, stage.fingerprint)
    if not from_rank_0(whole):
        return None
    say(f"  {folder.name}: done before")
    return stage


def _is_finished(folder: Path, wanted: str) -> bool:
    record = read_json(folder / "stage.json")
    if record.get("fingerprint") != wanted:
        return False
    for name, sha256 in record["files"].items():
        path = folder / name
        if path.is_file() and checksum(path) == sha256:
            continue
        if path.is_file() and path.suffix != ".safetensors":  # somebody's work, such as an edit
            raise ValueError(
                f"{path} has changed since training; put it back, or move {folder} away to train "
                "the stage anew"
            )
        say(f"  {path} is damaged: training the stage anew")
        return False
    return True


def save_stage(
    folder: Path, settings: dict, summary: dict, model, tokenizer, history=None
) -> Model:
    """Save a model, which is needed on rank 0 only, as the stage in `folder`, in place of what was
    there. summary: of its training, {} where there was none; history: its history.History."""
    stage = Model(str(folder), fingerprint(settings))
    if rank() == 0:
        partial = folder.with_name(folder.name + ".partial")
        remove_folder(partial)
        with disk_errors(partial):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        checksums = {}
        for path in sorted(partial.iterdir()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            checksums[path.name] = checksum(path)
        record = {"fingerprint": stage.fingerprint, "settings": settings, "summary": summary}
        record |= {"files": checksums, "versions": versions(), "git": git_commit()}
        write_json(partial / "stage.json", record)
        if history:  # in no checksum: damage to it is no reason to train anew
            history.save(partial / HISTORY)
        remove_folder(folder)
        partial.rename(folder)  # only a whole folder ever carries the name
        remove_folder(checkpoint_folder(folder))
    if summary:
        remarks = history.remarks() if history else ""
        loss = f"last loss {summary['loss']:.4f}{remarks}"
        say(f"  {folder.name}: {summary['steps']} steps, {loss}, {summary['seconds']} s")
    return from_rank_0(stage)


def remove_folder(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def checkpoint_folder(stage_folder: Path) -> Path:
    return stage_folder.with_name(stage_folder.name + ".checkpoints")


class Checkpoints:
    """The state of an unfinished stage: the last two generations, each a file of `torch.save`
    named by its step and the fingerprint of the stage's settings."""

    def __init__(self, folder: Path, fingerprint: str):
        self.folder = Path(folder)
        self.fingerprint = fingerprint

    def save(self, step: int, state: dict) -> None:
        path = self.folder / f"{step:09d}-{self.fingerprint}.pt"
        write_checked(path, lambda file: torch.save(state, file))
        for old in sorted(self.folder.glob("*.pt"))[:-2]:
            remove_checked(old)

    def newest(self) -> Path | None:
        """The newest generation that is whole, or None.

        Every other file is removed, or it would push good generations out: what is damaged, cut
        short, or left by other settings.
        """
        for path in self.folder.glob("*"):
            if f"-{self.fingerprint}.pt" not in path.name or path.name.endswith(".partial"):
                path.unlink()
        whole = [path for path in sorted(self.folder.glob("*.pt")) if is_whole(path)]
        return whole[-1] if whole else None


# Provenance: what a recorded result says of its making


def versions() -> dict:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def git_commit() -> str:
    """The commit of this code, with "-dirty" where it was changed since; "unknown" without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        output = subprocess.run(
            [*command, "--abbrev=12"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return output.stdout.strip()


def command_line() -> str:
    """The command that runs this process, as it was typed (`python -m extras.X` too)."""
    arguments = [argument for argument in sys.orig_argv[1:] if argument != "-u"]  # torchrun's
    launcher = "python"
    if "RANK" in os.environ:
        launcher = f"torchrun --nproc_per_node {world_size()}"
    return f"{launcher} {shlex.join(arguments)}"


def machine() -> str:
    """The machine that runs this, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (match := re.search(r"model name\s*: (.*)", info.read_text())):
        name = match[1]
    return f"{os.cpu_count()} x {name}"
