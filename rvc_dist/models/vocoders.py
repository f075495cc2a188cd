"""Decoders `dec`: latent frames to samples. Another vocoder is another class and an entry in `choices.VOCODERS`.

B batch, T frames, S samples (S = T * hop), C channels. Attribute names are the state-dict keys of upstream RVC.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
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
FIRST_GAIN = 15.0
"""Of the sine, in networks that start from random numbers: tanh(1.5 sin) fills the range and has overtones.

From a random gain within 1, Adam comes to 0 in some hundred steps, before the layers that follow can use the sine. From
there no gradient leads away, and such a voice never follows f0.
"""


@torch.no_grad()
def sine_excitation(f0: Tensor, noise: Tensor, sample_rate: int, phase: Tensor | None = None) -> Tensor:
    """Excitation of the neural source-filter model (NSF, arXiv 1904.12088): f0 [..., T] in Hz to [..., S], float32.

    A sine of amplitude 0.1 with a little noise where f0 > 0, louder noise alone where it is 0. `noise` [..., T, hop] is
    standard normal, `phase` [..., 1] is where the sines begin, in cycles: at 0 unless given.
    """
    # The phase at a frame's start is summed in float64 and kept modulo one cycle, so that its error does not grow
    # with the length of the recording; within a frame it stays below a few cycles, which float32 holds well.
    # MPS has no float64: one number a frame is computed on the host there.
    hop, on_host = noise.shape[-1], f0.device.type == "mps"
    cycles = (f0.cpu() if on_host else f0).double() / sample_rate
    start = F.pad((cycles * hop).cumsum(-1)[..., :-1], (1, 0))
    start = (start if phase is None else start + (phase.cpu() if on_host else phase)) % 1
    step = torch.arange(1, hop + 1, device=f0.device, dtype=torch.float32)
    start, cycles = start.float().to(f0.device), cycles.float().to(f0.device)
    sine = SINE_AMPLITUDE * torch.sin(2 * math.pi * (start.unsqueeze(-1) + cycles.unsqueeze(-1) * step))
    voiced = (f0 > 0).float().unsqueeze(-1)
    deviation = voiced * NOISE_DEVIATION + (1 - voiced) * SINE_AMPLITUDE / 3
    return (sine * voiced + deviation * noise).flatten(-2)


@torch.no_grad()
def begin_audible(gains: nn.Linear) -> None:
    """Let the fundamental of a sine source start with FIRST_GAIN."""
    gains.weight[0, 0] = FIRST_GAIN
    if gains.bias is not None:
        gains.bias.zero_()


class SineSource(nn.Module):
    """`sine_excitation` at f0 and its harmonics, mixed with learnt gains.

    f0 [B, T] in Hz, noise [B, H, T, hop] and of several harmonics phase [B, H, 1] to [B, 1, S], float32 also under
    autocast.
    """

    def __init__(self, sample_rate: int, num_harmonics: int = 1) -> None:
        super().__init__()
        self.sample_rate = sample_rate
        self.l_linear = nn.Linear(num_harmonics, 1)
        begin_audible(self.l_linear)

    def forward(self, f0: Tensor, noise: Tensor, phase: Tensor | None = None) -> Tensor:
        with torch.autocast(f0.device.type, enabled=False):
            harmonics = torch.arange(1, self.l_linear.in_features + 1, device=f0.device)
            sines = sine_excitation(f0.unsqueeze(1) * harmonics.unsqueeze(1), noise, self.sample_rate, phase)
            return torch.tanh((sines * self.l_linear.weight.unsqueeze(2)).sum(1, keepdim=True) + self.l_linear.bias)


class Vocoder(nn.Module):
    """A decoder, made of a GeneratorShape: z [B, inter, T], speaker [B, gin, 1] to a wave [B, 1, S] in -1..1, float32.

    Between the two it is given f0 [B, T] in Hz, None without pitch guidance, and after them its noise: tensors [B, *]
    of standard normal numbers, one for each of `noise_shapes`, used in that order.
    """

    def __init__(self, shape: GeneratorShape) -> None:
        super().__init__()
        self.channels_last = False

    def laid_out(self, x: Tensor) -> Tensor:
        """`x` in the memory layout that this decoder computes in."""
        return channels_last(x) if self.channels_last or x.device.type == "cpu" else x

    @classmethod
    def noise_shapes(cls, shape: GeneratorShape, num_frames: int) -> list[tuple[int, ...]]:
        """What noise it takes for a clip of `num_frames` frames."""
        return []


class UpsamplingVocoder(Vocoder):
    """What decoders after HiFi-GAN (arXiv 2010.05646) do: stages that upsample, each with residual blocks side by side.

    Its first layer is the sum of conv_pre and, of the speaker, cond; conv_post is its last.
    """

    conv_pre: nn.Module
    cond: nn.Module
    conv_post: nn.Module

    def forward(self, z: Tensor, f0: Tensor | None, speaker: Tensor, noise: Iterable[Tensor]) -> Tensor:
        source = self.source(f0, noise)
        x = self.laid_out(self.conv_pre(z) + self.cond(speaker))
        for stage, (up, blocks) in enumerate(self.stages()):
            x = self.excite(up(self.before_upsampling(x)), source, stage)
            x = reduce(torch.add, (block(x) for block in blocks)) / len(blocks)
        x = self.before_last(x)
        # Samples of eight bits would be audible: the last layer is float32 also under autocast.
        with torch.autocast(x.device.type, enabled=False):
            return torch.tanh(self.conv_post(x.float()))

    def stages(self) -> Iterable[tuple[nn.Module, nn.ModuleList]]:
        """Of each stage the layer that upsamples, and the blocks whose mean goes on."""
        raise NotImplementedError

    def source(self, f0: Tensor | None, noise: Iterable[Tensor]) -> Tensor | None:
        """The excitation [B, 1, S], if this vocoder has one."""
        return None

    def excite(self, x: Tensor, source: Tensor | None, stage: int) -> Tensor:
        """Add the excitation to `x`, the output of upsampling stage `stage`."""
        return x

    def before_upsampling(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, LEAKY_SLOPE)

    def before_last(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x)


class Excited(UpsamplingVocoder):
    """One driven by a sine at f0 and its harmonics (NSF, arXiv 1904.12088), which every stage hears at its own rate.

    It has the modules m_source and noise_convs.
    """

    num_harmonics = 1
    m_source: SineSource
    noise_convs: nn.ModuleList

    @classmethod
    def noise_shapes(cls, shape: GeneratorShape, num_frames: int) -> list[tuple[int, ...]]:
        harmonics = cls.num_harmonics
        return [(harmonics, num_frames, shape.hop), *([(harmonics, 1)] if harmonics > 1 else [])]

    def source(self, f0: Tensor | None, noise: Iterable[Tensor]) -> Tensor | None:
        """Harmonics begin anywhere: a normal number of cycles is as good as uniform on the circle, to 1e-8."""
        assert f0 is not None
        return self.laid_out(self.m_source(f0, *noise))

    def excite(self, x: Tensor, source: Tensor | None, stage: int) -> Tensor:
        excited: Tensor = x + self.noise_convs[stage](source)
        return excited


def upsampling_layers(shape: GeneratorShape) -> Iterator[ConvTranspose1d]:
    """Of each stage the layer that upsamples; it halves the channels."""
    channels = shape.upsample_initial_channel
    for rate, kernel_size in zip(shape.upsample_rates, shape.upsample_kernels, strict=True):
        up = ConvTranspose1d(channels, channels // 2, kernel_size, rate, padding=(kernel_size - rate) // 2)
        yield weight_norm(up)
        channels //= 2


def noise_layers(shape: GeneratorShape) -> Iterator[Conv1d]:
    """Of each stage the layer that hears the excitation at its rate."""
    for stage in range(len(shape.upsample_rates)):
        channels = shape.upsample_initial_channel // 2 ** (stage + 1)
        stride = math.prod(shape.upsample_rates[stage + 1 :])
        kernel_size = 1 if stride == 1 else 2 * stride
        yield Conv1d(1, channels, kernel_size, stride, padding=stride // 2)


def residual_blocks(
    shape: GeneratorShape, channels: int, kind: Callable[[int, int, tuple[int, ...]], nn.Module]
) -> Iterator[nn.Module]:
    """The blocks of a stage with `channels`, each made as a `kind` of (channels, kernel size, dilations)."""
    for kernel_size, dilations in zip(shape.resblock_kernels, shape.resblock_dilations, strict=True):
        yield kind(channels, kernel_size, dilations)


class HiFiGAN(UpsamplingVocoder):
    """HiFi-GAN decoder (arXiv 2010.05646).

    Weights start from PyTorch's defaults, as in effect upstream: its normal(0, 0.01) is written to a tensor that weight
    norm recomputes.
    """

    def __init__(self, shape: GeneratorShape) -> None:
        super().__init__(shape)
        channels = shape.upsample_initial_channel
        self.conv_pre = nn.Conv1d(shape.inter_channels, channels, 7, padding=3)
        self.cond = nn.Conv1d(shape.gin_channels, channels, 1)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        self.num_blocks = len(shape.resblock_kernels)
        for up in upsampling_layers(shape):
            self.ups.append(up)
            channels //= 2
            self.resblocks.extend(residual_blocks(shape, channels, ResBlock))
        self.conv_post = Conv1d(channels, 1, 7, padding=3, bias=False)

    def stages(self) -> Iterable[tuple[nn.Module, nn.ModuleList]]:
        for stage, up in enumerate(self.ups):
            yield up, self.resblocks[stage * self.num_blocks : (stage + 1) * self.num_blocks]


class NSFHiFiGAN(Excited, HiFiGAN):
    """HiFi-GAN driven by a sine at f0."""

    def __init__(self, shape: GeneratorShape) -> None:
        super().__init__(shape)
        self.m_source = SineSource(shape.sample_rate, self.num_harmonics)
        self.noise_convs = nn.ModuleList(noise_layers(shape))


class NSFHiFiGANWithOvertones(NSFHiFiGAN):
    """The same driven by eight overtones besides, as the SVC architecture has it."""

    num_harmonics = 9


def vocoder_class(shape: GeneratorShape) -> type[Vocoder]:
    """The decoder that `shape` names; ValueError when there is none."""
    spec = VOCODERS.get(shape.vocoder)
    guided = spec and ((spec.svc if shape.is_svc else None) or spec.guided)
    maker = spec and (guided if shape.pitch_guidance else spec.plain)
    if maker is None:
        ways = [(name, "with", spec.guided) for name, spec in VOCODERS.items()]
        ways += [(name, "without", spec.plain) for name, spec in VOCODERS.items()]
        allowed = ", ".join(f"{name} {how} pitch" for name, how, maker in ways if maker)
        raise ValueError(f"vocoder: got {shape.vocoder!r}, pitch_guidance {shape.pitch_guidance}; expected {allowed}")
    assert spec is not None
    if spec.num_stages not in (None, len(shape.upsample_rates)):
        got = f"{len(shape.upsample_rates)} upsample_rates, expected {spec.num_stages}"
        raise ValueError(f"vocoder: {shape.vocoder} got {got}")
    kind: type[Vocoder] = resolve(maker)
    return kind
