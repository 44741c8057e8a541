"""Runs that differ in nothing but their seed, taken together, and what tells the groups apart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from statistics import fmean, stdev
from typing import Any

from .history import History

NOT_TOLD = ("seed", "out", "track")  # keys that make no other experiment
MOST_KEYS = 3


@dataclass(frozen=True)
class Group:
    """Runs of one configuration."""

    label: str
    members: tuple[History, ...]

    @property
    def seeds(self) -> int:
        """How many."""
        return len(self.members)

    def course(self, metric: str, kind: str) -> tuple[list[float], list[float], list[float]]:
        """(x, mean, standard deviation) of a validation metric, at the evaluations that all members have had."""
        courses = [one.course(metric, kind) for one in self.members]
        count = min(len(x) for x, _ in courses)
        xs, means, spreads = [], [], []
        for at in range(count):
            values = [y[at] for _, y in courses]
            xs.append(fmean(x[at] for x, _ in courses))
            means.append(fmean(values))
            spreads.append(stdev(values) if len(values) > 1 else 0.0)
        return xs, means, spreads


def grouped(histories: Sequence[History]) -> list[Group]:
    """The groups in the order of their first members. The same run named twice is there once."""
    members: dict[str, list[History]] = {}
    for one in histories:
        config = {key: value for key, value in one.config.items() if key not in NOT_TOLD}
        together = members.setdefault(json.dumps(config, sort_keys=True), [])
        if one.config.get("seed") in {other.config.get("seed") for other in together}:
            if one.name in {other.name for other in together}:
                continue
            together = members.setdefault(one.name, [])  # the same experiment again, shown beside the first
        together.append(one)
    firsts = [runs[0] for runs in members.values()]
    return [Group(label, tuple(runs)) for label, runs in zip(labels(firsts), members.values(), strict=True)]


def labels(histories: Sequence[History]) -> list[str]:
    """A short name for each: its method, with the settings that differ if there are few; else the end of its path."""
    methods = [one.method for one in histories]
    if len(set(methods)) == len(methods):
        return methods
    trees = [dict(leaves(one.config)) for one in histories]
    keys = dict.fromkeys(key for tree in trees for key in tree if key.partition(".")[0] not in NOT_TOLD)
    differ = [key for key in keys if key != "method.name" and len({str(tree.get(key)) for tree in trees}) > 1]
    if len(set(methods)) == 1 and 1 <= len(differ) <= MOST_KEYS:
        return [", ".join(f"{key.rpartition('.')[2]} {tree.get(key)}" for key in differ) for tree in trees]
    ends = [PurePosixPath(one.name.rstrip("/")).name for one in histories]
    return ends if len(set(ends)) == len(ends) else [one.name for one in histories]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that is no mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
