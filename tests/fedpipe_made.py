"""Runs of FedPipe on the tiny model."""

from __future__ import annotations

from pathlib import Path

from runs import load

from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.methods import make_method
from fedpipe_ray.methods.fedpipe import FedPipe
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Run
from fedpipe_ray.site import Site

FEDPIPE = "method={name: fedpipe, rank: 8, alpha: 16%s}"


def made(run_file: Path, more: str = "", *overrides: str) -> tuple[Run, FedPipe, SerialFleet, Site]:
    """A run of FedPipe, its fleet opened."""
    run = load(run_file, FEDPIPE % more, *overrides)
    method = make_method(run.method)
    assert isinstance(method, FedPipe)
    fleet = SerialFleet(run, method)
    fleet.open()
    return run, method, fleet, server_site(run, method, fleet.classes)
