"""What goes wrong once a run has begun, and what is asked of a run folder that cannot be: through the command line."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from refusals import assert_refused
from runs import assert_same, fedpipe, here, tensors, tiny_run

Capture = pytest.CaptureFixture[str]
NAN = "its update has NaN or infinity in base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def faulty(sick: str, how: str = "nan", cure: Path | str = "/nowhere") -> str:
    """The override that has the edges in `sick` fail."""
    return f"method={{name: 'faulty:Faulty', rank: 4, alpha: 8, sick: [{sick}], how: {how}, cure: '{cure}'}}"


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


# -- edges that are lost


def test_nan_on_one_edge_costs_that_edge(run_file: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert here("run", run_file, faulty("b"), "--out", out) == 0
    assert [{name: edge["status"] for name, edge in one["edges"].items()} for one in rounds(out)] == [
        {"a": "ok", "b": "lost", "c": "ok"}
    ] * 2
    assert [one["edges"]["b"]["reason"] for one in rounds(out)] == [NAN] * 2
    assert f"round 1: edge b lost: {NAN}" in (out / "log.txt").read_text()
    assert "lost: b" in capsys.readouterr().out
    assert all(bool(tensor.isfinite().all()) for tensor in tensors(out).values())


def test_an_exception_is_shown_once_with_its_edge(run_file: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert here("run", run_file, faulty("b", "raise"), "rounds=1", "--out", out) == 0
    assert_once(capsys, "b")
    assert rounds(out)[0]["edges"]["b"]["reason"] == "RuntimeError: b has a broken disk"
    assert rounds(out)[0]["edges"]["a"]["status"] == "ok"


def assert_once(capsys: Capture, *edges: str) -> None:
    """Each of these edges is named with its own traceback, once; there is no other."""
    printed = "".join(capsys.readouterr())
    assert printed.count("Traceback") == len(edges), printed
    for edge in edges:
        assert printed.count(f"edge {edge} lost: Traceback") == 1, printed
        assert printed.count(f'raise RuntimeError(f"{{site.name}} has a broken disk")\nRuntimeError: {edge} has') == 1


def test_all_edges_lost_and_cured(run_file: Path, tmp_path: Path, capsys: Capture) -> None:
    """Exit code 3 leaves the checkpoint before the round; once the edges are well, the run gives the usual bits."""
    out, cure = tmp_path / "out", tmp_path / "cure"
    method = faulty("a, b, c", "nan", cure)
    assert here("run", run_file, method, "--out", out) == 3
    printed = capsys.readouterr()
    assert "fedpipe: round 1: every edge was lost\n" + "".join(f"  edge {e}: {NAN}\n" for e in "abc") in printed.err
    assert f"go on with: fedpipe resume {out}" in printed.out
    assert [path.name for path in (out / "checkpoint").iterdir()] == ["round-0000"]
    assert json.loads((out / "summary.json").read_text())["status"] == "failed"
    assert here("resume", out) == 3
    cure.touch()
    assert here("resume", out) == 0
    assert here("run", run_file, method, "--out", tmp_path / "well") == 0
    assert_same(tensors(out), tensors(tmp_path / "well"))


def test_all_edges_raise(run_file: Path, tmp_path: Path, capsys: Capture) -> None:
    assert here("run", run_file, faulty("a, b, c", "raise"), "--out", tmp_path / "out") == 3
    assert_once(capsys, "a", "b", "c")
    assert "edge b lost: Traceback" in (tmp_path / "out" / "log.txt").read_text()


def test_a_learning_rate_that_diverges(run_file: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert here("run", run_file, "local.lr=1e30", "--out", out) == 3
    message = capsys.readouterr().err
    assert message.count("diverged: loss nan, gradient norm nan in step 2 of 4; lower local.lr") == 3
    assert "or start a new run with other settings" in message
    assert (out / "checkpoint" / "round-0000" / "state.safetensors").is_file()
    assert_refused(capsys, "resume", out, "local.lr=1e-3", says="resume cannot change local.lr; free keys are rounds,")


# -- a finished run, and what cannot be done with it


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert here("run", tiny_run(folder, model_dir, data_dir), "--out", folder / "out") == 0
    return folder / "out"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """To damage."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("resume {out}", "{out} has all its 2 rounds; extend it with rounds=4"),
        ("resume {out} rounds=1", "rounds: 1 is less than the 2 rounds that {out} has done"),
        ("resume {out} rounds=3 local.lr=0.5", "resume cannot change local.lr; free keys are rounds, track, out"),
        ("resume {out} rounds=3 fleet.edges.d={{}}", "resume cannot change fleet.edges.d; free keys are rounds"),
        ("resume {out} local.lrr=0.5", "unknown key local.lrr; did you mean lr?"),
        ("resume {empty}", "{empty} is not a run folder: it has no config.yaml"),
        ("resume {empty}/none", "{empty}/none is not a run folder: it has no config.yaml"),
        ("export {empty} --out {new}", "{empty} is not a run folder: it has no config.yaml"),
        ("evaluate {empty}", "{empty} is neither a run folder (config.yaml) nor a PEFT adapter (adapter_config.json)"),
        ("evaluate {out}/config.yaml", "config.yaml is neither a run folder (config.yaml) nor a PEFT adapter"),
        ("evaluate {out}/adapter", "{out}/adapter is an adapter; ... --config CONFIG --data SOURCE"),
        ("evaluate {out} --data {empty}/none.jsonl", "no file {empty}/none.jsonl; in {empty}: nothing"),
        ("evaluate {out} --data {full}/rows.csv", "rows.csv has no column 'question', 'answer'; its columns: 'x', 'y'"),
        ("evaluate {out} evaluate.generat=3", "unknown key evaluate.generat; did you mean generate?"),
        ("export {out} --out {full}", "{full} is not empty; give a new folder with --out"),
        ("export {out} --out {full}/rows.csv", "{full}/rows.csv is a file; give a new folder with --out"),
        ("export {out} --out {full}/rows.csv/new", "cannot write to ... rows.csv is a file; give another folder"),
        ("export {out} --out /proc/new --merge", "cannot write to /proc/new: ... give another folder with --out"),
        ("export {out} --out {out}", "{out} holds another run; ... or give another folder with --out"),
        (
            "run {out}/config.yaml --out {out}",
            "{out} holds another run; `fedpipe resume {out}`, or give another folder",
        ),
    ],
)
def test_what_a_finished_run_refuses(
    arguments: str, says: str, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    names = {"out": finished, "empty": tmp_path / "empty", "full": tmp_path / "full", "new": tmp_path / "new"}
    names["empty"].mkdir()
    names["full"].mkdir()
    (names["full"] / "rows.csv").write_text("x,y\n1,2\n")
    assert_refused(capsys, *arguments.format(**names).split(), says=says.format(**names))
    assert not names["new"].exists()
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "full"}
    changed = {path.name for path in finished.rglob("*") if before.get(path) != path.stat().st_mtime_ns}
    assert changed <= {".lock", "log.txt"}


def test_newest_checkpoint_damaged(copy: Path, capsys: Capture) -> None:
    """Resume takes the one before, says so, and does round 2 again."""
    state = copy / "checkpoint" / "round-0002" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    wanted = tensors(copy)
    assert here("resume", copy) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "checkpoint round-0002 is damaged" in printed
    assert "trying the one before" in printed
    assert f"resuming {copy} after round 1" in printed
    assert_same(tensors(copy), wanted)


@pytest.mark.parametrize("content", [b"", b"null", b"[1]", b'{"format": 1}', b'{"format": 0}', b"\xff"])
def test_every_checkpoint_damaged(content: bytes, copy: Path, tmp_path: Path, capsys: Capture) -> None:
    for manifest in copy.glob("checkpoint/round-*/manifest.json"):
        manifest.write_bytes(content)
    says = f"{copy} has no usable checkpoint (2 found); start the run again with --out NEW"
    assert_refused(capsys, "resume", copy, "rounds=3", says=says)
    assert_refused(capsys, "export", copy, says=says, out=tmp_path / "new")
    assert_refused(capsys, "evaluate", copy, says=says)


def test_damaged_configuration(copy: Path, capsys: Capture) -> None:
    (copy / "config.yaml").write_text("ronds: 3")
    assert_refused(capsys, "resume", copy, "rounds=3", says="unknown key ronds; did you mean rounds?")


HOLD = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print('held'); input()"


@pytest.fixture
def hold() -> Iterator[Callable[[Path], None]]:
    """Has another process lock a run folder until the test ends."""
    with contextlib.ExitStack() as stack:

        def lock(folder: Path) -> None:
            command = [sys.executable, "-uc", HOLD, str(folder / ".lock")]
            process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"

        yield lock


def test_one_process_a_folder(
    copy: Path, run_file: Path, tmp_path: Path, capsys: Capture, hold: Callable[[Path], None]
) -> None:
    new = tmp_path / "new"
    new.mkdir()
    hold(copy)
    hold(new)
    says = "is in use by a run in progress; wait for it, or give another folder"
    assert_refused(capsys, "resume", copy, "rounds=3", says=f"{copy} {says}")
    assert_refused(capsys, "run", run_file, "--out", new, says=f"{new} {says}")
    assert [path.name for path in new.iterdir()] == [".lock"]  # it is the other's


# -- Ray


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("gpus: 99", "edge b: gpus 99 is more than any node has ( ... ); lower it in its profile, or add such a node"),
        ("cpus: 999", "edge b: cpus 999 is more than any node has ("),
        ("memory_bytes: 99TiB", "edge b: memory_bytes 101376.00 GiB is more than any node has ("),
        ("resources: {tpu: 1}", "edge b: resources.tpu 1 is more than any node has (0); lower it in its profile"),
        ("resources: {CPU: 1}", "edge b: resources.CPU is a key of its own: cpus; give that instead"),
        ("labels: {zone: mars}", "edge b: no node has labels zone=mars; there are "),
        ("cpus: 0.12345", "edge b: cpus 0.12345 is finer than the 0.0001 that Ray counts in; round it"),
    ],
)
def test_an_edge_asks_for_more_than_there_is(
    override: str, says: str, ray_here: None, run_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    override = f"fleet.edges.b={{{override}}}"
    assert_refused(capsys, "run", run_file, "fleet.ray=true", override, says=says, out=tmp_path / "out")


def test_the_edges_together_ask_for_more(ray_here: None, run_file: Path, tmp_path: Path, capsys: Capture) -> None:
    import ray

    cpus = ray.cluster_resources()["CPU"]
    each = [f"fleet.edges.{edge}.cpus={cpus / 2}" for edge in "abc"]
    says = f"no room left for cpus {cpus / 2:g} beside the other edges; the 1 node(s) offer cpus {cpus:g} in all; lower"
    assert_refused(capsys, "run", run_file, "fleet.ray=true", *each, says=says, out=tmp_path / "out")


@pytest.mark.services
def test_an_exception_on_a_ray_actor(
    ray_here: None, run_file: Path, data_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    two = f"fleet={{ray: true, edges: {{a: {{cpus: 0.1}}, b: {{cpus: 0.1, data: '{data_dir}/b.jsonl'}}}}}}"
    out = tmp_path / "out"
    assert here("run", run_file, two, faulty("b", "raise"), "rounds=1", "--out", out) == 0
    assert_once(capsys, "b")
    assert rounds(out)[0]["edges"]["b"]["reason"] == "RuntimeError: b has a broken disk"


def test_a_method_that_workers_cannot_import(
    ray_here: None, run_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from dataclasses import dataclass\nfrom fedpipe_ray.methods.lora import Lora\n"
    (tmp_path / "only_here.py").write_text(f"{text}@dataclass(frozen=True)\nclass Own(Lora): 'mine'\n")
    monkeypatch.syspath_prepend(tmp_path)
    one = "fleet={ray: true, edges: {a: {cpus: 0.1}}}"
    says = "edge a: its worker died: it could not be made: ModuleNotFoundError: No module named 'only_here'"
    assert_refused(capsys, "run", run_file, one, "method={name: 'only_here:Own'}", says=says, out=tmp_path / "out")


def test_no_cluster_at_the_address(run_file: Path, tmp_path: Path) -> None:
    """Ray itself would try for minutes."""
    done = fedpipe("run", run_file, "fleet.ray=true", "fleet.address=127.0.0.1:9", "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("fedpipe: fleet.address: no Ray cluster at 127.0.0.1:9: [Errno 111] Connection")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
