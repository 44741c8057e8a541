"""Updates as they arrive: decoded, and held against what their edges were sent, whatever the method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch

from .encoding import Encoding
from .errors import UnfitUpdate
from .message import DTYPES, KEPT, Message
from .report import Lost, Report
from .settings import Run


def checked(reports: Iterable[Report | Lost], sent: Mapping[str, Message], run: Run) -> Iterator[Report | Lost]:
    """The reports; their messages are decoded, and raise UnfitUpdate where they do not fit what was `sent`."""
    bound, clip = run.server.norm_bound, run.server.norm_clip
    for report in reports:
        if isinstance(report, Report) and report.fetch is not None:
            encoding = Encoding.of(run, report.base_round, report.edge) if run.wire.codec else None
            known = sent[report.edge], run.wire.dtype, bound, clip, encoding
            report.fetch = partial(fitting, report.fetch, *known)
        yield report


def fitting(
    fetch: Callable[[], Message], sent: Message, wire: str, norm_bound: float | None, norm_clip: float | None = None,
    encoding: Encoding | None = None,
) -> Message:  # fmt: skip
    """What `fetch` gives, decoded where it has an encoding, then float32.

    Raises UnfitUpdate for a tensor in another dtype than it was sent in, too large a change, or a malformed code.
    wire: the dtype of floating-point tensors as sent. The change is that of all tensors together, in L2 norm; tensors
    that the edge was not sent count whole. Above norm_clip it is scaled down to that (norm clipping, Sun et al. 2019,
    arXiv 1911.07963), and comes in float32.
    """
    message, squares = fetch(), 0.0
    if encoding is not None:
        sent = sent.to(wire)
        message, wire = encoding.decode(message, sent), "float32"
    for name, tensor in message.tensors.items():
        before = sent.tensors.get(name, sent.tensors.get(KEPT + name, tensor))
        expected = DTYPES[wire] if before.is_floating_point() else before.dtype
        if tensor.dtype != expected:
            found, wanted = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, expected))
            raise UnfitUpdate(f"its update has {name} in {found}, not {wanted}")
        if norm_bound is not None or norm_clip is not None:
            start = start_of(name, tensor, sent)
            change = tensor.double() if start is None else tensor.double() - start.double()
            squares += float(change.square().sum())
    if not squares < math.inf:  # not finite: the method names the tensor
        return message
    if norm_bound is not None and norm_bound**2 < squares:
        raise UnfitUpdate(
            f"its update is a change of L2 norm {math.sqrt(squares):.4g}, above server.norm_bound: {norm_bound:g}"
        )
    if norm_clip is not None and norm_clip**2 < squares:
        return shrunk(message, sent, norm_clip / math.sqrt(squares))
    return message


def start_of(name: str, tensor: torch.Tensor, sent: Message) -> torch.Tensor | None:
    """What a tensor of an update began as, as that was sent; None if nothing of its name and shape was sent."""
    before = sent.tensors.get(name, sent.tensors.get(KEPT + name))
    return None if before is None or before.shape != tensor.shape else before.to(tensor.dtype)


def shrunk(message: Message, sent: Message, share: float) -> Message:
    """The update with this share of its change."""
    tensors = {}
    for name, tensor in message.tensors.items():
        start = start_of(name, tensor, sent)
        if not tensor.is_floating_point():
            tensors[name] = tensor
        elif start is None:
            tensors[name] = tensor.float() * share
        else:
            tensors[name] = start.float() + (tensor.float() - start.float()) * share
    return Message(tensors, message.numbers, message.held)
