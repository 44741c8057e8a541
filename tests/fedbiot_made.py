"""FedBiOT on a tiny model of 8 layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from runs import load

from fedpipe_ray.batches import Batch, collate
from fedpipe_ray.costs import Cost
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.methods.fedbiot import FedBiOT, parts
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.run import server_site
from fedpipe_ray.site import Site

LAYER = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32  # parameters of a layer of the deep model
OUTSIDE = 18 * 32 + 32  # embeddings, tied, and the last norm
FACTORS = 4 * (4 * 64 + 3 * 96)  # LoRA of rank 4 on all linear weights of a layer


@dataclasses.dataclass
class Here:
    """A fleet in this process, its method, the server, and the state before round 0."""

    fleet: SerialFleet
    method: FedBiOT
    server: Site
    state: Message

    def orders(self, state: Message | None = None, round: int = 0) -> dict[str, Message]:
        state = state or self.state
        return self.method.plan(state, self.fleet.edges, self.server, round, rng_for(0, round, "plan"))

    def next_state(self, round: int = 0) -> tuple[Message, list[Report | Lost]]:
        reports = list(self.fleet.run(self.orders(round=round), round))
        return self.method.aggregate(self.state, reports, self.server, round, rng_for(0, round, "agg")), reports


def opened(run_file: Path, needs: list[str], *overrides: str) -> Here:
    """A run of FedBiOT with changed settings."""
    run = load(run_file, *needs, *overrides)
    method = make_method(run.method)
    assert isinstance(method, FedBiOT)
    method.check(server_site(run, method, []))
    fleet = SerialFleet(run, method)
    fleet.open()
    server = server_site(run, method, fleet.classes)
    return Here(fleet, method, server, method.start(server, rng_for(run.seed, 0, "start")))


def batch_of(site: Site, count: int = 6) -> Batch:
    return collate(site.data.validation, list(range(min(count, len(site.data.validation)))), site.base.pad_id, False)


def of_layers(tensors: Any, numbers: set[int]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in tensors.items() if int(n.partition("layers.")[2].partition(".")[0]) in numbers}


def update_of(like: Message, seed: int, rows: float) -> Message:
    draw = torch.Generator().manual_seed(seed)
    adapter, _ = parts(like)
    return Message({n: torch.randn(t.shape, generator=draw) for n, t in adapter.items()}, {"rows": rows})


def report_of(edge: str, message: Message) -> Report:
    return Report(edge, 0, 6.0, 0.0, Cost(), fetch=lambda: message)


def saved_by(model: Any, batch: Batch) -> int:
    """Numbers that are saved for the backward pass, weights left out; the pass is done."""
    found = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found.append(0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=batch.tokens, attention_mask=batch.mask).logits.sum().backward()
    return sum(found)
