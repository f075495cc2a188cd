"""Decode, resample, filter, level and cut recordings. Shapes: S samples; every wave is mono [S] float32 in -1..1."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rvc_dist.decoding import Wave as Wave
from rvc_dist.decoding import mono, opened

HIGHPASS_HZ = 48.0
LEVEL_PEAK, LEVEL_SHARE = 0.9, 0.75
"""normalise: this share of the wave scaled to this peak, the rest as it was."""
MAX_PEAK = 2.5
"""A clip with a higher peak is not audio in -1..1 and is dropped."""
SILENT_PEAK = 1e-3
SLICE_THRESHOLD_DB, SLICE_MIN_LENGTH_S, SLICE_MIN_INTERVAL_S = -42.0, 1.5, 0.4
SLICE_HOP_S, SLICE_MAX_SILENCE_S = 0.015, 0.5
FILTER_BLOCK = 1 << 20
"""Samples filtered at once."""


class Resampler:
    """soxr in its very high quality (as librosa's soxr_vhq), block by block: the same bits as all at once."""

    def __init__(self, rate: int, new_rate: int) -> None:
        import soxr

        same = rate == new_rate
        self._stream = None if same else soxr.ResampleStream(rate, new_rate, 1, dtype="float32", quality="VHQ")

    def __call__(self, wave: Wave, last: bool = False) -> Wave:
        if self._stream is None:
            return wave
        return np.ascontiguousarray(self._stream.resample_chunk(wave, last=last), dtype=np.float32)


def resample(wave: Wave, rate: int, new_rate: int) -> Wave:
    """`wave` at `new_rate`, by soxr in its very high quality (as librosa's soxr_vhq)."""
    import soxr

    if rate == new_rate:
        return wave
    return np.ascontiguousarray(soxr.resample(wave, rate, new_rate, quality="VHQ"), dtype=np.float32)


@cache
def _highpass_sections(rate: int) -> Any:
    from scipy.signal import butter

    return butter(5, HIGHPASS_HZ, btype="highpass", fs=rate, output="sos")


def highpass(wave: Wave, rate: int) -> Wave:
    """Remove rumble and offset: a causal 5th-order Butterworth high-pass at 48 Hz."""
    from scipy.signal import sosfilt

    sections = _highpass_sections(rate)
    state = np.zeros((len(sections), 2))
    filtered = np.empty_like(wave)
    for start in range(0, len(wave), FILTER_BLOCK):  # by blocks, since the filter works in float64
        filtered[start : start + FILTER_BLOCK], state = sosfilt(sections, wave[start : start + FILTER_BLOCK], zi=state)
    return filtered


def normalise(wave: Wave) -> Wave:
    """x / max|x| * 0.9 * 0.75 + 0.25 x: most of the way to a common level, keeping some of the dynamics."""
    peak = float(np.abs(wave).max(initial=0.0))
    if peak < SILENT_PEAK:
        return wave
    return (wave * np.float32(LEVEL_PEAK * LEVEL_SHARE / peak + 1.0 - LEVEL_SHARE)).astype(np.float32)


def _window_samples(rate: int, chunk_s: float, overlap_s: float) -> tuple[int, int]:
    """Length and step of windows; rounded, since 0.3 - 0.1 is a little less than 0.2."""
    return round(chunk_s * rate), max(1, round((chunk_s - overlap_s) * rate))


def cut_windows(wave: Wave, rate: int, chunk_s: float, overlap_s: float) -> Iterator[tuple[int, Wave]]:
    """Windows of chunk_s every chunk_s - overlap_s while more than chunk_s + overlap_s remains; the rest is kept whole.

    Yields (first sample, samples).
    """
    chunk, step = _window_samples(rate, chunk_s, overlap_s)
    longest = round((chunk_s + overlap_s) * rate)
    start = 0
    while len(wave) - start > longest:
        yield start, wave[start : start + chunk]
        start += step
    yield start, wave[start:]


def cut_fixed(wave: Wave, rate: int, chunk_s: float, overlap_s: float) -> Iterator[tuple[int, Wave]]:
    """Windows of exactly chunk_s; an incomplete last one is dropped. Yields (first sample, samples)."""
    chunk, step = _window_samples(rate, chunk_s, overlap_s)
    for start in range(0, len(wave) - chunk + 1, step):
        yield start, wave[start : start + chunk]


def _frame_rms(wave: Wave, hop: int) -> npt.NDArray[np.float64]:
    """RMS of windows of four hops centred on every hop-th sample, the ends padded with zeros: [1 + S // hop]."""
    whole = len(wave) // hop
    blocks = wave[: whole * hop].reshape(whole, hop)
    rest = wave[whole * hop :].astype(np.float64)
    energy = np.zeros(whole + 4)  # of each hop's samples, with two empty hops before and one after
    for start in range(0, whole, 1024):
        part = blocks[start : start + 1024].astype(np.float64)
        energy[2 + start : 2 + start + len(part)] = np.einsum("ij,ij->i", part, part)
    energy[2 + whole] = rest @ rest
    rms: npt.NDArray[np.float64] = np.sqrt((energy[:-3] + energy[1:-2] + energy[2:-1] + energy[3:]) / (4 * hop))
    return rms


def cut_silences(wave: Wave, rate: int) -> list[tuple[int, Wave]]:
    """Cut at silences as audio-slicer does: runs of frames below -42 dB RMS of at least 400 ms.

    Inside the recording a silence counts only when it ends 1.5 s or more after the last cut. One of at most 500 ms is
    cut at its quietest frame; of a longer one the middle goes, and at most 500 ms stay on either side, up to the
    quietest frame there. At the beginning silence beyond 500 ms goes, at the end a silence of 400 ms or more beyond
    its quietest frame. A recording of at most 1.5 s stays whole.

    Returns [(first sample, samples)], empty when every frame is silent.
    """
    hop = round(SLICE_HOP_S * rate)
    rms = _frame_rms(wave, hop)
    silent = rms < 10.0 ** (SLICE_THRESHOLD_DB / 20.0)
    if silent.all():
        return []
    if -(-len(wave) // hop) <= round(SLICE_MIN_LENGTH_S * rate / hop):
        return [(0, wave)]
    return [(a * hop, wave[a * hop : b * hop]) for a, b in _sounding(rms, silent, rate / hop)]


def _sounding(
    rms: npt.NDArray[np.float64], silent: npt.NDArray[np.bool_], frames_per_s: float
) -> list[tuple[int, int]]:
    """What cut_silences keeps, as (first frame, last frame + 1)."""
    min_interval, keep = round(SLICE_MIN_INTERVAL_S * frames_per_s), round(SLICE_MAX_SILENCE_S * frames_per_s)
    min_length = round(SLICE_MIN_LENGTH_S * frames_per_s)

    def quietest(first: int, last: int) -> int:
        return first + int(np.argmin(rms[first : last + 1]))

    edges = np.flatnonzero(np.diff(np.concatenate([[False], silent, [False]]).astype(np.int8)))
    pieces: list[tuple[int, int]] = []
    begin, total = 0, len(rms)
    for first, last in edges.reshape(-1, 2).tolist():  # frames first .. last - 1 are silent
        length = last - first
        if first == 0:
            begin = quietest(last - keep, last) if length > keep else 0
        elif last == total:
            if length >= min_interval:
                return [*pieces, (begin, quietest(first, first + keep))]
        elif length >= min_interval and last - begin >= min_length:
            if length <= keep:
                stop = resume = quietest(first, last)
            else:
                stop, resume = quietest(first, first + keep), quietest(last - keep, last)
            pieces.append((begin, stop))
            begin = resume
    return [*pieces, (begin, total)]


def stream(path: Path, rate: int) -> Iterator[Wave]:
    """Decode a recording of any length block by block: mono [S] float32 at `rate`.

    Raises:
        AudioError: the file is damaged, or has samples that are not numbers.
    """
    with opened(path) as recording:
        resampler = Resampler(recording.rate, rate)
        for block in recording.blocks():
            yield resampler(mono(block))
        yield resampler(np.zeros(0, np.float32), last=True)
