"""RMVPE (Wei et al. 2023, arXiv:2306.15412): a deep U-net over the mel spectrogram, then a recurrent layer.

B clips, T frames at 100 per second, C channels. Key names and shapes are those of the published `rmvpe.pt`.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvc_dist.config import F0_HOP, FEATURE_RATE, ExtractConfig
from rvc_dist.features.f0 import PITCH_BINS, F0Method, load_network, of_length, peak_hz
from rvc_dist.features.precision import lower
from rvc_dist.models.spectral import mel_bank

NUM_MELS = 128
N_FFT = 1024
THRESHOLD = 0.03
"""Salience at or below which a frame is unvoiced."""
DEPTH = 5
BLOCKS = 4
TOP_CHANNELS = 16


class _Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut; [B, in, T, M] -> [B, out, T, M]."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        )
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) + self.shortcut(x)
        return out


def _blocks(channels_in: int, channels_out: int) -> nn.Sequential:
    widths = [channels_in] + [channels_out] * BLOCKS
    return nn.Sequential(*(_Residual(a, b) for a, b in pairwise(widths)))


def _levels(*widths: int) -> list[nn.Sequential]:
    """Levels of the encoder, or stages of the middle, each from one width to the next, without the pooling."""
    return [nn.Sequential(OrderedDict(conv=_blocks(a, b))) for a, b in pairwise(widths)]


class _Up(nn.Module):
    """Doubles both axes, then joins the encoder's output of that size."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.ConvTranspose2d(channels_in, channels_out, 3, stride=2, padding=1, output_padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        )
        self.conv2 = _blocks(2 * channels_out, channels_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        out: Tensor = self.conv2(torch.cat([self.conv1(x), skip], dim=1))
        return out


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        *narrow, wide = widths = [TOP_CHANNELS * 2**level for level in range(DEPTH + 1)]
        self.encoder = nn.ModuleDict({"bn": nn.BatchNorm2d(1), "layers": nn.ModuleList(_levels(1, *narrow))})
        middle = nn.Sequential(*_levels(narrow[-1], *[wide] * BLOCKS))
        self.intermediate = nn.Sequential(OrderedDict(layers=middle))
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(_Up(a, b) for a, b in pairwise(reversed(widths)))})

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder["bn"](x)
        skips = []
        for level in self.encoder["layers"].children():
            x = level(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.intermediate(x)
        for up, skip in zip(self.decoder["layers"].children(), reversed(skips), strict=True):
            x = up(x, skip)
        return x


class BiGRU(nn.Module):
    """[B, T, width_in] -> [B, T, 2 * hidden]."""

    def __init__(self, width_in: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width_in, hidden, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.gru(x)[0]
        return out


class RMVPE(nn.Module):
    """Log-mel [B, 128, T], T a multiple of 32 -> salience [B, T, 360], each within 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = _UNet()
        self.cnn = nn.Conv2d(TOP_CHANNELS, 3, 3, padding=1)
        self.fc = nn.Sequential(BiGRU(3 * NUM_MELS, 256), nn.Linear(512, PITCH_BINS), nn.Sigmoid())

    def forward(self, mel: Tensor) -> Tensor:
        x = self.cnn(self.unet(mel.transpose(1, 2)[:, None]))
        out: Tensor = self.fc(x.transpose(1, 2).flatten(2))
        return out


class RmvpePitch(F0Method):
    """RMVPE as a pitch tracker, with the weights of `extract.f0_model`.

    Raises StageError when they cannot be had, ValueError when they are not RMVPE's.
    """

    def __init__(self, config: ExtractConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.network = load_network(lambda _: RMVPE(), "extract.f0_model", config.f0_model, "rmvpe", "RMVPE").to(device)
        if self.dtype != torch.float32:  # whose kernels are a third faster in this layout
            self.network.to(memory_format=torch.channels_last)
        # The mel spectrogram, and the recurrent layer with what follows, stay in float32.
        lower(self.network, self.dtype, self.network.unet.encoder["bn"], self.network.fc)
        self.window = torch.hann_window(N_FFT, device=device)
        filters = mel_bank(FEATURE_RATE, N_FFT, NUM_MELS, low_hz=30.0, htk=True)
        self.mel_filters = torch.from_numpy(filters).to(device)

    def track(self, wave: Tensor) -> Tensor:
        return self._track(wave[None])[0]

    def track_all(self, waves: Tensor) -> Tensor:
        # On a GPU a clip's kernels take less time than their launches: there a batch costs little more than a clip.
        if self.device.type != "cuda":
            return super().track_all(waves)
        return of_length(self._track(waves), waves.shape[1] // F0_HOP)

    def _track(self, waves: Tensor) -> Tensor:
        mel = (self.mel_filters @ magnitudes(waves, self.window)).clamp_min(1e-5).log()
        num_frames = mel.shape[-1]
        missing = -num_frames % 2**DEPTH
        mel = F.pad(mel, (0, missing), mode="reflect" if missing < num_frames else "replicate")
        return peak_hz(self.network(mel)[:, :num_frames], THRESHOLD)


def magnitudes(waves: Tensor, window: Tensor) -> Tensor:
    """The spectrum around samples 0, 160, ...: [B, S], [n_fft] -> [B, n_fft // 2 + 1, S // 160 + 1]."""
    num_pad = len(window) // 2
    # torch.stft reflects too, but refuses a clip shorter than half its window.
    waves = F.pad(waves, (num_pad, num_pad), mode="reflect" if waves.shape[1] > num_pad else "constant")
    return torch.stft(waves, len(window), F0_HOP, window=window, center=False, return_complex=True).abs()
