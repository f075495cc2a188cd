"""The preprocess stage: recordings -> clips at the voice's sample rate, one safetensors file a work unit."""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rvc_dist.config import MAX_CLIP_FRAMES, Recipe
from rvc_dist.data import audio, decode
from rvc_dist.data.clip_files import (
    ClipStage,
    account,
    clip_settings,
    clips_report,
    complete,
    file_entry,
    imported_clip_settings,
    low_rates,
    pieces,
    upsampled_recordings,
)
from rvc_dist.data.loudness import LoudnessMeter
from rvc_dist.data.sources import check_recordings, content_by, folder_of, list_sources
from rvc_dist.files import atomic_write, write_json
from rvc_dist.unit_stage import in_threads
from rvc_dist.workspace import (
    MAX_SLICE_S,
    ClipsHeader,
    Shard,
    SourceFile,
    StageError,
    Unit,
    WorkList,
    Workspace,
    changes,
    cut_units,
    fingerprint,
    listed,
    printable,
    save_arrays,
    unit_files,
    wait_for,
)

if TYPE_CHECKING:
    from rvc_dist.data.denoise import NoiseGate

logger = logging.getLogger(__name__)

CLIPPED_LEVEL, CLIPPED_SHARE = 0.999, 1e-3
"""Neighbours that both reach this level are clipped; a recording with more than this share of them is called so."""
OFFSET = 0.01
"""A mean above this is told: a recording should have none. The high-pass filter takes it away."""
MIN_CLIP_S = 0.5
"""Shorter clips are dropped: every version's training slice is below this, with room for the trimming of features."""
SILENCE, SHORT, LOUD = "silence", f"shorter than {MIN_CLIP_S} s", f"peak above {audio.MAX_PEAK}"
LATER = "longer than its header says"
"""Why seconds of a recording are in no clip, beside the decoder's reasons: the words of every account."""


class Clip(NamedTuple):
    start_s: float
    wave: audio.Wave


class Outcome(NamedTuple):
    """What became of one recording; `reason` says why it gave no clip, or what was lost of it."""

    clips: list[Clip]
    seconds_in: float
    lost: dict[str, float]
    """Seconds that are in no clip, by why: with those in clips, each counted once, they are `seconds_in`."""
    reason: str
    effective_rate: int = 0
    """In Hz, what the clips hold; 0 where there is none."""


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
        raise StageError(
            f"{work.clips_dir} holds imported clips, which other recordings do not replace:",
            f"give this recipe another run_dir, or set back what differs ({changes(work_list.settings, wanted)})",
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
    listing = fingerprint([(f.path, f.reason) if f.reason else f.listed for f in sources])
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
    measured = in_threads(recipe.preprocess.num_workers, measure, sources, "preprocess: content", "recordings")
    if all(f.reason for f in measured):  # before anything of an earlier dataset in this run folder is touched
        raise _no_clip(recipe, [(f.path, f.reason) for f in measured])
    check_recordings(work, measured, lambda f: f.content)
    work.save_speakers(speakers)
    if any(name != str(i) for i, name in speakers.names.items()):
        logger.info("preprocess: speakers %s", ", ".join(map(speakers.label, speakers.names)))
    units = cut_units([part for f in measured if not f.reason for part in f.slices()])
    lufs = common_loudness(recipe, [part for unit in units for part in unit.files])
    work_list = WorkList(listing, settings, units, tuple(f for f in measured if f.reason), lufs)
    if old is not None and (why := changes(old.made_with, work_list.made_with) or _source_changes(old, measured)):
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


def make_gate(recipe: Recipe) -> NoiseGate | None:
    """What clean_dataset asks for."""
    if not recipe.preprocess.clean_dataset:
        return None
    from rvc_dist.data.denoise import NoiseGate  # the one part of this stage that needs torch

    return NoiseGate(recipe.data.sample_rate, recipe.preprocess.clean_strength)


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
    path = audio_dir / file.path
    if file.reason:
        return file
    try:
        with decode.opened(path) as recording:
            file = replace(file, duration_s=round(recording.duration_s, 6), rate=recording.rate)
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
            seconds_out = sum(len(clip.wave) for clip in outcome.clips) / self.recipe.data.sample_rate
            entry = file_entry(replace(file, reason=outcome.reason), outcome.seconds_in, outcome.lost)
            entry |= {"start_s": file.start_s, "clips": len(outcome.clips), "seconds_out": round(seconds_out, 3)}
            files.append(entry | {"sample_rate": file.rate, "effective_rate": outcome.effective_rate})
        save_arrays(self.file(unit), *self.pack(unit, clips, files))

    def _outcome(self, file: SourceFile) -> Outcome:
        try:
            outcome = cut_file(self.recipe, file, self.gate)
        except decode.MissingDecoderError as error:
            raise _missing_decoder(file, error) from error
        except decode.AudioError as error:
            return Outcome([], file.duration_s, {decode.UNREADABLE: file.duration_s}, str(error))
        if self.meter is None or (lufs := self.work_list.lufs) is None:
            return outcome
        levelled = [clip._replace(wave=self.meter.levelled(clip.wave, lufs)) for clip in outcome.clips]
        return outcome._replace(clips=levelled)

    def report(self, headers: list[ClipsHeader]) -> None:
        files, work = self.recordings(headers), self.work
        used = [f for f in files if f["clips"]]
        rates = [(f.get("sample_rate", self.recipe.data.sample_rate), f["seconds_in"]) for f in used]
        low, remedy = low_rates(self.recipe, rates)
        upsampled = upsampled_recordings(self.recipe, used)
        report = clips_report(files, sum(f["seconds_in"] for f in used)) | {"low_rates": low, "upsampled": upsampled}
        if self.work_list.lufs is not None:
            report["loudness_lufs"] = self.work_list.lufs
        if not used:
            # The report and the work list too: nothing may look like a finished stage.
            for path in [*unit_files(work.clips_dir), work.clips_report_file, work.work_list_file]:
                path.unlink(missing_ok=True)
            raise _no_clip(self.recipe, [(f["path"], f["reason"]) for f in files])
        write_json(work.clips_report_file, report)
        made = f"{report['clips']} clips, {report['total_dataset_duration']}"
        left_out = len(files) - len(used)
        logger.info("preprocess: %s, of %d files (%d left out); %s", made, len(files), left_out, work.clips_report_file)
        if low:
            logger.warning("preprocess: %s; %s", low, remedy)
        if upsampled:
            logger.warning("preprocess: %s", upsampled)
        logger.info("preprocess: %s", account(report["seconds_in"], report["lost"]))


class Levels:
    """What the samples of a recording tell of how it was made; kept while it is read."""

    def __init__(self) -> None:
        self.peak, self.total, self.num, self.num_clipped = 0.0, 0.0, 0, 0

    def add(self, samples: decode.Samples) -> None:
        """[S, channels]"""
        magnitude = np.abs(samples)
        self.peak = max(self.peak, float(magnitude.max(initial=0.0)))
        self.total += float(samples.sum(dtype=np.float64))
        self.num += samples.size
        if self.peak >= CLIPPED_LEVEL:
            full = magnitude >= CLIPPED_LEVEL
            self.num_clipped += int(np.count_nonzero(full[1:] & full[:-1]))

    def notes(self) -> Iterator[str]:
        if self.peak > audio.MAX_PEAK:  # no audio in -1..1, of which its clips tell
            return
        share, offset = self.num_clipped / max(1, self.num), self.total / max(1, self.num)
        if share > CLIPPED_SHARE:
            yield f"clipped ({100 * share:.1f}% of its samples at full scale)"
        if abs(offset) > OFFSET:
            yield f"has a DC offset of {offset:.3f}"


class Slice(NamedTuple):
    """A slice of a recording as it was read."""

    wave: audio.Wave
    """At the voice's rate [S]."""
    seconds: float
    """What was decoded."""
    lost: list[tuple[float, str]]
    """What was not, with the decoder's reasons."""
    notes: list[str]
    """What is to be said of it."""


def read_slice(recipe: Recipe, file: SourceFile, levels: Levels, channel: int | None = None) -> Slice:
    """A slice of a recording: the mean of its channels, or `channel` alone, as is done where they cancel each other.

    Raises:
        AudioError: it cannot be read, or holds nothing.
    """
    with decode.opened(Path(recipe.data.audio_dir, file.path)) as recording:
        # The last slice goes on where the header promised an end, but holds no more than two.
        most_s = file.duration_s + (MAX_SLICE_S if file.is_last else 0.0)
        resampler, downmix = audio.Resampler(recording.rate, recipe.data.sample_rate), audio.Downmix(channel)
        most, num, parts = round(most_s * recording.rate), 0, []
        for block in recording.blocks(file.start_s, None if file.is_last else most):
            if num < most:
                levels.add(block[: most - num])
                parts.append(resampler(downmix(block[: most - num])))
            num += len(block)
        parts.append(resampler(np.zeros(0, np.float32), last=True))
        if num > most:
            recording.lost.append(((num - most) / recording.rate, LATER))
    if not num and not recording.lost:
        raise decode.AudioError(
            "holds no samples" if file.is_last and not file.start_s else "ends before its header says"
        )
    seconds = round(min(num, most) / recording.rate, 6)
    if (loudest := downmix.loudest_of_cancelling()) is not None:
        read = read_slice(recipe, file, Levels(), loudest)
        return read._replace(notes=[*read.notes, audio.cancelling_note(loudest)])
    notes = recording.told()[len(recording.notes) if file.start_s else 0 :]  # what holds for all of it is told once
    return Slice(np.concatenate(parts), seconds, recording.lost, notes)


def cut_file(recipe: Recipe, file: SourceFile, gate: NoiseGate | None = None) -> Outcome:
    """Decode, resample, filter, clean, level and cut one recording or slice.

    Raises:
        AudioError: it cannot be read; the message is the reason.
    """
    config, rate, levels = recipe.preprocess, recipe.data.sample_rate, Levels()
    read = read_slice(recipe, file, levels)
    if not len(read.wave):
        return _outcome([], read, {}, read.notes)
    if levels.peak < audio.SILENT_PEAK:
        return _outcome([], read, {SILENCE: len(read.wave)}, [*read.notes, "silent (peak below -60 dB)"])
    notes = read.notes + list(levels.notes())
    wave = _clean(recipe, read.wave, gate)

    clips: list[Clip] = []
    kinds: Counter[str] = Counter()
    longest = MAX_CLIP_FRAMES * recipe.rate_spec.hop
    spans: list[tuple[int, int, str]] = []
    for start, piece in pieces(recipe, wave):
        fate = _fate(piece, rate)
        spans.append((start, start + len(piece), fate))
        if fate:
            kinds[f"dropped ({fate})"] += 1
            continue
        if len(piece) > longest:
            kinds[f"longer than the {longest / rate:.1f} s of which training makes use"] += 1
        levelled = audio.normalise(piece) if config.normalization == "post" else piece
        clips.append(Clip(round(file.start_s + start / rate, 4), np.ascontiguousarray(levelled)))
    notes += [f"{count} {'clip' if count == 1 else 'clips'} {what}" for what, count in sorted(kinds.items())]
    if not spans:
        notes.append(f"silent (nothing but steady noise below {audio.SLICE_THRESHOLD_DB:.0f} dB RMS)")
    lost = _lost(spans, len(wave))
    if clips and lost[SILENCE] > len(wave) / 2:
        notes.append(f"{lost[SILENCE] / rate:.1f} of its {len(wave) / rate:.1f} s are silence")
    heard_rate = audio.effective_rate(read.wave, rate, file.rate) if clips else 0
    return _outcome(clips, read, lost, notes)._replace(effective_rate=heard_rate)


def _fate(piece: audio.Wave, rate: int) -> str:
    """Why a piece becomes no clip, or nothing."""
    peak = float(np.abs(piece).max(initial=0.0))
    if len(piece) < MIN_CLIP_S * rate:
        return SHORT
    if not peak <= audio.MAX_PEAK:
        return LOUD
    return SILENCE if peak < audio.SILENT_PEAK else ""


def _lost(spans: list[tuple[int, int, str]], num_samples: int) -> dict[str, int]:
    """Samples that no clip holds, by why. `spans` are (first sample, last + 1, why not), in order; the clips' say "".

    Clips overlap, so each sample is counted once: as held where any clip holds it, as silence where no span has it.
    """
    reasons = sorted({SILENCE, "", *(why for *_, why in spans)})
    of_sample = np.full(num_samples, reasons.index(SILENCE), np.uint8)
    for start, stop, why in sorted(spans, key=lambda span: not span[2]):  # the clips last: they count before all else
        of_sample[start:stop] = reasons.index(why)
    return {why: int(np.count_nonzero(of_sample == i)) for i, why in enumerate(reasons) if why}


def _outcome(clips: list[Clip], read: Slice, lost_samples: dict[str, int], notes: list[str]) -> Outcome:
    """With what the decoder did not give added to what the cutting left."""
    lost: dict[str, float] = defaultdict(
        float, {why: num / len(read.wave) * read.seconds for why, num in lost_samples.items()}
    )
    for seconds, why in read.lost:
        lost[why] += seconds
    seconds_in = round(read.seconds + sum(seconds for seconds, _ in read.lost), 6)
    return Outcome(clips, seconds_in, {why: round(s, 6) for why, s in sorted(lost.items()) if s}, ", ".join(notes))


def _clean(recipe: Recipe, wave: audio.Wave, gate: NoiseGate | None) -> audio.Wave:
    if recipe.preprocess.process_effects:
        wave = audio.highpass(wave, recipe.data.sample_rate)
    if gate is not None:
        wave = gate(wave)
    return audio.normalise(wave) if recipe.preprocess.normalization == "pre" else wave
