"""The profile files and examples that ship are valid as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import ROOT

from clusters import HERE, find_profiles
from fedpipe_ray.config import build, load_run
from fedpipe_ray.methods import make_method
from fedpipe_ray.settings import Profile


@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("*.yaml")))
def test_profiles_are_valid(name: str) -> None:
    profiles = find_profiles(f"clusters/{name}", Path("/"))
    assert len(profiles) >= 5
    assert all(build(Profile, profile).compute_flops > 0 for profile in profiles.values())


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_load(path: Path) -> None:
    run = load_run(path, [], find_profiles)
    assert len(run.fleet.edges) == 5
    assert make_method(run.method)
