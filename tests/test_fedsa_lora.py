"""FedSA-LoRA: B stays on the edge, survives a resume, and is evaluated there; the export says what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from factor_rounds import SUM_M, Rounds
from runs import assert_same, fleet_of, here, load, manifest, opened_run, summary
from safetensors.torch import load_file
from test_export import logits
from transformers import AutoModelForCausalLM

from fedpipe_ray.factors import factor
from fedpipe_ray.loop import federate
from fedpipe_ray.methods.base import LoraWeights
from fedpipe_ray.record import RunFolder

SETTINGS = ("method={name: fedsa_lora, rank: 2, alpha: 4}", "local.schedule=constant")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_dir: Path) -> Path:
    from runs import tiny_run

    return tiny_run(tmp_path_factory.mktemp("fedsa"), model_dir, data_dir)


@pytest.fixture(scope="module")
def whole(file: Path) -> Path:
    """The folder of a run of three rounds."""
    folder = file.parent / "whole"
    assert here("run", file, *SETTINGS, "rounds=3", "--out", folder) == 0
    return folder


def shared(folder: Path) -> dict[str, Any]:
    return dict(RunFolder.open(folder).load_checkpoint().start.state.tensors)


def test_b_is_in_no_message_and_each_edge_s_own(file: Path) -> None:
    rounds = Rounds(file, *SETTINGS)
    orders, updates = rounds.next()
    for message in (rounds.state, *orders.values(), *updates.values()):
        assert {factor(name) for name in message.tensors} == {"A"}
    own = {edge: site.private for edge, site in rounds.fleet.sites.items()}
    for private in own.values():
        assert private is not None
        assert {factor(name) for name in private.tensors} == {"B"}
        assert private.payload_bytes == 4 * 2 * SUM_M
        assert all(tensor.any() for tensor in private.tensors.values())
    name = next(iter(own["a"].tensors))
    assert not torch.equal(own["a"].tensors[name], own["b"].tensors[name])


def test_each_edge_is_evaluated_with_its_own_b(file: Path) -> None:
    """As the model of A and its B by hand; an edge that never took part has the base model, whatever A is."""
    rounds = Rounds(file, *SETTINGS)
    base = rounds.fleet.evaluate(None, "test")
    assert rounds.fleet.evaluate(rounds.state, "test") == base
    rounds.next()
    sites = rounds.fleet.sites
    found = rounds.fleet.evaluate(rounds.state, "test")
    for site in sites.values():
        whole = {**rounds.state.tensors, **site.private.tensors}
        assert found[site.name] == site.measure(LoraWeights(rounds.method.spec(site), whole).on(site.base), "test")
        assert found[site.name]["loss"] < base[site.name]["loss"]
    sites["a"].private = sites["b"].private  # what a failed attempt might leave is not looked at
    assert rounds.fleet.evaluate(rounds.state, "test") == found
    sites["a"]._rests = {}
    assert rounds.fleet.evaluate(rounds.state, "test") == {**found, "a": base["a"]}


def test_private_state_survives_a_resume(whole: Path, file: Path, tmp_path: Path) -> None:
    """Two rounds and one more are three: the same A, the same B on each edge, the same quality."""
    folder = tmp_path / "run"
    assert here("run", file, *SETTINGS, "rounds=2", "--out", folder) == 0
    assert here("resume", folder, "rounds=3") == 0
    assert_same(shared(folder), shared(whole))
    one, other = manifest(folder)["private"], manifest(whole)["private"]
    assert set(one) == {"a", "b", "c"}
    assert {edge: rest["sha256"] for edge, rest in one.items()} == {e: rest["sha256"] for e, rest in other.items()}
    assert summary(folder)["tuned"] == summary(whole)["tuned"]
    assert not any("lora_B" in name for name in load_file(folder / "checkpoint" / "round-0003" / "state.safetensors"))


def test_evaluation_afterwards_brings_private_state_back(
    whole: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = summary(whole)["tuned"]["global"]["loss"]
    assert found < summary(whole)["base"]["global"]["loss"]
    capsys.readouterr()
    assert here("evaluate", whole) == 0
    assert f"-> {found:.3f}" in " ".join(capsys.readouterr().out.split())


def test_on_ray_an_edge_takes_up_its_own(file: Path, whole: Path, ray_here: None) -> None:
    """What another fleet left on disk, by path and hash; then a round, with the bits of this process's fleet."""
    run = load(file, *SETTINGS, "rounds=4")
    point = RunFolder.open(whole).load_checkpoint()
    found = []
    for kind in ("serial", "packed"):
        _, method, server, _ = opened_run(file, *SETTINGS, "rounds=4")
        fleet = fleet_of(kind, run, method)
        try:
            fleet.open()
            fleet.restore(3, point.start.private)
            before = fleet.evaluate(point.start.state, "test")
            (last,) = federate(method, fleet, server, rounds=4, seed=0, start=point.start)
            found.append((before, last.evaluation, last.state.tensors))
        finally:
            fleet.close()
    assert found[0][0] == found[1][0] == summary(whole)["tuned"]["edges"]
    assert found[0][1] == found[1][1]
    assert_same(found[0][2], found[1][2])


def test_there_is_no_global_adapter(
    whole: Path, file: Path, tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not (whole / "adapter").exists()
    capsys.readouterr()
    for refused in (
        ("export", whole, "--out", tmp_path / "m"),
        ("export", whole, "--out", tmp_path / "m", "--merge"),
        ("evaluate", whole, "--data", data_dir / "a.jsonl"),
    ):
        assert here(*refused) == 2
        assert "fedsa_lora has no model for all edges" in capsys.readouterr().err
    assert here("run", file, *SETTINGS, "evaluate.keep=best", "--out", tmp_path / "best") == 2
    assert "evaluate.keep: best" in capsys.readouterr().err


def test_an_edge_exports_its_own_adapter(whole: Path, file: Path, tmp_path: Path) -> None:
    """Shared A and own B: a plain PEFT adapter that computes what the edge evaluates."""
    assert here("export", whole, "--edge", "a", "--out", tmp_path / "a") == 0
    own = max((whole / "private" / "a").glob("round-*.safetensors"))
    exported = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert_same(dict(exported), {**shared(whole), **load_file(own)})

    fleet, method, _, _ = opened_run(file, *SETTINGS)
    point = RunFolder.open(whole).load_checkpoint()
    fleet.restore(3, point.start.private)
    site = fleet.sites["a"]
    site.private = site.private_before(3)
    expected = logits(method.weights(point.start.state, site)["personal"].on(site.base))
    plain = AutoModelForCausalLM.from_pretrained(site.run.model.name)
    assert float((logits(plain) - expected).abs().max()) > 1e-3
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "a")
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-6)


def test_magnitudes_stay_with_b(file: Path) -> None:
    rounds = Rounds(file, "method={name: fedsa_lora, rank: 2, variant: dora}")
    before = rounds.fleet.evaluate(rounds.state, "test")
    base = rounds.fleet.evaluate(None, "test")
    assert before["a"]["loss"] == pytest.approx(base["a"]["loss"], rel=1e-5)
    _, updates = rounds.next()
    assert {factor(name) for name in updates["a"].tensors} == {"A"}
    private = rounds.fleet.sites["a"].private
    assert {name.rpartition(".lora_")[2] for name in private.tensors} == {"B.weight", "magnitude_vector"}
    assert rounds.fleet.evaluate(rounds.state, "test")["a"]["loss"] < base["a"]["loss"]
