"""The table of optimizers, AnyPrecisionAdamW, what a checkpoint keeps of an optimizer, and the learning rate.

Shapes: N elements of a run of parameters, laid one after the other.
"""

from __future__ import annotations

import copy
import importlib
import logging
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import Optimizer

from rvc_dist.config import OptimConfig, TrainConfig
from rvc_dist.workspace import StageError

logger = logging.getLogger(__name__)

CPU_CHUNK, DEVICE_CHUNK = 1 << 17, 1 << 22
"""Elements that AnyPrecisionAdamW updates at a time: a thread's share of the cache; elsewhere enough to fill a GPU."""
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Where PyTorch has a fused AdamW."""
RECIPE_OPTIONS = frozenset({"betas", "eps", "weight_decay", "safeguard_warmup", "foreach", "fused"})
"""What the recipe and the device decide, not the checkpoint: a changed setting is honoured when a run goes on."""


class AnyPrecisionAdamW(Optimizer):
    """AdamW (arXiv 1711.05101) with float32 parameters and a momentum in bfloat16.

    Momentum takes half its memory; the variance keeps `variance_dtype`. With `kahan`, the rounding error of each
    update is carried in bfloat16 to the next (Kahan summation), for parameters that are themselves bfloat16. All
    arithmetic is done in float32, over runs of parameters that fit the cache, so a step reads and writes each tensor
    once and its temporaries are small.

    The host never waits for the device: the count of steps is a number in each group. A step is skipped as
    `torch.amp.GradScaler` asks for it: with an attribute `found_inf` (one element on the parameters' device) that is
    not zero, parameters, state and count stay as they are to the bit, whatever the gradients hold. On a GPU that is
    decided there, and the count then lives there too. An attribute `grad_scale` divides the gradients.
    """

    _step_supports_amp_scaling = True
    host_devices: tuple[str, ...] = ("cpu",)
    """Where looking at `found_inf` costs nothing; elsewhere the device masks every change."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-4,
        betas: tuple[float, float] = (OptimConfig.beta1, OptimConfig.beta2),
        eps: float = OptimConfig.eps,
        weight_decay: float = OptimConfig.weight_decay,
        momentum_dtype: torch.dtype = torch.bfloat16,
        variance_dtype: torch.dtype = torch.float32,
        kahan: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})
        self.dtypes = {"exp_avg": momentum_dtype, "exp_avg_sq": variance_dtype}
        if kahan:
            self.dtypes["compensation"] = torch.bfloat16

    def _state_of(self, parameter: Tensor) -> list[Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        for key, dtype in self.dtypes.items():
            if key not in state:
                state[key] = torch.zeros_like(parameter, dtype=dtype)
            elif state[key].dtype != dtype:  # Optimizer.load_state_dict gives state the parameter's type
                state[key] = state[key].to(dtype)
        return [state[key] for key in self.dtypes]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type in self.host_devices:
            if found_inf.item():
                return loss
            found_inf = None
        for group in self.param_groups:
            self._step_group(group, None if found_inf is None else found_inf.reshape(()) != 0)
        return loss

    def _step_group(self, group: dict[str, Any], skip: Tensor | None) -> None:
        """One step; `skip` is a bool [] on the device, None where the host already knows that it is wanted."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        device = params[0].device
        if skip is None:
            group["step"] += 1
        elif isinstance(group["step"], Tensor):
            group["step"] = group["step"] + ~skip
        else:
            group["step"] = torch.full((), group["step"], dtype=torch.float64, device=device) + ~skip
        limit = CPU_CHUNK * torch.get_num_threads() if device.type == "cpu" else DEVICE_CHUNK
        chunks = list(_chunks(((p, p.grad.contiguous(), *self._state_of(p)) for p in params), limit))
        longest = max(sum(row[0].numel() for row in chunk) for chunk in chunks)
        # Memory fresh from the operating system costs more than the arithmetic on it: every chunk uses the same.
        work = torch.empty(4, longest, dtype=torch.promote_types(params[0].dtype, torch.float32), device=device)
        for chunk in chunks:
            self._step_chunk(group, list(zip(*chunk, strict=True)), skip, work)

    def _step_chunk(
        self, group: dict[str, Any], columns: Sequence[tuple[Tensor, ...]], skip: Tensor | None, work: Tensor
    ) -> None:
        """One step for pieces of parameters, their gradients, and each of their state tensors."""
        # A view of one contiguous piece, which changes in place; several pieces become one tensor that is copied back.
        parameter, gradient, *state = (_flatten_dense_tensors(c) for c in columns)  # type: ignore[no-untyped-call]
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        if grad_scale is not None:
            gradient = gradient / grad_scale
        changing = (parameter, *state)
        before = None if skip is None else [tensor.clone() for tensor in changing]
        _adamw_(group, parameter, gradient, *state, work=work[:, : parameter.numel()])
        if skip is not None and before is not None:
            for old, new in zip(before, changing, strict=True):
                torch.where(skip, old, new, out=new)
        for column, flat in zip((columns[0], *columns[2:]), changing, strict=True):
            if flat.data_ptr() != column[0].data_ptr():
                pieces = _unflatten_dense_tensors(flat, column)  # type: ignore[no-untyped-call]
                torch._foreach_copy_(column, pieces)


def _adamw_(
    group: dict[str, Any],
    parameter: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    variance: Tensor,
    *compensation: Tensor,
    work: Tensor,
) -> None:
    """Change parameter [N], momentum, variance and any Kahan compensation; `work` [4, N] is float32 to compute in."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    # Numbers, or float64 tensors [] on the device: 1 - 0.99 ** 1 has no more than five digits in float32.
    bias1, bias2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
    change, denominator, exact, old = work
    gradient = gradient.to(work.dtype)
    momentum.copy_(change.copy_(momentum).mul_(beta1).add_(gradient, alpha=1 - beta1))
    square = variance if variance.dtype == work.dtype else exact.copy_(variance)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    if square is exact:
        variance.copy_(square)
    torch.sqrt(square, out=denominator).mul_(bias2**-0.5).add_(group["eps"])
    change.div_(denominator).mul_(-lr / bias1).add_(parameter, alpha=-lr * group["weight_decay"])
    if not compensation:
        parameter.add_(change)
        return
    change.add_(compensation[0])
    old.copy_(parameter)
    parameter.add_(change)
    compensation[0].copy_(change.sub_(denominator.copy_(parameter).sub_(old)))


def _chunks(rows: Iterable[tuple[Tensor, ...]], limit: int) -> Iterator[list[tuple[Tensor, ...]]]:
    """Tensors of equal shape, row by row, in runs of at most `limit` elements; longer ones in pieces, as views."""
    chunk: list[tuple[Tensor, ...]] = []
    size = 0
    for row in rows:
        # Tensors in another order than C's have no flat view; they go whole.
        whole = row[0].numel() <= limit or not all(t.is_contiguous() for t in row)
        pieces = [row] if whole else list(zip(*(torch.split(t.view(-1), limit) for t in row), strict=True))
        for piece in pieces:
            if chunk and size + piece[0].numel() > limit:
                yield chunk
                chunk, size = [], 0
            chunk.append(piece)
            size += piece[0].numel()
    if chunk:
        yield chunk


Factory = Callable[[list[nn.Parameter], TrainConfig], Optimizer]


def _common(config: TrainConfig) -> dict[str, Any]:
    """What every optimizer but a few takes from the recipe."""
    optim = config.optim
    return {
        "lr": config.learning_rate,
        "betas": (optim.beta1, optim.beta2),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }


def _adamw(params: list[nn.Parameter], config: TrainConfig) -> Optimizer:
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in params)
    return torch.optim.AdamW(params, **_common(config), fused=fused, foreach=not fused)


def _radam(params: list[nn.Parameter], config: TrainConfig) -> Optimizer:
    return torch.optim.RAdam(params, **_common(config), decoupled_weight_decay=True, foreach=True)


def _anyprecision_adamw(params: list[nn.Parameter], config: TrainConfig) -> Optimizer:
    variance_dtype = getattr(torch, config.optim.variance_dtype)
    kahan = config.optim.kahan_summation
    return AnyPrecisionAdamW(params, **_common(config), variance_dtype=variance_dtype, kahan=kahan)


def _adamw_8bit(params: list[nn.Parameter], config: TrainConfig) -> Optimizer:
    """AdamW with both moments in 8 bits (arXiv 2110.02861)."""
    kind = _third_party("bitsandbytes.optim", config).AdamW8bit
    device = params[0].device
    # Which devices it has kernels for depends on its version and on the CUDA libraries it finds: try one block.
    trial = nn.Parameter(torch.zeros(4096, device=device))
    trial.grad = torch.ones_like(trial)
    try:
        kind([trial]).step()
    except RuntimeError as error:
        raise StageError(
            f"train.optimizer: adamw_8bit does not run on {device} with the bitsandbytes that is installed ({error}); "
            "update bitsandbytes, or set train.optimizer anyprecision_adamw"
        ) from error
    if device.type == "cpu":
        logger.warning("train.optimizer: adamw_8bit saves memory on the CPU too, but takes many times adamw's time")
    optimizer: Optimizer = kind(params, **_common(config))
    return optimizer


def _packaged(kind: str, options: Callable[[TrainConfig], dict[str, Any]]) -> Factory:
    """Class `kind` of the package pytorch-optimizer, with decoupled weight decay."""

    def factory(params: list[nn.Parameter], config: TrainConfig) -> Optimizer:
        make = getattr(_third_party("pytorch_optimizer", config), kind)
        optimizer: Optimizer = make(params, weight_decouple=True, **options(config))
        return optimizer

    return factory


def _third_party(module: str, config: TrainConfig) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise StageError(
            f"train.optimizer: {config.optimizer_name} needs a package that cannot be imported ({error}); install it: "
            "pip install 'rvc-dist[optim]'"
        ) from error


def _without_eps(config: TrainConfig) -> dict[str, Any]:
    return {key: value for key, value in _common(config).items() if key != "eps"}


def _adan(config: TrainConfig) -> dict[str, Any]:
    # arXiv 2208.06677: decays of the gradient, of its differences (the package's default), and of the squares.
    return _common(config) | {"betas": (config.optim.beta1, 0.92, config.optim.beta2)}


def _ademamix(config: TrainConfig) -> dict[str, Any]:
    # arXiv 2409.03137: the third decay is that of the slow momentum, which is what the method is about.
    return _common(config) | {"betas": (config.optim.beta1, config.optim.beta2, 0.9999)}


def _came(config: TrainConfig) -> dict[str, Any]:
    # arXiv 2307.02047: the third decay is that of the instability. Both its eps are added to squares: its own are kept.
    return _without_eps(config) | {"betas": (config.optim.beta1, config.optim.beta2, 0.9999)}


def _prodigy(config: TrainConfig) -> dict[str, Any]:
    # arXiv 2306.06101: a rate that rises from zero must not count as a measure of the distance.
    return _common(config) | {"safeguard_warmup": config.warmup_steps > 0}


def _ranger(config: TrainConfig) -> dict[str, Any]:
    # RAdam (arXiv 1908.03265) with Lookahead (arXiv 1907.08610). Without this option, version 4.1 of the package takes
    # the steps before rectification sets in with a negative rate, up the gradient.
    return _common(config) | {"degenerated_to_sgd": True}


def _ranger21(config: TrainConfig) -> dict[str, Any]:
    # arXiv 2106.13731. The learning rate is the recipe's: its own schedule, and with it the length of the run, is off.
    return _common(config) | {"num_iterations": 1, "disable_lr_scheduler": True}


OPTIMIZERS: dict[str, Factory] = {
    "adamw": _adamw,
    "radam": _radam,
    "anyprecision_adamw": _anyprecision_adamw,
    "adamw_8bit": _adamw_8bit,
    # arXiv 2010.07468: its eps is added to the variance in every step, where 1e-9 would rule; its own 1e-16 is kept.
    "adabelief": _packaged("AdaBelief", _without_eps),
    "adan": _packaged("Adan", _adan),
    "ademamix": _packaged("AdEMAMix", _ademamix),
    "adopt": _packaged("ADOPT", _common),  # arXiv 2411.02853
    "came": _packaged("CAME", _came),
    "lamb": _packaged("Lamb", _common),  # arXiv 1904.00962
    "lion": _packaged("Lion", _without_eps),  # arXiv 2302.06675: signs alone, nothing is divided
    "prodigy": _packaged("Prodigy", _prodigy),
    "ranger": _packaged("Ranger", _ranger),
    "ranger21": _packaged("Ranger21", _ranger21),
}
"""Every name of config.OptimizerName, and what makes it of trainable parameters and the recipe."""


ELEMENTWISE = frozenset({"adamw", "radam", "anyprecision_adamw", "adabelief", "adan", "ademamix", "adopt", "lion"})
"""Those that treat every number of a parameter alone, so that it does not matter how parameters are cut and joined."""


def make_optimizer(config: TrainConfig, module: nn.Module) -> Optimizer:
    """The recipe's optimizer of all trainable parameters of `module`, which is on its device already.

    Raises:
        StageError: the optimizer's package is missing, or does not run on this device.
    """
    return OPTIMIZERS[config.optimizer_name]([p for p in module.parameters() if p.requires_grad], config)


PARAMETERS, ATTRIBUTES = "parameters", "attributes"


@dataclass(frozen=True)
class OptimizerState:
    """All that an optimizer has learned, for one safetensors and one JSON file."""

    tensors: dict[str, Tensor]
    """On the host, contiguous, and shared with nothing. PARAMETER_NAME/KEY of each parameter's state tensors;
    groups/INDEX/KEY of a group's."""
    groups: list[dict[str, Any]]
    """Each group's options and counters, as JSON has them. PARAMETERS instead of the parameters: by name, in order, the
    numbers of each one's state, None where it has none. ATTRIBUTES, in the first: what the optimizer itself counts."""


class HasParameters(Protocol):
    """A module, for what is asked of it here."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]: ...


def optimizer_state(optimizer: Optimizer, module: HasParameters) -> OptimizerState:
    """A copy of the state of `optimizer`, whose parameters are `module`'s."""
    names = {p: name for name, p in module.named_parameters()}
    tensors: dict[str, Tensor] = {}
    groups: list[dict[str, Any]] = []

    def numbers_of(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
        tensors.update({f"{prefix}/{k}": _copied(v, "cpu") for k, v in state.items() if isinstance(v, Tensor)})
        plain = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    for index, group in enumerate(optimizer.param_groups):
        options = {k: v for k, v in group.items() if k != "params"}
        states = {names[p]: optimizer.state.get(p) for p in group["params"]}
        numbers = {name: numbers_of(name, state) if state else None for name, state in states.items()}
        groups.append(numbers_of(f"groups/{index}", options) | {PARAMETERS: numbers})
    # Where an optimizer keeps state beside `state` and its groups, as Ranger21 does, its state_dict has more keys.
    attributes = {k: v for k, v in optimizer.state_dict().items() if k not in ("state", "param_groups")}
    groups[0][ATTRIBUTES] = attributes
    return OptimizerState(tensors, groups)


def load_optimizer_state(optimizer: Optimizer, module: HasParameters, state: OptimizerState) -> None:
    """Give `optimizer`, whose parameters are `module`'s, the state of one that was made alike; it goes on to the bit.

    RECIPE_OPTIONS stay those of `optimizer`. Tensors get the type and the device that its own would have.

    Raises:
        ValueError: names, keys or shapes are not those that `optimizer` would have; every mismatch is listed, and
            nothing was changed.
    """
    names = {p: name for name, p in module.named_parameters()}
    tensors = dict(state.tensors)
    states: dict[Tensor, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    problems: list[str] = []
    if len(state.groups) != len(optimizer.param_groups):
        problems.append(f"{len(state.groups)} groups, expected {len(optimizer.param_groups)}")
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, state.groups, strict=False)):
        numbers = dict(saved.get(PARAMETERS, {}))
        models: dict[Any, dict[str, Any]] = {}
        known = set(group)
        for p in group["params"]:
            if names[p] not in numbers:
                problems.append(f"{names[p]}: missing")
            elif (plain := numbers.pop(names[p])) is not None:
                like = (p.shape, p.dtype, p.device)
                if like not in models:
                    models[like], keys = _layout(optimizer, group, p)
                    known |= keys
                states[p] = _fitted(plain | _taken(tensors, names[p]), models[like], names[p], problems)
        problems += [f"{name}: not a parameter of this optimizer" for name in numbers]
        options = {k: v for k, v in saved.items() if k not in (PARAMETERS, ATTRIBUTES)}
        options |= _taken(tensors, f"groups/{index}")
        problems += [f"groups/{index}/{key}: missing" for key in group if key not in options and key != "params"]
        problems += [f"groups/{index}/{key}: not an option of this optimizer" for key in options if key not in known]
        device = group["params"][0].device
        kept = {k: v for k, v in options.items() if k not in RECIPE_OPTIONS}
        groups.append({k: _copied(v, device) if isinstance(v, Tensor) else v for k, v in kept.items()})
    problems += [f"{key}: not state of this optimizer" for key in tensors]
    if problems:
        raise ValueError("the optimizer's state does not fit:" + "".join(f"\n  {problem}" for problem in problems))
    optimizer.state.clear()
    if attributes := state.groups[0].get(ATTRIBUTES):
        optimizer.load_state_dict(optimizer.state_dict() | attributes)  # with no state, which it would convert
    optimizer.state.update(states)
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        group.update(options)


def _copied(tensor: Tensor, device: torch.device | str) -> Tensor:
    return tensor.detach().to(device, copy=True).contiguous()


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What `tensors` holds as prefix/KEY, by key; no longer in it afterwards."""
    return {key.rpartition("/")[2]: tensors.pop(key) for key in list(tensors) if key.rpartition("/")[0] == prefix}


def _layout(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> tuple[dict[str, Any], set[str]]:
    """The state that a step of `optimizer` would give a parameter like this one, and the keys that `group` would have.

    Which tensors there are, their shapes and types, and whether a count of steps is a number, on the host or on the
    device: each optimizer knows for itself. So a twin of it takes a step with a stand-in for the parameter.
    """
    stand_in = nn.Parameter(torch.ones_like(parameter))
    stand_in.grad = torch.ones_like(stand_in)
    twin: Optimizer = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    for name in ("found_inf", "grad_scale"):
        vars(twin).pop(name, None)
    twin._optimizer_step_pre_hooks, twin._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    options = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
    twin.state, twin.param_groups = defaultdict(dict), [options | {"params": [stand_in]}]
    type(twin).step(twin)  # past a scheduler's wrapper, which knows only `optimizer`
    return twin.state[stand_in], set(twin.param_groups[0])


def _fitted(found: dict[str, Any], model: dict[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    """`found` with the tensors in the types and places of those in `model`; adds what does not fit to `problems`."""
    problems += [f"{name}/{key}: missing" for key in model if key not in found]
    problems += [f"{name}/{key}: not state of this optimizer" for key in found if key not in model]
    fitted = {}
    for key in found.keys() & model.keys():
        value, wanted = found[key], model[key]
        if _shape(value) != _shape(wanted):
            problems.append(f"{name}/{key}: {_shape(value)}, expected {_shape(wanted)}")
        elif isinstance(value, Tensor):
            fitted[key] = _copied(value, wanted.device).to(wanted.dtype)
        else:
            fitted[key] = value
    return {key: fitted[key] for key in model if key in fitted}


def _shape(value: Any) -> list[int] | str:
    return list(value.shape) if isinstance(value, Tensor) else "a number"


def step_if(optimizer: Optimizer, good: Tensor) -> None:
    """One step if `good` [] is true, else none; the host waits for the device only where the optimizer cannot decide.

    Optimizers that can (fused AdamW, AnyPrecisionAdamW) do so by the protocol of `torch.amp.GradScaler`.
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
