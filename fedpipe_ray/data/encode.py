"""From a row of text to tokens and labels: templates, chat messages, classes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedpipe_ray.errors import UserError
from fedpipe_ray.settings import Data

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

    segments: list[tuple[str, bool]]
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


class Encoder:
    """Turns record batches into examples of at most `data.max_length` tokens. Raises UserError if the model cannot.

    tokenizer: of transformers. Prompt and response are tokenised apart, so that the boundary is generation's.
    """

    def __init__(self, data: Data, tokenizer: Any, classes: Sequence[str]) -> None:
        self.data = data
        self.tokenizer = tokenizer
        self.classes = {name: index for index, name in enumerate(classes)}
        self.templates = templates(data)
        if data.messages is not None and data.task == "causal" and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"data.messages: the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; "
                "use data.prompt and data.response, or a model with one"
            )
        self.before, self.after = self._special_tokens()

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text by itself."""
        plain, whole = (list(self.tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        return ([self.tokenizer.bos_token_id] if whole[:1] == [self.tokenizer.bos_token_id] else []), []

    # -- rows of text

    def rows(self, batch: pa.RecordBatch, numbers: Sequence[int]) -> list[Row]:
        """The rows of a batch of strings; `numbers` is what error messages call them. Raises UserError."""
        records = batch.to_pylist()
        if self.data.task == "classification":
            return [self._classified(record, number) for number, record in zip(numbers, records, strict=True)]
        if (column := self.data.messages) is not None:
            return [self._chat(record[column], number) for number, record in zip(numbers, records, strict=True)]
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

    def _chat(self, column: str, number: int) -> Row:
        where = f"data.messages: row {number}"
        messages = _messages(column, where)
        said = [message["content"].strip() or message.get("tool_calls") for message in messages]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and said[i]]
        identity = "\x1f".join(f"{message['role']} {message['content']}" for message in messages)
        if not turns:
            return Row([], identity, identity)
        full = self._rendered(messages, where)
        segments: list[tuple[str, bool]] = []
        at = 0
        for turn in turns:
            start, end = self._span(messages, turn, full, at)
            if not at <= start < end:
                raise UserError(f"{where}: the chat template does not show message {turn + 1}; use another model")
            segments += [(full[at:start], False), (full[start:end], True)]
            at = end
        prompt = "".join(text for text, _ in segments[:-1])
        if self.before == [self.tokenizer.bos_token_id]:  # whoever tokenises it adds that token
            prompt = prompt.removeprefix(self.tokenizer.bos_token)
        key = "\x1f".join(message["content"] for message in messages[: turns[0]])
        return Row(segments, key or identity, identity, prompt, messages[turns[-1]]["content"])

    def _span(self, messages: Sequence[Mapping[str, Any]], turn: int, full: str, at: int) -> tuple[int, int]:
        """Where the assistant's turn, with its end-of-turn token, lies in `full`, not before `at`.

        The rendering of a prefix of the messages is a prefix of `full` for most templates. Some change earlier turns
        (they drop the thinking of all but the last): there the text itself is looked for.
        """
        before = self._part(messages[:turn], generation=True)
        after = self._part(messages[: turn + 1])
        known = len(before) if before and full.startswith(before) else at
        if after and full.startswith(after) and at <= known < len(after):
            return known, len(after)
        content = messages[turn]["content"].strip()
        found = full.find(content, known)
        if found < 0:
            return -1, -1
        end = found + len(content)
        tail = after[after.rfind(content) + len(content) :] if content in after else ""
        end += _common(tail, full[end : end + len(tail)])
        return (known if known > at else found), end

    def _part(self, messages: Sequence[Mapping[str, Any]], generation: bool = False) -> str:
        """A rendering of the first messages; "" where the template refuses a conversation that ends there."""
        try:
            return self._template(messages, generation)
        except Exception:  # a template raises what it likes
            return ""

    def _rendered(self, messages: Sequence[Mapping[str, Any]], where: str) -> str:
        try:
            return self._template(messages)
        except Exception as error:
            roles = ", ".join(str(message["role"]) for message in messages[:8])
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{where}: the model's chat template refuses the roles {roles}: {reason}") from None

    def _template(self, messages: Sequence[Mapping[str, Any]], generation: bool = False) -> str:
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation))

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
        chat, eos = self.data.messages is not None, self.tokenizer.eos_token_id
        tokens = [] if chat else list(self.before)
        labels = [IGNORED] * len(tokens)
        for part, (_, counted) in zip(parts, row.segments, strict=True):
            tokens += part
            labels += part if counted else [IGNORED] * len(part)
        if not chat and eos is not None:
            tokens.append(eos)
            labels.append(eos)
        kept = np.array(labels[:limit], np.int32)
        if not (kept[1:] != IGNORED).any():  # nothing predicts the first token
            return None
        return Example(np.array(tokens[:limit], np.int32), kept, len(tokens) > limit)


def _common(one: str, other: str) -> int:
    """Characters at the start that are the same."""
    differ = (i for i, (a, b) in enumerate(zip(one, other)) if a != b)
    return next(differ, min(len(one), len(other)))


def _messages(column: str, where: str) -> list[dict[str, Any]]:
    """Messages with string content out of a column's JSON; none for "". Raises UserError that shows keys, no text."""
    try:
        messages = json.loads(column or "[]")
    except ValueError:
        raise UserError(f"{where} is no list of messages, nor JSON of one") from None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where} holds no list of messages; one is {{'role': ..., 'content': ...}}")
    result = []
    for message in messages:
        if not isinstance(message.get("role"), str) or "content" not in message:
            raise UserError(
                f"{where} has a message with the keys {', '.join(map(str, message))}; it needs role and content"
            )
        content = message["content"]
        if isinstance(content, list):  # parts, as multimodal sets have them
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
        kept = {
            key: value for key, value in message.items() if value is not None
        }  # a template asks whether a key is there
        result.append({**kept, "content": str(content or "")})
    return result
