"""The export stage: checkpoints -> voice files that the tools of RVC read."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from rvc_dist.config import Recipe
from rvc_dist.files import atomic_write
from rvc_dist.train import checkpoint
from rvc_dist.train.dataset import ClipTable
from rvc_dist.voice.file import Dataset, SpeakerInfo, voice_dict, write_voice
from rvc_dist.workspace import ClipsReport, Shard, Speakers, StageError, Workspace, read_json

logger = logging.getLogger(__name__)


def run(recipe: Recipe, shard: Shard) -> None:
    """Write NAME_{epoch}e_{step}s.pth for every checkpoint, NAME_last.pth and, when there is one, NAME_best.pth.

    Raises:
        StageError: there is no checkpoint, it is damaged or has weights that are not finite, or the run folder lacks
            what the voice files tell of its dataset.
    """
    if not shard.is_first:
        return
    work = Workspace(recipe.run_dir, recipe.name)
    work.check_name()
    if not checkpoint.list_checkpoints(work.checkpoints_dir):
        raise StageError(f"{work.checkpoints_dir} has no checkpoint:", "run `rvc-dist train` first")
    if not work.clips_report_file.is_file():
        raise StageError(f"{work.clips_report_file} is missing:", "run `rvc-dist preprocess` first")
    dataset_length = read_json(work.clips_report_file, ClipsReport)["total_dataset_duration"]
    table = ClipTable.load(recipe)
    files: dict[int, Path] = {}
    for path in checkpoint.whole_in(work.checkpoints_dir):
        saved = checkpoint.load(path)
        if not saved.speakers.trained:
            saved = replace(saved, speakers=Speakers.of(work.speakers().info, table.trained_speakers))
        trained_length = saved.data.get("dataset_length") or dataset_length  # the recordings may be others by now
        speakers = [SpeakerInfo(id=s["id"], name=s["name"]) for s in saved.speakers.trained_info]
        voice = voice_dict(recipe, saved, Dataset(trained_length, table.num_speakers, speakers))
        step, epoch = saved.progress.step, saved.progress.epoch
        files[step] = work.voice_dir / f"{recipe.name}_{epoch}e_{step}s.pth"
        write_voice(files[step], voice)
        logger.info("export: %s", files[step])
    atomic_write(work.last_voice_file, files[step].read_bytes())
    progress, best_file = saved.progress, work.voice_dir / f"{recipe.name}_best.pth"
    if progress.best_step in files and progress.best_metric is not None:
        atomic_write(best_file, files[progress.best_step].read_bytes())
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
