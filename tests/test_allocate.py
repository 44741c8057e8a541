"""Allocations: the structured space, its gap to the exact optimum, the front, and those that go on to be measured."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaigns_made import QUIET, Curves
from demands_made import choice, demand
from runs import load

from fedpipe_ray.errors import UserError
from fedpipe_ray.planning import RANKS, Allocation, Key, exact, given
from fedpipe_ray.settings import Profile
from tuning.allocate import NEAR, front, gap, ranked, search
from tuning.allocation import planners
from tuning.pareto import Pareto, figure_of
from tuning.promotion import Measured, measure, promoted
from tuning.surrogate import Budget, Surrogate, classes_of, ranks_of

KEYS = [Key(f"{layer}.{kind}", kind, layer, 8, 8) for layer in range(4) for kind in ("q", "v")]
SCORES = np.array([0.2, 0.05] * 4)


def surrogate(budget: Budget, capacity: float = 400.0, **sent: Any) -> Surrogate:
    """Two edges of unlike speed. A unit of rank takes a byte, 16 bits take 72 bytes more than 4 bits, and no time."""
    edges = {}
    for name, speed in (("slow", 2.0), ("fast", 1.0)):
        choices = [
            choice(
                8,
                bits=bits,
                batch=batch,
                memory_bytes=6.0 * bits + batch,
                memory_bytes_rank=1,
                step_seconds=speed * batch,
            )
            for bits in (4, 16)
            for batch in (1, 2, 4)
        ]
        one = demand(choices, capacity_bytes=capacity, transfer_seconds_rank=0.01, batch=4, max_rank=16)
        edges[name] = dataclasses.replace(one, edge=name)
    profiles = {"slow": Profile(compute_flops=1e9), "fast": Profile(compute_flops=2e9)}
    return Surrogate(
        KEYS, list(edges.values()), dict.fromkeys(edges, SCORES), profiles, budget, lam=2.0, steps="filled", rank=16,
        **sent,
    )  # fmt: skip


def test_bytes_count_the_head_and_what_a_codec_makes_of_an_update() -> None:
    """An update in half of the bytes: so are its factors and its head, not what the edge is sent."""
    width = np.array([key.d_in + key.d_out for key in KEYS], float)
    plain, coded = surrogate(Budget(100.0)), surrogate(Budget(100.0), upload=2 * width, whole=10)
    plan = Allocation(16, 4, {key.name: 2 for key in KEYS})
    down, up = 4 * 16 * width.sum(), 4 * 2 * width.sum()
    assert plain.outcome([plain.plan("slow", plan)]).bytes_round == down + up
    assert coded.outcome([coded.plan("slow", plan)]).bytes_round == pytest.approx(down + 40 + up / 2 + 20)


def test_ranks_fall_with_importance() -> None:
    """q has 4 times the importance a parameter of v: two levels at fall 1, none at fall 0. Level 4 is rank 8."""
    layers, density = np.array([0.125, 0.125, 0.875, 0.875]), np.array([0.0, -2.0, 0.0, -2.0])
    assert ranks_of(layers, density, 4, 1) == [8, 2, 8, 2]
    assert ranks_of(layers, density, 4, 0) == [8, 8, 8, 8]
    assert ranks_of(layers, density, 3.5, 1) == [4, 1, 8, 2]  # the upper half of the layers has the higher level
    assert ranks_of(layers, density, 0, 2) == [0, 0, 0, 0]
    assert ranks_of(layers, density, 4, 0, levels=4) == [4, 4, 4, 4]  # of 0, 1, 2, 4


def test_no_rank_is_above_the_highest_that_an_edge_may_have() -> None:
    """At the top of the space the upper layers round up, from level 4, rank 8, to one that there is not."""
    problem = surrogate(Budget(100.0))
    for name, edges in problem.classes.items():
        highest = max(problem.starts(name), key=lambda point: point["top"])
        most = problem.allocation(name, {**highest, "top": float(problem.levels(name)), "fall": 0.0})
        assert max(most.ranks.values()) == problem.demands[edges[0]].max_rank


def test_edges_of_one_profile_are_a_class() -> None:
    one, other = Profile(compute_flops=1e9), Profile(compute_flops=2e9)
    assert classes_of({"a": one, "b": other, "c": dataclasses.replace(one, data="x")}) == {"a": ["a", "c"], "b": ["b"]}


@pytest.mark.parametrize("capacity", [60.0, 140.0, 400.0])
def test_the_structured_space_reaches_the_optimum(capacity: float) -> None:
    """200 trials of five numbers come within 2 %, where as many of a rank for each weight do not come nearer."""
    problem = surrogate(Budget(100.0), capacity)
    optimum = problem.optimum()
    structured, free = (search(problem, 200, "tpe", free=free) for free in (False, True))
    assert gap(structured.curve[-1], optimum) <= 0.02
    assert gap(structured.curve[-1], optimum) >= -1e-3  # nothing is better than the optimum, to its tolerance
    assert structured.curve[-1] >= free.curve[-1] - 1e-9
    best = structured.candidate()
    assert best is not None
    assert best.outcome.feasible


def test_the_front_trades_quality_for_costs() -> None:
    found = search(surrogate(Budget(100.0)), 100, "random")
    points = front(found)
    costs = [(-p.outcome.quality, p.outcome.seconds, p.outcome.memory_bytes, p.outcome.bytes_round) for p in points]
    assert len(points) > 2
    assert not any(a != b and all(x <= y for x, y in zip(a, b)) for a in costs for b in costs)
    assert 0 <= found.curve[-1] - points[0].outcome.quality <= NEAR * points[0].outcome.worth
    assert all(point.outcome.feasible for point in points)


def test_the_largest_batch_is_taken_that_costs_little() -> None:
    """Rows count, not batches: without that rule a batch of one row is as good as any."""
    problem = surrogate(Budget(100.0))
    found = search(problem, 100, "random")
    for name, pairs in found.points.items():
        top = max((outcome for _, outcome in pairs if outcome.feasible), key=lambda outcome: outcome.quality)
        best = found.best(name)
        assert best is not None
        point, outcome = best
        assert outcome == problem.of_class(name, point)
        assert outcome.feasible
        assert outcome.quality >= top.quality - NEAR * top.worth
        assert point["batch"] == 2  # the largest of three: nothing but its two bytes speaks against it


def test_the_planners_own_plan_is_a_candidate_where_it_keeps_the_budget() -> None:
    problem = surrogate(Budget(100.0))
    plans = {e: exact(KEYS, one, SCORES, 100.0, 2.0, steps="filled") for e, one in problem.demands.items()}
    own = planners(problem, plans)
    assert own is not None
    assert own.outcome.quality == pytest.approx(problem.optimum().quality)
    assert planners(surrogate(Budget(100.0, 10.0)), plans) is None
    assert planners(problem, {**plans, "slow": dataclasses.replace(plans["slow"], depth=1)}) is None


@pytest.mark.parametrize(
    ("budget", "message"), [(Budget(1.0), "misses latency by"), (Budget(100.0, 10.0), "misses bytes by")]
)
def test_a_budget_that_nothing_keeps_is_named(budget: Budget, message: str) -> None:
    with pytest.raises(UserError, match=f"edge slow: no trial keeps the budget; the nearest {message}"):
        search(surrogate(budget), 30, "random")


def test_an_allocation_that_adapts_nothing_keeps_no_budget() -> None:
    """Sent are 4 x 16 x 128 bytes, and back 64 for rank 1 on one weight: 8,255 bytes are one too few, 8,256 enough."""
    problem = surrogate(Budget(100.0, 8255.0))
    nothing = problem.of_class("slow", {"bits": 0, "batch": 0, "top": 0.0, "fall": 0.0, "keep": 1.0})
    assert nothing.misses == {**nothing.misses, "bytes": -63.0, "ranks": 1.0}
    assert not nothing.feasible
    with pytest.raises(UserError, match="edge slow: no trial keeps the budget; the nearest misses bytes by 1e-06 MB"):
        search(problem, 60, "random")
    with pytest.raises(UserError, match="edge slow: no trial keeps the budget, and rank 1 on one weight does"):
        search(surrogate(Budget(100.0, 8256.0)), 12, "random")


def test_what_is_given_is_what_is_planned() -> None:
    edge = demand([choice(8, bits=8, batch=2, memory_bytes_rank=1)], capacity_bytes=180.0)
    plan = given(KEYS, edge, SCORES, 100.0, Allocation(8, 2, {"q": 8, "3.v": 2}))
    assert plan.ranks == {"0.q": 8, "1.q": 8, "2.q": 8, "3.q": 8, "3.v": 2}
    assert (plan.bits, plan.batch, plan.memory_bytes) == (8, 2, 134)
    with pytest.raises(ValueError, match="no choice of 4 bits and batch 2; there are bits 8 and batches 2"):
        given(KEYS, edge, SCORES, 100.0, Allocation(4, 2, {"q": 8}))
    with pytest.raises(ValueError, match="no weight or kind x"):
        given(KEYS, edge, SCORES, 100.0, Allocation(8, 2, {"x": 8}))
    with pytest.raises(ValueError, match="give it fewer bits, a smaller batch"):
        given(KEYS, edge, SCORES, 100.0, Allocation(8, 2, {"q": 32, "v": 32}))
    tight = demand([choice(8, bits=8, batch=n, memory_bytes=30 * n, memory_bytes_rank=1) for n in (1, 2, 4)])
    tight = dataclasses.replace(tight, capacity_bytes=130.0)  # 4 q of rank 8 take 32
    told = [given(KEYS, tight, SCORES, 100.0, Allocation(8, 4, {"q": rank}), firm=False) for rank in (8, 16)]
    assert [(plan.batch, plan.memory_bytes) for plan in told] == [(2, 92), (2, 124)]  # of what was found by a formula
    with pytest.raises(ValueError, match=f"must be some of {', '.join(map(str, RANKS))}"):
        Allocation(8, 2, {"q": 3})


def test_the_planners_own_stands_among_the_others() -> None:
    """Of rows that it beats in all four none is left; where one beats it, it stays, and the caption says by which."""
    problem = surrogate(Budget(100.0))
    found = front(search(problem, 100, "random"))
    own = dataclasses.replace(found[0], outcome=dataclasses.replace(found[0].outcome, bytes_round=1.0))
    rows, at = ranked(found, own)
    assert at == 0
    assert found[0] not in rows
    assert Pareto(rows, problem.classes, 0, at).caption.endswith("in all four; FedPipe's own planner gives 1")
    last = found[-1].outcome
    worse = dataclasses.replace(found[-1], outcome=dataclasses.replace(last, seconds=last.seconds + 1))
    rows, at = ranked(found, worse)
    assert (at, len(rows)) == (len(found), len(found) + 1)
    said = f"and what FedPipe's own planner gives {len(rows)}, which {len(found)} beats"
    assert Pareto(rows, problem.classes, 0, at).caption.endswith(said)
    assert ranked(found, None) == (found, None)


def test_the_page_names_every_point() -> None:
    """A row's number at each point, all about it on hover, and the chosen and the planner's own told apart."""
    problem = surrogate(Budget(100.0))
    rows, own = ranked(front(search(problem, 60, "random")), None)
    shown = Pareto(rows, problem.classes, 1, 2, {1: Measured(2.5, 3, 3), 2: Measured(2.75, 1, 3)})
    figure = figure_of(shown)
    assert len(figure.data) == 9  # three roles over three costs
    assert sorted(int(text) for trace in figure.data[:3] for text in trace.text) == list(range(1, len(rows) + 1))
    marked = {trace.name: (list(trace.text), trace.marker.symbol) for trace in figure.data[:3]}
    assert marked["chosen"] == (["2"], "star")
    assert marked["FedPipe's own planner"] == (["3"], "diamond")
    (said,) = figure.data[1].hovertext
    assert said.startswith("3: FedPipe&#x27;s own planner<br>quality ")
    assert "loss 2.7500, stopped after 1 of 3<br>slow: " in said
    assert "bits, batch " in said
    assert own is None


def test_no_place_on_the_front_is_favoured() -> None:
    """The best, the planner's own, and others in even steps between; all where there are no more than asked for."""
    assert promoted(13, 12, 2) == [0, 12]
    assert promoted(13, 12, 3) == [0, 6, 12]
    assert promoted(13, 4, 5) == [0, 2, 4, 7, 11]
    assert promoted(12, None, 4) == [0, 2, 6, 10]
    assert promoted(9, 0, 3) == [0, 3, 7]
    assert promoted(3, 1, 8) == [0, 1, 2]


def measured_by(curves: dict[int, list[float]], run_file: Path, folder: Path) -> dict[int, Measured]:
    """What runs with these losses by round give; a run's seed is its number."""
    keys = ("evaluate.patience=1", "evaluate.target=9")  # which would end runs that are to be compared
    runs = {at: load(run_file, f"seed={at}", f"rounds={len(curve)}", *keys) for at, curve in curves.items()}
    executor = Curves(lambda run: curves[run.seed][: run.rounds if run.evaluate.patience is None else 1])
    return measure(runs, folder, lambda: executor, QUIET)


def test_only_runs_that_did_all_rounds_compete(run_file: Path, tmp_path: Path) -> None:
    """2.60 -> 2.75 is beaten by 2.65 -> 2.70, not by 2.68 after one round; the first has no advantage."""
    found = measured_by({1: [2.60, 2.75], 4: [2.65, 2.70], 7: [2.68, 1.0]}, run_file, tmp_path / "a")
    assert found == {1: Measured(2.75, 2, 2), 4: Measured(2.70, 2, 2), 7: Measured(2.68, 1, 2)}
    assert [one.counts for one in found.values()] == [True, True, False]
    found = measured_by({1: [3.0, 0.0], 4: [2.0, 2.0], 7: [1.0, 1.0]}, run_file, tmp_path / "b")
    assert found[1] == Measured(3.0, 1, 2)
    assert sorted(path.parent.parent.name for path in tmp_path.glob("b/*/trials/0001.jsonl")) == [
        "1-rounds",
        "2-rounds",
    ]


def test_a_third_goes_on_and_ties_all_do(run_file: Path, tmp_path: Path) -> None:
    """9 runs of 9 rounds: 3 go on after 1 round, 2 after 3; of 4 with equal losses none is stopped."""
    curves = {at: [float(at)] * 9 for at in range(1, 10)}
    found = measured_by(curves, run_file, tmp_path / "a")
    assert [one.rounds for one in found.values()] == [9, 9, 3, 1, 1, 1, 1, 1, 1]
    found = measured_by({at: [1.0] * 3 for at in range(1, 5)}, run_file, tmp_path / "b")
    assert {one.rounds for one in found.values()} == {3}
    found = measured_by({1: [math.inf] * 3, 2: [2.0] * 3, 3: [3.0] * 3}, run_file, tmp_path / "c")
    assert [one.rounds for one in found.values()] == [1, 3, 3]
    with pytest.raises(UserError, match="none of the measured runs has a loss after 1 rounds"):
        measured_by({1: [math.inf] * 3, 2: [math.inf] * 3, 3: [math.inf] * 3}, run_file, tmp_path / "d")


def test_a_sampler_without_constraints_does_not_warn_at_every_trial() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        search(surrogate(Budget(100.0)), 30, "cmaes")
    assert [str(one.message) for one in seen] == []
