"""docs/trainer.md: its Trainer's step is that of our own loop."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GPT2Config

from adaspec import adaspec_loss
from data import collate, write_examples
from tests.extras.trainer_ranks import ROWS, VOCABULARY, as_row, check_equal, make_trainer
from tests.launch import run_on_ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def examples(examples):
    """One batch, of rows whose responses differ in length."""
    return examples[:ROWS]


@pytest.mark.parametrize(("architecture", "accumulation"), [("neox", 4), ("llama", 1)])
def test_a_step_is_that_of_our_loop(make_model, examples, tmp_path, architecture, accumulation):
    target = make_model(architecture, seed=1, hidden_size=48, vocab_size=448)
    models = [make_model(architecture, seed=3), target, make_model(architecture, seed=2)]
    check_equal(models, examples, accumulation, str(tmp_path))
    check_equal(models[:2], examples, accumulation, str(tmp_path))  # the reference's training


def test_the_first_token_of_a_row_is_left_out(make_model, examples, tmp_path):
    """Where rows have no prompt; padding on the left puts it behind a position that predicts."""
    models = [make_model(seed=seed) for seed in range(3)]
    rows = [example._replace(prompt_length=0) for example in examples]
    check_equal(models, rows, 4, str(tmp_path))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_left_padding_leaves_the_loss(make_model, examples, tmp_path, positions):
    """In evaluation, too: a mean over the selected tokens."""
    if positions == "rotary":
        models = [make_model(seed=seed) for seed in range(3)]
    else:
        config = GPT2Config(vocab_size=400, n_layer=2, n_head=2, n_embd=32, n_positions=128)
        models = [AutoModelForCausalLM.from_config(config).eval() for _ in range(3)]
    input_ids, labels = collate(examples)
    logits = [model(input_ids).logits[..., :VOCABULARY] for model in models]
    expected = adaspec_loss(*logits, labels).item()
    trainer = make_trainer(models, [as_row(row) for row in examples], ROWS, str(tmp_path))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_step_of_two_ranks_is_that_of_our_loop(make_model, examples, tmp_path):
    write_examples(tmp_path / "examples", examples)
    for seed, name in enumerate(("target", "reference", "draft")):
        make_model(seed=seed).save_pretrained(tmp_path / name)
    run_on_ranks("tests/extras/trainer_ranks.py", tmp_path)
