"""The export stage: checkpoints -> voice files that the tools of RVC read, and whatever else they take a run in."""

from __future__ import annotations

import contextlib
import datetime
import logging
import secrets
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from rvc_dist.choices import Maker, resolve
from rvc_dist.config import Recipe
from rvc_dist.files import atomic_write
from rvc_dist.train import checkpoint
from rvc_dist.train.dataset import ClipTable
from rvc_dist.voice.file import Dataset, SpeakerInfo, of_speaker, voice_dict, write_voice
from rvc_dist.workspace import (
    CHECKPOINT_MANIFEST,
    ClipsReport,
    FeaturesHeader,
    Shard,
    Speakers,
    StageError,
    Workspace,
    read_json,
    unit_files,
    unit_header,
)

logger = logging.getLogger(__name__)

WRITERS: dict[str, Maker] = {
    "pretrained": "rvc_dist.voice.layouts:write_base_models",
    "applio": "rvc_dist.voice.layouts:write_experiment",
    "rvc": "rvc_dist.voice.layouts:write_experiment",
}
"""By export.format: of (recipe, checkpoint, dataset, a new folder, where that folder will be) they write the folder."""


def run(recipe: Recipe, shard: Shard) -> None:
    """Write what export.format says.

    Raises:
        StageError: there is no checkpoint, it is damaged or has weights that are not finite, the run folder lacks what
            is told of its dataset, or export.folder is taken.
    """
    if not shard.is_first:
        return
    trained = Trained.of(recipe)
    if recipe.export.format == "voice":
        write_voices(trained)
        return
    target = Path(recipe.export.folder or trained.work.root / "export" / recipe.export.format)
    writer: Callable[..., None] = resolve(WRITERS[recipe.export.format])
    with new_folder(target) as half:
        writer(recipe, *trained.load(trained.checkpoints[-1]), half, target.absolute())
    logger.info("export: %s", target)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when all is written, or is removed.

    Raises:
        StageError: `target` is there already.
    """
    if target.exists():
        raise StageError(f"export.folder: {target} is there already;", "remove it, or give another --export.folder")
    half = target.with_name(f".{secrets.token_hex(8)}.tmp")
    half.mkdir(parents=True)
    try:
        yield half
        half.rename(target)
    finally:
        shutil.rmtree(half, ignore_errors=True)


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


def write_voices(trained: Trained) -> None:
    """Write NAME_{epoch}e_{step}s.pth for every checkpoint, NAME_last.pth and, when there is one, NAME_best.pth.

    With export.each_speaker, NAME_spkid3_last.pth and so on beside them.
    """
    recipe, work = trained.recipe, trained.work
    files: dict[int, dict[str, Path]] = {}
    for path in trained.checkpoints:
        saved, dataset = trained.load(path)
        whole, progress = voice_dict(recipe, saved, dataset), saved.progress
        voices = {recipe.name: whole}
        if recipe.export.each_speaker:
            voices |= {f"{recipe.name}_spkid{i}": of_speaker(whole, i) for i in saved.speakers.trained}
        files[progress.step] = {}
        for name, voice in voices.items():
            file = files[progress.step][name] = work.voice_dir / f"{name}_{progress.epoch}e_{progress.step}s.pth"
            write_voice(file, voice)
            logger.info("export: %s", file)
    copy_as("last", files[progress.step])
    best_file = work.voice_dir / f"{recipe.name}_best.pth"
    if progress.best_step in files and progress.best_metric is not None:
        copy_as("best", files[progress.best_step])
        why = f"its mel distance on the held-out clips, {progress.best_metric:.4f}, is the lowest that was measured"
        logger.info("export: %s is of step %d, epoch %d: %s", best_file, progress.best_step, progress.best_epoch, why)
        return
    why = (
        "no checkpoint was validated on held-out clips yet (data.holdout, train.eval_every_steps)"
        if progress.best_metric is None
        else f"the checkpoint of step {progress.best_step}, the best, is gone"
    )
    before = (
        "the one that is there is of an earlier export" if best_file.exists() else f"no {best_file.name} is written"
    )
    logger.warning("export: %s: %s", before, why)


def copy_as(word: str, files: dict[str, Path]) -> None:
    """Copy the voice files of a checkpoint, by NAME, to NAME_{word}.pth."""
    for name, file in files.items():
        atomic_write(file.with_name(f"{name}_{word}.pth"), file.read_bytes())
