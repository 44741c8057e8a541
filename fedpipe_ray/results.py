"""What is done with a run afterwards: evaluate it, export it; and what can be checked before it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import peft

from .config import edge_data
from .data import inspect, open_data
from .device import pick_device, pick_dtype
from .display import Display
from .errors import EdgeError, UserError
from .evaluate import Metrics, combine, evaluate, generate
from .files import write_atomically
from .fleet import Fleet, classes_of
from .message import Message
from .methods.base import Method
from .model import Base, empty_model, load_tokenizer
from .planning import EdgePlan
from .process import clean_up_on_sigterm
from .record import RunFolder
from .run import Experiment, MakeFleet, preflight, server_site
from .settings import Data, Run
from .site import SERVER, Site
from .views import edge_site, first_view, is_personal, views_of

T = TypeVar("T")
Table = dict[str, Any]  # {"global": Metrics, "edges": {name: Metrics}}


def evaluate_run(
    place: Path | str, overrides: Sequence[str], source: str | None, make_fleet: MakeFleet, display: Display
) -> tuple[Table, Table]:
    """(base, tuned) on the test rows of the run's own edges, or on all rows of `source`, read here; UserError."""
    with closing(RunFolder.open(place)) as folder:
        return evaluate_folder(folder, folder.run(overrides), source, make_fleet, display)


def evaluate_folder(
    folder: RunFolder, run: Run, source: str | None, make_fleet: MakeFleet, display: Display
) -> tuple[Table, Table]:
    """`evaluate_run` of an open folder."""
    state, point = folder.final_state(run)
    if source is not None:
        method = preflight(run)
        site = server_site(run, method, point.classes)
        return views_on_source(site, state, source)
    experiment = Experiment(run, preflight(run), folder, make_fleet, display)
    try:
        experiment.open()
        if is_personal(experiment.method):
            experiment.restore(point.start)
        with display.watching(experiment.fleet, "evaluating the base model"):
            base = experiment.measure(None)
        with display.watching(experiment.fleet, "evaluating the tuned model"):
            return base, experiment.measure(state)
    finally:
        experiment.fleet.close()


def views_on_source(site: Site, state: Message, source: str) -> tuple[Table, Table]:
    """(base, tuned) of every view of a state on all rows of a source: the first as `data`, others by their name."""
    base: Table = {}
    tuned: Table = {}
    for name, weights in views_of(site, state).items():
        before, after = on_source(weights.on(site.base), site.base, site.run, source, site.classes)
        base, tuned = base or before, tuned or after
        if after is not tuned:
            base["edges"][name], tuned["edges"][name] = before["edges"]["data"], after["edges"]["data"]
    return base, tuned


def evaluate_adapter(path: Path, run: Run, source: str, display: Display) -> tuple[Table, Table]:
    """(base, tuned) of any PEFT adapter for the run's model, on all rows of `source`. Raises UserError."""
    classes = list(run.data.labels)
    if run.data.task == "classification" and not classes:
        raise UserError("data.labels: name the adapter's classes in order; they cannot be read off a file")
    display.note(f"loading {run.model.name}")
    base = Base.load(run.model, run.data.task, classes, run.seed)
    try:
        model = peft.PeftModel.from_pretrained(base.model, str(path))
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{path} is no adapter for {run.model.name}: {str(error).splitlines()[0]}") from error
    return on_source(model, base, run, source, classes)


def on_source(model: Any, base: Base, run: Run, source: str, classes: Sequence[str]) -> tuple[Table, Table]:
    """(base, tuned) metrics of a PeftModel or a whole model on all rows of a source."""
    settings = dataclasses.replace(run.data, source=source, validation=0.0, test=0.0)
    rows = open_data(settings, "data", ["data"], run.seed, base.tokenizer, list(classes), only="test").test
    count = len(classes) if run.data.task == "classification" else 0

    def measured(model: Any) -> Table:
        chosen = run.evaluate
        metrics: Metrics = evaluate(
            model,
            rows,
            device=base.device,
            pad_id=base.pad_id,
            classes=count,
            batch=chosen.batch,
            limit=chosen.rows,
            precision=run.local.precision,
        )
        if chosen.generate and not count:
            metrics |= generate(
                model,
                base.tokenizer,
                rows,
                device=base.device,
                count=chosen.generate,
                max_new_tokens=chosen.max_new_tokens,
                answer=chosen.answer,
            )
        return {"global": combine({"data": metrics}), "edges": {"data": metrics}}

    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        before = measured(model if hasattr(model, "disable_adapter") else base.model)
    return before, measured(model)


def export_run(place: Path | str, out: Path, merge: bool, edge: str | None = None) -> str:
    """Writes a run's adapter, or with `merge` a plain model with its tokenizer, to a new folder; says which it was.

    A merged model has the architecture and parameter count of the base. edge: whose, where each has its own. Raises
    UserError.
    """
    with closing(RunFolder.open(place)) as folder:
        run = folder.run()
        state, point = folder.final_state(run)
        site = server_site(run, preflight(run), point.classes)
        if edge is not None:
            site = edge_site(site, point, edge, folder.path / "private")
    with new_folder(out) as aside:
        weights = first_view(site, state)
        if not merge:
            weights.save(aside, site)
            return weights.folder
        weights.merged(site.base).save_pretrained(aside)
        site.base.tokenizer.save_pretrained(aside)
    return "merged model"


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name only when everything is in it. Raises UserError."""
    RunFolder.check_free(out)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        yield aside
        if out.exists():
            out.rmdir()
        os.replace(aside, out)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}; give another folder with --out") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def plan_run(
    run: Run, make_fleet: MakeFleet, display: Display, shapes: bool = False
) -> tuple[float, dict[str, EdgePlan]]:
    """(deadline, plan of every edge) of the run's method, from what the edges tell; no training. Raises UserError.

    shapes: from configuration and tokenizer of the model alone, as if every row had the greatest length and all weights
    were alike.
    """
    method = preflight(run)
    survey = getattr(method, "survey", None)
    if survey is None:
        raise UserError(f"method.name: {run.method['name']} gives every edge the same; fedpipe is the one that plans")
    found: tuple[float, dict[str, EdgePlan]]
    if shapes:
        if run.local.epochs is not None:
            raise UserError("local.epochs: how many rows an edge has is not known without asking it; give local.steps")
        planner: Any = method
        found = planner.configure(Message({}), run.fleet.edges, Site(SERVER, run, method, partial(frame_of, run)))
        return found
    found, _ = asked_of_edges(run, method, make_fleet, display, survey)
    return found


def frame_of(run: Run, classes: Sequence[str], bits: int) -> Base:
    """The run's model without weights, in the dtype in which they would be loaded."""
    device = pick_device(run.model.device)
    model = empty_model(run.model, run.data.task, classes)
    return Base(model.to(pick_dtype(run.model.dtype, device)), load_tokenizer(run.model), device)


def asked_of_edges(
    run: Run, method: Method, make_fleet: MakeFleet, display: Display, ask: Callable[[Fleet, Site], T]
) -> tuple[T, Site]:
    """(what `ask` finds out with the fleet and the server's site, that site); the fleet is opened for it alone."""
    with tempfile.TemporaryDirectory(prefix="fedpipe-plan-") as place:
        experiment = Experiment(run, method, RunFolder(Path(place)), make_fleet, display)
        clean_up_on_sigterm()  # Ray has taken the signal
        try:
            experiment.open()
            with display.watching(experiment.fleet, "scoring the candidate weights"):
                return ask(experiment.fleet, experiment.server), experiment.server
        finally:
            experiment.fleet.close()
            clean_up_on_sigterm()  # and leaves it to the kernel when it ends


def write_plan(path: Path, deadline: float, plans: Mapping[str, EdgePlan]) -> None:
    """plan.json: the deadline, and every field of every edge's plan; a capacity without limit is null."""
    edges = {}
    for edge, plan in plans.items():
        edges[edge] = {**dataclasses.asdict(plan), "ranks": dict(plan.ranks)}
        if math.isinf(plan.capacity_bytes):
            edges[edge]["capacity_bytes"] = None
    write_atomically(path, json.dumps({"deadline_seconds": deadline, "edges": edges}, indent=2) + "\n")


def check_data(run: Run, method: Method) -> list[str]:
    """A line an edge about the rows this machine can see. Raises EdgeError for an edge whose source has a fault, and
    UserError for the server's.

    With a cluster elsewhere, what is not here is left to the preflight on the edges.
    """
    if method.base == "none":
        return []
    elsewhere = run.fleet.ray and (run.fleet.address or os.environ.get("RAY_ADDRESS"))
    lines, faults, facts = [], [], []
    for name in run.fleet.edges:
        settings: Data = edge_data(run, name, run.fleet.edges[name])
        try:
            found = inspect(settings, name, list(run.fleet.edges), run.seed)
        except UserError as error:
            faults.append(f"edge {name}: {error}")
            continue
        facts.append(found)
        lines.append(f"edge {name}: {found.rows} rows in {settings.source}")
    if faults and not elsewhere:
        raise EdgeError("\n".join(faults))
    if not faults:
        classes_of(run, facts)
    if run.server.data is not None:  # this machine's own, wherever the edges are
        lines.append(f"server: {inspect(run.server.data, '', [], run.seed).rows} rows in {run.server.data.source}")
    return lines + [f"{fault} (left to the preflight on the cluster)" for fault in faults]
