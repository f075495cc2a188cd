"""`rvc-dist` without its start: a process that has imported every stage forks one for each command, or for each rank.

Tests of many commands would wait mostly for imports. `Ranks` starts the ranks of a job so, as a launcher does that
gives each its place by environment variables, or torchrun itself. All workers of pytest-xdist share these processes.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import psutil

ROOT = Path(__file__).parents[1]
LAUNCHER = str(ROOT / "tests" / "forked_launcher.py")
CLIENT = f"{sys.executable} -SE {ROOT / 'tests' / 'warm_python.py'}"
"""A python for shells whose words run in a fork of the server that WARM in its environment names."""
START_S = 120
READ_BY_IMPORTS = ("PYTHONPATH", "LACKING", "CLOCK_AHEAD_S", "OMP_", "IMPORTED")
"""How variables begin that count only in a process that starts with them."""
LINGER_S = 30
"""What torchrun gives the ranks beside one that failed."""


def keep_what_is_imported() -> None:
    """Garbage is no longer looked for in it, and seldom in the rest, to which what is imported later belongs."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


class Ranks:
    """Starts jobs of one or more ranks, from a server that is made when it is first needed.

    Servers are those of the whole session, and end with it: whichever worker makes one, all find it.
    """

    def __init__(self) -> None:
        owner = psutil.Process(os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else None)
        self._owner = owner.pid
        # A short path, as addresses need.
        self._folder = Path(tempfile.gettempdir()) / f"rvc_dist_{owner.pid}_{owner.create_time():.0f}"
        self._servers: dict[frozenset[tuple[str, str]], str] = {}

    def close(self) -> None:
        """End all servers; for the owner of the session alone."""
        for file in self._folder.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._servers.clear()

    def server(self, environment: Mapping[str, str]) -> str:
        """The address of one whose imports had what they read of `environment`."""
        read = {name: value for name, value in environment.items() if name.startswith(READ_BY_IMPORTS)}
        key = frozenset(read.items())
        if key not in self._servers:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            address = self._folder / f"{zlib.crc32(json.dumps(sorted(read.items())).encode()):08x}"
            with (self._folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not address.exists():
                    self._start(address, read)
            self._servers[key] = str(address)
        return self._servers[key]

    def _start(self, address: Path, read: Mapping[str, str]) -> None:
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"} | read
        server = subprocess.Popen([sys.executable, __file__, str(address), str(self._owner)], env=environment)
        address.with_suffix(".pid").write_text(str(server.pid))
        end = time.monotonic() + START_S
        while not address.exists():
            assert server.poll() is None, "the warm rvc-dist ended"
            assert time.monotonic() < end, "the warm rvc-dist does not answer"
            time.sleep(0.05)

    def start(self, num_ranks: int, script: str, words: Sequence[object], environment: dict[str, str]) -> Job:
        """Begin rvc_dist, or a `script` of tests/, on `num_ranks` ranks; or LAUNCHER alone, which starts them."""
        address, places = self.server(environment), [environment]
        if num_ranks > 1 or script not in ("", LAUNCHER):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            job = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
            job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            places = [environment | job | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(num_ranks)]
        started = Job()
        for place in places:
            asked = json.dumps([script, [str(word) for word in words], str(ROOT), place])
            server = socket.socket(socket.AF_UNIX)
            server.connect(address)
            fd = started.output.fileno()
            socket.send_fds(server, [len(asked).to_bytes(4, "big")], [fd, fd])
            server.sendall(asked.encode("ascii"))
            started.ranks[server] = int(server.recv(8))
        return started


class Job:
    """What `Ranks` started."""

    def __init__(self) -> None:
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it ends with the job
        self.ranks: dict[socket.socket, int] = {}
        """Process ids of those that run."""
        self.codes: list[int] = []

    @property
    def pid(self) -> int:
        """Of the one process that was started: a launcher, or a rank alone."""
        (pid,) = self.ranks.values()
        return pid

    def said(self) -> str:
        return os.pread(self.output.fileno(), 1 << 24, 0).decode("utf-8", "replace")

    def lines(self) -> Iterator[str]:
        """What is printed, until all have ended."""
        given = 0
        while True:
            ended = self.wait(0.05) and not self.ranks
            text = self.said()
            whole = len(text) if ended else text.rfind("\n") + 1
            yield from text[given:whole].splitlines(keepends=True)
            given = whole
            if ended:
                return

    def signal(self, number: int) -> None:
        for pid in self.ranks.values():
            with contextlib.suppress(ProcessLookupError):  # it has ended, and its code was not read yet
                os.kill(pid, number)

    def kill(self) -> None:
        """Of each rank all that it began too, but for what has a session of its own."""
        for pid in self.ranks.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                rank = psutil.Process(pid)
                for each in [rank, *rank.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
        self.wait(5)

    def wait(self, seconds: float) -> bool:
        """Whether all have ended in time, or one has failed and the others were as long about it as torchrun bears."""
        ends_at = time.monotonic() + seconds
        while self.ranks:
            done = select.select(list(self.ranks), [], [], max(0.0, ends_at - time.monotonic()))[0]
            if not done:
                return any(self.codes)
            for server in done:
                self.codes.append(int(server.recv(8)))
                del self.ranks[server]
                server.close()
                if self.codes[-1]:
                    ends_at = min(ends_at, time.monotonic() + LINGER_S)
                    self.signal(signal.SIGTERM)
        return True

    def finish(self, timeout_s: float) -> tuple[int, str]:
        """The exit code, torchrun's 1 where one of several ranks failed, and what was printed."""
        in_time, alone = self.wait(timeout_s), len(self.ranks) + len(self.codes) == 1
        if self.ranks:
            self.kill()
        assert in_time, f"no end after {timeout_s} s:\n{self.said()[-3000:]}"
        return (self.codes[0] if alone else int(any(self.codes))), self.said()


def serve(address: str, owner: int) -> None:
    """Import what commands need, then fork for each that comes, until the process `owner` ends."""
    import importlib

    import torch

    from rvc_dist.config import ExtractConfig
    from rvc_dist.stages import STAGES
    from rvc_dist.train.quality import pitch_tracker

    modules = [stage.module for stage in STAGES.values()]
    for module in (
        *modules,
        "faiss",
        "librosa",
        "rvc_dist.report.figures",  # this and the next four for the first validation, 2 s of each rank
        "soxr",
        "tensorboard.plugins.hparams.metadata",
        "scipy.signal",
        "soundfile",
        "torch._dynamo",
        "torch.distributed.run",
        "torch.utils.tensorboard",
        "rvc_dist.features.content",
        *os.environ.get("IMPORTED", "").split(),  # what the commands of a few tests need besides
    ):
        with contextlib.suppress(ImportError):  # where a test forbids it
            importlib.import_module(module)
    pitch_tracker(ExtractConfig.f0_min, ExtractConfig.f0_max, torch.device("cpu"))  # half a second of each validation
    keep_what_is_imported()  # else each child copies all pages when it first looks for garbage
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children of `answer`
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address + ".new")
        server.listen()
        server.settimeout(2.0)
        os.rename(address + ".new", address)
        while psutil.pid_exists(owner):
            try:
                client, _ = server.accept()
            except TimeoutError:
                continue
            with client:
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    answer(client)


def end_as_python(work: Callable[[], object]) -> NoReturn:
    """Do what this process is for, and end with the code that Python would give it.

    With THIN in its environment, its networks have one layer of each kind.
    """
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a test may read along
    code = 1
    try:
        if "THIN" in os.environ:
            from helpers import thin_networks

            thin_networks(setattr)
        work()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except Exception:  # noqa: BLE001 - as Python ends a process
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # taking the libraries down takes longer than many a command


def launch_here(_: str, command: list[str], environment: dict[str, str]) -> NoReturn:
    """Become the launcher of `command`, as os.execve does, without a new Python; its ranks are forks, too."""
    os.environ.update(environment)
    sys.argv = [LAUNCHER, command[command.index("--num_processes") + 1], *command[2:]]
    runpy.run_path(LAUNCHER, run_name="__main__")
    sys.exit(0)


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

        def run() -> object:
            if script:
                return runpy.run_path(script, run_name="__main__")
            from rvc_dist.__main__ import main

            os.execve = launch_here  # of `rvc-dist launch`
            sys.exit(main(words))

        end_as_python(run)
    client.sendall(b"%8d" % child)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    client.sendall(b"%8d" % code)
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
