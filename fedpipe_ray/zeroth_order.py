"""Steps along random directions by two forward passes each: no gradient, and no more memory than inference needs.

The weights are never moved to be tried: each module computes with w + s z in place of its own w, of which it makes a
chunk at a time, so that nothing has to be taken back and nothing drifts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .batches import Batch, autocast, sums
from .noise import LANES, Flat, Noise, chunk_of


@dataclass(frozen=True)
class Searched:
    """candidates, slopes: [steps that count] each; loss: mean a loss term; tokens of both passes, padding included."""

    candidates: np.ndarray[Any, Any]
    slopes: np.ndarray[Any, Any]
    steps: int
    tokens: int
    loss: float
    step_seconds: float


class Direction:
    """A model that can be evaluated at w + s z_j and moved along z_j. Within `on`, its modules compute as `at` says."""

    def __init__(self, model: Any, seed: int, device: torch.device) -> None:
        self.model, self.flat, self.device = model, Flat(model), device
        self.noise, self.chunk = Noise(seed, device), chunk_of(device)
        self.candidate, self.scale = 0, 0.0
        self._whole: tuple[int, torch.Tensor] | None = None  # z_j of a model that fits in one chunk
        # One place for every chunk: freed and made anew, they would lie scattered between a pass's own tensors.
        self._scratch = torch.empty(self.chunk + 2 * LANES) if device.type == "cpu" else None

    def z(self, start: int, count: int) -> torch.Tensor:
        """Part of the current candidate's noise, which holds until the next call."""
        if self.flat.size > self.chunk:
            return self.noise.of(self.candidate, start, count, self._scratch)
        if self._whole is None or self._whole[0] != self.candidate:
            self._whole = self.candidate, self.noise.of(self.candidate, 0, self.flat.size)
        return self._whole[1][start : start + count]

    def move(self, distance: float, decay: float = 0.0) -> None:
        """w <- w - distance z_j - decay w, computed in float32 and stored in the weights' own dtype."""
        for name, parameter in self.flat.parameters.items():
            w, at = parameter.view(-1), self.flat.starts[name]
            for low in range(0, w.numel(), self.chunk):
                part = w[low : low + self.chunk]
                moved = part.float()  # itself, if it is float32
                moved.mul_(1 - decay).add_(self.z(at + low, part.numel()), alpha=-distance)
                if moved is not part:
                    part.copy_(moved)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Has every module with parameters of its own compute at w + scale z."""
        own = [module for module in self.model.modules() if any(p is not None for p in module._parameters.values())]
        before = [module.__dict__.get("forward") for module in own]
        for module in own:
            kind = type(module)
            way: Callable[..., Any] = self._swapped
            if kind is nn.Linear:
                way = self._linear
            elif kind is nn.Embedding and module.max_norm is None:
                way = self._embedding
            module.forward = partial(way, module, module.forward)
        try:
            yield
        finally:
            for module, forward in zip(own, before, strict=True):
                del module.forward
                if forward is not None:  # it had one of its own, not its class's
                    module.forward = forward

    def _at(self, parameter: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Rows low to high of w + scale z, in the dtype of w, which hold until the next call."""
        rows = parameter.detach()[low:high]
        z = self.z(self.flat.start_of[id(parameter)] + low * rows[0].numel(), rows.numel()).view(rows.shape)
        own = z if self.flat.size > self.chunk else None  # else it is needed again
        return torch.add(rows.float(), z, alpha=self.scale, out=own).to(rows.dtype)

    def _whole_at(self, parameter: torch.Tensor) -> torch.Tensor:
        """All of w + scale z, to be kept."""
        found = torch.empty_like(parameter, requires_grad=False, memory_format=torch.contiguous_format)
        w, start = parameter.detach().reshape(-1), self.flat.start_of[id(parameter)]
        for at in range(0, w.numel(), self.chunk):
            part = w[at : at + self.chunk].float()
            found.view(-1)[at : at + self.chunk] = part.add(self.z(start + at, part.numel()), alpha=self.scale)
        return found

    def _swapped(self, module: Any, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        """Any module: its own parameters are exchanged while it computes."""
        own = {name: p for name, p in module._parameters.items() if p is not None}
        module._parameters.update({name: self._whole_at(p) for name, p in own.items()})
        try:
            return forward(*inputs, **named)
        finally:
            module._parameters.update(own)

    def _rows(self, weight: torch.Tensor) -> Iterator[tuple[int, int]]:
        """The rows of a matrix by chunks."""
        step = max(1, self.chunk // weight.shape[1])
        return ((low, min(low + step, len(weight))) for low in range(0, len(weight), step))

    def _linear(self, module: Any, forward: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
        """Chunks of outputs, each from its own rows of the weight, into one tensor.

        Kept apart until the end, they would lie between the chunks that were freed, and no other would fit there.
        """
        bias = None if module.bias is None else self._whole_at(module.bias)
        found: torch.Tensor | None = None
        for low, high in self._rows(module.weight):
            own = None if bias is None else bias[low:high]
            part = functional.linear(x, self._at(module.weight, low, high), own)
            if high - low == len(module.weight):
                return part
            if found is None:
                found = part.new_empty(*part.shape[:-1], len(module.weight))
            found[..., low:high] = part
            del part
        assert found is not None
        return found

    def _embedding(self, module: Any, forward: Callable[..., Any], tokens: torch.Tensor) -> torch.Tensor:
        """Noise of those chunks alone in which a token is looked up."""
        found: torch.Tensor = forward(tokens)
        for low, high in self._rows(module.weight):
            here = (tokens >= low) & (tokens < high)
            if bool(here.any()):
                found[here] = self._at(module.weight, low, high)[tokens[here] - low]
        return found


@torch.inference_mode()
def search(
    direction: Direction,
    batches: Iterable[Batch],
    candidates: Iterable[int],
    *,
    eps: float,
    lr: float,
    weight_decay: float,
    precision: str,
    on_step: Callable[[int, float, int], None] = lambda *_: None,
) -> Searched:
    """A step a batch and candidate: g = (L(w + eps z) - L(w - eps z)) / (2 eps); w <- w - lr (g z + weight_decay w).

    A step whose loss is not finite is left out. on_step(step, loss, tokens) is called after each.
    """
    model, device = direction.model.eval(), direction.device
    kept: list[tuple[int, float]] = []
    total, units, tokens, steps, seconds = 0.0, 0, 0, 0, []
    with direction.on():
        for candidate, batch in zip(candidates, batches, strict=False):  # batches may have no end
            began = time.perf_counter()
            direction.candidate, losses = candidate, []
            for direction.scale in (eps, -eps):
                with autocast(device, precision):
                    losses.append(float(sums(model, batch, device)[0]) / max(1, batch.units))
            slope = float(np.float32((losses[0] - losses[1]) / (2 * eps)))  # as it travels
            steps, tokens = steps + 1, tokens + 2 * batch.tokens.numel()
            if math.isfinite(slope):
                direction.move(lr * slope, lr * weight_decay)
                kept.append((candidate, slope))
                total, units = total + sum(losses) / 2 * batch.units, units + batch.units
            seconds.append(time.perf_counter() - began)
            on_step(steps, sum(losses) / 2, tokens)
    drawn = np.array([candidate for candidate, _ in kept], dtype=np.int32)
    slopes = np.array([slope for _, slope in kept], dtype=np.float32)
    typical = float(np.median(seconds[1:] or seconds)) if seconds else 0.0
    return Searched(drawn, slopes, steps, tokens, total / max(1, units) if kept else math.nan, typical)
