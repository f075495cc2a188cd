"""Loudness of clips, and the one loudness that all clips of a dataset can have without clipping."""

from __future__ import annotations

import math
import threading

import numpy as np

from rvc_dist.choices import PYLOUDNORM
from rvc_dist.data.audio import Wave
from rvc_dist.workspace import StageError

MAX_PEAK_DB = -1.0
"""No clip peaks above this, in dB of full scale."""


class LoudnessMeter:
    """Integrated loudness of clips at `rate` by ITU-R BS.1770-4, as pyloudnorm has it.

    Raises:
        StageError: the package pyloudnorm is missing.
    """

    def __init__(self, rate: int) -> None:
        try:
            from pyloudnorm import Meter
        except ImportError as error:
            raise StageError(*PYLOUDNORM.missing("preprocess.normalization lufs", error)) from error
        self.meter = Meter(rate)
        self.lock = threading.Lock()  # it keeps the blocks of the clip that it measures, and changes warnings' filters

    def __call__(self, wave: Wave) -> float | None:
        """In LUFS, of a clip [S] of 0.4 s or more; None where all of it is below -70 LUFS, which is silence."""
        with self.lock:
            loudness = float(self.meter.integrated_loudness(wave.astype(np.float64)))
        return loudness if math.isfinite(loudness) else None

    def most(self, wave: Wave) -> float | None:
        """The loudness in LUFS at which a clip peaks at MAX_PEAK_DB."""
        loudness = self(wave)
        return None if loudness is None else loudness + MAX_PEAK_DB - 20.0 * math.log10(float(np.abs(wave).max()))

    def levelled(self, wave: Wave, target: float) -> Wave:
        """A clip at `target` LUFS; one that is silence stays as it is."""
        loudness = self(wave)
        if loudness is None:
            return wave
        return (wave * np.float32(10.0 ** ((target - loudness) / 20.0))).astype(np.float32)
