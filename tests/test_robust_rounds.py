"""Robust aggregation in federated runs in which a minority of the edges attacks, clipping, and what is refused."""

from __future__ import annotations

import math
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from poisoned import Poisoned, accuracy
from refusals import assert_refused
from runs import load
from test_lost_edges import faulty
from test_robust import RULES, joined, server_of
from toy_rounds import FAST, SPEEDS, Adding, on_fleet, toy_run, x

from fedpipe_ray.arriving import fitting
from fedpipe_ray.averaging import average
from fedpipe_ray.buffered import federate_buffered
from fedpipe_ray.config import build
from fedpipe_ray.costs import Cost
from fedpipe_ray.errors import AllEdgesLost
from fedpipe_ray.loop import Round
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.server_checks import check_server
from fedpipe_ray.server_settings import Aggregator

# -- attacks


def rounds_of(attack: str, bad: int, server: dict[str, Any], count: int = 3, edges: int = 11) -> Round:
    """The last of a few rounds of eleven edges, of which the first `bad` attack."""
    names = [f"e{n}" for n in range(1, edges + 1)]
    method = build(Poisoned, {"bad": names[:bad], "attack": attack})
    run = toy_run(dict.fromkeys(names, FAST), server=server)
    check_server(run, method)
    return on_fleet("serial", count, method, run)[-1]


@pytest.fixture(scope="module")
def clean() -> float:
    """The accuracy if nobody attacks."""
    return accuracy(rounds_of("sign_flip", 0, {}).state)


@pytest.fixture(scope="module")
def destroyed() -> dict[str, float]:
    """That of the mean, by attack of three."""
    return {
        attack: accuracy(rounds_of(attack, 3, {}).state) for attack in ("label_flip", "sign_flip", "scaled", "gaussian")
    }


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("attack", ["label_flip", "sign_flip", "scaled", "gaussian"])
def test_a_minority_cannot_carry_a_robust_rule_away(
    attack: str, name: str, clean: float, destroyed: dict[str, float]
) -> None:
    """Three of eleven: the mean falls to chance or below, the rule stays near a run without attackers.

    Krum's result is that of one edge with 60 rows, so it cannot do as well as the mean of eleven.
    """
    assert clean > 0.95
    assert destroyed[attack] < 0.65
    found = accuracy(rounds_of(attack, 3, {"aggregator": {"name": name, **RULES[name]}}).state)
    assert found > 0.9


@pytest.mark.parametrize(("bound", "lost"), [("norm_bound", 3), ("norm_clip", 0)])
@pytest.mark.parametrize("attack", ["sign_flip", "scaled", "gaussian"])
def test_bounded_norms_keep_the_mean(
    attack: str, bound: str, lost: int, clean: float, destroyed: dict[str, float]
) -> None:  # fmt: skip
    """A bound above the norm of honest changes, 2: rejected, an attacker is lost; clipped, it is outvoted, 8 to 3."""
    done = rounds_of(attack, 3, {bound: 2.5})
    assert destroyed[attack] < 0.65
    assert accuracy(done.state) > (0.8 if bound == "norm_clip" else 0.9)
    assert sum(isinstance(one, Lost) for one in done.outcomes.values()) == lost


def test_an_attacker_who_claims_all_rows_gains_nothing_where_weights_do_not_count() -> None:
    """A weight of 1e9 carries the mean and the geometric median, which take the edge's word for it, and no other."""
    updates, weights = [[0.0, 0.1], [0.1, 0.0], [0.1, 0.1], [0.0, 0.0], [9.0, 9.0]], [1.0, 1, 1, 1, 1e9]
    for name in ("trimmed_mean", "median", "krum", "multi_krum"):
        assert max(joined(build(Aggregator, {"name": name}), updates, weights)) < 0.11
    assert joined(Aggregator(name="geometric_median"), updates, weights) == pytest.approx([9, 9], abs=1e-3)


# -- runs


def median(**settings: Any) -> Any:
    """A run of Adding's edges, which add 1, 2 and 3 and weigh 10, 20 and 30."""
    return toy_run(SPEEDS, server={"aggregator": {"name": "median"}}, **settings)


def test_buffered() -> None:
    """Equal speeds and a buffer of all three are synchronous rounds; of two, the median is the mean of both."""
    even = {name: {**FAST, "compute_flops": "1GFLOP/s"} for name in SPEEDS}
    run = toy_run(even, server={"aggregator": {"name": "median"}})
    assert [x(one) for one in on_fleet("serial", 3, Adding(), run, federate_buffered, buffer=3)] == [2, 4, 6]
    first, *_ = on_fleet("serial", 1, Adding(), median(), federate_buffered, buffer=2)  # e1 and e3, the faster ones
    assert x(first) == 2


def test_a_round_with_too_few_updates_is_skipped() -> None:
    """Trimmed by 1 it needs 3: in round 1 e3 is lost, the state stands and says so; then it goes on, from 2 to 4."""
    run = toy_run(SPEEDS, server={"aggregator": {"name": "trimmed_mean"}})
    done = on_fleet("serial", 3, Adding(fails={"e3@1": "diverge"}), run)
    assert [x(one) for one in done] == [2, 2, 4]
    assert [one.state.numbers.get("skipped") for one in done] == [None, 1, 1]
    lost = [one.reason for one in done[1].outcomes.values() if isinstance(one, Lost)]
    short = "server.aggregator: trimmed_mean with trim: 1 needs 3 updates, 2 came; lower trim to 0"
    assert lost == [short, short, "diverged: loss nan"]
    with pytest.raises(AllEdgesLost):
        on_fleet("serial", 1, Adding(fails=dict.fromkeys(SPEEDS, "diverge")), run)


def test_updates_that_cannot_be_used_are_left_out() -> None:
    """e2's is NaN: the median of 1 and 3 is 2."""
    (done,) = on_fleet("serial", 1, Adding(fails={"e2": "nan"}), median())
    assert (x(done), [report.edge for report in done.reports]) == (2, ["e1", "e3"])


@pytest.mark.parametrize(("name", "most"), [("mean", 0), ("median", 4)])
def test_how_many_updates_are_held(name: str, most: int) -> None:
    """When the last of five is fetched: none before it by the mean, all of them by the others."""
    alive: list[weakref.ref[Any]] = []
    seen = []

    def fetch() -> Message:
        seen.append(sum(ref() is not None for ref in alive))
        message = Message({"x": torch.ones(4)})
        alive.append(weakref.ref(message.tensors["x"]))
        return message

    reports = (Report(str(k), 0, 1.0, 0.0, Cost(), fetch=fetch) for k in range(5))
    average(Message({"x": torch.zeros(4)}), reports, server_of({"name": name}))
    assert seen[-1] == most


def test_the_state_is_nobody_s_own_update() -> None:
    """Krum's result is a copy: on Ray the update lies in the object store, which is to be freed."""
    update = Message({"x": torch.ones(2, 3)})
    reports = [Report(str(k), 0, 1.0, 0.0, Cost(), fetch=lambda: update) for k in range(5)]
    after = average(Message({"x": torch.zeros(2, 3)}), reports, server_of({"name": "krum"}))
    assert torch.equal(after.tensors["x"], update.tensors["x"])
    assert after.tensors["x"].data_ptr() != update.tensors["x"].data_ptr()


def test_a_poisoned_lora_run(run_file: Path) -> None:
    """c sends its change of the adapter a thousand times: the mean has its size, the median that of the others."""
    size = {}
    for name in ("mean", "median"):
        run = load(run_file, faulty("c", "huge"), f"server.aggregator.name={name}", "local.steps=1")
        (done,) = on_fleet("serial", 1, make_method(run.method), run)
        size[name] = max(float(tensor.abs().max()) for key, tensor in done.state.tensors.items() if "lora_B" in key)
    assert size["mean"] == pytest.approx(10 / 3, rel=0.01)  # a first step of AdamW is lr: a third of 1,000 x 0.01
    assert size["median"] == pytest.approx(0.01, rel=0.01)


def test_half_precision_on_the_wire(run_file: Path) -> None:
    """Updates come in bfloat16, clipped ones in float32; the state is float32."""
    for setting in ("server.aggregator.name=median", "server.norm_clip=0.1"):
        run = load(run_file, "wire.dtype=bfloat16", "local.steps=1", setting)
        (done,) = on_fleet("serial", 1, make_method(run.method), run)
        assert {tensor.dtype for tensor in done.state.tensors.values()} == {torch.float32}
        assert len(done.reports) == 3


# -- clipping


@pytest.mark.parametrize(
    ("update", "clip", "expected"),
    [
        ({"x": [4.0], "y": [6.0]}, 2.5, {"x": [2.5], "y": [4.0]}),  # a change of (3, 4), halved
        ({"x": [4.0], "y": [6.0]}, 5.0, {"x": [4.0], "y": [6.0]}),  # exactly at the norm
        ({"x": [1.0], "z": [6.0]}, 3.0, {"x": [1.0], "z": [3.0]}),  # z was not sent: it counts whole
        ({"x": [math.inf]}, 1.0, {"x": [math.inf]}),  # left to the method
    ],
)
def test_clipping_by_hand(update: Any, clip: float, expected: Any) -> None:
    sent = Message({"x": torch.ones(1), "y": torch.full((1,), 2.0)})
    message = Message({name: torch.tensor(value) for name, value in update.items()}, {"n": 1.0})
    found = fitting(lambda: message, sent, "float32", None, clip)
    assert {name: tensor.tolist() for name, tensor in found.tensors.items()} == expected
    assert found.numbers == {"n": 1.0}


# -- what is refused


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("server.aggregator.name=krum",), "krum with byzantine: 1 needs 5 updates, 3 can come; lower byzantine to 0, "
         "or have more than 3 of the 3 edges in a round (fleet.fraction: 1)"),
        (("server.aggregator={name: trimmed_mean, trim: 2}",), "trimmed_mean with trim: 2 needs 5 updates, 3 can come; "
         "lower trim to 1"),
        (("server.aggregator={name: multi_krum, byzantine: 0, keep: 2}",), "multi_krum with byzantine: 0 and keep: 2 "
         "needs 4 updates, 3 can come; lower keep to 1, or have more than 3"),
        (("server.aggregator={name: trimmed_mean}", "fleet.fraction=0.67"), "needs 3 updates, 2 can come; lower trim "
         "to 0, or have more than 2 of the 3 edges in a round (fleet.fraction: 0.67)"),
        (("server.aggregator={name: trimmed_mean}", "fleet.mode=buffered", "fleet.buffer=1"), "1 can come; lower trim "
         "to 0, or have more than 1 of the 3 edges in a round (fleet.buffer: 1)"),
        (("server.aggregator={name: krum, byzantine: -1}",), "server.aggregator.byzantine: -1 must be at least 0"),
        (("server.aggregator={name: median, trim: 1}",), "server.aggregator.trim: median has none; it has no keys"),
        (("server.aggregator={name: krum, keep: 1}",), "server.aggregator.keep: krum has none; its keys are byzantine"),
        (("server.aggregator={name: kram}",), "server.aggregator.name: 'kram' is not valid: ... 'multi_krum'"),
        (("server.aggregator={nam: krum}",), "unknown key server.aggregator.nam; did you mean name?"),
        (("server.aggregator={name: median}", "method={name: fedpipe}"), "server.aggregator: median takes the place of "
         "a mean of whole updates, and FedPipe takes none; methods that do: ... full, ... lora, ... or leave it out"),
        (("server.norm_clip=0",), "server.norm_clip: 0.0 must be above 0"),
        (("server={norm_clip: 2, norm_bound: 1}",), "server.norm_clip: 2.0 does nothing beside server.norm_bound: 1.0"),
        (("server.norm_clip=3", "method={name: fedkseed}"), "server.norm_clip: 3 bounds changes of tensors"),
    ],
)  # fmt: skip
def test_refused(
    overrides: tuple[str, ...], says: str, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, "run", run_file, *overrides, says=says, out=tmp_path / "out")


@given(st.sampled_from(["trimmed_mean", "krum", "multi_krum"]), st.integers(0, 5), st.integers(1, 20))
def test_the_remedy_helps(name: str, size: int, there: int) -> None:
    """A number of updates that is too small for a rule is enough for it as the message says, where it names one."""
    key = "trim" if name == "trimmed_mean" else "byzantine"
    said = Aggregator(name=name, **{key: size}).shortage(there)
    assert (said is None) == (there >= (2 * size + 1 if key == "trim" else 2 * size + 3))
    if said is not None and f"lower {key} to " in said:
        lower = int(said.rpartition(f"lower {key} to ")[2])
        assert lower < size
        assert Aggregator(name=name, **{key: lower}).shortage(there) is None
        assert Aggregator(name=name, **{key: lower + 1}).shortage(there) is not None


@given(st.integers(0, 5), st.integers(1, 20), st.integers(1, 20))
def test_multi_krum_s_remedy_helps(byzantine: int, keep: int, there: int) -> None:
    """As it stands, and no key is named that was small enough; of 20 and byzantine 1 keep 18 goes to 17."""
    own = {"byzantine": byzantine, "keep": keep}
    remedy = (Aggregator(name="multi_krum", **own).shortage(there) or "").rpartition("; ")[2]
    found = {key: int(value) for key, value in re.findall(r"(byzantine|keep) to (\d+)", remedy)}
    assert all(value < own[key] for key, value in found.items())
    if found:
        assert Aggregator(name="multi_krum", **own | found).shortage(there) is None
    assert Aggregator(name="multi_krum", byzantine=1, keep=18).shortage(20).endswith("; lower keep to 17")
