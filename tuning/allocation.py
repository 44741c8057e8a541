"""`fedpipe allocate` from a run file to a Pareto table, a plot, and run files with the allocations that were found."""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from fedpipe_ray.config import to_yaml
from fedpipe_ray.display import Display, megabytes, number
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

from .allocate import Candidate, as_settings, front, gap, search
from .plan import Plan
from .settings import SAMPLERS, Campaign, Objective
from .space import space_of
from .study import best_of
from .surrogate import Budget, Surrogate
from .tune import carry_out

DEADLINES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)  # of the latency, that the planner is given


def allocate(
    run: Run, options: argparse.Namespace, out: Path, make_fleet: MakeFleet,
    make_executor: Callable[[], Executor], display: Display,
) -> Candidate:  # fmt: skip
    """Searches, writes everything to `out`, and returns the chosen allocation. Raises UserError."""
    if options.sampler not in SAMPLERS or options.trials < 1 or options.measure < 0:
        raise UserError(
            f"--sampler {options.sampler}: one of {', '.join(SAMPLERS)}; --trials {options.trials}: at least 1; "
            f"--measure {options.measure}: at least 0"
        )
    RunFolder.check_free(out)
    surrogate, own = survey(run, options, make_fleet, display)
    display.note(f"{len(surrogate.classes)} classes of edges: {'; '.join(map(', '.join, surrogate.classes.values()))}")
    with display.task("searching") as bar:
        found = search(surrogate, options.trials, options.sampler, run.seed, advance=bar)
    candidates, optimum = front(found), surrogate.optimum()
    tried = list(range(min(options.measure, len(candidates))))
    if own is not None:
        candidates.append(own)
        tried = [*tried[: max(0, options.measure - 1)], len(candidates) - 1] if tried else []
    short = gap(found.curve[-1], optimum)
    bound = "" if optimum.feasible else "; the optimum itself breaks a budget, so this is more than the true gap"
    losses: dict[int, float] = {}
    if tried:
        losses = measured(run, {at: candidates[at] for at in tried}, make_executor, display)
    chosen = min(losses, key=lambda at: losses[at], default=0)
    out.mkdir(parents=True, exist_ok=True)
    for index, one in enumerate(candidates):
        name = "allocation.yaml" if index == chosen else f"allocation-{index + 1}.yaml"
        write_atomically(out / name, to_yaml(with_plans(run, one)))
    display.console.print(pareto_table(candidates, chosen, losses))
    if own is not None:
        display.note(f"{len(candidates)}: what FedPipe's own planner gives within the latency")
    drawn = write_plot(out / "pareto.html", candidates)
    display.note(
        f"gap to the exact optimum of the same costs: {short:.2%}{bound}\n"
        + (f"plot:   {out / 'pareto.html'}\n" if drawn else "")
        + f"run it: fedpipe run {out / 'allocation.yaml'}"
    )
    return candidates[chosen]


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
    state, server = asked_of_edges(run, method, make_fleet, display, partial(surveyed, method))
    edges = run.fleet.edges
    shape, demands = method.shape(server), method.demands(state, edges, server)
    if not options.memory_from_profiles:
        demands = [dataclasses.replace(one, capacity_bytes=math.inf) for one in demands]
    facts = facts_of(edges, state.numbers, run.data.max_length)
    scores = method.scores(state, facts, server)
    surrogate = Surrogate(
        shape.keys, demands, scores, edges, Budget(options.latency, options.bytes), lam=method.of("penalty"),
        steps=method.of("steps"), rank=method.rank, sent=DTYPES[run.wire.dtype].itemsize,
    )  # fmt: skip
    for share in DEADLINES:
        earlier = dataclasses.replace(method, deadline_seconds=share * options.latency)
        if (own := planners(surrogate, earlier.configure(state, edges, server)[1])) is not None:
            return surrogate, own
    return surrogate, None


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
    run: Run, candidates: Mapping[int, Candidate], make_executor: Callable[[], Executor], display: Display
) -> dict[int, float]:
    """Validation loss by number, of those that successive halving let do all rounds: a third goes on at a time."""
    runs = {str(at): with_plans(run, one) for at, one in candidates.items()}
    which = {"allocation": list(candidates)}
    points = [{"allocation": at} for at in candidates]
    plan = Plan(
        Campaign(run="", search=which, objectives={"loss": "minimize"}, trials=len(runs), enqueue=points,
                 pruner="halving"),
        "allocations", run, lambda values: runs[values[0].partition("=")[2]],
        space_of(which), {"loss": Objective(metric="loss", way="minimize")}, [],
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="fedpipe-allocate-") as place:
        study = carry_out(plan, Path(place), make_executor, display)
        trials = best_of(study.get_trials(), plan.ways) and [t for t in study.get_trials() if t.values]
    return {int(trial.params["allocation"]): float(trial.values[0]) for trial in trials}


def pareto_table(candidates: Sequence[Candidate], chosen: int, losses: dict[int, float]) -> Table:
    """The front, a line an allocation; bytes of a round are the whole fleet's, memory that of the edge with most."""
    title = "allocations that no other beats in all four"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for name in ("", "quality", "round s", "MiB", "bytes a round", *(["loss"] if losses else [])):
        table.add_column(name, justify="right")
    for index, one in enumerate(candidates):
        cells = [
            "->" if index == chosen else str(index + 1), number(one.outcome.quality, 3), number(one.outcome.seconds, 2),
            f"{one.outcome.memory_bytes / 2**20:.1f}", megabytes(one.outcome.bytes_round),
        ]  # fmt: skip
        table.add_row(*cells, *([number(losses.get(index), 4)] if losses else []))
    return table


def write_plot(path: Path, candidates: Sequence[Candidate]) -> bool:
    """The front as one page: quality over each cost. False where plotly is not installed."""
    try:
        from plotly import graph_objects
        from plotly.subplots import make_subplots
    except ImportError:
        return False
    costs = {"seconds": "seconds of a round", "memory_bytes": "memory, bytes", "bytes_round": "bytes a round"}
    figure: Any = make_subplots(rows=1, cols=3, shared_yaxes=True, x_title="", y_title="quality")
    for column, (name, title) in enumerate(costs.items(), 1):
        x = [getattr(one.outcome, name) for one in candidates]
        y = [one.outcome.quality for one in candidates]
        figure.add_trace(graph_objects.Scatter(x=x, y=y, mode="markers", name=title), row=1, col=column)
        figure.update_xaxes(title_text=title, row=1, col=column)
    write_atomically(path, figure.to_html(include_plotlyjs=True))
    return True
