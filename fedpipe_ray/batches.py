"""Rows into padded batches, batches into a summed loss: what training and evaluation share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

IGNORED = -100
WINDOW = 8  # batches


class Rows(Protocol):
    """Encoded rows of one split; data.Split is one."""

    def __len__(self) -> int: ...

    def length(self, index: int) -> int: ...

    def example(self, index: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]: ...


@dataclass(frozen=True)
class Batch:
    """tokens, mask, labels: [rows, length]; labels are [rows] for a classifier. units: loss terms (tokens or rows)."""

    tokens: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    units: int


def collate(rows: Rows, indices: Sequence[int], pad_id: int, classifier: bool) -> Batch:
    """Pads on the right to the longest of the rows."""
    examples = [rows.example(int(i)) for i in indices]
    length = max(len(ids) for ids, _ in examples)
    tokens = torch.full((len(examples), length), pad_id, dtype=torch.long)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORED, dtype=torch.long)
    for row, (ids, wanted) in enumerate(examples):
        tokens[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        mask[row, : len(ids)] = 1
        labels[row, : len(wanted)] = torch.from_numpy(wanted.astype(np.int64))
    if classifier:
        return Batch(tokens, mask, labels[:, 0], len(examples))
    labels[:, 0] = IGNORED  # the first token has nothing before it to be predicted from
    return Batch(tokens, mask, labels, int((labels != IGNORED).sum()))


def sums(model: Any, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(summed loss, logits [units, classes or vocabulary], labels [units]) over the loss terms of a batch."""
    tokens, mask, labels = (t.to(device) for t in (batch.tokens, batch.mask, batch.labels))
    if labels.ndim == 1:
        logits = model(input_ids=tokens, attention_mask=mask).logits
    else:
        wanted = labels[:, 1:] != IGNORED
        logits = _logits_before(model, tokens, mask, wanted)
        labels = labels[:, 1:][wanted]
    loss = functional.cross_entropy(logits.float(), labels, reduction="sum")
    return loss, logits.detach(), labels


def _logits_before(model: Any, tokens: torch.Tensor, mask: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Logits [units, vocabulary] of a causal model at the positions before the `wanted` ones, [rows, length - 1].

    The head runs at these positions only: a large vocabulary makes it the dearest layer, in memory above all. What a
    model puts before the rows, a prompt, is not among them.
    """
    length = tokens.shape[1]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = getattr(base, "get_output_embeddings", lambda: None)()
    if head is None:
        return torch.as_tensor(model(input_ids=tokens, attention_mask=mask).logits[:, -length:-1][wanted])
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -length:-1][wanted][None],))
    try:
        return torch.as_tensor(model(input_ids=tokens, attention_mask=mask).logits[0])
    finally:
        hook.remove()


def endless(count: int, rng: np.random.Generator) -> Iterator[int]:
    """Row numbers, one permutation of all rows after the other."""
    while True:
        yield from rng.permutation(count)


def batches_of_like_length(rows: Rows, batch: int, count: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """`count` batches of row numbers, drawn from `endless`; rows of a window of 8 batches are grouped by length.

    Padding then costs little: a step of the quickstart took 2.3 times as long with rows as drawn.
    """
    order = endless(len(rows), rng)
    for start in range(0, count, WINDOW):
        drawn = list(islice(order, batch * min(WINDOW, count - start)))
        drawn.sort(key=rows.length)
        for place in rng.permutation(len(drawn) // batch):
            yield [int(row) for row in drawn[place * batch : (place + 1) * batch]]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bfloat16 autocast where asked for, or where `auto` finds a GPU that has it; else float32 as it is."""
    gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16" or (precision == "auto" and gpu))
