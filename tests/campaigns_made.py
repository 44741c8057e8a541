"""Campaigns for tests: their files and plans, and executors whose trials have losses by formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import yaml

from fedpipe_ray.__main__ import loader
from fedpipe_ray.display import Display
from fedpipe_ray.settings import Run
from fedpipe_ray.trial import Event, SerialExecutor
from tuning.plan import Plan, load_plan
from tuning.tune import carry_out

QUIET = Display("none")


def campaign(run_file: Path, **changes: Any) -> Path:
    """A campaign file beside a run file."""
    tree = {
        "run": run_file.name,
        "search": {"local.lr": {"low": 1e-3, "high": 0.1, "log": True}, "method.rank": [2, 4]},
        "objectives": {"loss": "minimize"},
        "trials": 4,
        **changes,
    }
    path = run_file.with_name("campaign.yaml")
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def plan_of(run_file: Path, **changes: Any) -> Plan:
    return load_plan(campaign(run_file, **changes), [], loader)


def carried_out(plan: Plan, folder: Path, executor: Any = None) -> list[optuna.trial.FrozenTrial]:
    return list(carry_out(plan, folder, lambda: executor or SerialExecutor(), QUIET).trials)


def record(
    loss: float | None, seconds: float = 1.0, edges: dict[str, float] | None = None, up: int = 10
) -> dict[str, Any]:
    """A round's line as far as metrics read it."""
    return {
        "train_loss": loss, "bytes_up": up, "bytes_down": 2 * up, "wall_seconds": 0.1, "evaluate_seconds": 0.0,
        "virtual_seconds": seconds, "method": {"residual": 0.5},
        "eval": {"global": {"loss": loss}, "edges": {name: {"loss": value} for name, value in (edges or {}).items()}},
        "edges": {"a": {"steps": 3, "samples": 6, "tokens": 60, "flops": 1e6, "status": "ok",
                        "peak_memory_bytes": up, "training_memory_bytes": up, "bytes_up": up}},
    }  # fmt: skip


class Curves:
    """An executor whose trials have losses by formula: nothing is trained. asked: the runs that were submitted."""

    def __init__(self, losses: Any, breaks: Sequence[int] = ()) -> None:
        self.losses, self.breaks = losses, list(breaks)
        self.asked: list[int] = []
        self.rounds = 0
        self.queue: list[tuple[int, Any]] = []

    def submit(self, task: int, run: Run) -> None:
        self.asked.append(task)
        self.queue.append((task, iter(self.losses(run))))

    def next(self, timeout_seconds: float) -> Event | None:
        task, losses = self.queue[0]
        if task in self.breaks:
            self.breaks.remove(task)
            self.queue.pop(0)
            return Event(task, "broken", reason="its worker died")
        try:
            loss = next(losses)
        except StopIteration:
            self.queue.pop(0)
            return Event(task, "done")
        self.rounds += 1
        return Event(task, "round", record(loss))

    def cancel(self, task: int) -> None:
        self.queue = [entry for entry in self.queue if entry[0] != task]

    def close(self) -> None:
        self.queue.clear()


def by_rate(run: Run) -> list[float]:
    """Losses that fall to |log10(lr) + 2|: the best rate is 0.01."""
    least = abs(math.log10(run.local.lr) + 2)
    return [least + 1 / (n + 1) for n in range(run.rounds)]


class Stops(Curves):
    """Its driver goes away at the event after so many."""

    def __init__(self, losses: Any, events: int) -> None:
        super().__init__(losses)
        self.events = events

    def next(self, timeout_seconds: float) -> Event | None:
        self.events -= 1
        if self.events < 0:
            raise KeyboardInterrupt
        return super().next(timeout_seconds)
