"""SLoRA: the mask, sparse gradients against autograd's, the nearest adapter, and a resume in each phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from factor_rounds import NOBODY, A, B, Counted, M, N, Rounds, report
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import assert_same, opened_run
from test_export import logits
from toys import llama
from transformers import AutoModelForCausalLM

from fedpipe_ray import lora, sparse
from fedpipe_ray.loop import Round, Start, federate
from fedpipe_ray.message import Message
from fedpipe_ray.methods.slora import SLora
from fedpipe_ray.report import Report
from fedpipe_ray.run import first_view
from fedpipe_ray.sparse import Places
from fedpipe_ray.train import gradients

METHOD = "method={name: slora, rank: 4, alpha: 8, sparse_rounds: 2, density: 0.05}"


def test_the_mask_is_the_seed_s(run_file: Path) -> None:
    """5 % of 32 x 32 and of 64 x 32: 51 and 102 places, all different, rising, other ones in each module."""
    model = lora.inject(llama(), lora.LoraSpec(2, 4, ("q_proj", "down_proj")))
    found, again, other = (sparse.places(model, 0.05, seed) for seed in (3, 3, 4))
    assert list(found) == [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")]
    for name, at in found.items():
        assert at.size == ((32, 32) if "q_proj" in name else (32, 64))
        assert len(at.index) == len(at.index.unique()) == (51 if "q_proj" in name else 102)
        assert (at.index.diff() > 0).all()
        assert 0 <= int(at.index.min()) <= int(at.index.max()) < at.size[0] * at.size[1]
        assert torch.equal(again[name].index, at.index)
        assert not torch.equal(other[name].index, at.index)
    assert not torch.equal(
        found["model.layers.0.self_attn.q_proj"].index, found["model.layers.1.self_attn.q_proj"].index
    )
    _, method, server, state = opened_run(run_file, METHOD)
    assert {len(state.tensors[n + sparse.PART]) for n in method.places(server)} == {51, 102}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_entries_get_the_gradient_of_the_weight_s_entries(checkpointing: bool, run_file: Path) -> None:
    """At S = 0, and at a random S: autograd's on a plain copy whose weights have the change added."""
    fleet, method, _, state = opened_run(run_file, METHOD, f"local.checkpointing={checkpointing}")
    site = fleet.sites["a"]
    where, draw = method.places(site), torch.Generator().manual_seed(0)
    for size in (0.0, 0.1):
        entries = {name: size * torch.randn(t.shape, generator=draw) for name, t in state.tensors.items()}
        model = sparse.attach(site.base, method.spec(site), where)
        sparse.load(model, entries)
        assert_same(sparse.read(model), entries)
        found = site.gradients(model, np.random.default_rng(1), 2)
        lora.detach(site.base)
        plain = site.base.writable()
        for name, at in where.items():
            weight = plain.get_submodule(name).weight
            weight.data.view(-1)[at.index] += entries[name + sparse.PART]
        full, _ = gradients(
            plain, site.data.train, site.run.local, batches=2, rng=np.random.default_rng(1), device=site.base.device,
            pad_id=site.base.pad_id,
        )  # fmt: skip
        assert len(found) == 14
        for name, at in where.items():
            expected = full[f"{name}.weight"].view(-1)[at.index]
            torch.testing.assert_close(found[sparse.key_of(name)][0], expected, rtol=1e-4, atol=1e-7)


@settings(max_examples=30)
@given(
    rank=st.integers(1, 3), density=st.floats(0.01, 0.3), tall=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_the_nearest_product_is_the_dense_svd_s(rank: int, density: float, tall: bool, seed: int) -> None:
    """150 x 140 for Lanczos, 12 x 9 dense: the product, and what it loses."""
    size = (150, 140) if tall else (12, 9)
    draw = np.random.default_rng(seed)
    index = torch.from_numpy(np.sort(draw.choice(size[0] * size[1], max(1, int(density * size[0] * size[1])), False)))
    entries = torch.from_numpy(draw.standard_normal(len(index)))
    dense = torch.zeros(size[0] * size[1], dtype=torch.float64)
    dense[index] = entries
    dense = dense.view(size)
    cut = sparse.nearest(Places(size, index), entries, rank, torch.ones(0, size[1]))
    s = torch.linalg.svdvals(dense)
    gap = float((dense - cut.b @ cut.a).norm())
    assert gap == pytest.approx(float(s[rank:].norm()), abs=1e-7)  # Eckart-Young: no product of the rank is nearer
    assert cut.residual == pytest.approx(gap, abs=1e-6)
    torch.testing.assert_close(cut.a @ cut.a.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-9)


def test_rows_of_sum_zero_have_a_nearest_product_too() -> None:
    """+v and -v in each of 150 rows, so that S times a vector of ones is 0: where Lanczos must not start."""
    draw = np.random.default_rng(0)
    columns = np.sort([draw.choice(140, 2, replace=False) for _ in range(150)])
    index = torch.from_numpy((140 * np.arange(150)[:, None] + columns).ravel())
    entries = torch.from_numpy(np.outer(draw.standard_normal(150), [1.0, -1.0]).ravel())
    dense = torch.zeros(150 * 140, dtype=torch.float64).index_copy_(0, index, entries).view(150, 140)
    cut = sparse.nearest(Places((150, 140), index), entries, 3, torch.ones(0, 140))
    assert float((dense - cut.b @ cut.a).norm()) == pytest.approx(float(torch.linalg.svdvals(dense)[3:].norm()))


def test_equal_entries_give_the_same_bits_each_time() -> None:
    """Ten ones in rows and columns of their own are ten equal singular values: any four of them are nearest."""
    index, cuts = torch.arange(10) * 61, []
    for _ in range(3):
        cuts.append(sparse.nearest(Places((40, 60), index), torch.ones(10), 4, torch.ones(0, 60)))
    assert cuts[0].residual == pytest.approx(6**0.5)
    assert all(torch.equal(one.b, cuts[0].b) and torch.equal(one.a, cuts[0].a) for one in cuts)


def test_nothing_learned_gives_a_fresh_adapter() -> None:
    """S = 0: B is zero, and A orthonormal, so that it can train."""
    cut = sparse.nearest(Places((40, 50), torch.arange(9)), torch.zeros(9), 3, torch.randn(3, 50))
    assert not cut.b.any()
    torch.testing.assert_close(cut.a @ cut.a.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-9)
    assert (cut.residual, cut.relative) == (0, 0)


def test_the_phases(run_file: Path) -> None:
    """Entries, entries, the adapter nearest to their mean, FedIT; the residual of each by dense algebra."""
    rounds = Rounds(run_file, METHOD, "local.schedule=constant")
    where, site = rounds.method.places(rounds.server), rounds.fleet.sites["a"]
    rounds.next()
    assert rounds.state.numbers == {"residual": 0.0}
    model = first_view(rounds.server, rounds.state).on(site.base)
    plain = AutoModelForCausalLM.from_pretrained(rounds.server.run.model.name)
    for name, at in where.items():
        plain.get_submodule(name).weight.data.view(-1)[at.index] += rounds.state.tensors[name + sparse.PART]
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-5)
    assert list(lora.parameters(model)) == [sparse.key_of(name) for name in where]

    _, updates = rounds.next()
    lost = whole = 0.0
    for name, at in where.items():
        dense = torch.zeros(at.size).view(-1)
        dense[at.index] = sum(one.tensors[name + sparse.PART] for one in updates.values()) / 3
        dense = dense.view(at.size)
        a, b = (rounds.state.tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        gap = float((dense - 2.0 * b @ a).norm())  # alpha / rank = 2
        assert gap == pytest.approx(float(torch.linalg.svdvals(dense)[4:].norm()), rel=1e-3)
        lost, whole = lost + gap**2, whole + float(dense.norm()) ** 2
    assert rounds.state.numbers["residual"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert not any(name.endswith(sparse.PART) for name in rounds.state.tensors)

    orders, updates = rounds.next()
    assert set(orders["a"].tensors) == set(updates["a"].tensors) == set(rounds.state.tensors)
    assert 0 < rounds.state.numbers["residual"] < 1


@settings(max_examples=30)
@given(samples=st.lists(st.integers(1, 500), min_size=1, max_size=4), rank=st.integers(1, 3), seed=st.integers(0, 999))
def test_the_second_phase_is_fedit_with_its_residual(samples: list[int], rank: int, seed: int) -> None:
    """A and B are means; ||B A - sum p B_k A_k|| / ||sum p B_k A_k|| as the dense matrices have it."""
    draw = torch.Generator().manual_seed(seed)
    state = {A: torch.zeros(rank, N), B: torch.zeros(M, rank)}
    own = [{name: torch.randn(t.shape, generator=draw) for name, t in state.items()} for _ in samples]
    p = [n / sum(samples) for n in samples]
    reports: list[Any] = [report(str(k), n, t) for k, (n, t) in enumerate(zip(samples, own, strict=True))]
    found = SLora(rank=rank).aggregate(Message(state), reports, NOBODY, 7, NOBODY)
    mean = {name: sum(w * t[name] for w, t in zip(p, own, strict=True)) for name in state}
    torch.testing.assert_close(dict(found.tensors), mean)
    dw = sum(w * t[B].double() @ t[A].double() for w, t in zip(p, own, strict=True))
    expected = float((found.tensors[B].double() @ found.tensors[A].double() - dw).norm() / dw.norm())
    assert found.numbers == {"residual": pytest.approx(expected, rel=1e-6, abs=1e-9), "cut": 0}


def test_the_second_phase_holds_no_more_of_sixty_edges_than_of_sixteen() -> None:
    """The sum of their products is of rank 5, as high as its sides allow; the residual is that of all sixty."""
    draw = torch.Generator().manual_seed(0)
    state = {A: torch.zeros(1, N), B: torch.zeros(M, 1)}
    own = [{name: torch.randn(t.shape, generator=draw) for name, t in state.items()} for _ in range(60)]
    reports = Counted(own, [1.0 + k % 3 for k in range(60)])
    found = SLora(rank=1).aggregate(Message(state), reports, NOBODY, 7, NOBODY)
    assert len(reports.seen) == 60
    assert max(reports.seen) <= 16
    dw = sum(w * t[B].double() @ t[A].double() for w, t in zip(reports.weights, own, strict=True)) / 120
    gap = float((found.tensors[B].double() @ found.tensors[A].double() - dw).norm() / dw.norm())
    assert found.numbers == {"residual": pytest.approx(gap, rel=1e-6), "cut": pytest.approx(0, abs=1e-12)}


def test_a_resume_in_each_phase_has_the_same_bits(run_file: Path, tmp_path: Path) -> None:
    """From the state on disk after rounds 1 and 2 of 3: in the first phase, and where the second begins."""

    def rounds(start: Start | None = None) -> list[Round]:
        fleet, method, server, _ = opened_run(run_file, METHOD, "rounds=3")
        return list(federate(method, fleet, server, rounds=3, seed=0, evaluate_every=0, start=start))

    whole = rounds()
    for done in whole[:2]:
        digest = done.state.save(tmp_path / "state.safetensors")
        state = Message.load(tmp_path / "state.safetensors", digest)
        last = rounds(Start(state, done.number + 1, clock_seconds=done.clock_seconds))[-1]
        assert_same(dict(last.state.tensors), dict(whole[-1].state.tensors))
        assert last.state.numbers == whole[-1].state.numbers
        assert (last.bytes_up, last.virtual_seconds) == (whole[-1].bytes_up, whole[-1].virtual_seconds)


def test_a_run_stopped_in_the_first_phase_exports_the_nearest_adapter(run_file: Path, tmp_path: Path) -> None:
    rounds = Rounds(run_file, METHOD)
    rounds.next()
    server = rounds.server
    view = first_view(server, rounds.state)
    assert isinstance(view, sparse.SparseWeights)
    view.save(tmp_path / "adapter", server)
    expected = logits(view.nearest().on(server.base))
    plain = AutoModelForCausalLM.from_pretrained(server.run.model.name)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(view.merged(server.base)), expected, rtol=0, atol=1e-5)


def test_what_a_sparse_round_costs(run_file: Path) -> None:
    """A weight and token: 2 for the first target, 4 for the others and the head (18 x 32), 2 for each target's dense
    gradient; 6 an entry. sparse_lr takes the place of local.lr: the first step of AdamW moves an entry by it."""
    fleet, method, server, state = opened_run(
        run_file, METHOD.replace("density: 0.05", "sparse_lr: 0.003"), "local={steps: 1, batch: 4, schedule: constant}"
    )
    (one,) = fleet.run({"a": method.plan(state, fleet.edges, server, 0, NOBODY)["a"]}, 0)
    assert isinstance(one, Report)
    targets, entries = 2 * (4 * 32 * 32 + 3 * 64 * 32), 2 * (4 * 10 + 3 * 20)
    per_token = 2 * 32 * 32 + 4 * (targets - 32 * 32 + 18 * 32) + 2 * targets + 6 * entries
    assert one.cost.flops == per_token * one.cost.tokens
    moved = torch.cat(list(one.message().tensors.values())).abs()
    assert float(moved.max()) == pytest.approx(0.003, rel=1e-3)
