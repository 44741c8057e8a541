"""Which edges have room on the cluster: at the start, where they may be waited for, and from round to round."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress

from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

from fedpipe_ray.errors import EdgeError, UserError
from fedpipe_ray.settings import FleetSettings, Profile

from .placement import demand, unknown_to_ray
from .workers import Workers

log = logging.getLogger("fedpipe")

LOOK_SECONDS, SAY_SECONDS = 0.25, 10.0


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
        self.requested = False
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
        if self.fleet.autoscale:
            self._request()
        began = said = time.monotonic()
        while not self._enough(least):
            lines = self.workers.refusal_lines()
            if not self.fleet.autoscale:
                more = [f"fleet.min_edges: {least} edges must have room"] if self.fleet.min_edges else []
                raise UserError("\n".join([*lines, *more]))
            if time.monotonic() > began + self.fleet.start_timeout_seconds:
                waited = f"fleet.start_timeout_seconds={self.fleet.start_timeout_seconds:g}"
                raise UserError("\n".join([f"the autoscaler brought no node within {waited}", *lines]))
            if said == began or time.monotonic() > said + SAY_SECONDS:
                said = time.monotonic()
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

    def give_back(self) -> None:
        """Withdraws what was asked of the autoscaler, so that it can end idle nodes."""
        if self.requested:
            self.requested = False
            with suppress(RayError, RuntimeError, ConnectionError):
                request_resources(bundles=[])

    def _enough(self, least: int) -> bool:
        """Whether so many edges could be placed now."""
        self.workers.survey()
        refused = sum(len(pool.edges) for pool in self.workers.pools if pool.name in self.workers.refusals)
        return len(self.fleet.edges) - refused >= least

    def _request(self) -> None:
        """Asks the autoscaler for room for a worker of every pool, for as many as fleet.workers says where it does."""
        counts = {pool: pool.most if self.fleet.workers else 1 for pool in self.workers.pools}
        wanted = [pool.profile for pool, count in counts.items() for _ in range(count) if demand(pool.profile)]
        labels = [dict(profile.labels) for profile in wanted]
        request_resources(
            bundles=[demand(profile) for profile in wanted],
            bundle_label_selectors=labels if any(labels) else None,  # Ray's older autoscaler does not know them
        )
        self.requested = True

    def _say(self, here: Mapping[str, Profile]) -> None:
        """Says which edges went away and which are back."""
        away = set() if here is self.fleet.edges else self.fleet.edges.keys() - here.keys()
        for name in sorted(self.away - away):
            log.info("edge %s has a worker and takes part from this round on", name)
        if away - self.away:
            log.warning("left out until a node has room: %s", "; ".join(self.workers.refusal_lines()))
        self.away = away
