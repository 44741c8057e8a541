"""Updates that came back and must not be used: each costs its edge the round, with value and limit; on both fleets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import assert_same, fleet_of, here, load, opened_run
from test_lost_edges import faulty, rounds
from toy_rounds import Adding, toy_run

from fedpipe_ray.arriving import checked, fitting
from fedpipe_ray.buffered import federate_buffered
from fedpipe_ray.loop import Round, federate
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Run

FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REASONS = {
    "nan": f"its update has NaN or infinity in {FIRST}",
    "infinity": f"its update has NaN or infinity in {FIRST}",
    "names": "its update differs from the state in 1 tensors, the first rogue",
    "missing": f"its update differs from the state in 1 tensors, the first {FIRST}",
    "shapes": f"its update has {FIRST} in shape [32, 4], not [4, 32]",
    "dtype": f"its update has {FIRST} in int64, not float32",
}


def one_round(kind: str, run: Run, *, buffered: bool = False) -> Round:
    method = make_method(run.method)
    fleet = fleet_of(kind, run, method)
    try:
        fleet.open()
        server = server_site(run, method, [])
        if buffered:
            return next(federate_buffered(method, fleet, server, rounds=1, seed=0, buffer=len(fleet.edges)))
        return next(federate(method, fleet, server, rounds=1, seed=0))
    finally:
        fleet.close()


@pytest.mark.parametrize("kind", ["serial", "packed"])
def test_a_faulty_update_costs_its_edge_the_round(
    kind: str, run_file: Path, data_dir: Path, tmp_path: Path, ray_here: None
) -> None:
    """Edges that each send something else wrong: the state is that of a alone, as if it had been the only one asked.

    A step of AdamW at 0.01 changes each of the adapter's thousands of numbers by about that; `huge` is 1000 times it.
    """
    ways = {f"e-{way}": way for way in (*REASONS, "huge")}
    tree = yaml.safe_load(run_file.read_text())
    like_b = {**tree["fleet"]["edges"]["b"], "data": f"{data_dir}/b.jsonl"}
    tree["fleet"]["edges"] = {"a": tree["fleet"]["edges"]["a"], **dict.fromkeys(ways, like_b)}
    tree |= {"local": {"steps": 1, "batch": 4, "lr": 0.01}, "server": {"norm_bound": 20}}
    tree["method"] = {"name": "faulty:Faulty", "rank": 4, "alpha": 8, "sick": list(ways), "ways": ways}
    path = tmp_path / "faulty.yaml"
    path.write_text(yaml.safe_dump(tree))
    done = one_round(kind, load(path))
    assert [report.edge for report in done.reports] == ["a"]
    lost = [one for one in done.outcomes.values() if isinstance(one, Lost)]
    reasons = {ways[one.edge]: one.reason for one in lost}
    huge = reasons.pop("huge")
    assert reasons == REASONS
    assert huge.startswith("its update is a change of L2 norm ")
    assert huge.endswith(", above server.norm_bound: 20")
    assert all(one.status == "lost" and one.cost.bytes_up > 0 for one in lost)  # they were sent
    tree["fleet"]["edges"] = {"a": tree["fleet"]["edges"]["a"]}
    path.write_text(yaml.safe_dump(tree))
    assert_same(dict(done.state.tensors), dict(one_round("serial", load(path)).state.tensors))


def test_a_huge_change_is_rejected_in_buffered_mode_too(run_file: Path) -> None:
    """b's, as above; without a bound it is used."""
    huge = load(run_file, "local.steps=1", faulty("b", "huge"))
    assert len(one_round("serial", huge, buffered=True).reports) == 3
    bound = load(run_file, "local.steps=1", faulty("b", "huge"), "server.norm_bound=20")
    assert [report.edge for report in one_round("serial", bound, buffered=True).reports] == ["a", "c"]


def test_the_norm_is_that_of_the_change() -> None:
    """Edges add 1, 2, 3 to whatever the state is: a bound of 2.5 keeps e3 out for good, and only e3."""
    run = toy_run({"e1": {}, "e2": {}, "e3": {}}, server={"norm_bound": 2.5})
    method = Adding()
    fleet, server = fleet_of("serial", run, method), server_site(run, method, [])
    done = list(federate(method, fleet, server, rounds=9, seed=0, evaluate_every=0))
    assert {one.outcomes["e3"].reason for one in done} == {
        "its update is a change of L2 norm 3, above server.norm_bound: 2.5"
    }
    assert done[-1].state.tensors["x"].item() == pytest.approx(9 * (10 + 40) / 30)


@pytest.mark.parametrize(
    ("update", "bound", "says"),
    [
        ({"x": [3.0], "y": [4.0]}, 5.0, None),  # 3, 4 and 5, exactly at the bound
        ({"x": [3.0], "y": [4.0]}, 4.9, "L2 norm 5, above server.norm_bound: 4.9"),
        ({"x": [0.0], "z": [6.0]}, 5.0, "L2 norm 6"),  # z was not sent: it counts whole
        ({"x": [3e38], "y": [-3e38]}, 5.0, "L2 norm 4.243e+38"),  # beyond float32
        ({"x": [float("inf")]}, 5.0, None),  # left to the method, which names the tensor
        ({"x": [float("nan")]}, 5.0, None),
        ({"x": [3.0], "y": [4.0]}, None, None),
    ],
)
def test_norms_by_hand(update: dict[str, list[float]], bound: float | None, says: str | None) -> None:
    sent = Message({"x": torch.zeros(1), "y": torch.zeros(1)})
    message = Message({name: torch.tensor(value) for name, value in update.items()})
    if says is None:
        assert fitting(lambda: message, sent, "float32", bound) is message
    else:
        with pytest.raises(ValueError, match=says.replace("+", r"\+")):
            fitting(lambda: message, sent, "float32", bound)


PAIR = {"q.lora_A.w": [[2.0, 0.0]], "q.lora_B.w": [[3.0], [4.0]]}  # B A has the norm 5 x 2


@pytest.mark.parametrize(
    ("sent", "norm", "clipped"),
    [
        ({"kept.0000.q.lora_A.w": [[9.0, 9.0]]}, 10, {"q.lora_B.w": [[1.5], [2.0]]}),  # A is as it was drawn
        ({"q.lora_A.w": [[2.0, 0.0]]}, 5, None),  # was sent: tensor by tensor, as B's change of 5
        ({"q.lora_A.w": [[2.0, 1.0], [7.0, 7.0]], "q.lora_B.w": [[3.0, 7.0], [2.0, 7.0]]}, 5**0.5,  # a rank less
         {"q.lora_A.w": [[2.0, 0.5]], "q.lora_B.w": [[3.0], [3.0]]}),
        ({"kept.q.lora_A.w": [[2.0, 1.0], [7.0, 7.0]], "kept.q.lora_B.w": [[3.0, 7.0], [2.0, 7.0]]}, 5**0.5,
         {"q.lora_A.w": [[2.0, 0.5]], "q.lora_B.w": [[3.0], [3.0]]}),
        ({"q.lora_A.w": [[2.0, 0.0, 0.0]], "q.lora_B.w": [[3.0]]}, 29**0.5, None),  # other sides: whole
    ],
)  # fmt: skip
def test_changes_of_pairs_by_hand(sent: dict[str, Any], norm: float, clipped: dict[str, Any] | None) -> None:
    """What a pair changes: of a fresh one the product; of one that was sent, what was sent of its rank. Clipped to
    half of it, B alone is halved in the first case."""
    order = Message({name: torch.tensor(value) for name, value in sent.items()})
    message = Message({name: torch.tensor(value) for name, value in PAIR.items()})
    assert fitting(lambda: message, order, "float32", norm * (1 + 1e-6)) is message
    with pytest.raises(ValueError, match="is a change of L2 norm"):
        fitting(lambda: message, order, "float32", norm * (1 - 1e-6))
    if clipped is not None:
        found = fitting(lambda: message, order, "float32", None, norm / 2)
        for name, value in ({**PAIR, **clipped}).items():
            torch.testing.assert_close(found.tensors[name], torch.tensor(value))


@pytest.mark.parametrize("wrong", [[[1.0, 1.0, 1.0]], [5.0], [[float("nan")]]])
def test_a_pair_that_does_not_fit_is_left_to_the_method(wrong: Any) -> None:
    message = Message({"q.lora_A.w": torch.ones(1, 2), "q.lora_B.w": torch.tensor(wrong)})
    assert fitting(lambda: message, Message(), "float32", 100.0, 99.0) is message


def test_honest_updates_of_fresh_and_of_pruned_factors_pass(run_file: Path) -> None:
    """One step of AdamW at 0.01: FLoRA's A, drawn anew, has a norm of 6 by itself; a HetLoRA of half the rank as its
    edges were sent, which nothing has moved far from."""
    flora = load(run_file, "method={name: flora, rank: 8}", "local.steps=1", "server.norm_bound=2.5")
    assert len(one_round("serial", flora).reports) == 3
    hetlora = "method={name: hetlora, rank: 8, gamma: 0.5, penalty: 10}"
    fleet, method, server, state = opened_run(run_file, hetlora, "local.steps=1", "server.norm_bound=2.5")
    big = Message({name: torch.full_like(tensor, 0.5) for name, tensor in state.tensors.items()})
    orders = method.plan(big, fleet.edges, server, 0, rng_for(0, 0, "plan"))
    for one in checked(fleet.run(orders, 0), orders, server.run):
        assert isinstance(one, Report)
        assert {len(tensor) for name, tensor in one.message().tensors.items() if ".lora_A." in name} == {4}


@pytest.mark.parametrize(
    ("dtype", "sent", "wire", "fits"),
    [(torch.float32, torch.float32, "float32", True), (torch.float64, torch.float32, "float32", False),
     (torch.bfloat16, torch.float32, "bfloat16", True), (torch.float32, torch.float32, "bfloat16", False),
     (torch.int32, torch.int32, "bfloat16", True), (torch.int64, torch.int32, "float32", False),
     (torch.uint8, None, "float32", True), (torch.float16, None, "float32", False),
     (torch.complex64, torch.float32, "float32", False)],
)  # fmt: skip
def test_dtypes(dtype: torch.dtype, sent: torch.dtype | None, wire: str, fits: bool) -> None:
    """As it was sent; floating-point tensors in that of the wire; others that were not sent are the method's matter."""
    message = Message({"x": torch.zeros(1, dtype=dtype)})
    order = Message({} if sent is None else {"x": torch.zeros(1, dtype=sent)})
    if fits:
        fitting(lambda: message, order, wire, None)
    else:
        with pytest.raises(ValueError, match=f"has x in {str(dtype).removeprefix('torch.')}, not"):
            fitting(lambda: message, order, wire, None)


def test_a_rejected_update_stands_in_the_record(run_file: Path, tmp_path: Path) -> None:
    """Through the command line, with a bound that c's thousand-fold update alone is above."""
    out = tmp_path / "out"
    assert here("run", run_file, faulty("c", "huge"), "server.norm_bound=20", "rounds=1", "--out", out) == 0
    edges = rounds(out)[0]["edges"]
    assert {name: edge["status"] for name, edge in edges.items()} == {"a": "ok", "b": "ok", "c": "lost"}
    assert "above server.norm_bound: 20" in edges["c"]["reason"]
    assert f"round 1: edge c lost: {edges['c']['reason']}" in (out / "log.txt").read_text()


def test_the_bound_is_above_zero() -> None:
    with pytest.raises(ValueError, match=r"server.norm_bound: 0.0 must be above 0"):
        toy_run({"e1": {}}, server={"norm_bound": 0.0})
