"""What the launcher asked for, and the settings of DeepSpeed that the recipe completes."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rvc_dist.choices import DEEPSPEED, OPTIMIZERS
from rvc_dist.config import TrainConfig
from rvc_dist.workspace import StageError

if TYPE_CHECKING:  # `status` counts ranks too, and waits for no torch
    from accelerate import Accelerator

ZERO_STAGES = (1, 2)
LOST_AFTER, LEAST_LOST_S = "RVC_DIST_LOST_AFTER_S", 3.0
"""The variable by which a launcher says it: `rvc-dist launch --nodes FEWEST:MOST` does."""
BUCKET_ELEMENTS = 1 << 23
"""Gradients sent at a time (32 MiB); DeepSpeed's own default would reserve two gigabytes a network."""


def local_ranks() -> int:
    """Ranks of this job on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def world_size() -> int:
    """Ranks of this job that its launcher asked for."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_among_nodes() -> bool:
    """Whether this rank's launcher is one of several, on as many nodes, that meet again when ranks of one end."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1


def lost_after_s() -> float:
    """After how many seconds without an answer a machine is taken for lost; 0 where only train.timeout_s says so.

    Raises:
        StageError: the variable is no number of seconds.
    """
    text = os.environ.get(LOST_AFTER, "0")
    seconds = float(text) if re.fullmatch(r"\d{1,5}(\.\d{1,3})?", text) else -1.0
    if seconds != 0 and seconds < LEAST_LOST_S:
        raise StageError(f"{LOST_AFTER}: got {text!r}, expected seconds of at least {LEAST_LOST_S:g}, or 0 for none")
    return seconds


def usable_cores(pid: int = 0) -> frozenset[int]:
    """The cores of this host that a process may use, by default this one."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return frozenset(os.sched_getaffinity(pid))
    return frozenset(range(os.cpu_count() or 1))


def cores_of_rank() -> int:
    """How many cores this rank has for itself: those that it may use, over the ranks that share them.

    Ranks of torchrun may use all that their launcher may; srun and NUMA binding give each rank a part of those.
    """
    mine, launchers = len(usable_cores()), len(usable_cores(os.getppid()))
    sharing = math.ceil(local_ranks() * min(1.0, mine / launchers))
    return max(1, mine // sharing)


def asks_for(kind: str) -> bool:
    """The launcher's file says `distributed_type: KIND`, such as DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() in ("true", "1")


def zero_stage(accelerator: Accelerator) -> int:
    """1 or 2; 0 without DeepSpeed."""
    if not asks_for("DEEPSPEED"):
        return 0
    return int(accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"])


def check_deepspeed(config: TrainConfig) -> None:
    """Prepare for DeepSpeed, whose launcher files this one accepts.

    Raises:
        StageError: it is not installed, the optimizer looks at more than one number at a time, or the recipe asks for
            fp16.
    """
    import torch

    if importlib.util.find_spec("deepspeed") is None:
        raise StageError(*DEEPSPEED.missing("this launcher's configuration"))
    if config.autocast_precision == "fp16":
        raise StageError(
            "train.precision: fp16 with DeepSpeed, which would skip steps by a loss scale that is in no checkpoint;",
            "launch with launch/multi_gpu.yaml, or set fp32 or bf16",
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of the autocast that is cared for below
    warnings.filterwarnings("ignore", ".*torch.distributed.*deprecated", FutureWarning)  # DeepSpeed's own calls
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Its own collectives for CPUs are compiled when first used; gloo needs no compiler.
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    if not OPTIMIZERS[config.optimizer_name].elementwise:
        usable = ", ".join(sorted(name for name, spec in OPTIMIZERS.items() if spec.elementwise))
        raise StageError(
            f"train.optimizer: {config.optimizer_name} looks at whole parameters, of which ZeRO cuts some in two;",
            f"with DeepSpeed choose one of {usable}, or launch with launch/multi_gpu.yaml",
        )


def fill_deepspeed_settings(accelerator: Accelerator, config: TrainConfig) -> None:
    """Complete the launcher's DeepSpeed settings from the recipe.

    Raises:
        StageError: they ask for what this program does not do, or contradict the recipe; everything is listed.
    """
    settings: dict[str, Any] = accelerator.state.deepspeed_plugin.deepspeed_config
    zero: dict[str, Any] = settings["zero_optimization"]
    if problems := _unsupported(zero) + _contradictions(settings, config):
        raise StageError("the launcher's DeepSpeed settings do not fit:", listed="".join(f"\n  {p}" for p in problems))
    for key in ("train_batch_size", "fp16", "bf16"):
        settings.pop(key, None)
    settings["train_micro_batch_size_per_gpu"] = config.batch_size
    settings["gradient_clipping"] = config.max_grad_norm or 0.0
    # The trainer scales its losses, and says itself which pass is the last of a step.
    settings["gradient_accumulation_steps"] = 1
    if config.grad_compression == "bf16":
        settings["communication_data_type"] = "bf16"
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        if zero.get(key, "auto") == "auto":
            zero[key] = BUCKET_ELEMENTS


def _unsupported(zero: Mapping[str, Any]) -> list[str]:
    problems = []
    if zero.get("stage") not in ZERO_STAGES:
        problems.append(f"zero stage {zero.get('stage')}: use 1 or 2, or launch/multi_gpu.yaml")
    for key in ("offload_optimizer", "offload_param"):
        device = (zero.get(key) or {}).get("device", "none")
        if device != "none":
            problems.append(f"{key} to {device}: a network and its optimizer stay on one device; leave it out")
    if zero.get("round_robin_gradients"):
        problems.append("round_robin_gradients: parameters stay in their order; leave it out")
    return problems


def _contradictions(settings: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """What the recipe decides, and the settings decide otherwise."""
    numbers = {
        "train_micro_batch_size_per_gpu": ("train.batch_size", (config.batch_size,)),
        "gradient_clipping": ("train.max_grad_norm", (config.max_grad_norm or 0.0,)),
        "gradient_accumulation_steps": ("train.grad_accum_steps", (1, config.grad_accum_steps)),
    }
    problems = [
        f"{key} {settings[key]}: the recipe's {name} is {same[-1]}; leave it out"
        for key, (name, same) in numbers.items()
        if settings.get(key, "auto") not in ("auto", *same)
    ]
    for key in ("fp16", "bf16", "torch_autocast", "amp"):
        if settings.get(key, {}).get("enabled") is True:
            problems.append(f"{key}: the recipe's train.precision decides; leave it out")
    for key, name in (("optimizer", "train.optimizer"), ("scheduler", "train.lr_schedule")):
        if key in settings:
            problems.append(f"{key}: the recipe's {name} decides; leave it out")
    return problems
