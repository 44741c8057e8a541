"""A campaign file, checked against the run it starts from, so that its faults are told before a trial starts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpipe_ray.config import apply_overrides, build, read_yaml, training_hash
from fedpipe_ray.errors import UserError
from fedpipe_ray.quantity import parse_quantity
from fedpipe_ray.settings import Run
from fedpipe_ray.trial import Record

from .metrics import COSTS, QUALITY, direction_of, is_evaluated, metric, only_grows, value_of
from .settings import Campaign, Objective
from .space import Space, check_keys, space_of

OpenRun = Callable[[Path], Callable[[Sequence[str]], Run]]  # reads a file; then the run with these key=value


@dataclass(frozen=True)
class Limit:
    """A constraint: `metric` at most `bound`, or at least."""

    metric: str
    bound: float
    at_least: bool = False

    def excess(self, records: Sequence[Record]) -> float | None:
        """By how much a trial misses it; 0 or less where it is met, infinite for no number, None for none."""
        value = metric(self.metric, records)
        if value is None or math.isinf(value):
            return value
        return self.bound - value if self.at_least else value - self.bound

    @property
    def grows(self) -> bool:
        """Whether a trial that misses it once cannot meet it any more."""
        return not self.at_least and only_grows(self.metric)

    def broken(self, records: Sequence[Record]) -> bool:
        """Whether a trial misses it, whatever its later rounds bring."""
        return self.grows and (self.excess(records) or 0.0) > 0

    @property
    def name(self) -> str:
        """As shown."""
        return f"{self.metric} {'>=' if self.at_least else '<='} {self.bound:g}"


@dataclass(frozen=True)
class Plan:
    """A checked campaign. base: the run without a trial's own values; load: the run with some, as key=value."""

    settings: Campaign
    name: str
    base: Run
    load: Callable[[Sequence[str]], Run]
    space: Space
    objectives: Mapping[str, Objective]
    limits: Sequence[Limit]

    @property
    def ways(self) -> list[str]:
        """Directions of the objectives."""
        return [one.way for one in self.objectives.values()]

    @property
    def metrics(self) -> list[str]:
        """Every metric that is asked for."""
        asked = [name for one in self.objectives.values() for name in (one.metric, *one.within, *one.until)]
        return [*asked, *(limit.metric for limit in self.limits)]

    @property
    def most_rounds(self) -> int:
        """Of a trial, where `rounds` itself may be searched."""
        key, space = "rounds", self.space
        if key in space.choices:
            return max(int(choice) for choice in space.choices[key].values())
        return int(getattr(space.distributions[key], "high")) if key in space.distributions else self.base.rounds  # noqa: B009

    def rounds_of(self, params: Mapping[str, Any]) -> int:
        """How many rounds a trial with these values does."""
        return int(self.space.value("rounds", params["rounds"])) if "rounds" in params else self.base.rounds

    @property
    def methods_differ(self) -> bool:
        """Whether trials may have methods, or parts of one, that record different figures."""
        asked = [choices for key, choices in self.space.choices.items() if key.partition(".")[0] == "method"]
        values = [value for choices in asked for value in choices.values()]
        return any(isinstance(value, bool) or not isinstance(value, int | float) for value in values)

    def owner(self) -> dict[str, Any]:
        """What makes a study this campaign's: a change in any of it is another question."""
        return {
            "search": self.settings.search,
            "objectives": {name: dataclasses.asdict(one) for name, one in self.objectives.items()},
            "order of objectives": list(self.objectives),  # values are stored in it, without names
            "constraints": sorted(limit.name for limit in self.limits),
            "run": training_hash(self.base),
            "rounds": self.base.rounds,
            "evaluate": [self.base.evaluate.patience, self.base.evaluate.target],  # a run may change them on resume
        }

    def values(self, records: Sequence[Record]) -> list[float | None]:
        """What a trial is worth after these rounds, by objective."""
        return [value_of(one, records) for one in self.objectives.values()]

    def settled(self, records: Sequence[Record]) -> bool:
        """Whether more rounds cannot change what a trial is worth: it has reached the target whose cost is asked."""
        found = self.values(records)
        return all(
            one.until and value not in (None, float("inf")) for one, value in zip(self.objectives.values(), found)
        )


def load_plan(path: Path, overrides: Sequence[str], open_run: OpenRun) -> Plan:
    """The campaign of a file and its key=value overrides. Raises UserError with what to change.

    The run file is read here, once: all trials are of the same, whatever becomes of it.
    """
    settings = build(Campaign, apply_overrides(read_yaml(path), overrides))
    read = open_run(path.parent / settings.run)
    fixed = [f"{key}={json.dumps(value)}" for key, value in settings.set.items()]

    def load(values: Sequence[str]) -> Run:
        return read([*fixed, *values])

    base, space = load([]), space_of(settings.search)
    both = sorted(settings.set.keys() & settings.search.keys())
    if both:
        raise UserError(f"set, search: {', '.join(both)} stand(s) in both; remove one")
    check_keys(space, load)
    objectives = {name: objective_of(name, spec, base) for name, spec in settings.objectives.items()}
    limits = [limit_of(name, spec, base) for name, spec in settings.constraints.items()]
    for point in settings.enqueue:
        for key, value in point.items():
            space.param(key, value)
    return Plan(settings, settings.name or path.stem, base, load, space, objectives, limits)


def objective_of(name: str, spec: Any, run: Run) -> Objective:
    """An objective from `minimize`, `maximize` or its keys. Raises UserError."""
    where = f"objectives.{name}"
    if isinstance(spec, str):
        spec = {"way": spec}
    if not isinstance(spec, dict):
        raise UserError(f"{where}: {spec!r} is no objective; write {name}: minimize, or its keys")
    found = build(Objective, {"metric": name, **spec}, where)
    better = direction_of(found.metric, run, where)
    if found.over != "all" and (not is_evaluated(found.metric) or found.metric.startswith("edges.")):
        names = ", ".join(QUALITY[run.data.task])
        raise UserError(f"{where}.over: {found.metric} is not evaluated on every edge; over goes with {names}")
    bounds = {
        key: {metric: quantity(f"{where}.{key}", metric, value, run) for metric, value in getattr(found, key).items()}
        for key in ("within", "until")
    }
    for name in found.until:
        if only_grows(name):
            raise UserError(
                f"{where}.until: {name} only grows, so it is no target to reach; as a budget it is `within`"
            )
    for name in found.within:
        if not only_grows(name):
            costs = ", ".join(COSTS[:5])
            raise UserError(f"{where}.within: {name} does not add up, so it is no budget; {costs} and others are")
    if found.over == "gap":
        better = "minimize"
    return dataclasses.replace(found, way=better if found.way == "auto" else found.way, **bounds)  # type: ignore[arg-type]  # the way is named, bounds are numbers


def limit_of(name: str, spec: Any, run: Run) -> Limit:
    """A constraint from `metric: at most`, or `metric: {at_least: value}`. Raises UserError."""
    where = "constraints"
    if isinstance(spec, dict):
        if set(spec) != {"at_least"}:
            raise UserError(f"{where}.{name}: {spec!r} is no bound; write {name}: 10, or {name}: {{at_least: 10}}")
        return Limit(name, quantity(where, name, spec["at_least"], run), at_least=True)
    return Limit(name, quantity(where, name, spec, run))


def quantity(where: str, name: str, value: Any, run: Run) -> float:
    """A bound of a metric, in its own unit: `30s` and `50MB` where that ends in seconds or bytes. Raises UserError."""
    direction_of(name, run, where)
    last = name.rpartition(".")[2]
    unit = "second" if last.endswith("seconds") else "byte" if "bytes" in last else None
    if isinstance(value, str) and unit:
        try:
            value = parse_quantity(value, unit)
        except ValueError as error:
            raise UserError(f"{where}.{name}: {error}") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}.{name}: {value!r} is no number")
    if value < 0 and not name.startswith("method."):
        raise UserError(f"{where}.{name}: {value:g} is below 0, and {name} never is; give 0 or more")
    return float(value)
