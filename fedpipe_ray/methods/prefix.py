"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190, ACL 2021), its prefixes averaged.

    h_i = P[i] for i < tokens, else LM(z_i, h_<i),    P[i]: keys and values of all layers, trained, the model frozen

The paper's: every layer attends to `tokens` positions (10 to 200 by task) that no word stands at; P starts as the
activations of real words; it is computed by an MLP from a smaller matrix, for trained directly it was less stable and a
little worse. Ours: FedAvg of the prefixes (arXiv 1602.05629), P = sum_k p_k P_k with p_k = n_k / sum n over the rows an
edge trained on in the round; no MLP, since the mean of MLPs is not the MLP of the mean prefix, and started from
activations it is stable here; the words are drawn from the vocabulary by the run's seed, the same for all edges; AdamW.
The first state computes exactly what the base does behind those words. PEFT computes it, and its file is the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from fedpipe_ray import virtual
from fedpipe_ray.averaging import average
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, Section, require

from .base import Updates, Weights

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class Prefix(Section):
    """Prefix tuning: keys and values before every row, in each layer, are trained and averaged; the model is frozen.

    tokens: length of the prefix (the paper 10 for table-to-text, 200 for summaries).
    """

    tokens: int = 20

    base: ClassVar[Literal["shared", "none"]] = "shared"
    asynchronous: ClassVar[bool] = True
    averaging: ClassVar[bool] = True
    pseudo_gradient: ClassVar[bool] = True
    updates: ClassVar[Updates] = "entries"

    def __post_init__(self) -> None:
        require(self.tokens >= 1, f"method.tokens: {self.tokens} must be at least 1")

    @property
    def spec(self) -> virtual.VirtualSpec:
        """What PEFT is asked for."""
        return virtual.VirtualSpec("prefix", self.tokens)

    def check(self, site: Site) -> None:
        """Raises UserError for a classifier, checkpointing, and a model with too few positions for prefix and rows."""
        virtual.check(site, self.spec)

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """The keys and values of drawn words, which all edges start from."""
        return Message({virtual.KEY: virtual.activations(server.base, virtual.words(server.base, self.tokens, rng))})

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> dict[str, Message]:
        """Everybody gets the global prefix."""
        return dict.fromkeys(edges, Message(state.tensors))

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The prefix after this round's local steps."""
        return Message(virtual.read(virtual.train(site, order.tensors, self.spec, rng)))

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """Sample-weighted mean of the prefixes."""
        return average(state, reports, server)

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: the global prefix."""
        return {"global": virtual.VirtualWeights(self.spec, state.tensors)}
