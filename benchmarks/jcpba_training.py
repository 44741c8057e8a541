"""Does planning pruning and bandwidth together reach a loss sooner on the virtual clock? Bar: 40 % less, on GSM8K.

    python -m benchmarks.jcpba_training --data FOLDER [--quick] [--seeds 0,1,2] [--settings compute,link]

FOLDER holds gsm8k_train.jsonl. Ten edges with speeds of 1 to 5, at random places in a disc of 500 m, the texts divided
evenly; a Llama of 2.0M weights, pretrained on the public docstrings; LoRA of rank 8; the method's defaults of rho_bar
and rho_max. compute: 20 MHz, where work takes longer than the upload; link: 2 MHz, where the upload does.

Every arm gets the virtual time in which no pruning with equal bandwidth does ROUNDS rounds, at the same learning rate.
Time to target: until the validation loss that the latter has at its end, on the straight line between evaluations. Test
rows are looked at once, at the end. Rows that stand in results/jcpba_training.jsonl are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.fedpipe_against_baselines import reached
from benchmarks.table import RESULTS, commit, publish
from fedpipe_ray.config import load_run
from fedpipe_ray.evaluate import combine
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.loop import federate
from fedpipe_ray.methods import make_method
from fedpipe_ray.pretrain import RECIPES, pretrained, recipe_hash
from fedpipe_ray.report import Lost
from fedpipe_ray.run import server_site

DONE = RESULTS / "jcpba_training.jsonl"
RECIPE = replace(RECIPES["tiny-llama"], vocabulary=1024, layers=6, heads=8, steps=400)
EDGES, ROUNDS, TEXTS = 10, 6, 3000
SPEED = 2e9  # times U[2, 10] FLOP/s: a round's work then takes 1 to 5 times its upload at 20 MHz
LR = 1e-2  # 0.004 gave (i) a higher validation loss after six rounds, seed 0: 4.17, not 4.01
SETTINGS = {"compute": "20MHz", "link": "2MHz"}
ARMS = ("unpruned-equal", "unpruned", "uniform-equal", "uniform", "pruning-equal", "random", "bcd", "joint")
METHOD = "method={name: jcpba, rank: 8, alpha: 16, bandwidth_hz: %s, allocation: %s}"


def run_file(folder: Path, data: Path, seed: int) -> Path:
    """The run that all arms share."""
    write_text(data / "gsm8k_train.jsonl", folder / "text.jsonl")
    speeds = SPEED * np.random.default_rng(seed).uniform(2, 10, EDGES)
    edges = {f"e{k}": {"cpus": 0.1, "compute_flops": float(speed)} for k, speed in enumerate(speeds)}
    run = {
        "rounds": 10**6, "seed": seed, "model": {"name": str(pretrained(RECIPE, threads=1))},
        "data": {
            "source": str(folder / "text.jsonl"), "prompt": "{begin}", "response": "{rest}", "max_length": 64,
            "partition": {"by": "iid"},
        },
        "fleet": {"ray": False, "edges": edges}, "local": {"steps": 4, "batch": 4, "lr": LR, "schedule": "constant"},
        "evaluate": {"rows": 10},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def write_text(source: Path, target: Path) -> None:
    """Question and answer as one text, of which all but the first six words count: more to learn from a token."""
    rows = []
    for line in source.read_text().splitlines()[:TEXTS]:
        row = json.loads(line)
        words = row["question"].split(" ")
        rest = " " + " ".join(words[6:]) + "\nAnswer: " + row["answer"]
        rows.append(json.dumps({"begin": "Question: " + " ".join(words[:6]), "rest": rest}) + "\n")
    target.write_text("".join(rows))


def arm_of(path: Path, method: str, budget: float | None, rounds: int) -> dict[str, Any]:
    """One run of `rounds` rounds, or of those within `budget` virtual seconds, and what it took."""
    run = load_run(path, [method], lambda name, _: {})
    made = make_method(run.method)
    fleet = SerialFleet(run, made)
    fleet.open()
    server = server_site(run, made, [])
    count = rounds if budget is None else 10**6
    clock, loss, rho, up, down, flops, state = [0.0], [loss_on(fleet, None, "validation")], [], 0, 0, 0.0, None
    for done in federate(made, fleet, server, rounds=count, seed=run.seed, evaluate_every=0):
        if budget is not None and done.clock_seconds > budget:
            break
        state = done.state
        clock.append(done.clock_seconds)
        loss.append(loss_on(fleet, state, "validation"))
        rho.append(state.numbers["rho"])
        up, down = up + done.bytes_up, down + done.bytes_down
        flops += sum(outcome.cost.flops for outcome in done.outcomes.values())
    return {
        "rounds": len(clock) - 1, "clock": clock, "loss": loss, "rho": float(np.mean(rho)), "bytes_up": up,
        "bytes_down": down, "flops": flops, "test": loss_on(fleet, state, "test"),
    }  # fmt: skip


def loss_on(fleet: SerialFleet, state: Any, split: str) -> float:
    found = fleet.evaluate(state, split)
    lost = [f"{edge}: {one.reason}" for edge, one in found.items() if isinstance(one, Lost)]
    if lost:
        raise SystemExit("; ".join(lost))
    return combine({edge: one for edge, one in found.items() if not isinstance(one, Lost)})["loss"]


def runs(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """All runs of these settings that are done, after each."""
    found = [json.loads(line) for line in DONE.read_text().splitlines()] if DONE.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for setting, seed in itertools.product(options.settings, options.seeds):
            path = run_file(Path(folder), options.data, seed)
            budget = None
            for arm in options.arms:
                key = {
                    "setting": setting,
                    "arm": arm,
                    "seed": seed,
                    "of": options.rounds,
                    "recipe": recipe_hash(RECIPE),
                }
                one = next((one for one in found if key.items() <= one.items()), None)
                if one is None:
                    method = METHOD % (SETTINGS[setting], arm)
                    one = {**key, **arm_of(path, method, budget, options.rounds), "commit": commit()}
                    found.append(one)
                    RESULTS.mkdir(exist_ok=True)
                    with DONE.open("a") as file:
                        file.write(json.dumps(one) + "\n")
                    print(setting, arm, seed, one["rounds"], one["loss"][-1], one["test"], flush=True)
                budget = budget or one["clock"][-1]
                yield [one for one in found if one["of"] == options.rounds]


def row_of(setting: str, arm: str, done: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds; +-: standard deviation. vs (i): paired difference of the test losses.

    time: to the target, over that of (i); less: what it saves, of the seed where it saves least.
    """
    base = {one["seed"]: one for one in done if (one["setting"], one["arm"]) == (setting, ARMS[0])}
    own = [one for one in done if (one["setting"], one["arm"]) == (setting, arm) and one["seed"] in base]
    time = [reached(one, base[one["seed"]]["loss"][-1]) / base[one["seed"]]["clock"][-1] for one in own]
    apart = [one["test"] - base[one["seed"]]["test"] for one in own]
    even = [one["loss"][base[one["seed"]]["rounds"]] - base[one["seed"]]["loss"][-1] for one in own]
    return {
        "setting": setting, "allocation": arm, "seeds": len(own),
        "rounds": float(np.mean([one["rounds"] for one in own])),
        "round s": float(np.mean([one["clock"][-1] / one["rounds"] for one in own])),
        "time": float(np.mean(time)), "+-": float(np.std(time)), "least saved %": 100 * (1 - max(time)),
        "test loss": float(np.mean([one["test"] for one in own])), "vs (i)": float(np.mean(apart)),
        "its +-": float(np.std(apart)), "validation vs (i), equal rounds": float(np.mean(even)),
        "rho": float(np.mean([one["rho"] for one in own])),
        "MB a round": float(np.mean([(one["bytes_up"] + one["bytes_down"]) / one["rounds"] for one in own])) / 1e6,
        "GFLOP a round": float(np.mean([one["flops"] / one["rounds"] for one in own])) / 1e9,
    }  # fmt: skip


def main() -> None:
    """Runs what is missing; publishes after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds of (i)")
    parser.add_argument("--seeds", help="default: 0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS), help="the first is run in any case")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.data, options.rounds = options.data.resolve(), 2 if options.quick else ROUNDS
    options.seeds = [int(seed) for seed in (options.seeds or ("0" if options.quick else "0,1,2")).split(",")]
    options.settings = options.settings.split(",")
    options.arms = list(dict.fromkeys([ARMS[0], *options.arms.split(",")]))  # its time is everybody's
    for done in runs(options):
        pairs = list(dict.fromkeys((one["setting"], one["arm"]) for one in done))
        rows = [row_of(setting, arm, done) for setting, arm in sorted(pairs, key=order)]
        name = "jcpba_training" + ("_quick" if options.quick else "")
        publish(name, "JCPBA: time to the loss of no pruning with equal bandwidth, GSM8K", rows, rounds=options.rounds)


def order(pair: tuple[str, str]) -> tuple[int, int]:
    """As the settings and arms stand above."""
    return list(SETTINGS).index(pair[0]), ARMS.index(pair[1])


if __name__ == "__main__":
    main()
