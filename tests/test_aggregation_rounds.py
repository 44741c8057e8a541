"""Rounds of the rules that join LoRA adapters: bytes, frozen blocks, ranks of edges, resume, export, and refusals."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from refusals import assert_refused
from runs import assert_like, assert_same, here, opened_run, records, tensors, tiny_run
from test_aggregation import CLASSES, NAME_A, update_of
from test_export import logits
from transformers import AutoModelForCausalLM

from fedpipe_ray import blocks, lora
from fedpipe_ray.folding import of_b
from fedpipe_ray.folding import pairs_of as modules_of
from fedpipe_ray.loop import Start, federate
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.methods.hetlora import tail_norm
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.record import RunFolder
from fedpipe_ray.report import Report
from fedpipe_ray.run import first_view, server_site

SIDES = 2 * (4 * (32 + 32) + 3 * (32 + 64))  # sum of m + n over the linear layers of two blocks
UNEQUAL = "method={name: %s, rank: 3, alpha: 6, ranks: {a: 3, b: 1}}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_dir: Path) -> Path:
    path = tiny_run(tmp_path_factory.mktemp("rules"), model_dir, data_dir)
    path.write_text(path.read_text().replace("steps: 4", "schedule: constant, steps: 2"))
    return path


def rounds_of(path: Path, method: str, rounds: int, *overrides: str) -> list[Any]:
    """Rounds of a run in this process."""
    fleet, made, server, _ = opened_run(path, method, *overrides)
    return list(federate(made, fleet, server, rounds=rounds, seed=0, evaluate_every=0))


# -- bytes


@pytest.mark.parametrize("name", ["zeropad", "hetlora", "flexlora", "flora"])
def test_an_edge_trains_and_sends_its_own_rank_at_the_scale_of_all(name: str, tiny: Path) -> None:
    """r_k (m + n) up, and down but for FLoRA, whose edges start by themselves."""
    fleet, method, server, state = opened_run(tiny, UNEQUAL % name, "method.gamma=1" if name == "hetlora" else "seed=0")
    orders = method.plan(state, fleet.edges, server, 0, rng_for(0, 0, "plan"))
    for report in fleet.run(orders, 0):
        assert isinstance(report, Report)
        rank = {"a": 3, "b": 1, "c": 3}[report.edge]
        update = report.message()
        assert update.payload_bytes == 4 * rank * SIDES
        assert orders[report.edge].payload_bytes == (0 if name == "flora" else 4 * rank * SIDES)
        assert {len(a) for _, a in modules_of(update.tensors).values()} == {rank}
        (attached,) = fleet.sites[report.edge].base.attached.values()
        scales = [m.scaling["default"] for m in attached.modules() if hasattr(m, "lora_A")]
        assert len(scales) == 14
        assert set(scales) == {2.0}  # 6 / 3
    assert orders["a"] is orders["c"]


@pytest.mark.parametrize(("name", "block", "own"), [("flora", 7, 0), ("fedex_lora", 4, 2)])
def test_edges_are_charged_a_block_once(name: str, block: int, own: int, tiny: Path) -> None:
    """FLoRA: R = 3 + 1 + 3 a round, nothing else; FedEx: (K - 1) r = 4 beside the adapter of rank 2 itself."""
    method = UNEQUAL % name if name == "flora" else f"method={{name: {name}, rank: 2, alpha: 4}}"
    done = rounds_of(tiny, method, 3)
    fleet, made, server, state = opened_run(tiny, method)
    for round, held in ((0, False), (1, False), (2, True)):
        order = made.plan(state, fleet.edges, server, round, rng_for(0, round, "plan"))["b"]
        kept = sum(len(t) for n, t in order.kept.items() if f"{NAME_A % 0}" in n)
        assert kept == round * block
        cost = done[round].outcomes["b"].cost.bytes_down
        new = block if held or round == 1 else 0
        assert 0 <= cost - 4 * (new + own) * SIDES < 12_000  # names and shapes
        state = done[round].state
    assert all(r.state.numbers["residual"] < 1e-6 for r in done)


def test_an_edge_that_was_lost_is_sent_what_it_lacks(tiny: Path) -> None:
    """Asked every other round, it gets the blocks of both; one that was there gets one."""
    fleet, made, server, before = opened_run(tiny, UNEQUAL % "flora")
    seen: dict[str, int] = {}
    for one in federate(made, fleet, server, rounds=4, seed=1, fraction=0.67, evaluate_every=0):
        total = sum(len(t) for name, t in before.kept.items() if NAME_A % 0 in name)
        for edge, outcome in one.outcomes.items():
            headers = outcome.cost.bytes_down - 4 * (total - seen.get(edge, 0)) * SIDES
            assert 0 <= headers < 20_000
            seen[edge] = total
        before = one.state
    assert len(set(seen.values())) > 1


# -- blocks


def test_blocks_become_one_without_loss_where_their_rank_is_too_high(tiny: Path) -> None:
    """Rank 20 thrice on 32 x 32: 20, then 32, then 32; always the sum of all."""
    state, total = Message({"head": torch.ones(1)}), 0.0
    for round, rank in ((0, 20), (3, 20), (4, 20)):
        update = update_of(20, round)
        pairs = {name: pair for name, pair in modules_of(update).items() if name == NAME_A % 0}
        (pair,) = pairs.values()
        total = total + pair[0] @ pair[1]
        state = Message(blocks.added(state, round, pairs))
        whole = blocks.joined(state)
        assert len(whole[NAME_A % 0]) == min(32, rank if round == 0 else 32)
        found = whole[of_b(NAME_A % 0)].double() @ whole[NAME_A % 0].double()
        torch.testing.assert_close(found, total, rtol=0, atol=1e-4)
    assert sorted(state.kept) == [f"0004.{NAME_A % 0}", f"0004.{of_b(NAME_A % 0)}"]
    assert list(state.rest) == ["head"]


def test_fedex_without_what_it_adds_is_fedit_bit_for_bit(tiny: Path) -> None:
    """Its blocks are taken away after each round; with them the second round differs."""
    states = {}
    for name in ("lora", "fedex_lora", "kept"):
        own = "lora" if name == "lora" else "fedex_lora"
        fleet, method, server, state = opened_run(tiny, f"method={{name: {own}, rank: 2, alpha: 4}}")
        for round in range(2):
            orders = method.plan(state, fleet.edges, server, round, rng_for(0, round, "plan"))
            state = method.aggregate(state, fleet.run(orders, round), server, round, rng_for(0, round, "aggregate"))
            assert bool(state.kept) == (own == "fedex_lora")
            if name == "fedex_lora":
                state = Message(state.rest)
        states[name] = state
    assert_same(dict(states["lora"].tensors), dict(states["fedex_lora"].tensors))
    assert any(not torch.equal(t, states["kept"].tensors[n]) for n, t in states["lora"].tensors.items())


# -- HetLoRA


def test_the_tail_has_a_gradient_where_b_is_zero_and_by_hand() -> None:
    """||B[:, 1:]|| ||A[1:]|| = 3 x 4; d/dB = ||A|| B / ||B||."""
    tensors = {"m.lora_A.w": torch.tensor([[1.0], [4.0]]), "m.lora_B.w": torch.tensor([[5.0, 3.0]])}
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    norm = tail_norm(tensors, 1)
    assert norm.item() == 12
    norm.backward()
    assert tensors["m.lora_B.w"].grad.tolist() == [[0, 4]]
    assert tensors["m.lora_A.w"].grad.tolist() == [[0], [3]]
    nothing = torch.zeros(1, 2, requires_grad=True)
    tail_norm({"m.lora_A.w": torch.ones(2, 1), "m.lora_B.w": nothing}, 1).backward()
    assert nothing.grad is not None
    assert nothing.grad.tolist() == [[0, 0]]


def test_ranks_shrink_while_the_tail_decays_and_not_below_the_least(tiny: Path) -> None:
    """A heavy penalty takes half of the rank a round, from the second on: before it B was zero; then 2 is the least."""
    heavy = "method={name: hetlora, rank: 8, alpha: 16, ranks: {b: 4}, penalty: 10, gamma: 0.5, least: 2}"
    done = rounds_of(tiny, heavy, 4)
    ranks = [[int(r.state.numbers[f"{edge}/rank"]) for edge in "abc"] for r in done]
    assert ranks[0] == [8, 4, 8]
    assert all(new in (old, max(2, old // 2)) for one, two in itertools.pairwise(ranks) for old, new in zip(one, two))
    assert ranks[-1] != ranks[0]
    for edge, rank in zip("abc", ranks[-1], strict=True):  # what was cut is not sent
        assert 0 <= done[-1].outcomes[edge].cost.bytes_up - 4 * rank * SIDES < 5_000
    free = rounds_of(tiny, heavy.replace("gamma: 0.5", "gamma: 1"), 2)
    assert [free[-1].state.numbers[f"{edge}/rank"] for edge in "abc"] == [8, 4, 8]


def test_a_tail_is_as_long_in_an_order_as_after_training(tiny: Path) -> None:
    """At a rate of 1e-12, without penalty, no tail decays; in the dtype of a bfloat16 order its norm was rounded."""
    order = {name: t.bfloat16() for name, t in update_of(0, 8).items()}
    assert torch.equal(tail_norm(order, 7), tail_norm({name: t.float() for name, t in order.items()}, 7))
    still = ("local={steps: 1, batch: 2, lr: 1e-12, schedule: constant}", "wire.dtype=bfloat16")
    fleet, method, server, state = opened_run(tiny, "method={name: hetlora, rank: 8, penalty: 0, gamma: 0.9}", *still)
    draw = torch.Generator().manual_seed(0)
    state = Message({name: torch.randn(t.shape, generator=draw) for name, t in state.tensors.items()})
    *_, last = federate(method, fleet, server, rounds=3, seed=0, evaluate_every=0, start=Start(state))
    assert [last.state.numbers[f"{edge}/rank"] for edge in "abc"] == [8, 8, 8]


# -- FedIT's residual


def test_telling_the_residual_changes_nothing_else(tiny: Path) -> None:
    plain = rounds_of(tiny, "method={name: lora, rank: 2}", 2)
    told = rounds_of(tiny, "method={name: lora, rank: 2, residual: true}", 2)
    assert_same(dict(plain[-1].state.tensors), dict(told[-1].state.tensors))
    assert plain[-1].state.numbers == {}
    assert told[-1].state.numbers["cut"] == 0
    assert 0.01 < told[-1].state.numbers["residual"] < 1


# -- runs


@pytest.mark.parametrize("name", ["flora", "fedex_lora", "hetlora"])
def test_a_resumed_run_is_the_longer_run_and_its_export_is_plain_peft(name: str, tiny: Path, tmp_path: Path) -> None:
    folder, longer = tmp_path / "run", tmp_path / "longer"
    rule = f"method={{name: {name}, rank: 3, alpha: 6, targets: [q_proj, down_proj]%s}}"
    rule %= "" if name == "fedex_lora" else ", ranks: {a: 2, b: 1}"
    assert here("run", tiny, rule, "rounds=1", "--out", folder) == 0
    assert here("resume", folder, "rounds=3") == 0
    assert here("run", tiny, rule, "rounds=3", "--out", longer) == 0
    assert_like(folder, longer)
    assert all({"residual", "cut"} <= record["method"].keys() for record in records(folder))

    run = RunFolder.open(folder).run()
    state, _ = RunFolder.open(folder).final_state(run)
    method: Any = make_method(run.method)
    site = server_site(run, method, [])
    base = AutoModelForCausalLM.from_pretrained(run.model.name)
    untuned = logits(base)
    exported = logits(peft.PeftModel.from_pretrained(base, str(folder / "adapter")).eval())
    assert float((exported - untuned).abs().max()) > 1e-3
    if name == "fedex_lora":  # what the edges train on, and what is exported, are the same model
        acting = blocks.attach(site.base, method.spec(site), state)
        lora.load(acting, state.rest)
        torch.testing.assert_close(logits(acting.eval()), exported, rtol=0, atol=1e-5)
    assert here("export", folder, "--out", tmp_path / "merged", "--merge") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), exported, rtol=0, atol=1e-5)


def test_a_flora_without_a_round_exports_what_does_nothing(tiny: Path) -> None:
    _, _, server, state = opened_run(tiny, UNEQUAL % "flora")
    assert state.tensors == {}
    assert torch.equal(logits(first_view(server, state).on(server.base)), logits(server.load_base([], 16).model))


def test_a_classifier_of_unequal_ranks_with_frozen_blocks(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert here("run", tiny, UNEQUAL % "flora", *CLASSES, "--out", out) == 0
    head = next(name for name in tensors(out) if ".lora_" not in name)
    run = RunFolder.open(out).run()
    state, point = RunFolder.open(out).final_state(run)
    assert torch.equal(state.tensors[head], tensors(out)[head])
    site = server_site(run, make_method(run.method), point.classes)
    untrained = lora.read(lora.attach(site.base, lora.LoraSpec(1, 1, ("q_proj",), task="classification")))
    assert not torch.equal(state.tensors[head], untrained[head])


# -- refusals


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("{name: lora, ranks: {a: 2}}", "method.ranks: lora needs one rank for all edges, method.rank; leave"),
        ("{name: fedex_lora, ranks: {a: 2}}", "method.ranks: fedex_lora needs one rank ... : ffa_lora, flexlora"),
        ("{name: lora_fair, ranks: {}}", "method.ranks: lora_fair needs one rank for all ... zeropad"),
        ("{name: full, ranks: {a: 2}}", "unknown key method.ranks"),
        ("{name: zeropad, ranks: {d: 2}}", "method.ranks: 2 for edge d, which is not in the fleet; there are a, b, c"),
        ("{name: flora, ranks: {d: 2}}", "method.ranks: 2 for edge d, which is not in the fleet; there are a, b, c"),
        ("{name: flexlora, rank: 4, ranks: {b: 5}}", "method.ranks.b: 5 must lie between 1 and method.rank: 4; lower"),
        ("{name: hetlora, rank: 4, ranks: {b: 0}}", "method.ranks.b: 0 must lie between 1 and method.rank: 4"),
        ("{name: flora, rank: 4, limit: 3}", "method.limit: 3 must be at least method.rank: 4, or null"),
        ("{name: lora_fair, lam: -1}", "method.lam: -1.0 must not be negative"),
        ("{name: hetlora, gamma: 0}", "method.gamma: 0.0 must lie in (0, 1]"),
        ("{name: hetlora, penalty: -1}", "method.penalty: -1.0 must not be negative"),
        ("{name: hetlora, ranks: {a: 2}, least: 3}", "method.least: 3 must lie between 1 and ... rank of an edge, 2"),
        ("{name: lora, residual: true, targets: [q_proj, embed_tokens]}",
         "method.targets: model.embed_tokens is no linear layer, ... leave it out, or set method.residual: false"),
        ("{name: zeropad, targets: [embed_tokens]}", "method.targets: model.embed_tokens is no linear layer ... lora"),
    ],
)  # fmt: skip
def test_refusals(method: str, says: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(capsys, "run", tiny, f"method={method}", says=says, out=tmp_path / "out")
