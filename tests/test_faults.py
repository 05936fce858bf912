"""Nothing is lost: whole runs that are ended from outside go on to the same files, and what is
damaged in a finished one is named and made anew."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run_all
import storage
from tests.damage import flip, truncate

ROOT = Path(run_all.__file__).parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TIMES = {
    "speedup", "speedup_interval", "tokens_per_second", "target_tokens_per_second",
    "seconds_per_response", "cost_ratio", "scoring_ratio", "seconds", "cache_seconds",
}  # fmt: skip


def weights(out):
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*.safetensors")}


def rows_without_times(out):
    rows = json.loads((out / "results.json").read_text())["rows"]
    return [{key: row[key] for key in row.keys() - TIMES} for row in rows]


def histories(out):
    """What each stage's training did, but for times."""
    lines = {}
    for path in out.rglob("history.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        lines[path.relative_to(out)] = [
            {key: record[key] for key in record.keys() - TIMES} for record in records
        ]
    return lines


def check_same(out, other):
    """The same weights, bit for bit, and the same histories and results but for times."""
    assert weights(out) == weights(other)
    assert histories(out) == histories(other) and len(histories(out)) == 5
    assert rows_without_times(out) == rows_without_times(other)


# Damage


def test_damage_in_a_finished_run_is_named_and_made_anew(
    run_copy, finished_run, short_flags, capsys
):
    cell = run_copy / "tiny" / "arithmetic" / "seed0"
    flip(cell / "adaspec" / "model.safetensors", 5000)
    truncate(cell / "base-draft" / "model.safetensors")
    evaluation = sorted(cell.glob("evaluations/*.json"))[1]
    flip(evaluation, 300)
    truncate(cell / "target" / "stage.json")
    tokenised = sorted(run_copy.glob("tokenised/*.tokens"))[0]
    flip(tokenised, 500)
    before = {path: path.stat().st_mtime_ns for path in run_copy.rglob("*.json")}
    run_all.main([*short_flags, "--out", str(run_copy)])
    printed = capsys.readouterr().out
    for name in ("adaspec/model.safetensors", "base-draft/model.safetensors", "target/stage.json"):
        assert f"{name} is damaged" in printed, name
    assert f"{evaluation.name} is damaged" in printed and f"{tokenised.name} is damaged" in printed
    for name in ("distilled-3-epochs", "base-target"):
        assert f"{name}: done before" in printed, name
    check_same(run_copy, finished_run)
    written = {path for path, changed in before.items() if path.stat().st_mtime_ns != changed}
    evaluations = {path for path in written if path.parent.name == "evaluations"}
    assert evaluations == {evaluation}, "the other drafts' rows are whole"


def test_a_stage_json_that_is_none_of_ours_costs_the_stage(
    run_copy, finished_run, short_flags, capsys
):
    """It was a TypeError."""
    path = run_copy / "tiny" / "arithmetic" / "seed0" / "adaspec" / "stage.json"
    storage.write_json(path, [])
    run_all.main([*short_flags, "--out", str(run_copy)])
    assert "  adaspec: 3 steps" in capsys.readouterr().out
    check_same(run_copy, finished_run)


def test_two_runs_on_one_folder(tmp_path, short_flags):
    with storage.lock(tmp_path), pytest.raises(ValueError, match="another run is using"):
        run_all.main([*short_flags, "--out", str(tmp_path)])


def test_an_error_of_a_run_is_not_taken_for_another_run(tmp_path):
    """A full pipe that does not block raises what a lock that is held does."""
    with pytest.raises(BlockingIOError, match="full"), storage.lock(tmp_path):
        raise BlockingIOError("full")


# Runs ended from outside


def start(flags, out, *launcher):
    command = [sys.executable, *launcher, str(ROOT / "run_all.py"), *flags, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process, words):
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"{words!r} never came: {process.stderr.read()[-3000:]}")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_says_so(run_copy, finished_run, short_flags, number, code):
    """While the last stage of a run is trained."""
    storage.remove_folder(run_copy / "tiny" / "arithmetic" / "seed0" / "adaspec")
    (run_copy / "results.json").unlink()
    process = start(short_flags, run_copy, "-u")
    wait_for(process, "distilled-3-epochs: done before")
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == code, errors[-2000:]
    message = f"run_all.py: stopped by {number.name}; the same command goes on from the saved state"
    assert errors.splitlines()[-1] == message and "Traceback" not in errors
    assert not (run_copy / "results.json").exists()
    run_all.main([*short_flags, "--out", str(run_copy)])
    check_same(run_copy, finished_run)
    assert not [*run_copy.rglob("*.partial"), *run_copy.rglob("*.pt")]


@pytest.mark.slow
def test_a_dead_rank_is_named_and_torchruns_restart_resumes(tmp_path, short_flags):
    process = start(short_flags, tmp_path / "killed", *TORCHRUN, "--max-restarts", "1")
    wait_for(process, "base-target")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
    (first,) = (pid for pid, environment in workers.items() if b"\0RANK=0\0" in environment)
    killed = time.monotonic()
    os.kill(int(first), signal.SIGKILL)
    wait_for(process, "base-target: done before")
    assert time.monotonic() - killed < 60
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    assert "local_rank: 0" in errors and "run_all.py (rank 1): another rank is gone" in errors
    undisturbed = start(short_flags, tmp_path / "whole", *TORCHRUN)
    _, errors = undisturbed.communicate(timeout=120)
    assert undisturbed.returncode == 0, errors[-2000:]
    check_same(tmp_path / "whole", tmp_path / "killed")
