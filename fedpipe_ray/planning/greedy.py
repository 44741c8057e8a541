"""Best gain per cost first, and one rank for all weights: plans in a few milliseconds. Ours."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .problem import MIXES, RANKS, TINY, Array, Demand, EdgePlan, Found, Key, Picks, Problem, worth


def greedy(
    keys: Sequence[Key],
    demand: Demand,
    scores: Array,
    deadline_seconds: float,
    lam: float = 1.0,
    gain: str = "log2",
    *,
    steps: str = "equal",
) -> EdgePlan:
    """Takes the best gain per cost first, in several mixes of seconds and bytes, or `uniform` if better."""
    edge = Problem(keys, demand, scores, deadline_seconds, lam, gain)
    return edge.plan(max(greedy_solutions(edge), key=worth), steps)


def uniform(
    keys: Sequence[Key],
    demand: Demand,
    scores: Array,
    deadline_seconds: float,
    lam: float = 1.0,
    gain: str = "log2",
    *,
    steps: str = "equal",
) -> EdgePlan:
    """The plan of the highest value with one rank for all weights that the depth allows. ValueError if none fits."""
    edge = Problem(keys, demand, scores, deadline_seconds, lam, gain)
    found = max(uniform_solutions(edge), key=worth)
    if found.worth[0] == -math.inf:
        least = float((edge.memory[:, :, 1].sum(1) - edge.room).min())
        raise ValueError(
            f"edge {demand.edge}: rank 1 on all weights needs {(demand.capacity_bytes + least) / 2**30:.4g} GiB of "
            f"{demand.capacity_bytes / 2**30:.4g} GiB; give it more memory, or plan by another solver"
        )
    return edge.plan(found, steps)


def uniform_solutions(edge: Problem) -> list[Found]:
    """The best with one rank, the smaller of equals, of each choice where that is best."""
    gain, seconds, memory = (x.sum(1)[:, 1:] for x in (edge.gain, edge.seconds, edge.memory))  # [choices, 6]
    value = gain - edge.lam * edge.under(edge.start[:, None] + seconds)
    value[memory > edge.room[:, None]] = -np.inf
    top = np.flatnonzero(value.max(1) >= value.max() - 1e-8 * edge.scale)
    return [edge.found(q, np.full(len(edge.keys), 1 + value[q].argmax())) for q in top.tolist()]


def _starts(edge: Problem, rows: Picks, mix: Array) -> list[tuple[float, int, Picks]]:
    """For choices `rows` [n] and mixes [n] the rank steps [keys x 6] by falling gain per cost, and their best start.

    (value, how many steps, all steps in order). Cost is mix x seconds + (1 - mix) x bytes, each as a share of all.
    What a key costs at any rank makes its first step dear: all steps up to its best gain per cost in whole rank as one.
    """
    seconds, memory = (x[rows] / np.maximum(x[rows, :, -1:].sum(1, keepdims=True), TINY) for x in edge.costs)
    cost, gain = seconds * mix[:, None, None] + memory * (1 - mix[:, None, None]), edge.gain[rows]
    whole = gain[:, :, 1:] / np.maximum(cost[:, :, 1:], TINY)
    as_one = np.arange(len(RANKS) - 1) <= whole.argmax(-1)[:, :, None]
    slope = np.where(as_one, whole.max(-1, keepdims=True), np.diff(gain) / np.maximum(np.diff(cost), TINY))
    slope[~edge.allowed[rows]] = -1
    order = np.argsort(-slope.reshape(len(rows), -1), axis=1, kind="stable")
    gain, seconds, memory = (x[rows[:, None], order].cumsum(1) for x in edge.steps)
    value = gain - edge.lam * edge.under(edge.start[rows, None] + seconds)
    value[memory > edge.room[rows, None]] = -np.inf
    return [(v[at], int(at) + 1 if v[at] > -np.inf else 0, o) for v, at, o in zip(value, value.argmax(1), order)]


def greedy_solutions(edge: Problem) -> list[Found]:
    """Of the three most promising choices the best start of the steps in order, filled up; seconds and bytes mixed."""
    small = edge.memory[:, :, -1].sum(1) <= edge.room  # then only seconds cost
    rows = np.arange(len(small))
    starts = dict(enumerate(_starts(edge, rows, np.where(small, 1.0, 0.5))))
    top = sorted(np.flatnonzero(edge.can).tolist(), key=lambda q: starts[q][0], reverse=True)[:3]
    pairs = [(q, mix) for q in top if not small[q] for mix in MIXES]
    more = _starts(edge, *(np.array(x) for x in zip(*pairs))) if pairs else []
    for (q, _), start in zip(pairs, more):
        starts[q] = max(starts[q], start, key=lambda one: one[0])
    return [_fill(edge, q, *starts[q]) for q in top] + uniform_solutions(edge)


def _fill(edge: Problem, q: int, value: float, taken: int, order: Picks) -> Found:
    """The first `taken` steps, then each later one, in order, that fits and raises the value."""
    levels, room, steps, start = len(RANKS) - 1, edge.room[q], [x[q] for x in edge.steps], order[:taken]
    gain, seconds, memory = (float(x[start].sum()) for x in steps)
    seconds += float(edge.start[q])
    dearer = edge.lam * (edge.under(seconds + steps[1]) - edge.under(seconds)) if taken else -1
    later = order[taken:]
    later = later[((steps[2] <= room - memory) & (steps[0] > dearer))[later]]
    picks = np.bincount(start // levels, minlength=len(edge.keys)).tolist()
    for step, dg, ds, dm in zip(later.tolist(), *(x[later].tolist() for x in steps)):
        new = gain + dg - edge.lam * max(0.0, 1 - edge.deadline / (seconds + ds))
        if picks[step // levels] == step % levels and memory + dm <= room and new > value:
            picks[step // levels] += 1
            value, gain, seconds, memory = new, gain + dg, seconds + ds, memory + dm
    return edge.found(q, np.array(picks))
