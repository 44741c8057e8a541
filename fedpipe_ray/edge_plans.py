"""The plans of FedPipe's edges, from what they told: demands, scores, the deadline, and the solver of the method."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from . import beliefs, planning
from .demands import demand_of
from .errors import UserError
from .facts import Facts, calibrations_of, facts_of, protected, scores_of
from .planning import Demand, EdgePlan
from .settings import Profile
from .train import steps_of

if TYPE_CHECKING:
    from .methods.fedpipe import FedPipe
    from .site import Site

Numbers = Mapping[str, float]
log = logging.getLogger("fedpipe")


def demands(method: FedPipe, numbers: Numbers, edges: Mapping[str, Profile], server: Site) -> list[Demand]:
    """What every edge may do."""
    shape, local = method.shape(server), server.run.local
    facts = facts_of(edges, numbers, server.run.data.max_length)
    depths: list[int | None] = [None, *([shape.layers // 2, shape.layers // 4] if method.depth else [])]
    found = []
    for edge, profile in edges.items():
        planned = steps_of(local, facts[edge].rows)
        floor = protected(planned, facts[edge].share, len(edges))
        found.append(demand_of(
            edge, profile, shape, facts[edge], rank=method.rank, wire=server.run.wire.dtype, batch=local.batch,
            bits=beliefs.bits_of(edge, method.bits or [16, 8, 4], numbers),
            depths=[d for d in depths if d != 0], steps=planned, min_steps=floor,
            max_steps=max(floor, math.ceil(method.step_ratio * planned)),
            measured=calibrations_of(edge, numbers), real=server.run.fleet.clock == "real",
            accumulate=local.accumulate, **beliefs.believed(edge, numbers),
        ))  # fmt: skip
    return found


def scores(method: FedPipe, numbers: Numbers, facts: Mapping[str, Facts], server: Site) -> dict[str, planning.Array]:
    """Importance [keys] of every candidate by edge."""
    return scores_of(
        facts, numbers, method.shape(server).keys, scope=method.scope, tie=method.of("tie"),
        plain=method.of("score") in ("gradient", "random"),
    )  # fmt: skip


def configure(
    method: FedPipe, numbers: Numbers, edges: Mapping[str, Profile], server: Site
) -> tuple[float, dict[str, EdgePlan]]:
    """(deadline in seconds of fleet.clock, plans of all edges). Raises UserError for an edge that nothing fits."""
    shape, local = method.shape(server), server.run.local
    facts = facts_of(edges, numbers, server.run.data.max_length)
    worth, whole = scores(method, numbers, facts, server), demands(method, numbers, edges, server)
    planned = {one.edge: one.steps for one in whole}
    part = min(1.0, numbers.get("rounds", 0) / max(1, server.run.rounds - 1))  # of the run
    share = method.communication * (1 + part) / 2

    def plans(deadline: float, most: float = math.inf, solver: str = method.of("solver")) -> dict[str, EdgePlan]:
        own = [replace(one, max_steps=max(one.min_steps, math.ceil(min(most, one.max_steps)))) for one in whole]
        known: dict[str, Any] = {"steps": method.of("steps"), "lam": method.of("penalty")}
        if method.plans is not None:
            return {
                one.edge: planning.given(
                    shape.keys, one, worth[one.edge], deadline, told(method, one.edge), **known,
                    firm=not calibrations_of(one.edge, numbers),
                ) for one in own
            }  # fmt: skip
        return planning.plan(shape.keys, own, worth, deadline, solver, communication_share=share, **known)

    def bounded(deadline: float, solver: str = method.of("solver")) -> dict[str, EdgePlan]:
        fewest = min(found.steps * found.batch for found in plans(deadline, solver=solver).values())
        return plans(deadline, method.step_ratio * fewest / local.batch, solver)

    try:
        deadline, quick = method.deadline_seconds, "greedy" if method.of("solver") == "exact" else method.of("solver")
        if deadline is None and method.of("steps") == "equal":  # all do what is planned, whenever that ends
            deadline = planning.median_deadline(partial(plans, solver=quick))
        elif deadline is None:  # exact plans are a second each: the search does with greedy ones
            rows = sum(planned.values()) * local.batch if method.of("steps") == "filled" else math.inf
            deadline, _ = planning.search_deadline(partial(bounded, solver=quick), rows)
        chosen = bounded(deadline)
    except ValueError as error:
        raise UserError(str(error)) from None
    if all(found.seconds > deadline * 1.001 for found in chosen.values()):
        rates = ", ".join(f"{edge} {found.under_training:.0%}" for edge, found in chosen.items())
        said = f"method.deadline_seconds: no edge meets {deadline:.3g} s; under-training rates: {rates}"
        if server.memo.get("said") != said:
            log.warning("%s; the best plan follows", said)
        server.memo["said"] = said
    return deadline, chosen


def told(method: FedPipe, edge: str) -> planning.Allocation:
    """What `plans` says of an edge. Raises ValueError if nothing."""
    if edge not in (method.plans or {}):
        raise ValueError(f"method.plans: nothing for edge {edge}; it has {', '.join(method.plans or {})}")
    return (method.plans or {})[edge]


def foretold(method: FedPipe, numbers: Numbers, server: Site, plan: EdgePlan) -> float:
    """Bytes that a plan takes by what is known now."""
    (demand,) = demands(method, numbers, {plan.edge: server.run.fleet.edges[plan.edge]}, server)
    return planning.memory_of(method.shape(server).keys, demand, plan)
