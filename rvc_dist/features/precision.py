"""Content encoders and pitch trackers in half precision: which device can, and what of a network stays in float32."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn

from rvc_dist.runtime.device import lacking
from rvc_dist.workspace import StageError


def check_device(precision: str, device: torch.device) -> None:
    """Refuse a precision that the device only emulates, or is not faster in.

    Raises:
        StageError: it does not gain by it.
    """
    if precision == "fp32":
        return
    problem = lacking(precision, device)
    if device.type == "cpu" and precision == "fp16":  # measured with AVX-512 FP16
        problem = "fp16 is for GPUs, and on a CPU no faster than fp32"
    elif device.type == "cpu" and not _cpu_has_bf16():
        problem = "this CPU has no instructions for bf16 (AVX-512 BF16 or AMX on x86)"
    if problem:
        raise StageError(f"extract.precision: {problem};", "set extract.precision fp32")


def _cpu_has_bf16() -> bool:
    if platform.machine() in ("x86_64", "AMD64"):  # there oneDNN's own answer counts emulation
        return torch.cpu._is_avx512_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def lower(
    network: nn.Module, dtype: torch.dtype, first: nn.Module | None = None, last: nn.Module | None = None
) -> None:
    """Let `network` compute in `dtype` from here on, and give float32 (but not where it gives more than a tensor).

    The weights are rounded once, where autocast would do it in every call. In float32 stay the parts `first` and
    `last`, between which all is in `dtype`, and batch norms, whose kernels take half precision beside their float32.

    Raises:
        ValueError: what PyTorch would give is wrong.
    """
    if dtype == torch.float32:
        return
    groups = [m for m in network.modules() if isinstance(m, nn.Conv1d) and m.weight.device.type == "cpu"]
    if dtype == torch.bfloat16 and any(1 < m.in_channels // m.groups < 16 for m in groups if m.groups > 1):
        raise ValueError(  # by more than 100%, where AMX computes it (oneDNN of torch 2.14)
            "extract.precision: on CPUs bf16 convolutions in groups of fewer than 16 channels, which this network has, "
            "can come out wrong; set fp32"
        )
    exact = {m for part in (first, last) if part is not None for m in part.modules()}
    for module in network.modules():
        if module not in exact and not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data

    def cast_input(to: torch.dtype) -> Any:
        return lambda _module, args: (args[0].to(to), *args[1:])

    if first is None:
        network.register_forward_pre_hook(cast_input(dtype))
    else:
        first.register_forward_hook(lambda _module, _args, out: out.to(dtype))
    if last is None:
        network.register_forward_hook(lambda _module, _args, out: out.float() if isinstance(out, Tensor) else out)
    else:
        last.register_forward_pre_hook(cast_input(torch.float32))
