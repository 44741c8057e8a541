"""The classification head alone, averaged (linear probing of frozen features under FedAvg, arXiv 1602.05629).

    W = sum_k p_k W_k,    p_k = n_k / sum n

A baseline for what the frozen model's features give without any change to the model; no paper of its own. Ours: the
head is every layer beside the encoder (of DistilBERT `pre_classifier` too), trained in float32 copies whatever the base
is stored in; it starts as every classifier's here, from the run's seed; n_k counts the rows an edge trained on in the
round. No gradient enters the encoder, so a step costs its forward pass and little more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from fedpipe_ray import subset
from fedpipe_ray.averaging import average
from fedpipe_ray.errors import UserError
from fedpipe_ray.message import Message
from fedpipe_ray.model import head_names
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, Section

from .base import Updates, Weights

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class Head(Section):
    """A classifier's head alone is trained, sent and averaged; the encoder stays frozen."""

    base: ClassVar[Literal["shared", "none"]] = "shared"
    asynchronous: ClassVar[bool] = True
    averaging: ClassVar[bool] = True
    pseudo_gradient: ClassVar[bool] = True
    updates: ClassVar[Updates] = "entries"

    def check(self, site: Site) -> None:
        """Raises UserError for a causal task, and for a classifier without a head of its own."""
        if site.task != "classification":
            raise UserError(
                f"method.name: head trains a classifier's head, and data.task is {site.task}; set data.task: "
                "classification with data.text and data.label, or use method.name: lora or prompt"
            )
        if not head_names(site.bare()):
            raise UserError(
                f"method.name: head: {site.run.model.name} has no layer beside its encoder; use method.name: lora"
            )

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """The head as the base model has it."""
        return Message(subset.pretrained(server.base, subset.names_under(server.bare(), head_names(server.bare()))))

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> dict[str, Message]:
        """Everybody gets the head."""
        return dict.fromkeys(edges, Message(state.tensors))

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The head after this round's local steps."""
        model = subset.trainable(site.base, order.tensors)
        site.train(model, rng)
        return Message(subset.read(model))

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """Sample-weighted mean of every tensor."""
        return average(state, reports, server)

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: the global head."""
        return {"global": subset.SubsetWeights(state.tensors, site.task)}
