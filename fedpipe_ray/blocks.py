"""What is added to the base model, as frozen factors by round; the base itself is shared and perhaps quantized (ours).

Methods whose edges are to fold an update into W0 keep it here instead: one block a round, under `kept.ROUND.KEY`, so
that an edge which holds the older ones is sent and charged the new one alone. On an edge they act as one frozen
adapter beside the trained one. Where the blocks of a module have a higher rank together than any matrix of its shape,
one block without loss takes their place, and is sent again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from . import lora
from .folding import of_b
from .message import KEPT, Message
from .methods.base import LoraWeights
from .model import Base
from .probe import ranks_of
from .stacking import Pair, concatenate, low_rank

Tensors = Mapping[str, torch.Tensor]


def joined(state: Message) -> dict[str, torch.Tensor]:
    """The factors of all blocks side by side, by PEFT key: b [m, R], a [R, n]; none of a module without a block."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in sorted(state.kept.items(), key=lambda item: item[0]):
        found.setdefault(name.partition(".")[2], []).append(tensor)
    return {name: torch.cat(parts, dim=0 if ".lora_A." in name else 1) for name, parts in found.items()}


def added(state: Message, round: int, pairs: Mapping[str, Pair]) -> dict[str, torch.Tensor]:
    """The state's tensors with a block for `round` more: pairs in float64 by the key of A, stored in float32.

    A pair of rank 0 adds nothing.
    """
    tensors = dict(state.tensors)
    for name_a, (b, a) in pairs.items():
        old = [name for name in tensors if name.startswith(KEPT) and name.endswith(f".{name_a}")]
        if sum(len(tensors[name]) for name in old) + len(a) > (whole := min(len(b), a.shape[1])):
            before = [(tensors[of_b(name)], tensors[name]) for name in old]
            b, a = lossless(concatenate([*before, (b, a)], [1.0] * (len(before) + 1)), whole)
            for name in old:
                del tensors[name], tensors[of_b(name)]
        if len(a):
            own = {name_a: a, of_b(name_a): b}
            tensors |= {f"{KEPT}{round:04d}.{name}": t.to(torch.float32).contiguous() for name, t in own.items()}
    return tensors


def lossless(pair: Pair, rank: int) -> Pair:
    """The same product in as many triplets as it has, at most `rank`."""
    best = low_rank(*pair, rank)
    found = int((best.singular > 0).sum())
    return best.b[:, :found], best.a[:found]


def attach(base: Base, spec: lora.LoraSpec, state: Message) -> Any:
    """The PeftModel of `spec` with the blocks of a state or an order frozen beside it."""
    frozen = joined(state)
    whole = dataclasses.replace(spec, dropout=0.0)  # as a part of the base would act
    model = lora.attach(base, spec, lora.LoraSpec.uneven(whole, ranks_of(frozen)) if frozen else None)
    if frozen:
        lora.load(model, frozen, frozen=True)
    return model


def weights(spec: lora.LoraSpec, tensors: Tensors, state: Message) -> LoraWeights:
    """One plain adapter that computes what `tensors`, an adapter and a head, and the blocks of a state do together."""
    frozen, own = joined(state), dict(tensors)
    for name, tensor in frozen.items():
        own[name] = torch.cat([own[name], tensor], dim=0 if ".lora_A." in name else 1) if name in own else tensor
    return LoraWeights(lora.LoraSpec.uneven(spec, ranks_of(own)), own)
