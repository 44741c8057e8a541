"""What does a 100 MB update cost on its way, and how many updates does the driver hold?

    python -m benchmarks.update_transfer

Put: into the object store, against one plain copy of as many bytes. Get: a view, against the same. Driver: peak of
anonymous memory (the store's shared pages are not the driver's) over rounds with 8 edges of 100 MB, in updates; the
state a round starts from is one of them, the sum it ends with another.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.empty import settings
from benchmarks.table import parser, publish
from fedpipe_ray.config import build
from fedpipe_ray.message import Message
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Run

SIZE, REPEATS, EDGES = 100_000_000, 7, 8


def anonymous_bytes() -> int:
    """Private memory of this process, shared mappings left out."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def main() -> None:
    """Measures put, get, and the driver's memory."""
    parser(__doc__).parse_args()
    from actors.connect import connect, set_environment

    set_environment(None)
    import ray

    from actors.fleet import RayFleet
    from fedpipe_ray.loop import federate
    from fedpipe_ray.methods import make_method

    connect(None)
    copies, puts, gets = [], [], []
    tensor = torch.rand(SIZE // 4)
    target = torch.empty_like(tensor)
    for _ in range(REPEATS):
        began = time.perf_counter()
        target.copy_(tensor)
        copies.append(time.perf_counter() - began)
        began = time.perf_counter()
        ref = ray.put(Message({"w": tensor}))
        puts.append(time.perf_counter() - began)
        began = time.perf_counter()
        ray.get(ref)
        gets.append(time.perf_counter() - began)
        del ref
    del tensor, target
    run = build(Run, {**settings(EDGES, 0.05, SIZE), "rounds": 3})
    method = make_method(run.method)
    fleet = RayFleet(run, method)
    fleet.open()
    before, peak, stop = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    threading.Thread(target=watch, daemon=True).start()
    rounds = federate(method, fleet, server_site(run, method, []), rounds=3, seed=0, evaluate_every=0)
    seconds = [done.wall_seconds for done in rounds]
    stop.set()
    fleet.close()
    copy, put = median(copies), median(puts)
    rows = [{
        "copy ms": 1e3 * copy, "put ms": 1e3 * put, "get ms": 1e3 * median(gets), "put / copy": put / copy,
        f"round of {EDGES} x 100 MB, s": median(seconds[1:]), "driver peak, updates": (peak[0] - before) / SIZE,
    }]  # fmt: skip
    publish("update_transfer", "A 100 MB update", rows, repeats=REPEATS)


if __name__ == "__main__":
    main()
