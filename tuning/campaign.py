"""A campaign: asks Optuna for trials, has an executor carry them out, and tells Optuna what came of them.

All of Optuna is here on the driver; trials know nothing of it. What is in the storage is enough to go on after a kill.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from fedpipe_ray.errors import Interrupted, UserError
from fedpipe_ray.files import write_atomically
from fedpipe_ray.trial import Event, Executor, Record

from .metrics import metric, missing, nearest, worst_of
from .plan import Plan
from .study import ENQUEUED, OPEN, OWN_FAULT, REPEAT_OF, STOPPED, counted, enqueue, recover, should_prune

log = logging.getLogger("fedpipe")

WAIT_SECONDS = 0.5  # for an event, before the display is drawn again
Verdict = Literal["go on", "settled", "over", "prune", "retry", "complete", "worst", "fail"]
ENDS: dict[str, Verdict] = {"done": "complete", "diverged": "worst", "failed": "fail"}


@dataclass
class Running:
    """A trial at work. followers: trials with the same values, told the same in the end.

    rounds: how many it will do; tries: how often it broke; reported: rounds that Optuna knows.
    """

    trial: Trial
    key: str
    rounds: int = 0
    records: list[Record] = field(default_factory=list)
    followers: list[Trial] = field(default_factory=list)
    tries: int = 0
    reported: int = 0
    began: float = field(default_factory=time.monotonic)


def verdict(
    kind: str, tries: int, retries: int, *, prune: bool = False, settled: bool = False, over: bool = False
) -> Verdict:
    """What to do with a trial after an event. tries: how often it broke before; a fault of its own would come again.

    over: a cost is above its bound, which no later round can mend.
    """
    if kind == "round":
        return "settled" if settled else "over" if over else "prune" if prune else "go on"
    if kind == "broken":
        return "retry" if tries < retries else "fail"
    return ENDS[kind]


def key_of(params: Mapping[str, Any]) -> str:
    """The same for trials with the same values."""
    return json.dumps(params, sort_keys=True)


class Driver:
    """Carries a campaign out. `go` may be called again, also in another process, until nothing is left.

    show(): called whenever something happened, and twice a second.
    """

    def __init__(
        self, plan: Plan, study: optuna.Study, executor: Executor, folder: Path, show: Callable[[Driver], None]
    ) -> None:
        self.plan, self.study, self.executor, self.folder, self.show = plan, study, executor, folder, show
        self.running: dict[int, Running] = {}
        self.named = False  # whether every metric that only a round can tell was recorded once
        self.known: dict[str, FrozenTrial] = {}
        self.last_failure = ""
        (folder / "trials").mkdir(parents=True, exist_ok=True)

    def go(self) -> None:
        """Runs all trials that are left."""
        own_process = not self.plan.base.fleet.ray  # a trial may then be what killed the driver
        left = recover(self.study, self.plan.settings.retries if own_process else math.inf)
        if left:
            log.info("trials %s were running when the driver ended; each is tried once more", left)
        for number in left:
            self._rounds_of(number).unlink(missing_ok=True)  # written, and Optuna not yet told
        enqueue(self.study, self.plan.space, self.plan.settings.enqueue)
        trials = self.study.get_trials(deepcopy=False)
        for trial in trials:
            told = trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or OWN_FAULT in trial.user_attrs
            if told and REPEAT_OF not in trial.user_attrs:
                self.known[key_of(trial.params)] = trial
        waiting = sum(trial.state == TrialState.WAITING for trial in trials)
        to_ask = max(self.plan.settings.trials - counted(trials), 0) + waiting
        try:
            self._carry_out(to_ask)
        except (Interrupted, KeyboardInterrupt):
            for one in self.running.values():
                for asked in (one.trial, *one.followers):
                    asked.set_user_attr(STOPPED, True)
            raise

    def _carry_out(self, to_ask: int) -> None:
        """Asks for so many trials, and takes what becomes of them."""
        while to_ask or self.running:
            while to_ask and len(self.running) < self.plan.settings.parallel:
                to_ask -= 1
                self._ask()
            if self.running:
                event = self.executor.next(WAIT_SECONDS)
                if event is not None and event.task in self.running:
                    self._take(event)
            self.show(self)

    def _ask(self) -> None:
        """Starts the trial that Optuna wants next, or answers at once what is known."""
        trial = self.study.ask(dict(self.plan.space.distributions))
        key = key_of(trial.params)
        known = self.known.get(key)
        if known is not None and not (known.state == TrialState.FAIL and ENQUEUED in trial.user_attrs):
            self._repeat(trial, known)
            return
        same = next((one for one in self.running.values() if one.key == key), None)
        if same is not None:
            same.followers.append(trial)
            return
        self.running[trial.number] = Running(trial, key)
        try:
            run = self.plan.load(self.plan.space.overrides(trial.params))
        except UserError as error:  # values that are possible alone and impossible together
            self._take(Event(trial.number, "failed", reason=str(error)))
            return
        self.running[trial.number].rounds = run.rounds
        self.executor.submit(trial.number, run)

    def _take(self, event: Event) -> None:
        """Decides about a trial after an event, and does it."""
        one = self.running[event.task]
        prune = over = False
        if event.kind == "round":
            one.records.append(event.record)
            self._check_names(one)
            over = len(one.records) < one.rounds and any(limit.broken(one.records) for limit in self.plan.limits)
            prune = not over and self._should_prune(one)
        settled = bool(one.records) and self.plan.settled(one.records)
        decided = verdict(event.kind, one.tries, self.plan.settings.retries, prune=prune, settled=settled, over=over)
        if decided == "go on":
            return
        if decided == "retry":
            log.info("trial %d is tried again: %s", event.task, event.reason)
            one.tries, one.records = one.tries + 1, []
            self.executor.submit(event.task, self.plan.load(self.plan.space.overrides(one.trial.params)))
            return
        if decided in ("prune", "settled", "over"):
            self.executor.cancel(event.task)
        self._end(one, decided, event.reason, broken=event.kind == "broken")

    def _check_names(self, one: Running) -> None:
        """Raises UserError after a first round that lacks a metric which no trial can have, unless methods differ."""
        if self.named or self.plan.methods_differ:
            return
        fault = missing(self.plan.metrics, one.records, self.plan.base)
        if fault:
            raise UserError(
                f"objectives, constraints: {fault} (recorded by the first round of trial {one.trial.number})"
            )
        self.named = any(record["eval"]["global"] for record in one.records)

    def _infeasible(self, trial: FrozenTrial) -> bool:
        """Whether a trial misses a constraint, as far as is known now: its values prune no other."""
        one = self.running.get(trial.number)
        if one is None:
            return any(value > 0 for value in trial.constraints.values())
        return any((limit.excess(one.records) or 0.0) > 0 for limit in self.plan.limits)

    def _should_prune(self, one: Running) -> bool:
        """Reports a round to Optuna, and asks; with several objectives it does not prune."""
        objectives = list(self.plan.objectives.values())
        value = self.plan.values(one.records)[0] if len(objectives) == 1 else None
        if value is None or objectives[0].until or len(one.records) == one.rounds:
            return False
        step = len(one.records)
        if step > one.reported:  # a retry gives the same numbers again
            one.trial.report(value, step)
            one.reported = step
        return should_prune(self.study, one.trial, self._infeasible)

    def _end(self, one: Running, decided: Verdict, reason: str, broken: bool) -> None:
        """Writes a trial's rounds, tells Optuna, and answers the trials that waited for the same."""
        number = one.trial.number
        lines = "".join(json.dumps(record) + "\n" for record in one.records)
        write_atomically(self._rounds_of(number), lines)
        figures = {name: metric(name, one.records) for name in ("loss", "virtual_seconds", "bytes")} if lines else {}
        facts: dict[str, Any] = {
            **figures,
            "rounds": len(one.records),
            "seconds": time.monotonic() - one.began,
            "tries": one.tries + 1,
            "nearest": {name: nearest(spec, one.records) for name, spec in self.plan.objectives.items()},
        }
        values, excess = self.plan.values(one.records), [limit.excess(one.records) for limit in self.plan.limits]
        if decided == "worst":
            values, excess = [worst_of(way) for way in self.plan.ways], [math.inf] * len(excess)
        if decided == "over":
            values = [worst_of(way) if value is None else value for way, value in zip(self.plan.ways, values)]
            facts[OPEN] = [limit.name for limit in self.plan.limits if not limit.grows]
            excess = [found or 0.0 for found in excess]
        silent = [name for name, value in zip(self.plan.objectives, values) if value is None]
        silent += [limit.metric for limit, found in zip(self.plan.limits, excess) if found is None]
        if decided not in ("prune", "fail") and silent:
            decided, reason = "fail", f"no round recorded {', '.join(silent)}"
        del self.running[number]
        if decided == "fail":
            self.last_failure = reason
            log.warning("trial %d failed: %s", number, reason)
            facts["reason"] = reason
            facts |= {} if broken else {OWN_FAULT: True}
        told = [one.trial, *one.followers]
        for trial in told:
            extra = {} if trial is one.trial else {REPEAT_OF: number}
            self._tell(trial, decided, values, excess, {**facts, **extra})
        if not broken:
            self.known[one.key] = self.study.get_trials(deepcopy=False)[number]

    def _rounds_of(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:04d}.jsonl"

    def _tell(
        self, trial: Trial, decided: Verdict, values: Sequence[float | None], excess: Sequence[float | None],
        facts: Mapping[str, Any],
    ) -> None:  # fmt: skip
        for name, fact in facts.items():
            trial.set_user_attr(name, fact)
        if decided == "fail":
            self.study.tell(trial, state=TrialState.FAIL)
            return
        for limit, found in zip(self.plan.limits, excess, strict=True):
            trial.set_constraint(limit.name, found or 0.0)
        if decided == "prune":
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, [float(value or 0.0) for value in values])

    def _repeat(self, trial: Trial, known: FrozenTrial) -> None:
        """Answers a trial whose values were tried before: the same bits, or the same fault, would come again."""
        trial.set_user_attr(REPEAT_OF, known.number)
        for name in (OPEN, OWN_FAULT, "reason", "rounds", "nearest"):
            if name in known.user_attrs:
                trial.set_user_attr(name, known.user_attrs[name])
        for step, value in known.intermediate_values.items():
            trial.report(value, step)
        for name, value in known.constraints.items():
            trial.set_constraint(name, value)
        if known.state == TrialState.FAIL:
            self.last_failure = known.user_attrs["reason"]
        if known.state != TrialState.COMPLETE:
            self.study.tell(trial, state=known.state)
        else:
            self.study.tell(trial, known.values)
