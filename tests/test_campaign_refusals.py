"""What each bad campaign is told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from campaigns_made import Curves, by_rate, campaign, carried_out, plan_of
from runs import here

from fedpipe_ray.display import Display
from fedpipe_ray.errors import UserError
from tuning.tune import carry_out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"local.lrr": [1.0]}}, "search.local.lrr: unknown key local.lrr; did you mean lr?"),
        ({"search": {"method.rnk": [4]}}, "did you mean rank?"),
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
        ({"search": {"local.batch": {"low": 4, "high": 6, "step": 9}}}, "step 9 is more than there is from"),
        ({"objectives": {"edgs.a.loss": "minimize"}}, "no metric 'edgs.a.loss'; did you mean edges.a.loss?"),
        ({"objectives": {"x": {"metric": "bytes", "over": "worst"}}}, "bytes is not evaluated on every edge"),
        ({"objectives": {"x": {"metric": "train_loss", "over": "gap"}}}, "train_loss is not evaluated on every edge"),
        ({"set": {"evaluate.every": 0}}, "loss is never evaluated with evaluate.every: 0"),
        ({"objectives": {"loss": "minimize", "bytes": "minimize"}, "sampler": "cmaes"}, "cmaes with 2 objectives: it"),
        ({"constraints": {"bytes": math.nan}}, "constraints.bytes: nan is no number"),
        ({"constraints": {"bytes": {"at_least": math.inf}}}, "constraints.bytes: inf is no number"),
        ({"constraints": {"virtual_seconds": "-5s"}}, "constraints.virtual_seconds: -5 is below 0"),
        ({"objectives": {"x": {"metric": "loss", "until": {"bytes": "1GB"}}}}, "x.until: bytes only grows, so"),
        ({"objectives": {"x": {"metric": "loss", "within": {"loss": 2}}}}, "x.within: loss does not add up"),
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


def test_a_failed_campaign_says_where_its_report_is(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(run_file, constraints={"virtual_seconds": "1500ms"}, pruner="none")
    with pytest.raises(UserError):
        carry_out(plan, tmp_path, lambda: Curves(by_rate), Display("plain"))
    told = capsys.readouterr()
    assert f"report: {tmp_path / 'report.html'}" in told.out + told.err
    assert "run it" not in told.out + told.err


def test_a_folder_of_something_else_is_refused(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    carried_out(plan_of(run_file, name="one"), out, Curves(by_rate))
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    with pytest.raises(UserError, match=r"holds campaign 'one', stored in journal\.log; this is 'two'.* --out"):
        carried_out(plan_of(run_file, name="two"), out, Curves(by_rate))
    assert {path: path.read_bytes() for path in before} == before
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("rounds: 2\n")
    with pytest.raises(UserError, match="holds a run; give the campaign a folder of its own with --out"):
        carried_out(plan_of(run_file), tmp_path / "run", Curves(by_rate))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_study_of_another_campaign_is_refused(run_file: Path, tmp_path: Path) -> None:
    carried_out(plan_of(run_file), tmp_path, Curves(by_rate))
    other = plan_of(run_file, search={"method.rank": [2]})
    with pytest.raises(UserError, match="study 'campaign' belongs to another campaign: search differ"):
        carried_out(other, tmp_path, Curves(by_rate))
    more = carried_out(plan_of(run_file, trials=6), tmp_path, Curves(by_rate))  # more trials are the same campaign
    assert len(more) == 6


def test_values_keep_their_names_where_a_campaign_file_is_put_in_another_order(run_file: Path, tmp_path: Path) -> None:
    """Objectives in another order are refused, for the storage has no names; constraints have."""
    loss, cost = {"loss": "minimize"}, {"bytes": "minimize"}
    carried_out(plan_of(run_file, objectives={**loss, **cost}), tmp_path / "a", Curves(by_rate))
    with pytest.raises(UserError, match="belongs to another campaign: order of objectives differ"):
        carried_out(plan_of(run_file, objectives={**cost, **loss}), tmp_path / "a", Curves(by_rate))
    trials = carried_out(plan_of(run_file, constraints={"steps": 99, "bytes": 999}), tmp_path / "b", Curves(by_rate))
    again = carried_out(plan_of(run_file, constraints={"bytes": 999, "steps": 99}), tmp_path / "b", Curves(by_rate))
    assert again == trials


def test_a_database_that_is_not_there(run_file: Path, tmp_path: Path) -> None:
    plan = plan_of(run_file, storage="postgresql://me:secret@127.0.0.1:1/none")
    with pytest.raises(UserError, match=r"storage: postgresql://me@127\.0\.0\.1:1/none cannot be reached: ") as caught:
        carried_out(plan, tmp_path, Curves(by_rate))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "message"),
    [("method.residul", "did you mean method.residual?"), ("edgs.loss", "no metric 'edgs.loss'; did you mean loss?")],
)
def test_a_name_that_only_a_round_can_tell_ends_the_campaign_after_one(
    run_file: Path, tmp_path: Path, metric: str, message: str
) -> None:
    plan, executor = plan_of(run_file, objectives={metric: "minimize"}), Curves(by_rate)
    with pytest.raises(UserError) as caught:
        carried_out(plan, tmp_path, executor)
    assert message in str(caught.value)
    assert executor.rounds == 1


def test_a_target_or_a_budget_that_no_trial_meets_is_named(run_file: Path, tmp_path: Path) -> None:
    """Losses end at 1.5; the first figure is there after 1 s."""
    until = {"cost": {"metric": "bytes", "until": {"loss": 0.5}}}
    with pytest.raises(UserError, match=r"no trial reached loss 0\.5; the nearest came to 1\.5"):
        carried_out(plan_of(run_file, objectives=until), tmp_path / "until", Curves(lambda run: [2.0, 1.5]))
    within = {"quality": {"metric": "loss", "within": {"virtual_seconds": 0.5}}}
    with pytest.raises(UserError, match=r"within virtual_seconds 0\.5; the first was there at 1; raise the budget"):
        carried_out(plan_of(run_file, objectives=within), tmp_path / "within", Curves(lambda run: [2.0, 1.5]))


def test_a_miss_of_stopped_trials_is_said_to_be_one(run_file: Path, tmp_path: Path) -> None:
    """Rounds of 1 s; 1.5 are allowed, so all six rounds are never done."""
    plan, executor = plan_of(run_file, constraints={"virtual_seconds": 1.5}, set={"rounds": 6}), Curves(by_rate)
    with pytest.raises(UserError, match=r"misses it by 0\.5 at least, when it was stopped after round 2"):
        carried_out(plan, tmp_path, executor)
    assert executor.rounds <= 2 * 4
