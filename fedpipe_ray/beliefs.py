"""What the server believes of an edge beyond costs and calibrations: what rounds showed of its memory and its bits.

In a state's numbers: `EDGE/memory`, a factor of all the bytes planned for the edge; `EDGE/memory_bits`, the bits of the
round that told it; `EDGE/capacity`, what an edge without a declared capacity could not go beyond; `EDGE/unpacked`, 1
if bitsandbytes does not pack its base. Ours.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import UserError
from .facts import CALIBRATION
from .planning import EdgePlan
from .report import UNSUPPORTED_BITS, Lost

HEADROOM = 1.05  # rounds of one plan differ by about this much in what a CPU process takes
MEMORY, BITS, CAPACITY, UNPACKED = "memory", "memory_bits", "capacity", "unpacked"
log = logging.getLogger("fedpipe")


def believed(edge: str, numbers: Mapping[str, float]) -> dict[str, Any]:
    """The arguments of `demand_of` that say so."""
    return {
        "correction": numbers.get(f"{edge}/{MEMORY}", 1.0),
        "capacity_bytes": numbers.get(f"{edge}/{CAPACITY}", math.inf),
    }


def bits_of(edge: str, allowed: Sequence[int], numbers: Mapping[str, float]) -> list[int]:
    """Those of `allowed` that the edge can hold its base in. Raises UserError if it can in none."""
    left = [bits for bits in allowed if bits == 16 or f"{edge}/{UNPACKED}" not in numbers]
    if not left:
        raise UserError(f"edge {edge}: method.bits: {list(allowed)}, and its base cannot be packed; add 16")
    return left


def unsupported(lost: Lost) -> dict[str, float]:
    """Numbers that keep an edge at 16 bits if it was lost because its device or its layers allow no others."""
    if not lost.reason.startswith(UNSUPPORTED_BITS):
        return {}
    log.warning("edge %s: %s; it is planned with 16 from now on", lost.edge, lost.reason.partition(": ")[2])
    return {f"{lost.edge}/{UNPACKED}": 1.0}


def told(
    edge: str, plan: EdgePlan | None, took: int, update: Mapping[str, float], numbers: dict[str, float],
    foretold: Callable[[EdgePlan], float],
) -> None:  # fmt: skip
    """Takes a round that took `took` bytes into a state's numbers. plan: what it was, if anybody knows.

    An edge that measured itself anew in those bits has told more than the factor could, unless the round itself came
    near its capacity: then what these numbers foretell of the plan, foretold(plan), is held against that. One that did
    not measure, and took more than planned, is planned with what it took, before that is more than it has.
    """
    measured = {int(name[len(CALIBRATION) :].partition(".")[0]) for name in update if name.startswith(CALIBRATION)}
    if numbers.get(f"{edge}/{BITS}") in measured:
        numbers.pop(f"{edge}/{MEMORY}", None)
    if plan is None or plan.capacity_bytes == math.inf:
        return
    if not measured:
        believed = plan.memory_bytes
    elif plan.bits in measured and HEADROOM * took > plan.capacity_bytes:
        believed = foretold(plan)
    else:
        return
    if HEADROOM * took > believed:
        numbers |= _factor(edge, plan, HEADROOM * took / believed, numbers)


def exceeded(edge: str, plan: EdgePlan, took: int, numbers: Mapping[str, float]) -> dict[str, float]:
    """Numbers with which a plan that ran out of memory does not fit any more. took: bytes, 0 if unknown."""
    limit = plan.capacity_bytes if plan.capacity_bytes < math.inf else took or plan.memory_bytes
    factor = max(1.1, took / plan.memory_bytes, 1.001 * limit / plan.memory_bytes)
    return {**_factor(edge, plan, factor, numbers), f"{edge}/{CAPACITY}": max(limit, plan.memory_bytes)}


def _factor(edge: str, plan: EdgePlan, more: float, numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"{edge}/{MEMORY}": more * numbers.get(f"{edge}/{MEMORY}", 1.0), f"{edge}/{BITS}": float(plan.bits)}
