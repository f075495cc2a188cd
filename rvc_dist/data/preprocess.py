"""The preprocess stage: recordings -> clips at the voice's sample rate, one safetensors file a work unit."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvc_dist.config import Recipe
from rvc_dist.data import audio, decode
from rvc_dist.data.clip_files import (
    SINCE,
    ClipStage,
    account,
    clip_settings,
    complete,
    cut_report,
    imported_clip_settings,
)
from rvc_dist.data.cutting import Outcome, cut_file, entry_of, make_gate, measure, unreadable
from rvc_dist.data.loudness import LoudnessMeter
from rvc_dist.data.sources import check_recordings, content_by, folder_of, list_sources, listing_of
from rvc_dist.files import atomic_write, write_json
from rvc_dist.unit_stage import in_threads
from rvc_dist.workspace import (
    ClipsHeader,
    Shard,
    SourceFile,
    StageError,
    Unit,
    WorkList,
    Workspace,
    changes,
    cut_units,
    listed,
    printable,
    save_arrays,
    unit_files,
    wait_for,
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


def _no_clip(recipe: Recipe, reasons: list[tuple[str, str]]) -> StageError:
    return StageError(
        f"preprocess: none of the {len(reasons)} files in {recipe.data.audio_dir} gave a clip{listed(reasons)}"
    )


def make_work_list(recipe: Recipe, work: Workspace, shard: Shard) -> WorkList:
    """The work list: read when it is current, else made by the first rank (by every array task alike)."""
    audio_dir, settings = Path(recipe.data.audio_dir), clip_settings(recipe)
    work.check_root()
    sources, speakers = list_sources(audio_dir, work)
    listing = listing_of(sources)
    usable = {f.listed for f in sources if not f.reason}

    def current() -> WorkList | None:
        work_list = WorkList.load(work.work_list_file)
        if work_list is None or (work_list.listing, work_list.settings) != (listing, settings):
            return None
        # The folder's recordings and no others, whatever somebody wrote into the list.
        cut = {f.listed for unit in work_list.units for f in unit.files}
        return work_list if cut <= usable <= cut | {f.listed for f in work_list.excluded} else None

    if work_list := current():
        if shard.is_first or shard.array:
            work.save_speakers(speakers)
        return work_list
    if not (shard.is_first or shard.array):
        return wait_for("the work list of rank 0", current)

    old = WorkList.load(work.work_list_file)
    content = content_by(old, audio_dir)
    measure = partial(_measure, audio_dir, content=content)
    num_threads, what = recipe.preprocess.num_workers, "preprocess: content"
    measured = in_threads(num_threads, measure, sources, what, "recordings", lambda file: file.reason)
    if all(f.reason for f in measured):  # before anything of an earlier dataset in this run folder is touched
        raise _no_clip(recipe, [(f.path, f.reason) for f in measured])
    check_recordings(work, measured, lambda f: f.content)
    work.save_speakers(speakers)
    if any(name != str(i) for i, name in speakers.names.items()):
        logger.info("preprocess: speakers %s", ", ".join(map(speakers.label, speakers.names)))
    units = cut_units([part for f in measured if not f.reason for part in f.slices()])
    lufs = common_loudness(recipe, [part for unit in units for part in unit.files])
    work_list = WorkList(listing, settings, units, tuple(f for f in measured if f.reason), lufs)
    if old is not None and (
        why := changes(SINCE | old.made_with, SINCE | work_list.made_with) or _source_changes(old, measured)
    ):
        logger.info("preprocess: making stale clips again: %s", why)
    elif old is not None:
        logger.info("preprocess: the content of the recordings is what it was: what was made of it is kept")
    work.clips_report_file.unlink(missing_ok=True)  # `complete` must not take the old report for this work list's
    atomic_write(work.work_list_file, work_list.dumps())
    return work_list


def common_loudness(recipe: Recipe, parts: Sequence[SourceFile]) -> float | None:
    """What preprocess.normalization lufs brings every clip to, in LUFS; None with another.

    The recipe's loudness, or the most at which no clip of any of `parts` peaks above -1 dB, whichever is less.
    """
    if recipe.preprocess.normalization != "lufs":
        return None
    gate, meter, wanted = make_gate(recipe), LoudnessMeter(recipe.data.sample_rate), recipe.preprocess.loudness
    as_it_is = replace(recipe, preprocess=replace(recipe.preprocess, normalization="none"))

    def most(part: SourceFile) -> tuple[float, str] | None:
        try:
            clips = cut_file(as_it_is, part, gate).clips
        except decode.AudioError:
            return None
        levels = [(meter.most(clip.wave), clip.start_s) for clip in clips]
        return min(((most, f"{part.path} at {at:.1f} s") for most, at in levels if most is not None), default=None)

    levels = in_threads(recipe.preprocess.num_workers, most, parts, "preprocess: loudness", "recordings")
    found = [level for level in levels if level is not None]
    bearable, where = min(found, default=(0.0, ""))
    bearable = math.floor(100 * bearable) / 100
    if wanted is not None and wanted <= bearable:
        logger.info("preprocess: all clips are brought to %.2f LUFS", wanted)
        return wanted
    told = f"preprocess: all clips are brought to {bearable:.2f} LUFS, the most at which none peaks above -1 dB"
    limit = f" ({printable(where)} does there)"
    if wanted is None:
        logger.info("%s%s", told, limit)
    else:
        logger.warning("%s, not to preprocess.loudness %g%s", told, wanted, limit)
    return bearable


def _source_changes(old: WorkList, sources: list[SourceFile]) -> str:
    """What happened to the recordings since `old`, in one line with the first name of each sort; nothing if nothing."""
    before = {f.path: f for f in (*(f for unit in old.units for f in unit.files), *old.excluded)}
    after = {f.path: f for f in sources}
    sorts = {
        "new": sorted(after.keys() - before.keys()),
        "gone": sorted(before.keys() - after.keys()),
        "changed": sorted(p for p in after.keys() & before.keys() if after[p].content != before[p].content),
    }
    told = [f"{len(paths)} {sort} ({printable(paths[0])})" for sort, paths in sorts.items() if paths]
    return f"recordings in data.audio_dir: {', '.join(told)}" if told else ""


def _measure(audio_dir: Path, file: SourceFile, content: Callable[[SourceFile], str]) -> SourceFile:
    """`file` with its length, rate and content, or why it has none."""
    if file.reason:
        return file
    try:
        file = measure(audio_dir, file)
        return replace(file, content=content(file))
    except decode.MissingDecoderError as error:
        raise _missing_decoder(file, error) from error
    except (decode.AudioError, OSError) as error:
        return replace(file, reason=str(error))


def _missing_decoder(file: SourceFile, error: Exception) -> StageError:
    """A recording that may be good is no reason to go on without it: another rank, or the next run, would have it."""
    return StageError(f"preprocess: {printable(file.path)}: {error}; or take it out of the dataset")


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
            if (repeat := folder_of(file.path).repeat) > 1:
                of_file["repeat"] = repeat
            clips += [(of_file | {"start_s": clip.start_s}, clip.wave) for clip in outcome.clips]
            files.append(entry_of(self.recipe, file, outcome))
        save_arrays(self.file(unit), *self.pack(unit, clips, files))

    def _outcome(self, file: SourceFile) -> Outcome:
        try:
            outcome = cut_file(self.recipe, file, self.gate)
        except decode.MissingDecoderError as error:
            raise _missing_decoder(file, error) from error
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
            raise _no_clip(self.recipe, [(f["path"], f["reason"]) for f in files])
        write_json(work.clips_report_file, report | self.clipped(headers))
        made = f"{report['clips']} clips, {report['total_dataset_duration']}"
        left_out = report["files_left_out"]
        logger.info("preprocess: %s, of %d files (%d left out); %s", made, len(files), left_out, work.clips_report_file)
        for warning in warnings:
            logger.warning("preprocess: %s", warning)
        logger.info("preprocess: %s", account(report["seconds_in"], report["lost"]))
