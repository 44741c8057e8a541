"""Fed-SB: the sketch of the gradient against autograd's, the factors fixed from it, the square alone trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from factor_rounds import HEAD, MODULES, NOBODY, A, B, Counted, M, N, R, Rounds, report
from runs import assert_same, opened_run

from fedpipe_ray import lora, stacking
from fedpipe_ray.factors import factor
from fedpipe_ray.message import KEPT, Message
from fedpipe_ray.methods.fed_sb import CORE, FedSb, directions
from fedpipe_ray.train import gradients


def test_a_sketch_of_all_directions_is_the_gradients_svd(run_file: Path) -> None:
    """Rank 24 + 8 is all of 32: then b a is the truncated SVD of the gradient, here of autograd's on a plain copy."""
    fleet, method, *_ = opened_run(run_file, "method={name: fed_sb, rank: 24, batches: 2, alpha: 3}")
    site = fleet.sites["a"]
    found = method.sketch({}, site, np.random.default_rng(5))
    lora.detach(site.base)
    plain, again = site.base.writable(), np.random.default_rng(5)
    seeded = np.random.default_rng(int(again.integers(2**63)))
    full, _ = gradients(
        plain, site.data.train, site.run.local, batches=2, rng=seeded, device=site.base.device, pad_id=site.base.pad_id
    )
    assert len(found) == 2 * MODULES
    for name in (n for n in found if factor(n) == "A"):
        gradient = full[lora.module_of(name) + ".weight"].double()
        u, s, vt = torch.linalg.svd(gradient, full_matrices=False)
        best = u[:, :24] * s[:24] @ vt[:24]
        product = (found[name.replace("lora_A", "lora_B")] @ found[name]).double()
        assert float((product - best).norm()) <= 1e-4 * float(gradient.norm())


def test_the_fixed_factors_are_the_mean_gradients_directions() -> None:
    """Two edges, weights 1 and 3, gradients e_1 e_1^T and e_2 e_1^T: the mean is (1/4, 3/4)^T e_1^T, of one direction.
    The rest of rank 2 is orthonormal to it; R is untouched."""
    state = {A: torch.zeros(2, N), B: torch.zeros(M, 2), R: torch.zeros(2, 2), HEAD: torch.ones(3)}
    pairs = []
    for at, weight in ((0, 1.0), (1, 3.0)):
        b, a = torch.zeros(M, 2), torch.zeros(2, N)
        b[at, 0], a[0, 0] = 1.0, 1.0
        pairs.append(report(str(at), weight, {A: a, B: b}))
    found = FedSb(rank=2).aggregate(Message(state, {"fixed": 0.0}), pairs, NOBODY, 0, NOBODY)
    b, a = found.tensors[B], found.tensors[A]
    torch.testing.assert_close(b[:2, 0], torch.tensor([1.0, 3.0]) / 10**0.5)
    torch.testing.assert_close(a[0].abs(), torch.eye(N)[0])
    for rows in (b.T, a):
        torch.testing.assert_close(rows @ rows.T, torch.eye(2), rtol=0, atol=1e-6)
    assert found.numbers == {"fixed": 1.0, "cut": 0}
    assert not found.tensors[R].any()
    assert torch.equal(found.tensors[HEAD], state[HEAD])


@pytest.mark.parametrize(("wide", "cut"), [(1, False), (8, True)])
def test_sixty_gradients_are_held_as_one(wide: int, cut: bool) -> None:
    """At most 16 of rank 2 are alive. Where their sum has no more than 8 x 2 directions, nothing is lost and A and B
    span those of the whole sum; where it has more, `cut` bounds what the sum that is held is off by."""
    m, n, draw = wide * M, wide * N, torch.Generator().manual_seed(0)
    state = {A: torch.zeros(2, n), B: torch.zeros(m, 2), R: torch.zeros(2, 2)}
    own = [{name: torch.randn(t.shape, generator=draw) for name, t in state.items() if name != R} for _ in range(60)]
    reports = Counted(own, [1.0 + k % 3 for k in range(60)])
    found = FedSb(rank=2).aggregate(Message(state, {"fixed": 0.0}), reports, NOBODY, 0, NOBODY)
    assert len(reports.seen) == 60
    assert max(reports.seen) <= 16
    whole = sum(w * t[B].double() @ t[A].double() for w, t in zip(reports.weights, own, strict=True)) / 120
    u, s, vt = torch.linalg.svd(whole)
    best = u[:, :2] * s[:2] @ vt[:2]
    kept = (b := found.tensors[B].double()) @ (b.T @ whole @ found.tensors[A].double().T) @ found.tensors[A].double()
    off = float((kept - best).norm() / whole.norm())
    if cut:
        assert 0 < off < 2 * found.numbers["cut"]
    else:
        assert off < 1e-6
        assert found.numbers["cut"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("m", "n", "rank"), [(3, 5, 4), (6, 2, 3)])
def test_more_directions_than_a_side_has(m: int, n: int, rank: int) -> None:
    """Orthonormal as far as it goes, zeros after that."""
    u, v = directions(stacking.low_rank(torch.zeros(m, 1), torch.zeros(1, n), rank))
    assert (u.shape, v.shape) == ((m, rank), (rank, n))
    for rows, most in ((u.T, m), (v, n)):
        one = torch.ones(rank) * (torch.arange(rank) < most)
        torch.testing.assert_close(rows @ rows.T, one.diag(), rtol=0, atol=1e-6)


def test_fed_sb_trains_the_square_alone(run_file: Path) -> None:
    """A and B keep their bits; the export's product is B R A; the base that was measured in between does no harm."""
    rounds = Rounds(run_file, "method={name: fed_sb, rank: 3}")
    rounds.next()
    fixed = {name: t for name, t in rounds.state.tensors.items() if factor(name) and not name.endswith(CORE)}
    first, updates = rounds.next()
    rounds.fleet.evaluate(None, "test")  # with the adapter attached: PEFT freezes and unfreezes it
    orders, _ = rounds.next()
    assert_same({name: rounds.state.tensors[name] for name in fixed}, fixed)
    assert set(updates["a"].tensors) == {name for name in rounds.state.tensors if name.endswith(CORE)}
    exported = rounds.method.weights(rounds.state, rounds.server)["global"].tensors
    for name in (n for n in fixed if factor(n) == "B"):
        square = rounds.state.tensors[name.replace(".lora_B.weight", CORE)]
        assert square.any()
        assert torch.equal(exported[name], fixed[name] @ square)
    assert orders["a"].held == {KEPT + name for name in fixed}
    assert not first["a"].held
