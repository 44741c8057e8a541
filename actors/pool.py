"""Runs side by side on Ray, for a search: each in a warm worker that keeps model and rows, or with a fleet of its own.

A worker of the first kind reserves the threads that a run trains with, and the largest share of a GPU that one of its
edges has. One of the second kind is only a coordinator and reserves nothing, lest coordinators take the room that their
own fleets wait for. Workers start when there is a task for them and end when there is none. An autoscaler sees workers
that wait for room, and what the fleets of coordinators ask for (claims.py): together what the trials at work need, and
nothing when none is left.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from fedpipe_ray.errors import UserError
from fedpipe_ray.fleet import Fleet, Kept
from fedpipe_ray.methods.base import Method
from fedpipe_ray.settings import Profile, Run
from fedpipe_ray.trial import Event, advanced, ended, kept_fleet, records_of

from .claims import of_actors, withdraw_of
from .connect import connect, disconnect, forking, without_gpus
from .faults import fault_of
from .placement import Node, pools_of, unplaceable
from .room import SAY_SECONDS
from .workers import nodes_now

log = logging.getLogger("fedpipe")


class TrialActor:
    """A process in which runs take turns. own_fleet: their edges are actors of their own, not in here."""

    def __init__(self, own_fleet: bool) -> None:
        self.own_fleet, self.open = own_fleet, kept_fleet(Kept())
        self.records: Any = iter(())

    def begin(self, task: int, run: Run) -> Event:
        """The first round of a run."""
        self.end()
        try:
            self.records = records_of(run, ray_fleet if self.own_fleet else self.open)
        except Exception as error:
            return ended(task, error)
        return self.go_on(task)

    def go_on(self, task: int) -> Event:
        """The next round of the run that began here."""
        return advanced(task, self.records)

    def end(self) -> None:
        """Ends the run, and the fleet that it has."""
        getattr(self.records, "close", lambda: None)()
        self.records = iter(())


def ray_fleet(run: Run, method: Method) -> Fleet:
    """A fleet on the cluster of which this process is a worker."""
    from .fleet import RayFleet

    return RayFleet(run, method)


@dataclass(eq=False)
class Seat:
    """A worker and what it has to do. ref: to wait for; handed_out: whether its round was, so that it may go on.

    there: to wait for until it has its room, where an autoscaler may have to bring that; run: that of its task.
    """

    actor: Any
    run: Run | None = None
    there: Any = None
    task: int | None = None
    ref: Any = None
    handed_out: bool = False


class TrialPool:
    """An executor on Ray with at most `parallel` runs at once.

    like: a run that stands for all: the cluster, the threads, the GPUs, and whether an autoscaler is asked. Raises
    UserError if no node has room for a worker, or an edge needs more than one process; with an autoscaler from `next`,
    when none has had for start_timeout_seconds.
    """

    def __init__(self, like: Run, parallel: int, own_fleet: bool) -> None:
        self._gpus = 0.0 if own_fleet else shared_gpus(like)
        try:
            self._owns_ray = connect(like.fleet.address, without_gpus(like))
        except ConnectionError as error:
            raise UserError(str(error)) from error
        self._parallel, self._own_fleet = parallel, own_fleet
        self._cpus = 0 if own_fleet else like.local.threads
        self._queue: deque[tuple[int, Run]] = deque()
        self._seats: list[Seat] = []
        self._autoscale, self._patience = like.fleet.autoscale, like.fleet.start_timeout_seconds
        self._room_at, self._said_at = time.monotonic(), time.monotonic()  # when a worker last had room, what was said
        self._ended: set[str] = set()  # coordinators, by actor id
        self._said_full = False
        refusal = None if self._autoscale else self._refusal()
        if refusal:
            raise UserError(refusal)

    def submit(self, task: int, run: Run) -> None:
        """Queues a run."""
        if self._own_fleet:  # the cluster is the one that this pool is connected to
            run = dataclasses.replace(run, fleet=dataclasses.replace(run.fleet, address=None))
        self._queue.append((task, run))

    def next(self, timeout_seconds: float) -> Event | None:
        """What happens next. A worker without a task when there is none in the queue ends."""
        self._give()
        waiting = {seat.ref: seat for seat in self._seats if seat.ref is not None}
        if not waiting:
            time.sleep(0 if not self._queue else timeout_seconds)
            return None
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout_seconds)
        if ready:
            return self._taken(waiting[ready[0]])
        if self._autoscale:
            self._look()
        return None

    def cancel(self, task: int) -> None:
        """Ends a task; its worker is warm for the next one if it is between rounds, else it ends too."""
        self._queue = deque(entry for entry in self._queue if entry[0] != task)
        for seat in [seat for seat in self._seats if seat.task == task]:
            if seat.ref is None:
                seat.actor.end.remote()
                seat.task, seat.handed_out = None, False
            else:
                self._bury(seat)

    def close(self) -> None:
        """Ends all, and Ray if it was started here."""
        self._queue.clear()
        for seat in list(self._seats):
            self._bury(seat)
        if self._owns_ray:
            disconnect()

    @property
    def workers(self) -> int:
        """How many there are now."""
        return len(self._seats)

    def _give(self) -> None:
        """Lets tasks go on whose rounds were handed out, gives queued ones to workers, ends workers without any."""
        for seat in self._seats:
            if seat.handed_out:
                seat.ref, seat.handed_out = seat.actor.go_on.remote(seat.task), False
        idle = [seat for seat in self._seats if seat.task is None]
        while self._queue and (idle or len(self._seats) < self._parallel) and self._has_room(self._queue[0][1]):
            seat = idle.pop(0) if idle else self._start()
            seat.task, seat.run = self._queue.popleft()
            seat.ref = seat.actor.begin.remote(seat.task, seat.run)
        for seat in idle:
            self._bury(seat)

    def _has_room(self, run: Run) -> bool:
        """Whether a run's own fleet fits beside those at work: its edges would wait for them, and be late."""
        others = [seat.run for seat in self._seats if seat.task is not None and seat.run is not None]
        if not (self._own_fleet and others) or self._autoscale:
            return True
        wanted = {
            f"{at}/{pool.name}/{place}": pool.profile
            for at, one in enumerate([run, *others]) for pool in pools_of(one.fleet) for place in range(pool.most)
        }  # fmt: skip
        if not unplaceable(wanted, nodes_now()):
            return True
        if not self._said_full:
            log.info("parallel: %d: the cluster has room for the fleets of %d", self._parallel, len(others))
        self._said_full = True
        return False

    def _taken(self, seat: Seat) -> Event:
        """What a worker answered."""
        task = seat.task
        assert task is not None
        try:
            event: Event = ray.get(seat.ref)
        except RayError as error:
            fault = fault_of(error)
            self._bury(seat)
            return Event(task, "failed" if fault.kind == "raised" else "broken", reason=fault.traceback or fault.reason)
        seat.ref, seat.handed_out = None, event.kind == "round"
        if event.kind != "round":
            seat.task = None
        return event

    def _start(self) -> Seat:
        """A new worker; its process imports while we go on."""
        options: dict[str, Any] = {"num_cpus": self._cpus, "num_gpus": self._gpus}
        if not forking():
            options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(max(1, self._cpus))}}
        if not self._seats:
            self._room_at = self._said_at = time.monotonic()
        seat = Seat(ray.remote(TrialActor).options(**options).remote(self._own_fleet))
        seat.there = seat.actor.__ray_ready__.remote() if self._autoscale else None
        self._seats.append(seat)
        return seat

    def _bury(self, seat: Seat) -> None:
        """Ends a worker; a coordinator lets its fleet go first, whose actors end with it in any case."""
        self._seats.remove(seat)
        with suppress(RayError, GetTimeoutError, ValueError):
            ray.kill(seat.actor)
        if self._autoscale and self._own_fleet:
            self._ended.add(seat.actor._actor_id.hex())
            with suppress(RayError, RuntimeError):
                withdraw_of(self._ended)

    def _look(self) -> None:
        """Says what the trials wait for. Raises UserError if no worker has had room for too long."""
        there = [seat.there for seat in self._seats]
        placed, _ = ray.wait(there, num_returns=len(there), timeout=0, fetch_local=False)
        if placed:
            self._room_at = time.monotonic()
        elif time.monotonic() > self._room_at + self._patience:
            raise UserError(
                f"the autoscaler brought no node within fleet.start_timeout_seconds={self._patience:g}\n"
                + (self._refusal() or f"local.threads: no node has {self._cpus} CPUs free; see `ray status`")
            )
        if time.monotonic() < self._said_at + SAY_SECONDS:
            return
        self._said_at, lacking = time.monotonic(), len(there) - len(placed)
        if self._own_fleet:
            asked = of_actors(seat.actor._actor_id.hex() for seat in self._seats)
            lacking += sum(not has_room for _, has_room in asked)
        if lacking:
            log.info("waiting for the autoscaler: %d workers of %d trials have no node", lacking, len(there))

    def _refusal(self) -> str | None:
        """Why a worker fits no node, for which Ray would wait in silence; None if one does."""
        nodes: list[Node] = nodes_now()
        refused = unplaceable({"worker": Profile(cpus=self._cpus, gpus=self._gpus)}, nodes)
        why = refused[0].removeprefix("edge worker: ") if refused else ""
        share = f" and {self._gpus:g} GPUs" if self._gpus else ""
        return f"local.threads: a trial of {self._cpus} threads{share} finds no room: {why}" if refused else None


def shared_gpus(run: Run) -> float:
    """The share of a GPU that one worker needs to play all edges in turn. Raises UserError if one is not enough."""
    for name, profile in run.fleet.edges.items():
        if profile.gpus > 1:
            raise UserError(
                f"edge {name}: gpus: {profile.gpus:g} are several processes, and with fleet: shared a trial is one; "
                "set the campaign's fleet: own, or give the edge gpus: 1"
            )
    return max((profile.gpus for profile in run.fleet.edges.values()), default=0.0)
