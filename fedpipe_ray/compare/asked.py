"""What a comparison is asked for: from a run file, `method=a,b` and seeds to one checked run a method."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpipe_ray.config import FindProfiles, apply_overrides, read_yaml, run_of
from fedpipe_ray.errors import UserError
from fedpipe_ray.methods import make_method, method_class
from fedpipe_ray.settings import Run

# Keys that mean the same in every method that has them; others, as `steps`, are a method's own.
SHARED = ("rank", "alpha", "targets", "dropout", "variant", "ranks")


@dataclass(frozen=True)
class Entry:
    """One method of a comparison. label: names its runs; method: its section of a run file.

    left_out: keys of the shared section that it does not have.
    """

    label: str
    method: dict[str, Any]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """A comparison. run: what all runs have in common; a run is one of `entries` with one of `seeds`."""

    run: Run
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...]

    def of(self, entry: Entry) -> Run:
        """The run of a method, with the first seed."""
        return dataclasses.replace(self.run, method=entry.method, seed=self.seeds[0])


def asked(path: Path, overrides: Sequence[str], seeds: str | None, find_profiles: FindProfiles) -> Asked:
    """The comparison of a run file and its overrides, `method=...`, `method.NAME.KEY=...` and `seeds=...` among them.

    seeds: of the command line's option. Raises UserError with every method's faults.
    """
    tree, of_method = read_yaml(path), [one for one in overrides if re.match(r"method[.=]", one)]
    rest = [one for one in overrides if one not in of_method]
    tree = apply_overrides(tree, [*rest, *([f"seeds={seeds}"] if seeds else [])])
    listed = tree.pop("seeds", None)
    if listed is not None and any(one.startswith("seed=") for one in rest):
        raise UserError("seed, seeds: both are given; leave seed out")
    found = seeds_of(tree.pop("seed", 0) if listed is None else listed)
    entries = entries_of(tree.pop("method", None), of_method)
    label = next((e.label for e in entries if e.label in tree and e.label not in _sections()), None)
    if label is not None:
        key = next(iter(tree[label])) if isinstance(tree[label], Mapping) and tree[label] else "KEY"
        raise UserError(f"unknown key {label}; settings of one method are written method.{label}.{key}=...")
    common = dataclasses.replace(run_of({**tree, "method": {"name": "lora"}}, path.parent, find_profiles), out=None)
    if len(entries) * len(found) < 2:
        raise UserError(
            f"one method ({entries[0].label}) and one seed ({found[0]}) are nothing to compare; write method=a,b or "
            "seeds=0,1,2, or use fedpipe run"
        )
    for_all = Asked(common, tuple(entries), found)
    together(for_all.entries, lambda entry: make_method(entry.method))
    return for_all


def together(entries: Sequence[Entry], work: Any) -> list[Any]:
    """What `work` gives for each method. Raises UserError with the faults of all, each with its label."""
    given, faults = [], []
    for entry in entries:
        try:
            given.append(work(entry))
        except UserError as error:
            faults += [f"{entry.label}: {line}" for line in str(error).splitlines()]
    if faults:
        raise UserError("\n".join(faults))
    return given


def seeds_of(value: Any) -> tuple[int, ...]:
    """Seeds from a number, a list, or numbers with commas between them. Raises UserError."""
    given = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    words = [str(one).strip() for one in given]
    odd = next((word for word in words if not re.fullmatch(r"\d{1,9}", word)), None)
    if odd is not None or not words:
        raise UserError(f"seeds: {value!r} are no seeds; write whole numbers, such as seeds=0,1,2")
    found = tuple(map(int, words))
    twice = [seed for seed in found if found.count(seed) > 1]
    if twice:
        raise UserError(f"seeds: {twice[0]} stands twice; remove one")
    return found


def entries_of(section: Any, overrides: Sequence[str]) -> list[Entry]:
    """The methods by the run file's `method` (a section, or what `method=` takes) and the overrides that concern it."""
    replaced = [one for one in overrides if one.startswith("method=")]
    keys = [one for one in overrides if not one.startswith("method=")]
    named = apply_overrides({}, replaced[-1:])["method"] if replaced else section
    common = dict(section) if isinstance(section, Mapping) else {}
    if isinstance(named, Mapping) and replaced:
        common = {}
    first = common.pop("name", None)
    if named is section and isinstance(section, Mapping):
        named = first
    listed = [labelled(one) for one in listed_in(named)]
    labels = [label for label, _ in listed]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"method: {twice} stands twice; give each a label, {{label: small, name: {twice}, rank: 4}}")
    common = apply_overrides({"method": common}, keys)["method"]
    own = {label: common.pop(label) for label in labels if isinstance(common.get(label), Mapping)}
    knows = {label: _keys(one["name"]) for label, one in listed}
    given = shared_out(common, {label: one["name"] for label, one in listed}, knows, first)
    entries = []
    for label, one in listed:
        left = tuple(key for key in common if key not in given[label] and (key in SHARED))
        entries.append(Entry(label, {**one, **given[label], **_rest(one), **own.get(label, {})}, left))
    return entries


def shared_out(
    common: Mapping[str, Any], names: Mapping[str, str], knows: Mapping[str, set[str]], first: str | None
) -> dict[str, dict[str, Any]]:
    """What of the common section goes to which label. first: the name that stands in the run file's section.

    `ranks` goes to methods of one rank too, which refuse it: with equal ranks they would be no comparison. Raises
    UserError for a key that nobody has, and for one of several methods that it may mean different things in.
    """
    given: dict[str, dict[str, Any]] = {label: {} for label in names}
    for key, value in common.items():
        having = [label for label in names if key in knows[label]]
        if key == "ranks":
            having = [label for label in names if "rank" in knows[label]]
        if key not in SHARED:
            having = [label for label in having if names[label] == first] or having
            if not having and first is not None and key in _keys(first):
                continue  # of a method that is not compared
            if not having:
                raise UserError(f"unknown key method.{key}; none of {', '.join(names)} has it")
            if len({names[label] for label in having}) > 1:
                raise UserError(
                    f"method.{key}: {', '.join(having)} have it, perhaps for different things; say whose: "
                    f"method.{having[0]}.{key}=..."
                )
        for label in having:
            given[label][key] = value
    return given


def listed_in(named: Any) -> list[Any]:
    """The methods that `method=` lists: names with commas between them, or a list of names and sections."""
    if isinstance(named, str):
        return [part.strip() for part in named.split(",") if part.strip()]
    if isinstance(named, list) and named:
        return named
    if isinstance(named, Mapping):
        return [named]
    raise UserError("method: names no method; write method=lora,fedpipe (`fedpipe methods` lists them)")


def labelled(one: Any) -> tuple[str, dict[str, Any]]:
    """(label, section) of one of the list. Raises UserError."""
    section = {"name": one} if isinstance(one, str) else dict(one) if isinstance(one, Mapping) else {}
    name = section.get("name")
    if not name:
        raise UserError(f"method: {one!r} is no method; write its name, or {{name: lora, rank: 4}}")
    method_class(name)
    label = str(section.pop("label", str(name).rpartition(":")[2]))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", label):
        raise UserError(f"method: label {label!r}: use letters, digits, '_' and '-'; it names folders")
    return label, section


def _rest(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "name"}


def _keys(name: str) -> set[str]:
    cls: Any = method_class(name)
    return {field.name for field in dataclasses.fields(cls)}


def _sections() -> set[str]:
    return {field.name for field in dataclasses.fields(Run)}
