"""Pitch trackers that need no weights. All but swipe are of libraries that compute on the CPU, whatever the device.

S samples at 16 kHz, T frames at 100 per second, C pitch candidates.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from rvc_dist.config import F0_HOP, F0_PER_S, FEATURE_RATE, ExtractConfig
from rvc_dist.features.f0 import F0Method

Samples = npt.NDArray[np.float32]
Hertz = npt.NDArray[np.floating[Any]]

QUIET = 0.03
"""Share of a clip's highest peak below which yin, swipe, harvest and piptrack take a frame for background, as Praat
does: the hum of a recording is periodic, but nobody's voice."""


WIDER_DOWN, WIDER_UP = 4.0 / 3.0, 4.0
"""How far yin and swipe look beyond the range: asked for a range alone, they hear a tone outside of it as its lowest or
highest pitch, or as one an octave or two below."""
HIGHEST_HZ = FEATURE_RATE / 3
MAX_YIN_APERIODICITY = 0.4
TROUGH = 0.1


class SignalMethod(F0Method):
    """A tracker that a NumPy library computes within the range alone, so that yin says what lies above it."""

    LIBRARY = "librosa"
    on_cpu = True

    def __init__(self, config: ExtractConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.library: Any = import_module(self.LIBRARY)

    @abstractmethod
    def analyse(self, wave: Samples) -> Hertz:
        """`track` in NumPy: [S] -> about [S // 160]."""

    def track(self, wave: Tensor) -> Tensor:
        f0 = torch.from_numpy(self.analyse(wave.cpu().numpy())).double()
        return self.with_yin(f0, wave, below=False)


def window_of(f0_min: float) -> int:
    """Samples of a window that holds three periods of the lowest pitch, as a power of two.

    With two, YIN's lag has hardly anything to compare, and a spectrum does not part the harmonics.
    """
    return int(2 ** math.ceil(math.log2(3 * FEATURE_RATE / f0_min)))


def is_loud(wave: Tensor) -> Tensor:
    """Whether the highest peak in the 30 ms around each frame is no background: [S] -> bool [S // 160]."""
    level = wave.abs()
    peaks = F.max_pool1d(level[None], 3 * F0_HOP + 1, F0_HOP, padding=3 * F0_HOP // 2)[0]
    return peaks[: wave.shape[0] // F0_HOP] >= QUIET * level.max()


class PyinPitch(SignalMethod):
    """Probabilistic YIN (Mauch and Dixon 2014) by librosa: slow."""

    def analyse(self, wave: Samples) -> Hertz:
        window = window_of(self.f0_min)
        f0: Hertz = self.library.pyin(
            wave, fmin=self.f0_min, fmax=self.f0_max, sr=FEATURE_RATE, frame_length=window, hop_length=F0_HOP
        )[0]
        return np.where(f0 > self.f0_min, f0, 0.0)  # the lowest is given to all that has no period within the range


class YinPitch(F0Method):
    """YIN (de Cheveigné and Kawahara 2002), which says nothing of voicing: that is by `is_periodic`."""

    on_cpu = True

    def track(self, wave: Tensor) -> Tensor:
        return torch.from_numpy(yin(wave.cpu().numpy(), self.f0_min, self.f0_max))


def yin(wave: Samples, f0_min: float, f0_max: float) -> Hertz:
    """YIN's pitch in a wider range than f0_min to f0_max, 0 where unvoiced: [S] -> [S // 160] in Hz."""
    window = window_of(f0_min)
    f0 = yin_everywhere(wave, f0_min / WIDER_DOWN, min(f0_max * WIDER_UP, HIGHEST_HZ), window)
    return np.where(is_periodic(wave, f0, window, MAX_YIN_APERIODICITY), f0, 0.0)


def yin_everywhere(wave: Samples, low_hz: float, high_hz: float, window: int) -> Hertz:
    """YIN's pitch of every frame, voiced or not: [S] -> [S // 160] in Hz, to the bit what librosa has.

    The period is the first trough below TROUGH of the difference function, or else its deepest, refined by a parabola.
    """
    from scipy.fft import irfft, next_fast_len, rfft

    shortest, longest = math.floor(FEATURE_RATE / high_hz), min(math.ceil(FEATURE_RATE / low_hz), window - 1)
    frames = windows_around_frames(wave, window)
    size = next_fast_len(2 * window - 1, real=True)
    spectrum = rfft(frames, size)
    similarity = irfft(spectrum.real**2 + spectrum.imag**2, size)
    energy = np.cumsum(np.square(frames), axis=1)[:, :longest]
    energy[:, 0] = 0.0  # librosa's, which leaves the first sample out of the lag 1: the features of a run stay
    lags = slice(1, longest + 1)
    difference = (2 * (similarity[:, :1] - similarity[:, lags]) - energy).astype(np.float32)
    mean = (np.cumsum(difference, axis=1) / np.arange(lags.start, lags.stop))[:, shortest - 1 :]
    depth = difference[:, shortest - 1 :] / (mean + np.finfo(mean.dtype).tiny)

    troughs = depth < TROUGH
    troughs[:, 0] &= depth[:, 0] < depth[:, 1]
    troughs[:, 1:] &= depth[:, 1:] < depth[:, :-1]
    troughs[:, 1:-1] &= depth[:, 1:-1] <= depth[:, 2:]
    best = np.where(troughs.any(axis=1), troughs.argmax(axis=1), depth.argmin(axis=1))[:, None]
    inner = best.clip(1, depth.shape[1] - 2)
    left, middle, right = (np.take_along_axis(depth, inner + d, axis=1) for d in (-1, 0, 1))
    curvature, slope = right + left - 2 * middle, (right - left) / 2
    is_parabola = (inner == best) & (np.abs(slope) < np.abs(curvature))
    shift = np.divide(-slope, curvature, out=np.zeros_like(slope), where=is_parabola)
    return np.asarray(FEATURE_RATE / (shortest + best + shift)[:, 0])


def windows_around_frames(wave: Samples, window: int) -> Samples:
    """The samples around each frame, beyond the ends 0: [S] -> a view [S // 160, window]."""
    padded = np.pad(wave, window // 2)
    windows: Samples = np.lib.stride_tricks.sliding_window_view(padded, window)[::F0_HOP]
    return windows[: len(wave) // F0_HOP]


def is_periodic(wave: Samples, f0: Hertz, window: int, limit: float) -> npt.NDArray[np.bool_]:
    """Whether each frame is loud and repeats after its period: [S], [S // 160] in Hz -> [S // 160].

    `limit` is the most `aperiodicity` that counts as repeating.
    """
    loud = is_loud(torch.from_numpy(wave)).numpy()
    periodic = aperiodicity(wave, np.where(f0 > 0, f0, np.inf), window) <= limit
    return np.asarray(loud & periodic & (f0 > 0))


def aperiodicity(wave: Samples, f0: Hertz, window: int) -> Hertz:
    """How far each frame is from repeating after its period: [S], [T] in Hz -> [T], 0 (periodic) to about 1 (noise).

    Sum of (x[n] - x[n + period])^2 over the sum of x[n]^2 + x[n + period]^2, n such that both lie in the window.
    """
    frames = windows_around_frames(wave, window)[: len(f0)].astype(np.float64)
    lags = np.clip(np.rint(FEATURE_RATE / f0), 1, window // 2).astype(np.int64)
    places = np.arange(window)
    shifted = np.take_along_axis(frames, np.minimum(places + lags[:, None], window - 1), axis=1)
    inside = places < window - lags[:, None]
    difference = np.where(inside, (frames - shifted) ** 2, 0.0).sum(axis=1)
    power = np.where(inside, frames**2 + shifted**2, 0.0).sum(axis=1)
    return np.asarray(difference / np.maximum(power, 1e-12))


class PiptrackPitch(SignalMethod):
    """The lowest of the spectral peaks that librosa's piptrack finds (parabolic interpolation; Smith 2011).

    A peak counts when it has at least `PEAK` of the magnitude of the frame's strongest, wherever that is. The lowest
    such peak is the fundamental, so that a voice without one (from a telephone, say) is heard an octave too high. Noise
    has peaks too, so that what is voiced is by `is_periodic`.
    """

    PEAK = 0.2
    N_FFT = 4096
    MAX_APERIODICITY = 0.6

    def analyse(self, wave: Samples) -> Hertz:
        window = window_of(self.f0_min)
        # Filled with zeros to n_fft: the finer the bins, the nearer the parabola to the true peak.
        n_fft = max(window, self.N_FFT)
        padded = np.pad(wave, n_fft // 2)
        spectrum = np.abs(self.library.stft(padded, n_fft=n_fft, win_length=window, hop_length=F0_HOP, center=False))
        pitches, _ = self.library.piptrack(
            S=spectrum, sr=FEATURE_RATE, n_fft=n_fft, fmin=self.f0_min, fmax=self.f0_max, threshold=self.PEAK
        )
        lowest = (pitches > 0).argmax(axis=0)[None]
        f0 = np.take_along_axis(pitches, lowest, axis=0)[0, : len(wave) // F0_HOP]
        return np.where(is_periodic(wave, f0, window, self.MAX_APERIODICITY), f0, 0.0)


class PraatPitch(SignalMethod):
    """Praat's autocorrelation method (Boersma 1993) by praat-parselmouth, with Praat's own thresholds."""

    LIBRARY = "parselmouth"

    def analyse(self, wave: Samples) -> Hertz:
        # Praat puts as many windows as fit into the middle of the recording. With half a window before the first frame
        # and after the last, and half a hop more, frame t is centred at sample 160 t.
        num_frames = len(wave) // F0_HOP
        half_window = 1.5 * FEATURE_RATE / self.f0_min
        before = round(half_window) + F0_HOP // 4
        num_samples = round(2 * half_window) + (num_frames - 1) * F0_HOP + F0_HOP // 2
        padded = np.pad(wave, (before, num_samples))[:num_samples].astype(np.float64)
        pitch = self.library.Sound(padded, FEATURE_RATE).to_pitch_ac(
            time_step=F0_HOP / FEATURE_RATE, pitch_floor=self.f0_min, pitch_ceiling=self.f0_max
        )
        return np.asarray(pitch.selected_array["frequency"])


class DioPitch(SignalMethod):
    """DIO (Morise et al. 2009) of WORLD by pyworld, refined with StoneMask, with WORLD's own idea of what is voiced."""

    LIBRARY = "pyworld"
    NAME = "dio"

    def analyse(self, wave: Samples) -> Hertz:
        samples = wave.astype(np.float64)
        f0, seconds = getattr(self.library, self.NAME)(
            samples, FEATURE_RATE, f0_floor=self.f0_min, f0_ceil=self.f0_max, frame_period=1000.0 / F0_PER_S
        )
        return np.asarray(self.library.stonemask(samples, f0, seconds, FEATURE_RATE))[: len(wave) // F0_HOP]


class HarvestPitch(DioPitch):
    """Harvest (Morise 2017) of WORLD by pyworld, refined with StoneMask: slow.

    It draws its contours on through consonants and silence, so that what is voiced is by `is_periodic`.
    """

    NAME = "harvest"
    MAX_APERIODICITY = 0.6

    def analyse(self, wave: Samples) -> Hertz:
        f0 = super().analyse(wave)
        return np.where(is_periodic(wave, f0, window_of(self.f0_min), self.MAX_APERIODICITY), f0, 0.0)


class SwipePitch(F0Method):
    """SWIPE' (Camacho and Harris 2008, J. Acoust. Soc. Am. 124(3)): the sawtooth that fits the spectrum best.

    Written here, since libf0, the package that has it, is ten times slower and its sums depend on the threads of
    NumPy. Two things differ from the paper: each window size is transformed at every frame instead of every half
    window, so that nothing is interpolated in time, and the parabola is taken over log frequency. Runs on the device.
    """

    CENTS = 12.5
    """Between neighbouring candidates; a parabola through three of them gives the rest."""
    ERBS = 0.1
    """Between neighbouring frequencies of the spectrum, in equivalent rectangular bandwidths (ERB)."""
    MIN_STRENGTH = 0.25

    def __init__(self, config: ExtractConfig, device: torch.device) -> None:
        super().__init__(config, device)
        steps_down = round(1200.0 * math.log2(WIDER_DOWN) / self.CENTS)
        self.lowest = self.f0_min * 2.0 ** (-steps_down * self.CENTS / 1200.0)
        octaves = math.log2(min(self.f0_max * WIDER_UP, HIGHEST_HZ) / self.lowest)
        steps = np.arange(math.ceil(octaves * 1200.0 / self.CENTS) + 1)
        candidates = self.lowest * 2.0 ** (steps * self.CENTS / 1200.0)
        erbs = np.arange(_erbs_of(self.f0_min / 4), _erbs_of(FEATURE_RATE / 2), self.ERBS)
        frequencies = 229.0 * (10.0 ** (erbs / 21.4) - 1.0)
        self.num_candidates = len(candidates)
        kernels = torch.from_numpy(swipe_kernels(candidates, frequencies)).float()
        # The best window holds eight periods; a candidate takes the sizes on either side of that, by their nearness.
        ideal = np.log2(8.0 * FEATURE_RATE / candidates)
        longest = round(math.log2(8.0 * FEATURE_RATE / self.f0_min))
        sizes = np.arange(round(ideal[-1]), longest + 1)
        ideal = ideal.clip(sizes[0], sizes[-1])
        self.windows = []
        for size in sizes:
            weights = torch.from_numpy((1.0 - np.abs(ideal - size)).clip(0.0)).float()
            used = weights.nonzero()[:, 0]
            ours = slice(int(used[0]), int(used[-1]) + 1)
            onto_erbs = torch.from_numpy(_spline_matrix(2**size, frequencies)).float().to(device)
            parts = onto_erbs, kernels[ours].to(device), weights[ours, None].to(device)
            self.windows.append((torch.hann_window(2**size, device=device), ours, *parts))

    def track(self, wave: Tensor) -> Tensor:
        strength = wave.new_zeros(self.num_candidates, wave.shape[0] // F0_HOP)
        for window, ours, onto_erbs, kernels, weights in self.windows:
            size = window.shape[0]
            padded = F.pad(wave, (size // 2, size))
            spectrum = torch.stft(padded, size, F0_HOP, window=window, center=False, return_complex=True).abs()
            loudness = (onto_erbs @ spectrum[:, : wave.shape[0] // F0_HOP]).clamp_min(0.0).sqrt()
            loudness = loudness / loudness.norm(dim=0).clamp_min(1e-9)
            strength[ours] += weights * (kernels @ loudness)
        best, step = strength.max(dim=0)
        at = step.clamp(1, strength.shape[0] - 2)
        left, peak, right = (strength.gather(0, (at + d)[None])[0] for d in (-1, 0, 1))
        curvature = (2.0 * peak - left - right).clamp_min(1e-9)
        shift = (0.5 * (right - left) / curvature).clamp(-0.5, 0.5)
        f0 = self.lowest * torch.exp2((step + shift) * self.CENTS / 1200.0)
        voiced = (best >= self.MIN_STRENGTH) & (at == step) & is_loud(wave)  # at either end there is no maximum
        return torch.where(voiced, f0, 0.0)


def _erbs_of(hz: float) -> float:
    return 21.4 * math.log10(1.0 + hz / 229.0)


def swipe_kernels(candidates: Hertz, frequencies: Hertz) -> Hertz:
    """The spectrum that each candidate is compared with: [C], [E] -> [C, E].

    Around the first and the prime harmonics a cosine, with half its depth in the valleys beside them, falling as
    1 / sqrt(f); the positive part has the norm 1. Leaving out the other harmonics is what the prime in SWIPE' stands
    for: they would fit a pitch an octave or more below the true one.
    """
    ratio = frequencies / candidates[:, None]
    highest = math.floor(ratio.max())
    first_and_primes = [n for n in range(1, highest + 1) if all(n % k for k in range(2, math.isqrt(n) + 1))]
    kernels, wave = np.zeros_like(ratio), np.cos(2.0 * np.pi * ratio)
    for harmonic in first_and_primes:
        distance = np.abs(ratio - harmonic)
        # Harmonics that are cut off by the end of the spectrum are left out.
        whole = ratio.max(axis=1, keepdims=True) >= harmonic + 0.75
        kernels += whole * np.where(distance < 0.25, wave, np.where(distance < 0.75, wave / 2.0, 0.0))
    kernels /= np.sqrt(frequencies)
    # Above some 4,500 Hz not even the first harmonic is whole: such a candidate fits nothing.
    return np.asarray(kernels / np.linalg.norm(kernels.clip(0.0), axis=1, keepdims=True).clip(min=1e-9))


def _spline_matrix(size: int, frequencies: Hertz) -> Hertz:
    """The cubic spline from the bins of a transform to `frequencies`, as a matrix [E, size // 2 + 1]."""
    from scipy.interpolate import CubicSpline

    bins = np.arange(size // 2 + 1) * FEATURE_RATE / size
    return np.asarray(CubicSpline(bins, np.eye(len(bins)))(frequencies))
