"""Make a draft of the target's own first and last decoder layers, untrained, with its tokenizer.

python -m extras.drop_layers --target DIR --out DIR --first 3 --last 3
"""

from pathlib import Path

import torch

import models
from cli import Parser, run_command
from extras import measure


def drop_layers(model, first: int, last: int):
    """Keep only the first and the last decoder layers of a model, in place; returns it.

    Raises ValueError where that leaves no layer or asks for more than there are.
    """
    config, base = model.config, model.base_model
    count = config.num_hidden_layers  # of CodeGen too: an alias of its n_layer
    if first < 0 or last < 0 or not 1 <= first + last <= count:
        raise ValueError(
            f"first {first} + last {last} layers: must be at least 1, at most the model's {count}"
        )
    indices = [*range(first), *range(count - last, count)]
    names = [
        name
        for name, module in base.named_children()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    if len(names) != 1:
        raise ValueError(
            f"{type(model).__name__}: expected one list of {count} decoder layers, got {len(names)}"
        )
    layers = torch.nn.ModuleList(getattr(base, names[0])[i] for i in indices)
    setattr(base, names[0], layers)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # its place in a cache
    for setting, value in list(vars(config).items()):
        is_by_layer = isinstance(value, (list, tuple)) and len(value) == count
        if "layer" in setting and is_by_layer:  # such as layer_types
            vars(config)[setting] = [value[i] for i in indices]
    config.num_hidden_layers = len(indices)
    return model


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="extras.drop_layers", description=__doc__)
    add = parser.add_argument
    add("--target", required=True, help="folder of the target")
    add("--out", required=True, help="new folder for the draft, which from_pretrained loads")
    add("--first", type=int, required=True, help="how many of the first layers to keep")
    add("--last", type=int, required=True, help="how many of the last layers to keep")
    args = measure.parse(parser, argv)
    source, out = Path(args.target), Path(args.out)
    if not source.is_dir():
        raise ValueError(f"--target {source}: no such folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: --out must be a new or empty folder")
    models.check_model(source)
    model = models.load_model(source, "auto", "cpu")
    layers, parameters = model.config.num_hidden_layers, model.num_parameters()
    drop_layers(model, args.first, args.last).save_pretrained(out)
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if any((source / name).is_file() for name in files):
        models.load_tokenizer(source).save_pretrained(out)
    share = model.num_parameters() / parameters
    count = model.config.num_hidden_layers
    print(f"{out}: {count} of {layers} layers, {share:.0%} of the parameters")


if __name__ == "__main__":
    run_command(main, "extras.drop_layers")
