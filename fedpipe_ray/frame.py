"""Models whose weights come with an order: architecture and tokenizer first, the weights when they are there.

A frame is a Base on the meta device. An edge of a method with base = `sent` has nothing else until its first order.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .device import pick_device
from .model import Base, empty_model, load_tokenizer
from .settings import Model


def frame(settings: Model, task: str, classes: Sequence[str], files: Mapping[str, bytes] | None = None) -> Base:
    """The frame of the model that `settings` names, or of a parcel's `files`; no weights are read.

    Raises UserError if configuration or tokenizer cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="fedpipe-model-") as folder:
        source = settings if files is None else Model(name=folder)
        for name, content in (files or {}).items():
            Path(folder, name).write_bytes(content)
        empty = empty_model(source, task, classes, buffers=True)
        return Base(empty, load_tokenizer(source), pick_device(settings.device))


def filled(frame: Base, tensors: Mapping[str, torch.Tensor], reshape: Callable[[Any], None]) -> Base:
    """The frame's model, its architecture changed by `reshape`, with `tensors` as its weights.

    On the CPU they are neither copied nor cast. Raises ValueError unless they are all the weights there are; tied ones
    come once.
    """
    model = copy.deepcopy(frame.model)
    reshape(model)
    unknown = model.load_state_dict(dict(tensors), strict=False, assign=True).unexpected_keys
    model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if unknown or missing:
        odd = f"no place for {unknown[0]}" if unknown else f"no weights for {missing[0]}"
        raise ValueError(f"the order's model does not fit: {odd}, {len(unknown) + len(missing)} such in all")
    return Base(model, frame.tokenizer, frame.device)


def same_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same bytes in the same form."""
    return (one.data_ptr(), one.shape, one.dtype) == (other.data_ptr(), other.shape, other.dtype)
