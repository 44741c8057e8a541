"""Plans of edges against numbers derived by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from demands_made import choice, demand

from fedpipe_ray.planning import (
    Choice,
    EdgePlan,
    Key,
    best,
    count_steps,
    exact,
    greedy,
    median_deadline,
    plan,
    search_deadline,
    uniform,
)

A, B = (Key(name, name, 0, 8, 8) for name in "ab")
SOLVERS = {"exact": exact, "greedy": greedy, "uniform": uniform}


@pytest.mark.parametrize("solver", ["exact", "greedy"])
def test_memory_goes_to_the_best_gain_per_byte(solver: str) -> None:
    """Scores 3 and 1, 10 free bytes, 1 byte a unit of rank. Gains a byte of the steps to ranks 1, 2, 4, 8:

    a 3, 1.75, 1.11, 0.64; b 1, 0.58, 0.37, 0.21: so a1 a2 a4 b1 a8 b2, 10 bytes. 3 log2 9 + log2 3 = 11.095; the next
    best, (4, 4), has 3 log2 5 + log2 5 = 9.288.
    """
    edge = demand([choice(memory_bytes_rank=1)], capacity_bytes=110.0)
    found = SOLVERS[solver]([A, B], edge, np.array([3.0, 1.0]), 10.0)
    assert found.ranks == {"a": 8, "b": 2}
    assert found.value == pytest.approx(3 * math.log2(9) + math.log2(3))
    assert (found.memory_bytes, found.under_training, found.seconds) == (110, 0, 10)


@pytest.mark.parametrize(
    ("lam", "rank", "value"), [(10, 1, 1 - 10 / 11), (7, 2, math.log2(3) - 7 / 6), (4, 32, math.log2(33) - 4 * 32 / 42)]
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_seconds_cost_what_they_leave_untrained(solver: str, lam: float, rank: int, value: float) -> None:
    """One weight of score 1, 10 s without adapter, deadline 10 s, 1 s a unit of rank: u = r / (10 + r).

    log2(1 + r) - lam u at r = 1, 2, 4, 8, 16, 32: lam 10: 0.09 -0.08 -0.54 -1.27 -2.07 -2.57; lam 7: 0.36 0.42 0.32
    0.06 -0.22 -0.29; lam 4: 0.64 0.92 1.18 1.39 1.63 2.00.
    """
    edge = demand([choice(1)], transfer_seconds_rank=1)
    found = SOLVERS[solver]([A], edge, np.array([1.0]), 10.0, lam)
    assert found.ranks == {"a": rank}
    assert found.value == pytest.approx(value)
    assert found.under_training == pytest.approx(rank / (10 + rank))
    assert found.planned_seconds == 10 + rank


def test_square_roots_reward_high_ranks_more() -> None:
    """Free bytes 16, scores 3 and 1: sqrt: (8, 8) 4 x 2.83 = 11.31; (8, 4) 10.49; (4, 8) 8.83; (16, 0) 12."""
    edge = demand([choice(memory_bytes_rank=1)], capacity_bytes=116.0)
    assert exact([A, B], edge, np.array([3.0, 1.0]), 10.0, gain="sqrt").ranks == {"a": 16}
    assert exact([A, B], edge, np.array([3.0, 1.0]), 10.0).ranks == {"a": 8, "b": 8}  # 4 x 3.17 = 12.7; 3 x 4.09 = 12.3


def test_a_fixed_cost_is_paid_once() -> None:
    """A weight costs 8 bytes and 1 a unit of rank. 24 free: one at 16 has 4.09, two at 4 have 4.64 at the same 24."""
    edge = demand([choice(memory_bytes_rank=1, memory_bytes_key=8)], capacity_bytes=124.0)
    assert exact([A, B], edge, np.ones(2), 10.0).ranks == {"a": 4, "b": 4}
    edge = replace(edge, capacity_bytes=117.0)  # two at 1 need 18; one at 8 needs 16
    found = greedy([A, B], edge, np.ones(2), 10.0)
    assert list(found.ranks.values()) == [8]
    assert found.memory_bytes == 116


def test_greedy_finds_the_one_choice_that_fits() -> None:
    """Rank 1 of a needs 9 bytes, of b 5: in 108 bytes only the last choice has room, and for b alone."""
    choices = [choice(bits=4 + n, memory_bytes=103.0 + (n < 3), memory_bytes_key=[9, 5]) for n in range(4)]
    found = greedy([A, B], demand(choices, capacity_bytes=108.0), np.array([9.0, 1]), 10.0)
    assert (found.bits, found.ranks) == (7, {"b": 32})


def test_depth_keeps_to_the_top_layers() -> None:
    keys = [Key(f"{n}", "q", n, 8, 8) for n in range(4)]
    edge = demand([choice(4, depth=2)])
    for solver in (exact, greedy, uniform, best):
        assert solver(keys, edge, np.array([9.0, 9, 1, 1]), 10.0).ranks == {"2": 32, "3": 32}


@pytest.mark.parametrize("solver", SOLVERS)
def test_ties_go_to_less_under_training_then_bits_then_batch(solver: str) -> None:
    """At lam 0 all these have the value 2 log2 33. 10 steps; deadline 10 s."""
    scores = np.ones(2)

    def chosen(*choices: Choice) -> tuple[int, int]:
        found = SOLVERS[solver]([A, B], demand(choices), scores, 10.0, 0.0)
        return found.bits, found.batch

    slow = choice(step_seconds=2.0)
    assert chosen(slow, choice(bits=4)) == (4, 1)  # u is 1/2 and 0
    assert chosen(choice(bits=4, batch=8), choice(bits=8), choice(bits=8, step_seconds=0.5)) == (8, 1)
    assert chosen(choice(batch=2), choice(batch=4), choice(batch=1), choice(bits=8, batch=8)) == (16, 4)


def test_a_smaller_batch_plans_more_steps_for_the_same_samples() -> None:
    """10 steps of batch 8 are 80 samples: 27 steps of batch 3."""
    found = exact([A, B], demand([choice(batch=3)], batch=8), np.ones(2), 10.0)
    assert (found.steps, found.planned_seconds) == (27, 27)
    assert found.under_training == pytest.approx(17 / 27)
    assert exact([A, B], demand([choice(batch=3)]), np.ones(2), 10.0).steps == 10


@pytest.mark.parametrize(
    ("mode", "fit", "steps"),
    [("equal", 5, 10), ("equal", 50, 10), ("capped", 5.9, 5), ("capped", 50, 10), ("capped", 1, 3), ("filled", 5.9, 5),
     ("filled", 50, 50), ("filled", 99, 80), ("filled", -2, 3), ("filled", math.inf, 80), ("filled", 6 - 1e-12, 6)],
)  # fmt: skip
def test_steps(mode: str, fit: float, steps: int) -> None:
    """10 planned, 3 to 80 allowed."""
    assert count_steps(mode, 10, 3, 80, fit) == steps
    assert count_steps("capped", 2, 3, 80, 50) == 2  # the floor asks no more than the plan


def test_filled_steps_leave_room_for_transfer() -> None:
    """5 s fixed, rank 32 on two weights: 64 x 0.5 s up; 1 + 64 x 0.125 = 9 s a step: (100 - 37) / 9 = 7 steps."""
    edge = demand([choice(step_seconds_rank=0.125)], fixed_seconds=5.0, transfer_seconds_rank=0.5)
    found = exact([A, B], edge, np.ones(2), 100.0, 0.0, steps="filled")
    assert (found.steps, found.seconds, found.planned_seconds) == (7, 100, 127)
    assert found.under_training == pytest.approx(27 / 127)


QV = [Key(f"{layer}.{kind}", kind, layer, 8, 8) for layer in range(2) for kind in "qv"]
QV_SCORES = np.array([1.0, 2, 1, 3])


def test_best_takes_one_rank_that_a_share_of_the_deadline_sends() -> None:
    """1 s a unit of rank and weight. A quarter of 100 s: 4 weights at rank 4 take 16, at rank 8 32.

    Then (100 - 4 - 16) / 2 = 40 steps. A quarter of 50 s sends rank 2 only, below 4: q goes (score 2 of v's 5), and v
    takes 8 s at rank 4, 16 at rank 8; (50 - 4 - 8) / 2 = 19 steps.
    """
    edge = demand([choice(4, step_seconds=2.0)], fixed_seconds=4.0, transfer_seconds_rank=1)
    found = best(QV, edge, QV_SCORES, 100.0)
    assert found.ranks == {key.name: 4 for key in QV}
    assert (found.steps, found.seconds, found.planned_seconds) == (40, 100, 40)
    assert found.value == pytest.approx(7 * math.log2(5))
    found = best(QV, edge, QV_SCORES, 50.0)
    assert (found.ranks, found.steps) == ({"0.v": 4, "1.v": 4}, 19)
    assert best(QV, edge, QV_SCORES, 50.0, min_rank=2).ranks == {key.name: 2 for key in QV}
    assert best(QV, edge, QV_SCORES, 50.0, communication_share=0.5).ranks == {key.name: 4 for key in QV}
    late = best(
        QV, edge, QV_SCORES, 4.0
    )  # 3 steps end after 4 + 6 s at the soonest, a quarter of which sends the least
    assert late.ranks == {"0.v": 1, "1.v": 1}
    assert best(QV, replace(edge, min_steps=30, max_steps=80), QV_SCORES, 4.0).ranks == {key.name: 4 for key in QV}
    assert best(QV, replace(edge, steps=30), QV_SCORES, 4.0, steps="equal").ranks == {key.name: 4 for key in QV}


def test_the_median_deadline_is_kept_by_half_of_the_edges() -> None:
    """1, 2 and 6 s a step, 10 steps: 20 s."""
    edges = [demand([choice(4, step_seconds=s)], edge=f"e{s}") for s in (1.0, 2.0, 6.0)]
    assert median_deadline(lambda deadline: plan(QV, edges, QV_SCORES, deadline)) == 20


def test_best_takes_the_most_bits_at_the_reference_batch() -> None:
    """Capacity 100. Bytes without adapters at (bits, batch), 1 a unit of rank: rank 4 everywhere needs 16 more."""

    def chosen(**bytes_of: int) -> tuple[int, int, set[int]]:
        names = {name: (int(name.split("_")[1]), int(name.split("_")[2])) for name in bytes_of}
        choices = [choice(4, bits=names[n][0], batch=names[n][1], memory_bytes=m, memory_bytes_rank=1)
                   for n, m in bytes_of.items()]  # fmt: skip
        found = best(QV, demand(choices, capacity_bytes=100.0, batch=2), QV_SCORES, 100.0)
        return found.bits, found.batch, set(found.ranks.values())

    assert chosen(c_4_2=40, c_8_2=60, c_16_2=110, c_16_1=80) == (8, 2, {8})
    assert chosen(c_4_2=40, c_8_2=90, c_8_1=30) == (4, 2, {8})  # 8 bits at batch 2 would cost a kind
    assert chosen(c_4_2=95, c_4_1=60, c_8_1=84) == (8, 1, {4})
    assert chosen(c_4_4=20, c_4_2=60) == (4, 2, {8})  # never above the reference
    assert chosen(c_4_4=20, c_4_2=101) == (4, 4, {16})  # unless nothing else fits
    assert chosen(c_4_2=99) == (4, 2, {1})  # one weight


def test_best_drops_depth_only_for_three_steps_or_to_fit() -> None:
    """12 s beside the steps at rank 4 on two weights; by 50 s three steps of 10 s fit, not of 30 s."""
    whole = choice(4, step_seconds=30.0, memory_bytes_rank=1)
    top = replace(whole, depth=1, step_seconds=10.0)
    edge = demand([top, whole], fixed_seconds=4.0, transfer_seconds_rank=1)
    found = best(QV, edge, QV_SCORES, 50.0)
    assert (found.depth, found.steps, found.ranks) == (1, 3, {"1.q": 4, "1.v": 4})
    quick = replace(whole, step_seconds=10.0)
    assert best(QV, replace(edge, choices=[top, quick]), QV_SCORES, 50.0).depth is None
    large = replace(quick, memory_bytes=200.0)
    assert best(QV, replace(edge, choices=[top, large], capacity_bytes=150.0), QV_SCORES, 50.0).depth == 1


def test_plans_by_edge_and_an_edge_that_nothing_fits() -> None:
    gib = float(2**30)
    edge = demand(
        [choice(bits=4, memory_bytes=1.2 * gib, memory_bytes_rank=8), choice(memory_bytes=2 * gib)], edge="e3"
    )
    fine, tight = replace(edge, edge="e2"), replace(edge, capacity_bytes=0.8 * gib)
    plans = plan([A, B], [fine, edge], {"e3": np.array([0.0, 1]), "e2": np.array([1.0, 0])}, 10.0, "greedy", "equal")
    assert list(plans) == ["e2", "e3"]
    assert (plans["e2"].ranks["a"], plans["e3"].ranks["b"]) == (32, 32)
    message = (
        "edge e3: rank 1 on one weight at 4 bits and batch 1 needs 1.2 GiB of 0.8 GiB; give it more memory or a sm"
    )
    for solver in ("best", *SOLVERS):
        with pytest.raises(ValueError, match=message):
            plan([A, B], [fine, tight], np.ones(2), 10.0, solver)


def test_a_deadline_that_nobody_meets_is_no_error() -> None:
    for solver in ("best", *SOLVERS):
        found = plan([A, B], [demand([choice()])], np.ones(2), 1.0, solver)["e1"]
        assert (found.under_training, found.steps, found.seconds) == (0.9, 3, 3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_worthless_weights_get_a_plan_too(solver: str) -> None:
    edge = demand([choice(memory_bytes_rank=[9, 1])], capacity_bytes=118.0, transfer_seconds_rank=1)
    found = SOLVERS[solver]([A, B], edge, np.zeros(2), 10.0)
    assert found.ranks


def test_uniform_needs_room_for_all() -> None:
    edge = demand([choice(memory_bytes_rank=1)], capacity_bytes=101.0)
    assert best([A, B], edge, np.array([1.0, 2]), 10.0).ranks == {"b": 1}
    with pytest.raises(ValueError, match=r"edge e1: rank 1 on all weights needs .* GiB of .* GiB; give it"):
        uniform([A, B], edge, np.ones(2), 10.0)


def test_search_deadline_by_hand() -> None:
    """Edges do 1 and 4 steps a second after 1 s, 12 planned, 24 at most: 13 and 4 planned seconds; grid 4, 7.21, 13.

    Samples a second: (3 + 12) / 4 = 3.75, (6 + 24) / 7 = 4.29, (12 + 24) / 13 = 2.77. With samples the first that does.
    """

    def plans(deadline: float) -> dict[str, EdgePlan]:
        steps = {rate: math.floor(min(24, rate * (deadline - 1))) for rate in (1, 4)}
        return {
            f"e{rate}": EdgePlan(f"e{rate}", 4, 1, None, n, {}, 1 + n / rate, 1 + 12 / rate, 0, math.inf, 0, 0)
            for rate, n in steps.items()
        }

    deadline, found = search_deadline(plans, points=3)
    assert deadline == pytest.approx(math.sqrt(4 * 13))
    assert [one.steps for one in found.values()] == [6, 24]
    for samples, earliest in ((14, 4), (15, 4), (16, math.sqrt(4 * 13)), (99, math.sqrt(4 * 13))):
        assert search_deadline(plans, samples, points=3)[0] == pytest.approx(earliest)


def test_a_round_that_waits_for_an_edge_is_filled_by_the_others() -> None:
    """Steps of 1 s and 8 s, of which the slow edge must do 5: 40 s, where 20 samples are done after 10 or 20."""
    edges = [
        demand([choice(step_seconds=1.0)], edge="fast", min_steps=1, max_steps=99),
        demand([choice(step_seconds=8.0)], edge="slow", min_steps=5, max_steps=99),
    ]
    deadline, plans = search_deadline(lambda deadline: plan([A, B], edges, np.ones(2), deadline, "best"), 20)
    assert deadline == plans["slow"].seconds == pytest.approx(40)
    assert {name: one.steps for name, one in plans.items()} == {"fast": 40, "slow": 5}


@pytest.mark.parametrize("solver", ["best", "greedy"])
def test_search_deadline_among_plans(solver: str) -> None:
    """Steps of 1 s and 8 s after 2 s, 10 planned, 20 at most: 12 and 82 planned seconds, of which 7 points.

    Samples a second: by 12 s 11 / 12, by 16.5 s 15 / 16, by 22.8 s 22 / 22, by 31.2 s 23 / 26, then less.
    """
    edges = [
        demand([choice(step_seconds=s)], edge=f"e{s}", fixed_seconds=2.0, min_steps=1, max_steps=20) for s in (1.0, 8.0)
    ]
    deadline, plans = search_deadline(lambda deadline: plan([A, B], edges, np.ones(2), deadline, solver), points=7)
    assert deadline == pytest.approx(12 * (82 / 12) ** (2 / 6))
    assert [one.steps for one in plans.values()] == [20, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.ones(3)}, "edge e1: scores must be 2 finite numbers of at least 0, one a key"),
        ({"scores": np.array([1, math.nan])}, "edge e1: scores must be 2 finite numbers"),
        ({"deadline_seconds": 0.0}, "edge e1: deadline_seconds 0.0 must be above 0"),
        ({"lam": -1.0}, "edge e1: lam -1.0 must be finite and at least 0"),
        ({"gain": "linear"}, "edge e1: unknown gain 'linear': one of log2, sqrt"),
        ({"solver": "milp"}, "unknown solver 'milp': one of best, exact, greedy, uniform"),
        ({"steps": "full"}, "unknown steps 'full': one of equal, capped, filled"),
        ({"min_rank": 0}, r"communication_share 0.25 must be in \(0, 1\], min_rank 0 at least 1"),
        ({"communication_share": 2.0}, r"communication_share 2.0 must be in \(0, 1\]"),
        ({"keys": [A, A]}, "edge e1: keys must be at least one, no name twice"),
        ({"demands": [demand([choice()]), demand([choice()])]}, "an edge stands twice: e1, e1"),
        ({"demands": [replace(demand([choice()]), choices=[])]}, "edge e1: choices must be at least one"),
        ({"demands": [demand([choice()], transfer_seconds_rank=-1)]}, "edge e1: transfer_seconds_rank must be 2 f"),
        ({"demands": [demand([choice(step_seconds_rank=math.inf)])]}, "edge e1: choice 0: step_seconds_rank must be 2"),
        ({"demands": [demand([choice()], fixed_seconds=-1.0)]}, "edge e1: fixed_seconds -1.0 must be finite and at l"),
        ({"demands": [demand([choice()], capacity_bytes=math.nan)]}, "edge e1: capacity_bytes nan must be above 0"),
        ({"demands": [demand([choice()], steps=0)]}, "edge e1: steps 0 must be at least 1"),
        ({"demands": [demand([choice()], batch=0)]}, "edge e1: batch 0 must be at least 1, or None"),
        ({"demands": [demand([choice()], max_steps=2)]}, "edge e1: min_steps 3 and max_steps 2 must be at least 1 and"),
        ({"demands": [demand([choice(step_seconds=0.0)])]}, "edge e1: step_seconds 0.0 must be finite and above 0"),
        ({"demands": [demand([choice(memory_bytes=-1.0)])]}, "edge e1: memory_bytes -1.0 must be finite and"),
        ({"demands": [demand([choice(batch=0)])]}, "edge e1: batch 0 must be at least 1"),
        ({"demands": [demand([choice(depth=0)])]}, "edge e1: depth 0 must be at least 1, or None"),
    ],
)  # fmt: skip
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    given = {"keys": [A, B], "demands": [demand([choice()])], "scores": np.ones(2), "deadline_seconds": 10.0}
    with pytest.raises(ValueError, match=message):
        plan(**{**given, **changes})


def test_a_tolerance_that_no_solver_keeps_is_refused() -> None:
    with pytest.raises(ValueError, match="tolerance 0 must be at least 1e-8"):
        exact([A, B], demand([choice()]), np.ones(2), 10.0, tolerance=0)


def test_planning_imports_neither_torch_nor_scipy() -> None:
    code = "import sys, fedpipe_ray.planning; print({'torch', 'scipy', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
