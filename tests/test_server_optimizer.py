"""Server optimizers against torch's own on minus the pseudo-gradient, numbers by hand, and runs that are resumed."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from runs import assert_same
from toy_rounds import FAST, FLEETS, SPEEDS, Adding, on_fleet, toy_run, x

from fedpipe_ray.buffered import federate_buffered
from fedpipe_ray.loop import Start, federate
from fedpipe_ray.message import Message
from fedpipe_ray.server_optimizer import apart, stepped, together
from fedpipe_ray.server_settings import OPTIMIZERS, Optimizer

SHAPE, ROUNDS = (3, 4), 6


def changes(seed: int = 0) -> list[torch.Tensor]:
    """The pseudo-gradients of some rounds, of different sizes, in float64."""
    draw = torch.Generator().manual_seed(seed)
    return [10.0 ** (k % 3 - 1) * torch.randn(SHAPE, generator=draw, dtype=torch.float64) for k in range(ROUNDS)]


def ours(how: Optimizer, start: torch.Tensor) -> list[torch.Tensor]:
    """The states after each of these rounds."""
    state, moments, found = Message({"w": start}), dict[str, torch.Tensor](), []
    for d in changes():
        state, moments = stepped(state, Message({"w": state.tensors["w"] + d}), moments, how)
        found.append(state.tensors["w"])
    return found


def theirs(
    start: torch.Tensor, make: Callable[[list[Any]], torch.optim.Optimizer],
    before_step: Callable[[torch.optim.Optimizer, int], None] = lambda optimizer, t: None,
) -> list[torch.Tensor]:  # fmt: skip
    """What an optimizer of torch makes of minus the same changes."""
    p, found = torch.nn.Parameter(start.clone()), []
    optimizer = make([p])
    for t, d in enumerate(changes(), start=1):
        p.grad = -d
        before_step(optimizer, t)
        optimizer.step()
        found.append(p.detach().clone())
    return found


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


START = torch.linspace(-1, 1, 12, dtype=torch.float64).view(SHAPE)


# -- oracles


@pytest.mark.parametrize(("lr", "beta1"), [(1.0, 0.9), (0.3, 0.5), (1.0, 0.0)])
def test_fedavgm_is_torch_sgd_with_momentum(lr: float, beta1: float) -> None:
    how = Optimizer(name="fedavgm", lr=lr, beta1=beta1)
    assert_equal(ours(how, START), theirs(START, lambda p: torch.optim.SGD(p, lr=lr, momentum=beta1)))


def test_fedadagrad_is_torch_adagrad_that_starts_at_tau_squared() -> None:
    """torch adds eps outside the root, too."""
    how = Optimizer(name="fedadagrad", lr=0.1, tau=0.03)
    expected = theirs(START, lambda p: torch.optim.Adagrad(p, lr=0.1, eps=0.03, initial_accumulator_value=0.03**2))
    assert_equal(ours(how, START), expected)


@pytest.mark.parametrize("decay", [None, 0.2])
def test_fedadam_and_fedadamw_are_torch_s_without_their_bias_correction(decay: float | None) -> None:
    """torch: p - lr' (m / c1) / (sqrt(v / c2) + eps') = p - lr m / (sqrt(v) + tau) for lr' = lr c1 / sqrt(c2) and
    eps' = tau / sqrt(c2), with c = 1 - beta^t; its decay is lr' w', so that w' = lr w / lr'. Both start at v = tau^2.
    """
    lr, beta1, beta2, tau = 0.1, 0.9, 0.99, 0.03
    name, kind = ("fedadam", torch.optim.Adam) if decay is None else ("fedadamw", torch.optim.AdamW)
    how = Optimizer(name=name, lr=lr, beta1=beta1, beta2=beta2, tau=tau, weight_decay=decay)

    def correct(optimizer: torch.optim.Optimizer, t: int) -> None:
        (group,) = optimizer.param_groups
        c1, c2 = 1 - beta1**t, 1 - beta2**t
        group["lr"], group["eps"] = lr * c1 / math.sqrt(c2), tau / math.sqrt(c2)
        group["weight_decay"] = lr * (decay or 0) / group["lr"]
        if t == 1:
            (p,) = group["params"]
            optimizer.state[p] = {
                "step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.full_like(p, tau**2),
            }  # fmt: skip

    expected = theirs(START, lambda p: kind(p, lr=lr, betas=(beta1, beta2)), correct)
    assert_equal(ours(how, START), expected)


def test_without_decay_fedadamw_is_fedadam() -> None:
    one, other = Optimizer(name="fedadam"), Optimizer(name="fedadamw", weight_decay=0.0)
    assert all(torch.equal(a, b) for a, b in zip(ours(one, START), ours(other, START), strict=True))


def test_fedavgm_without_momentum_is_the_mean() -> None:
    (first, *_), (d, *_) = ours(Optimizer(name="fedavgm", beta1=0.0), START), changes()
    torch.testing.assert_close(first, START + d)


# -- by hand


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        # tau = 1, so that v = 1 at first; lr = 1, betas 0.5; both changes are 2.
        ("fedavgm", 2, 5),  # m = 2, then 1 + 2 = 3
        ("fedadagrad", 1 / (5**0.5 + 1), 1 / (5**0.5 + 1) + 1.5 / (9**0.5 + 1)),  # v = 1 + 4, 5 + 4; m = 1, 1.5
        ("fedadam", 1 / (2.5**0.5 + 1), 1 / (2.5**0.5 + 1) + 1.5 / (3.25**0.5 + 1)),  # v = .5 + 2, 1.25 + 2
        ("fedyogi", 1 / (3**0.5 + 1), 1 / (3**0.5 + 1) + 1.5 / (5**0.5 + 1)),  # 1 < 4: v = 1 + 2; 3 < 4: v = 3 + 2
    ],
)
def test_two_steps_by_hand(name: Any, first: float, second: float) -> None:
    own = {key: 0.5 for key in ("beta1", "beta2") if key in OPTIMIZERS[name]} | {"lr": 1.0}
    how = Optimizer(name=name, **own, **({"tau": 1.0} if name != "fedavgm" else {}))
    state, moments = Message({"w": torch.zeros(1)}), {}
    for expected in (first, second):
        state, moments = stepped(state, Message({"w": state.tensors["w"] + 2}), moments, how)
        assert state.tensors["w"].item() == pytest.approx(expected)


def test_yogi_falls_by_as_much_where_changes_are_small() -> None:
    """v = 4 and d^2 = 1: v - (1 - 0.75) 1 sign(4 - 1) = 3.75; Adam's would be 0.75 x 4 + 0.25 = 3.25."""
    before, after = Message({"w": torch.zeros(1)}), Message({"w": torch.ones(1)})
    for name, expected in (("fedyogi", 3.75), ("fedadam", 3.25)):
        how = Optimizer(name=name, beta2=0.75)
        _, moments = stepped(before, after, {"v/w": torch.full((1,), 4.0)}, how)
        assert moments["v/w"].item() == expected


def test_decay_is_of_the_state_before() -> None:
    """No change: x goes to (1 - 0.5 x 0.2) x = 0.9 x."""
    state, same = (Message({"w": torch.tensor([10.0])}) for _ in range(2))
    after, _ = stepped(state, same, {}, Optimizer(name="fedadamw", lr=0.5, weight_decay=0.2))
    assert after.tensors["w"].item() == pytest.approx(9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_that_is_passed_in_is_changed(name: Any) -> None:
    """Nor what is aside, nor whole numbers; numbers of the state stay those of the new one."""
    before = Message({"w": torch.ones(2), "s": torch.ones(2), "i": torch.ones(2, dtype=torch.int32)}, {"n": 1.0})
    after = Message({"w": torch.zeros(2), "s": torch.zeros(2), "i": torch.zeros(2, dtype=torch.int32)}, {"n": 2.0})
    how = Optimizer(name=name, beta1=0.5)
    state, moments = stepped(before, after, {}, how, ("s*",))
    kept = {key: tensor.clone() for key, tensor in moments.items()}
    again, _ = stepped(before, after, moments, how, ("s*",))
    assert_same(dict(moments), kept)
    assert set(moments) == {"m/w", "v/w"} - ({"v/w"} if name == "fedavgm" else set())
    assert [before.tensors["w"].tolist(), after.tensors["w"].tolist()] == [[1, 1], [0, 0]]
    for found in (state, again):
        assert (found.tensors["s"].tolist(), found.tensors["i"].tolist(), found.numbers) == ([0, 0], [0, 0], {"n": 2})


def test_what_a_round_leaves_or_brings_makes_no_step() -> None:
    """The very tensor of the state before, and one that it had not; momentum and decay stand still, too."""
    before = Message({"w": torch.ones(1), "u": torch.ones(1)})
    after = Message({"w": before.tensors["w"], "u": torch.ones(1), "new": torch.ones(1)})
    moments = {"m/w": torch.ones(1), "v/w": torch.ones(1), "m/u": torch.ones(1), "v/u": torch.ones(1)}
    state, found = stepped(before, after, moments, Optimizer(name="fedadamw", weight_decay=0.5))
    assert [state.tensors[name] is after.tensors[name] for name in ("w", "u", "new")] == [True, False, True]
    assert [found[key] is moments[key] for key in moments] == [True, True, False, False]
    assert found.keys() == moments.keys()


def test_state_and_moments_lie_in_one_file(tmp_path: Path) -> None:
    state, moments = Message({"w": torch.ones(2)}, {"n": 1.0}), {"m/w": torch.zeros(2), "v/w": torch.full((2,), 3.0)}
    together(state, moments).save(tmp_path / "both")
    found, kept = apart(Message.load(tmp_path / "both"))
    assert_same(dict(found.tensors), dict(state.tensors))
    assert_same(dict(kept), moments)
    assert found.numbers == {"n": 1.0}
    assert together(state, {}).tensors == state.tensors


# -- rounds


def adding(optimizer: dict[str, Any], edges: Mapping[str, Any] = SPEEDS, **server: Any) -> Any:
    """A run of edges that add 1, 2, 3 and weigh 10, 20, 30: a round's pseudo-gradient is 7/3."""
    return toy_run(edges, server={"optimizer": optimizer, **server})


def test_momentum() -> None:
    """m = 1, 1.5, 1.75 times 7/3 for beta1 0.5."""
    done = on_fleet("serial", 3, Adding(), adding({"name": "fedavgm", "beta1": 0.5}))
    assert [x(one) for one in done] == pytest.approx([7 / 3, 7 / 3 * 2.5, 7 / 3 * 4.25])


@pytest.mark.parametrize("kind", FLEETS)
def test_it_acts_on_what_a_robust_rule_makes(kind: str, ray_here: None) -> None:
    """On both fleets. The median adds 2, with momentum 2, 3, 3.5."""
    run = adding({"name": "fedavgm", "beta1": 0.5}, aggregator={"name": "median"})
    assert [x(one) for one in on_fleet(kind, 3, Adding(), run)] == pytest.approx([2, 5, 8.5])


def test_a_round_that_is_skipped_makes_no_step() -> None:
    """Too few for the trimmed mean in round 1: state and momentum stand; then m = 0.5 x 2 + 2 = 3."""
    run = adding({"name": "fedavgm", "beta1": 0.5}, aggregator={"name": "trimmed_mean"})
    done = on_fleet("serial", 3, Adding(fails={"e3@1": "diverge"}), run)
    assert [x(one) for one in done] == pytest.approx([2, 2, 5])
    assert done[0].moments["m/x"] is done[1].moments["m/x"]


def test_buffered_rounds_step_too() -> None:
    """With equal speeds and a buffer of all they are the synchronous ones, bit for bit."""
    even = {name: {**FAST, "compute_flops": "1GFLOP/s"} for name in SPEEDS}
    run = adding({"name": "fedadam"}, even)
    one = on_fleet("serial", 4, Adding(), run)
    other = on_fleet("serial", 4, Adding(), run, federate_buffered, buffer=3)
    assert [x(done) for done in one] == [x(done) for done in other]
    assert_same(dict(one[-1].moments), dict(other[-1].moments))
    plain = on_fleet("serial", 4, Adding(), toy_run(even))
    assert x(plain[-1]) != x(one[-1])


@pytest.mark.parametrize("loop", [federate, federate_buffered])
def test_a_loop_goes_on_with_the_moments(loop: Any) -> None:
    options = {"buffer": 2} if loop is federate_buffered else {}
    run = adding({"name": "fedyogi"})
    whole = on_fleet("serial", 5, Adding(), run, loop, **options)
    at = whole[2]
    start = Start(at.state, 3, clock_seconds=at.clock_seconds, flights=at.flights, moments=at.moments)
    rest = on_fleet("serial", 5, Adding(), run, loop, start=start, **options)
    assert [x(one) for one in rest] == [x(one) for one in whole[3:]]
    without = Start(at.state, 3, clock_seconds=at.clock_seconds, flights=at.flights)
    assert x(on_fleet("serial", 5, Adding(), run, loop, start=without, **options)[0]) != x(whole[3])


ALIVE: list[weakref.ref[Any]] = []
SEEN: list[int] = []


@dataclass(frozen=True, kw_only=True)
class Watched(Adding):
    """Adding that notes how many updates of edges are alive when an edge begins."""

    asynchronous: ClassVar[bool] = False

    def local_update(self, order: Message, site: Any, rng: Any) -> Message:
        SEEN.append(sum(ref() is not None for ref in ALIVE))
        update = super().local_update(order, site, rng)
        ALIVE.append(weakref.ref(update.tensors["x"]))
        return update


def test_one_update_is_held_whatever_the_number_of_edges() -> None:
    """Through fleet, checks, mean and optimizer: when an edge begins, no update before it is left."""
    ALIVE.clear(), SEEN.clear()
    run = adding({"name": "fedadam"}, {f"e{n}": FAST for n in range(1, 9)}, norm_clip=1.5)
    on_fleet("serial", 2, Watched(), run)
    assert SEEN == [0] * 16


def test_a_run_keeps_the_defaults_it_began_with() -> None:
    how = adding({"name": "fedadagrad"}).server.optimizer
    assert (how.lr, how.beta1, how.beta2, how.tau, how.weight_decay) == (0.01, 0.0, None, 1e-3, None)
