"""The steps of a run, measured: seconds and CPU-seconds by part, floating-point operations, memory, the wire.

Times are those of steps after which the host waits for the device, which training does only to log.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from rvc_dist import __version__
from rvc_dist.config import Recipe
from rvc_dist.models.discriminator import MultiPeriodDiscriminator
from rvc_dist.models.generator import Generator
from rvc_dist.runtime.accelerator import check_own_device, check_same_settings, make_accelerator
from rvc_dist.runtime.device import cpu_model, kernel_settings, synchronize
from rvc_dist.runtime.heartbeat import Heartbeat
from rvc_dist.runtime.launcher import asks_for
from rvc_dist.tools.plain_step import PlainDiscriminator, PlainTrainer
from rvc_dist.train import bad_steps, memory, setup
from rvc_dist.train.bad_steps import RecentStep
from rvc_dist.train.clips import ClipList
from rvc_dist.train.dataset import Batch
from rvc_dist.train.loader import StepLoader
from rvc_dist.train.losses import wanted
from rvc_dist.train.metrics import Meter, PhaseTimer
from rvc_dist.train.progress import kl_warmup
from rvc_dist.train.sampler import BUCKET_FRAMES
from rvc_dist.train.step import GanStep, StepResult
from rvc_dist.train.trainer import take_step
from rvc_dist.workspace import StageError, Workspace

PARTS = ("data", "g_forward", "d_step", "g_step")
"""Of a step, in their order; all but the first are the trainer's."""
MADE_UP = "random"
"""The embedder of clips that are there for measuring alone: an epoch repeats them."""
NUM_GLOBAL_BATCHES = 4
"""Of such an epoch, at least."""


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
    parts: dict[str, Span]
    losses: dict[str, float]
    """And gradient norms, over all ranks; empty when they were not finite."""

    def to_dict(self) -> dict[str, Any]:
        return {"audio_s": self.audio_s, **asdict(self.span), "parts": {k: asdict(v) for k, v in self.parts.items()}}


class MeasuredRun:
    """The steps that training would begin with, on the ranks that the launcher started; nothing of them is kept.

    The recipe's run folder holds features, and is there for measuring only.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Raises: StageError: as training does, and under DeepSpeed, whose sending cannot be left out to compare."""
        if asks_for("DEEPSPEED"):
            raise StageError("steps are measured with DDP:", "launch with launch/multi_gpu.yaml, not with DeepSpeed")
        self.recipe, self.config = recipe, recipe.train
        self.work = Workspace(recipe.run_dir, recipe.name)
        self.table = setup.load_clips(recipe, self.work)
        self.accelerator = accelerator = make_accelerator(self.config)
        check_own_device(accelerator.device)
        self.device, self.num_ranks = accelerator.device, int(accelerator.num_processes)
        if self.table.embedder["name"] == MADE_UP:  # a large global batch needs many clips, but no different ones
            clips, whole = self.table.train, self.config.global_batch(self.num_ranks)
            num_batches = max(NUM_GLOBAL_BATCHES, -(-len(clips) // whole))
            self.table = replace(self.table, train=ClipList.of(clips).take(np.arange(num_batches * whole) % len(clips)))
        if accelerator.is_main_process:
            setup.report_holdout(recipe, self.table)
        origin, _ = setup.find_origin(recipe, accelerator, self.work, self.table)
        self.progress, self.shape = origin.progress, origin.shape
        heartbeat = Heartbeat()
        self.loader = StepLoader(recipe, self.table, accelerator, heartbeat, self.progress, origin.sampling)
        self.total_steps = setup.budget(recipe, self.table, self.loader, self.progress)
        networks, self.compiled, self.reducer = setup.prepare_networks(
            recipe, accelerator, self.work, origin, self.total_steps, self.loader, heartbeat.sent
        )
        check_same_settings(accelerator, {f"compiled {name}": yes for name, yes in self.compiled.items()})
        self.timer, self.meter = PartTimer(self.device), Meter()
        self.step = GanStep(recipe, networks, self.timer)

    @property
    def has_one_length(self) -> bool:
        """Every batch is padded to the same length."""
        return len(set((-(-self.loader.sampler.lengths // BUCKET_FRAMES)).tolist())) == 1

    def sampled(self, count: int) -> Iterator[Sample]:
        """The next steps of the run, with the batches that the sampler deals and the wait for them."""
        with self.loader.loading(self.progress) as steps:

            def next_batches() -> list[Batch]:
                with self.timer.phase("data"):
                    return next(steps)

            for _ in range(count):
                yield self.measure(next_batches)
                self.progress = self.loader.advanced(self.progress)

    def measure(self, next_batches: Callable[[], list[Batch]]) -> Sample:
        """One step.

        Raises:
            StageError: the last train.max_bad_steps had no finite gradients, or the memory does not suffice.
        """
        with stopwatch(self.device) as span:
            batches = next_batches()
            result = self.train_step(batches)
        self.meter.update(result.values, result.good)
        seen = RecentStep.of(self.progress.step + 1, batches, result)
        most, before = self.config.max_bad_steps, self.progress.bad_streak
        streak, too_many = bad_steps.check_recent_steps(self.accelerator, [seen], before, most, self.table.train)
        self.progress = replace(self.progress, bad_streak=streak)
        if too_many:
            bad_steps.checkpoint_from_before(self.accelerator, self.work.checkpoints_dir, {}, self.progress, most)
        return Sample(span, self.loader.audio_s(batches), self.timer.take(), self.meter.read(self.accelerator))

    def train_step(self, batches: list[Batch]) -> StepResult:
        """As the trainer takes it at this place of the run."""
        return take_step(self.step, batches, self.progress, self.total_steps, self.accelerator)

    def in_turn(self, count: int, *ways: Callable[[], object]) -> list[list[Span]]:
        """The times of `count` rounds of different steps, which all ranks begin together."""
        rounds = []
        for _ in range(count):
            spans = []
            for way in ways:
                self.accelerator.wait_for_everyone()
                with stopwatch(self.device) as span:
                    way()
                spans.append(span)
            rounds.append(spans)
        self.timer.take()
        return rounds

    def longest(self) -> list[Batch]:
        """This rank's part of a full global batch of the longest clips, repeated when there are fewer."""
        sampler = self.loader.sampler
        order = np.argsort(-sampler.lengths, kind="stable")
        specs = sampler.rank_batches(np.resize(order, sampler.global_batch_size), epoch=0)
        return [batch.to(self.device) for batch in self.loader.dataset[specs]]

    def step_alone(self, batches: list[Batch]) -> None:
        """A step that keeps its gradients to itself: the ranks' weights part ways."""
        with self.step.g.no_sync(), self.step.d.no_sync():
            self.train_step(batches)

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
        model, optim = self.recipe.model, self.config.optim
        generator = Generator(self.shape)
        discriminator = MultiPeriodDiscriminator(model.discriminator_spec, model.discriminator_channels)
        optimizers = []
        for network, copy in (self.step.g, generator), (self.step.d, discriminator):
            copy.to(self.device).load_state_dict(network.module.state_dict())
            network.optimizer.state.clear()
            rate, betas = network.optimizer.param_groups[0]["lr"], (optim.beta1, optim.beta2)
            optimizers.append(torch.optim.AdamW(copy.parameters(), rate, betas, optim.eps, optim.weight_decay))
        g, d = (self.accelerator.prepare_model(m) for m in (generator, PlainDiscriminator(discriminator)))
        precision = self.config.autocast_precision if precision == "recipe" else precision
        scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        return PlainTrainer(self.recipe, generator, g, d, (optimizers[0], optimizers[1]), precision, scaler)

    def plain_step(self, plain: PlainTrainer, batches: list[Batch]) -> dict[str, Tensor]:
        (batch,) = batches
        return plain.step(batch, kl_warmup(self.config, self.progress))

    def compare_losses(self, plain: PlainTrainer, batches: list[Batch]) -> dict[str, tuple[float, float]]:
        """Of a step and the yardstick's, over all ranks: where it is the first of both, they begin alike."""
        ours, theirs = self.measure(lambda: batches).losses, self.plain_step(plain, batches)
        means = self.accelerator.reduce(torch.stack(list(theirs.values())), reduction="mean").tolist()
        return {name: (ours[name], mean) for name, mean in zip(theirs, means, strict=True)}

    def peak_memory(self) -> dict[str, int]:
        """Bytes: of a CUDA device since `forget_peak_memory`, of a CPU the process's largest resident set so far."""
        if self.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.device)
            return {"allocated": memory.peak_bytes(self.device), "reserved": reserved}
        return {"resident": memory.peak_bytes(self.device)}

    def forget_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def key(self) -> dict[str, Any]:
        """What tells one result from another; plain data."""
        key = {
            "ranks": self.num_ranks,
            **recipe_key(self.recipe, self.num_ranks),
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


def recipe_key(recipe: Recipe, num_ranks: int = 1) -> dict[str, Any]:
    """The part of a result's key that the recipe decides; what a rank computes in a step, on so many."""
    config = recipe.train
    return {
        "batch_size": math.ceil(config.micro_batch(num_ranks)),
        "grad_accum_steps": config.micro_batches(num_ranks),
        "precision": config.autocast_precision,
        "optimizer": config.optimizer_name,
        "fast_train": config.fast_train,
        "compile": config.compile,
        "grad_compression": config.grad_compression,
        "activation_checkpointing": config.activation_checkpointing,
        "cache_on_device": config.cache_on_device,
        "multiscale_mel_loss": recipe.multiscale_mel_loss,
        "d_updates": config.d_updates,
        "losses": sorted(wanted(config.loss)),
        "sample_rate": recipe.data.sample_rate,
        **asdict(recipe.model),
    }


def gradient_bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters() if p.requires_grad)
