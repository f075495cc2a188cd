"""Devices: which one a rank has, what it can compute in, and the settings of its kernels and of its allocator."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from rvc_dist.config import TrainConfig
from rvc_dist.workspace import StageError

logger = logging.getLogger(__name__)

ALLOCATOR_SETTINGS = "expandable_segments:True"
"""Without the reference's max_split_size_mb:512, by which blocks above 512 MB serve requests of their own size alone:
with clips of many lengths reserved memory grows while what is in use does not."""
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the name in `train.precision` and `extract.precision`."""
MIN_BF16_CAPABILITY = (8, 0)
"""Ampere: older GPUs emulate bf16, slower than float32, and have no TF32."""
MIN_FP16_CAPABILITY = (7, 0)
"""Volta: older GPUs have no tensor cores, and most compute fp16 slower than float32."""
AMD_WITH_BF16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""CDNA and RDNA 3, and newer."""


class Backend(NamedTuple):
    """What a kind of device can do; ROCm is CUDA to PyTorch. Precisions are those of the single device: `lacking`."""

    name: str
    collective: str
    """Between ranks, by torch.distributed; empty where there is none."""
    compiles: bool
    """Whether networks may be compiled there."""


BACKENDS = {
    "cuda": Backend("CUDA or ROCm", "nccl", compiles=True),
    "xpu": Backend("XPU", "xccl", compiles=True),
    "mps": Backend("MPS", "", compiles=False),  # its compiler is a prototype
    "cpu": Backend("CPU", "gloo", compiles=True),
}
"""By torch.device.type."""


def local_device() -> torch.device:
    """This rank's GPU, or the CPU: as Accelerate chooses, which for ranks on CPUs is told by the environment."""
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
        return torch.device("cpu")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        if module.is_available():
            return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")) % module.device_count())
    return torch.device("cpu")


def check_backend(config: TrainConfig, num_ranks: int) -> None:
    """Refuse what this rank's kind of device cannot do.

    Raises:
        StageError: several ranks without a collective between them, or compiling without a compiler or CUDA graphs.
    """
    backend = BACKENDS[local_device().type]
    has_collective = backend.collective != "xccl" or dist.is_xccl_available()
    if num_ranks > 1 and not (backend.collective and has_collective):
        raise StageError(
            f"{num_ranks} ranks were started, but this PyTorch has no collective for {backend.name};",
            "train on one device, without a launcher, or on the CPUs: export ACCELERATE_USE_CPU=true",
        )
    if config.compile == "graphs" and backend is not BACKENDS["cuda"]:
        raise StageError(
            f"train.compile: graphs are for CUDA, not for {backend.name};", "set train.compile auto, always or never"
        )
    if config.compile == "always" and not backend.compiles:
        raise StageError(f"train.compile: networks are not compiled on {backend.name};", "set train.compile auto")


def adopt_device_number() -> None:
    """Where this task sees one GPU of several, as under `srun --gpus-per-task=1`, let LOCAL_RANK be that GPU's number.

    Accelerate gives LOCAL_RANK to DDP and to barriers as the number of a device, and so does DeepSpeed to its engine.

    Raises:
        StageError: the task sees more than one, but fewer than its host has ranks.
    """
    device, rank = local_device(), int(os.environ.get("LOCAL_RANK", "0"))
    if device.index in (None, rank):
        return
    count = torch.get_device_module(device).device_count()
    if count > 1:
        raise StageError(
            f"this rank is number {rank} (from 0) on its host but sees {count} GPUs;",
            "start no more ranks than GPUs, and let each task see all of its node's or one of its own",
        )
    os.environ["LOCAL_RANK"] = str(device.index)


def device_id(device: torch.device) -> str:
    """What tells a GPU from the others of its host, whatever number a task sees it by."""
    return str(getattr(torch.get_device_module(device).get_device_properties(device), "uuid", device.index))


def device_name(device: torch.device) -> str:
    if device.type in ("cpu", "mps"):
        return device.type
    return str(torch.get_device_module(device).get_device_name(device))


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait for the device, for those who measure time."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """Inside, the CPU kernels use `count` threads, whatever the launcher chose: the last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def set_allocator(config: TrainConfig) -> None:
    """The allocator of `fast_train`, unless the user has set one; before any stage, since CUDA reads it once."""
    if config.fast_train and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = ALLOCATOR_SETTINGS


def apply_kernel_settings(config: TrainConfig) -> None:
    """Switch on or off: TF32 and cuDNN's search for the fastest kernels by `fast_train`, and deterministic kernels.

    TF32 has a flag for matrix products, which torch leaves off, and one for cuDNN's convolutions, which it leaves on.
    They are set on any hardware; before Ampere they change nothing. Torch 2.9 added `fp32_precision` beside them:
    reading these flags after that was set raises an error, and torch's compiler reads them, so it is not used.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.fast_train
    torch.backends.cudnn.benchmark = config.fast_train and not config.deterministic
    torch.backends.cudnn.deterministic = config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if config.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)


def compute_exactly(stage: str) -> torch.device:
    """This rank's device, for a stage that does not train: float32 is float32 there, whatever makes training fast.

    So features, and what is made of them, hang on the recipe's `extract` alone. On a GPU the log says what is set.
    """
    apply_kernel_settings(TrainConfig())
    device = local_device()
    if device.type != "cpu":
        logger.info("%s: %s", stage, settings_text(kernel_settings(device)))
    return device


def kernel_settings(device: torch.device) -> dict[str, Any]:
    """What this rank really has, read back."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    tf32 = "off"
    if any(flags):
        tf32 = "used" if has_tf32(device) else "not in this hardware"
    return {
        "tf32": tf32,
        "tf32 matmul": flags[0],
        "tf32 cudnn": flags[1],
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "allocator": allocator_settings(device),
        "torch": torch.__version__,
        "device": device_name(device),
    }


def settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def has_tf32(device: torch.device) -> bool:
    """Whether it computes in TF32 where the flags allow it. PyTorch asks AMD's libraries for it only when told to."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= MIN_BF16_CAPABILITY


def allocator_settings(device: torch.device) -> str:
    """What the device's allocator itself says that it has."""
    if device.type != "cuda":
        return "the system's"
    if (backend := torch.cuda.get_allocator_backend()) != "native":
        return backend
    has = torch.cuda.memory._snapshot()["allocator_settings"]
    text = has["PYTORCH_CUDA_ALLOC_CONF"] or "default"
    return text if has["expandable_segments"] == ("expandable_segments:True" in text) else f"{text} (not expandable)"


def lacking(precision: str, device: torch.device) -> str:
    """Why a GPU is not faster in `precision` than in float32, or cannot compute in it; empty where it is."""
    kind = device.type
    if precision == "fp32" or kind == "cpu":
        return ""
    name = device_name(device)
    if kind == "mps":
        has = precision == "fp16" or torch.backends.mps.is_macos_or_newer(14, 0)
        return "" if has else "macOS before 14 has no bf16 (PyTorch would go on in float32 without an error)"
    if kind == "xpu":
        has = precision == "fp16" or torch.xpu.is_bf16_supported(including_emulation=False)
        return "" if has else f"{name} has no bf16"
    if torch.version.hip is not None:  # whose capability counts AMD's architectures
        architecture = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        has = precision == "fp16" or architecture.startswith(AMD_WITH_BF16)
        return "" if has else f"{name} is of {architecture}, which has no instructions for bf16"
    capability = torch.cuda.get_device_capability(device)
    needed, family = {"bf16": (MIN_BF16_CAPABILITY, "Ampere"), "fp16": (MIN_FP16_CAPABILITY, "Volta")}[precision]
    if capability >= needed:
        return ""
    return (
        f"{name} has compute capability {capability[0]}.{capability[1]}; {precision} needs {needed[0]}.{needed[1]} "
        f"({family}) or newer and is slower than float32 below it"
    )


def check_precision(precision: str, device: torch.device) -> tuple[str, str] | None:
    """Refuse fp16 or bf16 where the hardware does not have it.

    Returns:
        Where it does, but another precision is better: what is the matter, and the remedy.

    Raises:
        StageError: the device is `lacking`.
    """
    if precision == "fp16" and device.type == "cpu":
        return "train.precision: fp16 on a CPU is for tests, and slower than fp32;", "set fp32 or bf16"
    if problem := lacking(precision, device):
        instead = "fp32" if lacking("fp16", device) else "fp16"
        raise StageError(
            f"train.precision: {problem}.",
            f"Set train.precision {instead} and train.bf16_adamw false; train.fast_train still helps",
        )
    if precision == "fp16" and not lacking("bf16", device):
        name = device_name(device)
        return f"train.precision: {name} has bf16, as fast as fp16 and without overflow;", "set bf16"
    return None
