"""What the server does with a round's updates: `server.aggregator` and `server.optimizer` of a run file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .section import Section, require

# Of each rule, the keys it has and their defaults. Krum's f and the trimmed mean's are those of one attacker.
AGGREGATORS: Mapping[str, Mapping[str, Any]] = {
    "mean": {},
    "trimmed_mean": {"trim": 1},
    "median": {},
    "geometric_median": {},
    "krum": {"byzantine": 1},
    "multi_krum": {"byzantine": 1, "keep": None},
}
OPTIMIZERS: Mapping[str, Mapping[str, float]] = {
    "fedavgm": {"lr": 1.0, "beta1": 0.9},
    "fedadagrad": {"lr": 0.01, "beta1": 0.0, "tau": 1e-3},
    "fedadam": {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
    "fedyogi": {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
    "fedadamw": {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3, "weight_decay": 0.01},
}


def settle(section: Any, where: str, own: Mapping[str, Any]) -> None:
    """Writes its own defaults into keys left null. Raises ValueError for a key that is not its own.

    So that a run keeps them: config.yaml has what the dataclass has.
    """
    for key in (name for name in type(section).__dataclass_fields__ if name != "name"):
        if getattr(section, key) is None:
            object.__setattr__(section, key, own.get(key))
        has = f"its keys are {', '.join(own)}" if own else "it has no keys"
        require(key in own or getattr(section, key) is None, f"{where}.{key}: {section.name} has none; {has}")


@dataclass(frozen=True, kw_only=True)
class Aggregator(Section):
    """How updates become one. `mean`, weighted, is the only one that holds one update at a time. docs/server.md says
    which is for what.

    name: the rule; trim: values left out at each end, of each coordinate; byzantine: edges that may send anything;
    keep: updates that multi_krum averages (null: all that came, less byzantine, less 2).
    """

    name: Literal["mean", "trimmed_mean", "median", "geometric_median", "krum", "multi_krum"] = "mean"
    trim: int | None = None
    byzantine: int | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        settle(self, "server.aggregator", AGGREGATORS[self.name])
        for key, least in (("trim", 0), ("byzantine", 0), ("keep", 1)):
            value = getattr(self, key)
            require(value is None or value >= least, f"server.aggregator.{key}: {value} must be at least {least}")

    @property
    def needs(self) -> int:
        """The fewest updates the rule is defined for."""
        if self.trim is not None:
            return 2 * self.trim + 1
        if self.byzantine is not None:
            return max(2 * self.byzantine + 3, (self.keep or 0) + self.byzantine + 2)
        return 1

    def shortage(self, there: int, verb: str = "can come") -> str | None:
        """Why the rule cannot be applied to so many updates, and what to change; None if it can."""
        if there >= self.needs:
            return None
        own = {key: getattr(self, key) for key in AGGREGATORS[self.name]}
        keys = " and ".join(f"{key}: {value}" for key, value in own.items() if value is not None)
        if self.trim is not None:
            remedy = f"lower trim to {(there - 1) // 2}"
        elif self.keep and there >= 2 * (self.byzantine or 0) + 3:
            remedy = f"lower keep to {there - (self.byzantine or 0) - 2}"
        elif there >= 3:
            f = (there - 3) // 2
            most = there - f - 2
            remedy = f"lower byzantine to {f}" + (f" and keep to {most}" if (self.keep or 0) > most else "")
        else:
            remedy = "take median, which any number will do for"
        return f"server.aggregator: {self.name} with {keys} needs {self.needs} updates, {there} {verb}; {remedy}"


@dataclass(frozen=True, kw_only=True)
class Optimizer(Section):
    """A server optimizer, whose gradient is minus a round's change of the state. docs/server.md has the equations, and
    the defaults of each, which null stands for.

    name: which one; lr: its rate; beta1, beta2: of the first and second moment; tau: adaptivity, added to the root;
    weight_decay: of fedadamw, times lr.
    """

    name: Literal["fedavgm", "fedadagrad", "fedadam", "fedyogi", "fedadamw"]
    lr: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    tau: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        settle(self, "server.optimizer", OPTIMIZERS[self.name])
        for key in ("lr", "tau"):
            value = getattr(self, key)
            require(value is None or value > 0, f"server.optimizer.{key}: {value} must be above 0")
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            require(value is None or 0 <= value < 1, f"server.optimizer.{key}: {value} must lie in [0, 1)")
        decay = self.weight_decay
        require(decay is None or decay >= 0, f"server.optimizer.weight_decay: {decay} must not be negative")
