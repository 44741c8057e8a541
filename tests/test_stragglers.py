"""Over-selection, deadlines and traces: who is taken, when a round is over, what is counted; on both fleets.

The edges e1, e2, e3 take 0.5, 2 and 1 seconds (1 GFLOP at 2, 0.5 and 1 GFLOP/s; links so fast that they do not count),
add 1, 2 and 3 to the state and weigh 10, 20 and 30.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import assert_refused
from runs import fleet_of, here, load
from test_resume import assert_like, records
from toy_rounds import FAST, SPEEDS, Adding, toy_run

from fedpipe_ray.costs import Cost
from fedpipe_ray.errors import AllEdgesLost
from fedpipe_ray.fleet import Fleet
from fedpipe_ray.loop import Round, Start, awaited, closing, counts, federate, first_of, on_time
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Profile
from fedpipe_ray.traces import next_seconds, trace_fault

ONE = Message({"x": torch.zeros(1)}).total_bytes  # an order or an update: a float and its header
FLEETS = ["serial", "packed"]


class Noting:
    """A fleet that notes whose messages were fetched."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.fetched = fleet, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fleet, name)

    def run(self, orders: Mapping[str, Message], round: int) -> Iterator[Report | Lost]:
        for report in self.fleet.run(orders, round):
            if isinstance(report, Report):
                report.fetch = self.noting(report.edge, report.fetch)
            yield report

    def noting(self, edge: str, fetch: Any) -> Any:
        def noted() -> Message:
            self.fetched.append(edge)
            return fetch()

        return noted


def rounds_of(
    count: int, edges: Mapping[str, Any] = SPEEDS, kind: str = "serial", method: Adding | None = None, **options: Any
) -> tuple[list[Round], list[str]]:
    """(the rounds, whose messages were fetched)."""
    method = method or Adding()
    run = toy_run(edges)
    fleet = Noting(fleet_of(kind, run, method))
    try:
        fleet.open()
        server = server_site(run, method, [])
        return list(federate(method, fleet, server, rounds=count, seed=0, evaluate_every=0, **options)), fleet.fetched
    finally:
        fleet.close()


def x(done: Round) -> float:
    return float(done.state.tensors["x"])


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
    (done,), fetched = rounds_of(1, kind=kind, fraction=0.67, over_select=1.5)
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
    (done,), fetched = rounds_of(1, edges, fraction=0.67, over_select=1.5)
    assert [report.edge for report in done.reports] == fetched == ["e1", "e2"]
    assert done.outcomes["e3"].cost.bytes_up == ONE
    assert done.bytes_up == 3 * ONE


def test_a_lost_edge_is_none_of_the_first() -> None:
    """Without e1 the two first are e3 at 1 s and e2 at 2 s: (20 x 2 + 30 x 3) / 50 = 2.6."""
    (done,), _ = rounds_of(1, method=Adding(fails={"e1": "diverge"}), fraction=0.67, over_select=1.5)
    assert [report.edge for report in done.reports] == ["e2", "e3"]
    assert x(done) == pytest.approx(2.6)
    assert done.virtual_seconds == pytest.approx(2.0, abs=1e-6)


def test_too_few_reports_are_waited_for_until_the_last_is_lost() -> None:
    """Two are lost, so of the two that the round would use one is there, and the slowest, lost one ends the round."""
    (done,), _ = rounds_of(1, method=Adding(fails={"e2": "bug", "e3": "bug"}), fraction=0.67, over_select=1.5)
    assert [report.edge for report in done.reports] == ["e1"]
    assert done.virtual_seconds == pytest.approx(2.0, abs=1e-6)


def test_an_update_refused_among_the_first_leaves_one_fewer() -> None:
    """e3 sends NaN; e2's message was let go when e3 was taken."""
    (done,), _ = rounds_of(1, method=Adding(fails={"e3": "nan"}), fraction=0.67, over_select=1.5)
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
    (first, second), fetched = rounds_of(2, deadline_seconds=1.5)
    late = first.outcomes["e2"]
    assert isinstance(late, Lost)
    assert (late.status, late.reason) == ("late", "late: its report came at 2 s, after fleet.deadline_seconds: 1.5")
    assert fetched == ["e1", "e3", "e1", "e3"]
    assert (first.virtual_seconds, second.virtual_seconds, second.clock_seconds) == (1.5, 1.5, 3.0)
    assert (x(first), x(second)) == pytest.approx((2.5, 5.0))
    assert first.bytes_up == 2 * ONE


def test_nobody_waits_for_the_deadline_once_all_are_there() -> None:
    (done,), _ = rounds_of(1, deadline_seconds=60)
    assert len(done.reports) == 3
    assert done.virtual_seconds == pytest.approx(2.0, abs=1e-6)


def test_over_selection_ends_before_the_deadline_or_at_it() -> None:
    """With two wanted and 0.7 s, only e1 is in time."""
    (done,), _ = rounds_of(1, fraction=0.67, over_select=1.5, deadline_seconds=1.5)
    assert done.virtual_seconds == pytest.approx(1.0, abs=1e-6)
    (done,), _ = rounds_of(1, fraction=0.67, over_select=1.5, deadline_seconds=0.7)
    assert [report.edge for report in done.reports] == ["e1"]
    assert done.virtual_seconds == 0.7


def test_a_deadline_that_nobody_meets_says_what_each_needed() -> None:
    with pytest.raises(AllEdgesLost) as caught:
        rounds_of(1, deadline_seconds=0.1)
    assert "edge e3: late: its report came at 1 s, after fleet.deadline_seconds: 0.1" in str(caught.value)


# -- traces


@pytest.mark.parametrize(
    ("clock", "period", "expected"),
    [(0, None, 5), (5, None, 5), (7.5, None, 7.5), (10, None, 20), (29.5, None, 29.5), (30, None, math.inf),
     (30, 40, 45), (38, 40, 45), (47, 40, 47), (50, 40, 60), (70, 40, 85), (400, 40, 405)],
)  # fmt: skip
def test_when_a_trace_has_its_edge_there(clock: float, period: float | None, expected: float) -> None:
    """There in [5, 10) and [20, 30), and with a period of 40 also in [45, 50), [60, 70), [85, 90) and so on."""
    assert next_seconds([(5, 10), (20, 30)], period, clock) == expected


spans = st.lists(
    st.tuples(st.integers(0, 19), st.integers(1, 20)).filter(lambda one: one[0] < one[1]), min_size=1, max_size=4
)


@given(spans, st.integers(0, 100), st.booleans())
def test_traces_as_a_search_by_the_second_finds_it(trace: list[tuple[int, int]], clock: int, repeats: bool) -> None:
    """Whole seconds, period 20: the first second from the clock on that lies in an interval."""

    def inside(second: int) -> bool:
        second = second % 20 if repeats else second
        return any(start <= second < end for start, end in trace)

    expected = next((second for second in range(clock, clock + 41) if inside(second)), math.inf)
    assert next_seconds([(float(a), float(b)) for a, b in trace], 20.0 if repeats else None, float(clock)) == expected


@pytest.mark.parametrize(
    ("trace", "period", "says"),
    [([], None, "no interval"), ([(3.0, 3.0)], None, "[3, 3] must begin"), ([(-1.0, 3.0)], None, "[-1, 3] must begin"),
     ([(0.0, 30.0)], 24.0, "within the 24 s"), ([(0.0, 3.0)], 0.0, "must be above 0"), (None, 24.0, "must be a trace")],
)  # fmt: skip
def test_traces_that_cannot_be(trace: Any, period: float | None, says: str) -> None:
    assert says in (trace_fault(trace, period) or "")
    with pytest.raises(ValueError, match="trace"):
        Profile(trace=trace, trace_period_seconds=period)


def test_somebody_is_waited_for() -> None:
    """At 7 s neither is there; b comes at 8 s, a at 10 s. At 12 s both are there."""
    edges = {"a": Profile(trace=[(0.0, 5.0), (10.0, 20.0)]), "b": Profile(trace=[(8.0, 9.0), (11.0, 20.0)])}
    assert awaited(edges, 0, 0, 7.0) == (8.0, {"b": edges["b"]})
    assert awaited(edges, 0, 0, 12.0) == (12.0, edges)
    with pytest.raises(AllEdgesLost, match=r"edge b: its trace ended before the 20 s .* set trace_period_seconds"):
        awaited(edges, 0, 0, 20.0)


@pytest.mark.parametrize("kind", FLEETS)
def test_rounds_follow_the_traces(kind: str, ray_here: None) -> None:
    """e1 (0.5 s) is there in [0, 0.4) of every 3 s, e2 (2 s) in [0.4, 1) and e3 (1 s) in [2, 2.6).

    Round 1 asks e1 at 0 and ends at 0.5; round 2 asks e2 until 2.5; round 3 asks e3 until 3.5; at 3.5 it is 0.5 in the
    second lap, so that round 4 asks e2 until 5.5, round 5 e3 (2.5) until 6.5, and round 6 e2 until 8.5.
    """
    spans = {"e1": [[0, 0.4]], "e2": [[0.4, 1]], "e3": [[2, 2.6]]}
    edges = {name: {**SPEEDS[name], "trace": spans[name], "trace_period_seconds": 3} for name in SPEEDS}
    done, _ = rounds_of(6, edges, kind)
    assert [list(one.outcomes) for one in done] == [["e1"], ["e2"], ["e3"], ["e2"], ["e3"], ["e2"]]
    assert [one.clock_seconds for one in done] == pytest.approx([0.5, 2.5, 3.5, 5.5, 6.5, 8.5], abs=1e-6)
    assert [one.virtual_seconds for one in done] == pytest.approx([0.5, 2, 1, 2, 1, 2], abs=1e-6)
    (last,), _ = rounds_of(6, edges, kind, start=Start(done[4].state, 5, clock_seconds=done[4].clock_seconds))
    assert (last.clock_seconds, x(last)) == (done[5].clock_seconds, x(done[5]))


def test_waiting_counts_as_time() -> None:
    """e1 comes back at 4 s: the second round begins then, and takes the 3.5 s of waiting and 0.5 s of work."""
    edges = {"e1": {**SPEEDS["e1"], "trace": [[0, 0.1], [4, 9]]}}
    (first, second), _ = rounds_of(2, edges)
    assert (first.virtual_seconds, second.virtual_seconds) == pytest.approx((0.5, 4.0), abs=1e-6)
    assert second.clock_seconds == pytest.approx(4.5, abs=1e-6)


TRACES = "edge,from,to\na,0,0.01\nb,0s,10\nb,20,1h\nc,0,100ms\n"


def test_traces_from_a_file(run_file: Path) -> None:
    """Beside the run file, by edge, in seconds where no unit stands; written out in the run."""
    (run_file.parent / "traces.csv").write_text(TRACES)
    every = [f"fleet.edges.{edge}.{key}" for edge in "abc" for key in ("trace=traces.csv", "trace_period_seconds=2h")]
    edges = load(run_file, *every).fleet.edges
    assert {name: profile.trace for name, profile in edges.items()} == {
        "a": [(0.0, 0.01)], "b": [(0.0, 10.0), (20.0, 3600.0)], "c": [(0.0, 0.1)],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "fleet.edges.a.trace: no file traces.csv"),
        ("edge,from,to\nb,0,1\n", "fleet.edges.a.trace: traces.csv has no row of edge a; add one"),
        ("edge,start,to\na,0,1\n", "has no column from; its first line must be edge,from,to"),
        ("edge,from,to\na,5,1\n", "fleet.edges.a.trace: [5, 1] must begin at 0 or later, end after its beginning"),
        ("edge,from,to\na,0,1mile\n", "'1mile' is not a quantity in second"),
        ("edge,from,to\na,,1\n", "is not a quantity in second"),
    ],
)
def test_files_of_traces_that_cannot_be(
    content: str | None, says: str, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (run_file.parent / "traces.csv").write_text(content)
    assert_refused(capsys, "run", run_file, "fleet.edges.a.trace=traces.csv", says=says, out=tmp_path / "out")


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
