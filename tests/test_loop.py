"""The loop, on real fleets with a method that needs no model: who is asked, in what order, and what a round cost."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import load
from toy_rounds import SPEEDS, Adding, fleet_of, rounds_of

from fedpipe_ray.costs import Cost
from fedpipe_ray.errors import AllEdgesLost
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.loop import Round, Start, awaited, closing, counts, federate, round_half_up, sample
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Profile

# -- sampling


def drawn_for(edges: dict[str, Profile], fraction: float, seed: int, round: int) -> dict[str, Profile]:
    """The edges asked in a round, at the beginning of the virtual clock."""
    _, here = awaited(edges, seed, round, 0.0)
    return sample(here, counts(len(here), fraction)[1], seed, round)


def names(count: int, **changes: Any) -> dict[str, Profile]:
    return {f"e{i}": Profile(**changes) for i in range(count)}


@pytest.mark.parametrize(
    ("count", "fraction", "asked"),
    [(10, 1.0, 10), (10, 0.5, 5), (10, 0.25, 3), (10, 0.24, 2), (10, 0.01, 1), (1, 0.5, 1), (3, 0.5, 2), (7, 0.9, 6)],
)
def test_the_share_of_edges_that_is_asked(count: int, fraction: float, asked: int) -> None:
    """Rounded, halves up, at least one: 2.5 is 3, 1.5 is 2."""
    drawn = [drawn_for(names(count), fraction, 0, round) for round in range(30)]
    assert {len(edges) for edges in drawn} == {asked}
    assert all(list(edges) == [name for name in names(count) if name in edges] for edges in drawn)


@given(st.floats(0, 1e6))
def test_halves_go_up(value: float) -> None:
    assert abs(round_half_up(value) - value) <= 0.5
    assert round_half_up(math.floor(value) + 0.5) == math.floor(value) + 1


def test_all_edges_are_asked_alike() -> None:
    """3 of 6 in 2000 rounds: 1000 times each, standard deviation sqrt(2000 / 4) = 22; 5 of them is 112."""
    asked = Counter(name for round in range(2000) for name in drawn_for(names(6), 0.5, 7, round))
    assert all(abs(times - 1000) < 112 for times in asked.values())
    assert len(asked) == 6


def test_availability_is_a_chance() -> None:
    """e0 always, e1 with 0.3 in 2000 rounds: 600, standard deviation sqrt(2000 x 0.21) = 20.5; 5 of them is 103."""
    edges = {"e0": Profile(), "e1": Profile(availability=0.3)}
    asked = Counter(name for round in range(2000) for name in drawn_for(edges, 1.0, 0, round))
    assert asked["e0"] == 2000
    assert abs(asked["e1"] - 600) < 103


def test_somebody_is_asked_though_nobody_is_there() -> None:
    """Two edges with a chance of 1 in a million: one of them all the same, now this and now that."""
    drawn = [tuple(drawn_for(names(2, availability=1e-6), 1.0, 0, round)) for round in range(20)]
    assert set(drawn) == {("e0",), ("e1",)}


def test_sampling_does_not_look_at_others() -> None:
    """Whether an edge is available is a matter of seed, round and name; a further edge changes nothing."""
    few = {name: Profile(availability=0.5) for name in ("a", "b")}
    more = {**few, "c": Profile(availability=0.5)}
    both = [(set(drawn_for(few, 1.0, 1, r)), set(drawn_for(more, 1.0, 1, r)) - {"c"}) for r in range(200)]
    assert sum(one != other for one, other in both) < 70  # rounds in which nobody of the few was there


# -- a round's figures


def a_round(*outcomes: Report | Lost) -> Round:
    return Round(0, Message(), {one.edge: one for one in outcomes}, {}, {}, 0.0, 0.0)


def test_figures_of_a_round_by_hand() -> None:
    """Loss (10 x 1 + 30 x 3) / 40 = 2.5; bytes of a lost edge are those sent to it, and an update that was refused."""
    done = a_round(
        Report("a", 0, 10, 1.0, Cost(bytes_up=5, bytes_down=7, virtual_seconds=2.0)),
        Lost("b", "gone", cost=Cost(bytes_down=7, virtual_seconds=9.0)),
        Lost("d", "its update has NaN", cost=Cost(bytes_up=100, bytes_down=7, virtual_seconds=1.0)),
        Report("c", 0, 30, 3.0, Cost(bytes_up=6, bytes_down=8, virtual_seconds=4.0)),
    )
    assert [report.edge for report in done.reports] == ["a", "c"]
    assert (done.train_loss, done.bytes_up, done.bytes_down) == (2.5, 111, 29)
    assert closing(done.outcomes, 4, math.inf) == 9.0


def test_a_round_without_reports_has_no_loss() -> None:
    done = a_round(Lost("a", "gone"))
    assert math.isnan(done.train_loss)
    assert (done.bytes_up, done.reports) == (0, [])
    assert closing(done.outcomes, 1, math.inf) == 0.0


def test_the_slowest_edge_makes_the_round() -> None:
    """No latency, links so fast that they do not count: 1 GFLOP at 2, 0.5 and 1 GFLOP/s is 0.5, 2 and 1 s."""
    (done,) = rounds_of(Adding(), 1, SPEEDS)
    assert {name: one.cost.virtual_seconds for name, one in done.outcomes.items()} == pytest.approx(
        {"e1": 0.5, "e2": 2.0, "e3": 1.0}, abs=1e-6
    )
    assert done.virtual_seconds == pytest.approx(2.0, abs=1e-6)


def test_bytes_are_those_of_orders_and_updates() -> None:
    """One float and its header each way, three edges."""
    (done,) = rounds_of(Adding(), 1)
    one = Message({"x": torch.zeros(1)}).total_bytes
    assert (done.bytes_up, done.bytes_down) == (3 * one, 3 * one)


# -- rounds


def test_rounds_by_hand() -> None:
    """Weights 10, 20, 30, so that a round adds (1 + 4 + 9) / 6 = 7/3. Reports stand in the order of the edges."""
    done = rounds_of(Adding(), 3)
    assert [one.number for one in done] == [0, 1, 2]
    assert [one.state.tensors["x"].item() for one in done] == pytest.approx([7 / 3, 14 / 3, 7])
    assert [list(one.outcomes) for one in done] == [["e1", "e2", "e3"]] * 3
    assert all(report.base_round == one.number for one in done for report in one.reports)
    assert done[0].train_loss == pytest.approx(14 / 6)


def test_reports_come_in_the_order_of_the_profiles_not_of_names() -> None:
    (done,) = rounds_of(Adding(), 1, {"e3": {}, "e1": {}, "e2": {}})
    assert list(done.outcomes) == ["e3", "e1", "e2"]


def test_a_loop_goes_on_from_a_start() -> None:
    """Round 2 after a state of 100; nothing before it is run again."""
    (done,) = rounds_of(Adding(), 3, start=Start(Message({"x": torch.tensor([100.0])}), 2))
    assert done.number == 2
    assert done.state.tensors["x"].item() == pytest.approx(100 + 7 / 3)
    assert rounds_of(Adding(), 3, start=Start(done.state, 3)) == []


def test_messages_are_let_go() -> None:
    (done,) = rounds_of(Adding(), 1)
    assert all(report.fetch is None for report in done.reports)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("diverge", "diverged: loss nan"),
        ("memory", "out of memory: host memory"),
        ("bug", "KeyError: 'nothing there'"),
        ("nan", "its update has NaN or infinity in x"),
    ],
)
def test_a_lost_edge_does_not_stop_the_others(what: str, reason: str) -> None:
    """Without e3 a round adds (10 x 1 + 20 x 2) / 30 = 5/3; in round 1 it is back: 5/3 + 7/3."""
    first, second = rounds_of(Adding(fails={"e3@0": what}), 2)
    lost = first.outcomes["e3"]
    assert isinstance(lost, Lost)
    assert lost.reason == reason
    assert (lost.traceback is not None) == (what == "bug")
    assert lost.cost.bytes_down > 0
    assert list(first.outcomes) == ["e1", "e2", "e3"]
    assert first.state.tensors["x"].item() == pytest.approx(5 / 3)
    assert second.state.tensors["x"].item() == pytest.approx(4)
    assert len(second.reports) == 3


def test_when_all_are_lost_the_loop_says_why() -> None:
    """In round 1: the state of round 0 was yielded before, and stands."""
    method = Adding(fails={"e1@1": "diverge", "e2@1": "memory", "e3@1": "nan"})
    fleet, server = fleet_of(method)
    loop = federate(method, fleet, server, rounds=3, seed=0, evaluate_every=0)
    assert next(loop).state.tensors["x"].item() == pytest.approx(7 / 3)
    with pytest.raises(AllEdgesLost) as caught:
        next(loop)
    reasons = ["diverged: loss nan", "out of memory: host memory", "its update has NaN or infinity in x"]
    assert caught.value.round == 1
    assert [one.reason for one in caught.value.lost] == reasons
    for name, reason in zip(("e1", "e2", "e3"), reasons, strict=True):
        assert f"edge {name}: {reason}" in str(caught.value)


def test_a_sampled_round_asks_only_those_drawn() -> None:
    done = rounds_of(Adding(), 20, fraction=0.34)
    assert {len(one.outcomes) for one in done} == {1}
    assert {name for one in done for name in one.outcomes} == {"e1", "e2", "e3"}
    again = rounds_of(Adding(), 20, fraction=0.34)
    assert [list(one.outcomes) for one in done] == [list(one.outcomes) for one in again]


def test_the_fleet_is_measured_every_so_often_and_at_the_end(run_file: Path) -> None:
    """Every 2 of 3 rounds: after the second and the last, on edges that have validation rows."""
    run = load(run_file, "local.steps=1", "rounds=3", "fleet.edges.b.data={validation: 0.0}")
    method = make_method(run.method)
    fleet = SerialFleet(run, method)
    fleet.open()
    server = server_site(run, method, [])
    done = list(federate(method, fleet, server, rounds=3, seed=0, evaluate_every=2))
    assert [list(one.evaluation) for one in done] == [[], ["a", "c"], ["a", "c"]]
    assert [bool(one.quality) for one in done] == [False, True, True]
    last = done[-1]
    assert last.quality["loss"] == pytest.approx((last.evaluation["a"]["loss"] + last.evaluation["c"]["loss"]) / 2)
