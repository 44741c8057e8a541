"""What must hold for any edge, against brute force and each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from demands_made import choice, demand
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedpipe_ray.planning import (
    GAINS,
    RANKS,
    Choice,
    Demand,
    Key,
    best,
    exact,
    greedy,
    uniform,
)

Instance = tuple[list[Key], Demand, np.ndarray[Any, Any], float, float, str]


@st.composite
def instances(draw: st.DrawFn, most: int = 3) -> Instance:
    """Tiny and odd ones with room for one weight at rank 1: keys that are equal or cost nothing, limits that bind."""
    keys = [Key(f"k{n}", draw(st.sampled_from("qv")), n // 2, 8, 8) for n in range(draw(st.integers(1, most)))]

    def costs(most: int, scale: float) -> np.ndarray[Any, Any]:
        return np.array([draw(st.integers(0, most)) * scale for _ in keys])

    choices = [
        Choice(
            draw(st.sampled_from([4, 8, 16])), draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([None, 1])),
            draw(st.integers(1, 8)) / 4, costs(3, 0.0625), costs(2, 0.125),
            draw(st.integers(0, 30)), costs(4, 1.0), costs(9, 1.0),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]  # fmt: skip
    least = min(c.memory_bytes + c.memory_bytes_rank[-1] + c.memory_bytes_key[-1] for c in choices)  # the top layer
    capacity = max(1.0, least) + draw(st.one_of(st.integers(0, 120), st.just(math.inf)))
    edge = demand(
        choices, capacity_bytes=float(capacity), fixed_seconds=draw(st.integers(0, 4)) / 2,
        transfer_seconds_rank=costs(8, 0.25), steps=draw(st.integers(1, 12)), batch=draw(st.sampled_from([None, 4])),
        max_rank=draw(st.sampled_from([2, 32])),
    )  # fmt: skip
    scores = np.array([draw(st.integers(0, 8)) / 4 for _ in keys])
    lam = draw(st.sampled_from([0.0, 0.5, 2.0, 8.0, 32.0]))
    return keys, edge, scores, draw(st.integers(1, 60)) / 2, lam, draw(st.sampled_from(sorted(GAINS)))


def values(given: Instance, ranks_of: Sequence[int] = RANKS) -> dict[tuple[int, ...], float]:
    """The value of every solution that fits, (choice, rank of each key), written down once more and apart."""
    keys, edge, scores, deadline, lam, gain = given
    found = {}
    for q, c in enumerate(edge.choices):
        top = max(key.layer for key in keys)
        ranks_of = [rank for rank in ranks_of if rank <= edge.max_rank]
        open_to = [ranks_of if c.depth is None or key.layer > top - c.depth else (0,) for key in keys]
        steps = -(-edge.steps * (edge.batch or c.batch) // c.batch)
        for ranks in itertools.product(*open_to):
            step, sent, held = c.step_seconds, edge.fixed_seconds, c.memory_bytes
            worth = 0.0
            for m, rank in enumerate(ranks):
                step += c.step_seconds_rank[m] * rank + c.step_seconds_key[m] * (rank > 0)
                held += c.memory_bytes_rank[m] * rank + c.memory_bytes_key[m] * (rank > 0)
                sent += edge.transfer_seconds_rank[m] * rank
                worth += scores[m] * (math.log2(1 + rank) if gain == "log2" else math.sqrt(rank))
            if any(ranks) and held <= edge.capacity_bytes:
                found[q, *ranks] = worth - lam * max(0, 1 - deadline / (sent + steps * step))
    return found


def scale(given: Instance) -> float:
    return float(given[2].sum() * GAINS[given[5]](np.array([32.0]))[0] + given[4])


@hypothesis_settings(max_examples=100)
@given(instances())
def test_brute_force_finds_nothing_better_than_exact(given: Instance) -> None:
    found = exact(*given, tolerance=1e-6)
    assert found.value == pytest.approx(max(values(given).values()), abs=2e-6 * scale(given))


@hypothesis_settings(max_examples=80)
@given(instances(most=6))
def test_no_plan_breaks_its_own_account(given: Instance) -> None:
    """Value, memory and seconds are those of the ranks; capacity holds; exact >= greedy >= every uniform rank."""
    keys, edge, scores, deadline, lam, gain = given
    solved = {"exact": exact(*given), "greedy": greedy(*given), "best": best(*given[:4], lam=lam, gain=gain)}
    for found in solved.values():
        assert found.memory_bytes <= edge.capacity_bytes
        assert found.ranks
        assert set(found.ranks.values()) <= set(RANKS[1:])
        assert list(found.ranks) == [key.name for key in keys if key.name in found.ranks]
        held, seconds, worth = [], [], -lam * found.under_training
        for c in edge.choices:
            if (c.bits, c.batch, c.depth) == (found.bits, found.batch, found.depth):
                ranks = np.array([found.ranks.get(key.name, 0) for key in keys])
                held.append(c.memory_bytes + c.memory_bytes_rank @ ranks + c.memory_bytes_key @ (ranks > 0))
                step = c.step_seconds + c.step_seconds_rank @ ranks + c.step_seconds_key @ (ranks > 0)
                seconds.append(edge.fixed_seconds + edge.transfer_seconds_rank @ ranks + found.steps * step)
                worth_of = float(scores @ GAINS[gain](ranks.astype(float)))
        assert found.memory_bytes in held
        assert any(found.seconds == pytest.approx(one) for one in seconds)
        assert found.under_training == pytest.approx(max(0, 1 - deadline / found.planned_seconds))
        assert found.value == pytest.approx(worth_of + worth)
    slack = 1e-8 * scale(given)
    assert solved["exact"].value >= solved["greedy"].value - slack
    try:
        assert solved["greedy"].value >= uniform(*given).value - slack
    except ValueError:
        assert not any(values((keys, edge, scores, deadline, lam, gain), (1,)))


@hypothesis_settings(max_examples=40)
@given(instances(most=6), st.integers(1, 100))
def test_more_memory_never_lowers_the_exact_value(given: Instance, more: int) -> None:
    keys, edge, *rest = given
    roomier = replace(edge, capacity_bytes=edge.capacity_bytes + more)
    slack = 1.1e-6 * scale(given)
    assert exact(keys, roomier, *rest, tolerance=1e-6).value >= exact(*given, tolerance=1e-6).value - slack


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tied", [False, True])
def test_greedy_is_within_a_percent_of_exact(seed: int, tied: bool) -> None:
    """Of what the weights of the exact plan are worth; 8 edges, 28 weights of a Llama-like model, 6 choices."""
    rng = np.random.default_rng([seed, tied])
    keys = [Key(f"{n}.{kind}", kind, n, 512, out) for n in range(4) for kind, out in
            zip(("q", "k", "v", "o", "gate", "up", "down"), (512, 128, 128, 512, 1408, 1408, 1408))]  # fmt: skip
    size = np.array([key.d_in + key.d_out for key in keys], float)
    for _ in range(8):
        rate, link = np.exp(rng.uniform(0, np.log(8), 2))
        choices = [
            choice(
                28, bits=bits, batch=batch, step_seconds=(0.05 + batch / 8) / rate,
                step_seconds_rank=batch * 1e-7 * size / rate, step_seconds_key=1e-4 / rate,
                memory_bytes=bits * 2e6 + batch * 1e6, memory_bytes_rank=16 * size, memory_bytes_key=batch * 1e4,
            )
            for bits in (4, 16) for batch in (2, 4, 8)
        ]  # fmt: skip
        edge = demand(
            choices, capacity_bytes=1e7 * np.exp(rng.uniform(0.2, 1.6)), transfer_seconds_rank=size * 5e-6 / link,
            steps=int(rng.integers(5, 30)), batch=8,
        )  # fmt: skip
        scores = np.tile(rng.lognormal(size=7), 4) if tied else rng.lognormal(size=28)
        given = (keys, edge, scores / scores.sum(), 4.0, float(rng.choice([1, 5, 20])))
        most, quick = exact(*given), greedy(*given)
        assert most.value - quick.value <= 0.01 * (most.value + given[4] * most.under_training)
