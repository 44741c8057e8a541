"""Run folders made by hand, for tests of the page: small numbers that one can follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

PROFILE = {"compute_flops": 100.0, "uplink_bps": 80.0, "downlink_bps": 80.0, "latency_seconds": 0.5}


def edge(status: str = "ok", virtual: float = 4.5, memory: int = 2**20) -> dict[str, Any]:
    """Of a round: 10 bytes down (1 s and 0.5 s of latency), 100 FLOPs (1 s), the rest is the upload."""
    return {
        "status": status, "bytes_down": 10, "flops": 100.0, "virtual_seconds": virtual, "training_memory_bytes": memory,
    }  # fmt: skip


def line(number: int, loss: float, edges: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Of rounds.jsonl: 5 virtual seconds, 2 MB, 3 wall seconds."""
    evaluated = {"global": {"loss": loss, "accuracy": 1 - loss / 10}, "edges": {name: {"loss": loss} for name in edges}}
    return {
        "round": number, "eval": evaluated, "edges": edges, "bytes_up": 1_500_000, "bytes_down": 500_000,
        "virtual_seconds": 5.0, "wall_seconds": 3.0, "method": {}, **more,
    }  # fmt: skip


def write(folder: Path, losses: list[float], method: str = "lora", seed: int = 0, **config: Any) -> str:
    """A run of edges a and b with a round a loss; its place."""
    folder.mkdir(parents=True)
    edges = {"a": {**PROFILE, "training_memory_bytes": 2**21}, "b": dict(PROFILE)}
    tree = {"seed": seed, "rounds": 4, "method": {"name": method}, "fleet": {"edges": edges}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    lines = [line(number, loss, {"a": edge(), "b": edge()}) for number, loss in enumerate(losses, 1)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return str(folder)
