"""`ray job submit --working-dir . -- python -m fedpipe_ray run ...` on a cluster that does not have this project."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from runs import ROOT, assert_same, belonging, env, free_ports, here, tensors

RAY = Path(sys.executable).with_name("ray")
PARTS = ("fedpipe_ray", "actors", "tuning", "clusters")
MINE = '''
"""A method in the working directory: it must reach the driver and the edges, with the code beside it."""

from dataclasses import dataclass
from pathlib import Path

import actors
import fedpipe_ray
from fedpipe_ray.methods.lora import Lora


@dataclass(frozen=True, kw_only=True)
class Mine(Lora):
    """LoRA that trains only where all code comes from its own folder."""

    def local_update(self, order, site, rng):
        for package in (fedpipe_ray, actors):
            assert Path(package.__file__).parents[1] == Path(__file__).parent, package.__file__
        return super().local_update(order, site, rng)
'''


def environment(**changes: str) -> dict[str, str]:
    """Ours, without anything that leads to this checkout, and with every setting of Ray made explicit."""
    kept = {name: value for name, value in env().items() if name != "PYTHONPATH" and not name.startswith("RAY_")}
    ray = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    return {**kept, **ray, **changes}


@dataclass(frozen=True)
class Head:
    """A private head on loopback. dashboard: where jobs are submitted."""

    dashboard: str
    folder: Path

    def submit(self, code: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of `python -m fedpipe_ray ...` from the folder `code`."""
        command = [RAY, "job", "submit", "--address", self.dashboard, "--working-dir", "."]
        return subprocess.run(
            [*map(str, command), "--", sys.executable, "-m", "fedpipe_ray", *map(str, arguments)],
            cwd=code, env=environment(), capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip


@pytest.fixture
def head(ray_folder: Path) -> Iterator[Head]:
    """It is ended by its own process ids; `ray stop` would end every other Ray of this machine too."""
    names = [
        "port", "dashboard-port", "node-manager-port", "object-manager-port", "dashboard-agent-grpc-port",
        "dashboard-agent-listen-port", "metrics-export-port", "runtime-env-agent-port", "ray-client-server-port",
    ]  # fmt: skip
    ports = free_ports(len(names) + 12)
    flags = [f"--{name}={port}" for name, port in zip(names, ports, strict=False)]
    dashboard = f"http://127.0.0.1:{ports[1]}"
    log = (ray_folder / "head.log").open("w")
    process = subprocess.Popen(
        [
            str(RAY), "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", *flags,
            "--worker-port-list=" + ",".join(map(str, ports[len(names) :])), f"--temp-dir={ray_folder}",
            "--include-dashboard=true", "--dashboard-host=127.0.0.1", "--disable-usage-stats",
        ],
        cwd=ray_folder, env=environment(), stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        wait_until_up(dashboard, process, ray_folder / "head.log")
        yield Head(dashboard, ray_folder)
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in {*family, *belonging(ray_folder)}:
            if member.is_running():
                member.kill()
        process.wait()
        log.close()


def wait_until_up(dashboard: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the dashboard answers; at most two minutes."""
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"{dashboard}/api/version", timeout=5) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


def test_as_a_job(head: Head, run_file: Path, tmp_path: Path) -> None:
    code, out = tmp_path / "code", tmp_path / "out"
    for part in PARTS:
        shutil.copytree(ROOT / part, code / part, ignore=shutil.ignore_patterns("__pycache__"))
    (code / "mine.py").write_text(MINE)
    config = shutil.copy(run_file, code / "job.yaml")
    done = head.submit(code, "run", "job.yaml", "fleet.ray=true", "method.name=mine:Mine", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("finished", 2)
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [{name: edge["status"] for name, edge in record["edges"].items()} for record in rounds] == [
        {"a": "ok", "b": "ok", "c": "ok"}
    ] * 2
    assert here("run", config, "--out", tmp_path / "serial") == 0
    assert_same(tensors(out), tensors(tmp_path / "serial"))

    failed = head.submit(code, "run", "none.yaml")
    assert failed.returncode == 1
    assert "no file none.yaml; in that folder: job.yaml" in failed.stdout + failed.stderr
    assert "PYTHONPATH" not in environment()
    assert os.environ.get("RAY_ADDRESS") is None
