"""The preprocess stage: recordings -> clips at the voice's sample rate, one safetensors file a work unit."""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rvc_dist import audio
from rvc_dist.config import MAX_CLIP_FRAMES, MAX_SPEAKERS, Recipe
from rvc_dist.workspace import (
    Plan,
    Share,
    SourceFile,
    StageError,
    Unit,
    Workspace,
    atomic_write,
    changes,
    cut_units,
    is_done,
    printable,
    read_header,
    remove_leftovers,
    save_arrays,
    stamp,
    unit_files,
    wait_for,
    write_json,
)

logger = logging.getLogger(__name__)

MIN_CLIP_S = 0.5
"""Shorter clips are dropped: every version's training slice is below this, with room for the trimming of features."""


class Clip(NamedTuple):
    start_s: float
    wave: audio.Wave


class Outcome(NamedTuple):
    """What became of one recording; `reason` says why it gave no clip, or what was lost of it."""

    clips: list[Clip]
    seconds_in: float
    reason: str


def run(recipe: Recipe, share: Share) -> None:
    """Make this process's clips; whoever finishes last writes the report.

    Raises:
        StageError: the dataset is missing, is no folder, holds no audio, or gave no clip at all.
    """
    work = Workspace(recipe.run_dir, recipe.name)
    settings = clip_settings(recipe)
    plan = make_plan(recipe, work, settings, share)
    if share.is_first:
        work.save_recipe(recipe.to_yaml())
    todo = [u for u in share.take(plan.units) if not is_done(work.clips_file(u.id), u.stamp(settings))]
    logger.info(
        "preprocess: %d units of %.1f min, %d to do here",
        len(plan.units),
        sum(u.duration_s for u in plan.units) / 60,
        len(todo),
    )
    with ThreadPoolExecutor(recipe.preprocess.num_workers) as pool:
        for unit in todo:
            make_unit(recipe, work, unit, settings, pool)
    finish(recipe, work, plan, settings)


def complete(recipe: Recipe) -> bool | None:
    """True when every clip of the recipe's dataset is made and reported, else None (for `wait_for`)."""
    work = Workspace(recipe.run_dir, recipe.name)
    if not work.clips_report_file.is_file():  # written last: ranks that poll read nothing else until then
        return None
    settings = clip_settings(recipe)
    plan = Plan.load(work.plan_file)
    done = (
        plan is not None
        and plan.settings == settings
        and all(is_done(work.clips_file(u.id), u.stamp(settings)) for u in plan.units)
    )
    return done or None


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
    }


def list_sources(audio_dir: Path, run_dir: Path | None = None) -> list[SourceFile]:
    """Every file below `audio_dir` in a fixed order; those that cannot be used carry a reason.

    `run_dir` is left out when it lies in the dataset. Hidden folders, and links to folders, are named, not entered.

    Raises:
        StageError: the folder is missing, is not a folder, or holds no usable file.
    """
    if not audio_dir.exists():
        raise StageError(f"data.audio_dir: {audio_dir} does not exist; expected a folder of recordings")
    if not audio_dir.is_dir():
        raise StageError(f"data.audio_dir: {audio_dir} is a file; expected a folder of recordings")
    found = sorted(_walk(audio_dir, run_dir), key=lambda f: (f.speaker, f.path))
    found = _without_doubles(found, audio_dir)
    if all(f.reason for f in found):
        raise StageError(
            f"data.audio_dir: {audio_dir} holds no usable recording; expected files of the kinds "
            f"{_kinds()}, or sub-folders of them named by speaker id (0, 1, ...)"
            + _listed((f.path, f.reason) for f in found)
        )
    return found


def _walk(audio_dir: Path, run_dir: Path | None) -> list[SourceFile]:
    found: list[SourceFile] = []

    def left_out(path: Path | str, reason: str) -> None:
        found.append(SourceFile(str(Path(path).relative_to(audio_dir)), 0, 0, 0, reason=reason))

    def unreadable(error: OSError) -> None:  # os.walk would pass over it
        left_out(error.filename, f"folder cannot be read ({error.strerror})")

    own = run_dir.resolve() if run_dir else None
    for folder, folders, names in os.walk(audio_dir, onerror=unreadable):
        for name in list(folders):
            path = Path(folder, name)
            if path.is_symlink():  # which os.walk does not enter
                left_out(path, "link to a folder; expected the folder itself")
            elif path.resolve() == own:
                folders.remove(name)
            elif name.startswith("."):
                left_out(path, "hidden folder")
                folders.remove(name)
        found.extend(_source(Path(folder, name), audio_dir) for name in names)
    return found


def _source(path: Path, audio_dir: Path) -> SourceFile:
    """One file of the dataset, judged by its name and kind alone."""
    relative = path.relative_to(audio_dir)
    # Of a link the recording's own size and time count.
    status = path.stat() if path.exists() else path.lstat()
    speaker, reason = _speaker_of(relative)
    suffix = path.suffix.lower()
    if path.name.startswith("."):
        reason = "hidden file"
    elif path.is_symlink() and not path.exists():
        reason = "broken link"
    elif path.is_symlink() and not path.resolve().is_relative_to(audio_dir.resolve()):
        reason = "link that leads out of the dataset; expected the recording itself"
    elif not stat.S_ISREG(status.st_mode):
        reason = "not a regular file"
    elif suffix in audio.OTHER_SUFFIXES:
        reason = f"{suffix[1:]} is not decoded here; convert it to wav or flac first (ffmpeg -i OLD NEW.flac)"
    elif suffix not in audio.AUDIO_SUFFIXES:
        reason = f"not one of {_kinds()}"
    elif not status.st_size:
        reason = "empty file (0 bytes)"
    return SourceFile(str(relative), speaker, status.st_size, status.st_mtime_ns, reason=reason)


def _without_doubles(files: list[SourceFile], audio_dir: Path) -> list[SourceFile]:
    """`files` with a reason for each link to a recording that is used anyway: no recording is heard twice."""
    usable = [f for f in files if not f.reason]
    links = {f.path for f in usable if (audio_dir / f.path).is_symlink()}
    if not links:
        return files
    taken = {(audio_dir / f.path).resolve(): f.path for f in usable if f.path not in links}
    doubles = {}
    for path in sorted(links):
        first = taken.setdefault((audio_dir / path).resolve(), path)
        if first != path:
            doubles[path] = f"link to the same recording as {printable(first)}"
    return [replace(f, reason=doubles.get(f.path, f.reason)) for f in files]


def _speaker_of(relative: Path) -> tuple[int, str]:
    """The speaker id of a dataset file, and the reason when its folder gives none."""
    if len(relative.parts) == 1:
        return 0, ""
    top = relative.parts[0]
    if top.isascii() and top.isdecimal():
        speaker = int(top)
        return (speaker, "") if speaker < MAX_SPEAKERS else (0, f"speaker id {top} is above {MAX_SPEAKERS - 1}")
    return 0, f"folder {top!r} is not named by an integer speaker id"


def _kinds() -> str:
    return " ".join(suffix[1:] for suffix in audio.AUDIO_SUFFIXES)


def _listed(reasons: Iterable[tuple[str, str]], most: int = 20) -> str:
    """`path: reason` on a line each, and how many more there are."""
    lines = [f"\n  {printable(path)}: {reason}" for path, reason in reasons]
    more = f"\n  and {len(lines) - most} more" if len(lines) > most else ""
    return "".join(lines[:most]) + more


def _no_clip(recipe: Recipe, reasons: list[tuple[str, str]]) -> StageError:
    return StageError(
        f"preprocess: none of the {len(reasons)} files in {recipe.data.audio_dir} gave a clip{_listed(reasons)}"
    )


def make_plan(recipe: Recipe, work: Workspace, settings: dict[str, Any], share: Share) -> Plan:
    """The work list: read when it is current, else made by the first rank (by every array task alike)."""
    audio_dir = Path(recipe.data.audio_dir)
    if work.root.exists() and not work.root.is_dir():
        raise StageError(f"run_dir: {work.root} is a file; expected a folder, or a name that is free")
    sources = list_sources(audio_dir, work.root)
    listing = stamp([(f.path, f.reason) if f.reason else f.identity for f in sources])

    def current() -> Plan | None:
        plan = Plan.load(work.plan_file)
        return plan if plan and (plan.listing, plan.settings) == (listing, settings) else None

    if plan := current():
        return plan
    if not (share.is_first or share.array):
        return wait_for("the plan of rank 0", current)

    measured = [f if f.reason else _measure(audio_dir, f) for f in sources]
    if all(f.reason for f in measured):  # before anything of an earlier dataset in this run folder is touched
        raise _no_clip(recipe, [(f.path, f.reason) for f in measured])
    old = Plan.load(work.plan_file)
    if old is not None:
        why = changes(old.settings, settings) or _source_changes(old, sources)
        logger.info("preprocess: making stale clips again: %s", why)
    plan = Plan(
        listing=listing,
        settings=settings,
        units=cut_units([f for f in measured if not f.reason]),
        excluded=tuple(f for f in measured if f.reason),
    )
    work.clips_report_file.unlink(missing_ok=True)  # `complete` must not take the old report for this plan's
    atomic_write(work.plan_file, plan.dumps())
    return plan


def _source_changes(old: Plan, sources: list[SourceFile]) -> str:
    """What happened to the recordings since `old`, in one line with the first name of each sort."""
    before = {f.path: f for f in (*(f for unit in old.units for f in unit.files), *old.excluded)}
    after = {f.path: f for f in sources}
    sorts = {
        "new": sorted(after.keys() - before.keys()),
        "gone": sorted(before.keys() - after.keys()),
        "changed": sorted(p for p in after.keys() & before.keys() if after[p].identity != before[p].identity),
    }
    told = [f"{len(paths)} {sort} ({printable(paths[0])})" for sort, paths in sorts.items() if paths]
    return f"recordings in data.audio_dir: {', '.join(told) or 'other reasons to leave some out'}"


def _measure(audio_dir: Path, file: SourceFile) -> SourceFile:
    try:
        return replace(file, duration_s=round(audio.duration(audio_dir / file.path), 6))
    except audio.AudioError as error:
        return replace(file, reason=str(error))


def make_unit(recipe: Recipe, work: Workspace, unit: Unit, settings: dict[str, Any], pool: ThreadPoolExecutor) -> None:
    """Write the clips of one unit, with what became of each of its files."""
    arrays: dict[str, audio.Wave] = {}
    clips: list[dict[str, Any]] = []
    files: list[dict[str, Any]] = []
    # Decoders, the resampler and the filter release the interpreter lock, so threads are enough.
    for file, outcome in zip(unit.files, pool.map(lambda f: _try_file(recipe, f), unit.files), strict=True):
        samples = sum(len(clip.wave) for clip in outcome.clips)
        files.append(
            {
                "path": file.path,
                "speaker": file.speaker,
                "seconds_in": outcome.seconds_in,
                "clips": len(outcome.clips),
                "seconds_out": round(samples / recipe.data.sample_rate, 3),
                "reason": outcome.reason,
            }
        )
        for clip in outcome.clips:
            arrays[f"{len(clips):05d}"] = clip.wave
            clips.append({"speaker": file.speaker, "source": file.path, "start_s": clip.start_s})
    header = {"stamp": unit.stamp(settings), "sample_rate": recipe.data.sample_rate, "clips": clips, "files": files}
    save_arrays(work.clips_file(unit.id), arrays, header)


def _try_file(recipe: Recipe, file: SourceFile) -> Outcome:
    try:
        outcome = cut_file(recipe, Path(recipe.data.audio_dir, file.path))
    except audio.AudioError as error:
        return Outcome([], file.duration_s, str(error))
    # An mp3 without a length tag promises a guess, so less is told and no reason to leave a file out.
    if outcome.seconds_in < file.duration_s - 0.5:
        short = f"only {outcome.seconds_in:.1f} of the {file.duration_s:.1f} s that its header promises can be read"
        outcome = outcome._replace(reason=", ".join(filter(None, [short, outcome.reason])))
    return outcome


def cut_file(recipe: Recipe, path: Path) -> Outcome:
    """Decode, resample, filter, level and cut one recording.

    Raises:
        AudioError: the recording gives no clip; the message is the reason.
    """
    config, rate = recipe.preprocess, recipe.data.sample_rate
    wave, source_rate = audio.decode(path)
    seconds_in = round(len(wave) / source_rate, 6)
    if float(np.abs(wave).max()) < audio.SILENT_PEAK:
        raise audio.AudioError("silent (peak below -60 dB)")
    wave = audio.resample(wave, source_rate, rate)
    if config.process_effects:
        wave = audio.highpass(wave, rate)
    if config.normalization == "pre":
        wave = audio.normalise(wave)

    clips: list[Clip] = []
    notes: Counter[str] = Counter()
    longest = MAX_CLIP_FRAMES * recipe.rate_spec.hop
    for start, piece in _pieces(recipe, wave):
        peak = float(np.abs(piece).max(initial=0.0))
        if len(piece) < MIN_CLIP_S * rate:
            notes[f"shorter than {MIN_CLIP_S} s dropped"] += 1
        elif not peak <= audio.MAX_PEAK:
            notes[f"with a peak above {audio.MAX_PEAK} dropped"] += 1
        elif peak < audio.SILENT_PEAK:
            notes["silent, dropped"] += 1
        else:
            if len(piece) > longest:
                notes[f"longer than the {longest / rate:.1f} s of which training makes use"] += 1
            levelled = audio.normalise(piece) if config.normalization == "post" else piece
            clips.append(Clip(round(start / rate, 4), np.ascontiguousarray(levelled)))
    reason = ", ".join(f"{count} {'clip' if count == 1 else 'clips'} {what}" for what, count in sorted(notes.items()))
    if not clips:
        raise audio.AudioError(reason or _why_nothing(recipe, len(wave)))
    return Outcome(clips, seconds_in, reason)


def _why_nothing(recipe: Recipe, num_samples: int) -> str:
    """The reason of a recording that was cut into no piece at all."""
    config = recipe.preprocess
    if config.cut_method == "simple":
        return f"shorter than one chunk ({num_samples / recipe.data.sample_rate:.2f} of {config.chunk_len} s)"
    return f"silent (no frame above {audio.SLICE_THRESHOLD_DB:.0f} dB RMS)"


def _pieces(recipe: Recipe, wave: audio.Wave) -> Iterator[tuple[int, audio.Wave]]:
    config, rate = recipe.preprocess, recipe.data.sample_rate
    if config.cut_method == "skip":
        yield 0, wave
    elif config.cut_method == "simple":
        yield from audio.cut_fixed(wave, rate, config.chunk_len, config.overlap_len)
    else:
        for offset, part in audio.cut_silences(wave, rate):
            for start, piece in audio.cut_windows(part, rate, config.chunk_len, config.overlap_len):
                yield offset + start, piece


def finish(recipe: Recipe, work: Workspace, plan: Plan, settings: dict[str, Any]) -> None:
    """Write the report once every unit is done, whoever did it."""
    headers = [read_header(work.clips_file(u.id)) for u in plan.units]
    done = [h for u, h in zip(plan.units, headers, strict=True) if h and h.get("stamp") == u.stamp(settings)]
    if len(done) < len(plan.units):
        logger.info("preprocess: this part is done, %d units are left to others", len(plan.units) - len(done))
        return
    remove_leftovers(work.clips_dir, len(plan.units))
    files = [f for h in done for f in h["files"]] + [
        {"path": f.path, "speaker": f.speaker, "seconds_in": 0.0, "clips": 0, "seconds_out": 0.0, "reason": f.reason}
        for f in plan.excluded
    ]
    files.sort(key=lambda f: (f["speaker"], f["path"]))
    used = [f for f in files if f["clips"]]
    total_s = sum(f["seconds_in"] for f in used)
    report = {
        "total_dataset_duration": format_duration(total_s),
        "total_seconds": round(total_s, 3),
        "clips": sum(f["clips"] for f in used),
        "clip_seconds": round(sum(f["seconds_out"] for f in used), 3),
        "speakers": sorted({f["speaker"] for f in used}),
        "files_used": len(used),
        "files_left_out": len(files) - len(used),
        "files": files,
    }
    for file in files:
        if file["reason"]:
            logger.warning("preprocess: %s: %s", printable(file["path"]), file["reason"])
    if not used:
        # The report and the plan too: nothing may look like a finished stage.
        for path in [*unit_files(work.clips_dir), work.clips_report_file, work.plan_file]:
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


def format_duration(seconds: float) -> str:
    """HH:MM:SS, as voice files and reports write a dataset's length."""
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
