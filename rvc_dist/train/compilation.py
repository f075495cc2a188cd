"""torch.compile of the networks, judged by a trial on the device at hand.

Of G the decoder is compiled: like D it sees slices of one length, and the two hold nine tenths of a step's operations.
G's encoders and its flow see clips of many lengths. What a compiler gains depends on the device: on GPUs it saves
launches and memory traffic, on some CPUs its convolutions are slower than eager ones. A choice is kept with the run, so
that a resumed run computes the same way.
"""

from __future__ import annotations

import importlib
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
from rvc_dist.models.generator import Generator, GeneratorOutput
from rvc_dist.models.modules import use_channels_last
from rvc_dist.runtime.device import device_name, synchronize
from rvc_dist.runtime.launcher import cores_of_rank

logger = logging.getLogger(__name__)

COMPILE_S = 60.0
"""What compiling one network takes at the least (90 s for D on two CPU cores)."""
LAYOUT_S, LAYOUT_SAVING = 12.0, 0.1
"""What cuDNN's search takes for the kernels of a network in another layout (10 to 25 s beside an H200), and the share
of a step's time that a layout saves there at the best but for chance (4%)."""
GRAPHS_S = 15.0
"""What it takes to trace one and to record it as CUDA graphs (15 s for D beside an H200)."""
BEST_SAVING = 0.5
"""Share of a step's time that compiled networks save at the best: 1.3 to 2 times faster, says the reference."""
WORTH_IT = 0.97
"""A network stays compiled when it brings a step to this share of its time or below."""
TIMED_STEPS = 3
FAILURES = (RuntimeError, OSError)
"""What torch.compile and its backends raise: torch's own errors are RuntimeErrors; a compiler that is missing or cannot
write is an OSError."""


GRAPH_MEMORY = "torch._inductor.cudagraph_trees"
"""Which part of torch decides when CUDA graphs may use memory again."""


class DecodingCompiled(nn.Module):
    """A generator whose training passes decode with `decoder`: its own, compiled, with the same parameters."""

    def __init__(self, generator: Generator, decoder: nn.Module) -> None:
        super().__init__()
        self.generator, self.decoder = generator, decoder

    def forward(self, *inputs: Any) -> GeneratorOutput:
        output: GeneratorOutput = self.generator(*inputs, decoder=self.decoder)
        return output


def compiled(module: nn.Module, device: torch.device, config: TrainConfig) -> nn.Module:
    """D compiled, or G with its decoder compiled, sharing the parameters; it compiles when it is first called.

    Each shape that it meets has a graph of its own: D's own pass has the real and the fake clips, G's have one of both.
    On CUDA they are CUDA graphs, as in the reference; `begin_step` says when their outputs may be overwritten.
    """
    if isinstance(module, Generator):
        return DecodingCompiled(module, compiled(module.dec, device, config))
    if device.type == "cuda":
        importlib.import_module(GRAPH_MEMORY)  # before the first step, which begin_step has to mark
    if records_graphs(config, device):
        recorded: nn.Module = torch.compile(module, dynamic=False, backend="cudagraphs")  # type: ignore[assignment]
        return recorded
    # Read when inductor is imported, which the first call here does: by default every rank would take all cores.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, cores_of_rank())))
    options: dict[str, Any] = {"triton.cudagraphs": device.type == "cuda"}
    if config.deterministic:
        options["deterministic"] = True
    result: nn.Module = torch.compile(module, dynamic=False, options=options)  # type: ignore[assignment]
    return result


def records_graphs(config: TrainConfig, device: torch.device) -> bool:
    """Whether "compiled" means PyTorch's own kernels, recorded as CUDA graphs.

    A GPU waits for the host three quarters of a step in half precision (H200, batch 4): launching is what costs. New
    kernels take minutes to generate, so they are for those who ask for them by `always`.
    """
    return device.type == "cuda" and config.compile != "always"


def begin_step() -> None:
    """Before each step: nobody reads the outputs of the compiled passes of earlier ones any more, nor their gradients.

    Within a step they stay: gradients lie in the memory of CUDA graphs too, and micro-batches add up in them. Until a
    first mark, torch takes every call of a compiled network for a new step.
    """
    if GRAPH_MEMORY in sys.modules:  # else there are none, and it would take a second to import
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def eager_unless(full: bool) -> AbstractContextManager[Any]:
    """Inside, compiled networks run eagerly for a batch that is not full.

    It would be one more graph for every number of clips, each for one step an epoch.
    """
    return nullcontext() if full else torch.compiler.set_stance("force_eager")


def asked_for(config: TrainConfig) -> bool:
    """Whether the recipe wants compiling to be tried at all.

    With `deterministic` nothing may depend on measured times: neither this choice, nor the compiler's of kernels.
    """
    always = config.compile == "always"
    wanted = always or config.compile == "graphs" or (config.compile == "auto" and config.fast_train)
    if config.deterministic and (config.compile == "auto" or (always and not compiles_deterministically())) and wanted:
        reason = "this torch's compiler" if always else "a trial (train.compile graphs or always needs none)"
        logger.info(f"compile: not with train.deterministic, since {reason} decides by measured times")
        return False
    return wanted


def compiles_deterministically() -> bool:
    """Whether this torch's compiler can choose kernels without measuring them."""
    from torch._inductor import config

    return hasattr(config, "deterministic")


def choose_layout(
    config: TrainConfig,
    accelerator: Accelerator,
    modules: Mapping[str, nn.Module],
    step: Callable[[], None],
    steps_left: int,
) -> dict[str, bool]:
    """Which of `modules` compute `channels_last` from here on: where a step is faster so, the same on all ranks.

    Tried on CUDA in half precision, whose matrix units read that layout; on a CPU the layers know by themselves.
    """
    layout = dict.fromkeys(modules, False)
    if accelerator.device.type != "cuda" or config.autocast_precision == "fp32" or config.deterministic:
        return layout
    seconds = _slowest(accelerator, _median_s(step, accelerator.device))
    if steps_left * seconds * LAYOUT_SAVING < LAYOUT_S * len(layout):
        return layout
    for name, module in modules.items():
        use_channels_last(module)
        with_it_s = _slowest(accelerator, _median_s(step, accelerator.device))
        layout[name] = with_it_s <= WORTH_IT * seconds
        use_channels_last(module, layout[name])
        how = "channels-last" if layout[name] else "not channels-last"
        logger.info(f"layout: the {name} is {how}: a step takes {with_it_s:.3f} s with it so, {seconds:.3f} s without")
        seconds = with_it_s if layout[name] else seconds
    return layout


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
    seconds = 0.0
    if config.compile == "auto":
        seconds = _slowest(accelerator, _median_s(lambda: step(eager), accelerator.device))
    best_s = steps_left * seconds * BEST_SAVING
    needed_s = len(names) * (GRAPHS_S if records_graphs(config, accelerator.device) else COMPILE_S)
    if config.compile == "auto" and best_s < needed_s:
        logger.info(
            f"compile: not for {steps_left} steps of {seconds:.2f} s, which it could shorten by {best_s:.0f} s in all; "
            f"compiling takes {needed_s:.0f} s"
        )
        return eager
    chosen = {name: _gains(config, accelerator, name, eager, step, seconds) for name in names}
    if accelerator.num_processes > 1:
        # Inside DDP networks are compiled in parts, so that gradients are sent while others are still computed:
        # training must not go on with the trial's, and a resumed run, which has no trial, has to compute the same way.
        torch.compiler.reset()
    return chosen


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
    if config.compile != "auto":
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
        "of": "layout, decoder, discriminator",
        "deterministic": config.deterministic,
        "device": device_name(device),
        "torch": torch.__version__,
        "precision": config.autocast_precision,
        "batch_size": config.batch_size,
        "compile": config.compile,
        "fast_train": config.fast_train,
        "total_steps": total_steps,
    }
