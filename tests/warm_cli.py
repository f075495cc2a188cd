"""`rvc-dist` without its start: a process that has imported every stage forks one for each command.

Tests of many commands would wait mostly for imports. `warm_cli(folder)` puts an `rvc-dist` into `folder` that hands its
arguments, folder, environment and output to that process, and ends with the exit code of the command.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from launching import ROOT

CLIENT = """#!{python} -SE
import json, os, socket, sys
asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [len(asked).to_bytes(4, "big")], [1, 2])
    server.sendall(asked.encode("ascii"))
    sys.exit(int(server.recv(8)))
"""


@contextlib.contextmanager
def warm_cli(folder: Path) -> Iterator[None]:
    """Serves `folder`/rvc-dist while it is open."""
    address = folder / "rvc-dist.socket"
    script = folder / "rvc-dist"
    script.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    script.chmod(0o755)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    server = subprocess.Popen([sys.executable, __file__, str(address)], env=environment)
    try:
        end = time.monotonic() + 60
        while not address.exists():
            assert server.poll() is None, "the warm rvc-dist ended"
            assert time.monotonic() < end, "the warm rvc-dist does not answer"
            time.sleep(0.05)
        yield
    finally:
        server.kill()
        server.wait()


def serve(address: str) -> None:
    """Import what commands need, then fork for each that comes."""
    import importlib

    from rvc_dist.stages import STAGES

    for stage in STAGES.values():
        importlib.import_module(stage.module)
    for module in ("faiss", "librosa", "torch.utils.tensorboard", "rvc_dist.features.content"):
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
    words, folder, environment = json.loads(asked)
    child = os.fork()
    if child == 0:
        for number, fd in enumerate(fds, 1):
            os.dup2(fd, number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        from rvc_dist.__main__ import main

        sys.argv = ["rvc-dist", *words]
        try:
            code = main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)  # taking the libraries down takes longer than many a command
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    client.sendall(str(code).encode())
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
