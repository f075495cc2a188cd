"""What a generator is fed of a recording, and what it makes of that: in `infer`, and in training to be listened to.

Shapes: S samples, T frames, T50 and T100 frames at 50 and 100 a second, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rvc_dist.config import F0_HOP, F0_PER_S, FEATURE_RATE, ExtractConfig, Recipe
from rvc_dist.data import audio, decode
from rvc_dist.features.energy import frame_energy
from rvc_dist.features.extractor import Extractor
from rvc_dist.features.f0 import F0Method, autotune, drawn_on
from rvc_dist.features.index_file import Retriever
from rvc_dist.models.generator import Generator
from rvc_dist.models.pitch import coarse_pitch
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.train.dataset import covered_frames, feature_frames

CONTEXT = F0_PER_S
"""Frames of context on either side of a window: more than the encoders' and the decoder's reach at the joins."""
MEDIAN_PIECES, MEDIAN_PIECE_S = 12, 10.0
"""The median pitch of a long recording is that of so many pieces, spread evenly over it, each so long."""
F0: TypeAlias = npt.NDArray[np.float32]
"""[T100] in Hz, 0 where unvoiced."""


class Fed(NamedTuple):
    """A window as a generator is fed it."""

    content: Tensor
    """[T, C] float32"""
    f0: Tensor
    """[T] float32 in Hz, 0 where unvoiced"""
    energy: Tensor | None
    """[T] float32, where the generator follows it"""
    num_samples: int
    """Of the window, at the voice's rate: T frames may be a little less."""


def for_conversion(extract: ExtractConfig) -> ExtractConfig:
    """The settings of an `Extractor` for a `Feeder`, which tunes and draws on the pitch only once it is transposed."""
    return replace(extract, precision="fp32", f0_autotune=False, unvoiced="zero")


def filtered(recipe: Recipe, wave: audio.Wave, rate: int) -> audio.Wave:
    """As the clips were in training: without it a young voice hums a constant that no mel loss hears."""
    return audio.highpass(wave, rate) if recipe.preprocess.process_effects else wave


@dataclass(frozen=True)
class Feeder:
    """What the features of windows become before a generator of `shape` is fed them."""

    shape: GeneratorShape
    extractor: Extractor
    retriever: Retriever | None
    recipe: Recipe
    """Its `infer` says how."""
    draws_on: bool
    """The pitch is drawn on over unvoiced frames (extract.unvoiced)."""
    semitones: float = 0.0
    """Transposition besides infer.pitch."""
    given_pitch: Callable[[F0, int], F0] | None = None
    """The pitch in its place, and the frame of the recording at which it begins -> the pitch to take."""

    def __call__(self, wave: audio.Wave, at: int = 0) -> Fed:
        """Of a window [S] at 16 kHz with its context; without it, it begins at frame `at` of the recording."""
        config, shape = self.recipe.infer, self.shape
        wave = filtered(self.recipe, wave, FEATURE_RATE)  # the context swallows the filter's onset
        ((_, content, f0),) = self.extractor([wave])
        f0 = self._pitch(f0, at)
        if self.retriever is not None:
            mixed = self.retriever(content, config.index_rate)
            kept = self._kept_share(f0, len(content))
            content = mixed * kept[:, None] + content * (1.0 - kept[:, None])
        if self.draws_on:
            f0 = drawn_on(f0)
        num_samples = len(wave) * shape.sample_rate // FEATURE_RATE
        frames = covered_frames(shape.sample_rate, shape.hop, num_samples, len(content), len(f0))
        of_f0 = feature_frames(frames, shape.sample_rate, shape.hop, F0_PER_S)
        return Fed(
            torch.from_numpy(content)[feature_frames(frames, shape.sample_rate, shape.hop, F0_PER_S // 2)],
            torch.from_numpy(f0)[of_f0],
            torch.from_numpy(frame_energy(wave, len(f0)))[of_f0] if shape.energy else None,
            num_samples,
        )

    def _pitch(self, f0: Any, at: int) -> Any:
        """The pitch of the result of a tracked one: [T100] in Hz, 0 where unvoiced."""
        config, tuned = self.recipe.infer, self.recipe.extract
        f0 = f0 * 2.0 ** ((config.pitch + self.semitones) / 12.0)
        as_trained = tuned.f0_autotune_strength if tuned.f0_autotune else 0.0
        strength = as_trained if config.autotune is None else config.autotune
        if strength > 0.0:
            f0 = np.where(f0 > 0, autotune(torch.from_numpy(f0), strength).numpy(), f0)
        return self.given_pitch(f0, at - CONTEXT) if self.given_pitch else f0

    def _kept_share(self, f0: Any, num_content: int) -> Any:
        """How much of the retrieval each content frame [T50] keeps: unvoiced consonants are easily smeared by it.

        A voice without pitch guidance does not know what is voiced, and keeps all of it.
        """
        protect = self.recipe.infer.protect if self.shape.pitch_guidance else 0.5
        voiced = f0[np.minimum(np.arange(num_content) * 2, len(f0) - 1)] > 0
        return np.where(voiced | (protect >= 0.5), 1.0, protect).astype(np.float32)


@torch.no_grad()
def converted(generator: Generator, fed: Fed, speaker: int, recipe: Recipe) -> audio.Wave:
    """What the voice makes of a window [num_samples]; the last frames may be silent.

    Its noise comes from PyTorch's own generators. Weights that are damaged give numbers that are not finite.
    """
    shape, device = generator.shape, generator.emb_g.weight.device
    content, f0 = fed.content.unsqueeze(0).to(device), fed.f0.unsqueeze(0).to(device)
    energy = None if fed.energy is None else fed.energy.unsqueeze(0).to(device)
    coarse, f0_fed = (coarse_pitch(f0), f0) if shape.pitch_guidance else (None, None)
    lengths, speakers = (torch.tensor([n], device=device) for n in (content.shape[1], speaker))
    made = generator.infer(content, lengths, coarse, f0_fed, speakers, energy)[0, 0].float().cpu().numpy()
    made = filtered(recipe, made[: fed.num_samples], shape.sample_rate)
    return np.pad(made, (0, fed.num_samples - len(made)))


def with_context(wave: audio.Wave) -> audio.Wave:
    """A whole recording [S] at 16 kHz as one window: in whole frames, with silence around it as its context."""
    context = CONTEXT * F0_HOP
    return np.pad(wave, (context, -len(wave) % F0_HOP + context))


def semitones_to(
    wanted_hz: float, recording: decode.Recording, f0_method: F0Method, recipe: Recipe
) -> tuple[float, float | None]:
    """Whole semitones that bring a recording's median pitch nearest to another, and its median: None without voice.

    Raises:
        AudioError: it cannot be read.
    """
    found = median_f0(recording, f0_method, lambda wave: filtered(recipe, wave, FEATURE_RATE))
    return (0.0, None) if found is None else (float(round(12.0 * math.log2(wanted_hz / found))), found)


def median_f0(
    recording: decode.Recording, f0_method: F0Method, filter_wave: Callable[[audio.Wave], audio.Wave]
) -> float | None:
    """The median pitch of a recording in Hz, of waves [S] at 16 kHz that are filtered; None where none is voiced.

    Raises:
        AudioError: it cannot be read.
    """
    num = min(MEDIAN_PIECES, math.ceil(recording.duration_s / MEDIAN_PIECE_S))
    voiced = []
    for start_s in np.linspace(0.0, max(0.0, recording.duration_s - MEDIAN_PIECE_S), num):
        blocks = recording.blocks(float(start_s), round(MEDIAN_PIECE_S * recording.rate))
        wave = np.concatenate([np.zeros(F0_HOP, np.float32), *map(decode.mono, blocks)])
        wave = filter_wave(audio.resample(wave, recording.rate, FEATURE_RATE))
        voiced.append(f0_method(torch.from_numpy(wave)[None])[0].cpu().numpy())
    f0 = np.concatenate(voiced)
    return float(np.median(f0[f0 > 0])) if (f0 > 0).any() else None
