"""How long does a plan for a whole fleet take? Targets: greedy 1 s, exact 30 s, one thread; and how far greedy is off.

    python -m benchmarks.plan_speed

100 edges, a Llama-3-8B-like model, q, k, v, o of 32 layers each on its own: 128 weights. Costs are counted as in the
plan's own formulas, not measured; capacities, speeds and links are drawn anew in every repeat. In `one score a kind`
the layers of a kind share their score. CPU seconds are of all threads. `below exact` is in percent of what the weights
of the exact plan are worth, sum_m S_m g(r_m), because values may be near zero; `best` does not aim at the value.
`a round`: all that FedPipe works out before one, from what the edges told: demands, scores, plans, and the search for
the deadline where none is given.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.table import parser, publish
from clusters import find_profiles
from fedpipe_ray.config import load_run
from fedpipe_ray.demands import Shape
from fedpipe_ray.facts import MEAN, SPREAD
from fedpipe_ray.message import Message
from fedpipe_ray.methods.fedpipe import FedPipe
from fedpipe_ray.planning import Choice, Demand, Key, plan
from fedpipe_ray.settings import Profile

REPEATS, SEED, EDGES, LAYERS, WIDTH, TOKENS, LAM = 3, 0, 100, 32, 4096, 256, 10.0
SIZES = {"q_proj": (WIDTH, WIDTH), "k_proj": (WIDTH, 1024), "v_proj": (WIDTH, 1024), "o_proj": (WIDTH, WIDTH)}
KEYS = [Key(f"{layer}.{kind}", kind, layer, *SIZES[kind]) for layer in range(LAYERS) for kind in SIZES]
BASE_GIB = {4: 5.3, 8: 8.5, 16: 15.0}
SPEED = {4: 0.8, 8: 0.5, 16: 1.0}  # of the device's rate
FLOPS = 4 * 8e9 * TOKENS  # a sample, forward and backward, base frozen


def demand(number: int, rng: np.random.Generator) -> Demand:
    """One edge: 6 to 24 GiB less what others use, 10 to 100 TFLOP/s, 10 to 100 Mbit/s up, twice that down."""
    shared = np.array([1.0 if key.kind == "o_proj" else 1 / 3 for key in KEYS])  # q, k, v keep the same input
    size = np.array([key.d_in + key.d_out for key in KEYS], float)
    capacity = max(5.9, rng.choice([6, 8, 12, 16, 24]) * rng.uniform(0.75, 1)) * 2**30
    rate, uplink = (float(np.exp(rng.uniform(np.log(a), np.log(10 * a)))) for a in (1e13, 1e7))
    choices = [
        Choice(
            bits=bits,
            batch=batch,
            depth=None,
            step_seconds=0.05 + batch * FLOPS / (rate * SPEED[bits]),
            step_seconds_rank=batch * TOKENS * 6 * size / (rate * SPEED[bits]),
            step_seconds_key=np.full(len(KEYS), 2e-4),
            memory_bytes=(BASE_GIB[bits] + 0.3 + 0.12 * batch) * 2**30,
            memory_bytes_rank=16 * size + batch * TOKENS * 4,
            memory_bytes_key=batch * TOKENS * 2 * WIDTH * shared,
        )
        for bits in BASE_GIB
        for batch in (1, 2, 4, 8)
    ]
    steps = int(rng.integers(5, 40))
    return Demand(f"e{number}", choices, capacity, 0.1, size * 4 * 8 * 1.5 / uplink, 8 * steps, steps, 3, 8 * steps, 8)


def of_a_round(**settings: Any) -> float:
    """Seconds of `configure` with such a method, on edges that have told rows and scores."""
    shape = Shape(
        tuple(replace(key, name=f"model.layers.{key.name}") for key in KEYS),
        tuple(int(2.2e8 * layer) for layer in range(LAYERS + 1)), int(7.5e9),
        {bits: int(gib * 2**30) for bits, gib in BASE_GIB.items()}, 4e5, 0, 4 * WIDTH * 14336, 0, 0,
    )  # fmt: skip
    rng = np.random.default_rng(SEED)
    edges = {
        f"e{number}": Profile(
            compute_flops=float(10 ** rng.uniform(13, 14)), uplink_bps=float(10 ** rng.uniform(7, 8)),
            downlink_bps=2e8, gpu_memory_bytes=int(rng.choice([8, 12, 16, 24, 40]) * 2**30),
        ) for number in range(EDGES)
    }  # fmt: skip
    numbers = {
        f"{edge}/{name}": value
        for edge in edges
        for name, value in {
            "rows": 500.0, "tokens": 80.0, "longest": 96.0, "terms": 90.0,
            **{f"{which}{key.name}": float(rng.lognormal()) for key in shape.keys for which in (MEAN, SPREAD)},
        }.items()
    }  # fmt: skip
    run = load_run(Path(__file__).parent.parent / "examples" / "quickstart.yaml", ["fleet.ray=false"], find_profiles)
    server: Any = SimpleNamespace(run=run, memo={"shape": shape}, task="causal")  # all that `configure` asks of a site
    began = time.perf_counter()
    FedPipe(targets="all-linear", **settings).configure(Message({}, numbers), edges, server)
    return time.perf_counter() - began


def main() -> None:
    """Plans each fleet by each solver, at the deadline that half of its edges could keep without adapters."""
    parser(__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    for kind in ("a score a weight", "one score a kind"):
        seconds: dict[str, list[float]] = {"best": [], "uniform": [], "greedy": [], "exact": []}
        cpu: dict[str, list[float]] = {name: [] for name in seconds}
        gaps: dict[str, list[float]] = {name: [] for name in seconds}
        for repeat in range(REPEATS):
            rng = np.random.default_rng([SEED, repeat])
            demands = [demand(number, rng) for number in range(EDGES)]
            shares = rng.lognormal(size=(EDGES, LAYERS if kind == "a score a weight" else 1, len(SIZES)))
            shares = np.broadcast_to(shares, (EDGES, LAYERS, len(SIZES))).reshape(EDGES, -1)
            scores = {one.edge: share / share.sum() for one, share in zip(demands, shares, strict=True)}
            fastest = [min(8 / c.batch * one.steps * c.step_seconds for c in one.choices) for one in demands]
            found = {}
            for name in seconds:
                began, began_cpu = time.perf_counter(), time.process_time()
                found[name] = plan(KEYS, demands, scores, median(fastest), name, "equal", lam=LAM)
                seconds[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - began_cpu)
            for name in seconds:
                pairs = [(most, found[name][edge].value) for edge, most in found["exact"].items()]
                gaps[name] += [100 * (most.value - v) / (most.value + LAM * most.under_training) for most, v in pairs]
        rows += [
            {
                "scores": kind, "solver": name, "seconds, median": median(seconds[name]), "best": min(seconds[name]),
                "worst": max(seconds[name]), "CPU seconds": median(cpu[name]),
                "target": {"greedy": "1", "exact": "30"}.get(name, ""),
                "below exact %, mean": mean(gaps[name]), "most": max(gaps[name]),
                "edges over 1 %": sum(gap > 1 for gap in gaps[name]),
            }
            for name in seconds
        ]  # fmt: skip
    rounds: dict[str, dict[str, Any]] = {
        "a round, best, deadline searched": {}, "a round, paper": {"preset": "paper"},
        "a round, greedy, deadline given": {"solver": "greedy", "tie": "none", "deadline_seconds": 30.0},
    }  # fmt: skip
    for name, settings in rounds.items():
        taken = [of_a_round(**settings) for _ in range(REPEATS)]
        rows.append({
            **dict.fromkeys(rows[0], ""), "scores": "a score a weight", "solver": name,
            "seconds, median": median(taken), "best": min(taken), "worst": max(taken),
        })  # fmt: skip
    question = f"Planning {EDGES} edges, {len(KEYS)} weights, 12 choices an edge"
    publish("plan_speed", question, rows, repeats=REPEATS, seed=SEED, edges=EDGES, lam=LAM)


if __name__ == "__main__":
    main()
