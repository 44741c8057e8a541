"""FedBiOT: fine-tuning with an emulator instead of the model (Wu, Li, Li, Ding, Gao 2024, arXiv 2406.17706, KDD 2024).

The server owns the model and public rows; edges own private rows and never get the model. Its n layers are cut in two:
the last a are the adapter A, the others, E*, stay on the server. The edges get the emulator E, E* with a share beta of
its layers left out. Frozen weights are sent once; what is trained is LoRA on A by the edges, and on E by the server:

    edge m     w_A <- argmin F_m({w_E, w_A}) + eps / 2 sum over matrices || s (B A - B_0 A_0) ||_F^2
    server     w_A <- sum_m p_m w_A^m,    w_E <- argmin over public x of L2(x) + lam KL({E*, A}(x) || {E, A}(x))

A_0, B_0: as the edge received them; s = alpha / rank. Both problems are worked on by turns: the server first aligns E
(250 steps at beta 0.2, 500 at 0.5), then each round the edges do their local steps and the server a few (5) more, with
w_A frozen. Two models come of it: AdapEmu = {E, A}, what an edge runs, and AdapFu = {E*, A}, the result. The paper's
settings: a 2 or 4 of 32, beta 0.2 or 0.5, LoRA r 8, alpha 16, dropout 0.05 on q_proj and v_proj, lr 1e-4 or 3e-5.

Where we leave the authors' code: there eps has no gradient, lambda is 0, an edge of a distributed run never sees w_E
again, the server aligns at the edges' settings, edges weigh alike. Here eps acts on the merged change, w_E is sent and
counted every round, the server's settings are its own, p_m are rows (`weigh: equal`). Ours: how many steps for other
betas (`prealign_steps_of`); alignment after the last round too; `join: product`, the product nearest to
sum_m p_m B_m A_m; edges evaluate AdapEmu, the server both.

With prealign_steps and align_steps 0 it is FedOT; with one edge that has all rows, Offsite-Tuning (arXiv 2302.04870).
Theirs is `split: ends`: the first and last a / 2 layers are the adapter.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from fedpipe_ray import lora
from fedpipe_ray.alignment import Alignment, Positions
from fedpipe_ray.errors import DivergedError, UserError
from fedpipe_ray.frame import filled, frame
from fedpipe_ray.layer_drop import Cut, Split, blocks, cut, keep, renumbered
from fedpipe_ray.message import KEPT, Message
from fedpipe_ray.model import load_config
from fedpipe_ray.partial import joined
from fedpipe_ray.proximal import Pull
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, require
from fedpipe_ray.train import summed_loss

from .base import LoraMethod, LoraWeights, Updates, Weights, arrivals, unlike

if TYPE_CHECKING:
    from fedpipe_ray.model import Base
    from fedpipe_ray.site import Site

log = logging.getLogger("fedpipe")

EMULATOR = "emulator."  # the emulator's LoRA in an order: it acts and is not trained
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """What is where. stem: the list of layers; adapter, emulator: shapes of LoRA tensors by their key in the whole.

    The emulator has none where it is not aligned: no layer is dropped, or the server takes no step.
    """

    cut: Cut
    stem: str
    adapter: dict[str, tuple[int, ...]]
    emulator: dict[str, tuple[int, ...]]

    def small(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """The same under the names they have in an edge's model."""
        numbers = [self.cut.kept.index(n) if n in self.cut.kept else -1 for n in range(self.cut.kept[-1] + 1)]
        return {renumbered(name, self.stem, numbers): tensor for name, tensor in tensors.items()}

    def whole(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """The inverse."""
        return {renumbered(name, self.stem, self.cut.kept): tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class EmulatorWeights(LoraWeights):
    """{E, A}: LoRA on the adapter (`tensors`) and on the emulator, under the names of the small model.

    small: from a base to the model without the dropped layers; an edge's base is that already.
    """

    emulator: Tensors = dataclasses.field(default_factory=dict)
    small: Callable[[Base], Base] = lambda base: base

    def on(self, base: Base) -> Any:
        """The small PeftModel, trainable in the adapter."""
        return pair(self.small(base), self.spec, self.tensors, self.emulator)

    def save(self, folder: Path, server: Site) -> None:
        """A small plain model with everything merged, as transformers writes it."""
        self.merged(server.base).save_pretrained(folder)

    def merged(self, base: Base) -> Any:
        """That model, a copy: the base's own weights stay as they are."""
        return copy.deepcopy(self.on(base)).merge_and_unload()


@dataclass(frozen=True, kw_only=True)
class FedBiOT(LoraMethod):
    """FedBiOT: edges train the last layers over a shallow emulator that the server aligns on public rows.

    a: layers of the adapter; beta: share of the others left out; split: `last`, or `ends` as in Offsite-Tuning. eps:
    pull towards what an edge received (0, which measured best, or 1 in the paper); lam: lambda. prealign_steps (null:
    by beta), align_steps: of the server, before round 1 and after each; 0 and 0 are FedOT. align_lr, align_batch: its
    AdamW. positions: compared on `text` or `all`. weigh: edges by rows or `equal`. join: means of A and of B, or the
    nearest `product`. variant: of LoRA.
    """

    a: int = 2
    beta: float = 0.2
    split: Split = "last"
    eps: float = 0.0
    lam: float = 1.0
    prealign_steps: int | None = None
    align_steps: int = 5
    align_lr: float = 3e-3
    align_batch: int = 8
    positions: Positions = "text"
    weigh: Literal["rows", "equal"] = "rows"
    join: Literal["factors", "product"] = "factors"
    variant: Literal["plain", "rslora"] = "plain"

    base: ClassVar[Literal["shared", "sent", "none"]] = "sent"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.a >= 1, f"method.a: {self.a} must be at least 1")
        require(0 <= self.beta < 1, f"method.beta: {self.beta} must lie in [0, 1)")
        require(
            self.split == "last" or self.a % 2 == 0,
            f"method.a: {self.a} layers cannot be halved, as method.split: ends does; give an even number",
        )
        for name in ("eps", "lam", "align_steps", "prealign_steps"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"method.{name}: {value} must not be negative")
        for name in ("align_lr", "align_batch"):
            require(getattr(self, name) > 0, f"method.{name}: {getattr(self, name)} must be above 0")

    @property
    def updates(self) -> Updates:
        """`product` finds a new basis in every round."""
        return "entries" if self.join == "factors" else "changes"

    @property
    def prealigning(self) -> int:
        """Steps of the server before the first round."""
        return prealign_steps_of(self.beta) if self.prealign_steps is None else self.prealign_steps

    def check(self, site: Site) -> None:
        """Raises UserError for a model that cannot be cut so, and for what is needed and not there."""
        run = site.run
        if site.task != "causal":
            raise UserError("method.name: fedbiot keeps the head frozen and needs data.task: causal")
        if getattr(load_config(run.model, site.task, site.classes), "quantization_config", None):
            raise UserError(f"model.name: {run.model.name} is quantized; fedbiot sends layers and needs 16 or 32 bits")
        if run.local.checkpointing:
            raise UserError("local.checkpointing: it would take gradients below the adapter; fedbiot needs false")
        if self.shape(site).emulator and run.server.data is None:
            raise UserError(
                "server.data: fedbiot aligns the emulator on public rows; give server.data a source, "
                "or FedOT's method.prealign_steps: 0 and method.align_steps: 0"
            )

    def shape(self, site: Site) -> Shape:
        """Layers and LoRA tensors on the model of the server. Raises UserError."""
        if "shape" not in site.memo:
            skeleton = site.skeleton(self.spec(site))
            stem, layers = blocks(skeleton.get_base_model())
            found = cut(len(layers), self.a, self.beta, self.split)
            shapes = {name: tuple(p.shape) for name, p in lora.parameters(skeleton).items()}
            aligned = found.dropped and self.prealigning + self.align_steps > 0  # else E stays as it is
            own = [
                {name: shapes[name] for name in shapes if layer_of(name, stem) in numbers}
                for numbers in (found.adapter, found.emulator if aligned else ())
            ]
            site.memo["shape"] = Shape(found, stem, *own)
        shape: Shape = site.memo["shape"]
        return shape

    def kept(self, server: Site) -> dict[str, torch.Tensor]:
        """The frozen weights of an edge's model under its names, as the server stores them; the same objects always."""
        if "kept" not in server.memo:
            shape = self.shape(server)
            lora.detach(server.base)  # or they would have other names
            tensors = server.base.parcel().weights.tensors
            dropped = [name for name in tensors if layer_of(name, shape.stem) in shape.cut.dropped]
            server.memo["kept"] = shape.small({name: t for name, t in tensors.items() if name not in dropped})
        found: dict[str, torch.Tensor] = server.memo["kept"]
        return found

    def student(self, server: Site) -> Base:
        """The edges' model, on the server's own weights."""
        if "student" not in server.memo:
            empty, kept = frame(server.run.model, server.task, server.classes), self.kept(server)
            server.memo["student"] = filled(empty, kept, lambda model: self.reshape(model, Message()))
        student: Base = server.memo["student"]
        return student

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """Fresh LoRA on adapter and emulator, this one pre-aligned."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        shape = self.shape(server)
        state = Message(lora.initial({**shape.adapter, **shape.emulator}, generator))
        if shape.emulator:
            log.info("aligning the emulator: %d steps", self.prealigning)
        return self.align(state, server, self.prealigning, rng)

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> dict[str, Message]:
        """Everybody gets both LoRAs, and to keep the frozen weights under them."""
        return dict.fromkeys(edges, self.show(state, server))

    def show(self, state: Message | None, server: Site) -> Message:
        """The tensors of an order; of no state the frozen weights alone."""
        shape = self.shape(server)
        tensors = {KEPT + name: tensor for name, tensor in self.kept(server).items()}
        if state is not None:
            tensors |= shape.small({name: state.tensors[name] for name in shape.adapter})
            emulator = shape.small({name: state.tensors[name] for name in shape.emulator})
            tensors |= {EMULATOR + name: tensor for name, tensor in emulator.items()}
        return Message(tensors)

    def reshape(self, model: Any, order: Message) -> None:
        """The emulator's layers and the adapter's: which ones follows from a, beta and split."""
        keep(model, cut(len(blocks(model)[1]), self.a, self.beta, self.split).kept)

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The adapter's LoRA after this round's local steps, and the edge's rows."""
        adapter, emulator = parts(order)
        model = pair(site.base, self.spec(site), adapter, emulator)
        pull = Pull(lora.parameters(model), adapter, self.eps, self.spec(site).scale) if self.eps else None
        site.train(model, rng, summed_loss, pull)
        return Message(lora.read(model), {"rows": len(site.data.train)})

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """The next w_A, then w_E aligned with it. `product` holds all updates of the round, `factors` one."""
        shape = self.shape(server)
        like = shape.small({name: state.tensors[name] for name in shape.adapter})
        mean, numbers = {name: torch.zeros(t.shape) for name, t in like.items()}, dict(state.numbers)
        rows, updates = dict[str, float](), dict[str, Message]()
        for report, message in arrivals(reports, lambda message: misfit(message, like)):
            rows[report.edge] = message.numbers["rows"] if self.weigh == "rows" else 1.0
            if self.join == "product":
                updates[report.edge] = message
            else:
                for name, tensor in mean.items():
                    tensor.add_(message.tensors[name], alpha=rows[report.edge])
            del message  # before the next one is fetched
        if not rows:
            return state
        if self.join == "product":
            mean, numbers["residual"] = joined(like, updates, rows, join="truncate", weigh="paper", rank=self.rank)
        else:
            mean = {name: tensor.div_(sum(rows.values())) for name, tensor in mean.items()}
        after = Message({**state.tensors, **shape.whole(mean)}, numbers)
        return self.align(after, server, self.align_steps, rng)

    def align(self, state: Message, server: Site, steps: int, rng: np.random.Generator) -> Message:
        """The state with w_E after some steps on public rows; nothing else changes. Raises UserError if it diverges."""
        shape = self.shape(server)
        if not shape.emulator or steps == 0:
            return state
        adapter, emulator = (
            shape.small({name: state.tensors[name] for name in names}) for names in (shape.adapter, shape.emulator)
        )
        model = pair(self.student(server), self.spec(server), emulator, adapter)
        try:
            server.train(
                model, rng, self.objective(state, server, model), steps=steps, epochs=None, lr=self.align_lr,
                batch=self.align_batch, accumulate=1, schedule="constant", warmup_steps=0, weight_decay=0.0,
            )  # fmt: skip
        except DivergedError as error:
            why = f"the emulator's alignment diverged: {str(error).rpartition(';')[0]}"
            raise UserError(f"{why}; lower method.align_lr: {self.align_lr:g}") from None
        numbers = {**state.numbers, "alignment": server.train_loss}
        return Message({**state.tensors, **shape.whole(lora.read(model))}, numbers)

    def objective(self, state: Message, server: Site, student: Any) -> Alignment:
        """The lower problem with the state's adapter; student: `pair` of both LoRAs on the server's emulator."""
        shape = self.shape(server)
        teacher = self.weights(state, server)["adapfu"].on(server.base).eval()
        layers = [
            blocks(model.get_base_model())[1][number]
            for model, number in zip((teacher, student), shape.cut.after, strict=True)
        ]
        return Alignment(teacher, (layers[0], layers[1]), self.lam, self.positions)

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """On the server AdapFu, which is exported, and AdapEmu; on an edge AdapEmu alone."""
        if site.sent:
            adapter, emulator = parts(state)
            return {"adapemu": EmulatorWeights(spec_for(self.spec(site), adapter), adapter, emulator)}
        shape = self.shape(site)
        adapter = {name: state.tensors[name] for name in shape.adapter}
        small, emulator = shape.small(adapter), shape.small({name: state.tensors[name] for name in shape.emulator})
        return {
            "adapfu": LoraWeights(spec_for(self.spec(site), adapter), adapter),
            "adapemu": EmulatorWeights(spec_for(self.spec(site), small), small, emulator, lambda _: self.student(site)),
        }


def prealign_steps_of(beta: float) -> int:
    """The paper's steps before the first round: 250 up to beta 0.2, 500 from 0.5 on; ours: a line between."""
    return round(250 + 250 * min(1.0, max(0.0, (beta - 0.2) / 0.3)))


def layer_of(name: str, stem: str) -> int | None:
    """The number of the layer that a parameter or LoRA tensor belongs to; None outside the layers."""
    number = name.partition(f"{stem}.")[2].partition(".")[0]
    return int(number) if number.isdigit() else None


def parts(order: Message) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(the adapter's LoRA, the emulator's) of an order."""
    own = {name: tensor for name, tensor in order.rest.items() if not name.startswith(EMULATOR)}
    return own, {name.removeprefix(EMULATOR): t for name, t in order.rest.items() if name.startswith(EMULATOR)}


def spec_for(like: lora.LoraSpec, tensors: Tensors) -> lora.LoraSpec:
    """`like` on the modules of these tensors alone."""
    return dataclasses.replace(like, targets=tuple(lora.module_of(name) for name in tensors if ".lora_A." in name))


def pair(base: Base, like: lora.LoraSpec, trained: Tensors, frozen: Tensors) -> Any:
    """The PeftModel with both LoRAs on a small base: one to train, one that acts without dropout."""
    still = dataclasses.replace(spec_for(like, frozen), dropout=0.0) if frozen else None
    model = lora.attach(base, spec_for(like, trained), still)
    lora.load(model, trained)
    if frozen:
        lora.load(model, frozen, frozen=True)
    return model


def misfit(message: Message, like: Tensors) -> str | None:
    """Why an update cannot be used; None if it can."""
    rows = message.numbers.get("rows", 0)
    return unlike(message, like) or (None if 1 <= rows < 2**53 else f"its update says that the edge has {rows:g} rows")
