"""Campaigns from their file to the best run file: what is asked, repeated, pruned, tried again."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from campaigns_made import QUIET, Curves, by_rate, campaign, carried_out, plan_of, record
from optuna.trial import TrialState
from rich.console import Console
from runs import ROOT, here, load

from fedpipe_ray.__main__ import loader
from fedpipe_ray.display import Display
from fedpipe_ray.errors import UserError
from fedpipe_ray.fleet import Kept, SerialFleet
from fedpipe_ray.methods import make_method
from fedpipe_ray.settings import Run
from fedpipe_ray.trial import Event, records_of
from tuning.metrics import metric
from tuning.plan import load_plan
from tuning.study import best_of, open_storage
from tuning.tune import carry_out
from tuning.watch import Watch, rounds_spent


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
    plan = load_plan(example, [], loader)
    assert len(plan.base.fleet.edges) == 5
    assert plan.settings.search


def test_all_trials_are_of_the_run_file_as_it_was(run_file: Path, tmp_path: Path) -> None:
    """The file, its profiles and a trace are gone after the first trial."""
    named = {"profiles.yaml": "edges: {a: {trace: trace.csv}, b: {}}\n", "trace.csv": "edge,from,to\na,0,1000\n"}
    for name, text in named.items():
        run_file.with_name(name).write_text(text)
    fleet = {"fleet.profiles": "profiles.yaml", "fleet.edges": None}
    plan = plan_of(run_file, set=fleet, pruner="none")
    first = plan.load([])
    for path in (run_file, *(run_file.with_name(name) for name in named)):
        path.unlink()
    trials = carried_out(plan, tmp_path / "out", Curves(by_rate))
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4
    assert load(tmp_path / "out" / "best.yaml").fleet == first.fleet
    assert first.fleet.edges["a"].trace == [(0, 1000)]


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


def test_a_trial_stops_where_its_run_would(run_file: Path) -> None:
    """Any loss reaches a target of 99; with patience 1 one that does not fall, at rate 0, is the last."""

    def rounds(*overrides: str) -> int:
        return len(list(records_of(load(run_file, "rounds=4", *overrides), SerialFleet)))

    assert rounds("evaluate.target=99") == 1
    assert rounds("evaluate.patience=1", "local.lr=1e-30") == 2
    assert rounds("evaluate.target=99", "evaluate.every=3") == 3
    assert rounds("evaluate.patience=4") == 4


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


def test_repeats_of_a_trial_that_failed_by_itself_fail_at_once(run_file: Path, tmp_path: Path) -> None:
    """Also at the next start; but a point that is queued is tried."""

    class Fails(Curves):
        def next(self, timeout_seconds: float) -> Event | None:
            return Event(self.queue.pop(0)[0], "failed", reason="its own fault")

    settings: dict[str, Any] = {"search": {"method.rank": [2]}, "pruner": "none"}
    for trials, enqueue, asked in ((3, [], [0]), (4, [], []), (4, [{"method.rank": 2}], [4])):
        executor = Fails(by_rate)
        with pytest.raises(UserError, match="the last fault: its own fault"):
            carried_out(plan_of(run_file, **settings, trials=trials, enqueue=enqueue), tmp_path, executor)
        assert executor.asked == asked


def test_divergence_is_the_worst_value_and_not_the_end(run_file: Path, tmp_path: Path) -> None:
    plan = plan_of(run_file, trials=3, pruner="none", enqueue=[{"local.lr": 0.1}])
    trials = carried_out(plan, tmp_path / "out", Curves(lambda run: [None] if run.local.lr == 0.1 else [1.0]))
    assert [trial.value for trial in trials] == [math.inf, 1, 1]


class Diverges(Curves):
    """The trials of `these` numbers diverge in their first round."""

    def __init__(self, losses: Any, these: Sequence[int]) -> None:
        super().__init__(losses)
        self.these = these

    def next(self, timeout_seconds: float) -> Event | None:
        task, _ = self.queue[0]
        if task in self.these:
            self.queue.pop(0)
            return Event(task, "diverged", reason="diverged")
        return super().next(timeout_seconds)


def test_a_trial_that_diverged_keeps_no_constraint(run_file: Path, tmp_path: Path) -> None:
    """No round of it recorded a figure. Two rounds of 30 bytes: the others miss 50 by 10."""
    plan = plan_of(run_file, constraints={"bytes": 100}, trials=3, pruner="none")
    trials = carried_out(plan, tmp_path / "a", Diverges(by_rate, [0]))
    assert [trial.constraints["bytes <= 100"] for trial in trials] == [math.inf, -40, -40]
    for limits, these, told in (
        ({"bytes": 50}, [0], r"bytes <= 50: the nearest trial misses it by 10$"),
        ({"bytes": 50}, [0, 1, 2], "no trial has a finite value: all diverged"),
    ):
        plan = plan_of(run_file, constraints=limits, trials=3, pruner="none")
        with pytest.raises(UserError, match=told):
            carried_out(plan, tmp_path / str(len(these)), Diverges(by_rate, these))


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


class Costly(Curves):
    """Sends ten bytes a round for every local step."""

    def __init__(self, losses: Any) -> None:
        super().__init__(losses)
        self.steps: dict[int, int] = {}

    def submit(self, task: int, run: Run) -> None:
        self.steps[task] = run.local.steps
        super().submit(task, run)

    def next(self, timeout_seconds: float) -> Event | None:
        event = super().next(timeout_seconds)
        assert event is not None
        if event.kind != "round":
            return event
        return Event(event.task, "round", record(event.record["train_loss"], up=10 * self.steps[event.task]))


def by_steps(run: Run) -> list[float]:
    """More steps always lose less, and cost more."""
    return [1 / run.local.steps + abs(math.log10(run.local.lr) + 2) + 1 / (n + 1) for n in range(run.rounds)]


@pytest.mark.parametrize("pruner", ["hyperband", "halving", "median"])
def test_infeasible_trials_prune_no_feasible_one(run_file: Path, tmp_path: Path, pruner: str) -> None:
    """240 bytes are allowed over six rounds, so four steps; eight and more are better by loss and over after 3 rounds.

    The point of four steps comes last. It is best of what may be, so it has to be done whole, and those before it were
    stopped as soon as they were over.
    """
    points = [{"local.steps": steps, "local.lr": 0.01} for steps in (16, 8, 16, 8, 2, 4)]
    plan = plan_of(
        run_file, search={"local.lr": [0.01, 0.02], "local.steps": [2, 4, 8, 16]}, set={"rounds": 6}, pruner=pruner,
        constraints={"bytes_up": 240}, enqueue=points, trials=6,
    )  # fmt: skip
    executor = Costly(by_steps)
    trials = carried_out(plan, tmp_path, executor)
    assert [trial.user_attrs["rounds"] for trial in trials[:2]] == [2, 4]
    assert all(max(trial.constraints.values()) > 0 for trial in trials[:4])
    assert trials[5].state == TrialState.COMPLETE
    assert best_of(trials, plan.ways)[0].params["local.steps"] == 4


def test_a_stopped_trial_tells_nothing_of_constraints_that_were_open(run_file: Path, tmp_path: Path) -> None:
    """Loss has to be 1.2 at least: at the stop it is 2, which says nothing; the whole trial ends at 1."""
    limits = {"bytes_up": 240, "loss": {"at_least": 1.1}}
    points = [{"local.steps": 16}, {"local.steps": 2}]
    plan = plan_of(run_file, search={"local.steps": [2, 16]}, set={"rounds": 6}, constraints=limits, enqueue=points,
                   trials=2)  # fmt: skip
    with pytest.raises(UserError, match=r"loss >= 1\.1: the nearest trial misses it by 0\.1$"):
        carried_out(plan, tmp_path, Costly(lambda run: [2.0, 2.0, 1.5, 1.2, 1.1, 1.0]))


def test_a_front_that_shrinks_leaves_no_old_run_file(run_file: Path, tmp_path: Path) -> None:
    """Rank 2 costs less and rank 4 loses less; then a rate comes that beats both of them in both."""
    points = [{"method.rank": 2, "local.lr": 0.01}, {"method.rank": 4, "local.lr": 0.01}]
    settings: dict[str, Any] = {
        "objectives": {"loss": "minimize", "bytes": {"metric": "method.residual"}},
        "search": {"method.rank": [2, 4], "local.lr": [0.01, 0.02]},
    }
    found: dict[tuple[int, float], tuple[float, float]] = {(2, 0.01): (2, 1), (4, 0.01): (1, 2), (2, 0.02): (0, 0)}

    class Told(Curves):
        def submit(self, task: int, run: Run) -> None:
            self.told = found[run.method["rank"], run.local.lr]
            super().submit(task, run)

        def next(self, timeout_seconds: float) -> Event | None:
            event = super().next(timeout_seconds)
            assert event is not None
            told = {**record(self.told[0]), "method": {"residual": self.told[1]}}
            return Event(event.task, event.kind, told if event.kind == "round" else {})

    for more, names in (([], ["best-2.yaml", "best.yaml"]), ([{"method.rank": 2, "local.lr": 0.02}], ["best.yaml"])):
        plan = plan_of(run_file, **settings, enqueue=[*points, *more], trials=2 + len(more))
        carried_out(plan, tmp_path, Told(lambda run: [1.0]))
        assert sorted(path.name for path in tmp_path.glob("best*")) == names


def test_trials_of_unequal_rounds_are_counted_by_their_own(run_file: Path, tmp_path: Path) -> None:
    plan = plan_of(run_file, search={"rounds": [1, 3]}, enqueue=[{"rounds": 3}, {"rounds": 1}], trials=2, pruner="none")
    trials = carried_out(plan, tmp_path, Curves(by_rate))
    assert plan.most_rounds == 3
    assert rounds_spent(trials, plan) == (4, 4)


def test_the_live_table_shows_brackets_as_they_are(run_file: Path, tmp_path: Path) -> None:
    prompt = "[INST] {question} [/INST]"
    plan = plan_of(run_file, search={"data.prompt": [prompt], "local.lr": [0.01]}, trials=1)
    display = Display("live")
    display.console = Console(width=200, file=io.StringIO(), force_terminal=True, highlight=False, color_system=None)
    carry_out(plan, tmp_path, lambda: Curves(by_rate), display)
    shown = display.console.file.getvalue()
    assert f" data.prompt={prompt} local.lr=0.01" in shown  # running, and then as the best


def test_the_live_table_counts_misses_of_every_constraint(run_file: Path, tmp_path: Path) -> None:
    """Of three trials one misses the loss; the best feasible one is shown beside it."""
    points = [{"local.lr": rate, "method.rank": 2} for rate in (0.01, 0.1, 0.05)]
    plan = plan_of(run_file, constraints={"loss": 1.2, "bytes": 1000}, enqueue=points, trials=3, pruner="none")
    study = carry_out(plan, tmp_path, lambda: Curves(by_rate), QUIET)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(Watch(plan, study, QUIET)._table())
    shown = console.export_text()
    assert "best feasible (1)" in shown
    assert "constraint loss <= 1.2: missed by 1 of 3 trials" in shown
    assert "constraint bytes <= 1000: missed by 0 of 3 trials" in shown
