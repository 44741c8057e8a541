"""Which parts of FedPipe matter? One changed at a time, against `preset: best`, and against `preset: paper`.

    python -m benchmarks.fedpipe_ablations [--task "docstrings, thin links"] [--seeds 0,1,2] [--rounds 12] [--rate 1.0]
                                           [--data FOLDER] [--jobs 2]

Thin links: a quarter of those of clusters/unequal.yaml on the slower edges, so that kinds of weight have to go; else
scores, ties and planners choose alike. Every arm gets the virtual time that `best` takes for so many rounds, and its
rate, which is not tuned for it. same plans: runs in which every edge was told the same in every round as by `best`.
Runs are kept as those of fedpipe_against_baselines are.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fedpipe_against_baselines import ARMS, TASKS, done, reached, round_seconds
from benchmarks.table import publish

BEST = "best"
ABLATIONS = {
    BEST: "preset: best",
    **{f"score {score}": f"score: {score}" for score in ("svd", "sensitivity", "sigma", "random")},
    "not tied by kind": "tie: none",
    "attention only": "targets: [q_proj, k_proj, v_proj, o_proj]",
    "MLP only": "targets: [gate_proj, up_proj, down_proj]",
    **{f"{solver} planner": f"solver: {solver}, penalty: 10" for solver in ("exact", "greedy", "uniform")},
    **{f"{steps} steps": f"steps: {steps}" for steps in ("equal", "capped")},
    "16 bits only": "bits: [16]",
    "8 bits only": "bits: [8]",
    "4 bits only": "bits: [4]",
    "depth knob": "depth: true",
    **{f"join {join}": f"join: {join}" for join in ("truncate", "increment", "pad")},
    "edges weigh by rows": "weigh: paper",
    "all weigh by rows": "weigh: all",
    "preset paper": "preset: paper",
    **{f"paper, score {score}": f"preset: paper, score: {score}" for score in ("gradient", "sigma", "random")},
    **{f"paper, {solver}": f"preset: paper, solver: {solver}" for solver in ("exact", "uniform")},
}
THIN = [
    f"fleet.edges.{edge}.{link}_bps={rate}Mbit/s"
    for edge, up in (("e3", 5), ("e4", 2.5), ("e5", 2.5))
    for link, rate in (("uplink", up), ("downlink", 4 * up))
]
TASKS["docstrings, thin links"] = (TASKS["docstrings"][0], TASKS["docstrings"][1], THIN)


def main() -> None:
    """Measures every arm; publishes after each seed."""
    ARMS.update({f"ablation: {name}": [f"method={{name: fedpipe, {setting}}}"] for name, setting in ABLATIONS.items()})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="docstrings, thin links")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=12, help="of `best`")
    parser.add_argument("--rate", type=float, default=1.0, help="times the task's")
    parser.add_argument("--rows", type=int, default=100, help="validation rows an edge")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    options.data = options.data.resolve()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        probes = {
            name: pool.submit(done, options.task, f"ablation: {name}", 3, 1.0, 0, options, 8) for name in ABLATIONS
        }
        seconds = {name: round_seconds(probe.result()) for name, probe in probes.items() if probe.result()}
        if BEST not in seconds:
            raise SystemExit("`best` failed, and its time is everybody's")
        for seed in seeds:
            rounds = {name: max(2, round(options.rounds * seconds[BEST] / one)) for name, one in seconds.items()}
            tried = {
                name: pool.submit(done, options.task, f"ablation: {name}", count, options.rate, seed, options)
                for name, count in rounds.items()
            }
            runs |= {(name, seed): run.result() for name, run in tried.items() if run.result()}
            rows = [
                row_of(name, runs) for name in seconds if any((name, s) in runs and (BEST, s) in runs for s in seeds)
            ]
            if rows:
                publish(
                    "fedpipe_ablations", "FedPipe with one part changed, equal virtual time, validation rows", rows,
                    task=options.task, rate=options.rate,
                )  # fmt: skip


def row_of(name: str, runs: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds; +-: standard deviation of the paired difference; x time: to the final loss of `best`."""
    pairs = [(run, runs[BEST, seed]) for (own, seed), run in runs.items() if own == name and (BEST, seed) in runs]
    apart = [run["loss"][-1] - best["loss"][-1] for run, best in pairs]
    return {
        "changed": name, "rounds": pairs[0][0]["rounds"], "seeds": len(pairs),
        "loss": float(np.mean([run["loss"][-1] for run, _ in pairs])), "vs best": float(np.mean(apart)),
        "+-": float(np.std(apart)), "worst edge": float(np.mean([run["worst"] for run, _ in pairs])),
        "x time": float(np.median([reached(run, best["loss"][-1]) / best["clock"][-1] for run, best in pairs])),
        "same plans": f"{sum(run['plans'] == best['plans'] for run, best in pairs)} of {len(pairs)}",
        "MB up": float(np.mean([run["bytes_up"] for run, _ in pairs])) / 1e6,
        "k numbers up": float(np.mean([run["trainable"] for run, _ in pairs])) / 1e3,
        "memory of capacity": max(run["memory"] for run, _ in pairs),
        "commits": " ".join(sorted({run["commit"] for run, _ in pairs})),
        "lost": f"{sum(run['lost'] for run, _ in pairs)} of {sum(run['edge rounds'] for run, _ in pairs)}",
    }  # fmt: skip


if __name__ == "__main__":
    main()
