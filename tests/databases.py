"""Database servers of a test's own, on loopback, in a temporary folder, as whoever may run them."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

from runs import free_ports


def user(name: str) -> dict[str, Any]:
    """Who runs a server: we, or `name` where we are root, as which servers refuse to run."""
    if os.getuid() != 0:
        return {}
    entry = pwd.getpwnam(name)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


class Server(ABC):
    """A server that takes the user fedpipe with the password secret, over TCP. url: without a database."""

    missing: ClassVar[str]
    account: ClassVar[str]
    stop: ClassVar[int]
    scheme: ClassVar[str]

    @classmethod
    @abstractmethod
    def installed(cls) -> bool:
        """Whether its programs are here; else `missing` says what to install."""

    @abstractmethod
    def begin(self) -> list[Any]:
        """Makes the folder that the server works in; the command that starts it."""

    @abstractmethod
    def connect(self) -> Any:
        """A connection, outside of transactions."""

    def __enter__(self) -> Self:
        self.folder, (self.port,) = Path(tempfile.mkdtemp(prefix="fp-db-", dir="/tmp")), free_ports(1)
        self.url = f"{self.scheme}://fedpipe:secret@127.0.0.1:{self.port}"
        who = user(self.account)
        if who:
            os.chown(self.folder, who["user"], who["group"])
        self.options: dict[str, Any] = {**who, "cwd": self.folder, "stdout": subprocess.DEVNULL}
        command = self.begin()
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, stderr=log, **self.options)
        try:
            self.wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(self.stop)
        self.process.wait(60)
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait_until_up(self) -> None:
        """Until somebody can connect; at most a minute."""
        deadline = time.monotonic() + 60
        while True:
            try:
                self.connect().close()
                return
            except Exception:  # the driver's own
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.1)

    def create(self, name: str) -> None:
        """A database."""
        connection = self.connect()
        connection.cursor().execute(f"CREATE DATABASE {name}")
        connection.close()


class PostgreSQL(Server):
    """Debian's package postgresql."""

    missing = "no /usr/lib/postgresql/*/bin; apt-get install postgresql"
    account = "postgres"
    stop = signal.SIGINT  # fast: clients are not waited for
    scheme = "postgresql"

    @staticmethod
    def binaries() -> Path | None:
        """Those of the newest version."""
        found = Path("/usr/lib/postgresql").glob("*/bin")
        return max(found, key=lambda path: int(path.parent.name), default=None)

    @classmethod
    def installed(cls) -> bool:
        return cls.binaries() is not None

    def begin(self) -> list[Any]:
        binaries, data = self.binaries(), self.folder / "data"
        assert binaries is not None
        password = self.folder / "password"
        password.write_text("secret\n")
        password.chmod(0o644)
        access = ["-U", "fedpipe", "--auth=scram-sha-256", f"--pwfile={password}"]
        subprocess.run([binaries / "initdb", "-D", data, *access], check=True, **self.options)
        flags = ["-h", "127.0.0.1", "-p", str(self.port), "-k", self.folder, "-c", "fsync=off"]
        return [binaries / "postgres", "-D", data, *flags]

    def connect(self) -> Any:
        import psycopg

        return psycopg.connect(f"{self.url}/postgres", autocommit=True)


class MariaDB(Server):
    """Debian's package mariadb-server-core: the server without the scripts around it, so its tables are made here."""

    missing = "no /usr/sbin/mariadbd; apt-get install mariadb-server-core"
    account = "nobody"
    stop = signal.SIGTERM
    scheme = "mysql"

    @classmethod
    def installed(cls) -> bool:
        return Path("/usr/sbin/mariadbd").exists()

    def begin(self) -> list[Any]:
        scripts = [f"mysql_{name}.sql" for name in ("system_tables", "performance_tables", "system_tables_data")]
        tables = b"".join(Path("/usr/share/mysql", name).read_bytes() for name in scripts)
        (first := self.folder / "first.sql").write_text(
            "CREATE USER fedpipe@'127.0.0.1' IDENTIFIED BY 'secret';\nGRANT ALL ON *.* TO fedpipe@'127.0.0.1';\n"
        )
        server: list[Any] = ["/usr/sbin/mariadbd", "--no-defaults", f"--datadir={self.folder}/data"]
        (self.folder / "data").mkdir()
        if who := user(self.account):
            os.chown(self.folder / "data", who["user"], who["group"])
        subprocess.run(
            [*server, "--bootstrap"], input=b"CREATE DATABASE mysql;\nUSE mysql;\n" + tables, check=True,
            **self.options, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return [
            *server, "--bind-address=127.0.0.1", f"--port={self.port}", f"--socket={self.folder}/socket",
            f"--pid-file={self.folder}/pid", f"--init-file={first}", "--skip-name-resolve",
        ]  # fmt: skip

    def connect(self) -> Any:
        import pymysql

        return pymysql.connect(host="127.0.0.1", port=self.port, user="fedpipe", password="secret", autocommit=True)


SERVERS: list[type[Server]] = [PostgreSQL, MariaDB]
