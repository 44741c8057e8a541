"""What every method promises, on both fleets: METHODS is the list, so a new method is tested by being named there."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from methods_made import needs_of
from runs import assert_same, fleet_of, load, tiny_run

from fedpipe_ray.fleet import Fleet, SerialFleet
from fedpipe_ray.loop import Round, Start, federate, sample
from fedpipe_ray.methods import METHODS, make_method, method_class, takes_ranks
from fedpipe_ray.methods.base import shown
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.record import Checkpoint, RunFolder
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
    """Of each method a tiny run, with unequal ranks where it takes them."""
    folder = tmp_path_factory.mktemp("contract")
    path = tiny_run(folder, model_dir, data_dir)
    uneven = ["method.ranks={b: 1}"] if takes_ranks(method_class(request.param)) else []
    return load(path, *needs_of(request.param, folder, model_dir, data_dir, deep_dir, public_file), *uneven)


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


def test_resumed_it_has_the_bits_of_a_run_that_went_on(run: Run, tmp_path: Path) -> None:
    """From the checkpoint of one round and what edges kept, a new fleet does the second one.

    Same state, outcomes and private states; a kept tensor is held again and costs no byte twice.
    """
    fewer = {"tau": 4} if run.method["name"] == "fedkseed" else {}
    local = dataclasses.replace(run.local, steps=1, batch=2)
    run = dataclasses.replace(run, method={**run.method, **fewer}, local=local)
    whole, going = opened(run, tmp_path / "private")
    first = next(going)
    private = {edge: one.private for edge, one in first.outcomes.items() if one.private is not None}
    folder = RunFolder(tmp_path)
    folder.save_checkpoint(Checkpoint(Start(first.state, 1, private, first.clock_seconds, held=first.held), "", {}))
    if private:
        shutil.copytree(tmp_path / "private", tmp_path / "moved")
    expected = next(going)
    start = folder.load_checkpoint().start
    other, again = opened(run, tmp_path / "moved", start)
    other.restore(1, start.private)
    found = next(again)
    assert_same(dict(found.state.tensors), dict(expected.state.tensors))
    assert found.state.numbers == expected.state.numbers
    assert {edge: (one.cost.bytes_down, one.cost.bytes_up) for edge, one in found.outcomes.items()} == {
        edge: (one.cost.bytes_down, one.cost.bytes_up) for edge, one in expected.outcomes.items()
    }
    for edge, site in whole.sites.items():
        kept, own = site.private_before(2), other.sites[edge].private_before(2)
        assert (kept is None) == (own is None)
        assert_same(dict(kept.tensors if kept else {}), dict(own.tensors if own else {}))


def opened(run: Run, private: Path, start: Start | None = None) -> tuple[SerialFleet, Iterator[Round]]:
    """A fleet in this process, and its two rounds."""
    method = make_method(run.method)
    fleet, server = SerialFleet(run, method, private), server_site(run, method, run.data.labels)
    fleet.open()
    return fleet, federate(method, fleet, server, rounds=2, seed=run.seed, evaluate_every=0, start=start)


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
