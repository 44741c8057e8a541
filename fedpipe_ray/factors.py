"""LoRA rules that train or share a part of the factors: which part, nested ranks, and the mean that is exact.

Factors stand under their PEFT keys. Where one factor is common to all edges, the product is linear in the other, so
that averaging it averages the products.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from . import lora
from .methods.base import arrivals, unlike
from .report import Lost, Report

Tensors = Mapping[str, torch.Tensor]


def factor(name: str) -> str:
    """`A` [rank, d_in] or `B` [d_out, rank] by PEFT key; "" for all else: a classifier's head, DoRA's magnitudes."""
    return "A" if ".lora_A." in name else "B" if ".lora_B." in name else ""


def heads(tensors: Tensors) -> dict[str, torch.Tensor]:
    """A classifier's own layers, which are trained whole."""
    return {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}


def without(tensors: Tensors, which: str) -> dict[str, torch.Tensor]:
    """All but factor `A` or `B`."""
    return {name: tensor for name, tensor in tensors.items() if factor(name) != which}


ALONG = {"A": 0, "B": 1}  # the side of a factor that is as long as its rank


def narrow(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """A view of the first `rank` rows of an A, columns of a B; itself if that is all of it, or it is no factor."""
    along = ALONG.get(factor(name))
    return tensor if along is None or rank >= tensor.shape[along] else tensor.narrow(along, 0, rank)


def beyond(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """A view of the other rows or columns, perhaps none."""
    along = ALONG.get(factor(name))
    return tensor[:0] if along is None else tensor.narrow(along, rank, tensor.shape[along] - rank)


def nested(tensors: Tensors, rank: int) -> dict[str, torch.Tensor]:
    """The adapter's first `rank` rows and columns; heads as they are."""
    return {name: narrow(name, tensor, rank) for name, tensor in tensors.items()}


@contextmanager
def training_only(model: Any, names: Collection[str]) -> Iterator[None]:
    """Within it, of the model's trainable parameters only those with these PEFT keys are trained."""
    rest = [parameter for name, parameter in lora.parameters(model).items() if name not in names]
    for parameter in rest:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in rest:
            parameter.requires_grad_(True)


def exact_mean(
    state: Tensors, reports: Iterable[Report | Lost], rank_of: Callable[[str], int]
) -> dict[str, torch.Tensor] | None:
    """T + sum_k p_k (T_k - T) of every tensor T; p_k = weight / their sum. None if no report is usable.

    Edge k trained the first rank_of(k) rows of an A, or columns of a B; the others count as they were. So with equal
    ranks it is the weighted mean. Updates are folded in one at a time, in the order of the orders.
    """
    sums = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    total, weight = 0.0, dict[int, float]()
    for report in reports:
        rank = rank_of(report.edge)
        for one, message in arrivals([report], partial(unlike, like=nested(state, rank))):
            total, weight[rank] = total + one.weight, weight.get(rank, 0.0) + one.weight
            for name, whole in sums.items():
                narrow(name, whole, rank).add_(message.tensors[name], alpha=one.weight)
            del message  # before the next one is fetched
    if total == 0:
        return None
    for name, whole in sums.items():
        whole.div_(total)
        for rank, share in weight.items():
            beyond(name, whole, rank).add_(beyond(name, state[name], rank), alpha=share / total)
    return sums
