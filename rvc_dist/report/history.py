"""RUN/metrics.jsonl: what a training run did, one JSON object a line, for people and programs.

The main rank appends to it while it trains. Every line has `kind`, one of KINDS, `time` in seconds since 1970 and
`step`. A resumed run repeats steps: its `run` line of step S hides all lines of later steps before it, as TensorBoard's
purge_step does.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Mapping
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, TypedDict

from rvc_dist.files import ForeignFileError, disk_errors, regular_size
from rvc_dist.runtime.background import Background
from rvc_dist.runtime.logs import is_collective_error, rank_logs
from rvc_dist.schema import Count, Rule, Seconds, check, record
from rvc_dist.workspace import Stopped

logger = logging.getLogger(__name__)

_NUMBERS = Rule(
    "numbers by name, or null where one was not finite",
    (dict,),
    lambda values: all(v is None or (type(v) in (int, float) and abs(v) < 1e300) for v in values.values()),
)
Values = Annotated[dict[str, float | None], _NUMBERS]


class Rank(TypedDict):
    """Where a rank computes: device is torch's word for it, name the maker's."""

    rank: Count
    host: str
    device: str
    name: str


KINDS: dict[str, Any] = {
    "run": record(
        False, epoch=Seconds, total_steps=Count, ranks=list[Rank], versions=dict[str, str], global_batch=Count
    ),
    "step": record(epoch=Seconds, values=Values, seconds=Values),
    "validation": record(
        False,
        epoch=Seconds,
        values=Values,
        speakers=dict[str, Values],
        clips=Count,
        seconds=Seconds,
        is_best=bool,
        why=str,
        values_raw=Values,
        values_ema=Values,
        unseen=Values,
    ),
    "samples": record(folder=str),
    "checkpoint": record(path=str, why=str),
    "voice": record(path=str),
    "warning": record(text=str),
    "end": record(why=str),
}
"""What the lines have besides:

run: training starts, or goes on, from `step`; total_steps and global_batch (clips a step) are those of all ranks.
step: means over the steps since the last such line; `seconds` a step are spent in each part of it.
validation: `values` over all speakers and those of each by id; `seconds` is what the validation took, `why` it is the
    best or not, in a sentence. With train.ema_decay, `values_raw` are of the weights, `values_ema` of their average,
    and `values` are the better ones. `unseen` is of speakers in data.holdout_speakers, converted.
samples: what was made to listen to is in RUN/`folder`.
checkpoint, voice: RUN/`path` was written; `why` is due, best, stop or end.
end: done, overtrained, stopped by SIGTERM, failed: ... A run without one was killed, or still goes on.
"""
LINE = record(kind=str, time=Seconds, step=Count)
MAX_BYTES = 1 << 26
"""What is read of a file: its end. A million steps with the default log_every_steps have about as much."""
MAX_WAITING = 10_000
"""Lines that are kept for a disk that refuses them."""


class History(logging.Handler):
    """Writes the lines of a run in a thread of its own: no step waits for the disk, and none ends because of it.

    Inside `with`, what the package warns of becomes lines too, and so does the error that ends it. Nothing is written
    before `begin`, and nothing at all on ranks that do not call it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self.path = path
        self.step = 0
        """The step that is being made: of warnings."""
        self._early: list[str] = []
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        """Lines that the disk has not taken yet."""
        self._writer: Background | None = None

    def __enter__(self) -> History:
        logging.getLogger("rvc_dist").addHandler(self)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        logging.getLogger("rvc_dist").removeHandler(self)
        if error is not None and not isinstance(error, Stopped):
            cause = next((log.first_failure() for log in rank_logs()), None) if is_collective_error(error) else None
            self.write("end", self.step, why=f"failed: {cause or str(error) or repr(error)}")
        self.close()

    def begin(self, step: int, **values: Any) -> None:
        """Training goes on from `step`; what was warned of before comes after the line that says so."""
        self._writer = Background(str(self.path))
        self.step = step
        self.write("run", step, **values)
        for text in self._early:
            self.write("warning", step, text=text)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add a line; numbers that are not finite become null."""
        if self._writer is not None:
            line = {"kind": kind, "time": round(time.time(), 3), "step": step} | values
            self._writer.call(partial(self._append, f"{json.dumps(_plain(line), allow_nan=False)}\n".encode()))

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if self._writer is None:
            self._early.append(text)
        self.write("warning", self.step, text=text)

    def flush(self) -> None:
        """Return when the lines until now are written: a checkpoint is not whole before."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Return when all is written, or when the disk has not answered for some seconds."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        super().close()

    def _append(self, line: bytes) -> None:
        """Write what waits, line after line. The file is opened each time: over NFS others see it when it is closed."""
        self._waiting.append(line)
        with disk_errors(self.path), FileIO(self.path, "a+") as stream:
            end = stream.seek(0, 2)
            stream.seek(max(0, end - 1))
            if stream.read(1) not in (b"", b"\n"):  # a killed run's, or a full disk's, half of a line
                stream.write(b"\n")
            while self._waiting:
                rest = self._waiting[0]
                while rest:
                    rest = rest[stream.write(rest) :]
                self._waiting.popleft()


def _plain(value: Any) -> Any:
    """What JSON and UTF-8 have: null for numbers that are not finite, escapes for bytes of names that are no text."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def read_history(path: Path, max_bytes: int = MAX_BYTES) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl that count, oldest first; none where there is no such file.

    What is no line as KINDS has them is passed over: a half that a killed run left, a foreign one, a kind of a later
    version. Of a file larger than `max_bytes` the end is read.

    Raises:
        ForeignFileError: it is no regular file.
        OSError: it cannot be read.
    """
    try:
        size = regular_size(path)
        with path.open("rb") as stream:
            stream.seek(max(0, size - max_bytes))
            lines = stream.read(max_bytes).split(b"\n")
    except FileNotFoundError:
        return []
    found: list[dict[str, Any]] = []
    last_step = math.inf
    for line in map(_parsed, reversed(lines)):
        if line is not None and line["step"] <= last_step:
            found.append(line)
            if line["kind"] == "run":
                last_step = line["step"]
    return found[::-1]


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = check(json.loads(text), LINE)
        return check(line, KINDS[line["kind"]]) if line["kind"] in KINDS else None
    except (ForeignFileError, ValueError, RecursionError):
        return None
