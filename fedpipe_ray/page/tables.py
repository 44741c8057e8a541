"""What a page says in words and tables."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev, stdev
from typing import Any

from .groups import Group
from .history import CLOCKS, HIGHER, History, best_within, cost_to, in_common, spaced

MISSING = "-"
MOST_ROWS = 40
STATUS = {None: "in progress", "stopped_early": "stopped early"}


def headline(history: History) -> str:
    """A run in a few sentences."""
    rounds, status = history.rounds, history.summary.get("status")
    said = [
        f"{history.method} on {len(history.profiles)} edges, seed {history.config['seed']}: "
        f"{len(rounds)} of {history.config['rounds']} rounds, {STATUS.get(status, status)}."
    ]
    if rounds:
        sent, clock, wall = (number(history.clock(kind)[-1]) for kind in ("MB", "virtual s", "wall s"))
        said.append(f"{sent} MB sent both ways, {clock} s on the virtual clock, {wall} s of rounds.")
    lost = sum(one["status"] != "ok" for line in rounds for one in line["edges"].values())
    asked = {edge for line in rounds for edge in line["edges"]}
    said += [f"Edges lost or late: {lost}."] if lost else []
    never = len(history.profiles.keys() - asked)
    said += [f"Edges never asked: {never}."] if rounds and never else []
    before, after = (history.tested(name, "global").get("loss") for name in ("base", "tuned"))
    if before is not None and after is not None:
        said.append(f"Loss on test rows {number(before)} before, {number(after)} after.")
    return " ".join(said)


def fairness(history: History, metrics: Sequence[str]) -> str:
    """How unlike edges fare on test rows, or before the end on validation rows; "" of fewer than two edges."""
    tuned: Mapping[str, Mapping[str, Any]] = history.tested("tuned", "edges")
    rows_of = "test rows"
    if not tuned:
        evaluated = [line["eval"]["edges"] for line in history.rounds if line["eval"].get("edges")]
        tuned, rows_of = (evaluated[-1] if evaluated else {}), "validation rows of the last evaluation"
    rows = []
    for metric in metrics:
        values = {edge: float(found[metric]) for edge, found in tuned.items() if found.get(metric) is not None}
        if len(values) > 1:
            ranking = sorted(values, key=lambda edge: values[edge], reverse=metric in HIGHER)
            ends = [f"{number(values[edge])} ({edge})" for edge in (ranking[-1], ranking[0])]
            rows.append([spaced(metric), number(fmean(values.values())), *ends, number(pstdev(values.values()))])
    return table([f"on {rows_of}", "mean", "worst edge", "best edge", "standard deviation"], rows) if rows else ""


def told(history: History) -> str:
    """The numbers of every edge's last order, and how much it trains; "" where orders have none."""
    plans = {edge: one for edge, one in history.planned.items() if one}
    names = list(dict.fromkeys(name for one in plans.values() for name in one if name != "ranks"))
    if not names and not any("ranks" in one for one in plans.values()):
        return ""
    rows = []
    for edge, one in list(plans.items())[:MOST_ROWS]:
        ranks = one.get("ranks", {})
        rows.append([edge, *(number(one.get(name)) for name in names), str(len(ranks)), str(sum(ranks.values()))])
    more = f"<p class='note'>The first {MOST_ROWS} of {len(plans)} edges.</p>" if len(plans) > MOST_ROWS else ""
    return table(["edge", *map(spaced, names), "weights", "sum of ranks"], rows) + more


def comparison(groups: Sequence[Group], metric: str) -> str:
    """The best value until the cheapest run's end; where each reaches what all reach; "" of a single group."""
    found = in_common([one for group in groups for one in group.members], metric)
    if len(groups) < 2 or found is None:
        return ""
    budgets, target = found
    kinds = [kind for kind in CLOCKS if kind != "wall s"]
    head = ["run", *(f"{spaced(metric)} within {number(budget)} {kind}" for kind, budget in budgets.items())]
    head += [f"{kind} to {spaced(metric)} {number(target)}" for kind in kinds]
    rows = []
    for group in groups:
        best = [[best_within(one, metric, kind, most) for one in group.members] for kind, most in budgets.items()]
        cost = [[cost_to(one, metric, kind, target) for one in group.members] for kind in kinds]
        rows.append([group.label, *map(spread, [*best, *cost])])
    return table(head, rows) + (
        "<p class='note'>On validation rows. A budget is what the cheapest run spent; the target is what the run with "
        "the worst best value reached. ±: standard deviation over seeds.</p>"
    )


def spread(values: Sequence[float | None]) -> str:
    """The mean and the standard deviation of those that are there; how many they are, if not all."""
    there = [value for value in values if value is not None]
    if not there:
        return MISSING
    said = number(fmean(there)) + (f" ± {stdev(there):.2g}" if len(there) > 1 else "")
    return said if len(there) == len(values) else f"{said} ({len(there)} of {len(values)})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is too wide."""
    line = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"
    body = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table>{line}{''.join(body)}</table></div>"


def number(value: float | None) -> str:
    """Four digits."""
    return MISSING if value is None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
