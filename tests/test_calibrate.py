"""What an edge measures of itself, how it is kept, and what a plan makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fedpipe_made import made
from toys import llama

from fedpipe_ray import lora
from fedpipe_ray.calibrate import Calibration, calibrate, calibrated, fitted, measure, points_for
from fedpipe_ray.facts import CALIBRATION, calibrations_of
from fedpipe_ray.message import Message
from fedpipe_ray.model import Base
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Report
from fedpipe_ray.settings import Local

LINE = Calibration(
    bits=8,
    seconds_fixed=1.0,
    seconds_token=0.01,
    bytes_fixed=1000.0,
    bytes_token=10.0,
    flops=200.0,
    trained=50,
    tokens=192,
    weights=7,
)
SPEC = lora.LoraSpec(4, 8, ("all-linear",))


class Tokenizer:
    """As much of one as a Base looks at."""

    pad_token_id, eos_token_id = 1, 2
    pad_token, eos_token = "<pad>", "<eos>"

    def __len__(self) -> int:
        return 27


@pytest.fixture
def base() -> Base:
    return Base(llama(hidden_size=64, intermediate_size=256), Tokenizer(), torch.device("cpu"))


def test_the_line_by_hand() -> None:
    """1 + 30 x 0.01 x 400 / 200; 1000 + 30 x 10, and 16 bytes for each of 20 more parameters."""
    assert LINE.seconds(30, 400.0) == pytest.approx(1.6)
    assert LINE.memory_bytes(30, 70) == 1000 + 300 + 16 * 20


@pytest.mark.parametrize(
    ("limit", "parts"), [(3000, 1), (2859, 2), (1981, 2), (1979, 3), (1541, 4), (1539, 8), (1100, 8)]
)
def test_a_batch_is_split_until_its_parts_fit(limit: float, parts: int) -> None:
    """Eight rows of 20 tokens: 1.1 (1000 + 1600) = 2860; four of them 1980, three 1760, two 1540, one 1320."""
    assert LINE.parts(8, 1, 20, limit) == parts
    assert LINE.parts(8, 4, 20, limit) == max(parts, 4)
    assert LINE.parts(1, 1, 20, limit) == 1


def test_numbers_carry_it_and_half_of_them_are_none() -> None:
    told = {f"e/{CALIBRATION}8.{name}": value for name, value in LINE.numbers().items()}
    assert calibrations_of("e", told) == {8: LINE}
    assert calibrations_of("e/", told) == {}
    del told[f"e/{CALIBRATION}8.flops"]
    assert calibrations_of("e", told) == {}


def test_longer_batches_take_more(base: Base) -> None:
    """2048 more tokens: so many that neither allocator nor pages can hide them."""
    _, few = measure(base, SPEC, 4, 64, units=1)
    _, many = measure(base, SPEC, 36, 64, units=1)
    hidden = 4 * 64 * 2048  # one float32 vector a token
    assert many - few > 4 * hidden


def test_points_lie_below_the_batch_or_are_parts_of_its_row() -> None:
    assert points_for(16, 96) == ((4, 96), (8, 96))
    assert points_for(4, 96) == ((1, 96), (2, 96))
    assert points_for(2, 96) == points_for(1, 96) == ((1, 48), (1, 96))


def test_it_is_measured_once_for_a_model_bits_and_batches(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds never repeat to the last bit: an equal answer was read, not measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    points = points_for(8, 16)
    found = calibrated(base, SPEC, points, 8)
    (kept,) = tmp_path.rglob("calibration/*.json")
    assert calibrated(base, SPEC, points, 8) == found
    assert (found.trained, found.tokens) == (sum(p.numel() for p in trained(base)), 64)
    calibrated(base, SPEC, points_for(16, 16), 8)
    calibrated(base, SPEC, points, 7)
    calibrated(base, SPEC, points, 8, local=Local(checkpointing=True))
    assert len(list(tmp_path.rglob("calibration/*.json"))) == 4
    kept.write_text("{")  # damaged
    again = calibrated(base, SPEC, points, 8)
    assert calibrated(base, SPEC, points, 8) == again != found


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert calibrated(base, SPEC, points_for(2, 16)).tokens == 16


@pytest.mark.parametrize(
    ("limit", "tried", "parts"),
    [(1000.0, [2, 4, 4, 8], 1), (124.0, [2, 4, 4, 8], 2), (99.0, [2, 4], 2), (10.0, [2, 4], 8)],
)
def test_the_whole_batch_is_tried_only_if_half_of_it_says_so(
    base: Base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: float, tried: list[int], parts: int
) -> None:
    """A row takes 10 bytes, but 8 rows take 120: 8 are believed to take 1.25 x 80, and found to take 1.1 x 120."""
    rows: list[int] = []

    def measured(_base: Base, _spec: lora.LoraSpec, count: int, _length: int, *_: Any, **__: Any) -> tuple[float, int]:
        rows.append(count)
        return 1.0 * count, 120 if count == 8 else 10 * count

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fedpipe_ray.calibrate.measure", measured)
    line, found = fitted(base, SPEC, (8, 1), 16, 8, limit)
    assert (rows, found) == (tried, parts)
    assert line.tokens == 16 * tried[-1]


def test_measuring_changes_neither_weights_nor_what_is_drawn_next(base: Base) -> None:
    spec = lora.LoraSpec(4, 8, ("all-linear",), dropout=0.5)
    before = lora.read(lora.attach(base, spec))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    measure(base, spec, 2, 8)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(t, before[name]) for name, t in lora.read(lora.attach(base, spec)).items())


def trained(base: Base) -> list[torch.nn.Parameter]:
    return list(lora.parameters(lora.attach(base, SPEC)).values())


def test_an_edge_with_a_capacity_measures_itself_once(run_file: Path) -> None:
    _, method, fleet, server = made(run_file, "", "fleet.edges.b.training_memory_bytes=1GiB")
    state = method.start(server, rng_for(0, 0, "start"))
    orders = method.plan(state, fleet.edges, server, 0, rng_for(0, 0, "plan"))
    assert [order.numbers["calibrate"] for order in orders.values()] == [0, 1, 0]
    reports = list(fleet.run(orders, 0))
    assert all(isinstance(report, Report) for report in reports)
    after = method.aggregate(state, reports, server, 0, rng_for(0, 0, "aggregate"))
    (found,) = calibrations_of("b", after.numbers).values()
    assert found.bits == orders["b"].numbers["bits"]
    assert not calibrations_of("a", after.numbers)
    orders = method.plan(after, fleet.edges, server, 1, rng_for(0, 1, "plan"))
    assert [order.numbers["calibrate"] for order in orders.values()] == [0, 0, 0]


def test_a_plan_takes_memory_from_the_line(run_file: Path) -> None:
    """1.1 (fixed + tokens x slope - 12 bytes for each of 8000 parameters trained there) + 12 r width."""
    _, method, fleet, server = made(run_file, ", bits: [16]", "fleet.edges.b.training_memory_bytes=1GiB")
    start = method.start(server, rng_for(0, 0, "start"))
    line = Calibration(16, 0.5, 0.002, 5e6, 3e4, 1e6, 8000, 10**6, 99)
    told = {f"b/{CALIBRATION}16.{name}": value for name, value in line.numbers().items()}
    state = Message(start.tensors, told)
    width = sum(key.d_in + key.d_out for key in method.shape(server).keys)
    longest = server.run.data.max_length
    plan = method.configure(state, fleet.edges, server)[1]["b"]
    rank = max(plan.ranks.values())
    assert len(plan.ranks) == len(method.shape(server).keys)
    expected = 1.1 * (5e6 - 12 * 8000 + plan.batch * longest * 3e4) + 12 * rank * width
    assert plan.memory_bytes == pytest.approx(expected, abs=len(plan.ranks) + 1)


def test_a_line_without_bytes_leaves_memory_to_the_formula(run_file: Path) -> None:
    """Where a system does not say what a process takes, both points are alike."""
    _, method, fleet, server = made(run_file, ", bits: [16]", "fleet.edges.b.training_memory_bytes=1GiB")
    start = method.start(server, rng_for(0, 0, "start"))
    line = Calibration(16, 0.5, 0.002, 0.0, 0.0, 1e6, 8000, 10**6, 99)
    told = {f"b/{CALIBRATION}16.{name}": value for name, value in line.numbers().items()}
    found = method.configure(Message(start.tensors, told), fleet.edges, server)[1]["b"]
    assert found == method.configure(start, fleet.edges, server)[1]["b"]


def test_a_batch_above_the_measured_one_is_measured_again(run_file: Path) -> None:
    """19 tokens hold no batch of 4 rows of 5, 20 do."""
    for tokens, again in ((19, 1.0), (20, 0.0)):
        _, method, fleet, server = made(run_file, ", bits: [16]", "fleet.edges.b.training_memory_bytes=1GiB")
        start = method.start(server, rng_for(0, 0, "start"))
        line = Calibration(16, 0.5, 0.002, 5e6, 3e4, 1e6, 8000, tokens, 99)
        told = {f"b/{CALIBRATION}16.{name}": value for name, value in line.numbers().items()}
        state = Message(start.tensors, {**told, "b/longest": 5.0})
        order = method.plan(state, fleet.edges, server, 0, rng_for(0, 0, "plan"))["b"]
        assert (order.numbers["batch"], order.numbers["calibrate"]) == (4, again)


def test_more_weights_than_the_measured_ones_are_measured_again(run_file: Path) -> None:
    """A weight that is trained keeps its input, so the line of fewer weights does not hold."""
    _, method, fleet, server = made(run_file, ", bits: [16]", "fleet.edges.b.training_memory_bytes=1GiB")
    start, every = method.start(server, rng_for(0, 0, "start")), len(method.shape(server).keys)
    for weights, again in ((every - 1, 1.0), (every, 0.0)):
        line = Calibration(16, 0.5, 0.002, 5e6, 3e4, 1e6, 8000, 10**6, weights)
        told = {f"b/{CALIBRATION}16.{name}": value for name, value in line.numbers().items()}
        order = method.plan(Message(start.tensors, told), fleet.edges, server, 0, rng_for(0, 0, "plan"))["b"]
        assert order.numbers["calibrate"] == again


@pytest.mark.parametrize(("join", "beside"), [("stack", True), ("pad", False)])
def test_the_line_is_measured_beside_a_frozen_adapter(
    join: str, beside: bool, run_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There is one from the second round on, unless updates are padded; in the first one as large takes its place."""
    seen: list[object] = []

    def noted(*given: Any, frozen: lora.LoraSpec | None = None, **rest: Any) -> Calibration:
        seen.append(frozen)
        return calibrate(*given, frozen=frozen, **rest)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fedpipe_ray.calibrate.calibrate", noted)
    _, method, fleet, server = made(run_file, f", join: {join}", "fleet.edges.b.training_memory_bytes=1GiB")
    orders = method.plan(method.start(server, rng_for(0, 0, "start")), fleet.edges, server, 0, rng_for(0, 0, "plan"))
    assert all(isinstance(report, Report) for report in fleet.run(orders, 0))
    assert {frozen is not None for frozen in seen} == {beside}


def test_the_real_clock_plans_with_measured_seconds(run_file: Path) -> None:
    """The longer a step was measured to be, the longer the plan; the profile's FLOP/s no longer matter."""
    slow = Calibration(16, 0.5, 0.002, 5e6, 3e4, 1e6, 8000, 10**6, 99)
    fast = Calibration(16, 0.25, 0.001, 5e6, 3e4, 1e6, 8000, 10**6, 99)

    def planned(line: Calibration, *overrides: str) -> float:
        _, method, fleet, server = made(run_file, ", bits: [16], steps: equal", *overrides)
        state = method.start(server, rng_for(0, 0, "start"))
        told = {f"b/{CALIBRATION}16.{name}": value for name, value in line.numbers().items()}
        order = method.plan(state, fleet.edges, server, 0, rng_for(0, 0, "plan"))["b"]
        assert order.numbers["calibrate"] == float("fleet.clock=real" in overrides)
        plan = method.configure(Message(state.tensors, told), fleet.edges, server)[1]["b"]
        profile, width = fleet.edges["b"], {key.name: key.d_in + key.d_out for key in method.shape(server).keys}
        up = sum(rank * width[name] for name, rank in plan.ranks.items())
        transfers = 32 * (8 * sum(width.values()) / profile.downlink_bps + up / profile.uplink_bps)
        return plan.planned_seconds - 2 * profile.latency_seconds - transfers

    real = planned(slow, "fleet.clock=real")
    assert real == pytest.approx(2 * planned(fast, "fleet.clock=real"))
    assert real == pytest.approx(planned(slow, "fleet.clock=real", "fleet.edges.b.compute_flops=1GFLOP/s"))
    assert planned(slow) == pytest.approx(planned(fast))
    assert real > 10 * planned(slow)
