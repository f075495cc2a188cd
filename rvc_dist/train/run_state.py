"""What a checkpoint holds of a run, both ways: networks, optimizers, loss scales, meters, and where it stands."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from rvc_dist.config import Recipe
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.state_dict import SPEAKER_TABLE
from rvc_dist.train import checkpoint, moments, networks
from rvc_dist.train.ddp import TrainedModule
from rvc_dist.train.ema import Ema
from rvc_dist.train.metrics import Meter
from rvc_dist.train.progress import Progress
from rvc_dist.train.sampler import Sampling
from rvc_dist.workspace import Speakers, StageError, Workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where a run begins: new networks, or its newest checkpoint. The same on all ranks."""

    shape: GeneratorShape
    modules: dict[str, nn.Module]
    """By checkpoint.MODELS, on the host; `resume` gives them a checkpoint's weights."""
    identity: dict[str, Any]
    """What its checkpoints must agree on."""
    data: dict[str, Any]
    """`fingerprint.of_data`; but on the main rank, without what grows with the recordings."""
    progress: Progress
    speakers: Speakers
    sampling: Sampling = field(default_factory=Sampling)


def resume(
    recipe: Recipe,
    accelerator: Accelerator,
    saved: checkpoint.Checkpoint,
    progress: Progress,
    modules: Mapping[str, TrainedModule],
    meter: Meter,
    ema: Ema | None = None,
) -> None:
    """Fill the networks, their optimizers, the average and the meter; training goes on from `progress`."""
    num_ranks = accelerator.num_processes
    load_weights(saved, modules, Workspace(recipe.run_dir, recipe.name), ema)
    meter.load(saved.meter, accelerator.process_index, num_ranks, accelerator.device)
    logger.info(f"continuing from step {progress.step}, epoch {progress.epoch}")
    if saved.num_ranks != num_ranks:
        num_clips = recipe.train.global_batch(num_ranks)
        logger.warning(
            f"the checkpoint was made on {saved.num_ranks} ranks, this run has {num_ranks}: it continues from the same "
            f"weights, optimizers and place in the data, with steps of {num_clips} clips"
        )


def begin(recipe: Recipe, modules: Mapping[str, TrainedModule]) -> None:
    """Give new optimizers what an import kept of the experiment's beside the weights that the networks begin with."""
    for name, key in networks.PRETRAINED.items():
        if (file := getattr(recipe.train, key)) is not None:
            without = SPEAKER_TABLE if recipe.train.fresh_speakers else ""
            moments.begin_with(modules[name], Path(file), recipe.train.optimizer_name, without)


def load_weights(
    saved: checkpoint.Checkpoint, modules: Mapping[str, TrainedModule], work: Workspace, ema: Ema | None = None
) -> None:
    """Fill the networks, their optimizers and the average, which begins with the weights where `saved` has none.

    Raises:
        StageError: the state of an optimizer does not fit.
    """
    saved = networks.with_speakers(saved, len(modules["generator"].module.get_parameter(SPEAKER_TABLE)))
    for name, module in modules.items():
        try:
            module.load(saved.models[name], saved.optimizers[name])
            if module.scale is not None and name in saved.loss_scales:
                module.scale.load(saved.loss_scales[name])
        except ValueError as error:
            raise StageError(
                f"{work.checkpoints_dir}: step {saved.progress.step} does not fit the {name}'s optimizer;",
                "change train.optim back, or give the run another run_dir",
                f": {error}",
            ) from error
    if ema is not None and saved.ema:
        ema.load(saved.ema)
    elif ema is not None:
        ema.begin()
        logger.info(f"train.ema_decay: the average of G's weights begins with those of step {saved.progress.step}")
    elif saved.ema:
        logger.info(f"train.ema_decay is 0: the average of G's weights up to step {saved.progress.step} is given up")


def make_checkpoint(
    accelerator: Accelerator,
    origin: Origin,
    progress: Progress,
    modules: Mapping[str, TrainedModule],
    meter: Meter,
    work: Workspace,
    why: checkpoint.Why,
    ema: Ema | None = None,
) -> checkpoint.Checkpoint | None:
    """What the main rank is to write, None elsewhere; every rank has to ask for it.

    Its weights share the memory of the networks.

    Raises:
        StageError: a weight is not a finite number (on every rank alike).
    """
    weights = [w.detach() for module in modules.values() for w in module.module.parameters()]
    if not torch.stack([w.isfinite().all() for w in weights]).all():
        raise StageError(
            f"step {progress.step}: a weight is not finite;",
            f"lower train.learning_rate or set train.max_grad_norm. The checkpoints in {work.checkpoints_dir} are from "
            "before",
        )
    meter_state = meter.state(accelerator)
    states = {name: module.optimizer_state(accelerator.is_main_process) for name, module in modules.items()}
    if not accelerator.is_main_process:
        return None
    return checkpoint.Checkpoint(
        progress=progress,
        identity=origin.identity,
        models={name: module.module.state_dict() for name, module in modules.items()},
        optimizers={name: state for name, state in states.items() if state is not None},
        loss_scales={name: module.scale.state() for name, module in modules.items() if module.scale is not None},
        meter=meter_state,
        num_ranks=accelerator.num_processes,
        speakers=origin.speakers,
        data=origin.data,
        why=why,
        ema=ema.state_dict() if ema is not None else {},
    )
