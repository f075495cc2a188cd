"""How loud a voice is in each frame, which generators with `model.energy` are told beside content and pitch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from rvc_dist.config import F0_HOP, Recipe
from rvc_dist.data.audio import Wave

WINDOW = 2048
"""Samples at 16 kHz, centred on the frame's first: as the other tools of RVC measure it."""


def frame_energy(wave: Wave, num_frames: int) -> Wave:
    """RMS of a wave [S] at 16 kHz in its first T = `num_frames` frames of 10 ms: [T]; the ends are reflected."""
    padded = np.pad(wave.astype(np.float64), WINDOW // 2, mode="reflect")
    sums = np.concatenate([[0.0], np.cumsum(np.square(padded))])
    starts = np.minimum(np.arange(num_frames) * F0_HOP, len(wave))
    energy: Wave = np.sqrt(np.maximum(sums[starts + WINDOW] - sums[starts], 0.0) / WINDOW).astype(np.float32)
    return energy


def energy_arrays(recipe: Recipe, features: dict[str, Any], waves: Iterable[Wave]) -> dict[str, Wave]:
    """What a features file holds besides `features`, given the clips at 16 kHz; nothing where the recipe has none."""
    if not recipe.model.energy:
        return {}
    return {f"{i:05d}.energy": frame_energy(wave, len(features[f"{i:05d}.f0"])) for i, wave in enumerate(waves)}
