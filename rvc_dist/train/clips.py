"""The clips of a run in columns: a million of them take some 60 MB, which loader processes share with their rank."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import chain
from typing import Any, overload

import numpy as np

MUTE_SOURCE = ""
"""The source of the silent clips, which belong to no recording."""
MUTE = -1
"""In place of a unit: the silent clip."""

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class ClipRef:
    """Where one training clip lies, what it was cut from, and how long it is."""

    unit: int
    key: str
    speaker: int
    source: str
    """The recording."""
    num_frames: int
    """Once wave, content and f0 are trimmed to the shortest."""
    start_s: float = 0.0
    """In its recording."""
    duration_s: float = 0.0
    """Of all its samples."""
    content: str = ""
    """Hash of the recording, where it is known."""
    repeat: int = 1
    """How often it counts in an epoch."""
    guessed: bool = False
    """`start_s` is: so of its recording all is held out, or nothing, where that is possible."""

    @classmethod
    def of(cls, header: Mapping[str, Any], unit: int, index: int, num_samples: int, num_frames: int) -> ClipRef:
        """Clip `index` of a unit with this `header`."""
        clip, duration_s = header["clips"][index], num_samples / header["sample_rate"]
        where = (clip["speaker"], str(clip["source"]), num_frames, clip["start_s"], duration_s)
        more = clip.get("content", ""), clip.get("repeat", 1), clip.get("guessed", False)
        return cls(unit, f"{index:05d}", *where, *more)


_TYPES = ("i8", "i4", "i4", "i4", "i8", "f8", "f8", "i4", "i2", "?")
ROW = np.dtype(list(zip((field.name for field in fields(ClipRef)), _TYPES, strict=True)))
"""The fields of ClipRef in their order; of a text, its number among the texts."""
AT_ONCE = 4096
"""Clips that a loop over all of them takes from the columns together."""
_values = operator.attrgetter(*ROW.names or ())
_TEXTS = tuple(i for i, name in enumerate(ROW.names or ()) if name in ("key", "source", "content"))


class _Texts:
    """Texts by number, in one piece of memory: Python's objects would be copied to each process that looks at them."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._all, self._ends = b"".join(encoded), np.cumsum([0, *map(len, encoded)])

    def __getitem__(self, number: int) -> str:
        return self._all[self._ends[number] : self._ends[number + 1]].decode("utf-8", "surrogatepass")


class ClipList(Sequence[ClipRef]):
    """Clips, each made as it is asked for."""

    def __init__(self, rows: np.ndarray[Any, Any], texts: _Texts) -> None:
        self.rows, self._texts = rows, texts

    @classmethod
    def of(cls, clips: Iterable[ClipRef]) -> ClipList:
        """`clips` themselves where they are such a list."""
        if isinstance(clips, ClipList):
            return clips
        numbers: dict[str, int] = {}

        def row(clip: ClipRef) -> tuple[Any, ...]:
            values = list(_values(clip))
            for i in _TEXTS:
                values[i] = numbers.setdefault(values[i], len(numbers))
            return tuple(values)

        rows = np.fromiter(map(row, clips), ROW)
        return cls(rows, _Texts(numbers))

    def take(self, numbers: Any) -> ClipList:
        """Those of these numbers, or where a mask is true."""
        return ClipList(self.rows[numbers], self._texts)

    def __add__(self, other: ClipList) -> ClipList:
        if other._texts is self._texts:
            return ClipList(np.concatenate([self.rows, other.rows]), self._texts)
        return ClipList.of(chain(self, other))

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClipList) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    @overload
    def __getitem__(self, number: int) -> ClipRef: ...
    @overload
    def __getitem__(self, number: slice) -> ClipList: ...
    def __getitem__(self, number: int | slice) -> ClipRef | ClipList:
        if isinstance(number, slice):
            return self.take(number)
        return _made(self.rows[number].item(), self._texts.__getitem__)

    def __iter__(self) -> Iterator[ClipRef]:
        for first in range(0, len(self), AT_ONCE):
            text = cache(self._texts.__getitem__)
            for row in self.rows[first : first + AT_ONCE].tolist():
                yield _made(row, text)


def _made(row: tuple[Any, ...], text: Callable[[int], str]) -> ClipRef:
    unit, key, speaker, source, num_frames, start_s, duration_s, content, repeat, guessed = row
    lies = unit, text(key), speaker, text(source), num_frames
    return ClipRef(*lies, start_s, duration_s, text(content), repeat, guessed)
