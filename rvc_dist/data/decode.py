"""Open recordings of every format and read any part of them: libsndfile where it can, PyAV (ffmpeg) for the rest.

Shapes: S samples. Whatever is wrong with a file is an AudioError, and memory does not depend on its length.
"""

from __future__ import annotations

import contextlib
import copy
import io
import mmap
import os
import re
import struct
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]
"""[S, channels]"""
Wave = npt.NDArray[np.float32]
"""[S], mono"""

SNDFILE_SUFFIXES = (
    *(".wav", ".wave", ".flac", ".ogg", ".oga", ".mp3", ".opus", ".aiff", ".aif", ".w64", ".rf64", ".caf", ".au"),
)
"""What libsndfile decodes; of .caf some."""
AV_SUFFIXES = (
    *(".m4a", ".m4b", ".mp4", ".3gp", ".aac", ".alac", ".wma", ".webm", ".ac3", ".mka", ".mkv", ".mov", ".amr"),
)
"""What needs PyAV."""
AUDIO_SUFFIXES = SNDFILE_SUFFIXES + AV_SUFFIXES
CONTAINERS = "mov,matroska,asf,wav,w64,flac,ogg,aiff,caf,au"
"""ffmpeg's readers that know their files by a signature. The others would hear music in any bytes, and playlists would
open files and addresses that somebody else wrote down."""
RAW_STREAMS = {".aac": "aac", ".ac3": "ac3,eac3", ".mp3": "mp3", ".amr": "amr"}
"""Streams without a container: believed only of files that are named so, or without a suffix begin as they do. Their
header's length is a guess."""
STARTS = {
    b"fLaC": (0, rb"fLaC[\0\x80]\0\0\x22"),
    b"\x1aE\xdf\xa3": (0, rb"\x1aE\xdf\xa3.{0,60}(matroska|webm)"),
    b"ftyp": (4, rb"\0\0\0[\x10-\xff]ftyp(?!hei|mif|avi)[ -~]{4}"),
    b"0&\xb2u\x8ef\xcf\x11\xa6\xd9\0\xaa\0b\xcel": (0, rb"0&\xb2u"),
}
"""Of flac, matroska, mp4 and asf: bytes to look for, how many come before them, and all that a recording begins with.
Where it is seen again another one was joined to the first."""
CHECKED_CODECS = ("flac", "ac3", "eac3")
"""Their frames hold a sum of their bytes, without which damage becomes noise. The others' do not: what a decoder of
theirs makes of damage, without an error, looks like any other sound."""
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
UNREADABLE, GAP, CUT = "unreadable", "gap in its time stamps", "cut off"
"""Why a decoder does not give seconds that a recording holds, or that its header promises."""
SLACK_S = 0.2
"""Time stamps and headers that are this much off tell of no loss: those of asf are."""
SILENT_PEAK = 1e-3
"""A track that never reaches it is silent."""
MAX_RMS = 0.4
"""Bytes that are no sound, read as samples, are louder, and as white as noise or far from zero."""
CHUNKED: dict[bytes, tuple[int, str, int]] = {
    **dict.fromkeys((b"RIFF", b"RF64"), (12, "<4sI", 2)),
    **dict.fromkeys((b"RIFX", b"FORM"), (12, ">4sI", 2)),
    b".snd": (4, ">II", 1),
    b"caff": (8, ">4sq", 1),
    b"riff": (40, "<16sQ", 8),
}
"""First bytes of wav, aiff, au, caf and w64: where their chunks begin, a chunk's head, what its size is padded to."""
UNKNOWN_SIZE = 0x7FFF0000
"""Sizes from here on stand in headers that were written before the length was known."""
FRAME_DTYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "flt": "f4", "dbl": "f8"}
"""Of ffmpeg's samples; those whose channels lie apart have a p behind their name."""
MAX_PLANES = 8
MAX_TRIES = 200_000
"""Bytes that are looked at for the next frame of a stream."""
_BITS_REVERSED = bytes(int(f"{i:08b}"[::-1], 2) for i in range(256))
_MP3_KBPS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0)
_MP3_KBPS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0)
_MP3_RATES = (44100, 48000, 32000, 0)
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
_AC3_RATES = (48000, 44100, 32000, 0)
_AC3_KBPS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640)


class AudioError(ValueError):
    """A recording cannot be used; the message is the reason, without the file's name."""


class MissingDecoderError(AudioError):
    """The recording may be good: a package is missing that decodes it."""


class Part(NamedTuple):
    """The bytes of a file that are one recording: all of them, but where recordings were joined."""

    begin: int
    end: int
    patch: tuple[int, bytes] = (0, b"")
    """Bytes that stand for others at that place: a size in the header that leaves out samples."""
    claim: float = 1.0
    """The size in the header over that of what is there: above 1 it is cut off."""
    counted: int = 0
    """Samples, where frames were counted."""
    is_tagged: bool = False
    """An mp3 whose first frame tells its length."""
    has_holes: bool = False
    """Pieces are damaged that libsndfile would leave out as if they had never been."""
    skipped: tuple[tuple[float, float], ...] = ()
    """Where frames were counted: the places and the seconds of bytes that are none, beyond what a decoder tells."""
    notes: tuple[str, ...] = ()
    kind: str = ""
    """The suffix of what begins as a stream without a container does."""


class _Bytes(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, path: Path, part: Part) -> None:
        self._file, self._part, self._at = io.FileIO(path), part, 0
        self.name = ""  # PyAV would hand it to ffmpeg, which believes it more than the content

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        part = self._part
        self._at = max(0, offset + (0, self._at, part.end - part.begin)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        at, (place, patch) = self._at, self._part.patch
        self._file.seek(self._part.begin + at)
        data = bytearray(self._file.read(max(0, min(len(buffer), self._part.end - self._part.begin - at))))
        for i in range(max(at, place), min(at + len(data), place + len(patch))):
            data[i - at] = patch[i - place]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class Recording(ABC):
    """An open recording. `duration_s` is what its header promises, or what is there where that is more."""

    rate: int
    duration_s: float
    notes: tuple[str, ...] = ()
    """What is to be said of it beside `lost`."""
    skipped: tuple[tuple[float, float], ...] = ()
    """Places, and seconds of sound that was there and has left no time stamp."""
    span_s: tuple[float, float]
    """Where the last reading of `blocks` began and came to an end."""
    lost: list[tuple[float, str]]
    """Seconds that the last reading of `blocks` did not give, each with UNREADABLE, GAP or CUT."""

    def blocks(self, start_s: float = 0.0, num_samples: int | None = None) -> Iterator[Samples]:
        """Samples from start_s on, to the end or so many, block by block: [S, channels] float32, full scale at 1.

        Where the number of channels changes, those of the first block get the mean of the others.
        What is told by `lost` counts among the samples asked for.
        """
        self.lost = []
        blocks, left = self._blocks(start_s, num_samples), num_samples
        got, num_channels = 0, 0
        with contextlib.closing(blocks):
            for block in blocks:
                part = block[:left]
                left = left - len(part) if left is not None else None
                got += len(part)
                num_channels = num_channels or part.shape[1]
                if part.shape[1] != num_channels:
                    part = np.repeat(part.mean(axis=1, keepdims=True), num_channels, axis=1)
                if len(part):
                    yield part
                if left == 0:
                    break
        end_s = sys.maxsize if num_samples is None else start_s + num_samples / self.rate
        self.span_s = start_s, start_s + got / self.rate + sum(seconds for seconds, _ in self.lost)
        missing_s = min(self.duration_s, end_s) - self.span_s[1]
        if missing_s > SLACK_S and left != 0:
            self.lost.append((missing_s, CUT))
        skipped = ((min(at, self.duration_s), seconds) for at, seconds in self.skipped)
        self.lost += [(seconds, UNREADABLE) for at, seconds in skipped if start_s <= at < end_s]

    def told(self) -> list[str]:
        """What is to be said of the recording and of the last reading of it."""
        seconds = {why: sum(s for s, reason in self.lost if reason == why) for _, why in self.lost}
        told = {why: f"{s:.2f} s are missing ({why})" for why, s in seconds.items()}
        begins_s, ends_s = self.span_s
        if CUT in told and ends_s + SLACK_S < self.duration_s:
            where = f"ends at {ends_s:.2f} s" if ends_s > begins_s or not begins_s else "ends before this part"
            told[CUT] = told[CUT][:-1] + f": its header promises {self.duration_s:.2f} s, what is there {where})"
        return [*self.notes, *told.values()]

    @abstractmethod
    def _blocks(self, start_s: float, num_samples: int | None) -> Generator[Samples, None, None]:
        """As `blocks`, but it may give more."""


class SndfileRecording(Recording):
    def __init__(self, path: Path, part: Part) -> None:
        self.path, self.part, self.notes, self.skipped = path, part, part.notes, part.skipped
        with self._open() as file:
            self.rate, self.num_channels, self.kind = int(file.samplerate), int(file.channels), str(file.format)
            self.duration_s = int(file.frames) / max(1, self.rate) * part.claim

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        import soundfile

        with contextlib.ExitStack() as stack:
            source: Any = os.fsencode(self.path)  # since soundfile refuses a name that is no UTF-8
            if sys.platform == "win32":
                source = str(self.path)
            if self.part.begin or self.part.patch[1] or self.part.end < self.path.stat().st_size:
                source = stack.enter_context(_Bytes(self.path, self.part))
            yield stack.enter_context(soundfile.SoundFile(source))

    def _blocks(self, start_s: float, num_samples: int | None) -> Generator[Samples, None, None]:
        import soundfile

        at, given = round(start_s * self.rate), 0
        try:
            for block in self._good_blocks(at, num_samples):
                yield block
                given += len(block)
        except soundfile.LibsndfileError:  # it stops where ffmpeg goes on after the damage
            rest = AvRecording(self.path, self.part)
            yield from rest.blocks((at + given) / self.rate, None if num_samples is None else num_samples - given)
            self.lost += rest.lost

    def _good_blocks(self, at: int, num_samples: int | None) -> Iterator[Samples]:
        size = max(1, BLOCK // self.num_channels)
        if self.kind in FORGETFUL:
            yield from self._forgetful_blocks(at, min(FORGETFUL_BLOCK // self.num_channels, num_samples or sys.maxsize))
            return
        with self._open() as file:
            if at >= file.frames:
                return
            if file.seekable():
                file.seek(at)
            else:  # GSM
                while at > 0:
                    at -= len(file.read(min(at, size)))
            while len(block := file.read(size, dtype="float32", always_2d=True)):
                yield block

    def _forgetful_blocks(self, at: int, size: int) -> Iterator[Samples]:
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
    def __init__(self, path: Path, part: Part) -> None:
        self.path, self.part, self.notes, self.skipped, self.track = path, part, part.notes, part.skipped, -1
        self.slack_s, self.gap = SLACK_S, GAP
        self.demuxers = ",".join(filter(None, [CONTAINERS, RAW_STREAMS.get(path.suffix.lower() or part.kind)]))
        with self._open() as (container, stream):
            self.rate = int(stream.rate or 0)
            self.duration_s = self._length(container, stream)
            if stream.codec_context and stream.codec_context.name.startswith("pcm"):
                self.duration_s *= part.claim
            # ffmpeg counts damage otherwise when it seeks over it; of amr it is not known here.
            self.can_seek = not part.has_holes and container.format.name != "amr"
            if container.format.name == "flac" or part.has_holes:
                self.gap = UNREADABLE
            if container.format.name == "flac":  # its places are exact; those of vorbis are some 10 ms off
                self.slack_s = 0.01
            known = [(t.index, int(t.rate or 0)) for t in container.streams.audio if t.codec_context]
            tracks = sorted(known, key=lambda track: track[0] != stream.index)
        if len(tracks) > 1:
            self.lost = []
            for self.track, self.rate in [*tracks, tracks[0]]:
                if any(np.abs(block).max() > SILENT_PEAK for block in self._blocks(0.0, None)):
                    break
            number = 1 + known.index((self.track, self.rate))
            self.notes = (*self.notes, f"sound track {number} of {len(known)} was taken")

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        try:
            import av
        except ImportError as error:
            raise MissingDecoderError(
                f"{self.path.suffix[1:] or 'this kind'} needs the package PyAV: pip install av (it comes with the "
                "extra: pip install 'rvc_dist[formats]')"
            ) from error
        # An open file, since PyAV refuses a name that is no UTF-8.
        options = {"format_whitelist": self.demuxers, "protocol_whitelist": "file"}
        try:
            with (
                _Bytes(self.path, self.part) as file,
                av.open(file, options=options, metadata_errors="replace") as container,
            ):
                if not container.streams.audio:
                    raise AudioError("has no sound in it")
                found = container.streams.best("audio") or container.streams.audio[0]
                if self.track >= 0:
                    found = container.streams[self.track]
                if found.codec_context is None:
                    raise AudioError("its codec is not known here")
                if found.codec_context.name in CHECKED_CODECS:
                    found.codec_context.options = {"err_detect": "crccheck+explode"}
                yield container, found
        except AudioError:
            raise
        except (av.FFmpegError, OSError, OverflowError, ValueError) as error:  # seeking to where a bad header leads
            reason = "; ".join(self.part.notes) or getattr(error, "strerror", None) or error
            raise AudioError(f"not readable as audio ({reason})") from error

    def _length(self, container: Any, stream: Any) -> float:
        """Seconds, by the header or, where it does not say or only guesses, by a walk through the packets."""
        is_raw = container.format.name in ("aac", "ac3", "eac3", "mp3", "amr")
        if stream.duration and not is_raw:
            return float(stream.duration * stream.time_base)
        if container.duration and not is_raw:
            return float(container.duration) / 1e6  # AV_TIME_BASE
        return _walked(container, stream)

    def _blocks(self, start_s: float, num_samples: int | None) -> Generator[Samples, None, None]:
        """Samples have the places that their frames' time stamps say, so every part meets the next one.

        Stamps are not exact everywhere: a part begins, as the one before it ends, in the first frame that reaches it.
        """
        begin, total = round(start_s * self.rate), round(self.duration_s * self.rate)
        end = sys.maxsize if num_samples is None else begin + num_samples
        kept: list[Samples] = []
        with self._open() as (container, stream):
            origin_s = float((stream.start_time or 0) * stream.time_base)
            lead_s = max(0.0, start_s - PREROLL_S)
            lead = int((origin_s + lead_s) / stream.time_base)
            if lead_s > 0 and self.can_seek:
                container.seek(lead, stream=stream)
            next_at, bad_s = round(lead_s * self.rate), 0.0
            is_in = begin == 0
            for frame in self._frames(container, stream, lead):
                if isinstance(frame, float) or frame.sample_rate != self.rate:
                    bad_s += frame if isinstance(frame, float) else frame.samples / frame.sample_rate
                    continue
                samples = _to_float(frame)
                at = next_at if frame.time is None else round((frame.time - origin_s) * self.rate)
                gap_s = (min(at, end, total) - max(next_at, begin)) / self.rate
                if gap_s > (0.0 if bad_s else self.slack_s):
                    self.lost.append((gap_s, UNREADABLE if bad_s else self.gap))
                next_at, bad_s = at + len(samples), 0.0
                if not is_in and next_at <= begin:
                    continue
                first, is_in = 0 if is_in else max(0, begin - at), True
                samples = samples[first : max(first, end - at) if next_at > end else None]
                if kept and (len(kept) * kept[0].size >= BLOCK or samples.shape[1] != kept[0].shape[1]):
                    yield np.concatenate(kept)
                    kept = []
                kept.append(samples)
                if next_at > end:
                    bad_s = 0.0
                    break
            if kept:
                yield np.concatenate(kept)
            if bad_s:
                self.lost.append((bad_s, CUT))

    def _frames(self, container: Any, stream: Any, lead: int) -> Iterator[Any]:
        """Decoded frames, and in their place the seconds of packets that cannot be decoded.

        Raises:
            FFmpegError: none could.
        """
        import av

        packets, failed, num = container.demux(stream), None, 0
        while True:
            packet = None
            try:
                if (packet := next(packets, None)) is None:
                    break
                if not self.can_seek and packet.pts is not None and packet.pts < lead:
                    continue
                for frame in packet.decode():
                    num += 1
                    yield frame
            except av.EOFError:
                break
            except av.FFmpegError as error:
                failed = error
                if packet is None:
                    break
                yield float((packet.duration or 0) * stream.time_base)
        if failed is not None and not num:
            raise failed


class JoinedRecording(Recording):
    """Recordings that were written one after the other into one file; one that is unreadable is as long as its bytes
    would be of the others.
    """

    def __init__(self, path: Path, parts: list[Part]) -> None:
        self.notes = (f"{len(parts)} recordings joined in one file",)
        self.parts, self.duration_s, num_bytes = list[Recording](), 0.0, 0
        unread = []
        for number, part in enumerate(parts, 1):
            try:
                with _reasons(path):
                    recording = _open_first(path, part)
            except MissingDecoderError:
                raise
            except AudioError as error:
                if number == len(parts) and not self.parts:
                    raise
                unread.append((self.duration_s, part.end - part.begin))
                self.notes += (f"recording {number} of those joined: {error}",)
                continue
            self.parts.append(recording)
            self.notes += recording.notes
            self.duration_s += recording.duration_s
            num_bytes += part.end - part.begin
        self.rate = self.parts[0].rate
        self.skipped = tuple((at_s, size / num_bytes * self.duration_s) for at_s, size in unread)

    def _blocks(self, start_s: float, num_samples: int | None) -> Generator[Samples, None, None]:
        begin, at = round(start_s * self.rate), 0
        end = sys.maxsize if num_samples is None else begin + num_samples
        for shared in self.parts:
            part, first = copy.copy(shared), at
            at += round(part.duration_s * self.rate)
            low, high = max(first, begin), min(at, end)
            if low < high and part.rate == self.rate:
                yield from part.blocks((low - first) / self.rate, high - low)
                self.lost += part.lost
            elif low < high:
                self.lost.append(((high - low) / self.rate, f"joined at another sample rate ({part.rate} Hz)"))


def _walked(container: Any, stream: Any) -> float:
    """Seconds up to the end of the last packet."""
    begin, end = int(stream.start_time or 0), 0
    for packet in container.demux(stream):
        if packet.pts is not None:
            end = max(end, packet.pts + (packet.duration or 0))
    return float((end - begin) * stream.time_base)


def _to_float(frame: Any) -> Samples:
    """A decoded frame of ffmpeg as [S, channels] float32.

    PyAV takes what lies in memory behind the pointers of eight planes for a ninth one, and crashes on it.
    """
    kind, num_channels = frame.format.name, frame.layout.nb_channels
    dtype = FRAME_DTYPES.get(kind.removesuffix("p"))
    if dtype is None:
        raise AudioError(f"has samples of a kind that is not read here ({kind})")
    if not frame.format.is_planar:
        array = np.frombuffer(frame.planes[0], dtype, frame.samples * num_channels).reshape(-1, num_channels).T
    elif num_channels <= MAX_PLANES:
        array = np.stack([np.frombuffer(plane, dtype, frame.samples) for plane in frame.planes[:num_channels]])
    else:
        raise AudioError(f"has {num_channels} channels, expected at most {MAX_PLANES}")
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
            status = path.stat()
        except OSError as error:
            raise AudioError(f"cannot be read ({error.strerror})") from error
        recording = copy.copy(_known(path, status.st_size, status.st_mtime_ns, status.st_ino))
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


@lru_cache(256)
def _known(path: Path, size: int, mtime_ns: int, inode: int) -> Recording:
    """The recording in a file, kept for its other slices: it holds nothing open."""
    parts = _parts(path) if size else [Part(0, 0)]
    return _open_first(path, parts[0]) if len(parts) == 1 else JoinedRecording(path, parts)


def _open_first(path: Path, part: Part) -> Recording:
    """The first of the two libraries, by the file's name, that recognises it."""
    import soundfile

    if path.suffix.lower() in AV_SUFFIXES:
        try:
            return AvRecording(path, part)
        except AudioError:
            with contextlib.suppress(soundfile.LibsndfileError):
                return SndfileRecording(path, part)
            raise
    try:
        recording = SndfileRecording(path, part)
    except soundfile.LibsndfileError:
        with contextlib.suppress(AudioError):
            return AvRecording(path, part)
        raise
    if part.patch[1]:
        plain = SndfileRecording(path, part._replace(patch=(0, b"")))
        if _is_junk(recording, plain.duration_s):
            return plain
        recording.notes += (f"its header tells of {plain.duration_s:.1f} of {recording.duration_s:.1f} s",)
    if recording.kind == "FLAC" and recording.duration_s > MAX_HOURS * 3600:  # 0 in its header is "not known"
        with contextlib.suppress(MissingDecoderError):
            return AvRecording(path, part)
    seconds = part.counted / recording.rate
    if recording.kind == "MP3" and (part.has_holes or seconds > recording.duration_s + 0.5):
        # Without a length in its first frame libsndfile guesses one, and stops there.
        try:
            other = AvRecording(path, part)
        except MissingDecoderError as error:
            raise MissingDecoderError(
                f"an mp3 that is damaged or does not say its length, of which only {recording.duration_s:.1f} of "
                f"{seconds:.1f} s would be read; pip install av, or convert it to wav or flac"
            ) from error
        promised_s = recording.duration_s - sum(skipped_s for _, skipped_s in part.skipped)
        other.duration_s = max(other.duration_s, promised_s if part.is_tagged else 0.0)
        return other
    if recording.kind == "OGG" and part.has_holes:
        return AvRecording(path, part)
    return recording


def _is_junk(recording: Recording, after_s: float) -> bool:
    """Whether what follows the samples that a header tells of is no sound."""
    blocks = recording.blocks(after_s, recording.rate)
    wave = next(blocks, np.zeros((0, 1), np.float32))[:, 0].astype(np.float64)
    if len(wave) < 2 or not np.isfinite(wave).all():
        return True
    energy = np.square(wave).mean()
    return bool(energy > MAX_RMS**2 and (np.square(np.diff(wave)).mean() > energy or abs(wave.mean()) > 0.2))


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


def _parts(path: Path) -> list[Part]:
    """The recordings that are written one after the other in a file: nearly always one."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = _after_tags(data, 0)
        magic = data[at : at + 4]
        if magic == b"OggS":
            return _ogg_parts(data, at)
        if magic in CHUNKED:
            return _chunked_parts(data, at)
        for word, (lead, pattern) in STARTS.items():
            if data[at + lead : at + lead + len(word)] == word:
                return _joined_parts(data, at + lead, word, lead, re.compile(pattern, re.DOTALL))
        for kind, (first_byte, frame_at) in FRAMES.items():
            if path.suffix.lower() == kind or frame_at(data, at):
                return [part._replace(kind=kind) for part in _framed_parts(data, first_byte, frame_at)]
        return [Part(0, len(data), kind=".amr" if magic == b"#!AM" else "")]


def _joined_parts(data: mmap.mmap, at: int, word: bytes, lead: int, start: re.Pattern[bytes]) -> list[Part]:
    starts = [0]
    while (at := data.find(word, at + 1)) >= 0:
        if start.match(data[at - lead : at + 64]):
            starts.append(at - lead)
    parts = []
    for begin, end in zip(starts, [*starts[1:], len(data)], strict=True):
        is_open = word == b"ftyp" and data.find(b"moov", begin, end) < 0
        notes = (f"{CUT} before the table of its samples, which an mp4 may have at its end",) if is_open else ()
        parts.append(Part(begin, end, notes=notes))
    return parts


def _after_tags(data: mmap.mmap, at: int) -> int:
    """Where the tags end that begin there."""
    while True:
        if data[at : at + 3] == b"ID3" and len(data) >= at + 10:
            size = data[at + 6 : at + 10]
            at += 10 + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3])
        elif data[at : at + 8] == b"APETAGEX" and len(data) >= at + 32:
            at += 32 + int.from_bytes(data[at + 12 : at + 16], "little")
        elif data[at : at + 3] == b"TAG":
            at += 128
        else:
            return at


def _ogg_parts(data: mmap.mmap, at: int) -> list[Part]:
    """A page that begins streams after others have run begins another recording; one of a wrong sum is damaged."""
    starts, holes, ends, was_first = [0], [False], [False], True
    while at >= 0:
        head = data[at : at + 27]
        table = data[at + 27 : at + 27 + head[26]] if len(head) == 27 else b""
        page = data[at : at + 27 + len(table) + sum(table)]
        if not table or len(page) < 27 + len(table) + sum(table):
            break
        summed = page[:22] + bytes(4) + page[26:]
        crc = zlib.crc32(summed.translate(_BITS_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        if head[:4] != b"OggS" or head[22:26] != crc.to_bytes(4, "big").translate(_BITS_REVERSED):
            holes[-1] = True
            at = data.find(b"OggS", at + 1)
            continue
        is_first = bool(head[5] & 2)
        if is_first and not was_first:
            starts, holes, ends = [*starts, at], [*holes, False], [*ends, False]
        was_first, ends[-1] = is_first, bool(head[5] & 4)
        at += len(page)
    cut = ("cut off: its last page is missing",)
    return [
        Part(a, b, has_holes=bad, notes=() if done else cut)
        for a, b, bad, done in zip(starts, [*starts[1:], len(data)], holes, ends, strict=True)
    ]


def _chunked_parts(data: mmap.mmap, begin: int) -> list[Part]:
    """A wav, aiff, au, caf or w64 whose size of samples is compared with the file's."""
    magic, parts = data[begin : begin + 4], list[Part]()
    _, layout, pad = CHUNKED[magic]
    while found := _chunk_of_samples(data, begin):
        first, size, patch = found
        room, rest = len(data) - first, first + size + -size % pad
        if not 0 <= size <= room or data[rest : rest + 4] != magic:
            break
        parts.append(Part(begin, rest))
        begin = rest
    whole = Part(begin, len(data))
    if found is None:
        return [*parts, whole]
    if size > room > 0 and (layout in ("<16sQ", ">4sq") or size < UNKNOWN_SIZE):
        whole = whole._replace(claim=min(size / room, MAX_HOURS))
    elif size >= 0 and len(data) - rest >= 1024 and not re.match(rb"[ -~]{4}|ID3", data[rest : rest + 4]):
        whole = whole._replace(patch=patch)
    return [*parts, whole]


def _chunk_of_samples(data: mmap.mmap, begin: int) -> tuple[int, int, tuple[int, bytes]] | None:
    """Where samples begin, how many bytes of them the header tells of, and the patch that makes it tell of all."""
    magic = data[begin : begin + 4]
    start, layout, pad = CHUNKED[magic]
    head, at = struct.calcsize(layout), begin + start
    uncounted = head if magic == b"riff" else 0
    while at + head <= len(data):
        name, size = struct.unpack_from(layout, data, at)
        first, size = at + head, size - uncounted
        if magic == b".snd":  # which has no chunks: in the place of a name stands where the samples begin
            first = begin + name
        if magic == b".snd" or name[:4] in (b"data", b"SSND"):
            room = max(0, len(data) - first)
            patch = at - begin, struct.pack(layout, name, min(room, 0xFFFFFFFE if head == 8 else room) + uncounted)
            if magic == b"RF64":
                size = int.from_bytes(data[begin + 28 : begin + 36], "little")
                patch = 28, struct.pack("<Q", room)
            return first, size, patch
        if size < 0:
            break
        at = first + size + -size % pad
    return None


class Frame(NamedTuple):
    """Of a stream of frames that can be decoded by themselves: one."""

    size: int
    """Bytes."""
    samples: int
    rate: int
    is_tag: bool = False
    """It tells a length and holds no sound."""


def _mp3_frame(data: mmap.mmap, at: int) -> Frame | None:
    """The frame of an mp3 that begins there.

    Layer III: a frame is 1152 samples (MPEG-1) or 576 (MPEG-2, 2.5) in 144 or 72 * bit rate / sample rate bytes.
    """
    head = data[at : at + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return None
    is_mpeg1 = head[1] & 0x18 == 0x18
    kbps = (_MP3_KBPS_1 if is_mpeg1 else _MP3_KBPS_2)[head[2] >> 4]
    rate = _MP3_RATES[head[2] >> 2 & 3] >> {0x18: 0, 0x10: 1}.get(head[1] & 0x18, 2)
    if not kbps or not rate:
        return None
    tag = at + 4 + ((17, 32) if is_mpeg1 else (9, 17))[head[3] < 0xC0]
    is_tag = data[tag : tag + 4] in (b"Xing", b"Info") or data[at + 36 : at + 40] == b"VBRI"
    size = (144000 if is_mpeg1 else 72000) * kbps // rate + (head[2] >> 1 & 1)
    return Frame(size, 1152 if is_mpeg1 else 576, rate, is_tag)


def _aac_frame(data: mmap.mmap, at: int) -> Frame | None:
    """The frame of raw AAC (ADTS) that begins there: its size stands in it, and how many times 1024 samples it has."""
    head = data[at : at + 7]
    if len(head) < 7 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
        return None
    index, size = head[2] >> 2 & 15, (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return Frame(size, 1024 * (1 + (head[6] & 3)), _AAC_RATES[index]) if index < 13 and size >= 7 else None


def _ac3_frame(data: mmap.mmap, at: int) -> Frame | None:
    """The frame of AC-3 that begins there: 1536 samples, its size by bit rate and sample rate."""
    head = data[at : at + 6]
    if len(head) < 6 or head[:2] != b"\x0bw":
        return None
    rate, kbps = _AC3_RATES[head[4] >> 6], head[4] >> 1 & 31
    if not rate or kbps >= len(_AC3_KBPS) or head[5] >> 3 > 8:  # E-AC-3 is not counted
        return None
    return Frame(2 * (96000 * _AC3_KBPS[kbps] // rate + (head[4] & (rate == 44100))), 1536, rate)


FRAMES = {".mp3": (b"\xff", _mp3_frame), ".aac": (b"\xff", _aac_frame), ".ac3": (b"\x0b", _ac3_frame)}
"""Of streams without a container, by the suffix that is believed: a frame's first byte, and what reads its head."""


@dataclass
class _Count:
    """What is counted of the frames of a recording."""

    begin: int
    samples: int = 0
    num_bytes: int = 0
    is_tagged: bool = False
    skipped: list[tuple[int, int]] = field(default_factory=list)
    """Samples before bytes that are no frame, and how many bytes."""

    def part(self, end: int, last: Frame | None, is_whole: bool) -> Part:
        """What ends there; `last` is its last frame.

        Bytes that are no frame stand for as long as others, but a decoder takes them for one frame, and tells that.
        """
        notes = () if is_whole or self.is_tagged else (f"{CUT}: its last frame is not whole",)
        skipped = []
        if last is not None:
            for samples, num_bytes in self.skipped:
                missing = num_bytes / self.num_bytes * self.samples - last.samples
                if missing > 0:
                    skipped.append((samples / last.rate, missing / last.rate))
        return Part(
            self.begin,
            end,
            counted=self.samples,
            is_tagged=self.is_tagged,
            has_holes=bool(self.skipped),
            skipped=tuple(skipped),
            notes=notes,
        )


def _framed_parts(data: mmap.mmap, first_byte: bytes, frame_at: Callable[[mmap.mmap, int], Frame | None]) -> list[Part]:
    """The recordings in a stream of frames, counted one by one; a tag that tells a length begins another."""
    parts, count, frame, end = [], _Count(0), None, 0
    for at, found, num_skipped in _frames(data, first_byte, frame_at):
        if found.is_tag and count.samples:
            parts.append(count.part(at, frame, True))
            count = _Count(at)
        if num_skipped and count.samples:
            count.skipped.append((count.samples, num_skipped))
        if found.is_tag:
            count.is_tagged = True
        else:
            count.samples += found.samples
            count.num_bytes += found.size
        frame, end = found, at + found.size
    return [*parts, count.part(len(data), frame, end <= len(data))]


def _frames(
    data: mmap.mmap, first_byte: bytes, frame_at: Callable[[mmap.mmap, int], Frame | None]
) -> Iterator[tuple[int, Frame, int]]:
    """Where frames begin, the frames, and the bytes right before each that are neither frame nor tag."""
    at = end = _after_tags(data, 0)
    while at < len(data):
        if frame := frame_at(data, at):
            yield at, frame, at - end
            at = end = at + frame.size
        elif (after := _after_tags(data, at)) > at:
            at = end = after
        else:  # two frames in a row are no chance
            for _ in range(MAX_TRIES):
                at = data.find(first_byte, at + 1)
                if at < 0:
                    return
                if (frame := frame_at(data, at)) and frame_at(data, at + frame.size):
                    break
            else:  # a file of nothing else would take minutes
                return
