"""FedPipe on edges that run out of memory: the round is lost, the next plan takes less."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fedpipe_made import made

from fedpipe_ray import beliefs, edge_plans
from fedpipe_ray.costs import Cost
from fedpipe_ray.errors import AllEdgesLost, UserError
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.loop import Round, federate
from fedpipe_ray.message import Message
from fedpipe_ray.methods.fedpipe import FedPipe
from fedpipe_ray.model import Base, quantized
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Lost
from fedpipe_ray.settings import Run
from fedpipe_ray.site import Site


def test_an_edge_that_ran_out_of_memory_gets_less(run_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, method, fleet, server = made(run_file, "", "fleet.edges.b.training_memory_bytes=1GiB")
    state = method.start(server, rng_for(0, 0, "start"))
    lost = Lost("b", "out of memory: host memory", cost=Cost(training_memory_bytes=3 * 2**30))
    reports = [report if report.edge != "b" else lost for report in fleet.run(
        method.plan(state, fleet.edges, server, 0, rng_for(0, 0, "plan")), 0)]  # fmt: skip
    after = method.aggregate(state, reports, server, 0, rng_for(0, 0, "aggregate"))
    _, before = method.configure(state, fleet.edges, server)
    _, then = method.configure(after, fleet.edges, server)
    assert after.numbers["b/memory"] >= 3 * 2**30 / before["b"].memory_bytes
    assert (then["b"].bits, then["b"].batch) < (before["b"].bits, before["b"].batch)
    assert then["b"].memory_bytes <= 2**30  # something is always left to try
    assert "edge b ran out of memory: it took 3072 MiB" in caplog.text


def test_an_edge_without_a_declared_capacity_shows_where_it_ends(run_file: Path) -> None:
    """A GPU says by an error alone how much it has."""
    _, method, fleet, server = made(run_file)
    state = method.start(server, rng_for(0, 0, "start"))
    _, before = method.configure(state, fleet.edges, server)
    numbers = method.corrections(state, fleet.edges, [Lost("b", "out of memory: CUDA")], server)
    assert numbers["b/capacity"] == before["b"].memory_bytes
    _, then = method.configure(Message(state.tensors, numbers), fleet.edges, server)
    assert then["b"].memory_bytes <= numbers["b/capacity"]
    assert then["b"].batch < before["b"].batch
    assert (then["a"].batch, then["a"].ranks) == (before["a"].batch, before["a"].ranks)


def never(plan: object) -> float:
    raise AssertionError("nobody asks")


def test_a_round_that_takes_more_than_planned_is_planned_with_what_it_took(run_file: Path) -> None:
    """Before it is above the capacity; what is above by 5 percent counts, and so does the factor from before."""
    _, method, fleet, server = made(run_file, "", "fleet.edges.b.training_memory_bytes=1GiB")
    state = method.start(server, rng_for(0, 0, "start"))
    plan = method.configure(state, fleet.edges, server)[1]["b"]
    took, numbers = int(0.99 * 2**30), {"b/memory": 2.0}
    beliefs.told("b", plan, took, {}, numbers, never)
    assert numbers == {"b/memory": pytest.approx(2 * 1.05 * took / plan.memory_bytes), "b/memory_bits": 16.0}
    then = method.configure(Message(state.tensors, {"b/memory": numbers["b/memory"] / 2}), fleet.edges, server)[1]["b"]
    assert (then.bits, then.batch) < (plan.bits, plan.batch)
    for less in ({}, dict(numbers)):
        before = dict(less)
        beliefs.told("b", plan, int(plan.memory_bytes / 1.06), {}, less, never)
        assert less == before


def test_only_what_is_measured_in_the_same_bits_replaces_a_factor() -> None:
    numbers = {"b/memory": 2.0, "b/memory_bits": 16.0}
    beliefs.told("b", None, 0, {"calibration.4.bytes_token": 1.0}, numbers, never)
    assert numbers["b/memory"] == 2
    beliefs.told("b", None, 0, {"calibration.16.bytes_token": 1.0}, numbers, never)
    assert "b/memory" not in numbers


def test_a_round_that_came_near_the_capacity_counts_beside_what_the_edge_measured_in_it(run_file: Path) -> None:
    """The line it measured foretells less than the round took, and the next round may take 5 percent more."""
    _, method, fleet, server = made(run_file, "", "fleet.edges.b.training_memory_bytes=1GiB")
    plan = method.configure(method.start(server, rng_for(0, 0, "start")), fleet.edges, server)[1]["b"]
    update, near = {"calibration.16.bytes_token": 1.0}, int(0.97 * 2**30)
    for took, measured, foretold, factor in (
        (near, update, 0.8 * 2**30, 1.05 * near / (0.8 * 2**30)),
        (near, {"calibration.4.bytes_token": 1.0}, 0.8 * 2**30, None),  # other bits, which will be planned by these
        (int(0.95 * 2**30), update, 0.8 * 2**30, None),  # far enough
        (near, update, 1.1 * 2**30, None),  # foretold already
    ):
        numbers: dict[str, float] = {}
        beliefs.told("b", plan, took, measured, numbers, lambda _, found=foretold: found)
        assert numbers.get("b/memory") == (factor and pytest.approx(factor))


def test_what_is_foretold_of_a_plan_is_what_it_was_planned_with(run_file: Path) -> None:
    _, method, fleet, server = made(run_file, "", "fleet.edges.b.training_memory_bytes=1GiB")
    state = method.start(server, rng_for(0, 0, "start"))
    for numbers in ({}, {"b/memory": 1.5}):
        plan = method.configure(Message(state.tensors, {**state.numbers, **numbers}), fleet.edges, server)[1]["b"]
        found = edge_plans.foretold(method, {**state.numbers, **numbers}, server, plan)
        assert found == pytest.approx(plan.memory_bytes, rel=1e-3)  # a plan counts whole bytes


@pytest.mark.parametrize("took", [0, 1, 2**40])
def test_corrections_always_leave_a_plan(run_file: Path, took: int) -> None:
    """Whatever an edge says it took when it failed; asked with one other."""
    _, method, fleet, server = made(run_file)
    state = method.start(server, rng_for(0, 0, "start"))
    asked = {name: fleet.edges[name] for name in "bc"}
    lost = Lost("b", "out of memory: x", cost=Cost(training_memory_bytes=took))
    for _ in range(9):
        found = method.corrections(state, asked, [lost], server)
        if not found:
            break
        state = Message(state.tensors, {**state.numbers, **found})
    assert not found
    plan = method.configure(state, asked, server)[1]["b"]
    assert (plan.bits, plan.batch, set(plan.ranks.values())) == (8, 1, {1})  # so small a model's 4 bits take more


class Cramped(FedPipe):
    """Never has enough memory."""

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        raise MemoryError("a test's")


def cramped(run_file: Path) -> tuple[Run, Cramped, SerialFleet, Site]:
    run, like, _, server = made(run_file, "", *[f"fleet.edges.{e}.training_memory_bytes=1GiB" for e in "abc"])
    method = Cramped(rank=like.rank, alpha=like.alpha)
    fleet = SerialFleet(run, method)
    fleet.open()
    return run, method, fleet, server


def test_a_survey_asks_again_with_less_and_then_says_who_has_no_room(
    run_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, method, fleet, server = cramped(run_file)
    with pytest.raises(UserError, match="edge a: out of memory: a test's"):
        method.survey(fleet, server)
    assert "planned were 129; it now gets 16 bits, batch 2, 112 ranks in all, not 16 bits, batch 4, 112" in caplog.text
    assert "its plan is the smallest there is" in caplog.text


def test_a_fleet_that_always_runs_out_of_memory_gets_less_until_nothing_is_left(
    run_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The rounds go on without a change of the adapter, until every edge has its smallest plan."""
    run, method, fleet, server = cramped(run_file)
    state = method.start(server, rng_for(0, 0, "start"))
    done: list[Round] = []
    with pytest.raises(AllEdgesLost):
        done.extend(federate(method, fleet, server, rounds=99, seed=run.seed))
    assert 1 <= len(done) < 9
    assert all(torch.equal(done[-1].state.tensors[name], tensor) for name, tensor in state.tensors.items())
    assert "its plan is the smallest there is" in caplog.text


@pytest.fixture
def only_16_on_b(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edge b computes on what bitsandbytes does not have; this machine has no such device."""
    held = Site.hold

    def hold(site: Site, bits: int) -> Base:
        if site.name == "b" and bits != 16:
            quantized(site.run.model, site.task, [], bits, torch.device("mps"), None)
        return held(site, bits)

    monkeypatch.setattr(Site, "hold", hold)


@pytest.mark.usefixtures("only_16_on_b")
def test_an_edge_that_cannot_pack_its_base_is_told_and_planned_with_16_bits(
    run_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, method, fleet, server = made(run_file)
    state = method.start(server, rng_for(0, 0, "start"))
    orders = method.plan(state, fleet.edges, server, 0, rng_for(0, 0, "plan"))
    orders = {edge: Message(one.tensors, {**one.numbers, "bits": 4.0}) for edge, one in orders.items()}
    reports = list(fleet.run(orders, 0))
    says = "bits: 4 need a CPU or CUDA device, this edge computes on mps; give it bits 16"
    assert [one.reason for one in reports if isinstance(one, Lost)] == [f"UnsupportedBits: {says}"]
    after = method.aggregate(state, reports, server, 0, rng_for(0, 0, "aggregate"))
    assert f"edge b: {says}; it is planned with 16 from now on" in caplog.text
    bits = {one.edge: {choice.bits for choice in one.choices} for one in method.demands(after, fleet.edges, server)}
    assert bits == {"a": {4, 8, 16}, "b": {16}, "c": {4, 8, 16}}


@pytest.mark.usefixtures("only_16_on_b")
def test_an_edge_that_cannot_pack_its_base_and_may_not_hold_it_in_16_bits(run_file: Path) -> None:
    _, method, fleet, server = made(run_file, ", bits: [4]")
    says = re.escape("edge b: method.bits: [4], and its base cannot be packed; add 16")
    with pytest.raises(UserError, match=says):
        method.survey(fleet, server)
