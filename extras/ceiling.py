"""The ceiling of any selector: what AdaSPEC would gain if its filter took the truly best tokens.

    python -m extras.ceiling --data-dir DIR --out DIR --seeds 0,1,2 --json results/ceiling-tiny.json

The effect of a token says how a step on it alone changes the expected acceptance of held-out rows,
A = mean (1 - TVD). For a step against the gradient of its loss l, scaled as Adam scales it, that is
to first order, and per unit of the learning rate,

    effect = -<grad l, P grad A>,    P = 1 / (sqrt(v) + eps), v the mean squared gradient

(momentum spreads it over the next steps and leaves its sum as it is). All tokens of a batch have
theirs from one derivative of their losses along P grad A, in forward mode. An oracle that selects
by it knows the held-out rows, as no selector does.

Three parts: real steps against this prediction and, at several moments of training, what the oracle
and other scores would gain in a step, with the first seed; and drafts trained on what each of them
selects, with every seed. What is finished is kept under --out, and the same command goes on after
it. The drafts are small ones: the logits of a whole batch exist at one time.
"""

import interrupt  # noqa: F401 -- first: it makes Ctrl-C during the other imports one line

# isort: split

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.optim.optimizer import register_optimizer_step_post_hook

import storage
from adaspec import select_tokens, selected_count
from cells import (
    Cell,
    base_models,
    check_cell,
    draft_plan,
    prepare_cell,
    reference_method,
    target_plan,
)
from cli import Parser, decimal, folder, numbers, one_of, run_command, some_of, whole
from data import TASKS, Batch, batches, collate, digest, make_batch
from distillspec import DIVERGENCES
from extras import measure
from head import Head, hidden_states
from history import Validation
from models import load_model
from run_all import quiet_libraries
from settings import PAIRS, Method, Settings
from speculative import expected_acceptance
from stages import fit
from storage import Model
from tables import grid, grouped, interval
from teacher import Frozen, ReferenceLoss, token_loss
from train import TRAINING_VERSION, distillation_step, fine_tuning_step, target_entropy

EPS = 1e-8  # Adam's
STEPPED_ON = 3  # held-out batches that real steps are judged on
SQUARED = 16  # training batches that give v
# Lengths of real steps, in lr times P times the gradient of a batch. AdamW's own are 1.0 long at
# first and about 0.25 after a pass (tiny, gsm8k): momentum averages the noise of batches away
SHARES = (0.25, 0.1)
COLUMNS = ("effect", *(f"step x {share:g}" for share in SHARES))
CHOICES = ("oracle", "plain-oracle", "gap", "loss", "random")  # of the tokens to train on

# a batch, and what its tokens are held against: (signal, loss) of teacher.token_loss
Part = tuple[Batch, tuple[Callable, Callable]]


# The effect of each token


class TokenLosses(nn.Module):
    """The loss of every response token of a batch, [N], as a function of a model's weights."""

    def __init__(self, model: nn.Module, vocab_size: int):
        super().__init__()
        model.set_attn_implementation("eager")  # the fused kernels have no forward mode
        self.model = model
        self.head = Head(model, vocab_size)

    def forward(self, batch: Batch, signal: Callable, loss: Callable) -> Tensor:
        logits = self.head(hidden_states(self.model, batch))
        return loss(signal(torch.arange(len(logits), device=logits.device)), logits)

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.named_parameters()}

    def gradient(self, loss: Tensor) -> dict[str, Tensor]:
        """Of a scalar, by the names of the weights; it can be asked for again."""
        names, weights = zip(*self.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(loss, weights, retain_graph=True), strict=True))


def acceptance(losses: TokenLosses, weights: dict[str, Tensor], held_out: Sequence[Part]) -> float:
    """A: expected acceptance at temperature 1, the mean over the tokens of the held-out rows."""
    with torch.no_grad():
        rejected = [functional_call(losses, weights, (batch, *tvd)) for batch, tvd in held_out]
    return 1 - torch.cat(rejected).double().mean().item()


def acceptance_gradient(losses: TokenLosses, held_out: Sequence[Part]) -> dict[str, Tensor]:
    """grad A, by the names of the weights."""
    tokens = sum(len(batch.index) for batch, _ in held_out)
    parts = [losses.gradient(-losses(batch, *tvd).sum() / tokens) for batch, tvd in held_out]
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def effects(losses: TokenLosses, part: Part, direction: dict[str, Tensor]) -> Tensor:
    """-<grad l, direction> of every token's loss l, [N]: the effects where the direction is grad A,
    or P grad A for a step as Adam scales it."""
    batch, held_against = part

    def token_losses(weights):
        return functional_call(losses, weights, (batch, *held_against))

    return -jvp(token_losses, (losses.weights(),), (direction,))[1]


def scaled(vector: dict[str, Tensor], squares: dict[str, Tensor]) -> dict[str, Tensor]:
    """P times a vector, from the mean squared gradient."""
    return {name: value / (squares[name].sqrt() + EPS) for name, value in vector.items()}


# Scores, and what they would gain in a step


@torch.no_grad()
def simple_scores(head: Head, hidden: Tensor, batch: Batch, target, reference, name: str) -> dict:
    """What a selector could rank the tokens by, [N] each; `name` is the divergence of the gap."""
    p_logits, q_logits = target.head(target.hidden(batch)), head(hidden)
    loss = DIVERGENCES[name](p_logits, q_logits)
    return {
        "gap": loss - reference.losses(batch),
        "loss": loss,
        "rejection": DIVERGENCES["tvd"](p_logits, q_logits),
        "disagreement": (p_logits.argmax(-1) != q_logits.argmax(-1)).float(),
        "entropy": target_entropy(p_logits, q_logits),
        "random": torch.rand_like(loss),
    }


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of two tensors [N]; equal values have the mean of their ranks. 0 where all of
    one are equal."""
    ranks = []
    for values in (a, b):
        _, places, counts = np.unique(values.cpu().numpy(), return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum() - (counts - 1) / 2)[places])
    constant = any(np.ptp(values) == 0 for values in ranks)
    return 0.0 if constant else float(np.corrcoef(*ranks)[0, 1])


def length(vector: dict[str, Tensor]) -> float:
    return math.sqrt(sum(value.double().square().sum().item() for value in vector.values()))


def after_step(
    weights: dict[str, Tensor], step: dict[str, Tensor], rate: float
) -> dict[str, Tensor]:
    """The weights after a step against `step`."""
    return {name: weight - rate * step[name] for name, weight in weights.items()}


def mean_squares(losses: TokenLosses, parts: Sequence[Part]) -> dict[str, Tensor]:
    """v: the squared gradient of a batch's mean loss, mean over the batches. (Adam's own is nearly
    that in its first thousand steps.)"""
    gradients = [losses.gradient(losses(batch, *loss).mean()) for batch, loss in parts]
    count = len(gradients)
    return {name: sum(g[name].square() for g in gradients) / count for name in gradients[0]}


def measure_moment(
    losses: TokenLosses,
    parts: Sequence[Part],
    held_out: Sequence[Part],
    squares: dict[str, Tensor],
    target,
    reference,
    method: Method,
) -> dict:
    """By score, over the tokens of the batches `parts`: the rank correlation with the effects, the
    mean effect of the top k, and by how much A changes in real steps on them, each as long as the
    one on all tokens at a share of the rate `method.lr`. The same for all tokens.

    Effects and A are those of one half of the held-out batches; the oracles know the other half,
    so that none is credited with the noise of its own rows."""
    oracle_gradient, judge_gradient = (
        acceptance_gradient(losses, held_out[half::2]) for half in (0, 1)
    )
    weights = losses.weights()
    stepped_on = held_out[1::2][:STEPPED_ON]
    before = acceptance(losses, weights, stepped_on)
    scores, effect, changes = [], [], {}
    for part in parts:
        batch, held_against = part
        hidden = hidden_states(losses.model, batch).detach()
        own = {"oracle": effects(losses, part, scaled(oracle_gradient, squares))}
        own["plain-oracle"] = effects(losses, part, oracle_gradient)
        own |= simple_scores(losses.head, hidden, batch, target, reference, method.gap)
        scores.append(own)
        effect.append(effects(losses, part, scaled(judge_gradient, squares)))
        values = losses(batch, *held_against)
        count = selected_count(len(values), method.k)
        selections = {"all": torch.arange(len(values))}
        selections |= {name: score.topk(count).indices for name, score in own.items()}
        steps = {
            name: scaled(losses.gradient(values[rows].mean()), squares)
            for name, rows in selections.items()
        }
        for name, rows in selections.items():
            step = steps[name]
            rate = method.lr * length(steps["all"]) / length(step)
            gains = [effect[-1][rows].mean().item()]
            for share in SHARES:
                after = acceptance(losses, after_step(weights, step, share * rate), stepped_on)
                gains.append(after - before)
            changes.setdefault(name, []).append(gains)
    together = torch.cat(effect)
    means = {name: np.mean(gains, axis=0) for name, gains in changes.items()}
    result = {"acceptance": before, "harmful": (together < 0).double().mean().item()}
    result["scores"] = {
        name: dict(zip(COLUMNS, means[name].tolist(), strict=True)) for name in means
    }
    for name in scores[0]:
        correlation = rank_correlation(torch.cat([own[name] for own in scores]), together)
        result["scores"][name]["correlation"] = correlation
    return result


def check_steps(
    losses: TokenLosses,
    part: Part,
    held_out: Sequence[Part],
    squares: dict[str, Tensor],
    rate: float,
    count: int,
) -> dict:
    """How far the effects foretell real steps, in float64 and as Adam scales them, each token with
    the weight that it has in a batch: `token`, a step on one alone; `token left out`, the step on
    the whole batch with it and without it; `tenth` and `tenth left out`, the same for ten groups,
    from the worst to the best.

    Each as (predicted, real) pairs of changes of A, with Pearson's correlation and the slope.
    """
    batch, held_against = part
    direction = scaled(acceptance_gradient(losses, held_out), squares)
    predicted = effects(losses, part, direction).double()
    values = losses(batch, *held_against)
    weights = {name: weight.double() for name, weight in losses.weights().items()}

    def step_on(rows) -> dict[str, Tensor]:
        gradient = losses.gradient(values[rows].sum())
        return {name: value.double() for name, value in scaled(gradient, squares).items()}

    def after(*steps: tuple[dict, float]) -> float:
        place = weights
        for step, size in steps:
            place = after_step(place, step, size)
        return acceptance(losses, place, held_out)

    tokens, size = len(values), rate / len(values)
    whole_step = (step_on(torch.arange(tokens)), size)
    before, with_all = after(), after(whole_step)
    sample = torch.randperm(tokens)[:count].split(1)
    pairs = {}
    for name, groups in (("token", sample), ("tenth", predicted.argsort().tensor_split(10))):
        for group in groups:
            step = step_on(group)
            change = size * predicted[group].sum().item()
            alone = after((step, size)) - before
            pairs.setdefault(name, []).append((change, alone))
            left_out = with_all - after(whole_step, (step, -size))
            pairs.setdefault(f"{name} left out", []).append((change, left_out))
    return {name: {"pairs": each, **agreement(each)} for name, each in pairs.items()}


def agreement(pairs: Sequence[tuple[float, float]]) -> dict:
    """Pearson's correlation of (predicted, real) pairs, and the slope of real over predicted."""
    predicted, real = np.array(pairs).T
    slope = np.polyfit(predicted, real, 1)[0]
    return {"correlation": float(np.corrcoef(predicted, real)[0, 1]), "slope": float(slope)}


# Training on what a score selects


class ChosenTokens:
    """A step of `train.train`: as adaspec_step, with the tokens that `choice` ranks highest. The
    oracles' grad A is formed anew every `refresh` steps, on the next `sample` held-out batches.
    It must be fresh: an old one goes on to ask for what the last steps have done already."""

    def __init__(self, choice: str, held_out: Sequence[Part], refresh: int, sample: int):
        self.choice = choice
        self.held_out = held_out
        self.refresh = refresh
        self.sample = sample
        self.steps = 0
        self.losses: TokenLosses | None = None
        self.gradient: dict[str, Tensor] = {}
        self.adam: dict = {}  # the state of the optimiser, by weight

    def __call__(self, student, batch: Batch, target, reference, method):
        if self.losses is None:
            self.losses = TokenLosses(student.hidden.model, student.head.vocab_size)
        hidden = student.hidden(batch)
        held_against = token_loss(method.divergence, target, batch)
        rows = None
        if self.choice != "all":
            inputs = ((batch, held_against), target, reference, method)
            score = self.score(student.head, hidden, *inputs)
            rows = select_tokens(score, method.k).nonzero().squeeze(-1)
        self.steps += 1
        loss = student.head.loss(hidden, *held_against, rows)
        return loss, len(hidden) if rows is None else len(rows)

    def score(self, head: Head, hidden, part: Part, target, reference, method) -> Tensor:
        if self.choice in ("oracle", "plain-oracle"):
            return effects(self.losses, part, self.direction())
        return simple_scores(head, hidden, part[0], target, reference, method.gap)[self.choice]

    def direction(self) -> dict[str, Tensor]:
        """grad A, or P grad A with Adam's own v; before its first step there is none."""
        if self.steps % self.refresh == 0:
            start = self.steps // self.refresh * self.sample
            places = [place % len(self.held_out) for place in range(start, start + self.sample)]
            sample = [self.held_out[place] for place in places]
            self.gradient = acceptance_gradient(self.losses, sample)
        if self.choice == "plain-oracle" or not self.adam:
            return self.gradient
        squares = {n: self.adam[w]["exp_avg_sq"] for n, w in self.losses.named_parameters()}
        return scaled(self.gradient, squares)

    def watch(self, optimizer, *_) -> None:
        """A hook that PyTorch calls after every optimiser step."""
        self.adam = optimizer.state


def train_variant(
    cell: Cell, name: str, step: ChosenTokens, method: Method, models: dict[str, Model]
) -> Model:
    """Stage 2 with these tokens, in the stage `name`."""
    plan = replace(draft_plan(cell, method, models["base"], models["target"]), name=name)
    hook = register_optimizer_step_post_hook(step.watch)
    try:
        return fit(cell, plan, step, models["target"], models["reference"])
    finally:
        hook.remove()


def evaluate_rows(cell: Cell, target: nn.Module, draft: nn.Module) -> dict:
    """Expected acceptance (T = 1) and agreement of argmaxes (T = 0), means over the response tokens
    of the evaluation rows."""
    overlap, agree = [], []
    for start in range(0, len(cell.test), cell.rows_at_once):
        input_ids, labels = collate(cell.test[start : start + cell.rows_at_once])
        placed = [tensor.to(cell.device) for tensor in (input_ids, labels)]
        rows = expected_acceptance(target, draft, *placed, vocab_size=len(cell.tokenizer))
        overlap.append(rows.overlap)
        agree.append(rows.agree)
    return {
        "expected": torch.cat(overlap).double().mean().item(),
        "agree": torch.cat(agree).double().mean().item(),
    }


# The study of a seed


class Study:
    """A cell with its trained models, and the held-out rows that the oracle knows."""

    def __init__(self, cell: Cell, args):
        self.args = args
        self.held_out_rows = cell.validation
        # fit watches alpha on a few of them
        self.cell = replace(cell, validation=cell.validation[: Settings.validation_rows])
        self.method = Method("adaspec", k=args.k, lr=cell.recipe.lr)
        target, base = base_models(self.cell)
        if cell.recipe.epochs[0]:
            target = fit(self.cell, target_plan(self.cell, target), fine_tuning_step)
        self.models = {"target": target, "base": base}
        self.models["reference"] = self.distilled(reference_method(cell, self.method))
        self.target = Frozen(self.load(target), len(cell.tokenizer))
        validation = Validation(self.held_out_rows, cell.rows_at_once)
        validation.ask(self.target)
        self.held_out = list(zip(validation.batches, validation.losses, strict=True))

    def load(self, model: Model) -> nn.Module:
        return load_model(model.path, torch.float32, self.cell.device)

    def distilled(self, method: Method) -> Model:
        plan = draft_plan(self.cell, method, self.models["base"], self.models["target"])
        return fit(self.cell, plan, distillation_step, self.models["target"])

    @property
    def fingerprint(self) -> str:
        """Of all that results hang on, the rows too."""
        parts = (self.cell.examples, self.held_out_rows, self.cell.test)
        rows = {"rows": [digest(examples) for examples in parts], "training": TRAINING_VERSION}
        return storage.fingerprint(study_protocol(self.args) | rows)

    def once(self, name: str, compute: Callable[[], dict]) -> dict:
        """What `compute` returns, from a file where an equal study has written it."""
        protocol = self.fingerprint
        path = self.cell.folder / "ceiling" / f"{name}-{protocol[:8]}.json"
        record = storage.read_json(path)
        if not record:
            record = compute()
            storage.write_json(path, record)
        return {"seed": self.cell.seed} | record

    def training_parts(self, count: int) -> list[Part]:
        """The first training batches, with the recipe's loss."""
        lengths = [len(example.input_ids) for example in self.cell.examples]
        rows = batches(lengths, self.cell.recipe.batch_size, self.cell.seed, epoch=0)[:count]
        parts = [make_batch(self.cell.examples, each, self.cell.device) for each in rows]
        return [(batch, token_loss("fkl", self.target, batch)) for batch in parts]

    def moment(self, passes: int) -> dict:
        """`measure_moment` and `check_steps` of a draft distilled on all tokens for so long."""
        draft = self.models["base"]
        if passes:
            draft = self.distilled(Method("distillspec", epochs=passes))
        torch.manual_seed(self.cell.seed)
        losses = TokenLosses(self.load(draft), len(self.cell.tokenizer))
        vocab_size = len(self.cell.tokenizer)
        frozen = Frozen(self.load(self.models["reference"]), vocab_size)
        reference = ReferenceLoss(frozen, self.target, self.method.gap)
        squares = mean_squares(losses, self.training_parts(SQUARED))
        parts = self.training_parts(self.args.batches)
        inputs = (squares, self.target, reference, self.method)
        record = {"passes": passes, **measure_moment(losses, parts, self.held_out, *inputs)}
        inputs = (squares, SHARES[0] * self.method.lr, self.args.checked)
        record["check"] = check_steps(losses, parts[0], self.held_out[:STEPPED_ON], *inputs)
        return record

    def variant(self, divergence: str, choice: str) -> dict:
        """A draft trained on the tokens of a choice, evaluated."""
        args = self.args
        step = ChosenTokens(choice, self.held_out, args.refresh, args.sample)
        name = f"ceiling-{variant_name(args, divergence, choice)}"
        protocol = self.fingerprint
        method = replace(self.method, divergence=divergence, gap=divergence)
        draft = train_variant(self.cell, f"{name}-{protocol[:8]}", step, method, self.models)
        networks = (self.load(self.models["target"]), self.load(draft))
        summary = storage.read_json(Path(draft.path, "stage.json"))["summary"]
        counts = {key: summary[key] for key in ("steps", "loss_tokens", "seconds")}
        record = {"loss": divergence, "choice": choice}
        return record | evaluate_rows(self.cell, *networks) | counts


def study_protocol(args) -> dict:
    """The arguments that results hang on, but the seed and what `variant_name` says."""
    names = "pair task limit epochs k held_out eval_rows batches checked"
    return {name: getattr(args, name) for name in names.split()}


def variant_name(args, divergence: str, choice: str) -> str:
    """With how the gradient is formed that an oracle asks."""
    name = f"{choice}-{divergence}"
    return f"{name}-{args.refresh}-{args.sample}" if "oracle" in choice else name


def run_seed(args, seed: int) -> dict:
    """The records of a seed, those that are not there yet computed."""
    settings = Settings(
        data_dir=args.data_dir, out=args.out, limit=args.limit, epochs=args.epochs, target_seed=0,
        validation_rows=args.held_out, eval_prompts=args.eval_rows, dtype="float32",
        save_minutes=math.inf,  # a checkpoint lacks the oracle's state: a variant is run whole
    )  # fmt: skip
    cell = prepare_cell(args.pair, args.task, seed, settings, args.device)
    check_cell(cell, [Method("adaspec")])
    if len(cell.validation) < 2 * cell.rows_at_once:
        raise ValueError(
            f"--held-out {args.held_out}: only {len(cell.validation)} rows are there; the oracle "
            f"needs two batches of {cell.rows_at_once}"
        )
    study = Study(cell, args)
    records = {"moments": [], "variants": []}
    for divergence in args.losses:
        for choice in ("all", *args.choices):
            inputs = (divergence, choice)
            name = variant_name(args, *inputs)
            record = study.once(name, lambda inputs=inputs: study.variant(*inputs))
            records["variants"].append(record)
    for passes in args.moments if seed == args.seeds[0] else ():
        record = study.once(f"moment-{passes}", lambda passes=passes: study.moment(passes))
        records["moments"].append(record)
    return records


# What comes out, in words


def variant_table(variants: Sequence[dict]) -> list[str]:
    """A line a loss and choice: both acceptances, and the gain over all tokens, paired by seed."""
    by_choice = grouped(variants, "loss", "choice")
    lines = []
    for (loss, choice), rows in by_choice.items():
        cells = [loss, choice]
        for key in ("expected", "agree"):
            cells.append(f"{statistics.mean(row[key] for row in rows):.4f}")
            pairs = zip(rows, by_choice[loss, "all"], strict=True)
            gains = [row[key] - baseline[key] for row, baseline in pairs]
            cells.append("" if choice == "all" else interval(gains, 4))
        lines.append(" | ".join(cells))
    return grid("loss | tokens | expected, T = 1 | over all | agree, T = 0 | over all", lines)


def moment_table(moments: Sequence[dict]) -> list[str]:
    """A line a moment and score: its correlation with the effects, the effect of its top k relative
    to that of all tokens, the changes of A in real steps in points."""
    lines = []
    for record in moments:
        baseline = record["scores"]["all"]["effect"]
        for name, row in record["scores"].items():
            cells = [str(record["passes"]), name]
            cells += [f"{row['correlation']:.2f}" if "correlation" in row else ""]
            cells += [f"{row['effect'] / baseline:.2f}"]
            cells += [f"{100 * row[key]:+.3f}" for key in COLUMNS[1:]]
            lines.append(" | ".join(cells))
    return grid(" | ".join(["passes", "tokens", "correlation", *COLUMNS]), lines)


# The command line


def three_epochs(text: str) -> tuple[int, ...]:
    """The type of --epochs."""
    epochs = numbers(text)
    if len(epochs) != 3 or min(epochs) < 1:
        raise argparse.ArgumentTypeError(f"must be three numbers of at least 1, got {text!r}")
    return epochs


def parse_arguments(argv):
    parser = Parser(prog="extras.ceiling", description=__doc__)
    add = parser.add_argument
    add("--data-dir", type=folder, help="rows from <data-dir>/<task>/<split>.jsonl; else the Hub")
    add("--out", default="runs-ceiling", help="where stages and finished parts go")
    add("--seeds", type=numbers, default="0", help="comma-separated; the target has seed 0")
    scratch = [name for name, pair in PAIRS.items() if isinstance(pair.draft, dict)]
    add("--pair", type=one_of(scratch), default="tiny", help=f"of {', '.join(scratch)}")
    add("--task", type=one_of(TASKS), default="gsm8k", help=f"of {', '.join(TASKS)}")
    add("--limit", type=whole(), default=1000, help="training rows")
    add("--epochs", type=three_epochs, default="3,3,3", help="of target, reference, draft")
    add("--k", type=decimal(0, 1, above=True), default=0.4, help="fraction of tokens selected")
    add("--losses", type=some_of(DIVERGENCES), default="fkl,tvd", help="drafts are trained on")
    names = ",".join(CHOICES)
    add("--choices", type=some_of(CHOICES), default=names, help="of tokens to train on, beside all")
    help_ = "passes after which scores are judged, with the first seed"
    add("--moments", type=numbers, default="0,1,3,10", help=help_)
    add("--held-out", type=whole(), default=400, help="validation rows that the oracle knows")
    add("--eval-rows", type=whole(), default=600, help="test rows that drafts are evaluated on")
    add("--refresh", type=whole(), default=1, help="steps until the oracle's gradient is new")
    add("--sample", type=whole(), default=3, help="held-out batches that it is formed on")
    add("--batches", type=whole(), default=4, help="training batches that a moment looks at")
    add("--checked", type=whole(2), default=30, help="tokens with real steps, at a moment")
    measure.add_device_flag(parser)
    add("--json", help="write all figures to this file")
    return measure.parse(parser, argv)


def main(argv=None) -> None:
    args = parse_arguments(argv)
    quiet_libraries()
    records = {"moments": [], "variants": []}
    with storage.lock(Path(args.out)):
        for seed in args.seeds:
            for kind, rows in run_seed(args, seed).items():
                records[kind] += rows
    print("\n".join([*moment_table(records["moments"]), "", *variant_table(records["variants"])]))
    protocol = study_protocol(args) | {"refresh": args.refresh, "sample": args.sample}
    measure.save(args, {"protocol": protocol, "seeds": args.seeds, **records})


if __name__ == "__main__":
    run_command(main, "extras.ceiling")
