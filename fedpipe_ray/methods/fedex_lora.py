"""FedEx-LoRA: FedIT, and what it misses added to the base (Singhal et al. 2024, arXiv 2410.09432).

The paper's. With p_k = n_k / sum n the factors are averaged as in FedIT, A = sum p_k A_k, B = sum p_k B_k, and

    E = sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B)(A_k - A),        rank at most (K - 1) r for K edges,

is added to W0 everywhere, so that B A + E is exact. E is sent as factors: (K - 1) r (m + n) numbers more to each
edge.

Ours: E is not added to W0, which is shared and perhaps quantized; it is kept as frozen blocks by round (blocks.py)
beside the adapter, and an edge which holds the older ones is charged the new one alone. Once their rank would exceed
min(m, n) they become one block without loss, which is sent whole. E is found by QR and a small SVD, in which the
rounding of B and A to float32 is taken up as far as (K - 1) r triplets go. On a half wire A and B are rounded to
wire.dtype before E is found, for that is what edges train beside it, and E, float32, has rank (K + 1) r at most; with
the means as they were edges would apply another product, which is off by 1e-3 of it. All edges have one rank and the
scale alpha / rank; a classifier's head is averaged with the same p_k. AdamW starts fresh every round. The server holds
a sum of the products of rank min(m, n) at most, or `limit` (and twice that between two cuts), and the blocks in
float32, in its state and in every checkpoint. Exported is one plain adapter of the rank of B A and all blocks.
Without E this is FedIT, on a float32 wire bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from fedpipe_ray import blocks, lora, ranks
from fedpipe_ray.folding import Sums, pairs_of, require_limit
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.stacking import concatenate

from .base import LoraMethod, Updates, Weights, as_sent, weighted_mean

if TYPE_CHECKING:
    import torch

    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class FedExLora(LoraMethod):
    """FedEx-LoRA: LoRA, average of A and of B, and the exact rest of their product kept frozen.

    limit: rank of the sum that the server holds (null: whatever is exact). variant: of LoRA.
    """

    limit: int | None = None
    variant: Literal["plain", "rslora"] = "plain"

    updates: ClassVar[Updates] = "entries"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_limit(self.limit, self.rank)

    def check(self, site: Site) -> None:
        """Raises UserError for targets that are not there; loads no weights."""
        ranks.check({}, site, self.spec(site))

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The adapter after this round's local steps beside the blocks."""
        model = blocks.attach(site.base, self.spec(site), order)
        lora.load(model, order.rest)
        site.train(model, rng)
        return Message(lora.read(model))

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """Sample-weighted mean of every tensor, the blocks and that of this round; the residual of the round."""
        sums, edges = Sums(self.limit), 0

        def also(tensors: Mapping[str, torch.Tensor], weight: float) -> None:
            nonlocal edges
            edges += 1
            sums.add(tensors, weight)

        mean = weighted_mean(Message(state.rest, state.numbers), reports, also)
        if not sums.total:
            return state
        factors = Message({name: tensor for name, tensor in mean.tensors.items() if ".lora_" in name})
        adapter = {**mean.tensors, **as_sent(factors, server)}  # a classifier's head as it is
        exact, own, rest = sums.exact(), pairs_of(adapter), {}
        rank = (edges - 1 if server.run.wire.dtype == "float32" else edges + 1) * self.rank
        for name, pair in exact.items():
            missed = concatenate([pair, own[name]], [1.0, -1.0])
            if rank:
                b, a = blocks.lossless(missed, rank)
                rest[name] = b.float(), a.float()
        told = sums.told({name: [own[name], *([rest[name]] if name in rest else [])] for name in exact}, exact)
        return Message({**blocks.added(state, round, rest), **adapter}, {**state.numbers, **told})

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: the averaged adapter and all blocks as one."""
        return {"global": blocks.weights(self.spec(site), state.rest, state)}
