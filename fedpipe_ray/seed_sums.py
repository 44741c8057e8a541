"""w = w0 - sum_j c_j z_j, rebuilt exactly: whatever was rebuilt before, in whatever order, gives the same bits.

The coefficients c_j are whole multiples of 2^-30 and the z_j of 2^-12 (noise.py), so that their sum is exact in
float64; it is rounded once, when it meets w0. Therefore the rebuilt weights are a function of the coefficients alone,
and an increment

    sum  <-  sum + sum_{j: c_j changed} (c_j new - c_j old) z_j

ends with the bits of the whole sum. The sum is kept between calls in a temporary file without a name, 8 bytes a weight,
one a loaded base, for all edges that share it. It is a cache: without it the whole sum is made.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from typing import IO, Any
from weakref import WeakKeyDictionary, finalize

import numpy as np
import torch

from .model import Base
from .noise import LANES, Flat, Noise, chunk_of

log = logging.getLogger("fedpipe")

UNIT = 2.0**-30
# Of a coefficient (int32 on the wire), and of the sum of their absolute values: a sum and its increments then stay
# below 2^53 steps of the grid, and float64 holds them.
LARGEST, TOTAL = 2**31 - 1, 2**37
Coefficients = np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class Kept:
    """What is known of the sum in `file`; coefficients None: nothing, it is being changed or was left half-changed."""

    seed: int
    file: IO[bytes]
    coefficients: Coefficients | None = None


_KEPT: WeakKeyDictionary[Base, Kept] = WeakKeyDictionary()


def fixed(coefficients: np.ndarray[Any, Any]) -> Coefficients:
    """[K] real coefficients as multiples of UNIT. Raises OverflowError where sums could not be exact any more."""
    units = np.rint(coefficients / UNIT)
    largest, total = np.abs(units).max(), np.abs(units).sum()
    if not (largest <= LARGEST and total <= TOTAL):  # NaN too
        raise OverflowError(
            f"a coefficient of {largest * UNIT:.3g} (limit {LARGEST * UNIT:.3g}), all together {total * UNIT:.3g} "
            f"(limit {TOTAL * UNIT:.3g})"
        )
    return units.astype(np.int64)


def plan(before: Coefficients | None, now: Coefficients) -> tuple[bool, np.ndarray[Any, Any]]:
    """(whether to go on from `before`, [n] the candidates whose noise must be made); the cheaper way of the two."""
    whole = np.flatnonzero(now)
    if before is None or len(before) != len(now):
        return False, whole
    changed = np.flatnonzero(now != before)
    return (True, changed) if len(changed) < len(whole) or not len(changed) else (False, whole)


@torch.inference_mode()
def rebuild(base: Base, model: Any, seed: int, now: Coefficients, keep: bool = True) -> None:
    """Sets the parameters of `model`, a copy of the base's, to w0 - UNIT sum_j now_j z_j, in their own dtype.

    One chunk of the sum and of noise is in memory at a time. keep: in a file for the next time.
    """
    flat, target = Flat(base.model), dict(model.named_parameters())
    device = base.device if base.device.type == "cuda" else torch.device("cpu")  # others may lack float64
    noise, chunk = Noise(seed, device), chunk_of(device)
    kept = _kept(base, seed) if keep else None
    before = kept.coefficients if kept else None
    going_on, candidates = plan(before, now)
    weights = now[candidates] - (before[candidates] if going_on and before is not None else 0)
    if kept:
        kept.coefficients = None
    room, scratch = True, torch.empty(min(chunk, flat.size) + LANES) if device.type == "cpu" else None
    for start in range(0, flat.size, chunk):
        stop = min(start + chunk, flat.size)
        total = _read(kept, start, stop) if kept and going_on else torch.zeros(stop - start, dtype=torch.float64)
        total = total.to(device)
        for candidate, weight in zip(candidates.tolist(), weights.tolist(), strict=True):
            total.add_(noise.of(candidate, start, stop - start, scratch), alpha=weight)
        if kept and room and (len(candidates) or not going_on):
            room = _write(kept, start, total)
        for name, part, here in flat.pieces(start, stop):
            w0 = flat.parameters[name].detach().reshape(-1)[part]
            moved = w0.to(device, torch.float64) - UNIT * total[here]
            target[name].view(-1)[part] = moved.to(target[name])
    if kept and room:
        kept.coefficients = now.copy()


def _kept(base: Base, seed: int) -> Kept:
    """What is kept beside this base."""
    if base not in _KEPT or _KEPT[base].seed != seed:
        _KEPT[base] = Kept(seed, tempfile.TemporaryFile(prefix="fedpipe-sum-"))  # noqa: SIM115 (closed with the base)
        finalize(base, _KEPT[base].file.close)
    return _KEPT[base]


def forget(base: Base) -> None:
    """Drops what is kept; the next rebuild makes the whole sum."""
    _KEPT.pop(base, None)


def _read(kept: Kept, start: int, stop: int) -> torch.Tensor:
    """[stop - start] float64 of the file; read rather than mapped, so that it does not count as this process's."""
    kept.file.seek(8 * start)
    return torch.frombuffer(bytearray(kept.file.read(8 * (stop - start))), dtype=torch.float64)


def _write(kept: Kept, start: int, total: torch.Tensor) -> bool:
    """Writes a chunk. False where there is no room: the next rebuild then makes the whole sum."""
    try:
        kept.file.seek(8 * start)
        kept.file.write(total.cpu().numpy().tobytes())
        kept.file.flush()
    except OSError as error:
        log.warning(
            "fedkseed: no room in %s for the sum, 8 bytes a weight (%s): rebuilds start anew; give TMPDIR room, or set "
            "method.incremental: false", tempfile.gettempdir(), error.strerror,
        )  # fmt: skip
        return False
    return True
