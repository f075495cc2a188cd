"""Checks of what the data stages need that are still to come: their encoder, their pitch tracker, and room."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import torch

from rvc_dist.choices import F0_METHODS
from rvc_dist.config import F0_PER_S, f0_method_names
from rvc_dist.data import clip_files, decode, sources
from rvc_dist.features import feature_files, index_file
from rvc_dist.features.content import load_embedder
from rvc_dist.features.f0 import load_f0
from rvc_dist.features.identity import EmbedderId
from rvc_dist.runtime.accelerator import check_bf16, check_launcher
from rvc_dist.tools.doctor.disk import existing_parent, judge_disk
from rvc_dist.tools.doctor.findings import Result
from rvc_dist.tools.doctor.team import Exam
from rvc_dist.train import checkpoint
from rvc_dist.workspace import SourceFile, StageError, WorkList

CPU = torch.device("cpu")
MAX_MEASURED = 200
"""Recordings whose headers are read where no work list tells of them."""


def features_done(exam: Exam) -> bool:
    """Whether clips and features are those of this recipe and of the recordings that are there now."""
    recipe, work_list = exam.recipe, WorkList.load(exam.work.work_list_file)
    if work_list is None or clip_files.complete(recipe) is None:
        return False
    if "imported" not in work_list.settings:
        planned = {f.path: f for f in (*(f for u in work_list.units for f in u.files), *work_list.excluded)}
        if {(f.path, f.size) for f in planned.values()} != {(f.path, f.size) for f in exam.sources}:
            return False
        content = sources.content_by(work_list, Path(recipe.data.audio_dir))
        used = (f for f in exam.sources if not (f.reason or planned[f.path].reason))
        if any(content(f) != planned[f.path].content for f in used):
            return False
    return feature_files.complete(recipe) is True


def check_start(exam: Exam, result: Result) -> None:
    """Of a run alone: what training refuses at its start, and the recordings."""
    del result
    check_launcher(exam.recipe.train)
    if exam.recipe.train.use_bf16:
        check_bf16(exam.team.device)
    exam.hosts = [socket.gethostname()] * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not exam.is_imported:
        _ = exam.sources  # some


def check_recordings(exam: Exam, result: Result) -> None:
    """A run that was trained goes on with one at least of the recordings that it knows."""
    audio_dir = Path(exam.recipe.data.audio_dir)
    if exam.is_imported or not audio_dir.exists():
        result.skipped = "imported clips" if exam.is_imported else f"{audio_dir} does not exist"
    elif exam.team.is_first:
        content = sources.content_by(WorkList.load(exam.work.work_list_file), audio_dir)
        sources.check_recordings(exam.work, exam.sources, content)


def check_encoder(exam: Exam, result: Result) -> None:
    """The content encoder can be loaded: where it is missing the first rank fetches it."""
    recipe, found = exam.recipe, None
    if exam.has_features_to_make and exam.team.is_first:
        try:
            embedder = load_embedder(recipe.extract, recipe.model.version, CPU)
            found = EmbedderId(embedder.name, embedder.weights_hash, embedder.mix).to_features()
            found["width"] = embedder.width
        except (StageError, ValueError, OSError, ImportError) as error:
            fail(result, error, "extract.embedder_model")
    (exam.embedder, *_) = exam.team.gather(found)
    result.same[recipe.extract.embedder_model] = "needed" if exam.has_features_to_make else "not needed any more"


def check_pitch_tracker(exam: Exam, result: Result) -> None:
    """So can the pitch tracker; a package of it that is missing is told with the other packages."""
    config = exam.recipe.extract
    result.same[config.f0_method] = "needed" if exam.has_features_to_make else "not needed any more"
    if not (exam.has_features_to_make and exam.team.is_first):
        return
    try:
        load_f0(config, CPU)
    except (StageError, ValueError, OSError) as error:
        fail(result, error, "extract.f0_method")
    except ImportError as error:
        if not any(F0_METHODS[name].package for name in f0_method_names(config.f0_method)):
            fail(result, error, "extract.f0_method")


def fail(result: Result, error: Exception, key: str) -> None:
    stage_error = error if isinstance(error, StageError) else StageError(str(error))
    result.add(stage_error, remedy=f"mend what it names, or choose another {key}")


def check_disk(exam: Exam, result: Result) -> None:
    """The run's disk holds clips, features, index, checkpoints and voice files that are still to come."""
    config, work = exam.recipe.train, exam.work
    one = 3 * exam.weight_bytes + checkpoint.SPARE_BYTES  # weights, and two moments of each
    kept = sum(f.stat().st_size for p in checkpoint.list_checkpoints(work.checkpoints_dir) for f in p.glob("*"))
    voices = 3 * (sum(p.nbytes for p in exam.modules["generator"].parameters()) // 2) if exam.modules else 0
    folders = (work.clips_dir, work.features_dir, work.index_dir)
    there = sum(f.stat().st_size for folder in folders for f in folder.glob("*"))
    data = max(0, round(sum(data_bytes(exam))) - there) if exam.has_features_to_make else 0
    result.measured["for the data stages"] = (data / 1e9, "GB")
    # The newest ones, the best, and the one being written before the oldest goes.
    total = data + (config.keep_checkpoints + 2) * one + voices - kept
    judge_disk(existing_parent(work.root), data + one, total, result)


def data_bytes(exam: Exam) -> Iterator[float]:
    """Bytes of clips, features and index when no recording is silent anywhere."""
    recipe, width = exam.recipe, (exam.embedder or {}).get("width", 768)
    seconds = recorded_seconds(exam)
    if recipe.preprocess.cut_method != "skip":
        seconds *= recipe.preprocess.chunk_len / (recipe.preprocess.chunk_len - recipe.preprocess.overlap_len)
    frames = seconds * F0_PER_S / 2
    vectors = frames if recipe.index.algorithm == "faiss" else min(frames, index_file.KMEANS_ABOVE)
    yield seconds * recipe.data.sample_rate * 4
    yield frames * (width + 2) * 4
    yield 2 * vectors * width * 4  # total_fea.npy and the index file


def recorded_seconds(exam: Exam) -> float:
    work_list = WorkList.load(exam.work.work_list_file)
    if work_list is not None and exam.is_imported:
        return sum(unit.duration_s for unit in work_list.units)
    with contextlib.suppress(StageError):  # another check says it
        sources, found = measured(exam)
        share = sum(source.size for source, *_ in found) / sum(s.size for s in sources)
        return sum(seconds for *_, seconds in found) / share if share else 0.0
    return 0.0


def measured(exam: Exam) -> tuple[list[SourceFile], list[tuple[SourceFile, int, float]]]:
    """The usable recordings of the dataset, and of at most MAX_MEASURED of them the rate in Hz and the seconds.

    Raises:
        StageError: there is none.
    """
    folder, found = Path(exam.recipe.data.audio_dir), []
    sources = [s for s in exam.sources if not s.reason]
    for source in sources[:: -(-len(sources) // MAX_MEASURED)]:
        with contextlib.suppress(decode.AudioError), decode.opened(folder / source.path) as recording:
            found.append((source, recording.rate, recording.duration_s))  # preprocess leaves the others out
    return sources, found
