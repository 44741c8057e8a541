"""Machines as data: edge profiles for runs, and the one reader of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedpipe_ray.config import read_yaml
from fedpipe_ray.errors import UserError

HERE = Path(__file__).parent


def find_file(name: str, folder: Path) -> Path | None:
    """The file `name` in `folder`, the working directory, or this package; None if it is nowhere."""
    places = [folder / name, Path(name), HERE.parent / name, HERE / name]
    return next((place for place in places if place.is_file()), None)


def find_profiles(name: str, folder: Path) -> dict[str, Any]:
    """The `edges` of the profile file `name`: in `folder`, the working directory, or this package. Raises UserError.

    A file may hold `defaults`, which stand below every edge's own keys, and `count` in an edge, which makes so many of
    it: `worker` with count 3 is worker-0, worker-1, worker-2.
    """
    path = find_file(name, folder)
    if path is None:
        known = ", ".join(f"clusters/{p.name}" for p in sorted(HERE.glob("*.yaml")))
        raise UserError(f"fleet.profiles: no file {name}; ready ones: {known}")
    tree = read_yaml(path)
    odd = sorted(set(tree) - {"defaults", "edges"})
    if odd or not isinstance(tree.get("edges"), dict) or not tree["edges"]:
        raise UserError(
            f"{path}: needs a mapping `edges` (and may have `defaults`); "
            + (f"unknown key {odd[0]}" if odd else "it has none")
        )
    defaults = tree.get("defaults") or {}
    if not isinstance(defaults, dict):
        raise UserError(f"{path}: defaults: {defaults!r} is no profile, a mapping of keys such as cpus")
    edges: dict[str, Any] = {}
    for edge, own in tree["edges"].items():
        if not isinstance(own, dict | None):
            raise UserError(f"{path}: edges.{edge}: {own!r} is no profile, a mapping of keys such as cpus")
        own = dict(own or {})
        count = own.pop("count", None)
        if count is not None and not (isinstance(count, int) and count > 0):
            raise UserError(f"{path}: edges.{edge}.count: {count!r} must be a whole number above 0")
        names = [str(edge)] if count is None else [f"{edge}-{i}" for i in range(count)]
        twice = edges.keys() & names
        if twice:
            raise UserError(f"{path}: edges.{edge}: {min(twice)} stands twice; give one of them another name")
        edges |= {one: {**defaults, **own} for one in names}
    return edges
