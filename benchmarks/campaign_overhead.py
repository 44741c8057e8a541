"""What does a campaign cost beside its trials' rounds, what do trials side by side gain, and what does pruning spare?

    python -m benchmarks.campaign_overhead [overhead] [side_by_side] [pruning] [--small] [--seeds 0,1,2]

Targets: under 100 ms a trial with warm workers; four trials on two cores in at most 1.15 x half the time of the four
one after another, one thread each; at least 40 % of the rounds spared at no worse best loss, three seeds. --small: the
quickstart's model and method with three edges, 6 steps of 4 short rows and 24 rows an evaluation, for slow machines.
Both arms of `pruning` share the rounds that they have in common, which are computed once; those that are done stay in
results/campaign_pruning.jsonl, so that it goes on where it was stopped (remove the file to measure anew). `overhead`
and `side_by_side` leave the first trial of each worker out: it imports and loads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.table import RESULTS, publish
from fedpipe_ray.__main__ import loader
from fedpipe_ray.display import Display
from fedpipe_ray.fleet import Kept
from fedpipe_ray.settings import Run
from fedpipe_ray.trial import Event, Executor, Record, SerialExecutor, advanced, kept_fleet, records_of
from tuning.plan import Plan, load_plan
from tuning.study import best_of
from tuning.tune import carry_out
from tuning.watch import rounds_spent

FILE = Path(__file__).parent.parent / "examples" / "campaign.yaml"
ROUNDS_DONE = RESULTS / "campaign_pruning.jsonl"
SMALL = {
    "local.steps": 6, "local.batch": 4, "data.max_length": 48, "data.limit": 400, "evaluate.rows": 24,
    "fleet.profiles": None, "fleet.ray": False,
    "fleet.edges": {name: {"data": f"builtin:docstrings/{name}"} for name in ("numpy", "scipy", "pandas")},
}  # fmt: skip


def plan_of(small: bool, **changes: Any) -> Plan:
    """The example campaign, with keys of its file changed."""
    settings = {"set": SMALL} if small else {}
    overrides = [f"{key}={value!r}" if isinstance(value, str) else f"{key}={json.dumps(value)}" for key, value in
                 {**settings, **changes}.items()]  # fmt: skip
    return load_plan(FILE, overrides, loader)


def short(record: Record) -> Record:
    """A round's record without its edges, which neither the objective nor the constraint looks at."""
    return {**record, "edges": {}, "eval": {"global": record["eval"]["global"], "edges": {}}}


class Remembered:
    """An executor in this process that computes no round of a point twice, nor one that stands in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.curves: dict[str, list[Record]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            point, record = json.loads(line)
            self.curves.setdefault(point, []).append(record)
        self._open = kept_fleet(Kept())
        self._queue: list[tuple[int, Iterator[Record]]] = []

    def submit(self, task: int, run: Run) -> None:
        """Queues a run."""
        self._queue.append((task, self._records(run)))

    def _records(self, run: Run) -> Iterator[Record]:
        settings = (run.local, run.method, run.data, run.fleet, run.evaluate, run.seed)
        point = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
        known = self.curves.setdefault(point, [])
        yield from list(known)
        if len(known) < run.rounds:
            for number, record in enumerate(records_of(run, self._open)):
                if number >= len(known):
                    known.append(short(record))
                    with self.path.open("a") as file:
                        file.write(json.dumps([point, known[-1]]) + "\n")
                    yield known[-1]

    def next(self, timeout_seconds: float) -> Event | None:
        """The next round of the oldest task, or its end."""
        event = advanced(*self._queue[0]) if self._queue else None
        if event is not None and event.kind != "round":
            self._queue.pop(0)
        return event

    def cancel(self, task: int) -> None:
        """Ends a task."""
        self._queue = [entry for entry in self._queue if entry[0] != task]

    def close(self) -> None:
        """Nothing to end."""


def pruning(small: bool, seeds: Sequence[int]) -> None:
    """Rounds and best loss with and without the pruner. Every seed is published as it ends."""
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        row: dict[str, Any] = {"seed": seed}
        for pruner in ("none", "hyperband"):
            plan = plan_of(small, pruner=pruner, seed=seed, parallel=1)
            with tempfile.TemporaryDirectory() as folder:
                study = carry_out(plan, Path(folder), lambda: Remembered(ROUNDS_DONE), Display("none"))
                trials = study.get_trials()
            spent, _ = rounds_spent(trials, plan)
            row |= {f"{pruner}: rounds": spent, f"{pruner}: best loss": best_of(trials, plan.ways)[0].values[0]}
        row["spared"] = 1 - row["hyperband: rounds"] / row["none: rounds"]
        rows.append(row)
        publish(
            f"campaign_pruning{'_small' if small else ''}",
            "What does pruning spare, and what does it cost?",
            rows,
            small=small,
        )


def overhead(small: bool) -> None:
    """Milliseconds a trial beside its own rounds, one worker, trials of one round."""
    rows = []
    for kind in ("in this process", "Ray worker"):
        plan = plan_of(small, set={**(SMALL if small else {}), "rounds": 1}, trials=12, parallel=1, pruner="none")
        rows.append({"where": kind, **_beside(plan, _executor(kind, plan, 1))})
    publish("campaign_overhead", "What does a campaign cost a trial beside its rounds?", rows, small=small)


def _executor(kind: str, plan: Plan, parallel: int) -> Callable[[], Executor]:
    if kind == "in this process":
        return SerialExecutor
    from actors.connect import set_environment

    set_environment(None)  # before anything imports ray
    from actors.pool import TrialPool

    return lambda: TrialPool(plan.base, parallel, own_fleet=False)


class Timed:
    """Passes on to another executor, and notes when each task ended and how long its rounds took."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.ends: list[tuple[int, float]] = []
        self.rounds: dict[int, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def next(self, timeout_seconds: float) -> Event | None:
        """As the other's."""
        event = self.inner.next(timeout_seconds)
        if event is not None and event.kind == "round":
            spent = event.record["wall_seconds"] + event.record["evaluate_seconds"]
            self.rounds[event.task] = self.rounds.get(event.task, 0.0) + spent
        elif event is not None:
            self.ends.append((event.task, time.perf_counter()))
        return event


def _beside(plan: Plan, make: Callable[[], Executor]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        timed = Timed(make())
        carry_out(plan, Path(folder), lambda: timed, Display("none"))
    gaps = []
    for (_, before), (task, after) in zip(timed.ends, timed.ends[1:]):
        gaps.append(1000 * (after - before - timed.rounds[task]))
    gaps.sort()
    return {"trials": len(gaps), "median ms": gaps[len(gaps) // 2], "largest ms": gaps[-1]}


def side_by_side(small: bool) -> None:
    """Four trials of two workers against one; the workers are warm."""
    seconds = {}
    for workers in (1, 2):
        plan = plan_of(small, trials=4)
        executor = _executor("Ray worker", plan, workers)()
        for measured in (False, True):
            began = time.perf_counter()
            for task in range(4 if measured else workers):
                executor.submit(task, plan.base)
            left = 4 if measured else workers
            while left:
                event = executor.next(600)
                left -= event is not None and event.kind != "round"
            seconds[workers] = time.perf_counter() - began
        executor.close()
    row = {"one after another": seconds[1], "two at once": seconds[2], "of half": 2 * seconds[2] / seconds[1]}
    publish("campaign_side_by_side", "What do trials side by side gain?", [row], small=small)


def main() -> None:
    """The named questions, or all."""
    options: argparse.Namespace
    questions = {
        "overhead": lambda: overhead(options.small), "side_by_side": lambda: side_by_side(options.small),
        "pruning": lambda: pruning(options.small, [int(seed) for seed in options.seeds.split(",")]),
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", help=f"of {', '.join(questions)}; default: all")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seeds", default="0,1,2", help="of pruning")
    options = parser.parse_args()
    if unknown := set(options.questions) - set(questions):
        parser.error(f"{', '.join(sorted(unknown))}: no such question; there are {', '.join(questions)}")
    for name in options.questions or list(questions):
        questions[name]()


if __name__ == "__main__":
    main()
