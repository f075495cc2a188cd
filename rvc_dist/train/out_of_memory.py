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
        StageError: in the place of torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold the activations that did not fit
        size = step.config.batch_size
        fits = batch_that_fits(step, batch)
        remedy = f"train.batch_size {fits} would fit" if fits else "not even one clip fits"
        keep = f" (with train.grad_accum_steps {-(-size // fits)} the steps stay as large)" if fits else ""
        raise StageError(
            f"rank {rank}: {step.device} has not enough memory for train.batch_size {size} with clips of "
            f"{batch.content.shape[1]} frames;",
            f"{remedy}{keep}. train.activation_checkpointing and train.precision bf16 need less",
        ) from error


def batch_that_fits(step: GanStep, batch: Batch) -> int:
    """The largest batch size of clips as long as these, from the peak memory of one clip and of two."""
    networks = step.networks.values()
    for network in networks:
        network.optimizer.zero_grad(set_to_none=True)
        network.detach()
    alone = step.unwrapped()
    one, two = (memory.peak_of(partial(alone.local_dry_run, batch.first(count)), step.device) for count in (1, 2))
    if one is None or len(batch.clips) == 1:
        return 0
    weights = sum(p.nbytes for network in networks for p in network.module.parameters())
    has_state = any(network.optimizer.state for network in networks)
    # Two moments a weight are still to come; the gradients of both networks were never there together.
    more = 0 if has_state else 2 * weights
    return memory.largest_batch(one, two, more, memory.capacity(step.device)) if two is not None else 1
