"""What a device can do at the most: the fastest of the kernels that training steps are made of.

No one kernel tells. A library may be slow at matrix products and fast at convolutions, or the other way round, and
fast in one layout of memory alone; a step may then do more in a second than that kernel.

Shapes: B clips, C channels, T frames.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rvc_dist.runtime.device import synchronize

Kernel: TypeAlias = tuple[int, Callable[[], Any]]
"""Operations, and what does them."""

ROUNDS, ROUND_S = 3, 0.02
"""A kernel's time is the shortest of so many rounds, which repeat it for as long as this."""
PROMISING = 0.75
"""Share of the peak so far that a convolution has to reach, or its gradients are not tried: in half precision they take
a hundred times as long on CPUs without instructions for it."""
ROWS = {"cpu": (512, 1024), "other": (4096, 8192)}
"""Of square matrices. On a GPU small ones take less time than it takes to launch their product."""
BATCHES = {"cpu": 2, "other": 64}
CONVOLUTIONS = (((256, 432), (256, 256, 11)), ((128, 64, 64), (128, 128, 3, 3)), ((256, 1, 432), (256, 256, 1, 11)))
"""Shapes of a clip and of the weights: one of the decoder's, of one dimension and as an image, and a square one."""


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s in this precision: a second of the device or, on a CPU, a CPU-second with the threads that torch uses."""
    peak = 0.0
    for kernels in kernels_of_a_step(device, dtype):
        for num_operations, work in kernels:
            speed = num_operations / _seconds(work, device)
            peak = max(peak, speed)
            if speed < PROMISING * peak:
                break
    return peak


def kernels_of_a_step(device: torch.device, dtype: torch.dtype) -> Iterator[list[Kernel]]:
    """Products of several sizes, then convolutions in each layout, forward and backward."""
    kind = device.type if device.type in ROWS else "other"
    for rows in ROWS[kind]:
        a, b = (torch.randn(rows, rows, device=device, dtype=dtype) for _ in range(2))
        yield [(2 * rows**3, partial(torch.mm, a, b))]
    for clip, weights in CONVOLUTIONS:
        x = torch.randn(BATCHES[kind], *clip, device=device, dtype=dtype)
        weight = torch.randn(weights, device=device, dtype=dtype)
        yield convolution(x, weight)
        if x.dim() == 4:
            yield convolution(*(t.contiguous(memory_format=torch.channels_last) for t in (x, weight)))


def convolution(x: Tensor, weight: Tensor) -> list[Kernel]:
    """Of x [B, C, ...] with `weight` [C, C, ...], which keeps the shape; each of its gradients is as much work."""
    ones, padding = [1] * (x.dim() - 2), [size // 2 for size in weight.shape[2:]]
    settings = (None, ones, padding, ones, False, [0] * len(ones), 1)
    forward = partial(torch.ops.aten.convolution, x, weight, *settings)
    backward = partial(
        torch.ops.aten.convolution_backward, torch.randn_like(x), x, weight, *settings, [True, True, False]
    )
    num_operations = 2 * x.numel() * weight[0].numel()
    return [(num_operations, forward), (2 * num_operations, backward)]


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of one call, the first not counted: it chooses a way to compute and keeps it."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def timed(calls: int) -> float:
        synchronize(device)
        began_at = clock()
        for _ in range(calls):
            work()
        synchronize(device)
        return max(clock() - began_at, 1e-9) / calls

    timed(1)
    calls = max(1, round(ROUND_S / timed(1)))
    return min(timed(calls) for _ in range(ROUNDS))
