"""Structured pruning: a pruned model computes what the whole one does without those units, on many architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from hypothesis import given
from hypothesis import strategies as st
from runs import load
from toys import llama

from fedpipe_ray import lora, pruning
from fedpipe_ray.errors import UserError
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.methods import make_method
from fedpipe_ray.pruning import OverlapMean, Structure, narrowed, shrunk, sides, structure_of, top, widened

SMALL = {"vocab_size": 27, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": None}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def architectures() -> dict[str, Callable[[], Any]]:
    grouped = {**SMALL, **SIZES, "num_key_value_heads": 2}
    encoder = {"vocab_size": 27, "pad_token_id": 1, "max_position_embeddings": 40, "num_labels": 3}
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, **SIZES)),
        "llama, grouped, biases": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(**grouped, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
        ),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**grouped)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**grouped, head_dim=16)),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**grouped, head_dim=16)),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(**SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48)
        ),
        "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**SMALL, **SIZES)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**SMALL, n_embd=32, n_inner=48, n_layer=2, n_head=4)),
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**encoder, **SIZES)),
        "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**encoder, **SIZES)),
        "distilbert": lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(vocab_size=27, pad_token_id=1, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
        ),
    }  # fmt: skip


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    model = architectures()[kind]().eval().requires_grad_(False)
    for parameter in model.parameters():  # biases and norms too, which begin at 0 and 1
        parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def spec_of(model: Any) -> lora.LoraSpec:
    causal = "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
    return lora.LoraSpec(3, 6.0, ("all-linear",), task="causal" if causal else "classification")


def masked(structure: Structure, seed: int = 0) -> torch.Tensor:
    """Some units of every kind in every layer, not the same in each."""
    drawn = torch.rand(structure.layers, structure.heads + structure.channels, generator=torch.manual_seed(seed)) < 0.5
    drawn[:, 0], drawn[:, 1] = True, False
    return drawn


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(3, 27, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits)


@pytest.mark.parametrize("kind", architectures())
def test_a_pruned_model_is_the_whole_one_without_those_units(kind: str) -> None:
    """With an adapter on every linear layer; the whole model's readers have 0 where a unit was cut."""
    model = model_of(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    structure, spec = structure_of(model), spec_of(model)
    assert (structure.layers, structure.channels) == (2, 48)
    mask = masked(structure)
    small = lora.inject(narrowed(model, structure, mask), spec)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    whole = lora.inject(narrowed(model, structure, torch.ones_like(mask)), spec)
    adapter = {
        name: 0.3 * torch.randn(p.shape, generator=torch.manual_seed(n))
        for n, (name, p) in enumerate(lora.parameters(whole).items())
    }
    parts = sides(structure, mask, adapter)
    lora.load(small, shrunk(adapter, parts))
    for cut in structure.cuts:
        if cut.side == "in":
            keep = torch.zeros(cut.index.numel())
            keep[structure.of(cut, mask)] = 1
            adapter[f"base_model.model.{cut.module}.lora_A.weight"] *= keep
            linear = whole.get_submodule(f"base_model.model.{cut.module}").base_layer
            conv = type(linear).__name__ == "Conv1D"
            linear.weight = torch.nn.Parameter(linear.weight * (keep[:, None] if conv else keep), requires_grad=False)
    lora.load(whole, adapter)
    torch.testing.assert_close(logits(small), logits(whole), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(small), logits(model), atol=1e-3)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SMALL, **SIZES)), "GPTNeoXForCausalLM: its layers are none of"),
        (
            lambda: t.MixtralForCausalLM(t.MixtralConfig(**SMALL, **SIZES, num_key_value_heads=2, num_local_experts=4)),
            "MixtralForCausalLM: its layers are none of",
        ),
        (lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**SMALL, **SIZES)), "self_attn.q_norm.weight spans its heads"),
    ],
    ids=["fused", "experts", "norm across heads"],
)
def test_models_that_cannot_be_pruned(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(UserError, match=rf"(?s)cannot prune .*{says}.*use method.name: lora"):
        structure_of(make())


def test_what_is_not_cut_is_shared_and_an_unpruned_model_is_all_shared() -> None:
    model = llama()
    structure = structure_of(model)
    everything = torch.ones(2, structure.heads + structure.channels, dtype=torch.bool)
    small, whole = narrowed(model, structure, masked(structure)), narrowed(model, structure, everything)
    assert small.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert small.model.layers[0].mlp.up_proj.weight is not model.model.layers[0].mlp.up_proj.weight
    assert all(a is b for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    assert whole.model.layers[0] is not model.model.layers[0]


def test_widths_and_masks_by_hand() -> None:
    """4 heads at 0.3: 2.8, so 3; 10 channels: 7. One unit is always left. Of equal scores the first stay."""
    structure = Structure(1, 4, 10, (), ())
    assert structure.widths(0.3) == (3, 7)
    assert structure.widths(0.9) == (1, 1)
    assert structure.widths(0.0) == (4, 10)
    scores = torch.tensor([[1.0, 4, 2, 3, *[5.0] * 10]])
    assert structure.kept(0.5, scores)[0].int().tolist() == [0, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert top(torch.zeros(1, 3), 2).tolist() == [[True, True, False]]


@given(st.floats(0, 0.95), st.floats(0, 0.95), st.integers(0, 100))
def test_masks_are_nested_and_survive_being_packed(one: float, other: float, seed: int) -> None:
    structure = structure_of(MODEL)
    scores = torch.rand(2, structure.heads + structure.channels, generator=torch.Generator().manual_seed(seed))
    large, small = (structure.kept(rho, scores) for rho in sorted((one, other)))
    assert bool((large | ~small).all())
    assert torch.equal(pruning.unpack(pruning.pack(small), structure), small)


MODEL = llama()


def test_magnitudes_by_hand() -> None:
    """Squared norm over what feeds a unit and what reads it; the adapter's product counts as part of the weight."""
    model = llama()
    structure = structure_of(model)
    found = pruning.magnitudes(model, structure, {}, 1.0)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    rows = slice(16, 32)  # head 1 of 2
    expected = sum(
        float(w.detach().double().square().sum())
        for w in (
            attention.q_proj.weight[rows], attention.k_proj.weight[rows], attention.v_proj.weight[rows],
            attention.o_proj.weight[:, rows],
        )
    )  # fmt: skip
    assert float(found[1, 1]) == pytest.approx(expected, rel=1e-5)
    channel = (mlp.gate_proj.weight[5], mlp.up_proj.weight[5], mlp.down_proj.weight[:, 5])
    assert float(found[1, 2 + 5]) == pytest.approx(sum(float(w.detach().square().sum()) for w in channel), rel=1e-5)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_%s.weight"
    a, b = torch.ones(1, 32), torch.zeros(64, 1)
    b[5] = 1.0
    after = pruning.magnitudes(model, structure, {key % "A": a, key % "B": b}, 3.0)
    grown = float((mlp.up_proj.weight[5] + 3).square().sum() - mlp.up_proj.weight[5].square().sum())
    assert float((after - found).abs().sum()) == pytest.approx(grown, rel=1e-4)
    assert float((after - found)[1, 7]) == pytest.approx(grown, rel=1e-4)


def test_taylor_is_the_slope_of_the_loss(run_file: Path) -> None:
    """Against a difference quotient: a unit's output scaled by 1 +- 0.01, over the same rows."""
    run = load(run_file, "method={name: jcpba}", "local.batch=32")
    method = make_method(run.method)
    fleet = SerialFleet(run, method)
    fleet.open()
    site = fleet.sites["a"]
    structure = structure_of(site.base.model)
    mask = torch.ones(2, structure.heads + structure.channels, dtype=torch.bool)
    spec = lora.LoraSpec(2, 4.0, ("all-linear",))

    def whole() -> Any:
        model = lora.inject(narrowed(site.base.model, structure, mask), spec)
        lora.load(model, {name: torch.full(p.shape, 0.05) for name, p in lora.parameters(model).items()})
        return model

    found = pruning.taylor(site, whole(), structure, np.random.default_rng(0), 1)
    assert found.shape == mask.shape
    for layer, unit, name in ((0, 1, "self_attn.o_proj"), (1, 2 + 40, "mlp.down_proj")):
        losses = []
        for factor in (1.01, 0.99):
            model = whole()
            reader = model.get_submodule(f"base_model.model.model.layers.{layer}.{name}")
            scale = torch.ones(64 if "mlp" in name else 32)
            scale[slice(16, 32) if unit == 1 else unit - 2] = factor
            reader.register_forward_pre_hook(lambda _, inputs, scale=scale: (inputs[0] * scale,))
            site.train(model, np.random.default_rng(0), steps=1, epochs=None)
            losses.append(site.train_loss)
        assert float(found[layer, unit]) == pytest.approx(abs(losses[0] - losses[1]) / 0.02, rel=0.02, abs=1e-4)


# -- adapters


def test_the_mean_over_those_that_kept_a_coordinate_by_hand() -> None:
    """Rows 0 and 1 of B from an edge of weight 1, rows 1 and 2 from one of weight 3; nobody kept row 3."""
    before = {"b": torch.tensor([[9.0], [9.0], [9.0], [9.0]]), "head": torch.tensor([1.0])}
    mean = OverlapMean(before)
    mean.add({"b": torch.tensor([[2.0], [4.0]]), "head": torch.tensor([0.0])}, {"b": (0, torch.tensor([0, 1]))}, 1.0)
    mean.add({"b": torch.tensor([[8.0], [6.0]]), "head": torch.tensor([4.0])}, {"b": (0, torch.tensor([1, 2]))}, 3.0)
    found = mean.result()
    assert found["b"].flatten().tolist() == [2.0, 7.0, 6.0, 9.0]
    assert found["head"].tolist() == [3.0]


@given(st.floats(0, 0.9), st.integers(0, 20))
def test_shrinking_and_widening_an_adapter(rho: float, seed: int) -> None:
    structure = structure_of(MODEL)
    spec = lora.LoraSpec(2, 4.0, ("q_proj", "o_proj", "up_proj", "down_proj"))
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in lora.parameters(lora.inject(llama(), spec)).items()}
    adapter = {name: torch.rand(shape, generator=generator) + 1 for name, shape in shapes.items()}
    parts = sides(structure, structure.kept(rho, torch.rand(2, 66, generator=generator)), adapter)
    part = shrunk(adapter, parts)
    back = widened(part, parts, adapter)
    assert all(torch.equal(back[name], torch.where(back[name] != 0, adapter[name], 0)) for name in adapter)
    again = shrunk(back, parts)
    assert all(torch.equal(again[name], part[name]) for name in part)
    heads, channels = structure.widths(rho)
    for name, tensor in part.items():
        full, kept = (32, 16 * heads) if "self_attn" in name else (64, channels)
        cut = (".lora_B." in name) == any(x in name for x in ("q_proj", "up_proj"))
        assert tensor.numel() == adapter[name].numel() * (kept / full if cut else 1)
