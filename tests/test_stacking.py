"""Sums of low-rank products against dense algebra, PEFT's add_weighted_adapter, and numbers derived by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedpipe_ray.stacking import (
    Pair,
    concatenate,
    increment,
    leading,
    low_rank,
    pad,
    residual_norm,
    share_of,
    stack,
    tail,
    truncate,
)

M, N = 11, 9
ranks = st.lists(st.integers(0, 6), min_size=1, max_size=4)
seeds = st.integers(0, 10_000)


def pairs_of(rank: Sequence[int], seed: int, m: int = M, n: int = N) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [(draw(m, r), draw(r, n)) for r in rank]


def weights_of(count: int) -> list[float]:
    return [(i + 1) / sum(range(count + 1)) for i in range(count)]


def dense(pairs: Sequence[Pair], weights: Sequence[float]) -> Tensor:
    return sum((w * b @ a for (b, a), w in zip(pairs, weights, strict=True)), torch.zeros(()))


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


# -- the best product of a rank


@given(ranks, st.integers(1, 14), seeds)
def test_low_rank_is_the_dense_truncated_svd(rank: list[int], cut: int, seed: int) -> None:
    """Eckart-Young: the dense SVD's product, and its tail as the residual; 14 is above both m and n."""
    pairs, weights = pairs_of(rank, seed), weights_of(len(rank))
    whole = dense(pairs, weights)
    found = low_rank(*concatenate(pairs, weights), cut)
    u, s, vt = torch.linalg.svd(whole)
    assert (found.b.shape, found.a.shape, found.singular.shape) == ((M, cut), (cut, N), (cut,))
    assert_near(found.b @ found.a, u[:, : min(cut, N)] * s[:cut] @ vt[:cut])
    assert_near(found.singular[:N], s[:cut])
    assert found.residual == pytest.approx(float(s[cut:].norm()), abs=1e-10)
    assert found.relative == pytest.approx(float(s[cut:].norm() / (s.norm() or 1)), abs=1e-10)
    assert found.residual == pytest.approx(float((whole - found.b @ found.a).norm()), abs=1e-10)


@given(st.integers(1, 5), seeds)
def test_no_other_product_of_that_rank_is_nearer(cut: int, seed: int) -> None:
    (b, a), other = pairs_of([8], seed)[0], pairs_of([cut], seed + 1)[0]
    best = low_rank(b, a, cut)
    for size in (0.0, 1e-3, 1.0):  # the same, near it, anything
        moved = (best.b + size * other[0]) @ (best.a + size * other[1])
        assert best.residual <= float((b @ a - moved).norm()) + 1e-12


def test_the_two_splits_of_the_singular_values() -> None:
    (b, a) = pairs_of([5], 0)[0]
    whole, root = low_rank(b, a, 4), low_rank(b, a, 4, split="sqrt")
    assert_near(whole.a @ whole.a.T, torch.eye(4, dtype=torch.float64))
    assert_near(whole.b.T @ whole.b, whole.singular.square().diag())
    assert_near(root.a @ root.a.T, whole.singular.diag())
    assert_near(root.b.T @ root.b, whole.singular.diag())
    assert_near(root.b @ root.a, whole.b @ whole.a)


def test_by_hand() -> None:
    """b a = [[0, -4], [3, 0]] = 4 e_1 (-e_2)^T + 3 e_2 e_1^T; rank 1 keeps 4, loses 3 of 5."""
    b, a = torch.tensor([[0.0, -4.0], [3.0, 0.0]]), torch.eye(2)
    found = low_rank(b, a, 1)
    assert_near(found.b.double(), torch.tensor([[4.0], [0.0]]).double())
    assert_near(found.a.double(), torch.tensor([[0.0, -1.0]]).double())
    assert [found.residual, found.relative] == pytest.approx([3, 0.6])
    assert found.b.dtype == found.a.dtype == torch.float32


@given(seeds)
def test_signs_are_fixed_by_the_product(seed: int) -> None:
    """The largest entry of each u is positive, whatever the factors' own basis and signs."""
    b, a = pairs_of([4], seed)[0]
    m = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 4 * torch.eye(4)
    one, other = low_rank(b, a, 4), low_rank(-b @ m, -m.inverse() @ a, 4)
    top = one.b.gather(0, one.b.abs().argmax(0, keepdim=True))
    assert (top > 0).all()
    torch.testing.assert_close(other.b, one.b, rtol=0, atol=1e-6)
    torch.testing.assert_close(other.a, one.a, rtol=0, atol=1e-6)


def test_the_same_input_gives_the_same_bits() -> None:
    pairs = pairs_of([3, 0, 2], 0)
    one, other = (truncate(pairs, [0.2, 0.3, 0.5], 8, fill=pairs[0][1]) for _ in range(2))
    assert torch.equal(one.b, other.b)
    assert torch.equal(one.a, other.a)


def test_the_order_of_the_pairs_does_not_matter() -> None:
    pairs, weights = pairs_of([3, 1, 2], 0), weights_of(3)
    one, other = truncate(pairs, weights, 4), truncate(pairs[::-1], weights[::-1], 4)
    assert_near(one.b, other.b)
    assert_near(one.a, other.a)


def test_badly_scaled_factors_lose_no_triplet() -> None:
    """Products of size 1 from factors of size 1e8 and 1e-8, both ways round: noise is judged pair by pair."""
    (b, a), (c, d) = pairs_of([2, 2], 0)
    found = low_rank(torch.cat([1e8 * b, 1e-8 * c], 1), torch.cat([1e-8 * a, 1e8 * d]), 4)
    torch.testing.assert_close(found.b @ found.a, b @ a + c @ d, rtol=0, atol=1e-9)
    assert (found.singular > 0.1).all()


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rank: 0 must be at least 1"):
        low_rank(*pairs_of([2], 0)[0], 0)


# -- rows of zero singular values


@given(st.integers(0, 4), st.integers(0, 6), seeds)
def test_free_rows_are_filled_orthonormally_and_change_nothing(rank: int, given_rows: int, seed: int) -> None:
    (b, a), (_, fill) = pairs_of([rank, given_rows], seed)
    found, bare = low_rank(b, a, 6, fill=fill), low_rank(b, a, 6)
    assert_near(found.a @ found.a.T, torch.eye(6, dtype=torch.float64))
    assert torch.equal(found.b, bare.b)
    assert not found.b[:, rank:].any()
    assert not bare.a[rank:].any()
    taken = fill[: 6 - rank]  # the first ones lie in the rows found
    assert_near(taken @ found.a.T @ found.a, taken)


def test_fill_that_is_used_up_is_followed_by_fixed_random_rows_and_then_zeros() -> None:
    b, a = pairs_of([2], 0)[0]
    found = low_rank(b, a, N + 2, fill=a)  # a's rows are all in use
    assert_near(found.a[:N] @ found.a[:N].T, torch.eye(N, dtype=torch.float64))
    assert not found.a[N:].any()
    assert torch.equal(found.a, low_rank(b, a, N + 2, fill=a).a)


def test_round_zero_with_b_zero_can_go_on() -> None:
    """No edge trained: the product stays zero, and a keeps the span of the A it started from."""
    generator = torch.Generator().manual_seed(0)
    a = torch.empty(4, N).uniform_(-1, 1, generator=generator)
    found = stack((torch.zeros(M, 4), a), [], [], 4)
    assert not found.b.any()
    assert found.a.dtype == torch.float32
    torch.testing.assert_close(a @ found.a.T @ found.a, a)
    assert (found.residual, found.relative) == (0.0, 0.0)


# -- rules


@given(ranks, st.integers(1, 5), seeds)
def test_stack_is_the_global_and_the_mean_change(rank: list[int], of_global: int, seed: int) -> None:
    (g, *trained), weights = pairs_of([of_global, *rank], seed), weights_of(len(rank))
    start = pairs_of(rank, seed + 1)
    full = of_global + 2 * sum(rank)
    found = stack(g, list(zip(trained, start)), weights, full)
    expected = g[0] @ g[1] + dense(trained, weights) - dense(start, weights)
    torch.testing.assert_close(found.b @ found.a, expected, rtol=0, atol=1e-6)
    assert found.relative < 1e-12


def test_edges_that_did_not_move_leave_the_global_where_it_is() -> None:
    g = low_rank(*pairs_of([4], 0)[0], 4)
    start = [leading(g.b, g.a, r) for r in (4, 2, 1)]
    found = stack((g.b, g.a), list(zip(start, start)), [0.5, 0.25, 0.25], 4)
    assert_near(found.b, g.b)
    assert_near(found.a, g.a)


def test_one_edge_that_trained_all_is_the_new_global() -> None:
    g, trained = pairs_of([4, 4], 0)
    for found in (stack(g, [(trained, g)], [1.0], 4), truncate([trained], [1.0], 4)):
        assert_near(found.b @ found.a, trained[0] @ trained[1])
        assert found.relative < 1e-12


def test_an_edge_of_lower_rank_changes_its_leading_part_alone() -> None:
    """It trains 2 of 4 triplets and moves them to `new`; the tail acts on, frozen: G' = new + tail(G)."""
    g = low_rank(*pairs_of([4], 0)[0], 4)
    new = pairs_of([2], 1)[0]
    found = stack((g.b, g.a), [(new, leading(g.b, g.a, 2))], [1.0], 6)
    rest = tail(g.b, g.a, 2)
    assert_near(found.b @ found.a, new[0] @ new[1] + rest[0] @ rest[1])


@given(ranks, seeds)
def test_increment_adds_to_the_frozen_global(rank: list[int], seed: int) -> None:
    (g, *fresh), weights = pairs_of([3, *rank], seed), weights_of(len(rank))
    found = increment(g, fresh, weights, 3 + sum(rank))
    assert_near(found.b @ found.a, g[0] @ g[1] + dense(fresh, weights))


def test_equal_pairs_are_a_fixed_point_of_every_rule() -> None:
    g = low_rank(*pairs_of([3], 0)[0], 3)
    pair, weights = (g.b, g.a), [0.2, 0.3, 0.5]
    by_truncation = truncate([pair] * 3, weights, 3)
    for b, a in (pad([pair] * 3, weights, 3), (by_truncation.b, by_truncation.a)):
        assert_near(b, g.b)
        assert_near(a, g.a)


def test_padding_by_hand() -> None:
    """Ranks 1 and 2, p = 1/2: products [[1]] and [[4 + 1]], mean 3; padded ((1 + 2) / 2)^2 + (1 / 2)^2 = 2.5."""
    pairs = [
        (torch.tensor([[1.0]]), torch.tensor([[1.0]])),
        (torch.tensor([[2.0, 1.0]]), torch.tensor([[2.0], [1.0]])),
    ]
    b, a = pad(pairs, [0.5, 0.5], 2)
    assert (b.tolist(), a.tolist()) == ([[1.5, 0.5]], [[1.5], [0.5]])
    assert residual_norm([(b, a)], [concatenate(pairs, [0.5, 0.5])]) == pytest.approx(0.5 / 3)
    with pytest.raises(ValueError, match="rank 2 cannot be padded to 1"):
        pad(pairs, [0.5, 0.5], 1)


def test_shares_by_hand() -> None:
    samples = {"e1": 10.0, "e2": 30.0, "e3": 60.0}
    assert share_of(samples) == dict.fromkeys(samples, 1 / 3)
    assert share_of(samples, "equal", {"e3", "e1"}) == {"e1": 0.5, "e3": 0.5}
    assert share_of(samples, "paper", {"e1", "e2"}) == {"e1": 0.25, "e2": 0.75}
    assert share_of(samples, "all", {"e1", "e2"}) == {"e1": 0.1, "e2": 0.3}
    assert share_of(samples, "equal", ()) == share_of(samples, "paper", ()) == share_of(samples, "all", ()) == {}
    with pytest.raises(ValueError, match=r"share paper: e1 hold 0\.0 samples"):
        share_of({"e1": 0.0}, "paper")
    with pytest.raises(ValueError, match="'mean' is none of paper, equal, all"):
        share_of(samples, "mean")


@given(st.integers(0, 7), seeds)
def test_leading_and_tail_are_the_whole(rank: int, seed: int) -> None:
    g = low_rank(*pairs_of([8], seed)[0], 5)
    (b, a), (c, d) = leading(g.b, g.a, rank), tail(g.b, g.a, rank)
    assert len(a) + len(d) == 5
    assert_near(b @ a + c @ d, g.b @ g.a)
    if 1 <= rank <= 5:
        assert_near(b @ a, (best := low_rank(g.b, g.a, rank)).b @ best.a)


@given(ranks, ranks, seeds)
def test_the_residual_norm_is_the_dense_one(rank: list[int], other: list[int], seed: int) -> None:
    exact, applied = pairs_of(rank, seed), pairs_of(other, seed + 1)
    whole, found = dense(exact, [1.0] * len(exact)), dense(applied, [1.0] * len(applied))
    if float(whole.norm()) == 0:
        assert residual_norm(applied, exact) == (float("inf") if found.any() else 0.0)
    else:
        assert residual_norm(applied, exact) == pytest.approx(float((found - whole).norm() / whole.norm()), rel=1e-9)
    assert residual_norm(exact, exact) < 1e-12


# -- oracles


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(N, M, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_peft_add_weighted_adapter_gives_the_same_delta(kind: str) -> None:
    """Unequal ranks 4, 2, 3 at scale alpha / rank = 1: `cat` is the exact stack, `svd` of rank 3 is `truncate`."""
    pairs, weights = pairs_of([4, 2, 3], 0), weights_of(3)
    configs = [peft.LoraConfig(r=len(a), lora_alpha=len(a), target_modules=["line"]) for _, a in pairs]
    model: Any = peft.get_peft_model(Line(), configs[0], adapter_name="e0", autocast_adapter_dtype=False)
    for i, config in enumerate(configs[1:], start=1):
        model.add_adapter(f"e{i}", config)
    layer = model.base_model.model.line
    with torch.no_grad():
        for i, (b, a) in enumerate(pairs):
            layer.lora_A[f"e{i}"].to(torch.float64).weight.copy_(a)
            layer.lora_B[f"e{i}"].to(torch.float64).weight.copy_(b)
    model.add_weighted_adapter(
        ["e0", "e1", "e2"], weights, "mean", combination_type=kind, svd_rank=3 if kind == "svd" else None
    )
    best = truncate(pairs, weights, 3)
    ours = torch.linalg.multi_dot(concatenate(pairs, weights)) if kind == "cat" else best.b @ best.a
    torch.testing.assert_close(layer.get_delta_weight("mean").double(), ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("drift", "padded", "at_64", "at_8"), [(None, 0.921, 0.524, 0.924), (0.3, 0.434, 0.027, 0.549)]
)
def test_ten_edges_lose_what_the_methods_sheet_says(
    drift: float | None, padded: float, at_64: float, at_8: float
) -> None:
    """m = n = 512, Gaussian factors, p = 1/10: independent, or the first rows of a common pair + 30 % noise.

    Zero-padding of independent ones by hand: with c_j edges of rank above j, error^2 = 1 - 2p + p^2 sum c_j^2 / sum c_j
    = 1 - 0.2 + 0.01 x 768 / 160 = 0.848, so 0.921. The sheet's draw is not known, so 4 % are allowed.
    """
    rank, weights = [64, 32, 16, 16, 8, 8, 4, 4, 4, 4], [0.1] * 10
    pairs, (b, a) = pairs_of(rank, 0, 512, 512), pairs_of([64], 1, 512, 512)[0]
    if drift is not None:
        pairs = [(b[:, : len(y)] + drift * x, a[: len(y)] + drift * y) for x, y in pairs]
    exact = [concatenate(pairs, weights)]
    assert residual_norm([pad(pairs, weights, 64)], exact) == pytest.approx(padded, rel=0.04)
    for cut, expected in ((64, at_64), (8, at_8)):
        best = truncate(pairs, weights, cut)
        assert best.relative == pytest.approx(expected, rel=0.04)
        assert residual_norm([(best.b, best.a)], exact) == pytest.approx(best.relative, rel=1e-6)
    assert residual_norm(pairs_scaled(pairs, weights), exact) < 1e-12


def pairs_scaled(pairs: Sequence[Pair], weights: Sequence[float]) -> list[Pair]:
    return [(w * b, a) for (b, a), w in zip(pairs, weights, strict=True)]
