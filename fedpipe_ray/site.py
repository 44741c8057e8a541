"""Site: where a method runs. An edge server with its profile, model, data and private state; the server is one too."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import lora
from .batches import Rows
from .config import edge_data
from .costs import Cost, PeakMemory, limit_gpu, linked, training_flops, training_memory, virtual_seconds
from .data import EdgeData, SourceFacts, inspect, open_data
from .encoding import Encoding, with_carried, without_carried
from .errors import DivergedError, UserError
from .evaluate import Metrics, evaluate, generate
from .frame import filled, same_storage
from .message import Message
from .methods.base import Method, Weights
from .model import Base, empty_model, load_tokenizer, stored_bytes
from .randomness import rng_for
from .report import OUT_OF_MEMORY, Lost, Report
from .settings import Data, Profile, Run
from .train import Objective, gradients, summed_loss, train

SERVER = "server"


@dataclass
class Progress:
    """What an edge is doing right now, for the live table."""

    status: str = "waiting"
    step: int = 0
    steps: int = 0
    loss: float = float("nan")
    tokens_per_second: float = 0.0
    memory_bytes: int = 0


@dataclass(frozen=True)
class Ready:
    """An edge that passed its preflight. counts: rows read, kept, cut, dropped; fingerprint: of its encoded rows."""

    edge: str
    counts: dict[str, int]
    fingerprint: str
    device: str


@dataclass
class Site:
    """Built from a run alone, so that it can be made again anywhere. load_base(classes, bits): called at first use."""

    name: str
    run: Run
    method: Method
    load_base: Callable[[Sequence[str], int], Base]
    private_dir: Path | None = None
    classes: list[str] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    private: Message | None = None
    carried: Message | None = None  # private, too: what wire.codec keeps, which a method does not see
    cost: Cost = field(default_factory=Cost)
    train_loss: float = float("nan")
    round: int = 0
    bits: int = 16
    memo: dict[str, Any] = field(default_factory=dict)  # what a method worked out from the run alone
    _rests: dict[int, Message | None] = field(default_factory=dict)  # private state before round r
    _sent: tuple[Base, dict[str, torch.Tensor]] | None = None  # the frame, and what `base` was built from

    @property
    def task(self) -> str:
        """`causal` or `classification`."""
        return self.run.data.task

    @cached_property
    def profile(self) -> Profile:
        """What this edge is believed to be; the server has an unlimited one."""
        return self.run.fleet.edges.get(self.name) or Profile(compute_flops=1e15, uplink_bps=1e12, downlink_bps=1e12)

    @cached_property
    def settings(self) -> Data:
        """Where this site's rows come from. Raises UserError if the server has none."""
        if self.name != SERVER:
            return edge_data(self.run, self.name, self.profile)
        if self.run.server.data is None:
            raise UserError("server.data: this method needs public data on the server; give server.data a source")
        return self.run.server.data

    @property
    def _share(self) -> str:
        """Whose share of a divided source this site has; "" is all of it."""
        return "" if self.name == SERVER else self.name

    @cached_property
    def base(self) -> Base:
        """The frozen base model in this site's `bits`, loaded at first use; on a `sent` edge what `build` made."""
        return self.load_base(self.classes, self.bits)

    def build(self, order: Message) -> None:
        """Makes `base` the model that a `sent` method's order brings; the one from before if it brings the same.

        Raises ValueError if the order's tensors are not those of the method's architecture.
        """
        sending: Any = self.method
        tensors, (frame, before) = order.kept, self._sent or (self.base, {})
        if before.keys() != tensors.keys() or any(not same_storage(before[k], t) for k, t in tensors.items()):
            self.__dict__["base"] = filled(frame, tensors, lambda model: sending.reshape(model, order))
            self._sent = frame, tensors  # held, lest others get their place in memory

    def hold(self, bits: int) -> Base:
        """The frozen base model with its linear weights in 4, 8 or 16 bits; the one held before is let go first."""
        if bits != self.bits:
            self.__dict__.pop("base", None)
            self.bits = bits
        return self.base

    @cached_property
    def data(self) -> EdgeData:
        """This site's own rows, encoded at first use."""
        tokenizer = load_tokenizer(self.run.model) if "base" not in self.__dict__ else self.base.tokenizer
        edges = list(self.run.fleet.edges)
        return open_data(self.settings, self._share, edges, self.run.seed, tokenizer, self.classes)

    def bare(self) -> Any:
        """The model on the meta device: names and shapes without weights."""
        return empty_model(self.run.model, self.task, self.classes)

    def skeleton(self, spec: lora.LoraSpec) -> Any:
        """The model with the adapter of `spec` on the meta device."""
        return lora.inject(self.bare(), spec)

    def inspect(self) -> SourceFacts:
        """Whether this edge's source can be read at all, and which labels it holds. Raises UserError."""
        return inspect(self.settings, self._share, list(self.run.fleet.edges), self.run.seed)

    def prepare(self, classes: Sequence[str]) -> Ready:
        """Loads model and rows before round 0. Raises UserError for what only this edge can see."""
        torch.set_num_threads(self.run.local.threads)
        self.classes = list(classes)
        if self.method.base == "none":
            return Ready(self.name, {}, "", "cpu")
        self.progress.status = "loading"
        first_bits = getattr(self.method, "first_bits", None)  # of methods that choose them
        self.bits = first_bits(self) if first_bits else 16
        device = str(self.base.device)
        ready = Ready(self.name, self.data.counts, self.data.fingerprint, device)
        self.progress.status = "ready"
        return ready

    @property
    def sent(self) -> bool:
        """Whether this is an edge that has of the model only what its orders bring."""
        return self.method.base == "sent" and self.name != SERVER

    def train(
        self, model: Any, rng: np.random.Generator, objective: Objective = summed_loss,
        penalty: Callable[[], torch.Tensor] | None = None, rows: Rows | None = None,
        correct: Callable[[], None] | None = None, /, warm: int | None = None, **changes: Any,
    ) -> None:  # fmt: skip
        """This round's local steps on `model`, measured; `changes` replace fields of the run's `local`.

        objective, penalty, correct, warm: as train.train has them. rows: others than this site's own for training.
        """
        torch.set_num_threads(self.run.local.threads)  # on the server, too
        local = dataclasses.replace(self.run.local, **changes)
        torch.manual_seed(int(rng.integers(2**63)))  # for dropout; here, since attaching an adapter draws numbers too
        started = time.perf_counter()

        def on_step(step: int, steps: int, loss: float, tokens: int) -> None:
            now = self.progress
            now.status, now.step, now.steps, now.loss = "training", step, steps, loss
            now.tokens_per_second = tokens / max(1e-9, time.perf_counter() - started)

        done = train(
            model, self.data.train if rows is None else rows, local, round=self.round, rounds=self.run.rounds, rng=rng,
            device=self.base.device, pad_id=self.base.pad_id, classifier=self.task == "classification",
            on_step=on_step, objective=objective, penalty=penalty, correct=correct, warm=warm,
        )  # fmt: skip
        self.train_loss = done.loss
        self.cost = dataclasses.replace(
            self.cost, samples=self.cost.samples + done.samples, steps=self.cost.steps + done.steps,
            tokens=self.cost.tokens + done.tokens, step_seconds=done.step_seconds,
            flops=self.cost.flops + training_flops(model, done.tokens),
        )  # fmt: skip

    def gradients(self, model: Any, rng: np.random.Generator, batches: int, **changes: Any) -> dict[str, torch.Tensor]:
        """Gradients of the mean loss over a few batches of training rows, by PEFT key; nothing is changed."""
        local, train_rows = dataclasses.replace(self.run.local, **changes), self.data.train
        found, tokens = gradients(
            model, train_rows, local, batches=batches, rng=rng, device=self.base.device, pad_id=self.base.pad_id,
            classifier=self.task == "classification",
        )  # fmt: skip
        self.cost = dataclasses.replace(self.cost, flops=self.cost.flops + training_flops(model, tokens))
        return {lora.key_of(name): gradient for name, gradient in found.items()}

    def evaluate(self, state: Message | None, split: str, answers: int = 0) -> Metrics:
        """Metrics of a state (None: the base model) on this edge's rows; empty if the split has none.

        Later views are reported as `view.metric`; some are personal, by the newest `private`. A `sent` edge gets what
        the method shows.
        """
        torch.set_num_threads(self.run.local.threads)
        ended = max(self._rests, default=0)  # the last round that came to its end here
        self.private, _ = without_carried(self.private_before(ended))
        self.progress.status = "evaluating"
        if self.sent and state is not None:
            self.build(state)
            state = state if state.rest else None
        views: dict[str, Weights | None] = {"base": None} if state is None else {**self.method.weights(state, self)}
        metrics: Metrics = {}
        for index, (name, weights) in enumerate(views.items()):
            found = self._evaluate_view(weights, split, answers)
            metrics |= found if index == 0 else {f"{name}.{key}": value for key, value in found.items()}
        self.progress.status = "ready"
        return metrics

    @property
    def encoding(self) -> Encoding:
        """Of this round's update."""
        return Encoding.of(self.run, self.round, self.name, getattr(self.method, "again", ()))

    def measure(self, model: Any, split: str) -> Metrics:
        """Metrics of a model on this site's rows; empty if the split has none. The virtual clock does not count it."""
        classes = len(self.classes) if self.task == "classification" else 0
        return evaluate(
            model, getattr(self.data, split), device=self.base.device, pad_id=self.base.pad_id, classes=classes,
            batch=self.run.evaluate.batch, limit=self.run.evaluate.rows, precision=self.run.local.precision,
        )  # fmt: skip

    def _evaluate_view(self, weights: Weights | None, split: str, answers: int) -> Metrics:
        base, settings = self.base, self.run.evaluate
        model, off = base.model, None
        if weights is not None:
            model = weights.on(base)
        elif base.attached:
            model = next(iter(base.attached.values()))
            off = model.disable_adapter()
        try:
            if off is not None:
                off.__enter__()
            metrics = self.measure(model, split)
            if answers and self.task != "classification":
                metrics |= generate(
                    model, base.tokenizer, getattr(self.data, split), device=base.device, count=answers,
                    max_new_tokens=settings.max_new_tokens, answer=settings.answer,
                )  # fmt: skip
        finally:
            if off is not None:
                off.__exit__(None, None, None)
        return metrics

    def private_before(self, round: int) -> Message | None:
        """The private state this edge had before `round`: the same however often the round is tried."""
        return self._rests.get(max((known for known in self._rests if known <= round), default=-1))

    def keep_private(self, round: int) -> dict[str, str] | None:
        """Makes `private` the state after `round`; on disk too, the last three kept. Returns path and SHA-256."""
        state = with_carried(self.private, self.carried)
        self._rests = {round: self.private_before(round), round + 1: state}
        if state is None or self.private_dir is None:
            return None
        folder = self._private_folder(self.private_dir)
        path = folder / f"round-{round + 1:04d}.safetensors"
        digest = state.save(path)
        for old in sorted(folder.glob("round-*.safetensors"))[:-3]:
            old.unlink(missing_ok=True)
        return {"path": str(path), "sha256": digest}

    def _private_folder(self, private_dir: Path) -> Path:
        """In the run folder; in a profile's own private_dir, under the run folder's name, so that runs can share it."""
        own = self.profile.private_dir
        return (Path(own) / private_dir.parent.name if own else private_dir) / self.name

    def restore(self, round: int, path: str, sha256: str) -> None:
        """Takes up the private state of a checkpoint. Raises UserError if the file is gone or damaged.

        In a run folder that was moved the file is found where this edge would write it now.
        """
        now = self._private_folder(self.private_dir or Path()) / Path(path).name
        self._rests = {}  # of an edge that was here before and elsewhere since
        try:
            self._rests = {round: Message.load(now if now.exists() else Path(path), sha256)}
        except (OSError, ValueError) as error:
            raise UserError(f"edge {self.name}: its private state cannot be restored: {error}") from None


def within_capacity(site: Site, peak: PeakMemory, stored: int) -> int:
    """The training memory of a round. Raises MemoryError if it is above the profile's capacity."""
    used, capacity = training_memory(peak, stored), site.profile.training_memory_bytes
    if capacity is not None and used > capacity:
        raise MemoryError(f"training took {used / 2**20:.0f} MiB of {capacity / 2**20:.0f} (training_memory_bytes)")
    return used


def attempt(site: Site, order: Message, round: int) -> tuple[Report | Lost, Message | None]:
    """One edge's part of one round: (report, update). Never raises for what happens on the edge: that is a Lost.

    Sets the thread count, so that the same (seed, round, edge) gives the same bits on every fleet; a
    failed attempt leaves the private state as it was.
    """
    torch.set_num_threads(site.run.local.threads)
    rng = rng_for(site.run.seed, round, site.name)
    site.round, site.cost, site.train_loss = round, Cost(bytes_down=order.total_bytes), float("nan")
    site.private, site.carried = without_carried(site.private_before(round))
    site.progress.status, site.progress.step = "training", 0
    profile = linked(site.profile, order.numbers)
    started = time.perf_counter()
    peak, stored = PeakMemory(torch.device("cpu"), growth=False), 0
    try:
        if site.method.base != "none":  # loaded before memory is measured, whatever was held
            limit_gpu(profile.gpu_memory_bytes)
            if site.sent:
                site.build(order)
            elif "bits" in order.numbers:
                site.hold(int(order.numbers["bits"]))
            wanted = site.profile.training_memory_bytes is not None or site.base.device.type == "cuda"
            peak, stored = PeakMemory(site.base.device, growth=wanted), stored_bytes(site.base.model) if wanted else 0
        with peak:
            made = site.method.local_update(order, site, rng)
            update, site.carried = site.encoding.encode(made, order, site.carried)
        up, held = update.total_bytes, within_capacity(site, peak, stored)
        spent = dataclasses.replace(
            site.cost, seconds=time.perf_counter() - started, peak_memory_bytes=peak.bytes, bytes_up=up,
            training_memory_bytes=held,
            virtual_seconds=virtual_seconds(profile, site.cost.flops, site.cost.bytes_down, up),
        )  # fmt: skip
        site.progress.status, site.progress.memory_bytes = "done", peak.bytes
        report = Report(site.name, round, float(spent.samples), site.train_loss, spent, site.keep_private(round))
        return report, update
    except DivergedError as error:
        reason, trace = f"diverged: {error}", None
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason, trace = f"{OUT_OF_MEMORY}: {str(error).splitlines()[0] if str(error) else 'host memory'}", None
        site.cost = dataclasses.replace(site.cost, training_memory_bytes=training_memory(peak, stored))
    except Exception as error:  # whatever a method does wrong stays on its edge
        reason, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    site.progress.status = "lost"
    virtual = virtual_seconds(profile, site.cost.flops, site.cost.bytes_down, 0)
    spent = dataclasses.replace(site.cost, seconds=time.perf_counter() - started, virtual_seconds=virtual)
    return Lost(site.name, reason, trace, spent), None
