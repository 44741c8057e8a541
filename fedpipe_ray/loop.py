"""The federated loop: a generator that yields a Round. Callers log, save, prune and stop between yields."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from .errors import AllEdgesLost
from .evaluate import Metrics, combine
from .fleet import Fleet
from .message import Message
from .methods.base import Method
from .randomness import rng_for
from .report import Lost, Report
from .settings import Profile
from .site import Site


@dataclass(frozen=True)
class Round:
    """What one round did. number counts from 0; state is the server's after it.

    outcomes: Report (its message released) or Lost of every edge asked, in their order; evaluation: of every edge that
    has validation rows, empty where none was due. wall_seconds leave evaluate_seconds out.
    """

    number: int
    state: Message
    outcomes: Mapping[str, Report | Lost]
    evaluation: Mapping[str, Metrics]
    quality: Metrics
    wall_seconds: float
    evaluate_seconds: float

    @property
    def reports(self) -> list[Report]:
        """The reports that were used."""
        return [outcome for outcome in self.outcomes.values() if isinstance(outcome, Report)]

    @property
    def train_loss(self) -> float:
        """Mean of the edges' training losses, weighted as their updates."""
        weight = sum(report.weight for report in self.reports)
        return sum(r.train_loss * r.weight for r in self.reports) / weight if weight else math.nan

    @property
    def virtual_seconds(self) -> float:
        """What this round would take on the profiles: that of the slowest edge, a lost one as far as it got."""
        return max((outcome.cost.virtual_seconds for outcome in self.outcomes.values()), default=0.0)

    @property
    def bytes_up(self) -> int:
        """Bytes of all updates that arrived."""
        return sum(report.cost.bytes_up for report in self.reports)

    @property
    def bytes_down(self) -> int:
        """Bytes of all orders sent, also to edges that were lost."""
        return sum(outcome.cost.bytes_down for outcome in self.outcomes.values())


@dataclass(frozen=True)
class Start:
    """Where a loop begins: `state` after `round` finished rounds, and the edges' private states by path and hash."""

    state: Message
    round: int = 0
    private: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def sample(edges: Mapping[str, Profile], fraction: float, seed: int, round: int) -> dict[str, Profile]:
    """The edges asked in a round: those available by their profile's chance, then a share of them, at least one."""
    here = [
        e
        for e, p in edges.items()
        if p.availability >= 1 or rng_for(seed, round, f"available/{e}").random() < p.availability
    ]
    here = here or [list(edges)[int(rng_for(seed, round, "available").integers(len(edges)))]]
    count = max(1, round_half_up(fraction * len(here)))
    chosen = set(rng_for(seed, round, "sample").permutation(np.array(here, dtype=object))[:count])
    return {name: profile for name, profile in edges.items() if name in chosen}


def round_half_up(value: float) -> int:
    """The nearest whole number, halves up."""
    return math.floor(value + 0.5)


def federate(
    method: Method,
    fleet: Fleet,
    server: Site,
    *,
    rounds: int,
    seed: int,
    fraction: float = 1.0,
    evaluate_every: int = 1,
    start: Start | None = None,
) -> Iterator[Round]:
    """Runs `rounds` rounds of `method` on `fleet` from `start` (default: the method's own beginning).

    Raises AllEdgesLost if no edge of a round gave a usable report and the method learned nothing from that; the state
    before it stands.
    """
    start = start or Start(method.start(server, rng_for(seed, 0, "start")))
    state, first = start.state, start.round
    del start  # or the first state would be held to the end
    for number in range(first, rounds):
        began = time.perf_counter()
        edges = sample(fleet.edges, fraction, seed, number)
        orders = method.plan(state, edges, server, number, rng_for(seed, number, "plan"))
        outcomes: dict[str, Report | Lost] = {}
        arriving = watch(fleet.run(orders, number), outcomes)
        before, state = state, method.aggregate(state, arriving, server, number, rng_for(seed, number, "aggregate"))
        outcomes = {name: settled(outcome) for name, outcome in outcomes.items()}
        learned = state.numbers != before.numbers  # a planner that learned from the losses tries again
        del before
        if not learned and not any(isinstance(outcome, Report) for outcome in outcomes.values()):
            raise AllEdgesLost(number, list(outcomes.values()))
        wall = time.perf_counter() - began
        evaluation: dict[str, Metrics] = {}
        if evaluate_every and ((number + 1) % evaluate_every == 0 or number + 1 == rounds):
            measured = fleet.evaluate(state, "validation")
            evaluation = {name: found for name, found in measured.items() if not isinstance(found, Lost) and found}
        spent = time.perf_counter() - began - wall
        yield Round(number, state, outcomes, evaluation, combine(evaluation), wall, spent)


def watch(reports: Iterator[Report | Lost], outcomes: dict[str, Report | Lost]) -> Iterator[Report | Lost]:
    """Passes reports on and notes them by edge."""
    for report in reports:
        outcomes[report.edge] = report
        yield report


def settled(outcome: Report | Lost) -> Report | Lost:
    """A report whose message the server rejected is a lost edge."""
    if isinstance(outcome, Report) and outcome.rejected is not None:
        return Lost(outcome.edge, outcome.rejected, cost=outcome.cost, private=outcome.private)
    return outcome
