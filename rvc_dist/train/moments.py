"""The moments of Adam in another tool's training file: an import keeps them by name, and a run begins with them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rvc_dist.files import ForeignFileError
from rvc_dist.models.state_dict import from_upstream
from rvc_dist.models.torch_file import load_pth, weights
from rvc_dist.train.ddp import TrainedModule
from rvc_dist.train.optimizers import PARAMETERS

logger = logging.getLogger(__name__)

ADAMS = ("adamw", "radam", "anyprecision_adamw")
"""Optimizers here that go on from these moments: they define them as Adam does (arXiv 1412.6980)."""
MOMENTS, STEP = ("exp_avg", "exp_avg_sq"), "step"
KEPT = "moments"
"""Key of a file that an import keeps: PARAMETER_NAME/KEY of each moment, as `OptimizerState.tensors` has them."""


def read(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """The moments in a G_*.pth or D_*.pth for those parameters of `module` that are shaped like its own.

    They are numbered there, in the order of the file's weights.

    Raises:
        ForeignFileError: there are none, or they are not those of the network in the file.
    """
    ours, file = dict(module.named_parameters()), load_pth(path)
    names = [name for name in from_upstream(weights(file.get("model", {}))) if name in ours]  # no buffers
    optimizer = file.get("optimizer")
    states = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(states, dict) or not states:
        raise ForeignFileError("there are none")
    if not all(type(i) is int and isinstance(state, dict) for i, state in states.items()):
        raise ForeignFileError("they are not numbered as those of PyTorch's optimizers")
    if max(states) >= len(names) or min(states) < 0:
        raise ForeignFileError(f"they are those of {len(states)} parameters, the network has {len(names)}")
    found: dict[str, Tensor] = {}
    for number, state in states.items():
        if not {*MOMENTS, STEP} <= state.keys():
            raise ForeignFileError(f"they are not Adam's, but {', '.join(map(str, state))[:80]}")
        name = names[number]
        tensors = {key: torch.as_tensor(state[key], dtype=torch.float32) for key in (*MOMENTS, STEP)}
        weights(tensors)
        if min(tensors["exp_avg_sq"].min(), tensors[STEP]) < 0 or tensors[STEP].shape:
            raise ForeignFileError(f"those of {name} are none: a square or a count of steps below 0")
        shapes = {tuple(tensors[key].shape) for key in MOMENTS} | {tuple(ours[name].shape)}
        if len(shapes) == 1 and ours[name].requires_grad:
            found |= {f"{name}/{key}": tensor for key, tensor in tensors.items()}
    return found


def begin_with(network: TrainedModule, file: Path, optimizer: str) -> None:
    """Give a new `network` the moments that are kept in the `file` of its first weights, if there are any."""
    kept = load_pth(file).get(KEPT)
    if not kept:
        return
    tensors = weights(kept)
    state = network.optimizer_state(True)
    try:
        if state is None or optimizer not in ADAMS:
            raise ValueError(f"{optimizer} has others, expected one of {', '.join(ADAMS)}")
        group = state.groups[0]
        names = {key.rpartition("/")[0] for key in tensors}
        group[PARAMETERS] |= {name: {} for name in names & group[PARAMETERS].keys()}
        if STEP in group:  # AnyPrecisionAdamW counts once for all
            group[STEP] = int(max(t for key, t in tensors.items() if key.endswith(f"/{STEP}")))
            tensors = {key: t for key, t in tensors.items() if not key.endswith(f"/{STEP}")}
        network.load(network.module.state_dict(), replace(state, tensors=state.tensors | tensors))
    except ValueError as error:
        logger.warning("%s: the moments of the optimizer are left out: %s", file, error)
    else:
        logger.info("%s: the optimizer goes on with the moments of %d parameters", file, len(names))
