"""The form that plans have in a line of plans.jsonl. Imports nothing heavy, for those who only look at runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def gathered(plans: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each plan once, with `edges`, the names of those that have it."""
    found: dict[str, dict[str, Any]] = {}
    for edge, plan in plans.items():
        found.setdefault(json.dumps(plan, sort_keys=True), {"edges": [], **plan})["edges"].append(edge)
    return list(found.values())


def scattered(plans: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The inverse of `gathered`."""
    apart = [({name: value for name, value in one.items() if name != "edges"}, one["edges"]) for one in plans]
    return {edge: plan for plan, edges in apart for edge in edges}
