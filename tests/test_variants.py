"""rsLoRA and DoRA: the scale, magnitudes in and out of a model, and exports that plain PEFT computes with."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import peft
import pytest
import torch
from factor_rounds import Rounds, classes
from methods_made import needs_of
from runs import assert_same, load, tiny_run
from test_export import logits, model_folder
from toys import llama
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedpipe_ray import lora
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.loop import federate
from fedpipe_ray.lora import LoraSpec
from fedpipe_ray.methods import METHODS, make_method, method_class
from fedpipe_ray.run import first_view, server_site
from fedpipe_ray.settings import Run


@pytest.mark.parametrize(("variant", "scale"), [("plain", 3.0), ("rslora", 6.0), ("dora", 3.0)])
def test_the_scale_is_peft_s_at_every_rank(variant: lora.Variant, scale: float) -> None:
    """alpha 12, rank 4: 12 / 4, and 12 / sqrt 4; the same at another rank, of all modules or of one."""
    like = LoraSpec(4, 12, ("q_proj", "o_proj"), variant=variant)
    ranks = {"model.layers.0.self_attn.q_proj": 1, "model.layers.1.mlp.up_proj": 3}
    for spec in (like, like.at(1), like.at(9), LoraSpec.uneven(like, ranks)):
        found = [layer.scaling["default"] for _, layer in lora.layers(lora.inject(llama(), spec))]
        assert spec.scale == pytest.approx(scale)
        assert found == pytest.approx([scale] * len(found))
    assert like.at(4) is like


def keys_of(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(method_class(name))}


@pytest.mark.parametrize("name", [name for name in METHODS if "variant" in keys_of(name)])
def test_rslora_is_lora_at_another_scale(
    name: str, tmp_path: Path, model_dir: Path, data_dir: Path, deep_dir: Path, public_file: Path
) -> None:
    """alpha 8 / sqrt 4 is 16 / 4, on server and edges, at every rank that an edge may have: the same bits."""
    run = load(
        tiny_run(tmp_path, model_dir, data_dir),
        *needs_of(name, tmp_path, model_dir, data_dir, deep_dir, public_file), "local={steps: 1, batch: 2}",
        "fleet={ray: false, edges: {a: {}, b: {}}}",
    )  # fmt: skip
    uneven = {"ranks": {"b": 1}} if "ranks" in keys_of(name) else {}
    early = {"slora": {"sparse_rounds": 1}, "fedbiot": {"eps": 1.0, "prealign_steps": 1, "align_steps": 1}}
    own = {**run.method, "rank": 4, **uneven, **early.get(name, {})}
    scales = [{"alpha": 16}, {"variant": "rslora", "alpha": 8}]
    assert_same(*(two_rounds(dataclasses.replace(run, method={**own, **one})) for one in scales))


def two_rounds(run: Run) -> dict[str, torch.Tensor]:
    """The state after them, and what edges keep."""
    method = make_method(run.method)
    fleet = SerialFleet(run, method)
    fleet.open()
    *_, last = federate(method, fleet, server_site(run, method, []), rounds=2, seed=0, evaluate_every=0)
    private = {edge: site.private for edge, site in fleet.sites.items() if site.private is not None}
    own = {f"{edge}/{key}": t for edge, message in private.items() for key, t in message.tensors.items()}
    return {**last.state.tensors, **own}


@pytest.mark.parametrize("name", ["central", "fedprox", "local", "scaffold"])
def test_dora_trains_magnitudes(name: str, run_file: Path) -> None:
    """They begin as the norms of the base's rows, and move."""
    run = load(run_file, f"method={{name: {name}, rank: 4, variant: dora}}", "local.steps=1")
    found = {key: t for key, t in two_rounds(run).items() if "/" not in key or name == "local"}
    plain = AutoModelForCausalLM.from_pretrained(run.model.name)
    names = [key for key in found if key.endswith(".lora_magnitude_vector") and not key.startswith("control.")]
    assert len(names) == (3 * 14 if name == "local" else 14)
    for key in names:
        norms = plain.get_submodule(lora.module_of(key.partition("/")[2] or key)).weight.detach().norm(dim=1)
        assert not torch.equal(found[key], norms)
        torch.testing.assert_close(found[key], norms, rtol=0.2, atol=0.1)


def test_names_of_magnitudes_are_those_of_peft() -> None:
    ours = lora.inject(llama(), LoraSpec(2, 4, ("v_proj",), variant="dora"))
    assert lora.read(ours).keys() == peft.get_peft_model_state_dict(ours).keys()


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("llama", "lora, variant: rslora"),
        ("llama", "lora, variant: dora, dropout: 0.1"),
        ("gpt2", "lora, variant: dora"),
        ("bert", "lora, variant: dora"),
        ("llama", "ffa_lora, variant: rslora"),
        ("llama", "flora, variant: rslora, ranks: {a: 2}"),
        ("llama", "fed_sb, variant: rslora"),
        ("llama", "slora, variant: rslora, sparse_rounds: 1"),
    ],
)
def test_plain_peft_computes_what_is_exported(
    kind: str, method: str, run_file: Path, tmp_path: Path, model_dir: Path, data_dir: Path
) -> None:
    """Attached and merged, on a model that transformers alone loaded."""
    base = model_folder(kind, tmp_path, model_dir)
    data = [classes(data_dir)] if kind == "bert" else []
    rounds = Rounds(run_file, f"method={{name: {method}, rank: 4}}", f"model.name={base}", *data)
    rounds.next()
    rounds.next()
    server, folder = rounds.server, tmp_path / "adapter"
    view = first_view(server, rounds.state)
    expected = logits(view.on(server.base))
    view.save(folder, server)
    make = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    plain = make.from_pretrained(base, **({"num_labels": 3} if kind == "bert" else {}))
    assert float((logits(plain) - expected).abs().max()) > 1e-3
    adapted = peft.PeftModel.from_pretrained(plain, folder)
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, rtol=0, atol=1e-5)
    ours = view.merged(server_site(server.run, rounds.method, server.classes).base)
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-5)


def test_magnitudes_start_as_the_base_has_them_and_are_averaged(run_file: Path) -> None:
    """m = the norm of each row of W0, so that a fresh adapter changes nothing; edges weigh alike here."""
    rounds = Rounds(run_file, "method={name: lora, rank: 2, variant: dora}")
    fresh = first_view(rounds.server, rounds.state).on(rounds.server.base)
    plain = AutoModelForCausalLM.from_pretrained(rounds.server.run.model.name)
    torch.testing.assert_close(logits(fresh), logits(plain), rtol=0, atol=1e-5)
    names = [name for name in rounds.state.tensors if name.endswith(".lora_magnitude_vector")]
    assert len(names) == 14
    for name in names:
        weight = plain.get_submodule(lora.module_of(name)).weight
        torch.testing.assert_close(rounds.state.tensors[name], weight.detach().norm(dim=1))
    before = rounds.state.tensors
    _, updates = rounds.next()
    for name in names:
        mean = sum(update.tensors[name] for update in updates.values()) / 3
        torch.testing.assert_close(rounds.state.tensors[name], mean)
        assert not torch.equal(mean, before[name])
    assert math.isfinite(rounds.fleet.evaluate(rounds.state, "test")["a"]["loss"])
