"""Made-up features, for tools that measure or try where a run has none."""

from __future__ import annotations

from typing import Any

import numpy as np

CONTENT_WIDTH = {"v1": 256, "v2": 768}
"""Of the content features, by model.version."""


def made_up_pitch(num_frames: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A contour [T100] in Hz between 80 and 300, 0 in every fourth stretch of 0.2 s."""
    frames = np.arange(num_frames)
    contour = 190 + 110 * np.sin(2 * np.pi * frames / 150)
    return np.where(frames // 20 % 4 == 3, 0.0, contour).astype(np.float32)
