"""The chunked head: the model's own logits, and loss and gradients of plain autograd."""

import pytest
import torch

import head
from adaspec import token_kl
from data import collate, make_batch
from distillspec import DIVERGENCES
from head import Head, hidden_states

CPU = torch.device("cpu")
ARCHITECTURES = ("neox", "llama", "phi", "codegen")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trunk_and_head_give_the_models_own_logits(make_model, examples, architecture):
    model = make_model(architecture)
    input_ids, labels = collate(examples[:5])
    batch = make_batch(examples, list(range(5)), CPU)
    response = labels[:, 1:] != -100
    with torch.no_grad():
        expected = model(input_ids).logits[:, :-1, :400][response]
        logits = Head(model, 400)(hidden_states(model, batch))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert batch.labels.tolist() == labels[:, 1:][response].tolist()


def test_heads_that_do_not_fit_are_refused(make_model):
    from transformers import AutoModelForCausalLM, GraniteConfig

    config = GraniteConfig(
        vocab_size=99,
        logits_scaling=8.0,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"Granite.* changes its logits"):
        Head(model, 99).check(model)
    with pytest.raises(ValueError, match="399 rows, the tokenizer 400 tokens"):
        Head(make_model(vocab_size=399), 400)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("training", [False, True])
def test_heads_that_fit_pass_and_the_models_mode_stays(make_model, architecture, training):
    dropout = {"resid_pdrop": 0.5} if architecture in ("phi", "codegen") else {}
    model = make_model(architecture, **dropout).train(training)
    Head(model, 400).check(model)
    assert model.training == training


def whole_loss(model, batch, signal, loss, rows):
    """The loss of these response rows from the model's whole logits, by autograd."""
    logits = model(batch.input_ids).logits.flatten(0, 1)[batch.index[rows], :400]
    return loss(signal(rows), logits).sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("architecture", "name"),
    [(architecture, "fkl") for architecture in ARCHITECTURES]
    + [("neox", name) for name in DIVERGENCES if name != "fkl"],
)
@pytest.mark.parametrize("selected", [False, True])
def test_chunked_loss_is_the_plain_one(
    make_model, examples, monkeypatch, architecture, name, selected, tolerance=1e-6
):
    """Loss and every parameter's gradient within 1e-6 of autograd on all logits; chunks do not
    divide the rows."""
    monkeypatch.setattr(head, "CHUNK", 50)
    monkeypatch.setattr(head, "GPU_LOGITS", 0)  # this test runs on GPUs too
    target, draft = make_model(architecture, seed=1), make_model(architecture, seed=2)
    for model in (target, draft):
        if model.get_output_embeddings().bias is not None:  # zeros, in a new model
            torch.nn.init.normal_(model.get_output_embeddings().bias)
    batch = make_batch(examples, list(range(6)), draft.device)
    positions = torch.arange(len(batch.index), device=draft.device)
    rows = positions[::3] if selected else None
    all_rows = positions if rows is None else rows
    with torch.no_grad():
        target_logits = Head(target, 400)(hidden_states(target, batch))

    def signal(rows):
        return target_logits[rows]

    loss = DIVERGENCES[name]
    draft_head = Head(draft, 400)
    chunked = draft_head.loss(hidden_states(draft, batch), signal, loss, rows)
    plain = whole_loss(draft, batch, signal, loss, all_rows)
    torch.testing.assert_close(chunked, plain, rtol=tolerance, atol=0)
    expected = gradients(draft, 3 * plain)
    assert (gradients(draft, 3 * chunked) - expected).norm() < tolerance * expected.norm()
    token_losses = draft_head.token_losses(hidden_states(draft, batch), signal, loss)
    assert token_losses.shape == batch.index.shape and not token_losses.requires_grad
    torch.testing.assert_close(token_losses[all_rows].sum(), plain, rtol=tolerance, atol=0)


def test_a_frozen_head_passes_the_gradient_on(make_model, examples):
    """An EAGLE head's output head is its target's."""
    draft = make_model("phi")
    batch = make_batch(examples, [0, 1], CPU)
    draft_head = Head(draft, 400)
    hidden = hidden_states(draft, batch).detach().requires_grad_()
    loss = DIVERGENCES["tvd"]
    signal = torch.randn(len(hidden), 400)

    def hidden_gradient():
        hidden.grad = None
        draft.zero_grad()
        draft_head.loss(hidden, lambda rows: signal[rows], loss).backward()
        return hidden.grad

    expected = hidden_gradient()
    assert draft_head.linear.weight.grad is not None and draft_head.linear.bias.grad is not None
    draft_head.linear.requires_grad_(False)
    assert torch.equal(hidden_gradient(), expected)
    assert draft_head.linear.weight.grad is None and draft_head.linear.bias.grad is None


def test_more_logits_exist_at_one_time_off_the_cpu():
    rows = torch.empty(3000, device="meta")
    assert [len(part) for part in head.chunks(rows, 2**16)] == [1024, 1024, 952]
    assert len(head.chunks(rows, 2**20)) == 12  # never fewer rows than on a CPU
    assert len(head.chunks(torch.empty(3000), 2**16)) == 12


def test_few_logits_exist_at_one_time(make_model, examples, monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 50)
    draft = make_model()
    batch = make_batch(examples, list(range(6)), CPU)
    chunks, blocks = [], []

    def signal(rows):
        chunks.append(len(rows))
        return batch.labels[rows]

    def loss(labels, logits):
        blocks.append(len(logits))
        return logits.float().logsumexp(-1)

    hidden = hidden_states(draft, batch)
    draft_head = Head(draft, 400)
    draft_head.loss(hidden, signal, loss)
    assert sum(chunks) == len(hidden) > 150 and max(chunks) == 50 and max(blocks) == 16
    chunks.clear(), blocks.clear()
    draft_head.token_losses(hidden, signal, loss)
    assert sum(chunks) == len(hidden) and max(chunks) == 50 and max(blocks) == 16


@pytest.mark.parametrize(
    ("autocast", "expected"),
    [
        (None, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),  # GradScaler's scale is not known yet
    ],
)
def test_the_losses_logits_have_the_autocast_type(make_model, examples, autocast, expected):
    draft = make_model("phi")  # its head has a bias
    batch = make_batch(examples, [0, 1], CPU)
    dtypes = set()

    def loss(labels, logits):
        dtypes.add(logits.dtype)
        return logits.float().square().sum(-1)

    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        hidden = hidden_states(draft, batch)
        draft_head = Head(draft, 400)
        signal = batch.labels.__getitem__
        draft_head.token_losses(hidden, signal, loss)
        draft_head.loss(hidden, signal, loss).backward()
    assert dtypes == {expected}
    assert {p.grad.dtype for p in draft.parameters()} == {torch.float32}


def test_no_rows_give_a_loss_of_zero(make_model, examples):
    draft = make_model()
    batch = make_batch(examples, [0], CPU)
    hidden = hidden_states(draft, batch)
    none = torch.arange(0)
    loss = Head(draft, 400).loss(hidden, lambda rows: torch.zeros(len(rows), 400), token_kl, none)
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in draft.parameters())


def test_a_model_that_reads_more_than_tokens_gives_its_own_states(make_model, examples):
    draft = make_model()
    batch = make_batch(examples, [0], CPU)
    states = torch.randn(len(batch.index), 32)
    draft.response_states = lambda batch: states
    assert hidden_states(draft, batch) is states
    Head(draft, 400).check(draft)  # nothing to compare with
