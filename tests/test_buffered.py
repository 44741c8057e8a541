"""The buffered loop: who starts when, from what, and with what weight; on both fleets, and after a resume.

The edges e1, e2, e3 take 0.5, 2 and 1 seconds, add 1, 2 and 3 to the state and weigh 10, 20 and 30.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_refused
from runs import assert_same, fleet_of, here, load
from test_resume import assert_like, manifest, records
from toy_rounds import FAST, SPEEDS, Adding, toy_run

from fedpipe_ray.buffered import federate_buffered, moved
from fedpipe_ray.errors import AllEdgesLost, UnfitUpdate
from fedpipe_ray.loop import Round, Start, federate
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.report import Lost
from fedpipe_ray.run import server_site

FLEETS = ["serial", "packed"]
OLD = 1 / math.sqrt(2)  # the discount of an update that is one state old


def rounds_of(
    count: int, edges: Mapping[str, Any] = SPEEDS, kind: str = "serial", method: Adding | None = None, **options: Any
) -> list[Round]:
    method = method or Adding()
    run = toy_run(edges)
    fleet = fleet_of(kind, run, method)
    try:
        fleet.open()
        server = server_site(run, method, [])
        return list(federate_buffered(method, fleet, server, rounds=count, seed=0, evaluate_every=0, **options))
    finally:
        fleet.close()


def x(done: Round) -> float:
    return float(done.state.tensors["x"])


def flying(done: Round) -> set[tuple[str, int, float]]:
    """(edge, state it started from, when) of the edges at work after a round."""
    return {(one.edge, one.base_round, round(one.started_seconds, 6)) for one in done.flights}


@pytest.mark.parametrize("kind", FLEETS)
def test_three_states_by_hand(kind: str, ray_here: None) -> None:
    """Buffer of 2, all three at work.

    State 1 at 1.0 s, of e1 (at 0.5) and e3 (at 1.0): (10 x 1 + 30 x 3) / 40 = 2.5. Both start again.
    State 2 at 2.0 s, of e1 (at 1.5) and e2 (at 2.0, before e3 by its name), which started from state 0: a change of 2
    with weight 20 / sqrt(2). State 3 at 2.5 s, of e3 (at 2.0, one state old) and e1 (at 2.5).
    """
    done = rounds_of(3, kind=kind, buffer=2)
    assert [list(one.outcomes) for one in done] == [["e1", "e3"], ["e1", "e2"], ["e1", "e3"]]
    assert [one.clock_seconds for one in done] == pytest.approx([1.0, 2.0, 2.5], abs=1e-6)
    assert [one.virtual_seconds for one in done] == pytest.approx([1.0, 1.0, 0.5], abs=1e-6)
    second = 2.5 + (10 * 1 + 20 * OLD * 2) / (10 + 20 * OLD)
    third = second + (10 * 1 + 30 * OLD * 3) / (10 + 30 * OLD)
    assert [x(one) for one in done] == pytest.approx([2.5, second, third])
    assert [[one.number - report.base_round for report in one.reports] for one in done] == [[0, 0], [0, 1], [0, 1]]
    assert [flying(one) for one in done] == [
        {("e2", 0, 0.0)}, {("e3", 1, 1.0)}, {("e2", 2, 2.0)}
    ]  # fmt: skip
    assert done[1].reports[1].weight == pytest.approx(20 * OLD)


def test_updates_that_are_too_old_are_dropped() -> None:
    """As above with max_staleness 0: e2's, one state old at 2.0 s, is; e3 (at 2.0) fills the buffer."""
    done = rounds_of(2, buffer=2, max_staleness=0)
    late = done[1].outcomes["e2"]
    assert isinstance(late, Lost)
    assert (late.status, late.reason) == ("late", "late: its update is 1 states old; fleet.max_staleness: 0")
    assert x(done[1]) == pytest.approx(2.5 + 2.5)
    one = Message({"x": torch.zeros(1)}).total_bytes
    assert done[1].bytes_up == 3 * one  # it came whole


def test_fewer_slots_than_edges() -> None:
    """One slot, buffer of 2: one edge after the other, two different ones a state, each time from the newest."""
    done = rounds_of(4, buffer=2, concurrency=1)
    assert all(len(one.outcomes) == 2 and one.flights == () for one in done)
    assert all(report.base_round == one.number for one in done for report in one.reports)
    took = {"e1": 0.5, "e2": 2.0, "e3": 1.0}
    assert [one.virtual_seconds for one in done] == pytest.approx([sum(took[e] for e in one.outcomes) for one in done])
    assert {edge for one in done for edge in one.outcomes} == set(took)


def test_a_lost_edge_makes_room_for_the_next() -> None:
    """e1 always fails: states are made of e2 and e3 alone, and its losses stand in the record."""
    done = rounds_of(3, buffer=2, concurrency=1, method=Adding(fails={"e1": "bug"}))
    assert all(set(one.outcomes) >= {"e2", "e3"} for one in done)
    assert any(isinstance(one.outcomes.get("e1"), Lost) for one in done)
    assert x(done[0]) == pytest.approx(2.6)


def test_a_buffer_that_cannot_fill_closes_with_what_is_there() -> None:
    """Two of three fail, and an edge trains but once from a state: a state of one report; of none, none."""
    done = rounds_of(2, buffer=2, method=Adding(fails={"e1": "bug", "e2": "memory"}))
    assert [x(one) for one in done] == pytest.approx([3, 6])
    with pytest.raises(AllEdgesLost, match="edge e3: KeyError"):
        rounds_of(1, buffer=2, method=Adding(fails={"e1": "bug", "e2": "bug", "e3": "bug"}))


def test_traces_are_looked_at_when_a_state_comes_out() -> None:
    """e1 is there in [0, 0.1), e2 from 0.4 s and e3 from 4 s on: state 1 of e1 at 0.5, 2 of e2 at 2.5, 3 of e2 at 4.5.

    After that e3 is there too, and with a buffer of 1 e3 (at 5.5) is before e2 (at 6.5).
    """
    spans = {"e1": [[0, 0.1]], "e2": [[0.4, 99]], "e3": [[4, 99]]}
    edges = {name: {**SPEEDS[name], "trace": spans[name]} for name in SPEEDS}
    done = rounds_of(5, edges, buffer=1)
    assert [list(one.outcomes) for one in done] == [["e1"], ["e2"], ["e2"], ["e3"], ["e2"]]
    assert [one.clock_seconds for one in done] == pytest.approx([0.5, 2.5, 4.5, 5.5, 6.5], abs=1e-6)


def test_waits_for_the_first_to_come() -> None:
    """e1 alone, there in [0, 0.1) and from 3 s on: state 2 at 3.5 s."""
    done = rounds_of(2, {"e1": {**SPEEDS["e1"], "trace": [[0, 0.1], [3, 99]]}}, buffer=1)
    assert [one.virtual_seconds for one in done] == pytest.approx([0.5, 3.0], abs=1e-6)


# -- as the synchronous loop where nobody is slower


def test_equal_speeds_and_a_full_buffer_are_the_synchronous_loop(run_file: Path) -> None:
    """LoRA on prompts of one length, same profiles: the same bits, bytes and clock."""
    run = load(run_file, "fleet.edges.c={cpus: 0.1, compute_flops: 1GFLOP/s}", "rounds=3")
    method = make_method(run.method)
    fleet = fleet_of("serial", run, method)
    fleet.open()
    server = server_site(run, method, [])
    one = list(federate(method, fleet, server, rounds=3, seed=0))
    two = list(federate_buffered(method, fleet, server, rounds=3, seed=0, buffer=3))
    for sync, buffered in zip(one, two, strict=True):
        assert_same(dict(sync.state.tensors), dict(buffered.state.tensors))
        assert (sync.evaluation, sync.train_loss) == (buffered.evaluation, buffered.train_loss)
        assert (sync.bytes_up, sync.bytes_down, sync.clock_seconds) == (
            buffered.bytes_up, buffered.bytes_down, buffered.clock_seconds,
        )  # fmt: skip
        assert buffered.flights == ()


# -- properties, over fleets drawn at random

speeds = st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0, 7.0]), min_size=1, max_size=6)


@settings(max_examples=40)
@given(speeds, st.integers(1, 6), st.integers(1, 6), st.none() | st.integers(0, 2), st.integers(0, 4))
def test_slots_states_and_clock(speeds: list[float], buffer: int, slots: int, oldest: int | None, cut: int) -> None:
    """Never more at work than slots; nobody twice from a state; nothing too old; it goes on from every state alike."""
    edges = {f"e{i + 1}": {**FAST, "compute_flops": f"{speed}GFLOP/s"} for i, speed in enumerate(speeds)}
    options = {"buffer": min(buffer, len(edges)), "concurrency": min(slots, len(edges)), "max_staleness": oldest}
    done = rounds_of(5, edges, **options)
    clock, trained = 0.0, set()
    for one in done:
        assert one.clock_seconds >= clock
        assert one.virtual_seconds == one.clock_seconds - clock
        clock = one.clock_seconds
        assert len(one.flights) < options["concurrency"] or len(one.flights) == 0
        assert 1 <= len(one.reports) <= options["buffer"]
        for report in one.reports:
            assert 0 <= one.number - report.base_round <= (math.inf if oldest is None else oldest)
            assert (report.edge, report.base_round) not in trained
            trained.add((report.edge, report.base_round))
        assert list(one.outcomes) == [edge for edge in edges if edge in one.outcomes]
    at = done[cut]
    start = Start(at.state, at.number + 1, clock_seconds=at.clock_seconds, flights=at.flights)
    again = rounds_of(5, edges, start=start, **options)
    assert [(x(one), one.clock_seconds, flying(one)) for one in again] == [
        (x(one), one.clock_seconds, flying(one)) for one in done[cut + 1 :]
    ]


# -- whole runs with LoRA

BUFFERED = ("fleet.mode=buffered", "fleet.buffer=2", "local.schedule=constant")


def test_both_fleets_and_a_resumed_one_agree(run_file: Path, ray_here: None) -> None:
    """c is four times slower and arrives stale; Ray goes on from state 2 of the serial fleet, with c at work."""
    run = load(run_file, *BUFFERED, "wire.dtype=bfloat16")
    method = make_method(run.method)
    whole: dict[str, list[Round]] = {}
    for kind in FLEETS:
        fleet = fleet_of(kind, run, method)
        start = None
        try:
            fleet.open()
            server = server_site(run, method, [])
            if kind == "packed":
                at = whole["serial"][1]
                assert [one.edge for one in at.flights] == ["c"]
                start = Start(at.state, 2, clock_seconds=at.clock_seconds, flights=at.flights)
            whole[kind] = list(federate_buffered(method, fleet, server, rounds=6, seed=0, buffer=2, start=start))
        finally:
            fleet.close()
    serial, on_ray = whole["serial"][2:], whole["packed"]
    assert max(one.number - report.base_round for one in serial for report in one.reports) >= 2
    for one, other in zip(serial, on_ray, strict=True):
        assert_same(dict(one.state.tensors), dict(other.state.tensors))
        assert one.evaluation == other.evaluation
        assert (one.clock_seconds, one.bytes_up, one.bytes_down) == (
            other.clock_seconds, other.bytes_up, other.bytes_down,
        )  # fmt: skip


def test_a_run_that_goes_on_has_the_same_bits(run_file: Path, tmp_path: Path) -> None:
    """With private states, of which c's at the checkpoint is the one before the round it is still in."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    arguments = (*BUFFERED, "method.name=own_methods:Counting")
    assert here("run", run_file, *arguments, "rounds=8", "--out", whole) == 0
    ages = [edge["staleness"] for line in records(whole) for edge in line["edges"].values()]
    assert max(age for age in ages if age is not None) >= 2
    assert here("run", run_file, *arguments, "rounds=5", "--out", folder) == 0
    saved = manifest(folder)
    (flight,) = saved["flights"]
    assert flight["edge"] == "c"
    assert flight["base_round"] < 5
    assert (folder / "checkpoint" / "round-0005" / f"base-{flight['base_round']:04d}.safetensors").is_file()
    assert here("resume", folder, "rounds=8") == 0
    assert_like(folder, whole)


def test_a_damaged_base_state_falls_back_to_the_checkpoint_before(run_file: Path, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert here("run", run_file, *BUFFERED, "rounds=6", "--out", whole) == 0
    assert here("run", run_file, *BUFFERED, "rounds=5", "--out", folder) == 0
    (base,) = (folder / "checkpoint" / "round-0005").glob("base-*.safetensors")
    base.write_bytes(b"nothing")
    assert here("resume", folder, "rounds=6") == 0
    assert "checkpoint round-0005 is damaged" in (folder / "log.txt").read_text()
    assert_like(folder, whole)


# -- what is refused


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("method={name: fedpipe}", "fleet.buffer=2"), "FedPipe cannot use ... methods that can: ... lora ... or set"),
        (("method={name: fedadapter}", "fleet.buffer=2"), "FedAdapter cannot use ... methods that can: ... full, lora"),
        ((), "fleet.buffer: mode: buffered needs it: how many reports make a new state, 1 to 3"),
        (("fleet.buffer=4",), "fleet.buffer: 4 is more than the 3 edges there are; at most 3"),
        (("fleet.buffer=2", "fleet.concurrency=9"), "fleet.concurrency: 9 is more than the 3 edges there are"),
        (("fleet.buffer=0",), "fleet.buffer: 0 must be above 0"),
        (("fleet.buffer=2", "fleet.max_staleness=-1"), "fleet.max_staleness: -1 must not be negative"),
        (("fleet.buffer=2", "fleet.over_select=1.5"), "fleet.over_select: has no place in fleet.mode: buffered"),
        (("fleet.buffer=2", "fleet.fraction=0.5"), "fleet.fraction: has no place in fleet.mode: buffered"),
        (("fleet.buffer=2", "fleet.deadline_seconds=5"), "fleet.deadline_seconds: has no place in fleet.mode"),
        (("fleet.mode=synchronous", "fleet.buffer=2"), "fleet.buffer: has no place in fleet.mode: synchronous"),
        (("fleet.mode=synchronous", "fleet.over_select=0.5"), "fleet.over_select: 0.5 must be at least 1"),
    ],
)
def test_what_cannot_be(
    overrides: tuple[str, ...], says: str, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, "run", run_file, "fleet.mode=buffered", *overrides, says=says, out=tmp_path / "out")


def test_a_change_is_moved_as_it_was_sent() -> None:
    """In bfloat16 1.001 is sent as 1: an edge that answers 1.5 has changed it by 0.5, not by 0.499."""
    base, state = Message({"x": torch.tensor([1.001])}), Message({"x": torch.tensor([4.0])})
    update = Message({"x": torch.tensor([1.5], dtype=torch.bfloat16)}, {"n": 3.0})
    after = moved(lambda: update, base, state, "bfloat16")
    assert after.tensors["x"].item() == 4.5
    assert (after.tensors["x"].dtype, after.numbers) == (torch.float32, {"n": 3.0})
    with pytest.raises(UnfitUpdate, match="has x in shape"):
        moved(lambda: Message({"x": torch.zeros(2)}), base, state, "float32")
