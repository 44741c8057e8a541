"""plans.jsonl: what edges were told, each plan once; a resumed run has the same file as one that was never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import here, records

from fedpipe_ray.message import Message
from fedpipe_ray.plan_lines import gathered, scattered
from fedpipe_ray.planned import MOST, Plans, told

A = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"


def order(rank: int, **numbers: float) -> Message:
    return Message({A.format(0): torch.zeros(rank, 8), A.format(1): torch.zeros(2, 8)}, numbers)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "plans.jsonl").read_text().splitlines()]


def test_an_order_is_told_by_its_ranks_and_numbers() -> None:
    """Factors that act frozen have another prefix, data has more than MOST numbers, NaN is none, a slash is ours."""
    frozen = Message({"frozen." + A.format(0): torch.zeros(3, 8)}, {f"seed{i}": 0.0 for i in range(MOST + 1)})
    found = told({"a": order(4, bits=8, odd=float("nan"), **{"control/used": 3}), "b": frozen})
    ranks = {"model.layers.0.self_attn.q_proj": 4, "model.layers.1.self_attn.q_proj": 2}
    assert found == {"a": {"bits": 8, "ranks": ranks}, "b": {}}


def test_equal_plans_stand_once() -> None:
    plans = told({"a": order(4, bits=8), "b": order(4, bits=4), "c": order(4, bits=8)})
    found = gathered(plans)
    assert [one["edges"] for one in found] == [["a", "c"], ["b"]]
    assert scattered(found) == plans


def test_a_line_says_what_is_new(tmp_path: Path) -> None:
    plans = Plans(tmp_path)
    first = {"a": {"bits": 8}, "b": {"bits": 8}}
    plans.append(1, first, {"a/mean.q": 0.5, "a/rows": 3.0})
    plans.append(2, first, {"a/mean.q": 0.5})
    plans.append(3, {"b": {"bits": 4}}, {"a/mean.q": 0.25})
    assert lines(tmp_path) == [
        {"round": 1, "plans": [{"edges": ["a", "b"], "bits": 8}], "scores": {"a": {"q": 0.5}}},
        {"round": 3, "plans": [{"edges": ["b"], "bits": 4}], "scores": {"a": {"q": 0.25}}},
    ]


def test_rounds_taken_back_are_written_again(tmp_path: Path) -> None:
    """Also after a torn last line."""
    plans = Plans(tmp_path)
    plans.append(1, {"a": {"bits": 8}}, {})
    plans.append(2, {"a": {"bits": 4}}, {})
    with (tmp_path / "plans.jsonl").open("a") as file:
        file.write('{"round": 3, "pla')
    again = Plans(tmp_path)
    again.rewind(1)
    again.append(2, {"a": {"bits": 8}}, {})
    again.append(3, {"a": {"bits": 4}}, {})
    assert [line["round"] for line in lines(tmp_path)] == [1, 3]


@pytest.mark.parametrize("settings", ["fedpipe", "buffered"])
def test_a_resumed_run_has_the_same_plans(run_file: Path, tmp_path: Path, settings: str) -> None:
    """Its newest checkpoint is lost, so the last round is run again."""
    chosen = {
        "fedpipe": ["method={name: fedpipe, rank: 4, refresh_every: 1}", "fleet.edges.a.training_memory_bytes=null"],
        "buffered": ["fleet.mode=buffered", "fleet.buffer=2", "evaluate.every=0"],
    }
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert here("run", run_file, "rounds=4", "local.steps=1", *chosen[settings], "--out", whole) == 0
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoint" / "round-0004")
    (again / "summary.json").unlink()
    assert here("resume", again) == 0
    assert lines(again) == lines(whole)
    assert {line["round"] for line in lines(whole)} >= ({1, 2, 3, 4} if settings == "fedpipe" else {1})
    clock = 0.0
    for line in records(whole):
        ends = [one["started_seconds"] + one["virtual_seconds"] for one in line["edges"].values()]
        assert all(clock - 1e-9 <= end <= clock + line["virtual_seconds"] + 1e-9 for end in ends)
        clock += line["virtual_seconds"]
