"""A Llama of 0.86M parameters, rows and a first adapter for it, as files that any framework reads."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORDS, VOCABULARY = 1597, 1600
TOKENS = 64  # of every row, so that nobody pads: one of the prompt, 62 of the response, the end
ROWS = 80


def write_material(folder: Path, edges: int, adapter: Mapping[str, Any]) -> dict[str, str]:
    """Writes it all into `folder` and returns the places: model, data (with {edge}), test, initial.

    adapter: rank and alpha of the LoRA on all linear layers that `initial` is for.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from fedpipe_ray import lora
    from fedpipe_ray.message import Message

    names = ["<unk>", "<pad>", "<eos>", *(f"w{i}" for i in range(WORDS))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        tie_word_embeddings=True, pad_token_id=1, eos_token_id=2, max_position_embeddings=2 * TOKENS,
    ))  # fmt: skip
    model.save_pretrained(folder / "model")
    for name in [*(f"e{i}" for i in range(edges)), "test"]:
        write_rows(folder / f"{name}.jsonl", name)
    spec = lora.LoraSpec(adapter["rank"], adapter["alpha"], ("all-linear",))
    shapes = {name: tuple(p.shape) for name, p in lora.parameters(lora.inject(model, spec)).items()}
    Message(lora.initial(shapes, torch.Generator().manual_seed(0))).save(folder / "initial.safetensors")
    places = {"model": "model", "data": "{edge}.jsonl", "test": "test.jsonl", "initial": "initial.safetensors"}
    return {key: str(folder / place) for key, place in places.items()}


def write_rows(file: Path, seed: str) -> None:
    """Rows in which few words are frequent: a rule that an adapter can learn."""
    draw = random.Random(seed)
    weights = [1 / (1 + rank) for rank in range(WORDS)]
    rows = []
    for _ in range(ROWS):
        first, *rest = (f"w{i}" for i in draw.choices(range(WORDS), weights, k=TOKENS - 1))
        rows.append(json.dumps({"prompt": first, "response": " ".join(rest)}) + "\n")
    file.write_text("".join(rows))
