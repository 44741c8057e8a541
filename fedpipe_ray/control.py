"""SCAFFOLD's correction of a local step, and the control variate that comes of it (Karimireddy et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


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
