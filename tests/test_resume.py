"""A run that was killed, stopped or extended ends with the bits of one that never was, on both fleets."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from own_methods import Held
from runs import (
    Started,
    assert_like,
    assert_same,
    belonging,
    fedpipe,
    flip,
    held_run,
    here,
    manifest,
    records,
    repeatable,
    summary,
    tensors,
)

from fedpipe_ray.message import Message

ROUNDS = 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_dir: Path) -> Path:
    """A run file whose data are its own, so that a test may change them."""
    folder = tmp_path_factory.mktemp("resume")
    shutil.copytree(data_dir, folder / "data")
    return held_run(folder, model_dir, folder / "data", ROUNDS)


@pytest.fixture(scope="module")
def whole(tiny: Path) -> Path:
    """The folder of a run that was never stopped."""
    folder = tiny.parent / "whole"
    assert here("run", tiny, "--out", folder) == 0
    return folder


def test_killed_and_resumed(tiny: Path, whole: Path, tmp_path: Path, started: Started) -> None:
    folder = tmp_path / "run"
    started.run(tiny, "--out", folder)
    started.kill()
    assert manifest(folder)["round"] == len(records(folder)) == 3
    assert not (folder / "adapter").exists()
    with (folder / "rounds.jsonl").open("a") as file:  # as if it had been killed while it wrote
        file.write(json.dumps(records(folder)[-1] | {"round": 4}) + '\n{"round": 5, "train_l')
    done = fedpipe("resume", os.path.relpath(folder, tmp_path), cwd=tmp_path, PYTHONPATH=started.path)
    assert done.returncode == 0, done.stderr
    assert f"resuming {folder.name} after round 3" in done.stdout
    assert summary(folder)["status"] == "finished"
    assert_like(folder, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_after_the_round_and_resumed(
    number: signal.Signals, tiny: Path, whole: Path, tmp_path: Path, started: Started
) -> None:
    folder = tmp_path / "run"
    process = started.run(tiny, "--out", folder)
    process.send_signal(number)
    started.wait_for(lambda: "stopping after this round" in (folder / "log.txt").read_text())
    assert len(records(folder)) == 3
    started.release()
    assert process.wait(120) == 128 + number
    assert manifest(folder)["round"] == len(records(folder)) == 4
    assert (summary(folder)["status"], summary(folder)["rounds"]) == ("interrupted", 4)
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert f"stopped after round 4; go on with: fedpipe resume {folder}" in started.log.read_text()
    assert here("resume", folder) == 0
    assert_like(folder, whole)


def test_second_signal_stops_at_once(tiny: Path, tmp_path: Path, started: Started) -> None:
    folder, other = tmp_path / "run", tmp_path / "other"
    arguments = ("method.name=own_methods:Slow", "rounds=3")
    process = started.run(tiny, *arguments, "--out", folder)
    process.send_signal(signal.SIGINT)
    started.wait_for(lambda: "stopping after this round" in (folder / "log.txt").read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert f"stopped after round 1; go on with: fedpipe resume {folder}" in started.log.read_text()
    assert manifest(folder)["round"] == 1
    assert here("resume", folder) == here("run", tiny, *arguments, "--out", other) == 0
    assert_like(folder, other)


def test_killed_before_the_last_evaluation(tiny: Path, whole: Path, tmp_path: Path) -> None:
    """All rounds are done and on disk, adapter and summary are not: there is something left to resume."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("adapter", "summary.json"))
    assert here("resume", folder) == 0
    assert_like(folder, whole)


def test_damaged_checkpoint_gives_way_to_the_one_before(
    tiny: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("adapter", "summary.json"))
    flip(folder / "checkpoint" / f"round-{ROUNDS:04d}" / "state.safetensors")
    assert here("resume", folder) == 0
    assert f"round-{ROUNDS:04d} is damaged" in capsys.readouterr().out
    assert_like(folder, whole)
    for place in (folder / "checkpoint").iterdir():
        (place / "manifest.json").write_text("{")
    assert here("resume", folder) == 2
    assert "no usable checkpoint (2 found)" in capsys.readouterr().err


def test_extended(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a constant rate an extended run is the longer run; other schedules depend on the number of rounds."""
    folder, longer = tmp_path / "run", tmp_path / "longer"
    assert here("run", tiny, "local.schedule=constant", "rounds=2", "--out", folder) == 0
    assert here("resume", folder) == 2
    assert "has all its 2 rounds; extend it with rounds=4" in capsys.readouterr().err
    assert here("resume", folder, "rounds=1") == 2
    assert "rounds: 1 is less than the 2 rounds" in capsys.readouterr().err
    assert here("resume", folder, "rounds=5") == 0
    assert here("run", tiny, "local.schedule=constant", "rounds=5", "--out", longer) == 0
    assert_like(folder, longer)
    assert (folder / "config.yaml").read_text() == (longer / "config.yaml").read_text()


@pytest.mark.parametrize("change", ["local.lr=0.02", "method.rank=2", "seed=1", "fleet.edges.b.cpus=0.2"])
def test_training_keys_stay(change: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    assert here("resume", folder, change, f"rounds={ROUNDS + 1}") == 2
    assert f"resume cannot change {change.partition('=')[0]};" in capsys.readouterr().err
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["local"]["lr"] = 0.02  # the same by hand
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert here("resume", folder, f"rounds={ROUNDS + 1}") == 2
    assert "config.yaml is not the one this run began with" in capsys.readouterr().err


def test_changed_data_is_refused(tiny: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, rows = tmp_path / "run", tiny.parent / "data" / "b.jsonl"
    shutil.copytree(whole, folder)
    before = rows.read_text()
    try:
        rows.write_text(before + '{"question": "alpha beta gamma", "answer": "delta", "kind": "x"}\n')
        assert here("resume", folder, f"rounds={ROUNDS + 1}") == 2
        assert "the data of edge b changed since the checkpoint" in capsys.readouterr().err
        assert_like(folder, whole)
    finally:
        rows.write_text(before)
    assert here("resume", folder, f"rounds={ROUNDS + 1}") == 0


def test_private_state_goes_on(
    tiny: Path, tmp_path: Path, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three edges a round, so that the edges' private states are of different rounds."""
    arguments = ("method.name=own_methods:Counting", "rounds=12", "fleet.fraction=0.67")
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert here("run", tiny, *arguments, "--out", whole) == 0
    started.run(tiny, *arguments, "--out", folder)
    started.kill()
    assert 3 <= manifest(folder)["round"] == len(records(folder)) < 12
    private = manifest(folder)["private"]
    assert set(private) == {"a", "b", "c"}
    for edge, rest in private.items():
        path = Path(rest["path"])
        assert path.parent == folder / "private" / edge
        assert Message.load(path, rest["sha256"]).tensors["drawn"].shape == (3,)

    flip(Path(private["b"]["path"]))
    assert here("resume", folder) == 2
    assert "edge b: its private state cannot be restored" in (said := capsys.readouterr().err)
    assert private["b"]["path"] in said.replace("\n", "")
    flip(Path(private["b"]["path"]))

    moved = tmp_path / "moved"
    folder.rename(moved)
    assert here("resume", moved) == 0
    assert_like(moved, whole)
    assert {p.name: len(list(p.iterdir())) for p in (moved / "private").iterdir()} == {"a": 3, "b": 3, "c": 3}


def losses(folder: Path) -> list[float]:
    """Validation losses by round."""
    return [record["eval"]["global"]["loss"] for record in records(folder)]


def test_best_round_is_kept_and_runs_stop_early(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("method.name=own_methods:Spoilt", "rounds=5", "local.schedule=constant")
    kept, reached, tired = tmp_path / "kept", tmp_path / "reached", tmp_path / "tired"
    assert here("run", tiny, *arguments, "evaluate.keep=best", "--out", kept) == 0
    best, patience = losses(kept).index(min(losses(kept))) + 1, 2
    stops = best + patience
    assert best == 2
    assert (summary(kept)["status"], summary(kept)["rounds"]) == ("finished", 5)

    assert here("run", tiny, *arguments, f"evaluate.target={min(losses(kept))!r}", "--out", reached) == 0
    assert (summary(reached)["status"], summary(reached)["rounds"]) == ("stopped_early", best)
    assert_same(tensors(reached), tensors(kept))
    assert summary(reached)["tuned"] == summary(kept)["tuned"]

    keep = ("evaluate.keep=best", f"evaluate.patience={patience}")
    assert here("run", tiny, *arguments, *keep, "--out", tired) == 0
    assert (summary(tired)["status"], summary(tired)["rounds"]) == ("stopped_early", stops)
    assert losses(tired) == losses(kept)[:stops]
    assert_same(tensors(tired), tensors(kept))
    capsys.readouterr()
    assert here("resume", tired) == 2
    assert "stopped early: no better validation loss for 2 evaluations" in capsys.readouterr().err

    for cut in (stops, stops - 1):  # killed after its last round; killed in its last round
        again = tmp_path / f"again-{cut}"
        shutil.copytree(tired, again, ignore=shutil.ignore_patterns("adapter", "summary.json"))
        if cut < stops:
            shutil.rmtree(again / "checkpoint" / f"round-{stops:04d}")
        assert here("resume", again) == 0
        assert_like(again, tired)
    assert here("resume", tired, "evaluate.patience=null") == 0
    assert (summary(tired)["status"], summary(tired)["rounds"]) == ("finished", 5)
    assert_same(tensors(tired), tensors(kept))


@pytest.mark.services
def test_ray_run_killed_and_resumed(
    tiny: Path, whole: Path, tmp_path: Path, ray_folder: Path, started: Started
) -> None:
    """The private cluster dies with its driver; the resumed run has the bits of one that never saw Ray."""
    folder, place = tmp_path / "run", {"RAY_TMPDIR": str(ray_folder)}
    started.run(tiny, "fleet.ray=true", "--out", folder, **place)
    assert len(belonging(ray_folder)) > 4  # the driver, the daemons of Ray, the workers
    started.kill()
    assert manifest(folder)["round"] == 3
    deadline = time.monotonic() + 30
    while (left := belonging(ray_folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [process.cmdline() for process in left] == []
    done = fedpipe("resume", folder, PYTHONPATH=started.path, **place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(tensors(folder), tensors(whole))
    assert repeatable(folder) == repeatable(whole)


def test_a_run_keeps_every_setting_of_its_method(whole: Path) -> None:
    """Also those it left to their defaults: a later version's default must not change a run that goes on."""
    written = yaml.safe_load((whole / "config.yaml").read_text())["method"]
    assert {"name", *(field.name for field in dataclasses.fields(Held))} == written.keys()
