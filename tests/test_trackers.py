"""Trackers, each read back from its own real store: the same figures under the same names, once each."""

from __future__ import annotations

import json
import logging
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import tracked
from refusals import assert_refused
from runs import free_ports, here, load, records, summary, tiny_run

from fedpipe_ray.errors import UserError
from fedpipe_ray.settings import Run, Track
from fedpipe_ray.trackers import Trackers, chosen
from fedpipe_ray.trackers.series import hyperparameters, of_round, of_test
from fedpipe_ray.trial import records_of

CAPACITY = "fleet.edges.a.training_memory_bytes=2GiB"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracked")


@pytest.fixture(scope="module")
def tiny(place: Path, model_dir: Path, data_dir: Path) -> Path:
    return tiny_run(place, model_dir, data_dir)


@pytest.fixture(scope="module")
def all_trackers(place: Path) -> list[str]:
    return [f"track.mlflow=sqlite:///{place}/mlflow.db", "track.wandb=offline"]


@pytest.fixture(scope="module")
def folder(place: Path, tiny: Path, all_trackers: list[str]) -> Path:
    """A run of three rounds that was resumed twice: its last checkpoint was damaged, then it was extended."""
    out = place / "first"
    assert here("run", tiny, "--out", out, CAPACITY, "rounds=3", *all_trackers) == 0
    state = out / "checkpoint" / "round-0003" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    (out / "summary.json").unlink()
    assert here("resume", out) == 0
    assert here("resume", out, "rounds=5") == 0
    return out


@pytest.fixture(scope="module")
def run(tiny: Path) -> Run:
    return load(tiny, CAPACITY, "rounds=5")


def without_clocks(series: tracked.Series) -> tracked.Series:
    """Without what a machine measured: a round that is done again takes other seconds."""
    return {name: points for name, points in series.items() if not name.endswith("seconds") and "memory" not in name}


def at_each_end(series: tracked.Series) -> tracked.Series:
    """Only the figures of the tuned model, which each of the run's three ends gave."""
    return {name: points for name, points in series.items() if "test/tuned" in name}


def test_tensorboard_has_every_round_once(folder: Path, run: Run) -> None:
    """Round 3 was done twice, and its second time counts. Event files hold numbers of 32 bits."""
    found, wanted = tracked.tensorboard(folder), tracked.expected(folder, run)
    tuned, last = at_each_end(found), at_each_end(wanted)
    assert found.keys() == wanted.keys()
    for name, points in found.items():
        if name not in tuned:
            assert [step for step, _ in points] == [step for step, _ in wanted[name]], name
            assert [value for _, value in points] == pytest.approx([value for _, value in wanted[name]], rel=1e-6)
    assert {name: [step for step, _ in points] for name, points in tuned.items()} == {name: [3, 5] for name in tuned}
    assert all(points[-1][1] == pytest.approx(last[name][-1][1], rel=1e-6) for name, points in tuned.items())
    assert len(list((folder / "tensorboard").iterdir())) == 3  # a file for each process


def test_tensorboard_has_the_configuration(folder: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    accumulator = tracked.event_files(folder)
    plugin = accumulator.summary_metadata["_hparams_/session_start_info"].plugin_data
    found = HParamsPluginData.FromString(plugin.content).session_start_info.hparams
    assert found["method.rank"].number_value == 4
    assert found["fleet.edges"].number_value == 3
    assert found["method.name"].string_value == "lora"
    (text,) = accumulator.Tensors("config/text_summary")
    assert b"compute_flops: 500000000.0" in text.tensor_proto.string_val[0]


def test_mlflow_goes_on_in_one_run(folder: Path, run: Run, place: Path) -> None:
    found, series = tracked.mlflow(f"sqlite:///{place}/mlflow.db")
    wanted = tracked.expected(folder, run)
    assert series.keys() == wanted.keys()
    tuned = at_each_end(wanted)
    for name, points in without_clocks(wanted).items():
        assert series[name] == points or name in tuned, name
    assert all(series[name][-1] == points[-1] and series[name][0][0] == 3 for name, points in tuned.items())
    assert [step for step, _ in series["cost/wall_seconds"]] == [1, 2, 3, 4, 5]
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "first"
    first = hyperparameters(load(folder / "config.yaml", "rounds=3"))
    assert found.data.params == {name: str(value) for name, value in first.items()}
    kept = json.loads((folder / "trackers.json").read_text())
    assert kept["MLflow"] == {"run": found.info.run_id, "round": 5}


def test_wandb_goes_on_under_one_id(folder: Path, run: Run) -> None:
    found, series = tracked.wandb(folder)
    wanted = {name: points for name, points in tracked.expected(folder, run).items() if "test/tuned" not in name}
    assert series.keys() == wanted.keys()
    for name, points in without_clocks(wanted).items():
        assert series[name] == points, name
    assert [step for step, _ in series["cost/wall_seconds"]] == [1, 2, 3, 4, 5]
    begun = [record.run for record in found if record.HasField("run")]
    assert {(one.run_id, one.display_name, one.project) for one in begun} == {
        (json.loads((folder / "trackers.json").read_text())["Weights & Biases"]["run"], "first", "fedpipe")
    }
    config = {item.key: json.loads(item.value_json) for item in begun[-1].config.update}
    assert config | hyperparameters(load(folder / "config.yaml")) == config
    results = {
        item.key: json.loads(item.value_json)
        for record in found if record.HasField("summary") for item in record.summary.update
    }  # fmt: skip
    assert results["test/tuned/loss"] == summary(folder)["tuned"]["global"]["loss"]
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [0, 0, 0]


def test_a_tracker_that_is_asked_for_later_gets_all_rounds(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "late"
    assert here("run", tiny, "--out", out, "rounds=1", "track.tensorboard=false") == 0
    assert not {"tensorboard", "trackers.json"} & {path.name for path in out.iterdir()}
    assert here("resume", out, "rounds=2", "track.tensorboard=true") == 0
    assert [step for step, _ in tracked.tensorboard(out)["train/loss"]] == [1, 2]
    assert [step for step, _ in tracked.tensorboard(out)["test/base/loss"]] == [0]


def test_a_full_disk_ends_the_tracker_not_the_run(
    folder: Path, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The system allows files of 1 kB more than there are when round 3 is written; later rounds are no news."""
    caplog.set_level(logging.INFO, "fedpipe")
    with Trackers(chosen(Track(tensorboard=True))) as trackers:
        trackers.start(run, tmp_path, summary(folder)["base"], records(folder)[:2])
        (file,) = (tmp_path / "tensorboard").iterdir()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 1000, limits[1]))
        try:
            for record in records(folder)[2:4]:
                trackers.round(record)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (said,) = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert said == "TensorBoard failed and is off until the run is resumed: [Errno 27] File too large"
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"TensorBoard": {"round": 2}}
    with Trackers(chosen(Track(tensorboard=True))) as trackers:
        trackers.start(run, tmp_path, {}, records(folder))
    assert [step for step, _ in tracked.tensorboard(tmp_path)["train/loss"]] == [1, 2, 3, 4, 5]


def test_a_store_that_does_not_answer_ends_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    out, (port,) = tmp_path / "run", free_ports(1)
    assert here("run", tiny, "--out", out, "rounds=1", f"track.mlflow=http://127.0.0.1:{port}") == 0
    said = capsys.readouterr().out
    assert said.count("warning: MLflow failed and is off until the run is resumed: ") == 1
    assert [step for step, _ in tracked.tensorboard(out)["train/loss"]] == [1]


# -- figures


def record(edges: dict[str, dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A line of rounds.jsonl; of edges what differs."""
    plain = {
        "status": "ok", "train_loss": 1.0, "bytes_up": 10, "bytes_down": 20, "seconds": 0.5, "virtual_seconds": 2.0,
        "peak_memory_bytes": 0, "training_memory_bytes": 0,
    }  # fmt: skip
    return {
        "round": 4, "train_loss": 1.5, "eval": {"split": "validation", "global": {}, "edges": {}}, "bytes_up": 30,
        "bytes_down": 60, "wall_seconds": 1.0, "evaluate_seconds": 0.25, "virtual_seconds": 3.0, "method": {},
        "edges": {name: plain | edge for name, edge in edges.items()}, **changes,
    }  # fmt: skip


def test_figures_of_a_round(run: Run) -> None:
    """Edge a may take 2 GiB and took 0.5: a quarter. What is null or not finite is left out."""
    line = record(
        {"a": {"training_memory_bytes": 2**29, "peak_memory_bytes": 2**30}, "b": {"peak_memory_bytes": 2**31},
         "c": {"status": "lost", "train_loss": None}},
        eval={"global": {"loss": 2.0, "accuracy": float("nan")}, "edges": {"b": {"loss": 2.5}}},
        method={"residual": 0.1, "odd": None},
    )  # fmt: skip
    found = of_round(line, run)
    edge = {"bytes_up": 10, "bytes_down": 20, "seconds": 0.5, "virtual_seconds": 2.0}
    assert {name: value for name, value in found.items() if not name.startswith("edge/")} == {
        "train/loss": 1.5, "validation/loss": 2.0, "cost/bytes_up": 30, "cost/bytes_down": 60, "cost/wall_seconds": 1,
        "cost/evaluate_seconds": 0.25, "cost/virtual_seconds": 3, "edges/ok": 2, "edges/late": 0, "edges/lost": 1,
        "memory/peak_memory_bytes": 2**31, "memory/training_memory_bytes": 2**29, "memory/share_of_capacity": 0.25,
        "method/residual": 0.1,
    }  # fmt: skip
    of_b = {name.removeprefix("edge/b/"): value for name, value in found.items() if name.startswith("edge/b/")}
    assert of_b == {
        **edge, "validation/loss": 2.5, "train_loss": 1, "peak_memory_bytes": 2**31, "training_memory_bytes": 0
    }  # fmt: skip
    assert "edge/c/train_loss" not in found


def test_large_fleets_have_no_figures_of_single_edges(tiny: Path) -> None:
    for count, shown in ((50, True), (51, False)):
        edges = ", ".join(f"e{i}: {{cpus: 0.1}}" for i in range(count))
        run = load(tiny, f"fleet.edges={{{edges}}}")
        found = of_round(record({"e0": {}}), run) | of_test({"edges": {"e0": {"loss": 1.0}}}, "tuned", run)
        assert {"edge/e0/train_loss" in found, "edge/e0/test/tuned/loss" in found} == {shown}
        assert found["train/loss"] == 1.5


def test_hyperparameters_are_flat(run: Run) -> None:
    found = hyperparameters(run)
    assert (found["seed"], found["rounds"], found["method.rank"], found["fleet.edges"]) == (0, 5, 4, 3)
    assert not [name for name in found if name.startswith(("track", "out", "fleet.edges."))]
    assert found["data.prompt"] == "{question}"
    assert all(isinstance(value, str | int | float) for value in found.values())


# -- what is asked for and cannot be


@pytest.mark.parametrize(
    ("package", "asked"),
    [("mlflow", "mlflow=sqlite:///x.db"), ("wandb", "wandb=offline"), ("tensorboardX", "tensorboard=true")],
)
def test_a_missing_package_is_told_before_anything_starts(
    package: str, asked: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)
    key = asked.partition("=")[0]
    says = f"track.{key}: the package {package} is not installed; pip install 'fedpipe-ray[tracking]', or leave the key"
    for command in ("run", "check"):
        assert_refused(
            capsys, command, tiny, f"track.{asked}", says=says, out=tmp_path / "new" if command == "run" else None
        )


def test_without_its_package_tensorboard_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedpipe")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert chosen(Track()) == []
    assert "no TensorBoard files: tensorboardX is not installed" in caplog.text


def test_refusals(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for setting, says in (
        ("track.mlflow=mlruns", "track.mlflow: 'mlruns' is no tracking URI; give a database, such as sqlite:///mlflow"),
        ("track.mlflow=file:///tmp/mlruns", "is no tracking URI"),
        ("track.mlflow=postgresql://me:secret@host/db", "track.mlflow: it must hold no password"),
        ("track.wandb=on", "track.wandb: True is not valid"),
        ("track.project=", "track.project: "),
        ("track.tensorbord=true", "unknown key track.tensorbord; did you mean tensorboard?"),
    ):
        assert "secret" not in assert_refused(capsys, "check", tiny, setting, says=says)
    with pytest.raises(UserError, match="tensorboard"):
        load(tiny, "track.tensorboard=sometimes")


def test_trials_go_to_no_tracker(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedpipe_ray.fleet import SerialFleet

    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    assert len(list(records_of(load(tiny, "track.tensorboard=true"), SerialFleet))) == 2
    assert set(tmp_path.rglob("*")) == before
