"""What a round costs: floating-point operations, bytes, seconds on the virtual clock, peak memory.

The virtual clock is ours: it says how long a round would take on the declared profiles, whatever machine simulates it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from .settings import Profile


@dataclass(frozen=True)
class Cost:
    """What one edge spent in one round. flops, seconds and bytes as measured or counted; virtual_seconds by profile."""

    samples: int = 0
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    step_seconds: float = 0.0
    peak_memory_bytes: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    virtual_seconds: float = 0.0


def virtual_seconds(profile: Profile, flops: float, bytes_down: int, bytes_up: int) -> float:
    """Seconds for download, computation and upload on `profile`, one after the other, latency paid each way."""
    transfer = 8 * bytes_down / profile.downlink_bps + 8 * bytes_up / profile.uplink_bps
    return transfer + 2 * profile.latency_seconds + flops / profile.compute_flops


def matmul_parameters(model: nn.Module) -> tuple[int, int]:
    """(frozen, trained) parameters that take part in matrix products; embedding look-ups are not among them."""
    frozen = trained = 0
    for name, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")  # an adapter's `weight` is its base layer's
        replaced = "original_module" in name.split(".")  # PEFT's trained copy runs in its place
        if weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding) and not replaced:
            if weight.requires_grad:
                trained += weight.numel()
            else:
                frozen += weight.numel()
    return frozen, trained


def training_flops(model: nn.Module, tokens: int) -> float:
    """FLOPs of forward and backward over `tokens` (padding included): 4 a frozen weight, 6 a trained one.

    Attention scores are left out; at the lengths of instruction tuning they are a few percent.
    """
    frozen, trained = matmul_parameters(model)
    return float(tokens) * (4 * frozen + 6 * trained)


class PeakMemory:
    """Measures the peak of this process inside a `with` block: .bytes on the GPU if it is used, else resident memory.

    On Linux the kernel's high-water mark is reset at entry; elsewhere it is the process's lifetime peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            with contextlib.suppress(OSError):  # some containers refuse it: the lifetime peak is then reported
                Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif sys.platform == "linux":
            self.bytes = _high_water_mark()
        else:
            self.bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _high_water_mark() -> int:
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
