"""Parts of one global LoRA adapter: what an order carries, whether an update fits, how unequal updates join.

The paper says "partial" aggregation and no more; all of this is ours. Factors stand under their PEFT keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch

from . import lora, stacking
from .message import Message
from .methods.base import is_finite

TAIL = "tail."
Join = Literal["stack", "truncate", "pad", "increment"]


def part_of(
    state: Mapping[str, torch.Tensor], ranks: Mapping[str, int], join: Join, fresh: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of an order: heads, factors to train by their key, frozen ones under `tail.`.

    state: the global adapter, heads included; ranks: of the modules to train. join: with `stack` and `increment` all
    else of the adapter acts frozen; `increment` trains the leading triplets of `fresh` beside it.
    """
    tensors = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    for name_a in (name for name in state if ".lora_A." in name):
        name_b, rank = name_a.replace(".lora_A.", ".lora_B."), ranks.get(lora.module_of(name_a), 0)
        b, a = state[name_b], state[name_a]  # [d_out, R], [R, d_in]
        own, rest = stacking.leading(b, a, rank), stacking.tail(b, a, rank)
        if join == "increment":
            own, rest = stacking.leading(fresh[name_b], fresh[name_a], rank), (b, a)
        if rank:
            tensors[name_b], tensors[name_a] = own
        if join in ("stack", "increment") and rest[0].any():
            tensors[TAIL + name_b], tensors[TAIL + name_a] = rest
    return tensors


def whole_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The factors that act together: what an order has to train, and its tail behind it."""
    whole = {name: tensor for name, tensor in tensors.items() if ".lora_" in name and not name.startswith(TAIL)}
    for name, rest in ((n.removeprefix(TAIL), t) for n, t in tensors.items() if n.startswith(TAIL)):
        along = 0 if ".lora_A." in name else 1
        whole[name] = torch.cat([whole[name], rest], dim=along) if name in whole else rest
    return whole


def misfit(message: Message, state: Mapping[str, torch.Tensor]) -> str | None:
    """Why an update cannot be joined with the global adapter: it is not a part of it, of lower rank; None if it can."""
    heads = {name for name in state if ".lora_" not in name}
    strange = sorted((message.tensors.keys() - state.keys()) | (heads - message.tensors.keys()))
    if strange:
        return f"its update and the global adapter differ in {len(strange)} tensors, the first {strange[0]}"
    for name, tensor in message.tensors.items():
        along = 0 if ".lora_A." in name else 1
        other = name.replace(".lora_A.", ".lora_B.") if along == 0 else name.replace(".lora_B.", ".lora_A.")
        if ".lora_" not in name:
            fits = tensor.shape == state[name].shape
        else:
            pair = message.tensors.get(other)
            fits = (
                pair is not None and tensor.ndim == 2 and tensor.shape[1 - along] == state[name].shape[1 - along]
                and tensor.shape[along] == pair.shape[1 - along] <= state[name].shape[along]
            )  # fmt: skip
        if not fits:
            return f"its update has {name} in shape {list(tensor.shape)}, the global adapter {list(state[name].shape)}"
        if not is_finite(tensor):
            return f"its update has NaN or infinity in {name}"
    return None


def joined(
    state: Mapping[str, torch.Tensor], updates: Mapping[str, Message], samples: Mapping[str, float], *,
    join: Join, weigh: stacking.Share, rank: int,
) -> tuple[dict[str, torch.Tensor], float]:  # fmt: skip
    """(the next global tensors, ||applied - exact|| / ||exact|| over all modules), from the edges' trained factors."""
    tensors = dict(state)
    lost = whole = 0.0
    for name_a in (name for name in state if ".lora_A." in name):
        name_b = name_a.replace(".lora_A.", ".lora_B.")
        trained = [edge for edge, message in updates.items() if name_a in message.tensors]
        if not trained:
            continue
        shares = stacking.share_of(samples, weigh, trained)
        pairs = [(updates[edge].tensors[name_b], updates[edge].tensors[name_a]) for edge in trained]
        found = (state[name_b], state[name_a])  # [d_out, R], [R, d_in]
        weights = [shares[edge] for edge in trained]
        if join in ("pad", "truncate") and sum(weights) < 1 - 1e-9:  # of a mean, no change is what there was
            pairs, weights = [*pairs, found], [*weights, 1 - sum(weights)]
        if join == "pad":
            tensors[name_b], tensors[name_a] = stacking.pad(pairs, weights, rank)
            exact = stacking.concatenate(pairs, weights)
            size = stacking.frobenius(*exact)
            gap = stacking.residual_norm([(tensors[name_b], tensors[name_a])], [exact]) * size if size else 0.0
        else:
            if join == "stack":
                changes = [(pair, stacking.leading(*found, len(pair[1]))) for pair in pairs]
                cut = stacking.stack(found, changes, weights, rank)
            elif join == "increment":
                cut = stacking.increment(found, pairs, weights, rank)
            else:
                cut = stacking.truncate(pairs, weights, rank, fill=found[1])
            tensors[name_b], tensors[name_a] = cut.b, cut.a
            gap, size = cut.residual, math.hypot(float(cut.singular.norm()), cut.residual)
        lost, whole = math.hypot(lost, gap), math.hypot(whole, size)
    for name in (name for name in state if ".lora_" not in name):  # a classifier's head
        shares = stacking.share_of(samples, weigh)
        tensors[name] = sum((shares[e] * message.tensors[name] for e, message in updates.items()), torch.zeros(()))
    return tensors, lost / whole if whole else 0.0
