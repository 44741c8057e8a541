"""FedIT: federated LoRA by averaging the factors (Zhang et al. 2023, arXiv 2305.05644).

With B_k, A_k the factors of edge k after its local steps and p_k = n_k / sum n its share of the samples:

    A = sum_k p_k A_k        B = sum_k p_k B_k

as in the paper. The applied update B A differs from sum_k p_k B_k A_k by -sum_k p_k (B_k - B)(A_k - A), which vanishes
only if the edges agree in one factor. Ours: n_k counts the rows an edge trained on in the round, so an edge with fewer
steps weighs less; a classifier's head is averaged with the same weights; a round without usable report changes nothing.
`residual` reports that difference, as a share of what the exact sum is. The sum is no function of the averaged factors,
so a server that tells it must hold more than them: the updates of up to eight edges, or of sixteen between two cuts,
where the mean alone holds one. So it is off by default; it changes no other number.
`variant: rslora` changes the scale alone; with `dora` the magnitudes are averaged like the factors, also not exactly:
the weight m (W0 + s B A) / |W0 + s B A| is linear in none of the three.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedpipe_ray import ranks
from fedpipe_ray.averaging import average
from fedpipe_ray.errors import UserError
from fedpipe_ray.folding import MEASURED, Sums, pairs_of
from fedpipe_ray.lora import Variant
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import require

from .base import LoraMethod, Updates, weighted_mean

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class Lora(LoraMethod):
    """FedIT: LoRA, sample-weighted average of A and of B.

    variant: of LoRA, `plain`, `rslora` or `dora`. residual: whether rounds.jsonl tells ||B A - sum p_k B_k A_k|| /
    ||sum p_k B_k A_k||, which costs memory.
    """

    variant: Variant = "plain"
    residual: bool = False

    asynchronous: ClassVar[bool] = True
    averaging: ClassVar[bool] = True
    pseudo_gradient: ClassVar[bool] = True
    updates: ClassVar[Updates] = "entries"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.residual and self.variant == "dora"),
            "method.residual: with variant: dora the update is no product of factors; leave residual out",
        )

    def check(self, site: Site) -> None:
        """Raises UserError as LoraMethod does, and for a residual of what is no mean or no product of two matrices."""
        super().check(site)
        if self.residual:
            ranks.check_linear(site, self.spec(site), "set method.residual: false")
        rule = site.run.server.aggregator.name
        if self.residual and rule != "mean":
            raise UserError(f"method.residual: is that of a mean, and server.aggregator is {rule}; leave one out")

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """Sample-weighted mean of every tensor, or what server.aggregator names."""
        if not self.residual:
            return average(state, reports, server)
        sums = Sums(MEASURED * self.rank)
        after = weighted_mean(state, reports, also=sums.add)
        if not sums.total:
            return state
        applied = {name: [pair] for name, pair in pairs_of(after.tensors).items()}
        return Message(after.tensors, {**state.numbers, **sums.told(applied, sums.exact())})
