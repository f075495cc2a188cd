"""The import stage: an experiment folder of Applio, ARVC or RVC-WebUI -> a run folder that goes on from there.

Clips, content features, pitch, speakers, index and weights are taken over as they are; what is missing or does not fit
is named and left to the other stages. Shapes: S samples, T50 and T100 frames at 50 and 100 a second, C channels.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rvc_dist.choices import EMBEDDERS
from rvc_dist.config import F0_PER_S, MAX_SPEAKERS, RATES, ConfigError, Recipe
from rvc_dist.data import decode
from rvc_dist.data.clip_files import ClipStage, clips_report, file_entry, finished, imported_clip_settings
from rvc_dist.data.sources import check_recordings, content_by, content_of
from rvc_dist.features.feature_files import imported_feature_settings, pack_unit, write_mute, write_report
from rvc_dist.features.index_file import KMEANS_ABOVE, KMEANS_CENTRES, check_index, index_name, wanted_fingerprint
from rvc_dist.files import ForeignFileError, atomic_write, not_regular, read_bounded, read_npy, write_json
from rvc_dist.schema import parse_json
from rvc_dist.unit_stage import in_threads, read_headers
from rvc_dist.workspace import (
    ClipsHeader,
    FeaturesHeader,
    Shard,
    SourceFile,
    StageError,
    Unit,
    WorkList,
    Workspace,
    cut_units,
    fingerprint,
    is_done,
    listed,
    printable,
    remove_leftovers,
    save_arrays,
    unit_files,
    wait_for,
)

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]

CONTENT_PER_S = F0_PER_S // 2
LENGTH_TOLERANCE_S = 0.1
"""Features may be so much shorter or longer than their clip: trackers and encoders differ by a frame or two."""
OVERLAP_S = 0.3
"""Of neighbouring clips, as the tools cut them by default."""
V1_WIDTH = 256
MAX_NUMBERS = 1 << 26
"""Of the features of one clip: half an hour."""
SHOWN = 5
MAX_CONFIG_BYTES = 1 << 20
MAX_LIST_BYTES = 1 << 25
"""Of a filelist.txt: 100,000 clips with long paths."""
MAX_LIST_LINES, MAX_MISSING = 300_000, 1000
"""Of the list, and of its waves that are not there by name; more are only counted."""
MAX_MUTES = 20
"""Silent clips a speaker, and different files of them that are looked for."""

WIDTHS = {
    "inter_channels": "inter_channels",
    "hidden_channels": "hidden_channels",
    "filter_channels": "filter_channels",
    "n_heads": "num_heads",
    "n_layers": "num_layers",
    "upsample_initial_channel": "upsample_initial_channel",
    "gin_channels": "gin_channels",
}
"""`model` of an experiment's config.json -> our keys."""

SAME_ENCODER = {
    "contentvec_base": "contentvec",
    "hubert_base": "contentvec",
    "chinese_hubert_base": "chinese-hubert-base",
    "japanese_hubert_base": "japanese-hubert-base",
    "korean_hubert_base": "korean-hubert-base",
}
"""Other tools' names of content encoders -> those here; the hubert_base.pt of RVC holds ContentVec's weights."""


class Layout(NamedTuple):
    """Where a tool keeps what, relative to the experiment's folder."""

    tools: str
    waves: str
    content: tuple[str, ...]
    f0: str
    """Pitch in Hz; the folder beside it has the same as 255 coarse steps."""


LAYOUTS = (
    Layout("Applio, ARVC", "sliced_audios", ("extracted", "v2_extracted", "v1_extracted"), "f0_voiced"),
    Layout("RVC-WebUI", "0_gt_wavs", ("3_feature768", "3_feature256"), "2b-f0nsf"),
)


@dataclass(frozen=True)
class Experiment:
    """An experiment's folder, read as far as its small files go."""

    folder: Path
    layout: Layout
    content_dir: Path | None
    """None when no features were extracted."""
    f0_dir: Path | None
    """None when there is no pitch."""
    width: int
    """C of the content features, 0 without any."""
    config: dict[str, Any]
    info: dict[str, Any]
    speakers: dict[str, int]
    """Name of a wave -> speaker id, as filelist.txt has it."""
    mutes: tuple[str, ...]
    """Content features of the silent clips in filelist.txt, one entry a line."""

    @property
    def waves_dir(self) -> Path:
        return self.folder / self.layout.waves

    def content_file(self, wave: str) -> Path | None:
        return self.content_dir and self.content_dir / f"{Path(wave).stem}.npy"

    def f0_file(self, wave: str) -> Path | None:
        return self.f0_dir and self.f0_dir / f"{wave}.npy"

    def has_features(self, wave: str) -> bool:
        """Whether the files are there, unread."""
        files = [f for f in (self.content_file(wave), self.f0_file(wave)) if f is not None]
        return bool(files) and all(f.is_file() for f in files)


def run(recipe: Recipe, shard: Shard) -> None:
    """Import the experiment `recipe.data.audio_dir` into the run folder, on the first rank.

    Raises:
        StageError: no experiment is there, nothing in it can be used, its waves have several sample rates, or the run
            folder holds something else.
    """
    if not shard.is_first:
        wait_for("the import on rank 0", partial(complete, recipe))
        return
    experiment = read_experiment(Path(recipe.data.audio_dir))
    work = Workspace(recipe.run_dir, recipe.name)
    old = check_run_folder(work, recipe)
    num_threads = recipe.preprocess.num_workers
    files = list_waves(experiment, num_threads, content_by(old, experiment.waves_dir))
    recipe = adapt(recipe, experiment, common_rate(experiment, files))
    settings = imported_clip_settings(recipe)
    known = [(f.path, f.reason) if f.reason else f.identity for f in files]
    listing = fingerprint(known, feature_listing(experiment, num_threads))
    check_recordings(work, files, lambda f: f.content)
    if old is not None and (old.listing, old.settings) == (listing, settings) and complete(recipe):
        logger.info("import: %s was imported before, nothing to do", experiment.folder)
        return
    for report in (work.clips_report_file, work.features_report_file, work.index_report_file):
        report.unlink(missing_ok=True)  # until the end nothing may look finished
    # Clips with features before those without, so that hardly any unit has both kinds.
    usable = sorted((f for f in files if not f.reason), key=lambda f: not experiment.has_features(f.path))
    work_list = WorkList(listing, settings, cut_units(usable), tuple(f for f in files if f.reason))
    if experiment.content_dir and (old is None or old.listing != listing):
        for path in unit_files(work.features_dir):  # their stamps do not tell one array from another
            path.unlink()
    atomic_write(work.work_list_file, work_list.dumps())
    Import(recipe, work_list, experiment).make(Shard())


def complete(recipe: Recipe) -> bool | None:
    """True when the experiment is imported to the end, else None (for `wait_for`)."""
    work_list = finished(Workspace(recipe.run_dir, recipe.name))
    return (work_list is not None and work_list.imported_from == recipe.data.audio_dir) or None


class Import(ClipStage):
    """Takes over clips and what belongs to them; the recipe becomes that with which the run goes on."""

    name = "import"

    def __init__(self, recipe: Recipe, work_list: WorkList, experiment: Experiment) -> None:
        super().__init__(recipe, work_list)
        self.experiment = experiment
        self.embedder = {"name": recipe.extract.embedder_model, "width": experiment.width, "hash": ""}
        """What `Extractor.describe` says of the encoder; its weights are not known."""
        self.features = imported_feature_settings(recipe, self.embedder)

    def features_fingerprint(self, unit: Unit) -> str:
        return fingerprint(self.features, *self.fingerprints(unit))

    def is_done(self, unit: Unit) -> bool:
        """Whether the features are there too, where there are any."""
        if not super().is_done(unit):
            return False
        features = self.work.features_file(unit.id)
        return not self.experiment.content_dir or is_done(features, self.features_fingerprint(unit))

    def make_unit(self, unit: Unit) -> None:
        """Write the clips and, when all of them have features, these."""
        rate = self.recipe.data.sample_rate
        clips: list[tuple[dict[str, Any], Array]] = []
        features: list[tuple[int, Array, Array]] = []
        files: list[dict[str, Any]] = []
        for file in unit.files:
            try:
                wave, _ = decode.decode(self.experiment.waves_dir / file.path)
            except decode.AudioError as error:
                lost = {decode.UNREADABLE: file.duration_s}
                files.append(file_entry(replace(file, reason=str(error)), file.duration_s, lost))
                continue
            reason = ""
            if self.experiment.content_dir:
                try:
                    features.append((len(clips), *read_features(self.experiment, file.path, len(wave) / rate)))
                except ForeignFileError as error:
                    reason = f"features not imported: {error}"
            where = {"source": recording_of(file.path)[0], "slice_s": 0.0, "start_s": file.start_s}
            clips.append(({"speaker": file.speaker, "content": file.content} | where, wave))
            seconds = round(len(wave) / rate, 6)
            entry = file_entry(replace(file, reason=reason), seconds)
            files.append(entry | {"clips": 1, "seconds_out": round(seconds, 3)})
        waves, header = self.pack(unit, clips, files)
        if self.experiment.content_dir and len(features) == len(waves):
            lengths = [len(wave) for wave in waves.values()]
            packed = pack_unit(header, lengths, features, self.embedder, self.features_fingerprint(unit))
            save_arrays(self.work.features_file(unit.id), *packed)
        # After the features: a unit whose clips are there has what it could have.
        save_arrays(self.file(unit), waves, header)

    def report(self, headers: list[ClipsHeader]) -> None:
        """All that comes after the units: silent clips, reports, index, weights and the recipe."""
        files, work, experiment = self.recordings(headers), self.work, self.experiment
        used = [f for f in files if f["clips"]]
        if not used:
            raise _nothing(experiment, [(f["path"], f["reason"]) for f in files])
        remove_leftovers(work.features_dir, len(self.units))
        wanted = {work.features_file(unit.id): [self.features_fingerprint(unit)] for unit in self.units}
        lacking, features = read_headers(wanted, FeaturesHeader, self.name)
        if not lacking:
            self.take_mutes({f["speaker"] for f in used})
            self.take_index(write_report(work, self.features, self.work_list.fingerprints(), features))
        self.take_weights(1 + max(f["speaker"] for f in used))
        work.save_recipe(self.recipe, reads_recordings=True)
        total_s = _total_seconds(experiment) or sum(f["seconds_in"] for f in used)
        without = sum(1 for f in used if f["reason"]) if experiment.content_dir else len(used)
        added = {"imported": str(experiment.folder), "files_without_features": without}
        write_json(work.clips_report_file, clips_report(files, total_s) | added)
        left = f"{without} without features, for extract to make" if lacking else "with all features"
        counts = f"{len(used)} clips, {len(files) - len(used)} left out, {left}"
        logger.info("import: %s; go on with `rvc-dist run --config %s`", counts, work.config_file)

    def take_mutes(self, speakers: set[int]) -> None:
        """Take over the features of silence; without any there are no silent clips: they would need the encoder."""
        count = min(MAX_MUTES, round(len(self.experiment.mutes) / len(speakers)))
        content = read_mute(self.experiment)
        if content is None:
            count = 0
        elif count:
            num_samples = len(content) * self.recipe.data.sample_rate // CONTENT_PER_S
            write_mute(self.recipe, self.work, self.features, content, 2 * len(content), num_samples)
        self.recipe = replace(self.recipe, extract=replace(self.recipe.extract, include_mutes=count))

    def take_index(self, frames: int) -> None:
        """Take over the newest index if it holds the imported features; else the index stage makes one."""
        files = [p for p in self.experiment.folder.glob("*.index") if not p.name.startswith("trained_")]
        if not files:
            return
        path = max(files, key=lambda p: p.stat().st_mtime)
        try:
            import faiss

            found = check_index(path, self.experiment.width)
            if not found.num_cells:
                raise ForeignFileError("it has no cells")
            if found.num_vectors != frames and not (frames > KMEANS_ABOVE and found.num_vectors == KMEANS_CENTRES):
                raise ForeignFileError(f"it has {found.num_vectors} vectors, the features {frames} frames")
        except ImportError:
            return  # the index stage says what to install
        except ForeignFileError as error:
            logger.warning("import: the index stage makes a new index, since %s is of no use: %s", path.name, error)
            return
        whole = faiss.read_index(str(path))
        inverted = faiss.extract_index_ivf(whole)
        inverted.nprobe = self.recipe.index.nprobe
        file = self.work.index_dir / index_name(self.recipe, inverted.nlist, self.recipe.index.nprobe)
        vectors = io.BytesIO()
        np.save(vectors, whole.reconstruct_n(0, whole.ntotal))
        atomic_write(self.work.vectors_file, vectors.getvalue())
        atomic_write(file, faiss.serialize_index(whole).tobytes())
        report = {"file": file.name, "frames": frames, "vectors": whole.ntotal, "cells": inverted.nlist}
        write_json(self.work.index_report_file, {"stamp": wanted_fingerprint(self.recipe, self.work), **report})
        logger.info("import: index %s", path.name)

    def take_weights(self, num_speakers: int) -> None:
        """Let training start from the newest weights that fit the recipe's networks; the user's own go before."""
        train = self.recipe.train
        if train.pretrained or train.pretrained_g or train.pretrained_d:
            logger.info("import: training starts from the recipe's weights, not from the experiment's")
            return
        for step, generator, discriminator in weight_pairs(self.experiment.folder):
            try:
                kept_g, kept_d = self.keep_weights(generator, discriminator, num_speakers)
            except StageError as error:
                logger.warning("import: the weights of step %d are left out: %s", step, error)
                continue
            names = f"{generator.name} and {discriminator.name}"
            logger.info("import: training starts from %s: weights alone, without the optimizers' moments", names)
            self.recipe = replace(self.recipe, train=replace(train, pretrained_g=kept_g, pretrained_d=kept_d))
            return
        logger.warning("import: no weights to start from; set train.pretrained_g and train.pretrained_d")

    def keep_weights(self, generator: Path, discriminator: Path, num_speakers: int) -> list[str]:
        """Write the weights of G and of D, without the optimizers, into the run folder; returns where.

        Raises:
            StageError: a file cannot be read, or does not fit the recipe.
        """
        import torch

        from rvc_dist.models.state_dict import to_upstream
        from rvc_dist.train import checkpoint, networks
        from rvc_dist.train.dataset import ClipTable

        recipe = self.recipe
        width = self.experiment.width or (V1_WIDTH if recipe.model.version == "v1" else 768)
        table = ClipTable((), (), width, self.embedder, num_speakers)
        weights = replace(recipe.train, pretrained_g=str(generator), pretrained_d=str(discriminator))
        train = replace(weights, activation_checkpointing=False)
        _, modules = networks.build(replace(recipe, train=train), table)
        kept = [self.work.pretrained_dir / file.name for file in (generator, discriminator)]
        for target, name in zip(kept, checkpoint.MODELS, strict=True):
            buffer = io.BytesIO()
            torch.save({"model": to_upstream(modules[name].state_dict())}, buffer)
            atomic_write(target, buffer.getvalue())
        return [str(target) for target in kept]


def check_run_folder(work: Workspace, recipe: Recipe) -> WorkList | None:
    """The work list of an earlier import of the same experiment, or None when the run folder is free.

    Raises:
        StageError: the run folder holds something else, which is not overwritten.
    """
    work.check_root()
    work_list = WorkList.load(work.work_list_file)
    other = work_list and work_list.imported_from
    if other == recipe.data.audio_dir:
        return work_list
    taken = [p for p in (work.work_list_file, work.config_file, work.features_dir, work.checkpoints_dir) if p.exists()]
    if taken:
        what = f"an import of {other}" if other else "a run"
        raise StageError(f"run_dir: {work.root} already holds {what} ({taken[0].name});", "give another --run_dir")
    return None


def read_experiment(folder: Path) -> Experiment:
    """What is in an experiment's folder.

    Raises:
        StageError: it is missing, no folder, or laid out like none of LAYOUTS; says what was found.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise StageError(f"{folder} {what};", "expected the folder of an experiment, such as logs/NAME")
    layout = find_layout(folder)
    speakers, mutes = read_filelist(folder / "filelist.txt")
    content_dir = _with_arrays([folder / name for name in layout.content])
    return Experiment(
        folder=folder,
        layout=layout,
        content_dir=content_dir,
        f0_dir=_with_arrays([folder / layout.f0]),
        width=_width(content_dir) if content_dir else 0,
        config=_json(folder / "config.json"),
        info=_json(folder / "model_info.json"),
        speakers=speakers,
        mutes=mutes,
    )


def find_layout(folder: Path) -> Layout:
    found = [layout for layout in LAYOUTS if any((folder / layout.waves).glob("*.wav"))]
    if len(found) == 1:
        return found[0]
    expected = " or ".join(f"{layout.waves}/ ({layout.tools})" for layout in LAYOUTS)
    if found:
        both = " and ".join(f"{layout.waves}/" for layout in found)
        raise StageError(f"{folder} has waves in {both}:", "move one of them away, or name an experiment of one tool")
    inside = sorted(p.name for p in folder.iterdir() if any((p / layout.waves).is_dir() for layout in LAYOUTS))
    if inside := [name for name in inside if not name.startswith("mute")]:  # the tools' silent clips
        raise StageError(f"{folder} is no experiment but holds some:", f"name one of them ({_some(inside)})")
    here = [p.name + "/" * p.is_dir() for p in sorted(folder.iterdir())]
    more = f" and {len(here) - 10} more" if len(here) > 10 else ""
    raise StageError(
        f"{folder} is not laid out as an experiment: expected .wav files in {expected}; "
        f"found {', '.join(map(printable, here[:10])) + more if here else 'an empty folder'}"
    )


def _with_arrays(folders: list[Path]) -> Path | None:
    """The first of `folders` with arrays in it."""
    found = [folder for folder in folders if any(folder.glob("*.npy"))]
    for folder in found[1:]:
        logger.warning("import: %s is left out, %s is used", folder, found[0].name)
    return found[0] if found else None


def _width(content_dir: Path) -> int:
    """C of the first features that can be read, 0 if none can."""
    for path in sorted(content_dir.glob("*.npy")):
        with contextlib.suppress(ForeignFileError):
            return int(read_array(path, 2).shape[1])
    return 0


def _json(path: Path) -> dict[str, Any]:
    """A JSON file of another tool: {} when there is none or it holds something else, which is said."""
    try:
        return parse_json(read_bounded(path, MAX_CONFIG_BYTES), dict) if path.is_file() else {}
    except (ForeignFileError, OSError):
        logger.warning("import: %s is not what its name says and is left out", path)
        return {}


def read_filelist(path: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Speaker by name of the wave, and the features of the silent clips: `wave|content[|coarse f0|f0][...]|speaker`.

    Paths are those of the machine that wrote it, Windows or not, so that only their names count here.
    """
    speakers: dict[str, int] = {}
    mutes: list[str] = []
    if not path.is_file():
        return speakers, ()
    try:
        text = read_bounded(path, MAX_LIST_BYTES)
        if text.count(b"\n") > MAX_LIST_LINES:
            raise ForeignFileError(f"more than {MAX_LIST_LINES} lines")
    except ForeignFileError as error:
        raise StageError(f"{path}: {error};", "leave the list out, or shorten it to the experiment's clips") from error
    wrong = []
    for number, line in enumerate(map(os.fsdecode, text.splitlines()), 1):
        fields = line.strip().split("|")
        if len(fields) < 3 or not re.fullmatch(r"[0-9]{1,9}", fields[-1]):
            wrong += [str(number)] if line.strip() else []
            continue
        name = _name(fields[0])
        if name.startswith("mute"):
            mutes.append(fields[1])
        else:
            speakers.setdefault(name, int(fields[-1]))
    if wrong:
        logger.warning("import: %s, line %s is not `wave|features|...|speaker id`", path, _some(wrong))
    return speakers, tuple(mutes)


def _name(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).name


def list_waves(experiment: Experiment, num_threads: int, content: Callable[[SourceFile], str]) -> list[SourceFile]:
    """Every wave of the experiment in a fixed order, and those that filelist.txt has beyond; unusable with a reason."""
    found = {p.name: p for p in experiment.waves_dir.glob("*.wav")}
    missing = sorted(experiment.speakers.keys() - found.keys())
    if len(missing) > MAX_MISSING:
        logger.warning("import: %d waves of filelist.txt are missing, %d of them are named", len(missing), MAX_MISSING)

    def judged(name: str) -> SourceFile:
        speaker = experiment.speakers.get(name, _speaker_of(name))
        if name in found:
            return _wave(found[name], speaker, content)
        return SourceFile(name, speaker, 0, 0, reason="in filelist.txt, but the wave is missing")

    names = sorted({*found, *missing[:MAX_MISSING]})
    files = in_threads(num_threads, judged, names, "import: read %d of %d waves, to know their content")
    if all(f.reason for f in files):
        raise _nothing(experiment, [(f.path, f.reason) for f in files])
    unlisted = [name for name in sorted(found) if experiment.speakers and name not in experiment.speakers]
    if unlisted:
        which = f"{len(unlisted)} clips are not in filelist.txt and are imported all the same ({_some(unlisted)})"
        logger.warning("import: %s", which)
    return in_their_recordings(files)


def _wave(path: Path, speaker: int, content: Callable[[SourceFile], str]) -> SourceFile:
    """A wave for the work list; with a reason where it cannot be used."""
    file = SourceFile(path.name, speaker, 0, 0)
    try:
        status = path.stat()
        file = replace(file, size=status.st_size, mtime_ns=status.st_mtime_ns)
        reason = not_regular(status.st_mode)
        if speaker >= MAX_SPEAKERS:
            reason = reason or f"speaker id {speaker} is above {MAX_SPEAKERS - 1}"
        if reason:
            return replace(file, reason=reason)
        with decode.opened(path) as recording:
            seconds, rate = round(recording.duration_s, 6), recording.rate
        return replace(file, duration_s=seconds, rate=rate, content=content(file))
    except decode.AudioError as error:
        return replace(file, reason=str(error))
    except OSError as error:  # a link that leads nowhere
        return replace(file, reason=f"cannot be read ({error.strerror})")


def _speaker_of(name: str) -> int:
    """The id in SPEAKER_RECORDING_CLIP.wav; other names are of speaker 0."""
    match = re.fullmatch(r"(\d+)_\d+_\d+\.wav", name, re.ASCII)
    return int(match[1]) if match else 0


def recording_of(name: str) -> tuple[str, int]:
    """What a clip was cut from and its number there, by its name: Applio's and ARVC's, RVC-WebUI's, rvc-next's."""
    match = re.fullmatch(r"((?:\d+_)?\d+|ms\d+_s\d+_[0-9a-f]+)_(\d+)\.wav", name, re.ASCII)
    return (match[1], int(match[2])) if match else (name, 0)


def in_their_recordings(files: list[SourceFile]) -> list[SourceFile]:
    """`files` with where each begins in its recording, as far as numbers and lengths tell.

    The tools cut with an overlap, so each is taken to begin within the one before: only neighbours share samples.
    """
    ends_s: dict[tuple[int, str], float] = {}
    starts_s = {}
    for file in sorted(files, key=lambda f: recording_of(f.path)):
        recording = (file.speaker, recording_of(file.path)[0])
        starts_s[file.path] = round(max(0.0, ends_s.get(recording, 0.0) - OVERLAP_S), 6)
        ends_s[recording] = starts_s[file.path] + file.duration_s
    return [replace(f, start_s=starts_s[f.path]) for f in files]


def _some(names: list[str]) -> str:
    return ", ".join(map(printable, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")


def _nothing(experiment: Experiment, reasons: list[tuple[str, str]]) -> StageError:
    return StageError(f"{experiment.waves_dir}: none of {len(reasons)} clips can be used{listed(reasons)}")


def common_rate(experiment: Experiment, files: list[SourceFile]) -> int:
    """The sample rate of every wave in Hz.

    Raises:
        StageError: there are several, config.json says another, or no network has it.
    """
    by_rate: dict[int, list[str]] = {}
    for file in files:
        if not file.reason:
            by_rate.setdefault(file.rate, []).append(file.path)
    if len(by_rate) > 1:
        rates = "; ".join(f"{rate} Hz: {len(n)} clips ({_some(n)})" for rate, n in sorted(by_rate.items()))
        raise StageError(f"{experiment.waves_dir} has waves of several sample rates, expected one ({rates})")
    (rate,) = by_rate
    data = experiment.config.get("data")
    said = data.get("sample_rate", data.get("sampling_rate", rate)) if isinstance(data, dict) else rate
    if said != rate:
        raise StageError(f"{experiment.folder / 'config.json'} says {said} Hz, the waves have {rate} Hz")
    if rate not in RATES["v2"]:
        expected = ", ".join(map(str, RATES["v2"]))
        raise StageError(f"{experiment.waves_dir} has waves of {rate} Hz, expected one of {expected}")
    return rate


def adapt(recipe: Recipe, experiment: Experiment, rate: int) -> Recipe:
    """`recipe` with what the experiment settles: rate, version, pitch guidance, widths of the network, encoder.

    An `extract.embedder_model` other than the default is the user's word for the encoder, and stays.

    Raises:
        StageError: config.json has widths that no recipe can have.
    """
    model: dict[str, Any] = {}
    widths = experiment.config.get("model")
    if isinstance(widths, dict):
        model |= {ours: widths[theirs] for theirs, ours in WIDTHS.items() if theirs in widths}
    if experiment.content_dir:
        model["version"] = "v1" if experiment.width == V1_WIDTH else "v2"
        model["pitch_guidance"] = experiment.f0_dir is not None
    encoder = recipe.extract.embedder_model
    if encoder == Recipe().extract.embedder_model and (named := experiment.info.get("embedder_model")):
        encoder = SAME_ENCODER.get(str(named), str(named))
        if encoder not in EMBEDDERS:  # a file of others makes no later stage fetch what it names
            own, remedy = printable(encoder[:80]), "name it with --extract.embedder_model"
            logger.warning("import: the encoder is one of the user's own (%s): %s", own, remedy)
            encoder = "custom"
    try:
        adapted = replace(
            recipe,
            data=replace(recipe.data, sample_rate=rate),
            extract=replace(recipe.extract, embedder_model=encoder),
            model=replace(recipe.model, **model),
        )
    except ConfigError as error:
        raise StageError(f"{experiment.folder / 'config.json'} describes no network of ours: {error}") from error
    pitch = "with pitch" if adapted.model.pitch_guidance else "without pitch"
    kind = f"{rate} Hz, {adapted.model.version}, {pitch}, encoder {encoder}"
    logger.info("import: %s (%s), %s", experiment.folder, experiment.layout.tools, kind)
    return adapted


def feature_listing(experiment: Experiment, num_threads: int) -> list[tuple[str, str]]:
    """What changed arrays change: the content of each, whatever its time."""
    folders = [d for d in (experiment.content_dir, experiment.f0_dir) if d]
    paths = [p for folder in folders for p in sorted(folder.glob("*.npy"))]
    progress = "import: read %d of %d arrays, to know their content"
    found = in_threads(num_threads, lambda p: content_of(p) if p.is_file() else "", paths, progress)
    return [(f"{p.parent.name}/{p.name}", content) for p, content in zip(paths, found, strict=True)]


def read_features(experiment: Experiment, wave: str, seconds: float) -> tuple[Array, Array]:
    """Content [T50, C] and f0 [T100] of a clip; f0 is 0 where the experiment has no pitch.

    Raises:
        ForeignFileError: a file is missing or is not what it should be.
    """
    content_file, f0_file = experiment.content_file(wave), experiment.f0_file(wave)
    assert content_file is not None
    content = read_array(content_file, 2)
    if content.shape[1] != experiment.width:
        raise ForeignFileError(f"{content_file.parent.name}: {content.shape[1]} wide, the others {experiment.width}")
    f0 = read_array(f0_file, 1) if f0_file else np.zeros(2 * len(content), np.float32)
    if f0_file and f0.min(initial=0.0) < 0.0:
        raise ForeignFileError(f"{f0_file.parent.name}: a pitch below 0 Hz")
    for file, array, per_s in (content_file, content, CONTENT_PER_S), (f0_file, f0, F0_PER_S):
        if file and abs(len(array) / per_s - seconds) > LENGTH_TOLERANCE_S:
            raise ForeignFileError(f"{file.parent.name}: {len(array) / per_s:.2f} s long, the clip {seconds:.2f} s")
    return content, f0


def read_array(path: Path, num_dims: int) -> Array:
    """A float32 copy of what is in an .npy file; nothing in it is run.

    Raises:
        ForeignFileError: it is missing, no array of numbers of `num_dims` dimensions, empty, or not finite.
    """
    try:
        data = read_npy(path)
    except FileNotFoundError:
        raise ForeignFileError(f"{path.parent.name}: missing") from None
    except (ForeignFileError, OSError) as error:
        raise ForeignFileError(f"{path.parent.name}: {error}") from error
    if data.ndim != num_dims or data.size > MAX_NUMBERS:
        what = f"{data.dtype} {list(data.shape)}, expected at most {MAX_NUMBERS} numbers in {num_dims} dimensions"
        raise ForeignFileError(f"{path.parent.name}: {what}")
    array: Array = np.ascontiguousarray(data, np.float32)
    if not np.isfinite(array).all():
        raise ForeignFileError(f"{path.parent.name}: values that are not finite")
    return array


def _total_seconds(experiment: Experiment) -> float:
    """Length of the recordings that the clips were cut from, which overlap; 0 when it is not told."""
    value = experiment.info.get("total_seconds")
    return float(value) if isinstance(value, (int, float)) and 0.0 < value < float("inf") else 0.0


def read_mute(experiment: Experiment) -> Array | None:
    """Content [T50, C] of the silent clip; None, which is said, where the list names one that is of no use."""
    different = [*dict.fromkeys(experiment.mutes)][:MAX_MUTES]  # every speaker has the same
    path = next(filter(None, (_find_mute(experiment, mute) for mute in different)), None)
    if path is None:
        if experiment.mutes:
            logger.warning("import: silent clips are left out: %s is not to be found", experiment.mutes[0])
        return None
    try:
        content = read_array(path, 2)
        if content.shape[1] == experiment.width:
            return content
        wrong = f"{content.shape[1]} wide, the clips' features {experiment.width}"
    except ForeignFileError as error:
        wrong = str(error)
    logger.warning("import: silent clips are left out: %s: %s", path, wrong)
    return None


def _find_mute(experiment: Experiment, written: str) -> Path | None:
    """The file of a path in filelist.txt: absolute, relative to the tool's folder, or beside the experiment.

    A list may name any file of this machine; only what the tools call a silent clip's features is looked at.
    """
    path = Path(written.replace("\\", "/"))
    if not re.search(r"(?:^|/)mute[^/]*(?:/[^/]*)?/mute[^/\0]*\.npy$", path.as_posix()) or ".." in path.parts:
        return None
    logs = experiment.folder.parent
    tried = [path] if path.is_absolute() else [logs.parent / path]
    tried += [logs.joinpath(*path.parts[-3:]), experiment.folder / path.name]
    return next((p for p in tried if p.is_file()), None)


def weight_pairs(folder: Path) -> Iterator[tuple[int, Path, Path]]:
    """(step, generator, discriminator), the highest step first: from that one the other tools go on."""
    numbered = {int(m[1]): p for p in folder.glob("G_*.pth") if (m := re.fullmatch(r"G_(\d+)\.pth", p.name, re.ASCII))}
    for step in sorted(numbered, reverse=True):
        other = folder / f"D_{step}.pth"
        if other.is_file():
            yield step, numbered[step], other
        else:
            logger.warning("import: %s is left out: %s is missing", numbered[step].name, other.name)
