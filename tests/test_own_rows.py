"""Rows of one's own: every form that people have them in, and what is refused of them."""

import json

import pytest

import data
from own_rows import OwnRow, chat_tokens, own_row, turn_end

USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "answer"}
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
    "<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }}: {{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def tokenizer():
    """One that puts a start token before every text, as Llama's do, with a ChatML template."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = data.train_tokenizer(["user assistant system Hello answer question " * 20], 300)
    names = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"bos_token": names[0], "extra_special_tokens": names[1:]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def encode(tokenizer, *rows):
    rows = [own_row(row, f"line {number}") for number, row in enumerate(rows, 1)]
    examples, dropped = data.encode("custom", rows, tokenizer)
    assert dropped == 0
    return examples


def texts(tokenizer, example):
    """(the prompt, the tokens that bear loss) of an example, as texts."""
    ids, labels = data.collate([example])
    prompt = tokenizer.decode(ids[0, : example.prompt_length])
    return prompt, tokenizer.decode(labels[0][labels[0] != -100])


CHAT = ("<|begin|><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", "answer<|im_end|>")
FORMS = {
    "prompt and response": ({"prompt": "Hello", "response": "answer"}, None),
    "prompt and completion": ({"prompt": "Hello", "completion": "answer"}, None),
    "null is missing": ({"prompt": "Hello", "response": "answer", "messages": None}, None),
    "other columns": ({"id": 3, "prompt": "Hello", "completion": "answer"}, None),
    "messages": ({"messages": [USER, ANSWER]}, CHAT),
    "prompt and completion as chats": ({"prompt": [USER], "completion": [ANSWER]}, CHAT),
    "messages that end with the user": ({"messages": [USER]}, (CHAT[0], "")),
    "a prompt that is a chat": ({"prompt": [USER]}, (CHAT[0], "")),
    "a prompt alone": ({"prompt": "Hello"}, ("<|begin|>Hello", "")),
}


@pytest.mark.parametrize(("row", "expected"), FORMS.values(), ids=FORMS)
def test_forms(tokenizer, row, expected):
    """Loss is on the response and the token that ends it; there is one start token."""
    (example,) = encode(tokenizer, row)
    assert texts(tokenizer, example) == (expected or ("<|begin|>Hello", "answer<|endoftext|>"))


def test_the_last_turn_of_a_chat_bears_loss_and_with_marks_every_turn(tokenizer):
    chat = [USER, {"role": "assistant", "content": "question"}, USER, ANSWER]
    for template, loss in (
        (CHATML, "answer<|im_end|>"),
        (MARKED, "question<|im_end|>answer<|im_end|>"),
    ):
        tokenizer.chat_template = template
        (example,) = encode(tokenizer, {"messages": chat})
        prompt, loss_text = texts(tokenizer, example)
        assert loss_text == loss
        assert prompt.endswith("<|im_start|>assistant\n") and prompt.count("Hello") == 2


def test_marked_turns_survive_the_file_and_tell_rows_apart(tokenizer, tmp_path):
    tokenizer.chat_template = MARKED
    chat = [USER, {"role": "assistant", "content": "question"}, USER, ANSWER]
    rows = [{"messages": chat}, {"messages": [USER]}, {"messages": [USER, ANSWER]}]
    examples = encode(tokenizer, *rows)
    data.write_examples(tmp_path / "x.tokens", examples, 7)
    copies, dropped = data.read_examples(tmp_path / "x.tokens")
    assert dropped == 7 and [e.turns for e in copies] == [e.turns for e in examples]
    assert len(copies[0].turns) == 1 and copies[1].turns == ()
    assert data.digest(copies) == data.digest(examples)
    assert data.digest([examples[0]._replace(turns=())]) != data.digest(examples[:1])
    assert sum(copies[0].bears_loss) == sum(data.collate(copies[:1])[1][0] != -100)
    (prompt,) = data.prompts_alone(examples[:1])
    assert len(prompt.input_ids) == prompt.prompt_length == examples[0].prompt_length


def test_a_template_without_an_end_token_ends_with_the_tokenizers(tokenizer):
    tokenizer.chat_template = ALTERNATING
    (example,) = encode(tokenizer, {"messages": [USER, ANSWER]})
    assert texts(tokenizer, example) == ("user: Hello\nassistant: ", "answer\n<|endoftext|>")
    assert turn_end(tokenizer) == tokenizer.eos_token_id


BRACKETED = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{% endif %}"
)
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


def test_a_turns_end_is_found(tokenizer):
    """Also where the answer begins with a special token, and where the generation prompt has what
    an answered one has not."""
    for template in (CHATML, BRACKETED, THINKING, {"default": CHATML, "tool_use": "x"}):
        tokenizer.chat_template = template
        assert tokenizer.decode(turn_end(tokenizer)) == "<|im_end|>"


def test_an_answer_ends_after_its_content(tokenizer):
    """An answer may begin with a special token, and may quote the one that ends it."""
    tokenizer.chat_template = BRACKETED
    (example,) = encode(tokenizer, {"messages": [USER, ANSWER]})
    prompt = "<|im_start|>Hello<|im_end|>"
    assert texts(tokenizer, example) == (prompt, "<|im_start|>answer<|im_end|>")
    tokenizer.chat_template = CHATML
    quoting = {"role": "assistant", "content": "answer <|im_end|> answer"}
    (example,) = encode(tokenizer, {"messages": [USER, quoting]})
    assert texts(tokenizer, example)[1] == "answer <|im_end|> answer<|im_end|>"


def test_texts_as_chats(tokenizer):
    """Chats stay as they are; a document is cut so that a quarter is left for the response."""
    rows = [own_row({"prompt": "Hello", "completion": "answer"}, "file, line 3"),
            own_row({"messages": [USER]}, "file, line 4")]  # fmt: skip
    chats = data.as_chats("custom", rows, tokenizer, 512)
    assert chats == [OwnRow([USER], "answer", ""), OwnRow([USER], None, "")]
    assert [chat.source for chat in chats] == ["file, line 3", "file, line 4"]
    article = {"document": "answer question " * 200, "summary": "Hello"}
    chats = data.as_chats("xsum", [article], tokenizer, 128)
    (example,), dropped = data.encode("custom", chats, tokenizer, 128)
    assert dropped == 0 and 90 <= example.prompt_length <= 98
    assert "Summarize the above" in tokenizer.decode(data.prompt_ids(example))


EMPTY = {"role": "assistant", "content": " "}
REFUSED = {
    "nothing": ({"text": "x"}, r"no column 'prompt' or 'messages' \(found 'text'\); give prompt"),
    "all null": ({"prompt": None}, r"no column 'prompt' or 'messages' \(found \); give"),
    "two prompts": (
        {"prompt": "x", "messages": [USER]},
        "prompt and messages together are ambiguous",
    ),
    "two responses": (
        {"prompt": "x", "completion": "y", "response": "z"},
        "prompt and completion and response together are ambiguous",
    ),
    "messages and response": (
        {"messages": [USER], "response": "z"},
        "response and messages together are ambiguous",
    ),
    "empty response": ({"prompt": "x", "response": " "}, "response is empty; write it, or leave"),
    "number": ({"prompt": 3}, "prompt must be text, got 3"),
    "number as completion": ({"prompt": "x", "completion": 3}, "completion must be text, got 3"),
    "half": ({"prompt": "\ud800"}, "prompt holds half of a surrogate pair"),
    "chat and text": ({"prompt": [USER], "completion": "y"}, "prompt is a list of messages and"),
    "text and chat": ({"prompt": "x", "completion": [ANSWER]}, "completion must be text, got"),
    "no message": ({"messages": []}, "messages is empty; give at least one message"),
    "text as messages": ({"messages": "x"}, "messages must be a list of messages, got 'x'"),
    "a message that is text": ({"messages": ["x"]}, "message 1 must be an object with role"),
    "no role": ({"messages": [{"content": "x"}]}, "message 1 must be an object with role"),
    "no content": ({"messages": [{"role": "user"}]}, "message 1: content must be text"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "message 1: content must be text",
    ),
    "empty turn": ({"messages": [USER, EMPTY]}, "message 2: the assistant's turn is empty"),
    "empty earlier turn": ({"messages": [USER, EMPTY, USER]}, "message 2: the assistant's turn"),
    "an answer alone": ({"messages": [ANSWER]}, "the assistant's message has no prompt before it"),
    "an answer that calls tools": (
        {"messages": [USER, ANSWER | {"tool_calls": [{"name": "x"}]}]},
        "the answer calls tools, which has no loss here",
    ),
    "tools": ({"messages": [USER, ANSWER], "tools": [{"name": "x"}]}, "tools are not supported"),
    "a completion of the user": (
        {"prompt": [USER], "completion": [USER]},
        "completion must end with a message of the assistant",
    ),
}


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_names_file_and_line(row, message, tmp_path):
    """One line that names file, line and column."""
    path = tmp_path / "custom" / "train.jsonl"
    path.parent.mkdir()
    good = {"prompt": "Hello"}
    path.write_text("".join(json.dumps(each) + "\n" for each in (good, row)))
    with pytest.raises(ValueError, match=message) as error:
        data.load_rows("custom", "train", tmp_path)
    assert str(error.value).startswith(f"{path}, line 2: ") and "\n" not in str(error.value)


def test_responses_in_some_rows_only_are_refused(tmp_path):
    path = tmp_path / "custom" / "train.jsonl"
    path.parent.mkdir()
    rows = [{"prompt": "x", "response": "y"}, {"prompt": "z"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 10))
    with pytest.raises(ValueError, match=r"line 2: no response, but there is one in .*, line 1;"):
        data.load_rows("custom", "train", tmp_path)


TEMPLATES = {
    "no template": (None, "a chat, but the tokenizer has no chat template; give texts"),
    "refused": (ALTERNATING, "the chat template refuses it: roles must alternate"),
    "not a prefix": (
        "{% if add_generation_prompt %}think{% endif %}{{ messages[-1].content }}",
        "renders the prompt otherwise once the answer follows",
    ),
}


@pytest.mark.parametrize(("template", "message"), TEMPLATES.values(), ids=TEMPLATES)
def test_templates_that_cannot_render_a_row(tokenizer, template, message):
    tokenizer.chat_template = template
    row = own_row({"messages": [USER, USER, ANSWER]}, "rows.jsonl, line 7")
    with pytest.raises(ValueError, match=f"rows.jsonl, line 7: .*{message}"):
        chat_tokens(row, tokenizer)


def test_a_dataset_that_load_dataset_opens(tmp_path):
    """A local folder stands for a Hub id: the same call; splits that it lacks are carved."""
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, USER, ANSWER]}] * 10
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = str(tmp_path)
    train = data.load_rows("custom", "train", dataset=name)
    assert len(train) == 16 and train[1] == OwnRow([USER, USER], "answer", "")
    assert len(data.load_rows("custom", "test", dataset=name)) == 2
    with pytest.raises(ValueError, match=r"no such folder: .*nowhere; as a Hub id"):
        data.load_rows("custom", "train", dataset=str(tmp_path / "nowhere"))


def test_a_dataset_without_a_train_split(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(ValueError, match=r"has no split train \(found test\)"):
        data.load_rows("custom", "train", dataset=str(tmp_path))


def test_a_prompt_file_names_the_line_that_is_wrong(tmp_path):
    file = tmp_path / "prompts.jsonl"
    for content, message in (
        (b'{"prompt": "a"}\n{"text": 1}\n', "line 2"),
        (b"\n", "no prompts"),
        (b"{", "line 1"),
        (b'{"prompt": 5}', "line 1"),
        (b'["prompt"]', "line 1"),
        (b"[" * 100_000, "line 1"),
        (b'{"prompt": "\xe9"}', "line 1"),
        (rb'{"prompt": "half a pair: \ud800"}', "line 1"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            data.read_prompts(file)
        assert "\n" not in str(caught.value)
    file.write_bytes(
        b'\xef\xbb\xbf{"prompt": "a\\nb"}\r\n\r\n{"messages": [{"role": "user", "content": "c"}]}'
    )
    assert data.read_prompts(file) == ["a\nb", [USER | {"content": "c"}]]
