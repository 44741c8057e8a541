"""FedProx on LoRA: FedIT whose edges stay near the adapter that they were sent (Li et al. 2020, arXiv 1812.06127).

An edge minimises, from w_t, what the server sent (objective 2),

    h_k(w) = F_k(w) + mu / 2 ||w - w_t||^2

and the server averages. The paper's: the term, and that an edge may do less work than others (gamma-inexactness): here
fewer local steps. Its mu came from {0.001, 0.01, 0.1, 1}, chosen by data set. Ours: w are the factors A and B and a
classifier's head, not the product B A (that pull is fedbiot's `eps`); AdamW by default, where the paper has SGD
(`local.optimizer: sgd`): AdamW divides the pull by the size of the gradient that it is part of, so that the same mu is
another pull; weights are the rows that an edge trained on, as in `lora`. mu: 0 is `lora`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedpipe_ray import lora
from fedpipe_ray.averaging import average
from fedpipe_ray.lora import Variant
from fedpipe_ray.message import Message
from fedpipe_ray.proximal import Near
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import require
from fedpipe_ray.train import summed_loss

from .base import LoraMethod, Updates

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class FedProx(LoraMethod):
    """FedProx: LoRA whose local steps are pulled back to what the edge was sent, with strength mu.

    variant: of LoRA, `plain`, `rslora` or `dora`.
    """

    mu: float = 0.01
    variant: Variant = "plain"

    asynchronous: ClassVar[bool] = True
    averaging: ClassVar[bool] = True
    pseudo_gradient: ClassVar[bool] = True
    updates: ClassVar[Updates] = "entries"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mu >= 0, f"method.mu: {self.mu} must not be negative")

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The adapter after this round's local steps on h_k."""
        model = lora.attach(site.base, self.spec(site))
        lora.load(model, order.tensors)
        near = Near(lora.parameters(model), order.tensors, self.mu) if self.mu else None
        site.train(model, rng, summed_loss, near)
        return Message(lora.read(model))

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """Sample-weighted mean of every tensor."""
        return average(state, reports, server)
