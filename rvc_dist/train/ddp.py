"""A network as the step computes it: what sends its gradients to the other ranks, and what updates it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rvc_dist.models.modules import weights_made_once
from rvc_dist.train.loss_scale import LossScale
from rvc_dist.train.optimizers import OptimizerState, load_optimizer_state, optimizer_state, step_if


class GradientReducer:
    """Averages gradients over ranks as a communication hook of DDP, as bf16 if asked to, and counts what is sent."""

    def __init__(self, compress: bool, on_send: Callable[[], None] = lambda: None) -> None:
        self.compress, self.on_send = compress, on_send
        self.num_bytes = 0
        """Bytes of gradients that this rank gave to all-reduce."""

    def attach(self, module: nn.Module) -> None:
        """Nothing on one rank, where `module` is not wrapped."""
        if isinstance(module, DistributedDataParallel):
            # Not the method itself: DDP refuses annotations that are text.
            module.register_comm_hook(self, lambda reducer, bucket: reducer.send(bucket))

    def count(self, num_elements: int, dtype: torch.dtype) -> None:
        """This many gradients are sent."""
        self.num_bytes += num_elements * (2 if self.compress else dtype.itemsize)
        self.on_send()

    def send(self, bucket: Any) -> torch.futures.Future[Tensor]:
        self.count(bucket.buffer().numel(), bucket.buffer().dtype)
        hook = default_hooks.bf16_compress_hook if self.compress else default_hooks.allreduce_hook
        assert dist.group.WORLD is not None
        future: torch.futures.Future[Tensor] = hook(dist.group.WORLD, bucket)
        return future


class Update(NamedTuple):
    """What came of the gradients of a step; the same on all ranks."""

    norm: Tensor
    """[]: of the gradients, before they were clipped."""
    good: Tensor
    """[] bool: they were finite, and the optimizer took its step."""
    bad: Tensor
    """[] bool: they were not, and a smaller loss scale would not have helped."""


@dataclass
class TrainedModule:
    """A network in its guises, and what optimizes it: on one rank, or averaged over ranks by DDP."""

    module: nn.Module
    """The network itself: for validation and checkpoints."""
    compiled: nn.Module
    """`module` as it is computed, compiled or not: for passes whose gradients are not this network's."""
    wrapped: nn.Module
    """`compiled`, as it is for passes with gradients of its own."""
    optimizer: Optimizer
    scale: LossScale | None = field(default=None, kw_only=True)
    """Where it computes in float16."""

    @staticmethod
    def alone(module: nn.Module, optimizer: Optimizer, scale: LossScale | None = None) -> TrainedModule:
        """On this rank alone, eagerly."""
        return TrainedModule(module, module, module, optimizer, scale=scale)

    def no_sync(self, on: bool = True) -> AbstractContextManager[None]:
        """Inside, if `on`, forward and backward passes add to this rank's gradients and send nothing."""
        if on and isinstance(self.wrapped, DistributedDataParallel):
            context: AbstractContextManager[None] = self.wrapped.no_sync()
            return context
        return nullcontext()

    @contextmanager
    def frozen(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside, the network passes gradients through but gets none: no useless gradients, no useless all-reduce.

        Its weights are made once, in the `dtype` that it computes in. A compiled network makes them as part of a graph.
        """
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        eager = self.compiled is self.module
        try:
            with weights_made_once(self.module, dtype) if eager else nullcontext():
                yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` []; averaged over ranks, unless it is within `no_sync`."""
        scaled = loss if self.scale is None else self.scale.scaled(loss)
        scaled.backward()  # type: ignore[no-untyped-call]

    def update(self, max_norm: float | None) -> Update:
        """One step from the gradients, clipped to `max_norm`, unless they are not finite."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        if self.scale is not None:
            self.scale.unscale(gradients)
        norm = nn.utils.get_total_norm(gradients)
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(self.module.parameters(), max_norm, norm)
        good = norm.isfinite()
        step_if(self.optimizer, good)
        bad = ~good
        if self.scale is not None:
            bad = bad & ~self.scale.update(good)
        return Update(norm, good, bad)

    def optimizer_state(self, wanted: bool) -> OptimizerState | None:
        """Of all parameters, on the ranks where it is `wanted`; every rank has to ask for it."""
        return optimizer_state(self.optimizer, self.module) if wanted else None

    def load(self, weights: Mapping[str, Tensor], state: OptimizerState) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: the optimizer's state does not fit.
        """
        self.module.load_state_dict(weights)
        load_optimizer_state(self.optimizer, self.module, state)

    def detach(self) -> None:
        """Send nothing any more: a rank that ran out of memory still computes, alone, what would have fitted."""
