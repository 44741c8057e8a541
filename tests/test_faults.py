"""What is done to a worker in the middle of a round: who reports, with which bits, and what is decided."""

from __future__ import annotations

import logging
import time
from collections import Counter
from pathlib import Path

import pytest
import ray
from ray import exceptions
from ray._private.utils import publish_error_to_driver
from runs import assert_like, assert_same, here, records, tensors

from actors.faults import RULES, Decision, Fault, Kind, decide, fault_of
from fedpipe_ray.message import Message

# -- decisions


@pytest.mark.parametrize(
    ("kind", "tries", "retries", "decision"),
    [
        ("died", 1, 1, Decision(again=True, replace=True)),
        ("died", 2, 1, Decision(again=False, replace=True)),
        ("died", 1, 0, Decision(again=False, replace=True)),
        ("node gone", 3, 3, Decision(again=True, replace=True)),
        ("late", 1, 9, Decision(again=False, replace=True)),
        ("short of memory", 1, 9, Decision(again=False, replace=True)),
        ("raised", 1, 9, Decision(again=False, replace=False)),
        ("no room", 1, 9, Decision(again=False, replace=False)),
        ("store full", 1, 1, Decision(again=True, replace=False)),
        ("update lost", 2, 1, Decision(again=False, replace=False)),
    ],
)
def test_decisions(kind: Kind, tries: int, retries: int, decision: Decision) -> None:
    assert decide(kind, tries, retries) == decision


@pytest.mark.parametrize("kind", RULES)
def test_nothing_is_tried_for_ever(kind: Kind) -> None:
    assert [decide(kind, tries, 2).again for tries in (3, 4, 100)] == [False] * 3


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (exceptions.ObjectStoreFullError("full"), "store full", "--object-store-memory"),
        (exceptions.OutOfDiskError("no space left"), "store full", "wire.dtype"),
        (exceptions.OutOfMemoryError("killed to save the node"), "short of memory", "killed to save the node"),
        (exceptions.NodeDiedError("the node died"), "node gone", "its node is gone: the node died"),
        (exceptions.ActorUnschedulableError("nowhere"), "node gone", "its node is gone"),
        (exceptions.ActorUnavailableError("no answer", None), "died", "its worker died"),
        (exceptions.ObjectLostError("00" * 28, None, ""), "update lost", "its update was lost on the way"),
        (ValueError("odd"), "raised", "ValueError: odd"),
    ],
)
def test_what_an_exception_of_ray_means(error: Exception, kind: Kind, says: str) -> None:
    fault = fault_of(error)
    assert fault.kind == kind
    assert says in fault.reason
    assert isinstance(fault, Fault)


# -- what Ray tells drivers


def test_news_of_ray_goes_to_the_log(
    ray_here: None, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A node that left at the level of what is only written down, the rest as a warning; nothing is printed."""
    news = {
        "worker_oom": "2 workers were killed\nand why",
        "node_removed": "The node n has been marked dead because of this",
    }
    with caplog.at_level(logging.DEBUG, logger="fedpipe"):
        for kind, text in news.items():
            publish_error_to_driver(kind, text, gcs_client=ray._private.worker.global_worker.gcs_client)
        deadline = time.monotonic() + 60
        while "marked dead" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    told = {record.getMessage(): record.levelname for record in caplog.records if record.name == "fedpipe"}
    assert told == {
        "Ray: 2 workers were killed": "WARNING",
        "and why": "DEBUG",
        f"Ray: {news['node_removed']}": "DEBUG",
    }
    printed = capsys.readouterr()
    assert "marked dead" not in printed.out + printed.err


# -- runs


def test_a_store_without_room_ends_the_run_with_a_remedy(
    ray_here: None, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray writes to disk what its memory does not hold, so this is a full disk."""

    def full(value: object) -> None:
        if isinstance(value, Message):
            raise exceptions.OutOfDiskError("no space left on device")
        return put(value)

    put = ray.put
    monkeypatch.setattr("actors.fleet.ray.put", full)
    monkeypatch.setattr("actors.fleet.INLINE_BYTES", 0)  # the test's messages would not need the store
    fleet = ("fleet.ray=true", "fleet.placement=packed", "fleet.workers=1", "evaluate.every=0")
    assert here("run", run_file, *fleet, "--out", tmp_path / "out") == 3
    printed = capsys.readouterr().err
    assert printed.count("Ray's object store has no room: ") == 3
    assert "--object-store-memory" in printed


def struck(tmp_path: Path, how: str, times: int = 1, marks: str = "marks", private: Path | str = "") -> str:
    (tmp_path / marks).mkdir()
    method = f"name: 'own_methods:Struck', rank: 4, alpha: 8, how: {how}, times: {times}"
    return f"method={{{method}, marks: '{tmp_path / marks}', private: '{private}'}}"


def reports(out: Path) -> list[int]:
    """How many edges gave a report, by round."""
    return [Counter(edge["status"] for edge in record["edges"].values())["ok"] for record in records(out)]


@pytest.fixture
def six_edges(data_dir: Path) -> str:
    """The override with edges a to f, each with rows of its own."""
    edges = {name: f"{{cpus: 0.1, compute_flops: 1GFLOP/s, data: '{data_dir}/{name}.jsonl'}}" for name in "abc"}
    edges |= {new: edges[old] for new, old in zip("def", "abc", strict=True)}
    return f"fleet.edges={{{', '.join(f'{name}: {edge}' for name, edge in edges.items())}}}"


def test_one_kill_of_a_shared_worker_costs_no_report(
    ray_here: None, run_file: Path, six_edges: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Round 2 of 6, 6 edges on 2 workers: 6 reports in every round, and all bits are those of a quiet run."""
    out, quiet = tmp_path / "out", tmp_path / "quiet"
    common = (run_file, six_edges, "rounds=6", "local.steps=1", "evaluate.every=6")
    packed = ("fleet.ray=true", "fleet.placement=packed", "fleet.workers=2")
    assert here("run", *common, *packed, struck(tmp_path, "kill"), "--out", out) == 0
    assert here("run", *common, struck(tmp_path, "kill", 0, "none"), "--out", quiet) == 0
    assert (tmp_path / "marks" / "0").exists()
    assert reports(out) == [6] * 6
    assert_like(out, quiet)
    assert "edge b is tried again: its worker died" in (out / "log.txt").read_text()


def two_edges(**keys: object) -> str:
    """The override with an actor each for a and b."""
    more = "".join(f", {key}: {value}" for key, value in keys.items())
    return f"fleet={{ray: true{more}, edges: {{a: {{cpus: 0.1}}, b: {{cpus: 0.1}}}}}}"


@pytest.mark.services
def test_without_another_try_a_kill_costs_its_edge_one_round(ray_here: None, run_file: Path, tmp_path: Path) -> None:
    """The worker is replaced, and takes up the private state that the edge had before that round."""
    out, serial = tmp_path / "out", tmp_path / "serial"
    common = (run_file, "rounds=4", two_edges(retries=0))
    assert here("run", *common, struck(tmp_path, "kill"), "--out", out) == 0
    assert here("run", *common, "fleet.ray=false", struck(tmp_path, "raise", 1, "m2"), "--out", serial) == 0
    assert reports(out) == reports(serial) == [2, 1, 2, 2]
    lost = records(out)[1]["edges"]["b"]
    assert lost["status"] == "lost"
    assert lost["reason"].startswith("its worker died: ")
    assert_same(tensors(out), tensors(serial))
    assert [one["train_loss"] for one in records(out)] == [one["train_loss"] for one in records(serial)]


@pytest.mark.services
def test_an_edge_that_hangs_is_given_up_and_comes_back(ray_here: None, run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fleet = two_edges(round_timeout_seconds=15, retries=3)
    assert here("run", run_file, "rounds=3", fleet, struck(tmp_path, "hang"), "--out", out) == 0
    assert reports(out) == [2, 1, 2]
    assert records(out)[1]["edges"]["b"]["reason"] == "no report within fleet.round_timeout_seconds=15"


def test_private_state_that_is_gone_is_said(ray_here: None, run_file: Path, tmp_path: Path) -> None:
    """b goes on with fresh state; a has its own in memory, and writes it anew."""
    out, private = tmp_path / "out", tmp_path / "out" / "private"
    method = struck(tmp_path, "forget", private=private)
    assert here("run", run_file, "rounds=3", two_edges(), method, "--out", out) == 0
    assert reports(out) == [2, 2, 2]
    log = (out / "log.txt").read_text()
    assert "edge b starts with fresh private state: edge b: its private state cannot be restored: " in log
    assert "edge a starts with fresh private state" not in log
