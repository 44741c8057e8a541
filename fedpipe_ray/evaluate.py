"""Evaluation of one model on one edge's rows: loss, perplexity, accuracies, F1, and free-text answers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from .batches import Rows, autocast, collate, sums
from .data.encode import special_tokens

Metrics = dict[str, float]


class TextRows(Rows, Protocol):
    """Rows that kept their texts; the test split does."""

    def text(self, index: int) -> tuple[str, str]: ...


@torch.no_grad()
def evaluate(
    model: Any,
    rows: Rows,
    *,
    device: torch.device,
    pad_id: int,
    classes: int = 0,
    batch: int = 32,
    limit: int | None = None,
    precision: str = "auto",
) -> Metrics:
    """Metrics over the first `limit` rows: `loss` a response token (or row), and `rows`.

    Causal: `perplexity` = exp(loss), `token_accuracy`, `tokens`. Classification (classes > 0): `accuracy`, `macro_f1`
    (mean over the classes that occur as label or prediction). Empty if there is no row.
    """
    count = min(len(rows), limit or len(rows))
    if count == 0:
        return {}
    lengths = np.array([rows.length(i) for i in range(count)])
    order = np.argsort(lengths, kind="stable")  # rows of like length together: less padding
    total, units, right = 0.0, 0, 0
    confusion = np.zeros((classes, classes), dtype=np.int64)  # [label, prediction]
    model.eval()
    for start in range(0, count, batch):
        part = collate(rows, list(order[start : start + batch]), pad_id, classes > 0)
        with autocast(device, precision):
            loss, logits, wanted = sums(model, part, device)
        predicted = logits.argmax(-1)
        total, units = total + float(loss), units + part.units
        right += int((predicted == wanted).sum())
        if classes:
            np.add.at(confusion, (wanted.cpu().numpy(), predicted.cpu().numpy()), 1)
    mean = total / max(1, units)
    if classes:
        return {"loss": mean, "accuracy": right / count, "macro_f1": macro_f1(confusion), "rows": count}
    return {
        "loss": mean,
        "perplexity": perplexity(mean),
        "token_accuracy": right / max(1, units),
        "tokens": units,
        "rows": count,
    }


def perplexity(loss: float) -> float:
    """exp(loss), infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def macro_f1(confusion: np.ndarray[Any, Any]) -> float:
    """Mean F1 over the classes that occur; confusion: [label, prediction] counts."""
    hits, occurring = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
    return float(np.mean(2 * hits[occurring > 0] / occurring[occurring > 0])) if occurring.any() else 0.0


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    rows: TextRows,
    *,
    device: torch.device,
    count: int,
    max_new_tokens: int,
    answer: str = "text",
) -> Metrics:
    """Greedy answers to the first `count` prompts: `rouge_l` (F-measure) and `exact_match` against the response.

    answer: `gsm8k` compares the number after ####, as the data set's authors do; `text` the whole, spaces normalised.
    """
    scores = [
        score(complete(model, tokenizer, prompt, device, max_new_tokens), response, answer)
        for prompt, response in (rows.text(i) for i in range(min(count, len(rows))))
    ]
    if not scores:
        return {}
    return {
        "rouge_l": float(np.mean([s[0] for s in scores])),
        "exact_match": float(np.mean([s[1] for s in scores])),
        "generated": len(scores),
    }


def complete(model: Any, tokenizer: Any, prompt: str, device: torch.device, max_new_tokens: int) -> str:
    """The model's greedy continuation of `prompt`, without special tokens; as in training, none follows the prompt."""
    before, _ = special_tokens(tokenizer)
    plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*before, *plain]], device=device)  # [1, length]
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(model, tokenizer) or None,
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the tokenizer's, which training appends, and those the model's makers name."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return list(dict.fromkeys([*own, *(named if isinstance(named, list) else [named] if named is not None else [])]))


def score(generated: str, response: str, answer: str) -> tuple[float, float]:
    """(ROUGE-L F-measure, exact match) of one answer."""
    from rouge_score import rouge_scorer

    rouge = rouge_scorer.RougeScorer(["rougeL"]).score(response, generated)["rougeL"].fmeasure
    if answer == "gsm8k":
        wanted, given = gsm8k_number(response), gsm8k_number(generated)
        return float(rouge), float(wanted is not None and wanted == given)
    return float(rouge), float(" ".join(generated.split()) == " ".join(response.split()))


def gsm8k_number(text: str) -> str | None:
    """The number after the first ####, without thousands separators; None if there is none."""
    found = re.search(r"####\s*\$?(-?[\d,]*\.?\d+)", text)
    return found[1].replace(",", "") if found else None


def combine(edges: Mapping[str, Metrics]) -> Metrics:
    """Fleet-wide metrics: means over the edges, every edge alike; perplexity = exp(mean loss); counts are summed."""
    measured = [metrics for metrics in edges.values() if metrics]
    if not measured:
        return {}
    shared: Sequence[str] = [key for key in measured[0] if all(key in m for m in measured)]
    result: Metrics = {}
    for key in shared:
        view, _, kind = key.rpartition(".")  # `view.metric` for views of the state after the first
        fold = np.sum if kind in ("rows", "tokens", "generated") else np.mean
        result[key] = float(fold([m[key] for m in measured]))
        if kind == "perplexity":
            result[key] = perplexity(result[f"{view}.loss" if view else "loss"])
    return result
