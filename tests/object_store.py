"""An S3 server of this machine (moto's), behind a proxy that breaks requests as networks do."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUCKET = "voices"
URL = f"s3://{BUCKET}/alice"


class Faults:
    """What happens to the next GETs of an object, in turn, by the end of its path; and how often each was asked for."""

    def __init__(self) -> None:
        self.next: dict[str, list[str]] = defaultdict(list)
        self.asked: Counter[str] = Counter()
        self.bytes_per_s = 0.0
        """How fast bodies come; 0: as fast as they can."""
        self.lock = threading.Lock()

    def take(self, path: str) -> str:
        with self.lock:
            self.asked[path.partition("?")[0].rpartition("/alice/")[2]] += 1
            for name, faults in self.next.items():
                if path.partition("?")[0].endswith(name) and faults:
                    return faults.pop(0)
        return ""


class Proxy(ThreadingHTTPServer):
    """Passes requests on to `port`, but for its faults."""

    daemon_threads = True

    def __init__(self, port: int, faults: Faults) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port, self.faults = port, faults


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the client has gone
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size + 2)[:-2]
            self.rfile.readline()
        return body

    def do_GET(self) -> None:
        body, fault = self._body(), self.server.faults.take(self.path) if self.command == "GET" else ""
        if fault == "reset":
            self._reset()
        elif fault == "503":
            self._answer(503, {}, b"<Error><Code>ServiceUnavailable</Code></Error>")
        else:
            inside = http.client.HTTPConnection("127.0.0.1", self.server.port)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
            inside.request(self.command, self.path, body, headers)
            answer = inside.getresponse()
            data = answer.read()
            inside.close()
            dropped = ("transfer-encoding", "connection")
            self._answer(answer.status, {k: v for k, v in answer.getheaders() if k.lower() not in dropped}, data, fault)

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET  # noqa: N815

    def _answer(self, status: int, headers: dict[str, str], data: bytes, fault: str = "") -> None:
        self.send_response_only(status)
        if "content-length" not in {name.lower() for name in headers}:
            headers = headers | {"Content-Length": str(len(data))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("truncated", "cut", "stall"):
            self.wfile.write(data[: len(data) // 2])
            time.sleep(30 if fault == "stall" else 0)
            self._reset() if fault == "cut" else self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if fault == "flipped":
            data = data[:-1] + bytes([data[-1] ^ 1])
        step = 1 << 16
        for at in range(0, len(data), step):
            self.wfile.write(data[at : at + step])
            if self.server.faults.bytes_per_s:
                time.sleep(step / self.server.faults.bytes_per_s)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


@contextlib.contextmanager
def served() -> Iterator[tuple[dict[str, str], Faults]]:
    """The environment in which s3fs finds the server, which holds the bucket; and its faults."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    faults = Faults()
    proxy = Proxy(port, faults)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )
        # What moto holds is its module's: of tests before this in the same process too.
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/moto-api/reset", method="POST")).close()
        client.create_bucket(Bucket=BUCKET)
        yield keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}"}, faults
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
        server.stop()
