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
    failed, measured = len(batch.clips), batch_that_fits(step, batch)
    if not measured or failed == 1:
        return "not even one clip fits"
    # Where as many would fit as failed, more was needed than can be measured now: by another process, by fragments.
    fits, verb = (measured, "would") if measured < failed else (failed // 2, "may")
    whole = step.config.batch_size * step.config.grad_accum_steps
    count = -(-whole // fits)
    keep = f"{-(-whole // count)} with train.grad_accum_steps {count} keeps the steps as large"
    return f"train.batch_size {fits} {verb} fit ({keep})"


def batch_that_fits(step: GanStep, batch: Batch) -> int:
    """The largest batch size of clips as long as these, from the peak memory of one clip and of two.

    What CUDA graphs hold beside that grows with the batch too.
    """
    networks = step.networks.values()
    for network in networks:
        network.optimizer.zero_grad(set_to_none=True)
        network.detach()
    pools = memory.graph_pools(step.device)
    if pools:
        torch.compiler.reset()  # frees them
    alone = step.unwrapped()
    one, two = (memory.peak_of(partial(alone.local_dry_run, batch.first(count)), step.device) for count in (1, 2))
    if one is None or len(batch.clips) == 1:
        return 0
    if two is None:
        return 1
    weights = sum(p.nbytes for network in networks for p in network.module.parameters())
    has_state = any(network.optimizer.state for network in networks)
    # Two moments a weight are still to come; the gradients of both networks were never there together.
    more, pool = 0 if has_state else 2 * weights, pools // len(batch.clips)
    return memory.largest_batch(one + pool, two + 2 * pool, more, memory.capacity(step.device))
