"""Which parts of FedPipe matter? One changed at a time, on the docstrings, against `preset: best`.

    python -m benchmarks.fedpipe_ablations [--seeds 0,1,2] [--rounds 12] [--rate 1.0] [--jobs 2]

Every arm gets the virtual time that `best` takes for so many rounds, and its rate. Runs are kept as those of
fedpipe_against_baselines are.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fedpipe_against_baselines import ARMS, done, reached
from benchmarks.table import publish

TASK, BEST = "docstrings", "best"
ABLATIONS = {
    BEST: "preset: best",
    **{f"score {score}": f"score: {score}" for score in ("svd", "sensitivity", "sigma", "random")},
    "not tied by kind": "tie: none",
    "attention only": "targets: [q_proj, k_proj, v_proj, o_proj]",
    "MLP only": "targets: [gate_proj, up_proj, down_proj]",
    **{f"{solver} planner": f"solver: {solver}" for solver in ("exact", "greedy", "uniform")},
    **{f"{steps} steps": f"steps: {steps}" for steps in ("equal", "capped")},
    "16 bits only": "bits: [16]",
    "8 bits only": "bits: [8]",
    "4 bits only": "bits: [4]",
    "depth knob": "depth: true",
    **{f"join {join}": f"join: {join}" for join in ("truncate", "increment", "pad")},
    "edges weigh by rows": "weigh: paper",
}


def main() -> None:
    """Measures every arm; publishes after each seed."""
    ARMS.update({f"ablation: {name}": [f"method={{name: fedpipe, {setting}}}"] for name, setting in ABLATIONS.items()})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=12, help="of `best`")
    parser.add_argument("--rate", type=float, default=1.0, help="times the task's")
    parser.add_argument("--rows", type=int, default=100, help="validation rows an edge")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    options.data = Path("data")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        probes = {name: pool.submit(done, TASK, f"ablation: {name}", 3, 1.0, 0, options, 8) for name in ABLATIONS}
        seconds = {name: probe.result()["round s"] for name, probe in probes.items() if probe.result()}
        if BEST not in seconds:
            raise SystemExit("`best` failed, and its time is everybody's")
        for seed in seeds:
            tried = {
                name: pool.submit(
                    done, TASK, f"ablation: {name}", max(2, round(options.rounds * seconds[BEST] / one)), options.rate,
                    seed, options,
                )
                for name, one in seconds.items()
            }  # fmt: skip
            runs |= {(name, seed): run.result() for name, run in tried.items() if run.result()}
            rows = [
                row_of(name, runs) for name in seconds if any((name, s) in runs and (BEST, s) in runs for s in seeds)
            ]
            publish("fedpipe_ablations", "FedPipe with one part changed, equal virtual time, validation rows", rows)


def row_of(name: str, runs: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds; +-: standard deviation of the paired difference; x time: to the final loss of `best`."""
    pairs = [(run, runs[BEST, seed]) for (own, seed), run in runs.items() if own == name and (BEST, seed) in runs]
    apart = [run["loss"][-1] - best["loss"][-1] for run, best in pairs]
    return {
        "changed": name, "rounds": pairs[0][0]["rounds"], "seeds": len(pairs),
        "loss": float(np.mean([run["loss"][-1] for run, _ in pairs])), "vs best": float(np.mean(apart)),
        "+-": float(np.std(apart)), "worst edge": float(np.mean([run["worst"] for run, _ in pairs])),
        "x time": float(np.median([reached(run, best["loss"][-1]) / best["clock"][-1] for run, best in pairs])),
        "MB up": float(np.mean([run["bytes_up"] for run, _ in pairs])) / 1e6,
        "k trainable": float(np.mean([run["trainable"] for run, _ in pairs])) / 1e3,
        "memory of capacity": max(run["memory"] for run, _ in pairs),
        "commits": " ".join(sorted({run["commit"] for run, _ in pairs})),
        "lost": f"{sum(run['lost'] for run, _ in pairs)} of {sum(run['edge rounds'] for run, _ in pairs)}",
    }  # fmt: skip


if __name__ == "__main__":
    main()
