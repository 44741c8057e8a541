"""Where edges can run, against a search over all placements; and what is said when they cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.placement import Node, actor_options, demand, device_fault, pools_of, seats, unplaceable
from fedpipe_ray.settings import FleetSettings, Profile

GIB = 2**30


def node(
    cpus: float, gpus: float = 0, gib: float = 64, labels: Mapping[str, str] | None = None, **other: float
) -> Node:
    return Node({"CPU": cpus, "GPU": gpus, "memory": gib * GIB, **other}, labels or {})


def placement(profiles: Sequence[Profile], nodes: Sequence[Node]) -> list[int] | None:
    """The number of each profile's node, by trying all; None if there is no way."""

    def place(index: int, left: list[dict[str, float]]) -> list[int] | None:
        if index == len(profiles):
            return []
        wanted = demand(profiles[index])
        for i, there in enumerate(nodes):
            labelled = all(there.labels.get(key) == value for key, value in profiles[index].labels.items())
            if not (labelled and all(left[i].get(key, 0) >= amount for key, amount in wanted.items())):
                continue
            taken = {key: left[i].get(key, 0) - wanted.get(key, 0) for key in left[i]}
            rest = place(index + 1, [taken if j == i else other for j, other in enumerate(left)])
            if rest is not None:
                return [i, *rest]
        return None

    return place(0, [dict(there.resources) for there in nodes])


zones = st.dictionaries(st.just("zone"), st.sampled_from("ab"), max_size=1)
profiles = st.builds(
    Profile, cpus=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]), gpus=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]),
    labels=zones, memory_bytes=st.none() | st.sampled_from([GIB, 3 * GIB]),
    resources=st.dictionaries(st.just("camera"), st.just(1.0), max_size=1),
)  # fmt: skip
nodes = st.builds(
    lambda cpus, gpus, gib, labels, camera: node(cpus, gpus, gib, labels, camera=camera),
    st.integers(0, 6), st.integers(0, 2), st.integers(1, 8), zones, st.integers(0, 1),
)  # fmt: skip


@given(st.lists(profiles, min_size=1, max_size=4), st.lists(nodes, min_size=1, max_size=3))
def test_what_is_accepted_can_be_placed(edges: list[Profile], there: list[Node]) -> None:
    lines = unplaceable({f"e{i}": edge for i, edge in enumerate(edges)}, there)
    found = placement(edges, there)
    assert lines or found is not None
    if found is not None and not lines:
        for i, spot in enumerate(there):
            wanted = [demand(edge) for edge, at in zip(edges, found, strict=True) if at == i]
            assert all(sum(w.get(key, 0) for w in wanted) <= spot.resources.get(key, 0) for w in wanted for key in w)
    for line in lines:
        name = line.removeprefix("edge ").partition(":")[0]
        assert f"edge {name}: " in line
        alone = placement([edges[int(name[1:])]], there) is not None
        assert alone == ("beside the other edges" in line)


@given(profiles, st.integers(1, 5), st.lists(nodes, min_size=1, max_size=3))
def test_edges_that_are_alike_are_never_refused_if_there_is_a_way(edge: Profile, count: int, there: list[Node]) -> None:
    lines = unplaceable({f"e{i}": edge for i in range(count)}, there)
    assert (lines == []) == (placement([edge] * count, there) is not None)


@given(st.lists(profiles, min_size=1, max_size=4), st.lists(nodes, min_size=1, max_size=3), nodes)
def test_room_for_one_more_can_only_help_an_edge_alone(edges: list[Profile], there: list[Node], more: Node) -> None:
    for edge in edges:
        if not unplaceable({"e": edge}, there):
            assert not unplaceable({"e": edge}, [*there, more])


def test_an_edge_that_fits_anywhere_leaves_the_labelled_node() -> None:
    """`any` comes first and the labelled node too: it must not take the one place that `west` can have."""
    edges = {"any": Profile(cpus=1), "west": Profile(cpus=1, labels={"zone": "west"})}
    assert unplaceable(edges, [node(1, labels={"zone": "west"}), node(1)]) == []


def test_an_edge_without_a_gpu_leaves_the_gpu_node() -> None:
    edges = {"small": Profile(cpus=2), "gpu": Profile(cpus=1, gpus=0.5)}
    assert unplaceable(edges, [node(2, gpus=1), node(2)]) == []


@pytest.mark.parametrize(
    ("edges", "there", "lines"),
    [
        (
            {"e3": Profile(cpus=8)},
            [node(4), node(2)],
            ["edge e3: cpus 8 is more than any node has (4); lower it in its profile, or add such a node"],
        ),
        (
            {"e": Profile(gpus=2)},
            [node(4, gpus=1)],
            ["edge e: gpus 2 is more than any node has (1); lower it in its profile, or add such a node"],
        ),
        (
            {"e": Profile(memory_bytes=6 * GIB)},
            [node(4, gib=4)],
            [
                "edge e: memory_bytes 6.00 GiB is more than any node has (4.00 GiB); "
                "lower it in its profile, or add such a node"
            ],
        ),
        (
            {"e": Profile(resources={"camera": 1})},
            [node(4)],
            ["edge e: resources.camera 1 is more than any node has (0); lower it in its profile, or add such a node"],
        ),
        (
            {"e": Profile(cpus=4, gpus=1)},
            [node(4), node(2, gpus=1)],
            [
                "edge e: no node has cpus 4, gpus 1 together; "
                "lower one of them in its profile, or add such a node"
            ],
        ),
        (
            {"e": Profile(labels={"zone": "north"})},
            [node(4, labels={"zone": "south", "ray.io/node-id": "f00"}), node(1)],
            ["edge e: no node has labels zone=north; there are zone=south"],
        ),
        (
            {"e": Profile(labels={"zone": "north"})},
            [node(4)],
            ["edge e: no node has labels zone=north; there are none"],
        ),
        (
            {"a": Profile(cpus=3), "b": Profile(cpus=2), "c": Profile(cpus=1)},
            [node(4)],
            [
                "edge b: no room left for cpus 2 beside the other edges; the 1 node(s) offer cpus 4 in all; "
                "lower the profiles, use fewer edges, or fleet.ray=false"
            ],
        ),
    ],
    ids=["cpus", "gpus", "memory", "resource", "together", "labels", "no-labels", "room"],
)  # fmt: skip
def test_every_refusal_says_what_is_missing(edges: dict[str, Profile], there: list[Node], lines: list[str]) -> None:
    assert unplaceable(edges, there) == lines


def test_fractions_of_a_gpu_add_up() -> None:
    """Ten tenths are one GPU, though 10 x 0.1 is more than 1 in binary; an eleventh has no room."""
    tenth = {f"e{i}": Profile(cpus=0, gpus=0.1) for i in range(11)}
    assert len(unplaceable(tenth, [node(1, gpus=1)])) == 1
    assert unplaceable(dict(list(tenth.items())[:10]), [node(1, gpus=1)]) == []


@pytest.mark.parametrize(
    ("profile", "options"),
    [
        (Profile(), {"num_cpus": 1.0, "num_gpus": 0.0, "resources": {}}),
        (
            Profile(cpus=0.5, gpus=0.25, memory_bytes=GIB, resources={"camera": 1}, labels={"zone": "a"}),
            {
                "num_cpus": 0.5, "num_gpus": 0.25, "memory": GIB, "resources": {"camera": 1},
            },
        ),
    ],
)  # fmt: skip
def test_options_of_an_actor(profile: Profile, options: dict[str, Any]) -> None:
    assert actor_options(profile) == options


def test_what_is_not_wanted_is_not_asked_for() -> None:
    assert demand(Profile(cpus=0, resources={"camera": 0})) == {}
    assert unplaceable({"e": Profile(cpus=0)}, [Node({}, {})]) == []
    assert len(unplaceable({"e": Profile(cpus=0)}, [])) == 1


# -- the GPU that an edge got


@pytest.mark.parametrize(
    ("profile", "name", "gib", "says"),
    [
        (Profile(), "", 0, None),
        (Profile(gpus=1), "NVIDIA H100 80GB HBM3", 80, None),
        (Profile(gpus=1, labels={"gpu": "h100"}), "NVIDIA H100 80GB HBM3", 80, None),
        (Profile(gpus=1, labels={"ray.io/accelerator-type": "RTX-4090"}), "NVIDIA GeForce RTX 4090", 24, None),
        (Profile(gpus=0.5), "", 0, "Ray gave it gpus 0.5, but torch sees no GPU"),
        (Profile(gpus=1, labels={"gpu": "A100"}), "NVIDIA L4", 22, "names the GPU 'A100', and it got 'NVIDIA L4'"),
        (
            Profile(gpus=1, gpu_memory_bytes=24 * GIB),
            "NVIDIA L4",
            22,
            "gpu_memory_bytes 24.00 GiB is more than its GPU",
        ),
    ],
)
def test_the_gpu_is_the_one_of_the_profile(profile: Profile, name: str, gib: int, says: str | None) -> None:
    fault = device_fault(profile, name, gib * GIB)
    assert fault is None if says is None else says in str(fault)


# -- edges that share workers


def packed(edges: Mapping[str, Profile], workers: int | None = None) -> FleetSettings:
    return FleetSettings(edges=dict(edges), placement="packed", workers=workers)


def test_edges_that_reserve_the_same_share_a_pool() -> None:
    """What the virtual clock believes of them does not matter; what Ray reserves does; several processes stay apart."""
    edges = {
        "a": Profile(cpus=2), "b": Profile(cpus=1), "c": Profile(cpus=2, compute_flops=9e9, data="c.jsonl"),
        "d": Profile(cpus=2, labels={"zone": "a"}), "e": Profile(cpus=2, workers=2), "f": Profile(cpus=2, workers=2),
    }  # fmt: skip
    assert [(pool.edges, pool.most) for pool in pools_of(packed(edges))] == [
        (["a", "c"], 2), (["b"], 1), (["d"], 1), (["e"], 1), (["f"], 1)
    ]  # fmt: skip
    assert [pool.most for pool in pools_of(packed(edges, workers=1))] == [1] * 5
    assert [pool.edges for pool in pools_of(FleetSettings(edges=edges))] == [[name] for name in edges]


def test_every_kind_of_edge_gets_a_worker_before_any_gets_a_second() -> None:
    small = {f"s{i}": Profile(cpus=1) for i in range(5)}
    pools = pools_of(packed({**small, "large": Profile(cpus=2)}))
    chosen, faults = seats({pool: pool.most for pool in pools}, [node(4)])
    assert sorted(pool.name for pool, _ in chosen) == ["large", "s0", "s0"]
    assert faults == {}


def test_room_that_is_free_now_comes_first() -> None:
    busy, idle = Node({"CPU": 4.0}, {}, "busy", {"CPU": 0.0}), Node({"CPU": 4.0}, {}, "idle", {"CPU": 4.0})
    pools = pools_of(FleetSettings(edges={f"e{i}": Profile(cpus=2) for i in range(4)}))
    chosen, _ = seats(dict.fromkeys(pools, 1), [busy, idle])
    assert [there.id for _, there in chosen] == ["idle", "idle", "busy", "busy"]
