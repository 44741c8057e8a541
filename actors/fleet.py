"""RayFleet: edge servers in Ray actors, placed by their profiles, one put a round for what the edges share."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError

from fedpipe_ray.costs import return_large_blocks
from fedpipe_ray.data import SourceFacts
from fedpipe_ray.errors import UserError
from fedpipe_ray.evaluate import Metrics
from fedpipe_ray.fleet import Refused, accepted, classes_of
from fedpipe_ray.frame import frame
from fedpipe_ray.message import KEPT, Message
from fedpipe_ray.methods.base import Method
from fedpipe_ray.model import Base
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, Run
from fedpipe_ray.site import Progress, Ready

from .connect import connect, disconnect, without_gpus
from .dispatch import Answer, Dispatch, taken
from .faults import Fault, decide, fault_of, too_slow
from .room import Room
from .workers import Call, Worker, Workers

log = logging.getLogger("fedpipe")

INLINE_BYTES = 32 * 2**10  # a message up to this goes along with every call, which is cheaper than the object store
SHOWN = 64  # edges in the live table; of a larger fleet those that are at work
Rest = tuple[int, Mapping[str, str]]  # the round before which a private state holds, its path and SHA-256


class RayFleet:
    """Edge servers as Ray actors. The same bits as SerialFleet on the same kind of CPU.

    Raises UserError at once if edges that must be there cannot be placed on the cluster. `close` ends the actors, and
    Ray if it was started here.
    """

    def __init__(self, run: Run, method: Method, private_dir: Path | None = None) -> None:
        try:
            self.owns_ray = connect(run.fleet.address, without_gpus(run))
        except ConnectionError as error:
            raise UserError(str(error)) from error
        self.run_settings, self.method, self.private_dir = run, method, private_dir
        self.workers = Workers(run, method, private_dir)
        self.dispatch = Dispatch(self.workers, run.fleet.start_timeout_seconds, self._may_move)
        self.room = Room(self.workers, run.fleet)
        self.classes: list[str] = []
        self.private: dict[str, Rest] = {}
        self.restoring: dict[str, Any] = {}  # edges whose private state is on its way to another worker
        self.kept: dict[str, tuple[dict[str, Any], Any]] = {}  # what each edge is to keep, and its reference
        self.opened = False
        try:
            self.room.find()
        except BaseException:
            self.close()
            raise

    @property
    def edges(self) -> Mapping[str, Profile]:
        """The profiles by name, of edges that have a worker now; those whose node is away are left out."""
        return self.room.present() if self.opened else self.run_settings.fleet.edges

    def open(self) -> list[Ready]:
        """Starts the actors and has each edge look at its own data and model. Raises EdgeError."""
        return_large_blocks()
        self.workers.fill()
        names = list(self.room.seated())
        if self.method.base != "none":
            facts: list[SourceFacts] = accepted(list(self._ask(names, "inspect").values()))
            self.classes = classes_of(self.run_settings, facts)
            self._load_parcel()
            self.workers.equip()
            ready: list[Ready] = accepted(list(self._ask(names, "prepare").values()))
        else:  # edges that have nothing to prepare are made when they are first asked
            heads = [name for pool, there in self.workers.pools.items() for name in pool.edges[: len(there)]]
            accepted(list(self._ask(heads, "prepare").values()))
            ready = [Ready(name, {}, "", "cpu") for name in names]
        self.opened = self.workers.warm = True
        return ready

    def run(self, orders: Mapping[str, Message], round: int) -> Iterator[Report | Lost]:
        """All edges at once; reports in the order of the orders, each with a reference to its update."""
        shared, own = split(orders)
        settings, dtype = self.run_settings.fleet, self.run_settings.wire.dtype
        everyone = put(Message(shared).to(dtype))
        kept = {name: self._kept(name, order) for name, order in orders.items()}
        fault = next((one for one in (everyone, *(k for part in kept.values() for k in part)) if is_fault(one)), None)
        if fault is not None:
            yield from (Lost(name, fault.reason) for name in orders)
            return

        def send(worker: Worker, name: str) -> Any:
            self._hand_over(worker, name)
            parts = (everyone, *kept[name], own[name].to(dtype))
            return worker.actor.attempt.options(num_returns=2).remote(name, round, *parts)

        limit = settings.round_timeout_seconds
        late = f"no report within fleet.round_timeout_seconds={limit or 0:g}"
        for call, answer in self.dispatch.run(orders, send, late, limit, settings.retries):
            report = self._outcome(call, answer, round)
            del answer
            yield report

    def evaluate(self, state: Message | None, split: str, answers: int = 0) -> dict[str, Metrics | Lost]:
        """Metrics of a state on every edge's own rows; the state is put once."""
        parts = [] if state is None else [*self._kept("", state), put(Message(state.rest, state.numbers))]
        fault = next(filter(is_fault, parts), None)
        if fault is not None:
            return {name: Lost(name, fault.reason) for name in self.edges}
        found = self._ask(list(self.edges), "evaluate", split, answers, *parts)
        return {
            name: Lost(name, answer.reason, answer.traceback) if isinstance(answer, Refused) else answer
            for name, answer in found.items()
        }

    def restore(self, round: int, private: Mapping[str, Mapping[str, str]]) -> None:
        """Has the edges take up the private states of a checkpoint, those that are away later. Raises EdgeError."""

        def send(worker: Worker, name: str) -> Any:
            return [worker.actor.restore.remote(name, round, private[name]["path"], private[name]["sha256"])]

        here = self.room.seated()
        found = self.dispatch.run([name for name in private if name in here], send)
        accepted([outcome(call.edge, answer) for call, answer in found])
        self.private |= {name: (round, rest) for name, rest in private.items()}

    def progress(self) -> dict[str, Progress]:
        """What every edge is doing right now; one whose worker does not answer within a second is `busy` or `gone`."""
        everyone = self.run_settings.fleet.edges
        all_shown = len(everyone) <= SHOWN
        there = self.room.seated() if self.opened and all_shown else {}
        result = {
            name: Progress("starting" if not self.opened else "busy" if name in there else "away")
            for name in (everyone if all_shown else ())
        }
        refs = {w.actor.progress.options(concurrency_group="watch").remote(): w for w in self.workers}
        done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=1.0) if refs else ([], [])
        for ref in done:
            try:
                found: dict[str, Progress] = ray.get(ref)
            except RayError:
                found = dict.fromkeys(refs[ref].pool.edges, Progress("gone")) if all_shown else {}
            idle = ("waiting", "ready", "done")
            result |= {name: now for name, now in found.items() if all_shown or now.status not in idle}
        return result

    def _kept(self, name: str, order: Message) -> list[Any]:
        """A reference to what stays with an edge, or a Fault; none if nothing does. Equal ones are put once a run."""
        tensors = order.kept
        if not tensors:
            return []
        there = [
            reference
            for known, reference in self.kept.values()
            if known.keys() == tensors.keys() and all(known[key] is tensors[key] for key in known)
        ]
        found = there[0] if there else put(Message({KEPT + key: tensor for key, tensor in tensors.items()}))
        if not is_fault(found):
            self.kept[name] = tensors, found
        return [found]

    def close(self) -> None:
        """Ends the actors, and Ray if it was started here."""
        self.workers.close()
        if self.owns_ray:
            disconnect()

    def _load_parcel(self) -> None:
        """Puts the model into the object store once if the driver is to ship it."""
        model = self.run_settings.model
        if self.method.base == "sent":  # its weights come with orders
            empty = frame(model, self.run_settings.data.task, self.classes).parcel()
            self.workers.equipment = (self.classes, ray.put(empty.files), ray.put(Message()))
            return
        ships = model.load == "driver" or (model.load == "auto" and model.name.startswith("builtin:"))
        files = weights = None
        if ships:
            parcel = Base.load(model, self.run_settings.data.task, self.classes, self.run_settings.seed).parcel()
            files, weights = ray.put(parcel.files), ray.put(parcel.weights)
        self.workers.equipment = (self.classes, files, weights)

    def _ask(self, names: Sequence[str], call: str, *arguments: Any) -> dict[str, Any]:
        """One answer an edge, or Refused; asked side by side."""

        def send(worker: Worker, name: str) -> Any:
            self._hand_over(worker, name)
            return [getattr(worker.actor, call).remote(name, *arguments)]

        settings = self.run_settings.fleet
        limit, retries = (None, settings.retries) if self.opened else (settings.start_timeout_seconds, 0)
        found = self.dispatch.run(names, send, too_slow(settings.start_timeout_seconds), limit, retries)
        answers = {call.edge: outcome(call.edge, answer) for call, answer in found}
        for name in list(self.restoring):
            self._say_if_fresh(name)
        return answers

    def _may_move(self, name: str) -> bool:
        """Only an edge that is known to have no private state may change its worker while that lives."""
        return self.private_dir is not None and name not in self.private

    def _hand_over(self, worker: Worker, name: str) -> None:
        """Has a worker that is new to an edge take up its private state first: by path, nothing passes through here."""
        if name in self.private and self.workers.homes.get(name) is not worker:
            round, rest = self.private[name]
            self.restoring[name] = worker.actor.restore.remote(name, round, rest["path"], rest["sha256"])

    def _outcome(self, call: Call, answer: Answer | Fault, round: int) -> Report | Lost:
        """The report of an edge, its update still elsewhere; or why there is none."""
        name = call.edge
        self._say_if_fresh(name)
        if isinstance(answer, Fault):
            return Lost(name, answer.reason, answer.traceback)
        report: Report | Lost = answer.value
        if isinstance(report, Report):
            report.fetch = partial(self._fetched, call, answer.beside[0], self.private.get(name))
            if report.private is not None:
                self.private[name] = (round + 1, report.private)
        return report

    def _say_if_fresh(self, name: str) -> None:
        """Warns if an edge is at another worker which could not take up its private state."""
        restored = self.restoring.pop(name, None)
        found = None if restored is None else outcome(name, taken([restored]))
        if isinstance(found, Refused):
            log.warning("edge %s starts with fresh private state: %s", name, found.reason)

    def _fetched(self, call: Call, update: Any, before: Rest | None) -> Message:
        """The update behind a reference: views on the object store. If it is gone, the edge does its round again."""
        try:
            message: Message = ray.get(update)
            return message
        except RayError as error:
            fault = fault_of(error)
            call.tries += 1
            if not decide(fault.kind, call.tries, call.retries).again:
                raise
        log.info("edge %s is tried again: %s", call.edge, fault.reason)
        after = self.private.pop(call.edge, None)
        if before is not None:
            self.private[call.edge] = before
        answer = self.dispatch.again(call)
        if after is not None:
            self.private[call.edge] = after
        bad = answer if isinstance(answer, Fault) else answer.value
        if isinstance(bad, Fault | Lost):
            raise RuntimeError(f"and could not be made again: {bad.reason}")
        return self._fetched(call, answer.beside[0], before)


def outcome(name: str, answer: Answer | Fault) -> Any:
    """What an edge answered, or Refused."""
    return Refused(name, answer.reason, answer.traceback) if isinstance(answer, Fault) else answer.value


def is_fault(answer: Any) -> bool:
    """Whether something is a Fault, and no reference."""
    return isinstance(answer, Fault)


def put(message: Message) -> Any:
    """A reference to `message` in the object store, or a Fault if that has no room; a small message as it is."""
    if message.total_bytes <= INLINE_BYTES:
        return message
    try:
        return ray.put(message)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        return fault_of(error)


def split(orders: Mapping[str, Message]) -> tuple[dict[str, Any], dict[str, Message]]:
    """(tensors that are the same object in every order, the rest of each order): what to put once, what to send.

    Without those that edges keep.
    """
    messages: Sequence[Message] = list(orders.values())
    first = messages[0].rest if messages else {}
    shared = {name: t for name, t in first.items() if all(m.tensors.get(name) is t for m in messages)}
    own = {
        edge: Message({k: t for k, t in message.rest.items() if k not in shared}, message.numbers, message.held)
        for edge, message in orders.items()
    }
    return shared, own
