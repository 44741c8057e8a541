"""Fleets on clusters that change: nodes leave and join, an autoscaler brings them, edges wait for one."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from elastic_driver import Driver
from private_clusters import Cluster, autoscaled, cluster, raylets
from refusals import assert_refused
from runs import ROOT, assert_same, command, env, here, load, records, summary

from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.loop import federate
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Profile

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.services


def wait_for(condition: Callable[[], bool], why: Callable[[], str] = str) -> None:
    """Until `condition` holds; at most two minutes."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)


# -- nodes that leave and join

COUNTING = ["method.name=own_methods:Counting", "rounds=8"]
APART = [f"fleet.edges.{edge}.resources={{{edge}: 1}}" for edge in "abc"]  # each needs a node with its own name


ALIKE = [f"fleet.edges.{edge}.resources={{a: 1}}" for edge in "abc"]  # a worker a node


class Attended(SerialFleet):
    """A fleet in this process of which only the edges in `those` are there."""

    those = "abc"

    @property
    def edges(self) -> Mapping[str, Profile]:
        """The profiles by name."""
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


def rounds_with_changes(nodes: Cluster, driver: Driver, hold: Path) -> list[str]:
    """Rounds on a cluster whose nodes leave and join, before and during them; the edges that each round used."""

    def held_round(nodes: int) -> None:
        """Begins a round in whose middle c waits."""
        driver.begin(nodes)
        wait_for((hold / "held").exists, driver.log.read_text)

    assert driver.answer() == ["a", "c"]  # fleet.min_edges=2 are enough
    assert driver.round(nodes=3) == {"a": "ok", "c": "ok"}
    nodes.join("b")
    assert driver.round(nodes=4) == {"a": "ok", "b": "ok", "c": "ok"}
    nodes.leave("a", warned=True)
    assert driver.round(nodes=3) == {"b": "ok", "c": "ok"}

    nodes.join("c2")
    held_round(nodes=4)
    nodes.leave("c", warned=False)
    (hold / "go").touch()
    assert driver.answer() == {"b": "ok", "c": "ok"}  # c was tried again on c2, where its private state was taken up

    for file in hold.iterdir():
        file.unlink()
    held_round(nodes=3)
    nodes.leave("c2", warned=False)
    found = driver.answer()
    assert found.pop("b") == "ok"
    assert re.fullmatch("its node is gone: .*; resources.c 1 is more than any node has .*", found.pop("c"))
    assert not found
    nodes.join("a")
    assert driver.round(nodes=3) == {"a": "ok", "b": "ok"}
    return ["ac", "abc", "bc", "bc", "b", "ab"]


def test_nodes_leave_and_join(ray_folder: Path, run_file: Path, tmp_path: Path) -> None:
    """Every round gives the bits, and leaves the private states, of a fleet of those that took part."""
    private, hold, log = tmp_path / "out" / "private", tmp_path / "hold", tmp_path / "log"
    hold.mkdir()
    with cluster(ray_folder, HOLD=str(hold)) as nodes:
        nodes.join("a", "c")
        settings = [f"fleet.address={nodes.address}", "fleet.ray=true", "fleet.min_edges=2"]
        driver = Driver(log, run_file, private, *COUNTING, *APART, *settings)
        try:
            rounds = rounds_with_changes(nodes, driver, hold)
            assert driver.end() == 0, log.read_text()
        finally:
            driver.close()
    said = log.read_text()
    assert "the node of a worker of edge a left" in said
    assert "edge c is tried again: its " in said
    for edge in "abc":
        assert f"edge {edge}: resources.{edge} 1 is more than any node has (0); lower it in its profile" in said
    for edge in "ab":
        assert f"edge {edge} has a worker and takes part from this round on" in said
    assert "fresh private state" not in said
    assert_told_by_us_alone(said)
    expected = attended(run_file, tmp_path / "serial" / "private", rounds)
    assert_same(dict(Message.load(private / "state.safetensors").tensors), dict(expected.tensors))
    for edge, count in {"a": 6, "b": 6, "c": 4}.items():
        last = Path(edge, f"round-{count:04d}.safetensors")
        assert (private / last).read_bytes() == (tmp_path / "serial" / "private" / last).read_bytes(), edge


def assert_told_by_us_alone(said: str) -> None:
    """Ray tells every driver of a node that died, in its own words, on the terminal."""
    assert "marked dead" not in said
    assert "Raylet is terminated" not in said
    assert "(raylet" not in said


def test_a_node_with_a_packed_worker_leaves(ray_folder: Path, run_file: Path, tmp_path: Path) -> None:
    """Three edges on two workers, a node each. The one that edge c is at loses its node in the middle of a round.

    No report is missing, then or later on the node that is left, nor when another has joined; all bits are those of a
    fleet in one process.
    """
    private, hold, log = tmp_path / "out" / "private", tmp_path / "hold", tmp_path / "log"
    hold.mkdir()
    everyone = {"a": "ok", "b": "ok", "c": "ok"}
    with cluster(ray_folder, HOLD=str(hold)) as nodes:
        nodes.join("a", "a2")
        fleet = [f"fleet.address={nodes.address}", "fleet.ray=true", "fleet.placement=packed", *ALIKE]
        driver = Driver(log, run_file, private, *COUNTING, *fleet)
        try:
            assert driver.answer() == ["a", "b", "c"]
            assert [driver.round(nodes=3) for _ in range(3)] == [everyone] * 3
            driver.begin(nodes=3)
            wait_for((hold / "held").exists, log.read_text)
            lost = nodes.node_of(int((hold / "pid").read_text()))
            nodes.leave(lost, warned=False)
            (hold / "go").touch()
            assert driver.answer() == everyone
            assert driver.round(nodes=2) == everyone
            nodes.join("a3")
            assert driver.round(nodes=3) == everyone
            assert driver.end() == 0, log.read_text()
        finally:
            driver.close()
    said = log.read_text()
    assert "edge c is tried again: its " in said
    assert "fresh private state" not in said
    assert_told_by_us_alone(said)
    expected = attended(run_file, tmp_path / "serial" / "private", ["abc"] * 6)
    assert_same(dict(Message.load(private / "state.safetensors").tensors), dict(expected.tensors))
    for edge in "abc":
        last = Path(edge, "round-0006.safetensors")
        assert (private / last).read_bytes() == (tmp_path / "serial" / "private" / last).read_bytes(), edge


def test_fewer_edges_than_declared(ray_here: None, run_file: Path, tmp_path: Path, capsys: Capture) -> None:
    """fleet.min_edges, on a cluster where edge b has no room; without an autoscaler nobody waits for it."""
    out, lonely = tmp_path / "out", ["fleet.ray=true", "fleet.edges.b.resources={b: 1}"]
    line = "edge b: resources.b 1 is more than any node has (0); lower it in its profile, or add such a node"
    for least, more in (("null", ""), ("3", " ... fleet.min_edges: 3 edges must have room")):
        settings = [f"fleet.min_edges={least}", "fleet.start_timeout_seconds=24h"]
        assert_refused(capsys, "run", run_file, *lonely, *settings, says=line + more, out=out)
    assert here("run", run_file, *lonely, "fleet.min_edges=2", "--out", out) == 0
    assert f"left out until a node has room: {line}" in (out / "log.txt").read_text()
    path = out / "checkpoint" / "round-0002" / "manifest.json"
    content = json.loads(path.read_text())
    content["fingerprints"]["b"] = content["fingerprints"].pop("a")  # as if a had been away at the start, and b not
    path.write_text(json.dumps(content))
    assert here("resume", out, "rounds=3") == 0
    assert [list(record["edges"]) for record in records(out)] == [["a", "c"]] * 3


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
        run = started(out, log, *arguments, "fleet.autoscale=true")
        assert run.wait(240) == 0, log.read_text()
        assert "waiting for the autoscaler: edge a: " in log.read_text()
        assert summary(out)["rounds"] == 2
        assert raylets(ray_folder) == 3
        wait_for(lambda: raylets(ray_folder) == 1)

        too_much = ["fleet.edges.b.cpus=64", "fleet.start_timeout_seconds=4"]
        run = started(tmp_path / "none", log, *arguments, "fleet.autoscale=true", *too_much)
        assert run.wait(240) == 2, log.read_text()
        said = log.read_text()
        assert "the autoscaler brought no node within fleet.start_timeout_seconds=4" in said
        assert "edge b: cpus 64 is more than any node has (" in said
        assert not (tmp_path / "none").exists()
        wait_for(lambda: raylets(ray_folder) == 1)
