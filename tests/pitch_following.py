"""Whether a converted recording follows its source: pitch, and level."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from rvc_dist.config import F0_PER_S, FEATURE_RATE, ExtractConfig
from rvc_dist.data import audio, decode
from rvc_dist.features.f0 import load_f0

WINDOW_S = 0.03
"""Of the waves that are compared: some periods of the lowest voices, and short enough that the pitch hardly moves."""


class Following(NamedTuple):
    periodicity: float
    """Median normalised autocorrelation of the converted wave at the source's pitch period, over the source's voiced
    frames: 1 for a wave that repeats so, about 0 for noise and other pitches."""
    level_db: float
    """Of the converted recording above the source."""


def following(converted: Path, source: Path) -> Following:
    """Compare two files of the same words at the same times."""
    (wave, rate), (original, source_rate) = decode.decode(converted), decode.decode(source)
    original = audio.resample(original, source_rate, FEATURE_RATE)
    tracker = load_f0(ExtractConfig(f0_method="swipe"), torch.device("cpu"))
    f0 = tracker(torch.from_numpy(original)[None])[0].numpy()
    values = autocorrelation(wave, rate, f0)
    level = 20 * math.log10(np.sqrt(np.mean(wave**2)) / np.sqrt(np.mean(original**2)))
    return Following(float(np.median(values)), level)


def autocorrelation(wave: audio.Wave, rate: int, f0: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Of the voiced frames of `f0` [T100] in Hz: the correlation, -1 to 1, of the wave around the frame's middle with
    itself one period later. Silence correlates with nothing: 0."""
    size, values = round(WINDOW_S * rate), []
    for frame in np.flatnonzero(f0):
        lag = round(rate / float(f0[frame]))
        start = round(frame * rate / F0_PER_S) - (size + lag) // 2
        if start < 0 or start + size + lag > len(wave):
            continue
        here, later = wave[start : start + size].astype(float), wave[start + lag : start + lag + size].astype(float)
        norm = math.sqrt(float(here @ here) * float(later @ later))
        values.append(float(here @ later) / norm if norm > 1e-9 else 0.0)
    return np.array(values)
