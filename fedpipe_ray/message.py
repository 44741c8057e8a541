"""Message: the one thing that crosses the wire, rests in a checkpoint, or stays on an edge."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from .files import write_atomically

# Tensors rebuilt from a shared-memory buffer are read-only views; every user of a Message copies before it writes.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

KEPT = "kept."  # an order's tensors under this prefix stay with the edge: they travel as they are stored, and once
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Message:
    """Named tensors and named numbers.

    tensors: any shapes and dtypes, on any device; they travel as flat buffers, one copy into the receiver's store and
    none out of it, and arrive as read-only CPU views. numbers: a few scalars. held: names of tensors that the receiver
    has from before, which no byte is counted for. Treat all as immutable.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    held: frozenset[str] = frozenset()

    @property
    def kept(self) -> dict[str, torch.Tensor]:
        """The tensors that stay with the receiver, by their names without KEPT."""
        return {name.removeprefix(KEPT): t for name, t in self.tensors.items() if name.startswith(KEPT)}

    @property
    def rest(self) -> dict[str, torch.Tensor]:
        """The others."""
        return {name: tensor for name, tensor in self.tensors.items() if not name.startswith(KEPT)}

    @property
    def payload_bytes(self) -> int:
        """Bytes of tensor storage as sent."""
        return sum(t.numel() * t.element_size() for name, t in self.tensors.items() if name not in self.held)

    @property
    def header_bytes(self) -> int:
        """Bytes of names, dtypes, shapes and numbers, as one JSON text."""
        sent = {name: tensor for name, tensor in self.tensors.items() if name not in self.held}
        return len(json.dumps([_specs(sent), dict(self.numbers)]).encode())

    @property
    def total_bytes(self) -> int:
        """Payload and header together: what bytes_up and bytes_down count."""
        return self.payload_bytes + self.header_bytes

    def to(self, dtype: str) -> Message:
        """This message with floating-point tensors cast to `dtype`, but for kept ones; itself if nothing changes."""
        target = DTYPES[dtype]
        cast = {
            name: tensor.to(target) if tensor.is_floating_point() and not name.startswith(KEPT) else tensor
            for name, tensor in self.tensors.items()
        }
        same = all(cast[name] is tensor for name, tensor in self.tensors.items())
        return self if same else Message(cast, self.numbers, self.held)

    @classmethod
    def joined(cls, *parts: Message) -> Message:
        """One message of several: all tensors; numbers and held of the last."""
        return cls({k: t for part in parts for k, t in part.tensors.items()}, parts[-1].numbers, parts[-1].held)

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., Message], tuple[Any, ...]]:
        flat = [
            tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
            for tensor in self.tensors.values()
        ]
        buffers = [pickle.PickleBuffer(array.data) if protocol >= 5 else array.tobytes() for array in flat]
        return _rebuild, (_specs(self.tensors), dict(self.numbers), buffers, self.held)

    def save(self, path: Path) -> str:
        """Writes one safetensors file beside `path`, renames it to `path`; returns its SHA-256. Raises OSError.

        Equal messages give equal files; `load` keeps the order of the names.
        """
        tensors: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        for name, tensor in self.tensors.items():
            own = tensor.detach().to("cpu").contiguous()
            at = own.untyped_storage().data_ptr()
            tensors[name] = own.clone() if at in seen else own  # safetensors refuses tensors that share memory
            seen.add(at)
        # One key, for the file's order of several is random; with the names, for safetensors sorts them.
        about = json.dumps({"names": list(tensors), "numbers": dict(self.numbers)})
        content = safetensors.torch.save(tensors, metadata={"message": about})
        write_atomically(path, content)
        return hashlib.sha256(content).hexdigest()

    @classmethod
    def load(cls, path: Path, sha256: str | None = None) -> Message:
        """The message in a file of `save`. Raises ValueError if the file is damaged, OSError if it cannot be read."""
        content = path.read_bytes()
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the recorded one")
        try:
            tensors = safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header.get("__metadata__", {}).get("message", "{}"))
        return cls({name: tensors[name] for name in about.get("names", tensors)}, about.get("numbers", {}))


def _specs(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, str, list[int]]]:
    return [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()]


def _rebuild(
    specs: Sequence[tuple[str, str, list[int]]], numbers: dict[str, float], buffers: Sequence[Any], held: frozenset[str]
) -> Message:
    """Read-only views on the received buffers; no copy."""
    tensors = {}
    for (name, dtype, shape), buffer in zip(specs, buffers, strict=True):
        kind = getattr(torch, dtype)
        flat = torch.frombuffer(buffer, dtype=kind) if math.prod(shape) else torch.empty(0, dtype=kind)
        tensors[name] = flat.view(shape)
    return Message(tensors, numbers, held)
