"""No federation: each edge trains a LoRA adapter of its own on its own rows, and keeps it.

    A_e, B_e <- local steps from A_e, B_e,    e = 1 .. K, each alone

The baseline below every federated method: an edge that is better off alone has no reason to take part. Ours, as there
is nothing to cite. All edges start from the adapter that `lora` starts from, and draw batches, rate and dropout as they
do there, so that an edge's adapter is the one `lora` gives in a run with that edge alone. Each round goes on where the
edge's last one stopped; the adapter is its private state, and neither rows nor weights leave the edge: an update has no
tensor. There is no global model: every edge is evaluated with its own adapter, and what a run reports is the mean of
that; nothing is exported but by `fedpipe export RUN --edge NAME`, where the edge's private state is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from fedpipe_ray import lora
from fedpipe_ray.lora import Variant
from fedpipe_ray.message import Message
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile

from .base import LoraMethod, LoraWeights, Updates, Weights, arrivals

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class Local(LoraMethod):
    """No federation: a LoRA adapter an edge, trained and evaluated there; nothing is sent.

    variant: of LoRA, `plain`, `rslora` or `dora`.
    """

    variant: Variant = "plain"

    personal: ClassVar[bool] = True
    updates: ClassVar[Updates] = "entries"  # there are none

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """The server knows nothing."""
        return Message()

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> Mapping[str, Message | Lost]:
        """Everybody goes on."""
        return dict.fromkeys(edges, Message())

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """Trains the edge's own adapter; the update is empty."""
        own = self.own(site)
        model = lora.attach(site.base, self.spec(site))
        lora.load(model, own)
        site.train(model, rng)
        site.private = Message(lora.read(model))
        return Message()

    def own(self, site: Site) -> Mapping[str, torch.Tensor]:
        """The adapter of this edge; before it has trained, the one that all start from."""
        if site.private is not None:
            return site.private.tensors
        return super().start(site, rng_for(site.run.seed, 0, "start")).tensors

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """Nothing to join; every report is heard, and one that brings tensors is refused."""
        for _ in arrivals(reports, misfit):
            pass
        return state

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: the edge's own adapter."""
        return {"own": LoraWeights(self.spec(site), self.own(site))}


def misfit(message: Message) -> str | None:
    """Why an update cannot be used; None if it can."""
    return f"its update has {', '.join(message.tensors)}, and nothing was asked for" if message.tensors else None
