"""The exponential moving average of the generator's weights, for GANs in arXiv 1806.04498.

Every rank averages the weights that it has, which are the same on all: nothing is sent. They stay in their places in
memory, so that compiled networks and CUDA graphs are none the wiser.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn


def decay_after(decay: float, step: int) -> float:
    """The decay of the update after `step` steps: less at the beginning, so that the first weights are soon forgotten.

    min(decay, (1 + step) / (10 + step)): the last tenth of the way counts most, until `decay` is reached.
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """Averages of all parameters of `module`, float32, on its device; they begin as the parameters are now."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.weights = [p.detach().to(torch.float32, copy=True) for p in module.parameters()]

    def _parameters(self) -> list[Tensor]:
        return [p.detach() for p in self.module.parameters()]

    def update(self, step: int) -> None:
        """After the step that follows `step` others, also one that updated nothing; the host does not wait."""
        torch._foreach_lerp_(self.weights, self._parameters(), 1.0 - decay_after(self.decay, step))

    def begin(self) -> None:
        """Anew, with the weights that the module has now."""
        torch._foreach_copy_(self.weights, self._parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """That of the module with the averages as its parameters; they share the memory of these."""
        names = (name for name, _ in self.module.named_parameters())
        return self.module.state_dict() | dict(zip(names, self.weights, strict=True))

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`."""
        names = (name for name, _ in self.module.named_parameters())
        torch._foreach_copy_(self.weights, [state[name].to(self.weights[0].device) for name in names])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module has the averages; afterwards it has its own weights again, to the bit."""
        own = self._parameters()
        kept = [weight.clone() for weight in own]
        torch._foreach_copy_(own, self.weights)
        try:
            yield
        finally:
            torch._foreach_copy_(own, kept)


def weights_of(ema: Ema | None, uses_ema: bool | None) -> AbstractContextManager[None]:
    """Inside, the module has the weights that validation found better (`Progress.uses_ema`)."""
    return ema.applied() if ema is not None and uses_ema else nullcontext()
