"""The fetch stage: all that a recipe needs of the Hugging Face hub, into its cache, for machines without network.

What the stages load is loaded here in the same way, and thrown away: what then lies in the cache is all there is to it.
"""

from __future__ import annotations

import logging
import os

import torch

from rvc_dist.config import Recipe
from rvc_dist.features.extractor import Extractor, told_as_stage_errors
from rvc_dist.features.f0 import load_f0
from rvc_dist.features.hub import checked
from rvc_dist.train.networks import gathered, read_pretrained
from rvc_dist.workspace import Shard, StageError

logger = logging.getLogger(__name__)


def run(recipe: Recipe, shard: Shard) -> None:
    """Fetch the content encoder, the pitch tracker's weights and the base model, on one rank of each host.

    What is there already is compared with the hub's hashes, and fetched again where it is damaged.

    Raises:
        StageError: some of it is not to be had; all of it is named.
    """
    if not (shard.is_first or os.environ.get("LOCAL_RANK") == "0"):  # hosts may have caches of their own
        return
    from huggingface_hub import constants

    problems: list[StageError] = []
    device = torch.device("cpu")
    with checked() as files:
        with gathered(problems):
            Extractor.load(recipe, with_pitch=False, device=device)
        with gathered(problems), told_as_stage_errors():
            load_f0(recipe.extract, device)
        read_pretrained(recipe, problems)
    for path in files:
        logger.info("fetch: %s, %.1f MB", path, path.stat().st_size / 1e6)
    if problems:
        raise StageError(
            f"{len(problems)} of what the recipe needs cannot be had:", listed="".join(f"\n  {p}" for p in problems)
        )
    size = sum(path.stat().st_size for path in files) / 1e6
    what = f"{len(files)} files, {size:.1f} MB in {constants.HF_HUB_CACHE}"
    logger.info(
        "fetch: all that the recipe needs of the hub is there (%s): HF_HUB_OFFLINE=1 is enough from now on", what
    )
