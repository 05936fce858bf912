"""bench_decode.py and what it shares with others (measure.py). No test is about speed."""

import json
from types import SimpleNamespace

import pytest
import torch

from evaluate import GAMMAS
from extras import bench_decode, measure
from extras.bench_decode import main
from models import keep_layers


def test_cost_model_of_given_seconds():
    steps = {"target": [0.010, 0.010, 5.0], "draft": [0.001, 0.001, 5.0], 2: [0.015], 4: [0.018]}
    # 2 ms of loop a token: the unit is 12 ms
    alone = {"steady": {"seconds": 0.60, "inside": 0.50, "tokens": 50, "rounds": 50}}
    # 2 ms of loop a round
    pair = {"steady": {"seconds": 0.40, "inside": 0.36, "tokens": 48, "rounds": 20}}
    rounds = [{"autoregressive": alone, "speculative": pair}]
    cost = bench_decode.cost_model(steps, rounds, rounds, 2)
    assert cost["c"] == pytest.approx(1 / 12) and cost["o"] == pytest.approx(2 / 12)
    assert cost["v"] == {2: pytest.approx(15 / 12), 4: pytest.approx(18 / 12)}
    assert cost["tau"] == pytest.approx(2.4)
    assert cost["predicted"] == pytest.approx(2.4 / ((2 * 1 + 15 + 2) / 12))
    assert cost["measured"]["median"] == pytest.approx((48 / 0.40) / (50 / 0.60))
    assert cost["error"] == pytest.approx(cost["predicted"] / cost["measured"]["median"] - 1)


def test_turn_tells_the_steady_state_from_the_rest(make_model):
    def decode(contestant, ids, mask, note):
        # of 12; a round could use 2 drafts while at least 3 tokens are to go
        for new in (3, 3, 1, 3, 2):
            note(0, [7] * new, 0)
        return torch.tensor([[7] * 12])

    contest = SimpleNamespace(target=make_model(), draft=make_model(), limit=12, gamma=2)
    contest.decode = decode
    turn = bench_decode.Turn(contest, "speculative", None, None, watched=True)
    assert turn.steady["rounds"] == 3 and turn.steady["tokens"] == 7
    assert bench_decode.total([turn, turn])["steady"]["tokens"] == 14
    turn = bench_decode.Turn(contest, "autoregressive", None, None, watched=False)
    assert turn.steady["rounds"] == 4 and turn.steady["tokens"] == 9


def test_another_number_of_drafts_is_noticed():
    calls = {"speculative": {"target_calls": 20, "draft_calls": 100}}
    for target_calls, draft_calls, fair in ((20, 90, True), (20, 89, False), (21, 95, False)):
        calls["assisted"] = {"target_calls": target_calls, "draft_calls": draft_calls}
        if fair:
            bench_decode.check_drafting(calls, 5, 2)
        else:
            with pytest.raises(ValueError, match="does not draft 5 a round"):
                bench_decode.check_drafting(calls, 5, 2)


@pytest.fixture
def pair(tmp_path, make_model, tokenizer):
    """Flags with a target and a draft of its own layers."""
    target = make_model("neox", initializer_range=0.2, num_hidden_layers=5)
    target.save_pretrained(tmp_path / "target")
    keep_layers(target, [0, 1, 3, 4]).save_pretrained(tmp_path / "draft")
    for name in ("target", "draft"):
        tokenizer.save_pretrained(tmp_path / name)
    return ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft")]


@pytest.mark.slow
def test_from_end_to_end(pair, tmp_path, capsys):
    size = ["--gamma", "3", "--max-new-tokens", "16", "--rounds", "2", "--batch", "3"]
    main([*pair, *size, "--json", str(tmp_path / "new" / "out.json")])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "new" / "out.json").read_text())
    assert set(result["ratios"]) == set(bench_decode.RATIOS)
    for ratio in result["ratios"].values():
        assert len(ratio["rounds"]) == 2 and 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert all(0 < share["low"] <= share["high"] < 1 for share in result["overhead"].values())
    cost = result["cost_model"]
    assert min(cost["c"], cost["o"], *cost["v"].values()) > 0
    assert {"predicted", "measured", "error"} <= set(cost)
    predictions = {int(n): row["predicted"] for n, row in result["sweep"].items()}
    assert list(predictions) == list(GAMMAS)
    assert result["recommended_gamma"] == max(predictions, key=predictions.get)
    # one pass of scoring counts what decoding counts
    assert result["sweep"]["3"]["tau"] == pytest.approx(result["tau"])
    assert result["machine"]["torch"] == torch.__version__ and result["git"]
    calls = result["calls"]
    assert calls["assisted"]["target_calls"] == calls["speculative"]["target_calls"]
    assert f"recommended gamma: {result['recommended_gamma']}" in printed
    lookup = calls["lookup"]
    assert lookup["draft_calls"] == 0
    assert result["lookup_tau"] == sum(result["protocol"]["new_tokens"]) / lookup["target_calls"]
    assert result["lookup_tau"] > 1, "a small random model repeats itself"
    assert f"by prompt lookup: tau {result['lookup_tau']:.2f}" in printed
    assert "gamma 3, alpha" in printed

    # no folder of this machine is in what is saved
    assert result["command"].startswith("python -m extras.bench_decode --target target --draft")
    assert str(tmp_path) not in json.dumps(result)


def test_one_prompt_of_ones_own_without_a_steady_state(pair, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "How many shells?"}\n{"prompt": "unused"}\n')
    own = ["--prompts", str(prompts), "--batch", "1", "--gamma", "3", "--max-new-tokens", "2"]
    main([*pair, *own, "--rounds", "1", "--json", str(tmp_path / "own.json")])
    result = json.loads((tmp_path / "own.json").read_text())
    assert not any("batch" in name for name in result["ratios"])
    assert "measured" not in result["cost_model"]
    assert result["protocol"]["prompts"] == "prompts.jsonl"
    assert "raise --max-new-tokens" in capsys.readouterr().out


def test_random_models_of_known_sizes(tmp_path, capsys):
    out = tmp_path / "out.json"
    size = ["--max-new-tokens", "8", "--rounds", "1", "--batch", "2", "--gamma", "2"]
    main(["--shapes", "tiny", "--device", "cpu", *size, "--json", str(out)])
    result = json.loads(out.read_text())
    assert result["protocol"]["prompts"] == "random, for random tiny models"
    assert result["protocol"]["prompt_tokens"] == [64, 64]
    assert result["protocol"]["new_tokens"] == [8, 8], "no token ends a text"
    assert result["protocol"]["device"] == "cpu"
    assert set(result["peak_MiB"]) == set(result["calls"]) - {
        f"{name} batch" for name in bench_decode.TOGETHER
    }
    assert "peak memory of one prompt" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(pair, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*pair, "--gamma", "0"])
    assert "--gamma: must be a whole number of at least 1" in capsys.readouterr().err
    for flags, words in (
        (["--prompts", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (["--max-new-tokens", "5000"], "context"),
        (["--chat"], "no chat template"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            main([*pair, *flags])
    with pytest.raises(OSError):  # before anything is measured
        main([*pair, "--json", str(tmp_path)])
    for flags in ([], pair[:2], pair[2:], [*pair[2:], "--shapes", "tiny"]):
        with pytest.raises(ValueError, match="give --target and --draft, or --shapes"):
            main(flags)


def test_commands_name_no_private_folder():
    for command, portable in (
        ("python -m x --json /root/w/faults.json", "python -m x --json faults.json"),
        ("python -m x --target=/root/w/T/ --draft /D", "python -m x --target=T --draft D"),
        ("python x.py --data-dir ../shared/data", "python x.py --data-dir ../shared/data"),
        ("DATA=/root/d python '/my home/x.py' 'a b'", "DATA=d python x.py 'a b'"),
    ):
        assert measure.portable(command) == portable


def test_ratios_are_formed_within_rounds():
    spread = measure.ratios([1.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert spread == {"median": 2.0, "low": 1.0, "high": 3.0, "rounds": [1.0, 2.0, 3.0]}
    assert measure.brief(spread) == "2.00 (1.00 to 3.00)"
    assert [measure.rotated("abc", n) for n in (0, 1, 5)] == [list("abc"), list("bca"), list("cab")]
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = measure.interleaved(calls, 2, torch.device("cpu"), {"a": 2})
    assert "".join(order) == "ab" + "aab" + "baa"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
