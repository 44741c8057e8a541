"""Scores of LoRA factors: exact identities, gradients against autograd, and numbers derived by hand."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedpipe_ray.importance import SCORES, Smoothed, mean_of_edges, score, spectrum, tied

EXACT = 1e-9
small = st.integers(1, 9)
seeds = st.integers(0, 10_000)


class Key(NamedTuple):
    a: Tensor  # [rank, d_in]
    b: Tensor  # [d_out, rank]
    grad_a: Tensor
    grad_b: Tensor
    scale: float


def key_of(a: Tensor, b: Tensor, scale: float, seed: int) -> tuple[Key, Tensor]:
    """A key with autograd's gradients of a random smooth loss, and the dense dL/dDelta W [d_out, d_in]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, a.shape[1], generator=generator, dtype=torch.float64)
    y = torch.randn(7, len(b), generator=generator, dtype=torch.float64)
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    delta = scale * b @ a
    delta.retain_grad()
    ((x @ delta.T).sin() * y).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert delta.grad is not None
    return Key(a.detach(), b.detach(), a.grad, b.grad, scale), delta.grad


def random_key(rank: int, d_in: int, d_out: int, seed: int, scale: float = 2.0) -> tuple[Key, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    return key_of(a, torch.randn(d_out, rank, generator=generator, dtype=torch.float64), scale, seed + 1)


def value(kind: str, key: Key, seed: int = 0) -> float:
    return score(kind, *key, np.random.default_rng(seed))


# -- the spectrum


@given(small, small, small, seeds, st.sampled_from([0.25, 1.0, 2.0]))
def test_sum_of_sigma_times_its_gradient_is_each_factor_times_its_own(
    rank: int, d_in: int, d_out: int, seed: int, scale: float
) -> None:
    key, _ = random_key(rank, d_in, d_out, seed, scale)
    s = spectrum(*key)
    whole = float((s.sigma * s.grad_sigma).sum())
    size = 1 + float((key.a * key.grad_a).abs().sum())
    assert whole == pytest.approx(float((key.a * key.grad_a).sum()), abs=EXACT * size)
    assert whole == pytest.approx(float((key.b * key.grad_b).sum()), abs=EXACT * size)


@given(small, small, small, seeds)
def test_spectrum_equals_the_dense_one(rank: int, d_in: int, d_out: int, seed: int) -> None:
    """U Sigma V^T = s B A; dL/dsigma_j = u_j^T G v_j, dL/du_j = sigma_j G v_j, dL/dv_j = sigma_j G^T u_j."""
    key, dense = random_key(rank, d_in, d_out, seed)
    s = spectrum(*key)
    assert len(s.sigma) == min(rank, d_in, d_out)
    torch.testing.assert_close(s.u @ s.sigma.diag() @ s.v.T, 2.0 * key.b @ key.a, rtol=0, atol=1e-11)
    torch.testing.assert_close(s.grad_sigma, (s.u.T @ dense @ s.v).diagonal(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(s.grad_u, dense @ s.v * s.sigma, rtol=0, atol=1e-9)
    torch.testing.assert_close(s.grad_v, dense.T @ s.u * s.sigma, rtol=0, atol=1e-9)


@pytest.mark.parametrize("lacking", ["b", "a", "both"])
def test_factors_that_lack_rank_give_the_dense_gradients_and_zeros(lacking: str) -> None:
    """Rows and columns repeat, so that R_B or R_A has no inverse: 2 of 4 singular values are left."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    b = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    if lacking != "a":
        b[:, 2:] = b[:, :2]
    if lacking != "b":
        a[2:] = a[:2]
    key, dense = key_of(a, b, 0.5, 4)
    s = spectrum(*key)
    assert torch.isfinite(torch.cat([t.flatten() for t in s])).all()
    torch.testing.assert_close(s.grad_sigma[:2], (s.u.T @ dense @ s.v).diagonal()[:2])
    assert s.grad_sigma[2:].tolist() == [0.0, 0.0]
    assert float((s.sigma * s.grad_sigma).sum()) == pytest.approx(float((a * key.grad_a).sum()), abs=EXACT)


def test_by_hand() -> None:
    """B = 3 e_1, A = 2 e_2^T, s = 1/2, G = [[0, 5], [7, 0]]: sigma = 3, u = e_1, v = e_2 (up to one sign),
    dL/dA = s B^T G = [0, 7.5], dL/dB = s G A^T = [5, 0]. dL/dsigma = 5, dL/du = 3 G e_2 = [15, 0], dL/dv = [0, 15].
    svd = |3 x 5| + 15 / 2 + 15 / 2; sensitivity = 2 x 7.5 + 3 x 5; gradient = 5."""
    a, b = torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0], [0.0]])
    key = Key(a, b, torch.tensor([[0.0, 7.5]]), torch.tensor([[5.0], [0.0]]), 0.5)
    s = spectrum(*key)
    assert s.sigma.item() == pytest.approx(3.0)
    assert s.grad_sigma.item() == pytest.approx(5.0)
    assert s.grad_u.abs().flatten().tolist() == pytest.approx([15.0, 0.0])
    assert s.grad_v.abs().flatten().tolist() == pytest.approx([0.0, 15.0])
    assert [value(kind, key) for kind in ("svd", "sensitivity", "sigma", "gradient")] == pytest.approx([30, 30, 3, 5])


def test_nothing_is_known_at_b_zero_but_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    key, _ = key_of(torch.randn(3, 5, generator=generator).double(), torch.zeros(4, 3).double(), 2.0, 1)
    s = spectrum(*key)
    assert s.sigma.tolist() == s.grad_sigma.tolist() == [0.0] * 3
    assert [value(kind, key) for kind in ("svd", "sensitivity", "sigma")] == [0.0] * 3
    assert value("gradient", key) == pytest.approx(float(key.grad_b.norm()))
    assert value("gradient", key) > 0


@given(st.integers(1, 5), seeds)
def test_scores_of_the_spectrum_see_the_product_alone(rank: int, seed: int) -> None:
    """(B M, M^-1 A) with gradients (dL/dB M^-T, M^T dL/dA) is the same function; plain sensitivity differs."""
    key, _ = random_key(rank, 7, 6, seed)
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(rank, rank, generator=generator, dtype=torch.float64) + 4 * torch.eye(rank, dtype=torch.float64)
    inverse = m.inverse()
    other = Key(inverse @ key.a, key.b @ m, m.T @ key.grad_a, key.grad_b @ inverse.T, key.scale)
    torch.testing.assert_close(spectrum(*other).sigma, spectrum(*key).sigma)
    for kind in ("svd", "sigma"):
        assert value(kind, other) == pytest.approx(value(kind, key), rel=1e-6)


# -- one key's score


def test_sensitivity_changes_with_the_split_of_the_product() -> None:
    key, _ = random_key(2, 5, 4, 0)
    m = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    other = Key(m.inverse() @ key.a, key.b @ m, m.T @ key.grad_a, key.grad_b @ m.inverse().T, key.scale)
    assert value("sensitivity", other) != pytest.approx(value("sensitivity", key), rel=1e-3)


def test_low_precision_factors_are_scored_in_float64() -> None:
    key, _ = random_key(2, 5, 4, 0)
    a, b, grad_a, grad_b = (t.bfloat16() for t in key[:4])
    half = Key(a, b, grad_a, grad_b, key.scale)
    wide = Key(a.double(), b.double(), grad_a.double(), grad_b.double(), key.scale)
    assert [value(kind, half) for kind in SCORES] == [value(kind, wide) for kind in SCORES]


def test_random_draws_from_the_generator_given() -> None:
    key, _ = random_key(2, 5, 4, 0)
    assert value("random", key, 1) == np.random.default_rng(1).random()
    rng = np.random.default_rng(1)
    assert score("random", *key, rng) != score("random", *key, rng)


def test_unknown_kinds_and_diverged_factors_are_refused() -> None:
    key, _ = random_key(2, 5, 4, 0)
    with pytest.raises(ValueError, match="'hessian' is none of svd, sensitivity, sigma, gradient, random"):
        value("hessian", key)
    with pytest.raises(ValueError, match="NaN or infinity in b, grad_a;"):
        value("svd", key._replace(b=key.b * torch.nan, grad_a=key.grad_a / 0))


@pytest.mark.parametrize("kind", ["svd", "sensitivity", "sigma", "gradient"])
def test_a_planted_important_key_is_ranked_first(kind: str) -> None:
    """Four linear keys; the target differs from the base much more at v. Gradient at B = 0, the rest after 5 steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    far = {name: (1.0 if name == "v" else 0.2) * torch.randn(6, 8, generator=generator) for name in "qkvo"}
    a = {name: (torch.randn(2, 8, generator=generator) / 8**0.5).requires_grad_() for name in far}
    b = {name: torch.zeros(6, 2, requires_grad=True) for name in far}
    factors = [*a.values(), *b.values()]
    step = torch.optim.SGD(factors, lr=0.5)
    for _ in range(1 if kind == "gradient" else 6):
        step.step()  # the first one has no gradients, and does nothing
        step.zero_grad()
        sum(((x @ (b[name] @ a[name] - far[name]).T) ** 2).mean() for name in far).backward()
    found = {name: value(kind, Key(a[name], b[name], a[name].grad, b[name].grad, 1.0)) for name in far}
    assert max(found, key=lambda name: found[name]) == "v"
    assert min(found.values()) > 0


# -- over time, layers and edges


def test_smoothing_by_hand() -> None:
    """beta = 0.85. I = 4: I' = 0.6, U' = 0.15 x 3.4 = 0.51. Then I = 10: I' = 0.51 + 1.5 = 2.01,
    U' = 0.4335 + 0.15 x 7.99 = 1.632. Then I = 0: I' = 1.7085, U' = 1.3872 + 0.256275 = 1.643475."""
    first = Smoothed().after({"q": 4.0})
    second = first.after({"q": 10.0})
    third = second.after({"q": 0.0})
    assert [(s.mean["q"], s.spread["q"]) for s in (first, second, third)] == [
        pytest.approx((0.6, 0.51)),
        pytest.approx((2.01, 1.632)),
        pytest.approx((1.7085, 1.643475)),
    ]
    assert first.scores()["q"] == pytest.approx(0.15**2 * 0.85 * 4.0**2)
    assert third.scores()["q"] == pytest.approx(1.7085 * 1.643475)


def test_smoothing_keeps_its_past_and_the_keys_not_observed() -> None:
    first = Smoothed(beta=0.5).after({"q": 4.0, "v": 1.0})
    second = first.after({"v": 2.0})
    assert first.mean == {"q": 2.0, "v": 0.5}
    assert second.mean == {"q": 2.0, "v": 1.25}
    assert second.spread == {"q": 1.0, "v": 0.5 * 0.25 + 0.5 * 0.75}
    with pytest.raises(FrozenInstanceError):
        first.beta = 0.9


def test_the_first_observation_ranks_as_the_scores_and_stable_scores_stay_above_zero() -> None:
    scores = {"q": 0.1, "k": 0.5, "v": 3.0}
    smoothed = Smoothed().after(scores)
    for _ in range(50):
        assert sorted(smoothed.scores(), key=lambda key: smoothed.scores()[key]) == ["q", "k", "v"]
        smoothed = smoothed.after(scores)
    assert min(smoothed.scores().values()) > 0


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1])
def test_a_beta_that_stands_still_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\)"):
        Smoothed(beta=beta)


KINDS = {"0.q": "q", "0.v": "v", "1.q": "q", "1.v": "v"}
LAYERS = {"0.q": 0, "0.v": 0, "1.q": 1, "1.v": 1}


def test_ties_by_hand() -> None:
    scores = {"0.q": 6.0, "0.v": 18.0, "1.q": 2.0, "1.v": 2.0}
    assert tied(scores, "kind", KINDS, LAYERS) == {"0.q": 4.0, "0.v": 10.0, "1.q": 4.0, "1.v": 10.0}
    assert tied(scores, "none", KINDS, LAYERS) == {"0.q": 0.25, "0.v": 0.75, "1.q": 0.5, "1.v": 0.5}
    assert tied(dict.fromkeys(scores, 0.0), "none", KINDS, LAYERS) == dict.fromkeys(scores, 0.0)
    with pytest.raises(ValueError, match="'layer' is neither none nor kind"):
        tied(scores, "layer", KINDS, LAYERS)


def test_the_mean_of_edges_is_over_those_that_scored_the_key() -> None:
    scores = {"e1": {"q": 1.0, "v": 2.0}, "e2": {"q": 5.0}, "e3": {"v": 9.0}}
    samples = {"e1": 30.0, "e2": 10.0, "e3": 0.0}
    assert mean_of_edges(scores, samples) == {"q": 2.0, "v": 2.0}
    assert list(mean_of_edges(dict(reversed(scores.items())), samples).items()) == [("q", 2.0), ("v", 2.0)]
    with pytest.raises(ValueError, match=r"score of v: .* e3, hold 0\.0 samples"):
        mean_of_edges({"e3": scores["e3"]}, samples)
