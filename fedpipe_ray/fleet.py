"""Fleets: the edge servers as the loop sees them. SerialFleet runs them one after another in this process."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .config import edge_data
from .data import EdgeData, SourceFacts
from .errors import EdgeError, UserError
from .evaluate import Metrics
from .frame import frame
from .message import Message
from .methods.base import Method
from .model import Base
from .report import Lost, Report
from .settings import Profile, Run
from .site import Progress, Ready, Site, attempt

T = TypeVar("T")


@dataclass(frozen=True)
class Refused:
    """An edge that cannot take part, and why; traceback: its own, for an exception nobody expected."""

    edge: str
    reason: str
    traceback: str | None = None


class Fleet(Protocol):
    """What the loop asks of the edge servers. Reports come in the order of the orders, whoever was first."""

    @property
    def edges(self) -> Mapping[str, Profile]:
        """The profiles by name."""

    def open(self) -> list[Ready]:
        """Preflight on every edge, side by side. Raises EdgeError with a line an edge that cannot take part."""

    def run(self, orders: Mapping[str, Message], round: int) -> Iterator[Report | Lost]:
        """Has the edges carry out their orders."""

    def evaluate(self, state: Message | None, split: str, answers: int = 0) -> dict[str, Metrics | Lost]:
        """Metrics of a state (None: the base model), as base.shown has it, on every edge's own rows."""

    def restore(self, round: int, private: Mapping[str, Mapping[str, str]]) -> None:
        """Has the edges take up the private states of a checkpoint. Raises EdgeError."""

    def progress(self) -> dict[str, Progress]:
        """What every edge is doing right now."""

    def close(self) -> None:
        """Ends what the fleet started."""


def guarded(edge: str, work: Callable[[], T]) -> T | Refused:
    """The result of `work` on an edge, or Refused; nothing is raised."""
    try:
        return work()
    except UserError as error:
        return Refused(edge, str(error))
    except Exception as error:  # shown with the edge's own traceback, once
        return Refused(edge, f"{type(error).__name__}: {error}", traceback.format_exc())


def accepted(answers: Sequence[T | Refused]) -> list[T]:
    """The answers if no edge refused. Raises EdgeError with what each refusing edge says."""
    refused = [answer for answer in answers if isinstance(answer, Refused)]
    if refused:
        reasons = [f"edge {r.edge}: {r.traceback or r.reason}".rstrip() for r in refused]
        raise EdgeError("\n".join(dict.fromkeys(reasons)))
    return [answer for answer in answers if not isinstance(answer, Refused)]


def classes_of(run: Run, facts: Sequence[SourceFacts]) -> list[str]:
    """The class names of a classification run: data.labels, or all that the edges found, numbers in their order."""
    if run.data.task != "classification":
        return []
    found = {label for fact in facts for label in fact.label_values}
    if run.data.labels:
        return list(run.data.labels)
    if len(found) < 2:
        raise UserError(
            f"data.label: {run.data.label} has {len(found)} class(es) over all edges; a classifier needs two or more"
        )
    numbers = all(label.lstrip("-").isdigit() for label in found)
    return sorted(found, key=int if numbers else str)


class Kept:
    """What a fleet in this process leaves for the next one whose run has the same model, rows and seed.

    bases by bits, encoded rows by edge, class names: all read-only. `fit` lets them go where the next run differs.
    """

    def __init__(self) -> None:
        self.bases: dict[int, Base] = {}
        self.data: dict[str, EdgeData] = {}
        self.classes: list[str] | None = None
        self._of: Any = None

    def fit(self, run: Run, method: Method) -> Kept:
        """This, emptied if it is of no use to `run`. A base that comes with the orders is never kept."""
        edges = {name: edge_data(run, name, profile) for name, profile in run.fleet.edges.items()}
        needed = (run.model, edges, run.seed)
        if self._of != needed or method.base == "sent":
            self._of, self.bases, self.data, self.classes = needed, {}, {}, None
        return self


class SerialFleet:
    """All edges in this process, one after another, on one frozen base a bit-width. As any other fleet, bit for bit.

    kept: what the fleet before left here.
    """

    def __init__(self, run: Run, method: Method, private_dir: Path | None = None, kept: Kept | None = None) -> None:
        self.run_settings, self.method = run, method
        self._kept = (kept or Kept()).fit(run, method)
        self._bases = self._kept.bases
        self.classes: list[str] = []
        self.sites = {name: Site(name, run, method, self._load, private_dir) for name in run.fleet.edges}

    def _load(self, classes: Sequence[str], bits: int) -> Base:
        if bits not in self._bases:
            run = self.run_settings
            if self.method.base == "sent":
                self._bases[bits] = frame(run.model, run.data.task, classes)
            else:
                self._bases[bits] = Base.load(run.model, run.data.task, classes, run.seed, bits=bits)
        return self._bases[bits]

    @property
    def edges(self) -> Mapping[str, Profile]:
        """The profiles by name."""
        return self.run_settings.fleet.edges

    def open(self) -> list[Ready]:
        """Preflight on every edge. Raises EdgeError."""
        sites, kept = self.sites.values(), self._kept
        trained = [site for site in sites if site.method.base != "none"]
        if trained:
            if kept.classes is None:
                facts = accepted([guarded(site.name, site.inspect) for site in sites])
                kept.classes = classes_of(self.run_settings, facts)
            self.classes = kept.classes
        for site in trained:
            if site.name in kept.data:
                site.__dict__["data"] = kept.data[site.name]
        ready = accepted([guarded(site.name, partial(site.prepare, self.classes)) for site in sites])
        kept.data.update({site.name: site.data for site in trained})
        return ready

    def run(self, orders: Mapping[str, Message], round: int) -> Iterator[Report | Lost]:
        """One edge after the other; an edge starts when the report before it was taken."""
        for name, order in orders.items():
            report, update = attempt(self.sites[name], order.to(self.run_settings.wire.dtype), round)
            if isinstance(report, Report) and update is not None:
                report.fetch = lambda update=update: update
            del update
            yield report

    def evaluate(self, state: Message | None, split: str, answers: int = 0) -> dict[str, Metrics | Lost]:
        """Metrics of a state on every edge's own rows."""
        results: dict[str, Metrics | Lost] = {}
        for name, site in self.sites.items():
            found = guarded(name, partial(site.evaluate, state, split, answers))
            results[name] = Lost(name, found.reason, found.traceback) if isinstance(found, Refused) else found
        return results

    def restore(self, round: int, private: Mapping[str, Mapping[str, str]]) -> None:
        """Has the edges take up the private states of a checkpoint. Raises EdgeError."""
        sites = self.sites
        accepted([guarded(name, partial(sites[name].restore, round, **rest)) for name, rest in private.items()])

    def progress(self) -> dict[str, Progress]:
        """What every edge is doing right now."""
        return {name: dataclasses.replace(site.progress) for name, site in self.sites.items()}

    def close(self) -> None:
        """Nothing to end."""
