"""The virtual clock, operations and memory, against numbers derived by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import CPU, classifier, llama

from fedpipe_ray import lora
from fedpipe_ray.costs import PeakMemory, linked, matmul_parameters, training_flops, virtual_seconds
from fedpipe_ray.settings import Profile

MEGABYTE = 10**6


def test_virtual_seconds_by_hand() -> None:
    """3 MB down at 8 Mbit/s: 3 s; 1 MB up at 2 Mbit/s: 4 s; latency twice 0.5 s: 1 s; 30 GFLOP at 2 GFLOP/s: 15 s."""
    edge = Profile(compute_flops=2e9, uplink_bps=2e6, downlink_bps=8e6, latency_seconds=0.5)
    assert virtual_seconds(edge, 30e9, 3 * MEGABYTE, MEGABYTE) == pytest.approx(23)
    assert virtual_seconds(edge, 0, 0, 0) == pytest.approx(1)


def test_an_order_may_state_the_rates_of_its_round() -> None:
    edge = Profile(uplink_bps=2e6, downlink_bps=8e6)
    found = linked(edge, {"uplink_bps": 5e6, "rho": 0.3})
    assert (found.uplink_bps, found.downlink_bps, found.compute_flops) == (5e6, 8e6, edge.compute_flops)
    assert linked(edge, {"rho": 0.3}) is edge


@given(st.floats(1, 1e15), st.integers(0, 10**12), st.integers(0, 10**12), st.floats(1.1, 100))
def test_a_faster_edge_is_never_later(flops: float, down: int, up: int, factor: float) -> None:
    edge = Profile()
    faster = Profile(
        compute_flops=factor * edge.compute_flops, uplink_bps=factor * edge.uplink_bps,
        downlink_bps=factor * edge.downlink_bps, latency_seconds=edge.latency_seconds / factor,
    )  # fmt: skip
    slow = virtual_seconds(edge, flops, down, up)
    assert virtual_seconds(faster, flops, down, up) == pytest.approx(slow / factor)
    assert virtual_seconds(edge, flops, down + 8, up) >= slow
    assert virtual_seconds(edge, flops, down, up + 8) >= slow


# A layer of the tiny Llama: q, k, v, o of 32 x 32 and gate, up, down of 32 x 64. Two layers, and a head of 27 x 32.
LAYER = 4 * 32 * 32 + 3 * 32 * 64
WEIGHTS = 2 * LAYER + 27 * 32


@pytest.mark.parametrize("tied", [False, True])
def test_operations_of_a_frozen_and_of_a_trained_llama(tied: bool) -> None:
    """Looking up an embedding is no product, but the head is one, tied to it or not. Norms are vectors."""
    model = llama(tie_word_embeddings=tied)
    assert matmul_parameters(model) == (0, 0, WEIGHTS)
    assert training_flops(model, 10) == 10 * 6 * WEIGHTS
    model.requires_grad_(False)
    assert matmul_parameters(model) == (WEIGHTS, 0, 0)
    assert training_flops(model, 10) == 10 * 2 * WEIGHTS


def test_operations_of_an_adapter() -> None:
    """Rank 3 on q (32 -> 32) and down (64 -> 32) of both layers: 2 (3 x 64 + 3 x 96) = 960 trained weights.

    No gradient goes to the first weight, 32 x 32: nothing before its adapter is trained.
    """
    model = lora.inject(llama(), lora.LoraSpec(3, 6, ("q_proj", "down_proj")))
    assert matmul_parameters(model) == (1024, WEIGHTS - 1024, 960)
    assert training_flops(model, 7) == 7 * (2 * 1024 + 4 * (WEIGHTS - 1024) + 6 * 960)


def test_no_gradient_goes_below_the_lowest_adapter() -> None:
    """The last layer's down (64 -> 32) alone: what comes after it is the head."""
    model = lora.inject(llama(), lora.LoraSpec(3, 6, ("model.layers.1.mlp.down_proj",)))
    assert matmul_parameters(model) == (2 * LAYER, 27 * 32, 3 * 96)


def test_operations_of_a_classifier() -> None:
    """A head of 3 x 32, trained whole; PEFT keeps the frozen one beside it, which does not run."""
    model = lora.inject(classifier(3), lora.LoraSpec(3, 6, ("q_proj",), task="classification"))
    assert matmul_parameters(model) == (1024, 2 * LAYER - 1024, 2 * 3 * 64 + 96)


def test_operations_need_no_weights() -> None:
    with torch.device("meta"):
        model = llama()
    assert matmul_parameters(model) == (0, 0, WEIGHTS)


def test_peak_memory_sees_what_was_there_for_a_moment_and_forgets_it() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not reset the high-water mark here")
    with PeakMemory(CPU) as before:
        pass
    with PeakMemory(CPU) as held:
        block = torch.ones(200 * MEGABYTE, dtype=torch.uint8)
        assert int(block[-1]) == 1
        del block
    with PeakMemory(CPU) as after:
        pass
    assert 195 * MEGABYTE < held.bytes - before.bytes < 230 * MEGABYTE
    assert abs(after.bytes - before.bytes) < 20 * MEGABYTE
    assert before.bytes > 50 * MEGABYTE
