"""How the numbers of clips and features lie in the files of units: what a narrow format costs, and the way back.

Pitch and energy are float32 in every format: they take less than a hundredth of the bytes.
Shapes: S samples, T50 frames at 50 a second, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rvc_dist.config import F0_PER_S, Recipe
from rvc_dist.data.audio import Wave
from rvc_dist.workspace import StageError

BYTES = {"float32": 4, "int16": 2, "float16": 2, "bfloat16": 2}
"""Of a number, by format."""
FORMATS = {"F32": "float32", "I16": "int16", "F16": "float16", "BF16": "bfloat16"}
"""By what safetensors files call them."""
FULL_SCALE = 32768
"""Steps of int16 from 0 to 1; the highest sample is one step less."""


def stored_wave(wave: Wave, form: str) -> tuple[Any, int]:
    """A wave [S] in the format `form`, and how many of its samples lay beyond -1..1, where int16 ends.

    int16 is round(32768 x), halves to the even step. The decoder ends in a tanh, so that no voice reaches what is
    clipped. Nothing is dithered: digital silence stays silent, and the mel losses, which are logarithmic, would hear
    the 4.8 dB more noise; recordings are noise enough to keep the steps from following the voice.
    """
    if form == "float32":
        return wave, 0
    steps = np.clip(np.rint(wave * np.float32(FULL_SCALE)), -FULL_SCALE, FULL_SCALE - 1)
    return steps.astype(np.int16), int(np.count_nonzero(np.abs(wave) > 1.0))


def float_wave(stored: Any) -> Wave:
    """A wave [S] as numpy reads it from a file, of either format."""
    return stored * np.float32(1 / FULL_SCALE) if stored.dtype == np.int16 else stored  # type: ignore[no-any-return]


def stored_content(content: Any, form: str) -> Any:
    """Content [T50, C] in the format `form`, rounded to its nearest number; a tensor where numpy has no such format.

    Raises:
        StageError: it does not hold a number that large.
    """
    if form == "float32":
        return content
    import torch

    kind = getattr(torch, form)
    stored = torch.tensor(content).to(kind)
    if not stored.isfinite().all():
        raise StageError(
            f"extract.content_format {form} holds numbers up to {torch.finfo(kind).max:g}, the content has "
            f"{np.abs(content).max():g};",
            "set extract.content_format bfloat16 or float32",
        )
    return stored


def clip_bytes_per_s(recipe: Recipe) -> int:
    """Of a clip's samples."""
    return recipe.data.sample_rate * BYTES[recipe.preprocess.clip_format]


def feature_bytes_per_s(recipe: Recipe, width: int) -> int:
    """Of a clip's content, `width` channels at 50 frames a second, its pitch, and its energy where it has one."""
    content = width * F0_PER_S // 2 * BYTES[recipe.extract.content_format]
    return content + F0_PER_S * (1 + recipe.model.energy) * BYTES["float32"]
