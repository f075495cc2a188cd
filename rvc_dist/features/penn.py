"""FCNF0++ (Morrison et al. 2023, arXiv:2301.12258): the pitch tracker of the package penn.

The network is written here and the package not used: importing it reads this program's --config as its own, and fails
beside a torch that its decoder was not compiled for.

T frames at 100 per second, C channels. Key names and shapes are those of the published `fcnf0++.pt`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvc_dist.config import F0_PER_S, FEATURE_RATE, ExtractConfig
from rvc_dist.features.f0 import F0Method, check_range, load_network, viterbi
from rvc_dist.features.hub import make_torchaudio_importable
from rvc_dist.features.precision import lower

RATE = 8000
WINDOW = 1024
NUM_BINS = 1440
LOWEST_HZ = 31.0
CENTS_PER_BIN = 5.0
"""Bin i is CENTS_PER_BIN * i cents above LOWEST_HZ."""
MAX_OCTAVES_PER_S = 32.0
MIN_PERIODICITY = 0.065
"""Below it a frame is unvoiced: the value that the authors recommend."""
LOCAL_BINS = 9
"""Bins on either side of the path that the pitch is averaged over."""


class FCNF0(nn.Sequential):
    """Frames [T, 1, 1024] at 8 kHz -> logits [T, 1440]."""

    def __init__(self) -> None:
        # The second number is the length that the layer norm sees.
        super().__init__(
            _block(1, 256, 481, pool=True),
            _block(256, 32, 225, pool=True),
            _block(32, 32, 97, pool=True),
            _block(32, 128, 66),
            _block(128, 256, 35),
            _block(256, 512, 4),
            nn.Conv1d(512, NUM_BINS, 4),
        )

    def forward(self, frames: Tensor) -> Tensor:
        # The first FCN-F0 took 993 samples; these are the middle ones.
        logits: Tensor = super().forward(frames[:, :, 16:-15])  # type: ignore[no-untyped-call]
        return logits[:, :, 0]


def _block(channels_in: int, channels_out: int, length: int, pool: bool = False) -> nn.Sequential:
    pooling = [nn.MaxPool1d(2)] if pool else []
    return nn.Sequential(
        nn.Conv1d(channels_in, channels_out, 32), nn.ReLU(), *pooling, nn.LayerNorm((channels_out, length))
    )


class PennPitch(F0Method):
    """FCNF0++ as a pitch tracker, with the weights of `extract.f0_penn_model`; on a CPU hardly faster than real time.

    Raises StageError when they cannot be had, ValueError when they are not FCNF0++'s.
    """

    BATCH_FRAMES = 512

    def __init__(self, config: ExtractConfig, device: torch.device) -> None:
        super().__init__(config, device)
        make_torchaudio_importable()
        from torchaudio.transforms import Resample

        check_range(config, "penn", LOWEST_HZ, LOWEST_HZ * 2.0 ** (NUM_BINS * CENTS_PER_BIN / 1200.0))
        network = load_network(lambda _: FCNF0(), "extract.f0_penn_model", config.f0_penn_model, "penn", "FCNF0++")
        self.network = network.to(device)
        lower(self.network, self.dtype, last=self.network[-1])
        self.resample = Resample(FEATURE_RATE, RATE).to(device)
        self.allowed = torch.zeros(NUM_BINS, dtype=torch.bool, device=device)
        self.allowed[max(0, math.floor(_bin_of(self.f0_min))) : math.ceil(_bin_of(self.f0_max))] = True

    def track(self, wave: Tensor) -> Tensor:
        padded = F.pad(self.resample(wave), (WINDOW // 2, WINDOW // 2))
        frames = padded.unfold(0, WINDOW, RATE // F0_PER_S)[:, None]
        logits = torch.cat([self.network(part) for part in torch.split(frames, self.BATCH_FRAMES)])
        inside = torch.where(self.allowed, logits.softmax(dim=1), 0.0).sum(dim=1) >= 0.5  # else it heard another pitch
        allowed = torch.where(self.allowed, logits, -torch.inf)
        # Transitions are a triangle, as in crepe; a logit differs from its log-probability by a constant a frame.
        width = MAX_OCTAVES_PER_S / F0_PER_S * 1200.0 / CENTS_PER_BIN + 1.0
        path = torch.from_numpy(viterbi(allowed.cpu().numpy(), width)).to(self.device)
        # Of all bins: at the range's edge the peak may lie beyond it.
        f0 = local_mean_hz(logits, path)
        return torch.where(inside & (periodicity(allowed) >= MIN_PERIODICITY), f0, 0.0)


def periodicity(logits: Tensor) -> Tensor:
    """How sure the network is, [T, 1440] -> [T]: 1 less the entropy over its maximum, 0 (all bins alike) to 1 (one).

    Bins of -inf do not count. In penn they do for the maximum, so that a narrow range makes everything periodic.
    """
    log_probability = logits.log_softmax(dim=1)
    entropy = -torch.where(logits > -torch.inf, log_probability.exp() * log_probability, 0.0).sum(dim=1)
    num_allowed = (logits > -torch.inf).sum(dim=1)
    return 1.0 - entropy / num_allowed.clamp_min(2).log()


def local_mean_hz(logits: Tensor, path: Tensor) -> Tensor:
    """Pitch as the mean in cents of the bins around the path, by their probability: [T, 1440], [T] -> [T] in Hz."""
    bins = path[:, None] + torch.arange(-LOCAL_BINS, LOCAL_BINS + 1, device=path.device)
    near = logits.gather(1, bins.clamp(0, NUM_BINS - 1))
    near = torch.where((bins >= 0) & (bins < NUM_BINS), near, -torch.inf)
    cents = (near.softmax(dim=1) * bins * CENTS_PER_BIN).sum(dim=1)
    return LOWEST_HZ * torch.exp2(cents / 1200.0)


def _bin_of(hz: float) -> float:
    return 1200.0 * math.log2(hz / LOWEST_HZ) / CENTS_PER_BIN
