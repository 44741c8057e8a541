"""Where edges can run: pure functions from profiles and nodes to pools, seats and refusals."""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedpipe_ray.settings import FleetSettings, Profile

GIB = 1024**3
COMMON = ("CPU", "memory", "object_store_memory")  # every node has them


@dataclass(frozen=True)
class Node:
    """One machine of a cluster: its resources in total, its labels, its id; free: what nobody uses now, if known."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]
    id: str = ""
    free: Mapping[str, float] | None = None


@dataclass(frozen=True, eq=False)
class Pool:
    """Edges that share workers. profile: what one worker reserves, that of the first edge; most: workers at most."""

    name: str
    edges: Sequence[str]
    profile: Profile
    most: int


def pools_of(fleet: FleetSettings) -> list[Pool]:
    """A pool an edge (dedicated), or one for all edges that reserve the same (packed); several processes stay apart."""
    alike: dict[Any, list[str]] = {}
    for name, p in fleet.edges.items():
        key: Any = name
        if fleet.placement == "packed" and processes(p) == 1:
            wanted, labels = tuple(sorted(p.resources.items())), tuple(sorted(p.labels.items()))
            key = (p.cpus, p.gpus, p.memory_bytes, p.gpu_memory_bytes, wanted, labels)
        alike.setdefault(key, []).append(name)
    most = fleet.workers or len(fleet.edges)
    return [Pool(names[0], names, fleet.edges[names[0]], min(len(names), most)) for names in alike.values()]


def processes(profile: Profile) -> int:
    """How many processes train together on an edge: one a GPU, or `workers`."""
    return max(profile.workers, int(profile.gpus), 1)


def demand(profile: Profile) -> dict[str, float]:
    """What Ray must reserve for an edge, by resource name."""
    wanted = {"CPU": profile.cpus, "GPU": profile.gpus, "memory": float(profile.memory_bytes or 0), **profile.resources}
    return {name: amount for name, amount in wanted.items() if amount > 0}


def actor_options(profile: Profile) -> dict[str, Any]:
    """Options of the Ray actor of an edge: its resources. Its labels chose the node that it is pinned to."""
    options: dict[str, Any] = {"num_cpus": profile.cpus, "num_gpus": profile.gpus, "resources": dict(profile.resources)}
    if profile.memory_bytes:
        options["memory"] = profile.memory_bytes
    return options


class Offer(Protocol):
    """What a node that need not exist yet would have."""

    @property
    def resources(self) -> Mapping[str, float]:
        """By Ray's names; memory in bytes."""

    @property
    def labels(self) -> Mapping[str, str]:
        """As Ray matches them."""


def unplaceable(profiles: Mapping[str, Profile], nodes: Sequence[Offer]) -> list[str]:
    """A line for every edge that finds no room; empty if all fit together."""
    return list(place(profiles, [Node(node.resources, node.labels) for node in nodes])[1].values())


def place(profiles: Mapping[str, Profile], nodes: Sequence[Node]) -> tuple[dict[str, Node], dict[str, str]]:
    """(a node for every edge that finds room, a line for every other one).

    First fit over whole nodes, an edge never spans two. Edges that few nodes can hold go first, lest another takes
    their place; then large ones. What other jobs use now is waited for: room that is free is only preferred.
    """
    faults = {name: f"edge {name}: {fault}" for name, p in profiles.items() if (fault := unknown_to_ray(p))}
    if faults:
        return {}, faults
    kinds = {name: _kind(profile) for name, profile in profiles.items()}  # thousands of edges are a few kinds
    urgency = {kind: _urgency(p, nodes) for kind, p in {kinds[name]: p for name, p in profiles.items()}.items()}
    found: dict[str, Node] = {}
    refusals: dict[Hashable, str] = {}
    room = _Room(nodes, profiles.values())
    for name in sorted(profiles, key=lambda name: urgency[kinds[name]]):
        node, kind = room.take(profiles[name]), kinds[name]
        if node is not None:
            found[name] = node
            continue
        if kind not in refusals:
            refusals[kind] = _refusal(profiles[name], nodes)
        faults[name] = f"edge {name}: {refusals[kind]}"
    return found, faults


def _kind(profile: Profile) -> Hashable:
    """The same for edges that can take each other's place."""
    return tuple(sorted(demand(profile).items())), tuple(sorted(profile.labels.items()))


def seats(lacking: Mapping[Pool, int], nodes: Sequence[Node]) -> tuple[list[tuple[Pool, Node]], dict[str, str]]:
    """(pool and node of every worker to start, a line for every pool without any).

    lacking: how many more each may have. Every pool gets one before any gets a second.
    """
    first, faults = place({pool.name: pool.profile for pool in lacking}, nodes)
    chosen = [(pool, first[pool.name]) for pool in lacking if pool.name in first]
    room = _Room(nodes, [pool.profile for pool in lacking])
    for pool, node in chosen:
        room.reserve(node, pool.profile)
    more = {pool: count - 1 for pool, count in lacking.items() if pool.name in first and count > 1}
    while more:
        for pool in list(more):
            found = room.take(pool.profile) if more[pool] else None
            if found is None:
                del more[pool]
                continue
            chosen.append((pool, found))
            more[pool] -= 1
    return chosen, faults


def without(nodes: Sequence[Node], taken: Iterable[tuple[str, Profile]]) -> list[Node]:
    """The nodes less what our own workers, as (node id, profile), reserve on them."""
    left = {node.id: dict(node.resources) for node in nodes}
    for node_id, profile in taken:
        if node_id in left:
            for key, amount in demand(profile).items():
                left[node_id][key] = left[node_id].get(key, 0.0) - amount
    return [dataclasses.replace(node, resources=left[node.id]) for node in nodes]


def only_free(nodes: Sequence[Node]) -> list[Node]:
    """The nodes with what nobody uses now as all they have."""
    free = {node.id: node.free or {} for node in nodes}
    return [
        dataclasses.replace(node, resources={k: min(v, free[node.id].get(k, 0.0)) for k, v in node.resources.items()})
        for node in nodes
    ]


def device_fault(profile: Profile, name: str, total_bytes: int) -> str | None:
    """What is wrong with the GPU that an edge got, by its name and memory; None if it is what its profile says.

    A profile names a GPU in the label `gpu` or `ray.io/accelerator-type`. name "": none is seen.
    """
    if not profile.gpus:
        return None
    if not name:
        return f"Ray gave it gpus {profile.gpus:g}, but torch sees no GPU; install a CUDA build of torch on its node"
    wanted = profile.labels.get("gpu") or profile.labels.get("ray.io/accelerator-type", "")
    if _plain(wanted) not in _plain(name):
        return f"its profile names the GPU {wanted!r}, and it got {name!r}; correct the node's labels or the profile"
    cap = profile.gpu_memory_bytes
    if cap is not None and cap > total_bytes:
        return (
            f"gpu_memory_bytes {cap / GIB:.2f} GiB is more than its GPU {name!r} has ({total_bytes / GIB:.2f} GiB); "
            "lower it, or give it another node"
        )
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


class _Room:
    """What is left of nodes while workers are given places on them; a node that is full for a kind stays so."""

    def __init__(self, nodes: Sequence[Node], profiles: Iterable[Profile]) -> None:
        self.nodes = nodes
        self.places = {id(node): place for place, node in enumerate(nodes)}
        self.left = [dict(node.resources) for node in nodes]
        self.free = [dict(node.resources if node.free is None else node.free) for node in nodes]
        chosen_by = {key for profile in profiles for key in profile.labels}
        self.labels = [sum(key in node.labels for key in chosen_by) for node in nodes]
        self.open: dict[Hashable, tuple[deque[int], deque[int]]] = {}  # by kind: nodes with free room, with any

    def take(self, profile: Profile) -> Node | None:
        """A node for such an edge, and its place there is gone; None if there is none."""
        wanted, kind = demand(profile), _kind(profile)
        if kind not in self.open:
            fitting = [place for place, node in enumerate(self.nodes) if _labelled(node, profile)]
            fitting.sort(key=lambda place: self._waste(place, wanted))
            self.open[kind] = deque(fitting), deque(fitting)
        for amounts, places in zip((self.free, self.left), self.open[kind], strict=True):
            while places and not (_holds(amounts[places[0]], wanted) and _holds(self.left[places[0]], wanted)):
                places.popleft()
            if places:
                node = self.nodes[places[0]]
                self.reserve(node, profile)
                return node
        return None

    def reserve(self, node: Node, profile: Profile) -> None:
        """Takes an edge's place on `node`."""
        place = self.places[id(node)]
        for key, amount in demand(profile).items():
            for amounts in (self.left[place], self.free[place]):
                amounts[key] = amounts.get(key, 0.0) - amount

    def _waste(self, place: int, wanted: Mapping[str, float]) -> int:
        """How many things a node has that this edge does not want and another may: GPUs, own resources, labels."""
        own = [k for k, v in self.nodes[place].resources.items() if v > 0 and k not in COMMON and ":" not in k]
        return sum(key not in wanted for key in own) + self.labels[place]


def unknown_to_ray(profile: Profile) -> str | None:
    """Which demand of an edge Ray has no words for; None if there is none."""
    keys = {"CPU": "cpus", "GPU": "gpus", "memory": "memory_bytes", "object_store_memory": "memory_bytes"}
    for key in profile.resources:
        if key in keys:
            return f"resources.{key} is a key of its own: {keys[key]}; give that instead"
    for key, amount in demand(profile).items():
        if round(amount, 4) != amount:
            return f"{_key(key)} {amount:g} is finer than the 0.0001 that Ray counts in; round it"
    return None


def _urgency(profile: Profile, nodes: Sequence[Node]) -> tuple[float, ...]:
    """Small for an edge that must be placed early."""
    wanted = demand(profile)
    homes = sum(_labelled(node, profile) and _holds(node.resources, wanted) for node in nodes)
    return (homes, -profile.gpus, -profile.cpus, -float(profile.memory_bytes or 0))


def _holds(resources: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0.0) + 1e-9 >= amount for name, amount in wanted.items())


def _labelled(node: Node, profile: Profile) -> bool:
    return all(node.labels.get(key) == value for key, value in profile.labels.items())


def _refusal(profile: Profile, nodes: Sequence[Node]) -> str:
    """Which demand of an edge is too much, what there is, and what to change."""
    wanted = demand(profile)
    fitting = [node for node in nodes if _labelled(node, profile)]
    if not fitting:
        there = sorted(
            {f"{k}={v}" for node in nodes for k, v in node.labels.items() if not k.startswith("ray.io/node-id")}
        )
        return f"no node has labels {_pairs(profile.labels)}; there are {', '.join(there) or 'none'}"
    for key, amount in wanted.items():
        most = max(node.resources.get(key, 0.0) for node in fitting)
        if amount > most + 1e-9:
            return (
                f"{_key(key)} {_amount(key, amount)} is more than any node has ({_amount(key, most)}); "
                "lower it in its profile, or add such a node"
            )
    if not any(_holds(node.resources, wanted) for node in fitting):
        return f"no node has {_listed(wanted)} together; lower one of them in its profile, or add such a node"
    offer = {key: sum(node.resources.get(key, 0.0) for node in fitting) for key in wanted}
    return (
        f"no room left for {_listed(wanted)} beside the other edges; "
        f"the {len(fitting)} node(s) offer {_listed(offer)} in all; "
        "lower the profiles, use fewer edges, or fleet.ray=false"
    )


def asked_for(pool: Pool) -> str:
    """Why a pool has no worker whose demand some node could hold."""
    return f"edge {pool.name}: no node has {_listed(demand(pool.profile))} free; it is asked for"


def _listed(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{_key(key)} {_amount(key, amount)}" for key, amount in amounts.items())


def _key(resource: str) -> str:
    return {"CPU": "cpus", "GPU": "gpus", "memory": "memory_bytes"}.get(resource, f"resources.{resource}")


def _amount(resource: str, amount: float) -> str:
    return f"{amount / GIB:.2f} GiB" if resource == "memory" else f"{amount:g}"


def _pairs(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())
