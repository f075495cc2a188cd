"""What a pitch tracker's file has in unvoiced frames, as its numbers show: 0, or a pitch that nobody sang."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FLOOR_HZ = 50.0
"""What ARVC lifts unvoiced frames to."""
ZEROS, FLOORS = 0.001, 0.005
"""Shares of frames from which on they are no accident: speech has some 20% of the one or of the other."""


@dataclass(frozen=True)
class UnvoicedCount:
    """Of clips with any voice, from the first voiced frame to the last: who interpolates leaves no 0 there."""

    frames: int = 0
    zeros: int = 0
    floors: int = 0
    """Of exactly FLOOR_HZ."""

    @classmethod
    def of(cls, f0: npt.NDArray[np.float32]) -> UnvoicedCount:
        """Count f0 [T] in Hz."""
        voiced = np.flatnonzero(f0)
        if not len(voiced):
            return cls()
        inside = f0[voiced[0] : voiced[-1] + 1]
        return cls(len(inside), len(inside) - len(voiced), int(np.count_nonzero(inside == FLOOR_HZ)))

    def __add__(self, other: UnvoicedCount) -> UnvoicedCount:
        return UnvoicedCount(self.frames + other.frames, self.zeros + other.zeros, self.floors + other.floors)

    @property
    def convention(self) -> str:
        """zero, as in Applio; clipped to FLOOR_HZ, as in ARVC; interpolated, as in RVC-WebUI and rvc-next."""
        if self.zeros >= ZEROS * self.frames:
            return "zero"
        return "clipped" if self.floors >= FLOORS * self.frames else "interpolated"
