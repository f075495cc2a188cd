"""Which recordings a run was trained and validated on: what its checkpoints carry, and what a change of it means."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from rvc_dist.config import Recipe
from rvc_dist.data.remote import data_of
from rvc_dist.data.sources import hashless, named, other_recordings
from rvc_dist.train.dataset import MUTE_SOURCE, ClipTable
from rvc_dist.train.holdout import choice, validated
from rvc_dist.train.progress import Progress
from rvc_dist.train.quality import BEST_BY
from rvc_dist.workspace import fingerprint, read_json

logger = logging.getLogger(__name__)


def of_data(recipe: Recipe, table: ClipTable) -> dict[str, Any]:
    """Plain data: the recordings by their content, fingerprints of both sides of the split, the dataset's length."""
    clips = [c for c in (*table.train, *table.holdout) if c.source != MUTE_SOURCE]
    ends_s: dict[tuple[int, str], float] = {}
    for clip in clips:
        of = (clip.speaker, clip.source)
        ends_s[of] = max(ends_s.get(of, 0.0), clip.start_s + clip.duration_s)
    # What an older version of rvc_dist cut has no hash: then the name and the end of what was cut stand for it.
    recordings = {c.content or f"{c.source} to {ends_s[c.speaker, c.source]:.2f} s": c.source for c in clips}
    report = data_of(recipe).clips_report_file
    return {
        "recordings": recordings,
        "train": fingerprint([(c.source, c.unit, c.key, c.num_frames) for c in table.train]),
        "validation": fingerprint(
            BEST_BY, recipe.train.seed, [(c.source, c.start_s, c.content) for c in validated(recipe, table)]
        ),
        "dataset_length": read_json(report)["total_dataset_duration"] if report.is_file() else "",
        **choice(recipe.data.holdout, recipe.train.seed, table.holdout),
    }


def check(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Say what changed since the checkpoint in `path`.

    Raises:
        StageError: none of its recordings is left.
    """
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
    return replace(progress, batches_done=()) if before and before["train"] != now["train"] else progress
