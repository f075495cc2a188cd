"""`rvc-dist dataset`: what a run's clips hold, by speaker: minutes, loudness, silence, pitch, and what was left out.

Reads the clips and, where there are any, the features, unit by unit; imports no torch. Levels are in dB below full
scale: 20 log10 of the root mean square, or of the peak. Folders of recordings are for raw_dataset.py.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Column
from safetensors import safe_open

from rvc_dist.config import Recipe
from rvc_dist.data.audio import SLICE_THRESHOLD_DB
from rvc_dist.data.clip_files import account, sum_lost
from rvc_dist.data.number_formats import float_wave
from rvc_dist.data.sources import is_corpus
from rvc_dist.features.feature_files import read_report
from rvc_dist.features.unvoiced import UnvoicedCount
from rvc_dist.tools.survey import survey
from rvc_dist.tools.tables import Columns, Figures, cells, console, plain_speakers, print_json, print_table, some
from rvc_dist.workspace import (
    ClipsHeader,
    FeaturesHeader,
    Shard,
    Speakers,
    StageError,
    Unit,
    WorkList,
    Workspace,
    printable,
    read_unit_file,
    unit_header,
)

FRAME_S = 0.02
"""Silence is counted in frames of this length: those below the level at which recordings are cut."""
BLOCK_FRAMES = 3000
"""Frames read at once: a minute."""
FLOOR_DB = -120.0
"""Stands for no sound at all, whose level has no logarithm."""
LOWEST_HZ = 16.351597831287414
"""C0, from which the cents of the histogram are counted: twelve-tone, A4 = 440 Hz."""
NUM_CENTS = 1200 * 9
"""Up to C9, above every pitch that a tracker may give."""
BAND_CENTS = 400
"""Width of a band of the printed histogram: a third of an octave."""
NOTES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
UNVOICED = {
    "zero": "",
    "interpolated": "Unvoiced frames have an interpolated pitch, as the features say (extract.unvoiced).",
    "interpolated, untold": "Unvoiced frames have an interpolated pitch, which the features do not say: import again.",
    "clipped": "Unvoiced frames have 50 Hz, as ARVC writes them: import again, which makes them 0.",
}
"""What is said of the pitch."""
ENOUGH_FRAMES = 1000
"""Of pitch, to tell from it alone what unvoiced frames have: whoever sings for 10 s may voice them all."""
MAX_LINES = 50
"""Lines of what was left out."""
BAR = 24
PIPED_WIDTH = 160

Counts = npt.NDArray[np.int64]


@dataclass
class Tally:
    """What is summed up of one speaker, or of all; bounded but for a number a clip and a name a recording."""

    recordings: Counter[str] = field(default_factory=Counter)
    """Those with clips; a long one is there in slices."""
    seconds_in: float = 0.0
    seconds: float = 0.0
    energy: float = 0.0
    """Of a full-scale square wave, one a second."""
    peaks: list[float] = field(default_factory=list)
    levels_db: list[float] = field(default_factory=list)
    """Of each clip, as `peaks`."""
    frames: int = 0
    silent_frames: int = 0
    f0_frames: int = 0
    unvoiced: UnvoicedCount = field(default_factory=UnvoicedCount)
    cents: Counts = field(default_factory=lambda: np.zeros(NUM_CENTS, np.int64))
    """Voiced frames by their pitch in cents above C0."""

    def add(self, other: Tally) -> None:
        self.recordings.update(other.recordings)  # in its place: a sum would be made anew for each of many speakers
        for name, value in vars(other).items():
            if name != "recordings":
                found = getattr(self, name)
                found += value
                setattr(self, name, found)


@dataclass(frozen=True)
class Band:
    """A third of an octave of the pitch histogram."""

    from_hz: float
    to_hz: float
    voiced_share: float


@dataclass(frozen=True)
class Summary:
    """What a run's dataset holds."""

    run: str
    sample_rate: int
    units: int
    missing_units: int
    """Of the work list's units, those that preprocess has yet to make."""
    units_without_features: int
    speakers: dict[int, Figures]
    known: Speakers
    total: Figures
    unvoiced: str
    """What unvoiced frames have: by UNVOICED. Only where they are 0 is a share of voiced ones told."""
    pitch: tuple[Band, ...]
    left_out: list[tuple[str, str]]
    """(recording, reason), also of recordings of which a part was left out."""
    seconds_in: float
    """Of all recordings."""
    lost: dict[str, float]
    """Seconds that are in no clip, by why."""

    def to_plain(self) -> dict[str, Any]:
        return asdict(self) | {
            "speakers": plain_speakers(self.speakers, self.known.names),
            "total": {"speaker": None, **self.total},
            "left_out": [{"path": printable(path), "reason": reason} for path, reason in self.left_out],
        }


def run(
    recipe: Recipe,
    shard: Shard,
    folders: list[str] | None = None,
    as_json: bool = False,
    surveys: bool = False,
) -> int:
    """Print the tables of run folders and folders of recordings on the first rank: by default of the recipe's.

    Raises:
        StageError: one of them has neither clips nor recordings.
    """
    if surveys:
        return run_survey(recipe, shard, folders or [recipe.data.audio_dir], as_json)
    if shard.array:
        raise StageError("dataset --shard:", "add --survey: what else it looks at is not split")
    if not shard.is_first:
        return 0
    has_recordings = not is_run(Path(recipe.run_dir)) and is_corpus(Path(recipe.data.audio_dir))
    default = recipe.data.audio_dir if has_recordings else recipe.run_dir
    out, summaries, looks = console(PIPED_WIDTH), list[Summary](), list[Any]()
    for folder in map(Path, folders or [default]):
        if is_run(folder) or not is_corpus(folder):
            summaries.append(summarise(folder))
        else:
            from rvc_dist.tools import raw_dataset  # late: it decodes

            looks.append(raw_dataset.look(recipe, folder))
    if as_json:
        print_json([found.to_plain() for found in (*summaries, *looks)])
    else:
        show_comparison(out, summaries)
        for summary in summaries:
            show(out, summary, with_pitch=len(summaries) == 1)
        for look in looks:
            look.show(out)
    return max((look.code for look in looks), key=(0, 3, 1).index, default=0)


def run_survey(recipe: Recipe, shard: Shard, folders: list[str], as_json: bool) -> int:
    """This process's share of the survey of one corpus, and its tables where all of it is known."""
    if len(folders) > 1 or is_run(Path(folders[0])):
        raise StageError(f"dataset --survey: got {', '.join(folders)};", "expected one corpus")
    found = survey(replace(recipe, data=replace(recipe.data, audio_dir=folders[0])), shard)
    if shard.is_first or shard.array:
        print_json(found.to_plain()) if as_json else found.show(console(PIPED_WIDTH))
    return 0


def is_run(folder: Path) -> bool:
    """Whether it is a run's, and not one of recordings."""
    work = Workspace(folder, "")
    return work.work_list_file.exists() or work.config_file.exists()


def summarise(root: Path) -> Summary:
    """Read all clips of a run folder and the f0 of its features.

    Raises:
        StageError: it has no clips.
    """
    work = Workspace(root, "")
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise StageError(f"{root} {what};", "expected a run folder, or a folder of recordings")
    work_list = WorkList.load(work.work_list_file)
    if work_list is None:
        raise StageError(f"{work.clips_dir} has no clips:", "run `rvc-dist preprocess` or `import` first")
    by_speaker: dict[int, Tally] = defaultdict(Tally)
    left_out = [(f.path, f.reason) for f in work_list.excluded]
    lost: list[dict[str, Any]] = []
    seconds_in = 0.0
    undone = {unit.id for unit in work_list.undone(work)}
    rate, bare = 0, 0
    for unit in work_list.units:
        if unit.id not in undone:
            header = unit_header(work.clips_file(unit.id), ClipsHeader, "preprocess")
            rate = header["sample_rate"]
            for file in header["files"]:
                if file["clips"]:
                    by_speaker[file["speaker"]].recordings[file["path"]] += 1
                    by_speaker[file["speaker"]].seconds_in += file["seconds_in"]
                if file["reason"]:
                    left_out.append((file["path"], file["reason"]))
                seconds_in += file["seconds_in"]
            lost.append({"lost": sum_lost(list(map(dict, header["files"])))})
            add_waves(by_speaker, work, unit, header)
            bare += not add_pitch(by_speaker, work, unit, header)
    if not by_speaker:
        raise StageError(
            f"{work.clips_dir} has no clips yet:", "run `rvc-dist preprocess` or `import` to its end first"
        )
    total = Tally()
    for tally in by_speaker.values():
        total.add(tally)
    unvoiced = unvoiced_in(work, total.unvoiced)
    return Summary(
        run=str(root),
        sample_rate=rate,
        units=len(work_list.units),
        missing_units=len(undone),
        units_without_features=bare,
        speakers={speaker: figures(tally, unvoiced) for speaker, tally in sorted(by_speaker.items())},
        known=work.speakers(),
        total=figures(total, unvoiced),
        unvoiced=unvoiced,
        pitch=bands(total.cents),
        left_out=left_out,
        seconds_in=seconds_in,
        lost=sum_lost(lost),
    )


def add_waves(by_speaker: dict[int, Tally], work: Workspace, unit: Unit, header: ClipsHeader) -> None:
    """Measure the clips of one unit."""
    rate = header["sample_rate"]
    frame = round(FRAME_S * rate)
    silent = 10.0 ** (SLICE_THRESHOLD_DB / 10.0)
    with safe_open(work.clips_file(unit.id), framework="numpy") as file:
        for i, clip in enumerate(header["clips"]):
            tally = by_speaker[clip["speaker"]]
            peak, energy, samples = 0.0, 0.0, 0
            for wave in blocks(file.get_slice(f"{i:05d}"), frame * BLOCK_FRAMES):
                square = np.square(wave, dtype=np.float64)
                peak = max(peak, float(np.abs(wave).max()))
                energy += float(square.sum())
                samples += len(wave)
                starts = np.arange(0, len(wave), frame)
                lengths = np.diff(starts, append=len(wave))
                tally.frames += len(starts)
                tally.silent_frames += int(np.count_nonzero(np.add.reduceat(square, starts) < silent * lengths))
            tally.seconds += samples / rate
            tally.energy += energy / rate
            tally.peaks.append(peak)
            tally.levels_db.append(decibels(energy / samples))


def blocks(wave: Any, length: int) -> Iterator[npt.NDArray[np.float32]]:
    """A wave in a safetensors file [S], at most `length` samples at once."""
    (total,) = wave.get_shape()
    for start in range(0, total, length):
        yield float_wave(wave[start : min(start + length, total)])


def decibels(power: float) -> float:
    """1 is that of a wave that is always at full scale."""
    return max(FLOOR_DB, 10.0 * math.log10(power)) if power > 0.0 else FLOOR_DB


def add_pitch(by_speaker: dict[int, Tally], work: Workspace, unit: Unit, clips_header: ClipsHeader) -> bool:
    """Count the f0 of one unit; False when it has no features of these clips."""
    path = work.features_file(unit.id)
    speakers = [c["speaker"] for c in clips_header["clips"]]
    found = read_unit_file(path)
    header = unit_header(path, FeaturesHeader, "extract", found) if found else None
    if header is None or [c["speaker"] for c in header["clips"]] != speakers:
        return False
    with safe_open(path, framework="numpy") as file:
        for i, speaker in enumerate(speakers):
            tally, f0 = by_speaker[speaker], file.get_tensor(f"{i:05d}.f0")
            voiced = f0[f0 > 0.0].astype(np.float64)
            cents = np.clip(np.round(1200.0 * np.log2(voiced / LOWEST_HZ)), 0, NUM_CENTS - 1).astype(np.int64)
            counts = np.bincount(cents)  # up to the highest of the clip
            tally.f0_frames += len(f0)
            tally.unvoiced += UnvoicedCount.of(f0)
            tally.cents[: len(counts)] += counts
    return True


def unvoiced_in(work: Workspace, counted: UnvoicedCount) -> str:
    """By UNVOICED, what the features' report says of the pitch, and what is counted where it says nothing."""
    report = read_report(work)
    if report and "extract.unvoiced" in report["settings"]:
        return "interpolated"
    found = counted.convention if counted.frames >= ENOUGH_FRAMES else "zero"
    return "interpolated, untold" if found == "interpolated" else found


def figures(tally: Tally, unvoiced: str) -> Figures:
    """Of one speaker, or of all."""
    return {
        "files": len(tally.recordings),
        "minutes_in": tally.seconds_in / 60,
        "clips": len(tally.levels_db),
        "minutes": tally.seconds / 60,
        "rms_db": decibels(tally.energy / tally.seconds) if tally.seconds else None,
        "clip_rms_db_p5": float(np.percentile(tally.levels_db, 5)),
        "clip_rms_db_p95": float(np.percentile(tally.levels_db, 95)),
        "peak_db": decibels(max(tally.peaks) ** 2),
        "silence_share": ratio(tally.silent_frames, tally.frames),
        "voiced_share": ratio(int(tally.cents.sum()), tally.f0_frames) if unvoiced == "zero" else None,
        "f0_hz_median": percentile(tally.cents, 0.5),
        "f0_hz_p5": percentile(tally.cents, 0.05),
        "f0_hz_p95": percentile(tally.cents, 0.95),
    }


def ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def percentile(cents: Counts, share: float) -> float | None:
    """The pitch in Hz below or at which `share` of the voiced frames are, to a cent; None when none is voiced."""
    total = int(cents.sum())
    return hz_of(int(np.searchsorted(np.cumsum(cents), max(1, math.ceil(share * total))))) if total else None


def hz_of(cents: int) -> float:
    return float(LOWEST_HZ * 2.0 ** (cents / 1200.0))


def bands(cents: Counts) -> tuple[Band, ...]:
    """The histogram in thirds of an octave, from the lowest band with voice to the highest."""
    shares = cents.reshape(-1, BAND_CENTS).sum(axis=1) / max(1, cents.sum())
    every = [Band(hz_of(i * BAND_CENTS), hz_of((i + 1) * BAND_CENTS), float(share)) for i, share in enumerate(shares)]
    used = np.flatnonzero(shares)
    return tuple(every[used[0] : used[-1] + 1]) if len(used) else ()


def note(hz: float) -> str:
    """The nearest note: 440 Hz -> A4."""
    semitone = round(12.0 * math.log2(hz / LOWEST_HZ))
    return f"{NOTES[semitone % 12]}{semitone // 12}"


def pitch_text(hz: float) -> str:
    """440 Hz A4."""
    return f"{hz:.0f} Hz {note(hz)}"


# Tables

SOUND: Columns = {
    "files": (str, "files"),
    "min in": ("{:.2f}".format, "minutes_in"),
    "clips": (str, "clips"),
    "min": ("{:.2f}".format, "minutes"),
    "RMS dB": ("{:.1f}".format, "rms_db"),
    "clips p5..p95": ("{:.1f} .. {:.1f}".format, "clip_rms_db_p5 clip_rms_db_p95"),
    "peak dB": ("{:.1f}".format, "peak_db"),
    "silence": ("{:.1%}".format, "silence_share"),
}
PITCH: Columns = {
    "voiced": ("{:.1%}".format, "voiced_share"),
    "f0 median": (pitch_text, "f0_hz_median"),
    "f0 p5": (pitch_text, "f0_hz_p5"),
    "f0 p95": (pitch_text, "f0_hz_p95"),
}


def show(out: Console, summary: Summary, with_pitch: bool) -> None:
    """The tables of one run, a row a speaker, its pitch histogram, and what was left out."""
    rows = {summary.known.label(speaker): figures for speaker, figures in summary.speakers.items()}
    if len(rows) > 1:
        rows["all"] = summary.total
    for title, columns in (f"{printable(summary.run)}: {summary.sample_rate} Hz", SOUND), ("Pitch", PITCH):
        if {*cells(summary.total, columns)} != {"-"}:
            print_table(out, ["speaker", *columns], ([s, *cells(f, columns)] for s, f in rows.items()), title)
    if told := UNVOICED[summary.unvoiced]:
        out.print(told)
    if summary.missing_units:
        out.print(
            f"{summary.missing_units} of {summary.units} units are not made yet: run `rvc-dist preprocess` to its end"
        )
    if summary.units_without_features:
        made = summary.units - summary.missing_units
        out.print(
            f"{summary.units_without_features} of {made} units have no features: `rvc-dist extract` gives the pitch"
        )
    if with_pitch:
        show_pitch(out, [summary])
    out.print(account(summary.seconds_in, summary.lost).capitalize(), soft_wrap=True)
    show_left_out(out, summary)


def show_comparison(out: Console, summaries: list[Summary]) -> None:
    """Totals of several runs side by side: a row a quantity, a column a run."""
    if len(summaries) < 2:
        return
    columns = [
        [
            f"{s.sample_rate} Hz",
            str(len(s.speakers)),
            *cells(s.total, SOUND | PITCH),
            s.unvoiced,
            str(len(s.left_out)),
            f"{sum(s.lost.values()) / 60:.2f}",
        ]
        for s in summaries
    ]
    names = ["sample rate", "speakers", *SOUND, *PITCH, "unvoiced frames", "left out, incomplete", "min in no clip"]
    rows = zip(names, *columns, strict=True)
    print_table(out, ["", *(printable(s.run) for s in summaries)], rows, "Compared, all speakers")
    show_pitch(out, summaries)


def show_pitch(out: Console, summaries: list[Summary]) -> None:
    """The pitch histogram, a row a third of an octave, with a bar a run."""
    shares = [{(b.from_hz, b.to_hz): b.voiced_share for b in s.pitch} for s in summaries]
    found = sorted({band for of_run in shares for band in of_run})
    highest = max((share for of_run in shares for share in of_run.values()), default=0.0)

    def bar(share: float) -> str:
        return f"{100 * share:5.1f}% {'█' * round(BAR * share / highest)}"

    if found:
        names = [printable(s.run) for s in summaries] if len(summaries) > 1 else ["share"]
        names_of = {(low, high): [f"{note(low)} .. {note(high)}", f"{low:.0f} .. {high:.0f}"] for low, high in found}
        rows = ([*cells, *(bar(of_run.get(band, 0.0)) for of_run in shares)] for band, cells in names_of.items())
        print_table(out, ["notes", "Hz", *map(Column, names)], rows, "Pitch of voiced frames")


def show_left_out(out: Console, summary: Summary) -> None:
    """What was left out, grouped by its reason, the most frequent first."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for path, reason in summary.left_out:
        by_reason[reason].append(path)
    if not by_reason:
        out.print("No recording was left out.")
        return
    out.print(f"Left out, or incomplete: {len(summary.left_out)}")
    ordered = sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))
    for reason, paths in ordered[:MAX_LINES]:
        out.print(f"  {len(paths):4d}  {reason}: {some(paths)}", soft_wrap=True)
    if len(ordered) > MAX_LINES:
        num_more = sum(len(paths) for _, paths in ordered[MAX_LINES:])
        out.print(f"  and {num_more} more, for {len(ordered) - MAX_LINES} other reasons")
