"""What a planning method can know before any training: every edge tells its facts and scores. Ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .beliefs import MEMORY, unsupported
from .errors import UserError
from .facts import learn
from .fleet import Fleet
from .message import Message
from .partial import part_of
from .randomness import rng_for
from .report import OUT_OF_MEMORY, Report
from .site import Site

if TYPE_CHECKING:
    from .methods.fedpipe import FedPipe


def surveyed(method: FedPipe, fleet: Fleet, server: Site) -> Message:
    """The state once every edge has answered; nothing is trained.

    An edge that runs out of memory over it is asked again with less. Raises UserError for one that cannot answer.
    """
    state, silent = method.start(server, rng_for(server.run.seed, 0, "start")), list(fleet.edges)
    while silent:
        _, plans = method.configure(state, fleet.edges, server)
        orders = {
            edge: Message(
                part_of(state.tensors, plans[edge].ranks, "stack", {}),
                {**method.order_numbers(plans[edge], state, server), "score": 1.0, "survey": 1.0},
            )
            for edge in silent
        }
        numbers, overfull, unpacked = dict(state.numbers), [], list[str]()
        for report in fleet.run(orders, 0):
            if isinstance(report, Report):
                learn(report.edge, report.message().numbers, numbers)
            elif report.reason.startswith(OUT_OF_MEMORY):
                overfull.append(report)
            elif found := unsupported(report):
                numbers, unpacked = numbers | found, [*unpacked, report.edge]
            else:
                raise UserError(f"edge {report.edge}: {report.reason}")
        less = method.corrections(state, fleet.edges, overfull, server)
        silent = [lost.edge for lost in overfull] + unpacked
        for lost in overfull:
            if f"{lost.edge}/{MEMORY}" not in less:
                raise UserError(f"edge {lost.edge}: {lost.reason}")
        state = Message(state.tensors, numbers | less)
    return state
