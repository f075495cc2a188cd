"""Linear and mel spectrograms: the only STFT of the repository.

B batch, S samples, F frequency bins, M mel bands, T frames. Everything is float32, also under autocast: eight bits of
mantissa are too few for a logarithm of magnitudes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rvc_dist.models.modules import reflected

MULTISCALE_MELS = (5, 10, 20, 40, 80, 160, 320, 480)
"""Mel bands of each scale of the multi-scale mel loss."""
_LOG_FLOOR = 1e-5


def spectrogram(wave: Tensor, n_fft: int, hop: int, window: int | None = None) -> Tensor:
    """Magnitude sqrt(re^2 + im^2 + 1e-6) of `wave` [B, S] as [B, n_fft // 2 + 1, T], float32, T = S // hop.

    Frame t is a Hann window of n_fft samples centred on samples t * hop .. (t + 1) * hop, with reflection at both ends;
    a window shorter than the hop sees only the middle of its hop. At least (n_fft - hop) / 2 + 1 samples are needed.
    With `window`, only so many samples in the middle of the frame are seen.
    """
    overhang = n_fft - hop
    left = overhang // 2
    if overhang >= 0:
        wave = reflected(wave.float().unsqueeze(1), left, overhang - left).squeeze(1)
    else:
        wave = wave[:, -left : wave.shape[1] + overhang - left]
    return spectrogram_with_reach(wave, n_fft, hop, window)


def spectrogram_at_edges(wave: Tensor, n_fft: int, hop: int) -> Tensor:
    """`spectrogram` with windows centred on the samples t * hop, of which there is one more: T = S // hop + 1."""
    padded = reflected(wave.float().unsqueeze(1), n_fft // 2, n_fft // 2).squeeze(1)
    return spectrogram_with_reach(padded, n_fft, hop)


def spectrogram_with_reach(wave: Tensor, n_fft: int, hop: int, window: int | None = None) -> Tensor:
    """`spectrogram` of a `wave` [B, reach + T * hop + reach] that has what its first and last windows reach beyond it.

    The reach is (n_fft - hop) / 2 samples. Nothing is reflected here.
    """
    with torch.autocast(wave.device.type, enabled=False):
        wave = wave.float()
        hann = _hann(window or n_fft, wave.device)
        bins = torch.stft(wave, n_fft, hop, len(hann), hann, center=False, return_complex=True)
        return torch.view_as_real(bins).square().sum(-1).add(1e-6).sqrt()


def rectangular_spectrogram(wave: Tensor, n_fft: int, hop: int, window: int) -> Tensor:
    """Magnitude of `wave` [B, S], seen through `window` samples in the middle of each frame: [B, n_fft // 2 + 1, T]."""
    reach = (n_fft - hop) // 2
    with torch.autocast(wave.device.type, enabled=False):
        padded = reflected(wave.float().unsqueeze(1), reach, reach).squeeze(1)
        edges = torch.ones(window, device=wave.device)
        bins = torch.stft(padded, n_fft, hop, window, edges, center=False, return_complex=True)
        magnitude: Tensor = torch.linalg.vector_norm(torch.view_as_real(bins), dim=-1)  # gradient 0 where it is 0
        return magnitude


def mel_from_spectrogram(spec: Tensor, rate: int, n_fft: int, num_mels: int) -> Tensor:
    """Natural log of the slaney mel bands, 0 Hz to rate / 2, of a magnitude spectrogram: [B, F, T] to [B, M, T]."""
    return mel_bands(spec, rate, n_fft, num_mels).clamp(min=_LOG_FLOOR).log()


def log_mel(wave: Tensor, rate: int, n_fft: int, hop: int, num_mels: int) -> Tensor:
    """Log-mel spectrogram [B, M, T] of `wave` [B, S]."""
    return mel_from_spectrogram(spectrogram(wave, n_fft, hop), rate, n_fft, num_mels)


def multiscale_mels(wave: Tensor, rate: int, at_edges: bool = False) -> Tensor:
    """Base-10 log-mel spectrograms of `wave` [B, S] or [B, 1, S], the bands of MULTISCALE_MELS in turn: [B, M, T].

    All scales share the hop, rate // 100, and its frames; the window of M bands is the power of two at or below
    8 M / (rate / 2) seconds. Windows are centred on their hop, as in `spectrogram`, or `at_edges` of it.
    """
    wave = wave.flatten(1)
    magnitude = spectrogram_at_edges if at_edges else spectrogram
    bands = []
    # 8 M / (rate / 2) * rate = 16 M, at any rate; the two widest scales share their window, and so their spectrogram.
    for n_fft, scales in groupby(MULTISCALE_MELS, lambda num_mels: 1 << ((16 * num_mels).bit_length() - 1)):
        spec = magnitude(wave, n_fft, rate // 100)
        bands += [mel_bands(spec, rate, n_fft, num_mels) for num_mels in scales]
    return torch.cat(bands, dim=1).clamp(min=_LOG_FLOOR).log10()


def mel_bands(spec: Tensor, rate: int, n_fft: int, num_mels: int) -> Tensor:
    """The slaney mel bands, 0 Hz to rate / 2, of a spectrogram: [B, F, T] to [B, M, T]."""
    with torch.autocast(spec.device.type, enabled=False):
        uses_tf32 = spec.is_cuda and torch.backends.cuda.matmul.allow_tf32
        product = Float32Product.apply if uses_tf32 else torch.matmul
        return product(_mel_filters(spec.device, rate, n_fft, num_mels), spec.float())


class Float32Product(torch.autograd.Function):
    """`weight` [M, F], a constant, times `x` [B, F, T] where TF32 is on: neither product nor gradient are in TF32.

    TF32 keeps ten bits of a mantissa, and a backward pass would take the flag as it is by then.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        with without_tf32():
            return weight @ x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (weight,) = ctx.saved_tensors
        with without_tf32():
            return None, weight.mT @ gradient


@contextmanager
def without_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@lru_cache(maxsize=64)
def scale_weights(device: torch.device) -> Tensor:
    """[M], by which the bands of `multiscale_mels` are summed to the mean over scales of each scale's mean."""
    with torch.inference_mode(False):
        weights = [torch.full((num_mels,), 1 / num_mels) for num_mels in MULTISCALE_MELS]
        return torch.cat(weights).div(len(weights)).to(device)


@lru_cache(maxsize=64)
def _hann(n_fft: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor cached under inference mode could never meet autograd
        return torch.hann_window(n_fft, device=device)


@lru_cache(maxsize=64)
def _mel_filters(device: torch.device, rate: int, n_fft: int, num_mels: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(mel_bank(rate, n_fft, num_mels), device=device)


def mel_bank(
    rate: int, n_fft: int, num_mels: int, low_hz: float = 0.0, htk: bool = False, area: bool = True
) -> npt.NDArray[np.float32]:
    """Triangles on the mel scale from `low_hz` to rate / 2: [M, n_fft // 2 + 1], to the bit what librosa has.

    The scale is Slaney's (Auditory Toolbox, 1998), linear below 1 kHz, or HTK's; with `area` each triangle has the same
    area, else the same height. A triangle that is narrower than a bin may be empty, and adds nothing to a loss.
    """
    to_mel, to_hz = (_htk_mel, _htk_hz) if htk else (_slaney_mel, _slaney_hz)
    corners = to_hz(np.linspace(to_mel(low_hz), to_mel(rate / 2), num_mels + 2))
    ramps = np.subtract.outer(corners, np.fft.rfftfreq(n_fft, 1.0 / rate))
    widths = np.diff(corners)[:, None]
    rising, falling = -ramps[:-2] / widths[:-1], ramps[2:] / widths[1:]
    bank: npt.NDArray[np.float32] = np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)
    return (bank * (2.0 / (corners[2:] - corners[:-2]))[:, None]).astype(np.float32) if area else bank


_LINEAR_HZ, _LOG_FROM_HZ, _LOG_STEP = 200.0 / 3, 1000.0, math.log(6.4) / 27.0
"""Of Slaney's scale: Hz a mel below the frequency from which it is logarithmic, and its step from there on."""


def _slaney_mel(hz: float) -> float:
    linear = min(hz, _LOG_FROM_HZ) / _LINEAR_HZ
    return linear + math.log(hz / _LOG_FROM_HZ) / _LOG_STEP if hz > _LOG_FROM_HZ else linear


def _slaney_hz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    bend = _LOG_FROM_HZ / _LINEAR_HZ
    return np.where(mel >= bend, _LOG_FROM_HZ * np.exp(_LOG_STEP * (mel - bend)), _LINEAR_HZ * mel)


def _htk_mel(hz: float) -> float:
    return 2595.0 * math.log10(1.0 + hz / 700.0)


def _htk_hz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(700.0 * (10.0 ** (mel / 2595.0) - 1.0))


def forget_constants() -> None:
    """Drop cached windows and filters: those that were made under another kind of tensor are of no use."""
    for constant in (_hann, _mel_filters, scale_weights):
        constant.cache_clear()
