"""What edges hold of what they were sent to keep: by content, so that it is neither sent nor counted again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .message import KEPT, Message
from .report import Lost, Report


class Held:
    """Digests of kept tensors by edge; `edges` is as of the last finished round, and goes into the checkpoint.

    An edge holds what came with an order that it answered, usable or not, in time or late; a lost one gets it again.
    """

    def __init__(self, edges: Mapping[str, frozenset[str]]) -> None:
        self.edges: Mapping[str, frozenset[str]] = edges
        self._known = WeakTensorKeyDictionary()  # tensor -> digest: methods give the same tensor round after round

    def mark(self, orders: Mapping[str, Message]) -> dict[str, Message]:
        """The orders, each with the names of what its edge has already."""
        return {edge: self._marked(order, self.edges.get(edge, frozenset())) for edge, order in orders.items()}

    def note(self, orders: Mapping[str, Message], outcomes: Mapping[str, Report | Lost]) -> None:
        """Adds what the edges that answered were sent."""
        found = dict(self.edges)
        for edge, order in orders.items():
            outcome, names = outcomes.get(edge), [name for name in order.tensors if name.startswith(KEPT)]
            lost = outcome is None or (isinstance(outcome, Lost) and outcome.status == "lost")
            if names and not lost:
                found[edge] = frozenset(self._digest(order.tensors[name]) for name in names)
        self.edges = found

    def _marked(self, order: Message, has: frozenset[str]) -> Message:
        names = (name for name in order.tensors if has and name.startswith(KEPT))
        held = frozenset(name for name in names if self._digest(order.tensors[name]) in has)
        return dataclasses.replace(order, held=held) if held else order

    def _digest(self, tensor: torch.Tensor) -> str:
        """16 hex digits of dtype, shape and bytes."""
        if tensor not in self._known:
            digest = blake2b(f"{tensor.dtype} {list(tensor.shape)} ".encode(), digest_size=8)
            digest.update(tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)
            self._known[tensor] = digest.hexdigest()
        return str(self._known[tensor])


def grouped(edges: Mapping[str, frozenset[str]]) -> list[dict[str, list[str]]]:
    """For a checkpoint: each set of digests once, with the edges that hold it."""
    sets: dict[frozenset[str], list[str]] = {}
    for edge, digests in edges.items():
        sets.setdefault(digests, []).append(edge)
    return [{"edges": names, "digests": sorted(digests)} for digests, names in sets.items()]


def ungrouped(groups: list[dict[str, list[str]]]) -> dict[str, frozenset[str]]:
    """The inverse of `grouped`."""
    return {edge: frozenset(group["digests"]) for group in groups for edge in group["edges"]}
