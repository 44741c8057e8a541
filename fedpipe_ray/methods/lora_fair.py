"""LoRA-FAIR: keep the average of A, correct that of B for what the product misses (Bian et al. 2024, arXiv 2411.14961).

The paper's. With p_k = n_k / sum n, A = sum p_k A_k, B = sum p_k B_k and dW* = sum p_k B_k A_k the server looks for a
small dB such that (B + dB) A is near dW*, and sends (B + dB, A) to everybody. The paper measures nearness by cosine
similarity and takes gradient steps.

Ours is the Frobenius version, ||dW* - (B + dB) A||^2 + lambda ||dB||^2, which has a closed form:

    dB = (dW* - B A) A^T (A A^T + lambda I)^-1

Exact if the rows of dW* lie in those of A, up to lambda. All edges have one rank and the scale alpha / rank; a
classifier's head is averaged with the same p_k. AdamW starts fresh every round. Bytes are FedIT's. The server holds a
sum of the products of rank min(m, n) at most, or `limit`, and twice that between two cuts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from fedpipe_ray import ranks
from fedpipe_ray.folding import Sums, of_b, pairs_of, require_limit
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import require
from fedpipe_ray.stacking import Pair

from .base import LoraMethod, Updates, weighted_mean

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class LoraFair(LoraMethod):
    """LoRA-FAIR: LoRA, average of A and of B, and B corrected so that the product is near the average of the products.

    lam: lambda, on ||dB||^2; 0 is the nearest there is. limit: rank of the sum that the server holds (null: whatever is
    exact). variant: of LoRA.
    """

    lam: float = 0.01
    limit: int | None = None
    variant: Literal["plain", "rslora"] = "plain"

    updates: ClassVar[Updates] = "entries"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lam >= 0, f"method.lam: {self.lam} must not be negative")
        require_limit(self.limit, self.rank)

    def check(self, site: Site) -> None:
        """Raises UserError for targets that are not there; loads no weights."""
        ranks.check({}, site, self.spec(site))

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """Sample-weighted mean of every tensor, B corrected; the residual of the round."""
        sums = Sums(self.limit)
        mean = weighted_mean(state, reports, also=sums.add)
        if not sums.total:
            return state
        exact, tensors = sums.exact(), dict(mean.tensors)
        for name, pair in pairs_of(mean.tensors).items():
            tensors[of_b(name)] = corrected(pair, exact[name], self.lam)
        applied = {name: [pair] for name, pair in pairs_of(tensors).items()}
        return Message(tensors, {**state.numbers, **sums.told(applied, exact)})


def corrected(mean: Pair, exact: Pair, lam: float) -> torch.Tensor:
    """B + dB [m, r] in B's dtype, from the averages (B [m, r], A [r, n]) and the exact sum (b [m, R], a [R, n]).

    lam = 0 takes the pseudo-inverse, so that rows of A that depend on others do no harm.
    """
    b, a = (factor.double() for factor in mean)
    missed = exact[0] @ (exact[1] @ a.T) - b @ (a @ a.T)  # [m, r]
    gram = a @ a.T + lam * torch.eye(len(a), dtype=torch.float64, device=a.device)
    better: torch.Tensor = b + missed @ torch.linalg.pinv(gram, hermitian=True)
    return better.to(mean[0].dtype)
