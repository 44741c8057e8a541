"""Updates as they arrive: decoded, and held against what their edges were sent, whatever the method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch

from .encoding import Encoding
from .errors import UnfitUpdate
from .factors import ALONG, factor, narrow
from .folding import of_b
from .message import DTYPES, KEPT, Message
from .report import Lost, Report
from .settings import Run
from .stacking import frobenius


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
    wire: the dtype of floating-point tensors as sent. norm_bound, norm_clip: of the L2 norm of what `squares_of` has.
    Above norm_clip it is scaled down to that (norm clipping, Sun et al. 2019, arXiv 1911.07963), and comes in float32.
    """
    message = fetch()
    if encoding is not None:
        sent = sent.to(wire)
        message, wire = encoding.decode(message, sent), "float32"
    for name, tensor in message.tensors.items():
        before = sent.tensors.get(name, sent.tensors.get(KEPT + name, tensor))
        expected = DTYPES[wire] if before.is_floating_point() else before.dtype
        if tensor.dtype != expected:
            found, wanted = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, expected))
            raise UnfitUpdate(f"its update has {name} in {found}, not {wanted}")
    if norm_bound is None and norm_clip is None:
        return message
    squares = squares_of(message, sent)
    if not squares < math.inf:  # not finite: the method names the tensor
        return message
    if norm_bound is not None and norm_bound**2 < squares:
        raise UnfitUpdate(
            f"its update is a change of L2 norm {math.sqrt(squares):.4g}, above server.norm_bound: {norm_bound:g}"
        )
    if norm_clip is not None and norm_clip**2 < squares:
        return shrunk(message, sent, norm_clip / math.sqrt(squares))
    return message


def squares_of(message: Message, sent: Message) -> float:
    """The square of the L2 norm of an update's change, over all tensors together.

    A tensor that the edge was not sent counts whole; but of a fresh pair of LoRA factors the product B A counts, in
    Frobenius norm and without LoRA's scale, for A began as the edge drew it. A factor that came back with a lower rank
    counts against what was sent of that rank.
    """
    fresh, squares = fresh_pairs(message, sent), 0.0
    for name, tensor in message.tensors.items():
        if name in fresh:
            squares += frobenius(tensor, message.tensors[fresh[name]]) ** 2
        elif name not in fresh.values():
            start = start_of(name, tensor, sent)
            change = tensor.double() if start is None else tensor.double() - start.double()
            squares += float(change.square().sum())
    return squares


def fresh_pairs(message: Message, sent: Message) -> dict[str, str]:
    """Of each pair of LoRA factors of which the edge was sent none: B [m, r] -> A [r, n], by their keys."""
    known, found = {name.removeprefix(KEPT) for name in sent.tensors}, {}
    named = {of_b(name): name for name in message.tensors if ".lora_A." in name and of_b(name) in message.tensors}
    for name_b, name_a in named.items():
        b, a = message.tensors[name_b], message.tensors[name_a]
        fits = b.ndim == a.ndim == 2 and b.shape[1] == a.shape[0] and b.is_floating_point() and a.is_floating_point()
        if fits and not known & {name_a, name_b}:
            found[name_b] = name_a
    return found


def start_of(name: str, tensor: torch.Tensor, sent: Message) -> torch.Tensor | None:
    """What a tensor of an update began as, as that was sent; None if nothing of its name and shape was sent."""
    before = sent.tensors.get(name, sent.tensors.get(KEPT + name))
    side = ALONG.get(factor(name))
    if before is not None and side is not None and before.ndim == tensor.ndim == 2:
        before = narrow(name, before, tensor.shape[side])
    return None if before is None or before.shape != tensor.shape else before.to(tensor.dtype)


def shrunk(message: Message, sent: Message, share: float) -> Message:
    """The update with this share of its change; of a fresh pair B alone is scaled, and so the product."""
    tensors, unscaled = {}, set(fresh_pairs(message, sent).values())
    for name, tensor in message.tensors.items():
        start = start_of(name, tensor, sent)
        if not tensor.is_floating_point():
            tensors[name] = tensor
        elif start is None:
            tensors[name] = tensor.float() * (1.0 if name in unscaled else share)
        else:
            tensors[name] = start.float() + (tensor.float() - start.float()) * share
    return Message(tensors, message.numbers, message.held)
