"""An edge of several processes learns what one process would, and outlives the loss of one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.util import placement_group_table
from runs import fleet_of, load
from toys import CPU, PAD, Constant, Some, answer, classifier, llama

from actors.fleet import RayFleet
from actors.parallel import scaling
from actors.placement import processes
from fedpipe_ray.config import build
from fedpipe_ray.errors import UserError
from fedpipe_ray.loop import Round, federate
from fedpipe_ray.methods import make_method
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Local, Profile
from fedpipe_ray.train import Trained, train

ROWS = [answer([3 + i % 4] * (1 + i % 5), [2 + i % 5] * (1 + i % 3)) for i in range(13)]
MODELS: dict[str, Any] = {"causal": llama, "classifier": lambda: classifier(3), "constant": lambda: Constant([0.0] * 8)}
SETTINGS = {
    "plain": {"batch": 4}, "accumulated": {"batch": 6, "accumulate": 2}, "one row for two": {"batch": 1},
    "odd, decayed": {"batch": 5, "weight_decay": 0.1, "clip": 0.05},
}  # fmt: skip


def trained(kind: str, setting: str) -> tuple[Trained, torch.Tensor]:
    """What training did and the weights after it, flat."""
    model = MODELS[kind]()
    rows = Some([(tokens, [i % 3]) for i, (tokens, _) in enumerate(ROWS)] if kind == "classifier" else ROWS)
    local = Local(steps=5, lr=1e-2, **SETTINGS[setting])
    done = train(
        model, rows, local, round=0, rounds=1, rng=np.random.default_rng(0), device=CPU, pad_id=PAD,
        classifier=kind == "classifier",
    )  # fmt: skip
    return done, torch.cat([p.detach().flatten() for p in model.parameters()])


CASES = [("causal", setting) for setting in SETTINGS] + [("classifier", "plain"), ("constant", "accumulated")]


def one_of_two(rank: int, folder: str) -> None:
    """A process of a group of two: writes what it found for every case."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = [(done.loss, done.tokens, done.samples, weights) for done, weights in (trained(*case) for case in CASES)]
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Same loss to 1e-4 at the same batch, same weights, same count; and both processes hold the same bits."""
    torch.multiprocessing.start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for case, one, other in zip(CASES, first, second, strict=True):
        done, weights = trained(*case)
        assert one[0] == pytest.approx(done.loss, abs=1e-4), case
        assert one[2] == done.samples
        begin = torch.cat([p.detach().flatten() for p in MODELS[case[0]]().parameters()])
        assert float((weights - begin).abs().max()) > 1e-3, case
        assert float((one[3] - weights).abs().max()) < 1e-4, case
        assert torch.equal(one[3], other[3]), case
        assert one[:3] == other[:3], case


# -- profiles


def test_processes_of_a_profile() -> None:
    found = [processes(build(Profile, keys)) for keys in ({}, {"gpus": 0.5}, {"gpus": 1}, {"gpus": 4}, {"workers": 3})]
    assert found == [1, 1, 1, 4, 3]
    with pytest.raises(UserError, match="workers: 3 processes on 2 gpus; there is one a GPU, so leave workers out"):
        build(Profile, {"workers": 3, "gpus": 2})


def test_an_edge_is_divided_among_its_processes() -> None:
    """4 cpus, 2 gpus and 8 GiB of one node: 2 cpus, 1 gpu and 4 GiB each."""
    profile = build(Profile, {"gpus": 2, "cpus": 4, "memory_bytes": "8GiB", "labels": {"zone": "a"}})
    assert scaling(profile, "f00") == {
        "num_workers": 2, "use_gpu": True, "placement_strategy": "STRICT_PACK",
        "label_selector": {"ray.io/node-id": "f00"},
        "resources_per_worker": {"CPU": 2.0, "GPU": 1.0, "memory": 4 * 2**30},
    }  # fmt: skip


def test_parts_are_no_finer_than_ray_counts() -> None:
    found = scaling(build(Profile, {"workers": 3, "cpus": 0.1, "resources": {"slot": 1}}), "f00")[
        "resources_per_worker"
    ]
    assert found == {"CPU": 0.0333, "slot": 0.3333}


# -- on Ray


def rounds_of(run_file: Path, *overrides: str) -> list[Round]:
    """All rounds on Ray."""
    run = load(run_file, "fleet.ray=true", *overrides)
    method = make_method(run.method)
    fleet = fleet_of("ray", run, method)
    try:
        fleet.open()
        return list(federate(method, fleet, server_site(run, method, []), rounds=run.rounds, seed=run.seed))
    finally:
        fleet.close()


def edges(**workers: int) -> str:
    """The override with these edges, of so many processes each."""
    profiles = [f"{name}: {{cpus: 0.1, workers: {n}, compute_flops: 1GFLOP/s}}" for name, n in workers.items()]
    return f"fleet.edges={{{', '.join(profiles)}}}"


@pytest.mark.services
def test_a_parallel_edge_learns_as_one_process(run_file: Path, ray_here: None) -> None:
    alone, pair = (rounds_of(run_file, edges(a=n), "model.load=driver") for n in (1, 2))
    assert len(pair) == len(alone) == 2
    for one, other in zip(pair, alone, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, abs=1e-4)
        assert one.quality["loss"] == pytest.approx(other.quality["loss"], abs=1e-4)
        assert one.bytes_up == other.bytes_up
        for name, tensor in other.state.tensors.items():
            assert float((one.state.tensors[name] - tensor).abs().max()) < 1e-4, name
    moved = [
        float((pair[1].state.tensors[name] - pair[0].state.tensors[name]).abs().max()) for name in pair[0].state.tensors
    ]
    assert max(moved) > 1e-3


@pytest.mark.services
def test_a_process_that_is_killed_costs_a_round_at_most(run_file: Path, ray_here: None, tmp_path: Path) -> None:
    """Edge a's second process dies in round 2 of 4: a group that takes its place does the rounds that follow."""
    method = f"method={{name: 'own_methods:Mortal', rank: 4, alpha: 8, killed: '{tmp_path / 'killed'}'}}"
    found = rounds_of(run_file, edges(a=2, b=1), "rounds=4", method)
    assert (tmp_path / "killed").exists()
    assert [len(one.reports) for one in found] in ([2, 1, 2, 2], [2, 2, 2, 2])


@pytest.mark.services
@pytest.mark.parametrize("killed", [False, True])
def test_what_the_processes_reserved_is_free_once_the_edge_has_gone(
    killed: bool, run_file: Path, ray_here: None
) -> None:
    """Whether the fleet closes or an edge's actor is killed: Ray Train alone would keep it until the job ends."""
    run, before = load(run_file, "fleet.ray=true", edges(a=2)), helpers()
    fleet = RayFleet(run, make_method(run.method))
    try:
        fleet.open()
        assert len(reserved()) == 1
        if killed:
            for worker in list(fleet.workers):
                fleet.workers.bury(worker)
            assert not reserved()
    finally:
        fleet.close()
    assert not reserved()
    if not killed:  # Ray Train's own actors end a moment later
        deadline = time.monotonic() + 60
        while (more := helpers() - before) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not more


def reserved() -> list[str]:
    """Placement groups of this Ray that stand."""
    return [name for name, entry in placement_group_table().items() if entry["state"] != "REMOVED"]


def helpers() -> set[str]:
    """Ids of the living actors that an edge of several processes has, and Ray Train for it."""
    kinds = ("ParallelEdge", "TrainController", "PlacementGroupCleaner")
    actors = ray._private.state.actors().items()
    return {one for one, found in actors if found["State"] != "DEAD" and found["ActorClassName"] in kinds}
