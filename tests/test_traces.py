"""Traces of when an edge is there: the next time, rounds that follow them on both fleets, and files of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import assert_refused
from runs import load
from toy_rounds import FLEETS, SPEEDS, noted_rounds, x

from fedpipe_ray.errors import AllEdgesLost
from fedpipe_ray.loop import Start, awaited
from fedpipe_ray.settings import Profile
from fedpipe_ray.traces import next_seconds, trace_fault


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
    done, _ = noted_rounds(6, edges, kind)
    assert [list(one.outcomes) for one in done] == [["e1"], ["e2"], ["e3"], ["e2"], ["e3"], ["e2"]]
    assert [one.clock_seconds for one in done] == pytest.approx([0.5, 2.5, 3.5, 5.5, 6.5, 8.5], abs=1e-6)
    assert [one.virtual_seconds for one in done] == pytest.approx([0.5, 2, 1, 2, 1, 2], abs=1e-6)
    (last,), _ = noted_rounds(6, edges, kind, start=Start(done[4].state, 5, clock_seconds=done[4].clock_seconds))
    assert (last.clock_seconds, x(last)) == (done[5].clock_seconds, x(done[5]))


def test_waiting_counts_as_time() -> None:
    """e1 comes back at 4 s: the second round begins then, and takes the 3.5 s of waiting and 0.5 s of work."""
    edges = {"e1": {**SPEEDS["e1"], "trace": [[0, 0.1], [4, 9]]}}
    (first, second), _ = noted_rounds(2, edges)
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
