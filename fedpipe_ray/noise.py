"""Gaussian noise that is a function of (seed, candidate, position) alone: the same bits on every device and worker.

z_j[i] is looked up: Philox4x64-10 (Salmon et al. 2011) under the key (seed, j) turns the counter into 64-bit words, and
each of the word's four 16-bit parts names one of 65,536 quantiles of N(0, 1). So any part of any z_j can be had without
the rest, in any order, and nothing but integers decides. torch's CPU and CUDA generators differ from each other, and
numpy promises its bit streams but not its `standard_normal`; a look-up is also five times as fast as that one. On the
CPU the words come from numpy, on CUDA from the same arithmetic in torch's 64-bit integers.

The quantiles are multiples of 2^-12, so that sums of whole multiples of them are exact in float64 (seed_sums.py). What
that leaves of N(0, 1): mean 0, variance 1 within 1e-6, kurtosis 2.999, no value beyond 4.33.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.special import ndtri

from .errors import UserError

GRID = 4096  # steps of a standard deviation
LANES, WORDS = 16, 4  # normals and 64-bit words of a block
LOW = 0xFFFFFFFF


def chunk_of(device: torch.device) -> int:
    """Elements of z to have in memory at a time: what stays in a CPU's cache, or is worth a GPU's kernel launches."""
    return 2**22 if device.type == "cuda" else 2**18


@functools.cache
def quantiles() -> np.ndarray[Any, Any]:
    """[65536] float32, ascending: the normal quantiles at (i + 1/2) / 65536, scaled to variance 1, on the grid."""
    exact = ndtri((np.arange(2**16) + 0.5) / 2**16)
    return np.asarray(np.rint(exact / exact.std() * GRID) / GRID, dtype=np.float32)


class Noise:
    """The vectors z_j of one 32-bit seed on one device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed & LOW
        self.device = device
        self.table = torch.from_numpy(quantiles()).to(device) if device.type == "cuda" else None

    def of(self, candidate: int, start: int, count: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """z_j[start : start + count] in float32. out: float32 memory that may be used for it, on the CPU."""
        first, last = start // LANES, -(-(start + count) // LANES)  # blocks
        if self.table is not None:
            words = words_of(self.seed, candidate, first, last - first, self.device)
            found = look_up(words, self.table)
        else:
            found = self._on_host(candidate, first, last - first, out).to(self.device)
        return found[start - LANES * first :][:count]

    def _on_host(self, candidate: int, first: int, blocks: int, out: torch.Tensor | None) -> torch.Tensor:
        """numpy steps its counter before it makes a block, so the first block has the counter first + 1."""
        bits = np.random.Philox(key=[self.seed, candidate], counter=[first, 0, 0, 0])
        words: Any = bits.random_raw(WORDS * blocks)
        fits = out is not None and len(out) >= LANES * blocks
        found = out[: LANES * blocks] if out is not None and fits else torch.empty(LANES * blocks)
        parts = words.astype("<u8", copy=False).view("<u2")
        np.take(quantiles(), parts, out=found.numpy(), mode="clip")  # `raise` would go through a buffer
        return found


def words_of(seed: int, candidate: int, first: int, blocks: int, device: torch.device) -> torch.Tensor:
    """[blocks, 4] int64: the bits of numpy's Philox4x64-10 in integer operations that every device has."""
    c = [torch.arange(first + 1, first + 1 + blocks, device=device), *[torch.zeros(blocks, dtype=torch.int64)] * 3]
    c = [part.to(device) for part in c]
    k0, k1 = seed, candidate
    for _ in range(10):
        high0, low0 = _product(0xD2E7470EE14C6C93, c[0])
        high1, low1 = _product(0xCA5A826395121157, c[2])
        c = [high1 ^ c[1] ^ _signed(k0), low1, high0 ^ c[3] ^ _signed(k1), low0]
        k0, k1 = k0 + 0x9E3779B97F4A7C15, k1 + 0xBB67AE8584CAA73B
    return torch.stack(c, dim=1)


def _product(factor: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(high, low) 64 bits of an unsigned product, by halves; int64 wraps around as the hardware does."""
    f0, f1 = factor & LOW, factor >> 32
    x0, x1 = x & LOW, (x >> 32) & LOW
    middle = x1 * f0 + ((x0 * f0 >> 32) & LOW)
    other = x0 * f1 + (middle & LOW)
    return x1 * f1 + ((middle >> 32) & LOW) + ((other >> 32) & LOW), x * _signed(factor)


def _signed(value: int) -> int:
    """The low 64 bits of `value` as int64 has them."""
    return (value + 2**63) % 2**64 - 2**63


def look_up(words: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """[16 blocks] normals of [blocks, 4] words, the lowest 16 bits first."""
    parts = torch.stack([(words >> 16 * part) & 0xFFFF for part in range(4)], dim=-1)
    return table[parts.flatten()]


class Flat:
    """A model's parameters as one long vector: by name in alphabetical order, tied ones once.

    So the place of a weight does not depend on the order in which a model registers its parameters. Raises UserError
    for a parameter that is not stored in 16 or 32 bits.
    """

    def __init__(self, model: Any) -> None:
        self.parameters: dict[str, torch.nn.Parameter] = dict(sorted(model.named_parameters()))
        self.starts: dict[str, int] = {}
        self.size = 0
        for name, parameter in self.parameters.items():
            if not parameter.is_floating_point() or parameter.element_size() < 2:
                kind = str(parameter.dtype).removeprefix("torch.")
                raise UserError(
                    f"model: {name} is stored in {kind}; fedkseed changes every weight, and weights of less than 16 "
                    "bits cannot take its steps: name the unquantized checkpoint"
                )
            self.starts[name] = self.size
            self.size += parameter.numel()
        self.start_of = {id(p): self.starts[name] for name, p in self.parameters.items()}

    def pieces(self, start: int, stop: int) -> Iterator[tuple[str, slice, slice]]:
        """(name, part of the flattened parameter, part of [start, stop)) of all that lies between the two."""
        for name, at in self.starts.items():
            low, high = max(start, at), min(stop, at + self.parameters[name].numel())
            if low < high:
                yield name, slice(low - at, high - at), slice(low - start, high - start)
