"""bench_faults.py: what counts as a difference between two runs, and one run killed for real."""

import json

import pytest

from extras import bench_faults


def make_run(folder, weights=b"weights", **row):
    (folder / "tiny").mkdir(parents=True)
    (folder / "tiny" / "model.safetensors").write_bytes(weights)
    (folder / "results.json").write_text(json.dumps({"rows": [{"alpha": 0.5} | row]}))
    return folder


def test_difference(tmp_path):
    whole = make_run(tmp_path / "whole", seconds=1.0, speedup=2.0)
    assert bench_faults.difference(whole, make_run(tmp_path / "a", seconds=3.0)) is None
    other = make_run(tmp_path / "b", weights=b"weighty")
    assert bench_faults.difference(whole, other) == "tiny/model.safetensors"
    assert bench_faults.difference(whole, make_run(tmp_path / "c", alpha=0.6)) == "results.json"
    (whole / "tiny" / "model.safetensors").unlink()
    assert bench_faults.difference(whole, other) == "models: ['tiny/model.safetensors']"


class Process:
    """Stands for a run of run_all.py: a kill leaves it after its first stage."""

    def __init__(self, out):
        self.returncode = 0
        self.printed = "  base-target: 8 steps\n  target: 8 steps\nResults: there\n"
        if not out.exists():
            make_run(out)

    def kill(self):
        self.returncode = -9
        self.printed = "  base-target: 8 steps\n"

    def communicate(self):
        return self.printed, None


def test_kills_are_compared_and_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_faults, "start", Process)
    out = tmp_path / "faults.json"
    flags = ["--kills", "2", "--out", str(tmp_path / "runs"), "--json", str(out)]
    bench_faults.main(flags)
    assert "2 of 2 killed runs ended in the same files" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["same"] == 2 and result["run"][:2] == ["--preset", "tiny"]
    assert result["kills"] == [{"killed_after": "base-target", "difference": None}] * 2
    assert result["command"].endswith("extras.bench_faults --kills 2 --out runs --json faults.json")
    with pytest.raises(ValueError, match="holds runs already"):
        bench_faults.main(flags)


def test_other_files_and_a_run_that_does_not_end_are_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_faults, "start", Process)
    monkeypatch.setattr(bench_faults, "difference", lambda out, other: "results.json")
    with pytest.raises(ValueError, match="exact resume is broken"):
        bench_faults.main(["--kills", "1", "--out", str(tmp_path / "other")])
    monkeypatch.setattr(
        Process, "communicate", lambda self: setattr(self, "returncode", 1) or ("", None)
    )
    with pytest.raises(ValueError, match="killed after nothing does not end"):
        bench_faults.main(["--kills", "1", "--out", str(tmp_path / "broken")])


@pytest.mark.slow
def test_killed_run_ends_in_the_same_files(tmp_path, capsys):
    bench_faults.main(["--kills", "1", "--seed", "3", "--out", str(tmp_path)])
    assert "1 of 1 killed runs ended in the same files" in capsys.readouterr().out
