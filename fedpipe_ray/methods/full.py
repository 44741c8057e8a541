"""FedAvg of all parameters (McMahan et al. 2017, arXiv 1602.05629, algorithm 1).

    w_{t+1} = sum_k n_k / n  w^k_{t+1},    w^k: what edge k makes of w_t in its local steps

Each edge trains a copy of the model; the shared frozen base stays as it is and is there for evaluation. Ours: AdamW
instead of SGD, as everywhere here; n_k counts the rows an edge trained on in the round. The state is every parameter
in float32, tied ones once: 4 bytes a parameter each way on the wire (`wire.dtype` halves it) and in every checkpoint;
an edge holds beside the base four times that (copy, gradient and AdamW's two moments), the server the state, a sum and
the update in hand. Buffers are not averaged: transformers' language models keep no statistics in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from fedpipe_ray import lora
from fedpipe_ray.averaging import average
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, Section

from .base import FullWeights, Updates, Weights

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class Full(Section):
    """FedAvg: every parameter is trained, sent and averaged; no adapter."""

    base: ClassVar[Literal["shared", "none"]] = "shared"
    asynchronous: ClassVar[bool] = True
    updates: ClassVar[Updates] = "entries"
    averaging: ClassVar[bool] = True
    pseudo_gradient: ClassVar[bool] = True

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """The pretrained parameters, the server's own where they are float32."""
        parameters = server.base.model.named_parameters()
        return Message({name: p.detach().to("cpu", torch.float32) for name, p in parameters})

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> dict[str, Message]:
        """Everybody gets the whole model."""
        return dict.fromkeys(edges, Message(state.tensors))

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """All parameters after this round's local steps on a copy, which nobody else holds and so is not copied."""
        model = FullWeights(order.tensors).on(site.base)
        site.train(model, rng)
        return Message({name: p.detach().to("cpu") for name, p in lora.parameters(model).items()})

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """Sample-weighted mean of every parameter, or what server.aggregator names."""
        return average(state, reports, server)

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: the global model."""
        return {"global": FullWeights(state.tensors, site.task)}
