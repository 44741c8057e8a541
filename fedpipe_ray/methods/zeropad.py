"""Zero-padding: the naive average of LoRA factors of unequal rank (the baseline of HetLoRA, arXiv 2401.06432).

With B_k [m, r_k], A_k [r_k, n] of edge k, p_k = n_k / sum n its share of the samples, and 0 for what it has not:

    A = sum_k p_k [A_k; 0]        B = sum_k p_k [B_k, 0]

Edge k is sent, and trains, the first r_k rows of A and columns of B. Not exact: beside FedIT's error, triplets that
few edges have shrink by the share of the others in both factors, every round. At equal ranks it is FedIT.

Ours: one scale, alpha / rank of the global adapter, for everybody; a classifier's head is averaged with the same p_k.
AdamW starts fresh every round. The server holds one float64 sum of the factors, and for the residual that it reports
the sum of the products, of rank 8 x rank (twice that between two cuts); `cut` bounds what that sum is off by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from fedpipe_ray import ranks
from fedpipe_ray.folding import MEASURED, Padded, Sums, pairs_of
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile

from .base import LoraMethod, Updates, arrivals

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class ZeroPad(LoraMethod):
    """Zero-padding: LoRA of unequal ranks, sample-weighted average of the padded factors.

    ranks: of single edges, by name; of all others `rank`, which is the largest. variant: of LoRA.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    variant: Literal["plain", "rslora"] = "plain"

    pseudo_gradient: ClassVar[bool] = True
    updates: ClassVar[Updates] = "entries"

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks.require_ranks(self.ranks, self.rank)

    def check(self, site: Site) -> None:
        """Raises UserError for targets or edges that are not there; loads no weights."""
        ranks.check(self.ranks, site, self.spec(site))

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> dict[str, Message]:
        """The leading triplets, as many as the edge's rank."""
        return ranks.orders(state, {edge: self.ranks.get(edge, self.rank) for edge in edges})

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The edge's own factors after this round's local steps."""
        return Message(ranks.trained(order.tensors, site, self.spec(site), rng))

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """Sample-weighted mean of every tensor, zero-padded; the residual of the round."""
        mean, sums = Padded(state.tensors), Sums(MEASURED * self.rank)
        for report, message in arrivals(reports, partial(ranks.unfit, like=state.tensors)):
            mean.add(message.tensors, report.weight)
            sums.add(message.tensors, report.weight)
            del message  # before the next one is fetched
        if not sums.total:
            return state
        tensors = mean.mean()
        applied = {name: [pair] for name, pair in pairs_of(tensors).items()}
        return Message(tensors, {**state.numbers, **sums.told(applied, sums.exact())})
