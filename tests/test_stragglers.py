"""Over-selection and deadlines: who is taken, when a round is over, what is counted; on both fleets.

The edges e1, e2, e3 take 0.5, 2 and 1 seconds (1 GFLOP at 2, 0.5 and 1 GFLOP/s; links so fast that they do not count),
add 1, 2 and 3 to the state and weigh 10, 20 and 30.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import assert_like, here, records
from toy_rounds import FAST, FLEETS, Adding, noted_rounds, x

from fedpipe_ray.costs import Cost
from fedpipe_ray.errors import AllEdgesLost
from fedpipe_ray.loop import closing, counts, first_of, on_time
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report

ONE = Message({"x": torch.zeros(1)}).total_bytes  # an order or an update: a float and its header


# -- over-selection


@pytest.mark.parametrize(
    ("there", "fraction", "factor", "used", "asked"),
    [(10, 0.5, 1.0, 5, 5), (10, 0.5, 1.25, 5, 7), (10, 0.5, 3.0, 5, 10), (10, 1.0, 1.5, 10, 10), (10, 0.01, 1.3, 1, 2),
     (100, 0.1, 1.1, 10, 11), (1, 1.0, 2.0, 1, 1)],
)  # fmt: skip
def test_how_many_are_used_and_asked(there: int, fraction: float, factor: float, used: int, asked: int) -> None:
    """6.25 is 7, 1.1 x 10 is 11 and not 12, and no more than there are."""
    assert counts(there, fraction, factor) == (used, asked)


@pytest.mark.parametrize("kind", FLEETS)
def test_the_first_two_of_three(kind: str, ray_here: None) -> None:
    """e1 at 0.5 s and e3 at 1 s end the round: (10 x 1 + 30 x 3) / 40 = 2.5. e2, at 2 s, was cut off in its upload."""
    (done,), fetched = noted_rounds(1, kind=kind, fraction=0.67, over_select=1.5)
    late = done.outcomes["e2"]
    assert isinstance(late, Lost)
    assert late.status == "late"
    assert late.reason == "late: its report came at 2 s, after the 2 that the round uses, the last at 1 s"
    assert list(done.outcomes) == ["e1", "e2", "e3"]
    assert fetched == ["e1", "e3"]
    assert x(done) == pytest.approx(2.5)
    assert done.virtual_seconds == done.clock_seconds == pytest.approx(1.0, abs=1e-6)
    assert (late.cost.bytes_down, late.cost.bytes_up, late.cost.flops) == (ONE, 0, 1e9)
    assert (done.bytes_down, done.bytes_up) == (3 * ONE, 2 * ONE)


def test_equal_times_go_by_name_and_their_uploads_count() -> None:
    """All at 1 s: e1 and e2, though e3 stands first; its upload was complete when the round was over."""
    edges = {name: {**FAST, "compute_flops": "1GFLOP/s"} for name in ("e3", "e1", "e2")}
    (done,), fetched = noted_rounds(1, edges, fraction=0.67, over_select=1.5)
    assert [report.edge for report in done.reports] == fetched == ["e1", "e2"]
    assert done.outcomes["e3"].cost.bytes_up == ONE
    assert done.bytes_up == 3 * ONE


def test_a_lost_edge_is_none_of_the_first() -> None:
    """Without e1 the two first are e3 at 1 s and e2 at 2 s: (20 x 2 + 30 x 3) / 50 = 2.6."""
    (done,), _ = noted_rounds(1, method=Adding(fails={"e1": "diverge"}), fraction=0.67, over_select=1.5)
    assert [report.edge for report in done.reports] == ["e2", "e3"]
    assert x(done) == pytest.approx(2.6)
    assert done.virtual_seconds == pytest.approx(2.0, abs=1e-6)


def test_too_few_reports_are_waited_for_until_the_last_is_lost() -> None:
    """Two are lost, so of the two that the round would use one is there, and the slowest, lost one ends the round."""
    (done,), _ = noted_rounds(1, method=Adding(fails={"e2": "bug", "e3": "bug"}), fraction=0.67, over_select=1.5)
    assert [report.edge for report in done.reports] == ["e1"]
    assert done.virtual_seconds == pytest.approx(2.0, abs=1e-6)


def test_an_update_refused_among_the_first_leaves_one_fewer() -> None:
    """e3 sends NaN; e2's message was let go when e3 was taken."""
    (done,), _ = noted_rounds(1, method=Adding(fails={"e3": "nan"}), fraction=0.67, over_select=1.5)
    assert {name: getattr(one, "status", "ok") for name, one in done.outcomes.items()} == {
        "e1": "ok", "e2": "late", "e3": "lost"
    }  # fmt: skip
    assert done.virtual_seconds == pytest.approx(1.0, abs=1e-6)
    assert done.bytes_up == 2 * ONE


seconds = st.floats(0, 1e6)
fleets = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), seconds | st.none(), min_size=1, max_size=12)


def outcomes_of(times: Mapping[str, float | None]) -> list[Report | Lost]:
    """A report at each time; who has none is lost."""
    return [
        Lost(edge, "gone") if time is None
        else Report(edge, 0, 1.0, 0.0, Cost(virtual_seconds=time, bytes_up=1), fetch=Message)
        for edge, time in times.items()
    ]  # fmt: skip


@given(fleets, st.integers(1, 12), st.floats(0.1, 1e6) | st.just(math.inf), st.randoms())
def test_who_is_taken(times: dict[str, float | None], count: int, deadline: float, shuffle: Any) -> None:
    """The first by (time, name) of those on time; in whatever order they were asked, each outcome once, in that order.

    The round is over when the last of them is there, or at the deadline; nothing that is counted was sent later.
    """
    punctual = sorted((time, edge) for edge, time in times.items() if time is not None and time <= deadline)
    wanted = {edge for _, edge in punctual[:count]}
    asked = list(times)
    for _ in range(2):
        found = list(first_of(on_time(outcomes_of({edge: times[edge] for edge in asked}), deadline), count))
        assert [one.edge for one in found] == asked
        taken = {one.edge for one in found if isinstance(one, Report)}
        assert taken == wanted
        assert all((one.fetch is not None) == (one.edge in wanted) for one in found if isinstance(one, Report))
        late = {one.edge for one in found if isinstance(one, Lost) and one.status == "late"}
        assert late == {edge for edge, time in times.items() if time is not None} - wanted
        closed = closing({one.edge: one for one in found}, count, deadline)
        assert closed <= deadline
        assert closed >= max((times[edge] for edge in taken), default=0.0)
        assert all(one.cost.virtual_seconds <= closed for one in found if one.cost.bytes_up)
        shuffle.shuffle(asked)


# -- deadline


def test_reports_after_the_deadline_are_dropped() -> None:
    """At 1.5 s e1 and e3 are there, as above; the round lasts until then, for the server waits for e2."""
    (first, second), fetched = noted_rounds(2, deadline_seconds=1.5)
    late = first.outcomes["e2"]
    assert isinstance(late, Lost)
    assert (late.status, late.reason) == ("late", "late: its report came at 2 s, after fleet.deadline_seconds: 1.5")
    assert fetched == ["e1", "e3", "e1", "e3"]
    assert (first.virtual_seconds, second.virtual_seconds, second.clock_seconds) == (1.5, 1.5, 3.0)
    assert (x(first), x(second)) == pytest.approx((2.5, 5.0))
    assert first.bytes_up == 2 * ONE


def test_nobody_waits_for_the_deadline_once_all_are_there() -> None:
    (done,), _ = noted_rounds(1, deadline_seconds=60)
    assert len(done.reports) == 3
    assert done.virtual_seconds == pytest.approx(2.0, abs=1e-6)


def test_over_selection_ends_before_the_deadline_or_at_it() -> None:
    """With two wanted and 0.7 s, only e1 is in time."""
    (done,), _ = noted_rounds(1, fraction=0.67, over_select=1.5, deadline_seconds=1.5)
    assert done.virtual_seconds == pytest.approx(1.0, abs=1e-6)
    (done,), _ = noted_rounds(1, fraction=0.67, over_select=1.5, deadline_seconds=0.7)
    assert [report.edge for report in done.reports] == ["e1"]
    assert done.virtual_seconds == 0.7


def test_a_deadline_that_nobody_meets_says_what_each_needed() -> None:
    with pytest.raises(AllEdgesLost) as caught:
        noted_rounds(1, deadline_seconds=0.1)
    assert "edge e3: late: its report came at 1 s, after fleet.deadline_seconds: 0.1" in str(caught.value)


# -- whole runs


@pytest.mark.parametrize(
    "overrides",
    [
        ("fleet.fraction=0.67", "fleet.over_select=1.5", "method.name=own_methods:Counting"),
        ("fleet.deadline_seconds=100ms", "fleet.over_select=1.2", "fleet.fraction=0.67"),
        (
            "fleet.edges.a.trace=traces.csv",
            "fleet.edges.b.trace=[[0,60ms],[200ms,220ms]]",
            "fleet.edges.c.trace=traces.csv",
        ),
    ],
    ids=["over-selection-private-states", "deadline", "traces"],
)
def test_a_run_that_goes_on_has_the_same_bits(overrides: tuple[str, ...], run_file: Path, tmp_path: Path) -> None:
    (run_file.parent / "traces.csv").write_text("edge,from,to\na,0,1\nc,80ms,1h\n")
    whole, folder = tmp_path / "whole", tmp_path / "run"
    overrides = (*overrides, "local.schedule=constant")
    assert here("run", run_file, *overrides, "rounds=6", "--out", whole) == 0
    assert here("run", run_file, *overrides, "rounds=3", "--out", folder) == 0
    (run_file.parent / "traces.csv").unlink()  # config.yaml holds what was in it
    assert here("resume", folder, "rounds=6") == 0
    assert_like(folder, whole)
    lines = records(whole)
    statuses = {edge["status"] for line in lines for edge in line["edges"].values()}
    asked = {tuple(line["edges"]) for line in lines}
    assert ("late" in statuses) == ("trace" not in str(overrides))
    assert len(asked) > 1 or "trace" not in str(overrides)
