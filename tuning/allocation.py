"""`fedpipe allocate` from a run file to a Pareto table, a plot, and run files with the allocations that were found."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from fedpipe_ray import edge_plans
from fedpipe_ray.config import to_yaml
from fedpipe_ray.demands import upload_bytes
from fedpipe_ray.display import Display
from fedpipe_ray.errors import UserError
from fedpipe_ray.facts import facts_of
from fedpipe_ray.files import write_atomically
from fedpipe_ray.message import DTYPES
from fedpipe_ray.methods.fedpipe import FedPipe
from fedpipe_ray.planning import Allocation, EdgePlan
from fedpipe_ray.record import RunFolder
from fedpipe_ray.results import asked_of_edges
from fedpipe_ray.run import MakeFleet, preflight
from fedpipe_ray.settings import Run
from fedpipe_ray.survey import surveyed
from fedpipe_ray.trial import Executor

from .allocate import Candidate, as_settings, front, gap, ranked, search
from .pareto import Pareto, named, pareto_table, write_plot
from .promotion import FINALISTS, Measured, measure, promoted
from .settings import SAMPLERS
from .surrogate import Budget, Outcome, Surrogate

log = logging.getLogger("fedpipe")

DEADLINES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)  # of the latency, that the planner is given
MEASURED = "measured"  # the folder of the short runs
FOLLOWS = "the best plan follows"  # says the planner of deadlines that no edge meets, and none does here
LACKS = {
    "cmaes": "CMA-ES knows no constraints in Optuna: it is drawn to points that break a budget; tpe, gp, nsga2 are not",
}  # fmt: skip


def allocate(
    run: Run, options: argparse.Namespace, out: Path, make_fleet: MakeFleet,
    make_executor: Callable[[], Executor], display: Display,
) -> Candidate:  # fmt: skip
    """Searches, writes everything to `out`, and returns the chosen allocation. Raises UserError."""
    check_options(run, options)
    RunFolder.check_free(out)
    surrogate, planned = survey(run, options, make_fleet, display)
    display.note(f"{len(surrogate.classes)} classes of edges: {'; '.join(map(', '.join, surrogate.classes.values()))}")
    if options.sampler in LACKS:
        display.note(f"--sampler {options.sampler}: {LACKS[options.sampler]}")
    with display.task("searching") as bar:
        found = search(surrogate, options.trials, options.sampler, run.seed, advance=bar)
    candidates, own = ranked(front(found), planned)
    losses = measured(run, candidates, own, options.measure, out, make_executor, display)
    done = {at: one.loss for at, one in losses.items() if one.counts and one.loss is not None}
    if losses and not done:
        raise UserError("--measure: no run that was measured to the end has a loss that is a number; lower local.lr")
    shown = Pareto(candidates, surrogate.classes, min(done, key=lambda at: done[at], default=0), own, losses)
    write_all(run, shown, surrogate.optimum(), out, display)
    return candidates[shown.chosen]


def check_options(run: Run, options: argparse.Namespace) -> None:
    """Raises UserError for what cannot be searched or compared."""
    if options.sampler not in SAMPLERS or options.trials < 1 or options.measure < 0:
        raise UserError(
            f"--sampler {options.sampler}: one of {', '.join(SAMPLERS)}; --trials {options.trials}: at least 1; "
            f"--measure {options.measure}: 0, or at least 2"
        )
    if options.measure == 1:
        raise UserError(
            "--measure 1: one run alone has nothing to be compared with; measure at least 2, or leave --measure out: "
            "then the best by quality is chosen"
        )
    if options.measure and not run.evaluate.every:
        raise UserError("evaluate.every: 0, and --measure compares validation losses; set it above 0")


def write_all(run: Run, shown: Pareto, optimum: Outcome, out: Path, display: Display) -> None:
    """Run files, plot and table of all that were found; allocation.yaml is the chosen one's."""
    out.mkdir(parents=True, exist_ok=True)
    for at, one in enumerate(shown.candidates):
        name = "allocation.yaml" if at == shown.chosen else f"allocation-{at + 1}.yaml"
        write_atomically(out / name, to_yaml(with_plans(run, one)))
    display.console.print(pareto_table(shown))
    drawn = write_plot(out / "pareto.html", shown)
    short = gap(shown.candidates[shown.chosen].outcome.quality, optimum)
    bound = "" if optimum.feasible else "; the optimum itself breaks a budget, so this is more than the true gap"
    lines = [
        f"{shown.chosen + 1} is chosen {shown.reason}",
        f"its gap to the exact optimum of the same costs: {short:z.2%}{bound}",
        *([f"plot:   {out / 'pareto.html'}"] if drawn else []),
        *([f"rounds: {out / MEASURED}"] if shown.measured else []),
        f"run it: fedpipe run {out / 'allocation.yaml'}",
    ]
    display.note("\n".join(lines))


def survey(
    run: Run, options: argparse.Namespace, make_fleet: MakeFleet, display: Display
) -> tuple[Surrogate, Candidate | None]:
    """The planner's problem of every edge, once each has told its facts and scores, and its own plan if one keeps the
    budgets. Raises UserError.

    The planner's deadline is soft: an edge with rare rows may be late. So the longest is taken that all edges keep.
    """
    method = preflight(run)
    if not isinstance(method, FedPipe):
        raise UserError(f"method.name: {run.method['name']} has no ranks to allocate; fedpipe has")
    with silent(FOLLOWS):
        state, server = asked_of_edges(run, method, make_fleet, display, partial(surveyed, method))
    edges = run.fleet.edges
    given = dataclasses.replace(method, plans={})  # edges that are told what to do score no weights
    shape, demands = method.shape(server), given.demands(state, edges, server)
    free = [one.edge for one in demands if math.isinf(one.capacity_bytes)]
    if options.memory_from_profiles and free:
        display.note(f"--memory-from-profiles: no limit of {named(free)}, without training_memory_bytes")
    facts = facts_of(edges, state.numbers, run.data.max_length)
    scores = edge_plans.scores(method, state.numbers, facts, server)
    surrogate = Surrogate(
        shape.keys, demands, scores, edges, Budget(options.latency, options.bytes), lam=method.of("penalty"),
        steps=method.of("steps"), rank=method.rank, sent=DTYPES[run.wire.dtype].itemsize,
        upload=upload_bytes(shape.keys, method.rank, run.wire), whole=shape.whole,
    )  # fmt: skip
    with silent(FOLLOWS):
        for share in DEADLINES:
            earlier = dataclasses.replace(method, deadline_seconds=share * options.latency)
            if (own := planners(surrogate, earlier.configure(state, edges, server)[1])) is not None:
                return surrogate, own
    return surrogate, None


@contextmanager
def silent(about: str) -> Iterator[None]:
    """Keeps lines that hold `about` out of the log: what the planner says of plans that may never be used."""

    def keep(record: logging.LogRecord) -> bool:
        return about not in record.getMessage()

    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)


def planners(surrogate: Surrogate, plans: Mapping[str, EdgePlan]) -> Candidate | None:
    """The planner's plans as an allocation; None where they break a budget, or leave out layers."""
    if any(plan.depth is not None for plan in plans.values()):
        return None
    told = {edge: Allocation(plan.bits, plan.batch, dict(plan.ranks)) for edge, plan in plans.items()}
    outcome = surrogate.of_fleet(told)
    return Candidate(told, outcome) if outcome.feasible else None


def with_plans(run: Run, one: Candidate) -> Run:
    """The run with an allocation in it."""
    return dataclasses.replace(run, method={**run.method, "plans": as_settings(one.plans)})


def measured(
    run: Run, candidates: Sequence[Candidate], own: int | None, most: int, out: Path,
    make_executor: Callable[[], Executor], display: Display,
) -> dict[int, Measured]:  # fmt: skip
    """What short runs of the best, of the planner's own and of some between gave, by place; of one alone nothing."""
    if not most:
        return {}
    if len(candidates) < FINALISTS:
        display.note("--measure: there is only one allocation; it is chosen unmeasured")
        return {}
    runs = {at + 1: with_plans(run, candidates[at]) for at in promoted(len(candidates), own, most)}
    return {at - 1: one for at, one in measure(runs, out / MEASURED, make_executor, display).items()}
