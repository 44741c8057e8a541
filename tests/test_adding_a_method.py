"""The example of docs/adding-a-method.md: short, found by its name, and what it says it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import ROOT, assert_same, here, load, opened_run, records, summary, tensors

from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Lost, Report

FILE = ROOT / "docs" / "examples" / "fair_lora.py"
NAME = "fair_lora:FairLora"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FILE.parent))


def fair(q: float) -> str:
    return f"method={{name: '{NAME}', rank: 4, alpha: 8, q: {q}}}"


def test_it_is_short_and_its_page_shows_it() -> None:
    assert len(FILE.read_text().splitlines()) < 100
    assert f'--8<-- "{FILE.relative_to(ROOT)}"' in (ROOT / "docs" / "adding-a-method.md").read_text()


def test_runs_by_its_name_and_q_decides(run_file: Path, tmp_path: Path) -> None:
    """q = 0 is `lora`, bit for bit; q = 4 is another adapter, which is better than the base model."""
    for out, method in (("lora", "method.rank=4"), ("zero", fair(0)), ("four", fair(4))):
        assert here("run", run_file, method, "--out", tmp_path / out) == 0
    assert_same(tensors(tmp_path / "zero"), tensors(tmp_path / "lora"))
    zero, four = tensors(tmp_path / "zero"), tensors(tmp_path / "four")
    assert any(not torch.equal(zero[name], four[name]) for name in zero)
    found = summary(tmp_path / "four")
    assert found["tuned"]["global"]["loss"] < found["base"]["global"]["loss"]
    assert [line["method"] for line in records(tmp_path / "four")] == [{}, {}]


def test_weights_by_hand(run_file: Path) -> None:
    """Rows 1 and 3, losses 4 and 2, q = 2: weights 1 x 16 and 3 x 4; the mean of values 0 and 7 is 12 / 28 x 7 = 3."""
    _, method, server, state = opened_run(run_file, fair(2))
    assert type(method).__name__ == "FairLora"

    def report(edge: str, rows: float, loss: float, value: float) -> Report:
        update = Message({name: torch.full_like(t, value) for name, t in state.tensors.items()}, {"loss": loss})
        cost = Lost(edge, "").cost
        return Report(edge, 0, rows, loss, cost, fetch=lambda: update)

    reports = [report("a", 1, 4.0, 0.0), Lost("b", "away"), report("c", 3, 2.0, 7.0)]
    after = method.aggregate(state, reports, server, 0, rng_for(0, 0, "aggregate"))
    for name, tensor in after.tensors.items():
        assert torch.allclose(tensor, torch.full_like(tensor, 3.0)), name


def test_an_impossible_q_is_refused(run_file: Path) -> None:
    with pytest.raises(ValueError, match=r"method\.q: -1\.0 must not be negative"):
        make_method(load(run_file, fair(-1)).method)
