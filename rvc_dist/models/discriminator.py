"""The discriminators of RVC: over scales, periods (HiFi-GAN, arXiv 2010.05646) and spectrograms (UnivNet, 2106.07889).

B batch, S samples, C channels, P period, F frequency bins, T frames. Attribute names are the state-dict keys of
upstream RVC.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from rvc_dist.choices import DiscriminatorSpec
from rvc_dist.models.modules import LEAKY_SLOPE, Conv1d, channels_last, reflected
from rvc_dist.models.spectral import rectangular_spectrogram

FULL_CHANNELS = 1024


class DiscriminatorOutput(NamedTuple):
    """One entry a sub-discriminator. Dimension 0 of every tensor is batch-major: halves of a batch stay halves."""

    scores: list[Tensor]
    """[B, -1], towards 1 for real."""
    features: list[list[Tensor]]
    """Output of every layer, [B, C, L] over scales, [B * P, C, L] over periods, [B, C, F, T] over spectrograms."""


class SubDiscriminator(nn.Module):
    """Convolutions with leaky ReLUs, and a last one for the score."""

    def __init__(self, layers: Sequence[nn.Module], last: nn.Module) -> None:
        super().__init__()
        self.channels_last = False
        self.convs = nn.ModuleList(weight_norm(layer) for layer in layers)
        self.conv_post = weight_norm(last)

    def forward(self, wave: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`wave` [B, 1, S] to the score [B, -1] and the features."""
        x = self.fold(wave)
        features: list[Tensor] = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), LEAKY_SLOPE)
            if not features and (self.channels_last or (x.device.type == "cpu" and x.dtype == torch.bfloat16)):
                x = channels_last(x)  # the first layer has one channel, and so no layout
            features.append(self.unfold(x))
        features.append(self.unfold(self.conv_post(x)))
        return features[-1].reshape(wave.shape[0], -1), features

    def fold(self, wave: Tensor) -> Tensor:
        """What the first layer sees of `wave`."""
        return wave

    def unfold(self, x: Tensor) -> Tensor:
        """A layer's output as a feature, batch-major."""
        return x


class ScaleDiscriminator(SubDiscriminator):
    """Strided grouped convolutions over the wave itself."""

    def __init__(self, channels: int) -> None:
        widths = (channels // 64, channels // 16, channels // 4, channels, channels)
        layers = [Conv1d(1, widths[0], 15, padding=7)]
        for before, after in pairwise(widths):
            groups = before // 4 if before % 4 == 0 else 1  # narrow first layers can have less than one group
            layers.append(Conv1d(before, after, 41, stride=4, groups=groups, padding=20))
        layers.append(Conv1d(channels, channels, 5, padding=2))
        super().__init__(layers, Conv1d(channels, 1, 3, padding=1))


class PeriodDiscriminator(SubDiscriminator):
    """Looks at every P-th sample: the wave is folded into P phases, which share their weights.

    The layers see one image [1, C, L, B * P] and not, as upstream, B thin ones [B, C, L, P]: a kernel never mixes
    columns, so clips can be columns as well, and the rows stay long where L is short: on a CPU in bf16 the gradients of
    the widest layer came 1.3 to 6 times as fast.
    """

    def __init__(self, period: int, channels: int) -> None:
        widths = (1, channels // 32, channels // 8, channels // 2, channels)
        layers = [nn.Conv2d(before, after, (5, 1), (3, 1), padding=(2, 0)) for before, after in pairwise(widths)]
        layers.append(nn.Conv2d(channels, channels, (5, 1), padding=(2, 0)))
        super().__init__(layers, nn.Conv2d(channels, 1, (3, 1), padding=(1, 0)))
        self.period = period

    def fold(self, wave: Tensor) -> Tensor:
        """[B, 1, S] to [1, 1, S / P, B * P], reflected at the end to a multiple of P."""
        wave = reflected(wave, 0, -wave.shape[2] % self.period)
        return wave.reshape(wave.shape[0], -1, self.period).transpose(0, 1).flatten(1)[None, None]

    def unfold(self, x: Tensor) -> Tensor:
        """[1, C, L, B * P] to [B * P, C, L], a view."""
        return x.squeeze(0).permute(2, 0, 1)


class ResolutionDiscriminator(SubDiscriminator):
    """Looks at the magnitudes of a spectrogram, of the FFT size, hop and window in `resolution`."""

    def __init__(self, resolution: tuple[int, int, int], channels: int) -> None:
        width = channels // 32
        layers = [nn.Conv2d(1, width, (3, 9), padding=(1, 4))]
        layers += [nn.Conv2d(width, width, (3, 9), (1, 2), padding=(1, 4)) for _ in range(3)]
        layers.append(nn.Conv2d(width, width, 3, padding=1))
        super().__init__(layers, nn.Conv2d(width, 1, 3, padding=1))
        self.resolution = resolution

    def fold(self, wave: Tensor) -> Tensor:
        """[B, 1, S] to [B, 1, F, T]."""
        return rectangular_spectrogram(wave.squeeze(1), *self.resolution).unsqueeze(1)


class MultiPeriodDiscriminator(nn.Module):
    """All that `spec` names: `wave` [B, 1, S] to scores and features.

    `channels` is the width of the widest layer (a multiple of 64); 1024 has the shapes of upstream.
    """

    def __init__(self, spec: DiscriminatorSpec, channels: int = FULL_CHANNELS) -> None:
        super().__init__()
        over_periods = (PeriodDiscriminator(period, channels) for period in spec.periods)
        over_spectrograms = (ResolutionDiscriminator(resolution, channels) for resolution in spec.resolutions)
        self.discriminators = nn.ModuleList([ScaleDiscriminator(channels), *over_periods, *over_spectrograms])

    def forward(self, wave: Tensor) -> DiscriminatorOutput:
        outputs = [discriminator(wave) for discriminator in self.discriminators]
        return DiscriminatorOutput([score for score, _ in outputs], [features for _, features in outputs])
