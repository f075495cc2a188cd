"""BigVGAN (arXiv 2206.04658): HiFi-GAN with periodic activations that make no aliases, driven by a sine at f0.

It is the form in which ARVC has it. B batch, S samples, C channels. Attribute names are the state-dict keys of
upstream.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from rvc_dist.models.modules import Conv1d, ResidualLayers
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.vocoders import Excited, SineSource, noise_layers, residual_blocks, upsampling_layers

NUM_TAPS = 12
REACH = NUM_TAPS // 4
"""Samples at the lower rate that a filter reaches to either side."""


class BigVGAN(Excited):
    def __init__(self, shape: GeneratorShape) -> None:
        super().__init__(shape)
        channels = shape.upsample_initial_channel
        self.m_source = SineSource(shape.sample_rate)
        self.conv_pre = weight_norm(Conv1d(shape.inter_channels, channels, 7, padding=3))
        self.amps = nn.ModuleList()
        self.upsamples = nn.ModuleList(upsampling_layers(shape))
        self.noise_convs = nn.ModuleList(noise_layers(shape))
        for _ in self.upsamples:
            channels //= 2
            blocks = residual_blocks(shape, channels, partial(ResidualLayers, activation=AntiAliasedSnake))
            self.amps.append(nn.ModuleList(blocks))
        self.act_post = AntiAliasedSnake(channels)
        self.conv_post = weight_norm(Conv1d(channels, 1, 7, padding=3))
        self.cond = nn.Conv1d(shape.gin_channels, shape.upsample_initial_channel, 1)

    def stages(self) -> Iterable[tuple[nn.Module, nn.ModuleList]]:
        return zip(self.upsamples, self.amps, strict=True)  # type: ignore[arg-type]

    def before_upsampling(self, x: Tensor) -> Tensor:
        return x

    def before_last(self, x: Tensor) -> Tensor:
        y: Tensor = self.act_post(x)
        return y


class AntiAliasedSnake(nn.Module):
    """SnakeBeta at twice the rate: [B, C, S] to [B, C, S].

    The samples of the double rate are kept as two channels, even and odd: so each filter is one grouped convolution,
    which leaves the memory layout as it is. The filters that other tools keep in their files are constants here.
    """

    splitting: Tensor
    merging: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = _Filter()
        self.act = SnakeBeta(channels)
        self.down = nn.Module()
        self.down.lowpass = _Filter()
        taps = half_band_filter()  # symmetric: nothing is to be turned around
        phases = torch.stack([F.pad(taps[::2], (0, 1)), F.pad(taps[1::2], (1, 0))])
        self.register_buffer("splitting", 2 * phases.unsqueeze(1), persistent=False)
        self.register_buffer("merging", phases.flip(0).unsqueeze(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        first, last = x[..., :1].expand(-1, -1, REACH), x[..., -1:].expand(-1, -1, REACH)
        finer = _grouped(_cat(first, x, last), self.splitting.repeat(channels, 1, 1), channels)
        finer = self.act(finer)
        # Beyond the ends stand the very first and last samples: an even and an odd one.
        first = finer[:, ::2, :1].repeat_interleave(2, 1).expand(-1, -1, REACH)
        last = finer[:, 1::2, -1:].repeat_interleave(2, 1).expand(-1, -1, REACH)
        return _grouped(_cat(first, finer, last), self.merging.repeat(channels, 1, 1), channels)


class SnakeBeta(nn.Module):
    """x + sin(x exp(alpha))^2 / exp(beta) of [B, 2 C, S], of which two channels in turn share alpha and beta."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1, channels, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        alpha, beta = (parameter.exp().repeat_interleave(2, 1) for parameter in (self.alpha, self.beta))
        return x + torch.sin(x * alpha).square() / (beta + 1e-9)


class _Filter(nn.Module):
    """Keeps the taps where other tools look for them."""

    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", half_band_filter()[None, None])


def half_band_filter() -> Tensor:
    """[NUM_TAPS] a low-pass at half the Nyquist frequency: a sinc under a Kaiser window, which sum to 1."""
    # Kaiser's formulas: of the attenuation in dB beyond a transition band this wide, and of a window for more than 50.
    attenuation = 2.285 * (NUM_TAPS // 2 - 1) * torch.pi * (4 * 0.3) + 7.95
    beta = 0.1102 * (attenuation - 8.7)
    time = torch.arange(NUM_TAPS) - (NUM_TAPS - 1) / 2
    taps = torch.sinc(time / 2) * torch.kaiser_window(NUM_TAPS, periodic=False, beta=beta)
    return taps / taps.sum()


def _cat(first: Tensor, x: Tensor, last: Tensor) -> Tensor:
    """Along the samples, in the memory layout of `x`."""
    if x.stride(1) == 1:
        return torch.cat([part.mT for part in (first, x, last)], 1).mT
    return torch.cat([first, x, last], 2)


def _grouped(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    return F.conv2d(x.unsqueeze(2), weight.unsqueeze(2), groups=groups).squeeze(2)
