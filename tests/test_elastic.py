"""Fleets on clusters that change: nodes that leave and join, an autoscaler that brings them, edges that wait for one."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from elastic_driver import Driver
from private_clusters import SETTINGS, autoscaled, cluster, raylets
from runs import ROOT, assert_same, command, env, load, summary

from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.loop import federate
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Profile

pytestmark = pytest.mark.services


def wait_for(condition: Callable[[], bool], why: Callable[[], str] = str) -> None:
    """Until `condition` holds; at most two minutes."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)


# -- nodes that leave and join

COUNTING = ["method.name=own_methods:Counting", "rounds=6"]


def on_its_own_node(run_file: Path) -> list[str]:
    """The overrides that have every edge run on a node of its own name only."""
    return [f"fleet.edges.{edge}.resources={{{edge}: 1}}" for edge in "abc"]


class Attended(SerialFleet):
    """A fleet in this process of which only the edges in `those` are there."""

    those = "abc"

    @property
    def edges(self) -> Mapping[str, Profile]:
        return {name: profile for name, profile in super().edges.items() if name in self.those}


def attended(run_file: Path, private: Path, rounds: list[str]) -> Message:
    """The state after rounds in which these edges took part; their private states go to `private`."""
    run = load(run_file, *COUNTING)
    method = make_method(run.method)
    fleet = Attended(run, method, private)
    fleet.open()
    server = server_site(run, method, fleet.classes)
    done = federate(method, fleet, server, rounds=run.rounds, seed=run.seed, evaluate_every=0)
    for fleet.those in rounds:
        state = next(done).state
    return state


def test_nodes_leave_and_join(ray_folder: Path, run_file: Path, tmp_path: Path) -> None:
    """Each edge has one node that it can be on. What the others and it compute is as if it had been left out."""
    private, hold, log = tmp_path / "out" / "private", tmp_path / "hold", tmp_path / "log"
    hold.mkdir()
    with cluster(ray_folder, HOLD=str(hold)) as nodes:
        nodes.join("a", "c")
        overrides = [*COUNTING, *on_its_own_node(run_file), f"fleet.address={nodes.address}", "fleet.ray=true"]
        driver = Driver(log, run_file, private, *overrides, "fleet.min_edges=2")
        try:
            assert driver.answer() == ["a", "c"]
            assert driver.round(nodes=3) == {"a": "ok", "c": "ok"}
            nodes.join("b")
            assert driver.round(nodes=4) == {"a": "ok", "b": "ok", "c": "ok"}
            nodes.leave("a", warned=True)
            assert driver.round(nodes=3) == {"b": "ok", "c": "ok"}
            driver.begin(nodes=3)
            wait_for((hold / "held").exists, log.read_text)
            nodes.leave("c", warned=False)  # in the middle of its round
            found = driver.answer()
            assert found.pop("b") == "ok"
            assert found.keys() == {"c"}
            print(found)
            assert found["c"].startswith("its node is gone"), found
            (hold / "go").touch()
            assert driver.round(nodes=2) == {"b": "ok"}
            nodes.join("a", "c")
            assert driver.round(nodes=4) == {"a": "ok", "b": "ok", "c": "ok"}
            assert driver.end() == 0
        finally:
            driver.close()
    said = log.read_text()
    for line in (
        "left out until a node has room: edge b: resources.b 1 is more than any node has (0)",
        "edge b has a worker and takes part from this round on",
        "the node of a worker of edge a left",
        "left out until a node has room: edge a: resources.a 1 is more than any node has (0)",
        "edge a has a worker and takes part from this round on",
        "edge c has a worker and takes part from this round on",
    ):
        assert line in said, said
    assert "fresh private state" not in said
    rounds = ["ac", "abc", "bc", "b", "b", "abc"]
    expected = attended(run_file, tmp_path / "serial" / "private", rounds)
    assert_same(dict(Message.load(private / "state.safetensors").tensors), dict(expected.tensors))
    for edge in "abc":
        last = Path(edge, "round-0006.safetensors")
        assert (private / last).read_bytes() == (tmp_path / "serial" / "private" / last).read_bytes(), edge


# -- an autoscaler


def started(out: Path, log: Path, *arguments: object) -> subprocess.Popen[bytes]:
    """`fedpipe run`, whose output goes to `log`."""
    environment = env(RAY_AUTH_MODE="disabled", COLUMNS="300")
    with log.open("w") as file:
        return subprocess.Popen(
            command("run", *arguments, "--out", out), cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )


def test_an_autoscaler_brings_the_nodes(ray_folder: Path, run_file: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    two = "fleet={ray: true, edges: {a: {cpus: 1, resources: {clinic: 1}}, b: {cpus: 1, resources: {plant: 1}}}}"
    with autoscaled(ray_folder, clinic={"CPU": 1, "clinic": 1}, plant={"CPU": 2, "plant": 1}) as address:
        arguments = [run_file, two, f"fleet.address={address}"]
        run = started(out, log, *arguments, "fleet.start_timeout_seconds=3600")
        assert run.wait(240) == 2, log.read_text()  # it waits for nothing
        assert "edge a: cpus 1 is more than any node has (0)" in log.read_text()
        assert "edge b: cpus 1 is more than any node has (0)" in log.read_text()
        assert raylets(ray_folder) == 1

        run = started(out, log, *arguments, "fleet.autoscale=true")
        assert run.wait(240) == 0, log.read_text()
        assert "waiting for the autoscaler: edge a: " in log.read_text()
        assert summary(out)["rounds"] == 2
        assert raylets(ray_folder) == 3
        wait_for(lambda: raylets(ray_folder) == 1)

        too_much = "fleet.edges.b.cpus=64"
        run = started(tmp_path / "none", log, *arguments, "fleet.autoscale=true", too_much, "fleet.start_timeout_seconds=4")
        assert run.wait(240) == 2, log.read_text()
        said = log.read_text()
        assert "the autoscaler brought no node within fleet.start_timeout_seconds=4" in said
        assert "edge b: cpus 64 is more than any node has (" in said
        assert not (tmp_path / "none").exists()
        wait_for(lambda: raylets(ray_folder) == 1)
