"""Ray heads of a test's own, on loopback, with the authentication or the encryption that the test asks for."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from runs import belonging, env, free_ports

RAY = Path(sys.executable).with_name("ray")
PORTS = [
    "port", "node-manager-port", "object-manager-port", "dashboard-agent-grpc-port", "dashboard-agent-listen-port",
    "metrics-export-port", "runtime-env-agent-port", "ray-client-server-port",
]  # fmt: skip


def plain_environment(home: Path, **changes: str) -> dict[str, str]:
    """Ours with a home of its own and none of Ray's settings but loopback, so that nothing is explicit by accident."""
    kept = {name: value for name, value in env().items() if not name.startswith("RAY_")}
    own = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(home)}
    return {**kept, **own, **changes}


@contextmanager
def head(folder: Path, *more: str, port: int | None = None, **settings: str) -> Iterator[str]:
    """The address of a private head, which is ended by its own process ids. more: flags; settings: its environment."""
    ports = free_ports(len(PORTS) + 12)
    ports[0] = port or ports[0]
    flags = [f"--{name}={port}" for name, port in zip(PORTS, ports, strict=False)]
    log = folder / "head.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                str(RAY), "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", *flags,
                "--worker-port-list=" + ",".join(map(str, ports[len(PORTS) :])), f"--temp-dir={folder}",
                "--include-dashboard=false", "--disable-usage-stats", *more,
            ],
            cwd=folder, env=plain_environment(folder, **settings), stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_until_up(process, log)
        yield f"127.0.0.1:{ports[0]}"
    finally:
        family = set(belonging(folder))
        with suppress(psutil.NoSuchProcess):  # it did not come up
            own = psutil.Process(process.pid)
            family |= {own, *own.children(recursive=True)}
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def wait_until_up(process: subprocess.Popen[bytes], log: Path) -> None:
    """Until `ray start` says that it started; at most two minutes."""
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
