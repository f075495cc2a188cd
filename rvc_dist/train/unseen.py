"""How a voice converts speakers whom training never hears: their clips are the source, a trained speaker the target.

The target of a clip is the trained speaker whose median pitch is nearest to the clip's, of some that are drawn: so
nothing has to be transposed, and the source's own pitch is what the result is compared with.

T frames, S samples.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rvc_dist.config import FEATURE_RATE, Recipe
from rvc_dist.data import audio
from rvc_dist.features.content import Embedder, load_embedder
from rvc_dist.features.extractor import told_as_stage_errors
from rvc_dist.train.clips import MUTE_SOURCE, ClipRef
from rvc_dist.train.dataset import ClipDataset, ClipTable
from rvc_dist.train.holdout import draw, evenly
from rvc_dist.train.quality import Ear, defined_mean, defined_text, voice_similarity
from rvc_dist.workspace import StageError

logger = logging.getLogger(__name__)

MAX_CLIPS, MAX_S = 16, 3.0
"""Of a validation, and seconds of each."""
MAX_TARGETS = 32


class UnseenQuality(NamedTuple):
    """Of conversions, against their sources; not a number where there is nothing to measure it on."""

    f0_cents: float
    """As those of `Quality`, against the source."""
    voicing_error: float
    loudness_db: float
    content_similarity: float
    """Mean cosine of the content features of source and result, frame by frame: 1 for the same words."""
    target_similarity: float
    """How alike the result and the target's own speech are (`voice_similarity`)."""

    def text(self) -> str:
        """Those that there are, in a line."""
        return defined_text(self._asdict())


class UnseenSpeech:
    """Some clips of `table.unseen`, and into whom each is converted: the same on every rank."""

    def __init__(self, recipe: Recipe, table: ClipTable, dataset: ClipDataset, ear: Ear) -> None:
        self.recipe, self.dataset, self.ear = recipe, dataset, ear
        most = round(MAX_S * recipe.data.sample_rate / recipe.rate_spec.hop)
        clips = evenly(table.unseen, MAX_CLIPS, recipe.train.seed)[:MAX_CLIPS]
        targets = targets_of(recipe, table, dataset) if clips else []
        self.pairs = [
            (replace(clip, num_frames=min(clip.num_frames, most)), self._nearest(clip, targets, i))
            for i, clip in enumerate(clips)
        ]
        self._embedder: Embedder | None = None
        self._has_tried = False

    def _nearest(self, clip: ClipRef, targets: Sequence[tuple[ClipRef, float]], number: int) -> ClipRef:
        hz = median_hz(self.dataset.read(clip).f0)
        voiced = [(abs(math.log(other / hz)), i) for i, (_, other) in enumerate(targets) if other > 0 < hz]
        return targets[min(voiced)[1] if voiced else number % len(targets)][0]

    def embedder(self) -> Embedder | None:
        """The content encoder; None, with one warning, where it is not to be had."""
        if not self._has_tried:
            self._has_tried = True
            device = self.ear.device
            try:
                with torch.random.fork_rng([device] if device.type == "cuda" else []), told_as_stage_errors():
                    self._embedder = load_embedder(self.recipe.extract, self.recipe.model.version, device)
            except StageError as error:
                logger.warning("validation does not measure the content of conversions: %s", error)
        return self._embedder

    @torch.no_grad()
    def compare(self, source: Tensor, target: Tensor, made: Tensor) -> UnseenQuality:
        """What was `made` [S] of a `source` [S], in the voice that says `target` [S]."""
        if not made.isfinite().all():
            return UnseenQuality(math.inf, math.inf, math.inf, -math.inf, -math.inf)
        against, content = self.ear.compare(self.ear.hear(source), made), math.nan
        if (embedder := self.embedder()) is not None:
            waves = (audio.resample(wave.cpu().numpy(), self.ear.rate, FEATURE_RATE) for wave in (source, made))
            of_source, of_made = (embedder(torch.from_numpy(wave)[None])[0] for wave in waves)
            content = float(F.cosine_similarity(of_source, of_made, dim=-1).cpu().double().mean())
        return UnseenQuality(
            against.f0_cents,
            against.voicing_error,
            against.loudness_db,
            content,
            voice_similarity(self.ear.hear(target), self.ear.hear(made)),
        )


def targets_of(recipe: Recipe, table: ClipTable, dataset: ClipDataset) -> list[tuple[ClipRef, float]]:
    """A clip of each of some trained speakers, held out where there is one, and its median pitch in Hz."""
    first: dict[int, ClipRef] = {}
    for clip in (*table.holdout, *table.train):
        if clip.source != MUTE_SOURCE:
            first.setdefault(clip.speaker, clip)
    drawn = sorted(first, key=lambda speaker: draw(recipe.train.seed, "target", speaker))[:MAX_TARGETS]
    return [(first[speaker], median_hz(dataset.read(first[speaker]).f0)) for speaker in sorted(drawn)]


def median_hz(f0: Tensor) -> float:
    """Of voiced frames of f0 [T] in Hz; 0 without any."""
    voiced = f0[f0 > 0]
    return float(voiced.median()) if len(voiced) else 0.0


def mean_unseen(qualities: Sequence[UnseenQuality]) -> UnseenQuality:
    """Each number's mean over those that have it."""
    return UnseenQuality(*map(defined_mean, zip(*qualities, strict=True)))
