"""Campaigns: what is asked, what is told, what a kill leaves, and what each bad campaign file is told."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState
from runs import ROOT, command, env, here, load

from clusters import find_profiles
from fedpipe_ray.config import load_run
from fedpipe_ray.display import Display
from fedpipe_ray.errors import UserError
from fedpipe_ray.fleet import Kept, SerialFleet
from fedpipe_ray.methods import make_method
from fedpipe_ray.settings import Run
from fedpipe_ray.trial import Event, SerialExecutor, records_of
from tuning.campaign import verdict
from tuning.metrics import metric, value_of
from tuning.plan import Plan, load_plan
from tuning.settings import Objective
from tuning.space import space_of
from tuning.study import RETRY_OF, best_of, enqueue, mended, open_storage, open_study, recover, sampler_of
from tuning.tune import carry_out, study_of

QUIET = Display("none")


def campaign(run_file: Path, **changes: Any) -> Path:
    """A campaign file beside a run file."""
    tree = {
        "run": run_file.name,
        "search": {"local.lr": {"low": 1e-3, "high": 0.1, "log": True}, "method.rank": [2, 4]},
        "objectives": {"loss": "minimize"},
        "trials": 4,
        **changes,
    }
    path = run_file.with_name("campaign.yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


def plan_of(run_file: Path, **changes: Any) -> Plan:
    return load_plan(campaign(run_file, **changes), [], lambda path, overrides: load(path, *overrides))


def carried_out(plan: Plan, folder: Path, executor: Any = None) -> list[optuna.trial.FrozenTrial]:
    return list(carry_out(plan, folder, lambda: executor or SerialExecutor(), QUIET).trials)


def record(
    loss: float | None, seconds: float = 1.0, edges: dict[str, float] | None = None, up: int = 10
) -> dict[str, Any]:
    """A round's line as far as metrics read it."""
    return {
        "train_loss": loss, "bytes_up": up, "bytes_down": 2 * up, "wall_seconds": 0.1, "evaluate_seconds": 0.0,
        "virtual_seconds": seconds, "method": {"residual": 0.5},
        "eval": {"global": {"loss": loss}, "edges": {name: {"loss": value} for name, value in (edges or {}).items()}},
        "edges": {"a": {"steps": 3, "samples": 6, "tokens": 60, "flops": 1e6, "status": "ok",
                        "peak_memory_bytes": up, "training_memory_bytes": up}},
    }  # fmt: skip


class Curves:
    """An executor whose trials have losses by formula: nothing is trained. asked: the runs that were submitted."""

    def __init__(self, losses: Any, breaks: Sequence[int] = ()) -> None:
        self.losses, self.breaks = losses, list(breaks)
        self.asked: list[int] = []
        self.rounds = 0
        self.queue: list[tuple[int, Any]] = []

    def submit(self, task: int, run: Run) -> None:
        self.asked.append(task)
        self.queue.append((task, iter(self.losses(run))))

    def next(self, timeout_seconds: float) -> Event | None:
        task, losses = self.queue[0]
        if task in self.breaks:
            self.breaks.remove(task)
            self.queue.pop(0)
            return Event(task, "broken", reason="its worker died")
        try:
            loss = next(losses)
        except StopIteration:
            self.queue.pop(0)
            return Event(task, "done")
        self.rounds += 1
        return Event(task, "round", record(loss))

    def cancel(self, task: int) -> None:
        self.queue = [entry for entry in self.queue if entry[0] != task]

    def close(self) -> None:
        self.queue.clear()


def by_rate(run: Run) -> list[float]:
    """Losses that fall to |log10(lr) + 2|: the best rate is 0.01."""
    least = abs(math.log10(run.local.lr) + 2)
    return [least + 1 / (n + 1) for n in range(run.rounds)]


# -- metrics


def test_metrics_are_what_the_rounds_add_up_to() -> None:
    """Two rounds of 10 up, 20 down; 1 s and 3 s; the newest loss is 2."""
    records = [record(3.0, 1), record(2.0, 3)]
    expected = {
        "loss": 2, "train_loss": 2, "bytes_up": 20, "bytes": 60, "round_bytes": 30, "virtual_seconds": 4,
        "round_seconds": 3, "steps": 6, "peak_memory_bytes": 10, "rounds": 2, "method.residual": 0.5, "lost_edges": 0,
    }  # fmt: skip
    assert {name: metric(name, records) for name in expected} == expected
    assert metric("accuracy", records) is None
    assert metric("loss", [record(None)]) == math.inf  # no number


def test_protocols() -> None:
    """Losses 3, 2, 1 after 1, 4 and 9 s; at the end edges a 1 and b 3, mean 2."""
    records = [record(3.0, 1), record(2.0, 3), record(1.0, 5, {"a": 1, "b": 3})]
    loss = Objective(metric="loss", way="minimize")
    assert value_of(dataclasses.replace(loss, within={"virtual_seconds": 4.0}), records) == 2
    assert value_of(dataclasses.replace(loss, within={"virtual_seconds": 0.5}), records) == math.inf
    cost = Objective(metric="virtual_seconds", way="minimize", until={"loss": 2.0})
    assert value_of(cost, records) == 4
    assert value_of(dataclasses.replace(cost, until={"loss": 0.5}), records) == math.inf
    assert value_of(dataclasses.replace(loss, over="worst"), records) == 3
    assert value_of(dataclasses.replace(loss, over="gap"), records) == 1


# -- decisions


@pytest.mark.parametrize(
    ("kind", "tries", "facts", "expected"),
    [
        ("round", 0, {}, "go on"), ("round", 0, {"prune": True}, "prune"),
        ("round", 0, {"settled": True, "prune": True}, "settled"), ("broken", 0, {}, "retry"),
        ("broken", 1, {}, "retry"), ("broken", 2, {}, "fail"), ("failed", 0, {}, "fail"), ("done", 0, {}, "complete"),
        ("diverged", 0, {}, "worst"),
    ],
)  # fmt: skip
def test_verdicts(kind: str, tries: int, facts: dict[str, bool], expected: str) -> None:
    assert verdict(kind, tries, 2, **facts) == expected


def test_the_front_holds_what_nothing_beats() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    for values, miss in (((1, 1), 0), ((2, 3), -1), ((2, 2), 0), ((0, 9), 0.1), ((1, 1), 0)):
        trial = study.ask()
        trial.set_constraint("c", miss)
        study.tell(trial, values)
    assert [trial.number for trial in best_of(study.trials, ["minimize", "maximize"])] == [0, 1]


# -- campaigns


def test_a_campaign_ends_with_a_run_file(run_file: Path, tmp_path: Path) -> None:
    """Real rounds in this process; the best trial's file gives the same losses again."""
    out = tmp_path / "out"
    assert here("tune", campaign(run_file, pruner="none"), "--out", out) == 0
    study = optuna.load_study(study_name="campaign", storage=open_storage(None, out))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4
    best = load(out / "best.yaml")
    again = list(records_of(best, lambda run, method: SerialFleet(run, method)))
    assert metric("loss", again) == study.best_value == min(trial.value or 9 for trial in study.trials)
    page = (out / "report.html").read_text()
    for word in ("loss: history", "loss: parallel coordinates", "optuna-dashboard"):
        assert word in page


def test_the_example_loads() -> None:
    example = ROOT / "examples" / "campaign.yaml"
    plan = load_plan(example, [], lambda path, overrides: load_run(path, list(overrides), find_profiles))
    assert len(plan.base.fleet.edges) == 5
    assert plan.settings.search


def test_what_ran_before_in_a_process_changes_no_bit(run_file: Path) -> None:
    kept = Kept()
    runs = [load(run_file, f"method.rank={rank}", f"local.lr={lr}") for rank, lr in ((4, 0.01), (2, 0.1), (4, 0.05))]

    def losses(run: Run, kept: Kept | None) -> list[Any]:
        return [r["eval"] for r in records_of(run, lambda run, method: SerialFleet(run, method, kept=kept))]

    assert [losses(run, kept) for run in runs] == [losses(run, None) for run in runs]
    assert set(kept.data) == {"a", "b", "c"}
    other = load(run_file, "seed=1")
    kept.fit(other, make_method(other.method))
    assert not kept.data


def test_pruning_spares_rounds_and_keeps_the_best(run_file: Path, tmp_path: Path) -> None:
    """20 trials of 6 rounds by formula, random points: the same best with at most 60 % of the rounds."""
    found = {}
    for pruner in ("none", "halving"):
        plan = plan_of(run_file, trials=20, sampler="random", pruner=pruner, set={"rounds": 6})
        executor = Curves(by_rate)
        trials = carried_out(plan, tmp_path / pruner, executor)
        found[pruner] = min(trial.value for trial in trials if trial.value is not None), executor.rounds
    assert found["none"][1] == 120
    assert found["halving"][0] == found["none"][0]
    assert found["halving"][1] <= 0.6 * 120


def test_repeats_are_not_run_again(run_file: Path, tmp_path: Path) -> None:
    plan = plan_of(run_file, trials=9, search={"method.rank": [2, 4]}, sampler="random", pruner="none")
    executor = Curves(lambda run: [float(run.method["rank"])])
    trials = carried_out(plan, tmp_path / "out", executor)
    assert len(executor.asked) == 2
    assert [trial.value for trial in trials] == [float(trial.params["method.rank"]) for trial in trials]
    assert sum("repeat_of" in trial.user_attrs for trial in trials) == 7


def test_repeats_of_a_running_trial_wait_for_it(run_file: Path, tmp_path: Path) -> None:
    point = {"local.lr": 0.01, "method.rank": 4}
    plan = plan_of(run_file, trials=3, parallel=3, enqueue=[point] * 3, pruner="none")
    executor = Curves(by_rate)
    trials = carried_out(plan, tmp_path / "out", executor)
    assert executor.asked == [0]
    assert [trial.value for trial in trials] == [0.5] * 3


def test_a_broken_trial_is_tried_again_up_to_the_cap(run_file: Path, tmp_path: Path) -> None:
    plan = plan_of(run_file, trials=3, retries=1, pruner="none")
    executor = Curves(by_rate, breaks=[0, 1, 1])
    trials = carried_out(plan, tmp_path / "out", executor)
    assert executor.asked == [0, 0, 1, 1, 2]
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert trials[1].user_attrs["reason"] == "its worker died"


def test_values_that_exclude_each_other_fail_their_trial_alone(run_file: Path, tmp_path: Path) -> None:
    search = {"local.batch": [1, 4], "local.accumulate": [1, 2]}
    points = [{"local.batch": b, "local.accumulate": a} for b in (1, 4) for a in (1, 2)]
    plan = plan_of(run_file, search=search, enqueue=points, pruner="none")
    trials = carried_out(plan, tmp_path / "out", Curves(by_rate))
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert "local.accumulate: 2 parts of a batch of 1" in trials[1].user_attrs["reason"]


def test_divergence_is_the_worst_value_and_not_the_end(run_file: Path, tmp_path: Path) -> None:
    plan = plan_of(run_file, trials=3, pruner="none", enqueue=[{"local.lr": 0.1}])
    trials = carried_out(plan, tmp_path / "out", Curves(lambda run: [None] if run.local.lr == 0.1 else [1.0]))
    assert [trial.value for trial in trials] == [math.inf, 1, 1]


def test_a_trial_ends_once_its_target_is_reached(run_file: Path, tmp_path: Path) -> None:
    objective = {"metric": "virtual_seconds", "until": {"loss": 1.0}}
    plan = plan_of(run_file, trials=1, objectives={"cost": objective}, set={"rounds": 6})
    executor = Curves(lambda run: [3.0, 1.0, 0.5, 0.4])
    (trial,) = carried_out(plan, tmp_path / "out", executor)
    assert (trial.value, executor.rounds) == (2, 2)


def test_several_objectives_and_their_front(run_file: Path, tmp_path: Path) -> None:
    plan = plan_of(run_file, objectives={"loss": "minimize", "bytes": "minimize"}, sampler="nsga2", trials=6)
    trials = carried_out(plan, tmp_path / "out", Curves(by_rate))
    front = best_of(trials, plan.ways)
    assert sorted(path.name for path in (tmp_path / "out").glob("best*.yaml"))[0] == "best-2.yaml" or len(front) == 1
    assert "Pareto front" in (tmp_path / "out" / "report.html").read_text()


# -- a driver that goes away


class Stops(Curves):
    """Its driver goes away at the event after so many."""

    def __init__(self, losses: Any, events: int) -> None:
        super().__init__(losses)
        self.events = events

    def next(self, timeout_seconds: float) -> Event | None:
        self.events -= 1
        if self.events < 0:
            raise KeyboardInterrupt
        return super().next(timeout_seconds)


@pytest.mark.parametrize("events", [0, 1, 2, 3, 7, 8, 11])
def test_no_trial_is_lost_or_doubled_wherever_a_driver_goes_away(run_file: Path, tmp_path: Path, events: int) -> None:
    plan = plan_of(run_file, trials=6, parallel=3, pruner="none", enqueue=[{"local.lr": 0.05}, {"method.rank": 2}])
    with pytest.raises(KeyboardInterrupt):
        carried_out(plan, tmp_path, Stops(by_rate, events))
    before = {t.number: t for t in study_of(plan, tmp_path).trials}
    trials = carried_out(plan, tmp_path, Curves(by_rate))
    tried_again = {t.user_attrs[RETRY_OF]: t for t in trials if RETRY_OF in t.user_attrs}
    running = {n for n, t in before.items() if t.state == TrialState.RUNNING}
    assert tried_again.keys() == running
    assert all(tried_again[n].params == before[n].params for n in running)
    assert all(trials[n].value == t.value for n, t in before.items() if t.state == TrialState.COMPLETE)
    assert [t.state for t in trials].count(TrialState.COMPLETE) == 6
    assert sum("enqueued" in t.user_attrs and t.state == TrialState.COMPLETE for t in trials) == 2
    assert carried_out(plan, tmp_path, Curves(by_rate)) == trials  # nothing is left to do


def test_a_kill_between_copy_and_failure_makes_no_second_copy(tmp_path: Path) -> None:
    study = optuna.create_study()
    trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    study.enqueue_trial(trial.params, user_attrs={RETRY_OF: 0})  # and here the driver was killed
    assert recover(study) == [0]
    assert recover(study) == []
    assert [t.state.name for t in study.trials] == ["FAIL", "WAITING"]
    assert study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}).params == trial.params


def test_a_torn_line_of_the_journal_is_taken_away(tmp_path: Path) -> None:
    plain = optuna.create_study(storage=open_storage(None, tmp_path), study_name="s")
    plain.tell(plain.ask(), 1.0)
    path = tmp_path / "journal.log"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 4, "wor')
    os.symlink(path, tmp_path / "journal.log.lock")
    assert mended(path).read_bytes() == whole
    again = optuna.load_study(storage=open_storage(None, tmp_path), study_name="s")
    again.tell(again.ask(), 2.0)
    assert [t.value for t in again.trials] == [1, 2]


def test_a_sampler_that_goes_on_does_not_begin_again() -> None:
    draws = {
        done: optuna.create_study(sampler=sampler_of("random", 0, done, 1)).ask().suggest_float("x", 0, 1)
        for done in (0, 1, 2)
    }
    assert len(set(draws.values())) == 3


def test_kill_minus_nine_and_go_on(run_file: Path, tmp_path: Path) -> None:
    """A driver in a process of its own, killed while it trains; then the same command."""
    out, path = tmp_path / "out", campaign(run_file, trials=6, pruner="none", set={"rounds": 3})
    with (tmp_path / "log").open("w") as file:
        process = subprocess.Popen(command("tune", path, "--out", out), cwd=ROOT, env=env(), stdout=file, stderr=file)
    deadline = time.monotonic() + 240
    while len(list((out / "trials").glob("*.jsonl"))) < 2:
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert here("tune", path, "--out", out) == 0
    trials = optuna.load_study(study_name="campaign", storage=open_storage(None, out)).trials
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(done) == 6
    assert len(trials) - 6 == sum(RETRY_OF in trial.user_attrs for trial in trials) <= 1
    assert sorted(int(file.stem) for file in (out / "trials").glob("*.jsonl")) == [trial.number for trial in done]
    assert all(len(file.read_text().splitlines()) == 3 for file in (out / "trials").glob("*.jsonl"))


# -- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"local.lrr": [1.0]}}, "search.local.lrr: unknown key local.lrr; did you mean lr?"),
        ({"search": {"method.ranks": [4]}}, "did you mean rank?"),
        ({"objectives": {"los": "minimize"}}, "objectives.los: no metric 'los'; did you mean loss?"),
        ({"constraints": {"bytes_upp": 1}}, "constraints: no metric 'bytes_upp'; did you mean bytes_up?"),
        ({"search": {"local.lr": {"low": 1, "high": 0.1}}}, "from low 1 to high 0.1 is reversed"),
        ({"search": {"local.lr": {"low": 1, "high": 1}}}, "is empty; low must be below high"),
        ({"search": {"local.lr": []}}, "search.local.lr: no choices"),
        ({"search": {"local.lr": {"low": 0, "high": 1, "log": True}}}, "log needs low above 0"),
        ({"search": {"local.lr": {"low": 0, "hihg": 1}}}, "is no distribution; write {low:"),
        ({"search": {"local.lr": {"low": -1.0, "high": 1}}}, "local.lr: -1.0 must be above 0"),
        ({"objectives": {"loss": "minimize", "bytes": "minimize"}, "pruner": "median"}, "Optuna does not prune there"),
        ({"objectives": {"loss": "minimise"}}, "objectives.loss.way: 'minimise' is not valid"),
        ({"sampler": "bayes"}, "sampler: 'bayes' is not valid"),
        ({"constraints": {"virtual_seconds": "3kg"}}, "'3kg' is not a quantity in second"),
        ({"enqueue": [{"local.lr": 7.0}]}, "enqueue: local.lr: 7.0 lies outside"),
        ({"enqueue": [{"local.batch": 7}]}, "enqueue: local.batch is not in search"),
        ({"trails": 3}, "unknown key trails; did you mean trials?"),
        ({"storage": "postgres//x"}, "storage: postgres//x is no URL"),
        ({"parallel": 2}, "only on Ray; set fleet.ray: true"),
    ],
)  # fmt: skip
def test_bad_campaigns_are_told_what_to_change(
    run_file: Path, tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here("tune", campaign(run_file, **changes), "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_a_constraint_that_no_trial_meets_is_named(run_file: Path, tmp_path: Path) -> None:
    """Rounds of 1 s, two a trial, so 2 s; 1.5 are allowed."""
    limits = {"virtual_seconds": "1500ms", "bytes": 1000}
    plan = plan_of(run_file, constraints=limits, pruner="none")
    with pytest.raises(UserError, match=r"virtual_seconds <= 1\.5: the nearest trial misses it by 0\.5$"):
        carried_out(plan, tmp_path, Curves(by_rate))
    assert (tmp_path / "report.html").exists()


def test_the_best_is_feasible(run_file: Path, tmp_path: Path) -> None:
    plan = plan_of(run_file, constraints={"loss": {"at_least": 1.0}}, trials=8, pruner="none", sampler="random")
    trials = carried_out(plan, tmp_path, Curves(by_rate))
    over = [trial.value for trial in trials if trial.value is not None and trial.value >= 1]
    assert len(over) < 8
    assert best_of(trials, plan.ways)[0].value == min(over)


def test_a_study_of_another_campaign_is_refused(run_file: Path, tmp_path: Path) -> None:
    carried_out(plan_of(run_file), tmp_path, Curves(by_rate))
    other = plan_of(run_file, search={"method.rank": [2]})
    with pytest.raises(UserError, match="study 'campaign' belongs to another campaign: search differ"):
        carried_out(other, tmp_path, Curves(by_rate))
    more = carried_out(plan_of(run_file, trials=6), tmp_path, Curves(by_rate))  # more trials are the same campaign
    assert len(more) == 6


def test_a_database_that_is_not_there(run_file: Path, tmp_path: Path) -> None:
    plan = plan_of(run_file, storage="postgresql://me:secret@127.0.0.1:1/none")
    with pytest.raises(UserError, match=r"storage: postgresql://me@127\.0\.0\.1:1/none cannot be reached: ") as caught:
        carried_out(plan, tmp_path, Curves(by_rate))
    assert "secret" not in str(caught.value)


def test_space() -> None:
    space = space_of({"a": [[1, 2], None, "x"], "b": {"low": 1, "high": 9, "step": 2}, "c": {"low": 0, "high": 1.5}})
    params = {"a": space.param("a", [1, 2]), "b": 3, "c": 0.5}
    assert [json.loads(one.partition("=")[2]) for one in space.overrides(params)] == [[1, 2], 3, 0.5]
    with pytest.raises(UserError, match="4 lies outside"):
        space.param("b", 4)


def test_owner_and_enqueue_survive_a_second_opening(tmp_path: Path) -> None:
    storage, space = open_storage(None, tmp_path), space_of({"x": {"low": 0, "high": 9}})
    for _ in range(2):
        study = open_study(storage, "s", {"a": 1}, ["minimize"], sampler_of("tpe", 0, 0, 1), optuna.pruners.NopPruner())
        enqueue(study, space, [{"x": 3}, {"x": 3}])
    assert [trial.user_attrs["enqueued"] for trial in study.trials] == [0, 1]
