"""What a run needs before its first step: its clips, the checkpoint it goes on from, its networks, its run folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from rvc_dist.config import Recipe
from rvc_dist.data import clip_files
from rvc_dist.features import feature_files
from rvc_dist.files import write_json
from rvc_dist.models.modules import use_channels_last
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.state_dict import SPEAKER_TABLE
from rvc_dist.runtime.accelerator import on_first_rank
from rvc_dist.runtime.device import BACKENDS
from rvc_dist.runtime.launcher import zero_stage
from rvc_dist.train import checkpoint, compilation, fingerprint, holdout, moments, networks, out_of_memory
from rvc_dist.train.dataset import ClipTable
from rvc_dist.train.ddp import GradientReducer, TrainedModule
from rvc_dist.train.deepspeed import ZeroNetwork
from rvc_dist.train.loader import StepLoader
from rvc_dist.train.loss_scale import LossScale
from rvc_dist.train.metrics import Meter
from rvc_dist.train.optimizers import make_optimizer
from rvc_dist.train.progress import Progress, total_steps
from rvc_dist.train.step import GanStep, autocast
from rvc_dist.workspace import Speakers, StageError, Workspace, read_json

logger = logging.getLogger(__name__)


class Networks(TypedDict):
    generator: bool
    discriminator: bool


class OldCompiled(TypedDict):
    key: dict[str, Any]
    compiled: Networks


class Compiled(OldCompiled, total=False):
    """RUN/compile.json."""

    channels_last: Networks
    """Older files, whose key is never a run's, lack it."""


def load_clips(recipe: Recipe, work: Workspace) -> ClipTable:
    """The run's clips, made with this recipe.

    Raises:
        StageError: the features are missing, of other settings, or of another run.
    """
    table = ClipTable.load(recipe)
    work.check_name()
    clip_files.check_made(recipe, work)
    feature_files.check_made(recipe, work)
    return table


def report_holdout(recipe: Recipe, table: ClipTable) -> None:
    """Log what of each speaker is held out."""
    for level, line in holdout.report(table.shares, recipe.data.holdout):
        logger.log(level, line)
    if recipe.train.overtrain_detect and not table.holdout:
        logger.warning("train.overtrain_detect does nothing: no clip is held out to see overtraining on")


@dataclass(frozen=True)
class Origin:
    """Where a run begins: new networks, or its newest checkpoint. The same on all ranks."""

    shape: GeneratorShape
    modules: dict[str, nn.Module]
    """By checkpoint.MODELS, on the host; `resume` gives them a checkpoint's weights."""
    identity: dict[str, Any]
    """What its checkpoints must agree on."""
    data: dict[str, Any]
    """`fingerprint.of_data`."""
    progress: Progress
    speakers: Speakers


def find_origin(
    recipe: Recipe, accelerator: Accelerator, work: Workspace, table: ClipTable
) -> tuple[Origin, checkpoint.Checkpoint | None]:
    """Networks for the clips of `table`, and the run's newest checkpoint, verified, if it has one.

    Raises:
        StageError: the checkpoint is damaged, was made with other settings, or of other recordings alone; or
            pretrained weights do not fit.
    """
    if recipe.multiscale_mel_loss and not recipe.train.multiscale_mel_loss:
        logger.info(f"train.multiscale_mel_loss is switched on: {recipe.model.vocoder} is always trained with it")
    path, saved = checkpoint.newest(accelerator, work.checkpoints_dir) or (None, None)
    shape, modules = networks.build(recipe, table, saved.identity if saved else None)
    identity, data = networks.identity(recipe, shape, table), fingerprint.of_data(recipe, table)
    progress, trained = Progress(), table.trained_speakers
    if path is not None and saved is not None:
        on_first_rank(accelerator, partial(checkpoint.check_identity, path, saved.identity, identity))
        on_first_rank(accelerator, partial(fingerprint.check, path, saved.data, data))
        progress = fingerprint.adjusted(saved.progress, saved.data, data)
        trained += saved.speakers.trained
    return Origin(shape, modules, identity, data, progress, Speakers.of(work.speakers().info, trained)), saved


def budget(recipe: Recipe, table: ClipTable, loader: StepLoader, done: Progress) -> int:
    """Steps of the whole run; the log says what that is in epochs and clips."""
    sampler, num_clips = loader.sampler, len(table.train)
    per_epoch, num_padding = sampler.steps_per_epoch, sampler.num_padding_clips
    total = total_steps(recipe.train, per_epoch, loader.left_in_epoch, done)
    epochs = total / per_epoch
    logger.info(
        f"budget: {total} steps, {epochs:.1f} epochs of {per_epoch} steps, {round(epochs * num_clips)} clips seen of "
        f"{num_clips} ({len(table.holdout)} held out); global batch {sampler.global_batch_size}"
    )
    logger.info(
        f"every clip is seen once an epoch; ranks without one in the last batch of an epoch get {num_padding} padding "
        f"clips ({num_padding / num_clips:.1%}), which count for nothing"
    )
    if sampler.exceeds_dataset:
        logger.warning(
            f"the global batch of {sampler.global_batch_size} is more than a quarter of the {num_clips} clips: an "
            f"epoch has only {per_epoch} steps; fewer ranks or a smaller train.batch_size would learn more from the "
            "same data"
        )
    return total


def choose_compiled(
    recipe: Recipe, accelerator: Accelerator, work: Workspace, origin: Origin, total: int, loader: StepLoader
) -> dict[str, bool]:
    """Which networks to compile for a run of `total` steps: as it did before, else by a trial with its next batch.

    Their memory layout, which the same trial finds, is set already.
    """
    config, device, modules = recipe.train, accelerator.device, origin.modules
    if not (compilation.asked_for(config) and BACKENDS[device.type].compiles):
        return dict.fromkeys(modules, False)
    key = compilation.key(config, device, total)
    kept = read_json(work.compile_file, Compiled) if work.compile_file.is_file() else None
    (kept,) = broadcast_object_list([kept])
    if kept is not None and kept["key"] == key:
        for name, on in kept.get("channels_last", {}).items():
            use_channels_last(modules[name], bool(on))
        chosen: dict[str, bool] = dict(kept["compiled"])
        return chosen
    compiled = {name: compilation.compiled(module, device, config) for name, module in modules.items()}
    optimizers = {name: make_optimizer(config, module) for name, module in modules.items()}
    batch = loader.next_batch(origin.progress)

    def trial(which: Mapping[str, bool]) -> GanStep:
        calls = {name: compiled[name] if which.get(name) else module for name, module in modules.items()}
        return GanStep(recipe, {n: TrainedModule(m, calls[n], calls[n], optimizers[n]) for n, m in modules.items()})

    with out_of_memory.advice(trial({}), batch, accelerator.process_index):
        steps_left = total - origin.progress.step
        layout = compilation.choose_layout(
            config, accelerator, modules, lambda: trial({}).local_dry_run(batch), steps_left
        )
        chosen = compilation.choose(
            config, accelerator, checkpoint.MODELS, lambda which: trial(which).local_dry_run(batch), steps_left
        )
    if accelerator.is_main_process:
        write_json(work.compile_file, {"key": key, "compiled": chosen, "channels_last": layout})
    return chosen


def prepare_networks(
    recipe: Recipe,
    accelerator: Accelerator,
    work: Workspace,
    origin: Origin,
    total: int,
    loader: StepLoader,
    on_send: Callable[[], None],
) -> tuple[dict[str, TrainedModule], dict[str, bool], GradientReducer]:
    """The networks of a run of `total` steps with their optimizers, averaged over the ranks.

    Returns:
        The networks, which of them are compiled, and what sends their gradients; `on_send` is called at each sending.
    """
    modules = {name: module.to(accelerator.device) for name, module in origin.modules.items()}
    compiled = choose_compiled(recipe, accelerator, work, origin, total, loader)
    reducer = GradientReducer(recipe.train.grad_compression == "bf16", on_send)
    made = {name: _trained(recipe, accelerator, modules[name], yes, reducer) for name, yes in compiled.items()}
    return made, compiled, reducer


def _trained(
    recipe: Recipe, accelerator: Accelerator, module: nn.Module, is_compiled: bool, reducer: GradientReducer
) -> TrainedModule:
    config, device = recipe.train, accelerator.device
    compiled = compilation.compiled(module, device, config) if is_compiled else module
    optimizer = make_optimizer(config, module)
    if zero_stage(accelerator):
        in_step = autocast(device, config.autocast_precision)
        return ZeroNetwork.prepare(accelerator, module, compiled, optimizer, reducer, in_step)
    scale = LossScale(device) if config.autocast_precision == "fp16" else None
    network = TrainedModule(module, compiled, accelerator.prepare_model(compiled), optimizer, scale=scale)
    reducer.attach(network.wrapped)
    return network


def resume(
    recipe: Recipe,
    accelerator: Accelerator,
    saved: checkpoint.Checkpoint,
    progress: Progress,
    modules: Mapping[str, TrainedModule],
    meter: Meter,
) -> None:
    """Fill the networks, their optimizers and the meter; training goes on from `progress`."""
    num_ranks = accelerator.num_processes
    load_weights(saved, modules, Workspace(recipe.run_dir, recipe.name))
    meter.load(saved.meter, accelerator.process_index, num_ranks, accelerator.device)
    logger.info(f"continuing from step {progress.step}, epoch {progress.epoch}")
    if saved.num_ranks != num_ranks:
        num_clips = recipe.train.batch_size * recipe.train.grad_accum_steps * num_ranks
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


def load_weights(saved: checkpoint.Checkpoint, modules: Mapping[str, TrainedModule], work: Workspace) -> None:
    """Fill the networks and their optimizers.

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


def make_checkpoint(
    accelerator: Accelerator,
    origin: Origin,
    progress: Progress,
    modules: Mapping[str, TrainedModule],
    meter: Meter,
    work: Workspace,
    why: checkpoint.Why,
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
    )


def prepare_run_folder(recipe: Recipe, work: Workspace, origin: Origin, modules: Mapping[str, TrainedModule]) -> None:
    """Make sure that checkpoints can be written, and keep the recipe and who is trained."""
    weights = sum(p.nbytes for m in modules.values() for p in m.module.parameters())
    checkpoint.prepare_folder(work.checkpoints_dir, 3 * weights)  # and two moments of each
    work.requeue_file.unlink(missing_ok=True)
    work.save_recipe(recipe)
    work.save_speakers(origin.speakers)
