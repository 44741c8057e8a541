"""Does the two-point calibration predict seconds and memory of a training step?

    python -m benchmarks.cost_model [THREADS]

Models of three shapes, random weights, in 16, 8 and 4 bits, each in a process of its own: calibrated with rank 8 on all
linear weights at batches of 2 and 6, then predicted and measured at other batches and ranks. Target: within 15 %. Steps
of at least half a second. MiB: what a capacity counts, the stored model and what the process grows by as it trains;
above level: its high-water mark above what it was before the model was loaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.table import parser, publish
from fedpipe_ray import lora
from fedpipe_ray.calibrate import calibrate, measure
from fedpipe_ray.costs import give_back_freed_memory, matmul_parameters, status_bytes, training_flops
from fedpipe_ray.model import Base, stored_bytes
from fedpipe_ray.settings import Model

MODELS: dict[str, Any] = {
    "llama 14 x 576": lambda: LlamaForCausalLM(LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=14, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=8192, tie_word_embeddings=True,
    )),
    "gpt2 6 x 768": lambda: GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=768, n_head=12, vocab_size=12000)),
    "bert 8 x 640": lambda: BertForSequenceClassification(BertConfig(
        hidden_size=640, num_hidden_layers=8, num_attention_heads=10, intermediate_size=2560, vocab_size=16000,
        id2label=dict(enumerate("abcd")),
    )),
}  # fmt: skip
LENGTH = 96
TRIALS = ((4, 8), (4, 32), (10, 8), (10, 2))  # (batch, rank)


def one(name: str, bits: int, threads: int, folder: Path) -> list[dict[str, Any]]:
    """Calibrates and tries one model in one bit-width."""
    torch.set_num_threads(threads)
    task = "classification" if name.startswith("bert") else "causal"
    classes = list("abcd") if task == "classification" else []
    give_back_freed_memory()
    level = status_bytes("VmRSS")
    base = Base.load(Model(name=str(folder)), task, classes, 0, bits=bits)
    spec = lora.LoraSpec(8, 16, ("all-linear",), task=task)
    found = calibrate(base, spec, ((2, LENGTH), (6, LENGTH)))
    rows: list[dict[str, Any]] = []
    for batch, rank in TRIALS:
        other = lora.LoraSpec(rank, 2 * rank, ("all-linear",), task=task)
        seconds, memory = measure(base, other, batch, LENGTH)
        model = lora.attach(base, other)
        foreseen = found.seconds(batch * LENGTH, training_flops(model, 1))
        bytes_foreseen = found.memory_bytes(batch * LENGTH, matmul_parameters(model)[2])
        above = status_bytes("VmHWM") - level
        rows.append({
            "bits": bits, "batch": batch, "rank": rank, "seconds": seconds, "predicted s": foreseen,
            "error %": 100 * (foreseen / seconds - 1), "MiB": memory / 2**20, "predicted MiB": bytes_foreseen / 2**20,
            "error % of MiB": 100 * (bytes_foreseen / memory - 1), "base MiB": stored_bytes(base.model) / 2**20,
            "above level MiB": above / 2**20, "error % of it": 100 * (bytes_foreseen / above - 1),
        })  # fmt: skip
    return rows


def main(threads: int) -> None:
    """Every model and bit-width in a process of its own."""
    rows: list[dict[str, Any]] = []
    for name, make in MODELS.items():
        with tempfile.TemporaryDirectory() as place:
            torch.manual_seed(0)
            model = make()
            model.save_pretrained(place)
            about = {"model": name, "M parameters": model.num_parameters() / 1e6}
            AutoConfig.from_pretrained(place)
            _tokenizer().save_pretrained(place)
            for bits in (16, 8, 4):
                command = [sys.executable, "-m", "benchmarks.cost_model", name, str(bits), str(threads), place]
                ended = subprocess.run(command, capture_output=True, text=True, check=True)
                rows += [{**about, **row} for row in json.loads(ended.stdout.splitlines()[-1])]
                worst = max(abs(row["error %"]) for row in rows)
                print(name, bits, f"worst error so far: {worst:.1f} % of seconds", flush=True)
                publish("cost_model", "A step predicted from two calibration points, and measured", rows, seed=0)


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1}, "<unk>")), pad_token="<pad>"
    )


if __name__ == "__main__":
    if len(sys.argv) == 5:  # a process of ours
        print(json.dumps(one(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
    else:
        options = parser(__doc__)
        options.add_argument("threads", nargs="?", type=int, default=1, metavar="THREADS")
        main(options.parse_args().threads)
