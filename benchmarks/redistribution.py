"""How long does a server take to redistribute one matrix by SVD, and how exactly? 4096 x 4096 by default.

    python -m benchmarks.redistribution [--size 4096] [--repeats 9] [--quick]

Ten edges report factors of the ranks of `--ranks` (together 160): independent, or a common start + 30 % or 1 % drift,
as after one round. The error is that of the product of rank 64 against the truncated dense SVD, as a share of its norm.
Seconds are the least of the repeats, from factors in float32 to factors in float32; CPU seconds are those of all
threads, and say what a busy machine hides (its threads wait for one another: take --threads 1 there). `float64` is
Householder's QR, `float32` the same in single precision with the core in double, `ours` what FlexLoRA uses. --quick:
512 x 512.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.table import publish
from fedpipe_ray.stacking import Pair, concatenate, low_rank, truncate

STARTS = {"independent": None, "common + 30 %": 0.3, "common + 1 %": 0.01}


def edges(size: int, ranks: list[int], drift: float | None) -> list[Pair]:
    """Pairs in float32, b [size, r], a [r, size]."""
    draw = torch.Generator().manual_seed(0)
    top = max(ranks)
    b, a = torch.randn(size, top, generator=draw), torch.randn(top, size, generator=draw)
    noise = [(torch.randn(size, r, generator=draw), torch.randn(r, size, generator=draw)) for r in ranks]
    return noise if drift is None else [(b[:, : len(y)] + drift * x, a[: len(y)] + drift * y) for x, y in noise]


def single(pairs: list[Pair], weights: list[float], rank: int) -> Pair:
    """The same redistribution by Householder's QR in float32 and the SVD of the core in float64."""
    b, a = (factor.float() for factor in concatenate(pairs, weights))
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(r_b.double() @ r_a.double().T)
    return q_b @ (u[:, :rank] * s[:rank]).float(), vt[:rank].float() @ q_a.T


def double(pairs: list[Pair], weights: list[float], rank: int) -> Pair:
    """By Householder's QR in float64, rounded to float32."""
    best = low_rank(*concatenate(pairs, weights), rank).to(torch.float32)
    return best.b, best.a


def ours(pairs: list[Pair], weights: list[float], rank: int) -> Pair:
    """What FlexLoRA does."""
    best = truncate(pairs, weights, rank)
    return best.b, best.a


WAYS: dict[str, Callable[[list[Pair], list[float], int], Pair]] = {"float64": double, "float32": single, "ours": ours}


def measured(way: str, pairs: list[Pair], rank: int, repeats: int) -> tuple[float, float, Pair]:
    """(least seconds, least CPU seconds, factors)."""
    weights, spent = [1 / len(pairs)] * len(pairs), []
    for _ in range(repeats):
        started, worked = time.perf_counter(), time.process_time()
        found = WAYS[way](pairs, weights, rank)
        spent.append((time.perf_counter() - started, time.process_time() - worked))
    return min(wall for wall, _ in spent), min(cpu for _, cpu in spent), found


def exact(pairs: list[Pair], rank: int) -> tuple[float, torch.Tensor]:
    """(seconds of the dense SVD in float64, its product of `rank`)."""
    whole = torch.linalg.multi_dot(concatenate(pairs, [1 / len(pairs)] * len(pairs)))
    began = time.perf_counter()
    u, s, vt = torch.linalg.svd(whole)
    return time.perf_counter() - began, (u[:, :rank] * s[:rank]) @ vt[:rank]


def main() -> None:
    """Measures all ways; publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--ranks", default="64,32,16,16,8,8,4,4,4,4")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-dense", action="store_true", help="without the dense SVD, so without errors")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    size, ranks = 512 if options.quick else options.size, [int(rank) for rank in options.ranks.split(",")]
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for start, drift in STARTS.items():
        pairs, rank = edges(size, ranks, drift), max(ranks)
        dense, best = (float("nan"), None) if options.no_dense else exact(pairs, rank)
        for way in WAYS:
            seconds, cpu, (b, a) = measured(way, pairs, rank, options.repeats)
            error = float("nan") if best is None else float((b.double() @ a.double() - best).norm() / best.norm())
            rows.append({
                "factors": start, "way": way, "R": sum(ranks), "seconds": seconds, "CPU s": cpu, "dense SVD s": dense,
                "error": error, "1 - A A^T": float((a.double() @ a.double().T - torch.eye(rank).double()).norm()),
            })  # fmt: skip
    publish(
        "redistribution" + ("_quick" if options.quick else ""),
        f"Redistribution of one {size} x {size} matrix at rank {max(ranks)}",
        rows, threads=torch.get_num_threads(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
