"""`fedpipe plan --shapes`: what a round takes, from the configuration of a model whose weights are nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import here
from toys import llama, llama_config
from transformers import LlamaForCausalLM

from fedpipe_ray import lora
from fedpipe_ray.demands import activation_bytes, base_bytes
from fedpipe_ray.frame import same_storage
from fedpipe_ray.model import Base, load_tokenizer, stored_bytes
from fedpipe_ray.settings import Local, Model

SPEC = lora.LoraSpec(4, 8.0, ("all-linear",), 0.0, "causal")


def test_bytes_are_those_of_the_loaded_model(model_dir: Path) -> None:
    """Of the base exactly; of activations at most a quarter more, as attention without a mask keeps something else."""
    tokenizer = load_tokenizer(Model(name=str(model_dir)))
    loaded = Base(llama(), tokenizer, torch.device("cpu"))
    with torch.device("meta"):
        empty = Base(LlamaForCausalLM(llama_config()), tokenizer, torch.device("cpu"))
    assert not same_storage(loaded.model.lm_head.weight, empty.model.lm_head.weight)
    assert stored_bytes(empty.model) == stored_bytes(loaded.model)
    for bits in (4, 8, 16):
        assert base_bytes(empty.model, bits, False) == base_bytes(loaded.model, bits, False)
    real, bare = (activation_bytes(base, SPEC, False, Local())[0] for base in (loaded, empty))
    assert real <= bare <= 1.25 * real
    checkpointed = activation_bytes(empty, SPEC, False, Local(checkpointing=True))[0]
    assert checkpointed == bare / 2 + 2 * 32 * 4  # of two layers one, and both inputs


def test_a_plan_needs_configuration_and_tokenizer_only(run_file: Path, tmp_path: Path, model_dir: Path) -> None:
    """No weights, and rows that this machine has not: speeds, links and capacities are those of the profiles."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model_dir.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    away = ["data.source=/nowhere/{edge}.jsonl", f"model.name={bare}", "method={name: fedpipe, rank: 4, alpha: 8}"]
    out = tmp_path / "plan.json"
    assert here("plan", run_file, *away, "--shapes", "--out", out) == 0
    plan = json.loads(out.read_text())
    assert set(plan["edges"]) == {"a", "b", "c"}
    fast, slow = plan["edges"]["a"], plan["edges"]["c"]
    assert fast["steps"] * fast["batch"] > slow["steps"] * slow["batch"]
    assert 0 < fast["seconds"] <= 1.001 * plan["deadline_seconds"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("method.rank=4", "lora gives every edge the same"),
        ("local={epochs: 1, batch: 4}", "local.epochs: how many rows an edge has is not known"),
    ],
)
def test_what_cannot_be_told_is_refused(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: str, said: str
) -> None:
    method = [] if settings.startswith("method") else ["method={name: fedpipe, rank: 4, alpha: 8}"]
    assert here("plan", run_file, *method, settings, "--shapes", "--out", tmp_path / "plan.json") == 2
    assert said in capsys.readouterr().err
