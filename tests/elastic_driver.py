"""A run on Ray whose rounds begin when its caller says so: a program, and the caller's side of it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from runs import ROOT, env, load


class Driver:
    """The program, in a process of its own. log: what it logged."""

    def __init__(self, log: Path, run_file: Path, private_dir: Path, *overrides: str) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(run_file), str(private_dir), *overrides],
                cwd=ROOT, env=env(PYTHONPATH=f"{Path(__file__).parent}:{ROOT}", RAY_AUTH_MODE="disabled"),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
            )  # fmt: skip

    def begin(self, nodes: int) -> None:
        """Has it begin a round once so many nodes are alive, the head among them."""
        assert self.process.stdin is not None
        print(nodes, file=self.process.stdin, flush=True)

    def answer(self) -> Any:
        """Its next line: at first the edges that are ready, then a round by edge: `ok` or the reason of a loss."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        return json.loads(line)

    def round(self, nodes: int) -> dict[str, str]:
        """A whole round."""
        self.begin(nodes)
        found: dict[str, str] = self.answer()
        return found

    def end(self) -> int:
        """Has it end its fleet; its exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(120)

    def close(self) -> None:
        """Ends it if it still runs."""
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.process.wait()


def main(run_file: str, private_dir: str, *overrides: str) -> None:
    """Rounds until the standard input ends; the last state goes beside the private ones."""
    os.dup2(2, 1)
    run = load(Path(run_file), *overrides)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    from actors.fleet import RayFleet
    from fedpipe_ray.loop import federate
    from fedpipe_ray.methods import make_method
    from fedpipe_ray.report import Report
    from fedpipe_ray.run import server_site

    method = make_method(run.method)
    fleet = RayFleet(run, method, Path(private_dir))
    try:
        say([one.edge for one in fleet.open()])
        server = server_site(run, method, fleet.classes)
        rounds = federate(method, fleet, server, rounds=run.rounds, seed=run.seed, evaluate_every=0)
        for line in sys.stdin:
            wait_for(int(line))
            done = next(rounds)
            say({edge: "ok" if isinstance(one, Report) else one.reason for edge, one in done.outcomes.items()})
            done.state.save(Path(private_dir, "state.safetensors"))
    finally:
        fleet.close()


def wait_for(nodes: int) -> None:
    """Until the cluster has so many nodes; at most two minutes."""
    import ray

    deadline = time.monotonic() + 120
    while sum(node["Alive"] for node in ray.nodes()) != nodes:
        assert time.monotonic() < deadline, ray.nodes()
        time.sleep(0.05)


OUT = os.fdopen(os.dup(1), "w") if __name__ == "__main__" else None  # Ray prints too, and that goes to the log


def say(what: Any) -> None:
    print(json.dumps(what), file=OUT, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
