"""FedPipe: orders act as the whole global adapter, updates of unequal rank join exactly, plans keep to capacities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fedpipe_made import FEDPIPE, made
from refusals import assert_refused
from runs import here, load, tensors
from toys import llama

from fedpipe_ray import lora
from fedpipe_ray.attention import attention_of
from fedpipe_ray.demands import base_bytes, demand_of, upload_bytes
from fedpipe_ray.errors import UserError
from fedpipe_ray.facts import facts_of
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.loop import federate
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.methods.fedpipe import FedPipe
from fedpipe_ray.partial import TAIL, joined, misfit, part_of, whole_of
from fedpipe_ray.places import kinds_of, layers_of
from fedpipe_ray.probe import ranks_of
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.record import RunFolder
from fedpipe_ray.report import Report
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Wire
from fedpipe_ray.site import Site

TOKENS = torch.tensor([[3, 9, 17, 5, 10], [4, 4, 11, 12, 8]])  # [rows, length]
STACK: dict[str, Any] = {"join": "stack", "weigh": "equal", "rank": 8}
UNEVEN = "fleet.edges.c.uplink_bps=20kbit/s"  # so slow that its rank must be low


def names_of(module: str) -> tuple[str, str]:
    """The PEFT keys of a module's factors: (A, B)."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def random_state(method: FedPipe, server: Site) -> Message:
    """A global adapter that does something."""
    state = method.start(server, rng_for(0, 0, "start"))
    draw = torch.Generator().manual_seed(1)
    return Message({name: torch.randn(t.shape, generator=draw) / 8 for name, t in state.tensors.items()})


@pytest.mark.parametrize("join", ["stack", "increment"])
def test_an_order_acts_as_the_whole_global_adapter(run_file: Path, join: str) -> None:
    """Whatever an edge is given to train, before it trains its model is the global one."""
    _, method, fleet, server = made(run_file, f", join: {join}", UNEVEN)
    state = random_state(method, server)
    orders = method.plan(state, fleet.edges, server, 0, rng_for(0, 0, "plan"))
    base = server.base
    whole = lora.attach(base, method.spec(server))
    lora.load(whole, state.tensors)
    wanted = whole(TOKENS).logits
    kept = {}
    for edge, order in orders.items():
        own = {name: t for name, t in order.tensors.items() if not name.startswith(TAIL)}
        rest = {name.removeprefix(TAIL): t for name, t in order.tensors.items() if name.startswith(TAIL)}
        spec = method.spec(server)
        kept[edge] = max(ranks_of(own).values())
        uneven = (lora.LoraSpec.uneven(spec, ranks_of(part)) for part in (own, rest) if part)
        model = lora.attach(base, *uneven)
        lora.load(model, own)
        if rest:
            lora.load(model, rest, frozen=True)
        assert torch.allclose(model(TOKENS).logits, wanted, atol=1e-5)
        assert set(lora.parameters(model)) == set(own)
    assert kept["c"] < kept["a"]


def test_whole_of_puts_the_tail_behind(run_file: Path) -> None:
    _, method, fleet, server = made(run_file, "", UNEVEN)
    state = random_state(method, server)
    for order in method.plan(state, fleet.edges, server, 0, rng_for(0, 0, "plan")).values():
        whole = whole_of(order.tensors)
        assert all(torch.equal(whole[name], tensor) for name, tensor in state.tensors.items())


def test_unchanged_updates_change_nothing_and_one_edge_counts_alone(run_file: Path) -> None:
    """G + sum p_i (B_i A_i - B_i0 A_i0): with one edge of full rank the next global product is that edge's own."""
    _, method, _, server = made(run_file)
    state = random_state(method, server)
    same, lost = joined(state.tensors, {"a": Message(state.tensors)}, {"a": 1.0}, **STACK)
    draw = torch.Generator().manual_seed(2)
    other = {name: torch.randn(t.shape, generator=draw) for name, t in state.tensors.items()}
    own, _ = joined(state.tensors, {"a": Message(other)}, {"a": 1.0}, **STACK)
    assert lost < 1e-6
    for module in {lora.module_of(name) for name in state.tensors}:
        name_a, name_b = names_of(module)
        before = state.tensors[name_b] @ state.tensors[name_a]
        assert torch.allclose(same[name_b] @ same[name_a], before, atol=1e-5)
        assert torch.allclose(own[name_b] @ own[name_a], other[name_b] @ other[name_a], atol=1e-4)


def test_a_weight_that_nobody_trained_stays(run_file: Path) -> None:
    _, method, _, server = made(run_file)
    state = random_state(method, server)
    module = lora.module_of(next(iter(state.tensors)))
    part = {name: torch.zeros_like(state.tensors[name]) for name in names_of(module)}
    after, _ = joined(state.tensors, {"a": Message(part)}, {"a": 1.0}, **STACK)
    changed = {lora.module_of(name) for name in after if not torch.equal(after[name], state.tensors[name])}
    assert changed == {module}


@pytest.mark.parametrize("join", ["stack", "truncate", "pad", "increment"])
@pytest.mark.parametrize("preset", ["best", "paper"])
def test_every_rule_and_preset_learns(run_file: Path, join: str, preset: str) -> None:
    run, method, fleet, server = made(run_file, f", join: {join}, preset: {preset}", UNEVEN)
    before = sum(metrics["loss"] for metrics in fleet.evaluate(None, "validation").values())
    *_, last = federate(method, fleet, server, rounds=3, seed=run.seed)
    assert sum(found["loss"] for found in last.evaluation.values()) < before
    assert 0 <= last.state.numbers["residual"] < 1


def test_the_paper_preset_adapts_attention_alone(run_file: Path) -> None:
    _, method, _, server = made(run_file, ", preset: paper")
    kinds = {lora.module_of(name).rpartition(".")[2] for name in method.start(server, rng_for(0, 0, "s")).tensors}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_what_paper_does_not_know_of_a_model_is_told() -> None:
    assert attention_of(["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"]) == ["c_attn", "attn.c_proj"]
    with pytest.raises(UserError, match=r"paper knows q_proj, v_proj; name method\.targets"):
        attention_of(["layers.0.mixer.q_proj", "layers.0.mixer.v_proj", "layers.0.mixer.merge"])


def test_kinds_are_places_in_a_layer() -> None:
    """BERT calls four linear layers `dense`, GPT-2 two `c_proj`."""
    parts = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    names = [*(f"bert.encoder.layer.{i}.{part}" for i in range(2) for part in parts), "bert.pooler.dense"]
    kinds, layers = kinds_of(names), layers_of(names)
    own = ["query", "attention.output.dense", "intermediate.dense", "output.dense"]
    assert [kinds[name] for name in names] == own + own + ["pooler.dense"]
    assert [layers[name] for name in names] == [0] * 4 + [1] * 5
    names = [f"h.{i}.{part}" for i in range(2) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    assert list(kinds_of(names).values()) == ["c_attn", "attn.c_proj", "mlp.c_proj"] * 2
    assert set(kinds_of([f"layers.0.experts.{i}.up_proj" for i in range(4)]).values()) == {"up_proj"}


@pytest.mark.parametrize("score", ["gradient", "svd", "sensitivity", "sigma", "random"])
def test_every_candidate_is_scored_also_those_not_selected(run_file: Path, score: str) -> None:
    _, method, fleet, server = made(run_file, f", score: {score}, preset: paper, targets: all-linear")
    state = method.start(server, rng_for(0, 0, "start"))
    reports = fleet.run(method.plan(state, fleet.edges, server, 0, rng_for(0, 0, "plan")), 0)
    after = method.aggregate(state, reports, server, 0, rng_for(0, 0, "aggregate"))
    shape = method.shape(server)
    for edge in fleet.edges:
        means = [after.numbers[f"{edge}/mean.{key.name}"] for key in shape.keys]
        assert len(means) == 14
        assert min(means) > 0
        assert after.numbers[f"{edge}/rows"] > 0


def test_bits_change_between_rounds_and_the_adapter_still_trains(run_file: Path) -> None:
    """16, then 4, then 8 bits on one edge, in one process."""
    from fedpipe_ray.model import stored_bytes

    _, method, fleet, server = made(run_file)
    state = method.start(server, rng_for(0, 0, "start"))
    order = method.plan(state, fleet.edges, server, 0, rng_for(0, 0, "plan"))["a"]
    sizes = {}
    for bits in (16, 4, 8):
        changed = Message(order.tensors, {**order.numbers, "bits": bits})
        (report,) = fleet.run({"a": changed}, 0)
        assert isinstance(report, Report), report.traceback
        update = report.message()
        assert any(not torch.equal(t, order.tensors[name]) for name, t in update.tensors.items())
        lora.detach(fleet.sites["a"].base)
        sizes[bits] = stored_bytes(fleet.sites["a"].base.model)
    assert sizes[16] > max(sizes[8], sizes[4])  # so small a model's constants weigh more than its weights


def test_an_edge_evaluates_in_the_bits_it_trained_in_also_when_it_is_new(run_file: Path) -> None:
    run, method, fleet, server = made(run_file, ", bits: [4]")
    *_, last = federate(method, fleet, server, rounds=1, seed=run.seed)
    again = SerialFleet(run, method)
    again.open()
    assert again.evaluate(last.state, "test") == fleet.evaluate(last.state, "test")
    assert {site.bits for site in again.sites.values()} == {4}
    assert server.bits == 16


def test_an_edge_never_holds_more_bits_than_it_may_or_has_room_for(run_file: Path) -> None:
    _, _, fleet, _ = made(run_file, ", bits: [4, 8]")
    assert {site.bits for site in fleet.sites.values()} == {8}
    room = base_bytes(fleet.sites["a"].bare(), 8, classifier=False)
    _, _, fleet, _ = made(run_file, "", f"fleet.edges.a.training_memory_bytes={room}")
    assert {name: site.bits for name, site in fleet.sites.items()} == {"a": 8, "b": 16, "c": 16}


def test_a_model_that_cannot_be_packed_says_which_layers_it_has() -> None:
    from fedpipe_ray.model import require_packed

    with pytest.raises(UserError, match=r"bits: 4: bitsandbytes packs none of the layers of x \(Embedding, Linear, "):
        require_packed(llama(), 4, "x")


def test_base_bytes_are_those_of_the_loaded_model(run_file: Path) -> None:
    from fedpipe_ray.model import stored_bytes

    *_, server = made(run_file)
    whole = server.base.model
    for bits in (8, 4):
        loaded = server.load_base([], bits).model
        assert base_bytes(whole, bits, classifier=False) == pytest.approx(stored_bytes(loaded), rel=0.01)


@pytest.mark.parametrize("rank", [8, 2])
def test_planned_seconds_are_those_that_the_clock_then_counts(run_file: Path, rank: int) -> None:
    """With as many tokens a row as a round had, a plan for it counts the FLOPs that the round counted."""
    _, method, fleet, server = made(run_file)
    state, keys = random_state(method, server), method.shape(server).keys
    part = part_of(state.tensors, {key.name: rank for key in keys}, "stack", {})
    numbers = {"bits": 16.0, "batch": 4.0, "steps": 5.0, "score": 0.0, "calibrate": 0.0, "warm": 0.0}
    (report,) = fleet.run({"a": Message(part, numbers)}, 0)
    assert isinstance(report, Report), report.traceback
    profile, cost = fleet.edges["a"], report.cost
    facts = facts_of({"a": profile}, {"a/tokens": cost.tokens / cost.samples}, server.run.data.max_length)["a"]
    (choice,) = demand_of(
        "a", profile, method.shape(server), facts, rank=8, wire="float32", upload=upload_bytes(keys, 8, Wire()),
        bits=[16], batch=1, depths=[None], steps=1, min_steps=1, max_steps=1,
    ).choices  # fmt: skip
    counted = (choice.step_seconds + rank * choice.step_seconds_rank.sum()) * profile.compute_flops * cost.samples
    assert counted == pytest.approx(cost.flops, rel=0.02)  # the plan takes the first weight's input for trained too


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(2)}, "differ in 1 tensors, the first x"),
        ({"A": torch.zeros(9, 32), "B": torch.zeros(32, 9)}, "in shape [9, 32], the global adapter [8, 32]"),
        ({"A": torch.zeros(2, 32)}, "in shape [2, 32], the global adapter [8, 32]"),
        ({"A": torch.zeros(2, 32), "B": torch.zeros(32, 3)}, "in shape [2, 32], the global adapter [8, 32]"),
        ({"A": torch.full((2, 32), torch.nan), "B": torch.zeros(32, 2)}, "NaN or infinity in "),
    ],
)
def test_an_update_that_does_not_fit_is_refused(change: dict[str, torch.Tensor], says: str) -> None:
    name_a, name_b = names_of("layer.0.q_proj")
    state = {name_a: torch.zeros(8, 32), name_b: torch.zeros(32, 8)}
    names = {"A": name_a, "B": name_b}
    found = misfit(Message({names.get(name, name): tensor for name, tensor in change.items()}), state)
    assert found is not None
    assert says in found
    assert misfit(Message({name_a: torch.zeros(2, 32), name_b: torch.zeros(32, 2)}), state) is None


def test_plan_prints_and_writes_what_each_edge_gets_and_trains_nothing(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    small = "fleet.edges.c.training_memory_bytes=140MiB"
    assert here("plan", run_file, FEDPIPE % "", UNEVEN, small, "--out", out) == 0
    found = json.loads(out.read_text())
    said = capsys.readouterr().out
    assert list(found["edges"]) == ["a", "b", "c"]
    for edge, plan in found["edges"].items():
        assert plan["ranks"]
        assert plan["capacity_bytes"] is None or plan["memory_bytes"] <= plan["capacity_bytes"]
        assert f"\n{edge} " in said
    assert max(found["edges"]["c"]["ranks"].values()) < max(found["edges"]["a"]["ranks"].values())
    assert list(tmp_path.glob("runs")) == []


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["method={name: fedpipe, bits: [5]}"], "method.bits: [5] must be some of 4, 8 and 16"),
        (["method={name: fedpipe, targets: [q_prj]}"], "method.targets: no module q_prj; there are"),
        (["method={name: fedpipe, deadline_seconds: 0}"], "method.deadline_seconds: 0.0 must be above 0"),
        (["method={name: fedpipe, penalty: -1}"], "method.penalty: -1.0 must be at least 0"),
        (
            ["method={name: fedpipe}", "fleet.edges.b.training_memory_bytes=1MiB"],
            "edge b: rank 1 on one weight at 8 bits and batch 1 needs ",
        ),
    ],
)
def test_bad_input(
    overrides: list[str], says: str, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, "run", run_file, *overrides, says=says, out=tmp_path / "out")


def test_plan_needs_a_method_that_plans(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert here("plan", run_file) == 2
    assert "method.name: lora gives every edge the same; fedpipe is the one that plans" in capsys.readouterr().err


def test_nobody_meets_the_deadline(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ("method={name: fedpipe, rank: 8, alpha: 16, deadline_seconds: 0.001}",)
    assert here("plan", run_file, *overrides, "--out", tmp_path / "plan.json") == 0
    assert "no edge meets 0.001 s; under-training rates: a " in capsys.readouterr().out


def test_a_run_exports_one_adapter_and_merges_with_no_added_parameter(run_file: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    run, merged = tmp_path / "run", tmp_path / "merged"
    assert here("run", run_file, FEDPIPE % "", UNEVEN, "--out", run) == 0
    assert here("export", run, "--out", merged, "--merge") == 0
    name = load(run_file).model.name
    base = AutoModelForCausalLM.from_pretrained(name)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    count = [sum(p.numel() for p in model.parameters()) for model in (base, plain)]
    tuned = peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    assert torch.allclose(plain(TOKENS).logits, tuned(TOKENS).logits, atol=1e-5)
    assert count[0] == count[1]
    assert type(plain) is type(base)
    assert tensors(run)


def test_a_classifier_and_its_head(run_file: Path, tmp_path: Path) -> None:
    """The head is averaged with equal weights, and every edge tells how many rows of each class it holds."""
    settings = {"task": "classification", "text": "{question}", "label": "kind", "prompt": "null", "response": "null"}
    data = [f"data.{name}={value!r}" if name == "text" else f"data.{name}={value}" for name, value in settings.items()]
    out = tmp_path / "run"
    assert here("run", run_file, FEDPIPE % "", *data, "--out", out) == 0
    run = RunFolder.open(out).run()
    state, point = RunFolder.open(out).final_state(run)
    for edge in "abc":
        counts = [state.numbers.get(f"{edge}/class.{kind}", 0.0) for kind in range(3)]
        assert sum(counts) == state.numbers[f"{edge}/rows"]
    head = next(name for name in tensors(out) if ".lora_" not in name)
    server = server_site(run, make_method(run.method), point.classes)
    untrained = lora.read(lora.attach(server.base, lora.LoraSpec(1, 1, ("q_proj",), task="classification")))
    assert not torch.equal(state.tensors[head], untrained[head])


def test_ranks_grow_over_the_rounds_where_the_link_is_what_limits_them(run_file: Path) -> None:
    run, method, fleet, server = made(run_file, ", deadline_seconds: 6", UNEVEN, "rounds=5")
    state = method.start(server, rng_for(0, 0, "start"))
    ranks = []
    for done in range(run.rounds):
        numbers = {**state.numbers, "rounds": float(done)} if done else state.numbers
        _, plans = method.configure(Message(state.tensors, numbers), fleet.edges, server)
        assert set(plans["a"].ranks.values()) == {8}
        ranks.append(sum(plans["c"].ranks.values()))
    assert ranks == sorted(ranks)
    assert ranks[-1] >= 2 * ranks[0]
