"""RoLoRA: the factors take turns (Chen et al. 2024, arXiv 2409.02346).

The paper's: in odd rounds, from 1, edges train B with A frozen, in even rounds A with B frozen; the server averages
what was trained. The other factor is the same everywhere, so that each round is exact:

    odd    s B A = sum_k p_k s B_k A          even    s B A = sum_k p_k s B A_k

So `residual`, ||applied - dW*|| / ||dW*|| of the round, is 0 by construction, but for the rounding of float32, and is
told as 0. With unequal ranks dW* is what there was plus the mean of the changes, as for `ffa_lora`.

Ours: an edge keeps both factors of the last round in which it took part, and is sent only what changed since: to one
that takes part in every round, the factor that the round before averaged. Factors are sent in `wire.dtype`, as are
updates; the server goes on from the frozen factor as it was sent, for with the one of before, which no edge had, the
products would not be those that edges made: in bfloat16 a residual of 1.5e-3. AdamW starts fresh every round, so no
moments outlive a turn. p_k count the rows trained on; a classifier's head is trained in every round. Unequal ranks are
nested as in `ffa_lora`: an edge of rank r_k trains the first r_k columns of B or rows of A, at the global scale s =
alpha / rank, and counts as no change of the others. `variant: rslora` changes s alone. DoRA is not offered: divided by
the norm of its rows, the weight is linear in neither factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from fedpipe_ray import factors, lora, ranks
from fedpipe_ray.message import DTYPES, KEPT, Message
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile

from .base import LoraMethod, Updates, as_sent

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class RoLora(LoraMethod):
    """RoLoRA: odd rounds train and average B, even rounds A; each round is exact.

    ranks: of edges whose rank is below `rank`; they train the first rows and columns. variant: of LoRA.
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

    def rank_of(self, edge: str) -> int:
        """The rank that an edge trains."""
        return self.ranks.get(edge, self.rank)

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> Mapping[str, Message | Lost]:
        """Both factors, to keep, the head, and whose turn it is; edges of one rank share an order."""
        dtype = DTYPES[server.run.wire.dtype]

        def order(rank: int) -> Message:
            own = factors.nested(state.tensors, rank)
            kept = {KEPT + name: tensor.to(dtype) for name, tensor in own.items() if factors.factor(name)}
            return Message({**kept, **factors.heads(own)}, {"frozen_a": float(frozen(round) == "A")})

        orders = {rank: order(rank) for rank in {self.rank_of(edge) for edge in edges}}
        return {edge: orders[self.rank_of(edge)] for edge in edges}

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The factor whose turn it is after this round's local steps, and the head."""
        still = "A" if order.numbers["frozen_a"] else "B"
        model = lora.attach(site.base, self.spec(site).at(self.rank_of(site.name)))
        lora.load(model, {**order.kept, **order.rest})
        with factors.training_only(model, factors.without(lora.parameters(model), still)):
            site.train(model, rng)
        return Message(factors.without(lora.read(model), still))

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """The exact mean of the changes of the round's factor; the other one is what was sent of it."""
        sent = as_sent(state, server)
        mean = factors.exact_mean(factors.without(sent, frozen(round)), reports, self.rank_of)
        return state if mean is None else Message({**sent, **mean}, {**state.numbers, "residual": 0.0})

    def still(self, round: int) -> tuple[str, ...]:
        """Patterns of the names of the frozen factor, which server.optimizer leaves alone, be it rounded or not."""
        return (f"*.lora_{frozen(round)}.*",)


def frozen(round: int) -> str:
    """The factor that is not trained in a round, counted from 0."""
    return "A" if round % 2 == 0 else "B"
