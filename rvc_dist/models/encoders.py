"""Prior encoder (content and pitch) and posterior encoder (spectrogram) of VITS (arXiv 2106.06103).

B batch, T frames, C channels, H heads, D channels of a head, W attention window. Attribute names are the state-dict
keys of upstream RVC.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvc_dist.models.modules import LEAKY_SLOPE, LayerNorm, WaveNet
from rvc_dist.models.pitch import COARSE_BINS
from rvc_dist.models.shape import GeneratorShape


class RelativeAttention(nn.Module):
    """Multi-head self-attention with relative positions (Shaw et al., arXiv 1803.02155): [B, C, T] to [B, C, T].

    Keys and values up to `window` frames away get a learnt offset, shared by all heads; farther ones none.
    """

    def __init__(self, channels: int, num_heads: int, dropout: float, window: int) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        depth = channels // num_heads
        self.conv_q = nn.Conv1d(channels, channels, 1)
        self.conv_k = nn.Conv1d(channels, channels, 1)
        # It moves all scores of a query alike, which softmax does not see. Its gradient would be rounding noise alone,
        # of which Adam makes full steps, different ones on every number of ranks.
        assert self.conv_k.bias is not None
        self.conv_k.bias.requires_grad_(False)
        self.conv_v = nn.Conv1d(channels, channels, 1)
        self.conv_o = nn.Conv1d(channels, channels, 1)
        self.emb_rel_k = nn.Parameter(torch.randn(1, 2 * window + 1, depth) * depth**-0.5)
        self.emb_rel_v = nn.Parameter(torch.randn(1, 2 * window + 1, depth) * depth**-0.5)
        self.drop = nn.Dropout(dropout)
        for conv in (self.conv_q, self.conv_k, self.conv_v):
            nn.init.xavier_uniform_(conv.weight)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`mask` is [B, 1, T]; what invalid frames get is arbitrary."""
        query, key, value = (self._heads(conv(x)) for conv in (self.conv_q, self.conv_k, self.conv_v))
        query = query * query.shape[-1] ** -0.5
        scores = query @ key.transpose(-2, -1) + _offsets_to_frames(query @ self.emb_rel_k.transpose(-2, -1))
        scores = scores.masked_fill(mask.unsqueeze(1) == 0, -1e4)
        weights = self.drop(scores.softmax(-1))
        mixed = weights @ value + _frames_to_offsets(weights, self.window) @ self.emb_rel_v
        out: Tensor = self.conv_o(mixed.transpose(-2, -1).flatten(1, 2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """[B, C, T] to [B, H, T, D]."""
        return x.reshape(x.shape[0], self.num_heads, -1, x.shape[2]).transpose(-2, -1)


def _offsets_to_frames(x: Tensor) -> Tensor:
    """Spread x[..., i, o] over a band, y[..., i, i + o - W] = x[..., i, o]: [B, H, T, 2W + 1] to [B, H, T, T].

    Rows padded to T + 2W + 1 and read as rows of T + 2W shift by one more with every row: no gather, so its gradient
    needs no scatter.
    """
    batch, heads, num_frames, width = x.shape
    skewed = F.pad(x, (0, num_frames)).flatten(-2)[..., :-num_frames]
    rows = skewed.reshape(batch, heads, num_frames, num_frames + width - 1)
    return rows[..., width // 2 : width // 2 + num_frames]


def _frames_to_offsets(x: Tensor, window: int) -> Tensor:
    """Read the band that `_offsets_to_frames` writes, zeros beyond the ends: [B, H, T, T] to [B, H, T, 2W + 1]."""
    batch, heads, num_frames, _ = x.shape
    width = 2 * window + 1
    padded = F.pad(x, (window, window)).flatten(-2)
    return F.pad(padded, (0, num_frames)).reshape(batch, heads, num_frames, num_frames + width)[..., :width]


class FeedForward(nn.Module):
    """Two convolutions with a ReLU in between: [B, C, T] to [B, C, T]."""

    def __init__(self, channels: int, filter_channels: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.conv_1 = nn.Conv1d(channels, filter_channels, kernel_size, padding="same")
        self.conv_2 = nn.Conv1d(filter_channels, channels, kernel_size, padding="same")
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.drop(F.relu(self.conv_1(x * mask)))
        out: Tensor = self.conv_2(x * mask) * mask
        return out


class Transformer(nn.Module):
    """Post-norm transformer: [B, C, T] to [B, C, T]."""

    def __init__(self, shape: GeneratorShape) -> None:
        super().__init__()
        channels, layers = shape.hidden_channels, range(shape.num_layers)
        self.attn_layers = nn.ModuleList(
            RelativeAttention(channels, shape.num_heads, shape.dropout, shape.attention_window) for _ in layers
        )
        self.norm_layers_1 = nn.ModuleList(LayerNorm(channels) for _ in layers)
        self.ffn_layers = nn.ModuleList(
            FeedForward(channels, shape.filter_channels, shape.kernel_size, shape.dropout) for _ in layers
        )
        self.norm_layers_2 = nn.ModuleList(LayerNorm(channels) for _ in layers)
        self.drop = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x * mask
        layers = zip(self.attn_layers, self.norm_layers_1, self.ffn_layers, self.norm_layers_2, strict=True)
        for attend, norm_1, feed_forward, norm_2 in layers:
            x = norm_1(x + self.drop(attend(x, mask)))
            x = norm_2(x + self.drop(feed_forward(x, mask)))
        return x * mask


class TextEncoder(nn.Module):
    """Prior `enc_p`: content features [B, T, C] and coarse pitch [B, T] (1..255) to the prior's mean and log deviation.

    Some follow the `energy` [B, T] of frames too. Returns m_p and logs_p, each [B, inter, T], zero outside `mask`
    [B, 1, T].
    """

    def __init__(self, shape: GeneratorShape) -> None:
        super().__init__()
        self.scale = math.sqrt(shape.hidden_channels)
        self.emb_phone = nn.Linear(shape.content_channels, shape.hidden_channels)
        self.emb_pitch = nn.Embedding(COARSE_BINS, shape.hidden_channels) if shape.pitch_guidance else None
        self.emb_energy = nn.Linear(1, shape.hidden_channels) if shape.energy else None
        self.encoder = Transformer(shape)
        self.proj = nn.Conv1d(shape.hidden_channels, 2 * shape.inter_channels, 1)

    def forward(
        self, content: Tensor, coarse: Tensor | None, mask: Tensor, energy: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x: Tensor = self.emb_phone(content)
        if self.emb_pitch is not None:
            x = x + self.emb_pitch(coarse)
        if self.emb_energy is not None:
            assert energy is not None
            x = x + self.emb_energy(energy.unsqueeze(2))
        x = F.leaky_relu(x * self.scale, LEAKY_SLOPE).transpose(1, 2)
        mean, log_deviation = (self.proj(self.encoder(x, mask)) * mask).chunk(2, dim=1)
        return mean, log_deviation


class SvcEncoder(nn.Module):
    """Prior `enc_p` of the SVC architecture: hidden frames [B, hidden, T] and coarse pitch [B, T], as TextEncoder's."""

    def __init__(self, shape: GeneratorShape) -> None:
        super().__init__()
        self.f0_emb = nn.Embedding(COARSE_BINS, shape.hidden_channels)
        self.proj = nn.Conv1d(shape.hidden_channels, 2 * shape.inter_channels, 1)
        self.encoder = Transformer(shape)

    def forward(self, x: Tensor, coarse: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.f0_emb(coarse).transpose(1, 2)
        mean, log_deviation = (self.proj(self.encoder(x, mask)) * mask).chunk(2, dim=1)
        return mean, log_deviation


class PosteriorEncoder(nn.Module):
    """Posterior `enc_q`: linear spectrogram [B, F, T] to a sample z, its mean and log deviation, each [B, inter, T].

    `noise` [B, inter, T], standard normal, makes the sample.
    """

    def __init__(self, shape: GeneratorShape) -> None:
        super().__init__()
        self.pre = nn.Conv1d(shape.spec_channels, shape.hidden_channels, 1)
        self.enc = WaveNet(shape.hidden_channels, kernel_size=5, num_layers=16, gin_channels=shape.gin_channels)
        self.proj = nn.Conv1d(shape.hidden_channels, 2 * shape.inter_channels, 1)

    def forward(self, spec: Tensor, mask: Tensor, speaker: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.enc(self.pre(spec) * mask, mask, speaker)
        mean, log_deviation = (self.proj(x) * mask).chunk(2, dim=1)
        return (mean + noise * log_deviation.exp()) * mask, mean, log_deviation
