"""Which allocations are promoted to short federated runs, and how these choose among them by successive halving. Ours.

All that are left do as many rounds, from the start, before any is stopped, so that none has an advantage for being
first: 1 round, then 3, 9, ..., and the last few all rounds of the run file. What is compared is validation loss after
equally many rounds, and the choice is among those that did all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import TrialState

from fedpipe_ray.display import Display
from fedpipe_ray.errors import UserError
from fedpipe_ray.settings import Run
from fedpipe_ray.trial import Executor

from .campaign import Driver
from .plan import Plan
from .settings import Campaign, Objective
from .space import space_of
from .study import close_storage
from .tune import study_of
from .watch import Watch

FACTOR = 3  # of those that did as many rounds, one in three goes on, and does three times as many
FINALISTS = 2  # go on at least: one alone has nothing to be compared with after all rounds


@dataclass(frozen=True)
class Measured:
    """What a short run gave: its validation loss, None where it failed, after so many rounds of those asked for."""

    loss: float | None
    rounds: int
    of: int

    @property
    def counts(self) -> bool:
        """Whether it did all rounds and its loss is a number: only then it may be chosen."""
        return self.rounds == self.of and self.loss is not None and math.isfinite(self.loss)


def promoted(count: int, own: int | None, most: int) -> list[int]:
    """Which of `count` allocations, the best by value first, are measured: at most `most`, in their order.

    The best, the planner's own (at place `own`), and others spread evenly over the places between the best and the
    last.
    """
    if count <= most:
        return list(range(count))
    fixed = {0} if own is None else {0, own}
    others, left = [at for at in range(count) if at not in fixed], most - len(fixed)
    return sorted(fixed | {others[(2 * k + 1) * len(others) // (2 * left)] for k in range(left)})


def measure(
    runs: Mapping[int, Run], folder: Path, make_executor: Callable[[], Executor], display: Display
) -> dict[int, Measured]:
    """What each run of this number gave; of equal losses at the edge of a cut, all go on.

    Leaves the rounds of all in `folder`, N-rounds/trials/*.jsonl in the order of the numbers. Raises UserError if none
    comes to an end with a finite loss.
    """
    runs = {at: dataclasses.replace(run, evaluate=dataclasses.replace(run.evaluate, patience=None, target=None))
            for at, run in runs.items()}  # fmt: skip
    asked = next(iter(runs.values())).rounds
    found: dict[int, Measured] = {}
    left, rounds = dict(runs), 1
    with closing(make_executor()) as executor:
        while True:
            last = len(left) <= FINALISTS or rounds >= asked
            rounds = asked if last else rounds
            display.note(f"measuring {', '.join(map(str, left))} by {rounds} of {asked} rounds")
            losses, fault = together(left, rounds, folder / f"{rounds}-rounds", executor, display)
            found |= {at: Measured(losses.get(at), rounds, asked) for at in left}
            finite = sorted(loss for loss in losses.values() if math.isfinite(loss))
            if not finite:
                why = fault or "their losses are no numbers; lower local.lr"
                raise UserError(f"--measure: none of the measured runs has a loss after {rounds} rounds: {why}")
            if last:
                return found
            bound = finite[: max(FINALISTS, math.ceil(len(left) / FACTOR))][-1]
            left = {at: run for at, run in left.items() if losses.get(at, math.inf) <= bound}
            rounds *= FACTOR


def together(
    runs: Mapping[int, Run], rounds: int, folder: Path, executor: Executor, display: Display
) -> tuple[dict[int, float], str]:
    """(validation loss by number after so many rounds of each, the last fault): a campaign in which none is stopped."""
    short = {str(at): dataclasses.replace(run, rounds=rounds) for at, run in runs.items()}
    which = {"allocation": list(runs)}
    plan = Plan(
        Campaign(run="", search=which, objectives={"loss": "minimize"}, trials=len(runs), pruner="none",
                 enqueue=[{"allocation": at} for at in runs]),
        f"{rounds}-rounds", next(iter(short.values())), lambda values: short[values[0].partition("=")[2]],
        space_of(which), {"loss": Objective(metric="loss", way="minimize")}, [],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        study = study_of(plan, folder)
        stack.callback(close_storage, study)
        watch = Watch(plan, study, display)
        driver = Driver(plan, study, executor, folder, watch.show)
        with watch.showing():
            driver.go()
        done = study.get_trials(states=(TrialState.COMPLETE,))
    return {int(trial.params["allocation"]): float(trial.values[0]) for trial in done}, driver.last_failure
