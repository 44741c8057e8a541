"""Noise that is the same everywhere, and sums over it that are the same whatever came before."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_export import model_folder
from torch import nn
from toys import CPU, llama

from fedpipe_ray import seed_sums
from fedpipe_ray.errors import UserError
from fedpipe_ray.model import Base
from fedpipe_ray.noise import GRID, Flat, Noise, look_up, quantiles, words_of
from fedpipe_ray.seed_sums import TOTAL, UNIT, fixed, forget, plan, rebuild
from fedpipe_ray.settings import Model

K = 6


def base_of(model_dir: Path, **settings: Any) -> Base:
    return Base.load(Model(name=str(model_dir), device="cpu", **settings), "causal", [], 0)


@pytest.fixture(scope="module")
def base(model_dir: Path) -> Base:
    return base_of(model_dir)


def rebuilt(base: Base, coefficients: Any, keep: bool = True, seed: int = 7) -> dict[str, torch.Tensor]:
    """Copies of the weights with these coefficients, in multiples of UNIT."""
    model = base.writable()
    rebuild(base, model, seed, np.array(coefficients, dtype=np.int64), keep)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


# -- noise


def test_numpy_and_integer_arithmetic_make_the_same_bits() -> None:
    """The path of CUDA, here on the CPU, against numpy's own Philox; keys and counters beyond 32 bits too."""
    for seed, candidate, first in ((0, 0, 0), (7, 4095, 12345), (2**32 - 1, 2**31 - 1, 2**40)):
        bits = np.random.Philox(key=[seed, candidate], counter=[first, 0, 0, 0])
        expected = bits.random_raw(4 * 50).view(np.int64).reshape(50, 4)
        words = words_of(seed, candidate, first, 50, CPU)
        assert np.array_equal(words.numpy(), expected)
        found = look_up(words, torch.from_numpy(quantiles()))
        assert torch.equal(Noise(seed, CPU).of(candidate, 16 * first, 800), found)


def test_the_noise_is_pinned() -> None:
    """A run goes on only where z is what it was: numpy's bit streams are frozen, the look-up table is hashed here."""
    assert hashlib.sha256(quantiles().astype("<f4").tobytes()).hexdigest()[:16] == "f32b3e374f6a48d0"
    assert (Noise(7, CPU).of(3, 0, 6) * GRID).tolist() == [3070, 248, 3164, -184, 548, -2220]


@pytest.mark.parametrize(("start", "count"), [(0, 1000), (16, 16), (5, 1), (17, 300), (993, 7)])
def test_a_part_is_a_part_of_the_whole(start: int, count: int) -> None:
    noise = Noise(3, CPU)
    assert torch.equal(noise.of(9, start, count), noise.of(9, 0, 1000)[start : start + count])


def test_it_is_standard_normal() -> None:
    """The table itself to six digits; a million draws within four standard errors; two candidates uncorrelated."""
    table = quantiles().astype(np.float64)
    assert abs(table.mean()) < 1e-9
    assert table.std() == pytest.approx(1, abs=1e-6)
    assert (table**4).mean() == pytest.approx(3, abs=0.001)
    assert np.array_equal(table * GRID, np.rint(table * GRID))
    assert (np.diff(table) >= 0).all()
    assert 4.3 < table.max() == -table.min() < 4.33
    count = 10**6
    one, two = (Noise(11, CPU).of(j, 0, count).double() for j in (0, 1))
    for z in (one, two):
        assert abs(float(z.mean())) < 4 / math.sqrt(count)
        assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / count)
        for bound, share in ((0.5, 0.382925), (1.0, 0.682689), (2.0, 0.954500)):
            inside = float((z.abs() < bound).double().mean())
            assert abs(inside - share) < 4 * math.sqrt(share * (1 - share) / count) + 2e-4  # the grid: 1/4096 wide
    assert abs(float((one * two).mean())) < 4 / math.sqrt(count)
    assert abs(float((one[:-1] * one[1:]).mean())) < 4 / math.sqrt(count)
    assert not torch.equal(one[:100], Noise(12, CPU).of(0, 0, 100).double())


def test_the_order_of_registration_does_not_matter() -> None:
    """z belongs to a name: two models that register the same parameters in another order move alike."""
    first, second = nn.Module(), nn.Module()
    shapes = {"b": (3, 5), "a": (7,), "c.d": (2, 2)}
    for model, names in ((first, list(shapes)), (second, list(reversed(shapes)))):
        for name in names:
            part, _, last = name.rpartition(".")
            if part:
                model.add_module(part, nn.Module())
            model.get_submodule(part).register_parameter(last, nn.Parameter(torch.zeros(shapes[name])))
    assert [n for n, _ in first.named_parameters()] != [n for n, _ in second.named_parameters()]
    assert Flat(first).starts == Flat(second).starts == {"a": 0, "b": 7, "c.d": 22}
    assert Flat(first).size == 26


def test_tied_weights_stand_once() -> None:
    assert Flat(llama(tie_word_embeddings=False)).size - Flat(llama(tie_word_embeddings=True)).size == 27 * 32


# -- sums


def test_a_rebuild_by_hand(base: Base) -> None:
    """w0 - 2^-30 (3 z_0 - 500 z_4), each weight with the noise of its own place."""
    found, flat, noise = rebuilt(base, [3, 0, 0, 0, -500_000, 0]), Flat(base.model), Noise(7, CPU)
    for name, p in base.model.named_parameters():
        z0, z4 = (noise.of(j, flat.starts[name], p.numel()).double().view(p.shape) for j in (0, 4))
        assert torch.equal(found[name], (p.double() - 2**-30 * (3 * z0 - 500_000 * z4)).float())
        assert not torch.equal(found[name], p)


def test_coefficients_have_limits() -> None:
    assert fixed(np.array([1.0, -0.5, 2**-31, 3 * 2**-31])).tolist() == [2**30, -(2**29), 0, 2]
    with pytest.raises(OverflowError, match=r"a coefficient of 2 \(limit 2\), all together 2 \(limit 128\)"):
        fixed(np.array([2.0]))
    with pytest.raises(OverflowError, match=r"all together 128 \(limit 128\)"):
        fixed(np.full(129, 0.995))
    with pytest.raises(OverflowError):
        fixed(np.array([math.nan]))
    assert 2 * TOTAL * quantiles().max() * GRID < 2**53  # a sum and its increments are exact
    assert TOTAL * UNIT == 128


history = st.lists(
    st.lists(st.sampled_from([0, 0, 1, -7, 2**20 + 1, -(2**29)]), min_size=K, max_size=K), min_size=1, max_size=4
)


@given(history)
def test_whatever_came_before_the_bits_are_the_same(base: Base, rounds: list[list[int]]) -> None:
    """Increments, a late edge that jumps from the first to the last, a new one, one that keeps nothing."""
    for coefficients in rounds:
        step_by_step = rebuilt(base, coefficients)
    forget(base)
    rebuilt(base, rounds[0])
    late = rebuilt(base, rounds[-1])
    assert same(step_by_step, late)
    assert same(step_by_step, rebuilt(base, rounds[-1], keep=False))


def test_the_cheaper_way_is_taken() -> None:
    """Few changes: go on. More changes than coefficients that are not 0, another K, nothing known: the whole sum."""
    before, now = np.array([5, 5, 5, 5]), np.array([5, 5, 5, 6])
    assert plan(before, now)[0]
    assert plan(before, now)[1].tolist() == [3]
    assert plan(before, np.array([0, 0, 0, 1]))[0] is False
    assert plan(before, np.array([0, 0, 0, 1]))[1].tolist() == [3]
    assert plan(before, before)[1].tolist() == []
    assert plan(before, np.array([1, 2, 0]))[1].tolist() == [0, 1]
    assert plan(None, now)[1].tolist() == [0, 1, 2, 3]
    for one, two in pairwise([before, now, np.array([0, 0, 0, 1])]):
        assert len(plan(one, two)[1]) <= np.count_nonzero(two)


def test_a_rebuild_that_was_cut_short_is_not_trusted(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(model_dir)
    rebuilt(base, [1, 2, 3, 4, 5, 6])
    expected = rebuilt(base, [9, 2, 3, 4, 5, 7], keep=False)
    monkeypatch.setattr(seed_sums, "chunk_of", lambda device: 4096)
    calls = []

    def fail(self: Noise, candidate: int, start: int, count: int, out: torch.Tensor) -> torch.Tensor:
        calls.append(start)
        if start:
            raise MemoryError
        return torch.ones(count)

    with monkeypatch.context() as patch:
        patch.setattr(Noise, "of", fail)
        with pytest.raises(MemoryError):
            rebuilt(base, [9, 2, 3, 4, 5, 7])
    assert calls[-1] == 4096
    assert same(rebuilt(base, [9, 2, 3, 4, 5, 7]), expected)


def test_a_full_disk_costs_time_and_nothing_else(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_of(model_dir)
    expected = rebuilt(base, [1, 2, 3, 4, 5, 6], keep=False)
    rebuilt(base, [1, 0, 0, 0, 0, 9])
    with Path("/dev/full").open("r+b", buffering=0) as full:
        seed_sums._KEPT[base].file, own = full, seed_sums._KEPT[base].file
        seed_sums._KEPT[base].coefficients = None
        assert same(rebuilt(base, [1, 2, 3, 4, 5, 6]), expected)
        assert "no room in" in caplog.text
        assert "set method.incremental: false" in caplog.text
        assert same(rebuilt(base, [1, 2, 3, 4, 5, 6]), expected)
    seed_sums._KEPT[base].file = own


@pytest.mark.parametrize("chunk", [64, 1000, 2**18])
def test_chunks_do_not_show(chunk: int, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(model_dir)
    expected = rebuilt(base, [1, 20, -300, 0, 5, 10**8], keep=False)
    monkeypatch.setattr(seed_sums, "chunk_of", lambda device: chunk)
    assert same(rebuilt(base, [0, 0, 0, 0, 0, 10**8]), rebuilt(base, [0, 0, 0, 0, 0, 10**8], keep=False))
    assert same(rebuilt(base, [1, 20, -300, 0, 5, 10**8]), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype: str, model_dir: Path) -> None:
    """The dtype of w0 changes w0, not the noise: the change is that of float32, to float32's own rounding."""
    half, whole = base_of(model_dir, dtype=dtype), base_of(model_dir)
    coefficients = [10**6, 0, 0, -(10**7), 0, 1]
    moved, reference = rebuilt(half, coefficients), rebuilt(whole, coefficients)
    for name, p in half.model.named_parameters():
        change, expected = moved[name] - p.float(), reference[name] - dict(whole.model.named_parameters())[name]
        torch.testing.assert_close(change, expected, rtol=0, atol=2e-7)
        assert moved[name].dtype == torch.float32


def test_packed_weights_are_refused(tmp_path: Path, model_dir: Path) -> None:
    folder = model_folder("llama", tmp_path, model_dir)
    packed = Base.load(Model(name=str(folder), device="cpu"), "causal", [], 0, bits=4)
    with pytest.raises(UserError, match=r"weight is stored in uint8; fedkseed changes every weight"):
        Flat(packed.model)
