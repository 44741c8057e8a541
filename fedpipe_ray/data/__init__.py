"""Private text of an edge, from its source to encoded rows. It runs on the edge's own node: no record leaves it.

Every edge of a shared source computes the same division of it by itself, then encodes only its own rows.
"""

from __future__ import annotations

import contextlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedpipe_ray.errors import UserError
from fedpipe_ray.settings import Data

from .encode import Encoder, Row, needed_columns
from .partition import assign, needs_labels
from .split import Name, Split, SplitWriter, digest, split_of
from .tables import column_names, read

__all__ = ["EdgeData", "SourceFacts", "Split", "inspect", "open_data"]

SPLITS: tuple[Name, ...] = ("train", "validation", "test")
COUNTS = ("rows", *SPLITS, "truncated", "dropped_empty", "dropped_leaked")


@dataclass(frozen=True)
class SourceFacts:
    """What a pass over an edge's source finds. rows: this edge's, of all splits; label_values: the classes among them.

    columns: of the source's first file. sizes: rows of each class, numbers in their order; {} for a causal task.
    """

    rows: int
    columns: list[str]
    label_values: list[str]
    sizes: dict[str, int]


@dataclass(frozen=True)
class EdgeData:
    """An edge's encoded rows. counts: rows = train + validation + test + dropped_empty + dropped_leaked; truncated.

    fingerprint: 16 hex digits of a hash over all tokens and labels, in order.
    """

    train: Split
    validation: Split
    test: Split
    counts: dict[str, int]
    fingerprint: str


def inspect(data: Data, edge: str, edges: Sequence[str], seed: int) -> SourceFacts:
    """Reads the whole source without encoding it. Raises UserError for what is wrong with files, columns and labels."""
    mine = _mine(data, edge, edges, seed)
    rows, sizes, columns = 0, Counter[str](), needed_columns(data)
    for source, split in _sources(data):
        for numbers, batch in _batches(data, source, columns, mine if split is None else None):
            rows += batch.num_rows
            if data.task == "classification":
                names = batch.column(str(data.label)).to_pylist()
                _check_labels(data, names, numbers, source)
                sizes.update(names)
    whole = all(re.fullmatch(r"-?\d+", name) for name in sizes)
    labels = sorted(sizes, key=int if whole else str)
    return SourceFacts(rows, column_names(data.source, data.format), labels, {name: sizes[name] for name in labels})


def open_data(
    data: Data,
    edge: str,
    edges: Sequence[str],
    seed: int,
    tokenizer: Any,
    classes: Sequence[str],
    progress: Callable[[int], None] | None = None,
    only: Name | None = None,
) -> EdgeData:
    """The edge's rows, encoded and split; `edge` "" (the server) has all rows of its source.

    classes: names in the order of the model's outputs. progress(rows) is told how many rows were encoded so far. only:
    all rows of the source, undivided, are of this split. Raises UserError for bad rows, a full temporary folder, and
    an edge without a training row (or one of `only`).
    """
    encoder, mine = Encoder(data, tokenizer, classes), _mine(data, edge, edges, seed)
    with contextlib.ExitStack() as stack:
        writers = {name: stack.enter_context(contextlib.closing(SplitWriter(texts=name == "test"))) for name in SPLITS}
        counts = _encode(data, encoder, mine, writers, progress, only)
        return _finished(data, edge, writers, counts, only or "train")


def _encode(
    data: Data,
    encoder: Encoder,
    mine: NDArray[np.bool_] | None,
    writers: Mapping[Name, SplitWriter],
    progress: Callable[[int], None] | None,
    only: Name | None,
) -> dict[str, int]:
    """Hands every example to the writer of its split, and counts."""
    counts = dict.fromkeys(COUNTS, 0)
    for source, split in _sources(data) if only is None else [(data.source, only)]:
        own = ["split"] if split is None and data.builtin else []
        for numbers, batch in _batches(data, source, [*needed_columns(data), *own], mine if split is None else None):
            rows = encoder.rows(batch, numbers)
            places = [split] * len(rows) if split else _places(data, rows, batch)
            counts["rows"] += len(rows)
            for row, example, place in zip(rows, encoder.examples(rows), places, strict=True):
                if example is None:
                    counts["dropped_empty"] += 1
                    continue
                counts["truncated"] += example.truncated
                writers[place].add(example.input_ids, example.labels, digest(row.identity), row.prompt, row.response)
            if progress is not None:
                progress(counts["rows"])
    return counts


def _finished(
    data: Data, edge: str, writers: Mapping[Name, SplitWriter], counts: dict[str, int], needed: Name
) -> EdgeData:
    """The mapped splits, without the held-out rows that stand in train too."""
    known = np.frombuffer(writers["train"].digests, np.uint64)
    train = writers["train"].finish(known[:0])
    validation, test = (writers[name].finish(known) for name in SPLITS[1:])
    counts |= {"train": len(train), "validation": len(validation), "test": len(test)}
    counts["dropped_leaked"] = counts["rows"] - counts["dropped_empty"] - len(train) - len(validation) - len(test)
    if counts[needed] == 0:
        raise UserError(_no_rows(data, counts, needed))
    fingerprint = blake2b(b"".join(writers[name].fingerprint() for name in SPLITS), digest_size=8).hexdigest()
    return EdgeData(train, validation, test, counts, fingerprint)


def _places(data: Data, rows: Sequence[Row], batch: pa.RecordBatch) -> list[Name]:
    """The splits of rows of the source: by the built-in corpus itself, else by the hash of each row's key.

    Where a split has files of its own, no row of the source goes there.
    """
    files = [name for name in SPLITS[1:] if isinstance(getattr(data, name), str)]
    if data.builtin:
        return ["train" if name in files else name for name in batch.column("split").to_pylist()]
    validation, test = (share if isinstance(share, float) else 0.0 for share in (data.validation, data.test))
    return [split_of(row.key, validation, test) for row in rows]


def _sources(data: Data) -> Iterator[tuple[str, Name | None]]:
    """The source, and the files that are splits of their own."""
    yield data.source, None
    if isinstance(data.validation, str):
        yield data.validation, "validation"
    if isinstance(data.test, str):
        yield data.test, "test"


def _batches(
    data: Data, source: str, columns: Sequence[str], mine: NDArray[np.bool_] | None
) -> Iterator[tuple[list[int], pa.RecordBatch]]:
    """(numbers of the rows, from 1, and the rows) of a source; only those that are True in `mine`, [rows]."""
    done = 0
    for batch in read(source, columns, data.format, data.limit):
        numbers, done = np.arange(done + 1, done + batch.num_rows + 1), done + batch.num_rows
        if mine is not None:
            if done > len(mine):
                raise UserError(f"{source} has grown to more than {len(mine)} rows while it was read; start again")
            chosen = mine[numbers - 1]
            numbers, batch = numbers[chosen], batch.filter(pa.array(chosen))
        if len(numbers):
            yield numbers.tolist(), batch


def _mine(data: Data, edge: str, edges: Sequence[str], seed: int) -> NDArray[np.bool_] | None:
    """Which rows of a shared source are this edge's, [rows]; None if all are."""
    if data.partition.by == "edge" or edge == "":
        return None
    if edge not in edges:
        raise UserError(f"edge {edge!r} has no share of {data.source}; the edges are {', '.join(edges)}")
    column = data.partition.column or data.label
    if ":" not in data.partition.by and not needs_labels(data.partition):
        column = None
    names: dict[str, int] = {}
    codes = array("i")
    for batch in read(data.source, [column or needed_columns(data)[0]], data.format, data.limit):
        values = batch.column(0).to_pylist() if column is not None else [""] * batch.num_rows
        codes.extend(names.setdefault(value, len(names)) for value in values)
    labels = None if column is None else np.array(list(names), dtype=object)[np.frombuffer(codes, np.int32)]
    owners = assign(data.partition, len(codes), labels, edges, seed)
    mine: NDArray[np.bool_] = owners == list(edges).index(edge)
    return mine


def _check_labels(data: Data, names: Sequence[str], numbers: Sequence[int], source: str) -> None:
    for row, name in zip(numbers, names, strict=True):
        if name == "":
            raise UserError(
                f"data.label: row {row} of {source} has nothing in {data.label}; give it a class or remove it"
            )
        if data.labels and name not in data.labels:
            raise UserError(f"data.label: row {row} of {source} has {name!r}; data.labels has {', '.join(data.labels)}")


def _no_rows(data: Data, counts: dict[str, int], needed: Name) -> str:
    found = ", ".join(f"{name} {count}" for name, count in counts.items())
    if counts["dropped_empty"]:
        remedy = f"raise data.max_length ({data.max_length} tokens), or check that the response is not empty"
    else:
        remedy = f"lower data.validation ({data.validation}) and data.test ({data.test}), or give this edge more rows"
    kind = "training" if needed == "train" else needed
    return f"no {kind} row in {data.source} ({found}); {remedy}"
