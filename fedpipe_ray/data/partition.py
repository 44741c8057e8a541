"""Which edge gets which row of a shared source: pure functions, so that every edge computes the same by itself."""

from __future__ import annotations

import heapq
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpipe_ray.errors import UserError
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.settings import Partition

Assignment = NDArray[np.int64]  # [rows]: an index into edges

MIN_ROWS = 10  # draws that leave an edge less are repeated, as Li et al. do (arXiv:2102.02079)
DRAWS = 20


def assign(
    partition: Partition, rows: int, labels: Sequence[Any] | NDArray[Any] | None, edges: Sequence[str], seed: int
) -> Assignment:
    """The edge index of every row, [rows]; each edge gets at least one row, and the same seed the same answer.

    labels: [rows], the values of `partition.column` or of the label; iid and size do without. Raises UserError if
    there are fewer rows than edges, or the values do not allow the division.
    """
    if rows < len(edges):
        raise UserError(
            f"partition: {rows} row(s) for {len(edges)} edges; "
            f"give data.source at least {len(edges)} rows, or use fewer edges"
        )
    if labels is not None and len(labels) != rows:
        raise ValueError(f"partition: {len(labels)} labels for {rows} rows")
    rng, by = rng_for(seed, 0, "partition"), partition.by
    if ":" in by:
        return _foreign(by, rows, labels, edges, seed)
    if by == "iid":
        return _dealt(rng.permutation(rows), np.arange(rows) % len(edges))
    if by == "size":
        return _skewed(np.zeros(rows, np.int64), len(edges), partition.alpha, rng)
    names, codes = _coded(labels, by)
    if by == "dirichlet":
        return _skewed(codes, len(edges), partition.alpha, rng)
    if by == "shards":
        return _shards(codes, len(edges), partition.shards, rng)
    if by == "column":
        return _natural(names, codes, edges, str(partition.column))
    raise ValueError(f"partition.by: {by} does not divide a source")


def needs_labels(partition: Partition) -> bool:
    """Whether `assign` cannot do without labels."""
    return partition.by in ("dirichlet", "shards", "column")


def _dealt(order: NDArray[np.int64], owners: NDArray[np.int64]) -> Assignment:
    """Row order[i] goes to owners[i]; order is a permutation, so every row goes to exactly one edge."""
    result = np.empty(len(order), np.int64)
    result[order] = owners
    return result


def _coded(labels: Sequence[Any] | NDArray[Any] | None, by: str) -> tuple[list[str], NDArray[np.int64]]:
    """(the distinct values as sorted strings, the index of each row's value in them)."""
    if labels is None:
        raise UserError(
            f"partition.by: {by} needs the values of a column; set partition.column, or data.label of a classifier"
        )
    texts = ["" if value is None else str(value) for value in labels]
    names = sorted(set(texts))
    index = {name: i for i, name in enumerate(names)}
    return names, np.fromiter((index[text] for text in texts), np.int64, len(texts))


def _skewed(codes: NDArray[np.int64], edges: int, alpha: float, rng: np.random.Generator) -> Assignment:
    """Every class is divided in proportions ~ Dirichlet(alpha); one class in all gives the skew of sizes."""
    sizes = np.bincount(codes)
    least = max(1, min(MIN_ROWS, len(codes) // (10 * edges)))
    for _ in range(DRAWS):
        counts = _draw(sizes, edges, alpha, rng)
        if counts.sum(0).min() >= least:
            break
    counts = _lifted(counts, least)
    order = rng.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]  # class after class, shuffled within
    return _dealt(order, np.concatenate([np.repeat(np.arange(edges), row) for row in counts]))


def _draw(sizes: NDArray[np.int64], edges: int, alpha: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rows of each class for each edge, [classes, edges].

    The cuts of a class are moved by one uniform offset: rounding down alone would give the last edge every rest.
    """
    shares = rng.dirichlet(np.full(edges, alpha), len(sizes))  # [classes, edges]
    cuts = np.minimum(np.cumsum(shares, axis=1)[:, :-1], 1.0) * sizes[:, None] + rng.random((len(sizes), 1))
    bounds = np.concatenate([np.zeros((len(sizes), 1)), np.floor(cuts), sizes[:, None]], axis=1)
    counts: NDArray[np.int64] = np.diff(np.minimum(bounds, sizes[:, None]), axis=1).astype(np.int64)
    return counts


def _lifted(counts: NDArray[np.int64], least: int) -> NDArray[np.int64]:
    """`counts` with rows moved from the largest edge to any that has fewer than `least`."""
    counts = counts.copy()
    totals = counts.sum(0)
    while totals.min() < least:
        poor, rich = int(totals.argmin()), int(totals.argmax())
        kind = int(counts[:, rich].argmax())
        moved = min(least - totals[poor], totals[rich] - least, counts[kind, rich])
        counts[kind, [poor, rich]] += [moved, -moved]
        totals[[poor, rich]] += [moved, -moved]
    return counts


def _shards(codes: NDArray[np.int64], edges: int, shards: int, rng: np.random.Generator) -> Assignment:
    """Rows sorted by class in edges x shards pieces, `shards` of them an edge (McMahan et al., arXiv:1602.05629)."""
    pieces = edges * shards
    if len(codes) < pieces:
        raise UserError(
            f"partition.shards: {shards} x {edges} edges make {pieces} pieces of {len(codes)} rows; "
            f"use at most {len(codes) // edges} shards"
        )
    order = rng.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]
    owner = np.empty(pieces, np.int64)
    owner[rng.permutation(pieces)] = np.arange(pieces) % edges
    lengths = [len(piece) for piece in np.array_split(order, pieces)]
    return _dealt(order, np.repeat(owner, lengths))


def _natural(names: list[str], codes: NDArray[np.int64], edges: Sequence[str], column: str) -> Assignment:
    """By name where the values are the edges; else whole groups, the largest first, to the least loaded edge."""
    if set(names) == set(edges):
        return np.array([list(edges).index(name) for name in names], np.int64)[codes]
    if set(names) & set(edges):
        strange, idle = sorted(set(names) - set(edges)), sorted(set(edges) - set(names))
        raise UserError(
            f"partition.column: {column} names some edges, but the values {strange[:5]} are no edge "
            f"and the edges {idle[:5]} have no row; name the edges as the {len(names)} values, or all of them otherwise"
        )
    if len(names) < len(edges):
        raise UserError(
            f"partition.column: {column} has {len(names)} value(s) for {len(edges)} edges; "
            f"use at most {len(names)} edges, or another column"
        )
    sizes = np.bincount(codes)
    load = [(0, edge) for edge in range(len(edges))]
    owner = np.empty(len(names), np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        rows, edge = heapq.heappop(load)
        owner[group] = edge
        heapq.heappush(load, (rows + int(sizes[group]), edge))
    return owner[codes]


def _foreign(
    by: str, rows: int, labels: Sequence[Any] | NDArray[Any] | None, edges: Sequence[str], seed: int
) -> Assignment:
    """What `module:function` answers to (rows, labels, edges, seed), checked."""
    module, _, name = by.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"partition.by: cannot import {by}: {error}; it must be on the path of every edge") from None
    try:
        result = np.asarray(function(rows, labels, list(edges), seed))
    except Exception as error:
        raise UserError(f"partition.by: {by} raised {type(error).__name__}: {error}") from error
    if result.shape != (rows,) or not np.issubdtype(result.dtype, np.integer):
        raise UserError(
            f"partition.by: {by} gave {result.dtype} of shape {result.shape}; it must give {rows} integers, one a row"
        )
    if rows and (result.min() < 0 or result.max() >= len(edges)):
        raise UserError(
            f"partition.by: {by} gave {result.min()} to {result.max()}; edges are numbered 0 to {len(edges) - 1}"
        )
    idle = [edge for edge, count in zip(edges, np.bincount(result, minlength=len(edges)), strict=True) if count == 0]
    if idle:
        raise UserError(f"partition.by: {by} gave no row to {', '.join(idle)}; every edge needs at least one")
    return result.astype(np.int64)
