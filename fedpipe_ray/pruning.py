"""Structured width pruning of a frozen model: attention heads and feed-forward channels; the hidden size is kept.

A layer has two kinds of units: `heads` (with grouped-query attention a key-value head and its query heads, so that the
groups stay whole) and `channels` of the feed-forward part. A mask [layers, heads + channels] says which are kept; a
pruned model has the rows and columns of the kept ones alone, and computes exactly what the whole model does with the
others' output set to zero. Weights that are not cut are shared with the whole model, not copied. Adapters shrink on the
cut side: B of what feeds a unit, A of what reads it.

Known are layers with the parts named in LAYOUTS, all alike. Not supported: mixtures of experts, fused projections other
than GPT-2's, norms across heads, weights in 4 or 8 bits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from . import lora
from .errors import UserError

if TYPE_CHECKING:
    from .site import Site

Tensors = Mapping[str, torch.Tensor]
Sides = Mapping[str, tuple[int, torch.Tensor]]  # PEFT key -> (dimension that is cut, its kept indices)

COUNTS = (
    "num_heads",
    "n_heads",
    "num_attention_heads",
    "split_size",
    "all_head_size",
)  # of an attention, with its heads


@dataclass(frozen=True)
class Layout:
    """Names inside a layer. query, key, value (one fused name: all three in turn) feed the heads, out reads them."""

    feed: tuple[str, ...]
    out: str
    wide: tuple[str, ...]
    narrow: str


def _separate(attention: str, feed: tuple[str, str, str], out: str, wide: tuple[str, ...], narrow: str) -> Layout:
    return Layout(tuple(f"{attention}.{name}" for name in feed), out, wide, narrow)


QKV = ("q_proj", "k_proj", "v_proj")
LAYOUTS = {
    "Llama, Mistral, Qwen 2 and 3, Gemma": _separate(
        "self_attn", QKV, "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"
    ),
    "OPT": _separate("self_attn", QKV, "self_attn.out_proj", ("fc1",), "fc2"),
    "Phi": _separate("self_attn", QKV, "self_attn.dense", ("mlp.fc1",), "mlp.fc2"),
    "GPT-2": Layout(("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj"),
    "BERT, RoBERTa": _separate(
        "attention.self", ("query", "key", "value"), "attention.output.dense", ("intermediate.dense",), "output.dense"
    ),
    "DistilBERT": _separate(
        "attention", ("q_lin", "k_lin", "v_lin"), "attention.out_lin", ("ffn.lin1",), "ffn.lin2"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """A weight that is cut on one side, `out` or `in`. index: [units, entries], what each unit owns there."""

    module: str
    layer: int
    kind: str
    side: str
    index: torch.Tensor


@dataclass(frozen=True)
class Structure:
    """Where a model can be cut. heads, channels: units a layer; attentions: names of the layers' attention modules."""

    layers: int
    heads: int
    channels: int
    cuts: tuple[Cut, ...]
    attentions: tuple[str, ...]

    def kept(self, rho: float, scores: torch.Tensor) -> torch.Tensor:
        """[layers, heads + channels] bool: in each layer and kind the (1 - rho) units of the highest score, >= 1."""
        parts = [
            top(scores[:, start : start + count], keep)
            for start, count, keep in zip((0, self.heads), (self.heads, self.channels), self.widths(rho), strict=True)
        ]
        return torch.cat(parts, 1)

    def widths(self, rho: float) -> tuple[int, int]:
        """(heads, channels) that a rate leaves of each layer: the nearest whole numbers, at least one."""
        heads, channels = (max(1, math.floor((1 - rho) * count + 0.5)) for count in (self.heads, self.channels))
        return heads, channels

    def of(self, cut: Cut, mask: torch.Tensor) -> torch.Tensor | None:
        """[entries] what a mask keeps of a cut weight's side, ascending; None if that is all of it."""
        units = mask[cut.layer, : self.heads] if cut.kind == "heads" else mask[cut.layer, self.heads :]
        return None if bool(units.all()) else cut.index[units].flatten().sort().values


def top(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """[layers, units] bool: the `keep` highest of each row, of equal ones the first."""
    chosen = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :keep]
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, chosen, True)


def pack(mask: torch.Tensor) -> torch.Tensor:
    """A mask as bits, uint8, to be sent."""
    return torch.from_numpy(np.packbits(mask.numpy().astype(bool)))


def unpack(bits: torch.Tensor, structure: Structure) -> torch.Tensor:
    """The mask of `pack`."""
    shape = structure.layers, structure.heads + structure.channels
    flat = np.unpackbits(bits.numpy(), count=shape[0] * shape[1])
    return torch.from_numpy(flat.astype(bool)).view(shape)


def structure_of(model: Any) -> Structure:
    """Where `model`, real or on the meta device, can be cut. Raises UserError for one that cannot."""
    names = dict(model.named_modules())
    for layout in LAYOUTS.values():
        parts = (*layout.feed, layout.out, *layout.wide, layout.narrow)
        first = f".{layout.feed[0]}"
        layers = [name.removesuffix(first) for name in names if name.endswith(first)]
        layers = [layer for layer in layers if all(f"{layer}.{part}" in names for part in parts)]
        if layers:
            return _structure(model, layout, layers)
    raise UserError(
        f"jcpba cannot prune {type(model).__name__}: its layers are none of those of {', '.join(LAYOUTS)}; name "
        "another model, or use method.name: lora"
    )


def _structure(model: Any, layout: Layout, layers: list[str]) -> Structure:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    queries = int(config.num_attention_heads)
    heads = int(getattr(config, "num_key_value_heads", None) or queries)
    attention = layout.feed[0].rpartition(".")[0]
    sizes = {
        tuple(_sizes(model.get_submodule(f"{layer}.{p}")) for p in (layout.out, layout.narrow)) for layer in layers
    }
    ((_, inner), (_, channels)) = sizes.pop()
    fault = "its layers differ in width" if sizes else _fault(model, layers, attention, inner // queries)
    if len(layers) != config.num_hidden_layers:
        fault = f"{config.num_hidden_layers - len(layers)} of its {config.num_hidden_layers} layers are of another kind"
    if fault:
        raise UserError(f"jcpba cannot prune {type(model).__name__}: {fault}; use method.name: lora")
    rows = torch.arange(inner).view(heads, -1)  # [units, entries] of the query heads
    fewer = torch.arange(heads * (inner // queries)).view(heads, -1)  # of keys and values
    every = torch.arange(channels).view(channels, 1)
    fused = torch.cat([rows, inner + rows, 2 * inner + rows], 1)
    cuts = []
    for number, layer in enumerate(layers):
        feed = [fused] if len(layout.feed) == 1 else [rows, fewer, fewer]
        cuts += [
            *(Cut(f"{layer}.{n}", number, "heads", "out", at) for n, at in zip(layout.feed, feed, strict=True)),
            Cut(f"{layer}.{layout.out}", number, "heads", "in", rows),
            *(Cut(f"{layer}.{name}", number, "channels", "out", every) for name in layout.wide),
            Cut(f"{layer}.{layout.narrow}", number, "channels", "in", every),
        ]
    return Structure(len(layers), heads, channels, tuple(cuts), tuple(f"{layer}.{attention}" for layer in layers))


def _sizes(linear: Any) -> tuple[int, int]:
    """(out, in) of a Linear or of GPT-2's Conv1D."""
    rows, columns = linear.weight.shape
    return (columns, rows) if type(linear).__name__ == "Conv1D" else (rows, columns)


def _fault(model: Any, layers: list[str], attention: str, width: int) -> str | None:
    """Why an attention cannot lose heads: it has a parameter across them."""
    for name, parameter in model.get_submodule(f"{layers[0]}.{attention}").named_parameters():
        own = name.rpartition(".")[0].rpartition(".")[2]
        if parameter.ndim == 1 and ("norm" in own or not own) and parameter.numel() != width:
            return f"{attention}.{name} spans its heads"
    return None


def narrowed(model: Any, structure: Structure, mask: torch.Tensor) -> Any:
    """The model that `mask` leaves of `model`, which stays as it is; what is not cut is shared."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    small = copy.deepcopy(model, shared)
    for cut in structure.cuts:
        index = structure.of(cut, mask)
        if index is not None:
            _cut(small.get_submodule(cut.module), cut.side, index)
    for number, name in enumerate(structure.attentions):
        attention, left = small.get_submodule(name), int(mask[number, : structure.heads].sum())
        for count in COUNTS:
            if hasattr(attention, count):
                setattr(attention, count, getattr(attention, count) // structure.heads * left)
    return small


def _cut(linear: Any, side: str, index: torch.Tensor) -> None:
    """Leaves a linear layer the entries `index` of one side."""
    transposed = type(linear).__name__ == "Conv1D"
    index = index.to(linear.weight.device)
    dim = int((side == "in") != transposed)
    linear.weight = nn.Parameter(linear.weight.detach().index_select(dim, index), requires_grad=False)
    if side == "out" and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach().index_select(0, index), requires_grad=False)
    name = {("in", False): "in_features", ("out", False): "out_features", ("in", True): "nx", ("out", True): "nf"}
    setattr(linear, name[side, transposed], len(index))


# -- adapters


def sides(structure: Structure, mask: torch.Tensor, adapter: Tensors) -> Sides:
    """Of which tensors of an adapter a mask keeps a part, and which: B [d_out, rank] or A [rank, d_in]."""
    cuts = {cut.module: cut for cut in structure.cuts}
    found = {}
    for key in adapter:
        cut = cuts.get(lora.module_of(key)) if ".lora_" in key else None
        if cut is not None and (".lora_B." in key) == (cut.side == "out"):
            index = structure.of(cut, mask)
            if index is not None:
                found[key] = (0 if cut.side == "out" else 1, index)
    return found


def shrunk(adapter: Tensors, parts: Sides) -> dict[str, torch.Tensor]:
    """The adapter of a pruned model."""
    return {key: t.index_select(*parts[key]) if key in parts else t for key, t in adapter.items()}


def widened(part: Tensors, parts: Sides, like: Tensors) -> dict[str, torch.Tensor]:
    """The adapter that `shrunk` makes `part` of, 0 where it was cut off."""
    whole = {}
    for key, tensor in part.items():
        whole[key] = torch.zeros(like[key].shape).index_copy_(*parts[key], tensor.float()) if key in parts else tensor
    return whole


class OverlapMean:
    """Mean of each coordinate over those that kept it; where nobody did, as before. Holds one accumulator."""

    def __init__(self, before: Tensors) -> None:
        self.before = before
        self.sums = {key: torch.zeros(tensor.shape) for key, tensor in before.items()}
        self.weights = {key: torch.zeros(tensor.shape) for key, tensor in before.items()}

    def add(self, part: Tensors, parts: Sides, weight: float) -> None:
        """One update."""
        for key, tensor in part.items():
            if key in parts:
                dim, index = parts[key]
                self.sums[key].index_add_(dim, index, tensor.float(), alpha=weight)
                self.weights[key].index_add_(dim, index, torch.ones(tensor.shape), alpha=weight)
            else:
                self.sums[key].add_(tensor, alpha=weight)
                self.weights[key].add_(weight)

    def result(self) -> dict[str, torch.Tensor]:
        """The mean."""
        return {
            key: torch.where(self.weights[key] > 0, total / self.weights[key].clamp(min=1e-30), self.before[key])
            for key, total in self.sums.items()
        }


# -- what a unit is worth


def magnitudes(model: Any, structure: Structure, adapter: Tensors, scale: float) -> torch.Tensor:
    """[layers, heads + channels] squared norm of each unit's weights, with the adapter's scale B A added to them."""
    found = torch.zeros(structure.layers, structure.heads + structure.channels, dtype=torch.float64)
    for cut, weight in _merged(model, structure, adapter, scale):
        squares = weight.square().sum(1 if cut.side == "out" else 0).to("cpu", torch.float64)
        part = slice(0, structure.heads) if cut.kind == "heads" else slice(structure.heads, None)
        found[cut.layer, part] += squares[cut.index].sum(1)
    return found


def _merged(model: Any, structure: Structure, adapter: Tensors, scale: float) -> Iterator[tuple[Cut, torch.Tensor]]:
    """Each cut weight [out, in] in float32, with its adapter."""
    for cut in structure.cuts:
        linear = model.get_submodule(cut.module)
        weight = linear.weight.detach().float()
        weight = weight.T if type(linear).__name__ == "Conv1D" else weight
        a, b = (adapter.get(f"base_model.model.{cut.module}.lora_{x}.weight") for x in "AB")
        if a is not None and b is not None:
            weight = weight + scale * (b.float() @ a.float()).to(weight.device)
        yield cut, weight


def taylor(site: Site, model: Any, structure: Structure, rng: np.random.Generator, batches: int) -> torch.Tensor:
    """[layers, heads + channels] |dL/dg|, g a factor on each unit's output: the first-order change of L without it.

    model: a PeftModel of the whole width, which is the worse for it afterwards.
    """
    for cut in structure.cuts:
        if cut.side == "in":
            reader = model.get_submodule(f"base_model.model.{cut.module}")
            owner = torch.empty(cut.index.numel(), dtype=torch.int64)
            owner[cut.index.flatten()] = torch.arange(len(cut.index)).repeat_interleave(cut.index.shape[1])
            device = next(reader.parameters()).device
            reader.gate = nn.Parameter(torch.ones(len(cut.index), device=device))
            reader.register_forward_pre_hook(_gate(owner.to(device)))
    gradients = site.gradients(model, rng, batches)
    found = torch.zeros(structure.layers, structure.heads + structure.channels)
    for cut in structure.cuts:
        if cut.side == "in":
            part = slice(0, structure.heads) if cut.kind == "heads" else slice(structure.heads, None)
            found[cut.layer, part] = gradients[f"base_model.model.{cut.module}.gate"].abs()
    return found


def _gate(owner: torch.Tensor) -> Any:
    return lambda module, inputs: (inputs[0] * module.gate[owner].to(inputs[0].dtype), *inputs[1:])
