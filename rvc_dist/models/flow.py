"""Normalising flow between the posterior's and the prior's latents (VITS, arXiv 2106.06103).

B batch, T frames, C channels. Attribute names are the state-dict keys of upstream RVC.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rvc_dist.models.modules import WaveNet
from rvc_dist.models.shape import GeneratorShape

NUM_COUPLINGS = 4


class Coupling(nn.Module):
    """Mean-only affine coupling: half of the channels shift the other half; [B, C, T] to [B, C, T]."""

    def __init__(self, shape: GeneratorShape) -> None:
        super().__init__()
        half = shape.inter_channels // 2
        self.pre = nn.Conv1d(half, shape.hidden_channels, 1)
        num_layers = 4 if shape.is_svc else 3
        self.enc = WaveNet(shape.hidden_channels, kernel_size=5, num_layers=num_layers, gin_channels=shape.gin_channels)
        self.post = nn.Conv1d(shape.hidden_channels, half, 1)
        # The flow starts as the identity.
        for parameter in self.post.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, mask: Tensor, speaker: Tensor, reverse: bool) -> Tensor:
        kept, moved = x.chunk(2, dim=1)
        shift = self.post(self.enc(self.pre(kept) * mask, mask, speaker)) * mask
        moved = (moved - shift) * mask if reverse else shift + moved * mask
        return torch.cat([kept, moved], dim=1)


class Flow(nn.Module):
    """Posterior latents z to prior latents z_p, or back when `reverse`: [B, inter, T] to [B, inter, T].

    After each coupling the channels are reversed, so that the next one moves the other half.
    """

    def __init__(self, shape: GeneratorShape) -> None:
        super().__init__()
        # Upstream reverses the channels in layers of their own, which hold no weights but count in the keys.
        self.flows = nn.ModuleList(layer for _ in range(NUM_COUPLINGS) for layer in (Coupling(shape), nn.Identity()))

    def forward(self, x: Tensor, mask: Tensor, speaker: Tensor, reverse: bool = False) -> Tensor:
        couplings = self.flows[::2]
        for coupling in reversed(couplings) if reverse else couplings:
            x = coupling(x.flip(1), mask, speaker, True) if reverse else coupling(x, mask, speaker, False).flip(1)
        return x
