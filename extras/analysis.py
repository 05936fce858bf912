"""What a finished run can say beyond its table.

    python -m extras.analysis gap runs/tiny/arithmetic/seed0      # does the gap foretell learning?
    python -m extras.analysis picture runs/tiny/arithmetic/seed0 --json picture.json
    python -m extras.analysis cost runs/results.json              # predicted speed-up by gamma

`gap`: the rank correlation, over tokens of held-out rows, of AdaSPEC's gap before stage 2 with how
far the draft's loss then falls. `picture`: one response, token by token: which tokens are accepted
drafts, which does AdaSPEC select; `python -m extras.report figures ... --picture picture.json`
draws it. `cost`: tau by gamma, the draft's cost and the target's cost of scoring, as one table.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

import data
from adaspec import select_tokens, token_kl
from cli import Parser, one_of, run_command, whole
from costs import predicted_speedups, recommend
from models import load_model, load_tokenizer
from speculative import inference, speculative_generate
from tables import grid
from teacher import Frozen, ReferenceLoss
from train import DTYPES

# Gap correlation


def held_out_losses(model, target, examples, rows_at_once: int, vocab_size: int) -> np.ndarray:
    """KL(p || q) of the model q from the target p at every response token of the examples, [N]."""
    device = target.device
    model = ReferenceLoss(Frozen(model, vocab_size), Frozen(target, vocab_size), "fkl")
    losses = []
    for start in range(0, len(examples), rows_at_once):
        rows = list(range(start, min(start + rows_at_once, len(examples))))
        losses.append(model.losses(data.make_batch(examples, rows, device)).cpu())
    return torch.cat(losses).numpy()


def gap_correlations(base: np.ndarray, reference: np.ndarray, draft: np.ndarray) -> dict:
    """Spearman's rank correlation of the gap (base - reference) with the fall of the loss
    (base - draft), and of the base's loss alone with that fall, since both contain it.

    Each argument: `held_out_losses` [N] of that model on the same tokens.
    """
    fall = base - draft
    return {
        "gap_correlation": rank_correlation(base - reference, fall),
        "loss_correlation": rank_correlation(base, fall),
    }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, of two arrays [N] of values that are nearly all different (ties are ranked by
    place)."""
    ranks = [np.argsort(np.argsort(values, kind="stable")) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


# Token pictures


def picture(target, base, reference, draft, prompt, tokenizer, k, gamma, max_new_tokens) -> dict:
    """A response as speculative decoding at temperature 0 writes it after `prompt` [T], token by
    token: its origin ("accepted": a draft; "corrected": the target's, after a rejection; "bonus":
    the target's, after drafts that were all accepted), its gap KL(p || q_base) - KL(p || q_ref),
    which stage 2 starts from, and whether that is in the top k."""
    origins = []

    def note_origins(row, tokens, accepted):
        drafted = min(gamma, max_new_tokens - len(origins) - 1)
        last = "corrected" if accepted < drafted else "bonus"
        origins.extend(["accepted"] * accepted + [last] * (len(tokens) - accepted))

    prompt = prompt.to(target.device)[None]
    text = speculative_generate(
        target,
        draft,
        prompt,
        max_new_tokens=max_new_tokens,
        gamma=gamma,
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=len(tokenizer),
        on_tokens=note_origins,
    ).sequences
    length = prompt.shape[1]
    with inference(target, base, reference):
        p, q_base, q_reference = (
            model(text).logits[0, length - 1 : -1, : len(tokenizer)]
            for model in (target, base, reference)
        )
        gap = token_kl(p, q_base) - token_kl(p, q_reference)
        selected = select_tokens(gap, k)
    return {
        "gamma": gamma,
        "k": k,
        "tokens": [tokenizer.decode([token]) for token in text[0, length:].tolist()],
        "origins": origins,
        "gap": gap.tolist(),
        "selected": selected.tolist(),
    }


# Cost by gamma


def cost_table(rows: list[dict]) -> str:
    """Predicted speed-up by gamma and the best gamma, a line a row that has the costs."""
    rows = [row for row in rows if predicted_speedups(row)]
    if not rows:
        raise ValueError("no row has tau_by_gamma and costs: they are measured with timed prompts")
    columns = ["task", "pair", "seed", "T", "draft", "c"]
    columns += [f"gamma {gamma}" for gamma in rows[0]["tau_by_gamma"]]
    lines = []
    for row in rows:
        speedups = predicted_speedups(row)
        cells = [row["task"], row["pair"], str(row["seed"]), f"{row['temperature']:g}"]
        cells += [row["draft"], f"{row['cost_ratio']:.3f}"]
        cells += [f"{speedup:.2f}" for speedup in speedups.values()]
        cells.append(str(recommend(speedups)))
        lines.append(" | ".join(cells))
    return "\n".join(grid(" | ".join([*columns, "best gamma"]), lines))


# Models of a finished cell


class FinishedCell:
    """The models of a cell `runs/<pair>/<task>/seed<n>`, by what its stage.json files say.

    `target` and `base` name pretrained models, which are no stages of the run.
    """

    def __init__(self, folder, target=None, base=None):
        self.folder = Path(folder)
        self.task = self.folder.parent.name
        self.pretrained = {"target": target, "base": base}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.stages = {}  # folder -> stage.json; a target that seeds share is in another's folder
        for path in sorted(self.folder.parent.glob("seed*/*/stage.json")):
            self.stages[path.parent] = json.loads(path.read_text())
        if not self.drafts():
            raise ValueError(f"{folder} has no AdaSPEC draft: give runs/<pair>/<task>/seed<n>")
        self.dtype = DTYPES[self.stages[self.drafts()[0]]["settings"]["dtype"]]

    def drafts(self) -> list[Path]:
        """The folders of the AdaSPEC drafts."""
        own = [folder for folder in self.stages if folder.parent == self.folder]
        return [folder for folder in own if "reference" in self.stages[folder]["settings"]]

    def find(self, role: str, draft: Path) -> str:
        """The folder of an AdaSPEC draft's "target", "base" or "reference"."""
        fingerprint = self.stages[draft]["settings"]["init" if role == "base" else role]
        for folder, record in self.stages.items():
            if record["fingerprint"] == fingerprint:
                return str(folder)
        if not self.pretrained.get(role):
            raise ValueError(f"the {role} of {draft} is no stage of the run: name it by --{role}")
        return self.pretrained[role]

    def load(self, path):
        return load_model(str(path), self.dtype, self.device)

    def held_out(self, tokenizer, split, count, data_dir=None, max_length=512) -> list:
        """The first rows of a split of the cell's task (of each part of a mixed one)."""
        examples = []
        for task in self.task.split("+"):
            rows = data.load_rows(task, split, data_dir, count)
            examples += data.encode(task, rows, tokenizer, max_length)[0]
        return examples


def cell_correlations(cell: FinishedCell, examples, vocab_size: int, rows_at_once=16) -> dict:
    """`gap_correlations` of every AdaSPEC draft of a cell, by its folder."""
    losses = {}  # (target, model) -> its held-out losses
    correlations = {}
    for draft in cell.drafts():
        target_path = cell.find("target", draft)
        target = cell.load(target_path)
        paths = [cell.find("base", draft), cell.find("reference", draft), str(draft)]
        keys = [(target_path, path) for path in paths]
        for key in keys:
            if key not in losses:
                model = cell.load(key[1])
                losses[key] = held_out_losses(model, target, examples, rows_at_once, vocab_size)
        correlations[draft] = gap_correlations(*(losses[key] for key in keys))
    return correlations


# The command line


def gap_command(args) -> None:
    cell = FinishedCell(args.cell, args.target, args.base)
    tokenizer = load_tokenizer(str(cell.drafts()[0]))
    examples = cell.held_out(tokenizer, args.split, args.prompts, args.data_dir, args.max_length)
    lines = []
    for draft, values in cell_correlations(cell, examples, len(tokenizer), args.batch).items():
        correlations = [f"{value:.3f}" for value in values.values()]
        lines.append(" | ".join([draft.name, *correlations]))
    print("\n".join(grid("draft | gap correlation | loss correlation", lines)))


def picture_command(args) -> None:
    cell = FinishedCell(args.cell, args.target, args.base)
    draft = cell.folder / args.draft
    if draft not in cell.drafts():
        names = ", ".join(path.name for path in cell.drafts())
        raise ValueError(f"{args.cell} has no AdaSPEC draft {args.draft}; it has {names}")
    tokenizer = load_tokenizer(str(draft))
    examples = cell.held_out(tokenizer, args.split, args.prompt, args.data_dir, args.max_length)
    paths = [cell.find(role, draft) for role in ("target", "base", "reference")]
    models = [cell.load(path) for path in [*paths, draft]]
    k = cell.stages[draft]["settings"]["k"]
    prompt = data.prompt_ids(examples[-1])
    record = {"pair": cell.folder.parents[1].name, "task": cell.task}
    record |= {"seed": int(cell.folder.name.removeprefix("seed")), "split": args.split}
    record |= {"prompt": args.prompt, "draft": args.draft}
    record |= picture(*models, prompt, tokenizer, k, args.gamma, args.max_new_tokens)
    Path(args.json).write_text(json.dumps(record))
    accepted = record["origins"].count("accepted")
    print(f"{args.json}: {accepted} of {len(record['tokens'])} tokens are accepted drafts")


def cost_command(args) -> None:
    print(cost_table(json.loads(Path(args.results).read_text())["rows"]))


def parse_arguments(argv):
    parser = Parser(prog="extras.analysis", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    gap = commands.add_parser("gap", help="does AdaSPEC's gap foretell which tokens are learned?")
    gap.add_argument("--prompts", type=whole(), default=200, help="held-out rows")
    gap.add_argument("--batch", type=whole(), default=16, help="rows of a forward")
    gap.set_defaults(run=gap_command)
    tokens = commands.add_parser("picture", help="a response, token by token")
    flag = tokens.add_argument
    flag("--json", required=True, help="the file to write")
    flag("--draft", default="adaspec", help="folder of the AdaSPEC draft")
    flag("--prompt", type=whole(), default=1, help="number of the held-out row")
    flag("--gamma", type=whole(), default=5, help="tokens drafted a round")
    flag("--max-new-tokens", type=whole(2), default=64, help="of the response")
    tokens.set_defaults(run=picture_command)
    for command in (gap, tokens):
        flag = command.add_argument
        flag("cell", help="runs/<pair>/<task>/seed<n>")
        flag("--data-dir", help="rows from <data-dir>/<task>/<split>.jsonl instead of the Hub")
        flag("--split", type=one_of(["validation", "test"]), default="test", help="of the rows")
        flag("--max-length", type=whole(2), default=512, help="tokens of a row")
        flag("--target", help="a target that is pretrained, not trained by the run")
        flag("--base", help="a base draft that is pretrained, not trained by the run")
    cost = commands.add_parser("cost", help="predicted speed-up by gamma")
    cost.add_argument("results", help="results.json of a run")
    cost.set_defaults(run=cost_command)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_arguments(argv)
    transformers.logging.disable_progress_bar()
    args.run(args)


if __name__ == "__main__":
    run_command(main, "extras.analysis")
