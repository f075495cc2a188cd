"""Decode, resample, filter, level and cut recordings. Shapes: S samples; every wave is mono [S] float32 in -1..1."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Wave = npt.NDArray[np.float32]

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff", ".aif")
"""What libsndfile decodes."""
OTHER_SUFFIXES = (".m4a", ".mp4", ".aac", ".alac", ".wma", ".webm", ".ac3", ".mka", ".mkv", ".mov", ".amr", ".ape")
"""Audio that libsndfile does not decode: named as such, since it is worth converting."""
SEEK_INEXACTLY = ("MP3", "OGG")
"""Formats of libsndfile that click where a second read begins."""
MIN_RATE, MAX_RATE = 4000, 768000
"""Sample rates in Hz outside these are damage."""
BLOCK = 1 << 20
"""Samples decoded or filtered at once."""
HIGHPASS_HZ = 48.0
LEVEL_PEAK, LEVEL_SHARE = 0.9, 0.75
"""normalise: this share of the wave scaled to this peak, the rest as it was."""
MAX_PEAK = 2.5
"""A clip with a higher peak is not audio in -1..1 and is dropped."""
SILENT_PEAK = 1e-3
SLICE_THRESHOLD_DB, SLICE_MIN_LENGTH_S, SLICE_MIN_INTERVAL_S = -42.0, 1.5, 0.4
SLICE_HOP_S, SLICE_MAX_SILENCE_S = 0.015, 0.5

MAX_HOURS = 100
"""A header that promises more is damaged, or that of a stream whose length was not known when it was written."""
_MP3_KBPS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0)
_MP3_KBPS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0)
_MP3_RATES = (44100, 48000, 32000, 0)


class AudioError(ValueError):
    """A recording cannot be used; the message is the reason, without the file's name."""


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open soundfile.SoundFile; whatever goes wrong in it, also later, is an AudioError."""
    import soundfile

    # Bytes, since soundfile refuses a name that is no UTF-8.
    name = str(path) if sys.platform == "win32" else os.fsencode(path)
    try:
        with soundfile.SoundFile(name) as file:
            if not MIN_RATE <= file.samplerate <= MAX_RATE:
                raise AudioError(f"sample rate of {file.samplerate} Hz, expected {MIN_RATE} to {MAX_RATE}")
            if file.frames <= 0:
                raise AudioError("holds no samples")
            if file.frames > MAX_HOURS * 3600 * file.samplerate:
                raise AudioError("a damaged header or a stream of unknown length; write it again (ffmpeg -i OLD NEW)")
            yield file
    except soundfile.LibsndfileError as error:
        why = error.error_string.removeprefix("Error : ").rstrip(".")
        if "not a regular file" in why and path.is_file():  # what libsndfile says of any mp3 that is none
            why = "Format not recognised"
        raise AudioError(f"not readable as audio ({why})") from error


def duration(path: Path) -> float:
    """Seconds of audio that the header promises.

    Raises:
        AudioError: libsndfile cannot read the file, or it holds no samples.
    """
    with _opened(path) as file:
        return int(file.frames) / int(file.samplerate)


def decode(path: Path) -> tuple[Wave, int]:
    """The mean of all channels [S] and the sample rate in Hz.

    Raises:
        AudioError: the file is damaged, empty, or has samples that are not numbers.
    """
    with _opened(path) as file:
        rate, is_mp3 = int(file.samplerate), file.format == "MP3"
        # Between two reads soundfile seeks, which an mp3 does not survive exactly: that is read at once.
        frames = int(file.frames) if is_mp3 else BLOCK
        parts = []
        while len(part := file.read(frames, dtype="float32", always_2d=True)):
            parts.append(_mono(part))
    wave: Wave = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if not len(wave):
        raise AudioError("holds no samples")
    if is_mp3 and (actual := _mp3_samples(path)) > len(wave) + rate // 2:
        # Without a length in its first frame libsndfile guesses one, and stops there.
        raise AudioError(
            f"an mp3 that does not say its length, of which only {len(wave) / rate:.1f} of {actual / rate:.1f} s "
            "would be read; convert it to wav or flac first"
        )
    return wave, rate


def _mono(samples: npt.NDArray[np.float32]) -> Wave:
    """The mean of all channels: [S, channels] -> [S]. Raises AudioError for samples that are not numbers."""
    if not np.isfinite(samples).all():
        raise AudioError("has samples that are not finite numbers")
    wave: Wave = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    return wave


def _mp3_samples(path: Path) -> int:
    """Samples in an mp3 without a length tag, counted frame by frame; 0 when it has the tag, or is irregular.

    Layer III: a frame is 1152 samples (MPEG-1) or 576 (MPEG-2, 2.5) in 144 or 72 * bit rate / sample rate bytes.
    """
    data = path.read_bytes()
    at = 0
    while data[at : at + 3] == b"ID3" and len(data) >= at + 10:
        size = data[at + 6 : at + 10]
        at += 10 + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3])
    if any(tag in data[at : at + 2048] for tag in (b"Xing", b"Info", b"VBRI")):
        return 0
    samples = 0
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] & 0xE6 == 0xE2:
        is_mpeg1 = data[at + 1] & 0x18 == 0x18
        kbps = (_MP3_KBPS_1 if is_mpeg1 else _MP3_KBPS_2)[data[at + 2] >> 4]
        rate = _MP3_RATES[data[at + 2] >> 2 & 3] >> {0x18: 0, 0x10: 1}.get(data[at + 1] & 0x18, 2)
        if not kbps or not rate:
            break
        at += (144000 if is_mpeg1 else 72000) * kbps // rate + (data[at + 2] >> 1 & 1)
        samples += 1152 if is_mpeg1 else 576
    return samples


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
    for start in range(0, len(wave), BLOCK):  # by blocks, since the filter works in float64
        filtered[start : start + BLOCK], state = sosfilt(sections, wave[start : start + BLOCK], zi=state)
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


def stream(path: Path, rate: int, block_s: float) -> Iterator[Wave]:
    """Decode a recording of any length block by block: mono [S] float32 at `rate`, about block_s seconds a block.

    An mp3 or ogg is one block, since it does not survive the seek between two reads.

    Raises:
        AudioError: the file is damaged, or has samples that are not numbers.
    """
    import soxr

    with _opened(path) as file:
        if file.format not in SEEK_INEXACTLY:
            resampler = soxr.ResampleStream(file.samplerate, rate, 1, dtype="float32", quality="VHQ")
            length = int(block_s * file.samplerate)
            last = False
            while not last:
                wave = _mono(file.read(length, dtype="float32", always_2d=True))
                last = len(wave) < length
                yield resampler.resample_chunk(wave, last=last)
            return
    whole, own_rate = decode(path)
    yield resample(whole, own_rate, rate)
