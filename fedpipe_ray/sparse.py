"""Sparse changes of weights: entries at places that the seed draws, trained in a model; the nearest LoRA adapter.

W0 x + S x, S [d_out, d_in] zero but at `places`. PEFT's LoRA layer stands around each weight, with S in place of its
two factors, so that a quantized weight is a base too and the model's own is never written. S is made dense one layer at
a time, forward and backward, and let go: what is kept of it are its entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from . import lora, stacking
from .methods.base import LoraWeights
from .model import Base
from .randomness import rng_for

if TYPE_CHECKING:
    from .site import Site

DENSE = 128  # rows or columns up to which a dense SVD costs next to nothing
PART = ".sparse"  # how the key of a module's entries ends; the module's name stands before it


@dataclass(frozen=True)
class Places:
    """Where a module's weight [d_out, d_in] changes: row-major positions, rising."""

    size: tuple[int, int]
    index: torch.Tensor  # [k], int64


def places(model: Any, density: float, seed: int) -> dict[str, Places]:
    """By the name of every adapted module, a share `density` of its weight, at least one entry, uniform; by seed alone.

    model: a PeftModel, also on the meta device.
    """
    found = {}
    for name, layer in lora.layers(model):
        size = layer.out_features, layer.in_features
        whole = math.prod(size)
        rng = rng_for(seed, 0, f"sparse/{name}")
        drawn = rng.choice(whole, max(1, round(density * whole)), replace=False, shuffle=False)
        found[name] = Places(size, torch.from_numpy(np.sort(drawn)))
    return found


class Sparse(nn.Module):
    """x -> S x; the entries of S are trained."""

    index: torch.Tensor

    def __init__(self, at: Places, device: torch.device) -> None:
        super().__init__()
        self.size = at.size
        self.weight = nn.Parameter(torch.zeros(1, len(at.index), device=device))  # [1, k]
        self.register_buffer("index", at.index.to(device), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., d_in]; returns [..., d_out]."""
        if not torch.is_grad_enabled():
            return self._product(x, self.weight)
        found: torch.Tensor = checkpoint(
            self._product, x, self.weight, use_reentrant=False, preserve_rng_state=False
        )  # or every layer's dense S would be held until the backward pass
        return found

    def _product(self, x: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        dense = entries.new_zeros(math.prod(self.size)).index_put((self.index,), entries[0])
        return functional.linear(x, dense.view(self.size).to(x.dtype))


def attach(base: Base, spec: lora.LoraSpec, where: Mapping[str, Places]) -> Any:
    """The PeftModel with a trainable S on the targets of `spec`, made once and kept."""

    def change(name: str, layer: Any) -> None:
        layer.lora_A["default"] = Sparse(where[name], layer.lora_A["default"].weight.device)
        layer.lora_B["default"], layer.lora_dropout["default"] = nn.Identity(), nn.Identity()
        layer.scaling["default"] = 1.0

    return lora.attach_changed(base, spec, "sparse", change)


def load(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copies entries and heads into the model. Raises ValueError unless names and shapes match."""
    own = {key_of(name.removesuffix(PART)) if name.endswith(PART) else name: t for name, t in tensors.items()}
    lora.load(model, {name: t.view(1, -1) if ".lora_" in name else t for name, t in own.items()})


def read(model: Any) -> dict[str, torch.Tensor]:
    """Copies of entries [k] and heads."""
    found = lora.read(model).items()
    return {lora.module_of(n) + PART if ".lora_" in n else n: t.view(-1) if ".lora_" in n else t for n, t in found}


def key_of(module: str) -> str:
    """Where the model has a module's entries."""
    return f"base_model.model.{module}.lora_A.weight"


def nearest(at: Places, entries: torch.Tensor, rank: int, fill: torch.Tensor) -> stacking.Truncated:
    """The product of `rank` nearest to S, float64, with what it loses; free rows of a are fill's [any, d_in].

    Lanczos on the rows and columns that have entries; a dense SVD of few of them, whose singular values are often equal
    (AdamW's first step moves every entry by the rate): ARPACK then goes on from random vectors of its own. The residual
    is exact: ||S||^2 - sum of the squares kept.
    """
    values, index = entries.double().numpy(), at.index.numpy()
    (rows, i), (columns, j) = (np.unique(x, return_inverse=True) for x in np.divmod(index, at.size[1]))
    sides = len(rows), len(columns)
    matrix = scipy.sparse.csr_array((values, (i, j)), shape=sides)
    if not values.any():
        u, s, vt = np.zeros((sides[0], 1)), np.zeros(1), np.zeros((1, sides[1]))
    elif min(sides) <= max(4 * rank, DENSE):
        u, s, vt = scipy.linalg.svd(matrix.toarray(), full_matrices=False)
    else:  # ARPACK's own start is random; one of ones is orthogonal to the best directions where rows have the sum 0
        u, s, vt = scipy.sparse.linalg.svds(matrix, k=rank, v0=np.random.default_rng(0).standard_normal(min(sides)))
    order = np.argsort(-s, kind="stable")[:rank]
    b, a = np.zeros((at.size[0], len(order))), np.zeros((len(order), at.size[1]))
    b[rows], a[:, columns] = u[:, order] * s[order], vt[order]
    cut = stacking.low_rank(torch.from_numpy(b), torch.from_numpy(a), rank, fill=fill)
    lost = math.sqrt(max(0.0, float(values @ values) - float(cut.singular.square().sum())))
    return stacking.Truncated(cut.b, cut.a, cut.singular, lost)


def adapter(
    tensors: Mapping[str, torch.Tensor], where: Mapping[str, Places], spec: lora.LoraSpec, seed: int
) -> tuple[dict[str, torch.Tensor], float]:
    """(the LoRA adapter nearest to the entries in `tensors`, and heads; ||lost|| / ||S|| over all modules).

    A has orthonormal rows, so that B is the change's rows divided by the scale.
    """
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(PART)}
    draw = torch.Generator().manual_seed(seed)
    lost = whole = 0.0
    for module, at in where.items():
        fill = torch.randn(spec.rank, at.size[1], generator=draw)
        entries = tensors[module + PART]
        cut = nearest(at, entries, spec.rank, fill)
        stem = f"base_model.model.{module}"
        found[f"{stem}.lora_A.weight"], found[f"{stem}.lora_B.weight"] = cut.a.float(), (cut.b / spec.scale).float()
        lost, whole = math.hypot(lost, cut.residual), math.hypot(whole, float(entries.double().norm()))
    return found, lost / whole if whole else 0.0


@dataclass(frozen=True)
class SparseWeights(LoraWeights):
    """A sparse change of the weights, as trained; its export is the nearest LoRA adapter."""

    where: Mapping[str, Places]
    seed: int

    def on(self, base: Base) -> Any:
        """The model with the change itself."""
        model = attach(base, self.spec, self.where)
        load(model, self.tensors)
        return model

    def nearest(self) -> LoraWeights:
        """What of it an adapter can hold."""
        return LoraWeights(self.spec, adapter(self.tensors, self.where, self.spec, self.seed)[0])

    def save(self, folder: Path, server: Site) -> None:
        """A PEFT adapter of the spec's rank."""
        self.nearest().save(folder, server)

    def merged(self, base: Base) -> Any:
        """The base with that adapter added to its weights."""
        return self.nearest().merged(base)
