"""What went wrong with an edge on Ray, and what to do about it: pure functions, carried out by dispatch.py.

An edge's answer is a function of (seed, round, edge, order). So what an edge does to itself (an exception, NaN, memory
it ran out of) would happen again, and costs it the round; what was done to it (a killed worker, a lost node) would not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)

from fedpipe_ray.report import OUT_OF_MEMORY

Kind = Literal["died", "node gone", "no room", "short of memory", "late", "raised", "store full", "update lost"]


@dataclass(frozen=True)
class Fault:
    """What happened, in a word; reason: in a sentence; traceback: the edge's own, for an exception nobody expected."""

    kind: Kind
    reason: str
    traceback: str | None = None


@dataclass(frozen=True)
class Decision:
    """again: try this edge once more in this round; replace: end its worker and start another."""

    again: bool
    replace: bool


# kind -> (worth another try, the worker is of no use any more)
RULES: dict[Kind, tuple[bool, bool]] = {
    "died": (True, True),  # SIGKILL, a crash, a worker that could not be made
    "node gone": (True, True),
    "no room": (False, False),  # looked at again before the next round
    "short of memory": (False, True),  # Ray ended it to save its node: it would need as much again
    "late": (False, True),  # the round has waited long enough; a worker that hangs does not come back
    "raised": (False, False),
    "store full": (True, False),  # updates that were folded meanwhile have made room
    "update lost": (True, False),  # the report came, its tensors went with their node
}


def decide(kind: Kind, tries: int, retries: int) -> Decision:
    """What to do after an edge failed `tries` times (from 1) in a round, with fleet.retries more allowed."""
    worth, replace = RULES[kind]
    return Decision(worth and tries <= retries, replace)


def fault_of(error: Exception) -> Fault:
    """The fault behind an exception of Ray's."""
    if isinstance(error, ObjectStoreFullError | OutOfDiskError):
        return Fault(
            "store full",
            f"Ray's object store has no room: {first_line(error)}; "
            "give nodes more with `ray start --object-store-memory`, or send less: wire.dtype: bfloat16",
        )
    if isinstance(error, OutOfMemoryError):
        return Fault("short of memory", f"{OUT_OF_MEMORY}: {first_line(error)}")
    if isinstance(error, RayTaskError):
        return Fault("raised", str(error.cause), str(error))
    if isinstance(error, ObjectLostError):
        return Fault("update lost", f"its update was lost on the way: {first_line(error)}")
    if isinstance(error, NodeDiedError | ActorUnschedulableError) or "node has died" in str(error):
        return Fault("node gone", f"its node is gone: {first_line(error)}")
    if isinstance(error, RayActorError):
        return Fault("died", f"its worker died: {first_line(error)}")
    return Fault("raised", f"{type(error).__name__}: {error}")


def too_slow(limit_seconds: float) -> str:
    """Why an edge is given up that does not start."""
    return f"did not answer within fleet.start_timeout_seconds={limit_seconds:g}; is the cluster full? see `ray status`"


def first_line(error: Exception) -> str:
    """The line of an error that says most: the first, the cause of an actor's death, or why it could not be made."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if lines and lines[0] == ActorDiedError.BASE_ERROR_MSG:  # then class, ids and address, each after a tab
        lines = [line for line in lines[1:] if not line.startswith("\t")] or lines
    lines = [line.strip() for line in lines]
    if len(lines) > 1 and "creation task" in lines[0]:
        return f"it could not be made: {lines[-1]}"
    return lines[0] if lines else type(error).__name__
