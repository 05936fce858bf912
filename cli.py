"""Command lines: flags made from dataclasses, names without case, errors in one line.

A field made by `flag` is also a flag of the command line, with its type, help and default.
"""

import argparse
import difflib
import math
import os
import signal
import sys
import time
import unicodedata
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path

import torch.distributed as dist

import ranks

# Types of arguments: names without case, numbers with their range


def one_of(valid) -> Callable[[str], str]:
    """The type of an argument that is one of these names; if it is none, the nearest is named."""

    def name(text: str) -> str:
        text = text.strip().lower()
        if text in valid:
            return text
        near = [f"did you mean {match!r}? " for match in difflib.get_close_matches(text, valid, 1)]
        raise argparse.ArgumentTypeError(
            f"unknown name {text!r}, {''.join(near)}expected one of {', '.join(valid)}"
        )

    return name


def some_of(valid) -> Callable[[str], tuple[str, ...]]:
    """The type of an argument that is some of these names, each once, with commas between."""

    def names(text: str) -> tuple[str, ...]:
        result = tuple(one_of(valid)(name) for name in text.split(","))
        for name in result:
            if result.count(name) > 1:
                raise argparse.ArgumentTypeError(f"{name!r} is there twice")
        return result

    return names


def whole(least: int = 1) -> Callable[[str], int]:
    """The type of a whole number of at least `least`."""

    def number(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}, got {text!r}"
            )
        return int(text)

    return number


def numbers(text: str) -> tuple[int, ...]:
    """The type of whole numbers of at least 0 with commas between, such as seeds."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) < 2**32 for part in parts):
        raise argparse.ArgumentTypeError(
            f"must be whole numbers from 0 to 2**32 - 1 with commas between, got {text!r}"
        )
    return tuple(int(part) for part in parts)


def decimal(low: float, high: float, above: bool = False) -> Callable[[str], float]:
    """The type of a finite number from `low` (or above it) to `high`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            bounds = f"{'above' if above else 'at least'} {low:g}"
            bounds += f" and at most {high:g}" if high < math.inf else " and finite"
            raise argparse.ArgumentTypeError(f"must be a number {bounds}, got {text!r}")
        return value

    return number


def decimals(low: float, high: float) -> Callable[[str], tuple[float, ...]]:
    """The type of finite numbers from `low` to `high` with commas between."""
    return lambda text: tuple(decimal(low, high)(part) for part in text.split(","))


def folder(text: str) -> str:
    """The type of a folder that must be there."""
    if not text or not Path(text).is_dir():  # "" would be the current one
        raise argparse.ArgumentTypeError(f"no such folder: {printable(text)!r}")
    return text


def printable(text: str) -> str:
    """Text from files and models for a terminal: control characters but line ends and tabs are
    escaped, and so is what changes the direction of writing. Spaces of all scripts stay."""
    return "".join(c if is_harmless(c) else repr(c)[1:-1] for c in text)


def is_harmless(character: str) -> bool:
    """Whether a character may reach the terminal as it is (the last two join letters)."""
    if character.isprintable() or character in "\n\t\u200c\u200d":
        return True
    return unicodedata.category(character) == "Zs"


# Flags


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help shows defaults."""

    def __init__(self, **more):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    def add_argument(self, *names, **more):
        return super().add_argument(*names, **with_default(more))

    def error(self, message):
        let_rank_0_speak_first()
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")


def with_default(arguments: dict) -> dict:
    """The arguments of add_argument, with the default said in the help."""
    default = arguments.get("default")
    hidden = default is None or default is False or default == argparse.SUPPRESS
    if hidden or "help" not in arguments:
        return arguments
    return arguments | {"help": f"{arguments['help']} (default: {default})"}


def flag(default, type: Callable | None, help: str, group: str = "training"):
    """A field that is also a flag of the command line; without a type it is False unless given."""
    return field(default=default, metadata={"type": type, "help": help, "group": group})


def add_flags(parser: Parser, settings_class) -> None:
    """Add the fields of a dataclass that are flags, in their groups."""
    groups = {group.title: group for group in parser._action_groups}
    for setting in fields(settings_class):
        arguments = dict(setting.metadata)
        if not arguments:
            continue
        title = arguments.pop("group")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        default = setting.default
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        if arguments["type"] is None:
            del arguments["type"]
            arguments["action"] = "store_true"
        name = f"--{setting.name.replace('_', '-')}"
        groups[title].add_argument(name, **with_default(arguments | {"default": default}))


# The end of a process


def let_rank_0_speak_first() -> None:
    """What is wrong on every rank is said once: rank 0's end makes torchrun end the others."""
    if int(os.environ.get("RANK", 0)):
        for _ in range(50):
            if ranks.stop_requested():
                os._exit(128 + ranks.stop_requested())
            time.sleep(0.1)


def run_command(main: Callable[[], int | None], prog: str, resumes: bool = False) -> None:
    """Run `main` and end the process, with what can go wrong said in one line: exit code 130 after
    Ctrl-C, 143 after SIGTERM, 1 after an error. A command that `resumes` is not interrupted by a
    signal but asked to stop where it has saved its state (ranks.check_stop)."""
    if "RANK" in os.environ:
        prog = f"{prog} (rank {os.environ['RANK']})"
    if resumes:
        ranks.stop_on_signals()
    code, message = 0, None
    try:
        code = main() or 0
    except SystemExit as end:  # argparse: --help, or an error that it has printed
        code = end.code or 0
    except (ranks.Stopped, KeyboardInterrupt) as stopped:
        name = str(stopped) or "SIGINT"
        code = 128 + signal.Signals[name]
        message = f"stopped by {name}"
        if resumes:
            message += "; the same command goes on from the saved state"
    except (ValueError, OSError, ArithmeticError) as error:
        code, message = 1, f"error: {printable(str(error))}"
        let_rank_0_speak_first()
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        code = 1
        message = "another rank is gone, torchrun names it; the same command goes on"
    if message:
        print(f"{prog}: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if message and message.startswith("another rank"):
        # seconds for torchrun to find the dead rank before this one ends too, and to end this one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    os._exit(code)  # no waiting for ranks that are gone, and no destructors that would


def lost_rank(error: RuntimeError) -> bool:
    return "RANK" in os.environ and (isinstance(error, dist.DistError) or "gloo" in str(error))
