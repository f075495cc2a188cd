"""Waves to content features and pitch: what the extract and the infer stage both use.

Shapes: B clips of equal length, S samples, T50 and T100 frames at 50 and 100 a second, C channels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rvc_dist.config import F0_HOP, Recipe
from rvc_dist.data.audio import Wave
from rvc_dist.features.content import Embedder, load_embedder
from rvc_dist.features.f0 import F0Method, drawn_on, load_f0
from rvc_dist.runtime.device import local_device
from rvc_dist.workspace import StageError

logger = logging.getLogger(__name__)

MAX_AT_EDGE = 0.1
"""Share of the frames with a pitch that may lie at the edge of the range before it is reported: of ordinary speech it
comes to 0, but to 0.05 with yin, which hears a high pitch in some noise."""


@contextmanager
def told_as_stage_errors() -> Iterator[None]:
    """Inside, what an encoder or a tracker raises that is unknown, unfit or not to be had becomes a StageError."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise StageError(str(error)) from error


class Extractor(NamedTuple):
    """What turns a wave into features; loaded once a rank, and by the infer stage alike."""

    embedder: Embedder
    f0_method: F0Method | None
    """None where nobody asks for pitch: all is unvoiced then."""
    batch_clips: int
    draw_on: bool = False
    """The pitch is drawn on over unvoiced frames (extract.unvoiced), where it is 0 otherwise."""

    @classmethod
    def load(cls, recipe: Recipe, with_pitch: bool = True, device: torch.device | None = None) -> Extractor:
        """Load the encoder and the pitch tracker of the recipe, on this rank's device if none is given.

        Raises:
            StageError: one of them is unknown, or its weights or package are not to be had.
        """
        device = device or local_device()
        with told_as_stage_errors():
            return cls(
                load_embedder(recipe.extract, recipe.model.version, device),
                load_f0(recipe.extract, device) if with_pitch else None,
                recipe.extract.batch_clips,
                recipe.extract.unvoiced == "interpolated",
            )

    def __call__(self, waves: list[Wave]) -> Iterator[tuple[int, Any, Any]]:
        """Yield (index, content [T50, C], f0 [T100]) for 16 kHz waves [S], batched by equal length.

        Nothing is padded: padding changes what a group-normalised encoder gives.

        Raises:
            StageError: the content is not finite.
        """
        by_length: dict[int, list[int]] = {}
        for i, wave in enumerate(waves):
            by_length.setdefault(len(wave), []).append(i)
        for indices in by_length.values():
            for at in range(0, len(indices), self.batch_clips):
                batch = indices[at : at + self.batch_clips]
                stacked = torch.from_numpy(np.stack([waves[i] for i in batch]))
                # Nothing waits for the content before the pitch is computed, or given to the device to compute.
                content, f0 = (features.cpu().numpy() for features in self._features(stacked))
                if not np.isfinite(content).all():
                    raise StageError(
                        f"extract.embedder_model: {self.embedder.name} gives numbers that are not finite;",
                        "its weights are damaged, or too large for extract.precision fp16: then set bf16 or fp32",
                    )
                for row, i in enumerate(batch):
                    yield i, content[row], drawn_on(f0[row]) if self.draw_on else f0[row]

    def _features(self, waves: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S] -> content [B, T50, C] and f0 [B, T100]."""
        # Once, for both: a copy from here waits for all that the device has to do.
        moved = waves.to(self.embedder.device)
        content = self.embedder(moved)
        if self.f0_method is None:
            return content, torch.zeros(waves.shape[0], waves.shape[1] // F0_HOP)
        return content, self.f0_method(moved if self.f0_method.device == self.embedder.device else waves)

    def warn_at_edges(self, stage: str) -> None:
        """Tell of a voice that often was at or beyond the lowest or highest pitch that is taken."""
        if self.f0_method is None:
            return
        pitched, low, high = self.f0_method.total_counts().tolist()
        edges = {"f0_min": (low, "lowest", "below", "lower"), "f0_max": (high, "highest", "above", "raise")}
        for key, (count, end, side, change) in edges.items():
            if count > MAX_AT_EDGE * pitched:
                logger.warning(
                    "%s: %.0f%% of the frames with a pitch are at the %s that is taken, %g Hz, or %s it, where all is "
                    "unvoiced: %s %s.%s if the voice goes there",
                    *(stage, 100 * count / pitched, end, getattr(self.f0_method, key), side, change, stage, key),
                )
