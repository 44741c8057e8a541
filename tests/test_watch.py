"""`fedpipe watch` as a browser sees it: only from this machine, only what is new, through restarts of the run."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from histories import edge, line, write
from runs import here

from fedpipe_ray.page.watch import Watched, serve


@contextmanager
def serving(watched: Watched) -> Iterator[int]:
    """Its port; the page is `page`."""
    server = serve(watched, b"page", None)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def get(port: int, path: str, host: str | None = None) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path, headers={} if host is None else {"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_what_is_new_is_told_once(tmp_path: Path) -> None:
    watched = Watched(write(tmp_path / "a", [3.0]))
    with serving(watched) as port:
        assert get(port, "/") == (200, b"page")
        waiting = json.loads(get(port, "/news?seen=")[1])
        assert (waiting["sections"], waiting["state"]) == ([], f"waiting for a run in {tmp_path / 'a'}")
        assert watched.look()
        news: dict[str, Any] = json.loads(get(port, "/news?seen=" + waiting["version"])[1])
        assert news["state"] == "round 1 of 4, in progress"
        assert {section["key"] for section in news["sections"]} >= {"title", "quality-loss", "run0-rounds"}
        assert get(port, "/news?seen=" + news["version"]) == (204, b"")
        assert not watched.look()
        with (tmp_path / "a" / "rounds.jsonl").open("a") as file:
            file.write(json.dumps(line(2, 2.5, {"a": edge()})) + "\n")
        assert watched.look()
        assert json.loads(get(port, "/news?seen=" + news["version"])[1])["state"] == "round 2 of 4, in progress"


def test_it_waits_for_a_run_and_survives_another_in_its_place(tmp_path: Path) -> None:
    watched = Watched(str(tmp_path / "a"))
    watched.look()
    assert watched.status == f"waiting for a run in {tmp_path / 'a'}"
    write(tmp_path / "a", [3.0, 2.0])
    watched.look()
    assert watched.status == "round 2 of 4, in progress"
    (tmp_path / "a" / "config.yaml").write_text("{")
    watched.look()
    assert watched.status.startswith("cannot be read now: ")
    assert json.loads(watched.news)["sections"]  # what was shown stays
    shutil.rmtree(tmp_path / "a")
    write(tmp_path / "a", [4.0])
    watched.look()
    assert watched.status == "round 1 of 4, in progress"
    (tmp_path / "a" / "summary.json").write_text(json.dumps({"status": "finished"}))
    watched.look()
    assert watched.status == "round 1 of 4, finished"


def test_only_this_machine_is_answered(tmp_path: Path) -> None:
    """A page elsewhere that gives this address a name of its own has that name as Host."""
    with serving(Watched(write(tmp_path / "a", [3.0]))) as port:
        assert get(port, "/news", f"evil.example:{port}")[0] == 403
        assert get(port, "/news", f"localhost:{port}")[0] == 200
        assert get(port, "/config.yaml")[0] == 404


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert here("watch", tmp_path, "--port", port) == 2
    assert (
        f"port {port} of 127.0.0.1 cannot be used, something else has it; give another --port"
        in capsys.readouterr().err
    )
