"""FLoRA: stack the edges' factors, fold them into the base, start anew (Wang et al. 2024, arXiv 2409.05976).

The paper's. Every round each edge trains a fresh adapter of its own rank. The server stacks them,

    B = [B_1 | B_2 | ...]        A = [p_1 A_1; p_2 A_2; ...]        B A = sum_k p_k B_k A_k,    p_k = n_k / sum n

which is exact, sends the stack to everybody, and everybody adds it to W0. So an edge sends r_k (m + n) numbers and is
sent R (m + n), R = sum_k r_k; the fresh start costs convergence.

Ours: nothing is added to W0, which is shared and perhaps quantized; the stacks are kept as frozen blocks by round
(blocks.py) that act beside the fresh adapter, and an edge which holds the older ones is charged the new one alone.
Once their rank would exceed min(m, n) they become one block without loss, which is sent whole. p_k is folded into B.
An edge draws its A itself, B is zero, so nothing is sent for the start. One scale, alpha / rank, for everybody; a
classifier's head goes on and is averaged with the same p_k. AdamW starts fresh every round, as the adapter does. The
server holds all updates of a round as one stack, of rank min(m, n) at most, or `limit` (and twice that between two
cuts), and the blocks in float32, in its state and in every checkpoint. Exported is one plain adapter of the rank of
all blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from fedpipe_ray import blocks, lora, ranks
from fedpipe_ray.folding import Padded, Sums, heads_of, require_limit
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile

from .base import LoraMethod, Updates, Weights, arrivals

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class Flora(LoraMethod):
    """FLoRA: fresh LoRA of unequal ranks every round, stacked exactly and kept frozen.

    ranks: of single edges, by name; of all others `rank`, the largest. limit: rank of a round's stack (null: whatever
    is exact). variant: of LoRA.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    variant: Literal["plain", "rslora"] = "plain"
    limit: int | None = None

    updates: ClassVar[Updates] = "values"

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks.require_ranks(self.ranks, self.rank)
        require_limit(self.limit, self.rank)

    def check(self, site: Site) -> None:
        """Raises UserError for targets or edges that are not there; loads no weights."""
        ranks.check(self.ranks, site, self.spec(site))

    def like(self, server: Site) -> dict[str, torch.Tensor]:
        """Shapes of the largest update, on the meta device; made once a run."""
        if "like" not in server.memo:
            found = lora.parameters(server.skeleton(self.spec(server)))
            server.memo["like"] = {name: parameter.detach() for name, parameter in found.items()}
        like: dict[str, torch.Tensor] = server.memo["like"]
        return like

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """No block, and the head of a classifier as the base model has it."""
        return Message(heads_of(super().start(server, rng).tensors))

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> dict[str, Message]:
        """Everybody gets all blocks, of which those it holds cost nothing, and the head."""
        return dict.fromkeys(edges, Message(state.tensors))

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """A fresh adapter after this round's local steps beside the blocks."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        model = blocks.attach(site.base, self.spec(site).at(self.ranks.get(site.name, self.rank)), order)
        shapes = {name: tuple(parameter.shape) for name, parameter in lora.parameters(model).items()}
        lora.load(model, lora.initial(shapes, generator) | order.rest)
        site.train(model, rng)
        return Message(lora.read(model))

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """The blocks and that of this round, the mean of the heads; the residual of the round."""
        heads, sums = Padded(state.rest), Sums(self.limit)
        for report, message in arrivals(reports, partial(ranks.unfit, like=self.like(server))):
            heads.add(heads_of(message.tensors), report.weight)
            sums.add(message.tensors, report.weight)
            del message  # before the next one is fetched
        if not sums.total:
            return state
        exact = sums.exact()
        tensors = blocks.added(state, round, exact)
        told = sums.told({name: [(b.float(), a.float())] for name, (b, a) in exact.items()}, exact)
        return Message({**tensors, **heads.mean()}, {**state.numbers, **told})

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: all blocks as one adapter; before the first of them one that does nothing."""
        own = dict(state.rest)
        if not state.kept:
            nothing = lora.parameters(site.skeleton(self.spec(site).at(1)))
            own = {name: torch.zeros(p.shape) for name, p in nothing.items() if ".lora_" in name} | own
        return {"global": blocks.weights(self.spec(site), own, state)}
