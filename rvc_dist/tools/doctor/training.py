"""Checks of what is trained: data, weights, the memory of the loaders, and one step on networks to be thrown away."""

from __future__ import annotations

import contextlib
import math
import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rvc_dist.config import F0_PER_S, MAX_CLIP_FRAMES, DataConfig, Recipe
from rvc_dist.data.clip_files import low_rates
from rvc_dist.features import feature_files
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.runtime.accelerator import device_name
from rvc_dist.tools.bench import CONTENT_WIDTH, made_up_pitch
from rvc_dist.tools.doctor.ahead import measured
from rvc_dist.tools.doctor.findings import Result, Severity, first_line
from rvc_dist.tools.doctor.team import Exam
from rvc_dist.train import checkpoint, compilation, networks, out_of_memory
from rvc_dist.train.dataset import (
    BUCKET_FRAMES,
    Batch,
    BucketBatchSampler,
    ClipData,
    ClipDataset,
    ClipTable,
    MicroBatchSpec,
    collate,
)
from rvc_dist.train.ddp import TrainedModule
from rvc_dist.train.loader import SHM, ReadAhead, loader_settings
from rvc_dist.train.optimizers import make_optimizer
from rvc_dist.train.step import GanStep
from rvc_dist.workspace import StageError, WorkList, read_header


def check_data(exam: Exam, result: Result) -> None:
    """The run's features fit the recipe, or what is there for the data stages to begin with."""
    recipe, work = exam.recipe, exam.work
    work_list = WorkList.load(work.work_list_file)
    with contextlib.suppress(StageError):  # of a dataset that is missing; it is told below
        low, remedy = low_rates(recipe, recording_rates(exam, work_list))
        if low:
            result.warn(low, remedy)
    if not work.features_report_file.is_file():
        if work_list is not None:
            result.same["units"] = str(len(work_list.units))
            result.warn(f"{work.features_dir} holds no finished features", "rvc-dist run or extract makes them")
        elif recipe.data.audio_dir == DataConfig().audio_dir and not Path(recipe.data.audio_dir).exists():
            result.skipped = "no recipe with data was given (--config)"
        else:
            left_out = sum(bool(f.reason) for f in exam.sources)
            result.same |= {"recordings": str(len(exam.sources) - left_out), "left out": str(left_out)}
            result.skipped = f"no features in {work.root} yet: rvc-dist run makes them"
        return
    exam.table = ClipTable.load(recipe)
    features_of_clips(exam, work_list, result)
    clips, config = exam.table.train, recipe.train
    global_batch = config.batch_size * config.grad_accum_steps * exam.team.count
    hours = sum(c.num_frames for c in clips) * recipe.rate_spec.hop / recipe.data.sample_rate / 3600
    result.same |= {
        "clips": str(len(clips)),
        "hours": f"{hours:.2f}",
        "held out": str(len(exam.table.holdout)),
        "speakers": str(exam.table.num_speakers),
        "features of": str(exam.table.embedder["name"]),
        "global batch": str(global_batch),
        "steps an epoch": str(-(-len(clips) // global_batch)),
    }
    if global_batch * 4 > len(clips):
        result.warn(
            f"the global batch of {global_batch} is more than a quarter of the {len(clips)} clips",
            "start fewer ranks, lower train.batch_size, or record more",
        )


def recording_rates(exam: Exam, work_list: WorkList | None) -> list[tuple[int, float]]:
    """(Hz, seconds) of each recording in the work list; without one, of some of the dataset."""
    if work_list is not None:
        parts = [f for unit in work_list.units for f in unit.files if f.rate]  # imported clips tell of no recording
        seconds: dict[str, float] = defaultdict(float)
        for part in parts:
            seconds[part.path] += part.duration_s
        return [(rate, seconds[path]) for path, rate in {f.path: f.rate for f in parts}.items()]
    return [(rate, length_s) for _, rate, length_s in measured(exam)[1]]


def features_of_clips(exam: Exam, work_list: WorkList | None, result: Result) -> None:
    """Clips and features belong together, and every file is there."""
    recipe, work, table = exam.recipe, exam.work, exam.table
    assert table is not None
    units = sorted({c.unit for c in table.train + table.holdout if c.unit >= 0})
    missing = [work.clips_file(unit).name for unit in units if read_header(work.clips_file(unit)) is None]
    if missing:
        result.fail(
            f"{work.clips_dir}: {len(missing)} of {len(units)} clips files are missing or damaged "
            f"({', '.join(missing[:5])})",
            "run rvc-dist preprocess again: it makes those that are missing",
        )
        return
    if work_list is None:
        return
    try:
        feature_files.clip_fingerprints(work)
    except StageError as error:
        result.add(error, Severity.WARNING)
        return
    exam.data_stages_done = feature_files.complete(recipe) is True
    if not exam.data_stages_done:
        result.warn(
            f"the features in {work.features_dir} were made with other settings, or of other clips, than the recipe's",
            "run rvc-dist extract, which makes those that are stale, or set extract.* back",
        )


def stand_in_table(exam: Exam) -> ClipTable:
    """Where there are no features: what they will be like, of the exam's embedder where that is known."""
    recipe = exam.recipe
    width = CONTENT_WIDTH[recipe.model.version]
    embedder = exam.embedder or {"name": recipe.extract.embedder_model, "width": width}
    num_speakers = 1
    with contextlib.suppress(StageError):  # another check says it
        num_speakers += max(s.speaker for s in exam.sources if not s.reason)
    return ClipTable((), (), embedder["width"], embedder, num_speakers)


def check_weights(exam: Exam, result: Result) -> None:
    """The networks can be built, pretrained files fit, and the checkpoint that training goes on from is whole."""
    recipe = exam.recipe
    newest = checkpoint.latest(exam.work.checkpoints_dir)
    table = exam.table or stand_in_table(exam)
    if newest is not None and exam.team.is_first:  # reading gigabytes once is enough
        checkpoint.verify(newest)
    saved = None if newest is None else checkpoint.identity_of(newest)
    try:
        shape, exam.modules = networks.build(recipe, table, saved)
    except StageError:
        if recipe.train.pretrained_g is None or recipe.train.pretrained_d is None or saved is not None:
            raise
        train = recipe.train
        for alone in (replace(train, pretrained_d=None), replace(train, pretrained_g=None)):  # so that both are told
            try:
                networks.build(replace(recipe, train=alone), table)
            except StageError as error:
                result.add(error)
        return
    exam.shape = shape
    millions = {name: sum(p.numel() for p in m.parameters()) / 1e6 for name, m in exam.modules.items()}
    result.same |= {name: f"{count:.1f} M weights" for name, count in millions.items()}
    given = [Path(f).name for f in (recipe.train.pretrained_g, recipe.train.pretrained_d) if f]
    result.same["begins with"] = newest.name if newest else " and ".join(given) or "random weights"
    if newest is None and len(given) == 1:
        lacking = "train.pretrained_d" if recipe.train.pretrained_g else "train.pretrained_g"
        result.warn(
            f"{lacking} is not set, the other network is pretrained",
            f"set {lacking} to the file that belongs to it: a pair trains far better than one",
        )
    named = re.search(r"(?<!\d)(24|32|40|44|48)k", Path(recipe.train.pretrained_d or "").name)
    if newest is None and named and int(named[1]) != recipe.data.sample_rate // 1000:  # all rates have the same shapes
        result.warn(
            f"train.pretrained_d: {recipe.train.pretrained_d} is of {named[1]} kHz by its name, the voice is of "
            f"{recipe.data.sample_rate} Hz",
            "set train.pretrained_d to the discriminator of the voice's rate",
        )
    if newest is not None and saved is not None and exam.table is not None:
        checkpoint.check_identity(newest, saved, networks.identity(recipe, shape, table))


def check_shared_memory(exam: Exam, result: Result) -> None:
    """/dev/shm holds the batches that the loader processes of this host's ranks have ready."""
    config = exam.recipe.train
    settings = loader_settings(config, exam.team.device, config.cache_on_device)
    workers = settings["num_workers"]
    result.own["loader processes"] = str(workers)
    if not workers or not SHM.is_dir():
        result.skipped = f"there is no {SHM}" if workers else "no loader processes"
        return
    table = exam.table or stand_in_table(exam)
    ahead = ReadAhead.measure(exam.recipe, table, settings, exam.local_ranks)
    result.measured |= {"needed": (ahead.needed / 1e6, "MB"), "free": (ahead.free / 1e6, "MB")}
    if ahead.fits < 1:
        result.fail(ahead.what, ahead.remedy)
    elif ahead.fits < ahead.wanted:
        result.warn(f"{ahead.what}: {ahead.fits} ahead fit and will be read", ahead.remedy)


def dry_step(recipe: Recipe, modules: Mapping[str, nn.Module], device: torch.device) -> GanStep:
    """The trainer's own step on networks to be thrown away, on this rank alone: it sends and writes nothing."""
    on_device = {name: modules[name].to(device) for name in checkpoint.MODELS}
    networks = {name: TrainedModule.alone(m, make_optimizer(recipe.train, m)) for name, m in on_device.items()}
    # What is imported when it is first needed would be counted as the step's time.
    compilation.begin_pass()
    import_module("librosa.filters")
    return GanStep(recipe, networks)


def losses_of(step: GanStep, batch: Batch, rank: int) -> dict[str, float]:
    """Take one step, updates included; StageError, with the batch size that fits, when memory does not suffice."""
    with out_of_memory.advice(step, batch, rank):
        result = step([batch])
        return {name: float(value) for name, value in (result.values | {"finite gradients": result.good}).items()}


def check_dry_step(exam: Exam, result: Result) -> None:
    """One step of the recipe's networks computes finite numbers."""
    accelerator, shape = exam.team.accelerator, exam.shape
    if not exam.ready or accelerator is None or shape is None:
        result.skipped = "the ranks did not find each other" if not exam.ready else "the networks could not be built"
        return
    device, config = exam.team.device, exam.recipe.train
    try:
        batch = read_batch(exam) if exam.table is not None else made_up_batch(exam.recipe, shape, device)
    except Exception as error:  # noqa: BLE001 - safetensors' error is a bare Exception
        result.fail(f"the clips of a batch cannot be read ({error!r})", "run rvc-dist preprocess and extract again")
        return
    result.same["data"] = "the run's" if exam.table is not None else "made up"
    result.own["batch"] = f"{len(batch.clips)} clip(s) of {batch.content.shape[1]} frames"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        step, rank = dry_step(exam.recipe, exam.modules, device), exam.team.rank
        if device.type == "cuda":
            losses_of(step, batch.to(device), rank)  # the first step looks for kernels
        began_at = time.monotonic()
        values = losses_of(step, batch.to(device), rank)
        seconds = time.monotonic() - began_at
    except RuntimeError as error:
        if isinstance(error, StageError):
            raise
        result.fail(
            f"a training step fails on {device_name(device)}: {first_line(error)}",
            "with a CUDA error, see nvidia-smi and dmesg on that host, and leave it out if it stays",
        )
        return
    finally:
        exam.modules.clear()
    # The recipe's batch would take longer in proportion, nearly.
    exam.step_s = seconds * config.grad_accum_steps * config.batch_size / len(batch.clips)
    result.measured |= {"took": (seconds, "s"), "peak memory": (peak_memory(device) / 1e9, "GB")}
    judge_step(values, result)


def judge_step(values: Mapping[str, float], result: Result) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad or not values["finite gradients"]:
        result.fail(
            f"the step's numbers are not finite: {', '.join(bad) or 'gradients'}",
            "try train.precision fp32; other pretrained weights; and look for damaged recordings with rvc-dist dataset",
        )
    else:
        result.measured["mel loss"] = (values["loss/g_mel"], "")


def read_batch(exam: Exam) -> Batch:
    """On a GPU a full batch of the longest clips, to see whether it fits; on a CPU, for speed, the shortest clip."""
    table, config = exam.table, exam.recipe.train
    assert table is not None
    lengths = [c.num_frames for c in table.train]
    on_cuda = exam.team.device.type == "cuda"
    size = config.batch_size if on_cuda else 1
    order = np.argsort([-n if on_cuda else n for n in lengths], kind="stable")
    batches = BucketBatchSampler(lengths, size, 1, 0, config.seed).rank_batches(np.resize(order, size), epoch=0)
    return ClipDataset(exam.recipe, table.train).read_batch(batches[0])


def made_up_batch(recipe: Recipe, shape: GeneratorShape, device: torch.device) -> Batch:
    """Noise in the shapes of the recipe's clips; on a CPU one clip, just long enough."""
    rate, spec = recipe.data.sample_rate, recipe.rate_spec
    hop = spec.hop
    size, frames = 1, shape.segment_frames + 1
    if device.type == "cuda":
        size, frames = recipe.train.batch_size, max(frames, int(recipe.preprocess.chunk_len * rate / hop))
    frames = min(frames, MAX_CLIP_FRAMES)
    padded = -(-frames // BUCKET_FRAMES) * BUCKET_FRAMES
    generator = torch.Generator().manual_seed(recipe.train.seed)
    f0 = torch.from_numpy(made_up_pitch(math.ceil(frames * hop * F0_PER_S / rate) + 1))[:frames]
    f0 = torch.nn.functional.pad(f0, (0, frames - len(f0)))
    clip = ClipData(
        wave_with_reach=0.1 * torch.randn(frames * hop + 2 * spec.reach, generator=generator),
        content=torch.randn(frames, shape.content_channels, generator=generator),
        f0=f0,
        speaker=0,
    )
    micro = MicroBatchSpec(tuple(range(size)), 0, padded, loss_scale=1.0, mean_frames=float(frames * size))
    return collate([clip] * size, micro, spec, tuple(range(size)))


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device's tensors, or of the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
