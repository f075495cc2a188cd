"""What a rank does now, and when it was last heard of."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rvc_dist.files import read_bounded
from rvc_dist.runtime.logs import is_collective_error
from rvc_dist.schema import Count, Seconds, Token, Word, parse_json, record

MIN_STEPS, RECENT_STEPS = 10, 50
"""The first steps, which compile and search for kernels, and the ones that the median is taken of."""
EXEMPT = ("validation", "checkpoint")
"""Phases that steps are not measured with: they take long by right, every so often."""


class Heartbeat:
    """What this rank does. The training thread writes it, the watching thread reads it."""

    def __init__(self) -> None:
        self.step, self.phase, self.num_sent = 0, "start", 0
        self.failure = ""
        """Why this rank ends, when it does so for a reason of its own."""
        self.at = self.step_at = time.monotonic()
        """When this phase and this step began; validation and checkpoints are not part of a step."""
        self.count = 0
        """Phases entered and gradients sent since the start: all ranks do the same, so a smaller count is behind."""
        self._kind = ""
        self._recent: dict[str, deque[float]] = {}

    def begin_step(self, step: int, kind: str) -> None:
        """The next step begins; its duration is compared with those of its kind only."""
        now = time.monotonic()
        if self._kind:
            self._recent.setdefault(self._kind, deque(maxlen=RECENT_STEPS)).append(now - self.step_at)
        self.step, self._kind, self.step_at = step, kind, now
        self.enter("between phases")

    def enter(self, phase: str) -> None:
        """What comes now, until the next."""
        self.phase, self.num_sent, self.at = phase, 0, time.monotonic()
        self.count += 1

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        self.enter(phase)
        with self.noted():
            yield
        if phase in EXEMPT:
            self.step_at += time.monotonic() - self.at
        self.enter(f"after {phase}")

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, an error of this rank's own is noted for the others before the rank begins to end."""
        try:
            yield
        except Exception as error:
            if not is_collective_error(error):
                self.failure = str(error) or repr(error)
            raise

    def sent(self) -> None:
        """Gradients were given to all-reduce."""
        self.num_sent += 1
        self.count += 1

    @property
    def median_s(self) -> float | None:
        """Of recent steps of this step's kind; None while there are too few."""
        recent = list(self._recent.get(self._kind, ()))
        return statistics.median(recent) if len(recent) >= MIN_STEPS else None


HEARTBEAT = record(
    **dict.fromkeys(("rank", "pid", "step", "num_sent", "count"), Count),
    **dict.fromkeys(("host", "phase"), Word),
    token=Token,
    in_phase_s=Seconds,
    failure=str,
)
"""What a rank writes into its file."""
MAX_HEARTBEAT_BYTES = 1 << 16


def read_beats(folder: Path, since: float) -> Iterator[dict[str, Any]]:
    """What the ranks of a job that began at `since`, by the clock of the disk, have written last."""
    for path in sorted(folder.glob("rank_*.beat")):
        with contextlib.suppress(OSError, ValueError):  # its rank has ended, or writes just now
            if path.stat().st_mtime >= since:
                yield parse_json(read_bounded(path, MAX_HEARTBEAT_BYTES), HEARTBEAT)


class HeartbeatRecord(NamedTuple):
    """The last sign of life of a rank."""

    text: bytes
    seen_at: float
    """When it was new, by this process's clock."""
    data: dict[str, Any]

    @property
    def name(self) -> str:
        return f"rank {self.data['rank']} on {self.data['host']} (pid {self.data['pid']})"

    @property
    def where(self) -> str:
        sent = " (gradients sent)" if self.data["num_sent"] else ""
        return f"{self.data['phase']} of step {self.data['step']}{sent}"

    def in_phase_s(self) -> float:
        return float(self.data["in_phase_s"]) + time.monotonic() - self.seen_at
