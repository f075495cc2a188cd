"""rvc_dist that notes what each step trains on: SEEN/PORT_RANK.jsonl, whose port is that of one meeting of the ranks.

Its first line is written when the process starts, then one follows a step. SEEN/pace holds the seconds that a step is
to take longer than it does.

Usage: like `python -m rvc_dist`.
"""

import json
import os
import sys
import time
from pathlib import Path

import psutil

from rvc_dist.__main__ import main
from rvc_dist.train import trainer

folder = Path(os.environ["SEEN"])
rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
healthy = trainer.Trainer.train_step


def note(**values):
    with (folder / f"{os.environ['MASTER_PORT']}_{rank}.jsonl").open("a") as stream:
        stream.write(json.dumps({"at": time.time(), "rank": rank, "ranks": num_ranks} | values) + "\n")


def noted(self, batches):
    time.sleep(float((folder / "pace").read_text()))
    healthy(self, batches)
    clips = [clip for batch in batches if batch.loss_scale > 0 for clip in batch.clips]
    note(step=self.progress.step + 1, epoch=self.progress.epoch, clips=clips)


trainer.Trainer.train_step = noted

if __name__ == "__main__":
    note(began_at=psutil.Process().create_time())
    sys.exit(main())
