"""`fedpipe evaluate RUN --lm-eval`: a local task on local rows, offline; figures against a loop written out here."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import WORDS
from refusals import assert_refused
from runs import here, labelled, tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

TASK = """
task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: {words}
doc_to_target: "{{{{question.split()[-1]}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_dir: Path) -> Path:
    """A folder with a finished run, `tiny.yaml`, and the task file of the rows of edge b."""
    folder = tmp_path_factory.mktemp("lm-eval")
    file = tiny_run(folder, model_dir, data_dir)
    assert here("run", file, "local.lr=0.03", "--out", folder / "run") == 0
    task = TASK.format(rows=data_dir / "b.jsonl", words=json.dumps(WORDS))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "last_word.yaml").write_text(task)
    (folder / "hub.yaml").write_text(task.replace("dataset_path: json", "dataset_path: nobody/nothing"))
    (folder / "broken.yaml").write_text(task.replace("multiple_choice", "guessing"))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that `datasets` copies go to a folder of the test's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def accuracy(model: Any, folder: Path, rows: list[dict[str, str]]) -> float:
    """How often the last word of the prompt is the likeliest of all words after it."""
    tokenizer, right = AutoTokenizer.from_pretrained(folder), 0
    words = [tokenizer.convert_tokens_to_ids(word) for word in WORDS]
    for row in rows:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([tokenizer(row["question"]).input_ids])).logits[0, -1]
        right += WORDS[int(scores[words].argmax())] == row["question"].split()[-1]
    return right / len(rows)


@pytest.mark.services
def test_figures_of_a_local_task(
    place: Path, model_dir: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    file = place / "tasks" / "last_word.yaml"
    assert here("evaluate", place / "run", "--lm-eval", file) == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (data_dir / "b.jsonl").read_text().splitlines()]
    plain = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    expected = [accuracy(plain, model_dir, rows)]
    tuned = peft.PeftModel.from_pretrained(plain, place / "run" / "adapter").eval()
    expected.append(accuracy(tuned, model_dir, rows))
    found = json.loads((place / "run" / "lm_eval.json").read_text())["last_word"]
    assert (found["rows"], found["shots"], found["round"], found["limit"]) == (60, 0, 2, None)
    assert expected[0] > 0.9  # embeddings are tied: an untrained model repeats
    assert expected[1] < expected[0]
    cells = []
    for name, share in zip(("base", "tuned"), expected, strict=True):
        stderr = math.sqrt(share * (1 - share) / (len(rows) - 1))
        assert found["metrics"]["acc"][name] == {"value": pytest.approx(share), "stderr": pytest.approx(stderr)}
        cells.append(f"{share:.3f} ± {stderr:.3f}")
    assert any(
        line.split()[:3] == ["last_word", "acc", "↑"] and all(c in line for c in cells) for line in said.splitlines()
    )

    arguments = ("--lm-eval", "last_word", "--lm-eval-path", place / "tasks", "--limit", 5, "--batch-size", 2)
    assert here("evaluate", place / "run", *arguments, "--out", place / "own.json") == 0
    assert json.loads((place / "own.json").read_text())["last_word"]["rows"] == 5


def test_what_is_refused(
    place: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place / "run"
    (tmp_path / "notes.json").write_text("mine")
    file = place / "tasks" / "last_word.yaml"
    for arguments, says in (
        ((tmp_path, "--lm-eval", file), "is not a run folder"),
        ((run, "--lm-eval", ","), "--lm-eval names no task"),
        ((run, "--lm-eval", place / "none.yaml"), "none.yaml: there is no such file"),
        ((run, "--lm-eval", place / "broken.yaml"), "broken.yaml: the harness cannot load it"),
        ((run, "--lm-eval", place / "hub.yaml"), "its rows are not on this machine and the hub cannot be reached ... "
         "HF_HUB_OFFLINE is set. Load the data set once"),
        ((run, "--lm-eval", file, "--lm-eval-path", place / "none"), "--lm-eval-path ... there is no such folder"),
        ((run, "--lm-eval", file, "--data", "x.jsonl"), "--data and --lm-eval do not go together"),
        ((run, "--lm-eval", file, "--out", tmp_path / "notes.json"), "notes.json: is there, and not a file of this"),
        ((run, "--limit", 5), "--limit goes with --lm-eval TASKS; leave it out, or name tasks"),
    ):  # fmt: skip
        assert_refused(capsys, "evaluate", *arguments, says=says)
    assert (tmp_path / "notes.json").read_text() == "mine"
    classifier = tmp_path / "classifier"
    assert here("run", place / "tiny.yaml", labelled(data_dir), "rounds=1", "--out", classifier) == 0
    assert_refused(capsys, "evaluate", classifier, "--lm-eval", file, says="trained a classifier, and the tasks")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert_refused(
        capsys, "evaluate", run, "--lm-eval", file, says="is not installed; pip install 'fedpipe-ray[lm-eval]'"
    )


@pytest.mark.services  # reads the harness's 14,000 task files
def test_unknown_names_have_neighbours(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says = "--lm-eval helaswag: the harness has no such task; did you mean hellaswag"
    assert_refused(capsys, "evaluate", place / "run", "--lm-eval", "helaswag", says=says)
