"""Which edges have room on the cluster: at the start, where they may be waited for, and from round to round."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from fedpipe_ray.errors import EdgeError, UserError
from fedpipe_ray.settings import FleetSettings, Profile

from .placement import unknown_to_ray
from .workers import Workers

log = logging.getLogger("fedpipe")

LOOK_SECONDS, SAY_SECONDS = 0.25, 10.0
QUIET_SECONDS = 1.0  # before it is said that something is waited for: Ray takes a moment to give room that there is


class Present(dict[str, Profile]):
    """The edges that are there; one that left since may still be asked by its name, and is lost."""

    def __init__(self, here: Mapping[str, Profile], everyone: Mapping[str, Profile]) -> None:
        super().__init__(here)
        self.everyone = everyone

    def __missing__(self, name: str) -> Profile:
        return self.everyone[name]


class Room:
    """The edges of a fleet by whether a node has room for them."""

    def __init__(self, workers: Workers, fleet: FleetSettings) -> None:
        self.workers, self.fleet = workers, fleet
        self.away: set[str] = set()  # edges that were said to be away

    def find(self) -> None:
        """Returns once `fleet.min_edges` edges can be placed. Raises UserError with a line for those that cannot.

        Without fleet.autoscale at once, else after start_timeout_seconds at most.
        """
        faults = [f"edge {n}: {fault}" for n, p in self.fleet.edges.items() if (fault := unknown_to_ray(p))]
        if faults:
            raise UserError("\n".join(faults))
        least = self.fleet.min_edges or len(self.fleet.edges)
        if least > len(self.fleet.edges):
            raise UserError(f"fleet.min_edges: {least} is more than the {len(self.fleet.edges)} edges of the fleet")
        began = time.monotonic()
        say = began + QUIET_SECONDS
        while not self._enough(least):
            lines = self.workers.refusal_lines()
            if not self.fleet.autoscale:
                more = [f"fleet.min_edges: {least} edges must have room"] if self.fleet.min_edges else []
                raise UserError("\n".join([*lines, *more]))
            if time.monotonic() > began + self.fleet.start_timeout_seconds:
                waited = f"fleet.start_timeout_seconds={self.fleet.start_timeout_seconds:g}"
                raise UserError("\n".join([f"the autoscaler brought no node within {waited}", *lines]))
            if time.monotonic() > say:
                say = time.monotonic() + SAY_SECONDS
                log.info("waiting for the autoscaler: %s", "; ".join(lines))
            time.sleep(LOOK_SECONDS)

    def seated(self) -> Mapping[str, Profile]:
        """The profiles of edges that have a worker, as far as is known."""
        pools = self.workers.pools
        if all(pools.values()):
            return self.fleet.edges
        here = {name: p for name, p in self.fleet.edges.items() if pools[self.workers.pool_of[name]]}
        return Present(here, self.fleet.edges)

    def present(self) -> Mapping[str, Profile]:
        """The same after a look at the cluster: nodes that left and nodes that joined, edges given workers there.

        Waits while there is none at all. Raises EdgeError after start_timeout_seconds.
        """
        began = time.monotonic()
        while True:
            self.workers.look()
            here = self.seated()
            self._say(here)
            if here:
                return here
            if time.monotonic() > began + self.fleet.start_timeout_seconds:
                waited = f"fleet.start_timeout_seconds={self.fleet.start_timeout_seconds:g}"
                raise EdgeError("\n".join([f"no edge has had room for {waited}", *self.workers.refusal_lines()]))
            time.sleep(LOOK_SECONDS)

    def _enough(self, least: int) -> bool:
        """Whether so many edges could be placed now."""
        self.workers.survey()
        refused = sum(len(pool.edges) for pool in self.workers.pools if pool.name in self.workers.refusals)
        return len(self.fleet.edges) - refused >= least

    def _say(self, here: Mapping[str, Profile]) -> None:
        """Says which edges went away and which are back."""
        away = set() if here is self.fleet.edges else self.fleet.edges.keys() - here.keys()
        for name in sorted(self.away - away):
            log.info("edge %s has a worker and takes part from this round on", name)
        if away - self.away:
            log.warning("left out until a node has room: %s", "; ".join(self.workers.refusal_lines()))
        self.away = away
