"""Updates as they arrive: decoded, and held against what their edges were sent, whatever the method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from .encoding import Encoding
from .errors import UnfitUpdate
from .message import DTYPES, KEPT, Message
from .report import Lost, Report
from .settings import Run


def checked(reports: Iterable[Report | Lost], sent: Mapping[str, Message], run: Run) -> Iterator[Report | Lost]:
    """The reports; their messages are decoded, and raise UnfitUpdate where they do not fit what was `sent`."""
    for report in reports:
        if isinstance(report, Report) and report.fetch is not None:
            encoding = Encoding.of(run, report.base_round, report.edge) if run.wire.codec else None
            known = sent[report.edge], run.wire.dtype, run.server.norm_bound, encoding
            report.fetch = partial(fitting, report.fetch, *known)
        yield report


def fitting(
    fetch: Callable[[], Message], sent: Message, wire: str, norm_bound: float | None, encoding: Encoding | None = None
) -> Message:
    """What `fetch` gives, decoded where it has an encoding, then float32.

    Raises UnfitUpdate for a tensor in another dtype than it was sent in, too large a change, or a malformed code.
    wire: the dtype of floating-point tensors as sent. The change is that of all tensors together, in L2 norm; tensors
    that the edge was not sent count whole.
    """
    message, squares = fetch(), 0.0
    if encoding is not None:
        sent = sent.to(wire)
        message, wire = encoding.decode(message, sent), "float32"
    for name, tensor in message.tensors.items():
        known = sent.tensors.get(name, sent.tensors.get(KEPT + name))
        before = tensor if known is None else known
        expected = DTYPES[wire] if before.is_floating_point() else before.dtype
        if tensor.dtype != expected:
            found, wanted = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, expected))
            raise UnfitUpdate(f"its update has {name} in {found}, not {wanted}")
        if norm_bound is not None:
            change = tensor.double()
            if known is not None and before.shape == tensor.shape:
                change = change - before.to(expected).double()
            squares += float(change.square().sum())
    if norm_bound is not None and norm_bound**2 < squares < math.inf:  # not finite: the method names the tensor
        raise UnfitUpdate(
            f"its update is a change of L2 norm {math.sqrt(squares):.4g}, above server.norm_bound: {norm_bound:g}"
        )
    return message
