"""Noise reduction of recordings by spectral gating, on the device, many windows at once.

The gate is noisereduce's TorchGate (Sainburg et al. 2020, doi:10.1371/journal.pcbi.1008228, in its stationary form): a
band of a frame that is not clearly louder than the noise is turned down. What is noise is learned from the quietest
places of the same recording.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rvc_dist.choices import NOISEREDUCE
from rvc_dist.data.audio import Wave
from rvc_dist.runtime.device import compute_exactly, fixed_threads
from rvc_dist.workspace import StageError

N_FFT = 1024
WINDOW_S = 10.0
CONTEXT_SAMPLES = 8192
"""Heard on both sides of a window besides it, so that windows join without a seam."""
BATCH_WINDOWS = 8
PROFILE_S = 0.5
"""Length of a piece of the noise profile."""
PROFILE_SHARE, PROFILE_MIN, PROFILE_MAX = 0.05, 2, 8
"""The quietest share of all pieces is the profile, but at least and at most so many."""
DIGITAL_SILENCE = 1e-5
"""RMS of a piece that holds no noise to learn from: muted, or filled in by an editor."""


class NoiseGate:
    """Turns down what is no louder than the recording's own noise.

    Args:
        rate: sample rate in Hz.
        strength: 0..1, the share of the noise's amplitude that is taken away.

    Raises:
        StageError: the package noisereduce is missing.
    """

    def __init__(self, rate: int, strength: float) -> None:
        try:
            from noisereduce.torchgate import TorchGate
        except ImportError as error:
            raise StageError(*NOISEREDUCE.missing("preprocess.clean_dataset", error)) from error
        self.device = compute_exactly("preprocess")
        # The mask is smoothed over three bins. TorchGate's own 500 Hz average it over voice and the noise between its
        # harmonics, which takes half of a low voice away.
        smooth_hz = 2 * rate / N_FFT
        self.gate: Any = TorchGate(rate, prop_decrease=strength, n_fft=N_FFT, freq_mask_smooth_hz=smooth_hz)
        self.gate.to(self.device)
        self.rate, self.hop = rate, int(self.gate.hop_length)
        self.window = round(WINDOW_S * rate) // self.hop * self.hop

    @torch.no_grad()
    def __call__(self, wave: Wave) -> Wave:
        """[S] -> [S]. One that is all digital silence, or too short to have a noise profile, stays as it is."""
        profile = self.profile(wave)
        if profile is None:
            return wave
        with fixed_threads(1):  # the last bits depend on it
            noise = torch.from_numpy(profile)[None].to(self.device)
            # Windows of one length, each with its context: [N, context + window + context].
            end = -len(wave) % self.window + CONTEXT_SAMPLES
            padded = F.pad(torch.from_numpy(wave), (CONTEXT_SAMPLES, end))
            windows = padded.unfold(0, self.window + 2 * CONTEXT_SAMPLES, self.window)
            cleaned = [self.gate(part.to(self.device), noise).cpu() for part in torch.split(windows, BATCH_WINDOWS)]
            inner = torch.cat(cleaned)[:, CONTEXT_SAMPLES : CONTEXT_SAMPLES + self.window]
            out: Wave = inner.reshape(-1)[: len(wave)].contiguous().numpy()
        return out

    def profile(self, wave: Wave) -> Wave | None:
        """The quietest pieces of a recording that are not digital silence, one after the other; None if it has none."""
        length = round(PROFILE_S * self.rate)
        pieces = wave[: len(wave) // length * length].reshape(-1, length)
        power = np.einsum("ij,ij->i", pieces, pieces, dtype=np.float64) / length
        usable = np.flatnonzero(power > DIGITAL_SILENCE**2)
        count = min(PROFILE_MAX, max(PROFILE_MIN, round(PROFILE_SHARE * len(usable))))
        if len(usable) < PROFILE_MIN:
            return None
        quietest = np.sort(usable[np.argsort(power[usable], kind="stable")[:count]])
        chosen: Wave = pieces[quietest].reshape(-1)
        return chosen
