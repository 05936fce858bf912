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
    frozen = train.Frozen(model, len(tokenizer))
    if name == "sharded":
        train.shard_layers(model)
        parameters = sum(p.numel() for p in model.parameters())
        local = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
        assert local < 0.75 * parameters, "nothing was sharded"
    frozen.use(train.TokenCache(folder / name, name, examples, 32, torch.float32), 4, name)
    values = torch.cat([frozen.hidden(train.make_batch(examples, [row], device)) for row in range(len(examples))])
    if train.rank() == 0:
        torch.save(values, folder / f"{name}.pt")
    train.agreed(None)
torch.distributed.destroy_process_group()
