"""Sums of low-rank products B A of unequal rank, exact as stacked factors, and the best product of a given rank.

A pair is (b [m, rank], a [rank, n]). LoRA's scale alpha / rank is constant over ranks and left out. No m x n matrix is
formed: thin QR of both stacks and the SVD of their small core (FLoRA, arXiv 2409.05976; FlexLoRA, arXiv 2402.11505).
Ours: aggregating changes, orthonormal A, filled rows, Cholesky QR where it is as good as float32 can tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]
Split = Literal["orthonormal", "sqrt"]
Share = Literal["paper", "equal", "all"]

DEPENDENT = 1e-3  # a fill row that loses more than this share of itself adds rounding noise, not a direction


@dataclass(frozen=True, eq=False)
class Truncated:
    """The best product b a of a given rank, its triplets by falling singular value, zeros at the end."""

    b: torch.Tensor  # [m, rank]
    a: torch.Tensor  # [rank, n]
    singular: torch.Tensor  # [rank], float64
    residual: float  # Frobenius norm of what truncation lost

    @property
    def relative(self) -> float:
        """residual / norm of the whole; 0 if the whole is zero."""
        whole = math.hypot(float(self.singular.norm()), self.residual)
        return self.residual / whole if whole else 0.0

    def to(self, dtype: torch.dtype) -> Truncated:
        """With b and a in `dtype`."""
        return Truncated(self.b.to(dtype), self.a.to(dtype), self.singular, self.residual)


def low_rank(
    b_hat: torch.Tensor,
    a_hat: torch.Tensor,
    rank: int,
    *,
    split: Split = "orthonormal",
    fill: torch.Tensor | None = None,
    tolerance: float = 0.0,
) -> Truncated:
    """The product of `rank` nearest to b_hat [m, R] a_hat [R, n] in Frobenius norm (Eckart-Young); shapes never change.

    split: a = orthonormal rows and b = U S, which measured best, or `sqrt`, S shared equally. Signs: the entry of each
    u that is largest in magnitude is positive. Computed in float64, returned in b_hat's dtype.
    Where singular values are zero (rounding noise beside sum_j |b_j| |a_j|), b is zero, and so is a without `fill`:
    such a pair never trains, as both its gradients vanish. With fill [any, n], for instance the A before, a's free
    rows are fill's, in order, projected off the rows in use and orthonormalised; a fixed random draw follows where fill
    has too few directions, and zeros where n has (ours). The product is the same. tolerance: see `orthogonal`; singular
    values are relatively as exact as it says. Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank: {rank} must be at least 1")
    b, a = b_hat.detach().double(), a_hat.detach().double()
    q_b, r_b = orthogonal(b, tolerance)  # W -> Q_b W [m, ...], [min(m, R), R]
    q_a, r_a = orthogonal(a.T, tolerance)  # W -> Q_a W [n, ...], [min(n, R), R]
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    noise = max(len(b), a.shape[1]) * torch.finfo(torch.float64).eps * (b.norm(dim=0) * a.norm(dim=1)).sum()
    kept = min(rank, int((s > noise).sum()))
    u, v = q_b(u[:, :kept]), q_a(vt[:kept].T).T  # [m, kept], [kept, n]
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()  # [1, kept]
    left = s[:kept].sqrt() if split == "sqrt" else s[:kept]
    right = left if split == "sqrt" else torch.ones_like(left)
    wide_b, wide_a, singular = b.new_zeros(len(b), rank), a.new_zeros(rank, a.shape[1]), s.new_zeros(rank)
    wide_b[:, :kept], wide_a[:kept], singular[:kept] = u * sign * left, v * sign.T * right[:, None], s[:kept]
    if fill is not None:
        wide_a[kept:] = complement(v, fill.detach().double(), rank - kept)
    return Truncated(wide_b, wide_a, singular, float(s[kept:].norm())).to(b_hat.dtype)


def tolerance_of(dtype: torch.dtype) -> float:
    """How far from orthonormal factors may be that are then rounded to `dtype`: a hundredth of its own rounding."""
    return torch.finfo(dtype).eps / 100


def orthogonal(x: torch.Tensor, tolerance: float) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """(W -> Q W, R) of the thin QR of x [m, R] in float64; Q need not be formed.

    tolerance > 0: Q = x R^-1 with the Cholesky factor R of the Gram matrix of x's columns, scaled to length one, if
    ||Q^T Q - I||, about eps ||R^-1||_F^2, stays below it: one matrix product. Householder's QR costs four times as much
    and is taken otherwise, as for columns that depend on others.
    """
    length = x.norm(dim=0)  # [R]
    if tolerance > 0 and x.shape[1] <= len(x) and bool(length.all()):
        root, failed = torch.linalg.cholesky_ex(x.T @ x / (length[:, None] * length), upper=True)  # [R, R]
        inverse = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=x.dtype, device=x.device), upper=True)
        if not failed and torch.finfo(x.dtype).eps * float(inverse.square().sum()) <= tolerance:
            return lambda w: x @ ((inverse / length[:, None]) @ w), root * length
    q, r = torch.linalg.qr(x)
    return lambda w: q @ w, r


def complement(used: torch.Tensor, fill: torch.Tensor, count: int) -> torch.Tensor:
    """Orthonormal rows [count, n] off the orthonormal rows `used`: fill's, then fixed random ones, then zeros."""
    start, n = used.shape
    basis = torch.cat([used, used.new_zeros(count, n)])  # [start + count, n]
    draw = torch.randn(count, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = start
    for row in torch.cat([fill, draw.to(fill.device)]):
        if found == len(basis):
            break
        rest = row - (basis @ row) @ basis
        if rest.norm() > DEPENDENT * row.norm():
            basis[found] = rest / rest.norm()
            found += 1
    return basis[start:]


def concatenate(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """One pair whose product is exactly sum_i w_i b_i a_i: [w_1 b_1 | w_2 b_2 | ...], [a_1; a_2; ...]; float64."""
    b = torch.cat([weight * b.detach().double() for (b, _), weight in zip(pairs, weights, strict=True)], dim=1)
    return b, torch.cat([a.detach().double() for _, a in pairs])  # [m, sum of ranks], [sum of ranks, n]


def share_of(
    samples: Mapping[str, float], mode: Share = "equal", trained: Collection[str] | None = None
) -> dict[str, float]:
    """Weights p by edge, for the edges that trained a key (default: all), in the order of `samples`.

    `paper`: n_i / sum over those that trained it; `equal` (measured best): 1 / their number; `all`: n_i / sum over
    every edge of the round, so that one that did not train the key counts as no change. Raises ValueError for another
    mode and where no sample is left to divide by.
    """
    if mode not in ("paper", "equal", "all"):
        raise ValueError(f"share {mode!r} is none of paper, equal, all")
    own = {edge: n for edge, n in samples.items() if trained is None or edge in trained}
    if mode == "equal":
        return dict.fromkeys(own, 1 / len(own)) if own else {}
    total = math.fsum((samples if mode == "all" else own).values())
    if own and not total > 0:
        raise ValueError(f"share {mode}: {', '.join(own)} hold {total} samples; use equal")
    return {edge: n / total for edge, n in own.items()}


def stack(
    global_pair: Pair,
    changes: Sequence[tuple[Pair, Pair]],
    weights: Sequence[float],
    rank: int,
    *,
    split: Split = "orthonormal",
) -> Truncated:
    """G + sum_i p_i (B_i A_i - B_i0 A_i0) at `rank`, in G's dtype; changes: (trained pair, pair it started from).

    An edge trains only the leading part of G at its rank while the rest acts frozen; so it reports a change of G. Free
    rows of a are filled from G's. Holds every pair; R = G's rank + twice the sum of theirs.
    """
    pairs, signed = [global_pair], [1.0]
    for (trained, start), weight in zip(changes, weights, strict=True):
        pairs += [trained, start]
        signed += [weight, -weight]
    return low_rank(*concatenate(pairs, signed), rank, split=split, fill=global_pair[1]).to(global_pair[0].dtype)


def increment(
    global_pair: Pair, fresh: Sequence[Pair], weights: Sequence[float], rank: int, *, split: Split = "orthonormal"
) -> Truncated:
    """G + sum_i p_i B_i A_i at `rank`, in G's dtype: pairs that started from B = 0 on top of the frozen global."""
    exact = concatenate([global_pair, *fresh], [1.0, *weights])
    return low_rank(*exact, rank, split=split, fill=global_pair[1]).to(global_pair[0].dtype)


def truncate(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    rank: int,
    *,
    split: Split = "orthonormal",
    fill: torch.Tensor | None = None,
) -> Truncated:
    """sum_i p_i B_i A_i at `rank` (FlexLoRA, HLoRA), in the first pair's dtype, and as exact as that is."""
    dtype = pairs[0][0].dtype
    return low_rank(*concatenate(pairs, weights), rank, split=split, fill=fill, tolerance=tolerance_of(dtype)).to(dtype)


def pad(pairs: Sequence[Pair], weights: Sequence[float], rank: int) -> Pair:
    """Zero-pads to `rank` and averages A and B: the naive rule, whose product is not the average of the products.

    In the first pair's dtype. Raises ValueError for a pair of higher rank.
    """
    b = torch.zeros(len(pairs[0][0]), rank, dtype=torch.float64, device=pairs[0][0].device)  # [m, rank]
    a = torch.zeros(rank, pairs[0][1].shape[1], dtype=torch.float64, device=pairs[0][1].device)  # [rank, n]
    for pair, weight in zip(pairs, weights, strict=True):
        add_padded((b, a), pair, weight)
    return b.to(pairs[0][0].dtype), a.to(pairs[0][1].dtype)


def add_padded(total: Pair, pair: Pair, weight: float) -> None:
    """Adds the factors of `pair` times `weight` to those of `total` (float64), in place, zero-padded to its rank.

    Raises ValueError for a pair of higher rank.
    """
    (b, a), (own_b, own_a) = total, pair
    if len(own_a) > len(a):
        raise ValueError(f"a pair of rank {len(own_a)} cannot be padded to {len(a)}; raise the global rank")
    b[:, : len(own_a)] += weight * own_b.detach().double()
    a[: len(own_a)] += weight * own_a.detach().double()


def leading(b: torch.Tensor, a: torch.Tensor, rank: int) -> Pair:
    """The first `rank` triplets of a pair that low_rank made, all if it has fewer: its best product of that rank."""
    return b[:, :rank], a[:rank]


def tail(b: torch.Tensor, a: torch.Tensor, rank: int) -> Pair:
    """The triplets after the first `rank`, perhaps none: they act frozen on an edge that trains the leading ones."""
    return b[:, rank:], a[rank:]


def frobenius(b: torch.Tensor, a: torch.Tensor) -> float:
    """||b a||_F as the norm of R_b R_a^T: no m x n matrix, and full accuracy, which the Gram matrices would halve."""
    r_b = torch.linalg.qr(b.detach().double(), mode="r").R  # [min(m, R), R]
    r_a = torch.linalg.qr(a.detach().double().T, mode="r").R  # [min(n, R), R]
    return float((r_b @ r_a.T).norm())


def residual_norm(applied: Sequence[Pair], exact: Sequence[Pair]) -> float:
    """||applied - exact||_F / ||exact||_F of two sums of products; infinite if only the exact one is zero.

    Weights are folded in before: `concatenate(pairs, weights)` is one such pair.
    """
    signs = [1.0] * len(applied) + [-1.0] * len(exact)
    lost = frobenius(*concatenate([*applied, *exact], signs))
    whole = frobenius(*concatenate(exact, [1.0] * len(exact)))
    return lost / whole if whole else (math.inf if lost else 0.0)
