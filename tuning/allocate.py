"""`fedpipe allocate`: searches ranks, bits and batches of every class of edges under budgets, on the planner's costs.

Given latency, memory and bytes an edge, classes do not touch each other: each has a study of its own, and trial t of
the search is trial t of every class. What no class can keep costs nothing but its milliseconds. The Pareto front over
quality, latency, memory and bytes comes from combining the classes' own points; its best may then be promoted, by
successive halving, through short federated runs: a campaign whose one key is `method.plans`. Ours.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler

from fedpipe_ray.errors import UserError
from fedpipe_ray.planning import Allocation

from .study import sampler_of
from .surrogate import Outcome, Point, Surrogate

BUDGETS = 8  # levels of each cost at which the classes' points are combined
PLACES = 12  # rows of the Pareto table at most
NEAR = 0.05  # of what a point's ranks are worth, is given for a larger batch, whose good the surrogate does not see


@dataclass(frozen=True)
class Candidate:
    """An allocation of the whole fleet and what it is worth and costs."""

    plans: Mapping[str, Allocation]  # by edge
    outcome: Outcome


@dataclass
class Search:
    """points: of each class what was tried, and what it gave; curve: best feasible quality of the fleet, by trial."""

    surrogate: Surrogate
    points: dict[str, list[tuple[Point, Outcome]]] = field(default_factory=dict)
    curve: list[float] = field(default_factory=list)

    def best(self, name: str, keep: Callable[[Outcome], bool] = lambda _: True) -> tuple[Point, Outcome] | None:
        """A class's best feasible point among those that `keep` says yes to, with as large a batch as it allows.

        The value counts rows, however many are in a batch: by it alone, news were classified with batches of two rows,
        and nothing was learned. So the largest batch, and with it the most bits, that cost little of the value.
        """
        found = [pair for pair in self.points[name] if pair[1].feasible and keep(pair[1])]
        if not found:
            return None
        point, top = max(found, key=lambda pair: pair[1].quality)
        bits, batches = self.surrogate.options(name)
        for batch, width in product(reversed(range(len(batches))), reversed(range(len(bits)))):
            larger = {**point, "batch": batch, "bits": width}
            outcome = self.surrogate.of_class(name, larger)
            if outcome.feasible and keep(outcome) and outcome.quality >= top.quality - NEAR * abs(top.worth):
                return larger, outcome
        return point, top

    def candidate(self, keep: Callable[[Outcome], bool] = lambda _: True) -> Candidate | None:
        """The classes' best put together; None if one of them has none."""
        chosen = {name: self.best(name, keep) for name in self.points}
        if any(pair is None for pair in chosen.values()):
            return None
        pairs = {name: pair for name, pair in chosen.items() if pair is not None}
        plans = {
            edge: self.surrogate.allocation(name, pairs[name][0])
            for name, edges in self.surrogate.classes.items()
            for edge in edges
        }
        return Candidate(plans, self.surrogate.fleet({name: outcome for name, (_, outcome) in pairs.items()}))


def search(
    surrogate: Surrogate, trials: int, sampler: str = "tpe", seed: int = 0, free: bool = False,
    advance: Callable[..., None] = lambda done, total, info: None,
) -> Search:  # fmt: skip
    """So many trials of every class, side by side. free: in the space with a rank for every weight.

    advance: told trials done, trials in all, and the best quality so far in words.
    Raises UserError if a class has no feasible point.
    """
    found = Search(surrogate, {name: [] for name in surrogate.classes})
    rows = {
        name: _quality(name, found, trials, sampler_of(sampler, seed + i, 0, 1), free)
        for i, name in enumerate(found.points)
    }
    for done in range(1, trials + 1):
        best = [next(row) for row in rows.values()]
        found.curve.append(sum(best) / len(surrogate.problems))
        feasible = found.curve[-1] > -np.inf
        advance(done, trials, f"trials, quality {found.curve[-1]:.4g}" if feasible else "trials, none feasible yet")
    missing = [name for name in found.points if found.best(name) is None]
    if missing:
        raise UserError("\n".join(_nearest(found, name) for name in missing))
    return found


def _quality(name: str, found: Search, trials: int, sampler: BaseSampler, free: bool) -> Iterator[float]:
    """Does a trial of one class at each step, and gives its best feasible quality so far."""
    study = optuna.create_study(direction="maximize", sampler=sampler)
    space = (found.surrogate.free_space if free else found.surrogate.space)(name)
    best = -np.inf
    for point in [] if free else found.surrogate.starts(name):
        study.enqueue_trial(point)
    for _ in range(trials):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of CMA-ES one a trial: said once, by `allocate`
            trial = study.ask(space)
            outcome = found.surrogate.of_class(name, trial.params)
            for limit, miss in outcome.misses.items():
                trial.set_constraint(limit, miss)
            study.tell(trial, outcome.quality)
        found.points[name].append((trial.params, outcome))
        if outcome.feasible:
            best = max(best, outcome.quality)
        yield best


def _nearest(found: Search, name: str) -> str:
    """Which budget a class cannot keep, and by how much the nearest that adapts a weight misses it."""
    tried = [*(outcome for _, outcome in found.points[name]), *found.surrogate.least(name)]
    tried = [outcome for outcome in tried if not outcome.misses["ranks"]]
    edges = ", ".join(found.surrogate.classes[name])
    if any(outcome.feasible for outcome in tried):
        return (
            f"edge {edges}: no trial keeps the budget, and rank 1 on one weight does; raise it, or give more --trials"
        )
    misses = {key: min(outcome.misses[key] for outcome in tried) for key in ("latency", "memory", "bytes")}
    over = {key: miss for key, miss in misses.items() if miss > 0}
    if not over:
        least = min(tried, key=lambda outcome: sum(max(0, miss) for miss in outcome.misses.values()))
        over = {key: miss for key, miss in least.misses.items() if miss > 0}
    units = {"latency": ("s", 1), "memory": ("MiB", 2**20), "bytes": ("MB", 1e6)}
    said = ", ".join(f"{key} by {miss / units[key][1]:.4g} {units[key][0]}" for key, miss in over.items())
    return f"edge {edges}: no trial keeps the budget; the nearest misses {said}; raise it, or give more --trials"


def front(found: Search) -> list[Candidate]:
    """Allocations that none beats in quality, latency, memory and bytes at once, the best quality first.

    Each comes from holding every class to one level of one cost and taking its best within.
    """
    every = [outcome for pairs in found.points.values() for _, outcome in pairs if outcome.feasible]
    candidates = [found.candidate()]
    for cost in ("seconds", "memory_bytes", "bytes_round"):
        seen = np.quantile([getattr(outcome, cost) for outcome in every], np.linspace(0.02, 0.9, BUDGETS))
        for level in seen.tolist():
            candidates.append(found.candidate(partial(_within, cost, level)))
    points: dict[tuple[float, ...], Candidate] = {}
    for one in candidates:
        if one is not None:
            points.setdefault(_costs(one.outcome), one)
    best = [one for one in points if not any(other != one and _covers(other, one) for other in points)]
    return [points[one] for one in sorted(best)][:PLACES]


def ranked(candidates: Sequence[Candidate], own: Candidate | None) -> tuple[list[Candidate], int | None]:
    """(a front with the planner's own among it, the best quality first; the place of that, None if there is none).

    What the planner's beats is left out; it stays itself where another beats it.
    """
    if own is None:
        return list(candidates), None
    rest = [one for one in candidates if not covers(own, one)]
    rows = sorted([*rest, own], key=lambda one: _costs(one.outcome))
    return rows, next(at for at, one in enumerate(rows) if one is own)


def covers(one: Candidate, other: Candidate) -> bool:
    """Whether an allocation is no worse than another in quality, latency, memory and bytes."""
    return _covers(_costs(one.outcome), _costs(other.outcome))


def _within(cost: str, level: float, outcome: Outcome) -> bool:
    return bool(getattr(outcome, cost) <= level)


def _costs(outcome: Outcome) -> tuple[float, ...]:
    return (-outcome.quality, outcome.seconds, outcome.memory_bytes, outcome.bytes_round)


def _covers(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


def gap(quality: float, optimum: Outcome) -> float:
    """By how much a quality falls short of the exact optimum's, as a share of what that one's ranks are worth.

    Not of its value, which the under-training rate may bring near zero.
    """
    return (optimum.quality - quality) / optimum.worth


def as_settings(plans: Mapping[str, Allocation]) -> dict[str, Any]:
    """Allocations as `method.plans` of a run file."""
    return {edge: {**dataclasses.asdict(one), "ranks": dict(one.ranks)} for edge, one in plans.items()}
