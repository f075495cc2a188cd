"""Run by a launcher: `rvc-dist doctor --config RECIPE`, on ranks of which the last may be made to differ.

Usage: doctor_on_ranks.py RECIPE [RUN_DIR_OF_THE_LAST]
With RUN_DIR_OF_THE_LAST the last rank has that run folder, and another version of numpy.
"""

import os
import sys
import time

from rvc_dist.__main__ import main
from rvc_dist.tools.doctor import disk, machine

MOST_S = 15.0
"""Of a core, in a process whose imports were done before."""


def run() -> int:
    disk.MAX_FSYNC_S = 3600.0  # the disk of a busy test machine may be slow
    arguments = ["doctor", "--config", sys.argv[1]]
    if len(sys.argv) > 2 and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        arguments += ["--run_dir", sys.argv[2]]
        real = machine.installed
        machine.installed = lambda package: "1.0" if package == "numpy" else real(package)
    code = main(arguments)
    assert time.process_time() < MOST_S, "a check before each run has to be quick"
    return code


if __name__ == "__main__":
    sys.exit(run())
