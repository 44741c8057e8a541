"""How far from the exact optimum is a searched allocation after so many trials, by which sampler, in which space?

    python -m benchmarks.allocation_gap [--trials 2000] [--arms structured/gp,free/tpe]

Target: at most 2 % after 2,000 trials for 8 classes of edges. One edge a class and the costs of benchmarks/plan_speed
(a Llama-3-8B-like model, 128 weights, drawn capacities, speeds and links), importance by kind, a deadline of 200 s.
The gap is in percent of what the exact plans' ranks are worth. `structured` has five numbers a class, `free` a rank
for each weight: 130 a class, 1,040 in all. GP does at most 100 trials, and not in the free space; CMA-ES has no free
space, for its ranks are categories.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np

from benchmarks.plan_speed import KEYS, LAM, demand
from benchmarks.table import RESULTS, publish
from fedpipe_ray.errors import UserError
from fedpipe_ray.settings import Profile
from tuning.allocate import gap, search
from tuning.surrogate import Budget, Surrogate

CLASSES, SECONDS, SEEDS = 8, 200.0, (0, 1, 2)
AT = (30, 100, 300, 1000, 2000)
ARMS = (
    ("structured", "tpe"), ("structured", "nsga2"), ("structured", "cmaes"), ("structured", "random"),
    ("free", "nsga2"), ("free", "random"), ("free", "tpe"), ("structured", "gp"),
)  # fmt: skip
MOST = {("structured", "gp"): 100, ("free", "tpe"): 100}  # they take minutes for as many


def surrogate(seed: int) -> Surrogate:
    """Eight edges and the importance of four kinds of weight, drawn from `seed`."""
    rng = np.random.default_rng(seed)
    demands = [demand(number, rng) for number in range(CLASSES)]
    kinds = dict(zip(dict.fromkeys(key.kind for key in KEYS), rng.lognormal(0, 1, 4), strict=True))
    scores = np.array([kinds[key.kind] for key in KEYS])
    profiles = {one.edge: Profile(compute_flops=1e9 * (1 + n)) for n, one in enumerate(demands)}
    return Surrogate(
        KEYS, demands, dict.fromkeys(profiles, scores / scores.sum()), profiles, Budget(SECONDS), lam=LAM,
        steps="filled", rank=32,
    )  # fmt: skip


def main() -> None:
    """Mean gap over the seeds, by trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=AT[-1])
    parser.add_argument("--arms", help="such as structured/gp,free/tpe; default: all; rows of others stay")
    options = parser.parse_args()
    trials = options.trials
    arms = [arm for arm in ARMS if not options.arms or "/".join(arm) in options.arms.split(",")]
    problems = {seed: surrogate(seed) for seed in SEEDS}
    optima = {seed: problem.optimum() for seed, problem in problems.items()}
    kept = RESULTS / "allocation_gap.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text())["rows"] if kept.exists() and options.arms else []
    for space, sampler in arms:
        rows = [row for row in rows if (row["space"], row["sampler"]) != (space, sampler)]
        most, began = min(trials, MOST.get((space, sampler), trials)), time.perf_counter()
        try:
            curves = [search(problems[seed], most, sampler, seed, free=space == "free").curve for seed in SEEDS]
        except UserError:  # CMA-ES knows no constraints, and a free space may hide what is feasible
            rows.append(
                {"space": space, "sampler": sampler, "ms a trial": "-", **{f"% at {at}": "infeasible" for at in AT}}
            )
            continue
        spent = 1000 * (time.perf_counter() - began) / (most * len(SEEDS))
        row: dict[str, Any] = {"space": space, "sampler": sampler, "ms a trial": spent}
        for at in AT:
            found = [100 * gap(curve[at - 1], optima[seed]) for seed, curve in zip(SEEDS, curves)] if at <= most else []
            row[f"% at {at}"] = round(float(np.mean(found)), 3) if found else "-"
        rows.append(row)
        publish(
            "allocation_gap", "How far from the exact optimum is a searched allocation?", rows,
            optimum_feasible={seed: one.feasible for seed, one in optima.items()},
        )  # fmt: skip


if __name__ == "__main__":
    main()
