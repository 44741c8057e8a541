"""FlexLoRA: average the products, redistribute them by SVD (Bai et al. 2024, arXiv 2402.11505; HLoRA is the same).

The paper's. With p_k = n_k / sum n the share of edge k in the samples, the server forms

    dW* = sum_k p_k B_k A_k = U S V^T

and edge k is sent the leading r_k triplets, B = U S, A = V^T: of all products of that rank the nearest to dW*. So the
target is exact, what acts is its best approximation of the global rank, and an edge's error is the rest of the
spectrum. FLoRA-NA (arXiv 2509.26399) asks for the factors of rank r nearest to dW*; at equal ranks these are they.

Ours: dW* is never formed (QR of the stacks, SVD of their core; stacking.py), and updates are folded one at a time. A
keeps orthonormal rows also where singular values are zero, as in the first round, so that all of it can train. One
scale, alpha / rank of the global adapter, for everybody; a classifier's head is averaged with the same p_k. The basis
changes with every round, and AdamW's moments are not carried over. The server holds a sum of the products of rank
min(m, n) at most, or `limit`, and twice that between two cuts; with a limit `cut` bounds what the sum is off by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedpipe_ray import ranks
from fedpipe_ray.folding import Padded, Sums, best, heads_of, of_b, pairs_of, require_limit
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile

from .base import LoraMethod, arrivals

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class FlexLora(LoraMethod):
    """FlexLoRA: LoRA of unequal ranks, exact average of the products, redistributed by SVD.

    ranks: of single edges, by name; of all others `rank`, the global adapter's and the largest. limit: rank of the sum
    that the server holds (null: whatever is exact). variant: of LoRA.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    variant: Literal["plain", "rslora"] = "plain"
    limit: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks.require_ranks(self.ranks, self.rank)
        require_limit(self.limit, self.rank)

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
        """The nearest adapter to the mean of the products, the mean of the heads; the residual of the round."""
        heads, sums = Padded(heads_of(state.tensors)), Sums(self.limit)
        for report, message in arrivals(reports, partial(ranks.unfit, like=state.tensors)):
            heads.add(heads_of(message.tensors), report.weight)
            sums.add(message.tensors, report.weight)
            del message  # before the next one is fetched
        if not sums.total:
            return state
        tensors, gaps, sizes = {**state.tensors, **heads.mean()}, {}, {}
        like, exact = pairs_of(state.tensors), sums.exact()
        for name in exact:
            pair, gaps[name], sizes[name] = best(exact[name], self.rank, like[name])
            tensors[of_b(name)], tensors[name] = pair
        return Message(tensors, {**state.numbers, **sums.shares(gaps, sizes)})
