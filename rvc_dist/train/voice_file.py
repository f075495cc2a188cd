"""Voice files as they are written: `.pth` files whose fields the tools of RVC read."""

from __future__ import annotations

import datetime
import errno
import hashlib
import logging
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypedDict

import numpy as np
from safetensors import safe_open
from torch import Tensor

from rvc_dist.choices import VOCODERS
from rvc_dist.config import Recipe
from rvc_dist.data.remote import RemoteRun, data_of
from rvc_dist.features.content import published
from rvc_dist.features.feature_files import SINCE
from rvc_dist.features.identity import EmbedderId
from rvc_dist.files import BESIDE_GLOB, remove_half_written, space
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.state_dict import SPEAKER_TABLE, to_upstream
from rvc_dist.models.torch_file import save_pth
from rvc_dist.schema import Word, within
from rvc_dist.train.checkpoint import SPARE_BYTES, Checkpoint
from rvc_dist.train.dataset import ClipTable
from rvc_dist.workspace import (
    CHECKPOINT_MANIFEST,
    ClipsReport,
    Speakers,
    StageError,
    Workspace,
    read_json,
)

logger = logging.getLogger(__name__)

WEIGHTS = {False: "the raw weights", True: "the average of the weights"}
"""Of a checkpoint that has both, for messages."""
Hz: TypeAlias = Annotated[float, within(0.0, 1e4)]


class Pitched(TypedDict, total=False):
    """Of a speaker or of a whole voice."""

    f0_median: Hz | None
    """Of the voiced frames."""


class SpeakerInfo(Pitched):
    """A speaker, as RVC-WebUI and rvc-next write it; the pitch is ours."""

    id: int
    """The row of the speaker table."""
    name: Word


@dataclass(frozen=True)
class Dataset:
    """What a voice file tells of what the voice was trained on."""

    length: str
    """HH:MM:SS"""
    num_speakers: int
    """The highest id + 1."""
    speakers: Sequence[SpeakerInfo] = ()
    """Those that have names."""
    f0_median: float | None = None
    trained_at: datetime.datetime = field(default_factory=datetime.datetime.now)
    """When the checkpoint was written: exported again, it gives the same bytes."""

    def to_voice(self) -> dict[str, Any]:
        """The fields of a voice file; those that say nothing are left out."""
        told = {"speaker_info": list(self.speakers), "f0_median": self.f0_median}
        always = {"speakers_id": self.num_speakers, "dataset_length": self.length}
        return always | {key: value for key, value in told.items() if value}


@dataclass(frozen=True)
class DatasetFacts:
    """What voice files tell of the dataset that a run has now."""

    work: Workspace
    table: ClipTable
    length: str
    """HH:MM:SS"""

    @classmethod
    def of_run(cls, work: Workspace, table: ClipTable) -> DatasetFacts:
        """Raises StageError when there is no report of the clips."""
        if not work.clips_report_file.is_file():
            raise StageError(f"{work.clips_report_file} is missing:", "run `rvc-dist preprocess` first")
        return cls(work, table, read_json(work.clips_report_file, ClipsReport)["total_dataset_duration"])

    def told_of(self, saved: Checkpoint, path: Path) -> tuple[Checkpoint, Dataset]:
        """The checkpoint in `path` with its speakers, which older versions of rvc_dist left out, and its dataset."""
        if not saved.speakers.trained:
            saved = replace(saved, speakers=Speakers.of(self.work.speakers().info, self.table.trained_speakers))
        medians = self.f0_medians if saved.identity["generator.pitch_guidance"] else {}
        return saved, Dataset(
            length=saved.data.get("dataset_length") or self.length,  # the recordings may be others by now
            num_speakers=self.table.num_speakers,
            speakers=[SpeakerInfo(**info, f0_median=medians.get(info["id"])) for info in saved.speakers.trained_info],
            f0_median=medians.get(None),
            trained_at=written_at(path),
        )

    @cached_property
    def f0_medians(self) -> dict[int | None, float]:
        return f0_medians(self.work)


def f0_medians(work: Workspace) -> dict[int | None, float]:
    """Median pitch in Hz of the voiced frames, by speaker, and of all together under None."""
    if isinstance(work, RemoteRun):  # whose manifest has them: every unit would have to be fetched
        return dict(work.manifest.f0_medians)
    voiced: dict[int | None, list[Any]] = defaultdict(list)
    for _, path, header in work.unit_headers():
        with safe_open(path, framework="numpy") as arrays:
            for i, clip in enumerate(header["clips"]):
                f0 = arrays.get_tensor(f"{i:05d}.f0")
                voiced[clip["speaker"]].append(f0[f0 > 0])
    voiced[None] = [f0 for speaker in list(voiced.values()) for f0 in speaker]
    joined = {speaker: np.concatenate(f0) for speaker, f0 in voiced.items() if f0}
    return {speaker: round(float(np.median(f0)), 2) for speaker, f0 in joined.items() if len(f0)}


def written_at(path: Path) -> datetime.datetime:
    """When the checkpoint in `path` was whole."""
    return datetime.datetime.fromtimestamp((path / CHECKPOINT_MANIFEST).stat().st_mtime)


def voice_file_of(work: Workspace, epoch: int, step: int, whose: str = "") -> Path:
    """Where the voice of a checkpoint lies, of all speakers or of one of them."""
    return work.voice_dir / f"{work.name}{whose}_{epoch}e_{step}s.pth"


class VoiceWriter:
    """Writes a voice file beside every checkpoint (train.save_every_voices): a disk without room costs it alone."""

    def __init__(self, recipe: Recipe, table: ClipTable) -> None:
        self.recipe, self.table = recipe, table
        self.work = Workspace(recipe.run_dir, recipe.name)

    @cached_property
    def facts(self) -> DatasetFacts:
        """Read with the first voice, by the thread that writes it."""
        return DatasetFacts.of_run(data_of(self.recipe), self.table)

    def __call__(self, saved: Checkpoint, path: Path) -> Path | None:
        """The voice file of `saved`, which is whole in `path`; None, with a warning, where it could not be written."""
        folder, file = self.work.voice_dir, voice_file_of(self.work, saved.progress.epoch, saved.progress.step)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_half_written(folder, BESIDE_GLOB)
            voice = voice_dict(self.recipe, *self.facts.told_of(saved, path))
            num_bytes = sum(w.nbytes for w in voice["weight"].values())
            # Not the last room on the disk: without its next checkpoint the run would end.
            if shutil.disk_usage(folder).free < num_bytes + saved.num_bytes + SPARE_BYTES:
                raise OSError(errno.ENOSPC, f"it would leave no room for a checkpoint; {space(folder, num_bytes)}")
            save_pth(file, voice)
        except (OSError, StageError) as error:
            logger.warning("%s is left out (%s); `rvc-dist export` makes it of a checkpoint that is kept", file, error)
            return None
        logger.info("saved %s", file)
        return file


def voice_dict(recipe: Recipe, saved: Checkpoint, dataset: Dataset) -> dict[str, Any]:
    """The contents of a voice file: float16 weights without the posterior encoder, in the old weight-norm spelling.

    Raises:
        StageError: a weight is not a finite number of float16, or there are not the weights that export.weights names.
    """
    progress, (chosen, averaged) = saved.progress, saved.generator(recipe.export.weights)
    generator = to_upstream(chosen)
    weight = halved({k: v for k, v in generator.items() if not k.startswith("enc_q.")}, progress.step)
    trained_with = Workspace(recipe.run_dir, recipe.name).config_file
    try:
        shape = GeneratorShape.from_identity(saved.identity)
        embedder, _ = embedder_of(saved), VOCODERS[shape.vocoder]
        version = saved.identity["discriminator.version"]
    except (KeyError, ValueError) as error:
        raise StageError(f"the checkpoint of step {progress.step} is of no network of ours ({error})") from error
    overtrain_info = "not measured"
    if progress.best_metric is not None:
        best = f"{progress.best_metric:.4f} at step {progress.best_step}, epoch {progress.best_epoch}"
        overtrain_info = f"best validation mel distance {best}"
    return voice_fields(weight, shape, version, embedder, recipe.name, recipe.export.author, dataset) | {
        "epoch": f"{progress.epoch}epoch",
        "step": progress.step,
        "info": f"{recipe.name}: {progress.epoch} epochs, {progress.step} steps of rvc_dist",
        "trained_speakers": list(saved.speakers.trained),
        "unvoiced": saved.identity.get("extract.unvoiced", SINCE["extract.unvoiced"]),
        "overtrain_info": overtrain_info,
        **({"weights": "ema"} if averaged else {}),
        "recipe": trained_with.read_text(encoding="utf-8") if trained_with.is_file() else recipe.to_yaml(),
    }


def voice_fields(
    weight: dict[str, Tensor],
    shape: GeneratorShape,
    version: str,
    embedder: EmbedderId,
    name: str,
    author: str,
    dataset: Dataset,
) -> dict[str, Any]:
    """What a voice file says of its network, whatever made it."""
    return {
        "weight": weight,
        "config": shape.to_export_config(),
        "sr": shape.sample_rate,
        "f0": int(shape.pitch_guidance),
        "version": version,
        "creation_date": dataset.trained_at.isoformat(),
        "model_hash": model_hash(weight),
        "model_name": name,
        "author": author,
        "vocoder": VOCODERS[shape.vocoder].voice_name,
        "energy": shape.energy,
        "architecture": shape.architecture.upper(),
        **embedder.to_voice(),
        **dataset.to_voice(),
    }


def of_speaker(voice: dict[str, Any], speaker: int) -> dict[str, Any]:
    """A voice of `voice_dict` with one of its speakers alone, who answers to every id: most tools ask for 0."""
    table = voice["weight"][SPEAKER_TABLE]
    weight = {**voice["weight"], SPEAKER_TABLE: table[speaker].repeat(len(table), 1)}
    info = [one for one in voice.get("speaker_info", []) if one["id"] == speaker]
    own = {"speaker_info": info, "f0_median": info[0].get("f0_median")} if info else {}
    known = {key: value for key, value in (voice | own).items() if value is not None}
    return known | {"weight": weight, "model_hash": model_hash(weight), "trained_speakers": [speaker]}


def halved(weights: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
    """The weights of the checkpoint of `step` in float16.

    Raises:
        StageError: a weight is not a finite number of float16.
    """
    halves = {k: v.half().contiguous() for k, v in weights.items()}
    if wrong := [k for k, v in halves.items() if not v.isfinite().all()]:
        raise StageError(
            f"the checkpoint of step {step} has weights that are not finite numbers of 16 bits "
            f"({', '.join(wrong[:5])}{', ...' if len(wrong) > 5 else ''}):",
            "remove it, and train on with a lower train.learning_rate or train.max_grad_norm set",
        )
    return halves


def embedder_of(saved: Checkpoint) -> EmbedderId:
    """The content encoder that a checkpoint was trained with, under its published name where it has one."""
    return published(EmbedderId.from_features(saved.identity["embedder"]))


def model_hash(weight: dict[str, Tensor]) -> str:
    """SHA-256 over the names and bytes of the weights."""
    digest = hashlib.sha256()
    for name in sorted(weight):
        digest.update(name.encode())
        digest.update(weight[name].numpy().tobytes())
    return digest.hexdigest()
