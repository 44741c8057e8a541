"""Models whose outputs are known by hand, and rows for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from fedpipe_ray.batches import IGNORED

CPU = torch.device("cpu")
PAD = 1
WIDTH = 32  # of the tiny Llamas


@dataclass
class Some:
    """Rows as (tokens, labels); `seen` lists the rows in the order in which they were asked for."""

    rows: Sequence[tuple[Sequence[int], Sequence[int]]]
    seen: list[int] = field(default_factory=list)
    texts: Sequence[tuple[str, str]] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        self.seen.append(index)
        tokens, labels = self.rows[index]
        return np.array(tokens, np.int32), np.array(labels, np.int32)

    def length(self, index: int) -> int:
        return len(self.rows[index][0])

    def text(self, index: int) -> tuple[str, str]:
        return self.texts[index]


def answer(prompt: Sequence[int], response: Sequence[int]) -> tuple[list[int], list[int]]:
    """A row whose loss counts `response`."""
    return [*prompt, *response], [*[IGNORED] * len(prompt), *response]


class Constant(nn.Module):
    """Every position's logits are `bias`, [vocabulary], whatever the tokens are."""

    is_activation_checkpointing = False

    def __init__(self, bias: Sequence[float]) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias, dtype=torch.float32))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.bias.expand(*input_ids.shape, -1))


def llama_config(vocabulary: int = 27, **changes: Any) -> LlamaConfig:
    return LlamaConfig(**{
        "vocab_size": vocabulary, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "tie_word_embeddings": False, "pad_token_id": PAD, "eos_token_id": 2,
        "bos_token_id": None, **changes,
    })  # fmt: skip


def llama(vocabulary: int = 27, seed: int = 0, **changes: Any) -> Any:
    """Two layers of width 32, weights drawn from `seed`."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(vocabulary, **changes)).eval()


def classifier(classes: int = 3, seed: int = 0) -> Any:
    """The same with a head for classes."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(llama_config(num_labels=classes)).eval()


def uniform(vocabulary: int = 27) -> Any:
    """A Llama that finds every token equally likely: its head is zero."""
    model = llama(vocabulary)
    nn.init.zeros_(model.lm_head.weight)
    return model


def chain(following: Sequence[int]) -> Any:
    """A Llama that after token t expects following[t].

    Embeddings are unit vectors and the layers add nothing, so the final norm gives sqrt(32) e_t. Row following[t] of
    the head is e_t: its logit is sqrt(32) = 5.657, every other is 0.
    """
    model = llama(len(following), rms_norm_eps=1e-12)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(WIDTH)[: len(following)])
        model.lm_head.weight.zero_()
        for token, after in enumerate(following):
            model.lm_head.weight[after, token] = 1
    return model
