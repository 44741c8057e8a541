"""What a run folder tells of a run, finished or in progress, in the form that figures need."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedpipe_ray.errors import UserError
from fedpipe_ray.files import read_lines
from fedpipe_ray.plan_lines import scattered
from fedpipe_ray.remote import RemoteFolder, is_url, local

QUALITY = ("loss", "accuracy", "token_accuracy", "perplexity", "macro_f1", "rouge_l", "exact_match")
HIGHER = frozenset(QUALITY) - {"loss", "perplexity"}  # better where it is higher
CLOCKS = {"round": "round", "virtual s": "virtual_seconds", "MB": "bytes", "wall s": "wall_seconds"}

SPENT = ("virtual s", "MB")  # the clocks of budgets


@dataclass(frozen=True)
class History:
    """A run folder that was read. name: as the user gave it; rounds, plans: lines of its two logs, by round."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    rounds: list[dict[str, Any]]
    plans: list[dict[str, Any]]
    summary: dict[str, Any]

    @classmethod
    def read(cls, place: str) -> History:
        """The run in a folder or under a URL. Raises UserError if there is none."""
        if not is_url(place):
            return cls.of(place, local(place))
        with contextlib.closing(RemoteFolder(place)) as remote:
            return cls.of(place, remote.open())

    @classmethod
    def of(cls, name: str, folder: Path) -> History:
        """The run in a folder on this disk, called `name`. Raises UserError if there is none."""
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{name} is not a run folder: it has no config.yaml")
        try:
            config = dict(yaml.safe_load((folder / "config.yaml").read_text()))
        except (yaml.YAMLError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{name}: config.yaml cannot be read ({reason}); bring it back as the run wrote it"
            ) from None
        parts: dict[str, Any] = {part: _json(folder / f"{part}.json") for part in ("environment", "summary")}
        logs: dict[str, Any] = {part: read_lines(folder / f"{part}.jsonl") for part in ("rounds", "plans")}
        return cls(name, config, **parts, **logs)

    @property
    def method(self) -> str:
        """Its method's name."""
        return str(self.config["method"]["name"])

    @property
    def profiles(self) -> dict[str, dict[str, Any]]:
        """Every edge's profile."""
        return dict(self.config["fleet"]["edges"])

    @property
    def metrics(self) -> list[str]:
        """The quality metrics that were evaluated, the loss first."""
        seen = {name for line in self.rounds for name in line["eval"].get("global", {})}
        return [name for name in QUALITY if name in seen]

    def tested(self, model: str, part: str) -> dict[str, Any]:
        """Test metrics of the `base` or `tuned` model: `global`, or by name of the `edges`; empty before the end."""
        return dict((self.summary.get(model) or {}).get(part) or {})

    def clock(self, kind: str) -> list[float]:
        """Where every round ended: its number, or virtual seconds, megabytes (both ways), wall seconds until then."""
        if kind == "round":
            return [float(line["round"]) for line in self.rounds]
        total, ends = 0.0, []
        for line in self.rounds:
            spent = (line["bytes_up"] + line["bytes_down"]) / 1e6 if kind == "MB" else line[CLOCKS[kind]]
            total += spent or 0.0
            ends.append(total)
        return ends

    def course(self, metric: str, kind: str, edge: str | None = None) -> tuple[list[float], list[float]]:
        """(x, y) of a validation metric where it was evaluated: over all edges, or of one."""
        points = []
        for at, line in zip(self.clock(kind), self.rounds, strict=True):
            found = line["eval"].get("edges", {}).get(edge, {}) if edge else line["eval"].get("global", {})
            if found.get(metric) is not None:
                points.append((at, float(found[metric])))
        return [at for at, _ in points], [value for _, value in points]

    @property
    def planned(self) -> dict[str, dict[str, Any]]:
        """What every edge was told last."""
        found: dict[str, dict[str, Any]] = {}
        for line in self.plans:
            found |= scattered(line.get("plans", []))
        return found


def spaced(name: str) -> str:
    """A metric's name in words."""
    return name.replace("_", " ")


def _json(path: Path) -> dict[str, Any]:
    """A JSON file; nothing where it is not there yet."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def best_within(history: History, metric: str, kind: str, budget: float) -> float | None:
    """The best value of a metric until `budget` on a clock is spent; None if nothing was evaluated by then."""
    values = [value for at, value in zip(*history.course(metric, kind), strict=True) if at <= budget]
    return (max if metric in HIGHER else min)(values) if values else None


def in_common(histories: Sequence[History], metric: str) -> tuple[dict[str, float], float] | None:
    """({clock of SPENT: what the cheapest run spent}, the best value of the run whose best is worst).

    On validation rows, of the runs that were evaluated between rounds; None if there are fewer than two.
    """
    shown = [one for one in histories if one.course(metric, "round")[0]]
    if len(shown) < 2:
        return None
    better, worse = (max, min) if metric in HIGHER else (min, max)
    budgets = {kind: min(one.clock(kind)[-1] for one in shown) for kind in SPENT}
    return budgets, worse(better(one.course(metric, "round")[1]) for one in shown)


def cost_to(history: History, metric: str, kind: str, target: float) -> float | None:
    """Where on a clock a metric first is at `target` or better; None if it never is."""
    for at, value in zip(*history.course(metric, kind), strict=True):
        if value >= target if metric in HIGHER else value <= target:
            return at
    return None
