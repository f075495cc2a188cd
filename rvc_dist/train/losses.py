"""Training losses: pure functions of tensors, float32 inside, without weights (those are in the recipe).

A loss of the generator is a function, its entry in GENERATOR_LOSSES, and a field of LossConfig for its weight.

B batch, T frames, S samples, C channels. Adversarial, feature matching and mel losses are those of HiFi-GAN (arXiv
2010.05646), the KL term that of VITS (arXiv 2106.06103).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rvc_dist.config import LossConfig, Recipe
from rvc_dist.models.generator import GeneratorOutput
from rvc_dist.models.spectral import log_mel, multiscale_mels, scale_weights, spectrogram
from rvc_dist.train.dataset import Batch

STFT_RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
"""Of `stft_loss`: size of the transform, hop and window in samples, those of Parallel WaveGAN (arXiv 1910.11480)."""
LOG_FLOOR = 0.01
"""Least magnitude of a bin that `stft_loss` takes the logarithm of, some -90 dB: what lies near the spectrograms' own
floor of 0.001 is rounding noise, of which the gradients would be made."""
QUIET_MAGNITUDE = 0.1
"""Spectra of less than this in the mean are not what `stft_loss` divides by: those of silent clips, and of noise below
some -40 dB."""


def discriminator_loss(
    real_scores: Sequence[Tensor], fake_scores: Sequence[Tensor], weights: Sequence[float] | None = None
) -> Tensor:
    """Least squares: sum over sub-discriminators of mean((1 - D(real))^2) + mean(D(fake)^2), each times its weight."""
    pairs = zip(real_scores, fake_scores, strict=True)
    return _weighted(
        [(1 - real.float()).square().mean() + fake.float().square().mean() for real, fake in pairs], weights
    )


def generator_adversarial_loss(fake_scores: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Least squares: sum over sub-discriminators of mean((1 - D(fake))^2), each times its weight."""
    return _weighted([(1 - fake.float()).square().mean() for fake in fake_scores], weights)


def _weighted(terms: Sequence[Tensor], weights: Sequence[float] | None) -> Tensor:
    pairs = zip(terms, weights or [1.0] * len(terms), strict=True)
    return torch.stack([term if weight == 1 else weight * term for term, weight in pairs]).sum()


def feature_matching_loss(
    real_features: Sequence[Sequence[Tensor]], fake_features: Sequence[Sequence[Tensor]]
) -> Tensor:
    """2 * sum over every layer of every sub-discriminator of mean|real - fake|; no gradient flows to `real`."""
    distances = [
        F.l1_loss(fake.float(), real.detach().float())
        for real_layers, fake_layers in zip(real_features, fake_features, strict=True)
        for real, fake in zip(real_layers, fake_layers, strict=True)
    ]
    return 2 * torch.stack(distances).sum()


def kl_loss(
    z_p: Tensor, logs_q: Tensor, m_p: Tensor, logs_p: Tensor, mask: Tensor, num_frames: Tensor | float | None = None
) -> Tensor:
    """Divergence of the posterior from the prior, per valid frame; tensors are [B, C, T], `mask` is [B, 1, T].

    Sum over valid frames and channels of logs_p - logs_q - 0.5 + 0.5 (z_p - m_p)^2 exp(-2 logs_p), divided by
    `num_frames` or else by the valid frames of this batch. Ranks that average their gradients pass the mean count over
    ranks, so that every frame weighs the same everywhere.
    """
    z_p, logs_q, m_p, logs_p, mask = (x.float() for x in (z_p, logs_q, m_p, logs_p, mask))
    kl = logs_p - logs_q - 0.5 + 0.5 * (z_p - m_p).square() * torch.exp(-2 * logs_p)
    return (kl * mask).sum() / (mask.sum() if num_frames is None else num_frames)


def mel_loss(real_wave: Tensor, fake_wave: Tensor, *, rate: int, n_fft: int, hop: int, num_mels: int) -> Tensor:
    """mean|log-mel(real) - log-mel(fake)| of waves [B, 1, S] or [B, S]; no gradient flows to `real`."""
    waves = torch.cat([real_wave, fake_wave]).flatten(1)  # in one pass: on a GPU, launches are what it takes
    real, fake = log_mel(waves, rate, n_fft, hop, num_mels).chunk(2)
    return F.l1_loss(fake, real.detach())


def multiscale_mel_loss(real_wave: Tensor, fake_wave: Tensor, rate: int, at_edges: bool = False) -> Tensor:
    """mean|log10-mel(real) - log10-mel(fake)| of every scale of `multiscale_mels`, and the mean of these.

    No gradient flows to `real`.
    """
    real, fake = multiscale_mels(torch.cat([real_wave, fake_wave]), rate, at_edges).chunk(2)
    distances = (fake - real.detach()).abs().mean((0, 2))
    return (distances * scale_weights(distances.device)).sum()


def stft_loss(real_wave: Tensor, fake_wave: Tensor) -> Tensor:
    """Multi-resolution STFT loss (arXiv 1910.11480) of waves [B, 1, S]; no gradient flows to `real`.

    Mean over STFT_RESOLUTIONS and clips of |R - F| / |R| (norms of a clip's magnitudes) + mean|log R - log F|.
    """
    waves, losses = torch.cat([real_wave, fake_wave]).flatten(1), []
    for n_fft, hop, window in STFT_RESOLUTIONS:
        real, fake = spectrogram(waves, n_fft, hop, window).flatten(1).chunk(2)
        real = real.detach()
        size = real.norm(dim=1).clamp(min=QUIET_MAGNITUDE * real.shape[1] ** 0.5)
        of_logs = F.l1_loss(fake.clamp(min=LOG_FLOOR).log(), real.clamp(min=LOG_FLOOR).log())
        losses.append(((fake - real).norm(dim=1) / size).mean() + of_logs)
    return torch.stack(losses).mean()


def energy_loss(real_wave: Tensor, fake_wave: Tensor, rate: int) -> Tensor:
    """mean|RMS(real) - RMS(fake)| of frames of 128 ms, 10 ms apart, of waves [B, 1, S]; no gradient flows to `real`."""
    squares = torch.cat([real_wave, fake_wave]).float().square()
    real, fake = (F.avg_pool1d(squares, round(0.128 * rate), rate // 100) + 1e-8).sqrt().chunk(2)
    return F.l1_loss(fake, real.detach())


class LossInputs(NamedTuple):
    """What a loss of the generator may look at: one micro-batch of one rank."""

    recipe: Recipe
    batch: Batch
    out: GeneratorOutput
    real: Tensor
    """[B, 1, segment], which `out.wave` imitates."""
    real_features: Sequence[Sequence[Tensor]]
    fake_features: Sequence[Sequence[Tensor]]
    fake_scores: Sequence[Tensor]
    """What D makes of both; its weights get no gradients. Empty before D joins, for those that are not ADVERSARIAL."""

    @property
    def score_weights(self) -> Sequence[float]:
        return self.recipe.model.discriminator_spec.score_weights


def recipe_mel_loss(recipe: Recipe, real: Tensor, fake: Tensor) -> Tensor:
    """The mel loss that the recipe chooses, of waves [B, 1, S]."""
    rate, spec = recipe.data.sample_rate, recipe.rate_spec
    if recipe.multiscale_mel_loss:
        return multiscale_mel_loss(real, fake, rate, recipe.train.mel_frames == "edge")
    return mel_loss(real, fake, rate=rate, n_fft=spec.n_fft, hop=spec.hop, num_mels=spec.num_mels)


def _kl(x: LossInputs) -> Tensor:
    """A mean over frames, of the global batch; padding clips count for nothing."""
    out = x.out
    kl = kl_loss(out.z_p, out.logs_q, out.m_p, out.logs_p, out.mask, x.batch.mean_frames)
    return kl if x.batch.loss_scale else kl * 0.0


GENERATOR_LOSSES: dict[str, Callable[[LossInputs], Tensor]] = {
    "mel": lambda x: recipe_mel_loss(x.recipe, x.real, x.out.wave) * x.batch.loss_scale,
    "fm": lambda x: feature_matching_loss(x.real_features, x.fake_features) * x.batch.loss_scale,
    "adv": lambda x: generator_adversarial_loss(x.fake_scores, x.score_weights) * x.batch.loss_scale,
    "kl": _kl,
    "stft": lambda x: stft_loss(x.real, x.out.wave) * x.batch.loss_scale,
    "energy": lambda x: energy_loss(x.real, x.out.wave, x.recipe.data.sample_rate) * x.batch.loss_scale,
}
"""By field of LossConfig. Each gives [] this micro-batch's part of the global batch's loss: a mean over clips is
multiplied by `batch.loss_scale`, which is 0 where a rank has no clip of its own."""

ADVERSARIAL = ("fm", "adv")
"""Those that need D."""


def wanted(weights: LossConfig, adversarial: bool = True) -> dict[str, Callable[[LossInputs], Tensor]]:
    """GENERATOR_LOSSES without those that are off by default and get no weight, and, if not `adversarial`, need D.

    Others are computed even without one: gradients reach all parameters only through all of them.
    """
    on = {f.name for f in fields(weights) if getattr(weights, f.name) or f.default}
    on -= set() if adversarial else set(ADVERSARIAL)
    return {name: loss for name, loss in GENERATOR_LOSSES.items() if name in on}


def weighted_sum(terms: Mapping[str, Tensor], weights: LossConfig, kl_warmup: float) -> Tensor:
    """The generator's loss, summed in the order of LossConfig's fields; `kl_warmup` in 0..1 scales the KL term."""
    names = [f.name for f in fields(weights) if f.name in terms]
    scaled: dict[str, float] = {n: getattr(weights, n) * (kl_warmup if n == "kl" else 1.0) for n in names}
    total, *others = [weight * terms[name] for name, weight in scaled.items()]
    for term in others:
        total = total + term
    return total
