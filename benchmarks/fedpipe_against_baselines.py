"""Is FedPipe sooner than its baselines on unequal edges, at the same virtual clock, and as good in the end?

    python -m benchmarks.fedpipe_against_baselines [--quick] [--tasks "docstrings;e2e"] [--data FOLDER] [--jobs 2]

Every arm gets the virtual time of the synchronous uniform arm of its seed, which divides the rows; its rounds follow
from its own second and third. The rate is tuned per arm on validation rows: three values, one seed, half the time; runs
that are judged use the best, of equals the lowest.
Runs that are done stay in results/fedpipe_runs.jsonl and are not repeated (remove a line to measure it anew), those
that were ended go on from benchmarks/.cache; rows of tasks and arms that are not asked for stay in the table. FOLDER
holds ag_news.csv and e2e_devset.csv.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.table import RESULTS, commit, publish
from clusters import find_profiles
from fedpipe_ray.config import build, load_run
from fedpipe_ray.methods import make_method
from fedpipe_ray.pretrain import recipe_hash
from fedpipe_ray.settings import Profile

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "benchmarks" / ".cache" / "fedpipe_against_baselines"
DONE = RESULTS / "fedpipe_runs.jsonl"
FLEET = "clusters/unequal.yaml"
RATES = (0.5, 1.0, 2.0)  # times the task's own and the arm's
EQUAL = 0.015  # nats that count as none: of rates so near the best the lowest, for judged runs are twice as long
UNIFORM = (
    "method={name: fedpipe, solver: uniform, penalty: 0, join: pad, steps: %s, bits: [16]}"  # rank 16, or what fits
)
ARMS = {
    "synchronous": [UNIFORM % "equal"],
    "capped": [UNIFORM % "capped"],
    "filled": [UNIFORM % "filled"],
    "fedpipe best": ["method={name: fedpipe}"],
    "fedpipe paper": ["method={name: fedpipe, preset: paper}"],
    "hetlora-like": ["method={name: fedpipe, join: pad, steps: equal}"],
    "fedadapter": ["method={name: fedadapter}", "local.accumulate=8"],  # else the smallest edges run out of memory
    "full": ["method={name: full}", "local.accumulate=8"],
}
RATE_OF = {"full": 0.05}  # all parameters take a smaller step than an adapter


def memory(*mib: int) -> list[str]:
    """key=value of the edges' capacities."""
    return [f"fleet.edges.e{i}.training_memory_bytes={one}MiB" for i, one in enumerate(mib, 1)]


E2E = memory(900, 600, 450, 300, 225)  # rows of twice the length
AG_NEWS = memory(1200, 800, 600, 400, 300)  # a model of nine times the bytes
TASKS: dict[str, tuple[str, float, list[str]]] = {  # run file, rate, settings
    "docstrings": ("examples/quickstart.yaml", 0.006, []),
    "docstrings, rare on the slowest": ("examples/quickstart.yaml", 0.006, [
        "fleet.edges.e5.data=builtin:docstrings/torch", "fleet.edges.e1.data=builtin:docstrings/numpy",
    ]),
    "e2e": ("examples/e2e.yaml", 0.006, E2E),
    "e2e, rare on the slowest": ("examples/e2e.yaml", 0.006, [
        *E2E, "data.partition={by: benchmarks.rare:beside_burger_king, column: mr}",
    ]),
    "ag_news": ("examples/ag_news.yaml", 0.003, AG_NEWS),
    "ag_news, rare on the slowest": ("examples/ag_news.yaml", 0.003, [
        *AG_NEWS, "data.partition={by: benchmarks.rare:sports, column: label}",
    ]),
}  # fmt: skip
SHORTER = {"examples/ag_news.yaml": ["local.steps=10", "local.batch=8"]}  # a row costs twelve times that of the others
FILES = {"examples/e2e.yaml": "e2e_devset.csv", "examples/ag_news.yaml": "ag_news.csv"}
COMMON = [f"fleet.profiles={FLEET}", "fleet.ray=false", "local.threads=1", "local.steps=20", "local.batch=16"]
LOCK = threading.Lock()


def settings_of(task: str, arm: str, rounds: int, rate: float, seed: int, rows: int) -> list[str]:
    """key=value of one run, its data's place left out."""
    example, own, more = TASKS[task]
    return [
        *more, *COMMON, *ARMS[arm], f"rounds={rounds}", f"seed={seed}",
        f"local.lr={own * rate * RATE_OF.get(arm, 1.0):.6g}", f"evaluate.rows={rows}",
        f"evaluate.every={max(1, rounds // 10)}", *SHORTER.get(example, ()),
    ]  # fmt: skip


def key_of(task: str, settings: list[str]) -> str:
    """Of a run: its settings, the method's with its defaults, the fleet and the built-in model: another of these is
    another run.
    """
    run = load_run(ROOT / TASKS[task][0], settings, find_profiles)
    method: Any = make_method(run.method)  # a dataclass, which the protocol cannot say
    model = recipe_hash() if run.model.name == "builtin:tiny-llama" else run.model.name
    text = json.dumps([TASKS[task][0], settings, asdict(method), (ROOT / FLEET).read_text(), model])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def done(
    task: str, arm: str, rounds: int, rate: float, seed: int, options: argparse.Namespace, rows: int | None = None
) -> dict[str, Any]:
    """One run's figures, from the file or made now; {} if it failed."""
    settings = settings_of(task, arm, rounds, rate, seed, rows or options.rows)
    key, example = key_of(task, settings), TASKS[task][0]
    if example in FILES:
        settings.append(f"data.source={options.data / FILES[example]}")
    with LOCK:
        lines = DONE.read_text().splitlines() if DONE.exists() else []
    for line in lines:
        if json.loads(line)["key"] == key:
            return dict(json.loads(line))
    out = CACHE / key
    command = [sys.executable, "-m", "fedpipe_ray"]
    if (out / "checkpoint").is_dir() and not (out / "summary.json").exists():
        command += ["resume", str(out)]
    else:
        shutil.rmtree(out, ignore_errors=True)
        command += ["run", example, *settings, "--out", str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        print(f"{task} / {arm}: {ended.stderr.strip().splitlines()[-1:]}", flush=True)
        return {}
    record = {
        "key": key, "task": task, "arm": arm, "rounds": rounds, "rate": rate, "seed": seed,
        "rows": rows or options.rows, "commit": commit(), "date": date.today().isoformat(), **figures(out),
    }  # fmt: skip
    with LOCK, DONE.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"{task} / {arm}, {rounds} rounds, rate x{rate}, seed {seed}: loss {record['loss'][-1]:.4f}", flush=True)
    return record


def figures(out: Path) -> dict[str, Any]:
    """What the comparison needs of a run folder: virtual clock and validation loss, and what it took."""
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    clock = np.cumsum([line["virtual_seconds"] for line in lines])
    seen = [(float(at), line["eval"]) for at, line in zip(clock, lines) if line["eval"].get("global")]
    edges = [edge for line in lines for edge in line["edges"].items()]
    fine = [edge for _, edge in edges if edge["status"] == "ok"]
    kept = yaml.safe_load((out / "config.yaml").read_text())
    planned = kept["local"]["steps"] * kept["local"]["batch"]
    capacity = {name: profile["training_memory_bytes"] for name, profile in kept["fleet"]["edges"].items()}
    last, told = seen[-1][1], [json.loads(line).get("plans") for line in (out / "plans.jsonl").read_text().splitlines()]
    return {
        "clock": [at for at, _ in seen], "loss": [found["global"]["loss"] for _, found in seen],
        "worst": max(edge["loss"] for edge in last["edges"].values()),
        "accuracy": last["global"].get("accuracy", last["global"].get("token_accuracy")),
        "worst accuracy": min(e.get("accuracy", e.get("token_accuracy")) for e in last["edges"].values()),
        "bytes_up": sum(line["bytes_up"] for line in lines), "bytes_down": sum(line["bytes_down"] for line in lines),
        "trainable": float(np.mean([edge["bytes_up"] / 4 for edge in fine])),
        "under": float(np.mean([max(0.0, 1 - edge["samples"] / planned) for edge in fine])),
        "memory": max(edge["training_memory_bytes"] / capacity[name] for name, edge in edges),
        "lost": len(edges) - len(fine), "edge rounds": len(edges),
        "plans": hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16],
    }  # fmt: skip


def round_seconds(probe: dict[str, Any]) -> float:
    """Virtual seconds of a round: the mean of the second and third, for the first has other plans, and ranks grow."""
    return float(probe["clock"][2] - probe["clock"][0]) / 2


def reached(run: dict[str, Any], target: float) -> float:
    """Virtual seconds until the macro loss first is at `target`, on the straight line between rounds; or infinity."""
    clock, loss = np.array(run["clock"]), np.array(run["loss"])
    below = np.nonzero(loss <= target)[0]
    if not len(below):
        return float("inf")
    at = int(below[0])
    if at == 0:
        return float(clock[0])
    part = (loss[at - 1] - target) / (loss[at - 1] - loss[at])
    return float(clock[at - 1] + part * (clock[at] - clock[at - 1]))


def counted(task: str, seed: int, options: argparse.Namespace, pool: ThreadPoolExecutor) -> dict[str, int]:
    """Rounds by arm, for as much virtual time as the synchronous arm needs for its own; arms that failed left out."""
    probes = {arm: pool.submit(done, task, arm, 3, 1.0, seed, options, rows=8) for arm in options.arms}
    seconds = {arm: round_seconds(probe.result()) for arm, probe in probes.items() if probe.result()}
    if "synchronous" not in seconds:
        raise SystemExit(f"{task}: the synchronous arm failed, and its time is everybody's")
    return {arm: max(2, round(options.rounds * seconds["synchronous"] / one)) for arm, one in seconds.items()}


def compare(task: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One task: a row an arm. Time to target is against the synchronous arm of the same seed."""
    with ThreadPoolExecutor(options.jobs) as pool:
        count = counted(task, 0, options, pool)
        rates = dict.fromkeys(count, 1.0)
        if not options.quick:
            half = {
                (arm, rate): pool.submit(done, task, arm, max(2, count[arm] // 2), rate, 0, options)
                for arm in count
                for rate in RATES
            }
            for arm in count:
                found = {rate: half[arm, rate].result() for rate in RATES}
                last = {rate: run["loss"][-1] for rate, run in found.items() if run}
                rates[arm] = min((r for r in last if last[r] <= min(last.values()) + EQUAL), default=1.0)
        runs: dict[tuple[str, int], dict[str, Any]] = {}
        for seed in options.seeds:
            futures = {
                arm: pool.submit(done, task, arm, rounds, rates[arm], seed, options)
                for arm, rounds in counted(task, seed, options, pool).items()
                if arm in rates
            }
            runs |= {(arm, seed): future.result() for arm, future in futures.items()}
    both = [(arm, seed) for arm, seed in runs if runs[arm, seed] and runs["synchronous", seed]]
    ended = [arm for arm in rates if any((arm, seed) in both for seed in options.seeds)]
    return [row_of(task, arm, runs, rates[arm], options.seeds) for arm in ended]


def row_of(
    task: str, arm: str, runs: dict[tuple[str, int], dict[str, Any]], rate: float, seeds: Sequence[int]
) -> dict[str, Any]:
    """The figures of one arm: means over the seeds; +-: standard deviation over them; x sooner: median and range.
    k numbers up: what an edge trains and sends.

    vs sync: paired difference of the final macro loss, and of the worst edge's.
    """
    both = [(runs.get((arm, seed), {}), runs["synchronous", seed]) for seed in seeds]
    pairs = [(mine, other) for mine, other in both if mine and other]
    own = [mine for mine, _ in pairs]
    final = np.array([mine["loss"][-1] for mine in own])
    sooner = [other["clock"][-1] / reached(mine, other["loss"][-1]) for mine, other in pairs]

    def mean(name: str) -> float:
        return float(np.mean([mine[name] for mine in own]))

    return {
        "task": task, "arm": arm, "rounds": " ".join(str(mine["rounds"]) for mine in own), "rate x": rate,
        "seeds": len(own),
        "virtual s": float(np.mean([mine["clock"][-1] for mine in own])),
        "loss": float(final.mean()), "+-": float(final.std()),
        "vs sync": float(np.mean([mine["loss"][-1] - other["loss"][-1] for mine, other in pairs])),
        "worst edge": mean("worst"), "its vs sync": float(np.mean([m["worst"] - o["worst"] for m, o in pairs])),
        "accuracy": mean("accuracy"), "worst edge's": mean("worst accuracy"),
        "s to target": float(np.median([reached(mine, other["loss"][-1]) for mine, other in pairs])),
        "x sooner": float(np.median(sooner)), "least": min(sooner), "most": max(sooner),
        "MB up": mean("bytes_up") / 1e6, "MB down": mean("bytes_down") / 1e6, "k numbers up": mean("trainable") / 1e3,
        "under-trained": mean("under"), "memory of capacity": max(mine["memory"] for mine in own),
        "lost": f"{sum(mine['lost'] for mine in own)} of {sum(mine['edge rounds'] for mine in own)}",
        "commits": " ".join(sorted({mine["commit"] for mine in own})),
    }  # fmt: skip


def main() -> None:
    """Runs what is asked; publishes after every task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="docstrings, one seed, four arms, no tuning of the rate")
    parser.add_argument("--tasks", help="names with ; between them; default: all")
    parser.add_argument("--arms", help="names with , between them; default: all")
    parser.add_argument("--seeds", help="default: 0,1,2")
    parser.add_argument("--rounds", type=int, help="of the synchronous arm; default 6, quick 3")
    parser.add_argument("--rows", type=int, default=100, help="validation rows an edge")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    options.data = options.data.resolve()
    few = ["synchronous", "capped", "filled", "fedpipe best"]
    options.tasks = options.tasks.split(";") if options.tasks else ["docstrings"] if options.quick else list(TASKS)
    options.arms = options.arms.split(",") if options.arms else few if options.quick else list(ARMS)
    options.arms = list(dict.fromkeys(["synchronous", *options.arms]))  # its time is everybody's
    options.seeds = [int(seed) for seed in (options.seeds or ("0" if options.quick else "0,1,2")).split(",")]
    options.rounds = options.rounds or (3 if options.quick else 6)
    edges = yaml.safe_load((ROOT / FLEET).read_text())["edges"].values()
    speeds = [build(Profile, edge).compute_flops for edge in edges]
    ceiling = float(np.mean(speeds) / min(speeds))
    print(f"mean over slowest speed, the ceiling: {ceiling:.2f}", flush=True)
    name = "fedpipe_against_baselines" + ("_quick" if options.quick else "")
    kept = RESULTS / f"{name}.json"
    for task in options.tasks:
        found = compare(task, options)
        again = {row["arm"] for row in found}
        rows = json.loads(kept.read_text())["rows"] if kept.exists() else []  # another may have published meanwhile
        rows = [row for row in rows if row["task"] != task or row["arm"] not in again] + found
        publish(
            name, "FedPipe against its baselines, equal virtual time, validation rows", rows, seeds=options.seeds,
            ceiling=ceiling,
        )  # fmt: skip


if __name__ == "__main__":
    main()
