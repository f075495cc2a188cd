"""The export stage: checkpoints -> voice files that the tools of RVC read, and whatever else they take a run in."""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rvc_dist.choices import Maker, resolve
from rvc_dist.config import Recipe
from rvc_dist.files import ForeignFileError, atomic_write
from rvc_dist.models.torch_file import load_pth, save_pth
from rvc_dist.screen import counted
from rvc_dist.train import checkpoint
from rvc_dist.train.voice_file import WEIGHTS, of_speaker, voice_dict, voice_file_of, written_at
from rvc_dist.voice.trained import Trained
from rvc_dist.workspace import Shard, StageError

logger = logging.getLogger(__name__)

WRITERS: dict[str, Maker] = {
    "pretrained": "rvc_dist.voice.layouts:write_base_models",
    "hub": "rvc_dist.voice.hub:write_folder",
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


def write_voices(trained: Trained) -> None:
    """Write NAME_{epoch}e_{step}s.pth for every checkpoint, NAME_last.pth and, when there is one, NAME_best.pth.

    With export.each_speaker, NAME_spkid3_last.pth and so on beside them.
    """
    recipe, work = trained.recipe, trained.work
    files: dict[int, list[Path]] = {}
    for path in counted(trained.checkpoints, "export", "checkpoints"):
        progress = checkpoint.progress_of(path)
        file = voice_file_of(work, progress.epoch, progress.step)
        has_both = checkpoint.has_average(path)
        averaged = checkpoint.is_averaged(recipe.export.weights, has_both, progress)
        if (whole := made_before(file, path, recipe.export.author, averaged)) is not None:
            logger.info("export: %s was written beside the checkpoint", file)
        else:
            whole = voice_dict(recipe, *trained.load(path))
            save_pth(file, whole)
            logger.info("export: %s%s", file, f" ({WEIGHTS[averaged]})" if has_both else "")
        files[progress.step] = [file]
        for speaker in whole["trained_speakers"] if recipe.export.each_speaker else ():
            file = voice_file_of(work, progress.epoch, progress.step, f"_spkid{speaker}")
            save_pth(file, of_speaker(whole, speaker))
            files[progress.step].append(file)
            logger.info("export: %s", file)
    copy_as("last", files[progress.step])
    best_file = work.voice_dir / f"{recipe.name}_best.pth"
    of_best = files.get(progress.best_step) or [voice_file_of(work, progress.best_epoch, progress.best_step)]
    if progress.best_metric is not None and of_best[0].is_file():
        copy_as("best", of_best)
        why = f"its mel distance on the held-out clips, {progress.best_metric:.4f}, is the lowest that was measured"
        logger.info("export: %s is of step %d, epoch %d: %s", best_file, progress.best_step, progress.best_epoch, why)
        return
    why = (
        "no checkpoint was validated on held-out clips yet (data.holdout, train.eval_every_steps)"
        if progress.best_metric is None
        else f"the checkpoint of step {progress.best_step}, the best, is gone, and so is its voice file"
    )
    before = (
        "the one that is there is of an earlier export" if best_file.exists() else f"no {best_file.name} is written"
    )
    logger.warning("export: %s: %s", before, why)


def made_before(file: Path, path: Path, author: str, averaged: bool = False) -> dict[str, Any] | None:
    """The voice in `file`, if training wrote it beside the checkpoint in `path`, or an export did, of these weights."""
    with contextlib.suppress(FileNotFoundError, ForeignFileError):
        voice = load_pth(file)
        made_of = voice["creation_date"], voice["author"], voice.get("weights") == "ema"
        if made_of == (written_at(path).isoformat(), author, averaged):
            return dict(voice)
    return None


def copy_as(word: str, files: Iterable[Path]) -> None:
    """Copy the voice files of a checkpoint, NAME_2e_10s.pth, to NAME_{word}.pth."""
    for file in files:
        name = file.stem.rsplit("_", 2)[0]
        atomic_write(file.with_name(f"{name}_{word}.pth"), file.read_bytes())
