"""What a run needs before its first step: its clips, the checkpoint it goes on from, its networks, its run folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial

from accelerate import Accelerator
from torch import nn

from rvc_dist.config import Recipe
from rvc_dist.data import clip_files
from rvc_dist.data.remote import data_of
from rvc_dist.features import feature_files
from rvc_dist.runtime.accelerator import on_first_rank
from rvc_dist.runtime.launcher import zero_stage
from rvc_dist.train import checkpoint, compilation, fingerprint, holdout, networks, reading, trial
from rvc_dist.train.dataset import ClipTable
from rvc_dist.train.ddp import GradientReducer, TrainedModule
from rvc_dist.train.deepspeed import ZeroNetwork
from rvc_dist.train.loader import StepLoader
from rvc_dist.train.loss_scale import LossScale
from rvc_dist.train.optimizers import make_optimizer
from rvc_dist.train.progress import Progress, total_steps
from rvc_dist.train.run_state import Origin
from rvc_dist.train.step import autocast
from rvc_dist.workspace import ByRecording, Speakers, Workspace

logger = logging.getLogger(__name__)


def load_clips(recipe: Recipe, work: Workspace) -> ClipTable:
    """The run's clips, made with this recipe.

    Raises:
        StageError: the features are missing, of other settings, or of another run.
    """
    table = ClipTable.load(recipe)
    work.check_name()
    work.root.mkdir(parents=True, exist_ok=True)  # where data.remote has the units, nothing has made it yet
    data = data_of(recipe)
    feature_files.check_made(recipe, data, clip_files.check_made(recipe, data))
    return table


def report_holdout(recipe: Recipe, table: ClipTable) -> None:
    """Log what of each speaker is held out."""
    for level, line in holdout.report(table.shares, recipe.data.holdout):
        logger.log(level, line)
    if table.unseen:
        who, seconds = sorted({c.speaker for c in table.unseen}), sum(c.duration_s for c in table.unseen)
        names = Workspace(recipe.run_dir, recipe.name).speakers()
        listed = ", ".join(map(names.label, who[: holdout.LISTED])) + ", ..." * (len(who) > holdout.LISTED)
        logger.info(f"speakers whom training never hears (data.holdout_speakers): {listed}, {seconds:.1f} s")
    if recipe.train.overtrain_detect and not table.holdout:
        logger.warning("train.overtrain_detect does nothing: no clip is held out to see overtraining on")


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
    sampling = reading.choose(recipe, table, accelerator, saved.data if saved else {}, data)
    data |= {key: value for key, value in asdict(sampling).items() if value}
    progress, trained = Progress(), table.trained_speakers
    if path is not None and saved is not None:
        on_first_rank(accelerator, partial(checkpoint.check_identity, path, saved.identity, identity))
        on_first_rank(accelerator, partial(fingerprint.check, path, saved.data, data))
        progress = fingerprint.adjusted(saved.progress, saved.data, data)
        trained += saved.speakers.trained
    if not accelerator.is_main_process:  # which alone writes checkpoints: of a million recordings these take 300 MB
        data = {key: value for key, value in data.items() if key not in ByRecording.__annotations__}
    speakers = Speakers.of(data_of(recipe).speakers().info, trained)
    return Origin(shape, modules, identity, data, progress, speakers, sampling), saved


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
    seen = "every clip is seen once an epoch" if sampler.balance is None else sampler.balance.describe()
    logger.info(
        f"{seen}; ranks without one in the last batch of an epoch get {num_padding} padding "
        f"clips ({num_padding / num_clips:.1%}), which count for nothing"
    )
    num_ranks, size = sampler.num_ranks, recipe.train.micro_batch(sampler.num_ranks)
    if size < 1:
        logger.warning(
            f"train.keep_global_batch {sampler.global_batch_size} is less than the {num_ranks} ranks: in a step some "
            "have no clip"
        )
    elif size % 1:
        logger.warning(
            f"train.keep_global_batch {sampler.global_batch_size} cannot be shared evenly by {num_ranks} ranks in "
            f"micro-batches of at most train.batch_size {recipe.train.batch_size}: some have {int(size)} clips, some "
            f"{int(size) + 1}. The numbers are the same, but compiled networks are not used, and ranks wait for others"
        )
    if sampler.exceeds_dataset:
        logger.warning(
            f"the global batch of {sampler.global_batch_size} is more than a quarter of the {num_clips} clips: an "
            f"epoch has only {per_epoch} steps; fewer ranks or a smaller train.batch_size would learn more from the "
            "same data"
        )
    return total


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
    compiled = trial.choose_compiled(recipe, accelerator, work, origin, total, loader)
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


def prepare_run_folder(recipe: Recipe, work: Workspace, origin: Origin, modules: Mapping[str, TrainedModule]) -> None:
    """Make sure that checkpoints can be written, and keep the recipe and who is trained."""
    weights = sum(p.nbytes for m in modules.values() for p in m.module.parameters())
    checkpoint.prepare_folder(work.checkpoints_dir, 3 * weights)  # and two moments of each
    work.requeue_file.unlink(missing_ok=True)
    work.save_recipe(recipe)
    work.save_speakers(origin.speakers)
