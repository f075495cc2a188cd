"""What the screen shows: log lines, and how far the work is: a live bar on a terminal, elsewhere a line now and then.

This module imports no torch, and rich only where a bar is drawn.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from rvc_dist.workspace import Shard

logger = logging.getLogger(__name__)

T = TypeVar("T")

DETAILS = {"--quiet": logging.WARNING, "--verbose": logging.DEBUG}
"""From which level on these options show lines, on every rank."""
TICK_S = 0.5
FIRST_LINE_S, LAST_LINE_S = 10.0, 300.0
"""Where there is no terminal, lines come in a tenth of the time that the work has taken, within these bounds."""
RATE_S = 60.0
"""The rate is that of the later half of the time, and at least of so much of it: the beginning is often slower."""
AUDIO = "s audio"
"""The unit of work that is counted in seconds of recordings."""
MIN_BAR, MAX_BAR = 8, 40
"""Columns."""


class Screen(logging.Handler):
    """Writes to where sys.stderr points now: a live bar takes it over to print lines above itself."""

    def __init__(self, level: int, has_bar: bool) -> None:
        super().__init__(level)
        self.has_bar = has_bar

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{self.format(record)}\n")
        sys.stderr.flush()


def without_details(arguments: Sequence[str]) -> tuple[list[str], str]:
    """A command line without --quiet and --verbose, and the last of them, which counts; or nothing."""
    own = list(arguments[: arguments.index("--")]) if "--" in arguments else list(arguments)
    given = [word for word in own if word in DETAILS]  # behind `--` are those of another command
    rest = [word for word in own if word not in DETAILS]
    return rest + list(arguments[len(own) :]), given[-1] if given else ""


def set_up_logging(shard: Shard, detail: str = "") -> None:
    """On the screen INFO of the first rank, warnings of the others, each line with its rank when there are several."""
    rank = f"[rank {shard.index}] " if shard.count > 1 else ""
    is_shown = shard.is_first or shard.array
    level = DETAILS.get(detail, logging.INFO if is_shown else logging.WARNING)
    screen = Screen(level, is_shown and level < logging.WARNING)
    logging.basicConfig(
        level=logging.WARNING, format=f"%(asctime)s {rank}%(message)s", datefmt="%H:%M:%S", handlers=[screen]
    )
    logging.getLogger("rvc_dist").setLevel(logging.DEBUG)  # the rank's log has all


def say_at_once(text: str, level: int = logging.WARNING) -> None:
    """For signal handlers: a thread waits for the locks that the code which was interrupted may hold."""
    _thread.start_new_thread(logger.log, (level, "%s", text))


@contextlib.contextmanager
def stoppable(what: str, level: int) -> Iterator[None]:
    """Inside, Ctrl-C says at once what it does, since what is being made may take a while; a second one ends all."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        told = f"Ctrl-C: {what} stops, what is done is kept and the same command continues; a second Ctrl-C ends it"
        say_at_once(f"{told} without waiting for what is being made now", level)
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    if (
        not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):  # ignored, as in the background
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 100:
        return f"{hours} h {minutes} min" if hours else f"{minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def short(number: float) -> str:
    """`12.3`, `123`"""
    return f"{number:.{0 if number >= 99.95 else 1}f}"


class ProgressBar:
    """How far a piece of work is, its rate, the time left and the failures so far.

    On a terminal a live bar, elsewhere a log line now and then. Inside another bar it shows nothing.
    """

    opened: ClassVar[list[ProgressBar]] = []
    """Those of this process, the outermost first."""

    def __init__(
        self,
        what: str,
        total: float | None,
        unit: str,
        done: float = 0.0,
        look: Callable[[ProgressBar], object] | None = None,
        logs: bool = True,
    ) -> None:
        """`look` is called before the bar shows itself, to set `done` and the like; without `logs` lines are others'.

        A `total` of None is of work whose length nobody knows.
        """
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.num_failed, self.text = 0, ""
        self.logs, self._look = logs, look
        self.began_at = self._told_at = time.monotonic()
        self._samples = deque([(self.began_at, done)])
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._live: Any = None

    def __enter__(self) -> ProgressBar:
        is_outer = not self.opened
        self.opened.append(self)
        if is_outer:
            if (console := _terminal()) is not None:
                from rich.live import Live

                is_same = sys.stdout.isatty()  # what goes into a file stays there
                self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=is_same)
                self._live.start()
                console.show_cursor(True)  # who is killed does not bring it back
            self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(2 * TICK_S)  # a disk that does not answer would hold `look`
        if self._live is not None:
            self._live.stop()
        self.opened.remove(self)

    def advance(self, amount: float = 1.0, num_failed: int = 0) -> None:
        """So much more is done, or has failed; any thread may say so."""
        with self._lock:
            self.done += amount
            self.num_failed += num_failed

    def begin(self, done: float) -> None:
        """So much was done before; the rate is counted from here."""
        self.advance(done)
        self._samples = deque([(time.monotonic(), self.done)])

    @property
    def rate(self) -> float:
        """Units a second, lately."""
        (then, before), now = self._samples[0], time.monotonic()
        return (self.done - before) / (now - then) if now > then else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds, None where that is not known."""
        if self.total is None or (rate := self.rate) <= 0:
            return None
        return max(0.0, self.total - self.done) / rate

    def _run(self) -> None:
        while not self._ended.wait(TICK_S):
            with contextlib.suppress(OSError):  # of a disk or a terminal; whoever needs it says so
                self.tick()

    def tick(self) -> None:
        """Look, and show what there is to show."""
        if self._look is not None:
            self._look(self)
        now = time.monotonic()
        elapsed_s = now - self.began_at
        if now - self._samples[-1][0] >= elapsed_s / 200:
            self._samples.append((now, self.done))
        while len(self._samples) > 2 and self._samples[1][0] < now - max(RATE_S, elapsed_s / 2):
            self._samples.popleft()
        if self._live is not None:
            self._live.update(self.drawn(self._live.console.width), refresh=True)
        elif self.logs and now - self._told_at >= min(max(elapsed_s / 10, FIRST_LINE_S), LAST_LINE_S):
            self._told_at = now
            logger.info("%s", self.line())

    def parts(self) -> dict[str, str]:
        """What there is to say, in the order in which it is said."""
        rate, left_s = self.rate, self.left_s
        parts = {"failed": f"{self.num_failed} failed"} if self.num_failed else {}
        if self.total is None:
            return {"since": f"for {duration(time.monotonic() - self.began_at)}"} | parts | {"text": self.text}
        is_audio = self.unit == AUDIO
        done, total = (duration(n) if is_audio else f"{n:.0f}" for n in (self.done, self.total))
        per_s = rate >= 1 or is_audio
        speed = short(rate if per_s else 60 * rate)
        return {
            "percent": f"{100 * self.done / max(self.total, 1e-9):.0f}%",
            "done": f"{done}/{total}" if is_audio else f"{done}/{total} {self.unit}",
            "rate": f"{speed} {self.unit}/{'s' if per_s else 'min'}" if rate > 0 else "",
            "left": "" if left_s is None else f"{duration(left_s)} left",
            **parts,
            "text": self.text,
        }

    def line(self) -> str:
        """For a log."""
        parts = self.parts()
        return f"{self.what}: {', '.join(part for part in parts.values() if part)}"

    def drawn(self, width: int) -> RenderableType:
        """For a terminal of `width` columns: what matters most comes first to have room."""
        from rich.progress_bar import ProgressBar as Bar
        from rich.table import Table
        from rich.text import Text

        parts, room = self.parts(), width - len(self.what)
        chosen = list[str]()
        for name in ("since", "percent", "left", "failed", "done", "text", "rate"):
            part = parts.get(name, "")
            kept = 0 if len(chosen) < 3 or self.total is None else MIN_BAR  # for the bar itself
            if part and len(part) + 1 + kept < room:
                chosen.append(name)
                room -= 2 + len(part)
        row: list[Any] = [Text(f"{self.what} "), Text(", ".join(parts[name] for name in parts if name in chosen))]
        if room > MIN_BAR and self.total:
            row.insert(1, Bar(self.total, min(self.done, self.total), min(room - 1, MAX_BAR)))
            row[2].pad_left(1)
        table = Table.grid()
        for _ in row:
            table.add_column(no_wrap=True, overflow="ellipsis")
        table.add_row(*row)
        return table


def counted(items: Collection[T], what: str, unit: str) -> Iterator[T]:
    """Each of `items`, which are done one after the other."""
    with ProgressBar(what, len(items), unit) as bar:
        for item in items:
            yield item
            bar.advance()


def _terminal() -> Console | None:
    """The terminal on which a bar is drawn; None where the screen is none, or another rank's, or is to be quiet."""
    screens = [handler for handler in logging.getLogger().handlers if isinstance(handler, Screen)]
    if not (screens and screens[0].has_bar and sys.stderr.isatty()) or os.environ.get("CI"):
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_interactive else None
