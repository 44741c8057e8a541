"""BitFit: the bias terms alone are trained (Ben Zaken et al. 2022, arXiv 2106.10199, ACL 2022), here averaged.

    y = W x + b    in every layer W stays, b is trained; beta of layer norms too

The paper's: all bias terms, and the task's classification layer with them. Ours: FedAvg of these (arXiv 1602.05629),
b = sum_k p_k b_k with p_k = n_k / sum n over the rows an edge trained on in the round, which is exact, for the model is
affine in each bias; float32 copies whatever the base is stored in; a bias is a parameter whose name ends in `bias`. The
paper's subset (query and second MLP layer) is left out. Llama, Mistral, Gemma and Qwen3 have no biases (Qwen2 those of
q, k, v): a model without any is refused.
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
class BitFit(Section):
    """BitFit: biases alone, and a classifier's head, are trained, sent and averaged."""

    base: ClassVar[Literal["shared", "none"]] = "shared"
    asynchronous: ClassVar[bool] = True
    averaging: ClassVar[bool] = True
    pseudo_gradient: ClassVar[bool] = True
    updates: ClassVar[Updates] = "entries"

    def check(self, site: Site) -> None:
        """Raises UserError for a model without biases."""
        names(site)

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """The biases as the base model has them, and a classifier's head."""
        return Message(subset.pretrained(server.base, names(server)))

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> dict[str, Message]:
        """Everybody gets all biases."""
        return dict.fromkeys(edges, Message(state.tensors))

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The biases after this round's local steps."""
        model = subset.trainable(site.base, order.tensors)
        site.train(model, rng)
        return Message(subset.read(model))

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """Sample-weighted mean of every tensor."""
        return average(state, reports, server)

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: the global biases."""
        return {"global": subset.SubsetWeights(state.tensors, site.task)}


def names(site: Site) -> list[str]:
    """The parameters to train, in the model's order. Raises UserError if its encoder has no bias."""
    model = site.bare()
    heads = subset.names_under(model, head_names(model)) if site.task == "classification" else []
    biases = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"} - set(heads)
    if not biases:
        instead = "head or lora" if heads else "lora, prompt or full"
        raise UserError(
            f"model.name: {site.run.model.name} ({type(model).__name__}) has no bias, and bitfit trains nothing else; "
            f"name a model with biases, such as GPT-2, OPT or BERT, or use method.name: {instead}"
        )
    return [name for name, _ in model.named_parameters() if name in biases or name in heads]
