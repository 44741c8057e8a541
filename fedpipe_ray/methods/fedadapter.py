"""FedAdapter: bottleneck adapters that grow while they train (Cai et al. 2023, arXiv 2205.10162, AdaFL at MobiCom).

The paper's: Houlsby adapters in the top layers, averaged by FedAvg; training begins with one layer and width 8; trial
groups of the edges train the current configuration, a deeper one and a wider one side by side for an interval on the
clock; the best goes on, and all groups take over its weights. Its published code: one layer or 8 more width at a time,
width up to 64, an interval of 90 (4 depth + 1) s, and the highest accuracy wins, each group having done the rounds that
fit into the interval.

Ours: rounds are synchronous, so the groups do equally many, and what wins is the gain per second,

    sum_e (first_e - last_e) / sum_e (t(last_e) - t(first_e)),    first, last: an edge's loss on its validation rows

when it was first and last asked in the trial, of the adapter it was sent (an edge without such rows: its training
loss); the sums run over the group's edges. t is the group's own clock: what its mean work of each round would take on
the profiles of the whole fleet, on average, so that a group is not slow for the edges it happens to have. Measuring is
not charged, as no evaluation is. Edges are dealt out to the groups in the order of their speed, shifted by one each
trial; fewer edges than groups try the configurations in turn. Growing keeps the function: new layers and new width
start with W_up = 0. The paper's cache of the frozen layers' activations is left out; the virtual clock charges their
forward pass. Evaluated and exported is the current configuration, also in the middle of a trial.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from fedpipe_ray import bottleneck, lora
from fedpipe_ray.bottleneck import BottleneckSpec, BottleneckWeights
from fedpipe_ray.costs import Cost, virtual_seconds
from fedpipe_ray.message import Message
from fedpipe_ray.model import head_names
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, Section, require

from .base import Weights, arrivals, unlike

if TYPE_CHECKING:
    from fedpipe_ray.site import Site

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class FedAdapter(Section):
    """FedAdapter: bottleneck adapters in the top layers; depth and width grow by trials on the clock.

    depth, width: at the start; depth_step, width_step: what a trial adds; max_width: the widest. trial_every: rounds of
    a trial; interval_seconds: instead, its least length on the virtual clock, at least two rounds (null: trial_every).
    """

    depth: int = 1
    width: int = 8
    depth_step: int = 1
    width_step: int = 8
    max_width: int = 64
    trial_every: int = 4
    interval_seconds: float | None = None

    base: ClassVar[Literal["shared", "none"]] = "shared"

    def __post_init__(self) -> None:
        for name in ("depth", "width", "depth_step", "width_step"):
            require(getattr(self, name) >= 1, f"method.{name}: {getattr(self, name)} must be at least 1")
        require(self.max_width >= self.width, f"method.max_width: {self.max_width} is below method.width {self.width}")
        require(self.trial_every >= 2, f"method.trial_every: {self.trial_every} rounds show no gain; at least 2")
        interval = self.interval_seconds
        require(interval is None or interval > 0, f"method.interval_seconds: {interval} must be above 0")

    def check(self, site: Site) -> None:
        """Raises UserError if the model of `site` has no place for the adapters; loads no weights."""
        bottleneck.places(site.bare(), self.depth)

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """Fresh adapters, the head of a classifier as the base model has it, and the first trial."""
        model, generator = server.bare(), torch.Generator().manual_seed(int(rng.integers(2**63)))
        tensors = bottleneck.fresh(model, bottleneck.places(model, self.depth), self.width, generator)
        if server.task == "classification":
            own = dict(server.base.model.named_parameters())
            heads = tuple(f"{name}." for name in head_names(model))
            tensors |= {name: p.detach().to("cpu", torch.float32) for name, p in own.items() if name.startswith(heads)}
        return self.trial(tensors, 0, server, generator)

    def trial(self, tensors: Tensors, number: int, server: Site, rng: torch.Generator) -> Message:
        """The state at the beginning of a trial: `tensors` as they are, deeper, and wider where there is room."""
        model, spec = server.bare(), bottleneck.spec_of(tensors, server.task)
        arms = {"now": tensors}
        depth = min(len(bottleneck.layers(model)), spec.depth + self.depth_step)
        if depth > spec.depth:
            arms["deeper"] = bottleneck.deepened(tensors, model, depth, rng)
        width = min(self.max_width, spec.width + self.width_step)
        if width > spec.width:
            arms["wider"] = bottleneck.widened(tensors, width, rng)
        named = {f"{arm}/{name}": tensor for arm, own in arms.items() for name, tensor in own.items()}
        return Message(named, {"trial": number, "rounds": 0, "clock": 0.0})

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> dict[str, Message]:
        """The adapters of its group to every edge."""
        groups = groups_of(server.run.fleet.edges, arms_of(state.tensors), int(state.numbers["trial"]))
        orders = {arm: Message(under(arm, state.tensors)) for arm in arms_of(state.tensors)}
        return {edge: orders[groups[edge]] for edge in edges}

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The group's adapters after this round's local steps, and the loss before them."""
        (arm,) = arms_of(order.tensors)
        own = {name.removeprefix(f"{arm}/"): tensor for name, tensor in order.tensors.items()}
        model = BottleneckWeights(bottleneck.spec_of(own, site.task), own).on(site.base)
        found = site.measure(model, "validation")
        site.train(model, rng)
        tensors = {f"{arm}/{name}": tensor for name, tensor in lora.read(model).items()}
        return Message(tensors, {"loss": found.get("loss", site.train_loss)})

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """Each group's sample-weighted mean; at the end of a trial the winner's, grown for the next one."""
        weight, slowest = dict.fromkeys(arms_of(state.tensors), 0.0), 0.0
        spent: dict[str, list[float]] = {arm: [] for arm in weight}
        sums = {name: torch.zeros(tensor.shape) for name, tensor in state.tensors.items()}
        numbers = dict(state.numbers)
        for report, message in arrivals(reports, partial(misfit, like=state.tensors)):
            (arm,) = arms_of(message.tensors)
            weight[arm] += report.weight
            for name, tensor in message.tensors.items():
                sums[name].add_(tensor, alpha=report.weight)
            note(numbers, arm, report.edge, message.numbers.get("loss", math.nan))
            spent[arm].append(typical_seconds(report.cost, server.run.fleet.edges))
            slowest = max(slowest, report.cost.virtual_seconds)
            del message  # before the next one is fetched
        if not any(spent.values()):
            return state
        for arm, seconds in spent.items():
            if seconds:
                numbers[f"{arm}/seconds"] = numbers.get(f"{arm}/seconds", 0.0) + sum(seconds) / len(seconds)
                for name in under(arm, sums):
                    sums[name].div_(weight[arm])
            else:
                sums |= under(arm, state.tensors)
        numbers |= {"rounds": numbers["rounds"] + 1, "clock": numbers["clock"] + slowest}
        if not self.over(numbers):
            return Message(sums, numbers)
        best = winner(numbers, list(weight))
        tensors = {name.removeprefix(f"{best}/"): tensor for name, tensor in under(best, sums).items()}
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        return self.trial(tensors, int(numbers["trial"]) + 1, server, generator)

    def over(self, numbers: Mapping[str, float]) -> bool:
        """Whether the trial has lasted its interval."""
        if self.interval_seconds is None:
            return numbers["rounds"] >= self.trial_every
        return numbers["rounds"] >= 2 and numbers["clock"] >= self.interval_seconds

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: the current configuration."""
        own = {name.removeprefix("now/"): tensor for name, tensor in under("now", state.tensors).items()}
        spec: BottleneckSpec = bottleneck.spec_of(own, site.task)
        return {"global": BottleneckWeights(spec, own)}


def arms_of(tensors: Iterable[str]) -> list[str]:
    """The configurations that the names speak of, in their order."""
    return list(dict.fromkeys(name.partition("/")[0] for name in tensors))


def under(arm: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of one configuration, under their full names."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{arm}/")}


def misfit(message: Message, like: Tensors) -> str | None:
    """Why an update cannot be averaged with its group's tensors in `like`; None if it can."""
    arms = arms_of(message.tensors)
    return unlike(message, under(arms[0], like) if arms else like)


def groups_of(edges: Mapping[str, Profile], arms: list[str], trial: int) -> dict[str, str]:
    """The configuration of each edge: dealt out from the fastest to the slowest, shifted by one each trial."""
    order = sorted(edges, key=lambda edge: (-edges[edge].compute_flops, edge))
    return {edge: arms[(index + trial) % len(arms)] for index, edge in enumerate(order)}


def note(numbers: dict[str, float], arm: str, edge: str, loss: float) -> None:
    """Keeps an edge's first and last loss of the trial, each with its group's clock; a loss that is none is skipped."""
    if math.isfinite(loss):
        now = numbers.get(f"{arm}/seconds", 0.0)
        numbers.setdefault(f"{arm}/first/{edge}", loss)
        numbers.setdefault(f"{arm}/first_at/{edge}", now)
        numbers |= {f"{arm}/last/{edge}": loss, f"{arm}/last_at/{edge}": now}


def typical_seconds(cost: Cost, edges: Mapping[str, Profile]) -> float:
    """Mean over the fleet of the virtual seconds that this work would take on each profile."""
    every = [virtual_seconds(profile, cost.flops, cost.bytes_down, cost.bytes_up) for profile in edges.values()]
    return sum(every) / len(every)


def winner(numbers: Mapping[str, float], arms: list[str]) -> str:
    """The configuration with the best gain per second; the first of equal ones, `now` if none was measured twice."""
    rates = {}
    for arm in arms:
        edges = [key.removeprefix(f"{arm}/first/") for key in numbers if key.startswith(f"{arm}/first/")]
        gain = sum(numbers[f"{arm}/first/{edge}"] - numbers[f"{arm}/last/{edge}"] for edge in edges)
        seconds = sum(numbers[f"{arm}/last_at/{edge}"] - numbers[f"{arm}/first_at/{edge}"] for edge in edges)
        if seconds > 0:
            rates[arm] = gain / seconds
    return max(rates, key=lambda arm: rates[arm], default="now")
