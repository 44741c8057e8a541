"""Fed-SB: a small square between two fixed factors (Singhal et al. 2025, arXiv 2502.15436).

The paper's: W0 + s B R A with B [m, r] and A [r, n] fixed from the SVD of a gradient that the edges share, and R [r, r]
alone trained, sent and averaged, which is exact:

    R = sum_k p_k R_k        s B R A = sum_k p_k s B R_k A = dW*

so `residual`, ||applied - dW*|| / ||dW*|| of the round, is 0 by construction, but for the rounding of float32, and is
told as 0: A and B are the same bits everywhere.

Ours: how the gradient is shared. In the first round nobody trains: each edge takes the gradient G_k of its mean loss
over `batches` batches by a randomized SVD (Halko, Martinsson, Tropp 2011, algorithm 5.1) whose two products, Y = G_k Q0
with a Gaussian Q0 and Q^T G_k with Q from the QR of Y, are LoRA's own gradients at B = 0 and at A = 0. So no m x n
matrix is formed, and bases in 4 or 8 bits do. The server cuts sum_k p_k G_k back to rank r without forming it either,
and takes B = U, A = V^T, orthonormal; where the gradient has fewer directions, fixed random ones fill up. It holds that
sum as a product of rank 8 r (twice that between two cuts), however many edges there are, so that up to 16 of them give
the directions of the whole sum; `cut`, of that round, bounds what the sum is off by, as a share of it. R starts at
0, so that training starts from the base model (the paper's starts from the singular values). A and B then go to each
edge once, in float32. s = alpha / rank, with `rslora` alpha / sqrt(rank); p_k count the rows trained on in the round,
in the first one those whose gradient was taken. A classifier's head is trained, sent and averaged with R. DoRA is not
offered: divided by the norm of its rows, the weight is not linear in R. The export is plain LoRA: (B R, A).
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from fedpipe_ray import factors, lora, ranks, stacking
from fedpipe_ray.errors import UserError
from fedpipe_ray.folding import MEASURED, Sums, of_b
from fedpipe_ray.message import KEPT, Message
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, require

from .base import LoraMethod, LoraWeights, Updates, Weights, arrivals, unlike, weighted_mean

if TYPE_CHECKING:
    from fedpipe_ray.model import Base
    from fedpipe_ray.site import Site

Tensors = Mapping[str, torch.Tensor]
CORE = ".lora_B.core.weight"  # R, by the place where the model has it
OVERSAMPLED = 8  # directions beyond the rank that a sketch looks at


@dataclass(frozen=True, kw_only=True)
class FedSb(LoraMethod):
    """Fed-SB: A and B fixed from a shared gradient's SVD; R, rank x rank, trained and averaged, which is exact.

    batches: of each edge whose gradient is taken in the first round. variant: of LoRA.
    """

    batches: int = 4
    variant: Literal["plain", "rslora"] = "plain"

    pseudo_gradient: ClassVar[bool] = True
    aside: ClassVar[tuple[str, ...]] = ("*.lora_A.weight", "*.lora_B.weight")  # all but R and a head
    updates: ClassVar[Updates] = "entries"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batches >= 1, f"method.batches: {self.batches} must be at least 1")

    def check(self, site: Site) -> None:
        """Raises UserError for a bound that cannot hold, a run without training, and a model without place for LoRA."""
        ranks.check_linear(site, self.spec(site))
        for name in ("norm_bound", "norm_clip"):
            bound = getattr(site.run.server, name)
            if bound is not None:
                raise UserError(
                    f"server.{name}: {bound:g} bounds changes, and fed_sb's first updates are gradients; remove it"
                )
        if site.run.rounds < 2:
            raise UserError("rounds: 1 trains nothing; fed_sb's first round finds A and B, give at least 2")

    # -- on the server

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """A = B = R = 0: nothing is known yet; the head of a classifier as the base model has it."""
        own = super().start(server, rng).tensors
        tensors = {name: torch.zeros_like(tensor) if factors.factor(name) else tensor for name, tensor in own.items()}
        for name in own:
            if factors.factor(name) == "B":
                tensors[core_of(name)] = torch.zeros(self.rank, self.rank)
        return Message(tensors, {"fixed": 0.0})

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> Mapping[str, Message | Lost]:
        """The head alone, for the gradient; later A and B to keep, and R."""
        if not state.numbers["fixed"]:
            return dict.fromkeys(edges, Message(factors.heads(state.tensors), {"fixed": 0.0}))
        kept = {KEPT + name: tensor for name, tensor in fixed(state.tensors).items()}
        return dict.fromkeys(edges, Message({**kept, **trained(state.tensors)}, {"fixed": 1.0}))

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """A and B from the mean gradient; later the mean of R."""
        if not state.numbers["fixed"]:
            return self.fix(state, reports)
        before = Message(trained(state.tensors))
        after = weighted_mean(before, reports)
        return (
            state if after is before else Message({**state.tensors, **after.tensors}, {"fixed": 1.0, "residual": 0.0})
        )

    def fix(self, state: Message, reports: Iterable[Report | Lost]) -> Message:
        """The state with A and B from sum_k p_k G_k; itself if no report is usable."""
        sums, tensors = Sums(MEASURED * self.rank), dict(state.tensors)
        for report, message in arrivals(reports, partial(unlike, like=fixed(state.tensors))):
            sums.add(message.tensors, report.weight)
            del message  # before the next one is fetched
        if not sums.total:
            return state
        exact = sums.exact()
        for name_a, pair in exact.items():
            cut = stacking.low_rank(*pair, self.rank, tolerance=stacking.tolerance_of(torch.float32))
            tensors[of_b(name_a)], tensors[name_a] = directions(cut)
        off = sums.shares({}, {name: stacking.frobenius(*pair) for name, pair in exact.items()})["cut"]
        return Message(tensors, {"fixed": 1.0, "cut": off})

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: the global adapter (B R, A)."""
        own = factors.heads(state.tensors)
        for name, tensor in fixed(state.tensors).items():
            own[name] = tensor @ state.tensors[core_of(name)] if factors.factor(name) == "B" else tensor
        return {"global": LoraWeights(self.spec(site), own)}

    # -- on the edge

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """R and the head after this round's local steps; in the first round the gradient's factors."""
        if not order.numbers["fixed"]:
            return Message(self.sketch(order.tensors, site, rng))
        model = attach(site.base, self.spec(site), order.kept)
        lora.load(model, order.rest)
        site.train(model, rng)
        return Message(lora.read(model))

    def sketch(self, own: Tensors, site: Site, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """The best product of `rank` of the gradient of each weight, as b = U S and orthonormal a; own: the head."""
        wide = self.rank + OVERSAMPLED
        spec = dataclasses.replace(self.spec(site), rank=wide, alpha=wide, dropout=0.0, variant="plain")  # scale 1
        model = lora.attach(site.base, spec)
        seed, draw = int(rng.integers(2**63)), torch.Generator().manual_seed(int(rng.integers(2**63)))

        def products(known: str, of: Tensors) -> dict[str, torch.Tensor]:
            tensors = {name: torch.zeros(p.shape) for name, p in lora.parameters(model).items()}
            lora.load(model, {**tensors, **own, **of})
            found = site.gradients(model, np.random.default_rng(seed), self.batches)  # both times the same rows
            return {name: gradient for name, gradient in found.items() if factors.factor(name) not in ("", known)}

        gaussian = {
            name: torch.randn(p.shape, generator=draw)
            for name, p in lora.parameters(model).items() if factors.factor(name) == "A"
        }  # fmt: skip
        ranges = {name: columns(y, wide) for name, y in products("A", gaussian).items()}  # [m, wide] each, by B's key
        cuts = {}
        for name_a, rows in products("B", ranges).items():  # [wide, n]
            name_b = name_a.replace(".lora_A.", ".lora_B.")
            cut = stacking.low_rank(ranges[name_b], rows, self.rank)
            cuts[name_b], cuts[name_a] = cut.b, cut.a
        site.cost = dataclasses.replace(site.cost, samples=self.batches * site.run.local.batch)
        return cuts


def core_of(name: str) -> str:
    """The key of R by that of a B."""
    return name.replace(".lora_B.weight", CORE)


def fixed(tensors: Tensors) -> dict[str, torch.Tensor]:
    """A and B."""
    return {name: tensor for name, tensor in tensors.items() if factors.factor(name) and not name.endswith(CORE)}


def trained(tensors: Tensors) -> dict[str, torch.Tensor]:
    """R and a classifier's head."""
    return {name: tensor for name, tensor in tensors.items() if name.endswith(CORE) or not factors.factor(name)}


def columns(y: torch.Tensor, count: int) -> torch.Tensor:
    """[m, count] an orthonormal basis of the columns of y [m, any], then zeros."""
    q = torch.linalg.qr(y.double()).Q.float()  # [m, min(m, any)]
    return torch.cat([q, q.new_zeros(len(q), count - q.shape[1])], dim=1)


def directions(cut: stacking.Truncated) -> stacking.Pair:
    """(U [m, rank], V^T [rank, n]), float32: orthonormal as far as m and n allow, though the product has fewer."""
    kept = int((cut.singular > 0).sum())
    u, v, rest = (cut.b[:, :kept] / cut.singular[:kept]).double().T, cut.a[:kept].double(), len(cut.a) - kept
    u, v = (torch.cat([rows, stacking.complement(rows, rows[:0], rest)]).float() for rows in (u, v))
    return u.T.contiguous(), v


def attach(base: Base, spec: lora.LoraSpec, kept: Tensors) -> Any:
    """The PeftModel whose layers compute s B R A, of which R is trained."""

    def change(name: str, layer: Any) -> None:
        b = layer.lora_B["default"]
        core = nn.Linear(spec.rank, spec.rank, bias=False, device=b.weight.device, dtype=b.weight.dtype)
        layer.lora_B["default"] = nn.Sequential(OrderedDict(core=core, out=b))

    model = lora.attach_changed(base, spec, "core", change)
    with torch.no_grad():
        for name, layer in lora.layers(model):
            stem = f"base_model.model.{name}"
            for part, which in ((layer.lora_A["default"], "A"), (layer.lora_B["default"].out, "B")):
                part.weight.copy_(kept[f"{stem}.lora_{which}.weight"])
                part.requires_grad_(False)  # each time: PEFT unfreezes them when it was disabled for the base model
    return model
