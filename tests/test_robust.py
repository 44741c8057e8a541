"""Robust aggregation: rules by hand, and their algebra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from toy_rounds import Adding, toy_run

from fedpipe_ray.averaging import average, combined, trimmed_mean
from fedpipe_ray.costs import Cost
from fedpipe_ray.message import Message
from fedpipe_ray.report import Report
from fedpipe_ray.run import server_site
from fedpipe_ray.server_settings import Aggregator

RULES: dict[str, dict[str, Any]] = {
    "trimmed_mean": {"trim": 3}, "median": {}, "geometric_median": {}, "krum": {"byzantine": 3},
    "multi_krum": {"byzantine": 3},
}  # fmt: skip
numbers = st.floats(-1e3, 1e3, width=32)
matrices = st.integers(1, 9).flatmap(
    lambda n: st.integers(1, 4).flatmap(
        lambda d: st.lists(st.lists(numbers, min_size=d, max_size=d), min_size=n, max_size=n)
    )
)


def joined(rule: Aggregator, updates: Sequence[Sequence[float]], weights: Sequence[float] | None = None) -> list[float]:
    """What a rule makes of updates of one vector each, in a state of zeros whose second half is a tensor of its own."""
    half = len(updates[0]) // 2
    messages = [Message({"x": torch.tensor(u[:half]), "y": torch.tensor(u[half:])}) for u in updates]
    state = Message({"x": torch.zeros(half), "y": torch.zeros(len(updates[0]) - half)})
    found = combined(state, messages, weights or [1.0] * len(updates), rule)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    return [*found["x"].tolist(), *found["y"].tolist()]


# -- by hand


@pytest.mark.parametrize(
    ("values", "trim", "expected"),
    [
        ([1, 2, 3], 1, 2), ([1, 2, 3, 100], 1, 2.5), ([-1e30, 4, 5, 6, 1e30], 1, 5), ([3, 1, 2], 0, 2),
        ([7, 1, 1, 9, 2], 2, 2), ([5], 0, 5),
    ],
)  # fmt: skip
def test_trimmed_means_by_hand(values: list[float], trim: int, expected: float) -> None:
    assert joined(Aggregator(name="trimmed_mean", trim=trim), [[v, -v] for v in values]) == [expected, -expected]


@pytest.mark.parametrize(("values", "expected"), [([9, 1, 2], 2), ([9, 1, 2, 4], 3), ([4], 4), ([4, 6], 5)])
def test_medians_by_hand(values: list[float], expected: float) -> None:
    """Of an even number the mean of the middle two: (2 + 4) / 2."""
    assert joined(Aggregator(name="median"), [[v, 2 * v] for v in values]) == [expected, 2 * expected]


def test_krum_by_hand() -> None:
    """0, 1, 2.5, 3, 10 on a line, f = 1, so that n - f - 2 = 2 neighbours count.

    Scores: 0: 1 + 6.25 = 7.25; 1: 1 + 2.25 = 3.25; 2.5: 0.25 + 2.25 = 2.5; 3: 0.25 + 4 = 4.25; 10: 49 + 56.25. So 2.5,
    and with the next one, 1, (2.5 + 1) / 2. `keep` is n - f - 2 = 2 unless it is given.
    """
    updates = [[0.0, 0.0], [1.0, 0.0], [2.5, 0.0], [3.0, 0.0], [10.0, 0.0]]
    assert joined(Aggregator(name="krum"), updates) == [2.5, 0]
    assert joined(Aggregator(name="multi_krum"), updates) == [1.75, 0]
    assert joined(Aggregator(name="multi_krum", keep=1), updates) == [2.5, 0]


def test_krum_takes_the_first_of_equals() -> None:
    """Both ends of a square's diagonal are alike; n = 4 with f = 0 leaves two neighbours each."""
    corners = [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    assert joined(Aggregator(name="krum", byzantine=0), corners) == [0, 0]
    assert joined(Aggregator(name="krum", byzantine=0), corners[::-1]) == [1, 1]


def test_geometric_medians_by_hand() -> None:
    """Of a triangle with equal sides its centre; of points on a line their median; half of the weight wins."""
    triangle = [[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]]
    rule = Aggregator(name="geometric_median")
    assert joined(rule, triangle) == pytest.approx([0.5, math.sqrt(0.75) / 3], abs=1e-5)
    assert joined(rule, [[0.0, 0.0], [1.0, 1.0], [50.0, 50.0]]) == pytest.approx([1, 1], abs=1e-3)
    assert joined(rule, [[0.0, 0.0], [1.0, 1.0], [50.0, 50.0]], [1, 1, 5]) == pytest.approx([50, 50], abs=1e-3)


def test_a_geometric_median_is_not_moved_by_how_far_an_attacker_is() -> None:
    """1e30 away, from which a few Weiszfeld steps would not come back."""
    rule, square = Aggregator(name="geometric_median"), [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    far = [joined(rule, [*square, [size, size]]) for size in (1e3, 1e6, 1e30)]
    assert far[1] == pytest.approx(far[0], abs=1e-2)
    assert far[2] == pytest.approx(far[0], abs=1e-2)
    assert 0.5 < far[0][0] < 1


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("mean", 2), ("trimmed_mean", 2), ("median", 2), ("geometric_median", 2), ("krum", 1), ("multi_krum", 1)],
)
def test_three_clients_that_hold_1_2_3(rule: str, expected: float) -> None:
    """2 but for Krum, here with f = 0: each has one neighbour that counts, 1 away, and the first of equals is 1."""
    own = {"name": rule, **({"byzantine": 0} if "krum" in rule else {})}
    reports = [report(str(k), 1.0, float(k)) for k in (1, 2, 3)]
    found = average(Message({"x": torch.zeros(2, 3)}), reports, server_of(own)).tensors["x"]
    torch.testing.assert_close(found, torch.full((2, 3), float(expected)), rtol=0, atol=1e-5)


def report(edge: str, weight: float, value: float) -> Report:
    return Report(edge, 0, weight, 0.0, Cost(), fetch=lambda: Message({"x": torch.full((2, 3), value)}))


def server_of(rule: dict[str, Any], edges: int = 3) -> Any:
    run = toy_run({f"e{n}": {} for n in range(1, edges + 1)}, server={"aggregator": rule})
    return server_site(run, Adding(), [])


# -- algebra


@given(matrices, st.integers(0, 4), st.randoms(use_true_random=False))
def test_coordinate_rules_stay_within_and_look_at_no_order(
    updates: list[list[float]], trim: int, random: Any
) -> None:  # fmt: skip
    """Within the values that are left, by coordinate; bit for bit the same in any order."""
    trim = min(trim, (len(updates) - 1) // 2)
    values, shuffled = np.sort(np.array(updates), axis=0), random.sample(updates, len(updates))
    for rule, cut in (
        (Aggregator(name="trimmed_mean", trim=trim), trim),
        (Aggregator(name="median"), (len(updates) - 1) // 2),
    ):
        found = joined(rule, updates)
        assert found == joined(rule, shuffled)
        low, high = values[cut], values[len(updates) - 1 - cut]
        assert np.all((low - 1e-3 <= found) & (found <= high + 1e-3))
        kept = values[cut : len(updates) - cut].mean(axis=0)
        assert found == pytest.approx(kept, rel=1e-5, abs=1e-5)
    assert joined(Aggregator(name="median"), updates) == pytest.approx(np.median(updates, axis=0), rel=1e-5, abs=1e-5)


@given(matrices.filter(lambda updates: len(updates) >= 3), st.integers(0, 3))
def test_krum_returns_one_of_the_updates(updates: list[list[float]], byzantine: int) -> None:
    """And the one that the definition, written out, gives, or one as good."""
    n, byzantine = len(updates), min(byzantine, (len(updates) - 3) // 2)
    found = joined(Aggregator(name="krum", byzantine=byzantine), updates)
    assert found in np.array(updates, np.float32).tolist()
    points = np.array(updates)

    def score(k: int) -> float:
        squares = sorted(float(np.sum((points[k] - points[j]) ** 2)) for j in range(n) if j != k)
        return sum(squares[: n - byzantine - 2])

    best = min(score(k) for k in range(n))
    assert score(np.array(updates, np.float32).tolist().index(found)) <= best + 1e-6 * (1 + float(np.sum(points**2)))


@given(matrices, st.lists(st.floats(0.1, 10), min_size=9, max_size=9))
def test_the_geometric_median_is_nearer_than_the_mean(updates: list[list[float]], weights: list[float]) -> None:
    """The weighted sum of distances: no larger than the mean's, nor, but for the smoothing, than any update's."""
    points, p = np.array(updates), np.array(weights[: len(updates)])

    def total(z: Any) -> float:
        return float((p * np.linalg.norm(points - np.asarray(z), axis=1)).sum())

    found = total(joined(Aggregator(name="geometric_median"), updates, list(p)))
    slack = 1e-4 * (1 + total(points.mean(axis=0)))
    assert found <= total((p[:, None] * points).sum(axis=0) / p.sum()) + slack
    assert found <= min(total(point) for point in points) + slack


@pytest.mark.parametrize("seed", range(5))
def test_the_geometric_median_is_that_of_a_general_minimiser(seed: int) -> None:
    """scipy's BFGS on the same sum; the points of equal weights in general position."""
    points = np.random.default_rng(seed).standard_normal((7, 4))
    best = minimize(lambda z: np.linalg.norm(points - z, axis=1).sum(), points.mean(axis=0), tol=1e-10)
    assert joined(Aggregator(name="geometric_median"), points.tolist()) == pytest.approx(best.x, abs=1e-4)


@given(matrices, numbers)
def test_rules_move_with_the_state(updates: list[list[float]], by: float) -> None:
    """Which buffered rounds need: aggregate(S + D, {x + D}) = aggregate(S, {x}) + D; here the mean and the median."""
    block = torch.tensor(updates, dtype=torch.float64)
    for trim in (0, (len(updates) - 1) // 2):
        moved = trimmed_mean(block + by, trim)
        torch.testing.assert_close(moved, trimmed_mean(block, trim) + by, rtol=0, atol=1e-9)
