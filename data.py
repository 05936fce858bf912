"""The five tasks of the paper and an offline one: load, prompt, tokenise, mask, batch.

`TASKS` is the one place that says where rows come from and what prompt and response are made of them. Rows come from the
Hugging Face Hub or, with `data_dir`, from `data_dir/<task>/<split>.jsonl` with the same column names. The tokens that bear
loss are exactly the response and the end token: prompt and response are tokenised apart, so no BPE merge crosses the border.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

__all__ = ["TASKS", "Example", "batches", "collate", "encode", "encode_once", "load_rows", "train_tokenizer", "write_file"]

HELD_OUT = 500  # rows (at most a tenth) carved off the end of train for each split that a source does not have


@dataclass(frozen=True)
class Task:
    """Where a task's rows come from and how one becomes a prompt and a response."""

    columns: tuple[str, ...]  # the columns used, all of them text
    prompt: Callable[[dict], str]
    response: Callable[[dict], str]
    hub: tuple[str, ...] = ()  # load_dataset's path and configuration; () = local files only
    revision: str | None = None
    lists: tuple[str, ...] = ()  # but for these, which are lists of text
    missing: tuple[str, ...] = ()  # splits that the Hub does not have
    document: str | None = None  # the column that is cut at its end where a prompt would leave no room for the response


def _gsm8k_prompt(row: dict) -> str:
    return f"{row['question']}\nAnswer the above question. First think step by step and then answer the final number.\n"


def _gsm8k_response(row: dict) -> str:
    return row["answer"].replace("####", "The final answer is: ")


def _alpaca_prompt(row: dict) -> str:
    context = f"\n\n### Input:\n{row['input']}" if row["input"] else ""
    return f"### Instruction:\n{row['instruction']}{context}\n\n### Response:\n"


def _mbpp_prompt(row: dict) -> str:
    tests = "\n".join(row["test_list"])
    return f"{row['text']}\nYour code should satisfy these tests:\n{tests}\n"


TASKS: dict[str, Task] = {
    "gsm8k": Task(
        ("question", "answer"), _gsm8k_prompt, _gsm8k_response, hub=("openai/gsm8k", "main"), missing=("validation",)
    ),
    "alpaca": Task(
        ("instruction", "input", "output"),
        _alpaca_prompt,
        lambda row: row["output"],
        hub=("tatsu-lab/alpaca",),
        missing=("validation", "test"),
    ),
    "mbpp": Task(
        ("text", "code", "test_list"),
        _mbpp_prompt,
        lambda row: row["code"].replace("\r\n", "\n"),
        hub=("google-research-datasets/mbpp", "full"),
        lists=("test_list",),
    ),
    "cnn_dailymail": Task(
        ("article", "highlights"),
        lambda row: f"{row['article']}\nSummarize the above article:\n",
        lambda row: row["highlights"],
        hub=("abisee/cnn_dailymail", "3.0.0"),
        document="article",
    ),
    "xsum": Task(
        ("document", "summary"),
        lambda row: f"{row['document']}\nSummarize the above article in one sentence:\n",
        lambda row: row["summary"],
        hub=("EdinburghNLP/xsum",),
        revision="refs/convert/parquet",  # the main branch may hold a loading script, which datasets no longer runs
        document="document",
    ),
    "arithmetic": Task(("question", "answer"), _gsm8k_prompt, _gsm8k_response),  # made by arithmetic_rows below
    "custom": Task(("prompt", "response"), lambda row: row["prompt"], lambda row: row["response"]),  # needs a data_dir
}


def load_rows(task: str, split: str, data_dir: str | Path | None = None, limit: int | None = None) -> list[dict]:
    """The first `limit` rows of a split (train, validation or test), from the Hub or from `data_dir/<task>/<split>.jsonl`.

    A validation or test split that the source lacks is carved off the end of train, and train then ends before it.
    Raises ValueError for an unknown task or split, an empty file, and, naming file and line, for what is not JSON, lacks an
    expected column or has one of another type; FileNotFoundError where `data_dir` lacks the file.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}, expected one of {', '.join(TASKS)}")
    if split not in ("train", "validation", "test"):
        raise ValueError(f"unknown split {split!r}, expected train, validation or test")
    spec = TASKS[task]
    if task == "arithmetic":
        return arithmetic_rows(split)[:limit]
    if not data_dir and not spec.hub:
        raise ValueError(f"task {task!r} has no rows on the Hub: give --data-dir with {task}/train.jsonl in it")

    def exists(name: str) -> bool:
        return Path(data_dir, task, f"{name}.jsonl").is_file() if data_dir else name not in spec.missing

    carved = [name for name in ("validation", "test") if not exists(name)]
    if split != "train" and split not in carved:
        return _read(task, spec, split, data_dir, limit)
    rows = _read(task, spec, "train", data_dir)
    size = min(HELD_OUT, len(rows) // 10)
    ends = [len(rows) - size * (len(carved) - i) for i in range(len(carved) + 1)]
    if split != "train" and not size:
        raise ValueError(f"{task} has no {split} rows, and {len(rows)} train rows are too few to hold a tenth of them out")
    if split == "train":
        return rows[: ends[0]][:limit]
    start = ends[carved.index(split)]
    return rows[start : start + size][:limit]


def _read(task: str, spec: Task, split: str, data_dir: str | Path | None, limit: int | None = None) -> list[dict]:
    if data_dir:
        where = Path(data_dir, task, f"{split}.jsonl")
        if not where.is_file():
            raise FileNotFoundError(f"{where} does not exist; --data-dir must hold <task>/train.jsonl (one JSON row a line)")
        rows = list(itertools.islice(_json_lines(where, spec), limit))
    else:
        where = f"{'/'.join(spec.hub)} on the Hugging Face Hub"
        try:
            table = datasets.load_dataset(*spec.hub, split=split, revision=spec.revision)
        except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
            cause = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"cannot load the {split} rows of {task} from {where}: {cause}") from error
        table = table.select(range(min(limit or len(table), len(table))))
        rows = [_checked(row, spec, f"{where}, {split} row {number}") for number, row in enumerate(table, 1)]
    if not rows:
        raise ValueError(f"{where} is empty; it must hold one JSON row a line")
    return rows


def _json_lines(path: Path, spec: Task):
    """The rows of a file, one by one; blank lines are passed over."""
    with open(path, "rb") as file:  # as text it would also end lines inside a row, at a carriage return
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line.decode("utf-8-sig")) if line.strip() else None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({getattr(error, 'msg', error)})") from error
            if line.strip():
                yield _checked(row, spec, f"{path}, line {number}")


def _checked(row, spec: Task, where: str) -> dict:
    """The columns that the task uses of a row. Raises ValueError where one is missing or not of its type."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a JSON object with the columns {', '.join(spec.columns)}, got {row!r:.60}")
    for name in spec.columns:
        if name not in row:
            raise ValueError(f"{where}: no column {name!r} (found {', '.join(map(repr, row)):.200})")
        texts, kind = (row[name], "a list of texts") if name in spec.lists else ([row[name]], "text")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}: {name} must be {kind}, got {row[name]!r:.60}")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:  # JSON can say one, and no tokenizer takes it
            raise ValueError(f"{where}: {name} holds half of a surrogate pair, {texts!r:.60}") from error
    return {name: row[name] for name in spec.columns}


_NAMES = "Anna Ben Carla David Elena Felix Grace Hugo Irene Jonas Karim Lena Marta Nadia Omar Paula".split()
_THINGS = "apples books cards coins eggs marbles oranges pencils shells stamps stickers tickets".split()
_SIZES = {"train": 4000, "validation": 300, "test": 300}


def arithmetic_rows(split: str) -> list[dict]:
    """Seeded two-step word problems with worked answers in GSM8K's row format; no question is in two splits."""
    rng = random.Random(20251019)
    rows: dict[str, str] = {}
    while len(rows) < sum(_SIZES.values()):
        name, friend = rng.sample(_NAMES, 2)
        thing = rng.choice(_THINGS)
        a, b, c = rng.randint(12, 60), rng.randint(11, 40), rng.randint(2, 9)
        # a story and its two steps (left, operator, right, what the result is); `it` stands for the first result
        story, first, second = rng.choice(
            [
                (
                    f"{name} has {a} {thing}. {friend} gives {name} {b} more, and then {name} loses {c} of them.",
                    (a, "+", b, f"{thing} after the gift"),
                    ("it", "-", c, "left"),
                ),
                (
                    f"{name} fills {c} boxes with {b} {thing} each and already had {a} {thing}.",
                    (c, "*", b, f"{thing} in the boxes"),
                    ("it", "+", a, "in all"),
                ),
                (
                    f"{name} collects {a} {thing} every day for {c} days and gives {b // 2} of them to {friend}.",
                    (a, "*", c, f"{thing} in {c} days"),
                    ("it", "-", b // 2, "left"),
                ),
                (
                    f"{name} has {a} {thing} and {friend} has {b} more than {name}.",
                    (a, "+", b, f"{thing} for {friend}"),
                    ("it", "+", a, "together"),
                ),
            ]
        )
        lines, it = [], 0
        for left, op, right, what in (first, second):
            left = it if left == "it" else left
            it = {"+": left + right, "-": left - right, "*": left * right}[op]
            lines.append(f"There are {left}{op}{right} = <<{left}{op}{right}={it}>>{it} {what}.")
        rows[f"{story} How many {thing} are there now?"] = "\n".join([*lines, f"#### {it}"])
    pairs = [{"question": question, "answer": answer} for question, answer in rows.items()]
    names = list(_SIZES)
    start = sum(_SIZES[name] for name in names[: names.index(split)])
    return pairs[start : start + _SIZES[split]]


class Example(NamedTuple):
    """One tokenised row: `input_ids` [T] int32, of which the first `prompt_length` bear no loss."""

    input_ids: np.ndarray
    prompt_length: int


def encode(task: str, rows: Sequence[dict], tokenizer, max_length: int = 512) -> tuple[list[Example], int]:
    """Tokenise rows as prompt + response + end token, cut to `max_length` tokens; returns (examples, rows dropped).

    A summarisation document is cut at its end so that a quarter of `max_length` is left for the response (whatever the
    response is: at test time it is unknown). A row is dropped, and counted, where its prompt or response is empty or where the
    prompt leaves no room for a single response token. Raises ValueError for a tokenizer without an end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token (eos_token): set one, or the draft never learns to stop")
    spec, examples = TASKS[task], []
    if not rows:
        return [], 0
    responses = [spec.response(row) for row in rows]
    response_ids = tokenizer(responses, add_special_tokens=False)["input_ids"]
    prompt_ids = _prompt_ids(tokenizer, [spec.prompt(row) for row in rows])
    for row, prompt, text, response in zip(rows, prompt_ids, responses, response_ids, strict=True):
        excess = len(prompt) - (max_length - max_length // 4)
        if spec.document and excess > 0:
            shorter = row | {spec.document: _cut(tokenizer, row[spec.document], excess)}
            prompt = _prompt_ids(tokenizer, [spec.prompt(shorter)])[0]
        if prompt and text.strip() and len(prompt) < max_length:
            ids = np.array([*prompt, *response, tokenizer.eos_token_id][:max_length], dtype=np.int32)
            examples.append(Example(ids, len(prompt)))
    return examples, len(rows) - len(examples)


def _prompt_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """Tokens with the start token, where the tokenizer puts one, and without the end token that some put."""
    ends = [tokenizer.eos_token_id]
    return [ids[:-1] if ids[-1:] == ends else ids for ids in tokenizer(texts)["input_ids"]]


def _cut(tokenizer, text: str, excess: int) -> str:
    """The text without its last `excess` tokens (all of it gone where it has no more)."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text[: offsets[-excess][0]] if excess < len(offsets) else ""


def digest(examples: Sequence[Example]) -> str:
    """A fingerprint of the tokenised rows: 16 hexadecimal digits."""
    sha = hashlib.sha256()
    for example in examples:
        sha.update(np.int32([example.prompt_length, len(example.input_ids)]).tobytes() + example.input_ids.tobytes())
    return sha.hexdigest()[:16]


def encode_once(folder: Path, task: str, rows: Sequence[dict], tokenizer, max_length: int = 512) -> tuple[list[Example], int]:
    """`encode`, from a file in `folder` if these texts were tokenised before in the same way.

    A file that does not hold what was written into it is reported (in a warning) and made again.
    """
    spec, key = TASKS[task], hashlib.sha256()
    for text in (tokenizer.backend_tokenizer.to_str(), str((task, max_length, tokenizer.eos_token_id))):
        key.update(text.encode() + b"\0")
    for row in rows:
        key.update(spec.prompt(row).encode() + b"\0" + spec.response(row).encode() + b"\0")
    path = Path(folder, f"{key.hexdigest()[:32]}.tokens")
    found = read_examples(path)
    if found is None:
        found = encode(task, rows, tokenizer, max_length)
        write_examples(path, *found)
    return found


def write_examples(path: Path, examples: Sequence[Example], dropped: int = 0) -> None:
    """Keep examples in a file: a SHA-256 checksum, and int32 numbers: dropped, count, lengths, prompt lengths, token ids."""
    lengths, prompt_lengths = [len(e.input_ids) for e in examples], [e.prompt_length for e in examples]
    numbers = np.concatenate([[dropped, len(examples)], lengths, prompt_lengths, *(e.input_ids for e in examples)])
    content = numbers.astype(np.int32).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda file: file.write(hashlib.sha256(content).digest() + content))


def read_examples(path: Path) -> tuple[list[Example], int] | None:
    """What `write_examples` wrote, (examples, dropped); None where there is no such file or, with a warning, a damaged one."""
    if not path.is_file():
        return None
    content = bytearray(path.read_bytes())  # writable, as torch wants its arrays
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        warnings.warn(f"{path} is damaged: tokenising anew", stacklevel=2)
        return None
    dropped, count, *_ = numbers = np.frombuffer(content, np.int32, offset=32)
    lengths, prompt_lengths = numbers[2 : 2 + 2 * count].reshape(2, count)
    ids = np.split(numbers[2 + 2 * count :], np.cumsum(lengths)[:-1]) if count else []
    return [Example(*pair) for pair in zip(ids, prompt_lengths.tolist(), strict=True)], int(dropped)


def write_file(path: Path, write: Callable) -> None:
    """write(file) into a new file, which takes the name `path` once it is whole and on the disk.

    Raises OSError where that fails, as on a full disk; what was at `path` is then still there.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(partial):
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


@contextmanager
def writing(path: Path):
    """Whatever writing the file or folder `path` fails with becomes an OSError that says so, and the rest of it is removed."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors have their own for a full disk
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(f"cannot write {path}: {error} ({free:,.0f} MiB free there)") from error


def collate(examples: Sequence[Example], multiple: int = 32) -> tuple[Tensor, Tensor]:
    """Right-padded `input_ids` [B, T] and `labels` [B, T] (-100 on prompt and padding), int64, T a multiple of `multiple`.

    No attention mask: causal attention never looks right, and padding bears no loss. Few shapes mean few kernels to compile.
    """
    length = -(-max(len(e.input_ids) for e in examples) // multiple) * multiple
    input_ids = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full_like(input_ids, -100)
    for i, (ids, start) in enumerate(examples):
        input_ids[i, : len(ids)] = torch.from_numpy(ids)
        labels[i, start : len(ids)] = input_ids[i, start : len(ids)]
    return input_ids, labels


def batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int, ranks: int = 1) -> list[list[int]]:
    """One epoch's batches of row indices, each row once: seeded, of similar lengths inside a batch, in random order.

    The rows are dealt to ceil(N / batch_size) batches whose sizes differ by at most one, so that no stray last batch of two
    rows takes an optimiser step of its own; to one batch less where they would have fewer rows than there are ranks.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    window = 50 * batch_size  # sort by length only inside windows, so that batches differ from epoch to epoch
    order = np.concatenate(
        [w[np.argsort(-np.asarray(lengths)[w], kind="stable")] for w in np.split(order, range(window, len(order), window))]
    )
    count = -(-len(order) // batch_size)
    groups = np.array_split(order, count if len(order) // count >= ranks else max(count - 1, 1))
    return [groups[i].tolist() for i in rng.permutation(len(groups))]


def train_tokenizer(texts: Sequence[str], vocab_size: int):
    """A byte-level BPE tokenizer trained on `texts`, with <|endoftext|> as its end token (for pairs trained from scratch)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False)
