"""A method that needs no model, and rounds of it: what an edge sends and how long it takes is known by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from runs import fleet_of as opened_fleet

from fedpipe_ray.averaging import average
from fedpipe_ray.config import build
from fedpipe_ray.errors import DivergedError
from fedpipe_ray.fleet import Fleet, SerialFleet
from fedpipe_ray.loop import Round, federate
from fedpipe_ray.message import Message
from fedpipe_ray.methods.base import Weights
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Profile, Run, Section
from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class Adding(Section):
    """An edge adds its number to the state, spends `flops`, trains on ten samples a number; some edges fail.

    fails: edge -> what happens there, in every round or from a round on (`edge` or `edge@round`).
    """

    fails: Mapping[str, str] = dataclasses.field(default_factory=dict)
    flops: float = 1e9

    base: ClassVar[Literal["shared", "none"]] = "none"
    asynchronous: ClassVar[bool] = True
    averaging: ClassVar[bool] = True
    pseudo_gradient: ClassVar[bool] = True

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        return Message({"x": torch.zeros(1)})

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> dict[str, Message]:
        return dict.fromkeys(edges, state)

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        number = float(site.name[1:])
        site.cost = dataclasses.replace(site.cost, flops=self.flops, samples=int(10 * number))
        site.train_loss = number
        match self.fails.get(site.name) or self.fails.get(f"{site.name}@{site.round}"):
            case "diverge":
                raise DivergedError("loss nan")
            case "memory":
                raise MemoryError
            case "bug":
                raise KeyError("nothing there")
            case "nan":
                return Message({"x": torch.full((1,), math.nan)})
        return Message({"x": order.tensors["x"] + number})

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        return average(state, reports, server)

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        return {}


FLEETS = ["serial", "packed"]
FAST = {"uplink_bps": 1e15, "downlink_bps": 1e15, "latency_seconds": 0, "cpus": 0.1}  # links that do not count
SPEEDS = {
    name: {**FAST, "compute_flops": speed}
    for name, speed in {"e1": "2GFLOP/s", "e2": "0.5GFLOP/s", "e3": "1GFLOP/s"}.items()
}


def toy_run(edges: Mapping[str, Any], **settings: Any) -> Run:
    """A run of these edges."""
    return build(Run, {"fleet": {"edges": edges, "ray": False}, **settings})


def fleet_of(method: Adding, edges: Mapping[str, Any] | None = None, **settings: Any) -> tuple[SerialFleet, Site]:
    """Both ends of such a run in this process."""
    run = toy_run(edges or {"e1": {}, "e2": {}, "e3": {}}, **settings)
    return SerialFleet(run, method), server_site(run, method, [])


def rounds_of(method: Adding, count: int, edges: Mapping[str, Any] | None = None, **options: Any) -> list[Round]:
    """Rounds of the synchronous loop, without evaluations."""
    fleet, server = fleet_of(method, edges)
    return list(federate(method, fleet, server, rounds=count, seed=0, evaluate_every=0, **options))


class Noting:
    """A fleet that notes whose messages were fetched."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.fetched = fleet, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fleet, name)

    def run(self, orders: Mapping[str, Message], round: int) -> Iterator[Report | Lost]:
        for report in self.fleet.run(orders, round):
            if isinstance(report, Report):
                report.fetch = self.noting(report.edge, report.fetch)
            yield report

    def noting(self, edge: str, fetch: Any) -> Any:
        def noted() -> Message:
            self.fetched.append(edge)
            return fetch()

        return noted


def on_fleet(kind: str, count: int, method: Any, run: Run, loop: Any = federate, **options: Any) -> list[Round]:
    """Rounds of a run on a fleet of this kind, in either loop, without evaluations."""
    fleet = opened_fleet(kind, run, method)
    try:
        fleet.open()
        server = server_site(run, method, [])
        return list(loop(method, fleet, server, rounds=count, seed=0, evaluate_every=0, **options))
    finally:
        fleet.close()


def noted_rounds(
    count: int, edges: Mapping[str, Any] = SPEEDS, kind: str = "serial", method: Adding | None = None, **options: Any
) -> tuple[list[Round], list[str]]:
    """(the rounds, whose messages were fetched)."""
    method = method or Adding()
    run = toy_run(edges)
    fleet = Noting(opened_fleet(kind, run, method))
    try:
        fleet.open()
        server = server_site(run, method, [])
        return list(federate(method, fleet, server, rounds=count, seed=0, evaluate_every=0, **options)), fleet.fetched
    finally:
        fleet.close()


def x(done: Round) -> float:
    return float(done.state.tensors["x"])
