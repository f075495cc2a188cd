"""The import stage: an experiment folder of another tool -> a run folder that goes on from there.

Clips, content features, pitch, speakers, index and weights are taken over as they are; what is missing or does not fit
is named and left to the other stages. Shapes: T50 and T100 frames at 50 and 100 a second, C channels.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from rvc_dist.choices import EMBEDDERS, embedder_called
from rvc_dist.config import FEATURE_RATE, ConfigError, Recipe, recipe_of
from rvc_dist.data import audio, decode
from rvc_dist.data.clip_files import ClipStage, clips_report, file_entry, finished, imported_clip_settings
from rvc_dist.data.number_formats import float_wave
from rvc_dist.data.sources import check_recordings, content_by
from rvc_dist.features.energy import energy_arrays
from rvc_dist.features.feature_files import imported_feature_settings, pack_unit, write_mute, write_report
from rvc_dist.features.index_file import KMEANS_ABOVE, KMEANS_CENTRES, check_index, index_name, wanted_fingerprint
from rvc_dist.files import ForeignFileError, atomic_write, write_json
from rvc_dist.report.facts import flat
from rvc_dist.schema import SpeakerName, faults
from rvc_dist.tools.experiment import (
    CONTENT_PER_S,
    MAX_MUTES,
    SHOWN,
    Array,
    Experiment,
    common_rate,
    feature_listing,
    list_waves,
    nothing,
    read_experiment,
    read_features,
    read_mute,
    recording_of,
    weight_pairs,
)
from rvc_dist.tools.made_up import CONTENT_WIDTH
from rvc_dist.tools.tables import some
from rvc_dist.unit_stage import read_headers
from rvc_dist.workspace import (
    ClipsHeader,
    FeaturesHeader,
    Shard,
    Speaker,
    Speakers,
    StageError,
    Unit,
    WorkList,
    Workspace,
    changes,
    cut_units,
    fingerprint,
    is_done,
    printable,
    remove_leftovers,
    save_arrays,
    unit_files,
    wait_for,
)

logger = logging.getLogger(__name__)

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
UNVOICED = {
    "zero": "0 where unvoiced",
    "interpolated": "interpolated where unvoiced",
    "clipped": "50 Hz where unvoiced, mended to 0",
}
"""By `Experiment.unvoiced`."""
NO_INDEX = re.compile(r"^trained_|_spkid\d+\.index$")
"""Those without vectors, and those of one speaker of several."""


def run(recipe: Recipe, shard: Shard, given: Sequence[tuple[str, str]] = ()) -> None:
    """Import the experiment `recipe.data.audio_dir` into the run folder, on the first rank.

    Args:
        given: keys and texts of the command line, to say which of them the experiment overrules.

    Raises:
        StageError: no experiment is there, nothing in it can be used, its waves have several sample rates, or the run
            folder holds something else.
    """
    if not shard.is_first:
        wait_for("the import on rank 0", partial(complete, recipe))
        return
    work = Workspace(recipe.run_dir, recipe.name)
    num_threads = recipe.preprocess.num_workers
    experiment = read_experiment(Path(recipe.data.audio_dir), num_threads)
    old = check_run_folder(work, recipe)
    files = list_waves(experiment, num_threads, content_by(old, experiment.waves_dir))
    asked = recipe_of(given) if given else recipe
    keys = {key for key, _ in given}
    recipe = adapt(recipe, experiment, common_rate(experiment, files), "extract.embedder_model" in keys)
    settings = imported_clip_settings(recipe)
    known = [(f.path, f.reason) if f.reason else f.identity for f in files]
    repeats = {f.path: repeat for f in files if (repeat := experiment.repeat_of(f.path)) > 1}
    told = (experiment.unvoiced.removeprefix("zero"), sorted(experiment.names.items()), repeats)
    # What an experiment does not tell is left out, so that older imports of it stay what they are.
    listing = fingerprint(known, feature_listing(experiment, num_threads), *filter(None, told))
    check_recordings(work, files, lambda f: f.content)
    if old is not None and (old.listing, old.settings) == (listing, settings) and complete(recipe):
        logger.info("import: %s was imported before, nothing to do", experiment.folder)
        report_overruled(asked, keys, work.kept_recipe() or recipe)
        return
    for report in (work.clips_report_file, work.features_report_file, work.index_report_file):
        report.unlink(missing_ok=True)  # until the end nothing may look finished
    # Clips with features before those without, so that hardly any unit has both kinds.
    usable = sorted((f for f in files if not f.reason), key=lambda f: not experiment.has_features(f.path))
    work_list = WorkList(listing, settings, cut_units(usable), tuple(f for f in files if f.reason))
    if old is None or old.listing != listing:
        for path in (*unit_files(work.clips_dir), *unit_files(work.features_dir)):  # whose stamps know not all of it
            path.unlink()
    atomic_write(work.work_list_file, work_list.dumps())
    stage = Import(recipe, work_list, experiment)
    stage.make(Shard())
    report_overruled(asked, keys, stage.recipe)


def report_overruled(asked: Recipe, keys: Collection[str], recipe: Recipe) -> None:
    """Say what of the recipe that the user asked for is otherwise in the run's: `keys`, and what is no default."""
    before, default, after = (flat(r.to_dict()) for r in (asked, Recipe(), recipe))
    meant = {key: value for key, value in before.items() if key in keys or value != default[key]}
    if overruled := changes(meant, {key: after[key] for key in meant}):
        logger.warning("import: the experiment decides otherwise than the recipe: %s", overruled)


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
            clip = {"speaker": file.speaker, "content": file.content, "source": recording_of(file.path)[0]}
            clip |= {"slice_s": 0.0, "start_s": file.start_s, "guessed": True}
            if (repeat := self.experiment.repeat_of(file.path)) > 1:
                clip["repeat"] = repeat
            clips.append((clip, wave))
            seconds = round(len(wave) / rate, 6)
            entry = file_entry(replace(file, reason=reason), seconds)
            files.append(entry | {"clips": 1, "seconds_out": round(seconds, 3)})
        waves, header = self.pack(unit, clips, files)
        if self.experiment.content_dir and len(features) == len(waves):
            lengths = [len(wave) for wave in waves.values()]
            wanted = self.features_fingerprint(unit)
            form = self.recipe.extract.content_format
            arrays, features_header = pack_unit(header, lengths, features, self.embedder, wanted, form)
            resampled = (audio.resample(float_wave(wave), rate, FEATURE_RATE) for wave in waves.values())
            arrays |= energy_arrays(self.recipe, arrays, resampled)
            save_arrays(self.work.features_file(unit.id), arrays, features_header)
        # After the features: a unit whose clips are there has what it could have.
        save_arrays(self.file(unit), waves, header)

    def report(self, headers: list[ClipsHeader]) -> None:
        """All that comes after the units: silent clips, reports, index, weights and the recipe."""
        files, work, experiment = self.recordings(headers), self.work, self.experiment
        used = [f for f in files if f["clips"]]
        if not used:
            raise nothing(experiment, [(f["path"], f["reason"]) for f in files])
        remove_leftovers(work.features_dir, len(self.units))
        wanted = {work.features_file(unit.id): [self.features_fingerprint(unit)] for unit in self.units}
        lacking, features = read_headers(wanted, FeaturesHeader, self.name)
        if not lacking:
            self.take_mutes({f["speaker"] for f in used})
            self.take_index(write_report(work, self.features, self.work_list.fingerprints(), features))
        self.take_speakers({f["speaker"] for f in used})
        self.take_weights(1 + max(f["speaker"] for f in used))
        work.save_recipe(self.recipe, reads_recordings=True)
        total_s = experiment.total_seconds() or sum(f["seconds_in"] for f in used)
        without = sum(1 for f in used if f["reason"]) if experiment.content_dir else len(used)
        added = {"imported": str(experiment.folder), "files_without_features": without}
        write_json(work.clips_report_file, clips_report(files, total_s) | added | self.clipped(headers))
        left = f"{without} without features, for extract to make" if lacking else "with all features"
        counts = f"{len(used)} clips, {len(files) - len(used)} left out, {left}"
        logger.info("import: %s; go on with `rvc-dist run --config %s`", counts, work.config_file)

    def take_speakers(self, used: set[int]) -> None:
        """Keep the ids, and the names as far as they are names and tell speakers apart."""
        known, names, taken = self.experiment.names, dict[int, str](), set[str]()
        for speaker in sorted(used, key=lambda i: (i not in known, i)):
            tried = chain([known.get(speaker, str(speaker))], (f"speaker {speaker}" + n * "'" for n in count()))
            name = next(n for n in tried if n.casefold() not in taken and not any(faults(n, SpeakerName)))
            names[speaker] = name
            taken.add(name.casefold())
        renamed = [f"{i} ({printable(known[i][:80])})" for i in names if known.get(i, names[i]) != names[i]]
        if renamed:
            logger.warning("import: not the name of one speaker alone, and called by the id: %s", some(renamed, SHOWN))
        speakers = Speakers.of([Speaker(id=i, name=name) for i, name in names.items()], self.work.speakers().trained)
        self.work.save_speakers(speakers)
        if known:
            logger.info("import: speakers %s", ", ".join(map(speakers.label, sorted(names))))

    def take_mutes(self, speakers: set[int]) -> None:
        """Take over the features of silence; without any there are no silent clips: they would need the encoder."""
        count = min(MAX_MUTES, round(len(self.experiment.filelist.mutes) / len(speakers)))
        content = read_mute(self.experiment)
        if content is None:
            count = 0
        elif count:
            num_samples = len(content) * self.recipe.data.sample_rate // CONTENT_PER_S
            write_mute(self.recipe, self.work, self.features, content, 2 * len(content), num_samples)
        self.recipe = replace(self.recipe, extract=replace(self.recipe.extract, include_mutes=count))

    def take_index(self, frames: int) -> None:
        """Take over the newest index if it holds the imported features; else the index stage makes one."""
        files = [p for p in self.experiment.folder.glob("*.index") if not NO_INDEX.search(p.name)]
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
            logger.info("import: training starts from %s and %s", generator.name, discriminator.name)
            self.recipe = replace(self.recipe, train=replace(train, pretrained_g=kept_g, pretrained_d=kept_d))
            return
        logger.warning("import: no weights to start from; set train.pretrained_g and train.pretrained_d")

    def keep_weights(self, generator: Path, discriminator: Path, num_speakers: int) -> list[str]:
        """Write the weights of G and of D, and their optimizers' moments, into the run folder; returns where.

        Raises:
            StageError: a file cannot be read, or does not fit the recipe.
        """
        from rvc_dist.models.state_dict import to_upstream
        from rvc_dist.models.torch_file import save_pth
        from rvc_dist.train import checkpoint, moments, networks
        from rvc_dist.train.dataset import ClipTable

        recipe = self.recipe
        width = self.experiment.width or CONTENT_WIDTH[recipe.model.version]
        table = ClipTable((), (), width, self.embedder, num_speakers)
        weights = replace(recipe.train, pretrained_g=str(generator), pretrained_d=str(discriminator))
        train = replace(weights, activation_checkpointing=False)
        _, modules = networks.build(replace(recipe, train=train), table)
        kept = [self.work.pretrained_dir / file.name for file in (generator, discriminator)]
        for source, target, name in zip((generator, discriminator), kept, checkpoint.MODELS, strict=True):
            contents = {"model": to_upstream(modules[name].state_dict())}
            try:
                contents[moments.KEPT] = moments.read(source, modules[name])
            except ForeignFileError as error:
                logger.warning("import: %s: the moments of its optimizer are left out: %s", source.name, error)
            save_pth(target, contents)
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


def adapt(recipe: Recipe, experiment: Experiment, rate: int, names_encoder: bool = False) -> Recipe:
    """`recipe` with what the experiment settles: rate, version, widths of the network, encoder and pitch.

    An `extract.embedder_model` that the user `names_encoder` with, or one other than the default, is the user's word
    for the encoder, and stays.

    Raises:
        StageError: config.json has widths that no recipe can have.
    """
    model: dict[str, Any] = {}
    widths = experiment.config.get("model")
    if isinstance(widths, dict):
        model |= {ours: widths[theirs] for theirs, ours in WIDTHS.items() if theirs in widths}
    unvoiced = recipe.extract.unvoiced
    if experiment.content_dir:
        model["version"] = "v1" if experiment.width == CONTENT_WIDTH["v1"] else "v2"
        model["pitch_guidance"] = experiment.f0_dir is not None
        unvoiced = "interpolated" if experiment.unvoiced == "interpolated" else "zero"
    encoder, named = recipe.extract.embedder_model, experiment.encoder
    if named and (names_encoder or encoder != Recipe().extract.embedder_model):
        if embedder_called(named) != encoder:
            told = printable(named[:80])
            logger.warning("import: the encoder is %s, as the recipe says; the experiment names %s", encoder, told)
    elif named:
        encoder = embedder_called(named)
        if encoder not in EMBEDDERS:  # a file of others makes no later stage fetch what it names
            own, remedy = printable(named[:80]), "name it with --extract.embedder_model"
            logger.warning("import: the encoder is one of the user's own (%s): %s", own, remedy)
            encoder = "custom"
    try:
        adapted = replace(
            recipe,
            data=replace(recipe.data, sample_rate=rate),
            extract=replace(recipe.extract, embedder_model=encoder, unvoiced=unvoiced),
            model=replace(recipe.model, **model),
        )
    except ConfigError as error:
        raise StageError(f"{experiment.folder / 'config.json'} describes no network of ours: {error}") from error
    pitch = f"with pitch ({UNVOICED[experiment.unvoiced]})" if adapted.model.pitch_guidance else "without pitch"
    kind = f"{rate} Hz, {adapted.model.version}, {pitch}, encoder {encoder}"
    logger.info("import: %s (%s), %s", experiment.folder, experiment.layout.tools, kind)
    return adapted
