"""One training job a run folder: a lock file that its holder keeps alive, on any file system that all hosts share.

Whether a holder on another host is alive is known by its file changing while one looks at it, by one's own clock: the
clocks of two hosts are never compared, and no lock of the file system is relied on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Annotated, Any

from rvc_dist.files import ForeignFileError, read_bounded
from rvc_dist.schema import Count, OsName, Seconds, Token, Word, parse_json, record, within
from rvc_dist.workspace import StageError

logger = logging.getLogger(__name__)

STALE_S = 30.0
"""A holder elsewhere that gives no sign of life for this long is taken for dead."""
REFRESH_S = 2.0
SETTLE_S = 0.2
"""How long jobs that find the same dead one may move one another's lock file before they see it."""
MAX_BYTES = 1 << 16
HOLDER = record(
    **dict.fromkeys(("host", "pid_space", "since"), Word),
    **dict.fromkeys(("slurm_job", "elastic_run"), Word | None),
    **dict.fromkeys(("slurm_restarts", "beat"), Count),
    pid=Annotated[int, within(1, 2**31)],
    ticks=Seconds,
    token=Token,
    path=OsName,
)


class LockedError(StageError):
    """Another job trains in the run folder: nothing of this one belongs there."""


class RunLock:
    """The lock file of a run folder, held by the main rank of its training job."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_lost = False
        """Another job has taken the lock over, since this one was not heard of."""
        self._mine = job() | {"token": secrets.token_hex(8), "beat": 0, "path": str(path.absolute())}
        self._stream: int | None = None
        self._waiting_for: tuple[str, float] | None = None
        """What the other's file held, and since when it has not changed."""
        self._refreshed_at = time.monotonic()

    def try_acquire(self) -> bool:
        """Take the lock if it is free or its holder is dead; False while that is not known yet: call again soon.

        Raises:
            LockedError: another job that is alive holds it.
        """
        took_over = False
        for _ in range(3):  # between two of these steps another process may be quicker
            try:
                self._stream = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                if (text := _read(self.path)) is None:
                    continue
                if not self._is_dead(text):
                    return False
                self._remove(text)
                took_over = True
            else:
                self._write()
                if not took_over or self._stays():
                    return True
        return False

    def _stays(self) -> bool:
        """Whether the lock is still this job's when others that found the same dead one have seen that it is taken."""
        time.sleep(SETTLE_S)
        with contextlib.suppress(StageError):
            self.check()
            return True
        assert self._stream is not None
        os.close(self._stream)
        self._stream, self.is_lost = None, False
        return False

    def _is_dead(self, text: str) -> bool:
        other = _parsed(text)
        if self._waiting_for is not None and self._waiting_for[0] != text:
            raise LockedError(self._refusal(other))
        runs = None if other is None else is_running(other, self._mine)
        if other is not None and runs is not None:
            if runs and other["pid"] != os.getpid() and not _is_copy(self.path, other):
                raise LockedError(self._refusal(other))
            if other["pid_space"] != self._mine["pid_space"]:
                logger.info("going on with the run of %s", described(other))
            return True
        if self._waiting_for is None:
            self._waiting_for = text, time.monotonic()
            logger.info(
                "%s: locked by %s; from here it cannot be seen whether it still runs: waiting up to %.0f s for a sign",
                self.path,
                described(other),
                STALE_S,
            )
        return time.monotonic() - self._waiting_for[1] >= STALE_S

    def _refusal(self, other: dict[str, Any] | None) -> str:
        return (
            f"{self.path.parent} is being trained by {described(other)}: two jobs on one run folder would spoil each "
            "other's checkpoints. Wait for it or end it, or give this run another run_dir"
        )

    def _remove(self, text: str) -> None:
        """Remove the file of a dead holder, unless somebody else has just taken the lock."""
        if _read(self.path) != text:
            return
        aside = self.path.with_name(f"{self.path.name}.{self._mine['token']}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            if _read(aside) == text:
                aside.unlink()
            else:
                aside.rename(self.path)
        other = _parsed(text)
        if other is not None and other["token"] != self._mine["token"]:
            logger.info("took %s over from %s, which runs no more", self.path, described(other))

    def _write(self) -> None:
        assert self._stream is not None
        os.pwrite(self._stream, (json.dumps(self._mine) + "\n").encode(), 0)
        os.fsync(self._stream)  # over NFS others see it only then

    def refresh(self) -> None:
        """Give a sign of life, if one is due; notice when the lock was lost."""
        if self._stream is None or self.is_lost or time.monotonic() - self._refreshed_at < REFRESH_S:
            return
        with contextlib.suppress(StageError):  # is_lost says so
            self.check()
            self._mine["beat"] += 1
            self._write()
            self._refreshed_at = time.monotonic()

    def check(self) -> None:
        """Make sure that the lock is still this job's.

        Raises:
            StageError: another job has taken it.
        """
        if self._stream is None:
            return
        for _ in range(10):
            other = _parsed(_read(self.path))
            if self.is_lost or (other is not None and other["token"] == self._mine["token"]):
                break
            # Half of a line is being written, by this job's other thread, mostly; or jobs that found the lock of a dead
            # one look whether this is still that, and put it back, at times in one another's place.
            time.sleep(0.1)
        if self.is_lost or other is None or other["token"] != self._mine["token"]:
            self.is_lost = True
            taker = f"now {described(other)} trains there" if other else "it is gone"
            raise StageError(
                f"{self.path}: this job has lost its lock, {taker}; it stops without writing a checkpoint. A job that "
                f"is suspended for more than {STALE_S:.0f} s, or whose lock file is deleted, loses it"
            )

    def release(self) -> None:
        if self._stream is None:
            return
        stream = self._stream
        try:
            with contextlib.suppress(StageError, FileNotFoundError):
                self.check()
                self.path.unlink()
        finally:
            os.close(stream)
            self._stream = None


def holder(path: Path) -> dict[str, Any] | None:
    """Who wrote the lock file `path`; None where there is none, or it says nobody.

    Raises:
        StageError: it is no file of ours.
        OSError: it cannot be read.
    """
    return _parsed(_read(path))


def may_be_held(path: Path) -> bool:
    """Whether another job may train in the run folder of the lock file `path`; only `RunLock` can tell for sure."""
    try:
        text = _read(path)
    except (OSError, StageError):  # which the stage reports
        return False
    other = _parsed(text)
    return text is not None if other is None else is_running(other, job()) is not False


def job() -> dict[str, Any]:
    """This process and the job that it belongs to, as plain data."""
    slurm_job = os.environ.get("SLURM_JOB_ID")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ticks": started_at(os.getpid()),
        "pid_space": pid_space(),
        "slurm_job": slurm_job,
        "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "elastic_run": os.environ.get("TORCHELASTIC_RUN_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S%z"),
    }


def described(other: dict[str, Any] | None) -> str:
    """A job as `job` gives it, for a sentence."""
    if other is None:
        return "a job that has not said yet who it is"
    slurm = f", SLURM job {other['slurm_job']}" if other["slurm_job"] else ""
    return f"pid {other['pid']} on {other['host']}{slurm}, since {other['since']}"


def is_running(other: dict[str, Any], mine: dict[str, Any]) -> bool | None:
    """Whether the job `other` still runs, as far as it is seen from the job `mine`; None where it is not seen."""
    if other["pid_space"] == mine["pid_space"]:
        return is_alive(other)
    # Who starts a job again has ended it. "none" is what launchers with a fixed address and port call every run.
    restarted = other["elastic_run"] not in (None, "", "none") and other["elastic_run"] == mine["elastic_run"]
    same_job = other["slurm_job"] is not None and other["slurm_job"] == mine["slurm_job"]
    requeued = same_job and mine["slurm_restarts"] > other["slurm_restarts"]
    return False if restarted or requeued else None


def pid_space() -> str:
    """What processes share whose process ids compare: the running kernel and the pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return socket.gethostname()


def started_at(pid: int) -> float:
    """When a process started: process ids are used again. 0 for one that does not run, or nobody has waited for.

    In clock ticks since the boot on Linux, since setting the clock changes all that is given in seconds of the day.
    """
    try:
        # Behind the name, which may hold anything, are the state and 18 fields before the start (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return 0.0 if fields[0] == "Z" else float(fields[19])
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return 0.0
    except OSError:  # it ended meanwhile
        return 0.0
    import psutil

    try:
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return 0.0


def is_alive(other: dict[str, Any]) -> bool:
    """Whether the process that wrote `other`, in this process's pid space, still runs."""
    return bool(other["ticks"]) and started_at(other["pid"]) == other["ticks"]


def _is_copy(path: Path, other: dict[str, Any]) -> bool:
    """Whether `path` came with a copy of the folder in which `other` trains."""
    original = Path(other["path"])
    with contextlib.suppress(OSError, StageError):
        if not original.samefile(path):
            there = _parsed(_read(original))
            return there is not None and there["token"] == other["token"]
    return False


def _read(path: Path) -> str | None:
    """The file's text; None where there is none.

    Raises:
        StageError: it is no file of ours.
    """
    try:
        if path.is_symlink():  # nobody makes one; where it leads nowhere, it would look taken and free at once
            raise ForeignFileError("it is a link, expected a file")
        return read_bounded(path, MAX_BYTES).decode(errors="replace")
    except ForeignFileError as error:
        raise StageError(f"{path}: {error};", "remove it, if no job trains there") from error
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # over NFS, a file that was removed meanwhile
            return None
        raise


def _parsed(text: str | None) -> dict[str, Any] | None:
    """What a holder wrote; None while it is still writing its first line, or where there is none."""
    with contextlib.suppress(ForeignFileError):
        other: dict[str, Any] = parse_json((text or "").encode(), HOLDER)
        return other
    return None
