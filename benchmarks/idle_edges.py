"""What does an edge cost that is not asked? Targets, with 10,000 edges of which 100 are asked: 20 microseconds, 2 kB.

    python -m benchmarks.idle_edges

Empty edges on two packed workers, in a process of its own each time. An idle edge's cost is the difference between
10,000 and 100 edges, divided by the edges that are not asked: of the median round (from the third on), and of the
driver's private memory after the rounds, configuration included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from statistics import median
from typing import Any

from benchmarks.empty import settings
from benchmarks.table import parser, publish
from benchmarks.update_transfer import anonymous_bytes

ASKED, EDGES, ROUNDS, REPEATS = 100, (100, 10_000), 12, 3


def measure(edges: int) -> dict[str, Any]:
    """Seconds of opening and of the median round, and bytes that the driver grew by."""
    from actors.connect import connect, set_environment

    set_environment(None)
    from actors.fleet import RayFleet
    from fedpipe_ray.config import build
    from fedpipe_ray.loop import federate
    from fedpipe_ray.methods import make_method
    from fedpipe_ray.run import server_site
    from fedpipe_ray.settings import Run

    connect(None)
    before = anonymous_bytes()
    tree: Any = settings(edges, cpus=1.0)
    tree["fleet"] |= {"placement": "packed", "workers": 2, "fraction": ASKED / edges}
    run = build(Run, tree)
    del tree
    method = make_method(run.method)
    fleet = RayFleet(run, method)
    began = time.perf_counter()
    fleet.open()
    opened = time.perf_counter() - began
    seconds = []
    server, fraction = server_site(run, method, []), run.fleet.fraction
    for done in federate(method, fleet, server, rounds=ROUNDS, seed=0, fraction=fraction, evaluate_every=0):
        assert len(done.reports) == ASKED
        seconds.append(done.wall_seconds)
    grown = anonymous_bytes() - before
    fleet.close()
    return {"open": opened, "round": median(seconds[2:]), "grown": grown}


def main() -> None:
    """Runs each size in turn, or one of them as a process of its own."""
    options = parser(__doc__)
    options.add_argument("edges", nargs="?", type=int, help="only so many, in this process, as JSON")
    if one := options.parse_args().edges:
        print(json.dumps(measure(one)))
        return
    found: dict[int, list[dict[str, Any]]] = {edges: [] for edges in EDGES}
    for _ in range(REPEATS):
        for edges in EDGES:
            command = [sys.executable, "-m", "benchmarks.idle_edges", str(edges)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[edges].append(json.loads(output.splitlines()[-1]))
    middle = {n: {key: median(one[key] for one in found[n]) for key in found[n][0]} for n in EDGES}
    few, many = (middle[n] for n in EDGES)
    idle = EDGES[1] - EDGES[0]
    rows = [
        {
            "edges": n, "asked": ASKED, "open s": middle[n]["open"], "round ms": 1e3 * middle[n]["round"],
            "driver grew MiB": middle[n]["grown"] / 2**20,
            "microseconds an idle edge": 1e6 * (many["round"] - few["round"]) / idle if n > EDGES[0] else "-",
            "bytes an idle edge": (many["grown"] - few["grown"]) / idle if n > EDGES[0] else "-",
        }
        for n in EDGES
    ]  # fmt: skip
    publish("idle_edges", "What an edge costs that is not asked", rows, repeats=REPEATS, rounds=ROUNDS, seed=0)


if __name__ == "__main__":
    main()
