"""What decoding does to models: speculative.inference leaves nothing behind, and what is faster on
a CPU gives what the layers give."""

import copy
import os

import pytest
import torch

import speculative
from short_head import ShortHead, shorten_head
from speculative import expected_acceptance, speculative_generate
from tests.sampling import build, noised


def make(make_model, architecture, layers):
    size = {"n_layer": layers} if architecture == "codegen" else {"num_hidden_layers": layers}
    return make_model(architecture, initializer_range=0.2, **size)


@pytest.mark.parametrize("architecture", ["neox", "llama", "phi", "codegen"])
def test_what_comes_out_may_be_used_under_autograd(architecture, make_model):
    """And the models can be trained, also where they keep tables of their own."""
    target = make(make_model, architecture, 5)
    draft = make(make_model, architecture, 1)
    ids = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    if architecture == "llama":
        # a rotary table that decoding beyond the original context replaces by a larger one
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
        target.config.rope_parameters = rope
        target.config.max_position_embeddings = 12
        target = type(target)(target.config)
        target.config.max_position_embeddings = 64
        speculative_generate(target, draft, ids, max_new_tokens=8)
    text = speculative_generate(target, draft, ids, max_new_tokens=4).sequences
    labels = text.clone()
    labels[:, :3] = -100
    acceptance = expected_acceptance(target, draft, text, labels)
    assert not any(tensor.is_inference() for tensor in (text, *acceptance))
    for model in (target, draft):
        model(input_ids=text, labels=labels).loss.backward()
        copy.deepcopy(model).double()(input_ids=text, labels=labels).loss.backward()


@pytest.mark.parametrize(
    ("rows", "given", "during"), [(1, None, "1"), (2, None, None), (1, "0", "0")]
)
def test_one_row_reads_shared_keys_where_they_are(rows, given, during, make_model, monkeypatch):
    """By transformers' switch, put back afterwards, which changes no token."""
    variable = "TRANSFORMERS_SDPA_FORCE_GQA"
    monkeypatch.delenv(variable, raising=False)
    if given is not None:
        monkeypatch.setenv(variable, given)
    target = make_model("llama", num_key_value_heads=1, initializer_range=0.2)
    seen = []
    target.register_forward_hook(lambda *_: seen.append(os.environ.get(variable)))
    ids = torch.randint(1, 300, (rows, 9), generator=torch.Generator().manual_seed(0))
    output = speculative_generate(target, target, ids, max_new_tokens=12)
    assert set(seen) == {during} and os.environ.get(variable) == given
    expected = target.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(output.sequences, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_products_of_few_rows_are_the_layers_own(bias, monkeypatch):
    monkeypatch.setattr(speculative, "THIN_PRODUCTS", True)
    monkeypatch.setattr(speculative, "FEWEST_THIN_ROWS", 1)
    linear = torch.nn.Linear(300, 512, bias=bias)
    assert speculative.has_thin_products(linear)
    assert not speculative.has_thin_products(torch.nn.Linear(300, 400))
    assert not speculative.has_thin_products(copy.deepcopy(linear).bfloat16())
    shapes = ((1, 1, 300), (1, 2, 300), (1, 3, 300), (7, 300), (2, 4, 300), (8, 300), (3, 3, 300))
    for shape in shapes:
        hidden = torch.randn(shape)
        output = speculative.thin_linear(linear, hidden)
        assert output.is_contiguous() and output.shape == (*shape[:-1], 512)
        torch.testing.assert_close(output, linear(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gains", [True, False])
def test_thin_products_are_formed_only_on_a_cpu_that_gains(gains, monkeypatch):
    """Of both models, the short head's product too; to the same tokens, and the models are left as
    they were."""
    monkeypatch.setattr(speculative, "THIN_PRODUCTS", gains)
    monkeypatch.setattr(speculative, "FEWEST_THIN_ROWS", 1)
    target = build("llama", vocab=800, hidden=352)
    draft = shorten_head(noised(target, 0.05), torch.arange(0, 800, 2))
    ids = torch.arange(6)[None]
    layers = set()
    thin = speculative.thin_linear
    monkeypatch.setattr(speculative, "thin_linear", lambda m, x: layers.add(m) or thin(m, x))
    output = speculative_generate(target, draft, ids, max_new_tokens=24, gamma=3)
    with speculative.inference(target), speculative.inference(target):
        target(ids)
    heads = {target.get_output_embeddings(), draft.get_output_embeddings()}
    assert heads <= layers if gains else not layers
    for module in [*target.modules(), *draft.modules()]:
        assert not {"forward", "kept_logits"} & vars(module).keys()
    monkeypatch.setattr(speculative, "THIN_PRODUCTS", False)
    plain = speculative_generate(target, draft, ids, max_new_tokens=24, gamma=3)
    assert torch.equal(output.sequences, plain.sequences) and output.stats == plain.stats


needs_avx512 = pytest.mark.skipif(
    not speculative.PACKED_PRODUCTS, reason="weights are packed on CPUs with AVX-512 only"
)


@needs_avx512
@pytest.mark.parametrize("architecture", ["neox", "llama", "phi", "codegen"])
def test_products_with_packed_weights_are_the_layers_own(architecture, make_model):
    """Of linear layers with and without a bias and of a short head, for one row and for many."""
    target = make_model(architecture).bfloat16()
    draft = shorten_head(copy.deepcopy(target), torch.arange(0, target.config.vocab_size, 3))
    for model in (target, draft):
        packed_model = copy.deepcopy(model)
        speculative.pack_weights(packed_model)
        assert packed_model.state_dict().keys() == model.state_dict().keys()
        for rows, tokens in ((1, 1), (1, 4), (2, 5), (8, 40)):
            ids = torch.randint(300, (rows, tokens), generator=torch.Generator().manual_seed(rows))
            with torch.inference_mode():
                logits, plain_logits = packed_model(ids).logits, model(ids).logits
            torch.testing.assert_close(logits, plain_logits, rtol=0.02, atol=0.02)


@needs_avx512
def test_decoding_uses_packed_weights(monkeypatch):
    """Every layer of both models, the short head's product too, and to the same tokens."""
    target = build("llama", vocab=400, hidden=352).bfloat16()
    draft = shorten_head(noised(target, 0.05), torch.arange(0, 400, 2))
    ids = torch.arange(6)[None]
    plain = speculative_generate(target, draft, ids, max_new_tokens=24, gamma=3)
    calls = set()
    product = speculative.packed_linear
    monkeypatch.setattr(
        speculative, "packed_linear", lambda layer, x: calls.add(layer) or product(layer, x)
    )
    for model in (target, target, draft):  # once more changes nothing
        speculative.pack_weights(model)
    output = speculative_generate(target, draft, ids, max_new_tokens=24, gamma=3)
    layers = {
        module
        for model in (target, draft)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear | ShortHead)
    }
    assert calls == layers
    assert torch.equal(output.sequences, plain.sequences) and output.stats == plain.stats


def test_weights_are_packed_only_in_bfloat16_on_a_cpu_that_gains(monkeypatch):
    for gains, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        monkeypatch.setattr(speculative, "PACKED_PRODUCTS", gains)
        model = build("llama").to(dtype)
        speculative.pack_weights(model)
        assert not any("forward" in vars(module) for module in model.modules())
