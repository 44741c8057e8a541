"""The files for Ray's own launchers: valid by their schemas, read as Ray reads them, and true in what they say."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from runs import ROOT, here

from actors.connect import ALWAYS
from clusters import HERE
from clusters.files import UNLIMITED, NodeType, node_types
from fedpipe_ray.__main__ import parse

RAY_UP = sorted((HERE / "ray_up").glob("*.yaml"))
KUBERAY = sorted((HERE / "kuberay").glob("*.yaml"))
CLUSTERS = [*RAY_UP, HERE / "kuberay" / "cluster.yaml", HERE / "kuberay" / "job.yaml"]
COMMANDS = ("initialization_commands", "setup_commands", "head_setup_commands", "head_start_ray_commands",
            "worker_start_ray_commands")  # fmt: skip
by_stem = {"ids": lambda path: path.stem}


def schema(path: Path) -> Any:
    """A validator of a schema in a file."""
    tree = json.loads(path.read_text())
    jsonschema.Draft7Validator.check_schema(tree)
    return jsonschema.Draft7Validator(tree)


UP_SCHEMA = schema(Path(ray.autoscaler.__file__).parent / "ray-schema.json")
KUBE_SCHEMA = schema(Path(__file__).parent / "kuberay.schema.json")


def documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return [one for one in yaml.safe_load_all(path.read_text()) if one is not None]


def cluster_spec(path: Path) -> dict[str, Any]:
    """The spec of the RayCluster in a file."""
    (tree,) = [one for one in documents(path) if one["apiVersion"] == "ray.io/v1"]
    spec: dict[str, Any] = tree["spec"]["rayClusterSpec"] if tree["kind"] == "RayJob" else tree["spec"]
    return spec


@pytest.mark.parametrize("path", RAY_UP, **by_stem)
def test_ray_up_files_are_valid(path: Path) -> None:
    """By the schema of the wheel: as they stand, and with Ray's defaults filled in, which is what `ray up` checks."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    (tree,) = documents(path)
    UP_SCHEMA.validate(tree)
    validate_config(prepare_config(tree))
    with pytest.raises(jsonschema.ValidationError):
        UP_SCHEMA.validate({**tree, "setup_command": []})


@pytest.mark.parametrize("path", KUBERAY, **by_stem)
def test_kuberay_files_are_valid(path: Path) -> None:
    for tree in documents(path):
        KUBE_SCHEMA.validate(tree)
        with pytest.raises(jsonschema.ValidationError):
            KUBE_SCHEMA.validate({**tree, "spec": {**tree.get("spec", {}), "workerGroups": []}})


def as_ray(kinds: list[NodeType], head: str) -> dict[str, Any]:
    """Node types as Ray's autoscaler has them: the head's own node is no worker."""
    return {kind.name: (kind.count - (kind.name == head), dict(kind.resources), dict(kind.labels)) for kind in kinds}


@pytest.mark.parametrize("path", [path for path in RAY_UP if path.stem != "bare"], **by_stem)
def test_ray_up_files_are_read_as_ray_reads_them(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config

    config = prepare_config(documents(path)[0])
    theirs = {
        name: (kind["max_workers"], kind["resources"], kind.get("labels", {}))
        for name, kind in config["available_node_types"].items()
    }
    assert as_ray(node_types(str(path)), config["head_node_type"]) == theirs


def group(**keys: Any) -> dict[str, Any]:
    """A worker group whose Ray container has these resources."""
    container = {"name": "ray", "image": "i", "resources": keys.pop("container", {})}
    return {"groupName": "w", "minReplicas": 0, "maxReplicas": 3, "template": {"spec": {"containers": [container]}},
            **keys}  # fmt: skip


GROUPS = {
    "limits": group(container={"limits": {"cpu": "1500m", "memory": "3Gi", "nvidia.com/gpu": "2"}}),
    "requests": group(container={"requests": {"cpu": "2", "memory": "1G"}, "limits": {"memory": "1500M"}}),
    "start": group(
        rayStartParams={"num-cpus": "7", "num-gpus": "1", "memory": "1000", "resources": '"{\\"board\\": 2}"'},
        container={"limits": {"cpu": "1"}},
    ),
    "own": group(resources={"CPU": "3", "GPU": "1", "memory": "2Ki", "board": "2500m"}, numOfHosts=2,
                 container={"limits": {"cpu": "9", "memory": "9Gi"}}),
    "labels": group(labels={"edge-class": "a"}, rayStartParams={"labels": "x=y"}, container={"limits": {"cpu": 4}}),
    "exponent": group(container={"limits": {"cpu": "1e1", "memory": "1E"}}),
}  # fmt: skip


@pytest.mark.parametrize("worker", GROUPS.values(), ids=list(GROUPS))
def test_worker_groups_are_read_as_ray_reads_them(worker: dict[str, Any], tmp_path: Path) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _generate_available_node_types_from_ray_cr_spec

    head = group(container={"limits": {"cpu": "2", "memory": "4Gi"}})
    spec = {"enableInTreeAutoscaling": True, "headGroupSpec": head, "workerGroupSpecs": [worker]}
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.dump({"apiVersion": "ray.io/v1", "kind": "RayCluster", "spec": spec}))
    theirs = _generate_available_node_types_from_ray_cr_spec(spec)
    ours = as_ray(node_types(str(path)), "head")
    assert ours["w"] == tuple(theirs["w"][key] for key in ("max_workers", "resources", "labels"))
    assert ours["head"] == tuple(theirs["headgroup"][key] for key in ("max_workers", "resources", "labels"))


@pytest.mark.parametrize("path", [path for path in CLUSTERS if path.parent.name == "kuberay"], **by_stem)
def test_kuberay_files_are_read_as_ray_reads_them(path: Path) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _generate_available_node_types_from_ray_cr_spec

    theirs = _generate_available_node_types_from_ray_cr_spec(cluster_spec(path))
    theirs["head"] = theirs.pop("headgroup")
    assert as_ray(node_types(str(path)), "head") == {
        name: tuple(kind[key] for key in ("max_workers", "resources", "labels")) for name, kind in theirs.items()
    }


def test_workers_without_an_autoscaler_are_those_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    head, worker = group(container={"limits": {"cpu": "1"}}), group(replicas=2, container={"limits": {"cpu": "1"}})
    tree = {"apiVersion": "ray.io/v1", "kind": "RayCluster"}
    path.write_text(yaml.dump({**tree, "spec": {"headGroupSpec": head, "workerGroupSpecs": [worker]}}))
    assert [kind.count for kind in node_types(str(path))] == [1, 2]
    del worker["maxReplicas"]
    spec = {"enableInTreeAutoscaling": True, "headGroupSpec": head, "workerGroupSpecs": [worker]}
    path.write_text(yaml.dump({**tree, "spec": spec}))
    assert [kind.count for kind in node_types(str(path))] == [1, UNLIMITED]


@pytest.mark.parametrize("path", RAY_UP, **by_stem)
def test_every_shell_of_a_node_has_the_environment(path: Path, tmp_path: Path) -> None:
    """The token's mode and what a driver sets too; once, however often `ray up` runs."""
    (tree,) = documents(path)
    assert tree["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for _ in range(2):
        for command in tree["initialization_commands"]:
            subprocess.run(["bash", "-c", command], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, check=True)
    assert (tmp_path / ".bashrc").read_text().count("export") == 1
    shell = ["bash", "-c", "source ~/.bashrc; env"]
    there = subprocess.run(
        shell, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, check=True, capture_output=True, text=True
    )
    found = dict(line.split("=", 1) for line in there.stdout.splitlines())
    assert found.items() >= {**ALWAYS, "RAY_AUTH_MODE": "token"}.items()
    assert found["PATH"].startswith(f"{tmp_path}/venv/bin:")


@pytest.mark.parametrize("path", [path for path in CLUSTERS if path.parent.name == "kuberay"], **by_stem)
def test_every_pod_has_the_environment_and_the_token(path: Path) -> None:
    spec = cluster_spec(path)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["rayVersion"] == ray.__version__
    for one in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        (container,) = one["template"]["spec"]["containers"]
        assert {entry["name"]: entry["value"] for entry in container["env"]} == ALWAYS
        assert container["resources"]["limits"] == container["resources"]["requests"]
    (spot,) = {
        frozenset(one["groupName"] for one in spec["workerGroupSpecs"] if uses_spot(one["template"]["spec"])),
        frozenset(one["groupName"] for one in spec["workerGroupSpecs"] if one["labels"]["market-type"] == "spot"),
    }
    assert spot == {"medium", "small"}


def uses_spot(pod: dict[str, Any]) -> bool:
    """Whether a pod asks for spot nodes and bears their taint."""
    asks = "cloud.google.com/gke-spot" in pod["nodeSelector"]
    bears = any(one["key"] == "cloud.google.com/gke-spot" for one in pod["tolerations"])
    assert asks == bears
    return asks


@pytest.mark.parametrize("path", RAY_UP, **by_stem)
def test_commands_are_valid_shell(path: Path) -> None:
    (tree,) = documents(path)
    for command in [one for key in COMMANDS for one in tree.get(key, [])]:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_bare_machines_start_as_what_they_are_described_as() -> None:
    """The start command, with `ray` and `hostname` as functions that say what they are called with."""
    (tree,) = documents(HERE / "ray_up" / "bare.yaml")
    (start,) = [one for one in tree["worker_start_ray_commands"] if "ray start" in one]
    machines = tree["metadata"]["machines"]
    assert sorted(machines) == tree["provider"]["worker_ips"]
    for ip, machine in machines.items():
        shell = f'hostname() {{ echo "{ip} fd00::1 "; }}; ulimit() {{ :; }}; ray() {{ echo "$@"; }}; {start}'
        said = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
        assert said.split()[-1] == "--labels=" + ",".join(f"{k}={v}" for k, v in machine["labels"].items())


def test_what_is_copied_is_all_that_an_installation_needs(tmp_path: Path) -> None:
    """The image and the nodes of every cloud get the same files, and a wheel made of them holds the whole project."""
    dockerfile = (HERE / "kuberay" / "Dockerfile").read_text()
    copied = {one for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE) for one in line.split()[:-1]}
    for path in RAY_UP:
        mounts = {there: local for there, local in documents(path)[0]["file_mounts"].items() if "token" not in local}
        assert mounts == {f"~/fedpipe-ray/{one}": one for one in copied}
    for one in copied:
        subprocess.run(["cp", "-r", str(ROOT / one), str(tmp_path)], check=True)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path / "wheel")]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(tmp_path)], check=True, timeout=200)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    folders = [ROOT / name for name in ("fedpipe_ray", "actors", "tuning", "clusters")]
    ours = {str(file.relative_to(ROOT)) for folder in folders for file in folder.rglob("*.py")}
    assert ours | {str(file.relative_to(ROOT)) for file in HERE.rglob("*.yaml")} <= inside
    versions = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert set(re.findall(r"torch==([\d.]+)", dockerfile)) == {versions["torch"]}


def entrypoint() -> list[str]:
    """The arguments that the RayJob gives the command line."""
    (job,) = [one for one in documents(HERE / "kuberay" / "job.yaml") if one["kind"] == "RayJob"]
    python, dash, module, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (python, dash, module) == ("python", "-m", "fedpipe_ray")
    return arguments


def test_the_jobs_command_is_one_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And its run file is where the command looks for it, is valid, and fits the job's own cluster."""
    options = parse(entrypoint())
    assert options.command == "run"
    path = HERE / "kuberay" / "job.yaml"
    pod = cluster_spec(path)["headGroupSpec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    (config,) = [one for one in documents(path) if one["kind"] == "ConfigMap"]
    (claim,) = documents(HERE / "kuberay" / "runs.yaml")
    assert volumes[mounts[str(options.config.parent)]] == {"configMap": {"name": config["metadata"]["name"]}}
    assert volumes[mounts[str(Path(options.out).parent)]] == {
        "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}
    }
    run = tmp_path / options.config.name
    run.write_text(config["data"][options.config.name])
    assert here("check", run, *options.overrides, "--cluster", path) == 0
    assert "room for all 7 edges" in capsys.readouterr().out


@pytest.mark.parametrize("path", CLUSTERS, **by_stem)
def test_the_commands_in_comments_are_ours(path: Path) -> None:
    """`fedpipe ...` and `python -m fedpipe_ray ...` in the lines that tell how to use a file."""
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    said = [
        one
        for line in comments
        for one in re.findall(r"(?:fedpipe|-m fedpipe_ray) ((?:check|run|submit) CONFIG[^`#]*)", line)
    ]
    commands = [shlex.split(one.replace("THIS FILE", path.name)) for one in said]
    assert {parse(one).command for one in commands} >= {"check"}
    for option in [parse(one).cluster for one in commands if "--cluster" in one]:
        assert Path(option).name == path.name
