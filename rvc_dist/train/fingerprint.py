"""Which recordings a run was trained and validated on: what its checkpoints carry, and what a change of it means."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rvc_dist.config import Recipe
from rvc_dist.data.remote import data_of
from rvc_dist.data.sources import hashless, named, other_recordings
from rvc_dist.train import reading
from rvc_dist.train.clips import AT_ONCE, MUTE, ClipList
from rvc_dist.train.dataset import ClipTable
from rvc_dist.train.holdout import choice, validation_stamp
from rvc_dist.train.progress import Progress
from rvc_dist.workspace import fingerprint_of_list, read_json

logger = logging.getLogger(__name__)


def of_data(recipe: Recipe, table: ClipTable) -> dict[str, Any]:
    """Plain data: the recordings by their content, fingerprints of both sides of the split, the dataset's length."""
    train = ClipList.of(table.train)
    clips = train + ClipList.of(table.holdout)
    clips = clips.take(clips.rows["unit"] != MUTE)
    _, of = np.unique(clips.rows[["speaker", "source"]], return_inverse=True)
    ends_s = np.zeros(len(clips))
    np.maximum.at(ends_s, of, clips.rows["start_s"] + clips.rows["duration_s"])
    _, firsts = np.unique(clips.rows[["speaker", "source", "content"]], return_index=True)
    firsts.sort()
    # What an older version of rvc_dist cut has no hash: then the name and the end of what was cut stand for it.
    recordings = {
        c.content or f"{c.source} to {end_s:.2f} s": c.source
        for c, end_s in zip(clips.take(firsts), ends_s[of[firsts]].tolist(), strict=True)
    }
    report = data_of(recipe).clips_report_file
    return {
        "recordings": recordings,
        "train": of_clips(train),
        "validation": validation_stamp(recipe, table),
        "dataset_length": read_json(report)["total_dataset_duration"] if report.is_file() else "",
        **choice(recipe.data.holdout, recipe.train.seed, table.holdout),
    }


def of_clips(clips: ClipList) -> str:
    """Of where they lie and how long they are."""
    parts = (clips[first : first + AT_ONCE] for first in range(0, len(clips), AT_ONCE))
    return fingerprint_of_list([(c.source, c.unit, c.key, c.num_frames) for c in part] for part in parts)


def check(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Say what changed since the checkpoint in `path`.

    Raises:
        StageError: none of its recordings is left.
    """
    if changed := reading.told(before, now):
        logger.warning("since %s: %s; the epoch begins anew", path.name, changed)
    if not before:
        logger.info(
            "%s is from before checkpoints knew their data; it goes on with the present recordings and a new best", path
        )
        return
    old, new = before["recordings"], now["recordings"]
    if not (old.keys() & new.keys() or hashless(old) & {*new.values()}):
        raise other_recordings(path, old, new)
    changes = {
        "new": {k: v for k, v in new.items() if k not in old},
        "gone": {k: v for k, v in old.items() if k not in new},
    }
    told = [f"{named(recordings)} {what}" for what, recordings in changes.items() if recordings]
    if told or before["train"] != now["train"]:
        logger.warning(
            "the data changed since %s: %s; the epoch begins anew", path.name, ", ".join(told) or "other clips of it"
        )
    if before["validation"] != now["validation"]:
        logger.warning(
            "validation has other clips, another seed or another measure since %s: the best begins anew", path.name
        )


def adjusted(progress: Progress, before: dict[str, Any], now: dict[str, Any]) -> Progress:
    """Where training goes on with the data of `now`: places in an epoch and metrics mean nothing on other clips."""
    if before.get("validation") != now["validation"]:
        progress = replace(progress, best_metric=None, best_step=0, best_epoch=0)
    is_same = before.get("train", now["train"]) == now["train"] and not reading.told(before, now)
    return progress if is_same else replace(progress, batches_done=())
