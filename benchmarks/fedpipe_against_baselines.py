"""Is FedPipe sooner than its baselines on unequal edges, at the same virtual clock, and as good in the end?

    python -m benchmarks.fedpipe_against_baselines [--quick] [--tasks docstrings,e2e,ag_news] [--data FOLDER] [--jobs 2]

Every arm gets the virtual time of the synchronous uniform arm; rounds follow from the arm's own round. The rate is
tuned per arm on validation rows: three values, one seed, half the time. Runs that are done stay in benchmarks/.cache
and are not repeated, so an ended benchmark goes on where it stopped. FOLDER holds ag_news.csv and e2e_devset.csv.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table import publish

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "benchmarks" / ".cache" / "fedpipe_against_baselines"
RATES = (0.5, 1.0, 2.0)  # times the task's own
UNIFORM = "method={name: fedpipe, solver: uniform, rank: 8, alpha: 16, join: pad, steps: %s, bits: [16]}"
ARMS = {
    "synchronous": [UNIFORM % "equal"],
    "capped": [UNIFORM % "capped"],
    "filled": [UNIFORM % "filled"],
    "fedpipe best": ["method={name: fedpipe}"],
    "fedpipe paper": ["method={name: fedpipe, preset: paper}"],
    "hetlora-like": ["method={name: fedpipe, join: pad, steps: equal}"],
    "fedadapter": ["method={name: fedadapter}"],
    "full": ["method={name: full}"],
}
TASKS: dict[str, list[str]] = {
    "docstrings": ["examples/quickstart.yaml", "local.lr=0.006"],
    "docstrings, rare on the slowest": [
        "examples/quickstart.yaml", "local.lr=0.006", "fleet.edges.e5.data=builtin:docstrings/torch",
        "fleet.edges.e1.data=builtin:docstrings/numpy",
    ],
    "e2e": ["examples/e2e.yaml", "local.lr=0.006"],
    "ag_news": ["examples/ag_news.yaml", "local.lr=0.003", "evaluate.keep=last"],
}  # fmt: skip
FILES = {"e2e": "e2e_devset.csv", "ag_news": "ag_news.csv"}
COMMON = [
    "fleet.profiles=clusters/unequal.yaml",
    "fleet.ray=false",
    "local.threads=1",
    "local.steps=20",
    "local.batch=16",
]


def done(task: str, arm: str, rounds: int, rate: float, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of rounds.jsonl of one run, from the cache or made now; [] if the run failed."""
    settings = [*TASKS[task][1:], *COMMON, *ARMS[arm], f"rounds={rounds}", f"seed={seed}"]
    if task in FILES:
        settings.append(f"data.source={options.data / FILES[task]}")
    own = next(float(one.partition("=")[2]) for one in settings if one.startswith("local.lr="))
    settings += [f"local.lr={own * rate}", f"evaluate.rows={options.rows}"]
    name = hashlib.sha256(json.dumps([task, settings]).encode()).hexdigest()[:16]
    out = CACHE / name
    if not (out / "summary.json").exists():
        command = [sys.executable, "-m", "fedpipe_ray"]
        begun = (out / "checkpoint").is_dir()
        command += ["resume", str(out)] if begun else ["run", TASKS[task][0], *settings, "--out", str(out)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if ended.returncode:
            print(f"{task} / {arm}: {ended.stderr.strip().splitlines()[-1:]}", flush=True)
            return []
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def track(lines: Sequence[dict[str, Any]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(virtual seconds since the start, macro validation loss) after each round."""
    clock = np.cumsum([line["virtual_seconds"] for line in lines])
    return clock, np.array([line["eval"]["global"]["loss"] for line in lines])


def reached(lines: Sequence[dict[str, Any]], target: float) -> float:
    """Virtual seconds until the macro loss first is at `target`, on the straight line between rounds; or infinity."""
    clock, loss = track(lines)
    below = np.nonzero(loss <= target)[0]
    if not len(below):
        return float("inf")
    at = int(below[0])
    if at == 0:
        return float(clock[0])
    part = (loss[at - 1] - target) / (loss[at - 1] - loss[at])
    return float(clock[at - 1] + part * (clock[at] - clock[at - 1]))


def compare(task: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One task: a row an arm. Time to target is against the synchronous arm of the same seed."""
    whole = options.rounds
    seconds: dict[str, float] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        probes = {arm: pool.submit(done, task, arm, 2, 1.0, 0, options) for arm in options.arms}
        for arm, probe in probes.items():
            lines = probe.result()
            if lines:
                seconds[arm] = lines[-1]["virtual_seconds"]
        budget = whole * seconds["synchronous"]
        count = {arm: max(2, round(budget / one)) for arm, one in seconds.items()}
        rates = dict.fromkeys(seconds, 1.0)
        if not options.quick:
            half = {
                (arm, rate): pool.submit(done, task, arm, max(2, count[arm] // 2), rate, 0, options)
                for arm in seconds
                for rate in RATES
            }
            for arm in seconds:
                found = {rate: half[arm, rate].result() for rate in RATES}
                last = {rate: track(lines)[1][-1] for rate, lines in found.items() if lines}
                rates[arm] = min(last, key=lambda rate: last[rate])
        runs = {
            (arm, seed): pool.submit(done, task, arm, count[arm], rates[arm], seed, options)
            for seed in options.seeds
            for arm in seconds
        }
        lines = {key: run.result() for key, run in runs.items()}
    return [row_of(task, arm, lines, count[arm], rates[arm], options.seeds) for arm in seconds]


def row_of(
    task: str, arm: str, lines: dict[tuple[str, int], list[dict[str, Any]]], rounds: int, rate: float,
    seeds: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """The figures of one arm: means over the seeds, and the spread of the loss."""
    own = [(lines[arm, seed], lines["synchronous", seed]) for seed in seeds if lines[arm, seed]]
    final = [track(mine)[1][-1] for mine, _ in own]
    worst = [max(edge["loss"] for edge in mine[-1]["eval"]["edges"].values()) for mine, _ in own]
    sooner = [track(other)[0][-1] / reached(mine, track(other)[1][-1]) for mine, other in own]
    last = [mine[-1] for mine, _ in own]
    memory = [max(edge["training_memory_bytes"] for edge in line["edges"].values()) for line in last]
    lost = sum(edge["status"] == "lost" for mine, _ in own for line in mine for edge in line["edges"].values())
    accuracy = [line["eval"]["global"].get("accuracy", line["eval"]["global"].get("token_accuracy")) for line in last]
    return {
        "task": task, "arm": arm, "rounds": rounds, "rate x": rate, "seeds": len(own),
        "loss": float(np.mean(final)), "+-": float(np.std(final)), "worst edge": float(np.mean(worst)),
        "accuracy": float(np.mean(accuracy)), "sooner x": float(np.median(sooner)),
        "MB up": float(np.mean([sum(line["bytes_up"] for line in mine) for mine, _ in own])) / 1e6,
        "MB down": float(np.mean([sum(line["bytes_down"] for line in mine) for mine, _ in own])) / 1e6,
        "peak MiB": max(memory) / 2**20, "lost": lost,
    }  # fmt: skip


def main() -> None:
    """Runs what is asked; publishes after every task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="docstrings, one seed, four arms, no tuning of the rate")
    parser.add_argument("--tasks", help="default: all")
    parser.add_argument("--arms", help="default: all")
    parser.add_argument("--seeds", help="default: 0,1,2")
    parser.add_argument("--rounds", type=int, help="of the synchronous arm; default 8, quick 3")
    parser.add_argument("--rows", type=int, default=200, help="validation rows an edge")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    options.data = options.data.resolve()
    few = ["synchronous", "capped", "filled", "fedpipe best"]
    options.tasks = options.tasks.split(",") if options.tasks else ["docstrings"] if options.quick else list(TASKS)
    options.arms = options.arms.split(",") if options.arms else few if options.quick else list(ARMS)
    options.seeds = [int(seed) for seed in (options.seeds or ("0" if options.quick else "0,1,2")).split(",")]
    options.rounds = options.rounds or (3 if options.quick else 8)
    rows: list[dict[str, Any]] = []
    for task in options.tasks:
        rows += compare(task, options)
        name = "fedpipe_against_baselines" + ("_quick" if options.quick else "")
        publish(name, "FedPipe against its baselines, equal virtual time, validation rows", rows, seeds=options.seeds)


if __name__ == "__main__":
    main()
