"""A run that was trained, and what is told of it wherever it goes."""

from __future__ import annotations

import datetime
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from rvc_dist.config import Recipe
from rvc_dist.train import checkpoint
from rvc_dist.train.dataset import ClipTable
from rvc_dist.voice.file import Dataset, SpeakerInfo
from rvc_dist.workspace import (
    CHECKPOINT_MANIFEST,
    ClipsReport,
    FeaturesHeader,
    Speakers,
    StageError,
    Workspace,
    read_json,
    unit_files,
    unit_header,
)


@dataclass(frozen=True)
class Trained:
    """A run that was trained, for what is written of it."""

    recipe: Recipe
    work: Workspace
    checkpoints: list[Path]
    """Those that are whole, oldest first; at least one."""
    length: str
    """Of the dataset that is there now, HH:MM:SS."""
    table: ClipTable

    @classmethod
    def of(cls, recipe: Recipe) -> Trained:
        """Raises StageError when there is no whole checkpoint, or no report of the clips."""
        work = Workspace(recipe.run_dir, recipe.name)
        work.check_name()
        if not checkpoint.list_checkpoints(work.checkpoints_dir):
            raise StageError(f"{work.checkpoints_dir} has no checkpoint:", "run `rvc-dist train` first")
        if not work.clips_report_file.is_file():
            raise StageError(f"{work.clips_report_file} is missing:", "run `rvc-dist preprocess` first")
        length = read_json(work.clips_report_file, ClipsReport)["total_dataset_duration"]
        table = ClipTable.load(recipe)
        return cls(recipe, work, checkpoint.whole_in(work.checkpoints_dir), length, table)

    def load(self, path: Path) -> tuple[checkpoint.Checkpoint, Dataset]:
        """A checkpoint, and what it was trained on."""
        saved = checkpoint.load(path)
        if not saved.speakers.trained:
            saved = replace(saved, speakers=Speakers.of(self.work.speakers().info, self.table.trained_speakers))
        medians = self.f0_medians if saved.identity["generator.pitch_guidance"] else {}
        trained_at = datetime.datetime.fromtimestamp((path / CHECKPOINT_MANIFEST).stat().st_mtime)
        dataset = Dataset(
            length=saved.data.get("dataset_length") or self.length,  # the recordings may be others by now
            num_speakers=self.table.num_speakers,
            speakers=[SpeakerInfo(**info, f0_median=medians.get(info["id"])) for info in saved.speakers.trained_info],
            f0_median=medians.get(None),
            trained_at=trained_at,
        )
        return saved, dataset

    @cached_property
    def f0_medians(self) -> dict[int | None, float]:
        """Median pitch in Hz of the voiced frames, by speaker, and of all together under None."""
        voiced: dict[int | None, list[Any]] = defaultdict(list)
        for path in unit_files(self.work.features_dir):
            header = unit_header(path, FeaturesHeader, "extract")
            with safe_open(path, framework="numpy") as arrays:
                for i, clip in enumerate(header["clips"]):
                    f0 = arrays.get_tensor(f"{i:05d}.f0")
                    voiced[clip["speaker"]].append(f0[f0 > 0])
        voiced[None] = [f0 for speaker in list(voiced.values()) for f0 in speaker]
        joined = {speaker: np.concatenate(f0) for speaker, f0 in voiced.items() if f0}
        return {speaker: round(float(np.median(f0)), 2) for speaker, f0 in joined.items() if len(f0)}
