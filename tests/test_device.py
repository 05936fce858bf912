"""What a CPU can say of GPUs, by a pretended one (pretend.py): nothing is left on the wrong device,
and the host waits for the device no more often than the code says."""

import pytest
import torch

from adaspec import adaspec_loss
from distillspec import DIVERGENCES, distill_loss
from history import History
from settings import Method
from short_head import with_outside
from speculative import speculative_generate
from teacher import Frozen, ReferenceLoss, TokenCache
from tests.pretend import CUDA, pretended_gpu, to_gpu
from tests.sampling import build, noised
from train import adaspec_step, distillation_step, fine_tuning_step, train

READ = "aten._to_copy.default from the GPU"


def leave_out_forwards(gpu, *models):
    """Do not count the waits of transformers itself, which reads positions and masks."""
    counts = []
    for model in models:
        model.register_forward_pre_hook(lambda *_: counts.append(len(gpu.waits)))
        model.register_forward_hook(lambda *_: gpu.waits.__delitem__(slice(counts.pop(), None)))


class WaitsByStep(History):
    """The waits of each step of a training, from make_batch to the optimiser's step."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu
        self.waits = []

    def begin(self, *arguments):
        super().begin(*arguments)
        self.gpu.waits.clear()

    def record(self, *arguments, **counts):
        super().record(*arguments, **counts)
        self.waits.append([*self.gpu.waits])
        self.gpu.waits.clear()


def train_stage(name, models, examples, folder=None, history=None):
    """Train the draft for a step of two micro-batches, with caches in `folder`: the loss, and how
    the weights have changed."""
    draft, target, reference = models
    target, reference = Frozen(target, 400), Frozen(reference, 400)
    losses = ReferenceLoss(reference, target, "fkl")
    if folder:
        device = target.model.device
        target.use(TokenCache(folder, "target", examples, 32, torch.float32, 2), "target")
        losses.use(TokenCache(folder, "kl", examples, 1, torch.float32, 2), device, "reference")
    step, inputs = {
        "fine-tuning": (fine_tuning_step, ()),
        "distillation": (distillation_step, (target, Method("distillspec"))),
        "adaspec": (adaspec_step, (target, losses, Method("adaspec"))),
    }[name]
    settings = {"vocab_size": 400, "lr": 1e-3, "epochs": 1, "batch_size": 4, "micro_batch": 2}
    before = weights(draft)
    summary = train(draft, examples, step, inputs, history=history, **settings)
    return summary["loss"], weights(draft) - before


def weights(model):
    return torch.cat([weight.detach().cpu().flatten() for weight in model.parameters()])


def test_the_pretended_gpu_refuses_both_devices_in_one_operation():
    with pretended_gpu():
        here, there = torch.arange(4.0), torch.arange(4.0, device=CUDA)
        index = torch.tensor([0], device=CUDA)
        for operation in (
            lambda: here + there,
            lambda: here * there.sum(),
            lambda: here[index],
            lambda: here.index_put_((index,), torch.zeros(1)),
        ):
            with pytest.raises(AssertionError, match="of the CPU and of the GPU"):
                operation()
        assert (there * torch.tensor(2.0))[torch.tensor([1])].tolist() == [2.0]


@pytest.mark.parametrize(
    ("name", "cached", "own_waits"),
    [
        ("fine-tuning", False, []),
        ("distillation", False, []),
        ("adaspec", False, ["aten.nonzero.default"]),
        ("adaspec", True, ["aten.nonzero.default"]),
    ],
)
def test_a_training_step_waits_once(make_model, examples, tmp_path, name, cached, own_waits):
    """For its loss and norm, and in adaspec_step for the number of selected tokens; it trains what
    it trains on a CPU."""
    examples = [e._replace(input_ids=e.input_ids[-24:], prompt_length=9) for e in examples[:4]]
    sizes = {"num_hidden_layers": 1}
    models = [make_model(seed=seed, **sizes) for seed in range(3)]
    expected_loss, expected = train_stage(name, models, examples)
    with pretended_gpu() as gpu:
        models = [to_gpu(make_model(seed=seed, **sizes)) for seed in range(3)]
        leave_out_forwards(gpu, *(model.base_model for model in models))
        history = WaitsByStep(gpu)
        loss, change = train_stage(name, models, examples, tmp_path if cached else None, history)
    assert history.waits == [[*own_waits, *own_waits, READ]]
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (change - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_round_waits_once(temperature):
    """Between its first forward and its end; what it copies to the GPU goes there before."""
    target = build()
    draft = noised(target)
    input_ids = torch.randint(1, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    settings = {"max_new_tokens": 7, "gamma": 2, "temperature": temperature}
    torch.manual_seed(1)
    expected = speculative_generate(target, draft, input_ids, mask, **settings)
    with pretended_gpu() as gpu:
        models = to_gpu(target), to_gpu(draft)
        inputs = input_ids.to(CUDA), mask.to(CUDA)
        leave_out_forwards(gpu, *models)
        for model in models:
            model.register_forward_hook(lambda *_: gpu.waits.append("forward"))
        torch.manual_seed(1)
        output = speculative_generate(*models, *inputs, **settings)
        sequences = output.sequences.cpu()
        assert output.sequences.device == CUDA
    assert torch.equal(sequences, expected.sequences) and output.stats == expected.stats
    events = gpu.waits[gpu.waits.index("forward") :]
    rounds = "".join({"forward": "f", READ: "r"}.get(event, "c") for event in events)
    assert rounds.count("r") > 2 and "fc" not in rounds, rounds
    assert "rr" not in rounds.rstrip("r"), rounds


def test_losses_are_on_their_inputs_device(make_model):
    generator = torch.Generator().manual_seed(0)
    draft, target, reference = torch.randn(3, 2, 6, 11, generator=generator)
    labels = torch.tensor([[-100, -100, 1, 2, 3, 4], [-100, 5, 6, 7, -100, -100]])
    log_odds = torch.randn(12, generator=generator)

    def losses(draft, target, reference, labels, log_odds):
        values = [adaspec_loss(draft, target, reference, labels)]
        values += [distill_loss(draft, target, labels, name) for name in DIVERGENCES]
        return [*values, with_outside(target.flatten(0, 1), log_odds).sum()]

    inputs = draft, target, reference, labels, log_odds
    expected = losses(*inputs)
    with pretended_gpu():
        values = losses(*(tensor.to(CUDA) for tensor in inputs))
        assert [value.device for value in values] == [CUDA] * len(expected)
        assert [value.item() for value in values] == [value.item() for value in expected]
