"""What edges tell the server beside tensors, as a Message's numbers: `name` on the way, `edge/name` in a state.

A planner needs the number of rows, their lengths, and for a classifier the count of each class: a few numbers, which
leave the edge. Scores of candidate weights travel the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .calibrate import Calibration
from .importance import Smoothed

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
        after = smoothed(edge, numbers).after(scores)
        numbers |= {f"{edge}/{MEAN}{name}": value for name, value in after.mean.items()}
        numbers |= {f"{edge}/{SPREAD}{name}": value for name, value in after.spread.items()}


def smoothed(edge: str, numbers: Mapping[str, float]) -> Smoothed:
    """The scores of an edge so far."""
    return Smoothed(_told(edge, MEAN, numbers), _told(edge, SPREAD, numbers))


def facts_of(edges: Mapping[str, object], numbers: Mapping[str, float], longest: int) -> dict[str, Facts]:
    """What is known of each edge; of one that has told nothing yet, rows of full length and a fair share."""
    told = {edge: _told(edge, "", numbers) for edge in edges}
    held = {edge: _told(edge, CLASS, numbers) or {"all": told[edge].get("rows", 0.0)} for edge in edges}
    whole: dict[str, float] = {}
    for counts in held.values():
        for label, count in counts.items():
            whole[label] = whole.get(label, 0.0) + count
    found = {}
    for edge, own in told.items():
        parts = [count / whole[label] for label, count in held[edge].items() if whole[label]]
        share = math.fsum(parts) / len(whole) if "rows" in own and parts else 1 / len(edges)
        found[edge] = Facts(
            int(own.get("rows", 0)), own.get("tokens", longest), int(own.get("longest", longest)),
            own.get("terms", longest), share,
        )  # fmt: skip
    return found


def calibrations_of(edge: str, numbers: Mapping[str, float]) -> dict[int, Calibration]:
    """What an edge measured of itself, by bits."""
    found = {bits: Calibration.of(_told(edge, f"{CALIBRATION}{bits}.", numbers)) for bits in (4, 8, 16)}
    return {bits: one for bits, one in found.items() if one is not None}


def protected(planned: int, share: float, edges: int) -> int:
    """Fewest steps of an edge: three, and up to all planned ones as its share grows from a fair one to twice that.

    Ours: where the slowest edge held a third of the rows and most of one class, deadlines without a floor lost quality.
    """
    return min(planned, max(3, math.ceil(planned * min(1.0, share * edges - 1))))


def _told(edge: str, prefix: str, numbers: Mapping[str, float]) -> dict[str, float]:
    start = f"{edge}/{prefix}"
    return {name.removeprefix(start): value for name, value in numbers.items() if name.startswith(start)}
