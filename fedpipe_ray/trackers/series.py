"""The figures that trackers get: the same names everywhere, described in docs/tracking.md."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from fedpipe_ray.settings import Run

MOST_EDGES = 50  # of larger fleets no figures of single edges: TensorBoard and MLflow get slow, and nobody reads them
COSTS = ("bytes_up", "bytes_down", "wall_seconds", "evaluate_seconds", "virtual_seconds")
OF_EDGE = (
    "train_loss", "bytes_up", "bytes_down", "seconds", "virtual_seconds", "peak_memory_bytes", "training_memory_bytes",
)  # fmt: skip
Hyperparameter = str | int | float | bool


def of_round(record: Mapping[str, Any], run: Run) -> dict[str, float]:
    """The figures of a line of rounds.jsonl. Bytes, seconds, nats; what is not a finite number is left out."""
    edges: Mapping[str, Any] = record["edges"]
    counts = Counter(edge["status"] for edge in edges.values())
    values = {
        "train/loss": record["train_loss"],
        **{f"validation/{name}": value for name, value in record["eval"]["global"].items()},
        **{f"cost/{name}": record[name] for name in COSTS},
        **{f"edges/{status}": counts[status] for status in ("ok", "late", "lost")},
        **memory(edges, run),
        **{f"method/{name}": value for name, value in record["method"].items()},
    }
    if len(run.fleet.edges) <= MOST_EDGES:
        evaluated: Mapping[str, Any] = record["eval"]["edges"]
        for edge in run.fleet.edges:
            values |= {f"edge/{edge}/validation/{n}": value for n, value in (evaluated.get(edge) or {}).items()}
            if edge in edges:
                values |= {f"edge/{edge}/{name}": edges[edge][name] for name in OF_EDGE}
    return finite(values)


def memory(edges: Mapping[str, Any], run: Run) -> dict[str, float]:
    """The largest peak of an edge's process, and of training alone; and that as a share of what the edge may take.

    Left out where no edge could tell.
    """
    found: dict[str, float] = {}
    for name in ("peak_memory_bytes", "training_memory_bytes"):
        found[f"memory/{name}"] = max((edge[name] for edge in edges.values()), default=0)
    profiles = run.fleet.edges
    found["memory/share_of_capacity"] = max(
        (edge["training_memory_bytes"] / profiles[name].capacity_bytes for name, edge in edges.items()), default=0.0
    )
    return {name: value for name, value in found.items() if value}


def of_test(table: Mapping[str, Any], model: str, run: Run) -> dict[str, float]:
    """The figures of test metrics as summary.json has them; model: `base` or `tuned`."""
    values = {f"test/{model}/{name}": value for name, value in table.get("global", {}).items()}
    values |= {f"test/{model}/server/{name}": value for name, value in table.get("server", {}).items()}
    if len(run.fleet.edges) <= MOST_EDGES:
        for edge, metrics in table.get("edges", {}).items():
            values |= {f"edge/{edge}/test/{model}/{name}": value for name, value in metrics.items()}
    return finite(values)


def finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """Those that are finite numbers, as floats."""
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def hyperparameters(run: Run) -> dict[str, Hyperparameter]:
    """The resolved configuration by dotted keys; of the edges only their number, and nothing about trackers or place.

    Keys that are null are left out; lists and mappings are JSON.
    """
    tree = dataclasses.asdict(run)
    del tree["track"], tree["out"]
    tree["fleet"]["edges"] = len(run.fleet.edges)
    return dict(_flat(tree, ""))


def _flat(tree: Mapping[str, Any], at: str) -> Iterator[tuple[str, Hyperparameter]]:
    for key, value in tree.items():
        name = f"{at}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, str | int | float):
            yield name, value
        elif value is not None:
            yield name, json.dumps(value)
