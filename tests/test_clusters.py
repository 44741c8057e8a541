"""Profiles and examples that ship are valid as they stand; which profiles find room on which cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import ROOT, here
from test_cli import loaded_by

from clusters import HERE, find_profiles
from fedpipe_ray.config import build, load_run
from fedpipe_ray.methods import make_method
from fedpipe_ray.settings import Profile

CLUSTERS = [*sorted((HERE / "ray_up").glob("*.yaml")), HERE / "kuberay" / "cluster.yaml", HERE / "kuberay" / "job.yaml"]


@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("*.yaml")))
def test_profiles_are_valid(name: str) -> None:
    profiles = find_profiles(f"clusters/{name}", Path("/"))
    assert len(profiles) >= 5
    assert all(build(Profile, profile).compute_flops > 0 for profile in profiles.values())


RUN_FILES = sorted(path for path in (ROOT / "examples").glob("*.yaml") if path.stem != "campaign")


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_examples_load(path: Path) -> None:
    run = load_run(path, [], find_profiles)
    assert len(run.fleet.edges) == {"seven-billion": 7}.get(path.stem, 5)
    assert make_method(run.method)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run on the edges of clusters/cloud.yaml whose data is not on this machine."""
    path = tmp_path / "run.yaml"
    data = 'data: {source: "/nowhere/{edge}.jsonl", prompt: "{q}", response: "{a}"}'
    path.write_text(f"{data}\nfleet: {{profiles: clusters/cloud.yaml}}\n")
    return path


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_the_profiles_fit_the_clusters_they_are_made_for(
    path: Path, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profiles = "clusters/mixed_gpus.yaml" if path.stem == "bare" else "clusters/cloud.yaml"
    assert here("check", run_file, f"fleet.profiles={profiles}", "--cluster", path) == 0
    edges = 12 if path.stem == "bare" else 7
    assert f"{path}: room for all {edges} edges with all it may start" in capsys.readouterr().out


SMALL = """
cluster_name: c
provider: {type: aws, region: r}
max_workers: 3
head_node_type: head
available_node_types:
  head: {resources: {CPU: 0}, node_config: {}}
  a: {max_workers: 3, resources: {CPU: 4, memory: 1073741824}, labels: {zone: east}, node_config: {}}
"""
JOB = "{apiVersion: ray.io/v1, kind: RayJob, spec: {entrypoint: e, clusterSelector: {ray.io/cluster: c}}}"
LOCAL = "{cluster_name: c, provider: {type: local, head_ip: h, worker_ips: [u, v]}, metadata: {machines: MACHINES}}"
BAD = {
    "alone": (SMALL, "{e: {cpus: 5}}", ["no room for 1 of 1 edges", "edge e: cpus 5 is more than any node has (4)"]),
    "memory": (SMALL, "{e: {memory_bytes: 2GiB}}", ["memory_bytes 2.00 GiB is more than any node has (1.00 GiB)"]),
    "label": (SMALL, "{e: {labels: {zone: west}}}", ["no node has labels zone=west; there are zone=east"]),
    "workers": (SMALL, "{" + ", ".join(f"e{i}: {{cpus: 3}}" for i in range(4)) + "}",
                ["no room for 1 of 4 edges", "(head, 3 a)", "edge e3: no room left for cpus 3"]),
    "no-cpu": (SMALL.replace("CPU: 4, ", ""), "{e: {}}", ["available_node_types.a.resources: states no CPU"]),
    "global": (SMALL.replace("max_workers: 3\nhead", "max_workers: 2\nhead"), "{e: {}}",
               ["max_workers 2 is less than the 3 workers"]),
    "no-types": ("{cluster_name: c, provider: {type: gcp}}", "{e: {}}", ["head_node_type None must be one of"]),
    "job": (JOB, "{e: {}}", ["this RayJob brings no cluster (rayClusterSpec)"]),
    "undescribed": (LOCAL.replace("MACHINES", "{u: {resources: {CPU: 1}}}"), "{e: {}}",
                    ["no machine is described for worker_ips v"]),
    "stranger": (LOCAL.replace("MACHINES", "{u: {resources: {}}, v: {resources: {}}, w: {resources: {}}}"), "{e: {}}",
                 ["w is described, and provider.worker_ips has ['u', 'v']"]),
    "profile": ("{edges: {e: {}}}", "{e: {}}", ["neither a `ray up` file", "RayCluster or RayJob", "it has edges"]),
    "list": ("[1, 2]", "{e: {}}", ["neither a `ray up` file", "it has no keys"]),
    "empty": ("", "{e: {}}", ["neither a `ray up` file"]),
    "yaml": ("{a: [", "{e: {}}", ["cannot be read as YAML"]),
    "shape": (SMALL.replace("{CPU: 0}", "zero"), "{e: {}}", ["states no CPU"]),
    "type": (SMALL.replace("max_workers: 3, ", "max_workers: many, "), "{e: {}}", ["is not what Ray's launcher reads"]),
    "no-spec": ("{apiVersion: ray.io/v1, kind: RayCluster}", "{e: {}}", ["is not what Ray's launcher reads"]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "edges", "said"), BAD.values(), ids=list(BAD))
def test_what_does_not_fit_is_told(
    text: str, edges: str, said: list[str], run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = run_file.with_name("cluster.yaml")
    cluster.write_text(text)
    assert here("check", run_file, "fleet.profiles=null", f"fleet.edges={edges}", "--cluster", cluster) == 2
    message = capsys.readouterr().err
    assert str(cluster) in message
    for one in said:
        assert one in message


def test_a_file_that_is_not_there_is_told(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert here("check", run_file, "--cluster", "nowhere.yaml") == 2
    assert "no file nowhere.yaml; ready ones: clusters/ray_up/*.yaml" in capsys.readouterr().err


def test_a_thousand_edges_against_thousands_of_nodes(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2 CPUs each on nodes of 4: 500 nodes hold all, 3 nodes hold 6; twenty refusals are enough to read."""
    profiles, cluster = run_file.with_name("thousand.yaml"), run_file.with_name("cluster.yaml")
    profiles.write_text((HERE / "thousand.yaml").read_text().replace("cpus: 0.01", "cpus: 2"))
    for most, code in ((5000, 0), (500, 0), (3, 2)):
        cluster.write_text(SMALL.replace("max_workers: 3", f"max_workers: {most}"))
        assert here("check", run_file, f"fleet.profiles={profiles}", "--cluster", cluster) == code
    captured = capsys.readouterr()
    assert captured.out.count("room for all 1000 edges") == 2
    assert "no room for 994 of 1000 edges" in captured.err
    assert captured.err.count("\nedge ") == 20


def test_the_check_of_a_cluster_file_is_light() -> None:
    arguments = ["check", "examples/quickstart.yaml", "--cluster", "clusters/kuberay/job.yaml"]
    assert loaded_by(f"from fedpipe_ray.__main__ import main\nassert main({arguments!r}) == 0") == []
