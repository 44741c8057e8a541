"""What a campaign is made of: metrics and protocols, decisions, the search space, the study."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import optuna
import pytest
from campaigns_made import record

from fedpipe_ray.errors import UserError
from tuning.campaign import verdict
from tuning.metrics import metric, value_of
from tuning.plan import Limit
from tuning.settings import Objective
from tuning.space import space_of
from tuning.study import best_of, enqueue, open_storage, open_study, sampler_of, with_driver


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


def test_costs_of_one_edge_add_up_or_peak() -> None:
    records = [record(3.0, 1, up=10), record(2.0, 3, up=30)]
    expected = {"edges.a.training_memory_bytes": 30, "edges.a.steps": 6, "edges.a.bytes_up": 40, "edges.b.steps": 0}
    assert {name: metric(name, records) for name in expected} == expected


def test_a_target_of_one_edge_is_reached_in_the_direction_of_its_metric() -> None:
    """Accuracies 0.2, 0.5, 0.9 on edge a; 0.5 is reached after the second round, 0.99 never."""
    records = [record(1.0) for _ in range(3)]
    for one, accuracy in zip(records, (0.2, 0.5, 0.9)):
        one["eval"]["edges"] = {"a": {"accuracy": accuracy}}
    cost = Objective(metric="virtual_seconds", way="minimize", until={"edges.a.accuracy": 0.5})
    assert value_of(cost, records) == 2
    assert value_of(dataclasses.replace(cost, until={"edges.a.accuracy": 0.99}), records) == math.inf


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


def test_the_worst_edge_is_that_with_least_where_more_is_better() -> None:
    """Accuracies 0.9, 0.8 and 0.1, mean 0.6; an accuracy that is no number is worse than any, and no target reached."""
    told = record(1.0)
    told["eval"] = {"global": {"accuracy": 0.6}, "edges": {"a": {"accuracy": 0.9}, "b": {"accuracy": 0.8},
                                                             "c": {"accuracy": 0.1}}}  # fmt: skip
    gap = Objective(metric="accuracy", way="minimize", over="gap")
    worst = Objective(metric="accuracy", way="maximize", over="worst")
    assert value_of(gap, [told]) == pytest.approx(0.5)
    assert value_of(worst, [told]) == 0.1
    told["eval"]["edges"]["b"] = told["eval"]["global"] = {"accuracy": None}
    assert value_of(gap, [told]) == math.inf
    assert value_of(worst, [told]) == value_of(dataclasses.replace(worst, over="all"), [told]) == -math.inf
    cost = Objective(metric="bytes", way="minimize", until={"accuracy": 0.5})
    assert value_of(cost, [told]) == math.inf
    assert Limit("accuracy", 0.5, at_least=True).excess([told]) == math.inf


@pytest.mark.parametrize(
    ("kind", "tries", "facts", "expected"),
    [
        ("round", 0, {}, "go on"), ("round", 0, {"prune": True}, "prune"),
        ("round", 0, {"settled": True, "prune": True}, "settled"), ("broken", 0, {}, "retry"),
        ("round", 0, {"over": True}, "over"), ("round", 0, {"settled": True, "over": True}, "settled"),
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


def test_space() -> None:
    space = space_of({"a": [[1, 2], None, "x"], "b": {"low": 1, "high": 9, "step": 2}, "c": {"low": 0, "high": 1.5}})
    params = {"a": space.param("a", [1, 2]), "b": 3, "c": 0.5}
    assert [json.loads(one.partition("=")[2]) for one in space.overrides(params)] == [[1, 2], 3, 0.5]
    with pytest.raises(UserError, match="4 lies outside"):
        space.param("b", 4)


def test_urls_name_the_driver_that_the_extra_brings() -> None:
    assert with_driver("mysql://me@host/db") == "mysql+pymysql://me@host/db"
    assert with_driver("postgresql+psycopg2://me@host/db") == "postgresql+psycopg2://me@host/db"


def test_owner_and_enqueue_survive_a_second_opening(tmp_path: Path) -> None:
    storage, space = open_storage(None, tmp_path), space_of({"x": {"low": 0, "high": 9}})
    for _ in range(2):
        study = open_study(storage, "s", {"a": 1}, ["minimize"], sampler_of("tpe", 0, 0, 1), optuna.pruners.NopPruner())
        enqueue(study, space, [{"x": 3}, {"x": 3}])
    assert [trial.user_attrs["enqueued"] for trial in study.trials] == ['{"x": 3}'] * 2
    enqueue(study, space, [{"x": 5}, {"x": 3}])  # the file was edited
    assert [trial.system_attrs["fixed_params"] for trial in study.trials] == [{"x": 3}, {"x": 3}, {"x": 5}]
