"""`fedpipe submit`, and plain `ray job submit`, on a cluster that does not have this project."""

from __future__ import annotations

import http.server
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from runs import ROOT, assert_same, belonging, env, free_ports, here, manifest, summary, tensors

RAY = Path(sys.executable).with_name("ray")
TOKEN = secrets.token_hex(32)
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
    ray = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return {**kept, **ray, **changes}


@dataclass(frozen=True)
class Head:
    """A private head on loopback. dashboard: where jobs are submitted."""

    dashboard: str
    folder: Path

    def ray_submit(self, code: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of `python -m fedpipe_ray ...` from the folder `code`."""
        command = [RAY, "job", "submit", "--address", self.dashboard, "--working-dir", "."]
        return subprocess.run(
            [*map(str, command), "--", "python", "-m", "fedpipe_ray", *map(str, arguments)],
            cwd=code, env=environment(), capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip

    def submit(self, code: Path, log: Path, *arguments: object, **changes: str) -> subprocess.Popen[bytes]:
        """`fedpipe submit ...` in the folder `code`, whose output goes to `log`."""
        command = [sys.executable, "-m", "fedpipe_ray", "submit", *arguments, "--address", self.dashboard]
        with log.open("w") as file:
            return subprocess.Popen(
                list(map(str, command)), cwd=code, env=environment(**changes), stdout=file, stderr=subprocess.STDOUT
            )

    def jobs(self) -> list[str]:
        """The status of every job, the last first."""
        with urllib.request.urlopen(asking(f"{self.dashboard}/api/jobs/"), timeout=30) as answer:
            found = [job for job in json.load(answer) if job["submission_id"]]
        return [job["status"] for job in sorted(found, key=lambda job: -job["start_time"])]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """It is ended by its own process ids; `ray stop` would end every other Ray of this machine too."""
    ray_folder = Path(tempfile.mkdtemp(prefix="fp-", dir="/tmp"))  # short: Ray puts sockets in it
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
        cwd=ray_folder, env=environment(PATH=f"{RAY.parent}:{os.environ['PATH']}"),
        stdout=log, stderr=subprocess.STDOUT,
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
        shutil.rmtree(ray_folder, ignore_errors=True)


def asking(url: str) -> urllib.request.Request:
    """A request with the token."""
    return urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})


def wait_until_up(dashboard: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the dashboard answers; at most two minutes."""
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(asking(f"{dashboard}/api/version"), timeout=5) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


@pytest.fixture
def code(tmp_path: Path, run_file: Path) -> Path:
    """A copy of the code with a run file in it."""
    folder = tmp_path / "code"
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(run_file, folder / "job.yaml")
    return folder


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Until `condition` holds; fails if the process ends before, or after two minutes."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.services
def test_plain_ray_job_submit(head: Head, code: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (code / "mine.py").write_text(MINE)
    done = head.ray_submit(code, "run", "job.yaml", "fleet.ray=true", "method.name=mine:Mine", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (summary(out)["status"], summary(out)["rounds"]) == ("finished", 2)
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [{name: edge["status"] for name, edge in record["edges"].items()} for record in rounds] == [
        {"a": "ok", "b": "ok", "c": "ok"}
    ] * 2
    assert here("run", code / "job.yaml", "--out", tmp_path / "serial") == 0
    assert_same(tensors(out), tensors(tmp_path / "serial"))

    failed = head.ray_submit(code, "run", "none.yaml")
    assert failed.returncode == 1
    assert "no file none.yaml; in that folder: job.yaml" in failed.stdout + failed.stderr
    assert "PYTHONPATH" not in environment()
    assert os.environ.get("RAY_ADDRESS") is None


@pytest.mark.services
def test_submit_returns_what_the_driver_returned(head: Head, code: Path, run_file: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    done = head.submit(code, log, "job.yaml", "--out", out, RAY_ADDRESS="127.0.0.1:1")
    assert done.wait(240) == 0, log.read_text()
    assert "finished after 2 rounds" in log.read_text()
    assert here("run", run_file, "--out", tmp_path / "serial") == 0
    assert_same(tensors(out), tensors(tmp_path / "serial"))

    missing = "data.source=/nowhere/{edge}.jsonl"
    done = head.submit(code, log, "job.yaml", missing, "--out", out / "a b")
    assert done.wait(240) == 2, log.read_text()
    assert "edge b: no file /nowhere/b.jsonl" in log.read_text().replace("\n", " ")

    before = len(head.jobs())
    for argument, changes, message in (
        ("local.lr=high", {}, "local.lr: 'high' is not valid"),
        ("rounds=1", {"RAY_AUTH_TOKEN": "0" * 64}, "refuses this process's token"),
        ("rounds=1", {"RAY_AUTH_MODE": "disabled"}, "asks for a token: RAY_AUTH_MODE=token"),
    ):
        done = head.submit(code, log, "job.yaml", argument, **changes)
        assert done.wait(120) == 2, log.read_text()
        assert message in log.read_text()
    assert len(head.jobs()) == before


@pytest.mark.services
def test_submit_stops_the_job(head: Head, code: Path, tmp_path: Path) -> None:
    """Ctrl-C: after its round, however long that takes. Twice: it is left to do so alone."""
    out, log, hold = tmp_path / "out", tmp_path / "log", tmp_path / "hold"
    hold.mkdir()
    shutil.copy(Path(__file__).with_name("own_methods.py"), code)
    arguments = ["job.yaml", "method.name=own_methods:Held", "rounds=6", "--env", "HOLD"]
    process = head.submit(code, log, *arguments, "fleet.ray=true", "--out", out, HOLD=str(hold))
    wait_for(lambda: (hold / "held").exists() and "round   3" in log.read_text(), process, log)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "stopping after this round" in log.read_text(), process, log)
    time.sleep(4)  # Ray by itself kills a job 3 s after it asked it to stop
    assert process.poll() is None
    (hold / "go").touch()
    assert process.wait(120) == 130, log.read_text()
    assert head.jobs()[0] == "STOPPED"
    assert (summary(out)["status"], manifest(out)["round"]) == ("interrupted", 4)

    for file in hold.iterdir():
        file.unlink()
    process = head.submit(code, log, *arguments, "--out", tmp_path / "twice", HOLD=str(hold))
    wait_for((hold / "held").exists, process, log)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "stopping after this round" in log.read_text(), process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130, log.read_text()
    assert head.jobs()[0] == "RUNNING"
    (hold / "go").touch()
    deadline = time.monotonic() + 120
    while head.jobs()[0] != "STOPPED":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert summary(tmp_path / "twice")["status"] == "interrupted"


class NotRay(http.server.BaseHTTPRequestHandler):
    """Answers 200 below /open, and 404 elsewhere."""

    def do_GET(self) -> None:
        assert "Authorization" not in self.headers
        self.send_response(200 if self.path.startswith("/open") else 404)
        self.end_headers()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:{closed}", "nobody answers"),
        ("127.0.0.1:{closed}", "is the URL of the cluster's dashboard, such as http://HOST:8265"),
        ("http://127.0.0.1:{other}", "the job was not taken: Version check returned 404"),
        ("http://127.0.0.1:{open}", "has token authentication off"),
    ],
)
def test_an_address_without_a_cluster(
    address: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_AUTH_MODE", "token" if "open" in address else "disabled")
    (closed,) = free_ports(1)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotRay) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = address.format(closed=closed, other=server.server_port, open=f"{server.server_port}/open")
        assert here("submit", ROOT / "examples" / "quickstart.yaml", "--address", where, "--out", "/shared/run") == 2
        server.shutdown()
    assert message in capsys.readouterr().err


def test_what_is_not_sent(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert here("submit", run_file, "--address", "http://127.0.0.1:1") == 2
    assert f"{run_file} is not in {ROOT}, the folder that is sent" in capsys.readouterr().err
    example = ROOT / "examples" / "quickstart.yaml"
    assert here("submit", example, "--address", "http://127.0.0.1:1", "--env", "NO_SUCH_THING") == 2
    assert "--env NO_SUCH_THING: not set here" in capsys.readouterr().err
    assert here("submit", example, "--address", "http://127.0.0.1:1", "--out", "runs/first") == 2
    assert "the run folder is in the job's own copy of the code on the head" in capsys.readouterr().err
