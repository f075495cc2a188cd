"""Training losses: pure functions of tensors, float32 inside, without weights (those are in the recipe).

B batch, T frames, S samples, C channels. Adversarial, feature matching and mel losses are those of HiFi-GAN (arXiv
2010.05646), the KL term that of VITS (arXiv 2106.06103).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rvc_dist.models.spectral import log_mel, multiscale_mels


def discriminator_loss(real_scores: Sequence[Tensor], fake_scores: Sequence[Tensor]) -> Tensor:
    """Least squares: sum over sub-discriminators of mean((1 - D(real))^2) + mean(D(fake)^2)."""
    pairs = zip(real_scores, fake_scores, strict=True)
    return torch.stack(
        [(1 - real.float()).square().mean() + fake.float().square().mean() for real, fake in pairs]
    ).sum()


def generator_adversarial_loss(fake_scores: Sequence[Tensor]) -> Tensor:
    """Least squares: sum over sub-discriminators of mean((1 - D(fake))^2)."""
    return torch.stack([(1 - fake.float()).square().mean() for fake in fake_scores]).sum()


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
    """mean|log-mel(real) - log-mel(fake)| of waves [B, 1, S] or [B, S]."""
    real, fake = (log_mel(wave.flatten(1), rate, n_fft, hop, num_mels) for wave in (real_wave, fake_wave))
    return F.l1_loss(fake, real)


def multiscale_mel_loss(real_wave: Tensor, fake_wave: Tensor, rate: int) -> Tensor:
    """mean|log10-mel(real) - log10-mel(fake)| summed over `multiscale_mels`, divided by the number of scales."""
    pairs = zip(multiscale_mels(real_wave, rate), multiscale_mels(fake_wave, rate), strict=True)
    return torch.stack([F.l1_loss(fake, real) for real, fake in pairs]).mean()
