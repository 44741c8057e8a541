"""TensorBoard: event files in the run folder's `tensorboard/`, written by tensorboardX, which Ray brings along."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from fedpipe_ray.config import to_yaml

from . import Begun
from .series import hyperparameters

FOLDER = "tensorboard"


class TensorBoard:
    """Event files, a new one for each process. Rounds that a resumed run does again replace those that were there.

    Written at once, without tensorboardX's thread: where that meets a full disk it dies, and the next call waits for it
    for ever.
    """

    name = "TensorBoard"

    def start(self, begun: Begun) -> None:
        """Opens a file. Of a run that goes on, readers drop what files before it have of later rounds."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._events, self._summaries = event_pb2, summary_pb2
        folder = begun.folder / FOLDER
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")  # its own name has but seconds
        if begun.first:
            self._write_config(begun)
        else:
            begun.kept["round"] = min(begun.kept["round"], begun.done)
            begins = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(begun.kept["round"] + 1, session_log=begins)
        self._writer.flush()

    def round(self, round: int, values: Mapping[str, float], record: Mapping[str, Any]) -> None:
        """Adds one event with all figures."""
        found = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(round, summary=self._summaries.Summary(value=found))
        self._writer.flush()

    def finish(self, status: str, round: int, values: Mapping[str, float]) -> None:
        """Closes the file."""
        if values:
            self.round(round, values, {})
        self._writer.close()

    def _write_config(self, begun: Begun) -> None:
        """The configuration: for the HPARAMS tab, and as text."""
        from tensorboardX.summary import hparams, text

        shown = "    " + to_yaml(begun.run).replace("\n", "\n    ")  # Markdown for code
        for summary in (*hparams(hyperparameters(begun.run), {}), text("config", shown)):
            self._write(0, summary=summary)

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write_event(self._events.Event(wall_time=time.time(), step=step, **what))
