"""Open recordings of every format and read any part of them: libsndfile where it can, PyAV (ffmpeg) for the rest.

Shapes: S samples. Whatever is wrong with a file is an AudioError, and memory does not depend on its length.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rvc_dist.choices import PYAV
from rvc_dist.data.parts import CUT, Part, find_parts

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
UNREADABLE, GAP = "unreadable", "gap in its time stamps"
"""Why a decoder does not give seconds that a recording holds; for those that its header promises there is CUT."""
SLACK_S = 0.2
"""Time stamps and headers that are this much off tell of no loss: those of asf are."""
SILENT_PEAK = 1e-3
"""A track that never reaches it is silent."""
MAX_RMS = 0.4
"""Bytes that are no sound, read as samples, are louder, and as white as noise or far from zero."""
FRAME_DTYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "flt": "f4", "dbl": "f8"}
"""Of ffmpeg's samples; those whose channels lie apart have a p behind their name."""
MAX_PLANES = 8
_LOCKS = [threading.Lock() for _ in range(64)]


class AudioError(ValueError):
    """A recording cannot be used; the message is the reason, without the file's name."""


class MissingDecoderError(AudioError):
    """The recording may be good: a package is missing that decodes it."""


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

        try:
            with contextlib.ExitStack() as stack:
                # In bytes, since soundfile refuses a name that is no UTF-8.
                source: Any = str(self.path) if sys.platform == "win32" else os.fsencode(self.path)
                if self.part.begin or self.part.patch[1] or self.part.end < self.path.stat().st_size:
                    source = stack.enter_context(_Bytes(self.path, self.part))
                yield stack.enter_context(soundfile.SoundFile(source))
        except soundfile.LibsndfileError as error:
            why = error.error_string.removeprefix("Error : ").rstrip(".")
            if "not a regular file" in why and self.path.is_file():  # what libsndfile says of any mp3 that is none
                why = "Format not recognised"
            raise AudioError(f"not readable as audio ({why})") from error

    def _blocks(self, start_s: float, num_samples: int | None) -> Generator[Samples, None, None]:
        at, given = round(start_s * self.rate), 0
        try:
            for block in self._good_blocks(at, num_samples):
                yield block
                given += len(block)
        except AudioError:  # it stops where ffmpeg goes on after the damage
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
        self.demuxers = ",".join(filter(None, [CONTAINERS, RAW_STREAMS.get(path.suffix.lower() or part.kind)]))
        with self._open() as (container, stream):
            self.rate = int(stream.rate or 0)
            self.duration_s = self._length(container, stream)
            if stream.codec_context and stream.codec_context.name.startswith("pcm"):
                self.duration_s *= part.claim
            # ffmpeg counts damage otherwise when it seeks over it; of amr it is not known here.
            self.can_seek = not part.has_holes and container.format.name != "amr"
            is_flac = container.format.name == "flac"  # its places are exact; those of vorbis are some 10 ms off
            self.slack_s = 0.01 if is_flac else SLACK_S
            self.gap = UNREADABLE if is_flac or part.has_holes else GAP
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
            raise MissingDecoderError(" ".join(PYAV.missing(self.path.suffix[1:] or "this kind"))) from error
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
        if container.format.name not in ",".join(RAW_STREAMS.values()).split(","):
            if stream.duration:
                return float(stream.duration * stream.time_base)
            if container.duration:
                return float(container.duration) / 1e6  # AV_TIME_BASE
        begin = int(stream.start_time or 0)
        ends = (packet.pts + (packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None)
        return float((max(0, max(ends, default=0)) - begin) * stream.time_base)

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
    try:
        path.open("rb").close()  # libsndfile does not say what is wrong
        status = path.stat()
        size = status.st_size
    except OSError as error:
        raise AudioError(f"cannot be read ({error.strerror})") from error
    with _LOCKS[status.st_ino % len(_LOCKS)]:  # threads that ask for slices of one recording look at it once
        recording = copy.copy(_known(path, size, status.st_mtime_ns, status.st_ino))
    if not MIN_RATE <= recording.rate <= MAX_RATE:
        raise AudioError(f"sample rate of {recording.rate} Hz, expected {MIN_RATE} to {MAX_RATE}")
    if recording.duration_s <= 0:
        raise AudioError("holds no samples")
    if recording.duration_s > MAX_HOURS * 3600:
        raise AudioError("a damaged header or a stream of unknown length; write it again (ffmpeg -i OLD NEW)")
    if recording.duration_s > BOMB_SECONDS and size < BOMB_BYTES_PER_S * recording.duration_s:
        raise AudioError(f"{recording.duration_s / 3600:.1f} hours in {size} bytes: silence, or a damaged header")
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
    parts = find_parts(path) if size else [Part(0, 0)]
    return _open_first(path, parts[0]) if len(parts) == 1 else JoinedRecording(path, parts)


def _open_first(path: Path, part: Part) -> Recording:
    """By the first of the two libraries, in the order that the file's name says, that recognises it."""
    kinds: list[type[AvRecording | SndfileRecording]] = [SndfileRecording, AvRecording]
    if path.suffix.lower() in AV_SUFFIXES:
        kinds.reverse()
    try:
        recording = kinds[0](path, part)
    except AudioError:
        with contextlib.suppress(AudioError):
            return kinds[1](path, part)
        raise
    if isinstance(recording, AvRecording):
        return recording
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
