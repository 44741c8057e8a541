"""The plan of the highest value, by mixed integer programming (HiGHS through scipy). Ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .greedy import greedy_solutions
from .problem import TINY, TOLERANCE, Array, Demand, EdgePlan, Found, Key, Picks, Problem, worth


def exact(
    keys: Sequence[Key],
    demand: Demand,
    scores: Array,
    deadline_seconds: float,
    lam: float = 1.0,
    gain: str = "log2",
    *,
    steps: str = "equal",
    tolerance: float = TOLERANCE,
) -> EdgePlan:
    """The plan of the highest value, to tolerance x (sum_m S_m g(32) + lam); ties are decided among solutions met.

    Starts from `greedy`; each choice that its Lagrange bounds do not rule out becomes multiple-choice knapsacks for
    HiGHS, one for each span of seconds on which u is close enough to its chord. Ours; scores [keys], at least 0.
    """
    if not tolerance >= 1e-8:
        raise ValueError(f"tolerance {tolerance} must be at least 1e-8")
    edge = Problem(keys, demand, scores, deadline_seconds, lam, gain)
    found = max(greedy_solutions(edge), key=worth)
    most = edge.gain[:, :, -1].sum(1) - lam * edge.under(edge.start)
    for q in np.argsort(-most, kind="stable").tolist():
        found = _improve(edge, q, found, tolerance)
    return edge.plan(found, steps)


def _lines(edge: Problem, q: int, prices: Array) -> tuple[Array, Array]:
    """For time prices [J] the cuts [J] of gain <= cut + price x (seconds - start), and the terms [J, keys, ranks].

    Lagrange bounds, each at the memory price that bisection finds to be the lowest.
    """
    memory, room = edge.memory[q], min(edge.room[q], edge.memory[q, :, -1].sum())
    net = edge.gain[q] - prices[:, None, None] * edge.seconds[q]
    low = np.zeros((len(prices), 1, 1))
    high = low + (edge.gain[q, :, 1:] / np.maximum(memory[:, 1:], 1)).max()
    for _ in range(28):
        middle = (low + high) / 2
        picks = (net - middle * memory).argmax(-1)
        over = (memory[np.arange(len(memory)), picks].sum(-1) > room)[:, None, None]
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    terms = net - high * memory
    return terms.max(-1).sum(-1) + high[:, 0, 0] * room, terms


def _improve(edge: Problem, q: int, best: Found, tolerance: float) -> Found:
    """The better of `best` and what choice q has that is better by more than tolerance x scale.

    u is concave in seconds beyond the deadline, so that line - lam u is largest at an end of a span of seconds: spans
    and ranks whose bounds miss the goal are dropped. On what is left u is replaced by its chord, which lies below it;
    the MILP bounds the span, which is split at its solution while that bound is above the goal.
    """
    goal = (best.worth[0] + tolerance) * edge.scale
    if edge.gain[q, :, -1].sum() - edge.lam * edge.under(edge.start[q]) <= goal or not edge.can[q]:
        return best
    low, high = edge.start[q], edge.start[q] * (1 + 1e-9) + edge.seconds[q, :, -1].sum()
    dearest = (edge.gain[q, :, 1:] / np.maximum(edge.seconds[q, :, 1:], edge.start[q] * 1e-12)).max()
    prices = np.r_[0.0, np.geomspace(max(dearest, TINY) * 1e-4, max(dearest, TINY), 11)]
    for _ in range(3):
        cut, terms = _lines(edge, q, prices)
        ends = np.unique(np.r_[np.geomspace(low, high, 49), np.clip(edge.deadline, low, high)])
        line = cut[:, None] + prices[:, None] * (ends - edge.start[q]) - edge.lam * edge.under(ends)
        bounds = np.maximum(line[:, :-1], line[:, 1:])  # [J, spans]
        alive = np.flatnonzero(bounds.min(0) > goal)
        if not alive.size:
            return best
        low, high = ends[alive[0]], ends[alive[-1] + 1]
        j = int(bounds[:, bounds.min(0).argmax()].argmin())
        used, prices = prices, np.linspace(prices[max(j - 1, 0)], prices[min(j + 1, len(prices) - 1)], 12)
    middle = float(np.clip(edge.deadline, low, high))
    spans = [(a, b) for a, b in ((middle, high), (low, middle)) if a < b]
    while spans:
        low, high = spans.pop()
        ends = np.array([low, high])
        most = (cut[:, None] + used[:, None] * (ends - edge.start[q]) - edge.lam * edge.under(ends)).max(1)  # [J]
        loss = terms.max(-1, keepdims=True) - terms
        keep = (most[:, None, None] - loss > goal).all(0) & (edge.memory[q] <= edge.room[q])  # [keys, ranks]
        keep[~edge.allowed[q], 1:] = False
        if not keep.any(1).all():
            continue
        picks, bound = _milp(edge, q, keep, low, high, tolerance / 2)
        best = max(best, edge.found(q, picks), key=worth)
        goal = (best.worth[0] + tolerance) * edge.scale
        if bound > goal and high > low * (1 + 1e-9):
            at = edge.start[q] + edge.total(edge.seconds, q, picks)  # there the chords of both parts are exact
            middle = at if low * (1 + 1e-9) < at < high * (1 - 1e-9) else math.sqrt(low * high)
            spans += [(middle, high), (low, middle)]
    return best


def _milp(edge: Problem, q: int, keep: Any, low: float, high: float, gap: float) -> tuple[Picks, float]:
    """The best ranks among `keep` within seconds low to high, u as its chord there, and a bound on their value.

    Keys with equal numbers are one group: an integer variable says how many of it get a rank. All-zero picks and -inf
    if there are none. HiGHS may overstep a row by 1e-9 of it; then the capacity is drawn in by a little. No presolve:
    it gained nothing here, and HiGHS 1.12 at times prints a line as it undoes it.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    gain, seconds, memory, start = edge.gain[q], edge.seconds[q], edge.memory[q], float(edge.start[q])
    under, over = edge.under(np.array([low, high]))
    tilt = (over - under) / (high - low)
    _, first, group, size = np.unique(
        np.hstack([gain, seconds, memory]), axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    of, rank = np.nonzero(keep[first])  # the variables' groups and ranks
    key = first[of]
    profit = (gain - edge.lam * tilt * seconds)[key, rank] * 1e3 / edge.scale
    rows = [memory[key, rank] * 1e3 / max(edge.room[q], 1), seconds[key, rank] * 1e3 / (high - start), rank > 0]
    matrix = np.vstack([of == np.arange(len(size))[:, None], *rows])
    picks = np.zeros(len(gain), np.intp)
    for draw in (0, 1e-8, 1e-6, 1e-4):
        solved = milp(
            -profit,
            integrality=np.ones(len(of)),
            bounds=Bounds(0, size[of]),
            constraints=LinearConstraint(
                matrix,
                np.r_[size, -np.inf, (low - start) * 1e3 / (high - start), 1],
                np.r_[size, 1e3 * (1 - draw), 1e3, np.inf],
            ),
            options={"presolve": False, "mip_rel_gap": gap * 1e3 / max(float(np.abs(profit) @ size[of]), TINY)},
        )
        if solved.x is None:
            return np.zeros_like(picks), -math.inf
        picks[np.argsort(group.reshape(-1), kind="stable")] = np.repeat(rank, np.rint(solved.x).astype(int))
        if edge.total(memory[None], 0, picks) <= edge.room[q]:
            break
    return picks, -solved.mip_dual_bound * edge.scale / 1e3 - edge.lam * (under + tilt * (start - low))
