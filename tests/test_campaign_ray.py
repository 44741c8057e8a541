"""Campaigns on Ray: warm workers side by side, fleets of their own, a worker that dies, and the same bits as serial."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray
from campaigns_made import QUIET, plan_of
from optuna.trial import TrialState

from actors.pool import TrialPool
from fedpipe_ray.trial import Event, SerialExecutor
from tuning.campaign import Driver
from tuning.plan import Plan
from tuning.tune import carry_out, study_of

pytestmark = [pytest.mark.usefixtures("ray_here"), pytest.mark.services]


def pool(plan: Plan) -> TrialPool:
    return TrialPool(plan.base, plan.settings.parallel, plan.settings.fleet == "own")


def losses(plan: Plan, folder: Path, executor: Any) -> dict[str, Any]:
    """Value by point."""
    trials = carry_out(plan, folder, lambda: executor, QUIET).trials
    assert all(trial.state == TrialState.COMPLETE for trial in trials)
    return {str(trial.params): trial.value for trial in trials}


POINTS = [{"local.lr": rate, "method.rank": rank} for rate, rank in ((0.01, 2), (0.03, 4), (0.05, 2))]


@pytest.mark.parametrize("fleet", ["shared", "own"])
def test_side_by_side_as_one_after_another(run_file: Path, tmp_path: Path, fleet: str) -> None:
    settings: dict[str, Any] = {"trials": 3, "enqueue": POINTS, "pruner": "none", "fleet": fleet}
    alone = losses(plan_of(run_file, **settings), tmp_path / "serial", SerialExecutor())
    plan = plan_of(run_file, **settings, parallel=2)
    assert losses(plan, tmp_path / "ray", pool(plan)) == alone
    assert len(alone) == 3


def test_workers_are_there_while_there_is_something_to_do(run_file: Path) -> None:
    """Two workers for three runs; one ends when the queue is empty, and the other when all is done."""
    plan = plan_of(run_file, parallel=2)
    executor = TrialPool(plan.base, 2, own_fleet=False)
    for task in range(3):
        executor.submit(task, plan.base)
    seen: list[Event] = []
    most = 0
    while sum(event.kind == "done" for event in seen) < 3:
        event = executor.next(60)
        assert event is not None
        assert event.kind in ("round", "done"), event
        seen.append(event)
        most = max(most, executor.workers)
    assert most == 2
    assert executor.next(0) is None
    assert executor.workers == 0
    assert sorted(event.task for event in seen if event.kind == "round") == [0, 0, 1, 1, 2, 2]
    executor.close()


def test_fleets_that_do_not_fit_beside_one_another_take_turns(run_file: Path) -> None:
    """One edge needs nearly all CPUs: the second trial has no coordinator until the first ended."""
    plan = plan_of(run_file, set={"fleet.ray": True, "fleet.edges.a.cpus": ray.cluster_resources()["CPU"] - 0.5})
    executor = TrialPool(plan.base, 2, own_fleet=True)
    for task in range(2):
        executor.submit(task, plan.base)
    seen: list[tuple[int, str]] = []
    while len(seen) < 6:
        event = executor.next(60)
        assert event is not None
        assert executor.workers == 1
        seen.append((event.task, event.kind))
    assert seen == [(task, kind) for task in range(2) for kind in ("round", "round", "done")]
    executor.close()


def test_a_cancelled_task_is_heard_of_no_more(run_file: Path) -> None:
    plan = plan_of(run_file, parallel=1)
    executor = TrialPool(plan.base, 1, own_fleet=False)
    executor.submit(0, plan.base)
    executor.submit(1, plan.base)
    first = executor.next(60)
    assert first is not None
    executor.cancel(0)
    executor.submit(0, plan.base)  # the number may be used again
    rest = []
    while len(rest) < 6:
        event = executor.next(60)
        assert event is not None
        rest.append((event.task, event.kind))
    assert rest == [(1, "round"), (1, "round"), (1, "done"), (0, "round"), (0, "round"), (0, "done")]
    executor.close()


def test_a_worker_that_is_killed_costs_no_trial(run_file: Path, tmp_path: Path) -> None:
    """SIGKILL once, at its first round; the trial is tried again in another worker, and nothing is missing."""
    text = run_file.read_text().replace("{name: lora,", "{name: own_methods:Deadly,")
    run_file.write_text(text)
    point = {"local.lr": 0.01, "method.rank": 2}
    settings: dict[str, Any] = {"trials": 1, "enqueue": [point], "pruner": "none", "retries": 1}
    plan = plan_of(run_file, **settings, set={"method.flag": str(tmp_path / "died")})
    study = study_of(plan, tmp_path)
    executor = pool(plan)
    driver = Driver(plan, study, executor, tmp_path, lambda driver: None)
    driver.go()
    executor.close()
    (trial,) = study.trials
    assert (trial.state, trial.user_attrs["tries"], trial.user_attrs["rounds"]) == (TrialState.COMPLETE, 2, 2)
    assert (tmp_path / "died").exists()
    assert int((tmp_path / "died").read_text()) != os.getpid()


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (0.5, r"a trial of 1 threads and 0\.5 GPUs finds no room: gpus 0\.5 "),
        (2, "edge a: gpus: 2 are several processes"),
    ],
)
def test_a_shared_worker_reserves_the_gpu_of_its_edges(run_file: Path, gpus: float, message: str) -> None:
    """Nodes of these tests have none."""
    plan = plan_of(run_file, set={"fleet.edges.a.gpus": gpus})
    with pytest.raises(ValueError, match=message):
        pool(plan)


def test_no_room_for_a_worker_is_said_at_once(run_file: Path) -> None:
    plan = plan_of(run_file, set={"local.threads": 4096})
    with pytest.raises(ValueError, match=r"local\.threads: a trial of 4096 threads finds no room: cpus 4096 is more"):
        pool(plan)
