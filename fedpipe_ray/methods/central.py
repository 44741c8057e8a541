"""All rows in one place: one LoRA adapter trained on the pooled rows of all edges, by the server.

    (A, B) <- S = sum_e S_e optimizer steps on the union of D_1 .. D_K,    S_e: the steps edge e would do in a round

The bound above every federated method, for nothing is averaged and no batch is of one edge alone. Ours, as there is
nothing to cite:

- Steps: with the same batch, a round trains on as many rows as one of the federation (times fleet.fraction), in S steps
  one after the other instead of K short chains. `steps` sets S. Rate, schedule and start are those of `lora`, which
  `central` is, bit for bit, where the fleet has one edge.
- Clock: a round takes FLOPs / sum_e compute_flops_e, as if one machine were as fast as all edges together and had the
  rows: what a federation could reach that never waits. Nothing is sent, so bytes are 0; bringing the rows together is
  not counted.
- Rows: the server reads every edge's source itself, so it runs only where they all are: in a simulation on one machine.
  Elsewhere a path may exist here and hold other rows than on the edge, so that a cluster with an address is refused.

No edge works, so none appears in a round's record; edges evaluate, as always, on their own rows. Capacities, traces,
deadlines and over-selection do not apply.
"""

from __future__ import annotations

import dataclasses
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpipe_ray import lora
from fedpipe_ray.batches import Rows
from fedpipe_ray.config import edge_data
from fedpipe_ray.costs import Cost
from fedpipe_ray.data import open_data
from fedpipe_ray.errors import AllEdgesLost, DivergedError, UserError
from fedpipe_ray.lora import Variant
from fedpipe_ray.message import Message
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, require
from fedpipe_ray.train import steps_of, summed_loss

from .base import LoraMethod, Updates

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True)
class Pooled:
    """The rows of several splits, one split after the other."""

    parts: tuple[Rows, ...]

    def __len__(self) -> int:
        return self._first[-1]

    def length(self, index: int) -> int:
        """Tokens of a row."""
        part, row = self._find(index)
        return part.length(row)

    def example(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """(input_ids, labels) of a row."""
        part, row = self._find(index)
        return part.example(row)

    @cached_property
    def _first(self) -> list[int]:
        return [0, *accumulate(map(len, self.parts))]

    def _find(self, index: int) -> tuple[Rows, int]:
        at = bisect_right(self._first, index) - 1
        return self.parts[at], index - self._first[at]


@dataclass(frozen=True, kw_only=True)
class Central(LoraMethod):
    """All rows in one place: one LoRA adapter trained on them by the server; an upper bound, in simulations alone.

    steps: optimizer steps a round; null: as many as all edges together would do. variant: of LoRA, `plain`, `rslora` or
    `dora`.
    """

    steps: int | None = None
    variant: Variant = "plain"

    updates: ClassVar[Updates] = "entries"  # there are none

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.steps is None or self.steps >= 1, f"method.steps: {self.steps} must be at least 1")

    def check(self, site: Site) -> None:
        """Raises UserError for a cluster with an address, and if the model has no place for the adapter."""
        refuse_cluster(site.run.fleet.ray, site.run.fleet.address)
        super().check(site)

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """A fresh adapter. Raises UserError if the rows of an edge cannot be had here."""
        refuse_cluster(server.run.fleet.ray, os.environ.get("RAY_ADDRESS"))
        pool(server)
        return Message(super().start(server, rng).tensors, {"steps": 0.0, "samples": 0.0, "flops": 0.0})

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> Mapping[str, Message | Lost]:
        """Nobody is asked."""
        return {}

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """The adapter after this round's steps on the pooled rows. Raises AllEdgesLost if its loss is no number."""
        rows, fleet, local = pool(server), server.run.fleet, server.run.local
        steps = self.steps or math.ceil(fleet.fraction * sum(steps_of(local, len(part)) for part in rows.parts) - 1e-9)
        model = lora.attach(server.base, self.spec(server))
        lora.load(model, state.tensors)
        server.round, server.cost = round, Cost()
        own = rng_for(server.run.seed, round, "+".join(fleet.edges))  # of one edge: its own
        try:
            server.train(model, own, summed_loss, None, rows, steps=steps, epochs=None)
        except DivergedError as error:
            raise AllEdgesLost(round, [Lost(server.name, f"diverged: {error}")]) from None
        cost, speed = server.cost, sum(profile.compute_flops for profile in fleet.edges.values())
        server.cost = dataclasses.replace(cost, virtual_seconds=cost.flops / speed)
        spent = {"steps": cost.steps, "samples": cost.samples, "flops": cost.flops}
        return Message(lora.read(model), {name: state.numbers[name] + value for name, value in spent.items()})


def pool(server: Site) -> Pooled:
    """The training rows of all edges, read here at first use. Raises UserError if those of one cannot be."""
    if "pool" not in server.memo:
        run, parts = server.run, []
        for edge, profile in run.fleet.edges.items():
            settings, names = edge_data(run, edge, profile), list(run.fleet.edges)
            try:
                found = open_data(settings, edge, names, run.seed, server.base.tokenizer, server.classes)
            except UserError as error:
                raise UserError(
                    f"central needs the rows of all edges in one place, and those of edge {edge} cannot be read here: "
                    f"{error}; run it where they are, or use method.name: lora or local"
                ) from None
            parts.append(found.train)
        server.memo["pool"] = Pooled(tuple(parts))
    found_pool: Pooled = server.memo["pool"]
    return found_pool


def refuse_cluster(ray: bool, address: str | None) -> None:
    """Raises UserError for a run on a cluster elsewhere."""
    if ray and address:
        raise UserError(
            f"fleet.address: {address}: central reads the rows of all edges on one machine and is for simulations; set "
            "fleet.ray: false, or use method.name: lora or local"
        )
