"""Processes that end with others: ranks with their launcher, loader processes with their rank, a rank when it hangs.

    python hang_killer.py FILE TOKEN INTERVAL_S PARENT

This process beside a rank ends it as soon as TOKEN is a line of FILE, since one that is stopped or waits in a driver
cannot end itself. A rank whose collective waited too long writes there the tokens of those that it waited for (see
`watchdog.Watch`): they may be on other hosts, where only their launcher could end them, and it is patient. Nobody waits
for the end of a pipe: every process that is forked later would hold its other end. Of Python's own modules alone, to
be small.
"""

import contextlib
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""


def ignore_signals_of_job() -> None:
    """Outlive what launchers and SLURM send to all that a rank started: this process ends with the rank."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def end_with_parent(number: int, parent: int) -> None:
    """Let the kernel send this process the signal `number` when `parent` ends, or now if it has ended; Linux alone."""
    import ctypes

    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def end_with_launcher() -> None:
    """Take the end of torchrun or `accelerate launch` for SIGTERM, from the first line on: nobody else would end us."""
    if not {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        return
    launcher = os.getppid()
    with contextlib.suppress(OSError):
        with open(f"/proc/{launcher}/cmdline", "rb") as stream:
            adopted = launcher == 1 and b"python" not in os.path.basename(stream.read().partition(b"\0")[0])
        launcher = 0 if adopted else launcher  # it ended before we came to this line
    end_with_parent(signal.SIGTERM, launcher)


def main() -> None:
    file, token, interval_s, parent = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    ignore_signals_of_job()
    end_with_parent(signal.SIGKILL, parent)
    asked = False
    while not asked:
        time.sleep(interval_s)
        if os.getppid() != parent:
            return
        # Anew each time: so NFS looks whether it has changed.
        with contextlib.suppress(OSError, ValueError), open(file, encoding="ascii") as stream:
            asked = token in stream.read().split()
    sys.stderr.write(f"rvc-dist: process {parent} hangs, the other ranks waited in vain: ending it\n")
    sys.stderr.flush()
    os.kill(parent, signal.SIGKILL)


if __name__ == "__main__":
    main()
