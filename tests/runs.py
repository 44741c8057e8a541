"""What tests of whole runs share: a fleet by name, and a run through the command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpipe_ray.config import load_run
from fedpipe_ray.fleet import Fleet, SerialFleet
from fedpipe_ray.methods.base import Method
from fedpipe_ray.settings import Run

ROOT = Path(__file__).resolve().parent.parent


def load(path: Path, *overrides: str) -> Run:
    """The run in `path`, which names no profile file."""
    return load_run(path, overrides, lambda name, _: {})


def fleet_of(kind: str, run: Run, method: Method, private: Path | None = None) -> Fleet:
    """`serial` or `ray`."""
    if kind == "serial":
        return SerialFleet(run, method, private)
    from actors.fleet import RayFleet

    return RayFleet(run, method, private)


def command(*arguments: object, **environment: str) -> list[str]:
    """`python -m fedpipe_ray ...` as an argument vector."""
    return [sys.executable, "-m", "fedpipe_ray", *map(str, arguments)]


def fedpipe(*arguments: object, timeout: float = 240, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line and waits for it."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=env(**environment), capture_output=True, text=True, timeout=timeout, check=False
    )


def env(**changes: str) -> dict[str, str]:
    """This process's environment with the repository on the path."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **changes}


def tensors(folder: Path) -> dict[str, Any]:
    """The exported adapter's tensors."""
    from safetensors.torch import load_file

    return dict(load_file(folder / "adapter" / "adapter_model.safetensors"))


def assert_same(first: dict[str, Any], second: dict[str, Any], names: Sequence[str] = ()) -> None:
    """Bit for bit."""
    import torch

    assert first.keys() == second.keys()
    for name in names or first:
        assert torch.equal(first[name], second[name]), name
