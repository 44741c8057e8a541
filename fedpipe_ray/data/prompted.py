"""A user's words as a row of the run's data would be read: what a model is asked, up to where its answer begins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fedpipe_ray.errors import UserError
from fedpipe_ray.settings import Data

from .chat import parse_messages
from .encode import Encoder


class Prompter:
    """From a prompt to its text and tokens. raw: the prompt is the text."""

    def __init__(self, data: Data, tokenizer: Any, classes: Sequence[str], raw: bool) -> None:
        self.tokenizer, self.raw = tokenizer, raw
        self.encoder = Encoder(data, tokenizer, classes)
        self.template = self.encoder.templates.get("text" if data.task == "classification" else "prompt")

    def text(self, prompt: str) -> str:
        """The prompt in the run's template: its one column, or a JSON object of all. Raises UserError.

        Of chat messages: the user's turn, or a JSON list of messages, up to where the assistant's begins.
        """
        if self.raw:
            return prompt
        if self.encoder.chat is not None:
            return self._chat(prompt)
        assert self.template is not None, "a task without messages has one"
        columns = list(dict.fromkeys(self.template.columns))
        row = _row(prompt) if prompt.lstrip().startswith("{") else None
        if row is not None and row.keys() >= set(columns):
            return self.template.fill(row)
        if len(columns) == 1:
            return self.template.fill({columns[0]: prompt})
        shown = json.dumps(dict.fromkeys(columns, "..."))
        what = f"has the columns {', '.join(columns)}" if columns else "names no column"
        remedy = f"write --prompt '{shown}', or use --raw" if columns else "use --raw"
        raise UserError(f"the run's template {what}; {remedy} for a prompt as it is")

    def _chat(self, prompt: str) -> str:
        given = [{"role": "user", "content": prompt}]
        if prompt.lstrip().startswith("["):
            given = [dict(one) for one in parse_messages(prompt, "--prompt")]
        try:
            return str(self.tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template raises what it likes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"the model's chat template refuses the prompt: {reason}") from None

    def tokens(self, text: str) -> list[int]:
        """As in training: special tokens before it (a chat template writes its own), and of a classifier after it."""
        plain = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        chat = self.encoder.chat is not None and not self.raw
        before = [] if chat else self.encoder.before
        after = self.encoder.after if self.encoder.data.task == "classification" else []
        if not plain:
            raise UserError(f"the model's tokenizer finds no token in {text!r}; write another prompt")
        return [*before, *plain, *after]


def _row(prompt: str) -> dict[str, str] | None:
    """A JSON object of text; None if it is none, as a prompt of code may be."""
    try:
        found = json.loads(prompt)
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    return {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}
