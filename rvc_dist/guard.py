"""Ends a rank that hangs: a process beside it, since one that is stopped or waits in a driver cannot end itself.

    python guard.py FILE TOKEN INTERVAL_S

It ends its parent as soon as TOKEN is a line of FILE, and itself with its parent or its input. A rank whose collective
waited too long writes there the tokens of those that it waited for (see `watch.Watch`): they may be on other hosts,
where only their launcher could end them, and it is patient. Of Python's own modules alone, to be small.
"""

import os
import select
import signal
import sys


def main() -> None:
    file, token, interval_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # which launchers and SLURM send to all that a rank started
    parent = os.getppid()
    while not select.select([sys.stdin], [], [], interval_s)[0] and os.getppid() == parent:
        try:
            with open(file, encoding="ascii") as stream:  # anew each time: so NFS looks whether it has changed
                asked = token in stream.read().split()
        except (OSError, ValueError):
            continue
        if asked:
            sys.stderr.write(f"rvc-dist: process {parent} hangs, the other ranks waited in vain: ending it\n")
            sys.stderr.flush()
            os.kill(parent, signal.SIGKILL)
            return


if __name__ == "__main__":
    main()
