"""What every method promises, on both fleets: METHODS is the list, so a new method is tested by being named there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from methods_made import needs_of
from runs import fleet_of, load, tiny_run

from fedpipe_ray.fleet import Fleet
from fedpipe_ray.loop import Start, federate, sample
from fedpipe_ray.methods import METHODS, make_method
from fedpipe_ray.methods.base import shown
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Run

ASK_NOBODY = {"central"}  # the server does it alone
FLEETS = ["serial", "packed"]  # test_parity.py has actors of their own, too
# Of every kind of order, update and private state one; the others take their turn on Ray with `make test-services`.
ON_RAY = {"fedadapter", "fedbiot", "fedkseed", "fedpipe", "fedsa_lora", "flora", "full", "jcpba", "lora"}


@pytest.fixture(scope="module", params=sorted(METHODS))
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_dir: Path,
    deep_dir: Path, public_file: Path,
) -> Run:  # fmt: skip
    folder = tmp_path_factory.mktemp("contract")
    path = tiny_run(folder, model_dir, data_dir)
    return load(path, *needs_of(request.param, folder, model_dir, data_dir, deep_dir, public_file))


@pytest.fixture(scope="module", params=FLEETS)
def fleet(request: pytest.FixtureRequest, run: Run, ray_here: None) -> Iterator[Fleet]:
    one = fleet_of(request.param, run, make_method(run.method))
    try:
        one.open()
        yield one
    finally:
        one.close()


def method_asks(run: Run) -> bool:
    """Whether the run's method has edges work."""
    return run.method["name"] not in ASK_NOBODY


def test_state_improves_counts_and_survives_a_missing_edge(run: Run, fleet: Fleet) -> None:
    method = make_method(run.method)
    server = server_site(run, method, run.data.labels)
    state = method.start(server, rng_for(run.seed, 0, "start"))
    base = fleet.evaluate(shown(method, None, server), "test")
    before = {name: metrics["loss"] for name, metrics in base.items() if not isinstance(metrics, Lost)}
    orders = method.plan(state, fleet.edges, server, 0, rng_for(run.seed, 0, "plan"))
    assert list(orders) == [name for name in fleet.edges if method_asks(run)]
    reports = list(fleet.run(orders, 0))
    assert [report.edge for report in reports] == list(orders)
    assert all(
        isinstance(r, Report) and r.weight == r.cost.samples > 0 and r.cost.bytes_down == orders[r.edge].total_bytes
        for r in reports
    )
    missing: list[Report | Lost] = [Lost("a", "gone"), *reports[1:]]
    after = method.aggregate(state, missing, server, 0, rng_for(run.seed, 0, "aggregate"))
    assert after.tensors.keys() >= state.tensors.keys()  # what is kept by round comes to it
    new = any(name not in state.tensors for name in after.tensors)
    changed = new or any(not torch.equal(after.tensors[name], state.tensors[name]) for name in state.tensors)
    assert changed == bool(after.tensors)  # `local` has none
    *_, last = federate(method, fleet, server, rounds=3, seed=run.seed, start=Start(after, 1))
    quality = fleet.evaluate(shown(method, last.state, server), "test")
    assert sum(quality[name]["loss"] - before[name] for name in before) < 0


def test_same_order_same_bits(run: Run, fleet: Fleet) -> None:
    """An edge's answer is a function of (seed, round, edge, order), so that a retry changes nothing."""
    method = make_method(run.method)
    server = server_site(run, method, run.data.labels)
    state = method.start(server, rng_for(run.seed, 0, "start"))
    orders = method.plan(state, fleet.edges, server, 0, rng_for(run.seed, 0, "plan"))
    if not method_asks(run):
        pytest.skip("no edge is asked")
    first = {
        r.edge: {k: t.clone() for k, t in r.message().tensors.items()}
        for r in fleet.run(orders, 0)
        if isinstance(r, Report)
    }
    only_b = {"b": orders["b"]}
    (again,) = [r for r in fleet.run(only_b, 0) if isinstance(r, Report)]
    for name, tensor in again.message().tensors.items():
        assert torch.equal(tensor, first["b"][name])


def test_all_lost_leaves_the_state(run: Run) -> None:
    method = make_method(run.method)
    if not method_asks(run):
        pytest.skip("no edge is asked")
    server = server_site(run, method, run.data.labels)
    state = method.start(server, rng_for(run.seed, 0, "start"))
    lost: list[Report | Lost] = [Lost("a", "gone"), Lost("b", "gone")]
    after = method.aggregate(state, lost, server, 0, rng_for(run.seed, 0, "aggregate"))
    assert all(torch.equal(after.tensors[name], state.tensors[name]) for name in state.tensors)


def test_hyperparameters_are_frozen_and_described(run: Run) -> None:
    method = make_method(run.method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.rank = 3
    assert type(method).__doc__


def test_sampling_is_a_function_of_seed_and_round(run: Run) -> None:
    edges = run.fleet.edges
    draws = [tuple(sample(edges, 2, seed, round)) for seed in (0, 1) for round in range(20)]
    assert draws == [tuple(sample(edges, 2, seed, round)) for seed in (0, 1) for round in range(20)]
    assert {len(draw) for draw in draws} == {2}
    assert len(set(draws)) == 3
