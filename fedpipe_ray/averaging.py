"""What `server.aggregator` names: the weighted mean, and rules that a minority of arbitrary updates cannot carry away.

With u_1..u_n the updates that can be used, each all its tensors as one vector, and p_k an edge's report.weight:

    trimmed_mean      by coordinate, the mean without the `trim` smallest and the `trim` largest values
    median            by coordinate; of an even number the mean of the middle two
    geometric_median  argmin_z sum_k p_k ||z - u_k||
    krum              the u_k whose n - f - 2 nearest others are nearest, by the sum of their squared distances
    multi_krum        the mean of the `keep` best of them

Trimmed mean and median are Yin et al.'s (2018, arXiv 1803.01498), Krum and Multi-Krum Blanchard et al.'s (2017, arXiv
1703.02757; f is `byzantine`), keep = n - f - 2 El Mhamdi et al.'s (2018, arXiv 1802.07927), the geometric median by
smoothed Weiszfeld steps is RFA, Pillutla et al.'s (2022, arXiv 1912.13445):

    z <- sum_k b_k u_k / sum_k b_k,    b_k = p_k / max(nu, ||z - u_k||)

As in the papers only the mean and the geometric median look at weights, which an edge states itself; for the others an
edge is an edge. Ours: every z is a mix of the updates, so that its distances follow from the n x n inner products, and
the steps, which cost nothing, go on until they stand still; nu is relative; ties of Krum go to the edge that stands
first. All but the mean hold the n updates at once, and beside them the result and one block of coordinates; they
compute in float64. Where fewer updates came than a rule needs, the state stands as it is: to fall back to the mean, or
to a smaller f, is what an attacker who makes edges fail would ask for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from .message import Message
from .methods.base import arrivals, unlike, weighted_mean
from .report import Lost, Report
from .server_settings import Aggregator

if TYPE_CHECKING:
    from .site import Site

log = logging.getLogger("fedpipe")

BLOCK = 2**20  # numbers of all updates together that are looked at at once
SMOOTHING = 1e-6  # nu, as a share of the median distance
STEPS, STILL = 1000, 1e-9
SKIPPED = "skipped"  # number of the state: rounds so far in which too few updates came
Matrix: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Updates: TypeAlias = Sequence[Message]


def average(state: Message, reports: Iterable[Report | Lost], server: Site) -> Message:
    """The next state by `server.aggregator`; `state` unchanged if no report is usable.

    If some are and the rule needs more, they are rejected with the reason, and the state counts the round as skipped.
    """
    how = server.run.server.aggregator
    # As on edges: thread counts change bits. On a busy machine several threads, which wait for one another after every
    # tensor, were slower than one.
    torch.set_num_threads(server.run.local.threads)
    if how.name == "mean":
        return weighted_mean(state, reports)
    used: list[Report] = []
    updates: list[Message] = []
    for report, message in arrivals(reports, partial(unlike, like=state.tensors)):
        used.append(report)
        updates.append(message)
    if not updates:
        return state
    short = how.shortage(len(updates), "came")
    if short is not None:
        for report in used:
            report.rejected = short
        return Message(state.tensors, {**state.numbers, SKIPPED: state.numbers.get(SKIPPED, 0) + 1})
    return Message(combined(state, updates, [report.weight for report in used], how), state.numbers)


def combined(state: Message, updates: Updates, weights: Sequence[float], how: Aggregator) -> dict[str, torch.Tensor]:
    """The tensors that a rule other than the mean makes of updates with those of the state, in float32."""
    if how.name in ("trimmed_mean", "median"):
        trim = (len(updates) - 1) // 2 if how.trim is None else how.trim
        return by_block(state, updates, partial(trimmed_mean, trim=trim))
    products = inner_products(state, updates)
    if how.name == "geometric_median":
        mix = geometric_median(products, np.asarray(weights))
    else:
        f = how.byzantine or 0
        keep = 1 if how.name == "krum" else how.keep or len(updates) - f - 2
        mix = multi_krum(products, f, keep)
    chosen = np.flatnonzero(mix).tolist()  # so that of one update its very bits come out
    share = torch.from_numpy(mix[chosen])
    return by_block(state, [updates[k] for k in chosen], lambda block: share @ block)


def by_block(state: Message, updates: Updates, rule: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that `rule`, from [n, coordinates] to [coordinates] in float64, makes of the updates."""
    found = {}
    for name, like in state.tensors.items():
        out = torch.empty(like.numel(), dtype=torch.float32)
        for place, block in blocks([update.tensors[name] for update in updates]):
            out[place] = rule(block).float()
        found[name] = out.view(like.shape)
    return found


def blocks(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[slice, torch.Tensor]]:
    """(coordinates, [n, coordinates] in float64) of n equally shaped tensors, some coordinates at a time."""
    flat, size = [tensor.reshape(-1) for tensor in tensors], max(1, BLOCK // len(tensors))
    for start in range(0, len(flat[0]), size):
        place = slice(start, start + size)
        yield place, torch.stack([one[place].double() for one in flat])


def trimmed_mean(block: torch.Tensor, trim: int) -> torch.Tensor:
    """[coordinates]: of the n values of each, the mean without the `trim` smallest and largest. n > 2 trim."""
    values = block.sort(dim=0).values
    return values[trim : len(values) - trim].mean(dim=0)


def inner_products(state: Message, updates: Updates) -> Matrix:
    """[n, n] of the updates' changes of the state, over all tensors."""
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name, before in state.tensors.items():
        origin = before.reshape(-1)
        for place, block in blocks([update.tensors[name] for update in updates]):
            block -= origin[place].double()
            total += block @ block.T
    return np.asarray(total)


def squared_distances(products: Matrix) -> Matrix:
    """[n, n] between the vectors with these inner products."""
    norms = products.diagonal()
    found = np.maximum(norms[:, None] + norms[None, :] - 2 * products, 0.0)
    np.fill_diagonal(found, 0.0)
    return found


def multi_krum(products: Matrix, byzantine: int, keep: int) -> Matrix:
    """[n] 1 / keep for the `keep` updates with the best scores, of equal ones the first; 0 for the others."""
    distances = squared_distances(products)
    np.fill_diagonal(distances, np.inf)  # an update is no neighbour of its own
    near = np.sort(distances, axis=1)[:, : len(distances) - byzantine - 2]
    mix = np.zeros(len(distances))
    mix[np.argsort(near.sum(axis=1), kind="stable")[:keep]] = 1 / keep
    return mix


def geometric_median(products: Matrix, weights: Matrix) -> Matrix:
    """[n] shares, of sum 1, whose mix of the vectors has the least weighted sum of distances to them."""
    mix: Matrix = weights / weights.sum()
    for _ in range(STEPS):
        across = products @ mix
        distances = np.sqrt(np.maximum(mix @ across - 2 * across + products.diagonal(), 0.0))  # [n] of each to the mix
        nu = SMOOTHING * float(np.median(distances))
        if nu == 0.0:  # most of the updates are this very vector
            break
        pulls = weights / np.maximum(nu, distances)
        before, mix = mix, pulls / pulls.sum()
        if np.abs(mix / before - 1).max() < STILL:  # each by itself: of a far update a share of 1e-20 is much
            break
    return mix
