"""RUN/logs/rank_*.job: which command a rank runs, since when and how far it is, or how it ended; for `rvc-dist status`.

A thread rewrites the file now and then: whether a process on another host lives is known by its file changing alone.
"""

from __future__ import annotations

import contextlib
import shlex
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

from rvc_dist.files import ForeignFileError, read_bounded, write_json
from rvc_dist.runtime.logs import EXIT_S, RankLog, ends_within
from rvc_dist.runtime.run_lock import HOLDER, MAX_BYTES, REFRESH_S, job
from rvc_dist.schema import Count, Seconds, Word, parse_json, record
from rvc_dist.screen import ProgressBar
from rvc_dist.workspace import Workspace

DONE, FAILED, STOPPED = "done", "failed", "stopped"
ENDS = {0: DONE, 75: STOPPED}
"""By exit code; others are failures."""


class Doing(TypedDict):
    """What the outermost bar shows, as numbers."""

    what: str
    done: float
    total: float | None
    unit: str
    num_failed: Count
    text: str
    left_s: Seconds | None


JOB = record(
    **HOLDER.__annotations__,
    **dict.fromkeys(("stage", "command"), str),
    **dict.fromkeys(("rank", "ranks"), Count),
    array=bool,
    began_at=Seconds,
    doing=Doing | None,
    ended=Word | None,
)
"""Besides what HOLDER has: began_at is when the file was first written, by the clock of the disk."""


class JobFile:
    """The file of this rank, written while its log is."""

    def __init__(self, log: RankLog, stage: str, command: Sequence[str]) -> None:
        self._log, shard = log, log.shard
        self.path = log.work.job_file(shard.index)
        self._data = job() | {
            "token": "0", "path": str(self.path.absolute()), "stage": stage, "command": shlex.join(command),
            "rank": shard.index, "ranks": shard.count, "array": shard.array, "beat": 0, "began_at": 0.0, "ended": None,
        }  # fmt: skip
        self._pulses = shard.is_first or shard.array
        """The others live and end with the first."""
        self.code: int | None = None
        """With which the command ends; None where it does so in another way."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="job file", daemon=True)

    def __enter__(self) -> JobFile:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._data["ended"] = ENDS.get(self.code, FAILED) if self.code is not None else FAILED
        ends_within(EXIT_S, "the job file", self._finish)

    def _finish(self) -> None:
        self._thread.join()
        self._write()

    def _run(self) -> None:
        while not self._ended.wait(REFRESH_S if self._data["beat"] else 0.1):
            if self._pulses or not self._data["beat"]:
                self._write()

    def _write(self) -> None:
        """A disk that refuses it costs the state, not the run."""
        if not self._log.is_open:
            return
        bar = next(iter(ProgressBar.opened), None)
        doing = bar and {key: getattr(bar, key) for key in Doing.__annotations__}
        self._data["beat"] += 1
        with contextlib.suppress(OSError):
            write_json(self.path, self._data | {"doing": doing})
            if not self._data["began_at"]:
                self._data["began_at"] = self.path.stat().st_mtime


def read_jobs(work: Workspace) -> Iterator[dict[str, Any]]:
    """What the ranks wrote, the first rank's first."""
    for path in sorted(work.logs_dir.glob("rank_*.job")):
        with contextlib.suppress(OSError, ForeignFileError):
            yield parse_json(read_bounded(path, MAX_BYTES), JOB)
