"""Rounds by hand of rules that train a part of the factors, and reports of one module's factors."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from runs import opened_run
from torch import Tensor
from toy_rounds import Adding, toy_run

from fedpipe_ray.costs import Cost
from fedpipe_ray.held import Held
from fedpipe_ray.message import Message
from fedpipe_ray.methods.fed_sb import CORE
from fedpipe_ray.report import Report
from fedpipe_ray.run import server_site

A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
R, HEAD = B.replace(".lora_B.weight", CORE), "base_model.model.score.weight"
M, N = 7, 5
SUM_M, SUM_N, MODULES = 2 * (4 * 32 + 64 + 64 + 32), 2 * (4 * 32 + 32 + 32 + 64), 14  # of the tiny Llama's weights
RULES = ["ffa_lora", "rolora", "fedsa_lora", "fed_sb", "slora"]
NOBODY: Any = None  # of these rules some ask no server, and none a rng
SERVER = server_site(toy_run({"e1": {}}), Adding(), [])


def report(edge: str, weight: float, tensors: Mapping[str, Tensor]) -> Report:
    return Report(edge, 0, weight, 0.0, Cost(), fetch=lambda: Message(tensors))


class Counted:
    """Reports of one update each, with how many updates there still are when the next one is fetched."""

    def __init__(self, updates: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> None:
        self.updates, self.weights, self.alive, self.seen = updates, weights, list[weakref.ref[Tensor]](), list[int]()

    def fetch(self, own: Mapping[str, Tensor]) -> Message:
        self.seen.append(sum(ref() is not None for ref in self.alive))
        copies = {name: tensor.clone() for name, tensor in own.items()}
        self.alive.append(weakref.ref(next(iter(copies.values()))))
        return Message(copies)

    def __iter__(self) -> Iterator[Report]:
        for k, (own, weight) in enumerate(zip(self.updates, self.weights, strict=True)):
            yield Report(str(k), 0, weight, 0.0, Cost(), fetch=partial(self.fetch, own))


class Rounds:
    """Orders as sent and updates as they come, on edges a, b and c of the tiny run."""

    def __init__(self, run_file: Path, *overrides: str) -> None:
        self.fleet, self.method, self.server, self.state = opened_run(run_file, *overrides)
        self.held, self.number = Held({}), 0

    def next(self) -> tuple[dict[str, Message], dict[str, Message]]:
        planned = self.method.plan(self.state, self.fleet.edges, self.server, self.number, NOBODY)
        orders = self.held.mark(planned)
        reports: dict[str, Any] = {one.edge: one for one in self.fleet.run(orders, self.number)}
        updates = {edge: one.message() for edge, one in reports.items()}
        self.state = self.method.aggregate(self.state, list(reports.values()), self.server, self.number, NOBODY)
        self.held.note(orders, reports)
        self.number += 1
        return orders, updates


def classes(data_dir: Path) -> str:
    """The tiny run's rows as a classifier's."""
    return (
        f'data={{source: "{data_dir}/{{edge}}.jsonl", task: classification, text: "{{question}}", label: kind, '
        "labels: [x, y, z], max_length: 16, validation: 0.2, test: 0.2}"
    )
