"""Checks of the data: recordings, clips and features, and what the stages that make them need."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from rvc_dist.choices import F0_METHODS
from rvc_dist.config import DataConfig, f0_method_names
from rvc_dist.data import clip_files, decode, sources
from rvc_dist.data.cutting import measure
from rvc_dist.data.remote import cache_folder, cached, data_of
from rvc_dist.data.storage import MANIFEST, Manifest, Storage
from rvc_dist.features import feature_files
from rvc_dist.features.extractor import Extractor
from rvc_dist.features.f0 import load_f0
from rvc_dist.features.precision import check_device
from rvc_dist.files import existing_folder
from rvc_dist.runtime.accelerator import check_launcher
from rvc_dist.runtime.device import check_precision
from rvc_dist.tools.doctor.findings import Fact, Finding, Findings, Problem, Severity, Skipped, error, same, warning
from rvc_dist.tools.doctor.ranks import DoctorContext
from rvc_dist.tools.made_up import CONTENT_WIDTH
from rvc_dist.train.dataset import ClipTable
from rvc_dist.workspace import SourceFile, StageError, read_header

CPU = torch.device("cpu")
ATTEMPTS = 3
"""How often `data.remote` is asked: a few seconds, not the minute that training waits."""
MAX_MEASURED = 200
"""Recordings whose headers are read where no work list tells of them."""
OR_CHOOSE = "mend what it names, or choose another"


def check_remote(context: DoctorContext) -> Findings:
    """What `data.remote` holds can be had with the credentials of this machine, whose disk has room for the cache."""
    recipe, url = context.recipe, context.recipe.data.remote
    if url is None:
        yield Skipped("clips and features are read from the run folder")
        return
    folder = cache_folder(recipe)
    disk = existing_folder(folder.parent)
    with tempfile.TemporaryDirectory(dir=disk, prefix=".doctor_") as trial:  # so that the cache can be written, too
        path = Path(trial, MANIFEST)
        Storage(url, ATTEMPTS).fetch(MANIFEST, path)
        sizes = Manifest.read(path, f"{url}/{MANIFEST}").unit_bytes
    context.remote_answers = True
    most, total, largest = round(recipe.data.cache_gb * 1e9), sum(sizes.values()), max(sizes.values(), default=0)
    there, needed = cached(recipe), min(most, total)
    room = shutil.disk_usage(disk).free + (there.bytes if there else 0)
    yield from same({"units": str(len(sizes)), "on storage": f"{total / 1e9:.3g} GB"})
    yield from (Fact("for the cache", needed / 1e9, "GB"), Fact("free", room / 1e9, "GB"))
    if most < largest:
        least = f"set data.cache_gb to {2.5 * largest / 1e9:.3g} or more"
        yield error(f"data.cache_gb: got {most / 1e9:g}, the largest unit takes {largest / 1e9:.3g} GB", least)
    elif room < needed:
        told = f"the cache in {folder} may take {needed / 1e9:.3g} GB, its disk has {room / 1e9:.3g} GB for it"
        remedy = "free some, set data.cache_dir to a folder of another disk, or lower data.cache_gb"
        yield error(told, remedy) if room < largest else warning(told, remedy)


def check_data(context: DoctorContext) -> Findings:
    """The run's features fit the recipe, or what is there for the data stages to begin with."""
    recipe, work, work_list = context.recipe, context.work, context.work_list
    if recipe.data.remote is not None:
        if not context.remote_answers:
            yield Skipped("data.remote does not answer")
            return
        work, context.data_stages_done = data_of(recipe), True
    with contextlib.suppress(StageError):  # of a dataset that is missing; it is reported below
        low, remedy = clip_files.low_rates(recipe, recording_rates(context))
        if low:
            yield warning(low, remedy)
    if not work.features_report_file.is_file():
        if work_list is not None:
            yield from same({"units": str(len(work_list.units))})
            yield warning(f"{work.features_dir} holds no finished features", "rvc-dist run or extract makes them")
        elif recipe.data.audio_dir == DataConfig().audio_dir and not Path(recipe.data.audio_dir).exists():
            yield Skipped("no recipe with data was given (--config)")
        else:
            left_out = sum(bool(f.reason) for f in context.sources)
            yield Skipped(f"no features in {work.root} yet: rvc-dist run makes them")
            yield from same({"recordings": str(len(context.sources) - left_out), "left out": str(left_out)})
        return
    context.table = table = ClipTable.load(recipe)
    if recipe.data.remote is not None:
        feature_files.check_made(recipe, work, clip_files.check_made(recipe, work))
    else:
        yield from features_of_clips(context, table)
    config, num_clips = recipe.train, len(table.train)
    global_batch = config.global_batch(context.group.count)
    hours = sum(c.num_frames for c in table.train) * recipe.rate_spec.hop / recipe.data.sample_rate / 3600
    facts = {
        "clips": num_clips,
        "hours": f"{hours:.2f}",
        "held out": len(table.holdout),
        "speakers": table.num_speakers,
        "features of": table.embedder["name"],
        "global batch": global_batch,
        "steps an epoch": -(-num_clips // global_batch),
    }
    yield from same({name: str(value) for name, value in facts.items()})
    if global_batch * 4 > num_clips:
        yield warning(
            f"the global batch of {global_batch} is more than a quarter of the {num_clips} clips",
            "start fewer ranks, lower train.batch_size, or record more",
        )


def recording_rates(context: DoctorContext) -> list[tuple[int, float]]:
    """(Hz, seconds) of each recording in the work list; without one, of some of the dataset."""
    if context.work_list is None:
        return [(rate, length_s) for _, rate, length_s in measured(context)]
    seconds: dict[tuple[str, int], float] = defaultdict(float)
    for part in (f for unit in context.work_list.units for f in unit.files):
        seconds[part.path, part.rate] += part.duration_s
    return [(rate, length_s) for (_, rate), length_s in seconds.items() if rate]  # an import does not tell it


def measured(context: DoctorContext) -> list[tuple[SourceFile, int, float]]:
    """Of at most MAX_MEASURED usable recordings of the dataset the rate in Hz and the seconds.

    Raises:
        StageError: there is none.
    """
    usable, found = [s for s in context.sources if not s.reason], []
    for source in usable[:: -(-len(usable) // MAX_MEASURED)]:
        with contextlib.suppress(decode.AudioError):  # preprocess leaves these out
            part = measure(Path(context.recipe.data.audio_dir), source)
            found.append((source, part.rate, part.duration_s))
    return found


def features_of_clips(context: DoctorContext, table: ClipTable) -> Findings:
    """Clips and features belong together, and every file is there."""
    work = context.work
    units = sorted({c.unit for c in (*table.train, *table.holdout) if c.unit >= 0})
    if missing := [work.clips_file(unit).name for unit in units if read_header(work.clips_file(unit)) is None]:
        yield error(
            f"{work.clips_dir}: {len(missing)} of {len(units)} clips files are missing or damaged "
            f"({', '.join(missing[:5])})",
            "run rvc-dist preprocess again: it makes those that are missing",
        )
    elif context.work_list is not None:
        try:
            feature_files.clip_fingerprints(work)
        except StageError as stale:
            yield Problem.of(stale, Severity.WARNING)
            return
        context.data_stages_done = feature_files.complete(context.recipe) is True
        if not context.data_stages_done:
            yield warning(
                f"the features in {work.features_dir} were made with other settings, or of other clips, than the "
                "recipe's",
                "run rvc-dist extract, which makes those that are stale, or set extract.* back",
            )


def features_done(context: DoctorContext) -> bool:
    """Whether clips and features are those of this recipe and of the recordings that are there now."""
    work_list = context.work_list
    if work_list is None or clip_files.complete(context.recipe) is None:
        return False
    if not context.is_imported:
        planned = {f.path: f for f in (*(f for u in work_list.units for f in u.files), *work_list.excluded)}
        if {(f.path, f.size) for f in planned.values()} != {(f.path, f.size) for f in context.sources}:
            return False
        content = sources.content_by(work_list, Path(context.recipe.data.audio_dir))
        used = (f for f in context.sources if not (f.reason or planned[f.path].reason))
        if any(content(f) != planned[f.path].content for f in used):
            return False
    return feature_files.complete(context.recipe) is True


def check_start(context: DoctorContext) -> Findings:
    """Of a run alone: what training refuses at its start, and the recordings."""
    check_launcher(context.recipe.train)
    check_precision(context.recipe.train.autocast_precision, context.group.device)
    if not context.is_imported:
        _ = context.sources  # some
    yield from ()


def check_recordings(context: DoctorContext) -> Findings:
    """A run that was trained goes on with one at least of the recordings that it knows."""
    audio_dir = Path(context.recipe.data.audio_dir)
    if context.recipe.data.remote is not None:
        yield Skipped("data.remote holds clips")
    elif context.is_imported or not sources.is_corpus(audio_dir):
        yield Skipped("imported clips" if context.is_imported else f"{audio_dir} does not exist")
    elif context.group.is_first:
        content = sources.content_by(context.work_list, audio_dir)
        sources.check_recordings(context.work, context.sources, content)


def check_encoder(context: DoctorContext) -> Findings:
    """The content encoder can be loaded: where it is missing the first rank fetches it."""
    found = None
    if context.has_features_to_make and context.group.is_first:
        try:
            found = Extractor.load(context.recipe, with_pitch=False, device=CPU).embedder.describe()
        except StageError as failed:
            yield Problem.of(failed, remedy=f"{OR_CHOOSE} extract.embedder_model")
    (context.embedder, *_) = context.group.gather(found)
    yield is_needed(context, context.recipe.extract.embedder_model)


def check_pitch_tracker(context: DoctorContext) -> Findings:
    """So can the pitch tracker, in this precision; a package that is missing is reported with the other packages."""
    config = context.recipe.extract
    yield is_needed(context, config.f0_method)
    if not (context.has_features_to_make and context.group.is_first):
        return
    try:
        check_device(config.precision, context.group.device)
        load_f0(config, CPU)
    except StageError as failed:
        yield Problem.of(failed)
    except (ValueError, OSError, ImportError) as failed:
        packaged = any(F0_METHODS[name].package for name in f0_method_names(config.f0_method))
        if not (packaged and isinstance(failed, ImportError)):
            yield error(str(failed), f"{OR_CHOOSE} extract.f0_method")


def is_needed(context: DoctorContext, name: str) -> Finding:
    return next(same({name: "needed" if context.has_features_to_make else "not needed any more"}))


def recorded_seconds(context: DoctorContext) -> float:
    """Of the dataset, estimated from those recordings that are measured."""
    if context.work_list is not None and context.is_imported:
        return sum(unit.duration_s for unit in context.work_list.units)
    with contextlib.suppress(StageError):  # another check reports it
        found = measured(context)
        share = sum(source.size for source, *_ in found) / sum(s.size for s in context.sources if not s.reason)
        return sum(seconds for *_, seconds in found) / share if share else 0.0
    return 0.0


def stand_in_table(context: DoctorContext) -> ClipTable:
    """Where there are no features: what they will be like, of the encoder that `check_encoder` found."""
    recipe = context.recipe
    embedder, num_speakers = context.embedder, 1
    if embedder is None:
        embedder = {"name": recipe.extract.embedder_model, "width": CONTENT_WIDTH[recipe.model.version]}
    with contextlib.suppress(StageError):  # another check reports it
        num_speakers += max(s.speaker for s in context.sources if not s.reason)
    return ClipTable((), (), embedder["width"], embedder, num_speakers)
