"""rvc_dist with a fault: FAULT=RANK:STEP:KIND makes that rank raise, disappear or sleep before that step.

With KIND nan, the losses of the step are not numbers.

Usage: like `python -m rvc_dist`.
"""

import os
import signal
import sys
import time
from unittest import mock

from rvc_dist.__main__ import main
from rvc_dist.train import trainer

SLEEP_S = 8
rank, at, kind = os.environ["FAULT"].split(":")
healthy = trainer.Trainer.train_step


def faulty(self, batches):
    if self.accelerator.process_index == int(rank) and self.progress.step + 1 == int(at):
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "sleep":
            time.sleep(SLEEP_S)
        elif kind == "nan":
            of_d, of_g = trainer.losses.discriminator_loss, trainer.weighted_sum
            with (
                mock.patch.object(trainer.losses, "discriminator_loss", lambda *a: of_d(*a) * float("nan")),
                mock.patch.object(trainer, "weighted_sum", lambda *a: of_g(*a) * float("nan")),
            ):
                return healthy(self, batches)
        else:
            raise RuntimeError("this rank was made to fail")
    return healthy(self, batches)


trainer.Trainer.train_step = faulty

if __name__ == "__main__":
    sys.exit(main())
