"""A method that goes wrong on purpose: `method.name=faulty:Faulty`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedpipe_ray.message import Message
from fedpipe_ray.methods.lora import Lora

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class Faulty(Lora):
    """FedIT, but the edges in `sick` give no usable update until the file `cure` exists."""

    sick: list[str] = field(default_factory=list)
    how: Literal["nan", "raise"] = "nan"
    cure: str = "/nowhere"

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The adapter, or NaN, or an exception."""
        update = super().local_update(order, site, rng)
        if site.name not in self.sick or Path(self.cure).exists():
            return update
        if self.how == "raise":
            raise RuntimeError(f"{site.name} has a broken disk")
        return Message({name: tensor * math.nan for name, tensor in update.tensors.items()})
