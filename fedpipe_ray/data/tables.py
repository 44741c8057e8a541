"""Any source as a stream of record batches of text: JSONL, CSV, Parquet, Hugging Face data sets, the built-in corpus.

A file is never whole in memory. Errors name file, row and column but show no content: they reach the driver.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fedpipe_ray.errors import UserError

from .docstrings import read_pairs
from .files import File, find_files

BATCH_ROWS = 1024
BATCH_BYTES = 512 << 10  # of text in a batch: a fast tokenizer takes some 50 bytes for each of them
LINE_BYTES = 64 << 20  # of the longest row
BLOCK_BYTES = (1 << 20, LINE_BYTES)  # of a CSV file: a row must fit in; some thirty blocks are read ahead
DELIMITERS = (",", ";", "\t")
_ROW_CONTENT = re.compile(r"(Expected \d+ columns, got \d+):.*", re.DOTALL)


def read(
    source: str, columns: Sequence[str], format: str = "auto", limit: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Batches with string columns `columns`, in that order, of at most BATCH_ROWS rows and about BATCH_BYTES.

    Null becomes "", a number its shortest form, a list or a struct JSON. limit: rows in all. Raises UserError, while
    reading, for a source that is missing, empty, broken, not UTF-8, or lacks one of the columns.
    """
    done = 0
    for batch in _open(source, columns, format, limit):
        for piece in _pieces(batch):
            piece = piece.slice(0, None if limit is None else limit - done)
            done += piece.num_rows
            if piece.num_rows:
                yield piece
        if done == limit:
            return
    if done == 0:
        raise UserError(f"{source} holds no row; give data.source a file with rows")


def column_names(source: str, format: str = "auto") -> list[str]:
    """The columns of a source, as its first file has them. Raises UserError as `read` does."""
    if source.startswith("builtin:"):
        return list(_builtin(source).column_names)
    if source.startswith("hf:"):
        with explained(source):
            return _names(_hugging_face(source))
    file = find_files(source, format)[0]
    with explained(file.name):
        return _HEADERS[file.format](file)


def as_text(value: Any) -> str:
    """A value as a template shows it: "" for None, `true` and 1.5 as in JSON, lists and structs as JSON."""
    if isinstance(value, str):
        return value
    if value is None or value != value:  # pandas writes NaN where it has nothing
        return ""
    if isinstance(value, bool | int | float | dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def require_columns(wanted: Iterable[str], there: Collection[str], where: str) -> None:
    """Raises UserError naming the columns that `where` lacks, those it has, and the nearest one."""
    missing = [column for column in wanted if column not in there]
    if missing:
        near = difflib.get_close_matches(missing[0], list(there), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        names = ", ".join(repr(name) for name in there)
        raise UserError(f"{where} has no column {', '.join(map(repr, missing))}; its columns: {names or 'none'}{hint}")


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """Turns what files, pyarrow and decoders raise into a UserError that names `where`, without the row's content."""
    try:
        yield
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8; convert it, for example: iconv -f latin1 -t utf-8 OLD > NEW") from None
    except (OSError, EOFError, pa.ArrowException, csv.Error) as error:
        reason = (_ROW_CONTENT.sub(r"\1", str(error)).splitlines() or [type(error).__name__])[0]
        if "UTF8" in reason:
            raise UserError(
                f"{where} is not UTF-8 ({reason}); convert it, for example: iconv -f latin1 -t utf-8 OLD > NEW"
            ) from None
        if "straddling" in reason:
            reason = f"a row is longer than {LINE_BYTES >> 20} MiB; is a quote left open?"
        raise UserError(f"cannot read {where}: {reason}") from None


def _open(source: str, columns: Sequence[str], format: str, limit: int | None) -> Iterator[pa.RecordBatch]:
    """Batches of any size with the columns as text."""
    if source.startswith("builtin:"):
        table = _builtin(source)
        require_columns(columns, table.column_names, source)
        yield from table.select(columns).to_batches()
        return
    if source.startswith("hf:"):
        with explained(source):
            yield from _hugging_face_batches(source, columns)
        return
    done = 0
    for file in find_files(source, format):
        with explained(file.name):
            for batch in _READERS[file.format](file, columns, None if limit is None else limit - done):
                done += batch.num_rows
                yield _text_batch(batch, columns)
        if limit is not None and done >= limit:
            return


def _pieces(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    rows = max(1, min(BATCH_ROWS, batch.num_rows * BATCH_BYTES // max(1, batch.nbytes)))
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def _text_batch(batch: pa.RecordBatch, columns: Sequence[str]) -> pa.RecordBatch:
    return pa.record_batch([_text(batch.column(name)) for name in columns], list(columns))


def _text(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    direct = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_integer,
    )
    if any(is_kind(kind) for is_kind in direct):
        return column.cast(pa.string()).fill_null("")
    return _strings([as_text(value) for value in column.to_pylist()])


def _strings(values: list[str]) -> pa.Array:
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:  # half an emoji, "\ud83d", is valid JSON but not text
        return pa.array([value.encode(errors="replace").decode() for value in values], pa.string())


# -- JSONL: Python's parser, for a column may change its type or appear late, and errors name the line


def _jsonl(file: File, columns: Sequence[str], limit: int | None) -> Iterator[pa.RecordBatch]:
    values: dict[str, list[str]] = {name: [] for name in columns}
    unseen, size, count = set(columns), 0, 0
    for length, row in _json_rows(file):
        if unseen:
            unseen -= row.keys()
        for name in columns:
            values[name].append(as_text(row.get(name)))
        size, count = size + length, count + 1
        if count == limit:
            break
        if size >= BATCH_BYTES or count % BATCH_ROWS == 0:
            yield pa.record_batch([_strings(texts) for texts in values.values()], list(columns))
            values, size = {name: [] for name in columns}, 0
    if count and unseen:  # only now: a column may be absent from any row but not from all
        require_columns(
            columns, dict.fromkeys([*_jsonl_header(file), *(c for c in columns if c not in unseen)]), file.name
        )
    if any(values.values()):
        yield pa.record_batch([_strings(texts) for texts in values.values()], list(columns))


def _json_rows(file: File) -> Iterator[tuple[int, dict[str, Any]]]:
    """(bytes of the line, its object) of every line that is not blank."""
    with io.BufferedReader(file.stream(), 1 << 20) as lines:
        number = 0
        while line := lines.readline(LINE_BYTES):
            number += 1
            where = f"{file.name}, line {number}"
            if len(line) == LINE_BYTES:
                raise UserError(
                    f"{where} is longer than {LINE_BYTES >> 20} MiB; is this a JSONL file, one object a line?"
                )
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            yield len(line), _json_object(line, where)


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    with explained(where):
        text = line.decode("utf-8")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = (
            f"{error.msg} at character {error.pos + 1}"
            if isinstance(error, json.JSONDecodeError)
            else type(error).__name__
        )
        array = "; this is one JSON array: jq -c '.[]' OLD > NEW" if text.lstrip().startswith("[") else ""
        raise UserError(f"{where} is not a JSON object ({reason}); every line must hold a whole one{array}") from None
    if isinstance(row, dict):
        return row
    remedy = (
        "convert the array with jq -c '.[]' OLD > NEW" if isinstance(row, list) else "every line must hold a whole one"
    )
    raise UserError(f"{where} holds a JSON {type(row).__name__}, not an object; {remedy}")


def _jsonl_header(file: File) -> list[str]:
    names: dict[str, None] = {}
    for number, (_, row) in enumerate(_json_rows(file)):
        names |= dict.fromkeys(row)
        if number == 100:
            break
    return list(names)


# -- CSV and Parquet


def _csv(file: File, columns: Sequence[str], limit: int | None) -> Iterator[pa.RecordBatch]:
    names, delimiter = _csv_names(file, columns)
    require_columns(columns, names, file.name)
    doubled = [name for name in columns if names.count(name) > 1]
    if doubled:
        raise UserError(f"{file.name} has more than one column {doubled[0]!r}; rename one")
    done = 0
    for block in BLOCK_BYTES:
        try:
            for batch in _csv_batches(file, columns, delimiter, block, skip=done):
                done += batch.num_rows
                yield batch
            return
        except pa.ArrowInvalid as error:
            if "straddling" not in str(error) or block == BLOCK_BYTES[-1]:
                raise


def _csv_batches(file: File, columns: Sequence[str], delimiter: str, block: int, skip: int) -> Iterator[pa.RecordBatch]:
    """Batches after the first `skip` rows, read in blocks of `block` bytes."""
    reader = pa.csv.open_csv(
        file.stream(),
        read_options=pa.csv.ReadOptions(block_size=block, use_threads=False),  # threads lose the row's number
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string())
        ),
    )
    with reader:
        for batch in reader:
            if batch.num_rows > skip:
                yield batch.slice(skip)
            skip = max(0, skip - batch.num_rows)


def _csv_names(file: File, columns: Sequence[str] = ()) -> tuple[list[str], str]:
    """The header, and the first delimiter with which it holds all of `columns` (a comma if none does)."""
    found: list[tuple[list[str], str]] = []
    for delimiter in DELIMITERS:
        with io.TextIOWrapper(file.stream(), encoding="utf-8-sig", newline="") as text:
            names = next(csv.reader(text, delimiter=delimiter), [])
        if len(names) > 1 and set(columns) <= set(names):
            return names, delimiter
        found.append((names, delimiter))
    return max(found, key=lambda item: (set(columns) <= set(item[0]), len(item[0])))


def _csv_header(file: File) -> list[str]:
    return _csv_names(file)[0]


def _parquet(file: File, columns: Sequence[str], limit: int | None) -> Iterator[pa.RecordBatch]:
    with file.filesystem.open_input_file(file.path) as stream:
        table = pa.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
        require_columns(columns, table.schema_arrow.names, file.name)
        yield from table.iter_batches(batch_size=BATCH_ROWS, columns=list(columns), use_threads=False)


def _parquet_header(file: File) -> list[str]:
    with file.filesystem.open_input_file(file.path) as stream:
        return list(pa.parquet.read_schema(stream).names)


_READERS = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet}
_HEADERS = {"jsonl": _jsonl_header, "csv": _csv_header, "parquet": _parquet_header}


# -- sources that are not files


def _builtin(source: str) -> pa.Table:
    """`builtin:docstrings/PACKAGE`; without a package the standard library, which is public."""
    kind, _, package = source.removeprefix("builtin:").partition("/")
    if kind != "docstrings":
        raise UserError(f"{source}: there is no such built-in data; use builtin:docstrings/PACKAGE")
    try:
        return read_pairs(package or "stdlib")
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def _hugging_face(source: str) -> Any:
    """The data set of `hf:NAME[/CONFIG][:SPLIT]`; NAME is owner/name on the hub, or a local folder."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source} needs the package datasets; pip install 'fedpipe-ray[hf]'") from None
    name, _, split = source.removeprefix("hf:").partition(":")
    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(folder))[split or "train"]
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(str(folder))
        if folder.is_dir():  # streamed: a private folder leaves no copy in the cache
            return datasets.load_dataset(str(folder.resolve()), split=split or "train", streaming=True)
        owner, config = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
        return datasets.load_dataset(owner, config or None, split=split or "train")
    except Exception as error:  # the library raises many kinds
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"cannot load {source}: {type(error).__name__}: {reason}") from None


def _hugging_face_batches(source: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    data = _hugging_face(source)
    require_columns(columns, _names(data), source)
    for table in data.select_columns(list(columns)).with_format("arrow").iter(batch_size=BATCH_ROWS):
        for batch in table.to_batches():
            yield _text_batch(batch, columns)


def _names(data: Any) -> list[str]:
    return list(data.column_names or next(iter(data), {}))
