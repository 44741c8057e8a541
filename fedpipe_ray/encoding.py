"""Updates on their way up: through a codec on the edge, and back to full ones before a method's `aggregate` sees any.

A tensor of an update that its order has too, to keep or not, in floating point and in the same shape, is encoded as its
change: a zeroed weight is not a zero change. Others of floating point, such as FedKSeed's slopes, are encoded whole by
bf16, int8 and nf4 and left alone by the codecs of changes; integers and numbers are always left alone. What is not
encoded, and what a codec leaves in floating point, travels in wire.dtype. Orders are not encoded: one is put once for
all edges, and a change of it would be another one for each. Parts of all tensors lie one behind the other in a few
tensors `codec.PART`; names that the order has do not travel. `codec.known`: places of the encoded ones among the
order's, by name, where they are not just all that the edge does not keep. A tensor encoded whole is announced by an
empty one of its name, [0, *shape].

Error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847, algorithm 2): an edge encodes its change
plus what its codec left out before, and keeps what it leaves out now. That, and lowrank's Q, is private state of the
edge: `codec.left.NAME` and `codec.warm.NAME`, kept, hashed and restored with the method's own, which does not see them,
until an order has no NAME any more.
An update that the server does not use, as a late one, is lost with all that it carried: only what was left out stays.
Where an edge counts changes from what has arrived (a method's `again`), what was left out is in the next change anyway,
with and without feedback (EF21, Richtarik et al. 2021, arXiv 2106.05203): nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .codecs import Codec, Parts, Sizes, make_codec
from .errors import DivergedError, UnfitUpdate, UserError
from .message import DTYPES, Message
from .randomness import rng_for

if TYPE_CHECKING:
    from .settings import Run, Wire

PREFIX = "codec."
LEFT, WARM = f"{PREFIX}left.", f"{PREFIX}warm."
KNOWN = "known"


@dataclass(frozen=True)
class Encoding:
    """What both ends know of one update's way: wire settings, and whose update it is."""

    wire: Wire
    seed: int
    round: int
    edge: str
    again: tuple[str, ...] = ()  # on the edge: patterns of the names whose change has in it what was left out before

    @classmethod
    def of(cls, run: Run, round: int, edge: str, again: tuple[str, ...] = ()) -> Encoding:
        """That of an edge in a round."""
        return cls(run.wire, run.seed, round, edge, again)

    @cached_property
    def codec(self) -> Codec:
        """Of a wire that has one."""
        assert self.wire.codec is not None, "asked only where there is one"
        return make_codec(self.wire.codec)

    def rng(self, name: str) -> np.random.Generator:
        """What is drawn for a tensor, at both ends."""
        return rng_for(self.seed, self.round, f"codec/{self.edge}/{name}")

    # -- on the edge

    def encode(self, update: Message, order: Message, carried: Message | None) -> tuple[Message, Message | None]:
        """(the update as it travels, what the edge keeps for its next one); order: as it came.

        Raises DivergedError for NaN or infinity, also of a part in wire.dtype, which would stay in what is kept.
        """
        if self.wire.codec is None:
            return update.to(self.wire.dtype), None
        base = changeable(order)
        floats = {name: tensor for name, tensor in update.tensors.items() if tensor.is_floating_point()}
        known = {n: t.float() for n, t in base.items() if n in floats and floats[n].shape == t.shape}
        strange = [name for name in floats if name not in known] if self.codec.whole else []
        old = carried.tensors.items() if carried is not None else ()
        kept = {name: tensor for name, tensor in old if name.removeprefix(LEFT).removeprefix(WARM) in base}
        pieces: dict[str, list[torch.Tensor]] = {}
        for name in (*known, *strange):
            x = floats[name].detach().to("cpu", torch.float32)
            if name in known:
                parts, left = self.parts(name, x - known[name], kept)
                kept |= left
            else:
                parts, _ = self.parts(name, x, {})
            for part, values in parts.items():
                pieces.setdefault(part, []).append(values)
        tensors = {PREFIX + part: torch.cat(values) for part, values in pieces.items()}
        if list(known) != usual(order):
            places = {name: place for place, name in enumerate(base)}
            tensors[PREFIX + KNOWN] = torch.tensor([places[name] for name in known], dtype=torch.int32)
        whole = {name: floats[name].new_empty(0, *floats[name].shape) for name in strange}
        rest = {name: t for name, t in update.tensors.items() if name not in known and name not in whole}
        plain = Message({**whole, **rest}, update.numbers).to(self.wire.dtype)
        return Message({**tensors, **plain.tensors}, update.numbers), Message(kept) if kept else None

    def parts(self, name: str, x: torch.Tensor, kept: Mapping[str, torch.Tensor]) -> tuple[Parts, Parts]:
        """(the parts of a tensor as they travel, what is kept of it)."""
        if not bool(torch.isfinite(x).all()):
            raise DivergedError(f"its update has NaN or infinity in {name}")
        codec, again = self.codec, any(fnmatchcase(name, one) for one in self.again)
        feedback, before = self.wire.error_feedback and not again, kept.get(LEFT + name)
        if feedback and before is not None and before.shape == x.shape:
            x = x + before
        sizes = codec.sizes(x.shape, DTYPES[self.wire.dtype])
        found = codec.encode(x, self.rng(name), kept.get(WARM + name), feedback or again)
        parts = {part: found[part].to(dtype) for part, (dtype, _) in sizes.items()}
        left = {LEFT + name: x - codec.decode(parts, x.shape, self.rng(name))} if feedback else {}
        if not all(bool(torch.isfinite(one).all()) for one in (*parts.values(), *left.values())):
            raise DivergedError(f"its update is too large for {self.wire.dtype} in {name}; use bfloat16 or float32")
        if codec.warm in parts:
            left[WARM + name] = parts[codec.warm].float()
        return parts, left

    def arriving(self, update: Message, order: Message, carried: Message | None) -> Message:
        """What the server will make of an update, or a part of one, in float32; by a codec it is encoded for that."""
        if self.wire.codec is None:
            return update.to(self.wire.dtype).to("float32")
        return self.decode(self.encode(update, order, carried)[0], order)

    # -- on the server

    def decode(self, message: Message, order: Message) -> Message:
        """The full update in float32; order: as it was sent. Raises UnfitUpdate for what `encode` does not make.

        Nothing is made that is larger than the order's tensors or, by the codecs that take tensors whole, 8 times the
        message; lengths are checked before.
        """
        base, layout, plain = changeable(order), dict[str, torch.Size](), dict[str, torch.Tensor]()
        streams = {n.removeprefix(PREFIX): t for n, t in message.tensors.items() if n.startswith(PREFIX)}
        places = streams.pop(KNOWN, None)
        known = dict.fromkeys(usual(order)) if places is None else known_names(places, list(base))
        layout |= {name: base[name].shape for name in known}
        for name, tensor in message.tensors.items():
            if name.startswith(PREFIX):
                continue
            self.check_plain(name, tensor, layout)
            if self.codec.whole and tensor.is_floating_point():
                layout[name] = tensor.shape[1:]
            else:
                plain[name] = tensor.float() if tensor.is_floating_point() else tensor
        sizes = {name: self.codec.sizes(shape, DTYPES[self.wire.dtype]) for name, shape in layout.items()}
        check_lengths(streams, list(sizes.values()))
        tensors, at = dict[str, torch.Tensor](), dict.fromkeys(streams, 0)
        for name, shape in layout.items():
            parts = {part: streams[part][at[part] : at[part] + length] for part, (_, length) in sizes[name].items()}
            at |= {part: at[part] + length for part, (_, length) in sizes[name].items()}
            change = self.decoded(name, parts, shape)
            tensors[name] = base[name].float() + change if name in known else change
        return Message({**tensors, **plain}, message.numbers)

    def check_plain(self, name: str, tensor: torch.Tensor, layout: Mapping[str, torch.Size]) -> None:
        """Raises UnfitUpdate for a tensor that is there twice, or not as it should travel."""
        if name in layout:
            raise UnfitUpdate(f"its update has {name} twice")
        if not tensor.is_floating_point():
            return
        wanted = self.wire.dtype
        if tensor.dtype != DTYPES[wanted]:
            found = str(tensor.dtype).removeprefix("torch.")
            raise UnfitUpdate(f"its update has {name} in {found}, not {wanted}")
        if self.codec.whole and (tensor.ndim == 0 or len(tensor)):
            raise UnfitUpdate(f"its update has {name} as it is, not encoded by wire.codec")

    def decoded(self, name: str, parts: Parts, shape: torch.Size) -> torch.Tensor:
        """One tensor. Raises UnfitUpdate."""
        for part, values in parts.items():
            if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                raise UnfitUpdate(f"its update has NaN or infinity in the {part.replace('_', ' ')} of {name}")
        try:
            return self.codec.decode(parts, shape, self.rng(name))
        except UnfitUpdate as error:
            raise UnfitUpdate(f"its update has in {name} {error}") from None


def changeable(order: Message) -> dict[str, torch.Tensor]:
    """The tensors of an order that a change can be told of, by name: both ends must have them in the same order."""
    found = {**order.kept, **order.rest}
    return {name: tensor for name, tensor in sorted(found.items()) if tensor.is_floating_point()}


def usual(order: Message) -> list[str]:
    """The names of those that come back if nothing else is said: all but kept ones."""
    return [name for name in changeable(order) if name in order.tensors]


def known_names(places: torch.Tensor, names: list[str]) -> dict[str, None]:
    """The encoded ones of the order's, in order. Raises UnfitUpdate for places that are none, or stand twice."""
    if places.dtype != torch.int32 or places.ndim != 1 or len(places) > len(names):
        raise UnfitUpdate(f"its update encodes {list(places.shape)} tensors of {len(names)} in the order")
    found = places.tolist()
    if found != sorted(set(found)) or not all(0 <= place < len(names) for place in found):
        raise UnfitUpdate(f"its update encodes tensors at places that do not rise from 0 to below {len(names)}")
    return {names[place]: None for place in found}


def check_lengths(streams: Mapping[str, torch.Tensor], sizes: list[Sizes]) -> None:
    """Raises UnfitUpdate unless the streams have just the parts, dtypes and lengths that the tensors need."""
    totals: dict[str, tuple[torch.dtype, int]] = {}
    for one in sizes:
        for part, (dtype, length) in one.items():
            totals[part] = dtype, totals.get(part, (dtype, 0))[1] + length
    if streams.keys() != totals.keys():
        odd = sorted(streams.keys() ^ totals.keys())
        raise UnfitUpdate(f"its encoded update has {', '.join(streams) or 'nothing'}, the first odd one {odd[0]}")
    for part, (dtype, length) in totals.items():
        stream = streams[part]
        if stream.dtype != dtype or stream.shape != (length,):
            found, wanted = (str(kind).removeprefix("torch.") for kind in (stream.dtype, dtype))
            raise UnfitUpdate(f"its encoded update has {part} in {found} {list(stream.shape)}, not {wanted} [{length}]")


def with_carried(private: Message | None, carried: Message | None) -> Message | None:
    """Both private states of an edge as one message, as it is kept."""
    if carried is None:
        return private
    own = private or Message()
    return Message({**own.tensors, **carried.tensors}, own.numbers)


def without_carried(state: Message | None) -> tuple[Message | None, Message | None]:
    """(the method's own, the codec's) of what was kept."""
    carried = {} if state is None else {n: t for n, t in state.tensors.items() if n.startswith(PREFIX)}
    if state is None or not carried:
        return state, None
    own = Message({name: t for name, t in state.tensors.items() if name not in carried}, state.numbers)
    return own if own.tensors or own.numbers else None, Message(carried)


def check_codec(run: Run, method: Any) -> None:
    """Raises UserError for a codec that there is not, or that does not fit the method's updates."""
    if run.wire.codec is None:
        return
    codec, kind, name = make_codec(run.wire.codec), getattr(method, "updates", "changes"), run.method["name"]
    if kind == "values" and not codec.whole:
        raise UserError(
            f"wire.codec.name: {run.wire.codec['name']} encodes changes of what an edge was sent, and {name} sends "
            "values of its own; use bf16, int8 or nf4, or remove wire.codec"
        )
    if run.wire.error_feedback and kind != "entries":
        does = "sends values of its own" if kind == "values" else "may give an entry another meaning in every round"
        raise UserError(
            f"wire.error_feedback: what a round leaves out of a change is sent with the same entries in the next, and "
            f"{name} {does}; set it to false"
        )
