"""Workers as forks of a process that has imported what they need."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from runs import ROOT, env

from actors import connect

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forks on Linux only")


class Worker:
    """An actor that says what kind of process it is."""

    def __init__(self) -> None:
        self.torch_there = "torch" in sys.modules

    def facts(self) -> dict[str, Any]:
        import random

        import numpy as np

        return {
            "pid": os.getpid(), "parent": os.getppid(), "torch there": self.torch_there,
            "job": os.environ["RAY_JOB_ID"], "numbers": (random.random(), float(np.random.rand())),
        }  # fmt: skip


def test_workers_are_forks_with_an_environment_of_their_own(ray_here: None) -> None:
    (zygote, _) = connect._zygotes[-1]
    actors = [ray.remote(Worker).options(num_cpus=0.1).remote() for _ in range(2)]
    one, other = ray.get([actor.facts.remote() for actor in actors])
    for actor, found in zip(actors, (one, other), strict=True):
        ray.kill(actor)
        assert found["parent"] == zygote.pid
        assert found["torch there"]
        assert found["job"] == ray.get_runtime_context().get_job_id()
    assert one["pid"] != other["pid"]
    assert one["numbers"] != other["numbers"]  # the zygote's state of a generator would be everybody's


def test_without_the_zygote_a_worker_is_an_ordinary_one(tmp_path: Path) -> None:
    """Nobody listens, or there is no such folder: the script is run as if it had been started itself."""
    script = tmp_path / "script.py"
    script.write_text("import sys, os; print(sys.argv[1:], os.environ['OURS'])")
    listening = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(listening))  # bound, and closed: refuses
    for place in (listening, tmp_path / "gone" / "socket"):
        command = [sys.executable, "-I", "-S", str(ROOT / "actors" / "zygote.py"), "ask", str(place), str(script), "x"]
        done = subprocess.run(command, env=env(OURS="yes"), capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == "['x'] yes\n"


def test_it_ends_with_who_started_it(tmp_path: Path) -> None:
    """Also where that is killed: its standard input ends."""
    program = """
import os, sys, time
from actors import connect
connect.forked_workers()
print(connect._zygotes[0][0].pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], env=env(), cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        zygote = psutil.Process(int(process.stdout.readline()))
        assert zygote.is_running()
        process.kill()
    deadline = time.monotonic() + 120  # it finishes its imports first
    while zygote.is_running() and zygote.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)
