"""Rules that train a part of the factors: exactness, nested ranks, bytes by hand, what stays frozen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from factor_rounds import HEAD, MODULES, NOBODY, RULES, SERVER, SUM_M, SUM_N, A, B, M, N, R, Rounds, classes, report
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import assert_same, opened_run
from test_parity import assert_alike, rounds_of
from torch import Tensor
from toy_rounds import Adding, toy_run

from fedpipe_ray import lora
from fedpipe_ray.arriving import checked
from fedpipe_ray.buffered import federate_buffered
from fedpipe_ray.factors import exact_mean, factor
from fedpipe_ray.message import Message
from fedpipe_ray.methods.base import weighted_mean
from fedpipe_ray.methods.fed_sb import FedSb
from fedpipe_ray.methods.ffa_lora import FfaLora
from fedpipe_ray.methods.rolora import RoLora
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.run import server_site

weights = st.lists(st.integers(1, 500), min_size=1, max_size=4)


def draws(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_exact(applied: Tensor, exact: Tensor) -> None:
    """||applied - dW*|| / ||dW*|| <= 1e-6."""
    assert float((applied - exact).norm()) <= 1e-6 * float(exact.norm())


def after(method: Any, state: Mapping[str, Tensor], reports: list[Report], round: int, **numbers: float) -> Any:
    return method.aggregate(Message(state, numbers), reports, SERVER, round, NOBODY).tensors


# -- exactness


@settings(max_examples=40)
@given(samples=weights, rank=st.integers(1, 4), scale=st.floats(0.1, 8), seed=st.integers(0, 999))
def test_what_is_applied_is_the_mean_of_the_products(samples: list[int], rank: int, scale: float, seed: int) -> None:
    """dW* = sum p_k s B_k A_k with one factor common, from factors that have nothing in common with the state's."""
    draw, s = draws(seed), scale / rank
    p = [n / sum(samples) for n in samples]
    a, b, r = draw(rank, N), draw(M, rank), draw(rank, rank)
    own_b, own_a, own_r = ([draw(*x.shape) for _ in samples] for x in (b, a, r))

    def told(name: str, tensors: list[Tensor]) -> list[Report]:
        return [report(str(k), n, {name: t}) for k, (n, t) in enumerate(zip(samples, tensors, strict=True))]

    ffa = after(FfaLora(rank=rank), {B: b}, told(B, own_b), 0)
    dw = sum(w * s * x @ a for w, x in zip(p, own_b, strict=True))
    assert_exact(s * ffa[B] @ a, dw)
    for round, (name, own) in enumerate(((B, own_b), (A, own_a))):
        found = after(RoLora(rank=rank), {A: a, B: b}, told(name, own), round)
        still = A if name == B else B
        assert torch.equal(found[still], (a, b)[still == B])
        dw = sum(w * s * (x @ a if name == B else b @ x) for w, x in zip(p, own, strict=True))
        assert_exact(s * found[B] @ found[A], dw)
    found = after(FedSb(rank=rank), {A: a, B: b, R: r}, told(R, own_r), 1, fixed=1.0)
    dw = sum(w * s * b @ x @ a for w, x in zip(p, own_r, strict=True))
    assert_exact(s * found[B] @ found[R].double() @ found[A], dw)


@settings(max_examples=40)
@given(
    samples=weights, rank=st.integers(2, 5), scale=st.floats(0.1, 8), seed=st.integers(0, 999), data=st.data(),
    first=st.booleans(),
)  # fmt: skip
def test_nested_ranks_apply_the_mean_of_the_changes(
    samples: list[int], rank: int, scale: float, seed: int, data: st.DataObject, first: bool
) -> None:
    """s B' A = s B A + sum p_k s (B_k - B[:, :r_k]) A[:r_k], for A likewise; in FFA's first round, B = 0, it is dW*."""
    draw, s = draws(seed), scale / rank
    p = [n / sum(samples) for n in samples]
    ranks = {str(k): data.draw(st.integers(1, rank)) for k in range(len(samples))}
    a, b = draw(rank, N), draw(M, rank) * (not first)
    own_b = {k: draw(M, r) for k, r in ranks.items()}
    own_a = {k: draw(r, N) for k, r in ranks.items()}

    def told(name: str, own: Mapping[str, Tensor]) -> list[Report]:
        return [report(k, n, {name: own[k]}) for k, n in zip(ranks, samples, strict=True)]

    for found in (
        after(FfaLora(rank=rank, ranks=ranks), {B: b}, told(B, own_b), 0),
        after(RoLora(rank=rank, ranks=ranks), {A: a, B: b}, told(B, own_b), 0),
    ):
        change = sum(w * s * (own_b[k] - b[:, :r]) @ a[:r] for w, (k, r) in zip(p, ranks.items(), strict=True))
        assert_exact(s * found[B] @ a, s * b @ a + change)
        if first:
            assert_exact(
                s * found[B] @ a, sum(w * s * own_b[k] @ a[:r] for w, (k, r) in zip(p, ranks.items(), strict=True))
            )
    found = after(RoLora(rank=rank, ranks=ranks), {A: a, B: b}, told(A, own_a), 1)
    change = sum(w * s * b[:, :r] @ (own_a[k] - a[:r]) for w, (k, r) in zip(p, ranks.items(), strict=True))
    assert torch.allclose(s * b @ found[A], s * b @ a + change, atol=1e-9)


def test_nested_columns_by_hand() -> None:
    """10 rows say 4 for both columns, 30 of rank 1 say 8 for the first. From 2, 2: (10 x 4 + 30 x 8) / 40 = 7 for the
    first; the second moves by a quarter of 4 - 2: 2.5. Where nobody moves, nothing does."""
    state = {B: torch.full((1, 2), 2.0), HEAD: torch.zeros(1)}
    said = [
        report("wide", 10, {B: torch.full((1, 2), 4.0), HEAD: torch.ones(1)}),
        report("slim", 30, {B: torch.full((1, 1), 8.0), HEAD: torch.full((1,), 5.0)}),
    ]
    method = FfaLora(rank=2, ranks={"slim": 1})
    found = after(method, state, said, 0)
    assert (found[B].tolist(), found[HEAD].tolist()) == ([[7.0, 2.5]], [4.0])
    still = [report("wide", 10, state), report("slim", 30, {B: state[B][:, :1], HEAD: state[HEAD]})]
    assert_same(after(method, state, still, 0), state)
    wrong = report("slim", 30, state)
    found = after(method, state, [wrong, report("wide", 10, {B: torch.full((1, 2), 4.0), HEAD: torch.ones(1)})], 0)
    assert wrong.rejected == f"its update has {B} in shape [1, 2], not [1, 1]"
    assert found[B].tolist() == [[4.0, 4.0]]


def test_with_equal_ranks_it_is_the_weighted_mean_bit_for_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    state = {B: torch.randn(M, 3, generator=draw), HEAD: torch.randn(4, generator=draw)}
    updates = [{name: torch.randn(t.shape, generator=draw) for name, t in state.items()} for _ in range(3)]

    def reports() -> list[Report | Lost]:
        return [Lost("gone", "gone"), *(report(str(k), 10 + k, u) for k, u in enumerate(updates))]

    found = exact_mean(state, reports(), lambda _: 3)
    assert found is not None
    assert_same(found, dict(weighted_mean(Message(state), reports()).tensors))
    assert exact_mean(state, [Lost("gone", "gone")], lambda _: 3) is None


# -- what is trained, and what travels


@pytest.mark.parametrize(
    ("name", "expected"),  # of rank 4: floats down and up, round by round
    [
        ("ffa_lora", [(4 * SUM_M, 4 * SUM_M)] * 2),
        ("fedsa_lora", [(4 * SUM_N, 4 * SUM_N)] * 2),
        ("rolora", [(4 * (SUM_M + SUM_N), 4 * SUM_M), (4 * SUM_M, 4 * SUM_N), (4 * SUM_N, 4 * SUM_M)]),
        ("fed_sb", [(0, 4 * (SUM_M + SUM_N)), (4 * (SUM_M + SUM_N) + 16 * MODULES, 16 * MODULES), (16 * MODULES,) * 2]),
        # 1 % of 4 weights of 32 x 32 and 3 of 64 x 32 in each layer: 10 and 20 entries
        ("slora", [(2 * (4 * 10 + 3 * 20),) * 2, (4 * (SUM_M + SUM_N),) * 2]),
    ],
)
def test_bytes_by_hand(name: str, expected: list[tuple[int, int]], run_file: Path) -> None:
    """4 bytes a float. RoLoRA's edges keep both factors, so only what changed is sent; Fed-SB's A and B go once."""
    phase = ", sparse_rounds: 1" if name == "slora" else ""
    rounds = Rounds(run_file, f"method={{name: {name}, rank: 4{phase}}}")
    for down, up in expected:
        orders, updates = rounds.next()
        assert {order.payload_bytes for order in orders.values()} == {4 * down}
        assert {update.payload_bytes for update in updates.values()} == {4 * up}


def test_half_the_bytes_on_a_half_wire(run_file: Path) -> None:
    """What RoLoRA's edges keep is sent in the wire's dtype, too."""
    rounds = Rounds(run_file, "method={name: rolora, rank: 4}", "wire.dtype=bfloat16")
    rounds.next()
    orders, updates = rounds.next()
    assert orders["a"].payload_bytes == 2 * 4 * SUM_M
    assert updates["a"].payload_bytes == 2 * 4 * SUM_N


@pytest.mark.parametrize("name", ["rolora", "ffa_lora"])
def test_a_half_wire_is_as_exact(name: str, run_file: Path) -> None:
    """What is applied is the mean of the products that edges made, from the factors that they had, in every round."""
    rounds = Rounds(run_file, f"method={{name: {name}, rank: 4, alpha: 4}}", "wire.dtype=bfloat16")
    for _ in range(3):
        orders, updates = rounds.next()
        applied = rounds.method.weights(rounds.state, rounds.server)["global"].tensors
        own = rounds.method.frozen(rounds.server) if name == "ffa_lora" else {}
        lost = whole = 0.0
        for name_a in (n for n in applied if factor(n) == "A"):
            name_b, dw = name_a.replace(".lora_A.", ".lora_B."), torch.zeros((), dtype=torch.float64)
            for edge, update in updates.items():  # 16 rows each
                had = {**own, **orders[edge].kept, **update.tensors}
                dw = dw + had[name_b].double() @ had[name_a].double() / 3
            gap = applied[name_b].double() @ applied[name_a].double() - dw
            lost, whole = lost + float(gap.square().sum()), whole + float(dw.square().sum())
        assert lost**0.5 <= 1e-6 * whole**0.5
        assert rounds.state.numbers["residual"] == 0


def test_a_half_wire_moves_nothing_that_nobody_moved() -> None:
    """Of rank 2 and 1, both send what they were sent: 1.01 is 1.0078125 in bfloat16, for the column of one edge too."""
    server = server_site(toy_run({"e1": {}}, wire={"dtype": "bfloat16"}), Adding(), [])
    sent = torch.full((1, 2), 1.0078125)
    said = [report("wide", 10, {B: sent}), report("slim", 30, {B: sent[:, :1]})]
    method = FfaLora(rank=2, ranks={"slim": 1})
    found = method.aggregate(Message({B: torch.full((1, 2), 1.01)}), said, server, 0, NOBODY)
    assert found.tensors[B].tolist() == sent.tolist()


def test_nested_edges_of_ffa(run_file: Path) -> None:
    """c trains one column of four: a quarter of the bytes. A_0 is nobody's message, and everybody's; c's scale is
    alpha / rank of the global adapter, 8 / 4, in its own model too."""
    rounds = Rounds(run_file, "method={name: ffa_lora, rank: 4, alpha: 8, ranks: {c: 1}}")
    server, sites = rounds.server, rounds.fleet.sites
    orders, updates = rounds.next()
    assert [updates[edge].payload_bytes for edge in "abc"] == [16 * SUM_M, 16 * SUM_M, 4 * SUM_M]
    assert orders["c"].payload_bytes == 4 * SUM_M
    layer = lora.layers(lora.attach(sites["c"].base, rounds.method.spec(sites["c"]).at(1)))[0][1]
    assert (layer.r["default"], layer.scaling["default"]) == (1, 2.0)
    assert not any(factor(name) == "A" for part in (orders, updates) for one in part.values() for name in one.tensors)
    frozen = rounds.method.frozen(server)
    for site in sites.values():
        assert_same(rounds.method.frozen(site), frozen)
    exported = rounds.method.weights(rounds.state, server)["global"].tensors
    assert_same({name: t for name, t in exported.items() if factor(name) == "A"}, frozen)
    weight = dict.fromkeys("abc", 16)  # four steps of four rows
    for name, tensor in rounds.state.tensors.items():
        first = sum(weight[e] * updates[e].tensors[name][:, :1] for e in "abc") / 48
        rest = sum(weight[e] * updates[e].tensors[name][:, 1:] for e in "ab") / 48  # c counts as no change of 0
        torch.testing.assert_close(tensor, torch.cat([first, rest], dim=1), rtol=0, atol=1e-6)


def test_rolora_takes_turns(run_file: Path) -> None:
    """What is frozen in a round has the same bits after it; the other factor moves; c has the first row and column."""
    rounds = Rounds(run_file, "method={name: rolora, rank: 4, ranks: {c: 1}}")
    for trained in ("B", "A", "B"):
        before = rounds.state.tensors
        orders, updates = rounds.next()
        for name, tensor in rounds.state.tensors.items():
            assert torch.equal(tensor, before[name]) == (factor(name) != trained)
        assert {factor(name) for name in updates["a"].tensors} == {trained}
        assert all(tensor.shape[trained == "B"] == 1 for tensor in updates["c"].tensors.values())
        assert {factor(name) for name in orders["c"].kept} == {"A", "B"}


def test_a_bound_on_changes_sees_what_was_sent_to_be_kept(run_file: Path) -> None:
    """From the third round on B is not zero: its change is far smaller than itself."""
    settings = ("method={name: rolora, rank: 4}", "local.lr=1e-6", "server.norm_bound=0.1")
    fleet, method, server, state = opened_run(run_file, *settings)
    big = Message({n: torch.ones_like(t) for n, t in state.tensors.items()})
    start = method.plan(big, fleet.edges, server, 0, NOBODY)
    assert start["a"].kept
    for one in checked(fleet.run(start, 0), start, server.run):
        assert isinstance(one, Report)
        assert float(one.message().tensors[next(n for n in state.tensors if factor(n) == "B")].norm()) > 5


def test_serial_and_ray_agree_bitwise(run_file: Path, ray_here: None) -> None:
    """With kept factors, unequal ranks, edges that miss rounds, and a half wire."""
    settings = (
        "method={name: rolora, rank: 2, ranks: {b: 1}}",
        "rounds=3",
        "fleet.fraction=0.67",
        "wire.dtype=bfloat16",
    )
    assert_alike(rounds_of("serial", run_file, *settings), rounds_of("packed", run_file, *settings))


def test_ffa_in_a_buffer(run_file: Path) -> None:
    """Its order is the state, and its mean moves with its arguments."""
    fleet, method, server, state = opened_run(run_file, "method={name: ffa_lora, rank: 2}")
    *_, last = federate_buffered(method, fleet, server, rounds=3, seed=0, buffer=2, evaluate_every=0)
    assert len(last.reports) == 2
    assert any(not torch.equal(t, state.tensors[name]) for name, t in last.state.tensors.items())


@pytest.mark.parametrize("name", RULES)
def test_a_classifiers_head_is_trained_and_averaged(name: str, run_file: Path, data_dir: Path) -> None:
    """With the adapter's weights: 16 rows each here, so it is the plain mean; and it is in every view."""
    rounds = Rounds(run_file, f"method={{name: {name}, rank: 2}}", classes(data_dir))
    head, before = HEAD, rounds.state.tensors
    if name == "fed_sb":
        rounds.next()
        assert torch.equal(rounds.state.tensors[head], before[head])
    _, updates = rounds.next()
    mean = sum(updates[edge].tensors[head] for edge in "abc") / 3
    torch.testing.assert_close(rounds.state.tensors[head], mean, rtol=0, atol=1e-6)
    assert float((mean - before[head]).abs().max()) > 1e-3
    view = next(iter(rounds.method.weights(rounds.state, rounds.fleet.sites["a"]).values()))
    assert torch.equal(view.tensors[head], rounds.state.tensors[head])
    assert all("accuracy" in metrics for metrics in rounds.fleet.evaluate(rounds.state, "test").values())
