"""FedIT: federated LoRA by averaging the factors (Zhang et al. 2023, arXiv 2305.05644).

With B_k, A_k the factors of edge k after its local steps and p_k = n_k / sum n its share of the samples:

    A = sum_k p_k A_k        B = sum_k p_k B_k

as in the paper. The applied update B A differs from sum_k p_k B_k A_k by -sum_k p_k (B_k - B)(A_k - A), which vanishes
only if the edges agree in one factor. Ours: n_k counts the rows an edge trained on in the round, so an edge with fewer
steps weighs less; a classifier's head is averaged with the same weights; a round without usable report changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedpipe_ray.averaging import average
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report

from .base import LoraMethod

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class Lora(LoraMethod):
    """FedIT: LoRA, sample-weighted average of A and of B."""

    asynchronous: ClassVar[bool] = True
    averaging: ClassVar[bool] = True
    pseudo_gradient: ClassVar[bool] = True

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """Sample-weighted mean of every tensor, or what server.aggregator names."""
        return average(state, reports, server)
