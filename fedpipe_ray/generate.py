"""`fedpipe generate`: what the base model and the tuned one answer to prompts, beside one another."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import StoppingCriteria, StoppingCriteriaList

from .batches import autocast
from .config import edge_data
from .data.prompted import Prompter
from .display import Display
from .errors import UserError
from .evaluate import end_tokens
from .opened import Opened, opened
from .process import set_up_logging
from .site import SERVER

Advance = Callable[[int], None]  # told how many tokens there are by now


@dataclass(frozen=True)
class Answer:
    """A continuation. tokens: how many were made; ended: by the model's end of text, not for want of room."""

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Beside:
    """What base and tuned model make of one prompt: an Answer each, or the probability of each class by name."""

    prompt: str
    text: str
    base: Answer | dict[str, float]
    tuned: Answer | dict[str, float]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0: the likeliest; else drawn from softmax(logits / temperature)."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


def command(options: argparse.Namespace) -> None:
    """Shows or prints what both models make of the prompts. Raises UserError."""
    prompts = prompts_of(options.prompt, options.prompts)
    display = Display("none" if options.json else "auto")
    set_up_logging(display, None)
    with opened(options.folder, options.edge) as one:
        display.note(one.status)
        limit = options.max_new_tokens or one.run.evaluate.max_new_tokens
        found = answered(one, prompts, Sampling(limit, options.temperature, options.seed), options.raw, display)
    if options.json:
        print(json.dumps([asdict(pair) for pair in found], indent=2, ensure_ascii=False))
        return
    for pair in found:
        show(pair, display)


def prompts_of(given: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line and of a file, a line each. Raises UserError."""
    prompts = list(given)
    if file is not None:
        try:
            prompts += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not prompts:
        raise UserError(f"--prompts {file}: holds no prompt" if file else "no prompt; write --prompt TEXT")
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty; write --prompt TEXT")
    return prompts


def answered(one: Opened, prompts: Sequence[str], how: Sampling, raw: bool, display: Display) -> list[Beside]:
    """Both models' answers to every prompt; the base model's come first, for a tuned one may change it in place.

    Raises UserError for a prompt that is empty, does not fit the template, or is longer than the model's context.
    """
    site, run = one.site, one.run
    display.note(f"loading {run.model.name}")
    data = run.data if site.name == SERVER else edge_data(run, site.name, site.profile)
    prompter = Prompter(data, one.base.tokenizer, site.classes, raw)
    texts = [prompter.text(prompt) for prompt in prompts]
    rows = [prompter.tokens(text) for text in texts]
    classifier, limit = site.task == "classification", one.context
    for prompt, row in zip(prompts, rows, strict=True):
        check_room(prompt, len(row), limit, classifier)
    makes: dict[str, list[Any]] = {}
    for name in ("base", "tuned"):
        model = one.base.model if name == "base" else one.weights.on(one.base)
        model.eval()
        with display.task(f"{name} model") as bar, torch.no_grad(), autocast(one.base.device, run.local.precision):
            if classifier:
                makes[name] = [probabilities(model, one, row) for row in rows]
                continue
            total, made = len(rows) * how.max_new_tokens, []
            for number, row in enumerate(rows):
                room = how.max_new_tokens if limit is None else min(how.max_new_tokens, limit - len(row))
                done = number * how.max_new_tokens
                made.append(continued(model, one, row, room, how, partial(_told, bar, done, total)))
            makes[name] = made
    return [Beside(*each) for each in zip(prompts, texts, makes["base"], makes["tuned"], strict=True)]


def _told(bar: Callable[..., None], done: int, total: int, count: int) -> None:
    bar(done + count, total, "tokens")


def check_room(prompt: str, tokens: int, limit: int | None, classifier: bool) -> None:
    """Raises UserError if the model has no positions for a prompt and, unless it is a classifier, one new token."""
    over = 0 if limit is None else tokens + (not classifier) - limit
    if over > 0:
        start = prompt if len(prompt) <= 40 else f"{prompt[:40]}..."
        raise UserError(
            f"the prompt {start!r} has {tokens} tokens, {over} more than the model's context of {limit} has room for; "
            "shorten it"
        )


class _Counting(StoppingCriteria):
    """Tells how many tokens there are, and never stops."""

    def __init__(self, start: int, advance: Advance) -> None:
        self.start, self.advance = start, advance

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.advance(max(0, input_ids.shape[1] - self.start))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def continued(model: Any, one: Opened, row: Sequence[int], room: int, how: Sampling, advance: Advance) -> Answer:
    """What a model writes after `row`, up to its end of text or `room` tokens."""
    base = one.base
    ids = torch.tensor([row], device=base.device)  # [1, length]
    ends = end_tokens(model, base.tokenizer)
    sampling: dict[str, Any] = {"do_sample": False}
    if how.temperature > 0:
        sampling = {"do_sample": True, "temperature": how.temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(how.seed)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, pad_token_id=base.pad_id,
        eos_token_id=ends or None, stopping_criteria=StoppingCriteriaList([_Counting(len(row), advance)]), **sampling,
    )  # fmt: skip
    new = out[0, len(row) :].tolist()
    ended = bool(new) and new[-1] in ends
    return Answer(str(base.tokenizer.decode(new, skip_special_tokens=True)), len(new), ended)


def probabilities(model: Any, one: Opened, row: Sequence[int]) -> dict[str, float]:
    """The probability of every class, by name."""
    ids = torch.tensor([row], device=one.base.device)  # [1, length]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]  # [classes]
    return dict(zip(one.site.classes, logits.float().softmax(-1).tolist(), strict=True))


# -- on the screen


def show(pair: Beside, display: Display) -> None:
    """One prompt: panels beside one another on a terminal, plain lines elsewhere."""
    console = display.console
    if not console.is_terminal:
        for line in in_lines(pair):
            display.note(line)
        return
    width = max(20, (min(console.width, 160) - 1) // 2)
    console.print(Panel(Text(printable(pair.text)), title="prompt", title_align="left"))
    panels = [Panel(body(made), title=title(name, made), width=width, title_align="left") for name, made in both(pair)]
    table = Table.grid(padding=(0, 0))
    table.add_row(*panels)
    console.print(table)


def both(pair: Beside) -> Iterator[tuple[str, Answer | dict[str, float]]]:
    """(name, what it made) of both models."""
    yield "base", pair.base
    yield "tuned", pair.tuned


def title(name: str, made: Answer | dict[str, float]) -> str:
    """Which model, and whether its text ended."""
    return f"{name}, cut off after {made.tokens} tokens" if isinstance(made, Answer) and not made.ended else name


def body(made: Answer | dict[str, float]) -> RenderableType:
    """Text, or classes with their probabilities, the likeliest first."""
    if isinstance(made, Answer):
        return Text(printable(made.text).strip() or "(nothing)")
    table = Table.grid(padding=(0, 2))
    for label, share in ranked(made):
        table.add_row(Text(printable(label)), f"{share:.3f}", "█" * round(12 * share))
    return table


def ranked(made: dict[str, float]) -> list[tuple[str, float]]:
    """Classes, the likeliest first."""
    return sorted(made.items(), key=lambda item: -item[1])


def in_lines(pair: Beside) -> Iterator[str]:
    """The same without a terminal."""
    yield f"prompt: {printable(pair.text)}"
    if isinstance(pair.base, dict) and isinstance(pair.tuned, dict):
        width = max(map(len, pair.base))
        yield f"{'':{width}}   base  tuned"
        for label, share in ranked(pair.tuned):
            yield f"{printable(label):{width}}  {pair.base[label]:.3f}  {share:.3f}"
    else:
        for name, made in both(pair):
            assert isinstance(made, Answer), "both models are of one task"
            yield f"{title(name, made)}: {printable(made.text).strip() or '(nothing)'}"
    yield ""


def printable(text: str) -> str:
    """Without what a terminal would obey: a model may write escape sequences."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\ufffd" for sign in text)
