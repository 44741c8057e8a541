"""What a round costs: floating-point operations, bytes, seconds on the virtual clock, peak memory.

The virtual clock is ours: it says how long a round would take on the declared profiles, whatever machine simulates it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from .settings import Profile

ADAM_BYTES = 12  # of a trained parameter beside its own four: gradient and two moments


@dataclass(frozen=True)
class Cost:
    """What one edge spent in one round. flops, seconds and bytes as measured or counted; virtual_seconds by profile.

    peak_memory_bytes: of its process; training_memory_bytes: of base model, adapters, optimizer and activations alone,
    what a capacity counts; 0 where it cannot be measured, and on the CPU without a capacity.
    """

    samples: int = 0
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    step_seconds: float = 0.0
    peak_memory_bytes: int = 0
    training_memory_bytes: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    virtual_seconds: float = 0.0


def place(tensor: torch.Tensor) -> int:
    """What tells a tensor's storage from others that are alive: its address; on the meta device its id."""
    storage = tensor.untyped_storage()
    return int(storage._cdata if tensor.is_meta else storage.data_ptr())


def virtual_seconds(profile: Profile, flops: float, bytes_down: int, bytes_up: int) -> float:
    """Seconds for download, computation and upload on `profile`, one after the other, latency paid each way."""
    transfer = 8 * bytes_down / profile.downlink_bps + 8 * bytes_up / profile.uplink_bps
    return transfer + 2 * profile.latency_seconds + flops / profile.compute_flops


def linked(profile: Profile, numbers: Mapping[str, float]) -> Profile:
    """`profile` with the link rates that an order's numbers state: those of a method that has a channel of its own."""
    if not numbers.keys() & {"uplink_bps", "downlink_bps"}:
        return profile
    up, down = numbers.get("uplink_bps", profile.uplink_bps), numbers.get("downlink_bps", profile.downlink_bps)
    return dataclasses.replace(profile, uplink_bps=up, downlink_bps=down)


def matmul_parameters(model: nn.Module) -> tuple[int, int, int]:
    """(passed, frozen, trained) parameters that take part in matrix products; embedding look-ups are not among them.

    passed: frozen ones before the first trained parameter, in the order of registration: no gradient flows back to
    them. Of any kind: a bias or a norm passes it on as a weight does.
    """
    passed = frozen = trained = 0
    reached = False
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        weight = own.get("weight", own.get("original"))  # an adapter's `weight` is its base layer's; see subset.Stored
        replaced = "original_module" in name.split(".")  # PEFT's trained copy runs in its place
        if weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding) and not replaced:
            if weight.requires_grad:
                trained += weight.numel()
            elif reached:
                frozen += parameters_of(module)
            else:
                passed += parameters_of(module)
        reached = reached or any(parameter.requires_grad for parameter in own.values())
    return passed, frozen, trained


def parameters_of(linear: nn.Module) -> int:
    """Parameters of a linear layer's weight, whatever it is packed in: 4-bit weights lie two in a byte."""
    weight, width, height = (getattr(linear, name, None) for name in ("weight", "in_features", "out_features"))
    return width * height if width and height else int(weight.numel()) if weight is not None else 0


def training_flops(model: nn.Module, tokens: int) -> float:
    """FLOPs of forward and backward over `tokens` (padding included), by weight: 2 passed, 4 frozen, 6 trained.

    Attention scores are left out; at the lengths of instruction tuning they are a few percent.
    """
    passed, frozen, trained = matmul_parameters(model)
    return float(tokens) * (2 * passed + 4 * frozen + 6 * trained)


class PeakMemory:
    """Measures memory inside a `with` block.

    bytes: the peak of this process, on the GPU if it is used, else resident. grown: how much of it came in the block.
    On Linux the kernel's high-water mark is reset at entry; elsewhere it is the process's lifetime peak, and grown 0.
    growth: whether `grown` is wanted; on the CPU freed memory is then given back first, which costs the block 40 ms.
    """

    def __init__(self, device: torch.device, growth: bool = True) -> None:
        self.device, self.growth = device, growth
        self.bytes = self.grown = 0
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif sys.platform == "linux":
            if self.growth:
                give_back_freed_memory()
            with contextlib.suppress(OSError):  # some containers refuse it: the lifetime peak is then reported
                Path("/proc/self/clear_refs").write_text("5")
                self._before = status_bytes("VmRSS") if self.growth else None
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif sys.platform == "linux":
            self.bytes = status_bytes("VmHWM")
        else:
            self.bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.grown = max(0, self.bytes - self._before) if self._before is not None else 0


def training_memory(peak: PeakMemory, stored: int) -> int:
    """Bytes of model, adapters, optimizer and activations at their peak; 0 if nobody asked or this machine cannot tell.

    On the CPU: what of the model was `stored` before, and what the process grew by. So the interpreter, its libraries
    and what other edges hold in the same process are not counted.
    """
    if not stored or not peak.grown:
        return 0
    return peak.bytes if peak.device.type == "cuda" else stored + peak.grown


def limit_gpu(capacity_bytes: float | None) -> None:
    """Has CUDA give this process no more than so much of its GPU; None: all of it."""
    if torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, capacity_bytes / whole) if capacity_bytes else 1.0)


def give_back_freed_memory() -> None:
    """Has the allocator return freed pages to the system, so that what is resident is in use."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def return_large_blocks() -> None:
    """Has the allocator return blocks of 8 MiB or more as soon as they are freed, and keep 32 MiB of others at most.

    For a process that holds updates: left alone, glibc keeps freed ones of up to 32 MiB, two at a time.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(-3, 8 * 2**20)  # M_MMAP_THRESHOLD
        library.mallopt(-1, 32 * 2**20)  # M_TRIM_THRESHOLD


def status_bytes(key: str) -> int:
    """A memory figure of this process as Linux has it: VmRSS (resident now) or VmHWM (its peak)."""
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0
