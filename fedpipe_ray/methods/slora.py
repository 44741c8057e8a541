"""SLoRA: sparse tuning finds where LoRA starts (Babakniya et al. 2023, arXiv 2308.06522).

The paper's: for R1 rounds edges train a random share of the weights' entries, the same for all, about 1 %, and the
server averages them; the SVD of that change S of each weight then initialises LoRA, which goes on as FedIT on top of
W0:

    W0 + S,  S = sum_k p_k S_k        then        s B_0 A_0 = the product of rank r nearest to S

The mean of the sparse changes is exact; what the SVD loses, ||S - s B_0 A_0|| / ||S||, is the `residual` of the round
in which the phase changes, before it 0. A random mask spreads the spectrum, so that it is large for a low rank. After
it the rule is FedIT's, with FedIT's residual ||B A - sum_k p_k B_k A_k|| / ||sum_k p_k B_k A_k||, for which the server
holds the sum of the products, of rank 8 x rank (twice that between two cuts); `cut` bounds what that sum is off by.

Ours: the mask is a function of the run's seed, never sent; A_0 has orthonormal rows and B_0 = U Sigma / s; where S has
fewer directions, A_0 has random rows and B_0 zeros. AdamW starts fresh every round, so no moments come over from the
first phase. Evaluated in the first phase is W0 + S itself; a run that is stopped in it exports the adapter nearest to
S. p_k count the rows trained on; a classifier's head is trained and averaged in both phases. The virtual clock charges
the sparse phase as if the targets were trained whole: gradients are made dense, layer by layer, before the mask picks
its entries. `variant: rslora` changes s alone; DoRA is not offered.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from fedpipe_ray import ranks, sparse
from fedpipe_ray.errors import UserError
from fedpipe_ray.folding import MEASURED, Sums, pairs_of
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, require

from .base import LoraMethod, LoraWeights, Updates, Weights, weighted_mean

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class SLora(LoraMethod):
    """SLoRA: rounds of sparse tuning, whose change initialises LoRA by its SVD; then FedIT.

    sparse_rounds: R1; density: share of each target's entries that is trained in them; sparse_lr: their rate (null:
    local.lr). variant: of LoRA.
    """

    sparse_rounds: int = 2
    density: float = 0.01
    sparse_lr: float | None = None
    variant: Literal["plain", "rslora"] = "plain"

    pseudo_gradient: ClassVar[bool] = True
    updates: ClassVar[Updates] = "entries"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sparse_rounds >= 1, f"method.sparse_rounds: {self.sparse_rounds} must be at least 1")
        require(0 < self.density <= 1, f"method.density: {self.density} must lie in (0, 1]")
        require(self.sparse_lr is None or self.sparse_lr > 0, f"method.sparse_lr: {self.sparse_lr} must be above 0")

    def check(self, site: Site) -> None:
        """Raises UserError if the run has no round for LoRA, or the model no place for it."""
        ranks.check_linear(site, self.spec(site))
        if site.run.rounds <= self.sparse_rounds:
            raise UserError(
                f"rounds: {site.run.rounds} leave none for LoRA after method.sparse_rounds: {self.sparse_rounds}"
            )

    def places(self, site: Site) -> dict[str, sparse.Places]:
        """The mask, the same at every site of a run."""
        if "places" not in site.memo:
            site.memo["places"] = sparse.places(site.skeleton(self.spec(site)), self.density, site.run.seed)
        found: dict[str, sparse.Places] = site.memo["places"]
        return found

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """S = 0, and the head of a classifier as the base model has it."""
        own = super().start(server, rng).tensors
        tensors = {module + sparse.PART: torch.zeros(len(at.index)) for module, at in self.places(server).items()}
        return Message({**tensors, **{n: t for n, t in own.items() if ".lora_" not in n}}, {"residual": 0.0})

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> Mapping[str, Message | Lost]:
        """The entries of S, later the adapter, to everybody."""
        return dict.fromkeys(edges, Message(state.tensors))

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """What was sent after this round's local steps."""
        if not is_sparse(order):
            return super().local_update(order, site, rng)
        where = self.places(site)
        model = sparse.attach(site.base, self.spec(site), where)
        sparse.load(model, order.tensors)
        rate: dict[str, Any] = {} if self.sparse_lr is None else {"lr": self.sparse_lr}
        site.train(model, rng, **rate)
        dense = 2.0 * site.cost.tokens * sum(math.prod(at.size) for at in where.values())  # the gradient of S
        site.cost = dataclasses.replace(site.cost, flops=site.cost.flops + dense)
        return Message(sparse.read(model))

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """The mean of S, at the end of the first phase as an adapter; then FedIT and what it misses."""
        if is_sparse(state):
            after = weighted_mean(state, reports)
            if after is state or round + 1 < self.sparse_rounds:
                return after
            tensors, lost = sparse.adapter(after.tensors, self.places(server), self.spec(server), server.run.seed)
            return Message(tensors, {"residual": lost})
        sums = Sums(MEASURED * self.rank)
        after = weighted_mean(state, reports, also=sums.add)
        if not sums.total:
            return state
        applied = {name: [pair] for name, pair in pairs_of(after.tensors).items()}
        return Message(after.tensors, sums.told(applied, sums.exact()))

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: W0 + S, later the global adapter."""
        spec = self.spec(site)
        if is_sparse(state):
            return {"global": sparse.SparseWeights(spec, state.tensors, self.places(site), site.run.seed)}
        return {"global": LoraWeights(spec, state.tensors)}


def is_sparse(message: Message) -> bool:
    """Whether a state or an order is one of the first phase."""
    return any(name.endswith(sparse.PART) for name in message.tensors)
