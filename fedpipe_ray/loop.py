"""The federated loop: a generator that yields a Round. Callers log, save, prune and stop between yields."""

from __future__ import annotations

import math
import time
from bisect import insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arriving import checked
from .errors import AllEdgesLost
from .evaluate import Metrics, combine
from .fleet import Fleet
from .held import Held
from .message import Message
from .methods.base import Method, shown
from .planned import told
from .randomness import rng_for
from .report import Lost, Report, dropped
from .server_optimizer import Moments, stepped
from .settings import Profile
from .site import Site
from .traces import next_seconds


@dataclass(frozen=True)
class Flight:
    """An edge at work on a state that may no longer be the newest: `base`, the one after base_round rounds.

    started_seconds: on the virtual clock. What it will report is a function of this and the seed, so no more is kept.
    """

    edge: str
    base_round: int
    started_seconds: float
    base: Message = field(repr=False)


@dataclass(frozen=True)
class Round:
    """What one round did. number counts from 0; state is the server's after it.

    outcomes: Report (its message released) or Lost of every edge that was heard of, in the order of the fleet;
    evaluation: of every edge that has validation rows, empty where none was due. wall_seconds leave evaluate_seconds
    out. virtual_seconds: from the end of the round before to the end of this one, clock_seconds: at that end. flights:
    the edges still at work then (fleet.mode: buffered). held: digests of what the edges hold to keep. server_loss: the
    training loss of the server's own steps. moments: of server.optimizer, after it. plans: the orders in short;
    started: when each edge was asked, on the virtual clock.
    """

    number: int
    state: Message
    outcomes: Mapping[str, Report | Lost]
    evaluation: Mapping[str, Metrics]
    quality: Metrics
    wall_seconds: float
    evaluate_seconds: float
    virtual_seconds: float = 0.0
    clock_seconds: float = 0.0
    flights: tuple[Flight, ...] = ()
    held: Mapping[str, frozenset[str]] = field(default_factory=dict)
    server_loss: float = math.nan
    moments: Moments = field(default_factory=dict)
    plans: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    started: Mapping[str, float] = field(default_factory=dict)

    @property
    def reports(self) -> list[Report]:
        """The reports that were used."""
        return [outcome for outcome in self.outcomes.values() if isinstance(outcome, Report)]

    @property
    def train_loss(self) -> float:
        """Mean of the edges' training losses, weighted as their updates; the server's where no edge trained."""
        weight = sum(report.weight for report in self.reports)
        return sum(r.train_loss * r.weight for r in self.reports) / weight if weight else self.server_loss

    @property
    def bytes_up(self) -> int:
        """Bytes of all updates that arrived whole, also of those that were not used."""
        return sum(outcome.cost.bytes_up for outcome in self.outcomes.values())

    @property
    def bytes_down(self) -> int:
        """Bytes of all orders sent, also to edges that were lost."""
        return sum(outcome.cost.bytes_down for outcome in self.outcomes.values())


@dataclass(frozen=True)
class Start:
    """Where a loop begins: `state` after `round` finished rounds, and the edges' private states by path and hash.

    clock_seconds, flights, held, moments: as of the last finished round.
    """

    state: Message
    round: int = 0
    private: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    clock_seconds: float = 0.0
    flights: tuple[Flight, ...] = ()
    held: Mapping[str, frozenset[str]] = field(default_factory=dict)
    moments: Moments = field(default_factory=dict)


def there(edges: Mapping[str, Profile], seed: int, round: int, clock_seconds: float) -> dict[str, Profile]:
    """The edges that can be asked at this moment, perhaps none: their trace has them there, and their chance too."""
    return {
        name: profile
        for name, profile in edges.items()
        if next_seconds(profile.trace, profile.trace_period_seconds, clock_seconds) <= clock_seconds
        and takes_part(name, profile, seed, round)
    }


def takes_part(edge: str, profile: Profile, seed: int, round: int) -> bool:
    """Whether the edge's chance falls so in this round: a matter of seed, round and name alone."""
    return profile.availability >= 1 or rng_for(seed, round, f"available/{edge}").random() < profile.availability


def awaited(
    edges: Mapping[str, Profile], seed: int, round: int, clock_seconds: float
) -> tuple[float, dict[str, Profile]]:
    """(the first moment from `clock_seconds` on at which an edge can be asked, those that can be then).

    Where nobody's chance falls so, one edge is drawn and waited for. Raises AllEdgesLost where every trace has ended.
    """
    times = {name: next_seconds(p.trace, p.trace_period_seconds, clock_seconds) for name, p in edges.items()}
    coming = [name for name, time in times.items() if time < math.inf]
    if not coming:
        why = f"its trace ended before the {clock_seconds:.6g} s of the virtual clock; set trace_period_seconds"
        raise AllEdgesLost(round, [Lost(name, why) for name in edges])
    willing = [name for name in coming if takes_part(name, edges[name], seed, round)]
    willing = willing or [coming[int(rng_for(seed, round, "available").integers(len(coming)))]]
    soonest = min(times[name] for name in willing)
    return soonest, {name: edges[name] for name in willing if times[name] <= soonest}


def sample(edges: Mapping[str, Profile], count: int, seed: int, round: int) -> dict[str, Profile]:
    """`count` of `edges`, or all, drawn for a round; in their order."""
    chosen = set(rng_for(seed, round, "sample").permutation(np.array(list(edges), dtype=object))[:count])
    return {name: profile for name, profile in edges.items() if name in chosen}


def counts(there: int, fraction: float, over_select: float = 1.0) -> tuple[int, int]:
    """(how many reports a round uses, how many edges it asks) of those that are there: at least one."""
    used = max(1, round_half_up(fraction * there))
    return used, min(there, math.ceil(round(over_select * used, 9)))  # 1.1 x 10 is 11, not 11.000000000000002


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
    over_select: float = 1.0,
    deadline_seconds: float | None = None,
    evaluate_every: int = 1,
    start: Start | None = None,
) -> Iterator[Round]:
    """Runs `rounds` rounds of `method` on `fleet` from `start` (default: the method's own beginning).

    Raises AllEdgesLost if no edge of a round gave a usable report and the method learned nothing from that, or none can
    ever be asked again; the state before it stands.
    """
    start = start or Start(method.start(server, rng_for(seed, 0, "start")))
    state, first, clock, held = start.state, start.round, start.clock_seconds, Held(start.held)
    moments = start.moments
    del start  # or the first state would be held to the end
    deadline = math.inf if deadline_seconds is None else deadline_seconds
    for number in range(first, rounds):
        began = time.perf_counter()
        opened, here = awaited(fleet.edges, seed, number, clock)
        used, asked = counts(len(here), fraction, over_select)
        edges = sample(here, asked, seed, number)
        planned = method.plan(state, edges, server, number, rng_for(seed, number, "plan"))
        orders, outcomes = held.mark(orders_of(planned)), dict[str, Report | Lost]()
        reports = with_left_out(planned, fleet.run(orders, number))
        reports = on_time(checked(reports, orders, server.run), deadline)
        arriving = watch(reports if used >= len(orders) else first_of(reports, used), outcomes)
        before, state = state, method.aggregate(state, arriving, server, number, rng_for(seed, number, "aggregate"))
        held.note(orders, outcomes)
        closed = closing(outcomes, used, deadline) + server.cost.virtual_seconds  # 0 unless a method puts it there
        outcomes = usable(outcomes, number, learned=state.numbers != before.numbers)
        state, moments = optimized(method, server, number, before, state, moments, outcomes)
        plans = told(orders)
        del before, planned, orders, reports, arriving
        wall = time.perf_counter() - began
        evaluation = measured(fleet, shown(method, state, server), number + 1, rounds, evaluate_every)
        spent = time.perf_counter() - began - wall
        past, clock = clock, opened + closed
        seconds = opened - past + closed
        quality = combine(evaluation)
        yield Round(
            number, state, outcomes, evaluation, quality, wall, spent, seconds, clock, held=held.edges,
            server_loss=server.train_loss, moments=moments, plans=plans, started=dict.fromkeys(outcomes, opened),
        )  # fmt: skip


def orders_of(planned: Mapping[str, Message | Lost]) -> dict[str, Message]:
    """The orders of a plan."""
    return {edge: order for edge, order in planned.items() if isinstance(order, Message)}


def with_left_out(planned: Mapping[str, Message | Lost], reports: Iterator[Report | Lost]) -> Iterator[Report | Lost]:
    """The reports, and between them, where it was planned, the Lost of each edge that was left out."""
    for one in planned.values():
        yield one if isinstance(one, Lost) else next(reports)


def on_time(reports: Iterable[Report | Lost], deadline: float) -> Iterator[Report | Lost]:
    """The reports; those that come after `deadline` seconds of the virtual clock as Lost, their messages unfetched."""
    for report in reports:
        if isinstance(report, Report) and report.cost.virtual_seconds > deadline:
            came = f"late: its report came at {report.cost.virtual_seconds:.4g} s"
            yield dropped(report, f"{came}, after fleet.deadline_seconds: {deadline:g}", deadline)
        else:
            yield report


def first_of(reports: Iterable[Report | Lost], count: int) -> Iterator[Report | Lost]:
    """All outcomes in their order, of the reports only the first `count` on the virtual clock, ties by name.

    The others come as Lost. Waits for every edge, for who is first is known only then, and holds `count` messages.
    """
    outcomes: list[Report | Lost] = []
    ahead: list[Report] = []
    for outcome in reports:
        outcomes.append(outcome)
        if isinstance(outcome, Report):
            insort(ahead, outcome, key=lambda one: (one.cost.virtual_seconds, one.edge))
            for late in ahead[count:]:
                late.release()
            del ahead[count:]
    taken, closed = {one.edge for one in ahead}, ahead[-1].cost.virtual_seconds if ahead else 0.0
    del ahead
    for outcome in outcomes:
        if isinstance(outcome, Report) and outcome.edge not in taken:
            came = f"late: its report came at {outcome.cost.virtual_seconds:.4g} s"
            yield dropped(outcome, f"{came}, after the {count} that the round uses, the last at {closed:.4g} s", closed)
        else:
            yield outcome


def closing(outcomes: Mapping[str, Report | Lost], used: int, deadline: float) -> float:
    """Seconds of the virtual clock after which a round is over.

    That is when the last report it uses is there; where some edges gave none, when the slowest edge had ended, a lost
    one as far as it got; but never after the deadline.
    """
    taken = [one.cost.virtual_seconds for one in outcomes.values() if isinstance(one, Report)]
    if len(taken) >= used:
        return max(taken)
    return min(deadline, max((one.cost.virtual_seconds for one in outcomes.values()), default=0.0))


def measured(fleet: Fleet, state: Message | None, done: int, rounds: int, every: int) -> dict[str, Metrics]:
    """Metrics by edge of a state after `done` of `rounds` rounds, if they are due."""
    if not every or (done % every and done != rounds):
        return {}
    found = fleet.evaluate(state, "validation")
    return {name: metrics for name, metrics in found.items() if not isinstance(metrics, Lost) and metrics}


def usable(outcomes: Mapping[str, Report | Lost], round: int, *, learned: bool) -> dict[str, Report | Lost]:
    """The outcomes as they are recorded. Raises AllEdgesLost if there is no report, and nothing was `learned` from it.

    A planner that learned from the losses tries again.
    """
    found = {name: settled(outcome) for name, outcome in outcomes.items()}
    if not learned and not any(isinstance(outcome, Report) for outcome in found.values()):
        raise AllEdgesLost(round, list(found.values()))
    return found


def optimized(
    method: Method, server: Site, round: int, before: Message, after: Message, moments: Moments,
    outcomes: Mapping[str, Report | Lost],
) -> tuple[Message, Moments]:  # fmt: skip
    """(the next state, the next moments): what server.optimizer makes of a round, if it has a usable report."""
    how = server.run.server.optimizer
    if how is None or not any(isinstance(outcome, Report) for outcome in outcomes.values()):
        return after, moments
    aside = (*getattr(method, "aside", ()), *getattr(method, "still", lambda _: ())(round))
    return stepped(
        before, after, moments, how, aside, None if getattr(method, "adds", False) else server.run.wire.dtype
    )


def watch(reports: Iterable[Report | Lost], outcomes: dict[str, Report | Lost]) -> Iterator[Report | Lost]:
    """Passes reports on and notes them by edge."""
    for report in reports:
        outcomes[report.edge] = report
        yield report


def settled(outcome: Report | Lost) -> Report | Lost:
    """A report whose message the server rejected is a lost edge."""
    if isinstance(outcome, Report) and outcome.rejected is not None:
        return Lost(outcome.edge, outcome.rejected, cost=outcome.cost, private=outcome.private)
    return outcome
