"""`rvc-dist run`: every stage in order, on any number of ranks, skipping what is done."""

from __future__ import annotations

import importlib
import os
from functools import partial
from pathlib import Path

from rvc_dist.config import Recipe
from rvc_dist.report.background import PageMaker
from rvc_dist.workspace import Shard, wait_for

DATA_STAGES = ("data.preprocess", "features.extract", "features.index")


def run(recipe: Recipe, shard: Shard, only_look: bool = False) -> None:
    """preprocess, extract, index, train, export; with `only_look` none of them, and training is elsewhere.

    What `data.remote` holds is made already: then it begins with training.

    Raises:
        StageError: something that a stage needs is missing, before the first of them; and as the stages do.
        Stopped: as training does.
    """
    here = recipe.data.remote is None
    # One of each machine: the others begin, and those that wait for it end with it.
    if here and (shard.is_first or os.environ.get("LOCAL_RANK") == "0"):
        importlib.import_module("rvc_dist.tools.doctor").look_ahead(recipe, shard.is_first, trains_here=not only_look)
    if only_look:
        return
    for name in DATA_STAGES if here else ():
        stage = importlib.import_module(f"rvc_dist.{name}")
        stage.run(recipe, shard)
        wait_for(f"the {name} stage of the other ranks", partial(stage.complete, recipe))
    for name in ("train.trainer", "voice.export"):
        importlib.import_module(f"rvc_dist.{name}").run(recipe, shard)
    PageMaker(Path(recipe.run_dir), shard.is_first and recipe.train.report).finish()  # with the voice in it
