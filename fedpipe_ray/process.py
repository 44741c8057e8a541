"""What a command sets up in its process: where its log goes, and that a signal ends it cleanly."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from .errors import Interrupted, UserError

if TYPE_CHECKING:
    from .display import Display
    from .fleet import Fleet
    from .settings import Run
    from .trial import Event, Executor

log = logging.getLogger("fedpipe")
REPOSITORY = Path(__file__).resolve().parent.parent


def close_log() -> None:
    """Ends this command's log handlers; a program that calls `main` keeps none of them."""
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()


def set_up_logging(display: Display, file: Path | None) -> None:
    """Warnings of the run go to the screen, everything to the run's log."""
    close_log()
    log.setLevel(logging.DEBUG)
    log.addHandler(display.handler())
    if file is not None:
        to_file = logging.FileHandler(file)
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(to_file)
    warnings.filterwarnings("ignore", module="peft")


def closing(fleet: Fleet) -> contextlib.closing[Fleet]:
    """Ends the fleet whatever happens, also on SIGTERM before and after the rounds."""
    clean_up_on_sigterm()
    return contextlib.closing(fleet)


def clean_up_on_sigterm() -> None:
    """SIGTERM ends the program by an exception, as SIGINT does, so that nothing half-made stays."""

    def stop(signum: int, _: Any) -> None:
        raise Interrupted(signum)

    signal.signal(signal.SIGTERM, stop)


class Stoppable:
    """An executor that SIGTERM ends by Interrupted from its `next`.

    Ray takes the signal when it starts, and ends the process with its stack; and an exception out of a handler becomes
    another one within Ray's calls. So this is made once Ray has started, and its handler only takes a note.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor, self._asked = executor, list[int]()
        signal.signal(signal.SIGTERM, lambda signum, _: self._asked.append(signum))

    def submit(self, task: int, run: Run) -> None:
        """As an executor's, like the others."""
        self._executor.submit(task, run)

    def next(self, timeout_seconds: float) -> Event | None:
        """Raises Interrupted if SIGTERM came."""
        if self._asked:
            raise Interrupted(self._asked[0])
        return self._executor.next(timeout_seconds)

    def cancel(self, task: int) -> None:
        self._executor.cancel(task)

    def close(self) -> None:
        self._executor.close()
        clean_up_on_sigterm()


def siblings() -> None:
    """Raises UserError if another package stands in the way of actors, tuning or clusters."""
    if str(REPOSITORY) not in sys.path:
        sys.path.insert(0, str(REPOSITORY))
    for name in ("actors", "tuning", "clusters"):
        found = importlib.util.find_spec(name)
        place = Path(found.origin).parent if found is not None and found.origin else None
        if place != REPOSITORY / name:
            raise UserError(
                f"package {name!r} comes from {place}, not from {REPOSITORY}; remove that one from the path"
            )


@contextlib.contextmanager
def stop_after_round() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM, which asks for a stop after the round; the second one stops at once."""
    asked: list[int] = []

    def handle(signum: int, _: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)
        log.warning("stopping after this round; once more stops at once")

    try:
        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: the caller owns the signals
        before = {}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
