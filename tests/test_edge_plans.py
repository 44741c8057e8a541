"""What FedPipe plans from: rows nobody knows yet, shares, scoring, heads, codecs, a fleet's deadline, other models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demands_made import choice, demand
from fedpipe_made import made
from runs import load
from transformers import (
    BartConfig,
    BartForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)

from fedpipe_ray import edge_plans, lora
from fedpipe_ray.demands import upload_bytes
from fedpipe_ray.errors import UserError
from fedpipe_ray.facts import Facts, facts_of
from fedpipe_ray.loop import federate
from fedpipe_ray.message import Message
from fedpipe_ray.methods import fedpipe
from fedpipe_ray.partial import joined
from fedpipe_ray.planning import Key, best
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Report
from fedpipe_ray.run import preflight
from fedpipe_ray.settings import Local, Wire
from fedpipe_ray.train import learning_rate

CLASSES = ["data.task=classification", "data.text='{question}'", "data.label=kind", "data.prompt=null"]
THIN = "fleet.edges.c.uplink_bps=1kbit/s"
SMALL: dict[str, Any] = {
    "vocab_size": 18, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EYE = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def facts(rows: int) -> Facts:
    return Facts(rows, 8.0, 8, 8.0, 0.5)


def test_epochs_of_edges_whose_rows_nobody_knows() -> None:
    """The others' median; as many steps as without epochs while nobody is known."""
    local = Local(epochs=2, batch=4)
    assert edge_plans.planned_steps(local, {"a": facts(0), "b": facts(0)}) == {"a": 20, "b": 20}
    known = {"a": facts(8), "b": facts(0), "c": facts(24)}
    assert edge_plans.planned_steps(local, known) == {"a": 4, "b": 8, "c": 12}


@pytest.mark.parametrize("known", [10, 5, 1])
@pytest.mark.parametrize("told", ["rows", "class.0"])
def test_edges_that_told_nothing_count_as_the_others(known: int, told: str) -> None:
    numbers = {f"e{i}/{name}": 30.0 for i in range(known) for name in {"rows", told}}
    shares = facts_of([f"e{i}" for i in range(10)], numbers, 8)
    assert {round(one.share, 9) for one in shares.values()} == {0.1}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_low_rank_is_no_reason_to_leave_weights_out(rank: int) -> None:
    keys = [Key(kind, kind, 0, 8, 8) for kind in "abc"]
    plan = best(keys, demand([choice(3)], max_rank=rank), np.ones(3), 100.0)
    assert plan.ranks == {"a": rank, "b": rank, "c": rank}


def test_depth_counts_from_the_top_of_the_model() -> None:
    """Where all candidates are in the lowest of four layers, its upper two have none."""
    keys, scores = [Key("a", "a", 0, 8, 8)], np.ones(1)
    low = demand([choice(1, depth=2), choice(1, step_seconds=2.0)], layers=4)
    assert best(keys, low, scores, 1.0).depth is None
    assert best(keys, replace(low, layers=1), scores, 1.0).depth == 2


def test_an_edge_without_scores_is_asked_for_them(run_file: Path) -> None:
    _, method, fleet, server = made(run_file)
    state = method.start(server, rng_for(0, 0, "start"))
    first = method.shape(server).keys[0].name
    later = Message(state.tensors, {"rounds": 1.0, f"a/mean.{first}": 0.5})
    orders = method.plan(later, fleet.edges, server, 1, rng_for(0, 1, "plan"))
    assert {edge: order.numbers["score"] for edge, order in orders.items()} == {"a": 0.0, "b": 1.0, "c": 1.0}


def test_edges_with_a_capacity_score_a_row_at_a_time(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {}

    def noted(site: Any, *others: Any) -> dict[str, float]:
        parts[site.name] = others[4]["accumulate"]
        return {}

    monkeypatch.setattr(fedpipe, "probe", noted)
    run, method, fleet, server = made(run_file, "", "fleet.edges.c.training_memory_bytes=2GiB")
    next(federate(method, fleet, server, rounds=1, seed=0))
    assert parts == {"a": 1, "b": 1, "c": run.local.batch}


def test_planned_seconds_count_the_head_and_the_scoring(run_file: Path) -> None:
    """A classifier's head travels both ways, and a round that scores goes through two more batches."""
    _, method, fleet, server = made(run_file, "", *CLASSES, THIN)
    head = method.shape(server).whole
    numbers = {"rounds": 1.0, **{f"c/mean.{key.name}": 0.5 for key in method.shape(server).keys}}
    edges = {"c": fleet.edges["c"]}
    (scored,) = edge_plans.demands(method, {}, edges, server)
    (plain,) = edge_plans.demands(method, numbers, edges, server)
    adapter = 8 * sum(key.d_in + key.d_out for key in method.shape(server).keys)
    assert head == 3 * 32
    assert scored.fixed_seconds - plain.fixed_seconds == pytest.approx(2 * plain.choices[0].step_seconds)
    down, up = (8 * 4 / bps for bps in (edges["c"].downlink_bps, edges["c"].uplink_bps))
    latency = 2 * edges["c"].latency_seconds
    assert plain.fixed_seconds == pytest.approx(latency + down * (adapter + head) + up * head)


@pytest.mark.parametrize(("wire", "bytes_a_unit"), [(Wire(), 4 * 96), (Wire(codec={"name": "bf16"}), 2 * 96)])
def test_uploads_are_counted_as_they_travel(wire: Wire, bytes_a_unit: int) -> None:
    assert upload_bytes([Key("a", "a", 0, 32, 64)], 8, wire).tolist() == [bytes_a_unit]
    less = upload_bytes([Key("a", "a", 0, 32, 64)], 8, Wire(codec={"name": "int8", "block": 64}))
    assert less[0] == 96 + 4 * (256 + 512) / 64 / 8


def test_rounds_keep_to_the_deadline_of_the_fleet(run_file: Path) -> None:
    """Not even protected steps go beyond it."""
    late = "fleet.deadline_seconds=0.15"
    run, method, fleet, server = made(run_file, "", late, "local.steps=40")
    for round in federate(method, fleet, server, rounds=3, seed=0, deadline_seconds=run.fleet.deadline_seconds):
        assert all(isinstance(one, Report) for one in round.outcomes.values()), round.outcomes


def test_a_deadline_of_the_fleet_that_an_edge_cannot_keep_is_told(
    run_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, method, fleet, server = made(run_file, "", "fleet.deadline_seconds=1s", THIN)
    method.configure(method.start(server, rng_for(0, 0, "start")), fleet.edges, server)
    assert "fleet.deadline_seconds: 1 s: the rounds of c " in caplog.text


def test_what_an_edge_measured_leaves_it_something_to_try(run_file: Path) -> None:
    """A line that holds no plan ends no run: the least there is, is tried."""
    _, method, fleet, server = made(run_file, ", bits: [16]", "fleet.edges.c.training_memory_bytes=200MiB")
    line = {
        "bits": 16, "seconds_fixed": 0, "seconds_token": 1e-3, "bytes_fixed": 190 * 2**20, "bytes_token": 100,
        "flops": 1e6, "trained": 100, "tokens": 64, "weights": 14,
    }  # fmt: skip
    numbers = {f"c/calibration.16.{name}": float(value) for name, value in line.items()}
    _, plans = method.configure(Message({}, numbers), fleet.edges, server)
    assert (plans["c"].batch, sum(plans["c"].ranks.values())) == (1, 1)


@pytest.mark.parametrize("preset", ["best", "paper"])
def test_edges_are_weighed_by_their_rows(run_file: Path, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by how much they trained on, scoring included."""
    seen: dict[str, float] = {}

    def noted(state: Any, updates: Any, samples: dict[str, float], **how: Any) -> tuple[dict[str, torch.Tensor], float]:
        seen.update(samples)
        return joined(state, updates, samples, **how)

    monkeypatch.setattr(fedpipe, "joined", noted)
    _, method, fleet, server = made(run_file, f", preset: {preset}")
    (round,) = federate(method, fleet, server, rounds=1, seed=0)
    assert seen == {edge: round.state.numbers[f"{edge}/rows"] for edge in "abc"}


@pytest.mark.parametrize("join", ["stack", "increment", "truncate", "pad"])
def test_an_edge_that_did_not_train_a_weight_counts_as_no_change(join: Any) -> None:
    a, b = "base_model.model.m.lora_A.weight", "base_model.model.m.lora_B.weight"
    draw = torch.Generator().manual_seed(0)
    state = {a: torch.randn(4, 8, generator=draw), b: torch.randn(8, 4, generator=draw)}
    same = {name: torch.zeros_like(t) for name, t in state.items()} if join == "increment" else state
    updates = {"a": Message(same), "b": Message({})}
    after, _ = joined(state, updates, {"a": 10.0, "b": 30.0}, join=join, weigh="all", rank=4)
    assert torch.allclose(after[b] @ after[a], state[b] @ state[a], atol=1e-5)


def test_the_warm_up_counts_the_steps_that_were_done() -> None:
    """After a long round a short one goes on at the full rate; a slow edge warms up by its own steps."""
    local = Local(lr=1.0, warmup_steps=10)
    assert learning_rate(local, 3, 100, warm=10) == 1.0
    assert learning_rate(local, 50, 100, warm=4) == 0.5
    assert learning_rate(local, 4, 100) == 0.5


def test_the_warm_up_of_a_run(run_file: Path) -> None:
    _, method, fleet, server = made(run_file, "", "local.warmup_steps=30")
    for round in federate(method, fleet, server, rounds=2, seed=0):
        assert all(round.state.numbers[f"{edge}/warm"] <= 30 for edge in "abc")
    done = sum(round.outcomes["c"].cost.steps for round in federate(method, fleet, server, rounds=1, seed=0))
    assert 0 < done < 30
    state = Message(round.state.tensors, {"c/warm": float(done)})
    orders = method.plan(state, fleet.edges, server, 1, rng_for(0, 1, "plan"))
    assert (orders["c"].numbers["warm"], orders["a"].numbers["warm"]) == (done, 0)


@pytest.mark.parametrize("local", [{}, {"checkpointing": True}, {"precision": "bfloat16"}])
def test_what_a_token_keeps_follows_how_it_trains(run_file: Path, local: dict[str, Any]) -> None:
    settings = [f"local.{name}={str(value).lower()}" for name, value in local.items()]
    _, plain, _, server = made(run_file)
    _, method, _, other = made(run_file, "", *settings)
    before, after = plain.shape(server), method.shape(other)
    assert (after.activation_bytes < before.activation_bytes) == bool(local)
    assert (after.context_bytes > before.context_bytes) == ("precision" in local)  # the weights in bfloat16


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (", targets: [embed_tokens]", "method.targets: model.embed_tokens is no linear layer"),
        (", plans: {zzz: {bits: 16, batch: 4, ranks: {q_proj: 4}}}", "method.plans: zzz: no such edge"),
        (", plans: {a: {bits: 16, batch: 4, ranks: {q_proj: 16}}}", "method.plans: ranks of a are above method.rank"),
    ],
)
def test_what_cannot_be_is_told_before_training(run_file: Path, more: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        preflight(load(run_file, f"method={{name: fedpipe, rank: 8, alpha: 16{more}}}"))


def other_model(kind: str, model_dir: Path, folder: Path) -> Path:
    """A small model of another kind, with the tokenizer of the tiny one."""
    shutil.copytree(model_dir, folder)
    torch.manual_seed(0)
    if kind == "mixtral":
        model: Any = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4))
    elif kind == "bart":
        model = BartForCausalLM(BartConfig(**{**SMALL, "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 32,
            "decoder_attention_heads": 2, "max_position_embeddings": 80, "bos_token_id": 0}))  # fmt: skip
    else:
        config = Gemma3Config(text_config={**SMALL, "head_dim": 16}, vision_config=EYE, mm_tokens_per_image=4)
        model = Gemma3ForConditionalGeneration(config)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["mixtral", "bart", "gemma3"])
def test_models_with_other_layers_than_linear_ones(run_file: Path, model_dir: Path, tmp_path: Path, kind: str) -> None:
    """Experts as one tensor are no candidates; a weight that no loss reaches has the score 0; a model may hold two."""
    run, method, fleet, server = made(run_file, "", f"model.name={other_model(kind, model_dir, tmp_path / kind)}")
    assert preflight(run)
    (round,) = federate(method, fleet, server, rounds=1, seed=0)
    assert all(isinstance(one, Report) for one in round.outcomes.values()), round.outcomes
    names = {lora.module_of(name) for name in round.state.tensors}
    assert not any("experts" in name or name.endswith("gate") for name in names)
    zero = {name for name in names if round.state.numbers[f"a/mean.{name}"] == 0}
    unused = {"mixtral": "nothing", "bart": "encoder_attn", "gemma3": "vision"}[kind]
    assert zero == {name for name in names if unused in name}
