"""The division of a shared source: every row to exactly one edge, each edge at least one, the same anywhere."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpipe_ray.data.partition import assign
from fedpipe_ray.errors import UserError
from fedpipe_ray.settings import Partition

EDGES = ["north", "south", "west"]


@given(
    by=st.sampled_from(["iid", "dirichlet", "shards", "size"]),
    edges=st.integers(1, 9),
    labels=st.lists(st.one_of(st.integers(-3, 3), st.sampled_from(["a", "b", None])), min_size=1, max_size=120),
    exponent=st.floats(-6, 6),
    shards=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_every_row_has_one_edge_and_every_edge_a_row(
    by: str, edges: int, labels: list[object], exponent: float, shards: int, seed: int
) -> None:
    partition, names = Partition(by=by, alpha=10**exponent, shards=shards), [f"e{i}" for i in range(edges)]
    if len(labels) < edges * (shards if by == "shards" else 1):
        with pytest.raises(UserError, match=r"use (fewer edges|at most \d+ shards)"):
            assign(partition, len(labels), labels, names, seed)
        return
    owners = assign(partition, len(labels), labels, names, seed)
    assert owners.shape == (len(labels),)
    assert set(owners.tolist()) == set(range(edges))
    assert np.array_equal(owners, assign(partition, len(labels), labels, names, seed))


@given(values=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=60), edges=st.integers(1, 4))
def test_groups_of_a_column_stay_whole(values: list[str], edges: int) -> None:
    partition, names = Partition(by="column", column="clinic"), [f"e{i}" for i in range(edges)]
    if len(set(values)) < edges:
        with pytest.raises(UserError, match=r"use (fewer|at most)"):
            assign(partition, len(values), values, names, 0)
        return
    owners = assign(partition, len(values), values, names, 0)
    assert set(owners.tolist()) == set(range(edges))
    assert len({(value, owner) for value, owner in zip(values, owners.tolist(), strict=True)}) == len(set(values))


def test_a_seed_gives_the_same_rows_in_every_process_and_release() -> None:
    """Golden: edges on different machines compute this by themselves, so it may never change."""
    labels = list("aabbccddeeff")
    found = {
        by: "".join(map(str, assign(Partition(by=by, alpha=1.0), 12, labels, EDGES, seed=7)))
        for by in ("iid", "dirichlet", "shards", "size")
    }
    assert found == GOLDEN


GOLDEN = {
    "iid": "020111202120",
    "dirichlet": "111221010202",
    "shards": "001122110022",
    "size": "112101112121",
}


def test_seeds_differ() -> None:
    first, second = (assign(Partition(by="iid"), 50, None, EDGES, seed) for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_iid_sizes_differ_by_one_at_most() -> None:
    sizes = np.bincount(assign(Partition(by="iid"), 100, None, EDGES, 0))
    assert sorted(sizes) == [33, 33, 34]


def test_dirichlet_goes_from_one_class_an_edge_to_equal_shares() -> None:
    labels = np.repeat(np.arange(4), 1000)

    def largest_share(alpha: float) -> float:
        owners = assign(Partition(by="dirichlet", alpha=alpha), 4000, labels, EDGES, 3)
        counts = np.array([[np.sum(owners[labels == kind] == edge) for edge in range(3)] for kind in range(4)])
        return float((counts.max(1) / 1000).mean())

    assert largest_share(0.01) > 0.95
    assert largest_share(1e4) < 0.36
    assert 0.4 < largest_share(1.0) < 0.95


def test_dirichlet_of_one_row_a_class_favours_no_edge() -> None:
    """Cutting each class by rounding down would give all these rows to the last edge."""
    sizes = np.bincount(assign(Partition(by="dirichlet", alpha=1.0), 3000, np.arange(3000), EDGES, 0))
    assert sizes.min() > 800


def test_skewed_sizes_leave_no_edge_with_less_than_ten_of_many_rows() -> None:
    owners = assign(Partition(by="size", alpha=0.01), 5000, None, [f"e{i}" for i in range(20)], 0)
    sizes = np.bincount(owners, minlength=20)
    assert sizes.min() >= 10
    assert sizes.max() > 2000


def test_shards_give_an_edge_few_classes() -> None:
    labels = np.repeat(np.arange(10), 60)
    owners = assign(Partition(by="shards", shards=2), 600, labels, [f"e{i}" for i in range(5)], 0)
    assert np.bincount(owners).tolist() == [120] * 5
    assert all(len(set(labels[owners == edge])) <= 2 for edge in range(5))


def test_a_column_of_edge_names_decides_by_name() -> None:
    values = ["west", "north", "west", "south"]
    assert assign(Partition(by="column", column="c"), 4, values, EDGES, 0).tolist() == [2, 0, 2, 1]


def test_a_column_of_groups_fills_the_edge_with_the_fewest_rows() -> None:
    """Sizes a 5, b 4, c 3, d 3, e 2: a -> 0, b -> 1, c -> 2, d -> 2 (3 < 4 < 5), e -> 1 (4 < 5 < 6)."""
    values = list("aaaaabbbbcccdddee")
    owners = assign(Partition(by="column", column="c"), len(values), values, EDGES, 0)
    assert {value: int(owner) for value, owner in zip(values, owners, strict=True)} == {
        "a": 0,
        "b": 1,
        "c": 2,
        "d": 2,
        "e": 1,
    }


@pytest.mark.parametrize(
    ("partition", "rows", "labels", "message"),
    [
        (Partition(by="iid"), 2, None, r"2 row\(s\) for 3 edges; give data.source at least 3 rows, or use fewer edges"),
        (Partition(by="dirichlet"), 5, None, "set partition.column, or data.label"),
        (Partition(by="shards", shards=2), 5, list("aabbc"), "use at most 1 shards"),
        (Partition(by="column", column="c"), 4, ["west", "north", "east", "east"],
         r"\['east'\] are no edge and .*\['south'\]"),
        (Partition(by="column", column="c"), 4, ["x", "x", "y", "y"],
         r"c has 2 value\(s\) for 3 edges; use at most 2 edges"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_names_the_remedy(
    partition: Partition, rows: int, labels: list[str] | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        assign(partition, rows, labels, EDGES, 0)


FUNCTIONS = """
import numpy as np

def halves(rows, labels, edges, seed): return [0 if row < rows // 2 else 1 + row % 2 for row in range(rows)]
def short(rows, labels, edges, seed): return np.zeros(rows - 1, int)
def fractions(rows, labels, edges, seed): return np.zeros(rows)
def beyond(rows, labels, edges, seed): return np.full(rows, 3)
def lonely(rows, labels, edges, seed): return np.zeros(rows, int)
def broken(rows, labels, edges, seed): return labels[0] / 0
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "partition_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("functions")
def test_a_function_of_ones_own() -> None:
    owners = assign(Partition(by="partition_functions:halves"), 6, None, EDGES, 0)
    assert owners.tolist() == [0, 0, 0, 2, 1, 2]


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", r"shape \(5,\); it must give 6 integers"),
        ("fractions", "float64 of shape"),
        ("beyond", "gave 3 to 3; edges are numbered 0 to 2"),
        ("lonely", "no row to south, west"),
        ("broken", "raised TypeError"),
        ("absent", "cannot import partition_functions:absent"),
    ],
)
def test_a_function_that_answers_wrongly(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        assign(Partition(by=f"partition_functions:{name}"), 6, None, EDGES, 0)


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(UserError, match="No module named 'no_such_module'"):
        assign(Partition(by="no_such_module:f"), 6, None, EDGES, 0)
