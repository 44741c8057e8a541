"""What comes back from an edge: a Report with a lazy message, or Lost with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from .costs import Cost
from .errors import UnsupportedBits
from .message import Message

OUT_OF_MEMORY = "out of memory"  # how the reason of an edge begins that ran out of it
UNSUPPORTED_BITS = UnsupportedBits.__name__  # ... that cannot pack its base


@dataclass
class Report:
    """The small, eager part of an edge's answer; `message()` fetches the tensors.

    weight: what aggregates weigh by (samples trained on). base_round: the round whose state the edge started from.
    private: path and SHA-256 of the edge's private state after the round, which never leaves it. rejected: why the
    server could not use the message.
    """

    edge: str
    base_round: int
    weight: float
    train_loss: float
    cost: Cost
    private: dict[str, str] | None = None
    rejected: str | None = None
    fetch: Callable[[], Message] | None = field(default=None, repr=False)

    def message(self) -> Message:
        """The edge's update. Raises UnfitUpdate if it must not be used, or what the transport raises if it is gone."""
        assert self.fetch is not None, "a report's message is fetched once"
        return self.fetch()

    def release(self) -> None:
        """Lets go of the message, so that the object store can free it."""
        self.fetch = None


@dataclass(frozen=True)
class Lost:
    """An edge that gave no usable report this round. traceback: its own, as text, for an exception nobody expected.

    private: as in the report, if it was the server that could or would not use it. status: `late` if it came, and only
    after the server had gone on without it.
    """

    edge: str
    reason: str
    traceback: str | None = None
    cost: Cost = field(default_factory=Cost)
    private: dict[str, str] | None = None
    status: Literal["lost", "late"] = "lost"


def dropped(report: Report, reason: str, closed_seconds: float) -> Lost:
    """`report` as late. Its upload counts if it was complete when the server closed the round: else it was cut off."""
    report.release()
    complete = report.cost.virtual_seconds <= closed_seconds
    cost = report.cost if complete else dataclasses.replace(report.cost, bytes_up=0)
    return Lost(report.edge, reason, cost=cost, private=report.private, status="late")
