"""The loss scale of float16: so that gradients neither vanish below its smallest number nor pass its largest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from rvc_dist.schema import Count

FIRST_SCALE, LEAST_SCALE = 2.0**10, 1.0
"""From torch's 65536, G would begin with some seven steps without an update, which are for nothing. A gradient that
overflows without any scale is no matter of the scale."""
GROWTH_STEPS = 2000
"""Steps without overflow after which the scale is doubled; an overflow halves it, and the step changes nothing."""


class LossScaleState(TypedDict):
    """What a checkpoint keeps."""

    scale: float
    steps: Count


class LossScale:
    """Of one network, as `torch.amp.GradScaler` (arXiv 1710.03740) has it; the host never waits for the device.

    Every rank sees the same averaged gradients, so all ranks have the same scale.
    """

    def __init__(self, device: torch.device) -> None:
        self._scale = torch.tensor(FIRST_SCALE, device=device)
        self._steps = torch.tensor(0, dtype=torch.int32, device=device)
        """Since the scale was changed, or a gradient overflowed."""

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self._scale

    @torch.no_grad()
    def unscale(self, gradients: Sequence[Tensor]) -> None:
        torch._foreach_mul_(list(gradients), self._scale.reciprocal())  # a power of two: exact

    def update(self, good: Tensor) -> Tensor:
        """The scale of the next step; `good` [] is false if a gradient overflowed.

        Returns:
            [] bool: the scale could be lowered, so an overflow is no fault of the losses.
        """
        could_be_lower = self._scale > LEAST_SCALE
        torch._amp_update_scale_(self._scale, self._steps, (~good).float(), 2.0, 0.5, GROWTH_STEPS)
        self._scale.clamp_(min=LEAST_SCALE)
        return could_be_lower

    def state(self) -> LossScaleState:
        """The host waits for the device."""
        return {"scale": self._scale.item(), "steps": int(self._steps.item())}

    def load(self, state: LossScaleState) -> None:
        self._scale.fill_(state["scale"])
        self._steps.fill_(state["steps"])
