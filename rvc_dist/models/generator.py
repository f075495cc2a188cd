"""The generator of an RVC voice: a conditional variational autoencoder with a vocoder as decoder.

B batch, T frames, S samples (S = T * hop), C channels, F frequency bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rvc_dist.models.encoders import PosteriorEncoder, SvcEncoder, TextEncoder
from rvc_dist.models.flow import Flow
from rvc_dist.models.modules import KernelSearchFromHere, frame_mask, kernel_search, slice_frames
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.vocoders import vocoder_class

NOISE_SCALES = {"rvc": 0.66666, "svc": 0.35}
"""Of the prior's deviation in conversions, as upstream, by architecture."""


class Noise(NamedTuple):
    """The random numbers of one training pass: inputs like any other, so that they do not depend on who draws when."""

    posterior: Tensor
    """[B, inter, T] standard normal."""
    start: Tensor
    """[B] uniform in 0..1: which slice of the clip is decoded."""
    vocoder: tuple[Tensor, ...]
    """Standard normal: what the vocoder takes for segment_frames frames, [B, *] of each of its `noise_shapes`."""

    @classmethod
    def draw(cls, shape: GeneratorShape, seeds: Sequence[int], num_frames: int, device: torch.device) -> Noise:
        """The noise of clips of `num_frames` frames, each from its own seed: the same in any batch, on any rank."""
        generator = torch.Generator(device)
        sizes = vocoder_class(shape).noise_shapes(shape, shape.segment_frames)
        rows = []
        for seed in seeds:
            generator.manual_seed(seed)
            options: dict[str, Any] = {"generator": generator, "device": device}
            start = torch.rand((), **options)
            vocoder = [torch.randn(size, **options) for size in sizes]
            rows.append((torch.randn(shape.inter_channels, num_frames, **options), start, *vocoder))
        posterior, starts, *vocoders = map(torch.stack, zip(*rows, strict=True))
        return cls(posterior, starts, tuple(vocoders))


class GeneratorOutput(NamedTuple):
    """What a training step needs; latents are [B, inter, T] and zero outside `mask`."""

    wave: Tensor
    """The decoded slice, [B, 1, segment_samples]."""
    start: Tensor
    """First frame of the slice in each clip, [B] int64."""
    mask: Tensor
    """1 in valid frames, [B, 1, T]."""
    z_p: Tensor
    """Sample of the posterior, mapped by the flow to the prior's space."""
    m_p: Tensor
    logs_p: Tensor
    """Mean and log deviation of the prior."""
    m_q: Tensor
    logs_q: Tensor
    """Mean and log deviation of the posterior."""


class Generator(nn.Module):
    """VITS (arXiv 2106.06103) with content features and pitch in place of text.

    Inputs: content [B, T, C]; lengths [B] in frames; coarse [B, T] int64 in 1..255 and f0 [B, T] in Hz (0 = unvoiced),
    both None without pitch guidance; spec [B, F, T] linear magnitude; speaker [B] int64; energy [B, T] of frames where
    the shape has it, else None. Only training hears recordings
    through the posterior encoder: one made to convert is `without_posterior`.
    """

    def __init__(self, shape: GeneratorShape, without_posterior: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.enc_p = SvcEncoder(shape) if shape.is_svc else TextEncoder(shape)
        self.dec = vocoder_class(shape)(shape)
        self.enc_q = None if without_posterior else PosteriorEncoder(shape)
        self.flow = Flow(shape)
        self.emb_g = nn.Embedding(shape.num_speakers, shape.gin_channels)
        if shape.is_svc:
            self.pre = nn.Conv1d(shape.content_channels, shape.hidden_channels, 5, padding=2)
            self.emb_uv = nn.Embedding(2, shape.hidden_channels)

    def prior(
        self, content: Tensor, coarse: Tensor | None, f0: Tensor | None, mask: Tensor, energy: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log deviation, each [B, inter, T]."""
        if isinstance(self.enc_p, TextEncoder):
            of_text: tuple[Tensor, Tensor] = self.enc_p(content, coarse, mask, energy)
            return of_text
        assert f0 is not None
        x = self.pre(content.transpose(1, 2)) * mask + self.emb_uv((f0 > 0).long()).transpose(1, 2)
        of_frames: tuple[Tensor, Tensor] = self.enc_p(x, coarse, mask)
        return of_frames

    def forward(
        self,
        content: Tensor,
        lengths: Tensor,
        coarse: Tensor | None,
        f0: Tensor | None,
        spec: Tensor,
        speaker: Tensor,
        noise: Noise,
        energy: Tensor | None = None,
        decoder: Callable[..., Tensor] | None = None,
    ) -> GeneratorOutput:
        """Decode a random slice of every clip from its spectrogram. Clips are padded to T >= segment_frames.

        `decoder` is what decodes, where that is not `dec` as it is: `dec` compiled.
        """
        assert self.enc_q is not None
        segment = self.shape.segment_frames
        mask = frame_mask(lengths, content.shape[1])
        voice = self.emb_g(speaker).unsqueeze(2)
        with kernel_search(False):  # clips have many lengths, slices have one
            m_p, logs_p = self.prior(content, coarse, f0, mask, energy)
            z, m_q, logs_q = self.enc_q(spec, mask, voice, noise.posterior)
            z_p = self.flow(z, mask, voice)
        num_starts = (lengths - segment + 1).clamp(min=1)
        start = (noise.start * num_starts).long()
        f0_slice = None if f0 is None else slice_frames(f0.unsqueeze(1), start, segment).squeeze(1)
        decode = self.dec if decoder is None else decoder
        z_slice = slice_frames(z, start, segment)
        if torch.backends.cudnn.benchmark:
            z_slice = KernelSearchFromHere.apply(z_slice)
        wave = decode(z_slice, f0_slice, voice, noise.vocoder)
        return GeneratorOutput(wave, start, mask, z_p, m_p, logs_p, m_q, logs_q)

    @torch.no_grad()
    def infer(
        self,
        content: Tensor,
        lengths: Tensor,
        coarse: Tensor | None,
        f0: Tensor | None,
        speaker: Tensor,
        energy: Tensor | None = None,
    ) -> Tensor:
        """Convert whole clips: a wave [B, 1, S], with the prior's noise scaled by NOISE_SCALES.

        Noise comes from PyTorch's own generator of the device.
        """
        mask = frame_mask(lengths, content.shape[1])
        voice = self.emb_g(speaker).unsqueeze(2)
        m_p, logs_p = self.prior(content, coarse, f0, mask, energy)
        scale = NOISE_SCALES[self.shape.architecture]
        z_p = (m_p + torch.randn(m_p.shape, device=m_p.device) * logs_p.exp() * scale) * mask
        z = self.flow(z_p, mask, voice, reverse=True)
        batch, _, num_frames = z.shape
        sizes = self.dec.noise_shapes(self.shape, num_frames)
        # Each is drawn when the vocoder comes to it: all at once could be more than the rest of its memory.
        noise = (torch.randn(batch, *size, device=z.device) for size in sizes)
        wave: Tensor = self.dec(z * mask, f0, voice, noise)
        return wave
