"""Recordings to clips: read a slice, clean, level and cut it, and account for every second. Nothing is written here.

Shapes: S samples; every wave is mono [S] float32 in -1..1.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rvc_dist.config import MAX_CLIP_FRAMES, Recipe
from rvc_dist.data import audio, decode
from rvc_dist.data.clip_files import file_entry, pieces
from rvc_dist.data.corpora import located
from rvc_dist.workspace import MAX_SLICE_S, SourceFile

if TYPE_CHECKING:
    from rvc_dist.data.denoise import NoiseGate

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


def make_gate(recipe: Recipe) -> NoiseGate | None:
    """What clean_dataset asks for."""
    if not recipe.preprocess.clean_dataset:
        return None
    from rvc_dist.data.denoise import NoiseGate  # the one part of this stage that needs torch

    return NoiseGate(recipe.data.sample_rate, recipe.preprocess.clean_strength)


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

    @property
    def clipped_share(self) -> float:
        return self.num_clipped / max(1, self.num)

    @property
    def offset(self) -> float:
        return self.total / max(1, self.num)

    def notes(self) -> Iterator[str]:
        if self.peak > audio.MAX_PEAK:  # no audio in -1..1, of which its clips tell
            return
        if self.clipped_share > CLIPPED_SHARE:
            yield f"clipped ({100 * self.clipped_share:.1f}% of its samples at full scale)"
        if abs(self.offset) > OFFSET:
            yield f"has a DC offset of {self.offset:.3f}"


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


def measure(audio_dir: Path, file: SourceFile) -> SourceFile:
    """`file` with its length and rate.

    Raises:
        AudioError: it cannot be read, or has not the part that is asked for; the message is the reason.
    """
    with located(audio_dir, file.path) as path, decode.opened(path) as recording:
        return placed(replace(file, rate=recording.rate), recording.duration_s)


def placed(file: SourceFile, length_s: float) -> SourceFile:
    """`file` with its place in the recording, which has `length_s`.

    Raises:
        AudioError: the recording has not that part.
    """
    try:
        return file.part_of(length_s)
    except ValueError as error:
        raise decode.AudioError(str(error)) from error


def read_slice(recipe: Recipe, file: SourceFile, levels: Levels, channel: int | None = None) -> Slice:
    """A slice of a recording: the mean of its channels, or `channel` alone, as is done where they cancel each other.

    Raises:
        AudioError: it cannot be read, or holds nothing.
    """
    with (
        located(Path(recipe.data.audio_dir), file.path) as path,
        decode.opened(path) as recording,
    ):
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


def cut_file(recipe: Recipe, file: SourceFile, gate: NoiseGate | None = None, levels: Levels | None = None) -> Outcome:
    """Decode, resample, filter, clean, level and cut one recording or slice, whose `levels` are kept while it is read.

    Raises:
        AudioError: it cannot be read; the message is the reason.
    """
    config, rate, levels = recipe.preprocess, recipe.data.sample_rate, levels or Levels()
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


def unreadable(file: SourceFile, error: decode.AudioError) -> Outcome:
    """What becomes of a recording, or slice, of which cut_file can read nothing."""
    return Outcome([], file.duration_s, {decode.UNREADABLE: file.duration_s}, str(error))


def entry_of(recipe: Recipe, file: SourceFile, outcome: Outcome) -> dict[str, Any]:
    """What is written down of a recording, or slice."""
    seconds_out = sum(len(clip.wave) for clip in outcome.clips) / recipe.data.sample_rate
    entry = file_entry(replace(file, reason=outcome.reason), outcome.seconds_in, outcome.lost)
    entry |= {"start_s": file.start_s, "clips": len(outcome.clips), "seconds_out": round(seconds_out, 3)}
    return entry | {"sample_rate": file.rate, "effective_rate": outcome.effective_rate}


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
