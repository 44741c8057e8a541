"""A plan that somebody else found, as an edge's own: bits, batch and a rank for each kind of weight. Ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedpipe_ray.section import Section, require

from .problem import RANKS, Array, Demand, EdgePlan, Found, Key, Problem


@dataclass(frozen=True)
class Allocation(Section):
    """What one edge is given. ranks: kind of weight, such as q_proj, or a weight's own name -> one of RANKS.

    What is left out has none; a weight's own entry counts before that of its kind.
    """

    bits: int
    batch: int
    ranks: Mapping[str, int]

    def __post_init__(self) -> None:
        odd = {kind: rank for kind, rank in self.ranks.items() if rank not in RANKS}
        require(not odd, f"ranks: {odd} must be some of {', '.join(map(str, RANKS))}")


def solution(edge: Problem, wanted: Allocation) -> Found:
    """`wanted` as a solution of an edge's problem. Raises ValueError for a choice or a kind that is not there."""
    demand = edge.demand
    at = {(one.bits, one.batch): q for q, one in enumerate(demand.choices) if one.depth is None}
    if (wanted.bits, wanted.batch) not in at:
        bits, batches = ({str(pair[i]) for pair in at} for i in (0, 1))
        raise ValueError(
            f"edge {demand.edge}: no choice of {wanted.bits} bits and batch {wanted.batch}; there are bits "
            f"{', '.join(sorted(bits))} and batches {', '.join(sorted(batches, key=int))}"
        )
    odd = sorted(wanted.ranks.keys() - {name for key in edge.keys for name in (key.kind, key.name)})
    if odd:
        raise ValueError(f"edge {demand.edge}: no weight or kind {', '.join(odd)}; method.targets has others")
    ranks = wanted.ranks
    picks = np.array([RANKS.index(ranks.get(key.name, ranks.get(key.kind, 0))) for key in edge.keys], np.intp)
    return edge.found(at[wanted.bits, wanted.batch], picks)


def given(
    keys: Sequence[Key], demand: Demand, scores: Array, deadline_seconds: float, wanted: Allocation, *,
    steps: str = "filled", lam: float = 1.0, gain: str = "log2", firm: bool = True,
) -> EdgePlan:  # fmt: skip
    """The plan of an edge that does what it is told.

    firm: ValueError if that does not fit its memory; else a smaller batch, then fewer bits, where one fits: what was
    found by the costs of a model may turn out to take more when it is measured.
    """
    edge = Problem(keys, demand, scores, deadline_seconds, lam, gain)
    found = edge.plan(solution(edge, wanted), steps)
    if found.memory_bytes > demand.capacity_bytes and not firm:
        smaller = {(one.bits, one.batch) for one in demand.choices if one.depth is None}
        for bits, batch in sorted(smaller, reverse=True):
            if bits <= wanted.bits and batch <= wanted.batch:
                less = edge.plan(solution(edge, replace(wanted, bits=bits, batch=batch)), steps)
                if less.memory_bytes <= demand.capacity_bytes:
                    return less
    if (found.memory_bytes > demand.capacity_bytes and firm) or not found.ranks:
        raise ValueError(
            f"edge {demand.edge}: what it is given needs {found.memory_bytes / 2**20:.1f} MiB of "
            f"{demand.capacity_bytes / 2**20:.1f}, or adapts nothing; give it fewer bits, a smaller batch, lower ranks"
        )
    return found
