"""What trackers left in their own stores, read with the stores' own readers: {name: [(round, value), ...]}."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Series = dict[str, list[tuple[int, float]]]
BLOCK = 32768  # of a .wandb file


def tensorboard(folder: Path) -> Series:
    """The scalars that TensorBoard shows of a run folder."""
    accumulator = event_files(folder)
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }  # fmt: skip


def event_files(folder: Path) -> Any:
    """TensorBoard's reader of a run folder, with all that it read."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def mlflow(uri: str) -> tuple[Any, Series]:
    """(the one run of experiment `fedpipe` in a store, its metrics)."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("fedpipe")
    (run,) = client.search_runs([experiment.experiment_id])
    series = {
        name: sorted((one.step, one.value) for one in client.get_metric_history(run.info.run_id, name))
        for name in run.data.metrics
    }
    return run, series


def wandb(folder: Path) -> tuple[list[Any], Series]:
    """(the records of all offline runs in a run folder, their history) with W&B's own message types."""
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    records = [record for file in files for record in wandb_records(file)]
    series: Series = defaultdict(list)
    for record in records:
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in items.items():
                if not name.startswith("_"):
                    series[name].append((record.history.step.num, value))
    return records, dict(series)


def wandb_records(file: Path) -> Iterator[Any]:
    """The messages of a .wandb file: pieces in blocks, as in LevelDB's log, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            return
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of it, or its last piece
            yield Record.FromString(whole)
            whole = b""


def expected(folder: Path, run: Any) -> Series:
    """What a tracker must have of a finished run, by its own record."""
    from runs import records, summary

    from fedpipe_ray.trackers.series import of_round, of_test

    series: Series = defaultdict(list)
    last = summary(folder)
    for name, value in of_test(last["base"], "base", run).items():
        series[name].append((0, value))
    for record in records(folder):
        for name, value in of_round(record, run).items():
            series[name].append((record["round"], value))
    for name, value in of_test(last["tuned"], "tuned", run).items():
        series[name].append((last["rounds"], value))
    return dict(series)
