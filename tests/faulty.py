"""A method that goes wrong on purpose: `method.name=faulty:Faulty`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from fedpipe_ray.message import Message
from fedpipe_ray.methods.lora import Lora

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class Faulty(Lora):
    """FedIT, but the edges in `sick` give no usable update until the file `cure` exists.

    ways: edge -> what is wrong with its updates, where it is not `how`.
    """

    sick: list[str] = field(default_factory=list)
    ways: dict[str, str] = field(default_factory=dict)
    how: Literal["nan", "raise", "huge"] = "nan"
    cure: str = "/nowhere"

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The adapter, or one that is spoilt, or an exception."""
        update = super().local_update(order, site, rng)
        if site.name not in self.sick or Path(self.cure).exists():
            return update
        how = self.ways.get(site.name, self.how)
        if how == "raise":
            raise RuntimeError(f"{site.name} has a broken disk")
        return Message(spoilt(how, dict(update.tensors), order.tensors))


def spoilt(how: str, tensors: dict[str, torch.Tensor], sent: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The update's tensors with a fault: in all of them, or the first."""
    first = next(iter(tensors))
    match how:
        case "nan":
            tensors = {name: tensor * math.nan for name, tensor in tensors.items()}
        case "infinity":
            tensors[first][-1, -1] = -math.inf
        case "names":
            tensors["rogue"] = torch.zeros(1)
        case "missing":
            del tensors[first]
        case "shapes":
            tensors[first] = tensors[first].T
        case "dtype":
            tensors[first] = tensors[first].to(torch.int64)
        case "huge":
            tensors = {name: sent[name] + 1000 * (tensor - sent[name]) for name, tensor in tensors.items()}
    return tensors
