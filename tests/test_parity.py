"""SerialFleet and RayFleet give the same bits, the same bytes and the same virtual clock."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import emulated, fleet_of, load

from fedpipe_ray.loop import Round, federate
from fedpipe_ray.methods import make_method
from fedpipe_ray.run import server_site


def rounds_of(kind: str, path: Path, *overrides: str) -> list[Round]:
    run = load(path, *overrides)
    method = make_method(run.method)
    fleet = fleet_of(kind, run, method)
    try:
        fleet.open()
        server = server_site(run, method, list(getattr(fleet, "classes", [])))
        return list(federate(method, fleet, server, rounds=run.rounds, seed=run.seed, fraction=run.fleet.fraction))
    finally:
        fleet.close()


@pytest.mark.parametrize(
    ("kinds", "overrides"),
    [
        (("ray", "packed"), ()),
        (("packed",), ("wire.dtype=bfloat16", "method.dropout=0.1", "fleet.fraction=0.67")),
        (("ray",), ("model.load=driver", "local.precision=bfloat16", "local.accumulate=2")),
        (("packed",), ("method={name: full}", "model.load=driver")),
        (("packed",), ("method={name: fedadapter, trial_every: 2}", "rounds=3")),
        (
            ("packed",),
            (
                "method={name: jcpba, score: taylor, outage: 0.2}",
                "rounds=4",
                "fleet.fraction=0.67",
                "wire.dtype=bfloat16",
            ),
        ),
        (
            ("packed",),
            (
                "method={name: fedkseed, seeds: 32, tau: 4, pro: true}",
                "rounds=4",
                "fleet.fraction=0.67",
                "model.load=driver",
                "wire.dtype=bfloat16",
            ),
        ),
        (
            ("packed",),
            ("method={name: flora, ranks: {a: 2}}", "rounds=3", "fleet.fraction=0.67", "wire.dtype=bfloat16"),
        ),
    ],
    ids=[
        "plain",
        "bf16-wire-dropout-sampled",
        "shipped-model-autocast",
        "full-shipped-model",
        "fedadapter",
        "jcpba",
        "fedkseed",
        "flora",
    ],
)
def test_serial_and_ray_agree_bitwise(
    run_file: Path, ray_here: None, kinds: tuple[str, ...], overrides: tuple[str, ...]
) -> None:
    serial = rounds_of("serial", run_file, *overrides)
    for kind in kinds:
        assert_alike(serial, rounds_of(kind, run_file, *overrides))


@pytest.mark.services
def test_edges_with_an_emulator_agree_bitwise(
    run_file: Path, ray_here: None, deep_dir: Path, public_file: Path
) -> None:
    """What they hold is in the object store: the same model, the same bytes, with every edge asked or not."""
    needs = [*emulated(deep_dir, public_file), "method.dropout=0.1", "fleet.fraction=0.67", "wire.dtype=bfloat16"]
    serial = rounds_of("serial", run_file, *needs, "rounds=3")
    for kind in ("ray", "packed"):
        assert_alike(serial, rounds_of(kind, run_file, *needs, "rounds=3"))


def assert_alike(serial: list[Round], on_ray: list[Round]) -> None:
    """Same states, same evaluations, same bytes, same clock."""
    assert len(serial) == len(on_ray) >= 2
    for one, other in zip(serial, on_ray, strict=True):
        assert one.state.tensors.keys() == other.state.tensors.keys()
        assert all(torch.equal(one.state.tensors[name], other.state.tensors[name]) for name in one.state.tensors)
        assert one.evaluation == other.evaluation
        assert (one.bytes_up, one.bytes_down, one.virtual_seconds) == (
            other.bytes_up,
            other.bytes_down,
            other.virtual_seconds,
        )
        assert one.train_loss == other.train_loss
