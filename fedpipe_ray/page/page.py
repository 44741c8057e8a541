"""The page itself: sections of figures and tables, as one HTML file with plotly's script in it, or as data."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

from fedpipe_ray.files import write_atomically

from . import figures
from .groups import Group, grouped
from .history import HIGHER, History, spaced
from .tables import comparison, fairness, headline, told

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """A part of the page. key: unlike all others; note: text under the title; body: HTML under the figure."""

    key: str
    title: str = ""
    note: str = ""
    figure: go.Figure | None = None
    body: str = ""
    level: int = 2

    def data(self) -> dict[str, Any]:
        """What page.js needs of it."""
        head = f"<h{self.level}>{html.escape(self.title)}</h{self.level}>" if self.title else ""
        head += f"<p class='note'>{html.escape(self.note)}</p>" if self.note else ""
        figure = None if self.figure is None else json.loads(self.figure.to_json())
        return {"key": self.key, "head": head, "body": self.body, "figure": figure}


def write_page(path: Path, histories: Sequence[History]) -> None:
    """Writes the page of one run, or of several beside one another: about 5 MB, nearly all of it plotly's script."""
    data = json.dumps([section.data() for section in sections(histories)]).replace("</", "<\\/")
    write_atomically(path, shell(title_of(histories), f"show({data});"))


def shell(title: str, script: str) -> str:
    """The HTML around sections that `script` shows."""
    css, code = ((HERE / name).read_text() for name in ("page.css", "page.js"))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{css}</style><script>{get_plotlyjs()}</script></head><body><div id='state'></div><main></main>"
        f"<script>{code}\n{script}</script></body></html>"
    )


def title_of(histories: Sequence[History]) -> str:
    """The run's name, or what is compared."""
    return histories[0].name if len(histories) == 1 else ", ".join(group.label for group in grouped(histories))


def sections(histories: Sequence[History]) -> Iterator[Section]:
    """All of the page: what can be compared in common axes, then run by run; of several seeds, the first."""
    groups = grouped(histories)
    yield Section("title", title_of(histories), level=1, body="" if len(histories) > 1 else paragraph(histories[0]))
    yield from together(groups)
    for number, group in enumerate(groups):
        first, more = group.members[0], len(group.members) - 1
        if len(histories) > 1:
            note = f"One of {more + 1} seeds: {first.name}." if more else ""
            yield Section(f"run{number}", group.label, note, body=paragraph(first), level=1)
        yield from alone(first, f"run{number}-")


def paragraph(history: History) -> str:
    """Its headline."""
    return f"<p>{html.escape(headline(history))}</p>"


def together(groups: Sequence[Group]) -> Iterator[Section]:
    """What is shown in the same axes for all runs, and tables that compare them."""
    note = "Over all edges, on validation rows"
    if any(group.seeds > 1 for group in groups):
        note += "; a line is the mean over seeds, its band the standard deviation"
    histories = [one for group in groups for one in group.members]
    for metric in first_metrics(histories):
        figure = figures.quality(histories, metric)
        if figure is not None:
            yield Section(f"quality-{metric}", f"Quality: {spaced(metric)}", f"{note}.", figure)
        table = comparison(groups, metric)
        if table:
            title = f"{spaced(metric).capitalize()}: quality under a budget, cost to a target"
            yield Section(f"compared-{metric}", title, body=table)


def alone(history: History, prefix: str) -> Iterator[Section]:
    """The sections of one run that have something to show; keys begin with `prefix`."""
    metrics, some = first_metrics([history]), first_of(history)
    found = [("fairness", Section("", "Fairness", "How unlike the edges fare.", body=fairness(history, metrics)))]
    for metric in metrics[:1]:
        course, both = figures.edges_quality(history, metric), figures.base_and_tuned(history, metric)
        note = "On the edges' test rows." + some
        found.insert(0, ("edges", Section("", f"Every edge: {spaced(metric)}", "On validation rows." + some, course)))
        found.insert(1, ("tuned", Section("", f"Base and tuned: {spaced(metric)}", note, both)))
    note = "The rank that is trained, by layer and weight, as it was told last. Choose the edge."
    found.append(("plan", Section("", "Plan", note, figures.plan(history), told(history))))
    note = "What each kind of weight scored, its share of all scores, mean over the edges."
    found.append(("importance", Section("", "Importance", note, figures.importance(history))))
    note = "The most that training took, beside what the profile allows." + some
    found.append(("memory", Section("", "Memory", note, figures.memory(history))))
    note = "On the virtual clock: receiving, computing, sending, waiting for the others. Red: lost or too late." + some
    found.append(("rounds", Section("", "Rounds", note, figures.time_line(history))))
    for name, figure in figures.method_numbers(history):
        found.append((f"method-{name}", Section("", f"{history.method}: {name}", "", figure)))
    for title, tree in (("Configuration", history.config), ("Environment", history.environment)):
        found.append((title.lower(), Section("", body=details(title, yaml.safe_dump(tree, sort_keys=False)))))
    for key, one in found:
        if one.figure is not None or one.body:
            yield Section(prefix + key, one.title, one.note, one.figure, one.body)


def first_metrics(histories: Sequence[History]) -> list[str]:
    """The loss, and the first other metric that says how often it was right, as far as there are any."""
    seen = list(dict.fromkeys(metric for one in histories for metric in one.metrics))
    right = [metric for metric in seen if metric in HIGHER]
    return [metric for metric in seen if metric == "loss"] + right[:1]


def first_of(history: History) -> str:
    """Says so where figures leave edges out."""
    count = len(history.profiles)
    return f" The first {figures.MOST_EDGES} of {count} edges." if count > figures.MOST_EDGES else ""


def details(title: str, text: str) -> str:
    """Text that opens on a click."""
    return f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>"
