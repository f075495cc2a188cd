"""RefineGAN (arXiv 2111.00962): a U-net that refines a sine at f0, with the latent frames at its narrowest.

It is the form in which ARVC has it. B batch, T frames, S samples, C channels. Attribute names are the state-dict keys
of upstream.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from rvc_dist.models.modules import Conv1d, ResBlock
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.vocoders import Vocoder, begin_audible, residual_blocks, sine_excitation

SLOPE = 0.2
FIRST_GAIN = 1e-4
"""Of the noise in every block, before training."""
FILTER_LOBES, FILTER_CUTOFF, FILTER_BETA = 64, 0.9475937167399596, 14.769656459379492
"""Of the filter before samples are left out: zero crossings on either side, share of what the lower rate can carry
that it lets pass, and the shape of its Kaiser window ("kaiser_best" of resampy)."""


class RefineGAN(Vocoder):
    def __init__(self, shape: GeneratorShape) -> None:
        super().__init__(shape)
        self.rates = shape.upsample_rates
        channels = shape.upsample_initial_channel
        narrow = channels >> (len(self.rates) + 1)
        self.m_source = _Source(shape.sample_rate)
        self.pre_conv = weight_norm(Conv1d(1, narrow, 7, padding=3))
        self.downsample_blocks = nn.ModuleList(
            weight_norm(Conv1d(narrow << i, narrow << (i + 1), 7, padding=3)) for i in range(len(self.rates))
        )
        self.mel_conv = weight_norm(Conv1d(shape.inter_channels, channels // 2, 7, padding=3))
        self.cond = nn.Conv1d(shape.gin_channels, channels // 2, 1)
        self.upsample_conv_blocks = nn.ModuleList(_Stage(shape, channels >> i) for i in range(len(self.rates)))
        self.conv_post = weight_norm(Conv1d(channels >> len(self.rates), 1, 7, padding=3, bias=False))

    @classmethod
    def noise_shapes(cls, shape: GeneratorShape, num_frames: int) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = [(num_frames * shape.hop,)]
        channels, samples = shape.upsample_initial_channel, num_frames
        for rate in shape.upsample_rates:
            channels, samples = channels // 2, samples * rate
            shapes += [(channels, samples)] * (2 * len(shape.resblock_kernels))
        return shapes

    def forward(self, z: Tensor, f0: Tensor | None, speaker: Tensor, noise: Iterable[Tensor]) -> Tensor:
        assert f0 is not None
        noise = iter(noise)
        x: Tensor = self.pre_conv(self.laid_out(self.m_source(f0, next(noise))))
        finer = []
        for conv, rate in zip(self.downsample_blocks, reversed(self.rates), strict=True):
            x = F.leaky_relu(x, SLOPE)
            finer.append(x)
            x = conv(self.laid_out(decimate(x, rate)))
        x = self.laid_out(torch.cat([self.mel_conv(self.laid_out(z)) + self.cond(speaker), x], 1))
        for block, rate in zip(self.upsample_conv_blocks, self.rates, strict=True):
            # Images of height 1 keep their layout, and their linear interpolation has a deterministic form.
            image = F.leaky_relu(x, SLOPE).unsqueeze(2)
            image = F.interpolate(image, scale_factor=(1.0, float(rate)), mode="bilinear")
            x = block(torch.cat([image, finer.pop().unsqueeze(2)], 1).squeeze(2), noise)
        x = F.leaky_relu(x, SLOPE)
        # Samples of eight bits would be audible: the last layer is float32 also under autocast.
        with torch.autocast(x.device.type, enabled=False):
            return torch.tanh(self.conv_post(x.float()))


class _Source(nn.Module):
    """`sine_excitation` with a learnt gain: f0 [B, T] in Hz, which glides from frame to frame, to [B, 1, S]."""

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.sample_rate = sample_rate
        gain = nn.Linear(1, 1, bias=False)
        begin_audible(gain)
        self.merge = nn.Sequential(gain, nn.Tanh())

    def forward(self, f0: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(f0.device.type, enabled=False):
            f0 = F.interpolate(f0.unsqueeze(1), size=noise.shape[1], mode="linear").squeeze(1)
            sine = sine_excitation(f0, noise.unsqueeze(2), self.sample_rate)
            excitation: Tensor = self.merge(sine.unsqueeze(2))
            return excitation.transpose(1, 2)


class _Stage(nn.Module):
    """Residual blocks side by side, each between two layers that add noise: [B, 5/4 C, S] to [B, C / 2, S]."""

    def __init__(self, shape: GeneratorShape, channels: int) -> None:
        super().__init__()
        self.input_conv = Conv1d(channels + channels // 4, channels // 2, 7, padding=3)
        nn.init.normal_(self.input_conv.weight, std=0.01)
        blocks = residual_blocks(shape, channels // 2, partial(ResBlock, slope=SLOPE))
        self.blocks = nn.ModuleList(
            nn.ModuleList([_Noise(channels // 2), block, _Noise(channels // 2)]) for block in blocks
        )

    def forward(self, x: Tensor, noise: Iterator[Tensor]) -> Tensor:
        x = self.input_conv(x)
        return reduce(torch.add, (self.branch(x, block, noise) for block in self.blocks)) / len(self.blocks)

    @staticmethod
    def branch(x: Tensor, block: nn.Module, noise: Iterator[Tensor]) -> Tensor:
        assert isinstance(block, nn.ModuleList)
        noise_before, convolutions, noise_after = block
        y: Tensor = noise_after(convolutions(noise_before(x, next(noise))), next(noise))
        return y


class _Noise(nn.Module):
    """Adds noise [B, C, S] with a learnt gain a channel ("AdaIN" upstream), and then a leaky ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), FIRST_GAIN))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return F.leaky_relu(x + (noise * self.weight.unsqueeze(1)).to(x.dtype), SLOPE)


def decimate(x: Tensor, rate: int) -> Tensor:
    """Every `rate`-th sample of [B, C, S], after a low-pass: what torchaudio's resampling gives with these settings."""
    # The filter is made in each pass and not kept: state dicts of RefineGAN have none.
    reach = math.ceil(FILTER_LOBES * rate / FILTER_CUTOFF)
    time = torch.arange(-reach, reach + rate, device=x.device) * (FILTER_CUTOFF / rate)
    time = time.clamp(-FILTER_LOBES, FILTER_LOBES)
    window = torch.special.i0(FILTER_BETA * (1 - (time / FILTER_LOBES).square()).sqrt())
    taps = torch.sinc(time) * (window / window[reach]) * (FILTER_CUTOFF / rate)
    rows = F.pad(x.flatten(0, 1).unsqueeze(1), (reach, reach + rate))
    lower = F.conv1d(rows, taps.to(x.dtype)[None, None], stride=rate)[..., : x.shape[2] // rate]
    return lower.reshape(*x.shape[:2], -1)
