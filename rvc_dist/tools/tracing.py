"""One training step on fake tensors: what it keeps in memory and how many operations it takes, without doing them.

Fake tensors have shapes and storages but no data, so that the full networks take seconds
and almost no memory on any machine.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rvc_dist.config import Recipe
from rvc_dist.models import spectral
from rvc_dist.tools.measuring import flop_counter, gradient_bytes
from rvc_dist.train import networks
from rvc_dist.train.dataset import Batch, ClipTable
from rvc_dist.train.ddp import TrainedModule
from rvc_dist.train.optimizers import make_optimizer
from rvc_dist.train.sampler import BUCKET_FRAMES
from rvc_dist.train.step import GanStep

MOST_MICRO_BATCHES = 2
"""Traced of a step: further ones need no more memory and cost like the others."""


@dataclass(frozen=True)
class TracedStep:
    """What a full step of one rank needs. Operations are those of convolutions and matrix products, as bench counts."""

    frames: int
    """Padded frames of every clip."""
    weight_bytes: int
    gradient_bytes: dict[str, int]
    """By network."""
    optimizer_bytes: int
    peak_bytes: int
    """Most bytes that all tensors take at once, weights, gradients and optimizer state included."""
    flops: float
    flops_per_frame: float
    """What one more padded frame of all clips adds to `flops`."""

    @property
    def activation_bytes(self) -> int:
        """What the peak holds besides: activations, their gradients and the batch."""
        return self.peak_bytes - self.weight_bytes - sum(self.gradient_bytes.values()) - self.optimizer_bytes

    @property
    def growing_share(self) -> float:
        """Share of the operations that is proportional to the padded frames."""
        return self.flops_per_frame * self.frames / self.flops


def trace(recipe: Recipe, content_channels: int, num_speakers: int, frames: int) -> TracedStep:
    """A step of the recipe, compiled or not, as it would be in eager mode; not counted are kernels' workspaces.

    Args:
        frames: of the longest clips, padded.
    """
    spectral.forget_constants()
    try:
        with warnings.catch_warnings(), FakeTensorMode(), Allocations() as allocated:
            # An optimizer compares addresses, which changes where its state lies but not how much it is.
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            step = traced_step(recipe, content_channels, num_speakers)
            weights = sum(p.nbytes for n in step.networks.values() for p in n.module.parameters())
            state = sum(tensor_bytes(list(n.optimizer.state.values())) for n in step.networks.values())
            allocated.peak_bytes = allocated.num_bytes
            flops = count(step, frames)
            peak = allocated.peak_bytes
            gradients = {name: gradient_bytes(n.module) for name, n in step.networks.items()}
            shorter = -(-frames // 2 // BUCKET_FRAMES) * BUCKET_FRAMES
            slope = (flops - count(step, shorter)) / (frames - shorter) if shorter < frames else 0.0
    finally:
        spectral.forget_constants()  # the fake ones
    return TracedStep(frames, weights, gradients, state, peak, flops, slope)


def tensor_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operations made and that are still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = self.peak_bytes = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # an optimizer looks at a number, which a fake tensor does not have
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.num_bytes += storage.nbytes()
                weakref.finalize(storage, self._drop, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        return out

    def _drop(self, num_bytes: int) -> None:
        self.num_bytes -= num_bytes


def traced_step(recipe: Recipe, content_channels: int, num_speakers: int) -> GanStep:
    """The recipe's step without ranks, clips or a run folder; its optimizers have their state already.

    They have it by an update from zero gradients, which stay as those of a step do.
    """
    table = ClipTable((), (), content_channels, {}, num_speakers)
    # As when a checkpoint will fill them: whatever the first weights are, they need as much.
    _, modules = networks.build(recipe, table, {"generator.num_speakers": num_speakers})
    traced = {name: TrainedModule.alone(m, make_optimizer(recipe.train, m)) for name, m in modules.items()}
    for network in traced.values():
        for parameter in network.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        network.optimizer.step()
    return GanStep(recipe, traced)


def count(step: GanStep, frames: int) -> float:
    """Operations of a step on full micro-batches of clips of so many frames."""
    config, spec = step.config, step.spec
    size, micro_batches = config.batch_size, config.micro_batches(1)
    batch = Batch(
        wave_with_reach=torch.zeros(size, 1, frames * spec.hop + 2 * spec.reach),
        content=torch.zeros(size, frames, step.shape.content_channels),
        f0=torch.zeros(size, frames),
        lengths=torch.full((size,), frames),
        speaker=torch.zeros(size, dtype=torch.long),
        clips=tuple(range(size)),
        seeds=(0,) * size,
        loss_scale=1 / micro_batches,
        mean_frames=float(size * frames * micro_batches),
        reach=spec.reach,
        energy=torch.zeros(size, frames) if step.shape.energy else None,
    )
    traced = min(micro_batches, MOST_MICRO_BATCHES)
    with flop_counter() as counter:
        step([batch] * traced)
    return float(counter.get_total_flops()) * micro_batches / traced
