"""The five tasks of the paper, an offline one and your own: load, prompt, tokenise, mask, batch.

`TASKS` is the one place that says where rows come from and what prompt and response are made of
them. Rows come from the Hugging Face Hub or, with `data_dir`, from
`data_dir/<task>/<split>.jsonl` with the same column names. The tokens that bear loss are exactly
the response and the end token: prompt and response are tokenised apart, so no BPE merge crosses
the border. Rows of your own (task "custom") have forms of their own: own_rows.py.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor

from adaspec import response_positions
from arithmetic import arithmetic_rows
from hub import check_hub, loading
from own_rows import (
    OwnRow,
    RowTokens,
    chat_tokens,
    check_responses,
    check_text,
    own_row,
    prompt_tokens,
    text_tokens,
)
from storage import fingerprint, is_whole, write_checked

HELD_OUT = 500  # rows (a tenth at most) carved off train's end for each split that is missing


@dataclass(frozen=True)
class Task:
    """Where a task's rows come from and how one becomes a prompt and a response."""

    columns: tuple[str, ...]  # the columns used, all of them text; () = rows of one's own
    prompt: Callable[[dict], str]
    response: Callable[[dict], str]
    hub: tuple[str, ...] = ()  # load_dataset's path and configuration; () = local files only
    revision: str | None = None
    lists: tuple[str, ...] = ()  # columns that are lists of text, not text
    missing: tuple[str, ...] = ()  # splits that the Hub does not have
    document: str | None = None  # the column that is cut where the prompt leaves no room to respond


def _gsm8k_prompt(row: dict) -> str:
    instruction = "First think step by step and then answer the final number."
    return f"{row['question']}\nAnswer the above question. {instruction}\n"


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
        ("question", "answer"),
        _gsm8k_prompt,
        _gsm8k_response,
        hub=("openai/gsm8k", "main"),
        missing=("validation",),
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
        revision="refs/convert/parquet",  # main may hold a loading script: datasets runs none
        document="document",
    ),
    # offline: made by arithmetic.py
    "arithmetic": Task(("question", "answer"), _gsm8k_prompt, _gsm8k_response),
    # your own: needs a data_dir or a dataset
    "custom": Task((), lambda row: row["prompt"], lambda row: row["response"]),
}


def load_rows(
    task: str,
    split: str,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    dataset: str | None = None,
) -> list[dict] | list[OwnRow]:
    """The first `limit` rows of a split (train, validation or test), from the Hub or from
    `data_dir/<task>/<split>.jsonl`; of task custom also from `dataset`, whatever
    `datasets.load_dataset` opens (NAME or NAME:CONFIGURATION).

    A validation or test split that the source lacks is carved off the end of train, and train then
    ends before it. Raises ValueError for an unknown task or split, an empty file, and, naming file
    and line, for what is not JSON, lacks an expected column or has one of another type;
    FileNotFoundError where `data_dir` lacks the file.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}, expected one of {', '.join(TASKS)}")
    if split not in ("train", "validation", "test"):
        raise ValueError(f"unknown split {split!r}, expected train, validation or test")
    if task == "arithmetic":
        return arithmetic_rows(split)[:limit]
    spec = TASKS[task]
    if task == "custom" and dataset:
        spec, data_dir = dataset_task(dataset), None
    if not data_dir and not spec.hub:
        raise ValueError(
            f"task {task!r} has no rows on the Hub: give --data-dir with {task}/train.jsonl in it, "
            "or --dataset"
        )
    folder, missing = None, spec.missing
    if data_dir:
        folder = Path(data_dir, task)
        missing = [s for s in ("validation", "test") if not (folder / f"{s}.jsonl").is_file()]
    if split != "train" and split not in missing:
        return _read(spec, split, folder, limit)

    rows = _read(spec, "train", folder, None if missing else limit)
    size = min(HELD_OUT, len(rows) // 10)
    if split != "train" and not size:
        raise ValueError(
            f"{task} has no {split} rows, and {len(rows)} train rows are too few to hold a tenth "
            "of them out"
        )
    end = len(rows) - size * len(missing)  # of train; the carved splits follow
    if split == "train":
        return rows[:end][:limit]
    start = end + size * missing.index(split)
    return rows[start : start + size][:limit]


def dataset_task(dataset: str) -> Task:
    """The task custom with the rows of a dataset. Raises ValueError where it cannot be opened or
    has no train split."""
    hub = tuple(dataset.split(":"))
    if not Path(hub[0]).exists():
        check_hub(hub[0], "dataset", "README.md")
    with loading(f"the dataset {dataset}"):
        splits = datasets.get_dataset_split_names(*hub)
    if "train" not in splits:
        raise ValueError(f"dataset {dataset} has no split train (found {', '.join(splits)})")
    missing = tuple(name for name in ("validation", "test") if name not in splits)
    return replace(TASKS["custom"], hub=hub, missing=missing)


def as_chats(task: str, rows: Sequence[dict], tokenizer, max_length: int) -> list[OwnRow]:
    """Rows as chats, each prompt the user's turn, for a target that was trained on chats; chats
    stay as they are. Documents are cut as `encode` cuts them."""
    spec = TASKS[task]
    chats = []
    for number, row in enumerate(rows, 1):
        prompt = spec.prompt(row)
        if spec.document:
            length = len(prompt_tokens(prompt.strip(), tokenizer, chat=True))
            prompt = spec.prompt(_cut(spec, row, length, tokenizer, max_length))
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt.strip()}]
        source = getattr(row, "source", f"{task}, row {number}")
        chats.append(OwnRow(prompt, spec.response(row), source))
    return chats


def _read(spec: Task, split: str, folder: Path | None, limit: int | None = None) -> list:
    if folder:
        source = folder / f"{split}.jsonl"
        if not source.is_file():
            raise FileNotFoundError(
                f"{source} does not exist; --data-dir must hold <task>/train.jsonl "
                "(one JSON row a line)"
            )
        lines = _json_lines(source)
    else:
        source = "/".join(spec.hub)
        lines = _hub_rows(spec, split, source)
    rows = [_checked(row, spec, place) for row, place in itertools.islice(lines, limit)]
    if not rows:
        raise ValueError(f"{source} is empty; it must hold one JSON row a line")
    if not spec.columns:
        check_responses(rows)
    return rows


def _hub_rows(spec: Task, split: str, source: str) -> Iterator[tuple]:
    """The rows of a split of a data set, each with its place in words, for errors."""
    with loading(f"the {split} rows of {source}"):
        table = datasets.load_dataset(*spec.hub, split=split, revision=spec.revision)
    for number, row in enumerate(table, 1):
        yield row, f"{source}, {split} row {number}"


def _json_lines(path: str | Path) -> Iterator[tuple]:
    """The rows of a file, each with its place in words; blank lines are passed over."""
    with open(path, "rb") as file:  # text would also end lines at a carriage return inside a row
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line.decode("utf-8-sig")), f"{path}, line {number}"
            except (ValueError, RecursionError) as error:
                cause = getattr(error, "msg", error)
                raise ValueError(f"{path}, line {number}: not JSON ({cause})") from error


def read_prompts(path: str | Path) -> list[str | list[dict]]:
    """The prompts of a file of rows of one's own, texts or chats. Raises ValueError, naming the
    line, for what is no such row, and for a file without rows; OSError for one that is not there.
    """
    rows = [_checked(row, TASKS["custom"], place) for row, place in _json_lines(path)]
    if not rows:
        raise ValueError(f"{path}: no prompts")
    return [row["prompt"] for row in rows]


def _checked(row, spec: Task, source: str) -> dict | OwnRow:
    """The columns that the task uses of a row. Raises ValueError where one is missing or not of
    its type."""
    if not isinstance(row, dict):
        columns = ", ".join(spec.columns) or "prompt or messages"
        raise ValueError(
            f"{source}: must be a JSON object with the columns {columns}, got {row!r:.60}"
        )
    if not spec.columns:
        return own_row(row, source)
    for name in spec.columns:
        if name not in row:
            present = ", ".join(map(repr, row))
            raise ValueError(f"{source}: no column {name!r} (found {present:.200})")
        kind = "a list of texts" if name in spec.lists else "text"
        texts = row[name] if name in spec.lists else [row[name]]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{source}: {name} must be {kind}, got {row[name]!r:.60}")
        for text in texts:
            check_text(text, f"{source}: {name}", "text")
    return {name: row[name] for name in spec.columns}


class Example(NamedTuple):
    """One tokenised row: `input_ids` [T] int32, of which the first `prompt_length` bear no loss,
    but for the spans [start, end) of `turns`: what the assistant said earlier in a chat."""

    input_ids: np.ndarray
    prompt_length: int
    turns: tuple[tuple[int, int], ...] = ()

    @property
    def has_response(self) -> bool:
        return len(self.input_ids) > self.prompt_length

    @property
    def bears_loss(self) -> np.ndarray:
        """Which tokens bear loss, bool [T]."""
        mask = np.arange(len(self.input_ids)) >= self.prompt_length
        for start, end in self.turns:
            mask[start:end] = True
        return mask


def prompt_ids(example: Example) -> Tensor:
    """The prompt's tokens, int64 [prompt_length]."""
    return torch.from_numpy(example.input_ids[: example.prompt_length]).long()


def all_tokens(examples: Sequence[Example]) -> list[Example]:
    """The same rows with all tokens as response: for pretraining, or a head that reads prompts."""
    return [Example(example.input_ids, 0) for example in examples]


def prompts_alone(examples: Sequence[Example]) -> list[Example]:
    """The same rows without their responses."""
    return [e._replace(input_ids=e.input_ids[: e.prompt_length]) for e in examples]


def encode(
    task: str, rows: Sequence[dict], tokenizer, max_length: int = 512
) -> tuple[list[Example], int]:
    """Tokenise rows as prompt + response + end token, cut to `max_length` tokens; returns
    (examples, rows dropped).

    A summarisation document is cut at its end so that a quarter of `max_length` is left for the
    response (whatever the response is: at test time it is unknown). A row is dropped, and counted,
    where its prompt or response is empty or where the prompt leaves no room for a single response
    token. Rows of your own may have no response; chats go through the tokenizer's template.
    Raises ValueError for a tokenizer without an end token, and for a chat that it cannot render.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end token (eos_token): set one, or the draft never learns to stop"
        )
    if not rows:
        return [], 0
    if task == "custom":
        tokens = [_own_tokens(row, tokenizer) for row in rows]
    else:
        tokens = _task_tokens(TASKS[task], rows, tokenizer, max_length)
    examples = []
    for row, (prompt, response, turns) in zip(rows, tokens, strict=True):
        text = TASKS[task].response(row)
        is_empty = text is not None and not text.strip()
        if 0 < len(prompt) < max_length and not is_empty:
            ids = [*prompt, *response][:max_length]
            examples.append(Example(np.array(ids, dtype=np.int32), len(prompt), turns))
    return examples, len(rows) - len(examples)


def _own_tokens(row: dict, tokenizer) -> RowTokens:
    if isinstance(row["prompt"], list):
        return chat_tokens(row, tokenizer)
    prompt = text_tokens([row["prompt"]], tokenizer)[0]
    if row["response"] is None:
        return RowTokens(prompt, [])
    response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
    return RowTokens(prompt, [*response, tokenizer.eos_token_id])


def _task_tokens(
    spec: Task, rows: Sequence[dict], tokenizer, max_length: int
) -> Iterator[RowTokens]:
    """The tokens of all rows, whose texts are tokenised together: that is done in parallel."""
    prompts = text_tokens([spec.prompt(row) for row in rows], tokenizer)
    responses = tokenizer([spec.response(row) for row in rows], add_special_tokens=False)
    for row, prompt, response in zip(rows, prompts, responses["input_ids"], strict=True):
        shorter = _cut(spec, row, len(prompt), tokenizer, max_length)
        if shorter is not row:
            prompt = text_tokens([spec.prompt(shorter)], tokenizer)[0]
        yield RowTokens(prompt, [*response, tokenizer.eos_token_id])


def _cut(spec: Task, row: dict, prompt_length: int, tokenizer, max_length: int) -> dict:
    """The row with its document, if it has one, cut at its end, so that a prompt of so many tokens
    leaves a quarter of `max_length` (all of it gone where that is not enough)."""
    excess = prompt_length - (max_length - max_length // 4)
    if not spec.document or excess <= 0:
        return row
    text = row[spec.document]
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoding["offset_mapping"]
    return row | {spec.document: text[: offsets[-excess][0]] if excess < len(offsets) else ""}


def digest(examples: Sequence[Example]) -> str:
    """What stands for tokenised rows in a fingerprint: 16 hexadecimal digits."""
    sha = hashlib.sha256()
    for example in examples:
        sha.update(np.int32([example.prompt_length, len(example.input_ids)]).tobytes())
        sha.update(example.input_ids.tobytes())
        sha.update(np.int32(example.turns).tobytes())
    return sha.hexdigest()[:16]


def encode_once(
    folder: Path, task: str, rows: Sequence[dict], tokenizer, max_length: int = 512
) -> tuple[list[Example], int]:
    """`encode`, from a file in `folder` if these texts were tokenised before in the same way."""
    spec = TASKS[task]
    settings = {
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "rows": [[spec.prompt(row), spec.response(row)] for row in rows],
        "cut": [task, max_length, tokenizer.eos_token_id],
        "format": 2,  # of write_examples
    }
    if task == "custom":
        settings["chat_template"] = tokenizer.chat_template
    path = Path(folder, f"{fingerprint(settings)}.tokens")
    if is_whole(path):
        return read_examples(path)
    examples, dropped = encode(task, rows, tokenizer, max_length)
    write_examples(path, examples, dropped)
    return examples, dropped


def write_examples(path: Path, examples: Sequence[Example], dropped: int = 0) -> None:
    """Keep examples in a checked file of int32 numbers: dropped, count, then of every example the
    numbers of its tokens, prompt tokens and turns, then its turns and token ids."""
    sizes = [(len(e.input_ids), e.prompt_length, len(e.turns)) for e in examples]
    content = [part for e in examples for part in (np.ravel(e.turns), e.input_ids)]
    numbers = np.concatenate([[dropped, len(examples)], np.ravel(sizes), *content])
    write_checked(path, lambda file: file.write(numbers.astype(np.int32).tobytes()))


def read_examples(path: Path) -> tuple[list[Example], int]:
    """What `write_examples` wrote: (examples, rows dropped)."""
    numbers = np.fromfile(path, np.int32)
    dropped, count = numbers[:2].tolist()
    place = 2 + 3 * count
    examples = []
    for length, prompt_length, turns in numbers[2:place].reshape(count, 3).tolist():
        ids = place + 2 * turns
        spans = numbers[place:ids].reshape(turns, 2).tolist()
        place = ids + length
        examples.append(Example(numbers[ids:place], prompt_length, tuple(map(tuple, spans))))
    return examples, dropped


def collate(examples: Sequence[Example], multiple: int = 32) -> tuple[Tensor, Tensor]:
    """Right-padded `input_ids` [B, T] and `labels` [B, T] (-100 on prompt and padding), int64,
    T a multiple of `multiple`.

    No attention mask: causal attention never looks right, and padding bears no loss. Few shapes
    mean few kernels to compile.
    """
    length = -(-max(len(e.input_ids) for e in examples) // multiple) * multiple
    input_ids = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full_like(input_ids, -100)
    for i, example in enumerate(examples):
        row = input_ids[i, : len(example.input_ids)]
        row[:] = torch.from_numpy(example.input_ids)
        loss = torch.from_numpy(example.bears_loss)
        labels[i, : len(row)][loss] = row[loss]
    return input_ids, labels


def batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, ranks: int = 1
) -> list[list[int]]:
    """One epoch's batches of row numbers, each row once: seeded, of similar lengths inside a batch,
    in random order.

    The rows are dealt to ceil(N / batch_size) batches whose sizes differ by at most one, so that no
    stray last batch of two rows takes an optimiser step of its own; to one batch less where they
    would have fewer rows than there are ranks.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    window = 50 * batch_size  # sorted by length inside windows, so that epochs differ in batches
    windows = np.split(order, range(window, len(order), window))
    lengths = np.asarray(lengths)
    order = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in windows])
    count = -(-len(order) // batch_size)
    if len(order) // count < ranks:
        count = max(count - 1, 1)
    groups = np.array_split(order, count)
    return [groups[i].tolist() for i in rng.permutation(len(groups))]


class Batch(NamedTuple):
    """A micro-batch: `input_ids` [B, T], the flat position of each response token's predictor [N],
    that token's id [N], the examples' numbers [B], and how much of the stage's training is over
    (0 at its first step, below 1 at its last)."""

    input_ids: Tensor
    index: Tensor
    labels: Tensor
    rows: list[int]
    progress: float = 0.0


def make_batch(
    examples: Sequence[Example], rows: list[int], device: torch.device, progress: float = 0.0
) -> Batch:
    input_ids, labels = collate([examples[row] for row in rows])
    index, tokens = response_positions(labels)
    tensors = [to_device(tensor, device) for tensor in (input_ids, index, tokens)]
    return Batch(*tensors, rows, progress)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`; to a GPU from pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def train_tokenizer(texts: Sequence[str], vocab_size: int):
    """A byte-level BPE tokenizer trained on `texts`, with <|endoftext|> as its end token (for pairs
    that are trained from scratch)."""
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
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
