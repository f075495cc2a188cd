"""Work that nobody waits for: what is written beside training, to disks and networks that may not answer."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from rvc_dist.runtime.logs import EXIT_S

logger = logging.getLogger(__name__)


class Background:
    """Calls functions in a thread of its own, in their order.

    The first that fails is a warning, and so is one that does not end while somebody waits for it; neither ends
    anything else. The thread does not hold up the end of the process.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.is_lost = False
        """It did not answer in time: nobody waits for it any more."""
        self._has_warned = False
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], object]) -> None:
        self._calls.put(function)

    def flush(self, limit_s: float | None = None) -> None:
        """Return when all calls until now have ended, or are given up after `limit_s`, by default EXIT_S."""
        limit_s = EXIT_S if limit_s is None else limit_s
        ended = threading.Event()
        self.call(ended.set)
        if not self.is_lost and not ended.wait(limit_s):
            self.is_lost = True
            logger.warning("%s has not answered for %.0f s: going on without it", self.what, limit_s)

    def close(self, limit_s: float | None = None) -> None:
        """The last calls, as `flush`; then the thread ends."""
        self.flush(limit_s)
        self._calls.put(None)

    def _run(self) -> None:
        while (function := self._calls.get()) is not None:
            try:
                function()
            except Exception as error:  # noqa: BLE001 - of whatever library: told, and never the end of a run
                if not self._has_warned:
                    self._has_warned = True
                    reason = (isinstance(error, OSError) and error.strerror) or str(error) or repr(error)
                    logger.warning("%s: %s; the run goes on without it", self.what, reason)
