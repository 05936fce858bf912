"""Rows of your own: prompts with or without responses, texts or chats.

The forms are those of TRL and of chat APIs; a column that is null counts as missing.

    prompt + completion (or response)            two texts, or two lists of messages
    messages that end with the assistant         the last turn is the response
    prompt alone, messages that end otherwise    the target writes the response

A message is {"role": ..., "content": ...}. Chats go through the tokenizer's own chat template,
generation prompt included. A text prompt is used as it is.
"""

import re
from typing import NamedTuple

from jinja2 import TemplateError

FORMS = "give prompt, prompt + completion (or response), or messages"


class OwnRow(dict):
    """A row {"prompt", "response"}: a text or a chat (a list of messages), and a text or None (the
    target writes it). `source`: the file and line, which errors name."""

    def __init__(self, prompt: str | list[dict], response: str | None, source: str):
        super().__init__(prompt=prompt, response=response)
        self.source = source


def own_row(columns: dict, source: str) -> OwnRow:
    """A row from its columns. Raises ValueError, naming the source and the column, where they are
    ambiguous, lack something or are of another type."""
    columns = {name: value for name, value in columns.items() if value is not None}
    if columns.get("tools"):
        raise ValueError(f"{source}: tools are not supported; leave such rows out")
    present = [name for name in ("prompt", "completion", "response", "messages") if name in columns]
    if "prompt" not in present and "messages" not in present:
        names = ", ".join(map(repr, columns))
        raise ValueError(
            f"{source}: no column 'prompt' or 'messages' (found {names:.200}); {FORMS}"
        )
    if present not in (["messages"], ["prompt"], ["prompt", "completion"], ["prompt", "response"]):
        names = " and ".join(present)
        raise ValueError(f"{source}: {names} together are ambiguous; {FORMS}")
    if "messages" in columns and not isinstance(columns["messages"], list):
        raise ValueError(
            f"{source}: messages must be a list of messages, got {columns['messages']!r:.60}"
        )
    prompt, *rest = [columns[name] for name in present]
    if isinstance(prompt, list):
        return _chat_row(present, prompt, rest, source)
    for name in present:
        check_text(columns[name], f"{source}: {name}", "text")
    if rest and not rest[0].strip():
        raise ValueError(
            f"{source}: {present[1]} is empty; write it, or leave the column out of all rows and "
            "the target writes it"
        )
    return OwnRow(prompt, rest[0] if rest else None, source)


def _chat_row(present: list[str], messages: list, rest: list, source: str) -> OwnRow:
    if rest and not isinstance(rest[0], list):
        raise ValueError(
            f"{source}: prompt is a list of messages and {present[1]} is none; "
            "make both texts or both lists of messages"
        )
    chat = [*messages, *(rest[0] if rest else [])]
    for number, message in enumerate(chat, 1):
        _check_message(message, f"{source}: message {number}")
    if not chat:
        raise ValueError(f"{source}: {present[0]} is empty; give at least one message")
    if chat[-1]["role"] != "assistant":
        if rest:
            raise ValueError(f"{source}: {present[1]} must end with a message of the assistant")
        return OwnRow(chat, None, source)
    if chat[-1].get("tool_calls"):
        raise ValueError(f"{source}: the answer calls tools, which has no loss here; leave it out")
    if len(chat) == 1:
        raise ValueError(f"{source}: the assistant's message has no prompt before it")
    return OwnRow(chat[:-1], chat[-1]["content"], source)


def _check_message(message, place: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{place} must be an object with role and content, got {message!r:.60}")
    content = message.get("content")
    check_text(content, f"{place}: content", "text (images and tool calls have no loss here)")
    if message["role"] == "assistant" and not content.strip():
        raise ValueError(f"{place}: the assistant's turn is empty; remove it or the row")


def check_text(value, place: str, kind: str) -> None:
    """Raises ValueError unless this is text that a tokenizer takes."""
    if not isinstance(value, str):
        raise ValueError(f"{place} must be {kind}, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can say one, and no tokenizer takes it
        raise ValueError(f"{place} holds half of a surrogate pair, {value!r:.60}") from error


def check_responses(rows: list[OwnRow]) -> None:
    """Raises ValueError where some rows of a split have a response and others have none."""
    written = {row["response"] is not None: row.source for row in reversed(rows)}
    if len(written) == 2:
        raise ValueError(
            f"{written[False]}: no response, but there is one in {written[True]}; give all rows "
            "one, or none, and the target writes them"
        )


# Tokens


class RowTokens(NamedTuple):
    """The token ids of a row; `turns`: where, [start, end), earlier turns of the assistant are in
    the prompt that bear loss too."""

    prompt: list[int]
    response: list[int]  # with the token that ends it; [] where there is none
    turns: tuple = ()


def chat_tokens(row: OwnRow, tokenizer) -> RowTokens:
    """The tokens of a chat as the template renders it. The response ends with the token that ends
    the assistant's turn. Earlier turns of the assistant bear loss where the template marks them
    ({% generation %}).

    Raises ValueError, naming the row's source, for a tokenizer without a template, messages that
    it refuses, and one that renders a prompt otherwise once its answer follows.
    """
    prompt = _render(row, row["prompt"], tokenizer, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    turns = _marked_turns(row["prompt"], tokenizer)
    if row["response"] is None:
        return RowTokens(ids, [], turns)
    text = _render(row, with_answer(row["prompt"], row["response"]), tokenizer)
    if not text.startswith(prompt):
        raise ValueError(
            f"{row.source}: the chat template renders the prompt otherwise once the answer "
            "follows; render it yourself and give prompt and completion as texts"
        )
    answer = text[len(prompt) :]
    return RowTokens(ids, _until_turn_ends(answer, row["response"], tokenizer), turns)


def with_answer(messages: list[dict], answer: str) -> list[dict]:
    return [*messages, {"role": "assistant", "content": answer}]


def _until_turn_ends(text: str, content: str, tokenizer) -> list[int]:
    """The tokens of a rendered answer up to the first special one after its content, which ends
    the turn; where there is none, all of them and the tokenizer's end token."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoding["input_ids"]
    content_end = max(text.rfind(content.strip()), 0) + len(content.strip())
    added = tokenizer.added_tokens_decoder.items()
    special = {number for number, token in added if token.special} | set(tokenizer.all_special_ids)
    for i, (start, _) in enumerate(encoding["offset_mapping"]):
        if start >= content_end and ids[i] in special:
            return ids[: i + 1]
    return [*ids, tokenizer.eos_token_id]


def text_tokens(texts: list[str], tokenizer) -> list[list[int]]:
    """Tokens of prompts with the start token, where the tokenizer puts one, and without the end
    token that some put."""
    end = [tokenizer.eos_token_id]
    return [ids[:-1] if ids[-1:] == end else ids for ids in tokenizer(texts)["input_ids"]]


def prompt_tokens(prompt: str | list[dict], tokenizer, chat: bool = False) -> list[int]:
    """The tokens of a prompt: a text as `text_tokens` has it, a list of messages, or with `chat`
    any text as a user's message, as the chat template renders it. Raises ValueError where there
    is no template."""
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        return text_tokens([prompt], tokenizer)[0]
    return chat_tokens(OwnRow(prompt, None, "the prompt"), tokenizer).prompt


def _render(row: OwnRow, messages: list[dict], tokenizer, **options) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            f"{row.source}: a chat, but the tokenizer has no chat template; give texts as prompt "
            "and completion, or a model that has one"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as error:
        raise ValueError(f"{row.source}: the chat template refuses it: {error}") from error


def _marked_turns(messages: list[dict], tokenizer) -> tuple:
    """The spans of the assistant's turns in a prompt's tokens, where the template marks them."""
    if not re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        return ()
    encoding = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = [0, *encoding["assistant_masks"], 0]
    borders = [i for i in range(len(mask) - 1) if mask[i] != mask[i + 1]]
    return tuple(zip(borders[::2], borders[1::2], strict=True))


def turn_end(tokenizer) -> int:
    """The token that ends a turn of the assistant: it ends decoding of a chat too."""
    question = [{"role": "user", "content": "Question"}]
    row = OwnRow(question, "Answer", "a chat of two turns")
    text = _render(row, with_answer(question, "Answer"), tokenizer)
    return _until_turn_ends(text, "Answer", tokenizer)[-1]
