"""`fedbiot` on its edges: what travels, what it costs, what an actor holds; whole runs and the two models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fedbiot_made import FACTORS, LAYER, OUTSIDE, batch_of, of_layers, saved_by
from runs import assert_like, fleet_of, here, load
from test_export import logits
from transformers import AutoModelForCausalLM

from fedpipe_ray import lora
from fedpipe_ray.costs import matmul_parameters
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.layer_drop import blocks
from fedpipe_ray.loop import Start, federate
from fedpipe_ray.message import KEPT, Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.methods.base import shown
from fedpipe_ray.methods.fedbiot import EMULATOR, pair, parts
from fedpipe_ray.model import stored_bytes
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Report
from fedpipe_ray.run import server_site

# -- what travels, and what it costs


def test_bytes_by_arithmetic(fedbiot: Any) -> None:
    """Up: LoRA of a layers. Down: the frozen weights of 5 + 2 layers once, both LoRAs every round."""
    h = fedbiot()
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


def test_flops_count_the_emulator_forward_only(fedbiot: Any) -> None:
    """2 a weight and token below the adapter, 4 in it, 6 of its LoRA; the dropped layers not at all."""
    h = fedbiot()
    (report,) = h.fleet.run({"a": h.orders()["a"]}, 0)
    weights = 4 * 32 * 32 + 3 * 32 * 64
    passed, frozen, trained = matmul_parameters(h.fleet.sites["a"].base.model)
    assert passed == 5 * (weights + FACTORS) + 32 * 32  # the first adapted weight, too: its input wants no gradient
    assert frozen == 2 * weights - 32 * 32 + 18 * 32  # with the head
    assert trained == 2 * FACTORS
    assert (
        stored_bytes(h.fleet.sites["a"].base.model) - 4 * (7 * LAYER + OUTSIDE + 7 * FACTORS) < 1000
    )  # rotary buffers
    assert isinstance(report, Report)
    assert report.cost.flops == report.cost.tokens * (2 * passed + 4 * frozen + 6 * trained)


def test_back_propagation_stops_at_the_adapter(fedbiot: Any) -> None:
    """No tensor below it is saved for the backward pass, and none of its inputs asks for a gradient."""
    h = fedbiot()
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


def test_what_is_held_is_sent_again_only_to_a_lost_edge(fedbiot: Any, run_file: Path) -> None:
    """Held by content, over a resumed loop too."""
    h = fedbiot()
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


def test_frozen_weights_travel_as_they_are_stored(fedbiot: Any) -> None:
    """wire.dtype is of what is trained; a model in bfloat16 reaches the edge as such."""
    h = fedbiot("model.dtype=bfloat16", "wire.dtype=float16")
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
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert here("run", run_file, *needs, "rounds=3", "local.schedule=constant", "--out", whole) == 0
    assert here("run", run_file, *needs, "rounds=1", "local.schedule=constant", "--out", half) == 0
    assert here("resume", half, "rounds=3") == 0
    assert_like(whole, half)


def test_check_looks_at_the_public_rows(
    run_file: Path, needs: list[str], public_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here("check", run_file, *needs) == 0
    assert f"server: 100 rows in {public_file}" in capsys.readouterr().out
    public = f'server.data={{source: "{public_file}", prompt: "{{nothing}}", response: "{{answer}}"}}'
    assert here("check", run_file, *needs, public) == 2
    assert "nothing" in capsys.readouterr().err


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
        assert sum(after[e]["loss"] - before[e]["loss"] for e in "abc") < 0


def test_lora_of_an_order_is_named_by_the_edges_own_layers(fedbiot: Any) -> None:
    h = fedbiot()
    order = h.orders()["a"]
    adapter, emulator = parts(order)
    assert {name.split(".layers.")[1].split(".")[0] for name in adapter} == {"5", "6"}
    assert {name.split(".layers.")[1].split(".")[0] for name in emulator} == set("01234")
    assert all(name.startswith((KEPT, EMULATOR, "base_model.")) for name in order.tensors)
