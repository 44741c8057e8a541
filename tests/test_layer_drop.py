"""The cut, models made shallower, families alike; frames that are filled with what an order brings."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fedbiot_made import of_layers
from hypothesis import given
from hypothesis import strategies as st
from toys import PAD
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from fedpipe_ray import lora
from fedpipe_ray.bottleneck import layers as projections
from fedpipe_ray.errors import UserError
from fedpipe_ray.frame import filled, frame
from fedpipe_ray.layer_drop import blocks, client_parameters, cut, keep, renumbered
from fedpipe_ray.model import Base
from fedpipe_ray.settings import Model

SIZE: dict[str, Any] = {
    "vocab_size": 18, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2,
    "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZE, tie_word_embeddings=True),
    "untied": lambda: LlamaConfig(**SIZE, tie_word_embeddings=False),
    "gpt2": lambda: GPT2Config(
        vocab_size=18, n_embd=32, n_layer=6, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=2, pad_token_id=PAD
    ),
    "qwen2, windows on some layers": lambda: Qwen2Config(
        **SIZE, num_key_value_heads=1, use_sliding_window=True, sliding_window=3, max_window_layers=3
    ),
    "qwen3": lambda: Qwen3Config(**SIZE, num_key_value_heads=1, head_dim=16),
    "neox": lambda: GPTNeoXConfig(**SIZE, use_parallel_residual=False),
    "opt": lambda: OPTConfig(
        vocab_size=18, hidden_size=32, ffn_dim=64, num_hidden_layers=6, num_attention_heads=2, word_embed_proj_dim=32,
        max_position_embeddings=64, pad_token_id=PAD, bos_token_id=2, eos_token_id=2,
    ),
}  # fmt: skip


def made(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="eager").eval()


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    tokens = torch.randint(3, 18, (2, 12), generator=torch.Generator().manual_seed(1))
    return torch.as_tensor(model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frame_is_filled_with_the_layers_that_are_kept(family: str, tmp_path: Path, model_dir: Path) -> None:
    """As the whole model with the dropped layers made to add nothing; generation, with its cache, too."""
    found = cut(6, 1, 0.4)
    assert found.kept == (0, 2, 4, 5)
    whole = made(family)
    for file in model_dir.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    whole.save_pretrained(tmp_path)
    base = Base.load(Model(name=str(tmp_path), device="cpu"), "causal", [], 0)
    stem, _ = blocks(base.model)
    numbers = [found.kept.index(n) if n in found.kept else -1 for n in range(6)]
    kept = {renumbered(name, stem, numbers): tensor for name, tensor in base.parcel().weights.tensors.items()}
    kept = {name: tensor for name, tensor in kept.items() if f"{stem}.-1." not in name}
    small = filled(frame(Model(name=str(tmp_path), device="cpu"), "causal", []), kept, lambda m: keep(m, found.kept))
    assert small.model.config.num_hidden_layers == 4
    assert {t.data_ptr() for t in kept.values()} <= {p.data_ptr() for p in small.model.state_dict().values()}
    with torch.no_grad():
        for number, names in enumerate(projections(whole)):
            for module in (whole.get_submodule(name) for name in names):
                if number in found.dropped:
                    module.weight.zero_()
                    if module.bias is not None:
                        module.bias.zero_()
    torch.testing.assert_close(outputs(small.model), outputs(whole), rtol=0, atol=1e-6)
    prompt = torch.tensor([[3, 4, 5]])
    answers = [
        small.model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)
    ]
    assert torch.equal(*answers)


def test_what_does_not_fit_is_told(model_dir: Path) -> None:
    empty = frame(Model(name=str(model_dir), device="cpu"), "causal", [])
    assert all(p.is_meta for p in empty.model.parameters())
    tensors = Base.load(Model(name=str(model_dir), device="cpu"), "causal", [], 0).parcel().weights.tensors
    with pytest.raises(ValueError, match=r"no weights for model\.norm\.weight, 1 such in all"):
        filled(empty, {n: t for n, t in tensors.items() if n != "model.norm.weight"}, lambda _: None)
    with pytest.raises(ValueError, match="no place for other, 1 such in all"):
        filled(empty, {**tensors, "other": torch.zeros(1)}, lambda _: None)
    again = filled(empty, tensors, lambda _: None)
    assert not any(p.is_meta for p in again.model.parameters())
    assert all(p.is_meta for p in empty.model.parameters())  # the frame stays one
