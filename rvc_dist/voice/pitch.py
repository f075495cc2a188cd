"""Which pitch a result gets that somebody wrote down.

Shapes: S samples, T frames at 100 a second.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from rvc_dist.config import F0_PER_S
from rvc_dist.files import ForeignFileError, read_bounded
from rvc_dist.train.conversion import F0
from rvc_dist.workspace import StageError

MAX_BYTES = 1 << 26
"""100 lines a second of 6 hours."""
MAX_HZ = 1e4


class GivenPitch:
    """The pitch in a file of lines `seconds,hz`, as RVC-WebUI reads them.

    Raises:
        StageError: it is no such file; says in which line.
    """

    def __init__(self, path: Path) -> None:
        try:
            text = read_bounded(path, MAX_BYTES).decode("utf-8-sig")
        except FileNotFoundError as error:
            raise StageError(f"infer.f0_file: {path} does not exist") from error
        except (ForeignFileError, UnicodeDecodeError) as error:
            raise StageError(f"infer.f0_file: {path} is no text of lines seconds,hz ({error})") from error
        points = [_point(path, n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        if not points:
            raise StageError(f"infer.f0_file: {path} is empty;", "expected lines seconds,hz")
        self._times, self._hz = np.array(points).T
        if (at := np.flatnonzero(np.diff(self._times) <= 0)).size:
            early, late = self._times[at[0] : at[0] + 2]
            raise StageError(f"infer.f0_file: {path}: {late:g} s follows {early:g} s;", "expected rising times")

    def __call__(self, f0: F0, first: int) -> F0:
        """`f0`, whose first frame is frame `first` of the recording, with the given pitch where there is one.

        Between two lines it is their straight line; where one of them is unvoiced, the nearer one.
        """
        seconds = (first + np.arange(len(f0))) / F0_PER_S
        right = np.searchsorted(self._times, seconds).clip(1, max(1, len(self._times) - 1))
        left, right = right - 1, right.clip(max=len(self._times) - 1)
        nearer = np.where(seconds - self._times[left] <= self._times[right] - seconds, left, right)
        both = (self._hz[left] > 0) & (self._hz[right] > 0)
        given = np.where(both, np.interp(seconds, self._times, self._hz), self._hz[nearer])
        half = 0.5 / F0_PER_S
        is_given = (seconds >= self._times[0] - half) & (seconds <= self._times[-1] + half)
        return np.where(is_given, given, f0).astype(np.float32)


def _point(path: Path, number: int, line: str) -> tuple[float, float]:
    try:
        seconds, hz = map(float, line.split(","))
    except ValueError:
        seconds, hz = math.nan, math.nan
    if not (0 <= seconds < math.inf and 0 <= hz <= MAX_HZ):
        raise StageError(
            f"infer.f0_file: {path}: line {number} is {line.strip()[:40]!a};",
            f"expected seconds,hz with at most {MAX_HZ:g} Hz (0: unvoiced), such as 1.25,220",
        )
    return seconds, hz
