"""What a method is: five functions, both halves in one file; and the base class of methods that train LoRA."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
import torch

from fedpipe_ray import lora
from fedpipe_ray.errors import UnfitUpdate
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, Section, require

if TYPE_CHECKING:
    from fedpipe_ray.model import Base
    from fedpipe_ray.site import Site

Updates: TypeAlias = Literal["values", "changes", "entries"]


class Weights(Protocol):
    """One named view of a state that a model can be evaluated with and exported as: an adapter, or a whole model.

    folder: where in the run folder the export stands.
    """

    folder: ClassVar[str]

    @property
    def hint(self) -> str:
        """Lines for the end of a run: where its export stands and how it is loaded; `{out}` is the run folder."""

    def on(self, base: Base) -> Any:
        """The base model with these weights, for evaluation. `base.model` itself stays as it is."""

    def save(self, folder: Path, server: Site) -> None:
        """Writes the export into `folder`."""

    def merged(self, base: Base) -> Any:
        """A plain model of the base's architecture that computes the same. Raises UserError if there is none."""


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA adapter."""

    spec: lora.LoraSpec
    tensors: Mapping[str, torch.Tensor]

    folder: ClassVar[str] = "adapter"

    @property
    def hint(self) -> str:
        """PEFT loads it, and it can be merged."""
        return (
            'adapter:  {out}/adapter   (peft.PeftModel.from_pretrained(base, "{out}/adapter"))\n'
            "merge:    fedpipe export {out} --out MODEL --merge"
        )

    def on(self, base: Base) -> Any:
        """The PeftModel."""
        model = lora.attach(base, self.spec)
        lora.load(model, self.tensors)
        return model

    def save(self, folder: Path, server: Site) -> None:
        """A PEFT adapter."""
        lora.save_adapter(folder, self.spec, server.skeleton(self.spec), self.tensors, server.run.model.name)

    def merged(self, base: Base) -> Any:
        """The base with the adapter added to its weights."""
        return self.on(base).merge_and_unload()


@dataclass(frozen=True)
class FullWeights:
    """All parameters of the model by name; tied ones once."""

    tensors: Mapping[str, torch.Tensor]
    task: str = "causal"

    folder: ClassVar[str] = "model"

    @property
    def hint(self) -> str:
        """Transformers alone loads it."""
        kind = "CausalLM" if self.task == "causal" else "SequenceClassification"
        return f'model:    {{out}}/model   (transformers.AutoModelFor{kind}.from_pretrained("{{out}}/model"))'

    def on(self, base: Base) -> Any:
        """A copy of the model in float32, made anew each time: whoever holds it pays for it."""
        lora.detach(base)
        model = base.writable()
        lora.load(model, self.tensors)
        return model

    def save(self, folder: Path, server: Site) -> None:
        """Model and tokenizer as transformers writes them, in float32; `folder` is replaced when all is written."""
        model = self.on(server.base)
        aside = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            model.save_pretrained(aside)
            server.base.tokenizer.save_pretrained(aside)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def merged(self, base: Base) -> Any:
        """The model: there is nothing to merge."""
        return self.on(base)


class Method(Protocol):
    """A frozen dataclass whose fields are its hyperparameters. The same object stands on the driver and on every edge.

    base: what an edge holds of the model: `shared` = the frozen base; `sent` = what its orders bring (see Sending);
    `none` = neither model nor data. personal: whether each edge has a model of its own: `weights` is then asked for on
    edges alone, where it may read `site.private`, each edge is evaluated with its own, and a run exports nothing.
    asynchronous: whether updates that started from older states can be used
    (fleet.mode: buffered). It promises that an order is the state and depends on nothing else but the edge, that an
    update has the tensors of the state, and that `aggregate` moves with its arguments:
    aggregate(S + D, {x + D}) = aggregate(S, {x}) + D. Any weighted mean does. updates: what wire.codec may do: `values`
    of their own; `changes` of the order's tensors of the same names; or of `entries` that mean the same in every round.
    again: patterns of names whose change an edge counts from what of them has arrived (site.encoding.arriving).
    averaging: whether `aggregate` is averaging.average, so that server.aggregator acts. pseudo_gradient: whether the
    state's tensors are numbers in one basis over all rounds, so that server.optimizer can act on their changes; aside:
    patterns of the names of those that are not. A tensor that a round does not touch is the same object in both states;
    where rounding to wire.dtype makes another one of it, still(round), where there is one, names it by patterns. adds:
    whether `aggregate` adds changes to the state's tensors themselves; else it joins what edges made of them as sent.
    """

    base: ClassVar[Literal["shared", "sent", "none"]]
    personal: ClassVar[bool] = False
    asynchronous: ClassVar[bool] = False
    updates: ClassVar[Updates] = "changes"
    again: ClassVar[tuple[str, ...]] = ()
    averaging: ClassVar[bool] = False
    pseudo_gradient: ClassVar[bool] = False
    aside: ClassVar[tuple[str, ...]] = ()
    adds: ClassVar[bool] = False

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """The server's state before round 0."""

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> Mapping[str, Message | Lost]:
        """An order for each of `edges`, those asked this round, or Lost with the reason why it is left out of it.

        Pure: what it learns goes through `aggregate`. Only synchronous rounds leave edges out.
        """

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """On the edge: from an order to an update. May replace `site.private`, nothing else."""

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """The next state, from reports in the order of the orders; some may be Lost."""

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """Named views of the state for this site; the first is evaluated as the result and exported."""


class Sending(Method, Protocol):
    """A method with base = `sent`: an edge never sees the whole model, and builds its own from its order.

    From the driver it has the configuration and the tokenizer. On an edge `weights` is given what `show` made.
    """

    def reshape(self, model: Any, order: Message) -> None:
        """Makes the architecture, on the meta device, that of the edge's model: its parameters are the kept tensors."""

    def show(self, state: Message | None, server: Site) -> Message:
        """What an edge needs to evaluate a state: kept tensors, and what `weights` reads; None: the kept ones alone."""


def shown(method: Method, state: Message | None, server: Site) -> Message | None:
    """What edges evaluate a state by: itself; of a method with base = `sent`, what it shows of it."""
    sending: Any = method
    return sending.show(state, server) if method.base == "sent" else state


def arrivals(
    reports: Iterable[Report | Lost], fault: Callable[[Message], str | None]
) -> Iterator[tuple[Report, Message]]:
    """The reports that can be used, each with its message, fetched one at a time and let go after use.

    A message that cannot be fetched or has a `fault` is rejected: the report says why, the round records the edge as
    lost.
    """
    for report in reports:
        if isinstance(report, Lost):
            continue
        try:
            message = report.message()
        except UnfitUpdate as error:
            report.rejected = str(error)
            report.release()
            continue
        except Exception as error:  # whatever the transport raises, this edge's update is gone
            report.rejected = f"its update was lost on the way: {type(error).__name__}: {error}".splitlines()[0]
            report.cost = dataclasses.replace(report.cost, bytes_up=0)
            continue
        report.rejected = fault(message)
        if report.rejected is None:
            yield report, message
        report.release()
        del message


def unlike(message: Message, like: Mapping[str, torch.Tensor]) -> str | None:
    """Why `message` cannot be averaged with tensors such as `like`: other names or shapes, NaN, infinity; or None."""
    if message.tensors.keys() != like.keys():
        odd = sorted(message.tensors.keys() ^ like.keys())
        return f"its update differs from the state in {len(odd)} tensors, the first {odd[0]}"
    for name, tensor in message.tensors.items():
        if tensor.shape != like[name].shape:
            return f"its update has {name} in shape {list(tensor.shape)}, not {list(like[name].shape)}"
        if not is_finite(tensor):
            return f"its update has NaN or infinity in {name}"
    return None


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite; by its bounds: torch.isfinite needs 1.75 tensors of memory."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    return all(math.isfinite(bound) for bound in torch.aminmax(tensor))


def as_sent(state: Message, server: Site) -> Mapping[str, torch.Tensor]:
    """The state's tensors as edges got them: rounded to wire.dtype, in the server's own float32."""
    wire = server.run.wire.dtype
    if wire == "float32":
        return state.tensors
    return {name: t.float() if t.is_floating_point() else t for name, t in state.to(wire).tensors.items()}


@dataclass(frozen=True, kw_only=True)
class LoraMethod(Section):
    """Federated training of one LoRA adapter of the same shape on every edge.

    The state is the adapter. Subclasses say how updates are aggregated; one that has other variants than plain LoRA has
    a field `variant` with those of lora.Variant that its mathematics allows. against_dora: why DoRA is none of them.

    rank, alpha: scale alpha / rank; targets: module names, or `all-linear`; dropout: on the adapter's input.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | list[str] = "all-linear"
    dropout: float = 0.0

    base: ClassVar[Literal["shared", "sent", "none"]] = "shared"
    against_dora: ClassVar[str] = (
        "its rule is one for the product B A, and DoRA's weight, which is divided by the norms of its rows, is linear "
        "in neither factor"
    )

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"method.rank: {self.rank} must be at least 1")
        require(self.alpha > 0, f"method.alpha: {self.alpha} must be above 0")
        require(0 <= self.dropout < 1, f"method.dropout: {self.dropout} must lie in [0, 1)")
        require(
            bool(self.targets), "method.targets: names no module; write all-linear or names such as [q_proj, v_proj]"
        )

    def spec(self, site: Site) -> lora.LoraSpec:
        """The adapter this method puts on the model of `site`."""
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        variant: lora.Variant = getattr(self, "variant", "plain")
        return lora.LoraSpec(self.rank, self.alpha, targets, self.dropout, site.task, variant=variant)

    def check(self, site: Site) -> None:
        """Raises UserError if the model of `site` has no place for the adapter; loads no weights."""
        lora.inject(site.bare(), self.spec(site))

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """A fresh adapter; the head of a classifier and DoRA's magnitudes as the base model has them."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        shapes = {name: tuple(p.shape) for name, p in lora.parameters(server.skeleton(self.spec(server))).items()}
        tensors = lora.initial(shapes, generator)
        given = [name for name in tensors if ".lora_" not in name or ".lora_magnitude_vector" in name]
        if given:
            lora.detach(server.base)  # magnitudes are right in a new adapter, whose B is zero
            own = lora.read(lora.attach(server.base, self.spec(server)))
            tensors.update({name: own[name] for name in given})
        return Message(tensors)

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> Mapping[str, Message | Lost]:
        """Everybody gets the global adapter."""
        return dict.fromkeys(edges, Message(state.tensors))

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The adapter after this round's local steps."""
        model = lora.attach(site.base, self.spec(site))
        lora.load(model, order.tensors)
        site.train(model, rng)
        return Message(lora.read(model))

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: the global adapter."""
        return {"global": LoraWeights(self.spec(site), state.tensors)}


def weighted_mean(
    state: Message,
    reports: Iterable[Report | Lost],
    also: Callable[[Mapping[str, torch.Tensor], float], None] = lambda *_: None,
) -> Message:
    """Mean of the updates weighted by report.weight, folded one at a time; `state` unchanged if none is usable.

    Holds one accumulator of the size of an update beside the one in hand. Sums run in the order of the orders.
    also(tensors, weight) is told of every update that is used, for rules that sum up more than the factors.
    """
    total, mean = 0.0, {name: torch.zeros(t.shape) for name, t in state.tensors.items()}
    for report, message in arrivals(reports, partial(unlike, like=state.tensors)):
        total += report.weight
        for name, tensor in mean.items():
            tensor.add_(message.tensors[name], alpha=report.weight)
        also(message.tensors, report.weight)
        del message  # before the next one is fetched
    if total == 0:
        return state
    return Message({name: tensor.div_(total) for name, tensor in mean.items()}, state.numbers)
