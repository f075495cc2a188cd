"""Run by a launcher: trains every FOLDER/*.yaml to its end, one after the other, on the ranks it finds.

Usage: frozen_on_ranks.py FOLDER
"""

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from helpers import one_layer_of_each

from rvc_dist.config import load_recipe
from rvc_dist.train import trainer
from rvc_dist.workspace import Shard


def train_all(folder: Path) -> None:
    for file in sorted(folder.glob("*.yaml")):
        AcceleratorState._reset_state()
        trainer.run(load_recipe(file), Shard())


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_layer_of_each(setattr)
    train_all(Path(sys.argv[1]))
