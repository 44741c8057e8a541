"""Whole runs as they were recorded in golden/: a change of any number must be meant.

    REGENERATE=1 python -m pytest tests/test_golden.py

writes the files anew; say in the commit why the numbers moved. Counts, bytes and the virtual clock must be equal.
Losses and the adapter's norms may differ by 1e-4 and 1e-3 of themselves, since processors sum in different orders; on
the processor and torch of the recording the adapter must be equal to five decimals too.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import here, tensors

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "lora": [],
    "lora-options": [
        "rounds=3", "wire.dtype=bfloat16", "fleet.fraction=0.67", "method={name: lora, rank: 2, dropout: 0.1}",
        "local={epochs: 0.5, batch: 6, accumulate: 3, lr: 0.01, schedule: linear, warmup_steps: 2, weight_decay: 0.1}",
    ],
}  # fmt: skip
EXACT = ("samples", "steps", "tokens", "flops", "bytes_up", "bytes_down", "virtual_seconds")


def machine() -> dict[str, str]:
    """What the last bits depend on."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return {"cpu": names[0] if names else "unknown", "capability": capability, "torch": torch.__version__}


def recorded(folder: Path) -> dict[str, Any]:
    """The run in `folder` as a golden file has it; losses to six digits."""
    rounds = []
    for line in (folder / "rounds.jsonl").read_text().splitlines():
        record = json.loads(line)
        edges = {
            name: {key: edge[key] for key in EXACT} | {"train_loss": digits(edge["train_loss"])}
            for name, edge in record["edges"].items()
        }
        validation = {name: digits(metrics["loss"]) for name, metrics in record["eval"]["edges"].items()}
        rounds.append({"edges": edges, "validation_loss": validation, "virtual_seconds": record["virtual_seconds"]})
    summary = json.loads((folder / "summary.json").read_text())
    adapter = tensors(folder)
    rounded = {name: (tensor.double() * 1e5).round().to(torch.int64) for name, tensor in sorted(adapter.items())}
    return {
        "machine": machine(),
        "rounds": rounds,
        "base_loss": digits(summary["base"]["global"]["loss"]),
        "tuned_loss": digits(summary["tuned"]["global"]["loss"]),
        "norms": {name: digits(float(tensor.double().norm())) for name, tensor in sorted(adapter.items())},
        "adapter": hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in rounded.values())).hexdigest(),
    }


def digits(value: float) -> float:
    return float(f"{value:.6g}")


@pytest.mark.parametrize("case", CASES)
def test_as_recorded(case: str, run_file: Path, tmp_path: Path) -> None:
    assert here("run", run_file, *CASES[case], "--out", tmp_path / "run") == 0
    found, path = recorded(tmp_path / "run"), GOLDEN / f"{case}.json"
    if os.environ.get("REGENERATE"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(path.read_text())
    close = {"rel": 1e-4}
    assert len(found["rounds"]) == len(golden["rounds"])
    for one, other in zip(found["rounds"], golden["rounds"], strict=True):
        assert one["virtual_seconds"] == other["virtual_seconds"]
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], **close)
        assert list(one["edges"]) == list(other["edges"])
        for name, edge in one["edges"].items():
            assert {key: edge[key] for key in EXACT} == {key: other["edges"][name][key] for key in EXACT}
            assert edge["train_loss"] == pytest.approx(other["edges"][name]["train_loss"], **close)
    for key in ("base_loss", "tuned_loss"):
        assert found[key] == pytest.approx(golden[key], **close)
    assert found["norms"] == pytest.approx(golden["norms"], rel=1e-3)
    if found["machine"] == golden["machine"]:
        assert found["adapter"] == golden["adapter"]
