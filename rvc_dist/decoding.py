"""Open recordings of every format and read any part of them: libsndfile where it can, PyAV (ffmpeg) for the rest.

Shapes: S samples. Whatever is wrong with a file is an AudioError, and memory does not depend on its length.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]
"""[S, channels]"""
Wave = npt.NDArray[np.float32]
"""[S], mono"""

SNDFILE_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff", ".aif")
"""What libsndfile decodes."""
AV_SUFFIXES = (".m4a", ".mp4", ".aac", ".alac", ".wma", ".webm", ".ac3", ".mka", ".mkv", ".mov", ".amr", ".caf")
"""What needs PyAV."""
AUDIO_SUFFIXES = SNDFILE_SUFFIXES + AV_SUFFIXES
CONTAINERS = "mov,matroska,asf,wav,w64,flac,ogg,aiff,caf"
"""ffmpeg's readers that know their files by a signature. The others would hear music in any bytes, and playlists would
open files and addresses that somebody else wrote down."""
RAW_STREAMS = {".aac": "aac", ".ac3": "ac3,eac3", ".mp3": "mp3", ".amr": "amr"}
"""Streams without a container: believed only of files that are named so. Their header's length is a guess."""
FORGETFUL = ("MP3", "OGG")
"""Formats of libsndfile that click where a read begins that is not the first."""
MIN_RATE, MAX_RATE = 4000, 768000
"""Sample rates in Hz outside these are damage."""
BLOCK, FORGETFUL_BLOCK = 1 << 20, 1 << 24
"""Numbers (samples times channels) decoded at once."""
PREROLL_S = 1.0
"""Lossy decoders start this much before what is wanted, since they need some frames to settle."""
MAX_HOURS = 100
"""A header that promises more is damaged, or that of a stream whose length was not known when it was written."""
BOMB_SECONDS, BOMB_BYTES_PER_S = 600.0, 250.0
"""A longer file with fewer bytes a second is silence, or has a damaged header: speech takes 600 and more."""
UNREADABLE, GAP = "unreadable", "gap in its time stamps"
"""Why a decoder does not give seconds that a recording holds."""
_MP3_KBPS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0)
_MP3_KBPS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0)
_MP3_RATES = (44100, 48000, 32000, 0)


class AudioError(ValueError):
    """A recording cannot be used; the message is the reason, without the file's name."""


class MissingDecoderError(AudioError):
    """The recording may be good: a package is missing that decodes it."""


class Recording(ABC):
    """An open recording. `duration_s` is what its header promises."""

    rate: int
    duration_s: float
    lost: list[tuple[float, str]]
    """Seconds that it holds and that the last reading of `blocks` did not give, each with UNREADABLE or GAP."""

    def blocks(self, start_s: float = 0.0, num_samples: int | None = None) -> Iterator[Samples]:
        """Samples from start_s on, to the end or so many, block by block: [S, channels] float32, full scale at 1."""
        self.lost = []
        blocks, left = self._blocks(start_s, num_samples), num_samples
        with contextlib.closing(blocks):
            for block in blocks:
                part = block[:left]
                left = left - len(part) if left is not None else None
                if len(part):
                    yield part
                if left == 0:
                    return

    @abstractmethod
    def _blocks(self, start_s: float, num_samples: int | None) -> Generator[Samples, None, None]:
        """As `blocks`, but it may give more."""


class SndfileRecording(Recording):
    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            self.rate, self.num_channels, self.kind = int(file.samplerate), int(file.channels), str(file.format)
            self.duration_s = int(file.frames) / max(1, self.rate)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        import soundfile

        # Bytes, since soundfile refuses a name that is no UTF-8.
        with soundfile.SoundFile(str(self.path) if sys.platform == "win32" else os.fsencode(self.path)) as file:
            yield file

    def _blocks(self, start_s: float, num_samples: int | None) -> Generator[Samples, None, None]:
        at, size = round(start_s * self.rate), max(1, BLOCK // self.num_channels)
        if self.kind in FORGETFUL:
            yield from self._forgetful_blocks(at, min(FORGETFUL_BLOCK // self.num_channels, num_samples or sys.maxsize))
            return
        with self._open() as file:
            if at < file.frames:
                file.seek(at)
                while len(block := file.read(size, dtype="float32", always_2d=True)):
                    yield block

    def _forgetful_blocks(self, at: int, size: int) -> Generator[Samples, None, None]:
        """Each block from a file opened anew, with frames before it that the decoder needs to settle."""
        while True:
            with self._open() as file:
                lead = min(at, round(PREROLL_S * self.rate))
                if at >= file.frames:
                    return
                if at > lead:  # libmpg123 complains on stderr about these frames; the samples are right
                    file.seek(at - lead)
                block = file.read(lead + size, dtype="float32", always_2d=True)[lead:]
            if not len(block):
                return
            yield block
            at += len(block)


class AvRecording(Recording):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.demuxers = ",".join(filter(None, [CONTAINERS, RAW_STREAMS.get(path.suffix.lower())]))
        with self._open() as (container, stream):
            self.rate = int(stream.rate or 0)
            self.duration_s = self._length(container, stream)

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        try:
            import av
        except ImportError as error:
            raise MissingDecoderError(
                f"{self.path.suffix[1:]} needs the package PyAV: pip install av (it comes with the extra: "
                "pip install 'rvc_dist[formats]')"
            ) from error
        # An open file, since PyAV refuses a name that is no UTF-8; and a nameless one, since ffmpeg would believe the
        # name more than the content.
        options = {"format_whitelist": self.demuxers, "protocol_whitelist": "file"}
        try:
            with io.FileIO(self.path) as stream:
                stream.name = ""
                with av.open(stream, options=options, metadata_errors="replace") as container:
                    if not container.streams.audio:
                        raise AudioError("has no sound in it")
                    found = container.streams.best("audio") or container.streams.audio[0]
                    if found.codec_context is None:
                        raise AudioError("its codec is not known here")
                    yield container, found
        except AudioError:
            raise
        except (av.FFmpegError, OSError, OverflowError, ValueError) as error:  # seeking to where a bad header leads
            raise AudioError(f"not readable as audio ({getattr(error, 'strerror', None) or error})") from error

    def _length(self, container: Any, stream: Any) -> float:
        """Seconds, by the header or, where it does not say or only guesses, by a walk through the packets."""
        is_raw = container.format.name in ("aac", "ac3", "eac3", "mp3", "amr")
        if stream.duration and not is_raw:
            return float(stream.duration * stream.time_base)
        if container.duration and not is_raw:
            return float(container.duration) / 1e6  # AV_TIME_BASE
        begin, end = int(stream.start_time or 0), 0
        for packet in container.demux(stream):
            if packet.pts is not None:
                end = max(end, packet.pts + (packet.duration or 0))
        return float((end - begin) * stream.time_base)

    def _blocks(self, start_s: float, num_samples: int | None) -> Generator[Samples, None, None]:
        with self._open() as (container, stream):
            begin_s = float((stream.start_time or 0) * stream.time_base)
            if start_s > PREROLL_S:
                container.seek(int((begin_s + start_s - PREROLL_S) / stream.time_base), stream=stream)
            skip: int | None = None  # samples before start_s, known with the first frame
            kept: list[Samples] = []
            num_kept = 0
            for frame in container.decode(stream):
                samples = _to_float(frame)
                if frame.sample_rate != self.rate:
                    raise AudioError(f"changes its sample rate from {self.rate} to {frame.sample_rate} Hz")
                if kept and samples.shape[1] != kept[0].shape[1]:
                    raise AudioError(f"changes from {kept[0].shape[1]} to {samples.shape[1]} channels")
                if skip is None:
                    at_s = (frame.time if frame.time is not None else begin_s) - begin_s
                    skip = max(0, round((start_s - at_s) * self.rate))
                samples, skip = samples[skip:], max(0, skip - len(samples))
                if len(samples):
                    kept.append(samples)
                    num_kept += samples.size
                if num_kept >= BLOCK:
                    yield np.concatenate(kept)
                    kept, num_kept = [kept[-1][:0]], 0
            if num_kept:
                yield np.concatenate(kept)


def _to_float(frame: Any) -> Samples:
    """A decoded frame of ffmpeg as [S, channels] float32."""
    try:
        array = frame.to_ndarray()
    except ValueError as error:
        raise AudioError(f"has samples of a kind that is not read here ({frame.format.name})") from error
    if not frame.format.is_planar:
        array = array.reshape(-1, frame.layout.nb_channels).T
    if array.dtype.kind == "u":
        array = (array.astype(np.float32) - 128.0) / 128.0
    elif array.dtype.kind == "i":
        array = array.astype(np.float32) / np.float32(-float(np.iinfo(array.dtype).min))
    samples: Samples = np.ascontiguousarray(array.T, dtype=np.float32)
    return samples


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Recording]:
    """The recording in a file, recognised by its content, whatever its name says.

    Raises:
        AudioError: it is damaged, empty, no audio, or of a kind that needs a package which is not installed; also
            later, while it is read.
    """
    with _reasons(path):
        try:
            path.open("rb").close()  # libsndfile does not say what is wrong
        except OSError as error:
            raise AudioError(f"cannot be read ({error.strerror})") from error
        recording = _open_first(path)
        if not MIN_RATE <= recording.rate <= MAX_RATE:
            raise AudioError(f"sample rate of {recording.rate} Hz, expected {MIN_RATE} to {MAX_RATE}")
        if recording.duration_s <= 0:
            raise AudioError("holds no samples")
        if recording.duration_s > MAX_HOURS * 3600:
            raise AudioError("a damaged header or a stream of unknown length; write it again (ffmpeg -i OLD NEW)")
        if recording.duration_s > BOMB_SECONDS and path.stat().st_size < BOMB_BYTES_PER_S * recording.duration_s:
            raise AudioError(
                f"{recording.duration_s / 3600:.1f} hours in {path.stat().st_size} bytes: silence, or a damaged header"
            )
        yield recording


def duration(path: Path) -> float:
    """Seconds of audio that the header promises.

    Raises:
        AudioError: the file is damaged, or holds no samples.
    """
    with opened(path) as recording:
        return recording.duration_s


def decode(path: Path) -> tuple[Wave, int]:
    """The mean of all channels [S] and the sample rate in Hz.

    Raises:
        AudioError: the file is damaged, empty, or has samples that are not numbers.
    """
    with opened(path) as recording:
        parts = [mono(block) for block in recording.blocks()]
    if not parts:
        raise AudioError("holds no samples")
    return np.concatenate(parts), recording.rate


def mono(samples: Samples) -> Wave:
    """The mean of all channels: [S, channels] -> [S]. Raises AudioError for samples that are not numbers."""
    if not np.isfinite(samples).all():
        raise AudioError("has samples that are not finite numbers")
    wave: Wave = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    return wave


def _open_first(path: Path) -> Recording:
    """The first of the two libraries, by the file's name, that recognises it."""
    import soundfile

    if path.suffix.lower() in AV_SUFFIXES:
        try:
            return AvRecording(path)
        except AudioError:
            with contextlib.suppress(soundfile.LibsndfileError):
                return SndfileRecording(path)
            raise
    try:
        recording = SndfileRecording(path)
    except soundfile.LibsndfileError:
        with contextlib.suppress(AudioError):
            return AvRecording(path)
        raise
    if recording.kind == "MP3" and (actual := _mp3_samples(path)) > (recording.duration_s + 0.5) * recording.rate:
        # Without a length in its first frame libsndfile guesses one, and stops there.
        with contextlib.suppress(MissingDecoderError):
            return AvRecording(path)
        raise MissingDecoderError(
            f"an mp3 that does not say its length, of which only {recording.duration_s:.1f} of "
            f"{actual / recording.rate:.1f} s would be read; pip install av, or convert it to wav or flac"
        )
    return recording


@contextlib.contextmanager
def _reasons(path: Path) -> Iterator[None]:
    """Turn whatever the libraries raise for a bad file into an AudioError."""
    import soundfile

    try:
        yield
    except AudioError:
        raise
    except soundfile.LibsndfileError as error:
        why = error.error_string.removeprefix("Error : ").rstrip(".")
        if "not a regular file" in why and path.is_file():  # what libsndfile says of any mp3 that is none
            why = "Format not recognised"
        raise AudioError(f"not readable as audio ({why})") from error


def _mp3_samples(path: Path) -> int:
    """Samples in an mp3 without a length tag, counted frame by frame; 0 when it has the tag, or is irregular.

    Layer III: a frame is 1152 samples (MPEG-1) or 576 (MPEG-2, 2.5) in 144 or 72 * bit rate / sample rate bytes.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
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
