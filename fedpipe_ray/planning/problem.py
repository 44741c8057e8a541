"""One edge's problem: its choices, what each costs for every rank, and what a solution is worth. See planning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Picks = npt.NDArray[np.intp]  # [keys] positions in RANKS
RANKS = (0, 1, 2, 4, 8, 16, 32)
GAINS: dict[str, Callable[[Array], Array]] = {"log2": lambda rank: np.log2(1 + rank), "sqrt": np.sqrt}
MIXES = (0.0, 0.1, 0.25, 0.75, 0.9, 1.0)  # shares of seconds, the rest bytes, in what `greedy` takes for cost after 0.5
STEPS = ("equal", "capped", "filled")
TINY = 1e-300
TOLERANCE = 1e-4  # of sum_m S_m g(32) + lam: what `exact` may miss
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
    samples; without, they hold for every choice. min_steps and max_steps bound what a mode does, and mean batches of
    that size as `steps` does. rows is for tables. max_rank: the largest that counts. limit_seconds: a longer round is
    lost, so not even min_steps are done beyond it. layers: of the model, for Choice.depth; None: up to the highest that
    a key is in.
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
    max_rank: int = RANKS[-1]
    limit_seconds: float = math.inf
    layers: int | None = None


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


class Found(NamedTuple):
    """A solution: what it is worth (value over scale, -u, bits, batch), its choice, [keys] positions in RANKS."""

    worth: tuple[float, float, int, int]
    choice: int
    picks: Picks


def worth(found: Found) -> tuple[float, float, int, int]:
    return found.worth


class Problem:
    """One edge's problem, all choices at once. Bytes are rounded up to whole ones, so that their sums are exact.

    planned, start, room: [choices] steps, seconds and free bytes without an adapter; gain, seconds, memory:
    [choices, keys, ranks], zero where `allowed` [choices, keys] says that the depth rules the weight out.
    """

    def __init__(
        self, keys: Sequence[Key], demand: Demand, scores: Array, deadline_seconds: float, lam: float, gain: str
    ) -> None:
        _check(keys, demand, scores, deadline_seconds, lam, gain)
        self.keys, self.demand, self.deadline, self.lam = keys, demand, deadline_seconds, lam
        self.ranks = np.minimum(RANKS, demand.max_rank)  # those above are one and the same
        choices, rank = demand.choices, self.ranks.astype(float)
        self.planned = np.array([self.batches(demand.steps, c.batch) for c in choices])
        self.start = demand.fixed_seconds + self.planned * np.array([c.step_seconds for c in choices])
        self.room = np.floor(demand.capacity_bytes) - np.ceil([c.memory_bytes for c in choices])
        layer = np.array([key.layer for key in keys])
        top = int(layer.max()) if demand.layers is None else demand.layers - 1
        self.allowed = np.array([layer > (-math.inf if c.depth is None else top - c.depth) for c in choices])
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
        some, need = self.allowed.any(1), np.full(len(self.room), np.inf)
        least = np.where(self.allowed, self.memory[:, :, 1], np.inf).min(1)
        need[some] = least[some] - self.room[some]
        self.can = need <= 0  # [choices] take one weight at rank 1
        if need.min() > 0:
            demand = self.demand
            smallest = demand.choices[int(need.argmin())]
            fewer = ", allow fewer bits" if smallest.bits > 4 else ""
            raise ValueError(
                f"edge {demand.edge}: rank 1 on one weight at {smallest.bits} bits and batch {smallest.batch} needs "
                f"{(np.floor(demand.capacity_bytes) + need.min()) / 2**30:.4g} GiB of "
                f"{demand.capacity_bytes / 2**30:.4g} GiB; give it more memory{fewer} or a smaller model"
            )

    def batches(self, steps: int, batch: int) -> int:
        """How many batches of this size hold the rows of so many of the reference size."""
        return math.ceil(steps * (self.demand.batch or batch) / batch)

    def under(self, seconds: Any) -> Any:
        """The under-training rate of rounds of `seconds`, any shape."""
        return np.maximum(0.0, 1 - self.deadline / seconds)

    def total(self, of: Array, choice: int, picks: Picks) -> float:
        """The sum over keys of one of the tables."""
        return float(of[choice][np.arange(len(picks)), picks].sum())

    def found(self, choice: int, picks: Picks) -> Found:
        """The solution with its worth: -inf if it adapts nothing or does not fit."""
        picks = picks * self.allowed[choice]
        under = float(self.under(self.start[choice] + self.total(self.seconds, choice, picks)))
        value = (self.total(self.gain, choice, picks) - self.lam * under) / self.scale
        if not picks.any() or self.total(self.memory, choice, picks) > self.room[choice]:
            value = -math.inf
        of = self.demand.choices[choice]
        return Found((value if value == -math.inf else round(value, 9), -under, of.bits, of.batch), choice, picks)

    def round_seconds(self, found: Found) -> tuple[float, float]:
        """Seconds of a round beside its steps, and of a step."""
        of, rank = self.demand.choices[found.choice], self.ranks[found.picks]
        step = of.step_seconds + float(of.step_seconds_rank @ rank + of.step_seconds_key @ (rank > 0))
        return self.demand.fixed_seconds + float(self.demand.transfer_seconds_rank @ rank), step

    def plan(self, found: Found, mode: str) -> EdgePlan:
        """The solution as a plan, with the steps of `mode`."""
        demand, of = self.demand, self.demand.choices[found.choice]
        other, step = self.round_seconds(found)
        planned = int(self.planned[found.choice])
        least, most = (self.batches(n, of.batch) for n in (demand.min_steps, demand.max_steps))
        least = max(1, int(min(least, (demand.limit_seconds - other) / step)))
        steps = count_steps(mode, planned, least, most, (self.deadline - other) / step)
        return EdgePlan(
            edge=demand.edge,
            bits=of.bits,
            batch=of.batch,
            depth=of.depth,
            steps=steps,
            ranks={key.name: int(r) for key, r in zip(self.keys, self.ranks[found.picks], strict=True) if r},
            seconds=other + steps * step,
            planned_seconds=other + planned * step,
            memory_bytes=math.ceil(of.memory_bytes) + self.total(self.memory, found.choice, found.picks),
            capacity_bytes=demand.capacity_bytes,
            under_training=-found.worth[1],
            value=self.total(self.gain, found.choice, found.picks) + self.lam * found.worth[1],
        )


def memory_of(keys: Sequence[Key], demand: Demand, plan: EdgePlan) -> float:
    """Bytes of a plan by another demand of its edge, one that has its choice of bits, batch and depth."""
    of = next(c for c in demand.choices if (c.bits, c.batch, c.depth) == (plan.bits, plan.batch, plan.depth))
    rank = np.array([plan.ranks.get(key.name, 0) for key in keys], float)
    return of.memory_bytes + float(of.memory_bytes_rank @ rank + of.memory_bytes_key @ (rank > 0))


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
