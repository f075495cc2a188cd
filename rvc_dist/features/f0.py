"""Pitch trackers behind one contract; the table of them is `rvc_dist.choices.F0_METHODS`.

B clips, S samples at 16 kHz, T frames at 100 per second.
"""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvc_dist.choices import F0_METHODS, resolve
from rvc_dist.config import F0_HOP, FEATURE_RATE, ExtractConfig, f0_method_names
from rvc_dist.features.content import read_tensors
from rvc_dist.features.hub import hub_file, make_torchaudio_importable
from rvc_dist.features.precision import lower
from rvc_dist.runtime.device import PRECISIONS
from rvc_dist.workspace import StageError

SILENCE_RMS = 2.0**-15
"""One step of 16-bit audio: quieter than this there is nothing to have a pitch."""
SILENCE_WINDOW = 1024
"""Samples around a frame that must all be silent, which is as far as the trackers look."""

AT_EDGE_CENTS = 10.0
"""A pitch so near to f0_min or f0_max, or beyond it, is at the edge of the range."""

CENTS_PER_BIN = 20.0
CENTS_OFFSET = 1997.3794084376191
"""Bin i of CREPE and RMVPE is CENTS_PER_BIN * i + CENTS_OFFSET cents above 10 Hz."""
PITCH_BINS = 360

A4_HZ = 440.0
Network = TypeVar("Network", bound=nn.Module)


class F0Method(ABC):
    """A pitch tracker.

    Called with `wave` [B, S] (float32, 16 kHz, rows of equal true length: no padding), it returns f0 [B, S // 160] in
    Hz (float32, on the tracker's device). Frame t is centred at sample 160 * t. 0 means unvoiced; every other value is
    within `f0_min`..`f0_max`. Silence is unvoiced, and nothing is ever NaN.

    Rows are tracked one by one (but see `track_all`), so that none depends on its neighbours: batched kernels choose
    their order of summation by the shape, and a last bit decides whether a frame at the threshold is voiced.

    With `f0_autotune` the voiced frames are moved toward the nearest semitone, and kept within the range.
    """

    on_cpu = False
    """Computed by a library for CPUs, whatever the device: there it is, while the device computes the content."""

    def __init__(self, config: ExtractConfig, device: torch.device) -> None:
        self.f0_min = config.f0_min
        self.f0_max = config.f0_max
        self.autotune_strength = config.f0_autotune_strength if config.f0_autotune else 0.0
        self.device = device = torch.device("cpu") if self.on_cpu else device
        self.dtype = PRECISIONS[config.precision]
        """Of the network, where there is one."""
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        """Frames so far with a pitch, of them those at or below f0_min, and at or above f0_max."""

    @abstractmethod
    def track(self, wave: Tensor) -> Tensor:
        """f0 in Hz of one clip that is not silent: [S] on the device -> about [S // 160].

        Unvoiced frames may be 0 or NaN, values may be out of range, and the length may be off by a frame or two.
        """

    def with_yin(self, f0: Tensor, wave: Tensor, below: bool) -> Tensor:
        """f0 [T] of a wave [S]; of voiced frames YIN's where it hears a pitch below (or else above) the range."""
        from rvc_dist.features.f0_signal import yin

        true_f0 = torch.from_numpy(yin(wave.cpu().numpy(), self.f0_min, self.f0_max)).to(f0)
        num_frames = min(len(f0), len(true_f0))
        f0, true_f0 = f0[:num_frames], true_f0[:num_frames]
        beyond = (true_f0 > 0) & (true_f0 < self.f0_min) if below else true_f0 > self.f0_max
        return torch.where((f0 > 0) & beyond, true_f0, f0)

    def track_all(self, waves: Tensor) -> Tensor:
        """`track` of clips of one length: [N, S] -> [N, S // 160]."""
        num_frames = waves.shape[1] // F0_HOP
        return torch.cat([of_length(self.track(wave)[None], num_frames) for wave in waves])

    @torch.inference_mode()
    def __call__(self, wave: Tensor) -> Tensor:
        assert wave.dim() == 2, f"expected [B, S], got {list(wave.shape)}"
        wave = wave.to(self.device, torch.float32)
        num_frames = wave.shape[1] // F0_HOP
        power = F.avg_pool1d(wave.square(), SILENCE_WINDOW, F0_HOP, padding=SILENCE_WINDOW // 2)[:, :num_frames]
        sounding = power > SILENCE_RMS**2
        heard = [row for row, is_heard in enumerate(sounding.any(dim=1).tolist()) if is_heard]
        f0 = wave.new_zeros(wave.shape[0], num_frames)
        if heard:
            f0[heard] = self.track_all(wave[heard]).to(self.device, torch.float32)
        near = 2.0 ** (AT_EDGE_CENTS / 1200.0)
        at_edges = torch.stack([f0 > 0, (f0 > 0) & (f0 <= self.f0_min * near), f0 >= self.f0_max / near])
        self.counts += (at_edges & sounding).sum(dim=(1, 2))
        # A comparison with NaN is false, so that NaN becomes 0 as well.
        voiced = (f0 >= self.f0_min) & (f0 <= self.f0_max) & sounding
        if self.autotune_strength > 0.0:
            # By rows too: a kernel takes the last few of a tensor's numbers by another path.
            f0 = torch.stack([autotune(row, self.autotune_strength) for row in f0]).clamp(self.f0_min, self.f0_max)
        return torch.where(voiced, f0, 0.0)

    def total_counts(self) -> Tensor:
        """`counts`, on the CPU, with those of the methods that this one is made of."""
        return self.counts.cpu()


def of_length(f0: Tensor, num_frames: int) -> Tensor:
    """f0 [N, T] with its last frames left out, or the last repeated: [N, num_frames]."""
    return F.pad(f0, (0, max(0, num_frames - f0.shape[1])), mode="replicate")[:, :num_frames]


def drawn_on(f0: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """f0 [T] in Hz with a straight line over each unvoiced stretch; at the ends the nearest pitch is held.

    What has no pitch at all, as silence, stays 0.
    """
    voiced = np.flatnonzero(f0)
    if not len(voiced):
        return f0
    return np.interp(np.arange(len(f0)), voiced, f0[voiced]).astype(np.float32)


def autotune(f0: Tensor, strength: float) -> Tensor:
    """Move each f0 (Hz, any shape) toward the nearest semitone of equal temperament (A4 = 440 Hz).

    `strength` is the share of the way in cents: 0 leaves all as it is, 1 puts it onto the semitone. What is not above
    0 gives something that is no pitch.
    """
    semitones = 12.0 * torch.log2(f0 / A4_HZ)
    return f0 * torch.exp2(strength * (semitones.round() - semitones) / 12.0)


def check_range(config: ExtractConfig, method: str, low_hz: float, high_hz: float, step: float = 1.0) -> None:
    """ValueError when a method can find no pitch within the range of the recipe: none of its steps (a ratio) fits."""
    if not max(config.f0_min, low_hz) * step < min(config.f0_max, high_hz):
        raise ValueError(
            f"extract.f0_min and f0_max: got {config.f0_min} to {config.f0_max} Hz, of which {method} finds nothing: "
            f"it hears {low_hz:.1f} to {high_hz:.1f} Hz; widen the range or take another extract.f0_method"
        )


class FcpePitch(F0Method):
    """FCPE (Luo et al. 2025, arXiv:2509.15140) with the weights that come with torchfcpe."""

    THRESHOLD = 0.006

    def __init__(self, config: ExtractConfig, device: torch.device) -> None:
        super().__init__(config, device)
        make_torchaudio_importable()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what is not installed, and its device
            import torchfcpe

            self.network = torchfcpe.spawn_bundled_infer_model(device=str(device))
        self.network.eval().requires_grad_(False)
        for part in (self.network.model.input_stack, self.network.model.net):
            lower(part, self.dtype)

    def track(self, wave: Tensor) -> Tensor:
        # Above full scale it prints a complaint for each clip.
        wave = wave / wave.abs().max().clamp_min(1.0)
        f0: Tensor = self.network(wave[None, :, None], FEATURE_RATE, "local_argmax", self.THRESHOLD)[0, :, 0]
        # Of a tone below the range it takes some frames for its lowest pitch.
        return self.with_yin(f0, wave, below=True) if ((f0 > 0) & (f0 < self.f0_min)).any() else f0


class PestoPitch(F0Method):
    """PESTO (Riou et al. 2023, arXiv:2309.02265) with the weights that come with pesto-pitch; it is trained on singing.

    The network's own confidence says what is voiced. It is low on real speech, and so is the threshold.
    """

    MIN_CONFIDENCE = 0.2
    MIN_SAMPLES = 4096

    def __init__(self, config: ExtractConfig, device: torch.device) -> None:
        super().__init__(config, device)
        make_torchaudio_importable()
        import pesto

        self.network = pesto.load_model(
            "mir-1k_g7", step_size=1000.0 * F0_HOP / FEATURE_RATE, sampling_rate=FEATURE_RATE
        )
        self.network.eval().requires_grad_(False).to(device)
        lower(self.network.encoder, self.dtype, last=self.network.encoder.fc)

    def track(self, wave: Tensor) -> Tensor:
        # It mirrors half a window at the ends, which a shorter clip does not have.
        wave = F.pad(wave, (0, max(0, self.MIN_SAMPLES - wave.shape[0])))
        f0, confidence, _ = self.network(wave, convert_to_freq=True, return_activations=False)
        # It is sure that a tone of 40 Hz is one of 120.
        return self.with_yin(torch.where(confidence >= self.MIN_CONFIDENCE, f0, 0.0), wave, below=True)


class SwiftPitch(F0Method):
    """SwiftF0 (Nieradzik 2025, arXiv:2508.18440) with the weights that come with swift-f0, by ONNX Runtime on the CPU.

    It has a frame every 16 ms; between them the pitch is interpolated over log frequency, and a frame is voiced where
    the nearest of them is. The threshold is below its authors' 0.5, which loses voiced frames of real speech.
    """

    on_cpu = True
    MIN_CONFIDENCE = 0.3
    STEP = 1.05
    """A little more than the ratio of neighbouring pitches of the network."""

    def __init__(self, config: ExtractConfig, device: torch.device) -> None:
        super().__init__(config, device)
        import swift_f0

        check_range(config, "swift", swift_f0.FMIN, swift_f0.FMAX, self.STEP)
        if self.dtype != torch.float32:
            raise ValueError(
                f"extract.precision: got {config.precision} with extract.f0_method swift, whose network is in float32 "
                "alone; set fp32, or take another tracker"
            )
        # Idle threads that spin would take the CPU from what reads the next clips.
        self.detector = swift_f0.SwiftF0(threads=config.num_threads, spin=False)

    def track(self, wave: Tensor) -> Tensor:
        # A step further on either side, or it hears what is just beyond as the range's edge.
        low, high = self.f0_min / self.STEP, self.f0_max * self.STEP
        found = self.detector.detect(wave.cpu().numpy(), FEATURE_RATE, low, high)
        voiced = found.confidence >= self.MIN_CONFIDENCE
        return torch.from_numpy(resample_pitch(np.where(voiced, found.pitch_hz, 0.0), found.timestamps, wave.shape[0]))


def resample_pitch(
    f0: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64], num_samples: int
) -> npt.NDArray[np.float64]:
    """f0 at times of its own -> f0 of frames: [N] in Hz (0: unvoiced), [N] ascending, S -> [S // 160].

    Between two voiced neighbours less than a third of an octave apart, the straight line over log frequency; else the
    value of the nearest, voiced or not.
    """
    wanted = np.arange(num_samples // F0_HOP) * (F0_HOP / FEATURE_RATE)
    after = np.searchsorted(seconds, wanted).clip(1, max(1, len(seconds) - 1))
    before = after - 1
    after = after.clip(max=len(seconds) - 1)
    gap = np.where(after > before, seconds[after] - seconds[before], 1.0)
    share = ((wanted - seconds[before]) / gap).clip(0.0, 1.0)
    left, right = f0[before], f0[after]
    octaves = np.log2(np.where(right > 0, right, 1.0) / np.where(left > 0, left, 1.0))
    smooth = (left > 0) & (right > 0) & (np.abs(octaves) < 1.0 / 3.0)
    return np.asarray(np.where(smooth, left * 2.0 ** (share * octaves), np.where(share < 0.5, left, right)))


class HybridPitch(F0Method):
    """`hybrid[a+b+...]`: the median of several methods, frame by frame.

    A frame is voiced when more than half of the methods say so. The median is over those that do; of an even number it
    is the lower of the middle two, since the mean of two that are an octave apart is a pitch that nobody heard.
    """

    def __init__(self, config: ExtractConfig, device: torch.device, names: Sequence[str]) -> None:
        # Tuned once, after the median.
        self.methods = [load_f0(replace(config, f0_method=name, f0_autotune=False), device) for name in names]
        self.on_cpu = all(method.on_cpu for method in self.methods)
        super().__init__(config, device)

    def track(self, wave: Tensor) -> Tensor:
        return majority_median(torch.cat([method(wave[None]).to(self.device) for method in self.methods]))

    def total_counts(self) -> Tensor:  # of what the methods hear beyond the range nothing reaches the median
        return super().total_counts() + sum(method.total_counts() for method in self.methods)


def majority_median(f0: Tensor) -> Tensor:
    """[methods, T] in Hz, 0 where unvoiced -> [T], by the rule of `HybridPitch`."""
    voiced = f0 > 0
    median = torch.where(voiced, f0, torch.nan).nanmedian(dim=0).values  # of an even number the lower
    return torch.where(2 * voiced.sum(dim=0) > f0.shape[0], median, 0.0)


def load_f0(config: ExtractConfig, device: torch.device) -> F0Method:
    """The pitch tracker that the recipe names, on `device`.

    Raises ValueError for an unknown method or unfit weights, StageError when weights cannot be had, ImportError
    (with the command that helps) when an optional package is missing.
    """
    name, *others = f0_method_names(config.f0_method)
    if others:
        return HybridPitch(config, device, [name, *others])
    spec = F0_METHODS[name]
    try:
        method: F0Method = resolve(spec.make)(config, device)
    except ImportError as error:
        if spec.package is None:
            raise
        raise ImportError(" ".join(spec.package.missing(f"extract.f0_method {name}", error))) from error
    return method


def load_network(
    make: Callable[[Mapping[str, Tensor]], Network], key: str, name: str | None, method: str, title: str
) -> Network:
    """The network of a method that `make` builds for the weights that the recipe names under `key`, in float32.

    Raises StageError when they cannot be had, ValueError when they are not those of `title`.
    """
    path = find_weights(key, name, method)
    tensors = {key: t.float() if t.is_floating_point() else t for key, t in read_tensors(path).items()}
    with torch.device("meta"):  # weights need not be drawn to be overwritten
        network = make(tensors)
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        why = textwrap.shorten(str(error), 500, placeholder=" ...")  # of a foreign file it names every tensor
        raise ValueError(f"{key}: {path} does not hold the weights of {title}: {why}") from error
    return network.eval().requires_grad_(False)


def find_weights(key: str, name: str | None, method: str) -> Path:
    """The weights file that the recipe names under `key`: a local file, or owner/repository/file on the hub."""
    if name is None:
        raise StageError(f"{key} is not set: {method} has no weights of its own;", f"say --{key} PATH")
    if Path(name).is_file():
        return Path(name)
    owner, _, rest = name.partition("/")
    repository, _, filename = rest.partition("/")
    if owner and repository and filename:
        try:
            return hub_file(f"{owner}/{repository}", filename)
        except FileNotFoundError as error:
            reason = str(error)
    else:
        reason = "it is not of the form owner/repository/file either, so the hub was not asked."
    raise StageError(
        f"{key}: the weights of {method}, {name}, cannot be had. {Path(name).absolute()} is no file; {reason}",
        f"Put {Path(name).name} on this machine and say --{key} PATH, or take a method that needs none: "
        "--extract.f0_method swipe",
    )


def bin_of(hz: float) -> float:
    return (1200.0 * math.log2(hz / 10.0) - CENTS_OFFSET) / CENTS_PER_BIN


def hz_of(bin_: float) -> float:
    return float(10.0 * 2.0 ** ((CENTS_PER_BIN * bin_ + CENTS_OFFSET) / 1200.0))


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


def peak_hz(salience: Tensor, threshold: float) -> Tensor:
    """Pitch at the highest bin of each frame, 0 where that does not exceed `threshold`: [B, T, 360] -> [B, T] in Hz."""
    peak, centre = salience.max(dim=2)
    f0 = local_average_hz(salience.flatten(0, 1), centre.flatten()).reshape(peak.shape)
    return torch.where(peak > threshold, f0, 0.0)


def viterbi(score: npt.NDArray[np.float32], width: float = 12.0) -> npt.NDArray[np.int64]:
    """The path of bins with the highest sum of scores and transitions: [T, bins] -> [T].

    A step of d bins has the probability of a triangle that ends at `width` bins: 12 (240 cents) in torchcrepe. There
    the score is log(softmax(salience)), which differs from the salience by a constant a frame and so chooses the same
    path. Bins with a score of -inf are never entered.
    """
    reach = math.ceil(width) - 1
    log_step = np.log(width - np.abs(np.arange(-reach, reach + 1))).astype(np.float32)
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
