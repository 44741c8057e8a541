"""Edges for tests of the planner, written down in a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedpipe_ray.planning import Choice, Demand


def choice(keys: int = 2, **changes: Any) -> Choice:
    """16 bits, batch 1, 1 s a step, 100 bytes, and nothing for the adapters but what `changes` says."""
    arrays = ("step_seconds_rank", "step_seconds_key", "memory_bytes_rank", "memory_bytes_key")
    changes = {"bits": 16, "batch": 1, "depth": None, "step_seconds": 1.0, "memory_bytes": 100.0, **changes}
    return Choice(**{**changes, **{name: np.broadcast_to(float_array(changes.get(name, 0)), keys) for name in arrays}})


def demand(choices: Sequence[Choice], **changes: Any) -> Demand:
    """10 planned steps, at least 3, at most 80; no limit of memory and nothing to send but what `changes` says."""
    keys = len(choices[0].step_seconds_rank)
    changes = {"capacity_bytes": math.inf, "fixed_seconds": 0.0, "transfer_seconds_rank": 0, **changes}
    changes["transfer_seconds_rank"] = np.broadcast_to(float_array(changes["transfer_seconds_rank"]), keys)
    return Demand(
        **{"edge": "e1", "rows": 10, "steps": 10, "min_steps": 3, "max_steps": 80, **changes}, choices=choices
    )


def float_array(values: Any) -> np.ndarray[Any, Any]:
    return np.asarray(values, dtype=float)
