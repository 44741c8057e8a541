"""Sums that are folded one pair at a time against dense algebra; the quick QR against Householder's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_stacking import M, N, dense, pairs_of, ranks, seeds, weights_of

from fedpipe_ray.folding import Folding, Padded, Sums
from fedpipe_ray.stacking import concatenate, low_rank, orthogonal, residual_norm, tolerance_of

FLOAT32 = tolerance_of(torch.float32)  # 1.2e-9


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.integers(1, 12), seeds)
def test_a_cut_sum_is_as_far_off_as_it_says_or_less(rank: list[int], limit: int, seed: int) -> None:
    """||held - sum|| <= the sum of the norms of what was cut; at most twice the limit is held meanwhile."""
    pairs, weights = pairs_of(rank, seed), weights_of(len(rank))
    folding = Folding(limit)
    for pair, weight in zip(pairs, weights, strict=True):
        folding.add(pair, weight)
        assert folding.rank <= 2 * limit
    b, a = folding.pair()
    assert len(a) <= limit
    gap = float((b @ a - dense(pairs, weights)).norm())
    assert gap <= folding.cut + 1e-9
    if sum(rank) <= limit or limit >= min(M, N):
        assert folding.cut < 1e-9
    elif max(rank) > limit:  # something of one pair was lost for good
        assert gap > 0


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), seeds)
def test_without_a_limit_nothing_is_lost_and_memory_is_bounded(rank: list[int], seed: int) -> None:
    pairs, weights = pairs_of(rank, seed), weights_of(len(rank))
    folding = Folding()
    for pair, weight in zip(pairs, weights, strict=True):
        folding.add(pair, weight)
        assert folding.rank <= 2 * min(M, N)
    b, a = folding.pair()
    assert len(a) <= min(M, N)
    torch.testing.assert_close(b @ a, dense(pairs, weights), rtol=0, atol=1e-10)


def test_nothing_folded_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was folded"):
        Folding().pair()


def test_told_by_hand() -> None:
    """Weights 1 and 3, products 4 and 8: dW* = 7. Padded means B = 2.5, A = 3.25 apply 8.125."""
    mean, sums = Padded({"m.lora_A.weight": torch.zeros(2, 1), "m.lora_B.weight": torch.zeros(1, 2)}), Sums()
    for b, a, weight in ((4.0, 1.0, 1.0), (2.0, 4.0, 3.0)):
        update = {"m.lora_A.weight": torch.tensor([[a]]), "m.lora_B.weight": torch.tensor([[b]])}
        mean.add(update, weight)
        sums.add(update, weight)
    found = mean.mean()
    assert found["m.lora_A.weight"].tolist() == [[3.25], [0.0]]
    assert found["m.lora_B.weight"].tolist() == [[2.5, 0.0]]
    pair = found["m.lora_B.weight"], found["m.lora_A.weight"]
    told = sums.told({"m.lora_A.weight": [pair]}, sums.exact())
    assert told == {"residual": pytest.approx((3.25 * 2.5 - 7) / 7), "cut": 0.0}


def test_what_a_cut_leaves_out_is_told_as_a_share() -> None:
    """Rank 1 of diag(4, 3): 3 of 5 is cut."""
    sums = Sums(1)
    sums.add({"m.lora_A.w": torch.eye(2), "m.lora_B.w": torch.diag(torch.tensor([4.0, 3.0]))}, 2.0)
    exact = sums.exact()
    told = sums.told({"m.lora_A.w": [exact["m.lora_A.w"]]}, exact)
    assert told["residual"] == pytest.approx(0, abs=1e-12)
    assert told["cut"] == pytest.approx(3 / 4)


# -- the quick QR


@given(st.integers(1, 8), st.floats(-3, 0), st.integers(0, 999))
def test_the_quick_factors_are_as_orthonormal_as_asked(count: int, drift: float, seed: int) -> None:
    """Columns that share a direction up to 10^drift, of lengths 1e-8 to 1e8: Q R is x, and Q^T Q - I below 10 tol."""
    draw = torch.Generator().manual_seed(seed)
    common = torch.randn(40, 1, generator=draw, dtype=torch.float64)
    x = common + 10**drift * torch.randn(40, count, generator=draw, dtype=torch.float64)
    x = x * 10 ** torch.linspace(-8, 8, count, dtype=torch.float64)
    q, r = orthogonal(x, FLOAT32)
    basis = q(torch.eye(count, dtype=torch.float64))
    assert float((basis.T @ basis - torch.eye(count)).norm()) < 10 * FLOAT32
    torch.testing.assert_close(basis @ r / x.norm(dim=0), x / x.norm(dim=0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["dependent", "wide", "zero"])
def test_what_the_quick_way_cannot_do_is_householders(kind: str) -> None:
    x = {"dependent": torch.ones(5, 2), "wide": torch.eye(2, 4), "zero": torch.zeros(5, 2)}[kind].double()
    q, r = orthogonal(x, FLOAT32)
    expected = torch.linalg.qr(x)
    assert torch.equal(r, expected.R)
    assert torch.equal(q(torch.eye(2, dtype=torch.float64)), expected.Q)


@given(ranks, st.integers(1, 9), seeds)
def test_the_quick_product_is_the_other(rank: list[int], cut: int, seed: int) -> None:
    pairs, weights = pairs_of(rank, seed, 60, 50), weights_of(len(rank))
    exact = concatenate(pairs, weights)
    one, other = low_rank(*exact, cut, tolerance=FLOAT32), low_rank(*exact, cut)
    assert residual_norm([(one.b, one.a)], [(other.b, other.a)]) < 1e-8
    assert one.residual == pytest.approx(other.residual, rel=1e-8, abs=1e-9)
    torch.testing.assert_close(one.a[: len(other.a)] @ one.a.T, other.a @ other.a.T, rtol=0, atol=1e-8)
    assert math.isfinite(one.relative)
