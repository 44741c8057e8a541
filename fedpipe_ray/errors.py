"""Errors that somebody catches: the command line turns them into an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class UserError(ValueError):
    """Bad input: the message holds the value, the limit and the remedy. Exit code 2."""


class EdgeError(UserError):
    """Bad input that only edges can see; the message has one line an edge. Exit code 2."""


class UnsupportedBits(UserError):
    """4 or 8 bits on a device, or for layers, that bitsandbytes does not pack; the message says which."""


class AllEdgesLost(RuntimeError):
    """No edge returned a usable report in a round; the last checkpoint stands. Exit code 3.

    round counts from 0, its message from 1; lost: the Lost of every edge asked, with its reason.
    """

    def __init__(self, round: int, lost: Sequence[Any]) -> None:
        reasons = "\n".join(f"  edge {one.edge}: {one.reason}" for one in lost)
        super().__init__(f"round {round + 1}: every edge was lost\n{reasons}")
        self.round = round
        self.lost = lost


class Interrupted(BaseException):
    """SIGINT or SIGTERM asked the run to stop; exit code 128 + signal. Like KeyboardInterrupt no Exception, so that
    nobody takes it for a failure of his own.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class DivergedError(RuntimeError):
    """The loss of an edge became NaN or infinite; its report is dropped."""


class UnfitUpdate(ValueError):
    """An update came back whole, and the server does not use it; the message says why. Its edge counts as lost."""
