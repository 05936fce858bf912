"""models.keep_layers: what is kept, also on the disk and in a cache, and what is refused."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from models import check_model, keep_layers, load_model
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_these_layers_and_all_else_are_kept(architecture, make_model, tmp_path):
    """The saved model is the one in memory, and the target with the other layers skipped."""
    target = deep(make_model, architecture)
    draft = keep_layers(copy.deepcopy(target), [0, 1, 4])
    draft.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert saved.config.num_hidden_layers == len(layers_of(saved)) == 3
    assert [m.layer_idx for m in saved.modules() if hasattr(m, "layer_idx")] == [0, 1, 2]
    with torch.no_grad():
        logits = saved(ids()).logits
        assert logits.equal(draft(ids()).logits)
        torch.testing.assert_close(logits, skipping(target, [2, 3])(ids(), use_cache=False).logits)
        assert not torch.allclose(target(ids()).logits, logits)
    assert saved.generation_config.eos_token_id == target.generation_config.eos_token_id


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_weights_it_is_what_is_loaded_later(architecture, make_model, tmp_path):
    """The checks of a grid look at a draft that is not there yet."""
    deep(make_model, architecture).save_pretrained(tmp_path / "target")
    keep_layers(load_model(tmp_path / "target"), [0, 1]).save_pretrained(tmp_path / "draft")
    skeletons = [
        check_model(tmp_path / "draft"),
        keep_layers(check_model(tmp_path / "target"), [0, 1]),
    ]
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in skeletons]
    assert shapes[0] == shapes[1] and {p.device.type for p in skeletons[1].parameters()} == {"meta"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropped_in_place_it_decodes_with_a_cache(architecture, make_model):
    target = deep(make_model, architecture)
    expected = skipping(target, [1, 2])
    draft = keep_layers(target, [0, 3, 4])
    text = autoregressive_generate(draft, ids(), max_new_tokens=6)
    for column in range(ids().shape[1], text.shape[1]):
        with torch.no_grad():
            logits = expected(text[:, :column], use_cache=False).logits[:, -1]
        assert text[:, column].equal(logits.argmax(-1))


def test_keeping_all_layers_is_the_identity(make_model):
    target = deep(make_model, "llama")
    with torch.no_grad():
        whole = keep_layers(copy.deepcopy(target), range(5))
        assert whole(ids()).logits.equal(target(ids()).logits)


def test_lists_by_layer_are_cut(tmp_path):
    config = Qwen2Config(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, num_hidden_layers=4, use_sliding_window=True, sliding_window=8,
        layer_types=["full_attention", "sliding_attention"] * 2,
    )  # fmt: skip
    config.eos_token_id = [1, 2, 3, 4]  # as long as there are layers, but not by layer
    keep_layers(AutoModelForCausalLM.from_config(config), [0, 3]).save_pretrained(tmp_path)
    draft = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert draft.config.layer_types == ["full_attention", "sliding_attention"]
    assert draft.config.eos_token_id == [1, 2, 3, 4]


@pytest.mark.parametrize("indices", [[], [5], [-1], [1, 1], [2, 0], range(6)])
def test_layers_that_there_are_not_are_refused(indices, make_model):
    model = deep(make_model, "neox")
    with pytest.raises(ValueError, match=rf"cannot keep {len(indices)} of the model's 5 layers"):
        keep_layers(model, indices)
    assert len(layers_of(model)) == 5
