"""What a campaign shows: a live table on a terminal, a plain line for each trial that ended elsewhere."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedpipe_ray.display import Display, number

from .campaign import Driver
from .plan import Plan
from .results import missed_by
from .study import OPEN, RETRY_OF, best_of, misses, superseded, unmet

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class Watch:
    """Shows a study as it grows."""

    def __init__(self, plan: Plan, study: optuna.Study, display: Display) -> None:
        self.plan, self.study, self.display = plan, study, display
        self._said = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state in ENDED}
        self._driver: Driver | None = None
        self._live: Live | None = None

    @contextmanager
    def showing(self) -> Iterator[None]:
        """The live table while something goes on."""
        if self.display.mode != "live":
            yield
            return
        with Live(self._table(), console=self.display.console, auto_refresh=False, transient=True) as self._live:
            yield
        self._live = None

    def show(self, driver: Driver) -> None:
        """Shows what is new."""
        self._driver = driver
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        elif self.display.mode == "plain":
            for trial in self.study.get_trials(deepcopy=False):
                if trial.state in ENDED and trial.number not in self._said:
                    self._said.add(trial.number)
                    self.display.note(self.line(trial))

    def line(self, trial: FrozenTrial) -> str:
        """A trial that ended."""
        values = [*zip(self.plan.objectives, trial.values)] if trial.values else []
        told = "  ".join(f"{name} {number(value, 4)}" for name, value in values)
        if not values and trial.intermediate_values:
            last = max(trial.intermediate_values)
            told = f"after round {last}: {number(trial.intermediate_values[last], 4)}"
        missed = [f"{name} by {value:.4g}" for name, value in trial.constraints.items() if 0 < value < math.inf]
        point = " ".join(
            f"{key}={self.plan.space.value(key, value)}" if not isinstance(value, float) else f"{key}={value:.4g}"
            for key, value in trial.params.items()
        )
        parts = [
            f"trial {trial.number:>3} {trial.state.name.lower():<8} {told}",
            f"misses {', '.join(missed)}" * bool(missed),
            f"stopped after round {trial.user_attrs.get('rounds')}" * (OPEN in trial.user_attrs),
        ]
        return "  ".join([*filter(None, parts), point])

    def _table(self) -> Group:
        trials = self.study.get_trials(deepcopy=False)
        tried_again = superseded(trials)
        counts = Counter(trial.state.name.lower() for trial in trials if trial.number not in tried_again)
        running = self._driver.running if self._driver else {}
        table = Table(box=None, pad_edge=False)
        for name in ("trial", "round", "last", "values"):
            table.add_column(name, justify="left" if name == "values" else "right", no_wrap=name != "values")
        for task, one in running.items():
            values = self.plan.values(one.records) if one.records else []
            shown = [number(value, 4) for value in values if value is not None]
            point = " ".join(f"{key}={value}" for key, value in one.trial.params.items())
            table.add_row(str(task), f"{len(one.records)}/{one.rounds}", " ".join(shown), Text(point))
        lines = [f"{self.plan.name}: {sum(counts.values())} of {self.plan.settings.trials} trials, "
                 + ", ".join(f"{count} {name}" for name, count in counts.items())]  # fmt: skip
        best = best_of(trials, self.plan.ways)
        if best:
            lines.append(f"best feasible ({len(best)}): {self.line(best[0])}")
        short = unmet(trials)
        for name, (over, ended) in misses(trials).items():
            nearest = f"; the nearest misses it by {missed_by(name, short[name])}" if name in short else ""
            lines.append(f"constraint {name}: missed by {over} of {ended} trials{nearest}")
        return Group(*map(Text, lines), table)  # text: values may have brackets, which are marks of rich's


def counts_in_words(trials: list[FrozenTrial], plan: Plan) -> str:
    """How many trials came to what end, and how many of the rounds pruning and bounds spared."""
    ended = Counter(trial.state.name.lower() for trial in trials)
    ended["tried again"] = sum(RETRY_OF in trial.user_attrs for trial in trials)
    spent, whole = rounds_spent(trials, plan)
    saved = f"; {spent} rounds of {whole}" if whole else ""
    return ", ".join(f"{count} {name}" for name, count in ended.items() if count) + saved


def rounds_spent(trials: list[FrozenTrial], plan: Plan) -> tuple[int, int]:
    """(rounds done, rounds that the same trials would have done unpruned); repeats and failed trials do not count."""
    own = [
        trial
        for trial in trials
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and "rounds" in trial.user_attrs
        and "repeat_of" not in trial.user_attrs
    ]  # fmt: skip
    return sum(trial.user_attrs["rounds"] for trial in own), sum(plan.rounds_of(trial.params) for trial in own)
