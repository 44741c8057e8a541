"""What tests of whole runs share: a fleet by name, and a run through the command line in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from fedpipe_ray.__main__ import main
from fedpipe_ray.config import load_run
from fedpipe_ray.fleet import Fleet, SerialFleet
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.methods.base import Method
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Run
from fedpipe_ray.site import Site

ROOT = Path(__file__).resolve().parent.parent
WORDS = "alpha, beta, gamma, delta, one, two, three, four, five, six, red, green, blue, north, south"


def tiny_run(folder: Path, model_dir: Path, data_dir: Path) -> Path:
    """tiny.yaml in `folder`: three edges with data of their own, two rounds, in this process."""
    path = folder / "tiny.yaml"
    edge = "{cpus: 0.1, compute_flops: 1GFLOP/s}"
    path.write_text(f"""
rounds: 2
model: {{name: {model_dir}}}
data:
  {{source: "{data_dir}/{{edge}}.jsonl", prompt: "{{question}}", response: "{{answer}}", max_length: 16,
   validation: 0.2, test: 0.2}}
fleet:
  ray: false
  edges: {{a: {edge}, b: {edge}, c: {{cpus: 0.1, compute_flops: 500MFLOP/s, uplink_bps: 1Mbit/s}}}}
method: {{name: lora, rank: 4, alpha: 8}}
local: {{steps: 4, batch: 4, lr: 0.01}}
""")
    return path


def emulated(deep_dir: Path, public_file: Path) -> list[str]:
    """What `fedbiot` needs beside tiny.yaml: a deeper model, and rows of the server's own."""
    rows = f'{{source: "{public_file}", prompt: "{{question}}", response: "{{answer}}", max_length: 16}}'
    return [
        "method={name: fedbiot, a: 2, beta: 0.2, rank: 4, alpha: 8, prealign_steps: 6, align_steps: 2, align_batch: 4}",
        f"model.name={deep_dir}", f"server.data={rows}",
    ]  # fmt: skip


def labelled(data_dir: Path) -> str:
    """data of tiny.yaml as a task of 15 classes, which the last word tells."""
    return (
        f'data={{source: "{data_dir}/{{edge}}.jsonl", task: classification, text: "{{question}} {{answer}}", '
        f"label: answer, labels: [{WORDS}], max_length: 16, validation: 0.2, test: 0.2}}"
    )


def held_run(folder: Path, model_dir: Path, data_dir: Path, rounds: int) -> Path:
    """The same with more rounds and a method that can be held in the middle of a round, as `Started` does."""
    path = tiny_run(folder, model_dir, data_dir)
    path.write_text(path.read_text().replace("rounds: 2", f"rounds: {rounds}").replace("lora,", "own_methods:Held,"))
    return path


def load(path: Path, *overrides: str) -> Run:
    """The run in `path`, which names no profile file."""
    return load_run(path, overrides, lambda name, _: {})


def fleet_of(kind: str, run: Run, method: Method, private: Path | None = None) -> Fleet:
    """`serial`, `ray`, or `packed`: on two workers."""
    if kind == "serial":
        return SerialFleet(run, method, private)
    from actors.fleet import RayFleet

    if kind == "packed":
        run = dataclasses.replace(run, fleet=dataclasses.replace(run.fleet, placement="packed", workers=2))
    return RayFleet(run, method, private)


def command(*arguments: object, **environment: str) -> list[str]:
    """`python -m fedpipe_ray ...` as an argument vector."""
    return [sys.executable, "-m", "fedpipe_ray", *map(str, arguments)]


def fedpipe(
    *arguments: object, timeout: float = 240, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command line and waits for it."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=env(**environment),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def here(*arguments: object) -> int:
    """The command line in this process, which is faster; its exit code. Signals are handled as before afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in a shell's background
    try:
        return main([str(argument) for argument in arguments])
    finally:
        for log in logging.getLogger("fedpipe").handlers:
            log.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def env(**changes: str) -> dict[str, str]:
    """This process's environment with the repository on the path."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **changes}


def belonging(folder: Path) -> list[psutil.Process]:
    """The processes with `folder` in their command line or environment, without those that only wait to be reaped."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
            if any(str(folder) in word for word in words) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def tensors(folder: Path) -> dict[str, Any]:
    """The exported adapter's tensors."""
    from safetensors.torch import load_file

    return dict(load_file(folder / "adapter" / "adapter_model.safetensors"))


def assert_same(first: dict[str, Any], second: dict[str, Any], names: Sequence[str] = ()) -> None:
    """Bit for bit."""
    import torch

    assert first.keys() == second.keys()
    for name in names or first:
        assert torch.equal(first[name], second[name]), name


class Started:
    """The command line in a process of its own, whose method waits for `release` in the middle of a round."""

    def __init__(self, folder: Path) -> None:
        self.hold, self.log = folder / "hold", folder / "log"
        self.hold.mkdir()
        self.path = f"{Path(__file__).parent}:{ROOT}"  # own_methods is found there

    def run(self, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        """Starts it, and returns when it waits."""
        settings = env(PYTHONPATH=self.path, HOLD=str(self.hold), **environment)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command("run", *arguments), cwd=ROOT, env=settings, stdout=log, stderr=subprocess.STDOUT, text=True
            )
        self.wait_for((self.hold / "held").exists)
        return self.process

    def release(self) -> None:
        """Lets the round go on."""
        (self.hold / "go").touch()

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until `condition` holds; fails if the process ends before, or after four minutes."""
        deadline = time.monotonic() + 240
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)


def records(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of rounds.jsonl."""
    path = folder / "rounds.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    )


def repeatable(folder: Path) -> list[dict[str, Any]]:
    """rounds.jsonl without what a clock or the operating system measured."""
    found = records(folder)
    for record in found:
        for part in (record, *record["edges"].values()):
            for key in (
                "wall_seconds",
                "evaluate_seconds",
                "seconds",
                "step_seconds",
                "peak_memory_bytes",
                "training_memory_bytes",
            ):
                part.pop(key, None)
    return found


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def manifest(folder: Path) -> dict[str, Any]:
    """Of the newest checkpoint."""
    return dict(json.loads((max((folder / "checkpoint").glob("round-*")) / "manifest.json").read_text()))


def assert_like(folder: Path, other: Path) -> None:
    """Same adapter, same record of the rounds, same summary but for measured time."""
    assert_same(tensors(folder), tensors(other))
    assert repeatable(folder) == repeatable(other)
    one, two = summary(folder), summary(other)
    for found in (one, two):
        found["totals"].pop("wall_seconds")
    assert one == two


def flip(path: Path) -> None:
    """Changes the last byte of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def free_ports(count: int) -> list[int]:
    """Ports of which nobody listened on any just now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def opened_run(run_file: Path, *overrides: str) -> tuple[SerialFleet, Any, Site, Message]:
    """A fleet in this process, its method, the server, and the state before round 0."""
    run = load(run_file, *overrides)
    method = make_method(run.method)
    fleet = SerialFleet(run, method)
    fleet.open()
    server = server_site(run, method, fleet.classes)
    return fleet, method, server, method.start(server, rng_for(run.seed, 0, "start"))
