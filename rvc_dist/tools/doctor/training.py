"""Checks of what is trained: weights, the memory of the loaders, and one step on networks to be thrown away."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path

import numpy as np
import torch

from rvc_dist.config import MAX_CLIP_FRAMES, Recipe
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.runtime.device import device_name
from rvc_dist.tools.doctor.data import stand_in_table
from rvc_dist.tools.doctor.findings import Fact, Findings, Problem, Skipped, error, first_line, same, warning
from rvc_dist.tools.doctor.ranks import DoctorContext
from rvc_dist.tools.made_up import made_up_pitch
from rvc_dist.train import checkpoint, memory, networks, out_of_memory
from rvc_dist.train.dataset import Batch, ClipData, ClipDataset, ClipTable, collate
from rvc_dist.train.ddp import TrainedModule
from rvc_dist.train.loader import SHM, ReadAhead, loader_settings
from rvc_dist.train.optimizers import make_optimizer
from rvc_dist.train.sampler import BUCKET_FRAMES, BucketBatchSampler, MicroBatchSpec
from rvc_dist.train.step import GanStep
from rvc_dist.workspace import StageError


def check_weights(context: DoctorContext) -> Findings:
    """The networks can be built, pretrained files fit, and the checkpoint that training goes on from is whole."""
    recipe, train = context.recipe, context.recipe.train
    newest = checkpoint.latest(context.work.checkpoints_dir)
    table = context.table or stand_in_table(context)
    if newest is not None and context.group.is_first:  # reading gigabytes once is enough
        checkpoint.verify(newest)
    saved = None if newest is None else checkpoint.identity_of(newest)
    if newest is None and train.eval_reference is not None and not Path(train.eval_reference).is_file():
        yield error(f"train.eval_reference: {train.eval_reference} is no file", "give a recording, or leave it out")
    try:
        shape, context.modules = networks.build(recipe, table, saved)
    except networks.PretrainedError as failed:
        yield from map(Problem.of, failed.each)
        return
    context.shape = shape
    for name, module in context.modules.items():
        yield from same({name: f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M weights"})
    given = [Path(f).name for f in (train.pretrained_g, train.pretrained_d) if f]
    given += [Path(f.path).name for f in recipe.base_model_files.values()]
    yield from same({"begins with": newest.name if newest else " and ".join(given) or "random weights"})
    if newest is None and len(given) == 1:
        lacking = "train.pretrained_d" if train.pretrained_g else "train.pretrained_g"
        yield warning(
            f"{lacking} is not set, the other network is pretrained",
            f"set {lacking} to the file that belongs to it: a pair trains far better than one",
        )
    named = re.search(r"(?<!\d)(24|32|40|44|48)k", Path(train.pretrained_d or "").name)
    if newest is None and named and int(named[1]) != recipe.data.sample_rate // 1000:  # all rates have the same shapes
        yield warning(
            f"train.pretrained_d: {train.pretrained_d} is of {named[1]} kHz by its name, the voice is of "
            f"{recipe.data.sample_rate} Hz",
            "set train.pretrained_d to the discriminator of the voice's rate",
        )
    if newest is not None and saved is not None and context.table is not None:
        checkpoint.check_identity(newest, saved, networks.identity(recipe, shape, context.table))


def check_shared_memory(context: DoctorContext) -> Findings:
    """/dev/shm holds the batches that the loader processes of this host's ranks have ready."""
    config = context.recipe.train
    settings = loader_settings(config, context.group.device, config.cache_on_device)
    workers = settings["num_workers"]
    yield Fact("loader processes", str(workers))
    if not workers or not SHM.is_dir():
        yield Skipped(f"there is no {SHM}" if workers else "no loader processes")
        return
    ahead = ReadAhead.measure(context.recipe, context.table or stand_in_table(context), settings)
    yield from (Fact("needed", ahead.needed / 1e6, "MB"), Fact("free", ahead.free / 1e6, "MB"))
    if ahead.fits < 1:
        yield error(ahead.what, ahead.remedy)
    elif ahead.fits < ahead.wanted:
        yield warning(f"{ahead.what}: {ahead.fits} ahead fit and will be read", ahead.remedy)


def check_dry_step(context: DoctorContext) -> Findings:
    """One step of the recipe's networks computes finite numbers."""
    device, config, table = context.group.device, context.recipe.train, context.table
    if context.recipe.data.remote is not None:
        table = None  # training alone has what fetches units
    if context.not_joined is not None or context.shape is None:
        yield Skipped("the ranks did not find each other" if context.not_joined else "the networks could not be built")
        return
    try:
        batch = read_batch(context, table) if table else made_up_batch(context.recipe, context.shape, device)
    except Exception as failed:  # noqa: BLE001 - safetensors' error is a bare Exception
        yield error(f"the clips of a batch cannot be read ({failed!r})", "run rvc-dist preprocess and extract again")
        return
    yield from same({"data": "the run's" if table else "made up"})
    yield Fact("batch", f"{len(batch.clips)} clip(s) of {batch.content.shape[1]} frames")
    try:
        values, seconds = dry_step(context, batch.to(device))
    except StageError:  # which batch would fit
        raise
    except RuntimeError as failed:
        yield error(
            f"a training step fails on {device_name(device)}: {first_line(failed)}",
            "with a CUDA error, see nvidia-smi and dmesg on that host, and leave it out if it stays",
        )
        return
    finally:
        context.modules.clear()
    # The recipe's batch would take longer in proportion, nearly.
    context.step_s = seconds * config.global_batch(context.group.count) / context.group.count / len(batch.clips)
    yield from (Fact("took", seconds, "s"), Fact("peak memory", memory.peak_bytes(device) / 1e9, "GB"))
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad or not values["finite gradients"]:
        yield error(
            f"the step's numbers are not finite: {', '.join(bad) or 'gradients'}",
            "try train.precision fp32; other pretrained weights; and look for damaged recordings with rvc-dist dataset",
        )
    else:
        yield Fact("mel loss", values["loss/g_mel"])


def dry_step(context: DoctorContext, batch: Batch) -> tuple[dict[str, float], float]:
    """What the trainer's own step gives, updates included, and its seconds; on this rank alone, nothing is written.

    Raises:
        StageError: with the batch size that fits, when memory does not suffice.
    """
    recipe, device = context.recipe, context.group.device
    on_device = {name: context.modules[name].to(device) for name in checkpoint.MODELS}
    trained = {name: TrainedModule.alone(m, make_optimizer(recipe.train, m)) for name, m in on_device.items()}
    step = GanStep(recipe, trained)
    with out_of_memory.advice(step, batch, context.group.rank):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            step([batch])  # the first step looks for kernels
            torch.cuda.synchronize(device)
        began_at = time.monotonic()
        result = step([batch])
        values = {name: float(value) for name, value in (result.values | {"finite gradients": result.good}).items()}
    return values, time.monotonic() - began_at


def read_batch(context: DoctorContext, table: ClipTable) -> Batch:
    """On a GPU a full batch of the longest clips, to see whether it fits; on a CPU, for speed, the shortest clip."""
    config, lengths = context.recipe.train, [c.num_frames for c in table.train]
    on_cuda = context.group.device.type == "cuda"
    size = config.batch_size if on_cuda else 1
    order = np.argsort([-n if on_cuda else n for n in lengths], kind="stable")
    batches = BucketBatchSampler(lengths, size, 1, 0, config.seed).rank_batches(np.resize(order, size), epoch=0)
    return ClipDataset(context.recipe, table.train).read_batch(batches[0])


def made_up_batch(recipe: Recipe, shape: GeneratorShape, device: torch.device) -> Batch:
    """Noise in the shapes of the recipe's clips; on a CPU one clip, just long enough."""
    spec, size, frames = recipe.rate_spec, 1, shape.segment_frames + 1
    if device.type == "cuda":
        clip_frames = int(recipe.preprocess.chunk_len * recipe.data.sample_rate / spec.hop)
        size, frames = recipe.train.batch_size, min(max(frames, clip_frames), MAX_CLIP_FRAMES)
    generator = torch.Generator().manual_seed(recipe.train.seed)
    clip = ClipData(
        wave_with_reach=0.1 * torch.randn(frames * spec.hop + 2 * spec.reach, generator=generator),
        content=torch.randn(frames, shape.content_channels, generator=generator),
        f0=torch.from_numpy(made_up_pitch(frames)),
        speaker=0,
    )
    padded, clips = -(-frames // BUCKET_FRAMES) * BUCKET_FRAMES, tuple(range(size))
    micro = MicroBatchSpec(clips, 0, padded, loss_scale=1.0, mean_frames=float(frames * size))
    return collate([clip] * size, micro, spec, clips)
