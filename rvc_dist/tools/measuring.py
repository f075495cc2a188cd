"""A trainer whose steps can be measured: seconds and CPU-seconds by part, floating-point operations, memory, the wire.

Times are those of steps after which the host waits for the device, which training does only to log.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from rvc_dist import __version__
from rvc_dist.config import Recipe
from rvc_dist.models.discriminator import MultiPeriodDiscriminator
from rvc_dist.models.generator import Generator
from rvc_dist.runtime.accelerator import kernel_settings, synchronize
from rvc_dist.runtime.launcher import asks_for
from rvc_dist.tools.plain_step import PlainDiscriminator, PlainTrainer
from rvc_dist.train import losses
from rvc_dist.train.dataset import BUCKET_FRAMES, Batch
from rvc_dist.train.metrics import PhaseTimer
from rvc_dist.train.progress import kl_warmup
from rvc_dist.train.trainer import Trainer
from rvc_dist.workspace import StageError

PARTS = ("data", "g_forward", "d_step", "g_step")
"""Of a step, in their order; all but the first are the trainer's."""
PEAK_SIZE = 2048
"""Rows and columns of the matrices whose product is the measure of what a device can do."""
PEAK_REPEATS = 5


@dataclass
class Span:
    """A stretch of work of this process."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Seconds of all threads of this process, without loader processes."""


@contextmanager
def stopwatch(device: torch.device) -> Iterator[Span]:
    """The time of what is done inside, the device's part included; it is known at the end."""
    span = Span()
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    yield span
    synchronize(device)
    span.wall_s, span.cpu_s = time.perf_counter() - wall, time.process_time() - cpu


def _conv_backward_flops(
    grad_shape: list[int], x_shape: list[int], weight_shape: list[int], *others: Any, **_: Any
) -> int:
    """Each of the two gradients of a convolution takes as many operations as the convolution.

    torch's own formula (2.14) counts those of a grouped convolution's weights as if it had no groups, which makes the
    scale discriminator, with 256 groups, three times as much work as it is.
    """
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = others
    return conv_flop_count(x_shape, weight_shape, grad_shape, transposed) * int(sum(wanted[:2]))


def flop_counter() -> FlopCounterMode:
    """Counts multiplications and additions of convolutions and matrix products; no FFTs, no elementwise work."""
    formulas = {torch.ops.aten.convolution_backward: _conv_backward_flops}
    return FlopCounterMode(display=False, custom_mapping=formulas)


class PartTimer(PhaseTimer):
    """Besides seconds, the CPU-seconds of each part of a step and, while a counter is set, its operations."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.cpu_s: dict[str, float] = {}
        self.flops: dict[str, int] = {}
        self.counter: FlopCounterMode | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        flops = self.counter.get_total_flops() if self.counter else 0
        cpu = time.process_time()
        with super().phase(name):
            yield
        self.cpu_s[name] = self.cpu_s.get(name, 0.0) + time.process_time() - cpu
        if self.counter:
            self.flops[name] = self.flops.get(name, 0) + self.counter.get_total_flops() - flops

    def take(self) -> dict[str, Span]:
        """Of the one step since the last call."""
        cpu_s, self.cpu_s = self.cpu_s, {}
        return {name: Span(wall_s, cpu_s[name]) for name, wall_s in self.read().items()}


@dataclass
class Sample:
    """One measured step."""

    span: Span
    audio_s: float
    """Of real clips, over all ranks."""
    parts: dict[str, Span] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"audio_s": self.audio_s, **asdict(self.span), "parts": {k: asdict(v) for k, v in self.parts.items()}}


class MeasuredTrainer(Trainer):
    """The trainer itself, on a run folder that is only for measuring: nothing is saved, validated or logged."""

    def __init__(self, recipe: Recipe) -> None:
        """As Trainer's; StageError under DeepSpeed, whose sending cannot be left out for comparison."""
        if asks_for("DEEPSPEED"):
            raise StageError("steps are measured with DDP:", "launch with launch/multi_gpu.yaml, not with DeepSpeed")
        super().__init__(recipe)
        self.timer = self.step.timer = self.parts = PartTimer(self.device)

    def _prepare_run_folder(self) -> None:
        """No checkpoint will be written and no recipe kept."""

    @property
    def num_ranks(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def has_one_length(self) -> bool:
        """Every batch is padded to the same length."""
        return len(set((-(-self.loader.sampler.lengths // BUCKET_FRAMES)).tolist())) == 1

    def dealt(self, count: int) -> Iterator[Sample]:
        """The next steps of the run, with the batches that the sampler deals and the wait for them."""
        steps = self.loader.steps(self.progress)

        def next_batches() -> list[Batch]:
            with self.timer.phase("data"):
                return next(steps)

        for _ in range(count):
            yield self._sample(next_batches)
            self.progress = self.loader.advanced(self.progress)
        self.check_recent_steps()

    def repeated(self, batches: list[Batch], count: int) -> Iterator[Sample]:
        """Steps on the same batches again and again."""
        for _ in range(count):
            yield self._sample(lambda: batches)
        self.check_recent_steps()

    def _sample(self, next_batches: Callable[[], list[Batch]]) -> Sample:
        with stopwatch(self.device) as span:
            batches = next_batches()
            self.train_step(batches)
        return Sample(span, self.audio_s(batches), self.parts.take())

    def longest(self) -> list[Batch]:
        """This rank's part of a full global batch of the longest clips, repeated when there are fewer."""
        order = np.argsort(-self.loader.sampler.lengths, kind="stable")
        specs = self.loader.sampler.rank_batches(np.resize(order, self.loader.sampler.global_batch_size), epoch=0)
        return [batch.to(self.device) for batch in self.loader.dataset[specs]]

    def with_and_without_wire(self, batches: list[Batch], count: int) -> list[tuple[Span, Span]]:
        """Steps that average gradients over ranks and, in turn, steps that keep them: the ranks' weights part ways."""
        pairs = []
        for _ in range(1 + count):  # the first pair warms up
            spans = []
            for alone in (False, True):
                self.accelerator.wait_for_everyone()
                with stopwatch(self.device) as span, self.step.g.no_sync(alone), self.step.d.no_sync(alone):
                    self.train_step(batches)
                self.parts.take()
                spans.append(span)
            pairs.append((spans[0], spans[1]))
        self.recent.clear()
        return pairs[1:]

    def count_flops(self, batches: list[Batch]) -> dict[str, int]:
        """Operations of one step by part, as executed: with activation checkpointing, the second forward passes too.

        The step runs on this rank alone and eagerly, since the counter cannot look into compiled code.
        """
        parts = PartTimer(self.device)
        with flop_counter() as parts.counter:
            self.step.unwrapped(parts)(batches)
        return parts.flops

    def plain(self, precision: str) -> PlainTrainer:
        """The yardstick with weights like these, in `precision` fp32 or recipe; both begin without optimizer state."""
        generator = Generator(self.origin.shape).to(self.device)
        discriminator = MultiPeriodDiscriminator(self.recipe.model.version, self.recipe.model.discriminator_channels)
        discriminator.to(self.device)
        optimizers = []
        for network, copy in zip(self.networks.values(), (generator, discriminator), strict=True):
            copy.load_state_dict(network.module.state_dict())
            network.optimizer.state.clear()
            optim, rate = self.config.optim, network.optimizer.param_groups[0]["lr"]
            betas = (optim.beta1, optim.beta2)
            optimizers.append(torch.optim.AdamW(copy.parameters(), rate, betas, optim.eps, optim.weight_decay))
        return PlainTrainer(
            config=self.config,
            generator=generator,
            g=self.accelerator.prepare_model(generator),
            d=self.accelerator.prepare_model(PlainDiscriminator(discriminator)),
            optimizers=(optimizers[0], optimizers[1]),
            mel_loss=partial(losses.recipe_mel_loss, self.recipe),
            n_fft=self.recipe.rate_spec.n_fft,
            use_bf16=self.config.use_bf16 and precision == "recipe",
        )

    def against_plain(
        self, plain: PlainTrainer, batches: list[Batch], count: int
    ) -> tuple[list[tuple[Span, Span]], dict[str, tuple[float, float]]]:
        """Steps in turn with the yardstick's: the times, and the losses of the first two, which begin alike."""
        (batch,) = batches
        self.losses()
        pairs, compared = [], {}
        for i in range(count):
            with stopwatch(self.device) as mine:
                self.train_step(batches)
            with stopwatch(self.device) as its:
                values = plain.step(batch, kl_warmup(self.config, self.progress))
            pairs.append((mine, its))
            if i == 0:
                losses = self.losses()
                means = self.accelerator.reduce(torch.stack(list(values.values())), reduction="mean").tolist()
                compared = {name: (losses[name], mean) for name, mean in zip(values, means, strict=True)}
        self.parts.take()
        self.check_recent_steps()
        return pairs, compared

    def losses(self) -> dict[str, float]:
        """Losses and gradient norms of the steps since the last call, over all ranks; empty when none was finite."""
        return self.meter.read(self.accelerator)

    def follow(self, count: int) -> tuple[list[dict[str, float]], list[Span]]:
        """The losses and the times of the next `count` steps."""
        losses, spans, steps = [], [], self.loader.steps(self.progress)
        for _ in range(count):
            batches = next(steps)
            with stopwatch(self.device) as span:
                self.train_step(batches)
            losses.append(self.losses())
            spans.append(span)
            self.check_recent_steps()
            self.progress = self.loader.advanced(self.progress)
        return losses, spans

    def peak_memory(self) -> dict[str, int]:
        """Bytes: of a CUDA device since `forget_peak_memory`, of a CPU the process's largest resident set so far."""
        if self.device.type == "cuda":
            return {
                "allocated": torch.cuda.max_memory_allocated(self.device),
                "reserved": torch.cuda.max_memory_reserved(self.device),
            }
        unit = 1 if sys.platform == "darwin" else 1024
        return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}

    def forget_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_flops(self) -> dict[str, float]:
        """FLOP/s of a large matrix product, by precision: a second on CUDA, a CPU-second on a CPU."""
        types = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if self.config.use_bf16 else {})
        return {name: measured_peak(self.device, dtype) for name, dtype in types.items()}

    def key(self) -> dict[str, Any]:
        """What tells one result from another; plain data."""
        key = {
            "ranks": self.num_ranks,
            **recipe_key(self.recipe),
            "compiled": ", ".join(name for name, yes in self.compiled.items() if yes),
            "device": kernel_settings(self.device)["device"],
            "cpu": cpu_model(),
            "torch": torch.__version__,
        }
        # Launchers set fewer threads for several ranks; on a GPU that hardly matters, and results stay comparable.
        return key | ({"threads": torch.get_num_threads()} if self.device.type == "cpu" else {})

    def machine(self) -> dict[str, Any]:
        """What the numbers depend on besides the recipe."""
        return {
            **kernel_settings(self.device),
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cuda": torch.version.cuda if self.device.type == "cuda" else None,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "rvc_dist": __version__,
        }


def recipe_key(recipe: Recipe) -> dict[str, Any]:
    """The part of a result's key that the recipe decides."""
    config = recipe.train
    return {
        "batch_size": config.batch_size,
        "grad_accum_steps": config.grad_accum_steps,
        "precision": "bf16" if config.use_bf16 else "fp32",
        "optimizer": config.optimizer_name,
        "fast_train": config.fast_train,
        "compile": config.compile,
        "grad_compression": config.grad_compression,
        "activation_checkpointing": config.activation_checkpointing,
        "cache_on_device": config.cache_on_device,
        "multiscale_mel_loss": config.multiscale_mel_loss,
        "sample_rate": recipe.data.sample_rate,
        **asdict(recipe.model),
    }


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of PEAK_SIZE x PEAK_SIZE matrices, the median of several."""
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, device=device).to(dtype) for _ in range(2))
    # On a GPU a product takes microseconds: many of them, so that launching and waiting do not count.
    products = 100 if device.type == "cuda" else 1
    rates = []
    for _ in range(1 + PEAK_REPEATS):
        with stopwatch(device) as span:
            for _ in range(products):
                torch.mm(a, b)
        seconds = span.wall_s if device.type == "cuda" else span.cpu_s
        rates.append(products * 2 * prod(a.shape) * PEAK_SIZE / max(seconds, 1e-9))
    return statistics.median(rates[1:])


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
