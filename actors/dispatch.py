"""Who is asked when: calls to edges, queued at workers, given out, waited for, tried again where faults.py says so."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from .faults import Fault, decide, fault_of, too_slow
from .workers import Call, Worker, Workers

log = logging.getLogger("fedpipe")

DEPTH = 4  # calls a worker has at once, so that it need not wait for us between two


@dataclass(frozen=True)
class Answer:
    """value: what an actor returned; beside: references to what it returned beside that."""

    value: Any
    beside: Sequence[Any]


class Dispatch:
    """Carries out calls. may_move: whether an edge can be served by another worker than the one it was last at."""

    def __init__(self, workers: Workers, start_timeout_seconds: float, may_move: Callable[[str], bool]) -> None:
        self.workers, self.start_timeout_seconds, self.may_move = workers, start_timeout_seconds, may_move

    def run(
        self, names: Iterable[str], send: Callable[[Worker, str], Any], late: str = "",
        limit_seconds: float | None = None, retries: int = 0,
    ) -> Iterator[tuple[Call, Any]]:  # fmt: skip
        """(call, Answer or Fault) for every name, in their order, whoever was first.

        send(worker, edge): calls the actor, returns what to wait for and what comes with it. late: the reason of an
        edge that a worker was at for more than limit_seconds. Calls whose answers are not taken from here are dropped.
        """
        answers: dict[str, Any] = {}
        calls = [Call(name, send, limit_seconds, late, retries, answers) for name in names]
        try:
            for call in calls:
                self._queue(call)
            for call in calls:
                yield call, self._answer(call)
        finally:
            for worker in self.workers:
                for call in [call for call in worker.queue if call.answers is answers]:
                    worker.queue.remove(call)
                for call in worker.given:
                    call.retries = 0 if call.answers is answers else call.retries

    def again(self, call: Call) -> Any:
        """Asks once more what was answered before."""
        self._queue(call)
        return self._answer(call)

    def _answer(self, call: Call) -> Any:
        """Works until this call has an answer."""
        while call.edge not in call.answers:
            self._step()
        return call.answers.pop(call.edge)

    def _queue(self, call: Call) -> None:
        """Puts a call before the worker its edge was last at, or before the one with least to do."""
        there = self.workers.of(call.edge)
        if not there:
            self.workers.fill()
        if not there:
            line = self.workers.refusals.get(self.workers.pool_of[call.edge].name, ": its worker is gone")
            line = line.partition(": ")[2]  # without the edge's name
            call.answers[call.edge] = Fault("no room", f"{call.before}; {line}" if call.before else line)
            return
        idlest = min(there, key=lambda worker: (worker.ready is not None, worker.load))
        home = self.workers.homes.get(call.edge)
        if home is None or home not in there or (home.load > idlest.load + 1 and self.may_move(call.edge)):
            home = idlest
        home.queue.append(call)

    def _step(self) -> None:
        """Gives out what can be given, waits for something to happen, and takes it."""
        waiting: dict[Any, Worker] = {}
        deadline = math.inf
        for worker in self.workers:
            self._give(worker)
            deadline = min(deadline, self._deadline(worker))
            if worker.ready is not None:
                waiting[worker.ready] = worker
            for call in worker.given:
                waiting[call.refs[0]] = worker
        assert waiting, "a call without an answer is with a worker"
        refs = list(waiting)
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        if not done:
            left = None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())
            done, _ = ray.wait(refs, num_returns=1, timeout=left, fetch_local=False)
        for worker in {waiting[ref] for ref in done}:
            self._take(worker, set(done))
        for worker in self.workers if time.monotonic() > deadline else ():
            self._end_late(worker)

    def _deadline(self, worker: Worker) -> float:
        """When what a worker does now must have ended."""
        if worker.ready is not None:
            return worker.began + self.start_timeout_seconds
        if worker.given and worker.given[0].limit_seconds is not None:
            return worker.given[0].began + worker.given[0].limit_seconds
        return math.inf

    def _give(self, worker: Worker) -> None:
        """Fills up what a started worker has to do, from its own queue, then from the longest of its pool."""
        if worker.ready is not None:
            return
        if not worker.queue and not worker.given:
            others = self.workers.pools[worker.pool]
            longest = max(others, key=lambda other: len(other.queue)) if len(others) > 1 else worker
            if len(longest.queue) > 1 and self.may_move(longest.queue[-1].edge):
                worker.queue.append(longest.queue.pop())
        while worker.queue and len(worker.given) < DEPTH:
            call = worker.queue.popleft()
            call.refs, call.began = call.send(worker, call.edge), time.monotonic()
            self.workers.homes[call.edge] = worker
            worker.given.append(call)

    def _take(self, worker: Worker, done: set[Any]) -> None:
        """Takes what a worker answered; calls end in the order in which they were given."""
        if worker.ready in done:
            found = taken((worker.ready,))
            if isinstance(found, Fault):
                self._unstarted(worker, found)
                return
            worker.ready = None
        while worker.given and worker.given[0].refs[0] in done:
            call = worker.given.popleft()
            found, call.refs = taken(call.refs), None
            if isinstance(found, Fault):
                self._failed(worker, call, found)
            else:
                call.answers[call.edge] = found
            if worker.given:
                worker.given[0].began = time.monotonic()  # its turn has come

    def _end_late(self, worker: Worker) -> None:
        """Ends a worker that has been at one thing for too long."""
        if time.monotonic() < self._deadline(worker):
            return
        if worker.ready is not None:
            self._unstarted(worker, Fault("late", too_slow(self.start_timeout_seconds)))
        else:
            call = worker.given.popleft()
            self._failed(worker, call, Fault("late", call.late))

    def _failed(self, worker: Worker, call: Call, fault: Fault) -> None:
        """Decides about a call that failed; what waited behind it at a worker that ends is given to others."""
        call.tries += 1
        decision = decide(fault.kind, call.tries, call.retries)
        left: list[Call] = []
        if decision.replace:
            left = self._end(worker, fault)
            self.workers.fill()
        if decision.again:
            log.info("edge %s is tried again: %s", call.edge, fault.reason)
            call.before = fault.reason
            left.insert(0, call)
        else:
            call.answers[call.edge] = fault
        for other in left:
            self._queue(other)

    def _unstarted(self, worker: Worker, fault: Fault) -> None:
        """A worker that did not start. Another is made only for calls that may be tried again, lest none ever ends.

        A node that was gone before is no try: Ray lists one for a while, and once known it is not asked again.
        """
        for call in self._end(worker, fault):
            call.tries += fault.kind != "node gone"
            call.before = fault.reason
            if decide(fault.kind, call.tries, call.retries).again:
                self._queue(call)
            else:
                call.answers[call.edge] = fault

    def _end(self, worker: Worker, fault: Fault) -> list[Call]:
        """Ends a worker; the calls that it leaves."""
        if fault.kind == "node gone":
            self.workers.gone.add(worker.node_id)
        left = [*worker.given, *worker.queue]
        worker.given.clear()
        worker.queue.clear()
        self.workers.bury(worker)
        return left


def taken(refs: Sequence[Any]) -> Answer | Fault:
    """What the first reference holds, with the others, or why it holds nothing."""
    try:
        return Answer(ray.get(refs[0]), refs[1:])
    except RayError as error:
        return fault_of(error)
