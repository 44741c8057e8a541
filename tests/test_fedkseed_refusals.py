"""What `fedkseed` refuses: settings, bases, updates, and to go on once it has diverged."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from refusals import assert_refused
from test_fedkseed import METHOD, opened, pairs, report
from transformers import AutoModelForCausalLM

from fedpipe_ray.errors import UserError
from fedpipe_ray.message import Message
from fedpipe_ray.randomness import rng_for


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method.seeds=5", "method.seeds: 5 candidates for method.tau: 6 steps ... give at least 6 seeds, or lower"),
        ("method.tau=0", "method.tau: 0 must be at least 1"),
        ("method.batch=0", "method.batch: 0 must be at least 1"),
        ("method.eps=0", "method.eps: 0.0 must be above 0"),
        ("method.lr=-1", "method.lr: -1.0 must be above 0"),
        ("method.weight_decay=-1", "method.weight_decay: -1.0 must not be negative"),
        ("method.stepped=half", "method.stepped: 'half' is not valid: ... 'float32' or 'stored'"),
        ("server.norm_bound=3", "server.norm_bound: 3 bounds changes of tensors ... remove it"),
        ("fleet={mode: buffered, buffer: 2, ray: false, edges: {a: {}, b: {}}}", "fleet.mode: buffered"),
    ],
)
def test_bad_settings(
    override: str, says: str, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, "run", run_file, METHOD, override, says=says, out=tmp_path / "out")


def test_a_quantized_base(run_file: Path, tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its configuration alone, before anything is loaded."""
    folder = tmp_path / "packed"
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    says = f"model.name: {folder} is quantized (bitsandbytes) ... needs 16 or 32 bits: name the unquantized checkpoint"
    assert_refused(capsys, "run", run_file, METHOD, f"model.name={folder}", says=says, out=tmp_path / "out")


def test_a_run_that_diverged(run_file: Path) -> None:
    """A coefficient beyond what can be sent exactly: 0.0002 x 10,001 is above 2."""
    _, method, server, state = opened(run_file)
    state = dataclasses.replace(state, tensors={**state.tensors, "accumulators": torch.full((32,), 1e4).double()})
    with pytest.raises(UserError, match=r"diverged: a coefficient of 2 \(limit 2\).*; lower method.lr: 0.0002"):
        method.aggregate(state, [report("a", pairs([1], [1.0]))], server, 0, rng_for(0, 0, "aggregate"))


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (Message({"w": torch.zeros(2)}), "its update has w, not indices and slopes"),
        (pairs([1, 2], [1.0]), "its update has [2] indices in torch.int32 for [1] slopes"),
        (pairs([], []), "its update has 0 steps; 1 to method.tau: 6 can be"),
        (pairs([1] * 7, [1.0] * 7), "its update has 7 steps; 1 to method.tau: 6 can be"),
        (pairs([32], [1.0]), "its update has an index outside the method.seeds: 32 candidates"),
        (pairs([-1], [1.0]), "its update has an index outside the method.seeds: 32 candidates"),
        (pairs([1], [math.nan]), "its update has NaN or infinity in slopes"),
        (pairs([1], [1.0], math.nan), "its update says that the edge has nan rows"),
        (pairs([1], [1.0], 0), "its update says that the edge has 0 rows"),
        (pairs([1], [1.0], -3), "its update says that the edge has -3 rows"),
    ],
)
def test_unfit_updates(message: Message, says: str, run_file: Path) -> None:
    """Refused with a reason, and the others go on."""
    _, method, server, state = opened(run_file)
    bad, good = report("a", message), report("b", pairs([1], [2.0]))
    after = method.aggregate(state, [bad, good], server, 0, rng_for(0, 0, "aggregate"))
    assert bad.rejected == says
    assert float(after.tensors["accumulators"][1]) == 2.0
