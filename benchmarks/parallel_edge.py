"""What does it cost to start an edge of two processes, and when does it pay?

    python -m benchmarks.parallel_edge [--quick]

One edge with a Llama of 0.86M parameters and rows of 64 tokens, one thread a process, on the CPU through gloo. Start:
from an empty Ray until the edge is ready. Step: median over the rounds of what the edge itself measured.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.small_llama import TOKENS, write_material
from benchmarks.table import publish
from fedpipe_ray.config import build, resolve
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Run

BATCHES, ROUNDS, STEPS = (4, 16, 64), 5, 8


def settings(given: Mapping[str, str], workers: int, batch: int, rounds: int) -> dict[str, Any]:
    """A run of one edge."""
    return {
        "rounds": rounds, "fleet": {"edges": {"e0": {"cpus": 2.0, "workers": workers}}}, "method": {"name": "lora"},
        "local": {"steps": STEPS, "batch": batch}, "model": {"name": given["model"]},
        "data": {
            "source": given["data"], "prompt": "{prompt}", "response": "{response}", "max_length": TOKENS,
            "validation": 0.0, "test": given["test"],
        },
    }  # fmt: skip


def main() -> None:
    """Starts and trains with one process and with two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one batch size, two rounds")
    quick = parser.parse_args().quick
    from actors.connect import connect, set_environment

    set_environment(None)
    from actors.fleet import RayFleet
    from fedpipe_ray.loop import federate
    from fedpipe_ray.methods import make_method

    folder = Path(tempfile.mkdtemp(prefix="fedpipe-"))
    given = write_material(folder, 1, {"rank": 8, "alpha": 16.0})
    connect(None)
    rows = []
    for batch in BATCHES[:1] if quick else BATCHES:
        for workers in (1, 2):
            run = resolve(build(Run, settings(given, workers, batch, 2 if quick else ROUNDS)))
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
    shutil.rmtree(folder)
    name = f"parallel_edge{'_quick' if quick else ''}"
    publish(name, "An edge of one process and of two", rows, rounds=ROUNDS, steps=STEPS, seed=0)


if __name__ == "__main__":
    main()
