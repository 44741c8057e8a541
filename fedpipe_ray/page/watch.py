"""`fedpipe watch`: the page of a run in progress, served to browsers on this machine, which ask for what is new.

The run is read and drawn once for each change, however many look. A run folder on this disk is looked at every second,
one under a URL every ten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from fedpipe_ray.display import Display
from fedpipe_ray.errors import UserError
from fedpipe_ray.remote import RemoteFolder, is_url, local

from .history import History
from .page import sections, shell
from .tables import STATUS

HOST, PORT = "127.0.0.1", 8270
FILES = ("config.yaml", "rounds.jsonl", "plans.jsonl", "summary.json")
Marks = tuple[tuple[str, int, int], ...]


class Watched:
    """One run as it is now. `news` is what page.js shows, as JSON, under a version."""

    def __init__(self, place: str) -> None:
        """Raises UserError where a URL cannot be used."""
        self.place = place
        self.remote = RemoteFolder(place) if is_url(place) else None
        self.every_seconds = 10.0 if self.remote else 1.0
        self.status, self.version, self.news = "", "", b""
        self._marks: Marks | None = None
        self._parts: list[dict[str, object]] = []
        self._show(f"waiting for a run in {place}", place)

    def look(self) -> bool:
        """Reads the run again if its files have changed; whether they had. Never raises for what it finds there."""
        try:
            marks = self.marks()
            if marks == self._marks:
                return False
            if not any(name == "config.yaml" for name, _, _ in marks):
                self._parts = []
                self._show(f"waiting for a run in {self.place}", self.place)
            else:
                history = History.read(self.place)
                status = history.summary.get("status")
                said = f"round {len(history.rounds)} of {history.config['rounds']}, {STATUS.get(status, status)}"
                self._parts = [section.data() for section in sections([history])]
                self._show(said, history.name)
            self._marks = marks
        except Exception as error:  # a file half there, a store that does not answer: the next look may see more
            self._show(f"cannot be read now: {error}", self.place)  # beside what was shown before
        return True

    def marks(self) -> Marks:
        """Name, size and time of each file that the page is made of, as far as they are there. Raises UserError."""
        if self.remote:
            return tuple(self.remote.states(FILES))
        found = [(name, local(self.place) / name) for name in FILES]
        stats = [(name, path.stat()) for name, path in found if path.is_file()]
        return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)

    def _show(self, status: str, title: str) -> None:
        told = {"title": title, "state": status, "sections": self._parts}
        version = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
        self.news = json.dumps({"version": version, **told}).encode()
        self.status, self.version = status, version


def handler_of(watched: Watched, page: bytes) -> type[BaseHTTPRequestHandler]:
    """What answers browsers: the page at /, what is new at /news."""

    class Handler(BaseHTTPRequestHandler):
        """GET only, and only for a Host of this machine, so that no page elsewhere reads a run by a name of its own."""

        def do_GET(self) -> None:
            """The page, the news, or why not."""
            parts = urlsplit(self.path)
            port = self.connection.getsockname()[1]
            if self.headers.get("Host", "") not in {f"{name}:{port}" for name in (HOST, "localhost")}:
                self.answer(HTTPStatus.FORBIDDEN, b"only http://127.0.0.1 is answered", "text/plain")
            elif parts.path == "/":
                self.answer(HTTPStatus.OK, page, "text/html; charset=utf-8")
            elif parts.path == "/news":
                seen = parse_qs(parts.query).get("seen", [""])[0]
                if seen == watched.version:
                    self.answer(HTTPStatus.NO_CONTENT, b"", "application/json")
                else:
                    self.answer(HTTPStatus.OK, watched.news, "application/json")
            else:
                self.answer(HTTPStatus.NOT_FOUND, b"there is only /", "text/plain")

        def answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
            """Sends it."""
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are no news."""

    return Handler


def serve_run(place: str, port: int | None) -> None:
    """Serves the page until Ctrl-C. port: default PORT, or a free one if that is taken. Raises UserError."""
    display, watched = Display(), Watched(place)
    page = shell(place, 'follow("/news");').encode()
    server = serve(watched, page, port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    display.note(f"watching {place} at http://{HOST}:{server.server_port} (Ctrl-C ends)")
    said = ""
    try:
        while True:
            watched.look()
            if watched.status != said:
                said = watched.status
                display.note(said)
            time.sleep(watched.every_seconds)
    finally:
        server.shutdown()
        server.server_close()


def serve(watched: Watched, page: bytes, port: int | None) -> ThreadingHTTPServer:
    """A server on this machine alone, not yet serving. Raises UserError if the port that is asked for is taken."""
    for wanted in (PORT, 0) if port is None else (port,):
        with contextlib.suppress(OSError):
            return ThreadingHTTPServer((HOST, wanted), handler_of(watched, page))
    raise UserError(f"port {port or PORT} of {HOST} cannot be used, something else has it; give another --port")
