"""The generator's pitch table."""

from __future__ import annotations

import math

import torch
from torch import Tensor

COARSE_MIN_HZ = 50.0
COARSE_MAX_HZ = 1100.0
COARSE_BINS = 256
"""Rows of the generator's pitch table; row 0 is never used."""
_LOW, _HIGH = (1127.0 * math.log1p(hz / 700.0) for hz in (COARSE_MIN_HZ, COARSE_MAX_HZ))
"""The same in mel."""


def coarse_pitch(f0: Tensor) -> Tensor:
    """The row of the generator's pitch table for each f0: Hz, any shape -> int64 of that shape, 1 to 255.

    Mel-spaced over 50..1100 Hz whatever range was tracked, because the table was trained so; unvoiced (0) is 1.
    """
    mel = 1127.0 * torch.log1p(f0.float() / 700.0)
    scaled = (mel - _LOW) * (COARSE_BINS - 2) / (_HIGH - _LOW) + 1.0
    return scaled.clamp(1.0, COARSE_BINS - 1.0).round().long()


def coarse_hz(coarse: Tensor) -> Tensor:
    """The pitch in Hz in the middle of each row, of any shape."""
    mel = _LOW + (coarse - 1.0) * (_HIGH - _LOW) / (COARSE_BINS - 2)
    return 700.0 * torch.expm1(mel / 1127.0)
