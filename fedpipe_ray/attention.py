"""The weights of self-attention by the names that transformers' models give them. Ours."""

from __future__ import annotations

from collections.abc import Iterable

from .errors import UserError

INPUTS = (
    "q_proj", "k_proj", "v_proj", "query", "key", "value", "query_proj", "key_proj", "value_proj", "q_lin", "k_lin",
    "v_lin", "c_attn", "query_key_value", "qkv_proj", "Wqkv",
)  # fmt: skip
OUTPUTS = (
    "o_proj", "out_proj", "out_lin", "attn.c_proj", "attention.output.dense", "attention.dense", "self_attention.dense",
    "self_attn.dense", "attn.Wo",
)  # fmt: skip


def attention_of(names: Iterable[str]) -> list[str]:
    """The last parts of a model's names that are its queries, keys, values, and the projection after them.

    UserError where not both sides of a model's attention are known.
    """
    ends = [f".{name}" for name in names]
    known = [[part for part in side if any(end.endswith(f".{part}") for end in ends)] for side in (INPUTS, OUTPUTS)]
    if not all(known):
        found = ", ".join(known[0] + known[1]) or "none"
        raise UserError(f"method.preset: of this model's attention weights paper knows {found}; name method.targets")
    return known[0] + known[1]
