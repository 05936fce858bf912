"""bench_train.py: that it compares one computation, and that it runs. No test is about speed."""

import json

import pytest
import torch

from distillspec import jensen_shannon
from extras import bench_train, measure, peers

BATCH = {"rows": 3, "length": 40, "prompt": 18}
SMALL = measure.SHAPES["tiny"] | BATCH
CPU = torch.device("cpu")


def test_official_loss_step_and_ours_give_one_gradient():
    calls, draft, _ = bench_train.step_calls(SMALL, torch.float32, CPU, whole_step=False)
    gradients = []
    for call in calls.values():
        call()
        weights = [p for p in draft.parameters() if p.requires_grad]
        assert draft.get_output_embeddings().weight in set(weights)
        gradients.append(torch.cat([weight.grad.flatten() for weight in weights]))
    official, ours = gradients
    assert (official - ours).norm() < 1e-5 * official.norm()


def test_official_whole_step_and_ours_give_one_draft():
    """Forwards, clipping and the optimiser included."""
    weights = []
    for name in ("official", "ours"):
        calls, draft, seconds = bench_train.step_calls(SMALL, torch.float32, CPU, whole_step=True)
        before = parameters(draft)
        calls[name]()
        calls[name]()
        assert seconds > 0 and (parameters(draft) - before).norm() > 1e-4
        weights.append(parameters(draft))
    assert (weights[0] - weights[1]).norm() < 1e-2 * (weights[0] - before).norm()


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_liger_kernels_loss_is_ours(tmp_path, monkeypatch):
    pytest.importorskip("liger_kernel")
    monkeypatch.setattr(bench_train, "BATCH", BATCH)
    monkeypatch.setattr(peers, "LIGER_OPTIONS", {"by 16": {"chunk_size": 16, "compiled": False}})
    flags = ["--parts", "liger", "--shapes", "tiny", "--vocab-size", "300", "--rounds", "2"]
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.json"
        bench_train.main([*flags, "--dtype", dtype, "--json", str(out)])
        result = json.loads(out.read_text())
        assert result["JSD loss step, relative difference to Liger-Kernel's"] < 1e-5
        name = "JSD loss step against Liger-Kernel by 16"
        assert len(result[f"{name}, times faster"]["rounds"]) == 2
        assert result[f"{name}, times less peak memory"] >= 0


def test_another_loss_is_no_peer(monkeypatch):
    """A peer whose gradient is another by a tenth is noticed, and nothing is timed."""

    def loss(states, weight, target_states, target_weight, labels):
        p, q = target_states @ target_weight.T, states @ weight.T
        return jensen_shannon(p, q).mean() * factor

    comparison = bench_train.Comparison(1, CPU)
    monkeypatch.setattr(bench_train, "liger_losses", lambda: {"as it comes": loss})
    monkeypatch.setattr(bench_train, "version", lambda name: "0")
    factor = 1.1
    with pytest.raises(ValueError, match=r"is another, by 1\.0e-01 of ours"):
        bench_train.compare_liger(comparison, SMALL, torch.float32)
    assert comparison.results == {}
    factor = 1
    bench_train.compare_liger(comparison, SMALL, torch.float32)
    name = "JSD loss step against Liger-Kernel as it comes, times faster"
    assert comparison.results[name]["median"] > 0


def test_liger_kernel_is_optional(monkeypatch, capsys):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    bench_train.main(["--parts", "liger", "--shapes", "tiny", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("liger: not installed: skipped")


def test_benchmark_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_train, "BATCH", BATCH)
    out = tmp_path / "t.json"
    flags = ["--parts", "loss,epoch,step", "--limit", "20", "--shapes", "tiny", "--rounds", "1"]
    bench_train.main([*flags, "--dtype", "float32", "--device", "cpu", "--json", str(out)])
    result = json.loads(out.read_text())
    for part in ("loss step", "stage 2 epoch of the tiny pair", "whole step after the first epoch"):
        assert result[f"{part}, times faster"]["median"] > 0
    assert result["whole step after the first epoch, times less peak memory"] >= 0
    assert "loss step, times less peak memory: " in capsys.readouterr().out
    assert result["command"].startswith("python -m extras.bench_train --parts loss,epoch")
    assert (result["data"], result["dtype"]) == ("arithmetic", "float32")
    assert result["device"] == "cpu"


def test_what_cannot_be_measured_is_refused(capsys):
    devices = [] if torch.cuda.is_available() else [("--device cuda", "torch finds no GPU")]
    for flags, words in (
        ("--parts loss,all", "unknown name 'all'"),
        ("--shapes llama", "unknown name 'llama'"),
        ("--device gpu", "unknown name 'gpu'"),
        *devices,
    ):
        with pytest.raises(SystemExit):
            bench_train.main(flags.split())
        assert words in capsys.readouterr().err


def test_shapes_are_those_of_the_paper():
    sizes = {}
    for name, shape in measure.SHAPES.items():
        for role in ("target", "draft"):
            meta = torch.device("meta")
            model = measure.random_model(shape["vocab_size"], shape[role], torch.float32, meta, 0)
            sizes[name, role] = sum(p.numel() for p in model.parameters())
    # of the models on the Hub, embeddings and head included
    assert sizes["pythia", "target"] == 1_414_647_808
    assert sizes["pythia", "draft"] == 30_494_720
    assert sizes["tiny", "target"] > 4 * sizes["tiny", "draft"]


def test_scale_runs(tmp_path, monkeypatch):
    shapes = []

    def small(shape, dtype, device, whole_step):
        shapes.append(shape)
        return step_calls(SMALL | {"rows": shape["rows"] // 4}, dtype, device, whole_step)

    step_calls = bench_train.step_calls
    monkeypatch.setattr(bench_train, "step_calls", small)
    monkeypatch.setattr(measure, "peak_memory", lambda call, device: 2**21)
    monkeypatch.setattr(bench_train, "seconds_on", lambda count, dtype, device: 3.0 / count)
    flags = ["--scale", "--rounds", "1", "--device", "cpu"]
    bench_train.main([*flags, "--json", str(tmp_path / "s.json")])
    result = json.loads((tmp_path / "s.json").read_text())
    assert [point["value"] for point in result["response tokens"]] == [460, 920, 1840, 3680]
    assert [point["value"] for point in result["chunk"]] == [64, 128, 256, 512, 1024]
    assert [shape["vocab_size"] for shape in shapes[4:8]] == [6288, 12576, 25152, 50304]
    assert result["parallel efficiency of 2 ranks"]["median"] == 1


@pytest.mark.slow
def test_two_ranks_are_started(monkeypatch):
    assert bench_train.seconds_on(2, "float32", CPU) > 0


def test_peak_memory_is_that_of_the_call():
    peak = measure.peak_memory(lambda: torch.ones(2**24), CPU)
    assert 60 * 2**20 < peak < 100 * 2**20
