"""The oracle: effects against gradients and real steps, what it selects, a run of the study."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from data import make_batch
from extras import ceiling
from extras.ceiling import ChosenTokens, TokenLosses
from history import Validation
from settings import Method
from teacher import Frozen, ReferenceLoss, token_loss
from train import adaspec_step, distillation_step, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target(make_model, tokenizer):
    return Frozen(make_model(seed=1), len(tokenizer))


@pytest.fixture(scope="module")
def reference(make_model, tokenizer, target):
    return ReferenceLoss(Frozen(make_model(seed=2), len(tokenizer)), target, "fkl")


@pytest.fixture(scope="module")
def held_out(examples, target):
    rows = Validation(examples[40:52], rows_at_once=3)
    rows.ask(target)
    return list(zip(rows.batches, rows.losses, strict=True))


@pytest.fixture
def losses(make_model, tokenizer):
    return TokenLosses(make_model(seed=3), len(tokenizer))


def training_part(examples, target, divergence="fkl"):
    batch = make_batch(examples, [0, 1, 2], CPU)
    return batch, token_loss(divergence, target, batch)


def product(a, b):
    return sum((a[name] * b[name]).sum() for name in a)


@pytest.mark.parametrize("divergence", ["fkl", "tvd"])
def test_effects_are_products_of_gradients(losses, examples, target, held_out, divergence):
    """Forward mode against backward, token by token, also where the attention was fused before."""
    part = training_part(examples, target, divergence)
    direction = ceiling.acceptance_gradient(losses, held_out)
    effects = ceiling.effects(losses, part, direction)
    values = losses(part[0], *part[1])
    assert effects.shape == values.shape == part[0].index.shape
    expected = [
        -product(losses.gradient(values[token]), direction) for token in range(0, len(values), 9)
    ]
    torch.testing.assert_close(effects[::9], torch.stack(expected), rtol=1e-3, atol=1e-7)
    assert (effects < 0).any() and (effects > 0).any()


def test_the_gradient_of_the_acceptance(losses, held_out):
    """Against the acceptance itself, a little on the one side and a little on the other."""
    gradient = ceiling.acceptance_gradient(losses, held_out)
    weights = {name: weight.double() for name, weight in losses.weights().items()}
    size = 1e-3 / ceiling.length(gradient)
    up, down = (
        ceiling.acceptance(losses, ceiling.after_step(weights, gradient, rate), held_out)
        for rate in (-size, size)
    )
    assert 0 < down < up < 1
    assert (up - down) / (2 * size) == pytest.approx(ceiling.length(gradient) ** 2, rel=0.01)
    tvd = torch.cat([losses(batch, *loss) for batch, loss in held_out])
    assert ceiling.acceptance(losses, weights, held_out) == pytest.approx(1 - tvd.mean().item())


def test_small_steps_are_as_predicted(losses, examples, target, held_out):
    torch.manual_seed(0)
    part = training_part(examples, target)
    squares = ceiling.mean_squares(losses, [part, training_part(examples[10:], target)])
    found = ceiling.check_steps(losses, part, held_out[:2], squares, 1e-5, count=8)
    assert {name: len(kind["pairs"]) for name, kind in found.items()} == {
        "token": 8, "token left out": 8, "tenth": 10, "tenth left out": 10,
    }  # fmt: skip
    for name, kind in found.items():
        assert kind["correlation"] > 0.95, name
        assert kind["slope"] == pytest.approx(1, abs=0.1), name
    tenths = [predicted for predicted, _ in found["tenth"]["pairs"]]
    assert tenths == sorted(tenths), "from the worst to the best"


def test_rank_correlation_with_ties():
    a = torch.tensor([3.0, 1.0, 2.0, 2.0])
    assert ceiling.rank_correlation(a, a) == pytest.approx(1)
    assert ceiling.rank_correlation(a, -a) == pytest.approx(-1)
    # ranks 4, 1, 2.5, 2.5 and 3.5, 1.5, 3.5, 1.5
    b = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert ceiling.rank_correlation(a, b) == pytest.approx(3 / (4.5 * 4) ** 0.5)
    assert ceiling.rank_correlation(a, torch.ones(4)) == 0


def test_a_moment_judges_scores_on_rows_that_the_oracle_does_not_know(
    losses, examples, target, reference, held_out
):
    torch.manual_seed(0)
    method = Method("adaspec", lr=1e-4)
    parts = [training_part(examples, target)]
    squares = ceiling.mean_squares(losses, parts)
    record = ceiling.measure_moment(losses, parts, held_out, squares, target, reference, method)
    assert 0 < record["harmful"] < 1 and 0 < record["acceptance"] < 1
    scores = record["scores"]
    assert scores["oracle"]["correlation"] > max(0.2, scores["random"]["correlation"])
    # the effects of the other half, by the oracle's own choice
    known, judged = (
        ceiling.scaled(ceiling.acceptance_gradient(losses, held_out[half::2]), squares)
        for half in (0, 1)
    )
    known, judged = (ceiling.effects(losses, parts[0], each) for each in (known, judged))
    top = known.topk(round(0.4 * len(known))).indices
    expected = judged[top].mean().item()
    assert scores["oracle"]["effect"] == pytest.approx(expected, rel=0.05)
    assert scores["all"]["effect"] == pytest.approx(judged.mean().item(), rel=1e-4)
    # a small step does what the effects foretell
    assert scores["all"]["step x 0.1"] == pytest.approx(
        0.1 * method.lr * judged.mean().item(), rel=0.3
    )


def trained(make_model, tokenizer, examples, step, inputs):
    model = make_model(seed=3)
    options = {"vocab_size": len(tokenizer), "lr": 1e-3, "epochs": 1, "batch_size": 4}
    summary = train(model, examples[:12], step, inputs, **options)
    return summary, dict(model.named_parameters())


@pytest.mark.parametrize("choice", ["gap", "all"])
def test_choices_that_training_has_are_the_same_here(
    choice, make_model, tokenizer, examples, target, reference, held_out
):
    method = Method("adaspec")
    own_step = ChosenTokens(choice, held_out, refresh=2, sample=2)
    own, weights = trained(make_model, tokenizer, examples, own_step, (target, reference, method))
    step, inputs = adaspec_step, (target, reference, method)
    if choice == "all":
        step, inputs = distillation_step, (target, method)
    usual, expected = trained(make_model, tokenizer, examples, step, inputs)
    assert own["loss_tokens"] == usual["loss_tokens"]
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=2e-4, rtol=1e-3, msg=name)


def test_the_oracle_trains_on_the_tokens_of_the_largest_effect(
    losses, make_model, tokenizer, examples, target, reference, held_out
):
    """Its direction is that of the held-out rows in turn, scaled as Adam scales once Adam has v."""
    step = ChosenTokens("oracle", held_out, refresh=2, sample=3)
    student = SimpleNamespace(head=losses.head, hidden=lambda batch: hidden_of(losses, batch))
    student.hidden.model = losses.model
    batch, loss = training_part(examples, target)
    total, count = step(student, batch, target, reference, Method("adaspec", k=0.4))
    direction = ceiling.acceptance_gradient(losses, held_out[:3])
    best = ceiling.effects(losses, (batch, loss), direction).topk(count).indices
    assert count == pytest.approx(0.4 * len(batch.index), abs=1)
    torch.testing.assert_close(total, losses(batch, *loss)[best].sum())
    first = step.gradient
    assert step.direction() is first, "grad A is formed every second step"
    step.steps = 2
    step.adam = {w: {"exp_avg_sq": torch.full_like(w, 4.0)} for w in losses.parameters()}
    direction = step.direction()
    expected = ceiling.acceptance_gradient(losses, [held_out[3], *held_out[:2]])
    for name in expected:
        torch.testing.assert_close(direction[name], expected[name] / 2, msg=name)
    step.choice = "plain-oracle"
    assert step.direction() is step.gradient
    hook = register_optimizer_step_post_hook(step.watch)
    try:
        trained(make_model, tokenizer, examples, step, (target, reference, Method("adaspec")))
    finally:
        hook.remove()
    assert all((state["exp_avg_sq"] >= 0).all() for state in step.adam.values())
    assert len(step.adam) == len(list(losses.parameters()))


def hidden_of(losses, batch):
    return ceiling.hidden_states(losses.model, batch)


# Runs

FLAGS = (
    "--task arithmetic --limit 16 --epochs 1,1,1 --losses tvd --moments 0 --held-out 32 "
    "--eval-rows 4 --sample 1 --batches 1 --checked 2 --seeds 1 --choices oracle"
).split()


@pytest.mark.slow
def test_a_run_and_the_same_run_once_more(tmp_path, toy_pair, monkeypatch, capsys):
    flags = [*FLAGS, "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "r.json")]
    ceiling.main(flags)
    first = capsys.readouterr().out
    record = json.loads((tmp_path / "r.json").read_text())
    assert [(row["seed"], row["passes"]) for row in record["moments"]] == [(1, 0)]
    drafts = [(row["seed"], row["loss"], row["choice"]) for row in record["variants"]]
    assert drafts == [(1, "tvd", "all"), (1, "tvd", "oracle")]
    everything, oracle = record["variants"]
    assert everything["steps"] == oracle["steps"] == 1
    assert oracle["loss_tokens"] == pytest.approx(0.4 * everything["loss_tokens"], abs=1)
    assert everything["expected"] != oracle["expected"]
    assert record["seeds"] == [1] and record["protocol"]["limit"] == 16
    assert "| tvd | oracle | 0." in first and "| 0 | oracle | " in first
    monkeypatch.setattr(ceiling.Study, "moment", None)  # neither is called again
    monkeypatch.setattr(ceiling.Study, "variant", None)
    ceiling.main(flags)
    again = capsys.readouterr().out
    assert again[again.index("| passes") :] == first[first.index("| passes") :]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--pair pythia", "unknown name 'pythia', expected one of tiny, tiny-wide"),
        ("--losses kl", "unknown name 'kl', did you mean 'rkl'?"),
        ("--k 0", "argument --k: must be a number above 0 and at most 1"),
        ("--epochs 3,3", "argument --epochs: must be three numbers of at least 1, got '3,3'"),
    ],
)
def test_flags_that_cannot_be_right(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        ceiling.main(flags.split())
    message = capsys.readouterr().err
    assert end.value.code == 2 and words in message and message.count("\n") == 1


def test_too_few_held_out_rows(tmp_path, toy_pair):
    flags = [*FLAGS, "--out", str(tmp_path), "--held-out", "20"]
    with pytest.raises(ValueError, match=r"--held-out 20: .* the oracle needs two batches of 16"):
        ceiling.main(flags)
