"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691, EMNLP 2021), its prompts averaged.

    p(y | [P; X]),    P [tokens, d] trained in front of the embeddings X of a row, the model frozen

The paper's: one prompt a task, read at the first layer alone; P starts as embeddings of words (100 tokens, drawn from
the 5,000 most common ones, or class labels), or uniform in [-0.5, 0.5], which is worse for all but the largest models;
its rate is 0.3 with Adafactor. Ours: FedAvg of the prompts (arXiv 1602.05629), P = sum_k p_k P_k with p_k = n_k / sum n
over the rows an edge trained on in the round; words are drawn from the whole vocabulary, by the run's seed and the same
for all edges: prompts that start apart would not average to a prompt; AdamW with the rate of `local`. PEFT computes it,
and its file is the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from fedpipe_ray import virtual
from fedpipe_ray.averaging import average
from fedpipe_ray.message import Message
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.settings import Profile, Section, require

from .base import Updates, Weights

if TYPE_CHECKING:
    from fedpipe_ray.site import Site


@dataclass(frozen=True, kw_only=True)
class Prompt(Section):
    """Prompt tuning: embeddings before every row are trained and averaged; the model is frozen.

    tokens: length of the prompt (the paper 100). init: `words` of the vocabulary, or `uniform` in [-0.5, 0.5].
    """

    tokens: int = 20
    init: Literal["words", "uniform"] = "words"

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
        return virtual.VirtualSpec("prompt", self.tokens)

    def check(self, site: Site) -> None:
        """Raises UserError for a classifier, and for a model in whose positions prompt and rows find no room."""
        virtual.check(site, self.spec)

    def start(self, server: Site, rng: np.random.Generator) -> Message:
        """The prompt [tokens, d] that all edges start from."""
        drawn = virtual.embedded(server.base, virtual.words(server.base, self.tokens, rng))
        if self.init == "uniform":
            drawn = torch.from_numpy(rng.uniform(-0.5, 0.5, size=drawn.shape)).float()
        return Message({virtual.KEY: drawn})

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> dict[str, Message]:
        """Everybody gets the global prompt."""
        return dict.fromkeys(edges, Message(state.tensors))

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The prompt after this round's local steps."""
        return Message(virtual.read(virtual.train(site, order.tensors, self.spec, rng)))

    def aggregate(
        self, state: Message, reports: Iterable[Report | Lost], server: Site, round: int, rng: np.random.Generator
    ) -> Message:
        """Sample-weighted mean of the prompts."""
        return average(state, reports, server)

    def weights(self, state: Message, site: Site) -> dict[str, Weights]:
        """One view: the global prompt."""
        return {"global": virtual.VirtualWeights(self.spec, state.tensors)}
