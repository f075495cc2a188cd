"""`rvc-dist dataset DIR` on recordings: what they are like, and what `rvc-dist preprocess` would keep of them.

Each is read and cut in slices, as that stage does it, and nothing is written: the seconds are those that the stage will
have, and memory does not depend on a recording's length. Levels are in dB RMS below full scale, as heard: before
anything is filtered or levelled.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column

from rvc_dist.config import MAX_CLIP_FRAMES, Recipe
from rvc_dist.data import audio, cutting, decode
from rvc_dist.data.clip_files import account, by_recording, clip_settings, cut_report, heard_rate
from rvc_dist.data.parts import CUT
from rvc_dist.data.sources import read_corpus
from rvc_dist.screen import AUDIO, ProgressBar
from rvc_dist.tools.tables import Columns, Figures, cells, plain_speakers, print_table, say, some
from rvc_dist.unit_stage import in_threads
from rvc_dist.workspace import SourceFile, Speakers, Workspace, printable

FRAME_S = 0.02
LOWEST_DB, STEPS_A_DB, NUM_LEVELS = -120, 2, 280
"""Frames are counted by their level in steps of half a dB, from the lowest on."""
UNEVEN_DB = 10.0
"""A recording whose speech is so far from its speaker's usual level is named."""
MAX_LINES = 30
EXIT_FAILED, EXIT_WARNED = 1, 3


class Loudness(cutting.Levels):
    """The levels of a recording of `rate`, and how many frames of 20 ms have which, all channels taken together."""

    def __init__(self, rate: int) -> None:
        super().__init__()
        self.frame = max(1, round(FRAME_S * rate))
        self.counts = np.zeros(NUM_LEVELS, np.int64)
        self.longest_clip = 0
        """In samples at the voice's rate."""
        self._rest = np.zeros((0, 1), np.float32)

    def add(self, samples: decode.Samples) -> None:
        super().add(samples)
        samples = np.concatenate([self._rest.reshape(-1, samples.shape[1]), samples])
        whole = len(samples) // self.frame * self.frame
        self._rest = samples[whole:]
        frames = samples[:whole].reshape(-1, self.frame, samples.shape[1])
        power = np.nan_to_num(frames.var(axis=1, dtype=np.float64).mean(axis=1), posinf=0.0)  # but for an offset
        levels_db = 10.0 * np.log10(power.clip(1e-12))
        steps = np.rint(STEPS_A_DB * (levels_db - LOWEST_DB)).astype(np.int64).clip(0, NUM_LEVELS - 1)
        self.counts += np.bincount(steps, minlength=NUM_LEVELS)

    def merge(self, other: Loudness) -> None:
        """Take in another slice of the same recording."""
        self.peak, self.longest_clip = max(self.peak, other.peak), max(self.longest_clip, other.longest_clip)
        for name in ("total", "num", "num_clipped", "counts"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def level_db(self, percentile: float) -> float | None:
        """Of its frames but for digital silence; None where it has no others."""
        counts = self.counts.copy()
        counts[: round(STEPS_A_DB * (audio.MUTED_DB - LOWEST_DB))] = 0
        if not counts.any():
            return None
        return float(np.searchsorted(np.cumsum(counts), percentile / 100 * counts.sum()) / STEPS_A_DB + LOWEST_DB)


@dataclass
class Recording:
    """What is known of one; `file` is its entry, as in the report of preprocess."""

    file: dict[str, Any]
    is_audio: bool
    """By its name and kind it is to be a recording."""
    speech_db: float | None = None
    """A twentieth of its frames is louder."""
    noise_db: float | None = None
    """A twentieth of its frames is quieter."""
    off_db: float | None = None
    """`speech_db` less its median over the speaker's recordings."""
    clipped_share: float = 0.0
    offset: float = 0.0
    has_long_clips: bool = False

    @property
    def path(self) -> str:
        return printable(self.file["path"])

    @property
    def kept_s(self) -> float:
        """Seconds that are in clips, each counted once."""
        return float(self.file["seconds_in"] - sum(self.file["lost"].values()))

    def measure(self, levels: Loudness | None, longest_clip: int) -> None:
        """Take over what its samples tell; training makes use of clips up to the longest."""
        if levels is not None:
            self.speech_db = levels.level_db(audio.SPEECH_PERCENTILE)
            self.noise_db = levels.level_db(audio.NOISE_PERCENTILE)
            self.clipped_share, self.offset = levels.clipped_share, levels.offset
            self.has_long_clips = levels.longest_clip > longest_clip

    def problems(self, low: int) -> list[str]:
        """Of PROBLEMS, those that it has, for a voice that lacks something below the rate of `low` Hz."""
        file, lost = self.file, self.file["lost"]
        main = "" if file["clips"] else max(lost, key=lambda why: float(lost[why]), default=decode.UNREADABLE)
        rate, holds = file.get("sample_rate", 0), file.get("effective_rate", 0)
        found = {
            "no recording": not self.is_audio,
            "unreadable": self.is_audio and main == decode.UNREADABLE,
            "damaged": not main and not lost.keys().isdisjoint((decode.UNREADABLE, decode.GAP)),
            "cut short": CUT in lost,
            "silent": main == cutting.SILENCE,
            "too short": main == cutting.SHORT,
            "too long": self.has_long_clips,
            "low rate": 0 < rate < low,
            "upsampled": 0 < holds < min(rate, low),
            "clipped": self.clipped_share > cutting.CLIPPED_SHARE,
            "beyond full scale": cutting.LOUD in lost,
            "channels cancel": audio.CANCELS in file["reason"],
            "noisy": not main and self.noise_db is not None and self.noise_db > audio.SLICE_THRESHOLD_DB,
            "uneven": self.off_db is not None and abs(self.off_db) >= UNEVEN_DB,
            "offset": abs(self.offset) > cutting.OFFSET,
        }
        return [name for name, is_there in found.items() if is_there]


PROBLEMS = {
    "unreadable": "nothing in it can be read",
    "damaged": "parts of it cannot be read",
    "cut short": "it ends before its header says",
    "silent": "nothing in it is loud enough",
    "too short": f"all of it is {cutting.SHORT}",
    "too long": "training uses a part of its clips alone",
    "low rate": "of a lower sample rate than the voice",
    "upsampled": "it holds no more than a lower rate does",
    "clipped": f"over {cutting.CLIPPED_SHARE:.1%} of its samples are at full scale",
    "beyond full scale": f"parts have a {cutting.LOUD} and are dropped",
    "channels cancel": "one channel alone is taken",
    "noisy": f"hardly ever below {audio.SLICE_THRESHOLD_DB:.0f} dB: noise, or no pauses",
    "uneven": f"speech over {UNEVEN_DB:.0f} dB off the speaker's usual level",
    "offset": "its mean is not 0; process_effects mends that",
    "no recording": "something else in the folder",
}
"""What a recording may have, in the order in which it is shown."""
HARMLESS = ("offset", "no recording")


@dataclass(frozen=True)
class Look:
    """What a folder of recordings holds, and what the recipe would make of it."""

    folder: str
    settings: dict[str, Any]
    recordings: list[Recording]
    problems: dict[str, list[Recording]]
    """By their name in PROBLEMS."""
    known: Speakers
    report: dict[str, Any]
    """As preprocess would write it."""
    warnings: list[str]
    about: str = ""
    """What the corpus was recognised as, and what was left out of it by rule."""

    @property
    def code(self) -> int:
        """Of the exit: 1 where nothing would be kept, 3 where there is something to look after."""
        if not self.report["clips"]:
            return EXIT_FAILED
        return EXIT_WARNED if self.problems.keys() - set(HARMLESS) else 0

    def show(self, out: Console) -> None:
        """Speakers, rates, problems, what is said of each recording, and what the recipe would keep."""
        groups = {self.known.label(speaker): group for speaker, group in speakers_of(self.recordings).items()}
        if self.about:
            say(out, self.about)
        every = [recording for group in groups.values() for recording in group]
        if len(groups) > MAX_LINES:
            say(out, f"The first {MAX_LINES} of {len(groups)} speakers; --json has all of them")
            groups = dict(islice(groups.items(), MAX_LINES))
        if len(groups) > 1:
            groups["all"] = every
        if groups:
            rows = ([name, *cells(figures(group), COLUMNS)] for name, group in groups.items())
            print_table(out, ["speaker", *COLUMNS], rows, f"{printable(self.folder)}: recordings, not cut yet")
        say(out, f"Sample rates: {rates_of(self.recordings)}; the voice's is {self.settings['data.sample_rate']} Hz")
        if self.problems:
            rows = (
                [name, str(len(those)), f"{minutes_of(those):.2f}", PROBLEMS[name], some([r.path for r in those])]
                for name, those in self.problems.items()
            )
            print_table(out, ["problem", "files", "min", Column("what it is"), Column("which")], rows, "Problems")
        reasons = [f"  {r.path}: {r.file['reason']}" for r in self.recordings if r.file["reason"]]
        more = [f"  and {len(reasons) - MAX_LINES} more, which --json has"] if len(reasons) > MAX_LINES else []
        warnings = [f"{warning[0].upper()}{warning[1:]}" for warning in self.warnings]
        report = self.report
        kept = f"The recipe would make {report['clips']} clips: {account(report['seconds_in'], report['lost'])}"
        for line in (*reasons[:MAX_LINES], *more, *warnings, kept):
            say(out, line)

    def to_plain(self) -> dict[str, Any]:
        groups = speakers_of(self.recordings)
        return {
            "folder": self.folder,
            "corpus": self.about,
            "settings": self.settings,
            "speakers": plain_speakers({i: figures(group) for i, group in groups.items()}, self.known.names),
            "total": {"speaker": None, **figures([r for group in groups.values() for r in group])},
            "problems": [
                {"name": name, "about": PROBLEMS[name], "recordings": [r.path for r in those]}
                for name, those in self.problems.items()
            ],
            **{key: value for key, value in self.report.items() if key not in ("files", "speakers")},
            "recordings": [
                {**r.file, "path": r.path, **{k: v for k, v in vars(r).items() if k != "file"}} for r in self.recordings
            ],
        }


def look(recipe: Recipe, folder: Path) -> Look:
    """Read every recording below `folder`, and cut it as the recipe says; nothing is written.

    Raises:
        StageError: it holds none, or its folders name the speakers in several ways.
    """
    is_own = folder.resolve() == Path(recipe.data.audio_dir).resolve()
    recipe = replace(recipe, data=replace(recipe.data, audio_dir=str(folder)))
    corpus = read_corpus(folder, Workspace(recipe.run_dir, recipe.name) if is_own else None)
    sources, known = corpus.sources, corpus.speakers
    entries, levels = heard(recipe, sources)
    foreign = {file.path for file in sources if file.reason and is_foreign(Path(file.path))}
    longest = MAX_CLIP_FRAMES * recipe.rate_spec.hop
    recordings = [Recording(entry, entry["path"] not in foreign) for entry in entries]
    for recording in recordings:
        recording.measure(levels.get((recording.file["path"], recording.file["speaker"])), longest)
    for group in speakers_of([r for r in recordings if r.file["clips"]]).values():
        levels_db = [r.speech_db for r in group if r.speech_db is not None]
        for recording in group:
            if recording.speech_db is not None:
                recording.off_db = recording.speech_db - statistics.median(levels_db)
    report, warnings = cut_report(recipe, entries)
    of_each = [(recording, recording.problems(heard_rate(recipe))) for recording in recordings]
    found = {name: [recording for recording, names in of_each if name in names] for name in PROBLEMS}
    problems = {name: those for name, those in found.items() if those}
    return Look(str(folder), clip_settings(recipe), recordings, problems, known, report, warnings, corpus.about)


def heard(recipe: Recipe, sources: list[SourceFile]) -> tuple[list[dict[str, Any]], dict[tuple[str, int], Loudness]]:
    """The entry of each recording, as in the report of preprocess; and the levels of those that can be read, by path
    and speaker.
    """
    folder, workers, gate = Path(recipe.data.audio_dir), recipe.preprocess.num_workers, cutting.make_gate(recipe)

    def measured(file: SourceFile) -> SourceFile:
        try:
            return file if file.reason else cutting.measure(folder, file)
        except (decode.AudioError, OSError) as error:
            return file.refused(str(error))

    def cut(file: SourceFile) -> tuple[dict[str, Any], Loudness]:
        levels = Loudness(file.rate)
        try:
            outcome = cutting.cut_file(recipe, file, gate, levels)
        except decode.AudioError as error:
            outcome = cutting.unreadable(file, error)
        levels.longest_clip = max((len(clip.wave) for clip in outcome.clips), default=0)
        bar.advance(file.duration_s, not outcome.clips)
        return cutting.entry_of(recipe, file, outcome), levels

    files = in_threads(workers, measured, sources, "dataset: lengths", "recordings")
    parts = [part for file in files if not file.reason for part in file.slices()]
    with ProgressBar("dataset", sum(part.duration_s for part in parts), AUDIO) as bar:
        slices = in_threads(workers, cut, parts, "dataset", "slices")
    levels: dict[tuple[str, int], Loudness] = {}
    for entry, of_slice in slices:
        levels.setdefault((entry["path"], entry["speaker"]), Loudness(1)).merge(of_slice)
    return by_recording([entry for entry, _ in slices], [file for file in files if file.reason]), levels


def is_foreign(path: Path) -> bool:
    """Whether a file is to be no recording, by its name."""
    return path.name.startswith(".") or (path.suffix != "" and path.suffix.lower() not in decode.AUDIO_SUFFIXES)


def figures(group: Sequence[Recording]) -> Figures:
    """The numbers of a speaker, or of all."""
    used = [r for r in group if r.file["clips"]]
    speech, noise = ([db for r in used if (db := getattr(r, name)) is not None] for name in ("speech_db", "noise_db"))
    seconds = [r.file["seconds_in"] for r in group]
    return {
        "recordings": len(group),
        "minutes": minutes_of(group),
        "shortest_s": min(seconds, default=None),
        "longest_s": max(seconds, default=None),
        "kept_minutes": sum(r.kept_s for r in group) / 60,
        "clips": sum(r.file["clips"] for r in group),
        "speech_db_p5": float(np.percentile(speech, 5)) if speech else None,
        "speech_db_p95": float(np.percentile(speech, 95)) if speech else None,
        "noise_db": statistics.median(noise) if noise else None,
    }


COLUMNS: Columns = {
    "files": (str, "recordings"),
    "min": ("{:.2f}".format, "minutes"),
    "shortest..longest s": ("{:.1f} .. {:.1f}".format, "shortest_s longest_s"),
    "kept min": ("{:.2f}".format, "kept_minutes"),
    "clips": (str, "clips"),
    "speech dB p5..p95": ("{:.1f} .. {:.1f}".format, "speech_db_p5 speech_db_p95"),
    "noise dB": ("{:.1f}".format, "noise_db"),
}


def speakers_of(recordings: Sequence[Recording]) -> dict[int, list[Recording]]:
    """Those that hold sound, by whose they are."""
    found: dict[int, list[Recording]] = defaultdict(list)
    for recording in recordings:
        if recording.file["seconds_in"]:
            found[recording.file["speaker"]].append(recording)
    return dict(sorted(found.items()))


def minutes_of(recordings: Sequence[Recording]) -> float:
    return float(sum(r.file["seconds_in"] for r in recordings)) / 60


def rates_of(recordings: Sequence[Recording]) -> str:
    seconds: dict[int, list[float]] = defaultdict(list)
    for recording in recordings:
        if recording.file["seconds_in"]:
            seconds[recording.file["sample_rate"]].append(recording.file["seconds_in"])
    return ", ".join(f"{rate} Hz {len(s)} ({sum(s) / 60:.1f} min)" for rate, s in sorted(seconds.items())) or "none"
