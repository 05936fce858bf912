"""bench_train.py: that it compares one computation, and that it runs. No test is about speed."""

import json

import pytest
import torch

from extras import bench_train, measure

SMALL = {"vocab_size": 300, "target_width": 48, "draft_width": 16}
SMALL |= {"rows": 3, "length": 40, "prompt": 18}
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


def test_benchmark_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_train, "SHAPE", SMALL)
    out = tmp_path / "t.json"
    flags = ["--parts", "loss,epoch", "--limit", "20", "--rounds", "1", "--json", str(out)]
    bench_train.main(flags)
    result = json.loads(out.read_text())
    for part in ("loss step", "stage 2 epoch of the tiny pair"):
        assert result[f"{part}, times faster"]["median"] > 0
    assert result["command"].startswith("python -m extras.bench_train --parts loss,epoch")
    assert result["data"] == "arithmetic" and result["dtype"] == "bfloat16"
    with pytest.raises(SystemExit):
        bench_train.main(["--parts", "loss,all"])


def test_scale_runs(tmp_path, monkeypatch):
    shapes = []

    def small(shape, dtype, device, whole_step):
        shapes.append(shape)
        return step_calls(SMALL | {"rows": shape["rows"] // 4}, dtype, device, whole_step)

    step_calls = bench_train.step_calls
    monkeypatch.setattr(bench_train, "step_calls", small)
    monkeypatch.setattr(measure, "peak_memory", lambda call, device: 2**21)
    monkeypatch.setattr(bench_train, "seconds_on", lambda count, dtype: 3.0 / count)
    bench_train.main(["--scale", "--rounds", "1", "--json", str(tmp_path / "s.json")])
    result = json.loads((tmp_path / "s.json").read_text())
    assert [point["value"] for point in result["response tokens"]] == [460, 920, 1840, 3680]
    assert [point["value"] for point in result["chunk"]] == [64, 128, 256, 512]
    assert [shape["vocab_size"] for shape in shapes[4:8]] == [6288, 12576, 25152, 50304]
    assert result["parallel efficiency of 2 ranks"]["median"] == 1


@pytest.mark.slow
def test_two_ranks_are_started(monkeypatch):
    assert bench_train.seconds_on(2, "float32") > 0


def test_peak_memory_is_that_of_the_call():
    peak = measure.peak_memory(lambda: torch.ones(2**24), CPU)
    assert 60 * 2**20 < peak < 100 * 2**20
