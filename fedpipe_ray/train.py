"""The local step: every gradient step of every method goes through `train`.

Where torch.distributed has a process group, as on an edge with several GPUs, all its processes call `train` with the
same arguments; each computes its share of every batch, gradients are summed, and all end with the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed

from .batches import Batch, Rows, autocast, batches_of_like_length, collate, sums
from .errors import DivergedError
from .settings import Local

Objective = Callable[[Any, Batch, torch.device], torch.Tensor]  # (model, batch, device) -> loss summed over batch.units


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


def learning_rate(local: Local, step: int, total: int, warm: int | None = None) -> float:
    """Rate at global `step` of `total` over all rounds: linear warm-up, then the schedule down to lr_floor x lr.

    warm: the step of the warm-up that this one is, where rounds differ in steps; by default `step`.
    """
    warm = step if warm is None else warm
    if warm < local.warmup_steps:
        return local.lr * (warm + 1) / local.warmup_steps
    progress = min(1.0, max(0, step - local.warmup_steps) / max(1, total - local.warmup_steps))
    left = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[local.schedule]
    return local.lr * (local.lr_floor + (1 - local.lr_floor) * left) if local.schedule != "constant" else local.lr


def summed_loss(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """The summed loss of the task itself."""
    return sums(model, batch, device)[0]


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
    objective: Objective = summed_loss,
    penalty: Callable[[], torch.Tensor] | None = None,
    correct: Callable[[], None] | None = None,
    warm: int | None = None,
) -> Trained:
    """Trains the parameters of `model` that require gradients for one round; the optimizer starts fresh every round.

    The gradient of a step is that of the mean over all its loss terms, however `accumulate` and a process group split
    the batch; tokens and loss are those of the whole batch on every process.
    penalty: added to that mean, its gradient too, but not to the losses that are told. correct: called before every
    step; may read and change the gradients, which are whole and not yet clipped. warm: steps of the warm-up that the
    rounds before did, where they had not as many steps. on_step(step, steps, loss, tokens) is called after every step.
    Raises DivergedError on a loss or gradient that is not finite.
    """
    steps = steps_of(local, len(rows))
    past = round * steps
    warmed = past if warm is None else warm
    weights, (rank, ranks) = [p for p in model.parameters() if p.requires_grad], process_group()
    if ranks > 1:
        torch.manual_seed(torch.initial_seed() + rank)  # other rows, another dropout
    optimizer = optimizer_of(weights, local, device)
    total_loss, units, tokens, seconds = 0.0, 0, 0, []
    checkpointing(model, local.checkpointing)
    model.train()
    try:
        for step, drawn in enumerate(batches_of_like_length(rows, local.batch, steps, rng)):
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(local, past + step, rounds * steps, warmed + step)
            parts = np.array_split(drawn[rank::ranks], local.accumulate)  # strided: rows of a batch rise in length
            batches = [collate(rows, list(part), pad_id, classifier) for part in parts if len(part)]
            loss, terms, passed = backward(model, batches, objective, local.precision, device)
            if penalty is not None:
                (penalty() / ranks).backward()  # the group sums it up again
            if ranks > 1:
                sum_gradients(weights)
            if correct is not None:
                correct()
            clip_gradients(weights, local.clip, loss, f"step {step + 1} of {steps}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total_loss, units, tokens = total_loss + loss * terms, units + int(terms), tokens + int(passed)
            seconds.append(time.perf_counter() - started)
            on_step(step + 1, steps, loss, tokens)
    finally:
        model.eval()
        optimizer.zero_grad(set_to_none=True)
    return Trained(steps * local.batch, steps, tokens, total_loss / max(1, units), typical(seconds))


def clip_gradients(weights: Sequence[torch.Tensor], norm: float, loss: float, where: str) -> None:
    """Scales gradients down to an L2 norm. Raises DivergedError if it, or the loss, is not finite."""
    found = torch.nn.utils.clip_grad_norm_(weights, norm)
    if not (math.isfinite(loss) and bool(torch.isfinite(found))):
        raise DivergedError(f"loss {loss:.3g}, gradient norm {float(found):.3g} in {where}; lower local.lr")


def typical(seconds: Sequence[float]) -> float:
    """The median of a step's seconds, the first left out where there are several."""
    return float(np.median(seconds[1:] or seconds))


def optimizer_of(weights: Sequence[torch.Tensor], local: Local, device: torch.device) -> torch.optim.Optimizer:
    """A fresh one, as `local` has it."""
    if local.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=local.lr, weight_decay=local.weight_decay)
    return torch.optim.AdamW(weights, lr=local.lr, weight_decay=local.weight_decay, fused=device.type != "mps")


def backward(
    model: Any, batches: Sequence[Batch], objective: Objective, precision: str, device: torch.device
) -> tuple[float, float, float]:
    """Adds this process's part of a step's gradient; (mean loss a loss term, loss terms, tokens) of all processes."""
    units, tokens = sum(batch.units for batch in batches), sum(batch.tokens.numel() for batch in batches)
    terms, passed = summed_over_group(device, units, tokens)
    loss = 0.0
    for batch in batches:
        with autocast(device, precision):
            summed = objective(model, batch, device)
        (summed / terms).backward()
        loss += float(summed.detach()) / terms
    return summed_over_group(device, loss)[0], terms, passed


def process_group() -> tuple[int, int]:
    """(rank, processes) of the group this process trains in; (0, 1) alone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def summed_over_group(device: torch.device, *values: float) -> list[float]:
    """Each value summed over the processes of the group; the values themselves in a process alone."""
    if process_group()[1] == 1:
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(totals)
    return [float(total) for total in totals]


def sum_gradients(weights: Sequence[torch.Tensor], bucket_bytes: int = 32 * 2**20) -> None:
    """Replaces every gradient by its sum over the group, in messages of about `bucket_bytes`.

    A process without a row of the batch has no gradient and takes part with zeros.
    """
    bucket: list[torch.Tensor] = []
    for index, weight in enumerate(weights):
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        bucket.append(weight.grad)
        following = weights[index + 1].dtype if index + 1 < len(weights) else None
        if sum(g.numel() * g.element_size() for g in bucket) >= bucket_bytes or following != weight.dtype:
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            distributed.all_reduce(flat)
            for gradient, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(total.view_as(gradient))
            bucket = []


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
                    summed = sums(model, batch, device)[0]
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
