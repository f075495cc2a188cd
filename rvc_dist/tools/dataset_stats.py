"""`rvc-dist dataset`: what a run's clips hold, by speaker: minutes, loudness, silence, pitch, and what was left out.

Reads the clips and, where there are any, the features, unit by unit; imports no torch. Levels are in dB below full
scale: 20 log10 of the root mean square, or of the peak.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from rvc_dist.config import Recipe
from rvc_dist.data.audio import SLICE_THRESHOLD_DB
from rvc_dist.data.clip_files import account, sum_lost
from rvc_dist.workspace import (
    ClipsHeader,
    FeaturesHeader,
    Shard,
    StageError,
    Unit,
    WorkList,
    Workspace,
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
Figures = dict[str, float | None]
"""The numbers of one speaker, or of all, by QUANTITIES' keys; None where there is nothing to measure."""


@dataclass
class Tally:
    """What is summed up of one speaker, or of all; bounded but for a number a clip and a name a recording."""

    recordings: Counter[str] = field(default_factory=Counter)
    """Those with clips; a long one is there in slices."""
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
        peak = max(self.peak, other.peak)
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        self.peak = peak


class Quantity(NamedTuple):
    """What is said of one speaker, or of all."""

    column: str
    text: Callable[..., str]
    """Of its numbers, for a cell."""
    numbers: dict[str, Callable[[Tally], float | None]]
    """One or two, by their keys in the JSON."""

    def cell(self, figures: Figures) -> str:
        numbers = [figures[key] for key in self.numbers]
        return "-" if None in numbers else self.text(*numbers)


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
    total: Figures
    pitch: tuple[Band, ...]
    left_out: tuple[tuple[str, str], ...]
    """(recording, reason), also of recordings of which a part was left out."""
    seconds_in: float
    """Of all recordings."""
    lost: dict[str, float]
    """Seconds that are in no clip, by why."""


def run(recipe: Recipe, shard: Shard, runs: list[str] | None = None, as_json: bool = False) -> None:
    """Print the tables of `runs`, or of the recipe's run, on the first rank.

    Raises:
        StageError: one of them has no clips.
    """
    if not shard.is_first:
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
    plain["speakers"] = [{"speaker": speaker, **of_speaker} for speaker, of_speaker in summary.speakers.items()]
    plain["total"] = {"speaker": None, **summary.total}
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
        raise StageError(f"{root} {what};", "expected a run folder: rvc-dist dataset RUN")
    work_list = WorkList.load(work.work_list_file)
    if work_list is None:
        raise StageError(f"{work.clips_dir} has no clips:", "run `rvc-dist preprocess` or `import` first")
    by_speaker: dict[int, Tally] = {}
    left_out = [(f.path, f.reason) for f in work_list.excluded]
    rate, bare = 0, 0
    undone = work_list.undone(work)
    files: list[dict[str, Any]] = []
    for unit in work_list.units:
        if unit in undone:
            continue
        header = unit_header(work.clips_file(unit.id), ClipsHeader, "preprocess")
        rate = header["sample_rate"]
        files += map(dict, header["files"])
        for file in header["files"]:
            if file["reason"]:
                left_out.append((file["path"], file["reason"]))
            if file["clips"]:
                tally = by_speaker.setdefault(file["speaker"], Tally())
                tally.recordings[file["path"]] += 1
                tally.seconds_in += file["seconds_in"]
        add_waves(by_speaker, work, unit, header)
        bare += not add_pitch(by_speaker, work, unit, header)
    if not by_speaker:
        raise StageError(
            f"{work.clips_dir} has no clips yet:", "run `rvc-dist preprocess` or `import` to its end first"
        )
    total = Tally()
    for tally in by_speaker.values():
        total.add(tally)
    return Summary(
        run=str(root),
        sample_rate=rate,
        units=len(work_list.units),
        missing_units=len(undone),
        units_without_features=bare,
        speakers={speaker: figures(by_speaker[speaker]) for speaker in sorted(by_speaker)},
        total=figures(total),
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


def figures(tally: Tally) -> Figures:
    return {key: number(tally) for quantity in QUANTITIES for key, number in quantity.numbers.items()}


def level(tally: Tally, percent: float) -> float | None:
    """A percentile of the clips' levels in dB."""
    return float(np.percentile(tally.levels_db, percent)) if tally.levels_db else None


def ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


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


def pitch_text(hz: float) -> str:
    """440 Hz A4."""
    return f"{hz:.0f} Hz {note(hz)}"


# Tables

SOUND = (
    Quantity("files", str, {"files": lambda t: len(t.recordings)}),
    Quantity("min in", "{:.2f}".format, {"minutes_in": lambda t: t.seconds_in / 60}),
    Quantity("clips", str, {"clips": lambda t: len(t.levels_db)}),
    Quantity("min", "{:.2f}".format, {"minutes": lambda t: t.seconds / 60}),
    Quantity("RMS dB", "{:.1f}".format, {"rms_db": lambda t: decibels(t.energy, t.samples) if t.samples else None}),
    Quantity(
        "clips p5..p95",
        "{:.1f} .. {:.1f}".format,
        {"clip_rms_db_p5": lambda t: level(t, 5), "clip_rms_db_p95": lambda t: level(t, 95)},
    ),
    Quantity("peak dB", "{:.1f}".format, {"peak_db": lambda t: decibels(t.peak**2, 1) if t.samples else None}),
    Quantity("silence", "{:.1%}".format, {"silence_share": lambda t: ratio(t.silent_frames, t.frames)}),
)
PITCH = (
    Quantity("voiced", "{:.1%}".format, {"voiced_share": lambda t: ratio(int(t.cents.sum()), t.f0_frames)}),
    Quantity("f0 median", pitch_text, {"f0_hz_median": lambda t: percentile(t.cents, 0.5)}),
    Quantity("f0 p5", pitch_text, {"f0_hz_p5": lambda t: percentile(t.cents, 0.05)}),
    Quantity("f0 p95", pitch_text, {"f0_hz_p95": lambda t: percentile(t.cents, 0.95)}),
)
QUANTITIES = (*SOUND, *PITCH)


def _table(title: str, *columns: str, justify: Literal["left", "right"] = "right") -> Table:
    """The first column is the rows' names."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify=justify if i else "left")
    return table


def show(console: Console, summary: Summary, with_pitch: bool) -> None:
    """The tables of one run, a row a speaker, its pitch histogram, and what was left out."""
    rows = {str(speaker): of_speaker for speaker, of_speaker in summary.speakers.items()}
    if len(rows) > 1:
        rows["all"] = summary.total
    for title, quantities in (f"{printable(summary.run)}: {summary.sample_rate} Hz", SOUND), ("Pitch", PITCH):
        if quantities is PITCH and summary.total["voiced_share"] is None:
            continue
        table = _table(title, "speaker", *(q.column for q in quantities))
        for speaker, of_speaker in rows.items():
            table.add_row(speaker, *(q.cell(of_speaker) for q in quantities))
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
    table = _table("Compared, all speakers", "", *names)
    table.add_row("sample rate", *(f"{s.sample_rate} Hz" for s in summaries))
    table.add_row("speakers", *(str(len(s.speakers)) for s in summaries))
    for quantity in QUANTITIES:
        table.add_row(quantity.column, *(quantity.cell(s.total) for s in summaries))
    table.add_row("left out, incomplete", *(str(len(s.left_out)) for s in summaries))
    table.add_row("min in no clip", *(f"{sum(s.lost.values()) / 60:.2f}" for s in summaries))
    console.print(table)
    show_pitch(console, summaries)


def show_pitch(console: Console, summaries: list[Summary]) -> None:
    """The pitch histogram, a row a third of an octave, with a bar a run."""
    by_band = [{b.from_hz: b for b in s.pitch} for s in summaries]
    found = {hz: b for of_run in by_band for hz, b in of_run.items()}
    if not found:
        return
    names = [printable(s.run) for s in summaries] if len(summaries) > 1 else ["share"]
    table = _table("Pitch of voiced frames", "notes", "Hz", *names, justify="left")
    table.columns[1].justify = "right"
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
