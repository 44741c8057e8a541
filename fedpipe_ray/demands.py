"""What every way to train costs an edge: from a model's shape, its data's facts and a profile to planning.Demand.

Seconds are the virtual clock's: FLOPs as `costs` counts them, bytes over the links. Memory is what a capacity counts:
the base as it is stored, adapters with gradients and Adam moments, activations. All of it is ours; the paper says only
that rank, batch and bits follow from an edge's resources.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from . import lora
from .batches import autocast, collate, sums
from .calibrate import Calibration
from .codecs import make_codec
from .costs import ADAM_BYTES, parameters_of, place
from .facts import Facts
from .message import DTYPES
from .model import head_names, stored_bytes
from .places import LAYER, kinds_of, layers_of
from .planning import Choice, Demand, Key
from .settings import Local, Profile, Run, Wire

BLOCK, NESTED = 64, 256  # weights an NF4 constant, constants a nested one
TOKENS = 16  # of a row that is looked at; without weights attention keeps tokens squared
CONTEXT = 128 * 2**20  # bytes an uncalibrated CPU process may grow by whatever the model: scratch, arenas, mapped rows


@dataclass(frozen=True)
class Shape:
    """A model as the planner sees it.

    keys: candidate weights; below: [layers + 1] parameters in matrix products before each layer, then before the head;
    products: all of them; base_bytes by bits; activation_bytes a token that trains with every layer; vocabulary: width
    of the logits; largest_bytes: of the largest linear weight, unpacked; context_bytes: whatever the batch;
    whole: parameters that are trained and sent as they are, a classifier's head.
    """

    keys: tuple[Key, ...]
    below: tuple[int, ...]
    products: int
    base_bytes: Mapping[int, int]
    activation_bytes: float
    vocabulary: int
    largest_bytes: int
    context_bytes: int
    whole: int

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return len(self.below) - 1

    @property
    def width(self) -> np.ndarray[Any, Any]:
        """[keys] parameters of a unit of rank on each weight."""
        return np.array([key.d_in + key.d_out for key in self.keys], dtype=float)


def keys_of(model: Any, spec: lora.LoraSpec) -> tuple[Key, ...]:
    """The candidate weights of a model with the adapter of `spec`, in the model's order."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in lora.parameters(model).items():
        if ".lora_" in name:
            factor = "a" if ".lora_A." in name else "b"
            shapes.setdefault(lora.module_of(name), {})[factor] = tuple(parameter.shape)
    kinds, layers = kinds_of(shapes), layers_of(shapes)
    return tuple(Key(name, kinds[name], layers[name], pair["a"][1], pair["b"][0]) for name, pair in shapes.items())


def shape_of(skeleton: Any, base: Any, spec: lora.LoraSpec, run: Run) -> Shape:
    """The shape of a model. skeleton: it with the adapter of `spec` on the meta device; base: it, loaded in 16 bits, or
    without weights; run: its task, and how it trains.
    """
    keys, classifier = keys_of(skeleton, spec), run.data.task == "classification"
    before: dict[int, int] = {}
    total, largest, whole = 0, 0, skeleton.get_base_model()
    for name, module in linears(whole):
        number = LAYER.search(f".{name}.")
        if number:
            before.setdefault(int(number[1]), total)
        total += parameters_of(module)
        largest = max(largest, parameters_of(module))
    heads = sum(parameters_of(m) for n, m in linears(whole) if not LAYER.search(f".{n}."))
    width = base.model.config.get_text_config().vocab_size if not classifier else 0
    each, fixed = activation_bytes(base, spec, classifier, run.local)
    return Shape(
        keys, (*(before[layer] for layer in sorted(before)), total - heads), total,
        {bits: base_bytes(base.model, bits, classifier) for bits in (4, 8, 16)},
        each, width, 4 * largest, int(fixed) + (CONTEXT if base.device.type == "cpu" else 0),
        sum(p.numel() for name, p in lora.parameters(skeleton).items() if ".lora_" not in name),
    )  # fmt: skip


def linears(model: Any) -> Iterator[tuple[str, Any]]:
    """The model's linear layers by name, adapters left out."""
    for name, module in model.named_modules():
        plain = name.removesuffix(".base_layer")
        wrapped = hasattr(module, "base_layer")  # PEFT's own around it, of the same name and size
        if not wrapped and type(module).__name__ in lora.LINEAR and ".lora_" not in f".{plain}":
            yield plain, module


def base_bytes(model: Any, bits: int, classifier: bool) -> int:
    """Bytes of a model once its linear weights, heads aside, are stored in `bits`, constants included.

    8: a byte a weight and four a row. 4: half a byte, a byte for 64 weights, four for 64 x 256, and two code books.
    """
    whole = stored_bytes(model)
    if bits == 16:
        return whole
    kept = head_names(model) if classifier else ["lm_head", "embed_out"]
    for name, module in linears(model):
        if name.partition(".")[0] in kept or name in kept:
            continue
        count = parameters_of(module)
        rows = int(getattr(module, "out_features", 0) or getattr(module, "nf", 0))
        blocks = math.ceil(count / BLOCK)
        packed = (
            count + 4 * rows if bits == 8 else math.ceil(count / 2) + blocks + 4 * math.ceil(blocks / NESTED) + 1092
        )
        whole += packed - count * module.weight.element_size()
    return whole


def activation_bytes(base: Any, spec: lora.LoraSpec, classifier: bool, local: Local) -> tuple[float, float]:
    """(bytes a token, bytes whatever the tokens) that a forward pass keeps for the backward one, logits left out.

    Counted at two lengths, so that it repeats. Autocast keeps weights in its own type. With checkpointing a layer's
    inputs are kept, and all that one layer keeps when it is computed again. A model on the meta device gets a row
    without mask or labels, whose values could not be read, and no autocast.
    """
    model = lora.attach(base, spec)
    tokens = max(2, min(TOKENS, (getattr(base.model.config, "max_position_embeddings", None) or 2 * TOKENS) // 2))
    half, whole = (_kept_bytes(model, base, classifier, local.precision, n) for n in (tokens // 2, tokens))
    each = (whole - half) / (tokens - tokens // 2)
    fixed = max(0.0, whole - each * tokens)
    if local.checkpointing:
        layers, wide = (
            max((key.layer for key in keys_of(model, spec)), default=0) + 1,
            base.model.get_input_embeddings(),
        )
        inputs = layers * wide.weight.shape[1] * wide.weight.element_size()
        return min(each, each / layers + inputs), fixed / layers
    return each, fixed


def _kept_bytes(model: Any, base: Any, classifier: bool, precision: str, tokens: int) -> int:
    """Bytes that a forward pass over a row of so many tokens keeps as it trains."""
    empty = next(model.parameters()).is_meta
    own = {place(p) for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if place(tensor) not in own:
            kept[place(tensor)] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # or its address could be given to another
        return tensor

    batch = collate(_OneRow(tokens, classifier), [0], base.pad_id, classifier)
    model.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            if empty:
                model(input_ids=batch.tokens.to("meta"))
            else:
                with autocast(base.device, precision):
                    sums(model, batch, base.device)
    finally:
        model.eval()
    return sum(kept.values())


@dataclass(frozen=True)
class _OneRow:
    """One row of so many tokens, the last of which has a label."""

    tokens: int
    classifier: bool

    def __len__(self) -> int:
        return 1

    def length(self, index: int) -> int:
        return self.tokens

    def example(self, index: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        wanted = np.full(self.tokens, -100)
        wanted[-1] = 3
        return np.full(self.tokens, 3), np.array([0]) if self.classifier else wanted


def demand_of(
    edge: str, profile: Profile, shape: Shape, facts: Facts, *, rank: int, wire: str, upload: np.ndarray[Any, Any],
    bits: Sequence[int], batch: int, depths: Sequence[int | None], steps: int, min_steps: int, max_steps: int,
    accumulate: int = 1, probed: int = 0, correction: float = 1.0, capacity_bytes: float = math.inf,
    limit_seconds: float = math.inf, measured: Mapping[int, Calibration] = MappingProxyType({}), real: bool = False,
) -> Demand:  # fmt: skip
    """What `edge` may do. rank: of the global adapter, whose whole acts on the edge; batch: the largest.

    wire: the dtype that travels; upload: [keys] what `upload_bytes` says, alike for all edges. accumulate: parts of a
    batch that are in memory one at a time. probed: steps of the largest batch beside the trained ones. correction:
    measured over predicted memory of a round that ran out of it, at least 1. capacity_bytes: beside the profile's.
    measured: calibrations by bits: where there is one, memory comes from it, and with `real` the seconds of all bits.
    Neither leaves nothing to try.
    """
    width = shape.width
    sizes = sorted({*[2**power for power in range(int(math.log2(batch)) + 1)], batch}, reverse=True)
    choices = []
    for q, b, depth in itertools.product(sorted(bits, reverse=True), sizes, depths):
        seconds, each = _seconds(shape, facts, rank, b, depth, profile, _nearest(q, measured) if real else None)
        parts = math.ceil(b / min(b, accumulate))
        held = _bytes(shape, facts, rank, q, parts, depth, measured.get(q))
        none = np.zeros(len(width))
        choices.append(Choice(q, b, depth, seconds, each * width, none, held, ADAM_BYTES * width, none))
    capacity = min(profile.capacity_bytes, capacity_bytes)
    least = min(choice.memory_bytes + choice.memory_bytes_rank.min() for choice in choices)
    left = (capacity - 2) / least  # the planner counts whole bytes
    correction = min(correction, left if measured else max(1.0, left))
    choices = [
        replace(one, memory_bytes=correction * one.memory_bytes, memory_bytes_rank=correction * one.memory_bytes_rank)
        for one in choices
    ]
    sent, head = DTYPES[wire].itemsize, shape.whole * upload.sum() / width.sum()  # bytes of it on their way up
    fixed = 2 * profile.latency_seconds + 8 * sent * (rank * float(width.sum()) + shape.whole) / profile.downlink_bps
    fixed += 8 * head / profile.uplink_bps + probed * choices[0].step_seconds
    return Demand(
        edge, choices, capacity, fixed, 8 * upload / profile.uplink_bps, facts.rows, steps, min_steps, max_steps, batch,
        rank, limit_seconds, shape.layers,
    )  # fmt: skip


def upload_bytes(keys: Sequence[Key], rank: int, wire: Wire) -> np.ndarray[Any, Any]:
    """[keys] bytes that a unit of rank on each weight takes in an update, after wire.codec; counted at `rank`."""
    dtype, codec = DTYPES[wire.dtype], make_codec(wire.codec) if wire.codec else None

    def sent(*shape: int) -> int:
        parts = codec.sizes(shape, dtype).values() if codec else [(dtype, math.prod(shape))]
        return sum(kind.itemsize * count for kind, count in parts)

    return np.array([(sent(rank, key.d_in) + sent(key.d_out, rank)) / rank for key in keys])


def _nearest(bits: int, measured: Mapping[int, Calibration]) -> Calibration | None:
    """The calibration of these bits, or of the next ones there is: machines differ more than bits do."""
    return measured[min(measured, key=lambda other: abs(other - bits))] if measured else None


def _seconds(
    shape: Shape, facts: Facts, rank: int, batch: int, depth: int | None, profile: Profile, measured: Calibration | None
) -> tuple[float, float]:
    """(seconds of a step that trains nothing yet, seconds that a unit of rank on a weight of width 1 adds)."""
    lowest = 0 if depth is None else max(0, shape.layers - depth)
    reached = np.array([key.layer >= lowest for key in shape.keys])
    acts = rank * float((shape.width * np.where(reached, 4, 2)).sum())  # the global adapter does, trained or not
    flops = 2 * shape.below[lowest] + 4 * (shape.products - shape.below[lowest]) + acts  # a token
    tokens = batch * facts.tokens
    if measured is None:
        return tokens * flops / profile.compute_flops, tokens * 2 / profile.compute_flops
    return measured.seconds(tokens, flops), tokens * 2 * measured.seconds_token / measured.flops


def _bytes(
    shape: Shape, facts: Facts, rank: int, bits: int, rows: int, depth: int | None, measured: Calibration | None
) -> float:
    """Of a step with `rows` of the longest rows that trains nothing yet; a calibration without bytes does not count."""
    part = 1.0 if depth is None else min(1.0, depth / shape.layers)
    tokens = rows * facts.longest * part
    if measured is not None and measured.bytes_token > 0:
        acting = 4 * measured.trained  # what was trained there acts here
        return max(measured.margin(tokens) * (measured.memory_bytes(tokens, 0) + acting), shape.base_bytes[bits])
    logits = 3 * 4 * rows * facts.terms * shape.vocabulary
    unpacked = shape.largest_bytes if bits != 16 else 0
    held = shape.context_bytes + shape.base_bytes[bits] + 4 * rank * float(shape.width.sum()) + logits + unpacked
    held += (4 + ADAM_BYTES) * shape.whole
    return held + tokens * shape.activation_bytes
