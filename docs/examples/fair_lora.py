"""q-fair LoRA: edges that the adapter serves badly weigh more (after q-FFL, Li et al. 2020, arXiv 1905.10497).

With F_k the loss of the adapter that edge k was sent, on its validation rows, and n_k the rows that it trained on:

    A = sum_k w_k A_k        B = sum_k w_k B_k        w_k = n_k F_k^q / sum_j n_j F_j^q

The paper's: the objective sum_k p_k F_k^(q + 1) / (q + 1), in whose gradient edge k's own has the weight p_k F_k^q;
q = 0 is FedAvg, a larger q makes the edges' losses more alike. Ours: the weights alone are taken, not the paper's step
size; F_k is on validation rows, or the training loss where an edge has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from fedpipe_ray import lora
from fedpipe_ray.message import Message
from fedpipe_ray.methods.base import LoraMethod, arrivals, unlike
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import require
from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class FairLora(LoraMethod):
    """q-fair LoRA: LoRA whose average leans to the edges with the larger loss. q: how much; 0 is `lora`."""

    q: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.q >= 0, f"method.q: {self.q} must not be negative")

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """On the edge: the adapter after this round's steps, and the loss of the one that came."""
        model = lora.attach(site.base, self.spec(site))
        lora.load(model, order.tensors)
        before = site.measure(model, "validation").get("loss")
        site.train(model, rng)
        return Message(lora.read(model), {"loss": site.train_loss if before is None else before})

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """On the server: the weighted mean, one update at a time; `state` as it is if none is usable."""
        total, mean = 0.0, {name: torch.zeros(tensor.shape) for name, tensor in state.tensors.items()}
        for report, update in arrivals(reports, partial(unlike, like=state.tensors)):
            weight = report.weight * update.numbers["loss"] ** self.q
            total += weight
            for name, tensor in mean.items():
                tensor.add_(update.tensors[name], alpha=weight)
        if total == 0:
            return state
        return Message({name: tensor.div_(total) for name, tensor in mean.items()})
