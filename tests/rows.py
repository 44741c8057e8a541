"""Small sources, a tokenizer of single bytes, and encoded rows as text, for the tests of fedpipe_ray.data."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedpipe_ray.data import EdgeData, open_data
from fedpipe_ray.data.tables import read
from fedpipe_ray.settings import Data

PAIRS = [{"q": f"question {i}", "a": f"answer {i}"} for i in range(300)]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[CLS]", "[SEP]"]


def byte_tokenizer(before: str = "<s>", after: str = "", chat_template: str | None = None) -> Any:
    """One token a byte (special tokens apart), so that every length can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    bytes_ = Tokenizer(models.BPE(vocabulary, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = decoders.ByteLevel()
    around = [(token, vocabulary[token]) for token in (before, after) if token]
    bytes_.post_processor = processors.TemplateProcessing(single=f"{before} $A {after}".strip(), special_tokens=around)
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        additional_special_tokens=SPECIAL[2:], chat_template=chat_template,
    )  # fmt: skip


TOKENIZER = byte_tokenizer()


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def values(source: object, columns: list[str], **options: Any) -> list[tuple[str, ...]]:
    batches = read(str(source), columns, **options)
    return [tuple(row.values()) for batch in batches for row in batch.to_pylist()]


def qa(source: object, **changes: Any) -> Data:
    """Settings of a question-answer source."""
    return Data(**{"source": str(source), "prompt": "{q}?", "response": " {a}", **changes})


def labelled(source: object, **changes: Any) -> Data:
    return Data(**{"source": str(source), "task": "classification", "text": "{t}", "label": "y", **changes})


def opened(data: Data, tokenizer: Any = TOKENIZER, classes: list[str] | None = None, edge: str = "e0") -> EdgeData:
    return open_data(data, edge, ["e0", "e1", "e2"], 0, tokenizer, classes or [])


def texts(split: Any, tokenizer: Any = TOKENIZER) -> list[tuple[str, str]]:
    """(all tokens, the tokens with loss) of every row, decoded."""
    rows = [split.example(i) for i in range(len(split))]
    return [(tokenizer.decode(ids), tokenizer.decode(labels[labels != -100])) for ids, labels in rows]
