"""How far a shallow student is from its teacher on the same rows: FedBiOT's lower problem (arXiv 2406.17706).

    mean over elements of ((h_T - h_S) / rms(h_T))^2  +  lambda KL(p_T || p_S)

h: the output of the block that the student emulates; p: next-token distributions, both with the same adapter on top.
Ours: rms over the width of each position, which is what the norm of the following layer divides by, so that positions
count alike; the student that gives zero is at 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from .batches import Batch

Positions = Literal["text", "all"]


@dataclass(frozen=True)
class Alignment:
    """A training objective for train.train: a batch's loss times its units, as that divides by them.

    teacher: a model that is not trained; layers: of teacher and of the student that is trained, the modules whose first
    input is compared. positions: `text`, or `all`, padding too.
    """

    teacher: Any
    layers: tuple[Any, Any]
    lam: float
    positions: Positions = "text"

    def __call__(self, student: Any, batch: Batch, device: torch.device) -> torch.Tensor:
        """Loss of a batch times batch.units."""
        l2, kl = self.parts(student, batch, device)
        return (l2 + self.lam * kl) * batch.units if self.lam else l2 * batch.units

    def parts(self, student: Any, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(relative L2, KL): means over elements and over positions; float32."""
        tokens, mask = batch.tokens.to(device), batch.mask.to(device)
        chosen = mask.bool() if self.positions == "text" else torch.ones_like(mask, dtype=torch.bool)
        with torch.no_grad(), first_input(self.layers[0]) as seen:
            logits_t = self.teacher(input_ids=tokens, attention_mask=mask).logits
            h_t = seen[0][chosen].float()  # [positions, width]
        with first_input(self.layers[1]) as seen:
            logits_s = student(input_ids=tokens, attention_mask=mask).logits
            h_s = seen[0][chosen].float()
        scale = h_t.pow(2).mean(-1, keepdim=True).clamp_min(1e-12)
        l2 = ((h_t - h_s).pow(2) / scale).mean()
        if not self.lam:
            return l2, l2.new_zeros(())
        log_t, log_s = (functional.log_softmax(one[chosen].float(), -1) for one in (logits_t, logits_s))
        return l2, functional.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


@contextmanager
def first_input(module: Any) -> Iterator[list[torch.Tensor]]:
    """A list into which the hidden states go that `module` is called with."""
    seen: list[torch.Tensor] = []

    def note(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(positional[0] if positional else named["hidden_states"])

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()
