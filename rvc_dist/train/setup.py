"""What a run needs before its first step: its clips, the checkpoint it goes on from, its networks, its run folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from rvc_dist.config import Recipe
from rvc_dist.data import clip_files
from rvc_dist.features import feature_files
from rvc_dist.files import write_json
from rvc_dist.runtime.accelerator import on_first_rank
from rvc_dist.runtime.launcher import zero_stage
from rvc_dist.train import checkpoint, compilation, fingerprint, holdout, out_of_memory
from rvc_dist.train.dataset import Batch, BucketBatchSampler, ClipTable
from rvc_dist.train.ddp import GradientReducer, TrainedModule
from rvc_dist.train.deepspeed import ZeroNetwork
from rvc_dist.train.optimizers import make_optimizer
from rvc_dist.train.progress import Progress, total_steps
from rvc_dist.train.step import GanStep, autocast
from rvc_dist.workspace import StageError, Workspace, read_json

logger = logging.getLogger(__name__)


class Networks(TypedDict):
    generator: bool
    discriminator: bool


class Compiled(TypedDict):
    """RUN/compile.json."""

    key: dict[str, Any]
    compiled: Networks


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


def saved_before(accelerator: Accelerator, work: Workspace) -> tuple[Path, checkpoint.Checkpoint] | None:
    """The newest checkpoint, verified, the same on all ranks; None when the run is new."""
    (path,) = broadcast_object_list([checkpoint.latest(work.checkpoints_dir)])
    if path is None:
        return None
    on_first_rank(accelerator, partial(checkpoint.verify, path))
    return path, checkpoint.load(path)


def continued(
    accelerator: Accelerator,
    path: Path,
    saved: checkpoint.Checkpoint,
    identity: dict[str, Any],
    data: dict[str, Any],
) -> Progress:
    """Where to go on from the checkpoint in `path` with the data of now.

    Raises:
        StageError: it was made with other settings, or of other recordings alone.
    """
    on_first_rank(accelerator, partial(checkpoint.check_identity, path, saved.identity, identity))
    on_first_rank(accelerator, partial(fingerprint.check, path, saved.data, data))
    return fingerprint.adjusted(saved.progress, saved.data, data)


def budget(recipe: Recipe, table: ClipTable, sampler: BucketBatchSampler, left_in_epoch: int, done: Progress) -> int:
    """Steps of the whole run; the log says what that is in epochs and clips."""
    num_clips, per_epoch = len(table.train), sampler.steps_per_epoch
    total = total_steps(recipe.train, per_epoch, left_in_epoch, done)
    logger.info(
        "budget: %d steps, %.1f epochs of %d steps, %d clips seen of %d (%d held out); global batch %d",
        total,
        total / per_epoch,
        per_epoch,
        round(total / per_epoch * num_clips),
        num_clips,
        len(table.holdout),
        sampler.global_batch_size,
    )
    logger.info(
        "every clip is seen once an epoch; ranks without one in the last batch of an epoch get %d padding clips "
        "(%.1f%%), which count for nothing",
        sampler.num_padding_clips,
        100 * sampler.num_padding_clips / num_clips,
    )
    if sampler.exceeds_dataset:
        logger.warning(
            "the global batch of %d is more than a quarter of the %d clips: an epoch has only %d steps; "
            "fewer ranks or a smaller train.batch_size would learn more from the same data",
            sampler.global_batch_size,
            num_clips,
            per_epoch,
        )
    return total


def choose_compiled(
    recipe: Recipe,
    accelerator: Accelerator,
    work: Workspace,
    modules: Mapping[str, nn.Module],
    steps: tuple[int, int],
    next_batch: Callable[[], Batch],
) -> dict[str, bool]:
    """Which networks to compile: as the run did before, else by a trial with the next batch.

    `steps` are those done and those of the whole run.
    """
    config, device, (done, total) = recipe.train, accelerator.device, steps
    if not compilation.asked_for(config):
        return dict.fromkeys(modules, False)
    key = compilation.key(config, device, total)
    kept = read_json(work.compile_file, Compiled) if work.compile_file.is_file() else None
    (kept,) = broadcast_object_list([kept])
    if kept is not None and kept["key"] == key:
        chosen: dict[str, bool] = dict(kept["compiled"])
        return chosen
    compiled = {name: compilation.compiled(module, device) for name, module in modules.items()}
    optimizers = {name: make_optimizer(config, module) for name, module in modules.items()}
    batch = next_batch()

    def trial(which: Mapping[str, bool]) -> GanStep:
        calls = {name: compiled[name] if which.get(name) else module for name, module in modules.items()}
        networks = {n: TrainedModule(m, calls[n], calls[n], optimizers[n]) for n, m in modules.items()}
        return GanStep(recipe, networks)

    with out_of_memory.advice(trial({}), batch, accelerator.process_index):
        chosen = compilation.choose(
            config, accelerator, checkpoint.MODELS, lambda which: trial(which).local_dry_run(batch), total - done
        )
    if accelerator.is_main_process:
        write_json(work.compile_file, {"key": key, "compiled": chosen})
    return chosen


def trained_module(
    recipe: Recipe, accelerator: Accelerator, module: nn.Module, is_compiled: bool, reducer: GradientReducer
) -> TrainedModule:
    """`module` with its optimizer, averaged over the ranks."""
    config, device = recipe.train, accelerator.device
    compiled = compilation.compiled(module, device) if is_compiled else module
    optimizer = make_optimizer(config, module)
    if zero_stage(accelerator):
        in_step = autocast(device, config.use_bf16)
        return ZeroNetwork.prepare(accelerator, module, compiled, optimizer, reducer, in_step)
    network = TrainedModule(module, compiled, accelerator.prepare_model(compiled), optimizer)
    reducer.attach(network.wrapped)
    return network


def load_weights(saved: checkpoint.Checkpoint, networks: Mapping[str, TrainedModule], work: Workspace) -> None:
    """Fill the networks and their optimizers.

    Raises:
        StageError: the state of an optimizer does not fit.
    """
    for name, network in networks.items():
        try:
            network.load(saved.models[name], saved.optimizers[name])
        except ValueError as error:
            raise StageError(
                f"{work.checkpoints_dir}: step {saved.progress.step} does not fit the {name}'s optimizer;",
                "change train.optim back, or give the run another run_dir",
                f": {error}",
            ) from error


def prepare_run_folder(recipe: Recipe, work: Workspace, networks: Mapping[str, TrainedModule]) -> None:
    """Make sure that checkpoints can be written, and keep the recipe."""
    weights = sum(p.nbytes for n in networks.values() for p in n.module.parameters())
    checkpoint.prepare_folder(work.checkpoints_dir, 3 * weights)  # and two moments of each
    work.requeue_file.unlink(missing_ok=True)
    work.save_recipe(recipe)
