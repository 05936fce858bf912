"""The record of a stage's training: lines of history.jsonl and, on request, TensorBoard events.

A line is a JSON object, about `LINES` of them a stage, the last step's among them:

    step, epoch        from 1; a line of step 0 has the alpha of the start
    loss               the mean over the tokens that bore loss since the line before
    selected           how many of the response tokens those are, a fraction
    lr                 the step's learning rate
    tokens_per_second  since the line before, prompts included
    seconds            of training so far, without those of watching alpha
    alpha              in about `ALPHAS` lines of a stage with a target: see `Validation`
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from data import Batch, Example, make_batch
from head import Head, hidden_states
from ranks import rank
from storage import disk_errors, write_file
from teacher import token_loss

LINES, ALPHAS = 200, 20  # at most about as many of a stage, in equal distances


class Validation:
    """Held-out rows that alpha is watched on as a draft learns.

    The target is asked about them once, before training, on all ranks at once (its layers may be
    spread over them); no alpha where it never was, as in a stage without target.
    """

    def __init__(self, examples: Sequence[Example], rows_at_once: int):
        self.examples = [example for example in examples if example.bears_loss[1:].any()]
        self.rows_at_once = rows_at_once
        self.batches: list[Batch] = []
        self.losses: list[tuple[Callable, Callable]] = []  # by batch, see teacher.token_loss

    def ask(self, target) -> None:
        """Keep what the target, a teacher.Frozen with its trunk, says of the rows."""
        device = target.head.linear.weight.device
        rows = list(range(len(self.examples)))
        for start in range(0, len(rows), self.rows_at_once):
            batch = make_batch(self.examples, rows[start : start + self.rows_at_once], device)
            self.batches.append(batch)
            self.losses.append(token_loss("tvd", target, batch))

    @torch.no_grad()
    def alpha(self, model: nn.Module, head: Head, dtype: torch.dtype) -> float | None:
        """Expected acceptance of the draft in training, at temperature 1 on the rows' own
        responses: the mean of sum_x min(p, q) = 1 - TVD over their tokens. Draws no random
        numbers."""
        losses = []
        model.eval()
        for batch, loss in zip(self.batches, self.losses, strict=True):
            device = batch.input_ids.device.type
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                losses.append(head.token_losses(hidden_states(model, batch), *loss))
        model.train()
        return 1 - torch.cat(losses).mean().item() if losses else None


class History:
    """What training did, step by step; rank 0 keeps it. Part of the state that a stopped stage goes
    on from, so no line is lost or there twice.

    path: the file that grows as training goes on. log_dir: of TensorBoard's events.
    """

    def __init__(
        self,
        path: Path | None = None,
        validation: Validation | None = None,
        log_dir: Path | None = None,
    ):
        self.path = path
        self.validation = validation
        self.log_dir = log_dir
        self.events = None
        self.lines: list[dict] = []
        self.since = Counter()  # loss, loss_tokens, response_tokens, tokens since the last line

    def state_dict(self) -> dict:
        return {"lines": self.lines, "since": dict(self.since)}

    def load_state_dict(self, state: dict) -> None:
        self.lines = state["lines"]
        self.since = Counter(state["since"])

    def begin(self, step: int, steps: int, model: nn.Module, head: Head, dtype) -> None:
        """Training begins, or goes on after `step` of `steps`: lines of later steps, which are to
        be made again, are cut off."""
        self.steps = steps
        self.draft = (model, head, dtype)
        if rank() > 0:
            return
        if self.path:
            self.save(self.path)
        if self.log_dir:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(self.log_dir, purge_step=step + 1 if step else 0)
        if step == 0 and (alpha := self.alpha()) is not None:
            self.add({"step": 0, "epoch": 0, "seconds": 0.0, "alpha": alpha})

    def alpha(self) -> float | None:
        return self.validation.alpha(*self.draft) if self.validation else None

    def is_due(self, step: int, count: int) -> bool:
        """Whether the step is one of about `count` in equal distances, or the last."""
        return step == self.steps or step % -(-self.steps // count) == 0

    def record(self, summary: dict, epoch: int, lr: float, **counts) -> None:
        """Count a step (its summed loss, loss_tokens, response_tokens, tokens) and add its line, if
        one is due. summary: train.State's, after the step."""
        if rank() > 0:
            return
        self.since.update(counts)
        step = summary["steps"]
        watched = self.is_due(step, ALPHAS)
        if not (watched or self.is_due(step, LINES)):
            return
        seconds = summary["seconds"] - (self.lines[-1]["seconds"] if self.lines else 0)
        line = {
            "step": step,
            "epoch": epoch,
            "loss": self.since["loss"] / max(self.since["loss_tokens"], 1),
            "selected": self.since["loss_tokens"] / max(self.since["response_tokens"], 1),
            "lr": lr,
            "tokens_per_second": self.since["tokens"] / max(seconds, 1e-9),
            "seconds": summary["seconds"],
        }
        alpha = self.alpha() if watched else None
        if alpha is not None:
            line["alpha"] = alpha
        self.add(line)
        self.since.clear()

    def add(self, line: dict) -> None:
        for key, value in line.items():
            if isinstance(value, float):
                line[key] = float(f"{value:.6g}")  # for readers
        self.lines.append(line)
        if self.path:
            with disk_errors(self.path), open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        if self.events:
            for key in line.keys() - {"step"}:
                self.events.add_scalar(key, line[key], line["step"])
            self.events.flush()

    def end(self) -> None:
        if self.events:
            self.events.close()

    def save(self, path: Path) -> None:
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        write_file(path, lambda file: file.write(text.encode()))

    def remarks(self) -> str:
        """What its last loss is over, and what can be compared between drafts."""
        if not self.lines:
            return ""
        last = self.lines[-1]
        text = ""
        if last["selected"] < 1:
            text += f" (over the {last['selected']:.0%} of tokens selected)"
        if "alpha" in last:
            rows = len(self.validation.examples)
            text += f", alpha {last['alpha']:.3f} on {rows} validation rows"
        return text
