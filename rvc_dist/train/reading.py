"""In which order a run reads its clips: shuffled, or where they exceed the memory unit by unit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from rvc_dist.config import Recipe
from rvc_dist.train import memory
from rvc_dist.train.clips import ClipList
from rvc_dist.train.dataset import ClipTable, bytes_per_s
from rvc_dist.train.sampler import Sampling

logger = logging.getLogger(__name__)

KEPT_SHARE = 0.5
"""Of the memory, what clips and features may take that are read in any order: the rest is for ranks and others."""
WINDOW_SHARE = 0.25
"""Of the memory, a window: while one is read, those before and after it may be there too."""
PLACE = tuple(field.name for field in fields(Sampling))
"""What a checkpoint's data keeps of it, where that is not the default."""


def room(recipe: Recipe) -> int:
    """Bytes of clips and features that this node can keep at hand: in its memory, or its cache of object storage."""
    return memory.host_memory() if recipe.data.remote is None else round(recipe.data.cache_gb * 1e9)


def choose(
    recipe: Recipe, table: ClipTable, accelerator: Accelerator, before: Mapping[str, Any], now: Mapping[str, Any]
) -> Sampling:
    """What the recipe asks for; what it leaves open is as in the run's checkpoint, if that has the same clips.

    Else the least room of all nodes decides; every rank has to ask.

    Args:
        before: what the checkpoint says of its data; empty where there is none.
        now: `fingerprint.of_data`.
    """
    data, window_gb, window = recipe.data, recipe.data.window_gb, 0
    a_frame = bytes_per_s(recipe, table.content_channels) * recipe.rate_spec.hop / data.sample_rate
    known = before.get("window_frames", 0) if before.get("train") == now.get("train") else None
    if data.read_order == "local" or (data.read_order == "auto" and known != 0):
        window = known or _window(recipe, table, accelerator, a_frame)
        if window and window_gb is not None:
            window = max(1, round(window_gb * 1e9 / a_frame))
    if window:
        size = f"units are shuffled, and clips within about {window * a_frame / 1e9:.3g} GB of them"
        logger.info(f"data.read_order {data.read_order}: {size}")
    return Sampling(data.balance, window)


def _window(recipe: Recipe, table: ClipTable, accelerator: Accelerator, a_frame: float) -> int:
    """Frames of a window, 0 where none is needed, by the least room of all nodes."""
    least = int(min(gather_object([room(recipe)])))
    needed = a_frame * int(ClipList.of(table.train).rows["num_frames"].sum())
    if recipe.data.read_order == "auto":
        if needed <= KEPT_SHARE * least:
            return 0
        logger.info(
            f"clips and features take about {needed / 1e9:.1f} GB, a node can keep {least / 1e9:.1f} GB at hand"
        )
    return max(1, round(WINDOW_SHARE * least / a_frame))


def told(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What of it differs from a checkpoint's, in words."""
    (balance, balance_now), (window, window_now) = ([d.get(k, 0) for d in (before, now)] for k in PLACE)
    changed = [f"data.balance {balance:g} -> {balance_now:g}"] * (balance != balance_now)
    changed += [f"read order {_order(window)} -> {_order(window_now)}"] * (window != window_now)
    return ", ".join(changed)


def _order(window_frames: int) -> str:
    return f"local (windows of {window_frames} frames)" if window_frames else "shuffled"
