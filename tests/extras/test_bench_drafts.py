"""bench_drafts.py: what contestants write, and what is made of seconds. No test is about speed."""

import json
from types import SimpleNamespace

import pytest
import torch

from extras import bench_drafts, measure
from extras.bench_drafts import Turn
from extras.eagle import Eagle
from models import keep_layers, load_model
from short_head import shorten_head
from speculative import Stats

DRAFTS = ["draft", "draft tree 2,2", "draft tree 1", "draft beam 2,4"]
HEADS = [name.replace("draft", "head") for name in DRAFTS]
OURS = ["alone", *DRAFTS, *HEADS]
TRANSFORMERS = ["generate", "lookup", "assisted"]


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


def test_all_write_the_targets_greedy_text(flags, tmp_path, capsys):
    trees = ["--branching", "2,2", "--branching", "1", "--beam", "2,4"]
    bench_drafts.main([*flags, *trees, "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    speeds = result["speeds"]
    assert list(speeds) == [*OURS, *TRANSFORMERS] and result["protocol"]["count"] == 3
    for speed in speeds.values():
        low, high = speed["interval"]
        assert 0 < low <= speed["speedup"] <= high and speed["ms_per_token"] > 0
        assert speed["same_text"] == 1 and len(speed["tokens_per_second"]) == 3
    assert speeds["alone"]["interval"] == [1, 1] and speeds["alone"]["tau"] == 1
    assert 1 <= speeds["draft tree 1"]["tau"] <= speeds["draft"]["tau"]
    assert speeds["draft"]["tau"] < speeds["draft tree 2,2"]["tau"]
    assert all(speeds[name]["tau"] is None for name in TRANSFORMERS)
    columns = {line.index(" (") for line in capsys.readouterr().out.splitlines()[2:]}
    assert len(columns) == 1


def test_own_ways_alone(flags, capsys):
    bench_drafts.main([*flags, "--own"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["alone", "draft", "head"]


def test_above_temperature_0_all_sample_alike(make_model):
    target, draft = make_model(initializer_range=0.2), make_model(seed=1)
    args = SimpleNamespace(max_new_tokens=4, temperature=0.5, gamma=2, own=False)
    args.branching = [[2, 1]]
    args.beam = [[2, 2]]
    calls = bench_drafts.contestants(args, target, draft, None, [0], 400)
    assert calls["draft beam 2,2"].keywords["beam"] and not calls["draft tree 2,1"].keywords["beam"]
    asked = []
    target.generate = lambda ids, **options: asked.append(options)
    for name in TRANSFORMERS:
        calls[name](torch.tensor([[5]]))
    sampling = {"do_sample": True, "temperature": 0.5, "top_k": 0}
    sampling["return_dict_in_generate"] = True
    own = [{}, {"prompt_lookup_num_tokens": 2}, {"assistant_model": draft}]
    assert asked == [sampling | options for options in own]
    del target.generate
    for call in calls.values():
        texts = {tuple(call(torch.tensor([[5]])).sequences[0].tolist()) for _ in range(8)}
        assert len(texts) > 4


def test_transformers_gets_no_draft_that_it_refuses(make_model):
    args = SimpleNamespace(max_new_tokens=4, temperature=0.0, gamma=2, own=False)
    args.branching = args.beam = None
    target = make_model()
    for draft in (
        shorten_head(make_model(seed=1), torch.arange(0, 400, 2)),
        make_model(vocab_size=432),
    ):
        calls = bench_drafts.contestants(args, target, draft, None, [0], 400)
        assert list(calls) == ["alone", "draft", "generate", "lookup"]


def test_speeds_are_medians_over_prompts():
    text = [7] * 10
    stats = Stats(rounds=3, accepted=3, rejected=1, target_calls=4, generated=10)
    turns = {
        "alone": [Turn(1.0, text), Turn(0.5, text), Turn(0.25, text)],
        "draft": [Turn(0.5, text), Turn(1 / 6, text, stats), Turn(0.25, [*text[:9], 8], stats)],
    }
    results = bench_drafts.summary(turns)
    assert results["draft"]["speedup"] == pytest.approx(2.0)
    assert results["draft"]["interval"] == pytest.approx((1.0, 3.0))
    assert results["draft"]["same_text"] == pytest.approx(2 / 3)
    assert results["alone"]["ms_per_token"] == 50.0 and results["draft"]["ms_per_token"] == 25.0
    assert results["draft"]["tau"] == 2.5 and results["draft"]["alpha"] == 0.75
    assert results["alone"]["tau"] is None and results["alone"]["alpha"] is None


def test_turns_rotate_and_tokens_count_up_to_the_end(monkeypatch):
    ticks = iter(range(100))
    order = []
    monkeypatch.setattr(bench_drafts, "clock", lambda device: float(next(ticks)))

    def call(name):
        order.append(name)
        return SimpleNamespace(sequences=torch.tensor([[5, 6, 7, 0, 9]]), stats=name)

    calls = {name: lambda ids, n=name: call(n) for name in ("alone", "draft")}
    prompts = [torch.tensor([[5]])] * 2
    turns = bench_drafts.decode_in_turn(calls, prompts, [0], measure.device("cpu"))
    assert order == ["alone", "draft", "draft", "alone", "alone", "draft"]
    assert turns == {name: [Turn(1.0, [6, 7, 0], name)] * 2 for name in calls}


def test_a_chat_of_ones_own_ends_with_its_turn(tmp_path):
    """Also where nobody says --chat."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n')
    args = SimpleNamespace(prompts=str(prompts), batch=1, chat=False)
    tokenizer = SimpleNamespace()
    with pytest.raises(AttributeError, match="chat_template"):
        measure.load_prompts(args, tokenizer, "cpu")
    assert args.chat
