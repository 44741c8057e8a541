"""Campaigns from their file to the best run file: what is asked, repeated, pruned, tried again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
from campaigns_made import Curves, by_rate, campaign, carried_out, plan_of
from optuna.trial import TrialState
from runs import ROOT, here, load

from clusters import find_profiles
from fedpipe_ray.config import load_run
from fedpipe_ray.fleet import Kept, SerialFleet
from fedpipe_ray.methods import make_method
from fedpipe_ray.settings import Run
from fedpipe_ray.trial import records_of
from tuning.metrics import metric
from tuning.plan import load_plan
from tuning.study import best_of, open_storage


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


def test_the_best_is_feasible(run_file: Path, tmp_path: Path) -> None:
    plan = plan_of(run_file, constraints={"loss": {"at_least": 1.0}}, trials=8, pruner="none", sampler="random")
    trials = carried_out(plan, tmp_path, Curves(by_rate))
    over = [trial.value for trial in trials if trial.value is not None and trial.value >= 1]
    assert len(over) < 8
    assert best_of(trials, plan.ways)[0].value == min(over)
