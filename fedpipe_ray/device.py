"""Where a model computes, and in which dtype."""

from __future__ import annotations

import torch

from .errors import UserError
from .message import DTYPES


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, then Apple's MPS, then CPU. Raises UserError for a device that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device: {name!r} is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device: cuda, but this process sees no GPU; give the edge's profile gpus, or use auto")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """float32 on CPU and the checkpoint's own dtype (None) on a GPU unless `name` says otherwise."""
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if device.type == "cpu" else None
