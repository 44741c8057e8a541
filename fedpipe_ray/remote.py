"""A run folder under a URL, on any filesystem that pyarrow reaches: the copy of a working folder on this disk.

An object store has no rename and replaces whole objects only. So every file goes there in one piece, a checkpoint has
a prefix of its own, and its manifest is written last and removed first: a prefix with a manifest is a whole checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs

from .errors import UserError

log = logging.getLogger("fedpipe")
WAITS_SECONDS = (1.0, 4.0, 16.0)  # before the second, the third and the fourth try
MANIFEST, SUMMARY = "manifest.json", "summary.json"  # each says that the files beside it are whole
OWNER = ".owner"
CHUNK_BYTES = 2**23
FAULTS = (OSError, pa.ArrowException)
Outdated = Callable[[Iterable[str]], list[str]]


def is_url(place: Path | str) -> bool:
    """Whether a place is elsewhere. `file://` is this disk."""
    return "://" in str(place) and not str(place).startswith("file://")


def local(place: Path | str) -> Path:
    """The path that a place on this disk names, also as file:///path."""
    text = str(place)
    return Path(unquote(urlsplit(text).path)) if text.startswith("file://") else Path(place)


class RemoteFolder:
    """What lies under `url`, read and written through the working folder `here`, which is called like its last part.

    One writer owns it: the last that took it. The one before notices when it next writes, and stops. Without a lock on
    the store this is as good as it gets: two that write within the same second are not kept apart.
    """

    def __init__(self, url: str) -> None:
        """Touches nothing yet. Raises UserError for what is no folder on a known filesystem."""
        address, _, _ = url.partition("?")
        if urlsplit(address).netloc and not urlsplit(address).path.strip("/"):
            raise UserError(f"{url} is a whole bucket; name a folder in it, such as {address.rstrip('/')}/runs/first")
        if urlsplit(url).password:
            raise UserError(
                "a run folder's URL must hold no password, it is written to logs; give credentials as the "
                "filesystem's own environment variables, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        try:
            self.filesystem, prefix = pa.fs.FileSystem.from_uri(url)
        except FAULTS as error:
            raise UserError(f"{url}: {first_line(error)}; known are s3://, gs://, abfs://, hdfs://") from None
        self.url, self.prefix, self.name = shlex.quote(url), prefix.rstrip("/"), PurePosixPath(address).name
        self.here = Path()
        self._token = secrets.token_hex(8)
        self._like: dict[str, tuple[int, ...]] = {}  # files that are the same on both sides, and their state here
        self._owned = self._broken = self._warned = False

    def names(self) -> list[str]:
        """Every file under the URL, but the owner's mark. Raises UserError if it cannot be reached."""
        selector = pa.fs.FileSelector(self.prefix, allow_not_found=True, recursive=True)
        try:
            infos = self.filesystem.get_file_info(selector)
        except FAULTS as error:
            raise UserError(f"{self.url}: cannot be read: {first_line(error)}; {REMEDY}") from None
        names = [info.path[len(self.prefix) + 1 :] for info in infos if info.type == pa.fs.FileType.File]
        return sorted(name for name in names if name != OWNER)

    def states(self, names: Iterable[str]) -> list[tuple[str, int, int]]:
        """(name, bytes, nanoseconds of the last change) of those files that are there. Raises UserError."""
        try:
            infos = self.filesystem.get_file_info([f"{self.prefix}/{name}" for name in names])
        except FAULTS as error:
            raise UserError(f"{self.url}: cannot be read: {first_line(error)}; {REMEDY}") from None
        there = [info for info in infos if info.type == pa.fs.FileType.File]
        return [(PurePosixPath(info.path).name, info.size, info.mtime_ns or 0) for info in there]

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints that are whole."""
        parts = [PurePosixPath(name).parts for name in self.names()]
        return [p[1] for p in parts if len(p) == 3 and p[0] == "checkpoint" and p[2] == MANIFEST]

    def check_free(self) -> None:
        """Raises UserError if something lies there already or it cannot be reached; writes nothing."""
        names = self.names()
        if "config.yaml" in names:
            raise UserError(f"{self.url} holds another run; `fedpipe resume {self.url}`, or give another --out")
        if names:
            raise UserError(f"{self.url} is not empty ({names[0]}); give a new folder with --out")

    def make_here(self) -> Path:
        """A new working folder in the system's temporary folder, which TMPDIR names."""
        self.here = Path(tempfile.mkdtemp(prefix="fedpipe-")).resolve() / self.name
        self.here.mkdir()
        return self.here

    def open(self) -> Path:
        """A new working folder with the run's files, but no checkpoint. Raises UserError if there is no run."""
        if "config.yaml" not in self.names():
            raise UserError(f"{self.url} is not a run folder: it has no config.yaml")
        self.make_here()
        try:
            self.pull()
        except BaseException:
            self.close()
            raise
        return self.here

    def claim(self) -> None:
        """Makes this process the owner. Raises UserError if that cannot be written."""
        before = self._owner()
        since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        mine = {"token": self._token, "host": socket.gethostname(), "process": os.getpid(), "since": since}
        try:
            with self.filesystem.open_output_stream(f"{self.prefix}/{OWNER}") as file:
                file.write(json.dumps(mine).encode())
        except FAULTS as error:
            raise UserError(f"cannot write to {self.url}: {first_line(error)}; {REMEDY}") from None
        if before:
            log.warning("%s was in use by %s, which ended or will stop at its next checkpoint", self.url, who(before))
        self._owned = True

    def pull(self) -> None:
        """Brings the files of the folder itself here, but no checkpoint. Raises UserError."""
        for name in self.names():
            if "/" not in name:
                try:
                    self.fetch(name)
                except FAULTS as error:
                    raise UserError(f"{self.url}: {name} cannot be read: {first_line(error)}; {REMEDY}") from None

    def fetch(self, name: str) -> Path:
        """Brings one file here, over the one that is here; returns its path. Raises OSError."""
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            self.filesystem.open_input_stream(f"{self.prefix}/{name}", compression=None) as source,
            path.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, CHUNK_BYTES)
        self._like[name] = state_of(path)
        return path

    def publish(self, outdated: Outdated) -> None:
        """Writes there what changed here, and removes what of the checkpoints is outdated. Raises UserError.

        Tries a few times; then the run must stop, for its rounds would be lost with this disk.
        """
        for count, wait in enumerate((*WAITS_SECONDS, None), start=1):
            try:
                self._write_changes()
                self._remove(outdated)
                return
            except FAULTS as error:
                if wait is None:
                    self._broken = True
                    raise UserError(
                        f"cannot write to {self.url}, tried {count} times: {first_line(error)}; mend that, then "
                        f"`fedpipe resume {self.url}`, or on this machine `fedpipe resume {self.here}`, which is later"
                    ) from error
                log.warning("cannot write to %s: %s; once more in %g s", self.url, first_line(error), wait)
                time.sleep(wait)

    def warn_of_private(self, private: Mapping[str, Mapping[str, str]]) -> None:
        """Says once which edges' private state rests in the working folder: it never leaves its node."""
        place = self.here / "private"
        edges = [edge for edge, rest in private.items() if Path(rest["path"]).is_relative_to(place)]
        if edges and not self._warned:
            log.warning("the private state of edge %s never leaves its node: it is in %s and is lost with that disk; "
                        "give these edges a private_dir that outlives it", ", ".join(edges), place)  # fmt: skip
            self._warned = True

    def close(self) -> None:
        """Writes what is left, such as the end of the log, gives the folder up, and removes the working folder.

        What could not be written stays here, and so does the private state of edges that ran here.
        """
        if self._owned and not self._broken:
            try:
                self._write_changes()
                self._delete(OWNER)
            except (*FAULTS, UserError) as error:
                log.warning("the end of the log is not in %s: %s", self.url, first_line(error))
        self._owned = False
        if self._broken or self.here == Path():  # nothing was brought here, and this is the current folder
            return
        if (self.here / "private").exists():
            log.warning("private state of edges is kept in %s; `fedpipe resume` finds it there", self.here / "private")
            for path in self.here.iterdir():
                if path.name != "private":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            shutil.rmtree(self.here.parent, ignore_errors=True)

    def _owner(self) -> dict[str, Any]:
        """Who wrote the owner's mark; empty if nobody did or it is not readable."""
        try:
            with self.filesystem.open_input_stream(f"{self.prefix}/{OWNER}", compression=None) as file:
                return dict(json.loads(file.read()))
        except (FileNotFoundError, ValueError):
            return {}
        except FAULTS as error:
            raise UserError(f"{self.url}: cannot be read: {first_line(error)}; {REMEDY}") from None

    def _check_owner(self) -> None:
        """Raises UserError if another process took the folder, OSError if that cannot be told."""
        try:
            with self.filesystem.open_input_stream(f"{self.prefix}/{OWNER}", compression=None) as file:
                found = dict(json.loads(file.read()))
        except FileNotFoundError:
            found = {}
        if found.get("token") != self._token:
            self._broken = True
            by = f"taken over by {who(found)}" if found else "removed, or taken over by a process that has ended"
            raise UserError(f"{self.url} was {by}; this run stops. What it wrote itself is in {self.here}")

    def _write_changes(self) -> None:
        """Files first, then what says that they are whole; a checkpoint that is replaced loses its manifest first."""
        self._check_owner()
        states = {}
        for path in self.here.rglob("*"):
            parts = path.relative_to(self.here).parts
            if path.is_file() and parts[0] != "private" and not any(part.startswith(".") for part in parts):
                states["/".join(parts)] = state_of(path)
        changed = [name for name, state in states.items() if self._like.get(name) != state]
        gone = {SUMMARY} - states.keys()  # nothing else: a system that tidies /tmp must not tidy the copy
        for name in self._like.keys() & {*gone, *filter(is_last, changed)}:
            self._delete(name)
            del self._like[name]
        for name in sorted(changed, key=lambda name: (is_last(name), name)):
            if is_last(name):
                self._check_owner()
            self._put(name)
            self._like[name] = states[name]

    def _put(self, name: str) -> None:
        """Writes one file there, over the one that is there, in one piece."""
        with (
            (self.here / name).open("rb") as source,
            self.filesystem.open_output_stream(f"{self.prefix}/{name}", compression=None) as file,
        ):
            shutil.copyfileobj(source, file, CHUNK_BYTES)

    def _remove(self, outdated: Outdated) -> None:
        """Removes old checkpoints, each manifest before the rest."""
        selector = pa.fs.FileSelector(f"{self.prefix}/checkpoint", allow_not_found=True)
        found = {info.base_name: info.type for info in self.filesystem.get_file_info(selector)}
        for name in outdated(found):
            if found[name] == pa.fs.FileType.Directory:
                self._delete(f"checkpoint/{name}/{MANIFEST}")
                self.filesystem.delete_dir(f"{self.prefix}/checkpoint/{name}")
            else:
                self._delete(f"checkpoint/{name}")

    def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.prefix}/{name}")


REMEDY = "check its name, the credentials in the environment, and the network"


def is_last(name: str) -> bool:
    """Whether a file says that others are whole."""
    return PurePosixPath(name).name in (MANIFEST, SUMMARY)


def state_of(path: Path) -> tuple[int, ...]:
    """Changes when a file does."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def who(owner: dict[str, Any]) -> str:
    """An owner's mark in words."""
    return f"process {owner.get('process')} on {owner.get('host')} (since {owner.get('since')})"


def first_line(error: BaseException) -> str:
    """What went wrong, without the request's headers."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
