"""Pulls of what an edge trains towards where it started: of LoRA in the weights that it changes, or of any tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pull:
    """eps / 2 sum over matrices ||s (B A - B_0 A_0)||_F^2 of parameters against what they were."""

    now: Mapping[str, torch.nn.Parameter]
    before: Mapping[str, torch.Tensor]
    eps: float
    scale: float

    def __call__(self) -> torch.Tensor:
        """The term. B A - B_0 A_0 = (B - B_0) A + B_0 (A - A_0) = L R has the squared norm <L^T L, R R^T>, 2 r x 2 r.

        No d_out x d_in matrix is made, and nothing large cancels, as it would in the norms of both products.
        """
        terms = []
        for name in (name for name in self.now if ".lora_A." in name):
            other = name.replace(".lora_A.", ".lora_B.")
            a, b = self.now[name], self.now[other]  # [r, d_in], [d_out, r]
            a_0, b_0 = (self.before[key].to(a) for key in (name, other))
            left, right = torch.cat([b - b_0, b_0], 1), torch.cat([a, a - a_0])  # [d_out, 2 r], [2 r, d_in]
            terms.append(((left.T @ left) * (right @ right.T)).sum())
        return 0.5 * self.eps * self.scale**2 * torch.stack(terms).sum()


@dataclass(frozen=True)
class Near:
    """mu / 2 sum over parameters ||w - w_0||^2: FedProx's term (Li et al. 2020, arXiv 1812.06127, objective 2)."""

    now: Mapping[str, torch.nn.Parameter]
    before: Mapping[str, torch.Tensor]
    mu: float

    def __call__(self) -> torch.Tensor:
        """The term; its gradient is mu (w - w_0)."""
        squares = [(w - self.before[name].to(w)).square().sum() for name, w in self.now.items()]
        return 0.5 * self.mu * torch.stack(squares).sum()
