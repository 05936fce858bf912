"""Loading, prompts, the loss mask and batches, on real rows where they are at hand (../shared/data) and on written ones."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import data

SHARED = Path(__file__).parents[2] / "shared" / "data"
REAL = ["gsm8k", "alpaca", "mbpp", "cnn_dailymail", "xsum"]


def write(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def qa(n, start=0):
    return [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(start, start + n)]


def encode_one(tokenizer, prompt, response, max_length=512):
    return data.encode("custom", [{"prompt": prompt, "response": response}], tokenizer, max_length)


def test_loss_tokens_are_the_response_and_the_end_token_where_bpe_would_merge_over_the_border():
    tokenizer = data.train_tokenizer(["answer " * 50, "an swer"], 300)
    prompt, response = "ans", "wer answer"
    assert len(tokenizer(prompt + response)["input_ids"]) < len(
        tokenizer(prompt)["input_ids"] + tokenizer(response)["input_ids"]
    )
    (example,), dropped = encode_one(tokenizer, prompt, response)
    input_ids, labels = data.collate([example])
    kept = labels[0][labels[0] != -100].tolist()
    assert dropped == 0
    assert kept == [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(input_ids[0, : example.prompt_length]) == prompt
    assert input_ids[0, len(example.input_ids) :].eq(0).all() and labels[0, len(example.input_ids) :].eq(-100).all()


@pytest.mark.parametrize(
    ("max_length", "kept"), [(5, 0), (6, 1), (8, 3), (9, 4), (100, 4)], ids=["no room", "one", "cut", "all", "roomy"]
)
def test_truncation_never_leaves_a_row_without_response(max_length, kept):
    tokenizer = data.train_tokenizer([""], 257)  # one token a byte
    examples, dropped = encode_one(tokenizer, "12345", "abc", max_length)
    assert (len(examples), dropped) == ((1, 0) if kept else (0, 1))
    if kept:
        tokens = examples[0].input_ids[5:]
        assert tokenizer.decode(tokens) == "abc<|endoftext|>"[: kept if kept < 4 else None]
        assert (data.collate(examples)[1] != -100).sum() == kept


def test_rows_with_an_empty_response_are_dropped_and_counted(tokenizer):
    rows = [{"prompt": "a", "response": text} for text in ("x", "", "  \n", "y")] + [{"prompt": "", "response": "z"}]
    examples, dropped = data.encode("custom", rows, tokenizer)
    assert (len(examples), dropped) == (2, 3)
    assert data.encode("custom", [], tokenizer) == ([], 0)


def test_documents_are_cut_so_that_a_quarter_is_left_for_the_response(tokenizer):
    row = {"document": "The quick brown fox. " * 100, "summary": "A fox."}
    (example,), _ = data.encode("xsum", [row], tokenizer, 128)
    prompt = tokenizer.decode(example.input_ids[: example.prompt_length])
    assert 90 <= example.prompt_length <= 97  # 96, up to a token that merges differently at the cut
    assert prompt.startswith("The quick brown fox. The") and prompt.endswith("\nSummarize the above article in one sentence:\n")
    assert tokenizer.decode(example.input_ids[example.prompt_length :]) == "A fox.<|endoftext|>"


def test_start_token_once_and_no_end_token_inside(tokenizer):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    end = tokenizer.eos_token_id
    inner = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = TemplateProcessing(single="A $0 <|endoftext|>", special_tokens=[("A", 5), ("<|endoftext|>", end)])
    with_start = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    (example,), _ = encode_one(with_start, "one two", "three")
    plain = [*tokenizer("one two")["input_ids"], *tokenizer("three")["input_ids"]]
    assert example.input_ids.tolist() == [5, *plain, end]


def test_tokenizer_without_end_token_is_refused(tokenizer):
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(ValueError, match="no end token"):
        encode_one(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer), "a", "b")


def test_missing_splits_are_carved_off_train_without_overlap(tmp_path):
    write(tmp_path / "gsm8k", "train", qa(100))
    parts = {split: data.load_rows("gsm8k", split, tmp_path) for split in ("train", "validation", "test")}
    assert [len(rows) for rows in parts.values()] == [80, 10, 10]
    assert [*parts["train"], *parts["validation"], *parts["test"]] == qa(100)
    write(tmp_path / "gsm8k", "test", qa(7, 1000))
    assert data.load_rows("gsm8k", "train", tmp_path) == qa(90)
    assert data.load_rows("gsm8k", "test", tmp_path, limit=3) == qa(3, 1000)


def test_hub_path_is_the_same_code(tmp_path, monkeypatch):
    """load_dataset(path, configuration, split=...) as for the Hub, on a local repository of the same layout."""
    write(tmp_path, "train", qa(40))
    write(tmp_path, "test", qa(5, 100))
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "test"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n")
    monkeypatch.setitem(data.TASKS, "gsm8k", dataclasses.replace(data.TASKS["gsm8k"], hub=(str(tmp_path), "main")))
    assert data.load_rows("gsm8k", "test") == qa(5, 100)
    assert data.load_rows("gsm8k", "train") == qa(36)
    assert data.load_rows("gsm8k", "validation") == qa(4, 36)


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
        assert any(spec.response(row).startswith(text.removesuffix("<|endoftext|>")) for row in rows)
        assert len(example.input_ids) <= 512 and (len(example.input_ids) == 512 or text.endswith("<|endoftext|>"))
    seen = [{json.dumps(row) for row in data.load_rows(task, split, SHARED)} for split in ("train", "validation", "test")]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_gsm8k_prompt_and_response_are_the_papers():
    row = {"question": "Q?", "answer": "1+1 = <<1+1=2>>2\n#### 2"}
    spec = data.TASKS["gsm8k"]
    assert spec.prompt(row) == ("Q?\nAnswer the above question. First think step by step and then answer the final number.\n")
    assert spec.response(row) == "1+1 = <<1+1=2>>2\nThe final answer is:  2"


def test_arithmetic_rows_are_right_and_disjoint():
    splits = [data.arithmetic_rows(split) for split in ("train", "validation", "test")]
    questions = [row["question"] for rows in splits for row in rows]
    assert len(set(questions)) == len(questions) == 4600
    for row in splits[0][:500]:
        steps = re.findall(r"= <<(\d+)([-+*])(\d+)=(\d+)>>(\d+) ", row["answer"])
        assert len(steps) == 2
        for left, op, right, result, shown in steps:
            assert {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[op] == int(result)
            assert result == shown
        assert row["answer"].endswith(f"\n#### {steps[-1][-1]}") and int(steps[-1][-1]) > 0
    assert data.arithmetic_rows("test") == splits[2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"question": "a"}\n', "no column 'answer'"),
        ('{"question": "a", "answer": "b"}\nnot json\n', "line 2: not JSON"),
        ("", "is empty"),
        ('{"question": "a", "answer": "b"}\n{"question": "c", "answer": null}\n', "line 2: answer must be text"),
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


@pytest.mark.parametrize(("n", "batch_size"), [(1, 16), (16, 16), (17, 16), (1000, 16), (374, 8)])
def test_batches_hold_every_row_once_in_nearly_equal_sizes(n, batch_size):
    lengths = np.random.default_rng(0).integers(5, 512, n).tolist()
    epochs = [data.batches(lengths, batch_size, seed=3, epoch=epoch) for epoch in (0, 1)]
    for groups in epochs:
        sizes = {len(group) for group in groups}
        assert sorted(i for group in groups for i in group) == list(range(n))
        assert len(groups) == -(-n // batch_size) and max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    assert epochs[0] == data.batches(lengths, batch_size, seed=3, epoch=0)
    for_ranks = [len(group) for group in data.batches(lengths, batch_size, 3, 0, ranks=8)]
    assert sum(for_ranks) == n and (min(for_ranks) >= 8 or n == 1), "mbpp's 374 rows in batches of 8 feed 8 ranks"
    if n == 1000:
        assert epochs[0] != epochs[1] != data.batches(lengths, batch_size, seed=4, epoch=1)
        padded = sum(len(group) * max(lengths[i] for i in group) for group in epochs[0])
        assert padded < 1.1 * sum(lengths)  # random batches of 16 would pad to about 1.8 times


def test_collate_pads_right_to_the_multiple():
    rows = [data.Example(np.arange(1, n + 1, dtype=np.int32), 2) for n in (5, 33)]
    input_ids, labels = data.collate(rows, multiple=32)
    assert input_ids.shape == labels.shape == (2, 64) and input_ids.dtype == labels.dtype == torch.long
    assert input_ids[0].tolist() == [1, 2, 3, 4, 5] + [0] * 59
    assert labels[0].tolist() == [-100, -100, 3, 4, 5] + [-100] * 59
