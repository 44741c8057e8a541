"""What a fleet asks its cluster's autoscaler for: a placement group for each worker that it wants at least.

Ray's `request_resources` is one value of a whole cluster: what one driver asks for replaces what the others asked for,
a killed one leaves it standing, and a node counts as there that somebody else uses. A placement group is its maker's
own. Unplaced, it is a demand beside all others; placed, its room is kept for us; it is unplaced again when its node
leaves, and it ends with the job that made it, however that ended. Ray's head keeps it: no process, and no room if
nobody asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import get_placement_group, placement_group, placement_group_table, remove_placement_group

from .placement import Pool, demand

PREFIX = "fedpipe"


class Claims:
    """The groups of one fleet. wanted: how many workers each pool is to have at least."""

    def __init__(self, wanted: Mapping[Pool, int]) -> None:
        self.wanted = {pool: count for pool, count in wanted.items() if demand(pool.profile)}
        self._groups: dict[Pool, list[Any]] = {pool: [] for pool in self.wanted}
        self._made, self._maker = 0, ray.get_runtime_context().get_actor_id() or ""

    def ask(self, apart: Mapping[Pool, int]) -> None:
        """Makes the groups that are missing. apart: workers by pool whose room is no group's."""
        for pool, groups in self._groups.items():
            for _ in range(self.wanted[pool] - apart.get(pool, 0) - len(groups)):
                self._made += 1
                labels = [dict(pool.profile.labels)] if pool.profile.labels else None
                name = f"{PREFIX}-{self._maker}-{id(self):x}-{self._made}"
                groups.append(placement_group([demand(pool.profile)], name=name, bundle_label_selector=labels))

    def placed(self, used: Iterable[Any]) -> list[tuple[Pool, Any, str]]:
        """(pool, group, node id) of groups that have room now, without the `used` ones."""
        if not any(self._groups.values()):
            return []
        table, taken = placement_group_table(), {group.id for group in used}
        found = []
        for pool, groups in self._groups.items():
            for group in groups:
                entry = table.get(group.id.hex(), {})
                if entry.get("state") == "CREATED" and group.id not in taken:
                    found.append((pool, group, entry["bundles_to_node_id"][0]))
        return found

    def hand_over(self, pool: Pool, group: Any) -> None:
        """Gives a group's room up for processes that reserve their own."""
        self._groups[pool].remove(group)
        remove_placement_group(group)

    def withdraw(self) -> None:
        """Gives all up."""
        for groups in self._groups.values():
            while groups:
                with suppress(RayError, RuntimeError, ConnectionError):
                    remove_placement_group(groups.pop())


def of_actors(ids: Iterable[str]) -> list[tuple[str, bool]]:
    """(name, whether it has room) of every group that these actors of our own job asked for."""
    mine = tuple(f"{PREFIX}-{one}-" for one in ids)
    return [
        (entry["name"], entry["state"] == "CREATED")
        for entry in placement_group_table().values()
        if entry["name"].startswith(mine) and entry["state"] != "REMOVED"
    ]


def withdraw_of(ids: Iterable[str]) -> None:
    """Gives up what actors asked for that were ended: Ray keeps it until their job ends."""
    for name, _ in of_actors(ids):
        with suppress(ValueError, RayError, RuntimeError):  # gone meanwhile
            remove_placement_group(get_placement_group(name))
