"""Steps whose gradients are not finite: which clips they were of, and when a run goes back to a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rvc_dist.train import checkpoint
from rvc_dist.train.clips import ClipRef
from rvc_dist.train.dataset import Batch
from rvc_dist.train.progress import Progress
from rvc_dist.train.step import StepResult
from rvc_dist.workspace import StageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecentStep:
    """What is remembered of a step until the host next waits for the device."""

    number: int
    clips: list[tuple[int, ...]]
    """Of each micro-batch of this rank."""
    good: Tensor
    """[] bool: it made its updates; the same on all ranks."""
    bad: Tensor
    """[] bool: it did not, and a smaller loss scale would not have helped; the same on all ranks."""
    finite: Tensor
    """[micro-batches] bool: the losses of this rank's micro-batch were finite."""

    @staticmethod
    def of(number: int, batches: Sequence[Batch], result: StepResult) -> RecentStep:
        return RecentStep(number, [batch.clips for batch in batches], result.good, result.bad, result.finite)


def check_recent_steps(
    accelerator: Accelerator, steps: Sequence[RecentStep], streak: int, most: int, clips: Sequence[ClipRef]
) -> tuple[int, bool]:
    """Name the clips of steps that made no update. The host waits for the device.

    A step whose gradients overflowed in float16, though the losses were finite on all ranks, does not count.

    Args:
        streak: steps without an update in a row, before these.
        most: so many in a row are too many.

    Returns:
        The streak after these steps, and whether there were too many in a row.
    """
    read = torch.cat([torch.cat([torch.stack([s.good, s.bad]), s.finite]) for s in steps]).tolist() if steps else []
    unread = iter(read)
    flags = {step.number: list(islice(unread, 2 + len(step.clips))) for step in steps}
    overflowed = _overflowed(accelerator, flags)
    if overflowed:
        numbers = ", ".join(map(str, overflowed))
        logger.info(f"no update in step {numbers}: a gradient overflowed in float16, and the loss scale was halved")
    too_many = False
    for step in steps:
        if step.number in overflowed:
            continue
        good, _, *finite = flags[step.number]
        streak = 0 if good else streak + 1
        too_many = too_many or streak >= most
        if not good:
            bad = [clips[c] for micro, fine in zip(step.clips, finite, strict=True) if not fine for c in micro]
            named = ", ".join(dict.fromkeys(f"{c.source or 'silence'} (unit {c.unit}, {c.key})" for c in bad))
            found = "every loss of this rank was finite"
            if bad:
                found = f"clips with a loss that is not finite here: {named}"
            logger.warning(f"step {step.number}: no update, since a gradient was not finite; {found}")
    return streak, too_many


def _overflowed(accelerator: Accelerator, flags: Mapping[int, list[bool]]) -> list[int]:
    """The steps that only their loss scale kept from an update: by number, [good, bad, *finite] as in RecentStep."""
    scaled = [number for number, (good, bad, *_) in flags.items() if not (good or bad)]
    if not scaled:  # on all ranks alike
        return []
    faults = torch.tensor([not all(flags[number][2:]) for number in scaled], device=accelerator.device)
    ranks = accelerator.reduce(faults.float()).tolist()
    return [number for number, num_faulty in zip(scaled, ranks, strict=True) if not num_faulty]


def checkpoint_from_before(
    accelerator: Accelerator, folder: Path, identity: dict[str, Any], progress: Progress, most: int
) -> checkpoint.Checkpoint:
    """The newest checkpoint, verified, to go back to after `most` bad steps in a row.

    Raises:
        StageError: there is none, or going back to it has not helped before.
    """
    _, saved = checkpoint.newest(accelerator, folder, identity) or (None, None)
    before = progress.rolled_back_at
    if saved is None or (before is not None and saved.progress.step <= before):
        raise StageError(
            f"step {progress.step}: {most} steps in a row had no finite "
            f"gradients{', also after going back to a checkpoint' if saved else ' before the first checkpoint'};",
            "lower train.learning_rate, set train.max_grad_norm, or leave out the recordings named above. The "
            f"checkpoints in {folder} are from before",
        )
    logger.warning(
        f"step {progress.step}: {most} steps in a row had no finite gradients; going on from the weights of step "
        f"{saved.progress.step}"
    )
    return saved
