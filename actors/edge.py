"""The Ray actor of one edge server: a Site in a process of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fedpipe_ray.data import SourceFacts
from fedpipe_ray.evaluate import Metrics
from fedpipe_ray.fleet import Refused, guarded
from fedpipe_ray.message import Message
from fedpipe_ray.methods.base import Method
from fedpipe_ray.model import Base, Parcel
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Run
from fedpipe_ray.site import Progress, Ready, Site, attempt


class EdgeActor:
    """One edge server. Every call answers with a value: a Refused or Lost instead of an exception."""

    def __init__(self, name: str, run: Run, method: Method, private_dir: str | None) -> None:
        self.parcel: Parcel | None = None
        self.site = Site(name, run, method, self._load, Path(private_dir) if private_dir else None)
        cap = self.site.profile.gpu_memory_bytes
        if cap and torch.cuda.is_available():
            whole = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap / whole))

    def _load(self, classes: Sequence[str], bits: int) -> Base:
        run = self.site.run
        return Base.load(run.model, run.data.task, classes, run.seed, self.parcel, bits)

    def inspect(self) -> SourceFacts | Refused:
        """Whether this edge's source can be read, and its labels."""
        return guarded(self.site.name, self.site.inspect)

    def prepare(
        self, classes: Sequence[str], files: Mapping[str, bytes] | None, weights: Message | None
    ) -> Ready | Refused:
        """Loads model and rows; `files` and `weights` are the driver's parcel, or None to load by name."""
        self.parcel = Parcel(files, weights) if files is not None and weights is not None else None
        return guarded(self.site.name, lambda: self.site.prepare(classes))

    def attempt(self, round: int, shared: Message, own: Message) -> tuple[Report | Lost, Message | None]:
        """One round: (report, update), two objects, so that the driver can look at one without fetching the other."""
        return attempt(self.site, Message({**shared.tensors, **own.tensors}, own.numbers), round)

    def evaluate(self, state: Message | None, split: str, answers: int) -> Metrics | Refused:
        """Metrics of a state on this edge's own rows."""
        return guarded(self.site.name, lambda: self.site.evaluate(state, split, answers))

    def restore(self, round: int, path: str, sha256: str) -> Refused | None:
        """Takes up the private state of a checkpoint."""
        return guarded(self.site.name, lambda: self.site.restore(round, path, sha256))

    def progress(self) -> Progress:
        """What this edge is doing; answered while it trains."""
        return dataclasses.replace(self.site.progress)
