"""speculative.inference: decoding in inference mode leaves nothing behind."""

import copy

import pytest
import torch

from speculative import expected_acceptance, speculative_generate


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
