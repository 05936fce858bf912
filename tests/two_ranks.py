"""Run by torchrun from test_teacher.py: caches, training, and stopping on two ranks (or one)."""

import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import data
import ranks
from distillspec import OnPolicy, ResponseWriter
from history import History, Validation
from settings import Method
from storage import Checkpoints
from teacher import Frozen, ReferenceLoss, TokenCache, shard_layers
from train import adaspec_step, distillation_step, token_loss, train

folder = Path(sys.argv[1])
device = ranks.setup()
examples, _ = data.read_examples(folder / "examples")
settings = {"vocab_size": 400, "lr": 1e-3, "epochs": 2, "batch_size": 7}


def load(name):
    return AutoModelForCausalLM.from_pretrained(folder / name).to(device)


def save(name, tensors):
    if ranks.rank() == 0:
        save_file(tensors, folder / f"{name}.safetensors")


def parameters_here(model):
    """How many of a model's parameters this rank holds."""
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return sum(part.numel() for part in parts)


# One cache for both ranks, with the target whole and with its layers spread over them


def fill(target, name, rows):
    """Answer from a cache of the first `rows` examples, in blocks of eight."""
    cache = TokenCache(folder / name, name, examples[:rows], 32, torch.float32, rows_at_once=1)
    target.use(cache, name)
    values = [target.hidden(data.make_batch(examples, [row], device)) for row in range(rows)]
    save(name, {"values": torch.cat(values)})


whole_target = Frozen(load("target"), 400)
fill(whole_target, "whole", 21)
# 13: blocks of eight and five rows at one time; 21: a third for one rank, while the other helps
for name, rows in (("sharded-13", 13), ("sharded-21", 21)):
    model = load("target")
    size = parameters_here(model)
    sharded_target = Frozen(model, 400)
    shard_layers(model)
    fill(sharded_target, name, rows)
    share = 0.75 if ranks.world_size() > 1 else 1
    assert parameters_here(model) <= share * size, "a rank holds more than its share"

# Training: ranks of unequal token counts, and a filter over both; alpha is watched with a target
# that both hold a part of

model = load("target")
spread_target = Frozen(model, 400)
shard_layers(model)

reference = ReferenceLoss(Frozen(load("reference"), 400), whole_target, "fkl")
validation = Validation(examples[:5], rows_at_once=2)
validation.ask(spread_target)
history = History(folder / "history.jsonl", validation)
draft = load("draft")
inputs = whole_target, reference, Method("adaspec")
summary = train(draft, examples, adaspec_step, inputs, history=history, **settings)
assert len(history.lines) == (7 if ranks.rank() == 0 else 0)
save("adaspec", dict(draft.state_dict()))
save("summary", {key: torch.tensor(summary[key]) for key in ("loss", "loss_tokens", "tokens")})
draft = load("draft")
inputs = whole_target, Method("distillspec")
train(draft, examples, distillation_step, inputs, micro_batch=2, **settings)
save("distilled", dict(draft.state_dict()))

# A signal to one rank stops both, and training goes on to the same bits on both: each with its own
# dropout, on responses that both have written


def on_policy_training(checkpoints, stop_at=None):
    writer = ResponseWriter([0], vocab_size=400, max_new_tokens=6, max_length=128, batch_size=4)
    on_policy = OnPolicy(
        writer, examples, 1.0, refresh=4, seed=0, rank=ranks.rank(), ranks=ranks.world_size()
    )
    live_target = Frozen(load("target"), 400)
    steps = []

    def step(student, batch):
        steps.append(1)
        if len(steps) == stop_at and ranks.rank() == ranks.world_size() - 1:
            ranks.stop_signal = signal.SIGTERM
        hidden = F.dropout(student.hidden(batch), 0.1)
        return student.head.loss(hidden, *token_loss("fkl", live_target, batch)), len(hidden)

    model = load("draft")
    train(model, examples, step, checkpoints=checkpoints, on_policy=on_policy, **settings)
    return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()


expected = on_policy_training(None)
checkpoints = Checkpoints(folder / "checkpoints", "fingerprint")
try:
    on_policy_training(checkpoints, stop_at=3)
    raise AssertionError("a rank did not stop")
except ranks.Stopped:
    ranks.stop_signal = None
if ranks.rank() == 0:  # which has written it
    saved = [path.name for path in checkpoints.folder.glob("*.pt")]
    assert saved == ["000000003-fingerprint.pt"]
weights = on_policy_training(checkpoints)
assert torch.equal(weights, expected)
assert all(torch.equal(weights, other) for other in ranks.gather_objects(weights))
ranks.leave()
