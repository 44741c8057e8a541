"""How far from the exact optimum is a searched allocation after so many trials, by which sampler, in which space?

    python -m benchmarks.allocation_gap [--trials 2000] [--arms structured/gp,free/tpe] [--again]

Target: at most 2 % after 2,000 trials for 8 classes of edges. One edge a class and the costs of benchmarks/plan_speed
(a Llama-3-8B-like model, 128 weights, drawn capacities, speeds and links), importance by kind, a deadline of 200 s.
The gap is in percent of what the exact plans' ranks are worth. `structured` has five numbers a class, `free` a rank
for each weight: 130 a class, 1,040 in all. GP does at most 100 trials, and TPE in the free space 300, for their own
time grows with trials and numbers; GP is not tried in the free space, and CMA-ES has none, for its ranks are
categories. Arms that the results have are not repeated, nor are seeds of an arm that was stopped (benchmarks/.cache).
With fewer trials, to see that it runs, the table is allocation_gap_quick.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from benchmarks.plan_speed import KEYS, LAM, demand
from benchmarks.table import HERE, RESULTS, parser, publish
from fedpipe_ray.errors import UserError
from fedpipe_ray.settings import Profile
from tuning.allocate import gap, search
from tuning.surrogate import Budget, Surrogate

CLASSES, SECONDS, SEEDS = 8, 200.0, (0, 1, 2)
AT = (30, 100, 300, 1000, 2000)
CACHE = HERE / ".cache" / "allocation_gap"
QUESTION = "How far from the exact optimum is a searched allocation?"
ARMS = (
    ("structured", "tpe"), ("structured", "nsga2"), ("structured", "cmaes"), ("structured", "random"),
    ("free", "nsga2"), ("free", "random"), ("free", "tpe"), ("structured", "gp"),
)  # fmt: skip
MOST = {("structured", "gp"): 100, ("free", "tpe"): 300}


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


def done(arm: tuple[str, str], seed: int, trials: int, again: bool) -> dict[str, Any]:
    """(curve: best quality after each trial, or None if no trial was feasible; seconds) of one seed, kept or made."""
    kept = CACHE / f"{'-'.join(arm)}-{seed}-{trials}.json"
    if again or not kept.exists():
        space, sampler = arm
        began = time.perf_counter()
        curve: list[float] | None = None
        with suppress(UserError):  # CMA-ES knows no constraints, and a free space may hide what is feasible
            curve = search(surrogate(seed), trials, sampler, seed, free=space == "free").curve
        CACHE.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"curve": curve, "seconds": time.perf_counter() - began}))
    return dict(json.loads(kept.read_text()))


def row_of(arm: tuple[str, str], trials: int, at: Sequence[int], again: bool) -> dict[str, Any]:
    """An arm's mean gaps over the seeds, by trials."""
    most = min(trials, MOST.get(arm, trials))
    found = {seed: done(arm, seed, most, again) for seed in SEEDS}
    row: dict[str, Any] = {"space": arm[0], "sampler": arm[1]}
    if any(one["curve"] is None for one in found.values()):
        return {**row, "ms a trial": "-", **{f"% at {n}": "infeasible" if n <= most else "-" for n in at}}
    row["ms a trial"] = 1000 * sum(one["seconds"] for one in found.values()) / (most * len(SEEDS))
    optima = {seed: surrogate(seed).optimum() for seed in SEEDS}
    for n in at:
        gaps = [100 * gap(one["curve"][n - 1], optima[seed]) for seed, one in found.items()] if n <= most else []
        row[f"% at {n}"] = round(float(np.mean(gaps)), 3) if gaps else "-"
    return row


def main() -> None:
    """Arm after arm; the table is published after each."""
    options = parser(__doc__)
    options.add_argument("--trials", type=int, default=AT[-1])
    options.add_argument("--arms", help="such as structured/gp,free/tpe; default: all; rows of others stay")
    options.add_argument("--again", action="store_true", help="measure anew what the results have")
    asked = options.parse_args()
    whole = asked.trials == AT[-1]
    at = AT if whole else (asked.trials,)
    name = "allocation_gap" if whole else "allocation_gap_quick"
    kept = RESULTS / f"{name}.json"
    before: list[dict[str, Any]] = json.loads(kept.read_text())["rows"] if whole and kept.exists() else []
    rows = {(row["space"], row["sampler"]): row for row in before}
    wanted = [arm for arm in ARMS if not asked.arms or "/".join(arm) in asked.arms.split(",")]
    for arm in wanted:
        if arm in rows and not asked.again:
            print(f"{'/'.join(arm)}: in {kept.name} already; --again measures it anew", flush=True)
            continue
        rows[arm] = row_of(arm, asked.trials, at, asked.again)
        feasible = {seed: surrogate(seed).optimum().feasible for seed in SEEDS}
        publish(name, QUESTION, [rows[one] for one in ARMS if one in rows], optimum_feasible=feasible)


if __name__ == "__main__":
    main()
