"""Checks of the machines: versions, packages, GPUs, cores, precision."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import platform
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.requirements import Requirement

from rvc_dist import __version__
from rvc_dist.choices import F0_METHODS, OPTIMIZERS, TRACKERS
from rvc_dist.config import f0_method_names
from rvc_dist.data.decode import AV_SUFFIXES
from rvc_dist.data.sources import is_corpus
from rvc_dist.features import index_file
from rvc_dist.features.hub import make_torchaudio_importable
from rvc_dist.runtime import device as devices
from rvc_dist.runtime.device import device_name
from rvc_dist.runtime.launcher import asks_for, usable_cores
from rvc_dist.tools.doctor.findings import Fact, Findings, error, first_line, ranks_text, same, warning
from rvc_dist.tools.doctor.ranks import DoctorContext
from rvc_dist.workspace import StageError

CROWDED = 0.1
"""Share of a GPU's memory that others may hold before it is reported."""

PACKAGES = ("torch", "torchaudio", "accelerate", "transformers", "numpy", "safetensors")
"""Whose versions are shown; a faiss comes under one of several names."""
FAISS = ("faiss-cpu", "faiss-gpu-cu12", "faiss-gpu-cu11", "faiss-gpu", "faiss")


def check_versions(context: DoctorContext) -> Findings:
    """Every rank has the same versions, new enough, and a torch that fits the driver."""
    del context
    packages = (*PACKAGES, "deepspeed") if asks_for("DEEPSPEED") else PACKAGES
    yield from same({"rvc_dist": __version__, "python": platform.python_version()})
    yield from same({name: found for name in packages if (found := installed(name))})
    if faiss := [f"{name} {found}" for name in FAISS if (found := installed(name))]:
        yield from same({"index": " and ".join(faiss)})
    if len(faiss) > 1:
        yield warning(f"{' and '.join(faiss)} bring the same module", "pip uninstall all of them, then install one")
    cuda, driver = torch.version.cuda, Path("/proc/driver/nvidia/version").is_file()
    built_for = f"CUDA {cuda}" if cuda else "CPU"
    yield from same({"torch is built for": built_for, "NVIDIA driver": "yes" if driver else "no"})
    yield from torch_and_driver(cuda, driver, torch.cuda.is_available())
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a checkout on the path, without metadata
        yield from outdated(importlib.metadata.requires("rvc-dist") or [], installed)


def installed(package: str) -> str:
    """The version of an installed package, or an empty text."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def torch_and_driver(cuda: str | None, driver: bool, works: bool) -> Findings:
    """`cuda` is the version that torch is built for, `driver` whether the machine has NVIDIA's, `works` if they do."""
    if driver and cuda is None:
        yield warning(
            "this machine has an NVIDIA driver, but torch is built for CPUs alone",
            "pip install torch --index-url https://download.pytorch.org/whl/cu126 (the CUDA version that nvidia-smi "
            "shows, or an older one)",
        )
    elif driver and not works:
        yield error(
            f"torch is built for CUDA {cuda} and cannot use this machine's GPUs",
            f"see nvidia-smi: its CUDA version must be at least {cuda} (else update the driver, or install a torch "
            "that is built for an older CUDA), and CUDA_VISIBLE_DEVICES must not be empty",
        )


def outdated(requirements: Sequence[str], version_of: Callable[[str], str]) -> Findings:
    """What rvc_dist itself requires, as its metadata say."""
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = version_of(requirement.name)
        if not found or not requirement.specifier.contains(found, prereleases=True):
            yield error(
                f"{requirement.name} {found or 'is not installed'}; rvc_dist needs {requirement}",
                f"pip install '{requirement}'",
            )


def check_packages(context: DoctorContext) -> Findings:
    """The optional packages that this recipe needs can be imported."""
    wanted = wanted_packages(context)
    make_torchaudio_importable()
    for module, (package, reason) in wanted.items():
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as failed:
            what = f"{reason} needs the package {package}, which cannot be imported ({first_line(failed)})"
            done = context.data_stages_done and (module != "faiss" or index_file.complete(context.recipe) is True)
            if reason.startswith("train.") or not done:
                yield error(what, f"pip install {package}")
            else:
                yield warning(f"{what}; the data stages are done without it", f"pip install {package}")
    yield from same({"needed": ", ".join(package for package, _ in wanted.values())})


def wanted_packages(context: DoctorContext) -> dict[str, tuple[str, str]]:
    """Module -> (package, what of the recipe needs it)."""
    recipe = context.recipe
    wanted = {"faiss": ("faiss-gpu-cu12" if torch.cuda.is_available() else "faiss-cpu", "the index stage")}
    chosen = {f"train.optimizer {recipe.train.optimizer_name}": OPTIMIZERS[recipe.train.optimizer_name].package}
    for name in f0_method_names(recipe.extract.f0_method):
        chosen[f"extract.f0_method {name}"] = F0_METHODS[name].package
    others = [name for name in recipe.train.tracker_names if name != "tensorboard"]  # which the main job needs
    chosen |= {f"train.trackers {name}": TRACKERS[name] for name in others}
    wanted |= {package.module: (package.name, reason) for reason, package in chosen.items() if package}
    if recipe.preprocess.clean_dataset:
        wanted["noisereduce"] = "noisereduce", "preprocess.clean_dataset"
    if is_corpus(Path(recipe.data.audio_dir)):
        with contextlib.suppress(StageError):  # the data check reports it
            names = (Path(f.path) for f in context.sources if not f.reason)
            if av_file := next((n for n in names if n.suffix.lower() in AV_SUFFIXES), None):
                wanted["av"] = "av", f"{av_file.name} in data.audio_dir"
    return wanted


class RankPlacement(NamedTuple):
    """Where a rank computes."""

    host: str
    gpu: str
    """Unique id of its GPU; empty on a CPU."""
    num_threads: int
    cores: frozenset[int]
    """Of its host, those that this rank may use."""


def check_devices(context: DoctorContext) -> Findings:
    """Every rank has a device of its own, with its memory free, and no more threads than cores."""
    device, host, threads, gpu = context.group.device, socket.gethostname(), torch.get_num_threads(), ""
    cores = usable_cores()
    yield from same({"device": device_name(device)})
    yield from (Fact("host", host), Fact("cores", str(len(cores))), Fact("threads", str(threads)))
    if device.type == "cuda":
        gpu = devices.device_id(device)
        free, total = torch.cuda.mem_get_info(device)
        yield Fact("GPU", f"{device.index} of {torch.cuda.device_count()}")
        yield from (Fact("memory", total / 1e9, "GB"), Fact("free", free / 1e9, "GB"))
        yield from crowded_gpu(total, total - free - torch.cuda.memory_reserved(device))
    placements = context.group.gather(RankPlacement(host, gpu, threads, cores))
    if context.group.is_first:
        yield from shared_placements(placements)


def crowded_gpu(total: int, taken: int) -> Findings:
    """`taken` are the bytes of a GPU's `total` that this process did not take."""
    if taken > CROWDED * total:
        yield warning(
            f"{taken / 1e9:.1f} of the GPU's {total / 1e9:.1f} GB are taken by others",
            "end the other processes that nvidia-smi shows, or ask for GPUs of your own",
        )


def shared_placements(placements: Sequence[RankPlacement]) -> Findings:
    """Ranks that have one GPU between them, and hosts with more threads than cores."""
    by_gpu: dict[tuple[str, str], list[int]] = {}
    by_host: dict[str, list[RankPlacement]] = {}
    for rank, placement in enumerate(placements):
        by_host.setdefault(placement.host, []).append(placement)
        if placement.gpu:
            by_gpu.setdefault((placement.host, placement.gpu), []).append(rank)
    for (host, gpu), ranks in by_gpu.items():
        if len(ranks) > 1:
            yield error(
                f"ranks {ranks_text(ranks)} compute on the same GPU ({gpu} of {host})",
                "start one rank a GPU there, and let each task see all of its node's GPUs or one of its own",
            )
    for host, theirs in by_host.items():
        threads, cores = sum(p.num_threads for p in theirs), len(frozenset().union(*(p.cores for p in theirs)))
        if threads > cores:
            yield warning(
                f"{host}: {len(theirs)} rank(s) have {threads} threads for {cores} core(s)",
                f"export OMP_NUM_THREADS={max(1, cores // len(theirs))}, or ask for more cores (srun --cpus-per-task)",
            )


def check_precision(context: DoctorContext) -> Findings:
    """What the recipe asks for can be had on this device: bf16, fp16, and TF32 (of train.fast_train)."""
    device, train = context.group.device, context.recipe.train
    yield from same({"recipe": train.autocast_precision + (", fast_train" if train.fast_train else "")})
    if device.type == "cpu":
        yield from same({"bf16": "yes, on the CPU"})
    else:
        tf32 = "used" if train.fast_train else "off without train.fast_train"
        yield from same({p: "no" if devices.lacking(p, device) else "yes" for p in ("bf16", "fp16")})
        yield from same({"TF32": tf32 if devices.has_tf32(device) else "no"})
    if device.type == "cuda":
        yield from same({"compute capability": ".".join(map(str, torch.cuda.get_device_capability(device)))})
    if advice := devices.check_precision(train.autocast_precision, device):
        yield warning(*advice)
