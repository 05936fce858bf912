"""drop_layers.py: what is kept, and what is refused."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from extras.drop_layers import drop_layers, main
from speculative import autoregressive_generate

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


def ids():
    return torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def arguments(source, out, first, last):
    folders = ["--target", str(source), "--out", str(out)]
    return [*folders, f"--first={first}", f"--last={last}"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_and_last_layers_and_all_else_are_kept(
    architecture, make_model, tokenizer, tmp_path, capsys
):
    target = deep(make_model, architecture)
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    main(arguments(tmp_path / "target", tmp_path / "out", 2, 1))
    assert "3 of 5 layers" in capsys.readouterr().out
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert draft.config.num_hidden_layers == len(layers_of(draft)) == 3
    assert [m.layer_idx for m in draft.modules() if hasattr(m, "layer_idx")] == [0, 1, 2]
    with torch.no_grad():
        expected = skipping(target, [2, 3])(ids(), use_cache=False).logits
        torch.testing.assert_close(draft(ids()).logits, expected)
        assert not torch.allclose(target(ids()).logits, expected)
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.get_vocab() == tokenizer.get_vocab()
    assert draft.generation_config.eos_token_id == target.generation_config.eos_token_id


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropped_in_place_it_decodes_with_a_cache(architecture, make_model):
    target = deep(make_model, architecture)
    expected = skipping(target, [1, 2])
    draft = drop_layers(target, 1, 2)
    text = autoregressive_generate(draft, ids(), max_new_tokens=6)
    for column in range(ids().shape[1], text.shape[1]):
        with torch.no_grad():
            logits = expected(text[:, :column], use_cache=False).logits[:, -1]
        assert text[:, column].equal(logits.argmax(-1))


def test_dropping_no_layer_is_the_identity(make_model):
    target = deep(make_model, "llama")
    with torch.no_grad():
        whole = drop_layers(copy.deepcopy(target), 3, 2)
        assert whole(ids()).logits.equal(target(ids()).logits)


def test_without_a_tokenizer_and_with_lists_by_layer(tmp_path):
    config = Qwen2Config(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, num_hidden_layers=4, use_sliding_window=True, sliding_window=8,
        layer_types=["full_attention", "sliding_attention"] * 2,
    )  # fmt: skip
    config.eos_token_id = [1, 2, 3, 4]  # as long as there are layers, but not by layer
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "target")
    main(arguments(tmp_path / "target", tmp_path / "out", 1, 1))
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert draft.config.layer_types == ["full_attention", "sliding_attention"]
    assert draft.config.eos_token_id == [1, 2, 3, 4]
    assert not list((tmp_path / "out").glob("tokenizer*"))
    with pytest.raises(ValueError, match="is there already"):  # never over what is there
        main(arguments(tmp_path / "target", tmp_path / "out", 1, 1))


@pytest.mark.parametrize(("first", "last"), [(0, 0), (-1, 2), (2, -1), (4, 2)])
def test_counts_of_layers_without_a_meaning_are_refused(first, last, make_model, tmp_path):
    deep(make_model, "neox").save_pretrained(tmp_path / "target")
    with pytest.raises(ValueError, match="the model's 5"):
        main(arguments(tmp_path / "target", tmp_path / "out", first, last))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no such folder"):
        main(arguments(tmp_path / "none", tmp_path / "out", 1, 1))
