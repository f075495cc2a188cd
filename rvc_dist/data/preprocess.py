"""The preprocess stage: recordings -> clips at the voice's sample rate, one safetensors file a work unit."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from rvc_dist.config import MAX_CLIP_FRAMES, RATES, Recipe
from rvc_dist.data import audio, decode
from rvc_dist.data.parts import CUT
from rvc_dist.data.sources import check_recordings, content_of, list_sources
from rvc_dist.files import atomic_write, write_json
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
    is_done,
    listed,
    printable,
    remove_leftovers,
    save_arrays,
    unit_files,
    unit_header,
    wait_for,
)

if TYPE_CHECKING:
    from rvc_dist.data.denoise import NoiseGate

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

LOG_EVERY_S = 10.0
CLIPPED_LEVEL, CLIPPED_SHARE = 0.999, 1e-3
"""Neighbours that both reach this level are clipped; a recording with more than this share of them is called so."""
OFFSET = 0.01
"""A mean above this is told: a recording should have none. The high-pass filter takes it away."""
MIN_CLIP_S = 0.5
"""Shorter clips are dropped: every version's training slice is below this, with room for the trimming of features."""
SILENCE, SHORT, LOUD = "silence", f"shorter than {MIN_CLIP_S} s", f"peak above {audio.MAX_PEAK}"
LATER = "longer than its header says"
"""Why seconds of a recording are in no clip, beside the decoder's reasons: the words of every account."""


HEARD_RATE = 40000
"""Recordings of this rate in Hz and more lack nothing that is heard: 44100 is not below a voice of 48000."""


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
    settings = clip_settings(recipe)
    work_list = make_work_list(recipe, work, settings, shard)
    if shard.is_first:
        save_recipe(recipe, work)
    todo = [u for u in shard.take(work_list.units) if not is_done(work.clips_file(u.id), u.fingerprint(settings))]
    logger.info(
        "preprocess: %d units of %.1f min, %d to do here",
        len(work_list.units),
        sum(u.duration_s for u in work_list.units) / 60,
        len(todo),
    )
    make_units(recipe, work, todo, settings)
    finish(recipe, work, work_list, shard)


def complete(recipe: Recipe) -> bool | None:
    """True when every clip of the recipe's dataset is made and reported, else None (for `wait_for`)."""
    work = Workspace(recipe.run_dir, recipe.name)
    if not work.clips_report_file.is_file():  # written last: ranks that poll read nothing else until then
        return None
    work_list = WorkList.load(work.work_list_file)
    known = work_list and work_list.settings in (clip_settings(recipe), imported_clip_settings(recipe))
    return (work_list is not None and known and not work_list.undone(work)) or None


def imported_clip_settings(recipe: Recipe) -> dict[str, Any]:
    """In the place of `clip_settings`, what the clips of an import depend on: they stay as the other tool cut them."""
    return {"imported": True, "data.audio_dir": recipe.data.audio_dir, "data.sample_rate": recipe.data.sample_rate}


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


def clip_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that the bytes of a clip depend on, under their recipe keys."""
    p = recipe.preprocess
    return {
        "data.sample_rate": recipe.data.sample_rate,
        "preprocess.cut_method": p.cut_method,
        "preprocess.chunk_len": float(p.chunk_len),  # 3 and 3.0 are one setting
        "preprocess.overlap_len": float(p.overlap_len),
        "preprocess.process_effects": p.process_effects,
        "preprocess.normalization": p.normalization,
        "preprocess.clean": float(p.clean_strength) if p.clean_dataset else 0.0,
    }


def save_recipe(recipe: Recipe, work: Workspace) -> None:
    """Keep the recipe with the run; of features that are there already, what they were made with."""
    if work.features_report_file.is_file() and (kept := work.kept_recipe()) is not None:
        recipe = replace(recipe, extract=kept.extract, model=kept.model)
    work.save_recipe(recipe, reads_recordings=True)


def other_settings(recipe: Recipe) -> str:
    """What is wrong when the run's clips were made with other settings than the recipe's, and what to do."""
    work = Workspace(recipe.run_dir, recipe.name)
    work_list = WorkList.load(work.work_list_file)
    differ = work_list and changes(work_list.settings, clip_settings(recipe), shared=True)
    remedy = "run `rvc-dist preprocess` and `extract` again, or set back what differs"
    return f"{work.clips_dir} holds clips of other settings than the recipe's: {remedy} ({differ})" if differ else ""


def _no_clip(recipe: Recipe, reasons: list[tuple[str, str]]) -> StageError:
    return StageError(
        f"preprocess: none of the {len(reasons)} files in {recipe.data.audio_dir} gave a clip{listed(reasons)}"
    )


def make_work_list(recipe: Recipe, work: Workspace, settings: dict[str, Any], shard: Shard) -> WorkList:
    """The work list: read when it is current, else made by the first rank (by every array task alike)."""
    audio_dir = Path(recipe.data.audio_dir)
    work.check_root()
    sources = list_sources(audio_dir, work.root)
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
        return work_list
    if not (shard.is_first or shard.array):
        return wait_for("the work list of rank 0", current)

    old = WorkList.load(work.work_list_file)
    content = content_by(old, audio_dir)
    measured = in_threads(
        recipe.preprocess.num_workers,
        lambda f: f if f.reason else _measure(audio_dir, f, content),
        sources,
        "preprocess: read %d of %d recordings, to know their content",
    )
    if all(f.reason for f in measured):  # before anything of an earlier dataset in this run folder is touched
        raise _no_clip(recipe, [(f.path, f.reason) for f in measured])
    check_recordings(work, measured, lambda f: f.content)
    work_list = WorkList(
        listing=listing,
        settings=settings,
        units=cut_units([part for f in measured if not f.reason for part in f.slices()]),
        excluded=tuple(f for f in measured if f.reason),
    )
    if old is not None and (why := changes(old.settings, settings) or _source_changes(old, measured)):
        logger.info("preprocess: making stale clips again: %s", why)
    elif old is not None:
        logger.info("preprocess: the content of the recordings is what it was: what was made of it is kept")
    work.clips_report_file.unlink(missing_ok=True)  # `complete` must not take the old report for this work list's
    atomic_write(work.work_list_file, work_list.dumps())
    return work_list


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


def content_by(work_list: WorkList | None, audio_dir: Path) -> Callable[[SourceFile], str]:
    """The content of a recording: as `work_list` has it where neither size nor time differs, else it is read."""
    known = {f.listed: f.content for unit in (work_list.units if work_list else ()) for f in unit.files}
    return lambda file: known.get(file.listed) or content_of(audio_dir / file.path)


def _measure(audio_dir: Path, file: SourceFile, content: Callable[[SourceFile], str]) -> SourceFile:
    """`file` with its length, rate and content."""
    path = audio_dir / file.path
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


def make_units(recipe: Recipe, work: Workspace, units: list[Unit], settings: dict[str, Any]) -> None:
    """Write the clips of `units`, several at a time."""
    gate = None
    if recipe.preprocess.clean_dataset and units:
        from rvc_dist.data.denoise import NoiseGate  # the one part of this stage that needs torch

        gate = NoiseGate(recipe.data.sample_rate, recipe.preprocess.clean_strength)
    # Decoders, the resampler and the filter release the interpreter lock, so threads are enough.
    in_threads(
        recipe.preprocess.num_workers,
        lambda unit: make_unit(recipe, work, unit, settings, gate),
        units,
        "preprocess: %d of %d units",
    )


def in_threads(count: int, function: Callable[[T], R], items: Sequence[T], progress: str) -> list[R]:
    """What `function` gives of each of `items`, in `count` threads, with a line on the progress now and then."""
    results, logged_at = [], time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        try:
            for result in pool.map(function, items):
                results.append(result)
                if time.monotonic() - logged_at > LOG_EVERY_S:
                    logged_at = time.monotonic()
                    logger.info(progress, len(results), len(items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def make_unit(
    recipe: Recipe, work: Workspace, unit: Unit, settings: dict[str, Any], gate: NoiseGate | None = None
) -> None:
    """Write the clips of one unit, with what became of each of its recordings."""
    arrays: dict[str, audio.Wave] = {}
    clips: list[dict[str, Any]] = []
    files: list[dict[str, Any]] = []
    for file in unit.files:
        outcome = _try_file(recipe, file, gate)
        samples = sum(len(clip.wave) for clip in outcome.clips)
        files.append(
            {
                "path": file.path,
                "speaker": file.speaker,
                "start_s": file.start_s,
                "seconds_in": outcome.seconds_in,
                "clips": len(outcome.clips),
                "seconds_out": round(samples / recipe.data.sample_rate, 3),
                "lost": outcome.lost,
                "sample_rate": file.rate,
                "effective_rate": outcome.effective_rate,
                "reason": outcome.reason,
            }
        )
        for clip in outcome.clips:
            arrays[f"{len(clips):05d}"] = clip.wave
            where = {"slice_s": file.start_s, "start_s": clip.start_s, "content": file.content}
            clips.append({"speaker": file.speaker, "source": file.path} | where)
    header = {"stamp": unit.fingerprint(settings), "sample_rate": recipe.data.sample_rate}
    header |= {"clips": clips, "files": files}
    save_arrays(work.clips_file(unit.id), arrays, header)


def _try_file(recipe: Recipe, file: SourceFile, gate: NoiseGate | None) -> Outcome:
    try:
        return cut_file(recipe, file, gate)
    except decode.MissingDecoderError as error:
        raise _missing_decoder(file, error) from error
    except decode.AudioError as error:
        return Outcome([], file.duration_s, {decode.UNREADABLE: file.duration_s}, str(error))


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


def pieces(recipe: Recipe, wave: audio.Wave, has_silences: bool = True) -> Iterator[tuple[int, audio.Wave]]:
    """What a recording is cut into, by the first sample of each; without a search for silences where it has none."""
    config, rate = recipe.preprocess, recipe.data.sample_rate
    if config.cut_method == "skip":
        yield 0, wave
    elif config.cut_method == "simple":
        yield from audio.cut_fixed(wave, rate, config.chunk_len, config.overlap_len)
    else:
        for offset, part in audio.cut_silences(wave, rate) if has_silences else [(0, wave)]:
            for start, piece in audio.cut_windows(part, rate, config.chunk_len, config.overlap_len):
                yield offset + start, piece


def finish(recipe: Recipe, work: Workspace, work_list: WorkList, shard: Shard) -> None:
    """Write the report once every unit is done, whoever did it."""
    if left := len(work_list.undone(work)):
        if shard.does_all:
            raise StageError(
                f"preprocess: {left} of {len(work_list.units)} units in {work.clips_dir} were replaced meanwhile: "
                "another job works in this run folder with other settings or recordings;",
                "end one, then run the stage again",
            )
        logger.info("preprocess: this part is done, %d units are left to others", left)
        return
    files = recording_entries(work, work_list, "preprocess")
    used = [f for f in files if f["clips"]]
    rates = [(f.get("sample_rate", recipe.data.sample_rate), f["seconds_in"]) for f in used]
    low, remedy = low_rates(recipe, rates)
    upsampled = upsampled_recordings(recipe, used)
    report = clips_report(files, sum(f["seconds_in"] for f in used)) | {"low_rates": low, "upsampled": upsampled}
    if not used:
        # The report and the work list too: nothing may look like a finished stage.
        for path in [*unit_files(work.clips_dir), work.clips_report_file, work.work_list_file]:
            path.unlink(missing_ok=True)
        raise _no_clip(recipe, [(f["path"], f["reason"]) for f in files])
    write_json(work.clips_report_file, report)
    logger.info(
        "preprocess: %d clips, %s, of %d files (%d left out); %s",
        report["clips"],
        report["total_dataset_duration"],
        len(files),
        len(files) - len(used),
        work.clips_report_file,
    )
    if low:
        logger.warning("preprocess: %s; %s", low, remedy)
    if upsampled:
        logger.warning("preprocess: %s", upsampled)
    logger.info("preprocess: %s", account(report["seconds_in"], report["lost"]))


def recording_entries(work: Workspace, work_list: WorkList, stage: str) -> list[dict[str, Any]]:
    """What became of each recording, once all units are done; reasons are logged, and files of no unit removed."""
    remove_leftovers(work.clips_dir, len(work_list.units))
    headers = [unit_header(work.clips_file(u.id), ClipsHeader, stage) for u in work_list.units]
    files = _by_recording([dict(f) for h in headers for f in h["files"]])
    files += [left_out_entry(f) for f in work_list.excluded]
    files.sort(key=lambda f: (f["speaker"], f["path"]))
    for file in files:
        if file["reason"]:
            logger.warning("%s: %s: %s", stage, printable(file["path"]), file["reason"])
    return files


def low_rates(recipe: Recipe, recordings: list[tuple[int, float]]) -> tuple[str, str]:
    """What is to be said, and done, of those `recordings` (Hz, seconds) that hold less than the voice is to have."""
    wanted = recipe.data.sample_rate
    low = [(rate, seconds) for rate, seconds in recordings if rate < min(wanted, HEARD_RATE)]
    if not low:
        return "", ""
    lowest, low_s, all_s = min(low)[0], sum(s for _, s in low), sum(s for _, s in recordings)
    fitting = min((r for r in RATES[recipe.model.version] if r >= lowest), default=wanted)
    text = (
        f"{len(low)} of {len(recordings)} recordings ({low_s / 60:.1f} of {all_s / 60:.1f} min) have a rate below "
        f"data.sample_rate {wanted}, the lowest {lowest} Hz: they hold nothing above {lowest // 2} Hz, and the voice "
        "learns to sound as dull"
    )
    remedy = f"set data.sample_rate {fitting}, or " if fitting < wanted else ""
    return text, f"{remedy}give recordings of {wanted} Hz"


def upsampled_recordings(recipe: Recipe, files: list[dict[str, Any]]) -> str:
    """What is to be said of those recordings that hold less than their own rate, and the voice's, could."""
    limit = min(recipe.data.sample_rate, HEARD_RATE)
    found = [f for f in files if 0 < f.get("effective_rate", 0) < min(f.get("sample_rate", 0), limit)]
    if not found:
        return ""
    seconds, all_s = sum(f["seconds_in"] for f in found), sum(f["seconds_in"] for f in files)
    lowest = min(f["effective_rate"] for f in found)
    return (
        f"{len(found)} of {len(files)} recordings ({seconds / 60:.1f} of {all_s / 60:.1f} min) were upsampled, the "
        f"lowest from {lowest} Hz: they hold nothing above {lowest // 2} Hz, and the voice learns to sound as dull; "
        "give others if there are"
        + listed((f["path"], f"{f['sample_rate']} Hz, holds what {f['effective_rate']} Hz do") for f in found)
    )


def clips_report(files: list[dict[str, Any]], total_s: float) -> dict[str, Any]:
    """RUN/clips/report.json: what became of each of `files`, and of `total_s` seconds of usable recordings."""
    used = [f for f in files if f["clips"]]
    return {
        "total_dataset_duration": format_duration(total_s),
        "total_seconds": round(total_s, 3),
        "clips": sum(f["clips"] for f in used),
        "clip_seconds": round(sum(f["seconds_out"] for f in used), 3),
        "seconds_in": round(sum(f["seconds_in"] for f in files), 3),
        "lost": sum_lost(files),
        "speakers": sorted({f["speaker"] for f in used}),
        "files_used": len(used),
        "files_left_out": len(files) - len(used),
        "files": files,
    }


def sum_lost(files: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds that are in no clip, by why, the most first."""
    total: Counter[str] = Counter()
    for file in files:
        total.update(file["lost"])
    return {why: round(seconds, 6) for why, seconds in total.most_common()}


def account(seconds_in: float, lost: dict[str, float]) -> str:
    """What became of the seconds of recordings; a second that several clips hold is counted once."""
    parts = ", ".join(f"{why} {seconds:.1f} s" for why, seconds in lost.items())
    all_lost, missing_s = sum(lost.values()), lost.get(CUT, 0.0)
    told = f"{all_lost:.1f} s not ({parts})" if lost else "nothing was lost"
    promised = f" ({missing_s:.1f} s of them are promised by headers and not there)" if missing_s else ""
    return f"of {seconds_in:.1f} s of recordings{promised} {seconds_in - all_lost:.1f} s are in clips, {told}"


def left_out_entry(file: SourceFile) -> dict[str, Any]:
    """The entry of a recording that no unit holds."""
    nothing = {"seconds_in": 0.0, "clips": 0, "seconds_out": 0.0, "lost": {}}
    return {"path": file.path, "speaker": file.speaker, **nothing, "reason": file.reason}


def _by_recording(slices: list[dict[str, Any]], most: int = 3) -> list[dict[str, Any]]:
    """The entries of slices summed up by recording; what is said of a slice says where it begins."""
    files: dict[str, dict[str, Any]] = {}
    reasons: dict[str, list[tuple[float, str]]] = {}
    for part in slices:
        entry = {k: v for k, v in part.items() if k not in ("start_s", "reason")}
        reasons.setdefault(part["path"], []).append((part.get("start_s", 0.0), part["reason"]))
        known = files.setdefault(part["path"], entry)
        if known is not entry:
            for key in ("seconds_in", "clips", "seconds_out"):
                known[key] = round(known[key] + part[key], 6)
            known["lost"] = sum_lost([known, part])
            known["effective_rate"] = max(e.get("effective_rate", 0) for e in (known, part))
    for path, found in reasons.items():
        told = [f"from {format_duration(at)}: {why}" if len(found) > 1 else why for at, why in sorted(found) if why]
        more = [f"and {len(told) - most} slices more"] if len(told) > most else []
        files[path]["reason"] = "; ".join(told[:most] + more)
    return list(files.values())


def format_duration(seconds: float) -> str:
    """HH:MM:SS, as voice files and reports write a dataset's length."""
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
