"""One driver a campaign: a lock in its database while the driver's connection lives, and a mark in its folder."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage

from fedpipe_ray.errors import UserError
from fedpipe_ray.files import locked, write_atomically

from .study import backend_of

DRIVER = "driver"  # the study's attribute that says who carries it out, in words
CHECK_SECONDS = 5.0  # between two looks whether the lock is still held


class Claim:
    """A driver's right to a study in a database, which the server takes back when the connection ends.

    PostgreSQL's advisory lock or MySQL's GET_LOCK; in a journal file's folder the folder's own lock is enough. Raises
    UserError if another driver has it.
    """

    def __init__(self, study: optuna.Study, folder: Path) -> None:
        storage = backend_of(study)
        self._engine: Any = storage.engine if isinstance(storage, RDBStorage) else None
        self._study, self._connection, self._looked_at = study, None, time.monotonic()
        if self._engine is None:
            return
        self._take("is being carried out by")
        who = f"process {os.getpid()} on {socket.gethostname()}, folder {folder.absolute()}"
        study.set_user_attr(DRIVER, who)

    def _take(self, state: str) -> None:
        """Raises UserError if another driver has it."""
        import sqlalchemy

        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        name = f"fedpipe {self._engine.url.database} {self._study.study_name}"
        key: int | str
        digest = hashlib.sha256(name.encode()).digest()
        if self._engine.dialect.name == "postgresql":
            for setting in ("idle = 30", "interval = 10", "count = 3"):  # of a machine that is gone the server hears
                connection.execute(sqlalchemy.text(f"SET tcp_keepalives_{setting}"))
            ask, key = "SELECT pg_try_advisory_lock(:key)", int.from_bytes(digest[:8], "big", signed=True)
        else:
            ask, key = "SELECT GET_LOCK(:key, 0)", "fedpipe-" + digest.hex()[:40]
        if connection.execute(sqlalchemy.text(ask), {"key": key}).scalar():
            self._connection = connection
            return
        connection.close()
        who = self._study.user_attrs.get(DRIVER, "another driver")
        raise UserError(
            f"study {self._study.study_name!r} {state} another driver ({who}); end that one and give the same command "
            "again, or give this campaign another name"
        )

    def check(self) -> None:
        """Takes the lock again where its connection was lost. Raises UserError if another driver was faster."""
        if self._connection is None or time.monotonic() < self._looked_at + CHECK_SECONDS:
            return
        self._looked_at = time.monotonic()
        import sqlalchemy

        try:
            self._connection.execute(sqlalchemy.text("SELECT 1"))
        except sqlalchemy.exc.SQLAlchemyError:
            self.release()
            self._take("was taken over, while the database could not be reached, by")

    def release(self) -> None:
        """Lets another driver in."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):  # it may be lost
                connection.invalidate()
            with suppress(Exception):
                connection.close()


@contextmanager
def own_folder(folder: Path, name: str, storage: str) -> Iterator[None]:
    """Locks a campaign's folder and marks it as its own. storage: where its trials are, without a password.

    Raises UserError if it is in use, or holds a run or another campaign.
    """
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} holds a run; give the campaign a folder of its own with --out")
    with locked(folder, "a campaign"):
        mark, path = {"name": name, "storage": storage}, folder / "study.json"
        try:
            theirs = json.loads(path.read_text()) if path.exists() else mark
        except ValueError:
            raise UserError(
                f"{path} is damaged; remove it if {folder} is this campaign's, or give another --out"
            ) from None
        if theirs != mark:
            raise UserError(
                f"{folder} holds campaign {theirs['name']!r}, stored in {theirs['storage']}; this is {name!r}, stored "
                f"in {storage}: give it another folder with --out, or go on with that one by its own name and storage"
            )
        write_atomically(path, json.dumps(mark) + "\n")
        yield
