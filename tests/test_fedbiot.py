"""`fedbiot`: both problems, what stays as it is, what the server makes of updates."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fedbiot_made import batch_of, report_of, update_of
from hypothesis import given
from hypothesis import strategies as st
from runs import assert_same
from test_export import logits
from toys import CPU
from transformers import AutoModelForCausalLM

from fedpipe_ray.alignment import Alignment
from fedpipe_ray.batches import Batch
from fedpipe_ray.layer_drop import keep, renumbered
from fedpipe_ray.message import Message
from fedpipe_ray.methods.fedbiot import EMULATOR, FedBiOT, parts, prealign_steps_of
from fedpipe_ray.proximal import Pull
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Lost, Report


def test_steps_before_the_first_round() -> None:
    assert [prealign_steps_of(beta) for beta in (0.1, 0.2, 0.35, 0.5, 0.8)] == [250, 250, 375, 500, 500]
    assert FedBiOT(beta=0.5).prealigning == 500


# -- both problems


def test_fresh_lora_changes_nothing(fedbiot: Any, deep_dir: Path) -> None:
    """B = 0: AdapFu has the logits of the plain model, AdapEmu those of the plain model without the dropped layers."""
    h = fedbiot("method.prealign_steps=0")
    views = h.method.weights(h.state, h.server)
    plain = AutoModelForCausalLM.from_pretrained(deep_dir)
    torch.testing.assert_close(logits(views["adapfu"].on(h.server.base)), logits(plain), rtol=0, atol=0)
    shallow = AutoModelForCausalLM.from_pretrained(deep_dir)
    keep(shallow, (0, 1, 2, 3, 5, 6, 7))  # 6 layers, 5 of them kept: 0, 1, 2, 3, 5
    torch.testing.assert_close(logits(views["adapemu"].on(h.server.base)), logits(shallow), rtol=0, atol=0)
    assert float((logits(shallow) - logits(plain)).abs().max()) > 1e-3


@pytest.mark.parametrize("split", ["last", "ends"])
def test_nothing_dropped_nothing_to_align(split: str, fedbiot: Any) -> None:
    """beta = 0: E is E*, both terms are 0 exactly, whatever the adapter is, and both models are one."""
    h = fedbiot("method.beta=0", f"method.split={split}")
    assert not h.method.shape(h.server).emulator
    state, _ = h.next_state()
    assert not any(name.startswith(EMULATOR) for name in h.orders()["a"].tensors)
    view = h.method.weights(state, h.server)["adapemu"]
    student = view.on(h.server.base)
    terms = h.method.objective(state, h.server, student).parts(student, batch_of(h.server), CPU)
    assert [float(term.detach()) for term in terms] == [0, 0]
    views = h.method.weights(state, h.server)
    assert torch.equal(*(logits(views[name].on(h.server.base)) for name in ("adapfu", "adapemu")))


def test_l2_is_relative_and_kl_is_of_the_teacher_first(fedbiot: Any) -> None:
    """Against the equations written out; a student whose states are zero is at 1; padding is left out, or not."""
    h = fedbiot()
    batch = batch_of(h.server)
    batch.mask[1, 3:] = batch.mask[4, 2:] = 0  # as if padded
    student = h.method.weights(h.state, h.server)["adapemu"].on(h.server.base)
    objective = h.method.objective(h.state, h.server, student)
    found = objective.parts(student, batch, CPU)
    with torch.no_grad():
        outs = [m(input_ids=batch.tokens, attention_mask=batch.mask, output_hidden_states=True)
                for m in (objective.teacher, student)]  # fmt: skip
    teacher, own = (out.hidden_states[at] for out, at in zip(outs, (6, 5), strict=True))
    kept = batch.mask.bool()
    l2 = [((t - s) ** 2).mean() / (t**2).mean() for t, s in zip(teacher[kept], own[kept], strict=True)]
    assert float(found[0].detach()) == pytest.approx(float(sum(l2) / len(l2)), rel=1e-5)
    p, q = (out.logits[kept].softmax(-1) for out in outs)
    assert float(found[1].detach()) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    whole = dataclasses.replace(objective, positions="all").parts(student, batch, CPU)
    assert float(whole[0].detach()) != float(found[0].detach())


def test_a_student_that_gives_zero_is_at_one() -> None:
    """Whatever the scale of each position; the loss is times the batch's units; without lambda no KL is made."""

    class States(torch.nn.Module):
        def __init__(self, states: torch.Tensor) -> None:
            super().__init__()
            self.states, self.head = states, torch.nn.Identity()

        def forward(self, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=self.head(self.states))

    states = (
        torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100, 1, 1e-3, 1])[:, None]
    )
    teacher, student = States(states), States(torch.zeros(2, 5, 8))
    ones = torch.ones(2, 5, dtype=torch.long)
    batch = Batch(ones, ones, ones, 7)
    objective = Alignment(teacher, (teacher.head, student.head), 0.0)
    l2, kl = objective.parts(student, batch, CPU)
    assert float(l2) == pytest.approx(1, rel=1e-5)
    assert float(kl) == 0
    assert float(objective(student, batch, CPU)) == pytest.approx(7, rel=1e-5)
    l2, kl = dataclasses.replace(objective, lam=0.5).parts(student, batch, CPU)
    p = states.flatten(0, 1).softmax(-1)
    assert float(kl) == pytest.approx(float((p * (p * 8).log()).nansum(-1).mean()), rel=1e-4)
    total = dataclasses.replace(objective, lam=0.5)(student, batch, CPU)
    assert float(total) == pytest.approx(7 * (float(l2) + 0.5 * float(kl)), rel=1e-5)


def test_alignment_brings_the_held_out_loss_down(fedbiot: Any) -> None:
    """On public rows that no step saw, both terms; the adapter stays bit for bit as it was."""
    h = fedbiot("method.prealign_steps=0", "method.align_lr=0.01")
    after = h.method.align(h.state, h.server, 60, rng_for(0, 0, "align"))
    losses = []
    for state in (h.state, after):
        student = h.method.weights(state, h.server)["adapemu"].on(h.server.base).eval()
        objective = h.method.objective(state, h.server, student)
        losses.append([float(term.detach()) for term in objective.parts(student, batch_of(h.server, 40), CPU)])
    assert losses[1][0] < 0.8 * losses[0][0]
    assert losses[1][1] < 0.8 * losses[0][1]
    shape = h.method.shape(h.server)
    assert_same({n: h.state.tensors[n] for n in shape.adapter}, {n: after.tensors[n] for n in shape.adapter})
    assert any(not torch.equal(h.state.tensors[name], after.tensors[name]) for name in shape.emulator)
    assert after.numbers["alignment"] < losses[0][0] + losses[0][1]


def test_an_edge_leaves_the_emulator_and_the_frozen_weights(fedbiot: Any) -> None:
    h = fedbiot()
    order = h.orders()["a"]
    before = {name: tensor.clone() for name, tensor in order.tensors.items()}
    ((report, *_),) = [list(h.fleet.run({"a": order}, 0))]
    assert isinstance(report, Report)
    assert_same(before, dict(order.tensors))
    model = h.fleet.sites["a"].base.model
    held = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if ".lora_" not in n}
    assert_same(order.kept, {n: p.detach() for n, p in held.items() if n in order.kept})
    adapter, emulator = parts(order)
    acting = {n.replace(".frozen", ""): p for n, p in model.named_parameters() if ".frozen." in n}
    assert_same({n.removeprefix("base_model.model."): t for n, t in emulator.items()}, acting)
    update = report.message()
    assert update.tensors.keys() == adapter.keys()
    assert all(not torch.equal(update.tensors[n], adapter[n]) for n in adapter if ".lora_B." in n)


@given(st.integers(0, 2**31))
def test_the_pull_is_that_of_the_merged_change(seed: int) -> None:
    """Value and gradient against the matrices themselves."""
    draw = torch.Generator().manual_seed(seed)
    names = ["m.lora_A.weight", "m.lora_B.weight"]
    start = dict(zip(names, (torch.randn(3, 7, generator=draw), torch.randn(5, 3, generator=draw)), strict=True))
    now = {n: torch.nn.Parameter(t + 0.1 * torch.randn(t.shape, generator=draw)) for n, t in start.items()}
    value = Pull(now, start, eps=0.7, scale=2.0)()
    value.backward()
    own = {n: torch.nn.Parameter(p.detach().double()) for n, p in now.items()}
    change = own[names[1]] @ own[names[0]] - (start[names[1]] @ start[names[0]]).double()
    (0.35 * (2 * change).square().sum()).backward()
    assert float(value.detach()) == pytest.approx(float(1.4 * change.detach().square().sum()), rel=1e-4)
    for name in names:
        torch.testing.assert_close(now[name].grad, own[name].grad.float(), rtol=1e-3, atol=1e-4)
    still = Pull({n: torch.nn.Parameter(t.clone()) for n, t in start.items()}, start, 1.0, 1.0)()
    assert float(still.detach()) == 0


def test_the_pull_has_a_gradient_and_holds_the_adapter_back(fedbiot: Any) -> None:
    """The larger eps, the smaller the merged change of an edge; the released code's would be the same for all."""
    moved = []
    for eps in (0.0, 10.0, 1000.0):
        h = fedbiot(f"method.eps={eps}")
        (report,) = h.fleet.run({"a": h.orders()["a"]}, 0)
        adapter, _ = parts(h.orders()["a"])
        assert isinstance(report, Report)
        now = {n: torch.nn.Parameter(t) for n, t in report.message().tensors.items()}
        moved.append(float(Pull(now, adapter, 2.0, 1.0)().detach()))
    assert moved[0] > 1.2 * moved[1] > 1.2 * moved[2] > 0


# -- the server


@pytest.mark.parametrize(("weigh", "shares"), [("rows", (0.75, 0.25)), ("equal", (0.5, 0.5))])
def test_means_of_factors_by_rows_or_alike(weigh: str, shares: tuple[float, float], fedbiot: Any) -> None:
    h = fedbiot(f"method.weigh={weigh}", "method.align_steps=0")
    order = h.orders()["a"]
    one, two = update_of(order, 1, 30), update_of(order, 2, 10)
    after = h.method.aggregate(
        h.state, [report_of("a", one), Lost("b", "gone"), report_of("c", two)], h.server, 0, rng_for(0, 0, "agg")
    )
    shape = h.method.shape(h.server)
    for name in one.tensors:
        expected = shares[0] * one.tensors[name] + shares[1] * two.tensors[name]
        torch.testing.assert_close(after.tensors[renumbered(name, "layers", shape.cut.kept)], expected)
    assert_same({n: h.state.tensors[n] for n in shape.emulator}, {n: after.tensors[n] for n in shape.emulator})


def test_product_is_exact_where_the_rank_suffices(fedbiot: Any) -> None:
    """Two updates of rank 2 in factors of rank 4: the mean of their products, which means of factors miss."""
    h = fedbiot("method.join=product", "method.align_steps=0")
    order = h.orders()["a"]
    updates = [update_of(order, seed, 10) for seed in (1, 2)]
    for message in updates:
        for name, tensor in message.tensors.items():
            tensor[2:] = 0 if ".lora_A." in name else tensor[2:]
    found = [report_of(edge, message) for edge, message in zip("ab", updates, strict=True)]
    after = h.method.aggregate(h.state, found, h.server, 0, rng_for(0, 0, "agg"))
    assert after.numbers["residual"] < 1e-6
    for name in (name for name in updates[0].tensors if ".lora_A." in name):
        other = name.replace("_A.", "_B.")
        exact = sum(0.5 * one.tensors[other].double() @ one.tensors[name].double() for one in updates)
        keys = [renumbered(key, "layers", h.method.shape(h.server).cut.kept) for key in (other, name)]
        torch.testing.assert_close(
            after.tensors[keys[0]].double() @ after.tensors[keys[1]].double(), exact, atol=1e-5, rtol=1e-5
        )


def test_unfit_updates_are_refused(fedbiot: Any) -> None:
    h = fedbiot("method.align_steps=0")
    order = h.orders()["a"]
    good = update_of(order, 1, 10)
    first = next(iter(good.tensors))
    cases = {
        "in shape [1], not": Message({**good.tensors, first: torch.zeros(1)}, good.numbers),
        "NaN or infinity in": Message({**good.tensors, first: good.tensors[first] * np.nan}, good.numbers),
        "differs from the state in 1 tensors": Message({**good.tensors, "x": torch.zeros(1)}, good.numbers),
        "says that the edge has 0 rows": Message(good.tensors, {"rows": 0}),
    }
    for says, bad in cases.items():
        one, two = report_of("a", bad), report_of("b", good)
        h.method.aggregate(h.state, [one, two], h.server, 0, rng_for(0, 0, "agg"))
        assert says in str(one.rejected)
        assert two.rejected is None
