"""HetLoRA: ranks by edge, prune themselves, weigh by the size of the product (Cho et al. 2024, arXiv 2401.06432).

The paper's. Edge k is sent the first r_k triplets of the global adapter and minimises

    L_k + lambda ||B[:, g r_k :]|| ||A[g r_k :, :]||

If that tail is smaller after the local steps than before them, r_k becomes g r_k and the edge sends no more than
that. The server zero-pads and averages, with weights that are the larger, the more an edge has to say:

    A = sum_k q_k [A_k; 0]        B = sum_k q_k [B_k, 0]        q_k = ||B_k A_k||_F / sum_j ||B_j A_j||_F

Ours: g r_k is rounded down and stays at `least` or above; the tail is summed over all matrices, so that an edge has
one rank; ||B_k A_k|| is taken over all matrices together, and q_k also averages a classifier's head; one scale, alpha
/ rank of the global adapter, for everybody. The defaults of lambda and g are ours. AdamW starts fresh every round.
Not exact, as zero-padding is not; the residual that is reported is against sum_k q_k B_k A_k. The server holds what
it does for zeropad. An edge's rank is that of its last update, and stands in the state as `EDGE/rank`; `rank` is the
round's mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from fedpipe_ray import ranks
from fedpipe_ray.folding import MEASURED, Padded, Sums, pairs_of
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, require
from fedpipe_ray.stacking import frobenius, tail

from .base import LoraMethod, Updates, arrivals

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class HetLora(LoraMethod):
    """HetLoRA: LoRA of unequal ranks that prune themselves, averaged by the size of the products.

    ranks: of single edges at the start, by name; of all others `rank`, the largest. penalty: lambda; 0 leaves the loss
    as it is. gamma: g, the share of its rank that an edge may shrink to in a round; 1 never prunes. least: no edge's
    rank falls below it. variant: of LoRA.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    variant: Literal["plain", "rslora"] = "plain"
    penalty: float = 0.001
    gamma: float = 0.99
    least: int = 1

    pseudo_gradient: ClassVar[bool] = True
    updates: ClassVar[Updates] = "entries"

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks.require_ranks(self.ranks, self.rank)
        require(self.penalty >= 0, f"method.penalty: {self.penalty} must not be negative")
        require(0 < self.gamma <= 1, f"method.gamma: {self.gamma} must lie in (0, 1]")
        smallest = min([self.rank, *self.ranks.values()])
        require(
            1 <= self.least <= smallest,
            f"method.least: {self.least} must lie between 1 and the smallest rank of an edge, {smallest}",
        )

    def check(self, site: Site) -> None:
        """Raises UserError for targets or edges that are not there; loads no weights."""
        ranks.check(self.ranks, site, self.spec(site))

    def pruned(self, rank: int) -> int:
        """What an edge of `rank` may shrink to."""
        return min(rank, max(self.least, math.floor(self.gamma * rank)))

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> dict[str, Message]:
        """The leading triplets, as many as the edge has left."""
        begun = {edge: self.ranks.get(edge, self.rank) for edge in edges}
        return ranks.orders(state, {e: int(state.numbers.get(f"{e}/rank", rank)) for e, rank in begun.items()})

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The edge's own factors after this round's local steps, without the tail if it decayed."""
        kept = self.pruned(ranks.rank_of(order.tensors))
        tensors = ranks.trained(
            order.tensors, site, self.spec(site), rng,
            (lambda now: self.penalty * tail_norm(now, kept)) if self.penalty else None,
        )  # fmt: skip
        if tail_norm(tensors, kept) < tail_norm(order.tensors, kept):
            tensors = ranks.part(tensors, kept)
        return Message(tensors)

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """Mean of every tensor, zero-padded, by the norms of the products; ranks, and the residual of the round."""
        mean, sums, numbers = Padded(state.tensors), Sums(MEASURED * self.rank), dict(state.numbers)
        found = []
        for report, message in arrivals(reports, partial(ranks.unfit, like=state.tensors)):
            weight = math.hypot(*(frobenius(*pair) for pair in pairs_of(message.tensors).values()))
            mean.add(message.tensors, weight)
            sums.add(message.tensors, weight)
            found.append(ranks.rank_of(message.tensors))
            numbers[f"{report.edge}/rank"] = found[-1]
            del message  # before the next one is fetched
        if not sums.total:
            return state
        tensors = mean.mean()
        applied = {name: [pair] for name, pair in pairs_of(tensors).items()}
        return Message(tensors, {**numbers, "rank": sum(found) / len(found), **sums.told(applied, sums.exact())})


def tail_norm(tensors: Mapping[str, torch.Tensor], rank: int) -> torch.Tensor:
    """sum over matrices of ||B[:, rank:]||_F ||A[rank:, :]||_F, in float32; its gradient is 0 where B is."""
    tails = [tail(*pair, rank) for pair in pairs_of(tensors).values()]
    return torch.stack([b.float().norm() * a.float().norm() for b, a in tails]).sum()
