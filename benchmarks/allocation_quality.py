"""Does an allocation found by search and short runs train as well as the planner's, and better than uniform LoRA?

    python -m benchmarks.allocation_quality [--seeds 0,1,2] [--rounds 5] [--measure 3] [--data FOLDER]

AG News, the 22M encoder, Dirichlet(0.3), the five edges of clusters/unequal.yaml with 1,200 to 300 MiB. Equal budget:
the deadline that FedPipe's planner finds for that seed, the same rounds, the edges' memory. `planner`: FedPipe's own
plan; `uniform`: the largest uniform LoRA that fits every edge, steps to the deadline; both may be late on an edge, for
the deadline is soft and few steps are kept for rare rows. `allocated`: `fedpipe allocate --memory-from-profiles
--measure K`, whose --latency is hard and the planner's longest edge; chosen by validation loss. Quality is that of the
test rows. The rate is not tuned for any. Runs that are done stay in
results/allocation_quality.jsonl and are not repeated (remove a line to measure it anew), a seed's plan and allocation
in benchmarks/.cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fedpipe_against_baselines import AG_NEWS, COMMON, FLEET, ROOT, UNIFORM
from benchmarks.table import RESULTS, commit, publish

CACHE = ROOT / "benchmarks" / ".cache" / "allocation_quality"
DONE = RESULTS / "allocation_quality.jsonl"
SETTINGS = [
    *AG_NEWS, *COMMON, "local.steps=10", "local.batch=8", "local.lr=0.003",
    "evaluate.rows=100", "evaluate.every=5",
]  # fmt: skip
ARMS = {
    "planner": "method={{name: fedpipe, deadline_seconds: {deadline}}}",
    "uniform": UNIFORM.replace("{", "{{").replace("}", ", deadline_seconds: {deadline}}}") % "filled",
}


def command(name: str, *arguments: str) -> None:
    """Runs fedpipe. Raises SystemExit with its last lines."""
    line = [sys.executable, "-m", "fedpipe_ray", name, *arguments]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"fedpipe {name}: {ended.stderr.strip()[-600:]}")


def figures(out: Path) -> dict[str, float]:
    """Of a run folder: the test rows' loss and accuracy, its clock, its memory against capacity."""
    tuned = json.loads((out / "summary.json").read_text())["tuned"]
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    capacity = dict(zip(("e1", "e2", "e3", "e4", "e5"), (1200, 800, 600, 400, 300), strict=True))
    taken = [
        edge["training_memory_bytes"] / 2**20 / capacity[name] for line in lines for name, edge in line["edges"].items()
    ]
    return {
        "loss": tuned["global"]["loss"], "accuracy": tuned["global"]["accuracy"],
        "worst edge": max(edge["loss"] for edge in tuned["edges"].values()),
        "virtual s": sum(line["virtual_seconds"] for line in lines),
        "MB": sum(line["bytes_up"] + line["bytes_down"] for line in lines) / 1e6, "memory of capacity": max(taken),
        "lost": sum(edge["status"] != "ok" for line in lines for edge in line["edges"].values()),
    }  # fmt: skip


def done(arm: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """One arm's figures, from the file or made now."""
    about = {"arm": arm, "seed": seed, "rounds": options.rounds, "measured": options.measure}
    for line in DONE.read_text().splitlines() if DONE.exists() else []:
        known = json.loads(line)
        if about.items() <= known.items():
            return dict(known["figures"])
    found = made(arm, seed, options)
    with DONE.open("a") as file:
        file.write(json.dumps({**about, "commit": commit(), "date": date.today().isoformat(), "figures": found}) + "\n")
    return found


def made(arm: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """One arm's figures, from its folder or run now."""
    own = [*SETTINGS, f"seed={seed}", f"rounds={options.rounds}", f"data.source={options.data / 'ag_news.csv'}"]
    place = CACHE / f"{options.rounds}-{options.measure}-{seed}"
    plan, out = place / "plan.json", place / arm
    if (out / "summary.json").exists():
        return figures(out)
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["rm", "-rf", str(out)], check=True)
    if not plan.exists():
        command("plan", "examples/ag_news.yaml", *own, "method={name: fedpipe}", "--out", str(plan))
    planned = json.loads(plan.read_text())
    deadline = planned["deadline_seconds"]
    longest = 1.001 * max([deadline, *(edge["seconds"] for edge in planned["edges"].values())])
    if arm in ARMS:
        command("run", "examples/ag_news.yaml", *own, ARMS[arm].format(deadline=deadline), "--out", str(out))
        return figures(out)
    found = place / "allocation"
    if not (found / "allocation.yaml").exists():
        subprocess.run(["rm", "-rf", str(found)], check=True)
        command(
            "allocate", "examples/ag_news.yaml", *own, ARMS["planner"].format(deadline=longest), "--out", str(found),
            "--latency", f"{longest:.6g}s", "--memory-from-profiles", "--measure", str(options.measure),
        )  # fmt: skip
    command("run", str(found / "allocation.yaml"), "--out", str(out))
    return figures(out)


def main() -> None:
    """Runs what is asked; publishes after every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("data"))
    options = parser.parse_args()
    options.data = options.data.resolve()
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in [int(one) for one in options.seeds.split(",")]:
        for arm in ("planner", "uniform", "allocated"):
            runs.setdefault(arm, []).append(done(arm, seed, options))
            print(seed, arm, runs[arm][-1], flush=True)
        rows: list[dict[str, Any]] = []
        for arm, own in runs.items():
            paired = [mine["loss"] - other["loss"] for mine, other in zip(own, runs["planner"], strict=True)]
            means = {name: float(np.mean([run[name] for run in own])) for name in own[0]}
            spread = {f"{name} +-": float(np.std([run[name] for run in own])) for name in ("loss", "accuracy")}
            rows.append({"arm": arm, "seeds": len(own), **means, **spread, "loss - planner's": float(np.mean(paired))})
        publish(
            "allocation_quality", "Allocated, planned, uniform: test rows at an equal budget", rows,
            rounds=options.rounds, measured=options.measure, fleet=FLEET,
        )  # fmt: skip


if __name__ == "__main__":
    main()
