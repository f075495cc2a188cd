"""Running out of device memory becomes a sentence that says which batch size would fit."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from rvc_dist.train import memory
from rvc_dist.train.dataset import Batch
from rvc_dist.train.step import GanStep
from rvc_dist.workspace import StageError


@contextmanager
def advice(step: GanStep, batch: Batch, rank: int) -> Iterator[None]:
    """Inside, `step` is computed with a batch like `batch`.

    Raises:
        StageError: in the place of torch.OutOfMemoryError, and of what libraries raise instead.
    """
    try:
        yield
    except RuntimeError as error:
        if not memory.is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the activations that did not fit
        config = step.config
        raise StageError(
            f"rank {rank}: {step.device} has not enough memory for train.batch_size {config.batch_size} with clips of "
            f"{batch.content.shape[1]} frames;",
            f"{remedy(step, batch)}. train.activation_checkpointing and train.precision bf16 need less",
        ) from error


def remedy(step: GanStep, batch: Batch) -> str:
    """Which batch size is smaller than this one, which failed, and fits; and how the steps stay as large."""
    fits = batch_that_fits(step, batch)
    if not fits:
        return "not even one clip fits"
    whole = step.config.batch_size * step.config.grad_accum_steps
    count = -(-whole // fits)
    keep = f"{-(-whole // count)} with train.grad_accum_steps {count} keeps the steps as large"
    if step.config.keep_global_batch is not None:
        keep = "train.keep_global_batch keeps the steps as large"
    return f"train.batch_size {fits} would fit ({keep})"


def batch_that_fits(step: GanStep, batch: Batch) -> int:
    """The largest batch size below this one's whose clips, as long as these, fit; 0 when not even one does.

    Computed with half the clips, or a quarter, ...: memory grows with the clip only nearly, since the kernels that are
    chosen depend on the batch. What CUDA graphs hold beside that grows with the batch too.
    """
    networks = step.networks.values()
    for network in networks:
        network.optimizer.zero_grad(set_to_none=True)
        network.detach()
    pools = memory.graph_pools(step.device)
    if pools:
        torch.compiler.reset()  # frees them
    weights = sum(p.nbytes for network in networks for p in network.module.parameters())
    has_state = any(network.optimizer.state for network in networks)
    # Two moments a weight are still to come; the gradients of both networks were never there together.
    available = memory.capacity(step.device) - (0 if has_state else 2 * weights)
    alone, failed = step.unwrapped(), len(batch.clips)

    def needed(count: int) -> float:
        peak = memory.peak_of(partial(alone.local_dry_run, batch.first(count)), step.device)
        return float("inf") if peak is None else peak + pools * count / failed

    count, peak = failed // 2, float("inf")
    while count and (peak := needed(count)) > available:
        count //= 2
    if count < 2:
        return count
    each = max(1.0, (peak - needed(count // 2)) / (count - count // 2))
    more = int((available - peak) / each)
    return count + more if count + more < failed else count
