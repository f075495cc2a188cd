"""The clips of a run: the settings that they depend on, the stages that make them, and the account of every second."""

from __future__ import annotations

import itertools
import logging
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rvc_dist.config import RATES, Recipe
from rvc_dist.data import audio
from rvc_dist.data.number_formats import stored_wave
from rvc_dist.data.parts import CUT
from rvc_dist.unit_stage import UnitStage, check_settings, in_threads
from rvc_dist.workspace import ClipsHeader, SourceFile, Unit, WorkList, Workspace, listed, printable

logger = logging.getLogger(__name__)

HEARD_RATE = 40000
"""Recordings of this rate in Hz and more lack nothing that is heard: 44100 is not below a voice of 48000."""
T = TypeVar("T")

SINCE: dict[str, Any] = {"preprocess.clip_format": "float32"}
"""Settings that came later, and what clips were made with before: it is left out, so that those are not stale."""
TOLD_FILES = 10
"""Recordings that are named of those whose reasons differ in numbers alone; the report has all."""
MAX_LISTED = 50_000
"""Files in a report: the headers of the units have all."""
TOLD_SLICES = 3
"""Of a recording, what is said of at most so many slices."""


class ClipStage(UnitStage[ClipsHeader]):
    """A stage that makes the clips of a work list."""

    folder = "clips"
    header = ClipsHeader

    def __init__(self, recipe: Recipe, work_list: WorkList) -> None:
        super().__init__(recipe, work_list.units)
        self.work_list = work_list

    def fingerprints(self, unit: Unit) -> tuple[str]:
        return (unit.fingerprint(self.work_list.made_with),)

    @abstractmethod
    def make_unit(self, unit: Unit) -> None:
        """Write the unit's clips, with what became of each of its recordings."""

    def pack(
        self, unit: Unit, clips: Sequence[tuple[dict[str, Any], audio.Wave]], files: list[dict[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The clips of a unit and their header, as `save_arrays` takes them; `files` are entries of its recordings."""
        (wanted,), rate = self.fingerprints(unit), self.recipe.data.sample_rate
        stored = [stored_wave(wave, self.recipe.preprocess.clip_format) for _, wave in clips]
        entries = [clip | ({"clipped": n} if n else {}) for (clip, _), (_, n) in zip(clips, stored, strict=True)]
        header = {"stamp": wanted, "sample_rate": rate, "clips": entries, "files": files}
        return {f"{i:05d}": wave for i, (wave, _) in enumerate(stored)}, header

    def make_units(self, units: Sequence[Unit]) -> None:
        """Several at a time."""
        # Decoders, the resampler and the filter release the interpreter lock, so threads are enough.
        in_threads(self.recipe.preprocess.num_workers, self.make_unit, units, self.name, "units")

    def clipped(self, headers: list[ClipsHeader]) -> dict[str, Any]:
        """What the report says of samples that the clips' format does not hold, which is logged; nothing of none."""
        found: Counter[str] = Counter()
        for clip in (clip for header in headers for clip in header["clips"]):
            found[clip["source"]] += clip.get("clipped", 0)
        samples = {path: count for path, count in found.most_common() if count}
        if samples:
            logger.warning(
                f"{self.name}: {sum(samples.values())} samples beyond full scale were clipped in {len(samples)} "
                "recordings: preprocess.clip_format float32 keeps them"
                + listed(((path, f"{count} samples") for path, count in samples.items()), TOLD_FILES)
            )
        return {"clipped_samples": dict(itertools.islice(samples.items(), MAX_LISTED))} if samples else {}

    def recordings(self, headers: list[ClipsHeader]) -> list[dict[str, Any]]:
        """What became of each recording, given the headers of all units; each reason is logged."""
        files = by_recording([dict(f) for h in headers for f in h["files"]], self.work_list.excluded)
        for alike in by_reason((file for file in files if file["reason"]), lambda file: str(file["reason"])):
            for file in alike[:TOLD_FILES]:
                logger.warning("%s: %s: %s", self.name, printable(file["path"]), file["reason"])
            if more := alike[TOLD_FILES:]:
                told = len(more), self.work.clips_report_file, more[0]["reason"]
                logger.warning("%s: and %d more (%s): %s", self.name, *told)
        return files


def by_reason(files: Iterable[T], reason: Callable[[T], str]) -> list[list[T]]:
    """`files` in groups; reasons that differ in numbers alone are one."""
    found: dict[str, list[T]] = {}
    for file in files:
        found.setdefault(re.sub("[0-9]+", "#", reason(file)), []).append(file)
    return list(found.values())


def finished(work: Workspace) -> WorkList | None:
    """The work list whose clips are all made and reported, or None."""
    if not work.clips_report_file.is_file():  # written last: ranks that poll read nothing else until then
        return None
    work_list = WorkList.load(work.work_list_file)
    return work_list if work_list is not None and not work_list.undone(work) else None


def complete(recipe: Recipe) -> bool | None:
    """True when every clip of the recipe's dataset is made and reported, else None (for `wait_for`)."""
    work_list = finished(Workspace(recipe.run_dir, recipe.name))
    settings = clip_settings(recipe), imported_clip_settings(recipe)
    return (work_list is not None and work_list.settings in settings) or None


def imported_clip_settings(recipe: Recipe) -> dict[str, Any]:
    """In the place of `clip_settings`, what the clips of an import depend on: they stay as the other tool cut them."""
    settings = {"imported": True, "data.audio_dir": recipe.data.audio_dir, "data.sample_rate": recipe.data.sample_rate}
    return settings | _newer(recipe)


def _newer(recipe: Recipe) -> dict[str, Any]:
    """The settings of SINCE that are not as before."""
    settings = {"preprocess.clip_format": recipe.preprocess.clip_format}
    return {key: value for key, value in settings.items() if value != SINCE[key]}


def clip_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that the bytes of a clip depend on, under their recipe keys."""
    p = recipe.preprocess
    settings = {
        "data.sample_rate": recipe.data.sample_rate,
        "preprocess.cut_method": p.cut_method,
        "preprocess.chunk_len": float(p.chunk_len),  # 3 and 3.0 are one setting
        "preprocess.overlap_len": float(p.overlap_len),
        "preprocess.process_effects": p.process_effects,
        "preprocess.normalization": p.normalization,
        "preprocess.clean": float(p.clean_strength) if p.clean_dataset else 0.0,
    }
    return settings | _newer(recipe) | ({"preprocess.loudness": p.loudness} if p.normalization == "lufs" else {})


def check_made(recipe: Recipe, work: Workspace) -> WorkList | None:
    """The run's work list, if it has one, unless its clips were made with other settings than the recipe's.

    Raises:
        StageError: they were.
    """
    if (work_list := WorkList.load(work.work_list_file)) is not None:
        remedy = "run `rvc-dist preprocess` and `extract` again"
        check_settings(work.clips_dir, SINCE | work_list.settings, SINCE | clip_settings(recipe), remedy)
    return work_list


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


def heard_rate(recipe: Recipe) -> int:
    """In Hz: recordings of a lower one lack something that the voice is to have."""
    return min(recipe.data.sample_rate, HEARD_RATE)


def low_rates(recipe: Recipe, recordings: list[tuple[int, float]]) -> tuple[str, str]:
    """What is to be said, and done, of those `recordings` (Hz, seconds) that hold less than the voice is to have."""
    wanted = recipe.data.sample_rate
    low = [(rate, seconds) for rate, seconds in recordings if rate < heard_rate(recipe)]
    if not low:
        return "", ""
    fitting = min((r for r in RATES[recipe.model.version] if r >= min(low)[0]), default=wanted)
    remedy = f"set data.sample_rate {fitting}, or " if fitting < wanted else ""
    text = _dull(low, [s for _, s in recordings], f"have a rate below data.sample_rate {wanted}, the lowest")
    return text, f"{remedy}give recordings of {wanted} Hz"


def upsampled_recordings(recipe: Recipe, files: list[dict[str, Any]]) -> str:
    """What is to be said of those recordings that hold less than their own rate, and the voice's, could."""
    limit = heard_rate(recipe)
    found = [f for f in files if 0 < f.get("effective_rate", 0) < min(f.get("sample_rate", 0), limit)]
    if not found:
        return ""
    rates = [(f["effective_rate"], f["seconds_in"]) for f in found]
    text = _dull(rates, [f["seconds_in"] for f in files], "were upsampled, the lowest from")
    held = [(f["path"], f"{f['sample_rate']} Hz, holds what {f['effective_rate']} Hz do") for f in found]
    return f"{text}; give others if there are{listed(held)}"


def _dull(low: list[tuple[int, float]], all_s: list[float], what: str) -> str:
    """What is to be said of recordings (Hz, seconds) of too low a rate, among those that take `all_s` seconds."""
    lowest, low_s = min(low)[0], sum(seconds for _, seconds in low)
    share = f"{len(low)} of {len(all_s)} recordings ({low_s / 60:.1f} of {sum(all_s) / 60:.1f} min)"
    return (
        f"{share} {what} {lowest} Hz: they hold nothing above {lowest // 2} Hz, and the voice learns to sound as dull"
    )


def cut_report(recipe: Recipe, files: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """RUN/clips/report.json of recordings that the recipe cuts, and what is to be warned of."""
    used = [f for f in files if f["clips"]]
    rates = [(f.get("sample_rate", recipe.data.sample_rate), f["seconds_in"]) for f in used]
    low, remedy = low_rates(recipe, rates)
    upsampled = upsampled_recordings(recipe, used)
    report = clips_report(files, sum(f["seconds_in"] for f in used)) | {"low_rates": low, "upsampled": upsampled}
    return report, [f"{low}; {remedy}"] * bool(low) + [upsampled] * bool(upsampled)


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
        **_listed(files),
    }


def _listed(files: list[dict[str, Any]]) -> dict[str, Any]:
    """Of more files than a JSON text should hold, those of which there is something to say, how many lack, and sums."""
    if len(files) <= MAX_LISTED:
        return {"files": files}
    shown = [file for file in files if file["reason"]][:MAX_LISTED]
    return {"files_not_listed": len(files) - len(shown), "files": shown, "of_speakers": of_speakers(files)}


def of_speakers(files: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each speaker with clips how many recordings have some, seconds in and out, and seconds in by rate in Hz."""
    found: dict[int, dict[str, Any]] = {}
    for file in (file for file in files if file["clips"]):
        speaker, rate = file["speaker"], str(file.get("sample_rate", 0))
        nothing = {"speaker": speaker, "recordings": 0, "seconds_in": 0.0, "seconds_out": 0.0, "rates": Counter()}
        sums = found.setdefault(speaker, nothing)
        sums["recordings"] += 1
        sums["seconds_in"] += file["seconds_in"]
        sums["seconds_out"] += file["seconds_out"]
        sums["rates"][rate] += file["seconds_in"]
    return [found[speaker] for speaker in sorted(found)]


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


def file_entry(file: SourceFile, seconds_in: float = 0.0, lost: dict[str, float] | None = None) -> dict[str, Any]:
    """The entry of a recording, or slice of one, of which there is no clip."""
    nothing = {"seconds_in": seconds_in, "clips": 0, "seconds_out": 0.0, "lost": lost or {}}
    return {"path": file.path, "speaker": file.speaker, **nothing, "reason": file.reason}


def by_recording(slices: list[dict[str, Any]], excluded: Iterable[SourceFile]) -> list[dict[str, Any]]:
    """The entries of slices summed up by recording, and of what was left out before, by speaker and name.

    What is said of a slice says where it begins.
    """
    files: dict[tuple[str, int], dict[str, Any]] = {}
    reasons: dict[tuple[str, int], list[tuple[float, str]]] = {}
    for part in slices:
        of = part["path"], part["speaker"]  # of a list several may speak in one recording
        entry = {k: v for k, v in part.items() if k not in ("start_s", "reason")}
        reasons.setdefault(of, []).append((part.get("start_s", 0.0), part["reason"]))
        known = files.setdefault(of, entry)
        if known is not entry:
            for key in ("seconds_in", "clips", "seconds_out"):
                known[key] = round(known[key] + part[key], 6)
            known["lost"] = sum_lost([known, part])
            known["effective_rate"] = max(e.get("effective_rate", 0) for e in (known, part))
    for of, found in reasons.items():
        told = [f"from {format_duration(at)}: {why}" if len(found) > 1 else why for at, why in sorted(found) if why]
        more = [f"and {len(told) - TOLD_SLICES} slices more"] if len(told) > TOLD_SLICES else []
        files[of]["reason"] = "; ".join(told[:TOLD_SLICES] + more)
    return sorted([*files.values(), *map(file_entry, excluded)], key=lambda f: (f["speaker"], f["path"]))


def format_duration(seconds: float) -> str:
    """HH:MM:SS, as voice files and reports write a dataset's length."""
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
