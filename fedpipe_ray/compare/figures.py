"""What a comparison is read by: figures of each run, means over seeds, quality at a common budget, cost to a target."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpipe_ray.page.history import History, best_within, cost_to, in_common

METRIC = "loss"
CLOCK = "virtual s"
COMMON = ("loss_within_budget", "virtual_seconds_to_target", "bytes_to_target")
Figures = dict[str, Any]  # by name; None where a run has none


def figures_of(history: History, place: Path) -> Figures:
    """Those of one run. accuracy: of a causal task its token accuracy; worst_loss: of the edge with the highest.

    result_parameters: numbers in what the run exports, frozen ones of an adapter among them.
    """
    summary = history.summary
    base, tuned = summary.get("base") or {}, summary.get("tuned") or {}
    before, after = base.get("global") or {}, tuned.get("global") or {}
    edges = {n: m["loss"] for n, m in (tuned.get("edges") or {}).items() if m.get("loss") is not None}
    worst = max(edges, key=lambda name: edges[name]) if edges else None
    return {
        "rounds": summary.get("rounds", 0),
        "base_loss": before.get("loss"), "loss": after.get("loss"),
        "base_accuracy": _accuracy(before), "accuracy": _accuracy(after),
        "worst_edge": worst, "worst_loss": edges.get(worst) if worst else None,
        **{key: (summary.get("totals") or {}).get(key) for key in _TOTALS},
        "result_parameters": exported_parameters(place),
    }  # fmt: skip


_TOTALS = ("bytes_up", "bytes_down", "virtual_seconds", "wall_seconds")


def _accuracy(metrics: Mapping[str, Any]) -> float | None:
    found = metrics.get("accuracy", metrics.get("token_accuracy"))
    return None if found is None else float(found)


def exported_parameters(place: Path) -> int | None:
    """How many numbers the result in a run folder holds; None if there is none."""
    total = 0
    for folder in ("adapter", "parameters", "model"):
        for file in sorted((place / folder).glob("*.safetensors")):
            with file.open("rb") as stream:
                head = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            total += sum(math.prod(one["shape"]) for name, one in head.items() if name != "__metadata__")
    return total or None


def common_figures(histories: Mapping[str, History]) -> tuple[dict[str, float], dict[str, Figures]]:
    """({"virtual_seconds": budget, "loss": target}, what each run has of COMMON), on validation rows.

    Budget and target as on the page (`in_common`). Empty where fewer than two runs were evaluated between rounds.
    """
    common = in_common(list(histories.values()), METRIC)
    if common is None:
        return {}, {}
    budget, target = common[0][CLOCK], common[1]
    shown = {name: one for name, one in histories.items() if one.course(METRIC, "round")[0]}
    found: dict[str, Figures] = {}
    for name, one in shown.items():
        megabytes = cost_to(one, METRIC, "MB", target)
        values = (
            best_within(one, METRIC, CLOCK, budget), cost_to(one, METRIC, CLOCK, target),
            None if megabytes is None else megabytes * 1e6,
        )  # fmt: skip
        found[name] = dict(zip(COMMON, values, strict=True))
    return {"virtual_seconds": budget, METRIC: target}, found


def over_seeds(runs: Sequence[Figures]) -> dict[str, dict[str, float]]:
    """{figure: {"mean", "std", "seeds"}} of one method's runs; std: of the sample (n - 1), 0 of a single run.

    A figure is taken from the runs that have it; `seeds` says of how many.
    """
    found = {}
    names = dict.fromkeys(name for run in runs for name in run)
    for name in names:
        values = [float(run[name]) for run in runs if _is_number(run.get(name))]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            found[name] = {"mean": statistics.fmean(values), "std": spread, "seeds": len(values)}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
