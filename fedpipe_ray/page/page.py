"""The page itself: sections of figures and tables in one HTML file, plotly's script within."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

from fedpipe_ray.files import write_atomically

from . import figures
from .history import HIGHER, History, best_within, cost_to

STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #222; max-width: 1120px; margin: 0 auto; padding: 0 16px 48px; }
h1 { font-size: 26px; margin: 24px 0 4px; } h2 { font-size: 20px; margin: 36px 0 4px; } p { margin: 4px 0 8px; }
.note { color: #666; font-size: 14px; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; } th, td { padding: 4px 12px 4px 0; text-align: right; }
th { border-bottom: 1px solid #999; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
pre { font-size: 13px; overflow-x: auto; background: #f6f6f6; padding: 12px; } summary { cursor: pointer; }
"""
CONFIG = {"responsive": True, "displaylogo": False, "modeBarButtonsToRemove": ["lasso2d", "select2d"]}
MISSING = "-"


def write_page(path: Path, histories: Sequence[History]) -> None:
    """Writes the page of one run, or of several beside one another."""
    write_atomically(path, page(histories))


def page(histories: Sequence[History]) -> str:
    """The page as HTML: about 5 MB, nearly all of it plotly's script."""
    title = " and ".join(figures.labels(histories)) if len(histories) > 1 else histories[0].name
    parts = [f"<h1>{html.escape(title)}</h1>", *together(histories)]
    for one in histories:
        if len(histories) > 1:
            parts.append(f"<h1>{html.escape(one.name)}</h1>")
        parts += alone(one, compared=len(histories) > 1)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>{''.join(parts)}</body></html>"
    )


def together(histories: Sequence[History]) -> Iterator[str]:
    """What is shown in the same axes for all runs, and tables that compare them."""
    if len(histories) == 1:
        yield f"<p>{html.escape(headline(histories[0]))}</p>"
    for metric in first_metrics(histories):
        yield section(
            f"Quality: {metric}", figures.quality(histories, metric),
            "Over all edges, on validation rows. Choose what it is drawn against.",
        )  # fmt: skip
    if len(histories) > 1:
        yield "<h2>Quality under a budget, cost to a target</h2>"
        yield from comparisons(histories)


def alone(history: History, compared: bool) -> Iterator[str]:
    """The sections of one run."""
    if compared:
        yield f"<p>{html.escape(headline(history))}</p>"
    metrics = first_metrics([history])
    for metric in metrics[:1]:
        yield section(f"Every edge: {metric}", figures.edges_quality(history, metric), more_edges(history))
        yield section(f"Base and tuned: {metric}", figures.base_and_tuned(history, metric), "On the edges' test rows.")
    yield fairness(history)
    yield section(
        "Plan",
        figures.plan(history),
        "The rank each edge trains, by layer and weight, as it was told last. Choose the edge.",
    )
    yield section("Importance", figures.importance(history), "The mean over edges of what each kind of weight scored.")
    yield section(
        "Memory", figures.memory(history), "The most that training took in a round, and what the profile allows."
    )
    yield section(
        "Rounds", figures.time_line(history),
        "On the virtual clock: receiving, computing, sending, waiting for the others. Red: lost or too late.",
    )  # fmt: skip
    for name, figure in figures.method_numbers(history):
        yield section(f"{history.method}: {name}", figure)
    yield details("Configuration", yaml.safe_dump(history.config, sort_keys=False))
    yield details("Environment", yaml.safe_dump(history.environment, sort_keys=False))


def first_metrics(histories: Sequence[History]) -> list[str]:
    """The loss, and the first other metric that says how often it was right, as far as there are any."""
    seen = list(dict.fromkeys(metric for one in histories for metric in one.metrics))
    right = [metric for metric in seen if metric in HIGHER]
    return [metric for metric in seen if metric == "loss"] + right[:1]


def headline(history: History) -> str:
    """A run in a sentence or two."""
    rounds, summary = history.rounds, history.summary
    edges = {edge for line in rounds for edge in line["edges"]}
    status = {"": "in progress", "stopped_early": "stopped early"}.get(summary.get("status", ""), summary.get("status"))
    said = [
        f"{history.method}, {len(history.profiles)} edges, {len(rounds)} of {history.config['rounds']} rounds, {status}."
    ]
    if rounds:
        totals = (history.clock("MB")[-1], history.clock("virtual s")[-1], history.clock("wall s")[-1])
        said.append("{:,.3g} MB sent both ways, {:,.3g} s on the virtual clock, {:,.3g} s of rounds.".format(*totals))
        lost = sum(one["status"] != "ok" for line in rounds for one in line["edges"].values())
        said += [f"{lost} times an edge was lost or late."] if lost else []
        said += (
            [f"{len(history.profiles) - len(edges)} edges were never asked."] if edges < set(history.profiles) else []
        )
    before, after = (((summary.get(name) or {}).get("global") or {}).get("loss") for name in ("base", "tuned"))
    if before is not None and after is not None:
        said.append(f"Loss on test rows {before:.4g} before, {after:.4g} after.")
    return " ".join(said)


def more_edges(history: History) -> str:
    """Says so where a figure leaves edges out."""
    count = len(history.profiles)
    return f"The first {figures.MOST_EDGES} of {count} edges." if count > figures.MOST_EDGES else ""


def fairness(history: History) -> str:
    """How unlike the edges fare: best, worst, spread of test metrics, or of the last validation."""
    tuned = (history.summary.get("tuned") or {}).get("edges") or next(
        (line["eval"]["edges"] for line in reversed(history.rounds) if line["eval"].get("edges")), {}
    )
    rows = []
    for metric in first_metrics([history]):
        values = {edge: found[metric] for edge, found in tuned.items() if found.get(metric) is not None}
        if len(values) > 1:
            worst, best = sorted(values, key=lambda edge: values[edge], reverse=metric not in HIGHER)[
                :: len(values) - 1
            ]
            mean = sum(values.values()) / len(values)
            spread = (sum((value - mean) ** 2 for value in values.values()) / len(values)) ** 0.5
            rows.append([
                metric, number(mean), f"{number(values[worst])} ({worst})", f"{number(values[best])} ({best})",
                number(spread),
            ])  # fmt: skip
    if not rows:
        return ""
    where = "test rows" if (history.summary.get("tuned") or {}).get("edges") else "validation rows"
    return f"<h2>Fairness</h2><p class='note'>Over the edges, on {where}.</p>" + table(
        ["", "mean", "worst edge", "best edge", "standard deviation"], rows
    )


def comparisons(histories: Sequence[History]) -> Iterator[str]:
    """Two tables: the best value until the cheapest run's end; where each run reaches what all of them reach."""
    names = figures.labels(histories)
    for metric in first_metrics(histories)[:1]:
        shown = [one for one in histories if one.course(metric, "round")[0]]
        if len(shown) < 2:
            continue
        better = max if metric in HIGHER else min
        worse = min if metric in HIGHER else max
        target = worse(better(one.course(metric, "round")[1]) for one in shown)
        budgets = {kind: min(one.clock(kind)[-1] for one in shown) for kind in ("virtual s", "MB")}
        head = ["run", *(f"{metric} within {number(budget)} {kind}" for kind, budget in budgets.items())]
        head += [f"{kind} to {metric} {number(target)}" for kind in ("round", "virtual s", "MB")]
        rows = []
        for name, one in zip(names, histories, strict=True):
            row: list[Any] = [best_within(one, metric, kind, budget) for kind, budget in budgets.items()]
            row += [cost_to(one, metric, kind, target) for kind in ("round", "virtual s", "MB")]
            rows.append([name, *map(number, row)])
        yield (
            "<p class='note'>Budgets are what the cheapest run spent; the target is the best value of the run whose best "
            "is worst. Validation rows.</p>" + table(head, rows)
        )


def section(title: str, figure: go.Figure | None, note: str = "") -> str:
    """A heading, a line, a figure; nothing without a figure."""
    if figure is None:
        return ""
    said = f"<p class='note'>{html.escape(note)}</p>" if note else ""
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG)
    return f"<h2>{html.escape(title)}</h2>{said}{drawn}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is too wide."""
    line = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"
    body = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table>{line}{''.join(body)}</table></div>"


def details(title: str, text: str) -> str:
    """Text that opens on a click."""
    return (
        f"<details><summary><h2 style='display:inline'>{title}</h2></summary><pre>{html.escape(text)}</pre></details>"
    )


def number(value: float | None) -> str:
    """Four digits."""
    return MISSING if value is None else f"{value:,.4g}"
