"""The keys of `fleet` in a run file: the edge servers, and how a run deals with them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from .quantity import BitsPerSecond, Bytes, FlopPerSecond, Seconds
from .section import Section, require
from .traces import trace_fault


@dataclass(frozen=True, kw_only=True)
class Profile(Section):
    """One edge server: what Ray reserves for it, and what the virtual clock believes of it.

    gpus: fraction of one GPU, or a number of GPUs, on which it then trains data-parallel, a process a GPU; workers: so
    many processes without GPUs. cpus: cores that Ray reserves; resources, labels: Ray's own, which a node must have.
    gpu_memory_bytes: cap of its process on that GPU. memory_bytes: host memory Ray
    reserves. training_memory_bytes: what base model, adapters, optimizer and activations may take together; a round
    that took more is lost. compute_flops: sustained FLOP/s of a training step; uplink_bps, downlink_bps: bits a second;
    latency_seconds: one way; distance_m: to the base station, where a method has a radio channel (null: drawn);
    availability: chance of taking part in a round. trace: when it can be asked, as [from, to]
    intervals of the virtual clock or a CSV file of edge,from,to; repeats every trace_period_seconds (null: never).
    data: keys of `data` that differ here, or just a source. private_dir: where its private state rests, in a folder
    named as the run folder (default: in that).
    """

    gpus: float = 0.0
    workers: int = 1
    gpu_memory_bytes: Bytes | None = None
    cpus: float = 1.0
    memory_bytes: Bytes | None = None
    training_memory_bytes: Bytes | None = None
    resources: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    compute_flops: FlopPerSecond = 50e9
    uplink_bps: BitsPerSecond = 20e6
    downlink_bps: BitsPerSecond = 100e6
    latency_seconds: Seconds = 0.02
    distance_m: float | None = None
    availability: float = 1.0
    trace: str | list[tuple[Seconds, Seconds]] | None = None
    trace_period_seconds: Seconds | None = None
    data: str | dict[str, Any] = field(default_factory=dict)
    private_dir: str | None = None

    @property
    def capacity_bytes(self) -> float:
        """What training may take: training_memory_bytes, else gpu_memory_bytes, else infinity."""
        return self.training_memory_bytes or self.gpu_memory_bytes or math.inf

    def __post_init__(self) -> None:
        require(self.gpus >= 0 and self.cpus >= 0, f"gpus: {self.gpus} and cpus: {self.cpus} must not be negative")
        require(
            self.gpus <= 1 or self.gpus == int(self.gpus),
            f"gpus: {self.gpus} must be a fraction below 1 or a whole number",
        )
        require(self.workers >= 1, f"workers: {self.workers} must be at least 1")
        require(
            self.workers == 1 or self.gpus in (0, self.workers),
            f"workers: {self.workers} processes on {self.gpus:g} gpus; there is one a GPU, so leave workers out",
        )
        memories = ("memory_bytes", "gpu_memory_bytes", "training_memory_bytes")
        for name in ("compute_flops", "uplink_bps", "downlink_bps", "distance_m", *memories):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}: {value} must be above 0")
        for name, amount in self.resources.items():
            require(amount >= 0, f"resources.{name}: {amount} must not be negative")
        require(self.latency_seconds >= 0, f"latency_seconds: {self.latency_seconds} must not be negative")
        require(0 < self.availability <= 1, f"availability: {self.availability} must lie in (0, 1]")
        fault = trace_fault(self.trace, self.trace_period_seconds)
        require(fault is None, fault or "")


@dataclass(frozen=True, kw_only=True)
class FleetSettings(Section):
    """The edge servers. profiles: a YAML file of them; edges: the same inline, or the keys that differ from the file's.

    clock: what FedPipe's plans count in: `virtual` seconds of the profiles, or `real` ones, measured on each edge. What
    is planned by measured seconds, or memory of an edge with a capacity, repeats where they do. ray: Ray actors; false
    runs the edges one after another in this process, with the same bits.

    placement: `dedicated` = one actor an edge; `packed` = edges that reserve the same share workers, as many as there
    is room for, at most `workers` for each kind of edge. min_edges: so many must find room for the run to start
    (default: all); the others take part once a node has room. autoscale: ask the cluster's autoscaler for the nodes
    that are missing, and wait start_timeout_seconds for them. retries: how often in a round an edge is tried again
    whose worker died; round_timeout_seconds: real ones after which a worker is given up. address: of a cluster (null:
    RAY_ADDRESS, else Ray on this machine).

    fraction: share of the available edges whose reports a round uses. over_select: how many times as many are asked, of
    which the first on the virtual clock are taken. deadline_seconds: reports that come later on that clock are dropped.
    mode: `buffered` aggregates whenever `buffer` reports have come, while up to `concurrency` edges (null: all) work on
    from older states; reports more than max_staleness states old are dropped. See docs/stragglers.md.
    """

    profiles: str | None = None
    edges: dict[str, Profile] = field(default_factory=dict)
    clock: Literal["virtual", "real"] = "virtual"
    ray: bool = True
    placement: Literal["dedicated", "packed"] = "dedicated"
    workers: int | None = None
    min_edges: int | None = None
    autoscale: bool = False
    retries: int = 1
    address: str | None = None
    fraction: float = 1.0
    over_select: float = 1.0
    deadline_seconds: Seconds | None = None
    mode: Literal["synchronous", "buffered"] = "synchronous"
    buffer: int | None = None
    concurrency: int | None = None
    max_staleness: int | None = None
    start_timeout_seconds: Seconds = 300.0
    round_timeout_seconds: Seconds | None = None

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, f"fleet.fraction: {self.fraction} must lie in (0, 1]")
        require(self.over_select >= 1, f"fleet.over_select: {self.over_select} must be at least 1")
        for name in (
            "start_timeout_seconds", "round_timeout_seconds", "workers", "min_edges", "deadline_seconds", "buffer",
            "concurrency",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value is None or value > 0, f"fleet.{name}: {value} must be above 0")
        require(self.retries >= 0, f"fleet.retries: {self.retries} must not be negative")
        require(
            self.workers is None or self.placement == "packed",
            f"fleet.workers: {self.workers} needs fleet.placement: packed; dedicated edges have one worker each",
        )
