"""The yardstick of `rvc-dist bench`: a training step as RVC trainers do it, on the same networks and losses.

D looks at real and generated slices one after the other; its period discriminators see thin images [B, C, L, P]; the G
step computes D's gradients too, from both slices, and the next D step wipes them. Noise, mel loss and vocoder are those
of the real step, so that both compute the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvc_dist.config import Recipe
from rvc_dist.models.discriminator import MultiPeriodDiscriminator, PeriodDiscriminator
from rvc_dist.models.generator import Generator, GeneratorOutput, Noise
from rvc_dist.models.modules import LEAKY_SLOPE, slice_samples
from rvc_dist.models.pitch import coarse_pitch
from rvc_dist.models.spectral import spectrogram_with_reach
from rvc_dist.train import losses
from rvc_dist.train.dataset import Batch
from rvc_dist.train.step import autocast

Outputs = list[tuple[Tensor, list[Tensor]]]
"""Score and features of each sub-discriminator."""


class PlainDiscriminator(nn.Module):
    def __init__(self, network: MultiPeriodDiscriminator) -> None:
        super().__init__()
        self.discriminators = network.discriminators

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Outputs, Outputs]:
        pairs = [(look(d, real), look(d, fake)) for d in self.discriminators]
        return [r for r, _ in pairs], [f for _, f in pairs]


def look(discriminator: nn.Module, wave: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Score [B, -1] and features [B, C, L, P] of one sub-discriminator for `wave` [B, 1, S]."""
    if not isinstance(discriminator, PeriodDiscriminator):
        score, features = discriminator(wave)
        return score, features
    period, features = discriminator.period, []
    x = F.pad(wave, (0, -wave.shape[2] % period), mode="reflect")
    x = x.reshape(*wave.shape[:2], -1, period)
    for conv in (*discriminator.convs, discriminator.conv_post):
        assert isinstance(conv, nn.Conv2d)
        x = F.conv2d(x, conv.weight, conv.bias, (conv.stride[0], 1), (conv.kernel_size[0] // 2, 0))
        x = x if conv is discriminator.conv_post else F.leaky_relu(x, LEAKY_SLOPE)
        features.append(x)
    return x.flatten(1), features


class PlainTrainer(NamedTuple):
    recipe: Recipe
    generator: Generator
    g: nn.Module
    """`generator` or, on several ranks, DDP around it; `d` likewise is or wraps a PlainDiscriminator."""
    d: nn.Module
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]
    """Of G and of D."""
    precision: str
    """fp32, bf16 or fp16."""
    scaler: torch.amp.GradScaler
    """One for both; on in fp16 alone."""

    def step(self, batch: Batch, kl_warmup: float) -> dict[str, Tensor]:
        """One update of D and one of G; the losses, named as the trainer names them."""
        shape, device = self.generator.shape, batch.f0.device
        spec = spectrogram_with_reach(batch.wave_with_reach.squeeze(1), self.recipe.rate_spec.n_fft, shape.hop)
        pitch = (coarse_pitch(batch.f0), batch.f0) if shape.pitch_guidance else (None, None)
        noise = Noise.draw(shape, batch.seeds, batch.content.shape[1], device)
        in_step, weights = autocast(device, self.precision), self.recipe.model.discriminator_spec.score_weights
        with in_step:
            out: GeneratorOutput = self.g(
                batch.content, batch.lengths, *pitch, spec, batch.speaker, noise, batch.energy
            )
        real = slice_samples(batch.wave, out.start, shape.segment_frames, shape.hop)
        for _ in range(self.recipe.train.d_updates):
            with in_step:
                on_real, on_fake = self.d(real, out.wave.detach())
            loss_d = losses.discriminator_loss([s for s, _ in on_real], [s for s, _ in on_fake], weights)
            self._update(self.optimizers[1], loss_d)
        with in_step:
            on_real, on_fake = self.d(real, out.wave)
        pairs = [(r, f) for (_, rs), (_, fs) in zip(on_real, on_fake, strict=True) for r, f in zip(rs, fs, strict=True)]
        terms = {
            "mel": losses.recipe_mel_loss(self.recipe, real, out.wave),
            "fm": 2 * torch.stack([F.l1_loss(fake.float(), real.float()) for real, fake in pairs]).sum(),
            "adv": losses.generator_adversarial_loss([s for s, _ in on_fake], weights),
            "kl": losses.kl_loss(out.z_p, out.logs_q, out.m_p, out.logs_p, out.mask, batch.mean_frames),
        }
        real_features, fake_features = ([f for _, f in side] for side in (on_real, on_fake))
        scores = [s for s, _ in on_fake]
        seen = losses.LossInputs(self.recipe, batch, out, real, real_features, fake_features, scores)
        optional = losses.wanted(self.recipe.train.loss).items()
        terms |= {name: loss(seen) for name, loss in optional if name not in terms}
        total = losses.weighted_sum(terms, self.recipe.train.loss, kl_warmup)
        self._update(self.optimizers[0], total)
        values = {f"loss/g_{name}": term for name, term in terms.items()} | {"loss/g_total": total, "loss/d": loss_d}
        return {name: value.detach() for name, value in values.items()}

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(optimizer)
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.scaler.step(optimizer)
        self.scaler.update()
