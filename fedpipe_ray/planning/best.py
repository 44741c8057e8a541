"""One rank an edge, weights dropped by kind, steps that fill the deadline: what a prototype measured best. Ours."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .problem import FEW_STEPS, RANKS, TINY, Array, Demand, EdgePlan, Key, Picks, Problem


def best(
    keys: Sequence[Key],
    demand: Demand,
    scores: Array,
    deadline_seconds: float,
    communication_share: float = 0.25,
    min_rank: int = 4,
    *,
    steps: str = "filled",
    lam: float = 1.0,
    gain: str = "log2",
) -> EdgePlan:
    """What a prototype measured to work: one rank for all weights, steps that fill the deadline. Ours.

    The rank is the largest that fits and whose transfer takes at most communication_share of the deadline, or of the
    edge's own round where its fewest steps take longer; where that is below min_rank, whole kinds go, lowest score per
    cost first. Of the choices that keep the most, the largest batch up to the reference (demand.batch, else the largest
    there is), then the most bits. A depth below all only if nothing else fits, or if not FEW_STEPS steps do by the
    deadline. lam and gain only say what the plan's value is.
    """
    if not (0 < communication_share <= 1 and min_rank >= 1):
        raise ValueError(f"communication_share {communication_share} must be in (0, 1], min_rank {min_rank} at least 1")
    edge, min_rank = Problem(keys, demand, scores, deadline_seconds, lam, gain), min(min_rank, demand.max_rank)
    choices = demand.choices
    reference = max(demand.batch or math.inf, min(c.batch for c in choices))
    order = sorted(range(len(choices)), key=lambda q: (-choices[q].batch, -choices[q].bits))
    fewest = demand.steps if steps == "equal" else demand.min_steps
    least = [demand.fixed_seconds + edge.batches(fewest, c.batch) * c.step_seconds for c in choices]
    budget = [communication_share * min(max(deadline_seconds, seconds), demand.limit_seconds) for seconds in least]
    options = []  # one a depth, all layers first
    for depth in sorted({c.depth or math.inf for c in choices}, reverse=True):
        here = [q for q in order if (choices[q].depth or math.inf) == depth]
        wide = {q: _widest(edge, q, scores, budget[q], min_rank) for q in here}
        fits = [q for q in here if wide[q][1].any()]
        if fits:  # the first of those that keep the most
            q = max(fits, key=lambda q: (choices[q].batch <= reference, *wide[q][0]))
            options.append(edge.found(q, wide[q][1]))
    few = [other + FEW_STEPS * step for other, step in map(edge.round_seconds, options)]
    at = next((i for i, seconds in enumerate(few) if seconds <= deadline_seconds), few.index(min(few)))
    return edge.plan(options[at], steps)


def _widest(edge: Problem, q: int, scores: Array, budget: float, min_rank: int) -> tuple[tuple[int, int], Picks]:
    """One rank for as many kinds as `budget` seconds of transfer and the memory allow; (the rank up to min_rank, keys).

    If not even the last kind gets rank 1, its transfer may take longer; if it does not fit, the best key alone gets it.
    """
    transfer, memory, allowed = edge.demand.transfer_seconds_rank, edge.memory[q], edge.allowed[q]
    cost = np.maximum(transfer / budget + memory[:, 1] / max(edge.room[q], 1), TINY)
    kind = np.array([key.kind for key in edge.keys])
    of = {k: (kind == k) & allowed for k in dict.fromkeys(kind[allowed].tolist())}
    kinds = sorted(of, key=lambda k: scores[of[k]].sum() / cost[of[k]].sum())
    level, mask = 0, allowed
    for n in range(len(kinds)):
        mask = np.any([of[k] for k in kinds[n:]], axis=0)
        fits = [i for i in range(1, len(RANKS)) if memory[mask, i].sum() <= edge.room[q]]
        level = max((i for i in fits if edge.ranks[i] * transfer[mask].sum() <= budget), default=0)
        if int(edge.ranks[level]) >= min_rank:
            break
    if level == 0 and memory[mask, 1].sum() <= edge.room[q]:
        level = 1
    elif level == 0:
        single = np.where(allowed & (memory[:, 1] <= edge.room[q]), scores / cost, -1)
        level, mask = 1, (np.arange(len(single)) == single.argmax()) & (single.max() >= 0)
    return (min(int(edge.ranks[level]), min_rank), int(mask.sum())), level * mask
