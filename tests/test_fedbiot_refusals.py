"""What `fedbiot` refuses, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from refusals import assert_refused
from runs import emulated
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method.beta=0.8", "method.beta: 0.8 leaves 1 of the 6 layers ... two; lower it to at most 0.75, or lower"),
        ("method.a=7", "method.beta: 0.2 leaves 1 of the 1 layers beside the adapter ... or lower method.a: 7"),
        ("method.a=8", "method.a: 8 adapter layers of the model's 8 leave none for an emulator; at most 6"),
        ("method.a=0", "method.a: 0 must be at least 1"),
        ("method={name: fedbiot, a: 3, split: ends}", "method.a: 3 layers cannot be halved ... give an even number"),
        ("method.beta=1", "method.beta: 1.0 must lie in [0, 1)"),
        ("method.beta=-0.1", "method.beta: -0.1 must lie in [0, 1)"),
        ("method.eps=-1", "method.eps: -1.0 must not be negative"),
        ("method.lam=-1", "method.lam: -1.0 must not be negative"),
        ("method.align_steps=-1", "method.align_steps: -1 must not be negative"),
        ("method.prealign_steps=-1", "method.prealign_steps: -1 must not be negative"),
        ("method.align_lr=0", "method.align_lr: 0.0 must be above 0"),
        ("method.align_batch=0", "method.align_batch: 0 must be above 0"),
        ("method.split=first", "method.split: 'first' is not valid ... 'last' or 'ends'"),
        ("method.positions=none", "method.positions: 'none' is not valid"),
        ("method.join=sum", "method.join: 'sum' is not valid"),
        ("method.targets=[nothing]", "method.targets: no module nothing; there are"),
        ("server.data=null", "server.data: fedbiot aligns the emulator on public rows; give server.data a source"),
        ("local.checkpointing=true", "local.checkpointing: it would take gradients below the adapter"),
        ("fleet={mode: buffered, buffer: 2, ray: false, edges: {a: {}, b: {}}}", "fleet.mode: buffered"),
    ],
)
def test_bad_settings(
    override: str, says: str, run_file: Path, tmp_path: Path, deep_dir: Path, public_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert_refused(capsys, "run", run_file, *emulated(deep_dir, public_file), override, says=says, out=tmp_path / "out")


def test_too_shallow_a_model(
    run_file: Path, tmp_path: Path, public_file: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says = "method.a: 2 adapter layers of the model's 2 leave none for an emulator; use a deeper model"
    assert_refused(
        capsys, "run", run_file, *emulated(model_dir, public_file), says=says, out=tmp_path / "out"
    )  # fmt: skip


def test_public_rows_that_are_not_there(
    run_file: Path, tmp_path: Path, deep_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says = "nothing.jsonl"
    assert_refused(
        capsys, "run", run_file, *emulated(deep_dir, tmp_path / "nothing.jsonl"), says=says, out=tmp_path / "out"
    )


def test_a_classifier(
    run_file: Path, tmp_path: Path, deep_dir: Path, public_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f'data={{source: "{public_file}", task: classification, text: "{{question}}", label: kind}}'
    says = "method.name: fedbiot keeps the head frozen and needs data.task: causal"
    assert_refused(
        capsys, "run", run_file, *emulated(deep_dir, public_file), data, says=says, out=tmp_path / "out"
    )  # fmt: skip


def test_a_quantized_model(
    run_file: Path, tmp_path: Path, deep_dir: Path, public_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    folder = tmp_path / "packed"
    AutoModelForCausalLM.from_pretrained(deep_dir).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    says = f"model.name: {folder} is quantized; fedbiot sends layers and needs 16 or 32 bits"
    assert_refused(capsys, "run", run_file, *emulated(folder, public_file), says=says, out=tmp_path / "out")


def test_an_alignment_that_diverges(
    run_file: Path, tmp_path: Path, deep_dir: Path, public_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs = [*emulated(deep_dir, public_file), "method.align_lr=1.e+30"]
    says = "the emulator's alignment diverged: loss ... lower method.align_lr: 1e+30"
    assert_refused(capsys, "run", run_file, *needs, says=says, out=tmp_path / "out")
