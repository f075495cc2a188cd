"""`rvc-dist` without its start: a process that has imported every stage forks one for each command, or for each rank.

Tests of many commands would wait mostly for imports. `warm_cli(folder)` puts an `rvc-dist` into `folder` that hands its
arguments, folder, environment and output to that process, and ends with the exit code of the command. `Ranks` starts
the ranks of a job so, as a launcher does that gives each its place by environment variables.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
CLIENT = """#!{python} -SE
import json, os, socket, sys
asked = json.dumps(["", sys.argv[1:], os.getcwd(), dict(os.environ)])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [len(asked).to_bytes(4, "big")], [1, 2])
    server.sendall(asked.encode("ascii"))
    server.recv(8)
    sys.exit(int(server.recv(8)))
"""
START_S = 120
NOTHING: Mapping[str, str] = {}
READ_BY_IMPORTS = ("PYTHONPATH", "LACKING", "TORCH", "OMP_")
"""How variables begin that count only in a process that starts with them."""
LINGER_S = 30
"""What torchrun gives the ranks beside one that failed."""


@contextlib.contextmanager
def warm_cli(folder: Path) -> Iterator[None]:
    """Serves `folder`/rvc-dist while it is open."""
    address = folder / "rvc-dist.socket"
    script = folder / "rvc-dist"
    script.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    script.chmod(0o755)
    server = started(address)
    try:
        yield
    finally:
        server.kill()
        server.wait()


def started(address: Path, more_environment: Mapping[str, str] = NOTHING) -> subprocess.Popen[bytes]:
    """A server that answers at `address`, and ends with this process."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"} | more_environment
    server = subprocess.Popen([sys.executable, __file__, str(address)], env=environment)
    end = time.monotonic() + START_S
    while not address.exists():
        assert server.poll() is None, "the warm rvc-dist ended"
        assert time.monotonic() < end, "the warm rvc-dist does not answer"
        time.sleep(0.05)
    return server


class Ranks:
    """Starts jobs of one or more ranks, from a server that is made when it is first needed."""

    def __init__(self) -> None:
        self._servers: dict[frozenset[tuple[str, str]], str] = {}
        self._stack = contextlib.ExitStack()

    def close(self) -> None:
        self._stack.close()
        self._servers.clear()

    def _server(self, environment: Mapping[str, str]) -> str:
        """The address of one whose imports had what they read of `environment`."""
        read = {name: value for name, value in environment.items() if name.startswith(READ_BY_IMPORTS)}
        key = frozenset(read.items())
        if key not in self._servers:
            address = Path(self._stack.enter_context(tempfile.TemporaryDirectory())) / "ranks.socket"
            server = started(address, read)
            self._stack.callback(server.wait)
            self._stack.callback(server.kill)
            self._servers[key] = str(address)
        return self._servers[key]

    def run(
        self, num_ranks: int, script: str, words: list[str], environment: dict[str, str], timeout_s: float
    ) -> tuple[int, str]:
        """Run rvc_dist, or a `script` of tests/, on `num_ranks` ranks: the exit code, as torchrun has it, and output.

        When one rank fails, the others have as long to end as torchrun gives them, and are killed then.
        """
        address, places = self._server(environment), [environment]
        if num_ranks > 1 or script:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            job = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
            job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            places = [environment | job | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(num_ranks)]
        with tempfile.TemporaryFile("w+") as output, contextlib.ExitStack() as stack:
            ranks = {}
            for place in places:
                asked = json.dumps([script, words, str(ROOT), place])
                server = stack.enter_context(socket.socket(socket.AF_UNIX))
                server.connect(address)
                socket.send_fds(server, [len(asked).to_bytes(4, "big")], [output.fileno(), output.fileno()])
                server.sendall(asked.encode("ascii"))
                ranks[server] = int(server.recv(8))
            codes, ends_at = [], time.monotonic() + timeout_s
            while ranks:
                done = select.select(list(ranks), [], [], max(0.0, ends_at - time.monotonic()))[0]
                if not done:
                    for pid in ranks.values():
                        os.kill(pid, signal.SIGKILL)
                    assert any(codes), f"no end after {timeout_s} s:\n{said(output)[-3000:]}"
                    break
                for server in done:
                    codes.append(int(server.recv(8)))
                    del ranks[server]
                    if codes[-1]:
                        ends_at = min(ends_at, time.monotonic() + LINGER_S)
                        for pid in ranks.values():
                            os.kill(pid, signal.SIGTERM)
            return (codes[0] if num_ranks == 1 else int(any(codes))), said(output)


def said(output: IO[str]) -> str:
    output.seek(0)
    return output.read()


def serve(address: str) -> None:
    """Import what commands need, then fork for each that comes."""
    import importlib

    from rvc_dist.runtime.hang_killer import end_with_parent
    from rvc_dist.stages import STAGES

    end_with_parent(signal.SIGKILL, os.getppid())
    modules = [stage.module for stage in STAGES.values()]
    for module in (
        *modules,
        "faiss",
        "librosa",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "rvc_dist.features.content",
    ):
        with contextlib.suppress(ImportError):  # where a test forbids it
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # else each child copies all pages when it first looks for garbage
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children of `answer`
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address + ".new")
        server.listen()
        os.rename(address + ".new", address)
        while True:
            client, _ = server.accept()
            with client:
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    answer(client)


def answer(client: socket.socket) -> None:
    """Run one command in a process of its own, and tell its exit code."""
    size, fds, _, _ = socket.recv_fds(client, 4, 2)
    asked = b""
    while len(asked) < int.from_bytes(size, "big"):
        asked += client.recv(1 << 16)
    script, words, folder, environment = json.loads(asked)
    child = os.fork()
    if child == 0:
        client.close()
        for number, fd in enumerate(fds, 1):
            os.dup2(fd, number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [script or "rvc-dist", *words]
        code = 1
        try:
            if script:
                runpy.run_path(script, run_name="__main__")
                code = 0
            else:
                from rvc_dist.__main__ import main

                code = main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        except Exception:  # noqa: BLE001 - as Python ends a process
            traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)  # taking the libraries down takes longer than many a command
    client.sendall(b"%8d" % child)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    client.sendall(b"%8d" % code)
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
