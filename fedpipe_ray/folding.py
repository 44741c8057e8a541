"""Sums over a round's updates, folded one at a time: what the server holds does not grow with the number of edges.

The mean of the factors is a running sum. The target dW* = sum_k p_k B_k A_k is none: it is kept as one stacked pair a
module, which is cut back whenever it gets too high (ours). LoRA's scale is constant and left out, as in stacking.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from .section import require
from .stacking import Pair, add_padded, concatenate, frobenius, low_rank, tolerance_of

Tensors = Mapping[str, torch.Tensor]

MEASURED = 8  # times its rank: what a rule that needs the sum for its residual alone keeps of it


class Folding:
    """sum_i w_i b_i a_i of one module, as a pair of rank at most `limit`, beside pairs of at most as much that wait.

    limit: null is min(m, n), at which nothing is lost. cut: the sum of the Frobenius norms of what was cut so far; the
    sum's distance from the exact one is never more. Holds float64 of what was cut, and the waiting pairs as they came.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.cut = 0.0
        self._pairs: list[Pair] = []
        self._weights: list[float] = []

    @property
    def rank(self) -> int:
        """Of what is held now."""
        return sum(len(a) for _, a in self._pairs)

    def add(self, pair: Pair, weight: float) -> None:
        """Adds weight x b a, b [m, r], a [r, n]."""
        self._pairs.append(pair)
        self._weights.append(weight)
        limit = self.limit or min(len(pair[0]), pair[1].shape[1])
        if self.rank > 2 * limit:
            self._cut(limit)

    def pair(self) -> Pair:
        """The sum at rank `limit` or below: b [m, R], a [R, n], float64. Raises ValueError if nothing was added."""
        if not self._pairs:
            raise ValueError("nothing was folded")
        limit = self.limit or min(len(self._pairs[0][0]), self._pairs[0][1].shape[1])
        if self.rank > limit:
            self._cut(limit)
        return concatenate(self._pairs, self._weights)

    def _cut(self, limit: int) -> None:
        self._pairs, self._weights, lost = [], [], [*zip(self._pairs, self._weights, strict=True)]
        best = low_rank(*concatenate([pair for pair, _ in lost], [weight for _, weight in lost]), limit)
        found = int((best.singular > 0).sum())
        self.cut += best.residual
        self._pairs, self._weights = [(best.b[:, :found], best.a[:found])], [1.0]


class Sums:
    """The target of a round, dW* = sum_k w_k B_k A_k / sum_k w_k, of every module; updates come one at a time."""

    def __init__(self, limit: int | None = None) -> None:
        self.total = 0.0
        self._limit = limit
        self._modules: dict[str, Folding] = {}

    def add(self, tensors: Tensors, weight: float) -> None:
        """Takes an update's factors, by PEFT key; other tensors are left out."""
        self.total += weight
        for name, pair in pairs_of(tensors).items():
            self._modules.setdefault(name, Folding(self._limit)).add(pair, weight)

    def exact(self) -> dict[str, Pair]:
        """dW* by module, under the key of A, in float64."""
        found = {name: folding.pair() for name, folding in self._modules.items()}
        return {name: (b / self.total, a) for name, (b, a) in found.items()}

    def told(self, applied: Mapping[str, Sequence[Pair]], exact: Mapping[str, Pair]) -> dict[str, float]:
        """What a round reports: `residual`, ||applied - dW*|| / ||dW*|| over all modules; `cut`, as `shares` has it."""
        gaps = {name: frobenius(*concatenate([*applied[name], exact[name]], signs(applied[name]))) for name in exact}
        return self.shares(gaps, {name: frobenius(*pair) for name, pair in exact.items()})

    def shares(self, gaps: Mapping[str, float], sizes: Mapping[str, float]) -> dict[str, float]:
        """The same from norms by module. cut: what ||dW*|| and the gap are off by at most, as a share of ||dW*||."""
        lost, whole = math.hypot(*gaps.values()), math.hypot(*sizes.values())
        cut = math.hypot(*(folding.cut for folding in self._modules.values())) / self.total if self.total else 0.0
        return {"residual": lost / whole if whole else 0.0, "cut": cut / whole if whole else 0.0}


class Padded:
    """Weighted mean of factors of unequal rank, zero-padded, and of a classifier's head; one float64 sum is held."""

    def __init__(self, like: Tensors) -> None:
        self.total = 0.0
        self._like = like
        self._sums = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in like.items()}
        self._pairs = pairs_of(self._sums)

    def add(self, tensors: Tensors, weight: float) -> None:
        """Takes an update. Raises ValueError for factors of a higher rank."""
        self.total += weight
        for name, pair in pairs_of(tensors).items():
            add_padded(self._pairs[name], pair, weight)
        for name in heads_of(tensors):
            self._sums[name] += weight * tensors[name].double()

    def mean(self) -> dict[str, torch.Tensor]:
        """In the shapes and dtypes of `like`."""
        return {name: (t / self.total).to(self._like[name].dtype) for name, t in self._sums.items()}


def require_limit(limit: int | None, rank: int) -> None:
    """Raises ValueError for a limit below the rank that is asked of the sum."""
    require(limit is None or limit >= rank, f"method.limit: {limit} must be at least method.rank: {rank}, or null")


def pairs_of(tensors: Tensors) -> dict[str, Pair]:
    """(B, A) of every module, under the key of A."""
    named = [name for name in tensors if ".lora_A." in name]
    return {name: (tensors[of_b(name)], tensors[name]) for name in named}


def of_b(name_a: str) -> str:
    """The PEFT key of B beside that of A."""
    return name_a.replace(".lora_A.", ".lora_B.")


def heads_of(tensors: Tensors) -> dict[str, torch.Tensor]:
    """What is trained whole: a classifier's own layers."""
    return {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}


def signs(applied: Sequence[Pair]) -> list[float]:
    """Of applied - exact."""
    return [1.0] * len(applied) + [-1.0]


def best(pair: Pair, rank: int, like: Pair) -> tuple[Pair, float, float]:
    """(nearest product of `rank` in the dtype of `like`, whose a fills free rows; its distance; norm of the whole)."""
    dtype = like[0].dtype
    found = low_rank(*pair, rank, fill=like[1], tolerance=tolerance_of(dtype)).to(dtype)
    return (found.b, found.a), found.residual, math.hypot(float(found.singular.norm()), found.residual)
