"""How much each adapted weight contributes to training: scores of LoRA factors, smoothed, tied, averaged over edges.

A key is one linear weight with Delta W = s B A; A [rank, d_in], B [d_out, rank]. The triplet score, sensitivity and
smoothing are AdaLoRA's (Zhang et al. 2023, arXiv 2303.10512); reading them off the SVD of plain LoRA factors is ours,
as are the ties. FedPipe (arXiv 2404.06448) joins SVD and sensitivity; its formula was not seen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch

Tie = Literal["none", "kind"]


class Spectrum(NamedTuple):
    """Delta W = sum_j sigma_j u_j v_j^T, largest first, and the loss's gradient with respect to each part; float64."""

    sigma: torch.Tensor  # [k], k = min(rank, d_in, d_out)
    grad_sigma: torch.Tensor  # [k], zero where sigma is
    u: torch.Tensor  # [d_out, k]
    v: torch.Tensor  # [d_in, k]
    grad_u: torch.Tensor  # [d_out, k]
    grad_v: torch.Tensor  # [d_in, k]


class Factors(NamedTuple):
    """What a key is scored by: its factors, the loss's gradients of them, and s = alpha / rank."""

    a: torch.Tensor  # [rank, d_in]
    b: torch.Tensor  # [d_out, rank]
    grad_a: torch.Tensor  # [rank, d_in]
    grad_b: torch.Tensor  # [d_out, rank]
    scale: float


def spectrum(a: torch.Tensor, b: torch.Tensor, grad_a: torch.Tensor, grad_b: torch.Tensor, scale: float) -> Spectrum:
    """The SVD of scale B A and its gradients in O((d_in + d_out) rank^2 + rank^3), without forming Delta W or dL/dW.

    dL/dsigma_j = u~_j^T (R_B^-T dL/dA Q_A) v~_j / s with B = Q_B R_B. As R_B^-1 u~_j = s A v_j / sigma_j, that is
    (A v_j)^T dL/dA v_j / sigma_j: no inverse, so a factor may lack rank or be zero (ours). U and V are taken as
    parameters of their own, as in AdaLoRA: dL/du_j = sigma_j dL/dW v_j = dL/dB B^T u_j, dL/dv_j = dL/dA^T A v_j.
    A sigma that is rounding noise beside s sum_i |b_i| |a_i| gets gradient zero. Raises torch.linalg.LinAlgError if
    a factor is not finite.
    """
    a, b, grad_a, grad_b = (t.detach().double() for t in (a, b, grad_a, grad_b))
    q_b, r_b = torch.linalg.qr(b)  # [d_out, min(d_out, rank)], [min(d_out, rank), rank]
    q_a, r_a = torch.linalg.qr(a.T)  # [d_in, min(d_in, rank)], [min(d_in, rank), rank]
    u_core, sigma, v_core = torch.linalg.svd(scale * r_b @ r_a.T, full_matrices=False)
    u, v = q_b @ u_core, q_a @ v_core.T  # [d_out, k], [d_in, k]
    grad_u, grad_v = grad_b @ (b.T @ u), grad_a.T @ (a @ v)  # [d_out, k], [d_in, k]
    bound = abs(scale) * (b.norm(dim=0) * a.norm(dim=1)).sum()
    real = sigma > max(len(u), len(v)) * torch.finfo(torch.float64).eps * bound
    grad_sigma = torch.where(real, (v * grad_v).sum(0) / sigma.where(real, 1.0), 0.0)  # [k]
    return Spectrum(sigma, grad_sigma, u, v, grad_u, grad_v)


def _svd(f: Factors, rng: np.random.Generator) -> float:
    """AdaLoRA's triplet importance, summed: |sigma g| + mean over u_j's entries of |u g| + the same of v_j."""
    s = spectrum(*f)
    vectors = (s.u * s.grad_u).abs().mean(0) + (s.v * s.grad_v).abs().mean(0)  # [k]
    return float(((s.sigma * s.grad_sigma).abs() + vectors).sum())


def _sensitivity(f: Factors, rng: np.random.Generator) -> float:
    """Sum of |theta dL/dtheta| over the entries of A and B."""
    return float((f.a.double() * f.grad_a).abs().sum() + (f.b.double() * f.grad_b).abs().sum())


def _sigma(f: Factors, rng: np.random.Generator) -> float:
    """Nuclear norm of Delta W."""
    return float(spectrum(*f).sigma.sum())


def _gradient(f: Factors, rng: np.random.Generator) -> float:
    """||dL/dB||_F; meant at B = 0, where it is the only part of the gradient that is not zero."""
    return float(f.grad_b.double().norm())


def _random(f: Factors, rng: np.random.Generator) -> float:
    """Uniform in [0, 1): the ablation."""
    return float(rng.random())


SCORES: Mapping[str, Callable[[Factors, np.random.Generator], float]] = {
    "svd": _svd,
    "sensitivity": _sensitivity,
    "sigma": _sigma,
    "gradient": _gradient,
    "random": _random,
}


def score(
    kind: str,
    a: torch.Tensor,
    b: torch.Tensor,
    grad_a: torch.Tensor,
    grad_b: torch.Tensor,
    scale: float,
    rng: np.random.Generator,
) -> float:
    """One key's importance >= 0 by `kind`, a name in SCORES; `svd`, `sensitivity` and `sigma` are zero at B = 0.

    a, grad_a [rank, d_in]; b, grad_b [d_out, rank]; scale: alpha / rank. Only `random` draws from rng, once a key, so
    keys must come in a fixed order. Raises ValueError for an unknown kind and for NaN or infinity.
    """
    if kind not in SCORES:
        raise ValueError(f"importance {kind!r} is none of {', '.join(SCORES)}")
    f = Factors(a.detach(), b.detach(), grad_a.detach(), grad_b.detach(), scale)
    if broken := [name for name, tensor in zip(f._fields, f[:4]) if not tensor.isfinite().all()]:
        raise ValueError(f"importance: NaN or infinity in {', '.join(broken)}; lower the learning rate")
    return SCORES[kind](f, rng)


@dataclass(frozen=True)
class Smoothed:
    """AdaLoRA's importance over time by key: s = I' U', `mean` I' and `spread` U', beta in (0, 1); immutable.

    I' <- beta I' + (1 - beta) I, then U' <- beta U' + (1 - beta) |I - I'|. A key starts from I' = U' = 0, as in PEFT's
    AdaLoRA, so its first score is (1 - beta)^2 beta I^2: ordered as I, and not zero (a start at I' = I would give
    U' = 0, for ever if I stays). Keys first seen at different times are therefore not comparable at first.
    """

    mean: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)
    beta: float = 0.85

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(f"beta: {self.beta} must lie in (0, 1); at 0 the spread, and so every score, is 0")

    def after(self, scores: Mapping[str, float]) -> Smoothed:
        """With one more observation; a key that is not in `scores` stays as it is."""
        mean, spread = dict(self.mean), dict(self.spread)
        for key, value in scores.items():
            mean[key] = self.beta * mean.get(key, 0.0) + (1 - self.beta) * value
            spread[key] = self.beta * spread.get(key, 0.0) + (1 - self.beta) * abs(value - mean[key])
        return Smoothed(mean, spread, self.beta)

    def scores(self) -> dict[str, float]:
        """I' U' of every key seen."""
        return {key: mean * self.spread[key] for key, mean in self.mean.items()}


def tied(scores: Mapping[str, float], by: Tie, kinds: Mapping[str, str], layers: Mapping[str, int]) -> dict[str, float]:
    """Scores that can be compared over layers (ours; raw ones put 47 to 89 % on layer 0, and layers gain equally).

    `none`: divided by the sum over the key's layer, zeros staying zeros; `kind`: the mean over the key's kind, for
    instance over all q_proj. kinds and layers name both of every key. Raises ValueError for another `by`.
    """
    if by not in ("none", "kind"):
        raise ValueError(f"tie {by!r} is neither none nor kind")
    group: Mapping[str, Hashable] = kinds if by == "kind" else layers
    members: defaultdict[Hashable, list[float]] = defaultdict(list)
    for key, value in scores.items():
        members[group[key]].append(value)
    total = {name: math.fsum(values) for name, values in members.items()}
    if by == "kind":
        return {key: total[kinds[key]] / len(members[kinds[key]]) for key in scores}
    return {key: value / (total[layers[key]] or 1.0) for key, value in scores.items()}


def mean_of_edges(scores: Mapping[str, Mapping[str, float]], samples: Mapping[str, float]) -> dict[str, float]:
    """Scope global: each key's mean over the edges that scored it, weighted by their samples; keys in sorted order.

    The sums are exactly rounded, so the edges' order does not matter. Raises ValueError where all weights are 0.
    """
    mean = {}
    for key in sorted({key for own in scores.values() for key in own}):
        edges = [edge for edge, own in scores.items() if key in own]
        total = math.fsum(samples[edge] for edge in edges)
        if not total > 0:
            raise ValueError(f"score of {key}: the edges that have it, {', '.join(edges)}, hold {total} samples")
        mean[key] = math.fsum(samples[edge] * scores[edge][key] for edge in edges) / total
    return mean
