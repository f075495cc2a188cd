"""What a run leaves to read afterwards: a log file of every rank, and which rank failed first.

The screen shows the first rank and the others' warnings; the file of a rank has all of its lines, the traceback of
what ended it and, when it died in native code, the stacks of that moment. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import logging
import os
import platform
import re
import shlex
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from rvc_dist import __version__
from rvc_dist.files import ForeignFileError, atomic_write, read_bounded, write_json
from rvc_dist.schema import Count, Word, parse_json, record
from rvc_dist.workspace import OtherRankError, Shard, Workspace

logger = logging.getLogger(__name__)

FORMAT, DATE_FORMAT = "%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S%z"
PACKAGES = ("torch", "accelerate", "numpy")
CAUSE_WAIT_S = 3.0
"""How long a rank whose connection broke waits for the one that broke it to say why."""
EXIT_S = 10.0
"""How long each part of an exit may take: a disk that answers no more would hold a rank, and that one all others."""


def ends_within(limit_s: float, what: str, function: Callable[[], object]) -> bool:
    """Call `function`, which belongs to an exit, and go on without it when it takes longer, or Python itself ends.

    Raises:
        Exception: of `function`.
    """
    if sys.is_finalizing():  # a thread that is started now never runs, and before Python 3.12 is waited for
        return False
    errors = []

    def call() -> None:
        try:
            function()
        except Exception as error:  # noqa: BLE001 - raised below, where it is waited for
            errors.append(error)

    thread = threading.Thread(target=call, name=what, daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if thread.is_alive():
        logger.warning("%s has not ended after %.0f s: going on without it", what, limit_s)
    return not thread.is_alive()


MAX_FAILURE_BYTES = 1 << 20
Failure = record(rank=Count, host=Word, time=float, error=str)
"""What a rank that failed leaves behind."""


def read_failure(path: Path) -> dict[str, Any]:
    """Raises ForeignFileError where it is none, OSError where it is gone."""
    found: dict[str, Any] = parse_json(read_bounded(path, MAX_FAILURE_BYTES), Failure)
    return found


class RankLog(logging.Handler):
    """Appends all that one rank logs to its file.

    The file is opened when the run folder exists, and lines are kept until then: a command that fails before it has
    made anything leaves nothing behind. Nor is it opened while `is_waiting`, since another job may train there; when
    this one fails before, it leaves nothing in that one's files.
    """

    def __init__(self, work: Workspace, shard: Shard, is_waiting: bool = False) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter(FORMAT, DATE_FORMAT))
        self.work, self.shard, self.is_waiting = work, shard, is_waiting
        self.path = work.rank_log(shard.index)
        self.at_close = contextlib.ExitStack()
        """What is to be done when this rank has said how it ended."""
        self._kept: list[str] = []
        self._stream: io.TextIOWrapper | None = None
        self._given_up = self._set_faulthandler = False
        self._old_failures: list[dict[str, Any]] = []
        """Of earlier runs, found at the start: no clocks need be compared."""

    def emit(self, record: logging.LogRecord) -> None:
        """Append lines; a disk that refuses them is reported once and never ends the run."""
        if self._given_up:
            return
        self._kept.append(f"{self.format(record)}\n")
        try:
            if self._stream is None and not self.is_waiting and self.work.root.is_dir():
                self._open()
            if self._stream is not None:
                self._stream.writelines(self._kept)
                self._stream.flush()
                self._kept = []
        except OSError as error:
            self._given_up = True
            logger.warning("%s cannot be written (%s): this rank goes on without a log file", self.path, error)

    def note(self, level: str, text: str, error: BaseException | None = None) -> None:
        """Write into this file alone, with the traceback of `error`."""
        trace = error and (type(error), error, error.__traceback__)
        self.handle(logging.makeLogRecord({"levelname": level, "msg": text, "exc_info": trace}))

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.work.failure_file(self.shard.index).unlink(missing_ok=True)
        self._old_failures = self._failures()
        self._stream = self.path.open("a", encoding="utf-8", errors="backslashreplace")
        if not faulthandler.is_enabled():  # else somebody wants the stacks elsewhere
            faulthandler.enable(self._stream, all_threads=True)
            self._set_faulthandler = True

    @property
    def is_open(self) -> bool:
        """Whether this rank may write into the run folder, and does."""
        return self._stream is not None

    def write_stacks(self) -> None:
        """Append where every thread of this process is."""
        if self._stream is not None:
            faulthandler.dump_traceback(self._stream, all_threads=True)
            self._stream.flush()

    def close(self) -> None:
        if self._set_faulthandler:
            faulthandler.disable()
            self._set_faulthandler = False
        if self._stream is not None:
            with contextlib.suppress(OSError):  # of a full disk, reported before
                self._stream.close()
            self._stream = None
        self.at_close.close()
        super().close()

    def failed(self, error: BaseException, sentence: str = "") -> None:
        """Write down what ends this rank, for its own log, the other ranks and the launcher's last lines.

        Where the user reads a `sentence`, the traceback goes to the log alone. Of an error that another rank caused,
        the others are told nothing.
        """
        is_own = not isinstance(error, OtherRankError)
        why = sentence or "".join(traceback.format_exception(error))
        tell_launcher(why, is_own)

        def keep() -> None:
            self.note("CRITICAL", sentence, error)
            with contextlib.suppress(OSError):  # a full disk may be what ended it
                if is_own and self.path.parent.is_dir() and not self.is_waiting:
                    failure = {"rank": self.shard.index, "host": socket.gethostname(), "time": time.time()}
                    last_line = why.strip().splitlines()[-1]
                    write_json(self.work.failure_file(self.shard.index), failure | {"error": last_line})

        ends_within(EXIT_S, "the log", keep)

    def first_failure(self, wait_s: float = CAUSE_WAIT_S) -> str | None:
        """Which other rank of this run failed first, and why; None when none has said so within `wait_s`."""
        deadline = time.monotonic() + wait_s
        while not (found := [failure for failure in self._failures() if failure not in self._old_failures]):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.25)
        # Clocks of different hosts may differ; mostly only one rank is here.
        first = min(found, key=lambda failure: float(failure["time"]))
        who = f"rank {first['rank']} on {first['host']}"
        return failed_first(who, self.work.rank_log(first["rank"]), first["error"])

    def _failures(self) -> list[dict[str, Any]]:
        """What ranks wrote that failed. One look into the folder: a look for each rank would be a million of them."""
        found = []
        for path in self.work.failure_files():
            with contextlib.suppress(OSError, ForeignFileError):  # its rank begins anew; edited, or of another program
                found.append(read_failure(path))
        return found

    @contextlib.contextmanager
    def first_cause(self) -> Iterator[None]:
        """Inside, an error that another rank's end caused becomes a sentence that says which rank, and why.

        That rank has some seconds to say it: when one ends, a launcher ends all.

        Raises:
            OtherRankError: in the place of a collective's error.
        """
        try:
            yield
        except RuntimeError as error:
            is_known = isinstance(error, OtherRankError)
            cause = self.first_failure() if is_known or is_collective_error(error) else None
            if cause is not None and not is_known:
                raise OtherRankError(cause) from error
            raise


@contextlib.contextmanager
def rank_log(work: Workspace, shard: Shard, command: list[str], is_waiting: bool = False) -> Iterator[RankLog]:
    """Inside, what this rank logs also goes to its file, and so do tracebacks that nobody catches."""
    log = RankLog(work, shard, is_waiting)
    logging.getLogger().addHandler(log)
    log.note("INFO", introduction(shard, command))
    show_thread_error = threading.excepthook

    def thread_failed(error: Any) -> None:
        log.note("ERROR", f"in thread {error.thread.name if error.thread else '?'}:", error.exc_value)
        if not isinstance(error.exc_value, OSError):  # which TensorBoard's thread gives to the next who writes, too
            show_thread_error(error)

    threading.excepthook = thread_failed
    try:
        yield log
    finally:
        threading.excepthook = show_thread_error
        logging.getLogger().removeHandler(log)
        log.close()


def versions() -> dict[str, str]:
    """Of this package, Python, and what numbers depend on."""
    found = {"rvc_dist": __version__, "Python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def introduction(shard: Shard, command: list[str]) -> str:
    """Who writes here, with which command and versions."""
    what = "part" if shard.array else "rank"
    return (
        f"{what} {shard.index} of {shard.count} on {socket.gethostname()}, pid {os.getpid()}: "
        f"rvc-dist {shlex.join(command)}; in {Path.cwd()}; "
        f"{', '.join(f'{name} {version}' for name, version in versions().items())}"
    )


def rank_logs() -> list[RankLog]:
    """The log of this rank, if it has one."""
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, RankLog)]


def write_stacks() -> None:
    """Where every thread is, into this rank's log if it has one."""
    for log in rank_logs():
        log.write_stacks()


def failed_first(who: str, log: Path, why: str) -> str:
    """The sentence about the rank whose end ended the others."""
    return f"{who} failed first: see {log}: {why}"


def tell_launcher(trace: str, is_own: bool = True) -> bool:
    """Leave `trace` where torchrun and `accelerate launch` look for the text that they print last; whether one does.

    They call the earliest failure the root cause. They compare whole seconds and take a rank that left no text to
    fail when they see it; a rank may end in the same second as the one that ended it, and sooner. So a failure that
    is not `is_own` of a rank is dated one second later. Raises nothing: a launcher that cannot be told prints the exit
    code instead.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    more = {"py_callstack": trace, "timestamp": str(int(time.time()) + (not is_own))}
    with contextlib.suppress(OSError):
        if file:
            atomic_write(Path(file), json.dumps({"message": {"message": trace, "extraInfo": more}}))
            return True
    return False


def is_collective_error(error: BaseException) -> bool:
    """Whether a rank could not hear from another: it may have ended, which is seldom this rank's fault."""
    distributed = sys.modules.get("torch.distributed")
    kinds = (distributed.DistError,) if distributed is not None and distributed.is_available() else ()
    return isinstance(error, kinds) or (type(error) is RuntimeError and "gloo" in str(error).lower())


def is_timeout(error: BaseException) -> bool:
    """Whether a collective waited for as long as it may."""
    return is_collective_error(error) and re.search(r"timed? ?out", str(error), re.IGNORECASE) is not None


def lost_address(error: BaseException) -> str | None:
    """Of the machine to which the kernel broke a connection, since it no longer answers; None for other errors."""
    found = re.search(r"\[([^\]]+)\]:\d+: (?:Connection timed out|No route to host)", str(error))
    return found[1] if found and is_collective_error(error) else None
