"""`rvc-dist dataset`: what a run's clips hold, by speaker: minutes, loudness, silence, pitch, and what was left out.

Reads the clips and, where there are any, the features, unit by unit; imports no torch. Levels are in dB below full
scale: 20 log10 of the root mean square, or of the peak.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rvc_dist.config import Recipe
from rvc_dist.data.audio import SLICE_THRESHOLD_DB
from rvc_dist.data.preprocess import account, sum_lost
from rvc_dist.workspace import (
    ClipsHeader,
    FeaturesHeader,
    Share,
    StageError,
    Unit,
    WorkList,
    Workspace,
    is_done,
    printable,
    read_header,
    unit_header,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

logger = logging.getLogger(__name__)

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
MAX_LINES = 50
"""Lines of what was left out."""
MAX_NAMES = 3
BAR = 24
PIPED_WIDTH = 160

Counts = npt.NDArray[np.int64]


@dataclass
class Tally:
    """What is summed up of one speaker, or of all; bounded but for one number a clip."""

    files: int = 0
    seconds_in: float = 0.0
    seconds: float = 0.0
    samples: int = 0
    energy: float = 0.0
    peak: float = 0.0
    frames: int = 0
    silent_frames: int = 0
    levels_db: list[float] = field(default_factory=list)
    """Of each clip."""
    f0_frames: int = 0
    cents: Counts = field(default_factory=lambda: np.zeros(NUM_CENTS, np.int64))
    """Voiced frames by their pitch in cents above C0."""

    def add(self, other: Tally) -> None:
        self.files += other.files
        self.seconds_in += other.seconds_in
        self.seconds += other.seconds
        self.samples += other.samples
        self.energy += other.energy
        self.peak = max(self.peak, other.peak)
        self.frames += other.frames
        self.silent_frames += other.silent_frames
        self.levels_db += other.levels_db
        self.f0_frames += other.f0_frames
        self.cents += other.cents


@dataclass(frozen=True)
class Figures:
    """The numbers of one speaker, or of all; None where there is nothing to measure."""

    speaker: int | None
    """None for all of them."""
    files: int
    minutes_in: float
    clips: int
    minutes: float
    rms_db: float | None
    """Of all samples."""
    clip_rms_db_p5: float | None
    clip_rms_db_p95: float | None
    peak_db: float | None
    silence_share: float | None
    voiced_share: float | None
    f0_hz_p5: float | None
    f0_hz_median: float | None
    f0_hz_p95: float | None


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
    speakers: tuple[Figures, ...]
    total: Figures
    pitch: tuple[Band, ...]
    left_out: tuple[tuple[str, str], ...]
    """(recording, reason), also of recordings of which a part was left out."""
    seconds_in: float
    """Of all recordings."""
    lost: dict[str, float]
    """Seconds that are in no clip, by why."""


def run(recipe: Recipe, share: Share, runs: list[str] | None = None, as_json: bool = False) -> None:
    """Print the tables of `runs`, or of the recipe's run, on the first rank.

    Raises:
        StageError: one of them has no clips.
    """
    if not share.is_first:
        return
    summaries = [summarise(Path(r)) for r in runs or [recipe.run_dir]]
    if as_json:
        text = json.dumps([to_plain(s) for s in summaries], indent=1, allow_nan=False)
        sys.stdout.write(text + "\n")
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False, markup=False)
    if len(summaries) > 1:
        show_comparison(console, summaries)
    for summary in summaries:
        show(console, summary, with_pitch=len(summaries) == 1)


def to_plain(summary: Summary) -> dict[str, Any]:
    plain = asdict(summary)
    plain["left_out"] = [{"path": printable(path), "reason": reason} for path, reason in summary.left_out]
    return plain


def summarise(root: Path) -> Summary:
    """Read all clips of a run folder and the f0 of its features.

    Raises:
        StageError: it has no clips.
    """
    work = Workspace(root, "")
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise StageError(f"{root} {what}; expected a run folder: rvc-dist dataset RUN")
    work_list = WorkList.load(work.work_list_file)
    if work_list is None:
        raise StageError(f"{work.clips_dir} has no clips: run `rvc-dist preprocess` or `import` first")
    by_speaker: dict[int, Tally] = {}
    recordings: dict[int, set[str]] = {}
    left_out = [(f.path, f.reason) for f in work_list.excluded]
    rate, missing, bare = 0, 0, 0
    files: list[dict[str, Any]] = []
    for unit in work_list.units:
        if not is_done(work.clips_file(unit.id), unit.stamp(work_list.settings)):
            missing += 1
            continue
        header = unit_header(work.clips_file(unit.id), ClipsHeader, "preprocess")
        rate = header["sample_rate"]
        files += map(dict, header["files"])
        for file in header["files"]:
            if file["reason"]:
                left_out.append((file["path"], file["reason"]))
            if file["clips"]:
                tally = by_speaker.setdefault(file["speaker"], Tally())
                recordings.setdefault(file["speaker"], set()).add(file["path"])  # a long one is there in slices
                tally.seconds_in += file["seconds_in"]
        add_waves(by_speaker, work, unit, header)
        bare += not add_pitch(by_speaker, work, unit, header)
    if not by_speaker:
        raise StageError(f"{work.clips_dir} has no clips yet: run `rvc-dist preprocess` or `import` to its end first")
    total = Tally()
    for speaker, tally in by_speaker.items():
        tally.files = len(recordings[speaker])
        total.add(tally)
    return Summary(
        run=str(root),
        sample_rate=rate,
        units=len(work_list.units),
        missing_units=missing,
        units_without_features=bare,
        speakers=tuple(figures(s, by_speaker[s]) for s in sorted(by_speaker)),
        total=figures(None, total),
        pitch=bands(total.cents),
        left_out=tuple(left_out),
        seconds_in=sum(f["seconds_in"] for f in files),
        lost=sum_lost(files),
    )


def add_waves(by_speaker: dict[int, Tally], work: Workspace, unit: Unit, header: ClipsHeader) -> None:
    """Measure the clips of one unit."""
    from safetensors import safe_open

    rate = header["sample_rate"]
    frame = round(FRAME_S * rate)
    silent = 10.0 ** (SLICE_THRESHOLD_DB / 10.0)
    with safe_open(work.clips_file(unit.id), framework="numpy") as file:
        for i, clip in enumerate(header["clips"]):
            tally = by_speaker[clip["speaker"]]
            energy, samples = 0.0, 0
            for wave in blocks(file.get_slice(f"{i:05d}"), frame * BLOCK_FRAMES):
                square = np.square(wave, dtype=np.float64)
                energy += float(square.sum())
                samples += len(wave)
                tally.peak = max(tally.peak, float(np.abs(wave).max()))
                power = np.add.reduceat(square, np.arange(0, len(wave), frame))
                lengths = np.full(len(power), frame)
                lengths[-1] = len(wave) - frame * (len(power) - 1)
                tally.frames += len(power)
                tally.silent_frames += int(np.count_nonzero(power < silent * lengths))
            tally.samples += samples
            tally.seconds += samples / rate
            tally.energy += energy
            tally.levels_db.append(decibels(energy, samples))


def blocks(wave: Any, length: int) -> Iterator[npt.NDArray[np.float32]]:
    """A wave in a safetensors file [S], at most `length` samples at once."""
    (total,) = wave.get_shape()
    for start in range(0, total, length):
        yield wave[start : min(start + length, total)]


def decibels(energy: float, samples: int) -> float:
    return max(FLOOR_DB, 10.0 * math.log10(energy / samples)) if energy > 0.0 else FLOOR_DB


def add_pitch(by_speaker: dict[int, Tally], work: Workspace, unit: Unit, clips_header: ClipsHeader) -> bool:
    """Count the f0 of one unit; False when it has no features of these clips."""
    from safetensors import safe_open

    path = work.features_file(unit.id)
    speakers = [c["speaker"] for c in clips_header["clips"]]
    header = unit_header(path, FeaturesHeader, "extract") if read_header(path) else None
    if header is None or [c["speaker"] for c in header["clips"]] != speakers:
        return False
    with safe_open(path, framework="numpy") as file:
        for i, speaker in enumerate(speakers):
            tally, f0 = by_speaker[speaker], file.get_tensor(f"{i:05d}.f0")
            voiced = f0[f0 > 0.0].astype(np.float64)
            cents = np.clip(np.round(1200.0 * np.log2(voiced / LOWEST_HZ)), 0, NUM_CENTS - 1).astype(np.int64)
            tally.f0_frames += len(f0)
            tally.cents += np.bincount(cents, minlength=NUM_CENTS)
    return True


def figures(speaker: int | None, tally: Tally) -> Figures:
    low, high = np.percentile(tally.levels_db, [5, 95]) if tally.levels_db else (None, None)
    p5, median, p95 = (percentile(tally.cents, share) for share in (0.05, 0.5, 0.95))
    return Figures(
        speaker=speaker,
        files=tally.files,
        minutes_in=tally.seconds_in / 60,
        clips=len(tally.levels_db),
        minutes=tally.seconds / 60,
        rms_db=decibels(tally.energy, tally.samples) if tally.samples else None,
        clip_rms_db_p5=None if low is None else float(low),
        clip_rms_db_p95=None if high is None else float(high),
        peak_db=decibels(tally.peak**2, 1) if tally.samples else None,
        silence_share=tally.silent_frames / tally.frames if tally.frames else None,
        voiced_share=int(tally.cents.sum()) / tally.f0_frames if tally.f0_frames else None,
        f0_hz_p5=p5,
        f0_hz_median=median,
        f0_hz_p95=p95,
    )


def percentile(cents: Counts, share: float) -> float | None:
    """The pitch in Hz below or at which `share` of the voiced frames are, to a cent; None when none is voiced."""
    total = int(cents.sum())
    if not total:
        return None
    at = int(np.searchsorted(np.cumsum(cents), max(1, math.ceil(share * total))))
    return float(LOWEST_HZ * 2.0 ** (at / 1200.0))


def bands(cents: Counts) -> tuple[Band, ...]:
    """The histogram in thirds of an octave, from the lowest band with voice to the highest."""
    counts = cents.reshape(-1, BAND_CENTS).sum(axis=1)
    used = np.flatnonzero(counts)
    if not len(used):
        return ()
    return tuple(
        Band(band_hz(b), band_hz(b + 1), float(counts[b] / counts.sum())) for b in range(used[0], used[-1] + 1)
    )


def band_hz(band: int) -> float:
    return float(LOWEST_HZ * 2.0 ** (band * BAND_CENTS / 1200.0))


def note(hz: float) -> str:
    """The nearest note: 440 Hz -> A4."""
    semitone = round(12.0 * math.log2(hz / LOWEST_HZ))
    return f"{NOTES[semitone % 12]}{semitone // 12}"


# Tables

Columns = dict[str, Callable[[Figures], str]]

SOUND: Columns = {
    "files": lambda f: str(f.files),
    "min in": lambda f: f"{f.minutes_in:.2f}",
    "clips": lambda f: str(f.clips),
    "min": lambda f: f"{f.minutes:.2f}",
    "RMS dB": lambda f: _number(f.rms_db),
    "clips p5..p95": lambda f: _span(f.clip_rms_db_p5, f.clip_rms_db_p95),
    "peak dB": lambda f: _number(f.peak_db),
    "silence": lambda f: _percent(f.silence_share),
}
PITCH: Columns = {
    "voiced": lambda f: _percent(f.voiced_share),
    "f0 median": lambda f: _pitch(f.f0_hz_median),
    "f0 p5": lambda f: _pitch(f.f0_hz_p5),
    "f0 p95": lambda f: _pitch(f.f0_hz_p95),
}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _span(low: float | None, high: float | None) -> str:
    return "-" if low is None else f"{_number(low)} .. {_number(high)}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _pitch(hz: float | None) -> str:
    return "-" if hz is None else f"{hz:.0f} Hz {note(hz)}"


def _table(title: str, first: str, columns: list[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def show(console: Console, summary: Summary, with_pitch: bool) -> None:
    """The tables of one run, a row a speaker, its pitch histogram, and what was left out."""
    rows = [*summary.speakers, *([summary.total] if len(summary.speakers) > 1 else [])]
    for title, columns in (f"{printable(summary.run)}: {summary.sample_rate} Hz", SOUND), ("Pitch", PITCH):
        if columns is PITCH and summary.total.voiced_share is None:
            continue
        table = _table(title, "speaker", list(columns))
        for row in rows:
            table.add_row("all" if row.speaker is None else str(row.speaker), *(cell(row) for cell in columns.values()))
        console.print(table)
    if summary.missing_units:
        console.print(
            f"{summary.missing_units} of {summary.units} units are not made yet: run `rvc-dist preprocess` to its end"
        )
    if summary.units_without_features:
        made = summary.units - summary.missing_units
        console.print(
            f"{summary.units_without_features} of {made} units have no features: `rvc-dist extract` gives the pitch"
        )
    if with_pitch:
        show_pitch(console, [summary])
    console.print(account(summary.seconds_in, summary.lost).capitalize(), soft_wrap=True)
    show_left_out(console, summary)


def show_comparison(console: Console, summaries: list[Summary]) -> None:
    """Totals of several runs side by side: a row a quantity, a column a run."""
    names = [printable(s.run) for s in summaries]
    table = _table("Compared, all speakers", "", names)
    table.add_row("sample rate", *(f"{s.sample_rate} Hz" for s in summaries))
    table.add_row("speakers", *(str(len(s.speakers)) for s in summaries))
    for title, cell in (SOUND | PITCH).items():
        table.add_row(title, *(cell(s.total) for s in summaries))
    table.add_row("left out, incomplete", *(str(len(s.left_out)) for s in summaries))
    table.add_row("min in no clip", *(f"{sum(s.lost.values()) / 60:.2f}" for s in summaries))
    console.print(table)
    show_pitch(console, summaries)


def show_pitch(console: Console, summaries: list[Summary]) -> None:
    """The pitch histogram, a row a third of an octave, with a bar a run."""
    from rich import box
    from rich.table import Table

    by_band = [{b.from_hz: b for b in s.pitch} for s in summaries]
    found = {hz: b for of_run in by_band for hz, b in of_run.items()}
    if not found:
        return
    table = Table(
        title="Pitch of voiced frames", title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0)
    )
    table.add_column("notes")
    table.add_column("Hz", justify="right")
    for summary in summaries:
        table.add_column(printable(summary.run) if len(summaries) > 1 else "share")
    highest = max(b.voiced_share for of_run in by_band for b in of_run.values())
    for hz in sorted(found):
        shares = [of_run[hz].voiced_share if hz in of_run else 0.0 for of_run in by_band]
        bars = [f"{100 * share:5.1f}% {'█' * round(BAR * share / highest)}" for share in shares]
        to_hz = found[hz].to_hz
        table.add_row(f"{note(hz)} .. {note(to_hz)}", f"{hz:.0f} .. {to_hz:.0f}", *bars)
    console.print(table)


def show_left_out(console: Console, summary: Summary) -> None:
    """What was left out, grouped by its reason, the most frequent first."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in summary.left_out:
        by_reason.setdefault(reason, []).append(printable(path))
    if not by_reason:
        console.print("No recording was left out.")
        return
    console.print(f"Left out, or incomplete: {len(summary.left_out)}")
    ordered = sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))
    for reason, paths in ordered[:MAX_LINES]:
        more = ", ..." if len(paths) > MAX_NAMES else ""
        console.print(f"  {len(paths):4d}  {reason}: {', '.join(paths[:MAX_NAMES])}{more}", soft_wrap=True)
    if len(ordered) > MAX_LINES:
        num_more = sum(len(paths) for _, paths in ordered[MAX_LINES:])
        console.print(f"  and {num_more} more, for {len(ordered) - MAX_LINES} other reasons")
