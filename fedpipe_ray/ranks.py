"""Ranks by edge: each trains the leading triplets of one adapter, at the scale of the whole (ours).

The scale is that of the global adapter on server and edges, alpha / rank or rsLoRA's: were it alpha / r_k on an edge,
its product would mean something else there than where it is averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from . import lora
from .errors import UserError
from .message import Message
from .partial import misfit
from .section import require
from .train import summed_loss

if TYPE_CHECKING:
    from .site import Site

Tensors = Mapping[str, torch.Tensor]


def require_ranks(ranks: Mapping[str, int], rank: int) -> None:
    """Raises ValueError for a rank that no edge can have."""
    for edge, own in ranks.items():
        require(
            1 <= own <= rank,
            f"method.ranks.{edge}: {own} must lie between 1 and method.rank: {rank}; lower it, or raise method.rank",
        )


def check(ranks: Mapping[str, int], site: Site, spec: lora.LoraSpec) -> None:
    """Raises UserError for ranks of edges that are not there, and for targets that have no product of two matrices."""
    odd = [edge for edge in ranks if edge not in site.run.fleet.edges]
    if odd:
        raise UserError(
            f"method.ranks: {ranks[odd[0]]} for edge {odd[0]}, which is not in the fleet; "
            f"there are {', '.join(site.run.fleet.edges)}"
        )
    check_linear(site, spec)


def check_linear(site: Site, spec: lora.LoraSpec, instead: str = "use method.name: lora") -> None:
    """Raises UserError for targets whose factors are no two matrices that are multiplied; loads no weights.

    instead: the other remedy.
    """
    found = lora.parameters(site.skeleton(spec)).items()
    odd = [n for n, p in found if ".lora_embedding_" in n or (".lora_A." in n and p.ndim != 2)]
    if odd:
        raise UserError(
            f"method.targets: {lora.module_of(odd[0])} is no linear layer, and products of linear layers alone are "
            f"joined; leave it out, or {instead}"
        )


def part(tensors: Tensors, rank: int) -> dict[str, torch.Tensor]:
    """An adapter's leading triplets, and a classifier's head whole; views."""
    cut = {".lora_A.": lambda t: t[:rank], ".lora_B.": lambda t: t[:, :rank]}
    kinds = {name: next((kind for kind in cut if kind in name), None) for name in tensors}
    return {name: cut[kind](tensors[name]) if kind else tensors[name] for name, kind in kinds.items()}


def orders(state: Message, ranks: Mapping[str, int]) -> dict[str, Message]:
    """By edge the leading part of the state's adapter at its rank; edges of one rank get the same tensors."""
    parts = {rank: Message(part(state.tensors, rank)) for rank in dict.fromkeys(ranks.values())}
    return {edge: parts[rank] for edge, rank in ranks.items()}


def rank_of(tensors: Tensors) -> int:
    """The rank of an adapter that has the same one everywhere."""
    return next(len(tensor) for name, tensor in tensors.items() if ".lora_A." in name)


def trained(
    tensors: Tensors, site: Site, spec: lora.LoraSpec, rng: np.random.Generator,
    penalty: Callable[[Mapping[str, torch.nn.Parameter]], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The adapter of an order, of whatever rank, after this round's local steps.

    penalty: of the parameters by PEFT key, added to the loss.
    """
    model = lora.attach(site.base, spec.at(rank_of(tensors)))
    lora.load(model, tensors)
    now = lora.parameters(model)
    site.train(model, rng, summed_loss, None if penalty is None else lambda: penalty(now))
    return lora.read(model)


def unfit(message: Message, like: Tensors) -> str | None:
    """Why an update is not an adapter such as `like` at its rank or a lower one; None if it is."""
    if message.tensors.keys() != like.keys():
        odd = sorted(message.tensors.keys() ^ like.keys())
        return f"its update differs from the state in {len(odd)} tensors, the first {odd[0]}"
    return misfit(message, like)
