"""Codecs of one tensor: their bounds, their bytes by hand, and bitsandbytes as the oracle of what it has too."""

from __future__ import annotations

import itertools
import math
from typing import Any

import bitsandbytes.functional as oracle
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_ray.codecs import CODECS, HALFWAY, NF4, make_codec
from fedpipe_ray.errors import UnfitUpdate, UserError
from fedpipe_ray.randomness import rng_for

SETTINGS: list[dict[str, Any]] = [
    {"name": "bf16"}, {"name": "int8", "block": 32}, {"name": "nf4"}, {"name": "nf4", "double": True, "block": 16},
    {"name": "topk", "share": 0.1}, {"name": "randomk", "share": 0.1}, {"name": "lowrank", "rank": 2},
]  # fmt: skip
shapes = st.sampled_from([(), (0,), (1,), (5,), (8, 33), (33, 8), (1, 64), (3, 4, 5), (0, 7), (40, 50)])
scales = st.sampled_from([0.0, 1e-42, 1e-20, 1e-3, 1.0, 1e20])


def drawn(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def through(
    settings: dict[str, Any], x: torch.Tensor, seed: int = 0, feedback: bool = False, warm: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """(x decoded, its parts as they travel), whose dtypes and lengths are those that the codec says."""
    codec = make_codec(settings)
    sizes = codec.sizes(x.shape, dtype)
    found = codec.encode(x, rng_for(seed, 0, "x"), warm, feedback)
    parts = {part: found[part].to(kind) for part, (kind, _) in sizes.items()}
    assert found.keys() == sizes.keys()
    assert {part: (t.dtype, len(t)) for part, t in parts.items()} == sizes
    return codec.decode(parts, x.shape, rng_for(seed, 0, "x")), parts


def bytes_of(parts: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in parts.values())


@pytest.mark.parametrize("one", SETTINGS, ids=str)
@given(shapes, st.integers(0, 99), scales)
@settings(max_examples=30)
def test_every_codec_stays_within_its_bound(
    one: dict[str, Any], shape: tuple[int, ...], seed: int, scale: float
) -> None:
    """bf16: half of its last bit. int8: half a step. nf4: half its widest gap; doubled, also what its scales lose.

    topk: no entry left out is above one that is kept. lowrank: no further off than nothing at all.
    """
    x = drawn(shape, seed, scale)
    back, _ = through(one, x, seed, feedback=True)
    assert (back.shape, back.dtype) == (x.shape, torch.float32)
    if x.numel() == 0:
        return
    error, top, tiny = (x - back).abs().double(), float(x.abs().max()), 1e-38
    match one["name"]:
        case "bf16":
            assert (error <= 2**-8 * x.abs() + 1e-40).all()
        case "int8":
            assert float(error.max()) <= top / 254 * 1.001 + tiny
        case "nf4":
            wide = float((HALFWAY[0] - NF4[0]).abs())
            lost = top / 127 * 1.01 if one.get("double") else 0.0  # the scales lie between 0 and top
            assert float(error.max()) <= (wide * (top + lost) + lost) * 1.001 + tiny
        case "topk" | "randomk":
            sent = back.flatten() != 0
            assert torch.equal(back.flatten()[sent], x.flatten()[sent])
            if one["name"] == "topk" and bool(sent.any()) and not bool(sent.all()):
                assert float(x.flatten()[sent].abs().min()) >= float(x.flatten()[~sent].abs().max())
        case "lowrank":
            assert float(error.norm()) <= float(x.double().norm()) * 1.0001 + tiny


def test_bytes_by_hand() -> None:
    """[40, 50]: 2000 entries, 32 blocks of 64, 8 of 256. 1 % is 20 entries; rank 2 is 2 x 90 numbers; bf16 halves."""
    x = drawn((40, 50), 0)
    cases: list[tuple[dict[str, Any], int]] = [
        ({"name": "bf16"}, 4000),
        ({"name": "int8"}, 2000 + 4 * 8),
        ({"name": "nf4"}, 1000 + 4 * 32),
        ({"name": "nf4", "double": True}, 1000 + 32 + 4 + 4),
        ({"name": "topk"}, 20 * (4 + 2)),
        ({"name": "randomk"}, 20 * 4),
        ({"name": "lowrank"}, 4 * 2 * 90),
        ({"name": "lowrank", "rank": 30}, 8000),  # 30 x 90 numbers are more than 2000
    ]
    for one, expected in cases:
        assert bytes_of(through(one, x)[1]) == expected, one
    assert bytes_of(through({"name": "topk"}, x, dtype=torch.bfloat16)[1]) == 20 * (2 + 2)
    assert bytes_of(through({"name": "topk"}, drawn((2**16 + 1,), 0))[1]) == 656 * (4 + 4)  # indices no longer fit
    assert bytes_of(through({"name": "lowrank"}, drawn((9,), 0))[1]) == 4 * 9  # a vector has no rank


# -- oracles


@pytest.mark.parametrize("n", [64, 256, 1000, 4096])
def test_nf4_is_that_of_bitsandbytes(n: int) -> None:
    """Codes, packing and scales; they multiply by 1 / s where we divide, so that one code in a thousand may differ."""
    x = drawn((n,), n)
    back, parts = through({"name": "nf4", "block": 64}, x)
    codes, state = oracle.quantize_4bit(x, blocksize=64, quant_type="nf4")
    assert torch.equal(parts["scales"], state.absmax)
    assert torch.equal(NF4, state.code)
    same = (codes.flatten() == parts["codes"]).double().mean()
    assert same >= 0.999
    expected = oracle.dequantize_4bit(codes, state)
    near = torch.isclose(back, expected, rtol=1e-6, atol=0)
    assert near.double().mean() >= 0.999
    assert float((x - back).abs().max()) <= float((x - expected).abs().max()) * (1 + 1e-6)


@pytest.mark.parametrize("n", [64, 256, 1000, 4096])
def test_int8_is_that_of_bitsandbytes_with_its_linear_map(n: int) -> None:
    x = drawn((n,), n)
    back, parts = through({"name": "int8", "block": 256}, x)
    codes, state = oracle.quantize_blockwise(x, code=oracle.create_linear_map(), blocksize=256)
    torch.testing.assert_close(127 * parts["scales"], state.absmax)
    expected = oracle.dequantize_blockwise(codes, state)
    near = torch.isclose(back, expected, rtol=1e-5, atol=1e-7)
    assert near.double().mean() >= 0.99  # else a half was rounded the other way
    assert float((x - back).abs().max()) <= float((x - expected).abs().max()) * (1 + 1e-5)


def test_lowrank_finds_a_matrix_of_its_rank_and_nears_the_best_one_when_warm() -> None:
    """Exact in one go at full rank; on one and the same matrix the warm start is subspace iteration: it goes to SVD."""
    thin = drawn((40, 2), 0) @ drawn((2, 50), 1)
    torch.testing.assert_close(through({"name": "lowrank"}, thin)[0], thin, rtol=0, atol=1e-4)
    x, warm, errors = drawn((40, 50), 2), None, []
    best = float(torch.linalg.svdvals(x)[2:].norm())
    for _ in range(60):
        back, parts = through({"name": "lowrank"}, x, warm=warm)
        warm = parts["q"]
        errors.append(float((x - back).norm()))
    assert errors[0] > 1.01 * best
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] == pytest.approx(best, rel=2e-3)


def test_double_scales_lose_up_to_a_step_of_theirs_which_may_be_a_small_block() -> None:
    """100 blocks of 16 from 1e-4 to 1: 0.152 s and max |s - mean| / 254; the smallest comes back as zeros."""
    sizes = torch.logspace(-4, 0, 100)[:, None]
    x = sizes * drawn((100, 16), 0)
    back, _ = through({"name": "nf4", "double": True, "block": 16}, x)
    s = x.abs().amax(1)
    assert ((x - back).abs().amax(1) <= 0.152 * s + (s - s.mean()).abs().max() / 254).all()
    assert not back[0].any()


def test_lowrank_starts_anew_from_what_was_no_change() -> None:
    x = drawn((40, 50), 2)
    cold = through({"name": "lowrank"}, x)[0]
    assert torch.equal(through({"name": "lowrank"}, x, warm=torch.zeros(100))[0], cold)


def test_randomk_is_right_in_the_mean() -> None:
    """n / k times each of k = 5 of n = 50 entries: over 1,000 draws the mean of entry x is x +- 3 |x| / sqrt(1000) sd.

    An entry comes with chance 1/10 as 10 x, so its standard deviation is 3 |x|; five of these are allowed.
    """
    x = drawn((50,), 0)
    one = {"name": "randomk", "share": 0.1}
    mean = torch.stack([through(one, x, seed)[0] for seed in range(1000)]).double().mean(0)
    assert ((mean - x).abs() <= 5 * 3 * x.abs() / math.sqrt(1000)).all()
    assert float(through(one, x, 0, feedback=True)[0].norm()) == pytest.approx(
        float(through(one, x, 0)[0].norm()) / 10, rel=1e-6
    )


def test_by_hand() -> None:
    """int8: max 2.54, step 0.02: 1.0 is 50 steps, -0.333 nearest to -17. topk: 2 of 4. nf4: the ends, 0.4407 of 2."""
    x = torch.tensor([1.0, -0.333, 2.54, 0.0])
    back, parts = through({"name": "int8"}, x)
    assert parts["codes"].tolist() == [50, -17, 127, 0]
    assert back.tolist() == pytest.approx([1.0, -0.34, 2.54, 0.0])
    back, parts = through({"name": "topk", "share": 0.5}, x)
    assert back.tolist() == pytest.approx([1.0, 0.0, 2.54, 0.0])
    assert parts["indices"].tolist() == [0, 2]
    back, parts = through({"name": "nf4"}, torch.tensor([2.0, -2.0, 0.9, 0.0, 0.001]))
    assert back.tolist() == pytest.approx([2.0, -2.0, 2 * 0.44070983, 0.0, 0.0])
    assert parts["codes"].tolist() == [0xF0, 0xC7, 0x70]


# -- what is refused


@pytest.mark.parametrize("indices", [[0, 0], [1, 0], [3, 4], [-1, 2]])
def test_indices_that_do_not_rise_within_the_tensor_are_refused(indices: list[int]) -> None:
    codec = make_codec({"name": "topk", "share": 0.5})
    parts = {"values": torch.ones(2), "indices": torch.tensor(indices)}
    with pytest.raises(UnfitUpdate, match="do not rise from 0 to below 4"):
        codec.decode(parts, (4,), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "zip"}, "no codec 'zip'; there are bf16, int8, lowrank"),
        ({"name": "topk", "shar": 0.1}, "unknown key wire.codec.shar; did you mean share?"),
        ({"name": "topk", "share": 0.0}, "wire.codec.share: 0.0 must lie in"),
        ({"name": "topk", "share": 1.5}, "wire.codec.share: 1.5 must lie in"),
        ({"name": "int8", "block": 0}, "wire.codec.block: 0 must be at least 1"),
        ({"name": "nf4", "block": 0}, "wire.codec.block: 0 must be at least 1"),
        ({"name": "lowrank", "rank": 0}, "wire.codec.rank: 0 must be at least 1"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_codec(settings)


def test_every_codec_is_tested_here() -> None:
    assert {one["name"] for one in SETTINGS} == CODECS.keys()
