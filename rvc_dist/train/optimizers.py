"""AnyPrecisionAdamW and the other optimizers, what a checkpoint keeps of one, and the learning rate."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rvc_dist.choices import OPTIMIZERS, resolve
from rvc_dist.config import OptimConfig, TrainConfig
from rvc_dist.runtime.device import synchronize
from rvc_dist.workspace import StageError

if TYPE_CHECKING:
    from rvc_dist.train.adamw_kernel import Kernel

logger = logging.getLogger(__name__)

CPU_RUN, DEVICE_RUN = 1 << 17, 1 << 22
"""Elements that AnyPrecisionAdamW updates at a time: a thread's share of the cache; elsewhere enough to fill a GPU."""
PROBE_WEIGHTS, SLOWER = 1 << 25, 1.3
"""Weights that `report_speed` updates: a network's; and how many times fused AdamW's time are worth a warning."""
FUSED_DEVICES = ("cpu", "cuda", "xpu")
"""Where PyTorch has a fused AdamW that skips bad steps: that of MPS takes `found_inf` and ignores it."""
RECIPE_OPTIONS = frozenset({"betas", "eps", "weight_decay", "safeguard_warmup", "foreach", "fused"})
"""What the recipe and the device decide, not the checkpoint: a changed setting is honoured when a run goes on."""


class AnyPrecisionAdamW(Optimizer):
    """AdamW (arXiv 1711.05101) with float32 parameters and a momentum in bfloat16.

    Momentum takes half its memory; the variance keeps `variance_dtype`. With `kahan`, the rounding error of each
    update is carried in bfloat16 to the next (Kahan summation), for parameters that are themselves bfloat16. All
    arithmetic is done in float32: on a GPU by one kernel for all parameters, elsewhere over runs of them that fit the
    cache, so a step reads and writes each tensor once and its temporaries are small.

    The host never waits for the device: the count of steps is a number in each group. A step is skipped as
    `torch.amp.GradScaler` asks for it: with an attribute `found_inf` (one element on the parameters' device) that is
    not zero, parameters, state and count stay as they are to the bit, whatever the gradients hold. On a GPU that is
    decided there, and the count then lives there too. An attribute `grad_scale` divides the gradients.
    """

    _step_supports_amp_scaling = True
    host_devices: tuple[str, ...] = ("cpu", "mps")
    """Where looking at `found_inf` costs nothing, or there is no float64 to count in; elsewhere the device masks."""
    kernel_devices: tuple[str, ...] = ("cuda",)
    """Where `adamw_kernel` is used, if Triton is there."""

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
        self._kernel: Kernel | None = None
        self._kernel_tried = False

    def _state_of(self, parameter: Tensor) -> list[Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        for key, dtype in self.dtypes.items():
            if key not in state:
                state[key] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
            elif state[key].dtype != dtype:  # Optimizer.load_state_dict gives state the parameter's type
                state[key] = state[key].to(dtype)
        return list(state.values())

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
            self._step_group(group, found_inf)
        return loss

    def _step_group(self, group: dict[str, Any], found_inf: Tensor | None) -> None:
        """One step; `found_inf` has one element on the device, None where the host knows that the step is wanted."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        device = params[0].device
        weights = [p.contiguous() for p in params]  # the parameter itself, unless its memory has another order
        rows = [(w, p.grad.contiguous(), *self._state_of(p)) for p, w in zip(params, weights, strict=True)]
        if (kernel := self._kernel_for(device, rows)) is not None:
            kernel.step(group, rows, found_inf)
        else:
            skip = None if found_inf is None else found_inf.reshape(()) != 0
            group["step"] = group["step"] + (1 if skip is None else (~skip).double())
            self._step_runs(group, rows, skip)
        for parameter, weight in zip(params, weights, strict=True):
            if weight is not parameter:
                parameter.copy_(weight)

    def _kernel_for(self, device: torch.device, rows: Sequence[tuple[Tensor, ...]]) -> Kernel | None:
        """The kernel, where there is one for these rows; where it fails, the log says why, once."""
        if device.type not in self.kernel_devices or getattr(self, "grad_scale", None) is not None:
            return None
        if not self._kernel_tried:
            self._kernel_tried = True
            try:
                from rvc_dist.train.adamw_kernel import Kernel

                self._kernel = Kernel.tried(device)
            except (ImportError, RuntimeError) as error:
                logger.warning(
                    f"anyprecision_adamw runs without its kernel, with ten times the memory traffic: {error}; install "
                    "triton and a C compiler, or set train.optimizer adamw"
                )
        return self._kernel if self._kernel is not None and self._kernel.takes(rows) else None

    def _step_runs(self, group: dict[str, Any], rows: Sequence[tuple[Tensor, ...]], skip: Tensor | None) -> None:
        weights, device = [row[0] for row in rows], rows[0][0].device
        limit = CPU_RUN * torch.get_num_threads() if device.type == "cpu" else DEVICE_RUN
        # Memory fresh from the operating system costs more than the arithmetic on it: every run uses the same.
        longest = min(limit, sum(w.numel() for w in weights))
        work = torch.empty(3, longest, dtype=torch.promote_types(weights[0].dtype, torch.float32), device=device)
        for run in _runs(rows, limit):
            self._step_run(group, run, skip, work)

    def _step_run(
        self, group: dict[str, Any], run: list[tuple[Tensor, ...]], skip: Tensor | None, work: Tensor
    ) -> None:
        """One step for flat pieces of parameters, their gradients, and each of their state tensors."""
        columns = [list(column) for column in zip(*run, strict=True)]
        changing = [columns[0], *columns[2:]]
        sizes = [piece.numel() for piece in columns[0]]
        if (grad_scale := getattr(self, "grad_scale", None)) is not None:
            columns[1] = [gradient / grad_scale for gradient in columns[1]]
        before = [] if skip is None else [torch.cat(column) for column in changing]
        _adamw_(group, *columns, work=[list(torch.split(row[: sum(sizes)], sizes)) for row in work])
        for column, old in zip(changing, before, strict=False):
            assert skip is not None
            torch._foreach_copy_(column, torch.split(torch.where(skip, old, torch.cat(column)), sizes))


def _runs(rows: Iterable[tuple[Tensor, ...]], limit: int) -> Iterator[list[tuple[Tensor, ...]]]:
    """Contiguous tensors of equal size, row by row, as flat pieces in runs of at most `limit` elements."""
    run: list[tuple[Tensor, ...]] = []
    size = 0
    for row in rows:
        flat = tuple(tensor.view(-1) for tensor in row)
        pieces = [flat] if flat[0].numel() <= limit else list(zip(*(torch.split(t, limit) for t in flat), strict=True))
        for piece in pieces:
            if run and size + piece[0].numel() > limit:
                yield run
                run, size = [], 0
            run.append(piece)
            size += piece[0].numel()
    yield run


def _adamw_(
    group: dict[str, Any],
    parameters: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    variances: list[Tensor],
    *compensations: list[Tensor],
    work: list[list[Tensor]],
) -> None:
    """Change parameters, momenta, variances and any Kahan compensations; `work` is three lists to compute in."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    # Numbers, or float64 tensors [] on the device: 1 - 0.99 ** 1 has no more than five digits in float32.
    bias1, bias2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
    change, exact, old = work
    gradients = [gradient.to(change[0].dtype) for gradient in gradients]
    torch._foreach_copy_(change, momenta)
    torch._foreach_mul_(change, beta1)
    torch._foreach_add_(change, gradients, alpha=1 - beta1)
    torch._foreach_copy_(momenta, change)
    is_exact = variances[0].dtype == change[0].dtype
    squares = variances if is_exact else exact
    if not is_exact:
        torch._foreach_copy_(squares, variances)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
    if not is_exact:
        torch._foreach_copy_(variances, squares)
    denominator = torch._foreach_sqrt(squares)
    torch._foreach_mul_(denominator, bias2**-0.5)
    torch._foreach_add_(denominator, group["eps"])
    torch._foreach_div_(change, denominator)
    torch._foreach_mul_(change, -lr / bias1)
    torch._foreach_add_(change, parameters, alpha=-lr * group["weight_decay"])
    if not compensations:
        torch._foreach_add_(parameters, change)
        return
    torch._foreach_add_(change, compensations[0])
    torch._foreach_copy_(old, parameters)
    torch._foreach_add_(parameters, change)
    torch._foreach_copy_(denominator, parameters)
    torch._foreach_sub_(denominator, old)
    torch._foreach_sub_(change, denominator)
    torch._foreach_copy_(compensations[0], change)


def adamw(params: list[nn.Parameter], **options: Any) -> Optimizer:
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in params)
    return torch.optim.AdamW(params, **options, fused=fused, foreach=not fused)


def anyprecision_adamw(params: list[nn.Parameter], variance_dtype: str, **options: Any) -> Optimizer:
    return AnyPrecisionAdamW(params, **options, variance_dtype=getattr(torch, variance_dtype))


def adamw_8bit(params: list[nn.Parameter], **options: Any) -> Optimizer:
    """AdamW with both moments in 8 bits (arXiv 2110.02861)."""
    kind = resolve("bitsandbytes.optim:AdamW8bit")
    device = params[0].device
    # Which devices it has kernels for depends on its version and on the CUDA libraries it finds: try one block.
    trial = nn.Parameter(torch.zeros(4096, device=device))
    trial.grad = torch.ones_like(trial)
    try:
        kind([trial]).step()
    except RuntimeError as error:
        raise StageError(
            f"train.optimizer: adamw_8bit does not run on {device} with the bitsandbytes that is installed ({error});",
            "update bitsandbytes, or set train.optimizer anyprecision_adamw",
        ) from error
    if device.type == "cpu":
        logger.warning("train.optimizer: adamw_8bit saves memory on the CPU too, but takes many times adamw's time")
    optimizer: Optimizer = kind(params, **options)
    return optimizer


def make_optimizer(config: TrainConfig, module: nn.Module) -> Optimizer:
    """The recipe's optimizer of all trainable parameters of `module`, which is on its device already.

    Raises:
        StageError: the optimizer's package is missing, or does not run on this device.
    """
    spec = OPTIMIZERS[config.optimizer_name]
    params = [p for p in module.parameters() if p.requires_grad]
    try:
        optimizer: Optimizer = resolve(spec.make)(params, **spec.options(config))
    except ImportError as error:
        if spec.package is None:
            raise
        raise StageError(*spec.package.missing(f"train.optimizer {config.optimizer_name}", error)) from error
    return optimizer


def report_speed(config: TrainConfig, device: torch.device) -> None:
    """Measure on a GPU, for anyprecision_adamw, whether fused AdamW would be faster there, and log it."""
    if config.optimizer_name != "anyprecision_adamw" or device.type != "cuda":
        return
    others = replace(config, bf16_adamw=False, optimizer="adamw")
    ours_s, fused_s = (step_seconds(c, device) for c in (config, others))
    times = f"{ours_s * 1e3:.2f} ms for {PROBE_WEIGHTS / 1e6:.0f} million weights, fused AdamW {fused_s * 1e3:.2f} ms"
    logger.info(f"optimizer: anyprecision_adamw takes {times}")
    if ours_s > SLOWER * fused_s:
        logger.warning(
            f"train.optimizer: anyprecision_adamw is slower than adamw on this device ({times}); adamw, "
            "with train.precision bf16 instead of train.bf16_adamw, is faster and takes 2 bytes a weight more"
        )


def step_seconds(config: TrainConfig, device: torch.device) -> float:
    """Of the recipe's optimizer, for PROBE_WEIGHTS weights on `device`."""
    module = nn.ParameterList(torch.zeros(PROBE_WEIGHTS // 32, device=device) for _ in range(32))
    optimizer, good = make_optimizer(config, module), torch.ones((), dtype=torch.bool, device=device)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    for repeats in (3, 20):  # the first compile and allocate
        synchronize(device)
        began_at = time.perf_counter()
        for _ in range(repeats):
            step_if(optimizer, good)
        synchronize(device)
        seconds = (time.perf_counter() - began_at) / repeats
    return seconds


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


def learning_rate(
    config: TrainConfig,
    step: int,
    epoch: int,
    total_steps: int,
    num_ranks: int,
    first: float | None = None,
    joins_at: int = 0,
) -> float:
    """The learning rate of step `step` in epoch `epoch` (both from 0): a pure function, so resuming needs no state.

    It begins at `first`, by default `config.learning_rate`. A network that joins at a later step warms up from there.
    A global batch that is kept counts in the place of ranks.
    """
    size = num_ranks if config.keep_global_batch is None else config.keep_global_batch / config.batch_size
    scale = {"none": 1.0, "sqrt": math.sqrt(size), "linear": float(size)}[config.lr_scaling]
    rate = (first or config.learning_rate) * scale
    since = max(0, step - joins_at + 1)
    if step < config.warmup_steps:
        return rate * since / config.warmup_steps
    rate *= min(1.0, since / max(1, config.warmup_steps))
    if config.lr_schedule == "exponential":
        return float(rate * config.lr_decay**epoch)
    if config.lr_schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return rate
