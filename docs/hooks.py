"""Parts of the pages that MkDocs makes from the code, so that no copy of a setting, an option or a docstring grows old.

A page says where, in a line of its own:

    <!-- methods -->                  all methods, a line each, with links to their pages
    <!-- source NAME -->              what the module of a method says: paper, equations, what is ours
    <!-- settings NAME -->            a method's settings
    <!-- class MODULE:CLASS -->       the keys of any dataclass of settings
    <!-- configuration -->            every section of a run file
    <!-- commands -->                 every command with its options
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import inspect
import json
import os
import re
import sys
import types
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fedpipe_ray import quantity  # noqa: E402
from fedpipe_ray.arguments import parser  # noqa: E402
from fedpipe_ray.methods import listing, method_class  # noqa: E402
from fedpipe_ray.section import Section  # noqa: E402
from fedpipe_ray.settings import Data, Run  # noqa: E402

MARK = re.compile(r"^<!-- (methods|source|settings|class|configuration|commands)(?: (\S+))? -->$", re.M)
ARXIV = re.compile(r"(?<!\[)\barXiv (\d{4}\.\d{4,5})")
UNITS = {
    quantity.Bytes: "bytes", quantity.BitsPerSecond: "bit/s", quantity.Seconds: "seconds",
    quantity.FlopPerSecond: "FLOP/s", quantity.Hertz: "hertz",
}  # fmt: skip


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this with the text of every page. Raises KeyError for a mark that is not there."""
    return cited(MARK.sub(lambda found: "\n".join(MAKE[found[1]](found[2])), markdown))


def cited(text: str) -> str:
    """Papers as links, in running text; code stays as it is."""
    parts = re.split(r"(^```.*?^```$|`[^`\n]+`|^(?: {4}|\t).*$)", text, flags=re.M | re.S)
    return "".join(
        part if index % 2 else ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", part)
        for index, part in enumerate(parts)
    )


def methods(_: str | None = None) -> Iterator[str]:
    """A table of METHODS."""
    yield "| `method.name` | what it does |\n| --- | --- |"
    for line in listing():
        name, _, text = line.partition(" ")
        yield f"| [`{name}`]({name}.md) | {plain(text.strip())} |"


def source(name: str) -> Iterator[str]:
    """The docstring of a method's module; its indented lines are equations, and stay as they are."""
    text = inspect.cleandoc(sys.modules[method_class(name).__module__].__doc__ or "")
    for line in text.splitlines():
        yield line if line.startswith("    ") else plain(line)


def settings(name: str) -> Iterator[str]:
    """A table of a method's settings."""
    cls: Any = method_class(name)  # a dataclass, which the protocol cannot say
    if not dataclasses.fields(cls):
        yield "None but `name`."
        return
    yield from table(cls)


def of_class(path: str) -> Iterator[str]:
    """A table of `module:Class`."""
    module, _, name = path.partition(":")
    yield from table(getattr(import_module(module), name))


def configuration(_: str | None = None) -> Iterator[str]:
    """A heading and a table for each section of a run file, the deeper ones behind the one that has them."""
    yield from sections(Run, "")


def sections(cls: type, key: str) -> Iterator[str]:
    """A section of a run file and those in it. key: dotted."""
    depth = 2 if key.count(".") == 0 else 3
    yield f"\n{'#' * depth} {f'`{key}`' if key else 'The whole file'}\n"
    yield from table(cls, key)
    for field, hint in hints(cls):
        for inner in inner_sections(hint):
            path = inner_key(key, field, hint)
            if inner is Data and key:
                yield f"\n### `{path}`\n\nThe keys of [`data`](#data)."
            else:
                yield from sections(inner, path)


def inner_key(key: str, field: dataclasses.Field[Any], hint: Any) -> str:
    """The dotted key of a section in the section `key`; of one that stands there by name, with NAME."""
    return ".".join(filter(None, [key, field.name, "NAME" if get_origin(hint) is dict else ""]))


def inner_sections(hint: Any) -> Iterator[type]:
    """The sections that a type consists of."""
    if isinstance(hint, type) and issubclass(hint, Section):
        yield hint
    for argument in get_args(hint):
        yield from inner_sections(argument)


def hints(cls: Any) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a dataclass with their types."""
    known = get_type_hints(cls, include_extras=True)
    return [(field, known[field.name]) for field in dataclasses.fields(cls)]


def table(cls: Any, key: str | None = None) -> Iterator[str]:
    """What the docstring says of the whole, and a row a field. key: of a section whose own are on this page."""
    lead, told = explained(cls)
    yield f"{lead}\n\n| key | type | default | what it is |\n| --- | --- | --- | --- |"
    for field, hint in hints(cls):
        words = told.get(field.name) or elsewhere(field.name, lead, told)
        kind = typed(hint)
        if key is not None and any(inner_sections(hint)):
            below = re.sub(r"[^\w-]", "", inner_key(key, field, hint)).lower()  # as MkDocs names a heading
            kind = kind.replace("keys", f"[keys](#{below})")
        yield f"| `{field.name}` | {kind} | {default(field)} | {words} |"


def elsewhere(name: str, lead: str, told: dict[str, str]) -> str:
    """Where a field is explained that has no words of its own: with another one, or above the table; "" if nowhere."""
    as_word = re.compile(rf"(?<![a-z_]){plain(name).replace(chr(92), chr(92) * 2)}(?![a-z_])|`{name}`")
    with_other = next((other for other, words in told.items() if as_word.search(words)), None)
    return f"see `{with_other}`" if with_other else "see above" if as_word.search(lead) else ""


def explained(cls: Any) -> tuple[str, dict[str, str]]:
    """(what the docstrings of a class and its bases say of the whole, what they say of each field).

    A docstring explains fields as `name: text` or `name, other: text`, at the start of a sentence or after a semicolon.
    """
    names, lead, told = {field.name for field in dataclasses.fields(cls)}, "", dict[str, str]()
    one = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    label = re.compile(rf"(?:^|(?<=[.;)] ))((?:{one})(?: \([^)]*\))?(?:, (?:{one})(?: \([^)]*\))?)*): ")
    for kind in reversed([kind for kind in cls.__mro__ if dataclasses.is_dataclass(kind)]):
        text = " ".join(inspect.cleandoc(kind.__doc__ or "").split())
        first, *rest = label.split(text)
        lead = first.strip() or lead
        for labels, words in zip(rest[::2], rest[1::2], strict=True):
            aside = dict(re.findall(r"(\w+) \(([^)]*)\)", labels))
            for name in re.sub(r" \([^)]*\)", "", labels).split(", "):
                note = f" ({aside[name]})" if name in aside else ""
                told[name] = plain(sentence(words) + note)
    return plain(lead), told


def sentence(words: str) -> str:
    """An explanation that was part of a longer sentence, as one of its own."""
    return words.strip().rstrip(";").rstrip(".").strip()


def typed(hint: Any) -> str:
    """A type in the words of a run file."""
    if hint in UNITS:
        return UNITS[hint]
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return typed(parts[0])
    if origin is Literal:
        return " ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return ", ".join("null" if part is type(None) else typed(part) for part in parts)
    if origin is list:
        return f"list of {typed(parts[0])}"
    if origin is tuple:
        return f"[{', '.join(map(typed, parts))}]"
    if origin is dict:
        return f"name: {typed(parts[1])}"
    if isinstance(hint, type) and issubclass(hint, Section):
        return "keys"
    return {str: "text", int: "whole number", float: "number", bool: "true, false", Any: "anything"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


def default(field: dataclasses.Field[Any]) -> str:
    """A field's default as it would stand in a run file."""
    make = field.default_factory
    value = field.default if make is dataclasses.MISSING else make()
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, Section):
        return ""
    return f"`{value:g}`" if isinstance(value, float) else f"`{json.dumps(value)}`"


def plain(text: str) -> str:
    """Text of a docstring in which nothing is Markdown but what stands in backquotes."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(
        part.replace("|", "\\|") if index % 2 else re.sub(r"([*_|\[\]])", r"\\\1", html.escape(part, quote=False))
        for index, part in enumerate(parts)
    )


def commands(_: str | None = None) -> Iterator[str]:
    """What argparse says of every command."""
    os.environ["COLUMNS"] = "100"
    top = parser()
    (every,) = [action for action in top._actions if isinstance(action, argparse._SubParsersAction)]
    about = {choice.dest: choice.help or "" for choice in every._choices_actions}
    for name, one in every.choices.items():
        yield f"\n## `fedpipe {name}`\n\n{plain(about[name])}\n\n```text\n{one.format_help().strip()}\n```"


MAKE: dict[str, Any] = {
    "methods": methods, "source": source, "settings": settings, "class": of_class, "configuration": configuration,
    "commands": commands,
}  # fmt: skip
