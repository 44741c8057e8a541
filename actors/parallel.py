"""An edge with several GPUs: one process a GPU, kept for the whole run by Ray Train's TorchTrainer.

The edge's actor computes nothing. It posts each call of the fleet; the processes fetch it, carry it out on a Site of
their own with the same generator, average their gradients (fedpipe_ray/train.py), and the first one's answer is the
edge's. The group is started once, for a start costs what that of any edge costs, imports and loading, and more: too
much for every round.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group
from torch import distributed

from fedpipe_ray.data import SourceFacts
from fedpipe_ray.evaluate import Metrics
from fedpipe_ray.fleet import Refused
from fedpipe_ray.message import Message
from fedpipe_ray.methods.base import Method
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, Run
from fedpipe_ray.site import Progress, Ready
from fedpipe_ray.train import process_group

from .edge import EdgeActor
from .placement import processes

LASTING = ("equip", "prepare", "restore")  # what a new group does over again
EVERYWHERE = (*LASTING, "attempt")  # what all processes do; the rest is asked of the first alone
WAIT_SECONDS = 5.0  # a process that is gone frees its thread of the actor after this
PROGRESS_SECONDS = 0.5
END_SECONDS = 15.0  # for Ray Train to end a group that has nothing more to do: it looks every other second
RESTARTS = 3  # of a group; then the call at hand fails, and the next one starts another group


@dataclass
class Call:
    """One call of the fleet. answers: by rank, of the group that is at it"""

    number: int
    name: str
    arguments: tuple[Any, ...]
    answers: dict[int, Any] = field(default_factory=dict)
    answer: Any = None
    done: threading.Event = field(default_factory=threading.Event)


class ParallelEdge:
    """One edge server of several processes; answers the calls of EdgeActor."""

    def __init__(self, settings: tuple[Run, Method], private_dir: str | None, name: str, alone: bool = True) -> None:
        self.name, self.profile = name, settings[0].fleet.edges[name]
        self.changed = threading.Condition()
        self.setup: dict[str, tuple[Any, ...]] = {}  # what a new group does first: equip, prepare, then restore
        self.pending: Call | None = None
        self.number, self.group, self.failure, self.latest = 0, "", "", {name: Progress()}
        self.given = {"name": name, "settings": settings, "private_dir": private_dir}
        self.thread: threading.Thread | None = None
        self.ending = False

    # -- called by the fleet, one after another

    def equip(
        self, classes: Sequence[str], files: Mapping[str, bytes] | None, weights: Message | None, first: str | None
    ) -> None:
        """What every process needs; the driver's parcel lies once in the node's store."""
        self._ask("equip", classes, files, None if weights is None else [ray.put(weights)], first)

    def inspect(self, name: str) -> SourceFacts | Refused:
        """Whether this edge's source can be read, and its labels."""
        answer: SourceFacts | Refused = self._ask("inspect", name)
        return answer

    def prepare(self, name: str) -> Ready | Refused:
        """Loads model and rows in every process."""
        answer: Ready | Refused = self._ask("prepare", name)
        return answer

    def attempt(self, name: str, round: int, *parts: Message) -> tuple[Report | Lost, Message | None]:
        """One round of the whole group."""
        answer = self._ask("attempt", name, round, *parts)
        if isinstance(answer, Refused):
            return Lost(self.name, answer.reason, answer.traceback), None
        report: Report | Lost = answer[0]
        if isinstance(report, Report) and report.private is not None:
            self.setup["restore"] = (name, round + 1, report.private["path"], report.private["sha256"])
        return report, answer[1]

    def evaluate(self, name: str, split: str, answers: int, *parts: Message) -> Metrics | Refused:
        """Metrics of a state on this edge's own rows, by the first process."""
        answer: Metrics | Refused = self._ask("evaluate", name, split, answers, *parts)
        return answer

    def restore(self, name: str, round: int, path: str, sha256: str) -> Refused | None:
        """Takes up the private state of a checkpoint in every process."""
        answer: Refused | None = self._ask("restore", name, round, path, sha256)
        return answer

    def progress(self) -> dict[str, Progress]:
        """What the first process last said of itself."""
        return self.latest

    def end(self) -> None:
        """Ends the processes in good order, so that Ray Train gives back what they reserved."""
        if self.thread is None:
            return
        with self.changed:
            self.ending = True
            self.changed.notify_all()
        self.thread.join(END_SECONDS)

    # -- called by the processes

    def begin(self, group: str) -> list[tuple[str, tuple[Any, ...]]]:
        """What a new process of a group does before anything else; nobody waits for its answers."""
        with self.changed:
            if group != self.group:
                self.group, call = group, self.pending
                if call is not None:
                    call.answers.clear()
        return list(self.setup.items())

    def next_call(self, after: int) -> tuple[int, str, tuple[Any, ...]] | None:
        """The call after number `after`, once there is one; None: ask again."""
        with self.changed:
            if not self.ending and (self.pending is None or self.pending.number <= after):
                self.changed.wait(WAIT_SECONDS)
            if self.ending:
                return after, "end", ()
            call = self.pending
            return None if call is None or call.number <= after else (call.number, call.name, call.arguments)

    def answered(self, group: str, rank: int, number: int, answer: Any, final: bool) -> None:
        """One process's answer. The first one's counts once all have theirs; a `final` one counts at once."""
        with self.changed:
            call = self.pending
            if call is None or call.number != number or group != self.group:
                return
            call.answers[rank] = answer
            if final or len(call.answers) == processes(self.profile):
                self._settle(call, answer if final else call.answers[0])

    def note(self, progress: dict[str, Progress]) -> None:
        """Where the first process is."""
        self.latest = progress

    # -- inside

    def _ask(self, name: str, *arguments: Any) -> Any:
        """The group's answer to a call; Refused if there is no group to give one."""
        if self.thread is None or not self.thread.is_alive():
            me = ray.get_runtime_context().current_actor
            self.thread = threading.Thread(target=self._keep_group, args=(me,), daemon=True)
            self.thread.start()
        with self.changed:
            self.number += 1
            call = self.pending = Call(self.number, name, arguments)
            self.changed.notify_all()
        while not call.done.wait(WAIT_SECONDS):
            if not self.thread.is_alive():
                self._settle(call, Refused(self.name, f"its processes could not be kept: {self.failure}"))
        if name in LASTING and not isinstance(call.answer, Refused):
            self.setup[name] = arguments
        return call.answer

    def _settle(self, call: Call, answer: Any) -> None:
        self.pending, call.answer = None, answer
        call.done.set()

    def _keep_group(self, me: Any) -> None:
        """Runs the group until this actor ends; Ray Train replaces it when a process fails."""
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # or relative paths of rows and models would lead elsewhere
        os.environ["RAY_TRAIN_METRICS_ENABLED"] = "0"
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        place = tempfile.mkdtemp(prefix="fedpipe-train-")  # Ray Train wants one; nothing is kept in it
        try:
            TorchTrainer(
                serve,
                train_loop_config={**self.given, "edge": me},
                scaling_config=ScalingConfig(**scaling(self.profile, ray.get_runtime_context().get_node_id())),
                run_config=RunConfig(
                    name=self.name, storage_path=place, failure_config=FailureConfig(max_failures=RESTARTS)
                ),
                torch_config=TorchConfig(backend="nccl" if self.profile.gpus else "gloo"),
            ).fit()  # fmt: skip
        except Exception as error:  # whatever ends the group is told by the next call
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            shutil.rmtree(place, ignore_errors=True)


def serve(given: dict[str, Any]) -> None:
    """What a process of the group does: it carries out the edge's calls until the edge is gone."""
    rank, _ = process_group()
    edge, tokens = given["edge"], [secrets.token_hex(8)]
    distributed.broadcast_object_list(tokens)  # names this group; an answer of the one before it does not count
    own = EdgeActor(given["settings"], given["private_dir"] if rank == 0 else None, given["name"])
    if rank == 0:
        if group := get_current_placement_group():
            _internal_kv_put(reserved_key(edge), group.id.binary())
        threading.Thread(target=tell, args=(own, edge), daemon=True).start()
    for name, arguments in ray.get(inside(edge.begin, tokens[0])):
        carry_out(own, name, arguments)
    number = 0
    while True:
        call = ray.get(inside(edge.next_call, number))
        if call is None:
            continue
        number, name, arguments = call
        if name == "end":
            return
        if rank and name not in EVERYWHERE:
            ray.get(inside(edge.answered, tokens[0], rank, number, None, False))
            continue
        answer = carry_out(own, name, arguments)
        lost = answer[0] if name == "attempt" and isinstance(answer[0], Lost) else None
        broken = lost is not None and not lost.reason.startswith("diverged")  # all processes see the same divergence
        if rank and name == "attempt":
            answer = (answer[0], None)  # one update is enough
        ray.get(inside(edge.answered, tokens[0], rank, number, answer, broken or isinstance(answer, Refused)))
        del answer
        if lost is not None and broken:  # the others may wait for this process in a sum that it left
            raise RuntimeError(f"edge {given['name']}, process {rank}: {lost.reason}")


def reserved_key(edge: Any) -> bytes:
    """Where in Ray's own table the processes of an edge's actor note their placement group."""
    return f"fedpipe-processes-{edge._actor_id.hex()}".encode()


def release(edge: Any) -> None:
    """Gives back what the processes of an edge's actor reserved that was killed.

    Ray Train does so by itself only where Ray's dashboard runs, and Ray when the whole job ends.
    """
    with suppress(RayError, ValueError, RuntimeError):
        if group := _internal_kv_get(reserved_key(edge)):
            _internal_kv_del(reserved_key(edge))
            remove_placement_group(PlacementGroup(PlacementGroupID(group)))


def inside(method: Any, *arguments: Any) -> Any:
    """A call of a process at its edge's actor, on threads that the fleet's own calls do not take."""
    return method.options(concurrency_group="inside").remote(*arguments)


def carry_out(own: EdgeActor, name: str, arguments: tuple[Any, ...]) -> Any:
    """A call on this process's own edge; references stand for what lies in the store."""
    return getattr(own, name)(*(ray.get(a[0]) if is_reference(a) else a for a in arguments))


def is_reference(argument: Any) -> bool:
    """Whether an argument is a boxed reference, as `prepare` sends the model."""
    return isinstance(argument, list) and len(argument) == 1 and isinstance(argument[0], ray.ObjectRef)


def tell(own: EdgeActor, edge: Any) -> None:
    """Has the edge's actor know where this process is, for the live table."""
    while True:
        inside(edge.note, own.progress())
        time.sleep(PROGRESS_SECONDS)


def scaling(profile: Profile, node_id: str) -> dict[str, Any]:
    """Arguments of Ray Train's ScalingConfig: an edge's demand in equal parts on its node."""
    count = processes(profile)
    parts = {"CPU": profile.cpus, "GPU": profile.gpus, "memory": float(profile.memory_bytes or 0), **profile.resources}
    return {
        "num_workers": count,
        "use_gpu": profile.gpus > 0,
        "resources_per_worker": {key: part for key, amount in parts.items() if (part := share(amount, count)) > 0},
        "placement_strategy": "STRICT_PACK",
        "label_selector": {"ray.io/node-id": node_id},
    }


def share(amount: float, count: int) -> float:
    """One of `count` equal parts, in the steps of 0.0001 that Ray counts in, rounded down so that all fit."""
    return math.floor(amount / count * 1e4 + 1e-6) / 1e4


def actor_kind(profile: Profile, options: Mapping[str, Any]) -> tuple[type, dict[str, int], dict[str, Any]]:
    """(class, threads by concurrency group, options) of an edge's actor, from the options of an edge in one process.

    The fleet's calls follow one another; `watch` answers `progress` meanwhile. The actor of several processes reserves
    nothing: they do. It answers each of them, and those that a failed group left waiting, on the threads `inside`.
    """
    count = processes(profile)
    if count == 1:
        return EdgeActor, {"watch": 1}, dict(options)
    # Ray Train has four actors of its own, which would each preload what an edge needs.
    bare = {"env_vars": {"RAY_preload_python_modules": ""}}
    return ParallelEdge, {"watch": 1, "inside": 3 * count + 3}, {"num_cpus": 0, "num_gpus": 0, "runtime_env": bare}
