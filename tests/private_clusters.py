"""Clusters of a test's own whose nodes come and go: by the test's hand, or by an autoscaler that starts processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from private_heads import head, plain_environment, wait_until_up
from runs import ROOT, belonging, free_ports

NODE = Path(__file__).with_name("loopback_node.py")
SETTINGS = {
    "PYTHONPATH": f"{Path(__file__).parent}:{ROOT}",  # workers find the tests' methods
    "RAY_AUTH_MODE": "disabled",
    # A node that is killed is given up after a second or two, not after 20.
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "4",
}


class Cluster:
    """A head without room for any edge. Nodes join it by name: a and a2 have one of the resource a."""

    def __init__(self, folder: Path, address: str, settings: Mapping[str, str]) -> None:
        self.folder, self.address, self.settings = folder, address, dict(settings)
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.joined = 0

    def join(self, *names: str) -> None:
        """Starts nodes side by side, and returns when all are there."""
        self.joined += len(names)
        logs = [self.folder / f"{name}{self.joined}.log" for name in names]
        for name, log in zip(names, logs, strict=True):
            with log.open("w") as file:
                self.nodes[name] = subprocess.Popen(
                    [sys.executable, str(NODE), self.address, json.dumps({name[0]: 1}), str(log.with_suffix(""))],
                    cwd=self.folder, env=plain_environment(self.folder, **self.settings), stdin=subprocess.PIPE,
                    stdout=file, stderr=subprocess.STDOUT,
                )  # fmt: skip
        for name, log in zip(names, logs, strict=True):
            wait_until_up(self.nodes[name], log)

    def node_of(self, pid: int) -> str:
        """The name of the node on which a process runs."""
        return next(
            name
            for name, node in self.nodes.items()
            if any(process.pid == pid for process in psutil.Process(node.pid).children(recursive=True))
        )

    def leave(self, name: str, *, warned: bool) -> None:
        """Removes a node. warned: as one that is shut down; else as one whose power fails."""
        process = self.nodes.pop(name)
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        assert process.stdin is not None
        if warned:
            process.stdin.close()
            _, family = psutil.wait_procs(family, timeout=30)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.kill()
        process.wait()
        process.stdin.close()


@contextmanager
def cluster(folder: Path, **settings: str) -> Iterator[Cluster]:
    """A cluster without nodes. settings: environment of all its processes."""
    settings = {**SETTINGS, **settings}
    with head(folder, "--num-cpus=0", **settings) as address:
        one = Cluster(folder, address, settings)
        try:
            yield one
        finally:
            for name in list(one.nodes):
                one.leave(name, warned=False)


@contextmanager
def autoscaled(folder: Path, **types: Mapping[str, float]) -> Iterator[str]:
    """The address of a head without CPUs whose autoscaler starts nodes; ends those that were idle for 10 s.

    types: node type -> its resources; at most two nodes of each. It is Ray's own, with its provider for tests.
    """
    (port,) = free_ports(1)
    (config := folder / "autoscaler.json").write_text(json.dumps(_autoscaler(folder, port, types)))
    settings = {
        **SETTINGS, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "120",  # on a busy machine a node that starts is silent for long
    }  # fmt: skip
    with head(folder, "--num-cpus=0", f"--autoscaling-config={config}", port=port, **settings) as address:
        try:
            yield address
        except BaseException:
            print(*(log.read_text()[-20000:] for log in folder.glob("session_2*/logs/monitor.log")))
            raise


def raylets(folder: Path) -> int:
    """How many nodes run in `folder`, the head among them."""
    count = 0
    for process in belonging(folder):
        with suppress(psutil.NoSuchProcess):
            count += process.name() == "raylet"
    return count


def _autoscaler(folder: Path, port: int, types: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What a cluster file says, with every key that its reader asks for."""
    kinds = {name: {"resources": dict(has), "node_config": {}, "max_workers": 2} for name, has in types.items()}
    lists = (
        "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
        "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
    )  # fmt: skip
    return {
        "cluster_name": "test", "max_workers": 2 * len(types), "upscaling_speed": 1.0, "idle_timeout_minutes": 10 / 60,
        "provider": {
            "type": "external", "module": "nodes_apart.NodesApart", "folder": str(folder),
            "gcs_address": f"127.0.0.1:{port}", "use_node_id_as_ip": True, "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}, **kinds
        },
        "head_node_type": "ray.head.default", "auth": {}, "docker": {}, "file_mounts": {},
        "file_mounts_sync_continuously": False, **{name: [] for name in lists},
    }  # fmt: skip
