"""Building blocks that several networks share.

B batch, T frames, S samples, C channels. Attribute names are the state-dict keys of upstream RVC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import ParametrizationList

LEAKY_SLOPE = 0.1


def frame_mask(lengths: Tensor, num_frames: int) -> Tensor:
    """1.0 where a frame is valid, else 0.0: `lengths` [B] to [B, 1, T]."""
    return (torch.arange(num_frames, device=lengths.device) < lengths[:, None]).unsqueeze(1).float()


def slice_frames(x: Tensor, start: Tensor, segment: int) -> Tensor:
    """x[b, :, start[b] : start[b] + segment] for every b: [B, C, T] to [B, C, segment], `start` [B] int64."""
    index = start[:, None] + torch.arange(segment, device=start.device)
    return x.gather(2, index.unsqueeze(1).expand(-1, x.shape[1], -1))


def slice_samples(wave: Tensor, start_frames: Tensor, segment_frames: int, hop: int) -> Tensor:
    """The samples under the frames of `slice_frames`: [B, 1, S] to [B, 1, segment_frames * hop]."""
    return slice_frames(wave, start_frames * hop, segment_frames * hop)


def reflected(x: Tensor, left: int, right: int) -> Tensor:
    """`x` [B, C, S] with `left` and `right` samples more, mirrored at its ends as by F.pad.

    Where determinism is asked for, by joining parts: the gradient of F.pad has no deterministic kernel on GPUs.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return F.pad(x, (left, right), mode="reflect")
    size = x.shape[-1]
    return torch.cat([x[..., 1 : left + 1].flip(-1), x, x[..., size - 1 - right : size - 1].flip(-1)], dim=-1)


@contextmanager
def kernel_search(on: bool | None = None) -> Iterator[None]:
    """Inside, cuDNN looks for the fastest kernel of each new shape, or takes one that it knows to be good.

    A search takes tenths of a second, so it is for shapes that come again. Without `on` all is as before; afterwards
    it is in any case.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before if on is None else on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class KernelSearchFromHere(torch.autograd.Function):
    """The same tensor; cuDNN searches for kernels in what is computed from it, and no more once its gradient is known.

    So a backward pass, which takes the setting as it is by then, searches where the forward pass did.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        torch.backends.cudnn.benchmark = True
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        torch.backends.cudnn.benchmark = False
        return gradient


@contextmanager
def weights_made_once(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, every weight that weight norm makes in `network` is made and cast to `dtype` once, not in every pass.

    For passes without gradients of its own, whose numbers stay the same. `dtype` is the one that it computes in: that
    of autocast, or float32.
    """
    norms = [module for module in network.modules() if isinstance(module, ParametrizationList)]
    with torch.no_grad():
        for norm in norms:
            norm.forward = partial(Tensor.detach, norm().to(dtype))  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


class LayerNorm(nn.Module):
    """Layer normalisation over the channels of [B, C, T]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.transpose(1, 2), self.gamma.shape, self.gamma, self.beta).transpose(1, 2)


class WaveNet(nn.Module):
    """Gated convolutions with residual and skip paths, conditioned on a speaker: [B, C, T] to [B, C, T].

    The WN of VITS (arXiv 2106.06103) at dilation 1. `speaker` is [B, gin, 1], `mask` [B, 1, T].
    """

    def __init__(self, channels: int, kernel_size: int, num_layers: int, gin_channels: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.cond_layer = weight_norm(nn.Conv1d(gin_channels, 2 * channels * num_layers, 1))
        self.in_layers = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, 2 * channels, kernel_size, padding=kernel_size // 2))
            for _ in range(num_layers)
        )
        # Nothing comes after the last layer's residual path, so it has none.
        self.res_skip_layers = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels * (1 if i == num_layers - 1 else 2), 1)) for i in range(num_layers)
        )

    def forward(self, x: Tensor, mask: Tensor, speaker: Tensor) -> Tensor:
        conditions = self.cond_layer(speaker).chunk(self.num_layers, dim=1)
        skips: Tensor | None = None
        for condition, conv_in, conv_out in zip(conditions, self.in_layers, self.res_skip_layers, strict=True):
            content, gate = (conv_in(x) + condition).chunk(2, dim=1)
            skip: Tensor = conv_out(torch.tanh(content) * torch.sigmoid(gate))
            if skip.shape[1] != x.shape[1]:
                residual, skip = skip.chunk(2, dim=1)
                x = (x + residual) * mask
            skips = skip if skips is None else skips + skip
        assert skips is not None
        return skips * mask


LONGEST_PIECE = 1080
"""Samples a piece, where a gradient is computed in pieces."""


def channels_last(x: Tensor) -> Tensor:
    """The same [B, C, S] or [B, C, H, W] with the channels of a sample side by side in memory.

    Convolutions keep that layout; kernels that want it read it as it is, where they reorder every input and output of
    the other.
    """
    last = x.movedim(1, -1)
    # A single channel is in both layouts at once: only its strides say which one is meant.
    return last.flatten(1).view(last.shape).movedim(-1, 1)


def use_channels_last(network: nn.Module, on: bool = True) -> None:
    """Let the decoder or the discriminators in `network` compute `channels_last`, or no longer.

    This is the switch for a trial on CUDA: weights, state dicts and results keep their names and shapes, and results
    differ by rounding. It is off to begin with; on a CPU the decoder always is, and the discriminators in bf16.
    """
    for module in network.modules():
        if hasattr(module, "channels_last"):
            module.channels_last = on  # type: ignore[assignment]


class Conv1d(nn.Conv1d):
    """nn.Conv1d without its copy of inputs that are `channels_last`: as an image of height 1 they stay so."""

    def forward(self, x: Tensor) -> Tensor:
        stride, padding, dilation = (1, *self.stride), (0, int(self.padding[0])), (1, *self.dilation)
        image, weight = x.unsqueeze(2), self.weight.unsqueeze(2)
        pieces = _num_pieces(x, weight) if self.stride == (1,) and self.groups == 1 else 1
        if pieces > 1:
            out: Tensor = _ConvInPieces.apply(image, weight, self.bias, padding, dilation, pieces)
        else:
            out = F.conv2d(image, weight, self.bias, stride, padding, dilation, self.groups)
        return out.squeeze(2)


def _num_pieces(x: Tensor, weight: Tensor) -> int:
    """Into how many pieces of equal length `_ConvInPieces` is to cut `x` [B, C, S]: one where it gains nothing."""
    samples = x.shape[2]
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
        or x.stride(1) != 1
        or not (torch.is_grad_enabled() and weight.requires_grad)
    ):
        return 1
    fewest = -(-samples // LONGEST_PIECE)
    return next((n for n in range(fewest, 2 * fewest + 1) if samples % n == 0), 1)


class _ConvInPieces(torch.autograd.Function):
    """F.conv2d of `channels_last` images of height 1 whose weights' gradient is summed over pieces of their length.

    oneDNN's float32 kernel for it walks along a whole row before it turns to the next channels; a row that is longer
    than the cache made it 2 to 4 times as slow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: tuple[int, int],
        dilation: tuple[int, int],
        num_pieces: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.dilation, ctx.num_pieces = padding, dilation, num_pieces
        return F.conv2d(x, weight, bias, 1, padding, dilation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        reach, num_pieces = ctx.padding[1], ctx.num_pieces
        grad = channels_last(grad)

        def gradients(grad: Tensor, x: Tensor, reach: int, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
            sizes = [len(weight)], [1, 1], [0, reach], ctx.dilation, False, [0, 0], 1
            found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(grad, x, weight, *sizes, wanted)
            return found

        grad_x, _, _ = gradients(grad, x, reach, [wants_x, False, False])
        length = grad.shape[3] // num_pieces
        rows = F.pad(x.squeeze(2).transpose(1, 2), (0, 0, reach, reach))
        rows = rows.unfold(1, length + 2 * reach, length).transpose(2, 3).flatten(0, 1)
        grad_rows = grad.squeeze(2).transpose(1, 2).reshape(-1, length, len(weight))
        grad_image, image = (pieces.transpose(1, 2).unsqueeze(2) for pieces in (grad_rows, rows))
        _, grad_weight, grad_bias = gradients(grad_image, image, 0, [False, wants_weight, wants_bias])
        return grad_x, grad_weight, grad_bias, None, None, None


class ConvTranspose1d(nn.ConvTranspose1d):
    """nn.ConvTranspose1d that likewise keeps inputs `channels_last`."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert output_size is None
        stride, padding = (1, *self.stride), (0, int(self.padding[0]))
        weight = self.weight.unsqueeze(2)
        return F.conv_transpose2d(x.unsqueeze(2), weight, self.bias, stride, padding).squeeze(2)


def residual_conv(channels: int, kernel_size: int, dilation: int = 1) -> Conv1d:
    """A layer of a residual block, which keeps the length."""
    padding = dilation * (kernel_size - 1) // 2
    conv: Conv1d = weight_norm(Conv1d(channels, channels, kernel_size, dilation=dilation, padding=padding))
    return conv


class ResBlock(nn.Module):
    """Residual dilated convolutions, [B, C, S] to [B, C, S]: resblock "1" of HiFi-GAN (arXiv 2010.05646)."""

    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...], slope: float = LEAKY_SLOPE) -> None:
        super().__init__()
        self.slope = slope
        self.convs1 = nn.ModuleList(residual_conv(channels, kernel_size, dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(residual_conv(channels, kernel_size) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for conv1, conv2 in zip(self.convs1, self.convs2, strict=True):
            x = x + conv2(F.leaky_relu(conv1(F.leaky_relu(x, self.slope)), self.slope))
        return x


class ResidualLayers(nn.Module):
    """The same as ResBlock, [B, C, S] to [B, C, S], with its layers in pairs and an activation of choice.

    `activation` makes one of the number of channels.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilations: tuple[int, ...],
        activation: Callable[[int], nn.Module] = lambda channels: nn.LeakyReLU(LEAKY_SLOPE),
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(_Pair(channels, kernel_size, d, activation) for d in dilations))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class _Pair(nn.Module):
    def __init__(self, channels: int, kernel_size: int, dilation: int, activation: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = residual_conv(channels, kernel_size, dilation)
        self.conv2 = residual_conv(channels, kernel_size)
        self.act1, self.act2 = activation(channels), activation(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv2(self.act2(self.conv1(self.act1(x))))
        return y
