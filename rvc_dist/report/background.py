"""The page of a run that is training: made by a process of its own, so that no step waits for it.

    python -m rvc_dist.report.background RUN PARENT

A thread would take the interpreter from the steps for seconds, and a fault of a library would end the run. The process
takes what the steps leave of the CPU, ends with its parent, and shares nothing with it but files.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from rvc_dist.report import PAGE
from rvc_dist.runtime.hang_killer import end_with_parent, ignore_signals_of_job
from rvc_dist.runtime.logs import EXIT_S
from rvc_dist.workspace import StageError

logger = logging.getLogger(__name__)

MOST_S = 300.0
"""A page that takes longer is given up: it takes seconds, or some more of a busy CPU."""
PATIENT_S = 60.0
"""How long a run that is done waits for its last page; one that is stopped or fails has less time."""
NICENESS = 19


class PageMaker:
    """Makes RUN/report.html at each `begin`, and, if there was one, a last time at the end."""

    def __init__(self, root: Path, enabled: bool = True) -> None:
        self.root, self.enabled = root, enabled
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] = io.BytesIO()
        """What the process says of itself."""
        self._began_at = 0.0

    def begin(self) -> None:
        """Return at once. Where the page before is still being made, that one has to do."""
        is_made = self._process is None or self._process.poll() is not None
        if self.enabled and (is_made or time.monotonic() - self._began_at > MOST_S):
            self._look_after(MOST_S)
            self._start(NICENESS)

    def __enter__(self) -> PageMaker:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._process is not None:
            self.finish(PATIENT_S if kind is None else EXIT_S)

    def finish(self, most_s: float = PATIENT_S) -> None:
        """Make the page of what is there now, and wait for it."""
        if not self.enabled:
            return
        if self._process is not None and self._process.poll() is None:
            self._kill(self._process)  # its page is of a state that is past
        else:
            self._look_after(MOST_S)
        self._start(0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process is not None:
                self._process.wait(most_s)
        self._look_after(most_s)

    def _start(self, niceness: int) -> None:
        command = [sys.executable, "-m", __spec__.name, str(self.root), str(os.getpid()), str(niceness)]
        self._began_at, self._process = time.monotonic(), None
        try:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process runs
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors
            )
        except OSError as error:
            self._warn(str(error))

    def _look_after(self, most_s: float) -> None:
        """Warn where the last page was not made; what still makes it, after `most_s`, is ended."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._kill(self._process)
            self._warn(f"not made within {most_s:g} s")
        elif self._process.returncode > 0:  # a signal that ends it is meant for the whole job
            self._errors.seek(0)
            lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
            self._warn(lines[-1] if lines else f"exit code {self._process.returncode}")
        self._errors.close()

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for a disk: the kernel ends it later
            process.wait(1.0)

    def _warn(self, why: str) -> None:
        logger.warning("%s: %s; `rvc-dist report %s` makes it", self.root / PAGE, why, self.root)


def main() -> None:
    root, parent, niceness = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    ignore_signals_of_job()
    end_with_parent(signal.SIGKILL, parent)
    with contextlib.suppress(AttributeError, OSError):  # Windows has none
        os.nice(niceness)
    from rvc_dist.report.page import write_page

    try:
        write_page(root)
    except (StageError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
