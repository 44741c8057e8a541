"""Server optimizers: FedAvgM (Hsu et al. 2019, arXiv 1909.06335) and FedOpt (Reddi et al. 2021, arXiv 2003.00295).

With x the state a round starts from, y what the method aggregates of what edges made of x as they were sent it, s(x),
d = y - s(x), all products and roots by coordinate:

    fedavgm       m <- beta1 m + d                        x <- x + lr m
    all others    m <- beta1 m + (1 - beta1) d            x <- x + lr m / (sqrt(v) + tau)
    fedadagrad    v <- v + d^2
    fedadam       v <- beta2 v + (1 - beta2) d^2
    fedyogi       v <- v - (1 - beta2) d^2 sign(v - d^2)
    fedadamw      as fedadam, and                         x <- (1 - lr weight_decay) x, before the step

with m = 0 and v = tau^2 at first, the least that the paper's algorithm 2 allows. As in the paper there is no bias
correction, and tau stands outside the root. FedAdamW is AdamW's decoupled decay (Loshchilov and Hutter 2019, arXiv
1711.05101) in this notation; the paper has none. Ours: d comes from the method's own aggregate, be it a mean or a
robust rule, and of buffered rounds from a buffer; a round without a usable report makes no step, and a tensor that a
method leaves as it is, or that is new, makes none in that round. s(x) is x rounded to wire.dtype: with d = y - x that
rounding was learned where nobody learned anything. Of a method that adds changes to x itself d is y - x.

Each operation is one torch kernel that IEEE arithmetic determines, so that threads do not change bits. The moments take
one (FedAvgM) or two tensors beside each of the state's, however many edges there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch

from .message import DTYPES, Message
from .server_settings import Optimizer

Moments: TypeAlias = Mapping[str, torch.Tensor]  # m/NAME and v/NAME, in the shape of the state's NAME

BESIDE = "moments/"  # before their names in a checkpoint, where they lie in one file with the state


def stepped(
    before: Message, after: Message, moments: Moments, how: Optimizer, aside: Sequence[str] = (),
    wire: str | None = None,
) -> tuple[Message, Moments]:  # fmt: skip
    """(the next state, the next moments) from a round's states; nothing that is passed in is changed.

    aside: patterns of names of tensors that stay as they are in `after`, as those do that are no floating-point
    numbers, that `before` has not, or that are the very tensors of `before`: their moments stand still. wire: the dtype
    in which edges were sent what they made `after` of; null: it was made of `before` itself.
    """
    lr, decay, tau = how.lr, how.weight_decay, how.tau
    assert lr is not None, "every optimizer has one"
    tensors, found = dict(after.tensors), dict[str, torch.Tensor]()
    for name, new in after.tensors.items():
        x = before.tensors.get(name)
        if x is None or new is x or not new.is_floating_point() or any(fnmatchcase(name, one) for one in aside):
            found |= {key: moments[key] for key in (f"m/{name}", f"v/{name}") if key in moments}
            continue
        d = new - (x if wire is None else x.to(DTYPES[wire]).to(x.dtype))
        v = moments.get(f"v/{name}")
        m = first(d, moments.get(f"m/{name}"), how)
        if how.beta1:
            found[f"m/{name}"] = m
        move = m * lr
        if tau is not None:
            found[f"v/{name}"] = v = second(d.square_(), torch.full_like(d, tau**2) if v is None else v, how)
            move.div_(v.sqrt().add_(tau))
        if decay is not None:
            x = x * (1 - lr * decay)
        tensors[name] = x + move
    return Message(tensors, after.numbers), found


def first(d: torch.Tensor, m: torch.Tensor | None, how: Optimizer) -> torch.Tensor:
    """The first moment after d. FedAvgM adds d whole."""
    assert how.beta1 is not None, "every optimizer has one"
    part = d.clone() if how.name == "fedavgm" else d * (1 - how.beta1)
    return part if m is None else part.add_(m * how.beta1)


def second(squares: torch.Tensor, v: torch.Tensor, how: Optimizer) -> torch.Tensor:
    """The second moment after d, of which `squares` are the squares."""
    if how.beta2 is None:
        return v + squares
    if how.name == "fedyogi":
        return v - squares * torch.sign(v - squares) * (1 - how.beta2)
    return v * how.beta2 + squares * (1 - how.beta2)


def together(state: Message, moments: Moments) -> Message:
    """One message of both, for a checkpoint."""
    return Message({**state.tensors, **{BESIDE + name: tensor for name, tensor in moments.items()}}, state.numbers)


def apart(message: Message) -> tuple[Message, Moments]:
    """The inverse of `together`."""
    moments = {name.removeprefix(BESIDE): t for name, t in message.tensors.items() if name.startswith(BESIDE)}
    state = {name: tensor for name, tensor in message.tensors.items() if not name.startswith(BESIDE)}
    return Message(state, message.numbers), moments
