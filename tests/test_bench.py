"""bench.py: layer-dropped drafts, the cost model, and `decode` from end to end. No test is about speed."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import bench
from bench import drop_layers, predicted_speedup, recommend
from speculative import autoregressive_generate, expected_acceptance, speculative_generate

ARCHITECTURES = ["neox", "llama", "phi", "codegen"]


def deep(make_model, architecture, layers=5):
    """A model whose layers all matter: weights ten times as large as usual."""
    size = {"n_layer": layers} if architecture == "codegen" else {"num_hidden_layers": layers}
    return make_model(architecture, initializer_range=0.2, **size)


def layers_of(model):
    return model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers


def skipping(model, skipped):
    """The same model with the given layers replaced by the identity."""
    model = copy.deepcopy(model)
    for index in skipped:
        layer = layers_of(model)[index]

        def identity(hidden, *args, _forward=layer.forward, **kwargs):
            output = _forward(hidden, *args, **kwargs)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        layer.forward = identity
    return model


@pytest.fixture
def folder(tmp_path, make_model, tokenizer):
    """folder(architecture): a target's folder with its tokenizer, and the target."""

    def save(architecture="neox"):
        model = deep(make_model, architecture)
        model.save_pretrained(tmp_path / "target")
        tokenizer.save_pretrained(tmp_path / "target")
        return tmp_path / "target", model

    return save


def ids():
    return torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_drop_layers_keeps_the_first_and_last_and_all_else(architecture, folder, tmp_path, tokenizer, capsys):
    source, target = folder(architecture)
    code = bench.main(["drop-layers", "--target", str(source), "--out", str(tmp_path / "out"), "--first", "2", "--last", "1"])
    assert code == 0 and "3 of 5 layers" in capsys.readouterr().out
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert draft.config.num_hidden_layers == len(layers_of(draft)) == 3
    assert [m.layer_idx for m in draft.modules() if hasattr(m, "layer_idx")] == [0, 1, 2]
    with torch.no_grad():
        wanted = skipping(target, [2, 3])(ids(), use_cache=False).logits
        torch.testing.assert_close(draft(ids()).logits, wanted)
        assert not torch.allclose(target(ids()).logits, wanted)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    assert draft.generation_config.eos_token_id == target.generation_config.eos_token_id


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_drop_layers_in_place_decodes_with_a_cache(architecture, make_model):
    target = deep(make_model, architecture)
    wanted = skipping(target, [1, 2])
    draft = drop_layers(target, 1, 2)
    text = autoregressive_generate(draft, ids(), max_new_tokens=6)
    for column in range(ids().shape[1], text.shape[1]):
        with torch.no_grad():
            assert text[:, column].equal(wanted(text[:, :column], use_cache=False).logits[:, -1].argmax(-1))


def test_drop_no_layer_is_the_identity(make_model):
    target = deep(make_model, "llama")
    with torch.no_grad():
        assert drop_layers(copy.deepcopy(target), 3, 2)(ids()).logits.equal(target(ids()).logits)


def test_drop_layers_without_a_tokenizer_and_with_lists_by_layer(tmp_path, capsys):
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    config = Qwen2Config(**sizes, num_hidden_layers=4, layer_types=kinds, use_sliding_window=True, sliding_window=8)
    config.eos_token_id = [1, 2, 3, 4]  # as long as there are layers, but not by layer
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "target")
    arguments = ["--target", str(tmp_path / "target"), "--out", str(tmp_path / "out"), "--first", "1", "--last", "1"]
    assert bench.main(["drop-layers", *arguments]) == 0
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert draft.config.layer_types == ["full_attention", "sliding_attention"]
    assert draft.config.eos_token_id == [1, 2, 3, 4]
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert bench.main(["drop-layers", *arguments]) == 2  # never over what is there
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(("first", "last"), [(0, 0), (-1, 2), (2, -1), (4, 2)])
def test_drop_layers_refuses(first, last, folder, tmp_path, capsys):
    source, _ = folder()
    capsys.readouterr()
    arguments = ["--target", str(source), "--out", str(tmp_path / "out"), "--first", str(first), "--last", str(last)]
    assert bench.main(["drop-layers", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.py: error: ") and error.count("\n") == 1 and "model's 5" in error
    assert not (tmp_path / "out").exists()


def test_cost_model_by_hand():
    assert predicted_speedup(3.0, 5, 0.1, 1.4, 0.1) == pytest.approx(1.5)
    assert predicted_speedup(1.0, 0, 0.3, 1.0, 0.0) == 1  # no drafts: the target alone
    assert recommend({1: 1.2, 2: 1.5, 3: 1.5, 4: 0.9}) == 2


def test_cost_model_of_given_seconds():
    steps = bench.Steps()
    steps.target, steps.draft, steps.scoring = [0.010, 0.010, 5.0], [0.001, 0.001, 5.0], {2: [0.015], 4: [0.018]}
    alone = {"steady": {"seconds": 0.60, "inside": 0.50, "tokens": 50, "rounds": 50}}  # 2 ms of loop a token: the unit is 12 ms
    ours = {"steady": {"seconds": 0.40, "inside": 0.36, "tokens": 48, "rounds": 20}}  # 2 ms of loop a round
    rounds = [{"autoregressive": alone, "speculative": ours}]
    cost = bench.cost_model(steps, rounds, rounds, 2)
    assert cost["c"] == pytest.approx(1 / 12) and cost["o"] == pytest.approx(2 / 12)
    assert cost["v"] == {2: pytest.approx(15 / 12), 4: pytest.approx(18 / 12)}
    assert cost["tau"] == pytest.approx(2.4)
    assert cost["predicted"] == pytest.approx(2.4 / ((2 * 1 + 15 + 2) / 12))
    assert cost["measured"]["median"] == pytest.approx((48 / 0.40) / (50 / 0.60))
    assert cost["error"] == pytest.approx(cost["predicted"] / cost["measured"]["median"] - 1)


def test_turn_tells_the_steady_state_from_the_rest(make_model):
    def contestant(note):
        for new in (3, 3, 1, 3, 2):  # of 12; a round could use 2 drafts while at least 3 tokens are to go
            note(0, [7] * new, 0)
        return torch.tensor([[7] * 12])

    turn = bench.Turn(contestant, (make_model(), make_model()), torch.device("cpu"), True, 12, 2)
    assert turn.steady["rounds"] == 3 and turn.steady["tokens"] == 7
    assert bench.total([turn, turn])["steady"]["tokens"] == 14


def test_decode_from_end_to_end(folder, tmp_path, tokenizer, capsys):
    source, _ = folder()
    draft = tmp_path / "draft"
    assert bench.main(["drop-layers", "--target", str(source), "--out", str(draft), "--first", "2", "--last", "2"]) == 0
    models = ["--target", str(source), "--draft", str(draft)]
    size = ["--gamma", "3", "--max-new-tokens", "16", "--rounds", "2", "--repeats", "1"]
    assert bench.main(["decode", *models, *size, "--batch", "3", "--json", str(tmp_path / "new" / "out.json")]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "new" / "out.json").read_text())
    assert set(result["ratios"]) == set(bench.RATIOS)
    for ratio in result["ratios"].values():
        assert len(ratio["rounds"]) == 2 and 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert all(0 < share["low"] <= share["high"] < 1 for share in result["overhead"].values())
    cost = result["cost_model"]
    assert min(cost["c"], cost["o"], *cost["v"].values()) > 0 and {"predicted", "measured", "error"} <= set(cost)
    predictions = {int(n): row["predicted"] for n, row in result["sweep"].items()}
    assert list(predictions) == list(bench.GAMMAS)
    assert result["recommended_gamma"] == max(predictions, key=predictions.get)
    assert result["sweep"]["3"]["tau"] == pytest.approx(result["tau"])  # one pass of scoring counts what decoding counts
    assert result["machine"]["torch"] == torch.__version__ and "decode --target" in result["command"]
    calls = result["calls"]
    assert calls["assisted"]["target_calls"] == calls["speculative"]["target_calls"]
    assert f"recommended gamma: {result['recommended_gamma']}" in printed and "gamma 3, alpha" in printed

    # one prompt of one's own, too few tokens for a steady state
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "How many shells?"}\n{"prompt": "unused"}\n')
    own = ["--prompts", str(tmp_path / "prompts.jsonl"), "--batch", "1", "--gamma", "3", "--max-new-tokens", "2"]
    assert bench.main(["decode", *models, *own, "--rounds", "1", "--repeats", "1", "--json", str(tmp_path / "own.json")]) == 0
    result = json.loads((tmp_path / "own.json").read_text())
    assert not any("batch" in name for name in result["ratios"]) and "measured" not in result["cost_model"]

    for bad, words in (
        (["--gamma", "0"], "--gamma must be at least 1"),
        (["--prompts", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (["--max-new-tokens", "5000"], "context"),
        (["--chat"], "no chat template"),
    ):
        assert bench.main(["decode", *models, *bad]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_in_inference_mode_leaves_nothing_behind(architecture, make_model):
    """What comes out may be used under autograd, and the models can be trained, also where they keep tables of their own."""
    target, draft = deep(make_model, architecture), deep(make_model, architecture, layers=1)
    if architecture == "llama":  # a rotary table that decoding beyond the original context replaces by a larger one
        target.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
        target.config.max_position_embeddings = 12
        target = type(target)(target.config)
        target.config.max_position_embeddings = 64
        speculative_generate(target, draft, ids(), max_new_tokens=8)
    text = speculative_generate(target, draft, ids(), max_new_tokens=4).sequences
    labels = text.clone()
    labels[:, :3] = -100
    found = expected_acceptance(target, draft, text, labels)
    assert not any(tensor.is_inference() for tensor in (text, *found))
    for model in (target, draft):
        model(input_ids=text, labels=labels).loss.backward()
        copy.deepcopy(model).double()(input_ids=text, labels=labels).loss.backward()


def test_official_step_and_ours_give_one_gradient():
    """What `bench.py train` compares is one computation: the loss step of both, in float32, on small shapes."""
    shape = {"vocab_size": 300, "target_width": 48, "draft_width": 16, "rows": 3, "length": 40, "prompt": 18}
    calls, leaves = bench.loss_step_calls(shape, torch.float32, torch.device("cpu"))
    found = []
    for call in calls.values():
        call()
        found.append([leaf.grad.clone() for leaf in leaves])
    for official, ours in zip(*found, strict=True):
        assert (official - ours).norm() < 1e-5 * official.norm()


def test_train_benchmark_runs(tmp_path, monkeypatch, capsys):
    small = {"vocab_size": 300, "target_width": 48, "draft_width": 16, "rows": 3, "length": 40, "prompt": 18}
    monkeypatch.setattr(bench, "PAPER", small)
    assert (
        bench.main(["train", "--parts", "loss,epoch", "--limit", "20", "--rounds", "1", "--json", str(tmp_path / "t.json")])
        == 0
    )
    result = json.loads((tmp_path / "t.json").read_text())
    assert result["loss step, times faster"]["median"] > 0 and result["command"].startswith("python bench.py train")
