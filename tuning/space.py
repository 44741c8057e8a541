"""From the `search` section of a campaign to Optuna's distributions, and from a trial's values back to run keys."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from fedpipe_ray.errors import UserError
from fedpipe_ray.settings import Run

FORM = "write {low: 1e-4, high: 1e-2, log: true}, {low: 4, high: 16, step: 4}, or a list of choices"


@dataclass(frozen=True)
class Space:
    """distributions by run key; choices: of categorical keys, the values behind Optuna's labels."""

    distributions: Mapping[str, BaseDistribution]
    choices: Mapping[str, Mapping[Any, Any]]

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """A trial's values as key=value."""
        return [f"{key}={json.dumps(self.value(key, params[key]))}" for key in self.distributions]

    def value(self, key: str, param: Any) -> Any:
        """The run's value behind Optuna's."""
        return self.choices[key][param] if key in self.choices else param

    def param(self, key: str, value: Any) -> Any:
        """Optuna's value behind the run's. Raises UserError for a key or a value outside the space."""
        if key not in self.distributions:
            raise UserError(f"enqueue: {key} is not in search; it has {', '.join(self.distributions)}")
        if key in self.choices:
            for label, choice in self.choices[key].items():
                if choice == value and type(choice) is type(value):
                    return label
        distribution = self.distributions[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or key in self.choices:
            raise UserError(f"enqueue: {key}: {value!r} is not among its choices, or no number")
        if not distribution._contains(distribution.to_internal_repr(value)):
            raise UserError(f"enqueue: {key}: {value!r} lies outside {distribution}")
        return value


def space_of(search: Mapping[str, Any]) -> Space:
    """The space of a `search` section. Raises UserError for a range that is empty, reversed or of an unknown form."""
    distributions: dict[str, BaseDistribution] = {}
    choices: dict[str, dict[Any, Any]] = {}
    for key, spec in search.items():
        listed = spec.get("choices") if isinstance(spec, Mapping) and set(spec) == {"choices"} else spec
        if isinstance(listed, list):
            if not listed:
                raise UserError(f"search.{key}: no choices; give at least one")
            labels = {_label(choice): choice for choice in listed}
            if len(labels) < len(listed):
                raise UserError(f"search.{key}: a choice stands twice in {listed}; remove one")
            distributions[key], choices[key] = CategoricalDistribution(list(labels)), labels
        else:
            distributions[key] = _range(key, spec)
    return Space(distributions, choices)


def _label(choice: Any) -> Any:
    """What Optuna keeps of a choice: the value if it is plain, else its JSON."""
    plain = choice is None or isinstance(choice, bool | int | float | str)
    return choice if plain else json.dumps(choice, sort_keys=True)


def _range(key: str, spec: Any) -> BaseDistribution:
    if not isinstance(spec, Mapping) or not {"low", "high"} <= set(spec) <= {"low", "high", "step", "log"}:
        raise UserError(f"search.{key}: {spec!r} is no distribution; {FORM}")
    low, high, step, log = spec["low"], spec["high"], spec.get("step"), spec.get("log", False)
    numbers = [low, high] if step is None else [low, high, step]
    if any(isinstance(n, bool) or not isinstance(n, int | float) or not math.isfinite(n) for n in numbers):
        raise UserError(f"search.{key}: low, high and step must be numbers, not {numbers}; {FORM}")
    if low >= high:
        what = "reversed" if low > high else "empty"
        raise UserError(f"search.{key}: the range from low {low} to high {high} is {what}; low must be below high")
    if log and (low <= 0 or step is not None):
        raise UserError(f"search.{key}: log needs low above 0 and no step; low is {low}, step {step}")
    if step is not None and step <= 0:
        raise UserError(f"search.{key}: step {step} must be above 0")
    if step is not None and step > high - low:
        raise UserError(f"search.{key}: step {step} is more than there is from low {low} to high {high}; lower it")
    if step is not None and all(isinstance(n, int) for n in numbers):
        high = low + (high - low) // step * step  # the last value that there is
    if all(isinstance(n, int) for n in numbers):
        return IntDistribution(low, high, log=bool(log), step=step or 1)
    return FloatDistribution(float(low), float(high), log=bool(log), step=None if step is None else float(step))


def check_keys(space: Space, load: Callable[[Sequence[str]], Run]) -> None:
    """Has the run file loaded with the ends of every range and every choice, one key at a time. Raises UserError.

    An impossible key or value shows here, before a trial; an impossible pair of values only in its trial.
    """
    for key, distribution in space.distributions.items():
        ends: Sequence[Any] = list(space.choices[key].values()) if key in space.choices else []
        for value in ends or [getattr(distribution, "low"), getattr(distribution, "high")]:  # noqa: B009 (of both kinds)
            try:
                load([f"{key}={json.dumps(value)}"])
            except UserError as error:
                raise UserError(f"search.{key}: {error}") from None
