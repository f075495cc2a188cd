"""MRF-HiFi-GAN: HiFi-GAN with overtones in its excitation. Attribute names are the state-dict keys of upstream."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from rvc_dist.models.modules import Conv1d, ResidualLayers
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.vocoders import (
    Excited,
    SineSource,
    noise_layers,
    residual_blocks,
    upsampling_layers,
)


class MRFHiFiGAN(Excited):
    """HiFi-GAN (arXiv 2010.05646) driven by f0 and its overtones, with weight norm in its first and last layers too."""

    num_harmonics = 9

    def __init__(self, shape: GeneratorShape) -> None:
        super().__init__(shape)
        channels = shape.upsample_initial_channel
        self.m_source = SineSource(shape.sample_rate, self.num_harmonics)
        self.conv_pre = weight_norm(Conv1d(shape.inter_channels, channels, 7, padding=3))
        self.upsamples = nn.ModuleList(upsampling_layers(shape))
        self.noise_convs = nn.ModuleList(noise_layers(shape))
        self.mrfs = nn.ModuleList()
        for _ in self.upsamples:
            channels //= 2
            self.mrfs.append(nn.ModuleList(residual_blocks(shape, channels, ResidualLayers)))
        self.conv_post = weight_norm(Conv1d(channels, 1, 7, padding=3))
        self.cond = nn.Conv1d(shape.gin_channels, shape.upsample_initial_channel, 1)

    def stages(self) -> Iterable[tuple[nn.Module, nn.ModuleList]]:
        return zip(self.upsamples, self.mrfs, strict=True)  # type: ignore[arg-type]
