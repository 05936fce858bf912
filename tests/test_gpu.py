"""On a GPU what other tests check on a CPU, by their own bodies: `python -m pytest -m gpu`.

Without CUDA all of it is skipped. `GPU_TESTS_ON=cpu python -m pytest -m gpu` runs the same checks
on the CPU (with gloo in NCCL's place), so that a change to them can be tried where there is no GPU.
Those of EAGLE heads are in tests/extras/test_eagle.py.
"""

import pytest
import torch

from distillspec import DIVERGENCES
from speculative import speculative_generate
from tests import test_evaluate, test_head, test_speculative, test_teacher, test_train
from tests.sampling import ARCHITECTURES, five_token_models, half_agreeing_pairs, noisy

pytestmark = pytest.mark.gpu
# GPU kernels of different shapes round differently, and Adam's first steps make more of it
TOLERANCE = 1e-4


@pytest.fixture
def make_model(make_model, device):
    """As in the other tests, but on the device."""
    return lambda *arguments, **sizes: make_model(*arguments, **sizes).to(device)


@pytest.fixture
def few(examples):
    """Thirty rows, as in test_train.py."""
    return examples[:30]


@pytest.fixture
def pairs(device):
    return {
        name: (target.to(device), draft.to(device))
        for name, (target, draft) in half_agreeing_pairs().items()
    }


@pytest.fixture
def small(device):
    return [model.to(device) for model in five_token_models()]


@pytest.fixture
def prompts(device):
    return [tensor.to(device) for tensor in test_speculative.ragged_prompts()]


# Decoding


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_the_targets_own(pairs, prompts, name):
    test_speculative.test_greedy_is_the_targets_own(pairs, prompts, name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ragged_rows_are_what_they_would_be_alone(pairs, prompts, name):
    test_speculative.test_batched_rows_are_what_they_would_be_alone(pairs, prompts, name, 5)


@pytest.mark.parametrize("setting", ["plain", "all"])
def test_the_distribution_is_the_targets(small, setting):
    test_speculative.test_sampling_is_lossless(small, setting, 5)


def test_the_distribution_of_ragged_rows_is_the_targets(small):
    test_speculative.test_sampling_is_lossless_for_ragged_rows_with_end_tokens(small)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decodes_with_counts_that_add_up(pairs, prompts, dtype):
    models = [model.to(dtype) for model in pairs["llama"]]
    settings = {"max_new_tokens": 20, "temperature": 1.0, "gamma": 4}
    output = speculative_generate(*models, *prompts, **settings)
    assert output.sequences.shape == (4, 30) and output.stats.generated == 80
    assert 0.1 < output.stats.alpha < 1


@pytest.fixture
def pair(make_model):
    target = make_model(seed=1, initializer_range=0.3, num_hidden_layers=1)
    return target, noisy(target, 0.05)


def test_the_evaluators_numbers_are_those_of_decoding(pair, examples, tokenizer, monkeypatch):
    """alpha, tau and tau by gamma against decoding one by one, and expected acceptance against
    plain softmax on the text that the target writes."""
    end = {"eos_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}
    decoding = {"max_new_tokens": 16, **end}
    rows = test_evaluate.rows_of(pair, examples[:6], tokenizer)
    test_evaluate.test_counts_are_those_of_decoding_one_by_one(rows, pair, examples, decoding)
    test_evaluate.test_tau_by_gamma_is_that_of_decoding(rows, pair, examples, decoding)
    test_evaluate.test_expected_acceptance_is_that_on_the_targets_own_text(
        rows, pair, examples, tokenizer, decoding
    )
    monkeypatch.setattr(test_evaluate.module, "timings", lambda *arguments: ({}, {}))
    test_evaluate.test_tau_by_gamma_of_sampled_text_is_about_that_of_decoding(
        pair, examples, tokenizer, None
    )


# Training


@pytest.mark.parametrize("name", DIVERGENCES)
def test_chunked_loss_is_the_plain_one(make_model, examples, monkeypatch, name):
    test_head.test_chunked_loss_is_the_plain_one(
        make_model, examples, monkeypatch, "phi", name, True, tolerance=1e-5
    )


@pytest.mark.parametrize("name", ["fine-tuning", "distillation", "adaspec"])
def test_a_stage_is_that_of_the_cpu(make_model, few, name):
    """In float32, within what rounding makes of a few steps."""
    stage = test_train.step_and_inputs(name, make_model)
    trained, summary = test_train.train_copy(make_model(), few, *stage)
    start = test_train.weights(make_model()).cpu()

    def on_cpu(*arguments, **sizes):
        return make_model(*arguments, **sizes).cpu()

    stage = test_train.step_and_inputs(name, on_cpu)
    expected, expected_summary = test_train.train_copy(on_cpu(), few, *stage)
    assert summary["loss"] == pytest.approx(expected_summary["loss"], rel=1e-3)
    assert summary["loss_tokens"] == pytest.approx(expected_summary["loss_tokens"], rel=0.01)
    change = test_train.weights(trained).cpu() - start
    expected_change = test_train.weights(expected) - start
    assert (change - expected_change).norm() < 0.1 * expected_change.norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["fine-tuning", "distillation", "adaspec"])
def test_autocast_types_follow_float32(make_model, few, dtype, name):
    test_train.test_autocast_types_follow_float32(make_model, few, dtype, name)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_stopped_training_goes_on(make_model, few, tmp_path, dtype):
    """To the same bits where two undisturbed runs are equal to the bit: where kernels are
    deterministic. Else to within a hundredth of what the training changes."""
    expected, undisturbed = test_train.run(make_model(), few, dtype=dtype)
    again, _ = test_train.run(make_model(), few, dtype=dtype)
    test_train.stop_in(3, make_model, few, tmp_path, dtype=dtype)
    trained, summary = test_train.run(make_model(seed=9), few, tmp_path, dtype=dtype)
    difference = (trained - expected).norm()
    if torch.equal(again, expected):
        assert difference == 0 and summary["loss"] == undisturbed["loss"]
    change = (expected - test_train.weights(make_model())).norm()
    assert difference < 0.01 * change
    assert summary["steps"] == undisturbed["steps"] == 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_cache_is_the_target(make_model, examples, tmp_path, dtype):
    test_teacher.test_cache_is_the_target_bit_for_bit_on_equal_batches(
        make_model, examples, tmp_path, dtype
    )


def test_caches_change_nothing(make_model, examples, tmp_path):
    test_teacher.test_caches_change_nothing(
        make_model, examples, tmp_path, "neox", tolerance=TOLERANCE
    )


# Ranks


@pytest.mark.parametrize("count", [1, 2])
def test_ranks(make_model, examples, tmp_path, device, count):
    """NCCL: caches with the target whole and spread over the ranks (--shard-target), training to
    the weights of one process, and a stop."""
    if device.type == "cuda" and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    test_teacher.test_two_ranks(
        make_model, examples, tmp_path, count=count, tolerance=TOLERANCE, device=device.type
    )
