"""What a campaign may optimize or constrain: figures of a trial from the records of its rounds. Pure functions.

Quality figures are the newest evaluation's, over all validation rows of the fleet. Costs add up over rounds, but those
named `round_...` are the dearest round's, and memory is the largest of any edge in any round. The three protocols after
EdgeFlowerTune's names are ours: quality under a budget (`within`), cost to a target (`until`), robustness (`over`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedpipe_ray.errors import UserError
from fedpipe_ray.settings import Run
from fedpipe_ray.trial import Record

from .settings import Objective

QUALITY = {
    "causal": {"loss": "minimize", "perplexity": "minimize", "token_accuracy": "maximize"},
    "classification": {"loss": "minimize", "accuracy": "maximize", "macro_f1": "maximize"},
}
SUMS = ("bytes_up", "bytes_down", "wall_seconds", "evaluate_seconds", "virtual_seconds")
EDGE_SUMS = ("samples", "steps", "tokens", "flops")
PEAKS = ("peak_memory_bytes", "training_memory_bytes")
COSTS = (*SUMS, "bytes", *EDGE_SUMS, *PEAKS, "round_seconds", "round_bytes", "lost_edges", "rounds")
ONE_EDGE_SUMS = (*EDGE_SUMS, "bytes_up", "bytes_down", "seconds", "virtual_seconds")
ONE_EDGE_COSTS = (*ONE_EDGE_SUMS, *PEAKS)


def known_metrics(run: Run) -> dict[str, str]:
    """Every name that can be checked before a trial, with the direction that is better."""
    quality = QUALITY[run.data.task]
    names = {**quality, "train_loss": "minimize", **dict.fromkeys(COSTS, "minimize")}
    of_one = {**quality, **dict.fromkeys(ONE_EDGE_COSTS, "minimize")}
    return names | {f"edges.{edge}.{key}": way for edge in run.fleet.edges for key, way in of_one.items()}


def direction_of(name: str, run: Run, where: str) -> str:
    """Which way is better. Raises UserError for a metric that no round records, with the nearest that one does.

    `method.NAME`, and `VIEW.METRIC` of a method with several results, are known only once a round was done (`missing`).
    """
    known = known_metrics(run)
    evaluated = is_evaluated(name)
    if name not in known and not open_name(name, run):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        shown = [key for key in known if not key.startswith("edges.")]
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(shown)}, edges.NAME and method.NAME"
        raise UserError(f"{where}: no metric {name!r}; {hint}")
    if evaluated and run.evaluate.every == 0:
        raise UserError(f"{where}: {name} is never evaluated with evaluate.every: 0; set evaluate.every to 1 or more")
    return "maximize" if higher_is_better(name) else "minimize"


def open_name(name: str, run: Run) -> bool:
    """Whether only a round can tell that there is such a figure: `method.NAME`, or `VIEW.METRIC` with a view's name."""
    first, *rest = name.split(".")
    view = len(rest) == 1 and first != "edges" and rest[0] in QUALITY[run.data.task]
    return bool(rest) and (first == "method" or view)


def is_evaluated(name: str) -> bool:
    """Whether a figure stands in evaluations, which `evaluate.every` may leave out."""
    last = name.rpartition(".")[2]
    return not name.startswith("method.") and any(last in quality for quality in QUALITY.values())


def higher_is_better(name: str) -> bool:
    """Whether more of a figure is better: that is told by its last name, as in edges.NAME.accuracy."""
    last = name.rpartition(".")[2]
    return any(quality.get(last) == "maximize" for quality in QUALITY.values())


def only_grows(name: str) -> bool:
    """Whether more rounds can never make a figure smaller."""
    if name.startswith("edges."):
        return name.rpartition(".")[2] in ONE_EDGE_COSTS
    return name in COSTS


def missing(names: Iterable[str], records: Sequence[Record], run: Run) -> str:
    """What is wrong with names that only a round could tell, with the nearest of those recorded; empty if nothing."""
    recorded = [f"method.{key}" for record in records for key in record["method"]]
    evaluated = [key for record in records for key in record["eval"]["global"]]
    for name in names:
        known = recorded if name.startswith("method.") else evaluated
        if not open_name(name, run) or name in known or not (evaluated or name.startswith("method.")):
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        there = f"there are {', '.join(dict.fromkeys(known))}" if known else "the method records no figures of its own"
        return f"no metric {name!r}; " + (f"did you mean {near[0]}?" if near else there)
    return ""


def metric(name: str, records: Sequence[Record]) -> float | None:
    """A figure after these rounds; infinite where it was no number; None if nothing recorded it."""
    if name in SUMS:
        return float(sum(record[name] or 0 for record in records))
    if name == "bytes":
        return float(sum(record["bytes_up"] + record["bytes_down"] for record in records))
    if name in ("round_seconds", "round_bytes"):
        each = [r["virtual_seconds"] if name == "round_seconds" else r["bytes_up"] + r["bytes_down"] for r in records]
        return float(max(each, default=0))
    if name == "rounds":
        return float(len(records))
    edges = [edge for record in records for edge in record["edges"].values()]
    if name in EDGE_SUMS:
        return float(sum(edge[name] for edge in edges))
    if name in PEAKS:
        return float(max((edge[name] for edge in edges), default=0))
    if name == "lost_edges":
        return float(sum(edge["status"] == "lost" for edge in edges))
    if name.startswith("edges.") and only_grows(name):
        return _of_edge(name, records)
    found = [table[key] for table, key in (_place(name, record) for record in records) if key in table]
    if not found:
        return None
    return math.inf if found[-1] is None else float(found[-1])  # a record has null for what is no number


def _of_edge(name: str, records: Sequence[Record]) -> float:
    """A cost of one edge: 0 before its first round."""
    edge, _, key = name.removeprefix("edges.").rpartition(".")
    own = [record["edges"][edge][key] or 0 for record in records if edge in record["edges"]]
    return float(sum(own) if key in ONE_EDGE_SUMS else max(own, default=0))


def _place(name: str, record: Record) -> tuple[Mapping[str, Any], str]:
    """(the mapping of a record in which a figure stands, its key there)."""
    if name == "train_loss":
        return record, name
    if name.startswith("method."):
        return record["method"], name.removeprefix("method.")
    if name.startswith("edges."):
        edge, _, key = name.removeprefix("edges.").rpartition(".")
        return record["eval"]["edges"].get(edge, {}), key
    return record["eval"]["global"], name


def value_of(objective: Objective, records: Sequence[Record]) -> float | None:
    """What a trial is worth after these rounds; None if it cannot be said.

    within: the best figure of rounds that ended inside every budget, the worst there is if no round did. until: the
    cost when the first round had reached every target, infinite if none did. over: `worst` edge's figure, or `gap`, by
    how much that is worse than the mean of all.
    """
    if objective.until:
        for done in range(1, len(records) + 1):
            if _reached(objective.until, records[:done]):
                return metric(objective.metric, records[:done])
        return math.inf
    if objective.within:
        inside = [records[:n] for n in range(1, len(records) + 1) if _inside(objective.within, records[:n])]
        found = [value for part in inside if (value := _figure(objective, part)) is not None]
        worst = worst_of(objective.way)
        return (min if objective.way == "minimize" else max)(found, default=worst)
    return _figure(objective, records)


def worst_of(way: str) -> float:
    """What a trial gets that has nothing to show."""
    return math.inf if way == "minimize" else -math.inf


def _figure(objective: Objective, records: Sequence[Record]) -> float | None:
    if objective.over == "all":
        value = metric(objective.metric, records)
        return value if value is None or math.isfinite(value) else worst_of(objective.way)
    newest: Mapping[str, Any] = next((r["eval"]["edges"] for r in reversed(records) if r["eval"]["edges"]), {})
    own = [edge[objective.metric] for edge in newest.values() if objective.metric in edge]
    if not own:
        return None
    if None in own:  # was no number
        return worst_of(objective.way)
    worst = float((min if higher_is_better(objective.metric) else max)(own))
    return worst if objective.over == "worst" else abs(worst - sum(own) / len(own))


def _inside(budget: Mapping[str, Any], records: Sequence[Record]) -> bool:
    return all((metric(name, records) or 0.0) <= most for name, most in budget.items())


def _reached(targets: Mapping[str, Any], records: Sequence[Record]) -> bool:
    for name, target in targets.items():
        value = metric(name, records)
        if value is None or math.isinf(value) or (value < target if higher_is_better(name) else value > target):
            return False
    return True


def nearest(objective: Objective, records: Sequence[Record]) -> dict[str, float]:
    """What came nearest to the targets of `until`, or the costs of the first figure that `within` could have taken."""
    parts = [records[:n] for n in range(1, len(records) + 1)]
    found = {}
    for name in objective.until:
        values = [value for part in parts if (value := metric(name, part)) is not None and math.isfinite(value)]
        if values:
            found[name] = (max if higher_is_better(name) else min)(values)
    first = next((part for part in parts if _figure(objective, part) is not None), None)
    if first is not None:
        found |= {name: metric(name, first) or 0.0 for name in objective.within}
    return found
