"""What drivers and trials ask an autoscaler for: side by side, while they live and no longer."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from campaigns_made import campaign, plan_of
from private_clusters import autoscaled, raylets
from runs import ROOT, command, env, summary

from actors.pool import TrialPool

pytestmark = pytest.mark.services

ONE_EDGE = "{a: {cpus: 1, resources: {clinic: 1}}}"
CLINIC = {"CPU": 1.0, "clinic": 1.0}  # a node has room for one such edge, or for a trial's worker


class Drivers:
    """Commands in processes of their own, all in one log; those that are left are killed at the end."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.all: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: object) -> subprocess.Popen[bytes]:
        """One more."""
        path = f"{Path(__file__).parent}:{ROOT}"  # own_methods is found there
        with self.log.open("a") as file:
            self.all.append(
                subprocess.Popen(
                    command(*arguments), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                    env=env(PYTHONPATH=path, RAY_AUTH_MODE="disabled", COLUMNS="300"),
                )
            )  # fmt: skip
        return self.all[-1]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until it holds; at most four minutes. Fails if one of them ends with an error before."""
        deadline = time.monotonic() + 240
        while not condition():
            assert not any(process.poll() not in (None, 0, -9) for process in self.all), self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)


@pytest.fixture
def drivers(tmp_path: Path) -> Iterator[Drivers]:
    """They do not outlive the test."""
    one = Drivers(tmp_path / "log")
    yield one
    for process in one.all:
        process.kill()
        process.wait()


def waiting(hold: Path) -> int:
    """How many processes wait in their first round."""
    return sum(file.name.isdigit() for file in hold.iterdir())


@pytest.mark.timeout(600)
def test_a_killed_driver_takes_its_request_along_and_no_other(
    ray_folder: Path, run_file: Path, tmp_path: Path, drivers: Drivers
) -> None:
    """Two drivers want a node of the same kind each. One is killed: its node goes, and the other ends as it should."""
    holds, outs = [[tmp_path / f"{kind}{n}" for n in range(2)] for kind in ("hold", "out")]
    with autoscaled(ray_folder, clinic=CLINIC) as address:
        runs = []
        for hold, out in zip(holds, outs, strict=True):
            hold.mkdir()
            method = f"{{name: 'own_methods:Waiting', rank: 4, alpha: 8, hold: '{hold}'}}"
            fleet = f"{{ray: true, autoscale: true, address: '{address}', edges: {ONE_EDGE}}}"
            runs.append(drivers.start("run", run_file, f"fleet={fleet}", f"method={method}", "--out", out))
        drivers.wait_for(lambda: [waiting(hold) for hold in holds] == [1, 1])
        assert raylets(ray_folder) == 3
        assert "waiting for the autoscaler: edge a: " in drivers.log.read_text()
        runs[0].kill()
        drivers.wait_for(lambda: raylets(ray_folder) == 2)
        (holds[1] / "go").touch()
        assert runs[1].wait(240) == 0, drivers.log.read_text()
        assert summary(outs[1])["rounds"] == 2
        drivers.wait_for(lambda: raylets(ray_folder) == 1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fleet", ["shared", "own"])
def test_a_campaign_grows_and_shrinks_a_cluster(
    ray_folder: Path, run_file: Path, tmp_path: Path, drivers: Drivers, fleet: str
) -> None:
    """From no node to one for each of two parallel trials, which are at work at the same time, and back to none."""
    (hold := tmp_path / "hold").mkdir()
    text = run_file.read_text().replace("{name: lora,", f"{{name: own_methods:Waiting, hold: '{hold}',")
    text = text.partition("fleet:")[0] + "method:" + text.partition("method:")[2]
    with autoscaled(ray_folder, clinic=CLINIC) as address:
        run_file.write_text(f"{text}fleet: {{autoscale: true, address: '{address}', edges: {ONE_EDGE}}}\n")
        points = [{"local.lr": rate, "method.rank": 2} for rate in (0.01, 0.03)]
        path = campaign(run_file, trials=2, enqueue=points, pruner="none", parallel=2, fleet=fleet)
        tune = drivers.start("tune", path, "--out", tmp_path / "out")
        drivers.wait_for(lambda: waiting(hold) == 2)
        assert raylets(ray_folder) == 3
        (hold / "go").touch()
        assert tune.wait(240) == 0, drivers.log.read_text()
        assert "2 complete" in drivers.log.read_text()
        drivers.wait_for(lambda: raylets(ray_folder) == 1)


def groups() -> list[str]:
    """States of the cluster's placement groups that stand."""
    from ray.util import placement_group_table

    return [entry["state"] for entry in placement_group_table().values() if entry["state"] != "REMOVED"]


def test_a_trial_that_is_stopped_leaves_no_request(ray_here: None, run_file: Path) -> None:
    """Between two rounds, and in the middle of one, when its coordinator is killed."""
    own: dict[str, Any] = {"fleet.ray": True, "fleet.autoscale": True}
    plan = plan_of(run_file, set=own)
    executor = TrialPool(plan.base, 1, own_fleet=True)
    for in_a_round in (False, True):
        executor.submit(0, plan.base)
        event = executor.next(120)
        assert event is not None
        assert event.kind == "round", event
        assert groups() == ["CREATED"] * 3  # an edge each
        if in_a_round:
            executor.next(0)  # it goes on
        executor.cancel(0)
        deadline = time.monotonic() + 60
        while groups():
            assert time.monotonic() < deadline, groups()
            time.sleep(0.05)
    executor.close()


def test_no_request_without_autoscale(ray_here: None, run_file: Path) -> None:
    plan = plan_of(run_file, set={"fleet.ray": True})
    executor = TrialPool(plan.base, 1, own_fleet=True)
    executor.submit(0, plan.base)
    event = executor.next(120)
    assert event is not None
    assert event.kind == "round", event
    assert groups() == []
    executor.close()


def test_no_node_for_a_trial_is_said_in_time(ray_here: None, run_file: Path) -> None:
    settings = {"fleet.ray": True, "fleet.autoscale": True, "fleet.start_timeout_seconds": 1, "local.threads": 4096}
    plan = plan_of(run_file, set=settings)
    executor = TrialPool(plan.base, 1, own_fleet=False)
    executor.submit(0, plan.base)
    assert executor.next(0.1) is None
    with pytest.raises(ValueError, match=r"no node within fleet\.start_timeout_seconds=1\nlocal\.threads.*4096"):
        executor.next(1.5)
    executor.close()
