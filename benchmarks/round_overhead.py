"""How long does a round take when the edges have nothing to do? Target: 20 ms with 4 edges on 2 cores.

    python -m benchmarks.round_overhead

Rounds 1 and 2 are left out. A round is from the plan to the line in rounds.jsonl; the checkpoint is timed apart.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

from benchmarks.empty import settings
from benchmarks.table import parser, publish
from fedpipe_ray.config import build
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.record import Checkpoint, RunFolder, round_record
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Run

REPEATS, ROUNDS = 5, 30


def main() -> None:
    """Measures serial and Ray fleets of 4 empty edges."""
    parser(__doc__).parse_args()
    from actors.connect import connect, set_environment

    set_environment(None)
    from actors.fleet import RayFleet
    from fedpipe_ray.fleet import SerialFleet
    from fedpipe_ray.loop import Start, federate
    from fedpipe_ray.methods import make_method

    connect(None)
    run = build(Run, {**settings(4), "rounds": ROUNDS})
    method = make_method(run.method)
    rows = []
    for kind, make in (("SerialFleet", SerialFleet), ("RayFleet", RayFleet)):
        medians, tails, checkpoints = [], [], []
        for _ in range(REPEATS):
            fleet = make(run, method)
            fleet.open()
            server = server_site(run, method, [])
            with tempfile.TemporaryDirectory() as place:
                folder = RunFolder.create(Path(place) / "run", run)
                point = Checkpoint(Start(method.start(server, rng_for(0, 0, "start"))), "", {})
                seconds, saving = [], []
                began = time.perf_counter()
                for done in federate(method, fleet, server, rounds=ROUNDS, seed=0, evaluate_every=0):
                    folder.append(round_record(done))
                    seconds.append(time.perf_counter() - began)
                    point.start = Start(done.state, done.number + 1)
                    began = time.perf_counter()
                    folder.save_checkpoint(point)
                    saving.append(time.perf_counter() - began)
                    began = time.perf_counter()
            fleet.close()
            medians.append(1e3 * median(seconds[2:]))
            tails.append(1e3 * quantiles(seconds[2:], n=10)[-1])
            checkpoints.append(1e3 * median(saving[2:]))
        rows.append({
            "fleet": kind, "round ms, median": median(medians), "best": min(medians), "worst": max(medians),
            "90th percentile": median(tails), "checkpoint ms": median(checkpoints), "target ms": 20,
        })  # fmt: skip
    publish("round_overhead", "Round overhead, 4 empty edges", rows, repeats=REPEATS, rounds=ROUNDS, seed=0)


if __name__ == "__main__":
    main()
