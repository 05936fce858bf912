"""One optimiser step of docs/trainer.md's Trainer and of train.train on the same rows; run as a
script by test_trainer_doc.py, once a rank."""

import copy
import re
import sys
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, TrainingArguments

import data
from ranks import world_size
from settings import Method
from teacher import Frozen, ReferenceLoss
from train import adaspec_step, distillation_step, make_schedule, train

PAGE = Path(__file__).parents[2] / "docs" / "trainer.md"
VOCABULARY = 400
ROWS = 8  # of an optimiser step


def documented_trainer():
    """The class of the page's code block."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    namespace = {}
    exec(compile(block, PAGE.name, "exec"), namespace)
    return namespace["AdaSpecTrainer"]


def pad_left(rows):
    """What a collator with left padding gives."""
    width = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([[value] * (width - len(row[name])) + row[name] for row in rows])
        for name, value in padding.items()
    }


def as_row(example):
    labels = [-100] * example.prompt_length + example.input_ids[example.prompt_length :].tolist()
    tokens = example.input_ids.tolist()
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def gradient_of_the_step(model, run):
    """(gradient of all weights at the optimiser's step in run(), what run() returns)."""
    gradients = []

    def keep(optimizer, *_):
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())

    hook = register_optimizer_step_pre_hook(keep)
    result = run()
    hook.remove()
    assert len(gradients) == 1
    return gradients[0], result


def make_trainer(models, rows, micro_batch, folder, accumulation=1):
    """The page's Trainer for one step; models: draft, target and, unless it is the reference that
    is trained, reference."""
    draft, *teachers = map(copy.deepcopy, models)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        max_steps=1,
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return documented_trainer()(
        draft,
        arguments,
        data_collator=pad_left,
        train_dataset=rows,
        eval_dataset=rows,
        vocab_size=VOCABULARY,
        **dict(zip(("target", "reference"), teachers, strict=False)),
    )


def trainer_step(models, examples, accumulation, folder):
    """(gradient, first line of the log) of the page's Trainer, in our loop's micro-batches."""
    count = accumulation * world_size()
    lengths = [len(example.input_ids) for example in examples]
    ((_, order),) = make_schedule(lengths, ROWS, 0, 1, None, "")
    rows = [as_row(examples[row]) for slot in range(count) for row in order[slot::count]]
    trainer = make_trainer(models, rows, ROWS // count, folder, accumulation)
    gradient, _ = gradient_of_the_step(trainer.model, trainer.train)
    return gradient, trainer.state.log_history[0]


def own_step(models, examples, accumulation):
    """(gradient, summary) of this project's loop."""
    draft, target, *reference = map(copy.deepcopy, models)
    target = Frozen(target, VOCABULARY)
    step, inputs = distillation_step, [target, Method("distillspec")]
    if reference:
        losses = ReferenceLoss(Frozen(reference[0], VOCABULARY), target, "fkl")
        step, inputs = adaspec_step, [target, losses, Method("adaspec")]
    settings = {"vocab_size": VOCABULARY, "lr": 1e-3, "epochs": 1, "batch_size": ROWS}
    settings["micro_batch"] = ROWS // (accumulation * world_size())
    return gradient_of_the_step(
        draft, lambda: train(draft, examples, step, inputs, clip=1e9, **settings)
    )


def check_equal(models, examples, accumulation, folder):
    """Trainer's step on rows padded on the left is our loop's on rows padded on the right."""
    gradient, logs = trainer_step(models, examples, accumulation, folder)
    expected, summary = own_step(models, examples, accumulation)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    assert abs(logs["loss"] - summary["loss"]) < 1e-5 * summary["loss"]
    tokens = sum(len(row.input_ids) - max(row.prompt_length, 1) for row in examples)
    assert logs["selected"] == summary["loss_tokens"] / tokens


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    names = ("draft", "target", "reference")
    models = [AutoModelForCausalLM.from_pretrained(folder / name) for name in names]
    examples, _ = data.read_examples(folder / "examples")
    for accumulation in (1, 4):
        check_equal(models, examples, accumulation, str(folder / "out"))
    assert world_size() == 2
    torch.distributed.destroy_process_group()
