"""The local step: its rates, its gradient by hand, and what it does with a loss that is no number."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import load
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toys import CPU, PAD, Constant, Some, answer, classifier, llama, uniform

from fedpipe_ray import lora
from fedpipe_ray.batches import batches_of_like_length
from fedpipe_ray.errors import DivergedError
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.methods import make_method
from fedpipe_ray.report import Report
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Local
from fedpipe_ray.train import Trained, learning_rate, steps_of, train

V = 8
MIXED = Some([
    answer([3, 4], [5]), answer([3], [6, 6, 7]), answer([4, 4, 4], [2, 2]), answer([5], [1, 2, 3, 4, 5]),
])  # fmt: skip


def trained(model: Any, rows: Some, local: Local, seed: int = 0, **options: Any) -> Trained:
    settings = {"round": 0, "rounds": 1, "rng": np.random.default_rng(seed), "device": CPU, "pad_id": PAD, **options}
    return train(model, rows, local, **settings)


@contextmanager
def gradients() -> Iterator[list[torch.Tensor]]:
    """The gradients of all steps inside, flat, as the optimizer gets them."""
    seen: list[torch.Tensor] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        group = optimizer.param_groups[0]["params"]
        seen.append(torch.cat([p.grad.flatten().clone() for p in group if p.grad is not None]))

    hook = register_optimizer_step_pre_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


# -- rates


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", {0: 0.5, 1: 1.0, 2: 1.0, 6: 1.0, 9: 1.0, 10: 1.0}),
        ("linear", {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.775, 6: 0.55, 9: 0.2125, 10: 0.1, 99: 0.1}),
        ("cosine", {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.868198, 6: 0.55, 8: 0.231802, 10: 0.1, 99: 0.1}),
    ],
)
def test_rates_by_hand(schedule: Any, rates: dict[int, float]) -> None:
    """lr 1, floor 0.1, 2 steps of warm-up, 10 in all, so that 8 go down.

    Step 4 is a quarter of them: linear 0.1 + 0.9 x 3/4 = 0.775; cosine 0.1 + 0.9 (1 + cos(pi/4))/2 = 0.868198. Step 6
    is the half of both: 0.1 + 0.9/2. Step 8: 0.1 + 0.9 (1 - cos(pi/4))/2. Step 9, the last: 0.1 + 0.9/8.
    """
    local = Local(lr=1.0, schedule=schedule, lr_floor=0.1, warmup_steps=2)
    assert {step: learning_rate(local, step, 10) for step in rates} == pytest.approx(rates, abs=1e-6)


@given(
    st.builds(
        Local, lr=st.floats(1e-9, 10), lr_floor=st.floats(0, 1), warmup_steps=st.integers(0, 30),
        schedule=st.sampled_from(["constant", "linear", "cosine"]),
    ),
    st.integers(1, 40),
)  # fmt: skip
def test_rates_rise_then_fall_within_their_bounds(local: Local, total: int) -> None:
    rates = [learning_rate(local, step, total) for step in range(total)]
    assert all(0 <= rate <= local.lr * (1 + 1e-9) for rate in rates)
    up, down = rates[: local.warmup_steps], rates[local.warmup_steps :]
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    assert all(rate >= local.lr * local.lr_floor * (1 - 1e-9) for rate in down)


def test_the_schedule_runs_over_all_rounds() -> None:
    """AdamW's first step of a round moves a weight by its rate, the sign of the gradient times lr; 1 step a round.

    With bias 0 the loss term of label 5 pulls up bias 5 alone.
    """
    local = Local(steps=1, batch=1, lr=1.0, lr_floor=0.0, schedule="linear")
    moved = []
    for round in range(4):
        model = Constant([0.0] * V)
        trained(model, Some([answer([3], [5])]), local, round=round, rounds=4)
        moved.append(float(model.bias[5].detach()))
    assert moved == pytest.approx([1.0, 0.75, 0.5, 0.25], rel=1e-5)


# -- steps and rows


@pytest.mark.parametrize(
    ("changes", "rows", "steps"),
    [
        ({"epochs": 1.0}, 10, 3), ({"epochs": 2.0}, 10, 5), ({"epochs": 0.1}, 10, 1), ({"epochs": 1.0}, 12, 3),
        ({"epochs": 1.0}, 13, 4), ({"epochs": 1e-9}, 10, 1), ({"steps": 7}, 10, 7), ({}, 10, 20),
    ],
)  # fmt: skip
def test_steps_of_a_round(changes: dict[str, Any], rows: int, steps: int) -> None:
    """With 4 rows a step: ceil(rows x epochs / 4), at least 1."""
    assert steps_of(Local(batch=4, **changes), rows) == steps


@pytest.mark.parametrize(
    ("count", "batch", "steps", "times"), [(10, 2, 5, 1), (10, 4, 5, 2), (6, 4, 3, 2), (3, 8, 3, 8)]
)
def test_every_row_is_seen_once_an_epoch(count: int, batch: int, steps: int, times: int) -> None:
    """Also where a batch spans two epochs, or more; rows are grouped by length within 8 batches only."""
    rows = Some([answer([3], [i % V]) for i in range(count)])
    done = trained(Constant([0.0] * V), rows, Local(steps=steps, batch=batch))
    assert Counter(rows.seen) == dict.fromkeys(range(count), times)
    assert (done.steps, done.samples) == (steps, steps * batch)


def test_batches_hold_rows_of_like_length_in_no_order_of_length() -> None:
    """Of 64 lengths in 8 batches, each batch holds 8 neighbours; the batches themselves are shuffled."""
    rows = Some([answer([3] * (1 + i), [5]) for i in range(64)])
    found = list(batches_of_like_length(rows, 8, 8, np.random.default_rng(0)))
    assert sorted(sorted(batch) for batch in found) == [list(range(8 * i, 8 * i + 8)) for i in range(8)]
    assert [min(batch) for batch in found] != sorted(min(batch) for batch in found)


def test_epochs_differ_and_follow_the_generator() -> None:
    def order(seed: int) -> list[int]:
        rows = Some([answer([3], [5])] * 12)
        trained(Constant([0.0] * V), rows, Local(epochs=2.0, batch=4), seed)
        return rows.seen

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0)[:12] != order(0)[12:]


# -- loss and gradient


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_uniform_model_loses_log_v_a_response_token(precision: Any) -> None:
    """Whatever is padded: 4 rows of 3, 4, 5 and 6 tokens in one batch, padded to 24; parts of 2 rows pad less."""
    local = Local(steps=1, batch=4, precision=precision)
    done = trained(uniform(), MIXED, local)
    assert done.loss == pytest.approx(math.log(27), rel=1e-6)
    assert (done.tokens, done.steps, done.samples) == (24, 1, 4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_by_hand(accumulate: int) -> None:
    """Bias (0, ln 3, 0, 0): Z = 6, so token 1 costs ln 2 and every other ln 6.

    Responses [1] and [0, 0, 2]: (ln 2 + 3 ln 6) / 4, not the mean of the rows' means. The labels on the first position
    of the second row (nothing predicts it) and those of prompts do not count.
    """
    rows = Some([([3, 2, 1], [-100, -100, 1]), ([0, 0, 0, 2], [0, 0, 0, 2])])
    done = trained(Constant([0.0, math.log(3), 0.0, 0.0]), rows, Local(steps=1, batch=2, accumulate=accumulate))
    assert done.loss == pytest.approx((math.log(2) + 3 * math.log(6)) / 4, rel=1e-6)


def test_the_loss_of_a_round_is_a_mean_over_tokens_not_over_steps() -> None:
    """As above, one row a step; so small a rate that the bias stays."""
    rows = Some([answer([3], [1]), answer([3], [0, 0, 2])])
    losses: list[float] = []
    done = trained(
        Constant([0.0, math.log(3), 0.0, 0.0]), rows, Local(steps=2, batch=1, lr=1e-12),
        on_step=lambda step, steps, loss, tokens: losses.append(loss),
    )  # fmt: skip
    assert sorted(losses) == pytest.approx([math.log(2), math.log(6)], rel=1e-6)
    assert done.loss == pytest.approx((math.log(2) + 3 * math.log(6)) / 4, rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])
def test_the_gradient_by_hand_however_the_batch_is_split(accumulate: int) -> None:
    """Bias 0: d loss / d bias_v = 1/8 - (share of v among the 11 response tokens).

    The responses have 1, 3, 2 and 5 tokens: 1: 1, 2: 3, 3: 1, 4: 1, 5: 2, 6: 2, 7: 1. A mean of the parts' means would
    weigh a token of the short rows more.
    """
    with gradients() as seen:
        trained(Constant([0.0] * V), MIXED, Local(steps=1, batch=4, accumulate=accumulate, clip=1e9))
    share = torch.tensor([0, 1, 3, 1, 1, 2, 2, 1]) / 11
    assert seen[0].tolist() == pytest.approx((1 / V - share).tolist(), abs=1e-6)


def test_accumulation_gives_the_same_update_of_a_transformer() -> None:
    def after(accumulate: int) -> torch.Tensor:
        model = llama()
        trained(model, MIXED, Local(steps=3, batch=4, accumulate=accumulate, lr=1e-3))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = after(1)
    assert float((whole - torch.cat([p.detach().flatten() for p in llama().parameters()])).abs().max()) > 1e-3
    for parts in (2, 3):
        assert float((after(parts) - whole).abs().max()) < 2e-5


def test_a_classifier_counts_rows() -> None:
    """Three classes, head zero: ln 3 a row, whatever the lengths."""
    model = classifier(3)
    torch.nn.init.zeros_(model.score.weight)
    rows = Some([([3, 4], [0]), ([3, 4, 5, 6], [2]), ([7], [1])])
    done = trained(model, rows, Local(steps=1, batch=3), classifier=True)
    assert done.loss == pytest.approx(math.log(3), rel=1e-6)
    assert done.tokens == 12


@pytest.mark.parametrize("clip", [0.05, 1e3])
def test_clipping(clip: float) -> None:
    """Bias 0, one label: the gradient is 1/8 - onehot, of norm sqrt(7/64 + 49/64) = sqrt(7/8) = 0.9354."""
    with gradients() as seen:
        trained(Constant([0.0] * V), Some([answer([3], [5])]), Local(steps=1, batch=1, clip=clip))
    assert float(seen[0].norm()) == pytest.approx(min(clip, math.sqrt(7 / 8)), rel=1e-4)
    assert float(seen[0][5] / seen[0][4]) == pytest.approx(-7, rel=1e-4)


def test_weight_decay_pulls_and_rounds_start_afresh() -> None:
    """AdamW: w <- w (1 - lr x decay) - lr sign(g), the moments of the round before forgotten; lr 0.1, decay 0.5."""
    model = Constant([0.0] * V)
    local = Local(steps=1, batch=1, lr=0.1, weight_decay=0.5, schedule="constant")
    trained(model, Some([answer([3], [5])]), local, round=0, rounds=2)
    trained(model, Some([answer([3], [5])]), local, round=1, rounds=2)
    assert model.bias[5].item() == pytest.approx(0.1 * 0.95 + 0.1, rel=1e-5)
    assert model.bias[0].item() == pytest.approx(-0.1 * 0.95 - 0.1, rel=1e-5)


def test_every_step_is_told() -> None:
    """Tokens add up, padding and all.

    Twelve rows of 3, 4, 5 and 6 tokens, three each, make batches of length 4, 5 and 6 in some order: 16, 20, 24 tokens.
    """
    told: list[tuple[int, int, int]] = []
    model = Constant([0.0] * V)
    local = Local(steps=3, batch=4)
    done = trained(model, MIXED, local, on_step=lambda step, steps, loss, tokens: told.append((step, steps, tokens)))
    assert [(step, steps) for step, steps, _ in told] == [(1, 3), (2, 3), (3, 3)]
    assert sorted(np.diff([0, *(tokens for _, _, tokens in told)])) == [16, 20, 24]
    assert done.tokens == 60
    assert done.step_seconds > 0


# -- divergence


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_raises(value: float) -> None:
    model = Constant([value] + [0.0] * (V - 1))
    with pytest.raises(DivergedError, match=r"loss nan, gradient norm nan in step 1 of 3; lower local.lr"):
        trained(model, MIXED, Local(steps=3, batch=4))
    assert not model.training


def test_a_gradient_that_is_no_number_raises_before_it_does_harm() -> None:
    model = Constant([0.0] * V)
    model.bias.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(DivergedError, match=r"loss 2.08, gradient norm (inf|nan)"):
        trained(model, MIXED, Local(steps=3, batch=4))
    assert model.bias.tolist() == [0.0] * V
    assert model.bias.grad is None


# -- checkpointing, dropout


def adapted(dropout: float = 0.0) -> Any:
    """A Llama with a LoRA whose B is not zero, so that A has a gradient too."""
    model = lora.inject(llama(), lora.LoraSpec(4, 8, ("all-linear",), dropout))
    torch.manual_seed(1)
    lora.load(model, {name: torch.randn(p.shape) * 0.1 for name, p in lora.parameters(model).items()})
    return model


def test_checkpointing_changes_memory_not_the_result() -> None:
    """Layers run once more in the backward pass; losses and adapters are the same bits; off again afterwards."""
    model = adapted()
    begin, calls = lora.read(model), [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    model.get_base_model().model.layers[0].self_attn.register_forward_pre_hook(count)

    def run(wanted: bool) -> tuple[int, list[float], dict[str, torch.Tensor]]:
        lora.load(model, begin)
        calls[0], losses = 0, []
        local = Local(steps=3, batch=4, checkpointing=wanted)
        trained(model, MIXED, local, on_step=lambda step, steps, loss, tokens: losses.append(loss))
        return calls[0], losses, lora.read(model)

    without, checkpointed, again = run(False), run(True), run(False)
    assert [without[0], checkpointed[0], again[0]] == [3, 6, 3]
    for _, losses, adapter in (checkpointed, again):
        assert losses == without[1]
        assert all(torch.equal(adapter[name], without[2][name]) for name in begin)
    assert all(not torch.equal(checkpointed[2][name], begin[name]) for name in begin)


def test_dropout_repeats(run_file: Path) -> None:
    """An edge's round is the same bits whatever was drawn before it; and dropout does drop."""

    def update(dropout: float, drawn: int) -> dict[str, torch.Tensor]:
        run = load(run_file, f"method.dropout={dropout}")
        method = make_method(run.method)
        fleet = SerialFleet(run, method)
        fleet.open()
        state = method.start(server_site(run, method, []), np.random.default_rng(0))
        torch.rand(drawn)
        (report,) = fleet.run({"b": state}, 1)
        assert isinstance(report, Report)
        return dict(report.message().tensors)

    first, again, without = update(0.5, 1), update(0.5, 7), update(0.0, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], without[name]) for name in first)
