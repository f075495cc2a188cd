"""Where recordings begin and end in a file, by its own structure: joined ones, headers that claim too little or too
much, bytes between frames. No decoder is asked.
"""

from __future__ import annotations

import mmap
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

CUT = "cut off"
"""Why seconds are missing that a header promises."""
STARTS = {
    b"fLaC": (0, rb"fLaC[\0\x80]\0\0\x22"),
    b"\x1aE\xdf\xa3": (0, rb"\x1aE\xdf\xa3.{0,60}(matroska|webm)"),
    b"ftyp": (4, rb"\0\0\0[\x10-\xff]ftyp(?!hei|mif|avi)[ -~]{4}"),
    b"0&\xb2u\x8ef\xcf\x11\xa6\xd9\0\xaa\0b\xcel": (0, rb"0&\xb2u"),
}
"""Of flac, matroska, mp4 and asf: bytes to look for, how many come before them, and all that a recording begins with.
Where it is seen again another one was joined to the first."""
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
MAX_CLAIM = 100.0
"""What a header claims beyond so many times of what is there is damage."""
MAX_TRIES = 200_000
"""Bytes that are looked at for the next frame of a stream."""
_BITS_REVERSED = bytes(int(f"{i:08b}"[::-1], 2) for i in range(256))
_MP3_KBPS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0)
_MP3_KBPS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0)
_MP3_RATES = (44100, 48000, 32000, 0)
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
_AC3_RATES = (48000, 44100, 32000, 0)
_AC3_KBPS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640)


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


def find_parts(path: Path) -> list[Part]:
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
    """Where `word` is seen again in what a recording begins with, another one begins."""
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
    cut = ("cut off: its last page is missing",)
    parts, part, was_first = list[Part](), Part(0, len(data), notes=cut), True
    while at >= 0:
        head = data[at : at + 27]
        table = data[at + 27 : at + 27 + head[26]] if len(head) == 27 else b""
        page = data[at : at + 27 + len(table) + sum(table)]
        if not table or len(page) < 27 + len(table) + sum(table):
            break
        summed = page[:22] + bytes(4) + page[26:]
        crc = zlib.crc32(summed.translate(_BITS_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        if head[:4] != b"OggS" or head[22:26] != crc.to_bytes(4, "big").translate(_BITS_REVERSED):
            part = part._replace(has_holes=True)
            at = data.find(b"OggS", at + 1)
            continue
        is_first, is_last = bool(head[5] & 2), bool(head[5] & 4)
        if is_first and not was_first:
            parts.append(part._replace(end=at))
            part = Part(at, len(data))
        was_first, part = is_first, part._replace(notes=() if is_last else cut)
        at += len(page)
    return [*parts, part]


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
        whole = whole._replace(claim=min(size / room, MAX_CLAIM))
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


FrameReader: TypeAlias = Callable[[mmap.mmap, int], Frame | None]


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


def _framed_parts(data: mmap.mmap, first_byte: bytes, frame_at: FrameReader) -> list[Part]:
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


def _frames(data: mmap.mmap, first_byte: bytes, frame_at: FrameReader) -> Iterator[tuple[int, Frame, int]]:
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
