"""A run whose units lie on object storage, as training sees it: a run folder in a cache, whose units come when needed.

What fetches them is a process of its own (`fetcher`), one a machine: no rank has connections, and none of its loader
processes, which are forked.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from rvc_dist.config import Recipe
from rvc_dist.data.fetcher import (
    AHEAD,
    ASKED,
    FAILURE,
    GATE,
    LOCK,
    NOW,
    POSITION,
    POSITIONS,
    SCHEDULE,
    Start,
    Window,
    locked,
)
from rvc_dist.data.storage import HEADERS, MANIFEST, Manifest, read_headers, unit_names
from rvc_dist.files import atomic_write
from rvc_dist.runtime.launcher import local_ranks
from rvc_dist.runtime.logs import EXIT_S
from rvc_dist.workspace import FeaturesHeader, StageError, Workspace, fingerprint, read_json

logger = logging.getLogger(__name__)

POLL_S = 0.02
ENDED = -1
"""A position: this rank reads no more."""
LOOK_S = 1.0
"""Between two looks at whether what fetches is alive."""
ENDED_S = 20.0
"""How long there may be nobody who fetches, who may not have begun yet."""
SERVE_S = 120.0
"""How long a fetcher may take to begin."""


def data_of(recipe: Recipe) -> Workspace:
    """Where the run's clips and features are: the run folder, or a cache of what `data.remote` holds.

    Raises:
        StageError: there is no run, or the storage does not answer.
    """
    if recipe.data.remote is None:
        return Workspace(recipe.run_dir, recipe.name)
    return _remote_run(recipe.data.remote, cache_folder(recipe), recipe.name, round(recipe.data.cache_gb * 1e9))


def cache_folder(recipe: Recipe) -> Path:
    """Where this machine keeps what `data.remote` holds."""
    base = Path(recipe.data.cache_dir or Path(tempfile.gettempdir()) / f"rvc_dist-{os.getuid()}")
    return base.absolute() / f"{recipe.name}-{fingerprint(recipe.data.remote, socket.gethostname())}"


class Cached(NamedTuple):
    """How much of `data.remote` a machine has at hand."""

    units: int
    bytes: int
    all_units: int
    all_bytes: int


def cached(recipe: Recipe) -> Cached | None:
    """What is in this machine's cache, without asking the storage; None where nothing was fetched yet.

    Raises:
        StageError: the manifest in it is damaged.
    """
    folder = cache_folder(recipe)
    if not (folder / MANIFEST).is_file():
        return None
    sizes = Manifest.read(folder / MANIFEST, str(folder / MANIFEST)).unit_bytes
    here = [size for unit, size in sizes.items() if all((folder / name).is_file() for name in unit_names(unit))]
    return Cached(len(here), sum(here), len(sizes), sum(sizes.values()))


@lru_cache(maxsize=8)
def _remote_run(url: str, folder: Path, name: str, cache_bytes: int) -> RemoteRun:
    return RemoteRun(url, folder, name, cache_bytes)


class RemoteRun(Workspace):
    """The cache's folder as a run folder: units are there once somebody asks for them, all else from the beginning.

    Every rank of a machine has one, and they agree on the folder. Loader processes have it from their rank.
    """

    def __init__(self, url: str, folder: Path, name: str, cache_bytes: int) -> None:
        super().__init__(folder, name)
        self.url, self.cache_bytes, self._local_rank = url, cache_bytes, int(os.environ.get("LOCAL_RANK", "0"))
        self.is_leader = self._local_rank == 0
        """Whether this rank starts what fetches for all of its machine."""
        with contextlib.closing(Fetcher(self, serves=False)) as look:
            self.sha256 = look.answer()
        self.manifest = Manifest.read(folder / MANIFEST, f"{url}/{MANIFEST}")
        self._owner, self._asked, self._removed_at = os.getpid(), "", 0
        self._positions = os.open(folder / POSITIONS, os.O_RDWR | os.O_CREAT, 0o644)

    def unit_headers(self) -> Iterator[tuple[int, Path, FeaturesHeader]]:
        for unit, header in read_headers(self.root / HEADERS):
            yield unit, self.unit_file("features", unit), header

    def clips_file(self, unit: int) -> Path:
        return self._wait_for("clips", unit)

    def features_file(self, unit: int) -> Path:
        return self._wait_for("features", unit)

    def read_to(self, position: int) -> None:
        """This rank has made so many steps, counted from the first of this job."""
        os.pwrite(self._positions, POSITION.pack(position), POSITION.size * self._local_rank)

    def stop_reading(self) -> None:
        """Let loader processes of this rank that wait for a unit wait no longer."""
        self.read_to(ENDED)

    def _wait_for(self, kind: str, unit: int) -> Path:
        """The unit's file, as soon as it is there; it may be gone again when it is opened: then ask once more.

        Raises:
            StageError: it cannot be had; as what fetches has said.
        """
        path = self.unit_file(kind, unit)
        if self._asked and not self._asked.startswith(f"{unit:05d}."):
            self._let_go()
        if os.getpid() == self._owner:
            self._ask(unit, NOW)
        elif not path.exists():  # it is in the schedule, or will soon be
            self._ask(unit, AHEAD)
        looked_at, alone_since = time.monotonic(), time.monotonic()
        while not path.exists():
            time.sleep(POLL_S)
            if os.getpid() != self._owner and self._position() == ENDED:
                raise StageError("nobody waits for this unit any more")
            if (now := time.monotonic()) - looked_at > LOOK_S:
                looked_at = now
                if self._is_served():
                    alone_since = now
                elif now - alone_since > ENDED_S or self.failure() is not None:
                    ended = StageError(f"{self.url}: what fetched its units has ended;", "start the same command again")
                    raise self.failure() or ended
        if kind == "clips":  # asked for last
            self._let_go()
        return path

    def _position(self) -> int:
        return int(POSITION.unpack(os.pread(self._positions, POSITION.size, POSITION.size * self._local_rank))[0])

    def _ask(self, unit: int, kind: str) -> None:
        wanted = f"{unit:05d}.{kind}.{os.getpid()}"
        if self._asked == wanted:
            return
        with locked(self.root / GATE, shared=True):
            (self.root / ASKED).mkdir(exist_ok=True)
            (self.root / ASKED / wanted).touch()
        self._asked = wanted

    def _let_go(self) -> None:
        if self._asked.endswith(f".{os.getpid()}"):  # else it was our rank's, before it forked us
            (self.root / ASKED / self._asked).unlink(missing_ok=True)
        self._asked = ""

    def has_removed(self) -> bool:
        """Whether units were removed since this process asked last: who has them open is to close them."""
        before, self._removed_at = self._removed_at, (self.root / GATE).stat().st_mtime_ns
        return before != self._removed_at

    def _is_served(self) -> bool:
        with locked(self.root / LOCK, 0, shared=True) as free:
            return not free

    def failure(self) -> StageError | None:
        """Why what fetches for this job has ended, if it has."""
        with contextlib.suppress(FileNotFoundError):
            values = read_json(self.root / FAILURE)
            return StageError(values["what"], values["remedy"])
        return None


class Fetcher:
    """The process of `fetcher`, for a rank."""

    def __init__(self, run: RemoteRun, serves: bool = True) -> None:
        self._run = run
        start = Start(
            url=run.url,
            folder=str(run.root),
            parent=os.getpid(),
            cache_bytes=run.cache_bytes,
            ranks=local_ranks(),
            serves=serves,
            resets=run.is_leader,
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rvc_dist.data.fetcher", json.dumps(start)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._answers: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="fetcher", daemon=True).start()
        if serves:
            try:
                if self.answer(SERVE_S) != run.sha256:
                    raise StageError(f"{run.url} changed while this job began;", "start it again")
            except BaseException:
                self.close()
                raise

    def answer(self, limit_s: float | None = None) -> str:
        """What it says when it is ready.

        Raises:
            StageError: it failed, and why.
        """
        try:
            word, text = self._answers.get(timeout=limit_s)
        except queue.Empty:
            word, text = "", f"it has not begun after {limit_s:.0f} s"
        if word == "READY":
            return text
        if word == "FAILED":
            values = json.loads(text)
            raise StageError(values["what"], values["remedy"])
        raise StageError(f"what fetches {self._run.url} failed: {text or 'its output above says why'}")

    def plan(self, windows: Sequence[Window]) -> None:
        """What training will read, and when."""
        atomic_write(self._run.root / SCHEDULE, json.dumps({"windows": windows}))

    def close(self) -> None:
        self._process.kill()  # nothing of it is to be kept: half-written files have names of their own
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_S)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, _, text = line.decode("utf-8", "replace").strip().partition(" ")
            if word in ("READY", "FAILED"):
                self._answers.put((word, text))
            else:
                logger.log(logging.WARNING if word == "WARNING" else logging.INFO, "%s", text)
        self._answers.put(("", ""))
