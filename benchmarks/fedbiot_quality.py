"""How good is FedBiOT's result, for a, beta, eps and lambda, beside FedOT, Offsite-Tuning and LoRA on the whole model?

    python -m benchmarks.fedbiot_quality [--quick]

builtin:deep-llama (8 layers), the five edges of the quickstart, rank 8 on all linear weights, 4 rounds of 20 steps of 8
rows, the standard library as public rows. Loss and perplexity on 100 test rows of every edge, read here: of
AdapFu, the whole model with the adapter, and of AdapEmu, the edges' own. FedOT: nothing is aligned, nothing pulls.
Offsite-Tuning: the same with one edge that has all rows, and five times the steps. Client: parameters an edge holds;
GFLOP, kB: of an edge in a round after the first; emulator MB: what it gets once more in the first. Each row is written
as it comes; rows that the last table has are not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.table import RESULTS, parser, publish
from clusters import find_profiles
from fedpipe_ray.config import load_run
from fedpipe_ray.evaluate import evaluate, perplexity
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.loop import federate
from fedpipe_ray.methods import make_method
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Run
from fedpipe_ray.site import Site

EXAMPLE = Path(__file__).parents[1] / "examples" / "fedbiot.yaml"
FEDOT = {"prealign_steps": 0, "align_steps": 0, "eps": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA, whole model": {"name": "lora"},
    "FedBiOT": {},
    "FedOT, last": FEDOT,
    "FedOT, ends": {**FEDOT, "a": 4, "split": "ends"},
    "FedBiOT, beta 0.5": {"beta": 0.5},
    "FedOT, last, beta 0.5": {**FEDOT, "beta": 0.5},
    "FedBiOT, eps 1": {"eps": 1},
    "FedBiOT, lambda 0": {"lam": 0},
    "Offsite-Tuning, ends": {**FEDOT, "a": 4, "split": "ends", "pooled": True},
    "FedBiOT, eps 0.1": {"eps": 0.1},
    "FedBiOT, beta 0": {"beta": 0},
    "FedBiOT, a 1": {"a": 1},
    "FedBiOT, a 4": {"a": 4},
    "FedOT, last, a 4": {**FEDOT, "a": 4},
    "FedBiOT, product": {"join": "product"},
    "FedBiOT, no steps between rounds": {"align_steps": 0},
}


def settings_of(setting: str, seed: int, quick: bool) -> Run:
    """The run of one row."""
    fields = {key: value for key, value in SETTINGS[setting].items() if key != "pooled"}
    given = fields if "name" in fields else {"name": "fedbiot", **fields}
    rounds, steps = (1, 4) if quick else (4, 20)
    changes = [
        f"seed={seed}", f"rounds={rounds}", "fleet.ray=false", f"local.steps={steps}",
        "method=" + json.dumps({**given, **({"prealign_steps": 4} if quick and "name" not in fields else {})}),
    ]  # fmt: skip
    return load_run(EXAMPLE, changes, find_profiles)


def losses(site: Site, models: Mapping[str, Any], rows: Mapping[str, Any]) -> dict[str, float]:
    """Mean test loss over the edges of each model; a model at a time is made, for they share the base."""
    found = {}
    for name, make in models.items():
        model, base = make(), site.base
        each = [
            evaluate(model, data.test, device=base.device, pad_id=base.pad_id, limit=100)["loss"]
            for data in rows.values()
        ]
        found[name] = float(np.mean(each))
    return found


def row_of(setting: str, seed: int, quick: bool) -> dict[str, Any]:
    """Runs one setting and measures what came of it."""
    run = settings_of(setting, seed, quick)
    judged = SerialFleet(run, make_method({"name": "lora"}))
    judged.open()
    rows = {name: site.data for name, site in judged.sites.items()}
    if SETTINGS[setting].get("pooled"):
        run = pooled(run, rows)
    method, began = make_method(run.method), time.perf_counter()
    fleet = SerialFleet(run, method)
    fleet.open()
    if SETTINGS[setting].get("pooled"):
        everything: Any = Pool([data.train for data in rows.values()])
        fleet.sites["all"].data = everything
    server = server_site(run, method, [])
    done = list(federate(method, fleet, server, rounds=run.rounds, seed=run.seed, evaluate_every=0))
    views = method.weights(done[-1].state, server)
    made = {name: partial(view.on, server.base) for name, view in views.items()}
    found = losses(server, made, rows)
    last, first = done[-1].reports[0], done[0].reports[0]
    site = fleet.sites[last.edge]
    held = sum(p.numel() for n, p in site.base.model.named_parameters() if ".lora_" not in n)
    result = next(iter(found.values()))
    return {
        "setting": setting, "seed": seed, "loss": result, "perplexity": perplexity(result),
        "AdapEmu loss": found.get("adapemu", result), "client M": held / 1e6, "GFLOP": last.cost.flops / 1e9,
        "kB up": last.cost.bytes_up / 1e3, "kB down": last.cost.bytes_down / 1e3,
        "emulator MB": (first.cost.bytes_down - last.cost.bytes_down) / 1e6,
        "virtual s": sum(one.virtual_seconds for one in done), "s": time.perf_counter() - began,
    }  # fmt: skip


class Pool:
    """All edges' training rows as those of one."""

    def __init__(self, parts: list[Any]) -> None:
        self.train, self.places = self, [(part, row) for part in parts for row in range(len(part))]

    def __len__(self) -> int:
        return len(self.places)

    def length(self, index: int) -> int:
        part, row = self.places[index]
        return int(part.length(row))

    def example(self, index: int) -> Any:
        part, row = self.places[index]
        return part.example(row)


def pooled(run: Run, rows: Mapping[str, Any]) -> Run:
    """The run with one edge, whose steps are those of all."""
    edge = next(iter(run.fleet.edges.values()))  # its own rows are put aside
    changes = {
        "seed": run.seed, "rounds": run.rounds, "local.steps": len(rows) * (run.local.steps or 1),
        "fleet": {"ray": False, "edges": {"all": {"data": edge.data}}}, "method": run.method,
    }  # fmt: skip
    return load_run(EXAMPLE, [f"{key}={json.dumps(value)}" for key, value in changes.items()], find_profiles)


def wanted(quick: bool) -> Iterator[tuple[str, int]]:
    """Settings and seeds; the first seed of all of them first."""
    for seed in (0,) if quick else (0, 1):
        for setting in list(SETTINGS)[: 3 if quick else None]:
            yield setting, seed


def main(quick: bool) -> None:
    """A row as it comes."""
    torch.set_num_threads(1)
    name = f"fedbiot_quality{'_quick' if quick else ''}"
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    known = {(row["setting"], row["seed"]) for row in rows}
    for setting, seed in wanted(quick):
        if (setting, seed) not in known:
            rows.append(row_of(setting, seed, quick))
            publish(name, "FedBiOT: loss on the edges' test rows", rows)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true")
    main(options.parse_args().quick)
