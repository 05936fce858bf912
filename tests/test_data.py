"""Loading, prompts, the loss mask and batches, on real rows where they are at hand
(../shared/data) and on written ones."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from arithmetic import arithmetic_rows
from own_rows import prompt_tokens

SHARED = Path(__file__).parents[2] / "shared" / "data"
REAL = ["gsm8k", "alpaca", "mbpp", "cnn_dailymail", "xsum"]
SPLITS = ["train", "validation", "test"]


def write(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(text)


def sums(n, start=0):
    return [
        {"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"}
        for i in range(start, start + n)
    ]


def encode_one(tokenizer, prompt, response, max_length=512):
    return data.encode("custom", [{"prompt": prompt, "response": response}], tokenizer, max_length)


# The loss mask


def test_loss_tokens_are_response_and_end_token_where_bpe_would_merge_over_the_border():
    tokenizer = data.train_tokenizer(["answer " * 50, "an swer"], 300)
    prompt, response = "ans", "wer answer"
    together = tokenizer(prompt + response)["input_ids"]
    assert len(together) < len(tokenizer(prompt)["input_ids"] + tokenizer(response)["input_ids"])
    (example,), dropped = encode_one(tokenizer, prompt, response)
    input_ids, labels = data.collate([example])
    loss_tokens = labels[0][labels[0] != -100].tolist()
    assert dropped == 0
    assert loss_tokens == [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(input_ids[0, : example.prompt_length]) == prompt
    assert input_ids[0, len(example.input_ids) :].eq(0).all()
    assert labels[0, len(example.input_ids) :].eq(-100).all()


@pytest.mark.parametrize(
    ("max_length", "count"),
    [(5, 0), (6, 1), (8, 3), (9, 4), (100, 4)],
    ids=["no room", "one", "cut", "all", "roomy"],
)
def test_truncation_never_leaves_a_row_without_response(max_length, count):
    tokenizer = data.train_tokenizer([""], 257)  # one token a byte
    examples, dropped = encode_one(tokenizer, "12345", "abc", max_length)
    assert (len(examples), dropped) == ((1, 0) if count else (0, 1))
    if count:
        tokens = examples[0].input_ids[5:]
        assert tokenizer.decode(tokens) == "abc<|endoftext|>"[: count if count < 4 else None]
        assert (data.collate(examples)[1] != -100).sum() == count


def test_rows_with_an_empty_response_are_dropped_and_counted(tokenizer):
    rows = [{"prompt": "a", "response": text} for text in ("x", "", "  \n", "y")]
    rows.append({"prompt": "", "response": "z"})
    examples, dropped = data.encode("custom", rows, tokenizer)
    assert (len(examples), dropped) == (2, 3)
    assert data.encode("custom", [], tokenizer) == ([], 0)


def test_documents_are_cut_so_that_a_quarter_is_left_for_the_response(tokenizer):
    row = {"document": "The quick brown fox. " * 100, "summary": "A fox."}
    (example,), _ = data.encode("xsum", [row], tokenizer, 128)
    prompt = tokenizer.decode(data.prompt_ids(example))
    assert 90 <= example.prompt_length <= 97  # 96, up to a token that merges otherwise at the cut
    assert prompt.startswith("The quick brown fox. The")
    assert prompt.endswith("\nSummarize the above article in one sentence:\n")
    response = example.input_ids[example.prompt_length :]
    assert tokenizer.decode(response) == "A fox.<|endoftext|>"
    # a document that is shorter than what has to go is cut to nothing
    row = {"document": "Fox.", "summary": "A fox."}
    (example,), _ = data.encode("xsum", [row], tokenizer, 36)
    prompt = tokenizer.decode(data.prompt_ids(example))
    assert prompt == "\nSummarize the above article in one sentence:\n"


def test_start_token_once_and_no_end_token_inside(tokenizer):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    end = tokenizer.eos_token_id
    inner = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = TemplateProcessing(
        single="A $0 <|endoftext|>", special_tokens=[("A", 5), ("<|endoftext|>", end)]
    )
    with_start = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    (example,), _ = encode_one(with_start, "one two", "three")
    plain = [*tokenizer("one two")["input_ids"], *tokenizer("three")["input_ids"]]
    assert example.input_ids.tolist() == [5, *plain, end]
    # a prompt of the command lines is the one that drafts are trained and evaluated on
    assert prompt_tokens("one two", with_start) == data.prompt_ids(example).tolist()


def test_tokenizer_without_end_token_is_refused(tokenizer):
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no end token"):
        encode_one(endless, "a", "b")


def test_prompts_and_whole_rows(examples):
    example = examples[3]
    prompt = data.prompt_ids(example)
    assert prompt.dtype == torch.long
    assert prompt.tolist() == example.input_ids[: example.prompt_length].tolist()
    whole = data.all_tokens(examples)
    assert [row.prompt_length for row in whole] == [0] * len(examples)
    assert (whole[3].input_ids == example.input_ids).all()


# Loading


def test_missing_splits_are_carved_off_train_without_overlap(tmp_path):
    write(tmp_path / "gsm8k", "train", sums(100))
    parts = {split: data.load_rows("gsm8k", split, tmp_path) for split in SPLITS}
    assert [len(rows) for rows in parts.values()] == [80, 10, 10]
    assert [*parts["train"], *parts["validation"], *parts["test"]] == sums(100)
    assert data.load_rows("gsm8k", "train", tmp_path, limit=90) == sums(80), "none of the held-out"
    assert data.load_rows("gsm8k", "validation", tmp_path, limit=2) == sums(2, 80)
    write(tmp_path / "gsm8k", "test", sums(7, 1000))
    assert data.load_rows("gsm8k", "train", tmp_path) == sums(90)
    assert data.load_rows("gsm8k", "test", tmp_path, limit=3) == sums(3, 1000)
    write(tmp_path / "gsm8k", "train", sums(11_000))
    assert data.load_rows("gsm8k", "validation", tmp_path) == sums(500, 10_500), "500 at most"


def test_hub_path_is_the_same_code(tmp_path, monkeypatch):
    """load_dataset(path, configuration, split=...) as for the Hub, on a local repository of the
    same layout."""
    write(tmp_path, "train", sums(40))
    write(tmp_path, "test", sums(5, 100))
    files = "".join(f"  - split: {s}\n    path: {s}.jsonl\n" for s in ("train", "test"))
    readme = f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n"
    (tmp_path / "README.md").write_text(readme)
    task = dataclasses.replace(data.TASKS["gsm8k"], hub=(str(tmp_path), "main"))
    monkeypatch.setitem(data.TASKS, "gsm8k", task)
    assert data.load_rows("gsm8k", "test") == sums(5, 100)
    assert data.load_rows("gsm8k", "test", limit=2) == sums(2, 100)
    assert data.load_rows("gsm8k", "train") == sums(36)
    assert data.load_rows("gsm8k", "validation") == sums(4, 36)
    monkeypatch.setitem(data.TASKS, "gsm8k", dataclasses.replace(task, hub=(str(tmp_path / "x"),)))
    with pytest.raises(ValueError, match=r"cannot load the test rows of .*x") as error:
        data.load_rows("gsm8k", "test")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", REAL)
def test_real_rows(task, tokenizer):
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here")
    rows = data.load_rows(task, "train", SHARED, 50)
    examples, dropped = data.encode(task, rows, tokenizer, 512)
    assert len(rows) == 50 and len(examples) + dropped == 50 and len(examples) >= 45
    spec = data.TASKS[task]
    for example in examples:
        text = tokenizer.decode(example.input_ids[example.prompt_length :])
        start = text.removesuffix("<|endoftext|>")
        assert any(spec.response(row).startswith(start) for row in rows)
        assert len(example.input_ids) <= 512
        assert len(example.input_ids) == 512 or text.endswith("<|endoftext|>")
    train, validation, test = (
        {json.dumps(row) for row in data.load_rows(task, split, SHARED)} for split in SPLITS
    )
    assert not (train & validation or train & test or validation & test)


def test_gsm8k_prompt_and_response_are_the_papers():
    row = {"question": "Q?", "answer": "1+1 = <<1+1=2>>2\n#### 2"}
    spec = data.TASKS["gsm8k"]
    assert spec.prompt(row) == (
        "Q?\nAnswer the above question. "
        "First think step by step and then answer the final number.\n"
    )
    assert spec.response(row) == "1+1 = <<1+1=2>>2\nThe final answer is:  2"


def test_alpaca_and_mbpp_prompts():
    spec = data.TASKS["alpaca"]
    row = {"instruction": "Add.", "input": "", "output": "3"}
    assert spec.prompt(row) == "### Instruction:\nAdd.\n\n### Response:\n"
    row["input"] = "1 and 2"
    assert spec.prompt(row) == ("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n")
    spec = data.TASKS["mbpp"]
    row = {"text": "Add.", "code": "a\r\nb", "test_list": ["assert 1", "assert 2"]}
    assert spec.prompt(row) == ("Add.\nYour code should satisfy these tests:\nassert 1\nassert 2\n")
    assert spec.response(row) == "a\nb"


def test_arithmetic_rows_are_right_and_disjoint():
    splits = [arithmetic_rows(split) for split in SPLITS]
    questions = [row["question"] for rows in splits for row in rows]
    assert len(set(questions)) == len(questions) == 4600
    for row in splits[0][:500]:
        steps = re.findall(r"= <<(\d+)([-+*])(\d+)=(\d+)>>(\d+) ", row["answer"])
        assert len(steps) == 2
        for left, operator, right, result, shown in steps:
            a, b = int(left), int(right)
            assert {"+": a + b, "-": a - b, "*": a * b}[operator] == int(result)
            assert result == shown
        assert row["answer"].endswith(f"\n#### {steps[-1][-1]}") and int(steps[-1][-1]) > 0
    assert arithmetic_rows("test") == splits[2] == data.load_rows("arithmetic", "test")
    assert data.load_rows("arithmetic", "train", limit=7) == splits[0][:7]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"question": "a"}\n', "no column 'answer'"),
        ('{"question": "a", "answer": "b"}\nnot json\n', "line 2: not JSON"),
        ("", "is empty"),
        (
            '{"question": "a", "answer": "b"}\n\n{"question": "c", "answer": null}\n',
            "line 3: answer must be text",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, rows, message):
    write(tmp_path / "gsm8k", "train", [])
    (tmp_path / "gsm8k" / "train.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=message) as error:
        data.load_rows("gsm8k", "train", tmp_path)
    assert "train.jsonl" in str(error.value)


def test_bad_requests_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mbpp.train\.jsonl"):
        data.load_rows("mbpp", "train", tmp_path)
    with pytest.raises(ValueError, match="unknown task 'gsm9k', expected one of gsm8k"):
        data.load_rows("gsm9k", "train")
    with pytest.raises(ValueError, match="unknown split"):
        data.load_rows("gsm8k", "dev")
    with pytest.raises(ValueError, match="--data-dir"):
        data.load_rows("custom", "train")


# The tokenised file


@pytest.fixture
def count_encode(monkeypatch):
    """A list that grows by one with every call of data.encode."""
    calls = []
    encode = data.encode

    def counted(*arguments):
        calls.append(arguments)
        return encode(*arguments)

    monkeypatch.setattr(data, "encode", counted)
    return calls


def same_examples(a, b):
    pairs = zip(a, b, strict=True)
    return all(
        x.prompt_length == y.prompt_length and x.input_ids.tolist() == y.input_ids.tolist()
        for x, y in pairs
    )


def test_rows_are_tokenised_once(tokenizer, tmp_path, count_encode):
    rows = [*data.load_rows("arithmetic", "train", limit=9), {"question": "x", "answer": " "}]
    first = data.encode_once(tmp_path, "arithmetic", rows, tokenizer, 200)
    again = data.encode_once(tmp_path, "arithmetic", rows, tokenizer, 200)
    assert len(count_encode) == 1
    assert first[1] == again[1] == 1 and same_examples(first[0], again[0])
    assert again[0][0].input_ids.dtype == np.int32
    other = data.train_tokenizer(["other"], 300)
    data.encode_once(tmp_path, "arithmetic", rows, other, 100)
    data.encode_once(tmp_path, "arithmetic", rows, tokenizer, 199)
    data.encode_once(tmp_path, "gsm8k", rows, tokenizer, 200)
    data.encode_once(tmp_path, "arithmetic", rows[:5], tokenizer, 200)
    assert len(count_encode) == 5


def test_the_key_keeps_prompt_and_response_apart(tokenizer, tmp_path):
    """Issue 13.10: joined by NUL, ("a\\0b", "c") and ("a", "b\\0c") had one file."""
    texts = [("a\0b", "c"), ("a", "b\0c"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    for prompt, response in texts:
        rows = [{"prompt": prompt, "response": response}]
        examples, dropped = data.encode_once(tmp_path, "custom", rows, tokenizer)
        assert dropped == 0
        assert same_examples(examples, data.encode("custom", rows, tokenizer)[0])
        assert tokenizer.decode(data.prompt_ids(examples[0])) == prompt
    assert len(list(tmp_path.glob("*.tokens"))) == len(texts)


def test_a_damaged_file_is_written_anew(tokenizer, tmp_path, capsys):
    rows = data.load_rows("arithmetic", "train", limit=3)
    examples, _ = data.encode_once(tmp_path, "arithmetic", rows, tokenizer)
    (path,) = tmp_path.glob("*.tokens")
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    again, _ = data.encode_once(tmp_path, "arithmetic", rows, tokenizer)
    assert same_examples(examples, again) and path.read_bytes() == content
    assert f"{path} is damaged" in capsys.readouterr().out


def test_examples_without_rows_are_kept_too(tmp_path):
    data.write_examples(tmp_path / "x.tokens", [], dropped=4)
    assert data.read_examples(tmp_path / "x.tokens") == ([], 4)


def test_a_digest_is_of_tokens_and_borders(examples):
    rows = examples[:3]
    digest = data.digest(rows)
    assert re.fullmatch("[0-9a-f]{16}", digest) and digest == data.digest(list(rows))
    moved = rows[0]._replace(prompt_length=rows[0].prompt_length + 1)
    longer = rows[0]._replace(input_ids=np.append(rows[0].input_ids, np.int32(1)))
    # the same tokens in a row, cut elsewhere
    whole = np.concatenate([rows[0].input_ids, rows[1].input_ids])
    cut = len(rows[0].input_ids) - 1
    shifted = [rows[0]._replace(input_ids=whole[:cut]), rows[1]._replace(input_ids=whole[cut:])]
    others = [rows[:2], rows[::-1], [moved, *rows[1:]], [longer, *rows[1:]], [*shifted, rows[2]]]
    assert len({digest, *map(data.digest, others)}) == 6


# Batches


@pytest.mark.parametrize(("n", "batch_size"), [(1, 16), (16, 16), (17, 16), (1000, 16), (374, 8)])
def test_batches_hold_every_row_once_in_nearly_equal_sizes(n, batch_size):
    lengths = np.random.default_rng(0).integers(5, 512, n).tolist()
    epochs = [data.batches(lengths, batch_size, seed=3, epoch=epoch) for epoch in (0, 1)]
    for groups in epochs:
        sizes = {len(group) for group in groups}
        assert sorted(i for group in groups for i in group) == list(range(n))
        assert len(groups) == -(-n // batch_size)
        assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    assert epochs[0] == data.batches(lengths, batch_size, seed=3, epoch=0)
    for_ranks = [len(group) for group in data.batches(lengths, batch_size, 3, 0, ranks=8)]
    assert sum(for_ranks) == n
    assert min(for_ranks) >= 8 or n == 1, "mbpp's 374 rows in batches of 8 feed 8 ranks"
    if n == 374:  # inside a window of 50 batches rows are sorted, and then the batches shuffled
        longest = [max(lengths[i] for i in group) for group in epochs[0]]
        assert longest not in (sorted(longest), sorted(longest, reverse=True))
    if n == 1000:
        assert epochs[0] != epochs[1] != data.batches(lengths, batch_size, seed=4, epoch=1)
        padded = sum(len(group) * max(lengths[i] for i in group) for group in epochs[0])
        assert padded < 1.1 * sum(lengths)  # random batches of 16 would pad to about 1.8 times


def test_collate_pads_right_to_the_multiple():
    rows = [data.Example(np.arange(1, n + 1, dtype=np.int32), 2) for n in (5, 33)]
    input_ids, labels = data.collate(rows, multiple=32)
    assert input_ids.shape == labels.shape == (2, 64)
    assert input_ids.dtype == labels.dtype == torch.long
    assert input_ids[0].tolist() == [1, 2, 3, 4, 5] + [0] * 59
    assert labels[0].tolist() == [-100, -100, 3, 4, 5] + [-100] * 59
    assert data.collate(rows[:1])[0].shape == (1, 32), "the default multiple"


def test_make_batch_says_where_responses_are_predicted(examples):
    batch = data.make_batch(examples, [7, 2], torch.device("cpu"), progress=0.25)
    input_ids, labels = data.collate([examples[7], examples[2]])
    assert torch.equal(batch.input_ids, input_ids)
    assert batch.rows == [7, 2] and batch.progress == 0.25
    assert batch.labels.tolist() == labels[labels != -100].tolist()
    assert input_ids.flatten()[batch.index + 1].tolist() == batch.labels.tolist()


def test_a_tokenizer_has_the_end_token_and_every_byte():
    tokenizer = data.train_tokenizer(["abc"], 300)
    assert tokenizer.eos_token == "<|endoftext|>"
    text = "Ünïcödé \t\n and <<1+1=2>>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
