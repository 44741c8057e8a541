"""Configuration: what a YAML file and key=value overrides become, and that the resolved form loads back the same."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters import find_profiles
from fedpipe_ray.config import (
    FREE_ON_RESUME,
    PACKAGES,
    apply_overrides,
    build,
    edge_data,
    load_run,
    read_yaml,
    resolve,
    to_yaml,
    training_hash,
)  # fmt: skip
from fedpipe_ray.errors import UserError
from fedpipe_ray.quantity import parse_quantity
from fedpipe_ray.settings import Data, Evaluate, FleetSettings, Local, Model, Profile, Run, Wire


def no_profiles(name: str, folder: Path) -> dict[str, Any]:
    raise AssertionError(f"{name} was looked for")


def loaded(path: Path, text: str, *overrides: str) -> Run:
    path.write_text(text)
    return load_run(path, overrides, find_profiles)


# -- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-3", 0.006), ("1E5", 1e5), ("-2e+3", -2000.0), ("1.5e3", 1500.0), ("1_0e2", 1000.0), (".5e3", 500.0),
        ("+1.e-2", 0.01), ("'6e-3'", "6e-3"), ("1e3x", "1e3x"), ("e5", "e5"), ("1e", "1e"), ("0.1", 0.1), ("16", 16),
        ("true", True), ("null", None), ("builtin:docstrings", "builtin:docstrings"),
    ],
)  # fmt: skip
def test_numbers_as_people_write_them(text: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"key: {text}\n")
    read = read_yaml(tmp_path / "a.yaml")["key"]
    assert (type(read), read) == (type(value), value)
    assert apply_overrides({}, [f"key={text}"]) == {"key": value}


def test_keys_are_text(tmp_path: Path) -> None:
    """Norway's edge server is called no, not false, and a hash is no number."""
    run = loaded(tmp_path / "a.yaml", "fleet: {edges: {no: {cpus: 0.5}, on: {}, 1e5: {}, 007: {}, 12: {}}}")
    assert list(run.fleet.edges) == ["no", "on", "1e5", "007", "12"]


def test_anchors_and_merges(tmp_path: Path) -> None:
    text = "fleet: {edges: {a: &small {cpus: 0.5, gpus: 0.25}, b: {<<: *small, cpus: 2}}}"
    edges = loaded(tmp_path / "a.yaml", text).fleet.edges
    assert [(e.cpus, e.gpus) for e in edges.values()] == [(0.5, 0.25), (2.0, 0.25)]


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("4GiB", "byte", 4 * 2**30), ("4 GB", "byte", 4e9), ("512MiB", "byte", 2**29),
        ("1e3 B", "byte", 1000), ("-.5kB", "byte", -500),
        ("20Mbit/s", "bit/second", 20e6), ("2 MB/s", "bit/second", 16e6), ("100Mbps", "bit/second", 100e6),
        ("30ms", "second", 0.03), ("5 min", "second", 300), ("1.5h", "second", 5400), (" 20 us", "second", 2e-5),
        ("50GFLOP/s", "flop/second", 50e9), ("1.5TFLOPS", "flop/second", 1.5e12), ("3e9 flop / s", "flop/second", 3e9),
    ],
)  # fmt: skip
def test_units(text: str, unit: str, value: float) -> None:
    assert parse_quantity(text, unit) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("unit", ["byte", "bit/second", "second", "flop/second"])
@pytest.mark.parametrize(
    "text", ["4", "4 m", "4 kg", "much", "", "GiB", "4 GiB s", "4 mB", "4 mbit/s", "1e999 B", "1/4 s"]
)
def test_what_is_no_quantity_says_how_one_looks(text: str, unit: str) -> None:
    with pytest.raises(ValueError, match=f"{unit}; write for example [0-9]+[A-Za-z]+"):
        parse_quantity(text, unit)


def test_a_plain_number_is_in_the_base_unit(tmp_path: Path) -> None:
    text = "fleet: {edges: {a: {memory_bytes: 1048576, uplink_bps: 5000, latency_seconds: 2, compute_flops: 3e9}}}"
    edge = loaded(tmp_path / "a.yaml", text).fleet.edges["a"]
    assert (edge.memory_bytes, edge.uplink_bps, edge.latency_seconds, edge.compute_flops) == (1048576, 5000, 2, 3e9)
    assert isinstance(edge.memory_bytes, int)


def test_part_of_a_byte_is_cut_off(tmp_path: Path) -> None:
    """0.3 x 2**30 = 322122547.2; and 1e9, which YAML reads as a float, is a whole number of bytes."""
    edges = loaded(
        tmp_path / "a.yaml", "fleet: {edges: {a: {memory_bytes: 0.3GiB}, b: {memory_bytes: 1e9}}}"
    ).fleet.edges
    assert (edges["a"].memory_bytes, edges["b"].memory_bytes) == (322122547, 10**9)


# -- overrides


def test_overrides_reach_every_depth_and_leave_the_tree_alone() -> None:
    tree = {"local": {"lr": 0.1, "steps": 3}, "data": None, "rounds": 2}
    before = copy.deepcopy(tree)
    changed = apply_overrides(
        tree,
        [
            "local.lr=6e-3", "data.labels=[x, '1']", "method={name: lora, rank: 2}", "fleet.edges.a.labels.zone=b",
            "out=a=b", "rounds=", "data.source=s3://x/y.csv?z=1",
        ],
    )  # fmt: skip
    assert changed == {
        "local": {"lr": 0.006, "steps": 3},
        "data": {"labels": ["x", "1"], "source": "s3://x/y.csv?z=1"},
        "method": {"name": "lora", "rank": 2},
        "fleet": {"edges": {"a": {"labels": {"zone": "b"}}}},
        "out": "a=b",
        "rounds": None,
    }
    assert tree == before


def test_the_last_override_wins() -> None:
    assert apply_overrides({}, ["a.b=1", "a={b: 2, c: 3}", "a.c=4"]) == {"a": {"b": 2, "c": 4}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr", "'lr' is not key=value"),
        ("=3", "'=3' is not key=value"),
        ("rounds.more=3", "rounds is a value, not a section"),
        ("data.labels.0=x", "labels is a value, not a section"),
        ("a=[1", "not valid YAML"),
        ("a=!!python/name:os.system x", "not valid YAML"),
        ("a={b: 1, b: 2}", "'b' stands twice"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply_overrides({"rounds": 2, "data": {"labels": ["x"]}}, [override])


# -- profiles


def test_profile_files_have_defaults_and_counts(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("""
defaults: {cpus: 0.5, uplink_bps: 1Mbit/s}
edges: {worker: {count: 3, gpus: 0.5}, solo: {cpus: 2}, plain: }
""")
    run = loaded(tmp_path / "run.yaml", "fleet: {profiles: mine.yaml}")
    assert run.fleet.profiles is None
    assert {name: (e.cpus, e.gpus, e.uplink_bps) for name, e in run.fleet.edges.items()} == {
        "worker-0": (0.5, 0.5, 1e6), "worker-1": (0.5, 0.5, 1e6), "worker-2": (0.5, 0.5, 1e6),
        "solo": (2.0, 0.0, 1e6), "plain": (0.5, 0.0, 1e6),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("edges: {a: 5}", "edges.a: 5 is no profile"),
        ("edges: {a: {}}\ndefaults: [cpus]", r"defaults: \['cpus'\] is no profile"),
        ("edges: {a: {count: 0}}", "edges.a.count: 0 must be a whole number"),
        ("edges: {a: {count: 2}, a-1: {}}", "edges.a-1: a-1 stands twice"),
        ("edges: {}", "needs a mapping `edges`"),
        ("a: {cpus: 1}\nedges: {b: {}}", "unknown key a"),
    ],
)
def test_bad_profile_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=f"mine.yaml: .*{message}"):
        loaded(tmp_path / "run.yaml", "fleet: {profiles: mine.yaml}")


def test_keys_beside_a_profile_file_go_over_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("edges: {a: {cpus: 2, gpus: 1}, b: {cpus: 3}}")
    run = loaded(tmp_path / "run.yaml", "fleet: {profiles: mine.yaml, edges: {b: {gpus: 2}}}", "fleet.edges.a.cpus=0.5")
    assert {name: (e.cpus, e.gpus) for name, e in run.fleet.edges.items()} == {"a": (0.5, 1.0), "b": (3.0, 2.0)}
    with pytest.raises(UserError, match=r"fleet\.edges: no edge bb in mine\.yaml; did you mean b\?"):
        loaded(tmp_path / "run.yaml", "fleet: {profiles: mine.yaml}", "fleet.edges.bb.cpus=1")


def test_a_file_beside_the_run_goes_before_a_ready_one(tmp_path: Path) -> None:
    ready = loaded(tmp_path / "run.yaml", "fleet: {profiles: laptop.yaml}")
    assert loaded(tmp_path / "run.yaml", "fleet: {profiles: clusters/laptop.yaml}") == ready
    (tmp_path / "laptop.yaml").write_text("edges: {mine: }")
    assert list(loaded(tmp_path / "run.yaml", "fleet: {profiles: laptop.yaml}").fleet.edges) == ["mine"]
    assert len(ready.fleet.edges) == 5


# -- data of the edges


def test_every_edge_has_a_source(tmp_path: Path) -> None:
    run = loaded(
        tmp_path / "run.yaml",
        """
data: {source: "x/{edge}.jsonl", prompt: "{q}", response: "{a}", validation: "x/{edge}-v.jsonl", max_length: 64}
fleet: {edges: {a: {}, b: {data: "y/{edge}.csv"}, c: {data: {max_length: 32, test: 0.3, validation: 0.1}}}}
""",
    )
    data = {name: edge_data(run, name, profile) for name, profile in run.fleet.edges.items()}
    assert {name: (d.source, d.validation, d.test, d.max_length) for name, d in data.items()} == {
        "a": ("x/a.jsonl", "x/a-v.jsonl", 0.1, 64),
        "b": ("y/b.csv", "x/b-v.jsonl", 0.1, 64),
        "c": ("x/c.jsonl", 0.1, 0.3, 32),
    }
    assert run.data.source == "x/{edge}.jsonl"


def test_the_built_in_corpus_gives_each_edge_its_package(tmp_path: Path) -> None:
    """By position, so that the packages of the others stay where one edge names its own."""
    text = "fleet: {edges: {a: {}, b: {data: builtin:docstrings/yaml}, c: {data: {max_length: 32}}}}"
    run = loaded(tmp_path / "run.yaml", text)
    sources = [edge_data(run, name, profile).source for name, profile in run.fleet.edges.items()]
    assert sources == ["builtin:docstrings/" + name for name in (PACKAGES[0], "yaml", PACKAGES[2])]
    assert edge_data(run, "c", run.fleet.edges["c"]).max_length == 32
    assert resolve(run) == run


# -- the resolved form

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True) | st.sampled_from(
    ["no", "1e5", "007", "1_0", "NULL"]
)
texts = st.text(max_size=12) | st.sampled_from(
    ["6e-3", "7e10", ".5e1", "null", "~", "2020-01-01", "1:30", "<<", "=", "#", "a\x85b", "\u2028"]
)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
shares = st.floats(0, 1, exclude_min=True)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
profiles = st.builds(
    Profile, gpus=st.sampled_from([0.0, 0.25, 1.0, 2.0]), cpus=st.floats(0, 64),
    memory_bytes=st.none() | st.integers(1, 2**60),
    resources=st.dictionaries(texts, st.floats(0, 1e9), max_size=2), labels=st.dictionaries(texts, texts, max_size=2),
    compute_flops=positive, uplink_bps=positive, latency_seconds=st.floats(0, 1e9), availability=shares,
    private_dir=st.none() | texts,
    data=texts.map("file:".__add__)
    | st.fixed_dictionaries({}, optional={"max_length": st.integers(8, 999), "prompt": texts}),
)  # fmt: skip
runs = st.builds(
    Run, seed=st.integers(0, 2**63), rounds=st.integers(1, 10**6),
    model=st.builds(Model, name=texts, revision=st.none() | texts, load=st.sampled_from(["auto", "driver", "node"])),
    data=st.builds(
        Data, source=texts, prompt=texts, response=texts, labels=st.lists(texts, max_size=3),
        test=st.floats(0, 0.9) | texts,
    ),
    fleet=st.builds(
        FleetSettings, edges=st.dictionaries(names, profiles, min_size=1, max_size=3), ray=st.booleans(),
        fraction=shares,
    ),
    method=st.dictionaries(texts, values, max_size=3).map(lambda rest: {**rest, "name": "lora"}),
    local=st.builds(Local, epochs=st.none() | positive, lr=positive, schedule=st.sampled_from(["constant", "cosine"])),
    wire=st.builds(Wire, dtype=st.sampled_from(["float32", "bfloat16"])),
    evaluate=st.builds(Evaluate, target=st.none() | positive, rows=st.none() | st.integers(1, 99)),
    out=st.none() | texts,
)  # fmt: skip


@given(runs)
def test_the_resolved_run_loads_back_the_same(tmp_path_factory: pytest.TempPathFactory, run: Run) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    run = resolve(run)
    path.write_text(to_yaml(run), encoding="utf-8")
    again = load_run(path, [], no_profiles)
    assert again == run
    assert training_hash(again) == training_hash(run)
    assert to_yaml(again) == to_yaml(run)


def test_a_loaded_file_resolves_to_one_that_loads_the_same(tmp_path: Path) -> None:
    """With profiles, units and the built-in corpus, all of which the resolved form has written out."""
    run = loaded(tmp_path / "run.yaml", "fleet: {profiles: laptop.yaml}\nlocal: {lr: 6e-3}", "model.revision='7e10'")
    assert loaded(tmp_path / "config.yaml", to_yaml(run)) == run
    assert (run.local.lr, run.model.revision) == (0.006, "7e10")


# -- the hash that resume compares


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key of a run, down to what is no section; `edges` holds sections by name."""
    if not dataclasses.is_dataclass(value):
        yield path
        return
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if field.name == "edges":
            for edge, profile in inner.items():
                yield from leaves(profile, (*path, "edges", edge))
        else:
            yield from leaves(inner, (*path, field.name))


def changed(run: Run, path: tuple[str, ...]) -> Run:
    """A copy with another value, valid or not, at `path`."""
    node: Any = (run := copy.deepcopy(run))
    for part in path[:-1]:
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    object.__setattr__(node, path[-1], "something else")
    return run


def test_the_hash_covers_every_key_but_the_free_ones() -> None:
    tree = {"server": {"data": {}}, "fleet": {"edges": {"a": {}, "b": {}}}}
    run = build(Run, tree)
    free = {path for path in leaves(run) if training_hash(changed(run, path)) == training_hash(run)}
    track = {f"track.{field.name}" for field in dataclasses.fields(run.track)}
    assert {".".join(path) for path in free} == set(FREE_ON_RESUME) - {"track"} | track
    assert len(list(leaves(run))) > 80


def test_the_hash_is_short_and_of_values_not_of_their_order() -> None:
    one = build(Run, {"method": {"name": "lora", "rank": 4}, "rounds": 3})
    other = build(Run, {"rounds": 9, "method": {"rank": 4, "name": "lora"}})
    assert training_hash(one) == training_hash(other)
    assert len(training_hash(one)) == 12
    assert training_hash(build(Run, {"method": {"name": "lora", "rank": 5}})) != training_hash(one)
