"""The buffered semi-asynchronous loop, FedBuff (Nguyen et al. 2022, arXiv 2106.06639, algorithm 1).

    x_{t+1} = x_t + sum_i w_i (y_i - x_{t - tau_i}) / sum_i w_i,    w_i = n_i / sqrt(1 + tau_i)

over the K updates y_i in the buffer, tau_i states old. The paper's: the buffer, the staleness discount, concurrency.
Ours: the sum is the method's own mean, so the discount shifts weight among the updates of a buffer and does not shorten
their sum; n_i counts rows; an edge trains at most once from a state, since from the same state it would draw the same
batches; the edges asked from a state are drawn, when it comes out, from those idle then.

Which report comes when is a matter of the virtual clock alone. An edge's work is done in full when it is asked, and its
report waits for its moment, its message not fetched. Methods see a usual round: plan, and reports that look as if they
had started from the newest state.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .arriving import checked
from .errors import UnfitUpdate, UserError
from .evaluate import combine
from .fleet import Fleet
from .loop import Flight, Round, Start, awaited, measured, optimized, orders_of, there, usable, watch
from .message import Message
from .methods import declaring
from .methods.base import Method, unlike
from .planned import told
from .randomness import rng_for
from .report import Lost, Report, dropped
from .settings import Run
from .site import Site


def check_buffered(run: Run, method: Method) -> None:
    """Raises UserError for a key of the other fleet.mode, or if method or number of edges do not allow `buffered`."""
    settings, edges = run.fleet, len(run.fleet.edges)
    idle: dict[str, float | None] = {"fraction": 1.0, "over_select": 1.0, "deadline_seconds": None}
    if settings.mode == "synchronous":
        idle = {"buffer": None, "concurrency": None, "max_staleness": None}
    for name, usual in idle.items():
        if getattr(settings, name) != usual:
            raise UserError(f"fleet.{name}: has no place in fleet.mode: {settings.mode}; leave it out")
    if settings.mode == "synchronous":
        return
    if not getattr(method, "asynchronous", False):
        raise UserError(
            f"fleet.mode: buffered: {type(method).__name__} cannot use updates that started from older states; "
            f"methods that can: {declaring('asynchronous')}; or set fleet.mode: synchronous"
        )
    if settings.buffer is None:
        raise UserError(f"fleet.buffer: mode: buffered needs it: how many reports make a new state, 1 to {edges}")
    if settings.max_staleness is not None and settings.max_staleness < 0:
        raise UserError(f"fleet.max_staleness: {settings.max_staleness} must not be negative")
    for name in ("buffer", "concurrency"):
        value = getattr(settings, name)
        if value is not None and value > edges:  # an edge gives one update a state, so that more would never come
            raise UserError(f"fleet.{name}: {value} is more than the {edges} edges there are; at most {edges}")


@dataclass
class Pending:
    """A flight and what its edge will report, at `due_seconds` of the virtual clock."""

    flight: Flight
    outcome: Report | Lost

    @property
    def due_seconds(self) -> float:
        """When the report comes, or the edge is given up."""
        return self.flight.started_seconds + self.outcome.cost.virtual_seconds


@dataclass
class Dispatch:
    """Asks edges and keeps what they answered until it is due. pending, told, started: by edge, as last asked."""

    method: Method
    fleet: Fleet
    server: Site
    seed: int
    pending: dict[str, Pending] = field(default_factory=dict)
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: dict[str, float] = field(default_factory=dict)

    def answers(self, edges: Sequence[str], base: Message, round: int) -> dict[str, Report | Lost]:
        """What these edges make of the state `base`; each is planned for by itself, so that it can be repeated."""
        profiles = self.fleet.edges
        orders: dict[str, Message] = {}
        for edge in edges:
            rng = rng_for(self.seed, round, "plan")
            orders |= orders_of(self.method.plan(base, {edge: profiles[edge]}, self.server, round, rng))
        self.told |= told(orders)
        reports = checked(self.fleet.run(orders, round), orders, self.server.run)
        return {report.edge: report for report in reports} if orders else {}

    def resume(self, flights: Sequence[Flight]) -> None:
        """Has the edges of a checkpoint's flights repeat their work, those of one state side by side."""
        for _, group in itertools.groupby(sorted(flights, key=lambda one: one.base_round), lambda one: one.base_round):
            same = {flight.edge: flight for flight in group}
            first = next(iter(same.values()))
            for edge, outcome in self.answers(list(same), first.base, first.base_round).items():
                self.pending[edge] = Pending(same[edge], outcome)

    def first(self) -> Pending:
        """The flight that comes first; ties by name."""
        first = min(self.pending.values(), key=lambda one: (one.due_seconds, one.flight.edge))
        self.started[first.flight.edge] = first.flight.started_seconds
        return self.pending.pop(first.flight.edge)


def federate_buffered(
    method: Method,
    fleet: Fleet,
    server: Site,
    *,
    rounds: int,
    seed: int,
    buffer: int,
    concurrency: int | None = None,
    max_staleness: int | None = None,
    evaluate_every: int = 1,
    start: Start | None = None,
) -> Iterator[Round]:
    """Runs `method` until `rounds` states were made, each from `buffer` reports, or fewer where no edge is left to ask.

    As `federate`; the method must be `asynchronous`. Edges still at work at the end are not waited for. Raises
    AllEdgesLost if no report was usable, or no edge can ever be asked again.
    """
    start = start or Start(method.start(server, rng_for(seed, 0, "start")))
    state, moments, first, clock = start.state, start.moments, start.round, start.clock_seconds
    dispatch = Dispatch(method, fleet, server, seed)
    dispatch.resume(start.flights)
    del start  # or the first state would be held to the end
    slots = concurrency or len(fleet.edges)
    oldest = math.inf if max_staleness is None else max_staleness
    for number in range(first, rounds):
        began, past = time.perf_counter(), clock
        clock, queue = queued(dispatch, number, clock)
        heard: dict[str, Report | Lost] = {}
        clock = fill(dispatch, queue, heard, Window(state, number, buffer, slots, oldest, clock))
        started = {edge: dispatch.started[edge] for edge in heard}
        arriving = {edge: heard[edge] for edge in fleet.edges if edge in heard}  # sums run in the fleet's order
        outcomes: dict[str, Report | Lost] = {}
        used = watch(iter(arriving.values()), outcomes)
        before, state = state, method.aggregate(state, used, server, number, rng_for(seed, number, "aggregate"))
        outcomes = usable(outcomes, number, learned=state.numbers != before.numbers)
        state, moments = optimized(method, server, number, before, state, moments, outcomes)
        del before, heard, arriving, used
        wall = time.perf_counter() - began
        evaluation = measured(fleet, state, number + 1, rounds, evaluate_every)
        spent = time.perf_counter() - began - wall
        flights = tuple(one.flight for one in dispatch.pending.values())
        yield Round(
            number, state, outcomes, evaluation, combine(evaluation), wall, spent, clock - past, clock, flights,
            moments=moments, plans=dict(dispatch.told), started=started,
        )  # fmt: skip


def queued(dispatch: Dispatch, number: int, clock: float) -> tuple[float, deque[str]]:
    """(the clock, the idle edges in the order in which they are asked from state `number`); waits if all are away."""
    idle = {edge: profile for edge, profile in dispatch.fleet.edges.items() if edge not in dispatch.pending}
    if dispatch.pending:
        here = there(idle, dispatch.seed, number, clock)
    else:
        clock, here = awaited(idle, dispatch.seed, number, clock)
    drawn = rng_for(dispatch.seed, number, "sample").permutation(np.array(list(here), dtype=object))
    return clock, deque(drawn)


@dataclass(frozen=True)
class Window:
    """Between two states: the newest one and its number, the limits of the run, when it came out."""

    state: Message
    number: int
    buffer: int
    slots: int
    oldest: float
    opened_seconds: float


def fill(dispatch: Dispatch, queue: deque[str], heard: dict[str, Report | Lost], window: Window) -> float:
    """Takes outcomes into `heard` as they are due, until the buffer is full or none is left; returns the clock then.

    Whoever is done makes room for the next of the queue. So most starts are certain from the beginning: those that fill
    the slots, and one for every report of the buffer but the last. They are asked in one go, side by side.
    """
    clock, count = window.opened_seconds, 0
    free = window.slots - len(dispatch.pending)
    certain = [queue.popleft() for _ in range(min(len(queue), free + window.buffer - 1))]
    ready = deque(dispatch.answers(certain, window.state, window.number).items())
    while True:
        while len(dispatch.pending) < window.slots and (ready or queue):
            if not ready:  # a report more than foreseen was lost or too old
                ready.extend(dispatch.answers([queue.popleft()], window.state, window.number).items())
            edge, outcome = ready.popleft()
            dispatch.pending[edge] = Pending(Flight(edge, window.number, clock, window.state), outcome)
        if not dispatch.pending:
            return clock
        one = dispatch.first()
        clock = one.due_seconds
        heard[one.flight.edge] = discounted(one, window, dispatch.server.run.wire.dtype)
        count += isinstance(heard[one.flight.edge], Report)
        if count == window.buffer:
            return clock


def discounted(one: Pending, window: Window, wire: str) -> Report | Lost:
    """An outcome as if it had started from the newest state, weighed by how old its own was; a too old one is Lost."""
    report, age = one.outcome, window.number - one.flight.base_round
    if isinstance(report, Lost) or age == 0:
        return report
    if age > window.oldest:
        return dropped(report, f"late: its update is {age} states old; fleet.max_staleness: {window.oldest}", math.inf)
    assert report.fetch is not None, "nobody fetches a message before it is due"
    report.weight /= math.sqrt(1 + age)
    report.fetch = partial(moved, report.fetch, one.flight.base, window.state, wire)
    return report


def moved(fetch: Callable[[], Message], base: Message, state: Message, wire: str) -> Message:
    """An update's change of `base` on top of `state`, each as sent. Raises UnfitUpdate if they are not alike."""
    update, sent, now = fetch(), base.to(wire).tensors, state.to(wire).tensors
    reason = unlike(update, sent)
    if reason is not None:
        raise UnfitUpdate(reason)
    changed = {name: now[name].float() + (t.float() - sent[name].float()) for name, t in update.tensors.items()}
    return Message(changed, update.numbers)


def flights_saved(start: Start, place: Path) -> list[dict[str, Any]]:
    """Writes the states that edges at work started from into `place`, each once; returns what a manifest has of it."""
    bases = {flight.base_round: flight.base for flight in start.flights}
    digests = {round: base.save(place / f"base-{round:04d}.safetensors") for round, base in bases.items()}
    return [
        {"edge": f.edge, "base_round": f.base_round, "started_seconds": f.started_seconds,
         "base_sha256": digests[f.base_round]}
        for f in start.flights
    ]  # fmt: skip


def flights_loaded(found: Sequence[Mapping[str, Any]], place: Path) -> tuple[Flight, ...]:
    """The flights of a checkpoint. Raises ValueError if a state is damaged, OSError if it cannot be read."""
    digests = {one["base_round"]: one["base_sha256"] for one in found}
    bases = {round: Message.load(place / f"base-{round:04d}.safetensors", sha) for round, sha in digests.items()}
    return tuple(Flight(f["edge"], f["base_round"], f["started_seconds"], bases[f["base_round"]]) for f in found)
