"""The keys of a campaign file, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fedpipe_ray.section import Section, require

SAMPLERS = ("tpe", "gp", "nsga2", "nsga3", "cmaes", "qmc", "random")


@dataclass(frozen=True, kw_only=True)
class Objective(Section):
    """One figure to make small or large. metric: which one; way: `auto` = the metric's better one.

    within: quality under a budget, metric -> at most; until: cost to a target, metric -> value to reach; over: of the
    edges together, the `worst` one, or the `gap` between the worst and the mean.
    """

    metric: str
    way: Literal["minimize", "maximize", "auto"] = "auto"
    within: dict[str, float | str] = field(default_factory=dict)
    until: dict[str, float | str] = field(default_factory=dict)
    over: Literal["all", "worst", "gap"] = "all"

    def __post_init__(self) -> None:
        require(not (self.within and self.until), f"{self.metric}: within and until exclude each other")
        require(not (self.until and self.over != "all"), f"{self.metric}: until has no place beside over")


@dataclass(frozen=True, kw_only=True)
class Campaign(Section):
    """A whole campaign file.

    run: the run file that trials start from, beside this file; set: keys of it that differ in every trial. search: key
    -> {low, high, step or log} or a list of choices. objectives: name -> minimize, maximize, or the keys of an
    Objective; the name is the metric unless those say another. constraints: metric -> at most, or {at_least: value}.
    name: of the campaign (null: the file's).

    sampler, seed: Optuna's. pruner: by default `hyperband` where there is one objective, and none where there are
    several. trials: how many in all; parallel: how many at once; fleet: `shared` = each in one warm worker that plays
    all edges, `own` = each with Ray actors for its edges. retries: how often a trial is tried again whose worker died.
    enqueue: points to try first; keys left out are drawn. storage: URL of a PostgreSQL or MySQL database (default: a
    journal file in the campaign's folder).
    """

    run: str
    search: dict[str, Any]
    objectives: dict[str, Any]
    name: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    constraints: dict[str, Any] = field(default_factory=dict)
    sampler: Literal["tpe", "gp", "nsga2", "nsga3", "cmaes", "qmc", "random"] = "tpe"
    pruner: Literal["halving", "hyperband", "median", "none"] | None = None
    trials: int = 20
    parallel: int = 1
    fleet: Literal["shared", "own"] = "shared"
    retries: int = 2
    enqueue: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0
    storage: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.search), "search: empty; give at least one key a range or a list of choices")
        require(bool(self.objectives), "objectives: empty; give at least one, such as loss: minimize")
        require(self.trials >= 1, f"trials: {self.trials} must be at least 1")
        require(self.parallel >= 1, f"parallel: {self.parallel} must be at least 1")
        require(self.retries >= 0, f"retries: {self.retries} must not be negative")
        several = len(self.objectives) > 1 and self.pruner not in (None, "none")
        require(
            not several,
            f"pruner: {self.pruner} with {len(self.objectives)} objectives: Optuna does not prune there; "
            "leave pruner out, or keep one objective and make the others constraints",
        )
        require(
            self.sampler != "cmaes" or len(self.objectives) == 1,
            f"sampler: cmaes with {len(self.objectives)} objectives: it knows one; use nsga2, nsga3, tpe or gp",
        )

    @property
    def pruner_name(self) -> str:
        """The pruner in use."""
        return self.pruner or ("none" if len(self.objectives) > 1 else "hyperband")
