"""What does it cost to start an edge of two processes, and when does it pay?

    python -m benchmarks.parallel_edge [--quick]

One edge of the built-in model on the docstrings of numpy, one thread a process, on the CPU through gloo. Start: from an
empty Ray until the edge is ready. Step: median over the rounds of what the edge itself measured.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

from benchmarks.table import publish
from fedpipe_ray.config import build, resolve
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Run

BATCHES, ROUNDS, STEPS = (4, 16, 64), 5, 8


def settings(workers: int, batch: int, rounds: int) -> dict[str, Any]:
    """A run of one edge."""
    edge = {"cpus": 2.0, "workers": workers, "data": "builtin:docstrings/numpy"}
    return {
        "rounds": rounds, "fleet": {"edges": {"a": edge}}, "method": {"name": "lora"},
        "local": {"steps": STEPS, "batch": batch}, "data": {"max_length": 96},
    }  # fmt: skip


def main() -> None:
    """Starts and trains with one process and with two."""
    parser = argparse.ArgumentParser(description="one edge, one process or two")
    parser.add_argument("--quick", action="store_true", help="one batch size, two rounds")
    quick = parser.parse_args().quick
    from actors.connect import connect, set_environment

    set_environment(None)
    from actors.fleet import RayFleet
    from fedpipe_ray.loop import federate
    from fedpipe_ray.methods import make_method
    from fedpipe_ray.pretrain import builtin_model

    builtin_model()
    connect(None)
    rows = []
    for batch in BATCHES[:1] if quick else BATCHES:
        for workers in (1, 2):
            run = resolve(build(Run, settings(workers, batch, 2 if quick else ROUNDS)))
            method = make_method(run.method)
            began = time.perf_counter()
            fleet = RayFleet(run, method)
            fleet.open()
            start = time.perf_counter() - began
            rounds = federate(
                method, fleet, server_site(run, method, []), rounds=run.rounds, seed=0, evaluate_every=0
            )  # fmt: skip
            costs = [done.reports[0].cost for done in rounds][1:]
            fleet.close()
            rows.append({
                "processes": workers, "batch": batch, "start s": start,
                "step ms": 1e3 * median(cost.step_seconds for cost in costs),
                "round s": median(cost.seconds for cost in costs),
            })  # fmt: skip
    name = f"parallel_edge{'_quick' if quick else ''}"
    publish(name, "An edge of one process and of two", rows, rounds=ROUNDS, steps=STEPS, seed=0)


if __name__ == "__main__":
    main()
