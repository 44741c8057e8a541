"""FedPipe: find the weights that matter, give each edge what it can afford (Fang et al. 2024, arXiv 2404.06448).

The paper's: weights chosen by importance, rank, batch and bits by an edge's resources so that little is left under-
trained, the frozen model quantized to an edge's memory, adapters of unequal shape aggregated with weight n_i / n, and
merged at the end. Its equations were not seen; the scores (shaped on AdaLoRA), costs, solvers and the aggregation are
ours. `preset: paper` is our reading of it: four attention projections, SVD and sensitivity, ranks by importance, equal
steps. `preset: best`, the default, is what a small prototype measured better: every linear weight, the gradient at
B = 0 by kind, one rank an edge that grows over the rounds, as many steps as fit before the deadline, equal weights.

One round on an edge. The global adapter G = B A, of rank `rank` on every candidate, acts as a whole; the edge trains
its leading triplets on the weights it was given, the rest stays frozen beside them. It sends what it trained. The
server adds sum_i p_i (B_i A_i - B_i0 A_i0) to G, exactly by stacking, and cuts back to `rank` by QR and a small SVD.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from fedpipe_ray import beliefs, edge_plans, lora, planning
from fedpipe_ray.attention import attention_of
from fedpipe_ray.calibrate import fitted
from fedpipe_ray.demands import Shape, base_bytes, shape_of
from fedpipe_ray.errors import UserError
from fedpipe_ray.facts import CALIBRATION, calibrations_of, facts_here, learn
from fedpipe_ray.message import Message
from fedpipe_ray.partial import TAIL, Join, joined, misfit, part_of, whole_of
from fedpipe_ray.planning import EdgePlan
from fedpipe_ray.probe import probe, ranks_of
from fedpipe_ray.ranks import check_linear
from fedpipe_ray.report import OUT_OF_MEMORY, Lost, Report
from fedpipe_ray.settings import Profile, require
from fedpipe_ray.survey import surveyed

from .base import LoraMethod, Weights, arrivals

if TYPE_CHECKING:
    from fedpipe_ray.fleet import Fleet
    from fedpipe_ray.site import Site

log = logging.getLogger("fedpipe")

PRESETS: dict[str, dict[str, Any]] = {
    "best": {"score": "gradient", "tie": "kind", "solver": "best", "steps": "filled", "weigh": "equal", "penalty": 1.0},
    "paper": {"score": "svd", "tie": "none", "solver": "greedy", "steps": "equal", "weigh": "paper", "penalty": 10.0},
}


@dataclass(frozen=True, kw_only=True)
class FedPipe(LoraMethod):
    """FedPipe: weights by importance; rank, batch, bits and steps by what each edge can afford.

    rank, alpha: of the global adapter; the scale alpha / rank is every edge's. targets: the candidates (null: all
    linear weights; attention alone with `preset: paper`). preset: what measured better, or our reading of the paper.
    score, tie, solver, steps, weigh, penalty: null = the preset's. scope: each edge by its own scores, or the fleet's.
    refresh_every: rounds between scorings. bits: what an edge may use. deadline_seconds: of a round on fleet.clock
    (null: searched). communication: share of it that the upload may take in the last round, half of that in the first
    (solver `best`: early rounds need few directions). penalty: lambda, of the under-training rate. step_ratio: most
    steps of an edge over the fewest, and over those that local.steps plans. depth: whether a slow edge may adapt its
    top layers alone. join: stack, or the baselines truncate, pad and increment. plans: by edge what `fedpipe allocate`
    found, in place of a solver.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | list[str] | None = None  # type: ignore[assignment]  # null leaves it to the preset
    preset: Literal["best", "paper"] = "best"
    score: Literal["gradient", "svd", "sensitivity", "sigma", "random"] | None = None
    tie: Literal["none", "kind"] | None = None
    scope: Literal["local", "global"] = "local"
    refresh_every: int = 8
    solver: Literal["best", "exact", "greedy", "uniform"] | None = None
    steps: Literal["equal", "capped", "filled"] | None = None
    weigh: Literal["equal", "paper", "all"] | None = None
    bits: list[int] | None = None
    deadline_seconds: float | None = None
    communication: float = 0.5
    penalty: float | None = None
    step_ratio: float = 8.0
    depth: bool = False
    join: Join = "stack"
    plans: dict[str, planning.Allocation] | None = None

    def __post_init__(self) -> None:
        super().__post_init__() if self.targets is not None else None
        require(self.rank >= 1 and self.alpha > 0, f"method.rank: {self.rank}, alpha: {self.alpha} must be above 0")
        odd = sorted(set(self.bits or ()) - {4, 8, 16})
        require(not odd and self.bits != [], f"method.bits: {self.bits} must be some of 4, 8 and 16")
        require(self.refresh_every >= 1, f"method.refresh_every: {self.refresh_every} must be at least 1")
        require(self.step_ratio >= 1, f"method.step_ratio: {self.step_ratio} must be at least 1")
        require(0 < self.communication <= 1, f"method.communication: {self.communication} must lie in (0, 1]")
        require(self.penalty is None or self.penalty >= 0, f"method.penalty: {self.penalty} must be at least 0")
        deadline = self.deadline_seconds
        require(deadline is None or deadline > 0, f"method.deadline_seconds: {deadline} must be above 0")

    def of(self, name: str) -> Any:
        """A field, or the preset's choice where it is null."""
        own = getattr(self, name)
        return PRESETS[self.preset][name] if own is None else own

    def spec(self, site: Site) -> lora.LoraSpec:
        """The global adapter: `rank` on every candidate."""
        chosen = self.targets
        if chosen is None and self.preset == "paper":
            chosen = attention_of(name for name, _ in site.bare().named_modules())
        targets = ("all-linear",) if chosen is None else (chosen,) if isinstance(chosen, str) else tuple(chosen)
        spec = lora.LoraSpec(self.rank, self.alpha, targets, self.dropout, site.task)
        if targets != ("all-linear",):
            return spec
        if "targets" not in site.memo:
            site.memo["targets"] = lora.linear_targets(site.bare(), spec)
        return replace(spec, targets=site.memo["targets"])

    def check(self, site: Site) -> None:
        """Raises UserError for targets that are no linear layers, and plans for other edges or of higher rank."""
        check_linear(site, self.spec(site))
        strange = sorted((self.plans or {}).keys() - site.run.fleet.edges.keys())
        if strange:
            raise UserError(f"method.plans: {', '.join(strange)}: no such edge in fleet.edges")
        high = [edge for edge, plan in (self.plans or {}).items() if max(plan.ranks.values(), default=0) > self.rank]
        if high:
            raise UserError(f"method.plans: ranks of {', '.join(high)} are above method.rank, {self.rank}; raise it")

    # -- on the server: configuration

    def shape(self, server: Site) -> Shape:
        """The model as the planner sees it, worked out once a run."""
        if "shape" not in server.memo:
            spec = self.spec(server)
            server.memo["shape"] = shape_of(server.skeleton(spec), server.base, spec, server.run)
        shape: Shape = server.memo["shape"]
        return shape

    def demands(self, state: Message, edges: Mapping[str, Profile], server: Site) -> list[planning.Demand]:
        """What every edge may do, by what it told."""
        return edge_plans.demands(self, state.numbers, edges, server)

    def configure(
        self, state: Message, edges: Mapping[str, Profile], server: Site
    ) -> tuple[float, dict[str, EdgePlan]]:
        """(deadline in seconds of fleet.clock, plans of all edges). Raises UserError for an edge that nothing fits."""
        return edge_plans.configure(self, state.numbers, edges, server)

    def order_numbers(self, found: EdgePlan, state: Message, server: Site) -> dict[str, float]:
        """A plan's scalars, the edge's steps of the warm-up so far, whether it scores the weights, and whether it
        measures itself: not in these bits yet, on fewer rows or weights.
        """
        known = calibrations_of(found.edge, state.numbers).get(found.bits)
        longest = int(state.numbers.get(f"{found.edge}/longest", server.run.data.max_length))
        rows = math.ceil(found.batch / min(found.batch, server.run.local.accumulate))
        far = known is None or rows * longest > known.tokens or len(found.ranks) > known.weights
        needed = server.run.fleet.clock == "real" or found.capacity_bytes < math.inf
        return {
            "bits": found.bits, "batch": found.batch, "steps": found.steps, "calibrate": float(needed and far),
            "warm": state.numbers.get(f"{found.edge}/warm", 0.0),
            "score": float(edge_plans.due(self, found.edge, state.numbers, server)),
        }  # fmt: skip

    def survey(self, fleet: Fleet, server: Site) -> tuple[float, dict[str, EdgePlan]]:
        """What `configure` gives once every edge has told its facts and scores; nothing is trained. UserError."""
        return self.configure(surveyed(self, fleet, server), fleet.edges, server)

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> dict[str, Message]:
        """Each edge's leading triplets to train, what acts frozen beside them, and its bits, batch and steps."""
        _, plans = self.configure(state, edges, server)
        server.memo["plans"] = plans
        fresh: dict[str, torch.Tensor] = {}
        if self.join == "increment":
            shapes = {name: tuple(tensor.shape) for name, tensor in state.tensors.items() if ".lora_" in name}
            fresh = lora.initial(shapes, torch.Generator().manual_seed(int(rng.integers(2**63))))
        return {
            edge: Message(
                part_of(state.tensors, found.ranks, self.join, fresh),
                self.order_numbers(found, state, server),
            )
            for edge, found in plans.items()
        }

    def corrections(
        self, state: Message, edges: Mapping[str, Profile], overfull: list[Lost], server: Site
    ) -> dict[str, float]:
        """What the server believes of the memory of edges that ran out of it, so that each gets less if there is less.

        edges: those that were asked with them.
        """
        found: dict[str, float] = {}
        _, plans = self.configure(state, edges, server)
        for lost in overfull:
            edge, planned, took = lost.edge, plans[lost.edge], lost.cost.training_memory_bytes
            raised = beliefs.exceeded(edge, planned, took, state.numbers)
            _, after = self.configure(Message(state.tensors, {**state.numbers, **raised}), edges, server)
            now, told = after[edge], f"took {took / 2**20:.0f} MiB" if took else "did not say what it took"
            if (now.bits, now.batch, now.ranks) == (planned.bits, planned.batch, planned.ranks):
                log.warning("edge %s ran out of memory (it %s), and its plan is the smallest there is", edge, told)
                continue
            found |= raised
            given, before = (f"{p.bits} bits, batch {p.batch}, {sum(p.ranks.values())} ranks" for p in (now, planned))
            log.warning(
                "edge %s ran out of memory: it %s, planned were %.0f; it now gets %s in all, not %s",
                edge, told, planned.memory_bytes / 2**20, given, before,
            )  # fmt: skip
        return found

    # -- on the edge

    def first_bits(self, site: Site) -> int:
        """The most that its base may have and its capacity holds, before any plan."""
        allowed, capacity = sorted(self.bits or [16, 8, 4], reverse=True), site.profile.capacity_bytes
        if capacity == math.inf:
            return allowed[0]
        model, classifier = site.bare(), site.task == "classification"
        return next((q for q in allowed if base_bytes(model, q, classifier) <= capacity), allowed[-1])

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The trained factors, facts about the rows, and every candidate's score where the order asks for it."""
        base, spec, local = site.hold(int(order.numbers["bits"])), self.spec(site), site.run.local
        batch = int(order.numbers["batch"])
        size = {"batch": batch, "accumulate": min(batch, local.accumulate)}
        own = {name: t for name, t in order.tensors.items() if not name.startswith(TAIL)}
        rest = {name.removeprefix(TAIL): t for name, t in order.tensors.items() if name.startswith(TAIL)}
        trained = lora.LoraSpec.uneven(spec, ranks_of(own))
        frozen = lora.LoraSpec.uneven(spec, ranks_of(rest)) if rest else None
        numbers = {**facts_here(site), "bits": float(base.bits)}
        if order.numbers["score"]:  # where memory counts a row at a time: candidates take more than what is trained
            few = size if site.profile.capacity_bytes == math.inf else {**size, "accumulate": batch}
            heads = {name: tensor for name, tensor in own.items() if ".lora_" not in name}
            numbers |= probe(site, spec, whole_of(order.tensors), heads, self.of("score"), few, rng)
        if order.numbers["calibrate"]:
            beside = frozen or (trained if self.join in ("stack", "increment") else None)  # later rounds have a tail
            found, size["accumulate"] = fitted(
                base, trained, (batch, size["accumulate"]), int(numbers["longest"]), int(numbers["terms"]),
                site.profile.capacity_bytes, frozen=beside, local=local,
            )  # fmt: skip
            numbers |= {f"{CALIBRATION}{base.bits}.{name}": value for name, value in found.numbers().items()}
        if "survey" in order.numbers:
            return Message({}, numbers)
        model = lora.attach(base, trained, frozen)
        lora.load(model, own)
        if frozen is not None:
            lora.load(model, rest, frozen=True)
        before = site.cost
        site.train(model, rng, warm=int(order.numbers["warm"]), steps=int(order.numbers["steps"]), epochs=None, **size)
        numbers["tokens"] = (site.cost.tokens - before.tokens) / max(1, site.cost.samples - before.samples)
        return Message(lora.read(model), numbers)

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """The global adapter, on a base in the bits in which this edge last trained; 16 on the server."""
        site.hold(int(state.numbers.get(f"{site.name}/bits", site.bits)))
        return super().weights(state, site)

    # -- on the server: aggregation

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """G plus the weighted changes, cut back to `rank`; what the edges told, and what memory they really took.

        Holds every update of the round: a stacking rule needs them side by side.
        """
        numbers = dict(state.numbers)
        updates: dict[str, Message] = {}
        samples: dict[str, float] = {}
        asked: list[str] = []
        overfull: list[Lost] = []

        def noted() -> Iterator[Report | Lost]:
            for report in reports:
                asked.append(report.edge)
                if isinstance(report, Lost) and report.reason.startswith(OUT_OF_MEMORY):
                    overfull.append(report)
                elif isinstance(report, Lost):
                    numbers.update(beliefs.unsupported(report))
                yield report

        for report, message in arrivals(noted(), partial(misfit, state=state.tensors)):
            updates[report.edge], samples[report.edge] = message, message.numbers.get("rows", report.weight)
            learn(report.edge, message.numbers, numbers)
            warm = numbers.get(f"{report.edge}/warm", 0.0) + report.cost.steps
            numbers[f"{report.edge}/warm"] = min(float(server.run.local.warmup_steps), warm)
            plan, took = server.memo.get("plans", {}).get(report.edge), report.cost.training_memory_bytes
            foretold = partial(edge_plans.foretold, self, numbers, server)
            beliefs.told(report.edge, plan, took, message.numbers, numbers, foretold)
        if overfull:
            edges = {edge: server.run.fleet.edges[edge] for edge in asked}
            numbers |= self.corrections(state, edges, overfull, server)
        if not updates:
            return Message(state.tensors, numbers)
        tensors, residual = joined(
            state.tensors, updates, samples, join=self.join, weigh=self.of("weigh"), rank=self.rank
        )
        return Message(tensors, {**numbers, "residual": residual, "rounds": round + 1.0})
