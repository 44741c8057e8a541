"""The plans of FedPipe's edges, from what they told: demands, scores, the deadline, and the solver of the method."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from . import beliefs, planning
from .demands import demand_of, upload_bytes
from .errors import UserError
from .facts import MEAN, Facts, calibrations_of, facts_of, protected, scores_of
from .planning import Demand, EdgePlan
from .probe import steps_of_probe
from .settings import Local, Profile, Run
from .train import steps_of

if TYPE_CHECKING:
    from .methods.fedpipe import FedPipe
    from .site import Site

Numbers = Mapping[str, float]
IN_TIME = 0.95  # of fleet.deadline_seconds: rows are longer in one round than in another
log = logging.getLogger("fedpipe")


def demands(method: FedPipe, numbers: Numbers, edges: Mapping[str, Profile], server: Site) -> list[Demand]:
    """What every edge may do."""
    shape, local = method.shape(server), server.run.local
    facts = facts_of(edges, numbers, server.run.data.max_length)
    depths: list[int | None] = [None, *([shape.layers // 2, shape.layers // 4] if method.depth else [])]
    planned, upload, found = planned_steps(local, facts), upload_bytes(shape.keys, method.rank, server.run.wire), []
    for edge, profile in edges.items():
        floor = protected(planned[edge], facts[edge].share, len(edges))
        found.append(demand_of(
            edge, profile, shape, facts[edge], rank=method.rank, wire=server.run.wire.dtype, upload=upload,
            batch=local.batch, bits=beliefs.bits_of(edge, method.bits or [16, 8, 4], numbers),
            depths=[d for d in depths if d != 0], steps=planned[edge], min_steps=floor,
            max_steps=max(floor, math.ceil(method.step_ratio * planned[edge])),
            measured=calibrations_of(edge, numbers), real=server.run.fleet.clock == "real",
            accumulate=local.accumulate, probed=steps_of_probe(method.of("score")) * due(method, edge, numbers, server),
            limit_seconds=limit_of(server.run), **beliefs.believed(edge, numbers),
        ))  # fmt: skip
    return found


def planned_steps(local: Local, facts: Mapping[str, Facts]) -> dict[str, int]:
    """Steps of a round by edge as `local` has them; with epochs, of edges whose rows nobody knows yet, the others'
    median, or as many as without epochs.
    """
    if local.epochs is None:
        return {edge: steps_of(local, one.rows) for edge, one in facts.items()}
    known = [steps_of(local, one.rows) for one in facts.values() if one.rows]
    other = round(median(known)) if known else steps_of(replace(local, epochs=None), 0)
    return {edge: steps_of(local, one.rows) if one.rows else other for edge, one in facts.items()}


def due(method: FedPipe, edge: str, numbers: Numbers, server: Site) -> bool:
    """Whether an edge scores the weights in this round: every `refresh_every` rounds, and where it has no scores; not
    where `plans` say what it is given.
    """
    if method.plans is not None:
        return False
    first = method.shape(server).keys[0].name
    return numbers.get("rounds", 0) % method.refresh_every == 0 or f"{edge}/{MEAN}{first}" not in numbers


def limit_of(run: Run) -> float:
    """Seconds of the virtual clock within which a round is planned to end, lest fleet.deadline_seconds loses it."""
    given = run.fleet.deadline_seconds
    return math.inf if given is None or run.fleet.clock == "real" else IN_TIME * given


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
    limit = limit_of(server.run)
    part = min(1.0, numbers.get("rounds", 0) / max(1, server.run.rounds - 1))  # of the run
    share = method.communication * (1 + part) / 2

    def plans(deadline: float, most: float = math.inf, solver: str = method.of("solver")) -> dict[str, EdgePlan]:
        deadline = min(deadline, limit)
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
            rows = sum(one.steps for one in whole) * local.batch if method.of("steps") == "filled" else math.inf
            deadline, _ = planning.search_deadline(partial(bounded, solver=quick), rows)
        deadline = min(deadline, limit)
        chosen = bounded(deadline)
    except ValueError as error:
        raise UserError(str(error)) from None
    late = {edge: found for edge, found in chosen.items() if found.seconds > deadline * 1.001}
    if len(late) == len(chosen):
        rates = ", ".join(f"{edge} {found.under_training:.0%}" for edge, found in late.items())
        which = "method" if deadline < limit else "fleet"
        warn(f"{which}.deadline_seconds: no edge meets {deadline:.3g} s; under-training rates: {rates}", server)
    elif deadline == limit and late:
        ends = ", ".join(f"{edge} {found.seconds:.3g} s" for edge, found in late.items())
        warn(f"fleet.deadline_seconds: {server.run.fleet.deadline_seconds:g} s: the rounds of {ends} end later", server)
    return deadline, chosen


def warn(said: str, server: Site) -> None:
    """Once, until something else is to be said."""
    if server.memo.get("said") != said:
        log.warning("%s; the best plan follows", said)
    server.memo["said"] = said


def told(method: FedPipe, edge: str) -> planning.Allocation:
    """What `plans` says of an edge. Raises ValueError if nothing."""
    if edge not in (method.plans or {}):
        raise ValueError(f"method.plans: nothing for edge {edge}; it has {', '.join(method.plans or {})}")
    return (method.plans or {})[edge]


def foretold(method: FedPipe, numbers: Numbers, server: Site, plan: EdgePlan) -> float:
    """Bytes that a plan takes by what is known now."""
    (demand,) = demands(method, numbers, {plan.edge: server.run.fleet.edges[plan.edge]}, server)
    return planning.memory_of(method.shape(server).keys, demand, plan)
