"""Metrics that Ray's agent exports for Prometheus, with `ray_` before each name and `_total` after each counter's.

clusters/grafana/fedpipe.json shows them, docs/monitoring.md says how they are found. They are those of the driver's
process: they go with it, and a resumed run counts from zero, which Prometheus' `increase` knows.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter as Count
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import psutil

from fedpipe_ray.settings import Run
from fedpipe_ray.trackers import Begun
from fedpipe_ray.trackers.series import MOST_EDGES

AGAIN_SECONDS = 2.0
log = logging.getLogger("fedpipe")


class Metric(NamedTuple):
    """tags: beside `run`, the name of the run folder."""

    kind: Literal["gauge", "counter"]
    description: str
    tags: tuple[str, ...] = ()


METRICS = {
    "fedpipe_round": Metric("gauge", "Rounds done, from the beginning of the run"),
    "fedpipe_rounds_planned": Metric("gauge", "Rounds that the run is to do"),
    "fedpipe_rounds": Metric("counter", "Rounds done by this process"),
    "fedpipe_last_round_timestamp_seconds": Metric("gauge", "When the last round was done, or the run began"),
    "fedpipe_round_seconds": Metric("gauge", "Wall-clock seconds of the last round, without evaluation"),
    "fedpipe_round_virtual_seconds": Metric("gauge", "Seconds of the last round on the declared profiles"),
    "fedpipe_evaluate_seconds": Metric("gauge", "Wall-clock seconds of the last round's evaluation"),
    "fedpipe_train_loss": Metric("gauge", "Mean training loss of the last round"),
    "fedpipe_validation_loss": Metric("gauge", "Validation loss over all edges, when last evaluated"),
    "fedpipe_bytes_up": Metric("counter", "Bytes from the edges"),
    "fedpipe_bytes_down": Metric("counter", "Bytes to the edges"),
    "fedpipe_edges": Metric("gauge", "Edges asked in the last round, by what came of it: ok, late, lost", ("status",)),
    "fedpipe_edges_lost": Metric("counter", "Times that an edge was lost"),
    "fedpipe_driver_memory_bytes": Metric("gauge", "Resident memory of the driver"),
    "fedpipe_peak_memory_bytes": Metric("gauge", "Largest peak of an edge's process in the last round"),
    # Of single edges, in fleets of at most MOST_EDGES.
    "fedpipe_edge_up": Metric("gauge", "1 if the edge's last report was used, 0 if it was lost or late", ("edge",)),
    "fedpipe_edge_train_loss": Metric("gauge", "Training loss of the edge's last round", ("edge",)),
    "fedpipe_edge_validation_loss": Metric("gauge", "Validation loss of the edge, when last evaluated", ("edge",)),
    "fedpipe_edge_peak_memory_bytes": Metric("gauge", "Peak of the edge's process in its last round", ("edge",)),
    "fedpipe_edge_training_memory_bytes": Metric("gauge", "What training took in its last round", ("edge",)),
    "fedpipe_edge_capacity_bytes": Metric("gauge", "What training may take by its profile", ("edge",)),
}
Point = tuple[str, float | None, dict[str, str]]  # metric, value, tags


def exported(name: str) -> str:
    """The name under which Prometheus has a metric."""
    return f"ray_{name}_total" if METRICS[name].kind == "counter" else f"ray_{name}"


def at_start(run: Run, done: int) -> Iterator[Point]:
    """What is known before a round. done: rounds so far."""
    yield "fedpipe_round", done, {}
    yield "fedpipe_rounds_planned", run.rounds, {}
    yield "fedpipe_last_round_timestamp_seconds", time.time(), {}
    yield "fedpipe_driver_memory_bytes", psutil.Process().memory_info().rss, {}
    if len(run.fleet.edges) <= MOST_EDGES:
        for edge, profile in run.fleet.edges.items():
            yield "fedpipe_edge_capacity_bytes", profile.capacity_bytes, {"edge": edge}


def after_round(record: Mapping[str, Any], run: Run) -> Iterator[Point]:
    """What a line of rounds.jsonl says."""
    edges, evaluated = record["edges"], record["eval"]
    yield "fedpipe_round", record["round"], {}
    yield "fedpipe_rounds", 1, {}
    yield "fedpipe_last_round_timestamp_seconds", time.time(), {}
    yield "fedpipe_round_seconds", record["wall_seconds"], {}
    yield "fedpipe_round_virtual_seconds", record["virtual_seconds"], {}
    yield "fedpipe_evaluate_seconds", record["evaluate_seconds"], {}
    yield "fedpipe_train_loss", record["train_loss"], {}
    yield "fedpipe_validation_loss", evaluated["global"].get("loss"), {}
    yield "fedpipe_bytes_up", record["bytes_up"], {}
    yield "fedpipe_bytes_down", record["bytes_down"], {}
    counts = Count(edge["status"] for edge in edges.values())
    for status in ("ok", "late", "lost"):
        yield "fedpipe_edges", counts[status], {"status": status}
    yield "fedpipe_edges_lost", counts["lost"], {}
    yield "fedpipe_driver_memory_bytes", psutil.Process().memory_info().rss, {}
    yield "fedpipe_peak_memory_bytes", max((edge["peak_memory_bytes"] for edge in edges.values()), default=None), {}
    if len(run.fleet.edges) <= MOST_EDGES:
        for name, edge in edges.items():
            tags = {"edge": name}
            yield "fedpipe_edge_up", float(edge["status"] == "ok"), tags
            yield "fedpipe_edge_train_loss", edge["train_loss"], tags
            yield "fedpipe_edge_validation_loss", evaluated["edges"].get(name, {}).get("loss"), tags
            yield "fedpipe_edge_peak_memory_bytes", edge["peak_memory_bytes"] or None, tags
            yield "fedpipe_edge_training_memory_bytes", edge["training_memory_bytes"] or None, tags


class RayMetrics:
    """A tracker whose figures Ray's agent on the driver's node exports; the process is connected to Ray by then.

    A thread tells the gauges again and again, for Ray forgets one that was not told in its last two reports.
    """

    name = "Ray metrics"

    def start(self, begun: Begun) -> None:
        """Makes the metrics. Rounds of before are none of this process."""
        import ray
        from ray.util.metrics import Counter, Gauge

        kinds: dict[str, Any] = {"gauge": Gauge, "counter": Counter}
        self._made = {name: kinds[m.kind](name, m.description, ("run", *m.tags)) for name, m in METRICS.items()}
        self._run, self._name, self._lock = begun.run, begun.name, threading.Lock()
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._ended = threading.Event()
        begun.kept["round"] = begun.done
        self._tell(at_start(begun.run, begun.done))
        here = ray.get_runtime_context().get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == here)
        threading.Thread(target=self._tell_again, daemon=True).start()
        log.debug("metrics: http://%s:%d/metrics", node["NodeManagerAddress"], node["MetricsExportPort"])

    def round(self, round: int, values: Mapping[str, float], record: Mapping[str, Any]) -> None:
        """Takes over a round's figures."""
        self._tell(after_round(record, self._run))

    def finish(self, status: str, round: int, values: Mapping[str, float]) -> None:
        """Ends the thread, and with it the gauges."""
        self._ended.set()
        with self._lock:  # it touches Ray no more, which may be shut down now
            self._gauges = {}

    def _tell(self, points: Iterator[Point]) -> None:
        """Sets gauges and adds to counters; what is not finite is left out, and 0 is nothing to add."""
        for name, value, tags in points:
            if value is None or not math.isfinite(value):
                continue
            tags = {"run": self._name, **tags}
            if METRICS[name].kind == "gauge":
                with self._lock:
                    self._gauges[name, tuple(tags.items())] = value
                    self._made[name].set(value, tags=tags)
            elif value > 0:
                self._made[name].inc(value, tags=tags)

    def _tell_again(self) -> None:
        while not self._ended.wait(AGAIN_SECONDS):
            with self._lock:
                for (name, tags), value in self._gauges.items():
                    self._made[name].set(value, tags=dict(tags))
