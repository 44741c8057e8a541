"""Chat messages into pieces of text, each with whether the loss counts it: the assistant's turns, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedpipe_ray.errors import UserError

Message = Mapping[str, Any]
Segments = list[tuple[str, bool]]  # text, whether the loss counts it


class ChatTemplate:
    """The chat template of a tokenizer. Raises UserError if it has none.

    A template is a program that renders a whole conversation; where a turn begins and ends is not in it. The rendering
    of the first messages is mostly the beginning of the whole rendering, which tells. Some templates treat the last
    message differently (they add its thinking, or an end of the conversation): there the turn's own text is looked for.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"data.messages: the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; "
                "use data.prompt and data.response, or a model with one"
            )
        special = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self.special = re.compile("(" + "|".join(map(re.escape, special)) + ")") if special else re.compile("($)")

    def segments(self, messages: Sequence[Message], where: str) -> Segments:
        """The conversation up to the end of its last assistant turn; [] if it has none.

        Raises UserError if the template refuses the messages, or does not show an assistant turn.
        """
        turns = assistant_turns(messages)
        if not turns:
            return []
        full, at = self._rendered(messages, where), 0
        segments: Segments = []
        for turn in turns:
            start, end = self._span(messages, turn, full, at)
            if not at <= start < end:
                raise UserError(f"{where}: the chat template does not show message {turn + 1}; use another model")
            segments += [(full[at:start], False), (full[start:end], True)]
            at = end
        return segments

    def _span(self, messages: Sequence[Message], turn: int, full: str, at: int) -> tuple[int, int]:
        """Where a turn and its end-of-turn token lie in `full`, not before `at`; (-1, -1) if they are not found."""
        start = self._start(messages, turn, full)
        after = self._part(messages[: turn + 1])
        content = str(messages[turn]["content"]).strip()
        found = full.find(content, at if start is None else start) if content else -1
        if after and full.startswith(after):
            return found if start is None else start, len(after)
        if found < 0:
            return -1, -1
        end = found + len(content)
        tail = after[after.rfind(content) + len(content) :] if content in after else ""
        return found if start is None else start, end + self._common(tail, full[end:])

    def _start(self, messages: Sequence[Message], turn: int, full: str) -> int | None:
        """Where generation of a turn begins in `full`, or None if renderings without the turn do not tell."""
        before = self._part(messages[:turn], generation=True)
        if before and full.startswith(before):
            return len(before)
        plain = self._part(messages[:turn])
        if plain and full.startswith(plain) and before.startswith(plain):
            return len(plain) + self._common(before[len(plain) :], full[len(plain) :])
        return None

    def _common(self, text: str, other: str) -> int:
        """How much of `text` begins `other` too, without cutting a special token."""
        length = 0
        for piece in self.special.split(text):
            if not other.startswith(piece, length):
                break
            length += len(piece)
        return length

    def _part(self, messages: Sequence[Message], generation: bool = False) -> str:
        """A rendering of the first messages; "" where the template refuses a conversation that ends there."""
        try:
            return self._apply(messages, generation)
        except Exception:  # a template raises what it likes
            return ""

    def _rendered(self, messages: Sequence[Message], where: str) -> str:
        try:
            return self._apply(messages, generation=False)
        except Exception as error:
            roles = ", ".join(str(message["role"]) for message in messages[:8])
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{where}: the model's chat template refuses the roles {roles}: {reason}") from None

    def _apply(self, messages: Sequence[Message], generation: bool) -> str:
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation))


def assistant_turns(messages: Sequence[Message]) -> list[int]:
    """The numbers of the messages in which the assistant says something or calls a tool."""
    said = [str(message["content"]).strip() or message.get("tool_calls") for message in messages]
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and said[i]]


def parse_messages(column: str, where: str) -> list[Message]:
    """Messages with string content out of a column's JSON; none for "". Raises UserError that shows keys, no text."""
    try:
        messages = json.loads(column or "[]")
    except ValueError:
        raise UserError(f"{where} is no list of messages, nor JSON of one") from None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where} holds no list of messages; one is {{'role': ..., 'content': ...}}")
    result: list[Message] = []
    for message in messages:
        if not isinstance(message.get("role"), str) or "content" not in message:
            raise UserError(
                f"{where} has a message with the keys {', '.join(map(str, message))}; it needs role and content"
            )
        content = message["content"]
        if isinstance(content, list):  # parts, as multimodal sets have them
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
        kept = {key: value for key, value in message.items() if value is not None}  # templates ask if a key is there
        result.append({**kept, "content": str(content or "")})
    return result
