"""From a YAML file and key=value overrides to a checked `Run`, or a message that says what to change."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from .errors import UserError
from .settings import Data, Profile, Run
from .traces import Rows, with_traces

T = TypeVar("T")
FindProfiles = Callable[[str, Path], dict[str, Any]]

# Keys that may change between a run and its continuation: they change neither data nor training of a past round.
FREE_ON_RESUME = ("rounds", "track", "out", "evaluate.keep", "evaluate.patience", "evaluate.target", "fleet.address")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 6e-3 as a number (YAML 1.1 needs a dot), keys as text, and refuses a key that stands twice.

    An edge may be called `no` or `1e5`, which as values are false and a number.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise UserError(f"key {key.value!r} stands twice, again in line {key.start_mark.line + 1}; remove one")
            seen.add(key.value)
            key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what _Loader would take for a number, such as the revision 7e10, and odd line breaks."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Text with a line break of Unicode's escaped: a single-quoted NEL comes back as a newline."""
        odd = not {"\x85", "\u2028", "\u2029"}.isdisjoint(text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if odd else None)


_Dumper.add_representer(str, _Dumper.represent_text)

for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError for a missing, unreadable or non-mapping file."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        near = ", ".join(sorted(str(p) for p in path.parent.glob("*.y*ml"))[:8]) or "no YAML file there"
        raise UserError(f"no file {path}; in that folder: {near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not key: value lines")
    return content


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tree` with `a.b=value` strings applied; values are YAML. Raises UserError for what is not key=value."""
    tree = json.loads(json.dumps(tree, default=str))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r} is not key=value; write for example local.lr=1e-3")
        node, parts = tree, key.split(".")
        for part in parts[:-1]:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                raise UserError(f"{override!r}: {part} is a value, not a section; set {part}=... itself")
        try:
            node[parts[-1]] = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise UserError(f"{override!r}: the value is not valid YAML: {error}") from None
    return tree


# Making one takes milliseconds, and a run of 1,000 edges needs it 2,000 times.
_adapters: dict[type, TypeAdapter[Any]] = {}


def build(cls: type[T], tree: Mapping[str, Any], where: str = "") -> T:
    """An instance of the dataclass `cls` from plain values, checked strictly. Raises UserError with every mistake."""
    if cls not in _adapters:
        _adapters[cls] = TypeAdapter(cls)
    try:
        checked: T = _adapters[cls].validate_json(json.dumps(dict(tree), default=str))
        return checked
    except ValidationError as error:
        raise UserError("\n".join(dict.fromkeys(_explain(cls, dict(item), where) for item in error.errors()))) from None


def _explain(cls: type, item: dict[str, Any], where: str) -> str:
    """One pydantic error as one line: the dotted key, the value, what it must be."""
    path = [str(part) for part in item["loc"] if not str(part).startswith(("function-", "constrained-"))]
    dotted = ".".join(part for part in [where, *path] if part)
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = sorted(_keys_at(cls, path[:-1]))
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {dotted}; {hint}"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if item["type"] == "value_error" and isinstance(item["input"], Mapping | list):
        return _located(message, dotted)
    message = message.replace("an object", "a mapping of keys").replace("valid array", "list")
    return f"{dotted}: {item['input']!r} is not valid: {message[:1].lower()}{message[1:]}"


def _located(message: str, dotted: str) -> str:
    """A message of __post_init__, which begins with a key, under the dotted name of the section it came from."""
    section = dotted.rpartition(".")[2]
    if not dotted or message.startswith((f"{dotted}.", f"{dotted}:", f"{dotted},")):
        return message
    if message.startswith((f"{section}.", f"{section}:")):
        return f"{dotted}{message[len(section) :]}"
    return f"{dotted}.{message}" if re.match(r"[a-z_]+(\.\S+)?: ", message) else f"{dotted}: {message}"


def _keys_at(cls: object, path: Sequence[str]) -> set[str]:
    """Field names of the dataclass reached from `cls` by following `path` through fields, dict values and unions."""
    for part in path:
        if dataclasses.is_dataclass(cls):
            cls = get_type_hints(cls).get(part, cls)
        elif get_origin(cls) is dict:
            cls = get_args(cls)[1]
        if get_origin(cls) in (Union, types.UnionType):
            cls = next((arm for arm in get_args(cls) if dataclasses.is_dataclass(arm)), cls)
    return {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()


def load_run(path: Path, overrides: Sequence[str], find_profiles: FindProfiles) -> Run:
    """The resolved, checked run: profiles and their traces inline, one explicit source an edge. Raises UserError."""
    return run_file(path, find_profiles)(overrides)


def run_file(path: Path, find_profiles: FindProfiles) -> Callable[[Sequence[str]], Run]:
    """As `load_run`, with other overrides each time: file, profiles and traces are read once. Raises UserError."""
    tree, traces, find = read_yaml(path), dict[str, Rows](), cache(find_profiles)
    return lambda overrides: run_of(apply_overrides(tree, overrides), path.parent, find, traces)


def run_of(
    tree: dict[str, Any], folder: Path, find_profiles: FindProfiles, traces: dict[str, Rows] | None = None
) -> Run:
    """As `load_run`, of what stands in a run file in `folder`. Raises UserError.

    find_profiles(name, folder) reads a profile file named in `fleet.profiles`, beside the run file or in clusters/.
    traces: what was read before of files of traces, by name.
    """
    fleet = tree.get("fleet")
    if isinstance(fleet, dict) and isinstance(fleet.get("profiles"), str):
        profiles, own = find_profiles(fleet["profiles"], folder), fleet.get("edges") or {}
        if isinstance(own, dict):
            tree = {**tree, "fleet": (fleet := {**fleet, "edges": _overlay(profiles, own, fleet["profiles"])})}
    if isinstance(fleet, dict) and isinstance(fleet.get("edges"), dict):
        tree = {**tree, "fleet": {**fleet, "edges": with_traces(fleet["edges"], folder, traces)}}
    run = build(Run, tree)
    if not run.fleet.edges:
        raise UserError(
            "fleet: no edge; name a file in fleet.profiles (such as clusters/laptop.yaml) or give fleet.edges"
        )
    return resolve(run)


def _overlay(profiles: Mapping[str, Any], own: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The profiles of a file, with the keys that `own` has for some of the edges over theirs. Raises UserError."""
    odd = [name for name in own if name not in profiles]
    if odd:
        near = difflib.get_close_matches(odd[0], profiles, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(profiles)}"
        raise UserError(f"fleet.edges: no edge {odd[0]} in {file}; {hint}")
    laid = {name: {**profiles[name], **keys} if isinstance(keys, dict) else keys for name, keys in own.items()}
    return {**profiles, **laid}


# The built-in corpus has one installed package an edge, in this order, unless the profile names another.
PACKAGES = ("torch", "transformers", "ray", "sympy", "numpy", "scipy", "pandas")


def resolve(run: Run) -> Run:
    """`run` with the data of every edge written out and checked in its profile. Raises UserError."""
    edges = {}
    for index, (name, profile) in enumerate(run.fleet.edges.items()):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UserError(f"edge name {name!r}: use letters, digits, '.', '_' and '-'; it names files and folders")
        if name == "server":
            raise UserError("edge name 'server': it is the server's own; give the edge another name")
        source = edge_data(run, name, profile).source
        if source == "builtin:docstrings":
            if index >= len(PACKAGES):
                raise UserError(
                    f"data.source: builtin:docstrings has {len(PACKAGES)} packages, "
                    f"and the fleet {len(run.fleet.edges)} edges; "
                    f"give edge {name} its own data: builtin:docstrings/PACKAGE"
                )
            own = {"source": profile.data} if isinstance(profile.data, str) else profile.data
            profile = dataclasses.replace(profile, data={**own, "source": f"builtin:docstrings/{PACKAGES[index]}"})
        edges[name] = profile
    run = dataclasses.replace(run, fleet=dataclasses.replace(run.fleet, profiles=None, edges=edges))
    tasks = {name: edge_data(run, name, profile).task for name, profile in edges.items()}
    if len(set(tasks.values())) > 1:
        raise UserError(f"data.task must be the same on every edge; it is {tasks}")
    return run


def edge_data(run: Run, name: str, profile: Profile) -> Data:
    """The `Data` of one edge: the run's, the profile's own keys over it, `{edge}` filled in. Raises UserError."""
    own = {"source": profile.data} if isinstance(profile.data, str) else profile.data
    tree = {**dataclasses.asdict(run.data), **own}
    for key in ("source", "validation", "test"):
        if isinstance(tree.get(key), str):
            tree[key] = tree[key].replace("{edge}", name)
    return build(Data, tree, f"fleet.edges.{name}.data")


def to_yaml(run: Run) -> str:
    """The resolved run as YAML that `load_run` reads back to an equal value."""
    tree = dataclasses.asdict(run)
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def training_hash(run: Run) -> str:
    """12 hex digits over every key that shapes the result of a round; resume refuses another value."""
    tree = dataclasses.asdict(run)
    for dotted in FREE_ON_RESUME:
        node, (*sections, last) = tree, dotted.split(".")
        for section in sections:
            node = node[section]
        node.pop(last, None)
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=6).hexdigest()


def differences(before: Any, after: Any, at: str = "") -> Iterator[str]:
    """Dotted keys in which two trees of plain values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from differences(before.get(key), after.get(key), f"{at}.{key}" if at else str(key))
    elif before != after:
        yield at
