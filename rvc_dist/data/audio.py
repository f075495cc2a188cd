"""Decode, resample, filter, level and cut recordings. Shapes: S samples; every wave is mono [S] float32 in -1..1."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from rvc_dist.data.decode import Recording, Samples, mono
from rvc_dist.data.decode import Wave as Wave

logger = logging.getLogger(__name__)

HIGHPASS_HZ = 48.0
LEVEL_PEAK, LEVEL_SHARE = 0.9, 0.75
"""normalise: this share of the wave scaled to this peak, the rest as it was."""
MAX_PEAK = 2.5
"""A clip with a higher peak is not audio in -1..1 and is dropped."""
SILENT_PEAK = 1e-3
SLICE_THRESHOLD_DB, SLICE_MIN_LENGTH_S, SLICE_MIN_INTERVAL_S = -42.0, 1.5, 0.4
SLICE_HOP_S, SLICE_MAX_SILENCE_S = 0.015, 0.5
SPEECH_PERCENTILE, NOISE_PERCENTILE, BELOW_SPEECH_DB, ABOVE_NOISE_DB = 95, 5, 24.0, 6.0
"""Of the levels of frames: where speech and noise are read off, and how far from them silence begins. Speech of -18 dB
and more is cut as the other tools cut it."""
MUTED_DB = -80.0
"""Frames below are digital silence, which is no noise of a room; and silence never begins below."""
CANCELS = "its channels cancel each other"
CANCELLING = 0.1
"""Of the energy that the mean of independent channels would have: one with less of it is no downmix."""
FILTER_BLOCK = 1 << 20
"""Samples filtered at once."""
UPSAMPLED_FROM = (8000, 11025, 12000, 16000, 22050, 24000)
"""Sample rates in Hz that recordings are looked at for having had once."""
UPSAMPLED_DB = 35.0
"""Power that is missing above half of such a rate, of that right below it. Of true recordings less than 10 are missing
up to 16000 Hz, and 27 up to 24000; of upsampled ones 40 and more, but of very quiet ones."""
SPECTRUM_SAMPLES, NUM_SPECTRA, BAND = 1024, 16, 8


class Resampler:
    """soxr in its very high quality (as librosa's soxr_vhq), block by block: the same bits as all at once.

    Blocks are [S], or [S, channels].
    """

    def __init__(self, rate: int, new_rate: int, channels: int = 1) -> None:
        import soxr

        same = rate == new_rate
        self._stream = None if same else soxr.ResampleStream(rate, new_rate, channels, dtype="float32", quality="VHQ")

    def __call__(self, wave: Wave, last: bool = False) -> Wave:
        if self._stream is None:
            return wave
        return np.ascontiguousarray(self._stream.resample_chunk(wave, last=last), dtype=np.float32)


class Downmix:
    """Blocks [S, channels] -> [S]: the mean of all channels, or one of them, counted from 0."""

    def __init__(self, channel: int | None = None) -> None:
        self.channel = channel
        self._mean_energy, self._energies = 0.0, np.zeros(1)

    def __call__(self, samples: Samples) -> Wave:
        if self.channel is not None:
            return mono(samples[:, self.channel : self.channel + 1])
        wave = mono(samples)
        if samples.shape[1] > 1:
            self._mean_energy += float(np.einsum("i,i->", wave, wave, dtype=np.float64))
            self._energies = self._energies + np.einsum("ij,ij->j", samples, samples, dtype=np.float64)
        return wave

    def loudest_of_cancelling(self) -> int | None:
        """The loudest channel when those heard so far cancel each other in their mean, as in reversed polarity."""
        independent = self._energies.sum() / len(self._energies) ** 2
        return int(np.argmax(self._energies)) if self._mean_energy < CANCELLING * independent else None


def resampled(blocks: Iterable[Samples], rate: int, new_rate: int, channels: int | None = None) -> Iterator[Samples]:
    """Blocks [S], or [S, channels], at `new_rate`, by a `Resampler`."""
    resampler = Resampler(rate, new_rate, channels or 1)
    for block in blocks:
        yield resampler(block)
    yield resampler(np.zeros((0, channels) if channels else 0, np.float32), last=True)


def resample(wave: Wave, rate: int, new_rate: int) -> Wave:
    """A whole wave at `new_rate`, by a `Resampler`."""
    return Resampler(rate, new_rate)(wave, last=True)


def highpass(wave: Wave, rate: int) -> Wave:
    """Remove rumble and offset: a causal 5th-order Butterworth high-pass at 48 Hz."""
    from scipy.signal import butter, sosfilt

    sections: Any = butter(5, HIGHPASS_HZ, btype="highpass", fs=rate, output="sos")
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


def effective_rate(wave: Wave, rate: int, own_rate: int) -> int:
    """The sample rate in Hz that holds all that is in a recording of `own_rate`: less where it was upsampled.

    Seen in a few spectra of it as a wave [S] of `rate`: above half of the rate that it once had nothing is left.
    """
    if len(wave) < SPECTRUM_SAMPLES:
        return own_rate
    starts = np.linspace(0, len(wave) - SPECTRUM_SAMPLES, NUM_SPECTRA).astype(np.int64)
    window = np.hanning(SPECTRUM_SAMPLES).astype(np.float32)
    spectra = np.fft.rfft(wave[starts[:, None] + np.arange(SPECTRUM_SAMPLES)] * window, axis=1)[:, :-1]
    power = np.einsum("ij,ij->j", spectra.real, spectra.real) + np.einsum("ij,ij->j", spectra.imag, spectra.imag)
    bands = power.reshape(-1, BAND).mean(axis=1)
    loudest_above = np.maximum.accumulate(bands[::-1])[::-1]
    share_above = 10.0 ** (-UPSAMPLED_DB / 10.0)
    for low in UPSAMPLED_FROM:
        if low >= 0.75 * min(rate, own_rate):
            break
        edge = low / 2 * SPECTRUM_SAMPLES / rate
        below = power[int(0.8 * edge) : int(0.94 * edge)].mean()
        if loudest_above[math.ceil(1.15 * edge / BAND)] < below * share_above:  # no resampler is steep
            return low
    return own_rate


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
    """Windows of chunk_s, the last one as long as what is left. Yields (first sample, samples).

    Other tools drop an incomplete last window, which is half of a recording of just less than two.
    """
    chunk, step = _window_samples(rate, chunk_s, overlap_s)
    for start in range(0, max(1, len(wave) - chunk + step), step):
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


def silence_db(rms: npt.NDArray[np.float64]) -> float:
    """The level in dB RMS below which frames [N] are silent: -42 dB, or less in a recording of soft speech.

    Less only by as much as the speech is softer than -18 dB, and not where the noise of the room is. What holds nothing
    but steady noise is all silent, if it is below -42 dB.
    """
    sounding = rms[rms >= 10.0 ** (MUTED_DB / 20.0)]
    if not len(sounding):
        return SLICE_THRESHOLD_DB
    noise, speech = 20.0 * np.log10(np.percentile(sounding, [NOISE_PERCENTILE, SPEECH_PERCENTILE]))
    return min(SLICE_THRESHOLD_DB, max(float(speech) - BELOW_SPEECH_DB, float(noise) + ABOVE_NOISE_DB, MUTED_DB))


def cut_silences(wave: Wave, rate: int) -> list[tuple[int, Wave]]:
    """Cut at silences as audio-slicer does: runs of at least 400 ms of frames below `silence_db`.

    Inside the recording a silence counts only when it ends 1.5 s or more after the last cut. One of at most 500 ms is
    cut at its quietest frame; of a longer one the middle goes, and at most 500 ms stay on either side, up to the
    quietest frame there. At the beginning silence beyond 500 ms goes, at the end a silence of 400 ms or more beyond
    its quietest frame. A recording of at most 1.5 s stays whole.

    Returns [(first sample, samples)], empty when every frame is silent.
    """
    hop = round(SLICE_HOP_S * rate)
    rms = _frame_rms(wave, hop)
    silent = rms < 10.0 ** (silence_db(rms) / 20.0)
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


def stream(recording: Recording, rate: int, keep_channels: bool = False) -> Iterator[Samples]:
    """Decode a recording of any length block by block at `rate`: mono [S] float32, or all channels [S, channels].

    Channels that cancel each other become one of the recording's notes; of a downmix the louder one is taken.

    Raises:
        AudioError: the file is damaged, or has samples that are not numbers.
    """
    downmix, channels = Downmix(), 1
    for block in recording.blocks():  # of several channels: whether they cancel is known at the end
        if (channels := block.shape[1]) == 1:
            break
        downmix(block)
    channel = downmix.loudest_of_cancelling()
    if channel is not None:
        note = f"{CANCELS} where they are mixed" if keep_channels else cancelling_note(channel)
        recording.notes = (*recording.notes, note)
    downmix, keeps = Downmix(channel), keep_channels and channels > 1
    blocks = recording.blocks() if keeps else map(downmix, recording.blocks())
    yield from resampled(blocks, recording.rate, rate, channels if keeps else None)


def cancelling_note(channel: int) -> str:
    return f"{CANCELS}: only channel {channel + 1} is taken"
