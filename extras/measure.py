"""What the benchmarks share: turns and ratios, clocks and memory, random models, prompts, and what
they save.

Contestants of a comparison take turns in one process, in an order that rotates, so that whatever
else slows the machine slows them all. A ratio is formed within each round of turns and reported
as the median over rounds, with the smallest and the largest.
"""

import argparse
import ctypes
import functools
import gc
import json
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, GPTNeoXConfig

import data
import storage
from cli import Parser, one_of, whole
from evaluate import clock
from own_rows import prompt_tokens
from settings import TINY_DRAFT, TINY_TARGET

PYTHIA_1_4B = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16}
PYTHIA_31M = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8}
SHAPES = {  # of models with random weights: the paper's pythia pair, and the one of our tiny preset
    "pythia": {"vocab_size": 50304, "target": PYTHIA_1_4B, "draft": PYTHIA_31M},
    "tiny": {"vocab_size": 512, "target": TINY_TARGET, "draft": TINY_DRAFT},
}

# Turns and ratios


def rotated(items, start: int) -> list:
    """The items in order, beginning with number `start`, then around."""
    items = list(items)
    start %= len(items)
    return items[start:] + items[:start]


def spread(values) -> dict:
    """Median, smallest and largest of what was measured in each round."""
    values = list(values)
    median = statistics.median(values)
    return {"median": median, "low": min(values), "high": max(values), "rounds": values}


def ratios(dividends, divisors) -> dict:
    """The `spread` of dividend / divisor, round by round."""
    return spread(a / b for a, b in zip(dividends, divisors, strict=True))


def brief(measured: dict, form: str = ".2f") -> str:
    """A `spread` in words: median (low to high)."""
    median, low, high = (format(measured[key], form) for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def timed(call: Callable, device) -> float:
    """Seconds that call() takes."""
    start = clock(device)
    call()
    return clock(device) - start


def interleaved(calls: dict, rounds: int, device, repeats: dict | None = None) -> dict:
    """Seconds of each call by round, in turn, after one warm-up call each; a turn is the mean of
    `repeats[name]` calls (1) in a row."""
    for call in calls.values():
        call()
    seconds = {name: [] for name in calls}
    for number in range(rounds):
        for name in rotated(calls, number):
            count = (repeats or {}).get(name, 1)
            seconds[name].append(sum(timed(calls[name], device) for _ in range(count)) / count)
    return seconds


# Clocks and memory


class Forwards:
    """How often a model's forward ran, and the seconds it took."""

    def __init__(self):
        self.calls = 0
        self.seconds = 0.0

    def clocked(self, model) -> Callable:
        """The model's forward with this clock around it. On a GPU it waits for every forward."""
        forward, device = model.forward, model.device

        @functools.wraps(forward)  # transformers looks at its signature
        def clocked(*args, **kwargs):
            start = clock(device)
            output = forward(*args, **kwargs)
            self.seconds += clock(device) - start
            self.calls += 1
            return output

        return clocked


@contextmanager
def counted(*models) -> Iterator[list[Forwards]]:
    """A clock around the forward of each model: a `Forwards` for each."""
    counts = [Forwards() for _ in models]
    for model, count in zip(models, counts, strict=True):
        model.forward = count.clocked(model)
    try:
        yield counts
    finally:
        for model in models:
            del model.forward


def peak_memory(call: Callable, device) -> int:
    """Bytes that call() needs at its peak, beyond what is there before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def status(field: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s*(\d+) kB", text)[1]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # what earlier work has freed would hide what this call takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


# Devices and models


def device(name: str) -> torch.device:
    """The type of --device: cpu, or cuda where there is a GPU."""
    name = one_of(("cpu", "cuda"))(name)
    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch finds no GPU for cuda; give cpu")
    return torch.device(name)


def add_device_flag(parser: Parser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default, help="cpu or cuda")


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def random_model(vocab_size: int, sizes: dict, dtype, device, seed: int) -> torch.nn.Module:
    """A GPT-NeoX with random weights; sizes as in SHAPES, all else as Pythia has it."""
    sizes = {**sizes, "intermediate_size": 4 * sizes["hidden_size"]}
    config = GPTNeoXConfig(vocab_size=vocab_size, max_position_embeddings=2048, **sizes)
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def random_pair(shapes: str, device) -> list[torch.nn.Module]:
    """A target and a draft of SHAPES with random weights, float32, in evaluation mode."""
    shape = SHAPES[shapes]
    return [
        random_model(shape["vocab_size"], shape[role], torch.float32, device, seed).eval()
        for seed, role in enumerate(("target", "draft"))
    ]


# Decoding: prompts, and transformers set up for a comparison


def add_decoding_flags(parser: Parser) -> None:
    """The flags that the benchmarks of decoding have in common."""
    add = parser.add_argument
    add("--prompts", help='JSON lines with a "prompt" each; without it rows of the offline task')
    add("--data-dir", help="prompts from <data-dir>/gsm8k/test.jsonl")
    add("--chat", action="store_true", help="put prompts into the tokenizer's chat template")
    add("--batch", type=whole(), default=8, help="number of prompts")
    add("--gamma", type=whole(), default=5, help="tokens drafted a round")
    add("--max-new-tokens", type=whole(), default=64, help="limit of a response")


def load_prompts(args, tokenizer, device) -> tuple[list[torch.Tensor], str]:
    """The first --batch prompts, token ids [1, T] each, and where they come from, in words."""
    if args.prompts:
        texts = data.read_prompts(args.prompts)[: args.batch]
        source = Path(args.prompts).name
    else:
        task = "gsm8k" if args.data_dir else "arithmetic"
        rows = data.load_rows(task, "test", args.data_dir, args.batch)
        texts = [data.TASKS[task].prompt(row) for row in rows]
        source = f"{task} test"
    # `args.chat` says from here on whether a turn's end ends a response
    args.chat = args.chat or any(not isinstance(text, str) for text in texts)
    if args.chat:
        source += ", chat template"
    token_ids = [prompt_tokens(text, tokenizer, args.chat) for text in texts]
    return [torch.tensor([ids], dtype=torch.long, device=device) for ids in token_ids], source


def random_prompts(args, model) -> list[torch.Tensor]:
    """As many prompts of 64 random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (args.batch, 1, 64), generator=generator)
    return list(ids.to(model.device))


def make_greedy(target, drafts, ends: list[int], limit: int, gamma: int) -> None:
    """Have transformers decode plainly and greedily, with gamma drafts a round whatever happens."""
    plain = {"max_new_tokens": limit, "do_sample": False}
    plain |= {"eos_token_id": ends or None, "pad_token_id": ends[0] if ends else 0}
    target.generation_config = GenerationConfig(**plain)
    for draft in drafts:
        draft.generation_config = GenerationConfig(
            **plain,
            num_assistant_tokens=gamma,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )


# The command line and what is saved


def add_result_flags(parser: Parser, rounds: int) -> None:
    add = parser.add_argument
    add("--rounds", type=whole(), default=rounds, help="rounds of turns that ratios are formed in")
    add("--json", help="write all figures to this file")


def parse(parser: Parser, argv: list[str] | None):
    """The arguments, with `command`: the command line as `save` saves it.

    Raises OSError where --json cannot be written, now and not after an hour of measuring.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.command = portable(shlex.join(["python", "-m", parser.prog, *argv]))
    if getattr(args, "json", None):
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        open(args.json, "ab").close()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return args


def portable(command: str) -> str:
    """A command without the folders of the machine it ran on: of absolute paths the last part."""
    words = [word.rstrip("/") for word in shlex.split(command)]
    return shlex.join(re.sub(r"^(-*[\w-]+=)?/(.*/)?", r"\1", word) for word in words)


def save(args, result: dict) -> None:
    """Write a result to --json, if that is given, with the command, the machine and the commit."""
    if not args.json:
        return
    machine = {"name": storage.machine(), "threads": torch.get_num_threads(), **storage.versions()}
    record = {"command": args.command, "machine": machine, "git": storage.git_commit()}
    text = json.dumps(record | result, indent=1) + "\n"
    storage.write_file(Path(args.json), lambda file: file.write(text.encode()))
