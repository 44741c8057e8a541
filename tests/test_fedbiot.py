"""`fedbiot`: the cut, both problems, what stays as it is, what travels, what an actor holds, the two models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import assert_same, emulated, fleet_of, here, load
from test_export import logits
from toys import CPU
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedpipe_ray import lora
from fedpipe_ray.alignment import Alignment
from fedpipe_ray.batches import Batch, collate
from fedpipe_ray.costs import matmul_parameters
from fedpipe_ray.errors import UserError
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.layer_drop import blocks, client_parameters, cut, keep, renumbered
from fedpipe_ray.loop import Start, federate
from fedpipe_ray.message import KEPT, Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.methods.base import shown
from fedpipe_ray.methods.fedbiot import EMULATOR, FedBiOT, pair, parts, prealign_steps_of, spec_for
from fedpipe_ray.proximal import Pull
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.run import server_site
from fedpipe_ray.site import Site

LAYER = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32  # parameters of a layer of the deep model
OUTSIDE = 18 * 32 + 32  # embeddings, tied, and the last norm
FACTORS = 4 * (4 * 64 + 3 * 96)  # LoRA of rank 4 on all linear weights of a layer


@dataclasses.dataclass
class Here:
    """A fleet in this process, its method, the server, and the state before round 0."""

    fleet: SerialFleet
    method: FedBiOT
    server: Site
    state: Message

    def orders(self, state: Message | None = None, round: int = 0) -> dict[str, Message]:
        state = state or self.state
        return self.method.plan(state, self.fleet.edges, self.server, round, rng_for(0, round, "plan"))

    def next_state(self, round: int = 0) -> tuple[Message, list[Report | Lost]]:
        reports = list(self.fleet.run(self.orders(round=round), round))
        return self.method.aggregate(self.state, reports, self.server, round, rng_for(0, round, "agg")), reports


@pytest.fixture
def needs(deep_dir: Path, public_file: Path) -> list[str]:
    return emulated(deep_dir, public_file)


@pytest.fixture
def opened(run_file: Path, needs: list[str]) -> Any:
    """Makes a Here with changed settings."""

    def make(*overrides: str) -> Here:
        run = load(run_file, *needs, *overrides)
        method: Any = make_method(run.method)
        method.check(server_site(run, method, []))
        fleet = SerialFleet(run, method)
        fleet.open()
        server = server_site(run, method, fleet.classes)
        return Here(fleet, method, server, method.start(server, rng_for(run.seed, 0, "start")))

    return make


def batch_of(site: Site, count: int = 6) -> Batch:
    return collate(site.data.validation, list(range(min(count, len(site.data.validation)))), site.base.pad_id, False)


def of_layers(tensors: Any, numbers: set[int]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in tensors.items() if int(n.partition("layers.")[2].partition(".")[0]) in numbers}


# -- the cut


@pytest.mark.parametrize(
    ("a", "beta", "kept", "dropped", "params", "share", "gib", "adapter", "emulator"),
    [
        (2, 0.2, 24, (4, 9, 14, 19, 24, 28), 5.524, 82.0, 10.29, 262_144, 3_145_728),
        (2, 0.5, 15, None, 3.703, 54.9, 6.90, 262_144, 1_966_080),
        (4, 0.2, 22, (4, 8, 13, 17, 22, 26), 5.524, 82.0, 10.29, 524_288, 2_883_584),
        (4, 0.5, 14, None, 3.905, 58.0, 7.27, 524_288, 1_835_008),
    ],
)
def test_sizes_of_llama_2_7b(
    a: int, beta: float, kept: int, dropped: Any, params: float, share: float, gib: float, adapter: int, emulator: int
) -> None:
    """From the shapes of the model on the meta device, rank 8 on q_proj and v_proj."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
            num_attention_heads=32, tie_word_embeddings=False,
        ))  # fmt: skip
    whole = sum(p.numel() for p in model.parameters())
    assert whole == 6_738_415_616
    assert sum(p.numel() for p in blocks(model)[1][0].parameters()) == 202_383_360
    found = cut(32, a, beta)
    assert len(found.rest) == 32 - a
    assert len(found.emulator) == kept
    assert dropped is None or found.dropped == dropped
    ours = client_parameters(model, found)
    assert (round(ours / 1e9, 3), round(100 * ours / whole, 1), round(2 * ours / 2**30, 2)) == (params, share, gib)
    shapes = {n: p.numel() for n, p in lora.parameters(lora.inject(model, spec())).items()}
    assert sum(shapes.values()) == 4_194_304
    assert sum(of_layers(shapes, set(found.adapter)).values()) == adapter == 4_194_304 * a // 32
    assert sum(of_layers(shapes, set(found.emulator)).values()) == emulator
    keep(model, found.kept)  # and the model made smaller has as many
    assert sum(p.numel() for n, p in model.named_parameters() if "lora" not in n) == ours


def spec(*targets: str) -> lora.LoraSpec:
    return lora.LoraSpec(8, 16, targets or ("q_proj", "v_proj"))


@given(st.integers(3, 80), st.integers(1, 6), st.floats(0, 0.95), st.sampled_from(["last", "ends"]))
def test_a_cut_is_a_partition_and_keeps_both_ends(layers: int, a: int, beta: float, split: Any) -> None:
    a = 2 * a if split == "ends" else a
    rest = layers - a
    if rest < 2 or round(rest * (1 - beta)) < 2:
        with pytest.raises(UserError, match=r"method\.(a|beta): "):
            cut(layers, a, beta, split)
        return
    found = cut(layers, a, beta, split)
    assert sorted((*found.adapter, *found.emulator, *found.dropped)) == list(range(layers))
    assert (found.emulator[0], found.emulator[-1]) == (found.rest[0], found.rest[-1])
    assert len(found.emulator) == round(rest * (1 - beta))
    assert list(found.emulator) == sorted(set(found.emulator))
    assert len(found.adapter) == a
    assert found.kept[found.after[1]] == found.after[0]
    assert found.adapter == tuple(range(rest, layers)) if split == "last" else found.adapter[0] == 0
    names = [f"m.layers.{i}.w" for i in found.kept]
    small = [f"m.layers.{i}.w" for i in range(len(found.kept))]
    assert [renumbered(name, "layers", found.kept) for name in small] == names
    assert renumbered("m.embed.weight", "layers", found.kept) == "m.embed.weight"


def test_steps_before_the_first_round() -> None:
    assert [prealign_steps_of(beta) for beta in (0.1, 0.2, 0.35, 0.5, 0.8)] == [250, 250, 375, 500, 500]
    assert FedBiOT(beta=0.5).prealigning == 500


# -- both problems


def test_fresh_lora_changes_nothing(opened: Any, deep_dir: Path) -> None:
    """B = 0: AdapFu has the logits of the plain model, AdapEmu those of the plain model without the dropped layers."""
    h = opened("method.prealign_steps=0")
    views = h.method.weights(h.state, h.server)
    plain = AutoModelForCausalLM.from_pretrained(deep_dir)
    torch.testing.assert_close(logits(views["adapfu"].on(h.server.base)), logits(plain), rtol=0, atol=0)
    shallow = AutoModelForCausalLM.from_pretrained(deep_dir)
    keep(shallow, (0, 1, 2, 3, 5, 6, 7))  # 6 layers, 5 of them kept: 0, 1, 2, 3, 5
    torch.testing.assert_close(logits(views["adapemu"].on(h.server.base)), logits(shallow), rtol=0, atol=0)
    assert float((logits(shallow) - logits(plain)).abs().max()) > 1e-3


@pytest.mark.parametrize("split", ["last", "ends"])
def test_nothing_dropped_nothing_to_align(split: str, opened: Any) -> None:
    """beta = 0: E is E*, both terms are 0 exactly, whatever the adapter is, and both models are one."""
    h = opened("method.beta=0", f"method.split={split}")
    assert not h.method.aligned
    state, _ = h.next_state()
    assert not any(name.startswith(EMULATOR) for name in h.orders()["a"].tensors)
    view = h.method.weights(state, h.server)["adapemu"]
    student = view.on(h.server.base)
    terms = h.method.objective(state, h.server, student).parts(student, batch_of(h.server), CPU)
    assert [float(term.detach()) for term in terms] == [0, 0]
    views = h.method.weights(state, h.server)
    assert torch.equal(*(logits(views[name].on(h.server.base)) for name in ("adapfu", "adapemu")))


def test_l2_is_relative_and_kl_is_of_the_teacher_first(opened: Any) -> None:
    """Against the equations written out; a student whose states are zero is at 1; padding is left out, or not."""
    h = opened()
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


def test_alignment_brings_the_held_out_loss_down(opened: Any) -> None:
    """On public rows that no step saw, both terms; the adapter stays bit for bit as it was."""
    h = opened("method.prealign_steps=0", "method.align_lr=0.01")
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


def test_an_edge_leaves_the_emulator_and_the_frozen_weights(opened: Any) -> None:
    h = opened()
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
    value.backward()  # type: ignore[no-untyped-call]
    own = {n: torch.nn.Parameter(p.detach().double()) for n, p in now.items()}
    change = own[names[1]] @ own[names[0]] - (start[names[1]] @ start[names[0]]).double()
    (0.35 * (2 * change).square().sum()).backward()
    assert float(value.detach()) == pytest.approx(float(1.4 * change.detach().square().sum()), rel=1e-4)
    for name in names:
        torch.testing.assert_close(now[name].grad, own[name].grad.float(), rtol=1e-3, atol=1e-4)
    still = Pull({n: torch.nn.Parameter(t.clone()) for n, t in start.items()}, start, 1.0, 1.0)()
    assert float(still.detach()) == 0


def test_the_pull_has_a_gradient_and_holds_the_adapter_back(opened: Any) -> None:
    """The larger eps, the smaller the merged change of an edge; the released code's would be the same for all."""
    moved = []
    for eps in (0.0, 10.0, 1000.0):
        h = opened(f"method.eps={eps}")
        (report,) = h.fleet.run({"a": h.orders()["a"]}, 0)
        adapter, _ = parts(h.orders()["a"])
        assert isinstance(report, Report)
        now = {n: torch.nn.Parameter(t) for n, t in report.message().tensors.items()}
        moved.append(float(Pull(now, adapter, 2.0, 1.0)().detach()))
    assert moved[0] > 1.2 * moved[1] > 1.2 * moved[2] > 0


# -- the server


def update_of(like: Message, seed: int, rows: float) -> Message:
    draw = torch.Generator().manual_seed(seed)
    adapter, _ = parts(like)
    return Message({n: torch.randn(t.shape, generator=draw) for n, t in adapter.items()}, {"rows": rows})


def report_of(edge: str, message: Message) -> Report:
    from fedpipe_ray.costs import Cost

    return Report(edge, 0, 6.0, 0.0, Cost(), fetch=lambda: message)


@pytest.mark.parametrize(("weigh", "shares"), [("rows", (0.75, 0.25)), ("equal", (0.5, 0.5))])
def test_means_of_factors_by_rows_or_alike(weigh: str, shares: tuple[float, float], opened: Any) -> None:
    h = opened(f"method.weigh={weigh}", "method.align_steps=0")
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


def test_product_is_exact_where_the_rank_suffices(opened: Any) -> None:
    """Two updates of rank 2 in factors of rank 4: the mean of their products, which means of factors miss."""
    h = opened("method.join=product", "method.align_steps=0")
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


def test_unfit_updates_are_refused(opened: Any) -> None:
    h = opened("method.align_steps=0")
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


# -- what travels, and what it costs


def test_bytes_by_arithmetic(opened: Any) -> None:
    """Up: LoRA of a layers. Down: the frozen weights of 5 + 2 layers once, both LoRAs every round."""
    h = opened()
    edges = federate(h.method, h.fleet, h.server, rounds=2, seed=0, start=Start(h.state))
    first, second = edges
    order = h.orders()["a"]
    frozen = 4 * (7 * LAYER + OUTSIDE)
    assert order.payload_bytes == frozen + 4 * (2 + 5) * FACTORS
    for one in first.reports:
        assert one.cost.bytes_down == order.total_bytes
        assert one.message is not None
        assert 0 < one.cost.bytes_up - 4 * 2 * FACTORS < 3500  # names, shapes, rows
    for one in second.reports:
        assert 0 < one.cost.bytes_down - 4 * 7 * FACTORS < 12_000
        slower = h.fleet.edges[one.edge]
        before = next(r for r in first.reports if r.edge == one.edge)
        less = 8 * (before.cost.bytes_down - one.cost.bytes_down) / slower.downlink_bps
        assert before.cost.virtual_seconds - one.cost.virtual_seconds == pytest.approx(less, rel=0.3)


def test_flops_count_the_emulator_forward_only(opened: Any) -> None:
    """2 a weight and token below the adapter, 4 in it, 6 of its LoRA; the dropped layers not at all."""
    h = opened()
    (report,) = h.fleet.run({"a": h.orders()["a"]}, 0)
    weights = 4 * 32 * 32 + 3 * 32 * 64
    passed, frozen, trained = matmul_parameters(h.fleet.sites["a"].base.model)
    assert passed == 5 * (weights + FACTORS) + 32 * 32  # the first adapted weight, too: its input wants no gradient
    assert frozen == 2 * weights - 32 * 32 + 18 * 32  # with the head
    assert trained == 2 * FACTORS
    assert isinstance(report, Report)
    assert report.cost.flops == report.cost.tokens * (2 * passed + 4 * frozen + 6 * trained)


def test_back_propagation_stops_at_the_adapter(opened: Any) -> None:
    """No tensor below it is saved for the backward pass, and none of its inputs asks for a gradient."""
    h = opened()
    site, order = h.fleet.sites["a"], h.orders()["a"]
    site.build(order)
    adapter, emulator = parts(order)
    model = pair(site.base, h.method.spec(site), adapter, emulator).train()
    batch, wants = batch_of(site), []
    for number, layer in enumerate(blocks(model.get_base_model())[1]):
        layer.register_forward_hook(
            lambda _, inputs, output, number=number: wants.append(
                (number, (output[0] if isinstance(output, tuple) else output).requires_grad)
            )
        )
    plain = AutoModelForCausalLM.from_pretrained(h.server.run.model.name)
    whole = lora.inject(plain, lora.LoraSpec(4, 8, ("all-linear",)))
    sizes = [saved_by(one, batch) for one in (model, whole)]
    assert wants == [(number, number >= 5) for number in range(7)]
    assert sizes[0] < 0.35 * sizes[1]  # 2 of 8 layers, and the head
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def saved_by(model: Any, batch: Batch) -> int:
    """Numbers that are saved for the backward pass, weights left out; the pass is done."""
    found = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found.append(0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=batch.tokens, attention_mask=batch.mask).logits.sum().backward()
    return sum(found)


LOOK = """
def look(actor):
    import gc, torch
    names = {n for s in actor.sites.values() for n, p in s.base.model.named_parameters() if not p.is_meta}
    seen = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and not one.is_meta and one.layout == torch.strided:
            storage = one.untyped_storage()
            seen[storage.data_ptr()] = (storage.nbytes(), float(one.double().sum()) if one.numel() else 0.0)
    return names, list(seen.values())
"""


def test_the_whole_model_never_reaches_an_actor(run_file: Path, needs: list[str], ray_here: None) -> None:
    """Names and bytes of all tensors in the edges' processes after a round and an evaluation, and in plain files."""
    import ray

    run = load(run_file, *needs, "fleet.edges={a: {cpus: 0.1}, b: {cpus: 0.1}}")
    method: Any = make_method(run.method)
    fleet: Any = fleet_of("ray", run, method)
    try:
        fleet.open()
        server = server_site(run, method, [])
        (done,) = federate(method, fleet, server, rounds=1, seed=0)
        assert len(done.reports) == 2
        assert all(metrics["loss"] > 0 for metrics in done.evaluation.values())
        space: dict[str, Any] = {}
        exec(LOOK, space)
        found = ray.get([worker.actor.__ray_call__.remote(space["look"]) for worker in fleet.workers])
        _, files, weights = fleet.workers.equipment
        assert ray.get(weights) == Message()
        assert sum(map(len, ray.get(files).values())) < 20_000
        assert not any("safetensors" in name or name.endswith(".bin") for name in ray.get(files))
    finally:
        fleet.close()
    order = method.plan(done.state, fleet.edges, server, 0, rng_for(0, 0, "plan"))["a"]
    dropped = [
        float(p.detach().double().sum())
        for name, p in AutoModelForCausalLM.from_pretrained(run.model.name).named_parameters()
        if ".layers.4." in name and p.ndim == 2
    ]
    assert len(dropped) == 7
    for names, tensors in found:
        assert {int(name.partition(".layers.")[2].partition(".")[0]) for name in names if ".layers." in name} == set(
            range(7)
        )
        sizes = [size for size, _ in tensors]
        kept = sum(t.numel() * t.element_size() for t in order.kept.values())
        assert kept == 4 * (7 * LAYER + OUTSIDE)
        assert sum(sizes) >= kept  # the views of the order's weights are among them
        sums = [total for _, total in tensors]
        assert not any(abs(one - other) < 1e-9 for one in sums for other in dropped)


def test_what_is_held_is_sent_again_only_to_a_lost_edge(opened: Any, run_file: Path) -> None:
    """Held by content, over a resumed loop too."""
    h = opened()
    whole = list(federate(h.method, h.fleet, h.server, rounds=3, seed=0, start=Start(h.state)))
    assert {edge for edge, digests in whole[0].held.items() if digests} == set("abc")
    at = Start(whole[0].state, 1, clock_seconds=whole[0].clock_seconds, held=whole[0].held)
    again = list(federate(h.method, h.fleet, h.server, rounds=3, seed=0, start=at))
    assert [one.bytes_down for one in again] == [one.bytes_down for one in whole[1:]]
    partly = Start(whole[0].state, 1, held={edge: whole[0].held[edge] for edge in "ab"})
    fresh = next(iter(federate(h.method, h.fleet, h.server, rounds=3, seed=0, start=partly)))
    downs = {edge: outcome.cost.bytes_down for edge, outcome in fresh.outcomes.items()}
    assert downs["c"] > downs["a"] + 4 * 7 * LAYER
    assert downs["a"] == downs["b"]


def test_frozen_weights_travel_as_they_are_stored(opened: Any) -> None:
    """wire.dtype is of what is trained; a model in bfloat16 reaches the edge as such."""
    h = opened("model.dtype=bfloat16", "wire.dtype=float16")
    order = h.orders()["a"].to("float16")
    assert {t.dtype for t in order.kept.values()} == {torch.bfloat16}
    assert {t.dtype for t in order.rest.values()} == {torch.float16}
    state, reports = h.next_state()
    assert all(isinstance(report, Report) for report in reports)
    assert h.fleet.sites["a"].base.model.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in state.tensors.values())


# -- the two models


def test_a_run_reports_both_and_exports_a_plain_adapter(
    run_file: Path, needs: list[str], tmp_path: Path, deep_dir: Path, public_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The adapter loads in plain PEFT on the whole model and has LoRA on the last two layers alone."""
    out = tmp_path / "run"
    assert here("run", run_file, *needs, "local.steps=8", "--out", out) == 0
    summary = json.loads((out / "summary.json").read_text())
    server = summary["tuned"]["server"]
    assert {"loss", "adapemu.loss"} <= server.keys()
    assert server["loss"] != server["adapemu.loss"]
    assert summary["tuned"]["global"]["loss"] < summary["base"]["global"]["loss"]
    said = capsys.readouterr().out
    assert "server, adapemu" in said
    plain = AutoModelForCausalLM.from_pretrained(deep_dir)
    before = logits(plain)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert {int(name.split(".")[2]) for name in config["target_modules"]} == {6, 7}
    adapted = logits(peft.PeftModel.from_pretrained(plain, out / "adapter"))
    assert float((adapted - before).abs().max()) > 1e-3
    assert here("export", out, "--out", tmp_path / "merged", "--merge") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), adapted, rtol=0, atol=1e-5)
    assert merged.config.num_hidden_layers == 8
    capsys.readouterr()
    assert here("evaluate", out, "--data", public_file) == 0
    table = capsys.readouterr().out
    assert "adapemu" in table
    assert "data" in table


def test_a_resumed_run_is_the_same(run_file: Path, needs: list[str], tmp_path: Path) -> None:
    """Adapter, rounds and bytes: what edges hold is in the checkpoint."""
    from runs import assert_like

    whole, half = tmp_path / "whole", tmp_path / "half"
    assert here("run", run_file, *needs, "rounds=3", "local.schedule=constant", "--out", whole) == 0
    assert here("run", run_file, *needs, "rounds=1", "local.schedule=constant", "--out", half) == 0
    assert here("resume", half, "rounds=3") == 0
    assert_like(whole, half)


def test_fedot_needs_no_public_rows(run_file: Path, needs: list[str], tmp_path: Path) -> None:
    """No step of the server, no LoRA on the emulator; both splits."""
    for split in ("last", "ends"):
        method = f"method={{name: fedbiot, a: 2, beta: 0.5, split: {split}, prealign_steps: 0, align_steps: 0, eps: 0}}"
        run = load(run_file, *needs, method, "server.data=null")
        made: Any = make_method(run.method)
        made.check(server_site(run, made, []))
        fleet = SerialFleet(run, made)
        fleet.open()
        server = server_site(run, made, [])
        before = fleet.evaluate(shown(made, None, server), "test")
        *_, last = federate(made, fleet, server, rounds=2, seed=0)
        assert not made.shape(server).emulator
        layers = {0, 7} if split == "ends" else {6, 7}
        assert of_layers(last.state.tensors, layers).keys() == last.state.tensors.keys()
        after = fleet.evaluate(shown(made, last.state, server), "test")
        assert sum(after[e]["loss"] - before[e]["loss"] for e in "abc") < 0  # type: ignore[index]


def test_lora_of_an_order_is_named_by_the_edges_own_layers(opened: Any) -> None:
    h = opened()
    order = h.orders()["a"]
    adapter, emulator = parts(order)
    assert {name.split(".layers.")[1].split(".")[0] for name in adapter} == {"5", "6"}
    assert {name.split(".layers.")[1].split(".")[0] for name in emulator} == set("01234")
    assert spec_for(spec(), adapter).targets[0].startswith("model.layers.5.")
    assert all(name.startswith((KEPT, EMULATOR, "base_model.")) for name in order.tensors)
