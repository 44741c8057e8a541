"""The Ray actor in which edge servers live: one, or many that take turns. A Site is made when it is first asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fedpipe_ray.costs import limit_gpu
from fedpipe_ray.data import SourceFacts
from fedpipe_ray.evaluate import Metrics
from fedpipe_ray.fleet import Refused, guarded
from fedpipe_ray.frame import frame
from fedpipe_ray.message import Message
from fedpipe_ray.methods.base import Method
from fedpipe_ray.model import Base, Parcel
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Run
from fedpipe_ray.site import Progress, Ready, Site, attempt

from .placement import device_fault

OPEN_SITES = 256  # whose rows lie encoded, each in a file of its own; of others they are encoded again when needed


class EdgeActor:
    """The edge servers of one process. Every call answers with a value: a Refused or Lost instead of an exception.

    first: the edge whose profile the process has. alone: it has no other, and lets go of a base before another comes;
    several share their bases.
    """

    def __init__(self, settings: tuple[Run, Method], private_dir: str | None, first: str, alone: bool = True) -> None:
        (self.run, self.method), self.alone = settings, alone
        self.profile = self.run.fleet.edges[first]
        self.private_dir = Path(private_dir) if private_dir else None
        self.sites: dict[str, Site] = {}
        self.open: dict[str, None] = {}  # names of sites with encoded rows, the one used last at the end
        self.bases: dict[int, Base] = {}
        self.classes: list[str] = []
        self.parcel: Parcel | None = None
        limit_gpu(self.profile.gpu_memory_bytes)

    def equip(
        self, classes: Sequence[str], files: Mapping[str, bytes] | None, weights: Message | None, first: str | None
    ) -> None:
        """What all edges have in common; `files` and `weights` are the driver's parcel, or None to load by name.

        first: an edge to make ready at once, so that a replacement's first round has no more to wait for than others.
        """
        self.classes = list(classes)
        self.parcel = Parcel(files, weights) if files is not None and weights is not None else None
        if first is not None:
            self.prepare(first)

    def inspect(self, name: str) -> SourceFacts | Refused:
        """Whether an edge's source can be read, and its labels."""
        return guarded(name, self._site(name).inspect)

    def prepare(self, name: str) -> Ready | Refused:
        """Loads an edge's model and rows, and looks at its GPU."""
        site, needs_model = self._site(name), self.method.base != "none"
        if needs_model and self.run.model.device != "cpu" and (fault := self._device_fault()):
            return Refused(name, fault)
        ready = guarded(name, lambda: site.prepare(self.classes))
        if needs_model:
            self._opened(name)
        return ready

    def attempt(self, name: str, round: int, *parts: Message) -> tuple[Report | Lost, Message | None]:
        """One round, its order in parts: (report, update), two objects, so that one can be had without the other."""
        site = self._site(name)
        if self.method.base != "none":
            if name not in self.open:
                ready = self.prepare(name)  # here, lest the round's own time and memory count it
                if isinstance(ready, Refused):
                    return Lost(name, ready.reason, ready.traceback), None
            self._opened(name)
        return attempt(site, Message.joined(*parts), round)

    def evaluate(self, name: str, split: str, answers: int, *parts: Message) -> Metrics | Refused:
        """Metrics of a state, in parts (none: of the base model), on an edge's own rows."""
        site, state = self._site(name), Message.joined(*parts) if parts else None
        found = guarded(name, lambda: site.evaluate(state, split, answers))
        self._opened(name)
        return found

    def restore(self, name: str, round: int, path: str, sha256: str) -> Refused | None:
        """Takes up an edge's private state from before `round`."""
        site = self._site(name)
        return guarded(name, lambda: site.restore(round, path, sha256))

    def progress(self) -> dict[str, Progress]:
        """What the edges that were asked so far are doing; answered while one trains."""
        return {name: dataclasses.replace(site.progress) for name, site in list(self.sites.items())}

    def _site(self, name: str) -> Site:
        if name not in self.sites:
            self.sites[name] = Site(name, self.run, self.method, self._load, self.private_dir)
        self.sites[name].classes = self.classes
        return self.sites[name]

    def _opened(self, name: str) -> None:
        """Notes that an edge's rows are in use; those of the edge used least recently are let go if there are many."""
        self.open.pop(name, None)
        self.open[name] = None
        if len(self.open) > OPEN_SITES:
            oldest = next(iter(self.open))
            del self.open[oldest]
            self.sites[oldest].__dict__.pop("data", None)

    def _load(self, classes: Sequence[str], bits: int) -> Base:
        if bits in self.bases:
            return self.bases[bits]
        if self.method.base == "sent":
            base = frame(self.run.model, self.run.data.task, classes, self.parcel.files if self.parcel else None)
        else:
            base = Base.load(self.run.model, self.run.data.task, classes, self.run.seed, self.parcel, bits)
        if not self.alone:
            self.bases[bits] = base
        return base

    def _device_fault(self) -> str | None:
        if not torch.cuda.is_available():
            return device_fault(self.profile, "", 0)
        found = torch.cuda.get_device_properties(0)
        return device_fault(self.profile, found.name, found.total_memory)
