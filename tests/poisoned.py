"""Federated logistic regression in which some edges attack: by their data, or by what they send."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch

from fedpipe_ray.averaging import average
from fedpipe_ray.message import Message
from fedpipe_ray.methods.base import Weights
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, Section
from fedpipe_ray.site import Site

WIDTH, ROWS, STEPS, RATE = 20, 60, 10, 1.0
TRUTH = torch.linspace(-1, 1, WIDTH)  # what separates the classes


def rows(name: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """([count, WIDTH] Gaussian inputs, [count] their classes), other ones for every name."""
    x = torch.from_numpy(rng_for(0, 0, name).standard_normal((count, WIDTH))).float()
    return x, (x @ TRUTH > 0).float()


@dataclass(frozen=True, kw_only=True)
class Poisoned(Section):
    """Each edge takes gradient steps on rows of its own. attack: what the edges in `bad` do.

    label_flip: they train with every label the other class's, for 20 times the steps. sign_flip: they send their change
    times -10; scaled: times 50 after a label flip; gaussian: noise of standard deviation 30.
    """

    bad: list[str] = field(default_factory=list)
    attack: Literal["label_flip", "sign_flip", "scaled", "gaussian"] = "sign_flip"

    base: ClassVar[Literal["shared", "none"]] = "none"
    averaging: ClassVar[bool] = True
    pseudo_gradient: ClassVar[bool] = True
    asynchronous: ClassVar[bool] = True

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        return Message({"w": torch.zeros(WIDTH), "b": torch.zeros(1)})

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> dict[str, Message]:
        return dict.fromkeys(edges, Message(state.tensors))

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        x, y = rows(site.name, ROWS)
        steps, bad = STEPS, site.name in self.bad
        if bad and self.attack in ("label_flip", "scaled"):
            y, steps = 1 - y, 20 * STEPS
        after = trained(order.tensors, x, y, steps)
        site.cost = dataclasses.replace(site.cost, samples=ROWS)
        if bad and self.attack in ("sign_flip", "scaled"):
            factor = -10 if self.attack == "sign_flip" else 50
            after = {name: order.tensors[name] + factor * (t - order.tensors[name]) for name, t in after.items()}
        if bad and self.attack == "gaussian":
            after = {name: t + 30 * torch.from_numpy(rng.standard_normal(t.shape)).float() for name, t in after.items()}
        return Message(after)

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        return average(state, reports, server)

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        return {}


def trained(start: Mapping[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """The regression after steps of gradient descent on the mean loss."""
    w, b = start["w"].clone(), start["b"].clone()
    for _ in range(steps):
        slope = (torch.sigmoid(x @ w + b) - y) / len(y)  # [rows] of the loss by the logit
        w -= RATE * x.T @ slope
        b -= RATE * slope.sum()
    return {"w": w, "b": b}


def accuracy(state: Message) -> float:
    """Share of 2,000 new rows that are given their class."""
    x, y = rows("test", 2000)
    return float(((x @ state.tensors["w"] + state.tensors["b"] > 0).float() == y).float().mean())
