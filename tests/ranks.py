"""Run by torchrun from test_train.py: one cache with the target whole, one with its layers spread over the ranks."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import data
import train

folder = Path(sys.argv[1])
device = train.setup()
rows = data.load_rows("arithmetic", "train", limit=21)
tokenizer = data.train_tokenizer([row["question"] + row["answer"] for row in rows], 300)
examples, _ = data.encode("arithmetic", rows, tokenizer, 512)
for name in ("whole", "sharded"):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    frozen, whole = train.Frozen(model, len(tokenizer)), model.num_parameters()
    if name == "sharded":
        train.shard_layers(model)
    frozen.use(train.TokenCache(folder / name, name, examples, 32, torch.float32), 4, name)
    held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
    assert (held < 0.75 * whole) == (name == "sharded"), "after the forwards a rank must hold its share only"
    values = torch.cat([frozen.hidden(train.make_batch(examples, [row], device)) for row in range(len(examples))])
    if train.rank() == 0:
        torch.save(values, folder / f"{name}.pt")
    train.agreed(None)
torch.distributed.destroy_process_group()
