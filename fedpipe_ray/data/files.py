"""The files of a source: one file, a folder of them or a glob, on this machine or on any filesystem pyarrow reaches."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs

from fedpipe_ray.errors import UserError

SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv", ".pq": "parquet",
    ".parquet": "parquet",
}  # fmt: skip
COMPRESSED = (".gz", ".bz2", ".zst")
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class File:
    """One file of a known format; `name` is what messages call it."""

    filesystem: Any
    path: str
    format: str

    @property
    def name(self) -> str:
        return (
            self.path
            if isinstance(self.filesystem, pa.fs.LocalFileSystem)
            else f"{self.filesystem.type_name}:{self.path}"
        )

    def stream(self) -> Any:
        """Its bytes from the start, decompressed if the suffix says so."""
        return self.filesystem.open_input_stream(self.path, compression="detect")


def find_files(source: str, format: str = "auto") -> list[File]:
    """The files that are not empty, sorted by path; in a folder only those of a known format and not hidden.

    Raises UserError if there is none, if the format cannot be told, or if formats are mixed.
    """
    try:
        filesystem, path = _locate(source)
        infos = _matches(filesystem, path, source)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot open {source}: {str(error).splitlines()[0]}") from None
    if len(infos) > 1:  # beside the data there may lie a README
        infos = [
            info for info in infos if _format(info.path) in (SUFFIXES.values() if format == "auto" else (format,))
        ] or infos
    if not any(info.size for info in infos):
        raise UserError(f"{source} is empty ({len(infos)} file(s) of 0 bytes); give data.source a file with rows")
    paths = sorted(info.path for info in infos if info.size)
    formats = {_format(path) if format == "auto" else format for path in paths}
    if len(formats) > 1:
        raise UserError(
            f"{source} mixes {', '.join(sorted(map(str, formats)))} files; name one kind: {source.rstrip('/')}/*.jsonl"
        )
    (chosen,) = formats
    if chosen is None:
        raise UserError(
            f"{source}: the suffix of {PurePosixPath(paths[0]).name} does not tell its format; "
            "set data.format: jsonl, csv or parquet"
        )
    return [File(filesystem, path, chosen) for path in paths]


def _format(path: str) -> str | None:
    name = PurePosixPath(path.lower())
    return SUFFIXES.get(PurePosixPath(name.stem).suffix if name.suffix in COMPRESSED else name.suffix)


def _locate(source: str) -> tuple[Any, str]:
    """The filesystem and the path on it, wildcards kept. In a URL `?` begins the options, such as endpoint_override."""
    if "://" not in source:
        return pa.fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(source))
    address, mark, options = source.partition("?")
    plain = re.split(r"[*\[]", address, maxsplit=1)[0]
    base = address if plain == address else plain.rpartition("/")[0]
    filesystem, path = pa.fs.FileSystem.from_uri(base + mark + options)
    return filesystem, path + address[len(base) :]


def _matches(filesystem: Any, path: str, source: str) -> Sequence[Any]:
    """FileInfo of the file, of the files in the folder, or of those that the glob matches."""
    info = filesystem.get_file_info(path)
    if info.type == pa.fs.FileType.File:
        return [info]
    if info.type == pa.fs.FileType.Directory:
        found = _files(_children(filesystem, path))
        if not found:
            raise UserError(
                f"folder {source} holds no file; {_inside(filesystem, path)}; "
                f"folders in it are read with {source.rstrip('/')}/**/*.jsonl"
            )
        return found
    found = _glob(filesystem, path) if _WILD.search(path) else []
    if not found:
        raise UserError(f"no file {source}; {_inside(filesystem, path)}")
    return found


def _glob(filesystem: Any, path: str) -> list[Any]:
    """Files matching a pattern part by part; `**` stands for any number of folders."""
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if _WILD.search(part))
    folders = ["/".join(parts[:first]) or "/"]
    for part in parts[first:-1]:
        deep = part == "**"
        below = [info for folder in folders for info in _children(filesystem, folder, recursive=deep)]
        inner = [
            info.path
            for info in below
            if info.type == pa.fs.FileType.Directory and (deep or fnmatchcase(info.base_name, part))
        ]
        folders = [*folders, *inner] if deep else inner
    candidates = [info for folder in folders for info in _files(_children(filesystem, folder))]
    return [info for info in candidates if fnmatchcase(info.base_name, parts[-1])]


def _children(filesystem: Any, folder: str, recursive: bool = False) -> list[Any]:
    """What lies in a folder and is not hidden (`.` and `_` begin the names of markers and drafts)."""
    infos = filesystem.get_file_info(pa.fs.FileSelector(folder, allow_not_found=True, recursive=recursive))
    inner = [(info, info.path[len(folder) :].strip("/").split("/")) for info in infos]
    return [info for info, names in inner if not any(name.startswith((".", "_")) for name in names)]


def _files(infos: Sequence[Any]) -> list[Any]:
    return [info for info in infos if info.type == pa.fs.FileType.File]


def _inside(filesystem: Any, path: str) -> str:
    """What lies in the nearest folder above `path` that exists."""
    folder = path
    while "/" in folder and filesystem.get_file_info(folder).type != pa.fs.FileType.Directory:
        folder = folder.rpartition("/")[0]
    names = sorted(info.base_name for info in _children(filesystem, folder or "/"))
    return f"in {folder or '/'}: {', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}"
