"""The table of optimizers, AnyPrecisionAdamW, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rvc_dist.config import TrainConfig

BETAS, EPS, WEIGHT_DECAY = (0.8, 0.99), 1e-9, 0.01
"""Of every RVC trainer (VITS, arXiv 2106.06103, with eps 1e-9)."""


class AnyPrecisionAdamW(Optimizer):
    """AdamW (arXiv 1711.05101) with float32 parameters and a momentum in bfloat16.

    Momentum takes half its memory; the variance keeps `variance_dtype`. With `kahan`, the rounding error of each
    update is carried in bfloat16 to the next, for parameters that are themselves bfloat16. All arithmetic is done in
    the parameter's precision, over all tensors of a group at once.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-4,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
        weight_decay: float = WEIGHT_DECAY,
        momentum_dtype: torch.dtype = torch.bfloat16,
        variance_dtype: torch.dtype = torch.float32,
        kahan: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.momentum_dtype, self.variance_dtype, self.kahan = momentum_dtype, variance_dtype, kahan

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.momentum_dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.variance_dtype)
            if self.kahan:
                state["compensation"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        states = [self._state_of(p) for p in params]
        grads = [p.grad for p in params if p.grad is not None]
        for state in states:
            state["step"] += 1
        step = float(states[0]["step"])

        momenta = [s["exp_avg"] for s in states]
        exact = [m.to(p.dtype, copy=True) for m, p in zip(momenta, params, strict=True)]
        torch._foreach_lerp_(exact, grads, 1 - beta1)
        torch._foreach_copy_(momenta, exact)
        variances = [s["exp_avg_sq"].to(p.dtype) for s, p in zip(states, params, strict=True)]
        torch._foreach_mul_(variances, beta2)
        torch._foreach_addcmul_(variances, grads, grads, 1 - beta2)
        torch._foreach_copy_([s["exp_avg_sq"] for s in states], variances)

        denominators = torch._foreach_sqrt(variances)
        torch._foreach_div_(denominators, math.sqrt(1 - beta2**step))
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_div_(exact, denominators)
        torch._foreach_mul_(exact, -group["lr"] / (1 - beta1**step))
        torch._foreach_add_(exact, params, alpha=-group["lr"] * group["weight_decay"])
        if not self.kahan:
            torch._foreach_add_(params, exact)
            return
        carried = [s["compensation"] for s in states]
        torch._foreach_add_(exact, [c.to(p.dtype) for c, p in zip(carried, params, strict=True)])
        before = [p.clone() for p in params]
        torch._foreach_add_(params, exact)
        applied = torch._foreach_sub(params, before)
        torch._foreach_copy_(carried, torch._foreach_sub(exact, applied))


def _adamw(params: list[nn.Parameter], lr: float) -> Optimizer:
    fused = all(p.is_cuda for p in params)
    return torch.optim.AdamW(params, lr, BETAS, EPS, WEIGHT_DECAY, foreach=not fused, fused=fused)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], Optimizer]] = {
    "adamw": _adamw,
    "radam": lambda params, lr: torch.optim.RAdam(
        params, lr, BETAS, EPS, WEIGHT_DECAY, decoupled_weight_decay=True, foreach=True
    ),
    "anyprecision_adamw": lambda params, lr: AnyPrecisionAdamW(params, lr),
}


def make_optimizer(config: TrainConfig, module: nn.Module) -> Optimizer:
    return OPTIMIZERS[config.optimizer_name](list(module.parameters()), config.learning_rate)


@dataclass(frozen=True)
class OptimizerState:
    tensors: dict[str, Tensor]
    groups: list[dict[str, Any]]


def optimizer_state(optimizer: Optimizer, module: nn.Module) -> OptimizerState:
    names = {id(p): n for n, p in module.named_parameters()}
    return OptimizerState(
        {
            f"{names[id(p)]}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
            for p, state in optimizer.state.items()
            for key, value in state.items()
        },
        [],
    )


def load_optimizer_state(optimizer: Optimizer, module: nn.Module, state: OptimizerState) -> None:
    parameters = dict(module.named_parameters())
    optimizer.state.clear()
    for name, value in state.tensors.items():
        parameter, _, key = name.rpartition("/")
        target = parameters[parameter]
        # Step counts stay where the optimizer made them (on the host, for all but fused ones).
        moved = value.to(target.device) if value.numel() > 1 or value.shape == target.shape else value
        optimizer.state[target][key] = moved.clone()


def step_if(optimizer: Optimizer, good: Tensor) -> None:
    """One step if `good` [] is true, else none; the host waits for the device only where the optimizer cannot decide.

    Optimizers that can (fused AdamW, ours) do so by the protocol of torch.amp.GradScaler: `found_inf` is set.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif good:
        optimizer.step()


def learning_rate(config: TrainConfig, step: int, epoch: int, total_steps: int, num_ranks: int) -> float:
    """The learning rate of step `step` in epoch `epoch` (both from 0): a pure function, so resuming needs no state."""
    scale = {"none": 1.0, "sqrt": math.sqrt(num_ranks), "linear": float(num_ranks)}[config.lr_scaling]
    rate = config.learning_rate * scale
    if step < config.warmup_steps:
        return rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "exponential":
        return float(rate * config.lr_decay**epoch)
    if config.lr_schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return rate
