"""FFA-LoRA: one factor is frozen, so that averaging the other is exact (Sun et al. 2024, arXiv 2403.12313, ICLR 2024).

The paper's: A_0 is drawn once and never trained, B starts at zero, edges train B alone, the server averages it:

    B = sum_k p_k B_k        s B A_0 = sum_k p_k s B_k A_0 = dW*

so the applied update is the mean of the edges' updates, whatever they are: `residual`, ||applied - dW*|| / ||dW*|| of
the round, is 0 by construction, but for the rounding of float32, and is told as 0. A_0 is float32 on edges and server
alike, whatever wire.dtype is. With unequal ranks dW* is what there was, as it was sent, plus the mean of the changes.

Ours: A_0 is a function of the run's seed that every edge evaluates for itself, so that it is in no message; p_k count
the rows trained on in the round; a classifier's head is trained and averaged with the same weights; `variant: rslora`
changes the scale s alone. DoRA is not offered: divided by the norm of its rows, the weight is not linear in B.

Unequal ranks, ours: an edge of rank r_k trains the first r_k columns of B with the first r_k rows of A_0, at the global
adapter's scale s = alpha / rank. Its model is then s B_k A_0[:r_k], and what it reports is a change of those columns:

    B[:, j] <- B[:, j] + sum over the edges with r_k > j of p_k (B_k[:, j] - B[:, j])

An edge that did not train a column counts as the column it would have been sent, that is as no change. So what is
applied is exactly s B A_0 + sum_k p_k s (B_k - B[:, :r_k]) A_0[:r_k], which is dW* where all ranks are equal, and in
the first round. Counting such an edge as zero, as dW* literally says, would shrink the last columns in every round by
the share of the edges that lack them, although nobody learned that; averaging over those edges alone that trained a
column would apply more than the mean of the changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from fedpipe_ray import factors, lora, ranks
from fedpipe_ray.errors import UserError
from fedpipe_ray.message import Message
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile

from .base import LoraMethod, LoraWeights, Updates, Weights, as_sent

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class FfaLora(LoraMethod):
    """FFA-LoRA: A frozen as the seed draws it and never sent; B trained and averaged, which is exact.

    ranks: of edges whose rank is below `rank`; they train the first columns of B. variant: of LoRA.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    variant: Literal["plain", "rslora"] = "plain"

    asynchronous: ClassVar[bool] = True
    pseudo_gradient: ClassVar[bool] = True
    updates: ClassVar[Updates] = "entries"

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks.require_ranks(self.ranks, self.rank)

    def check(self, site: Site) -> None:
        """Raises UserError for targets or edges that are not there; loads no weights."""
        ranks.check(self.ranks, site, self.spec(site))
        if site.run.fleet.mode == "buffered" and any(rank < self.rank for rank in self.ranks.values()):
            raise UserError(
                "method.ranks: fleet.mode: buffered needs equal ranks; leave them out, or set fleet.mode: synchronous"
            )

    def rank_of(self, edge: str) -> int:
        """How many columns of B an edge trains."""
        return self.ranks.get(edge, self.rank)

    def frozen(self, site: Site) -> dict[str, torch.Tensor]:
        """A_0 [rank, d_in] of every module, the same at every site of a run."""
        if "frozen" not in site.memo:
            shapes = {name: tuple(p.shape) for name, p in lora.parameters(site.skeleton(self.spec(site))).items()}
            own = {name: shape for name, shape in shapes.items() if factors.factor(name) == "A"}
            seed = int(rng_for(site.run.seed, 0, "frozen").integers(2**63))
            site.memo["frozen"] = lora.initial(own, torch.Generator().manual_seed(seed))
        found: dict[str, torch.Tensor] = site.memo["frozen"]
        return found

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """B = 0, and the head of a classifier as the base model has it."""
        return Message(factors.without(super().start(server, rng).tensors, "A"))

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> Mapping[str, Message | Lost]:
        """Each edge's columns of B; edges of one rank share an order."""
        orders = {rank: Message(factors.nested(state.tensors, rank)) for rank in {self.rank_of(edge) for edge in edges}}
        return {edge: orders[self.rank_of(edge)] for edge in edges}

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """B after this round's local steps beside the frozen A_0."""
        rank = self.rank_of(site.name)
        model = lora.attach(site.base, self.spec(site).at(rank))
        lora.load(model, {**factors.nested(self.frozen(site), rank), **order.tensors})
        with factors.training_only(model, order.tensors):
            site.train(model, rng)
        return Message(factors.without(lora.read(model), "A"))

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """The exact mean of the changes of B."""
        mean = factors.exact_mean(as_sent(state, server), reports, self.rank_of)
        return state if mean is None else Message(mean, {**state.numbers, "residual": 0.0})

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: the global adapter, A_0 and B."""
        return {"global": LoraWeights(self.spec(site), {**self.frozen(site), **state.tensors})}
