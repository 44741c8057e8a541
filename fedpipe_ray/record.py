"""The run folder: what a run leaves behind, written so that a crash at any moment leaves it usable."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from .buffered import flights_loaded, flights_saved
from .config import load_run, to_yaml, training_hash
from .errors import UserError
from .files import read_lines, write_atomically
from .held import grouped, ungrouped
from .loop import Round, Start
from .message import Message
from .remote import RemoteFolder, is_url, local
from .report import Lost
from .server_optimizer import apart, together
from .settings import Run

log = logging.getLogger("fedpipe")
FORMAT = 1


@dataclass
class Checkpoint:
    """Everything a run needs to go on. history: {round, loss} of every evaluation; base: metrics before round 1."""

    start: Start
    config_hash: str
    fingerprints: dict[str, str]
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    base: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    totals: dict[str, float] = field(default_factory=dict)


class RunFolder:
    """One run's folder, locked while in use. Its files are described in docs/run-folder.md.

    path: where they are on this disk; of a folder under a URL, the working folder whose copy lies there. name: the path
    or the URL, as a user would type it.
    """

    def __init__(self, path: Path, remote: RemoteFolder | None = None) -> None:
        self.path, self.remote, self.name = path, remote, remote.url if remote else str(path)
        self._lock: IO[str] | None = None

    @classmethod
    def check_free(cls, place: Path | str) -> None:
        """Raises UserError if `place` holds something already or cannot be made; writes nothing."""
        if is_url(place):
            return RemoteFolder(str(place)).check_free()
        path = local(place)
        if (path / "config.yaml").exists():
            raise UserError(f"{path} holds another run; `fedpipe resume {path}`, or give another folder with --out")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; give a new folder with --out")
        if path.is_dir() and any(entry.name != ".lock" for entry in path.iterdir()):
            raise UserError(f"{path} is not empty; give a new folder with --out")
        parent = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
            fault = "not writable" if parent.is_dir() else "a file"
            raise UserError(f"cannot write to {path}: {parent} is {fault}; give another folder with --out")
        return None

    @classmethod
    def create(cls, place: Path | str, run: Run) -> RunFolder:
        """A new run's folder. Raises UserError if it cannot be written or holds something already."""
        cls.check_free(place)
        remote = RemoteFolder(str(place)) if is_url(place) else None
        path = remote.make_here() if remote else local(place)
        folder = cls(path, remote)
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder.lock()
            write_atomically(path / "environment.json", dumps(environment(run)))
            write_atomically(path / "config.yaml", to_yaml(run))
        except (OSError, UserError) as error:
            folder.close()
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"cannot write to {path}: {error.strerror or error}; give another folder with --out"
            ) from None
        return folder

    @classmethod
    def open(cls, place: Path | str) -> RunFolder:
        """An existing run's folder. Raises UserError if it is none."""
        if is_url(place):
            remote = RemoteFolder(str(place))
            return cls(remote.open(), remote)
        path = local(place)
        if not (path / "config.yaml").is_file():
            raise UserError(f"{path} is not a run folder: it has no config.yaml")
        return cls(path)

    def lock(self) -> None:
        """Keeps every other process out until this one ends. Raises UserError if one is in.

        Under a URL, where a head that died cannot let go, a process in there is put out instead.
        """
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(
                f"{self.path} is in use by a run in progress; wait for it, or give another folder"
            ) from None
        if self.remote is not None:
            self.remote.claim()
            self.remote.pull()  # what the process before may have written until now

    def close(self) -> None:
        """Lets other processes in again; under a URL, writes the end of the log there."""
        if self._lock is not None:
            self._lock.close()
        if self.remote is not None:
            self.remote.close()

    def discard_if_not_begun(self) -> None:
        """Removes the folder again if the run ended before its first checkpoint: nothing half-written stays."""
        if not (self.path / "checkpoint").exists():
            shutil.rmtree(self.path, ignore_errors=True)

    def rewrite_config(self, run: Run) -> None:
        """Replaces config.yaml by that of an extended run."""
        write_atomically(self.path / "config.yaml", to_yaml(run))

    def run(self, overrides: Sequence[str] = ()) -> Run:
        """The run's configuration, with overrides. Raises UserError."""
        return load_run(self.path / "config.yaml", overrides, lambda name, _: {})

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line to rounds.jsonl."""
        with (self.path / "rounds.jsonl").open("a") as file:
            file.write(json.dumps(finite(record)) + "\n")

    def rounds(self) -> list[dict[str, Any]]:
        """The lines of rounds.jsonl."""
        return read_lines(self.path / "rounds.jsonl")

    def rewind(self, rounds: int) -> None:
        """Drops the lines of rounds after the first `rounds`, which will be run again."""
        kept = [record for record in self.rounds() if record["round"] <= rounds]
        write_atomically(self.path / "rounds.jsonl", "".join(json.dumps(record) + "\n" for record in kept))

    def save_checkpoint(self, point: Checkpoint) -> None:
        """Writes checkpoint/round-NNNN beside its name and renames it; the last two stay. Raises OSError.

        Under a URL everything else that changed is written too, and then the checkpoint. Raises UserError if it cannot.
        """
        parent = self.path / "checkpoint"
        name = f"round-{point.start.round:04d}"
        aside, final = parent / f".{name}", parent / name
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        manifest = {one.name: getattr(point, one.name) for one in fields(point) if one.name != "start"}
        digest = together(point.start.state, point.start.moments).save(aside / "state.safetensors")
        manifest |= {
            "format": FORMAT,
            "round": point.start.round,
            "state_sha256": digest,
            "private": dict(point.start.private),
            "clock_seconds": point.start.clock_seconds,
            "flights": flights_saved(point.start, aside),
            "held": grouped(point.start.held),
        }
        write_atomically(aside / "manifest.json", dumps(manifest))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        for old in outdated(entry.name for entry in parent.iterdir()):
            shutil.rmtree(parent / old) if (parent / old).is_dir() else (parent / old).unlink()
        if self.remote is not None:
            self.remote.warn_of_private(point.start.private)
            self.publish()

    def save_best(self, state: Message, round: int) -> dict[str, Any]:
        """Writes the best state so far; returns what the manifest remembers of it."""
        name = f"best-{round:04d}.safetensors"
        digest = state.save(self.path / "checkpoint" / name)
        return {"round": round, "file": name, "sha256": digest}

    def load_best(self, best: Mapping[str, Any]) -> Message:
        """The best state of a manifest. Raises UserError if it is gone or damaged."""
        try:
            return Message.load(self._here(f"checkpoint/{best['file']}"), best["sha256"])
        except (OSError, ValueError) as error:
            raise UserError(f"the best round's state cannot be read: {error}") from None

    def load_checkpoint(self) -> Checkpoint:
        """The newest checkpoint that is whole; a damaged one is named in the log. Raises UserError if there is none."""
        here = {place.name for place in (self.path / "checkpoint").glob("round-*")}
        found = sorted({*here, *self.remote.checkpoints()} if self.remote else here, reverse=True)
        for name in found:
            try:
                for file in ("manifest.json", "state.safetensors"):
                    self._here(f"checkpoint/{name}/{file}")
                return _read_checkpoint(self.path / "checkpoint" / name)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                log.warning("checkpoint %s is damaged (%s); trying the one before", name, error)
        raise UserError(
            f"{self.name} has no usable checkpoint ({len(found)} found); start the run again with --out NEW"
        )

    def _here(self, name: str) -> Path:
        """The path of a file that may have to be brought here first. Raises OSError."""
        path = self.path / name
        return path if self.remote is None or path.exists() else self.remote.fetch(name)

    def final_state(self, run: Run) -> tuple[Message, Checkpoint]:
        """What the run would export now: the best or the last state, and its checkpoint. Raises UserError."""
        point = self.load_checkpoint()
        if run.evaluate.keep == "best" and point.best is not None:
            return self.load_best(point.best), point
        return point.start.state, point

    def complete(self, rounds: int) -> bool:
        """Whether summary.json says that the run ended by itself after so many rounds."""
        try:
            summary = json.loads((self.path / "summary.json").read_text())
            return summary["status"] in ("finished", "stopped_early") and summary["rounds"] == rounds
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json; under a URL, the adapter first."""
        write_atomically(self.path / "summary.json", dumps(summary))
        self.publish()

    def publish(self) -> None:
        """Under a URL, writes there what has changed here. Raises UserError if it cannot."""
        if self.remote is not None:
            self.remote.publish(outdated)


def outdated(names: Iterable[str]) -> list[str]:
    """What of a checkpoint folder is no longer needed: all but the last two rounds, and the last three best states."""
    names = sorted(names)
    rounds, best = ([name for name in names if name.startswith(kind)] for kind in ("round-", "best-"))
    return rounds[:-2] + best[:-3]


def _read_checkpoint(place: Path) -> Checkpoint:
    manifest = json.loads((place / "manifest.json").read_text())
    if manifest.pop("format") != FORMAT:
        raise ValueError("it has another format")
    state, moments = apart(Message.load(place / "state.safetensors", manifest.pop("state_sha256")))
    flights, clock = flights_loaded(manifest.pop("flights", []), place), manifest.pop("clock_seconds", 0.0)
    held = ungrouped(manifest.pop("held", []))
    start = Start(state, manifest.pop("round"), manifest.pop("private"), clock, flights, held, moments)
    return Checkpoint(start=start, **manifest)


def round_record(done: Round) -> dict[str, Any]:
    """The line of rounds.jsonl for one round; `round` counts from 1."""
    edges: dict[str, Any] = {}
    for name, outcome in done.outcomes.items():
        cost = outcome.cost
        edges[name] = {
            "status": outcome.status if isinstance(outcome, Lost) else "ok",
            "reason": outcome.reason if isinstance(outcome, Lost) else None,
            "train_loss": None if isinstance(outcome, Lost) else outcome.train_loss,
            "staleness": None if isinstance(outcome, Lost) else done.number - outcome.base_round,
            "samples": cost.samples, "steps": cost.steps, "tokens": cost.tokens, "flops": cost.flops,
            "seconds": cost.seconds, "step_seconds": cost.step_seconds, "virtual_seconds": cost.virtual_seconds,
            "peak_memory_bytes": cost.peak_memory_bytes, "training_memory_bytes": cost.training_memory_bytes,
            "bytes_up": cost.bytes_up, "bytes_down": cost.bytes_down, "started_seconds": done.started.get(name),
        }  # fmt: skip
    awaited = [one for one in done.outcomes.values() if not (isinstance(one, Lost) and one.status == "late")]
    slowest = max(awaited, key=lambda outcome: outcome.cost.virtual_seconds, default=None)
    return {
        "round": done.number + 1,
        "train_loss": done.train_loss,
        "eval": {"split": "validation", "global": done.quality, "edges": dict(done.evaluation)},
        "bytes_up": done.bytes_up,
        "bytes_down": done.bytes_down,
        "wall_seconds": done.wall_seconds,
        "evaluate_seconds": done.evaluate_seconds,
        "virtual_seconds": done.virtual_seconds,
        "slowest_edge": slowest.edge if slowest else None,
        "method": {name: value for name, value in done.state.numbers.items() if "/" not in name},
        "edges": edges,
    }


def environment(run: Run) -> dict[str, Any]:
    """What the bits of a result depend on: versions, CPU capability, threads, GPUs."""
    import torch

    packages = ("torch", "transformers", "peft", "ray", "bitsandbytes", "pyarrow", "numpy", "safetensors", "tokenizers")
    versions: dict[str, str | None] = {}
    for name in (*packages, "fedpipe-ray"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(), "platform": platform.platform(), "machine": platform.machine(),
        "cpus": os.cpu_count(), "cpu_capability": torch.backends.cpu.get_cpu_capability(), "gpus": gpus,
        "threads": run.local.threads, "packages": versions, "config_hash": training_hash(run), "command": sys.argv,
    }  # fmt: skip


def environment_changes(folder: RunFolder, run: Run) -> list[str]:
    """What differs now from the environment a run began in and may change its bits."""
    try:
        before = json.loads((folder.path / "environment.json").read_text())
    except (OSError, ValueError):
        return ["environment.json is missing or damaged"]
    now = environment(run)
    changes = [
        f"{key}: {before.get(key)} -> {now[key]}"
        for key in ("cpu_capability", "threads", "gpus", "python")
        if before.get(key) != now[key]
    ]
    then = before.get("packages", {})
    return changes + [f"{p}: {then.get(p)} -> {v}" for p, v in now["packages"].items() if then.get(p) != v]


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as null, which JSON has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def dumps(value: Mapping[str, Any]) -> str:
    """Readable JSON, without NaN."""
    return json.dumps(finite(value), indent=2) + "\n"
