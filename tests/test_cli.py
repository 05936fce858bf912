"""Command lines: types that name flag and range, help, and errors in one line."""

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import cli
import ranks
import run_all
from cli import Parser, add_flags, decimal, flag, folder, numbers, one_of, printable, some_of, whole
from settings import Method, Settings

ROOT = Path(cli.__file__).parent

# Types of arguments


@pytest.mark.parametrize(
    ("type", "text", "value"),
    [
        (one_of(["gsm8k", "mbpp"]), " GSM8K ", "gsm8k"),
        (some_of(["adaspec", "best"]), "Best, AdaSPEC", ("best", "adaspec")),
        (whole(), "1", 1),
        (whole(0), " 0 ", 0),
        (numbers, "0, 4294967295", (0, 4294967295)),
        (numbers, "7", (7,)),
        (decimal(0, 1, above=True), "1", 1.0),
        (decimal(0, math.inf), "0", 0.0),
        (decimal(-2, 3), "-2e0", -2.0),
    ],
)
def test_what_can_be_read(type, text, value):
    assert type(text) == value


@pytest.mark.parametrize(
    ("type", "text", "words"),
    [
        (
            one_of(["gsm8k", "mbpp"]),
            "gsm9k",
            "unknown name 'gsm9k', did you mean 'gsm8k'? expected",
        ),
        (one_of(["gsm8k", "mbpp"]), "qwxz", "unknown name 'qwxz', expected one of gsm8k, mbpp"),
        (some_of(["a", "b"]), "a,c", "unknown name 'c'"),
        (some_of(["a", "b"]), "a,", "unknown name ''"),
        (some_of(["a", "b"]), "a,A", "'a' is there twice"),
        (whole(), "0", "must be a whole number of at least 1, got '0'"),
        (whole(2), "1", "of at least 2, got '1'"),
        (whole(), "-3", "got '-3'"),
        (whole(), "2.5", "got '2.5'"),
        (whole(), "²", "got '²'"),
        (numbers, "1,two", "must be whole numbers from 0 to 2**32 - 1 with commas between"),
        (numbers, "4294967296", "from 0 to 2**32 - 1"),
        (numbers, "-1", "got '-1'"),
        (numbers, "", "got ''"),
        (decimal(0, 1, above=True), "0", "must be a number above 0 and at most 1, got '0'"),
        (decimal(0, 1, above=True), "1.01", "at most 1, got '1.01'"),
        (decimal(0, math.inf), "-1", "must be a number at least 0 and finite, got '-1'"),
        (decimal(0, math.inf), "inf", "finite, got 'inf'"),
        (decimal(0, 1), "nan", "got 'nan'"),
        (decimal(0, 1), "much", "got 'much'"),
        (folder, "/no/such\x1b", "no such folder: '/no/such\\\\x1b'"),
        (folder, __file__, "no such folder"),
        (folder, "", "no such folder: ''"),
    ],
)
def test_what_cannot_be_read(type, text, words):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        type(text)
    assert words in str(error.value)


def test_folders_are_given_as_typed(tmp_path):
    assert folder(str(tmp_path)) == str(tmp_path)


def test_control_characters_are_escaped_for_the_terminal():
    """Issue 13.10: those of prompts, model output and `architectures` reached it raw."""
    assert printable("a\x1b[31mb\rc\x00\x9bd\x7f") == "a\\x1b[31mb\\rc\\x00\\x9bd\\x7f"
    assert printable("right to left \u202e, half a pair \ud800") == (
        "right to left \\u202e, half a pair \\ud800"
    )
    for text in ("plain, 'quoted'\n\tand so on", "Ünïcödé ¿你好 🎉", "a\u3000b\u00a0c\u200dd"):
        assert printable(text) == text


# Flags


@dataclass(frozen=True)
class Example:
    """Flags of each kind."""

    pairs: tuple = flag(("a", "b"), some_of("abc"), "comma-separated", "grid")
    max_steps: int | None = flag(None, whole(), "cut short")
    rate: float = flag(0.5, decimal(0, 1), "of learning")
    dry: bool = flag(False, None, "do nothing", "grid")
    hidden: int = 3  # no flag


def example_parser():
    parser = Parser(prog="example.py")
    parser.add_argument("--name", default="x", help="of the run")
    parser.add_argument("--quiet", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add_flags(parser, Example)
    return parser


def test_fields_become_flags_with_type_default_and_group():
    parser = example_parser()
    assert vars(parser.parse_args([])) == {
        "name": "x", "pairs": ("a", "b"), "max_steps": None, "rate": 0.5, "dry": False,
    }  # fmt: skip
    flags = "--pairs C --max-steps 2 --rate 1 --dry --name y".split()
    assert vars(parser.parse_args(flags)) == {
        "name": "y", "pairs": ("c",), "max_steps": 2, "rate": 1.0, "dry": True,
    }  # fmt: skip
    assert Example() == Example(("a", "b"), None, 0.5, False, 3)
    text = parser.format_help()
    grid = text[text.index("grid:") : text.index("training:")]
    assert "--pairs" in grid and "--dry" in grid and "--rate" not in grid
    assert text.count("grid:") == 1 and "--hidden" not in text and "--quiet" not in text
    assert "comma-separated (default: a,b)" in text and "of learning (default: 0.5)" in text
    assert "of the run (default: x)" in text and text.count("(default: ") == 3


def test_errors_are_one_line_that_names_flag_and_range(capsys):
    with pytest.raises(SystemExit) as end:
        example_parser().parse_args(["--rate", "2"])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "example.py: error: argument --rate: must be a number at least 0 and at most 1, got '2'\n"
    )
    with pytest.raises(SystemExit):
        example_parser().parse_args(["--x\x1b[0m"])
    assert "\x1b" not in capsys.readouterr().err


def help_text(capsys):
    with pytest.raises(SystemExit) as end:
        run_all.main(["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_every_flag_has_help_and_default(capsys):
    """Issue 14.12: the help showed defaults of three flags out of 36, and three had no help."""
    text = " ".join(help_text(capsys).split()) + " --"
    flags = [f for cls in (Settings, Method) for f in fields(cls) if f.metadata]
    assert 20 <= len(flags) <= 38
    for setting in flags:
        start = text.index(f" --{setting.name.replace('_', '-')} ", text.index("options:"))
        description = text[start : text.index(" --", start + 4)]
        assert " ".join(setting.metadata["help"].split()) in description
        if setting.default not in (None, False):
            default = setting.default
            if isinstance(default, tuple):
                default = ",".join(map(str, default))
            assert f"(default: {default})" in description, description


def test_help_groups_the_flags(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = help_text(capsys)
    starts = [
        text.index(f"\n{title}:\n") for title in "grid rows training evaluation machine".split()
    ]
    assert starts == sorted(starts)
    assert starts[0] < text.index("  --tasks") < starts[1] < text.index("  --data-dir") < starts[2]
    assert starts[2] < text.index("  --k ") < starts[3] < text.index("  --gamma ") < starts[4]
    assert max(map(len, text.splitlines())) <= 100


# The end of a process


@pytest.fixture
def ended(exit_code):
    """ended(main, prog): the exit code of a command that resumes, in this process."""

    def run(main, prog="x.py"):
        return exit_code(main, prog, resumes=True)

    return run


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("bad\x1b"), 1, "x.py: error: bad\\x1b\n"),
        (OSError("no room"), 1, "x.py: error: no room\n"),
        (FloatingPointError("loss is not finite"), 1, "x.py: error: loss is not finite\n"),
        (ranks.Stopped("SIGTERM"), 143, "x.py: stopped by SIGTERM; the same command goes on from"),
        (ranks.Stopped("SIGINT"), 130, "x.py: stopped by SIGINT; the same command goes on from"),
        (KeyboardInterrupt(), 130, "x.py: stopped by SIGINT"),
        (SystemExit(2), 2, ""),
        (SystemExit(None), 0, ""),
    ],
)
def test_a_process_ends_with_one_line_and_a_code(error, code, message, ended, capsys):
    assert ended(raising(error)) == code
    err = capsys.readouterr().err
    assert err.startswith(message) and err.count("\n") == (1 if message else 0)


def test_ctrl_c_ends_a_command_that_saves_nothing():
    """At once, and without a word of a saved state; such commands ignored it to their end."""
    source = "import cli, time\ndef main():\n    print('on', flush=True)\n    time.sleep(60)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", source + "cli.run_command(main, 'x.py')"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # a shell's background job ignores Ctrl-C, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == "x.py: stopped by SIGINT\n"


def test_exit_codes_of_what_ends_well(ended, capsys):
    assert [ended(lambda: None), ended(lambda: 0), ended(lambda: 3)] == [0, 0, 3]
    assert capsys.readouterr().err == ""


def test_bugs_stay_tracebacks(ended):
    for error in (RuntimeError("shapes"), KeyError("AdaSPEC"), RuntimeError("gloo: alone")):
        with pytest.raises(type(error)):
            cli.run_command(raising(error), "x.py")


def test_a_rank_whose_peer_is_gone_says_so(ended, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert ended(raising(RuntimeError("[gloo/transport] Connection closed by peer"))) == 1
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert capsys.readouterr().err == (
        "x.py (rank 0): another rank is gone, torchrun names it; the same command goes on\n"
    )
    assert pauses == [10], "time for torchrun to find the dead rank first"


def test_rank_0_speaks_first(ended, capsys, monkeypatch):
    """What is wrong on every rank is said once: torchrun ends the others while they wait."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(ranks, "stop_signal", signal.SIGTERM)
    assert ended(raising(ValueError("bad"))) == 143
    assert ended(lambda: run_all.main(["--k", "0"])) == 143
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(ranks, "stop_signal", None)
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert ended(raising(ValueError("of this rank alone"))) == 1
    assert capsys.readouterr().err == "x.py (rank 1): error: of this rank alone\n"
    assert 3 <= sum(pauses) <= 10


def test_ctrl_c_during_imports_is_one_line(tmp_path):
    """Issue 14.12. A module of the name of a slow import stands for it."""
    (tmp_path / "datasets.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_all.py"), "--preset", "tiny"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        # a shell's background job ignores Ctrl-C, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0 and err == "run_all.py: stopped by SIGINT\n"


def test_other_errors_during_imports_stay_tracebacks(tmp_path):
    source = "import interrupt\nraise KeyError('bug')"
    process = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, timeout=30
    )
    assert process.returncode == 1 and "Traceback" in process.stderr
