"""Ray metrics of a run, read over HTTP where Ray's agent exports them for Prometheus; and the dashboard over them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from runs import Started, held_run, load, records

from actors.metrics import METRICS, after_round, at_start, exported
from fedpipe_ray.trackers.series import MOST_EDGES

DASHBOARD = Path(__file__).parents[1] / "clusters" / "grafana" / "fedpipe.json"
DOCS = Path(__file__).parents[1] / "docs" / "monitoring.md"
Sample = tuple[str, tuple[tuple[str, str], ...]]  # name, and the tags that are ours


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_dir: Path) -> Path:
    return held_run(tmp_path_factory.mktemp("metrics"), model_dir, data_dir, 4)


def scraped(url: str) -> dict[Sample, float]:
    """The samples of a run at an export port."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    return {
        (one.name, tuple(sorted((k, v) for k, v in one.labels.items() if k in ("run", "edge", "status")))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if one.name.startswith("ray_fedpipe_")
    }


@pytest.mark.services
def test_prometheus_gets_a_runs_figures(tiny: Path, tmp_path: Path, ray_folder: Path, started: Started) -> None:
    """While a run of four rounds is in its fourth, with edge b too slow for each deadline."""
    folder = tmp_path / "seen"
    started.run(
        tiny, "--out", folder, "fleet.ray=true", "fleet.edges.a.training_memory_bytes=3GiB",
        "fleet.edges.b.compute_flops=1e3", "fleet.deadline_seconds=100", RAY_TMPDIR=str(ray_folder),
        RAY_AUTH_MODE="token", RAY_metrics_report_interval_ms="2000",
    )  # fmt: skip
    (url,) = re.findall(r"metrics: (http://127\.0\.0\.1:\d+/metrics)", (folder / "log.txt").read_text())
    wanted = {exported(name) for name in METRICS} - {"ray_fedpipe_edges_lost_total"}  # nothing to count yet
    started.wait_for(lambda: {name for name, _ in scraped(url)} >= wanted)
    time.sleep(8)  # four reports: Ray forgets a gauge that is not told again
    started.wait_for(lambda: {name for name, _ in scraped(url)} >= wanted)
    found = scraped(url)
    assert {name for name, _ in found} == wanted
    assert found["ray_fedpipe_round", (("run", "seen"),)] == 3
    assert {dict(tags)["run"] for _, tags in found} == {"seen"}

    def value(name: str, **tags: str) -> float:
        return found[f"ray_fedpipe_{name}", tuple(sorted({"run": "seen", **tags}.items()))]

    lines, last = records(folder), records(folder)[-1]
    assert (value("rounds_total"), value("rounds_planned")) == (3, 4)
    assert [value("edges", status=status) for status in ("ok", "late", "lost")] == [2, 1, 0]
    assert [value("edge_up", edge=edge) for edge in "abc"] == [1, 0, 1]
    for way in ("up", "down"):
        assert value(f"bytes_{way}_total") == sum(line[f"bytes_{way}"] for line in lines)
    assert value("train_loss") == pytest.approx(last["train_loss"], rel=1e-6)
    assert value("validation_loss") == pytest.approx(last["eval"]["global"]["loss"], rel=1e-6)
    assert value("round_seconds") == pytest.approx(last["wall_seconds"], rel=1e-6)
    assert value("round_virtual_seconds") == pytest.approx(100)
    for edge in "ac":
        assert value("edge_train_loss", edge=edge) == pytest.approx(last["edges"][edge]["train_loss"], rel=1e-6)
        assert value("edge_peak_memory_bytes", edge=edge) == last["edges"][edge]["peak_memory_bytes"]
    assert value("edge_capacity_bytes", edge="a") == 3 * 2**30
    assert value("edge_training_memory_bytes", edge="a") == last["edges"]["a"]["training_memory_bytes"]
    assert value("peak_memory_bytes") == max(edge["peak_memory_bytes"] for edge in last["edges"].values())
    assert 2**27 < value("driver_memory_bytes") < 2**33
    started.release()
    assert started.process.wait(240) == 0


def test_large_fleets_have_no_metrics_of_single_edges(run_file: Path) -> None:
    of_edges = {name for name, one in METRICS.items() if "edge" in one.tags}
    edge = {"status": "ok", "train_loss": 1.0, "peak_memory_bytes": 1, "training_memory_bytes": 1}
    record = {
        "round": 1, "wall_seconds": 1.0, "virtual_seconds": 1.0, "evaluate_seconds": 1.0, "train_loss": 1.0,
        "bytes_up": 1, "bytes_down": 1, "edges": {"e0": edge}, "eval": {"global": {"loss": 1.0}, "edges": {}},
    }  # fmt: skip
    for count in (MOST_EDGES, MOST_EDGES + 1):
        edges = ", ".join(f"e{i}: {{cpus: 0.1}}" for i in range(count))
        run = load(run_file, f"fleet.edges={{{edges}}}")
        told = {name for name, _, _ in (*at_start(run, 0), *after_round(record, run))}
        assert told == set(METRICS) - (set() if count <= MOST_EDGES else of_edges)


# -- the dashboard


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return dict(json.loads(DASHBOARD.read_text()))


def expressions(board: dict[str, Any]) -> Iterator[str]:
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def test_the_dashboard_shows_every_metric_and_no_other(dashboard: dict[str, Any]) -> None:
    used = {name for expression in expressions(dashboard) for name in re.findall(r"\bray_\w+", expression)}
    assert used == {exported(name) for name in METRICS}
    asked = {tag for e in expressions(dashboard) for tag in re.findall(r"\bby \(([^)]*)\)", e)}
    known = {"run", *(tag for metric in METRICS.values() for tag in metric.tags)}
    assert {tag.strip() for tags in asked for tag in tags.split(",")} <= known
    assert all('{run=~"$run"' in expression for expression in expressions(dashboard))


def test_the_dashboard_can_be_imported(dashboard: dict[str, Any]) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,40}", dashboard["uid"])
    assert dashboard["title"]
    assert dashboard["schemaVersion"] >= 36
    assert dashboard["id"] is None  # a number would be another dashboard's
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["run"]["query"]["query"] == "label_values(ray_fedpipe_round, run)"
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert panel["description"]
        assert panel["type"] in ("stat", "timeseries", "state-timeline")
        assert panel["datasource"] == source
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["datasource"] == source
            assert target["legendFormat"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_panels_have_their_own_ids_and_places(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(at["x"] >= 0 and at["w"] > 0 and at["h"] > 0 and at["x"] + at["w"] <= 24 for at in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


def test_the_documentation_names_what_is_there(dashboard: dict[str, Any]) -> None:
    """Every panel stands in docs/monitoring.md, and its alerts are about metrics that are exported."""
    text = DOCS.read_text()
    assert [panel["title"] for panel in dashboard["panels"] if f"| {panel['title']} |" not in text] == []
    assert set(re.findall(r"\bray_fedpipe_\w+", text)) <= {exported(name) for name in METRICS}
