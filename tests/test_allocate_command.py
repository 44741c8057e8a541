"""`fedpipe allocate`, from a run file to one that `fedpipe run` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from campaigns_made import QUIET, Curves
from runs import here, load, records

from fedpipe_ray.__main__ import make_fleet
from fedpipe_ray.arguments import parse
from fedpipe_ray.display import Display
from fedpipe_ray.trial import SerialExecutor
from tuning.allocate import as_settings
from tuning.allocation import allocate


@pytest.fixture
def planned_file(run_file: Path) -> Path:
    """A run of `fedpipe`."""
    run_file.write_text(run_file.read_text().replace("{name: lora, rank: 4, alpha: 8}", "{name: fedpipe, rank: 4}"))
    return run_file


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--measure", "1"], "--measure 1: one run alone has nothing to be compared with"),
        (["--measure", "-1"], "--measure -1: 0, or at least 2"),
        (["--measure", "2", "evaluate.every=0"], "evaluate.every: 0, and --measure compares validation losses"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    options: list[str], message: str, planned_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here("allocate", planned_file, "--latency", "30s", "--out", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_plan_is_announced_where_none_follows(
    planned_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here("allocate", planned_file, "--latency", "1ms", "--trials", "10", "--out", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert "misses latency by" in said.err
    assert "follows" not in said.out + said.err


def test_the_choice_and_its_gap(planned_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """3 trials find little and the planner the optimum: its row is the first, chosen, and the gap is its own.

    Measured, with losses that rise with the ranks, the last promoted wins, and the gap is that one's.
    """
    options = parse(["allocate", str(planned_file), "--latency", "30s", "--trials", "3", "--sampler", "cmaes"])
    run = load(planned_file, "method.deadline_seconds=30")
    allocate(run, options, tmp_path / "a", make_fleet, SerialExecutor, Display("plain"))
    said = capsys.readouterr().out
    assert "1 is chosen by quality, for nothing was measured" in said
    assert "its gap to the exact optimum of the same costs: 0.0" in said
    assert "FedPipe's own planner gives 1" in said
    assert said.count("CMA-ES knows no constraints") == 1
    options.measure, options.trials, options.sampler = 3, 20, "random"
    executor = Curves(lambda run: [float(sum(size(one) for one in run.method["plans"].values()))] * run.rounds)
    chosen = allocate(run, options, tmp_path / "b", make_fleet, lambda: executor, Display("plain"))
    said = capsys.readouterr().out
    assert "is chosen by validation loss after all rounds" in said
    assert ", stopped after 1 of 2" in said
    assert "its gap to the exact optimum of the same costs: 0.0" not in said
    assert load(tmp_path / "b" / "allocation.yaml").method["plans"] == as_settings(chosen.plans)
    shown = [Path(word) for word in said.split() if word.startswith(str(tmp_path))]
    assert [path.name for path in shown] == ["pareto.html", "measured", "allocation.yaml"]
    assert all(path.exists() for path in shown)


def test_memory_of_the_profiles_is_kept_without_being_asked(planned_file: Path, tmp_path: Path) -> None:
    """One byte less than the best takes; a run refuses plans above an edge's capacity."""
    options = parse(["allocate", str(planned_file), "--latency", "30s", "--trials", "20", "--sampler", "random"])

    def taken(*overrides: str) -> int:
        run, out = load(planned_file, "method.deadline_seconds=30", *overrides), tmp_path / str(len(overrides))
        return int(allocate(run, options, out, make_fleet, SerialExecutor, QUIET).outcome.memory_bytes)

    most = taken() - 1
    assert taken(*(f"fleet.edges.{edge}.training_memory_bytes={most}" for edge in "abc")) <= most


def size(given: dict[str, Any]) -> int:
    return int(sum(given["ranks"].values()))


@pytest.mark.services
def test_from_a_run_file_to_a_run(planned_file: Path, tmp_path: Path) -> None:
    """Searched, two of the front measured, and the chosen one run: every edge does what it was given."""
    out = tmp_path / "out"
    options = ["--latency", "30s", "--memory-from-profiles", "--trials", "20", "--measure", "2"]
    assert here("allocate", planned_file, *options, "--out", out) == 0
    chosen = load(out / "allocation.yaml")
    assert set(chosen.method["plans"]) == {"a", "b", "c"}
    assert chosen.method["deadline_seconds"] == 30
    assert here("run", out / "allocation.yaml", "--out", tmp_path / "run") == 0
    assert [record["edges"]["a"]["status"] for record in records(tmp_path / "run")] == ["ok", "ok"]
    assert all(record["virtual_seconds"] <= 30 for record in records(tmp_path / "run"))
