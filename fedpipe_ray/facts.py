"""What edges tell the server beside tensors, as a Message's numbers: `name` on the way, `edge/name` in a state.

A planner needs the number of rows, their lengths, and for a classifier the count of each class: a few numbers, which
leave the edge. Scores of candidate weights travel the same way.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import importance
from .calibrate import Calibration
from .importance import Smoothed, Tie
from .planning import Array, Key

if TYPE_CHECKING:
    from .site import Site

LOOKED_AT = 2000  # rows whose lengths and labels are read
SCORE, MEAN, SPREAD, CLASS, CALIBRATION = "score.", "mean.", "spread.", "class.", "calibration."


@dataclass(frozen=True)
class Facts:
    """An edge's rows. rows: for training; tokens: a row with its padding; longest: tokens; terms: most losses of one.

    share: what part of the fleet's data it holds, rare classes counted for more; 1 / edges if all are alike.
    """

    rows: int
    tokens: float
    longest: int
    terms: float
    share: float


def facts_here(site: Site) -> dict[str, float]:
    """What this edge tells of its training rows, lengths and classes from at most 2000 of them."""
    rows = site.data.train
    seen = [int(i) for i in np.linspace(0, len(rows) - 1, min(len(rows), LOOKED_AT))]
    lengths = [rows.length(i) for i in seen]
    numbers = {"rows": float(len(rows)), "tokens": float(np.mean(lengths)), "longest": float(max(lengths))}
    labels = [rows.example(i)[1] for i in seen]
    if site.task == "classification":
        classes, counts = np.unique([int(wanted[0]) for wanted in labels], return_counts=True)
        numbers |= {f"{CLASS}{c}": float(n * len(rows) / len(seen)) for c, n in zip(classes, counts, strict=True)}
        return numbers | {"terms": 1.0}
    return numbers | {"terms": float(max((wanted >= 0).sum() for wanted in labels))}


def learn(edge: str, told: Mapping[str, float], numbers: dict[str, float]) -> None:
    """Takes what `edge` told into a state's numbers; its scores are smoothed over time."""
    for name, value in told.items():
        if not name.startswith(SCORE):
            numbers[f"{edge}/{name}"] = value
    scores = {name.removeprefix(SCORE): value for name, value in told.items() if name.startswith(SCORE)}
    if scores:
        after = smoothed(edge, numbers, scores).after(scores)
        numbers |= {f"{edge}/{MEAN}{name}": value for name, value in after.mean.items()}
        numbers |= {f"{edge}/{SPREAD}{name}": value for name, value in after.spread.items()}


def smoothed(edge: str, numbers: Mapping[str, float], names: Collection[str]) -> Smoothed:
    """The scores of an edge so far, of weights by name."""
    mean, spread = (
        {name: numbers[key] for name in names if (key := f"{edge}/{which}{name}") in numbers}
        for which in (MEAN, SPREAD)
    )
    return Smoothed(mean, spread)


def facts_of(edges: Iterable[str], numbers: Mapping[str, float], longest: int) -> dict[str, Facts]:
    """What is known of each edge; of one that has told nothing yet, rows of full length and a fair share.

    Shares are of the edges that have told, and all of them together hold as much as so many fair shares.
    """
    classes: dict[str, dict[str, float]] = {edge: {} for edge in edges}
    for name, count in numbers.items():
        edge, told, label = name.rpartition(f"/{CLASS}")
        if told and edge in classes:
            classes[edge][label] = count
    rows = {edge: numbers[f"{edge}/rows"] for edge in classes if f"{edge}/rows" in numbers}
    held = {edge: classes[edge] or {"all": count} for edge, count in rows.items()}
    whole: dict[str, float] = {}
    for counts in held.values():
        for label, count in counts.items():
            whole[label] = whole.get(label, 0.0) + count
    found = {}
    for edge in classes:
        parts = [count / whole[label] for label, count in held.get(edge, {}).items() if whole[label]]
        share = math.fsum(parts) / len(whole) * (len(held) / len(classes)) if parts else 1 / len(classes)
        tokens, most, terms = (numbers.get(f"{edge}/{name}", longest) for name in ("tokens", "longest", "terms"))
        found[edge] = Facts(int(rows.get(edge, 0)), tokens, int(most), terms, share)
    return found


def calibrations_of(edge: str, numbers: Mapping[str, float]) -> dict[int, Calibration]:
    """What an edge measured of itself, by bits."""
    found = {}
    for bits in (4, 8, 16):
        start = f"{edge}/{CALIBRATION}{bits}."
        told = {name: numbers[start + name] for name in Calibration.names() if start + name in numbers}
        if (one := Calibration.of(told)) is not None:
            found[bits] = one
    return found


def scores_of(
    facts: Mapping[str, Facts], numbers: Mapping[str, float], keys: Sequence[Key], *, scope: str, tie: Tie, plain: bool
) -> dict[str, Array]:
    """Importance [keys] by edge, of sum 1; all alike where not every key has a score yet. For all edges at once.

    scope: local, each edge by its own scores, or global, by their mean. plain: scores that do not drift, without
    AdaLoRA's uncertainty.
    """
    names, kinds, layers = [key.name for key in keys], {k.name: k.kind for k in keys}, {k.name: k.layer for k in keys}

    def weights(told: Mapping[str, float]) -> Array:
        whole = sum(told.values())
        if not (all(name in told for name in names) and whole > 0):
            return np.full(len(names), 1 / len(names))
        own = importance.tied({name: told[name] for name in names}, tie, kinds, layers)
        return np.array(list(own.values())) / sum(own.values())

    seen = {edge: smoothed(edge, numbers, names) for edge in facts}
    known = {edge: dict(found.mean) if plain else found.scores() for edge, found in seen.items()}
    if scope == "local":
        return {edge: weights(own) for edge, own in known.items()}
    told = {edge: own for edge, own in known.items() if own}
    mean = importance.mean_of_edges(told, {edge: facts[edge].rows for edge in told}) if told else {}
    return dict.fromkeys(facts, weights(mean))


def protected(planned: int, share: float, edges: int) -> int:
    """Fewest steps of an edge: three, and up to all planned ones as its share grows from a fair one to twice that.

    Ours: where the slowest edge held a third of the rows and most of one class, deadlines without a floor lost quality.
    """
    return min(planned, max(3, math.ceil(planned * min(1.0, share * edges - 1))))
