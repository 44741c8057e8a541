"""How fast does the server fold updates into their mean? Bar: half of this machine's memory-copy bandwidth.

    python -m benchmarks.folding [UPDATES]

1,000 updates of 80 MB, each a hundred tensors of 200,000 numbers, go through what the loop does with a report: its
message is fetched from shared memory, checked for dtypes, names, shapes and numbers that are none, and added. A few
shared buffers take turns, together many times the processor's caches; who fills them is not timed. Copy: as many bytes
from the same buffers into private memory that was written before, by numpy and by torch with one thread and with all
cores, the fastest of them; taken in turn with the folding, in stretches of 50 updates. Both are bytes of updates a
second, medians over the stretches. Memory: what the process's private memory grew by, in updates, of which the
accumulator is one.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.table import parser, publish
from benchmarks.update_transfer import anonymous_bytes
from fedpipe_ray.arriving import checked
from fedpipe_ray.averaging import average
from fedpipe_ray.config import build
from fedpipe_ray.costs import Cost
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.report import Report
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Run

NUMBERS, TENSORS, BUFFERS, STRETCH = 200_000, 100, 4, 50
SIZE = 4 * NUMBERS * TENSORS


def shared(number: int) -> torch.Tensor:
    """A buffer in shared memory, full of normals."""
    path = Path(f"/dev/shm/folding-{os.getpid()}-{number}")
    with path.open("w+b") as file:
        path.unlink()
        file.truncate(SIZE)
        found = torch.frombuffer(mmap.mmap(file.fileno(), SIZE), dtype=torch.float32)
    return found.copy_(torch.randn(NUMBERS * TENSORS, generator=torch.Generator().manual_seed(number)))


def message_of(buffer: torch.Tensor) -> Message:
    """An update as it comes out of the object store: views."""
    return Message({f"w{k}": part for k, part in enumerate(buffer.split(NUMBERS))})


def copied(buffer: torch.Tensor, target: torch.Tensor) -> float:
    """Seconds of the fastest of three copies: by numpy, by torch with one thread, and with one a core."""
    ways: list[tuple[int, Callable[[], object]]] = [
        (1, lambda: np.copyto(target.numpy(), buffer.numpy())),
        (1, lambda: target.copy_(buffer)),
        (os.cpu_count() or 1, lambda: target.copy_(buffer)),
    ]
    before, seconds = torch.get_num_threads(), []
    for threads, way in ways:
        torch.set_num_threads(threads)
        began = time.perf_counter()
        way()
        seconds.append(time.perf_counter() - began)
    torch.set_num_threads(before)
    return min(seconds)


def measure(updates: int, threads: int) -> dict[str, float]:
    """One row."""
    buffers, target = [shared(k) for k in range(BUFFERS)], torch.zeros(NUMBERS * TENSORS)
    edges: dict[str, Any] = {f"e{k}": {} for k in range(updates)}
    run = build(Run, {"fleet": {"edges": edges, "ray": False}, "local": {"threads": threads}})
    server, state = server_site(run, make_method(run.method), []), message_of(torch.zeros(NUMBERS * TENSORS))
    sent = dict.fromkeys(edges, state)
    stretches: list[float] = []
    copies: list[float] = []
    held: list[int] = []
    before = anonymous_bytes()

    def arriving() -> Iterator[Report]:
        began = 0.0
        for number, edge in enumerate(edges):
            if number % STRETCH == 0:
                stretches.append((time.perf_counter() - began) / STRETCH)
                held.append(anonymous_bytes() - before)
                copies.append(median(copied(buffers[k % BUFFERS], target) for k in range(8)))
                began = time.perf_counter()
            fetch = partial(message_of, buffers[number % BUFFERS])
            yield Report(edge, 0, float(1 + number % 7), 0.0, Cost(), fetch=fetch)
        stretches.append((time.perf_counter() - began) / STRETCH)

    average(state, checked(arriving(), sent, run), server)
    fold, copy = median(stretches[1:]), median(copies)  # the first is the time before the first update
    return {
        "threads": threads, "updates": updates, "MB": SIZE / 1e6, "fold ms": 1e3 * fold, "copy ms": 1e3 * copy,
        "fold GB/s": SIZE / fold / 1e9, "copy GB/s": SIZE / copy / 1e9, "fold / copy": copy / fold, "bar": 0.5,
        "held, updates": max(held) / SIZE,
    }  # fmt: skip


def main() -> None:
    """With the one thread of local.threads' default, and with one a core."""
    options = parser(__doc__)
    options.add_argument("updates", nargs="?", type=int, default=1000, metavar="UPDATES")
    updates = options.parse_args().updates
    rows = [measure(updates, threads) for threads in dict.fromkeys((1, os.cpu_count() or 1))]
    publish("folding", f"Folding {updates} updates of {SIZE / 1e6:g} MB into their mean", rows, seed=0)


if __name__ == "__main__":
    main()
