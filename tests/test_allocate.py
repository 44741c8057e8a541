"""Allocations: the structured space, its gap to the exact optimum, the front, and a run file that can be run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from demands_made import choice, demand
from runs import here, load, records

from fedpipe_ray.errors import UserError
from fedpipe_ray.planning import RANKS, Allocation, Key, exact, given
from fedpipe_ray.settings import Profile
from tuning.allocate import NEAR, front, gap, search
from tuning.allocation import planners
from tuning.surrogate import Budget, Surrogate, classes_of, ranks_of

KEYS = [Key(f"{layer}.{kind}", kind, layer, 8, 8) for layer in range(4) for kind in ("q", "v")]
SCORES = np.array([0.2, 0.05] * 4)


def surrogate(budget: Budget, capacity: float = 400.0) -> Surrogate:
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
        one = demand(choices, capacity_bytes=capacity, transfer_seconds_rank=0.01, batch=4)
        edges[name] = dataclasses.replace(one, edge=name)
    profiles = {"slow": Profile(compute_flops=1e9), "fast": Profile(compute_flops=2e9)}
    return Surrogate(
        KEYS, list(edges.values()), dict.fromkeys(edges, SCORES), profiles, budget, lam=2.0, steps="filled", rank=16
    )


def test_ranks_fall_with_importance() -> None:
    """q has 4 times the importance a parameter of v: two levels at fall 1, none at fall 0. Level 4 is rank 8."""
    layers, density = np.array([0.125, 0.125, 0.875, 0.875]), np.array([0.0, -2.0, 0.0, -2.0])
    assert ranks_of(layers, density, 4, 1) == [8, 2, 8, 2]
    assert ranks_of(layers, density, 4, 0) == [8, 8, 8, 8]
    assert ranks_of(layers, density, 3.5, 1) == [4, 1, 8, 2]  # the upper half of the layers has the higher level
    assert ranks_of(layers, density, 0, 2) == [0, 0, 0, 0]


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


@pytest.mark.services
def test_from_a_run_file_to_a_run(run_file: Path, tmp_path: Path) -> None:
    """Searched, two of the front measured, and the chosen one run: every edge does what it was given."""
    out = tmp_path / "out"
    run_file.write_text(run_file.read_text().replace("{name: lora, rank: 4, alpha: 8}", "{name: fedpipe, rank: 4}"))
    options = ["--latency", "30s", "--memory-from-profiles", "--trials", "20", "--measure", "2"]
    assert here("allocate", run_file, *options, "--out", out) == 0
    chosen = load(out / "allocation.yaml")
    assert set(chosen.method["plans"]) == {"a", "b", "c"}
    assert chosen.method["deadline_seconds"] == 30
    assert here("run", out / "allocation.yaml", "--out", tmp_path / "run") == 0
    assert [record["edges"]["a"]["status"] for record in records(tmp_path / "run")] == ["ok", "ok"]
    assert all(record["virtual_seconds"] <= 30 for record in records(tmp_path / "run"))
