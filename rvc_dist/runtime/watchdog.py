"""Watches over a training run: which rank is slow and what it waits for, who is not heard of, who holds the run folder.

Every rank notes what it does in a `Heartbeat`, which costs a few assignments a phase. A thread of each rank writes
that to RUN/logs/rank_*.beat now and then; the first rank's reads them all when a step takes far longer than usual, and
that of any rank which has waited for as long as it may.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import logging
import math
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from rvc_dist.files import read_bounded
from rvc_dist.runtime.accelerator import on_first_rank, outlast
from rvc_dist.runtime.heartbeat import EXEMPT, HEARTBEAT, MAX_HEARTBEAT_BYTES, Heartbeat, HeartbeatRecord
from rvc_dist.runtime.logs import (
    EXIT_S,
    ends_within,
    failed_first,
    is_collective_error,
    is_timeout,
    lost_address,
    rank_logs,
    write_stacks,
)
from rvc_dist.runtime.run_lock import RunLock
from rvc_dist.schema import parse_json
from rvc_dist.workspace import OtherRankError, StageError, Workspace

logger = logging.getLogger(__name__)

SLOW_FACTOR, SLOW_S = 5.0, 5.0
"""A step is slow when it takes this many times the median of recent steps, and at least this many seconds."""
SILENT_S = 10.0
"""A rank that does not beat for this long (and for three beats) is reported."""
REPEAT_S = 60.0
LAST_S = 5.0
"""How long a rank that waited in vain may take to notice that the others have ended; on a GPU it never does."""
BEATS_PER_S = 100.0
"""Of all ranks together, so that thousands do not weigh on the file system; a rank beats once a second at most."""


class Watch:
    """The watching thread of a rank, and the run's lock; `with` ends both."""

    def __init__(self, work: Workspace) -> None:
        self.work, self.heartbeat, self.lock = work, Heartbeat(), RunLock(work.train_lock_file)
        self._rank, self._num_ranks = 0, 1
        self._interval_s = 1.0
        self._others: dict[int, HeartbeatRecord] = {}
        self._slow_step: tuple[int, float] | None = None
        """The step that was reported as slow, and when it began."""
        self._reported_at = -math.inf
        self._timeout_s = math.inf
        self._on_gpu = False
        self._count, self._round_at, self._waited_s = -1, -math.inf, 0.0
        self._look: tuple[float, dict[int, HeartbeatRecord]] | None = None
        """After how long a wait all beats were read, and what they were."""
        self._reason: StageError | None = None
        """Why this rank ends, when it has waited in vain."""
        self._given_up = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._file: int | None = None
        self._killer: subprocess.Popen[bytes] | None = None
        self._me: dict[str, Any] = {}

    def start(self, accelerator: Accelerator) -> None:
        """Lock the run folder and begin to watch.

        Raises:
            StageError: another job trains in it; on all ranks.
        """
        self._rank, self._num_ranks = accelerator.process_index, accelerator.num_processes
        self._interval_s = max(1.0, self._num_ranks / BEATS_PER_S)
        token = secrets.token_hex(8)
        self._me = {"rank": self._rank, "host": socket.gethostname(), "pid": os.getpid(), "token": token}
        self._acquire(accelerator)
        # The interpreter's own end waits for threads, processes and connections of libraries.
        atexit.register(faulthandler.dump_traceback_later, 3 * EXIT_S, exit=True, file=2)
        if self._num_ranks > 1:
            self._start_killer(token)
        self._on_gpu = accelerator.device.type != "cpu"
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        outlast(accelerator, self._timeout_s)

    def _acquire(self, accelerator: Accelerator) -> None:
        def attempt() -> bool:
            try:
                return self.lock.try_acquire()
            except OSError as error:
                raise StageError(
                    f"{self.lock.path}: cannot be written ({error.strerror}); nothing was trained"
                ) from error

        while not on_first_rank(accelerator, attempt):  # in short turns, none longer than train.timeout_s
            time.sleep(0.5)
        for log in rank_logs():
            log.is_waiting = False

    def _start_killer(self, token: str) -> None:
        """A process that ends this one when the others ask for it."""
        file = self.work.hanging_file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        except OSError as error:
            logger.warning("%s: cannot be written (%s): ranks that hang are left to their launchers", file, error)
            return
        script = str(Path(__file__).with_name("hang_killer.py"))
        command = [sys.executable, "-E", "-S", script, str(file), token, str(self._interval_s), str(os.getpid())]
        self._killer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        try:
            ends_within(EXIT_S, "the watch", partial(self._leave, kind is not None))
        except OSError as error:
            if kind is None:
                raise
            logger.warning("%s: cannot be removed (%s)", self.lock.path, error)  # the first error is what ends the run
        finally:
            if self._killer is not None:
                self._killer.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._killer.wait(EXIT_S)

    def _leave(self, failed: bool) -> None:
        if self._thread is not None:
            self._thread.join()
        if self._killer is not None and not failed:  # else other killers may still have to read it
            with contextlib.suppress(OSError):
                self.work.hanging_file.unlink()
        if self._file is not None:
            os.close(self._file)
            with contextlib.suppress(OSError):
                self.work.beat_file(self._rank).unlink()
        self.lock.release()

    @contextlib.contextmanager
    def explain_timeouts(self, timeout_s: float) -> Iterator[None]:
        """Inside, a rank that waited too long names the ranks that it waited for, and has them ended.

        A process that is stopped or hangs would not hear the launcher ask it to end, and the job would outlive its
        timeout by the launcher's patience.

        Raises:
            StageError: in the place of the collective's error.
            OtherRankError: the same, when another rank has said why it ends.
        """
        self._timeout_s = timeout_s
        try:
            yield
        except RuntimeError as error:
            if self._thread is None or not (is_timeout(error) or (self._reason and is_collective_error(error))):
                raise
            if self._reason is None:
                first, wait_s = self._beats({}), min(1.5 * self._interval_s, 5.0)
                time.sleep(wait_s)
                beats = self._beats(first)
                late, address = self._late(first, beats, wait_s), lost_address(error)
                lost = address and self._lost(address, [beat for beat in late if beat is first.get(beat.data["rank"])])
                self._reason = lost or self._failure_of_another(beats) or self._in_vain(beats, late)
            raise self._reason from error
        finally:
            self._timeout_s = math.inf
            if self._reason is not None:
                faulthandler.cancel_dump_traceback_later()  # it has noticed that it is to end

    def _in_vain(self, beats: dict[int, HeartbeatRecord], late: list[HeartbeatRecord]) -> StageError:
        """That this rank has waited for `late`, and for those without a beat; the first are ended."""
        self._end(late)
        gone = [f"rank {rank}, which has ended" for rank in range(self._num_ranks) if rank not in beats]
        names = listed([f"{beat.name}, last in {beat.where}" for beat in late] + gone)
        return StageError(
            f"rank {self._rank} waited for train.timeout_s = {self._timeout_s:g} s, in {self.heartbeat.phase} of step "
            f"{self.heartbeat.step}, for {names or 'the others, all of which did the same'}. Where each rank was "
            f"is in {self.work.logs_dir};",
            "the same command continues from the last checkpoint",
        )

    def _lost(self, address: str, silent: list[HeartbeatRecord]) -> StageError:
        """That the machine at `address` vanished, with those ranks that give no sign of life, or the way to it."""
        names = f", and nothing is heard of {listed([beat.name for beat in silent])}" if silent else ""
        return StageError(
            f"rank {self._rank} on {self._me['host']}: the machine at {address} does not answer, in "
            f"{self.heartbeat.phase} of step {self.heartbeat.step}{names};",
            "launchers that are left go on from the last checkpoint, and so does the same command",
        )

    def _failure_of_another(self, beats: dict[int, HeartbeatRecord]) -> StageError | None:
        """Which rank ends, or has ended, for a reason of its own, and why; None where none has said so."""
        for rank, beat in beats.items():
            if rank != self._rank and beat.data["failure"]:
                return OtherRankError(failed_first(beat.name, self.work.rank_log(rank), beat.data["failure"]))
        return next((OtherRankError(why) for log in rank_logs() if (why := log.first_failure(0.0))), None)

    def _late(
        self, first: dict[int, HeartbeatRecord], beats: dict[int, HeartbeatRecord], between_s: float
    ) -> list[HeartbeatRecord]:
        """Of ranks that have not ended, those without a sign of life between two looks, else those that did least.

        There are none when all have done the same.
        """
        silent = [b for rank, b in beats.items() if rank != self._rank and b is first.get(rank)]
        if silent and between_s > self._interval_s:  # else they may be between two beats
            return silent
        behind = stragglers(beats)
        return behind if len(behind) < len(beats) else []

    def _end_wait_in_vain(self) -> None:
        """End this rank when it has waited for train.timeout_s and cannot know.

        On a GPU no collective fails: the host sits in a copy from the device or in the launch of a kernel, where it
        hears no signal, until NCCL aborts the process.
        """
        heartbeat, before, now = self.heartbeat, self._round_at, time.monotonic()
        same, self._count, self._round_at = heartbeat.count == self._count, heartbeat.count, now
        # A job that is suspended does not wait meanwhile.
        self._waited_s = self._waited_s + min(now - before, self._interval_s + SILENT_S) if same else 0.0
        if self._waited_s < self._timeout_s or self._num_ranks == 1 or self._reason or heartbeat.failure:
            self._look = None
            return
        if self._look is None:
            self._look = self._waited_s, self._beats({})
            return
        looked_s, first = self._look
        between_s = self._waited_s - looked_s
        if between_s < 1.5 * self._interval_s:
            return
        beats = self._beats(first)
        self._look, self._reason = (self._waited_s, beats), self._why_in_vain(first, beats, between_s)
        if self._reason is not None:
            logger.error("%s", self._reason)
            for log in rank_logs():
                log.failed(self._reason, str(self._reason))
                log.write_stacks()
            faulthandler.dump_traceback_later(LAST_S, exit=True, file=os.open(os.devnull, os.O_WRONLY))

    def _why_in_vain(
        self, first: dict[int, HeartbeatRecord], beats: dict[int, HeartbeatRecord], between_s: float
    ) -> StageError | None:
        """What ends a wait; None while others may still come, or wait for this rank."""
        if failure := self._failure_of_another(beats):
            return failure
        late = self._late(first, beats, between_s)
        before = {rank: beat.data["count"] for rank, beat in first.items()}
        if any(b.data["rank"] == self._rank or before.get(b.data["rank"]) != b.data["count"] for b in late):
            return None
        is_step = self.heartbeat.median_s is not None and self.heartbeat.phase not in EXEMPT
        # All at the same place: their network may be cut, which gloo reports itself, or they compute.
        return self._in_vain(beats, late) if late or (self._on_gpu and is_step) else None

    def _end(self, beats: list[HeartbeatRecord]) -> None:
        file = self.work.hanging_file
        try:
            with file.open("a", encoding="ascii") as stream:
                stream.writelines(f"{b.data['token']}\n" for b in beats if b.data["rank"] != self._rank)
        except OSError as error:
            logger.warning("%s: cannot be written (%s): who hangs is left to its launcher", file, error)

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            try:
                self._beat()
                self.lock.refresh()
            except OSError as error:
                if not self._given_up:
                    self._given_up = True
                    logger.warning("%s: the other ranks cannot hear of this one (%s)", self.work.logs_dir, error)
            self._judge()
            self._end_wait_in_vain()

    def _beat(self) -> None:
        """Tell the others where this rank is. One write into the same file: renaming would cost two more messages."""
        if self._file is None:
            self.work.logs_dir.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.work.beat_file(self._rank), os.O_WRONLY | os.O_CREAT, 0o644)
        heartbeat, now = self.heartbeat, time.monotonic()
        data = self._me | {
            "step": heartbeat.step,
            "phase": heartbeat.phase,
            "num_sent": heartbeat.num_sent,
            "count": heartbeat.count,
            "in_phase_s": round(now - heartbeat.at, 2),
            "beat": now,
            "failure": heartbeat.failure[:600],
        }
        os.pwrite(self._file, f"{json.dumps(data):<2000}\n".encode(), 0)
        os.fsync(self._file)  # over NFS others see it only then

    def _judge(self) -> None:
        """Report when a step takes too long, and which rank it is."""
        heartbeat, now = self.heartbeat, time.monotonic()
        age_s, median_s = now - heartbeat.step_at, heartbeat.median_s
        if self._slow_step is not None and heartbeat.step != self._slow_step[0]:
            if self._rank == 0:
                logger.info("step %d went on after %.0f s", self._slow_step[0], now - self._slow_step[1])
            self._slow_step, self._reported_at = None, -math.inf
        limit_s = max(SLOW_FACTOR * median_s, SLOW_S) if median_s is not None else math.inf
        is_slow = age_s > limit_s and heartbeat.phase not in EXEMPT
        looks = self._rank == 0 and (age_s > limit_s / 2 or now - heartbeat.at > SILENT_S / 2)
        self._others = self._beats(self._others) if looks else {}
        silent = [b for b in self._others.values() if now - b.seen_at > self._silent_after_s]
        if not (is_slow or silent) or now - self._reported_at < REPEAT_S:
            return
        if self._slow_step is None:
            self._slow_step = heartbeat.step, heartbeat.step_at
            write_stacks()
        self._reported_at = now
        if self._rank == 0:
            usual = f", {age_s / median_s:.0f} times the median of {median_s:.2g} s" if is_slow and median_s else ""
            logger.warning("step %d takes %.0f s%s: %s", heartbeat.step, age_s, usual, self._waited_for(silent))

    def _waited_for(self, silent: list[HeartbeatRecord]) -> str:
        """Which ranks the others wait for, and where those are."""
        late = silent or stragglers(self._others)
        if len(late) == self._num_ranks and not silent:
            return f"all ranks are in {late[0].where}"
        parts = [listed([self._heard(beat) for beat in late])] if late else []
        if others := [beat for beat in self._others.values() if beat not in late]:
            parts.append(f"the others wait for it (rank {others[0].data['rank']} in {others[0].where})")
        if missing := [str(rank) for rank in range(self._num_ranks) if rank not in self._others]:
            parts.append(f"nothing can be read of rank {listed(missing)}")
        return "; ".join(parts)

    def _heard(self, beat: HeartbeatRecord) -> str:
        silent_s = time.monotonic() - beat.seen_at
        if silent_s > self._silent_after_s:
            return f"{beat.name} has not been heard of for {silent_s:.0f} s, last in {beat.where}"
        return f"{beat.name} is in {beat.where} since {beat.in_phase_s():.0f} s"

    @property
    def _silent_after_s(self) -> float:
        return max(SILENT_S, 3 * self._interval_s)

    def _beats(self, before: dict[int, HeartbeatRecord]) -> dict[int, HeartbeatRecord]:
        """Every rank's beat; one that is as it was `before` is the same object."""
        now, beats = time.monotonic(), {}
        for rank in range(self._num_ranks):
            beat = before.get(rank)
            try:
                text = read_bounded(self.work.beat_file(rank), MAX_HEARTBEAT_BYTES)
                if beat is None or beat.text != text:
                    beat = HeartbeatRecord(text, now, parse_json(text, HEARTBEAT))
            except FileNotFoundError:  # not begun yet, or ended
                continue
            except (OSError, ValueError):  # half of it: next time
                pass
            if beat is not None:
                beats[rank] = beat
        return beats


def stragglers(beats: dict[int, HeartbeatRecord]) -> list[HeartbeatRecord]:
    """The ranks that the others wait for; all of them when all have done the same."""
    least = min((b.data["count"] for b in beats.values()), default=0)
    return [b for b in beats.values() if b.data["count"] == least]


def listed(items: list[str], most: int = 4) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
