"""Trackers of runs that are killed, stopped, or whose store fails in the middle of a round."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from pathlib import Path

import psutil
import pytest
import tracked
from runs import Started, fedpipe, held_run, load, records, summary

from fedpipe_ray.settings import Run

pytestmark = pytest.mark.services
ROUNDS = 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_dir: Path) -> Path:
    return held_run(tmp_path_factory.mktemp("stopped"), model_dir, data_dir, ROUNDS)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


def settings(uri: str) -> list[str]:
    return [f"track.mlflow={uri}", "track.wandb=offline"]


def assert_whole(folder: Path, uri: str, run: Run) -> None:
    """Every tracker has every round once, with the figures of rounds.jsonl."""
    wanted = {n: points for n, points in tracked.expected(folder, run).items() if "test/tuned" not in n}
    assert len(records(folder)) == ROUNDS
    found, in_mlflow = tracked.mlflow(uri)
    in_wandb, in_tensorboard = tracked.wandb(folder)[1], tracked.tensorboard(folder)
    assert found.info.status == "FINISHED"
    for name, points in wanted.items():
        assert in_mlflow[name] == in_wandb[name] == points, name
        assert [step for step, _ in in_tensorboard[name]] == [step for step, _ in points], name
        assert [value for _, value in in_tensorboard[name]] == pytest.approx([v for _, v in points], rel=1e-6), name


def test_a_killed_run_goes_on_in_the_same_tracker_runs(tiny: Path, uri: str, tmp_path: Path, started: Started) -> None:
    folder = tmp_path / "run"
    started.run(tiny, "--out", folder, *settings(uri))
    before = json.loads((folder / "trackers.json").read_text())
    assert [one["round"] for one in before.values()] == [3, 3, 3]
    started.kill()
    done = fedpipe("resume", folder, PYTHONPATH=started.path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed and is off" not in done.stdout
    after = json.loads((folder / "trackers.json").read_text())
    assert {name: one.get("run") for name, one in after.items()} == {name: o.get("run") for name, o in before.items()}
    assert_whole(folder, uri, load(tiny))


def test_control_c_closes_them(tiny: Path, uri: str, tmp_path: Path, started: Started) -> None:
    """A terminal's Ctrl-C reaches all processes of its session."""
    folder = tmp_path / "run"
    process = started.run(tiny, "--out", folder, *settings(uri))
    own = psutil.Process(process.pid)
    for one in [own, *(child for child in own.children(recursive=True) if os.getsid(child.pid) == os.getsid(own.pid))]:
        one.send_signal(signal.SIGINT)
    started.wait_for(lambda: "stopping after this round" in (folder / "log.txt").read_text())
    started.release()
    assert process.wait(120) == 130
    assert summary(folder)["status"] == "interrupted"
    run, series = tracked.mlflow(uri)
    assert run.info.status == "KILLED"
    found, history = tracked.wandb(folder)
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [1]
    for one in (series, history, tracked.tensorboard(folder)):
        assert [step for step, _ in one["train/loss"]] == [1, 2, 3, 4]
        assert [step for step, _ in one["test/base/loss"]] == [0]
    done = fedpipe("resume", folder, PYTHONPATH=started.path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_whole(folder, uri, load(tiny))


def test_a_store_that_fails_in_the_middle_is_filled_later(
    tiny: Path, uri: str, tmp_path: Path, started: Started
) -> None:
    """The database loses a table during round 4: the run ends well, and a resumed one adds what is missing."""
    folder, database = tmp_path / "run", tmp_path / "mlflow.db"
    process = started.run(tiny, "--out", folder, "rounds=5", *settings(uri))
    with sqlite3.connect(database) as connection:
        connection.execute("ALTER TABLE metrics RENAME TO hidden")
    started.release()
    assert process.wait(120) == 0
    said = started.log.read_text()
    assert said.count("warning: MLflow failed and is off until the run is resumed: ") == 1
    assert summary(folder)["status"] == "finished"
    assert [step for step, _ in tracked.tensorboard(folder)["train/loss"]] == [1, 2, 3, 4, 5]
    with sqlite3.connect(database) as connection:
        connection.execute("ALTER TABLE hidden RENAME TO metrics")
    done = fedpipe("resume", folder, f"rounds={ROUNDS}", PYTHONPATH=started.path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_whole(folder, uri, load(tiny))
