"""Bits, batch, depth, steps and ranks of each edge: hard memory, soft deadline. After Fang et al., arXiv 2404.06448.

The paper names the knobs and the aim, a low under-training rate; its equations were not seen. Ours: the value

    sum_m S_m g(r_m) - lam u,    u = max(0, 1 - deadline / seconds of the planned steps),

S_m the score of weight m, g concave with g(0) = 0; all solvers; the search for a deadline. Edges decouple, and every
plan adapts at least one weight. Equal values (to 1e-9): less u, then more bits, then the larger batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Picks = npt.NDArray[np.intp]  # [keys] positions in RANKS
RANKS = (0, 1, 2, 4, 8, 16, 32)
GAINS: dict[str, Callable[[Array], Array]] = {"log2": lambda rank: np.log2(1 + rank), "sqrt": np.sqrt}
MIXES = (0.0, 0.1, 0.25, 0.75, 0.9, 1.0)  # of seconds in the costs that greedy looks at
STEPS = ("equal", "capped", "filled")
TINY = 1e-300
TOLERANCE = 1e-4  # of sum_m S_m g(32): what `exact` may miss
FEW_STEPS = 3  # where fewer fit the deadline, `best` looks at choices of smaller depth


@dataclass(frozen=True)
class Key:
    """One candidate linear weight: kind is e.g. "q_proj", layer counts from the input."""

    name: str
    kind: str
    layer: int
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Choice:
    """What one (bits, batch, depth) costs one edge; arrays [keys]: _rank for a unit of rank, _key for having any.

    Only weights in the top `depth` layers may be adapted (None: all).
    """

    bits: int
    batch: int
    depth: int | None
    step_seconds: float
    step_seconds_rank: Array
    step_seconds_key: Array
    memory_bytes: float
    memory_bytes_rank: Array
    memory_bytes_key: Array


@dataclass(frozen=True)
class Demand:
    """One edge. fixed_seconds: what a round takes whatever the plan; transfer_seconds_rank: [keys] a unit of rank.

    steps: planned ones. With `batch` they are batches of that size, and a smaller batch plans more of them for the same
    samples; without, they hold for every choice. rows is for tables. min_steps and max_steps bound what a mode does.
    """

    edge: str
    choices: Sequence[Choice]
    capacity_bytes: float
    fixed_seconds: float
    transfer_seconds_rank: Array
    rows: int
    steps: int
    min_steps: int
    max_steps: int
    batch: int | None = None


@dataclass(frozen=True)
class EdgePlan:
    """What one edge is told; ranks has the adapted weights, in key order. seconds: of a round of `steps` steps.

    planned_seconds, under_training and value are of the planned steps, whatever the mode made of them.
    """

    edge: str
    bits: int
    batch: int
    depth: int | None
    steps: int
    ranks: Mapping[str, int]
    seconds: float
    planned_seconds: float
    memory_bytes: float
    capacity_bytes: float
    under_training: float
    value: float


class _Found(NamedTuple):
    """A solution: what it is worth (value over scale, -u, bits, batch), its choice, [keys] positions in RANKS."""

    worth: tuple[float, float, int, int]
    choice: int
    picks: Picks


def _worth(found: _Found) -> tuple[float, float, int, int]:
    return found.worth


class _Edge:
    """One edge's problem, all choices at once. Bytes are rounded up to whole ones, so that their sums are exact.

    planned, start, room: [choices] steps, seconds and free bytes without an adapter; gain, seconds, memory:
    [choices, keys, ranks], zero where `allowed` [choices, keys] says that the depth rules the weight out.
    """

    def __init__(
        self, keys: Sequence[Key], demand: Demand, scores: Array, deadline_seconds: float, lam: float, gain: str
    ) -> None:
        _check(keys, demand, scores, deadline_seconds, lam, gain)
        self.keys, self.demand, self.deadline, self.lam = keys, demand, deadline_seconds, lam
        choices, rank = demand.choices, np.array(RANKS, float)
        self.planned = np.array([math.ceil(demand.steps * (demand.batch or c.batch) / c.batch) for c in choices])
        self.start = demand.fixed_seconds + self.planned * np.array([c.step_seconds for c in choices])
        self.room = np.floor(demand.capacity_bytes) - np.ceil([c.memory_bytes for c in choices])
        layer = np.array([key.layer for key in keys])
        self.allowed = np.array([layer > (-math.inf if c.depth is None else layer.max() - c.depth) for c in choices])
        per_rank, per_key, bytes_rank, bytes_key = (
            np.array([getattr(c, name) for c in choices])[:, :, None]
            for name in ("step_seconds_rank", "step_seconds_key", "memory_bytes_rank", "memory_bytes_key")
        )
        used = self.allowed[:, :, None] & (rank > 0)
        steps = self.planned[:, None, None]
        self.gain = scores[:, None] * GAINS[gain](rank) * used
        self.seconds = (steps * (per_rank * rank + per_key) + demand.transfer_seconds_rank[:, None] * rank) * used
        self.memory = np.ceil((bytes_rank * rank + bytes_key) * used)
        self.costs = (self.seconds, self.memory)
        self.steps = [np.diff(x).reshape(len(choices), -1) for x in (self.gain, *self.costs)]  # [choices, keys x 6]
        self.scale = float(self.gain[:, :, -1].sum(1).max()) + lam or 1.0
        self._refuse_what_never_fits()

    def _refuse_what_never_fits(self) -> None:
        need = np.where(self.allowed, self.memory[:, :, 1], np.inf).min(1) - self.room
        self.can = need <= 0  # [choices] take one weight at rank 1
        if need.min() > 0:
            demand = self.demand
            smallest = demand.choices[int(need.argmin())]
            raise ValueError(
                f"edge {demand.edge}: rank 1 on one weight at {smallest.bits} bits and batch {smallest.batch} needs "
                f"{(np.floor(demand.capacity_bytes) + need.min()) / 2**30:.4g} GiB of "
                f"{demand.capacity_bytes / 2**30:.4g} GiB; give it more memory or a smaller model"
            )

    def under(self, seconds: Any) -> Any:
        """The under-training rate of rounds of `seconds`, any shape."""
        return np.maximum(0.0, 1 - self.deadline / seconds)

    def total(self, of: Array, choice: int, picks: Picks) -> float:
        """The sum over keys of one of the tables."""
        return float(np.take_along_axis(of[choice], picks[:, None], 1).sum())

    def found(self, choice: int, picks: Picks) -> _Found:
        """The solution with its worth: -inf if it adapts nothing or does not fit."""
        picks = picks * self.allowed[choice]
        under = float(self.under(self.start[choice] + self.total(self.seconds, choice, picks)))
        value = (self.total(self.gain, choice, picks) - self.lam * under) / self.scale
        if not picks.any() or self.total(self.memory, choice, picks) > self.room[choice]:
            value = -math.inf
        of = self.demand.choices[choice]
        return _Found((value if value == -math.inf else round(value, 9), -under, of.bits, of.batch), choice, picks)

    def round_seconds(self, found: _Found) -> tuple[float, float]:
        """Seconds of a round beside its steps, and of a step."""
        of, rank = self.demand.choices[found.choice], np.array(RANKS)[found.picks]
        step = of.step_seconds + float(of.step_seconds_rank @ rank + of.step_seconds_key @ (rank > 0))
        return self.demand.fixed_seconds + float(self.demand.transfer_seconds_rank @ rank), step

    def plan(self, found: _Found, mode: str) -> EdgePlan:
        """The solution as a plan, with the steps of `mode`."""
        demand, of = self.demand, self.demand.choices[found.choice]
        other, step = self.round_seconds(found)
        planned = int(self.planned[found.choice])
        steps = count_steps(mode, planned, demand.min_steps, demand.max_steps, (self.deadline - other) / step)
        return EdgePlan(
            edge=demand.edge,
            bits=of.bits,
            batch=of.batch,
            depth=of.depth,
            steps=steps,
            ranks={key.name: int(r) for key, r in zip(self.keys, np.array(RANKS)[found.picks], strict=True) if r},
            seconds=other + steps * step,
            planned_seconds=other + planned * step,
            memory_bytes=math.ceil(of.memory_bytes) + self.total(self.memory, found.choice, found.picks),
            capacity_bytes=demand.capacity_bytes,
            under_training=-found.worth[1],
            value=self.total(self.gain, found.choice, found.picks) + self.lam * found.worth[1],
        )


def _check(keys: Sequence[Key], demand: Demand, scores: Array, deadline: float, lam: float, gain: str) -> None:
    costs = ("step_seconds_rank", "step_seconds_key", "memory_bytes_rank", "memory_bytes_key")
    arrays = {f"choice {i}: {name}": getattr(c, name) for i, c in enumerate(demand.choices) for name in costs}
    for name, array in {"scores": scores, "transfer_seconds_rank": demand.transfer_seconds_rank, **arrays}.items():
        if np.shape(array) != (len(keys),) or not (np.isfinite(array) & (np.asarray(array) >= 0)).all():
            raise ValueError(f"edge {demand.edge}: {name} must be {len(keys)} finite numbers of at least 0, one a key")
    least, most = demand.min_steps, demand.max_steps
    rules = [
        (bool(keys) and len({key.name for key in keys}) == len(keys), "keys must be at least one, no name twice"),
        (len(demand.choices) > 0, "choices must be at least one"),
        (deadline > 0, f"deadline_seconds {deadline} must be above 0"),
        (0 <= lam < math.inf, f"lam {lam} must be finite and at least 0"),
        (gain in GAINS, f"unknown gain {gain!r}: one of {', '.join(GAINS)}"),
        (0 <= demand.fixed_seconds < math.inf, f"fixed_seconds {demand.fixed_seconds} must be finite and at least 0"),
        (demand.capacity_bytes > 0, f"capacity_bytes {demand.capacity_bytes} must be above 0"),
        (demand.steps >= 1, f"steps {demand.steps} must be at least 1"),
        (demand.batch is None or demand.batch >= 1, f"batch {demand.batch} must be at least 1, or None"),
        (1 <= least <= most, f"min_steps {least} and max_steps {most} must be at least 1 and in this order"),
    ]
    for c in demand.choices:
        rules += [
            (0 < c.step_seconds < math.inf, f"step_seconds {c.step_seconds} must be finite and above 0"),
            (0 <= c.memory_bytes < math.inf, f"memory_bytes {c.memory_bytes} must be finite and at least 0"),
            (c.batch >= 1, f"batch {c.batch} must be at least 1"),
            (c.depth is None or c.depth >= 1, f"depth {c.depth} must be at least 1, or None"),
        ]
    for holds, message in rules:
        if not holds:
            raise ValueError(f"edge {demand.edge}: {message}")


def count_steps(mode: str, planned: int, min_steps: int, max_steps: int, fit: float) -> int:
    """The steps of a round when `fit`, any number, end by the deadline. equal: the planned ones, as in the paper.

    capped: those that fit, at most the planned ones. filled: those that fit, at most max_steps. Both do min_steps at
    least, capped no more than planned. Ours.
    """
    if mode not in STEPS:
        raise ValueError(f"unknown steps {mode!r}: one of {', '.join(STEPS)}")
    whole = max(min_steps, math.floor(min(fit, max_steps) + 1e-9))
    return {"equal": planned, "capped": min(planned, whole), "filled": whole}[mode]


def _uniform(edge: _Edge) -> list[_Found]:
    """Of each choice the best with one rank, the smaller of equals."""
    gain, seconds, memory = (x.sum(1)[:, 1:] for x in (edge.gain, edge.seconds, edge.memory))  # [choices, 6]
    value = gain - edge.lam * edge.under(edge.start[:, None] + seconds)
    value[memory > edge.room[:, None]] = -np.inf
    keys = edge.allowed.shape[1]
    return [edge.found(q, np.full(keys, at + 1)) for q, at in enumerate(value.argmax(1))]


def _starts(edge: _Edge, rows: Picks, mix: Array) -> list[tuple[float, int, Picks]]:
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


def _greedy(edge: _Edge) -> list[_Found]:
    """Of the three most promising choices the best start of the steps in order, filled up; seconds and bytes mixed."""
    small = edge.memory[:, :, -1].sum(1) <= edge.room  # then only seconds cost
    rows = np.arange(len(small))
    starts = dict(enumerate(_starts(edge, rows, np.where(small, 1.0, 0.5))))
    top = sorted(np.flatnonzero(edge.can).tolist(), key=lambda q: starts[q][0], reverse=True)[:3]
    pairs = [(q, mix) for q in top if not small[q] for mix in MIXES]
    more = _starts(edge, *(np.array(x) for x in zip(*pairs))) if pairs else []
    for (q, _), start in zip(pairs, more):
        starts[q] = max(starts[q], start, key=lambda one: one[0])
    return [_fill(edge, q, *starts[q]) for q in top] + _uniform(edge)


def _fill(edge: _Edge, q: int, value: float, taken: int, order: Picks) -> _Found:
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


def _lines(edge: _Edge, q: int, prices: Array) -> tuple[Array, Array]:
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


def _improve(edge: _Edge, q: int, best: _Found, tolerance: float) -> _Found:
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
        best = max(best, edge.found(q, picks), key=_worth)
        goal = (best.worth[0] + tolerance) * edge.scale
        if bound > goal and high > low * (1 + 1e-9):
            at = edge.start[q] + edge.total(edge.seconds, q, picks)  # there the chords of both parts are exact
            middle = at if low * (1 + 1e-9) < at < high * (1 - 1e-9) else math.sqrt(low * high)
            spans += [(middle, high), (low, middle)]
    return best


def _milp(edge: _Edge, q: int, keep: Any, low: float, high: float, gap: float) -> tuple[Picks, float]:
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
    edge = _Edge(keys, demand, scores, deadline_seconds, lam, gain)
    best = max(_greedy(edge), key=_worth)
    most = edge.gain[:, :, -1].sum(1) - lam * edge.under(edge.start)
    for q in np.argsort(-most, kind="stable").tolist():
        best = _improve(edge, q, best, tolerance)
    return edge.plan(best, steps)


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
    """The plan that takes the best gain per cost first, in three mixes of seconds and bytes; never below `uniform`."""
    edge = _Edge(keys, demand, scores, deadline_seconds, lam, gain)
    return edge.plan(max(_greedy(edge), key=_worth), steps)


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
    edge = _Edge(keys, demand, scores, deadline_seconds, lam, gain)
    best = max(_uniform(edge), key=_worth)
    if best.worth[0] == -math.inf:
        raise ValueError(f"edge {demand.edge}: rank 1 on all weights fits no choice; plan by another solver")
    return edge.plan(best, steps)


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

    The rank is the largest that fits and whose transfer takes at most communication_share of the deadline; where that
    is below min_rank, whole kinds go, lowest score per cost first. Of the choices that keep the most, the largest batch
    up to the reference (demand.batch, else the largest there is), then the most bits. A depth below all only if nothing
    else fits, or if not FEW_STEPS steps do by the deadline. lam and gain only say what the plan's value is.
    """
    if not (0 < communication_share <= 1 and min_rank >= 1):
        raise ValueError(f"communication_share {communication_share} must be in (0, 1], min_rank {min_rank} at least 1")
    edge = _Edge(keys, demand, scores, deadline_seconds, lam, gain)
    choices = demand.choices
    reference = max(demand.batch or math.inf, min(c.batch for c in choices))
    order = sorted(range(len(choices)), key=lambda q: (-choices[q].batch, -choices[q].bits))
    options = []  # one a depth, all layers first
    for depth in sorted({c.depth or math.inf for c in choices}, reverse=True):
        here = [q for q in order if (choices[q].depth or math.inf) == depth]
        wide = {q: _widest(edge, q, scores, communication_share * deadline_seconds, min_rank) for q in here}
        fits = [q for q in here if wide[q][1].any()]
        if fits:  # the first of those that keep the most
            q = max(fits, key=lambda q: (choices[q].batch <= reference, *wide[q][0]))
            options.append(edge.found(q, wide[q][1]))
    few = [other + FEW_STEPS * step for other, step in map(edge.round_seconds, options)]
    at = next((i for i, seconds in enumerate(few) if seconds <= deadline_seconds), few.index(min(few)))
    return edge.plan(options[at], steps)


def _widest(edge: _Edge, q: int, scores: Array, budget: float, min_rank: int) -> tuple[tuple[int, int], Picks]:
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
        level = max((i for i in fits if RANKS[i] * transfer[mask].sum() <= budget), default=0)
        if RANKS[level] >= min_rank:
            break
    if level == 0 and memory[mask, 1].sum() <= edge.room[q]:
        level = 1
    elif level == 0:
        single = np.where(allowed & (memory[:, 1] <= edge.room[q]), scores / cost, -1)
        level, mask = 1, (np.arange(len(single)) == single.argmax()) & (single.max() >= 0)
    return (min(RANKS[level], min_rank), int(mask.sum())), level * mask


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
    plans: Callable[[float], Mapping[str, EdgePlan]], points: int = 16
) -> tuple[float, Mapping[str, EdgePlan]]:
    """The deadline in seconds, and its plans, that trains on most samples a second of round; the earliest of equals.

    Ours: sum of steps x batch over the seconds of the slowest edge, on a geometric grid of `points` between the fastest
    and the slowest edge's planned seconds. With filled steps it rises with the deadline until max_steps stop the fast.
    """
    unhurried = [one.planned_seconds for one in plans(math.inf).values()]
    hurried = [one.planned_seconds for one in plans(min(unhurried)).values()]
    grid = np.geomspace(min(hurried), max(unhurried), points).tolist()
    tried = [(deadline, plans(deadline)) for deadline in dict.fromkeys(grid)]
    return max(tried, key=lambda one: _samples_per_second(one[1]))


def _samples_per_second(plans: Mapping[str, EdgePlan]) -> float:
    return sum(one.steps * one.batch for one in plans.values()) / max(one.seconds for one in plans.values())
