"""What an edge's update is made smaller by on its way up. A codec encodes one tensor; encoding.py, messages of them.

    bf16        8 bits of mantissa
    int8        x = s q, q in -127..127, s = max |x| / 127 of a block of consecutive entries
    nf4         x = s c, c one of 16 quantiles of N(0, 1) within [-1, 1], s = max |x| of a block (QLoRA, arXiv
                2305.14314); `double`: the s of a tensor are int8 themselves, around their mean
    topk        the k entries that are largest in magnitude (Aji, Heafield 2017, arXiv 1704.05021)
    randomk     k entries drawn from (seed, round, edge, name), which the server draws too, so that no index travels;
                times n / k, so that the mean over draws is x (Konecny et al. 2016, arXiv 1610.05492)
    lowrank     x [m, n] ~ P Q^T: P = orthonormalised x Q_before, Q = x^T P (PowerSGD, arXiv 1905.13727), one power
                iteration that goes on from the Q of the round before, which the edge keeps; the first is drawn

Ours: nf4's scales are int8 with `double`, where QLoRA has 8-bit floats; P and Q of every edge travel, where PowerSGD
averages P before it is orthonormalised; with error feedback randomk leaves n / k out, for a codec must then shrink what
is left, not be right in the mean. What decoding computes is one product or one sum at a time: the same bits anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from .config import build
from .errors import UnfitUpdate, UserError
from .section import Section, require

Parts = dict[str, torch.Tensor]  # flat, by name
Sizes = dict[str, tuple[torch.dtype, int]]  # dtype and length of each part

# Halfway quantiles of N(0, 1), 8 below and 9 above zero of which one is shared, over the largest (QLoRA's appendix E).
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
HALFWAY = (NF4[1:] + NF4[:-1]) / 2  # [15]
ROWS = 1024  # of a matrix that lowrank holds in float64 at once
SHORT = 2**16  # entries that indices of two bytes reach


class Codec(Protocol):
    """A frozen dataclass whose fields are its settings.

    whole: whether it can take a tensor as it is; else only a change, in which a zero says that nothing happened. warm:
    the part that the edge keeps for the same tensor's next round; "" is none.
    """

    whole: ClassVar[bool]
    warm: ClassVar[str]

    def sizes(self, shape: Sequence[int], dtype: torch.dtype) -> Sizes:
        """What a tensor of `shape` becomes; dtype: of floating-point numbers that the codec does not make smaller."""

    def encode(self, x: torch.Tensor, rng: np.random.Generator, warm: torch.Tensor | None, feedback: bool) -> Parts:
        """The parts of x, float32 and finite, before they are cast to their dtypes.

        warm: what was kept last time. feedback: whether the rest comes again.
        """

    def decode(self, parts: Parts, shape: Sequence[int], rng: np.random.Generator) -> torch.Tensor:
        """x as far as its parts tell, float32; rng: as it was for `encode`. Raises UnfitUpdate."""


@dataclass(frozen=True, kw_only=True)
class Bf16(Section):
    """bfloat16, 2 bytes an entry; of changes, so that it is finer than wire.dtype: bfloat16."""

    whole: ClassVar[bool] = True
    warm: ClassVar[str] = ""

    def sizes(self, shape: Sequence[int], dtype: torch.dtype) -> Sizes:
        """2 n bytes."""
        return {"values": (torch.bfloat16, math.prod(shape))}

    def encode(self, x: torch.Tensor, rng: np.random.Generator, warm: torch.Tensor | None, feedback: bool) -> Parts:
        """All of x."""
        return {"values": x.flatten()}

    def decode(self, parts: Parts, shape: Sequence[int], rng: np.random.Generator) -> torch.Tensor:
        """All of x."""
        return parts["values"].float().view(shape)


@dataclass(frozen=True, kw_only=True)
class Int8(Section):
    """int8 with a scale a block: an entry is off by at most max |x| / 254 of its block. block: entries a scale."""

    block: int = 256

    whole: ClassVar[bool] = True
    warm: ClassVar[str] = ""

    def __post_init__(self) -> None:
        require(self.block >= 1, f"wire.codec.block: {self.block} must be at least 1")

    def sizes(self, shape: Sequence[int], dtype: torch.dtype) -> Sizes:
        """n + 4 ceil(n / block) bytes."""
        n = math.prod(shape)
        return {"codes": (torch.int8, n), "scales": (torch.float32, blocks(n, self.block))}

    def encode(self, x: torch.Tensor, rng: np.random.Generator, warm: torch.Tensor | None, feedback: bool) -> Parts:
        """Codes and scales."""
        rows = blocked(x, self.block)  # [blocks, block]
        scales = rows.abs().amax(1) / 127
        codes = over(rows, scales).round().clamp(-127, 127)
        return {"codes": codes.flatten()[: x.numel()], "scales": scales}

    def decode(self, parts: Parts, shape: Sequence[int], rng: np.random.Generator) -> torch.Tensor:
        """s q."""
        return scaled(parts["codes"].float(), parts["scales"], self.block).view(shape)


@dataclass(frozen=True, kw_only=True)
class Nf4(Section):
    """4 bits, at the quantiles of a normal, with a scale a block: off by at most 0.152 s, s = max |x| of the block.

    block: entries a scale; double: whether the scales are stored in 8 bits. Then an entry is off by up to
    max |s - mean| / 254 of its 256 blocks more, which may be all of a block that is small beside the others.
    """

    block: int = 64
    double: bool = False

    whole: ClassVar[bool] = True
    warm: ClassVar[str] = ""

    def __post_init__(self) -> None:
        require(self.block >= 1, f"wire.codec.block: {self.block} must be at least 1")

    def sizes(self, shape: Sequence[int], dtype: torch.dtype) -> Sizes:
        """ceil(n / 2) + 4 ceil(n / block) bytes; with `double` 1 for the 4, and 4 a 256 blocks, and 4."""
        n = math.prod(shape)
        count = blocks(n, self.block)
        codes = {"codes": (torch.uint8, (n + 1) // 2)}
        if not self.double:
            return {**codes, "scales": (torch.float32, count)}
        steps = (torch.float32, blocks(count, 256))
        return {**codes, "scale_codes": (torch.int8, count), "scale_steps": steps, "scale_means": (torch.float32, 1)}

    def encode(self, x: torch.Tensor, rng: np.random.Generator, warm: torch.Tensor | None, feedback: bool) -> Parts:
        """Two codes a byte, the first in its upper half, the nearest at the scales that travel; and these."""
        rows = blocked(x, self.block)  # [blocks, block]
        scales = rows.abs().amax(1)
        found = {"scales": scales}
        if self.double:
            mean = scales.mean().nan_to_num(0.0)  # of no block at all
            small = Int8(block=256).encode(scales - mean, rng, None, feedback)
            found = {"scale_codes": small["codes"], "scale_steps": small["scales"], "scale_means": mean[None]}
            scales = self.scales(found)
        codes = torch.bucketize(over(rows, scales), HALFWAY).flatten()[: x.numel()].to(torch.uint8)
        codes = torch.nn.functional.pad(codes, (0, x.numel() % 2))
        return {"codes": codes[::2] << 4 | codes[1::2], **found}

    def scales(self, parts: Parts) -> torch.Tensor:
        """[blocks] s."""
        if not self.double:
            return parts["scales"]
        around = scaled(parts["scale_codes"].float(), parts["scale_steps"], 256)
        return (around + parts["scale_means"]).clamp(min=0)

    def decode(self, parts: Parts, shape: Sequence[int], rng: np.random.Generator) -> torch.Tensor:
        """s c."""
        pairs = torch.stack([parts["codes"] >> 4, parts["codes"] & 15], 1)  # [bytes, 2]
        codes = pairs.flatten()[: math.prod(shape)].int()
        return scaled(NF4[codes], self.scales(parts), self.block).view(shape)


@dataclass(frozen=True, kw_only=True)
class Sparse(Section):
    """Some entries of a change; share: how many of a tensor's, at least one."""

    share: float = 0.01

    whole: ClassVar[bool] = False
    warm: ClassVar[str] = ""

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, f"wire.codec.share: {self.share} must lie in (0, 1]")

    def count(self, n: int) -> int:
        """k of n entries."""
        return min(n, max(1, math.ceil(round(self.share * n, 6))))


@dataclass(frozen=True, kw_only=True)
class TopK(Sparse):
    """The entries of largest magnitude, each with its index, of 2 bytes in a tensor of up to 65,536."""

    def sizes(self, shape: Sequence[int], dtype: torch.dtype) -> Sizes:
        """k (4 + 2) bytes, or k (4 + 4)."""
        n = math.prod(shape)
        index = ("indices", torch.uint16) if n <= SHORT else ("long_indices", torch.int32)
        return {"values": (dtype, self.count(n)), index[0]: (index[1], self.count(n))}

    def encode(self, x: torch.Tensor, rng: np.random.Generator, warm: torch.Tensor | None, feedback: bool) -> Parts:
        """Entries in rising order of their indices."""
        n = x.numel()
        chosen = x.flatten().abs().topk(self.count(n), sorted=False).indices.sort().values
        return {"values": x.flatten()[chosen], "indices" if n <= SHORT else "long_indices": chosen}

    def decode(self, parts: Parts, shape: Sequence[int], rng: np.random.Generator) -> torch.Tensor:
        """Zero elsewhere."""
        n = math.prod(shape)
        chosen = parts["indices" if n <= SHORT else "long_indices"].long()
        rising = bool((chosen[1:] > chosen[:-1]).all())
        if len(chosen) and not (rising and int(chosen[0]) >= 0 and int(chosen[-1]) < n):
            raise UnfitUpdate(f"indices that do not rise from 0 to below {n}")
        return torch.zeros(n).index_copy_(0, chosen, parts["values"].float()).view(shape)


@dataclass(frozen=True, kw_only=True)
class RandomK(Sparse):
    """Entries drawn at random from what both ends know: no index travels."""

    def sizes(self, shape: Sequence[int], dtype: torch.dtype) -> Sizes:
        """4 k bytes."""
        return {"values": (dtype, self.count(math.prod(shape)))}

    def drawn(self, n: int, rng: np.random.Generator) -> torch.Tensor:
        """[k] indices."""
        return torch.from_numpy(rng.choice(n, self.count(n), replace=False, shuffle=False) if n else np.zeros(0, int))

    def encode(self, x: torch.Tensor, rng: np.random.Generator, warm: torch.Tensor | None, feedback: bool) -> Parts:
        """Entries; times n / k unless what is left out comes again."""
        n = x.numel()
        values = x.flatten()[self.drawn(n, rng)]
        return {"values": values if feedback or n == 0 else values * (n / self.count(n))}

    def decode(self, parts: Parts, shape: Sequence[int], rng: np.random.Generator) -> torch.Tensor:
        """Zero elsewhere."""
        n = math.prod(shape)
        return torch.zeros(n).index_copy_(0, self.drawn(n, rng), parts["values"].float()).view(shape)


@dataclass(frozen=True, kw_only=True)
class LowRank(Section):
    """The product of two thin matrices; vectors, and matrices that would not shrink, travel as they are.

    rank: of it.
    """

    rank: int = 2

    whole: ClassVar[bool] = False
    warm: ClassVar[str] = "q"

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"wire.codec.rank: {self.rank} must be at least 1")

    def thin(self, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """(m, n, rank) of a tensor as a matrix [first dimension, all others]; None if it is not made smaller."""
        m, n = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, 1)
        return (m, n, self.rank) if self.rank * (m + n) < m * n else None

    def sizes(self, shape: Sequence[int], dtype: torch.dtype) -> Sizes:
        """4 rank (m + n) bytes."""
        found = self.thin(shape)
        if found is None:
            return {"values": (dtype, math.prod(shape))}
        m, n, rank = found
        return {"p": (dtype, m * rank), "q": (dtype, n * rank)}

    def encode(self, x: torch.Tensor, rng: np.random.Generator, warm: torch.Tensor | None, feedback: bool) -> Parts:
        """One power iteration; where the change is zero, P is any orthonormal matrix and Q zero."""
        found = self.thin(x.shape)
        if found is None:
            return {"values": x.flatten()}
        m, n, rank = found
        x = x.reshape(m, n)
        if warm is None or warm.numel() != n * rank or not bool(warm.any()):
            warm = torch.from_numpy(rng.standard_normal(n * rank, dtype=np.float32))
        start = warm.view(n, rank).double()  # in float32 columns that are nearly parallel lose what tells them apart
        p = torch.linalg.qr(torch.cat([part.double() @ start for part in x.split(ROWS)])).Q.float()  # [m, rank]
        return {"p": p.flatten(), "q": (x.T @ p).flatten()}

    def decode(self, parts: Parts, shape: Sequence[int], rng: np.random.Generator) -> torch.Tensor:
        """P Q^T, column by column."""
        found = self.thin(shape)
        if found is None:
            return parts["values"].float().view(shape)
        m, n, rank = found
        p, q = parts["p"].float().view(m, rank), parts["q"].float().view(n, rank)
        total = torch.zeros(m, n)
        for column in range(rank):
            total += p[:, column, None] * q[:, column]
        return total.view(shape)


CODECS: dict[str, type] = {
    "bf16": Bf16, "int8": Int8, "lowrank": LowRank, "nf4": Nf4, "randomk": RandomK, "topk": TopK,
}  # fmt: skip


def make_codec(settings: Mapping[str, Any]) -> Codec:
    """The codec that `wire.codec` describes, its settings checked. Raises UserError."""
    name = settings.get("name")
    if name not in CODECS:
        raise UserError(f"wire.codec.name: no codec {name!r}; there are {', '.join(CODECS)}")
    fields = {key: value for key, value in settings.items() if key != "name"}
    codec: Codec = build(CODECS[name], fields, "wire.codec")
    return codec


def blocks(n: int, block: int) -> int:
    """How many blocks hold n entries."""
    return -(-n // block)


def blocked(x: torch.Tensor, block: int) -> torch.Tensor:
    """[blocks, block] the entries of x, zeros at the end."""
    return torch.nn.functional.pad(x.flatten(), (0, -x.numel() % block)).view(-1, block)


def over(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Each row over its scale; 0 where that is 0."""
    return torch.where(scales[:, None] > 0, rows / scales[:, None], 0.0)


def scaled(values: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """[n] each value times the scale of its block."""
    return (blocked(values, block) * scales[:, None]).flatten()[: values.numel()]
