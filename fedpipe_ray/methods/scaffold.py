"""SCAFFOLD on LoRA: local steps corrected for their edge's drift (Karimireddy et al. 2020, arXiv 1910.06378).

The paper's, algorithm 1 with option II: x the model, c the server's control variate, c_i an edge's, all c zero at the
beginning. Of N edges those in S do K steps from y = x, and send their changes:

    y <- y - eta (g_i(y) - c_i + c)              c_i+ = c_i - c + (x - y) / (K eta)
    x <- x + eta_g / |S| sum_S (y_i - x)         c <- c + 1 / N sum_S (c_i+ - c_i)

Ours: x are the factors A and B and a classifier's head. c_i+ is the mean of the gradients g_i along the local steps,
which of plain SGD at one rate is option II (control.py), and is defined for every optimizer: with AdamW, the default
here, the correction is added to the gradient before AdamW sees it. The paper's is `local: {optimizer: sgd, schedule:
constant}` with `clip` too large to act; with another rate a step, or a clipped one, c_i+ stays the mean of what was
measured. What travels is y_i and c + c_i+ - c_i, twice an adapter each way; what an edge keeps is c_i and what of c_i+
- c_i arrives, as wire.dtype and wire.codec leave it. What they leave out is in the next c_i+ - c_i, so that it comes
without error feedback, which is of y_i alone: with it too it came twice, and c_i ran away. Edges weigh alike, as in the
paper: other weights would leave a pull, sum_i p_i (c - c_i), in the mean.

Ours, too: S are the edges whose reports are used. One whose report came too late or was refused was not in S, and goes
on from its c_i before. It keeps both, as its private state, and its next order says, by a round's number, which of them
counts (control.py), so that c = 1 / N sum_i c_i always. If an edge's private state is gone, nobody knows what it has in
c: the server begins anew with c = 0, and every edge with c_i = 0; `restarts` counts that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from fedpipe_ray import lora
from fedpipe_ray.control import NEVER, Correction, counted, kept
from fedpipe_ray.errors import UserError
from fedpipe_ray.lora import Variant
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, require
from fedpipe_ray.train import summed_loss

from .base import LoraMethod, LoraWeights, Updates, Weights, arrivals, unlike

if TYPE_CHECKING:
    from fedpipe_ray.site import Site

CONTROL = "control."  # before the name of the tensor that a control variate is of
USED = "control/used"  # in an order: the round of the edge's last report that was used
GONE = "control/gone"  # in an update: 1 if the edge has that round's c_i no more
RESTARTS = "restarts"


@dataclass(frozen=True, kw_only=True)
class Scaffold(LoraMethod):
    """SCAFFOLD: LoRA whose local steps are corrected by control variates.

    server_lr: eta_g. variant: of LoRA, `plain`, `rslora` or `dora`.
    """

    server_lr: float = 1.0
    variant: Variant = "plain"

    pseudo_gradient: ClassVar[bool] = True
    aside: ClassVar[tuple[str, ...]] = (f"{CONTROL}*",)
    adds: ClassVar[bool] = True
    updates: ClassVar[Updates] = "entries"
    again: ClassVar[tuple[str, ...]] = (f"{CONTROL}*",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.server_lr > 0, f"method.server_lr: {self.server_lr} must be above 0")

    def check(self, site: Site) -> None:
        """Raises UserError as LoraMethod does, and for a norm that an edge would not know its update was clipped to."""
        super().check(site)
        clip = site.run.server.norm_clip
        if clip is not None:
            raise UserError(
                f"server.norm_clip: {clip:g} would shrink c_i+ - c_i of an edge, which keeps the whole; use "
                "server.norm_bound, or remove it"
            )

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """A fresh adapter, and c = 0."""
        tensors = super().start(server, rng).tensors
        return Message({**tensors, **{CONTROL + name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}})

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> Mapping[str, Message | Lost]:
        """x and c, and which c_i counts; edges that were last used in one round share an order."""
        used = {edge: state.numbers.get(used_by(edge), NEVER) for edge in edges}
        orders = {last: Message(state.tensors, {USED: last}) for last in dict.fromkeys(used.values())}
        return {edge: orders[last] for edge, last in used.items()}

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """y_i and c + c_i+ - c_i; c_i and c_i+ stay."""
        model, (adapter, c), used = lora.attach(site.base, self.spec(site)), parts(order), int(order.numbers[USED])
        lora.load(model, adapter)
        found = counted(site.private, used)
        own = found or {name: torch.zeros(tensor.shape) for name, tensor in c.items()}
        correct = Correction(lora.parameters(model), {name: c[name].float() - own[name] for name in c})
        site.train(model, rng, summed_loss, None, None, correct)
        moved = {CONTROL + name: c[name].float() + (after - own[name]) for name, after in correct.mean().items()}
        there = site.encoding.arriving(Message(moved), order, site.carried).tensors
        after = {name: own[name] + (there[CONTROL + name] - c[name].float()) for name in c}
        site.private = kept(found or {}, used if found else NEVER, after, site.round)
        return Message({**lora.read(model), **moved}, {GONE: 1.0} if found is None else {})

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """x and c after the round; one update is held at a time."""
        sent, gone, used = state.to(server.run.wire.dtype).tensors, False, dict[str, float]()
        sums = {name: torch.zeros(tensor.shape) for name, tensor in state.tensors.items()}
        for report, message in arrivals(reports, partial(unlike, like=state.tensors)):
            used[used_by(report.edge)] = round
            gone = gone or bool(message.numbers.get(GONE))
            for name, total in sums.items():
                total.add_(message.tensors[name].float() - sent[name].float())
            del message  # before the next one is fetched
        if not used:
            return state
        everyone = len(server.run.fleet.edges)
        rates = {name: 1 / everyone if name.startswith(CONTROL) else self.server_lr / len(used) for name in sums}
        tensors = {name: state.tensors[name] + rates[name] * total for name, total in sums.items()}
        return restarted(tensors, state) if gone else Message(tensors, {**state.numbers, **used})

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: the global adapter."""
        return {"global": LoraWeights(self.spec(site), parts(state)[0])}


def parts(message: Message) -> tuple[dict[str, torch.Tensor], Mapping[str, torch.Tensor]]:
    """(the adapter, the control variates by the names of its tensors) of a state, an order or an update."""
    adapter = {name: t for name, t in message.tensors.items() if not name.startswith(CONTROL)}
    return adapter, {name: message.tensors[CONTROL + name] for name in adapter}


def used_by(edge: str) -> str:
    """The number of the state that says in which round an edge's report was last used."""
    return f"{edge}/used"


def restarted(tensors: Mapping[str, torch.Tensor], state: Message) -> Message:
    """The next state with c = 0, in which no edge's c_i counts."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name.startswith(CONTROL)}
    return Message({**tensors, **zeros}, {RESTARTS: state.numbers.get(RESTARTS, 0.0) + 1})
