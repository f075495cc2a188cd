"""The extract stage: clips -> content features and pitch, one safetensors file beside each clips file.

Shapes: S samples, T50 and T100 frames at 50 and 100 a second, C channels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rvc_dist.config import FEATURE_RATE, Recipe
from rvc_dist.data import audio, clip_files
from rvc_dist.data.number_formats import float_wave
from rvc_dist.features.energy import energy_arrays
from rvc_dist.features.extractor import Extractor
from rvc_dist.features.feature_files import (
    SINCE,
    clip_fingerprints,
    complete,
    feature_settings,
    imported_feature_settings,
    mute_done,
    pack_unit,
    read_report,
    write_mute,
    write_report,
)
from rvc_dist.features.precision import check_device
from rvc_dist.runtime.device import compute_exactly, fixed_threads
from rvc_dist.unit_stage import UnitStage, one_ahead
from rvc_dist.workspace import (
    ClipsHeader,
    FeaturesHeader,
    Shard,
    StageError,
    Unit,
    Workspace,
    changes,
    fingerprint,
    is_done,
    save_arrays,
    unit_header,
)

logger = logging.getLogger(__name__)


def run(recipe: Recipe, shard: Shard) -> None:
    """Make this process's features; whoever finishes last writes the report.

    Raises:
        StageError: clips are missing, or the encoder or the pitch tracker cannot be had.
    """
    work = Workspace(recipe.run_dir, recipe.name)
    clips = clip_fingerprints(work)
    clip_files.check_made(recipe, work)
    work.check_name()
    if is_imported(recipe, work, clips):
        logger.info("extract: the features were imported with the clips")  # without a look for the encoder
        return
    device = compute_exactly("extract")
    with fixed_threads(recipe.extract.num_threads):
        try:
            check_device(recipe.extract.precision, device)
            extractor = Extractor.load(recipe)
        except StageError as error:
            if complete(recipe) is None:
                raise
            logger.warning("extract: all features are there, so nothing is looked for that made them (%s)", error)
            return
        stage = Extract(recipe, clips, extractor)
        stage.withdraw_report(shard)
        if shard.is_first:
            work.save_recipe(recipe)
        if shard.is_first or shard.array:
            stage.save_mute()
        stage.make(shard)
    del stage, extractor
    torch.cuda.empty_cache()  # what PyTorch keeps of it for itself, faiss would lack on the same GPU


def is_imported(recipe: Recipe, work: Workspace, clips: dict[Unit, str]) -> bool:
    """Whether the features of all clips came from another tool, and are those that the recipe asks for."""
    report = read_report(work)
    if report is None or report["settings"].get("embedder", {}).get("hash") != "" or not complete(recipe):
        return False
    return all(is_done(work.features_file(u.id), fingerprint(report["settings"], s)) for u, s in clips.items())


class ReadUnit(NamedTuple):
    """The clips of a unit."""

    unit: Unit
    header: ClipsHeader
    lengths: list[int]
    """In samples, at the voice's rate."""
    waves: list[audio.Wave]
    """[S] at 16 kHz."""


class Extract(UnitStage[FeaturesHeader]):
    """Computes the features of `clips`, whose files have these fingerprints."""

    name = "extract"
    folder = "features"
    header = FeaturesHeader

    def __init__(self, recipe: Recipe, clips: dict[Unit, str], extractor: Extractor) -> None:
        super().__init__(recipe, list(clips))
        self.clips, self.extractor = clips, extractor
        self.settings = feature_settings(recipe) | {"embedder": extractor.embedder.describe()}
        self.imported = imported_feature_settings(recipe, extractor.embedder.describe())

    def fingerprints(self, unit: Unit) -> tuple[str, str]:
        """Those of features that were imported as the same encoder's are as good."""
        return fingerprint(self.settings, self.clips[unit]), fingerprint(self.imported, self.clips[unit])

    def withdraw_report(self, shard: Shard) -> None:
        """Remove a report of other features, and say what made them stale.

        While units are being made again the folder holds old and new ones, which nobody may take for a whole.
        """
        before, present = read_report(self.work), fingerprint(list(self.clips.values()))
        if before is None or (before["settings"], before["clips"]) == (self.settings, present):
            return
        if shard.is_first:
            what = changes(SINCE | before["settings"], SINCE | self.settings) or "other clips"
            logger.info("extract: making features again: %s", what)
        self.work.features_report_file.unlink(missing_ok=True)

    def save_mute(self) -> None:
        """Write the features of silence, for the mute clips that teach the voice to be silent."""
        if mute_done(self.recipe, self.work, self.settings):
            return
        chunk_len = self.recipe.preprocess.chunk_len
        ((_, content, f0),) = self.extractor([np.zeros(int(chunk_len * FEATURE_RATE), np.float32)])
        num_samples = int(chunk_len * self.recipe.data.sample_rate)
        write_mute(self.recipe, self.work, self.settings, content, len(f0), num_samples)

    def make_units(self, units: Sequence[Unit]) -> None:
        # The next unit is read and resampled, and the last one written, while this one is computed.
        computed = map(self.compute, one_ahead(self.read, units))
        for num_written, _ in enumerate(one_ahead(lambda made: save_arrays(*made), computed), 1):
            logger.debug("extract: unit %d of %d", num_written, len(units))
        self.extractor.warn_at_edges("extract")

    def read(self, unit: Unit) -> ReadUnit:
        from safetensors import safe_open

        path = self.work.clips_file(unit.id)
        header = unit_header(path, ClipsHeader, "preprocess")
        with safe_open(path, framework="numpy") as file:
            waves = [float_wave(file.get_tensor(f"{i:05d}")) for i in range(len(header["clips"]))]
        resampled = [audio.resample(wave, header["sample_rate"], FEATURE_RATE) for wave in waves]
        return ReadUnit(unit, header, [len(wave) for wave in waves], resampled)

    def compute(self, read: ReadUnit) -> tuple[Path, dict[str, Any], dict[str, Any]]:
        """The features of a unit: their file, arrays and header, as `save_arrays` takes them."""
        features, wanted = self.extractor(read.waves), self.fingerprints(read.unit)[0]
        made_by, form = self.settings["embedder"], self.recipe.extract.content_format
        arrays, header = pack_unit(read.header, read.lengths, features, made_by, wanted, form)
        return self.file(read.unit), arrays | energy_arrays(self.recipe, arrays, read.waves), header

    def report(self, headers: list[FeaturesHeader]) -> None:
        if not mute_done(self.recipe, self.work, self.settings):
            logger.info("extract: this part is done, the silent clip is left to another")
            return
        frames = write_report(self.work, self.settings, self.clips, headers)
        logger.info("extract: %d content frames; %s", frames, self.work.features_report_file)
