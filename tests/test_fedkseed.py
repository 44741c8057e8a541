"""`fedkseed`: its equations by hand, E6, bytes, rows that go on, edges that come late, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import assert_same, here, load, opened_run
from test_export import logits
from toys import CPU
from transformers import AutoModelForCausalLM

from fedpipe_ray.errors import DivergedError
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.message import Message
from fedpipe_ray.methods.fedkseed import NOISE_FLOPS, FedKSeed, SeedWeights, probabilities, rate, read
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.seed_sums import UNIT, forget
from fedpipe_ray.site import Site, attempt
from fedpipe_ray.zeroth_order import Direction

METHOD = "method={name: fedkseed, seeds: 32, tau: 6, lr: 0.0002}"
LINEAR = 18 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64)  # weights in matrix products, the tied head once
SIZE = LINEAR + 5 * 32  # and the norms


def opened(run_file: Path, *overrides: str) -> tuple[SerialFleet, Any, Site, Message]:
    """As `opened_run` says."""
    return opened_run(run_file, METHOD, *overrides)


def orders(method: Any, state: Message, fleet: SerialFleet, server: Site, round: int = 0) -> dict[str, Message]:
    return dict(method.plan(state, fleet.edges, server, round, rng_for(0, round, "plan")))


def next_state(
    method: Any, state: Message, fleet: SerialFleet, server: Site, round: int = 0, edges: str = "abc"
) -> Message:
    """After a round in which these edges were asked."""
    asked = {edge: order for edge, order in orders(method, state, fleet, server, round).items() if edge in edges}
    reports = list(fleet.run(asked, round))
    assert all(isinstance(report, Report) for report in reports)
    return method.aggregate(state, reports, server, round, rng_for(0, round, "aggregate"))


def pairs(indices: list[int], slopes: list[float], rows: float = 10) -> Message:
    tensors = {"indices": torch.tensor(indices, dtype=torch.int32), "slopes": torch.tensor(slopes)}
    return Message(tensors, {"rows": rows})


def report(edge: str, message: Message) -> Report:
    from fedpipe_ray.costs import Cost

    return Report(edge, 0, 6.0, 0.0, Cost(), fetch=lambda: message)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# -- an edge


def test_an_edge_with_no_finite_loss_at_all_is_lost(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, method, server, state = opened(run_file)
    site = fleet.sites["a"]
    with torch.no_grad():
        site.base.model.model.norm.weight.fill_(math.nan)
    outcome, update = attempt(site, orders(method, state, fleet, server)["a"], 0)
    assert update is None
    assert isinstance(outcome, Lost)
    assert outcome.reason == "diverged: no finite loss in 6 steps; lower method.lr: 0.0002 or method.eps"
    assert issubclass(DivergedError, RuntimeError)


# -- E3 to E8: the server


def test_accumulators_by_hand(run_file: Path) -> None:
    """|D| 30 and 10: lambda 3/4 and 1/4. a_1 = 3/4 (2 - 0.5) + 1/4 4 = 2.125, a_5 = 1/4 -1 = -0.25; then doubled."""
    fleet, method, server, state = opened(run_file)

    def found() -> list[Report]:
        return [report("a", pairs([1, 1], [2.0, -0.5], 30)), report("b", pairs([1, 5], [4.0, -1.0], 10))]

    after = method.aggregate(state, [Lost("c", "gone"), *found()], server, 0, rng_for(0, 0, "aggregate"))
    assert {i: float(a) for i, a in enumerate(after.tensors["accumulators"]) if a} == {1: 2.125, 5: -0.25}
    twice = method.aggregate(after, found(), server, 1, rng_for(0, 1, "aggregate"))
    assert {i: float(a) for i, a in enumerate(twice.tensors["accumulators"]) if a} == {1: 4.25, 5: -0.5}
    seed, coefficients = read(orders(method, twice, fleet, server)["a"].tensors)
    assert seed == int(state.tensors["seed"])
    assert {i: int(c) for i, c in enumerate(coefficients) if c} == {
        1: round(0.0002 * 4.25 / UNIT), 5: round(0.0002 * -0.5 / UNIT)
    }  # fmt: skip


def test_histories_and_probabilities_by_hand(run_file: Path) -> None:
    """Raw slopes of all edges, clipped at 1000, beside the one 0: j=1 (0 + 2 + 0.5 + 4) / 4, j=5 (0 + 1000) / 2."""
    fleet, method, server, state = opened(run_file, "method.pro=true")
    p = orders(method, state, fleet, server)["a"].tensors["probabilities"]
    torch.testing.assert_close(p, torch.full((32,), 1 / 32))
    found = [report("a", pairs([1, 1], [2.0, -0.5], 30)), report("b", pairs([1, 5], [4.0, -5000.0], 10))]
    after = method.aggregate(state, found, server, 0, rng_for(0, 0, "aggregate"))
    importance = after.tensors["history"] / after.tensors["drawn"]
    assert {i: float(x) for i, x in enumerate(importance) if x} == {1: 1.625, 5: 500.0}
    raw = [math.exp({1: 1.625 / 500, 5: 1.0}.get(j, 0.0)) for j in range(32)]
    p = orders(method, after, fleet, server)["a"].tensors["probabilities"]
    torch.testing.assert_close(p, torch.tensor(raw) / sum(raw))
    assert float(p.max() / p.min()) == pytest.approx(math.e, rel=1e-6)


def test_probabilities_keep_their_bounds() -> None:
    for seed in range(5):
        history = np.random.default_rng(seed).exponential(100.0**seed, 100)
        p = probabilities(history, np.ones(100))
        assert p.sum() == pytest.approx(1)
        assert p.max() / p.min() <= math.e + 1e-9
        assert (np.argsort(p) == np.argsort(history)).all()
    assert np.allclose(probabilities(np.full(4, 6.0), np.full(4, 3.0)), 0.25)


def test_pro_draws_by_probability(run_file: Path) -> None:
    """200 steps, 200 candidates, half of them e times as likely with Pro: their share within 4 standard errors."""
    for pro in (True, False):
        fleet, method, server, state = opened(
            run_file, f"method={{name: fedkseed, seeds: 200, tau: 200, lr: 1.e-9, pro: {str(pro).lower()}}}"
        )
        if pro:
            state.tensors["history"][:100] = 7.0
        update = attempt(fleet.sites["a"], orders(method, state, fleet, server)["a"], 0)[1]
        assert update is not None
        share = float((update.tensors["indices"] < 100).double().mean())
        expected = math.e / (1 + math.e) if pro else 0.5
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 200)


# -- E5, E6: the model


def test_e6_the_rebuilt_model_is_the_average_of_the_edges_models(run_file: Path) -> None:
    """w0 - eta sum_j a_j z_j = sum_i lambda_i w_i in fp32, over two rounds; each w_i redone here step by step."""
    fleet, method, server, state = opened(run_file, "method.lr=0.001")
    base = fleet.sites["a"].base
    model = base.writable()
    for round in range(2):
        start = SeedWeights(method.sent(state)).on(base)
        mean = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in start.named_parameters()}
        found = list(fleet.run(orders(method, state, fleet, server, round), round))
        rows = {name: len(site.data.train) for name, site in fleet.sites.items()}
        assert len(set(rows.values())) == 3
        for one in found:
            assert isinstance(one, Report)
            model.load_state_dict(start.state_dict())
            direction = Direction(model, int(state.tensors["seed"]), CPU)
            update = one.message().tensors
            with torch.no_grad():
                for direction.candidate, slope in zip(
                    update["indices"].tolist(), update["slopes"].tolist(), strict=True
                ):
                    direction.move(0.001 * slope)
            for name, p in model.named_parameters():
                mean[name] += rows[one.edge] / sum(rows.values()) * p.detach().double()
        state = method.aggregate(state, found, server, round, rng_for(0, round, "aggregate"))
        after = dict(SeedWeights(method.sent(state)).on(base).named_parameters())
        moved = max(float((after[name] - p).detach().abs().max()) for name, p in start.named_parameters())
        assert moved > 1e-3
        for name, expected in mean.items():
            # float32, weights below 2: 6 steps and both ends; 32 coefficients, 2^-31 each at both ends, times |z|
            bound = 8 * 2**-24 + 2 * 32 * 4.33 * 2**-31
            torch.testing.assert_close(after[name].detach().double(), expected, rtol=0, atol=bound)


def test_late_and_replaced_edges_have_the_same_bits(run_file: Path) -> None:
    """c is asked in the first and last of four rounds; another process, without any cache, answers for it alike."""
    fleet, method, server, state = opened(run_file)
    for round, edges in enumerate(("abc", "ab", "b")):
        state = next_state(method, state, fleet, server, round, edges)
    order = orders(method, state, fleet, server, 3)["c"]
    late = attempt(fleet.sites["c"], order, 3)[1]
    replaced, *_ = opened(run_file)
    replaced.sites["c"]._rests = dict(fleet.sites["c"]._rests)
    forget(fleet.sites["c"].base)
    fresh = attempt(replaced.sites["c"], order, 3)[1]
    off, *_ = opened(run_file, "method.incremental=false")
    off.sites["c"]._rests = dict(fleet.sites["c"]._rests)
    other = attempt(off.sites["c"], order, 3)[1]
    assert late is not None
    assert fresh is not None
    assert other is not None
    assert_same(dict(late.tensors), dict(fresh.tensors))
    assert_same(dict(late.tensors), dict(other.tensors))


def test_edges_that_share_a_base_do_not_disturb_each_other(run_file: Path) -> None:
    """The base stays as it is, read-only or not, and each edge answers as it does alone."""
    fleet, method, server, state = opened(run_file)
    base = fleet.sites["a"].base
    with torch.no_grad():
        for p in base.model.parameters():  # a write would end the process
            p.data = torch.frombuffer(p.numpy().tobytes(), dtype=p.dtype).view(p.shape)
    before = weights_of(base.model)
    state = next_state(method, state, fleet, server)
    together = {r.edge: r.message() for r in fleet.run(orders(method, state, fleet, server, 1), 1)}
    assert fleet.sites["b"].base is base
    assert_same(weights_of(base.model), before)
    assert not any(p.requires_grad for p in base.model.parameters())
    for name in "cab":
        alone, *_ = opened(run_file)
        alone.sites[name]._rests = {1: fleet.sites[name].private_before(1)}
        update = attempt(alone.sites[name], orders(method, state, fleet, server, 1)[name], 1)[1]
        assert update is not None
        assert_same(dict(update.tensors), dict(together[name].tensors))


def test_a_resumed_run_ends_with_the_same_bits_and_exports_a_plain_model(run_file: Path, tmp_path: Path) -> None:
    """Four rounds at once, and two and two in other processes' place: the caches of the first are gone."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = (METHOD, "method.pro=true", "local.threads=1")
    assert here("run", run_file, *options, "rounds=4", "--out", whole) == 0
    assert here("run", run_file, *options, "rounds=2", "--out", parts) == 0
    assert here("resume", parts, "rounds=4") == 0
    one, two = (AutoModelForCausalLM.from_pretrained(folder / "model") for folder in (whole, parts))
    assert_same(weights_of(one), weights_of(two))
    run = load(run_file)
    plain = AutoModelForCausalLM.from_pretrained(run.model.name)
    assert all(not torch.equal(p, weights_of(one)[name]) for name, p in plain.named_parameters())
    assert float((logits(plain) - logits(one)).abs().max()) > 1e-3
    record = json.loads((whole / "rounds.jsonl").read_text().splitlines()[-1])
    assert record["method"] == {"lr": 0.0002}
    assert not (whole / "adapter").exists()


def test_rows_go_on_over_the_rounds(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six rounds of 6 rows: one permutation of the edge's 31 rows, then the next; a repeated round as before."""
    fleet, method, server, state = opened(run_file)
    site, seen = fleet.sites["a"], list[int]()
    rows, example = site.data.train, type(site.data.train).example
    monkeypatch.setattr(type(rows), "example", lambda self, index: seen.append(index) or example(self, index))
    order = orders(method, state, fleet, server)["a"]
    for round in (0, 1, 2, 3, 4, 5, 5):
        attempt(site, order, round)
    assert len(rows) == 31
    assert sorted(seen[:31]) == list(range(31)) != seen[:31]
    assert len(set(seen[31:36])) == 5
    assert seen[36:] == seen[30:36]
    elsewhere = opened(run_file)[0].sites["a"]  # a replacement takes up the private state, and goes on
    elsewhere._rests = {5: site.private_before(5)}
    attempt(elsewhere, order, 5)
    assert seen[42:] == seen[36:42]


# -- what it costs


@pytest.mark.parametrize(("method", "expected"), [("seeds: 4096", 17_988), ("seeds: 1024, pro: true", 9_796)])
def test_payload(method: str, expected: int, run_file: Path) -> None:
    """4 + 4 K + 8 tau, with Pro 4 K more, at tau 200, counted in what is sent: below 18 kB."""
    fleet, made, server, state = opened(run_file, f"method={{name: fedkseed, lr: 1.e-9, {method}}}")
    assert made.tau == 200
    order = orders(made, state, fleet, server)["a"]
    outcome, update = attempt(fleet.sites["a"], order, 0)
    assert update is not None
    assert order.payload_bytes + update.payload_bytes == expected
    assert outcome.cost.bytes_down == order.total_bytes
    assert outcome.cost.bytes_up == update.total_bytes
    assert order.header_bytes + update.header_bytes < 400  # names, shapes, lr, rows


def test_fewer_bytes_than_fedit_by_the_factor_of_the_arithmetic(run_file: Path) -> None:
    """LoRA of rank r: 8 r sum (d_in + d_out) bytes both ways; ours 4 + 4 K + 8 tau whatever the model is."""
    fleet, method, server, state = opened(run_file)
    order = orders(method, state, fleet, server)["a"]
    update = attempt(fleet.sites["a"], order, 0)[1]
    fleet, lora, server, state = opened(run_file, "method={name: lora, rank: 8}")
    adapter = orders(lora, state, fleet, server)["a"]
    trained = attempt(fleet.sites["a"], adapter, 0)[1]
    assert update is not None
    assert trained is not None
    factor = (adapter.payload_bytes + trained.payload_bytes) / (order.payload_bytes + update.payload_bytes)
    assert factor == 8 * 8 * 2 * (4 * 64 + 3 * 96) / (4 + 4 * 32 + 8 * 6)
    assert factor > 300


def test_flops_and_the_virtual_clock(run_file: Path) -> None:
    """Two forward passes, 2 FLOPs a weight and token each, no backward; noise three times a step, once a candidate
    that changed since the edge's own last round."""
    fleet, method, server, state = opened(run_file)
    asked = ["ab", "b", "ab"]
    changed = {}
    last: dict[str, Any] = {}
    for round, edges in enumerate(asked):
        order = orders(method, state, fleet, server, round)
        coefficients = order["a"].tensors["coefficients"]
        reports = list(fleet.run({edge: order[edge] for edge in edges}, round))
        for one in reports:
            assert isinstance(one, Report)
            before = last.get(one.edge, torch.zeros_like(coefficients))
            changed[one.edge, round] = int((coefficients != before).sum())
            last[one.edge] = coefficients
            cost = one.cost
            noise = NOISE_FLOPS * SIZE * (3 * 6 + min(changed[one.edge, round], int((coefficients != 0).sum())))
            assert cost.flops == 2 * LINEAR * cost.tokens + noise
            assert (cost.samples, cost.steps) == (6, 6)
            assert one.weight == 6
        state = method.aggregate(state, reports, server, round, rng_for(0, round, "aggregate"))
    assert changed["a", 0] == 0 < changed["b", 2] < changed["a", 2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_in_sixteen_bits(dtype: str, run_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Stepped in float32 every step moves; stepped as stored, one that is small against a weight is lost."""
    found = {}
    for stepped in ("float32", "stored"):
        fleet, method, server, state = opened(
            run_file, f"model.dtype={dtype}", f"method.stepped={stepped}", "method.lr=1.e-8"
        )
        method.check(server)
        assert ("most steps are too small" in caplog.text) == (stepped == "stored")
        base = fleet.sites["a"].base
        assert str(base.model.dtype) == f"torch.{dtype}"
        after = next_state(method, state, fleet, server)
        assert bool(after.tensors["accumulators"].any())
        model = base.writable(torch.float32 if stepped == "float32" else None)
        direction, before = Direction(model.requires_grad_(False), 5, CPU), weights_of(model)
        direction.move(1e-8 * 2)
        found[stepped] = np.mean([float((p != before[n]).double().mean()) for n, p in model.named_parameters()])
        exported = dict(SeedWeights(method.sent(after)).on(base).named_parameters())
        assert all(p.dtype == torch.float32 for p in exported.values())
    assert found["float32"] > 0.5
    assert found["stored"] < 0.05


def test_the_default_rate() -> None:
    """The paper's 3e-7 at 1e9 weights."""
    assert rate(10**9) == pytest.approx(3e-7)
    assert FedKSeed().lr is None
