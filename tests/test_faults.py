"""Nothing is lost: what is killed or asked to stop goes on to the same bits; what is damaged is noticed and made anew."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bench
import run_all
import train
from run_all import cross_entropy

ROOT = Path(run_all.__file__).parent
SHORT = "--preset tiny --limit 48 --max-steps 3 --eval-prompts 6 --eval-batch 2 --timed-prompts 1 --max-new-tokens 12".split()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nobody_asked(monkeypatch):
    monkeypatch.setattr(train, "asked_to_stop", None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    run_all.main([*SHORT, "--out", str(out)])
    return out


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


# Exact resume


def stopping_at(step):
    """An objective with dropout of its own that asks the run to stop in a step."""
    calls = 0

    def objective(hidden, head, batch):
        nonlocal calls
        calls += 1
        if calls == step:
            train.asked_to_stop = signal.SIGTERM
        return cross_entropy(torch.nn.functional.dropout(hidden, 0.1), head, batch)

    return objective


def run(model, examples, folder=None, objective=None, **settings):
    settings = {"vocab_size": 400, "lr": 1e-3, "epochs": 2, "batch_size": 12} | settings
    checkpoints = train.Checkpoints(folder, "mark") if folder else None
    summary = train.train(
        model, examples, objective or stopping_at(None), checkpoints=checkpoints, **settings
    )
    return {name: value.clone() for name, value in model.state_dict().items()}, summary


def stop_in(step, make_model, examples, folder, **settings):
    with pytest.raises(train.Stopped, match="SIGTERM"):
        run(make_model(), examples, folder, stopping_at(step), **settings)
    train.asked_to_stop = None


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_stopped_training_goes_on_to_the_same_bits(make_model, examples, tmp_path, dtype):
    """Weights, moments, loss scale and the generator of dropout: twice stopped and never stopped are bit for bit the same."""
    expected, undisturbed = run(make_model(), examples, dtype=dtype)
    assert undisturbed["steps"] == 10
    stop_in(3, make_model, examples, tmp_path, dtype=dtype)
    stop_in(4, make_model, examples, tmp_path, dtype=dtype)
    assert [path.stem for path in sorted(tmp_path.glob("*.pt"))] == [
        "000000003-mark",
        "000000007-mark",
    ]
    found, summary = run(make_model(seed=9), examples, tmp_path, dtype=dtype)
    assert same(found, expected)
    assert summary | {"seconds": 0} == undisturbed | {"seconds": 0}


def test_on_policy_training_goes_on_to_the_same_bits(make_model, examples, tmp_path):
    """Saved only where the responses are written anew, from the very weights that are saved."""

    def rewrite(model, rows, step):
        parts = [
            model(torch.from_numpy(examples[row].input_ids).long()[None])
            .logits[0, :, :400]
            .argmax(-1)
            for row in rows
        ]
        return [
            examples[row]._replace(input_ids=part.int().numpy())
            for row, part in zip(rows, parts, strict=True)
        ]

    expected, _ = run(make_model(), examples, rewrite=rewrite, refresh=3)
    stop_in(4, make_model, examples, tmp_path, rewrite=rewrite, refresh=3)
    assert [path.stem for path in tmp_path.glob("*.pt")] == ["000000006-mark"]
    assert same(run(make_model(), examples, tmp_path, rewrite=rewrite, refresh=3)[0], expected)
    assert not same(run(make_model(), examples)[0], expected)


def test_checkpoints_of_other_settings_do_not_push_new_ones_out(make_model, examples, tmp_path):
    stop_in(7, make_model, examples, tmp_path)
    other = train.Checkpoints(tmp_path, "other")
    (tmp_path / "000000009-other.pt.partial").touch()
    assert other.newest() is None
    other.save(2, {})
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "000000002-other.pt",
        "000000002-other.sha256",
    ]
    assert other.newest()


def test_ruined_weights_are_no_finished_stage(make_model, examples):
    with pytest.raises(train.NonFiniteError, match="weights are not finite after the last step"):
        run(make_model(), examples, lr=1e38, max_steps=1)

    def nan_gradient(hidden, head, batch):
        loss, count = cross_entropy(hidden, head, batch)
        return loss + (hidden - hidden.detach()).sum().sqrt(), count

    with pytest.raises(train.NonFiniteError, match="no finite gradient in 20 steps in a row"):
        run(make_model(), examples, objective=nan_gradient, dtype="float16", epochs=5)


def test_saves_by_the_clock_and_keeps_two_generations(make_model, examples, tmp_path):
    run(make_model(), examples, tmp_path, save_minutes=0)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        f"00000000{i}-mark.{end}" for i in (8, 9) for end in ("pt", "sha256")
    ]


@pytest.mark.parametrize(
    "damage", [truncate, flip, lambda path: path.with_suffix(".sha256").unlink()]
)
def test_damaged_checkpoint_is_named_and_the_one_before_used(
    make_model, examples, tmp_path, damage, capsys
):
    expected, _ = run(make_model(), examples)
    stop_in(3, make_model, examples, tmp_path)
    stop_in(4, make_model, examples, tmp_path)
    damage(tmp_path / "000000007-mark.pt")
    found, _ = run(make_model(), examples, tmp_path)
    out = capsys.readouterr().out
    assert "000000007-mark.pt is damaged" in out and "going on after step 3" in out
    assert same(found, expected)
    truncate(tmp_path / "000000003-mark.pt")
    found, _ = run(make_model(), examples, tmp_path)
    assert same(found, expected)


def test_checkpoint_of_another_stage_is_not_used(make_model, examples, tmp_path):
    stop_in(3, make_model, examples, tmp_path)
    assert (
        train.Checkpoints(tmp_path, "mark").newest()
        and not train.Checkpoints(tmp_path, "other").newest()
    )
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_the_checkpoint_before(make_model, examples, tmp_path):
    """RLIMIT_FSIZE makes writes fail half way through, as a full disk does."""
    stop_in(3, make_model, examples, tmp_path)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, unlimited[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*000000004-mark.pt.partial.*MiB free"):
            run(make_model(), examples, tmp_path, save_minutes=0)
        with pytest.raises(OSError, match=r"cannot write .*0.bin"):
            cache(tmp_path / "cache", examples * 20).fill(values_of([]), CPU, 4, "toy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert [path.name for path in sorted(tmp_path.glob("*.pt*"))] == ["000000003-mark.pt"]
    assert same(run(make_model(), examples, tmp_path)[0], run(make_model(), examples)[0])


# The cache


def cache(folder, examples):
    return train.TokenCache(folder, "mark", examples, 3, torch.float32)


def values_of(asked, stop_after=None):
    """Values that tell example and position; notes the examples asked for; asks to stop after so many batches."""

    def compute(batch):
        asked.extend(batch.rows)
        if len(asked) == stop_after:
            train.asked_to_stop = signal.SIGINT
        return torch.stack([batch.labels, batch.index, batch.labels * 7], -1).float()

    return compute


def content(made, examples):
    return [made.read(train.make_batch(examples, [row], CPU)) for row in range(len(examples))]


def test_stopped_cache_goes_on_where_it_was(examples, tmp_path):
    whole, asked = cache(tmp_path / "whole", examples), []
    whole.fill(values_of([]), CPU, 4, "toy")
    stopped = cache(tmp_path / "stopped", examples)
    with pytest.raises(train.Stopped, match="SIGINT"):
        stopped.fill(values_of(asked, stop_after=16), CPU, 4, "toy")
    train.asked_to_stop = None
    stopped.fill(values_of(asked), CPU, 4, "toy")
    assert sorted(asked) == list(range(len(examples))), "an example was run twice or never"
    assert (tmp_path / "stopped" / "0.bin").read_bytes() == (
        tmp_path / "whole" / "0.bin"
    ).read_bytes()
    assert all(map(torch.equal, content(whole, examples), content(stopped, examples)))


def flip_first(path):
    flip(path, 0)


def drop_note(path):
    path.with_suffix(".json").unlink()


@pytest.mark.parametrize("damage", [truncate, flip, flip_first, drop_note])
@pytest.mark.parametrize("stop_after", [None, 16])
def test_damaged_cache_is_named_and_made_anew(examples, tmp_path, capsys, damage, stop_after):
    made, asked = cache(tmp_path, examples), []
    if stop_after:
        with pytest.raises(train.Stopped):
            made.fill(values_of([], stop_after), CPU, 4, "toy")
        train.asked_to_stop = None
    else:
        made.fill(values_of([]), CPU, 4, "toy")
    damage(tmp_path / "0.bin")
    again = cache(tmp_path, examples)
    again.fill(values_of(asked), CPU, 4, "toy")
    harmless = stop_after and damage is flip  # the last byte was yet to be written
    assert len(asked) == len(examples) - (16 if harmless else 0)
    assert ("0.bin is damaged" in capsys.readouterr().out) == (
        damage is not drop_note and not harmless
    )
    fresh = cache(tmp_path / "fresh", examples)
    fresh.fill(values_of([]), CPU, 4, "toy")
    assert all(map(torch.equal, content(again, examples), content(fresh, examples)))


# The driver's files


def test_damaged_files_of_a_finished_run_are_noticed(finished, tmp_path, capsys, recwarn):
    before = {path: path.read_bytes() for path in finished.rglob("*.safetensors")}
    cell = finished / "tiny" / "arithmetic" / "seed0"
    flip(cell / "adaspec" / "model.safetensors", 5000)
    truncate(cell / "base-draft" / "model.safetensors")
    flip(cell / "evaluation.json", 300)
    truncate(cell / "target" / "stage.json")
    flip(next(finished.glob("tokenised/*.tokens")), 500)
    run_all.main([*SHORT, "--out", str(finished)])
    out = capsys.readouterr().out
    for name in (
        "adaspec/model.safetensors",
        "base-draft/model.safetensors",
        "evaluation.json",
        "target/stage.json",
    ):
        assert f"{name} is damaged" in out, name
    assert any("is damaged: tokenising anew" in str(warning.message) for warning in recwarn)
    assert {path: path.read_bytes() for path in finished.rglob("*.safetensors")} == before
    assert "distilled-3-epochs: done before" in out and "base-target: done before" in out


def test_two_runs_on_one_folder(tmp_path):
    with run_all.locked(tmp_path), pytest.raises(ValueError, match="another run is using"):
        run_all.main([*SHORT, "--out", str(tmp_path)])


def test_one_seed_gives_one_result(finished, tmp_path):
    run_all.main([*SHORT, "--out", str(tmp_path)])
    assert bench.difference(finished, tmp_path) is None
    made_by = json.loads((tmp_path / "results.json").read_text())
    assert {"torch", "git", "commands", "seconds"} <= made_by.keys()


# Whole runs, ended from outside


def start(out, *launcher):
    command = [sys.executable, *launcher, str(ROOT / "run_all.py"), *SHORT, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process, words):
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"{words!r} never came: {process.stderr.read()[:3000]}")


def test_signals_save_and_say_so(finished, tmp_path):
    for number, code, words in (
        (signal.SIGTERM, 143, "train rows"),
        (signal.SIGINT, 130, "base-target"),
    ):
        process = start(tmp_path)
        wait_for(process, words)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors[-2000:]
        assert (
            f"stopped by {number.name}; the same command goes on" in errors
            and "Traceback" not in errors
        )
    run_all.main([*SHORT, "--out", str(tmp_path)])
    assert bench.difference(finished, tmp_path) is None


def test_killed_runs_end_in_the_same_files(tmp_path, capsys):
    assert bench.main(["faults", "--kills", "1", "--seed", "3", "--out", str(tmp_path)]) == 0
    assert "1 of 1 killed runs ended in the same files" in capsys.readouterr().out


def test_a_dead_rank_is_named_and_torchruns_restart_resumes(tmp_path):
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--max-restarts",
    ]
    process = start(tmp_path / "killed", *launcher, "1")
    wait_for(process, "base-target")
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (first,) = (
        pid for pid in workers if b"\0RANK=0\0" in Path(f"/proc/{pid}/environ").read_bytes()
    )
    killed = time.monotonic()
    os.kill(int(first), signal.SIGKILL)
    wait_for(process, "base-target: done before")
    assert time.monotonic() - killed < 60
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    assert "local_rank: 0" in errors and "run_all.py (rank 1): another rank is gone" in errors
    undisturbed = start(tmp_path / "whole", *launcher, "0")
    _, errors = undisturbed.communicate(timeout=120)
    assert undisturbed.returncode == 0, errors[-2000:]
    assert bench.difference(tmp_path / "whole", tmp_path / "killed") is None
