"""Bits, batch, depth, steps and ranks of each edge: hard memory, soft deadline. After Fang et al., arXiv 2404.06448.

The paper names the knobs and the aim, a low under-training rate; its equations were not seen. Ours: the value

    sum_m S_m g(r_m) - lam u,    u = max(0, 1 - deadline / seconds of the planned steps),

S_m the score of weight m, g concave with g(0) = 0; all solvers; the search for a deadline. Edges decouple, and every
plan adapts at least one weight. Equal values (to 1e-9): less u, then more bits, then the larger batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import numpy as np

from .best import best
from .exact import exact
from .given import Allocation, given, solution
from .greedy import greedy, uniform
from .problem import GAINS, RANKS, Array, Choice, Demand, EdgePlan, Key, Problem, count_steps, memory_of

LATER = 4  # how often a deadline may move to the end of the last edge, whose ranks may grow with it

__all__ = [
    "GAINS",
    "RANKS",
    "Allocation",
    "Array",
    "Choice",
    "Demand",
    "EdgePlan",
    "Key",
    "Problem",
    "best",
    "count_steps",
    "exact",
    "given",
    "greedy",
    "median_deadline",
    "memory_of",
    "plan",
    "search_deadline",
    "solution",
    "uniform",
]


def plan(
    keys: Sequence[Key],
    demands: Sequence[Demand],
    scores: Array | Mapping[str, Array],
    deadline_seconds: float,
    solver: str = "best",
    steps: str = "filled",
    *,
    lam: float = 1.0,
    gain: str = "log2",
    communication_share: float = 0.25,
    min_rank: int = 4,
) -> dict[str, EdgePlan]:
    """A plan for each edge, by name, from scores [keys] for all of them or by edge.

    ValueError names the edge that nothing fits. A deadline that nobody meets is no error: see under_training.
    """
    solvers: dict[str, Callable[..., EdgePlan]] = {
        "best": partial(best, communication_share=communication_share, min_rank=min_rank),
        "exact": exact,
        "greedy": greedy,
        "uniform": uniform,
    }
    if solver not in solvers:
        raise ValueError(f"unknown solver {solver!r}: one of {', '.join(solvers)}")
    if len({demand.edge for demand in demands}) < len(demands):
        raise ValueError(f"an edge stands twice: {', '.join(demand.edge for demand in demands)}")
    plans = {}
    for demand in demands:
        of = scores[demand.edge] if isinstance(scores, Mapping) else scores
        plans[demand.edge] = solvers[solver](keys, demand, of, deadline_seconds, steps=steps, lam=lam, gain=gain)
    return plans


def search_deadline(
    plans: Callable[[float], Mapping[str, EdgePlan]], samples: float = math.inf, points: int = 16
) -> tuple[float, Mapping[str, EdgePlan]]:
    """The earliest deadline in seconds by which the fleet trains on `samples`, and its plans; the end of its last edge
    where one cannot be in time, so that the others use the round that they wait for anyway.

    Where none does, the one with most samples a second of round, the earliest of equals. Ours: on a geometric grid of
    `points` between the fastest and the slowest edge's planned seconds. Samples a second alone would lead filled steps
    to ever longer rounds, as transfers weigh less in them.
    """
    unhurried = [one.planned_seconds for one in plans(math.inf).values()]
    hurried = [one.planned_seconds for one in plans(min(unhurried)).values()]
    grid = np.geomspace(min(hurried), max(unhurried), points).tolist()
    tried = []
    for deadline in dict.fromkeys(grid):
        tried.append((deadline, plans(deadline)))
        if sum(one.steps * one.batch for one in tried[-1][1].values()) >= samples:
            break
    else:
        tried.append(max(tried, key=lambda one: _samples_per_second(one[1])))
    deadline, found = tried[-1]
    for _ in range(LATER):
        last = max(one.seconds for one in found.values())
        if last <= 1.001 * deadline:
            break
        deadline, found = last, plans(last)
    return deadline, found


def median_deadline(plans: Callable[[float], Mapping[str, EdgePlan]]) -> float:
    """The seconds that the planned steps of half of the edges take when nothing hurries them. Ours."""
    return median(one.planned_seconds for one in plans(math.inf).values())


def _samples_per_second(plans: Mapping[str, EdgePlan]) -> float:
    return sum(one.steps * one.batch for one in plans.values()) / max(one.seconds for one in plans.values())
