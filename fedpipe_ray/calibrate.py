"""What training costs on this very machine: a two-point profile of seconds and bytes, kept by model, bits and hardware.

Two batch sizes, one step to warm up and two measured at each, give a straight line: seconds = fixed + tokens x slope,
and so for the peak of memory. The larger one is what will be trained with, once half of it says that this fits. Other
ranks, targets and depths scale the slope of the time by their FLOPs and add their parameters' bytes. Ours; the paper
says only that plans follow from an edge's resources.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import lora
from .batches import Batch, autocast, sums
from .costs import ADAM_BYTES, PeakMemory, matmul_parameters, training_flops
from .data.docstrings import cache_folder
from .files import write_atomically
from .model import Base, stored_bytes
from .settings import Local
from .train import checkpointing

MARGIN = 1.1  # calibrated bytes are planned this much higher
BEYOND = 1.25  # and those of more tokens than were measured: 2 and 4 rows told up to a fifth too little of 8
Points = tuple[tuple[int, int], tuple[int, int]]  # two batches, small and large: (rows, tokens of each)


@dataclass(frozen=True)
class Calibration:
    """A line through two measured points, of one model with one adapter, in `bits`.

    Seconds and bytes of a step of so many tokens: fixed + tokens x slope; both bytes are 0 where memory could not be
    measured. flops: of a token; trained: parameters, of so many weights; tokens: of the larger batch.
    """

    bits: int
    seconds_fixed: float
    seconds_token: float
    bytes_fixed: float
    bytes_token: float
    flops: float
    trained: int
    tokens: int
    weights: int

    def seconds(self, tokens: float, flops: float) -> float:
        """Of a step with an adapter of so many FLOPs a token."""
        return self.seconds_fixed + tokens * self.seconds_token * flops / self.flops

    def memory_bytes(self, tokens: float, trained: int) -> float:
        """At the peak of a step with so many trained parameters."""
        return self.bytes_fixed + tokens * self.bytes_token + (4 + ADAM_BYTES) * (trained - self.trained)

    def margin(self, tokens: float) -> float:
        """What the bytes of a step of so many tokens are planned with."""
        return MARGIN if tokens <= self.tokens else BEYOND

    def parts(self, batch: int, accumulate: int, length: int, limit: float) -> int:
        """Into how many parts a batch of rows so long is split, at least `accumulate`, so that one stays below `limit`.

        Bytes with their margin; of one row if nothing fits.
        """
        for count in range(accumulate, batch):
            tokens = math.ceil(batch / count) * length
            if self.margin(tokens) * self.memory_bytes(tokens, self.trained) <= limit:
                return count
        return batch

    def numbers(self) -> dict[str, float]:
        """As a Message's numbers carry it."""
        return {name: float(value) for name, value in asdict(self).items()}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Of its numbers."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def of(cls, numbers: Mapping[str, float]) -> Calibration | None:
        """The calibration that `numbers` tell; None if they tell of none."""
        if not all(name in numbers for name in cls.names()):
            return None
        told: dict[str, Any] = {name: numbers[name] for name in cls.names()}
        return cls(
            **{name: int(x) if name in ("bits", "trained", "tokens", "weights") else x for name, x in told.items()}
        )


def points_for(rows: int, length: int) -> Points:
    """Two batches below one of `rows` rows that is only believed to fit; of one row, half of it and all of it."""
    small, large = max(1, rows // 4), max(1, rows // 2)
    return ((small, length if small < large else max(2, length // 2)), (large, length))


def measure(
    base: Base, spec: lora.LoraSpec, rows: int, length: int, units: int | None = None, *,
    frozen: lora.LoraSpec | None = None, local: Local | None = None, steps: int = 2,
) -> tuple[float, int]:  # fmt: skip
    """(median seconds of a step, peak training bytes, 0 if unknown) with `rows` rows of `length` random tokens.

    units: how many of a row's tokens have a label, the last ones; None: all. Trains at rate 0: no weight changes.
    """
    model, local = lora.attach(base, spec, frozen), local or Local()
    weights = [p for p in model.parameters() if p.requires_grad]
    batch = _random_batch(base, spec, rows, length, length if units is None else units)
    optimizer = torch.optim.AdamW(weights, lr=0.0)
    checkpointing(model, local.checkpointing)
    seconds = []
    model.train()
    with torch.random.fork_rng(), PeakMemory(base.device) as peak:  # dropout must not move what training will draw
        for _ in range(1 + steps):
            began = time.perf_counter()
            with autocast(base.device, local.precision):
                loss = sums(model, batch, base.device)[0]
            (loss / batch.units).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if base.device.type == "cuda":
                torch.cuda.synchronize(base.device)
            seconds.append(time.perf_counter() - began)
            del loss
    model.eval()
    used = peak.bytes if base.device.type == "cuda" else stored_bytes(base.model) + peak.grown  # the adapter is in it
    return float(np.median(seconds[1:])), used if peak.grown else 0


def calibrate(
    base: Base, spec: lora.LoraSpec, points: Points, units: int | None = None, *, frozen: lora.LoraSpec | None = None,
    local: Local | None = None,
) -> Calibration:  # fmt: skip
    """The line through two batches, measured now."""
    (t0, m0), (t1, m1) = (measure(base, spec, *point, units, frozen=frozen, local=local) for point in points)
    low, high = (rows * length for rows, length in points)
    seconds_token, bytes_token = max(0.0, (t1 - t0) / (high - low)), max(0.0, (m1 - m0) / (high - low))
    known = m0 > 0 and bytes_token > 0
    model = lora.attach(base, spec, frozen)
    weights = sum("default" in layer.lora_A for _, layer in lora.layers(model))
    return Calibration(
        base.bits, max(0.0, t0 - low * seconds_token), seconds_token, m0 - low * bytes_token if known else 0.0,
        bytes_token if known else 0.0, training_flops(model, 1), matmul_parameters(model)[2], high,
        weights,
    )  # fmt: skip


def calibrated(
    base: Base, spec: lora.LoraSpec, points: Points, units: int | None = None, *, frozen: lora.LoraSpec | None = None,
    local: Local | None = None,
) -> Calibration:  # fmt: skip
    """As `calibrate`, measured once for this model, adapter, bit-width, thread count and machine, then read again."""
    gpu, local = base.device.type == "cuda", local or Local()
    about = [
        base.model.config.to_dict(), asdict(spec), asdict(frozen) if frozen else None, base.bits, points, units,
        local.checkpointing, local.precision, str(base.device), torch.get_num_threads(), platform.node(),
        platform.machine(), torch.__version__,
        torch.cuda.get_device_name(base.device) if gpu else torch.backends.cpu.get_cpu_capability(),
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(about, default=str, sort_keys=True).encode()).hexdigest()[:24]
    path = Path(cache_folder()) / "calibration" / f"{name}.json"
    try:
        return Calibration(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        found = calibrate(base, spec, points, units, frozen=frozen, local=local)
        with contextlib.suppress(OSError):  # measured again next time
            write_atomically(path, json.dumps(asdict(found)) + "\n")
        return found


def fitted(
    base: Base, spec: lora.LoraSpec, size: tuple[int, int], length: int, units: int, limit: float, *,
    frozen: lora.LoraSpec | None = None, local: Local | None = None,
) -> tuple[Calibration, int]:  # fmt: skip
    """A line up to the largest part of a batch that fits, and into how many parts that splits it.

    size: rows, and parts at least; limit: bytes. Half a part is measured before the whole one is tried: memory grows
    faster than tokens, for the C library keeps what it cannot fit anew.
    """
    batch, parts = size
    line = calibrated(base, spec, points_for(math.ceil(batch / parts), length), units, frozen=frozen, local=local)
    parts = line.parts(batch, parts, length, limit)
    rows = math.ceil(batch / parts)
    if rows * length > line.tokens:
        points = (rows // 2, length), (rows, length)
        line = calibrated(base, spec, points, units, frozen=frozen, local=local)
        parts = line.parts(batch, parts, length, limit)
    return line, parts


def _random_batch(base: Base, spec: lora.LoraSpec, rows: int, length: int, units: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    size = int(base.model.config.get_text_config().vocab_size)
    tokens = torch.randint(2, size, (rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    if spec.task == "classification":
        return Batch(tokens, mask, torch.zeros(rows, dtype=torch.long), rows)
    labels = tokens.clone()
    labels[:, : max(1, length - units)] = -100
    return Batch(tokens, mask, labels, int((labels >= 0).sum()))
