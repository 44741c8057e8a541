"""Divisions of the real files in which the last edge, the slowest of clusters/unequal.yaml, alone has certain rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpipe_ray.randomness import rng_for


def beside_burger_king(rows: int, mr: Sequence[str], edges: Sequence[str], seed: int) -> NDArray[np.int64]:
    """E2E: the places near Burger King are the last edge's, 16 % of the rows; the others have equal shares."""
    return on_last(lambda value: "near[Burger King]" in value, mr, len(edges), seed)


def sports(rows: int, label: Sequence[str], edges: Sequence[str], seed: int) -> NDArray[np.int64]:
    """AG News: the last edge has all news of sports and no other, 25 % of the rows; the others have equal shares."""
    return on_last(lambda value: value == "Sports", label, len(edges), seed)


def on_last(rare: Callable[[str], bool], values: Sequence[str], edges: int, seed: int) -> NDArray[np.int64]:
    """The edge of every row, [rows]: rare ones at the last, the others dealt at random to those before it."""
    owners = np.full(len(values), edges - 1)
    common = np.array([i for i, value in enumerate(values) if not rare(str(value))])
    owners[rng_for(seed, 0, "rare").permutation(common)] = np.arange(len(common)) % (edges - 1)
    return owners
