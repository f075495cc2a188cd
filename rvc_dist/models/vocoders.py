"""Decoders `dec`: latent frames to samples. Another vocoder is another class and an entry in `choices.VOCODERS`.

B batch, T frames, S samples (S = T * hop), C channels. Attribute names are the state-dict keys of upstream RVC.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from rvc_dist.choices import VOCODERS, resolve
from rvc_dist.models.modules import LEAKY_SLOPE, Conv1d, ConvTranspose1d, ResBlock, channels_last
from rvc_dist.models.shape import GeneratorShape

SINE_AMPLITUDE = 0.1
NOISE_DEVIATION = 0.003


@torch.no_grad()
def sine_excitation(f0: Tensor, noise: Tensor, sample_rate: int) -> Tensor:
    """Excitation of the neural source-filter model (NSF, arXiv 1904.12088): f0 [B, T] in Hz to [B, 1, S], float32.

    A sine of amplitude 0.1 with a little noise where f0 > 0, louder noise alone where it is 0. `noise` [B, T, hop] is
    standard normal.
    """
    # The phase at a frame's start is summed in float64 and kept modulo one cycle, so that its error does not grow
    # with the length of the recording; within a frame it stays below a few cycles, which float32 holds well.
    # MPS has no float64: one number a frame is computed on the host there.
    hop = noise.shape[2]
    cycles = (f0.cpu() if f0.device.type == "mps" else f0).double() / sample_rate
    start = (cycles * hop).cumsum(1).roll(1, 1) % 1
    start[:, 0] = 0
    step = torch.arange(1, hop + 1, device=f0.device, dtype=torch.float32)
    start, cycles = start.float().to(f0.device), cycles.float().to(f0.device)
    phase = start.unsqueeze(2) + cycles.unsqueeze(2) * step
    sine = SINE_AMPLITUDE * torch.sin(2 * math.pi * phase)
    voiced = (f0 > 0).float().unsqueeze(2)
    deviation = voiced * NOISE_DEVIATION + (1 - voiced) * SINE_AMPLITUDE / 3
    return (sine * voiced + deviation * noise).flatten(1).unsqueeze(1)


class SineSource(nn.Module):
    """`sine_excitation` with a learnt gain: f0 [B, T] in Hz to [B, 1, S], float32 also under autocast."""

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.sample_rate = sample_rate
        self.l_linear = nn.Linear(1, 1)

    def forward(self, f0: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(f0.device.type, enabled=False):
            sine = sine_excitation(f0, noise, self.sample_rate)
            return torch.tanh(sine * self.l_linear.weight + self.l_linear.bias)


class Vocoder(nn.Module):
    """A decoder, made of a GeneratorShape: z [B, inter, T], speaker [B, gin, 1] to a wave [B, 1, S] in -1..1, float32.

    Between the two it is given f0 [B, T] in Hz, and after them the noise of its excitation [B, T, hop], both None
    without pitch guidance.
    """


class HiFiGAN(Vocoder):
    """HiFi-GAN decoder (arXiv 2010.05646).

    Weights start from PyTorch's defaults, as in effect upstream: its normal(0, 0.01) is written to a tensor that weight
    norm recomputes.
    """

    def __init__(self, shape: GeneratorShape) -> None:
        super().__init__()
        self.channels_last = False
        channels = shape.upsample_initial_channel
        self.conv_pre = nn.Conv1d(shape.inter_channels, channels, 7, padding=3)
        self.cond = nn.Conv1d(shape.gin_channels, channels, 1)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        self.num_blocks = len(shape.resblock_kernels)
        for rate, kernel_size in zip(shape.upsample_rates, shape.upsample_kernels, strict=True):
            up = ConvTranspose1d(channels, channels // 2, kernel_size, rate, padding=(kernel_size - rate) // 2)
            self.ups.append(weight_norm(up))
            channels //= 2
            self.resblocks.extend(
                ResBlock(channels, kernel, dilations)
                for kernel, dilations in zip(shape.resblock_kernels, shape.resblock_dilations, strict=True)
            )
        self.conv_post = Conv1d(channels, 1, 7, padding=3, bias=False)

    def forward(self, z: Tensor, f0: Tensor | None, speaker: Tensor, noise: Tensor | None) -> Tensor:
        source = self.source(f0, noise)
        x: Tensor = self.conv_pre(z) + self.cond(speaker)
        if self.channels_last or x.device.type == "cpu":
            x, source = channels_last(x), None if source is None else channels_last(source)
        for stage, up in enumerate(self.ups):
            x = self.excite(up(F.leaky_relu(x, LEAKY_SLOPE)), source, stage)
            blocks = self.resblocks[stage * self.num_blocks : (stage + 1) * self.num_blocks]
            x = reduce(torch.add, (block(x) for block in blocks)) / self.num_blocks
        x = F.leaky_relu(x)
        # Samples of eight bits would be audible: the last layer is float32 also under autocast.
        with torch.autocast(x.device.type, enabled=False):
            return torch.tanh(self.conv_post(x.float()))

    def source(self, f0: Tensor | None, noise: Tensor | None) -> Tensor | None:
        """The excitation [B, 1, S], if this vocoder has one."""
        return None

    def excite(self, x: Tensor, source: Tensor | None, stage: int) -> Tensor:
        """Add the excitation to `x`, the output of upsampling stage `stage`."""
        return x


class NSFHiFiGAN(HiFiGAN):
    """HiFi-GAN driven by a sine at f0 (NSF, arXiv 1904.12088), which every upsampling stage hears at its own rate."""

    def __init__(self, shape: GeneratorShape) -> None:
        super().__init__(shape)
        self.m_source = SineSource(shape.sample_rate)
        self.noise_convs = nn.ModuleList()
        for stage in range(len(shape.upsample_rates)):
            channels = shape.upsample_initial_channel // 2 ** (stage + 1)
            stride = math.prod(shape.upsample_rates[stage + 1 :])
            kernel_size = 1 if stride == 1 else 2 * stride
            self.noise_convs.append(Conv1d(1, channels, kernel_size, stride, padding=stride // 2))

    def source(self, f0: Tensor | None, noise: Tensor | None) -> Tensor | None:
        assert f0 is not None
        source: Tensor = self.m_source(f0, noise)
        return source

    def excite(self, x: Tensor, source: Tensor | None, stage: int) -> Tensor:
        excited: Tensor = x + self.noise_convs[stage](source)
        return excited


def vocoder_class(shape: GeneratorShape) -> type[Vocoder]:
    """The decoder that `shape` names; ValueError when there is none."""
    spec = VOCODERS.get(shape.vocoder)
    maker = spec and (spec.guided if shape.pitch_guidance else spec.plain)
    if maker is None:
        ways = [(name, "with", spec.guided) for name, spec in VOCODERS.items()]
        ways += [(name, "without", spec.plain) for name, spec in VOCODERS.items()]
        allowed = ", ".join(f"{name} {how} pitch" for name, how, maker in ways if maker)
        raise ValueError(f"vocoder: got {shape.vocoder!r}, pitch_guidance {shape.pitch_guidance}; expected {allowed}")
    kind: type[Vocoder] = resolve(maker)
    return kind
