"""One run from configuration to adapter: preflight, rounds with checkpoints, final evaluation, export."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .buffered import check_buffered, federate_buffered
from .codecs import make_codec
from .config import FREE_ON_RESUME, differences, training_hash
from .display import Display
from .encoding import check_codec
from .errors import AllEdgesLost, EdgeError, Interrupted, UserError
from .evaluate import Metrics, combine
from .fleet import Fleet
from .loop import Round, Start, federate
from .message import Message
from .methods import make_method
from .methods.base import Method, shown
from .model import Base
from .planned import Plans
from .pretrain import builtin_model
from .process import stop_after_round
from .randomness import rng_for
from .record import Checkpoint, RunFolder, round_record
from .report import Lost, Report
from .server_checks import check_server
from .settings import Run
from .site import SERVER, Ready, Site
from .trackers import Trackers
from .views import PERSONAL_HINT, check_personal, first_view, is_personal

log = logging.getLogger("fedpipe")
MakeFleet = Callable[[Run, Method, Path], Fleet]


def server_site(run: Run, method: Method, classes: list[str]) -> Site:
    """The server as a Site; model and data load when a method asks for them."""

    def load(names: Any, bits: int) -> Base:
        return Base.load(run.model, run.data.task, list(names), run.seed, bits=bits)

    return Site(SERVER, run, method, load, classes=classes)


def preflight(run: Run) -> Method:
    """Everything that can be checked on the driver before any actor starts. Raises UserError."""
    method = make_method(run.method)
    if method.base != "none":
        classes = run.data.labels or ["0", "1"]
        site = server_site(run, method, list(classes))
        check = getattr(method, "check", None)
        if check is None:
            site.bare()
        else:
            check(site)
    check_buffered(run, method)
    check_personal(run, method)
    check_codec(run, method)
    check_server(run, method)
    return method


def settled(run: Run) -> tuple[Run, Method]:
    """A new run with every setting of its method and codec written down, so that no later default changes it, and that.

    Raises UserError as `preflight` does.
    """
    method = preflight(run)
    if run.wire.codec is not None:
        codec: Any = make_codec(run.wire.codec)
        whole = {"name": run.wire.codec["name"], **dataclasses.asdict(codec)}
        run = dataclasses.replace(run, wire=dataclasses.replace(run.wire, codec=whole))
    if not dataclasses.is_dataclass(method):
        return run, method
    whole = json.loads(json.dumps(dataclasses.asdict(method)))  # tuples are lists in a run file
    return dataclasses.replace(run, method={"name": run.method["name"], **whole}), method


def pretrain(run: Run, display: Display) -> None:
    """Pretrains the built-in model, if that is the run's and not in the cache."""
    name = run.model.name
    if name.startswith("builtin:"):
        with display.task("pretraining the built-in model, once") as bar:
            builtin_model(name.removeprefix("builtin:"), lambda n, steps, loss: bar(n, steps, f"loss {loss:.2f}"))


class Experiment:
    """A run in its folder. `begin` or `resume`, then `finish`; every completed round is on disk before the next.

    Pretrains the built-in model if it is not in the cache, before the fleet takes its share of the machine. trackers:
    not started yet; who made them closes them.
    """

    def __init__(
        self, run: Run, method: Method, folder: RunFolder, make_fleet: MakeFleet, display: Display,
        trackers: Trackers | None = None,
    ) -> None:  # fmt: skip
        self.run, self.method, self.folder, self.display = run, method, folder, display
        if method.base != "none":
            pretrain(run, display)
        display.note("starting the edge servers" + (" on Ray" if run.fleet.ray else " in this process"))
        self.fleet = make_fleet(run, self.method, folder.path / "private")
        self.point = Checkpoint(Start(Message()), "", {})
        self.plans = Plans(folder.path)
        self.trackers = trackers or Trackers()
        self.server = server_site(run, self.method, [])

    def open(self) -> list[Ready]:
        """Preflight on the edges. Raises EdgeError."""
        with self.display.watching(self.fleet):
            ready = self.fleet.open()
        self.display.edges(self.run, ready)
        self.server.classes = list(getattr(self.fleet, "classes", []))
        return ready

    def begin(self, config_hash: str) -> None:
        """Opens the fleet, evaluates the base model, and writes the checkpoint before round 1."""
        ready = self.open()
        state = self.method.start(self.server, rng_for(self.run.seed, 0, "start"))
        # Pure, so it can be tried: an edge that no plan fits is refused before a file is written.
        self.method.plan(state, self.fleet.edges, self.server, 0, rng_for(self.run.seed, 0, "plan"))
        self.point = Checkpoint(
            Start(state), config_hash, {one.edge: one.fingerprint for one in ready},
            classes=self.server.classes,
            totals={"bytes_up": 0, "bytes_down": 0, "wall_seconds": 0.0, "virtual_seconds": 0.0},
        )  # fmt: skip
        if self.method.base != "none":
            with self.display.watching(self.fleet, "evaluating the base model"):
                self.point.base = self.measure(None)
            self.display.base(self.point.base["global"])
        self.track()
        self.folder.save_checkpoint(self.point)

    def resume(self, point: Checkpoint) -> None:
        """Opens the fleet and takes up a checkpoint. Raises UserError if an edge's data is not what it was."""
        ready = self.open()
        known = point.fingerprints  # of edges that were there; with fleet.min_edges others may come, and some be away
        changed = [one.edge for one in ready if known.setdefault(one.edge, one.fingerprint) != one.fingerprint]
        if changed:
            raise UserError(
                f"the data of edge {', '.join(changed)} changed since the checkpoint; bring it back, or start a new run"
            )
        self.folder.rewind(point.start.round)
        self.plans.rewind(point.start.round)
        (self.folder.path / "summary.json").unlink(missing_ok=True)  # of the shorter run
        self.restore(point.start)
        self.point = point
        self.track()

    def track(self) -> None:
        """Opens the trackers and brings them up to this checkpoint."""
        self.trackers.start(self.run, self.folder.path, self.point.base, self.folder.rounds())

    def restore(self, start: Start) -> None:
        """Private states as they were: of an edge still at work, before the round in which it was asked."""
        asked = {flight.edge: flight.base_round for flight in start.flights}
        for round in sorted({start.round, *asked.values()}):
            left = {edge: rest for edge, rest in start.private.items() if asked.get(edge, start.round) == round}
            self.fleet.restore(round, left)

    def measure(self, state: Message | None) -> dict[str, Any]:
        """{"global": ..., "edges": {name: ...}} on the test rows, with free-text answers where they are asked for.

        Where edges have not the whole model, "server": what the server measures on test rows of its own, if it has any.
        """
        answers = self.run.evaluate.generate
        found = self.fleet.evaluate(shown(self.method, state, self.server), "test", answers)
        edges: dict[str, Metrics] = {}
        for name, metrics in found.items():
            if isinstance(metrics, Lost):
                log.warning("edge %s could not evaluate: %s", name, metrics.traceback or metrics.reason)
            elif metrics:
                edges[name] = metrics
        table: dict[str, Any] = {"global": combine(edges), "edges": edges}
        if self.method.base == "sent" and self.run.server.data is not None:
            table["server"] = self.server.evaluate(state, "test", answers)
        return table

    def finish(self) -> dict[str, Any]:
        """Runs the rounds left; returns the summary. Raises AllEdgesLost, EdgeError or Interrupted, all saved."""
        run, reason = self.run, early_stop(self.run, self.point)  # a run may have been killed after its last round
        try:
            with self.display.rounds(self.fleet, run.rounds, self.point.start.round), stop_after_round() as stop:
                for done in self.rounds() if reason is None else ():
                    self.keep(done)
                    reason = early_stop(run, self.point)
                    if reason is not None:
                        break
                    if stop and done.number + 1 < run.rounds:
                        raise Interrupted(stop[0])
        except (AllEdgesLost, EdgeError, Interrupted) as error:
            warn_of(error.lost if isinstance(error, AllEdgesLost) else (), self.point.start.round)
            self.write(self.point.start.state, "interrupted" if isinstance(error, Interrupted) else "failed", {})
            raise
        if reason is not None:
            log.info("stopped after round %d: %s", self.point.start.round, reason)
        status = "finished" if reason is None else "stopped_early"
        state = self.point.start.state
        if run.evaluate.keep == "best" and self.point.best is not None:
            state = self.folder.load_best(self.point.best)
        tuned: dict[str, Any] = {}
        if self.method.base != "none":
            with self.display.watching(self.fleet, "evaluating the tuned model"):
                tuned = self.measure(state)
        return self.write(state, status, tuned)

    def rounds(self) -> Iterator[Round]:
        """The rounds that are left, as they are done."""
        return rounds_of(self.run, self.method, self.fleet, self.server, self.point.start)

    def keep(self, done: Round) -> None:
        """Records a round: rounds.jsonl and the trackers, then the checkpoint, then the screen."""
        record = round_record(done)
        self.folder.append(record)
        self.plans.append(record["round"], done.plans, done.state.numbers)
        self.trackers.round(record)
        point = self.point
        for key in point.totals:
            point.totals[key] += record[key]
        left = {edge: outcome.private for edge, outcome in done.outcomes.items() if outcome.private is not None}
        private = {**point.start.private, **left}
        clock, flights = done.clock_seconds, done.flights
        point.start = Start(done.state, done.number + 1, private, clock, flights, done.held, done.moments)
        if "loss" in done.quality:
            loss = done.quality["loss"]
            point.history.append({"round": done.number + 1, "loss": loss})
            better = math.isfinite(loss) and (point.best is None or loss <= point.best["loss"])
            if self.run.evaluate.keep == "best" and better:
                point.best = {**self.folder.save_best(done.state, done.number + 1), "loss": loss}
        self.folder.save_checkpoint(point)
        warn_of(done.outcomes.values(), done.number)
        self.display.round(record)

    def write(self, state: Message, status: str, tuned: dict[str, Any]) -> dict[str, Any]:
        """Writes the adapter or model, and summary.json; returns the summary with `export`, how it is loaded."""
        hint = PERSONAL_HINT if is_personal(self.method) else ""
        if self.method.base != "none" and not is_personal(self.method):
            weights = first_view(self.server, state)
            weights.save(self.folder.path / weights.folder, self.server)
            hint = weights.hint
            if self.folder.remote is not None:
                hint = f"result:   {{out}}/{weights.folder}   (brought here by: fedpipe export {{out}} --out DIR)"
        summary = {
            "status": status,
            "rounds": self.point.start.round,
            "base": self.point.base,
            "tuned": tuned,
            "totals": self.point.totals,
        }
        self.trackers.finish(summary)
        self.folder.write_summary(summary)
        from .page.report import add_report  # plotly, which is wanted only now

        add_report(self.folder)
        return {**summary, "export": hint}


def rounds_of(run: Run, method: Method, fleet: Fleet, server: Site, start: Start | None = None) -> Iterator[Round]:
    """The rounds of a run on an open fleet, from `start` or its beginning, as they are done."""
    settings, every = run.fleet, 0 if method.base == "none" else run.evaluate.every
    if settings.mode == "buffered" and settings.buffer is not None:
        return federate_buffered(
            method, fleet, server, rounds=run.rounds, seed=run.seed, buffer=settings.buffer,
            concurrency=settings.concurrency, max_staleness=settings.max_staleness, evaluate_every=every, start=start,
        )  # fmt: skip
    return federate(
        method, fleet, server, rounds=run.rounds, seed=run.seed, fraction=settings.fraction,
        over_select=settings.over_select, deadline_seconds=settings.deadline_seconds, evaluate_every=every, start=start,
    )  # fmt: skip


def go_on(experiment: Experiment, display: Display) -> dict[str, Any]:
    """The rounds that are left; says how to resume when they are stopped."""
    try:
        return dict(experiment.finish())
    except (Interrupted, AllEdgesLost, EdgeError, KeyboardInterrupt):
        place = experiment.folder.name
        display.note(f"stopped after round {experiment.point.start.round}; go on with: fedpipe resume {place}")
        raise


def warn_of(outcomes: Iterable[Report | Lost], round: int) -> None:
    """Says which edges were lost in a round (from 0), each with its own traceback where there is one.

    Late ones are no news: they stand in the round's line and its record.
    """
    for outcome in outcomes:
        if isinstance(outcome, Lost) and outcome.status == "lost":
            log.warning("round %d: edge %s lost: %s", round + 1, outcome.edge, outcome.traceback or outcome.reason)


def early_stop(run: Run, point: Checkpoint) -> str | None:
    """Why to stop after this checkpoint's round: the target is reached, or patience is at its end; None to go on."""
    if not point.history or point.history[-1]["round"] != point.start.round:
        return None
    return stop_reason(run, [entry["loss"] for entry in point.history])


def stop_reason(run: Run, found: Sequence[float | None]) -> str | None:
    """As `early_stop`, after the last of these validation losses."""
    settings = run.evaluate
    losses = [math.inf if loss is None or math.isnan(loss) else loss for loss in found]  # JSON has null for NaN
    if settings.target is not None and losses[-1] <= settings.target:
        return f"validation loss {losses[-1]:.4f} reached evaluate.target {settings.target}"
    since = len(losses) - 1 - losses.index(min(losses))
    if settings.patience is not None and since >= settings.patience:
        return f"no better validation loss for {since} evaluations (evaluate.patience)"
    return None


def extended(run: Run, folder: RunFolder, point: Checkpoint) -> Run:
    """`run` if it can go on from `point` of the folder's own run. Raises UserError, as where nothing is left to do."""
    before, done, reason = folder.run(), point.start.round, early_stop(run, point)
    if training_hash(before) != point.config_hash:
        raise UserError(
            "config.yaml is not the one this run began with (edited, or of another version of this program); "
            "bring it back, or start a new run"
        )
    if training_hash(run) != training_hash(before):
        keys = differences(dataclasses.asdict(before), dataclasses.asdict(run))
        changed = ", ".join(sorted(key for key in keys if not f"{key}.".startswith(FREE)))
        raise UserError(
            f"resume cannot change {changed}; free keys are {', '.join(FREE_ON_RESUME)}; for others start a new run"
        )
    if done > run.rounds:
        raise UserError(f"rounds: {run.rounds} is less than the {done} rounds that {folder.name} has done")
    if folder.complete(done) and done == run.rounds:
        raise UserError(f"{folder.name} has all its {done} rounds; extend it with rounds={2 * done}")
    if folder.complete(done) and reason is not None:
        raise UserError(f"{folder.name} stopped early: {reason}; change evaluate.patience or evaluate.target to go on")
    return run


FREE = tuple(f"{key}." for key in FREE_ON_RESUME)
