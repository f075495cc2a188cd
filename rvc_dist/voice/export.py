"""The export stage: checkpoints -> voice files that the tools of RVC read."""

from __future__ import annotations

import datetime
import hashlib
import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rvc_dist.choices import VOCODERS
from rvc_dist.config import Recipe
from rvc_dist.features.identity import EmbedderId
from rvc_dist.files import atomic_write
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.state_dict import to_upstream
from rvc_dist.schema import check
from rvc_dist.train import checkpoint
from rvc_dist.train.dataset import ClipTable
from rvc_dist.workspace import ClipsReport, Shard, StageError, Workspace, read_json

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
        saved = replace(saved, trained_speakers=saved.trained_speakers or table.trained_speakers)
        trained_length = saved.data.get("dataset_length") or dataset_length  # the recordings may be others by now
        voice = voice_dict(recipe, saved, trained_length, table.num_speakers)
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


def voice_dict(recipe: Recipe, saved: checkpoint.Checkpoint, dataset_length: str, num_speakers: int) -> dict[str, Any]:
    """The contents of a voice file: float16 weights without the posterior encoder, in the old weight-norm spelling.

    Raises:
        StageError: a weight is not a finite number of float16.
    """
    weight = {
        k: v.half().contiguous()
        for k, v in to_upstream(saved.models["generator"]).items()
        if not k.startswith("enc_q.")
    }
    progress = saved.progress
    wrong = [k for k, v in weight.items() if not v.isfinite().all()]
    if wrong:
        raise StageError(
            f"the checkpoint of step {progress.step} has weights that are not finite numbers of 16 bits "
            f"({', '.join(wrong[:5])}{', ...' if len(wrong) > 5 else ''}):",
            "remove it, and train on with a lower train.learning_rate or train.max_grad_norm set",
        )
    trained_with = Workspace(recipe.run_dir, recipe.name).config_file
    try:
        shape, version = _shape(saved.identity), saved.identity["discriminator.version"]
        embedder, vocoder = EmbedderId.from_features(saved.identity["embedder"]), VOCODERS[shape.vocoder]
    except (KeyError, ValueError) as error:
        raise StageError(f"the checkpoint of step {progress.step} is of no network of ours ({error})") from error
    overtrain_info = (
        f"best validation mel distance {progress.best_metric:.4f} at step {progress.best_step}, "
        f"epoch {progress.best_epoch}"
        if progress.best_metric is not None
        else "not measured"
    )
    return {
        "weight": weight,
        "config": shape.to_export_config(),
        "epoch": f"{progress.epoch}epoch",
        "step": progress.step,
        "sr": shape.sample_rate,
        "f0": int(shape.pitch_guidance),
        "version": version,
        "info": f"{recipe.name}: {progress.epoch} epochs, {progress.step} steps of rvc_dist",
        "creation_date": datetime.datetime.now().isoformat(),
        "model_hash": model_hash(weight),
        "model_name": recipe.name,
        "author": recipe.export.author,
        "vocoder": vocoder.voice_name,
        "energy": False,
        "speakers_id": num_speakers,
        "trained_speakers": list(saved.trained_speakers),
        "architecture": "RVC",
        **embedder.to_voice(),
        "dataset_length": dataset_length,
        "overtrain_info": overtrain_info,
        "recipe": trained_with.read_text(encoding="utf-8") if trained_with.is_file() else recipe.to_yaml(),
    }


def _shape(identity: dict[str, Any]) -> GeneratorShape:
    fields = {k.removeprefix("generator."): v for k, v in identity.items() if k.startswith("generator.")}
    check(fields, GeneratorShape)
    return GeneratorShape(**fields)


def model_hash(weight: dict[str, Tensor]) -> str:
    """SHA-256 over the names and bytes of the weights."""
    digest = hashlib.sha256()
    for name in sorted(weight):
        digest.update(name.encode())
        digest.update(weight[name].numpy().tobytes())
    return digest.hexdigest()


def write_voice(path: Path, voice: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(voice, buffer)
    atomic_write(path, buffer.getvalue())
