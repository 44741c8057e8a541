"""The methods by name. A new one touches three files: itself, one line here, its test."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from fedpipe_ray.config import build
from fedpipe_ray.errors import UserError

if TYPE_CHECKING:
    from .base import Method

METHODS = {
    "bitfit": "fedpipe_ray.methods.bitfit:BitFit",
    "central": "fedpipe_ray.methods.central:Central",
    "fed_sb": "fedpipe_ray.methods.fed_sb:FedSb",
    "fedadapter": "fedpipe_ray.methods.fedadapter:FedAdapter",
    "fedbiot": "fedpipe_ray.methods.fedbiot:FedBiOT",
    "fedex_lora": "fedpipe_ray.methods.fedex_lora:FedExLora",
    "fedkseed": "fedpipe_ray.methods.fedkseed:FedKSeed",
    "fedpipe": "fedpipe_ray.methods.fedpipe:FedPipe",
    "fedprox": "fedpipe_ray.methods.fedprox:FedProx",
    "fedsa_lora": "fedpipe_ray.methods.fedsa_lora:FedSaLora",
    "ffa_lora": "fedpipe_ray.methods.ffa_lora:FfaLora",
    "flexlora": "fedpipe_ray.methods.flexlora:FlexLora",
    "flora": "fedpipe_ray.methods.flora:Flora",
    "full": "fedpipe_ray.methods.full:Full",
    "head": "fedpipe_ray.methods.head:Head",
    "hetlora": "fedpipe_ray.methods.hetlora:HetLora",
    "jcpba": "fedpipe_ray.methods.jcpba:Jcpba",
    "local": "fedpipe_ray.methods.local:Local",
    "lora": "fedpipe_ray.methods.lora:Lora",
    "lora_fair": "fedpipe_ray.methods.lora_fair:LoraFair",
    "prefix": "fedpipe_ray.methods.prefix:Prefix",
    "prompt": "fedpipe_ray.methods.prompt:Prompt",
    "rolora": "fedpipe_ray.methods.rolora:RoLora",
    "scaffold": "fedpipe_ray.methods.scaffold:Scaffold",
    "slora": "fedpipe_ray.methods.slora:SLora",
    "zeropad": "fedpipe_ray.methods.zeropad:ZeroPad",
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
    cls = method_class(settings["name"])
    if "ranks" in fields and not takes_ranks(cls) and hasattr(cls, "rank"):
        uneven = [name for name in METHODS if takes_ranks(method_class(name))]
        raise UserError(
            f"method.ranks: {settings['name']} needs one rank for all edges, method.rank; leave ranks out, or use one "
            f"that takes unequal ranks: {', '.join(uneven)}"
        )
    if fields.get("variant") == "dora" and hasattr(cls, "against_dora") and not takes_dora(cls):
        others = [name for name in METHODS if takes_dora(method_class(name))]
        raise UserError(
            f"method.variant: {settings['name']} has no dora: {cls.against_dora}; leave it out, or use one that does: "
            f"{', '.join(others)}"
        )
    method: Method = build(cls, fields, "method")
    return method


def takes_ranks(cls: Any) -> bool:
    """Whether a method's edges may be told ranks of their own."""
    return any(field.name == "ranks" for field in dataclasses.fields(cls))


def takes_dora(cls: Any) -> bool:
    """Whether DoRA is among the method's variants of LoRA."""
    return "dora" in get_args(get_type_hints(cls).get("variant"))


def listing() -> list[str]:
    """A line a method: its name and what it does."""
    width = max(map(len, METHODS)) + 2
    return [f"{name:<{width}}{_summary(path)}" for name, path in METHODS.items()]


def details(name: str) -> list[str]:
    """What a method's docstrings say of it, and its section of a run file with the defaults. Raises UserError."""
    cls: Any = method_class(name)
    lines = [str(sys.modules[cls.__module__].__doc__ or name).strip().partition("\n")[0], "", _text(cls)[0]]
    for kind in reversed([kind for kind in cls.__mro__ if "__dataclass_params__" in vars(kind)]):
        lines += _text(kind)[1:]  # of a base class first, whose settings come first
    lines += ["", "method:", f"  name: {name}"]
    for setting in dataclasses.fields(cls):
        make = setting.default_factory
        default = setting.default if make is dataclasses.MISSING else make()
        lines.append(f"  {setting.name}: {'# required' if default is dataclasses.MISSING else json.dumps(default)}")
    return lines


def _summary(path: str) -> str:
    """The first line of a class's docstring, read from its file: to import all methods takes torch, and seconds."""
    module, _, name = path.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    return (ast.get_docstring(found) or "").partition("\n")[0]


def _text(cls: type) -> list[str]:
    """The lines of a class's own docstring."""
    return inspect.cleandoc(cls.__doc__ or "").splitlines() or [""]
