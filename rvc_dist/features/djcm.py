"""DJCM (Wei et al. 2024, arXiv:2401.03856): a U-net that takes the music from a voice, and one that hears its pitch.

B segments, T frames at 100 per second, F frequencies, C channels. Key names and shapes are those of the published
weights: `djcm.pt` (spectra of 1024 samples, without the first U-net) and `djcm-svs.pt` (of 2048 samples, with both).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from rvc_dist.config import F0_HOP, ExtractConfig
from rvc_dist.features.f0 import PITCH_BINS, F0Method, load_network, peak_hz
from rvc_dist.features.precision import lower
from rvc_dist.features.rmvpe import BiGRU, magnitudes

THRESHOLD = 0.3
"""Salience at or below which a frame is unvoiced, as in the tool that ships these weights."""
SEGMENT = 512
"""Frames that the network sees at once; the middle half of what it says of them is kept."""
WIDTHS = (32, 64, 128, 256, 384, 384)
"""Channels of a U-net's levels. Each halves the frequencies; all keep the frames."""
N_FFT = 1024


class _Residual(nn.Module):
    """Two 3x3 convolutions, each after its norm and activation, beside a shortcut; [B, in, T, F] -> [B, out, T, F]."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.bn1, self.act1 = nn.BatchNorm2d(channels_in), nn.PReLU()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(channels_out), nn.PReLU()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(self.act1(self.bn1(x)))
        out: Tensor = self.conv2(self.act2(self.bn2(inner))) + self.shortcut(x)
        return out


def _level(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=nn.Sequential(_Residual(channels_in, channels_out))))


class _Up(nn.Module):
    """Doubles the frequencies, then joins the encoder's output of that size."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.ConvTranspose2d(channels_in, channels_out, (1, 2), stride=(1, 2), bias=False)
        self.conv = nn.Sequential(_Residual(2 * channels_out, channels_out))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        out: Tensor = self.conv(torch.cat([self.conv1(self.bn1(x).relu()), skip], dim=1))
        return out


class _Encoder(nn.Module):
    """[B, 1, T, F] -> [B, C, T, F / 64], and what each level gives before its pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.en_blocks = nn.ModuleList(_level(a, b) for a, b in pairwise((1, *WIDTHS)))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for level in self.en_blocks:
            skips.append(level(x))
            x = nn.functional.max_pool2d(skips[-1], (1, 2))
        return x, skips


class _Decoder(nn.Module):
    """What the encoder gives -> [B, num_out, T, F]."""

    def __init__(self, num_out: int) -> None:
        super().__init__()
        ups = (_Up(a, b) for a, b in pairwise((WIDTHS[-1], *reversed(WIDTHS))))
        self.de_blocks = nn.ModuleDict({"de_blocks": nn.ModuleList(ups)})
        self.after_conv1 = _level(WIDTHS[0], WIDTHS[0])
        self.after_conv2 = nn.Conv2d(WIDTHS[0], num_out, 1)

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        for up, skip in zip(self.de_blocks["de_blocks"].children(), reversed(skips), strict=True):
            x = up(x, skip)
        out: Tensor = self.after_conv2(self.after_conv1(x))
        return out


class _PitchDecoder(_Decoder):
    """What the encoder gives -> salience [B, T, 360]."""

    def __init__(self, num_frequencies: int) -> None:
        super().__init__(1)
        recurrent = BiGRU(num_frequencies, num_frequencies // 2)
        self.fc = nn.Sequential(recurrent, nn.Linear(num_frequencies, PITCH_BINS), nn.Sigmoid())

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        salience: Tensor = self.fc(super().forward(x, skips)[:, 0])
        return salience


def _latent() -> nn.Sequential:
    return nn.Sequential(OrderedDict(latent_blocks=nn.Sequential(_level(WIDTHS[-1], WIDTHS[-1]))))


class DJCM(nn.Module):
    """Magnitudes [B, n_fft // 2 + 1, T] -> salience [B, T, 360], each within 0..1.

    With `separates` the first U-net gives a mask and an addend, by which the spectrum becomes that of the voice alone.
    """

    def __init__(self, n_fft: int = N_FFT, separates: bool = False) -> None:
        super().__init__()
        self.separates = separates
        self.bn = nn.BatchNorm2d(n_fft // 2 + 1)
        if separates:
            self.svs_encoder, self.svs_latent, self.svs_decoder = _Encoder(), _latent(), _Decoder(4)
        self.pe_encoder, self.pe_latent, self.pe_decoder = _Encoder(), _latent(), _PitchDecoder(n_fft // 2)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> DJCM:
        """One for these weights; which of the two it is, they say."""
        num_bins = tensors["bn.weight"].numel() if "bn.weight" in tensors else 0
        return cls(2 * N_FFT if num_bins == N_FFT + 1 else N_FFT, any(key.startswith("svs_") for key in tensors))

    def forward(self, spectrum: Tensor) -> Tensor:
        x = self.bn(spectrum[..., None])[:, :-1].transpose(1, 3)  # without the highest frequency
        if self.separates:
            deep, skips = self.svs_encoder(x)
            parts = self.svs_decoder(self.svs_latent(deep), skips)  # the second and third are of the phase
            mixture = spectrum[:, None, :-1].transpose(2, 3)
            x = (mixture * parts[:, :1].sigmoid() + parts[:, 3:]).relu().to(x.dtype)
        deep, skips = self.pe_encoder(x)
        salience: Tensor = self.pe_decoder(self.pe_latent(deep), skips)
        return salience


class DjcmPitch(F0Method):
    """DJCM as a pitch tracker, with the weights of `extract.f0_djcm_model`.

    On a CPU it takes several times as long as the recording, with both U-nets twenty times.

    Raises StageError when they cannot be had, ValueError when they are not DJCM's.
    """

    def __init__(self, config: ExtractConfig, device: torch.device) -> None:
        super().__init__(config, device)
        network = load_network(DJCM.of, "extract.f0_djcm_model", config.f0_djcm_model, "djcm", "DJCM")
        self.network = network.to(device)
        # The spectrum, and the recurrent layer with what follows, stay in float32.
        lower(self.network, self.dtype, self.network.bn, self.network.pe_decoder.fc)
        self.window = torch.hann_window(2 * (len(self.network.bn.weight) - 1), device=device)

    def track(self, wave: Tensor) -> Tensor:
        kept, hop = SEGMENT // 2, SEGMENT // 2 * F0_HOP
        num_segments = -(-wave.shape[0] // hop)
        before = hop // 2
        padded = nn.functional.pad(wave, (before, (num_segments + 1) * hop - before - wave.shape[0]))
        segments = padded.unfold(0, 2 * hop, hop)
        # One by one: a segment takes half a gigabyte, with both U-nets a whole one.
        salience = [self.network(magnitudes(segment[None], self.window)) for segment in segments]
        return peak_hz(torch.cat([s[:, kept // 2 : kept // 2 + kept] for s in salience], dim=1), THRESHOLD)[0]
