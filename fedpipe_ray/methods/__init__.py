"""The methods by name. A new one touches three files: itself, one line here, its test."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedpipe_ray.config import build
from fedpipe_ray.errors import UserError

if TYPE_CHECKING:
    from .base import Method

METHODS = {
    "fedadapter": "fedpipe_ray.methods.fedadapter:FedAdapter",
    "fedbiot": "fedpipe_ray.methods.fedbiot:FedBiOT",
    "fedkseed": "fedpipe_ray.methods.fedkseed:FedKSeed",
    "fedpipe": "fedpipe_ray.methods.fedpipe:FedPipe",
    "full": "fedpipe_ray.methods.full:Full",
    "jcpba": "fedpipe_ray.methods.jcpba:Jcpba",
    "lora": "fedpipe_ray.methods.lora:Lora",
}
FUNCTIONS = ("start", "plan", "local_update", "aggregate", "weights")


def method_class(name: str) -> type:
    """The dataclass of a method: a name of METHODS, or a user's own `module:Class`. Raises UserError."""
    if not isinstance(name, str):
        raise UserError(f"method.name: {name!r} is no name; there are {', '.join(METHODS)}, or your own module:Class")
    path = METHODS.get(name, name)
    if ":" not in path:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else "give module:Class for your own."
        raise UserError(f"method.name: no method {name!r}; {hint} There are: {', '.join(METHODS)}")
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"method.name: cannot import {path!r}: {error}; is its folder on PYTHONPATH?") from None
    missing = [function for function in FUNCTIONS if not callable(getattr(found, function, None))]
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)) or missing:
        lacks = f"it has no {', '.join(missing)}" if missing else "it is no dataclass"
        raise UserError(f"method.name: {path} is no method: {lacks}; see methods/base.py")
    return found


def declaring(what: str) -> str:
    """The names of the methods whose class variable `what` is true."""
    return ", ".join(name for name in METHODS if getattr(method_class(name), what, False))


def make_method(settings: Mapping[str, Any]) -> Method:
    """The method that the run file's `method` section describes, its hyperparameters checked. Raises UserError."""
    fields = {key: value for key, value in settings.items() if key != "name"}
    method: Method = build(method_class(settings["name"]), fields, "method")
    return method


def listing() -> list[str]:
    """The methods with their settings and defaults, as lines."""
    from .base import describe

    lines = []
    for name in METHODS:
        cls: Any = method_class(name)
        lines.append(f"{name:<12}{describe(cls)}")
        lines += [f"    {setting.name}: {setting.default!r}" for setting in dataclasses.fields(cls)]
    return lines
