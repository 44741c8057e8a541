"""A node of a cluster on loopback, as a program: `ray start --address` refuses there. It leaves when its input ends."""

from __future__ import annotations

import json
import sys

from ray._private.node import Node
from ray._private.parameter import RayParams


def main(address: str, resources: str, folder: str) -> None:
    settings = RayParams(
        gcs_address=address, redis_address=address, num_cpus=1, num_gpus=0, resources=json.loads(resources),
        object_store_memory=10**8, min_worker_port=0, max_worker_port=0, dashboard_agent_listen_port=0,
        include_log_monitor=False, temp_dir=folder,  # or two that start together take the same socket
    )  # fmt: skip
    node = Node(settings, head=False, shutdown_at_exit=False, spawn_reaper=False)
    print("Ray runtime started", flush=True)
    sys.stdin.read()
    node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
