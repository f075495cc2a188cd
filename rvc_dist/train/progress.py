"""Where a run stands, how far its budget reaches, and what is due: pure functions of the recipe and the progress."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from rvc_dist.config import TrainConfig


@dataclass(frozen=True)
class Progress:
    """Where a run stands. All of it is in the checkpoint, none of it in a file name."""

    step: int = 0
    """Steps done, those without an update included."""
    epoch: int = 0
    """Epochs completed."""
    batches_done: tuple[tuple[int, int], ...] = field(default=(), metadata={"key": "seen"})
    """Of the current epoch: (clips of a global batch, steps of that size), one entry a change of size."""
    best_metric: float | None = None
    """The least `BEST_BY` of `rvc_dist.train.holdout` so far."""
    best_step: int = 0
    best_epoch: int = 0
    bad_streak: int = 0
    """Last steps in a row whose gradients were not finite."""
    rolled_back_at: int | None = None
    """The step at which such a row last made the run go back to a checkpoint."""
    uses_ema: bool | None = None
    """Whether the last validation found the average of G's weights better than the weights; None where none did."""

    @classmethod
    def from_file(cls, kept: Mapping[str, Any]) -> Progress:
        steps = tuple((size, num_steps) for size, num_steps in kept["seen"])
        return cls(**{key: value for key, value in kept.items() if key != "seen"}, batches_done=steps)

    def to_file(self) -> dict[str, Any]:
        """All fields; only `uses_ema`, which is younger, is left out where it says nothing."""
        kept = {f.metadata.get("key", f.name): getattr(self, f.name) for f in fields(self)}
        return {key: value for key, value in kept.items() if (key, value) != ("uses_ema", None)}

    def advanced(self, global_batch_size: int, epoch_ends: bool) -> Progress:
        """One step later."""
        if epoch_ends:
            return replace(self, step=self.step + 1, epoch=self.epoch + 1, batches_done=())
        *before, (size, num_steps) = self.batches_done or ((global_batch_size, 0),)
        last = [(size, num_steps + 1)] if size == global_batch_size else [(size, num_steps), (global_batch_size, 1)]
        return replace(self, step=self.step + 1, batches_done=(*before, *last))

    def judged(self, distance: float) -> tuple[Progress, str]:
        """With this validation as the best, if no other was as good; and why it is the best, or is not."""
        now, best = f"mel distance {distance:.4f}", self.best_metric
        if not math.isfinite(distance):
            return self, f"{now} is never the best"
        if best is None:
            why = f"{now} is the first"
        elif distance < best:
            why = f"{now} is {1 - distance / best:.1%} below the {best:.4f} of step {self.best_step}"
        else:
            more = f"{distance / best - 1:.1%} above" if distance > best > 0 else "no less than"
            return self, f"{now} is {more} the {best:.4f} of step {self.best_step}, which stays the best"
        return replace(self, best_metric=distance, best_step=self.step, best_epoch=self.epoch), why

    def epochs_done(self, num_clips: int) -> float:
        return self.epoch + sum(size * num_steps for size, num_steps in self.batches_done) / num_clips


def total_steps(config: TrainConfig, steps_per_epoch: int, left_in_epoch: int, progress: Progress) -> int:
    """Steps of the whole run: to max_epochs or max_steps, whichever comes first."""
    epochs_after = config.max_epochs - progress.epoch - 1
    by_epochs = progress.step + (left_in_epoch + epochs_after * steps_per_epoch)
    return by_epochs if config.max_steps is None else min(by_epochs, config.max_steps)


def is_due(every_steps: int, step: int, total: int) -> bool:
    """After `step`: what is done every so many steps and at the end of the run."""
    return step % every_steps == 0 or step == total


def save_is_due(config: TrainConfig, progress: Progress, total: int) -> bool:
    """Whether the recipe wants a checkpoint now."""
    if config.save_every_epochs is None:
        return is_due(config.save_every_steps, progress.step, total)
    at_epoch_end = not progress.batches_done and progress.epoch % config.save_every_epochs == 0
    return at_epoch_end or progress.step == total


def is_overtrained(config: TrainConfig, progress: Progress) -> bool:
    """Validation has not improved for as many epochs as the recipe allows."""
    waited = progress.epoch - progress.best_epoch
    return config.overtrain_detect and progress.best_metric is not None and waited >= config.overtrain_threshold


def kl_warmup(config: TrainConfig, progress: Progress) -> float:
    """The share of the KL term's weight in the next step."""
    return min(1.0, (progress.step + 1) / max(1, config.kl_warmup_steps))
