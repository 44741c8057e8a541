"""FedSA-LoRA: A is shared, B stays on the edge (Guo et al. 2024, arXiv 2410.01463, ICLR 2025).

The paper's: edges train both factors; A, which learns what is general, is averaged,

    A = sum_k p_k A_k,        edge k applies s B_k A

and B_k, which learns what is the edge's own, never leaves the edge. There is no global adapter: nothing that one model
applies is the mean of the edges' updates, and no residual is defined. What is reported is each edge's quality with its
own B_k on its own rows, and their mean. The paper has it with rsLoRA too.

Ours: B_k is the edge's private state, on its disk after each round; an edge that never took part has B_k = 0 and so the
base model. p_k count the rows trained on; a classifier's head is shared, and averaged with the same weights. With
`variant: dora` the magnitudes, which belong to the rows of the weight as B_k's do, stay on the edge beside it. A run
exports nothing; `fedpipe export RUN --edge NAME` writes an edge's A and B as a PEFT adapter, where its private state
is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from fedpipe_ray import lora, ranks
from fedpipe_ray.averaging import average
from fedpipe_ray.lora import Variant
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report

from .base import LoraMethod, LoraWeights, Updates, Weights

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class FedSaLora(LoraMethod):
    """FedSA-LoRA: A trained and averaged, each edge's B private; personal models and no global one.

    variant: of LoRA, `plain`, `rslora` or `dora`.
    """

    variant: Variant = "plain"

    personal: ClassVar[bool] = True
    averaging: ClassVar[bool] = True
    pseudo_gradient: ClassVar[bool] = True
    updates: ClassVar[Updates] = "entries"

    def check(self, site: Site) -> None:
        """Raises UserError for targets that are not there or have no such factors; loads no weights."""
        ranks.check_linear(site, self.spec(site))

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """A fresh A, and the head of a classifier as the base model has it."""
        return Message(shared(super().start(server, rng).tensors))

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """A after this round's local steps on both factors; B is kept here."""
        own = self.own(site)
        model = lora.attach(site.base, self.spec(site))
        lora.load(model, {**order.tensors, **own})
        site.train(model, rng)
        found = lora.read(model)
        site.private = Message({name: found[name] for name in own})
        return Message(shared(found))

    def own(self, site: Site) -> Mapping[str, torch.Tensor]:
        """B (and DoRA's magnitudes) of an edge; before its first round B = 0."""
        if site.private is not None:
            return site.private.tensors
        if "fresh" not in site.memo:
            lora.detach(site.base)  # a new adapter's B is zero
            found = lora.read(lora.attach(site.base, self.spec(site)))
            site.memo["fresh"] = {name: tensor for name, tensor in found.items() if name not in shared(found)}
        fresh: dict[str, torch.Tensor] = site.memo["fresh"]
        return fresh

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """Sample-weighted mean of A and of the head."""
        return average(state, reports, server)

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: an edge's personal adapter."""
        return {"personal": LoraWeights(self.spec(site), {**state.tensors, **self.own(site)})}


def shared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What leaves an edge: A and a classifier's head."""
    return {name: tensor for name, tensor in tensors.items() if ".lora_A." in name or ".lora_" not in name}
