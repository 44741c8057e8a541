"""What a run leaves is loaded by plain PEFT and plain transformers, and computes there what it computes here."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from runs import here, load
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.model import Base
from fedpipe_ray.record import RunFolder
from fedpipe_ray.run import first_view, server_site

TOKENS = torch.tensor([[3, 9, 17, 5, 10], [4, 4, 11, 12, 8]])  # [rows, length]
SMALL = {"vocab_size": 25, "pad_token_id": 1}
MODELS: dict[str, Any] = {  # an encoder alone: pretrained checkpoints have no head either
    "llama": None,
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=2)
    ),
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(
            **SMALL, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
    ),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(**SMALL, dim=32, hidden_dim=64, n_layers=2, n_heads=2)
    ),
}


def model_folder(kind: str, tmp_path: Path, model_dir: Path) -> Path:
    """A tiny model of this architecture, with the words of the tiny Llama."""
    if kind == "llama":
        return model_dir
    folder = tmp_path / kind
    torch.manual_seed(0)
    MODELS[kind]().save_pretrained(folder)
    for file in model_dir.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def trained(folder: Path, run_file: Path, *overrides: object) -> tuple[Any, Message]:
    """Our model with the state of the run that is made in `folder`, and the state."""
    assert here("run", run_file, *overrides, "--out", folder) == 0
    run = RunFolder.open(folder).run()
    state, point = RunFolder.open(folder).final_state(run)
    site = server_site(run, make_method(run.method), point.classes)
    return first_view(site, state).on(site.base), state


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    return result


def architecture(model: Any) -> list[tuple[str, Sequence[int]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_causal_adapter_and_merged_model(kind: str, run_file: Path, tmp_path: Path, model_dir: Path) -> None:
    folder, base = tmp_path / "run", model_folder(kind, tmp_path, model_dir)
    ours, _ = trained(folder, run_file, f"model.name={base}", "method.dropout=0.1")
    expected = logits(ours)
    plain = AutoModelForCausalLM.from_pretrained(base)
    before, names = logits(plain), architecture(plain)
    assert float((expected - before).abs().max()) > 0.01  # the adapter does something
    adapted = logits(peft.PeftModel.from_pretrained(plain, folder / "adapter"))
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-6)

    out = tmp_path / "merged"
    assert here("export", folder, "--out", out, "--merge") == 0
    assert not (out / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert type(merged) is type(AutoModelForCausalLM.from_pretrained(base))
    assert architecture(merged) == names
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert (
        AutoTokenizer.from_pretrained(out)("red green").input_ids
        == AutoTokenizer.from_pretrained(base)("red green").input_ids
    )

    assert here("export", folder, "--out", tmp_path / "again") == 0
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / "adapter" / file).read_bytes()


@pytest.mark.parametrize(("kind", "labels"), [("bert", "[z, x, y]"), ("distilbert", "[]"), ("llama", "[x, y, z]")])
def test_classifier(kind: str, labels: str, run_file: Path, tmp_path: Path, model_dir: Path) -> None:
    """The head, which no checkpoint has, is trained, sent, counted and exported with the adapter."""
    folder, base = tmp_path / "run", model_folder(kind, tmp_path, model_dir)
    data = f'{{source: "{load(run_file).data.source}", task: classification, text: "{{question}}", label: kind'
    data += f", labels: {labels}, max_length: 16, validation: 0.2, test: 0.2}}"
    ours, state = trained(folder, run_file, f"model.name={base}", f"data={data}")
    heads = {name: tensor for name, tensor in state.tensors.items() if ".lora_" not in name}
    expected_heads = {
        "bert": ["classifier.bias", "classifier.weight"],
        "distilbert": ["classifier.bias", "classifier.weight", "pre_classifier.bias", "pre_classifier.weight"],
        "llama": ["score.weight"],
    }
    assert sorted(name.removeprefix("base_model.model.") for name in heads) == expected_heads[kind]
    first = json.loads((folder / "rounds.jsonl").read_text().splitlines()[0])
    assert {edge["bytes_up"] for edge in first["edges"].values()} == {Message(state.tensors).total_bytes}

    names = labels.strip("[]").split(", ") if labels != "[]" else ["x", "y", "z"]
    untrained = Base.load(load(run_file, f"model.name={base}").model, "classification", names, seed=0).model
    moved = [
        (tensor - untrained.state_dict()[name.removeprefix("base_model.model.")]).abs()
        for name, tensor in heads.items()
    ]
    assert all(float(change.max()) > 1e-3 for change in moved)

    expected = logits(ours)
    torch.manual_seed(1)  # the head that plain transformers makes is another one, until the adapter's replaces it
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    shapes = architecture(plain)
    assert float((logits(plain) - expected).abs().max()) > 0.01
    adapted = logits(peft.PeftModel.from_pretrained(plain, folder / "adapter"))
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-6)
    assert "has no weights for" not in (folder / "log.txt").read_text()

    out = tmp_path / "merged"
    assert here("export", folder, "--out", out, "--merge") == 0
    merged = AutoModelForSequenceClassification.from_pretrained(out)
    assert merged.config.id2label == dict(enumerate(names))
    assert architecture(merged) == shapes
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["tuned"]["global"]) == {"loss", "accuracy", "macro_f1", "rows"}


def test_random_weights_are_told_of(
    run_file: Path, tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A masked language model has no pooler: a classifier on it computes with a random one, which an adapter lacks."""
    folder, base = tmp_path / "run", model_folder("bert", tmp_path, model_dir)
    whole = transformers.AutoModel.from_pretrained(base)
    kept = {name: tensor for name, tensor in whole.state_dict().items() if "pooler" not in name}
    whole.save_pretrained(base, state_dict=kept)
    data = f'data={{source: "{load(run_file).data.source}", task: classification, text: "{{question}}", label: kind}}'
    ours, _ = trained(folder, run_file, f"model.name={base}", data)
    said = capsys.readouterr().out
    assert said.count("has no weights for bert.pooler.dense.bias, bert.pooler.dense.weight") == 1
    assert here("export", folder, "--out", tmp_path / "merged", "--merge") == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(ours), rtol=0, atol=1e-5)


def test_export_of_classes_found_in_data_knows_them(run_file: Path, tmp_path: Path, model_dir: Path) -> None:
    """Labels that are numbers stand in their order, not in that of their digits."""
    rows = tmp_path / "rows"
    rows.mkdir()
    for edge in "abc":
        lines = [{"question": f"alpha {word}", "kind": i % 11} for i, word in enumerate(["one", "two", "red"] * 11)]
        (rows / f"{edge}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = f'{{source: "{rows}/{{edge}}.jsonl", task: classification, text: "{{question}} {{kind}}", label: kind}}'
    assert here("run", run_file, f"data={data}", "rounds=1", "--out", tmp_path / "run") == 0
    assert here("export", tmp_path / "run", "--out", tmp_path / "merged", "--merge") == 0
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {str(i): str(i) for i in range(11)}


STOPPING = '''
import os
from dataclasses import dataclass

from fedpipe_ray.methods.lora import Lora


@dataclass(frozen=True, kw_only=True)
class Stopping(Lora):
    """LoRA that gets the signal in the variable STOP when its weights are asked for."""

    def weights(self, state, site):
        if "STOP" in os.environ:
            os.kill(os.getpid(), int(os.environ["STOP"]))
        return super().weights(state, site)
'''


@pytest.mark.parametrize("merge", [(), ("--merge",)], ids=["adapter", "merged"])
def test_interrupted_export_leaves_nothing(
    merge: tuple[str, ...], run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stopping_method.py").write_text(STOPPING)
    monkeypatch.syspath_prepend(tmp_path)
    folder, out = tmp_path / "run", tmp_path / "out" / "model"
    assert here("run", run_file, "method.name=stopping_method:Stopping", "rounds=1", "--out", folder) == 0
    out.parent.mkdir()
    for number in (signal.SIGINT, signal.SIGTERM):
        monkeypatch.setenv("STOP", str(int(number)))
        assert here("export", folder, "--out", out, *merge) == 128 + number
        assert list(out.parent.iterdir()) == []
    monkeypatch.delenv("STOP")
    out.mkdir()  # an empty folder may be there already
    assert here("export", folder, "--out", out, *merge) == 0
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_export_keeps_what_is_there(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "run", tmp_path / "out"
    assert here("run", run_file, "rounds=1", "--out", folder) == 0
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert here("export", folder, "--out", out) == 2
    assert f"{out} is not empty" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert here("export", tmp_path / "nothing", "--out", tmp_path / "new") == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
