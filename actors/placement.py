"""Where edges can run: pure functions from profiles and nodes to options and refusals."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpipe_ray.settings import Profile

GIB = 1024**3


@dataclass(frozen=True)
class Node:
    """One machine of a cluster: its resources in total and its labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]


def demand(profile: Profile) -> dict[str, float]:
    """What Ray must reserve for an edge, by resource name."""
    wanted = {"CPU": profile.cpus, "GPU": profile.gpus, "memory": float(profile.memory_bytes or 0), **profile.resources}
    return {name: amount for name, amount in wanted.items() if amount > 0}


def actor_options(name: str, profile: Profile) -> dict[str, Any]:
    """Options of the Ray actor of an edge: its resources, labels and name."""
    options: dict[str, Any] = {"num_cpus": profile.cpus, "num_gpus": profile.gpus, "resources": dict(profile.resources)}
    if profile.memory_bytes:
        options["memory"] = profile.memory_bytes
    if profile.labels:
        options["label_selector"] = dict(profile.labels)
    return options


def unplaceable(profiles: Mapping[str, Profile], nodes: Sequence[Node]) -> list[str]:
    """A line for every edge that finds no room; empty if all fit together.

    First fit over whole nodes, an edge never spans two. Edges that few nodes can hold go first, lest another takes
    their place; then large ones. What other jobs use at the moment is not looked at.
    """
    lines = [f"edge {name}: {fault}" for name, profile in profiles.items() if (fault := _unknown_to_ray(profile))]
    if lines:
        return lines
    left = [dict(node.resources) for node in nodes]
    # Thousands of edges are a few kinds, and what one finds holds for its like; room only shrinks, so a node that is
    # full for a kind stays full.
    kinds = {name: _kind(profile) for name, profile in profiles.items()}
    first = {kinds[name]: profile for name, profile in profiles.items()}
    urgency = {kind: _urgency(profile, nodes) for kind, profile in first.items()}
    rooms = {
        kind: deque(i for i, node in enumerate(nodes) if _labelled(node, profile)) for kind, profile in first.items()
    }
    refusals: dict[Hashable, str] = {}
    for name in sorted(profiles, key=lambda name: urgency[kinds[name]]):
        kind = kinds[name]
        wanted, there = demand(profiles[name]), rooms[kind]
        while there and not _holds(left[there[0]], wanted):
            there.popleft()
        if not there:
            if kind not in refusals:
                refusals[kind] = _refusal(profiles[name], nodes)
            lines.append(f"edge {name}: {refusals[kind]}")
            continue
        for key, amount in wanted.items():
            left[there[0]][key] -= amount
    return lines


def _kind(profile: Profile) -> Hashable:
    """The same for edges that can take each other's place."""
    return tuple(sorted(demand(profile).items())), tuple(sorted(profile.labels.items()))


def _unknown_to_ray(profile: Profile) -> str | None:
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


def _listed(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{_key(key)} {_amount(key, amount)}" for key, amount in amounts.items())


def _key(resource: str) -> str:
    return {"CPU": "cpus", "GPU": "gpus", "memory": "memory_bytes"}.get(resource, f"resources.{resource}")


def _amount(resource: str, amount: float) -> str:
    return f"{amount / GIB:.2f} GiB" if resource == "memory" else f"{amount:g}"


def _pairs(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())
