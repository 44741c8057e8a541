"""Where the figures of a run go beside its folder: TensorBoard, MLflow, Weights & Biases, Ray's metrics.

A run calls its trackers where it writes a round's record. What a tracker has is kept in trackers.json of the run
folder, so that a resumed run goes on in the same tracker run, adds what is missing, and repeats nothing.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from fedpipe_ray.errors import UserError
from fedpipe_ray.files import write_atomically
from fedpipe_ray.settings import Run, Track

from .series import of_round, of_test

log = logging.getLogger("fedpipe")
FILE = "trackers.json"
Values = Mapping[str, float]
Record = Mapping[str, Any]  # a line of rounds.jsonl


@dataclass(frozen=True)
class Begun:
    """What a tracker begins with. done: rounds before now; kept: what it kept of this run, empty the first time.

    A tracker may put into `kept` what JSON can hold. Its "round" is the last that the tracker has: rounds after it are
    given to it, others are not.
    """

    run: Run
    folder: Path
    done: int
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the run is called: the last part of its folder's path or URL."""
        return self.folder.name

    @property
    def first(self) -> bool:
        """Whether the tracker has nothing of this run yet."""
        return "round" not in self.kept


class Tracker(Protocol):
    """One place for figures. May raise anything: the run goes on without it."""

    name: str

    def start(self, begun: Begun) -> None:
        """Opens the tracker's run, new or the one it had."""

    def round(self, round: int, values: Values, record: Record) -> None:
        """Takes a round's figures by name, and its record; round 0 is the base model's, with an empty record."""

    def finish(self, status: str, round: int, values: Values) -> None:
        """Takes the last figures and closes. status: as in summary.json."""


class Trackers:
    """All trackers of a run. One that fails is told of once and is off from then on; the run never ends by it."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._on = list(trackers)
        self._begun: dict[str, Begun] = {}
        self._done = 0

    def start(self, run: Run, folder: Path, base: Record, records: Sequence[Record]) -> None:
        """Opens all and brings them up to date. base: metrics before round 1; records: of the rounds done so far."""
        known, self._done = _read(folder / FILE), len(records)
        for tracker in self._on:
            kept = dict(known.get(tracker.name, {}))
            self._begun[tracker.name] = Begun(run, folder, self._done, kept)
        self._each(lambda tracker: self._open(tracker, base, records))
        self._keep()

    def round(self, record: Record) -> None:
        """Gives a round that was done to all that do not have it."""
        self._done = record["round"]
        self._each(lambda tracker: self._give(tracker, record))
        self._keep()

    def finish(self, summary: Record) -> None:
        """Gives the test metrics of the tuned model, if the run came to its end, and closes all."""
        if not self._on:
            return

        def end(tracker: Tracker) -> None:
            values = of_test(summary["tuned"], "tuned", self._begun[tracker.name].run)
            tracker.finish(summary["status"], self._done, values)

        self._each(end)
        self._on = []
        self._keep()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Closes what an error left open."""
        self._on = [tracker for tracker in self._on if tracker.name in self._begun]
        self.finish({"status": "failed", "tuned": {}})

    def _open(self, tracker: Tracker, base: Record, records: Sequence[Record]) -> None:
        begun = self._begun[tracker.name]
        tracker.start(begun)
        if begun.first:
            tracker.round(0, of_test(base, "base", begun.run), {})
            begun.kept["round"] = 0
        for record in records:
            self._give(tracker, record)

    def _give(self, tracker: Tracker, record: Record) -> None:
        begun, number = self._begun[tracker.name], record["round"]
        if number > begun.kept["round"]:
            tracker.round(number, of_round(record, begun.run), record)
            begun.kept["round"] = number

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._on):
            try:
                call(tracker)
            except Exception as error:  # whatever a server, a disk or a package has
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
                log.warning("%s failed and is off until the run is resumed: %s", tracker.name, said)
                log.debug("%s", tracker.name, exc_info=True)
                self._on.remove(tracker)

    def _keep(self) -> None:
        if not self._begun:
            return
        (folder,) = {begun.folder for begun in self._begun.values()}
        known = _read(folder / FILE) | {name: begun.kept for name, begun in self._begun.items() if begun.kept}
        try:
            write_atomically(folder / FILE, json.dumps(known, indent=2) + "\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", folder / FILE, error.strerror or error)


def _read(path: Path) -> dict[str, Any]:
    """What trackers kept; nothing where there is no such file or it is damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def chosen(settings: Track) -> list[Tracker]:
    """The trackers that a run is to have, none of them opened yet; costs no import of theirs.

    Raises UserError, with what to install, for one that was asked for and whose package is not there.
    """
    found: list[Tracker] = []
    if settings.tensorboard is None and not installed("tensorboardX"):
        log.info("no TensorBoard files: tensorboardX is not installed (pip install 'fedpipe-ray[tracking]')")
    elif settings.tensorboard is not False:
        need("track.tensorboard", "tensorboardX")
        from .tensorboard import TensorBoard

        found.append(TensorBoard())
    if settings.mlflow is not None:
        need("track.mlflow", "mlflow")
        from .mlflow import MLflow

        found.append(MLflow(settings.mlflow, settings.project))
    if settings.wandb is not None:
        need("track.wandb", "wandb")
        from .wandb import WandB

        found.append(WandB(settings.wandb, settings.project))
    return found


def installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    return importlib.util.find_spec(package) is not None


def need(key: str, package: str) -> None:
    """Raises UserError if a package that a key asks for is not there."""
    if not installed(package):
        raise UserError(
            f"{key}: the package {package} is not installed; pip install 'fedpipe-ray[tracking]', or leave the key out"
        )
