"""Scoring every candidate weight on an edge: fresh rank-1 adapters beside the acting global one (ours, see fedpipe.py).

Weights that are not trained need a score too. At B = 0 the gradient of B is ||dL/dW A^T|| seen through one random row;
the scores that read B A train the probes for three steps first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from . import importance, lora
from .facts import SCORE

if TYPE_CHECKING:
    from .site import Site

BATCHES = 2  # a prototype saw rank correlations of .95-.97 between edges from one or two
STEPS = 3
TRAINED = ("svd", "sensitivity", "sigma")  # read B A, and train the probes first


def steps_of_probe(kind: str) -> int:
    """What a scoring by `kind` costs, in batches that go forward and back."""
    return BATCHES + (STEPS if kind in TRAINED else 0)


def probe(
    site: Site, spec: lora.LoraSpec, acting: Mapping[str, torch.Tensor], heads: Mapping[str, torch.Tensor], kind: str,
    size: Mapping[str, int], rng: np.random.Generator,
) -> dict[str, float]:  # fmt: skip
    """Scores of the candidates of `spec` by `kind`, as numbers to tell. acting: factors of the global adapter by key.

    heads: a classifier's own layers; size: batch and accumulation.
    """
    model = attach(site, spec, acting, heads, rng)
    if kind in TRAINED:
        site.train(model, rng, steps=STEPS, epochs=None, **size)
    tensors, numbers = lora.read(model), {}
    seen = site.gradients(model, rng, BATCHES, **size)
    gradients = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()} | seen  # where no loss reaches
    for name_a in (name for name in tensors if ".lora_A." in name):
        name_b = name_a.replace(".lora_A.", ".lora_B.")
        numbers[SCORE + lora.module_of(name_a)] = importance.score(
            kind, tensors[name_a], tensors[name_b], gradients[name_a], gradients[name_b], spec.alpha / spec.rank, rng
        )
    return numbers


def attach(
    site: Site, spec: lora.LoraSpec, acting: Mapping[str, torch.Tensor], heads: Mapping[str, torch.Tensor],
    rng: np.random.Generator,
) -> torch.nn.Module:  # fmt: skip
    """The model with rank-1 adapters, B = 0, on every candidate, beside the acting ones."""
    one = lora.LoraSpec(1, spec.alpha / spec.rank, spec.targets, 0.0, spec.task)
    live = any(bool(tensor.any()) for name, tensor in acting.items() if ".lora_B." in name)
    model = lora.attach(site.base, one, lora.LoraSpec.uneven(spec, ranks_of(acting)) if live else None)
    shapes = {name: tuple(parameter.shape) for name, parameter in lora.parameters(model).items()}
    lora.load(model, lora.initial(shapes, torch.Generator().manual_seed(int(rng.integers(2**63)))) | dict(heads))
    if live:
        lora.load(model, acting, frozen=True)
    found: torch.nn.Module = model
    return found


def ranks_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The rank of every module that has factors in `tensors`."""
    return {lora.module_of(name): len(tensor) for name, tensor in tensors.items() if ".lora_A." in name}
