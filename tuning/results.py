"""What a campaign came to: the run files of its best trials, or what stands in the way of there being any."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from fedpipe_ray.config import to_yaml
from fedpipe_ray.errors import UserError
from fedpipe_ray.files import write_atomically

from .metrics import higher_is_better
from .plan import Plan
from .study import OPEN, best_of, unmet


def results(plan: Plan, study: optuna.Study, folder: Path, last_failure: str = "") -> list[FrozenTrial]:
    """The best feasible trials, each written as a run file that `fedpipe run` takes: best.yaml, then best-2.yaml...

    Run files of a front that was larger before go. Raises UserError if there is none, with the constraint that no trial
    met and by how much the nearest missed it, or the target or budget that none reached.
    """
    trials = study.get_trials(deepcopy=False)
    best = best_of(trials, plan.ways)
    names = ["best.yaml" if index == 0 else f"best-{index + 1}.yaml" for index in range(len(best))]
    for name, trial in zip(names, best):
        write_atomically(folder / name, to_yaml(plan.load(plan.space.overrides(trial.params))))
    for path in folder.glob("best*.yaml"):
        if re.fullmatch(r"best(-\d+)?\.yaml", path.name) and path.name not in names:
            path.unlink()
    if best:
        return best
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not done:
        raise UserError(f"none of the {len(trials)} trials came to an end; the last fault: {last_failure or 'pruned'}")
    missed = [
        f"{name}: the nearest trial misses it by {missed_by(name, trial)}" for name, trial in unmet(trials).items()
    ]
    if missed:
        raise UserError("constraints: no trial meets\n" + "\n".join(f"  {line}" for line in missed))
    ended = [trial for trial in done if all(map(math.isfinite, trial.constraints.values()))]  # the others diverged
    if ended and all(trial.constraints and max(trial.constraints.values()) > 0 for trial in ended):
        nearest = min(ended, key=lambda trial: sum(max(value, 0) for value in trial.constraints.values()))
        over = ", ".join(
            f"{name} by {missed_by(name, nearest)}" for name, value in nearest.constraints.items() if value > 0
        )
        raise UserError(f"constraints: no trial meets all of them together; trial {nearest.number} misses {over}")
    raise UserError(_unreached(plan, done) or "no trial has a finite value: all diverged; lower the range of local.lr")


def missed_by(name: str, trial: FrozenTrial) -> str:
    """By how much a trial misses a constraint, in words: at least so much where it was stopped for that."""
    stopped = f"at least, when it was stopped after round {trial.user_attrs.get('rounds')}" * (OPEN in trial.user_attrs)
    return f"{trial.constraints[name]:.4g} {stopped}".rstrip()


def _unreached(plan: Plan, done: Sequence[FrozenTrial]) -> str:
    """The targets that no trial reached and the budgets within which none has a figure; empty if it is not that."""
    lines = []
    for index, (name, one) in enumerate(plan.objectives.items()):
        if not (one.until or one.within) or any(math.isfinite(trial.values[index]) for trial in done):
            continue
        seen = [trial.user_attrs.get("nearest", {}).get(name, {}) for trial in done]
        for key, bound in (one.until or one.within).items():
            values = [found[key] for found in seen if math.isfinite(found.get(key, math.inf))]
            if not values:
                continue
            if one.until:
                best = (max if higher_is_better(key) else min)(values)
                lines.append(
                    f"objectives.{name}.until: no trial reached {key} {bound:g}; the nearest came to {best:.4g}; "
                    "give a nearer target, or more rounds"
                )
            elif min(values) > float(bound):
                lines.append(f"objectives.{name}.within: no trial has a figure within {key} {bound:g}; the first was "
                             f"there at {min(values):.4g}; raise the budget, or lower evaluate.every")  # fmt: skip
    return "\n".join(lines)
