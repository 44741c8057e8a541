"""`full`: one step by hand, the shared base left alone, what it costs, and an export that transformers loads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import here, load
from test_export import TOKENS, architecture, logits, model_folder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedpipe_ray.batches import collate, sums
from fedpipe_ray.costs import Cost
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.methods.base import FullWeights
from fedpipe_ray.model import Base
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.record import RunFolder
from fedpipe_ray.report import Report
from fedpipe_ray.run import first_view, server_site
from fedpipe_ray.site import Site, attempt

FULL = "method={name: full}"
PARAMETERS = 18 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32  # embedding (and head), layers, last norm
LINEAR = 18 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64)  # the head multiplies, the embedding only looks up


def site_of(run_file: Path, *overrides: str) -> tuple[Site, Message]:
    """Edge a of a run, opened, and the state before round 0."""
    run = load(run_file, FULL, *overrides)
    method = make_method(run.method)
    fleet = SerialFleet(run, method)
    fleet.open()
    return fleet.sites["a"], method.start(server_site(run, method, fleet.classes), rng_for(0, 0, "start"))


def copies(tensors: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors}


def test_one_step_of_one_edge_by_hand(run_file: Path) -> None:
    """All rows in one batch, no clipping: AdamW's first step is w - lr g / (|g| + 1e-8), as m = g and v = g^2."""
    site, state = site_of(run_file, "local={steps: 1, batch: 8, lr: 0.01, clip: 1e9, schedule: constant}")
    rows = site.data.train
    site.run = dataclasses.replace(site.run, local=dataclasses.replace(site.run.local, batch=len(rows)))  # each once
    update = attempt(site, Message(state.tensors), 0)[1]
    assert update is not None

    plain = AutoModelForCausalLM.from_pretrained(site.run.model.name).train()
    batch = collate(rows, list(range(len(rows))), site.base.pad_id, False)
    (sums(plain, batch, torch.device("cpu"))[0] / batch.units).backward()
    assert update.tensors.keys() == {name for name, _ in plain.named_parameters()}
    for name, p in plain.named_parameters():
        assert p.grad is not None
        clear = p.grad.abs() > 1e-5  # below, the last bits of a sum decide
        expected = p - 0.01 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(update.tensors[name][clear], expected.detach()[clear], rtol=0, atol=1e-5)
        assert clear.any()


def test_the_shared_base_is_left_alone_and_tied_weights_stand_once(run_file: Path) -> None:
    site, state = site_of(run_file)
    before = copies(site.base.model.named_parameters())
    orders = copies(state.tensors.items())
    first = attempt(site, Message(state.tensors), 0)[1]
    assert first is not None
    assert "lm_head.weight" not in state.tensors
    assert sum(t.numel() for t in first.tensors.values()) == PARAMETERS
    for name, p in site.base.model.named_parameters():
        assert torch.equal(p, before[name])
        assert not p.requires_grad
        assert torch.equal(state.tensors[name], orders[name])
        assert not torch.equal(first.tensors[name], before[name])
        assert first.tensors[name].data_ptr() != p.data_ptr()
        assert not first.tensors[name].requires_grad
    model = FullWeights(first.tensors).on(site.base)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again = attempt(site, Message(state.tensors), 0)[1]  # from the order's tensors, not from the last round's copy
    assert again is not None
    assert all(torch.equal(again.tensors[n], t) for n, t in first.tensors.items())


def test_read_only_weights_can_be_trained(run_file: Path) -> None:
    """On Ray an edge's base lies in the object store, where a write would end the process."""
    site, state = site_of(run_file)
    with torch.no_grad():
        for p in site.base.model.parameters():
            p.data = torch.frombuffer(p.numpy().tobytes(), dtype=p.dtype).view(p.shape)
    report, update = attempt(site, Message(state.tensors), 0)
    assert isinstance(report, Report)
    assert update is not None


def test_what_a_round_costs(run_file: Path) -> None:
    """6 FLOPs a trained weight and token; 4 bytes a parameter each way, 2 on a bfloat16 wire."""
    site, state = site_of(run_file, "wire={dtype: bfloat16}")
    report, update = attempt(site, Message(state.tensors), 0)
    assert isinstance(report, Report)
    assert update is not None
    assert report.cost.flops == 6 * LINEAR * report.cost.tokens
    assert Message(state.tensors).payload_bytes == report.cost.bytes_down - Message(state.tensors).header_bytes
    assert Message(state.tensors).payload_bytes == 4 * PARAMETERS
    assert update.payload_bytes == 2 * PARAMETERS


def test_average_by_samples(run_file: Path) -> None:
    """10 rows say 1, 30 say 5: (10 x 1 + 30 x 5) / 40 = 4."""
    run = load(run_file, FULL)
    method = make_method(run.method)
    state = Message({"w": torch.zeros(2)})
    reports = [
        Report(str(n), 0, n, 0.0, Cost(), fetch=lambda v=v: Message({"w": torch.full((2,), v)}))
        for n, v in ((10, 1.0), (30, 5.0))
    ]
    after = method.aggregate(state, reports, server_site(run, method, []), 0, rng_for(0, 0, "aggregate"))
    assert after.tensors["w"].tolist() == [4.0, 4.0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_export_is_a_plain_model(
    kind: str, run_file: Path, tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base = tmp_path / "run", model_folder(kind, tmp_path, model_dir)
    assert here("run", run_file, FULL, f"model.name={base}", "--out", folder) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f'model: {folder}/model (transformers.AutoModelForCausalLM.from_pretrained("{folder}/model"))' in shown
    assert "merge:" not in shown
    assert not (folder / "adapter").exists()
    run = RunFolder.open(folder).run()
    state, _ = RunFolder.open(folder).final_state(run)
    site = server_site(run, make_method(run.method), [])
    expected = logits(first_view(site, state).on(site.base))
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert float((logits(plain) - expected).abs().max()) > 0.01
    exported = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert architecture(exported) == architecture(plain)
    assert torch.equal(logits(exported), expected)
    words = AutoTokenizer.from_pretrained(folder / "model")("red green").input_ids
    assert words == AutoTokenizer.from_pretrained(base)("red green").input_ids
    files = sorted(path.name for path in (folder / "model").iterdir())
    for name, extra in (("again", ()), ("merged", ("--merge",))):
        assert here("export", folder, "--out", tmp_path / name, *extra) == 0
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == files
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), expected)
    assert not [path for path in folder.iterdir() if path.name.startswith(".model")]


def test_a_longer_run_replaces_the_model_and_evaluates(
    run_file: Path, tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluate` gives for the run's own rows the figures of the summary; with --data the base is the base's."""
    folder = tmp_path / "run"
    assert here("run", run_file, FULL, "rounds=1", "--out", folder) == 0
    first = logits(AutoModelForCausalLM.from_pretrained(folder / "model"))
    assert here("resume", folder, "rounds=2") == 0
    assert not torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder / "model")), first)
    summary = json.loads((folder / "summary.json").read_text())
    before, after = summary["base"]["global"]["loss"], summary["tuned"]["global"]["loss"]
    assert after < before
    capsys.readouterr()
    assert here("evaluate", folder) == 0
    assert f"{before:.3f} -> {after:.3f}" in " ".join(capsys.readouterr().out.split())
    assert here("evaluate", folder, "--data", data_dir / "a.jsonl") == 0
    shown = capsys.readouterr().out
    assert here("evaluate", folder, "--data", data_dir / "a.jsonl") == 0
    assert capsys.readouterr().out == shown
    assert "->" in shown


def test_classifier(run_file: Path, tmp_path: Path, model_dir: Path) -> None:
    """The head, which the checkpoint lacks, is in the state and in the export, with its classes' names."""
    folder, base = tmp_path / "run", model_folder("bert", tmp_path, model_dir)
    data = f'{{source: "{load(run_file).data.source}", task: classification, text: "{{question}}", label: kind, '
    data += "labels: [z, x, y], max_length: 16, validation: 0.2, test: 0.2}"
    assert here("run", run_file, FULL, f"model.name={base}", f"data={data}", "--out", folder) == 0
    exported = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    assert exported.config.id2label == {0: "z", 1: "x", 2: "y"}
    run = RunFolder.open(folder).run()
    state, point = RunFolder.open(folder).final_state(run)
    site = server_site(run, make_method(run.method), point.classes)
    assert torch.equal(
        exported(input_ids=TOKENS).logits, first_view(site, state).on(site.base)(input_ids=TOKENS).logits
    )
    untrained = Base.load(run.model, "classification", point.classes, run.seed).model
    assert not torch.allclose(exported.classifier.weight, untrained.classifier.weight, atol=1e-3)
