"""The preprocess stage: recordings -> clips at the voice's sample rate, one safetensors file a work unit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rvc_dist.config import Recipe
from rvc_dist.data import audio, decode
from rvc_dist.data.clip_files import (
    SINCE,
    ClipStage,
    account,
    complete,
    cut_report,
    imported_clip_settings,
)
from rvc_dist.data.cutting import Outcome, cut_file, entry_of, make_gate, unreadable
from rvc_dist.data.loudness import LoudnessMeter
from rvc_dist.data.work_list import make_work_list, missing_decoder, nothing_usable
from rvc_dist.files import write_json
from rvc_dist.workspace import (
    ClipsHeader,
    Shard,
    SourceFile,
    StageError,
    Unit,
    WorkList,
    Workspace,
    changes,
    save_arrays,
    unit_files,
)

if TYPE_CHECKING:
    from rvc_dist.data.denoise import NoiseGate

logger = logging.getLogger(__name__)


def run(recipe: Recipe, shard: Shard) -> None:
    """Make this process's clips; whoever finishes last writes the report.

    Raises:
        StageError: the dataset is missing, is no folder, holds no audio, or gave no clip at all.
    """
    work = Workspace(recipe.run_dir, recipe.name)
    if is_imported(recipe, work):
        logger.info("preprocess: the clips were imported from %s", recipe.data.audio_dir)
        return
    work_list = make_work_list(recipe, work, shard)
    if shard.is_first:
        save_recipe(recipe, work)
    Preprocess(recipe, work_list).make(shard)


def is_imported(recipe: Recipe, work: Workspace) -> bool:
    """Whether the run's clips are those of the experiment that the recipe names; nothing is cut then.

    Raises:
        StageError: they are of another experiment, or the import has not come to its end: imported clips are never
            replaced, since what they were cut from may be gone.
    """
    work_list = WorkList.load(work.work_list_file)
    if work_list is None or work_list.imported_from is None:
        return False
    wanted = imported_clip_settings(recipe)
    if work_list.settings != wanted:
        differ = changes(SINCE | work_list.settings, SINCE | wanted)
        raise StageError(
            f"{work.clips_dir} holds imported clips, which other recordings do not replace:",
            f"give this recipe another run_dir, or set back what differs ({differ})",
        )
    if complete(recipe) is None:
        raise StageError(f"{work.clips_dir} is half an import:", f"run `rvc-dist import {recipe.data.audio_dir}` again")
    return True


def save_recipe(recipe: Recipe, work: Workspace) -> None:
    """Keep the recipe with the run; of features that are there already, what they were made with."""
    if work.features_report_file.is_file() and (kept := work.kept_recipe()) is not None:
        recipe = replace(recipe, extract=kept.extract, model=kept.model)
    work.save_recipe(recipe, reads_recordings=True)


class Preprocess(ClipStage):
    """Cuts the recordings."""

    name = "preprocess"
    gate: NoiseGate | None = None
    meter: LoudnessMeter | None = None

    def make_units(self, units: Sequence[Unit]) -> None:
        if units:
            self.gate = make_gate(self.recipe)
            if self.work_list.lufs is not None:
                self.meter = LoudnessMeter(self.recipe.data.sample_rate)
        super().make_units(units)

    def make_unit(self, unit: Unit) -> None:
        clips: list[tuple[dict[str, Any], audio.Wave]] = []
        files: list[dict[str, Any]] = []
        for file in unit.files:
            outcome = self._outcome(file)
            of_file = {"speaker": file.speaker, "source": file.path, "slice_s": file.start_s, "content": file.content}
            if file.repeat > 1:
                of_file["repeat"] = file.repeat
            clips += [(of_file | {"start_s": clip.start_s}, clip.wave) for clip in outcome.clips]
            files.append(entry_of(self.recipe, file, outcome))
        save_arrays(self.file(unit), *self.pack(unit, clips, files))

    def _outcome(self, file: SourceFile) -> Outcome:
        try:
            outcome = cut_file(self.recipe, file, self.gate)
        except decode.MissingDecoderError as error:
            raise missing_decoder(file, error) from error
        except decode.AudioError as error:
            return unreadable(file, error)
        if self.meter is None or (lufs := self.work_list.lufs) is None:
            return outcome
        levelled = [clip._replace(wave=self.meter.levelled(clip.wave, lufs)) for clip in outcome.clips]
        return outcome._replace(clips=levelled)

    def report(self, headers: list[ClipsHeader]) -> None:
        files, work = self.recordings(headers), self.work
        report, warnings = cut_report(self.recipe, files)
        if self.work_list.lufs is not None:
            report["loudness_lufs"] = self.work_list.lufs
        if not report["clips"]:
            # The report and the work list too: nothing may look like a finished stage.
            for path in [*unit_files(work.clips_dir), work.clips_report_file, work.work_list_file]:
                path.unlink(missing_ok=True)
            raise nothing_usable(self.recipe, [(f["path"], f["reason"]) for f in files])
        write_json(work.clips_report_file, report | self.clipped(headers))
        made = f"{report['clips']} clips, {report['total_dataset_duration']}"
        left_out = report["files_left_out"]
        logger.info("preprocess: %s, of %d files (%d left out); %s", made, len(files), left_out, work.clips_report_file)
        for warning in warnings:
            logger.warning("preprocess: %s", warning)
        logger.info("preprocess: %s", account(report["seconds_in"], report["lost"]))
