"""FedKSeed and FedKSeed-Pro: all weights tuned by scalars (Qin et al. 2024, arXiv 2312.06353, ICML 2024).

The paper's: K candidate seeds, fixed for the run, each standing for a direction z_j ~ N(0, I_d); w0 the pretrained
weights, never sent. An edge rebuilds the model (E5), does tau steps at batch 1 without gradients (E1, E2), each along
a candidate drawn at random, and sends back (index, slope) pairs; the server adds them up (E4):

    E1  g = [ L(w + eps z_j; x) - L(w - eps z_j; x) ] / (2 eps)
    E2  w <- w - eta (g z_j + weight_decay w)
    E3  a_j^(i) = sum of g over the steps of edge i that drew j
    E4  a_j <- a_j + sum_i lambda_i a_j^(i),    lambda_i = |D_i| / sum over the edges of the round
    E5  w = w0 - eta sum_j a_j z_j
    E7  Pro: u = min-max scaled mean over j's history, which begins with one 0, of |g| clipped at 1000; p = softmax(u)

(E6 is the identity that E5 is FedAvg of the edges' models if weight_decay is 0; E8, that j is drawn uniformly or, Pro,
from p as it was when the round began.) The history takes g as it came, E4 alone weighs, and p is not corrected for. A
step whose loss is NaN leaves nothing. Rows go on where the edge's last round stopped. With four bytes a number a round
costs an edge 4 + 4 K + 8 tau bytes, with Pro 4 K more.

Ours: what travels of a_j is eta a_j as a multiple of 2^-30, for which E5 is exact (seed_sums.py); the server itself
keeps a_j in float64, so that nothing is rounded twice. Increments in floating point would have last bits that depend on
their history; here edges that come late, are replaced or resume have the same bits without replaying it, and nothing
must be rebuilt at fixed rounds. One seed of 32 bits stands for all candidates (the code sends seeds of 37), noise is
counter-based (noise.py), weights are tried without being moved (zeroth_order.py) and stepped in float32: in float16
most steps are below half a unit in the last place. lr: null is a rule of ours (`rate`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from fedpipe_ray import lora, seed_sums
from fedpipe_ray.batches import Batch, collate
from fedpipe_ray.costs import training_flops
from fedpipe_ray.errors import DivergedError, UserError
from fedpipe_ray.message import Message
from fedpipe_ray.model import Base, load_config
from fedpipe_ray.noise import Flat
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, Section, require
from fedpipe_ray.zeroth_order import Direction, search

from .base import FullWeights, Updates, Weights, arrivals

if TYPE_CHECKING:
    from fedpipe_ray.site import Site

log = logging.getLogger("fedpipe")

CLIP = 1000.0  # E7
# What a matrix product does in the time of one normal: about 200 to make it, 370 with the addition
# (docs/methods/fedkseed.md).
NOISE_FLOPS = 300


@dataclass(frozen=True)
class SeedWeights(FullWeights):
    """A whole model, of which `tensors` are the seed and the coefficients."""

    incremental: bool = True

    def on(self, base: Base) -> Any:
        """The rebuilt model in float32, made anew each time: whoever holds it pays for it."""
        lora.detach(base)
        model = base.writable()
        seed_sums.rebuild(base, model, *read(self.tensors), keep=self.incremental)
        return model


@dataclass(frozen=True, kw_only=True)
class FedKSeed(Section):
    """FedKSeed: all weights tuned without gradients; a round moves 18 kB an edge. `pro` draws the better directions.

    seeds: K; tau: steps a round; lr: eta (null: by the model's size; the paper 3e-7 for 1e9 weights); eps, batch,
    weight_decay as in E1 and E2. stepped: `float32`, or `stored`: the base's own dtype, which loses most steps in 16
    bits. incremental: false keeps nothing between rounds. Of `local`, precision and threads apply.
    """

    seeds: int = 4096
    tau: int = 200
    lr: float | None = None
    eps: float = 5e-4
    batch: int = 1
    weight_decay: float = 0.0
    pro: bool = False
    stepped: Literal["float32", "stored"] = "float32"
    incremental: bool = True

    base: ClassVar[Literal["shared", "none"]] = "shared"
    pseudo_gradient: ClassVar[bool] = True
    aside: ClassVar[tuple[str, ...]] = ("history", "drawn")
    adds: ClassVar[bool] = True
    updates: ClassVar[Updates] = "values"

    def __post_init__(self) -> None:
        for name in ("tau", "batch"):
            require(getattr(self, name) >= 1, f"method.{name}: {getattr(self, name)} must be at least 1")
        for name in ("eps", "lr"):
            value = getattr(self, name)
            require(value is None or value > 0, f"method.{name}: {value} must be above 0")
        require(self.weight_decay >= 0, f"method.weight_decay: {self.weight_decay} must not be negative")
        require(
            self.seeds >= self.tau,
            f"method.seeds: {self.seeds} candidates for method.tau: {self.tau} steps, which would walk the same "
            f"directions again within a round; give at least {self.tau} seeds, or lower method.tau",
        )

    def check(self, site: Site) -> None:
        """Raises UserError for a model that is stored in less than 16 bits, and for a bound that cannot hold."""
        settings, model = site.run.model, site.bare()
        packed = getattr(load_config(settings, site.task, site.classes), "quantization_config", None)
        if packed:
            kind = packed.get("quant_method", "quantized") if isinstance(packed, dict) else type(packed).__name__
            raise UserError(
                f"model.name: {settings.name} is quantized ({kind}); fedkseed changes every weight and needs 16 or 32 "
                "bits: name the unquantized checkpoint, or use method.name: lora or fedpipe"
            )
        Flat(model)
        for name in ("norm_bound", "norm_clip"):
            bound = getattr(site.run.server, name)
            if bound is not None:
                raise UserError(
                    f"server.{name}: {bound:g} bounds changes of tensors, and fedkseed sends indices and slopes; "
                    "remove it"
                )
        if self.stepped == "stored":
            log.warning("method.stepped: stored: with 16-bit weights most steps are too small to change them")

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """All accumulators 0; Pro: every history with its one 0."""
        tensors = {
            "seed": torch.tensor([int(rng.integers(2**31))], dtype=torch.int32),
            "accumulators": torch.zeros(self.seeds, dtype=torch.float64),  # [K] a
        }
        if self.pro:
            tensors["history"] = torch.zeros(self.seeds, dtype=torch.float64)  # [K] sum of clipped |g|
            tensors["drawn"] = torch.ones(self.seeds, dtype=torch.float64)  # [K] its terms
        lr = self.lr if self.lr is not None else rate(Flat(server.bare()).size)
        return Message(tensors, {"lr": lr})

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> dict[str, Message]:
        """The seed and the coefficients to everybody; Pro: the probabilities too."""
        tensors = self.sent(state)
        if self.pro:
            p = probabilities(state.tensors["history"].numpy(), state.tensors["drawn"].numpy())
            tensors["probabilities"] = torch.from_numpy(p).float()
        return dict.fromkeys(edges, Message(tensors, {"lr": state.numbers["lr"]}))

    def sent(self, state: Message) -> dict[str, torch.Tensor]:
        """From what an edge rebuilds the model. Raises UserError if the accumulators have left what can be sent."""
        lr = state.numbers["lr"]
        try:
            units = seed_sums.fixed(lr * state.tensors["accumulators"].numpy())
        except OverflowError as error:
            raise UserError(f"fedkseed diverged: {error}; lower method.lr: {lr:g}") from None
        return {"seed": state.tensors["seed"], "coefficients": torch.from_numpy(units.astype(np.int32))}

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The (index, slope) pairs of this round's steps on a rebuilt copy of the model, and |D_i|."""
        base, rows = site.base, site.data.train
        seed, coefficients = read(order.tensors)
        model = base.writable(torch.float32 if self.stepped == "float32" else None)
        seed_sums.rebuild(base, model, seed, coefficients, keep=self.incremental)
        before, drawn = past(site, coefficients)
        torch.manual_seed(int(rng.integers(2**63)))
        p = order.tensors["probabilities"].double().numpy() if self.pro else None
        candidates = rng.choice(self.seeds, self.tau, p=None if p is None else p / p.sum())
        direction = Direction(model.requires_grad_(False), seed, base.device)

        def on_step(step: int, loss: float, tokens: int) -> None:
            now = site.progress
            now.status, now.step, now.steps, now.loss = "training", step, self.tau, loss

        found = search(
            direction, batches(site, drawn, self.batch), candidates.tolist(), eps=self.eps, lr=order.numbers["lr"],
            weight_decay=self.weight_decay, precision=site.run.local.precision, on_step=on_step,
        )  # fmt: skip
        rebuilt = len(seed_sums.plan(before if self.incremental else None, coefficients)[1])
        noise = NOISE_FLOPS * direction.flat.size * (3 * found.steps + rebuilt)
        site.cost = dataclasses.replace(
            site.cost, samples=found.steps * self.batch, steps=found.steps, tokens=found.tokens,
            step_seconds=found.step_seconds, flops=training_flops(model, found.tokens) + noise,
        )  # fmt: skip
        if not len(found.slopes):
            raise DivergedError(
                f"no finite loss in {found.steps} steps; lower method.lr: {order.numbers['lr']:g} or method.eps"
            )
        site.train_loss = found.loss
        site.private = Message(
            {"coefficients": order.tensors["coefficients"]}, {"drawn": drawn + found.steps * self.batch}
        )
        pairs = {"indices": torch.from_numpy(found.candidates), "slopes": torch.from_numpy(found.slopes)}
        return Message(pairs, {"rows": len(rows)})

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """E4, and for Pro the histories; one update is held at a time."""
        total, sums = 0.0, np.zeros(self.seeds)
        past, drawn = np.zeros(self.seeds), np.zeros(self.seeds)
        for _, message in arrivals(reports, self.misfit):
            indices = message.tensors["indices"].numpy()
            slopes = message.tensors["slopes"].double().numpy()  # numpy has no bfloat16, in which they may have come
            rows = message.numbers["rows"]
            total += rows
            sums += rows * np.bincount(indices, slopes, minlength=self.seeds)
            past += np.bincount(indices, np.minimum(np.abs(slopes), CLIP), minlength=self.seeds)
            drawn += np.bincount(indices, minlength=self.seeds)
        if total == 0:
            return state
        tensors = dict(state.tensors)
        tensors["accumulators"] = tensors["accumulators"] + torch.from_numpy(sums / total)
        if self.pro:
            tensors["history"] = tensors["history"] + torch.from_numpy(past)
            tensors["drawn"] = tensors["drawn"] + torch.from_numpy(drawn)
        after = Message(tensors, state.numbers)
        self.sent(after)
        return after

    def misfit(self, message: Message) -> str | None:
        """Why an update cannot be used; None if it can."""
        if message.tensors.keys() != {"indices", "slopes"}:
            return f"its update has {', '.join(message.tensors) or 'no tensor'}, not indices and slopes"
        indices, slopes = message.tensors["indices"], message.tensors["slopes"]
        if indices.dtype != torch.int32 or indices.ndim != 1 or indices.shape != slopes.shape:
            return f"its update has {list(indices.shape)} indices in {indices.dtype} for {list(slopes.shape)} slopes"
        if not 1 <= len(indices) <= self.tau:
            return f"its update has {len(indices)} steps; 1 to method.tau: {self.tau} can be"
        if int(indices.min()) < 0 or int(indices.max()) >= self.seeds:
            return f"its update has an index outside the method.seeds: {self.seeds} candidates"
        if not bool(torch.isfinite(slopes).all()):
            return "its update has NaN or infinity in slopes"
        rows = message.numbers.get("rows", 0)
        return None if 1 <= rows < 2**53 else f"its update says that the edge has {rows:g} rows"

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: the global model."""
        return {"global": SeedWeights(self.sent(state), site.task, self.incremental)}


def read(tensors: Mapping[str, torch.Tensor]) -> tuple[int, seed_sums.Coefficients]:
    """(the seed, [K] the coefficients) of an order."""
    return int(tensors["seed"]), tensors["coefficients"].numpy().astype(np.int64)


def rate(size: int) -> float:
    """eta for a model of so many weights where method.lr is null: the paper's 3e-7 at 1e9, times 1 / root of the size.

    In theory 1 / (effective dimension), which nobody knows; with 1 / size a model of 20,000 weights diverges.
    """
    return float(3e-7 * (1e9 / size) ** 0.5)


def probabilities(history: np.ndarray[Any, Any], drawn: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[K] E7, from the sums of the histories and the numbers of their terms."""
    importance = history / drawn
    spread = importance - importance.min()
    scaled = np.exp(spread / (spread.max() + 1e-10))
    return np.asarray(scaled / scaled.sum())


def past(site: Site, now: seed_sums.Coefficients) -> tuple[seed_sums.Coefficients | None, int]:
    """(coefficients of the edge's last round or None, rows it has drawn so far), whoever else shares its process."""
    if site.private is None:
        return None, 0
    found = site.private.tensors["coefficients"].numpy().astype(np.int64)
    return found, int(site.private.numbers["drawn"])


def batches(site: Site, drawn: int, size: int) -> Iterator[Batch]:
    """The edge's batches from row number `drawn` on: one permutation of its rows after another, over all rounds."""
    rows, order, known = site.data.train, np.zeros(0, dtype=np.int64), -1
    while True:
        taken = []
        for number in range(drawn, drawn + size):
            epoch, place = divmod(number, len(rows))
            if epoch != known:
                order, known = rng_for(site.run.seed, epoch, f"{site.name}/rows").permutation(len(rows)), epoch
            taken.append(int(order[place]))
        yield collate(rows, taken, site.base.pad_id, site.task == "classification")
        drawn += size
