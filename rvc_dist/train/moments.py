"""The moments of Adam in another tool's training file: an import keeps them by name, and a run begins with them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rvc_dist.files import ForeignFileError
from rvc_dist.models.torch_file import load_pth, weights
from rvc_dist.models.weights_file import WeightsFile
from rvc_dist.schema import MAX_INT
from rvc_dist.train.ddp import TrainedModule
from rvc_dist.train.optimizers import PARAMETERS

logger = logging.getLogger(__name__)

ADAMS = ("adamw", "radam", "anyprecision_adamw")
"""Optimizers here that go on from these moments: they define them as Adam does (arXiv 1412.6980)."""
STEP = "step"
KINDS = ("exp_avg", "exp_avg_sq", STEP)
KEPT = "moments"
"""Key of a file that an import keeps: PARAMETER_NAME/KEY of each moment, as `OptimizerState.tensors` has them."""


def read(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """The moments in a G_*.pth or D_*.pth for those parameters of `module` that are shaped like its own.

    They are numbered there, in the order of the file's weights.

    Raises:
        ForeignFileError: there are none, or they are not those of the network in the file.
    """
    ours, file = dict(module.named_parameters()), WeightsFile.read(path)
    names = [name for name in file.state if name in ours]  # no buffers
    optimizer = file.data.get("optimizer")
    states = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(states, dict) or not states:
        raise ForeignFileError("there are none")
    if not all(type(i) is int and 0 <= i < len(names) and isinstance(state, dict) for i, state in states.items()):
        raise ForeignFileError(f"they are not numbered as the {len(names)} parameters of its network are")
    found: dict[str, Tensor] = {}
    for number, state in states.items():
        name = names[number]
        step = state.get(STEP)
        if type(step) in (int, float) and abs(step) < MAX_INT:
            state = state | {STEP: torch.tensor(float(step))}
        tensors = weights({key: state[key] for key in KINDS if key in state})
        _check(name, tensors, file.state[name].shape)
        if file.state[name].shape == ours[name].shape and ours[name].requires_grad:
            found |= {f"{name}/{key}": tensor.float() for key, tensor in tensors.items()}
    return found


def _check(name: str, moments: Mapping[str, Tensor], shape: torch.Size) -> None:
    """Raises ForeignFileError unless these are the moments of a parameter of that `shape`."""
    if moments.keys() != {*KINDS}:
        raise ForeignFileError(f"those of {name} are not Adam's ({', '.join(KINDS)})")
    if [tuple(moments[key].shape) for key in KINDS] != [tuple(shape), tuple(shape), ()]:
        raise ForeignFileError(f"those of {name} are not shaped like it")
    if moments["exp_avg_sq"].min() < 0 or moments[STEP] < 0:
        raise ForeignFileError(f"those of {name} have a square or a count of steps below 0")


def begin_with(network: TrainedModule, file: Path, optimizer: str, without: str = "") -> None:
    """Give a new `network` the moments that are kept in the `file` of its first weights, if there are any.

    Those of the parameter `without` are not: its weights are others.
    """
    kept = load_pth(file).get(KEPT)
    if not kept:
        return
    parameters = dict(network.module.named_parameters())
    try:
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, tensor in weights(kept).items():
            name, _, kind = key.rpartition("/")
            if name in parameters and name != without:
                by_name.setdefault(name, {})[kind] = tensor
        for name, moments in by_name.items():
            _check(name, moments, parameters[name].shape)
        state = network.optimizer_state(True)
        if state is None or optimizer not in ADAMS:
            raise ForeignFileError(f"{optimizer} has others, expected one of {', '.join(ADAMS)}")
        group = state.groups[0]
        group[PARAMETERS] |= {name: {} for name in by_name}
        if STEP in group:  # AnyPrecisionAdamW counts once for all
            group[STEP] = max(int(moments.pop(STEP)) for moments in by_name.values())
        tensors = {f"{name}/{kind}": m for name, moments in by_name.items() for kind, m in moments.items()}
        network.load(network.module.state_dict(), replace(state, tensors=state.tensors | tensors))
    except ValueError as error:
        logger.warning("%s: the moments of the optimizer are left out: %s", file, error)
    else:
        logger.info("%s: the optimizer goes on with the moments of %d parameters", file, len(by_name))
