"""Imported by ranks: they note what each step trains on, in SEEN/PORT_RANK.jsonl; the port is that of one meeting.

The first line is written when the rank begins, then one precedes each step, since a rank may die when others have made
use of its clips, and one follows it. SEEN/pace holds the seconds that a step is to take longer than it does.
"""

import json
import os
import time
from pathlib import Path

from rvc_dist.train import trainer

healthy_step, healthy_run = trainer.Trainer.train_step, trainer.run


def note(**values):
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with (Path(os.environ["SEEN"]) / f"{os.environ['MASTER_PORT']}_{rank}.jsonl").open("a") as stream:
        stream.write(json.dumps({"at": time.time(), "rank": rank, "ranks": num_ranks} | values) + "\n")


def run(*words):
    note(began_at=time.time())
    healthy_run(*words)


def train_step(self, batches):
    time.sleep(float((Path(os.environ["SEEN"]) / "pace").read_text()))
    step, clips = self.progress.step + 1, [clip for batch in batches if batch.loss_scale > 0 for clip in batch.clips]
    note(begun=step, epoch=self.progress.epoch, clips=clips)
    healthy_step(self, batches)
    note(step=step)


trainer.Trainer.train_step, trainer.run = train_step, run
