"""RayFleet: one actor an edge server, placed by its profile, one put a round for what the edges share."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from fedpipe_ray.data import SourceFacts
from fedpipe_ray.errors import EdgeError, UserError
from fedpipe_ray.evaluate import Metrics
from fedpipe_ray.fleet import Refused, accepted, classes_of
from fedpipe_ray.message import Message
from fedpipe_ray.methods.base import Method
from fedpipe_ray.model import Base
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, Run
from fedpipe_ray.site import Progress, Ready

from .connect import connect
from .parallel import actor_kind
from .placement import Node, actor_options, unplaceable

log = logging.getLogger("fedpipe")


class RayFleet:
    """Edge servers as Ray actors. The same bits as SerialFleet on the same kind of CPU.

    Raises UserError at once if an edge cannot be placed on the cluster. `close` ends the actors, and Ray if it was
    started here.
    """

    def __init__(self, run: Run, method: Method, private_dir: Path | None = None) -> None:
        try:
            self.owns_ray = connect(run.fleet.address)
        except ConnectionError as error:
            raise UserError(str(error)) from error
        self.run_settings, self.method, self.private_dir = run, method, private_dir
        self.actors: dict[str, Any] = {}
        self.classes: list[str] = []
        self.parcel: tuple[Any, Any] = (None, None)  # references to files and weights
        self.private: dict[str, tuple[int, Mapping[str, str]]] = {}
        self.opened = False
        nodes = [Node(node["Resources"], node.get("Labels", {})) for node in ray.nodes() if node["Alive"]]
        refused = unplaceable(run.fleet.edges, nodes)
        if refused:
            self.close()
            raise UserError("\n".join(refused))

    @property
    def edges(self) -> Mapping[str, Profile]:
        """The profiles by name."""
        return self.run_settings.fleet.edges

    def open(self) -> list[Ready]:
        """Starts the actors and has each look at its own data and model. Raises EdgeError."""
        for name in self.edges:
            self._start(name)
        if self.method.base != "none":
            facts: list[SourceFacts] = accepted(self._ask_all("inspect"))
            self.classes = classes_of(self.run_settings, facts)
            self._load_parcel()
        ready: list[Ready] = accepted(self._ask_all("prepare", self.classes, *self.parcel))
        self.opened = True
        return ready

    def run(self, orders: Mapping[str, Message], round: int) -> Iterator[Report | Lost]:
        """All edges at once; reports in the order of the orders, each with a reference to its update."""
        self._replace_dead()
        shared, own = split(orders)
        dtype = self.run_settings.wire.dtype
        everyone = ray.put(Message(shared).to(dtype))
        sent = {
            name: self.actors[name].attempt.options(num_returns=2).remote(round, everyone, order.to(dtype))
            for name, order in own.items()
            if name in self.actors
        }
        for name in orders:
            if name not in sent:
                yield Lost(name, "its worker died and could not be replaced")
                continue
            report_ref, update_ref = sent.pop(name)
            report = self._await(name, report_ref)
            if isinstance(report, Report):
                report.fetch = partial(fetched, update_ref)
                if report.private is not None:
                    self.private[name] = (round + 1, report.private)
            del update_ref
            yield report

    def evaluate(self, state: Message | None, split: str, answers: int = 0) -> dict[str, Metrics | Lost]:
        """Metrics of a state on every edge's own rows; the state is put once."""
        self._replace_dead()
        found = self._ask_all("evaluate", None if state is None else ray.put(state), split, answers)
        return {
            name: Lost(name, answer.reason, answer.traceback) if isinstance(answer, Refused) else answer
            for name, answer in zip(self.edges, found, strict=True)
        }

    def restore(self, round: int, private: Mapping[str, Mapping[str, str]]) -> None:
        """Has the edges take up the private states of a checkpoint. Raises EdgeError."""
        refs = {
            name: self.actors[name].restore.remote(round, rest["path"], rest["sha256"])
            for name, rest in private.items()
        }
        accepted([self._answer(name, ref) for name, ref in refs.items()])

    def progress(self) -> dict[str, Progress]:
        """What every edge is doing right now; an edge that does not answer within a second is `starting` or `gone`."""
        refs = {actor.progress.remote(): name for name, actor in list(self.actors.items())}
        done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=1.0) if refs else ([], [])
        result = {name: Progress("starting" if not self.opened else "busy") for name in self.edges}
        for ref in done:
            try:
                result[refs[ref]] = ray.get(ref)
            except RayError:
                result[refs[ref]] = Progress("gone")
        return result

    def close(self) -> None:
        """Ends the actors, and Ray if it was started here."""
        for actor in self.actors.values():
            ray.kill(actor)
        self.actors.clear()
        self.parcel = (None, None)
        if self.owns_ray:
            ray.shutdown()

    def _start(self, name: str) -> None:
        """Makes the actor of an edge; its process imports and loads while we go on."""
        profile = self.edges[name]
        kind, options = actor_kind(profile, actor_options(name, profile))
        self.actors[name] = (
            ray.remote(kind)
            .options(**options)
            .remote(name, self.run_settings, self.method, str(self.private_dir) if self.private_dir else None)
        )

    def _load_parcel(self) -> None:
        """Puts the model into the object store once if the driver is to ship it."""
        model = self.run_settings.model
        ships = model.load == "driver" or (model.load == "auto" and model.name.startswith("builtin:"))
        if ships:
            parcel = Base.load(model, self.run_settings.data.task, self.classes, self.run_settings.seed).parcel()
            self.parcel = (ray.put(parcel.files), ray.put(parcel.weights))

    def _ask_all(self, call: str, *arguments: Any) -> list[Any]:
        """One answer an edge, in the order of the edges; asked side by side."""
        refs = [
            getattr(self.actors[name], call).remote(*arguments) if name in self.actors else None for name in self.edges
        ]
        return [
            Refused(name, "its worker is gone") if ref is None else self._answer(name, ref)
            for name, ref in zip(self.edges, refs, strict=True)
        ]

    def _answer(self, name: str, ref: Any) -> Any:
        """What an actor answered, or Refused if it could not."""
        limit = self.run_settings.fleet.start_timeout_seconds if not self.opened else None
        try:
            return ray.get(ref, timeout=limit)
        except GetTimeoutError:
            return Refused(
                name,
                f"did not answer within fleet.start_timeout_seconds={limit:g}; is the cluster full? see `ray status`",
            )
        except RayTaskError as error:
            return Refused(name, str(error.cause), str(error))
        except RayActorError as error:
            self._bury(name)
            return Refused(name, f"its worker died: {first_line(error)}")

    def _await(self, name: str, ref: Any) -> Report | Lost:
        """A round's report, or why there is none. An edge that is late or dead gets a new worker next round."""
        limit = self.run_settings.fleet.round_timeout_seconds
        try:
            report: Report | Lost = ray.get(ref, timeout=limit)
            return report
        except GetTimeoutError:
            self._bury(name)
            return Lost(name, f"no report within fleet.round_timeout_seconds={limit:g}")
        except RayTaskError as error:
            return Lost(name, str(error.cause), str(error))
        except RayActorError as error:
            self._bury(name)
            return Lost(name, f"its worker died: {first_line(error)}")

    def _bury(self, name: str) -> None:
        actor = self.actors.pop(name, None)
        if actor is not None:
            ray.kill(actor)

    def _replace_dead(self) -> None:
        """New workers for edges that lost theirs; one that had private state finds it by path, or starts fresh."""
        dead = [name for name in self.edges if name not in self.actors]
        for name in dead:
            log.warning("edge %s: starting a new worker", name)
            self._start(name)
        refs = {name: self.actors[name].prepare.remote(self.classes, *self.parcel) for name in dead}
        for name, ref in refs.items():
            try:
                accepted([self._answer(name, ref)])
            except EdgeError as error:
                log.warning("%s", error)
                self._bury(name)
                continue
            if name in self.private:
                round, rest = self.private[name]
                answer = self._answer(name, self.actors[name].restore.remote(round, rest["path"], rest["sha256"]))
                if isinstance(answer, Refused):
                    log.warning("edge %s starts with fresh private state: %s", name, answer.reason)


def fetched(ref: Any) -> Message:
    """The message behind a reference: views on the object store. Raises RayError if it is gone."""
    message: Message = ray.get(ref)
    return message


def split(orders: Mapping[str, Message]) -> tuple[dict[str, Any], dict[str, Message]]:
    """(tensors that are the same object in every order, the rest of each order): what to put once, what to send."""
    messages: Sequence[Message] = list(orders.values())
    first = messages[0].tensors if messages else {}
    shared = {name: t for name, t in first.items() if all(m.tensors.get(name) is t for m in messages)}
    own = {
        edge: Message({k: t for k, t in message.tensors.items() if k not in shared}, message.numbers)
        for edge, message in orders.items()
    }
    return shared, own


def first_line(error: Exception) -> str:
    """The line of an error that says most: the first, or the last of an actor that could not be made."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "creation task" in lines[0]:
        return f"it could not be made: {lines[-1]}"
    return lines[0] if lines else type(error).__name__
