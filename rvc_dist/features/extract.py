"""The extract stage: clips -> content features and pitch, one safetensors file beside each clips file.

Shapes: B clips of equal length, S samples, T50 and T100 frames at 50 and 100 a second, C channels.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rvc_dist.config import FEATURE_RATE, Recipe
from rvc_dist.data import audio, preprocess
from rvc_dist.features.extractor import Extractor
from rvc_dist.files import write_json
from rvc_dist.runtime.device import fixed_threads
from rvc_dist.workspace import (
    ClipsHeader,
    FeaturesHeader,
    FeaturesReport,
    Shard,
    StageError,
    Unit,
    WorkList,
    Workspace,
    changes,
    fingerprint,
    is_done,
    read_header,
    read_json,
    remove_leftovers,
    save_arrays,
    unit_header,
)

logger = logging.getLogger(__name__)


def run(recipe: Recipe, shard: Shard) -> None:
    """Make this process's features; whoever finishes last writes the report.

    Raises:
        StageError: clips are missing, or the encoder or the pitch tracker cannot be had.
    """
    work = Workspace(recipe.run_dir, recipe.name)
    clips = clip_fingerprints(work)
    if wrong := preprocess.other_settings(recipe):
        raise StageError(wrong)
    work.check_name()
    if is_imported(recipe, work, clips):
        logger.info("extract: the features were imported with the clips")  # without a look for the encoder
        return
    with fixed_threads(recipe.extract.num_threads):
        extract(recipe, work, clips, shard)


def extract(recipe: Recipe, work: Workspace, clips: dict[Unit, str], shard: Shard) -> None:
    try:
        extractor = Extractor.load(recipe)
    except StageError as error:
        if complete(recipe) is None:
            raise
        logger.warning("extract: all features are there, so nothing is looked for that made them (%s)", error)
        return
    settings = feature_settings(recipe) | {"embedder": extractor.describe()}
    withdraw_report(work, settings, clips, shard)
    if shard.is_first:
        work.save_recipe(recipe)
    if recipe.extract.include_mutes and (shard.is_first or shard.array):
        save_mute(recipe, work, extractor, settings)
    todo = [u for u in shard.take(list(clips)) if done_header(recipe, work, u, settings, clips[u]) is None]
    logger.info("extract: %d units, %d to do here", len(clips), len(todo))
    # The next unit is read and resampled, and the last one written, while this one is computed.
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        pending = deque(reader.submit(read_unit, work.clips_file(u.id)) for u in todo[:1])
        written: Future[None] | None = None
        for i, unit in enumerate(todo):
            header, waves = pending.popleft().result()
            pending.extend(reader.submit(read_unit, work.clips_file(u.id)) for u in todo[i + 1 : i + 2])
            computed = extractor([wave for _, wave in waves])
            lengths = [num_samples for num_samples, _ in waves]
            wanted = feature_fingerprint(settings, clips[unit])
            features = pack_unit(header, lengths, computed, extractor.describe(), wanted)
            if written is not None:
                written.result()
                logger.info("extract: unit %d of %d", i, len(todo))
            written = writer.submit(save_arrays, work.features_file(unit.id), *features)
        if written is not None:
            written.result()
            logger.info("extract: unit %d of %d", len(todo), len(todo))
    extractor.warn_at_edges("extract")
    finish(recipe, work, settings, clips, shard)


def is_imported(recipe: Recipe, work: Workspace, clips: dict[Unit, str]) -> bool:
    """Whether the features of all clips came from another tool, and are those that the recipe asks for."""
    report = read_report(work)
    if report is None or report["settings"].get("embedder", {}).get("hash") != "" or not complete(recipe):
        return False
    return all(is_done(work.features_file(u.id), feature_fingerprint(report["settings"], s)) for u, s in clips.items())


def done_header(
    recipe: Recipe, work: Workspace, unit: Unit, settings: dict[str, Any], clips: str
) -> dict[str, Any] | None:
    """The header of a unit's features when they were made with `settings`, or imported as the same encoder's."""
    imported = imported_feature_settings(recipe, settings["embedder"])
    header = read_header(work.features_file(unit.id))
    wanted = [feature_fingerprint(s, clips) for s in (settings, imported)]
    return header if header is not None and header.get("stamp") in wanted else None


def withdraw_report(work: Workspace, settings: dict[str, Any], clips: dict[Unit, str], shard: Shard) -> None:
    """Remove a report of other features, and say what made them stale.

    While units are being made again the folder holds old and new ones, which nobody may take for a whole.
    """
    before = read_report(work)
    if before is None:
        return
    if before["settings"] == settings and before["clips"] == fingerprint(list(clips.values())):
        return
    if shard.is_first:
        logger.info("extract: making features again: %s", changes(before["settings"], settings) or "other clips")
    work.features_report_file.unlink(missing_ok=True)


def complete(recipe: Recipe) -> bool | None:
    """True when the report says that all of this recipe's features are made of the present clips, else None."""
    work = Workspace(recipe.run_dir, recipe.name)
    report = read_report(work)
    if report is None:
        return None
    settings, embedder = report["settings"], report["settings"].get("embedder", {})
    known = settings in (feature_settings(recipe) | {"embedder": embedder}, imported_feature_settings(recipe, embedder))
    done = known and report["clips"] == fingerprint(list(clip_fingerprints(work).values()))
    return (done and mute_done(recipe, work, settings)) or None


def other_settings(recipe: Recipe) -> str:
    """What is wrong when the run's features were made with other settings than the recipe's, and what to do."""
    work = Workspace(recipe.run_dir, recipe.name)
    report = read_report(work)
    differ = report and changes(report.get("settings", {}), feature_settings(recipe), shared=True)
    remedy = "run `rvc-dist extract` again, or set back what differs"
    return (
        f"{work.features_dir} holds features of other settings than the recipe's: {remedy} ({differ})" if differ else ""
    )


def read_report(work: Workspace) -> FeaturesReport | None:
    try:
        return read_json(work.features_report_file, FeaturesReport)
    except FileNotFoundError:  # another rank may withdraw it at any moment
        return None


def feature_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that the bytes of a feature depend on, under their recipe keys."""
    values = asdict(recipe.extract)
    del values["include_mutes"]
    mix = values.pop("embedder_mix")
    values |= {"embedder_mix.layers": list(mix["layers"]), "embedder_mix.ratio": mix["ratio"]}
    return {"model.version": recipe.model.version} | {f"extract.{k}": v for k, v in values.items()}


def imported_feature_settings(recipe: Recipe, embedder: dict[str, Any]) -> dict[str, Any]:
    """What imported features are taken to be made with: the recipe's settings, by an encoder of unknown weights.

    Without pitch guidance they may lack the pitch, and are not those of a recipe that asks for it.
    """
    settings = feature_settings(recipe) | {"embedder": embedder | {"hash": ""}}
    return settings if recipe.model.pitch_guidance else settings | {"model.pitch_guidance": False}


def feature_fingerprint(settings: dict[str, Any], clips: str) -> str:
    return fingerprint(settings, clips)


def clip_fingerprints(work: Workspace) -> dict[Unit, str]:
    """Every unit of the work list and the fingerprint of its clips file.

    Raises:
        StageError: the preprocess stage has not run, or not to its end.
    """
    work_list = WorkList.load(work.work_list_file)
    if work_list is None:
        raise StageError(f"{work.clips_dir} has no clips:", "run `rvc-dist preprocess` first")
    stamps = {u: (read_header(work.clips_file(u.id)) or {}).get("stamp") for u in work_list.units}
    missing = [work.clips_file(u.id).name for u, s in stamps.items() if s != u.fingerprint(work_list.settings)]
    if missing:
        raise StageError(
            f"{work.clips_dir}: {len(missing)} of {len(work_list.units)} units are missing or stale "
            f"({', '.join(missing[:5])}):",
            "run `rvc-dist preprocess` to its end first",
        )
    return {u: str(s) for u, s in stamps.items()}


def read_unit(path: Path) -> tuple[ClipsHeader, list[tuple[int, audio.Wave]]]:
    """The header of a clips file, and for each clip its length in samples and its 16 kHz copy [S]."""
    from safetensors import safe_open

    header = unit_header(path, ClipsHeader, "preprocess")
    with safe_open(path, framework="numpy") as file:
        waves = [file.get_tensor(f"{i:05d}") for i in range(len(header["clips"]))]
    return header, [(len(w), audio.resample(w, header["sample_rate"], FEATURE_RATE)) for w in waves]


def pack_unit(
    clips_header: Mapping[str, Any],
    lengths: Sequence[int],
    features: Iterable[tuple[int, Any, Any]],
    embedder: dict[str, Any],
    wanted: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The features of one unit and their header, as `save_arrays` takes them.

    Args:
        lengths: of the unit's clips in samples.
        features: (clip, content [T50, C], f0 [T100]), as an extractor yields them. Its batches never cross a unit, so
            the bytes do not depend on the ranks.
        wanted: the fingerprint.
    """
    arrays: dict[str, Any] = {}
    clips: list[dict[str, Any]] = [dict(c) for c in clips_header["clips"]]
    for i, content, f0 in features:
        arrays[f"{i:05d}.content"], arrays[f"{i:05d}.f0"] = content, f0
        clips[i] |= {"num_samples": lengths[i], "num_content": len(content), "num_f0": len(f0)}
    header = {"stamp": wanted, "sample_rate": clips_header["sample_rate"], "embedder": embedder, "clips": clips}
    return arrays, header


def save_mute(recipe: Recipe, work: Workspace, extractor: Extractor, settings: dict[str, Any]) -> None:
    """Write the features of silence, for the mute clips that teach the voice to be silent."""
    if mute_done(recipe, work, settings):
        return
    chunk_len = recipe.preprocess.chunk_len
    silence = np.zeros(int(chunk_len * FEATURE_RATE), dtype=np.float32)
    ((_, content, f0),) = extractor([silence])
    write_mute(recipe, work, settings, content, len(f0), int(chunk_len * recipe.data.sample_rate))


def write_mute(
    recipe: Recipe, work: Workspace, settings: dict[str, Any], content: Any, num_f0: int, num_samples: int
) -> None:
    """Write the silent clip: its content features [T50, C], and no pitch."""
    header = {
        "stamp": mute_fingerprint(recipe, settings),
        "num_samples": num_samples,
        "num_content": len(content),
        "num_f0": num_f0,
    }
    save_arrays(work.mute_file, {"00000.content": content, "00000.f0": np.zeros(num_f0, np.float32)}, header)


def mute_fingerprint(recipe: Recipe, settings: dict[str, Any]) -> str:
    return fingerprint(settings, recipe.preprocess.chunk_len, recipe.data.sample_rate)


def mute_done(recipe: Recipe, work: Workspace, settings: dict[str, Any]) -> bool:
    return not recipe.extract.include_mutes or is_done(work.mute_file, mute_fingerprint(recipe, settings))


def finish(recipe: Recipe, work: Workspace, settings: dict[str, Any], clips: dict[Unit, str], shard: Shard) -> None:
    """Write the report once every unit is done, whoever did it."""
    left = sum(done_header(recipe, work, u, settings, s) is None for u, s in clips.items())
    if left and shard.does_all:
        raise StageError(
            f"extract: {left} of {len(clips)} units in {work.features_dir} were replaced meanwhile: another job works "
            "in this run folder with other settings;",
            "end one, then run the stage again",
        )
    if left:
        logger.info("extract: this part is done, %d units are left to others", left)
        return
    if not mute_done(recipe, work, settings):
        logger.info("extract: this part is done, the silent clip is left to another")
        return
    remove_leftovers(work.features_dir, len(clips))
    frames = write_report(work, settings, clips, "extract")
    logger.info("extract: %d content frames; %s", frames, work.features_report_file)


def write_report(work: Workspace, settings: dict[str, Any], clips: dict[Unit, str], stage: str) -> int:
    """Write the report of features that are all there, and return how many content frames they have."""
    headers = [unit_header(work.features_file(u.id), FeaturesHeader, stage) for u in clips]
    frames = sum(c["num_content"] for h in headers for c in h["clips"])
    report = {"settings": settings, "clips": fingerprint(list(clips.values())), "content_frames": frames}
    write_json(work.features_report_file, report)
    return frames
