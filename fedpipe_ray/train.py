"""The local step: every gradient step of every method goes through `train`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .batches import Rows, autocast, batches_of_like_length, collate, sums
from .errors import DivergedError
from .settings import Local


@dataclass(frozen=True)
class Trained:
    """loss: mean a loss term (response token, or row of a classifier) over all steps; tokens count padding too.

    step_seconds: median of a step, the first left out where there are several.
    """

    samples: int
    steps: int
    tokens: int
    loss: float
    step_seconds: float


def steps_of(local: Local, rows: int) -> int:
    """Optimizer steps of one round over `rows` rows; 20 if the configuration names neither steps nor epochs."""
    if local.epochs is not None:
        return max(1, math.ceil(rows * local.epochs / local.batch))
    return local.steps if local.steps is not None else 20


def learning_rate(local: Local, step: int, total: int) -> float:
    """Rate at global `step` of `total` over all rounds: linear warm-up, then the schedule down to lr_floor x lr."""
    if step < local.warmup_steps:
        return local.lr * (step + 1) / local.warmup_steps
    progress = min(1.0, (step - local.warmup_steps) / max(1, total - local.warmup_steps))
    left = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[local.schedule]
    return local.lr * (local.lr_floor + (1 - local.lr_floor) * left) if local.schedule != "constant" else local.lr


def train(
    model: Any,
    rows: Rows,
    local: Local,
    *,
    round: int,
    rounds: int,
    rng: np.random.Generator,
    device: torch.device,
    pad_id: int,
    classifier: bool = False,
    on_step: Callable[[int, int, float, int], None] = lambda *_: None,
) -> Trained:
    """Trains the parameters of `model` that require gradients for one round; AdamW starts fresh every round.

    The gradient of a step is that of the mean over all its loss terms, however `accumulate` splits the batch.
    on_step(step, steps, loss, tokens) is called after every step. Raises DivergedError on a loss or gradient that is
    not finite.
    """
    steps = steps_of(local, len(rows))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=local.lr, weight_decay=local.weight_decay, fused=device.type != "mps")
    total_loss, units, tokens, seconds = 0.0, 0, 0, []
    checkpointing(model, local.checkpointing)
    model.train()
    try:
        for step, drawn in enumerate(batches_of_like_length(rows, local.batch, steps, rng)):
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(local, round * steps + step, rounds * steps)
            parts = np.array_split(drawn, local.accumulate)
            batches = [collate(rows, list(part), pad_id, classifier) for part in parts]
            terms = sum(batch.units for batch in batches)
            loss = 0.0
            for batch in batches:
                with autocast(device, local.precision):
                    summed, _, _ = sums(model, batch, device)
                (summed / terms).backward()
                loss += float(summed.detach()) / terms
            norm = torch.nn.utils.clip_grad_norm_(weights, local.clip)
            if not (math.isfinite(loss) and bool(torch.isfinite(norm))):
                raise DivergedError(
                    f"loss {loss:.3g}, gradient norm {float(norm):.3g} in step {step + 1} of {steps}; lower local.lr"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total_loss, units = total_loss + loss * terms, units + terms
            tokens += sum(batch.tokens.numel() for batch in batches)
            seconds.append(time.perf_counter() - started)
            on_step(step + 1, steps, loss, tokens)
    finally:
        model.eval()
        optimizer.zero_grad(set_to_none=True)
    typical = float(np.median(seconds[1:] or seconds))
    return Trained(steps * local.batch, steps, tokens, total_loss / max(1, units), typical)


def gradients(
    model: Any, rows: Rows, local: Local, *, batches: int, rng: np.random.Generator, device: torch.device, pad_id: int,
    classifier: bool = False,
) -> tuple[dict[str, torch.Tensor], int]:  # fmt: skip
    """(gradients of the mean loss a loss term by parameter name, on the CPU; tokens) over some batches; no step.

    Raises DivergedError on a loss that is not finite.
    """
    tokens = terms = 0
    checkpointing(model, local.checkpointing)
    model.eval()  # without dropout
    try:
        for drawn in batches_of_like_length(rows, local.batch, batches, rng):
            for part in np.array_split(drawn, local.accumulate):
                batch = collate(rows, list(part), pad_id, classifier)
                with autocast(device, local.precision):
                    summed, _, _ = sums(model, batch, device)
                if not math.isfinite(float(summed.detach())):
                    raise DivergedError(f"loss {float(summed.detach()):.3g} while scoring the weights")
                summed.backward()
                tokens, terms = tokens + batch.tokens.numel(), terms + batch.units
        named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        return {name: (grad / max(1, terms)).to("cpu", torch.float32) for name, grad in named.items()}, tokens
    finally:
        model.zero_grad(set_to_none=True)


def checkpointing(model: Any, wanted: bool) -> None:
    """Turns gradient checkpointing on or off; on, the embeddings' output needs a gradient, or nothing would train."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if wanted and not base.is_activation_checkpointing:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    elif not wanted and base.is_activation_checkpointing:
        base.activation_checkpointing_disable()
        base.disable_input_require_grads()
