"""A decoder cut in two, an adapter and the rest, and the rest made shallower by leaving layers out.

Offsite-Tuning (Xiao, Lin, Han 2023, arXiv 2302.04870) and FedBiOT (arXiv 2406.17706): of N layers
k = round(N (1 - beta)) stay, those numbered floor(i (N - 1) / (k - 1)), so that the first and the last are among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .errors import UserError

Split = Literal["last", "ends"]


@dataclass(frozen=True)
class Cut:
    """Numbers of layers, each ascending: the adapter's, those of the rest (the teacher), and of these the kept ones."""

    adapter: tuple[int, ...]
    rest: tuple[int, ...]
    emulator: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """Layer i of the small model is this one of the whole."""
        return tuple(sorted(self.adapter + self.emulator))

    @property
    def dropped(self) -> tuple[int, ...]:
        """Those that no edge has."""
        return tuple(layer for layer in self.rest if layer not in self.emulator)

    @property
    def after(self) -> tuple[int, int]:
        """The layer that follows the rest, by its number in the whole and in the small model: its input is compared."""
        return self.rest[-1] + 1, self.kept.index(self.rest[-1] + 1)


def cut(layers: int, a: int, beta: float, split: Split = "last") -> Cut:
    """The last `a` layers as adapter, or with `ends` the first and the last a / 2.

    Raises UserError if that leaves fewer than two layers, before or after a share of `beta` was left out.
    """
    if a >= layers:
        most = f"at most {layers - 2}" if layers > 2 else "use a deeper model"
        raise UserError(f"method.a: {a} adapter layers of the model's {layers} leave none for an emulator; {most}")
    first = a // 2 if split == "ends" else 0
    rest = tuple(range(first, layers - (a - first)))
    count = round(len(rest) * (1 - beta))
    if count < 2:
        most = f"lower it to at most {math.floor(100 - 150 / len(rest)) / 100:g}"
        raise UserError(
            f"method.beta: {beta:g} leaves {count} of the {len(rest)} layers beside the adapter, and an emulator needs "
            f"two; {most if len(rest) > 1 else 'use a deeper model'}, or lower method.a: {a}"
        )
    emulator = tuple(rest[i * (len(rest) - 1) // (count - 1)] for i in range(count))
    adapter = tuple(layer for layer in range(layers) if layer not in rest)
    return Cut(adapter, rest, emulator)


def blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """(name, list) of the model's decoder layers. Raises UserError if it has no such list."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise UserError(f"method.name: {type(model).__name__} has no list of {count} layers, which fedbiot cuts in two")


def keep(model: Any, kept: Sequence[int]) -> None:
    """Leaves only these layers in the model, numbered anew."""
    name, old = blocks(model)
    layers = nn.ModuleList(old[number] for number in kept)
    module: Any
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # of its keys and values in generation
                module.layer_idx = number
    model.set_submodule(name, layers)
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(kept)
    if kinds:
        config.layer_types = [kinds[number] for number in kept]


def renumbered(name: str, stem: str, numbers: Sequence[int]) -> str:
    """A parameter's or adapter's name with layer i of the list `stem` called numbers[i]; others as they are."""
    before, found, after = name.partition(f"{stem}.")
    number, _, inside = after.partition(".")
    return f"{before}{stem}.{numbers[int(number)]}.{inside}" if found and number.isdigit() else name


def client_parameters(model: Any, cut: Cut) -> int:
    """Parameters of the model an edge holds: all of `model` (also on the meta device) but the dropped layers."""
    _, layers = blocks(model)
    dropped = sum(p.numel() for number in cut.dropped for p in layers[number].parameters())
    return int(sum(p.numel() for p in model.parameters())) - dropped
