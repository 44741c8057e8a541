"""Train, validation and test rows of an edge: which is which, and where they rest once they are encoded."""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedpipe_ray.errors import UserError

from .tables import BATCH_ROWS

Name = Literal["train", "validation", "test"]
Tokens = NDArray[np.int32]

BATCH_TOKENS = 1 << 19
_ROWS = {"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())}
_TEXTS = {"prompt_text": pa.string(), "response_text": pa.string()}


def split_of(key: str, validation: float, test: float) -> Name:
    """The split of all rows with this key, by its hash: shares are in [0, 1), together below 1.

    The test rows do not depend on the share of validation.
    """
    place = digest(key) / 2**64  # in [0, 1)
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"


def normalised(text: str) -> str:
    """`text` without differences of case and white space."""
    return " ".join(text.split()).casefold()


def digest(text: str) -> int:
    """64 bits of a hash that is equal for texts equal but for case and white space."""
    return int.from_bytes(blake2b(normalised(text).encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Split:
    """Encoded rows of one split in memory-mapped Arrow batches. first: row of each batch's start; kept: rows left."""

    batches: tuple[pa.RecordBatch, ...]
    first: NDArray[np.int64]  # [batches]
    kept: NDArray[np.int64]  # [rows]

    def __len__(self) -> int:
        return len(self.kept)

    def example(self, index: int) -> tuple[Tokens, Tokens]:
        """(input_ids [tokens], labels [tokens], or [1] for a classifier): read-only views of the mapped file."""
        batch, row = self._find(index)
        return _values(batch.column("input_ids"), row), _values(batch.column("labels"), row)

    def length(self, index: int) -> int:
        """Tokens of a row."""
        batch, row = self._find(index)
        return len(batch.column("input_ids")[row])

    def text(self, index: int) -> tuple[str, str]:
        """(prompt, response) of a test row; other splits keep no text. Tokenise the prompt with its special tokens."""
        batch, row = self._find(index)
        return batch.column("prompt_text")[row].as_py(), batch.column("response_text")[row].as_py()

    def _find(self, index: int) -> tuple[pa.RecordBatch, int]:
        row = self.kept[index]
        at = int(np.searchsorted(self.first, row, side="right")) - 1
        return self.batches[at], int(row - self.first[at])


def _values(column: pa.Array, row: int) -> Tokens:
    values: Tokens = column[row].values.to_numpy(zero_copy_only=True)
    return values


class SplitWriter:
    """Appends encoded rows to a temporary file that never has a name, so that no crash leaves private rows behind."""

    def __init__(self, texts: bool) -> None:
        self.digests = array("Q")  # of every row, to find those that leak
        self._schema = pa.schema({**_ROWS, **(_TEXTS if texts else {})})
        self._hashes = [blake2b(digest_size=16) for _ in range(4)]
        self._pending: list[tuple[Any, ...]] = []
        self._tokens = 0
        with _room():
            self._file = tempfile.TemporaryFile(prefix="fedpipe-")  # noqa: SIM115 (held as long as the rows)
            self._arrow = pa.ipc.new_file(self._file, self._schema)

    def add(self, input_ids: Tokens, labels: Tokens, digest: int, prompt: str, response: str) -> None:
        """One row. Raises UserError if the temporary folder is full."""
        self.digests.append(digest)
        self._pending.append((input_ids, labels, prompt, response)[: len(self._schema)])
        self._tokens += len(input_ids)
        if len(self._pending) == BATCH_ROWS or self._tokens >= BATCH_TOKENS:
            with _room():
                self._flush()

    def close(self) -> None:
        """Gives the temporary file's space back, unless a Split maps it."""
        self._file.close()

    def finish(self, known: NDArray[np.uint64]) -> Split:
        """The rows, memory-mapped, without those whose digest is in `known`. Raises UserError as `add` does."""
        with _room():
            self._flush()
            self._arrow.close()
            self._file.flush()
            mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_file(pa.py_buffer(mapped))
        batches = tuple(reader.get_batch(i) for i in range(reader.num_record_batches))
        first = np.array([0, *accumulate(batch.num_rows for batch in batches)][:-1], np.int64)
        kept = np.flatnonzero(~np.isin(np.frombuffer(self.digests, np.uint64), known))
        return Split(batches, first, kept)

    def fingerprint(self) -> bytes:
        """A hash of all encoded rows in order, however they fell into batches."""
        return b"".join(part.digest() for part in self._hashes)

    def _flush(self) -> None:
        ids, labels, *texts = zip(*self._pending, strict=True) if self._pending else [()] * len(self._schema)
        arrays = [self._lists(ids, 0), self._lists(labels, 2), *(pa.array(column, pa.string()) for column in texts)]
        self._arrow.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._pending, self._tokens = [], 0

    def _lists(self, rows: tuple[Tokens, ...], slot: int) -> pa.Array:
        offsets = np.fromiter(accumulate(map(len, rows), initial=0), np.int32, len(rows) + 1)
        values = np.concatenate([np.empty(0, np.int32), *rows])
        self._hashes[slot].update(np.diff(offsets).tobytes())
        self._hashes[slot + 1].update(values.tobytes())
        return pa.ListArray.from_arrays(offsets, values)


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """Turns a failed write into a UserError that says where the rows were to go."""
    try:
        yield
    except OSError as error:
        folder = tempfile.tempdir or "the temporary folder"
        raise UserError(
            f"cannot keep encoded rows in {folder}: {error}; free some space there, or set TMPDIR to another folder"
        ) from None
