"""A stand-in for the Hugging Face hub, or a mirror of it, that gives the files of a folder and can fail."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = 1000
"""Bytes up to which a file is no LFS file: the hub calls it by git's hash."""


class FakeHub(ThreadingHTTPServer):
    """Gives FOLDER/owner/repository/path at /owner/repository/resolve/REVISION/path."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.given: list[str] = []
        """Paths whose contents were asked for, in order."""
        self.fault = ""
        """short: a connection ends early; wrong: other bytes than the hash says."""
        self.delay = threading.Event()
        """Set, contents are given at once; cleared, each waits for it."""
        self.delay.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no matter."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        repository, _, rest = unquote(self.path).lstrip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        path = self.server.folder / repository / name
        if not rest or not path.is_file():
            there = (self.server.folder / repository).is_dir()
            self.send_response(404 if rest else 200)
            self.send_header("X-Error-Code", "EntryNotFound" if there else "RepoNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        etag = git if len(data) <= SMALL else hashlib.sha256(data).hexdigest()
        first = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if not with_body:
            return
        self.server.given.append(name)
        self.server.delay.wait(30.0)
        body = data[first:]
        if self.server.fault == "wrong":
            body = body[:-1] + bytes([body[-1] ^ 1])
        elif self.server.fault == "short":
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)


@contextmanager
def fake_hub(folder: Path) -> Iterator[FakeHub]:
    with FakeHub(folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.delay.set()
            hub.shutdown()
            thread.join()
