"""Runs with wire.codec: every method, both fleets, resume, retries, bytes and clock by hand, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from methods_made import needs_of
from runs import assert_like, here, load, manifest, records, tiny_run
from test_codecs import SETTINGS
from test_parity import assert_alike, rounds_of
from toy_rounds import FAST, Adding, Noting, toy_run

from fedpipe_ray.buffered import federate_buffered
from fedpipe_ray.codecs import make_codec
from fedpipe_ray.encoding import Encoding, changeable, check_codec
from fedpipe_ray.errors import UserError
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.loop import Round, Start, federate
from fedpipe_ray.message import Message
from fedpipe_ray.methods import METHODS, make_method
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.run import server_site, settled
from fedpipe_ray.settings import Wire
from fedpipe_ray.site import Site, attempt

TOPK = {"name": "topk", "share": 0.1}
SEND_NOTHING = {"central", "local"}
Made = tuple[Any, Site, Message, Message, Message, Report]


# -- every method


@pytest.fixture(scope="module", params=sorted(METHODS.keys() - SEND_NOTHING))
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_dir: Path,
    deep_dir: Path, public_file: Path,
) -> Made:  # fmt: skip
    """(method, server, state, an edge's order, its update as it was made, its report) of a round without a codec.

    The first round in which changes are sent: `fed_sb`'s is the second.
    """
    folder = tmp_path_factory.mktemp("codecs")
    path = tiny_run(folder, model_dir, data_dir)
    needs = needs_of(request.param, folder, model_dir, data_dir, deep_dir, public_file)
    run = load(path, *needs, "local.steps=2")
    method = make_method(run.method)
    fleet, server = SerialFleet(run, method), server_site(run, method, run.data.labels)
    fleet.open()
    state = method.start(server, rng_for(0, 0, "start"))
    number = int(request.param == "fed_sb")
    if number:
        *_, done = federate(method, fleet, server, rounds=1, seed=0, evaluate_every=0, start=Start(state))
        state = done.state
    order = method.plan(state, fleet.edges, server, number, rng_for(0, number, "plan"))["a"]
    assert isinstance(order, Message)
    report, update = attempt(fleet.sites["a"], order, number)
    assert isinstance(report, Report)
    assert update is not None
    return method, server, state, order, update, report


@pytest.mark.parametrize("codec", SETTINGS, ids=str)
def test_every_method_works_with_every_codec_or_refuses_it(made: Made, codec: dict[str, Any]) -> None:
    """What arrives is used by the method itself; of what is refused something is named that would do."""
    method, server, state, order, update, report = made
    wire = Wire(codec=codec, error_feedback=getattr(method, "updates", "changes") == "entries")
    run = dataclasses.replace(server.run, wire=wire)
    if getattr(method, "updates", "changes") == "values" and not make_codec(codec).whole:
        with pytest.raises(UserError, match="use bf16, int8 or nf4, or remove"):
            check_codec(run, method)
        return
    check_codec(run, method)
    one = Encoding.of(run, 0, "a")
    travels, _ = one.encode(update, order, None)
    assert travels.total_bytes < update.total_bytes
    arrived = dataclasses.replace(report, fetch=lambda: one.decode(travels, order), rejected=None)
    reports: list[Report | Lost] = [arrived, Lost("b", "gone")]
    after = method.aggregate(state, reports, server, 0, rng_for(0, 0, "aggregate"))
    assert arrived.rejected is None
    if getattr(method, "updates", "changes") != "values":
        assert changeable(order).keys() >= update.tensors.keys()  # nothing travels as it is
    new = after.tensors.keys() - state.tensors.keys()
    assert new or any(not torch.equal(after.tensors[name], state.tensors[name]) for name in state.tensors)


def test_error_feedback_is_for_entries_that_stay_what_they_are(made: Made) -> None:
    method, server, *_ = made
    run = dataclasses.replace(server.run, wire=Wire(codec={"name": "int8"}, error_feedback=True))
    if getattr(method, "updates", "changes") == "entries":
        check_codec(run, method)
    else:
        does = {"fedkseed": "sends values of its own", "flora": "sends values of its own"}
        why = does.get(run.method["name"], "may give an entry another meaning in every round")
        with pytest.raises(UserError, match=rf"wire.error_feedback: .* {run.method['name']} {why}; set it to false"):
            check_codec(run, method)


def test_fedbiot_keeps_entries_unless_it_joins_products() -> None:
    kinds = {join: make_method({"name": "fedbiot", "join": join}).updates for join in ("factors", "product")}
    assert kinds == {"factors": "entries", "product": "changes"}


# -- rounds by hand


def rounds(
    wire: dict[str, Any], count: int = 1, method: Adding | None = None,
    around: Callable[[Any], Any] = lambda fleet: fleet, **options: Any,
) -> list[Round]:  # fmt: skip
    """Of edges that each add their number to one number."""
    method = method or Adding()
    run = toy_run({f"e{n}": {**FAST, "uplink_bps": "1kbit/s"} for n in (1, 2, 3)}, wire=wire, **options)
    server = server_site(run, method, [])
    return list(federate(method, around(SerialFleet(run, method)), server, rounds=count, seed=0, evaluate_every=0))


def test_bytes_and_the_clock_count_the_encoded_message() -> None:
    """Of one entry topk sends one: 4 + 2 bytes, and a header of 72; at 1 kbit/s 624 bits are 0.624 s, after 1 s."""
    header = '[[["codec.values", "float32", [1]], ["codec.indices", "uint16", [1]]], {}]'
    (done,) = rounds({"codec": TOPK})
    for outcome in done.outcomes.values():
        assert outcome.cost.bytes_up == 4 + 2 + len(header)
    speed = 1e9 / toy_run({"e1": {}}).fleet.edges["e1"].compute_flops
    assert done.virtual_seconds == pytest.approx(8 * (6 + len(header)) / 1000 + speed, rel=1e-6)
    assert float(done.state.tensors["x"]) == pytest.approx((10 * 1 + 20 * 2 + 30 * 3) / 60)


@pytest.mark.parametrize("wire", [{"codec": {"name": "topk", "share": 1.0}, "error_feedback": True}, {}], ids=str)
def test_everything_sent_is_as_without_a_codec(wire: dict[str, Any]) -> None:
    """In both modes of the loop, also from states that are no longer the newest."""
    assert [float(one.state.tensors["x"]) for one in rounds(wire, 3)] == pytest.approx([14 / 6, 28 / 6, 42 / 6])
    method, edges = Adding(), {"e1": FAST, "e2": {**FAST, "compute_flops": "100MFLOP/s"}}
    run = toy_run(edges, wire=wire)
    server = server_site(run, method, [])
    found = federate_buffered(method, SerialFleet(run, method), server, rounds=4, seed=0, buffer=1, evaluate_every=0)
    states = [float(one.state.tensors["x"]) for one in found]
    assert states == sorted(states)
    assert states[0] == 1.0


def test_bounds_hold_of_what_was_decoded() -> None:
    """e3 adds 3 in every round, e2 is NaN: neither costs more than itself, and e2 is told on its edge."""
    method = Adding(fails={"e2": "nan"})
    done = rounds({"codec": TOPK}, 3, method, server={"norm_bound": 2.5})
    for one in done:
        assert {name: outcome.reason for name, outcome in one.outcomes.items() if isinstance(outcome, Lost)} == {
            "e2": "diverged: its update has NaN or infinity in x",
            "e3": "its update is a change of L2 norm 3, above server.norm_bound: 2.5",
        }
    assert float(done[-1].state.tensors["x"]) == 3.0


class Tampering(Noting):
    """A fleet whose edge e2 sends something else."""

    def __init__(self, fleet: Any, instead: Mapping[str, torch.Tensor]) -> None:
        super().__init__(fleet)
        self.instead = instead

    def run(self, orders: Mapping[str, Message], round: int) -> Iterator[Report | Lost]:
        for report in self.fleet.run(orders, round):
            if isinstance(report, Report) and report.edge == "e2":
                report.fetch = lambda: Message(self.instead)
            yield report


@pytest.mark.parametrize(
    ("instead", "reason"),
    [
        ({}, "its encoded update has nothing, the first odd one indices"),
        ({"x": torch.ones(1)}, "its update has x twice"),
        (
            {"codec.values": torch.ones(1), "codec.indices": torch.ones(1, dtype=torch.uint16)},
            "its update has in x indices that do not rise from 0 to below 1",
        ),
    ],
)
def test_a_malformed_update_costs_its_edge_the_round(instead: dict[str, torch.Tensor], reason: str) -> None:
    (done,) = rounds({"codec": TOPK}, around=lambda fleet: Tampering(fleet, instead))
    (lost,) = [one for one in done.outcomes.values() if isinstance(one, Lost)]
    assert (lost.edge, lost.reason) == ("e2", reason)
    assert lost.cost.bytes_up > 0
    assert float(done.state.tensors["x"]) == pytest.approx((10 * 1 + 30 * 3) / 40)


# -- what is left out, as private state


def test_a_round_that_is_tried_again_sends_the_same_bytes(run_file: Path) -> None:
    """Beside a method's own private state, which does not see the codec's."""
    wire = f"wire={{codec: {TOPK}, error_feedback: true}}"
    run = load(run_file, "method.name=own_methods:Counting", "local.steps=1", wire)
    method = make_method(run.method)
    check_codec(run, method)
    fleet = SerialFleet(run, method)
    fleet.open()
    state = method.start(server_site(run, method, []), rng_for(0, 0, "start"))
    site, order = fleet.sites["a"], Message(state.tensors)
    first, second, again = (attempt(site, order, round)[1] for round in (0, 1, 1))
    assert first is not None
    assert second is not None
    assert again is not None
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in second.tensors.items())
    assert not torch.equal(first.tensors["codec.values"], second.tensors["codec.values"])
    assert site.private is not None
    assert site.private.tensors.keys() == {"drawn"}
    kept = site.private_before(2)
    assert kept is not None
    assert {name.rpartition("base_model")[0] for name in kept.tensors} == {"", "codec.left."}


@pytest.mark.parametrize(
    ("method", "codec"),
    [("lora", TOPK), ("scaffold", {"name": "lowrank", "rank": 1}), ("rolora", {"name": "topk", "share": 0.25})],
)
def test_resumed_with_error_feedback(method: str, codec: dict[str, Any], run_file: Path, tmp_path: Path) -> None:
    """From the checkpoint before the last round, two of three edges a round: the bits of the run that went on.

    An update is less than half of an order in the same 2 bytes a number.
    """
    whole, folder = tmp_path / "whole", tmp_path / "run"
    wire = f"wire={{codec: {codec}, error_feedback: true, dtype: bfloat16}}"
    arguments = (wire, "rounds=4", "fleet.fraction=0.67", "local.steps=2", f"method.name={method}")
    assert here("run", run_file, *arguments, "--out", whole) == 0
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("adapter", "summary.json"))
    shutil.rmtree(folder / "checkpoint" / "round-0004")
    for rest in manifest(folder)["private"].values():
        kept = Message.load(Path(rest["path"]), rest["sha256"])
        assert any(name.startswith("codec.left.") for name in kept.tensors)
    assert here("resume", folder) == 0
    assert_like(folder, whole)
    assert all(0 < one["bytes_up"] < 0.5 * one["bytes_down"] for one in records(whole))


@pytest.mark.parametrize(
    "overrides",
    [
        ("wire={codec: {name: lowrank, rank: 1}, error_feedback: true}", "fleet.fraction=0.67"),
        ("method={name: jcpba, rank: 2}", "wire={codec: {name: nf4, double: true}, dtype: bfloat16}"),
    ],
    ids=["lora-lowrank", "jcpba-nf4"],
)
def test_serial_and_packed_agree_bitwise(run_file: Path, ray_here: None, overrides: tuple[str, ...]) -> None:
    """Orders reach a worker in parts, whose names come in another order."""
    settings = ("rounds=2", "local.steps=2", *overrides)
    assert_alike(rounds_of("serial", run_file, *settings), rounds_of("packed", run_file, *settings))


# -- settings


def test_a_run_keeps_every_setting_of_its_codec(run_file: Path) -> None:
    run, _ = settled(load(run_file, "wire={codec: {name: nf4}}"))
    assert run.wire.codec == {"name": "nf4", "block": 64, "double": False}


@pytest.mark.parametrize(
    ("wire", "says"),
    [
        ("{error_feedback: true}", "wire.error_feedback: needs wire.codec"),
        ("{codec: {share: 0.1}}", "wire.codec: needs a name, such as topk"),
        ("{codec: {name: zip}}", "wire.codec.name: no codec 'zip'; there are bf16"),
        ("{codec: {name: topk, block: 3}}", "unknown key wire.codec.block"),
    ],
)
def test_wrong_settings_are_told_before_anything_starts(wire: str, says: str, run_file: Path) -> None:
    with pytest.raises(UserError, match=says):
        settled(load(run_file, f"wire={wire}"))
