"""A real S3 server on loopback: moto's, from an environment of its own; and a port in front of it that can be shut."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs
import pytest
from runs import free_ports

SERVER = Path(sys.prefix) / "s3-server" / "bin" / "moto_server"


@dataclass(frozen=True)
class Store:
    """An S3 server with one bucket."""

    port: int
    files: pyarrow.fs.FileSystem

    def url(self, name: str) -> str:
        return f"s3://bucket/runs/{name}"

    def names(self, name: str) -> list[str]:
        """Every object of a run, also hidden ones."""
        selector = pyarrow.fs.FileSelector(f"bucket/runs/{name}", allow_not_found=True, recursive=True)
        infos = [info for info in self.files.get_file_info(selector) if info.is_file]
        return sorted(info.path.removeprefix(f"bucket/runs/{name}/") for info in infos)

    def put(self, name: str, content: bytes) -> None:
        with self.files.open_output_stream(f"bucket/runs/{name}") as file:
            file.write(content)

    def download(self, name: str, folder: Path) -> Path:
        """The run's objects as files."""
        for one in self.names(name):
            (folder / one).parent.mkdir(parents=True, exist_ok=True)
            (folder / one).write_bytes(self.files.open_input_stream(f"bucket/runs/{name}/{one}").read())
        return folder


@contextmanager
def serving(folder: Path) -> Iterator[Store]:
    """A server, its log in `folder`; it is ended by its own process id."""
    assert SERVER.exists(), f"no {SERVER}; `make test-services` makes it"
    (port,) = free_ports(1)
    log = (folder / "log").open("w")
    process = subprocess.Popen([SERVER, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=subprocess.STDOUT)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "word",
            "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }.items():  # fmt: skip
            environment.setenv(name, value)
        try:
            wait_until_up(port, process, Path(log.name))
            files = pyarrow.fs.S3FileSystem(
                endpoint_override=f"127.0.0.1:{port}", scheme="http", allow_bucket_creation=True
            )
            files.create_dir("bucket")
            yield Store(port, files)
        finally:
            process.kill()
            process.wait()
            log.close()


def wait_until_up(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers; at most two minutes."""
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


class Gate:
    """A port in front of another; closed, it hangs up on everybody."""

    def __init__(self, port: int) -> None:
        self.behind, self.open = port, True
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            if not self.open:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self.behind))
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self.pass_on, args=(one, other), daemon=True).start()

    def pass_on(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while self.open and (data := one.recv(2**16)):
                other.sendall(data)
        except OSError:
            pass
        for end in (one, other):
            end.close()


class Opening(logging.Handler):
    """Opens a gate when the first failure is logged."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def emit(self, record: logging.LogRecord) -> None:
        self.gate.open = "once more in" in record.getMessage()
