"""FedProx and SCAFFOLD against numbers derived by hand on quadratics, and on a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import assert_refused
from runs import assert_same, load, opened_run
from torch import nn
from toys import CPU, PAD, Some, answer

from fedpipe_ray.batches import Batch
from fedpipe_ray.control import NEVER, NEWEST, Correction, counted, kept
from fedpipe_ray.costs import Cost
from fedpipe_ray.loop import Start, federate
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.methods.scaffold import CONTROL, GONE, RESTARTS, USED, used_by
from fedpipe_ray.proximal import Near
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Local
from fedpipe_ray.site import attempt
from fedpipe_ray.train import train

SGD = "local={optimizer: sgd, schedule: constant, lr: 0.1, clip: 1e9, steps: 3, batch: 4}"
Edge = tuple[float, float]  # h and a of f(w) = h / 2 (w - a)^2


class Point(nn.Module):
    """One number w."""

    is_activation_checkpointing = False

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w]))


def steps(
    edge: Edge, w: float, rate: float, penalty: Callable[[nn.Parameter], Callable[[], torch.Tensor]] | None = None,
    shift: float | None = None, count: int = 2, **changes: Any,
) -> tuple[float, float]:  # fmt: skip
    """(w after the local steps on f, the mean gradient along them); through train.train, as every method's."""
    (h, a), model = edge, Point(w)

    def f(model: Point, batch: Batch, device: torch.device) -> torch.Tensor:
        return batch.units * (h / 2 * (model.w - a).square()).sum()

    correct = Correction({"w": model.w}, {"w": torch.tensor([shift or 0.0])})
    settings = {"optimizer": "sgd", "schedule": "constant", "clip": 1e9, **changes}
    train(
        model, Some([answer([3], [5])]), Local(steps=count, batch=1, lr=rate, **settings), round=0, rounds=1,
        rng=np.random.default_rng(0), device=CPU, pad_id=PAD, objective=f,
        penalty=None if penalty is None else penalty(model.w), correct=correct,
    )  # fmt: skip
    return model.w.item(), correct.mean()["w"].item()


# -- FedProx


def test_fedprox_by_hand() -> None:
    """f = (w - 4)^2 / 2 from 0 at rate 1/2: -4 takes w to 2; then -2 + mu (2 - 0), with mu = 1 nothing: w stays.

    Without the term w goes on to 3. From there on it stays too: 2 is the minimum of f + (w - 0)^2 / 2.
    """

    def near(w: nn.Parameter) -> Near:
        return Near({"w": w}, {"w": torch.zeros(1)}, mu=1.0)

    assert steps((1.0, 4.0), 0.0, 0.5, near)[0] == pytest.approx(2.0)
    assert steps((1.0, 4.0), 0.0, 0.5)[0] == pytest.approx(3.0)
    assert steps((1.0, 4.0), 0.0, 0.5, near, count=9)[0] == pytest.approx(2.0)


def test_the_term_and_its_gradient() -> None:
    """mu / 2 (|| (3, 4) ||^2 + 2^2) = 0.05 x 29; mu (w - w_0)."""
    now = {"a": nn.Parameter(torch.tensor([3.0, 5.0])), "b": nn.Parameter(torch.tensor([[2.0]]))}
    term = Near(now, {"a": torch.tensor([0.0, 1.0]), "b": torch.zeros(1, 1)}, mu=0.1)()
    term.backward()
    assert term.item() == pytest.approx(1.45)
    flat = torch.cat([p.grad.flatten() for p in now.values() if p.grad is not None])
    assert flat.tolist() == pytest.approx([0.3, 0.4, 0.2])


def updates_of(run_file: Path, *overrides: str) -> tuple[Message, Message]:
    """(the state before round 0, what edge a makes of it)."""
    fleet, _, _, state = opened_run(run_file, *overrides)
    _, update = attempt(fleet.sites["a"], Message(state.tensors), 0)
    assert update is not None
    return state, update


def test_without_mu_it_is_lora_and_with_more_it_stays_nearer(run_file: Path) -> None:
    plain = updates_of(run_file, SGD)[1]
    found = {}
    for mu in (0.0, 1.0, 5.0):
        state, update = updates_of(run_file, SGD, f"method={{name: fedprox, rank: 4, alpha: 8, mu: {mu}}}")
        found[mu] = float(sum((t - state.tensors[n]).square().sum() for n, t in update.tensors.items()))
        if mu == 0:
            assert_same(dict(update.tensors), dict(plain.tensors))
    assert found[0.0] > 1.1 * found[1.0] > 1.1**2 * found[5.0] > 0


# -- SCAFFOLD


EDGES: dict[str, Edge] = {"a": (1.0, 0.0), "b": (2.0, 3.0)}  # the sum is least at w = 6 / 3 = 2


def scaffold_rounds(
    run_file: Path, asked: list[list[str]], corrected: bool = True, late: Sequence[tuple[int, str]] = (),
    lost: Sequence[tuple[int, str]] = (),
) -> list[tuple[float, float]]:  # fmt: skip
    """(x, c) after each round from x = 1: two steps of rate 1/4 on each edge asked; the method's own plan, aggregate,
    and record of what counts. late: (round, edge) of reports that the server does not use; lost: before which round an
    edge's private state is gone."""
    run = load(run_file, "method={name: scaffold}", "fleet.edges={a: {}, b: {}}")
    method, server = make_method(run.method), server_site(run, make_method(run.method), [])
    state = Message({"w": torch.ones(1), f"{CONTROL}w": torch.zeros(1)})
    private, found = dict[str, Message | None](), []
    for round, names in enumerate(asked):
        orders = method.plan(state, dict.fromkeys(names), server, round, np.random.default_rng(0))
        reports: list[Report | Lost] = []
        for edge in EDGES:
            if edge not in names:
                reports.append(Lost(edge, "gone"))
                continue
            if (round, edge) in lost:
                private[edge] = None
            x, c = (orders[edge].tensors[name].item() for name in ("w", f"{CONTROL}w"))
            used = int(orders[edge].numbers[USED])
            own = counted(private.get(edge), used)
            before = own["w"].item() if own else 0.0
            y, mean = steps(EDGES[edge], x, 0.25, shift=c - before if corrected else 0.0)
            if corrected:
                assert mean == pytest.approx(before - c + (x - y) / (2 * 0.25), abs=1e-5)  # option II
            tensors = {"w": torch.tensor([y]), f"{CONTROL}w": torch.tensor([c + mean - before])}
            private[edge] = kept(own or {}, used if own else NEVER, {"w": torch.tensor([mean])}, round)
            update = Message(tensors, {GONE: 1.0} if own is None else {})
            told = Report(edge, round, 1.0, 0.0, Cost(), fetch=lambda update=update: update)
            reports.append(Lost(edge, "late", status="late") if (round, edge) in late else told)
        state = method.aggregate(state, reports, server, round, np.random.default_rng(0))
        found.append((state.tensors["w"].item(), state.tensors[f"{CONTROL}w"].item()))
    return found


def test_scaffold_by_hand(run_file: Path) -> None:
    """f_a = w^2 / 2, f_b = (w - 3)^2, x = 1, eta = 1/4, K = 2, all control variates 0. By hand, and by this script:

        x, c, ca, cb = 1.0, 0.0, 0.0, 0.0
        for _ in range(2):
            ya = yb = x
            for _ in range(2):
                ya -= (ya - ca + c) / 4
                yb -= (2 * (yb - 3) - cb + c) / 4
            na, nb = ca - c + (x - ya) * 2, cb - c + (x - yb) * 2
            x, c, ca, cb = (ya + yb) / 2, c + (na - ca + nb - cb) / 2, na, nb

    Round 1: a goes 1, 0.75, 0.5625, so c_a = 0.875; b goes 1, 2, 2.5, so c_b = -3; x = 1.53125, c = -1.0625.
    Round 2: both are shifted by 1.9375, a downwards: it goes 1.6328125, 1.708984375 (c_a = 1.58203125), and b goes
    1.78125, 1.90625 (c_b = -2.6875); x = 1.8076171875, c = -0.552734375.
    """
    found = scaffold_rounds(run_file, [["a", "b"]] * 2)
    assert found == [pytest.approx((1.53125, -1.0625)), pytest.approx((1.8076171875, -0.552734375))]


def test_the_drift_is_gone(run_file: Path) -> None:
    """FedAvg's fixed point is that of x = (9/16 x + (x - 3) / 4 + 3) / 2, 36 / 19; SCAFFOLD's the sum's minimum, 2."""
    everyone = [["a", "b"]] * 60
    assert scaffold_rounds(run_file, everyone, corrected=False)[-1][0] == pytest.approx(36 / 19, abs=1e-4)
    assert scaffold_rounds(run_file, everyone)[-1] == pytest.approx((2.0, 0.0), abs=1e-4)


def test_edges_that_are_not_asked_keep_their_share_of_c(run_file: Path) -> None:
    """a alone of two: x is its y, c moves by half of its change; in the end 2 again, one edge at a time."""
    assert scaffold_rounds(run_file, [["a"]]) == [pytest.approx((0.5625, 0.4375))]
    assert scaffold_rounds(run_file, [["a"], ["b"]] * 60)[-1][0] == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("late", [[(0, "b")], [(0, "b"), (1, "b"), (3, "a"), (7, "b"), (8, "b")]])
def test_reports_that_are_not_used_do_not_count(late: list[tuple[int, str]], run_file: Path) -> None:
    """b late in round 0: a's y and half of its c_a, as if it alone had been asked; in the end 2, where c = 0 again.

    Were b to go on from the c_b of its late report, which c never saw, x would end at 1.
    """
    found = scaffold_rounds(run_file, [["a", "b"]] * 200, late=late)
    assert found[0] == pytest.approx((0.5625, 0.4375))
    assert found[-1] == pytest.approx((2.0, 0.0), abs=1e-4)


@pytest.mark.parametrize("lost", [[(5, "b")], [(5, "b"), (9, "a"), (13, "a"), (13, "b")]])
def test_control_variates_begin_anew_where_one_is_gone(lost: list[tuple[int, str]], run_file: Path) -> None:
    """c is 0 after that round, whatever it was; then it goes on, to 2."""
    found = scaffold_rounds(run_file, [["a", "b"]] * 200, lost=lost)
    assert all(found[round][1] == 0 != found[round - 1][1] for round, _ in lost)
    assert found[-1] == pytest.approx((2.0, 0.0), abs=1e-4)


def assert_c_is_the_mean(state: Message, private: dict[str, Message | None]) -> None:
    """c = 1 / 3 sum c_i of those that count."""
    own = [counted(private[edge], int(state.numbers.get(used_by(edge), NEVER))) for edge in private]
    assert None not in own
    for name in (name for name in state.tensors if name.startswith(CONTROL)):
        mean = sum(one[name.removeprefix(CONTROL)] for one in own if one) / len(private)
        torch.testing.assert_close(state.tensors[name], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("wire", "rate"),
    [
        ("{dtype: float32}", 0.01),
        ("{dtype: bfloat16}", 0.01),
        ("{codec: {name: randomk, share: 0.3}}", 0.003),
        ("{codec: {name: topk, share: 0.1}, error_feedback: true}", 0.0015),
    ],
)
def test_c_is_the_mean_of_what_counts_in_a_run(wire: str, rate: float, run_file: Path) -> None:
    """Of three edges c is slow: one too many in the first round, late in the second. Then b's private state is gone."""
    slow = f"fleet.edges.c.uplink_bps={rate}Mbit/s"
    settings = (SGD, "method={name: scaffold, rank: 2, alpha: 4}", f"wire={wire}", slow)
    fleet, method, server, _ = opened_run(run_file, *settings)
    sites, start = fleet.sites, None
    for number, options in enumerate([{"fraction": 0.67, "over_select": 1.5}, {"deadline_seconds": 5.0}, {}, {}]):
        (done,) = federate(
            method, fleet, server, rounds=number + 1, seed=0, evaluate_every=0, start=start, **options
        )  # fmt: skip
        assert [one.edge for one in done.outcomes.values() if isinstance(one, Lost)] == ["c"] * (number < 2)
        assert_c_is_the_mean(done.state, {edge: site.private_before(number + 1) for edge, site in sites.items()})
        start = Start(done.state, number + 1, clock_seconds=done.clock_seconds)
    sites["b"]._rests = {}  # as on a new machine
    (done,) = federate(method, fleet, server, rounds=5, seed=0, evaluate_every=0, start=start)
    assert done.state.numbers == {RESTARTS: 1.0}
    assert not any(tensor.any() for name, tensor in done.state.tensors.items() if name.startswith(CONTROL))
    start = Start(done.state, 5, clock_seconds=done.clock_seconds)
    *_, done = federate(method, fleet, server, rounds=7, seed=0, fraction=0.67, evaluate_every=0, start=start)
    assert_c_is_the_mean(done.state, {edge: site.private_before(7) for edge, site in sites.items()})


def test_an_edge_sends_option_two_of_its_own_steps(run_file: Path) -> None:
    """On a model, with SGD: c + c_i+ - c_i of the second round, c_i from its private state and c from the order."""
    fleet, _, _, state = opened_run(run_file, SGD, "method={name: scaffold, rank: 4, alpha: 8}")
    site = fleet.sites["a"]
    _, first = attempt(site, Message(state.tensors, {USED: NEVER}), 0)
    assert first is not None
    own = {name: tensor.clone() for name, tensor in (counted(site.private, 0) or {}).items()}
    assert own.keys() == {name for name in state.tensors if not name.startswith(CONTROL)}
    c = {CONTROL + name: 0.3 * tensor for name, tensor in own.items()}
    x = {name: first.tensors[name] for name in own}
    _, second = attempt(site, Message({**x, **c}, {USED: 0}), 1)
    assert second is not None
    assert site.private is not None
    for name, before in own.items():
        after, newest = before - c[CONTROL + name] + (x[name] - second.tensors[name]) / 0.3, NEWEST + name
        torch.testing.assert_close(site.private.tensors[newest], after, rtol=1e-3, atol=1e-4)
        assert torch.equal(site.private.tensors[name], before)
        sent = c[CONTROL + name] + site.private.tensors[newest] - before
        torch.testing.assert_close(second.tensors[CONTROL + name], sent, rtol=0, atol=1e-6)
    assert any(float(tensor.abs().max()) > 0.01 for tensor in own.values())


def test_the_correction_reaches_adamw(run_file: Path) -> None:
    """Its first step is the sign of the corrected gradient: f' = 1 with a shift of -3 goes up, not down."""
    adamw = {"optimizer": "adamw"}
    assert steps((1.0, 0.0), 1.0, 0.25, shift=0.0, count=1, **adamw)[0] == pytest.approx(0.75)
    assert steps((1.0, 0.0), 1.0, 0.25, shift=-3.0, count=1, **adamw)[0] == pytest.approx(1.25)


def test_clipping_is_refused(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("server.norm_clip=1", "method.name=scaffold")
    assert_refused(capsys, "run", run_file, *settings, says="server.norm_clip: 1 would shrink", out=tmp_path / "out")


@pytest.mark.parametrize("wrong", ["{name: fedprox, mu: -1}", "{name: scaffold, server_lr: 0}"])
def test_wrong_settings_are_told(wrong: str, run_file: Path) -> None:
    with pytest.raises(ValueError, match=r"method.(mu: -1.0 must not be negative|server_lr: 0.0 must be above 0)"):
        make_method(load(run_file, f"method={wrong}").method)
