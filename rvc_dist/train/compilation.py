"""torch.compile of the networks, judged by a trial on the device at hand.

What a compiler gains depends on the device: on GPUs it saves launches and memory traffic, on some CPUs its convolutions
are slower than eager ones. A choice is kept with the run, so that a resumed run computes the same way.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from rvc_dist.config import TrainConfig
from rvc_dist.runtime.device import device_name, synchronize
from rvc_dist.runtime.launcher import cores_of_rank

logger = logging.getLogger(__name__)

COMPILE_S = 60.0
"""What compiling one network takes at the least (90 s for D on two CPU cores, about as long for G on a GPU)."""
BEST_SAVING = 0.5
"""Share of a step's time that compiled networks save at the best: 1.3 to 2 times faster, says the reference."""
WORTH_IT = 0.97
"""A network stays compiled when it brings a step to this share of its time or below."""
TIMED_STEPS = 3
FAILURES = (RuntimeError, OSError)
"""What torch.compile and its backends raise: torch's own errors are RuntimeErrors; a compiler that is missing or cannot
write is an OSError."""


def compiled(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` compiled, sharing its parameters; it compiles when it is first called.

    On CUDA with CUDA graphs, as in the reference: `begin_pass` says when their outputs may be overwritten. A second
    length of clips makes one more graph, for all lengths.
    """
    # Read when inductor is imported, which the first call here does: by default every rank would take all cores.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, cores_of_rank())))
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    result: nn.Module = torch.compile(module, mode=mode)  # type: ignore[assignment]
    return result


def begin_pass() -> None:
    """Before each pass through G: nobody reads the outputs of earlier compiled passes any more."""
    if "torch._inductor.cudagraph_trees" in sys.modules:  # else there are none, and it would take a second to import
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def eager_unless(full: bool) -> AbstractContextManager[Any]:
    """Inside, compiled networks run eagerly for a batch that is not full.

    It would be one more graph for every number of clips, each for one step an epoch.
    """
    return nullcontext() if full else torch.compiler.set_stance("force_eager")


def asked_for(config: TrainConfig) -> bool:
    """Whether the recipe wants compiling to be tried at all."""
    return config.compile == "always" or (config.compile == "auto" and config.fast_train)


def choose(
    config: TrainConfig,
    accelerator: Accelerator,
    names: tuple[str, ...],
    step: Callable[[Mapping[str, bool]], None],
    steps_left: int,
) -> dict[str, bool]:
    """Which of `names` to compile, the same on all ranks; a line of the log says why.

    `step` does what a training step does, but for updates and communication, with the networks compiled that it is
    told to.
    """
    eager = dict.fromkeys(names, False)
    if not asked_for(config):
        return eager
    seconds = 0.0
    if config.compile == "auto":
        seconds = _slowest(accelerator, _median_s(lambda: step(eager), accelerator.device))
    best_s = steps_left * seconds * BEST_SAVING
    if config.compile == "auto" and best_s < COMPILE_S * len(names):
        logger.info(
            f"compile: not for {steps_left} steps of {seconds:.2f} s, which it could shorten by {best_s:.0f} s in all; "
            f"compiling takes {COMPILE_S * len(names):.0f} s"
        )
        return eager
    return {name: _gains(config, accelerator, name, eager, step, seconds) for name in names}


def _gains(
    config: TrainConfig,
    accelerator: Accelerator,
    name: str,
    eager: Mapping[str, bool],
    step: Callable[[Mapping[str, bool]], None],
    eager_s: float,
) -> bool:
    began_at = time.monotonic()
    try:
        compiled_s = _median_s(lambda: step({**eager, name: True}), accelerator.device)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        reason = textwrap.shorten(str(error).split("\n\n")[0], 300) or "no reason given"
        kind = type(error).__name__
        logger.warning(f"compile: the {name} stays eager, since compiling failed: {kind}: {reason}")
        compiled_s = float("inf")
    compiled_s = _slowest(accelerator, compiled_s)
    if compiled_s == float("inf"):
        return False
    spent_s = time.monotonic() - began_at - TIMED_STEPS * compiled_s
    if config.compile == "always":
        logger.info("compile: the %s is compiled (%.0f s)", name, spent_s)
        return True
    gains = compiled_s <= WORTH_IT * eager_s
    chosen = "compiled" if gains else "not compiled"
    logger.info(
        f"compile: the {name} is {chosen}: a step takes {compiled_s:.3f} s with it compiled, {eager_s:.3f} s without "
        f"({spent_s:.0f} s to compile)"
    )
    return gains


def _median_s(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a step, the first one not counted."""
    seconds = []
    for _ in range(1 + TIMED_STEPS):
        synchronize(device)
        began_at = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - began_at)
    return statistics.median(seconds[1:])


def _slowest(accelerator: Accelerator, seconds: float) -> float:
    """Of all ranks, which then decide alike."""
    return float(accelerator.gather(torch.tensor([seconds], device=accelerator.device)).max())


def key(config: TrainConfig, device: torch.device, total_steps: int) -> dict[str, Any]:
    """What a choice depends on: with another device, torch, precision or plan it is made anew."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "precision": config.autocast_precision,
        "batch_size": config.batch_size,
        "compile": config.compile,
        "fast_train": config.fast_train,
        "total_steps": total_steps,
    }
