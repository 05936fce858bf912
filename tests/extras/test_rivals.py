"""rivals.py: what contestants write, and what is made of the seconds. No test is about speed."""

import json
from types import SimpleNamespace

import pytest
import torch

from extras import measure, rivals
from extras.eagle import Eagle
from models import keep_layers, load_model
from short_head import shorten_head

NAMES = ["alone", "draft", "head", "generate", "lookup", "assisted"]


@pytest.fixture
def flags(tmp_path, make_model, tokenizer):
    """A target, a draft of its own layers and a head on it."""
    target = make_model("neox", initializer_range=0.2, num_hidden_layers=3)
    target.save_pretrained(tmp_path / "target")
    keep_layers(target, [0, 2]).save_pretrained(tmp_path / "draft")
    for name in ("target", "draft"):
        tokenizer.save_pretrained(tmp_path / name)
    Eagle(load_model(tmp_path / "target")).save_pretrained(tmp_path / "head")
    models = [f"--{name}={tmp_path / name}" for name in ("target", "draft", "head")]
    return [*models, "--device", "cpu", "--gamma", "2", "--max-new-tokens", "12", "--batch", "3"]


@pytest.fixture
def written(monkeypatch):
    """What each contestant writes: name -> sequences, one a turn."""
    texts = {}
    contestants = rivals.contestants

    def noted(*arguments):
        def note(name, call, ids):
            texts.setdefault(name, []).append(call(ids).tolist())
            return torch.tensor(texts[name][-1])

        calls = contestants(*arguments)
        return {name: lambda ids, n=name, c=call: note(n, c, ids) for name, call in calls.items()}

    monkeypatch.setattr(rivals, "contestants", noted)
    return texts


def test_all_write_the_targets_greedy_text(flags, written, tmp_path, capsys):
    rivals.main([*flags, "--json", str(tmp_path / "out.json")])
    assert list(written) == NAMES and len(written["alone"]) == 4  # one to warm up
    assert all(texts == written["alone"] for texts in written.values())
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["speeds"]) == NAMES and result["protocol"]["count"] == 3
    assert result["speeds"]["alone"]["speedup"] == 1
    for speed in result["speeds"].values():
        low, high = speed["interval"]
        assert 0 < low <= speed["speedup"] <= high and speed["ms_per_token"] > 0
    assert "  lookup    " in capsys.readouterr().out


def test_above_temperature_0_all_sample(flags, written):
    """Each prompt is another, and the one that warms up is the first: sampled, two texts of it
    differ."""
    rivals.main([*flags, "--temperature", "1", "--dtype", "bfloat16"])
    assert list(written) == NAMES
    assert all(texts[0] != texts[1] for texts in written.values())


def test_transformers_gets_no_draft_with_a_short_head(make_model):
    target, draft = make_model(), shorten_head(make_model(seed=1), torch.arange(0, 400, 2))
    args = SimpleNamespace(max_new_tokens=4, temperature=0.0, gamma=2)
    assert list(rivals.contestants(args, target, draft, None, [0])) == [
        "alone", "draft", "generate", "lookup",
    ]  # fmt: skip


def test_speeds_are_medians_over_prompts():
    rates = {"alone": [10.0, 20.0, 40.0], "draft": [20.0, 60.0, 40.0]}
    results = rivals.speeds(rates)
    assert results["draft"]["speedup"] == 2.0 and results["draft"]["interval"] == (1.0, 3.0)
    assert results["alone"]["ms_per_token"] == 50.0 and results["draft"]["ms_per_token"] == 25.0


def test_turns_rotate_and_tokens_count_up_to_the_end(monkeypatch):
    ticks = iter(range(100))
    order = []
    monkeypatch.setattr(rivals, "clock", lambda device: float(next(ticks)))

    def call(name):
        order.append(name)
        return torch.tensor([[5, 6, 7, 0, 9]])

    calls = {name: lambda ids, n=name: call(n) for name in ("alone", "draft")}
    rates = rivals.compare(calls, [torch.tensor([[5]])] * 2, [0], measure.device("cpu"))
    assert order == ["alone", "draft", "draft", "alone", "alone", "draft"]
    assert rates == {"alone": [3.0, 3.0], "draft": [3.0, 3.0]}
