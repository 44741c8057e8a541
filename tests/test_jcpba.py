"""`jcpba`: what it plans and counts, edges without a channel, the clock, aggregation, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import assert_refused
from runs import here, load, opened_run, records, tensors
from transformers import AutoModelForCausalLM

from fedpipe_ray import lora, pruning
from fedpipe_ray.channel import rate
from fedpipe_ray.costs import Cost, training_flops
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.loop import Round, federate
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.methods.jcpba import NO_GAIN, SCORES, Jcpba, adapter_of
from fedpipe_ray.planning.wireless import KINDS
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.run import server_site
from fedpipe_ray.site import Site

METHOD = "method={name: jcpba, rank: 4, alpha: 8}"
UNITS = (2, 64)  # heads and channels of a layer


def opened(run_file: Path, *overrides: str) -> tuple[SerialFleet, Jcpba, Site, Message]:
    """As `opened_run` says."""
    fleet, method, server, state = opened_run(run_file, METHOD, *overrides)
    assert isinstance(method, Jcpba)
    return fleet, method, server, state


def orders_of(fleet: SerialFleet, method: Jcpba, server: Site, state: Message, round: int = 0) -> dict[str, Any]:
    return dict(method.plan(state, fleet.edges, server, round, rng_for(0, round, "plan")))


def rounds_of(run_file: Path, count: int, *overrides: str) -> list[Round]:
    fleet, method, server, _ = opened(run_file, *overrides)
    return list(federate(method, fleet, server, rounds=count, seed=0, evaluate_every=0))


def report(edge: str, message: Message, weight: float = 16.0) -> Report:
    return Report(edge, 0, weight, 0.0, Cost(), fetch=lambda: message)


# -- planning


def test_without_pruning_an_edge_does_what_lora_does_bit_for_bit(run_file: Path) -> None:
    run = load(run_file)
    method = make_method(run.method)
    fleet = SerialFleet(run, method)
    fleet.open()
    plain = list(federate(method, fleet, server_site(run, method, []), rounds=2, seed=0, evaluate_every=0))
    own = rounds_of(run_file, 2, "method.allocation=unpruned")
    assert all(torch.equal(own[-1].state.tensors[name], tensor) for name, tensor in plain[-1].state.tensors.items())


def test_counts_are_those_of_the_pruned_models(run_file: Path) -> None:
    """FLOPs and elements at any width, against a model of that width; and an update has so many."""
    fleet, method, server, state = opened(run_file, "method.rho_bar=0.6")
    counts, structure = method.counts(server), method.structure(server)
    for rho in (0.0, 0.2, 0.45, 0.7):
        mask = structure.kept(rho, torch.rand(2, sum(UNITS)))
        model = lora.inject(pruning.narrowed(server.bare(), structure, mask), method.spec(server))
        elements = sum(p.numel() for p in lora.parameters(model).values())
        assert counts.at(structure.widths(rho)) == pytest.approx((training_flops(model, 1), elements))
    orders = orders_of(fleet, method, server, state)
    for one in fleet.run(orders, 0):
        assert isinstance(one, Report)
        flops, elements = counts.at(structure.widths(orders[one.edge].numbers["rho"]))
        assert one.cost.flops == pytest.approx(flops * one.cost.tokens)
        assert one.message().payload_bytes == pytest.approx(4 * elements)
        assert orders[one.edge].payload_bytes == pytest.approx(4 * elements + 17)  # 2 x 66 bits


def test_only_one_side_of_a_pair_shrinks(run_file: Path) -> None:
    """So bytes fall by about half the rate: with every part at 1/2 to (1 + 1/2) / 2 or a little more."""
    _, method, server, _ = opened(run_file)
    whole, half = method.counts(server).at(UNITS)[1], method.counts(server).at((1, 32))[1]
    assert 0.7 < half / whole < 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_allocations(kind: str, run_file: Path) -> None:
    """Mean rate and bandwidth of every baseline; c computes at half the speed of the others."""
    fleet, method, server, state = opened(run_file, f"method.allocation={kind}")
    orders = orders_of(fleet, method, server, state)
    rho = np.array([order.numbers["rho"] for order in orders.values()])
    bandwidth = np.array([order.numbers["bandwidth_hz"] for order in orders.values()])
    assert bandwidth.sum() == pytest.approx(20e6)
    assert rho.mean() <= 0.3 + 1e-9
    assert bool((bandwidth == bandwidth[0]).all()) == kind.endswith("equal")
    if kind.startswith("unpruned"):
        assert not rho.any()
    if kind.startswith("uniform"):
        assert rho.tolist() == [0.3, 0.3, 0.3]
    if kind in ("pruning-equal", "bcd", "joint"):
        assert rho[2] > max(rho[:2])
        assert rho.mean() == pytest.approx(0.3)
    snr = np.array(list(method.channels(fleet.edges, server, 0).values()))
    assert rate(bandwidth, snr) == pytest.approx([order.numbers["uplink_bps"] for order in orders.values()])


def test_the_clock_is_that_of_the_plan_with_counted_bytes_and_flops(run_file: Path) -> None:
    """By hand from orders and reports; the server's forecast comes close once it knows an edge's tokens."""
    fleet, method, server, state = opened(run_file, "method.bandwidth_hz=100kHz", "local.steps=20")
    for number in range(2):
        forecast, _ = method.allocate(state, fleet.edges, server, number, rng_for(0, number, "plan"))
        orders = orders_of(fleet, method, server, state, number)
        reports = [one for one in fleet.run(orders, number) if isinstance(one, Report)]
        for one in reports:
            profile, cost = fleet.edges[one.edge], one.cost
            seconds = 8 * cost.bytes_up / orders[one.edge].numbers["uplink_bps"] + cost.flops / profile.compute_flops
            seconds += 8 * cost.bytes_down / profile.downlink_bps + 2 * profile.latency_seconds
            assert cost.virtual_seconds == pytest.approx(seconds)
        state = method.aggregate(state, reports, server, number, rng_for(0, number, "aggregate"))
    assert forecast.seconds == pytest.approx(max(one.cost.virtual_seconds for one in reports), rel=0.05)


def test_joint_is_sooner_than_equal_shares(run_file: Path) -> None:
    seconds = {
        kind: sum(one.virtual_seconds for one in rounds_of(run_file, 2, f"method.allocation={kind}", "local.steps=1",
                                                           "method.bandwidth_hz=1MHz"))
        for kind in ("unpruned-equal", "unpruned", "joint")
    }  # fmt: skip
    assert seconds["joint"] < seconds["unpruned"] < seconds["unpruned-equal"]


def test_the_distance_of_a_profile_counts(run_file: Path) -> None:
    near = opened(run_file, "fleet.edges.a.distance_m=50")
    far = opened(run_file, "fleet.edges.a.distance_m=500")
    gains = [one[1].channels(one[0].edges, one[2], 0) for one in (near, far)]
    assert gains[0]["a"] / gains[1]["a"] == pytest.approx(10**3.76)
    assert gains[0]["b"] == gains[1]["b"]


# -- a channel without gain


def test_an_edge_without_a_channel_is_left_out_with_the_reason(run_file: Path) -> None:
    """And the others share the bandwidth; it gets and sends no byte."""
    seen = set()
    for one in rounds_of(run_file, 6, "method.outage=0.4", "local.steps=1"):
        lost = {name for name, outcome in one.outcomes.items() if isinstance(outcome, Lost)}
        assert list(one.outcomes) == ["a", "b", "c"]
        seen.add(len(lost))
        for name in lost:
            outcome = one.outcomes[name]
            assert isinstance(outcome, Lost)
            assert (outcome.reason, outcome.cost) == (NO_GAIN, Cost())
    assert seen >= {0, 1} or seen >= {1, 2}


def test_a_round_in_which_nobody_is_heard_passes(run_file: Path) -> None:
    fleet, method, server, state = opened(run_file, "method.outage=1")
    assert all(isinstance(one, Lost) for one in orders_of(fleet, method, server, state).values())
    first, second = federate(method, fleet, server, rounds=2, seed=0, evaluate_every=0)
    assert (first.state.numbers["silent"], second.state.numbers["silent"]) == (1, 2)
    assert all(torch.equal(second.state.tensors[name], state.tensors[name]) for name in state.tensors)


# -- aggregation


def test_a_coordinate_is_the_mean_over_those_that_kept_it(run_file: Path) -> None:
    """a kept everything and sends 1, c was cut by 0.7 and sends 3: both kept: (16 x 1 + 48 x 3) / 64 = 2.5; else 1."""
    _fleet, method, server, state = opened(run_file)
    scores = method.scores(state, server)
    _, parts = method.part(0.7, scores, state, server)

    def update(rho: float, value: float) -> Message:
        own = method.part(rho, scores, state, server)[1]
        filled = {name: torch.full(tensor.shape, value) for name, tensor in state.tensors.items()}
        return Message(pruning.shrunk(filled, own), {"rho": rho, "tokens": 100 * value, "samples": 4})

    found = [report("a", update(0.0, 1.0)), Lost("b", "gone"), report("c", update(0.7, 3.0), 48.0)]
    after = method.aggregate(state, found, server, 0, rng_for(0, 0, "aggregate"))
    for name, tensor in after.tensors.items():
        expected = torch.full(tensor.shape, 1.0 if name in parts else 2.5)
        if name in parts:
            expected.index_fill_(*parts[name], 2.5)
        assert torch.equal(tensor, expected), name
    assert after.numbers["rho"] == pytest.approx(0.7 * 48 / 64)
    assert (after.numbers["a/tokens"], after.numbers["c/tokens"]) == (100, 300)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rho": 0.9}, "its update says that it was pruned by 0.9; method.rho_max is 0.7"),
        ({"rho": float("nan")}, "its update says that it was pruned by nan"),
        ({"rho": 0.5}, "its update has base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight in shape"),
        ({"tokens": 0.0}, "its update has no tokens"),
        ({"samples": float("inf")}, "its update has no samples"),
    ],
)
def test_unfit_updates(changes: dict[str, float], says: str, run_file: Path) -> None:
    _fleet, method, server, state = opened(run_file)
    good = {"rho": 0.0, "tokens": 1.0, "samples": 1.0}
    found = [report("a", Message(state.tensors, {**good, **changes})), report("b", Message(state.tensors, good))]
    after = method.aggregate(state, found, server, 0, rng_for(0, 0, "aggregate"))
    assert says in str(found[0].rejected)
    assert found[1].rejected is None
    assert "a/tokens" not in after.numbers


# -- scores


def test_taylor_scores_are_asked_for_now_and_then_and_kept(run_file: Path) -> None:
    fleet, method, server, state = opened(run_file, "method.score=taylor", "method.score_every=2")
    assert not state.tensors[SCORES].any()
    asked, before = [], state
    for number in range(3):
        orders = orders_of(fleet, method, server, state, number)
        asked.append([order.numbers["score"] for order in orders.values()])
        reports = [one for one in fleet.run(orders, number) if isinstance(one, Report)]
        before, state = state, method.aggregate(state, reports, server, number, rng_for(0, number, "aggregate"))
        assert torch.equal(before.tensors[SCORES], state.tensors[SCORES]) == (number == 1)
    assert asked == [[1.0] * 3, [0.0] * 3, [1.0] * 3]
    assert bool((state.tensors[SCORES] > 0).any())
    assert SCORES not in adapter_of(state)
    assert torch.equal(method.scores(state, server), state.tensors[SCORES])


# -- whole runs


@pytest.mark.parametrize(
    "overrides",
    [
        ["wire.dtype=bfloat16", "method.score=taylor", "fleet.fraction=0.67", "rounds=3"],
        ["data={source: %s, task: classification, text: '{question}', label: kind, max_length: 16}"],
    ],
    ids=["bf16, taylor", "classification"],
)
def test_a_run(overrides: list[str], run_file: Path, data_dir: Path, tmp_path: Path) -> None:
    """From the command line to an adapter of the whole width, on a task that can be learned better than none."""
    overrides = [one.replace("%s", f'"{data_dir}/{{edge}}.jsonl"') for one in overrides]
    assert here("run", run_file, METHOD, *overrides, "--out", tmp_path / "out") == 0
    found = tensors(tmp_path / "out")
    assert found["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (4, 64)
    assert records(tmp_path / "out")[-1]["method"]["rho"] > 0
    done = json.loads((tmp_path / "out" / "summary.json").read_text())
    if "base_model.model.score.weight" in found:  # the classes are drawn at random
        assert found["base_model.model.score.weight"].shape == (3, 32)
    else:
        assert done["tuned"]["global"]["loss"] < done["base"]["global"]["loss"]


def test_a_gpt2(run_file: Path, model_dir: Path, tmp_path: Path) -> None:
    """Fused Conv1D weights."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, eos_token_id=2, bos_token_id=None)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    assert here("run", run_file, METHOD, f"model.name={tmp_path / 'gpt2'}", "--out", tmp_path / "out") == 0
    assert tensors(tmp_path / "out")["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].shape == (96, 4)


# -- what it refuses


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method.rho_bar=0.8", "method.rho_bar: 0.8 must lie in [0, rho_max: 0.7]; lower it, or raise rho_max"),
        ("method.rho_max=1", "method.rho_max: 1.0 must lie in [0, 1)"),
        ("method.bandwidth_hz=0", "method.bandwidth_hz: 0 carries nothing; it must be above 0"),
        ("method.bandwidth_hz=5s", "method.bandwidth_hz ... '5s' is not a quantity in hertz; write for example 20MHz"),
        (
            "fleet.deadline_seconds=0.05",
            "method.bandwidth_hz: 2e+07 let round 1 take ... fleet.deadline_seconds is 0.05; raise one",
        ),
        ("method.radius_m=0", "method.radius_m: 0.0 must be above 0"),
        ("method.outage=1.5", "method.outage: 1.5 must lie in [0, 1]"),
        ("method.score_every=0", "method.score_every: 0 must be at least 1"),
        ("method.allocation=best", "method.allocation: 'best' is not valid"),
        ("fleet.edges.a.distance_m=0", "distance_m: 0.0 must be above 0"),
        ("fleet={mode: buffered, buffer: 2, ray: false, edges: {a: {}, b: {}}}", "fleet.mode: buffered"),
    ],
)
def test_bad_settings(
    override: str, says: str, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, "run", run_file, METHOD, override, says=says, out=tmp_path / "out")


def test_a_quantized_base_and_one_that_cannot_be_pruned(
    run_file: Path, tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the configuration alone, before anything is loaded."""
    folder = tmp_path / "packed"
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    packed = {**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (folder / "config.json").write_text(json.dumps(packed))
    (folder / "model.safetensors").unlink()
    says = f"model.name: {folder} is quantized ... name the unquantized checkpoint"
    assert_refused(capsys, "run", run_file, METHOD, f"model.name={folder}", says=says, out=tmp_path / "out")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    says = "jcpba cannot prune GPTNeoXForCausalLM: its layers are none of those of Llama ... use method.name: lora"
    assert_refused(capsys, "run", run_file, METHOD, f"model.name={folder}", says=says, out=tmp_path / "out")
