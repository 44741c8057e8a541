"""Run folders under a URL, on a real S3 server on loopback."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs
import pytest
from runs import (
    Started,
    assert_like,
    assert_same,
    fedpipe,
    held_run,
    here,
    manifest,
    records,
    summary,
    tensors,
)
from s3_store import Gate, Opening, Store, serving
from safetensors.torch import load_file

from fedpipe_ray import remote
from fedpipe_ray.errors import UserError
from fedpipe_ray.page.watch import Watched
from fedpipe_ray.record import outdated
from fedpipe_ray.remote import RemoteFolder, is_url, local

ROUNDS = 6


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with serving(tmp_path_factory.mktemp("s3")) as one:
        yield one


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_dir: Path) -> Path:
    return held_run(tmp_path_factory.mktemp("remote"), model_dir, data_dir, ROUNDS)


@pytest.fixture(scope="module")
def whole(tiny: Path) -> Path:
    """The folder on this disk of a run that was never stopped."""
    folder = tiny.parent / "whole"
    assert here("run", tiny, "--out", folder) == 0
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """For working folders."""
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.mark.services
def test_a_head_that_dies_loses_nothing(
    tiny: Path, whole: Path, store: Store, started: Started, disk: Path, tmp_path: Path
) -> None:
    url, checkpoint = store.url("first"), "checkpoint/round-000{}/{}"
    started.run(tiny, "--out", url, TMPDIR=str(disk))
    started.kill()
    names = store.names("first")
    assert len([name for name in names if name.startswith("tensorboard/events")]) == 1
    assert [name for name in names if not name.startswith("tensorboard/")] == [
        ".owner",
        *(checkpoint.format(n, file) for n in (2, 3) for file in ("manifest.json", "state.safetensors")),
        *("config.yaml", "environment.json", "log.txt", "plans.jsonl", "rounds.jsonl", "trackers.json"),
    ]
    shutil.rmtree(disk)
    disk.mkdir()
    store.put("first/checkpoint/round-0004/state.safetensors", b"half a checkpo")  # no manifest yet

    done = fedpipe("resume", url, TMPDIR=str(disk), PYTHONPATH=started.path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"was in use by process {started.process.pid} on {socket.gethostname()}" in done.stdout.replace("\n", " ")
    assert f"resuming {url} after round 3" in done.stdout
    assert "damaged" not in done.stdout
    assert f"fedpipe export {url} --out DIR" in done.stdout.replace("\n", " ")
    assert list(disk.iterdir()) == []
    names = store.names("first")
    assert [name for name in names if name.startswith("checkpoint")] == [
        checkpoint.format(n, file) for n in (5, 6) for file in ("manifest.json", "state.safetensors")
    ]
    assert ".owner" not in names
    result = store.download("first", tmp_path / "result")
    assert_like(result, whole)
    assert (result / "log.txt").read_text().count("was in use by") == 0  # it was told before the log was here
    assert here("resume", url) == 2  # nothing is left to do


@pytest.mark.services
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tiny: Path, whole: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = store.url("damaged")
    pyarrow.fs.copy_files(str(whole), "bucket/runs/damaged", destination_filesystem=store.files)
    for name in store.names("damaged"):
        if name.startswith(("adapter/", "summary.json", ".lock")):
            store.files.delete_file(f"bucket/runs/damaged/{name}")
    state = f"damaged/checkpoint/round-{ROUNDS:04d}/state.safetensors"
    store.put(state, store.files.open_input_stream(f"bucket/runs/{state}").read()[:-1])
    assert here("resume", url) == 0
    assert f"round-{ROUNDS:04d} is damaged" in capsys.readouterr().out
    assert_like(store.download("damaged", tmp_path / "result"), whole)


@pytest.mark.services
def test_the_last_to_take_a_folder_has_it(
    tiny: Path, whole: Path, store: Store, started: Started, disk: Path, tmp_path: Path
) -> None:
    """A head that was only cut off comes back while another went on: it must not write over what the other wrote."""
    url = store.url("taken")
    process = started.run(tiny, "--out", url, TMPDIR=str(disk))
    assert here("resume", url) == 0
    after = store.download("taken", tmp_path / "result")
    started.release()
    assert process.wait(120) == 2
    said = started.log.read_text().replace("\n", " ")
    assert f"{url} was removed, or taken over by a process that has ended; this run stops" in said
    assert store.names("taken") == sorted(str(p.relative_to(after)) for p in after.rglob("*") if p.is_file())
    assert_like(store.download("taken", tmp_path / "again"), whole)
    (kept,) = disk.iterdir()
    assert str(kept / "taken") in said.replace(" ", "")
    assert manifest(kept / "taken")["round"] == len(records(kept / "taken")) == 4


@pytest.mark.services
def test_private_state_is_found_again_in_its_own_place(
    tiny: Path, store: Store, started: Started, disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["method.name=own_methods:Counting", "rounds=5", "fleet.edges.c.private_dir=null"]
    arguments += [f"fleet.edges.{edge}.private_dir={tmp_path / 'edges'}" for edge in "ab"]
    url, whole = store.url("private"), tmp_path / "whole"
    assert here("run", tiny, *arguments, "--out", whole) == 0
    started.run(tiny, *arguments, "--out", url, TMPDIR=str(disk))
    started.kill()
    said = " ".join((next(disk.iterdir()) / "private" / "log.txt").read_text().split())
    assert said.count("private state of edge c never leaves its node") == 1
    assert not [name for name in store.names("private") if "private" in name]

    lost, kept = disk / "lost", next(disk.iterdir())
    kept.rename(lost)
    assert here("resume", url) == 2
    assert "edge c: its private state cannot be restored" in capfd.readouterr().err
    lost.rename(kept)
    assert here("resume", url) == 0
    assert_like(store.download("private", tmp_path / "result"), whole)
    assert "kept in" in capfd.readouterr().out


@pytest.mark.services
def test_what_is_done_with_a_run_afterwards(
    tiny: Path, whole: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    url = store.url("after")
    assert here("run", tiny, "rounds=2", "evaluate.keep=best", "--out", url) == 0
    result = store.download("after", tmp_path / "result")
    assert (summary(result)["status"], summary(result)["rounds"]) == ("finished", 2)
    assert here("export", url, "--out", tmp_path / "adapter") == 0
    assert_same(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), tensors(result))
    capsys.readouterr()
    assert here("evaluate", url) == 0
    table = capsys.readouterr().out
    assert here("evaluate", result) == 0
    assert capsys.readouterr().out == table
    assert here("report", url, "--out", tmp_path / "page.html") == 0
    assert "2 of 2 rounds, finished" in (tmp_path / "page.html").read_text()
    watched = Watched(url)
    assert watched.look()
    assert (watched.status, watched.look()) == ("round 2 of 2, finished", False)
    names = store.names("after")
    assert "report.html" in names

    assert here("run", tiny, "--out", url) == 2
    assert f"{url} holds another run; `fedpipe resume {url}`" in capsys.readouterr().err
    store.put("other/notes.txt", b"mine")
    assert here("run", tiny, "--out", store.url("other")) == 2
    assert "is not empty (notes.txt)" in capsys.readouterr().err
    assert here("resume", store.url("other")) == 2
    assert "it has no config.yaml" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")  # nothing is brought here, and so nothing is removed
    assert here("report", store.url("other")) == 2
    assert "it has no config.yaml" in capsys.readouterr().err
    assert (tmp_path / "mine").is_dir()
    assert here("run", tiny, "--out", "s3://no-such-bucket/first") == 2
    assert "cannot write to s3://no-such-bucket/first: " in capsys.readouterr().err
    assert store.names("after") == names


@pytest.mark.services
def test_a_run_that_never_began_leaves_nothing(tiny: Path, store: Store, disk: Path) -> None:
    done = fedpipe(
        "run", tiny, "data.source=/nowhere.jsonl", "--out", store.url("failed"), TMPDIR=str(disk),
        PYTHONPATH=f"{Path(__file__).parent}:{Path(__file__).parents[1]}",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert (store.names("failed"), list(disk.iterdir())) == ([], [])


@pytest.mark.services
def test_an_outage_is_waited_for_and_then_stops_the_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS_SECONDS", (0.01, 0.01))
    gate = Gate(store.port)
    folder = RemoteFolder(f"{store.url('outage')}?endpoint_override=127.0.0.1:{gate.port}&scheme=http")
    path = folder.make_here()
    folder.claim()
    state = path / "checkpoint" / "round-0001" / "state.safetensors"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"one")
    (state.parent / "manifest.json").write_text("{}")
    opening = Opening(gate)
    remote.log.addHandler(opening)
    try:
        gate.open = False
        folder.publish(outdated)
    finally:
        remote.log.removeHandler(opening)
    assert folder.checkpoints() == ["round-0001"]

    state.write_bytes(b"two")
    (state.parent / "manifest.json").write_text('{"round": 1}')
    gate.open = False
    with pytest.raises(UserError, match=rf"tried 3 times: .*; mend that, then `fedpipe resume .*resume {path}`"):
        folder.publish(outdated)
    folder.close()
    assert state.read_bytes() == b"two"
    assert ".owner" in store.names("outage")
    manifest = "bucket/runs/outage/checkpoint/round-0001/manifest.json"
    assert store.files.open_input_stream(manifest).read() == b"{}"
    gate.listener.close()
    shutil.rmtree(path.parent)


def test_places() -> None:
    assert [is_url(p) for p in ("s3://a/b", "gs://a/b", "file:///a", "runs/a", Path("runs/a"))] == [
        True,
        True,
        *[False] * 3,
    ]
    assert local("file:///a/b%20c") == Path("/a/b c")
    assert local("runs/a") == Path("runs/a")
    assert outdated(["round-0002", "best-0001.safetensors", "round-0010", "round-0009"]) == ["round-0002"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://key:word@bucket/first", "must hold no password"),
        ("s3://bucket", "is a whole bucket; name a folder in it, such as s3://bucket/runs/first"),
        ("s4://bucket/first", "known are s3://"),
    ],
)
def test_urls_that_are_refused(url: str, message: str, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert here("run", run_file, "--out", url) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "word" not in said.replace("password", "")
    assert here("resume", url) == 2


def test_a_file_url_is_this_disk(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "by url"
    assert here("run", run_file, "--out", out.as_uri()) == 0
    assert summary(out)["status"] == "finished"
    assert here("resume", out.as_uri(), "rounds=3") == 0
    assert here("evaluate", out.as_uri()) == 0
    with pytest.raises(SystemExit):
        here("export", out, "--out", "s3://bucket/adapter")
