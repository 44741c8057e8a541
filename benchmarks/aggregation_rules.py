"""Which rule joins LoRA adapters best, at what bytes? One table over rules and tasks, edges of equal and unequal rank.

    python -m benchmarks.aggregation_rules [--quick] [--tasks "docstrings;ag_news"] [--rules lora,flora] [--seeds 0,1,2]
                                           [--data FOLDER] [--jobs 2]

Five edges; AG News is divided by Dirichlet(0.1), or as one draws ("even", meant for the best rules: name them with
--rules). Equal: rank 16; unequal: 64, 32, 16, 8, 4; scale alpha / rank 2 in both. Every rule gets the same rounds,
steps and rate, which are not tuned for it. Quality is that of the exported state on the edges' test rows. A rule that
refuses unequal ranks has n/a and its refusal; one that is not in METHODS is left out. Runs that are done stay in
results/aggregation_rules.jsonl and are not repeated (remove a line to measure it anew); those that were cut short go on
from benchmarks/.cache. FOLDER holds ag_news.csv. --quick: docstrings, one seed, two short rounds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table import RESULTS, commit, publish
from clusters import find_profiles
from fedpipe_ray.config import load_run
from fedpipe_ray.errors import UserError
from fedpipe_ray.methods import METHODS
from fedpipe_ray.run import preflight

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "benchmarks" / ".cache" / "aggregation_rules"
DONE = RESULTS / "aggregation_rules.jsonl"
RULES = (
    "lora", "zeropad", "hetlora", "flexlora", "flora", "fedex_lora", "lora_fair", "ffa_lora", "rolora", "fedsa_lora",
    "fed_sb", "slora",
)  # fmt: skip
OWN = {"lora": ", residual: true"}  # settings of a rule beside rank, alpha, targets
RANKS = {
    "equal": "rank: 16, alpha: 32",
    "unequal": "rank: 64, alpha: 128, ranks: {laptop: 32, office: 16, branch: 8, minipc: 4}",  # tower: 64
}
AG_NEWS = ("examples/ag_news.yaml", "[query, value]", 6, 10)
AG_NEWS_SETTINGS = [
    "local.lr=0.003",
    "local.precision=bfloat16",
]  # which takes 0.65 of the CPU, with the same losses to 0.001
TASKS: dict[str, tuple[str, str, int, int, list[str]]] = {  # run file, targets, rounds, steps of an edge, settings
    "docstrings": ("examples/quickstart.yaml", "all-linear", 8, 20, ["local.lr=0.006"]),
    "ag_news": (*AG_NEWS, [*AG_NEWS_SETTINGS, "data.partition={by: dirichlet, alpha: 0.1}"]),
    "ag_news, even": (*AG_NEWS, [*AG_NEWS_SETTINGS, "data.partition={by: iid}"]),
}
COMMON = ["fleet.profiles=clusters/laptop.yaml", "fleet.ray=false", "local.threads=1", "evaluate.every=0"]
FILES = {"examples/ag_news.yaml": "ag_news.csv"}
LOCK = threading.Lock()


def length(task: str, options: argparse.Namespace) -> tuple[int, int]:
    """Rounds, and steps of an edge in each."""
    return options.rounds or TASKS[task][2], options.steps or TASKS[task][3]


def settings_of(task: str, ranks: str, rule: str, seed: int, options: argparse.Namespace) -> list[str]:
    """key=value of one run, its data's place left out."""
    _, targets, _, _, own = TASKS[task]
    rounds, steps = length(task, options)
    method = f"method={{name: {rule}, targets: {targets}, {RANKS[ranks]}{OWN.get(rule, '')}}}"
    return [
        *COMMON, *own, method, f"seed={seed}", f"rounds={rounds}", f"local.steps={steps}",
        f"evaluate.rows={options.rows}",
    ]  # fmt: skip


def refusal(task: str, ranks: str, rule: str, options: argparse.Namespace) -> str | None:
    """What the program says of such a run before it begins; None if it runs."""
    try:
        preflight(load_run(ROOT / TASKS[task][0], settings_of(task, ranks, rule, 0, options), find_profiles))
    except UserError as error:
        return str(error)
    return None


def key_of(task: str, settings: list[str]) -> str:
    """Of a run: its settings, and the method's with its defaults, so that a changed default is another run."""
    method: Any = preflight(load_run(ROOT / TASKS[task][0], settings, find_profiles))
    return hashlib.sha256(json.dumps([task, settings, asdict(method)]).encode()).hexdigest()[:16]


def done(task: str, ranks: str, rule: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run's figures, from the file or made now; {} if it failed."""
    settings = settings_of(task, ranks, rule, seed, options)
    key = key_of(task, settings)
    with LOCK:
        known = [json.loads(line) for line in DONE.read_text().splitlines()] if DONE.exists() else []
    found: dict[str, Any] = next((line for line in known if line["key"] == key), {})
    if found:
        return found
    if TASKS[task][0] in FILES:
        settings.append(f"data.source={options.data / FILES[TASKS[task][0]]}")
    out = CACHE / key
    if (out / "checkpoint").is_dir() and not (out / "summary.json").exists():
        arguments = ["resume", str(out)]
    else:
        shutil.rmtree(out, ignore_errors=True)
        arguments = ["run", TASKS[task][0], *settings, "--out", str(out)]
    ended = subprocess.run(
        [sys.executable, "-m", "fedpipe_ray", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        print(f"{task} / {ranks} / {rule}, seed {seed}: {ended.stderr.strip().splitlines()[-1:]}", flush=True)
        return {}
    record = {
        "key": key, "task": task, "ranks": ranks, "rule": rule, "seed": seed, "commit": commit(),
        "date": date.today().isoformat(), **figures(out),
    }  # fmt: skip
    with LOCK, DONE.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"{task} / {ranks} / {rule}, seed {seed}: loss {record['loss']:.4f}", flush=True)
    return record


def figures(out: Path) -> dict[str, Any]:
    """What the table needs of a run folder. server s: of a round, what it took beside its edges, in this process."""
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    found, edges = summary["tuned"]["global"], [edge for line in lines for edge in line["edges"].values()]
    server = [line["wall_seconds"] - sum(edge["seconds"] for edge in line["edges"].values()) for line in lines]
    told = [line["method"]["residual"] for line in lines if line["method"].get("residual") is not None]
    return {
        "base": summary["base"]["global"]["loss"], "loss": found["loss"],
        "accuracy": found.get("accuracy", found.get("token_accuracy")),
        "worst": max(edge["loss"] for edge in summary["tuned"]["edges"].values()),
        "bytes_up": sum(line["bytes_up"] for line in lines), "bytes_down": sum(line["bytes_down"] for line in lines),
        "residual": float(np.mean(told)) if told else None, "server s": float(np.median(server)),
        "lost": sum(edge["status"] != "ok" for edge in edges), "edge rounds": len(edges),
    }  # fmt: skip


def row_of(task: str, ranks: str, rule: str, runs: list[dict[str, Any]], says: str | None) -> dict[str, Any]:
    """Means over the seeds; +-: standard deviation over them. n/a where the rule refuses, and what it says."""
    about = {"task": task, "ranks": ranks, "rule": rule, "seeds": len(runs)}
    columns = {"base": 1.0, "loss": 1.0, "worst": 1.0, "accuracy": 1.0, "bytes_up": 1e6, "bytes_down": 1e6}
    names = {"worst": "worst edge", "bytes_up": "MB up", "bytes_down": "MB down"}
    row: dict[str, Any] = dict(about)
    for column, unit in columns.items():
        values = [run[column] / unit for run in runs]
        row[names.get(column, column)] = float(np.mean(values)) if runs else "n/a"
        if column in ("loss", "accuracy"):
            row[f"{column} +-"] = float(np.std(values)) if runs else "n/a"
    told = [run["residual"] for run in runs if run["residual"] is not None]
    return {
        **row, "residual": float(np.mean(told)) if told else "n/a",
        "server s": float(np.mean([run["server s"] for run in runs])) if runs else "n/a",
        "lost": f"{sum(run['lost'] for run in runs)} of {sum(run['edge rounds'] for run in runs)}",
        "commits": " ".join(sorted({run["commit"] for run in runs})), "refusal": (says or "").partition(";")[0],
    }  # fmt: skip


def compare(task: str, ranks: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a rule; none of a rule whose runs failed."""
    says = {rule: refusal(task, ranks, rule, options) for rule in options.rules}
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {
            (rule, seed): pool.submit(done, task, ranks, rule, seed, options)
            for seed in options.seeds
            for rule in options.rules
            if says[rule] is None
        }
        runs = {key: future.result() for key, future in futures.items()}
    own = {rule: [run for (name, _), run in runs.items() if name == rule and run] for rule in options.rules}
    return [row_of(task, ranks, rule, own[rule], says[rule]) for rule in options.rules if own[rule] or says[rule]]


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tasks", help="names with ; between them; default: all, quick docstrings")
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--seeds", help="default: 0,1,2, quick 0")
    parser.add_argument("--rounds", type=int, help="default: the task's, quick 2")
    parser.add_argument("--steps", type=int, help="of an edge and round; default: the task's, quick 2")
    parser.add_argument("--rows", type=int, help="test rows an edge; default 200, quick 20")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    quick = options.quick
    options.tasks = (options.tasks or ("docstrings" if quick else ";".join(TASKS))).split(";")
    options.seeds = [int(seed) for seed in (options.seeds or ("0" if quick else "0,1,2")).split(",")]
    options.rounds, options.steps = options.rounds or 2 * quick, options.steps or 2 * quick
    options.rows, options.data = options.rows or (20 if quick else 200), options.data.resolve()
    options.rules = [rule for rule in options.rules.split(",") if rule in METHODS]
    return options


def main() -> None:
    """Runs what is asked; publishes after each task and kind of ranks."""
    options = arguments()
    RESULTS.mkdir(exist_ok=True)
    name = "aggregation_rules" + ("_quick" if options.quick else "")
    kept = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text())["rows"] if kept.exists() else []
    for task in options.tasks:
        for ranks in RANKS:
            found = compare(task, ranks, options)
            again = {row["rule"] for row in found}
            rows = [r for r in rows if (r["task"], r["ranks"]) != (task, ranks) or r["rule"] not in again] + found
            if rows:
                publish(
                    name, "Rules that join LoRA adapters: quality on test rows, bytes, residual", rows,
                    seeds=options.seeds, rounds_and_steps={name: length(name, options) for name in options.tasks},
                )  # fmt: skip


if __name__ == "__main__":
    main()
