"""Device memory: what is free, what a piece of work needs at its peak, and which batch would fit."""

from __future__ import annotations

import gc
import re
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

RESERVE = 0.08
"""Share of what this process may have of a device's memory, left to fragments, cuDNN's workspaces and NCCL."""


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated; of a CPU, the system's."""
    if device.type == "cuda":
        mine = max(0, _allowed(device) - torch.cuda.memory_reserved(device))
        return min(torch.cuda.mem_get_info(device)[0], mine)
    return int(psutil.virtual_memory().available)


def capacity(device: torch.device) -> int:
    """Bytes that this process may count on in all, its own included."""
    if device.type == "cuda":
        allowed = _allowed(device)
        available = min(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device), allowed)
        return int(available - RESERVE * allowed)
    return int(psutil.virtual_memory().available)


def host_memory() -> int:
    """Bytes that all processes of this job may have on this host, pages of files included: control groups bound it."""
    group = Path("/sys/fs/cgroup")
    own = [line.split(":", 2)[2] for line in _lines(Path("/proc/self/cgroup")) if line.startswith("0::")]
    places = [group / path.strip("/") for path in own]
    places = [place for path in places for place in (path, *path.parents) if place.is_relative_to(group)]
    files = [*(place / "memory.max" for place in places), group / "memory" / "memory.limit_in_bytes"]  # versions 2, 1
    bounds = [int(text) for file in files for text in _lines(file) if text.isdecimal()]
    return min([int(psutil.virtual_memory().total), *bounds])


def _lines(path: Path) -> list[str]:
    """Of a file that not every system has."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _allowed(device: torch.device) -> int:
    """Bytes of a CUDA device that torch's allocator may have in this process."""
    return int(torch.cuda.get_per_process_memory_fraction(device) * torch.cuda.mem_get_info(device)[1])


def graph_pools(device: torch.device) -> int:
    """Bytes that CUDA graphs hold for themselves: no other kernel can use them."""
    if device.type != "cuda":
        return 0
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return sum(s["total_size"] for s in segments if s["device"] == device.index and s["segment_pool_id"] != (0, 0))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had not enough memory, for torch or for the driver and libraries, whose errors are plain."""
    found = re.search(r"CUDA error: out of memory|Cuda failure.*out of memory|_STATUS_ALLOC_FAILED", str(error))
    return isinstance(error, torch.OutOfMemoryError) or found is not None


def peak_of(work: Callable[[], None], device: torch.device) -> int | None:
    """Most bytes allocated at once on a CUDA device while `work` runs; None when even that does not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """Most bytes of a CUDA device's tensors since its count was reset; of a CPU, of the whole process so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def apply_activation_checkpointing(network: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Let parts of `network` of these kinds keep their inputs only, and compute the rest again in the backward pass.

    Activation checkpointing (Chen et al., arXiv 1604.06174). The parts draw no random numbers.
    """
    for part in network.modules():
        if isinstance(part, kinds):
            part.forward = partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)
