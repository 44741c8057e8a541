"""The built-in data `builtin:docstrings`: a signature as prompt, the first sentence of its docstring as response.

The text stands on every machine that can run this project: the standard library is the server's public corpus,
installed packages are the edges. Sources are read by `ast`, never imported, and the result is cached per user.

Splits go by file, so that neighbours in a module stay together, and a held-out sentence that also stands in a train
file is dropped. Recipe: ours.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib.metadata
import importlib.util
import os
import platform
import re
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import platformdirs
import pyarrow as pa

from fedpipe_ray.errors import UserError

PROMPT = "def {signature} ->"
RESPONSE = " {sentence}"

RECIPE_VERSION = 2  # raise it when anything below changes the rows: it is part of every cache key
MAX_FILES = 1000  # of a package, drawn by hash: an edge has thousands of rows, and a first run parses for 15 s less
MAX_COPIES = 3
SENTENCE_CHARACTERS = (12, 200)
SIGNATURE_CHARACTERS = 160
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"})
LARGE_PACKAGES = ("torch", "transformers", "ray", "sympy", "numpy", "scipy", "pandas", "sklearn")  # > 1500 pairs each

Progress = Callable[[str, int, int], None]  # package, files read, files in all
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_HOLD = ("body", "handlers", "cases", "orelse", "finalbody")  # fields of statements, in their order
_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)\.(?=\s|$)")


@dataclass(frozen=True)
class _Source:
    """The Python files of one package: `files` maps the path relative to the package, in sorted order, to the file."""

    package: str
    version: str
    files: dict[str, Path]

    def key(self) -> str:
        """16 hex digits that change with the package, its files' sizes, the recipe, or the Python that parses."""
        sizes = ((name, path.stat().st_size) for name, path in self.files.items())
        parts = (self.package, self.version, RECIPE_VERSION, platform.python_version_tuple()[:2], *sizes)
        return blake2b(repr(parts).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class _Docstring:
    file: str
    signature: str  # empty for a module
    text: str
    sentence: str


def read_pairs(package: str, progress: Progress | None = None) -> pa.Table:
    """All pairs of an installed package, or of the standard library for "stdlib"; cached on disk after the first call.

    Returns string columns `signature`, `sentence`, `file` (relative to the package, "/" between folders) and `split`
    ("train", "validation", "test"), in the order of the sorted files. A sentence stands at most three times in all.
    Raises UserError, a ValueError, if there is no such package or it holds no pair. Recipe: ours.
    """
    return _table("pairs", package, progress)


def public_docstrings(package: str = "stdlib", progress: Progress | None = None) -> list[str]:
    """Whole docstrings of the train files, without repeats: text to pretrain on that shows no held-out file.

    In the order of the sorted files, and cached as the pairs are. Raises UserError as read_pairs does. Recipe: ours.
    """
    texts: list[str] = _table("docstrings", package, progress)["text"].to_pylist()
    return texts


def pairs_hash(table: pa.Table) -> str:
    """12 hex digits of the rows, their order and split: package versions move every figure, so figures name it."""
    digest = blake2b(digest_size=6)
    for row in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
        digest.update("\x1f".join(row).encode() + b"\x1e")
    return digest.hexdigest()


def split_of(package: str, file: str) -> str:
    """The split of a file: 1 in 10 is test, 1 in 20 validation. The package is hashed too: no name has a fixed side."""
    bucket = int.from_bytes(blake2b(f"{package}/{file}".encode(), digest_size=8).digest(), "big") % 20
    return "test" if bucket < 2 else "validation" if bucket == 2 else "train"


def cache_folder() -> Path:
    """The user's cache folder of this project; XDG_CACHE_HOME moves it. It need not exist."""
    return Path(platformdirs.user_cache_dir("fedpipe-ray"))


# -- finding a package without importing it


def _find(package: str) -> _Source:
    if package == "stdlib":
        return _Source(package, platform.python_version(), _python_files(Path(sysconfig.get_path("stdlib"))))
    spec = None
    if package.isidentifier():  # find_spec imports the parents of a dotted name
        with contextlib.suppress(ValueError, ImportError):
            spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"no package {package!r} is installed here; {_installed()}")
    files: dict[str, Path] = {}
    for folder in spec.submodule_search_locations or ():
        files |= _python_files(Path(folder))
    if spec.submodule_search_locations is None and spec.origin and spec.origin.endswith(".py"):
        files[Path(spec.origin).name] = Path(spec.origin)
    return _Source(package, _version(package), dict(sorted(_drawn(package, files).items())))


def _drawn(package: str, files: dict[str, Path]) -> dict[str, Path]:
    """At most MAX_FILES of a package's files, the same ones wherever they are installed."""
    order = sorted(files, key=lambda name: blake2b(f"drawn/{package}/{name}".encode(), digest_size=8).digest())
    return {name: files[name] for name in order[:MAX_FILES]}


def _python_files(root: Path) -> dict[str, Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return dict(sorted((path.relative_to(root).as_posix(), path) for path in found))


def _version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""  # another distribution's name: the sizes of the files tell versions apart, and a search takes a second


def _installed() -> str:
    names = [name for name in LARGE_PACKAGES if importlib.util.find_spec(name)]
    return f"packages here with enough pairs: {', '.join(['stdlib', *names])}"


# -- reading docstrings


def _tables(source: _Source, progress: Progress | None) -> dict[str, pa.Table]:
    found = _docstrings(source, progress)
    splits = {file: split_of(source.package, file) for file in source.files}
    known = {_normal(doc.sentence) for doc in found if splits[doc.file] == "train"}  # also those filtered below
    copies: Counter[str] = Counter()
    rows = []
    for doc in found:
        split, normal = splits[doc.file], _normal(doc.sentence)
        if not _is_pair(doc) or (split != "train" and normal in known) or copies[normal] == MAX_COPIES:
            continue
        copies[normal] += 1
        rows.append((doc.signature, doc.sentence, doc.file, split))
    texts = dict.fromkeys(doc.text for doc in found if splits[doc.file] == "train")  # ordered, without repeats
    columns = zip(*rows, strict=True) if rows else [()] * 4
    names = ("signature", "sentence", "file", "split")
    pairs = {name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)}
    return {"pairs": pa.table(pairs), "docstrings": pa.table({"text": pa.array(list(texts), pa.string())})}


def _docstrings(source: _Source, progress: Progress | None) -> list[_Docstring]:
    found: list[_Docstring] = []
    with _no_collection(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        for done, (name, path) in enumerate(source.files.items(), 1):
            with contextlib.suppress(SyntaxError, ValueError, RecursionError, OSError):  # this Python cannot read it
                found += _docstrings_of(name, ast.parse(path.read_bytes()))
            if progress is not None:
                progress(source.package, done, len(source.files))
    return found


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside: syntax trees hold no cycles, but their nodes call for full collections.

    With torch loaded, the standard library and torch took 19.9 s with collection and 9.1 s without; gc.freeze() gave
    10.8 s, and undoing it would undo the caller's too.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _docstrings_of(file: str, tree: ast.Module) -> list[_Docstring]:
    found = []
    for node in _documentable(tree):
        text = (ast.get_docstring(node) or "").encode(errors="ignore").decode()  # no lone surrogates
        if text.strip():
            found.append(_Docstring(file, _signature(node), text, _first_sentence(text)))
    return found


def _documentable(tree: ast.Module) -> Iterator[ast.Module | _Definition]:
    """The module, its functions and classes in the order of the file; ast.walk would spend its time on expressions.

    Only statements are looked into, and what can hold a definition there stands in these five lists.
    """
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | _Definition):
            yield node
        stack.extend(reversed([child for name in _HOLD for child in getattr(node, name, ())]))


def _signature(node: ast.Module | _Definition) -> str:
    """`name(arguments)` as a caller writes it: no self or cls; a class shows its __init__; "" for a module."""
    if isinstance(node, ast.Module):
        return ""
    function: ast.stmt | None = node
    if isinstance(node, ast.ClassDef):
        function = next((s for s in node.body if isinstance(s, ast.FunctionDef) and s.name == "__init__"), None)
    if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{node.name}()"
    arguments = re.sub(r"^(self|cls)\b(, /)?(, )?", "", ast.unparse(function.args))
    return f"{node.name}({arguments})"


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    end = _SENTENCE_END.search(paragraph)
    return paragraph[: end.end()] if end else paragraph


def _is_pair(doc: _Docstring) -> bool:
    low, high = SENTENCE_CHARACTERS
    right_size = low <= len(doc.sentence) <= high and 0 < len(doc.signature) <= SIGNATURE_CHARACTERS
    return right_size and doc.sentence.isascii()


def _normal(sentence: str) -> str:
    return " ".join(sentence.split()).casefold()


# -- the cache: one Arrow file a part, written aside and renamed, so that processes may race


def _table(part: str, package: str, progress: Progress | None) -> pa.Table:
    source = _find(package)
    stem = cache_folder() / "docstrings" / f"{package}-{source.key()}"
    paths = {name: stem.with_name(f"{stem.name}-{name}.arrow") for name in ("pairs", "docstrings")}
    table = _load(paths[part])
    if table is None:
        tables = _tables(source, progress)
        table = tables[part]
        for name in paths if package == "stdlib" else (part,):  # pretraining asks for both: parse once
            _save(tables[name], paths[name])
    if table.num_rows == 0:
        raise UserError(f"package {package!r} holds no docstring that makes a pair; {_installed()}")
    return table


def _load(path: Path) -> pa.Table | None:
    """The table of a cache file, or None where it is absent or its rows are not those that were written."""
    try:
        table = pa.ipc.open_file(path.read_bytes()).read_all()
        table.validate(full=True)
        whole = table.schema.metadata[b"hash"].decode() == pairs_hash(table)
        return table.replace_schema_metadata(None) if whole else None
    except (OSError, pa.ArrowException, LookupError, TypeError, ValueError):
        return None


def _save(table: pa.Table, path: Path) -> None:
    """Writes the table, or nothing where the folder cannot be written: the next call parses again."""
    stamped = table.replace_schema_metadata({"hash": pairs_hash(table)})
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
        try:
            with os.fdopen(handle, "wb") as file, pa.ipc.new_file(file, stamped.schema) as writer:
                writer.write_table(stamped)
            os.replace(aside, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)
