"""What training costs on this very machine: a two-point profile of seconds and bytes, kept by model, bits and hardware.

Two batch sizes, one step to warm up and two measured at each, give a straight line: seconds = fixed + tokens x slope,
and so for the peak of memory. Other ranks, targets and depths scale the slope of the time by their FLOPs and add their
parameters' bytes. Ours; the paper says only that plans follow from an edge's resources.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import lora
from .batches import Batch, sums
from .costs import ADAM_BYTES, PeakMemory, matmul_parameters, training_flops
from .data.docstrings import cache_folder
from .message import write_atomically
from .model import Base, stored_bytes


@dataclass(frozen=True)
class Calibration:
    """A line through two measured points, of one model with one adapter, in `bits`.

    Seconds and bytes of a step of `tokens` tokens: fixed + tokens x slope. flops: of a token; trained: parameters.
    """

    bits: int
    seconds_fixed: float
    seconds_token: float
    bytes_fixed: float
    bytes_token: float
    flops: float
    trained: int

    def seconds(self, tokens: int, flops: float) -> float:
        """Of a step with an adapter of so many FLOPs a token."""
        return self.seconds_fixed + tokens * self.seconds_token * flops / self.flops

    def memory_bytes(self, tokens: int, trained: int) -> float:
        """At the peak of a step with so many trained parameters."""
        return self.bytes_fixed + tokens * self.bytes_token + (4 + ADAM_BYTES) * (trained - self.trained)

    def numbers(self) -> dict[str, float]:
        """As a Message's numbers carry it."""
        return {name: float(value) for name, value in asdict(self).items()}

    @classmethod
    def of(cls, numbers: Mapping[str, float]) -> Calibration | None:
        """The calibration that `numbers` tell; None if they tell of none."""
        if not all(field.name in numbers for field in fields(cls)):
            return None
        told: dict[str, Any] = {field.name: numbers[field.name] for field in fields(cls)}
        return cls(**{**told, "bits": int(told["bits"]), "trained": int(told["trained"])})


def measure(
    base: Base, spec: lora.LoraSpec, rows: int, length: int, units: int | None = None, steps: int = 2
) -> tuple[float, int]:
    """(median seconds of a step, peak training bytes) with `rows` rows of `length` random tokens.

    units: how many of a row's tokens have a label, the last ones; None: all.
    """
    model = lora.attach(base, spec)
    weights = [p for p in model.parameters() if p.requires_grad]
    batch = _random_batch(base, spec, rows, length, length if units is None else units)
    optimizer = torch.optim.AdamW(weights, lr=0.0)
    seconds = []
    model.train()
    sums(model, batch, base.device)  # what is made once, on first use, is no part of a step
    with PeakMemory(base.device) as peak:
        for _ in range(1 + steps):
            began = time.perf_counter()
            loss, _, _ = sums(model, batch, base.device)
            (loss / batch.units).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if base.device.type == "cuda":
                torch.cuda.synchronize(base.device)
            seconds.append(time.perf_counter() - began)
            del loss
    model.eval()
    used = peak.bytes if base.device.type == "cuda" else stored_bytes(base.model) + peak.grown  # the adapter is in it
    return float(np.median(seconds[1:])), used


def calibrate(
    base: Base, spec: lora.LoraSpec, rows: tuple[int, int], length: int, units: int | None = None
) -> Calibration:
    """The line through two batch sizes, measured now."""
    points = [measure(base, spec, count, length, units) for count in rows]
    low, high = (count * length for count in rows)
    seconds_token = max(0.0, (points[1][0] - points[0][0]) / (high - low))
    bytes_token = max(0.0, (points[1][1] - points[0][1]) / (high - low))
    model = lora.attach(base, spec)
    return Calibration(
        base.bits, max(0.0, points[0][0] - low * seconds_token), seconds_token, points[0][1] - low * bytes_token,
        bytes_token, training_flops(model, 1), matmul_parameters(model)[2],
    )  # fmt: skip


def calibrated(
    base: Base, spec: lora.LoraSpec, rows: tuple[int, int], length: int, units: int | None = None
) -> Calibration:
    """As `calibrate`, measured once for this model, adapter, bit-width, thread count and machine, then read again."""
    gpu = base.device.type == "cuda"
    about = [
        base.model.config.to_dict(), asdict(spec), base.bits, rows, length, units, str(base.device),
        torch.get_num_threads(), platform.node(), platform.machine(), torch.__version__,
        torch.cuda.get_device_name(base.device) if gpu else torch.backends.cpu.get_cpu_capability(),
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(about, default=str, sort_keys=True).encode()).hexdigest()[:24]
    path = Path(cache_folder()) / "calibration" / f"{name}.json"
    try:
        return Calibration(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        found = calibrate(base, spec, rows, length, units)
        write_atomically(path, json.dumps(asdict(found)) + "\n")
        return found


def _random_batch(base: Base, spec: lora.LoraSpec, rows: int, length: int, units: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    size = int(base.model.config.vocab_size)
    tokens = torch.randint(2, size, (rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    if spec.task == "classification":
        return Batch(tokens, mask, torch.zeros(rows, dtype=torch.long), rows)
    labels = tokens.clone()
    labels[:, : max(1, length - units)] = -100
    return Batch(tokens, mask, labels, int((labels >= 0).sum()))
