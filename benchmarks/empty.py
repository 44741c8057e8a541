"""A method that computes nothing, so that what is left is the framework: used by the overhead benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from fedpipe_ray.message import Message
from fedpipe_ray.methods.base import Weights, weighted_mean
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, Section
from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class Empty(Section):
    """Edges answer at once with `update_bytes` of float32; the server averages."""

    update_bytes: int = 4
    base: ClassVar[Literal["shared", "none"]] = "none"

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        return Message({"w": torch.zeros(self.update_bytes // 4)})

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> dict[str, Message]:
        return dict.fromkeys(edges, Message())

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        site.cost = dataclasses.replace(site.cost, samples=1)
        return Message({"w": torch.full((self.update_bytes // 4,), float(rng.random()))})

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        return weighted_mean(state, reports)

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        return {}


def settings(edges: int, cpus: float = 0.1, update_bytes: int = 4) -> dict[str, object]:
    """A run's settings for so many empty edges on Ray."""
    return {
        "fleet": {"ray": True, "edges": {f"e{i}": {"cpus": cpus} for i in range(edges)}},
        "method": {"name": "benchmarks.empty:Empty", "update_bytes": update_bytes},
    }
