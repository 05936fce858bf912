"""Make a draft of some of the target's own decoder layers, untrained, with its tokenizer.

python -m extras.drop_layers --target T --out DIR --first 2             # layers 0, 1
python -m extras.drop_layers --target T --out DIR --first 1 --last 1    # the first and the last
python -m extras.drop_layers --target T --out DIR --every 3             # layers 0, 3, 6, ...
"""

from pathlib import Path

import models
from cli import Parser, run_command, whole
from extras import measure


def chosen_layers(count: int, first: int, last: int, every: int | None) -> list[int]:
    """The indices of the layers to keep, of `count`."""
    if every:
        return [*range(0, count, every)]
    return [*range(first), *range(count - last, count)]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="extras.drop_layers", description=__doc__)
    add = parser.add_argument
    add("--target", required=True, help="folder or Hub id of the target")
    add("--out", required=True, help="new folder for the draft, which from_pretrained loads")
    add("--first", type=whole(0), default=0, help="how many of the first layers to keep")
    add("--last", type=whole(0), default=0, help="how many of the last layers to keep")
    add("--every", type=whole(), help="N: keep layers 0, N, 2N and so on")
    args = measure.parse(parser, argv)
    if bool(args.every) == bool(args.first + args.last):
        parser.error("give --first, --last or both, or else --every")
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: --out must be a new or empty folder")
    skeleton = models.check_model(args.target)
    count = getattr(skeleton.config, "num_hidden_layers", 0)
    indices = chosen_layers(count, args.first, args.last, args.every)
    models.keep_layers(skeleton, indices)  # what it refuses, before weights are loaded
    tokenizer = models.load_tokenizer(args.target)
    model = models.load_model(args.target, "auto")
    parameters = model.num_parameters()
    models.keep_layers(model, indices).save_pretrained(out)
    tokenizer.save_pretrained(out)
    share = model.num_parameters() / parameters
    print(f"{out}: layers {', '.join(map(str, indices))} of {count}, {share:.0%} of the parameters")


if __name__ == "__main__":
    run_command(main, "extras.drop_layers")
