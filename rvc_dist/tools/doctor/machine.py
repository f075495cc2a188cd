"""Checks of the machines: versions, packages, GPUs, cores, precision."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.requirements import Requirement

from rvc_dist import __version__
from rvc_dist.choices import F0_METHODS, OPTIMIZERS
from rvc_dist.config import f0_method_names
from rvc_dist.data.decode import AV_SUFFIXES
from rvc_dist.features import index_file
from rvc_dist.runtime.accelerator import MIN_BF16_CAPABILITY, device_name
from rvc_dist.runtime.launcher import asks_for
from rvc_dist.tools.doctor.findings import Result, first_line, ranks_text
from rvc_dist.tools.doctor.team import Exam
from rvc_dist.workspace import StageError

CROWDED = 0.1
"""Share of a GPU's memory that others may hold before it is told."""

PACKAGES = ("torch", "torchaudio", "accelerate", "transformers", "numpy", "safetensors")
"""Whose versions are told; a faiss comes under one of several names."""
FAISS = ("faiss-cpu", "faiss-gpu-cu12", "faiss-gpu-cu11", "faiss-gpu", "faiss")


def check_versions(exam: Exam, result: Result) -> None:
    """Every rank has the same versions, new enough, and a torch that fits the driver."""
    del exam
    result.same |= {"rvc_dist": __version__, "python": platform.python_version()}
    packages = (*PACKAGES, "deepspeed") if asks_for("DEEPSPEED") else PACKAGES
    result.same |= {name: found for name in packages if (found := installed(name))}
    faiss = [f"{name} {found}" for name in FAISS if (found := installed(name))]
    if faiss:
        result.same["index"] = " and ".join(faiss)
    if len(faiss) > 1:
        result.warn(f"{' and '.join(faiss)} bring the same module", "pip uninstall all of them, then install one")
    cuda = torch.version.cuda
    driver = Path("/proc/driver/nvidia/version").is_file()
    result.same |= {"torch is built for": f"CUDA {cuda}" if cuda else "CPU", "NVIDIA driver": "yes" if driver else "no"}
    torch_and_driver(cuda, driver, torch.cuda.is_available(), result)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a checkout on the path, without metadata
        outdated(importlib.metadata.requires("rvc-dist") or [], installed, result)


def installed(package: str) -> str:
    """The version of an installed package, or an empty text."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def torch_and_driver(cuda: str | None, driver: bool, works: bool, result: Result) -> None:
    """`cuda` is the version that torch is built for, `driver` whether the machine has NVIDIA's, `works` if they do."""
    if driver and cuda is None:
        result.warn(
            "this machine has an NVIDIA driver, but torch is built for CPUs alone",
            "pip install torch --index-url https://download.pytorch.org/whl/cu126 (the CUDA version that nvidia-smi "
            "shows, or an older one)",
        )
    elif driver and not works:
        result.fail(
            f"torch is built for CUDA {cuda} and cannot use this machine's GPUs",
            f"see nvidia-smi: its CUDA version must be at least {cuda} (else update the driver, or install a torch "
            "that is built for an older CUDA), and CUDA_VISIBLE_DEVICES must not be empty",
        )


def outdated(requirements: Sequence[str], version_of: Callable[[str], str], result: Result) -> None:
    """What rvc_dist itself requires, as its metadata say."""
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = version_of(requirement.name)
        if not requirement.specifier.contains(found, prereleases=True) if found else True:
            result.fail(
                f"{requirement.name} {found or 'is not installed'}; rvc_dist needs {requirement}",
                f"pip install '{requirement}'",
            )


def check_packages(exam: Exam, result: Result) -> None:
    """The optional packages that this recipe needs can be imported."""
    wanted = wanted_packages(exam)
    for module, (package, reason) in wanted.items():
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            message = f"{reason} needs the package {package}, which cannot be imported ({first_line(error)})"
            remedy = f"pip install {package}"
            done = exam.data_stages_done and (module != "faiss" or index_file.complete(exam.recipe) is True)
            if reason.startswith("train.") or not done:
                result.fail(message, remedy)
            else:
                result.warn(f"{message}; the data stages are done without it", remedy)
    result.same["needed"] = ", ".join(package for package, _ in wanted.values())


def wanted_packages(exam: Exam) -> dict[str, tuple[str, str]]:
    """Module -> (package, what of the recipe needs it)."""
    recipe = exam.recipe
    wanted = {"faiss": ("faiss-gpu-cu12" if torch.cuda.is_available() else "faiss-cpu", "the index stage")}
    chosen = {f"train.optimizer {recipe.train.optimizer_name}": OPTIMIZERS[recipe.train.optimizer_name].package}
    for name in f0_method_names(recipe.extract.f0_method):
        chosen[f"extract.f0_method {name}"] = F0_METHODS[name].package
    wanted |= {package.module: (package.name, reason) for reason, package in chosen.items() if package}
    if recipe.preprocess.clean_dataset:
        wanted["noisereduce"] = "noisereduce", "preprocess.clean_dataset"
    if Path(recipe.data.audio_dir).is_dir():
        with contextlib.suppress(StageError):  # the data check tells it
            names = (Path(f.path) for f in exam.sources if not f.reason)
            if av_file := next((n for n in names if n.suffix.lower() in AV_SUFFIXES), None):
                wanted["av"] = "av", f"{av_file.name} in data.audio_dir"
    return wanted


class Seat(NamedTuple):
    """Where a rank computes."""

    host: str
    gpu: str
    """Unique id of its GPU; empty on a CPU."""
    num_threads: int
    cores: frozenset[int]
    """Of its host, those that this rank may use."""


def check_devices(exam: Exam, result: Result) -> None:
    """Every rank has a device of its own, with its memory free, and no more threads than cores."""
    team = exam.team
    on_cuda = team.device.type == "cuda"
    cores = frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
    gpu = ""
    result.same["device"] = device_name(team.device)
    result.own |= {"host": socket.gethostname(), "cores": str(len(cores)), "threads": str(torch.get_num_threads())}
    if on_cuda:
        gpu = str(getattr(torch.cuda.get_device_properties(team.device), "uuid", team.device.index))
        free, total = torch.cuda.mem_get_info(team.device)
        result.own["GPU"] = f"{team.device.index} of {torch.cuda.device_count()}"
        result.measured |= {"memory": (total / 1e9, "GB"), "free": (free / 1e9, "GB")}
        crowded_gpu(total, total - free - torch.cuda.memory_reserved(team.device), result)
    seats = team.gather(Seat(socket.gethostname(), gpu, torch.get_num_threads(), cores))
    if team.is_first:
        shared_seats(seats, result)


def crowded_gpu(total: int, taken: int, result: Result) -> None:
    """`taken` are the bytes of a GPU's `total` that this process did not take."""
    if taken > CROWDED * total:
        result.warn(
            f"{taken / 1e9:.1f} of the GPU's {total / 1e9:.1f} GB are taken by others",
            "end the other processes that nvidia-smi shows, or ask for GPUs of your own",
        )


def shared_seats(seats: Sequence[Seat], result: Result) -> None:
    """Ranks that have one GPU between them, and hosts with more threads than cores."""
    by_gpu: dict[tuple[str, str], list[int]] = {}
    by_host: dict[str, list[Seat]] = {}
    for rank, seat in enumerate(seats):
        by_host.setdefault(seat.host, []).append(seat)
        if seat.gpu:
            by_gpu.setdefault((seat.host, seat.gpu), []).append(rank)
    for (host, gpu), ranks in by_gpu.items():
        if len(ranks) > 1:
            result.fail(
                f"ranks {ranks_text(ranks)} compute on the same GPU ({gpu} of {host})",
                "one rank a GPU: start fewer ranks there, or unset CUDA_VISIBLE_DEVICES so that LOCAL_RANK counts them",
            )
    for host, theirs in by_host.items():
        threads, cores = sum(s.num_threads for s in theirs), len(frozenset().union(*(s.cores for s in theirs)))
        if threads > cores:
            result.warn(
                f"{host}: {len(theirs)} rank(s) have {threads} threads for {cores} core(s)",
                f"export OMP_NUM_THREADS={max(1, cores // len(theirs))}, or ask for more cores (srun --cpus-per-task)",
            )


def check_precision(exam: Exam, result: Result) -> None:
    """What the recipe asks for can be had: bf16 and TF32 need Ampere or newer."""
    device, train = exam.team.device, exam.recipe.train
    result.same["recipe"] = ("bf16" if train.use_bf16 else "fp32") + (", fast_train" if train.fast_train else "")
    if device.type != "cuda":
        result.same["bf16"] = "yes, on the CPU"
        return
    capability = torch.cuda.get_device_capability(device)
    result.same["compute capability"] = ".".join(map(str, capability))
    judge_precision(torch.cuda.get_device_name(device), capability, train.use_bf16, train.fast_train, result)


def judge_precision(name: str, capability: tuple[int, int], use_bf16: bool, fast: bool, result: Result) -> None:
    """`fast` is train.fast_train, which uses TF32 where there is any."""
    capable = capability >= MIN_BF16_CAPABILITY
    result.same["bf16"] = "yes" if capable else "no"
    result.same["TF32"] = ("used" if fast else "off without train.fast_train") if capable else "no"
    if use_bf16 and not capable:
        result.fail(
            f"the recipe asks for bf16, which {name} (compute capability {capability[0]}.{capability[1]}) has not: "
            "it needs 8.0 (Ampere) or newer",
            "set train.precision fp32 and train.bf16_adamw false (configs/t4.yaml); train.fast_train still helps",
        )
