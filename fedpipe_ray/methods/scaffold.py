"""SCAFFOLD on LoRA: local steps corrected for their edge's drift (Karimireddy et al. 2020, arXiv 1910.06378).

The paper's, algorithm 1 with option II: x the model, c the server's control variate, c_i an edge's, all c zero at the
beginning. Of N edges those in S do K steps from y = x, and send their changes:

    y <- y - eta (g_i(y) - c_i + c)              c_i+ = c_i - c + (x - y) / (K eta)
    x <- x + eta_g / |S| sum_S (y_i - x)         c <- c + 1 / N sum_S (c_i+ - c_i)

Ours: x are the factors A and B and a classifier's head. c_i+ is the mean of the gradients g_i along the local steps,
which of plain SGD at one rate is option II (control.py), and is defined for every optimizer: with AdamW, the default
here, the correction is added to the gradient before AdamW sees it. The paper's is `local: {optimizer: sgd, schedule:
constant}` with `clip` too large to act; with another rate a step, or a clipped one, c_i+ stays the mean of what was
measured. What travels is y_i and c + c_i+ - c_i, twice an adapter each way. c_i is private state of its edge; an edge
that lost it begins at zero again, and c is then off by what it was, over N. Edges weigh alike, as in the paper: other
weights would leave a pull, sum_i p_i (c - c_i), in the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from fedpipe_ray import lora
from fedpipe_ray.control import Correction
from fedpipe_ray.lora import Variant
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import require
from fedpipe_ray.train import summed_loss

from .base import LoraMethod, LoraWeights, Updates, Weights, arrivals, unlike

if TYPE_CHECKING:
    from fedpipe_ray.site import Site

CONTROL = "control."  # before the name of the tensor that a control variate is of


@dataclass(frozen=True, kw_only=True)
class Scaffold(LoraMethod):
    """SCAFFOLD: LoRA whose local steps are corrected by control variates.

    server_lr: eta_g. variant: of LoRA, `plain`, `rslora` or `dora`.
    """

    server_lr: float = 1.0
    variant: Variant = "plain"

    pseudo_gradient: ClassVar[bool] = True
    aside: ClassVar[tuple[str, ...]] = (f"{CONTROL}*",)
    updates: ClassVar[Updates] = "entries"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.server_lr > 0, f"method.server_lr: {self.server_lr} must be above 0")

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """A fresh adapter, and c = 0."""
        tensors = super().start(server, rng).tensors
        return Message({**tensors, **{CONTROL + name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}})

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """y_i and c + c_i+ - c_i; c_i+ stays."""
        model, (adapter, c) = lora.attach(site.base, self.spec(site)), parts(order)
        lora.load(model, adapter)
        own = site.private.tensors if site.private is not None else {n: torch.zeros(t.shape) for n, t in c.items()}
        correct = Correction(lora.parameters(model), {name: c[name].float() - own[name] for name in c})
        site.train(model, rng, summed_loss, None, None, correct)
        after = correct.mean()
        site.private = Message(after)
        return Message({**lora.read(model), **{CONTROL + n: c[n].float() + (after[n] - own[n]) for n in c}})

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """x and c after the round; one update is held at a time."""
        count, sums = 0, {name: torch.zeros(tensor.shape) for name, tensor in state.tensors.items()}
        for _, message in arrivals(reports, partial(unlike, like=state.tensors)):
            count += 1
            for name, total in sums.items():
                total.add_(message.tensors[name] - state.tensors[name])
            del message  # before the next one is fetched
        if count == 0:
            return state
        everyone = len(server.run.fleet.edges)
        rates = {name: 1 / everyone if name.startswith(CONTROL) else self.server_lr / count for name in sums}
        return Message({name: state.tensors[name] + rates[name] * total for name, total in sums.items()}, state.numbers)

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: the global adapter."""
        return {"global": LoraWeights(self.spec(site), parts(state)[0])}


def parts(message: Message) -> tuple[dict[str, torch.Tensor], Mapping[str, torch.Tensor]]:
    """(the adapter, the control variates by the names of its tensors) of a state, an order or an update."""
    adapter = {name: t for name, t in message.tensors.items() if not name.startswith(CONTROL)}
    return adapter, {name: message.tensors[CONTROL + name] for name in adapter}
