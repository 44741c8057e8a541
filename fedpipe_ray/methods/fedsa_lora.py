"""FedSA-LoRA: A is shared, B stays on the edge (Guo et al. 2024, arXiv 2410.01463, ICLR 2025).

The paper's: edges train both factors; A, which learns what is general, is averaged,

    A = sum_k p_k A_k,        edge k applies s B_k A

and B_k, which learns what is the edge's own, never leaves the edge. There is no global adapter: nothing that one model
applies is the mean of the edges' updates, and no residual is defined. What is reported is each edge's quality with its
own B_k on its own rows, and their mean. The paper has it with rsLoRA too.

Ours: B_k is the edge's private state, on its disk after each round; an edge that never took part has B_k = 0 and so the
base model. p_k count the rows trained on; a classifier's head is shared, and averaged with the same weights. With
`variant: dora` the magnitudes, which belong to the rows of the weight as B_k's do, stay on the edge beside it. The
export is what the server has: the shared A, with the configuration by which an edge makes its own PEFT adapter of it
(docs).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save

from fedpipe_ray import lora
from fedpipe_ray.errors import UserError
from fedpipe_ray.lora import Variant
from fedpipe_ray.message import Message, write_atomically
from fedpipe_ray.report import Lost, Report

from .base import LoraMethod, LoraWeights, Weights, weighted_mean

if TYPE_CHECKING:
    from fedpipe_ray.model import Base
    from fedpipe_ray.site import Site

NO_GLOBAL = (
    "fedsa_lora has no global adapter: each edge's own is the shared A with the edge's B, which never left it; "
    "evaluate the edges' own on the edges (fedpipe evaluate RUN)"
)


@dataclass(frozen=True)
class SharedFactor:
    """What the server has: A, and a classifier's head. No model can be evaluated with it."""

    spec: lora.LoraSpec
    tensors: Mapping[str, torch.Tensor]

    folder: ClassVar[str] = "shared"

    @property
    def hint(self) -> str:
        """Says that there is no global adapter."""
        return (
            "shared:   {out}/shared   (A alone: there is no global adapter, each edge keeps its own B)\n"
            "edges:    fedpipe evaluate {out}"
        )

    def on(self, base: Base) -> Any:
        """Raises UserError."""
        raise UserError(NO_GLOBAL)

    def save(self, folder: Path, server: Site) -> None:
        """Writes `shared.safetensors`, PEFT's `adapter_config.json` for an edge's adapter, and what this is."""
        kept = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in self.tensors.items()}
        write_atomically(folder / "shared.safetensors", save(kept, metadata={"format": "pt"}))
        lora.save_config(folder, server.skeleton(self.spec), server.run.model.name)
        about = {"global_adapter": None, "why": NO_GLOBAL, "edges": list(server.run.fleet.edges)}
        write_atomically(folder / "about.json", json.dumps(about, indent=2) + "\n")

    def merged(self, base: Base) -> Any:
        """Raises UserError."""
        raise UserError(NO_GLOBAL)


@dataclass(frozen=True, kw_only=True)
class FedSaLora(LoraMethod):
    """FedSA-LoRA: A trained and averaged, each edge's B private; personal models and no global one.

    variant: of LoRA, `plain`, `rslora` or `dora`.
    """

    variant: Variant = "plain"

    personal: ClassVar[bool] = True

    def check(self, site: Site) -> None:
        """Raises UserError if an older state is to be exported, which fits no edge's B any more."""
        super().check(site)
        if site.run.evaluate.keep == "best":
            raise UserError(
                "evaluate.keep: best would join the best round's A with the B of the last; fedsa_lora needs keep: last"
            )

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
        return weighted_mean(state, reports)

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """On an edge its personal adapter; on the server, which has no B, the shared factor."""
        if site.name in site.run.fleet.edges:
            return {"personal": LoraWeights(self.spec(site), {**state.tensors, **self.own(site)})}
        return {"shared": SharedFactor(self.spec(site), state.tensors)}


def shared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What leaves an edge: A and a classifier's head."""
    return {name: tensor for name, tensor in tensors.items() if ".lora_A." in name or ".lora_" not in name}
