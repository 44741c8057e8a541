"""`fedpipe evaluate`: the numbers of the run's own summary, and those of a loop written out here."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from runs import here, tiny_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fedpipe_ray.__main__ import load, make_fleet
from fedpipe_ray.display import Display
from fedpipe_ray.results import evaluate_adapter, evaluate_run


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """The tiny Llama with larger weights, so that it answers words where the other one says nothing."""
    folder = tmp_path_factory.mktemp("talkative")
    for file in model_dir.glob("tokenizer*"):
        shutil.copy(file, folder)
    config = AutoConfig.from_pretrained(model_dir, initializer_range=0.5, tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, talkative: Path, data_dir: Path) -> Path:
    """The folder of a finished run, its run file beside it."""
    folder = tmp_path_factory.mktemp("evaluate")
    config = tiny_run(folder, talkative, data_dir)
    assert here("run", config, "local.lr=0.003", "--out", folder / "run") == 0
    return folder / "run"


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """Four greedy tokens."""
    ids = torch.tensor([tokenizer(prompt).input_ids])
    out = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(out, skip_special_tokens=True)).strip()


@pytest.fixture(scope="module")
def own(finished: Path, talkative: Path) -> Path:
    """A CSV file that no edge has: one row stands in it twice, one has the base's answer, one the tuned model's."""
    tokenizer, plain = AutoTokenizer.from_pretrained(talkative), AutoModelForCausalLM.from_pretrained(talkative).eval()
    of_base = answer(plain, tokenizer, "one two three")
    of_tuned = answer(peft.PeftModel.from_pretrained(plain, finished / "adapter").eval(), tokenizer, "four five")
    rows = [("red green blue", "red"), ("red green blue", "red"), ("one two three", of_base), ("four five", of_tuned)]
    path = finished.parent / "own.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *rows])
    return path


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """The last table on the screen: edge -> its cells."""
    lines = capsys.readouterr().out.splitlines()
    at = max(i for i, line in enumerate(lines) if line.startswith("test rows: base -> tuned"))
    cells = [re.split(r" {2,}", line.strip()) for line in lines[at + 2 :]]
    return {name: values for name, *values in cells}


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def written(metrics: tuple[dict[str, Any], dict[str, Any]]) -> list[Any]:
    """As summary.json has it."""
    return list(json.loads(json.dumps(metrics)))


def test_a_run_gives_the_numbers_of_its_summary(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert here("evaluate", finished) == 0
    rows, found = said(capsys), summary(finished)
    assert list(rows) == ["a", "b", "c", "all edges"]
    for name in "abc":
        before, after = found["base"]["edges"][name], found["tuned"]["edges"][name]
        assert rows[name][0] == f"{before['loss']:.3f} -> {after['loss']:.3f}"
        assert rows[name][-1] == f"{before['token_accuracy']:.3f} -> {after['token_accuracy']:.3f}"
    exact = evaluate_run(finished, [], None, make_fleet, Display("none"))
    assert written(exact) == [found["base"], found["tuned"]]
    assert found["tuned"]["global"]["loss"] < found["base"]["global"]["loss"]


def by_hand(model: Any, tokenizer: Any, path: Path) -> tuple[float, float, int]:
    """(loss a response token, exact match, response tokens) of every row of a CSV file, one row at a time."""
    total, tokens, right, rows = 0.0, 0, 0, list(csv.DictReader(path.read_text().splitlines()))
    for row in rows:
        prompt, response = tokenizer(row["question"]).input_ids, tokenizer(row["answer"]).input_ids
        response = [*response, tokenizer.eos_token_id]
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0].log_softmax(-1)  # [length, vocabulary]
        total -= sum(float(scores[len(prompt) + i - 1, token]) for i, token in enumerate(response))
        tokens += len(response)
        right += answer(model, tokenizer, row["question"]) == row["answer"]
    return total / tokens, right / len(rows), tokens


def test_files_of_ones_own(finished: Path, own: Path, talkative: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["evaluate.generate=4", "evaluate.max_new_tokens=4"]
    base, tuned = evaluate_run(finished, overrides, str(own), make_fleet, Display("none"))
    tokenizer, plain = AutoTokenizer.from_pretrained(talkative), AutoModelForCausalLM.from_pretrained(talkative).eval()
    expected_base = by_hand(plain, tokenizer, own)
    expected_tuned = by_hand(peft.PeftModel.from_pretrained(plain, finished / "adapter").eval(), tokenizer, own)
    for found, (loss, exact, tokens) in ((base, expected_base), (tuned, expected_tuned)):
        assert list(found["edges"]) == ["data"]
        assert (found["global"]["rows"], found["global"]["tokens"], found["global"]["generated"]) == (4, tokens, 4)
        assert found["global"]["loss"] == pytest.approx(loss, abs=1e-5)
        assert found["global"]["exact_match"] == exact
        assert 0 < exact <= found["global"]["rouge_l"] < 1
    assert expected_tuned[0] < expected_base[0]

    again = evaluate_adapter(finished / "adapter", load(finished / "config.yaml", overrides), str(own), Display("none"))
    assert written(again) == written((base, tuned))

    capsys.readouterr()
    for arguments in ((finished,), (finished / "adapter", "--config", finished.parent / "tiny.yaml")):
        assert here("evaluate", *arguments, "--data", own, *overrides) == 0
        rows = said(capsys)
        assert list(rows) == ["data", "all edges"]
        for cells in rows.values():
            assert cells[0] == f"{base['global']['loss']:.3f} -> {tuned['global']['loss']:.3f}"
            assert cells[-1] == f"{base['global']['exact_match']:.3f} -> {tuned['global']['exact_match']:.3f}"


def test_answers_of_the_edges(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert here("evaluate", finished, "evaluate.generate=2") == 0
    head = capsys.readouterr().out
    assert "rouge l" in head
    assert "exact match" in head
    _, tuned = evaluate_run(finished, ["evaluate.generate=2"], None, make_fleet, Display("none"))
    assert {name: metrics["generated"] for name, metrics in tuned["edges"].items()} == {"a": 2, "b": 2, "c": 2}
    assert all(0 <= metrics["exact_match"] <= metrics["rouge_l"] <= 1 for metrics in tuned["edges"].values())
    assert tuned["global"]["generated"] == 6


def test_classifier(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The adapter carries the trained head; of the base it is the untrained one, the same as in the run."""
    config, folder = finished.parent / "tiny.yaml", tmp_path / "run"
    source = load(config, []).data.source
    data = f'data={{source: "{source}", task: classification, text: "{{question}}", label: kind, max_length: 16}}'
    assert here("run", config, data, "--out", folder) == 0
    one = evaluate_run(folder, [], source.replace("{edge}", "b"), make_fleet, Display("none"))
    with_labels = [data, "data.labels=[x, y, z]"]
    other = evaluate_adapter(
        folder / "adapter", load(config, with_labels), source.replace("{edge}", "b"), Display("none")
    )
    assert written(one) == written(other)
    assert (one[1]["global"]["rows"], set(one[1]["global"])) == (60, {"loss", "accuracy", "macro_f1", "rows"})
    capsys.readouterr()
    assert here("evaluate", folder / "adapter", "--config", config, data, "--data", source.replace("{edge}", "b")) == 2
    assert "data.labels: name the adapter's classes in order" in capsys.readouterr().err


def test_what_is_wrong_is_said(finished: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = finished.parent / "tiny.yaml"
    adapter = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter | {"target_modules": ["query_key_value"]}))
    (tmp_path / "empty.jsonl").write_text('{"question": "red", "answer": ""}\n')
    wrong = {
        (finished / "adapter",): "--config CONFIG --data SOURCE",
        (finished.parent,): "is neither a run folder (config.yaml) nor a PEFT adapter",
        (tmp_path, "--config", config, "--data", own): f"{tmp_path} is no adapter for",
        (finished, "--data", tmp_path / "none.jsonl"): "none.jsonl",
        (finished, "--data", tmp_path / "empty.jsonl"): "no test row in",
        (finished, "evaluate.generat=3"): "did you mean generate?",
    }
    for arguments, words in wrong.items():
        assert here("evaluate", *arguments) == 2, arguments
        assert words in capsys.readouterr().err.replace("\n", " ")
