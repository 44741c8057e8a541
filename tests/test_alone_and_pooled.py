"""`local` and `central`: an edge alone, and all rows in one place, against training by hand; costs and results."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from refusals import assert_refused
from runs import assert_same, fleet_of, here, load, repeatable, summary
from test_export import TOKENS
from transformers import AutoModelForCausalLM

from fedpipe_ray import lora
from fedpipe_ray.costs import training_flops
from fedpipe_ray.errors import AllEdgesLost, UserError
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.loop import Round, federate
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.methods.central import Pooled
from fedpipe_ray.methods.local import Local
from fedpipe_ray.model import Base
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Report
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Run
from fedpipe_ray.train import train

LOCAL, CENTRAL = "method={name: local, rank: 4, alpha: 8}", "method={name: central, rank: 4, alpha: 8}"
NOTHING = len("[[], {}]")  # the header of a message without tensors and numbers
Tensors = dict[str, torch.Tensor]


def only(run: Run, *edges: str) -> Run:
    """The run with these edges alone."""
    kept = {name: run.fleet.edges[name] for name in edges}
    return dataclasses.replace(run, fleet=dataclasses.replace(run.fleet, edges=kept))


def federated(run: Run, method: Any = None) -> tuple[SerialFleet, list[Round]]:
    """A fleet in this process after all rounds of the run."""
    method = method or make_method(run.method)
    fleet = SerialFleet(run, method)
    fleet.open()
    server = server_site(run, method, [])
    return fleet, list(federate(method, fleet, server, rounds=run.rounds, seed=run.seed, fraction=run.fleet.fraction))


@pytest.fixture
def alone(run_file: Path) -> Tensors:
    """Edge b's adapter after two rounds on its own rows, without method, fleet or site."""
    run = load(run_file)
    base = Base.load(run.model, "causal", [], run.seed)
    spec = lora.LoraSpec(4, 8.0, ("all-linear",))
    model = lora.attach(base, spec)
    shapes = {name: tuple(p.shape) for name, p in lora.parameters(model).items()}
    seed = int(rng_for(run.seed, 0, "start").integers(2**63))
    lora.load(model, lora.initial(shapes, torch.Generator().manual_seed(seed)))
    fleet = SerialFleet(run, make_method(run.method))
    for round in range(2):
        rng = rng_for(run.seed, round, "b")
        torch.manual_seed(int(rng.integers(2**63)))
        train(
            model, fleet.sites["b"].data.train, run.local, round=round, rounds=2, rng=rng, device=base.device,
            pad_id=base.pad_id,
        )  # fmt: skip
    return lora.read(model)


def test_an_edge_of_local_is_trained_as_if_alone(run_file: Path, alone: Tensors) -> None:
    """And as `lora` trains a fleet of that edge: the mean of one, weighted by 16 rows, is exact in binary."""
    fleet, rounds = federated(load(run_file, LOCAL))
    private = fleet.sites["b"].private
    assert private is not None
    assert_same(dict(private.tensors), alone)
    others = [fleet.sites[name].private for name in "ac"]
    assert all(one and not torch.equal(next(iter(one.tensors.values())), next(iter(alone.values()))) for one in others)
    assert rounds[-1].state == Message()
    _, (*_, last) = federated(only(load(run_file), "b"))
    assert_same(dict(last.state.tensors), alone)


def test_central_with_one_edge_is_training_on_its_rows(run_file: Path, alone: Tensors) -> None:
    _, (*_, last) = federated(only(load(run_file, CENTRAL), "b"))
    assert_same(dict(last.state.tensors), alone)


def test_central_does_the_steps_of_all_edges_on_the_clock_of_all(run_file: Path) -> None:
    """3 edges of 4 steps of 4 rows; 1 + 1 + 0.5 GFLOP/s together; with half of the edges a round, half the steps."""
    run = load(run_file, CENTRAL)
    fleet, rounds = federated(run)
    model = lora.attach(fleet.sites["a"].base, make_method(run.method).spec(fleet.sites["a"]))
    for number, done in enumerate(rounds, start=1):
        numbers = done.state.numbers
        assert (numbers["steps"], numbers["samples"]) == (12 * number, 48 * number)
        assert (done.bytes_up, done.bytes_down, done.outcomes) == (0, 0, {})
        assert np.isfinite(done.train_loss)
        assert set(done.evaluation) == {"a", "b", "c"}
    flops = np.diff([0.0, *(done.state.numbers["flops"] for done in rounds)])
    assert [done.virtual_seconds for done in rounds] == pytest.approx(list(flops / 2.5e9), rel=1e-12)
    assert rounds[-1].clock_seconds == pytest.approx(sum(flops) / 2.5e9)
    assert flops[0] % training_flops(model, 1) == 0
    half = dataclasses.replace(run, fleet=dataclasses.replace(run.fleet, fraction=0.5))
    assert federated(half)[1][0].state.numbers["steps"] == 6
    fixed = dataclasses.replace(run, method={**run.method, "steps": 5})
    assert federated(fixed)[1][0].state.numbers["steps"] == 5


def test_pooled_rows_are_those_of_all_edges_in_turn(run_file: Path) -> None:
    fleet, _ = federated(load(run_file, "rounds=1"))
    parts = tuple(site.data.train for site in fleet.sites.values())
    pooled = Pooled(parts)
    whole = [part.example(row) for part in parts for row in range(len(part))]
    assert len(pooled) == len(whole) == sum(map(len, parts))
    for index, (tokens, labels) in enumerate(whole):
        found = pooled.example(index)
        assert np.array_equal(found[0], tokens)
        assert np.array_equal(found[1], labels)
        assert pooled.length(index) == len(tokens)


@dataclass(frozen=True, kw_only=True)
class Failing(Local):
    """`local` whose edge b has no room after its steps, from the second round on; a never has."""

    def local_update(self, order: Any, site: Any, rng: Any) -> Message:
        update = super().local_update(order, site, rng)
        if site.name == "a" or (site.name == "b" and site.round >= 1):
            raise MemoryError
        return update


def test_a_lost_edge_keeps_the_model_it_had(run_file: Path) -> None:
    run = load(run_file, LOCAL, "rounds=3")
    fleet, (first, _, last) = federated(run, Failing(rank=4, alpha=8))
    assert {name for name, one in last.outcomes.items() if isinstance(one, Report)} == {"c"}
    assert last.evaluation["b"] == first.evaluation["b"]
    assert last.evaluation["c"] != first.evaluation["c"]
    base = fleet.evaluate(None, "validation")
    assert last.evaluation["a"] == base["a"]
    assert last.evaluation["b"] != base["b"]


def test_local_is_the_same_on_ray(run_file: Path, ray_here: None) -> None:
    run = load(run_file, LOCAL, "fleet.fraction=0.67")
    method = make_method(run.method)
    one = fleet_of("packed", run, method)
    try:
        one.open()
        rounds = list(federate(method, one, server_site(run, method, []), rounds=2, seed=0, fraction=0.67))
    finally:
        one.close()
    assert [(r.evaluation, r.train_loss, r.clock_seconds) for r in rounds] == [
        (r.evaluation, r.train_loss, r.clock_seconds) for r in federated(run)[1]
    ]


# -- whole runs


@pytest.fixture(scope="module")
def local_run(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_dir: Path) -> tuple[Path, Path]:
    """(run file, folder) of a run of `local` of four rounds."""
    from runs import tiny_run

    folder = tmp_path_factory.mktemp("local")
    path = tiny_run(folder, model_dir, data_dir)
    path.write_text(path.read_text().replace("rounds: 2", "rounds: 4").replace("lora", "local"))
    assert here("run", path, "local.schedule=constant", "--out", folder / "run") == 0
    return path, folder / "run"


def adapter_of(folder: Path, edge: str, round: int = 4) -> Message:
    return Message.load(folder / "private" / edge / f"round-{round:04d}.safetensors")


def test_nothing_leaves_an_edge_of_local(local_run: tuple[Path, Path]) -> None:
    _, folder = local_run
    assert not (folder / "adapter").exists()
    state = next((folder / "checkpoint").glob("*4/state.safetensors"))
    assert Message.load(state) == Message()
    for record in repeatable(folder):
        assert (record["bytes_up"], record["bytes_down"]) == (3 * NOTHING, 3 * NOTHING)
        assert all(edge["status"] == "ok" and edge["samples"] == 16 for edge in record["edges"].values())
    found = summary(folder)
    assert all(found["tuned"]["edges"][name]["loss"] < found["base"]["edges"][name]["loss"] for name in "abc")


@pytest.mark.parametrize("how", ["extended", "crashed"])
def test_local_resumes_with_the_same_bits(how: str, local_run: tuple[Path, Path], tmp_path: Path) -> None:
    path, whole = local_run
    folder = tmp_path / "run"
    if how == "extended":
        assert here("run", path, "local.schedule=constant", "rounds=2", "--out", folder) == 0
        assert here("resume", folder, "rounds=4") == 0
    else:  # in the fourth round, after its edges had written
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("summary.json", "round-0004"))
        assert here("resume", folder) == 0
    assert repeatable(folder) == repeatable(whole)
    assert summary(folder)["tuned"] == summary(whole)["tuned"]
    for edge in "abc":
        assert_same(dict(adapter_of(folder, edge).tensors), dict(adapter_of(whole, edge).tensors))


def test_evaluate_measures_each_edges_own(local_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = local_run
    found = summary(folder)
    capsys.readouterr()
    assert here("evaluate", folder) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for edge in "abc":
        before, after = (found[which]["edges"][edge]["loss"] for which in ("base", "tuned"))
        assert f"{edge} {before:.3f} -> {after:.3f}" in shown


def test_export_of_one_edge(local_run: tuple[Path, Path], tmp_path: Path, model_dir: Path) -> None:
    """Plain PEFT has the logits of the edge's adapter; b's differ. Merged, they are the same."""
    _, folder = local_run
    found: dict[str, torch.Tensor] = {}
    for edge in "ab":
        assert here("export", folder, "--edge", edge, "--out", tmp_path / edge) == 0
        plain = AutoModelForCausalLM.from_pretrained(model_dir)
        model = peft.PeftModel.from_pretrained(plain, tmp_path / edge).eval()
        own = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
        assert_same({n: p.detach() for n, p in own.items()}, dict(adapter_of(folder, edge).tensors))
        found[edge] = model(input_ids=TOKENS).logits
    assert not torch.allclose(found["a"], found["b"], atol=1e-3)
    assert here("export", folder, "--edge", "a", "--merge", "--out", tmp_path / "merged") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(input_ids=TOKENS).logits, found["a"], rtol=0, atol=1e-5)


def test_what_local_refuses(
    local_run: tuple[Path, Path], tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = local_run
    out = tmp_path / "out"
    says = "local has no model for all edges ... export RUN --edge NAME"
    assert_refused(capsys, "export", folder, says=says, out=out)
    assert_refused(capsys, "export", folder, "--edge", "d", says="no such edge; the edges are a, b, c", out=out)
    assert_refused(capsys, "evaluate", folder, "--data", data_dir / "a.jsonl", says="local has no model for all edges")
    assert_refused(capsys, "check", path, "evaluate.keep=best", says="evaluate.keep: best ... evaluate.keep: last")
    assert_refused(capsys, "check", path, "fleet.mode=buffered", "fleet.buffer=2", says="Local cannot use updates")
    gone = tmp_path / "gone"
    shutil.copytree(folder, gone)
    shutil.rmtree(gone / "private")
    for point in (gone / "checkpoint").glob("*/manifest.json"):  # where an edge of another machine wrote
        point.write_text(point.read_text().replace(str(folder / "private"), str(gone / "private")))
    assert_refused(capsys, "export", gone, "--edge", "a", says="edge a: its private state cannot be restored", out=out)


def test_central_leaves_one_adapter_and_resumes(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (CENTRAL, "local.schedule=constant")
    assert here("run", run_file, *settings, "rounds=1", "--out", tmp_path / "run") == 0
    assert here("resume", tmp_path / "run", "rounds=2") == 0
    assert here("run", run_file, *settings, "--out", tmp_path / "whole") == 0
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert repeatable(tmp_path / "run") == repeatable(tmp_path / "whole")
    assert summary(tmp_path / "whole")["totals"]["bytes_up"] == 0
    line = json.loads((tmp_path / "whole" / "rounds.jsonl").read_text().splitlines()[1])
    assert (line["edges"], line["method"]["steps"]) == ({}, 24)
    says = "--edge a: central has one result for all edges"
    assert_refused(capsys, "export", tmp_path / "run", "--edge", "a", says=says, out=tmp_path / "out")


def test_what_central_refuses(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = ("fleet.ray=true", "fleet.address=10.0.0.1:6379")
    says = "fleet.address: 10.0.0.1:6379: central reads the rows of all edges on one machine ... fleet.ray: false"
    assert_refused(capsys, "check", run_file, CENTRAL, *cluster, says=says)
    assert_refused(capsys, "check", run_file, "method={name: central, steps: 0}", says="method.steps: 0")
    run = load(run_file, CENTRAL, "fleet.edges.b.data=/nowhere/b.jsonl")
    method = make_method(run.method)
    with pytest.raises(UserError, match=r"those of edge b cannot be read here: .*/nowhere/b.jsonl.* method.name: lora"):
        method.start(server_site(run, method, []), rng_for(0, 0, "start"))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    run = load(run_file, CENTRAL, "fleet.ray=true")
    with pytest.raises(UserError, match="central reads the rows of all edges on one machine"):
        method.start(server_site(run, method, []), rng_for(0, 0, "start"))


def test_central_that_diverges_ends_as_a_run_without_edges(run_file: Path) -> None:
    with pytest.raises(AllEdgesLost, match=r"edge server: diverged: loss nan"):
        federated(load(run_file, CENTRAL, "local.lr=1e30"))
