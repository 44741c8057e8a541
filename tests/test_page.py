"""The page of a run: what it reads, what it compares, what it says of runs that lack something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from histories import PROFILE, edge, line, write
from runs import ROOT, here

from fedpipe_ray.errors import UserError
from fedpipe_ray.page import figures
from fedpipe_ray.page.groups import grouped
from fedpipe_ray.page.history import History, best_within, cost_to
from fedpipe_ray.page.page import sections, write_page
from fedpipe_ray.page.tables import comparison, fairness, headline, spread


def keys(*places: str) -> list[str]:
    return [section.key for section in sections([History.read(place) for place in places])]


def test_every_clock(tmp_path: Path) -> None:
    history = History.read(write(tmp_path / "a", [3.0, 2.0]))
    assert {kind: history.course("loss", kind) for kind in ("round", "virtual s", "MB", "wall s")} == {
        "round": ([1.0, 2.0], [3.0, 2.0]),
        "virtual s": ([5.0, 10.0], [3.0, 2.0]),
        "MB": ([2.0, 4.0], [3.0, 2.0]),
        "wall s": ([3.0, 6.0], [3.0, 2.0]),
    }


def test_budget_and_target(tmp_path: Path) -> None:
    """Accuracy is better where it is higher; a value that came after the budget does not count."""
    history = History.read(write(tmp_path / "a", [3.0, 2.0, 2.5]))
    assert [best_within(history, "loss", "virtual s", most) for most in (4.0, 5.0, 15.0)] == [None, 3.0, 2.0]
    assert best_within(history, "accuracy", "MB", 6.0) == 0.8
    assert cost_to(history, "loss", "MB", 2.5) == 4.0
    assert cost_to(history, "loss", "MB", 1.0) is None


def test_runs_that_differ_in_seed_are_one_line_with_a_band(tmp_path: Path) -> None:
    """Mean (3 + 5) / 2 and sample deviation sqrt(2) at round 1; the second round of one alone is left out."""
    places = [write(tmp_path / "s0", [3.0, 2.0]), write(tmp_path / "s1", [5.0], seed=1)]
    (group,) = grouped([History.read(place) for place in places])
    x, mean, deviation = group.course("loss", "virtual s")
    assert (group.label, x, mean, deviation) == ("lora", [5.0], [4.0], [pytest.approx(2**0.5)])
    figure: Any = figures.quality(group.members, "loss")
    assert [trace.fill for trace in figure.data] == ["toself", None] * 4


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ([{"method": "lora"}, {"method": "flora"}], ["lora", "flora"]),
        ([{"local": {"lr": 0.1}}, {"local": {"lr": 0.2}}], ["lr 0.1", "lr 0.2"]),
        ([{}, {}], ["run0", "run1"]),
    ],
)
def test_what_tells_runs_apart(tmp_path: Path, changes: list[dict[str, Any]], labels: list[str]) -> None:
    places = [write(tmp_path / f"run{number}", [3.0], **change) for number, change in enumerate(changes)]
    assert [group.label for group in grouped([History.read(place) for place in places])] == labels


def test_the_same_run_twice_is_one(tmp_path: Path) -> None:
    history = History.read(write(tmp_path / "a", [3.0]))
    assert [group.seeds for group in grouped([history, history])] == [1]


def test_comparison(tmp_path: Path) -> None:
    """Both have 5 s: 3 and 4. All reach 3.5: the first in round 1, the second in round 2."""
    places = [write(tmp_path / "a", [3.0]), write(tmp_path / "b", [4.0, 3.5], "flora")]
    table = comparison(grouped([History.read(place) for place in places]), "loss")
    assert "loss within 5 virtual s" in table
    assert "round to loss 3.5" in table
    assert "<td>lora</td><td>3</td><td>3</td><td>1</td><td>5</td><td>2</td>" in table
    assert "<td>flora</td><td>4</td><td>4</td><td>2</td><td>10</td><td>4</td>" in table


def test_spread() -> None:
    assert [spread([2.0]), spread([1.0, 3.0]), spread([2.0, None]), spread([None])] == [
        "2", "2 ± 1.4", "2 (1 of 2)", "-",
    ]  # fmt: skip


def test_phases_of_a_round() -> None:
    """10 bytes at 80 bit/s and half a second of latency, a second of work, the rest of 4.5 s sends; then it waits."""
    found = figures.phases(PROFILE, edge(), 5.0)
    assert found == [("down", 1.5), ("compute", 1.0), ("up", 2.0), ("wait", 0.5)]
    assert figures.phases(PROFILE, edge("late", 7.0), 5.0) == [("lost", 5.0)]


def test_what_is_said_of_a_run(tmp_path: Path) -> None:
    place = write(tmp_path / "a", [3.0])
    with (tmp_path / "a" / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(line(2, 2.5, {"a": edge(), "b": edge("lost")})) + '\n{"round": 3, "ev')
    said = headline(History.read(place))
    assert said == (
        "lora on 2 edges, seed 0: 2 of 4 rounds, in progress. 4 MB sent both ways, 10 s on the virtual clock, "
        "6 s of rounds. Edges lost or late: 1."
    )
    summary = {"status": "finished", "base": {"global": {"loss": 4.0}}, "tuned": {"global": {"loss": 2.5}}}
    (tmp_path / "a" / "summary.json").write_text(json.dumps(summary))
    assert headline(History.read(place)).endswith("Loss on test rows 4 before, 2.5 after.")


def test_fairness_names_worst_and_best(tmp_path: Path) -> None:
    place = write(tmp_path / "a", [3.0])
    edges = {"a": {"loss": 2.0, "accuracy": 0.5}, "b": {"loss": 4.0, "accuracy": 0.25}}
    (tmp_path / "a" / "summary.json").write_text(json.dumps({"tuned": {"edges": edges}}))
    table = fairness(History.read(place), ["loss", "accuracy"])
    assert "<td>loss</td><td>3</td><td>4 (b)</td><td>2 (a)</td><td>1</td>" in table
    assert "<td>accuracy</td><td>0.375</td><td>0.25 (b)</td><td>0.5 (a)</td><td>0.125</td>" in table


def test_the_plan_by_layer_and_weight(tmp_path: Path) -> None:
    """Edges with one plan share an entry of the menu; an edge told anew has its newest."""
    place, module = write(tmp_path / "a", [3.0]), "model.layers.{}.self_attn.q_proj"
    plans = [
        {"round": 1, "plans": [{"edges": ["a", "b"], "bits": 8, "ranks": {module.format(0): 4}}]},
        {"round": 2, "plans": [{"edges": ["b"], "bits": 4, "ranks": {module.format(1): 2}}]},
    ]
    (tmp_path / "a" / "plans.jsonl").write_text("".join(json.dumps(one) + "\n" for one in plans))
    figure: Any = figures.plan(History.read(place))
    assert [button["label"] for button in figure.layout.updatemenus[0].buttons] == ["a: bits 8", "b: bits 4"]
    assert [[list(row) for row in trace.z] for trace in figure.data] == [[[4], [0]], [[0], [2]]]
    assert figure.data[0].x == ("q_proj",)


def test_a_large_fleet_stays_readable(tmp_path: Path) -> None:
    """1,000 edges: figures show the first, the page says so, and the file is not much larger than plotly's script."""
    folder = tmp_path / "large"
    write(folder, [])
    names = [f"edge{number}" for number in range(1000)]
    lines = [line(number, 3.0, {name: edge() for name in names}) for number in range(1, 21)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    history = History.read(str(folder))
    history.config["fleet"]["edges"] = dict.fromkeys(names, PROFILE)
    notes = " ".join(section.note for section in sections([history]))
    assert "The first 40 of 1000 edges." in notes
    write_page(tmp_path / "page.html", [history])
    assert (tmp_path / "page.html").stat().st_size < 8e6


def test_a_run_without_a_round_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = write(tmp_path / "a", [])
    assert keys(place) == ["title", "run0-configuration", "run0-environment"]
    assert here("report", place, "--out", tmp_path / "page.html") == 0
    assert "no round is done yet" in capsys.readouterr().out


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert here("report", tmp_path) == 2
    assert "is not a run folder: it has no config.yaml" in capsys.readouterr().err
    for text in ("{", "", "- 1"):
        (tmp_path / "config.yaml").write_text(text)
        assert here("report", tmp_path) == 2
        assert "config.yaml cannot be read (" in capsys.readouterr().err
    place = write(tmp_path / "a", [3.0])
    (tmp_path / "file").write_text("")
    assert here("report", place, "--out", tmp_path / "file" / "page.html") == 2
    assert "give another file with --out" in capsys.readouterr().err


def test_a_text_in_the_data_stays_text(tmp_path: Path) -> None:
    """Names are the user's own, but a page must not run them."""
    place = write(tmp_path / "a", [3.0], "</script><b>x")
    write_page(tmp_path / "page.html", [History.read(place)])
    text = (tmp_path / "page.html").read_text()
    assert "</script><b>x" not in text
    with pytest.raises(UserError, match=r"no config\.yaml"):
        History.read(str(tmp_path / "nowhere"))


def test_to_look_at_runs_takes_no_torch() -> None:
    """Its import takes several seconds."""
    code = "import sys, fedpipe_ray.page.report, fedpipe_ray.page.watch; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT).stdout == b"False\n"


def test_a_run_writes_its_page(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At its end, and says where; again when it is resumed. That it cannot be written does not fail the run."""
    out = tmp_path / "out"
    assert here("run", run_file, "--out", out) == 0
    assert f"{out}/report.html" in capsys.readouterr().out
    first = (out / "report.html").read_text()
    assert "2 of 2 rounds, finished" in first
    (out / "report.html").unlink()
    (out / "report.html").mkdir()
    assert here("resume", out, "rounds=3") == 0
    assert "report.html was not written" in (out / "log.txt").read_text()
