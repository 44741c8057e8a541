"""A run as a trial of a search: its rounds without a run folder, and how a search has many of them carried out."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from .buffered import check_buffered
from .errors import AllEdgesLost, UserError
from .fleet import Fleet, Kept, SerialFleet
from .methods import make_method
from .methods.base import Method
from .record import finite, round_record
from .run import rounds_of, server_site, stop_reason
from .server_checks import check_server
from .settings import Run

Record = Mapping[str, Any]  # a line of rounds.jsonl


@dataclass(frozen=True)
class Event:
    """What became of a task. `round`: it did one, `record`; it goes on with the next call of `Executor.next`.

    `done`: it did all. `diverged`: its losses are no numbers any more. `failed`: the reason is its own and would come
    again. `broken`: its worker died under it.
    """

    task: int
    kind: Literal["round", "done", "diverged", "failed", "broken"]
    record: Record = field(default_factory=dict)
    reason: str = ""


class Executor(Protocol):
    """Carries out runs, some of them side by side. A number names a task, and may be used again once that has ended."""

    def submit(self, task: int, run: Run) -> None:
        """Queues a run."""

    def next(self, timeout_seconds: float) -> Event | None:
        """What happens next; None if nothing did. Tasks whose rounds were handed out go on unless cancelled."""

    def cancel(self, task: int) -> None:
        """Ends a task after the round it has done; nothing more is heard of it."""

    def close(self) -> None:
        """Ends all tasks and workers."""


def records_of(run: Run, open_fleet: Callable[[Run, Method], Fleet]) -> Iterator[Record]:
    """The record of each round of a run, as it is done; the fleet ends with it.

    evaluate.patience and evaluate.target end it. Raises UserError, AllEdgesLost.
    """
    losses: list[float | None] = []
    method = make_method(run.method)
    check_buffered(run, method)
    check_server(run, method)
    with closing(open_fleet(run, method)) as fleet:
        fleet.open()
        server = server_site(run, method, list(getattr(fleet, "classes", [])))
        for done in rounds_of(run, method, fleet, server):
            yield finite(round_record(done))
            if "loss" in done.quality:
                losses.append(done.quality["loss"])
                if stop_reason(run, losses) is not None:
                    return


def ended(task: int, error: Exception) -> Event:
    """The event of a task that an exception of its own ended."""
    if isinstance(error, AllEdgesLost):
        diverged = all(str(lost.reason).startswith("diverged") for lost in error.lost)
        return Event(task, "diverged" if diverged else "failed", reason=str(error))
    if isinstance(error, UserError):
        return Event(task, "failed", reason=str(error))
    return Event(task, "failed", reason=traceback.format_exc())


def advanced(task: int, records: Iterator[Record]) -> Event:
    """The next event of a task whose rounds these are."""
    try:
        return Event(task, "round", next(records))
    except StopIteration:
        return Event(task, "done")
    except Exception as error:  # a trial's fault is the trial's alone
        return ended(task, error)


def kept_fleet(kept: Kept) -> Callable[[Run, Method], Fleet]:
    """Opens fleets in this process that find what the one before left."""
    return lambda run, method: SerialFleet(run, method, kept=kept)


class SerialExecutor:
    """Tasks one after another in this process."""

    def __init__(self) -> None:
        self._queue: deque[tuple[int, Iterator[Record]]] = deque()
        self._open = kept_fleet(Kept())

    def submit(self, task: int, run: Run) -> None:
        """Queues a run."""
        self._queue.append((task, records_of(run, self._open)))

    def next(self, timeout_seconds: float = 0.0) -> Event | None:
        """The next round of the oldest task, or its end."""
        if not self._queue:
            return None
        event = advanced(*self._queue[0])
        if event.kind != "round":
            self._queue.popleft()
        return event

    def cancel(self, task: int) -> None:
        """Ends a task."""
        for entry in [entry for entry in self._queue if entry[0] == task]:
            self._queue.remove(entry)
            getattr(entry[1], "close", lambda: None)()

    def close(self) -> None:
        """Ends all."""
        for task, _ in list(self._queue):
            self.cancel(task)
