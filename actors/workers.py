"""The workers of a fleet: actors, each pinned to the node that placement.py found for it; made again where one died."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from fedpipe_ray.methods.base import Method
from fedpipe_ray.settings import Run

from .claims import Claims
from .connect import forking
from .parallel import END_SECONDS, actor_kind, release
from .placement import Node, Pool, actor_options, asked_for, only_free, pools_of, processes, seats, without

log = logging.getLogger("fedpipe")
NAMED = 8  # edges of a pool that a message names
PLACED_SECONDS = 5.0  # for Ray to find the room that it has
Place = tuple[Pool, Node, Any]  # the last: the placement group whose room it is, or None


@dataclass(eq=False)
class Call:
    """Something asked of an edge. answers: where its answer goes; refs: what to wait for and what comes with it.

    before: why it must be asked again, in words.
    """

    edge: str
    send: Callable[[Worker, str], Any]
    limit_seconds: float | None
    late: str
    retries: int
    answers: dict[str, Any]
    tries: int = 0
    before: str = ""
    refs: Any = None
    began: float = 0.0


@dataclass(eq=False)
class Worker:
    """An actor. ready: to wait for while it starts, since `began`; given: calls it works at, the first one now.

    group: the placement group whose room it has, or None.
    """

    actor: Any
    pool: Pool
    node_id: str
    ready: Any
    began: float
    group: Any = None
    queue: deque[Call] = field(default_factory=deque)
    given: deque[Call] = field(default_factory=deque)

    @property
    def load(self) -> int:
        """Calls it has before it."""
        return len(self.queue) + len(self.given)


class Workers:
    """Those that live, by pool. homes: which of them an edge was last at, for those asked so far."""

    def __init__(self, run: Run, method: Method, private_dir: Path | None) -> None:
        self.pools: dict[Pool, list[Worker]] = {pool: [] for pool in pools_of(run.fleet)}
        self.pool_of = {name: pool for pool in self.pools for name in pool.edges}
        self.homes: dict[str, Worker] = {}
        self.equipment: tuple[Any, ...] = ([], None, None)  # classes and the parcel, as `equip` takes them
        self.warm = False  # whether a new worker makes an edge ready at once
        self.refusals: dict[str, str] = {}  # of pools without a worker, by pool name
        self.gone: set[str] = set()  # nodes that Ray may still believe alive
        counts = {pool: pool.most if run.fleet.workers else 1 for pool in self.pools}
        self.claims = Claims(counts if run.fleet.autoscale else {})
        self._settings = ray.put((run, method))  # once, however many workers read it
        self._private_dir = str(private_dir) if private_dir else None

    def __iter__(self) -> Iterator[Worker]:
        for workers in list(self.pools.values()):
            yield from list(workers)

    def of(self, name: str) -> list[Worker]:
        """The workers that an edge may use."""
        return self.pools[self.pool_of[name]]

    def survey(self) -> list[Place]:
        """Where more workers can start now; notes in `refusals` why a pool has none and can have none.

        A pool that asks the autoscaler gets the workers it asks for where that request has room, and nowhere else.
        """
        lacking = {pool: pool.most - len(workers) for pool, workers in self.pools.items() if len(workers) < pool.most}
        if not lacking:
            self.refusals = {}
            return []
        nodes = self._room()
        granted = self._granted(nodes)
        nodes = without(nodes, [(node.id, pool.profile) for pool, node, _ in granted])
        begun = {pool for pool, workers in self.pools.items() if workers} | {pool for pool, _, _ in granted}
        found, self.refusals = seats({pool: n for pool, n in lacking.items() if pool not in begun}, nodes)
        asking = [pool for pool in lacking if pool not in begun and pool in self.claims.wanted]
        for pool in asking:
            self.refusals.setdefault(pool.name, asked_for(pool))
        found = [(pool, node) for pool, node in found if pool not in asking]
        left = without(nodes, [(node.id, pool.profile) for pool, node in found])
        if self.claims.wanted:
            left = only_free(left)  # the rest may be kept for others
        more = {pool: min(n, self._beyond(pool)) for pool, n in lacking.items() if pool in begun}
        found += seats({pool: n for pool, n in more.items() if n > 0}, left)[0]
        return [*granted, *((pool, node, None) for pool, node in found)]

    def _room(self) -> list[Node]:
        """The nodes, less what our workers reserve."""
        ours = [(worker.node_id, worker.pool.profile) for worker in self]
        return without([node for node in nodes_now() if node.id not in self.gone], ours)

    def _granted(self, nodes: Sequence[Node]) -> list[Place]:
        """What was asked for, has room now, and is not used yet; asks for what is missing."""
        if not self.claims.wanted:
            return []
        self.claims.ask({pool: self._apart(pool) for pool in self.pools})
        alive = {node.id: node for node in nodes}
        placed = self.claims.placed([worker.group for worker in self if worker.group is not None])
        return [(pool, alive[node_id], group) for pool, group, node_id in placed if node_id in alive]

    def _apart(self, pool: Pool) -> int:
        """Workers of a pool whose room is no request's."""
        return sum(worker.group is None for worker in self.pools[pool])

    def _beyond(self, pool: Pool) -> int:
        """How many more workers a pool may have beside those that it asks for."""
        wanted = self.claims.wanted.get(pool)
        return pool.most if wanted is None else pool.most - wanted - self._apart(pool)

    def fill(self) -> None:
        """Starts workers wherever a pool may have more and a node has room.

        Waits a moment for a request that a node has room for: it may have lost the one it was on.
        """
        deadline = time.monotonic() + PLACED_SECONDS
        while True:
            for place in self.survey():
                self._start(*place)
            empty = {pool: 1 for pool in self.claims.wanted if not self.pools[pool]}
            if not empty or time.monotonic() > deadline or not seats(empty, only_free(self._room()))[0]:
                return
            time.sleep(0.05)

    def look(self) -> None:
        """Ends workers whose node left, and starts what there is room for."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - self.gone
        for worker in self:
            if worker.node_id not in alive:
                log.warning("the node of a worker of edge %s left", worker.pool.name)
                self.bury(worker)
        self.fill()

    def equip(self) -> None:
        """Gives every worker what edges have in common."""
        for worker in self:
            worker.ready, worker.began = worker.actor.equip.remote(*self.equipment, None), time.monotonic()

    def bury(self, worker: Worker) -> None:
        """Ends a worker; its calls are the caller's to give to others."""
        if worker in self.pools[worker.pool]:
            self.pools[worker.pool].remove(worker)
            with suppress(RayError, ValueError):
                ray.kill(worker.actor)
            if processes(worker.pool.profile) > 1:
                release(worker.actor)

    def refusal_lines(self) -> list[str]:
        """A line for every pool without a worker, which names its edges."""
        pools = {pool.name: pool for pool in self.pools}
        return [named(pools[name], line) for name, line in self.refusals.items()]

    def close(self) -> None:
        """Ends all."""
        ending = [worker.actor.end.remote() for worker in self if processes(worker.pool.profile) > 1]
        if ending:
            with suppress(RayError):
                ray.wait(ending, num_returns=len(ending), timeout=END_SECONDS)
        for worker in self:
            self.bury(worker)
        self.homes.clear()
        self.claims.withdraw()

    def _start(self, pool: Pool, node: Node, group: Any) -> None:
        """Makes an actor on `node`; its process imports and loads while we go on."""
        if group is not None and processes(pool.profile) > 1:  # Ray Train reserves for them
            self.claims.hand_over(pool, group)
            group = None
        kind, groups, options = actor_kind(pool.profile, actor_options(pool.profile))
        if forking():
            options.pop("runtime_env", None)  # it spares Ray Train's actors the imports, which forks need not do
        options["scheduling_strategy"] = (
            NodeAffinitySchedulingStrategy(node.id, soft=False)
            if group is None
            else PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        )
        remote: Any = ray.remote(concurrency_groups=groups)(kind)  # type: ignore[call-overload]  # Ray's types lack it
        alone = len(pool.edges) == 1
        actor = remote.options(**options).remote(self._settings, self._private_dir, pool.name, alone)
        ready = actor.equip.remote(*self.equipment, pool.name if self.warm else None)
        self.pools[pool].append(Worker(actor, pool, node.id, ready, time.monotonic(), group=group))


def nodes_now() -> list[Node]:
    """The nodes of the cluster that are alive."""
    free = available_resources_per_node()
    return [
        Node(node["Resources"], node.get("Labels", {}), node["NodeID"], free.get(node["NodeID"]))
        for node in ray.nodes()
        if node["Alive"]
    ]


def named(pool: Pool, line: str) -> str:
    """A refusal of a pool with the names of its edges."""
    if len(pool.edges) == 1:
        return line
    more = f" and {len(pool.edges) - NAMED} more" if len(pool.edges) > NAMED else ""
    return line.replace(f"edge {pool.name}:", f"edges {', '.join(pool.edges[:NAMED])}{more}:", 1)
