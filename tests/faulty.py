"""rvc_dist with a fault: FAULT=RANK:STEP:KIND makes that rank raise, or disappear, before that step.

Usage: like `python -m rvc_dist`.
"""

import os
import signal
import sys

from rvc_dist import trainer
from rvc_dist.__main__ import main

rank, at, kind = os.environ["FAULT"].split(":")
healthy = trainer.Trainer.train_step


def faulty(self, batches):
    if self.accelerator.process_index == int(rank) and self.progress.step + 1 == int(at):
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("this rank was made to fail")
    healthy(self, batches)


trainer.Trainer.train_step = faulty

if __name__ == "__main__":
    sys.exit(main())
