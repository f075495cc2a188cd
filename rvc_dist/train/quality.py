"""How near a voice comes to a recording: distances between a real wave and a generated one of the same words.

Both have the same timing, so frames are compared one by one and nothing is warped. None of the distances looks at
phases, which a vocoder is free to choose: so PESQ and SI-SDR are not among them.

S samples, F bins, M mel bands, T frames of the spectrogram, T100 frames of 10 ms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rvc_dist.config import FEATURE_RATE, ExtractConfig, Recipe
from rvc_dist.data import audio
from rvc_dist.features.f0 import F0Method, load_f0
from rvc_dist.models.spectral import mel_from_spectrogram, spectrogram, without_tf32
from rvc_dist.train.losses import multiscale_mel_loss
from rvc_dist.train.speaker_encoder import SpeakerEncoder, speaker_encoder

NUM_CEPSTRA = 13
"""Without the first, which is the loudness."""
RANGE_DB = 50.0
"""A frame so much quieter than the recording's loudest is background."""
SILENCE_DB = -70.0
"""Of full scale: below it a frame is silence, however quiet the recording is."""


class Quality(NamedTuple):
    """Distances of a generated wave from the real one; not a number where a wave has nothing to measure it on."""

    mel_distance: float
    """mean|log10 mel(real) - log10 mel(fake)| over eight resolutions: `multiscale_mel_loss` (Kumar et al. 2023,
    arXiv 2306.06546)."""
    mcd_db: float
    """Mel-cepstral distance in dB (Kubichek 1993, IEEE Pacific Rim Conf. on Communications), of the frames in which the
    real voice sounds: 10 / ln 10 * sqrt(2 * sum of squared differences of NUM_CEPSTRA cepstra)."""
    f0_cents: float
    """Mean difference in pitch, of the frames in which both are voiced."""
    voicing_error: float
    """Share of the frames in which one is voiced and the other is not (Nakatani et al. 2008, Speech Communication
    50(3))."""
    loudness_db: float
    """Mean difference of A-weighted levels (Engel et al. 2020, arXiv 2001.04643), of the frames in which the real voice
    sounds."""
    similarity: float
    """Of the speakers, 1 for the same: the cosine of the embeddings of `speaker_encoder` where its package is installed
    (Casanova et al. 2021, arXiv 2104.05557), else `spread_similarity`."""

    def text(self) -> str:
        """Those that there are, in a line."""
        return defined_text(self._asdict())


TEXTS = {
    "mel_distance": "mel {:.4f}",
    "mcd_db": "cepstra {:.2f} dB",
    "f0_cents": "f0 {:.0f} cents",
    "voicing_error": "voicing {:.1%}",
    "loudness_db": "loudness {:.1f} dB",
    "similarity": "similarity {:.3f}",
    "content_similarity": "content {:.3f}",
    "target_similarity": "target's voice {:.3f}",
}
"""How a line shows the numbers of a Quality, and of an `unseen.UnseenQuality`."""
BROKEN = Quality(math.inf, math.inf, math.inf, math.inf, math.inf, -math.inf)
"""Of a wave that holds anything but finite numbers."""


@dataclass(frozen=True)
class Heard:
    """What is compared of one wave."""

    wave: Tensor
    """[S]"""
    cepstra: Tensor
    """[NUM_CEPSTRA, T]"""
    level: Tensor
    """[T] in dB of full scale"""
    f0: Tensor
    """[T100] in Hz, 0 where unvoiced"""
    embedding: Tensor | None
    """Of the speaker, of norm 1, where there is an encoder."""

    @cached_property
    def sounding(self) -> Tensor:
        """Which frames are neither background nor silence: bool [T]."""
        return self.level >= max(SILENCE_DB, float(self.level.max()) - RANGE_DB)


class Ear:
    """Listens to waves of one sample rate on one device."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.rate, self.spec, self.extract = recipe.data.sample_rate, recipe.rate_spec, recipe.extract
        self.device = device
        self._weights = a_weighting(torch.arange(self.spec.n_fft // 2 + 1) * (self.rate / self.spec.n_fft)).to(device)
        self._shortest = max(self.spec.n_fft, self.rate // 5)

    @cached_property
    def encoder(self) -> SpeakerEncoder | None:
        return speaker_encoder(self.device)

    @torch.no_grad()
    @without_tf32()
    def hear(self, wave: Tensor) -> Heard:
        """Of a wave [S] of finite numbers; zeros follow one that is shorter than the longest window."""
        spec = self.spec
        wave = F.pad(wave.float(), (0, max(0, self._shortest - len(wave))))
        magnitude = spectrogram(wave[None], spec.n_fft, spec.hop)
        power = (self._weights[:, None] * magnitude[0].square()).sum(0)
        level = 10.0 * power.log10() - 20.0 * math.log10(spec.n_fft / 4)  # of a sine's peak in a Hann window
        cepstra = mel_cepstra(mel_from_spectrogram(magnitude, self.rate, spec.n_fft, spec.num_mels)[0])
        resampled = torch.from_numpy(audio.resample(wave.cpu().numpy(), self.rate, FEATURE_RATE)).to(self.device)
        f0 = pitch_tracker(self.extract.f0_min, self.extract.f0_max, self.device)(resampled[None])[0]
        return Heard(wave, cepstra, level, f0, self.encoder(resampled) if self.encoder else None)

    @torch.no_grad()
    def compare(self, real: Heard, wave: Tensor) -> Quality:
        """How far a generated wave [S] is from the `real` one."""
        if not wave.isfinite().all():
            return BROKEN
        fake, sounding = self.hear(wave), real.sounding
        distance = float(multiscale_mel_loss(real.wave[None], fake.wave[None], self.rate))
        if not math.isfinite(distance):
            return BROKEN
        both = (real.f0 > 0) & (fake.f0 > 0)
        floor = float(real.level.max()) - RANGE_DB
        return Quality(
            mel_distance=distance,
            mcd_db=_mean(mel_cepstral_distance(real.cepstra, fake.cepstra)[sounding]),
            f0_cents=_mean(1200.0 * (fake.f0[both] / real.f0[both]).log2().abs()),
            voicing_error=_mean(((real.f0 > 0) != (fake.f0 > 0)).float()),
            loudness_db=_mean((real.level - fake.level.clamp_min(floor))[sounding].abs()),
            similarity=voice_similarity(real, fake),
        )


@lru_cache(maxsize=4)
def pitch_tracker(f0_min: float, f0_max: float, device: torch.device) -> F0Method:
    """The same whatever made the features' f0: it needs neither weights nor a library, and the device computes it."""
    return load_f0(ExtractConfig(f0_method="swipe", f0_min=f0_min, f0_max=f0_max), device)


def a_weighting(hz: Tensor) -> Tensor:
    """By what the A curve of IEC 61672 multiplies the power at `hz`: 1 at 1 kHz."""
    squared = hz.double().square()
    falls = (squared + 107.7**2).sqrt() * (squared + 737.9**2).sqrt() * (squared + 20.6**2) * (squared + 12194.0**2)
    gain: Tensor = 10.0 ** (2.0 / 20.0) * 12194.0**2 * squared.square() / falls
    return gain.square().float()


def mel_cepstra(log_mel: Tensor) -> Tensor:
    """Cepstra 1 to NUM_CEPSTRA of natural log magnitudes [M, T]: c_m = 2 / M * sum_k X_k cos(pi m (k + 1/2) / M)."""
    num_mels = len(log_mel)
    orders = torch.arange(1, NUM_CEPSTRA + 1, device=log_mel.device)
    bands = torch.arange(num_mels, device=log_mel.device) + 0.5
    return 2.0 / num_mels * torch.cos(math.pi / num_mels * orders[:, None] * bands) @ log_mel


def mel_cepstral_distance(real: Tensor, fake: Tensor) -> Tensor:
    """Of every frame, in dB: [NUM_CEPSTRA, T] twice -> [T]."""
    distance: Tensor = 10.0 / math.log(10.0) * (2.0 * (real - fake).square().sum(0)).sqrt()
    return distance


def voice_similarity(real: Heard, fake: Heard) -> float:
    """1 for the same speaker; not a number where the real voice hardly sounds, 0 where the other one does."""
    if real.sounding.sum() < 2:
        return math.nan
    if fake.sounding.sum() < 2:
        return 0.0
    if real.embedding is not None and fake.embedding is not None:
        return float(real.embedding @ fake.embedding)
    return spread_similarity(real.cepstra[:, real.sounding], fake.cepstra[:, fake.sounding])


def spread_similarity(real: Tensor, fake: Tensor) -> float:
    """How alike the mel cepstra [NUM_CEPSTRA, T] of two voices are spread over their sounding frames: 0 to 1.

    The Bhattacharyya coefficient of two normal distributions with independent cepstra, its root taken by the number of
    cepstra: a second-order statistic of speakers (Bimbot et al. 1995, Speech Communication 17). Stretches of 3 s of one
    speaker have 0.95 to 1.00, those of others 0.63 to 0.97.
    """
    (mean, var), (other_mean, other_var) = ((x.mean(1), x.var(1) + 1e-6) for x in (real, fake))
    both = var + other_var
    distance = (mean - other_mean).square() / (4.0 * both) + 0.5 * (both / (2.0 * (var * other_var).sqrt())).log()
    return float((-distance.mean()).exp())


def _mean(values: Tensor) -> float:
    return float(values.cpu().double().mean())  # of none: not a number


def mean_quality(qualities: Sequence[Quality]) -> Quality:
    """Each number's mean over those that have it, the same for any order of computing."""
    return Quality(*(defined_mean(column) for column in zip(*qualities, strict=True)))


def defined_mean(values: Iterable[float]) -> float:
    """Of those that are numbers."""
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def defined_text(values: Mapping[str, float]) -> str:
    """The TEXTS of those that are numbers, in a line."""
    return ", ".join(TEXTS[name].format(value) for name, value in values.items() if not math.isnan(value))
