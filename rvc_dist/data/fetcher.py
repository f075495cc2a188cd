"""The process that fetches a run's units from object storage into the cache of its machine, ahead of training.

    python -m rvc_dist.data.fetcher START

It alone has connections, and it ends with the rank that started it. It talks to the ranks of the machine, and to their
loader processes, by files in the cache folder: SCHEDULE says what training will read and when, POSITIONS how far each
rank is, ASKED what somebody waits for. On standard output come lines for the log, and READY or FAILED.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import queue
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypedDict

from rvc_dist.data.storage import MANIFEST, Manifest, Storage, unit_names
from rvc_dist.files import NO_SPACE, atomic_write, sha256_of, space, write_json
from rvc_dist.runtime.hang_killer import end_with_parent, ignore_signals_of_job
from rvc_dist.workspace import StageError, read_json

logger = logging.getLogger("rvc_dist.data.fetcher")

SCHEDULE, POSITIONS, ASKED, FAILURE = "schedule.json", "positions", "asked", "failure.json"
NOW, AHEAD = "now", "ahead"
"""In the names of files in ASKED, UNIT.KIND.PROCESS: for the step that a rank makes, or for some later one."""
CACHED = "cached.json"
"""A copy of the manifest that the units in the cache are of."""
LOCK, GATE, PREPARING = "fetching.lock", "gate.lock", "preparing.lock"
"""Held by who fetches; by who asks for a unit or removes one, for that moment; by who looks what there is."""
POSITION = struct.Struct("<q")
FETCHES = 4
"""Units at once."""
POLL_S = 0.05
NEVER = sys.maxsize, 0
LOCK_S = 10.0
"""How long the process of the job before may take to end."""
RETRY_S, DISK_S = 1.0, 30.0
"""How often a full disk is tried, and how long it may stay full: a file that was removed takes its room until the last
loader process closes it."""


class Start(TypedDict):
    """What START holds, as JSON."""

    url: str
    folder: str
    """Of the cache."""
    parent: int
    """Process id."""
    cache_bytes: int
    ranks: int
    """Of this machine."""
    serves: bool
    """False: only look what there is, and end."""
    resets: bool
    """Whether what the job before left is removed."""


class Window(NamedTuple):
    """Units that the steps from `first` to before `end` read, counted from the first of this job."""

    units: list[int]
    first: int
    end: int


@contextlib.contextmanager
def locked(path: Path, wait_s: float = math.inf, shared: bool = False) -> Iterator[bool]:
    """Inside, the lock file is held; False where somebody else holds it for longer than `wait_s`."""
    kind, until = fcntl.LOCK_SH if shared else fcntl.LOCK_EX, time.monotonic() + wait_s
    with path.open("ab") as stream:
        while True:
            try:
                fcntl.flock(stream, kind if wait_s == math.inf else kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= until:
                    yield False
                    return
                time.sleep(POLL_S)
            else:
                yield True
                return


def prepare(start: Start) -> None:
    """Let the cache hold the manifest and all that it lists but units; remove what is none of it.

    Raises:
        StageError: the storage does not answer, or holds no run.
        OSError: the disk.
    """
    folder, storage = Path(start["folder"]), Storage(start["url"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / GATE).touch()
    with locked(folder / PREPARING):  # one process after the other: the second finds all there
        new = folder / f".{MANIFEST}.new"
        try:
            storage.fetch(MANIFEST, new)
        except StageError as error:
            raise StageError(f"{error.what}:", f"was `rvc-dist upload` run to its end? Then {error.remedy}") from error
        manifest = Manifest.read(new, f"{storage.url}/{MANIFEST}")
        new.replace(folder / MANIFEST)
        with locked(folder / LOCK, 0) as free:
            if free and start["resets"]:
                _remove_leftovers(folder, manifest)
        for name in manifest.small:
            path, stored = folder / name, manifest.files[name]
            if not path.is_file() or sha256_of(path) != stored["sha256"]:
                storage.fetch(name, path, stored)
    say(f"READY {manifest.sha256}")


def _remove_leftovers(folder: Path, manifest: Manifest) -> None:
    """What the job before left of itself, half-written files, and units that are others by now."""
    cached = folder / CACHED
    before = Manifest.read(cached, str(cached)).files if cached.is_file() else {}
    kept = {name for name, stored in manifest.files.items() if stored == before.get(name)}
    kept |= {*manifest.small, POSITIONS, LOCK, GATE, PREPARING, MANIFEST, CACHED}
    for path in [*folder.iterdir(), *folder.glob("*/*")]:
        if path.is_file() and path.relative_to(folder).as_posix() not in kept:
            path.unlink()
    atomic_write(cached, (folder / MANIFEST).read_bytes())


class Cache:
    """The units on the disk, those that are fetched, and which are wanted next."""

    def __init__(self, storage: Storage, folder: Path, manifest: Manifest, most_bytes: int, num_ranks: int) -> None:
        self.storage, self.folder, self.manifest = storage, folder, manifest
        self.allowed_bytes = self.most_bytes = most_bytes
        """What the recipe allows, and what of it the disk holds."""
        self.sizes = manifest.unit_bytes
        self.here = {unit for unit in self.sizes if all(self._is_here(name) for name in unit_names(unit))}
        self.busy: set[int] = set()
        self.schedule: list[Window] = []
        self._schedule_at = 0
        self._ended: queue.SimpleQueue[tuple[int, Exception | None]] = queue.SimpleQueue()
        self._full: tuple[OSError, float] | None = None
        """What a full disk has said, and since when."""
        (folder / ASKED).mkdir(exist_ok=True)
        self._positions = os.open(folder / POSITIONS, os.O_RDWR | os.O_CREAT, 0o644)
        self._num_ranks = num_ranks
        os.pwrite(self._positions, POSITION.pack(0) * num_ranks, 0)

    @property
    def position(self) -> int:
        """Steps that all ranks have made."""
        data = os.pread(self._positions, POSITION.size * self._num_ranks, 0)
        return int(min(number for (number,) in POSITION.iter_unpack(data)))

    def step(self) -> None:
        """Begin to fetch what is wanted and has room, remove what is not; returns after a moment.

        Raises:
            StageError: a unit that is needed now cannot be had.
            OSError: the disk.
        """
        with contextlib.suppress(queue.Empty):
            self._note(*self._ended.get(timeout=POLL_S))
        self._read_schedule()
        windows = [window for window in self.schedule if window.end > (position := self.position)]
        asked, ahead = self._asked()
        turn = {unit: (-1, unit) for unit in asked}
        for number, window in enumerate(windows):
            for place, unit in enumerate(window.units):
                turn.setdefault(unit, (number, place))
        for unit in ahead:
            turn.setdefault(unit, (len(windows), unit))
        now = {*asked, *(unit for window in windows if window.first <= position for unit in window.units)}
        for unit in sorted(turn, key=lambda u: turn[u]):
            if unit in self.here or unit in self.busy:
                continue
            if len(self.busy) >= FETCHES or not self._make_room(unit, turn, now):
                break
            self.busy.add(unit)
            threading.Thread(target=self._fetch, args=(unit,), daemon=True).start()

    def _fetch(self, unit: int) -> None:
        failed: Exception | None = None
        try:
            for name in unit_names(unit):
                if not self._is_here(name):
                    self.storage.fetch(name, self.folder / name, self.manifest.files[name])
        except Exception as error:  # noqa: BLE001 - the thread that waits for it raises it
            failed = error
        self._ended.put((unit, failed))

    def _note(self, unit: int, error: Exception | None) -> None:
        self.busy.discard(unit)
        if error is None:
            self.here.add(unit)
            self._full = None
        elif isinstance(error, OSError) and error.errno in NO_SPACE:
            self._full = error, self._full[1] if self._full else time.monotonic()
            used = self._used()
            if used < self.most_bytes:
                logger.warning("%s: the cache makes do with %.3f GB", error, used / 1e9)
                self.most_bytes = used
        else:
            raise error

    def _used(self) -> int:
        return sum(self.sizes[unit] for unit in self.here | self.busy)

    def _make_room(self, unit: int, turn: dict[int, tuple[int, int]], now: set[int]) -> bool:
        """Whether the unit has room, once those whose turn is later, or never, are removed: the last first.

        Raises:
            StageError: it is needed now, and all that could give way is needed too.
        """
        while self._used() + self.sizes[unit] > self.most_bytes:
            later = [u for u in self.here if turn.get(u, NEVER)[0] > turn[unit][0]]
            if later:
                self._remove(max(later, key=lambda u: turn.get(u, NEVER)))
            elif unit not in now or self.busy or (turn[unit][0] >= 0 and any(place < 0 for place, _ in turn.values())):
                return False  # it may have room when others are through
            elif self._used() + self.sizes[unit] > self.allowed_bytes:
                needed = sum(self.sizes[u] for u in now if turn[u][0] == turn[unit][0])
                raise StageError(
                    f"data.cache_gb {self.allowed_bytes / 1e9:g}: the units that steps read at once take "
                    f"{needed / 1e9:.3g} GB;",
                    f"set data.cache_gb to {2.5 * needed / 1e9:.3g} or more, or data.read_order local with a smaller "
                    "data.window_gb",
                )
            elif self._full is not None and time.monotonic() - self._full[1] > DISK_S:
                raise StageError(
                    f"{self._full[0]}: the units that steps read at once do not fit there;",
                    "make room there, or set data.cache_dir to a folder of another disk",
                )
            else:  # the disk may have room again
                self.most_bytes = self._used() + self.sizes[unit]
                time.sleep(RETRY_S if self._full else 0.0)
        return True

    def _remove(self, unit: int) -> None:
        with locked(self.folder / GATE):
            if unit not in self._asked()[0]:
                for name in unit_names(unit):
                    (self.folder / name).unlink(missing_ok=True)
                self.here.discard(unit)
                os.utime(self.folder / GATE)  # so that readers close it

    def _asked(self) -> tuple[set[int], set[int]]:
        """Units that ranks wait for, or are about to open; and that their loader processes will need some time."""
        names = [name.split(".") for name in os.listdir(self.folder / ASKED)]
        asked, ahead = ({int(unit) for unit, kind, _ in names if kind == wanted} for wanted in (NOW, AHEAD))
        return asked & self.sizes.keys(), ahead & self.sizes.keys()

    def _is_here(self, name: str) -> bool:
        path = self.folder / name
        return path.is_file() and path.stat().st_size == self.manifest.files[name]["size"]

    def _read_schedule(self) -> None:
        path = self.folder / SCHEDULE
        with contextlib.suppress(FileNotFoundError):
            if (at := path.stat().st_mtime_ns) != self._schedule_at:
                self._schedule_at = at
                self.schedule = [Window(*window) for window in read_json(path)["windows"]]


def serve(start: Start) -> None:
    """Fetch, until something fails or the parent ends.

    Raises:
        StageError: a unit cannot be had, or another job fetches into this folder.
        OSError: the disk.
    """
    folder = Path(start["folder"])
    with locked(folder / LOCK, LOCK_S) as free:
        if not free:
            raise StageError(
                f"{folder}: another job of this machine fetches into it;", "end it, or give one another data.cache_dir"
            )
        manifest = Manifest.read(folder / CACHED, str(folder / CACHED))
        storage = Storage(start["url"])
        cache = Cache(storage, folder, manifest, start["cache_bytes"], start["ranks"])
        here_gb = sum(cache.sizes[unit] for unit in cache.here) / 1e9
        there = f"{len(cache.here)} of {len(cache.sizes)} units are in {folder} ({here_gb:.3f} GB; {space(folder)})"
        logger.info("%s: %s", storage.url, there)
        say(f"READY {manifest.sha256}")
        try:
            while os.getppid() == start["parent"]:
                cache.step()
        except Exception as error:
            write_json(folder / FAILURE, told(error))
            raise


def told(error: Exception) -> dict[str, str]:
    if isinstance(error, StageError):
        return {"what": error.what + ":" * bool(error.remedy), "remedy": error.remedy}
    return {"what": f"what fetches data.remote failed: {error or repr(error)}", "remedy": ""}


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    start: Start = json.loads(sys.argv[1])
    ignore_signals_of_job()
    end_with_parent(signal.SIGKILL, start["parent"])
    lines = logging.StreamHandler(sys.stdout)
    lines.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    root = logging.getLogger("rvc_dist")
    root.setLevel(logging.INFO)
    root.addHandler(lines)
    try:
        serve(start) if start["serves"] else prepare(start)
    except Exception as error:  # noqa: BLE001 - the parent raises it
        say(f"FAILED {json.dumps(told(error))}")
        sys.exit(1)


if __name__ == "__main__":
    main()
