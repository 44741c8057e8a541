"""From a row of text to tokens and labels: templates, chat messages, classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedpipe_ray.errors import UserError
from fedpipe_ray.settings import Data

from .chat import ChatTemplate, Segments, assistant_turns, parse_messages
from .docstrings import PROMPT, RESPONSE

IGNORED = -100  # the label of a token without loss
# Tokens of more characters than this on average do not occur; what lies beyond is not even tokenised.
CHARACTERS_A_TOKEN = 64

Tokens = NDArray[np.int32]
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


class Template:
    """Text with `{column}` fields; `{{` and `}}` stand for braces. Raises UserError for a brace without its partner."""

    def __init__(self, key: str, text: str) -> None:
        self.parts: list[tuple[str, str | None]] = []  # text, and the column after it
        self.columns: list[str] = []
        literal, end = "", 0
        for found in _FIELD.finditer(text):
            literal, end = literal + text[end : found.start()], found.end()
            if found[1] is not None:
                self.parts.append((literal, found[1]))
                self.columns.append(found[1])
                literal = ""
            elif len(found[0]) == 2:
                literal += found[0][0]
            else:
                raise UserError(
                    f"data.{key}: {found[0]!r} at character {found.start() + 1} of {text!r} stands alone; "
                    "a field is {column}, and {{ or }} a brace itself"
                )
        self.parts.append((literal + text[end:], None))

    def fill(self, row: Mapping[str, str]) -> str:
        """The text of a row."""
        return "".join(text if column is None else text + row[column] for text, column in self.parts)


def templates(data: Data) -> dict[str, Template]:
    """The templates of `data` by key: prompt and response, or text. Raises UserError for one without a column."""
    if data.task == "classification":
        texts = {"text": data.text}
    elif data.messages is not None:
        texts = {}
    else:
        texts = {"prompt": data.prompt or PROMPT, "response": data.response or RESPONSE}
        texts |= {key: given for key in texts if (given := getattr(data, key)) is not None}
    parsed = {key: Template(key, text) for key, text in texts.items() if text is not None}
    bare = [key for key, template in parsed.items() if key != "prompt" and not template.columns]
    if bare:
        raise UserError(
            f"data.{bare[0]}: {texts[bare[0]]!r} names no column, so all rows would be alike; write one as {{column}}"
        )
    return parsed


def needed_columns(data: Data) -> list[str]:
    """The columns a row is made of, each once."""
    columns = [column for template in templates(data).values() for column in template.columns]
    extra = data.label if data.task == "classification" else data.messages
    return list(dict.fromkeys([*columns, *([extra] if extra is not None else [])]))


@dataclass(frozen=True, slots=True)
class Row:
    """One row as text. segments: pieces of it, and whether the loss counts them; none if there is nothing to learn.

    key: rows of one key share a split; identity: what must not stand in train and in another split.
    """

    segments: Segments
    key: str
    identity: str
    prompt: str = ""
    response: str = ""
    label: int = IGNORED


@dataclass(frozen=True, slots=True)
class Example:
    """input_ids: [tokens]; labels: [tokens], or [1] for a classifier; truncated: whether tokens were cut off."""

    input_ids: Tokens
    labels: Tokens
    truncated: bool


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer of transformers puts before and after a text by itself."""
    plain, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return ([tokenizer.bos_token_id] if whole[:1] == [tokenizer.bos_token_id] else []), []


class Encoder:
    """Turns record batches into examples of at most `data.max_length` tokens. Raises UserError if the model cannot.

    tokenizer: of transformers. Prompt and response are tokenised apart, so that the boundary is generation's.
    """

    def __init__(self, data: Data, tokenizer: Any, classes: Sequence[str]) -> None:
        self.data = data
        self.tokenizer = tokenizer
        self.classes = {name: index for index, name in enumerate(classes)}
        self.templates = templates(data)
        chats = data.messages is not None and data.task == "causal"
        self.chat = ChatTemplate(tokenizer) if chats else None
        self.before, self.after = special_tokens(tokenizer)

    # -- rows of text

    def rows(self, batch: pa.RecordBatch, numbers: Sequence[int]) -> list[Row]:
        """The rows of a batch of strings; `numbers` is what error messages call them. Raises UserError."""
        records = batch.to_pylist()
        if self.data.task == "classification":
            return [self._classified(record, number) for number, record in zip(numbers, records, strict=True)]
        if self.chat is not None:
            columns = batch.column(str(self.data.messages)).to_pylist()
            return [self._chatted(self.chat, *row) for row in zip(columns, numbers, strict=True)]
        return [self._answered(record) for record in records]

    def _answered(self, record: Mapping[str, str]) -> Row:
        prompt, response = self.templates["prompt"].fill(record), self.templates["response"].fill(record)
        both = f"{prompt}\x1f{response}"
        key = prompt if self.templates["prompt"].columns else both  # a constant prompt would make one split of all
        return Row([(prompt, False), (response, True)] if response.strip() else [], key, both, prompt, response)

    def _classified(self, record: Mapping[str, str], number: int) -> Row:
        text, name = self.templates["text"].fill(record), record[str(self.data.label)]
        if name not in self.classes:
            raise UserError(f"data.label: row {number} has {name!r}; the classes are {', '.join(self.classes)}")
        return Row([(text, False)] if text.strip() else [], text, text, text, name, self.classes[name])

    def _chatted(self, chat: ChatTemplate, column: str, number: int) -> Row:
        where = f"data.messages: row {number}"
        messages = parse_messages(column, where)
        segments = chat.segments(messages, where)
        identity = "\x1f".join(f"{message['role']} {message['content']}" for message in messages)
        if not segments:
            return Row([], identity, identity)
        turns = assistant_turns(messages)
        prompt = "".join(text for text, _ in segments[:-1])
        if self.before == [self.tokenizer.bos_token_id]:  # whoever tokenises it adds that token
            prompt = prompt.removeprefix(self.tokenizer.bos_token)
        key = "\x1f".join(message["content"] for message in messages[: turns[0]])
        return Row(segments, key or identity, identity, prompt, messages[turns[-1]]["content"])

    # -- rows of tokens

    def examples(self, rows: Sequence[Row]) -> list[Example | None]:
        """An example a row, or None where nothing of what the loss counts is left."""
        longest = self.data.max_length * CHARACTERS_A_TOKEN
        texts = [text[:longest] for row in rows for text, _ in row.segments]
        if not texts:
            return [None] * len(rows)
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )  # fmt: skip
        ids = iter(encoded["input_ids"])
        return [self._example(row, [next(ids) for _ in row.segments]) for row in rows]

    def _example(self, row: Row, parts: Sequence[list[int]]) -> Example | None:
        """parts: the tokens of the row's segments."""
        limit = self.data.max_length
        if not any(parts):
            return None
        if self.data.task == "classification":
            room = limit - len(self.before) - len(self.after)
            tokens = [*self.before, *parts[0][:room], *self.after]
            return Example(np.array(tokens, np.int32), np.array([row.label], np.int32), len(parts[0]) > room)
        eos = self.tokenizer.eos_token_id
        tokens = [] if self.chat else list(self.before)  # a chat template writes its special tokens itself
        labels = [IGNORED] * len(tokens)
        for part, (_, counted) in zip(parts, row.segments, strict=True):
            tokens += part
            labels += part if counted else [IGNORED] * len(part)
        if self.chat is None and eos is not None:
            tokens.append(eos)
            labels.append(eos)
        kept = np.array(labels[:limit], np.int32)
        if not (kept[1:] != IGNORED).any():  # nothing predicts the first token
            return None
        return Example(np.array(tokens[:limit], np.int32), kept, len(tokens) > limit)
