"""SCAFFOLD's correction of a local step, the control variate that comes of it, and which one counts (ours).

c is the mean of all c_i only if an edge goes on from the c_i that the server counts in c. A report that came too late,
or was one too many, or was refused, never reaches c. So an edge keeps two: the one that counted when it last trained,
and the one that it made then; its next order says of which round the report was that the server used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .message import Message

NEWEST = "newest."  # before the name of the tensor that it is the control variate of
NEVER = -1  # the round of the report that was used, of an edge of which none was


@dataclass
class Correction:
    """Called before every step: turns each gradient g_i into g_i - c_i + c. `shift`: c - c_i by name.

    Adds up g_i on the way. Of K steps of SGD at one rate eta, from x to y, y = x - eta sum(g_i - c_i + c), so that the
    paper's option II is their mean: c_i - c + (x - y) / (K eta) = mean g_i. With any other optimizer it is that mean.
    """

    now: Mapping[str, torch.nn.Parameter]
    shift: Mapping[str, torch.Tensor]
    total: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0

    def __call__(self) -> None:
        """Corrects the gradients; one that is missing is zero."""
        self.steps += 1
        for name, w in self.now.items():
            gradient = torch.zeros_like(w) if w.grad is None else w.grad
            self.total[name] = self.total[name].add_(gradient) if name in self.total else gradient.clone()
            w.grad = gradient.add_(self.shift[name].to(w))

    def mean(self) -> dict[str, torch.Tensor]:
        """The next c_i by name, on the CPU in float32."""
        return {name: (total / self.steps).to("cpu", torch.float32) for name, total in self.total.items()}


def counted(private: Message | None, used: int) -> dict[str, torch.Tensor] | None:
    """An edge's c_i by name that came of round `used`, from its private state: {} of NEVER, None if it is not there."""
    if used == NEVER:
        return {}
    rounds = {} if private is None else private.numbers
    if private is None or used not in (rounds.get("counted"), rounds.get("newest")):
        return None
    new = used == rounds["newest"]
    found = ((name, tensor) for name, tensor in private.tensors.items() if name.startswith(NEWEST) == new)
    return {name.removeprefix(NEWEST): tensor for name, tensor in found}


def kept(own: Mapping[str, torch.Tensor], used: int, after: Mapping[str, torch.Tensor], round: int) -> Message:
    """The private state after `round`: the c_i that it went on from, of round `used`, and the one it ended with."""
    new = {NEWEST + name: tensor for name, tensor in after.items()}
    return Message({**own, **new}, {"counted": used, "newest": round})
