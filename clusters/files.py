"""What a cluster file for Ray's own launchers can start: the node types of a `ray up` or a KubeRay file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import yaml

from fedpipe_ray.errors import UserError
from fedpipe_ray.settings import Profile

from . import find_file

Unplaceable = Callable[[Mapping[str, Profile], Sequence[Any]], list[str]]
UNLIMITED = 2**31 - 1  # maxReplicas of a worker group that states none
DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}


@dataclass(frozen=True)
class NodeType:
    """Nodes that are alike: resources by Ray's names (memory in bytes), labels, and how many there can be at most."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    count: int


def node_types(file: str) -> list[NodeType]:
    """The head and the workers that a cluster file allows at most, as Ray's autoscaler reads it. Raises UserError.

    `ray up` files do not say what a bare machine has; `metadata.machines` does, which Ray leaves to its users.
    """
    path = find_file(file, Path())
    if path is None:
        raise UserError(f"--cluster: no file {file}; ready ones: clusters/ray_up/*.yaml, clusters/kuberay/*.yaml")
    try:
        documents = [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--cluster {path}: cannot be read as YAML: {error}") from None
    mappings = [one for one in documents if isinstance(one, dict)]
    try:
        for tree in mappings:
            if str(tree.get("apiVersion", "")).startswith("ray.io/"):
                return _kuberay(tree)
            if "cluster_name" in tree and "provider" in tree:
                return _bare(tree) if tree["provider"].get("type") == "local" else _ray_up(tree)
    except UserError as error:
        raise UserError(f"--cluster {path}: {error}") from None
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"--cluster {path}: is not what Ray's launcher reads ({type(error).__name__}: {error}); "
            "compare it with the ready files in clusters/"
        ) from None
    keys = ", ".join(sorted(str(key) for tree in mappings for key in tree)[:8])
    raise UserError(
        f"--cluster {path}: is neither a `ray up` file (cluster_name, provider) nor a RayCluster or RayJob of KubeRay "
        f"(apiVersion: ray.io/v1); it has {keys or 'no keys'}"
    )


def room(file: str, edges: Mapping[str, Profile], unplaceable: Unplaceable) -> str:
    """Says that all edges find room with all the nodes that a cluster file allows. Raises UserError if they do not.

    unplaceable(edges, nodes) gives a line for every edge without room; of a node it asks resources and labels.
    """
    kinds = node_types(file)
    most = ", ".join(kind.name if kind.count == 1 else f"{kind.count} {kind.name}" for kind in kinds)
    refused = unplaceable(edges, [kind for kind in kinds for _ in range(min(kind.count, len(edges)))])
    if refused:
        fault = f"{file}: no room for {len(refused)} of {len(edges)} edges with all it may start ({most})"
        raise UserError("\n".join([f"{fault}; let it start more, or change the profiles:", *refused[:20]]))
    return f"{file}: room for all {len(edges)} edges with all it may start ({most})"


def _ray_up(tree: Mapping[str, Any]) -> list[NodeType]:
    """Node types of a file for machines that a provider starts."""
    kinds, head, most = tree.get("available_node_types"), tree.get("head_node_type"), tree.get("max_workers", 2)
    if not kinds or head not in kinds:
        raise UserError(
            f"head_node_type {head!r} must be one of available_node_types ({', '.join(kinds or {}) or 'none'}); "
            "without them Ray starts small CPU machines of its own choice"
        )
    found = []
    for name, kind in kinds.items():
        if "CPU" not in kind["resources"]:
            raise UserError(
                f"available_node_types.{name}.resources: states no CPU, which Ray would learn from the provider; "
                "write what such a node has, such as {CPU: 8, GPU: 1, memory: 23622320128}"
            )
        workers = kind.get("max_workers", 0 if name == head else most)
        found.append(NodeType(name, _amounts(kind["resources"]), kind.get("labels") or {}, workers + (name == head)))
    together = sum(kind.count for kind in found) - 1
    if together > most:
        raise UserError(
            f"max_workers {most} is less than the {together} workers of all node types, and which of them Ray starts "
            f"depends on the demand; give the types max_workers that add up to {most}, or set max_workers: {together}"
        )
    return found


def _bare(tree: Mapping[str, Any]) -> list[NodeType]:
    """One node type a machine, of a file for machines that are there."""
    provider, machines = tree["provider"], (tree.get("metadata") or {}).get("machines") or {}
    workers = provider.get("worker_ips") or []
    undescribed = [ip for ip in workers if ip not in machines]
    strangers = sorted(set(machines) - {*workers, provider.get("head_ip")})
    if undescribed or strangers or not workers:
        fault = (
            f"no machine is described for worker_ips {', '.join(undescribed)}"
            if undescribed
            else f"{', '.join(strangers) or 'nothing'} is described, and provider.worker_ips has {workers or 'none'}"
        )
        raise UserError(
            f"metadata.machines: {fault}; describe every worker there, "
            "such as 192.168.1.21: {resources: {CPU: 16, GPU: 1, memory: 34359738368}, labels: {edge-class: large}}"
        )
    most = tree.get("max_workers", len(workers))
    if most < len(workers):
        raise UserError(f"max_workers {most} is less than the {len(workers)} worker_ips; raise it, or remove machines")
    return [NodeType(ip, _amounts(it["resources"]), it.get("labels") or {}, 1) for ip, it in machines.items()]


def _kuberay(tree: Mapping[str, Any]) -> list[NodeType]:
    """Head and worker groups of a RayCluster, or of the one that a RayJob or RayService brings."""
    spec = tree["spec"]
    if tree.get("kind") != "RayCluster":
        own = spec.get("rayClusterSpec") or spec.get("rayClusterConfig")
        if own is None:
            raise UserError(
                f"this {tree.get('kind')} brings no cluster (rayClusterSpec); give the file of the cluster it runs on"
            )
        spec = own
    head = spec["headGroupSpec"]
    found = [NodeType("head", _group_resources(head, "headGroupSpec"), head.get("labels") or {}, 1)]
    for group in spec.get("workerGroupSpecs") or []:
        if spec.get("enableInTreeAutoscaling"):
            replicas = group.get("maxReplicas", UNLIMITED)
        else:
            replicas = max(group.get("replicas", 0), group.get("minReplicas", 0))
        name, count = group["groupName"], replicas * group.get("numOfHosts", 1)
        found.append(NodeType(name, _group_resources(group, name), group.get("labels") or {}, count))
    return found


def _group_resources(group: Mapping[str, Any], name: str) -> dict[str, float]:
    """Ray's resources of a group's pods: its `resources`, else rayStartParams, else what its Ray container may use."""
    own, start = group.get("resources") or {}, group.get("rayStartParams") or {}
    container = group["template"]["spec"]["containers"][0].get("resources") or {}
    pod = {**(container.get("requests") or {}), **(container.get("limits") or {})}
    gpu = next((key for key in pod if key.endswith("gpu") and _quantity(pod[key]) > 0), None)
    stated = {"CPU": ("num-cpus", "cpu"), "GPU": ("num-gpus", gpu), "memory": ("memory", "memory")}
    custom = {} if own or "resources" not in start else json.loads(start["resources"][1:-1].replace("\\", ""))
    found = {key: float(amount) for key, amount in custom.items()}
    for resource, (parameter, limit) in stated.items():
        amount = own.get(resource, start.get(parameter, pod.get(limit)))
        if amount is not None:
            found[resource] = float(math.ceil(_quantity(amount)))
    if "CPU" not in found:
        raise UserError(f"group {name}: states no CPU; give its Ray container a limit, such as limits: {{cpu: 8}}")
    others = {key: float(math.ceil(_quantity(amount))) for key, amount in own.items() if key not in stated}
    return found | others


def _quantity(amount: str | float) -> Decimal:
    """A quantity of Kubernetes, such as 500m, 4 or 16Gi. Raises UserError."""
    text = str(amount).strip()
    number = text.rstrip("numkKMGTPEi")
    suffix = text[len(number) :]
    try:
        if suffix in BINARY:
            return Decimal(number) * Decimal(2) ** BINARY[suffix]
        return Decimal(number).scaleb(DECIMAL[suffix])
    except (InvalidOperation, KeyError):
        raise UserError(f"{amount!r} is no quantity of Kubernetes; write for example 500m, 4 or 16Gi") from None


def _amounts(resources: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(amount) for name, amount in resources.items()}
