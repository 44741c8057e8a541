"""JCPBA: each edge prunes the frozen model and gets a share of the air, so that a round ends soonest.

The paper's (Pang et al. 2026, Low-latency Federated LLM Fine-tuning Over Wireless Networks, arXiv 2602.01024): latency
minimised jointly over client-specific pruning rates and bandwidth, by block coordinate descent. Only the abstract was
seen, so everything below is ours, and no reproduction.

Ours. Each round the server knows the edges' speeds f_k and channels (channel.py), solves problem P-A
(planning/wireless.py) for rates rho_k and bandwidths B_k, and prunes: the heads and channels of least magnitude, or of
least first-order change of the loss, in the global model. An edge holds the whole frozen base anyway, so it is sent
which units stay, a bit each, and the adapter without the others' rows and columns; the edge cuts its base to that width
(pruning.py), takes its local steps on it, and sends the shrunk adapter back. A coordinate of the global adapter becomes
the mean over those that kept it, weighted by rows, and stays where nobody did. What pruning costs in quality enters
through sum p_k rho_k, whose bound rho_bar is the one thing to choose.

P-A is linear in 1 - rho; bytes and FLOPs are not: of each LoRA pair one side shrinks, heads are few, the output layer
stays. So rates come from P-A, with work and bytes of the whole width; the bandwidth at those rates is then shared by
counted bytes and FLOPs of the pruned models (unless equal bandwidth is asked for); and the virtual clock takes the
counted ones too, at the round's own rates of the uplink. The server expects as many tokens as an edge had in its last
round. Downlink and latency are the profile's. An edge whose channel has no gain is left out of the round.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from fedpipe_ray import lora, pruning
from fedpipe_ray.channel import Channel, rate
from fedpipe_ray.costs import training_flops
from fedpipe_ray.errors import UserError
from fedpipe_ray.message import DTYPES, Message
from fedpipe_ray.model import load_config
from fedpipe_ray.planning.wireless import Allocation, Kind, Problem, allocate, shares
from fedpipe_ray.pruning import OverlapMean, Sides, Structure
from fedpipe_ray.quantity import Hertz
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, require
from fedpipe_ray.train import steps_of

from .base import LoraMethod, LoraWeights, Weights, arrivals, as_sent, unlike

if TYPE_CHECKING:
    from fedpipe_ray.site import Site

NO_GAIN = "its channel has no gain this round"
KEPT, SCORES = "kept", "scores"  # tensors beside the adapter's
BATCHES = 2  # of a scoring


@dataclass(frozen=True)
class Counts:
    """Of a model of (heads, channels) units a layer: FLOPs a token, and an adapter's elements. Affine in either."""

    whole: tuple[int, int]
    flops: tuple[float, float, float]
    elements: tuple[float, float, float]

    def at(self, widths: tuple[int, int]) -> tuple[float, float]:
        """(FLOPs a token, elements) at these widths."""
        parts = (1.0, *(width / all for width, all in zip(widths, self.whole, strict=True)))
        flops, elements = (
            sum(c * part for c, part in zip(own, parts, strict=True)) for own in (self.flops, self.elements)
        )
        return flops, elements


@dataclass(frozen=True, kw_only=True)
class Jcpba(LoraMethod):
    """JCPBA: pruning rate and bandwidth of each edge so that a round over a shared wireless uplink ends soonest.

    allocation: joint optimum, descent (`bcd`, pruning first), or a baseline of planning/wireless.py. rho_bar: mean
    pruning rate; rho_max: the highest. bandwidth_hz: of the uplink; power_dbm: of an edge; noise_dbm_hz: noise a hertz.
    radius_m: of the disc in which edges stand whose profile has no distance_m; outage: chance that a link is blocked in
    a round. score: which units stay; score_every: rounds between scorings by `taylor`. variant: of LoRA.
    """

    allocation: Kind = "joint"
    rho_bar: float = 0.3
    rho_max: float = 0.7
    bandwidth_hz: Hertz = 20e6
    power_dbm: float = 23.0
    noise_dbm_hz: float = -174.0
    radius_m: float = 500.0
    outage: float = 0.0
    score: Literal["magnitude", "taylor"] = "magnitude"
    score_every: int = 8
    variant: Literal["plain", "rslora"] = "plain"

    against_dora: ClassVar[str] = (
        "DoRA divides a weight by the norms of its rows, and those of a pruned weight are others on every edge"
    )
    pseudo_gradient: ClassVar[bool] = True
    aside: ClassVar[tuple[str, ...]] = (SCORES,)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.rho_max < 1, f"method.rho_max: {self.rho_max} must lie in [0, 1)")
        require(
            0 <= self.rho_bar <= self.rho_max,
            f"method.rho_bar: {self.rho_bar} must lie in [0, rho_max: {self.rho_max}]; lower it, or raise rho_max",
        )
        require(
            self.bandwidth_hz > 0, f"method.bandwidth_hz: {self.bandwidth_hz:g} carries nothing; it must be above 0"
        )
        require(self.radius_m > 0, f"method.radius_m: {self.radius_m} must be above 0")
        require(0 <= self.outage <= 1, f"method.outage: {self.outage} must lie in [0, 1]")
        require(self.score_every >= 1, f"method.score_every: {self.score_every} must be at least 1")

    def check(self, site: Site) -> None:
        """Raises UserError for a model that cannot be pruned, or has no place for the adapter; loads no weights."""
        settings = site.run.model
        if getattr(load_config(settings, site.task, site.classes), "quantization_config", None):
            raise UserError(
                f"model.name: {settings.name} is quantized; jcpba cuts weights and needs 16 or 32 bits: name the "
                "unquantized checkpoint, or use method.name: lora or fedpipe"
            )
        pruning.structure_of(site.bare())
        super().check(site)

    def structure(self, site: Site) -> Structure:
        """Where the model can be cut, worked out once a run."""
        if "structure" not in site.memo:
            site.memo["structure"] = pruning.structure_of(site.bare())
        found: Structure = site.memo["structure"]
        return found

    def counts(self, server: Site) -> Counts:
        """What a width costs, counted on three models without weights, worked out once a run."""
        if "counts" not in server.memo:
            structure, spec = self.structure(server), self.spec(server)
            whole = structure.heads, structure.channels
            found = []
            for heads, channels in (whole, (1, whole[1]), (whole[0], 1)):
                first = torch.arange(sum(whole))
                mask = (first < heads) | ((first >= whole[0]) & (first < whole[0] + channels))  # [heads + channels]
                small = pruning.narrowed(server.bare(), structure, mask.expand(structure.layers, -1))
                model = lora.inject(small, spec)
                found.append((training_flops(model, 1), sum(p.numel() for p in lora.parameters(model).values())))
            server.memo["counts"] = Counts(whole, *(affine(whole, *three) for three in zip(*found, strict=True)))
        counts: Counts = server.memo["counts"]
        return counts

    # -- on the server

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """A fresh adapter, the head of a classifier as the base model has it, and with `taylor` no scores yet."""
        tensors = dict(super().start(server, rng).tensors)
        if self.score == "taylor":
            structure = self.structure(server)
            tensors[SCORES] = torch.zeros(structure.layers, structure.heads + structure.channels)
        return Message(tensors, {"silent": 0, "rho": 0.0})

    def channels(self, edges: Mapping[str, Profile], server: Site, round: int) -> dict[str, float]:
        """gamma in Hz by edge."""
        air = Channel(self.power_dbm, self.noise_dbm_hz, self.radius_m, self.outage)
        return {edge: air.snr_hz(server.run.seed, round, edge, one.distance_m) for edge, one in edges.items()}

    def allocate(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> tuple[Allocation, np.ndarray]:
        """(rates, bandwidths and expected seconds of the round; [K] uplink rates in bit/s), of edges with a gain.

        Raises UserError if the bandwidth cannot carry a round within fleet.deadline_seconds, however much is pruned.
        """
        counts, structure, profiles = self.counts(server), self.structure(server), list(edges.values())
        snr = np.array(list(self.channels(edges, server, round).values()))
        speed, down = (np.array([getattr(p, n) for p in profiles]) for n in ("compute_flops", "downlink_bps"))
        tokens = np.array([state.numbers.get(f"{edge}/tokens", expected_tokens(server)) for edge in edges])
        weight = np.array([state.numbers.get(f"{edge}/samples", expected_samples(server)) for edge in edges])
        header, width = Message(state.tensors).header_bytes, DTYPES[server.run.wire.dtype].itemsize

        def work(rho: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """(seconds of download and steps, bits of the upload) as counted."""
            at = np.array([counts.at(structure.widths(one)) for one in rho])  # [K, 2]
            bits = 8 * (header + width * at[:, 1])
            return at[:, 0] * tokens / speed + bits / down, bits

        seconds, bits = work(np.zeros(len(profiles)))
        problem = Problem(weight, seconds, bits, snr, self.bandwidth_hz, self.rho_bar, self.rho_max)
        found = allocate(problem, self.allocation, rng)
        latency = np.array([2 * profile.latency_seconds for profile in profiles])
        seconds, bits = work(found.rho)
        bandwidth = found.bandwidth
        if not self.allocation.endswith("equal"):
            bandwidth, _ = shares(seconds + latency, bits, snr, self.bandwidth_hz)
            most, fewest = work(np.full(len(profiles), self.rho_max))
            _, soonest = shares(most + latency, fewest, snr, self.bandwidth_hz)
            deadline = server.run.fleet.deadline_seconds
            if deadline is not None and soonest > deadline:
                raise UserError(
                    f"method.bandwidth_hz: {self.bandwidth_hz:g} let round {round + 1} take {soonest:.4g} s with all "
                    f"edges pruned by rho_max: {self.rho_max:g}, fleet.deadline_seconds is {deadline:g}; raise one"
                )
        rates = rate(bandwidth, snr)
        return Allocation(found.rho, bandwidth, float((seconds + latency + bits / rates).max())), rates

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> Mapping[str, Message | Lost]:
        """The kept units and the shrunk adapter to every edge; Lost for one whose channel has no gain."""
        gains = self.channels(edges, server, round)
        orders: dict[str, Message | Lost] = {edge: Lost(edge, NO_GAIN) for edge in edges}
        heard = {edge: profile for edge, profile in edges.items() if gains[edge] > 0}
        if not heard:
            return orders
        found, rates = self.allocate(state, heard, server, round, rng)
        scores = self.scores(state, server)
        asks = float(self.score == "taylor" and round % self.score_every == 0)
        for number, edge in enumerate(heard):
            mask, parts = self.part(float(found.rho[number]), scores, state, server)
            orders[edge] = Message(
                {KEPT: pruning.pack(mask), **pruning.shrunk(adapter_of(state), parts)},
                {
                    "rho": float(found.rho[number]), "bandwidth_hz": float(found.bandwidth[number]),
                    "uplink_bps": float(rates[number]), "score": asks,
                },
            )  # fmt: skip
        return orders

    def scores(self, state: Message, server: Site) -> torch.Tensor:
        """[layers, heads + channels] what each unit of the global model is worth."""
        found = state.tensors.get(SCORES)
        if found is not None and bool(found.any()):
            return found
        lora.detach(server.base)
        return pruning.magnitudes(server.base.model, self.structure(server), adapter_of(state), self.spec(server).scale)

    def part(self, rho: float, scores: torch.Tensor, state: Message, server: Site) -> tuple[torch.Tensor, Sides]:
        """(mask, kept entries of the adapter) of a rate."""
        structure = self.structure(server)
        mask = structure.kept(rho, scores)
        return mask, pruning.sides(structure, mask, adapter_of(state))

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """Each coordinate's mean over the edges that kept it; how many tokens and rows each edge had."""
        sent = Message(as_sent(state, server))  # where nobody kept a coordinate, it is what edges had
        mean, scores, numbers = OverlapMean(adapter_of(sent)), self.scores(state, server), dict(state.numbers)
        seen, weight, pruned, silent = torch.zeros_like(state.tensors.get(SCORES, torch.zeros(0))), 0.0, 0.0, True
        scored = 0

        def heard() -> Iterator[Report | Lost]:
            nonlocal silent
            for report in reports:
                silent = silent and isinstance(report, Lost) and report.reason == NO_GAIN
                yield report

        def misfit(message: Message) -> str | None:
            rho = message.numbers.get("rho", -1.0)
            if not 0 <= rho <= self.rho_max + 1e-9:
                return f"its update says that it was pruned by {rho:g}; method.rho_max is {self.rho_max:g}"
            like = pruning.shrunk(adapter_of(state), self.part(rho, scores, state, server)[1])
            if SCORES in message.tensors and SCORES in state.tensors:
                like[SCORES] = state.tensors[SCORES]
            odd = [n for n in ("tokens", "samples") if not 0 < message.numbers.get(n, 0) < math.inf]
            return f"its update has no {odd[0]}" if odd else unlike(message, like)

        for report, message in arrivals(heard(), misfit):
            rho = message.numbers["rho"]
            mean.add(adapter_of(message), self.part(rho, scores, state, server)[1], report.weight)
            weight, pruned = weight + report.weight, pruned + report.weight * rho
            if SCORES in message.tensors:
                seen, scored = seen + message.tensors[SCORES], scored + 1
            for name in ("tokens", "samples"):
                numbers[f"{report.edge}/{name}"] = message.numbers[name]
            del message  # before the next one is fetched
        if weight == 0:
            return Message(state.tensors, {**numbers, "silent": numbers["silent"] + silent})
        tensors = mean.result()
        if SCORES in state.tensors:
            tensors[SCORES] = seen / scored if scored else state.tensors[SCORES]
        return Message(tensors, {**numbers, "rho": pruned / weight})

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: the global adapter on the whole model."""
        return {"global": LoraWeights(self.spec(site), adapter_of(state))}

    # -- on the edge

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The shrunk adapter after the local steps on the pruned model, and what each unit is worth if asked."""
        structure, own, spec = self.structure(site), adapter_of(order), self.spec(site)
        lora.detach(site.base)
        mask = pruning.unpack(order.tensors[KEPT], structure)
        found: dict[str, torch.Tensor] = {}
        if order.numbers["score"]:
            whole = lora.inject(pruning.narrowed(site.base.model, structure, torch.ones_like(mask)), spec)
            like = lora.parameters(whole)
            lora.load(whole, pruning.widened(own, pruning.sides(structure, mask, like), like))
            found[SCORES] = pruning.taylor(site, whole, structure, rng, BATCHES)
        model = lora.inject(pruning.narrowed(site.base.model, structure, mask), spec)
        lora.load(model, own)
        before = site.cost
        site.train(model, rng)
        numbers = {
            "rho": order.numbers["rho"], "tokens": site.cost.tokens - before.tokens,
            "samples": site.cost.samples - before.samples,
        }  # fmt: skip
        return Message({**lora.read(model), **found}, numbers)


def adapter_of(message: Message) -> dict[str, torch.Tensor]:
    """The adapter's tensors of a state, an order or an update."""
    return {name: tensor for name, tensor in message.tensors.items() if name not in (KEPT, SCORES)}


def affine(whole: tuple[int, int], all: float, one_head: float, one_channel: float) -> tuple[float, float, float]:
    """(fixed part, that of all heads, that of all channels) from counts at all units, one head, and one channel."""
    parts = [
        (all - one) * count / (count - 1) if count > 1 else 0.0
        for one, count in zip((one_head, one_channel), whole, strict=True)
    ]
    return all - sum(parts), parts[0], parts[1]


def expected_samples(server: Site) -> float:
    """Rows of a round, before an edge has told: as local.steps has it, 20 steps where epochs count."""
    local = server.run.local
    return float(steps_of(dataclasses.replace(local, epochs=None), 0) * local.batch)


def expected_tokens(server: Site) -> float:
    """Tokens of such a round, every row as long as data.max_length allows."""
    return expected_samples(server) * server.run.data.max_length
