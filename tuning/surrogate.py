"""FedPipe's planner as something to search over: what an allocation is worth and costs, in about a millisecond.

The value of an edge's plan is the planner's own (fedpipe_ray/planning): importance of the weights times a concave gain
of their rank, less the under-training rate. Nothing is trained. Edges of one profile are a class and get the same.

The structured space of a class has five numbers. bits and batch are positions in ordered lists. `top` is the level of
the rank (0, 1, 2, 4, ... are levels 0, 1, 2, 3, ...) of the weights with the most importance a parameter, and `fall` by
how many levels it falls where that is half as much: rank is monotone in it by construction. With the gain log2(1 + r)
and a price on parameters alone, the best ranks have fall 1 but for rounding; with fall 0 all are equal. Between two
levels, the upper layers of a kind get the higher one. `keep` is the share of weights that are adapted at all (1 and
more: all), those with the most importance a byte: what a weight costs at any rank is spared for the others. The free
space has a rank for every single weight. All is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from fedpipe_ray.planning import RANKS, Allocation, Array, Demand, EdgePlan, Key, Problem, exact, solution
from fedpipe_ray.settings import Profile

Point = Mapping[str, float]
KEPT_RANK = 8  # at which the memory of a weight is compared: what any rank costs counts beside what each unit does


@dataclass(frozen=True)
class Budget:
    """What to keep: seconds of a round, and bytes that an edge sends and receives in one; memory is in the profiles."""

    seconds: float
    bytes_round: float = float("inf")


@dataclass(frozen=True)
class Outcome:
    """quality: sum of the planner's values of a class, or their mean over a fleet; seconds: of the slowest edge.

    memory_bytes: of the edge that takes most; bytes_round: of all edges, up and down. misses: constraint -> by how much
    the edge that keeps it worst exceeds it, 0 or less where it is kept; `ranks` is 1 where an edge adapts nothing.
    worth: of the ranks alone, summed or mean.
    """

    quality: float
    seconds: float
    memory_bytes: float
    bytes_round: float
    misses: Mapping[str, float]
    worth: float

    @property
    def feasible(self) -> bool:
        """Whether all is kept."""
        return all(miss <= 0 for miss in self.misses.values())


class Surrogate:
    """The planner's problem of every edge, and the classes.

    scores: [keys] by edge. profiles: of all edges; those that agree in what a plan depends on are one class. sent:
    bytes a number on the wire; upload: [keys] bytes of a unit of rank in an update, where wire.codec changes them;
    whole: numbers that travel both ways beside the adapter, a head's.
    """

    def __init__(
        self, keys: Sequence[Key], demands: Sequence[Demand], scores: Mapping[str, Array],
        profiles: Mapping[str, Profile], budget: Budget, *, lam: float, steps: str, rank: int, sent: int = 4,
        upload: Array | None = None, whole: int = 0,
    ) -> None:  # fmt: skip
        self.keys, self.budget, self.lam, self.steps = keys, budget, lam, steps
        self.demands = {one.edge: one for one in demands}
        self.scores = dict(scores)
        self.problems = {
            edge: Problem(keys, one, scores[edge], budget.seconds, lam, "log2") for edge, one in self.demands.items()
        }
        self._width = {key.name: key.d_in + key.d_out for key in keys}
        width = np.array(list(self._width.values()), float)
        up = sent * width if upload is None else upload
        self._down, self._up = sent * (rank * width.sum() + whole), dict(zip(self._width, up.tolist(), strict=True))
        self._head = whole * up.sum() / width.sum()
        self.classes = classes_of(profiles)
        self.density = {name: self._density(edges) for name, edges in self.classes.items()}
        depth = 1 + max(key.layer for key in keys)
        self.places = {name: self._places(edges) for name, edges in self.classes.items()}
        self._layers = np.array([(key.layer + 0.5) / depth for key in keys])
        self._known: dict[tuple[str, str], Outcome] = {}

    def _density(self, edges: Sequence[str]) -> Array:
        """[keys] log2 of a class's importance a parameter, 0 for the highest."""
        total = np.sum([self.scores[edge] for edge in edges], axis=0)
        width = np.array([self._width[key.name] for key in self.keys], float)
        density = np.maximum(total / width, 1e-12 * (total / width).max())
        return np.asarray(np.log2(density / density.max()), float)

    def _places(self, edges: Sequence[str]) -> Array:
        """[keys] place, from 0 below 1, by a class's importance a byte of memory at KEPT_RANK, the highest first."""
        total = np.sum([self.scores[edge] for edge in edges], axis=0)
        cost = self.demands[edges[0]].choices[0]
        order = np.argsort(
            -total / np.maximum(cost.memory_bytes_key + KEPT_RANK * cost.memory_bytes_rank, 1e-9), kind="stable"
        )
        places = np.empty(len(order))
        places[order] = np.arange(len(order)) / len(order)
        return places

    def levels(self, name: str) -> int:
        """How many of RANKS every edge of a class may have, 0 among them."""
        most = min(self.demands[edge].max_rank for edge in self.classes[name])
        return sum(rank <= most for rank in RANKS)

    def space(self, name: str) -> dict[str, BaseDistribution]:
        """The structured space of a class."""
        bits, batches = self.options(name)
        return {
            "bits": IntDistribution(0, len(bits) - 1), "batch": IntDistribution(0, len(batches) - 1),
            "top": FloatDistribution(0.0, self.levels(name)), "fall": FloatDistribution(0.0, 2.0),
            "keep": FloatDistribution(0.2, 1.6),
        }  # fmt: skip

    def starts(self, name: str) -> list[dict[str, float]]:
        """Points to begin with: all bits and batches at a high and a middle level, lest a sampler stays with one."""
        bits, batches = self.options(name)
        top = self.levels(name)
        return [
            {"bits": b, "batch": n, "top": share * top, "fall": 1.0, "keep": 1.6}
            for share in (0.95, 0.6)
            for b in range(len(bits))
            for n in range(len(batches))
        ]

    def free_space(self, name: str) -> dict[str, BaseDistribution]:
        """The space with a rank for every weight, in no order."""
        whole = self.space(name)
        levels = CategoricalDistribution(list(RANKS[: self.levels(name)]))
        return {"bits": whole["bits"], "batch": whole["batch"], **{key.name: levels for key in self.keys}}

    def options(self, name: str) -> tuple[list[int], list[int]]:
        """(bits, batches) that every edge of a class may use."""
        sets = [{(one.bits, one.batch) for one in self.demands[edge].choices} for edge in self.classes[name]]
        common = set.intersection(*sets)
        return sorted({bits for bits, _ in common}), sorted({batch for _, batch in common})

    def allocation(self, name: str, point: Point) -> Allocation:
        """A point of either space as what an edge of a class is given."""
        bits, batches = self.options(name)
        if "top" in point:
            chosen = ranks_of(self._layers, self.density[name], point["top"], point["fall"], self.levels(name))
            kept = self.places[name] < point["keep"]
            ranks = {key.name: rank for key, rank, stays in zip(self.keys, chosen, kept, strict=True) if rank and stays}
        else:
            ranks = {key.name: int(point[key.name]) for key in self.keys if point[key.name]}
        return Allocation(bits[int(point["bits"])], batches[int(point["batch"])], ranks)

    def of_class(self, name: str, point: Point) -> Outcome:
        """What a class's point is worth and costs, all its edges together. The same point is worked out once."""
        allocation = self.allocation(name, point)
        known = (name, repr(allocation))
        if known not in self._known:
            self._known[known] = self.outcome([self.plan(edge, allocation) for edge in self.classes[name]])
        return self._known[known]

    def least(self, name: str) -> list[Outcome]:
        """What rank 1 on one weight, narrow and near the output, costs a class with all its bits and batches."""
        key, (bits, batches) = min(self.keys, key=lambda one: (self._width[one.name], -one.layer)), self.options(name)
        least = [Allocation(width, batch, {key.name: 1}) for width in bits for batch in batches]
        return [self.outcome([self.plan(edge, one) for edge in self.classes[name]]) for one in least]

    def plan(self, edge: str, allocation: Allocation) -> EdgePlan:
        """What an edge does with an allocation."""
        problem = self.problems[edge]
        return problem.plan(solution(problem, allocation), self.steps)

    def outcome(self, plans: Sequence[EdgePlan]) -> Outcome:
        """What plans of some edges are worth, summed, and cost."""
        up = [self._head + sum(rank * self._up[name] for name, rank in plan.ranks.items()) for plan in plans]
        misses = {
            "latency": max(plan.seconds for plan in plans) - self.budget.seconds,
            "memory": max(plan.memory_bytes - plan.capacity_bytes for plan in plans),
            "bytes": max(up) + self._down - self.budget.bytes_round,
            "ranks": float(any(not plan.ranks for plan in plans)),
        }
        return Outcome(
            sum(plan.value for plan in plans), max(plan.seconds for plan in plans),
            max(plan.memory_bytes for plan in plans), sum(up) + self._down * len(plans),
            {name: max(miss, -1e300) for name, miss in misses.items()},
            sum(plan.value + self.lam * plan.under_training for plan in plans),
        )  # fmt: skip

    def fleet(self, outcomes: Mapping[str, Outcome]) -> Outcome:
        """Outcomes of all classes as one of the fleet; quality is the mean of an edge."""
        parts = list(outcomes.values())
        misses = {name: max(part.misses[name] for part in parts) for name in parts[0].misses}
        return Outcome(
            sum(part.quality for part in parts) / len(self.problems), max(part.seconds for part in parts),
            max(part.memory_bytes for part in parts), sum(part.bytes_round for part in parts), misses,
            sum(part.worth for part in parts) / len(self.problems),
        )  # fmt: skip

    def of_fleet(self, plans: Mapping[str, Allocation]) -> Outcome:
        """What allocations by edge are worth and cost."""
        return self.fleet({
            name: self.outcome([self.plan(edge, plans[edge]) for edge in edges]) for name, edges in self.classes.items()
        })  # fmt: skip

    def optimum(self) -> Outcome:
        """The exact planner's, every edge by itself, each weight with a rank of its own.

        It keeps memory, and weighs the deadline; where its plans break the latency or the bytes, as `misses` then says,
        its quality is above what any allocation that keeps them can have.
        """
        plans = [
            exact(self.keys, one, self.scores[edge], self.budget.seconds, self.lam, steps=self.steps)
            for edge, one in self.demands.items()
        ]
        found = self.outcome(plans)
        return replace(found, quality=found.quality / len(plans), worth=found.worth / len(plans))


def ranks_of(layers: Array, density: Array, top: float, fall: float, levels: int = len(RANKS)) -> list[int]:
    """[keys] ranks: level top + fall x density, rounded up in the upper layers and down in the lower ones.

    layers: [keys] in [0, 1), 0 at the input; density: [keys] log2 of importance a parameter, at most 0; levels: how
    many of RANKS there are.
    """
    level = np.clip(np.floor(top + fall * density + layers), 0, levels - 1).astype(int)
    return [RANKS[at] for at in level]


def classes_of(profiles: Mapping[str, Profile]) -> dict[str, list[str]]:
    """Edges by class, named after the first: those with equal speed, links, latency and memory."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, p in profiles.items():
        key = (p.compute_flops, p.uplink_bps, p.downlink_bps, p.latency_seconds, p.capacity_bytes)
        alike.setdefault(key, []).append(name)
    return {names[0]: names for names in alike.values()}
